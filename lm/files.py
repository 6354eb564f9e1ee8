"""Files: written whole, found by pattern, read with errors that name the place; and hashes."""

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator

from etils import epath


def write_whole(path: epath.Path, content: bytes | str) -> None:
    """Writes a file so that a full disk or a kill leaves the old one, not half of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)

    # Writing takes time, renaming within a folder is one step: a reader sees either file, whole.
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    temporary.replace(path)


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
    try:
        return epath.Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. "
            "Convert it, for instance with iconv -f latin1 -t utf-8"
        ) from None


def read_jsonl(file: str) -> Iterator[tuple[int, dict]]:
    """Yields (line number from 1, object) of a JSONL file that a user gave; strict.

    Empty lines are counted, but not yielded.

    Raises:
      ValueError: a line that is not a JSON object; file and line are named.
    """
    # Not splitlines: a JSON string may contain U+2028, which splitlines takes for a line end.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue

        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{file}:{number} is a {type(record).__name__}; wanted an object with keys"
            )
        yield number, record


def read_jsonl_log(path: epath.Path) -> list[dict]:
    """Returns the objects of a JSONL log that a run appends to; tolerant.

    A missing file is an empty log. A last line that a killed run left half-written is dropped.
    """
    if not path.exists():
        return []

    # What follows the last newline is the empty string, or the half-written line.
    complete_lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in complete_lines]


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
