"""Trains the same small model with f32 parameters and with bf16 parameters under each rounding; see
README.md beside this file.

    python experiments/bf16_params/run.py --workdir=runs/bf16_params
"""

import json
import logging
import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from etils import epath

sys.path.insert(0, str(Path(__file__).parents[2]))  # for configs/
from configs import pydocs
from lm import startup, train

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the runs go; finished ones are not run again.", required=True
)
_STEPS = flags.DEFINE_integer("steps", 500, "Steps of each run.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each variant.")

VARIANTS = {
    "f32": dict(param_dtype="float32", rounding="nearest"),
    "bf16 stochastic": dict(param_dtype="bfloat16", rounding="stochastic"),
    "bf16 nearest": dict(param_dtype="bfloat16", rounding="nearest"),
}
VALIDATION_LOSS = "eval/validation/loss"
UPDATES_LOST = "train/updates_lost"


def get_config(variant: str, seed: int, steps: int):
    """The configuration of a run; variants differ in the parameters' dtype and rounding alone."""
    c = pydocs.get_config("micro")
    c.seed = seed

    c.model.embed_dim = 128
    c.model.mlp_dim = 512
    c.model.num_heads = 2
    c.model.num_kv_heads = 2
    c.model.head_dim = 64
    c.model.param_dtype = VARIANTS[variant]["param_dtype"]
    c.model.compute_dtype = "float32"
    c.data.length = 128
    c.data.batch_size = 16

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.warmup_steps = 50
    c.optimizer.b2 = 0.99
    c.optimizer.rounding = VARIANTS[variant]["rounding"]

    # Five points on each curve; the other evals of the configuration are left out.
    c.train.length = f"{steps} steps"
    c.evals = dict(validation=c.evals.validation)
    c.evals.validation.every = max(1, steps // 5)
    c.evals.validation.max_documents = 300
    c.checkpoint.every = 0
    c.checkpoint.best = ""
    return c


def run(variant: str, seed: int, steps: int, root: Path, devices) -> list[tuple[int, float]]:
    """Trains one run, prints how it ended, and returns its (step, validation loss)."""
    workdir = root / f"{variant.replace(' ', '-')}-{seed}"
    train.train(get_config(variant, seed, steps), epath.Path(workdir), devices)

    curve = []
    updates_lost = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        if VALIDATION_LOSS in metrics:
            curve.append((metrics["step"], metrics[VALIDATION_LOSS]))
        if UPDATES_LOST in metrics:
            updates_lost.append(metrics[UPDATES_LOST])

    # The learning rate falls to zero, so small updates are lost at the end above all.
    _, final_loss = curve[-1]
    last_tenth = updates_lost[-len(updates_lost) // 10 :]
    print(
        f"{variant:16} seed {seed}: validation loss {final_loss:.4f}, updates lost "
        f"{np.mean(updates_lost):.1%} (last tenth {np.mean(last_tenth):.1%})",
        flush=True,
    )
    return curve


def summarize(curves: dict, seeds: int) -> dict:
    """The final losses of each variant, and their mean ratio to those of f32 with the same seed."""
    final = {}
    for variant in VARIANTS:
        final[variant] = np.array([curves[variant, seed][-1][1] for seed in range(seeds)])

    result = {}
    for variant, losses in final.items():
        result[variant] = {
            "losses": losses.tolist(),
            "mean": losses.mean(),
            "ratio_to_f32": float((losses / final["f32"]).mean()),
        }
    return result


def plot(curves: dict, seeds: int, path: Path) -> None:
    """Draws the curves of all runs, a colour for each variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for number, variant in enumerate(VARIANTS):
        for seed in range(seeds):
            steps, losses = zip(*curves[variant, seed])
            # One entry in the legend for all seeds.
            label = variant if seed == 0 else None
            axis.plot(steps, losses, color=f"C{number}", marker=".", alpha=0.7, label=label)

    axis.set(xlabel="step", ylabel="validation loss (nats a token)", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)


def main(unused_argv) -> None:
    logging.basicConfig(level=logging.WARNING, force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    root = Path(_WORKDIR.value).expanduser()
    devices = startup.start()

    # Seed by seed, so that there is something to compare as early as possible.
    curves = {}
    for seed in range(_SEEDS.value):
        for variant in VARIANTS:
            curves[variant, seed] = run(variant, seed, _STEPS.value, root, devices)
            jax.clear_caches()

    result = json.dumps(summarize(curves, _SEEDS.value), indent=2)
    print(result)
    (root / "result.json").write_text(result + "\n")
    plot(curves, _SEEDS.value, root / "curves.png")


if __name__ == "__main__":
    app.run(main)
