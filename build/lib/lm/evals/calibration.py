"""Scores of label distributions. P is [n, K], rows sum to 1; y is [n], the right label's index."""

import numpy as np


def nll(P: np.ndarray, y: np.ndarray) -> float:
    """Mean negative log-likelihood of the right label, in nats."""
    return float(-np.mean(np.log(np.maximum(P[np.arange(len(y)), y], np.finfo(np.float64).tiny))))


def brier(P: np.ndarray, y: np.ndarray) -> float:
    """Mean over examples of sum_k (p_k - 1[y = k])^2 (Brier 1950): 0 to 2, twice the usual figure for two labels."""
    return float(np.mean(np.sum(np.square(P - np.eye(P.shape[1])[y]), axis=1)))


def ece(P: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the predicted label, equal-width bins (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    confidence, right = P.max(axis=1), P.argmax(axis=1) == y
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bin b is (b/bins, (b+1)/bins]
    return float(sum(abs(np.sum(confidence[number == b]) - np.sum(right[number == b])) for b in range(bins)) / len(y))
