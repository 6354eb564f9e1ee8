"""Layouts: errors name what to change, big arrays are split, and the mesh changes neither weights,
nor gradient, nor losses.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lm import build, config, sharding
from lm.models import presets
from tests.helpers import slow

MESHES = {
    "one device": {},
    "data 8": dict(data=8),
    "fsdp 8": dict(fsdp=8),
    "data 2 x fsdp 4": dict(data=2, fsdp=4),
    "fsdp 4 x fsdp2 2": dict(fsdp=4, fsdp2=2),
    "data 2 x fsdp 2 x tensor 2": dict(data=2, fsdp=2, tensor=2),
    "slice 2 x sequence 2 x expert 2": dict(slice=2, sequence=2, expert=2),
}
# What conftest.py switches off for speed, switched on again, as in a run.
OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}


def devices_for(sizes):
    """As many devices as a mesh of these sizes needs."""
    return jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))]


def experiment(tiny, sizes, overrides=()):
    """The tiny experiment in f32 on a mesh of as many devices as it needs.

    Args:
      overrides: {"section.key": value}.
    """
    c = tiny.copy_and_resolve_references()
    c.model.param_dtype = "float32"
    c.mesh.update(sizes)
    c.update_from_flattened_dict(dict(overrides))
    return build.build(c, devices_for(sizes))


def make_params(e, seed, compiler_options=None):
    """Initial parameters, in the host's memory."""
    key = jax.random.key(seed)
    with jax.set_mesh(e.program.mesh):
        params = e.program.make_params.lower(key).compile(compiler_options)(key)

    def has_its_layout(p, abstract):
        return p.sharding.is_equivalent_to(abstract.sharding, p.ndim)

    assert jax.tree.all(jax.tree.map(has_its_layout, params, e.program.abstract_state.params))
    return jax.device_get(params)


def uneven_batch(seed, rows=16, length=32, vocab=16):
    """Rows of two documents and padding with 0 to 28 weights, the weights of some inner targets 0,
    and every fourth row all padding.
    """
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        # A row without documents is all padding.
        if row % 4 == 3:
            continue
        first, second = rng.integers(1, 20), rng.integers(0, 9)
        segments[row, :first] = 1
        segments[row, first : first + second] = 2
        positions[row, :first] = np.arange(first)
        positions[row, first : first + second] = np.arange(second)

    weights = (segments > 0) * (rng.random((rows, length)) < 0.8)
    tokens, targets = rng.integers(0, vocab, (2, rows, length))
    return dict(
        tokens=tokens.astype(np.int32),
        targets=targets.astype(np.int32),
        weights=weights.astype(np.float32),
        positions=positions,
        segments=segments,
    )


def train(tiny, sizes, params, *, steps, overrides, accumulation=1):
    """(the first gradient, the losses of the first steps) on a mesh, from the given parameters."""
    # Without clipping, Adam's first moment after one step is (1 - b1) times the gradient.
    settings = {
        "data.batch_size": 16,
        "train.accumulation": accumulation,
        "train.length": "100 steps",
        "optimizer.clip_norm": 0.0,
    }
    e = experiment(tiny, sizes, settings | overrides)
    losses = []
    with jax.set_mesh(e.program.mesh):
        # All meshes begin with the same parameters, and see the same batches.
        layouts = jax.tree.map(lambda leaf: leaf.sharding, e.program.abstract_state.params)
        state = e.program.init_state(jax.device_put(params, layouts))
        for step in range(steps):
            batch = jax.device_put(uneven_batch(step), sharding.batch_sharding(e.program.mesh))
            state, metrics = e.program.train_step(state, batch, e.program.abstract_fixed)
            total, count = metrics["loss"]
            losses.append(float(total) / float(count))
            if step == 0:
                moment = optax.tree_utils.tree_get(state.opt_state["transform"], "mu")
                moment = jax.device_get(moment)

    return optax.tree.scale(1 / (1 - e.config.optimizer.b1), moment), np.array(losses)


_SINGLE_DEVICE_RUNS = {}


def single_device_run(tiny, *, steps, overrides):
    """(initial parameters, first gradient, losses) on one device; computed once for all meshes."""
    key = json.dumps([steps, overrides])
    if key not in _SINGLE_DEVICE_RUNS:
        params = make_params(experiment(tiny, {}, overrides), seed=0)
        gradient, losses = train(tiny, {}, params, steps=steps, overrides=overrides)
        _SINGLE_DEVICE_RUNS[key] = (params, gradient, losses)
    return _SINGLE_DEVICE_RUNS[key]


def assert_trains_alike(tiny, sizes, *, steps, model, execution, accumulation=1):
    """On a mesh, the first gradient (each parameter's) and the losses are those of one device.

    Args:
      model: overrides on both sides.
      execution: overrides on the mesh alone.
    """
    params, gradient, losses = single_device_run(tiny, steps=steps, overrides=model)
    mesh_gradient, mesh_losses = train(
        tiny, sizes, params, steps=steps, overrides=model | execution, accumulation=accumulation
    )

    for (path, got), wanted in zip(
        jax.tree_util.tree_leaves_with_path(mesh_gradient), jax.tree.leaves(gradient)
    ):
        error = np.linalg.norm(got - wanted)
        assert error < 2e-5 * max(np.linalg.norm(wanted), 0.01), jax.tree_util.keystr(path)
    np.testing.assert_allclose(mesh_losses, losses, rtol=1e-5)


# The mesh changes nothing.


@pytest.mark.parametrize(
    "sizes, accumulation",
    [
        (MESHES["data 2 x fsdp 2 x tensor 2"], 1),
        (MESHES["slice 2 x sequence 2 x expert 2"], 2),
        slow(MESHES["data 8"], 1),
        slow(MESHES["data 2 x fsdp 4"], 1),
        slow(MESHES["fsdp 4 x fsdp2 2"], 1),
        slow(dict(data=2, fsdp=2), 4),
    ],
    ids=str,
)
def test_gradient_and_losses_are_the_same_on_every_mesh(tiny, sizes, accumulation):
    params, gradient, losses = single_device_run(tiny, steps=10, overrides={})
    norm = float(optax.global_norm(gradient))
    # There is something to compare: it learns.
    assert norm > 0.1
    assert losses[-1] < losses[0] - 0.1

    mesh_gradient, mesh_losses = train(
        tiny, sizes, params, steps=10, overrides={}, accumulation=accumulation
    )
    difference = float(optax.global_norm(jax.tree.map(np.subtract, mesh_gradient, gradient)))
    assert difference < 1e-5 * norm, difference / norm
    np.testing.assert_allclose(mesh_losses, losses, rtol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [dict(fsdp=2, fsdp2=4), slow({}), slow(dict(slice=2, data=2, fsdp=2))],
    ids=str,
)
@pytest.mark.parametrize(
    "tied, positions, gather, accumulation",
    [(True, "rope", "joint", 1), (False, "learned", "staged", 2)],
)
def test_manual_fsdp_is_the_automatic(tiny, sizes, tied, positions, gather, accumulation):
    """The same gradient and losses; with chunked loss, tied and untied tables, biases and learned
    positions, and accumulation.
    """
    model = {
        "model.vocab_size": 264,
        "model.num_kv_heads": 4,
        "model.tie_embeddings": tied,
        "model.bias": "qkv,out,mlp,norm",
        "model.positions": positions,
    }
    execution = {
        "train.fsdp": "by_hand",
        "train.fsdp_gather": gather,
        "objective.chunk": 8,
        "model.remat": "query,attention,up",
    }
    assert_trains_alike(
        tiny, sizes, steps=4, model=model, execution=execution, accumulation=accumulation
    )


@pytest.mark.parametrize(
    "sizes, fsdp",
    [
        (dict(sequence=2, fsdp=2, fsdp2=2), "by_hand"),
        (dict(data=2, sequence=4), "partitioner"),
        slow(dict(data=2, sequence=4), "by_hand"),
        slow(dict(sequence=2, fsdp=2, fsdp2=2), "partitioner"),
    ],
    ids=str,
)
def test_rows_split_into_positions_are_rows_whole(tiny, sizes, fsdp):
    """Sequence parallelism, with fewer kv heads than devices: documents that cross the borders of
    the parts, chunks of each part, accumulation.
    """
    model = {
        "model.vocab_size": 264,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.head_dim": 8,
        "model.tie_embeddings": False,
    }
    # Chunks of 4 of the 8 or 16 positions that a device has of each row.
    execution = {"train.fsdp": fsdp, "objective.chunk": 4, "model.remat": "query,attention"}
    assert_trains_alike(tiny, sizes, steps=4, model=model, execution=execution, accumulation=2)


@pytest.mark.parametrize(
    "sizes, fsdp, accumulation",
    [
        (dict(sequence=2, fsdp=2, fsdp2=2), "by_hand", 2),
        slow(dict(data=2, tensor=2, sequence=2), "partitioner", 1),
        slow(dict(fsdp=4, fsdp2=2), "by_hand", 1),
        slow({}, "partitioner", 4),
    ],
    ids=str,
)
def test_dropout_is_the_same_on_every_mesh(tiny, sizes, fsdp, accumulation):
    """The same values are dropped, of the residual stream and of attention."""
    model = {
        "model.vocab_size": 264,
        "model.num_heads": 4,
        "model.num_kv_heads": 2,
        "model.head_dim": 8,
        "model.dropout": 0.3,
        "model.attention_dropout": 0.2,
    }
    execution = {"train.fsdp": fsdp, "model.remat": "full"}
    if sizes:
        with pytest.raises(ValueError, match="config.model.scan_unroll = 2"):
            experiment(tiny, sizes, model | execution)
    execution["model.scan_unroll"] = 2
    assert_trains_alike(
        tiny, sizes, steps=3, model=model, execution=execution, accumulation=accumulation
    )


@pytest.mark.parametrize(
    "sizes, fsdp",
    [
        (dict(expert=2, fsdp=2, fsdp2=2), "by_hand"),
        (dict(expert=2, tensor=2, fsdp=2), "partitioner"),
        slow(dict(expert=4), "by_hand"),
        # With replicas of the experts' weights, whose gradients the transpose of shard_map sums
        # (lm.collectives.scatter_grad).
        slow(dict(expert=2, fsdp=2, data=2), "partitioner"),
        slow(dict(expert=2, sequence=2, fsdp=2), "by_hand"),
        slow(dict(fsdp=4, tensor=2), "partitioner"),
    ],
    ids=str,
)
def test_experts_are_the_same_on_every_mesh(tiny, sizes, fsdp):
    """Gradient, losses and the routers' imbalance, whose means span devices."""
    model = {
        "model.vocab_size": 264,
        "model.num_kv_heads": 4,
        "model.num_experts": 4,
        "model.experts_per_token": 2,
        "model.gated_mlp": True,
        "model.shared_mlp_dim": 16,
        "objective.balance_loss": 0.1,
    }
    execution = {"train.fsdp": fsdp, "model.remat": "query,attention,up"}
    assert_trains_alike(tiny, sizes, steps=2, model=model, execution=execution)


def test_reduce_dtype_is_what_travels(tiny):
    """Manual and rounded to bf16 on the way, the gradient is still close, and no longer equal."""
    params = make_params(experiment(tiny, {}), 0)

    def gradient(dtype):
        overrides = {"train.fsdp": "by_hand", "train.grad_reduce_dtype": dtype}
        return train(tiny, dict(fsdp=8), params, steps=1, overrides=overrides)[0]

    # bf16 has 8 bits: an error of some 0.002 where a part travels, none where nothing does.
    exact, rounded = gradient("float32"), gradient("bfloat16")
    norm = float(optax.global_norm(exact))
    difference = float(optax.global_norm(jax.tree.map(np.subtract, exact, rounded)))
    assert 1e-4 * norm < difference < 1e-2 * norm


@pytest.mark.parametrize(
    "meshes, compiler_options",
    [
        (("data 2 x fsdp 2 x tensor 2",), None),
        slow(tuple(MESHES), None),
        # As optimized as in a run, XLA may fuse and round otherwise for shards of another shape.
        slow(("data 2 x fsdp 2 x tensor 2",), OPTIMIZED),
    ],
)
def test_one_seed_gives_the_same_bits_on_every_mesh(tiny, meshes, compiler_options):
    wanted = make_params(experiment(tiny, {}), 7, compiler_options)
    for name in meshes:
        params = make_params(experiment(tiny, MESHES[name]), 7, compiler_options)
        assert jax.tree.all(jax.tree.map(np.array_equal, params, wanted)), name

    # And another seed gives other bits.
    other_seed = make_params(experiment(tiny, {}), 8)
    assert not np.array_equal(other_seed["embed"]["table"], wanted["embed"]["table"])


# Layouts.


@pytest.mark.parametrize(
    "preset, optimizer",
    [
        ("gpt2", "adamw"),
        ("llama2_7b", "muon"),
        ("gpt3_175b", "lion"),
        ("gpt2", "adafactor"),
        ("llama2_7b", "adafactor"),
    ],
)
def test_nothing_big_is_replicated_under_fsdp(preset, optimizer):
    """Neither a parameter above 1 MiB nor the optimizer's array for it; Adafactor's factors (a dim
    less) may be somewhat larger.
    """
    c = config.default()
    c.model.update(presets.get(preset))
    c.optimizer.name = optimizer
    c.mesh.fsdp = 8
    c.data.update(dict(batch_size=8, length=1024))
    # Nothing of it is computed.
    state = build.program(c, jax.devices(), c.model.vocab_size, 1000).abstract_state

    # What is small may be replicated; what is big must be split into 8 equal parts.
    big = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        size = leaf.size * leaf.dtype.itemsize
        is_factor = "v_col" in name or "v_row" in name
        if leaf.sharding.is_fully_replicated:
            assert size <= (2**21 if is_factor else 2**20), f"{name}: {size / 2**20:.1f} MiB"
        if size > 2**21:
            big.append(leaf)

    assert big
    for leaf in big:
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size


def test_spec():
    mesh = sharding.make_mesh(dict(fsdp=2, fsdp2=2, tensor=2), jax.devices())
    fsdp = ("fsdp", "fsdp2")
    assert sharding.spec(("layers", "embed", "mlp"), mesh) == PartitionSpec(None, fsdp, "tensor")
    assert sharding.spec(("batch", None), mesh) == PartitionSpec(fsdp, None)
    without_fsdp = sharding.spec(("embed", "mlp"), mesh, without=sharding.FSDP_AXES)
    assert without_fsdp == PartitionSpec(None, "tensor")

    with pytest.raises(ValueError, match="'vocab' and 'mlp'.*both claim.*'tensor'"):
        sharding.spec(("vocab", "mlp"), mesh)
    with pytest.raises(ValueError, match="unknown logical axis 'embd'.*'embed'"):
        sharding.spec(("embd",), mesh)

    # An axis of size 1 splits nothing, so two dims may name it.
    mesh = sharding.make_mesh(dict(fsdp=8), jax.devices())
    assert sharding.spec(("vocab", "mlp"), mesh) == PartitionSpec(None, None)


def test_an_activation_that_its_axes_do_not_divide_stays_whole():
    """One position, as in decoding, under a sequence axis; rows are split all the same."""

    @jax.jit
    def constrain(x):
        return sharding.constrain(x + 1, "batch", "length", "act_embed")

    with jax.set_mesh(sharding.make_mesh(dict(fsdp=4, sequence=2), jax.devices())):
        for length, local_length in ((1, 1), (6, 3)):
            x = constrain(jnp.zeros((8, length, 4)))
            assert x.sharding.shard_shape(x.shape) == (2, local_length, 4)


def test_batch_sharding_splits_rows_and_positions():
    mesh = sharding.make_mesh(dict(slice=2, fsdp=2, sequence=2), jax.devices())
    assert sharding.batch_sharding(mesh).shard_shape((8, 6)) == (2, 3)
    assert sharding.batch_sharding(mesh, ("length", 5)).shard_shape((8, 6, 5)) == (2, 3, 5)
    assert sharding.batch_sharding(mesh, ()).shard_shape((8,)) == (2,)


def test_the_rest_of_the_devices():
    mesh = sharding.make_mesh(dict(data=2, fsdp=-1, tensor=2), jax.devices())
    assert (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"], mesh.size) == (2, 2, 2, 8)
    assert set(mesh.devices.flat) == set(jax.devices())

    # On one device the rest is 1.
    assert sharding.make_mesh(dict(fsdp=-1), jax.devices()[:1]).size == 1


# Errors.


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(fdsp=8), r"unknown axes \['fdsp'\].*'fsdp'"),
        (dict(data=-1, fsdp=-1), "at most one"),
        (dict(data=0), "positive"),
        (dict(data=-2), "positive"),
        (dict(data=4, fsdp=4), "16 device.*there are 8"),
        (dict(data=4), "4 device.*there are 8"),
        (dict(data=3, fsdp=-1), "3 device.*a multiple.*there are 8"),
        ({}, "asks for 1 device.*there are 8"),
    ],
)
def test_mesh_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes, jax.devices())


def test_shardings_name_the_parameter():
    mesh = sharding.make_mesh(dict(data=2, fsdp=4), jax.devices())
    params = {"mlp": {"up": jnp.zeros((30, 8))}}
    with pytest.raises(ValueError, match=r"\['mlp'\]\['up'\].*'embed' of 30 is not divisible by 4"):
        sharding.shardings(params, {"mlp": {"up": ("embed", "mlp")}}, mesh)
    with pytest.raises(ValueError, match=r"\['table'\].*both claim"):
        sharding.shardings({"table": jnp.zeros((8, 8))}, {"table": ("embed", "embed")}, mesh)


def test_model_that_the_mesh_does_not_divide(tiny):
    message = r"\['embed'\]\['table'\].*'vocab' of 258 is not divisible by 4.*vocab_size"
    with pytest.raises(ValueError, match=message):
        experiment(tiny, dict(data=2, tensor=4))


def test_heads_that_the_mesh_does_not_divide(tiny):
    message = "num_heads = 2 can't be divided by 4.*tensor and sequence.*divisor of 2"
    overrides = {"model.num_heads": 2, "model.num_kv_heads": 2}
    with pytest.raises(ValueError, match=message):
        experiment(tiny, dict(sequence=4, data=2), overrides)


def test_batches_that_the_mesh_does_not_divide(tiny):
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, sequence=2), jax.devices())
    sharding.check_batch(mesh, 8, 6, "config.x")
    with pytest.raises(ValueError, match="config.x = 6 rows.*by 4.*multiple of 4"):
        sharding.check_batch(mesh, 6, 6, "config.x")
    with pytest.raises(ValueError, match="length = 7.*by 2"):
        sharding.check_batch(mesh, 8, 7, "config.x")

    with pytest.raises(ValueError, match=r"batch_size / config.train.accumulation = 4 rows"):
        experiment(tiny, dict(data=8), {"train.accumulation": 2})
    with pytest.raises(ValueError, match="accumulation = 3 must divide"):
        experiment(tiny, {}, {"train.accumulation": 3})
