"""What the runs of a sweep say together: means over seeds, which differences are significant, which
axis matters most.

A *setting* is all that a run changed but its seed. A run that can't be held against the others is
set aside: it is shown with the reason, and is in no mean, no test and no share.
"""

import collections
import dataclasses
import json
import logging
import math
import signal
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm import config as config_lib
from lm import files
from lm.evals.scores import statistics
from lm.reports import comparison, page, run_sections
from lm.reports import metrics as metrics_lib
from lm.reports import runs as runs_lib
from lm.reports.page import Cell, Section, Text

PLAN = "sweep.json"  # in the directory of a sweep
FAILED = "failed.json"  # in that of a run that failed: its exit code and its last lines
SEED = "seed"
# Changes of these change how many steps a run has.
LENGTHS = ("train.length", "data.batch_size", "data.length")
LEVEL = 0.05


# --- the plan ---


@dataclasses.dataclass
class SweepRun:
    """A run of a sweep.

    Attributes:
      run: what its directory says.
      changes: key -> value.
      aside: why it can't be held against the others; [] if it can.
      marks: what else is to be said of it.
    """

    run: runs_lib.Run
    changes: dict[str, Any]
    aside: list[str] = dataclasses.field(default_factory=list)
    marks: list[str] = dataclasses.field(default_factory=list)

    @property
    def setting(self) -> str:
        return setting_of(self.changes)


def setting_of(changes: Mapping[str, Any]) -> str:
    """What a run changes but for its seed, in words, in whatever order the changes come."""
    return in_words({key: changes[key] for key in sorted(changes) if key != SEED})


def in_words(changes: Mapping[str, Any]) -> str:
    parts = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]
    return ", ".join(parts) or "as configured"


def read(workdir: epath.Path, plan: Mapping, where: str) -> tuple[list[str], list[SweepRun]]:
    """The axes and the runs of a plan, see sweep.json.

    Args:
      where: what errors call the plan.

    Raises:
      ValueError: it names no runs, two runs with one name, a path in a name's place, or other
        types than it should; a run's file is damaged.
    """
    planned = plan.get("runs")
    if not isinstance(planned, list) or not planned:
        raise ValueError(f"{where} names no runs; wanted a list of them in it as `runs`")

    sweep_runs: dict[str, SweepRun] = {}
    for entry in planned:
        if not isinstance(entry, dict) or not isinstance(entry.get("changes"), dict):
            raise ValueError(
                f"{where}: a run is {str(entry)[:80]}; wanted its name and its changes"
            )
        name = files.check_name(entry.get("name"), where)
        if name in sweep_runs:
            raise ValueError(f"{where} names two runs {name!r}")
        files.check_no_link(workdir / name)
        run = runs_lib.read(workdir / name, name)
        sweep_runs[name] = SweepRun(run, entry["changes"])

    all_runs = list(sweep_runs.values())
    axes = dict.fromkeys(key for run in all_runs for key in run.changes)
    named = plan.get("axes")
    if isinstance(named, list):
        known = [axis for axis in named if isinstance(axis, str) and axis in axes]
        axes = dict.fromkeys(known) | axes
    return list(axes), all_runs


def finished_step(size: Mapping) -> int:
    """The last step of a run that has come to an end, by its run.json; 0: it hasn't."""
    steps = size.get("total_steps") if size.get("finished") else 0
    return steps if isinstance(steps, int) else 0


def is_finished(size: Mapping, length: str) -> bool:
    """Whether a run has come to the end of this config.train.length, by its run.json."""
    return bool(size.get("finished")) and size.get("length") == length


def finished_runs(workdir: epath.Path) -> list[SweepRun]:
    """The runs of a sweep's directory that have come to their ends; says which ones haven't.

    Raises:
      ValueError: see `read`.
    """
    path = workdir / PLAN
    finished = []
    for sweep_run in read(workdir, files.read_json(path), str(path))[1]:
        if finished_step(sweep_run.run.size):
            finished.append(sweep_run)
        else:
            logging.warning("not finished, left out: %s", sweep_run.run.name)
    return finished


def read_failures(runs: Sequence[runs_lib.Run]) -> dict[str, str]:
    """Run -> how it failed, of those that have not come to their end after that."""
    failures = {}
    for run in runs:
        path = run.path / FAILED
        if path.exists():
            failure = files.read_json(files.check_sized(path))
            if not is_finished(run.size, failure.get("length")):
                failures[run.name] = why(failure)
    return failures


def why(failure: Mapping) -> str:
    """The last line of what a failed run printed that says something, of FAILED."""
    lines = failure.get("lines")
    said = []
    for line in lines if isinstance(lines, list) else ():
        if isinstance(line, str) and line.strip():
            said.append(line)

    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    if not errors and failure.get("code") == -signal.SIGKILL:
        return "killed by signal 9, as the system does where memory runs out"
    return (errors or said or ["it said nothing"])[-1]


def strangers(workdir: epath.Path, names: Iterable[str]) -> list[str]:
    """Run directories in the sweep's that aren't among the `names` of its plan."""
    names = set(names)
    found = []
    for path in workdir.iterdir():
        if path.name not in names and (path / "config.json").exists():
            found.append(path.name)
    return sorted(found)


# --- the main metric ---


def main_metric(runs: Sequence[runs_lib.Run], wanted: str = "") -> str:
    """The metric by which runs are held against each other: `wanted`, or config.checkpoint.best, or
    the first one that stands for an eval.

    Raises:
      ValueError: no run has it, or any.
    """
    known = dict.fromkeys(name for run in runs for name in run.last_values)
    if wanted:
        if wanted not in known:
            raise ValueError(f"no run has the metric {wanted!r}; there are {sorted(known)}")
        return wanted

    for run in runs:
        checkpoint = run.config.get("checkpoint")
        best = checkpoint.get("best") if isinstance(checkpoint, dict) else ""
        if isinstance(best, str) and best in known:
            return best
    for name in runs_lib.headlines(runs):
        return name
    raise ValueError(
        f"none of {len(runs)} runs has metrics: {_few_names(runs)}. Train or evaluate them first"
    )


def _few_names(runs: Sequence[runs_lib.Run]) -> str:
    return ", ".join(str(run.path) for run in runs[:5]) + (", ..." if len(runs) > 5 else "")


# --- which runs count ---


def set_aside(
    sweep_runs: Sequence[SweepRun],
    metric: str,
    failures: Mapping[str, str],
    step: int | None = None,
) -> None:
    """Says of each run why it can't be held against the others, and what else is odd about it.

    Args:
      failures: run -> how it failed.
      step: at which runs that count have ended; None: where most of those have that should have
        the same steps.
    """
    for sweep_run in sweep_runs:
        sweep_run.aside = _own_reasons(sweep_run, metric, failures)

    # What most of the runs have that still count.
    _mark_other_steps(_counted(sweep_runs), step)
    _mark_other_records(_counted(sweep_runs), metric)
    _mark_other_evals(_counted(sweep_runs))


def _counted(sweep_runs: Sequence[SweepRun]) -> list[SweepRun]:
    return [sweep_run for sweep_run in sweep_runs if not sweep_run.aside]


def _own_reasons(sweep_run: SweepRun, metric: str, failures: Mapping[str, str]) -> list[str]:
    run = sweep_run.run
    reasons = _other_changes(sweep_run)
    if run.name in failures:
        reasons.append(f"failed: {failures[run.name]}")
    if not runs_lib.is_whole(run):
        reasons.append(runs_lib.state(run))
        return reasons

    values = run.last_values
    if metric not in values:
        reasons.append(f"no {metric}")
    elif not math.isfinite(values[metric]):
        reasons.append(f"{metric} is {values[metric]}")
    elif metric.startswith("eval/") and run.curves[metric][0][-1] != run.step:
        step = run.curves[metric][0][-1]
        reasons.append(f"{metric} is of step {step:,}, the run of step {run.step:,}")
    return reasons


def _other_changes(sweep_run: SweepRun) -> list[str]:
    """Where the run's configuration is not what the plan says, as in a directory that was renamed
    by hand. A run may have been lengthened.
    """
    flat = config_lib.flatten(sweep_run.run.config)
    reasons = []
    for key, value in sweep_run.changes.items():
        if key in flat and key != "train.length" and flat[key] != value:
            there = in_words({key: flat[key]})
            reasons.append(f"its config.json has {there}, the plan {json.dumps(value)}")
    return reasons


def _mark_other_steps(sweep_runs: Sequence[SweepRun], step: int | None) -> None:
    """Sets aside runs with other steps than `step`, or than most of those that should have the
    same.
    """
    groups: dict[str, list[SweepRun]] = {}
    for sweep_run in sweep_runs:
        lengths = json.dumps([sweep_run.changes.get(key) for key in LENGTHS])
        groups.setdefault(lengths, []).append(sweep_run)
    for group in groups.values():
        usual = step or _most_common([sweep_run.run.step for sweep_run in group])
        for sweep_run in group:
            if sweep_run.run.step != usual:
                sweep_run.aside.append(f"other steps: {sweep_run.run.step:,}, others {usual:,}")


def _most_common(values: Sequence[Any]):
    """The value that is there most often; of several the greatest."""
    counts = collections.Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _mark_other_records(sweep_runs: Sequence[SweepRun], metric: str) -> None:
    """Sets aside runs whose main metric is of other records than most, as far as their predictions
    say so.
    """
    name = metric.removeprefix("eval/").rpartition("/")[0].replace("/", "-")
    fingerprints = {}
    for sweep_run in sweep_runs:
        newest = comparison.newest_predictions(sweep_run.run.path)
        if name in newest:
            about = comparison.read_about(newest[name][1])
            fingerprints[sweep_run.run.name] = str(about.get("fingerprint", ""))

    known = [fingerprint for fingerprint in fingerprints.values() if fingerprint]
    usual = _most_common(known) if known else ""
    for sweep_run in sweep_runs:
        fingerprint = fingerprints.get(sweep_run.run.name)
        if fingerprint and fingerprint != usual:
            sweep_run.aside.append(f"{name} is of other records: {fingerprint}, others {usual}")


def _mark_other_evals(sweep_runs: Sequence[SweepRun]) -> None:
    """Marks runs with other evals than most; where they have the main metric they count."""
    if not sweep_runs:
        return
    usual = _most_common([tuple(sorted(sweep_run.run.evals)) for sweep_run in sweep_runs])
    for sweep_run in sweep_runs:
        evals = sweep_run.run.evals.keys()
        parts = [f"lacks {name}" for name in sorted(set(usual) - evals)]
        parts += [f"has {name}" for name in sorted(evals - set(usual))]
        if parts:
            sweep_run.marks.append(f"other evals: {', '.join(parts)}")


# --- means over seeds ---


class Mean(NamedTuple):
    n: int
    mean: float
    low: float | None  # of its 95% interval; None for a single value
    high: float | None


def mean_interval(values: Sequence[float]) -> Mean:
    """The mean of values and its 95% interval by Student's t (1908): mean +- t s / sqrt(n), with
    n - 1 degrees of freedom.
    """
    from scipy.stats import t

    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Mean(n, mean, None, None)
    half = float(t.ppf(0.975, n - 1)) * statistics.standard_error(np.asarray(values))
    return Mean(n, mean, mean - half, mean + half)


def means_of_settings(sweep_runs: Sequence[SweepRun], metric: str) -> dict[str, Mean]:
    """Setting -> the mean of a metric over its seeds, of the runs that count."""
    values: dict[str, list[float]] = {}
    for sweep_run in sweep_runs:
        if not sweep_run.aside:
            value = float(sweep_run.run.last_values[metric])
            values.setdefault(sweep_run.setting, []).append(value)
    return {setting: mean_interval(of_setting) for setting, of_setting in values.items()}


def best_setting(means: Mapping[str, Mean], metric: str) -> str | None:
    """The setting with the best mean; None where nothing says which way is better."""
    is_higher = metrics_lib.is_higher_better(metric)
    if is_higher is None or not means:
        return None
    choose = max if is_higher else min
    return choose(means, key=lambda setting: means[setting].mean)


# --- tests ---


class Test(NamedTuple):
    """The predictions of a run against those of the best setting with the same seed."""

    setting: str
    seed: Any
    eval: str
    score: str
    value: float
    best: float
    difference: float
    low: float  # of the difference's 95% interval
    high: float
    p: float
    p_holm: float


def paired_tests(
    sweep_runs: Sequence[SweepRun], best: str
) -> tuple[list[Test], list[tuple[str, str]]]:
    """Holds each run that counts against that of the best setting with the same seed, in each eval
    of which both have predictions.

    Returns:
      The tests, with p-values corrected for the number of all of them (Holm 1979), and what could
      not be compared: (reason, run).
    """
    of_best: dict[str, SweepRun] = {}
    for sweep_run in sweep_runs:
        if sweep_run.setting == best and not sweep_run.aside:
            of_best[json.dumps(sweep_run.changes.get(SEED))] = sweep_run

    tests: list[Test] = []
    not_compared: list[tuple[str, str]] = []
    for sweep_run in sweep_runs:
        if sweep_run.aside or sweep_run.setting == best:
            continue
        name = sweep_run.run.name
        other = of_best.get(json.dumps(sweep_run.changes.get(SEED)))
        if other is None:
            not_compared.append(("the best setting has no run with its seed", name))
            continue
        logging.info("comparing %s with %s", name, other.run.name)
        tests_of_run, reasons = _tests_of_pair(sweep_run, other)
        tests += tests_of_run
        not_compared += [(reason, name) for reason in reasons]

    corrected = statistics.holm([test.p for test in tests]) if tests else []
    return [test._replace(p_holm=p) for test, p in zip(tests, corrected)], not_compared


def _tests_of_pair(first: SweepRun, second: SweepRun) -> tuple[list[Test], list[str]]:
    """A test for each eval of which both runs have predictions, and why others have none."""
    newest = comparison.newest_predictions(first.run.path)
    newest_other = comparison.newest_predictions(second.run.path)
    tests = []
    reasons = []
    for name in newest:
        if name not in newest_other:
            reasons.append(f"{name}: no predictions of the best setting")
            continue
        steps = (newest[name][0], newest_other[name][0])
        if steps != (first.run.step, second.run.step):
            reasons.append(f"{name}: predictions of steps {steps[0]:,} and {steps[1]:,}")
            continue
        try:
            result = comparison.compare_eval(name, newest[name], newest_other[name], is_alone=True)
        except ValueError as error:
            reasons.append(str(error))
            continue
        except run_sections.DAMAGED as error:
            reasons.append(f"{name}: its predictions are damaged: {error!r}")
            continue
        if result:
            tests.append(_test(first, name, result))
        else:
            reasons.append(f"{name}: no score of single examples")
    return tests, reasons or ["no eval has predictions"] * (not newest)


def _test(sweep_run: SweepRun, name: str, result: Mapping[str, Any]) -> Test:
    """The test of the score that stands for an eval: the first one, accuracy where there is one."""
    keys = [key for key in result if key.endswith("_difference") and f"{key[:-11]}_p" in result]
    score = keys[0].removesuffix("_difference")
    return Test(
        setting=sweep_run.setting,
        seed=sweep_run.changes.get(SEED),
        eval=name,
        score=score,
        value=result[score],
        best=result[f"{score}_other"],
        difference=result[f"{score}_difference"],
        low=result[f"{score}_low"],
        high=result[f"{score}_high"],
        p=comparison.main_p(result),
        p_holm=math.nan,
    )


# --- axes ---


class Share(NamedTuple):
    """How much of the variance an axis explains."""

    levels: int
    share: float | None  # None: it has one level, or no level twice
    by_chance: float  # what an axis without effect explains on average


def axis_shares(levels: Mapping[str, Sequence[Hashable]], values: Sequence[float]) -> dict:
    """The share of the variance of a metric that the main effect of each axis explains: eta
    squared, the sum of squares between the means of its levels over the whole one (Fisher 1925;
    Cohen 1973, Educational and Psychological Measurement 33). In a full grid the shares of the axes
    and of their interactions sum to 1, and are the variances of functional ANOVA (Hutter, Hoos and
    Leyton-Brown 2014).

    An axis of k levels without any effect explains (k - 1) / (n - 1) of n runs on average.

    Args:
      levels: axis -> its value in each run.
      values: the metric of each run.

    Returns:
      axis -> Share; {} where the values don't vary.
    """
    y = np.asarray(values, np.float64)
    if not len(y) or y.min() == y.max():
        return {}
    # Shares don't change with the unit: in this one no square overflows.
    y = (y - y.min()) / (y.max() - y.min())
    total = float(np.square(y - y.mean()).sum())

    shares = {}
    for axis, axis_levels in levels.items():
        groups: dict[Hashable, list[float]] = {}
        for level, value in zip(axis_levels, y.tolist()):
            groups.setdefault(level, []).append(value)
        between = 0.0
        for group in groups.values():
            between += len(group) * (np.mean(group) - y.mean()) ** 2
        is_told = 1 < len(groups) < len(y)
        by_chance = (len(groups) - 1) / (len(y) - 1)
        shares[axis] = Share(len(groups), float(between / total) if is_told else None, by_chance)
    return shares


def axes_that_are_one(levels: Mapping[str, Sequence[Hashable]]) -> list[list[str]]:
    """The axes in groups: those of a group divide the runs in the same way."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for axis, axis_levels in levels.items():
        division = tuple(list(axis_levels).index(level) for level in axis_levels)
        groups.setdefault(division, []).append(axis)
    return list(groups.values())


def is_full_grid(levels: Mapping[str, Sequence[Hashable]]) -> bool:
    """Whether each combination of the levels of the axes is there equally often."""
    combinations = collections.Counter(zip(*levels.values()))
    size = math.prod(len(set(axis_levels)) for axis_levels in levels.values())
    return len(combinations) == size and len(set(combinations.values())) == 1


# --- sections ---


def sections(
    axes: Sequence[str],
    sweep_runs: Sequence[SweepRun],
    metric: str,
    *,
    failures: Mapping[str, str],
    step: int | None = None,
    unplanned: Sequence[str] = (),
) -> list[Section]:
    """What is said of a sweep before its runs side by side.

    Args:
      metric: the main one.
      failures, step: see `set_aside`.
      unplanned: run directories that the plan doesn't name.
    """
    set_aside(sweep_runs, metric, failures, step)
    means = means_of_settings(sweep_runs, metric)
    best = best_setting(means, metric)
    return [
        _runs_section(axes, sweep_runs, metric, unplanned),
        _means_section(sweep_runs, means, best, metric),
        _axes_section(axes, sweep_runs, metric),
        _tests_section(sweep_runs, best, metric),
    ]


def _runs_section(
    axes: Sequence[str], sweep_runs: Sequence[SweepRun], metric: str, unplanned: Sequence[str]
) -> Section:
    """A row for each run, with its changes and its main metrics."""
    headlines = runs_lib.headlines([sweep_run.run for sweep_run in sweep_runs])
    names = list(dict.fromkeys([metric, *headlines]))[: run_sections.MAX_COLUMNS]
    rows: list[list] = []
    for sweep_run in sweep_runs:
        values = sweep_run.run.last_values
        said = "; ".join([*sweep_run.aside, *sweep_run.marks])
        state = Cell(said or "finished", mark="bad" if said else "")
        cells = [run_sections.metric_cell(name, values) for name in names]
        changes = [_change(sweep_run.changes.get(axis)) for axis in axes]
        rows.append([sweep_run.run.name, state, *changes, sweep_run.run.step, *cells])
    short = [run_sections.short_name(name) for name in names]
    columns = ["run", "state", *axes, "step", *short]

    num_aside = sum(bool(sweep_run.aside) for sweep_run in sweep_runs)
    text = f"{len(sweep_runs)} runs are planned; the main metric is {metric}, its last value."
    parts: list[page.Part] = [Text(text)]
    if num_aside:
        text = f"{num_aside} of them are in no mean, share or test below: see their state."
        parts.append(Text(text, "bad"))
    if unplanned:
        text = f"Run directories that the plan doesn't name: {', '.join(unplanned)}."
        parts.append(Text(text, "bad"))
    return Section("Runs", [*parts, page.Table(columns, rows)])


def _change(value: Any) -> Cell | float | None:
    """A changed value as a cell that sorts as a number where it is one."""
    if value is None or runs_lib.is_number(value):
        return None if value is None else Cell(str(value), runs_lib.as_number(value))
    return Cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _means_section(
    sweep_runs: Sequence[SweepRun], means: Mapping[str, Mean], best: str | None, metric: str
) -> Section:
    """A row for each setting."""
    aside = collections.Counter(run.setting for run in sweep_runs if run.aside)
    rows: list[list] = []
    for setting in dict.fromkeys(sweep_run.setting for sweep_run in sweep_runs):
        left_out = aside.get(setting, 0)
        mark = Cell(str(left_out), left_out, "bad" if left_out else "")
        name = Cell(setting, mark="good" if setting == best else "")
        if setting in means:
            n, mean, low, high = means[setting]
            interval = "" if low is None else f"{page.number(low)} to {page.number(high)}"
            rows.append([name, n, mark, mean, interval])
        else:
            rows.append([name, 0, mark, None, ""])
    columns = ["setting", "runs", "set aside", f"mean {metric}", "95% interval"]
    text = "The interval is Student's t over the seeds of a setting; one run has none."
    if best is not None:
        text += " The best mean is green. That it is the best of many flatters it."
    return Section("Means over seeds", [Text(text), page.Table(columns, rows)])


def _axes_section(axes: Sequence[str], sweep_runs: Sequence[SweepRun], metric: str) -> Section:
    """How much of the variance each axis explains."""
    counted = _counted(sweep_runs)
    by_axis: dict[str, list[str]] = {}
    for axis in axes:
        by_axis[axis] = [json.dumps(run.changes.get(axis), sort_keys=True) for run in counted]
    levels = {", ".join(same): by_axis[same[0]] for same in axes_that_are_one(by_axis)}
    values = [float(sweep_run.run.last_values[metric]) for sweep_run in counted]
    shares = axis_shares(levels, values)
    if not shares:
        text = f"{metric} doesn't vary over the {len(counted)} runs that count."
        return Section("Which axis matters", [Text(text)])

    rows: list[list] = []
    for axis, (num_levels, share, by_chance) in shares.items():
        told = "can't be told" if share is None else share
        rows.append([axis, num_levels, told, by_chance])
    rows.sort(key=lambda row: -row[2] if isinstance(row[2], float) else 1.0)
    columns = ["axis", "values", "share of the variance", "of an axis without effect, on average"]
    text = (
        f"The share of the variance of {metric} that the main effect of an axis explains (eta "
        "squared: the sum of squares between the means of its values, over the whole one; Fisher "
        f"1925, Cohen 1973), over the {len(counted)} runs that count. An axis with one value, or "
        "with another one in each run, can't be told."
    )
    parts: list[page.Part] = [Text(text)]
    if not is_full_grid(levels):
        text = (
            "These runs are no full grid: axes that vary together share what they explain, and the "
            "shares may sum to more than 1."
        )
        parts.append(Text(text, "bad"))
    return Section("Which axis matters", [*parts, page.Table(columns, rows)])


def _verdict(test: Test) -> str:
    """What a test says of a run beside that of the best setting; "" if it isn't significant."""
    if test.p_holm >= LEVEL:
        return ""
    is_higher = metrics_lib.is_higher_better(test.score)
    if is_higher is None or test.difference == 0:
        return "significant"
    return f"significantly {'better' if is_higher == (test.difference > 0) else 'worse'}"


def _tests_section(sweep_runs: Sequence[SweepRun], best: str | None, metric: str) -> Section:
    """Which differences from the best setting are significant."""
    heading = "Differences from the best setting"
    if best is None:
        text = f"Nothing says which way of {metric} is better: no setting is the best."
        return Section(heading, [Text(text, "bad")])

    tests, not_compared = paired_tests(sweep_runs, best)
    rows = []
    for test in tests:
        said = Cell(_verdict(test), mark="differs" if _verdict(test) else "")
        interval = f"{test.low:+.4f} to {test.high:+.4f}"
        difference = Cell(f"{test.difference:+.4f} ({interval})", test.difference)
        p = [Cell(f"{value:.3g}", value) for value in (test.p, test.p_holm)]
        seed = _change(test.seed)
        scores = [test.value, test.best, difference]
        rows.append([test.setting, seed, f"{test.eval}/{test.score}", *scores, *p, said])
    columns = "setting,seed,score,value,the best's,difference (95%),p,p by Holm,".split(",")
    columns[-1] = f"at {LEVEL}"
    text = (
        f"The best setting is {best}. Each run is held against its run with the same seed, example "
        "by example: McNemar's test where there are predictions of labels, else the paired "
        f"bootstrap. Holm's correction is over all {len(tests)} tests. A test is of two trained "
        "models, and does not say that other seeds would differ as well."
    )
    parts: list[page.Part] = [Text(text)]
    if rows:
        parts.append(page.Table(columns, rows))

    names: dict[str, list[str]] = {}
    for reason, name in not_compared:
        names.setdefault(reason, []).append(name)
    for reason, of_reason in list(names.items())[:20]:
        parts.append(Text(f"Not compared: {reason}. {run_sections.few(of_reason)}", "bad"))
    if len(names) > 20:
        parts.append(Text(f"Not compared: {len(names) - 20} other reasons.", "bad"))
    return Section(heading, parts)
