"""Masked language modelling as a transform of data (Devlin et al. 2019, arXiv 1810.04805, section
3.1): a share of a text's tokens is to be found again, at their own places.
"""

import dataclasses
import functools

import numpy as np

from lm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Masking:
    """Makes windows of a document in which tokens are masked.

    Of each window's tokens but special ones a share `rate` is chosen, one at least. Most of the
    chosen ones are replaced by the mask, some by a random token, and some stay as they are. All of
    them are targets.

    Args:
      random_share, kept_share: of the chosen tokens, those replaced by a random token, and those
        that stay.
      whole_words: words are chosen, not tokens; a word is what stands between white space. Words
        that would go beyond the rate are left out, but for the first.

    Raises:
      ValueError: shares that are none; a tokenizer without a mask.
    """

    tokenizer: Tokenizer
    rate: float
    random_share: float = 0.1
    kept_share: float = 0.1
    whole_words: bool = False

    def __post_init__(self):
        is_share = 0 <= self.random_share and 0 <= self.kept_share
        if not 0 < self.rate <= 1 or not is_share or self.random_share + self.kept_share > 1:
            raise ValueError(
                f"config.objective: rate = {self.rate}, random_share = {self.random_share}, "
                f"kept_share = {self.kept_share}; wanted a rate above 0 and at most 1, and shares "
                "of 0 or more that sum to 1 at most"
            )
        self.tokenizer.role("mask")

    @functools.cached_property
    def _ordinary(self) -> np.ndarray:
        """[V] bool: ids of text."""
        ordinary = np.ones(self.tokenizer.vocab_size, bool)
        special = [*self.tokenizer.special.values()]
        for ids in (*self.tokenizer.roles.values(), *self.tokenizer.around):
            special += ids
        ordinary[special] = False
        return ordinary

    @functools.cached_property
    def _ordinary_ids(self) -> np.ndarray:
        return np.flatnonzero(self._ordinary).astype(np.int32)

    @functools.cached_property
    def _begins_word(self) -> np.ndarray:
        return begins_word(self.tokenizer)

    def windows(
        self, ids: list[int], length: int, random: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Cuts a document into windows of at most `length`, as `lm.data.pack.windows` does, whose
        targets stand at the places of their tokens.
        """
        whole = np.asarray(ids, np.int32)
        windows = []
        for start in range(0, len(whole), length):
            targets = whole[start : start + length]
            chosen = self._choose(targets, random)
            tokens = self._replace(targets, chosen, random)
            windows.append(dict(tokens=tokens, targets=targets, weights=chosen.astype(np.float32)))
        return windows

    def _choose(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """[n] bool: which tokens are to be found again."""
        chosen = np.zeros(len(ids), bool)
        ordinary = self._ordinary[ids]
        num_ordinary = int(ordinary.sum())
        if not num_ordinary:
            return chosen
        number = max(1, round(self.rate * num_ordinary))

        if not self.whole_words:
            chosen[random.permutation(np.flatnonzero(ordinary))[:number]] = True
            return chosen

        # A word begins at its first token, and behind what is special.
        begins = self._begins_word[ids] | ~ordinary
        begins[1:] |= ~ordinary[:-1]
        word_of = np.cumsum(begins)
        num_chosen = 0
        for word in random.permutation(np.unique(word_of[ordinary])):
            members = word_of == word
            if not num_chosen or num_chosen + members.sum() <= number:
                chosen |= members
                num_chosen += members.sum()
            if num_chosen >= number:
                break
        return chosen

    def _replace(
        self, ids: np.ndarray, chosen: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        tokens = ids.copy()
        draws = random.random(len(ids))
        drawn = random.choice(self._ordinary_ids, len(ids))
        is_random = chosen & (draws < self.random_share)
        is_masked = chosen & (draws >= self.random_share + self.kept_share)
        tokens[is_random] = drawn[is_random]
        tokens[is_masked] = self.tokenizer.role("mask")
        return tokens


@functools.lru_cache(maxsize=8)
def begins_word(tokenizer: Tokenizer) -> np.ndarray:
    """[V] bool: ids that begin with white space, or with what a tokenizer writes for it, behind
    another token.

    By what the tokenizer makes of ids, not by signs such as "##" or "Ġ", which differ between
    tokenizers.
    """
    begins = np.zeros(tokenizer.vocab_size, bool)
    ids = range(tokenizer.vocab_size)
    # A token of letters, behind which the others are looked at.
    first = next((token for token in ids if tokenizer.decode([token]).isalpha()), None)
    if first is None:
        return begins
    length = len(tokenizer.decode([first]))
    for token in ids:
        behind = tokenizer.decode([first, token])[length:]
        begins[token] = behind[:1].isspace()
    return begins
