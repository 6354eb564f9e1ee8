"""Streams -> this process's rows -> global arrays."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from lm.data import batch as batch_contract


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[int]:
    """The rows of a global [B, ...] array that this process's devices hold, in order."""
    rows = set()
    for index in sharding.addressable_devices_indices_map(shape).values():
        rows.update(range(*index[0].indices(shape[0])))
    return sorted(rows)


def to_global(
    rows: dict[int, dict[str, np.ndarray]], batch_size: int, sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
    """Global [B, T] arrays from this process's rows, given by their number in the batch."""

    def one(name):
        length = next(iter(rows.values()))[name].shape[0]

        def shard(index):
            numbers = range(*index[0].indices(batch_size))
            return np.stack([rows[i][name] for i in numbers])[:, index[1]]

        return jax.make_array_from_callback((batch_size, length), sharding, shard)

    return {name: one(name) for name in batch_contract.DTYPES}


class Loader:
    """An endless iterator of global batches, dealt from streams.

    Row r of the batch comes from stream r // (B / num_streams). The number of streams is part of
    the experiment, not of the machine: batches don't depend on hosts or threads, and states are
    kept by stream number, so that a run can move.

    Args:
      make_stream: stream number -> iterator over rows, with get_state and set_state.
      sharding: of a [B, T] array.

    Raises:
      ValueError: streams that don't divide the rows, or whose rows lie on two processes.
    """

    def __init__(
        self,
        make_stream: Callable[[int], Iterator],
        num_streams: int,
        batch_size: int,
        length: int,
        sharding: jax.sharding.Sharding,
    ):
        if batch_size % num_streams:
            raise ValueError(
                f"config.data.streams = {num_streams} must divide config.data.batch_size = "
                f"{batch_size}"
            )
        per_stream = batch_size // num_streams
        held = local_rows(sharding, (batch_size, length))
        numbers = sorted({row // per_stream for row in held})
        if len(held) != len(numbers) * per_stream:
            raise ValueError(
                f"process {jax.process_index()} holds {len(held)} rows of {batch_size}, not whole "
                f"streams of {per_stream} rows: make config.data.streams = {num_streams} a "
                "multiple of the number of processes"
            )
        self._streams = {number: make_stream(number) for number in numbers}
        self._per_stream, self._batch_size, self._sharding = per_stream, batch_size, sharding

    def __iter__(self):
        return self

    def __next__(self) -> tuple[dict[str, jax.Array], str]:
        """A batch, and the hash of this process's rows."""
        rows = {
            number * self._per_stream + i: next(stream)
            for number, stream in self._streams.items()
            for i in range(self._per_stream)
        }
        local = {
            name: np.stack([row[name] for row in rows.values()]) for name in batch_contract.DTYPES
        }
        batch_contract.check(local)
        return to_global(rows, self._batch_size, self._sharding), batch_contract.digest(local)

    def state(self) -> dict[str, dict]:
        """States of this process's streams by number, JSON-able."""
        return {str(number): stream.get_state() for number, stream in self._streams.items()}

    def restore(self, states: dict[str, dict]) -> None:
        """Goes on from states that `state` gave, gathered over all processes."""
        for number, stream in self._streams.items():
            stream.set_state(states[str(number)])

    def close(self) -> None:
        """Ends the streams' threads."""
        for stream in self._streams.values():
            stream.close()


def evaluation_batches(
    rows: list[dict[str, np.ndarray]],
    batch_size: int,
    sharding: jax.sharding.Sharding,
    padding: dict,
) -> Iterator[dict]:
    """Global batches of all rows in order, the last one filled with `padding` rows."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        part = part + [padding] * (batch_size - len(part))
        yield to_global(dict(enumerate(part)), batch_size, sharding)
