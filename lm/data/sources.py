"""Where documents come from. A source is a function `(split, **args) -> Documents`, named in the
config by its dotted path.

Another corpus is another such function, anywhere importable: the config's `data.source` names it,
`data.source_args` are its arguments.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm import files, progress
from lm.data import records


class Document(NamedTuple):
    text: str
    name: str  # what it is called, for reports; not part of the text
    label: str  # "" where there is none


class StoredTokens(NamedTuple):
    """A text's tokens, without BOS and EOS."""

    tokenizer: str  # the fingerprint of the one that made them
    ids: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest type that has all ids: corpora store their tokens in it."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class TokenizedDocument(NamedTuple):
    """A `Document` whose source has its tokens."""

    text: str
    name: str
    label: str
    stored: StoredTokens


@dataclasses.dataclass(frozen=True)
class Documents:
    """A split: random access to its documents, and the fingerprint of their content (or of what
    identifies it).
    """

    # Where random access is slow they have an order for streams, and readers for threads, of their
    # own: see lm.data.streaming.Blocks.
    items: Sequence[Document]
    fingerprint: str
    # text; of lm.data.conversations.KINDS, whose items are Examples; labelled (lm/data/labelled.py)
    kind: str = "text"
    # of the corpora that it is of, as `lm.prepare` wrote them: what runs keep of it
    cards: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Document:
        return self.items[index]


def fingerprint(documents: Sequence[Document]) -> str:
    """Returns a hash of the documents in order: text, name and label."""

    def fields() -> Iterator[bytes]:
        for document in documents:
            for field in (document.text, document.name, document.label):
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
    split: str,
    *,
    path: str,
    held_out: float,
    held_out_by: str = "hash",
    separator: str = "",
    document_chars: int = 0,
) -> Documents:
    """Returns the documents of text files, see `lm.files.read_text`.

    Args:
      split: "train" or "validation", which is what is held out. A path with "{split}" in it has
        files for each split instead, of any name.
      path: a file, a folder (all files in it, at any depth) or a glob pattern (gs:// too).
      held_out: share of the documents, from 0 to below 1.
      held_out_by: "hash" of a document's text, see `is_held_out`; "tail", the last documents of
        each file, for published splits. A file that is one document is divided by its characters,
        by "tail", and by "hash" where there is no other file.
      separator: what divides documents within a file; "" if each file is one.
      document_chars: cuts what is longer into documents of so many characters, each in the split of
        the whole; 0: no cutting.

    Raises:
      ValueError: no file, no text, a file that is no text, a separator that no file has, a share
        out of range, or an unknown split.
    """
    held_out_part = HeldOut(split, path, held_out, held_out_by)
    found = files.find(path.replace("{split}", split))
    if separator:
        separator = _separator_in(found, separator)

    documents = []
    with progress.activity(f"reading {path}", len(found), "files") as reading:
        for file in reading.each(found):
            content = files.read_text(file)
            parts = content.split(separator) if separator else [content]
            parts = [part for part in parts if part]
            in_file = [Document(part, f"{file}:{number}", "") for number, part in enumerate(parts)]
            if len(parts) == 1 and (held_out_by == "tail" or len(found) == 1):
                in_file = [held_out_part.of_characters(in_file[0], file)]
            else:
                in_file = held_out_part.of_documents(in_file, file)
            documents += _cut(in_file, document_chars) if document_chars else in_file
        return _in_memory(documents, held_out_part)


def jsonl(
    split: str,
    *,
    path: str,
    held_out: float,
    held_out_by: str = "hash",
    text_key: str = "text",
    label_key: str = "",
) -> Documents:
    """Returns the documents of JSONL files, one a line: {"text": ..., "label": ...}.

    Args:
      split, held_out, held_out_by: see `text`.
      path: a file, a folder (all .jsonl files in it, .jsonl.gz and .jsonl.zst too, at any depth) or
        a glob pattern (gs:// too).
      text_key, label_key: keys of the text and of the label; no label if "". A label is a string or
        a number, of which the digits are taken; null or "" where there is none.

    Raises:
      ValueError: no file, a line that is not such an object (file and line are named), a file that
        is no text, a share out of range, or an unknown split.
    """

    def read(record: dict, place: str) -> Document:
        for key in (text_key, label_key) if label_key else (text_key,):
            if key not in record:
                raise ValueError(f"{place} has no key {key!r}; it has {sorted(record)}")
        return document_of(record, place, place, text_key, label_key)

    held_out_part = HeldOut(split, path, held_out, held_out_by)
    return _in_memory(held_out_part.of_jsonl(read), held_out_part)


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
    identity = [*table.identity, text_key, label_key]
    return Documents(documents, sampled_fingerprint(documents, identity))


# What runs keep of the card of a corpus. The rest is samples, and stands beside the corpus.
OF_CARD = (
    "name",
    "version",
    "key",
    "description",
    "splits",
    "sources",
    "languages",
    "tokenizer",
    "summary",
    "versions",
)


def corpus(split: str, *, path: str, label_key: str = "", stored_tokens: bool = True) -> Documents:
    """Returns the documents of a corpus that `python -m lm.prepare` made.

    Args:
      split: train, validation, test; slices too, as TFDS has them.
      path: its folder, OUT/NAME/VERSION.
      label_key: "label" where its documents have labels; "": they are not read.
      stored_tokens: takes the tokens that it has, where it has some; the run needs its tokenizer
        then, config.tokenizer.path = PATH/tokenizer. Without it texts are tokenized anew.

    Raises:
      ValueError: no such folder or split, or files that are no such corpus.
    """
    folder = epath.Path(files.expand(path))
    if not (folder / "card.json").exists():
        raise ValueError(
            f"no corpus at {folder or 'config.data.source_args.path'}: wanted the folder that "
            "python -m lm.prepare printed, with card.json in it"
        )
    card = files.read_json(folder / "card.json")
    stored = _stored_tokens(card, folder) if stored_tokens else None
    keys = ["text", "name", "label", *(["tokens"] if stored else [])]
    table = records.open_folder(split, folder, folder.parent.name, keys)
    documents = _CorpusDocuments(table, bool(label_key), stored)

    summary = {key: card[key] for key in OF_CARD if key in card}
    # Of the shards' bytes; the card's key would change with the dates of the files it was made of.
    splits = _splits_of_card(card, folder)
    fingerprints = [splits[name].get("fingerprint") for name in sorted(splits)]
    identity = [*table.identity, fingerprints, label_key]
    return Documents(documents, sampled_fingerprint(documents, identity), cards=(summary,))


def _splits_of_card(card: Mapping, folder: epath.Path) -> dict[str, dict]:
    """What a card says of each split. Raises ValueError for a card that is damaged."""
    splits = card.get("splits")
    if isinstance(splits, dict) and all(isinstance(about, dict) for about in splits.values()):
        if all(isinstance(about.get("tokens", 0), int) for about in splits.values()):
            return splits
    raise ValueError(f"{folder / 'card.json'}: splits is {splits!r:.80}")


def _stored_tokens(card: Mapping, folder: epath.Path) -> StoredTokens | None:
    """The tokenizer of a corpus's tokens, and none of them in the type that they have; None if it
    has no tokens.

    Raises:
      ValueError: the card is damaged.
    """
    tokenizer = card.get("tokenizer") or {}
    if not isinstance(tokenizer, dict):
        raise ValueError(f"{folder / 'card.json'}: tokenizer is {tokenizer!r:.80}")
    if not tokenizer.get("stored"):
        return None
    fingerprint_, size = tokenizer.get("fingerprint"), tokenizer.get("vocab_size")
    if not isinstance(fingerprint_, str) or not isinstance(size, int):
        raise ValueError(f"{folder / 'card.json'} doesn't say which tokenizer made its tokens")
    return StoredTokens(fingerprint_, np.empty(0, token_dtype(size)))


class _CorpusDocuments(Sequence):
    """Documents of a prepared corpus, read one by one.

    Args:
      stored: whose tokens are read, and their type; None: none are.
    """

    def __init__(self, table: records.TfdsRecords, has_labels: bool, stored: StoredTokens | None):
        self._table, self._has_labels, self._stored = table, has_labels, stored

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Document | TokenizedDocument:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self._table.features(index)
        label = record["label"].decode() if self._has_labels else ""
        document = Document(record["text"].decode(), record["name"].decode(), label)
        if self._stored is None:
            return document
        ids = np.frombuffer(record["tokens"], self._stored.ids.dtype)
        return TokenizedDocument(*document, self._stored._replace(ids=ids))


def sampled_fingerprint(documents: Sequence[Document], identity: list) -> str:
    """Returns a hash of what tells copies of a large corpus apart: what is known of it, and a
    sample. Reading all of it would take hours.
    """
    sample = [documents[i * len(documents) // 256] for i in range(256)]
    return files.short_hash(json.dumps([identity, fingerprint(sample)]).encode())


def is_held_out(text: str, held_out: float) -> bool:
    """Returns whether a document is held out of training, by a hash of its text alone.

    So it is wherever the text stands and whatever else the corpus has, and duplicates are on the
    same side.
    """
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < held_out * 2**64


def check_held_out(split: str, path: str, held_out: float) -> None:
    """Raises ValueError for a share out of range, or a split that files without "{split}" in their
    path don't have.
    """
    where = "config.data.source_args"
    if not 0 <= held_out < 1:
        raise ValueError(f"{where}.held_out = {held_out}; wanted a share, 0 to below 1")
    if "{split}" not in path and split not in ("train", "validation"):
        raise ValueError(
            f"split {split!r}: this source has 'train' and 'validation', which is {where}."
            f"held_out of it. {{split}} in {where}.path stands for files of any split"
        )


HELD_OUT_BY = ("hash", "tail")
SHOWN_FILES = 20  # in the log


class HeldOut:
    """The part of each file that a split has, and the log of it.

    Raises:
      ValueError: a share out of range, or unknown names.
    """

    def __init__(self, split: str, path: str, held_out: float, held_out_by: str):
        check_held_out(split, path, held_out)
        where = "config.data.source_args"
        if held_out_by not in HELD_OUT_BY:
            raise ValueError(f"{where}.held_out_by = {held_out_by!r}; valid: {list(HELD_OUT_BY)}")
        self._has_files_of_its_own = "{split}" in path
        self._split, self._path = split, path
        self._held_out, self._by = held_out, held_out_by
        self._chars = {}  # file -> (characters that the split has, characters)
        self._squares = 0  # of the documents' characters, summed

    def of_jsonl(self, read: Callable[[dict, str], Any]) -> list:
        """Returns what `read(record, place)` makes of the lines of JSONL files, as far as the split
        has it.

        Raises:
          ValueError: no such file, or a line that is no JSON object; see `read`.
        """
        names = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
        found = files.find(self._path.replace("{split}", self._split), names)
        documents = []
        with progress.activity(f"reading {self._path}", len(found), "files") as reading:
            for file in reading.each(found):
                in_file = []
                for number, record in files.read_jsonl(file):
                    in_file.append(read(record, f"{file}:{number}"))
                documents += self.of_documents(in_file, file)
        return documents

    def of_documents(self, documents: list[Document], file: str) -> list[Document]:
        """Returns those documents of a file that the split has."""
        if self._has_files_of_its_own:
            kept = documents
        elif self._by == "tail":
            kept = self._of_ends(documents)
        else:
            is_wanted = self._split == "validation"
            kept = [d for d in documents if is_held_out(d.text, self._held_out) == is_wanted]
        self._count(file, kept, documents)
        return kept

    def of_characters(self, document: Document, file: str) -> Document:
        """Returns the part of a document, all that a file has, that the split has."""
        if self._has_files_of_its_own:
            kept = document
        else:
            self._by = "tail"
            kept = document._replace(text=self._of_ends(document.text))
        self._count(file, [kept], [document])
        return kept

    def _of_ends(self, whole):
        """The beginning of a list or string for "train", its end for "validation"."""
        boundary = int(len(whole) * (1 - self._held_out))
        return whole[:boundary] if self._split == "train" else whole[boundary:]

    def _count(self, file: str, kept: list[Document], documents: list[Document]) -> None:
        self._chars[file] = (_num_chars(kept), _num_chars(documents))
        self._squares += sum(len(document.text) ** 2 for document in documents)

    def log(self) -> None:
        """Logs what share of which file the split has, the largest files first."""
        if self._has_files_of_its_own:
            return
        files_ = sorted(self._chars, key=lambda file: -self._chars[file][1])
        shares = [f"{file} {_percent(*self._chars[file])}" for file in files_[:SHOWN_FILES]]
        if len(files_) > SHOWN_FILES:
            shares.append(f"and {len(files_) - SHOWN_FILES} smaller files")
        kept = sum(chars for chars, _ in self._chars.values())
        total = sum(chars for _, chars in self._chars.values())
        logging.info(
            "split %r has %s of the characters of %s, by %s: %s",
            self._split,
            _percent(kept, total),
            self._path,
            self._by,
            ", ".join(shares),
        )

        # The variance of the share that hashes hold out: is its deviation half of the share?
        variance = self._held_out * (1 - self._held_out) * self._squares / total**2
        if self._by == "hash" and variance > (self._held_out / 2) ** 2:
            logging.warning(
                "documents are too few, or too unequal, for a hash to hold out %g of them: whole "
                "files may be on one side. %s",
                self._held_out,
                _MORE_DOCUMENTS,
            )

    def error_without_documents(self) -> ValueError:
        """The error where the split has no text."""
        message = f"split {self._split!r} of {self._path} has no documents with text in it"
        is_divided = not self._has_files_of_its_own
        if is_divided and any(chars for _, chars in self._chars.values()):
            message += f": config.data.source_args.held_out = {self._held_out:g} leaves it none"
            if self._held_out:
                message += f". {_MORE_DOCUMENTS}"
        return ValueError(message)


_MORE_DOCUMENTS = (
    "Among config.data.source_args, held_out_by='tail' holds out the end of each file, and a "
    "separator (of text) divides files into more documents"
)


def _num_chars(documents: list[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g}%" if whole else "(no text)"


def _in_memory(documents: list[Document], held_out_part: HeldOut) -> Documents:
    """Documents with text in it."""
    documents = [document for document in documents if document.text]
    if not documents:
        raise held_out_part.error_without_documents()
    held_out_part.log()
    return Documents(documents, fingerprint(documents))


def _separator_in(found: list[str], separator: str) -> str:
    """The separator as the files have it: as it was given or, where none has that, with the
    characters that its escapes stand for.

    Raises:
      ValueError: none has either.
    """
    unescaped = files.unescape(separator)
    with_crlf = unescaped.replace("\n", "\r\n")
    in_files = dict.fromkeys((separator, unescaped, with_crlf), False)
    for file in found:
        content = files.read_text(file)
        if separator in content:
            return separator
        for candidate in in_files:
            in_files[candidate] = in_files[candidate] or candidate in content

    where = "config.data.source_args.separator"
    if in_files[unescaped]:
        logging.info("%s: %r is taken for the characters %r", where, separator, unescaped)
        return unescaped
    hint = "where there is none to divide by, leave it empty"
    if in_files[with_crlf]:
        hint = f"{with_crlf!r} does: the files' lines end in that way"
    raise ValueError(f"{where} = {separator!r} occurs in no file; {hint}")


def _cut(documents: list[Document], document_chars: int) -> list[Document]:
    """The documents in pieces of at most `document_chars` characters."""
    pieces = []
    for document in documents:
        for start in range(0, len(document.text), document_chars):
            piece = document.text[start : start + document_chars]
            pieces.append(Document(piece, f"{document.name}+{start}", ""))
    return pieces


def document_of(record: Mapping, name: str, place: str, text_key: str, label_key: str) -> Document:
    """Returns a document out of a record; `place` is where that stands.

    Raises:
      ValueError: its text is none, or its label neither a text nor a number.
    """
    text = record[text_key]
    if not is_utf8_text(text):
        raise ValueError(
            f"{place}: {text_key!r} is {text!r:.60}; wanted a string that UTF-8 can hold"
        )

    label = record[label_key] if label_key else ""
    if label is None:
        label = ""
    elif isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    elif isinstance(label, float) and math.isfinite(label):
        label = str(label)
    if not is_utf8_text(label):
        raise ValueError(
            f"{place}: the label {label_key!r} is {label!r:.60}; wanted a string, a number, or "
            "null for none"
        )
    return Document(text, name, label)


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
        # TFDS writes -1 where a split has no labels.
        if self._label_key in self._table.class_names and record[self._label_key] == -1:
            record[self._label_key] = None
        # Few data sets name their records; the others go by data set and number.
        place = f"{self._table.identity[0]}[{index}]"
        name = str(record.get("name", place))
        return document_of(record, name, place, self._text_key, self._label_key)
