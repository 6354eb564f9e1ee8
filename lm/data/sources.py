"""Where documents come from. A source is a function `(split, **args) -> Documents`, named in the
config by its dotted path.

Another corpus is another such function, anywhere importable: the config's `data.source` names it,
`data.source_args` are its arguments.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lm import files
from lm.data import records


class Document(NamedTuple):
    text: str
    name: str  # what it is called, for reports; not part of the text
    label: str  # "" where there is none


@dataclasses.dataclass(frozen=True)
class Documents:
    """A split: random access to its documents, and the fingerprint of their content (or of what
    identifies it).
    """

    items: Sequence[Document]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Document:
        return self.items[index]


def fingerprint(documents: Sequence[Document]) -> str:
    """Returns a hash of the documents in order: text, name and label."""

    def fields() -> Iterator[bytes]:
        for document in documents:
            for field in document:
                yield field.encode("utf-8")

    return files.short_hash_of_parts(fields())


def is_utf8_text(value) -> bool:
    """Returns whether a value is a string that UTF-8 can hold: one without lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text(
    split: str, *, path: str, held_out: float, separator: str = "", document_chars: int = 0
) -> Documents:
    """Returns the documents of UTF-8 text files.

    Args:
      split: "train", the first part, or "validation", the rest, a share of `held_out`.
      path: a file or a glob pattern (gs:// too).
      held_out: share of the documents; of the characters, where the whole is one document.
      separator: what divides documents within a file; "" if each file is one.
      document_chars: cuts what is longer into documents of so many characters; 0: no cutting.

    Raises:
      ValueError: no file, no text, text that is not UTF-8, or an unknown split.
    """
    documents = []
    for file in files.find(path):
        content = files.read_text(file)
        parts = content.split(separator) if separator else [content]
        parts = [part for part in parts if part]
        for number, part in enumerate(parts):
            documents.append(Document(part, f"{file}:{number}", ""))

    if len(documents) == 1:
        whole = documents[0]
        documents = [whole._replace(text=_part_of_split(whole.text, split, held_out))]
    else:
        documents = _part_of_split(documents, split, held_out)

    # After the split, so that no document has parts in both.
    if document_chars:
        documents = _cut(documents, document_chars)
    return _in_memory(documents, f"split {split!r} of {path}")


def jsonl(
    split: str, *, path: str, held_out: float, text_key: str = "text", label_key: str = ""
) -> Documents:
    """Returns the documents of JSONL files, one a line: {"text": ..., "label": ...}.

    Args:
      split: "train", the first documents, or "validation", the last `held_out` of them. A path with
        "{split}" in it has a file for each split instead, of any name.
      path: a file or a glob pattern (gs:// too).
      held_out: share of the documents.
      text_key, label_key: keys of the text and of the label; no label if "".

    Raises:
      ValueError: no file, a line that is not such an object (file and line are named), not UTF-8,
        or an unknown split.
    """
    documents = []
    for file in files.find(path.replace("{split}", split)):
        for number, record in files.read_jsonl(file):
            document = _document_of_record(record, f"{file}:{number}", text_key, label_key)
            documents.append(document)

    if "{split}" not in path:
        documents = _part_of_split(documents, split, held_out)
    return _in_memory(documents, f"split {split!r} of {path}")


def tfds(
    split: str, *, name: str, data_dir: str, text_key: str = "text", label_key: str = ""
) -> Documents:
    """Returns the documents of any TensorFlow Datasets data set, from a copy prepared as
    ArrayRecord; TensorFlow is not needed.

    Args:
      split: TFDS's split, slices too: "train[:90%]".
      name: TFDS's name, with configuration and version if wanted: "lm1b", "c4/en:3.1.0".
      data_dir: where it was prepared (gs:// too, with the extra gcs); "" for TFDS's default,
        ~/tensorflow_datasets.
      text_key, label_key: features; no label if "".

    Raises:
      ValueError: not prepared there, prepared in another format, or no such split or feature; with
        what to do.
    """
    keys = [key for key in (text_key, label_key) if key]
    table = records.open_tfds(split, name, data_dir, keys)
    documents = _TfdsDocuments(table, text_key, label_key)

    # Reading all of a large corpus would take hours; what TFDS knows of it, and a sample, tell
    # copies apart.
    sample = [documents[i * len(documents) // 256] for i in range(256)]
    identity = [[*table.identity, text_key, label_key], fingerprint(sample)]
    return Documents(documents, files.short_hash(json.dumps(identity).encode()))


def _in_memory(documents: list[Document], what: str) -> Documents:
    """Documents with text in it; `what` names them in the error if there are none."""
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError(f"{what} has no documents with text in it")
    return Documents(documents, fingerprint(documents))


def _part_of_split(whole, split: str, held_out: float):
    """The first 1 - held_out of a list or string for "train", the rest for "validation"."""
    if split not in ("train", "validation"):
        raise ValueError(
            f"split {split!r}: this source has 'train' and 'validation' (the last "
            "config.data.source_args.held_out of it)"
        )
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out = {held_out}; wanted a share, 0 to 1")
    boundary = int(len(whole) * (1 - held_out))
    return whole[:boundary] if split == "train" else whole[boundary:]


def _cut(documents: list[Document], document_chars: int) -> list[Document]:
    """The documents in pieces of at most `document_chars` characters."""
    pieces = []
    for document in documents:
        for start in range(0, len(document.text), document_chars):
            piece = document.text[start : start + document_chars]
            pieces.append(Document(piece, f"{document.name}+{start}", ""))
    return pieces


def _document_of_record(record: dict, place: str, text_key: str, label_key: str) -> Document:
    """A document out of a JSONL file's object; `place` is its file and line."""
    for key in (text_key, label_key) if label_key else (text_key,):
        if key not in record:
            raise ValueError(f"{place} has no key {key!r}; it has {sorted(record)}")

    text = record[text_key]
    if not is_utf8_text(text):
        raise ValueError(
            f"{place}: {text_key!r} is {text!r:.60}; wanted a string that UTF-8 can hold"
        )
    label = str(record[label_key]) if label_key else ""
    return Document(text, place, label)


class _TfdsDocuments(Sequence):
    """Documents out of TFDS records, read one by one."""

    def __init__(self, table: records.TfdsRecords, text_key: str, label_key: str):
        self._table = table
        self._text_key = text_key
        self._label_key = label_key

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)

        record = self._table.select(index, (self._text_key, self._label_key, "name"))
        label = str(record[self._label_key]) if self._label_key else ""
        # Few data sets name their records; the others go by data set and number.
        name = str(record.get("name", f"{self._table.identity[0]}[{index}]"))
        return Document(str(record[self._text_key]), name, label)
