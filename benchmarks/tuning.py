"""Speed of supervised tuning against pretraining's, on the same rows, in tokens a second.

Both train the model of configs/pydocs.py (in f32) on the same texts: questions about docstrings of
this machine, with answers. Pretraining reads a text whole. Tuning reads question and answer through
a chat template, and learns the answer alone. Each is a run without evals; they take turns. The
ratio is the median over the turns.

    python benchmarks/tuning.py
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from etils import epath
from ml_collections import ConfigDict

from lm import config as config_lib
from lm import files, train
from lm.data import pydocs_tasks
from lm.models import presets

LENGTH = 256
STEPS = 60
LOG_EVERY = 10
CONTENDERS = ("pretraining", "tuning")


def write_data(folder: Path) -> None:
    """Writes questions and answers twice: as texts, and as conversations."""
    texts, conversations = [], []
    for record in pydocs_tasks.load("train", "questions"):
        question = f"{record['excerpt']}\n\nQuestion: {record['question']}\nAnswer:"
        answer = f" {record['answer']}"
        # A row has room for two special tokens more. Longer texts would be cut by one side alone.
        if len((question + answer).encode()) <= LENGTH - 2:
            texts.append(dict(text=question + answer))
            conversations.append(dict(prompt=question, completion=answer))

    for contender, rows in zip(CONTENDERS, (texts, conversations)):
        lines = [json.dumps(row) + "\n" for row in rows]
        files.write_whole(folder / f"{contender}.jsonl", "".join(lines))


def make_config(contender: str, folder: Path) -> ConfigDict:
    c = config_lib.default()
    c.model.update(presets.get("mini"))
    c.model.vocab_size = 0
    c.model.scan_unroll = c.model.num_layers
    c.tokenizer.kind = "bytes"

    path = str(folder / f"{contender}.jsonl")
    c.data.source_args = ConfigDict(dict(path=path, held_out=0.05, held_out_by="hash"))
    c.data.packing = "first_fit"
    c.data.length = LENGTH
    c.data.batch_size = 16
    if contender == "tuning":
        c.data.source = "lm.data.conversations.conversations"
        c.chat.template = "plain"
    else:
        c.data.source = "lm.data.sources.jsonl"
        c.data.source_args.update(text_key="text", label_key="")

    c.train.length = f"{STEPS} steps"
    c.train.log_every = LOG_EVERY
    return c


def tokens_per_second(contender: str, folder: Path, turn: int) -> float:
    """Trains once, and returns the median over the lines of the log."""
    workdir = epath.Path(folder / f"{contender}-{turn}")
    train.train(make_config(contender, folder).lock(), workdir, jax.devices()[:1])

    speeds = []
    for _, line in files.read_jsonl(str(workdir / "metrics.jsonl")):
        if "train/tokens_per_second" in line:
            speeds.append(line["train/tokens_per_second"])
    return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns

    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)
        for turn in range(turns):
            # Who begins takes turns too.
            order = CONTENDERS if turn % 2 == 0 else CONTENDERS[::-1]
            speeds = {name: tokens_per_second(name, folder, turn) for name in order}
            ratios.append(speeds["tuning"] / speeds["pretraining"])
            print(turn, speeds, f"{ratios[-1]:.3f}", flush=True)
    print(f"tuning / pretraining: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
