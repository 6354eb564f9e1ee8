"""Hashes of words and of n neighbouring words, whatever their case and what is between them.

A word is what the regular expression \\w+ finds in the text in lower case. Its hash is a polynomial
of its characters, each a random number of 64 bits, modulo 2^64: numpy makes those of a whole text
at once, several times faster than a hash function that is called for each word.
"""

import functools
from collections.abc import Sequence

import numpy as np

_BLOCK = 1 << 16  # characters that are hashed at once; a longer word counts as several
_BASE = 0x9E3779B97F4A7C15


@functools.cache
def _characters() -> np.ndarray:
    """The number of each character, u64; 0 for one that is in no word."""
    is_in_word = np.fromiter(map(str.isalnum, map(chr, range(0x110000))), bool, 0x110000)
    is_in_word[ord("_")] = True
    return _mixed(np.arange(1, 0x110001, dtype=np.uint64) * np.uint64(_BASE)) * is_in_word


def _mixed(values: np.ndarray) -> np.ndarray:
    """Each number with all of its bits in each of the result's, as SplitMix64 does it."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """The powers of the base, and of its inverse, for each place in a block."""
    both = []
    for base in (_BASE, pow(_BASE, -1, 2**64)):
        factors = np.full(_BLOCK, base, np.uint64)
        factors[0] = 1
        both.append(np.multiply.accumulate(factors))

    return both[0], both[1]


class Words:
    """Hashes of words."""

    def hashes(self, text: str) -> np.ndarray:
        """Returns the hash of each word of a text, u64 [words]."""
        text = text.lower()
        if text.isascii():
            codes = np.frombuffer(text.encode("ascii"), np.uint8)
        else:
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")

        parts = []
        while len(codes):
            values = _characters().take(codes[:_BLOCK])
            if len(codes) > _BLOCK:
                # A block ends between words, unless all of it is one.
                between = np.flatnonzero(values == 0)
                values = values[: between[-1] + 1] if len(between) else values
            codes = codes[len(values) :]
            parts.append(_of_block(values))

        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint64), *parts])


def _of_block(values: np.ndarray) -> np.ndarray:
    """The hash of each word, of the numbers of characters."""
    powers, inverses = _powers()
    is_in_word = values != 0
    is_first = is_in_word.copy()
    is_first[1:] &= ~is_in_word[:-1]
    begins = np.flatnonzero(is_first)
    if not len(begins):
        return np.empty(0, np.uint64)

    # What is between words is 0, and adds nothing to the sum.
    sums = np.add.reduceat(values * powers[: len(values)], begins)
    # n-grams are polynomials of these: without mixing, a letter that moves from one word to the
    # next could leave an n-gram's hash as it is.
    return _mixed(sums * inverses[begins])


def rolling(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the hashes of all n neighbouring words, u64 [words - n + 1] or [0]."""
    return rolling_of_lengths(hashes, [n])[0]


def rolling_of_lengths(hashes: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """Returns what `rolling` does, for each of several n, the least one first."""
    found = []
    sums = hashes
    n = 1
    for length in lengths:
        while n < length:
            sums = sums[:-1] * np.uint64(0x9E3779B97F4A7C15)
            sums += hashes[n:]
            n += 1
        # The lower half of a product says little of its factors' upper halves.
        mixed = (sums ^ (sums >> np.uint64(31))) * np.uint64(0xD6E8FEB86659FD93)
        mixed ^= mixed >> np.uint64(32)
        found.append(mixed)

    return found


def shingles(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the set of a text's shingles of n words, u32 sorted; of a text with fewer words all
    of them are one.
    """
    n = min(n, len(hashes))
    if not n:
        return np.empty(0, np.uint32)
    found = rolling(hashes, n).astype(np.uint32)
    found.sort()
    is_new = np.empty(len(found), bool)
    is_new[0] = True
    np.not_equal(found[1:], found[:-1], out=is_new[1:])
    return found[is_new]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sorted sets without duplicates."""
    if min(len(a), len(b)) == 0:
        return 0.0
    both = np.concatenate([a, b])
    both.sort(kind="stable")
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)
