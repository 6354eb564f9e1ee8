"""What is held out of training, by the objective: the loss of texts and of answers, and what it
says of pairs and judged answers.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from lm.data import pack
from lm.data.pack import Encoder, evaluation_rows, numbered_rows
from lm.data.records import take
from lm.data.sources import Documents
from lm.data.units import Unit
from lm.evals.predict import Artifact, PredictFns, predictions_artifact
from lm.evals.prompts import check_least
from lm.evals.scores import statistics


class TextLoss:
    """Yields loss (nats per target), perplexity of the targets, and the targets and texts counted:
    what the objective makes of texts in training, such as masked tokens, or the targets of sources.
    What is drawn is the same whenever it is asked. The perplexity is one of a text only where
    targets are next tokens.

    Args:
      name: for messages.
      max_documents: number of texts, taken evenly out of the split; 0: all.

    Raises:
      ValueError: max_documents below 0; no targets.
    """

    asks = ("target_logprobs",)
    metrics = ("loss", "perplexity")
    examples = ("text", "seq2seq")

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        documents: Documents,
        encoder: Encoder,
        max_documents: int,
    ):
        check_least(f"config.evals.{name}.max_documents", max_documents, 0)
        chosen = list(take(documents, max_documents))
        self._predict_fns = predict_fns
        layout = pack.layout_of(documents.kind, encoder)
        windows = self._windows(chosen, encoder, predict_fns.length)
        self._rows = evaluation_rows(windows, predict_fns.length, layout)
        self._weights = np.stack([row["weights"] for row in self._rows])
        if not self._weights.any():
            raise ValueError(f"config.evals.{name}: nothing of it is a target")
        self.about = {"fingerprint": documents.fingerprint, "examples": len(chosen)}

    def _windows(self, texts: Sequence, encoder: Encoder, length: int) -> list[dict]:
        windows = []
        for number, text in enumerate(texts):
            if isinstance(text, Unit):
                windows.append(text.arrays)
            else:
                windows += encoder.windows(encoder.training(text), length, (0, 0, number))
        return windows

    def run(self, params) -> Iterator[tuple[str, float]]:
        logprobs = self._predict_fns.target_logprobs(params, self._rows)
        yield from self._losses(logprobs, "targets")

    def _losses(self, logprobs: np.ndarray, counted: str) -> Iterator[tuple[str, float]]:
        """What is yielded; the targets are called `counted`."""
        num_targets = float(self._weights.sum(dtype=np.float64))
        loss = -float(np.sum(logprobs * self._weights, dtype=np.float64)) / num_targets
        yield "loss", loss
        yield "perplexity", statistics.exp(loss)
        yield counted, num_targets
        yield "examples", self.about["examples"]


class AnswerLoss(TextLoss):
    """Yields loss (nats per learnt token), perplexity, and the tokens and answers counted.

    The arguments and errors are those of `TextLoss`.
    """

    asks = ("token_logprobs",)
    examples = ("conversation",)

    def run(self, params) -> Iterator[tuple[str, float]]:
        logprobs = self._predict_fns.token_logprobs(params, self._rows)
        yield from self._losses(logprobs, "tokens")


class Preferences:
    """Yields the mean of each of the objective's terms over pairs, or judged answers.

    Of pairs also the accuracy's 95% interval, and the accuracy of those whose better answer is
    longer, shorter or as long (`accuracy_longer`, `_shorter`, `_equal`; with their numbers), and
    that of each source (`SOURCE/accuracy`), where examples name one.

    The arguments and errors are those of `AnswerLoss`.
    """

    asks = ("unit_terms",)
    metrics = ("loss", "accuracy")
    examples = ("pair", "judged")

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        documents: Documents,
        encoder: Encoder,
        max_documents: int,
    ):
        check_least(f"config.evals.{name}.max_documents", max_documents, 0)
        self._name = name
        self._predict_fns = predict_fns
        self._units = list(take(documents, max_documents))

        self._rows = numbered_rows(self._units, predict_fns.length)
        self.about = {"fingerprint": documents.fingerprint, "examples": len(self._units)}

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        terms = self._by_unit(self._predict_fns.unit_terms(params, self._rows))
        for name, values in terms.items():
            yield name, float(np.mean(values, dtype=np.float64))
        if "accuracy" in terms:
            yield from self._accuracies(terms["accuracy"])
        yield "examples", len(self._units)

        lines = []
        for number, unit in enumerate(self._units):
            of_unit = {name: float(values[number]) for name, values in terms.items()}
            lines.append({"name": unit.name, "source": unit.source} | of_unit)
        yield "predictions", predictions_artifact(self._name, lines)

    def _by_unit(self, terms: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The terms in the units' order, [units] each."""
        weights = terms.pop("weight")
        order = []
        for row in self._rows:
            firsts = (row["positions"] == 0) & (row["segments"] % 2 == 1)
            order += row["number"][firsts].tolist()
        assert np.count_nonzero(weights) == len(order) == len(self._units)

        by_unit = {}
        for name, values in terms.items():
            by_unit[name] = np.empty(len(order), np.float32)
            by_unit[name][order] = values[weights > 0]
        return by_unit

    def _accuracies(self, right: np.ndarray) -> Iterator[tuple[str, float]]:
        low, high = statistics.proportion_interval(int(right.sum()), len(right))
        yield "accuracy_low", low
        yield "accuracy_high", high

        longer = np.asarray([_extra_tokens(unit) for unit in self._units])
        for name, chosen in dict(longer=longer > 0, shorter=longer < 0, equal=longer == 0).items():
            yield from _accuracy_of(f"accuracy_{name}", right[chosen])
            yield f"examples_{name}", int(chosen.sum())

        sources = np.asarray([unit.source for unit in self._units])
        for source in sorted(set(sources) - {""}):
            yield from _accuracy_of(f"{source}/accuracy", right[sources == source])


def _accuracy_of(name: str, right: np.ndarray) -> Iterator[tuple[str, float]]:
    """The share of right ones, where there are any."""
    if len(right):
        yield name, float(right.mean())


def _extra_tokens(unit: Unit) -> int:
    """How many tokens the better answer has more than the worse one."""
    learnt = unit.arrays["weights"]
    in_second = unit.arrays["part"] == 1
    return int(learnt[~in_second].sum() - learnt[in_second].sum())
