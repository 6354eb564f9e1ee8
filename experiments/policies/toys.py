"""Does a policy learn what it is rewarded for, and nothing else? README.md has what came.

    python experiments/policies/toys.py --workdir=runs/toys

Ten prompts, the digits. A text is right where its first byte, modulo 10, is that digit: one in ten
is, of a model drawn at random. "shuffled" gives each text the reward of another one, and "flipped"
takes it away for what is right.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from configs import rl
from lm import files, train
from lm.models import presets

ROLLOUTS, TEXTS = 100, 320
HOWS = ("right", "shuffled", "flipped")
RUNS = [(size, how) for size in ("grpo", "rloo", "ppo") for how in HOWS] + [("ppo", "three")]


def right(records, texts) -> list[float]:
    """1 where a text begins as its record's answer says."""
    return [float(text.ids[0] % 10 == record["answer"]) for record, text in zip(records, texts)]


def rewarded(records, texts, *, how: str) -> list[float]:
    """What is learnt from."""
    earned = right(records, texts)
    if how == "three":
        return [float(text.ids[0] % 10 == 3) for text in texts]
    if how == "flipped":
        return [-value for value in earned]
    if how == "shuffled":
        seed = [text.ids[0] for text in texts]
        order = np.random.default_rng(seed).permutation(len(earned))
        return [earned[i] for i in order]
    return earned


def make_config(size: str, how: str, folder: Path) -> ConfigDict:
    path = folder / "prompts.jsonl"
    lines = [json.dumps(dict(prompt=str(i), answer=i)) + "\n" for i in range(10)]
    files.write_whole(path, "".join(lines))

    c = rl.get_config(f"{size},,{path}")
    c.model.update(presets.get("micro"))
    c.model.update(vocab_size=0, context_length=16, param_dtype="float32")
    c.model.update(num_layers=1, scan_unroll=1)
    c.tokenizer.kind = "bytes"
    c.data.update(length=16, batch_size=TEXTS)

    # There is no base, and nothing to keep to.
    c.objective.update(reference="none", kl=0.0)
    c.rollout.update(max_new_tokens=2, samples=32, slots=TEXTS, kl=0.0, patience=ROLLOUTS)
    if size == "ppo":
        c.init_new = ""
        c.rollout.update(samples=1, steps=1, gae_lambda=1.0)
        c.objective.update(value_weight=5.0, value_clip=10.0)
    if how == "three":
        c.rollout.max_new_tokens = 4
    c.rewards = ConfigDict()
    c.rewards.right = ConfigDict(dict(type="toys.right", weight=0.0))
    c.rewards.rewarded = ConfigDict(dict(type="toys.rewarded", weight=1.0, how=how))
    # PPO has four updates of a rollout.
    c.optimizer.learning_rate = 1e-3 if size == "ppo" else 3e-3
    c.train.length = f"{ROLLOUTS * c.rollout.epochs} steps"
    return c


def read(run: Path, name: str) -> list[float]:
    lines = [line for _, line in files.read_jsonl(str(run / "metrics.jsonl"))]
    return [line[f"train/{name}"] for line in lines if f"train/{name}" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    folder = parser.parse_args().workdir
    folder.mkdir(parents=True, exist_ok=True)

    print("| objective | reward | at first | after 50 | after 100 rollouts | R^2 of the critic |")
    print("|---|---|---|---|---|---|")
    for size, how in RUNS:
        run = folder / f"{size}-{how}"
        if not (run / "summary.json").exists():
            config = make_config(size, how, folder)
            train.train(config.lock(), epath.Path(run), jax.devices()[:1])

        shares = read(run, "reward/rewarded" if how == "three" else "reward/right")
        # Five rollouts, 1,600 texts.
        at = [np.mean(shares[start : start + 5]) for start in (0, 48, 95)]
        # While there is something to foresee: later nearly all texts are right.
        explained = read(run, "value_explained")[10:20]
        foreseen = f"{np.mean(explained):.2f}" if explained else ""
        shown = " | ".join(f"{share:.3f}" for share in at)
        print(f"| {size} | {how} | {shown} | {foreseen} |", flush=True)


if __name__ == "__main__":
    main()
