"""How far the runs of a sweep are: what their directories say, and nothing else."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from lm import build, claim, files
from lm import config as config_lib
from lm.reports import sweeps
from lm.sweep import halving, plan

LOG = "log.txt"  # what its process printed
MAX_TAIL = 100_000  # bytes of it that are looked at

WAITING, RUNNING, DONE, FAILED_STATUS = "waiting", "running", "done", "failed"
OUT = "out"  # of a halving: others go on


class State(NamedTuple):
    """A run as its directory shows it.

    Attributes:
      status: one of the words above.
      length: the config.train.length that it is to reach next; "" for what its changes say.
      step: of the end that it has come to, of a shorter length too; 0: none.
      why: of a run that failed: its error.
    """

    status: str
    length: str = ""
    step: int = 0
    why: str = ""


def check_directories(
    sweep: plan.Sweep, runs: Sequence[plan.PlannedRun], workdir: epath.Path
) -> list[str]:
    """Returns the names of directories that are no runs of the sweep.

    Raises:
      ValueError: one that was renamed: it has the configuration of a planned run; or the directory
        of a planned run has another configuration.
    """
    # Runs may differ in what a run may change on its way, such as its evals.
    by_identity: dict[str, list[str]] = {}
    for run in runs:
        by_identity.setdefault(plan.identity(sweep.config(run)), []).append(run.name)

    for run in runs:
        file = workdir / run.name / "config.json"
        found = files.read_json(file) if file.exists() else None
        if found is not None and run.name not in by_identity.get(plan.identity(found), []):
            # A Hugging Face checkpoint decides more of it.
            config = build.apply_hf_config(sweep.config(run))
            config_lib.check_resumable(found, config, str(workdir / run.name))

    strangers = sweeps.strangers(workdir, [run.name for run in runs]) if workdir.exists() else []
    for name in strangers:
        found = files.read_json(workdir / name / "config.json")
        for planned in by_identity.get(plan.identity(found), []):
            if not (workdir / planned).exists():
                raise ValueError(
                    f"{workdir / name} has the configuration of the run {planned}: it was "
                    "renamed. Rename it back, or remove it"
                )
    return strangers


def read(
    sweep: plan.Sweep, runs: Sequence[plan.PlannedRun], workdir: epath.Path
) -> dict[str, State]:
    """The state of each run by its name."""
    if sweep.halving:
        return _read_halving(sweep, runs, workdir)
    states = {}
    for run in runs:
        length = run.changes.get("train.length", sweep.base.train.length)
        states[run.name] = _read_run(workdir / run.name, length)
    return states


def _read_run(directory: epath.Path, length: str) -> State:
    """The state of a run that is to reach `length`."""
    size = _read_size(directory)
    step = sweeps.finished_step(size)
    if sweeps.is_finished(size, length):
        return State(DONE, step=step)
    if (directory / sweeps.FAILED).exists():
        return State(FAILED_STATUS, step=step, why=read_why(directory))
    if (directory / claim.NAME).exists():
        return State(RUNNING, step=step)
    return State(WAITING, step=step)


def _read_size(directory: epath.Path) -> dict:
    """run.json; {} of a run that hasn't begun."""
    with contextlib.suppress(FileNotFoundError):
        return files.read_json(directory / "run.json")
    return {}


def read_why(directory: epath.Path) -> str:
    """The last line of what a failed run printed that says something."""
    return sweeps.why(files.read_json(directory / sweeps.FAILED))


def last_lines(directory: epath.Path, number: int) -> list[str]:
    """The end of what a run's process printed."""
    path = directory / LOG
    if not path.exists():
        return []
    text = path.read_bytes()[-MAX_TAIL:].decode(errors="replace")
    return text.replace("\r", "\n").splitlines()[-number:]


def has_reached(directory: epath.Path, length: str) -> bool:
    """Whether a run has come to the end of this config.train.length."""
    return _read_run(directory, length).status == DONE


def _read_halving(
    sweep: plan.Sweep, runs: Sequence[plan.PlannedRun], workdir: epath.Path
) -> dict[str, State]:
    """The states of a halving's runs. A round begins when the one before is over for all."""
    rule = sweep.halving
    states: dict[str, State] = {}
    going_on = list(runs)
    for number, length in enumerate(rule.lengths):
        values = {}
        for run in going_on:
            state = _read_round(sweep, run, workdir / run.name, length)
            states[run.name] = state._replace(length=length)
            if state.status == DONE:
                values[run.name] = metric_at(workdir / run.name, rule.metric, state.step)

        if any(states[run.name].status in (WAITING, RUNNING) for run in going_on):
            return states
        if number + 1 == len(rule.lengths):
            return states

        settings = {run.name: sweeps.setting_of(run.changes) for run in going_on}
        known = {name: value for name, value in values.items() if value is not None}
        names = rule.survivors(settings, known)
        for run in going_on:
            if run.name not in names and states[run.name].status == DONE:
                states[run.name] = states[run.name]._replace(status=OUT)

        going_on = [run for run in going_on if run.name in names]
    return states


def _read_round(sweep, run: plan.PlannedRun, directory: epath.Path, length: str) -> State:
    """The state of a run in a round. One that is longer already has been through it."""
    config = sweep.config(run)
    steps = halving.steps_of(length, config.data.batch_size * config.data.length)
    state = _read_run(directory, length)
    if state.status != DONE and metric_at(directory, sweep.halving.metric, steps) is not None:
        # Evals of the last step come before its checkpoint: a kill between leaves a round undone.
        if _read_size(directory).get("total_steps", 0) > steps:
            return State(DONE, step=steps)
    return state


def metric_at(directory: epath.Path, metric: str, step: int) -> float | None:
    """A metric's value at a step of a run; None if it has none."""
    return halving.at_step(files.read_jsonl_log(directory / "metrics.jsonl"), metric, step)


def last_value(directory: epath.Path, metric: str) -> float | None:
    """A metric's last value in a run; None if it has none."""
    values = [
        line[metric] for line in files.read_jsonl_log(directory / "metrics.jsonl") if metric in line
    ]
    return float(values[-1]) if values else None
