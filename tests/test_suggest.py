"""Candidates for label words."""

import jax
import numpy as np
import pytest
from etils import epath

from lm import suggest, train
from lm.evals import entries
from tests.helpers import LABELS, write_task


def log_odds(p):
    return np.log(p) - np.log(1 - p)


def test_likelihood_ratio():
    """The formula of PETAL, written again with loops."""
    p = np.random.default_rng(0).dirichlet(np.ones(6), 10)
    gold = np.array([0, 1] * 3 + [1] * 4)
    scores = suggest.likelihood_ratio(np.log(p), gold, 2)

    for k in range(2):
        positive, negative = p[gold == k], p[gold != k]
        for v in range(6):
            expected = 0.0
            for probability in positive[:, v]:
                expected += log_odds(probability) * len(negative) / len(positive)
            for probability in negative[:, v]:
                expected -= log_odds(probability)
            assert scores[k, v] == pytest.approx(expected)


def test_only_likely_words_are_considered():
    p = np.random.default_rng(0).dirichlet(np.ones(6), 10)
    gold = np.array([0, 1] * 3 + [1] * 4)
    scores = suggest.likelihood_ratio(np.log(p), gold, 2)
    likely_scores = suggest.likelihood_ratio(np.log(p), gold, 2, num_likely=2)

    for k in range(2):
        likeliest = np.argsort(-np.log(p[gold == k]).sum(axis=0))[:2]
        considered = np.flatnonzero(np.isfinite(likely_scores[k]))
        assert set(considered) == set(likeliest)
        np.testing.assert_array_equal(likely_scores[k, likeliest], scores[k, likeliest])


def test_nearest():
    rows = np.array([[1.0, 0], [0, 2], [3, 3], [-1, 0]])
    cosines = suggest.nearest(rows, [[0], [0, 1]])

    # The second label's words have the mean direction (1, 1).
    half = 2**-0.5
    np.testing.assert_allclose(cosines, [[1, 0, half, -1], [half, half, 1, -half]])


class PieceTokenizer:
    """A tokenizer whose ids are the indices of given pieces."""

    def __init__(self, pieces):
        self.pieces = pieces

    def encode(self, text):
        return [self.pieces.index(text)]

    def decode(self, ids):
        return "".join([self.pieces[i] for i in ids])


def test_candidates_are_whole_words():
    tokenizer = PieceTokenizer(["a", " cat", "cat", " c3", " é", " éa", " ", " x y"])
    assert suggest.candidates(tokenizer, 8) == {1: " cat", 5: " éa"}


@pytest.fixture(name="config")
def _config(tiny, tmp_path):
    """A run on documents that end with the names of colours, and a task that asks for them."""
    c = tiny.copy_and_resolve_references().unlock()
    # Label words have to be single tokens, and the model has to learn them.
    c.tokenizer.kind = "sentencepiece"
    c.tokenizer.vocab_size = 300
    c.data.label_prompt = "\n="
    c.train.length = "250 steps"
    c.optimizer.learning_rate = 1e-2
    c.data.length = c.model.context_length = 64

    # What is asked about comes from the split "corpus", the training data.
    (tmp_path / "test.jsonl").write_text('{"text": "ab", "label": "red"}\n' * 2)
    c.evals.t = entries.task(write_task(tmp_path / "t.toml", r"{text}\n=", shots_split="corpus"))
    c.evals.rest = entries.perplexity(every=0, batch_size=8)
    return c.lock()


@pytest.mark.slow
@pytest.mark.usefixtures("fast_runs")
def test_the_words_that_were_trained_are_suggested(config, tmp_path):
    run = epath.Path(tmp_path / "run")
    devices = jax.devices()[:1]
    train.train(config, run, devices)

    suggestions = suggest.suggest(config, run, devices, "t", 48, 3)
    assert list(suggestions) == list(LABELS)
    for label, words_by_method in suggestions.items():
        assert list(words_by_method) == ["likelihood ratio", "nearest"]
        for words in words_by_method.values():
            assert len(words) == 3
            assert words[0] == f" {label}", suggestions

    with pytest.raises(ValueError, match=r"--eval=rest: wanted one of \['t'\]"):
        suggest.suggest(config, run, devices, "rest", 48, 3)
    with pytest.raises(ValueError, match="^--examples = 1000, but there are 64 examples"):
        suggest.suggest(config, run, devices, "t", 1000, 3)
