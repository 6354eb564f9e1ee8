"""Verbalizers: the words of each label as token sequences after a prompt, and what is made of their
log-probabilities.

All scores are functions of one array, the log-probability of every token of every word: none needs
the model again.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from lm.evals.tree import common_length

BOUNDARIES = ("strict", "common_prefix", "lm_eval")
NORMS = ("none", "token", "char", "byte")
AGGREGATES = ("sum", "mean", "max", "logmeanexp")


def split(
    encode_batch: Callable[[Sequence[str]], list[list[int]]],
    prompt: str,
    words: Sequence[str],
    boundary: str,
) -> tuple[list[int], list[list[int]]]:
    """(ids of the prompt, ids of each word after it). The words are those that a reader of prompt +
    word would see; where a tokenizer merges across the boundary, `boundary` says what happens.

    strict: an error. common_prefix: what all joined texts and the prompt have in common is the
    prompt, the rest is each word's, so that every word is scored from the same point. lm_eval: as
    lm-evaluation-harness 0.4 does, for comparisons with it: white space at the prompt's end goes to
    the word, and of the joined text as many ids as the prompt has are cut off, be they the prompt's
    or not.

    Args:
      encode_batch: the ids of texts, without special ones; whoever calls puts BOS before them.

    Raises:
      ValueError: an unknown boundary; a word that is left without tokens; strict: a prompt that
        isn't tokenized as itself before one of the words.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary = {boundary!r}; valid: {list(BOUNDARIES)}")
    if boundary == "lm_eval" and (stripped := prompt.rstrip()) != prompt:
        prompt, words = stripped, [prompt[len(stripped) :] + word for word in words]
    ids, *joined = encode_batch([prompt, *(prompt + word for word in words)])
    length = len(ids)
    if boundary == "strict":
        for word, whole in zip(words, joined):
            if whole[:length] != ids:
                raise ValueError(
                    f"{word!r} after {prompt[-20:]!r} is not tokenized as the prompt and "
                    f"something more ({whole[max(length - 3, 0) :]}, the prompt ends {ids[-3:]}): "
                    "begin the word, or end the prompt, elsewhere, or take boundary = "
                    "'common_prefix'"
                )
    if boundary == "common_prefix":
        length = min(common_length(ids, whole) for whole in joined)
    for word, whole in zip(words, joined):
        if len(whole) <= length:
            raise ValueError(
                f"{word!r} after {prompt[-20:]!r} has no tokens of its own: the tokenizer merges "
                "it with the prompt"
                + (
                    ", and boundary = 'lm_eval' cuts it off; take 'common_prefix'"
                    if boundary == "lm_eval"
                    else ""
                )
            )
    return (ids if boundary == "lm_eval" else ids[:length]), [whole[length:] for whole in joined]


def audit(labels: Sequence[str], words: Sequence[tuple[int, str, list[int]]]) -> None:
    """Checks words, each (its label's index, the word, its token ids), against each other.

    Raises:
      ValueError: a label twice, or without words; a word without tokens; two words with the same
        tokens, or one that another begins with: the shorter could never score below the longer.
    """
    if len(labels) != len(set(labels)):
        raise ValueError(f"the verbalizer has a label twice: {list(labels)}")
    for i, label in enumerate(labels):
        if not any(k == i for k, _, _ in words):
            raise ValueError(f"the verbalizer has no word for the label {label!r}")
    for number, (i, word, ids) in enumerate(words):
        if not ids:
            raise ValueError(f"the verbalizer's word {word!r} of {labels[i]!r} has no tokens")
        for other_number, (k, other, longer) in enumerate(words):
            if other_number != number and longer[: len(ids)] == ids:
                how = "are the same tokens" if ids == longer else "begin with the same tokens"
                raise ValueError(
                    f"the verbalizer's words {word!r} of {labels[i]!r} and {other!r} of "
                    f"{labels[k]!r} {how} ({ids} and {longer}): the model can't tell them apart. "
                    "Change a word, or take a tokenizer that splits them otherwise."
                )


def audit_spaces(end: str, words: Sequence[str]) -> None:
    """Checks words against the end of the text that stands before all of them, "" if that differs.

    Raises:
      ValueError: two spaces would meet, or none stand between two words: either is spelt in other
        tokens than what was meant.
    """
    for word in words:
        if end.endswith(" ") and word.startswith(" "):
            raise ValueError(
                f"the prompt ends {end[-20:]!r} and the word is {word!r}: two spaces would meet; "
                "end the prompt without one"
            )
        if (
            end
            and word
            and (end[-1].isalnum() or end[-1] in ".,:;!?)")
            and end.isascii()
            and word[0].isascii()
            and word[0].isalnum()
        ):
            raise ValueError(
                f"the prompt ends {end[-20:]!r} and the word is {word!r}, with nothing between "
                "them: begin the word with a space"
            )


def audit_round_trip(
    decode: Callable[[list[int]], str],
    prompt: Sequence[int],
    words: Sequence[tuple[str, Sequence[int]]],
) -> None:
    """Checks that words, each with its ids after a prompt, come back from the tokenizer as they
    are.

    Raises:
      ValueError: one doesn't: the tokenizer has no such characters, or writes them otherwise, and
        another text would be scored.
    """
    for word, ids in words:
        if not (said := decode([*prompt, *ids])).rstrip().endswith(word.strip()):
            raise ValueError(
                f"the word {word!r} comes back from the tokenizer as {said[-len(word) - 10 :]!r}: "
                "write it as the tokenizer does, or take another"
            )


class WordLogprobs(NamedTuple):
    """Of n prompts and W words of at most T tokens."""

    tokens: np.ndarray  # [n, W, T], the log-probability of each token, 0 behind a word's last
    num_tokens: np.ndarray  # [n, W]
    label: np.ndarray  # [W], the label's index
    num_chars: np.ndarray  # [W], without the space before a word
    num_bytes: np.ndarray  # [W], in UTF-8, without that space


def word_logprobs(
    paths: Sequence[Sequence[np.ndarray]], label: Sequence[int], words: Sequence[str]
) -> WordLogprobs:
    """From the log-probabilities of each word's tokens, prompt by prompt."""
    num_tokens = np.array([[len(path) for path in row] for row in paths])
    tokens = np.zeros((*num_tokens.shape, num_tokens.max()))
    for i, row in enumerate(paths):
        for j, path in enumerate(row):
            tokens[i, j, : len(path)] = path
    bare = [word.lstrip() for word in words]
    return WordLogprobs(
        tokens,
        num_tokens,
        np.asarray(label),
        np.array([len(word) for word in bare]),
        np.array([len(word.encode()) for word in bare]),
    )


def word_scores(logprobs: WordLogprobs, norm: str = "none") -> np.ndarray:
    """[n, W] scores of the words: the log-probability of the word as a sequence, over 1 ("none"),
    its tokens, characters or bytes.

    lm-evaluation-harness's acc, acc_norm and acc_bytes are those with "none", "char" and "byte".
    Sums favour short words (Brown et al. 2020, arXiv 2005.14165, section 2.4); over bytes they
    don't depend on the tokenizer (Biderman et al. 2024, arXiv 2405.14782, appendix A).

    Raises:
      ValueError: another norm.
    """
    if norm not in NORMS:
        raise ValueError(f"length_norm = {norm!r}; valid: {list(NORMS)}")
    total = logprobs.tokens.sum(axis=2)
    return (
        total
        / {
            "none": np.ones(1),
            "token": logprobs.num_tokens,
            "char": logprobs.num_chars,
            "byte": logprobs.num_bytes,
        }[norm]
    )


def label_scores(
    words: np.ndarray, label: np.ndarray, aggregate: str = "sum", weights: np.ndarray | None = None
) -> np.ndarray:
    """[n, K] scores of the labels out of word scores [n, W]: log of the sum of their probabilities
    ("sum": the probability of the label, if the words are log-probabilities; `weights` [W]
    multiplies each), the mean of the logs (OpenPrompt's ManualVerbalizer, Ding et al. 2022, arXiv
    2111.01998), the best word's ("max"), or "logmeanexp": "sum" without its favour for labels of
    many words.

    Raises:
      ValueError: another aggregate; weights for one that takes none, or that aren't positive.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate = {aggregate!r}; valid: {list(AGGREGATES)}")
    if weights is not None:
        if aggregate != "sum" or len(weights) != len(label) or (np.asarray(weights) <= 0).any():
            raise ValueError(
                f"word weights {weights}, aggregate = {aggregate!r}: wanted a positive one for "
                f"each of {len(label)} words, and 'sum'"
            )
        words = words + np.log(weights)
    of = {
        "sum": lambda x: logsumexp(x, axis=1),
        "mean": lambda x: x.mean(axis=1),
        "max": lambda x: x.max(axis=1),
        "logmeanexp": lambda x: logsumexp(x, axis=1) - np.log(x.shape[1]),
    }[aggregate]
    return np.stack([of(words[:, label == k]) for k in range(label.max() + 1)], axis=1)


def label_mass(logprobs: WordLogprobs) -> np.ndarray:
    """[n], the probability of all words together: how much of the model's belief the verbalizer
    sees. A low one says that the words or the boundary are wrong.
    """
    return np.exp(logsumexp(word_scores(logprobs), axis=1))
