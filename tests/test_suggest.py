"""Candidates for label words."""

import jax
import numpy as np
import pytest
from etils import epath

from lm import suggest, train
from lm.evals import entries
from tests.conftest import COLOURS
from tests.test_tasks import write_task


def test_likelihood_ratio():
    """By the formula of PETAL, told again with loops; words that are likely everywhere, or nowhere,
    are none.
    """
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6), 10)
    gold = np.array([0, 1] * 3 + [1] * 4)
    found = suggest.likelihood_ratio(np.log(p), gold, 2)
    for k in range(2):
        positive, negative = p[gold == k], p[gold != k]
        for v in range(6):
            odds = lambda x: np.log(x) - np.log(1 - x)
            wanted = len(negative) / len(positive) * sum(odds(x[v]) for x in positive) - sum(
                odds(x[v]) for x in negative
            )
            assert found[k, v] == pytest.approx(wanted)
    few = suggest.likelihood_ratio(np.log(p), gold, 2, most=2)
    for k in range(2):
        likeliest = np.argsort(-np.log(p[gold == k]).sum(axis=0))[:2]
        assert (
            set(np.flatnonzero(np.isfinite(few[k]))) == set(likeliest)
            and (few[k, likeliest] == found[k, likeliest]).all()
        )


def test_nearest():
    rows = np.array([[1.0, 0], [0, 2], [3, 3], [-1, 0]])
    found = suggest.nearest(rows, [[0], [0, 1]])
    np.testing.assert_allclose(found, [[1, 0, 2**-0.5, -1], [2**-0.5, 2**-0.5, 1, -(2**-0.5)]])


class Words:
    def __init__(self, pieces):
        self.pieces = pieces

    def encode(self, text):
        return [self.pieces.index(text)]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def test_candidates_are_whole_words():
    assert suggest.candidates(Words(["a", " cat", "cat", " c3", " é", " éa", " ", " x y"]), 8) == [
        1,
        5,
    ]


@pytest.fixture(name="trained")
def _trained(tiny, tmp_path):
    c = tiny.copy_and_resolve_references().unlock()
    c.tokenizer.kind, c.tokenizer.vocab_size, c.data.label_prompt = "sentencepiece", 300, "\n="
    c.train.length = "150 steps"
    c.optimizer.learning_rate = 1e-2
    c.data.length = c.model.context_length = 64
    (tmp_path / "test.jsonl").write_text('{"text": "ab", "label": "red"}\n' * 2)
    c.evals.t = entries.task(write_task(tmp_path / "t.toml", r"{text}\n=", shots_split="corpus"))
    c.evals.rest = entries.perplexity(every=0, batch_size=8)
    return c.lock(), tmp_path / "run"


def test_the_words_that_were_trained_are_suggested(trained):
    config, run = trained
    train.train(config, epath.Path(run), jax.devices()[:1])
    found = suggest.suggest(config, epath.Path(run), jax.devices()[:1], "t", 48, 3)
    assert list(found) == list(COLOURS) and all(
        len(words) == 3 for kinds in found.values() for words in kinds.values()
    )
    assert all(
        kinds["likelihood ratio"][0] == kinds["nearest"][0] == f" {label}"
        for label, kinds in found.items()
    ), found
    with pytest.raises(ValueError, match=r"--eval=rest: wanted one of \['t'\]"):
        suggest.suggest(config, epath.Path(run), jax.devices()[:1], "rest", 48, 3)
    with pytest.raises(
        ValueError, match="config.evals.t.temperature_examples = 1000, but there are 64 examples"
    ):
        suggest.suggest(config, epath.Path(run), jax.devices()[:1], "t", 1000, 3)
