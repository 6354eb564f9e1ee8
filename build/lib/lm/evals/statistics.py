"""Intervals and scores over predicted labels."""

import numpy as np


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); z is the normal quantile, that of 95% by default."""
    p, zz = successes / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * np.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return float(centre - half), float(centre + half)


def confusion(predicted: np.ndarray, y: np.ndarray, num_labels: int) -> np.ndarray:
    """[K, K] counts: row the right label, column the predicted one."""
    matrix = np.zeros((num_labels, num_labels), int)
    np.add.at(matrix, (y, predicted), 1)
    return matrix


def macro_f1(matrix: np.ndarray) -> float:
    """Mean F1 over the whole label space, from a confusion matrix; a label that neither occurs nor is predicted counts as 0."""
    right = np.diag(matrix)
    return float(np.mean(2 * right / np.maximum(matrix.sum(axis=0) + matrix.sum(axis=1), 1)))
