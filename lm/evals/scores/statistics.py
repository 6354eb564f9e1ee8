"""Scores of predicted labels, their intervals, and tests of two models on the same examples."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# A score of a sample of the examples, given by their indices [n].
SampleScore = Callable[[np.ndarray], float]
NUM_RESAMPLES = 1000  # of a bootstrap
TIE = 1e-12  # scores that differ by less, relative to the best one, are equal


def exp(x: float) -> float:
    """exp(x), a large finite number where it would overflow."""
    return math.exp(min(x, 700.0))


def proportion_interval(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a proportion: the score interval (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(int(successes), int(n)).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def prediction_shares(scores: np.ndarray) -> np.ndarray:
    """[..., K]: the prediction, out of the scores [..., K] of K labels. It is the label with the
    highest score; labels that tie for it, but for rounding, share it equally.
    """
    best = scores.max(axis=-1, keepdims=True)
    is_best = scores >= best - TIE * np.abs(best)
    return is_best / is_best.sum(axis=-1, keepdims=True)


def credit(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[n]: 1 where the right label has the highest of the scores [n, K], over the number of labels
    that tie with it; else 0.
    """
    return prediction_shares(scores)[np.arange(len(y)), y]


def confusion(shares: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[K, K] counts, the row is the right label, the column the predicted one, out of predictions
    [n, K] (see `prediction_shares`).
    """
    num_labels = shares.shape[1]
    examples, predicted = np.nonzero(shares)
    cells = y[examples] * num_labels + predicted
    counts = np.bincount(cells, shares[examples, predicted], minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels)


def prediction_scores(matrix: np.ndarray) -> dict[str, float]:
    """Scores over the whole label space, from a confusion matrix [K, K]. They are cheap enough to
    be resampled, and give none of scikit-learn's warnings.

    Returns:
      macro_f1: a label that neither occurs nor is predicted counts as 0.
      micro_f1: the accuracy, as there is one label each.
      weighted_f1: by how often labels occur.
      balanced_accuracy: mean recall of the labels that occur.
      mcc: Matthews 1975, for K labels Gorodkin 2004; 0 where all have or get one label.
      kappa: Cohen 1960; 1 where all have and get one label.
    """
    n = matrix.sum()
    right = np.diag(matrix)
    occur = matrix.sum(axis=1)
    predicted = matrix.sum(axis=0)

    f1 = 2 * right / np.maximum(occur + predicted, 1)
    recall = right[occur > 0] / occur[occur > 0]

    agreement = right.sum() / n
    chance_agreement = occur @ predicted / n**2
    # Gorodkin's numerator and denominator are these two, both over n^2.
    spread = (1 - occur @ occur / n**2) * (1 - predicted @ predicted / n**2)
    mcc = (agreement - chance_agreement) / np.sqrt(spread) if spread > 0 else 0.0
    kappa = 1.0
    if chance_agreement < 1:
        kappa = (agreement - chance_agreement) / (1 - chance_agreement)

    return {
        "macro_f1": float(f1.mean()),
        "micro_f1": float(agreement),
        "weighted_f1": float(f1 @ occur / n),
        "balanced_accuracy": float(np.mean(recall)),
        "mcc": float(mcc),
        "kappa": float(kappa),
    }


def resamples(n: int, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields the indices [n] of each of `count` bootstrap samples."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield rng.integers(0, n, n)


def bootstrap_interval(
    score: SampleScore, n: int, *, count: int = NUM_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a score over n examples (Efron 1979)."""
    values = [score(index) for index in resamples(n, count, seed)]
    return float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))


def standard_error(values: np.ndarray) -> float:
    """Standard error of a mean, sd / sqrt(n); nan for a single example."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float("nan")
    return float(np.sqrt(values.var(ddof=1) / len(values)))


def mcnemar_p(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided p-value of McNemar's test (1947) that two models are equally often right;
    `first` and `second` [n] say on which examples each is. Of predictions that tie they have shares
    of 1: then this is the sign test.
    """
    from scipy.stats import binomtest

    first = np.asarray(first, np.float64)
    second = np.asarray(second, np.float64)
    # Only examples on which the models disagree tell them apart.
    only_first = int((first > second).sum())
    only_second = int((second > first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


class Difference(NamedTuple):
    value: float  # first minus second
    low: float  # of its 95% interval
    high: float
    p: float  # two-sided p-value of the hypothesis that there is no difference


def paired_bootstrap(first: SampleScore, second: SampleScore, n: int) -> Difference:
    """The difference of a score between two models over the same n examples, resampled together
    (Koehn 2004; Berg-Kirkpatrick et al. 2012).
    """
    all_examples = np.arange(n)
    value = first(all_examples) - second(all_examples)
    values = np.array([first(index) - second(index) for index in resamples(n, NUM_RESAMPLES)])

    # Samples whose difference has the other sign. One is added, so that p is never 0.
    num_opposite = min(np.sum(values <= 0), np.sum(values >= 0))
    p = min(1.0, 2 * (num_opposite + 1) / (NUM_RESAMPLES + 1))
    return Difference(
        value=float(value),
        low=float(np.percentile(values, 2.5)),
        high=float(np.percentile(values, 97.5)),
        p=float(p),
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for the number of tests (Holm 1979), in their order."""
    # The smallest is multiplied by the number of tests, the next by one less, and so on; none may
    # come out below a smaller one's.
    order = np.argsort(p)
    factors = np.arange(len(p), 0, -1)
    scaled = np.maximum.accumulate(np.asarray(p, np.float64)[order] * factors)

    corrected = np.empty(len(p))
    corrected[order] = np.minimum(scaled, 1.0)
    return corrected.tolist()


def smallest_difference(standard_error: float) -> float:
    """The smallest true difference that a two-sided test at the level 0.05 shows with probability
    0.8, given the standard error of the paired difference (Miller 2024, arXiv 2411.00640, eq. 9).
    """
    from scipy.stats import norm

    level = 0.05
    power = 0.8
    return float((norm.isf(level / 2) + norm.isf(1 - power)) * standard_error)
