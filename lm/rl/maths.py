"""Whether a text comes to the right answer of a problem of mathematics, by math-verify.

It runs in a process with limits: what a model writes may take a computer algebra system for ever.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm import limited
from lm.rl.rewards import Scores, Text

# Texts that one process looks at, each for so many seconds at most.
TOGETHER, SECONDS = 16, 3


def right(
    records: Sequence[Mapping[str, Any]], texts: Sequence[Text], *, key: str = "answer"
) -> Scores:
    """1 where the last answer in a text is worth what the record's `key` is, else 0; None where
    that is no expression. A text that takes too long is wrong.

    Raises:
      ValueError: math-verify isn't installed.
    """
    pairs = [(str(record.get(key) or ""), text.text) for record, text in zip(records, texts)]
    scores: list[float | None] = []
    for start in range(0, len(pairs), TOGETHER):
        scores += _verified(pairs[start : start + TOGETHER])
    return scores


def _verified(pairs: Sequence[tuple[str, str]]) -> list[float | None]:
    try:
        return limited.call(f"{__name__}:verify", pairs=pairs)
    except ValueError as error:
        if "math-verify" in str(error):
            raise
        # One of them took too much: which one?
        if len(pairs) == 1:
            logging.warning("the text %r counts as wrong: %s", pairs[0][1][:80], error)
            return [0.0]
        middle = len(pairs) // 2
        return _verified(pairs[:middle]) + _verified(pairs[middle:])


def verify(pairs: Sequence[Sequence[str]]) -> list[float | None]:
    """Of (right answer, text) pairs, see `right`; for a process of its own."""
    try:
        import math_verify
    except ImportError:
        raise ValueError(
            "the reward lm.rl.maths.right needs math-verify: pip install -c constraints.txt "
            "-e '.[posttrain]'"
        ) from None

    scores: list[float | None] = []
    for answer, text in pairs:
        wanted = math_verify.parse(f"${answer}$", parsing_timeout=SECONDS)
        # Of what is no expression nothing is left but its text.
        if all(isinstance(value, str) for value in wanted):
            scores.append(None)
            continue

        found = math_verify.parse(text, parsing_timeout=SECONDS)
        scores.append(float(math_verify.verify(wanted, found, timeout_seconds=SECONDS)))
    return scores
