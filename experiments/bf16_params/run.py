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


def get_config(variant: str, seed: int, steps: int):
    c = pydocs.get_config("micro")
    c.seed = seed
    c.model.update(
        dict(
            embed_dim=128,
            mlp_dim=512,
            num_heads=2,
            num_kv_heads=2,
            head_dim=64,
            compute_dtype="float32",
        )
    )
    c.data.update(dict(length=128, batch_size=16))
    c.model.param_dtype = VARIANTS[variant]["param_dtype"]
    c.optimizer.update(
        dict(
            name="adamw",
            learning_rate=3e-3,
            schedule="linear",
            final_learning_rate=0.0,
            warmup_steps=50,
            b2=0.99,
            rounding=VARIANTS[variant]["rounding"],
        )
    )
    c.train.length = f"{steps} steps"
    c.checkpoint.every = 0
    c.evals = dict(validation=c.evals.validation)
    c.evals.validation.update(dict(every=max(1, steps // 5), max_documents=300))
    c.checkpoint.best = ""
    return c


def main(unused_argv) -> None:
    logging.basicConfig(level=logging.WARNING, force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    root = Path(_WORKDIR.value).expanduser()
    devices = startup.start()
    curves = {}
    for seed in range(_SEEDS.value):
        for variant in VARIANTS:
            workdir = root / f"{variant.replace(' ', '-')}-{seed}"
            train.train(get_config(variant, seed, _STEPS.value), epath.Path(workdir), devices)
            lines = [
                json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
            ]
            curves[variant, seed] = [
                (line["step"], line["eval/validation/loss"])
                for line in lines
                if "eval/validation/loss" in line
            ]
            lost = [line["train/updates_lost"] for line in lines if "train/updates_lost" in line]
            print(
                f"{variant:16} seed {seed}: validation loss {curves[variant, seed][-1][1]:.4f}, "
                f"updates lost {np.mean(lost):.1%} (last tenth "
                f"{np.mean(lost[-len(lost) // 10 :]):.1%})",
                flush=True,
            )
            jax.clear_caches()
    final = {v: np.array([curves[v, s][-1][1] for s in range(_SEEDS.value)]) for v in VARIANTS}
    result = {
        v: {
            "losses": x.tolist(),
            "mean": x.mean(),
            "ratio_to_f32": float((x / final["f32"]).mean()),
        }
        for v, x in final.items()
    }
    print(json.dumps(result, indent=2))
    (root / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(curves, root / "curves.png")


def plot(curves: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for number, variant in enumerate(VARIANTS):
        for seed in range(_SEEDS.value):
            axis.plot(
                *zip(*curves[variant, seed]),
                color=f"C{number}",
                marker=".",
                alpha=0.7,
                label=variant if seed == 0 else None,
            )
    axis.set(xlabel="step", ylabel="validation loss (nats a token)", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    app.run(main)
