"""Run directories as runs leave them, made up, for tests of reports."""

import json

import numpy as np

from lm import config as config_lib

EVAL = "topic"
LABELS = ("red", "green", "blue")


def config(steps=40, **changes):
    """A configuration with two evals; `changes` are of its flat keys, with __ for dots."""
    c = config_lib.default()
    c.train.length = f"{steps} steps"
    c.data.batch_size = 4
    c.checkpoint.best = f"eval/{EVAL}/accuracy"
    values = c.to_dict()
    values["evals"] = {EVAL: {"type": "x", "every": 20}, "validation": {"type": "y", "every": 0}}
    for key, value in changes.items():
        *groups, name = key.split("__")
        group = values
        for part in groups:
            group = group[part]
        group[name] = value
    return values


def lines(steps=40, *, log_every=1, loss=2.0, accuracy=0.5, seed=0):
    """The lines of a run's metrics.jsonl."""
    rng = np.random.default_rng(seed)
    all_lines = []
    for step in range(log_every, steps + 1, log_every):
        line = {
            "step": step,
            "train/loss": loss + 3 / np.sqrt(step) + rng.normal(0, 0.05),
            "train/grad_norm": rng.uniform(0.5, 1),
            "train/learning_rate": 1e-3 * (1 - step / steps),
            "train/batch_hash": "ab12",
            "train/tokens_per_second": rng.uniform(9000, 10000),
            "train/goodput": 0.9,
            "train/seconds_evals": 2.0,
        }
        all_lines.append(line)
    for name, values in (
        (EVAL, {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "majority_accuracy": 0.3}),
        ("validation", {"bits_per_byte": loss / 2, "xz_bits_per_byte": 2.0}),
    ):
        metrics = {f"eval/{name}/{key}": value for key, value in values.items()}
        if name == EVAL:
            metrics[f"eval/{name}/accuracy_high"] = accuracy + 0.1
        all_lines.append({"step": steps} | metrics | {f"eval/{name}/seconds": 1.0})
    return all_lines


def predictions(num=60, *, accuracy=0.5, seed=0, texts=("a text", "another")):
    """Lines of predictions over LABELS, so many of which are right."""
    rng = np.random.default_rng(seed)
    all_lines = []
    for i in range(num):
        label = i % len(LABELS)
        guess = label if rng.uniform() < accuracy else (label + 1) % len(LABELS)
        probs = np.full(len(LABELS), 0.2)
        probs[guess] = 0.6
        line = {
            "name": f"example {i}",
            "label": LABELS[label],
            "prediction": LABELS[guess],
            "distribution": dict(zip(LABELS, probs.tolist())),
            "prompts": [texts[i % len(texts)]],
            "cut": [0],
        }
        all_lines.append(line)
    return all_lines


def jsonl(values):
    return "".join(json.dumps(value) + "\n" for value in values)


def write_run(path, *, steps=40, accuracy=0.5, seed=0, num=60, fingerprint="f", changes=None):
    """Writes a run directory: configuration, metrics, predictions and samples."""
    (path / "predictions").mkdir(parents=True)
    settings = {key.replace(".", "__"): value for key, value in (changes or {}).items()}
    (path / "config.json").write_text(json.dumps(config(steps, **settings)))
    (path / "metrics.jsonl").write_text(jsonl(lines(steps, accuracy=accuracy, seed=seed)))
    if num:
        file = path / "predictions" / f"{EVAL}-{steps}.jsonl"
        file.write_text(jsonl(predictions(num, accuracy=accuracy, seed=seed)))
        about = {"fingerprint": fingerprint, "examples": num, "prompts": [{"before": "SHOT\n\n"}]}
        (path / "predictions" / f"{EVAL}-about-{steps}.json").write_text(json.dumps(about))
    (path / "samples.md").write_text("<!-- lm step 40 -->\n## Step 40\n\n```\nonce⟫ upon\n```\n")


def write_sweep(path, axes, accuracy, **options):
    """Writes a full grid with its sweep.json; returns the plan.

    Args:
      axes: key -> values.
      accuracy: function of the changes.
      options: of `write_run`.
    """
    grid = [{}]
    for axis, values in axes.items():
        grid = [changes | {axis: value} for changes in grid for value in values]
    runs = []
    for number, changes in enumerate(grid):
        name = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in changes.items())
        runs.append({"name": name, "changes": changes})
        write_run(path / name, accuracy=accuracy(changes), seed=number, changes=changes, **options)
    plan = {"axes": list(axes), "runs": runs}
    (path / "sweep.json").write_text(json.dumps(plan))
    return plan
