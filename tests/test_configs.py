"""Every configuration builds, presets have their published sizes, and no key is there for
nothing.
"""

import inspect
import math
import runpy
import types
from pathlib import Path

import jax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from lm import build, command_line, main, optim, sharding, startup
from lm import config as config_lib
from lm.data import pydocs, sources
from lm.evals import entries
from lm.models import presets

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
PARAMETERS = {
    "gpt2": 124e6,
    "gpt2_medium": 355e6,
    "gpt2_large": 774e6,
    "gpt2_xl": 1558e6,
    "llama2_7b": 6.74e9,
    "llama2_13b": 13.02e9,
    "llama2_70b": 68.98e9,
    "gpt3_175b": 175e9,
    "mixtral_8x7b": 46.7e9,
    "qwen3_30b_a3b": 30.5e9,
}


def sizes(path):
    """The arguments that a configuration takes: those in its SIZES, else all presets; () alone
    where it takes none.
    """
    module = runpy.run_path(str(path))
    if not inspect.signature(module["get_config"]).parameters:
        return [()]
    return [()] + [(size,) for size in module.get("SIZES", presets.PRESETS)]


def abstract_model(config, vocab_size):
    """(its Config, abstract parameters)."""
    model_config, make_model = build.model(config, vocab_size, "tpu")
    return model_config, nnx.split(
        nnx.eval_shape(lambda: make_model(jax.random.key(0))), nnx.Param
    )[1]


def test_there_are_configurations():
    assert CONFIGS


@pytest.mark.parametrize(
    "path, size",
    [
        pytest.param(path, size, id=":".join((path.stem, *size)))
        for path in CONFIGS
        for size in sizes(path)
    ],
)
def test_every_configuration_builds(path, size):
    """All that needs no data: the model for the tokenizer and the rows, the optimizer, objective,
    source, length and evals.
    """
    module = runpy.run_path(str(path))
    c = module["get_config"](*size).lock()
    assert module["__doc__"] and "--config=configs/" in module["__doc__"], (
        "say what it is and how it is run"
    )
    assert set(config_lib.flatten(config_lib.default())) - set(config_lib.flatten(c)) <= {
        "data.source_args.data_dir"
    }
    vocab_size = 258 if c.tokenizer.kind == "bytes" else c.tokenizer.vocab_size
    _, abstract = abstract_model(c, vocab_size)
    steps = build.total_steps(
        c.train.length, batch_tokens=c.data.batch_size * c.data.length, epoch_tokens=lambda: 10**7
    )
    optim.make_optimizer(c.optimizer, sharding.logical_axes(abstract), steps)
    arguments = c.objective.to_dict()
    build.resolve(arguments.pop("type"), "config.objective.type").make_loss(**arguments)
    inspect.signature(build.resolve(c.data.source, "config.data.source")).bind(
        c.data.split, **c.data.source_args
    )
    assert c.data.batch_size % c.data.streams == 0 and c.data.batch_size % c.train.accumulation == 0
    for name, entry in c.evals.items():
        arguments = entry.to_dict()
        evaluator = build.resolve(arguments.pop("type"), f"config.evals.{name}.type")
        assert arguments.pop("every") >= 0 and arguments.pop("batch_size") > 0
        if "split" in arguments:
            arguments["documents"] = arguments.pop("split")
        if "name" in inspect.signature(evaluator).parameters:
            arguments["name"] = name
        inspect.signature(evaluator).bind(None, encoder=None, **arguments)
    if c.checkpoint.best:
        assert c.checkpoint.best.split("/")[1] in c.evals


@pytest.mark.parametrize("path", [p for p in CONFIGS if sizes(p) != [()]], ids=lambda p: p.stem)
def test_another_size_is_refused(path):
    with pytest.raises(ValueError, match=r"'gpt5'; valid: \["):
        runpy.run_path(str(path))["get_config"]("gpt5")


@pytest.mark.parametrize("preset", sorted(presets.PRESETS))
def test_presets_have_their_published_sizes(preset):
    c = config_lib.default()
    c.model.update(presets.get(preset))
    c.data.length = c.model.context_length
    model_config, abstract = abstract_model(c, 0)
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.to_pure_dict(abstract)))
    assert (
        set(presets.get(preset)) < {f for f in c.model.keys()}
        and model_config.vocab_size == presets.get(preset)["vocab_size"]
    )
    if preset in PARAMETERS:
        assert count == pytest.approx(
            PARAMETERS[preset], rel=0.015 if preset == "gpt3_175b" else 0.01
        )


def test_resumable_keys_exist():
    """A misspelt one would forbid for ever what it should allow. Arguments of sources are those of
    any of them.
    """
    all_sources = (sources.text, sources.jsonl, sources.tfds, pydocs.pydocs)
    known = {
        f"data.source_args.{name}"
        for source in all_sources
        for name in inspect.signature(source).parameters
    }
    for key in config_lib.flatten(config_lib.default()):
        known |= {key, key.rpartition(".")[0]}
    assert set(config_lib.RESUMABLE) - {"evals"} <= known and "evals" in config_lib.default()


# sections that are taken whole, by to_dict
KWARGS = ("model", "mesh", "objective", "evals.", "data.source_args")


def record_reads(monkeypatch, config, read):
    """Adds every leaf of `config` that is read from now on to `read`, by its path. Whole copies
    (for config.json) don't count.
    """
    names, muted = {}, []

    def name(section, prefix):
        names[id(section)] = prefix
        for key in section:
            if isinstance(section[key], ConfigDict):
                name(section[key], f"{prefix}{key}.")

    name(config, "")
    getitem, to_dict, items = ConfigDict.__getitem__, ConfigDict.to_dict, ConfigDict.items

    def recording_getitem(self, key):
        value = getitem(self, key)
        if id(self) in names and not muted and not isinstance(value, ConfigDict):
            read.add(names[id(self)] + key)
        return value

    def quiet(function, loud=lambda self: False):
        def wrapped(self, *args, **kwargs):
            if loud(self) and not muted:
                return function(self, *args, **kwargs)
            muted.append(1)
            try:
                return function(self, *args, **kwargs)
            finally:
                muted.pop()

        return wrapped

    monkeypatch.setattr(ConfigDict, "__getitem__", recording_getitem)
    monkeypatch.setattr(
        ConfigDict,
        "to_dict",
        quiet(to_dict, lambda self: names.get(id(self), "").startswith(KWARGS)),
    )
    monkeypatch.setattr(ConfigDict, "items", quiet(items))


@pytest.fixture
def quick_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compile")
def test_every_key_is_read(tiny, tmp_path, monkeypatch):
    """By a run of two steps with evals, as the command makes it; keys of other optimizers and of
    the other tokenizer, by building those.
    """
    read = set()
    c = tiny.copy_and_resolve_references().unlock()
    c.train.length = "2 steps"
    c.evals.text = entries.perplexity(every=1, batch_size=4)
    c.evals.samples = entries.samples(("ab", "cde f"), every=0, max_new_tokens=4)
    c.optimizer.warmup_steps = 0
    with monkeypatch.context() as patch:
        record_reads(patch, c, read)
        start = startup.start
        patch.setattr(startup, "start", lambda platform, processes: start(platform)[:1])
        patch.setattr(command_line, "CONFIG", types.SimpleNamespace(value=c))
        for flag, value in dict(
            _WORKDIR=str(tmp_path / "run"),
            _MODE="train",
            _PROFILE="",
            _COORDINATOR="",
            _COMPARE="",
            _STEPS="",
        ).items():
            patch.setattr(main, flag, types.SimpleNamespace(value=value))
        assert main.main(["lm.main"]) == 0
    for changes in (dict(name="muon"), dict(name="adafactor")):
        other = tiny.copy_and_resolve_references()
        other.optimizer.update(changes)
        other.tokenizer.update(dict(kind="sentencepiece", vocab_size=280))
        with monkeypatch.context() as patch:
            record_reads(patch, other, read)
            build.build(other, jax.devices()[:1])
    assert set(config_lib.flatten(config_lib.default())) - {"data.source_args.data_dir"} <= set(
        config_lib.flatten(c)
    )
    unread = set(config_lib.flatten(c)) - read
    assert not unread, f"no code reads {sorted(unread)}"
    # it did run
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("eval/text/loss") == 2
