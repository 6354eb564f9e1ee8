"""Scores of generated texts against references. Each is another project's own implementation, or
the data set's official one written again.
"""

import collections
import importlib.util
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lm.evals.scores import statistics


class Score(NamedTuple):
    value: float
    low: float  # of its 95% bootstrap interval over examples
    high: float
    each: list[float] | None  # by example; None for scores of a whole corpus


# (prediction of each example, references of each example) -> Score
CorpusScore = Callable[[Sequence[str], Sequence[Sequence[str]]], Score]


def normalize_squad(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space: SQuAD's normalisation
    (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1).
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def normalize_number(text: str) -> str:
    """A number without thousands' commas, currency signs, a point at its end, and decimals that are
    zeros (.0, .00).
    """
    text = text.strip().replace(",", "").replace("$", "").removesuffix(".")
    return text.removesuffix(".0").removesuffix(".00")


NORMALIZE: dict[str, Callable[[str], str]] = {
    "none": str.strip,
    "squad": normalize_squad,
    "number": normalize_number,
}


def exact_match(prediction: str, reference: str) -> float:
    return float(prediction == reference)


def f1(prediction: str, reference: str) -> float:
    """F1 of the two bags of words (Rajpurkar et al. 2016, section 6.1). If either is empty it is 1
    where both are, else 0, as in SQuAD 2.0's script.
    """
    predicted_words = prediction.split()
    reference_words = reference.split()
    if not predicted_words or not reference_words:
        return float(predicted_words == reference_words)

    shared = collections.Counter(predicted_words) & collections.Counter(reference_words)
    return 2 * sum(shared.values()) / (len(predicted_words) + len(reference_words))


def _mean_over_examples(metric: Callable[[str, str], float]) -> CorpusScore:
    """The mean over examples of `metric(prediction, reference)` with the best reference."""

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        best = []
        for prediction, texts in zip(predictions, references):
            best.append(max(metric(prediction, reference) for reference in texts))

        values = np.array(best)
        low, high = statistics.bootstrap_interval(lambda index: values[index].mean(), len(values))
        return Score(float(values.mean()), low, high, values.tolist())

    return score


def _rouge(variant: str) -> CorpusScore:
    """rouge_score's F-measure, stemmed (Lin 2004).

    Args:
      variant: "rouge1", "rouge2" or "rougeL".
    """

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        from rouge_score import rouge_scorer

        scorer = rouge_scorer.RougeScorer([variant], use_stemmer=True)

        def f_measure(prediction: str, reference: str) -> float:
            return scorer.score(reference, prediction)[variant].fmeasure

        return _mean_over_examples(f_measure)(predictions, references)

    return score


def _sacrebleu(metric: str, **options) -> CorpusScore:
    """sacreBLEU's score of a corpus (Post 2018, arXiv 1804.08771), 0 to 100, with its own bootstrap
    interval.

    Args:
      metric: a class of sacrebleu.metrics, which takes `options`.
    """

    def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        import sacrebleu.metrics

        # sacreBLEU takes references by column: all first ones, all second ones, and so on. None
        # stands where an example has fewer.
        columns = []
        for i in range(max(map(len, references))):
            columns.append([texts[i] if i < len(texts) else None for texts in references])

        scorer = getattr(sacrebleu.metrics, metric)(**options)
        result = scorer.corpus_score(list(predictions), columns, n_bootstrap=1000)
        low = result._mean - result._ci
        high = result._mean + result._ci
        return Score(float(result.score), float(low), float(high), None)

    return score


SCORES: dict[str, CorpusScore] = {
    "exact_match": _mean_over_examples(exact_match),
    "f1": _mean_over_examples(f1),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "bleu": _sacrebleu("BLEU"),
    "chrf": _sacrebleu("CHRF"),
    "chrf++": _sacrebleu("CHRF", word_order=2),
    "ter": _sacrebleu("TER"),
}

# Those of SCORES that need one: it is imported only when the score is computed.
PACKAGES = {
    "rouge1": "rouge_score",
    "rouge2": "rouge_score",
    "rougeL": "rouge_score",
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
    "chrf++": "sacrebleu",
    "ter": "sacrebleu",
}


def require_package(score: str) -> None:
    """Raises ValueError if the package that a score needs isn't installed."""
    package = PACKAGES.get(score)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(f"{score} needs the package {package}: pip install -e '.[evals]'")
