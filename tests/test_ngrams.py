"""Hashes of words and n-grams, against sets of plain Python."""

import itertools
import random
import re

import numpy as np
import pytest

from lm.prepare import ngrams

LETTERS = ["a", "B", "cc", "_", "1", "é", "Ä", "ß", "中", "語", "ह", "İ", "\U0001d4d0"]
BETWEEN = [" ", ", ", "\n", " - ", "…", "’", ".", "\u00a0", "\u0301", "\x1c"]


def draw_text(draw: random.Random, words: int) -> str:
    parts = []
    for _ in range(words):
        parts += ["".join(draw.choices(LETTERS, k=draw.randint(1, 3))), draw.choice(BETWEEN)]
    return "".join(parts)


def plain_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def plain_shingles(text: str, n: int) -> set:
    words = plain_words(text)
    n = min(n, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} if n else set()


@pytest.mark.parametrize("seed", range(5))
def test_equal_words_have_equal_hashes(seed):
    draw = random.Random(seed)
    words = ngrams.Words()
    by_hash: dict[int, str] = {}
    by_word: dict[str, int] = {}
    for _ in range(100):
        text = draw_text(draw, draw.choice([0, 1, 5, 200]))
        hashes = words.hashes(text)
        assert hashes.dtype == np.uint64
        found = plain_words(text)
        assert len(hashes) == len(found)
        for word, hash_ in zip(found, hashes.tolist()):
            assert by_hash.setdefault(hash_, word) == word
            assert by_word.setdefault(word, hash_) == hash_


def test_what_is_between_words_and_their_case_do_not_matter():
    words = ngrams.Words()
    plain = words.hashes("the quick brown fox")
    # Of other lengths, at other places, and with characters of other widths.
    for text in (
        "The  QUICK, brown\nfox!",
        "…the—quick—brown—fox…",
        "(the) 'quick' Brown-Fox\U0001f98a",
    ):
        np.testing.assert_array_equal(words.hashes(text), plain)


def test_hashes_are_the_same_everywhere():
    """What a preparation left is read by later ones, on other machines."""
    hashes = ngrams.Words().hashes("the 中")
    assert hashes.tolist() == [0x511EC4F9F4AF60C0, 0xC29325089A92CD82]
    assert ngrams.rolling(hashes, 2).tolist() == [0x580ED2C8F2CA8A4F]


def test_numbers_in_all_bits():
    """Words of one letter, and n-grams of them, differ in both halves of their hashes."""
    hashes = ngrams.Words().hashes(" ".join(f"{i}" for i in range(3000)))
    for n in (1, 2, 13):
        grams = ngrams.rolling(hashes, n)
        for half in (grams >> np.uint64(32), grams & np.uint64(2**32 - 1)):
            assert len(np.unique(half)) >= len(grams) - 3


def test_a_letter_that_moves_to_the_next_word_is_another_ngram():
    words = ngrams.Words()
    texts = ["ab c d", "a bc d", "a b cd", "abc d", "b ac d", "ba c d", "c ab d", "d c ab"]
    grams = [ngrams.rolling(words.hashes(text), 2).tolist() for text in texts]
    assert len(set(itertools.chain(*grams))) == len(set(itertools.chain(*map(bigrams, texts))))


def bigrams(text: str) -> set:
    return plain_shingles(text, 2)


@pytest.mark.parametrize(
    "text", ["word " * 30_000, "é, " * 50_000, "x" * 150_000 + " y", "y " + "é" * 150_000]
)
def test_long_texts(text):
    """They are hashed in blocks, which end between words; a word that is longer than a block counts
    as several.
    """
    words = ngrams.Words()
    hashes = words.hashes(text)
    found = plain_words(text)
    if max(map(len, found)) < 2**16:
        assert len(hashes) == len(found)
        assert len(np.unique(hashes)) == len(set(found))
    else:
        assert len(hashes) == 4
        # The long one is cut at the same places, wherever it stands.
        turned = " ".join(reversed(found))
        assert sorted(words.hashes(turned).tolist()) == sorted(hashes.tolist())


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_shingles_and_their_similarity(n):
    draw = random.Random(n)
    words = ngrams.Words()
    before = draw_text(draw, 30)
    for _ in range(60):
        # Something of the text before, and something new.
        text = before[: draw.randint(0, len(before))] + draw_text(draw, draw.choice([0, 3, 30]))
        sets = [ngrams.shingles(words.hashes(each), n) for each in (before, text)]
        plain = [plain_shingles(each, n) for each in (before, text)]

        for set_, plain_set in zip(sets, plain):
            assert set_.dtype == np.uint32
            assert len(set_) == len(plain_set)
            assert (np.diff(set_.astype(np.int64)) > 0).all()
        both = len(plain[0] | plain[1])
        similarity = len(plain[0] & plain[1]) / both if both else 0.0
        assert ngrams.jaccard(*sets) == pytest.approx(similarity)
        before = text


@pytest.mark.parametrize("text", ["", " ", "…!", "one", "one two"])
def test_texts_of_few_words(text):
    words = ngrams.Words()
    hashes = words.hashes(text)
    count = len(text.split()) if text.strip("…! ") else 0
    assert len(hashes) == count
    assert len(ngrams.shingles(hashes, 5)) == min(count, 1)
    assert len(ngrams.rolling(hashes, 5)) == 0
    assert ngrams.jaccard(ngrams.shingles(hashes, 5), np.empty(0, np.uint32)) == 0
