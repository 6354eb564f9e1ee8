"""The stage in which a model of this project judges texts: by label words, or by its states."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from lm import files, generate, train
from lm.data import sources
from lm.decoding.sampling import Sampling
from lm.prepare import config as prepare_config
from lm.prepare import pipeline, quality

GOOD = [f"red green blue {i}" for i in range(24)]
BAD = [f"zzz qqq {i} xxx" for i in range(24)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def model(small, run, fast_runs):
    """A run of a few steps."""
    if not (run / "config.json").exists():
        small.train.length = "4 steps"
        small.checkpoint.every = 4
        small.evals = {}
        train.train(small, epath.Path(run), jax.devices()[:1])
    return str(run)


def settings(model, **changes):
    return prepare_config.default().quality.to_dict() | dict(model=model) | changes


def test_a_score_is_the_share_of_the_good_words(model):
    """The same by the log-probabilities of whole texts."""
    scorer = quality.Scorer(settings(model, prompt=":", good=("a", "bc"), bad=("d",)))
    generator, tokenizer = generate.load(epath.Path(model), jax.devices()[:1], Sampling())
    del generator
    scores = scorer(GOOD[:3])
    for text, score in zip(GOOD[:3], scores):
        ids = [tokenizer.bos_id, *tokenizer.encode(text + ":")]
        odds = {}
        for word in ("a", "bc", "d"):
            row = np.zeros((1, 128), np.int32)
            whole = [*ids, *tokenizer.encode(word)]
            row[0, : len(whole)] = whole
            logits = model_logits(model, row)
            logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            places = range(len(ids) - 1, len(whole) - 1)
            odds[word] = np.exp(sum(logprobs[i, whole[i + 1]] for i in places))
        wanted = (odds["a"] + odds["bc"]) / sum(odds.values())
        np.testing.assert_allclose(score, wanted, rtol=2e-3)


def model_logits(path, row):
    """The logits of a row by the model itself, f64 [T, V]."""
    from flax import nnx

    model, params, _ = generate.load_run(epath.Path(path), jax.devices()[:1], None)
    length = min(row.shape[1], model.model_config.context_length)
    tokens = row[:, :length]
    positions = np.arange(length, dtype=np.int32)[None]
    merged = nnx.merge(model.graphdef, params)
    with jax.set_mesh(model.mesh):
        hidden = merged(tokens, positions, np.ones_like(tokens)).hidden
        return np.asarray(merged.logits(hidden), np.float64)[0]


def test_a_classifier_tells_texts_apart(model, tmp_path):
    fitted = quality.fit(model, GOOD, BAD, max_tokens=32)
    assert fitted["held_out_accuracy"] > 0.9
    (tmp_path / "quality.json").write_text(json.dumps(fitted))

    lines = [json.dumps({"text": text}) + "\n" for text in [*GOOD, *BAD]]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    c = prepare_config.default()
    c.workers = 1
    c.sources.texts = prepare_config.source("jsonl", str(tmp_path / "texts.jsonl"))
    c.stages = ("collect", "quality", "write")
    c.splits.validation = 0.0
    c.quality.update(settings(model, classifier=str(tmp_path / "quality.json"), max_tokens=32))
    folder = pipeline.prepare(c, epath.Path(tmp_path / "out"))
    kept = [document.text for document in sources.corpus("train", path=str(folder))]
    assert kept == GOOD
    card = files.read_json(folder / "card.json")
    assert card["summary"]["dropped"] == {"quality": len(BAD)}

    # A classifier belongs to the model whose states it was fitted on.
    (tmp_path / "quality.json").write_text(json.dumps(fitted | {"model": "another"}))
    with pytest.raises(ValueError, match="fitted on the states of another"):
        pipeline.stages_of(c)


def test_models_that_are_none(tmp_path):
    c = prepare_config.default()
    c.quality.model = str(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint"):
        quality.stages(c)
