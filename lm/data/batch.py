"""The Batch contract: what a data transform hands to an objective.

A batch is a dict of arrays [B, ...]: the five of `ARRAYS`, and those that the objective declares
beside them. Packing, masking and completion-only losses are transforms that write `weights`; the
model and the loss never know where a batch came from.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Array(NamedTuple):
    """An array of a batch.

    Attributes:
      dims: of a row: "length" is its positions T, which the mesh's sequence axis splits; a number
        is a dim of that size, which nothing splits. () is one value a row.
      padding: the value in padding.
    """

    dtype: type
    dims: tuple[str | int, ...] = ("length",)
    padding: float = 0

    def row_shape(self, length: int) -> tuple[int, ...]:
        """The shape in a row of `length` positions."""
        return tuple(length if dim == "length" else dim for dim in self.dims)


# fmt: off
ARRAYS = {
    "tokens": Array(np.int32),     # what the model reads
    "targets": Array(np.int32),    # what it should predict after (or at) each token
    "weights": Array(np.float32),  # 1 where the target counts in the loss, else 0 (padding too)
    "positions": Array(np.int32),  # place in the document's window, from 0; 0 in padding
    "segments": Array(np.int32),   # document's number in the row, from 1; 0 is padding
}
# fmt: on

# What rows of examples have besides, for objectives that declare it; see `lm.data.units.Unit`.
UNIT_ARRAYS = {"values": Array(np.float32), "stored_logprobs": Array(np.float32)}

# What rows have besides that hold sources beside their targets.
SOURCE_NAMES = ("source", "source_positions", "source_segments")


def source_arrays(length: int) -> dict[str, Array]:
    """Arrays of sources of `length` places; a target and its source share a segment's number."""
    return {name: Array(np.int32, (length,)) for name in SOURCE_NAMES}


def source_of(batch: Mapping) -> tuple:
    """Tokens, positions and segments of a batch's sources, as a model reads them."""
    return tuple(batch[name] for name in SOURCE_NAMES)


def empty_row(length: int, arrays: Mapping[str, Array] = ARRAYS) -> dict[str, np.ndarray]:
    """Returns a row of padding."""
    row = {}
    for name, array in arrays.items():
        row[name] = np.full(array.row_shape(length), array.padding, array.dtype)
    return row


def check(batch: dict, arrays: Mapping[str, Array] = ARRAYS) -> None:
    """Asserts that a batch, or a row of one, keeps the contract."""
    *rows, length = batch["tokens"].shape
    for name, wanted in arrays.items():
        array, shape = batch[name], (*rows, *wanted.row_shape(length))
        description = f"{name} is {array.dtype}{array.shape}; wanted {wanted.dtype}{shape}"
        assert array.shape == shape and array.dtype == wanted.dtype, description

    is_padding = batch["segments"] == 0
    assert not (batch["weights"] * is_padding).any(), "padding has weight"


def digest(batch: dict) -> str:
    """Returns a short hash of a batch's contents, to tell batches apart in logs."""
    contents = hashlib.blake2b(digest_size=8)
    # Sorted: the hash must not depend on the order in which a transform writes the arrays.
    for name in sorted(batch):
        contents.update(np.ascontiguousarray(batch[name]).tobytes())
    return contents.hexdigest()
