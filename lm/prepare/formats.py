"""Reads files into documents. What can't be read is named by file and offset, never left out
silently.

A reader is a function (path, source, work) -> documents. `source` has the keys of
`lm.prepare.config.Source` and its `name`. What isn't read is told to `work.bad`.
"""

import csv
import functools
import gzip
import io
import json
import os
import re
import xml.etree.ElementTree
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import zstandard
from etils import epath

from lm import files
from lm.prepare import extract
from lm.prepare.shards import Damaged, Document, Work

# What a packed file raises when it ends too early, or isn't one.
_UNPACKING = (EOFError, OSError, zlib.error, zstandard.ZstdError)


# --- bytes ---


class Bounded(io.RawIOBase):
    """An unpacked stream that ends with an error where it grows far beyond the packed file: text
    unpacks to some ten times its size.
    """

    def __init__(self, stream, size: int, path: str):
        self._stream, self._path = stream, path
        self._left = self._limit = max(files.SMALL, files.MAX_UNPACKED * size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except _UNPACKING as error:
            raise Damaged(f"it is cut off, or damaged: {error}") from None
        self._left -= len(piece)
        if self._left < 0:
            raise Damaged(f"it unpacks to more than {self._limit:,} bytes; unpack it yourself")
        buffer[: len(piece)] = piece
        return len(piece)


def open_unpacked(path: str) -> BinaryIO:
    """Opens a file, which may be packed by gzip, bzip2 or zstd: its first bytes say so.

    Raises:
      Damaged: while it is read; it is cut off, damaged, or unpacks to far too much.
    """
    file = epath.Path(path).open("rb")
    head = file.read(4)
    file.seek(0)
    if head.startswith(files.GZIP):
        stream = gzip.GzipFile(fileobj=file)
    elif head.startswith(files.ZSTD):
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    elif head.startswith(b"BZh"):
        import bz2

        stream = bz2.BZ2File(file)
    else:
        return io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file
    return io.BufferedReader(Bounded(stream, epath.Path(path).stat().length, path), 1 << 20)


def lines(stream: BinaryIO, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (offset, line without its end); None in place of one of more than `most` bytes, which
    is never held whole.
    """
    offset = 0
    while line := stream.readline(most + 1):
        begin, offset = offset, offset + len(line)
        if len(line) <= most or line.endswith(b"\n"):
            yield begin, line.rstrip(b"\r\n")
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
            offset += len(line)
        yield begin, None


# --- encodings ---


def decode(content: bytes, work: Work, source: Mapping, place: str, said: str = "") -> str | None:
    """Returns the text of bytes, or None if they are none.

    Text is UTF-8, or what a byte-order mark says, or what `said` is (by a header), if all bytes are
    in that encoding; else what two detectors say. Each is counted.
    """
    for mark, encoding in files.BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            text = _strictly(content[len(mark) :], encoding)
            return _counted(text, encoding, work, source, place)
    for encoding in ("utf-8", said):
        text = _strictly(content, encoding) if encoding else None
        if text is not None and "\0" not in text:
            return _counted(text, encoding, work, source, place)

    if work.settings["encodings"] == "detect":
        for encoding in _detected(content):
            text = _strictly(content, encoding)
            if text is not None and "\0" not in text:
                return _counted(text, encoding, work, source, place)
    return _counted(None, "", work, source, place)


def _strictly(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None


def _detected(content: bytes) -> Iterator[str]:
    """Encodings that may be the one, likeliest first."""
    from resiliparse.parse.encoding import detect_encoding

    sample = content[: 1 << 16]
    if encoding := detect_encoding(content, from_html_meta=True):
        yield encoding
    import charset_normalizer

    if best := charset_normalizer.from_bytes(sample).best():
        yield best.encoding


def _counted(
    text: str | None, encoding: str, work: Work, source: Mapping, place: str
) -> str | None:
    if text is None:
        work.bad("encoding", source["name"], place, "no encoding has all of its bytes")
    elif encoding != "utf-8":
        work.count(f"encoding.{encoding.lower()}", source["name"])
        chance = files.short_hash(place.encode("utf-8", "surrogatepass"))
        work.keep_sample(f"encoding.{encoding.lower()}", [chance, place, text[:200]])
    return text


# --- documents ---


def _max_bytes(work: Work) -> int:
    return int(work.settings["max_document_mb"] * 1e6)


def make(
    path: str, place: Any, text: str, source: Mapping, *, name: str = "", **fields: str
) -> Document:
    """A document whose id is source, file and place."""
    id_ = f"{source['name']}:{path}:{place}"
    fields = {"licence": source["licence"]} | fields
    return Document(id_, text, source["name"], name or f"{path}:{place}", **fields)


def _from_record(record: Mapping, path: str, place: Any, source: Mapping, work: Work):
    """The document of a record of a table, or None."""
    values = {}
    for field in ("text", "label", "name", "language"):
        key = source[f"{field}_key"]
        value = record.get(key, "") if key else ""
        if field == "text" and key not in record:
            why = f"it has no key {key!r}; it has {sorted(map(str, record))[:20]}"
            return work.bad("no_text", source["name"], f"{path}:{place}", why)
        if field != "text" and isinstance(value, (int, float)):
            value = str(value)
        if value is None or isinstance(value, bool):
            value = ""
        if isinstance(value, bytes):
            value = decode(value, work, source, f"{path}:{place}")
        if not isinstance(value, str):
            why = f"{key!r} is a {type(value).__name__}; wanted a text"
            return work.bad("type", source["name"], f"{path}:{place}", why)
        values[field] = value
    return make(path, place, source=source, **values)


def read_text(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A text file: a document, or several with a separator between them."""
    with open_unpacked(path) as stream:
        content = stream.read() if source["separator"] else stream.read(_max_bytes(work) + 1)
    if not source["separator"]:
        if len(content) > _max_bytes(work):
            work.bad("too_large", source["name"], path, "larger than collect.max_document_mb")
            return
        text = decode(content, work, source, path)
        if text is not None:
            yield make(path, 0, text, source, name=path)
        return

    text = decode(content, work, source, path)
    for number, part in enumerate(text.split(source["separator"]) if text else ()):
        if len(part.encode("utf-8", "surrogatepass")) > _max_bytes(work):
            place = f"{path}:{number}"
            work.bad("too_large", source["name"], place, "larger than collect.max_document_mb")
        elif part:
            yield make(path, number, part, source)


def read_jsonl(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A JSONL file: an object a line."""
    with open_unpacked(path) as stream:
        for offset, line in lines(stream, _max_bytes(work)):
            place = f"{path}:{offset}"
            if line is None:
                work.bad("too_large", source["name"], place, "a line over collect.max_document_mb")
                continue
            if not line.strip():
                continue
            text = decode(line, work, source, place)
            if text is None:
                continue
            try:
                record = files.parse_json(text, "the line")
            except ValueError as error:
                work.bad("not_json", source["name"], place, str(error))
                continue
            if document := _from_record(record, path, offset, source, work):
                yield document


def read_csv(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A CSV file whose first row names the columns."""
    csv.field_size_limit(min(_max_bytes(work), 2**31 - 1))
    with open_unpacked(path) as stream:
        # Rows may go over lines, so a file has one encoding. Its beginning says which.
        head = stream.peek(1 << 16)[: 1 << 16]
        head = head[: head.rfind(b"\n") + 1] or head
        encoding = "utf-8" if _strictly(head, "utf-8") is not None else next(_detected(head))
        if encoding != "utf-8":
            work.count(f"encoding.{encoding.lower()}", source["name"])
        rows = csv.DictReader(io.TextIOWrapper(stream, f"{encoding}", newline=""))
        number = 1
        while True:
            number += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                work.bad("not_csv", source["name"], f"{path}:row {number}", str(error))
                # Behind a wrong byte there is no telling where the next row begins.
                if isinstance(error, UnicodeDecodeError):
                    return
                continue
            if None in row or None in row.values():
                why = "it has another number of columns than the first row"
                work.bad("not_csv", source["name"], f"{path}:row {number}", why)
            elif document := _from_record(row, path, number, source, work):
                yield document


def read_parquet(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A Parquet file, of which the columns that are wanted are read."""
    import pyarrow
    import pyarrow.parquet

    keys = [source[key] for key in ("text_key", "label_key", "name_key", "language_key")]
    number = 0
    try:
        with epath.Path(path).open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            if source["text_key"] not in table.schema_arrow.names:
                why = f"no column {source['text_key']!r}; it has {table.schema_arrow.names}"
                work.bad("no_text", source["name"], path, why)
                return
            columns = [key for key in keys if key in table.schema_arrow.names]
            for batch in table.iter_batches(1024, columns=columns):
                for record in batch.to_pylist():
                    if document := _from_record(record, path, number, source, work):
                        yield document
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise Damaged(f"behind row {number}: {error}") from None


# --- pages ---


@functools.cache
def _extractor(name: str, seconds: float) -> extract.Extractor:
    """That of this process."""
    return extract.Extractor(name, seconds)


def _main_text(
    content: str, path: str, place: Any, source: Mapping, work: Work, name: str
) -> str | None:
    extractor = _extractor(name, work.settings["extract_seconds"])
    try:
        return extractor.extract(content)
    except extract.Failed as error:
        work.bad("extractor", source["name"], f"{path}:{place}", str(error))
        return None


def read_html(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """An HTML file: its main text."""
    with open_unpacked(path) as stream:
        content = stream.read(_max_bytes(work) + 1)
    if len(content) > _max_bytes(work):
        work.bad("too_large", source["name"], path, "larger than collect.max_document_mb")
        return
    page = decode(content, work, source, path)
    if page is not None:
        text = _main_text(page, path, 0, source, work, work.settings["extractor"])
        if text is not None:
            yield make(path, 0, text, source, name=path)


def read_warc(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A WARC file: the main text of each response that is a page, and the text of each conversion
    (WET). It may be packed.
    """
    from fastwarc import warc

    wanted = warc.WarcRecordType.response | warc.WarcRecordType.conversion
    with epath.Path(path).open("rb") as file:
        try:
            # Responses that were packed for the transfer are unpacked here, up to a limit.
            records = warc.ArchiveIterator(file, record_types=wanted, auto_decode="none")
            for record in records:
                offset = record.stream_pos
                if document := _from_warc(record, path, offset, source, work):
                    yield document
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            raise Damaged(f"it is cut off, or damaged: {error}") from None


def _from_warc(record, path: str, offset: int, source: Mapping, work: Work) -> Document | None:
    place = f"{path}:{offset}"
    name = record.headers.get("WARC-Target-URI") or ""
    most = _max_bytes(work)
    content_type = (record.http_content_type or "").lower() if record.is_http else "text/plain"
    if content_type not in ("text/html", "application/xhtml+xml", "text/plain"):
        work.count("other_type", source["name"])
        return None

    content = record.reader.read(most + 1)
    if record.is_http:
        if len(content) < record.content_length and len(content) <= most:
            work.bad("cut_off", source["name"], place, "it is shorter than its header says")
            return None
        content = _transferred(content, record.http_headers, most, work, source, place)
    if content is None:
        return None
    if len(content) > most:
        work.bad("too_large", source["name"], place, "larger than collect.max_document_mb")
        return None

    page = decode(content, work, source, place, said=(record.http_charset or ""))
    if page is None or content_type == "text/plain":
        return make(path, offset, page, source, name=name) if page is not None else None
    text = _main_text(page, path, offset, source, work, work.settings["extractor"])
    return make(path, offset, text, source, name=name) if text is not None else None


def _transferred(
    content: bytes, headers, most: int, work: Work, source: Mapping, place: str
) -> bytes | None:
    """The content of a response whose transfer or content coding is undone."""
    try:
        if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
            content = _joined_chunks(content)
        coding = (headers.get("Content-Encoding") or "").lower().strip()
        if coding in ("gzip", "x-gzip", "deflate"):
            # 32: zlib's or gzip's head; -15: deflate without any.
            bits = 47 if content[:2] == files.GZIP or content[:1] == b"\x78" else -15
            return zlib.decompressobj(bits).decompress(content, most + 1)
        if coding not in ("", "identity", "none"):
            work.bad("coding", source["name"], place, f"Content-Encoding {coding!r}")
            return None
    except (zlib.error, ValueError) as error:
        work.bad("coding", source["name"], place, str(error))
        return None
    return content


def _joined_chunks(content: bytes) -> bytes:
    """The body of a chunked response (RFC 9112, section 7.1); one that isn't chunked as it is: some
    archives store it joined.

    Raises:
      ValueError: a chunk that is cut off.
    """
    parts = []
    start = 0
    while match := re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,200}\r?\n").match(content, start):
        size = int(match[1], 16)
        if not size:
            return b"".join(parts)
        part = content[match.end() : match.end() + size]
        if len(part) < size:
            raise ValueError("a chunk is cut off")
        parts.append(part)
        start = match.end() + size
        start += 2 if content[start : start + 2] == b"\r\n" else 0
    if parts:
        raise ValueError(f"no chunk at {start}")
    return content


def read_wikipedia(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A dump of a wiki in MediaWiki's XML: the text of each article that is no redirect."""
    with open_unpacked(path) as stream:
        try:
            for number, (title, text) in enumerate(_articles(stream)):
                if len(text) > _max_bytes(work):
                    place = f"{path}:page {number}"
                    work.bad("too_large", source["name"], place, "over collect.max_document_mb")
                    continue
                plain = _main_text(text, path, number, source, work, "wikitext")
                if plain is not None:
                    yield make(path, number, plain, source, name=title)
        except xml.etree.ElementTree.ParseError as error:
            raise Damaged(f"it is cut off, or no XML: {error}") from None


def _articles(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of each page in the main namespace."""
    root = None
    for event, element in xml.etree.ElementTree.iterparse(stream, ("start", "end")):
        if root is None:
            root = element
        if event == "start" or not element.tag.endswith("}page"):
            continue
        namespace = element.tag.removesuffix("page")
        is_article = element.findtext(f"{namespace}ns") == "0"
        if is_article and element.find(f"{namespace}redirect") is None:
            title = element.findtext(f"{namespace}title") or ""
            yield title, element.findtext(f"{namespace}revision/{namespace}text") or ""
        # The tree would hold all pages.
        root.clear()


# --- data sets ---


def _range(path: str) -> tuple[str, int, int]:
    """Of "name[10:20]"."""
    name, _, rest = path.removesuffix("]").rpartition("[")
    begin, _, end = rest.partition(":")
    return name, int(begin), int(end)


def read_tfds(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """Records of a TFDS data set, by number."""
    name, begin, end = _range(path)
    table = open_tfds(source)
    for number in range(begin, end):
        if document := _from_record(table[number], name, number, source, work):
            yield document


@functools.lru_cache(maxsize=4)
def _opened_tfds(split: str, name: str, data_dir: str):
    from lm.data import records

    return records.open_tfds(split, name, data_dir)


def open_tfds(source: Mapping):
    """The records of a TFDS data set."""
    return _opened_tfds(source["split"], source["path"], source["data_dir"])


def read_hugging_face(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """Records of a Hugging Face data set, by number."""
    name, begin, end = _range(path)
    table = open_hugging_face(source)
    for number in range(begin, end):
        if document := _from_record(table[number], name, number, source, work):
            yield document


def open_hugging_face(source: Mapping):
    """The records of a Hugging Face data set."""
    from lm.data import streaming

    return streaming.load_hugging_face(source["path"], source["config"], source["split"])


# --- source trees ---

# What a licence's text has that no other's has -> its SPDX name. The longest ones first.
LICENCES = (
    ("gnu affero general public license", "AGPL-3.0"),
    ("gnu lesser general public license", "LGPL"),
    ("gnu general public license", "GPL"),
    ("mozilla public license version 2.0", "MPL-2.0"),
    ("mozilla public license, version 2.0", "MPL-2.0"),
    ("apache license version 2.0", "Apache-2.0"),
    ("neither the name of", "BSD-3-Clause"),
    ("redistributions in binary form must reproduce", "BSD-2-Clause"),
    ("permission to use, copy, modify, and/or distribute this software", "ISC"),
    ("permission to use, copy, modify, and distribute this software", "ISC"),
    ("permission is hereby granted, free of charge", "MIT"),
    ("python software foundation license", "PSF-2.0"),
    ("this is free and unencumbered software", "Unlicense"),
    ("cc0 1.0 universal", "CC0-1.0"),
)
_LICENCE_FILES = re.compile(r"(LICEN[CS]E|COPYING)([.-].*)?", re.IGNORECASE)


def licence_of(text: str) -> str:
    """Returns the SPDX name of a licence's text; "": it is none of `LICENCES`."""
    words = " ".join(text.lower().split())
    for phrase, name in LICENCES:
        if phrase in words:
            return name
    return ""


@functools.lru_cache(maxsize=4096)
def licence_above(folder: str) -> str:
    """Returns the licence of the nearest folder, from this one up, that has a file with one."""
    path = epath.Path(folder)
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if _LICENCE_FILES.fullmatch(entry.name) and entry.is_file():
                if name := licence_of(entry.read_bytes()[: 1 << 16].decode("utf-8", "replace")):
                    return name
    above = os.path.dirname(folder)
    return licence_above(above) if above and above != folder else ""


def read_code(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A source file, with the licence of the tree that it stands in."""
    for document in read_text(path, source | {"separator": ""}, work):
        licence = source["licence"] or licence_above(os.path.dirname(path))
        document = document._replace(licence=licence, language=os.path.splitext(path)[1])
        if source["licences"] and licence not in source["licences"]:
            work.drop("licence", document, f"{path}: {licence or 'no licence found'}")
        else:
            yield document


class Format(NamedTuple):
    read: Callable[[str, Mapping, Work], Iterator[Document]]
    names: tuple[str, ...]  # of files in a folder
    packages: tuple[str, ...] = ()  # that decide what is read


_TABLES = ("", ".gz", ".zst", ".bz2")


def _packed(*endings: str) -> tuple[str, ...]:
    return tuple(f"*{ending}{packed}" for ending in endings for packed in _TABLES)


_DETECTION = ("resiliparse", "charset-normalizer")
FORMATS = {
    "text": Format(read_text, ("*",), _DETECTION),
    "jsonl": Format(read_jsonl, _packed(".jsonl", ".json", ".ndjson"), _DETECTION),
    "csv": Format(read_csv, _packed(".csv"), _DETECTION),
    "parquet": Format(read_parquet, ("*.parquet",), ("pyarrow",)),
    "html": Format(read_html, ("*.html", "*.htm", "*.xhtml"), _DETECTION),
    "warc": Format(read_warc, _packed(".warc", ".wet"), (*_DETECTION, "fastwarc")),
    "wikipedia": Format(read_wikipedia, _packed(".xml"), ("mwparserfromhell",)),
    "code": Format(read_code, ("*",), _DETECTION),
    "tfds": Format(read_tfds, (), ("tensorflow-datasets",)),
    "hugging_face": Format(read_hugging_face, (), ("datasets",)),
}
