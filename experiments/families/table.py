"""Says how well each family does, from the runs of config.py: RUNS/FAMILY-SEED.

    python experiments/families/table.py --workdir=RUNS

It prints tables, and writes accuracy.png to that directory.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags
from etils import epath

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lm
from experiments.families.config import STEPS
from lm.reports import runs as runs_lib
from lm.reports.sweeps import mean_interval
from lm.reports.tables import align

ACCURACY = "eval/library/accuracy"
SCORES = ("accuracy", "accuracy_batch", "nll", "label_mass")


def read_runs(workdir: epath.Path) -> dict[str, list[runs_lib.Run]]:
    """Family -> its runs, in the order of their seeds.

    Raises:
      ValueError: a run is missing, or has not come to its end.
    """
    families: dict[str, list[runs_lib.Run]] = {}
    for family in STEPS:
        for path in sorted(path for path in workdir.glob(f"{family}-*") if path.is_dir()):
            run = runs_lib.read(path, path.name)
            if not runs_lib.is_whole(run):
                raise ValueError(f"{path} has not come to its end")
            families.setdefault(family, []).append(run)
    if missing := STEPS.keys() - families.keys():
        raise ValueError(f"{workdir} has no runs of {sorted(missing)}; wanted FAMILY-SEED of each")
    return families


def over_seeds(runs: Sequence[runs_lib.Run], metric: str) -> str:
    """The mean of a metric with its 95% interval, by Student's t over the seeds; "" where a run
    doesn't have it.
    """
    values = [run.last_values.get(metric, math.nan) for run in runs]
    if any(map(math.isnan, values)):
        return ""
    mean = mean_interval(values)
    if mean.low is None:
        return f"{mean.mean:.3f}"
    return f"{mean.mean:.3f} ± {mean.high - mean.mean:.3f}"


def of_each_seed(runs: Sequence[runs_lib.Run]) -> list[str]:
    """Accuracies with the interval that comes of the number of documents."""
    cells = []
    for run in runs:
        values = run.last_values
        low, high = runs_lib.interval(ACCURACY, values)
        cells.append(f"{values[ACCURACY]:.3f} ({low:.3f} to {high:.3f})")
    return cells


def plot(families: Mapping[str, Sequence[runs_lib.Run]], path: epath.Path) -> None:
    """Draws the accuracy over the FLOPs, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for number, (family, runs) in enumerate(families.items()):
        for run in runs:
            flops_per_step = run.last_values["train/flops"] / run.step
            steps, accuracies = run.curves[ACCURACY]
            flops = [step * flops_per_step / 1e12 for step in steps]
            label = family if run is runs[0] else None
            axis.plot(flops, accuracies, color=f"C{number}", marker=".", label=label)
    axis.set(xlabel="training, in 10^12 FLOPs", ylabel="accuracy")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main(unused_argv) -> None:
    workdir = epath.Path(_WORKDIR.value)
    families = read_runs(workdir)

    rows = [("family", "parameters", "steps", "FLOPs", *SCORES, "bits per byte")]
    by_seed = [("family", *(f"seed {seed}" for seed in range(len(families["causal"]))))]
    for family, runs in families.items():
        last = runs[0].last_values
        scores = [over_seeds(runs, f"eval/library/{score}") for score in SCORES]
        bits = over_seeds(runs, "eval/validation/bits_per_byte")
        size = (f"{runs[0].size['parameters']:,}", str(runs[0].step), f"{last['train/flops']:.4g}")
        rows.append((family, *size, *scores, bits))
        by_seed.append((family, *of_each_seed(runs)))
    print(f"{align(rows)}\n\n{align(by_seed)}")

    seconds = 0.0
    for runs in families.values():
        seconds += sum(run.last_values["train/seconds_total"] for run in runs)
    print(f"\n{seconds / 3600:.2f} hours in all, one run after the other")
    plot(families, workdir / "accuracy.png")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", "runs/families", "Where the runs are.")
    app.run(main)
