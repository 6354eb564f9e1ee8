"""Scores of generated texts against references. Each is another project's own implementation, or
the data set's official one told again.
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
    each: list[float] | None  # of the examples; None where there is only one for all


def squad(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation, articles and white space beyond one
    (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1).
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def number(text: str) -> str:
    """A number without thousands' commas, currency signs, and a last point."""
    text = text.strip().replace(",", "").replace("$", "").removesuffix(".")
    return text.removesuffix(".0").removesuffix(".00")


NORMALIZE: dict[str, Callable[[str], str]] = {"none": str.strip, "squad": squad, "number": number}


def exact_match(prediction: str, reference: str) -> float:
    return float(prediction == reference)


def f1(prediction: str, reference: str) -> float:
    """Of the two bags of words, 1 if both are empty (Rajpurkar et al. 2016, section 6.1; SQuAD
    2.0's script for empty ones).
    """
    ours, theirs = prediction.split(), reference.split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def _mean(
    of: Callable[[str, str], float],
) -> Callable[[Sequence[str], Sequence[Sequence[str]]], Score]:
    """Each example against its best reference, then the mean."""

    def score(predictions, references):
        each = np.array(
            [
                max(of(prediction, one) for one in several)
                for prediction, several in zip(predictions, references)
            ]
        )
        return Score(
            float(each.mean()),
            *statistics.bootstrap_interval(lambda index: each[index].mean(), len(each)),
            each.tolist(),
        )

    return score


def require(name: str) -> None:
    """Raises ValueError if the package of a score isn't there."""
    package = (
        "rouge_score"
        if name.startswith("rouge")
        else "sacrebleu"
        if name in ("bleu", "chrf", "chrf++", "ter")
        else "numpy"
    )
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{name} needs the package {package}: pip install 'lm[evals]'")


def _rouge(kind: str):
    """rouge_score's F-measure, stemmed (Lin 2004)."""

    def score(predictions, references):
        from rouge_score import rouge_scorer

        scorer = rouge_scorer.RougeScorer([kind], use_stemmer=True)
        return _mean(lambda prediction, one: scorer.score(one, prediction)[kind].fmeasure)(
            predictions, references
        )

    return score


def _sacrebleu(name: str, **options):
    """sacreBLEU's (Post 2018, arXiv 1804.08771), of the corpus, 0 to 100, with its own
    bootstrap.
    """

    def score(predictions, references):
        import sacrebleu.metrics

        most = max(map(len, references))
        columns = [
            [several[i] if i < len(several) else None for several in references]
            for i in range(most)
        ]
        found = getattr(sacrebleu.metrics, name)(**options).corpus_score(
            list(predictions), columns, n_bootstrap=1000
        )
        return Score(
            float(found.score), float(found._mean - found._ci), float(found._mean + found._ci), None
        )

    return score


SCORES = {
    "exact_match": _mean(exact_match),
    "f1": _mean(f1),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "bleu": _sacrebleu("BLEU"),
    "chrf": _sacrebleu("CHRF"),
    "chrf++": _sacrebleu("CHRF", word_order=2),
    "ter": _sacrebleu("TER"),
}
