"""The run: restore, loop, log, evaluate, save. Reads top to bottom."""

import collections
import contextlib
import copy
import json
import logging
import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lm import build, checkpoint, evaluate, files, stopping, telemetry, weights
from lm import config as config_lib


class NonFinite(RuntimeError):
    """A loss, gradient or update was not finite; the last good state is saved."""


class ProcessLost(RuntimeError):
    """The devices or the other processes failed in the middle of a step."""


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


class Run:
    """A run in its directory: state, streams, what was measured since the last line, and the files.
    `closing` closes what it opens.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        devices,
        stop: stopping.StopSignal,
        closing: contextlib.ExitStack,
    ):
        self.config = config = build.apply_hf_config(config)
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
        self.writer = telemetry.Writer(workdir, self.step)
        closing.callback(self.writer.close)
        if jax.process_index() == 0:
            files.write_whole(claim, json.dumps(config.to_dict(), indent=2) + "\n")
            e.tokenizer.save(_made(workdir / "tokenizer"))

    def _begin(self) -> None:
        e, c = self.experiment, self.config
        self.step = 0
        if c.init_from:
            params, step = weights.load_weights(
                e, epath.Path(c.init_from).expanduser(), averaged=False
            )
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
        weights.check_tokenizer(e, meta, self.workdir)
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
            values = evaluate.run_evaluator(self.workdir, name, self.evaluators[name], params, step)
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
      stopping.Stopped: after a signal; everything is saved.
      ProcessLost: with several processes, when one is gone.
    """
    with stopping.StopSignal() as stop, contextlib.ExitStack() as closing:
        run = Run(config, workdir, devices, stop, closing)
        profile = telemetry.Profile(profile_steps, workdir)
        closing.callback(profile.close)
        try:
            with jax.set_mesh(run.experiment.mesh):
                return _loop(run, profile)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            closing.pop_all()  # closing would wait for the others
            raise ProcessLost(
                f"at step {run.step}: {str(error).splitlines()[0]}. With several processes this "
                "mostly means that another one has died: see what it said. Start all of them "
                f"again to go on from the newest checkpoint in {workdir}."
            ) from error


def _loop(run: Run, profile: "telemetry.Profile") -> dict[str, float]:
    e, c, total = run.experiment, run.config, run.experiment.total_steps
    progress = telemetry.Progress(total, run.step)
    timer = telemetry.Timer(e)
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
            telemetry.accumulate(
                run.interval, {k: v for k, v in (pairs | scalars).items() if np.isfinite(v[0])}
            )
            if step % c.train.log_every == 0 or step == total:
                line = {f"train/{k}": v for k, v in telemetry.means(run.interval).items()}
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
                        if k.endswith(evaluate.SHOWN)
                    ]
                    progress.note(" | ".join([f"step {step}", *shown]))
            with timer.paused("checkpoints"):
                if jax.process_index() == 0 and (names or step == total):
                    files.write_whole(
                        run.workdir / "curves.png", telemetry.plot_curves(run.writer.lines())
                    )
                if save_due or (names and run.checkpointer.latest() == step):
                    run.save(step, run.streams)

    try:
        if run.step:
            if run.due(run.step):
                boundary(run.step)  # a stop came before them
        while run.step < total:
            if run.stop.at_step(run.step):
                raise stopping.Stopped
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
    except stopping.Stopped:
        read(0)
        if run.checkpointer.latest() != run.step or run.saved_evals != run.evals:
            run.save(run.step, run.streams)
        run.checkpointer.wait()
        raise stopping.Stopped(
            f"stopped by a signal at step {run.step}; saved in {run.workdir}, start it again to "
            "go on"
        ) from None
    run.checkpointer.wait()
    lines = run.writer.lines()
    return {key: value for line in lines for key, value in line.items()} | {
        "train/seconds": timer.total()
    }


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
