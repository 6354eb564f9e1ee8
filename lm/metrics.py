"""Sums and counts, the files they are written to, and speed: tokens/s, FLOPs, MFU."""

import json
import math
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath

# Dense bf16 FLOP/s of one jax device, from the vendors' data sheets. On v2 and v3 a device is one
# of a chip's two cores, on tpu7x too.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def accumulate(total: dict, terms: Mapping) -> None:
    """Adds {name: (sum, count)} to a running total, in float64."""
    for name, (value, count) in terms.items():
        old = total.get(name, (0.0, 0.0))
        total[name] = (old[0] + float(value), old[1] + float(count))


def means(total: Mapping) -> dict[str, float]:
    """{name: sum / count}."""
    return {name: value / count if count else math.nan for name, (value, count) in total.items()}


def model_flops_per_token(config, length: int, *, causal: bool = True) -> float:
    """Model FLOPs of one token in training (forward and backward), by the matmuls that the model
    needs, recomputation not counted.

    6 per weight of a matmul that the token meets (of the experts, those of one token; 2 forward, 4
    backward; Kaplan et al. 2020, arXiv 2001.08361, section 2.1; the head is one, the embedding
    look-up is none), and 12 N H per layer for each key that a query sees (scores and values;
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B): `length` keys, or half with `causal`,
    since the masked half need not be computed.

    Args:
      config: of lm.models.transformer.
      length: tokens a row. Packed documents count as one sequence of that length.
    """
    c = config
    attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    experts = c.experts_per_token if c.num_experts else 1
    mlp = c.embed_dim * (experts * c.mlp_dim + c.shared_mlp_dim) * (3 if c.gated_mlp else 2)
    router = c.embed_dim * (c.num_experts + (1 if c.shared_mlp_dim else 0))
    table_dim = c.table_dim or c.embed_dim
    projections = 2 * table_dim * c.embed_dim if table_dim != c.embed_dim else 0
    weights = c.num_layers * (attention + mlp + router) + c.vocab_size * table_dim + projections
    window = min(c.window or length, length)
    keys = window - window**2 / (2 * length) if causal else length
    return 6.0 * weights + 12.0 * c.num_layers * c.num_heads * c.head_dim * keys


def mfu(flops_per_second: float, devices) -> float | None:
    """Model FLOPs utilisation: a share of the devices' peak; None on hardware that is not in
    `PEAK_FLOPS`.
    """
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    return flops_per_second / (peak * len(devices)) if peak else None


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
        self._lines = [line for line in read_jsonl(self._path) if line["step"] <= step]
        self._rewrite()
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def _rewrite(self) -> None:
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))

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


def write_whole(path: epath.Path, content: bytes | str) -> None:
    """Writes a file so that a full disk or a kill leaves the old one, not half of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    temporary.replace(path)


def read_jsonl(path: epath.Path) -> list[dict]:
    """The whole lines of a JSONL file; [] if there is none. A last line that a killed run left
    half-written is dropped.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


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
