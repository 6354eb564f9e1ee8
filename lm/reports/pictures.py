"""Pictures of results, as PNG."""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from lm.evals.scores import calibration, statistics
from lm.reports import metrics

NUM_BINS = 10  # of the reliability diagram
MAX_CHARS = 40  # of a label; the rest is left out
MAX_ASKED = 110  # of what was asked, its end
MIN_WRITTEN = 0.06  # the least probability whose bar has room for it
CHAR_SIZE = 0.09  # inches


def png(figure) -> bytes:
    """A matplotlib figure as PNG, as large as all that is in it."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100, bbox_inches="tight")
    return data.getvalue()


def plot_confusion(matrix: np.ndarray, labels: list[str], title: str) -> bytes:
    """A confusion matrix [K, K] as PNG: colours are shares of each right label, counts are written
    in.
    """
    from matplotlib.figure import Figure

    # Written counts would take a tenth of a second each, and be unreadable.
    is_large = len(labels) > 20
    size = 2.5 + (0.2 if is_large else 0.8) * len(labels)
    label_size = CHAR_SIZE * max(map(len, _shortened(labels)))
    figure = Figure(figsize=(size + 1 + label_size, size + label_size), layout="constrained")
    axis = figure.subplots()

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the right label")
    if not is_large:
        for i, j in np.ndindex(*matrix.shape):
            colour = "white" if shares[i, j] > 0.6 else "black"
            # Labels that tie share a prediction: counts may have a fraction.
            count = f"{matrix[i, j]:.1f}".removesuffix(".0")
            axis.text(j, i, count, ha="center", va="center", color=colour)

    # Rows are right labels, from above, as in the matrix.
    axis.set(
        xticks=range(len(labels)),
        yticks=range(len(labels)),
        xlabel="predicted",
        ylabel="right label",
        title=title,
    )
    axis.set_yticklabels(_shortened(labels), parse_math=False)
    _write_labels(axis, labels)
    return png(figure)


def plot_reliability(P: np.ndarray, y: np.ndarray, labels: list[str], name: str) -> bytes:
    """Two pictures side by side as PNG: a reliability diagram, and the labels' frequencies.

    Args:
      P: [n, K], the label distributions.
      y: [n], the right labels.
      name: for the title.
    """
    from matplotlib.figure import Figure

    # The left picture is about square, the right one as wide as its labels need.
    right_width = max(5.5, 0.2 * len(labels))
    figure = Figure(figsize=(5.5 + right_width, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5.5, right_width))
    _draw_reliability(left, P, y)
    left.set(title=f"{name}: ECE {calibration.ece(P, y):.3f}, NLL {calibration.nll(P, y):.3f}")
    _draw_label_shares(right, P, y, labels)
    return png(figure)


def _draw_reliability(axis, P: np.ndarray, y: np.ndarray) -> None:
    """Draws how often predictions of some confidence are right, in ten bins, with the number of
    predictions in each.
    """
    confidence = P.max(axis=1)
    is_right = statistics.credit(P, y)
    numbers = calibration.bin_numbers(confidence, NUM_BINS, "width")
    counts = np.bincount(numbers, minlength=NUM_BINS)

    # An empty bin has no accuracy.
    filled = counts > 0
    counts_filled = counts[filled]
    accuracy = np.bincount(numbers, is_right, NUM_BINS)[filled] / counts_filled
    mean_confidence = np.bincount(numbers, confidence, NUM_BINS)[filled] / counts_filled
    intervals = []
    for share, count in zip(accuracy, counts_filled):
        intervals.append(statistics.proportion_interval(round(share * count), count))

    # Bars in the middle of the bins, a little narrower than they are.
    middles = np.arange(NUM_BINS) / NUM_BINS + 0.5 / NUM_BINS
    axis.bar(middles, counts / len(y), 0.09, color="lightgrey", label="share of the predictions")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")  # calibrated
    axis.errorbar(
        mean_confidence,
        accuracy,
        np.abs(np.array(intervals) - accuracy[:, None]).T,
        marker="o",
        capsize=3,
        linestyle="none",
        label="accuracy (Wilson 95%)",
    )
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence")
    axis.legend(loc="upper left")


def _draw_label_shares(axis, P: np.ndarray, y: np.ndarray, labels: list[str]) -> None:
    """Draws each label's share among the right labels, among the predicted ones, and in the mean
    distribution.
    """
    num_labels = len(labels)
    shares = {
        "right": np.bincount(y, minlength=num_labels) / len(y),
        "predicted": statistics.prediction_shares(P).mean(axis=0),
        "mean distribution": P.mean(axis=0),
    }

    # Three bars side by side for each label.
    places = np.arange(num_labels)
    for i, (name, values) in enumerate(shares.items()):
        axis.bar(places + 0.27 * (i - 1), values, 0.25, label=name)
    axis.set(xticks=places, ylabel="share", title="labels")
    _write_labels(axis, labels)
    axis.legend()


def plot_distributions(lines: Sequence[Mapping], title: str) -> bytes:
    """The label distributions of a few examples as PNG: a bar for each, below the end of what was
    asked. The right label has a frame.

    Args:
      lines: of predictions/NAME-STEP.jsonl.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.75 * len(lines)), layout="constrained")
    axis = figure.subplots()
    bars = {}
    for row, line in enumerate(lines):
        left = 0.0
        for number, (label, p) in enumerate(line["distribution"].items()):
            colour = f"C{number % 10}"
            bars[label] = axis.barh(row, p, 0.4, left, color=colour, alpha=0.6)
            if label == line["label"]:
                frame = dict(color="none", edgecolor="black", linewidth=2, clip_on=False, zorder=3)
                axis.barh(row, p, 0.4, left, **frame)
            if p >= MIN_WRITTEN:
                axis.text(left + p / 2, row, f"{p:.2f}", ha="center", va="center", zorder=4)
            left += p
        asked = " ".join(line["prompts"][0].split())
        if len(asked) > MAX_ASKED:
            asked = f"…{asked[1 - MAX_ASKED :]}"
        axis.text(0, row - 0.27, asked, fontsize=9, va="bottom", parse_math=False)

    # Rows go down, and nothing but the probability has a scale.
    axis.set(xlim=(0, 1), ylim=(len(lines) - 0.6, -0.7), yticks=[], xlabel="probability")
    axis.spines[["top", "left", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)
    legend = figure.legend(
        bars.values(), _shortened(list(bars)), loc="outside lower center", ncols=6
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return png(figure)


def plot_pairs(
    first: Sequence[Mapping], second: Sequence[Mapping], result: Mapping, names: Sequence[str]
) -> bytes:
    """Two predictions of the same examples as PNG: the probability of the right label by both, and
    the differences of their scores with 95% intervals.

    Args:
      first, second: lines of predictions/NAME-STEP.jsonl, with distributions.
      result: of `lm.reports.comparison.compare`.
      names: what the two are called.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = [[], []]
    for values, lines in zip(points, (first, second)):
        values += [line["distribution"][line["label"]] for line in lines]
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    left.scatter(*points, s=14, alpha=0.6)
    left.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title="probability of the right label")
    left.set_xlabel(names[0], parse_math=False)
    left.set_ylabel(names[1], parse_math=False)

    scores = [key for key in result if f"{key}_difference" in result]
    labels = []
    for row, score in enumerate(scores):
        better = {True: "higher", False: "lower"}.get(metrics.is_higher_better(score))
        labels.append(f"{score}\n({better} is better)" if better else score)
        difference = result[f"{score}_difference"]
        low, high = result[f"{score}_low"], result[f"{score}_high"]
        right.plot([low, high], [row, row], color="C0", linewidth=2)
        right.plot(difference, row, marker="o", color="C0")
        text = f"{result[score]:.3f} and {result[f'{score}_other']:.3f}"
        right.annotate(text, (difference, row), (0, 8), textcoords="offset points", ha="center")
    right.axvline(0, color="grey", linewidth=1, linestyle="--")
    right.set(yticks=range(len(scores)), ylim=(len(scores) - 0.5, -0.5), yticklabels=labels)
    right.set_title("differences, with 95% intervals")
    right.set_xlabel(f"{names[0]} less {names[1]}", parse_math=False)
    right.margins(x=0.15)
    return png(figure)


def _write_labels(axis, labels: list[str]) -> None:
    """Writes labels below the axis, upright where they are many or long."""
    texts = _shortened(labels)
    is_upright = len(texts) > 8 or max(map(len, texts)) > 12
    # A label is text, whatever dollars it has: matplotlib would read formulas.
    axis.set_xticklabels(texts, rotation=90 if is_upright else 0, parse_math=False)


def _shortened(labels: list[str]) -> list[str]:
    """Labels as lines that have room in a picture."""
    texts = []
    for label in labels:
        line = " ".join(label.split())
        texts.append(line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 1]}…")
    return texts
