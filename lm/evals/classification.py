"""Verbalizer classification: the model's probabilities of label words, after a document and the line that asks for its label."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from lm.data.pack import Encoder
from lm.data.sources import Document, Documents
from lm.evals import calibration, statistics
from lm.evals.common import Artifact, PredictFns, png, take
from lm.evals.tree import grow
from lm.evals.verbalizer import AGGREGATES, NORMS, WordLogprobs, audit, label_mass, label_scores, word_logprobs, word_scores


def compile_verbalizer(verbalizer: Sequence[tuple[str, Sequence[str]]], tokenizer, labels: set[str]) -> list[tuple[int, str, list[int]]]:
    """(label's index, word, token ids) of every label word.

    A word is tokenized apart from the text before it, as in training (lm.data.pack), and its ids are put after that text's, so that a word is
    the same tokens after any text (joined strings, cut again, are not).

    Raises:
      ValueError: a label of the data without words, or see `lm.evals.verbalizer.audit`.
    """
    names = [label for label, _ in verbalizer]
    if labels - set(names):
        raise ValueError(f"the verbalizer has words for the labels {names}; the data's labels are {sorted(labels)}")
    words = [(i, word, tokenizer.encode(word)) for i, (_, words) in enumerate(verbalizer) for word in words]
    audit(names, words)
    return words


# What a document may be to say nothing (Zhao et al. 2021, arXiv 2102.09690, section 5).
CONTENT_FREE = ("", "N/A", "[MASK]")


class Evaluator:
    """Yields of the label distributions, the softmax of the label scores: accuracy with its Wilson 95% interval; the scores of
    `statistics.prediction_scores`; nll, brier, ece (and with bins of equal mass, and classwise), auroc, confidence_auroc, selective_accuracy (its mean over
    all coverages); label_mass (see `verbalizer.label_mass`, the mean). Accuracy, nll and ece again, corrected by the distribution after
    documents that say nothing (_content_free), and by the mean distribution (_batch: it looks at all test inputs). To compare with:
    majority_accuracy, and content_free_accuracy, that of the label that is likeliest after nothing. As files: each example's label distribution and
    log-probabilities of the words (predictions/), the confusion matrix, the reliability diagram with the distribution of labels.

    Documents that are too long lose their beginning, never the question; `cut` counts them.

    Args:
      name: names the artifacts.
      verbalizer: (label, words) pairs; a word includes the space before it.
      max_documents: how many of the split, evenly out of it; 0: all.
      aggregate, length_norm: see lm.evals.verbalizer.label_scores and word_scores.
    """

    def __init__(self, predict_fns: PredictFns, *, name: str, documents: Documents, encoder: Encoder, verbalizer, max_documents: int,
                 aggregate: str = "sum", length_norm: str = "none"):
        self._documents = list(take(documents, max_documents))
        if not encoder.label_prompt or not self._documents or not all(d.label for d in self._documents):
            raise ValueError(f"the eval {name!r} needs labelled documents and config.data.label_prompt (now {encoder.label_prompt!r})")
        for what, value, valid in (("aggregate", aggregate, AGGREGATES), ("length_norm", length_norm, NORMS)):
            if value not in valid:
                raise ValueError(f"config.evals.{name}.{what} = {value!r}; valid: {list(valid)}")
        self._predict_fns, self._name, self._aggregate, self._length_norm = predict_fns, name, aggregate, length_norm
        self._labels = [label for label, _ in verbalizer]
        self._words = compile_verbalizer(verbalizer, encoder.tokenizer, {d.label for d in self._documents})
        if length_norm in ("char", "byte") and (blank := [word for _, word, _ in self._words if not word.strip()]):
            raise ValueError(f"config.evals.{name}.length_norm = {length_norm!r}: the words {blank} have no characters but white space")
        room = predict_fns.length - max(len(ids) for _, _, ids in self._words) + 1
        if room <= (question := len(encoder.tokenizer.encode(encoder.label_prompt))):
            raise ValueError(f"config.data.length = {predict_fns.length} is too short for the eval {name!r}: the question has {question} tokens, the "
                             f"longest word {predict_fns.length - room + 1}, and of the document one at least should be left")
        prompts = [encoder.prompt(d) for d in self._documents]
        self._cut = sum(len(prompt) > room for prompt in prompts)
        free = [encoder.prompt(Document(text, "", "")) for text in CONTENT_FREE]
        self._trees = [grow(prompt[-room:], [ids for _, _, ids in self._words]) for prompt in prompts + free]
        self._gold = np.array([self._labels.index(d.label) for d in self._documents])

    def logprobs(self, params) -> tuple[WordLogprobs, WordLogprobs]:
        """(the examples', the content-free documents'). Each prompt is computed once, and what words share too."""
        found = self._predict_fns.tree_logprobs(params, self._trees)
        paths = [[logprobs[path] for path in tree.paths] for tree, (logprobs, _) in zip(self._trees, found)]
        n = len(self._documents)
        return tuple(word_logprobs(part, [i for i, _, _ in self._words], [word for _, word, _ in self._words]) for part in (paths[:n], paths[n:]))

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        logprobs, free = self.logprobs(params)
        words, gold, n = word_scores(logprobs), self._gold, len(self._gold)
        if not np.isfinite(words).all():
            raise ValueError(f"the eval {self._name!r}: the model's log-probabilities of label words are not finite for "
                             f"{int((~np.isfinite(words).all(axis=1)).sum())} of {n} examples; its weights or activations are broken")
        P, P_free = (calibration.softmax(label_scores(word_scores(x, self._length_norm), x.label, self._aggregate)) for x in (logprobs, free))
        mass, predicted = label_mass(logprobs), P.argmax(axis=1)
        matrix = statistics.confusion(predicted, gold, len(self._labels))
        right = int((predicted == gold).sum())
        yield "accuracy", right / n
        yield from zip(("accuracy_low", "accuracy_high"), statistics.proportion_interval(right, n))
        yield "majority_accuracy", int(np.bincount(gold).max()) / n
        yield from statistics.prediction_scores(matrix).items()
        yield "nll", calibration.nll(P, gold)
        yield "brier", calibration.brier(P, gold)
        yield "ece", calibration.ece(P, gold)
        yield "ece_equal_mass", calibration.ece(P, gold, equal="mass")
        yield "classwise_ece", calibration.classwise_ece(P, gold)
        for name, value in (("auroc", calibration.auroc(P, gold)), ("confidence_auroc", calibration.confidence_auroc(P, gold))):
            if value is not None:  # some need two labels, or right and wrong predictions
                yield name, value
        yield "selective_accuracy", float(np.mean(calibration.selective_accuracy(P, gold)[1]))
        yield "label_mass", float(np.mean(mass))
        prior = P_free.mean(axis=0)
        yield "content_free_accuracy", float(np.mean(gold == prior.argmax()))
        for name, Q in (("content_free", calibration.divided(P, prior)), ("batch", calibration.divided(P, calibration.batch_prior(P)))):
            yield f"accuracy_{name}", float(np.mean(Q.argmax(axis=1) == gold))
            yield f"nll_{name}", calibration.nll(Q, gold)
            yield f"ece_{name}", calibration.ece(Q, gold)
        yield "examples", n
        yield "cut", self._cut
        lines = [json.dumps({
            "name": d.name, "label": d.label, "prediction": self._labels[p],
            "distribution": dict(zip(self._labels, map(float, probabilities))), "label_mass": float(m),
            "word_logprobs": {word: float(x) for (_, word, _), x in zip(self._words, scores)},
        }) for d, p, probabilities, m, scores in zip(self._documents, predicted, P, mass, words)]
        yield "predictions", Artifact(f"predictions/{self._name}-{{step}}.jsonl", "\n".join(lines) + "\n")
        yield "confusion", Artifact(f"confusion-{self._name}.png", plot_confusion(matrix, self._labels, f"{self._name}: accuracy {right / n:.1%}"))
        yield "reliability", Artifact(f"reliability-{self._name}.png", plot_reliability(P, gold, self._labels, self._name))


def plot_confusion(matrix: np.ndarray, labels: list[str], title: str) -> bytes:
    """A confusion matrix as PNG: shares of each right label, counts written in."""
    from matplotlib.figure import Figure
    size = 2.5 + 0.8 * len(labels)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axis = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure.colorbar(axis.imshow(shares, vmin=0, vmax=1, cmap="Blues"), label="share of the right label")
    for i, j in np.ndindex(*matrix.shape):
        axis.text(j, i, str(matrix[i, j]), ha="center", va="center", color="white" if shares[i, j] > 0.6 else "black")
    axis.set(xticks=range(len(labels)), yticks=range(len(labels)), xticklabels=labels, yticklabels=labels, xlabel="predicted",
             ylabel="right label", title=title)
    return png(figure)


def plot_reliability(P: np.ndarray, y: np.ndarray, labels: list[str], name: str) -> bytes:
    """Two pictures as PNG: how often predictions of some confidence are right, in ten bins, with how many there are; and the labels' shares among the
    right ones, the predicted ones, and in the mean distribution."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    confidence, hit = P.max(axis=1), P.argmax(axis=1) == y
    numbers = calibration.bin_numbers(confidence, 10, "width")
    counts = np.bincount(numbers, minlength=10)
    there = counts > 0
    accuracy = np.bincount(numbers, hit, 10)[there] / counts[there]
    intervals = np.array([statistics.proportion_interval(round(a * n), n) for a, n in zip(accuracy, counts[there])])
    left.bar(np.arange(10) / 10 + 0.05, counts / len(y), 0.09, color="lightgrey", label="share of the predictions")
    left.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    left.errorbar(np.bincount(numbers, confidence, 10)[there] / counts[there], accuracy, np.abs(intervals - accuracy[:, None]).T, marker="o", capsize=3,
                  linestyle="none", label="accuracy (Wilson 95%)")
    left.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", title=f"{name}: ECE {calibration.ece(P, y):.3f}, NLL {calibration.nll(P, y):.3f}")
    left.legend(loc="upper left")
    place = np.arange(len(labels))
    for i, (what, shares) in enumerate((("right", np.bincount(y, minlength=len(labels)) / len(y)),
                                        ("predicted", np.bincount(P.argmax(axis=1), minlength=len(labels)) / len(y)), ("mean distribution", P.mean(axis=0)))):
        right.bar(place + 0.27 * (i - 1), shares, 0.25, label=what)
    right.set(xticks=place, ylabel="share", title="labels")
    right.set_xticklabels(labels, rotation=90 if len(labels) > 8 else 0)
    right.legend()
    return png(figure)
