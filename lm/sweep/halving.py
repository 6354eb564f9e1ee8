"""Successive halving: all runs are trained a little, the best of them longer (Jamieson and
Talwalkar 2016, arXiv 1502.07943). A run that goes on is resumed, not started again.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from lm import config as config_lib
from lm.reports import metrics as metrics_lib


@dataclasses.dataclass(frozen=True)
class Halving:
    """How runs are made longer.

    A schedule that ends with the run (cosine, linear, wsd) is stretched each time; "constant" is
    comparable over lengths.

    Attributes:
      metric: by which runs are compared, such as "eval/validation/loss".
      lengths: config.train.length of each round, in steps or tokens, growing.
      keep: the share of the settings that goes on to the next round, at least one; the seeds of a
        setting go on together.
    """

    metric: str
    lengths: tuple[str, ...]
    keep: float = 1 / 3

    def check(self, base: ConfigDict) -> None:
        """Raises ValueError for rounds that don't grow, or a metric that has no better side."""
        amounts = [config_lib.parse_length(length) for length in self.lengths]

        units = {unit for _, unit in amounts}
        numbers = [amount for amount, _ in amounts]
        growing = all(one < other for one, other in zip(numbers, numbers[1:]))
        if len(numbers) < 2 or len(units) > 1 or "epochs" in units or not growing:
            raise ValueError(
                f"halving: lengths = {self.lengths}; wanted two or more, growing, all in steps or "
                "all in tokens"
            )

        if not 0 < self.keep < 1:
            raise ValueError(f"halving: keep = {self.keep}; wanted a share between 0 and 1")

        higher_is_better(self.metric, base, "halving: metric")

    def survivors(self, settings: Mapping[str, str], values: Mapping[str, float]) -> list[str]:
        """The runs of a round that go on to the next one.

        Args:
          settings: run -> its setting, which runs that differ in their seed share.
          values: run -> its metric at the round's end; runs that failed have none, and their
            setting doesn't go on.
        """
        by_setting: dict[str, list[float]] = {}
        for run, setting in settings.items():
            by_setting.setdefault(setting, []).append(values.get(run, math.nan))

        means = {setting: float(np.mean(scores)) for setting, scores in by_setting.items()}

        sign = -1 if metrics_lib.is_higher_better(self.metric) else 1
        whole = [setting for setting, mean in means.items() if math.isfinite(mean)]

        ranked = sorted(whole, key=lambda setting: sign * means[setting])
        # Less a little: 0.28 of 25 are a little more than 7 in floating point.
        best = ranked[: max(1, math.ceil(self.keep * len(means) - 1e-9))]
        return [run for run, setting in settings.items() if setting in best]


def higher_is_better(metric: str, config: ConfigDict, key: str) -> bool:
    """Whether more of a metric of config.evals is better.

    Raises:
      ValueError: no such eval, or a metric that doesn't say how good a model is; `key` names it.
    """
    return metrics_lib.check_best(metric, dict.fromkeys(config.evals), key)


def steps_of(length: str, tokens_per_step: int) -> int:
    """The steps of a round."""
    return config_lib.total_steps(length, batch_tokens=tokens_per_step, steps_of_epochs=None)


def at_step(lines: Sequence[Mapping], metric: str, step: int) -> float | None:
    """A metric's value at a step of metrics.jsonl; None if there is none."""
    for line in lines:
        if line.get("step") == step and metric in line:
            return float(line[metric])
    return None
