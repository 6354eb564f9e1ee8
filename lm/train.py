"""The run: restore, loop, log, evaluate, save. Reads top to bottom."""

import collections
import contextlib
import copy
import json
import logging
import time
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lm import (
    build,
    checkpoint,
    claim,
    evaluate,
    files,
    looking,
    replicas,
    startup,
    stopping,
    telemetry,
    tracking,
    trained,
    weights,
)
from lm import config as config_lib
from lm import step as step_lib
from lm.reports import metrics as metrics_lib


class NonFinite(stopping.RunFailed):
    """A loss, gradient or update was not finite; the last good state is saved."""


class ProcessLost(stopping.RunFailed):
    """The devices or the other processes failed in the middle of a step."""


def train(
    config: ConfigDict, workdir: epath.Path, devices, profile_steps: tuple[int, int] | None = None
) -> dict[str, float]:
    """Trains to the end of `config.train.length`, from the newest checkpoint if there is one.

    Args:
      profile_steps: traces the steps from the first to before the second.

    Returns:
      The last value of each metric.

    Raises:
      ValueError: what can't work, before anything is computed or overwritten.
      NonFinite: with train.nonfinite="halt".
      replicas.ReplicasDiffer: with train.check_replicas_every.
      stopping.Stopped: after a signal; everything is saved.
      ProcessLost: with several processes, when one is gone.
    """
    with stopping.StopSignal() as stop, contextlib.ExitStack() as closing:
        run = Run(config, workdir, devices, stop, closing)
        profile = telemetry.Profile(profile_steps, workdir)
        closing.callback(profile.close)
        try:
            with jax.set_mesh(run.experiment.program.mesh):
                _loop(run, profile)
            if jax.process_index() == 0:
                run.write_summary(finished=True)
        except claim.Lost:
            closing.pop_all()  # closing would write over the new owner's files
            raise
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            closing.pop_all()  # closing would wait for the others
            raise ProcessLost(
                f"at step {run.step}: {str(error).splitlines()[0]}. With several processes this "
                "mostly means that another one has died: see what it said. Start all of them "
                f"again to go on from the newest checkpoint in {workdir}."
            ) from error

        last_values = {}
        for line in run.writer.lines():
            last_values |= line
        return last_values | {"train/seconds": run.timer.total()}


def _loop(run: "Run", profile: telemetry.Profile) -> None:
    """Trains step by step. After a signal it saves and raises stopping.Stopped."""
    train_step = run.experiment.program.train_step
    try:
        if run.step and run.due_evals():
            run.do_what_is_due()  # the stop came before them

        while run.step < run.total_steps:
            if run.is_to_stop():
                raise stopping.Stopped

            streams_before = run.streams
            batch, batch_hash = run.next_batch()
            profile.before(run.step + 1)
            looked = run.look(batch) | run.terms_of_batch()
            with run.timer.first_step():
                run.state, metrics = train_step(run.state, batch, run.fixed)
            run.step += 1
            epochs = run.loader.epochs_begun()
            run.pending.append(
                PendingStep(run.step, metrics, looked, batch_hash, streams_before, epochs)
            )
            run.timer.mark_first_step(run.state)
            profile.after(run.step, run.state)

            # The metrics of the step before: the devices work on this one meanwhile.
            run.read_metrics(leave=1)
            run.check_replicas_if_due()
            run.do_what_is_due()
    except stopping.Stopped:
        run.read_metrics()
        if run.checkpointer.latest() != run.step or run.saved_evals != run.evals:
            run.save(run.step, run.streams)
        run.checkpointer.wait()
        raise stopping.Stopped(
            f"stopped by a signal at step {run.step}; saved in {run.workdir}, start it again to "
            "go on"
        ) from None
    run.checkpointer.wait()


class PendingStep(NamedTuple):
    """A step that was dispatched, whose metrics have not been read."""

    step: int
    metrics: dict  # on the devices
    # name -> (sum, count): of a look (`lm.looking.terms`), and of the loader
    looked: dict
    batch_hash: str
    streams_before: dict  # stream states before its batch
    epochs: float  # that have begun with its batch


class Run:
    """A run in its directory: its state, its data, what was measured, and the files.

    Args:
      stop: asked at each step, and within evaluations.
      closing: closes what the run opens.

    Raises:
      ValueError: what can't work, before anything is computed or overwritten.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        devices,
        stop: stopping.StopSignal,
        closing: contextlib.ExitStack,
    ):
        self.start = telemetry.Start()
        self.config = config = build.apply_hf_config(config)
        self.workdir = workdir
        self.stop = stop
        config_lib.check(config)
        first_process = jax.process_index() == 0
        config_file = workdir / "config.json"
        _check_workdir(config, workdir, config_file)
        if config.tracking.wandb and first_process:
            tracking.check(config.tracking.wandb)

        # Everything is built, and so checked, now and not after the first hour.
        self.experiment = build.build(config, devices)
        self.total_steps = self.experiment.total_steps
        self.evaluators = self.experiment.make_evaluators(stop.check)
        best = config.checkpoint.best
        metrics_of_evals = {}
        for name, evaluator in self.evaluators.items():
            metrics_of_evals[name] = getattr(evaluator, "metrics", ())
        highest = bool(best) and metrics_lib.check_best(best, metrics_of_evals)
        build.log_summary(self.experiment)
        self.start.done("build")

        # From here on files are written: by one process, or one pod, at a time.
        self.claim = closing.enter_context(claim.Claim(workdir, active=first_process))
        if first_process:
            files.remove_leftovers(workdir)
        self.checkpointer = checkpoint.Checkpointer(
            workdir / "checkpoints", keep=config.checkpoint.keep, best=best, highest=highest
        )
        closing.callback(self.checkpointer.close)
        self.loader = self.experiment.make_loader()
        closing.callback(self.loader.close)
        self._check_boundaries()
        self._stop_asked = False
        self._has_looked = False  # since this start
        self._frozen_meta: dict | None = None  # what a checkpoint says of the frozen parameters

        # What was measured.
        self.pending: collections.deque[PendingStep] = collections.deque()
        self.sums: dict = {}  # name -> (sum, count) since the last line of metrics.jsonl
        # the step last evaluated, by which evaluators, with what result
        self.evals: dict = {"step": -1, "names": [], "values": {}}
        self.saved_evals: dict | None = None  # as in the newest checkpoint

        self.experiment.others.update(weights.load_others(self.experiment))
        self.fixed = step_lib.Fixed({}, self.experiment.others)
        newest = self.checkpointer.latest()
        if newest is None:
            self._begin()
        else:
            self._resume(newest)
        self.start.done("weights")
        self.writer = telemetry.Writer(workdir, self.step, config)
        closing.callback(self.writer.close)
        if first_process:
            self._write_config_and_tokenizer(config_file)
            self.write_summary(finished=False)

        self._replicas = self._make_replicas()
        self.progress = telemetry.Progress(self.total_steps, self.step)
        self.timer = self._make_timer()

    def _make_timer(self) -> telemetry.Timer:
        program, data = self.experiment.program, self.config.data
        return telemetry.Timer(
            program.devices,
            flops_per_token=program.flops_per_token(data.length),
            full_flops_per_token=program.flops_per_token(data.length, causal=False),
            batch_tokens=data.batch_size * data.length,
            start=self.start,
            writer=self.writer,
        )

    def _make_replicas(self) -> replicas.Replicas | None:
        """What compares replicas; None: nothing does."""
        if not self.config.train.check_replicas_every:
            return None
        program = self.experiment.program
        arrays = dict(state=program.abstract_state, fixed=program.abstract_fixed)
        return replicas.Replicas(program.mesh, arrays)

    def write_summary(self, *, finished: bool) -> None:
        """Writes run.json, by which others know how large this run is, and whether it has come to
        its end.
        """
        summary = self.experiment.size | {
            "length": self.config.train.length,
            "total_steps": self.total_steps,
            "finished": finished,
            "versions": startup.versions(self.experiment.program.devices),
        }
        files.write_whole(self.workdir / "run.json", json.dumps(summary, indent=2) + "\n")

    def _check_boundaries(self) -> None:
        """Raises ValueError for steps that save, or end the run, off the loader's boundaries."""
        steps = {
            "config.checkpoint.every": self.config.checkpoint.every,
            "config.train.length": self.total_steps,
        }
        for name, entry in self.config.evals.items():
            steps[f"config.evals.{name}.every"] = entry.every
        for key, step in steps.items():
            if step and not self.loader.boundary(step):
                raise ValueError(
                    f"{key}: a checkpoint can't be saved after {step} steps; the loader's "
                    "boundaries are at other steps"
                )

    def _begin(self) -> None:
        """Starts at step 0, from fresh weights or those of config.init_from."""
        program, c = self.experiment.program, self.config
        self.step = 0
        if c.init_from:
            source = weights.source_of(c, self.workdir)
            params, step = weights.load_weights(self.experiment, source, averaged=False)
            logging.info("weights from %s, step %d", c.init_from, step)
        else:
            params = program.make_params(jax.random.key(c.seed))
        trained_params, frozen = trained.split(params, program.is_trained)
        self.state = program.init_state(trained_params)
        self._fix(frozen)
        self.streams = self.loader.state()

    def _resume(self, step: int) -> None:
        """Goes on from the checkpoint of `step`, after checking that it is this experiment's."""
        e = self.experiment
        if step > e.total_steps:
            raise ValueError(
                f"{self.workdir} is at step {step}, past config.train.length = "
                f"{self.config.train.length!r} ({e.total_steps} steps)"
            )
        self.step = step
        meta = self.checkpointer.meta(step)
        checkpoint.check_meta(meta, str(self.workdir), of_run=True)
        config_lib.check_resumable(meta["config"], self.config, str(self.workdir))
        weights.check_tokenizer(e, meta, self.workdir)
        if meta["corpus"] != e.train_documents.fingerprint:
            raise ValueError(
                f"{self.workdir} was trained on a corpus with fingerprint {meta['corpus']}; "
                f"config.data gives {e.train_documents.fingerprint} now: the files (or, for "
                "pydocs, the installed versions) have changed"
            )

        self.state = self.checkpointer.restore(step, e.program.abstract_state)
        if e.program.abstract_fixed.frozen:
            self._fix(weights.load_frozen(e, meta.get("frozen", {}), str(self.workdir)))
        # A state that was saved halted tries again: with train.nonfinite="skip", or mended data, it
        # goes on.
        not_halted = jax.device_put(np.zeros((), bool), self.state.halted.sharding)
        self.state = self.state._replace(halted=not_halted)
        self.loader.restore(meta["streams"])
        self.streams = meta["streams"]

        self.sums = {name: tuple(pair) for name, pair in meta["interval"].items()}
        self.evals = meta["evals"]
        self.saved_evals = copy.deepcopy(self.evals)
        logging.info("going on from step %d", step)

    def _fix(self, frozen: dict) -> None:
        """Keeps the parameters that aren't trained."""
        self.fixed = self.fixed._replace(frozen=frozen)
        self._frozen_meta = None
        if frozen:
            self._frozen_meta = weights.describe_frozen(self.config, frozen)

    def _write_config_and_tokenizer(self, config_file: epath.Path) -> None:
        files.write_whole(config_file, json.dumps(self.config.to_dict(), indent=2) + "\n")
        if cards := self.experiment.train_documents.cards:
            content = json.dumps({"corpora": cards}, indent=1) + "\n"
            files.write_whole(self.workdir / "corpora.json", content)
        directory = self.workdir / "tokenizer"
        directory.mkdir(parents=True, exist_ok=True)
        self.experiment.tokenizer.save(directory)

    def is_to_stop(self) -> bool:
        """Whether to stop before the next step: after a signal, at the loader's next boundary."""
        self._stop_asked = self.stop.at_step(self.step) or self._stop_asked
        return self._stop_asked and self.loader.boundary(self.step)

    def next_batch(self) -> tuple[dict[str, jax.Array], str]:
        """The next batch and its hash. Counts the time in which the devices wait for it."""
        params = trained.merge(self.state.params, self.fixed.frozen)
        writes = contextlib.nullcontext()
        if hasattr(self.loader, "report"):
            # What it writes with the model is a time of its own, behind the step before.
            jax.block_until_ready(self.state)
            writes = self.timer.paused("rollouts")

        began = time.monotonic()
        idle_before = not self.pending
        with writes, self._saved_if_it_fails("the next batch behind step"):
            batch, batch_hash = self.loader.next(params)
        self.streams = self.loader.state()
        waits = not hasattr(self.loader, "report")
        if waits and (idle_before or self.pending[-1].metrics["grad_norm"].is_ready()):
            self.timer.waited_for_data(time.monotonic() - began)
        self._write_files_of_batch()
        return batch, batch_hash

    def _write_files_of_batch(self) -> None:
        """Writes what the loader has to show of the batch."""
        if not hasattr(self.loader, "report") or jax.process_index():
            return
        _, shown = self.loader.report()
        for path, text in shown.items():
            (self.workdir / path).parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(self.workdir / path, text)

    def terms_of_batch(self) -> dict[str, tuple[float, float]]:
        """What the loader says of the batch."""
        return self.loader.report()[0] if hasattr(self.loader, "report") else {}

    def look(self, batch: dict[str, jax.Array]) -> dict[str, tuple[float, float]]:
        """What a look inside the step of this batch gives, if one is due; else {}.

        The first step of each start is looked into too: what a look can't do, or has no memory for,
        shows there, and not after hours.
        """
        every = self.config.train.look_every
        is_due = bool(every) and (self.step + 1) % every == 0
        is_first = bool(every) and not self._has_looked
        if not (is_due or is_first):
            return {}
        self._has_looked = True
        jax.block_until_ready(self.state)  # the step before has its own time
        with self.timer.paused("looking"):
            values = self.experiment.program.look(self.state, batch, self.fixed)
            terms = looking.terms(jax.device_get(values))
        return terms if is_due else {}

    def check_replicas_if_due(self) -> None:
        """Raises replicas.ReplicasDiffer."""
        every = self.config.train.check_replicas_every
        if every and self.step % every == 0:
            self._check_replicas(self.step)

    def _check_replicas(self, step: int) -> None:
        """Compares what several devices hold, if config.train asks for it; `step` is for the
        message.

        Raises:
          replicas.ReplicasDiffer: they differ.
        """
        if self._replicas is None:
            return
        jax.block_until_ready(self.state)
        with self.timer.paused("looking"):
            self._replicas.check(dict(state=self.state, fixed=self.fixed), step)

    def read_metrics(self, leave: int = 0) -> None:
        """Reads the metrics of all but the newest `leave` steps dispatched.

        It blocks until they are computed; `leave=1` keeps the devices busy meanwhile.

        Raises:
          NonFinite: a step halted.
        """
        while len(self.pending) > leave:
            pending = self.pending.popleft()
            values = jax.device_get(pending.metrics)
            if values["halted"]:
                self._halt(pending, values)

            terms = {name: value for name, value in values.items() if isinstance(value, tuple)}
            terms |= pending.looked
            for name in ("grad_norm", "update_norm", "updates_lost"):
                terms[name] = (float(values[name]), 1.0)
            # A skipped step may not be finite, and must not spoil the means of the others.
            finite = {name: term for name, term in terms.items() if np.isfinite(term[0])}
            telemetry.accumulate(self.sums, finite)
            if pending.step % self.config.train.log_every == 0 or pending.step == self.total_steps:
                self._log(pending, values)

    def _log(self, pending: PendingStep, values: dict) -> None:
        """Writes a line of metrics.jsonl: means since the last one, and the step's own values."""
        means = telemetry.means(self.sums)
        line = {f"train/{name}": value for name, value in means.items()}
        line["train/targets"] = self.sums.get("loss", (0.0, 0.0))[1]
        line["train/epochs"] = pending.epochs
        line["train/flops"] = self.experiment.size["flops_per_step"] * pending.step
        line["train/learning_rate"] = float(values["learning_rate"])
        line["train/skipped_steps"] = int(values["skipped_steps"])
        line["train/batch_hash"] = pending.batch_hash
        line |= self.timer.line(pending.step)
        self.writer.write(pending.step, line)
        self.progress.show(pending.step, line)
        self.sums = {}

    def _halt(self, pending: PendingStep, values: dict) -> None:
        """Saves the last good state, with the streams as they were before the bad batch, and raises
        NonFinite.
        """
        # The halted step changed nothing: the state is still that of the step before.
        good = pending.step - 1
        if self.checkpointer.latest() != good and self.loader.boundary(good):
            self.save(good, pending.streams_before)
        self.checkpointer.wait()

        loss_sum, count = values["loss"]
        raise NonFinite(
            f"step {pending.step} is not finite: loss {float(loss_sum) / max(float(count), 1.0)}, "
            f"gradient norm {float(values['grad_norm'])}, update norm "
            f"{float(values['update_norm'])}. Its batch has the hash {pending.batch_hash}, and "
            f"comes after the stream states {json.dumps(pending.streams_before)}. The state after "
            f"step {self.checkpointer.latest()} is saved in {self.workdir}; starting again goes on "
            "from there. "
            'config.train.nonfinite="skip" leaves such updates out and counts them.'
        )

    def do_what_is_due(self) -> None:
        """Runs the evals due after this step, and saves a checkpoint with their results."""
        step, every = self.step, self.config.checkpoint.every
        last = step == self.total_steps
        names = self.due_evals()
        save_due = last or (every and step % every == 0)
        if not names and not save_due:
            return

        self.read_metrics()
        if names:
            with self.timer.paused("evals"), self._saved_if_it_fails("the eval of step"):
                values = self.run_evals(step, names)
                self.progress.note(" | ".join([f"step {step}", *evaluate.summary(values)]))
        with self.timer.paused("checkpoints"):
            if jax.process_index() == 0 and (names or last):
                curves = telemetry.plot_curves(self.writer.lines())
                files.write_whole(self.workdir / "curves.png", curves)
            # A checkpoint of this step that is there already gets the new metrics.
            if save_due or self.checkpointer.latest() == step:
                self.save(step, self.streams)

    @contextlib.contextmanager
    def _saved_if_it_fails(self, what: str):
        """What fails between steps costs none: they are saved before its error ends the run."""
        try:
            yield
        except stopping.Stopped:
            raise
        except Exception:
            unsaved = self.checkpointer.latest() != self.step
            # Processes save together; where one failed alone, the others wait for it in the eval.
            unsaved = unsaved and self.loader.boundary(self.step)
            if unsaved and stopping.all_come_to(f"{what} {self.step} failed"):
                self.read_metrics()
                self.save(self.step, self.streams)
                self.checkpointer.wait()
                logging.error("%s %d failed; step %d is saved", what, self.step, self.step)
            raise

    def due_evals(self) -> list[str]:
        """Evaluators that should run at this step and have not."""
        done = self.evals["names"] if self.evals["step"] == self.step else []
        last = self.step == self.total_steps
        due = []
        for name in self.evaluators:
            every = self.config.evals[name].every
            now = last or (self.step and every and self.step % every == 0)
            if now and name not in done:
                due.append(name)
        return due

    def run_evals(self, step: int, names: list[str]) -> dict[str, float]:
        """Runs evaluators, writes what they yield, and returns all metrics of `step` so far."""
        if self.evals["step"] != step:
            self.evals = {"step": step, "names": [], "values": {}}
        params = self.experiment.program.eval_params(self.state.params, self.state.opt_state)
        params = trained.merge(params, self.fixed.frozen)
        for name in names:
            began = time.monotonic()
            evaluator = self.evaluators[name]
            values = evaluate.run_evaluator(
                self.workdir, name, evaluator, params, step, self.config
            )
            self.writer.write(step, values | {f"eval/{name}/seconds": time.monotonic() - began})
            self.evals["values"] |= values
            self.evals["names"].append(name)
        return self.evals["values"]

    def save(self, step: int, streams: dict) -> None:
        """Starts a checkpoint of `step`; `streams` are the stream states before the next batch.

        Raises:
          replicas.ReplicasDiffer: with train.check_replicas_every.
        """
        self.claim.check()
        self._check_replicas(step)
        e = self.experiment
        meta = {
            "config": self.config.to_dict(),
            "streams": _all_streams(streams),
            "corpus": e.train_documents.fingerprint,
            "interval": {name: list(pair) for name, pair in self.sums.items()},
            "evals": self.evals,
            "tokenizer": checkpoint.tokenizer_to_meta(e.tokenizer),
        }
        if self._frozen_meta:
            meta["frozen"] = self._frozen_meta
        self.writer.flush()
        metrics = self.evals["values"] if self.evals["step"] == step else {}
        # A copy: Orbax writes later, and the run goes on changing its dicts.
        self.checkpointer.save(step, self.state, json.loads(json.dumps(meta)), metrics)
        self.saved_evals = copy.deepcopy(self.evals)


def _check_workdir(config: ConfigDict, workdir: epath.Path, config_file: epath.Path) -> None:
    """Raises ValueError for a directory that can't be this run's."""
    files.check_tree(workdir)
    if config_file.exists():
        config_lib.check_resumable(files.read_json(config_file), config, str(workdir))
    if not checkpoint.steps(workdir / "checkpoints"):
        weights.source_of(config, workdir)  # needed at the start only


def _all_streams(local: dict) -> dict:
    """The stream states of all processes, on each."""
    if jax.process_count() == 1:
        return local

    # process_allgather takes arrays of one shape: JSON, padded with zeros.
    data = np.frombuffer(json.dumps(local).encode(), np.uint8)
    length = int(np.max(multihost_utils.process_allgather(np.int32(len(data)))))
    padded = np.zeros(length, np.uint8)
    padded[: len(data)] = data

    streams = {}
    for part in multihost_utils.process_allgather(padded):
        streams |= json.loads(bytes(part).rstrip(b"\0"))
    return streams
