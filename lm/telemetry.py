"""Sums and counts, the files they are written to, and speed: tokens/s, FLOPs, MFU."""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

from lm import files, flops


def accumulate(total: dict, terms: Mapping) -> None:
    """Adds {name: (sum, count)} to a running total, in float64."""
    for name, (value, count) in terms.items():
        old = total.get(name, (0.0, 0.0))
        total[name] = (old[0] + float(value), old[1] + float(count))


def means(total: Mapping) -> dict[str, float]:
    """{name: sum / count}."""
    return {name: value / count if count else math.nan for name, (value, count) in total.items()}


class Writer:
    """metrics.jsonl, TensorBoard events and the progress line. Only process 0 writes; nothing here
    is collective.

    Objects on gs:// can't be appended to, so metrics.jsonl is written locally and copied whole by
    `flush`.

    Args:
      workdir: the run directory.
      step: the step that the run starts from: what was written after it is cut off.
    """

    def __init__(self, workdir: epath.Path, step: int):
        self.active = jax.process_index() == 0
        self._path, self._lines = workdir / "metrics.jsonl", []
        if not self.active:
            return
        self._lines = [line for line in files.read_jsonl_log(self._path) if line["step"] <= step]
        self._rewrite()
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def _rewrite(self) -> None:
        files.write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))

    def lines(self) -> list[dict]:
        """All that was written, by the runs before too."""
        return list(self._lines)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        if not self.active or not values:
            return
        line = {"step": step, **values}
        self._lines.append(line)
        if "://" not in str(self._path):
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        if not self.active:
            return
        if "://" in str(self._path):
            self._rewrite()
        self._events.flush()

    def close(self) -> None:
        self.flush()
        if self.active:
            self._events.close()


class Progress:
    """A line on the terminal that is written over; one line every `seconds` where there is no
    terminal.
    """

    def __init__(self, total_steps: int, start_step: int, seconds: float = 15.0):
        self._total, self._start, self._seconds = total_steps, start_step, seconds
        self._began = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._active = jax.process_index() == 0

    def show(self, step: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if not self._active or (
            not self._terminal and now - self._last < self._seconds and step < self._total
        ):
            return
        self._last = now
        left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
        text = (
            f"step {step}/{self._total} | loss {values.get('train/loss', math.nan):.3f} | "
            f"{values['train/tokens_per_second']:,.0f} tokens/s"
        )
        text += f" | MFU {values['train/mfu']:.1%}" if "train/mfu" in values else ""
        text += f" | {int(left) // 60}:{int(left) % 60:02d} left"
        print(
            f"\r{text}\033[K" if self._terminal else text,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def note(self, text: str) -> None:
        if self._active:
            print(("\n" if self._terminal else "") + text, file=sys.stderr, flush=True)


CURVES = (
    "train/loss",
    "/bits_per_byte",
    "/accuracy",
    "train/grad_norm",
    "train/learning_rate",
    "train/tokens_per_second",
)


def plot_curves(lines: list[dict]) -> bytes:
    """A PNG with the curves of metrics.jsonl: the loss, bits per byte and accuracy of every eval,
    gradient norm, speed.
    """
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    for axis, wanted in zip(figure.subplots(2, 3).flat, CURVES):
        names = sorted(
            {
                name
                for line in lines
                for name in line
                if name == wanted or (wanted[0] == "/" and name.endswith(wanted))
            }
        )
        for name in names:
            points = np.array(
                [(line["step"], line[name]) for line in lines if name in line], dtype=float
            )
            axis.plot(
                points[:, 0],
                points[:, 1],
                label=name.removeprefix("eval/"),
                marker="." if len(points) < 30 else None,
            )
        axis.set(title=wanted.removeprefix("train/").lstrip("/").replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        if wanted[0] == "/" and names:
            axis.legend(fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return png.getvalue()


class Timer:
    """Where the time goes: tokens/s and MFU of the steps since the last line, evals and checkpoints
    left out, and the goodput since the start.
    """

    def __init__(self, experiment):
        c = experiment.config.data
        self._tokens = c.batch_size * c.length
        self._devices = experiment.devices
        self._flops = {
            "train/mfu": flops.model_flops_per_token(experiment.model_config, c.length),
            "train/mfu_full_attention": flops.model_flops_per_token(
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
            name: flops.mfu(per_token * speed, self._devices)
            for name, per_token in self._flops.items()
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
