"""Texts with parts taken out, as transforms of data: T5's span corruption, prefixes, and the middle
that is to be filled in. Each is a function of a document's ids and of random numbers.
"""

import dataclasses

import numpy as np

from lm.data import pack
from lm.data.seq2seq import ends, window
from lm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """Makes sources that lack spans, and targets that have them (Raffel et al. 2020, arXiv
    1910.10683, section 3.1.4; lengths are those of the released code).

    A sentinel stands in the source for each span, and in the target before it. A text begins with
    what stays. Both end as the tokenizer ends a text.

    Args:
      rate: share of a window's tokens that are taken out.
      mean_span: mean number of tokens of a span.
      source_length: tokens of a source, at most.

    Raises:
      ValueError: a rate or span out of range; a tokenizer without sentinels.
    """

    tokenizer: Tokenizer
    rate: float
    mean_span: float
    source_length: int

    def __post_init__(self):
        if not 0 < self.rate < 1 or self.mean_span < 1:
            raise ValueError(
                f"config.objective: rate = {self.rate}, mean_span = {self.mean_span}; wanted a "
                "rate above 0 and below 1, and spans of 1 token or more"
            )
        self.tokenizer.role_ids("sentinels")

    def sizes(self, length: int) -> tuple[int, int]:
        """(tokens taken out, spans) of a window of so many tokens, 2 at least."""
        num_noise = min(max(round(length * self.rate), 1), length - 1)
        num_spans = max(round(num_noise / self.mean_span), 1)
        return num_noise, min(num_spans, num_noise, length - num_noise)

    def raw_length(self, length: int) -> int:
        """The most tokens of a window whose source and target, of `length`, have room, and whose
        spans have sentinels.
        """
        _, after = self.tokenizer.around
        num_sentinels = len(self.tokenizer.role_ids("sentinels"))

        raw = 1
        while True:
            num_noise, num_spans = self.sizes(raw + 1)
            source = raw + 1 - num_noise + num_spans + len(after)
            target = num_noise + num_spans + len(after)

            if source > self.source_length or target > length or num_spans > num_sentinels:
                return raw
            raw += 1

    def windows(
        self, ids: list[int], length: int, random: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Cuts a document into windows of a target of at most `length` and its source."""
        before, after = ends(self.tokenizer)
        # Of a document, what stands for BOS and isn't one goes too.
        around_before, _ = self.tokenizer.around
        first = len(around_before) - len(before)
        text = ids[first : len(ids) - len(after)]

        raw = self.raw_length(length)
        windows = []
        for start in range(0, len(text), raw):
            piece = text[start : start + raw]
            # Of a single token nothing would be left.
            if len(piece) > 1:
                source, target = self.corrupt(piece, random)
                windows.append(window([*source, *after], [*target, *after], begins=start == 0))
        return windows

    def corrupt(self, ids: list[int], random: np.random.Generator) -> tuple[list[int], list[int]]:
        """(source, target) of a window's ids, 2 at least."""
        num_noise, num_spans = self.sizes(len(ids))
        kept_sizes = _partition(len(ids) - num_noise, num_spans, random)
        noise_sizes = _partition(num_noise, num_spans, random)

        source: list[int] = []
        target: list[int] = []
        place = 0
        for sentinel, kept, noise in zip(
            self.tokenizer.role_ids("sentinels"), kept_sizes, noise_sizes
        ):
            source += [*ids[place : place + kept], sentinel]
            place += kept
            target += [sentinel, *ids[place : place + noise]]
            place += noise
        return source, target


def _partition(total: int, parts: int, random: np.random.Generator) -> list[int]:
    """So many sizes of 1 or more that sum to `total`, all such ones being equally likely."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).tolist()


def prefix_windows(
    ids: list[int], length: int, random: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """Cuts a document into windows as `lm.data.pack.windows` does, of each of which a beginning is
    given: `prefix` is 1 there, and what comes behind is to be predicted (Raffel et al. 2020,
    section 3.2.3). All its lengths that leave something are equally likely.
    """
    windows = pack.windows(ids, length)
    for each in windows:
        size = len(each["tokens"])
        given = int(random.integers(1, size + 1))
        each["prefix"] = (np.arange(size) < given).astype(np.int32)
        # The last token of the prefix predicts the first one behind it.
        each["weights"] = (np.arange(size) >= given - 1).astype(np.float32)
    return windows


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Makes windows whose middle comes last, for models that read from left to right (Bavarian et
    al. 2022, arXiv 2207.14255, section 3).

    Three sentinels stand before the beginning, the end and the middle: `<0> beginning <1> end <2>
    middle`, or `<0> <1> end <2> beginning middle`.

    Args:
      rate: share of the windows that are so changed.
      end_first: share of these that have the second form.

    Raises:
      ValueError: shares that are none; a tokenizer without three sentinels.
    """

    tokenizer: Tokenizer
    rate: float
    end_first: float = 0.5

    def __post_init__(self):
        if not 0 <= self.rate <= 1 or not 0 <= self.end_first <= 1:
            raise ValueError(
                f"config.objective: rate = {self.rate}, end_first = {self.end_first}; wanted shares"
            )
        if len(self.tokenizer.role_ids("sentinels")) < 3:
            raise ValueError(
                "filling in the middle needs three sentinels: config.tokenizer.reserve = "
                "'sentinels:3'"
            )

    def windows(
        self, ids: list[int], length: int, random: np.random.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Cuts a document into windows of at most `length`, as `lm.data.pack.windows` does, with
        room for the sentinels.
        """
        before, after = self.tokenizer.around

        windows = []
        step = max(length - 3, 1)
        for start in range(0, len(ids) - 1, step):
            # The last token of a window is the first one that the next window reads.
            piece = ids[start : start + step + 1]

            first = len(before) if start == 0 else 0
            last = len(piece) - (len(after) if start + step + 1 >= len(ids) else 0)

            if random.random() < self.rate and last > first:
                middle = self._reordered(piece[first:last], random)
                piece = [*piece[:first], *middle, *piece[last:]]
            windows += pack.windows(piece, length)
        return windows

    def _reordered(self, ids: list[int], random: np.random.Generator) -> list[int]:
        one, two, three = self.tokenizer.role_ids("sentinels")[:3]
        start, stop = np.sort(random.integers(0, len(ids) + 1, 2)).tolist()
        beginning, middle, end = ids[:start], ids[start:stop], ids[stop:]

        if random.random() < self.end_first:
            return [one, two, *end, three, *beginning, *middle]
        return [one, *beginning, two, *end, three, *middle]
