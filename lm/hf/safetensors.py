"""The safetensors format, read and written a tensor at a time.

A file is eight bytes with the header's length, a JSON header, and the bytes of the tensors
(huggingface.co/docs/safetensors, "Format"). The library of that name reads no bfloat16 into NumPy,
and writes only what is in memory as a whole.

Files come from strangers: nothing in a header is believed before it is checked against the file.
"""

import collections
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lm import files

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its bytes in the file

    def read(self) -> np.ndarray:
        """The tensor, mapped into memory, not copied."""
        # A map of no bytes is an error.
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


# --- reading ---


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Reads the header only.

    Raises:
      ValueError: the file is truncated, its header is none, or the header describes another file
        than this one.
    """
    files.check_plain(path)
    file_size = path.stat().st_size
    header, data_start = _read_header(path, file_size)
    header.pop("__metadata__", None)

    tensors = {}
    spans = []  # (begin, end, name) in the data
    for name, description in header.items():
        dtype, shape, begin, end = _parse_description(path, name, description)
        if end > file_size - data_start:
            raise _damaged(path, f"{name} ends at byte {data_start + end} of {file_size}")
        tensors[name] = Entry(path, dtype, shape, data_start + begin)
        spans.append((begin, end, name))

    _check_spans(path, spans, data_size=file_size - data_start)
    return tensors


def _read_header(path: Path, file_size: int) -> tuple[dict[str, Any], int]:
    """(the header, where the data begins)."""
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else 0
        # The length is checked before anything of that size is read.
        if not 2 <= length <= min(file_size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise _damaged(
                path, f"its header should be {length} bytes long, and the file is {file_size}"
            )
        text = file.read(length)

    try:
        header = files.parse_json(text, "its header", object_pairs_hook=_dict_of_unique_names)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return header, _LENGTH_BYTES + length


def _dict_of_unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for names that come twice, of which json would take the last."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice[:6]} twice")
    return unique


def _parse_description(
    path: Path, name: str, description
) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, begin and end in the data) of a tensor, from its entry in the header."""
    try:
        dtype_name = description["dtype"]
        shape = tuple(description["shape"])
        begin, end = description["data_offsets"]
        is_valid = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        is_valid = False
    if not is_valid:
        raise _damaged(path, f"its entry for {name!r} is {description!r}")

    if dtype_name not in DTYPES:
        raise ValueError(
            f"{path}: {name} is of dtype {dtype_name}, which can't be read; there are "
            f"{list(DTYPES)}"
        )

    # Python's integers don't overflow: sizes may be made up.
    dtype = np.dtype(DTYPES[dtype_name])
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise _damaged(
            path,
            f"{name} is {dtype_name}{list(shape)}, {num_bytes} bytes, but its place has "
            f"{end - begin}",
        )
    return dtype, shape, begin, end


def _check_spans(path: Path, spans: Sequence[tuple[int, int, str]], data_size: int) -> None:
    """Raises ValueError unless the tensors lie one behind the other and fill the data."""
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _damaged(
                path, f"{name} begins at byte {begin} of the data, where byte {position} is next"
            )
        position = end
    if position != data_size:
        raise _damaged(path, f"its tensors fill {position} bytes, and it holds {data_size}")


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"{path} is not a whole safetensors file: {problem}. Copy it again from its source."
    )


# --- writing ---


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """Copies an array, target[...] = source. A transposed source goes in strips that caches hold,
    which is five times as fast.
    """
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
        return

    for start in range(0, target.shape[-1], 16):
        target[..., start : start + 16] = source[..., start : start + 16]


def write(
    path: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterable[np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file whole or not at all.

    Args:
      tensors: name -> (dtype, shape).
      arrays: the tensors in that order, taken one at a time.
      metadata: texts for the header.
    """
    # transformers reads only files that say which framework they are for.
    header = _make_header(tensors, metadata or {"format": "pt"})

    with files.open_whole(path) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for (name, (dtype, shape)), array in zip(tensors.items(), arrays, strict=True):
            got = (array.dtype, array.shape)
            assert got == (dtype, tuple(shape)), (name, got, (dtype, shape))
            if not array.flags.c_contiguous:
                contiguous = np.empty(array.shape, array.dtype)
                copy_into(contiguous, array)
                array = contiguous
            file.write(memoryview(array.reshape(-1).view(np.uint8)))


def _make_header(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end

    # Spaces align the data to 8 bytes, as the format's own library does.
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
