"""Scores of words and labels out of the log-probabilities of tokens."""

import numpy as np
import pytest
from scipy.special import logsumexp

from lm.evals.scores import calibration, label_scores
from lm.evals.scores.label_scores import LabelScorer, LabelWord

RNG = np.random.default_rng(0)
WORDS = [
    LabelWord(0, "red"),
    LabelWord(0, "dark red"),
    LabelWord(1, " green"),
    LabelWord(2, "blé"),
]
NUM_TOKENS = (1, 3, 2, 2)
# For each of six prompts, the log-probabilities of each word's tokens.
TOKEN_LOGPROBS = []
for _ in range(6):
    TOKEN_LOGPROBS.append([-RNG.random(n) * 5 for n in NUM_TOKENS])
LOGPROBS = label_scores.pad_word_logprobs(TOKEN_LOGPROBS, WORDS)
SUMS = np.array([list(map(np.sum, row)) for row in TOKEN_LOGPROBS])


# Characters and bytes don't count the space before a word.
@pytest.mark.parametrize(
    "length_norm, sizes",
    [
        ("none", [1, 1, 1, 1]),
        ("token", NUM_TOKENS),
        ("char", [3, 8, 5, 3]),
        ("byte", [3, 8, 5, 4]),
    ],
)
def test_word_scores(length_norm, sizes):
    scores = label_scores.word_scores(LOGPROBS, length_norm)
    np.testing.assert_allclose(scores, SUMS / sizes)


def test_label_mass():
    np.testing.assert_allclose(label_scores.label_mass(LOGPROBS), np.exp(SUMS).sum(axis=1))


def test_unknown_norm():
    with pytest.raises(
        ValueError, match=r"length_norm = 'line'; valid: \['none', 'token', 'char', 'byte'\]"
    ):
        label_scores.word_scores(LOGPROBS, "line")


@pytest.mark.parametrize(
    "aggregate, first_label",
    [
        ("sum", np.log(np.exp(SUMS[:, :2]).sum(axis=1))),
        ("mean", SUMS[:, :2].mean(axis=1)),
        ("max", SUMS[:, :2].max(axis=1)),
        ("logmeanexp", np.log(np.exp(SUMS[:, :2]).mean(axis=1))),
    ],
)
def test_label_scores(aggregate, first_label):
    """The first label has two words; the score of a single word is its label's."""
    scores = label_scores.label_scores(SUMS, LOGPROBS.labels, aggregate)
    np.testing.assert_allclose(scores, np.stack([first_label, SUMS[:, 2], SUMS[:, 3]], axis=1))


def test_word_weights():
    word_weights = np.array([0.5, 2.0, 1.0, 1.0])
    unweighted = label_scores.label_scores(SUMS, LOGPROBS.labels)

    weighted = label_scores.label_scores(SUMS, LOGPROBS.labels, word_weights=word_weights)
    # A weight multiplies the probability of its word.
    expected = logsumexp(SUMS[:, :2], axis=1, b=word_weights[:2])
    np.testing.assert_allclose(weighted[:, 0], expected)
    np.testing.assert_allclose(weighted[:, 1:], unweighted[:, 1:])

    equal = label_scores.label_scores(SUMS, LOGPROBS.labels, word_weights=np.ones(4))
    np.testing.assert_allclose(equal, unweighted)


def test_permuting_the_labels_permutes_the_scores():
    scores = label_scores.label_scores(SUMS, LOGPROBS.labels)
    # The first label is now the last one.
    permuted = label_scores.label_scores(SUMS, np.array([2, 2, 0, 1]))
    np.testing.assert_allclose(permuted, scores[:, [1, 2, 0]])


def test_unknown_aggregate():
    with pytest.raises(
        ValueError, match=r"aggregate = 'first'; valid: \['sum', 'mean', 'max', 'logmeanexp'\]"
    ):
        label_scores.label_scores(SUMS, LOGPROBS.labels, "first")


@pytest.mark.parametrize(
    "aggregate, word_weights",
    [
        ("max", [0.5, 2.0, 1.0, 1.0]),
        ("sum", [0.5, 2.0]),
        ("sum", [-0.5, -2.0, -1.0, -1.0]),
    ],
)
def test_word_weights_that_do_not_fit(aggregate, word_weights):
    with pytest.raises(ValueError, match="wanted a positive one for each of 4 words"):
        label_scores.label_scores(SUMS, LOGPROBS.labels, aggregate, np.array(word_weights))


def test_scorer_takes_all_options():
    word_weights = np.array([0.5, 2.0, 1.0, 1.0])
    scorer = LabelScorer(length_norm="byte", word_weights=word_weights)

    words = label_scores.word_scores(LOGPROBS, "byte")
    scores = label_scores.label_scores(words, LOGPROBS.labels, "sum", word_weights)
    np.testing.assert_array_equal(scorer.distributions(LOGPROBS), calibration.softmax(scores))
