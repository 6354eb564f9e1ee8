"""What run directories say: configuration, metrics, predictions, and how far a run came."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from lm import config as config_lib
from lm import files
from lm.reports import comparison, tables

MAX_STEP = 2**53


@dataclasses.dataclass
class Run:
    """A run directory, or the directory of evals of a checkpoint.

    Attributes:
      name: what a page calls it.
      path: the directory.
      config: config.json, or the configuration of the newest evaluation; {} without them.
      curves: metric -> steps and values, of metrics.jsonl and of what --mode=eval measured, in the
        order of the steps; numbers alone are metrics.
      evals: eval -> the last step at which it ran.
      evaluations: eval-STEP.json, by their steps.
      size: run.json: parameters, steps in all, versions, ...; {} without it.
      corpora: corpora.json: the summaries of corpora's cards; None without it.
    """

    name: str
    path: epath.Path
    config: dict = dataclasses.field(default_factory=dict)
    curves: dict[str, tuple[list[int], list[float]]] = dataclasses.field(default_factory=dict)
    evals: dict[str, int] = dataclasses.field(default_factory=dict)
    evaluations: list[dict] = dataclasses.field(default_factory=list)
    size: dict = dataclasses.field(default_factory=dict)
    corpora: Any = None

    @functools.cached_property
    def step(self) -> int:
        """The last step that anything was measured at; 0 if there is none."""
        return max((steps[-1] for steps, _ in self.curves.values()), default=0)

    @functools.cached_property
    def last_values(self) -> dict[str, float]:
        """The last value of each metric, without bounds that are of another step than it is."""
        last = {name: values[-1] for name, (_, values) in self.curves.items()}
        for name, (steps, _) in self.curves.items():
            for bound in (f"{name}_low", f"{name}_high"):
                if bound in last and self.curves[bound][0][-1] != steps[-1]:
                    del last[bound]
        return last


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_number(value: float) -> float:
    """A number that a float can hold; an integer that none can is infinite."""
    if isinstance(value, int) and abs(value) < MAX_STEP:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


# --- reading ---


def read(path: epath.Path, name: str) -> Run:
    """Reads a run directory. One that is missing is a run that hasn't begun.

    Raises:
      ValueError: a file in it is damaged or too large, or no plain file; the message names it.
    """
    run = Run(name, path)
    if not path.exists():
        return run
    # Not its checkpoints: a run that goes on replaces them meanwhile.
    files.check_no_link(path / "predictions")
    files.check_tree(path / "predictions")
    if (path / "config.json").exists():
        run.config = files.read_json(files.check_sized(path / "config.json"))
    if (path / "run.json").exists():
        run.size = files.read_json(files.check_sized(path / "run.json"))
    if (path / "corpora.json").exists():
        run.corpora = files.read_json(files.check_sized(path / "corpora.json")).get("corpora")
    lines = []
    if (path / "metrics.jsonl").exists():
        lines = files.read_jsonl_log(files.check_sized(path / "metrics.jsonl"))
    for file in path.glob("eval-*.json"):
        if file.name.removeprefix("eval-").removesuffix(".json").isdecimal():
            run.evaluations.append(files.read_json(files.check_sized(file)))
    for line in (*lines, *run.evaluations):
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < MAX_STEP:
            raise ValueError(f"{path}: metrics of step {str(step)[:80]!r}; wanted an integer")

    # What was evaluated again counts: sorting is stable.
    run.evaluations.sort(key=_step)
    for line in sorted([*lines, *map(_results, run.evaluations)], key=_step):
        _add(run, line)
    if not run.config and run.evaluations:
        config = run.evaluations[-1].get("config")
        run.config = config if isinstance(config, dict) else {}
    try:
        config_lib.flatten(run.config)
    except RecursionError:
        raise ValueError(f"{path}: its configuration is nested too deep") from None
    return run


def _step(line: Mapping) -> int:
    return line["step"]


def _results(evaluation: Mapping) -> dict:
    """The metrics of eval-STEP.json, which has other things beside them."""
    metrics = {key: value for key, value in evaluation.items() if key.startswith("eval/")}
    return metrics | {"step": evaluation["step"]}


def _add(run: Run, line: Mapping) -> None:
    """Adds a line of metrics to a run's curves."""
    step = line["step"]
    for name, value in line.items():
        if name != "step" and is_number(value):
            steps, values = run.curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(as_number(value))
            if name.startswith("eval/"):
                run.evals[name.split("/")[1]] = step


def flat_config(run: Run) -> dict[str, str]:
    """ "a.b" -> its value as JSON, of a run's configuration."""
    flat = config_lib.flatten(run.config)
    return {key: json.dumps(value, ensure_ascii=False) for key, value in flat.items()}


# --- how far runs came ---


def planned_steps(config: Mapping) -> int | None:
    """The steps that a configuration asks for; None where it doesn't say, as for epochs."""
    flat = config_lib.flatten(dict(config))
    sizes = (flat.get("data.batch_size"), flat.get("data.length"))
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    try:
        length = str(flat.get("train.length"))
        return config_lib.total_steps(
            length, batch_tokens=sizes[0] * sizes[1], steps_of_epochs=_unknown
        )
    except ValueError:
        return None


def _unknown(epochs) -> None:
    """Only the data say how many steps an epoch has."""


FINISHED, EVALUATED = "finished", "evaluated"


def state(run: Run) -> str:
    """How far a run came, in words; `FINISHED` or `EVALUATED` if it is whole.

    The steps of a run whose length is in epochs stand in run.json. Without it such a run is
    finished when all its evals have run at its last step, which they do at the end.
    """
    if not run.path.exists():
        return "not begun"
    if not run.curves:
        return "no metrics"
    if "train/loss" not in run.curves:
        return EVALUATED

    planned = planned_steps(run.config) or run.size.get("total_steps")
    planned = planned if isinstance(planned, int) else None
    evals = run.config.get("evals")
    missing = []
    for name in evals if isinstance(evals, dict) else ():
        if run.evals.get(name) != run.step:
            missing.append(name)
    left = ""
    if (run.path / "CLAIM.json").exists():
        left = " (it has CLAIM.json: a process works in it, or was killed)"
    if planned and run.step < planned:
        return f"unfinished: step {run.step:,} of {planned:,}{left}"
    if missing:
        return f"unfinished: at step {run.step:,} without {', '.join(sorted(missing))}{left}"
    return FINISHED


def is_whole(run: Run) -> bool:
    return state(run) in (FINISHED, EVALUATED)


# --- metrics ---


def evals_metrics(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Eval -> metric -> value. The eval has the task in it for those of lm_eval: "harness/piqa"."""
    evals: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        prefix, _, path = key.partition("/")
        name, _, metric = path.rpartition("/")
        if prefix == "eval" and name:
            evals.setdefault(name, {})[metric] = value
    return evals


def headlines(runs: Sequence[Run]) -> list[str]:
    """The metrics that stand for each eval of any of the runs, and the training loss."""
    names: dict[str, None] = {}
    has_loss = False
    for run in runs:
        values = run.last_values
        has_loss = has_loss or "train/loss" in values
        for name, metrics in evals_metrics(values).items():
            names |= dict.fromkeys(f"eval/{name}/{m}" for m in tables.main_metrics(metrics))
    return [*names, *["train/loss"] * has_loss]


def interval(metric: str, values: Mapping[str, float]) -> tuple[float, float] | None:
    """The 95% interval of a metric, METRIC_low to METRIC_high; None if it has none."""
    low, high = values.get(f"{metric}_low"), values.get(f"{metric}_high")
    return None if low is None or high is None else (low, high)


# --- predictions ---


class Predictions:
    """The newest predictions of an eval: its lines, and what they are about.

    Raises:
      ValueError: a file is damaged or too large; the message names it.
    """

    def __init__(self, step: int, path: epath.Path):
        self.step = step
        self.lines = [line for _, line in files.read_jsonl(str(files.check_sized(path)))]
        about = path.parent / comparison.about_path(path.name)
        self.about = files.read_json(files.check_sized(about)) if about.exists() else {}


def predictions(run: Run) -> dict[str, Predictions]:
    """Eval -> its newest predictions."""
    newest = comparison.newest_predictions(run.path)
    return {name: Predictions(step, path) for name, (step, path) in newest.items()}


def samples(run: Run) -> str:
    """The texts that the run's model wrote last, of samples.md; "" if there are none."""
    path = run.path / "samples.md"
    if not path.exists():
        return ""
    text = files.read_text(str(files.check_sized(path)))
    return text.rpartition("<!-- lm step ")[2].partition("-->\n")[2]
