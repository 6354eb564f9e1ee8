"""From documents to rows: tokenize, cut into windows, pack, mark segments.

Policy: a training document is BOS, its text, the line with its label (where it has one and the
config asks for it), EOS. Its tokens but the last are inputs, its tokens but the first are targets.
A document longer than the row is cut into windows without overlap, so that each target counts
exactly once. Attention never leaves a window.
"""

import dataclasses

import grain
import numpy as np
from grain import experimental as grain_experimental

from lm.data.sources import Document, Documents
from lm.data.tokenizer import Tokenizer

PACKINGS = ("first_fit", "concat_then_split")
_FEATURES = ("tokens", "targets", "weights")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Documents to token ids.

    Attributes:
      label_prompt: the line that asks for the label; "" if labels are not part of the training
        text. Text, prompt and label word are tokenized apart and their ids joined, so that no token
        spans two of them.
    """

    tokenizer: Tokenizer
    label_prompt: str

    def training(self, document: Document) -> list[int]:
        """BOS, text, label line, EOS."""
        ids = self.prompt(document) if self._labelled(document) else self.text(document)
        if self._labelled(document):
            ids = ids + self.tokenizer.encode(label_word(document.label))
        return ids + [self.tokenizer.eos_id]

    def text(self, document: Document) -> list[int]:
        """BOS and text: what bits per byte are counted on, one target for each token of the text
        and no other.
        """
        return [self.tokenizer.bos_id] + self.tokenizer.encode(document.text)

    def prompt(self, document: Document) -> list[int]:
        """BOS, text and the line that asks for the label."""
        return self.text(document) + self.tokenizer.encode(self.label_prompt)

    def _labelled(self, document: Document) -> bool:
        return bool(self.label_prompt and document.label)


def label_word(label: str) -> str:
    """A label as the label line spells it."""
    return " " + label


def windows(ids: list[int], length: int, stride: int = 0) -> list[dict[str, np.ndarray]]:
    """Inputs, targets and weights of a document, cut into windows of at most `length`. Each target
    has weight in one window.

    Args:
      stride: targets that each window after the first one adds; what comes before them in it is
        context, with weight 0. 0: `length`, no overlap.
    """
    inputs, targets, stride = (
        np.asarray(ids[:-1], np.int32),
        np.asarray(ids[1:], np.int32),
        stride or length,
    )
    starts, found = [0, *range(length, len(inputs), stride)] if len(inputs) else [], []
    for new, end in zip(starts, [*starts[1:], len(inputs)]):
        begin = new if stride == length else max(0, end - length)
        found.append(
            dict(
                tokens=inputs[begin:end],
                targets=targets[begin:end],
                weights=(np.arange(begin, end) >= new).astype(np.float32),
            )
        )
    return found


class _Unpack(grain_experimental.FlatMapTransform):
    max_fan_out = 1 << 30  # only read for random access

    def flat_map(self, element):
        return element


def _pack(
    dataset: grain.IterDataset, packing: str, length: int, bins: int, seed: int
) -> grain.IterDataset:
    structure = {name: length for name in _FEATURES}
    if packing == "first_fit":
        return grain_experimental.FirstFitPackIterDataset(
            dataset, length_struct=structure, num_packing_bins=bins, seed=seed
        )
    if packing == "concat_then_split":
        return grain_experimental.ConcatThenSplitIterDataset(dataset, length_struct=structure)
    raise ValueError(f"config.data.packing = {packing!r}; valid: {list(PACKINGS)}")


def to_row(packed: dict) -> dict[str, np.ndarray]:
    """Grain's packed element as a row of the Batch contract (copied: Grain hands out views into all
    its bins).
    """
    return dict(
        tokens=np.array(packed["tokens"], np.int32),
        targets=np.array(packed["targets"], np.int32),
        weights=np.array(packed["weights"], np.float32),
        positions=np.array(packed["tokens_positions"], np.int32),
        segments=np.array(packed["tokens_segment_ids"], np.int32),
    )


def stream(
    documents: Documents,
    encoder: Encoder,
    *,
    length: int,
    packing: str,
    bins: int,
    number: int,
    num_streams: int,
    seed: int,
):
    """One of `num_streams` endless iterators over rows: every num_streams-th document, shuffled
    anew each epoch.

    Tokenizing runs in a thread ahead of the packing. The iterator's get_state and set_state restore
    it exactly, whatever the threads were doing.
    """
    # Grain shuffles epoch e with seed + e: neighbouring streams need seeds that are not neighbours.
    shuffle_seed, pack_seed = (
        int(s) for s in np.random.SeedSequence([seed, number]).generate_state(2)
    )
    dataset = (
        grain.MapDataset.source(documents)[number::num_streams]
        .shuffle(seed=shuffle_seed)
        .repeat(None)
    )
    dataset = dataset.map(lambda document: windows(encoder.training(document), length))
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=32))
    dataset = grain_experimental.FlatMapIterDataset(dataset, _Unpack())
    return iter(_pack(dataset, packing, length, bins, pack_seed).map(to_row))


def evaluation_rows(
    windows_: list[dict[str, np.ndarray]], length: int
) -> list[dict[str, np.ndarray]]:
    """Windows packed into rows, each exactly once. The rows depend on the windows alone, not on how
    they are batched later.
    """
    dataset = grain.MapDataset.source(windows_).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    return [to_row(row) for row in _pack(dataset, "first_fit", length, bins=64, seed=0)]


def empty_row(length: int) -> dict[str, np.ndarray]:
    """A row of padding."""
    return dict(
        tokens=np.zeros(length, np.int32),
        targets=np.zeros(length, np.int32),
        weights=np.zeros(length, np.float32),
        positions=np.zeros(length, np.int32),
        segments=np.zeros(length, np.int32),
    )


def count_tokens(documents: Documents, encoder: Encoder) -> int:
    """Number of targets in one epoch."""
    return sum(len(encoder.training(document)) - 1 for document in documents)
