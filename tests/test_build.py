"""From a configuration to objects: what can't work is a ValueError that names the key, before
anything is computed or written.
"""

import math
import sys

import jax
import numpy as np
import pytest
from etils import epath

from lm import build
from lm import config as config_lib
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from lm.evals import entries, perplexity
from tests.helpers import VERBALIZER


def changed(config, overrides):
    """A copy of `config` with {"a.b": value} in it, keys that were not there among them."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for key, value in overrides.items():
            *path, last = key.split(".")
            section = config
            for name in path:
                section = section[name]
            section[last] = value
    return config


def verbalizer(**changes):
    """An entry of config.evals with a word for each colour, or other words, or none."""
    words = VERBALIZER | changes
    words = {label: label_words for label, label_words in words.items() if label_words is not None}
    return entries.classification(words, every=0)


# Overrides, on how many devices, and what the error must say.
BAD = [
    # The mesh and the batch.
    ({"mesh.data": 3}, 1, "this asks for.*there are 1"),
    ({"mesh.data": 16}, 8, "this asks for 16.*there are 8"),
    ({"mesh.data": 4}, 8, "this asks for.*there are 8"),
    ({"mesh.data": -1, "mesh.fsdp": -1}, 8, "at most one of them -1"),
    ({"mesh.data": 0}, 1, "config.mesh.data = 0; wanted 1 to 1048576, or -1"),
    (
        {"mesh.data": 8, "data.batch_size": 12},
        8,
        r"config.data.batch_size = 12 rows can't be divided by 8.*multiple of 8",
    ),
    (
        {"mesh.data": 4, "mesh.sequence": 2, "data.length": 31},
        8,
        "config.data.length = 31 can't be divided by 2",
    ),
    (
        {"train.accumulation": 3},
        1,
        "config.train.accumulation = 3 must divide config.data.batch_size = 8",
    ),
    ({"train.accumulation": 0}, 1, "config.train.accumulation = 0"),
    (
        {"mesh.data": 8, "train.accumulation": 2},
        8,
        "config.data.batch_size / config.train.accumulation = 4 rows",
    ),
    ({"data.streams": 3}, 1, "config.data.streams = 3 must divide config.data.batch_size = 8"),
    ({"data.streams": 64, "data.batch_size": 64}, 1, "config.data.streams = 64.*only 48 documents"),
    ({"data.streams": 0}, 1, "config.data.streams"),
    ({"data.streams": -2}, 1, "config.data.streams"),
    ({"data.batch_size": 0}, 1, "config.data.batch_size"),
    ({"data.length": 0}, 1, "config.data.length"),
    ({"data.packing_bins": 0}, 1, "config.data.packing_bins"),
    ({"data.packing": "best_fit"}, 1, "config.data.packing = 'best_fit'; valid.*concat_then_split"),
    # The corpus.
    ({"data.source_args.path": "/none/such.jsonl"}, 1, "no file at /none/such.jsonl"),
    ({"data.source_args.path": ""}, 1, "no path given"),
    ({"data.split": "test"}, 1, "split 'test'"),
    (
        {"data.source": "lm.data.sources.parquet"},
        1,
        "config.data.source = 'lm.data.sources.parquet' can't be imported",
    ),
    ({"data.source": "lm.none.text"}, 1, "config.data.source = 'lm.none.text'"),
    ({"data.source": "text"}, 1, "config.data.source = 'text'.*dotted path"),
    ({"data.source": ""}, 1, "config.data.source = ''"),
    # The other source's arguments are still there.
    ({"data.source": "lm.data.sources.text"}, 1, "config.data.source_args|label_key"),
    # A module, not a function.
    ({"data.source": "lm.data.sources"}, 1, "config.data.source"),
    # The tokenizer.
    (
        {"tokenizer.kind": "words"},
        1,
        r"config.tokenizer.kind = 'words'; valid: \['bytes', 'sentencepiece'\]",
    ),
    (
        {"tokenizer.kind": "sentencepiece", "tokenizer.vocab_size": 5000},
        1,
        "config.tokenizer.vocab_size = 5000",
    ),
    ({"tokenizer.kind": "sentencepiece", "tokenizer.path": "/none"}, 1, "no tokenizer at /none"),
    # The model.
    (
        {"model.vocab_size": 257},
        1,
        "config.model.vocab_size = 257 is below the tokenizer's 258; 0 takes",
    ),
    ({"data.length": 64}, 1, "config.data.length = 64 is above config.model.context_length = 32"),
    ({"model.norm": "batchnorm"}, 1, "config.model.norm = 'batchnorm'; valid"),
    ({"model.num_kv_heads": 3}, 1, "multiple of config.model.num_kv_heads = 3"),
    ({"model.num_layers": 0}, 1, "config.model.num_layers = 0; wanted 1 to 4096"),
    ({"model.param_dtype": "float16"}, 1, "config.model.param_dtype = 'float16'; valid"),
    ({"model.param_dtype": "half-ish"}, 1, "config.model.param_dtype = 'half-ish'"),
    ({"model.type": "lm.models.rnn"}, 1, "config.model.type = 'lm.models.rnn'"),
    (
        {"mesh.data": 2, "mesh.tensor": 4, "model.vocab_size": 260},
        8,
        "kv_heads.* of 2 is not divisible by 4",
    ),
    # The optimizer and the run.
    ({"optimizer.name": "sgdw"}, 1, "config.optimizer.name = 'sgdw'; valid.*adamw"),
    ({"optimizer.schedule": "step"}, 1, "config.optimizer.schedule = 'step'; valid.*cosine"),
    (
        {"optimizer.schedule": "wsd", "optimizer.decay_steps": 5},
        1,
        "config.optimizer.decay_steps = 5.*between 1 and 4",
    ),
    (
        {"optimizer.warmup_steps": 6},
        1,
        "config.optimizer.warmup_steps = 6 must be below the run's 6 steps",
    ),
    ({"optimizer.rounding": "up"}, 1, "config.optimizer.rounding = 'up'; valid.*stochastic"),
    ({"objective.type": "lm.objectives.none"}, 1, "config.objective.type = 'lm.objectives.none'"),
    ({"train.nonfinite": "ignore"}, 1, "config.train.nonfinite = 'ignore'; valid.*skip"),
    ({"train.length": "6 step"}, 1, "config.train.length = '6 step'"),
    # The evaluators.
    ({"evals.x": entries.perplexity(every=0, split="test")}, 1, "split 'test'"),
    (
        {"mesh.data": 8, "evals.x": entries.perplexity(every=0, batch_size=12)},
        8,
        "config.evals.x.batch_size = 12 rows can't be divided by 8",
    ),
    (
        {"evals.x": dict(type="lm.evals.none.Evaluator", every=0, batch_size=8)},
        1,
        "config.evals.x.type = 'lm.evals.none.Evaluator'",
    ),
    (
        {"evals.x": verbalizer(green=(" red",))},
        1,
        "' red' of 'red' and ' red' of 'green' are the same tokens",
    ),
    ({"evals.x": verbalizer(blue=None)}, 1, "blue"),
    ({"evals.x": verbalizer(), "data.label_prompt": ""}, 1, "config.data.label_prompt"),
]


def short_id(value):
    return str(value)[:50]


@pytest.mark.parametrize("overrides, devices, message", BAD, ids=short_id)
def test_bad_input(tiny, tmp_path, overrides, devices, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        experiment = build.build(changed(tiny, overrides), jax.devices()[:devices])
        experiment.make_evaluators()
        experiment.make_loader()
    # Nothing was written.
    assert sorted(tmp_path.rglob("*")) == before


def test_empty_corpus(tiny, tmp_path):
    (tmp_path / "corpus.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="corpus.jsonl has no documents"):
        build.build(tiny, jax.devices()[:1])


# How long a run is.


def three_steps_an_epoch(epochs):
    return math.ceil(3 * epochs)


@pytest.mark.parametrize(
    "length, steps",
    [
        ("6 steps", 6),
        ("1_000 steps", 1000),
        ("1,000 steps", 1000),
        ("1e3 steps", 1000),
        ("0.5 steps", 1),
        ("1 steps", 1),
        ("1000 tokens", 4),
        ("1024 tokens", 4),
        ("1025 tokens", 5),
        ("1 tokens", 1),
        ("2.5e3 tokens", 10),
        ("1 epochs", 3),
        ("0.5 epochs", 2),
    ],
)
def test_total_steps(length, steps):
    got = config_lib.total_steps(length, batch_tokens=256, steps_of_epochs=three_steps_an_epoch)
    assert got == steps


def test_total_steps_of_tokens_is_exact():
    """Whole numbers of batches take that many steps, whatever 1 / batch_tokens is in binary."""
    for batch in range(1, 400, 2):
        for steps in range(1, 40):
            length = f"{steps * batch} tokens"
            got = config_lib.total_steps(length, batch_tokens=batch, steps_of_epochs=None)
            assert got == steps, (length, batch)


@pytest.mark.parametrize(
    "length",
    [
        "",
        "6",
        "steps",
        " steps",
        "6steps",
        "six steps",
        "0 steps",
        "-1 steps",
        "nan steps",
        "inf steps",
        "6 Steps",
        "6 steps ",
        "1 epoch",
        "2 batches",
    ],
)
def test_length_that_is_none(length):
    message = 'config.train.length = .*"N steps", "N tokens" or "X epochs"'
    with pytest.raises(ValueError, match=message):
        config_lib.total_steps(length, batch_tokens=256, steps_of_epochs=three_steps_an_epoch)


@pytest.mark.parametrize("packing", ["first_fit", "concat_then_split"])
def test_an_epoch_is_every_document_once(tiny, one_device, packing):
    """Each target counts once, and the run ends with the last of them."""
    config = changed(tiny, {"train.length": "1 epochs", "data.packing": packing})
    experiment = build.build(config, one_device)

    # Targets of a document are its bytes, its label's with the prompt, and the end.
    num_targets = 0
    for document in experiment.train_documents:
        num_targets += len(document.text.encode()) + len(f"\n= {document.label}") + 1
    loader = experiment.make_loader()
    counts = []
    for _ in range(experiment.total_steps + 1):
        batch, _ = loader.next(None)
        counts.append(float(batch["weights"].sum()))
    assert sum(counts) == num_targets
    assert all(counts[:-1]) and not counts[-1]
    assert loader.epochs_begun() == 1
    loader.close()


# What is built.


def test_evals_count_no_epochs(tiny, one_device):
    """There are no training documents then, and the run may be of epochs."""
    experiment = build.build(
        changed(tiny, {"train.length": "2 epochs"}), one_device, training=False
    )
    assert experiment.train_documents is None


def test_build_computes_and_writes_nothing(tiny, tmp_path, one_device):
    before = sorted(tmp_path.rglob("*"))
    experiment = build.build(tiny, one_device)

    # Shapes only.
    leaves = jax.tree.leaves(experiment.program.abstract_state)
    assert leaves
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sorted(tmp_path.rglob("*")) == before


def test_resolve(tmp_path, monkeypatch):
    """Someone's own file plugs in by its dotted path."""
    (tmp_path / "my_plugin.py").write_text("def source(split):\n    return split * 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build.resolve("my_plugin.source", "x")("a") == "aa"
    assert build.resolve("my_plugin", "x") is sys.modules["my_plugin"]
    assert build.resolve("lm.evals.perplexity.Perplexity", "x") is perplexity.Perplexity

    with pytest.raises(ValueError, match="config.x = 'my_plugin.none' can't be imported"):
        build.resolve("my_plugin.none", "config.x")


def no_corpus():
    raise AssertionError("the corpus was read")


def test_bytes_need_no_corpus(tiny):
    assert isinstance(build.make_tokenizer(tiny, no_corpus), ByteTokenizer)


def test_trained_tokenizers_are_cached(tiny, tmp_path):
    text = "the quick brown fox jumps\nover the lazy dog " * 3
    corpus = Documents([Document(text, "n", "red")] * 5, "abc")
    cache = tmp_path / "cache" / "tokenizers"

    def train_tokenizer(**overrides):
        base = {"tokenizer.kind": "sentencepiece", "tokenizer.vocab_size": 300}
        return build.make_tokenizer(changed(tiny, base | overrides), lambda: corpus)

    trained = train_tokenizer()
    assert isinstance(trained, SentencePieceTokenizer)
    assert trained.vocab_size == 300
    assert trained.fingerprint == train_tokenizer().fingerprint
    assert len(list(cache.glob("*.model"))) == 1

    # A label prompt is part of what it is trained on, so another prompt is another tokenizer; so is
    # another size.
    others = [
        train_tokenizer(**{"data.label_prompt": ""}),
        train_tokenizer(**{"data.label_prompt": "\n?"}),
        train_tokenizer(**{"tokenizer.vocab_size": 310}),
    ]
    assert len({t.fingerprint for t in [trained, *others]}) == 4
    assert len(list(cache.glob("*.model"))) == 4

    # A given model is loaded; it needs no corpus.
    saved = tmp_path / "saved"
    saved.mkdir()
    trained.save(epath.Path(saved))
    given = changed(tiny, {"tokenizer.kind": "sentencepiece", "tokenizer.path": str(saved)})
    assert build.make_tokenizer(given, no_corpus).fingerprint == trained.fingerprint


def test_a_trained_tokenizer_reserves_roles(tiny, tmp_path, one_device, monkeypatch):
    """Behind its own ids, so that one that reserves more has the same ids, out of the same file."""
    overrides = {"tokenizer.kind": "sentencepiece", "tokenizer.vocab_size": 280}
    sizes = {"": 280, "mask": 281, "mask,sentinels:5": 286}
    for reserve, size in sizes.items():
        config = changed(tiny, overrides | {"tokenizer.reserve": reserve})
        experiment = build.build(config, one_device)
        assert experiment.tokenizer.vocab_size == size
        assert experiment.program.model_config.vocab_size == size
        assert experiment.tokenizer.encode("red\n") == [*experiment.tokenizer.encode("red"), 3]
    assert experiment.tokenizer.role("mask") == 280
    assert len(list((tmp_path / "cache/tokenizers").glob("*.model"))) == 1

    # A given one too.
    experiment.tokenizer.save(epath.Path(tmp_path))
    given = {"tokenizer.path": str(tmp_path), "tokenizer.reserve": "mask,turns"}
    assert build.make_tokenizer(changed(tiny, given), no_corpus).role_ids("turns") == (286, 287)
    # A slip is said before the corpus is read.
    monkeypatch.setattr(build, "documents", None)
    with pytest.raises(ValueError, match="config.tokenizer.reserve = 'masc': .*valid"):
        build.build(changed(tiny, overrides | {"tokenizer.reserve": "masc"}), one_device)


def test_a_long_label_prompt(tiny):
    """Longer than a file name may be: the trained tokenizer has to be kept under some name of it
    all the same.
    """
    prompt = (
        "\nWhich of these colours is the text above about? Answer with one word, red, green or "
        "blue, and with nothing else at all. Colour:"
    )
    overrides = {
        "tokenizer.kind": "sentencepiece",
        "tokenizer.vocab_size": 300,
        "data.label_prompt": prompt,
    }
    config = changed(tiny, overrides)
    assert build.make_tokenizer(config, lambda: build.documents(config, "train")).vocab_size == 300


@pytest.mark.parametrize("max_documents", [0, 1, 4, 7, 9, 10, 100])
def test_the_tokenizer_is_trained_on_so_many_documents(tiny, monkeypatch, max_documents):
    corpus = Documents([Document(f"text {i}", "n", "") for i in range(10)], "abc")

    def return_texts(texts, size, cache):
        return list(texts)

    monkeypatch.setattr(build.tokenizers, "train_sentencepiece", return_texts)
    overrides = {"tokenizer.kind": "sentencepiece", "tokenizer.max_documents": max_documents}
    texts = build.make_tokenizer(changed(tiny, overrides), lambda: corpus)
    assert len(texts) == len(set(texts)) == min(max_documents or 10, 10)

    # Evenly out of all of it.
    numbers = [int(text.split()[1]) for text in texts]
    assert numbers[0] == 0
    assert max(np.diff([*numbers, 10])) <= math.ceil(10 / len(texts))


def test_evaluators_are_given_what_they_ask_for(tiny, one_device):
    overrides = {
        "evals.a": entries.perplexity(every=0, batch_size=4),
        "evals.b": verbalizer(),
        "evals.c": entries.samples(("ab",), every=0, max_new_tokens=4),
        "evals.d": entries.perplexity(every=0, split="train", max_documents=3),
    }
    evaluators = build.build(changed(tiny, overrides), one_device).make_evaluators()
    assert list(evaluators) == ["a", "b", "c", "d"]
    assert evaluators["a"].about["examples"] == 16
    assert evaluators["d"].about["examples"] == 3


def test_batches_come_from_the_training_split(tiny, one_device):
    experiment = build.build(tiny, one_device)
    # A state for each of the 4 streams.
    loader = experiment.make_loader()
    batch, _ = loader.next(None)
    assert batch["tokens"].shape == (8, 32)
    assert loader.state().keys() == {"0", "1", "2", "3"}
    loader.close()

    # The first segment of the first row is a part of some document.
    targets, segments = np.asarray(batch["targets"][0]), np.asarray(batch["segments"][0])
    first = experiment.tokenizer.decode(targets[segments == 1])
    texts = []
    for document in experiment.train_documents:
        texts.append(experiment.tokenizer.decode(experiment.encoder.training(document)))
    assert any(first in text for text in texts)
