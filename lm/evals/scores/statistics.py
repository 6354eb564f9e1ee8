"""Scores over predicted labels, their intervals, and tests between two models on the same
examples.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


def proportion_interval(successes: int, n: int, method: str = "wilson") -> tuple[float, float]:
    """95% interval of a proportion: "wilson" (the score interval, Wilson 1927) or "exact" (Clopper
    and Pearson 1934).
    """
    from scipy.stats import binomtest

    interval = binomtest(int(successes), int(n)).proportion_ci(0.95, method)
    return float(interval.low), float(interval.high)


def confusion(predicted: np.ndarray, y: np.ndarray, num_labels: int) -> np.ndarray:
    """[K, K] counts: row the right label, column the predicted one."""
    return np.bincount(y * num_labels + predicted, minlength=num_labels**2).reshape(
        num_labels, num_labels
    )


def prediction_scores(matrix: np.ndarray) -> dict[str, float]:
    """Scores over the whole label space, from a confusion matrix: cheap enough to be resampled, and
    without scikit-learn's warnings.

    macro_f1 (a label that neither occurs nor is predicted counts as 0), micro_f1 (the accuracy,
    there being one label each), weighted_f1 (by how often labels occur), balanced_accuracy (mean
    recall of the labels that occur), mcc (Matthews 1975; Gorodkin 2004 for K labels; 0 where all
    have or get one label), kappa (Cohen 1960; 1 where all have and get one label).
    """
    n, right, occur, predicted = (
        matrix.sum(),
        np.diag(matrix),
        matrix.sum(axis=1),
        matrix.sum(axis=0),
    )
    f1 = 2 * right / np.maximum(occur + predicted, 1)
    agreed, by_chance = right.sum() / n, occur @ predicted / n**2
    spread = (1 - occur @ occur / n**2) * (1 - predicted @ predicted / n**2)
    return {
        "macro_f1": float(f1.mean()),
        "micro_f1": float(agreed),
        "weighted_f1": float(f1 @ occur / n),
        "balanced_accuracy": float(np.mean(right[occur > 0] / occur[occur > 0])),
        "mcc": float((agreed - by_chance) / np.sqrt(spread)) if spread > 0 else 0.0,
        "kappa": float((agreed - by_chance) / (1 - by_chance)) if by_chance < 1 else 1.0,
    }


def resamples(n: int, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """[n] indices of each of `count` bootstrap samples."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, n, n) for _ in range(count))


def bootstrap_interval(
    score: Callable[[np.ndarray], float], n: int, *, count: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a score over examples (Efron 1979).

    Args:
      score: takes the indices of a sample [n] of the examples.
    """
    values = [score(index) for index in resamples(n, count, seed)]
    return float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))


def standard_error(values: np.ndarray, clusters: Sequence | None = None) -> float:
    """Of a mean: sd / sqrt(n). With `clusters`, of examples that come in groups (questions about
    one passage), the covariances within them added (Miller 2024, arXiv 2411.00640, section 2.2).
    nan for a single example.
    """
    values = np.asarray(values, np.float64)
    if (n := len(values)) < 2:
        return float("nan")
    variance, off = values.var(ddof=1) / n, values - values.mean()
    if clusters is not None:
        _, group = np.unique(np.asarray(clusters), return_inverse=True)
        variance += (np.sum(np.bincount(group, off) ** 2) - np.sum(off**2)) / n**2
    return float(np.sqrt(variance))


class McNemar(NamedTuple):
    only_first: int  # right by the first model alone
    only_second: int
    p: float  # exact, two-sided
    chi2: float  # with continuity correction
    chi2_p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Whether two models, right or wrong [n] on the same examples, differ (McNemar 1947)."""
    from scipy.stats import binomtest, chi2

    first, second = np.asarray(first, bool), np.asarray(second, bool)
    b, c = int((first & ~second).sum()), int((second & ~first).sum())
    statistic = max(abs(b - c) - 1, 0) ** 2 / (b + c) if b + c else 0.0
    return McNemar(
        b,
        c,
        float(binomtest(b, b + c).pvalue) if b + c else 1.0,
        statistic,
        float(chi2.sf(statistic, 1)),
    )


class Difference(NamedTuple):
    value: float  # first minus second
    low: float  # of its 95% interval
    high: float
    p: float  # two-sided: that there is none


def paired_bootstrap(
    first: Callable[[np.ndarray], float],
    second: Callable[[np.ndarray], float],
    n: int,
    *,
    count: int = 1000,
    seed: int = 0,
) -> Difference:
    """The difference of a score between two models over the same examples, resampled together
    (Koehn 2004; Berg-Kirkpatrick et al. 2012).

    Args:
      first, second: take the indices of a sample [n], give the model's score on it.
    """
    whole = np.arange(n)
    value = first(whole) - second(whole)
    values = np.array([first(index) - second(index) for index in resamples(n, count, seed)])
    beyond = min(np.sum(values <= 0), np.sum(values >= 0))  # how often the sign turns
    return Difference(
        float(value),
        float(np.percentile(values, 2.5)),
        float(np.percentile(values, 97.5)),
        float(min(1.0, 2 * (beyond + 1) / (count + 1))),
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for there being several (Holm 1979), in their order."""
    order = np.argsort(p)
    scaled = np.maximum.accumulate(np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(scaled, 1.0)
    return corrected.tolist()


def smallest_difference(standard_error: float, *, level: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that a test at `level` shows with probability `power`, given the
    standard error of the paired difference (Miller 2024, arXiv 2411.00640, eq. 9).
    """
    from scipy.stats import norm

    return float((norm.isf(level / 2) + norm.isf(1 - power)) * standard_error)
