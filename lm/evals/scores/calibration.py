"""Scores of label distributions, and corrections of them. P is [n, K], rows sum to 1; y is [n], the
right label's index.
"""

import numpy as np

TINY = np.finfo(np.float64).tiny


def nll(P: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log-likelihood of the right label, in nats."""
    return float(-np.mean(np.log(np.maximum(P[np.arange(len(y)), y], TINY))))


def brier(P: np.ndarray, y: np.ndarray) -> float:
    """Mean over examples of sum_k (p_k - 1[y = k])^2 (Brier 1950): 0 to 2, twice the usual figure
    for two labels.
    """
    return float(np.mean(np.sum(np.square(P - np.eye(P.shape[1])[y]), axis=1)))


BINS = ("width", "mass")


def bin_numbers(confidence: np.ndarray, bins: int, equal: str) -> np.ndarray:
    """[n], the bin of each value: "width", bin b is (b / bins, (b + 1) / bins]; "mass", the values
    in order, in groups whose sizes differ by at most one.
    """
    if equal not in BINS:
        raise ValueError(f"bins of equal {equal!r}; valid: {list(BINS)}")
    if equal == "width":
        return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    numbers = np.empty(len(confidence), int)
    for number, group in enumerate(np.array_split(np.argsort(confidence, kind="stable"), bins)):
        numbers[group] = number
    return numbers


def _gap(confidence, right, bins, equal) -> float:
    numbers = bin_numbers(confidence, bins, equal)
    return float(np.sum(np.abs(np.bincount(numbers, confidence - right, bins))) / len(right))


def ece(P: np.ndarray, y: np.ndarray, bins: int = 15, equal: str = "width") -> float:
    """Expected calibration error of the predicted label (Guo et al. 2017, arXiv 1706.04599, eq. 3);
    equal="mass": bins with as many examples each (Nixon et al. 2019, arXiv 1904.01685).
    """
    return _gap(P.max(axis=1), P.argmax(axis=1) == y, bins, equal)


def classwise_ece(P: np.ndarray, y: np.ndarray, bins: int = 15, equal: str = "width") -> float:
    """Mean over labels of the calibration error of that label's probability (Kull et al. 2019,
    arXiv 1910.12656, eq. 3).
    """
    return float(np.mean([_gap(P[:, k], y == k, bins, equal) for k in range(P.shape[1])]))


def auroc(P: np.ndarray, y: np.ndarray) -> float | None:
    """Area under the ROC curve, each label against the rest, the mean over the labels that occur
    and aren't all; None if there is none.
    """
    found = [
        _ranked_higher(P[y == k, k], P[y != k, k])
        for k in range(P.shape[1])
        if 0 < np.sum(y == k) < len(y)
    ]
    return float(np.mean(found)) if found else None


def auroc_ovo(P: np.ndarray, y: np.ndarray) -> float | None:
    """The mean over all pairs of labels that occur, both ways round, of the area under the ROC
    curve of one label's probability among the examples of these two alone (Hand and Till 2001, eq.
    7): it doesn't depend on how frequent labels are. None for a single label.
    """
    there = np.unique(y)
    found = [
        _ranked_higher(P[y == k, k], P[y == other, k])
        for k in there
        for other in there
        if k != other
    ]
    return float(np.mean(found)) if found else None


def confidence_auroc(P: np.ndarray, y: np.ndarray) -> float | None:
    """How well confidence tells right predictions from wrong ones; None if all are right, or
    none.
    """
    right, confidence = P.argmax(axis=1) == y, P.max(axis=1)
    return (
        _ranked_higher(confidence[right], confidence[~right])
        if 0 < right.sum() < len(right)
        else None
    )


def _ranked_higher(these: np.ndarray, those: np.ndarray) -> float:
    """The chance that one of these is above one of those, ties counting half, which is the area
    under the ROC curve (Hanley and McNeil 1982).
    """
    from scipy.stats import rankdata

    n = len(these)
    return float(
        (rankdata(np.concatenate([these, those]))[:n].sum() - n * (n + 1) / 2) / (n * len(those))
    )


def selective_accuracy(P: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coverage [n], accuracy [n]) of answering only the examples with the highest confidence
    (El-Yaniv and Wiener 2010); those that are equally confident are answered together, at their
    mean.
    """
    confidence, right = P.max(axis=1), (P.argmax(axis=1) == y).astype(np.float64)
    _, group = np.unique(-confidence, return_inverse=True)
    right = np.bincount(group, right) / np.bincount(group)
    order = np.sort(group)
    answered = np.arange(1, len(y) + 1)
    return answered / len(y), np.cumsum(right[order]) / answered


def softmax(scores: np.ndarray) -> np.ndarray:
    """[n, K] distributions from label scores."""
    from scipy.special import softmax as of

    return of(scores, axis=1)


def best_temperature(scores: np.ndarray, y: np.ndarray) -> float:
    """T for which softmax(scores / T) has the lowest NLL (Guo et al. 2017, section 4.2). It changes
    no prediction. Fit it on other examples than those that it is judged by.
    """
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: nll(softmax(scores / np.exp(log_t)), y),
        bounds=(-5.0, 5.0),
        method="bounded",
        options=dict(xatol=1e-8),
    )
    return float(np.exp(found.x))


def divided(P: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """P / prior, normalised: what the prompt says beyond the label's own probability.

    With the prior [K] of content-free prompts it is contextual calibration (Zhao et al. 2021, arXiv
    2102.09690, section 5, without its redundant bias), of prompts with random words of the domain
    domain-context calibration (Fei et al. 2023, arXiv 2305.19148, eq. 5), of the domain premise
    alone PMI_DC (Holtzman et al. 2021, arXiv 2104.08315, section 3).
    """
    odds = np.exp(np.log(np.maximum(P, TINY)) - np.log(np.maximum(prior, TINY)))
    return odds / odds.sum(axis=1, keepdims=True)


def batch_prior(P: np.ndarray) -> np.ndarray:
    """The mean distribution [K], `divided` by which is batch calibration (Zhou et al. 2023, arXiv
    2309.17249, eq. 3). It looks at the test inputs, and takes labels to be equally frequent.
    """
    return P.mean(axis=0)
