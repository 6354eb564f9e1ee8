"""What several test files share: small models, a corpus, and runs of the whole trainer."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from lm import checkpoint, train
from lm import config as config_lib
from lm.models.transformer import Config, Transformer

ROOT = Path(__file__).parents[1]

# Labels of the tiny corpus, and a verbalizer that has one word for each.
LABELS = ("red", "green", "blue")
VERBALIZER = {label: (" " + label,) for label in LABELS}

PNG = b"\x89PNG\r\n\x1a\n"  # what a PNG file begins with
CLOCK = ("tokens_per_second", "mfu", "seconds", "goodput")  # metrics that two runs never share

LAST_STEP = 11  # of the runs that tests stop

# A config file for the command line, its `text` the configuration as JSON.
CONFIG_FILE = """
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({text!r}))
"""

# Python for a process of its own: the end of a run draws no curves, which would take as long as the
# whole of a small run.
NO_CURVES = """
from lm import telemetry

telemetry.plot_curves = lambda lines: b""
"""

# A data source slow enough for a test to stop the run between two given steps.
SLOW_SOURCE = f"""{NO_CURVES}
import time
from lm.data import sources

class Slow(list):
    def __getitem__(self, index):
        time.sleep(0.02)
        return list.__getitem__(self, index)

def jsonl(split, **arguments):
    documents = sources.jsonl(split, **arguments)
    return sources.Documents(Slow(documents.items), documents.fingerprint)
"""

# Forks a process for each command of argv[2] (JSON) of the module argv[1], which is imported once.
FORKS = """
import importlib, json, os, runpy, sys

module, commands = sys.argv[1], json.loads(sys.argv[2])
importlib.import_module(module)
del sys.modules[module]
for number, arguments in enumerate(commands):
    pid = os.fork()
    if not pid:
        for stream in (1, 2):
            file = os.open(f"{number}.{stream}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, stream)
        sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    _, status = os.waitpid(pid, 0)
    with open(f"{number}.status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(status)))
"""


def slow(*values):
    """A parameter of a test that only `pytest -m slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Models.


def model_config(**changes):
    """The Config of a small Transformer in f32; `changes` replace fields of it."""
    fields = config_lib.default().model.to_dict()
    del fields["type"]
    small = dict(
        vocab_size=40,
        context_length=16,
        num_layers=2,
        embed_dim=32,
        mlp_dim=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        activation="silu",
        tie_embeddings=False,
        param_dtype="float32",
        compute_dtype="float32",
    )
    return Config(**fields | small | changes)


def small_encdec(**changes):
    """config.model of an encoder-decoder, with these changes."""
    sizes = dict(num_layers=2, encoder_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, head_dim=8)
    options = dict(context_length=32, param_dtype="float32")
    return config_lib.model(config_lib.ENCDEC, **sizes | options | changes)


def abstract_model(config):
    """(graphdef, abstract nnx state of the parameters) of a Transformer; nothing is computed."""

    def init():
        return Transformer(config, jax.random.key(0))

    return nnx.split(nnx.eval_shape(init), nnx.Param)


def random_model(config, seed=1, std=0.3):
    """(graphdef, parameters large enough for every part to matter, biases not 0)."""
    graphdef, abstract = abstract_model(config)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        # Scales of norms lie around 1, everything else around 0.
        mean = "scale" in jax.tree_util.keystr(path)
        return (rng.normal(0, std, leaf.shape) + mean).astype(leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(abstract))


def assert_trees_close(tree, wanted, **tolerances):
    """`np.testing.assert_allclose` of each array; what it prints names the array's path."""
    assert jax.tree.structure(tree) == jax.tree.structure(wanted)
    for (path, got), leaf in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(wanted)
    ):
        np.testing.assert_allclose(got, leaf, err_msg=jax.tree_util.keystr(path), **tolerances)


# Corpora.


def write_corpus(path, num=64, seed=0):
    """A JSONL corpus of documents of 1 to 30 words, whose label follows from them."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for i in range(num):
            label = LABELS[i % 3]
            words = [rng.choice((label[:2], "ab", "cde", "é")) for _ in range(rng.randint(1, 30))]
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")


# Tasks.


def with_conversations(config, folder, records=None):
    """The configuration with questions and answers for its data, in ChatML."""
    if records is None:
        records = [dict(prompt=f"{i}?", completion=f"{i % 3}.") for i in range(12)]
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = config.copy_and_resolve_references().unlock()
    config.data.source = "lm.data.conversations.conversations"
    config.data.source_args = dict(path=str(path), held_out=0.0)
    config.data.label_prompt = ""
    config.data.length = config.model.context_length = 64
    config.chat.template = "chatml"
    config.tokenizer.reserve = "turns"
    return config


def write_task(path, template, shots_split="train"):
    """Writes the shortest TOML file of a task about the records beside it."""
    text = """type = "lm.evals.classification.PromptClassification"
[source]
path = "FOLDER/{split}.jsonl"
shots_split = "SHOTS"
[prompt]
templates = ["TEMPLATE"]
[[verbalizer.words]]
red = [" red"]
green = [" green"]
blue = [" blue"]
"""
    text = text.replace("FOLDER", str(path.parent))
    text = text.replace("SHOTS", shots_split)
    text = text.replace("TEMPLATE", template)
    path.write_text(text)
    return str(path)


# Commands.


def xla_flags(devices):
    """$XLA_FLAGS of the tests, with so many simulated devices."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")


def run_commands(module, commands, folder, devices=1):
    """[(exit status, stdout, stderr)] of `python -m MODULE`, with each of some lists of arguments.

    Imports take most of a small command's time: all are forks of one process, which has imported.
    """
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(devices),
    }
    process = [sys.executable, "-c", FORKS, module, json.dumps(commands)]
    subprocess.run(process, cwd=folder, env=environment, check=True)

    results = []
    for number in range(len(commands)):
        status, out, err = (folder / f"{number}.{name}" for name in ("status", 1, 2))
        results.append((int(status.read_text()), out.read_text(), err.read_text()))
    return results


# Runs.


def run_training(config, run, devices=1):
    """Trains in the directory `run` on the first `devices` devices; returns the last metrics."""
    return train.train(config, epath.Path(run), jax.devices()[:devices])


def terminate_at(monkeypatch, owner, name, call):
    """A signal at the given call of a function, counted from 1."""
    original = getattr(owner, name)
    count = 0

    def function(*args):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), random.choice([signal.SIGTERM, signal.SIGINT]))
        return original(*args)

    monkeypatch.setattr(owner, name, function)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(values):
    """`values` without the metrics that depend on the clock."""

    def is_of_clock(key):
        return any(word in key for word in CLOCK)

    return {key: value for key, value in values.items() if not is_of_clock(key)}


def read_metrics(run):
    """The lines of metrics.jsonl, without what depends on the clock."""
    return [without_clock(line) for line in read_jsonl(run / "metrics.jsonl")]


def saved_steps(run):
    """The steps of a run's checkpoints."""
    return checkpoint.steps(epath.Path(run) / "checkpoints")


def read_checkpoint(run, step):
    """({path: (dtype, shape, bytes)} of everything in a checkpoint's state, its meta)."""
    checkpointer = checkpoint.Checkpointer(epath.Path(run) / "checkpoints", keep=99)
    stored = checkpointer._manager.item_metadata(step).state.tree
    first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {}
    for path, leaf in stored.items():
        abstract[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first_device)

    state, meta = checkpointer.restore(step, abstract), checkpointer.meta(step)
    checkpointer.close()

    arrays = {}
    for path, leaf in state.items():
        arrays[path] = (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
    return arrays, meta


def read_artifacts(run):
    """{name: bytes} of what a run's evaluators wrote."""
    return {p.name: p.read_bytes() for p in [*run.glob("predictions/*"), *run.glob("samples.md")]}


def snapshot(directory):
    """{relative path: bytes} of all files below a directory."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def assert_same_run(run, reference, step):
    """Bit-equal: all arrays of the state, the data streams' states, running metrics, every line of
    the metrics, predictions.
    """
    state, meta = read_checkpoint(run, step)
    wanted_state, wanted_meta = read_checkpoint(reference, step)

    assert state.keys() == wanted_state.keys()
    assert [path for path in wanted_state if state[path] != wanted_state[path]] == []
    for key in (meta.keys() | wanted_meta.keys()) - {"config"}:
        assert meta[key] == wanted_meta[key], key

    metrics, wanted_metrics = read_metrics(run), read_metrics(reference)
    assert metrics == wanted_metrics
    assert read_artifacts(run) == read_artifacts(reference)
