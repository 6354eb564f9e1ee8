"""Scores of label distributions, against scikit-learn and a plain loop."""

import math

import numpy as np
import pytest
from sklearn import metrics

from lm.evals.scores import calibration


def draw_examples(n, num_labels, seed):
    """(P, y) of labels that have nothing to do with the distributions."""
    rng = np.random.default_rng(seed)
    concentration = rng.choice([0.2, 1.0, 5.0])  # confident, uniform, or undecided
    P = rng.dirichlet(np.ones(num_labels) * concentration, n)
    return P, rng.integers(0, num_labels, n)


CASES = [
    draw_examples(1, 2, seed=0),
    draw_examples(50, 2, seed=1),
    draw_examples(200, 3, seed=2),
    draw_examples(100, 7, seed=3),
]


@pytest.mark.parametrize("P, y", CASES)
def test_nll_is_log_loss(P, y):
    wanted = metrics.log_loss(y, P, labels=range(P.shape[1]))
    assert calibration.nll(P, y) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("P, y", CASES)
def test_brier_is_the_squared_distance_to_one_hot(P, y):
    num_labels = P.shape[1]

    brier = calibration.brier(P, y)

    distance = metrics.mean_squared_error(np.eye(num_labels)[y], P)
    assert brier == pytest.approx(num_labels * distance, rel=1e-9)
    if num_labels == 2:  # twice the usual score of two labels
        usual = metrics.brier_score_loss(y, P[:, 1], pos_label=1)
        assert brier == pytest.approx(2 * usual, rel=1e-9)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("P, y", CASES)
def test_ece_is_the_loop_over_bins(P, y, bins):
    confidence = P.max(axis=1)
    right = P.argmax(axis=1) == y

    wanted = 0.0
    for b in range(bins):
        is_inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if is_inside.any():
            gap = abs(confidence[is_inside].mean() - right[is_inside].mean())
            wanted += is_inside.mean() * gap

    assert calibration.ece(P, y, bins) == pytest.approx(wanted, abs=1e-12)


def test_ece_at_the_edges():
    certain = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert calibration.ece(certain, np.array([0, 0, 1, 0])) == 0.0
    assert calibration.ece(certain, np.array([0, 0, 1, 1])) == pytest.approx(0.25)
    assert calibration.ece(certain, np.array([1, 1, 0, 1])) == 1.0

    # Confidence 0 has a bin too; of two labels that tie a prediction is half right.
    assert calibration.ece(np.zeros((3, 2)), np.array([0, 0, 0])) == 0.5

    # Half right at a confidence of a half: calibrated, though every single prediction is off.
    assert calibration.ece(np.full((10, 2), 0.5), np.arange(10) % 2) == 0.0


def test_ece_bins_hold_their_upper_edge():
    P = np.array([[0.4, 0.3, 0.3], [0.5, 0.25, 0.25]])
    y = np.array([0, 1])

    # Both lie in (0, 1/2], one is right.
    assert calibration.ece(P, y, bins=2) == pytest.approx(abs(0.4 + 0.5 - 1) / 2)
    # One lies in (0.3, 0.4], the other in (0.4, 0.5].
    assert calibration.ece(P, y, bins=10) == pytest.approx((0.6 + 0.5) / 2)


def test_perfect_and_worst():
    P = np.eye(3)
    right = np.arange(3)
    wrong = (right + 1) % 3

    assert calibration.nll(P, right) == 0
    assert calibration.brier(P, right) == 0
    assert calibration.brier(P, wrong) == 2
    # The logarithm of 0 is that of the smallest number instead.
    assert 600 < calibration.nll(P, wrong) < math.inf


def test_uniform():
    P = np.full((8, 4), 0.25)
    y = np.arange(8) % 4

    assert calibration.nll(P, y) == pytest.approx(math.log(4))
    assert calibration.brier(P, y) == pytest.approx(0.75)


def test_bins_of_equal_mass():
    """They hold as many examples each, in order; the error is computed as with equal width."""
    P, y = draw_examples(50, 3, seed=7)
    confidence = P.max(axis=1)
    right = P.argmax(axis=1) == y

    wanted = 0.0
    for group in np.array_split(np.argsort(confidence), 7):
        wanted += len(group) / 50 * abs(confidence[group].mean() - right[group].mean())

    assert calibration.ece(P, y, 7, "mass") == pytest.approx(wanted)
    assert calibration.ece(P[:3], y[:3], 7, "mass") >= 0  # fewer examples than bins
    with pytest.raises(ValueError, match=r"bins of equal 'size'; valid: \['width', 'mass'\]"):
        calibration.ece(P, y, 7, "size")


def test_classwise_ece_is_the_mean_over_labels():
    P, y = draw_examples(200, 2, seed=3)

    errors = []
    for label in range(2):
        p = P[:, label]
        right = y == label
        error = 0.0
        for b in range(10):
            is_inside = (p > b / 10) & (p <= (b + 1) / 10)
            error += abs(p[is_inside].sum() - right[is_inside].sum()) / 200
        errors.append(error)

    assert calibration.classwise_ece(P, y, 10) == pytest.approx(np.mean(errors))


@pytest.mark.parametrize("P, y", CASES[1:])
def test_auroc(P, y):
    labels = range(P.shape[1])
    # scikit-learn wants the second label's probability where there are two.
    if P.shape[1] == 2:
        one_vs_rest = one_vs_one = metrics.roc_auc_score(y, P[:, 1])
    else:
        one_vs_rest = metrics.roc_auc_score(y, P, multi_class="ovr", labels=labels)
        one_vs_one = metrics.roc_auc_score(y, P, multi_class="ovo", labels=labels)

    assert calibration.auroc(P, y) == pytest.approx(one_vs_rest)
    assert calibration.auroc_ovo(P, y) == pytest.approx(one_vs_one)


@pytest.mark.parametrize("P, y", CASES[1:])
def test_confidence_auroc(P, y):
    wanted = metrics.roc_auc_score(P.argmax(axis=1) == y, P.max(axis=1))
    assert calibration.confidence_auroc(P, y) == pytest.approx(wanted)


def test_auroc_needs_two_labels_or_right_and_wrong_predictions():
    P = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    one_label = np.array([0, 0])
    both_right = np.array([0, 1])

    assert calibration.auroc(P, one_label) is None
    assert calibration.auroc_ovo(P, one_label) is None
    assert calibration.confidence_auroc(P, one_label) == 1.0
    assert calibration.auroc(P, both_right) == 1.0
    assert calibration.confidence_auroc(P, both_right) is None


def test_selective_accuracy():
    P = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.2, 0.8]])
    y = np.array([0, 1, 1, 1])

    coverage, accuracy = calibration.selective_accuracy(P, y)
    _, accuracy_backwards = calibration.selective_accuracy(P[::-1], y[::-1])

    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    # Of the two at 0.8 one is right: each counts as a half, in any order.
    np.testing.assert_allclose(accuracy, [1, 1.5 / 2, 2 / 3, 2 / 4])
    np.testing.assert_allclose(accuracy_backwards, accuracy)


def test_temperature_undoes_a_temperature():
    # Labels drawn from the model's own distributions: it is calibrated, at a temperature of 1.
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4000, 3))
    y = np.array([rng.choice(3, p=p) for p in calibration.softmax(scores)])

    assert calibration.best_temperature(2.5 * scores, y) == pytest.approx(2.5, rel=0.1)

    best = calibration.best_temperature(scores, y)
    lowest = calibration.nll(calibration.softmax(scores / best), y)
    for other in (0.5, 0.9, 1.1, 2):
        assert lowest <= calibration.nll(calibration.softmax(scores / other), y)


def test_a_prior_is_divided_out():
    """Gone is a bias that is in all distributions, or the distribution itself."""
    P, _ = draw_examples(300, 3, seed=2)
    prior = np.array([0.6, 0.3, 0.1])
    biased = P * prior / (P * prior).sum(axis=1, keepdims=True)
    uniform = np.full((1, 3), 1 / 3)

    np.testing.assert_allclose(calibration.divide_by_prior(biased, prior), P, atol=1e-12)
    np.testing.assert_allclose(calibration.divide_by_prior(biased, 7 * prior), P, atol=1e-12)
    np.testing.assert_allclose(calibration.divide_by_prior(P[:1], P[0]), uniform)


def test_the_prior_of_a_batch_is_its_mean():
    prior = np.array([0.6, 0.3, 0.1])
    P = np.tile(prior, (5, 1))

    corrected = calibration.divide_by_prior(P, calibration.batch_prior(P))

    np.testing.assert_allclose(corrected, np.full((5, 3), 1 / 3))


def test_probabilities_of_0_are_corrected_too():
    corrected = calibration.divide_by_prior(np.eye(3), np.array([0.0, 0.5, 0.5]))
    assert np.isfinite(corrected).all()


def test_confidence_of_ties_is_a_weighted_area():
    """An example whose labels tie is right by half, and wrong by half."""
    P = np.random.default_rng(0).integers(1, 4, (60, 2)) / 1.0
    P /= P.sum(axis=1, keepdims=True)
    y = np.random.default_rng(1).integers(0, 2, 60)
    tied = P[:, 0] == P[:, 1]
    assert 10 < tied.sum() < 50

    right = np.where(tied, 0.5, P.argmax(axis=1) == y)
    confidence = np.tile(P.max(axis=1), 2)
    wanted = metrics.roc_auc_score(
        np.repeat([1, 0], 60), confidence, sample_weight=np.concatenate([right, 1 - right])
    )
    assert calibration.confidence_auroc(P, y) == pytest.approx(wanted)
    accuracy = calibration.selective_accuracy(P, y)[1]
    assert accuracy[-1] == pytest.approx(right.mean())
