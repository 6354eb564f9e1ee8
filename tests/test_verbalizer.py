"""Words after prompts, and scores out of their log-probabilities."""

import numpy as np
import pytest
from scipy.special import logsumexp

from lm.evals import verbalizer

# What GPT-2's merges do at boundaries, in a vocabulary of our own: the longest piece that fits is
# taken.
PIECES = [
    "Answer",
    ":",
    " positive",
    "positive",
    " ",
    "\n",
    "Sentiment",
    "good",
    " good",
    "The",
    " is",
    " un",
    " unhappy",
    "happy",
    " happy",
    "x",
    "=",
    " ==",
    " ===",
    "==",
    "y",
    " y",
    " =",
    " = [",
    " = []",
    "]",
    "He",
    " said",
    ' "',
    '"',
    '"hello',
    ' ""',
    "hello",
    "http",
    "://",
    "//",
    "a",
    ".",
    "b",
    "A",
    " A",
]


def encode(text):
    ids = []
    while text:
        piece = max((p for p in PIECES if text.startswith(p)), key=len)
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


def encode_batch(texts):
    return [encode(text) for text in texts]


def spell(ids):
    return [PIECES[i] for i in ids]


def split(prompt, word, boundary):
    ids, (found,) = verbalizer.split(encode_batch, prompt, [word], boundary)
    return spell(ids), spell(found)


def test_plain():
    for boundary in verbalizer.BOUNDARIES:
        assert split("Answer:", " positive", boundary) == (["Answer", ":"], [" positive"])


def test_white_space_at_the_end():
    """lm_eval gives it to the word: one token there where the word begins with it, one too many
    where it doesn't.
    """
    assert split("Answer: ", "positive", "lm_eval") == (["Answer", ":"], [" positive"])
    assert split("Answer: ", "positive", "common_prefix") == (["Answer", ":"], [" positive"])
    with pytest.raises(
        ValueError,
        match="'positive' after 'Answer: ' is not tokenized as the prompt and something more",
    ):
        split("Answer: ", "positive", "strict")
    assert split("Sentiment:\n", "good", "lm_eval") == (["Sentiment", ":"], ["\n", "good"])
    assert (
        split("Sentiment:\n", "good", "strict")
        == split("Sentiment:\n", "good", "common_prefix")
        == (["Sentiment", ":", "\n"], ["good"])
    )


@pytest.mark.parametrize("prompt, word", [("The is un", "happy"), ("x = [", "]")])
def test_a_word_that_is_merged_with_the_prompt(prompt, word):
    """lm-evaluation-harness is left with nothing to score; scored from the common point it is all
    there.
    """
    with pytest.raises(ValueError, match="has no tokens of its own: .*'common_prefix'"):
        split(prompt, word, "lm_eval")
    with pytest.raises(ValueError, match="begin the word, or end the prompt, elsewhere"):
        split(prompt, word, "strict")
    ids, found = split(prompt, word, "common_prefix")
    assert "".join(ids + found) == prompt + word and found


@pytest.mark.parametrize(
    "prompt, word, wrong", [("x ==", "= y", "x == y"), ('He said "', '"hello', 'He said "hello')]
)
def test_a_word_that_is_cut_in_two(prompt, word, wrong):
    """lm-evaluation-harness scores another text than the one asked for."""
    ids, found = split(prompt, word, "lm_eval")
    assert "".join(ids + found) == wrong != prompt + word
    ids, found = split(prompt, word, "common_prefix")
    assert "".join(ids + found) == prompt + word
    with pytest.raises(ValueError, match="is not tokenized as the prompt"):
        split(prompt, word, "strict")


def test_all_words_begin_at_the_same_point():
    ids, words = verbalizer.split(encode_batch, "The is un", ["happy", " good"], "common_prefix")
    assert spell(ids) == ["The", " is"] and [spell(w) for w in words] == [
        [" unhappy"],
        [" un", " good"],
    ]


def test_unknown_boundary():
    with pytest.raises(
        ValueError, match=r"boundary = 'loose'; valid: \['strict', 'common_prefix', 'lm_eval'\]"
    ):
        verbalizer.split(encode_batch, "A", ["b"], "loose")


RNG = np.random.default_rng(0)
WORDS = ["red", "dark red", " green", "blé"]
PATHS = [[-RNG.random(n) * 5 for n in (1, 3, 2, 2)] for _ in range(6)]
LOGPROBS = verbalizer.word_logprobs(PATHS, [0, 0, 1, 2], WORDS)


def test_word_scores():
    total = np.array([[path.sum() for path in row] for row in PATHS])
    for norm, sizes in (
        ("none", [1] * 4),
        ("token", [1, 3, 2, 2]),
        ("char", [3, 8, 5, 3]),
        ("byte", [3, 8, 5, 4]),
    ):
        np.testing.assert_allclose(verbalizer.word_scores(LOGPROBS, norm), total / sizes)
    np.testing.assert_allclose(verbalizer.label_mass(LOGPROBS), np.exp(total).sum(axis=1))
    with pytest.raises(
        ValueError, match=r"length_norm = 'line'; valid: \['none', 'token', 'char', 'byte'\]"
    ):
        verbalizer.word_scores(LOGPROBS, "line")


def test_label_scores():
    words = verbalizer.word_scores(LOGPROBS)
    of = lambda aggregate, **more: verbalizer.label_scores(words, LOGPROBS.label, aggregate, **more)
    for aggregate, first in (
        ("sum", np.log(np.exp(words[:, :2]).sum(1))),
        ("mean", words[:, :2].mean(1)),
        ("max", words[:, :2].max(1)),
        ("logmeanexp", np.log(np.exp(words[:, :2]).mean(1))),
    ):
        np.testing.assert_allclose(
            of(aggregate), np.stack([first, words[:, 2], words[:, 3]], axis=1)
        )
    weights = np.array([0.5, 2.0, 1.0, 1.0])
    np.testing.assert_allclose(
        of("sum", weights=weights)[:, 0], logsumexp(words[:, :2], axis=1, b=weights[:2])
    )
    np.testing.assert_allclose(of("sum", weights=np.ones(4)), of("sum"))
    # Labels permuted: the scores are.
    np.testing.assert_allclose(
        verbalizer.label_scores(words, np.array([2, 2, 0, 1]), "sum"), of("sum")[:, [1, 2, 0]]
    )
    with pytest.raises(
        ValueError, match=r"aggregate = 'first'; valid: \['sum', 'mean', 'max', 'logmeanexp'\]"
    ):
        of("first")
    for bad in (
        dict(aggregate="max", weights=weights),
        dict(aggregate="sum", weights=weights[:2]),
        dict(aggregate="sum", weights=-weights),
    ):
        with pytest.raises(ValueError, match="wanted a positive one for each of 4 words"):
            of(**bad)
