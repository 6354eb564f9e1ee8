"""Scores of label distributions, against scikit-learn and a plain loop."""

import math

import numpy as np
import pytest
from sklearn import metrics

from lm.evals import calibration


def examples(n, k, seed):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(k) * rng.choice([0.2, 1.0, 5.0]), n), rng.integers(0, k, n)


CASES = [examples(n, k, seed) for seed, (n, k) in enumerate([(1, 2), (50, 2), (200, 3), (100, 7)])]


@pytest.mark.parametrize("P, y", CASES)
def test_nll_is_log_loss(P, y):
    assert calibration.nll(P, y) == pytest.approx(metrics.log_loss(y, P, labels=range(P.shape[1])), rel=1e-6)


@pytest.mark.parametrize("P, y", CASES)
def test_brier_is_the_squared_distance_to_one_hot(P, y):
    assert calibration.brier(P, y) == pytest.approx(P.shape[1] * metrics.mean_squared_error(np.eye(P.shape[1])[y], P), rel=1e-9)
    if P.shape[1] == 2:  # twice the usual score of two labels
        assert calibration.brier(P, y) == pytest.approx(2 * metrics.brier_score_loss(y, P[:, 1], pos_label=1), rel=1e-9)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("P, y", CASES)
def test_ece_is_the_loop_over_bins(P, y, bins):
    total = 0.0
    for b in range(bins):
        inside = [(max(p), p.argmax() == label) for p, label in zip(P, y) if (max(p) > b / bins or b == 0) and max(p) <= (b + 1) / bins]
        if inside:
            confidence, right = np.mean(inside, axis=0)
            total += len(inside) / len(y) * abs(confidence - right)
    assert calibration.ece(P, y, bins) == pytest.approx(total, abs=1e-12)


def test_ece_at_the_edges():
    sure = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert calibration.ece(sure, np.array([0, 0, 1, 0])) == 0.0
    assert calibration.ece(sure, np.array([0, 0, 1, 1])) == pytest.approx(0.25)
    assert calibration.ece(sure, np.array([1, 1, 0, 1])) == 1.0
    assert calibration.ece(np.zeros((3, 2)), np.array([0, 0, 0])) == 1.0  # confidence 0 has a bin too
    # Half right at a confidence of a half: calibrated, though every single prediction is off.
    assert calibration.ece(np.full((10, 2), 0.5), np.arange(10) % 2) == 0.0


def test_ece_bins_hold_their_upper_edge():
    P, y = np.array([[0.4, 0.3, 0.3], [0.5, 0.25, 0.25]]), np.array([0, 1])
    assert calibration.ece(P, y, bins=2) == pytest.approx(abs(0.4 + 0.5 - 1) / 2)  # both lie in (0, 1/2]
    assert calibration.ece(P, y, bins=10) == pytest.approx((0.6 + 0.5) / 2)


def test_perfect_and_worst():
    P, y = np.eye(3), np.arange(3)
    assert calibration.nll(P, y) == 0 and calibration.brier(P, y) == 0
    assert calibration.brier(P, (y + 1) % 3) == 2 and 600 < calibration.nll(P, (y + 1) % 3) < math.inf


def test_uniform():
    P, y = np.full((8, 4), 0.25), np.arange(8) % 4
    assert calibration.nll(P, y) == pytest.approx(math.log(4)) and calibration.brier(P, y) == pytest.approx(0.75)
