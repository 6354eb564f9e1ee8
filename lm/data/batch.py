"""The Batch contract: what a data transform hands to an objective.

A batch is a dict of [B, T] arrays. Packing, masking and completion-only losses are transforms that
write `weights`; the model and the loss never know where a batch came from.
"""

import hashlib

import numpy as np

# fmt: off
DTYPES = {
    "tokens": np.int32,     # what the model reads
    "targets": np.int32,    # what it should predict after each token
    "weights": np.float32,  # 1 where the target counts in the loss, 0 elsewhere (padding too)
    "positions": np.int32,  # place in the document's window, from 0; 0 in padding
    "segments": np.int32,   # document's number in the row, from 1; 0 is padding
}
# fmt: on


def check(batch: dict) -> None:
    """Asserts that a batch, or a row of one, keeps the contract."""
    shape = batch["tokens"].shape
    for name, dtype in DTYPES.items():
        array = batch[name]
        description = f"{name} is {array.dtype}{array.shape}; wanted {np.dtype(dtype)}{shape}"
        assert array.shape == shape and array.dtype == dtype, description

    is_padding = batch["segments"] == 0
    assert not (batch["weights"] * is_padding).any(), "padding has weight"


def digest(batch: dict) -> str:
    """Returns a short hash of a batch's contents, to tell batches apart in logs."""
    contents = hashlib.blake2b(digest_size=8)
    # Sorted: the hash must not depend on the order in which a transform writes the arrays.
    for name in sorted(batch):
        contents.update(np.ascontiguousarray(batch[name]).tobytes())
    return contents.hexdigest()
