"""Search: Optuna proposes further runs from what the runs so far have reached.

It is asked and told; the runs and their directories are a sweep's like any other. There is no data
base: the study is made anew from the directories whenever a worker wants another run.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from lm.sweep import halving

MAX_PROPOSALS = 100  # until one is a run that there isn't yet


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
        self, base: ConfigDict, finished: Sequence[tuple[Mapping, float]], taken: Sequence[Mapping]
    ) -> dict[str, Any]:
        """The changes of another run.

        Args:
          finished: (changes, value of the metric) of each run that has one.
          taken: the changes of all runs that there are.

        Raises:
          ValueError: the space has no more runs.
        """
        import optuna  # slow, and not always there

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        highest = halving.higher_is_better(self.metric, base, "search: metric")

        make_sampler = self.sampler or (lambda seed: optuna.samplers.TPESampler(seed=seed))
        study = optuna.create_study(
            direction="maximize" if highest else "minimize", sampler=make_sampler(len(taken))
        )

        space = dict(self.space)
        for changes, value in finished:
            params = {key: changes[key] for key in space if key in changes}
            if params.keys() == space.keys():
                trial = optuna.create_trial(params=params, distributions=space, value=value)
                study.add_trial(trial)

        for _ in range(MAX_PROPOSALS):
            proposal = study.ask(space).params
            if proposal not in [dict(changes) for changes in taken]:
                return proposal
        raise ValueError(
            f"search: {MAX_PROPOSALS} proposals in a row are runs that there are already; the "
            f"space has fewer than {self.number}"
        )
