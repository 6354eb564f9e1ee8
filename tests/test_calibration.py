"""Scores of label distributions, against scikit-learn and a plain loop."""

import math

import numpy as np
import pytest
from sklearn import metrics

from lm.evals.scores import calibration


def examples(n, k, seed):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(k) * rng.choice([0.2, 1.0, 5.0]), n), rng.integers(0, k, n)


CASES = [examples(n, k, seed) for seed, (n, k) in enumerate([(1, 2), (50, 2), (200, 3), (100, 7)])]


@pytest.mark.parametrize("P, y", CASES)
def test_nll_is_log_loss(P, y):
    assert calibration.nll(P, y) == pytest.approx(
        metrics.log_loss(y, P, labels=range(P.shape[1])), rel=1e-6
    )


@pytest.mark.parametrize("P, y", CASES)
def test_brier_is_the_squared_distance_to_one_hot(P, y):
    assert calibration.brier(P, y) == pytest.approx(
        P.shape[1] * metrics.mean_squared_error(np.eye(P.shape[1])[y], P), rel=1e-9
    )
    if P.shape[1] == 2:  # twice the usual score of two labels
        assert calibration.brier(P, y) == pytest.approx(
            2 * metrics.brier_score_loss(y, P[:, 1], pos_label=1), rel=1e-9
        )


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("P, y", CASES)
def test_ece_is_the_loop_over_bins(P, y, bins):
    total = 0.0
    for b in range(bins):
        inside = [
            (max(p), p.argmax() == label)
            for p, label in zip(P, y)
            if (max(p) > b / bins or b == 0) and max(p) <= (b + 1) / bins
        ]
        if inside:
            confidence, right = np.mean(inside, axis=0)
            total += len(inside) / len(y) * abs(confidence - right)
    assert calibration.ece(P, y, bins) == pytest.approx(total, abs=1e-12)


def test_ece_at_the_edges():
    sure = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert calibration.ece(sure, np.array([0, 0, 1, 0])) == 0.0
    assert calibration.ece(sure, np.array([0, 0, 1, 1])) == pytest.approx(0.25)
    assert calibration.ece(sure, np.array([1, 1, 0, 1])) == 1.0
    # confidence 0 has a bin too
    assert calibration.ece(np.zeros((3, 2)), np.array([0, 0, 0])) == 1.0
    # Half right at a confidence of a half: calibrated, though every single prediction is off.
    assert calibration.ece(np.full((10, 2), 0.5), np.arange(10) % 2) == 0.0


def test_ece_bins_hold_their_upper_edge():
    P, y = np.array([[0.4, 0.3, 0.3], [0.5, 0.25, 0.25]]), np.array([0, 1])
    # both lie in (0, 1/2]
    assert calibration.ece(P, y, bins=2) == pytest.approx(abs(0.4 + 0.5 - 1) / 2)
    assert calibration.ece(P, y, bins=10) == pytest.approx((0.6 + 0.5) / 2)


def test_perfect_and_worst():
    P, y = np.eye(3), np.arange(3)
    assert calibration.nll(P, y) == 0 and calibration.brier(P, y) == 0
    assert (
        calibration.brier(P, (y + 1) % 3) == 2 and 600 < calibration.nll(P, (y + 1) % 3) < math.inf
    )


def test_uniform():
    P, y = np.full((8, 4), 0.25), np.arange(8) % 4
    assert calibration.nll(P, y) == pytest.approx(math.log(4)) and calibration.brier(
        P, y
    ) == pytest.approx(0.75)


def test_bins_of_equal_mass():
    """As many examples in each, in order; then as before."""
    P, y = examples(50, 3, 7)
    confidence, right = P.max(axis=1), P.argmax(axis=1) == y
    groups = np.array_split(np.argsort(confidence), 7)
    wanted = sum(len(g) * abs(confidence[g].mean() - right[g].mean()) for g in groups) / 50
    assert calibration.ece(P, y, 7, "mass") == pytest.approx(wanted)
    assert calibration.ece(P[:3], y[:3], 7, "mass") >= 0  # fewer than bins
    with pytest.raises(ValueError, match=r"bins of equal 'size'; valid: \['width', 'mass'\]"):
        calibration.ece(P, y, 7, "size")


def test_classwise_ece_of_two_labels_is_the_second_ones():
    P, y = examples(200, 2, 3)
    of = lambda p, right: (
        sum(
            abs(
                p[(p > b / 10) & (p <= (b + 1) / 10)].sum()
                - right[(p > b / 10) & (p <= (b + 1) / 10)].sum()
            )
            for b in range(10)
        )
        / 200
    )
    assert calibration.classwise_ece(P, y, 10) == pytest.approx(
        (of(P[:, 0], y == 0) + of(P[:, 1], y == 1)) / 2
    )


@pytest.mark.parametrize("P, y", CASES[1:])
def test_auroc(P, y):
    theirs = metrics.roc_auc_score(
        y, P[:, 1] if P.shape[1] == 2 else P, multi_class="ovr", labels=range(P.shape[1])
    )
    assert calibration.auroc(P, y) == pytest.approx(theirs)
    pairs = (
        theirs
        if P.shape[1] == 2
        else metrics.roc_auc_score(y, P, multi_class="ovo", labels=range(P.shape[1]))
    )
    assert calibration.auroc_ovo(P, y) == pytest.approx(pairs)
    assert calibration.confidence_auroc(P, y) == pytest.approx(
        metrics.roc_auc_score(P.argmax(axis=1) == y, P.max(axis=1))
    )


def test_auroc_of_what_has_one_label_only():
    P = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    assert (
        calibration.auroc(P, np.array([0, 0])) is calibration.auroc_ovo(P, np.array([0, 0])) is None
    )
    assert calibration.confidence_auroc(P, np.array([0, 1])) is None
    assert (
        calibration.auroc(P, np.array([0, 1])) == 1.0
        and calibration.confidence_auroc(P, np.array([0, 0])) == 1.0
    )


def test_selective_accuracy():
    P, y = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.2, 0.8]]), np.array([0, 1, 1, 1])
    coverage, accuracy = calibration.selective_accuracy(P, y)
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    # of the two at 0.8, one is right
    np.testing.assert_allclose(accuracy, [1, 1.5 / 2, 2 / 3, 2 / 4])
    shuffled = calibration.selective_accuracy(P[::-1], y[::-1])
    np.testing.assert_allclose(shuffled[1], accuracy)


def test_temperature_undoes_a_temperature():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4000, 3))
    y = np.array([rng.choice(3, p=p) for p in calibration.softmax(scores)])
    assert calibration.best_temperature(2.5 * scores, y) == pytest.approx(2.5, rel=0.1)
    best = calibration.best_temperature(scores, y)
    assert all(
        calibration.nll(calibration.softmax(scores / best), y)
        <= calibration.nll(calibration.softmax(scores / t), y)
        for t in (0.5, 0.9, 1.1, 2)
    )


def test_priors():
    """What is divided out is gone: a bias planted in all distributions, or the distribution
    itself.
    """
    P, _ = examples(300, 3, 2)
    prior = np.array([0.6, 0.3, 0.1])
    biased = P * prior / (P * prior).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(calibration.divided(biased, prior), P, atol=1e-12)
    np.testing.assert_allclose(calibration.divided(biased, 7 * prior), P, atol=1e-12)
    np.testing.assert_allclose(calibration.divided(P[:1], P[0]), np.full((1, 3), 1 / 3))
    one = np.tile(prior, (5, 1))
    np.testing.assert_allclose(
        calibration.divided(one, calibration.batch_prior(one)), np.full((5, 3), 1 / 3)
    )
    assert np.isfinite(calibration.divided(np.eye(3), np.array([0.0, 0.5, 0.5]))).all()
