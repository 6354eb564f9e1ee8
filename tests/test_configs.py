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

from lm import build, main, optim, sharding, startup
from lm import config as config_lib
from lm.data import pydocs, sources
from lm.evals import entries
from lm.models import presets
from tests import test_policy
from tests.helpers import run_training, with_conversations

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
    "awd_lstm": 33.55e6,
    "bert_base": 109.5e6,
    "bert_large": 335.2e6,
    "roberta_base": 124.7e6,
    "t5_small": 60.5e6,
    "t5_base": 222.9e6,
    "t5_large": 737.7e6,
    "t5_3b": 2.85e9,
    "t5_11b": 11.3e9,
    "t5_v1_1_small": 77e6,
    "t5_v1_1_base": 247.6e6,
    "t5_v1_1_large": 783e6,
    "t5_v1_1_xl": 2.85e9,
    "t5_v1_1_xxl": 11.1e9,
    "transformer_base": 63e6,
    "transformer_big": 213e6,
    "mixtral_8x7b": 46.7e9,
    "qwen3_30b_a3b": 30.5e9,
}


def sizes(path):
    """The arguments that a configuration takes, as tuples for its get_config.

    () is its default size. Besides, there are those in its SIZES, or all presets if it has none;
    nothing where get_config takes no argument.
    """
    module = runpy.run_path(str(path))
    parameters = inspect.signature(module["get_config"]).parameters
    # What some take is the path of a corpus.
    if not parameters or "path" in parameters:
        return [()]
    return [()] + [(size,) for size in module.get("SIZES", presets.PRESETS)]


def configurations():
    """A pytest parameter for each configuration and size."""
    parameters = []
    for path in CONFIGS:
        for size in sizes(path):
            parameters.append(pytest.param(path, size, id=":".join((path.stem, *size))))
    return parameters


def abstract_model(config, vocab_size):
    """(its Config, abstract parameters)."""
    model_config, make_model = build.make_model_fn(config, vocab_size, "tpu")
    model = nnx.eval_shape(lambda: make_model(jax.random.key(0)))
    _, params = nnx.split(model, nnx.Param)
    return model_config, params


def all_keys(config):
    return set(config_lib.flatten(config))


def test_there_are_configurations():
    assert CONFIGS


@pytest.mark.parametrize("path, size", configurations())
def test_every_configuration_builds(path, size):
    """All that needs no data: the model for the tokenizer and the rows, the optimizer, objective,
    source and length.
    """
    module = runpy.run_path(str(path))
    c = module["get_config"](*size).lock()
    doc = module["__doc__"]
    assert doc and "--config=configs/" in doc, "say what it is and how it is run"
    missing = all_keys(config_lib.default()) - all_keys(c)
    if c.objective.type != config_lib.Objective.type:
        missing = {key for key in missing if not key.startswith("objective.")}
    if c.model.type != config_lib.MODEL:
        missing = {key for key in missing if not key.startswith("model.")}
    assert missing <= {"data.source_args.data_dir"}

    # The model, the optimizer and the objective.
    vocab_size = 258 if c.tokenizer.kind == "bytes" else c.tokenizer.vocab_size
    _, abstract = abstract_model(c, vocab_size)
    batch_tokens = c.data.batch_size * c.data.length
    steps = config_lib.total_steps(
        c.train.length, batch_tokens=batch_tokens, steps_of_epochs=lambda epochs: 1000
    )
    optim.make_optimizer(c.optimizer, sharding.logical_axes(abstract), steps)
    build.make_objective(c)

    # The source would read its corpus, so only its arguments are checked.
    source = build.resolve(c.data.source, "config.data.source")
    inspect.signature(source).bind(c.data.split, **c.data.source_args)
    assert c.data.batch_size % c.data.streams == 0
    assert c.data.batch_size % c.train.accumulation == 0


@pytest.mark.parametrize("path, size", configurations())
def test_every_configuration_has_evals_that_take_their_arguments(path, size):
    c = runpy.run_path(str(path))["get_config"](*size).lock()
    for name, entry in c.evals.items():
        arguments = entry.to_dict()
        evaluator = build.resolve(arguments.pop("type"), f"config.evals.{name}.type")
        assert arguments.pop("every") >= 0
        assert arguments.pop("batch_size") > 0
        if "split" in arguments:
            arguments["documents"] = arguments.pop("split")
            for key in ("source", "source_args"):
                arguments.pop(key, None)
        inspect.signature(evaluator).bind(None, name=name, encoder=None, **arguments)
    if c.checkpoint.best:
        assert c.checkpoint.best.split("/")[1] in c.evals


@pytest.mark.parametrize("path", [p for p in CONFIGS if sizes(p) != [()]], ids=lambda p: p.stem)
def test_another_size_is_refused(path):
    with pytest.raises(ValueError, match=r"'gpt5'; valid: \["):
        runpy.run_path(str(path))["get_config"]("gpt5")


@pytest.mark.parametrize("name", ["text", "jsonl"])
def test_a_path_behind_the_colon(name):
    get_config = runpy.run_path(f"configs/{name}.py")["get_config"]
    assert get_config("gs://bucket/a b/*").data.source_args.path == "gs://bucket/a b/*"


def test_paths_in_a_task_file_are_relative_to_it(tmp_path, monkeypatch):
    """Wherever the command runs; those that the configuration gives are the command's."""
    (tmp_path / "tasks").mkdir()
    path = tmp_path / "tasks/mine.toml"
    text = """type = "lm.evals.generation.TextGeneration"
target = "{de}"
[source]
path = "../data/{split}.jsonl"
data_dir = "~/tfds"
lines = { en = "a.en", de = "/b.de", fr = "gs://c/d" }
"""
    path.write_text(text)
    monkeypatch.setenv("HOME", "/home/me")

    get_config = runpy.run_path("configs/tasks.py")["get_config"]
    entry = get_config(f"sst2,{path}").evals.mine
    changed = entries.task(str(path), source=dict(path="x.jsonl"))

    assert entry.source.path == f"{tmp_path}/tasks/../data/{{split}}.jsonl"
    assert entry.source.data_dir == "/home/me/tfds"
    lines = dict(en=f"{tmp_path}/tasks/a.en", de="/b.de", fr="gs://c/d")
    assert entry.source.lines.to_dict() == lines
    assert changed.source.path == "x.jsonl"

    # The file itself, from home.
    monkeypatch.setenv("HOME", str(tmp_path))
    assert entries.task("~/tasks/mine.toml").source.path == entry.source.path
    with pytest.raises(ValueError, match="two tasks of the name 'mine'"):
        get_config(f"{path},/other/mine.toml")
    path.write_text(text.replace('"a.en"', "1"))
    with pytest.raises(ValueError, match="lines.en = 1; wanted str"):
        entries.task(str(path))


@pytest.mark.parametrize("preset", sorted(presets.PRESETS))
def test_presets_have_their_published_sizes(preset):
    c = config_lib.default()
    fields = presets.get(preset)
    if "type" in fields:
        c.model = config_lib.model(**fields)
    c.model.update(fields)
    c.data.length = c.model.context_length
    model_config, abstract = abstract_model(c, 0)

    assert set(fields) < set(c.model.keys())
    assert model_config.vocab_size == fields["vocab_size"]
    if preset in PARAMETERS:
        count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.to_pure_dict(abstract)))
        tolerance = 0.015 if preset == "gpt3_175b" else 0.01
        assert count == pytest.approx(PARAMETERS[preset], rel=tolerance)


def test_resumable_keys_exist():
    """A misspelt one would forbid for ever what it should allow. Arguments of sources are those of
    any of them.
    """
    known = set()
    for source in (sources.text, sources.jsonl, sources.tfds, pydocs.pydocs):
        for name in inspect.signature(source).parameters:
            known.add(f"data.source_args.{name}")
    for key in config_lib.flatten(config_lib.default()):
        section, _, _ = key.rpartition(".")
        known |= {key, section}

    # The default configuration has no evals, so no key of theirs.
    assert set(config_lib.RESUMABLE) - {"evals"} <= known
    assert "evals" in config_lib.default()


# Sections whose reading is by to_dict: all of their keys go to a constructor.
READ_WHOLE = ("model", "mesh", "objective", "evals.", "data.source_args")


class ReadRecorder:
    """Records the keys of a configuration that are read.

    Copies of the whole configuration (for config.json) don't count.
    """

    def __init__(self, config):
        self.read = set()
        self._muted = False
        self._prefixes = {}  # id of a section -> "section.", the start of its keys' names
        self._add_section(config, "")

    def _add_section(self, section, prefix):
        self._prefixes[id(section)] = prefix
        for key in section:
            if isinstance(section[key], ConfigDict):
                self._add_section(section[key], f"{prefix}{key}.")

    def patch(self, monkeypatch):
        """Replaces the methods of ConfigDict that read."""
        getitem = ConfigDict.__getitem__
        to_dict = ConfigDict.to_dict
        items = ConfigDict.items

        def recording_getitem(section, key):
            value = getitem(section, key)
            is_leaf = not isinstance(value, ConfigDict)
            if id(section) in self._prefixes and is_leaf and not self._muted:
                self.read.add(self._prefixes[id(section)] + key)
            return value

        def recording_to_dict(section, *args, **kwargs):
            if self._prefixes.get(id(section), "").startswith(READ_WHOLE):
                return to_dict(section, *args, **kwargs)
            return self._mute(to_dict, section, *args, **kwargs)

        def muted_items(section, *args, **kwargs):
            return self._mute(items, section, *args, **kwargs)

        monkeypatch.setattr(ConfigDict, "__getitem__", recording_getitem)
        monkeypatch.setattr(ConfigDict, "to_dict", recording_to_dict)
        monkeypatch.setattr(ConfigDict, "items", muted_items)

    def _mute(self, method, *args, **kwargs):
        """Calls a method without recording what it reads."""
        muted_before = self._muted
        self._muted = True
        try:
            return method(*args, **kwargs)
        finally:
            self._muted = muted_before


@pytest.fixture
def quick_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run_command(config, workdir, patch):
    """Runs lm.main with this configuration on one device."""
    start = startup.start
    patch.setattr(startup, "start", lambda platform, processes: start(platform)[:1])
    patch.setattr(main, "_CONFIG", types.SimpleNamespace(value=config))
    flags = dict(
        _WORKDIR=str(workdir),
        _MODE="train",
        _PROFILE="",
        _COORDINATOR="",
        _COMPARE="",
        _STEPS="",
        _SHOW_PROMPTS=0,
        _NUM_PROCESSES=0,
        _PROCESS_ID=-1,
    )
    for flag, value in flags.items():
        patch.setattr(main, flag, types.SimpleNamespace(value=value))
    assert main.main(["lm.main"]) == 0


@pytest.mark.usefixtures("quick_compile")
def test_every_key_is_read(tiny, tmp_path, monkeypatch):
    """By a run of two steps with evals, as the command makes it; keys of other optimizers and of
    the other tokenizer, by building those.
    """
    c = tiny.copy_and_resolve_references().unlock()
    c.train.length = "2 steps"
    c.evals.text = entries.perplexity(every=1, batch_size=4)
    c.evals.samples = entries.samples(("ab", "cde f"), every=0, max_new_tokens=4)
    c.optimizer.warmup_steps = 0
    recorder = ReadRecorder(c)
    with monkeypatch.context() as patch:
        recorder.patch(patch)
        run_command(c, tmp_path / "run", patch)
    read = recorder.read

    for optimizer in ("muon", "adafactor"):
        other = tiny.copy_and_resolve_references()
        other.optimizer.name = optimizer
        other.train.fsdp = "by_hand"
        other.tokenizer.update(dict(kind="sentencepiece", vocab_size=280))
        recorder = ReadRecorder(other)
        with monkeypatch.context() as patch:
            recorder.patch(patch)
            build.build(other, jax.devices()[:1])
        read |= recorder.read

    mixed = tiny.copy_and_resolve_references().unlock()
    part = config_lib.part(tiny.data.source, **tiny.data.source_args)
    mixed.data.update(dict(source="", mixture=dict(part=part)))
    recorder = ReadRecorder(mixed)
    with monkeypatch.context() as patch:
        recorder.patch(patch)
        build.build(mixed, jax.devices()[:1])
    read |= recorder.read

    of_chat = with_conversations(tiny, tmp_path)
    recorder = ReadRecorder(of_chat)
    with monkeypatch.context() as patch:
        recorder.patch(patch)
        build.build(of_chat, jax.devices()[:1])
    read |= recorder.read

    for kind in ("grpo", "ppo"):
        of_rollouts = test_policy.configure(tiny, tmp_path, **test_policy.KINDS[kind])
        of_rollouts.train.length = "2 steps"
        recorder = ReadRecorder(of_rollouts)
        with monkeypatch.context() as patch:
            recorder.patch(patch)
            run_training(of_rollouts, tmp_path / kind)
        read |= recorder.read

    assert all_keys(config_lib.default()) - {"data.source_args.data_dir"} <= all_keys(c)
    unread = all_keys(c) - read
    assert not unread, f"no code reads {sorted(unread)}"
    # It did run, and evaluated after each step.
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert metrics.count("eval/text/loss") == 2
