"""The safetensors format, read and written a tensor at a time: eight bytes with the header's
length, a JSON header, the bytes of the tensors.

(huggingface.co/docs/safetensors, "Format". The library of that name reads into NumPy no bfloat16,
and writes only what is in memory whole.)
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

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
_LONGEST_HEADER = 100_000_000  # the format's own limit


class Entry(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its bytes in the file

    def read(self) -> np.ndarray:
        """The tensor, mapped, not copied."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name; nothing of them is read.

    Raises:
      ValueError: a file cut short, a header that is no header, or that says other than the file
        holds.
    """
    size = path.stat().st_size
    bad = lambda what: ValueError(
        f"{path} is not a whole safetensors file: {what}. Copy it again from its source."
    )
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise bad(f"its header should be {length} bytes long, and the file is {size}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise bad(f"its header can't be read ({error})") from None
    if not isinstance(header, dict):
        raise bad("its header is no JSON object")
    header.pop("__metadata__", None)
    found, spans = {}, []
    for name, about in header.items():
        try:
            dtype, shape, (begin, end) = (
                about["dtype"],
                tuple(about["shape"]),
                about["data_offsets"],
            )
            whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise bad(f"its entry for {name!r} is {about!r}")
        if dtype not in DTYPES:
            raise ValueError(
                f"{path}: {name} is of dtype {dtype}, which can't be read; there are {list(DTYPES)}"
            )
        needed = int(np.prod(shape, dtype=object)) * np.dtype(DTYPES[dtype]).itemsize
        if end - begin != needed:
            raise bad(
                f"{name} is {dtype}{list(shape)}, {needed} bytes, but its place has {end - begin}"
            )
        if end > size - 8 - length:
            raise bad(f"{name} ends at byte {8 + length + end} of {size}")
        found[name] = Entry(path, np.dtype(DTYPES[dtype]), shape, 8 + length + begin)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise bad(f"{name} begins at byte {begin} of the data, where byte {at} is next")
        at = end
    if at != size - 8 - length:
        raise bad(f"its tensors fill {at} bytes, and it holds {size - 8 - length}")
    return found


def _no_duplicates(pairs):
    names = [name for name, _ in pairs]
    if (
        twice := {name for name in names if names.count(name) > 1}
        if len(set(names)) < len(names)
        else ()
    ):
        raise ValueError(f"{sorted(twice)} twice")
    return dict(pairs)


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source. A transposed source goes in strips that caches hold, which is five
    times as fast.
    """
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for i in range(0, target.shape[-1], 16):
        target[..., i : i + 16] = source[..., i : i + 16]


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
    """
    header, at = {"__metadata__": dict(metadata or {"format": "pt"})}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, (dtype, shape)), array in zip(tensors.items(), arrays, strict=True):
            assert array.shape == tuple(shape) and array.dtype == dtype, (
                name,
                array.shape,
                array.dtype,
                shape,
                dtype,
            )
            if not array.flags.c_contiguous:
                copy(whole := np.empty(array.shape, array.dtype), array)
                array = whole
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
    partial.replace(path)
