"""Optimizers on stacks and with bfloat16 parameters, schedules, decay and clipping: against their
formulas and against each other.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lm import config as config_lib
from lm import optim, sharding
from lm.models.transformer import Config, Transformer

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
jit = functools.partial(jax.jit, compiler_options=QUICK)
BF16 = ml_dtypes.bfloat16


def make(axes, total_steps=100, **changes):
    """An optimizer at a constant learning rate, without clipping and decay unless `changes` say
    otherwise.
    """
    c = config_lib.default().optimizer
    c.update(dict(schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.0) | changes)
    return optim.make_optimizer(c, axes, total_steps)


def steps(optimizer, params, grads):
    """Parameters, state and metrics after one update for each tree in `grads`."""
    update = jit(optimizer.update)
    state = jit(optimizer.init)(params)
    for step, grad in enumerate(grads):
        params, state, metrics = update(grad, state, params, jnp.int32(step), jax.random.key(step))
    return jax.device_get((params, state, metrics))


def draw(shapes, seed, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.normal(size=shape)).astype(dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def model_axes(**changes):
    """(shapes, logical axes) of a Transformer's parameters."""
    fields = (
        config_lib.default().model.to_dict()
        | dict(
            vocab_size=40,
            context_length=16,
            num_layers=2,
            embed_dim=32,
            mlp_dim=48,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            compute_dtype="float32",
        )
        | changes
    )
    del fields["type"]
    state = nnx.split(
        nnx.eval_shape(lambda: Transformer(Config(**fields), jax.random.key(0))), nnx.Param
    )[1]
    return jax.tree.map(lambda p: p.shape, nnx.to_pure_dict(state)), sharding.logical_axes(state)


# Rounding.


def test_stochastic_rounding_is_unbiased():
    """Each value goes to one of its two neighbours, and its mean over seeds is itself, whatever its
    sign and size.
    """
    x = np.concatenate(
        [
            np.random.default_rng(0).normal(size=200) * 10.0 ** np.repeat([-30, -3, 0, 4, 30], 40),
            [1 / 3, -1e-3],
        ]
    ).astype(np.float32)
    seeds = 4096
    rounded = jit(jax.vmap(lambda key: optim.stochastic_round(key, x)))(
        jax.random.split(jax.random.key(0), seeds)
    )
    assert rounded.dtype == jnp.bfloat16
    rounded = np.asarray(rounded).astype(np.float64)
    # Chopping an f32's lower half gives the neighbour nearer to zero.
    toward = (x.view(np.uint32) >> 16).astype(np.uint16)
    low, high = (bits.view(BF16).astype(np.float64) for bits in (toward, toward + np.uint16(1)))
    assert ((rounded == low) | (rounded == high)).all()
    gap = np.abs(high - low)
    assert (np.abs(rounded.mean(axis=0) - x) < 4.5 * gap * 0.5 / seeds**0.5).all()
    assert np.abs(((rounded.mean(axis=0) - x) / gap).mean()) < 0.003  # all together much closer


def test_stochastic_rounding_keeps_what_is_exact():
    """All 65536 bfloat16 numbers, infinities, NaN and negative zero among them."""
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    x = bits.view(BF16)
    for seed in range(3):
        rounded = np.asarray(
            optim.stochastic_round(
                jax.random.key(seed), jnp.asarray((bits.astype(np.uint32) << 16).view(np.float32))
            )
        )
        nan = np.isnan(x)
        np.testing.assert_array_equal(rounded[~nan].view(np.uint16), bits[~nan])
        assert np.isnan(rounded[nan]).all()
        # NaN, as the lower half alone may say
        low = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
        assert np.isnan(
            np.asarray(optim.stochastic_round(jax.random.key(seed), jnp.asarray(low)))
        ).all()


def test_parameters_round_by_themselves():
    """Another parameter more or less changes no bit; two parameters of one shape don't share their
    noise.
    """
    optimizer = make({"a": ("embed",)}, name="lion", learning_rate=1e-3)
    both = make({"a": ("embed",), "b": ("embed",)}, name="lion", learning_rate=1e-3)
    value, grad = np.ones(512, BF16), np.ones(512, np.float32)
    alone = steps(optimizer, {"a": value}, [{"a": grad}])[0]
    pair = steps(both, {"a": value, "b": value}, [{"a": grad, "b": grad}])[0]
    np.testing.assert_array_equal(alone["a"], pair["a"])
    assert 0.1 < np.mean(pair["a"] != pair["b"]) < 0.9


@pytest.mark.parametrize(
    "rounding, moved", [("stochastic", True), ("master", True), ("nearest", False)]
)
def test_a_thousand_tiny_updates(rounding, moved):
    """Of 1e-4 each on weights of 1, whose neighbours in bfloat16 are 0.0039 away: together they are
    0.1.
    """
    optimizer = make(
        {"w": ("embed",)}, name="lion", learning_rate=1e-4, rounding=rounding, total_steps=1000
    )
    params, grads = {"w": jnp.ones(256, jnp.bfloat16)}, {"w": jnp.ones(256)}

    def body(step, carry):
        params, state, _ = carry
        params, state, metrics = optimizer.update(
            grads, state, params, step, jax.random.fold_in(jax.random.key(0), step)
        )
        return params, state, metrics["updates_lost"]

    params, _, lost = jax.device_get(
        jit(lambda: jax.lax.fori_loop(0, 1000, body, (params, optimizer.init(params), 0.0)))()
    )
    w = params["w"].astype(np.float64)
    assert lost == (not moved)
    if moved:
        assert w.mean() == pytest.approx(0.9, abs=0.003)
        assert (w.std() > 0.005) == (rounding == "stochastic")
    else:
        assert (w == 1).all()


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_moments_are_f32_and_updates_are_not_lost(name):
    shapes, axes = model_axes()
    params, grads = draw(shapes, 0, BF16, 0.02), [draw(shapes, seed) for seed in (1, 2)]
    for rounding in ("stochastic", "master"):
        new, state, metrics = steps(
            make(axes, name=name, learning_rate=1e-5, rounding=rounding), params, grads
        )
        assert metrics["updates_lost"] < 0.01
        assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype(BF16)}
        assert {
            x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)
        } == {np.dtype(np.float32)}
    lost = steps(make(axes, name=name, learning_rate=1e-9, rounding="nearest"), params, grads)[2][
        "updates_lost"
    ]
    assert lost > 0.95


def test_second_moment_decays():
    """At b2 = 0.999 a bfloat16 accumulator would stay where it is for ever."""
    optimizer = make({"w": ("embed",)}, name="adamw", b2=0.999)
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    grads = {"w": jnp.ones(8)}

    def body(step, carry):
        zero = jax.tree.map(jnp.zeros_like, grads)
        return optimizer.update(zero, carry[1], carry[0], step, jax.random.key(0))[:2]

    first = lambda: optimizer.update(
        grads, optimizer.init(params), params, jnp.int32(0), jax.random.key(0)
    )[:2]
    _, state = jit(lambda: jax.lax.fori_loop(1, 1001, body, first()))()
    nu = optax.tree_utils.tree_get(state["transform"], "nu")["w"]
    assert nu.dtype == jnp.float32
    np.testing.assert_allclose(nu, 0.001 * 0.999**1000, rtol=1e-3)


def test_an_update_rounds_to_the_same_bits_on_every_mesh():
    axes = {"w": ("layers", "embed", "mlp"), "table": ("vocab", "embed"), "scale": ("embed",)}
    shapes = {"w": (2, 64, 48), "table": (24, 64), "scale": (64,)}
    optimizer = make(axes, name="lion", learning_rate=1e-3, weight_decay=0.1)
    params, grads = draw(shapes, 0, BF16), draw(shapes, 1)
    results = {}
    for sizes in ({}, dict(fsdp=8), dict(data=2, fsdp=4), dict(fsdp=4, tensor=2)):
        mesh = sharding.make_mesh(
            sizes, jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))]
        )
        layout = sharding.shardings(params, axes, mesh)
        p, g = jax.device_put(params, layout), jax.device_put(grads, layout)
        whole = NamedSharding(mesh, PartitionSpec())
        update = jax.jit(
            lambda g, s, p, step, key: optimizer.update(g, s, p, step, key)[0],
            out_shardings=layout,
            compiler_options=QUICK,
        )
        with jax.set_mesh(mesh):
            new = update(
                g, optimizer.init(p), p, *jax.device_put((jnp.int32(3), jax.random.key(5)), whole)
            )
        assert new["w"].sharding.is_equivalent_to(layout["w"], 3)
        results[str(sizes)] = jax.device_get(new)
    for name, result in results.items():
        for key in shapes:
            np.testing.assert_array_equal(
                result[key].view(np.uint16), results["{}"][key].view(np.uint16), err_msg=name
            )
            assert (result[key] != params[key]).any()


def test_master_is_the_f32_twin():
    """The stored parameters are its rounding, and it goes where f32 parameters would."""
    shapes, axes = model_axes()
    params, grads = draw(shapes, 0, BF16, 0.02), [draw(shapes, seed) for seed in range(5)]
    settings = dict(name="adamw", learning_rate=1e-4, weight_decay=0.1)
    new, state, _ = steps(make(axes, rounding="master", **settings), params, grads)
    twin, _, _ = steps(
        make(axes, **settings), jax.tree.map(lambda p: p.astype(np.float32), params), grads
    )
    jax.tree.map(
        np.testing.assert_array_equal, new, jax.tree.map(lambda m: m.astype(BF16), state["master"])
    )
    jax.tree.map(
        lambda m, t: np.testing.assert_allclose(m, t, rtol=1e-6, atol=1e-9), state["master"], twin
    )


def test_moving_average():
    optimizer = make({"w": ("embed",)}, name="adamw", ema_decay=0.9)
    params = draw({"w": (32,)}, 0)
    average, grads = (
        params["w"].astype(np.float64),
        [draw({"w": (32,)}, seed) for seed in range(1, 5)],
    )
    for n in range(1, 5):
        average = 0.9 * average + 0.1 * steps(optimizer, params, grads[:n])[0]["w"]
    new, state, _ = steps(optimizer, params, grads)
    np.testing.assert_allclose(
        optimizer.eval_params(new, state)["w"], average, rtol=1e-5, atol=1e-6
    )
    low = optimizer.eval_params({"w": new["w"].astype(BF16)}, state)["w"]
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, state["ema"]["w"].astype(BF16))
    plain = make({"w": ("embed",)}, name="adamw")
    assert plain.eval_params(new, jax.eval_shape(plain.init, new)) is new


# Optimizers.

STACK = {
    "layers": {
        "query": (3, 128, 2, 128),
        "out": (3, 2, 128, 128),
        "up": (3, 128, 256),
        "scale": (3, 128),
        "query_bias": (3, 2, 128),
    },
    "table": (160, 128),
}
STACK_AXES = {
    "layers": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "out": ("layers", "heads", "head_dim", "embed"),
        "up": ("layers", "embed", "mlp"),
        "scale": ("layers", "embed"),
        "query_bias": ("layers", "heads", "head_dim"),
    },
    "table": ("vocab", "embed"),
}


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_a_stack_steps_as_each_layer_alone(name):
    """Layers of very different sizes, over several steps, so that nothing that spans layers can
    hide. Wide enough for Adafactor to factor.
    """
    layer = lambda tree, i: tree | {"layers": jax.tree.map(lambda x: x[i], tree["layers"])}
    scale = lambda tree: (
        tree
        | {
            "layers": jax.tree.map(
                lambda x: (
                    x
                    * np.float32(10.0)
                    ** np.arange(3, dtype=np.float32).reshape(3, *[1] * (x.ndim - 1))
                ),
                tree["layers"],
            )
        }
    )
    settings = dict(name=name, learning_rate=0.01, weight_decay=0.1)
    params, grads = scale(draw(STACK, 0)), [scale(draw(STACK, seed)) for seed in (1, 2, 3)]
    whole, state, _ = steps(make(STACK_AXES, **settings), params, grads)
    one_axes = STACK_AXES | {"layers": {k: names[1:] for k, names in STACK_AXES["layers"].items()}}
    alone = make(one_axes, **settings)
    for i in range(3):
        one = steps(alone, layer(params, i), [layer(g, i) for g in grads])[0]
        before, after = layer(params, i), layer(whole, i)
        for path, got in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(np.subtract, after, before)
        ):
            wanted = functools.reduce(
                lambda tree, key: tree[key.key], path, jax.tree.map(np.subtract, one, before)
            )
            assert np.abs(wanted).max() > 1e-4
            np.testing.assert_allclose(
                got,
                wanted,
                rtol=2e-3,
                atol=1e-4 * np.abs(wanted).max(),
                err_msg=f"layer {i} {jax.tree_util.keystr(path)}",
            )
    if name == "adafactor":
        factored = {x.shape for x in jax.tree.leaves(state["transform"])}
        assert {(3, 128), (3, 256)} <= factored and (3, 128, 256) not in factored


def test_adamw_by_hand():
    """Loshchilov and Hutter 2019: bias-corrected moments, and decay apart from them, both times the
    learning rate.
    """
    shapes = {"w": (6, 5), "scale": (6,)}
    optimizer = make(
        {"w": ("embed", "mlp"), "scale": ("embed",)},
        name="adamw",
        learning_rate=0.1,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        schedule="linear",
        total_steps=10,
        final_learning_rate=0.0,
    )
    params, grads = draw(shapes, 0), [draw(shapes, seed) for seed in (1, 2, 3)]
    new, _, metrics = steps(optimizer, params, grads)
    for name, p in params.items():
        p, m, v = p.astype(np.float64), 0, 0
        for t, g in enumerate(grads):
            m, v = 0.8 * m + 0.2 * g[name], 0.9 * v + 0.1 * g[name] ** 2
            u = m / (1 - 0.8 ** (t + 1)) / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-3) + (
                0.5 * p if name == "w" else 0
            )
            p = p - 0.1 * (1 - t / 10) * u
        np.testing.assert_allclose(new[name], p, rtol=1e-4, atol=1e-5)
    assert metrics["learning_rate"] == pytest.approx(0.08)
    assert metrics["update_norm"] > 0


def newton_schulz(x):
    """Jordan et al. 2024: five steps of the quintic iteration."""
    x = x.astype(np.float64) / np.linalg.norm(x)
    if transposed := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if transposed else x


def test_muon_orthogonalises_matrices_with_their_heads_merged():
    """Each layer's matrix as it multiplies: all heads are one matrix, [D, N H] going in and [N H,
    D] going out.
    """
    params, grads = draw(STACK, 0), draw(STACK, 1)
    new, _, _ = steps(make(STACK_AXES, name="muon", learning_rate=0.01), params, [grads])
    for name, flat in {"query": (128, 256), "out": (256, 128), "up": (128, 256)}.items():
        for layer in range(3):
            update = (new["layers"][name][layer] - params["layers"][name][layer]).reshape(flat)
            wanted = (
                -0.01 * 0.2 * 256**0.5 * newton_schulz(grads["layers"][name][layer].reshape(flat))
            )
            np.testing.assert_allclose(update, wanted, atol=1e-2 * np.abs(wanted).max())
            # as large as Adam's usually are
            assert 0.1 < np.sqrt((update**2).mean()) / 0.01 < 0.3


def test_muon_takes_each_expert_by_itself():
    axes = {
        "layers": {
            "up": ("layers", "expert", "embed", "mlp"),
            "router": ("layers", "embed", "router"),
        }
    }
    params, grads = (
        {"layers": draw({"up": (2, 3, 16, 24), "router": (2, 16, 3)}, seed)} for seed in (0, 1)
    )
    new, _, _ = steps(
        make(axes, name="muon", learning_rate=0.01, muon_adam_ratio=0.0), params, [grads]
    )
    for layer in range(2):
        for expert in range(3):
            update = new["layers"]["up"][layer, expert] - params["layers"]["up"][layer, expert]
            wanted = -0.01 * 0.2 * 24**0.5 * newton_schulz(grads["layers"]["up"][layer, expert])
            np.testing.assert_allclose(update, wanted, atol=1e-2 * np.abs(wanted).max())
    np.testing.assert_array_equal(new["layers"]["router"], params["layers"]["router"])  # Adam's


def test_muon_takes_the_hidden_matrices_and_adam_the_rest():
    shapes, axes = model_axes(
        bias="qkv,out,mlp,norm",
        gated_mlp=True,
        positions="learned",
        norm="layernorm",
        tie_embeddings=False,
    )
    optimizer = make(axes, name="muon", b1=0.9)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    held = [
        (jax.tree_util.keystr(path), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            jax.eval_shape(optimizer.init, params)
        )
    ]
    matrices = ("query", "key", "value", "out", "up", "gate", "down")
    seen = set()
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        moments = {
            label: sum(
                f"'{label}'" in key and key.endswith(name) and shape == p.shape
                for key, shape in held
            )
            for label in ("muon", "adam")
        }
        is_matrix = path[-1].key in matrices
        seen |= {path[-1].key} if is_matrix else set()
        assert moments == (dict(muon=1, adam=0) if is_matrix else dict(muon=0, adam=2)), name
    assert seen == set(matrices)


def test_muon_scales_what_adam_updates():
    shapes, axes = model_axes()
    params, grads = draw(shapes, 0), [draw(shapes, 1)]
    change = lambda **settings: jax.tree.map(
        np.subtract,
        steps(make(axes, name="muon", learning_rate=0.01, **settings), params, grads)[0],
        params,
    )
    whole, half = change(), change(muon_adam_ratio=0.5)
    np.testing.assert_allclose(half["embed"]["table"], 0.5 * whole["embed"]["table"], atol=1e-6)
    np.testing.assert_allclose(half["layers"]["mlp"]["up"], whole["layers"]["mlp"]["up"], atol=1e-7)


def test_decay_shrinks_matrices_and_tables_only():
    """Without a gradient Lion does nothing, so that only decay is left."""
    shapes, axes = model_axes(
        bias="qkv,out,mlp,norm", positions="learned", norm="layernorm", tie_embeddings=False
    )
    params = draw(shapes, 0)
    new, _, _ = steps(
        make(axes, name="lion", learning_rate=0.1, weight_decay=0.5),
        params,
        [jax.tree.map(np.zeros_like, params)],
    )
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new)
    ):
        decayed = not any(word in jax.tree_util.keystr(path) for word in ("bias", "scale"))
        np.testing.assert_allclose(
            after,
            before * (0.95 if decayed else 1.0),
            rtol=1e-6,
            err_msg=jax.tree_util.keystr(path),
        )


def test_clipping_is_of_the_norm_of_all_gradients_together():
    axes, shapes = {"a": ("embed",), "b": ("embed", "mlp")}, {"a": (4,), "b": (4, 3)}
    params, grads = draw(shapes, 0), draw(shapes, 1)
    norm = float(np.sqrt(sum((g**2).sum() for g in grads.values())))
    for clip, factor in ((norm / 4, 0.25), (norm * 4, 1.0), (0.0, 1.0)):
        _, state, _ = steps(make(axes, name="adamw", b1=0.9, clip_norm=clip), params, [grads])
        moment = optax.tree_utils.tree_get(state["transform"], "mu")
        jax.tree.map(
            lambda m, g: np.testing.assert_allclose(m, 0.1 * factor * g, rtol=1e-5),  # noqa: B023
            moment,
            grads,
        )


# Schedules.


def rates(name, **changes):
    schedule = optim.make_schedule(
        name,
        **dict(peak=2.0, total_steps=100, warmup_steps=10, decay_steps=20, final=0.1) | changes,
    )
    with jax.numpy_dtype_promotion("standard"):  # optax's own schedules mix int32 and float
        return np.asarray(schedule(jnp.arange(101)))


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_warm_up(name):
    """The first update counts, the last of the warm-up is at the peak; without warm-up the peak
    comes first.
    """
    np.testing.assert_allclose(
        rates(name)[:11], 2.0 * np.minimum(np.arange(1, 12) / 10, 1), rtol=1e-6
    )
    assert rates(name, warmup_steps=0)[0] == 2.0


def test_schedules_after_the_warm_up():
    t = np.arange(10, 101)
    np.testing.assert_allclose(rates("constant")[10:], 2.0)
    np.testing.assert_allclose(rates("linear")[10:], 2.0 + (0.2 - 2.0) * (t - 10) / 90, rtol=1e-5)
    np.testing.assert_allclose(
        rates("cosine")[10:], 0.2 + 1.8 * (1 + np.cos(np.pi * (t - 10) / 90)) / 2, rtol=1e-5
    )
    np.testing.assert_allclose(
        rates("wsd")[10:], np.where(t <= 80, 2.0, 2.0 + (0.2 - 2.0) * (t - 80) / 20), rtol=1e-5
    )
    np.testing.assert_allclose(
        [rates(name)[100] for name in ("linear", "cosine", "wsd")], 0.2, rtol=1e-5
    )
    np.testing.assert_allclose(rates("wsd", decay_steps=90)[10:], rates("linear")[10:], rtol=1e-5)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "cos",
            {},
            r"config.optimizer.schedule = 'cos'; valid: \['constant', 'cosine', 'linear', 'wsd'\]",
        ),
        ("cosine", dict(warmup_steps=100), "warmup_steps = 100 must be below the run's 100 steps"),
        ("wsd", dict(decay_steps=0), "decay_steps = 0: wsd needs between 1 and 90"),
        ("wsd", dict(decay_steps=91), "decay_steps = 91: wsd needs between 1 and 90"),
    ],
)
def test_schedule_errors(name, changes, message):
    with pytest.raises(ValueError, match=message):
        rates(name, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(name="adam"),
            r"config.optimizer.name = 'adam'; valid: \['adafactor', 'adamw', 'lion', 'muon'\]",
        ),
        (
            dict(rounding="up"),
            r"config.optimizer.rounding = 'up'; valid: \['stochastic', 'nearest', 'master'\]",
        ),
    ],
)
def test_optimizer_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make({"w": ("embed",)}, **changes)
