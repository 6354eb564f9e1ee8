"""Scores, intervals and tests between models, against scikit-learn, SciPy and what they are meant
to say.
"""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from lm.evals.scores import statistics


@pytest.mark.parametrize(
    "right, n", [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (1, 3), (500, 1000), (999, 1000)]
)
def test_wilson(right, n):
    """The interval's ends are the proportions from which `right` is z standard errors away."""
    low, high = statistics.proportion_interval(right, n)

    assert -1e-12 <= low <= right / n <= high <= 1 + 1e-12
    z = stats.norm.ppf(0.975)
    for p in (low, high):
        variance = p * (1 - p) / n
        assert (right / n - p) ** 2 == pytest.approx(z**2 * variance, abs=1e-12)


def test_intervals_narrow():
    widths = []
    for n in (4, 40, 400):
        low, high = statistics.proportion_interval(n // 4, n)
        widths.append(high - low)

    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("seed", range(4))
def test_prediction_scores(seed):
    rng = np.random.default_rng(seed)
    num_labels = 3 + seed
    y = rng.integers(0, num_labels, 40)
    # In odd cases one label is never predicted.
    predicted = rng.integers(0, num_labels - seed % 2, 40)
    labels = range(num_labels)

    matrix = statistics.confusion(np.eye(num_labels)[predicted], y)
    scores = statistics.prediction_scores(matrix)

    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(y, predicted, labels=labels))
    for average in ("macro", "micro", "weighted"):
        wanted = metrics.f1_score(y, predicted, labels=labels, average=average, zero_division=0)
        assert scores[f"{average}_f1"] == pytest.approx(wanted)
    assert scores["micro_f1"] == pytest.approx(np.mean(y == predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = metrics.balanced_accuracy_score(y, predicted)
    assert scores["balanced_accuracy"] == pytest.approx(wanted)
    assert scores["mcc"] == pytest.approx(metrics.matthews_corrcoef(y, predicted))
    assert scores["kappa"] == pytest.approx(metrics.cohen_kappa_score(y, predicted))

    # The order of the labels doesn't matter.
    order = rng.permutation(num_labels)
    reordered = statistics.confusion(np.eye(num_labels)[order[predicted]], order[y])
    assert statistics.prediction_scores(reordered) == pytest.approx(scores)


@pytest.mark.parametrize("num_labels, macro_f1", [(2, 1.0), (4, 0.5)])
def test_labels_that_do_not_occur_count_as_0(num_labels, macro_f1):
    y = predicted = np.array([0, 0, 1])

    matrix = statistics.confusion(np.eye(num_labels)[predicted], y)

    assert statistics.prediction_scores(matrix)["macro_f1"] == macro_f1


@pytest.mark.parametrize(
    "predicted, wanted",
    [
        ([0] * 4, dict(balanced_accuracy=1, mcc=0, kappa=1, macro_f1=0.5)),
        ([1] * 4, dict(balanced_accuracy=0, mcc=0, kappa=0, macro_f1=0)),
        ([0, 0, 1, 1], dict(balanced_accuracy=0.5, kappa=0)),
    ],
    ids=["all right", "all wrong", "half"],
)
def test_one_label_only(predicted, wanted):
    """Scores are defined, and without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix = statistics.confusion(np.eye(2)[predicted], np.zeros(4, int))
        scores = statistics.prediction_scores(matrix)

    for name, value in wanted.items():
        assert scores[name] == value, name


def mean_of(values):
    """The mean as a score of a sample."""
    return lambda index: values[index].mean()


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = []
    for trial in range(200):
        right = rng.random(150) < 0.7
        low, high = statistics.bootstrap_interval(mean_of(right), 150, count=300, seed=trial)
        hits.append(low <= 0.7 <= high)

    # 95%, of 200 intervals that are approximate
    assert 0.9 < np.mean(hits) < 0.99


def test_standard_error():
    values = np.random.default_rng(0).normal(size=60)

    assert statistics.standard_error(values) == pytest.approx(stats.sem(values))
    assert np.isnan(statistics.standard_error([1.0]))


def test_ties_share_the_prediction():
    scores = np.array([[0.2, 0.4, 0.4], [0.5, 0.3, 0.2], [-3.0, -3.0, -3.0], [0.1 + 0.2, 0.3, 0.0]])
    y = np.array([1, 0, 2, 2])

    shares = statistics.prediction_shares(scores)
    # The last two scores differ by rounding alone.
    wanted = [[0, 1 / 2, 1 / 2], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2, 0]]
    np.testing.assert_array_equal(shares, wanted)
    assert statistics.credit(scores, y).tolist() == [1 / 2, 1, 1 / 3, 0]
    np.testing.assert_allclose(
        statistics.confusion(shares, y), [[1, 0, 0], [0, 1 / 2, 1 / 2], [5 / 6, 5 / 6, 1 / 3]]
    )


def test_mcnemar_of_ties_is_the_sign_test():
    first = np.array([0.5] * 9 + [1.0, 0.5])
    second = np.array([0.0] * 9 + [0.5, 0.5])
    assert statistics.mcnemar_p(first, second) == pytest.approx(2 * 0.5**10)


def test_mcnemar():
    # 12 right by both, 10 by the first alone, 3 by the second alone, 5 by neither
    first = np.array([1] * 12 + [1] * 10 + [0] * 3 + [0] * 5)
    second = np.array([1] * 12 + [0] * 10 + [1] * 3 + [0] * 5)

    p = statistics.mcnemar_p(first, second)

    assert p == pytest.approx(2 * stats.binom.cdf(3, 13, 0.5))
    assert statistics.mcnemar_p(second, first) == p
    assert statistics.mcnemar_p(first, first) == 1


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    difficulty = rng.random(400)
    # The first model is right on the same examples as the second, and some more.
    first = difficulty < 0.75
    second = difficulty < 0.70

    difference = statistics.paired_bootstrap(mean_of(first), mean_of(second), 400)
    swapped = statistics.paired_bootstrap(mean_of(second), mean_of(first), 400)
    same = statistics.paired_bootstrap(mean_of(first), mean_of(first), 400)

    assert difference.value == pytest.approx(np.mean(first) - np.mean(second))
    assert 0 < difference.low < difference.value < difference.high
    assert difference.p < 0.05
    assert swapped == pytest.approx(
        (-difference.value, -difference.high, -difference.low, difference.p)
    )
    assert same == (0, 0, 0, 1)


def test_holm():
    """The smallest times their number, the next times one less, never out of order."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, 0.9]) == [1, 1]
    assert statistics.holm([0.02]) == [0.02]
    assert statistics.holm([]) == []


def test_the_smallest_difference_is_found_as_often_as_it_says():
    rng = np.random.default_rng(0)
    error = 0.02

    # Estimates of a true difference of that size, and whether a test at 5% shows it.
    estimates = rng.normal(statistics.smallest_difference(error), error, 20_000)
    is_shown = np.abs(estimates) / error > stats.norm.ppf(0.975)

    assert is_shown.mean() == pytest.approx(0.8, abs=0.01)
