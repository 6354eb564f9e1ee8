"""Says what tuning changed on each task, from the runs of sweep.py and the base's evals.

python experiments/instructions/table.py --workdir=runs/instructions --before=runs/before
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from absl import app, flags
from etils import epath

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lm
from lm.reports.comparison import compare_runs
from lm.reports.sweeps import finished_runs, mean_interval
from lm.reports.tables import align


def main_score(comparison: Mapping) -> str:
    """The first score of an eval: accuracy, or what its texts are scored by."""
    names = [key.removesuffix("_difference") for key in comparison if key.endswith("_difference")]
    return "accuracy" if "accuracy" in names else names[0]


def rows_of(workdir: epath.Path, before: epath.Path) -> list[tuple[str, ...]]:
    """A row for each task: held-out clusters first."""
    runs = finished_runs(workdir)
    source_args = runs[0].run.config["data"]["source_args"]
    held_out = source_args["held_out_clusters"].split(",")
    comparisons = [compare_runs(run.run.path, before) for run in runs]

    rows = []
    for task, entry in source_args["tasks"].items():
        cluster = entry["instructions"]["cluster"]
        of_seeds = [comparison[task] for comparison in comparisons]
        score = main_score(of_seeds[0])

        tuned = mean_interval([result[score] for result in of_seeds])
        difference = mean_interval([result[f"{score}_difference"] for result in of_seeds])
        rows.append(
            (
                task,
                f"{cluster}, held out" if cluster in held_out else cluster,
                score,
                f"{of_seeds[0][f'{score}_other']:.3f}",
                f"{tuned.mean:.3f}",
                f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})",
                ", ".join(f"{result['p_holm']:.2g}" for result in of_seeds),
            )
        )
    return sorted(rows, key=_held_out_first)


def _held_out_first(row: tuple[str, ...]) -> tuple:
    task, cluster, *_ = row
    return not cluster.endswith("held out"), cluster, task


def main(argv: list[str]) -> None:
    del argv
    header = ("task", "cluster", "score", "base", "tuned", "difference", "p of each seed")
    print(align([header, *rows_of(epath.Path(_WORKDIR.value), epath.Path(_BEFORE.value))]))


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", "runs/instructions", "The sweep's directory.")
    _BEFORE = flags.DEFINE_string("before", "runs/before", "The run with the base's evals.")
    app.run(main)
