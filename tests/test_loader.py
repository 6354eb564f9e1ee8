"""Global batches: the same rows on every mesh, dealt from streams whose states restore."""

import json

import jax
import numpy as np
import pytest

from lm import sharding
from lm.data import batch as batch_contract
from lm.data import loader as loaders
from lm.data import pack
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer

BATCH = 8
LENGTH = 16
# Name -> (number of devices, axis sizes).
MESHES = {
    "one": (1, {}),
    "data": (8, {"data": 8}),
    "fsdp": (4, {"data": 2, "fsdp": 2}),
    "sequence": (8, {"data": 4, "sequence": 2}),
    "only sequence": (2, {"sequence": 2}),
    "tensor": (8, {"fsdp": 4, "tensor": 2}),
}
DOCUMENTS = Documents(
    [Document(chr(33 + i) * (1 + i % 20), f"d{i}", "") for i in range(50)], "fingerprint"
)


def shardings(name):
    """Array of a batch -> its sharding on a mesh."""
    count, sizes = MESHES[name]
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    return dict.fromkeys(batch_contract.ARRAYS, sharding.batch_sharding(mesh))


def make_stream(number, num_streams):
    return pack.stream(
        DOCUMENTS,
        pack.Encoder(ByteTokenizer(), ""),
        pack.Packing("first_fit", LENGTH, 4),
        number=number,
        num_streams=num_streams,
        seed=0,
    )


def make_loader(mesh="one", num_streams=4):
    def stream(number):
        return make_stream(number, num_streams)

    return loaders.Loader(stream, num_streams, BATCH, LENGTH, shardings(mesh))


def numbered_rows(num):
    """Rows whose every array differs from the others'."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        row = {}
        for name, array in batch_contract.ARRAYS.items():
            row[name] = rng.integers(1, 100, LENGTH).astype(array.dtype)
        rows.append(row)
    return rows


def stack(rows, name):
    return np.stack([row[name] for row in rows])


def read(loader, steps):
    """(batch as numpy arrays, digest) of the next steps."""
    batches = []
    for _ in range(steps):
        batch, digest = loader.next(None)
        batches.append((jax.tree.map(np.asarray, batch), digest))
    return batches


def same(batches, others):
    """Whether digests and arrays of two reads are the same."""
    assert len(batches) == len(others)
    for (batch, digest), (other, other_digest) in zip(batches, others):
        if digest != other_digest:
            return False
        for name in batch_contract.ARRAYS:
            if not np.array_equal(batch[name], other[name]):
                return False
    return True


# --- global arrays ---


@pytest.mark.parametrize("mesh", MESHES)
def test_global_arrays_are_the_rows_stacked(mesh):
    rows = numbered_rows(BATCH)
    layouts = shardings(mesh)

    batch = loaders.to_global(dict(enumerate(rows)), BATCH, layouts)

    assert set(batch) == set(batch_contract.ARRAYS)
    for name, array in batch_contract.ARRAYS.items():
        assert batch[name].dtype == array.dtype
        assert batch[name].sharding == layouts[name]
        np.testing.assert_array_equal(batch[name], stack(rows, name))
    assert loaders.local_rows(layouts["tokens"], (BATCH, LENGTH)) == list(range(BATCH))


def test_rows_lie_where_the_mesh_puts_them():
    rows = numbered_rows(BATCH)

    batch = loaders.to_global(dict(enumerate(rows)), BATCH, shardings("sequence"))

    # What a device holds is its rows and columns, no more: the transfer is no larger than it has to
    # be.
    for shard in batch["tokens"].addressable_shards:
        assert shard.data.shape == (2, 8)
        np.testing.assert_array_equal(shard.data, stack(rows, "tokens")[shard.index])


class PartlyElsewhere:
    """A sharding of which this process holds a part only."""

    def __init__(self, row_slices):
        self._row_slices = row_slices

    def addressable_devices_indices_map(self, shape):
        del shape  # its devices hold all columns
        return {device: (rows, slice(None)) for device, rows in enumerate(self._row_slices)}


def test_local_rows_of_a_part():
    shape = (BATCH, LENGTH)
    replicated = PartlyElsewhere([slice(4, 6), slice(0, 2), slice(4, 6)])
    open_ended = PartlyElsewhere([slice(6, None)])

    assert loaders.local_rows(replicated, shape) == [0, 1, 4, 5]
    assert loaders.local_rows(open_ended, shape) == [6, 7]


# --- the loader ---


def test_a_process_runs_only_the_streams_of_its_rows():
    numbers = []

    def stream(number):
        numbers.append(number)
        return make_stream(number, 4)

    loader = loaders.Loader(stream, 4, BATCH, LENGTH, {"tokens": PartlyElsewhere([slice(4, 8)])})
    assert numbers == [2, 3]
    assert set(loader.state()) == {"2", "3"}

    with pytest.raises(ValueError, match="holds 3 rows of 8, not whole streams of 2"):
        loaders.Loader(stream, 4, BATCH, LENGTH, {"tokens": PartlyElsewhere([slice(0, 3)])})


@pytest.fixture(scope="module")
def reference():
    return read(make_loader("one"), 12)


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "one"])
def test_batches_do_not_depend_on_the_mesh(mesh, reference):
    assert same(read(make_loader(mesh), 12), reference)


def test_rows_are_dealt_from_the_streams(reference):
    streams = [make_stream(number, 4) for number in range(4)]

    for batch, digest in reference[:6]:
        batch_contract.check(batch)
        # 8 rows of 4 streams: two of each, next to each other.
        rows = [next(streams[row // 2]) for row in range(BATCH)]
        for name in batch:
            assert np.array_equal(batch[name], stack(rows, name))
        assert digest == batch_contract.digest(batch)

    digests = {digest for _, digest in reference}
    assert len(digests) == len(reference)


def test_the_number_of_streams_is_part_of_the_experiment(reference):
    assert not same(read(make_loader(num_streams=2), 12), reference)


def test_state_restores_exactly_on_another_mesh(reference):
    loader = make_loader("data")

    for step in range(10):
        if step in (0, 3, 7):
            # Checkpoints keep states as JSON.
            state = json.loads(json.dumps(loader.state()))
            other = make_loader("fsdp")
            other.restore(state)
            assert same(read(other, 4), reference[step : step + 4])
            other.restore(state)  # after having gone on
            assert same(read(other, 2), reference[step : step + 2])
            other.close()
        assert same(read(loader, 1), reference[step : step + 1])

    assert set(loader.state()) == {"0", "1", "2", "3"}
    loader.close()


@pytest.mark.parametrize("state", [None, {}, {"next_index": 3}, {"epoch": 0, "started": 1}])
def test_states_that_are_none(state):
    loader = make_loader()
    with pytest.raises(ValueError, match="data stream 0 can't be restored"):
        loader.restore({"0": state})
    loader.close()


# --- evaluation ---


@pytest.mark.parametrize("num", [1, 7, 8, 9, 24])
def test_evaluation_batches_hold_each_row_once(num):
    rows = numbered_rows(num)
    padding = batch_contract.empty_row(LENGTH)

    batches = list(loaders.evaluation_batches(rows, BATCH, shardings("data"), padding))

    assert len(batches) == -(-num // BATCH)
    for batch in batches:
        assert batch["tokens"].shape == (BATCH, LENGTH)
    for name in batch_contract.ARRAYS:
        values = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_array_equal(values[:num], stack(rows, name))
        assert not values[num:].any()
    assert len(rows) == num  # the caller's list is left alone
