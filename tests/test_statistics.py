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
    low, high = statistics.proportion_interval(right, n)
    assert -1e-12 <= low <= right / n <= high <= 1 + 1e-12
    # Its ends are the proportions from which `right` is z standard errors away.
    z = stats.norm.ppf(0.975)
    for p in (low, high):
        assert (right / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=1e-12)
    wider = statistics.proportion_interval(right, n, "exact")
    assert wider[0] <= low + 0.05 and wider[1] >= high - 0.05 and wider != (low, high)


def test_intervals_narrow():
    widths = [
        high - low
        for low, high in (statistics.proportion_interval(n // 4, n) for n in (4, 40, 400))
    ]
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("seed", range(4))
def test_prediction_scores(seed):
    rng = np.random.default_rng(seed)
    k = 3 + seed
    # in odd cases one label is never predicted
    y, predicted = rng.integers(0, k, 40), rng.integers(0, k - seed % 2, 40)
    matrix = statistics.confusion(predicted, y, k)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(y, predicted, labels=range(k)))
    found = statistics.prediction_scores(matrix)
    for name, average in (
        ("macro_f1", "macro"),
        ("micro_f1", "micro"),
        ("weighted_f1", "weighted"),
    ):
        assert found[name] == pytest.approx(
            metrics.f1_score(y, predicted, labels=range(k), average=average, zero_division=0)
        )
    assert found["micro_f1"] == pytest.approx(np.mean(y == predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["balanced_accuracy"] == pytest.approx(
            metrics.balanced_accuracy_score(y, predicted)
        )
    assert found["mcc"] == pytest.approx(metrics.matthews_corrcoef(y, predicted))
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(y, predicted))
    # Another order of the labels is the same, but for nothing.
    order = rng.permutation(k)
    assert statistics.prediction_scores(
        statistics.confusion(order[predicted], order[y], k)
    ) == pytest.approx(found)


def test_labels_that_do_not_occur():
    y = predicted = np.array([0, 0, 1])
    assert statistics.prediction_scores(statistics.confusion(predicted, y, 2))["macro_f1"] == 1.0
    assert statistics.prediction_scores(statistics.confusion(predicted, y, 4))["macro_f1"] == 0.5


def test_one_label_only():
    """Defined, and without a warning: all right, all wrong, half."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right, wrong, half = (
            statistics.prediction_scores(statistics.confusion(np.array(p), np.zeros(4, int), 2))
            for p in ([0] * 4, [1] * 4, [0, 0, 1, 1])
        )
    assert (right["balanced_accuracy"], right["mcc"], right["kappa"], right["macro_f1"]) == (
        1,
        0,
        1,
        0.5,
    )
    assert (wrong["balanced_accuracy"], wrong["mcc"], wrong["kappa"], wrong["macro_f1"]) == (
        0,
        0,
        0,
        0,
    )
    assert half["balanced_accuracy"] == 0.5 and half["kappa"] == 0


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = []
    for trial in range(200):
        right = rng.random(150) < 0.7
        low, high = statistics.bootstrap_interval(
            lambda index: right[index].mean(),  # noqa: B023
            150,
            count=300,
            seed=trial,
        )
        held.append(low <= 0.7 <= high)
    assert 0.9 < np.mean(held) < 0.99


def test_standard_error():
    values = np.random.default_rng(0).normal(size=60)
    assert statistics.standard_error(values) == pytest.approx(stats.sem(values))
    alone = statistics.standard_error(values, clusters=range(60))
    assert alone == pytest.approx(stats.sem(values))
    assert np.isnan(statistics.standard_error([1.0])) and np.isnan(
        statistics.standard_error([1.0], clusters=[0])
    )
    assert statistics.standard_error([0, 1, 1, 0, 1], clusters=[0, 0, 1, 1, 2]) == pytest.approx(
        (0.06 + 2 * (-0.24 - 0.24) / 25) ** 0.5
    )
    fivefold = np.repeat(values, 5)
    assert statistics.standard_error(fivefold) < 0.5 * statistics.standard_error(
        fivefold, clusters=np.repeat(np.arange(60), 5)
    )
    assert statistics.standard_error(
        fivefold, clusters=np.repeat(np.arange(60), 5)
    ) == pytest.approx(alone, rel=0.02)


def test_mcnemar():
    first, second = (
        np.array([1] * 12 + [1] * 10 + [0] * 3 + [0] * 5),
        np.array([1] * 12 + [0] * 10 + [1] * 3 + [0] * 5),
    )
    found = statistics.mcnemar(first, second)
    assert (found.only_first, found.only_second) == (10, 3)
    assert found.p == pytest.approx(sum(stats.binom.pmf(k, 13, 0.5) for k in (0, 1, 2, 3)) * 2)
    assert found.chi2 == pytest.approx(36 / 13) and found.chi2_p == pytest.approx(
        stats.chi2.sf(36 / 13, 1)
    )
    assert statistics.mcnemar(second, first).p == found.p
    assert statistics.mcnemar(first, first) == (0, 0, 1.0, 0.0, 1.0)


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    first, second = hard < 0.75, hard < 0.70  # right on the same ones, and some more
    score = lambda right: lambda index: right[index].mean()
    found = statistics.paired_bootstrap(score(first), score(second), 400)
    assert (
        found.value == pytest.approx(np.mean(first) - np.mean(second))
        and 0 < found.low < found.value < found.high
        and found.p < 0.05
    )
    back = statistics.paired_bootstrap(score(second), score(first), 400)
    assert (back.value, back.low, back.high, back.p) == pytest.approx(
        (-found.value, -found.high, -found.low, found.p)
    )
    assert statistics.paired_bootstrap(score(first), score(first), 400) == (0, 0, 0, 1)


def test_holm():
    """The smallest times their number, the next times one less, never out of order."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert (
        statistics.holm([0.5, 0.9]) == [1, 1]
        and statistics.holm([0.02]) == [0.02]
        and statistics.holm([]) == []
    )


def test_the_smallest_difference_is_found_as_often_as_it_says():
    rng, error = np.random.default_rng(0), 0.02
    shown = np.abs(
        rng.normal(statistics.smallest_difference(error), error, 20_000)
    ) / error > stats.norm.ppf(0.975)
    assert shown.mean() == pytest.approx(0.8, abs=0.01)
