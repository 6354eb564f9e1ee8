"""Layouts: errors name what to change, big arrays are split, and the mesh changes neither weights,
nor gradient, nor losses.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lm import build, config, optim, sharding
from lm.models import presets

MESHES = {
    "one device": {},
    "data 8": dict(data=8),
    "fsdp 8": dict(fsdp=8),
    "data 2 x fsdp 4": dict(data=2, fsdp=4),
    "fsdp 4 x fsdp2 2": dict(fsdp=4, fsdp2=2),
    "data 2 x fsdp 2 x tensor 2": dict(data=2, fsdp=2, tensor=2),
    "slice 2 x sequence 2 x expert 2": dict(slice=2, sequence=2, expert=2),
}


# XLA's optimizations take nearly all of these tests' time and have no part in what they prove.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


def experiment(tiny, sizes, **changes):
    """The tiny experiment in f32 on a mesh of as many devices as it needs."""
    c = tiny.copy_and_resolve_references()
    c.model.param_dtype = "float32"
    c.mesh.update(sizes)
    for key, value in changes.items():
        section, key = key.split("_", 1)
        c[section][key] = value
    return build.build(c, jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))])


def uneven_batch(seed, rows=16, length=32, vocab=16):
    """Rows of two documents and padding with 0 to 28 weights, the weights of some inner targets 0,
    and every fourth row all padding.
    """
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        first, second = (0, 0) if row % 4 == 3 else (rng.integers(1, 20), rng.integers(0, 9))
        segments[row, :first], segments[row, first : first + second] = 1, 2
        positions[row, :first], positions[row, first : first + second] = (
            np.arange(first),
            np.arange(second),
        )
    weights = (segments > 0) * (rng.random((rows, length)) < 0.8)
    tokens, targets = rng.integers(0, vocab, (2, rows, length))
    return dict(
        tokens=tokens.astype(np.int32),
        targets=targets.astype(np.int32),
        weights=weights.astype(np.float32),
        positions=positions,
        segments=segments,
    )


def train(tiny, sizes, accumulation, params, steps=10, **changes):
    """The first gradient, and the losses of the first steps."""
    # Without clipping, Adam's first moment after one step is (1 - b1) times the gradient.
    e = experiment(
        tiny,
        sizes,
        data_batch_size=16,
        train_accumulation=accumulation,
        optimizer_clip_norm=0.0,
        train_length="100 steps",
        **changes,
    )
    losses = []
    with jax.set_mesh(e.mesh):
        state = e.init_state(
            jax.tree.map(
                lambda p, a: jax.device_put(p, a.sharding), params, e.abstract_state.params
            )
        )
        batches = [
            jax.device_put(uneven_batch(step), sharding.batch_sharding(e.mesh))
            for step in range(steps)
        ]
        train_step = e.train_step.lower(state, batches[0]).compile(QUICK)
        for step, batch in enumerate(batches):
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
            if step == 0:
                moment = jax.device_get(
                    optax.tree_utils.tree_get(state.opt_state["transform"], "mu")
                )
    return jax.tree.map(lambda m: m / (1 - e.config.optimizer.b1), moment), np.array(losses)


def test_gradient_and_losses_are_the_same_on_every_mesh_and_for_any_accumulation(tiny):
    params = make_params(experiment(tiny, {}), 0, QUICK)
    gradient, losses = train(tiny, {}, 1, params)
    norm = float(optax.global_norm(gradient))
    assert norm > 0.1 and losses[-1] < losses[0] - 0.1
    cases = [(sizes, 2 if "slice" in sizes else 1) for sizes in MESHES.values() if sizes] + [
        (dict(data=2, fsdp=2), 4)
    ]
    for sizes, accumulation in cases:
        other_gradient, other_losses = train(tiny, sizes, accumulation, params)
        difference = float(optax.global_norm(jax.tree.map(np.subtract, other_gradient, gradient)))
        assert difference < 1e-5 * norm, (sizes, accumulation, difference / norm)
        np.testing.assert_allclose(
            other_losses, losses, rtol=1e-5, err_msg=f"{sizes}, accumulation {accumulation}"
        )


@pytest.mark.parametrize(
    "sizes", [{}, dict(fsdp=8), dict(fsdp=2, fsdp2=4), dict(slice=2, data=2, fsdp=2)], ids=str
)
def test_fsdp_by_hand_is_the_partitioners(tiny, sizes):
    """The same gradient and losses; with chunked loss, tied and untied tables, biases and learned
    positions, and accumulation.
    """
    for tied, accumulation in ((True, 1), (False, 2)):
        model = dict(
            model_vocab_size=264,
            model_num_kv_heads=4,
            model_tie_embeddings=tied,
            model_bias="qkv,out,mlp,norm",
            model_positions="rope" if tied else "learned",
        )
        params = make_params(experiment(tiny, {}, **model), 0, QUICK)
        gradient, losses = train(tiny, {}, 1, params, steps=4, **model)
        by_hand = dict(
            train_fsdp="by_hand",
            train_fsdp_gather="joint" if tied else "staged",
            objective_chunk=8,
            model_remat="query,attention,up",
        )
        other_gradient, other_losses = train(
            tiny, sizes, accumulation, params, steps=4, **model, **by_hand
        )
        for (path, ours), wanted in zip(
            jax.tree_util.tree_leaves_with_path(other_gradient), jax.tree.leaves(gradient)
        ):
            assert np.linalg.norm(ours - wanted) < 2e-5 * max(np.linalg.norm(wanted), 0.01), (
                jax.tree_util.keystr(path)
            )
        np.testing.assert_allclose(other_losses, losses, rtol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [dict(sequence=4), dict(sequence=2, fsdp=2, fsdp2=2), dict(data=2, sequence=4)],
    ids=str,
)
@pytest.mark.parametrize("fsdp", ["partitioner", "by_hand"])
def test_rows_split_into_positions_are_rows_whole(tiny, sizes, fsdp):
    """Sequence parallelism, with fewer kv heads than devices: documents that cross the cuts, chunks
    of each part, accumulation.
    """
    model = dict(
        model_vocab_size=264,
        model_num_heads=4,
        model_num_kv_heads=2,
        model_head_dim=8,
        model_tie_embeddings=False,
    )
    params = make_params(experiment(tiny, {}, **model), 0, QUICK)
    gradient, losses = train(tiny, {}, 1, params, steps=4, **model)
    changes = dict(train_fsdp=fsdp, objective_chunk=4, model_remat="query,attention")
    other_gradient, other_losses = train(tiny, sizes, 2, params, steps=4, **model, **changes)
    for (path, ours), wanted in zip(
        jax.tree_util.tree_leaves_with_path(other_gradient), jax.tree.leaves(gradient)
    ):
        assert np.linalg.norm(ours - wanted) < 2e-5 * max(np.linalg.norm(wanted), 0.01), (
            jax.tree_util.keystr(path)
        )
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)


EXPERTS = dict(
    model_vocab_size=264,
    model_num_kv_heads=4,
    model_num_experts=4,
    model_experts_per_token=2,
    model_gated_mlp=True,
    model_shared_mlp_dim=16,
    objective_balance_loss=0.1,
)
ALONE = []  # parameters, gradient and losses on one device


@pytest.mark.parametrize(
    "sizes, fsdp",
    [
        (dict(expert=4), "by_hand"),
        (dict(expert=2, fsdp=2, data=2), "partitioner"),
        (dict(expert=2, fsdp=2, fsdp2=2), "by_hand"),
        (dict(expert=2, tensor=2, fsdp=2), "partitioner"),
        (dict(expert=2, sequence=2, fsdp=2), "by_hand"),
        (dict(fsdp=4, tensor=2), "partitioner"),
    ],
    ids=str,
)
def test_experts_are_the_same_on_every_mesh(tiny, sizes, fsdp):
    """Gradient, losses and the routers' imbalance, whose means span devices."""
    if not ALONE:
        params = make_params(experiment(tiny, {}, **EXPERTS), 0, QUICK)
        ALONE.extend((params, *train(tiny, {}, 1, params, steps=2, **EXPERTS)))
    params, gradient, losses = ALONE
    other_gradient, other_losses = train(
        tiny,
        sizes,
        1,
        params,
        steps=2,
        **EXPERTS,
        train_fsdp=fsdp,
        model_remat="query,attention,up",
    )
    for (path, ours), wanted in zip(
        jax.tree_util.tree_leaves_with_path(other_gradient), jax.tree.leaves(gradient)
    ):
        assert np.linalg.norm(ours - wanted) < 2e-5 * max(np.linalg.norm(wanted), 0.01), (
            jax.tree_util.keystr(path)
        )
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)


def test_heads_that_the_mesh_does_not_divide(tiny):
    with pytest.raises(
        ValueError, match="num_heads = 2 can't be divided by 4.*tensor and sequence.*divisor of 2"
    ):
        experiment(tiny, dict(sequence=4, data=2), model_num_heads=2, model_num_kv_heads=2)


def test_reduce_dtype_is_what_travels(tiny):
    """By hand and rounded to bf16 on the way, the gradient is still close, and no longer equal."""
    params = make_params(experiment(tiny, {}), 0, QUICK)
    gradients = [
        train(
            tiny,
            dict(fsdp=8),
            1,
            params,
            steps=1,
            train_fsdp="by_hand",
            train_grad_reduce_dtype=dtype,
        )[0]
        for dtype in ("float32", "bfloat16")
    ]
    norm = float(optax.global_norm(gradients[0]))
    difference = float(optax.global_norm(jax.tree.map(np.subtract, *gradients)))
    assert 1e-4 * norm < difference < 1e-2 * norm


def make_params(e, seed, options):
    with jax.set_mesh(e.mesh):
        params = e.make_params.lower(jax.random.key(seed)).compile(options)(jax.random.key(seed))
    wanted = jax.tree.map(lambda a: a.sharding, e.abstract_state.params)
    assert jax.tree.all(
        jax.tree.map(lambda p, s: p.sharding.is_equivalent_to(s, p.ndim), params, wanted)
    )
    return jax.device_get(params)


@pytest.mark.parametrize(
    "names, options", [(tuple(MESHES), QUICK), (("one device", "data 2 x fsdp 2 x tensor 2"), {})]
)
def test_one_seed_gives_the_same_bits_on_every_mesh(tiny, names, options):
    """As optimized as in a run too, where XLA may fuse and round otherwise for shards of another
    shape: on the two most different meshes.
    """
    weights = {name: make_params(experiment(tiny, MESHES[name]), 7, options) for name in names}
    for name in names:
        assert jax.tree.all(jax.tree.map(np.array_equal, weights[name], weights["one device"])), (
            name
        )
    other = make_params(experiment(tiny, {}), 8, QUICK)
    assert not np.array_equal(other["embed"]["table"], weights["one device"]["embed"]["table"])


def abstract_state(preset, optimizer, mesh):
    """The train state of a preset under an optimizer, nothing of it computed."""
    c = config.default()
    c.model.update(presets.get(preset))
    c.optimizer.name = optimizer
    _, make_model = build.model(c, c.model.vocab_size, "tpu")
    _, abstract = nnx.split(nnx.eval_shape(lambda: make_model(jax.random.key(0))), nnx.Param)
    axes = sharding.logical_axes(abstract)
    return build._abstract_state(
        nnx.to_pure_dict(abstract), axes, optim.make_optimizer(c.optimizer, axes, 1000), mesh
    )


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
    state = abstract_state(preset, optimizer, sharding.make_mesh(dict(fsdp=8), jax.devices()))
    size = lambda leaf: leaf.size * leaf.dtype.itemsize
    limit = lambda path: (
        2**21 if any(name in jax.tree_util.keystr(path) for name in ("v_col", "v_row")) else 2**20
    )
    whole = {
        jax.tree_util.keystr(path): f"{size(leaf) / 2**20:.1f} MiB"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if size(leaf) > limit(path) and leaf.sharding.is_fully_replicated
    }
    assert not whole
    big = [leaf for leaf in jax.tree.leaves(state) if size(leaf) > 2**21]
    assert big and all(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size for leaf in big
    )


def test_the_rest_of_the_devices():
    mesh = sharding.make_mesh(dict(data=2, fsdp=-1, tensor=2), jax.devices())
    assert (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"], mesh.size) == (2, 2, 2, 8)
    assert set(mesh.devices.flat) == set(jax.devices())
    assert sharding.make_mesh(dict(fsdp=-1), jax.devices()[:1]).size == 1


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
        ({}, "one device.*there are 8"),
    ],
)
def test_mesh_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes, jax.devices())


def test_spec():
    mesh = sharding.make_mesh(dict(fsdp=2, fsdp2=2, tensor=2), jax.devices())
    assert sharding.spec(("layers", "embed", "mlp"), mesh) == PartitionSpec(
        None, ("fsdp", "fsdp2"), "tensor"
    )
    assert sharding.spec(("embed", "mlp"), mesh, without=sharding.FSDP_AXES) == PartitionSpec(
        None, "tensor"
    )
    assert sharding.spec(("batch", None), mesh) == PartitionSpec(("fsdp", "fsdp2"), None)
    with pytest.raises(ValueError, match="'vocab' and 'mlp'.*both claim.*'tensor'"):
        sharding.spec(("vocab", "mlp"), mesh)
    with pytest.raises(ValueError, match="unknown logical axis 'embd'.*'embed'"):
        sharding.spec(("embd",), mesh)
    # An axis of size 1 splits nothing, so two dims may name it.
    assert sharding.spec(
        ("vocab", "mlp"), sharding.make_mesh(dict(fsdp=8), jax.devices())
    ) == PartitionSpec(None, None)


def test_an_activation_that_its_axes_do_not_divide_stays_whole():
    """One position, as in decoding, under a sequence axis; rows are split all the same."""
    with jax.set_mesh(sharding.make_mesh(dict(fsdp=4, sequence=2), jax.devices())):
        for length, part in ((1, 1), (6, 3)):
            x = jax.jit(lambda x: sharding.constrain(x + 1, "batch", "length", "act_embed"))(
                jnp.zeros((8, length, 4))
            )
            assert x.sharding.shard_shape(x.shape) == (2, part, 4)


def test_shardings_name_the_parameter():
    mesh = sharding.make_mesh(dict(data=2, fsdp=4), jax.devices())
    with pytest.raises(ValueError, match=r"\['mlp'\]\['up'\].*'embed' of 30 is not divisible by 4"):
        sharding.shardings(
            {"mlp": {"up": jnp.zeros((30, 8))}}, {"mlp": {"up": ("embed", "mlp")}}, mesh
        )
    with pytest.raises(ValueError, match=r"\['table'\].*both claim"):
        sharding.shardings({"table": jnp.zeros((8, 8))}, {"table": ("embed", "embed")}, mesh)


def test_model_that_the_mesh_does_not_divide(tiny):
    with pytest.raises(
        ValueError,
        match=r"\['embed'\]\['table'\].*'vocab' of 258 is not divisible by 4.*vocab_size",
    ):
        experiment(tiny, dict(data=2, tensor=4))


def test_batches_that_the_mesh_does_not_divide(tiny):
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, sequence=2), jax.devices())
    sharding.check_batch(mesh, 8, 6, "config.x")
    with pytest.raises(ValueError, match="config.x = 6 rows.*by 4.*multiple of 4"):
        sharding.check_batch(mesh, 6, 6, "config.x")
    with pytest.raises(ValueError, match="length = 7.*by 2"):
        sharding.check_batch(mesh, 8, 7, "config.x")
    with pytest.raises(ValueError, match=r"batch_size / config.train.accumulation = 4 rows"):
        experiment(tiny, dict(data=8), train_accumulation=2)
    with pytest.raises(ValueError, match="accumulation = 3 must divide"):
        experiment(tiny, {}, train_accumulation=3)


def test_batch_sharding_splits_rows_and_positions():
    mesh = sharding.make_mesh(dict(slice=2, fsdp=2, sequence=2), jax.devices())
    assert sharding.batch_sharding(mesh).shard_shape((8, 6)) == (2, 3)
    assert sharding.batch_sharding(mesh, 3).shard_shape((8, 6, 5)) == (2, 3, 5)
    assert sharding.batch_sharding(mesh, 1).shard_shape((8,)) == (2,)
