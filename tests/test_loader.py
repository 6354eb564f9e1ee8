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

BATCH, LENGTH = 8, 16
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


def layout(name):
    count, sizes = MESHES[name]
    return sharding.batch_sharding(sharding.make_mesh(sizes, jax.devices()[:count]))


def make_stream(number, num_streams):
    return pack.stream(
        DOCUMENTS,
        pack.Encoder(ByteTokenizer(), ""),
        length=LENGTH,
        packing="first_fit",
        bins=4,
        number=number,
        num_streams=num_streams,
        seed=0,
    )


def make_loader(mesh="one", num_streams=4, **args):
    return loaders.Loader(
        lambda number: make_stream(number, num_streams),
        num_streams,
        args.get("batch_size", BATCH),
        LENGTH,
        layout(mesh),
    )


def numbered_rows(num):
    rng = np.random.default_rng(0)
    return [
        {
            name: rng.integers(1, 100, LENGTH).astype(dtype)
            for name, dtype in batch_contract.DTYPES.items()
        }
        for _ in range(num)
    ]


def read(loader, steps):
    batches = [next(loader) for _ in range(steps)]
    return [({k: np.asarray(v) for k, v in batch.items()}, digest) for batch, digest in batches]


def same(a, b):
    return all(
        x[1] == y[1] and all(np.array_equal(x[0][k], y[0][k]) for k in batch_contract.DTYPES)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_global_arrays_are_the_rows_stacked(mesh):
    rows, sharding_ = numbered_rows(BATCH), layout(mesh)
    batch = loaders.to_global(dict(enumerate(rows)), BATCH, sharding_)
    assert set(batch) == set(batch_contract.DTYPES)
    for name, dtype in batch_contract.DTYPES.items():
        assert batch[name].dtype == dtype and batch[name].sharding == sharding_
        np.testing.assert_array_equal(batch[name], np.stack([row[name] for row in rows]))
    assert loaders.local_rows(sharding_, (BATCH, LENGTH)) == list(range(BATCH))


def test_rows_lie_where_the_mesh_puts_them():
    # What a device holds is its rows and columns, no more: the transfer is no larger than it has to
    # be.
    batch = loaders.to_global(
        dict(enumerate(rows := numbered_rows(BATCH))), BATCH, layout("sequence")
    )
    assert {s.data.shape for s in batch["tokens"].addressable_shards} == {(2, 8)}
    for shard in batch["tokens"].addressable_shards:
        np.testing.assert_array_equal(
            shard.data, np.stack([r["tokens"] for r in rows])[shard.index]
        )


class Elsewhere:
    """A sharding of which this process holds a part only."""

    def __init__(self, parts):
        self._parts = parts

    def addressable_devices_indices_map(self, shape):
        del shape
        return {i: (part, slice(None)) for i, part in enumerate(self._parts)}


def test_local_rows_of_a_part():
    assert loaders.local_rows(
        Elsewhere([slice(4, 6), slice(0, 2), slice(4, 6)]), (BATCH, LENGTH)
    ) == [0, 1, 4, 5]
    assert loaders.local_rows(Elsewhere([slice(6, None)]), (BATCH, LENGTH)) == [6, 7]


def test_a_process_runs_only_the_streams_of_its_rows():
    made = []

    def stream(number):
        made.append(number)
        return make_stream(number, 4)

    loader = loaders.Loader(stream, 4, BATCH, LENGTH, Elsewhere([slice(4, 8)]))
    assert made == [2, 3] and set(loader.state()) == {"2", "3"}
    with pytest.raises(ValueError, match="holds 3 rows of 8, not whole streams of 2"):
        loaders.Loader(stream, 4, BATCH, LENGTH, Elsewhere([slice(0, 3)]))


@pytest.fixture(scope="module")
def reference():
    return read(make_loader("one"), 12)


@pytest.mark.parametrize("mesh", [m for m in MESHES if m != "one"])
def test_batches_do_not_depend_on_the_mesh(mesh, reference):
    assert same(read(make_loader(mesh), 12), reference)


def test_rows_are_dealt_from_the_streams(reference):
    streams = [make_stream(number, 4) for number in range(4)]
    for batch, digest in reference[:6]:
        batch_contract.check(batch)
        rows = [next(streams[r // 2]) for r in range(BATCH)]
        assert all(np.array_equal(batch[k], np.stack([row[k] for row in rows])) for k in batch)
        assert digest == batch_contract.digest(batch)
    assert len({digest for _, digest in reference}) == len(reference)
    # the number of streams is part of the experiment
    assert not same(read(make_loader(num_streams=2), 12), reference)


def test_state_restores_exactly_on_another_mesh(reference):
    loader = make_loader("data")
    for step in range(10):
        if step in (0, 3, 7):
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


def test_streams_that_do_not_divide_the_batch():
    with pytest.raises(
        ValueError, match="config.data.streams = 3 must divide config.data.batch_size = 8"
    ):
        make_loader(num_streams=3)


@pytest.mark.parametrize("num", [1, 7, 8, 9, 24])
def test_evaluation_batches_hold_each_row_once(num):
    rows, padding = numbered_rows(num), pack.empty_row(LENGTH)
    batches = list(loaders.evaluation_batches(rows, BATCH, layout("data"), padding))
    assert len(batches) == -(-num // BATCH) and all(
        b["tokens"].shape == (BATCH, LENGTH) for b in batches
    )
    for name in batch_contract.DTYPES:
        found = np.concatenate([b[name] for b in batches])
        np.testing.assert_array_equal(found[:num], np.stack([r[name] for r in rows]))
        assert not found[num:].any()
    assert len(rows) == num  # the caller's list is left alone
