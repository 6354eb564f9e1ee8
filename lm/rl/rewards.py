"""What a text earns: functions (records, texts, **arguments) -> scores, by their dotted paths in
config.rewards.

A score is a number, or None where the reward can't tell, such as a record whose right answer is
none: the texts of that prompt aren't learnt from, and are counted. What asks a model is a class,
made as (experiment, **arguments) and called as (records, texts, params).
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm import build

Scores = Sequence[float | None]


class Text(NamedTuple):
    """What a policy wrote.

    Attributes:
      text: without what ends it.
      prompt_ids, ids: of the prompt, and of the text with its stop token.
      has_ended: by itself, not at the limit.
    """

    text: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    has_ended: bool


def make(experiment: build.Experiment) -> dict[str, Callable]:
    """The rewards of config.rewards by name.

    Raises:
      ValueError: no such function, or arguments that it doesn't take.
    """
    made = {}
    for name, entry in experiment.config.rewards.items():
        arguments = entry.to_dict()
        path = arguments.pop("type")
        del arguments["weight"]
        where = f"config.rewards.{name}"

        reward = build.resolve(path, f"{where}.type")
        if not callable(reward):
            raise ValueError(f"{where}.type = {path!r} is no function")
        given = (experiment,) if inspect.isclass(reward) else ([], [])
        try:
            inspect.signature(reward).bind(*given, **arguments)
        except TypeError as error:
            raise ValueError(f"{where} = {arguments}: {error}") from None

        if inspect.isclass(reward):
            made[name] = reward(experiment, **arguments)
        else:
            made[name] = _OfFunction(reward, arguments)
    return made


class _OfFunction:
    """A function with its arguments. The first process calls it, and tells the others."""

    def __init__(self, function: Callable, arguments: Mapping[str, Any]):
        self._function, self._arguments = function, arguments

    def __call__(self, records, texts, params) -> Scores:
        del params
        if jax.process_count() == 1:
            return self._function(records, texts, **self._arguments)
        return _told_by_first(lambda: self._function(records, texts, **self._arguments), len(texts))


def _told_by_first(compute: Callable[[], Scores], count: int) -> Scores:
    """What the first process computes, on all of them.

    Raises:
      RuntimeError: it failed there; on the first process its own error.
    """
    error, found = None, np.full(count + 1, np.nan)
    if jax.process_index() == 0:
        try:
            scores = compute()
            _check_count(scores, count)
            found[1:] = [math.nan if score is None else score for score in scores]
            found[0] = 1
        except Exception as raised:
            error = raised
    found = multihost_utils.broadcast_one_to_all(found)
    if found[0] != 1:
        raise error or RuntimeError("a reward failed on the first process")
    return [None if math.isnan(score) else float(score) for score in found[1:]]


def _check_count(scores: Scores, count: int) -> None:
    if len(scores) != count:
        raise ValueError(f"a reward gave {len(scores)} scores of {count} texts")


def score(
    made: Mapping[str, Callable],
    records: Sequence[Mapping[str, Any]],
    texts: Sequence[Text],
    params,
) -> dict[str, np.ndarray]:
    """Reward -> f64 [texts], NaN where it can't tell.

    Raises:
      ValueError: another number of scores, or one that is no finite number; the reward is named.
    """
    scores = {}
    for name, reward in made.items():
        found = list(reward(records, texts, params))
        where = f"the reward {name!r} (config.rewards.{name})"
        if len(found) != len(texts):
            raise ValueError(f"{where} gave {len(found)} scores of {len(texts)} texts")

        for value, text in zip(found, texts):
            is_number = isinstance(value, (int, float, np.number)) and math.isfinite(value)
            if value is not None and not is_number:
                raise ValueError(
                    f"{where} gave {value!r} for the text {text.text!r:.80}; wanted a finite "
                    "number, or None where it can't tell"
                )
        scores[name] = np.array([math.nan if v is None else float(v) for v in found])
    return scores


# --- answers and forms ---


def exact(
    records: Sequence[Mapping[str, Any]],
    texts: Sequence[Text],
    *,
    key: str = "answer",
    lowercase: bool = False,
) -> Scores:
    """1 where a text is its record's `key`, but for white space around it, else 0."""
    scores: list[float | None] = []
    for record, text in zip(records, texts):
        wanted, found = record.get(key), text.text.strip()
        if not isinstance(wanted, (str, int, float)) or not str(wanted).strip():
            scores.append(None)
            continue
        wanted = str(wanted).strip()
        is_right = found.lower() == wanted.lower() if lowercase else found == wanted
        scores.append(float(is_right))
    return scores


def pattern(
    records: Sequence[Mapping[str, Any]], texts: Sequence[Text], *, pattern: str, key: str = ""
) -> Scores:
    """1 where the regular expression is found in a text, else 0; with `key` its first group must be
    that of the record.
    """
    compiled_pattern = re.compile(pattern)
    scores: list[float | None] = []
    for record, text in zip(records, texts):
        found = compiled_pattern.search(text.text)
        if not key:
            scores.append(float(found is not None))
        elif record.get(key) is None:
            scores.append(None)
        else:
            scores.append(float(bool(found) and found[1].strip() == str(record[key]).strip()))
    return scores


def length(
    records: Sequence[Mapping[str, Any]], texts: Sequence[Text], *, least: int = 0, most: int
) -> Scores:
    """0 for a text of `least` to `most` tokens, and less by 1 / `most` for each token too many or
    too few.
    """
    scores = []
    for text in texts:
        count = len(text.ids)
        scores.append(-max(least - count, count - most, 0) / most)
    return scores


def ended(records: Sequence[Mapping[str, Any]], texts: Sequence[Text]) -> Scores:
    """1 for a text that ends by itself, 0 for one that reaches the limit."""
    return [float(text.has_ended) for text in texts]
