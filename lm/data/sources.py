"""Where documents come from. A source is a function `(split, **args) -> Documents`, named in the
config by its dotted path.

Another corpus is another such function, anywhere importable: the config's `data.source` names it,
`data.source_args` are its arguments.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from lm import files


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
    """Hash of the documents in order: text, name and label."""
    h = hashlib.sha256()
    for document in documents:
        for field in document:
            data = field.encode("utf-8")
            h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:16]


def _in_memory(documents: list[Document], what: str) -> Documents:
    documents = [d for d in documents if d.text]
    if not documents:
        raise ValueError(f"{what} has no documents with text in it")
    return Documents(documents, fingerprint(documents))


def _is_text(value) -> bool:
    try:
        return isinstance(value, str) and isinstance(value.encode("utf-8"), bytes)
    except UnicodeEncodeError:  # lone surrogates
        return False


def _held_out(items: list, split: str, held_out: float) -> list:
    """The first 1 - held_out of a list for "train", the rest for "validation"."""
    if split not in ("train", "validation"):
        raise ValueError(
            f"split {split!r}: this source has 'train' and 'validation' (the last "
            "config.data.source_args.held_out of it)"
        )
    cut = int(len(items) * (1 - held_out))
    return items[:cut] if split == "train" else items[cut:]


def text(
    split: str, *, path: str, held_out: float, separator: str = "", document_chars: int = 0
) -> Documents:
    """UTF-8 text files.

    Args:
      split: "train", the first part, or "validation", the last `held_out` of it.
      path: a file or a glob pattern (gs:// too).
      held_out: share of the documents; of the characters, where the whole is one document.
      separator: what divides documents within a file; "" if each file is one.
      document_chars: cuts what is longer into documents of so many characters, which are then
        shuffled; 0: no cutting.

    Raises:
      ValueError: no file, no text, text that is not UTF-8, or an unknown split.
    """
    texts = [
        (f"{file}:{i}", part)
        for file in files.find(path)
        for i, part in enumerate(
            t
            for t in (
                files.read_text(file).split(separator) if separator else [files.read_text(file)]
            )
            if t
        )
    ]
    if len(texts) == 1:
        name, whole = texts[0]
        texts = [(name, "".join(_held_out(list(whole), split, held_out)))]
    else:
        texts = _held_out(texts, split, held_out)
    if document_chars:
        texts = [
            (f"{name}+{i}", t[i : i + document_chars])
            for name, t in texts
            for i in range(0, len(t), document_chars)
        ]
    return _in_memory([Document(t, name, "") for name, t in texts], f"split {split!r} of {path}")


def jsonl(
    split: str, *, path: str, held_out: float, text_key: str = "text", label_key: str = ""
) -> Documents:
    """JSONL files, a document a line: {"text": ..., "label": ...}.

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
            for key in filter(None, (text_key, label_key)):
                if key not in record:
                    raise ValueError(f"{file}:{number} has no key {key!r}; it has {sorted(record)}")
            if not _is_text(record[text_key]):
                raise ValueError(
                    f"{file}:{number}: {text_key!r} is {record[text_key]!r:.60}; wanted a string "
                    "that UTF-8 can hold"
                )
            documents.append(
                Document(
                    record[text_key],
                    f"{file}:{number}",
                    str(record[label_key]) if label_key else "",
                )
            )
    if "{split}" not in path:
        documents = _held_out(documents, split, held_out)
    return _in_memory(documents, f"split {split!r} of {path}")


def plain(value):
    """A TFDS feature's value as JSON has it: text for bytes, lists for arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


class TfdsRecords(Sequence):
    """The records of a TFDS data source, class labels by name."""

    def __init__(self, source, names: dict[str, list[str]]):
        self._source, self._names = source, names

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {key: self.value(key, value) for key, value in self._source[index].items()}

    def value(self, key: str, value):
        value = plain(value)
        return self._names[key][value] if key in self._names and value >= 0 else value

    def some(self, index: int, keys: Sequence[str]) -> dict:
        """Those of a record's features that are wanted and there, not the others, which may be
        large.
        """
        record = self._source[index]
        return {key: self.value(key, record[key]) for key in keys if key in record}


def open_tfds(
    split: str, name: str, data_dir: str, keys: Sequence[str] = ()
) -> tuple[TfdsRecords, list]:
    """(the records of a split, what identifies them) of a TFDS data set prepared as ArrayRecord.

    Args:
      keys: features that have to be there.

    Raises:
      ValueError: see `tfds`.
    """
    import tensorflow_datasets as tfds_  # half a second: only where used

    folder = epath.Path(data_dir or "~/tensorflow_datasets").expanduser()
    dataset, _, version = name.partition(":")
    prepare = (
        "Prepare it once, where TensorFlow is installed: pip install 'lm[prepare]', then tfds "
        f"build {dataset} --file_format=array_record --data_dir={folder}"
    )
    root = folder / dataset
    versions = (
        sorted(
            (p.name for p in root.iterdir() if (p / "dataset_info.json").exists()), key=_version_key
        )
        if root.exists()
        else []
    )
    if not versions or (version and version not in versions):
        raise ValueError(
            f"no prepared copy of {name!r} in {folder} "
            f"({f'versions there: {versions}' if versions else f'nothing at {root}'}). {prepare}"
        )
    builder = tfds_.builder_from_directory(root / (version or versions[-1]))
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{name!r} in {folder} was prepared as {builder.info.file_format.value}; training "
            f"reads array_record. {prepare}"
        )
    if missing := [key for key in keys if key not in builder.info.features]:
        raise ValueError(
            f"{name!r} has no feature {missing[0]!r}; it has {sorted(builder.info.features)}"
        )
    try:
        info = builder.info.splits[split]
        if not info.num_examples:
            raise _Empty(f"split {split!r} of {name!r} is empty")
        source = builder.as_data_source(split=split)
    except _Empty:
        raise
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(
            f"{name!r} has no split {split!r}; it has {sorted(builder.info.splits)} "
            f"({str(error).splitlines()[0]})"
        ) from None
    names = {
        key: feature.names
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds_.features.ClassLabel)
    }
    return TfdsRecords(source, names), [
        dataset,
        str(builder.info.version),
        split,
        len(source),
        getattr(info, "num_bytes", None),
    ]


class _TfdsItems(Sequence):
    """Documents out of TFDS records."""

    def __init__(self, records, text_key, label_key, name):
        self._records, self._text_key, self._label_key, self._name = (
            records,
            text_key,
            label_key,
            name,
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self._records.some(index, (self._text_key, self._label_key, "name"))
        label = str(record[self._label_key]) if self._label_key else ""
        return Document(
            str(record[self._text_key]), str(record.get("name", f"{self._name}[{index}]")), label
        )


def tfds(
    split: str, *, name: str, data_dir: str, text_key: str = "text", label_key: str = ""
) -> Documents:
    """Any TensorFlow Datasets data set, from a copy prepared as ArrayRecord; TensorFlow is not
    needed.

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
    records, identity = open_tfds(split, name, data_dir, tuple(filter(None, (text_key, label_key))))
    items = _TfdsItems(records, text_key, label_key, identity[0])
    # Reading all of a large corpus would take hours; what TFDS knows of it, and a sample, tell
    # copies apart.
    sample = fingerprint([items[i * len(items) // 256] for i in range(256)])
    return Documents(
        items,
        hashlib.sha256(json.dumps([[*identity, text_key, label_key], sample]).encode()).hexdigest()[
            :16
        ],
    )


class _Empty(ValueError):
    pass


def _version_key(name: str) -> tuple:
    return tuple(int(part) if part.isdigit() else -1 for part in name.split("."))


def take(documents: Documents, max_documents: int) -> Iterator[Document]:
    """All documents, or `max_documents` of them, evenly out of the split; 0: all."""
    return (documents[i] for i in evenly_spaced(len(documents), max_documents))


def evenly_spaced(size: int, most: int) -> list[int]:
    """`most` numbers evenly out of `size`; 0: all."""
    count = min(size, most or size)
    return [i * size // count for i in range(count)]
