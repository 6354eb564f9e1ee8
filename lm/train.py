"""The run: restore, loop, log, evaluate, save. Reads top to bottom."""

import collections
import contextlib
import copy
import json
import logging
import re
import signal
import threading
import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lm import build, checkpoint, metrics, startup
from lm import config as config_lib
from lm.evals import report
from lm.evals.common import Artifact
from lm.hf import checkpoint as hf


class NonFinite(RuntimeError):
    """A loss, gradient or update was not finite; the last good state is saved."""


class Lost(RuntimeError):
    """The devices or the other processes failed in the middle of a step."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT); it saved, and goes on at the next start."""


class StopSignal:
    """Notices SIGTERM and SIGINT (a second SIGINT interrupts at once), on all processes at the same
    step.
    """

    def __init__(self):
        self._asked = threading.Event()
        self._old = {}

    def __enter__(self):
        # With several processes jax.distributed has its own handler of SIGTERM, which lets all of
        # them agree on a step.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *unused):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del frame
        if self._asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked.set()

    def at_step(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def check(self) -> None:
        """Raises Stopped within an evaluation; with several processes it is left to the next step,
        for all to agree.
        """
        if jax.process_count() == 1 and self._asked.is_set():
            raise Stopped


def _all_streams(local: dict) -> dict:
    """The stream states of all processes, on each."""
    if jax.process_count() == 1:
        return local
    data = np.frombuffer(json.dumps(local).encode(), np.uint8)
    length = int(np.max(multihost_utils.process_allgather(np.int32(len(data)))))
    padded = np.zeros(length, np.uint8)
    padded[: len(data)] = data
    parts = multihost_utils.process_allgather(padded)
    return {
        number: state
        for part in parts
        for number, state in json.loads(bytes(part).rstrip(b"\0")).items()
    }


def check_tokenizer(experiment: build.Experiment, meta: dict, where: epath.Path) -> None:
    """Raises ValueError if a checkpoint's tokenizer is not the experiment's."""
    theirs, ours = meta["tokenizer"], experiment.tokenizer
    if theirs["fingerprint"] != ours.fingerprint:
        raise ValueError(
            f"{where} was trained with the tokenizer {theirs['fingerprint']} "
            f"({theirs['vocab_size']} ids), config.tokenizer gives {ours.fingerprint} "
            f"({ours.vocab_size} ids); its own is at {where}/tokenizer (config.tokenizer.path)"
        )


def load_weights(
    experiment: build.Experiment, source: epath.Path, *, averaged: bool, at: int | None = None
):
    """(parameters, step) of a run directory's newest checkpoint, or of that of step `at`, or of a
    Hugging Face checkpoint.

    Raises:
      ValueError: there is none, or it is another model's, or another tokenizer's.
    """
    if hf.is_checkpoint(source):
        return hf.Source(source).load(
            experiment.abstract_state.params, hf.progress_line(str(source))
        ), 0

    def wanted(meta):
        check_tokenizer(experiment, meta, source)
        return experiment.abstract_state.params

    return checkpoint.restore_weights(source, wanted, averaged=averaged, step=at)


class Run:
    """A run in its directory: state, streams, what was measured since the last line, and the files.
    `closing` closes what it opens.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        devices,
        stop: StopSignal,
        closing: contextlib.ExitStack,
    ):
        self.config = config = build.adopt(config)
        self.workdir, self.stop = workdir, stop
        claim = workdir / "config.json"
        if claim.exists():
            config_lib.check_resumable(json.loads(claim.read_text()), config, str(workdir))
        self.experiment = e = build.build(config, devices)
        # they check their data and labels now, not after the first hour
        self.evaluators = e.make_evaluators(stop.check)
        known = {f"eval/{name}/loss" for name in self.evaluators}
        if config.checkpoint.best and config.checkpoint.best.rpartition("/")[0] not in {
            k.rpartition("/")[0] for k in known
        }:
            raise ValueError(
                f"config.checkpoint.best = {config.checkpoint.best!r} is not a metric of "
                f"config.evals; such as {sorted(known)}"
            )
        build.log_summary(e)
        self.checkpointer = checkpoint.Checkpointer(
            workdir / "checkpoints", keep=config.checkpoint.keep, best=config.checkpoint.best
        )
        closing.callback(self.checkpointer.close)
        self.loader = e.make_loader()
        closing.callback(self.loader.close)
        self.interval: dict = {}  # (sum, count) since the last line of metrics.jsonl
        # the step last evaluated, by which evaluators, with what result
        self.evals: dict = {"step": -1, "names": [], "values": {}}
        self.saved_evals: dict | None = None  # as in the newest checkpoint
        found = self.checkpointer.latest()
        if found is None:
            self._begin()
        else:
            self._resume(found)
        self.writer = metrics.Writer(workdir, self.step)
        closing.callback(self.writer.close)
        if jax.process_index() == 0:
            metrics.write_whole(claim, json.dumps(config.to_dict(), indent=2) + "\n")
            e.tokenizer.save(_made(workdir / "tokenizer"))

    def _begin(self) -> None:
        e, c = self.experiment, self.config
        self.step = 0
        if c.init_from:
            params, step = load_weights(e, epath.Path(c.init_from).expanduser(), averaged=False)
            logging.info("weights from %s, step %d", c.init_from, step)
        else:
            params = e.make_params(jax.random.key(c.seed))
        self.state = e.init_state(params)
        self.streams = self.loader.state()

    def _resume(self, step: int) -> None:
        e = self.experiment
        if step > e.total_steps:
            raise ValueError(
                f"{self.workdir} is at step {step}, past config.train.length = "
                f"{self.config.train.length!r} ({e.total_steps} steps)"
            )
        self.step = step
        meta = self.checkpointer.meta(step)
        config_lib.check_resumable(meta["config"], self.config, str(self.workdir))
        check_tokenizer(e, meta, self.workdir)
        if meta["corpus"] != e.train_documents.fingerprint:
            raise ValueError(
                f"{self.workdir} was trained on a corpus with fingerprint {meta['corpus']}; "
                f"config.data gives {e.train_documents.fingerprint} now: the files (or, for "
                "pydocs, the installed versions) have changed"
            )
        self.state, _ = self.checkpointer.restore(step, e.abstract_state)
        # A halted state is saved as one that may go on: with train.nonfinite="skip", or mended
        # data, it will.
        self.state = self.state._replace(
            halted=jax.device_put(np.zeros((), bool), self.state.halted.sharding)
        )
        self.loader.restore(meta["streams"])
        self.streams = meta["streams"]
        self.interval = {name: tuple(pair) for name, pair in meta["interval"].items()}
        self.evals = meta["evals"]
        self.saved_evals = copy.deepcopy(self.evals)
        logging.info("going on from step %d", step)

    def save(self, step: int, streams: dict) -> None:
        """Starts a checkpoint of `step`; `streams` are the stream states before the next batch."""
        e = self.experiment
        meta = {
            "config": self.config.to_dict(),
            "streams": _all_streams(streams),
            "corpus": e.train_documents.fingerprint,
            "interval": {name: list(pair) for name, pair in self.interval.items()},
            "evals": self.evals,
            "tokenizer": {
                "fingerprint": e.tokenizer.fingerprint,
                "vocab_size": e.tokenizer.vocab_size,
                "files": checkpoint.pack_tokenizer(e.tokenizer),
            },
        }
        self.writer.flush()
        measured = self.evals["values"] if self.evals["step"] == step else {}
        self.checkpointer.save(step, self.state, json.loads(json.dumps(meta)), measured)
        self.saved_evals = copy.deepcopy(self.evals)

    def evaluate(self, step: int, names: list[str]) -> dict[str, float]:
        """Runs evaluators, writes what they yield, and returns all metrics of `step` so far."""
        if self.evals["step"] != step:
            self.evals = {"step": step, "names": [], "values": {}}
        params = self.experiment.eval_params(self.state.params, self.state.opt_state)
        for name in names:
            began = time.monotonic()
            values = run_evaluator(self.workdir, name, self.evaluators[name], params, step)
            self.writer.write(step, values | {f"eval/{name}/seconds": time.monotonic() - began})
            self.evals["values"] |= values
            self.evals["names"].append(name)
        return self.evals["values"]

    def due(self, step: int) -> list[str]:
        """Evaluators that should run at `step` and have not."""
        last = step == self.experiment.total_steps
        done = self.evals["names"] if self.evals["step"] == step else []
        every = {name: self.config.evals[name].every for name in self.evaluators}
        return [
            name
            for name in self.evaluators
            if name not in done and (last or (step and every[name] and step % every[name] == 0))
        ]


def _made(directory: epath.Path) -> epath.Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def run_evaluator(workdir: epath.Path, name: str, evaluator, params, step: int) -> dict[str, float]:
    """The metrics of one evaluator as eval/NAME/...; its artifacts are written."""
    values = {}
    for key, value in evaluator.run(params):
        if isinstance(value, Artifact):
            write_artifact(workdir, value, step)
        else:
            values[f"eval/{name}/{key}"] = value
    return values


def write_artifact(workdir: epath.Path, artifact: Artifact, step: int) -> None:
    """Writes an evaluator's file. One that is appended to has a part for each step; a step that is
    run again replaces its own.
    """
    if jax.process_index():
        return
    path, content = workdir / artifact.path.replace("{step}", str(step)), artifact.content
    if artifact.append:
        old = path.read_text() if path.exists() else ""
        # text that a model wrote may have any heading in it
        parts = re.split(r"(?m)^(?=<!-- lm step \d+ -->$)", old)
        kept = "".join(part for part in parts if part and int(part.split()[3]) < step)
        content = (
            f"{kept}<!-- lm step {step} -->\n## Step "
            f"{step}\n\n{content.replace('<!-- lm step', '<!-- lm-step')}"
        )
    metrics.write_whole(path, content)


def train(
    config: ConfigDict, workdir: epath.Path, devices, profile_steps: tuple[int, int] | None = None
) -> dict[str, float]:
    """Trains to the end of `config.train.length`, from the newest checkpoint if there is one.
    Returns the last metrics.

    Args:
      profile_steps: traces the steps from the first to before the second.

    Raises:
      ValueError: what can't work, before anything is computed or overwritten.
      NonFinite: with train.nonfinite="halt".
      Stopped: after a signal; everything is saved.
      Lost: with several processes, when one is gone.
    """
    with StopSignal() as stop, contextlib.ExitStack() as closing:
        run = Run(config, workdir, devices, stop, closing)
        profile = Profile(profile_steps, workdir)
        closing.callback(profile.close)
        try:
            with jax.set_mesh(run.experiment.mesh):
                return _loop(run, profile)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            closing.pop_all()  # closing would wait for the others
            raise Lost(
                f"at step {run.step}: {str(error).splitlines()[0]}. With several processes this "
                "mostly means that another one has died: see what it said. Start all of them "
                f"again to go on from the newest checkpoint in {workdir}."
            ) from error


def _loop(run: Run, profile: "Profile") -> dict[str, float]:
    e, c, total = run.experiment, run.config, run.experiment.total_steps
    progress = metrics.Progress(total, run.step)
    timer = Timer(e)
    # steps dispatched whose metrics have not been read: (step, metrics, hash, streams before)
    pending: collections.deque = collections.deque()

    def read(count: int) -> None:
        """Reads the metrics of all but the newest `count` steps dispatched. Waits for them, hence
        only when there is more to run.
        """
        while len(pending) > count:
            step, values, batch_hash, streams_before = pending.popleft()
            values = jax.device_get(values)
            if values["halted"]:
                _halt(run, step, batch_hash, streams_before, values)
            pairs = {k: v for k, v in values.items() if isinstance(v, tuple)}
            scalars = {
                k: (float(values[k]), 1.0) for k in ("grad_norm", "update_norm", "updates_lost")
            }
            metrics.accumulate(
                run.interval, {k: v for k, v in (pairs | scalars).items() if np.isfinite(v[0])}
            )
            if step % c.train.log_every == 0 or step == total:
                line = {f"train/{k}": v for k, v in metrics.means(run.interval).items()}
                line |= {
                    "train/learning_rate": float(values["learning_rate"]),
                    "train/skipped_steps": int(values["skipped_steps"]),
                    "train/batch_hash": batch_hash,
                } | timer.line(step)
                run.writer.write(step, line)
                progress.show(step, line)
                run.interval = {}

    def boundary(step: int) -> None:
        """What is due after `step`: evals, then the checkpoint, which carries their figures."""
        names = run.due(step)
        save_due = step == total or (c.checkpoint.every and step % c.checkpoint.every == 0)
        if names or save_due:
            read(0)
            if names:
                with timer.paused("evals"):
                    values = run.evaluate(step, names)
                    shown = [
                        f"{k.removeprefix('eval/')} {v:.4g}"
                        for k, v in values.items()
                        if k.endswith(SHOWN)
                    ]
                    progress.note(" | ".join([f"step {step}", *shown]))
            with timer.paused("checkpoints"):
                if jax.process_index() == 0 and (names or step == total):
                    metrics.write_whole(
                        run.workdir / "curves.png", metrics.plot_curves(run.writer.lines())
                    )
                if save_due or (names and run.checkpointer.latest() == step):
                    run.save(step, run.streams)

    try:
        if run.step:
            if run.due(run.step):
                boundary(run.step)  # a stop came before them
        while run.step < total:
            if run.stop.at_step(run.step):
                raise Stopped
            streams_before = run.streams
            began, busy = time.monotonic(), bool(pending)
            batch, batch_hash = next(run.loader)
            run.streams = run.loader.state()
            if not busy or pending[-1][1]["grad_norm"].is_ready():
                timer.waited_for_data(time.monotonic() - began)
            profile.before(run.step + 1)
            run.state, values = e.train_step(run.state, batch)
            run.step += 1
            pending.append((run.step, values, batch_hash, streams_before))
            timer.first_step(run.state)
            profile.after(run.step, run.state)
            read(1)
            boundary(run.step)
    except Stopped:
        read(0)
        if run.checkpointer.latest() != run.step or run.saved_evals != run.evals:
            run.save(run.step, run.streams)
        run.checkpointer.wait()
        raise Stopped(
            f"stopped by a signal at step {run.step}; saved in {run.workdir}, start it again to "
            "go on"
        ) from None
    run.checkpointer.wait()
    lines = run.writer.lines()
    return {key: value for line in lines for key, value in line.items()} | {
        "train/seconds": timer.total()
    }


SHOWN = ("/loss", "/bits_per_byte", "/accuracy")


def _halt(run: Run, step: int, batch_hash: str, streams_before: dict, values: dict) -> None:
    """Saves the last good state, with the streams as they were before the bad batch, and raises
    NonFinite.
    """
    good = step - 1
    if run.checkpointer.latest() != good:
        run.save(good, streams_before)
    run.checkpointer.wait()
    loss = float(values["loss"][0]) / max(float(values["loss"][1]), 1.0)
    raise NonFinite(
        f"step {step} is not finite: loss {loss}, gradient norm {float(values['grad_norm'])}, "
        f"update norm {float(values['update_norm'])}. Its batch has the hash {batch_hash}, and "
        f"comes after the stream states {json.dumps(streams_before)}. The state after step {good} "
        f"is saved in {run.workdir}; starting again repeats the step. "
        'config.train.nonfinite="skip" leaves such updates out and counts them.'
    )


class Timer:
    """Where the time goes: tokens/s and MFU of the steps since the last line, evals and checkpoints
    left out, and the goodput since the start.
    """

    def __init__(self, experiment):
        c = experiment.config.data
        self._tokens = c.batch_size * c.length
        self._devices = experiment.devices
        self._flops = {
            "train/mfu": metrics.model_flops_per_token(experiment.model_config, c.length),
            "train/mfu_full_attention": metrics.model_flops_per_token(
                experiment.model_config, c.length, causal=False
            ),
        }
        self._began = self._mark = time.monotonic()
        self._pauses, self._step = 0.0, None
        self._lost = dict.fromkeys(("first_step", "data", "evals", "checkpoints"), 0.0)

    def first_step(self, state) -> None:
        """Waits for the first step, which compiles, and starts counting after it."""
        if not self._lost["first_step"]:
            jax.block_until_ready(state)
            self._lost["first_step"] = time.monotonic() - self._began - self._pauses
            logging.info(
                "first step after %.1f s, compilation included", time.monotonic() - self._began
            )
            self._mark, self._pauses = time.monotonic(), 0.0

    @contextlib.contextmanager
    def paused(self, what: str):
        """Time that isn't the steps'."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._pauses += time.monotonic() - began
            self._lost[what] += time.monotonic() - began

    def waited_for_data(self, seconds: float) -> None:
        """The devices had nothing to do while the loader made a batch. It counts in tokens/s all
        the same.
        """
        if self._lost["first_step"]:
            self._lost["data"] += seconds

    def line(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        seconds = max(now - self._mark - self._pauses, 1e-9)
        steps = step - self._step if self._step is not None else None
        self._mark, self._pauses, self._step = now, 0.0, step
        lost = {f"train/seconds_{what}": value for what, value in self._lost.items()}
        goodput = {
            "train/goodput": 1 - sum(self._lost.values()) / max(now - self._began, 1e-9)
        } | lost
        if not steps:  # the first line has the first step in it, whose time was compilation
            return {"train/tokens_per_second": 0.0} | goodput
        speed = self._tokens * steps / seconds
        values = {
            name: metrics.mfu(flops * speed, self._devices) for name, flops in self._flops.items()
        }
        return (
            {"train/tokens_per_second": speed}
            | {name: value for name, value in values.items() if value is not None}
            | goodput
        )

    def total(self) -> float:
        return time.monotonic() - self._began


class Profile:
    """An xprof trace of the steps from `steps[0]` to before `steps[1]`, in workdir/profile; none
    for None.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: epath.Path):
        self._steps, self._workdir, self._on = steps, workdir, False

    def before(self, step: int) -> None:
        """`step` is the number of the one that comes next, from 1."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._on = True

    def after(self, step: int, state) -> None:
        if self._on and step + 1 >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
            logging.info("trace written to %s/profile", self._workdir)


def evaluate(config: ConfigDict, workdir: epath.Path, devices, steps: str = "") -> dict[str, float]:
    """Runs every evaluator on the newest checkpoint of the run (or on config.init_from), writes
    eval-STEP.json and eval-STEP.md; trains nothing.

    Args:
      steps: of which checkpoints instead, with commas between them; "all": of each that is there.
        Their curves go to eval-curves.png.

    Returns:
      The metrics of the last one.

    Raises:
      ValueError: what can't work; steps that aren't there.
    """
    config = build.adopt(config)
    e = build.build(config, devices, training=False)
    source = epath.Path(config.init_from).expanduser() if config.init_from else workdir
    there = checkpoint.steps(source / "checkpoints")
    if (
        steps
        and not all(step.isdecimal() and int(step) in there for step in steps.split(","))
        and (steps != "all" or not there)
    ):
        raise ValueError(
            f"--steps={steps}: {source} has checkpoints of the steps {there}; wanted some of "
            "them, with commas, or all"
        )
    lines = []
    with jax.set_mesh(e.mesh):
        evaluators = e.make_evaluators()
        about = {name: getattr(evaluator, "about", {}) for name, evaluator in evaluators.items()}
        for at in (
            [None] if not steps else there if steps == "all" else sorted(map(int, steps.split(",")))
        ):
            params = None  # the ones before make room
            params, step = load_weights(e, source, averaged=True, at=at)
            values = {}
            for name, evaluator in evaluators.items():
                values |= run_evaluator(workdir, name, evaluator, params, step)
            lines.append({"step": step} | values)
            if jax.process_index() == 0:
                known = {
                    "step": step,
                    "from": str(source),
                    "versions": startup.versions(devices),
                    "tokenizer": e.tokenizer.fingerprint,
                    "evals": about,
                }
                metrics.write_whole(
                    workdir / f"eval-{step}.json",
                    json.dumps(known | {"config": config.to_dict()} | values, indent=2) + "\n",
                )
                metrics.write_whole(workdir / f"eval-{step}.md", report.markdown(known, values))
                logging.info(
                    "evaluated step %d: %s",
                    step,
                    ", ".join(
                        f"{k.removeprefix('eval/')} {v:.4g}"
                        for k, v in values.items()
                        if k.endswith(SHOWN)
                    ),
                )
    if len(lines) > 1 and jax.process_index() == 0:
        metrics.write_whole(workdir / "eval-curves.png", metrics.plot_curves(lines))
    return values
