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
    """Asserts that a batch keeps the contract."""
    shape = batch["tokens"].shape
    for name, dtype in DTYPES.items():
        assert batch[name].shape == shape and batch[name].dtype == dtype, (
            name,
            batch[name].shape,
            shape,
            batch[name].dtype,
        )
    assert not (batch["weights"] * (batch["segments"] == 0)).any(), "padding has weight"


def digest(batch: dict) -> str:
    """A short hash of a batch's contents, to tell batches apart in logs."""
    h = hashlib.blake2b(digest_size=8)
    for name in sorted(batch):
        h.update(np.ascontiguousarray(batch[name]).tobytes())
    return h.hexdigest()
