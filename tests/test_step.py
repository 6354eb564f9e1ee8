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
from lm.objectives import causal
from tests.helpers import abstract_model, assert_trees_close, model_config, slow

PLAIN = causal.make_loss(z_loss=0.0, chunk=0)
WITH_Z_LOSS = causal.make_loss(z_loss=0.1, chunk=0)
BAD = 39  # the first token of a row that poisons its batch


@functools.cache
def model():
    """(graphdef, params, logical axes) of a small Transformer in f32."""
    config = model_config(
        num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=1, tie_embeddings=True
    )
    graphdef, abstract = abstract_model(config)
    rng = np.random.default_rng(0)

    def draw(p):
        return rng.normal(0, 0.3, p.shape).astype(np.float32)

    params = jax.tree.map(draw, nnx.to_pure_dict(abstract))
    return graphdef, params, sharding.logical_axes(abstract)


def make_batch(seed=0, rows=8, length=16):
    """Rows with 0 to 16 weights, one of them all padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, BAD, (rows, length + 1)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    lengths = np.array([16, 3, 0, 9, 1, 16, 12, 5])[:rows, None]
    segments = (positions < lengths).astype(np.int32)
    weights = segments * (rng.random((rows, length)) < 0.8)
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=weights.astype(np.float32),
        positions=positions * segments,
        segments=segments,
    )


def make_bad_batch(seed=0):
    batch = make_batch(seed)
    batch["tokens"][5, 0] = BAD
    return batch


def loss_with_bad_batches(model, batch, key):
    """Cross entropy that is not a number, gradient included, for a batch with a marked row."""
    value, count, terms = PLAIN(model, batch, key)
    factor = jnp.where((batch["tokens"][:, 0] == BAD).any(), jnp.nan, 1.0)
    return value * factor, count, terms | {"loss": (terms["loss"][0] * factor, count)}


@functools.cache
def compile_step(loss, accumulation, nonfinite, changes):
    """(compiled train step, function that makes a fresh state)."""
    graphdef, params, axes = model()
    c = config_lib.default().optimizer
    c.update(dict(schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.0))
    c.update(dict(changes))
    optimizer = optim.make_optimizer(c, axes, 100)
    train_step = step.make_train_step(
        graphdef,
        step.LossFns(loss),
        optimizer,
        seed=0,
        accumulation=accumulation,
        nonfinite=nonfinite,
    )

    # The step donates its state, so each needs arrays of its own.
    def make_state():
        return step.init_state(jax.tree.map(jnp.array, params), optimizer)

    return jax.jit(train_step, donate_argnums=0), make_state


def make(loss=loss_with_bad_batches, accumulation=1, nonfinite="halt", **changes):
    """(train step, fresh state): AdamW at a constant learning rate, without clipping and decay
    unless `changes` say otherwise.
    """
    train_step, make_state = compile_step(loss, accumulation, nonfinite, tuple(changes.items()))
    return train_step, make_state()


def first_moment(state):
    """Adam's first moment: after one step without clipping, (1 - b1) times the gradient."""
    return jax.device_get(optax.tree_utils.tree_get(state.opt_state["transform"], "mu"))


def without_counters(state):
    """All that a batch may change, in the host's memory."""
    return jax.device_get((state.params, state.opt_state))


def assert_trees_equal(tree, wanted):
    jax.tree.map(np.testing.assert_array_equal, tree, wanted)


# The gradient.


@pytest.mark.parametrize("accumulation", [slow(2), slow(4), 8])
def test_accumulation_is_the_whole_batch(accumulation):
    """Though the microbatches have different numbers of weights, one of them (of 8) none."""
    train_step, state = make(WITH_Z_LOSS)
    state, metrics = train_step(state, make_batch())
    wanted = first_moment(state)

    accumulating_step, state = make(WITH_Z_LOSS, accumulation=accumulation)
    state, accumulated_metrics = accumulating_step(state, make_batch())

    difference = jax.tree.map(np.subtract, first_moment(state), wanted)
    assert optax.global_norm(difference) < 1e-5 * optax.global_norm(wanted)
    assert_trees_close(metrics, accumulated_metrics, rtol=1e-4)
    assert metrics["tokens"] == make_batch()["weights"].sum()


def test_the_gradient_is_of_the_mean_over_weights():
    """The loss's gradient over the count, terms as the loss gave them, and the norm before
    clipping.
    """
    graphdef, params, _ = model()
    batch = make_batch()

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        value, _, terms = WITH_Z_LOSS(nnx.merge(graphdef, params), batch, None)
        return value, terms

    grads, terms = gradient(params)
    grads = optax.tree.scale(1 / batch["weights"].sum(), grads)

    train_step, state = make(WITH_Z_LOSS)
    state, metrics = train_step(state, batch)
    assert_trees_close(first_moment(state), optax.tree.scale(0.1, grads), rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)
    for name, term in terms.items():
        np.testing.assert_allclose(metrics[name], term, rtol=1e-5)

    # Clipping changes the update, not the norm that is reported.
    clipping_step, state = make(WITH_Z_LOSS, clip_norm=0.01)
    _, clipped_metrics = clipping_step(state, batch)
    np.testing.assert_allclose(clipped_metrics["grad_norm"], metrics["grad_norm"], rtol=1e-5)


def test_z_loss_adds_what_it_should():
    """Its share of the squared log-partition function to the objective, and so to the gradient; the
    loss reported is the cross entropy alone.
    """
    losses = {0.0: PLAIN, 0.1: WITH_Z_LOSS, 0.2: causal.make_loss(z_loss=0.2, chunk=0)}
    moments, metrics = {}, {}
    for z_loss, loss in losses.items():
        train_step, state = make(loss)
        state, metrics[z_loss] = train_step(state, make_batch())
        moments[z_loss] = first_moment(state)

    np.testing.assert_allclose(metrics[0.2]["loss"], metrics[0.0]["loss"], rtol=1e-6)
    assert metrics[0.0]["z_loss"][0] == 0
    assert metrics[0.1]["z_loss"][0] > 0
    np.testing.assert_allclose(metrics[0.2]["z_loss"][0], 2 * metrics[0.1]["z_loss"][0], rtol=1e-5)

    # Twice the coefficient is twice the part of the gradient.
    part = jax.tree.map(np.subtract, moments[0.1], moments[0.0])
    twice = jax.tree.map(np.subtract, moments[0.2], moments[0.0])
    assert optax.global_norm(part) > 1e-3
    assert_trees_close(twice, optax.tree.scale(2.0, part), rtol=1e-3, atol=1e-6)


def test_a_batch_of_padding_is_no_error():
    train_step, state = make()
    before = jax.device_get(state.params)
    padding = make_batch() | {"weights": np.zeros((8, 16), np.float32)}
    state, metrics = train_step(state, padding)

    assert metrics["loss"] == (0, 0)
    assert not state.halted
    assert state.step == 1
    assert_trees_equal(jax.device_get(state.params), before)


# Batches whose loss or gradient is not finite.


@pytest.mark.parametrize("accumulation", [1, slow(4)])
def test_halt(accumulation):
    """A bad batch changes nothing, and neither do the good ones dispatched after it."""
    train_step, state = make(nonfinite="halt", accumulation=accumulation)
    state, metrics = train_step(state, make_batch(0))
    assert not metrics["halted"]
    assert state.step == 1

    before = without_counters(state)
    # The loop has dispatched more steps by the time it reads that one has halted.
    for batch in (make_bad_batch(1), make_batch(2), make_batch(3)):
        state, metrics = train_step(state, batch)
        assert metrics["halted"] and state.halted
        assert (state.step, state.skipped) == (1, 0)
        assert_trees_equal(without_counters(state), before)


def test_halt_at_the_first_step():
    train_step, state = make(nonfinite="halt")
    before = without_counters(state)
    state, _ = train_step(state, make_bad_batch())
    assert state.halted
    assert state.step == 0
    assert_trees_equal(without_counters(state), before)


@pytest.mark.parametrize("accumulation", [slow(1), 4])
def test_skip(accumulation):
    """A bad batch is left out and counted, and the run goes on as if it had not been: only the step
    has moved.
    """
    train_step, state = make(nonfinite="skip", accumulation=accumulation)
    state, _ = train_step(state, make_batch(0))
    before = without_counters(state)
    state, metrics = train_step(state, make_bad_batch(1))
    assert (state.step, state.skipped, metrics["skipped_steps"]) == (2, 1, 1)
    assert not state.halted and not metrics["halted"]
    assert_trees_equal(without_counters(state), before)

    state, _ = train_step(state, make_bad_batch(1))
    state, metrics = train_step(state, make_batch(2))
    assert (state.step, state.skipped) == (4, 2)
    assert np.isfinite(metrics["loss"][0])

    # A run that never met the bad batches.
    _, other = make(nonfinite="skip", accumulation=accumulation)
    for seed in (0, 2):
        other, _ = train_step(other, make_batch(seed))
    assert other.step == 2
    params, wanted = jax.device_get((state.params, other.params))
    assert_trees_close(params, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("where", ["loss", "gradient", "update"])
def test_every_kind_of_nonfinite_is_noticed(where):
    def loss(model, batch, key):
        value, count, terms = PLAIN(model, batch, key)
        weight = model.norm.scale[...][0]
        if where == "loss":
            terms = {"loss": (terms["loss"][0] + jnp.inf, count)}
        # The slope of a square root at 0 is infinite, and Lion's update of it is finite.
        if where == "gradient":
            value = value + jnp.sqrt(weight - jax.lax.stop_gradient(weight))
        return value, count, terms

    learning_rate = 1e38 if where == "update" else 1e-3
    train_step, state = make(loss, name="lion", learning_rate=learning_rate, weight_decay=100.0)
    assert train_step(state, make_batch())[1]["halted"]


# Randomness, buffers, and other functions of the parameters.


def test_keys_differ_by_step_and_row():
    """A row's key is a function of the seed, the step and its place in the batch, and of nothing
    else: not of how many microbatches there are.
    """

    def random_loss(model, batch, keys_B):
        value, count, terms = PLAIN(model, batch, keys_B)
        numbers_B = jax.vmap(jax.random.normal)(keys_B)
        # By the row's contents, so that the order of rows counts.
        numbers_B = numbers_B * batch["tokens"][:, 0].astype(jnp.float32)
        return value, count, terms | {"drawn": (jnp.sum(numbers_B), jnp.sum(numbers_B**2))}

    def draw(accumulation):
        """(sum of the numbers, sum of their squares) over the rows, for two steps."""
        train_step, state = make(random_loss, accumulation=accumulation)
        sums = []
        for seed in (0, 1):
            state, metrics = train_step(state, make_batch(seed))
            sums.append((float(metrics["drawn"][0]), float(metrics["drawn"][1])))
        return sums

    once = draw(1)
    assert once == draw(1)
    np.testing.assert_allclose(draw(2), once, rtol=1e-5)
    assert once[0] != once[1]
    # 8 x the squares would be the sum squared if all rows drew the same number.
    assert abs(once[0][0] ** 2 - 8 * once[0][1]) > 1e-3


def test_the_state_can_be_donated():
    """No two arrays of it share a buffer, though the average and the master copy begin as the
    parameters; and the old ones are gone.
    """
    train_step, state = make(ema_decay=0.9, rounding="master")
    first = state
    for seed in range(3):
        state, _ = train_step(state, make_batch(seed))
    assert first.params["embed"]["table"].is_deleted()
    assert state.step == 3
    assert np.isfinite(optax.global_norm(state.opt_state["ema"]))


def test_log_probabilities():
    """Each target's by itself, [B, T], their weighted sum the loss."""
    graphdef, params, _ = model()
    batch = make_batch()
    token_logprobs = jax.jit(step.make_token_logprobs(graphdef, causal.token_logprobs))
    logprobs = token_logprobs(params, batch)
    assert logprobs.shape == (8, 16)
    assert logprobs.dtype == jnp.float32

    train_step, state = make(PLAIN)
    _, metrics = train_step(state, batch)
    np.testing.assert_allclose(-(logprobs * batch["weights"]).sum(), metrics["loss"][0], rtol=1e-5)


def test_log_probabilities_of_a_tree():
    """Those asked after some places of each row, and whether each is the likeliest there."""
    graphdef, params, _ = model()
    batch = make_batch()
    logprobs = jax.jit(step.make_token_logprobs(graphdef, causal.token_logprobs))(params, batch)
    tree_logprobs = jax.jit(step.make_tree_logprobs(graphdef))

    # Rows without branches: every token stays visible to the end.
    rows = {name: batch[name] for name in ("tokens", "positions", "segments")}
    rows["until"] = np.full((8, 16), 16, np.int32)
    after = np.array([[15, 2, 7]] * 8, np.int32)

    # The row's own targets, and one target asked at another place than its own.
    which = np.array([[0, 1, 2, 1]] * 8, np.int32)
    targets = batch["targets"][:, [15, 2, 7, 7]]
    got, is_best = tree_logprobs(params, rows | {"targets": targets}, after, which)
    assert got.shape == is_best.shape == (8, 4)
    np.testing.assert_allclose(got[:, :3], logprobs[:, [15, 2, 7]], rtol=1e-4, atol=1e-5)
    assert not np.allclose(got[:, 3], got[:, 2])
    assert (got[is_best] > np.log(1 / 40)).all()

    # All ids at the first place: the likeliest one is marked, and no other.
    targets = np.broadcast_to(np.arange(40, dtype=np.int32), (8, 40))
    which = np.zeros((8, 40), np.int32)
    got, is_best = tree_logprobs(params, rows | {"targets": targets}, after, which)
    np.testing.assert_array_equal(np.asarray(is_best).argmax(1), np.asarray(got).argmax(1))
    assert (np.asarray(is_best).sum(1) == 1).all()
