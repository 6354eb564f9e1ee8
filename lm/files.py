"""Files: written whole, found by pattern, unpacked and read with errors that name the place; and
hashes.

What lies in a directory may have been put there by a stranger. Nothing that exists is written
through, and nothing is read that isn't a plain file.
"""

import codecs
import contextlib
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from etils import epath

# --- written whole ---


def write_whole(path: epath.Path, content: bytes | str) -> None:
    """Writes a file so that a full disk or a kill leaves the old one, not half of the new one.

    Raises:
      OSError: it can't be written; the message names the file.
    """
    with open_whole(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


@contextlib.contextmanager
def open_whole(path: epath.Path) -> Iterator[BinaryIO]:
    """Opens a file for `write_whole` in pieces: it has its name when all of it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(path):
        # An object of a bucket appears whole.
        with path.open("wb") as file:
            yield file
        return

    # Renaming within a folder is one step: a reader sees either file, whole. Of a link it replaces
    # the link. The temporary name is fresh, and O_EXCL follows no link that has it all the same.
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # What is read meanwhile has a name of its own.
        if isinstance(error, OSError) and error.filename in (None, temporary):
            raise named(error, path) from None
        raise


def named(error: OSError, path) -> OSError:
    """The error with the file in its message: "no space left on device" has none."""
    return type(error)(error.errno, error.strerror or str(error), str(path))


def remove_leftovers(directory: epath.Path) -> None:
    """Removes what killed writers left of files in this directory. Nobody may be writing to it."""
    for path in directory.glob("*.????????.tmp"):
        path.unlink(missing_ok=True)


# --- of strangers ---


def check_plain(path: epath.Path) -> None:
    """Raises ValueError for a pipe, a device or a folder in a file's place.

    Reading one may never end. A link to a plain file is one: caches of downloads have them.
    """
    if "://" not in str(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a plain file")


def check_no_link(path: epath.Path) -> None:
    """Raises ValueError for a link, which may lead to anything."""
    if "://" not in str(path) and os.path.islink(path):
        raise ValueError(f"{path} is a link; a run directory has folders and plain files only")


def check_sized(path: epath.Path) -> epath.Path:
    """Returns the path of a run's file that can be read whole, to be shown.

    Raises:
      ValueError: it is a link, too large, or packed, which no run's file is.
    """
    check_no_link(path)
    size = path.stat().length
    if size > MAX_SHOWN:
        raise ValueError(f"{path} has {size:,} bytes; at most {MAX_SHOWN:,} are read")
    with path.open("rb") as file:
        if file.read(len(ZSTD)).startswith((GZIP, ZSTD)):
            raise ValueError(f"{path} is packed; a run's files are not. Unpack it")
    return path


def check_tree(directory: epath.Path) -> None:
    """Checks that a run directory holds folders and plain files only, at any depth.

    Raises:
      ValueError: a link, through which something elsewhere would be written, or a pipe or a device.
    """
    if "://" in str(directory) or not directory.exists():
        return
    folders = [str(directory)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    kind = "a link" if entry.is_symlink() else "a pipe, a socket or a device"
                    raise ValueError(
                        f"{entry.path} is {kind}; a run directory has folders and plain files "
                        "only. Remove it, or put what it leads to in its place"
                    )


def check_name(name: Any, where: str) -> str:
    """Returns a file's name that `where` gives, if it names nothing outside of its directory.

    Raises:
      ValueError: it is no string, a path, or no name at all.
    """
    if isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0"):
        return name
    raise ValueError(f"{where} names the file {name!r}; wanted a plain name, without a folder")


def read_json(path: epath.Path) -> dict:
    """Returns the JSON object in a file.

    Raises:
      OSError: there is none.
      ValueError: it is no plain file, not JSON, or no object; the message names it.
    """
    check_plain(path)
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: bytes | str, where: str, **options) -> dict:
    """Returns the JSON object in a text.

    Args:
      where: what errors call it.
      options: of `json.loads`.

    Raises:
      ValueError: it is not JSON, or nested too deeply to be read, or no object.
    """
    try:
        value = json.loads(text, **options)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}; wanted an object")
    return value


# --- found and read ---


def expand(path: str, folder: str = "") -> str:
    """Returns a path that a user wrote, with `~` expanded. Every path of the project comes here.

    Args:
      path: a path, a glob pattern, or a URL such as gs://; "" stays "".
      folder: what a relative path is relative to; "": the working directory.
    """
    if not path or "://" in path:
        return path
    return os.path.join(folder, os.path.expanduser(path))


def absolute(path: str) -> str:
    """Returns a path that a user wrote as `expand` does, from the root."""
    expanded = expand(path)
    return expanded if "://" in expanded else os.path.abspath(expanded)


def find(pattern: str, names: Sequence[str] = ("*",)) -> list[str]:
    """Returns the files that a path, a folder or a glob pattern stands for, sorted.

    Args:
      pattern: in a glob pattern `**` stands for folders at any depth. gs:// too.
      names: patterns of the names that are taken from a folder, at any depth. Hidden files, and
        those in hidden folders, are left out.

    Raises:
      ValueError: no pattern, or no file that it matches.
    """
    if not pattern:
        raise ValueError(
            "config.data.source_args: no path given; set it, for instance "
            "--config.data.source_args.path=FILE"
        )

    pattern = expand(pattern)
    path = epath.Path(pattern)
    if path.is_dir():
        if "://" in pattern:
            matches = _matches(os.path.join(pattern, "**", "*"))
        else:
            matches = _files_in(pattern)
        matches = [file for file in matches if _has_name(file, names)]
        if not matches:
            raise ValueError(f"no file named {' or '.join(names)} in the folder {pattern}")
    elif path.exists():
        # A name may have the characters of a pattern in it.
        matches = [pattern]
    else:
        matches = _matches(pattern)
        if not matches:
            raise ValueError(f"no file at {pattern}")
    return sorted(matches)


def _has_name(file: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(os.path.basename(file), name) for name in names)


MAX_SHOWN = 2**28  # bytes of a run's file that is read whole, to be shown
MAX_FOUND = 100_000  # files and folders in a folder; a slip such as ../.. is a whole machine


def _files_in(folder: str) -> list[str]:
    """The files of a local folder, at any depth, but for hidden ones.

    Raises:
      ValueError: more than `MAX_FOUND`, or a folder that can't be read.
    """
    found = []
    num_seen = 0
    for path, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(path, name) for name in names if not name.startswith(".")]
        num_seen += len(folders) + len(names)
        if num_seen > MAX_FOUND:
            raise ValueError(
                f"the folder {folder} has more than {MAX_FOUND} files and folders in it; name one "
                "with less, or put many small files into JSONL"
            )
    return found


def _refuse(error: OSError) -> None:
    """Is told of a folder that can't be read: its files would be left out silently."""
    raise ValueError(f"the folder {error.filename} can't be read: {error.strerror}") from None


def _matches(pattern: str) -> list[str]:
    """The files, without the folders, that a glob pattern matches."""
    if "://" not in pattern:
        found = glob.glob(pattern, recursive=True)
        return [file for file in found if not os.path.isdir(file)]

    # The standard library's glob knows local file systems only, and epath's has no `**`.
    path = epath.Path(pattern)
    if "**" not in pattern:
        return [str(match) for match in path.parent.glob(path.name)]
    wanted = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?")
    wanted = wanted.replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    top = re.split(r"[*?]", pattern, maxsplit=1)[0].rpartition("/")[0]
    return [file for file in _files_below(epath.Path(top)) if re.fullmatch(wanted, file)]


def _files_below(folder: epath.Path) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files_below(entry)
        else:
            yield str(entry)


# A packed file says with its first bytes what it is.
GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
# Text unpacks to some ten times its size. What unpacks to more than this is there to fill the
# memory.
MAX_UNPACKED = 250
SMALL = 1 << 24  # bytes that any file may unpack to

# Byte-order marks. UTF-32's begin as UTF-16's do.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}

# What is no text, by its first bytes -> (what it is, what helps).
NO_TEXT = {
    b"BZh": ("bzip2", "unpack it with bzip2 -dk"),
    b"\xfd7zXZ": ("xz", "unpack it with xz -dk"),
    b"PK\x03\x04": ("a zip archive, as .docx and .xlsx are", "unpack it, or save it as text"),
    b"%PDF": ("PDF", "extract its text, for instance with pdftotext"),
    b"PAR1": ("Parquet", "write it as JSONL, for instance with pandas"),
}


def read_text(file: str) -> str:
    """Returns the text of a file, line ends as they are, without a byte-order mark.

    The file is UTF-8, or UTF-16 or UTF-32 with a byte-order mark, and may be packed by gzip or
    zstd. Its first bytes say which, not its name.

    Raises:
      ValueError: another file; the message says which, or names the first wrong byte.
    """
    check_plain(epath.Path(file))
    content = _unpacked(epath.Path(file).read_bytes(), file)
    marks = (mark for mark in BYTE_ORDER_MARKS if content.startswith(mark))
    mark = next(marks, b"")
    encoding = BYTE_ORDER_MARKS.get(mark, "utf-8")
    try:
        text = (content[len(mark) :] if mark else content).decode(encoding)
    except UnicodeDecodeError as error:
        for first_bytes, (kind, advice) in NO_TEXT.items():
            if content.startswith(first_bytes):
                raise ValueError(f"{file} is {kind}, not text; {advice}") from None
        raise ValueError(
            f"{file} is not {encoding.upper()}: byte {error.object[error.start]:#04x} at offset "
            f"{error.start + len(mark)}. Find out its encoding, for instance with file -i, then "
            "convert it: iconv -f ENCODING -t utf-8. (Every byte is a letter in latin1, which "
            "never fails, and is seldom right.)"
        ) from None
    _check_no_controls(text, file)
    return text


# UTF-16 has these in every character of many scripts, and U+0000 in spaces and digits: read as
# UTF-8, Russian is valid.
_CONTROLS = [chr(code) for code in range(32) if chr(code) not in "\n\r"]


def _check_no_controls(text: str, file: str) -> None:
    """Raises ValueError for a text with U+0000 of which an eighth is control characters: it was
    never UTF-8.
    """
    if "\0" not in text:
        return
    even, odd = (sum(map(half.count, _CONTROLS)) for half in (text[::2], text[1::2]))
    if even + odd <= len(text) // 8:
        return
    if text[257:262] == "ustar":
        raise ValueError(f"{file} is a tar archive, not text; unpack it with tar -x")
    encoding = "utf-16le" if odd > even else "utf-16be"
    raise ValueError(
        f"{file} is no text, or UTF-16 without a byte-order mark: an eighth of it or more is "
        f"U+0000 and other control characters. Convert it: iconv -f {encoding} -t utf-8"
    )


def _unpacked(content: bytes, file: str) -> bytes | bytearray:
    """The content of a file that gzip or zstd packed; that of any other as it is."""
    if not content.startswith((GZIP, ZSTD)):
        return content
    limit = max(SMALL, MAX_UNPACKED * len(content))
    unpacked = bytearray()
    try:
        stream = _open_packed(content, file)
        while piece := stream.read(1 << 20):
            unpacked += piece
            if len(unpacked) > limit:
                raise ValueError(
                    f"{file} unpacks to more than {MAX_UNPACKED} times its size; where that is "
                    "right, unpack it yourself"
                )
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged and can't be unpacked: {error}") from None
    return unpacked


def _open_packed(content: bytes, file: str):
    if content.startswith(GZIP):
        return gzip.GzipFile(fileobj=io.BytesIO(content))
    return open_zstd(io.BytesIO(content), file)


def open_zstd(stream: BinaryIO, file: str):
    """Returns a stream of what zstd packed; reading what is cut off is an OSError.

    Args:
      file: what errors call it.

    Raises:
      ValueError: a package is missing.
    """
    try:
        import pyarrow  # TFDS needs it too; a third of a second, so only where used
    except ImportError:
        raise ValueError(
            f"{file} is zstd, which takes pip install pyarrow; or unpack it with zstd -dk"
        ) from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")


def read_jsonl(file: str) -> Iterator[tuple[int, dict]]:
    """Yields (line number from 1, object) of a JSONL file.

    Empty lines are counted, but not yielded.

    Raises:
      ValueError: no plain file, not UTF-8, or a line that is not a JSON object; file and line are
        named.
    """
    # Not splitlines: a JSON string may contain U+2028, which splitlines takes for a line end.
    for number, line in enumerate(_lines(read_text(file)), 1):
        if line.strip():
            yield number, parse_json(line, f"{file}:{number}")


def _lines(text: str) -> Iterator[str]:
    """The lines of a text, without the list of all of them."""
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


def read_jsonl_log(path: epath.Path) -> list[dict]:
    """Returns the objects of a JSONL log that a run appends to.

    A missing file is an empty log. A last line that a killed run left half-written is dropped.

    Raises:
      ValueError: see `read_jsonl`.
    """
    if not path.exists():
        return []

    *lines, last = read_text(path).split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        records.append(parse_json(line, f"{path}:{number}"))
    # What follows the last newline is nothing, a whole line (of an editor), or half of one.
    with contextlib.suppress(ValueError):
        records.append(parse_json(last, str(path)))
    return records


# The escapes of Python's strings that stand for a character, but none for half of a pair.
_ESCAPE = re.compile(r"\\(?:[nrtf\\]|x[0-9a-fA-F]{2}|u(?![dD][89a-fA-F])[0-9a-fA-F]{4})")


def unescape(text: str) -> str:
    r"""Returns a text with characters in place of \n, \r, \t, \f, \\, \xHH and \uHHHH.

    A shell leaves these as they are. Other backslashes mean nothing.
    """
    return _ESCAPE.sub(lambda match: codecs.decode(match[0], "unicode_escape"), text)


def short_hash(content: bytes) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of `content`."""
    return hashlib.sha256(content).hexdigest()[:16]


def short_hash_of_parts(parts: Iterable[bytes]) -> str:
    """Returns a `short_hash` of byte strings in order.

    The length before each part tells ["ab", "c"] from ["a", "bc"].
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def hash_of_file(path: str) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
