"""What the runs of a sweep will take, before they start: parameters, tokens, FLOPs, memory, hours.

Time is measured: some runs are trained for a few steps in a directory that is thrown away, with the
evals and checkpoints that they have. For a pod it is modelled, see `lm.plan`.
"""

import concurrent.futures
import json
import math
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lm import build, files, startup
from lm import config as config_lib
from lm.plan import compile as plan_compile
from lm.reports import tables
from lm.sweep import plan

STEPS = 20  # between the evals of a calibration, which has two of each
CALIBRATIONS = 6  # runs that are timed; others lie between them


class Prediction(NamedTuple):
    """What a run takes.

    Attributes:
      seconds: in all; None: unknown.
      memory: of a chip, in words; "" where it isn't known.
    """

    parameters: int
    tokens: float
    flops: float
    seconds: float | None = None
    memory: str = ""


def predict(sweep: plan.Sweep, say: Callable[[str], None]) -> dict[str, Prediction]:
    """Predicts each run on this machine's devices, those of a halving to the end of its first
    round.

    Raises:
      ValueError: a run that can't be built, or trained.
    """
    runs = sweep.runs
    say(f"building {len(runs)} runs")
    sizes = _in_a_process(read_sizes, sweep.path)

    # One run for each cost, or, of many costs, some from the cheapest to the dearest.
    cost_of = {run.name: _cost(sweep.config(run), sizes[run.name]) for run in runs}
    by_cost = {cost_of[run.name]: run for run in reversed(runs)}
    costs = sorted(by_cost, key=lambda cost: sizes[by_cost[cost].name]["flops_per_step"])
    chosen = np.linspace(0, len(costs) - 1, min(CALIBRATIONS, len(costs))).astype(int)

    timings: dict[str, tuple[float, Timing]] = {}
    for number, index in enumerate(chosen):
        run = by_cost[costs[index]]
        say(f"calibration {number + 1} of {len(chosen)}: {run.name}")
        timings[costs[index]] = (sizes[run.name]["flops_per_step"], calibrate(sweep, run))

    predictions = {}
    for run in runs:
        config, size = sweep.config(run), sizes[run.name]
        known = timings.get(cost_of[run.name])
        seconds = predicted_seconds(config, size, [known] if known else list(timings.values()))
        predictions[run.name] = _without_time(size)._replace(seconds=seconds)
    return predictions


def _in_a_process(function: Callable, *arguments):
    """Calls a function in a process that ends with it, and leaves the devices to the next ones."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def read_sizes(path: str) -> dict[str, dict]:
    """Run -> `lm.build.Experiment.size`, and total_steps, of the runs of a sweep file."""
    sweep = plan.read(path)
    devices = startup.start(sweep.base.platform)
    sizes = {}
    for run in sweep.runs:
        experiment = build.build(build.apply_hf_config(sweep.config(run)), devices)
        sizes[run.name] = experiment.size | {"total_steps": experiment.total_steps}
    return sizes


def _cost(config: ConfigDict, size: dict) -> str:
    """What runs share that take the same time a step."""
    # A Hugging Face checkpoint decides sizes that the configuration doesn't have.
    shared = {key: size[key] for key in ("parameters", "flops_per_step")}
    for key, value in config_lib.flatten(config).items():
        if key.startswith("optimizer.") and isinstance(value, float):
            shared[key] = value != 0  # at 0 the average, the clipping or the like is off
        elif not key.startswith(("seed", "init_from", "train.length", "data.source_args.")):
            shared[key] = value
    return json.dumps(shared, sort_keys=True)


def _without_time(size: dict) -> Prediction:
    steps = size["total_steps"]
    return Prediction(
        size["parameters"], steps * size["tokens_per_step"], steps * size["flops_per_step"]
    )


class Timing(NamedTuple):
    """What a calibration measured, in seconds.

    Attributes:
      once: the start, with compilation, and what evals and the last checkpoint take once.
      step: each step.
      evals: name -> an eval that isn't the first.
      checkpoint: each.
      look: each at norms and replicas that isn't the first.
    """

    once: float
    step: float
    evals: dict[str, float]
    checkpoint: float
    look: float = 0.0


LOOKS = ("look_every", "check_replicas_every")  # of config.train


def calibrate(sweep: plan.Sweep, run: plan.PlannedRun) -> Timing:
    """Trains a run for 2 * STEPS steps, with each of its evals as often as it says so, once or
    twice.

    Raises:
      ValueError: it fails; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="lm-calibration-") as folder:
        command = sweep.command(run, epath.Path(folder), f"{2 * STEPS} steps")
        config = sweep.config(run)
        for name, entry in config.evals.items():
            if entry.every:
                command.append(f"--config.evals.{name}.every={STEPS}")
        if config.checkpoint.every:
            command.append(f"--config.checkpoint.every={STEPS}")
        for key in LOOKS:
            if config.train[key]:
                command.append(f"--config.train.{key}={STEPS // 2}")
        command.append(f"--config.train.log_every={STEPS // 4}")
        # A schedule that such a short run can have.
        for key in ("warmup_steps", "decay_steps"):
            command.append(f"--config.optimizer.{key}={min(config.optimizer[key], STEPS // 2)}")

        began = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wall = time.monotonic() - began

        if done.returncode:
            last = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"the calibration of {run.name} failed: {' '.join(last)}")

        lines = files.read_jsonl_log(epath.Path(folder) / run.name / "metrics.jsonl")

    seconds_a_token = [1 / speed for speed in _column(lines, "train/tokens_per_second")]
    step = float(np.mean(seconds_a_token)) * config.data.batch_size * config.data.length

    repeated = {}
    for name in config.evals:
        seconds = _column(lines, f"eval/{name}/seconds")
        if len(seconds) > 1:
            repeated[name] = seconds[-1]
    # What the last line knows of is the checkpoint before it.
    checkpoint = _column(lines, "train/seconds_checkpoints")[-1] if config.checkpoint.every else 0.0

    looked = _column(lines, "train/seconds_looking")
    after_first = len(set(looked)) - 1
    looking = looked[-1] - looked[0] if looked else 0.0

    once = wall - (2 * STEPS - 1) * step - sum(repeated.values()) - checkpoint - looking
    return Timing(max(once, 0.0), step, repeated, checkpoint, looking / max(after_first, 1))


def _column(lines: Sequence[dict], name: str) -> list[float]:
    """The values of a metric."""
    return [line[name] for line in lines if name in line]


def predicted_seconds(
    config: ConfigDict, size: dict, timings: Sequence[tuple[float, Timing]]
) -> float:
    """The seconds of a run.

    Args:
      size: its flops_per_step and total_steps.
      timings: calibrations with their flops_per_step, ascending: of this run, or of cheaper and
        dearer ones.
    """
    flops = [flops for flops, _ in timings]
    step = np.interp(size["flops_per_step"], flops, [timing.step for _, timing in timings])
    once = np.interp(size["flops_per_step"], flops, [timing.once for _, timing in timings])
    nearest = min(timings, key=lambda item: abs(item[0] - size["flops_per_step"]))[1]

    # The first of each eval and the last checkpoint are in what comes once.
    before_last = size["total_steps"] - 1
    seconds = once + before_last * step
    for name, entry in config.evals.items():
        if entry.every:
            seconds += (before_last // entry.every) * nearest.evals.get(name, 0.0)
    if config.checkpoint.every:
        seconds += (before_last // config.checkpoint.every) * nearest.checkpoint
    # Where both kinds of looks are on, what was timed is both together.
    if periods := [config.train[key] for key in LOOKS if config.train[key]]:
        seconds += (before_last // min(periods)) * nearest.look
    return float(seconds)


def predict_pod(
    sweep: plan.Sweep, topology: str, slices: int, say: Callable[[str], None]
) -> dict[str, Prediction]:
    """Predicts each run on a pod, by compiling its train step for it.

    Raises:
      ValueError: a run that can't be compiled for it.
    """
    predictions = {}
    reports: dict[str, dict] = {}
    for run in sweep.runs:
        config = sweep.config(run)
        with config.unlocked():
            config.seed = 0  # a program is the same for all seeds

        key = config_lib.content_hash(config)
        if key not in reports:
            reports[key] = _compile(config, topology, slices, say)
        predictions[run.name] = _of_report(reports[key], config)
    return predictions


def _compile(config: ConfigDict, topology: str, slices: int, say: Callable[[str], None]) -> dict:
    """The report of `lm.plan`; of a run that doesn't fit {"does_not_fit": why}."""
    try:
        return plan_compile.plan(config, topology, slices, progress=say)
    except plan_compile.DoesNotFit as error:
        return {"does_not_fit": str(error).splitlines()[0]}


def _of_report(report: dict, config: ConfigDict) -> Prediction:
    if "does_not_fit" in report:
        return Prediction(0, 0.0, 0.0, memory=report["does_not_fit"])
    train = report["train"]
    memory = f"{train['memory_gib']:.1f} of {train['limit_gib']:.1f} GiB"
    if "tokens" not in report:
        # Steps of epochs are known where the corpus is.
        return Prediction(report["parameters"], math.nan, math.nan, memory=memory)

    steps = report["tokens"] / (config.data.batch_size * config.data.length)
    flops = train["model_tflops"] * 1e12 * report["chips"] * steps
    seconds = report["days"]["calibrated"] * 86400
    return Prediction(report["parameters"], report["tokens"], flops, seconds, memory)


def table(runs: Sequence[plan.PlannedRun], predictions: dict[str, Prediction], workers: int) -> str:
    """Predictions as text, a line each, and their sum."""
    rows = [("run", "parameters", "tokens", "FLOPs", "hours", "memory")]
    for run in runs:
        p = predictions[run.name]
        hours = "?" if p.seconds is None else f"{p.seconds / 3600:.3g}"
        rows.append(
            (run.name, f"{p.parameters:,}", f"{p.tokens:.4g}", f"{p.flops:.4g}", hours, p.memory)
        )

    known = [p.seconds for p in predictions.values() if p.seconds is not None]
    flops = sum(p.flops for p in predictions.values())
    text = tables.align(rows)
    if known:
        hours = sum(known) / 3600
        text += f"\n\n{len(runs)} runs, {flops:.4g} FLOPs; {hours:.3g} hours one after the other"
        if len(known) < len(runs):
            text += f", without the {len(runs) - len(known)} runs of unknown time"
        if workers > 1:
            text += f". {workers} workers share this machine: {hours / workers:.3g} hours at best"
    return text
