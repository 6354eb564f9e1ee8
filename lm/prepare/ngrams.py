"""Hashes of words and of n neighbouring words, whatever their case and what is between them."""

import re

import numpy as np
import xxhash

_WORD = re.compile(r"\w+")
_MAX_CACHED = 1 << 20  # words


class Words:
    """Hashes of words, kept for the next texts."""

    def __init__(self):
        self._hashes: dict[str, int] = {}

    def hashes(self, text: str) -> np.ndarray:
        """Returns the hash of each word of a text, u64 [words]."""
        words = _WORD.findall(text.lower())
        hashes = self._hashes
        if len(hashes) > _MAX_CACHED:
            hashes.clear()
        for word in set(words).difference(hashes):
            hashes[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return np.fromiter(map(hashes.__getitem__, words), np.uint64, len(words))


def rolling(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the hashes of all n neighbouring words, u64 [words - n + 1] or [0]."""
    count = max(len(hashes) - n + 1, 0)
    mixed = np.zeros(count, np.uint64)
    for i in range(n):
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed += hashes[i : i + count]
    # The lower half of a product says little of its factors' upper halves.
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> np.uint64(32)
    return mixed


def shingles(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the set of a text's shingles of n words, u32 sorted; of a text with fewer words all
    of them are one.
    """
    n = min(n, len(hashes))
    return np.unique(rolling(hashes, n).astype(np.uint32)) if n else np.empty(0, np.uint32)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sorted sets without duplicates."""
    if min(len(a), len(b)) == 0:
        return 0.0
    both = np.concatenate([a, b])
    both.sort(kind="stable")
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)
