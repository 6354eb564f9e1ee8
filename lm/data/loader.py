"""Streams -> this process's rows -> global arrays."""

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from lm.data import batch as batch_contract
from lm.data import pack


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[int]:
    """Returns the rows of a global [B, ...] array that this process's devices hold, in order."""
    rows = set()
    for index in sharding.addressable_devices_indices_map(shape).values():
        rows.update(range(*index[0].indices(shape[0])))
    return sorted(rows)


def to_global(
    rows: dict[int, dict[str, np.ndarray]],
    batch_size: int,
    shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
    """Returns global [B, ...] arrays, given this process's rows by their number in the batch."""
    arrays = {}
    for name, sharding in shardings.items():
        values = {number: row[name] for number, row in rows.items()}
        arrays[name] = _global_array(values, batch_size, sharding)
    return arrays


def _global_array(
    rows: dict[int, np.ndarray], batch_size: int, sharding: jax.sharding.Sharding
) -> jax.Array:
    """A global [B, ...] array out of rows."""
    row_shape = next(iter(rows.values())).shape

    def shard(index):
        row_slice, *inner_slices = index
        numbers = range(*row_slice.indices(batch_size))
        return np.stack([rows[number] for number in numbers])[:, *inner_slices]

    # JAX asks for the shards of this process's devices only, so no other rows are needed.
    return jax.make_array_from_callback((batch_size, *row_shape), sharding, shard)


class Loader:
    """Gives global batches without end, dealt from streams.

    A loader of one's own (config.data.loader) has the same methods.

    Row r of the batch comes from stream r // (B / num_streams). The number of streams is part of
    the experiment, not of the machine: batches don't depend on hosts or threads, and states are
    kept by stream number, so that a run can move.

    Args:
      make_stream: stream number -> its rows.
      shardings: of each array.
      arrays: those of a batch.

    Raises:
      ValueError: streams whose rows lie on two processes.
    """

    def __init__(
        self,
        make_stream: Callable[[int], pack.Stream],
        num_streams: int,
        batch_size: int,
        length: int,
        shardings: Mapping[str, jax.sharding.Sharding],
        arrays: Mapping[str, batch_contract.Array] = batch_contract.ARRAYS,
    ):
        assert batch_size % num_streams == 0  # the configuration is checked

        # This process runs the streams of its own rows, and no others.
        rows_per_stream = batch_size // num_streams
        rows = local_rows(shardings["tokens"], (batch_size, length))
        numbers = sorted({row // rows_per_stream for row in rows})
        if len(rows) != len(numbers) * rows_per_stream:
            raise ValueError(
                f"process {jax.process_index()} holds {len(rows)} rows of {batch_size}, not whole "
                f"streams of {rows_per_stream} rows: make config.data.streams = {num_streams} a "
                "multiple of the number of processes"
            )

        self._streams = {number: make_stream(number) for number in numbers}
        self._rows_per_stream = rows_per_stream
        self._batch_size = batch_size
        self._shardings = shardings
        self._arrays = arrays

    def next(self, params) -> tuple[dict[str, jax.Array], str]:
        """Returns a batch, and the hash of this process's rows.

        Args:
          params: the model's present parameters, for loaders that sample from it.
        """
        del params
        rows = {}
        for number, stream in self._streams.items():
            for i in range(self._rows_per_stream):
                rows[number * self._rows_per_stream + i] = next(stream)

        # Checked and hashed before the transfer: the global arrays would have to be read back.
        local_batch = {}
        for name in self._arrays:
            local_batch[name] = np.stack([row[name] for row in rows.values()])
        batch_contract.check(local_batch, self._arrays)
        digest = batch_contract.digest(local_batch)

        return to_global(rows, self._batch_size, self._shardings), digest

    def boundary(self, step: int) -> bool:
        """Whether the state after so many batches says all: checkpoints and stops fall on such
        steps only.
        """
        del step
        return True

    def state(self) -> dict[str, dict]:
        """Returns the states of this process's streams by number, JSON-able."""
        return {str(number): stream.get_state() for number, stream in self._streams.items()}

    def epochs_begun(self) -> float:
        """Returns the epochs whose documents have begun, in the first of this process's streams."""
        return self._streams[min(self._streams)].epochs_begun()

    def restore(self, states: dict[str, dict]) -> None:
        """Goes on from states that `state` returned, gathered over all processes.

        Raises:
          ValueError: they are no such states.
        """
        for number, stream in self._streams.items():
            try:
                stream.set_state(states[str(number)])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"the state of data stream {number} can't be restored ({error!r}): it is "
                    "damaged, or from another version of lm"
                ) from None

    def close(self) -> None:
        """Ends the streams' threads."""
        for stream in self._streams.values():
            stream.close()


def evaluation_batches(
    rows: list[dict[str, np.ndarray]],
    batch_size: int,
    shardings: Mapping[str, jax.sharding.Sharding],
    padding: dict,
) -> Iterator[dict]:
    """Yields global batches of all rows in order, the last one filled with `padding` rows."""
    for start in range(0, len(rows), batch_size):
        batch_rows = rows[start : start + batch_size]
        # A full last batch: one shape is one compilation, and every device gets its share.
        batch_rows = batch_rows + [padding] * (batch_size - len(batch_rows))
        yield to_global(dict(enumerate(batch_rows)), batch_size, shardings)
