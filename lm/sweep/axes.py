"""What the runs of a sweep change, as a list of points: {key of the configuration: value}.

A sweep file's get_sweep() returns such a list. Constraints, sums and everything else are Python's:

    points = product(grid({"optimizer.learning_rate": [1e-3, 3e-3]}), seeds(3))
    return [point for point in points if ...]
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Point = dict[str, Any]


def grid(axes: Mapping[str, Sequence]) -> list[Point]:
    """Each value of each axis with each of the others; the last axis changes fastest.

    Raises:
      ValueError: an axis without values.
    """
    values = [_values(key, axis) for key, axis in axes.items()]
    return [dict(zip(axes, combination)) for combination in itertools.product(*values)]


def zipped(axes: Mapping[str, Sequence]) -> list[Point]:
    """The first values of all axes, the second ones, and so on.

    Raises:
      ValueError: an axis without values, or axes of different lengths.
    """
    values = {key: _values(key, axis) for key, axis in axes.items()}
    lengths = {key: len(axis) for key, axis in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"zipped axes have different numbers of values: {lengths}")
    return [dict(zip(axes, combination)) for combination in zip(*values.values())]


def product(*sweeps: Sequence[Point]) -> list[Point]:
    """Each point of each sweep joined with each of the others.

    Raises:
      ValueError: two of them change the same key.
    """
    points = []
    for combination in itertools.product(*sweeps):
        joined: Point = {}
        for point in combination:
            if both := sorted(joined.keys() & point.keys()):
                raise ValueError(f"two factors of a product change {', '.join(both)}")
            joined |= point

        points.append(joined)
    return points


def seeds(number: int) -> list[Point]:
    """The seeds 0 to `number` - 1."""
    return grid({"seed": range(number)})


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Numbers between two bounds, all equally likely."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        return _rounded(rng.uniform(self.low, self.high), self)


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """Numbers between two positive bounds, all orders of magnitude equally likely."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        return _rounded(math.exp(rng.uniform(math.log(self.low), math.log(self.high))), self)


def random(
    number: int, axes: Mapping[str, Sequence | Uniform | LogUniform], seed: int = 0
) -> list[Point]:
    """Points drawn at random; a longer list begins with the shorter one.

    Args:
      axes: what a key's values are drawn from: one of a sequence, or a distribution, whose numbers
        are rounded to three digits.

    Raises:
      ValueError: an axis without values, or a distribution without a range.
    """
    for key, axis in axes.items():
        if isinstance(axis, (Uniform, LogUniform)):
            lowest = 0 if isinstance(axis, LogUniform) else -math.inf
            if not lowest < axis.low < axis.high < math.inf:
                raise ValueError(f"{key}: {axis} has no range to draw from")
        else:
            _values(key, axis)

    rng = np.random.default_rng(seed)
    points = []
    for _ in range(number):
        point = {}
        for key, axis in axes.items():
            is_drawn = isinstance(axis, (Uniform, LogUniform))
            point[key] = axis.draw(rng) if is_drawn else axis[int(rng.integers(len(axis)))]

        points.append(point)
    return points


def _values(key: str, axis: Sequence) -> list:
    if isinstance(axis, (str, bytes)) or not hasattr(axis, "__len__"):
        raise ValueError(f"the axis {key} is {axis!r}; wanted a list of its values")

    if not len(axis):
        raise ValueError(f"the axis {key} has no values")
    return list(axis)


def _rounded(value: float, axis: Uniform | LogUniform) -> float:
    """Three digits: as many as anybody tunes, and a run's name shows all of them. Where that leaves
    the axis, its end.
    """
    return min(max(float(f"{value:.3g}"), axis.low), axis.high)
