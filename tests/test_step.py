"""The train step: accumulation is the whole batch, bad batches change nothing, and what it reports
is sums and counts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lm import config as config_lib
from lm import optim, sharding, step
from lm.models.transformer import Config, Transformer
from lm.objectives import causal

PLAIN, WITH_Z = causal.make_loss(z_loss=0.0, chunk=0), causal.make_loss(z_loss=0.1, chunk=0)
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
BAD = 39  # the first token of a row that poisons its batch


@functools.cache
def model():
    """(graphdef, params, logical axes) of a small Transformer in f32."""
    fields = config_lib.default().model.to_dict() | dict(
        vocab_size=40,
        context_length=16,
        num_layers=1,
        embed_dim=16,
        mlp_dim=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        param_dtype="float32",
        compute_dtype="float32",
    )
    del fields["type"]
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: Transformer(Config(**fields), jax.random.key(0))), nnx.Param
    )
    rng = np.random.default_rng(0)
    return (
        graphdef,
        jax.tree.map(
            lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), nnx.to_pure_dict(abstract)
        ),
        sharding.logical_axes(abstract),
    )


def batch(seed=0, rows=8, length=16):
    """Rows with 0 to 16 weights, one of them all padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, BAD, (rows, length + 1)).astype(np.int32)
    place = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    segments = (place < np.array([16, 3, 0, 9, 1, 16, 12, 5])[:rows, None]).astype(np.int32)
    weights = segments * (rng.random((rows, length)) < 0.8)
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=weights.astype(np.float32),
        positions=place * segments,
        segments=segments,
    )


def poisoned(seed=0):
    made = batch(seed)
    made["tokens"][5, 0] = BAD
    return made


def injected_loss(model, batch, key):
    """Cross entropy with a weak spot: not a number, gradient included, for a batch with a marked
    row.
    """
    value, count, terms = PLAIN(model, batch, key)
    bad = jnp.where((batch["tokens"][:, 0] == BAD).any(), jnp.nan, 1.0)
    return value * bad, count, terms | {"loss": (terms["loss"][0] * bad, count)}


@functools.cache
def make_step(loss, accumulation, nonfinite, changes):
    """(compiled train step, function that makes a fresh state)."""
    graphdef, params, axes = model()
    c = config_lib.default().optimizer
    c.update(
        dict(schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.0) | dict(changes)
    )
    optimizer = optim.make_optimizer(c, axes, 100)
    train_step = step.make_train_step(
        graphdef, loss, optimizer, seed=0, accumulation=accumulation, nonfinite=nonfinite
    )
    fresh = lambda: step.init_state(jax.tree.map(jnp.array, params), optimizer)
    return jax.jit(train_step, donate_argnums=0, compiler_options=QUICK), fresh


def make(loss=injected_loss, accumulation=1, nonfinite="halt", **changes):
    """(train step, fresh state): AdamW at a constant learning rate, without clipping and decay
    unless `changes` say otherwise.
    """
    train_step, fresh = make_step(loss, accumulation, nonfinite, tuple(changes.items()))
    return train_step, fresh()


def moment(state):
    """Adam's first moment: after one step without clipping, (1 - b1) times the gradient."""
    return jax.device_get(optax.tree_utils.tree_get(state.opt_state["transform"], "mu"))


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_is_the_whole_batch(accumulation):
    """Though the microbatches have different numbers of weights, one of them (of 8) none."""
    results = []
    for n in (1, accumulation):
        train_step, state = make(WITH_Z, accumulation=n)
        state, metrics = train_step(state, batch())
        results.append((moment(state), metrics))
    (wanted, whole), (got, parts) = results
    norm = optax.global_norm(wanted)
    assert optax.global_norm(jax.tree.map(np.subtract, got, wanted)) < 1e-5 * norm
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), whole, parts)
    assert whole["tokens"] == batch()["weights"].sum()


def test_the_gradient_is_of_the_mean_over_weights():
    """The loss's gradient over the count, terms as the loss gave them, and the norm before
    clipping.
    """
    graphdef, params, _ = model()
    total = lambda params: WITH_Z(nnx.merge(graphdef, params), batch(), None)
    grads, terms = jax.jit(
        jax.grad(lambda p: (total(p)[0], total(p)[2]), has_aux=True), compiler_options=QUICK
    )(params)
    grads = jax.tree.map(lambda g: np.asarray(g) / batch()["weights"].sum(), grads)
    train_step, state = make(WITH_Z)
    state, metrics = train_step(state, batch())
    jax.tree.map(
        lambda m, g: np.testing.assert_allclose(m, 0.1 * g, rtol=1e-4, atol=1e-8),
        moment(state),
        grads,
    )
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
        {name: metrics[name] for name in terms},
        terms,
    )
    clipped = make(WITH_Z, clip_norm=0.01)
    np.testing.assert_allclose(
        clipped[0](clipped[1], batch())[1]["grad_norm"], metrics["grad_norm"], rtol=1e-5
    )


def test_z_loss_adds_what_it_should():
    """Its share of the squared log-partition function to the objective, and so to the gradient; the
    loss reported is the cross entropy alone.
    """
    moments, metrics = {}, {}
    for z_loss, loss in {
        0.0: PLAIN,
        0.1: WITH_Z,
        0.2: causal.make_loss(z_loss=0.2, chunk=0),
    }.items():
        train_step, state = make(loss)
        state, metrics[z_loss] = train_step(state, batch())
        moments[z_loss] = moment(state)
    np.testing.assert_allclose(metrics[0.2]["loss"], metrics[0.0]["loss"], rtol=1e-6)
    assert metrics[0.0]["z_loss"][0] == 0 and metrics[0.1]["z_loss"][0] > 0
    np.testing.assert_allclose(metrics[0.2]["z_loss"][0], 2 * metrics[0.1]["z_loss"][0], rtol=1e-5)
    share = lambda z: jax.tree.map(np.subtract, moments[z], moments[0.0])
    assert optax.global_norm(share(0.1)) > 1e-3
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, 2 * y, rtol=1e-3, atol=1e-6),
        share(0.2),
        share(0.1),
    )


def test_a_batch_of_padding_is_no_error():
    train_step, state = make()
    before = jax.device_get(state.params)
    state, metrics = train_step(state, batch() | {"weights": np.zeros((8, 16), np.float32)})
    assert metrics["loss"] == (0, 0) and not state.halted and state.step == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_halt(accumulation):
    """A bad batch changes nothing, and neither do the good ones dispatched after it."""
    train_step, state = make(nonfinite="halt", accumulation=accumulation)
    state, metrics = train_step(state, batch(0))
    assert not metrics["halted"] and state.step == 1
    good = jax.device_get(state)
    for made in (poisoned(1), batch(2), batch(3)):
        state, metrics = train_step(state, made)
        assert metrics["halted"] and state.halted and state.step == 1 and state.skipped == 0
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get((state.params, state.opt_state)),
            (good.params, good.opt_state),
        )


def test_halt_at_the_first_step():
    train_step, state = make(nonfinite="halt")
    before = jax.device_get(state)
    state, _ = train_step(state, poisoned())
    assert state.halted and state.step == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((state.params, state.opt_state)),
        (before.params, before.opt_state),
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_skip(accumulation):
    """A bad batch is left out and counted, and the run goes on as if it had not been: only the step
    has moved.
    """
    train_step, state = make(nonfinite="skip", accumulation=accumulation)
    state, _ = train_step(state, batch(0))
    good = jax.device_get(state)
    state, metrics = train_step(state, poisoned(1))
    assert (
        (state.step, state.skipped, metrics["skipped_steps"]) == (2, 1, 1)
        and not state.halted
        and not metrics["halted"]
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((state.params, state.opt_state)),
        (good.params, good.opt_state),
    )
    state, _ = train_step(state, poisoned(1))
    state, metrics = train_step(state, batch(2))
    assert (state.step, state.skipped) == (4, 2) and np.isfinite(metrics["loss"][0])

    other_step, other = make(nonfinite="skip", accumulation=accumulation)
    for seed in (0, 2):
        other, _ = other_step(other, batch(seed))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
        jax.device_get(state.params),
        jax.device_get(other.params),
    )
    assert other.step == 2


@pytest.mark.parametrize("where", ["loss", "gradient", "update"])
def test_every_kind_of_nonfinite_is_seen(where):
    def loss(model, batch, key):
        value, count, terms = PLAIN(model, batch, key)
        weight = model.norm.scale[...][0]
        if where == "loss":
            terms = {"loss": (terms["loss"][0] + jnp.inf, count)}
        if where == "gradient":  # the slope of a square root at 0, of which Lion's update is finite
            value = value + jnp.sqrt(weight - jax.lax.stop_gradient(weight))
        return value, count, terms

    train_step, state = make(
        loss, name="lion", learning_rate=1e38 if where == "update" else 1e-3, weight_decay=100.0
    )
    assert train_step(state, batch())[1]["halted"]


def test_keys_differ_by_step_and_microbatch():
    """The loss's key is a function of the seed, the step and the microbatch, and of nothing
    else.
    """

    def drawn(model, batch, key):
        value, count, terms = PLAIN(model, batch, key)
        number = jax.random.normal(key)
        return value, count, terms | {"drawn": (number, number**2)}

    def numbers(accumulation):
        train_step, state = make(drawn, accumulation=accumulation)
        for seed in (0, 1):
            state, metrics = train_step(state, batch(seed))
            yield float(metrics["drawn"][0]), float(metrics["drawn"][1])

    once, twice = list(numbers(1)), list(numbers(2))
    assert once == list(numbers(1)) and len(set(once + twice)) == 4
    # 0 if both microbatches drew the same number
    assert all(abs(total**2 - 2 * squares) > 1e-3 for total, squares in twice)


def test_the_state_can_be_donated():
    """No two arrays of it share a buffer, though the average and the master copy begin as the
    parameters; and the old ones are gone.
    """
    train_step, state = make(ema_decay=0.9, rounding="master")
    first = state
    for seed in range(3):
        state, _ = train_step(state, batch(seed))
    assert first.params["embed"]["table"].is_deleted() and state.step == 3
    assert np.isfinite(optax.global_norm(state.opt_state["ema"]))


def test_nonfinite_must_be_known():
    with pytest.raises(
        ValueError, match=r"config.train.nonfinite = 'ignore'; valid: \['halt', 'skip'\]"
    ):
        make(nonfinite="ignore")


def test_log_probabilities():
    """Each target's by itself, [B, T], their weighted sum the loss; and those asked after some
    places of each row.
    """
    graphdef, params, _ = model()
    made = batch()
    token_logprobs = jax.jit(
        step.make_token_logprobs(graphdef, causal.token_logprobs), compiler_options=QUICK
    )(params, made)
    train_step, state = make(PLAIN)
    _, metrics = train_step(state, made)
    assert token_logprobs.shape == (8, 16) and token_logprobs.dtype == jnp.float32
    np.testing.assert_allclose(
        -(token_logprobs * made["weights"]).sum(), metrics["loss"][0], rtol=1e-5
    )
    after, which = np.array([[15, 2, 7]] * 8, np.int32), np.array([[0, 1, 2, 1]] * 8, np.int32)
    asked = {name: made[name] for name in ("tokens", "positions", "segments")} | dict(
        until=np.full((8, 16), 16, np.int32)
    )
    asked["targets"] = np.concatenate(
        [made["targets"][:, [15, 2, 7]], made["targets"][:, [7]]], axis=1
    )
    found, best = jax.jit(step.make_tree_logprobs(graphdef), compiler_options=QUICK)(
        params, asked, after, which
    )
    np.testing.assert_allclose(found[:, :3], token_logprobs[:, [15, 2, 7]], rtol=1e-4, atol=1e-5)
    assert (
        found.shape == best.shape == (8, 4)
        and not np.allclose(found[:, 3], found[:, 2])
        and (found[best] > np.log(1 / 64)).all()
    )
    asked["targets"] = np.broadcast_to(np.arange(64, dtype=np.int32), (8, 64))
    found, best = jax.jit(step.make_tree_logprobs(graphdef), compiler_options=QUICK)(
        params, asked, after, np.zeros((8, 64), np.int32)
    )
    np.testing.assert_array_equal(np.asarray(best).argmax(1), np.asarray(found).argmax(1))
    assert (np.asarray(best).sum(1) == 1).all()
