"""Words after prompts: where the tokens of a prompt end and those of a word begin."""

import pytest

from lm.evals import verbalizer

# A small vocabulary with the merges that GPT-2's tokenizer makes at boundaries. The longest piece
# that fits is taken.
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
        piece = max(filter(text.startswith, PIECES), key=len)
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


def encode_batch(texts):
    return list(map(encode, texts))


def spell(ids):
    return [PIECES[i] for i in ids]


def split(prompt, word, boundary):
    """(pieces of the prompt, pieces of the word)"""
    prompt_ids, (word_ids,) = verbalizer.tokenize_words_after(
        encode_batch, prompt, [word], boundary
    )
    return spell(prompt_ids), spell(word_ids)


@pytest.mark.parametrize("boundary", verbalizer.BOUNDARIES)
def test_no_merge_at_the_boundary(boundary):
    assert split("Answer:", " positive", boundary) == (["Answer", ":"], [" positive"])


def test_white_space_at_the_end():
    """lm_eval gives it to the word. That is one token where the word begins with the space, one too
    many where it doesn't.
    """
    assert split("Answer: ", "positive", "lm_eval") == (["Answer", ":"], [" positive"])
    assert split("Answer: ", "positive", "common_prefix") == (["Answer", ":"], [" positive"])
    with pytest.raises(
        ValueError,
        match="'positive' after 'Answer: ' is not tokenized as the prompt and something more",
    ):
        split("Answer: ", "positive", "strict")

    # A line break is no part of the word's token: here lm_eval scores one too many.
    expected = ["Sentiment", ":", "\n"], ["good"]
    assert split("Sentiment:\n", "good", "lm_eval") == (["Sentiment", ":"], ["\n", "good"])
    assert split("Sentiment:\n", "good", "strict") == expected
    assert split("Sentiment:\n", "good", "common_prefix") == expected


@pytest.mark.parametrize("prompt, word", [("The is un", "happy"), ("x = [", "]")])
def test_a_word_that_is_merged_with_the_prompt(prompt, word):
    """lm-evaluation-harness is left with nothing to score; scored from the common point it is all
    there.
    """
    with pytest.raises(ValueError, match="has no tokens of its own: .*'common_prefix'"):
        split(prompt, word, "lm_eval")
    with pytest.raises(ValueError, match="begin the word, or end the prompt, elsewhere"):
        split(prompt, word, "strict")

    prompt_pieces, word_pieces = split(prompt, word, "common_prefix")
    assert "".join(prompt_pieces + word_pieces) == prompt + word
    assert word_pieces


@pytest.mark.parametrize(
    "prompt, word, wrong", [("x ==", "= y", "x == y"), ('He said "', '"hello', 'He said "hello')]
)
def test_a_word_that_is_cut_in_two(prompt, word, wrong):
    """lm-evaluation-harness scores another text than the one asked for."""
    prompt_pieces, word_pieces = split(prompt, word, "lm_eval")
    assert "".join(prompt_pieces + word_pieces) == wrong != prompt + word

    prompt_pieces, word_pieces = split(prompt, word, "common_prefix")
    assert "".join(prompt_pieces + word_pieces) == prompt + word

    with pytest.raises(ValueError, match="is not tokenized as the prompt"):
        split(prompt, word, "strict")


def test_all_words_begin_at_the_same_point():
    # "happy" alone is merged with the prompt's end: " good" gives its " un" up too.
    prompt_ids, word_ids = verbalizer.tokenize_words_after(
        encode_batch, "The is un", ["happy", " good"], "common_prefix"
    )
    assert spell(prompt_ids) == ["The", " is"]
    assert list(map(spell, word_ids)) == [[" unhappy"], [" un", " good"]]


def test_unknown_boundary():
    with pytest.raises(
        ValueError, match=r"boundary = 'loose'; valid: \['strict', 'common_prefix', 'lm_eval'\]"
    ):
        verbalizer.tokenize_words_after(encode_batch, "A", ["b"], "loose")
