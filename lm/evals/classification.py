"""Verbalizer classification: the model's probabilities of label words, after a document and the line that asks for its label."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from lm.data.pack import Encoder
from lm.data.sources import Documents
from lm.evals import calibration, statistics
from lm.evals.common import Artifact, PredictFns, png, take
from lm.evals.tree import grow


def compile_verbalizer(verbalizer: Sequence[tuple[str, Sequence[str]]], tokenizer, labels: set[str]) -> list[tuple[int, str, list[int]]]:
    """(label's index, word, token ids) of every label word.

    A word is tokenized apart from the text before it, and its ids are put after that text's, so that a word is the same tokens
    after any text (joined strings, cut again, are not).

    Raises:
      ValueError: a label of the data without words; a word without tokens; two labels' words with the same
        tokens, or where one's are the beginning of the other's: the shorter could never score below the longer.
    """
    names = [label for label, _ in verbalizer]
    if labels - set(names) or len(names) != len(set(names)):
        raise ValueError(f"the verbalizer has words for the labels {names}; the data's labels are {sorted(labels)}")
    words = [(i, word, tokenizer.encode(word)) for i, (_, words) in enumerate(verbalizer) for word in words]
    for i, label in enumerate(names):
        if not any(k == i for k, _, _ in words):
            raise ValueError(f"the verbalizer has no word for the label {label!r}")
    for i, word, ids in words:
        if not ids:
            raise ValueError(f"the verbalizer's word {word!r} of {names[i]!r} has no tokens")
        for k, other, longer in words:
            if (k, other) != (i, word) and longer[:len(ids)] == ids:
                how = "are the same tokens" if ids == longer else "begin with the same tokens"
                raise ValueError(f"the verbalizer's words {word!r} of {names[i]!r} and {other!r} of {names[k]!r} {how} ({ids} and {longer}): "
                                 f"the model can't tell them apart. Change a word, or take a tokenizer that splits them otherwise.")
    return words


class Evaluator:
    """Yields accuracy with its Wilson 95% interval, majority_accuracy, macro_f1, nll, brier, ece and label_mass; the label
    distribution of each example (predictions/) and the confusion matrix (PNG).

    A word's score is the sum of its tokens' log-probabilities, a label's the log of the sum of its words' probabilities, and the
    label distribution is the softmax over labels. `label_mass` is the mean probability of all label words together: how much of
    the model's belief the verbalizer sees. Documents that are too long lose their beginning, never the question.

    Args:
      name: names the artifacts.
      verbalizer: (label, words) pairs; a word includes the space before it.
      max_documents: how many of the split, evenly out of it; 0: all.
    """

    def __init__(self, predict_fns: PredictFns, *, name: str, documents: Documents, encoder: Encoder, verbalizer, max_documents: int):
        self._documents = list(take(documents, max_documents))
        if not encoder.label_prompt or not all(d.label for d in self._documents):
            raise ValueError(f"the eval {name!r} needs labelled documents and config.data.label_prompt (now {encoder.label_prompt!r})")
        self._predict_fns, self._name = predict_fns, name
        self._labels = [label for label, _ in verbalizer]
        self._words = compile_verbalizer(verbalizer, encoder.tokenizer, {d.label for d in self._documents})
        room = predict_fns.length - max(len(ids) for _, _, ids in self._words) + 1
        if room <= (question := len(encoder.tokenizer.encode(encoder.label_prompt))):
            raise ValueError(f"config.data.length = {predict_fns.length} is too short for the eval {name!r}: the question has {question} tokens, the "
                             f"longest word {predict_fns.length - room + 1}, and of the document one at least should be left")
        self._prompts = [encoder.prompt(d)[-room:] for d in self._documents]
        self._gold = np.array([self._labels.index(d.label) for d in self._documents])

    def word_logprobs(self, params) -> np.ndarray:
        """[examples, words] log-probability of each word as a sequence, f64. Each prompt is computed once, and what words share too."""
        trees = [grow(prompt, [ids for _, _, ids in self._words]) for prompt in self._prompts]
        found = self._predict_fns.tree_logprobs(params, trees)
        return np.array([[np.sum(logprobs[path], dtype=np.float64) for path in tree.paths] for tree, (logprobs, _) in zip(trees, found)])

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        words = self.word_logprobs(params)
        labels = np.stack([np.logaddexp.reduce(words[:, [j for j, (k, _, _) in enumerate(self._words) if k == i]], axis=1)
                           for i in range(len(self._labels))], axis=1)
        mass = np.logaddexp.reduce(labels, axis=1)
        P = np.exp(labels - mass[:, None])
        predicted, gold = P.argmax(axis=1), self._gold
        matrix = statistics.confusion(predicted, gold, len(self._labels))
        right, n = int((predicted == gold).sum()), len(gold)
        low, high = statistics.proportion_interval(right, n)
        yield "accuracy", right / n
        yield "accuracy_low", low
        yield "accuracy_high", high
        yield "majority_accuracy", int(np.bincount(gold).max()) / n
        yield from statistics.label_scores(matrix).items()
        yield "nll", calibration.nll(P, gold)
        yield "brier", calibration.brier(P, gold)
        yield "ece", calibration.ece(P, gold)
        yield "ece_equal_mass", calibration.ece(P, gold, equal="mass")
        yield "classwise_ece", calibration.classwise_ece(P, gold)
        for name, value in (("auroc", calibration.auroc(P, gold)), ("confidence_auroc", calibration.confidence_auroc(P, gold))):
            if value is not None:  # some need two labels, or right and wrong predictions
                yield name, value
        yield "selective_accuracy", float(np.mean(calibration.selective_accuracy(P, gold)[1]))
        yield "label_mass", float(np.mean(np.exp(mass)))
        yield "examples", n
        lines = [json.dumps({
            "name": d.name, "label": d.label, "prediction": self._labels[p],
            "distribution": dict(zip(self._labels, map(float, probabilities))), "label_mass": float(np.exp(m)),
            "word_logprobs": {word: float(x) for (_, word, _), x in zip(self._words, logprobs)},
        }) for d, p, probabilities, m, logprobs in zip(self._documents, predicted, P, mass, words)]
        yield "predictions", Artifact(f"predictions/{self._name}-{{step}}.jsonl", "\n".join(lines) + "\n")
        yield "confusion", Artifact(f"confusion-{self._name}.png", plot_confusion(matrix, self._labels, f"{self._name}: accuracy {right / n:.1%}"))


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
