"""Optimizers on stacks and with bfloat16 parameters, schedules, decay and clipping: against their
formulas and against each other.
"""

import operator

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
from tests.helpers import abstract_model, assert_trees_close, model_config

BF16 = ml_dtypes.bfloat16


def make(axes, total_steps=100, **changes):
    """An optimizer at a constant learning rate, without clipping and decay unless `changes` say
    otherwise.
    """
    c = config_lib.default().optimizer
    c.update(dict(schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.0) | changes)
    return optim.make_optimizer(c, axes, total_steps)


def run_updates(optimizer, params, grads):
    """Parameters, state and metrics after one update for each tree in `grads`."""
    update = jax.jit(optimizer.update)
    state = jax.jit(optimizer.init)(params)
    for step, grad in enumerate(grads):
        params, state, metrics = update(grad, state, params, jnp.int32(step), jax.random.key(step))
    return jax.device_get((params, state, metrics))


def map_shapes(function, shapes):
    """`jax.tree.map` over a tree whose leaves are shapes."""
    return jax.tree.map(function, shapes, is_leaf=lambda x: isinstance(x, tuple))


def draw(shapes, seed, dtype=np.float32, scale=1.0):
    """Normal numbers in a tree of shapes."""
    rng = np.random.default_rng(seed)
    return map_shapes(lambda shape: (scale * rng.normal(size=shape)).astype(dtype), shapes)


def model_axes(**changes):
    """(shapes, logical axes) of a Transformer's parameters."""
    config = model_config(**dict(param_dtype="bfloat16", tie_embeddings=True) | changes)
    _, abstract = abstract_model(config)
    shapes = jax.tree.map(lambda p: p.shape, nnx.to_pure_dict(abstract))
    return shapes, sharding.logical_axes(abstract)


# Rounding.


def test_stochastic_rounding_is_unbiased():
    """Each value goes to one of its two neighbours, and its mean over seeds is itself, whatever its
    sign and size.
    """
    sizes = 10.0 ** np.repeat([-30, -3, 0, 4, 30], 40)
    x = np.concatenate([np.random.default_rng(0).normal(size=200) * sizes, [1 / 3, -1e-3]])
    x = x.astype(np.float32)
    num_seeds = 4096

    @jax.jit
    @jax.vmap
    def round_with(key):
        return optim.stochastic_round(key, x)

    rounded = round_with(jax.random.split(jax.random.key(0), num_seeds))
    assert rounded.dtype == jnp.bfloat16
    rounded = np.asarray(rounded).astype(np.float64)

    # Chopping an f32's lower half gives the neighbour nearer to zero; adding 1 to its bits, the
    # other one.
    chopped = (x.view(np.uint32) >> 16).astype(np.uint16)
    low = chopped.view(BF16).astype(np.float64)
    high = (chopped + np.uint16(1)).view(BF16).astype(np.float64)
    assert ((rounded == low) | (rounded == high)).all()

    # 4.5 standard errors for each value; all together are much closer.
    gap = np.abs(high - low)
    bias = rounded.mean(axis=0) - x
    assert (np.abs(bias) < 4.5 * gap * 0.5 / num_seeds**0.5).all()
    assert np.abs((bias / gap).mean()) < 0.003


def test_stochastic_rounding_keeps_what_is_exact():
    """All 65536 bfloat16 numbers, infinities, NaN and negative zero among them."""
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    is_nan = np.isnan(bits.view(BF16))
    exact = (bits.astype(np.uint32) << 16).view(np.float32)
    # NaN, as the lower half alone may say.
    low_nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)

    for seed in range(3):
        key = jax.random.key(seed)
        rounded = np.asarray(optim.stochastic_round(key, jnp.asarray(exact)))
        np.testing.assert_array_equal(rounded[~is_nan].view(np.uint16), bits[~is_nan])
        assert np.isnan(rounded[is_nan]).all()

        rounded = optim.stochastic_round(key, jnp.asarray(low_nans.view(np.float32)))
        assert np.isnan(np.asarray(rounded)).all()


def test_parameters_round_by_themselves():
    """Another parameter more or less changes no bit; two parameters of one shape don't share their
    noise.
    """
    settings = dict(name="lion", learning_rate=1e-3)
    single = make({"a": ("embed",)}, **settings)
    both = make({"a": ("embed",), "b": ("embed",)}, **settings)
    value, grad = np.ones(512, BF16), np.ones(512, np.float32)

    alone = run_updates(single, {"a": value}, [{"a": grad}])[0]
    pair = run_updates(both, {"a": value, "b": value}, [{"a": grad, "b": grad}])[0]
    np.testing.assert_array_equal(alone["a"], pair["a"])
    assert 0.1 < np.mean(pair["a"] != pair["b"]) < 0.9


@pytest.mark.parametrize(
    "rounding, moved", [("stochastic", True), ("master", True), ("nearest", False)]
)
def test_a_thousand_tiny_updates(rounding, moved):
    """Of 1e-4 each on weights of 1, whose neighbours in bfloat16 are 0.0039 away: together they are
    0.1.
    """
    settings = dict(name="lion", learning_rate=1e-4, rounding=rounding)
    optimizer = make({"w": ("embed",)}, total_steps=1000, **settings)
    params, grads = {"w": jnp.ones(256, jnp.bfloat16)}, {"w": jnp.ones(256)}

    def body(step, carry):
        params, state, _ = carry
        key = jax.random.fold_in(jax.random.key(0), step)
        params, state, metrics = optimizer.update(grads, state, params, step, key)
        return params, state, metrics["updates_lost"]

    @jax.jit
    def run():
        return jax.lax.fori_loop(0, 1000, body, (params, optimizer.init(params), 0.0))

    new, _, lost = jax.device_get(run())
    w = new["w"].astype(np.float64)
    assert lost == (not moved)
    if moved:
        assert w.mean() == pytest.approx(0.9, abs=0.003)
        assert (w.std() > 0.005) == (rounding == "stochastic")
    else:
        assert (w == 1).all()


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_moments_are_f32_and_updates_are_not_lost(name):
    shapes, axes = model_axes()
    params = draw(shapes, 0, BF16, 0.02)
    grads = [draw(shapes, 1), draw(shapes, 2)]

    for rounding in ("stochastic", "master"):
        optimizer = make(axes, name=name, learning_rate=1e-5, rounding=rounding)
        new, state, metrics = run_updates(optimizer, params, grads)
        assert metrics["updates_lost"] < 0.01
        assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype(BF16)}
        dtypes = {x.dtype for x in jax.tree.leaves(state)}
        floats = {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}
        assert floats == {np.dtype(np.float32)}

    # And the metric notices updates that are lost.
    optimizer = make(axes, name=name, learning_rate=1e-9, rounding="nearest")
    assert run_updates(optimizer, params, grads)[2]["updates_lost"] > 0.95


def test_second_moment_decays():
    """At b2 = 0.999 a bfloat16 accumulator would stay where it is for ever."""
    optimizer = make({"w": ("embed",)}, name="adamw", b2=0.999)
    params, grads = {"w": jnp.ones(8, jnp.bfloat16)}, {"w": jnp.ones(8)}
    key = jax.random.key(0)

    def body(step, carry):
        params, state = carry
        zeros = jax.tree.map(jnp.zeros_like, grads)
        return optimizer.update(zeros, state, params, step, key)[:2]

    @jax.jit
    def run():
        first = optimizer.update(grads, optimizer.init(params), params, jnp.int32(0), key)[:2]
        return jax.lax.fori_loop(1, 1001, body, first)

    _, state = run()
    nu = optax.tree_utils.tree_get(state["transform"], "nu")["w"]
    assert nu.dtype == jnp.float32
    np.testing.assert_allclose(nu, 0.001 * 0.999**1000, rtol=1e-3)


def test_an_update_rounds_to_the_same_bits_on_every_mesh():
    axes = {"w": ("layers", "embed", "mlp"), "table": ("vocab", "embed"), "scale": ("embed",)}
    shapes = {"w": (2, 64, 48), "table": (24, 64), "scale": (64,)}
    optimizer = make(axes, name="lion", learning_rate=1e-3, weight_decay=0.1)
    params, grads = draw(shapes, 0, BF16), draw(shapes, 1)

    def update_on(sizes):
        """The new parameters on a mesh."""
        num_devices = int(np.prod(list(sizes.values()), dtype=int))
        mesh = sharding.make_mesh(sizes, jax.devices()[:num_devices])
        layout = sharding.shardings(params, axes, mesh)
        p, g = jax.device_put(params, layout), jax.device_put(grads, layout)
        step_and_key = (jnp.int32(3), jax.random.key(5))
        step, key = jax.device_put(step_and_key, NamedSharding(mesh, PartitionSpec()))

        def update(g, s, p, step, key):
            return optimizer.update(g, s, p, step, key)[0]

        with jax.set_mesh(mesh):
            new = jax.jit(update, out_shardings=layout)(g, optimizer.init(p), p, step, key)
        assert new["w"].sharding.is_equivalent_to(layout["w"], 3)
        return jax.device_get(new)

    wanted = update_on({})
    # The update changes all of them, and does so alike.
    for name in shapes:
        assert (wanted[name] != params[name]).any()
    for sizes in (dict(fsdp=8), dict(data=2, fsdp=4), dict(fsdp=4, tensor=2)):
        got = update_on(sizes)
        for name in shapes:
            np.testing.assert_array_equal(
                got[name].view(np.uint16), wanted[name].view(np.uint16), err_msg=f"{sizes} {name}"
            )


def test_master_is_the_f32_twin():
    """The stored parameters are its rounding, and it goes where f32 parameters would."""
    shapes, axes = model_axes()
    params = draw(shapes, 0, BF16, 0.02)
    f32_params = optax.tree.cast(params, np.float32)
    grads = [draw(shapes, seed) for seed in range(5)]
    settings = dict(name="adamw", learning_rate=1e-4, weight_decay=0.1)

    new, state, _ = run_updates(make(axes, rounding="master", **settings), params, grads)
    twin, _, _ = run_updates(make(axes, **settings), f32_params, grads)

    master = state["master"]
    # To nearest: the master copy keeps what is lost.
    rounded = optax.tree.cast(master, BF16)
    jax.tree.map(np.testing.assert_array_equal, new, rounded)
    assert_trees_close(master, twin, rtol=1e-6, atol=1e-9)


def test_moving_average():
    optimizer = make({"w": ("embed",)}, name="adamw", ema_decay=0.25)
    params = draw({"w": (32,)}, 0)
    grads = [draw({"w": (32,)}, seed) for seed in range(1, 5)]

    # The average begins as the parameters, which it forgets.
    average = params["w"].astype(np.float64)
    for n in range(1, 5):
        new, state, _ = run_updates(optimizer, params, grads[:n])
        decay = min(0.25, n / (9 + n))
        average = decay * average + (1 - decay) * new["w"]
    eval_params = optimizer.eval_params(new, state)
    # The distances: an update is small beside a parameter.
    distance, wanted = eval_params["w"] - new["w"], average - new["w"]
    np.testing.assert_allclose(distance, wanted, rtol=1e-2, atol=1e-3 * np.abs(wanted).max())

    # In the parameters' dtype.
    low = optimizer.eval_params({"w": new["w"].astype(BF16)}, state)["w"]
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, state["ema"]["w"].astype(BF16))

    # Without an average the parameters themselves are evaluated.
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


def scale_layers(tree):
    """`tree` with its layers 1, 10 and 100 times as large."""

    def scale(x):
        factors = np.array([1, 10, 100], np.float32)
        return x * factors.reshape(3, *[1] * (x.ndim - 1))

    return tree | {"layers": jax.tree.map(scale, tree["layers"])}


def take_layer(tree, i):
    """One layer of a stack, and what is not stacked."""
    return tree | {"layers": jax.tree.map(operator.itemgetter(i), tree["layers"])}


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_a_stack_steps_as_each_layer_alone(name):
    """Layers of very different sizes, over several steps, so that nothing that spans layers can
    hide. Wide enough for Adafactor to factor.
    """
    settings = dict(name=name, learning_rate=0.01, weight_decay=0.1)
    params = scale_layers(draw(STACK, 0))
    grads = [scale_layers(draw(STACK, seed)) for seed in (1, 2, 3)]
    stacked, state, _ = run_updates(make(STACK_AXES, **settings), params, grads)

    layer_axes = {key: names[1:] for key, names in STACK_AXES["layers"].items()}
    layer_optimizer = make(STACK_AXES | {"layers": layer_axes}, **settings)
    for i in range(3):
        before = take_layer(params, i)
        alone = run_updates(layer_optimizer, before, [take_layer(g, i) for g in grads])[0]
        wanted_updates = jax.tree.map(np.subtract, alone, before)
        updates = jax.tree.map(np.subtract, take_layer(stacked, i), before)

        for (path, update), wanted in zip(
            jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(wanted_updates)
        ):
            largest = np.abs(wanted).max()
            message = f"layer {i} {jax.tree_util.keystr(path)}"
            assert largest > 1e-4
            np.testing.assert_allclose(
                update, wanted, rtol=2e-3, atol=1e-4 * largest, err_msg=message
            )

    # Adafactor keeps sums over rows and columns of a matrix, not the matrix.
    if name == "adafactor":
        state_shapes = {x.shape for x in jax.tree.leaves(state["transform"])}
        assert {(3, 128), (3, 256)} <= state_shapes
        assert (3, 128, 256) not in state_shapes


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
    new, _, metrics = run_updates(optimizer, params, grads)

    for name, p in params.items():
        p = p.astype(np.float64)
        m = v = 0
        for t, grad in enumerate(grads):
            g = grad[name]
            m = 0.8 * m + 0.2 * g
            v = 0.9 * v + 0.1 * g**2
            m_hat = m / (1 - 0.8 ** (t + 1))
            v_hat = v / (1 - 0.9 ** (t + 1))
            # Only matrices decay.
            decay = 0.5 * p if name == "w" else 0
            p = p - 0.1 * (1 - t / 10) * (m_hat / (np.sqrt(v_hat) + 1e-3) + decay)
        np.testing.assert_allclose(new[name], p, rtol=1e-4, atol=1e-5)

    assert metrics["learning_rate"] == pytest.approx(0.08)
    assert metrics["update_norm"] > 0


def newton_schulz(x):
    """Jordan et al. 2024: five steps of the quintic iteration."""
    x = x.astype(np.float64) / np.linalg.norm(x)
    transposed = x.shape[0] > x.shape[1]
    if transposed:
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
    new, _, _ = run_updates(make(STACK_AXES, name="muon", learning_rate=0.01), params, [grads])

    for name, matrix in {"query": (128, 256), "out": (256, 128), "up": (128, 256)}.items():
        updates = new["layers"][name] - params["layers"][name]
        for update, grad in zip(updates, grads["layers"][name]):
            update = update.reshape(matrix)
            # 0.2 sqrt(longer side) makes it as large as Adam's usually are (Liu et al. 2025).
            wanted = -0.01 * 0.2 * 256**0.5 * newton_schulz(grad.reshape(matrix))
            np.testing.assert_allclose(update, wanted, atol=1e-2 * np.abs(wanted).max())
            assert 0.1 < np.sqrt((update**2).mean()) / 0.01 < 0.3


def test_muon_takes_each_expert_by_itself():
    up_axes, router_axes = ("layers", "expert", "embed", "mlp"), ("layers", "embed", "router")
    axes = {"layers": {"up": up_axes, "router": router_axes}}
    shapes = {"layers": {"up": (2, 3, 16, 24), "router": (2, 16, 3)}}
    params, grads = draw(shapes, 0), draw(shapes, 1)
    optimizer = make(axes, name="muon", learning_rate=0.01, muon_adam_ratio=0.0)
    new, _, _ = run_updates(optimizer, params, [grads])

    for layer in range(2):
        for expert in range(3):
            update = new["layers"]["up"][layer, expert] - params["layers"]["up"][layer, expert]
            wanted = -0.01 * 0.2 * 24**0.5 * newton_schulz(grads["layers"]["up"][layer, expert])
            np.testing.assert_allclose(update, wanted, atol=1e-2 * np.abs(wanted).max())

    # The router is Adam's, which a ratio of 0 switches off.
    np.testing.assert_array_equal(new["layers"]["router"], params["layers"]["router"])


def test_muon_takes_the_hidden_matrices_and_adam_the_rest():
    shapes, axes = model_axes(
        bias="qkv,out,mlp,norm",
        gated_mlp=True,
        positions="learned",
        norm="layernorm",
        tie_embeddings=False,
    )
    optimizer = make(axes, name="muon", b1=0.9)
    params = map_shapes(lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), shapes)
    state = jax.eval_shape(optimizer.init, params)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    moments = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]

    def count_moments(label, name, shape):
        """How many arrays of a parameter's shape one of the two optimizers keeps for it."""
        matches = 0
        for key, moment_shape in moments:
            matches += f"'{label}'" in key and key.endswith(name) and moment_shape == shape
        return matches

    # Muon keeps one moment, Adam two.
    matrices = {"query", "key", "value", "out", "up", "gate", "down"}
    seen = set()
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        is_matrix = path[-1].key in matrices
        assert count_moments("muon", name, p.shape) == (1 if is_matrix else 0), name
        assert count_moments("adam", name, p.shape) == (0 if is_matrix else 2), name
        seen.add(path[-1].key)
    assert matrices < seen


def test_muon_scales_what_adam_updates():
    shapes, axes = model_axes()
    params, grads = draw(shapes, 0), [draw(shapes, 1)]

    def update(**settings):
        optimizer = make(axes, name="muon", learning_rate=0.01, **settings)
        return jax.tree.map(np.subtract, run_updates(optimizer, params, grads)[0], params)

    # Muon's own matrices don't depend on the ratio.
    whole, half = update(), update(muon_adam_ratio=0.5)
    np.testing.assert_allclose(half["embed"]["table"], 0.5 * whole["embed"]["table"], atol=1e-6)
    np.testing.assert_allclose(half["layers"]["mlp"]["up"], whole["layers"]["mlp"]["up"], atol=1e-6)


def test_decay_shrinks_matrices_and_tables_only():
    """Without a gradient Lion does nothing, so that only decay is left."""
    shapes, axes = model_axes(
        bias="qkv,out,mlp,norm", positions="learned", norm="layernorm", tie_embeddings=False
    )
    params = draw(shapes, 0)
    no_grads = jax.tree.map(np.zeros_like, params)
    optimizer = make(axes, name="lion", learning_rate=0.1, weight_decay=0.5)
    new, _, _ = run_updates(optimizer, params, [no_grads])

    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new)
    ):
        name = jax.tree_util.keystr(path)
        factor = 1.0 if "bias" in name or "scale" in name else 0.95
        np.testing.assert_allclose(after, before * factor, rtol=1e-6, err_msg=name)


def test_clipping_is_of_the_norm_of_all_gradients_together():
    axes, shapes = {"a": ("embed",), "b": ("embed", "mlp")}, {"a": (4,), "b": (4, 3)}
    params, grads = draw(shapes, 0), draw(shapes, 1)
    norm = float(optax.global_norm(grads))

    # A limit of 0 is none.
    for clip, factor in ((norm / 4, 0.25), (norm * 4, 1.0), (0.0, 1.0)):
        optimizer = make(axes, name="adamw", b1=0.9, clip_norm=clip)
        _, state, _ = run_updates(optimizer, params, [grads])
        # Adam's first moment after one step is (1 - b1) times the gradient.
        moment = optax.tree_utils.tree_get(state["transform"], "mu")
        for name in shapes:
            np.testing.assert_allclose(moment[name], 0.1 * factor * grads[name], rtol=1e-5)


# Schedules.


def rates(name, **changes):
    """The learning rates of 100 steps: 10 to warm up to 2, and at last a tenth of it."""
    settings = dict(peak=2.0, total_steps=100, warmup_steps=10, decay_steps=20, final=0.1)
    schedule = optim.make_schedule(name, **settings | changes)
    # Optax's own schedules mix int32 and float.
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(schedule(jnp.arange(101)))


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_warm_up(name):
    """The first update counts, the last of the warm-up is at the peak; without warm-up the peak
    comes first.
    """
    wanted = 2.0 * np.minimum(np.arange(1, 12) / 10, 1)
    np.testing.assert_allclose(rates(name)[:11], wanted, rtol=1e-6)
    assert rates(name, warmup_steps=0)[0] == 2.0


def test_schedules_after_the_warm_up():
    t = np.arange(10, 101)
    linear = 2.0 + (0.2 - 2.0) * (t - 10) / 90
    cosine = 0.2 + 1.8 * (1 + np.cos(np.pi * (t - 10) / 90)) / 2
    # Warm-up, stable, decay: the last 20 steps fall.
    wsd = np.where(t <= 80, 2.0, 2.0 + (0.2 - 2.0) * (t - 80) / 20)

    np.testing.assert_allclose(rates("constant")[10:], 2.0)
    np.testing.assert_allclose(rates("linear")[10:], linear, rtol=1e-5)
    np.testing.assert_allclose(rates("cosine")[10:], cosine, rtol=1e-5)
    np.testing.assert_allclose(rates("wsd")[10:], wsd, rtol=1e-5)
    np.testing.assert_allclose(rates("wsd", decay_steps=90)[10:], linear, rtol=1e-5)
    for name in ("linear", "cosine", "wsd"):
        assert rates(name)[100] == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("cosine", dict(warmup_steps=100), "warmup_steps = 100 must be below the run's 100 steps"),
        ("wsd", dict(decay_steps=0), "decay_steps = 0: wsd needs between 1 and 90"),
        ("wsd", dict(decay_steps=91), "decay_steps = 91: wsd needs between 1 and 90"),
    ],
)
def test_schedule_errors(name, changes, message):
    with pytest.raises(ValueError, match=message):
        rates(name, **changes)
