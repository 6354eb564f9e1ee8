"""Strict jax, 8 simulated devices, and a small experiment that trains in seconds."""

import json
import os
import random

# Compiling is most of the time that tests take; what is compiled here is tiny, and may be slow.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

from lm import config as config_lib

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

COLOURS = ("red", "green", "blue")


def write_corpus(path, num=64, seed=0):
    """A JSONL corpus of documents of 3 to 120 characters, whose label follows from their words."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for i in range(num):
            label = COLOURS[i % 3]
            words = [rng.choice((label[:2], "ab", "cde", "é")) for _ in range(rng.randint(1, 30))]
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")


@pytest.fixture
def tiny(tmp_path):
    """A complete configuration: bytes, 2 layers of 32, rows of 32 tokens, one device's mesh by
    default (`mesh.data=1`).
    """
    write_corpus(tmp_path / "corpus.jsonl")
    c = config_lib.default()
    c.data.source = "lm.data.sources.jsonl"
    c.data.source_args = dict(path=str(tmp_path / "corpus.jsonl"), held_out=0.25, label_key="label")
    c.data.label_prompt = "\n="
    c.data.cache_dir = str(tmp_path / "cache")
    c.data.update(dict(length=32, batch_size=8, streams=4, packing_bins=4))
    c.tokenizer.kind = "bytes"
    c.model.update(
        dict(
            context_length=32,
            num_layers=2,
            embed_dim=32,
            mlp_dim=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
        )
    )
    c.optimizer.warmup_steps = 2
    c.train.length = "6 steps"
    c.train.log_every = 1
    c.mesh.fsdp = 1
    return c.lock()


@pytest.fixture
def one_device():
    return jax.devices()[:1]
