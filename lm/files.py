"""Files: written whole, read with their errors named, found by pattern."""

import glob
import json
from collections.abc import Iterator

from etils import epath


def write_whole(path: epath.Path, content: bytes | str) -> None:
    """Writes a file so that a full disk or a kill leaves the old one, not half of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    temporary.replace(path)


def read_jsonl_log(path: epath.Path) -> list[dict]:
    """The whole lines of a JSONL file; [] if there is none. A last line that a killed run left
    half-written is dropped.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def read_text(path: str) -> str:
    try:
        return epath.Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. "
            "Convert it, for instance with iconv -f latin1 -t utf-8"
        ) from None


def find(paths: str) -> list[str]:
    """The files of a path or a glob pattern, sorted."""
    if not paths:
        raise ValueError(
            "config.data.source_args: no path given; set it, for instance "
            "--config.data.source_args.path=FILE"
        )
    found = (
        sorted(str(p) for p in epath.Path(paths).parent.glob(epath.Path(paths).name))
        if "://" in paths
        else sorted(glob.glob(paths))
    )
    if not found:
        raise ValueError(f"no file at {paths}")
    return found


def read_jsonl(file: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a JSONL file. Raises ValueError, naming file and line, for a line
    that is none.
    """
    # not splitlines: JSON strings may hold U+2028
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
