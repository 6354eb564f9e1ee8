"""From the log-probabilities of label words to label distributions.

One array holds the log-probability of every token of every label word after every prompt. All
scores are functions of this array, so that none of them needs the model again.

Letters in shapes: n prompts, W words, T tokens, K labels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.evals.scores import calibration

NORMS = ("none", "token", "char", "byte")
AGGREGATES = ("sum", "mean", "max", "logmeanexp")


class LabelWord(NamedTuple):
    """A word that stands for a label."""

    label: int  # index of the label
    text: str  # with the space before it


class WordLogprobs(NamedTuple):
    """Log-probabilities of W words of at most T tokens after n prompts."""

    tokens: np.ndarray  # [n, W, T], of each token; 0 behind a word's last token
    num_tokens: np.ndarray  # [n, W]
    labels: np.ndarray  # [W], index of the label that the word stands for
    num_chars: np.ndarray  # [W], without the space before the word
    num_bytes: np.ndarray  # [W], in UTF-8, without that space


def pad_word_logprobs(
    logprobs: Sequence[Sequence[np.ndarray]], words: Sequence[LabelWord]
) -> WordLogprobs:
    """Puts log-probabilities of words of different lengths into one array.

    Args:
      logprobs: for each prompt and each word, the log-probabilities of the word's tokens.
      words: the words in the same order.
    """
    num_tokens = np.array([list(map(len, row)) for row in logprobs])

    # Zeros behind a word's last token leave the sum over its tokens as it is.
    tokens = np.zeros((*num_tokens.shape, num_tokens.max()))
    for i, row in enumerate(logprobs):
        for j, word_tokens in enumerate(row):
            tokens[i, j, : len(word_tokens)] = word_tokens

    # The space before a word belongs to its tokens, but not to its length in a text.
    texts = [word.text.lstrip() for word in words]
    return WordLogprobs(
        tokens,
        num_tokens,
        labels=np.array([word.label for word in words]),
        num_chars=np.array([len(text) for text in texts]),
        num_bytes=np.array([len(text.encode()) for text in texts]),
    )


def word_scores(logprobs: WordLogprobs, length_norm: str = "none") -> np.ndarray:
    """Scores of the words: the log-probability of a word's tokens as a sequence, divided by 1
    ("none"), or by the number of its tokens, characters or bytes.

    "none", "char" and "byte" are acc, acc_norm and acc_bytes of lm-evaluation-harness. Sums favour
    short words (Brown et al. 2020, arXiv 2005.14165, section 2.4). A score per byte does not depend
    on the tokenizer (Biderman et al. 2024, arXiv 2405.14782, appendix A).

    Returns:
      [n, W]

    Raises:
      ValueError: an unknown norm.
    """
    total = logprobs.tokens.sum(axis=2)
    if length_norm == "none":
        return total
    if length_norm == "token":
        return total / logprobs.num_tokens
    if length_norm == "char":
        return total / logprobs.num_chars
    if length_norm == "byte":
        return total / logprobs.num_bytes
    raise ValueError(f"length_norm = {length_norm!r}; valid: {list(NORMS)}")


def check_word_weights(
    word_weights: np.ndarray | None, aggregate: str, num_words: int, key: str = "word weights"
) -> None:
    """Raises ValueError for weights that are not one positive number for each word, and for an
    aggregate that takes none.

    Args:
      key: what messages call the weights.
    """
    if word_weights is None:
        return
    if aggregate != "sum" or len(word_weights) != num_words or (word_weights <= 0).any():
        raise ValueError(
            f"{key} = {word_weights}, aggregate = {aggregate!r}: wanted a positive one for "
            f"each of {num_words} words, and 'sum'"
        )


def label_scores(
    words: np.ndarray,
    labels: np.ndarray,
    aggregate: str = "sum",
    word_weights: np.ndarray | None = None,
) -> np.ndarray:
    """Scores of the labels, each out of the scores of its words.

    sum: log of the sum of the words' probabilities, which is the label's log-probability if the
    scores are log-probabilities. mean: mean of the scores (the ManualVerbalizer of OpenPrompt, Ding
    et al. 2022, arXiv 2111.01998). max: score of the best word. logmeanexp: "sum" without its
    favour for labels of many words.

    Args:
      words: [n, W] scores of the words.
      labels: [W], index of the label of each word.
      word_weights: [W], factors of the words' probabilities for "sum"; None: all 1.

    Returns:
      [n, K]

    Raises:
      ValueError: an unknown aggregate, or see `check_word_weights`.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate = {aggregate!r}; valid: {list(AGGREGATES)}")
    check_word_weights(word_weights, aggregate, len(labels))

    # Scores are logarithms: this multiplies the probabilities.
    if word_weights is not None:
        words = words + np.log(word_weights)

    scores = []
    for k in range(labels.max() + 1):
        scores.append(_aggregate(words[:, labels == k], aggregate))
    return np.stack(scores, axis=1)


def _aggregate(words: np.ndarray, aggregate: str) -> np.ndarray:
    """[n] scores of one label out of the scores [n, words] of its words."""
    if aggregate == "mean":
        return words.mean(axis=1)
    if aggregate == "max":
        return words.max(axis=1)

    from scipy.special import logsumexp  # a fifth of a second: only where used

    total = logsumexp(words, axis=1)
    if aggregate == "logmeanexp":
        return total - np.log(words.shape[1])
    return total


def label_mass(logprobs: WordLogprobs, num_tokens: int = 0) -> np.ndarray:
    """Probability of all label words together, [n]: how much of the model's distribution the
    verbalizer sees. A low one says that the words, or the boundary before them, are wrong.

    Args:
      num_tokens: counts the words of so many tokens only, which a masked model tells from each
        other; 0: all.
    """
    from scipy.special import logsumexp

    scores = word_scores(logprobs)
    if num_tokens:
        scores = np.where(logprobs.num_tokens == num_tokens, scores, -np.inf)
    return np.exp(logsumexp(scores, axis=1))


class LabelScorer(NamedTuple):
    """The steps from the log-probabilities of words to a distribution over labels.

    Attributes:
      length_norm: see `word_scores`.
      aggregate, word_weights: see `label_scores`.
    """

    length_norm: str = "none"
    aggregate: str = "sum"
    word_weights: np.ndarray | None = None

    def distributions(self, logprobs: WordLogprobs) -> np.ndarray:
        """Softmax of the label scores, [n, K]."""
        words = word_scores(logprobs, self.length_norm)
        scores = label_scores(words, logprobs.labels, self.aggregate, self.word_weights)
        return calibration.softmax(scores)
