"""Rewards of token ids, which a small model learns in seconds."""


def even(records, texts):
    """The share of a text's ids that are even."""
    return [sum(i % 2 == 0 for i in text.ids) / len(text.ids) for text in texts]


def constant(records, texts, *, value=0.0):
    """The same for each."""
    return [value for _ in texts]


def nothing_of(records, texts, *, key):
    """1, or None where the record's `key` is true."""
    return [
        None if record.get(key) else float(len(text.ids) % 2)
        for record, text in zip(records, texts)
    ]


def broken(records, texts, *, how):
    """What no reward may do."""
    if how == "dies":
        raise RuntimeError("this reward is broken")
    return [float("nan")] * len(texts) if how == "nan" else [1.0]
