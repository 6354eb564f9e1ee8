"""The tripwire: one bit that differs between replicas is found and named, whatever the mesh."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm import build, replicas, sharding
from tests.helpers import run_training, saved_steps


def make_mesh(**sizes):
    return sharding.make_mesh(sizes, jax.devices())


def place(mesh, value, *spec):
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))


def flip(array, device, change):
    """The array with what one device holds of it changed, by a function of the numpy array."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device.id == device:
            part = change(part)
            assert part.dtype == array.dtype
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def flip_bit(bit=0, place=-1):
    """Flips one bit of one element."""

    def change(part):
        bits = part.reshape(-1).view(f"uint{part.dtype.itemsize * 8}")
        bits[place] ^= np.array(1 << bit, bits.dtype)
        return part

    return change


def put(value, place=-1):
    def change(part):
        part.reshape(-1)[place] = value
        return part

    return change


def negate(part):
    """Signs are wrong everywhere: the highest bits of all elements."""
    return -part


def swap(part):
    """Two elements change places: their plain sum stays."""
    part.reshape(-1)[[0, 1]] = part.reshape(-1)[[1, 0]]
    return part


def other_nan(part):
    return flip_bit(bit=3, place=1)(part)


# name -> (mesh, how the mesh splits it, the array)
VALUES = np.random.default_rng(0).normal(0, 1, (8, 4)).astype(np.float32)
VALUES[0, :3] = 0.0, np.nan, 1.0
ARRAYS = {
    "replicated": (dict(data=8), (), VALUES),
    "split": (dict(data=2, fsdp=4), ("fsdp",), VALUES[:, ::-1]),
    "split in two dims": (dict(fsdp=2, tensor=2, data=2), ("tensor", "fsdp"), VALUES),
    "bfloat16": (dict(slice=2, expert=4), (None, "expert"), VALUES.astype(jnp.bfloat16)),
    "integers": (dict(data=8), (), np.arange(5, dtype=np.int32)),
    "a counter": (dict(fsdp=8), (), np.int32(7)),
    "truth values": (dict(fsdp=8), (), np.array([True, False])),
}


def check(mesh, tree):
    replicas.Replicas(mesh, tree).check(tree, step=12)


@pytest.mark.parametrize("name", list(ARRAYS))
def test_any_bit_on_any_device(name):
    """With its device and its array's name; and nothing where all are as they should be."""
    sizes, spec, value = ARRAYS[name]
    mesh = make_mesh(**sizes)
    whole = place(mesh, value, *spec)
    tree = {"other": place(mesh, np.ones(8, np.float32)), "params": {"table": whole}}
    comparison = replicas.Replicas(mesh, tree)
    comparison.check(tree, step=12)

    num_bits = 1 if value.dtype == bool else value.dtype.itemsize * 8
    num_copies = int(np.prod([mesh.shape[a] for a in mesh.axis_names if a not in spec]))
    for device in (0, 5, 7):
        bit = (7 * device + 3) % num_bits
        tree["params"]["table"] = flip(whole, device, flip_bit(bit))
        with pytest.raises(replicas.ReplicasDiffer, match="^after step 12") as error:
            comparison.check(tree, step=12)
        message = str(error.value)
        assert "params/table on device" in message and "other" not in message
        named = message[: message.index(". A device")].count("device ")
        # Of two that differ, none is known to be right.
        assert named == (1 if num_copies > 2 else 2)
        assert f"device {device} (process 0)" in message


@pytest.mark.parametrize(
    "change",
    [put(-0.0, 0), other_nan, put(np.float32(1e-45), 0), swap, negate],
    ids=["minus zero", "another NaN", "a denormal", "two swapped", "all signs"],
)
def test_bits_are_compared_and_not_values(change):
    """-0 for 0, another NaN, a denormal number, two elements that changed places."""
    mesh = make_mesh(data=8)
    array = flip(place(mesh, VALUES), 3, change)
    with pytest.raises(replicas.ReplicasDiffer, match="table on device 3 "):
        check(mesh, {"table": array})


def test_several_arrays_and_devices():
    """Where there is no majority all devices are named; of many arrays the first ones."""
    mesh = make_mesh(data=2, fsdp=4)
    tree = {f"p{i}": place(mesh, VALUES, "fsdp") for i in range(8)}
    for i in (1, 2, 3, 4, 5, 6, 7):
        tree[f"p{i}"] = flip(tree[f"p{i}"], 6, flip_bit())
    with pytest.raises(replicas.ReplicasDiffer) as error:
        check(mesh, tree)
    both = "device 2 (process 0), device 6 (process 0)"
    assert f"don't: p1 on {both}; p2 on {both}; " in str(error.value)
    assert f"p5 on {both}, and 2 other arrays. " in str(error.value)


def test_what_is_held_once_is_not_compared(caplog):
    """And the log says so."""
    caplog.set_level(logging.INFO)
    mesh = make_mesh(fsdp=8)
    check(mesh, {"table": place(mesh, VALUES, "fsdp"), "scale": place(mesh, np.ones(2, bool))})
    assert "compares 1 of 2 arrays, 1.5% of the bytes" in caplog.text
    assert caplog.records[-1].levelname == "WARNING"

    check(mesh, {"table": place(mesh, VALUES, "fsdp")})
    assert "compares 0 of 1 arrays" in caplog.text
    check(mesh, {"scale": place(mesh, VALUES)})
    assert caplog.records[-1].levelname == "INFO"


# In a run.


def flip_at(monkeypatch, step, find):
    """A bit of an array of the state, which `find` gives, flips on device 2 during a step."""
    make = build.program

    def program(*args):
        made = make(*args)
        count = 0

        def train_step(*args):
            nonlocal count
            count += 1
            state, metrics = made.train_step(*args)
            if count == step:
                wanted = find(state)
                # A lower bit may be rounded away by the steps until it is looked for.
                change = flip_bit(4)
                state = jax.tree.map(lambda x: flip(x, 2, change) if x is wanted else x, state)
            return state, metrics

        return build.dataclasses.replace(made, train_step=train_step)

    monkeypatch.setattr(build, "program", program)


def find_table(state):
    return state.params["embed"]["table"]


def find_moment(state):
    from optax import tree_utils

    return tree_utils.tree_get(state.opt_state["transform"], "nu")["layers"]["mlp"]["up"]


def test_a_run_ends_where_a_bit_flips(fast_runs, small, tmp_path, monkeypatch):
    """Of a parameter, found when it is due, or of a moment, found before it is saved: nothing of it
    is saved, and the run goes on from the last good checkpoint.
    """
    small.mesh.update(dict(data=4))
    small.train.update(dict(length="8 steps", log_every=3))
    small.checkpoint.every = 4
    flips = {
        "table": (find_table, "state/params/embed/table", 6, 6),
        "moment": (find_moment, r"state/opt_state/transform/\S*nu/layers/mlp/up", 100, 8),
    }
    for name, (find, path, every, found_at) in flips.items():
        small.train.check_replicas_every = every
        message = rf"^after step {found_at} .*don't: {path} on device 2 \(process 0\)\. "
        with monkeypatch.context() as patch:
            flip_at(patch, 5, find)
            with pytest.raises(replicas.ReplicasDiffer, match=message):
                run_training(small, tmp_path / name, devices=4)
        assert saved_steps(tmp_path / name) == [4]

    run_training(small, tmp_path / "moment", devices=4)
    assert saved_steps(tmp_path / "moment") == [4, 8]
