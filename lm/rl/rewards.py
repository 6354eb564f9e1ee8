"""What a text earns: functions (records, texts, **arguments) -> scores, by their dotted paths in
config.rewards.

A score is a number, or None where the reward can't tell, such as a record whose right answer is
none: the texts of that prompt aren't learnt from, and are counted. What asks a model is a class,
made as (experiment, **arguments) and called as (records, texts, params).
"""

import functools
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
    """A function with its arguments, which needs no model."""

    def __init__(self, function: Callable, arguments: Mapping[str, Any]):
        self._function, self._arguments = function, arguments

    def __call__(self, records, texts, params) -> Scores:
        del params
        return self._function(records, texts, **self._arguments)


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
        compute = functools.partial(_numbers, name, reward, records, texts, params)
        if jax.process_count() == 1 or not isinstance(reward, _OfFunction):
            scores[name] = compute()
        else:
            # What runs on a host may say something else on another one.
            scores[name] = _told_by_first(compute, len(texts))
    return scores


def _numbers(name: str, reward: Callable, records, texts: Sequence[Text], params) -> np.ndarray:
    """The scores of a reward, checked, see `score`."""
    found = list(reward(records, texts, params))
    where = f"the reward {name!r} (config.rewards.{name})"
    if len(found) != len(texts):
        raise ValueError(f"{where} gave {len(found)} scores of {len(texts)} texts")

    for value, text in zip(found, texts):
        is_number = isinstance(value, (int, float, np.number)) and math.isfinite(value)
        if value is not None and not is_number:
            raise ValueError(
                f"{where} gave {value!r} for the text {text.text!r:.80}; wanted a finite number, "
                "or None where it can't tell"
            )
    return np.array([math.nan if value is None else float(value) for value in found])


def _told_by_first(compute: Callable[[], np.ndarray], count: int) -> np.ndarray:
    """f64 [count], what the first process computes, on all of them.

    Raises:
      RuntimeError: it failed there; on the first process its own error.
    """
    error, found = None, np.zeros(count + 1)
    if jax.process_index() == 0:
        try:
            found[1:], found[0] = compute(), 1
        except Exception as raised:
            error = raised

    # As bits: f64 would become f32 on the way.
    bits = multihost_utils.broadcast_one_to_all(found.view(np.uint32))
    found = np.asarray(bits).view(np.float64)
    if found[0] != 1:
        raise error or RuntimeError("a reward failed on the first process")
    return found[1:]


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
    if key and not compiled_pattern.groups:
        raise ValueError(
            f"pattern = {pattern!r} has no group, which key = {key!r} is to be found in"
        )
    scores: list[float | None] = []
    for record, text in zip(records, texts):
        found = compiled_pattern.search(text.text)
        if not key:
            scores.append(float(found is not None))
        elif record.get(key) is None:
            scores.append(None)
        else:
            group = (found and found[1]) or ""
            scores.append(float(group.strip() == str(record[key]).strip()))
    return scores


def length(
    records: Sequence[Mapping[str, Any]], texts: Sequence[Text], *, least: int = 0, most: int
) -> Scores:
    """0 for a text of `least` to `most` tokens, and less by 1 / `most` for each token too many or
    too few.
    """
    if not 0 <= least <= most or most < 1:
        raise ValueError(f"least = {least}, most = {most}; wanted 0 <= least <= most, from 1 on")
    scores = []
    for text in texts:
        count = len(text.ids)
        scores.append(-max(least - count, count - most, 0) / most)
    return scores


def ended(records: Sequence[Mapping[str, Any]], texts: Sequence[Text]) -> Scores:
    """1 for a text that ends by itself, 0 for one that reaches the limit."""
    return [float(text.has_ended) for text in texts]
