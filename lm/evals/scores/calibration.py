"""Scores of label distributions, and corrections of distributions.

P is [n, K], one distribution over K labels for each example, whose rows sum to 1; y is [n], the
index of the right label. Where labels tie for the highest probability, a prediction is right by a
share of 1 (`statistics.credit`).
"""

import numpy as np

from lm.evals.scores import statistics

BINS = ("width", "mass")
TINY = np.finfo(np.float64).tiny  # where a logarithm of 0 would be taken


def nll(P: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log-likelihood of the right label, in nats."""
    right_probs = P[np.arange(len(y)), y]
    return float(-np.mean(np.log(np.maximum(right_probs, TINY))))


def brier(P: np.ndarray, y: np.ndarray) -> float:
    """Mean over examples of sum_k (p_k - 1[y = k])^2 (Brier 1950). It lies between 0 and 2, and is
    twice the usual figure for two labels.
    """
    one_hot = np.eye(P.shape[1])[y]
    return float(np.mean(np.sum(np.square(P - one_hot), axis=1)))


def bin_numbers(confidence: np.ndarray, bins: int, equal: str) -> np.ndarray:
    """[n], the bin of each value.

    Args:
      equal: "width": bin b is (b / bins, (b + 1) / bins]; "mass": the values in order are cut into
        groups whose sizes differ by at most one.

    Raises:
      ValueError: another `equal`.
    """
    if equal not in BINS:
        raise ValueError(f"bins of equal {equal!r}; valid: {list(BINS)}")
    if equal == "width":
        # The upper edge belongs to a bin; 0 is put into the first one.
        return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)

    numbers = np.empty(len(confidence), int)
    groups = np.array_split(np.argsort(confidence, kind="stable"), bins)
    for number, group in enumerate(groups):
        numbers[group] = number
    return numbers


def _calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int, equal: str) -> float:
    """Sum over bins of (share of the examples) * |mean confidence - share that is right|."""
    numbers = bin_numbers(confidence, bins, equal)
    # The bin's size cancels: the sums of confidence - right are all that is needed.
    differences = np.bincount(numbers, confidence - right, bins)
    return float(np.sum(np.abs(differences)) / len(right))


def ece(P: np.ndarray, y: np.ndarray, bins: int = 15, equal: str = "width") -> float:
    """Expected calibration error of the predicted label (Guo et al. 2017, arXiv 1706.04599, eq. 3);
    with equal="mass" in bins of as many examples each (Nixon et al. 2019, arXiv 1904.01685).
    """
    return _calibration_error(P.max(axis=1), statistics.credit(P, y), bins, equal)


def classwise_ece(P: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    """Mean over labels of the calibration error of that label's probability, in bins of equal width
    (Kull et al. 2019, arXiv 1910.12656, eq. 3).
    """
    errors = [_calibration_error(P[:, k], y == k, bins, "width") for k in range(P.shape[1])]
    return float(np.mean(errors))


def auroc(P: np.ndarray, y: np.ndarray) -> float | None:
    """Area under the ROC curve of each label against the rest: the mean over the labels that occur
    and aren't all. None if there is no such label.
    """
    areas = []
    for k in range(P.shape[1]):
        is_k = y == k
        if is_k.any() and not is_k.all():
            areas.append(_area_under_roc(P[:, k], is_k))
    return float(np.mean(areas)) if areas else None


def auroc_ovo(P: np.ndarray, y: np.ndarray) -> float | None:
    """Area under the ROC curve of each label against each other one (Hand and Till 2001, eq. 7).

    For each ordered pair of labels that occur, the area is computed from the first label's
    probability on the examples of these two labels alone; the result is the mean over pairs. Unlike
    `auroc` it doesn't depend on how frequent labels are. None for a single label.
    """
    labels = np.unique(y)
    areas = []
    for k in labels:
        for other in labels:
            if k != other:
                either = (y == k) | (y == other)
                areas.append(_area_under_roc(P[either, k], y[either] == k))
    return float(np.mean(areas)) if areas else None


def confidence_auroc(P: np.ndarray, y: np.ndarray) -> float | None:
    """How well confidence tells right predictions from wrong ones, as an area under the ROC curve.
    None if all are right, or none.
    """
    right = statistics.credit(P, y)
    if right.min() == 1 or right.max() == 0:
        return None
    return _area_under_roc(P.max(axis=1), right)


def _area_under_roc(values: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive example has a higher value than a negative one, ties counting
    half, which is the area under the ROC curve (Hanley and McNeil 1982).

    Args:
      positive: [n], how far each example is positive, 0 to 1.
    """
    _, value = np.unique(values, return_inverse=True)
    positives = np.bincount(value, positive)
    negatives = np.bincount(value, 1.0 - positive)
    negatives_below = np.cumsum(negatives) - negatives
    pairs_above = np.sum(positives * (negatives_below + negatives / 2))
    return float(pairs_above / (positives.sum() * negatives.sum()))


def selective_accuracy(P: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coverage [n], accuracy [n]) of answering only the examples with the highest confidence
    (El-Yaniv and Wiener 2010).
    """
    confidence = P.max(axis=1)
    right = statistics.credit(P, y)

    # Examples of equal confidence have no order: each counts as their mean.
    _, tie_group = np.unique(-confidence, return_inverse=True)
    mean_right = np.bincount(tie_group, right) / np.bincount(tie_group)
    right_by_confidence = mean_right[np.sort(tie_group)]

    num_answered = np.arange(1, len(y) + 1)
    return num_answered / len(y), np.cumsum(right_by_confidence) / num_answered


def softmax(scores: np.ndarray) -> np.ndarray:
    """[n, K] distributions from label scores."""
    from scipy import special

    return special.softmax(scores, axis=1)


def best_temperature(scores: np.ndarray, y: np.ndarray) -> float:
    """The T for which softmax(scores / T) has the lowest NLL (Guo et al. 2017, section 4.2).

    It changes no prediction. Fit it on other examples than those that it is judged by.
    """
    from scipy.optimize import minimize_scalar

    def nll_at(log_temperature: float) -> float:
        return nll(softmax(scores / np.exp(log_temperature)), y)

    result = minimize_scalar(nll_at, bounds=(-5.0, 5.0), method="bounded", options=dict(xatol=1e-8))
    return float(np.exp(result.x))


def divide_by_prior(P: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Corrects distributions by a prior [K]: P / prior, normalised. What is left is what the prompt
    adds.

    The prior decides the method: the distribution after content-free prompts (contextual
    calibration, Zhao et al. 2021, arXiv 2102.09690, section 5, without its redundant bias), after
    random words of the domain (domain-context calibration, Fei et al. 2023, arXiv 2305.19148, eq.
    5), or after the domain premise alone (PMI_DC, Holtzman et al. 2021, arXiv 2104.08315, section
    3).
    """
    odds = np.exp(np.log(np.maximum(P, TINY)) - np.log(np.maximum(prior, TINY)))
    return odds / odds.sum(axis=1, keepdims=True)


def batch_prior(P: np.ndarray) -> np.ndarray:
    """The mean distribution [K], the prior of batch calibration (Zhou et al. 2023, arXiv
    2309.17249, eq. 3). It looks at the test inputs, and takes labels to be equally frequent.
    """
    return P.mean(axis=0)
