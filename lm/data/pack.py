"""From documents to rows: tokenize, cut into windows, pack, mark segments.

Policy: a training document is BOS, its text, the line with its label (where it has one and the
config asks for it), EOS; what BOS and EOS are is the tokenizer's `around`. Its tokens but the last
are inputs, its tokens but the first are targets. A document longer than the row is cut into windows
without overlap, so that each target counts exactly once. Attention never leaves a window.

Windows and rows are dicts of arrays: windows have tokens, targets and weights of their own length;
rows have all of the Batch contract (`lm.data.batch`), [T] each.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np
from etils import epath
from grain import experimental as grain_experimental

from lm import files, progress
from lm.data import batch, records
from lm.data import tokenizer as tokenizers
from lm.data.sources import Document, Documents, TokenizedDocument
from lm.data.tokenizer import Tokenizer
from lm.data.units import Unit


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Documents to token ids.

    Attributes:
      label_prompt: the line that asks for the label; "" if labels are not part of the training
        text. Text, prompt and label word are tokenized apart and their ids joined, so that no token
        spans two of them.
      transform: the objective's, (ids, length, numpy Generator) -> windows; None: `windows`.
      arrays: those of its rows, see `lm.data.batch`.
    """

    tokenizer: Tokenizer
    label_prompt: str
    transform: Callable | None = None
    arrays: Mapping[str, batch.Array] = dataclasses.field(default_factory=lambda: batch.ARRAYS)

    @property
    def source_length(self) -> int:
        """Places of a row for sources; 0: it has none."""
        return self.arrays["source"].dims[0] if "source" in self.arrays else 0

    def training(self, document: Document) -> list[int]:
        """Returns the ids of BOS, text, label line and EOS; none where there is no text."""
        if not document.text:
            return []
        if self.label_prompt and document.label:
            ids = self.prompt(document) + self.tokenizer.encode(label_word(document.label))
        else:
            ids = self.text(document)
        _, after = self.tokenizer.around
        return [*ids, *after]

    def windows(
        self, ids: list[int], length: int, seed: Sequence[int]
    ) -> list[dict[str, np.ndarray]]:
        """Returns the windows of a training document's ids.

        Args:
          seed: of the transform's random numbers.
        """
        if self.transform is None:
            return windows(ids, length)
        return self.transform(ids, length, np.random.default_rng(seed))

    def text(self, document: Document) -> list[int]:
        """Returns the ids of BOS and text.

        Bits per byte are counted on them: each token of the text is a target, and nothing else is.
        """
        before, _ = self.tokenizer.around
        return [*before, *self._ids(document)]

    def _ids(self, document: Document) -> list[int]:
        """The ids of a document's text: those that are stored, or made now.

        Raises:
          ValueError: another tokenizer made those that are stored.
        """
        if not isinstance(document, TokenizedDocument):
            return self.tokenizer.encode(document.text)
        if document.stored.tokenizer not in (self.tokenizer.fingerprint, self.tokenizer.texts_as):
            raise ValueError(
                f"the corpus has tokens of the tokenizer {document.stored.tokenizer}, and this "
                f"run's is {self.tokenizer.fingerprint}: set config.tokenizer.path to the folder "
                "tokenizer of the corpus, or config.data.source_args.stored_tokens=False"
            )
        if document.stored.ids.max(initial=0) >= self.tokenizer.vocab_size:
            raise ValueError(
                f"{document.name}: the corpus has the token {document.stored.ids.max()}, and its "
                f"tokenizer {self.tokenizer.vocab_size} of them: it is damaged"
            )
        return document.stored.ids.tolist()

    def prompt(self, document: Document) -> list[int]:
        """Returns the ids of BOS, text and the line that asks for the label."""
        return self.text(document) + self.tokenizer.encode(self.label_prompt)


def label_word(label: str) -> str:
    """Returns a label as the label line spells it."""
    return " " + label


def train_tokenizer(
    documents: Documents, *, vocab_size: int, max_documents: int, label_prompt: str, cache_dir: str
) -> Tokenizer:
    """Returns a SentencePiece tokenizer trained on documents, or its cached copy.

    Args:
      documents: the training split, and no other: evaluation texts must not shape the vocabulary.
      vocab_size: number of ids, special ones included.
      max_documents: reads so many, evenly out of the split; 0: all.
      label_prompt: see `Encoder`; prompts and label words are texts of their own.
      cache_dir: keeps the model file, named by all that decides its contents.

    Raises:
      ValueError: the texts are too few for the size.
    """

    count = len(records.evenly_spaced(len(documents), max_documents))
    what = f"training a tokenizer of {vocab_size} ids on {count:,} documents"

    def texts() -> Iterator[str]:
        # Asked for where there is no cached copy.
        logging.info("%s", what)
        for document in training.each(records.take(documents, max_documents)):
            yield document.text
            if label_prompt and document.label:
                yield label_prompt
                yield label_word(document.label)

    identity = [documents.fingerprint, vocab_size, max_documents, label_prompt]
    key = files.short_hash(json.dumps(identity).encode())
    folder = epath.Path(files.expand(cache_dir)) / "tokenizers"
    with progress.activity(what, count, "documents read") as training:
        return tokenizers.train_sentencepiece(
            texts(), vocab_size, folder / f"{vocab_size}-{key}.model"
        )


# --- windows ---


def windows(ids: list[int], length: int, stride: int = 0) -> list[dict[str, np.ndarray]]:
    """Cuts a document into windows of at most `length`. Each target has weight in one window.

    Args:
      ids: of the whole document.
      stride: targets that each window after the first one adds; what comes before them in it is
        context, with weight 0. 0: `length`, no overlap.
    """
    inputs = np.asarray(ids[:-1], np.int32)
    targets = np.asarray(ids[1:], np.int32)
    stride = stride or length

    # Window i adds the targets from added_from[i] to the next window's.
    added_from = [0, *range(length, len(inputs), stride)] if len(inputs) else []
    ends = [*added_from[1:], len(inputs)]

    windows_ = []
    for first_added, end in zip(added_from, ends):
        # With overlap, as much context as the window has room for.
        begin = first_added if stride == length else max(0, end - length)
        weights = np.arange(begin, end) >= first_added
        windows_.append(
            dict(
                tokens=inputs[begin:end],
                targets=targets[begin:end],
                weights=weights.astype(np.float32),
            )
        )
    return windows_


# --- rows ---


class TextLayout(NamedTuple):
    """How windows of documents lie in rows.

    Attributes:
      bos_id: the token that begins a document's first window, and none of its other windows.
      more: arrays that a window has besides, a value for each token.
    """

    bos_id: int
    more: tuple[str, ...] = ()
    arrays = batch.ARRAYS  # that a row has

    @property
    def features(self) -> tuple[str, ...]:
        """The arrays that a window has."""
        return ("tokens", "targets", "weights", *self.more)

    def to_row(self, packed: dict) -> dict[str, np.ndarray]:
        """Returns Grain's packed element as a row.

        The arrays are copies: Grain hands out views into the arrays of all its bins.
        """
        row = dict(
            tokens=np.array(packed["tokens"], np.int32),
            targets=np.array(packed["targets"], np.int32),
            weights=np.array(packed["weights"], np.float32),
            positions=np.array(packed["tokens_positions"], np.int32),
            segments=np.array(packed["tokens_segment_ids"], np.int32),
        )
        return row | {name: np.array(packed[name]) for name in self.more}

    def num_started(self, row: dict[str, np.ndarray]) -> int:
        """Returns how many documents begin in a row."""
        first_of_windows = (row["positions"] == 0) & (row["segments"] > 0)
        return int(np.sum(row["tokens"][first_of_windows] == self.bos_id))


class UnitLayout(NamedTuple):
    """How units of `lm.data.units` lie in rows: a pair's two parts are neighbouring segments.

    Attributes:
      parts: of a unit, 1 or 2; part p of unit u is segment parts * u + p + 1.
      numbered: whether units have an array `number`, to be found again in rows.
    """

    parts: int
    numbered: bool = False
    arrays = batch.ARRAYS | batch.UNIT_ARRAYS

    @property
    def features(self) -> tuple[str, ...]:
        """The arrays that a unit has."""
        features = ("tokens", "targets", "weights", "positions", "part", *batch.UNIT_ARRAYS)
        return (*features, "number") if self.numbered else features

    def to_row(self, packed: dict) -> dict[str, np.ndarray]:
        """See `TextLayout`."""
        units, part = packed["tokens_segment_ids"], packed["part"]
        segments = np.where(units > 0, (units - 1) * self.parts + part + 1, 0)
        row = dict(
            tokens=np.array(packed["tokens"], np.int32),
            targets=np.array(packed["targets"], np.int32),
            weights=np.array(packed["weights"], np.float32),
            positions=np.array(packed["positions"], np.int32),
            segments=np.array(segments, np.int32),
            values=np.array(packed["values"], np.float32),
            stored_logprobs=np.array(packed["stored_logprobs"], np.float32),
        )
        if self.numbered:
            row["number"] = np.array(packed["number"], np.int32)
        return row

    def num_started(self, row: dict[str, np.ndarray]) -> int:
        """Returns how many units a row has."""
        return int(row["segments"].max(initial=0)) // self.parts


class SourceLayout(NamedTuple):
    """How targets and their sources lie in rows, as segments of the same numbers.

    Attributes:
      source_length: places of a row for sources.
    """

    source_length: int
    # `begins` is 1 at the first target of a document, else 0.
    features = ("tokens", "targets", "weights", "begins", "source")

    @property
    def arrays(self) -> dict[str, batch.Array]:
        """The arrays that a row has."""
        return {**batch.ARRAYS, **batch.source_arrays(self.source_length)}

    def to_row(self, packed: dict) -> dict[str, np.ndarray]:
        """See `TextLayout`."""
        return TextLayout(0).to_row(packed) | dict(
            begins=np.array(packed["begins"], np.int32),
            source=np.array(packed["source"], np.int32),
            source_positions=np.array(packed["source_positions"], np.int32),
            source_segments=np.array(packed["source_segment_ids"], np.int32),
        )

    def num_started(self, row: dict[str, np.ndarray]) -> int:
        """Returns how many documents begin in a row."""
        return int(row["begins"].sum())


Layout = TextLayout | UnitLayout | SourceLayout


def layout_of(kind: str, encoder: Encoder) -> Layout:
    """The layout of `Documents` of a kind."""
    if encoder.source_length:
        return SourceLayout(encoder.source_length)
    if kind == "text":
        before, _ = encoder.tokenizer.around
        more = set(encoder.arrays) - set(batch.ARRAYS) if encoder.transform else ()
        return TextLayout(before[0], tuple(sorted(more)))
    return UnitLayout(2 if kind in ("pair", "judged") else 1)


class Packing(NamedTuple):
    """How windows become rows."""

    name: str  # first_fit, into `bins` rows at a time, or concat_then_split
    length: int  # of a row
    bins: int


def _pack(
    dataset: grain.IterDataset, layout: Layout, packing: Packing, seed: int
) -> grain.IterDataset:
    """Windows -> rows."""
    source_length = getattr(layout, "source_length", 0)
    packed = _pack_elements(dataset, layout.features, packing, seed, source_length)
    return packed.map(layout.to_row)


def _pack_elements(
    dataset: grain.IterDataset,
    features: Sequence[str],
    packing: Packing,
    seed: int,
    source_length: int,
) -> grain.IterDataset:
    """Windows -> Grain's packed elements."""
    structure = {name: packing.length for name in features}
    if "source" in structure:
        structure["source"] = source_length
    if packing.name == "first_fit":
        return grain_experimental.FirstFitPackIterDataset(
            dataset, length_struct=structure, num_packing_bins=packing.bins, seed=seed
        )
    assert packing.name == "concat_then_split", packing
    return grain_experimental.ConcatThenSplitIterDataset(dataset, length_struct=structure)


class _Unpack(grain_experimental.FlatMapTransform):
    """A document's list of windows -> its windows, one by one."""

    max_fan_out = 1 << 30  # only read for random access

    def flat_map(self, element):
        return element


def windows_of_unit(unit: Unit, seed: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """A unit is one window."""
    del seed
    return [unit.arrays]


class Stream:
    """Stream `number` of `num_streams`: an endless iterator over rows.

    It takes every num_streams-th item, shuffled anew each epoch. An epoch has each of them once: at
    its end the packing's bins are emptied. Windows are made in a thread ahead of the packing.
    `get_state` and `set_state` restore it exactly, whatever the thread was doing.

    Args:
      items: documents, or what stands for them. They may have an `order` of their own, and a
        `reader`, see `lm.data.streaming.Blocks`.
      to_windows: (item, seed) -> its windows. The seed is that of the run with the numbers of
        the epoch and the item: what is drawn depends on nothing else.
      layout: how they lie in rows.
      epochs: after so many it gives rows of padding; None: there is always another.
    """

    def __init__(
        self,
        items: Sequence,
        to_windows: Callable[[Any, Sequence[int]], list[dict[str, np.ndarray]]],
        packing: Packing,
        *,
        layout: Layout,
        number: int,
        num_streams: int,
        seed: int,
        epochs: Fraction | None = None,
    ):
        # The epochs of a stream have seeds that are neighbours: two streams must not.
        seeds = np.random.SeedSequence([seed, number]).generate_state(2)
        self._shuffle_seed, self._pack_seed = int(seeds[0]), int(seeds[1])
        self._seed = seed
        self._items = items.items if isinstance(items, Documents) else items
        self._number, self._num_streams = number, num_streams
        self._to_windows, self._layout = to_windows, layout
        self._packing, self._epochs = packing, epochs
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._num_started = epoch, 0
        numbers = self._numbers((self._shuffle_seed + epoch) % 2**32)
        self._num_items = len(numbers)
        if self._epochs is not None:
            # Of the last epoch perhaps a part.
            numbers = numbers[: math.ceil(min(self._epochs - epoch, 1) * len(numbers))]

        items = self._items.reader() if hasattr(self._items, "reader") else self._items

        def to_windows(number: int) -> list[dict[str, np.ndarray]]:
            return self._to_windows(items[number], (self._seed, epoch, number))

        # Packing is sequential: from here on rows have no random access.
        dataset = numbers.map(to_windows).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=32)
        )
        dataset = grain_experimental.FlatMapIterDataset(dataset, _Unpack())
        self._rows = iter(_pack(dataset, self._layout, self._packing, self._pack_seed))

    def _numbers(self, seed: int) -> grain.MapDataset:
        """The numbers of the stream's items, in random order."""
        if hasattr(self._items, "order"):
            order = self._items.order(self._number, self._num_streams, seed)
            return grain.MapDataset.source(order)
        numbers = grain.MapDataset.source(range(len(self._items)))
        return numbers[self._number :: self._num_streams].shuffle(seed=seed)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        while (row := next(self._rows, None)) is None:
            if self.has_ended():
                return batch.empty_row(self._packing.length, self._layout.arrays)
            self._rows.close()
            self._begin(self._epoch + 1)

        self._num_started += self._layout.num_started(row)
        return row

    def has_ended(self) -> bool:
        """Whether this epoch is the last one."""
        return self._epochs is not None and self._epoch + 1 >= self._epochs

    def epochs_begun(self) -> float:
        """Returns the epochs whose items have begun: 1.5 after half of the second one's."""
        return self._epoch + self._num_started / self._num_items

    def get_state(self) -> dict:
        """Returns the state, JSON-able."""
        rows = self._rows.get_state()
        return {"epoch": self._epoch, "started": self._num_started, "rows": rows}

    def set_state(self, state: dict) -> None:
        self._rows.close()
        self._begin(state["epoch"])
        self._num_started = state["started"]
        rows = dict(state["rows"])
        if slices := rows.get("remainder_slices"):
            # concat_then_split compares them with a tuple, and JSON has lists.
            rows["remainder_slices"] = {name: tuple(pair) for name, pair in slices.items()}
        self._rows.set_state(rows)

    def close(self) -> None:
        """Ends its thread."""
        self._rows.close()


def stream(documents: Documents, encoder: Encoder, packing: Packing, **arguments) -> Stream:
    """Returns a `Stream` of documents' training rows; `arguments` are Stream's."""

    def to_windows(document: Document, seed: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return encoder.windows(encoder.training(document), packing.length, seed)

    layout = layout_of(documents.kind, encoder)
    if documents.kind != "text":
        return Stream(documents, windows_of_unit, packing, layout=layout, **arguments)
    return Stream(documents, to_windows, packing, layout=layout, **arguments)


class _Ordered(list):
    """What stands for documents, in their order."""

    def __init__(self, items: list, order: Callable[[int, int, int], Sequence[int]]):
        super().__init__(items)
        self.order = order


class TransformedStream:
    """A stream whose rows go through a transform.

    Args:
      transform: (row, numpy Generator) -> row. The random numbers are a function of the seed, the
        stream and how many rows came before, so that a restored stream goes on with the same ones.
    """

    def __init__(self, stream: Stream, transform: Callable, *, seed: int, number: int):
        self._stream, self._transform = stream, transform
        self._seed, self._number, self._num_rows = seed, number, 0

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng([self._seed, self._number, self._num_rows])
        self._num_rows += 1
        return self._transform(next(self._stream), random)

    def epochs_begun(self) -> float:
        return self._stream.epochs_begun()

    def get_state(self) -> dict:
        return {"rows_transformed": self._num_rows, "stream": self._stream.get_state()}

    def set_state(self, state: dict) -> None:
        self._num_rows = int(state["rows_transformed"])
        self._stream.set_state(state["stream"])

    def close(self) -> None:
        self._stream.close()


def count_rows(
    documents: Documents, encoder: Encoder, packing: Packing, *, num_streams: int, **arguments
) -> list[int]:
    """Returns how many rows each `Stream` of documents has until it ends.

    Args:
      arguments: Stream's, with `epochs`, but not `number`.
    """
    layout = TextLayout(0)
    if documents.kind == "text":
        with progress.activity("counting tokens", len(documents), "documents") as counting:
            sizes = [len(encoder.training(document)) for document in counting.each(documents)]
        if hasattr(documents.items, "order"):
            sizes = _Ordered(sizes, documents.items.order)
        if encoder.transform:
            layout = layout_of(documents.kind, encoder)
    elif encoder.source_length:
        sizes, layout = documents, layout_of(documents.kind, encoder)
    else:
        sizes = [len(unit.arrays["tokens"]) + 1 for unit in documents]

    def to_windows(size, seed: Sequence[int]) -> list[dict[str, np.ndarray]]:
        # The sizes alone decide where windows go.
        if isinstance(size, Unit):
            return windows_of_unit(size, seed)
        return encoder.windows([0] * size, packing.length, seed)

    counts = []
    for number in range(num_streams):
        rows = Stream(
            sizes,
            to_windows,
            packing,
            layout=layout,
            number=number,
            num_streams=num_streams,
            **arguments,
        )
        counts.append(0)
        while next(rows)["segments"].any():
            counts[-1] += 1
        rows.close()
    return counts


def numbered_rows(
    units: Sequence[Unit], length: int, parts: int = 2
) -> list[dict[str, np.ndarray]]:
    """Packs units of so many parts into rows that say, as `number`, which of them lies where."""
    numbered = []
    for number, unit in enumerate(units):
        places = np.full(len(unit.arrays["tokens"]), number, np.int32)
        numbered.append(unit.arrays | {"number": places})
    return evaluation_rows(numbered, length, UnitLayout(parts, numbered=True))


def evaluation_rows(
    windows_: list[dict[str, np.ndarray]],
    length: int,
    layout: Layout = TextLayout(0),
) -> list[dict[str, np.ndarray]]:
    """Packs windows into rows, each exactly once.

    The rows depend on the windows alone, not on how they are batched later.
    """
    # All is in memory already: no thread reads ahead.
    read_options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = grain.MapDataset.source(windows_).to_iter_dataset(read_options)
    return list(_pack(dataset, layout, Packing("first_fit", length, 64), 0))
