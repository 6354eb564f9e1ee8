"""Strict jax, 8 simulated devices, one cache of compiled programs, and small experiments that train
in seconds.
"""

import dataclasses
import json
import os
import tempfile

# Compiling is most of the time that tests take; what is compiled here is tiny, and may be slow.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# The workers of pytest-xdist, and processes that tests start, inherit the cache of the session.
# .ci/run has one for all its sessions.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="lm-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("LM_TESTS_CACHE", CACHE.name)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

from lm import build, startup, telemetry
from lm import config as config_lib
from lm.reports import pictures
from tests.helpers import PNG, write_corpus

startup.order_simulated_collectives()
# Where processes that tests start look too.
jax.config.update("jax_compilation_cache_dir", startup.compilation_cache("cpu"))
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_make_parametrize_id(config, val, argname):
    """Names a test by its argument, where that is bytes: what gzip makes changes every second, and
    the workers of pytest-xdist must have the same tests.
    """
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def tiny(tmp_path):
    """A complete configuration: bytes, 2 layers of 32, rows of 32 tokens, a mesh of one device
    (`mesh.fsdp=1`).
    """
    write_corpus(tmp_path / "corpus.jsonl")
    c = config_lib.default()
    c.data.source = "lm.data.sources.jsonl"
    # 48 documents are trained on, 16 held out.
    c.data.source_args = dict(
        path=str(tmp_path / "corpus.jsonl"), held_out=0.25, held_out_by="tail", label_key="label"
    )
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
def small(tiny, tmp_path_factory):
    """`tiny`, unlocked, with one layer, and with the same paths for all tests: documents are named
    by their file, and tests share runs.
    """
    base = tmp_path_factory.getbasetemp()
    path = base / "corpus.jsonl"
    if not path.exists():
        write_corpus(path)
    tiny.unlock()
    tiny.data.source_args.path = str(path)
    tiny.data.cache_dir = str(base / "cache")
    tiny.model.num_layers = 1
    return tiny


@pytest.fixture
def one_device():
    return jax.devices()[:1]


# What is traced once, however many runs: a Program holds nothing that changes, and jax.jit knows a
# function that it has seen.
_PROGRAMS = {}
_MAKE_PROGRAM = build.program
# Keys of the configuration on which no compiled program depends.
_FREE_KEYS = (
    "evals.",
    "checkpoint.",
    "data.source",
    "data.mixture",
    "data.cache_dir",
    "train.log_every",
    "train.look_every",
    "train.check_replicas_every",
    "tracking.",
    "rewards.",
    "rollout.",
    "init_from",
)
_PICTURES = [
    (telemetry, "plot_curves", telemetry.plot_curves),
    (pictures, "plot_confusion", pictures.plot_confusion),
    (pictures, "plot_reliability", pictures.plot_reliability),
]


def program_once(config, devices, vocab_size, total_steps):
    """`build.program`, which compiles nothing twice."""
    keys = config_lib.flatten(config).items()
    compiled_keys = {key: value for key, value in keys if not key.startswith(_FREE_KEYS)}
    device_ids = [device.id for device in devices]
    program_key = json.dumps([compiled_keys, device_ids, vocab_size, total_steps])
    if program_key not in _PROGRAMS:
        _PROGRAMS[program_key] = _MAKE_PROGRAM(config, devices, vocab_size, total_steps)
    return dataclasses.replace(_PROGRAMS[program_key], config=config)


@pytest.fixture
def fast_runs(monkeypatch):
    """Runs in half a second: programs are traced once, and no pictures are drawn."""
    monkeypatch.setattr(build, "program", program_once)
    for module, name, _ in _PICTURES:
        monkeypatch.setattr(module, name, lambda *unused: PNG)


@pytest.fixture
def drawn_pictures(fast_runs, monkeypatch):
    """Fast runs whose pictures are drawn after all."""
    for module, name, plot in _PICTURES:
        monkeypatch.setattr(module, name, plot)
