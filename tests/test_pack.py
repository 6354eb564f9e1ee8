"""From documents to rows: the document policy, windows, packing, streams and their states."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from lm.data import batch as batch_contract
from lm.data import pack
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer

LENGTH, BINS = 16, 3
TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def make_documents(num, seed=0, longest=40):
    """Texts of one character each, so that every token tells its document."""
    rng = random.Random(seed)
    return Documents(
        [Document(chr(33 + i) * rng.randint(1, longest), f"d{i}", "") for i in range(num)],
        "fingerprint",
    )


def make_stream(
    documents, packing="first_fit", number=0, num_streams=1, seed=0, label_prompt="", bins=BINS
):
    return pack.stream(
        documents,
        pack.Encoder(TOKENIZER, label_prompt),
        length=LENGTH,
        packing=packing,
        bins=bins,
        number=number,
        num_streams=num_streams,
        seed=seed,
    )


def take(stream, num):
    return [next(stream) for _ in range(num)]


def same(a, b):
    return all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


def pieces(row):
    """(tokens, targets) of each segment of a row."""
    return [
        tuple(tuple(row[name][row["segments"] == s].tolist()) for name in ("tokens", "targets"))
        for s in range(1, row["segments"].max() + 1)
    ]


# --- the policy ---


class Spelling(ByteTokenizer):
    """Starts every text it is given with a mark of its own: tokenizing apart and together
    differ.
    """

    def encode(self, text):
        return [1] + super().encode(text)


def test_document_policy():
    encoder = pack.Encoder(Spelling(), "\nLabel:")
    # each part apart
    text, prompt, word = ([1, *s.encode()] for s in ("words", "\nLabel:", " red"))
    document = Document("words", "n", "red")
    assert encoder.training(document) == [BOS, *text, *prompt, *word, EOS]
    assert encoder.prompt(document) == [BOS, *text, *prompt]
    assert encoder.text(document) == [BOS, *text]
    # No label, or a config that doesn't ask for it.
    assert encoder.training(document._replace(label="")) == [BOS, *text, EOS]
    assert pack.Encoder(Spelling(), "").training(document) == [BOS, *text, EOS]


def test_label_word_is_what_the_verbalizer_asks_for():
    assert pack.label_word("numpy") == " numpy"


# --- windows ---


@pytest.mark.parametrize("size", [2, 3, 15, 16, 17, 18, 32, 33, 34, 100])
def test_windows_hold_every_target_once(size):
    ids = list(range(1000, 1000 + size))
    windows = pack.windows(ids, LENGTH)
    assert np.concatenate([w["tokens"] for w in windows]).tolist() == ids[:-1]
    assert np.concatenate([w["targets"] for w in windows]).tolist() == ids[1:]
    assert all(
        0 < len(w["tokens"]) == len(w["targets"]) == len(w["weights"]) <= LENGTH
        and (w["weights"] == 1).all()
        for w in windows
    )
    assert len(windows) == -(-(size - 1) // LENGTH)


# --- streams ---


@pytest.mark.parametrize("packing", pack.PACKINGS)
def test_rows_keep_the_contract(packing):
    for row in take(make_stream(make_documents(20), packing), 60):
        batch_contract.check(row)
        assert set(row) == set(batch_contract.DTYPES) and row["tokens"].shape == (LENGTH,)
        # a view would keep all of the packer's rows in memory
        assert all(v.flags.owndata for v in row.values())
        used = row["segments"] > 0
        assert (
            (row["weights"] == used).all()
            and not row["tokens"][~used].any()
            and not row["positions"][~used].any()
        )
        # segments in order, padding last
        assert (np.diff(row["segments"][used]) >= 0).all() and used[: used.sum()].all()
        for s in range(1, row["segments"].max() + 1):
            inside = row["segments"] == s
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
            # Within a segment each target is the next input: nothing of another document comes
            # between.
            assert row["targets"][inside][:-1].tolist() == row["tokens"][inside][1:].tolist()
            assert len(set(row["tokens"][inside].tolist()) - {BOS}) <= 1
    if packing == "concat_then_split":
        assert used.all()  # its rows are full


def test_concat_then_split_is_the_documents_in_order():
    documents = make_documents(10)
    total = sum(len(d.text) + 1 for d in documents.items)
    rows = take(make_stream(documents, "concat_then_split"), -(-3 * total // LENGTH))
    tokens, targets = (
        np.concatenate([r[name] for r in rows]).tolist() for name in ("tokens", "targets")
    )
    orders = []
    for epoch in range(3):
        part = slice(epoch * total, (epoch + 1) * total)
        starts = [i for i, t in enumerate(tokens[part]) if t == BOS]
        orders.append([t for t, u in zip(targets[part], tokens[part]) if u == BOS])
        ends = [*starts[1:], total]
        # One epoch holds every document, whole.
        found = {
            (tuple(tokens[part][a:b]), tuple(targets[part][a:b])) for a, b in zip(starts, ends)
        }
        assert (
            found == {((BOS, *d.text.encode()), (*d.text.encode(), EOS)) for d in documents.items}
            and len(starts) == 10
        )
    assert len({tuple(o) for o in orders}) == 3  # shuffled anew


@pytest.mark.parametrize("bins", [1, 3, 8])
def test_first_fit_keeps_windows_whole_and_counts_each_once_an_epoch(bins):
    documents = make_documents(10)
    counts = Counter(
        {
            (tuple(w["tokens"].tolist()), tuple(w["targets"].tolist())): 0
            for d in documents.items
            for w in pack.windows([BOS, *d.text.encode(), EOS], LENGTH)
        }
    )
    repeated = Counter(
        (tuple(w["tokens"].tolist()), tuple(w["targets"].tolist()))
        # runs of one character recur
        for d in documents.items
        for w in pack.windows([BOS, *d.text.encode(), EOS], LENGTH)
    )
    total = sum(len(d.text) + 1 for d in documents.items)
    stream, epochs = make_stream(documents, bins=bins), 6
    seen = 0
    while seen < epochs * total:
        for piece in pieces(next(stream)):
            assert piece in counts
            counts[piece] += 1
            seen += len(piece[0])
    # Windows wait in at most `bins` open rows: no count may be further from the number of epochs
    # than that explains.
    waiting = 1 + -(-bins * LENGTH // total)
    assert all(abs(counts[p] / repeated[p] - epochs) <= waiting for p in counts), counts
    assert waiting < epochs - 1


def test_streams_share_the_documents_out():
    documents = make_documents(13)
    found = []
    for number in range(4):
        tokens = np.concatenate(
            [r["tokens"] for r in take(make_stream(documents, number=number, num_streams=4), 40)]
        )
        found.append({chr(t) for t in tokens} - {chr(BOS), chr(0)})
    assert set.union(*found) == {d.text[0] for d in documents.items} and sum(map(len, found)) == 13


def test_shuffles_differ():
    documents = make_documents(40, longest=5)

    def order(number=0, seed=0, num_streams=1, start=0):
        rows = take(make_stream(documents, "concat_then_split", number, num_streams, seed), 40)
        tokens, targets = (
            np.concatenate([r[name] for r in rows]) for name in ("tokens", "targets")
        )
        return targets[tokens == BOS].tolist()[start : start + 40 // num_streams]

    orders = [order(), order(seed=1), order(seed=2), order(start=40)]
    assert (
        all(sorted(o) == sorted(orders[0]) for o in orders) and len({tuple(o) for o in orders}) == 4
    )
    assert order() == order()
    # Streams of one run: neither the same permutation, nor that of the neighbour's next epoch.
    two = Documents(
        [Document(d.text[:1] * 3, d.name, "") for d in documents.items for _ in range(2)], ""
    )

    def permutation(number, epoch):
        rows = take(make_stream(two, "concat_then_split", number, 2), 40)
        tokens, targets = (
            np.concatenate([r[name] for r in rows]) for name in ("tokens", "targets")
        )
        return tuple(targets[tokens == BOS].tolist()[40 * epoch : 40 * epoch + 40])

    assert len({permutation(number, epoch) for number in range(2) for epoch in range(3)}) == 6


def test_labels_are_trained_on_where_asked():
    documents = Documents([Document("text", "n", "red")], "")
    rows = take(make_stream(documents, label_prompt="\n=", bins=1), 3)
    assert all(
        TOKENIZER.decode(piece[1]) == "text\n= red" and piece[1][-1] == EOS
        for row in rows
        for piece in pieces(row)
    )


@pytest.mark.parametrize("packing", pack.PACKINGS)
def test_state_restores_exactly(packing):
    documents, rng = make_documents(12), random.Random(0)
    per_epoch = sum(len(d.text) + 1 for d in documents.items) // LENGTH
    stream = make_stream(documents, packing)
    for _ in range(8):
        take(stream, rng.randint(0, per_epoch))  # in all, some four epochs
        state = json.loads(json.dumps(stream.get_state()))  # checkpoints keep it as JSON
        expected = take(stream, 20)
        fresh = make_stream(documents, packing)
        fresh.set_state(state)
        assert same(take(fresh, 20), expected)
        take(fresh, rng.randint(1, 20))
        fresh.set_state(state)  # a used stream goes back too
        assert same(take(fresh, 20), expected)
        assert json.loads(json.dumps(fresh.get_state())) == json.loads(
            json.dumps(stream.get_state())
        )
        fresh.close()
    stream.close()


def test_reading_the_state_changes_nothing():
    documents = make_documents(12)
    plain, watched = make_stream(documents), make_stream(documents)
    rows = take(plain, 30)
    for row in rows:
        watched.get_state()
        assert same([next(watched)], [row])
    # and rows handed out earlier are not written to again
    assert same(rows, take(make_stream(documents), 30))


def test_unknown_packing():
    with pytest.raises(ValueError, match="config.data.packing = 'best_fit'; valid.*first_fit"):
        make_stream(make_documents(3), "best_fit")


# --- evaluation ---


@pytest.mark.parametrize("num", [1, 30, 200])
def test_evaluation_rows_hold_each_window_once(num):
    rng = random.Random(num)
    windows = [
        w
        for i in range(num)
        for w in pack.windows(
            [BOS, *(rng.randrange(256) for _ in range(rng.randint(1, 40))), EOS], LENGTH
        )
    ]
    rows = pack.evaluation_rows(windows, LENGTH)
    for row in rows:
        batch_contract.check(row)
    as_tuple = lambda w: (tuple(w["tokens"].tolist()), tuple(w["targets"].tolist()))
    assert Counter(p for row in rows for p in pieces(row)) == Counter(map(as_tuple, windows))
    assert sum(r["weights"].sum() for r in rows) == sum(len(w["tokens"]) for w in windows)
    assert len(rows) <= len(windows) and same(rows, pack.evaluation_rows(windows, LENGTH))


def test_windows_without_weight_keep_it():
    window = pack.windows([BOS, 1, 2, 3], LENGTH)[0]
    window["weights"][:2] = 0
    row = pack.evaluation_rows([window], LENGTH)[0]
    assert (
        row["weights"].tolist() == [0, 0, 1] + [0] * 13
        and row["segments"].tolist() == [1, 1, 1] + [0] * 13
    )


def test_empty_row_is_padding():
    row = pack.empty_row(LENGTH)
    batch_contract.check(row)
    assert not any(v.any() for v in row.values())


def test_count_tokens_is_an_epoch_of_targets():
    documents = Documents([Document("abc", "n", "red"), Document("é", "n", "")], "")
    assert pack.count_tokens(documents, pack.Encoder(TOKENIZER, "")) == 4 + 3
    assert pack.count_tokens(documents, pack.Encoder(TOKENIZER, "\n=")) == 4 + len("\n= red") + 3
    # 16 epochs of 13 targets are 13 rows
    rows = take(make_stream(documents, "concat_then_split", label_prompt="\n="), 13)
    assert Counter(np.concatenate([r["targets"] for r in rows]).tolist())[EOS] == 32


def test_contract_check_finds_what_is_wrong():
    good = make_stream(make_documents(3)).__next__()
    for broken in (
        good | {"tokens": good["tokens"].astype(np.int64)},
        good | {"weights": good["weights"][:-1]},
        good
        | {"weights": np.ones_like(good["weights"]), "segments": np.zeros_like(good["segments"])},
    ):
        with pytest.raises(AssertionError):
            batch_contract.check(broken)
    changed = good | {"targets": good["targets"] + 1}
    assert (
        batch_contract.digest(good)
        == batch_contract.digest({k: v.copy() for k, v in good.items()})
        != batch_contract.digest(changed)
    )
