"""Mixtures: rows of several sources, in shares that may change with the steps.

Each row is of one source, packed as if it were alone, so shares are those of tokens. Which source a
row is of is no matter of chance: it is the one that is furthest behind its share, so that after any
number of rows each has its share, to within a row of each stream.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import files
from lm.data.sources import Document, Documents


class Schedule(NamedTuple):
    """A weight that follows the steps: linear between points, constant behind the last one."""

    steps: tuple[float, ...]
    weights: tuple[float, ...]

    def at(self, step: int) -> float:
        """Returns the weight at a step."""
        return float(np.interp(step, self.steps, self.weights))


def schedule(weight: Sequence[float], where: str) -> Schedule:
    """Returns the schedule of config.data.mixture.NAME.weight: (weight,), or (weight at step 0,
    step, weight there, step, weight there, ...).

    Raises:
      ValueError: another tuple, steps that don't rise, or a weight below 0.
    """
    steps = (0.0, *weight[1::2])
    weights = tuple(weight[0::2])
    rises = all(a < b for a, b in zip(steps, steps[1:]))
    if len(steps) != len(weights) or not rises or min(weights) < 0:
        raise ValueError(
            f"{where} = {tuple(weight)}; wanted (weight,) or (weight, step, weight, ...), of "
            "rising steps, and weights of at least 0"
        )

    return Schedule(steps, weights)


@dataclasses.dataclass(frozen=True)
class Mixture(Documents):
    """The documents of several sources, one source behind another.

    Attributes:
      parts: name -> documents.
      schedules: name -> weight.
      factors: name -> what its weight is multiplied by.
    """

    parts: Mapping[str, Documents] = dataclasses.field(default_factory=dict)
    schedules: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def shares(self, step: int) -> np.ndarray:
        """Returns the share of each part at a step, f64 [parts]; they sum to 1."""
        weights = [self.schedules[name].at(step) * self.factors[name] for name in self.parts]
        return np.asarray(weights) / sum(weights)


def mix(
    parts: Mapping[str, Documents],
    schedules: Mapping[str, Schedule],
    sizes: Mapping[str, int],
    exponent: float,
) -> Mixture:
    """Returns a mixture in which a part's share is proportional to weight * size^exponent.

    With the exponent 0 weights are shares. With 1 they are epochs: a weight of 2 is twice as often
    as one of 1, for each document. Between, small sources are raised (Conneau et al. 2020, arXiv
    1911.02116, section 3.1; the exponent is one by the temperature).

    Args:
      sizes: in tokens, where the exponent isn't 0; a part's size may be 0 for what its card says.

    Raises:
      ValueError: parts that are no texts, without a size where one is needed, or without any weight
        at some step.
    """
    where = "config.data.mixture"
    for name, documents in parts.items():
        if documents.kind != "text":
            raise ValueError(
                f"{where}.{name} has examples of the kind {documents.kind!r}, no texts"
            )

    factors = {}
    for name, documents in parts.items():
        size = sizes[name] or _size_in_card(documents)
        if exponent and not size:
            raise ValueError(
                f"{where}.{name}.size is 0, and it is no corpus with a card that says how many "
                "tokens it has: set it, or config.data.mixture_exponent = 0"
            )
        factors[name] = size**exponent if exponent else 1.0

    # Between two points of all schedules weights are linear: they are 0 at points, if anywhere.
    for step in {step for schedule_ in schedules.values() for step in schedule_.steps}:
        if not any(schedule_.at(step) for schedule_ in schedules.values()):
            raise ValueError(f"{where}: all weights are 0 at step {step:g}")

    fingerprint = files.short_hash_of_parts(d.fingerprint.encode() for d in parts.values())
    cards = [card for documents in parts.values() for card in documents.cards]
    items = _Joined(list(parts.values()))
    return Mixture(
        items,
        fingerprint,
        cards=tuple(cards),
        parts=dict(parts),
        schedules=dict(schedules),
        factors=factors,
    )


def _size_in_card(documents: Documents) -> int:
    """The tokens of a corpus's training split; 0 where it has no card, or the card has none."""
    sizes = [card["splits"].get("train", {}).get("tokens", 0) for card in documents.cards]
    return sum(sizes)


class _Joined(Sequence):
    """Documents of several sources as one sequence."""

    def __init__(self, parts: Sequence[Documents]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        begin = self._ends[part] - len(self._parts[part])
        return self._parts[part][index - begin]


def stream(
    mixture: Mixture, make_stream: Callable, rows_per_step: int, *, seed: int, number: int, **others
) -> "MixedStream":
    """Returns the stream of a mixture's training rows.

    Args:
      make_stream: (documents, seed=, number=, ...) -> the stream of a part.
      rows_per_step: see `MixedStream`.
      others: further arguments of `make_stream`.
    """
    streams = {}
    for place, (name, documents) in enumerate(mixture.parts.items()):
        # Equal documents in two parts come at different times.
        own_seed = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
        streams[name] = make_stream(documents, seed=own_seed, number=number, **others)

    return MixedStream(streams, mixture.shares, rows_per_step, seed=seed, number=number)


class MixedStream:
    """Rows of several streams, one row each time.

    Args:
      streams: name -> the stream of each part.
      shares: step -> share of each.
      rows_per_step: that this stream gives to a batch.
      seed, number: of the run, and of this stream: streams don't take the same parts at the same
        time.
    """

    def __init__(
        self,
        streams: Mapping[str, Any],
        shares: Callable[[int], np.ndarray],
        rows_per_step: int,
        *,
        seed: int,
        number: int,
    ):
        self._streams, self._shares, self._rows_per_step = streams, shares, rows_per_step
        self._num_rows = 0
        # What each part is behind its share, in rows.
        self._behind = np.random.default_rng([seed, number]).random(len(streams))

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        shares = self._shares(self._num_rows // self._rows_per_step)
        self._behind = self._behind + shares

        # A part without a share now waits, however far behind it was.
        chosen = int(np.argmax(np.where(shares > 0, self._behind, -math.inf)))
        self._behind[chosen] -= 1
        self._num_rows += 1
        return next(self._streams[list(self._streams)[chosen]])

    def epochs_begun(self) -> float:
        """Returns the epochs that have begun of the part with the most."""
        return max(stream.epochs_begun() for stream in self._streams.values())

    def get_state(self) -> dict:
        """Returns the state, JSON-able."""
        states = {name: stream.get_state() for name, stream in self._streams.items()}
        return {"rows": self._num_rows, "behind": self._behind.tolist(), "parts": states}

    def set_state(self, state: dict) -> None:
        self._num_rows = int(state["rows"])
        self._behind = np.asarray(state["behind"], np.float64)
        if state["parts"].keys() != self._streams.keys():
            raise ValueError(f"it is of a mixture of {list(state['parts'])}")
        for name, stream in self._streams.items():
            stream.set_state(state["parts"][name])

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
