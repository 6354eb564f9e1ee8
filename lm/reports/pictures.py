"""Pictures of results, as PNG."""

import io

import numpy as np

from lm.evals.scores import calibration, statistics


def png(figure) -> bytes:
    """A matplotlib figure as PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    return data.getvalue()


def plot_confusion(matrix: np.ndarray, labels: list[str], title: str) -> bytes:
    """A confusion matrix as PNG: shares of each right label, counts written in."""
    from matplotlib.figure import Figure

    many = len(labels) > 20  # counts would be a tenth of a second each, and unreadable
    size = 2.5 + (0.2 if many else 0.8) * len(labels)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure.colorbar(
        axis.imshow(shares, vmin=0, vmax=1, cmap="Blues"), label="share of the right label"
    )
    for i, j in () if many else np.ndindex(*matrix.shape):
        axis.text(
            j,
            i,
            str(matrix[i, j]),
            ha="center",
            va="center",
            color="white" if shares[i, j] > 0.6 else "black",
        )
    axis.set(
        xticks=range(len(labels)),
        yticks=range(len(labels)),
        yticklabels=labels,
        xlabel="predicted",
        ylabel="right label",
        title=title,
    )
    axis.set_xticklabels(labels, rotation=90 if len(labels) > 8 else 0)
    return png(figure)


def plot_reliability(P: np.ndarray, y: np.ndarray, labels: list[str], name: str) -> bytes:
    """Two pictures as PNG: how often predictions of some confidence are right, in ten bins, with
    how many there are; and the labels' shares among the right ones, the predicted ones, and in the
    mean distribution.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 + max(5.5, 0.2 * len(labels)), 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5.5, max(5.5, 0.2 * len(labels))))
    confidence, hit = P.max(axis=1), P.argmax(axis=1) == y
    numbers = calibration.bin_numbers(confidence, 10, "width")
    counts = np.bincount(numbers, minlength=10)
    there = counts > 0
    accuracy = np.bincount(numbers, hit, 10)[there] / counts[there]
    intervals = np.array(
        [statistics.proportion_interval(round(a * n), n) for a, n in zip(accuracy, counts[there])]
    )
    left.bar(
        np.arange(10) / 10 + 0.05,
        counts / len(y),
        0.09,
        color="lightgrey",
        label="share of the predictions",
    )
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    left.errorbar(
        np.bincount(numbers, confidence, 10)[there] / counts[there],
        accuracy,
        np.abs(intervals - accuracy[:, None]).T,
        marker="o",
        capsize=3,
        linestyle="none",
        label="accuracy (Wilson 95%)",
    )
    left.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="confidence",
        title=f"{name}: ECE {calibration.ece(P, y):.3f}, NLL {calibration.nll(P, y):.3f}",
    )
    left.legend(loc="upper left")
    place = np.arange(len(labels))
    for i, (what, shares) in enumerate(
        (
            ("right", np.bincount(y, minlength=len(labels)) / len(y)),
            ("predicted", np.bincount(P.argmax(axis=1), minlength=len(labels)) / len(y)),
            ("mean distribution", P.mean(axis=0)),
        )
    ):
        right.bar(place + 0.27 * (i - 1), shares, 0.25, label=what)
    right.set(xticks=place, ylabel="share", title="labels")
    right.set_xticklabels(labels, rotation=90 if len(labels) > 8 else 0)
    right.legend()
    return png(figure)
