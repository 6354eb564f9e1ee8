"""What a run measures of itself: sums and counts, metrics.jsonl, the terminal, time, and curves."""

import contextlib
import io
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lm import files, flops, progress, tensorboard, tracking


def accumulate(total: dict, terms: Mapping) -> None:
    """Adds {name: (sum, count)} to a running total, in float64."""
    for name, (value, count) in terms.items():
        old_value, old_count = total.get(name, (0.0, 0.0))
        total[name] = (old_value + float(value), old_count + float(count))


def means(total: Mapping) -> dict[str, float]:
    """{name: sum / count}."""
    return {name: value / count if count else math.nan for name, (value, count) in total.items()}


class Writer:
    """Writes metrics.jsonl and TensorBoard events, and sends them to Weights & Biases if asked to.
    Only process 0 writes; nothing is collective.

    Objects on gs:// can't be appended to, so the files are kept in memory there and written whole
    by `flush`, and once a minute.

    Args:
      workdir: the run directory.
      step: the step that the run starts from: what was written after it is cut off.
      config: of the run; its config.tracking says who else gets the metrics. None: nobody.

    Raises:
      ValueError: see `lm.tracking.Tracker`.
    """

    def __init__(self, workdir: epath.Path, step: int, config: ConfigDict | None = None):
        self._active = jax.process_index() == 0
        self._path = workdir / "metrics.jsonl"
        self._appends = "://" not in str(self._path)
        self._lines: list[dict] = []
        self.repeated: list[dict] = []  # cut off
        self._tracker = None
        if not self._active:
            return

        for line in files.read_jsonl_log(self._path):
            (self._lines if line["step"] <= step else self.repeated).append(line)
        # First: where W&B refuses, nothing is cut off.
        if config and config.tracking.wandb:
            self._tracker = tracking.Tracker(
                config.tracking.wandb, workdir, config.to_dict(), self._lines, self.repeated
            )
        self._rewrite()
        self._events = tensorboard.EventFile(workdir / "tensorboard", step)
        self._flushed_at = time.monotonic()
        self._num_sent = len(self._lines)

    def _rewrite(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        files.write_whole(self._path, text)

    def lines(self) -> list[dict]:
        """All lines so far, those of this run's earlier starts included."""
        return list(self._lines)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Adds a line of metrics; numbers go to TensorBoard too."""
        if not self._active or not values:
            return
        line = {"step": step, **values}
        self._lines.append(line)
        if self._appends:
            try:
                with self._path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise files.named(error, self._path) from None
        numbers = {k: value for k, value in values.items() if isinstance(value, (int, float))}
        self._events.write(step, numbers)
        if self._appends:
            self._send()
        elif time.monotonic() - self._flushed_at > SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def flush(self) -> None:
        if not self._active:
            return
        if not self._appends:
            self._rewrite()
        self._events.flush()
        self._flushed_at = time.monotonic()
        self._send()

    def _send(self) -> None:
        """Sends what is in metrics.jsonl by now: after a kill, that says what was sent."""
        for line in self._lines[self._num_sent :] if self._tracker else ():
            self._tracker.write(line)
        self._num_sent = len(self._lines)

    def close(self) -> None:
        self.flush()
        if self._tracker:
            self._tracker.close()


SECONDS_BETWEEN_UPLOADS = 60.0  # of files on gs://


class Progress:
    """Shows where a run is: a line on the terminal that is written over, or, without a terminal,
    a line now and then.
    """

    def __init__(self, total_steps: int, start_step: int):
        self._total, self._start = total_steps, start_step
        self._began = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._active = jax.process_index() == 0

    def show(self, step: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        too_soon = now - self._last < progress.SECONDS_BETWEEN_LINES and step < self._total
        if not self._active or (too_soon and not self._terminal):
            return
        self._last = now

        parts = [
            f"step {step}/{self._total}",
            f"loss {values.get('train/loss', math.nan):.3f}",
        ]
        # Of a policy the loss says little, and nothing where no text is learnt from.
        if "train/reward" in values:
            parts.append(f"reward {values['train/reward']:.3f}")
        if "train/tokens_per_second" in values:
            parts.append(f"{values['train/tokens_per_second']:,.0f} tokens/s")
        if "train/mfu" in values:
            parts.append(f"MFU {values['train/mfu']:.1%}")
        seconds_a_step = (now - self._began) / max(step - self._start, 1)
        minutes, seconds = divmod(int(seconds_a_step * (self._total - step)), 60)
        parts.append(f"{minutes}:{seconds:02d} left")

        text = " | ".join(parts)
        if self._terminal:
            print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Shows a line that stays."""
        if self._active:
            print(("\n" if self._terminal else "") + text, file=sys.stderr, flush=True)


class _Compilation:
    """What jax has compiled in this process, or taken from the compilation cache."""

    def __init__(self):
        self.seconds, self.programs, self.cached = 0.0, 0, 0
        jax.monitoring.register_event_duration_secs_listener(self._add_seconds)
        jax.monitoring.register_event_listener(self._count)

    def _add_seconds(self, event: str, seconds: float, **unused) -> None:
        # Reading from the cache is in it.
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += seconds
            self.programs += 1

    def _count(self, event: str, **unused) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.cached += 1


_COMPILATION = _Compilation()


class Start:
    """A start of a run, up to its first step, and how long its parts take."""

    def __init__(self):
        self.began = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}
        self._before = dict(vars(_COMPILATION))

    def done(self, what: str) -> None:
        """Counts the time since the last call as that of `what`."""
        now = time.monotonic()
        self.seconds[what] = now - self._last
        self._last = now

    def log(self) -> None:
        """Logs the time up to now, when the first step is done, and its parts."""
        total = time.monotonic() - self.began
        compiled = {name: n - self._before[name] for name, n in vars(_COMPILATION).items()}
        logging.info(
            "first step after %.1f s: reading and building %.1f, weights %.1f, the rest %.1f; %.1f "
            "of it compiling %d programs, of which the compilation cache had %d",
            total,
            self.seconds.get("build", 0.0),
            self.seconds.get("weights", 0.0),
            total - sum(self.seconds.values()),
            compiled["seconds"],
            compiled["programs"],
            compiled["cached"],
        )
        self.seconds |= {"compile": compiled["seconds"], "first_step": total}


class Timer:
    """Where the time goes, over all starts of a run.

    Tokens/s and MFU are of the steps since the last line, evals and checkpoints left out. Goodput
    is the share of the time that was not lost: to a start up to its first step, with its
    compilation, to waiting for data while the devices are idle, to evals, to checkpoints, to
    looking inside (where that is on), to steps that a kill made the run repeat. The time between
    two starts counts for nothing.

    Args:
      flops_per_token: the model's, causal attention counted half.
      full_flops_per_token: the same with attention counted whole.
      batch_tokens: of a step's batch.
      start: this start.
      writer: has the lines of the starts before.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device],
        *,
        flops_per_token: float,
        full_flops_per_token: float,
        batch_tokens: int,
        start: Start,
        writer: Writer,
    ):
        self._batch_tokens = batch_tokens
        self._devices = devices
        self._flops_per_token = {
            "train/mfu": flops_per_token,
            "train/mfu_full_attention": full_flops_per_token,
        }
        self._start, self._has_stepped = start, False
        self._began = start.began
        self._lost = dict.fromkeys(("first_step", "data", "evals", "checkpoints", "repeated"), 0.0)
        before = _last_times(writer.lines())
        seconds_kept = before.pop("total", 0.0)
        self._lost |= before
        self._seconds_before = _last_times(writer.repeated).get("total", seconds_kept)
        self._lost["repeated"] += self._seconds_before - seconds_kept
        # Since the last line.
        self._line_step: int | None = None
        self._line_time = self._began
        self._paused_seconds = 0.0

    def first_step(self) -> contextlib.AbstractContextManager:
        """Shows, at the first step, that it is compiled."""
        if self._has_stepped:
            return contextlib.nullcontext()
        return progress.activity("compiling the train step")

    def mark_first_step(self, state) -> None:
        """Waits for the first step, which compiles, and starts counting after it; later calls do
        nothing.
        """
        if self._has_stepped:
            return
        jax.block_until_ready(state)
        self._has_stepped = True
        self._lost["first_step"] += time.monotonic() - self._began - self._paused_seconds
        self._start.log()
        self._line_time, self._paused_seconds = time.monotonic(), 0.0

    @contextlib.contextmanager
    def paused(self, what: str):
        """Counts time that isn't the steps'."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused_seconds += time.monotonic() - began
            self._lost[what] = self._lost.get(what, 0.0) + time.monotonic() - began

    def waited_for_data(self, seconds: float) -> None:
        """Counts time in which the devices waited for a batch; tokens/s includes it too."""
        if self._has_stepped:
            self._lost["data"] += seconds

    def line(self, step: int) -> dict[str, float]:
        """The figures of metrics.jsonl at `step`."""
        now = time.monotonic()
        seconds = max(now - self._line_time - self._paused_seconds, 1e-9)
        steps = step - self._line_step if self._line_step is not None else None
        self._line_step, self._line_time, self._paused_seconds = step, now, 0.0

        # The first line has the first step in it, whose time was compilation: no speed is known.
        values = {}
        if steps:
            speed = self._batch_tokens * steps / seconds
            values["train/tokens_per_second"] = speed
            for name, per_token in self._flops_per_token.items():
                share = flops.mfu(per_token * speed, self._devices)
                if share is not None:
                    values[name] = share

        total = self._seconds_before + max(now - self._began, 1e-9)
        values["train/goodput"] = 1 - sum(self._lost.values()) / total
        for what, lost in {**self._lost, "total": total}.items():
            values[f"train/seconds_{what}"] = lost
        # Of each start once.
        for what, taken in self._start.seconds.items():
            values[f"train/start_seconds_{what}"] = taken
        self._start.seconds = {}
        return values

    def total(self) -> float:
        """Seconds since this start."""
        return time.monotonic() - self._began


def _last_times(lines: Sequence[dict]) -> dict[str, float]:
    """The seconds that the last line of training has, by what they went to."""
    prefix = "train/seconds_"
    for line in reversed(lines):
        if prefix + "total" in line:
            return {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
    return {}


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
        """`step` is the number of the one that was dispatched last."""
        if self._on and step + 1 >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
            logging.info("trace written to %s/profile", self._workdir)


# Names of metrics. One that begins with a slash is an ending, and stands for that metric of every
# eval.
CURVES = (
    "train/loss",
    "/bits_per_byte",
    "/accuracy",
    "train/grad_norm",
    "train/learning_rate",
    "train/tokens_per_second",
)


def plot_curves(lines: list[dict]) -> bytes:
    """Draws the curves of metrics.jsonl as a PNG: `CURVES`, a panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    all_names = sorted(set().union(*lines))
    for axis, curve in zip(figure.subplots(2, 3).flat, CURVES):
        of_evals = curve.startswith("/")
        names = [n for n in all_names if n == curve or (of_evals and n.endswith(curve))]
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            steps, values = np.array(points, dtype=float).T
            marker = "." if len(points) < 30 else None
            axis.plot(steps, values, label=name.removeprefix("eval/"), marker=marker)

        title = curve.removeprefix("train/").lstrip("/").replace("_", " ")
        axis.set(title=title, xlabel="step")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
        if of_evals and names:
            axis.legend(fontsize=8)

    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return png.getvalue()
