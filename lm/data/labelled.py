"""Texts that a model's head is trained on: each with a class, a score, or a label for each word.

    {"text": ..., "label": "good"}                          a class, by its name
    {"text": ..., "score": 3.5}                             a score
    {"words": ["a", "fine", "day"], "labels": ["O", ...]}   a label for each word

Their tokens become units (lm/data/units.py): `values` holds what the head is to say, `weights`
where it says it.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm import files, progress
from lm.data.sources import Documents, HeldOut, is_utf8_text
from lm.data.tokenizer import Tokenizer
from lm.data.units import Unit

KINDS = ("class", "score", "labels")
# Which keys a record of each kind has.
_KEYS = {"class": ("text", "label"), "score": ("text", "score"), "labels": ("words", "labels")}


class Labelled(NamedTuple):
    """A text and what a head is to say of it.

    Attributes:
      words: the text as one piece; or its words, where each has a label.
      values: the number of the class, the score, or the number of each word's label.
      name: where it stands, for reports.
    """

    words: tuple[str, ...]
    values: tuple[float, ...]
    name: str

    @property
    def text(self) -> str:
        return " ".join(self.words)


@dataclasses.dataclass(frozen=True)
class LabelledTexts(Documents):
    """A split of such texts.

    Attributes:
      label_kind: of `KINDS`.
      labels: the names that values are numbers of; () of scores.
    """

    label_kind: str = "class"
    labels: tuple[str, ...] = ()
    kind: str = "labelled"


def as_documents(
    items: Sequence[Labelled], label_kind: str, labels: Sequence[str]
) -> LabelledTexts:
    """The texts as a split."""
    facts = json.dumps([label_kind, list(labels), [list(item) for item in items]])
    fingerprint = files.short_hash(facts.encode())
    return LabelledTexts(items, fingerprint, label_kind=label_kind, labels=tuple(labels))


def jsonl(
    split: str, *, path: str, held_out: float, labels: Sequence[str], held_out_by: str = "hash"
) -> LabelledTexts:
    """Returns the labelled texts of JSONL files, in one of the forms above.

    Args:
      split, path, held_out, held_out_by: see `lm.data.sources.jsonl`.
      labels: the names of classes or of words' labels, in the order of their numbers; () of scores.

    Raises:
      ValueError: a record in none of the forms or in another than those before it, or with an
        unknown label (file and line are named); see `lm.data.sources.jsonl`.
    """
    numbers = {name: number for number, name in enumerate(labels)}
    kinds: dict[str, str] = {}

    def read(record: dict, place: str) -> Labelled:
        kind, item = _read(record, place, numbers)
        kinds.setdefault(kind, place)
        return item

    held_out_part = HeldOut(split, path, held_out, held_out_by)
    items = held_out_part.of_jsonl(read)
    if len(kinds) > 1:
        raise ValueError(f"{path} has records of several kinds: {kinds}; wanted one of them")
    if not items:
        raise held_out_part.error_without_documents()
    held_out_part.log()
    return as_documents(items, next(iter(kinds)), labels)


def _read(record: Mapping, place: str, numbers: Mapping[str, int]) -> tuple[str, Labelled]:
    """(kind, what a record says)."""
    kinds = [kind for kind, keys in _KEYS.items() if set(keys) <= record.keys()]
    if not kinds:
        wanted = [list(keys) for keys in _KEYS.values()]
        raise ValueError(f"{place} has the keys {sorted(record)}; wanted one of {wanted}")
    kind = kinds[0]
    text_key, value_key = _KEYS[kind]
    words, values = record[text_key], record[value_key]
    if kind != "labels":
        words, values = [words], [values]
    is_text = isinstance(words, list) and words and all(map(is_utf8_text, words))
    if not is_text or not isinstance(values, list) or len(values) != len(words):
        raise ValueError(
            f"{place}: {text_key} and {value_key} are {record[text_key]!r:.80} and "
            f"{record[value_key]!r:.80}; wanted a text and its value, or as many labels as words"
        )
    if kind == "score":
        (score,) = values
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not is_number or not math.isfinite(score) or abs(score) > 1e6:
            raise ValueError(f"{place}: score = {score!r}; wanted a number of at most 1e6")
        return kind, Labelled(tuple(words), (float(score),), place)

    unknown = [value for value in values if not isinstance(value, str) or value not in numbers]
    if unknown:
        raise ValueError(
            f"{place}: {value_key} has {unknown[0]!r}; wanted one of "
            f"config.data.source_args.labels = {list(numbers)}"
        )
    return kind, Labelled(tuple(words), tuple(float(numbers[v]) for v in values), place)


def encode(texts: LabelledTexts, tokenizer: Tokenizer, *, length: int, place: str) -> Documents:
    """Returns the units of labelled texts. Longer texts than a row lose their end; the log counts
    them.

    Args:
      place: of a class or a score: at the "first" token, [CLS] of an encoder, or at the "last". A
        word's label stands at its first token, or at its last.

    Raises:
      ValueError: a row that has no room for a token of a text.
    """
    before, after = tokenizer.around
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"config.data.length = {length} has no room for a text")

    units, num_cut = [], 0
    with progress.activity("encoding texts", len(texts), "texts") as encoding:
        for item in encoding.each(texts):
            ids, places = _tokens(item, tokenizer, place)
            num_cut += len(ids) > room
            whole = np.asarray([*before, *ids[:room], *after], np.int32)
            if texts.label_kind == "labels":
                # Words whose token was cut off have no label.
                kept = [(len(before) + p, v) for p, v in zip(places, item.values) if p < room]
            else:
                kept = [(0 if place == "first" else len(whole) - 1, item.values[0])]
            units.append(Unit(_arrays(whole, kept), item.name, ""))

    if num_cut:
        logging.warning(
            "%d of %d texts are longer than a row and lose their end", num_cut, len(texts)
        )
    return dataclasses.replace(texts, items=units)


def _tokens(item: Labelled, tokenizer: Tokenizer, place: str) -> tuple[list[int], list[int]]:
    """(ids, the place of each word's label among them)."""
    if len(item.words) == 1:
        ids = tokenizer.encode(item.words[0])
        return ids, [0 if place == "first" else max(len(ids) - 1, 0)]
    ids: list[int] = []
    places = []
    for number, word in enumerate(item.words):
        start = len(ids)
        ids += tokenizer.encode(f" {word}" if number else word)
        places.append(start if place == "first" else max(len(ids) - 1, start))
    return ids, places


def _arrays(ids: np.ndarray, kept: Sequence[tuple[int, float]]) -> dict[str, np.ndarray]:
    size = len(ids)
    arrays = dict(
        tokens=ids,
        targets=np.zeros(size, np.int32),
        weights=np.zeros(size, np.float32),
        positions=np.arange(size, dtype=np.int32),
        part=np.zeros(size, np.int32),
        values=np.zeros(size, np.float32),
        stored_logprobs=np.zeros(size, np.float32),
    )
    for place, value in kept:
        arrays["weights"][place] = 1
        arrays["values"][place] = value
    return arrays
