"""Intervals and scores, against scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from lm.evals import statistics


@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (1, 3), (500, 1000), (999, 1000)])
def test_wilson(right, n):
    low, high = statistics.wilson(right, n)
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert -1e-12 <= low <= right / n <= high <= 1 + 1e-12
    # Its ends are the proportions from which `right` is z standard errors away.
    z = stats.norm.ppf(0.995)
    for p in statistics.wilson(right, n, z):
        assert (right / n - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, abs=1e-12)


def test_wilson_narrows():
    widths = [high - low for low, high in (statistics.wilson(n // 4, n) for n in (4, 40, 400))]
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("seed", range(4))
def test_confusion_and_f1(seed):
    rng = np.random.default_rng(seed)
    k = 3 + seed
    y, predicted = rng.integers(0, k, 40), rng.integers(0, k - seed % 2, 40)  # in odd cases one label is never predicted
    matrix = statistics.confusion(predicted, y, k)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(y, predicted, labels=range(k)))
    assert statistics.macro_f1(matrix) == pytest.approx(metrics.f1_score(y, predicted, labels=range(k), average="macro", zero_division=0))


def test_f1_counts_labels_that_do_not_occur():
    y = predicted = np.array([0, 0, 1])
    assert statistics.macro_f1(statistics.confusion(predicted, y, 2)) == 1.0
    assert statistics.macro_f1(statistics.confusion(predicted, y, 4)) == 0.5
    assert metrics.f1_score(y, predicted, labels=range(4), average="macro", zero_division=0) == 0.5
