"""Search: Optuna proposes further runs from what the runs so far have reached.

It is asked and told; the runs and their directories are a sweep's like any other. There is no data
base: the study is made anew from the directories whenever a worker wants another run.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lm.sweep import halving

MAX_PROPOSALS = 100  # until one is a run that there isn't yet


class Exhausted(ValueError):
    """All runs of a space are there."""


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched.

    Attributes:
      metric: to be the best, such as "eval/validation/loss".
      space: key of the configuration -> optuna.distributions.BaseDistribution.
      number: of runs in all, those of get_sweep() among them.
      sampler: of Optuna, made by a function of a seed; None: TPESampler.
    """

    metric: str
    space: Mapping[str, Any]
    number: int
    sampler: Any = None

    def check(self, base: ConfigDict) -> None:
        """Raises ValueError for a metric that no eval gives, or without Optuna."""
        halving.higher_is_better(self.metric, base, "search: metric")
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ValueError(
                "get_search() needs Optuna: pip install -c constraints.txt -e '.[sweep]'"
            ) from None

    def describe(self) -> dict:
        """What sweep.json says of it."""
        space = {key: str(distribution) for key, distribution in self.space.items()}
        return {"metric": self.metric, "space": space, "number": self.number}

    def propose(
        self,
        base: ConfigDict,
        finished: Sequence[tuple[Mapping, float]],
        is_new: Callable[[Mapping], bool],
        seed: int,
    ) -> dict[str, Any]:
        """The changes of another run.

        Args:
          finished: (changes, value of the metric) of each run that has come to its end.
          is_new: whether there is no run with these changes yet.
          seed: of the sampler.

        Raises:
          Exhausted: the space seems to have no more runs.
        """
        import optuna  # slow, and not always there

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        highest = halving.higher_is_better(self.metric, base, "search: metric")

        make_sampler = self.sampler or (lambda seed: optuna.samplers.TPESampler(seed=seed))
        study = optuna.create_study(
            direction="maximize" if highest else "minimize", sampler=make_sampler(seed)
        )

        space = dict(self.space)
        for changes, value in finished:
            params = {key: changes[key] for key in space if key in changes}
            if params.keys() != space.keys():
                continue
            # Optuna refuses NaN, and a point of get_sweep() outside of the space.
            with contextlib.suppress(ValueError):
                trial = optuna.create_trial(params=params, distributions=space, value=value)
                study.add_trial(trial)

        for _ in range(MAX_PROPOSALS):
            proposal = study.ask(space).params
            if is_new(proposal):
                return proposal
        raise Exhausted(
            f"search: {MAX_PROPOSALS} proposals in a row are runs that there are already; the "
            f"space has fewer than {self.number}"
        )
