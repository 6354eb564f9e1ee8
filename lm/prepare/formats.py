"""Reads files into documents. What can't be read is named by file and offset, never left out
silently.

A reader is a function (path, source, work) -> documents. `source` has the keys of
`lm.prepare.config.Source` and its `name`. What isn't read is told to `work.bad`.
"""

import codecs
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import re
import xml.etree.ElementTree
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import pyarrow
from etils import epath

from lm import files
from lm.prepare import extract
from lm.prepare.shards import Damaged, Document, Work

# --- bytes ---

# The first bytes of what is unpacked -> what pyarrow calls it.
PACKED = {files.GZIP: "gzip", files.ZSTD: "zstd", b"BZh": "bz2"}
PIECE = 1 << 12  # bytes that are unpacked at once: they are lost where the damage begins


class Stream(io.RawIOBase):
    """The bytes of a file, unpacked. It ends with an error where they are far more than the packed
    ones: text unpacks to some ten times its size.

    Attributes:
      tail: the last four bytes that were read.
    """

    def __init__(self, file: BinaryIO, codec: str, limit: int):
        self._file, self._codec, self._limit = file, codec, limit
        self._size = 0
        self._damage: Damaged | None = None
        self.tail = b""

        # Unlike Python's own modules, it tells a file that is cut off from one that is whole.
        self._stream = file
        if codec:
            self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), codec)

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def readinto(self, buffer) -> int:
        filled = 0
        while filled < len(buffer) and self._damage is None:
            piece = self._next(len(buffer) - filled)
            if not piece:
                break
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)

        # What is whole is read before.
        if self._damage is not None and not filled:
            raise self._damage
        self.tail = (self.tail + bytes(buffer[max(filled - 4, 0) : filled]))[-4:]
        return filled

    def _next(self, most: int) -> bytes:
        try:
            piece = self._stream.read(min(most, PIECE if self._codec else 1 << 20))
        except OSError as error:
            why = "cut off, or damaged" if self._codec else "unreadable"
            self._damage = Damaged(f"behind {self._size:,} bytes it is {why}: {error}")
            return b""

        self._size += len(piece)
        if self._codec and self._size > self._limit:
            why = f"it unpacks to more than {self._limit:,} bytes; unpack it yourself"
            self._damage = Damaged(why)

        return piece

    def close(self) -> None:
        self._file.close()
        super().close()


def open_plain(path: str) -> BinaryIO:
    """Opens a file.

    Raises:
      Damaged: it is a pipe or a device, which may never end.
    """
    try:
        files.check_plain(epath.Path(path))
    except ValueError as error:
        raise Damaged(str(error)) from None

    return epath.Path(path).open("rb")


def open_unpacked(path: str) -> io.BufferedReader:
    """Opens a file, which may be packed by gzip, bzip2 or zstd: its first bytes say so.

    Raises:
      Damaged: at once, it is a pipe or a device, or something that only another program unpacks;
        while it is read, it is cut off, damaged, or unpacks to far too much.
    """
    file = open_plain(path)
    head = file.read(8)
    file.seek(0)

    codec = next((PACKED[first] for first in PACKED if head.startswith(first)), "")
    for first, (kind, advice) in files.NO_TEXT.items():
        if head.startswith(first) and not codec:
            file.close()
            raise Damaged(f"it is {kind}; {advice}")

    size = epath.Path(path).stat().length if codec else 0
    stream = Stream(file, codec, max(files.SMALL, files.MAX_UNPACKED * size))
    return io.BufferedReader(stream, 1 << 20)


def byte_order_mark(content: bytes) -> bytes:
    """Returns the byte-order mark that bytes begin with, or b""."""
    return next((mark for mark in files.BYTE_ORDER_MARKS if content.startswith(mark)), b"")


def parts(
    stream: io.BufferedReader, separator: str, most: int
) -> Iterator[tuple[int, bytes | None]]:
    """Yields (offset, bytes) of what stands between separators; None in place of one of more than
    `most` bytes, which is never held whole. Each has the byte-order mark of UTF-16 or UTF-32.
    """
    mark = byte_order_mark(stream.peek(4))
    encoding = files.BYTE_ORDER_MARKS.get(mark, "utf-8")

    mark = b"" if encoding == "utf-8" else mark
    between = separator.encode(encoding)
    offset = len(stream.read(len(mark)))

    held = b""
    left_out = 0  # bytes of a part that is too large
    while piece := stream.read1(1 << 20):
        *whole, held = (held + piece).split(between)
        for part in whole:
            yield offset, None if left_out or len(part) > most else mark + part
            offset += left_out + len(part) + len(between)
            left_out = 0

        # What may be the beginning of a separator is none of it, and stays.
        kept = held[max(len(held) - len(between) + 1, 0) :]
        if left_out or len(held) - len(kept) > most:
            left_out += len(held) - len(kept)
            held = kept

    if left_out or len(held) > most:
        yield offset, None
    elif held:
        yield offset, mark + held


# --- encodings ---


def decode(content: bytes, work: Work, source: Mapping, place: str, said: str = "") -> str | None:
    """Returns the text of bytes, or None if they are none.

    Text is what a byte-order mark says, or UTF-8, or what `said` is (by a header, or the beginning
    of its file), if all bytes are in that encoding; else what two detectors say. Each is counted.
    """
    mark = byte_order_mark(content)
    encodings: Iterator[str] = iter([files.BYTE_ORDER_MARKS[mark]] if mark else ["utf-8"])
    if not mark and work.settings["encodings"] == "detect":
        encodings = itertools.chain(encodings, [said] if said else [], _detected(content))

    for encoding in encodings:
        text = _strictly(content[len(mark) :], encoding)
        if text is None or "\0" in text:
            continue
        if encoding == "utf-8":
            return text
        if work.settings["encodings"] == "detect":
            _note_encoding(encoding, text, work, source, place)
            return text

    why = "no encoding has all of its bytes"
    if work.settings["encodings"] != "detect":
        why = "it is not UTF-8, and config.collect.encodings wants that"
    if b"\0" in content and not mark:
        why = "it is no text, or UTF-16 without a byte-order mark: there is U+0000 in it"
    return work.bad("encoding", source["name"], place, why)


def _note_encoding(encoding: str, text: str, work: Work, source: Mapping, place: str) -> None:
    """Counts what is not UTF-8."""
    work.count(f"encoding.{encoding.lower()}", source["name"])
    chance = files.short_hash(place.encode("utf-8", "surrogatepass"))
    work.keep_sample(f"encoding.{encoding.lower()}", [chance, place, text[:200]])


def _strictly(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except (LookupError, ValueError):
        return None


def _detected(content: bytes) -> Iterator[str]:
    """Encodings that may be the one, likeliest first."""
    from resiliparse.parse.encoding import detect_encoding

    if encoding := detect_encoding(content, from_html_meta=True):
        yield encoding

    import charset_normalizer

    if best := charset_normalizer.from_bytes(content[: 1 << 16]).best():
        yield best.encoding


def _encoding_of_file(head: bytes, work: Work) -> str:
    """The encoding of a file by its beginning; "": UTF-8, or none that is sure."""
    if work.settings["encodings"] != "detect" or byte_order_mark(head):
        return ""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return ""
    except UnicodeDecodeError:
        # The last line is cut, and so may be the last character.
        lines = head[: head.rfind(b"\n") + 1] or head
        return next((name for name in _detected(lines) if _strictly(lines, name) is not None), "")


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


def _from_record(
    record: Mapping, path: str, place: Any, source: Mapping, work: Work, said: str = ""
) -> Document | None:
    """The document of a record of a table, or None."""
    where = f"{path}:{place}"
    if source["text_key"] not in record:
        why = f"it has no key {source['text_key']!r}; it has {sorted(map(str, record))[:20]!s:.200}"
        return work.bad("no_text", source["name"], where, why)

    values = {}
    for field in ("text", "label", "name", "language"):
        key = source[f"{field}_key"]
        value = record.get(key) if key else ""
        if value is None:
            work.count(f"missing.{field}", source["name"])
            value = ""
        if isinstance(value, bytes):
            value = decode(value, work, source, where, said)
            if value is None:
                return None

        if field != "text" and isinstance(value, (int, float, np.number, np.bool_)):
            value = str(value)
        if not isinstance(value, str):
            why = f"{key!r} is a {type(value).__name__}; wanted a text"
            return work.bad("type", source["name"], where, why)
        values[field] = value

    if _is_too_large(values["text"], work):
        return _note_too_large(where, source, work)
    return make(path, place, source=source, **values)


def _is_too_large(text: str, work: Work) -> bool:
    most = _max_bytes(work)
    return 4 * len(text) > most and len(text.encode("utf-8", "surrogatepass")) > most


def _note_too_large(place: str, source: Mapping, work: Work) -> None:
    work.bad("too_large", source["name"], place, "larger than collect.max_document_mb")


def _read_whole(path: str, source: Mapping, work: Work) -> bytes | None:
    """The content of a file that is one document; None if it is too large."""
    with open_unpacked(path) as stream:
        content = stream.read(_max_bytes(work) + 1)
    if len(content) > _max_bytes(work):
        return _note_too_large(path, source, work)
    return content


def read_text(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A text file: a document, or several with a separator between them."""
    if not source["separator"]:
        content = _read_whole(path, source, work)
        text = decode(content, work, source, path) if content is not None else None
        if text is not None:
            yield make(path, 0, text, source, name=path)
        return

    with open_unpacked(path) as stream:
        said = _encoding_of_file(stream.peek()[: 1 << 16], work)
        for offset, part in parts(stream, source["separator"], _max_bytes(work)):
            place = f"{path}:{offset}"
            if part is None:
                _note_too_large(place, source, work)
                continue
            text = decode(part, work, source, place, said)
            if text and text.strip():
                yield make(path, offset, text, source)


def read_jsonl(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A JSONL file: an object a line."""
    with open_unpacked(path) as stream:
        said = _encoding_of_file(stream.peek()[: 1 << 16], work)
        for offset, line in parts(stream, "\n", _max_bytes(work)):
            place = f"{path}:{offset}"
            if line is None:
                _note_too_large(place, source, work)
                continue
            text = decode(line, work, source, place, said)
            if text is None or not text.strip():
                continue

            try:
                record = files.parse_json(text, "the line")
            except ValueError as error:
                work.bad("not_json", source["name"], place, str(error))
                continue
            if document := _from_record(record, path, offset, source, work):
                yield document


class _Rows:
    """Lines of a CSV file for its parser. Those of a row with more than `most` characters are an
    error in their place, and are never held whole.
    """

    def __init__(self, stream: TextIO, most: int):
        self._stream, self._most = stream, most
        self.begin_row()

    def begin_row(self) -> None:
        self._size = self._quotes = 0

    def __iter__(self):
        return self

    def __next__(self) -> str:
        line = self._read(self._most + 1)
        if not line:
            raise StopIteration
        if self._size <= self._most:
            return line

        # A row ends at the first line end with no quote open.
        while line and not (line.endswith(("\n", "\r")) and self._quotes % 2 == 0):
            line = self._read(1 << 20)
        raise csv.Error("larger than collect.max_document_mb")

    def _read(self, most: int) -> str:
        line = self._stream.readline(most)
        self._size += len(line)
        self._quotes += line.count('"')
        return line


def read_csv(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A CSV file whose first row names the columns."""
    csv.field_size_limit(min(_max_bytes(work) + 1, 2**31 - 1))
    with open_unpacked(path) as stream:
        # Rows may go over lines, so a file has one encoding. Its beginning says which.
        head = stream.peek()[: 1 << 16]
        mark = byte_order_mark(head)
        encoding = files.BYTE_ORDER_MARKS.get(mark) or _encoding_of_file(head, work) or "utf-8"
        if encoding != "utf-8":
            shown = head[len(mark) :].decode(encoding, "replace")
            _note_encoding(encoding, shown, work, source, path)
        stream.read(len(mark))

        # What is not in the encoding of the file may be in another one.
        errors = "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
        lines = _Rows(io.TextIOWrapper(stream, encoding, errors, newline=""), _max_bytes(work))
        for number, record in _csv_records(lines, path, source, work):
            record = {key: _unescaped(value, encoding) for key, value in record.items()}
            if document := _from_record(record, path, f"row {number}", source, work):
                yield document


def _csv_records(
    lines: _Rows, path: str, source: Mapping, work: Work
) -> Iterator[tuple[int, dict[str, str]]]:
    """(number, record) of each row that is one."""
    rows = csv.reader(lines, strict=True)
    columns: list[str] = []
    for number in itertools.count(1):
        lines.begin_row()
        why = ""
        try:
            row = next(rows)
        except StopIteration:
            return
        except (csv.Error, UnicodeError) as error:
            row, why = [], str(error)
            # Behind a wrong byte there is no telling where the next row begins, and without the
            # first row none is of use.
            if isinstance(error, UnicodeError) or not columns:
                work.bad("not_csv", source["name"], f"{path}:row {number}", f"{why}; the rest, too")
                return

        if columns and row and len(row) != len(columns):
            why = f"it has {len(row)} columns, the first row {len(columns)}"
        if why:
            work.bad("not_csv", source["name"], f"{path}:row {number}", why)
        elif row and columns:
            yield number, dict(zip(columns, row))
        elif row and row.count(source["text_key"]) != 1:
            _note_columns(row, path, source, work)
            return
        columns = columns or row


def _note_columns(names: list[str], path: str, source: Mapping, work: Work) -> None:
    why = f"there is not one column {source['text_key']!r}, but {names!s:.200}"
    work.bad("no_text", source["name"], path, why)


def _unescaped(value: str, encoding: str) -> str | bytes:
    """A value, or its bytes if some of them are not in the encoding."""
    try:
        value.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            return value.encode(encoding, "surrogateescape")

    return value


def read_parquet(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A Parquet file, of which the columns that are wanted are read."""
    import pyarrow.parquet

    keys = [source[key] for key in ("text_key", "label_key", "name_key", "language_key")]
    number = 0
    with open_plain(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if names.count(source["text_key"]) != 1:
                _note_columns(names, path, source, work)
                return

            columns = [key for key in dict.fromkeys(keys) if key in names]
            for batch in table.iter_batches(_rows_of_a_batch(table), columns=columns):
                for record in _with_bytes(batch).to_pylist():
                    if document := _from_record(record, path, number, source, work):
                        yield document
                    number += 1
        except (pyarrow.ArrowException, OSError, OverflowError, UnicodeError) as error:
            raise Damaged(f"behind row {number}: {error}") from None


def _rows_of_a_batch(table) -> int:
    """So many that some 64 MB are held at once."""
    size = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
    return min(max((1 << 26) * table.metadata.num_rows // max(size, 1), 1), 64)


def _with_bytes(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """The batch with bytes in place of text: nobody has looked whether they are UTF-8."""
    types = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    columns = [column.cast(types.get(column.type, column.type)) for column in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, batch.schema.names)


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
    content = _read_whole(path, source, work)
    page = decode(content, work, source, path) if content is not None else None
    if page is not None:
        text = _main_text(page, path, 0, source, work, work.settings["extractor"])
        if text is not None:
            yield make(path, 0, text, source, name=path)


def read_warc(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A WARC file: the main text of each response or resource that is a page, and the text of each
    conversion (WET). It may be packed.
    """
    from fastwarc import warc

    types = warc.WarcRecordType
    wanted = types.response | types.resource | types.conversion
    offset = 0
    with open_unpacked(path) as stream:
        # fastwarc's own reading of packed files takes one that is cut off for one that is whole.
        records = warc.ArchiveIterator(
            stream, record_types=wanted, auto_decode="none", stream_detect=False
        )
        while True:
            try:
                record = next(records, None)
            except _OF_WARC as error:
                raise Damaged(f"behind the record at {offset}: {error}") from None
            if record is None:
                break
            offset = record.stream_pos
            if document := _from_warc(record, path, source, work):
                yield document

        if stream.raw.tail.strip(b"\r\n"):
            work.bad("cut_off", source["name"], path, "it doesn't end as a record does")


# What fastwarc raises for an archive that is damaged.
_OF_WARC = (OSError, ValueError, RuntimeError, EOFError)


def _from_warc(record, path: str, source: Mapping, work: Work) -> Document | None:
    offset = record.stream_pos
    place = f"{path}:{offset}"
    most = _max_bytes(work)
    headers = record.headers
    if not (headers.get("Content-Length") or "").strip().isdecimal():
        return work.bad("cut_off", source["name"], place, "its header has no length")

    kind = headers.get("Content-Type") or "text/plain"
    if record.is_http:
        kind = record.http_content_type or ""
        if (record.http_headers.status_code or 200) >= 400:
            work.count("http_errors", source["name"])
            return None
    kind = kind.partition(";")[0].strip().lower()
    if kind not in ("text/html", "application/xhtml+xml", "text/plain"):
        work.count("other_type", source["name"])
        return None

    try:
        content = record.reader.read(most + 1)
    except _OF_WARC as error:
        raise Damaged(f"the record at {offset}: {error}") from None

    if len(content) < min(record.content_length, most + 1):
        return work.bad("cut_off", source["name"], place, "it is shorter than its header says")
    if record.is_http and len(content) <= most:
        try:
            content = _transferred(content, record.http_headers, most)
        except (zlib.error, ValueError) as error:
            return work.bad("coding", source["name"], place, str(error))
    if len(content) > most:
        return _note_too_large(place, source, work)
    if headers.get("WARC-Truncated"):
        work.count("truncated", source["name"])

    text = decode(content, work, source, place, _said(record))
    if text is not None and kind != "text/plain":
        text = _main_text(text, path, offset, source, work, work.settings["extractor"])
    name = (headers.get("WARC-Target-URI") or "").strip("<>")
    return make(path, offset, text, source, name=name) if text is not None else None


def _said(record) -> str:
    """The encoding that the header of a response says, of those that HTML knows."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    said = record.http_charset if record.is_http else ""
    return map_encoding_to_html5(said, fallback_utf8=False) or "" if said else ""


def _transferred(content: bytes, headers, most: int) -> bytes:
    """The content of a response whose transfer or content coding is undone: some most + 1 bytes.

    Raises:
      ValueError, zlib.error: it is cut off, damaged, or in a coding that nobody knows.
    """
    if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
        content = _joined_chunks(content)
    coding = (headers.get("Content-Encoding") or "").lower().strip()
    if coding in ("", "identity", "none"):
        return content
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"Content-Encoding {coding!r}")
    if coding != "deflate" and not content.startswith(files.GZIP):
        return content  # some archives store it unpacked

    # 32: zlib's or gzip's head; -15: deflate without any.
    inflater = zlib.decompressobj(
        47 if content[:2] == files.GZIP or content[:1] == b"\x78" else -15
    )
    content = inflater.decompress(content, most + 1)
    if len(content) <= most and not inflater.eof:
        raise ValueError("it is cut off")
    if inflater.unused_data.startswith(files.GZIP):
        raise ValueError("it is packed in several parts")
    return content


_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,200}\r?\n")


def _joined_chunks(content: bytes) -> bytes:
    """The body of a chunked response (RFC 9112, section 7.1); one that isn't chunked as it is: some
    archives store it joined.

    Raises:
      ValueError: a chunk that is cut off.
    """
    chunks = []
    start = 0
    while match := _CHUNK.match(content, start):
        size = int(match[1], 16)
        if not size:
            return b"".join(chunks)
        chunk = content[match.end() : match.end() + size]
        if len(chunk) < size:
            raise ValueError("a chunk is cut off")
        chunks.append(chunk)
        start = match.end() + size
        start += 2 if content[start : start + 2] == b"\r\n" else 0

    if chunks:
        raise ValueError(f"no chunk at {start}")
    return content


def read_wikipedia(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """A dump of a wiki in MediaWiki's XML: the text of each article that is no redirect."""
    dump = _Dump(_max_bytes(work))
    number = 0
    with open_unpacked(path) as stream:
        for page in _pages(stream, dump):
            number += 1
            place = f"page {number}"
            # Dumps of old have no namespaces.
            if page["ns"] not in ("0", "") or page["redirect"]:
                work.count("no_article", source["name"])
            elif page["text"] is None:
                _note_too_large(f"{path}:{place}", source, work)
            else:
                text = dump.in_english(page["text"])
                text = _main_text(text, path, place, source, work, "wikitext")
                if text is not None:
                    yield make(path, place, text, source, name=page["title"])

    if not number:
        work.bad("no_text", source["name"], path, "there is no page in it")


def _pages(stream: io.BufferedReader, dump: "_Dump") -> Iterator[dict]:
    """The pages of a dump.

    Raises:
      Damaged: what follows can't be read.
    """
    parser = xml.etree.ElementTree.XMLParser(target=dump)
    while True:
        piece = stream.read1(1 << 16)
        damage = None
        dump.unheard += len(piece)

        try:
            parser.feed(piece) if piece else parser.close()
        except Damaged as error:
            damage = error
        except (xml.etree.ElementTree.ParseError, ValueError, LookupError) as error:
            damage = Damaged(f"it is cut off, or no XML: {error}")
        # The parser looks at a tag that it has not all of from its beginning, each time.
        if dump.unheard > 1 << 22:
            damage = damage or Damaged("there is a tag or a comment of more than 4 MB in it")

        yield from dump.pages
        dump.pages = []
        if damage is not None:
            raise damage
        if not piece:
            return


class _Dump:
    """What the XML parser tells about a wiki's dump.

    Attributes:
      pages: those that are whole, with title, ns, redirect, and the text of the newest revision,
        which is None if it has more than `most` characters.
      unheard: set to 0 whenever the parser tells something.
    """

    def __init__(self, most: int):
        self.pages: list[dict] = []
        self.unheard = 0
        self._most = most
        self._path: list[str] = []
        self._texts: list[str] = []
        self._size = 0
        self._page: dict = {}
        self._is_name = False
        self._names: list[str] = []  # of the namespaces of files and categories
        self._links: re.Pattern | None = None

    def doctype(self, *unused) -> None:
        """Its entities might unpack to anything."""
        raise Damaged("it has a document type; dumps have none")

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        name = tag.rpartition("}")[2]
        self.unheard = 0
        self._path.append(name)
        if len(self._path) > 100:
            raise Damaged("it is nested too deeply")
        if name == "page":
            self._page = {"title": "", "ns": "", "redirect": False, "text": ""}
        self._is_name = name == "namespace" and attributes.get("key") in ("-2", "6", "14")
        self._texts, self._size = [], 0

    def data(self, text: str) -> None:
        self.unheard = 0
        self._size += len(text)
        if self._size <= self._most:
            self._texts.append(text)

    def end(self, tag: str) -> None:
        del tag
        self.unheard = 0
        name = self._path.pop()
        above = self._path[-1] if self._path else ""

        text = "".join(self._texts)
        size = self._size
        self._texts, self._size = [], 0

        if above == "page" and name in ("title", "ns"):
            self._page[name] = text.strip()
        elif above == "page" and name == "redirect":
            self._page["redirect"] = True
        elif above == "revision" and name == "text":
            self._page["text"] = text if size <= self._most else None
        elif name == "page":
            self.pages.append(self._page)
        elif name == "namespace" and self._is_name and text:
            self._names.append(text)

    def in_english(self, text: str) -> str:
        """Wikitext whose links to files and categories have English names, as `extract` wants."""
        if self._links is None:
            names = "|".join(map(re.escape, self._names)) or "File"
            self._links = re.compile(rf"\[\[\s*(?:{names})\s*:", re.IGNORECASE)
        return self._links.sub("[[File:", text)


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
        # Text stays bytes: nobody has looked whether they are UTF-8.
        record = _with_class_name(table.raw(number), source, table.class_names)
        if document := _from_record(record, name, number, source, work):
            yield document


def _with_class_name(record: Mapping, source: Mapping, class_names: Mapping) -> Mapping:
    """The record with its label by name, if it has a number. -1 stands for no label."""
    key = source["label_key"]
    if key not in class_names or record.get(key) is None:
        return record
    number = int(record[key])
    return dict(record) | {key: class_names[key][number] if number >= 0 else ""}


@functools.lru_cache(maxsize=4)
def _opened_tfds(split: str, name: str, data_dir: str):
    from lm.data import records

    return records.open_tfds(split, name, data_dir)


def open_tfds(source: Mapping):
    """The records of a TFDS data set, whose `identity` tells it from others."""
    return _opened_tfds(source["split"], source["path"], source["data_dir"])


def read_hugging_face(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """Records of a Hugging Face data set, by number."""
    name, begin, end = _range(path)
    table = open_hugging_face(source)
    class_names = {}
    for key, feature in table.features.items():
        if hasattr(feature, "names"):
            class_names[key] = feature.names

    for number in range(begin, end):
        record = _with_class_name(table[number], source, class_names)
        if document := _from_record(record, name, number, source, work):
            yield document


@functools.lru_cache(maxsize=4)
def _opened_hugging_face(name: str, config: str, split: str, keys: tuple[str, ...]):
    from lm.data import streaming

    table = streaming.load_hugging_face(name, config, split)
    return table.select_columns([key for key in keys if key in table.column_names])


def open_hugging_face(source: Mapping):
    """The records of a Hugging Face data set, with the columns that are wanted."""
    keys = [source[key] for key in ("text_key", "label_key", "name_key", "language_key")]
    path = files.expand(source["path"]) if source["path"].startswith("~") else source["path"]
    return _opened_hugging_face(path, source["config"], source["split"], tuple(keys))


def identity(table) -> str:
    """Returns what tells the records of a data set from others."""
    about = getattr(table, "identity", None) or table._fingerprint
    return files.short_hash(json.dumps(about).encode())


# --- source trees ---

# What a licence's text has at its beginning, before it speaks of others -> its SPDX name.
LICENCES = {
    "gnu affero general public license": "AGPL-3.0",
    "gnu lesser general public license": "LGPL",
    "gnu general public license": "GPL",
    "mozilla public license version 2.0": "MPL-2.0",
    "mozilla public license, version 2.0": "MPL-2.0",
    "apache license version 2.0": "Apache-2.0",
    "redistributions in binary form must reproduce": "BSD-2-Clause",
    "permission to use, copy, modify, and/or distribute this software": "ISC",
    "permission to use, copy, modify, and distribute this software": "ISC",
    "permission is hereby granted, free of charge": "MIT",
    "python software foundation license": "PSF-2.0",
    "this is free and unencumbered software": "Unlicense",
    "cc0 1.0 universal": "CC0-1.0",
}
_LICENCE_FILES = re.compile(r"(LICEN[CS]E|COPYING)([.-].*)?", re.IGNORECASE)


def licence_of(text: str) -> str:
    """Returns the SPDX name of a licence's text; "": it is none of `LICENCES`."""
    words = " ".join(text.lower().split())
    found = [(words.find(phrase), name) for phrase, name in LICENCES.items() if phrase in words]
    _, name = min(found, default=(0, ""))
    if name == "BSD-2-Clause" and "neither the name of" in words:
        return "BSD-3-Clause"
    return name


@functools.lru_cache(maxsize=4096)
def licence_above(folder: str) -> str:
    """Returns the licence of the nearest folder, from this one up, that has a file with one."""
    path = epath.Path(folder)
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            if _LICENCE_FILES.fullmatch(entry.name) and entry.is_file():
                with entry.open("rb") as file:
                    text = file.read(1 << 16).decode("utf-8", "replace")
                if name := licence_of(text):
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
