"""Scores of generated texts against references. Each is another project's own implementation, or
the data set's official one written again.
"""

import collections
import importlib.util
import itertools
import pathlib
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lm.evals.scores import statistics


class Score(NamedTuple):
    value: float
    low: float  # of its 95% bootstrap interval over examples
    high: float
    each: list[float] | None  # by example; None for scores of a whole corpus
    signature: str = ""  # sacreBLEU's, which says how the score was computed


# (prediction of each example, references of each example, one of TOKENIZERS) -> Score
CorpusScore = Callable[..., Score]

# How BLEU, ROUGE and f1 divide texts: sacreBLEU's names. By "13a" ROUGE takes rouge_score's own
# words, stemmed: runs of a to z and 0 to 9, and f1 what stands between white space. With the others
# they are sacreBLEU's, for ROUGE in lower case.
TOKENIZERS = ("13a", "intl", "zh", "char", "ja-mecab", "ko-mecab", "flores101", "flores200")


# Letters of Thai, Lao, Burmese, Khmer, Japanese and Chinese: no spaces stand between words.
WITHOUT_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def check_tokenizer(name: str, key: str) -> None:
    """Raises ValueError if one of TOKENIZERS can't be used here.

    Args:
      key: the configuration's key for it, for messages.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"{key} = {name!r}; valid: {list(TOKENIZERS)}")
    if name == "13a":
        return
    if importlib.util.find_spec("sacrebleu") is None:
        raise ValueError(f"{key} = {name!r} needs the package sacrebleu: pip install -e '.[evals]'")

    # sacreBLEU would download the model.
    if name.startswith("flores"):
        from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
        from sacrebleu.utils import SACREBLEU_DIR

        model = pathlib.Path(SACREBLEU_DIR) / "models" / SPM_MODELS[name]["url"].rpartition("/")[2]
        if not model.exists():
            raise ValueError(f"{key} = {name!r} needs {model}, from {SPM_MODELS[name]['url']}")
    try:
        _sacrebleu_tokens(name)
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"{key} = {name!r}: {' '.join(str(error).split())}") from None


def _sacrebleu_tokens(tokenizer: str) -> Callable[[str], list[str]]:
    """sacreBLEU's division of a text into tokens."""
    from sacrebleu.metrics import BLEU

    divide = BLEU(tokenize=tokenizer).tokenizer

    def tokens(text: str) -> list[str]:
        return divide(text).split()

    return tokens


class _RougeTokenizer:
    """What rouge_score takes as its tokenizer."""

    def __init__(self, tokenizer: str):
        self._tokens = _sacrebleu_tokens(tokenizer)

    def tokenize(self, text: str) -> list[str]:
        return self._tokens(text.lower())


def too_few_tokens(score: str, references: Sequence[Sequence[str]], tokenizer: str) -> str:
    """Says in words why a score is 0 for references whatever the answers are, or sees a sentence as
    one word; "" if it doesn't.
    """
    texts = list(itertools.chain.from_iterable(references))
    if score == "f1" and tokenizer == "13a":
        num_unspaced = sum(WITHOUT_SPACES.search(text) is not None for text in texts)
        if num_unspaced:
            return f"{num_unspaced} of {len(texts)} references have no spaces between their words"
    if score.startswith("rouge"):
        from rouge_score.tokenizers import DefaultTokenizer

        rouge = DefaultTokenizer(True) if tokenizer == "13a" else _RougeTokenizer(tokenizer)
        num_empty = sum(not rouge.tokenize(text) for text in texts)
        if num_empty:
            return f"{num_empty} of {len(texts)} references have no token"
    if score.startswith("bleu"):
        tokens = _sacrebleu_tokens(tokenizer)
        # Of four tokens is the longest n-gram that it counts.
        if all(len(tokens(text)) < 4 for text in texts):
            return f"none of {len(texts)} references has four tokens"
    return ""


def normalize_squad(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space: SQuAD's normalisation
    (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1).
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def normalize_unicode(text: str) -> str:
    """Lower case, without any script's punctuation, and repeated white space. Articles stay: what
    they are differs by language.
    """
    kept = []
    for c in text.lower():
        if c not in string.punctuation and not unicodedata.category(c).startswith("P"):
            kept.append(c)
    return " ".join("".join(kept).split())


def normalize_number(text: str) -> str:
    """A number without thousands' commas, currency signs, a point at its end, and decimals that are
    zeros (.0, .00).
    """
    text = text.strip().replace(",", "").replace("$", "").removesuffix(".")
    return text.removesuffix(".0").removesuffix(".00")


NORMALIZE: dict[str, Callable[[str], str]] = {
    "none": str.strip,
    "squad": normalize_squad,
    "unicode": normalize_unicode,
    "number": normalize_number,
}


def exact_match(prediction: str, reference: str) -> float:
    return float(prediction == reference)


def f1(prediction: str, reference: str, words: Callable[[str], list[str]] = str.split) -> float:
    """F1 of the two bags of words (Rajpurkar et al. 2016, section 6.1). If either is empty it is 1
    where both are, else 0, as in SQuAD 2.0's script.

    Args:
      words: divides a text.
    """
    predicted_words = words(prediction)
    reference_words = words(reference)
    if not predicted_words or not reference_words:
        return float(predicted_words == reference_words)

    shared = collections.Counter(predicted_words) & collections.Counter(reference_words)
    return 2 * sum(shared.values()) / (len(predicted_words) + len(reference_words))


def _mean_over_examples(metric: Callable[[str, str], float]) -> CorpusScore:
    """The mean over examples of `metric(prediction, reference)` with the best reference."""

    def score(
        predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a"
    ) -> Score:
        best = []
        for prediction, texts in zip(predictions, references):
            best.append(max(metric(prediction, reference) for reference in texts))

        values = np.array(best)
        low, high = statistics.bootstrap_interval(lambda index: values[index].mean(), len(values))
        return Score(float(values.mean()), low, high, values.tolist())

    return score


def _f1(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a"
) -> Score:
    """The mean of `f1` over examples."""
    words = str.split if tokenizer == "13a" else _sacrebleu_tokens(tokenizer)

    def f_measure(prediction: str, reference: str) -> float:
        return f1(prediction, reference, words)

    return _mean_over_examples(f_measure)(predictions, references)


def _rouge(variant: str) -> CorpusScore:
    """rouge_score's F-measure, stemmed (Lin 2004).

    Args:
      variant: "rouge1", "rouge2", "rougeL", or "rougeLsum", where lines are sentences.
    """

    def score(
        predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a"
    ) -> Score:
        from rouge_score import rouge_scorer

        own_tokenizer = None if tokenizer == "13a" else _RougeTokenizer(tokenizer)
        scorer = rouge_scorer.RougeScorer([variant], use_stemmer=True, tokenizer=own_tokenizer)

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

    def score(
        predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "13a"
    ) -> Score:
        import sacrebleu.metrics

        # sacreBLEU takes references by column: all first ones, all second ones, and so on. None
        # stands where an example has fewer.
        columns = []
        for i in range(max(map(len, references))):
            columns.append([texts[i] if i < len(texts) else None for texts in references])

        # The others count characters, or words as they are.
        tokenize = {"tokenize": tokenizer} if metric == "BLEU" else {}
        scorer = getattr(sacrebleu.metrics, metric)(**options, **tokenize)
        result = scorer.corpus_score(list(predictions), columns, n_bootstrap=1000)
        low = result._mean - result._ci
        high = result._mean + result._ci
        signature = str(scorer.get_signature())
        return Score(float(result.score), float(low), float(high), None, signature)

    return score


SCORES: dict[str, CorpusScore] = {
    "exact_match": _mean_over_examples(exact_match),
    "f1": _f1,
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "rougeLsum": _rouge("rougeLsum"),
    "bleu": _sacrebleu("BLEU"),
    "bleu_lc": _sacrebleu("BLEU", lowercase=True),
    "chrf": _sacrebleu("CHRF"),
    "chrf++": _sacrebleu("CHRF", word_order=2),
    "ter": _sacrebleu("TER"),
}

# Those of SCORES that need one: it is imported only when the score is computed.
PACKAGES = {
    "rouge1": "rouge_score",
    "rouge2": "rouge_score",
    "rougeL": "rouge_score",
    "rougeLsum": "rouge_score",
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
