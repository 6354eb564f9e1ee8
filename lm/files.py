"""Files: written whole, found by pattern, read with errors that name the place; and hashes.

What lies in a directory may have been put there by a stranger. Nothing that exists is written
through, and nothing is read that isn't a plain file.
"""

import contextlib
import glob
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
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
        if isinstance(error, OSError):
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


def find(pattern: str) -> list[str]:
    """Returns the files that a path or a glob pattern matches, sorted.

    Raises:
      ValueError: no pattern, or no file that it matches.
    """
    if not pattern:
        raise ValueError(
            "config.data.source_args: no path given; set it, for instance "
            "--config.data.source_args.path=FILE"
        )

    if "://" in pattern:
        # The standard library's glob knows local file systems only.
        path = epath.Path(pattern)
        matches = [str(match) for match in path.parent.glob(path.name)]
    else:
        matches = glob.glob(pattern)

    if not matches:
        raise ValueError(f"no file at {pattern}")
    return sorted(matches)


def read_text(file: str) -> str:
    """Returns the text of a UTF-8 file, line ends as they are.

    Raises:
      ValueError: the file is not UTF-8; the message names the first wrong byte.
    """
    check_plain(epath.Path(file))
    try:
        return epath.Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. "
            "Convert it, for instance with iconv -f latin1 -t utf-8"
        ) from None


def read_jsonl(file: str) -> Iterator[tuple[int, dict]]:
    """Yields (line number from 1, object) of a JSONL file.

    Empty lines are counted, but not yielded.

    Raises:
      ValueError: no plain file, not UTF-8, or a line that is not a JSON object; file and line are
        named.
    """
    # Not splitlines: a JSON string may contain U+2028, which splitlines takes for a line end.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{file}:{number}")


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
