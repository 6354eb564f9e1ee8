"""Sources with their targets: sentences and translations, articles and summaries.

They become units (lm/data/units.py) of a target and its source, which are packed side by side:
segment n of a row's targets belongs to segment n of its sources (lm.data.pack.SourceLayout).
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from lm import files, progress
from lm.data.conversations import LeftOut
from lm.data.sources import Documents, HeldOut, fingerprint, is_utf8_text
from lm.data.tokenizer import Tokenizer
from lm.data.units import Unit

KIND = "seq2seq"


class SourceAndTarget(NamedTuple):
    """A text, and what a model is to make of it.

    Attributes:
      name: where it stands, for reports.
    """

    source: str
    target: str
    name: str

    label = ""  # a Document may have one

    @property
    def text(self) -> str:
        """Both, for a tokenizer to be trained on."""
        return f"{self.source}\n{self.target}"


def _documents(items: list[SourceAndTarget]) -> Documents:
    return Documents(items, fingerprint(items), kind=KIND)


def lines(split: str, *, source: str, target: str, lowercase: bool = False) -> Documents:
    """Returns the lines of two text files, where line i of one belongs to line i of the other.

    Args:
      split: what "{split}" in the files' names stands for.
      source, target: the two files.
      lowercase: makes both lower case.

    Raises:
      ValueError: files of different lengths, or a line of one alone, named by its number.
    """
    source, target = (name.replace("{split}", split) for name in (source, target))
    columns = []
    for name in (source, target):
        text = files.read_text(files.expand(name))
        # Only the last line end goes: what an empty line belongs to is found below.
        columns.append((text.lower() if lowercase else text).removesuffix("\n").split("\n"))

    sources, targets = columns
    if len(sources) != len(targets):
        raise ValueError(
            f"{source} has {len(sources)} lines and {target} {len(targets)} in split {split!r}; "
            "line i of one belongs to line i of the other"
        )

    items = []
    for number, (text, wanted) in enumerate(zip(sources, targets), 1):
        place = f"{source}:{number}"
        if text.strip() and wanted.strip():
            items.append(SourceAndTarget(text.strip(), wanted.strip(), place))
        elif text.strip() or wanted.strip():
            side = "target" if text.strip() else "source"
            raise ValueError(f"{place} has no {side}; wanted a text in both files, or in neither")

    if not items:
        raise ValueError(f"{source} and {target} have no texts in split {split!r}")
    return _documents(items)


def jsonl(
    split: str,
    *,
    path: str,
    held_out: float,
    source_key: str = "source",
    target_key: str = "target",
    held_out_by: str = "hash",
) -> Documents:
    """Returns the sources and targets of JSONL files, an object with both a line.

    Args:
      split, path, held_out, held_out_by: see `lm.data.sources.jsonl`.

    Raises:
      ValueError: an object without one of them (file and line are named); see
        `lm.data.sources.jsonl`.
    """

    def read(record: dict, place: str) -> SourceAndTarget:
        for key in (source_key, target_key):
            value = record.get(key)
            if not is_utf8_text(value) or not value.strip():
                raise ValueError(
                    f"{place}: {key} is {value!r:.80}; wanted a text that isn't empty (the object "
                    f"has {sorted(record)})"
                )
        return SourceAndTarget(record[source_key], record[target_key], place)

    held_out_part = HeldOut(split, path, held_out, held_out_by)
    items = held_out_part.of_jsonl(read)
    if not items:
        raise held_out_part.error_without_documents()
    held_out_part.log()
    return _documents(items)


def encode(texts: Documents, tokenizer: Tokenizer, *, length: int, source_length: int) -> Documents:
    """Returns the units of sources and targets, both with what the tokenizer puts around a text.
    Those that are longer than a row are left out, and the log counts them.

    Raises:
      ValueError: none is left.
    """
    units, left_out = [], LeftOut()
    with progress.activity("encoding sources and targets", len(texts), "texts") as encoding:
        for item in encoding.each(texts):
            source, target = around(tokenizer, item.source), around(tokenizer, item.target)
            if len(source) > source_length:
                left_out.add("the source is longer than config.objective.source_length", item.name)
            elif len(target) > length:
                left_out.add("the target is longer than config.data.length", item.name)
            else:
                units.append(Unit(window(source, target), item.name, ""))

    left_out.log("sources and targets")
    if not units:
        raise ValueError(f"no text is left: {dict(left_out.counts)}")
    return dataclasses.replace(texts, items=units)


def around(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a source or a target with what stands around it."""
    before, after = ends(tokenizer)
    return [*before, *tokenizer.encode(text), *after]


def ends(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns what stands before and behind each source and target: BOS and EOS, or EOS alone where
    the tokenizer has no BOS (T5's), for which EOS stands elsewhere.
    """
    before, after = tokenizer.around
    return () if before == after else before, after


def window(source: list[int], target: list[int], *, begins: bool = True) -> dict[str, np.ndarray]:
    """The arrays of a target that is learnt, and of its source.

    The decoder reads the target but for its last token, behind a token of its own: what stands at
    the first place doesn't matter.

    Args:
      begins: whether a document begins with it.
    """
    targets = np.asarray(target, np.int32)
    begins_array = np.zeros(len(targets), np.int32)
    begins_array[0] = begins
    return dict(
        tokens=np.concatenate([targets[:1] * 0, targets[:-1]]),
        targets=targets,
        weights=np.ones(len(targets), np.float32),
        begins=begins_array,
        source=np.asarray(source, np.int32),
    )
