"""Whether a text keeps to instructions that a program can check, in the manner of IFEval (Zhou et
al. 2023, arXiv 2311.07911).

A record has a list, `{"instructions": [{"type": "most_words", "count": 50}, ...]}`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.rl.rewards import Scores, Text


def followed(
    records: Sequence[Mapping[str, Any]], texts: Sequence[Text], *, all_or_none: bool = False
) -> Scores:
    """The share of its record's instructions that a text keeps to; None where there are none.

    Args:
      all_or_none: 1 where it keeps to all of them, else 0.

    Raises:
      ValueError: an instruction that isn't known, or other arguments than its own.
    """
    scores: list[float | None] = []
    for record, text in zip(records, texts):
        kept = [keeps(text.text, instruction) for instruction in record.get("instructions") or ()]
        if not kept:
            scores.append(None)
        else:
            scores.append(float(all(kept)) if all_or_none else sum(kept) / len(kept))
    return scores


def keeps(text: str, instruction: Mapping[str, Any]) -> bool:
    """Whether a text keeps to an instruction: a type of `CHECKS`, and its arguments."""
    arguments = dict(instruction)
    name = arguments.pop("type", None)
    if name not in CHECKS:
        raise ValueError(f"instruction {dict(instruction)}: type = {name!r}; valid: {list(CHECKS)}")
    try:
        return CHECKS[name](text.strip(), **arguments)
    except TypeError as error:
        raise ValueError(f"instruction {dict(instruction)}: {error}") from None


def _least_words(text: str, count: int) -> bool:
    return len(text.split()) >= count


def _most_words(text: str, count: int) -> bool:
    return len(text.split()) <= count


def _sentences(text: str, count: int) -> bool:
    *ended, _ = re.split(r"[.!?]+(?=\s|$)", text)
    return sum(re.search(r"\w", part) is not None for part in ended) == count


def _paragraphs(text: str, count: int) -> bool:
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()]) == count


def _bullets(text: str, count: int) -> bool:
    return len(re.findall(r"^\s*[*-] \S", text, re.MULTILINE)) == count


def _includes(text: str, words: Sequence[str]) -> bool:
    return all(_has_word(text, word) for word in words)


def _excludes(text: str, words: Sequence[str]) -> bool:
    return not any(_has_word(text, word) for word in words)


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _starts_with(text: str, words: str) -> bool:
    return text.startswith(words)


def _ends_with(text: str, words: str) -> bool:
    return text.endswith(words)


def _lower_case(text: str) -> bool:
    return bool(text) and text == text.lower()


def _upper_case(text: str) -> bool:
    return bool(text) and text == text.upper()


def _no_commas(text: str) -> bool:
    return bool(text) and "," not in text


def _is_json(text: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


CHECKS: dict[str, Callable[..., bool]] = {
    "least_words": _least_words,
    "most_words": _most_words,
    "sentences": _sentences,
    "paragraphs": _paragraphs,
    "bullets": _bullets,
    "includes": _includes,
    "excludes": _excludes,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "lower_case": _lower_case,
    "upper_case": _upper_case,
    "no_commas": _no_commas,
    "json": _is_json,
}
