"""Attention: who sees whom, positions, shared heads, kernels against the plain formula, and the
cache against the whole sequence at once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import sharding
from lm.nn import masks
from lm.nn.kernels.attention import blocked_attention, splash_attention
from lm.nn.kernels.rotary import rotate, rotate_by_matmul
from lm.nn.masks import cache_mask, cache_slots
from lm.nn.positions import Linear, LongRope, Yarn, frequencies, parse_scaling, rope
from tests.helpers import assert_trees_close, model_config, random_model, slow

# Two documents, and padding at the end of the row.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], np.int32)
# Each id once, so that a row of the embedding table stands for a position.
TOKENS = np.array([[7, 3, 9, 1, 12, 0, 5, 8, 2, 11, 4, 10]], np.int32)


@functools.cache
def make(**changes):
    """(graphdef, params) of a small model whose weights are large enough for attention to choose,
    and whose biases are not 0.
    """
    fields = dict(vocab_size=13, gated_mlp=True, bias="qkv,out,mlp,norm") | changes
    return random_model(model_config(**fields), seed=0)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens, positions, segments, visible=masks.CAUSAL):
    """(hidden, logits)."""
    model = nnx.merge(graphdef, params)
    hidden = model(tokens, positions, segments, visible=visible).hidden
    return hidden, model.logits(hidden)


@functools.partial(jax.jit, static_argnums=0, static_argnames="decode")
def cached_forward(graphdef, params, cache, tokens, positions, *, decode):
    """(hidden, logits, cache) of tokens that are all valid; `decode`: one of each row."""
    model = nnx.merge(graphdef, params)
    output = model(tokens, positions, jnp.ones_like(tokens), cache=cache, decode=decode)
    return output.hidden, model.logits(output.hidden), output.cache


def draw_qkv(rng, length, kv_heads, dtype=np.float32):
    """Queries of 4 heads, and keys and values of `kv_heads`, for 2 rows and a head size of 16."""
    q = rng.normal(size=(2, length, 4, 16)).astype(np.float32).astype(dtype)
    k = rng.normal(size=(2, length, kv_heads, 16)).astype(np.float32).astype(dtype)
    v = rng.normal(size=(2, length, kv_heads, 16)).astype(np.float32).astype(dtype)
    return q, k, v


# Masks, and which tokens reach which.


def causal_mask(segments, window=0):
    return masks.array(masks.CAUSAL, segments, None, window)


def test_masks():
    segments = np.array([[1, 1, 2, 0, 0], [1, 2, 2, 2, 2]], np.int32)
    same_segment = segments[:, :, None] == segments[:, None, :]
    np.testing.assert_array_equal(causal_mask(segments), np.tril(same_segment))
    full = masks.array(masks.FULL, segments, None)
    np.testing.assert_array_equal(full, same_segment)

    positions = np.array([[0, 2], [3, 1]], np.int32)
    not_later = np.arange(4) <= positions[..., None]
    np.testing.assert_array_equal(cache_mask(positions, 4), not_later)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("output", [0, 1], ids=["hidden", "logits"])
def test_gradients_reach_exactly_the_earlier_tokens_of_the_same_document(positions, output):
    """Zero, not small, with respect to later tokens, other documents and padding; nonzero with
    respect to all others.
    """
    graphdef, params = make(positions=positions)
    weights = jax.random.normal(jax.random.key(1), (32 if output == 0 else 13,))

    @jax.jit
    @jax.jacrev
    def jacobian(table):
        with_table = params | {"embed": {"table": table}}
        outputs = forward(graphdef, with_table, TOKENS, POSITIONS, SEGMENTS)
        return outputs[output][0] @ weights

    # [position of the output, position of the token]: each id is in the row once.
    jacobian_TTD = jacobian(params["embed"]["table"])[:, TOKENS[0]]
    largest_TT = np.abs(np.asarray(jacobian_TTD)).max(axis=-1)

    allowed_TT = np.tril(SEGMENTS[0][:, None] == SEGMENTS[0][None, :])
    assert (largest_TT[allowed_TT] > 1e-4).all()
    assert (largest_TT[~allowed_TT] == 0).all()


# A prefix of two with one after the other behind it; and a permutation, in two documents and
# padding.
PREFIX = np.array([[0, 0, 1, 2, 3, 0, 0, 0, 1, 0, 0, 0]], np.int32)
PERMUTATION = np.array([[3, 0, 4, 1, 2, 1, 3, 0, 2, 0, 1, 2]], np.int32)
VISIBLE = {
    "full": masks.FULL,
    "prefix": masks.by_order(PREFIX),
    "permutation": masks.by_order(PERMUTATION),
    "strict": masks.by_order(PERMUTATION, strict=True),
}


@pytest.mark.parametrize("name", list(VISIBLE))
def test_gradients_reach_exactly_what_is_visible(name):
    """As above: the residual stream brings each token to itself."""
    graphdef, params = make()
    weights = jax.random.normal(jax.random.key(1), (32,))

    @jax.jit
    @jax.jacrev
    def jacobian(table):
        with_table = params | {"embed": {"table": table}}
        arguments = (TOKENS, POSITIONS, SEGMENTS, VISIBLE[name])
        return forward(graphdef, with_table, *arguments)[0][0] @ weights

    largest_TT = np.abs(np.asarray(jacobian(params["embed"]["table"])[:, TOKENS[0]])).max(axis=-1)
    for query in range(12):
        for key in range(12):
            orders = VISIBLE[name].order_BT
            ahead = 0 if orders is None else orders[0, key] - orders[0, query]
            seen = ahead < 0 if name == "strict" else ahead <= 0
            seen &= SEGMENTS[0, key] == SEGMENTS[0, query]
            assert (largest_TT[query, key] > 1e-4) == (seen or query == key), (query, key)


@pytest.mark.parametrize("name", list(VISIBLE))
def test_what_is_visible_is_the_same_on_a_mesh(name):
    """That splits rows into positions, and heads."""
    graphdef, params = make()
    arrays = [np.repeat(x, 2, axis=0) for x in (TOKENS, POSITIONS, SEGMENTS)]
    visible = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), VISIBLE[name])
    wanted = jax.device_get(forward(graphdef, params, *arrays, visible))

    mesh = sharding.make_mesh(dict(fsdp=2, sequence=2, tensor=2), jax.devices())
    layout = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        got = forward(graphdef, params, *jax.device_put((*arrays, visible), layout))
    assert_trees_close(jax.device_get(got), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("visible", [masks.FULL, masks.by_order(np.zeros((1, 160), np.int32))])
def test_later_blocks_are_seen(visible):
    """In a row of more than one block of `blocked_attention`."""
    model = make(context_length=160)
    tokens = np.arange(160, dtype=np.int32)[None] % 13
    arrays = (np.arange(160, dtype=np.int32)[None], np.ones((1, 160), np.int32))
    before, _ = forward(*model, tokens, *arrays, visible)
    tokens[0, -1] = 12
    after, _ = forward(*model, tokens, *arrays, visible)
    assert np.abs(before[0, 0] - after[0, 0]).max() > 1e-4


def test_orders_that_other_kinds_are():
    model = make()
    places = np.arange(12, dtype=np.int32)[None]
    causal = forward(*model, TOKENS, POSITIONS, SEGMENTS)
    in_order = forward(*model, TOKENS, POSITIONS, SEGMENTS, masks.by_order(places))
    assert_trees_close(in_order, causal, rtol=1e-5, atol=1e-6)

    full = forward(*model, TOKENS, POSITIONS, SEGMENTS, masks.FULL)
    no_order = forward(*model, TOKENS, POSITIONS, SEGMENTS, masks.by_order(0 * places))
    assert_trees_close(no_order, full, rtol=1e-5, atol=1e-6)
    assert np.abs(full[0] - causal[0]).max() > 0.1


@pytest.mark.parametrize("visible", [masks.FULL, masks.by_order(PREFIX)])
def test_a_window_looks_back_only(visible):
    with pytest.raises(ValueError, match=f"window = 4: .* kind '{visible.kind}' has no window"):
        forward(*make(window=4), TOKENS, POSITIONS, SEGMENTS, visible)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_packed_documents_are_as_alone(positions):
    model = make(positions=positions)
    packed = forward(*model, TOKENS, POSITIONS, SEGMENTS)

    for part in (slice(0, 5), slice(5, 9)):
        tokens = TOKENS[:, part]
        from_0 = np.arange(tokens.shape[1], dtype=np.int32)[None]
        alone = forward(*model, tokens, from_0, np.ones_like(tokens))
        for got, wanted in zip(alone, packed):
            np.testing.assert_allclose(got, wanted[:, part], rtol=1e-4, atol=1e-5)

    # As one document it is another text, or the test would prove nothing.
    joined = forward(*model, TOKENS, POSITIONS, np.minimum(SEGMENTS, 1))
    assert np.abs(joined[1][:, 5:9] - packed[1][:, 5:9]).max() > 0.1


def test_padding_and_the_other_rows_change_nothing():
    model = make()
    tokens = np.repeat(TOKENS, 2, axis=0)
    positions = np.repeat(POSITIONS, 2, axis=0)
    segments = np.repeat(SEGMENTS, 2, axis=0)
    before = jax.device_get(forward(*model, tokens, positions, segments))

    # Other ids and positions in the first row's padding, and another second row.
    tokens[0, 9:] = [0, 1, 2]
    positions[0, 9:] = [5, 6, 7]
    tokens[1] = 1
    after = jax.device_get(forward(*model, tokens, positions, segments))

    for x, y in zip(before, after):
        np.testing.assert_array_equal(x[0, :9], y[0, :9])
        assert (x[0, 9:] != y[0, 9:]).any()
        assert np.isfinite(y).all()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_heads_are_repeated_heads(kv_heads):
    """Query heads n of 4 attend to kv head n // (4 / K)."""
    graphdef, params = make(num_kv_heads=kv_heads)
    unshared_graphdef, _ = make(num_kv_heads=4)
    attention = params["layers"]["attention"]

    def run_unshared(spread):
        """The outputs of a model with 4 kv heads, which `spread` makes of the shared ones."""
        names = ("key", "value", "key_bias", "value_bias")
        heads = attention | {name: spread(attention[name]) for name in names}
        unshared = params | {"layers": params["layers"] | {"attention": heads}}
        return forward(unshared_graphdef, unshared, TOKENS, POSITIONS, SEGMENTS)

    shared = forward(graphdef, params, TOKENS, POSITIONS, SEGMENTS)
    repeated = run_unshared(lambda heads: np.repeat(heads, 4 // kv_heads, axis=-2))
    for got, wanted in zip(shared, repeated):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)

    # And not kv head n % K.
    if kv_heads == 2:
        tiled = run_unshared(lambda heads: np.concatenate([heads] * 2, axis=-2))
        assert np.abs(tiled[1] - shared[1]).max() > 0.1


# Positions.


def test_rope_turns_pairs_by_the_angles_of_its_paper():
    """Su et al. 2021: pair i of R / 2 turns by position * theta^(-2i / R), a product of complex
    numbers.
    """
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 900, 3, 1]], np.int32)

    angles = positions[:, :, None, None] * 500.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rope(x, positions, 500.0), wanted, atol=2e-4)
    np.testing.assert_array_equal(rope(x, positions, 500.0)[0, 0], x[0, 0])

    # The angles are f32 in any dtype.
    low = x.astype(jnp.bfloat16)
    rounded = rope(low.astype(np.float32), positions, 500.0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rope(low, positions, 500.0), rounded)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turning", [8, 6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_on_a_tpu_and_its_gradient(interleaved, turning, dtype):
    """The matrix units' variant gives the same bits, and a rotation back is the gradient."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 3, 8)), dtype)
    cotangent = jnp.asarray(rng.normal(size=(2, 7, 3, 8)), dtype)
    positions = np.tile(np.arange(7, dtype=np.int32) * 31, (2, 1))
    angles = positions[:, :, None, None] * frequencies(turning, 500.0)
    sin, cos = jnp.sin(angles), jnp.cos(angles)

    plain = functools.partial(rotate, interleaved, sin_BT1P=sin, cos_BT1P=cos)
    by_matmul = functools.partial(rotate_by_matmul, interleaved, sin_BT1P=sin, cos_BT1P=cos)
    np.testing.assert_array_equal(jax.jit(by_matmul)(x), jax.jit(plain)(x))

    with_own_gradient = functools.partial(
        rope, positions_BT=positions, theta=500.0, fraction=turning / 8, interleaved=interleaved
    )
    np.testing.assert_array_equal(with_own_gradient(x), plain(x))
    (grad,) = jax.vjp(with_own_gradient, x)[1](cotangent)
    (wanted,) = jax.vjp(plain, x)[1](cotangent)
    rtol = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        grad.astype(np.float32), wanted.astype(np.float32), rtol=rtol, atol=1e-3
    )


def test_fixed_scalings():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.tile(np.arange(5, dtype=np.int32), (2, 1))
    slower = rope(x, 4 * positions, 500.0, scaling=("linear", 4.0))
    np.testing.assert_allclose(slower, rope(x, positions, 500.0), atol=1e-6)

    # Of 32 pairs the first turns often in 64 positions, and the last doesn't once.
    share = frequencies(64, 1e4, Yarn(4.0, 64.0)) / frequencies(64, 1e4)
    assert share[0] == 1 and share[-1] == pytest.approx(1 / 4)
    assert (np.diff(share) <= 0).all() and len(set(share.round(4))) > 5
    stretched = rope(x, positions, 500.0, scaling=("yarn", 4.0, 64.0, 1.5))
    norm = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(stretched, axis=-1), 1.5 * norm, rtol=1e-5)


def test_scalings_by_the_length_of_a_row():
    """The first row is within the context of 8, the second is not."""
    x = np.random.default_rng(0).normal(size=(2, 3, 1, 4)).astype(np.float32)
    positions = np.array([[0, 3, 7], [0, 3, 15]], np.int32)

    def turned(scaling, positions=positions):
        return np.asarray(rope(x, positions, 16.0, scaling=scaling))

    # The first pair stays, and the last turns slower by 3 * 16 / 8 - 2.
    dynamic, plain = turned(("dynamic", 3.0, 8.0)), turned(())
    np.testing.assert_allclose(dynamic[0], plain[0], atol=1e-6)
    np.testing.assert_allclose(dynamic[1, :, :, ::2], plain[1, :, :, ::2], atol=1e-5)
    slower = turned((), positions / 4)
    np.testing.assert_allclose(dynamic[1, :, :, 1::2], slower[1, :, :, 1::2], atol=1e-5)

    longrope = turned(("longrope", 8.0, 1.0, 1.0, 1.0, 2.0, 2.0))
    np.testing.assert_allclose(longrope[0], plain[0], atol=1e-6)
    np.testing.assert_allclose(longrope[1], turned((), positions / 2)[1], atol=1e-5)


def test_scalings_are_parsed():
    assert parse_scaling((), 8) is None
    assert parse_scaling(("linear", 2.0), 8) == Linear(2.0)
    assert parse_scaling((8.0, 1.0, 4.0, 24), 8) == parse_scaling(("llama3", 8.0, 1.0, 4.0, 24), 8)
    assert parse_scaling(("longrope", 8, 1, 2, 3, 4, 5), 4) == LongRope(8, 1, (2, 3, 4, 5))
    for wrong in (("ntk", 2.0), ("linear",), ("linear", 0.0), ("longrope", 8, 1, 2), (1.0, 2.0)):
        with pytest.raises(ValueError, match="rope_scaling = .*wanted .*'yarn', factor, context"):
            parse_scaling(wrong, 4)


def test_rope_scores_depend_on_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(query_position, key_position):
        turned_q = rope(q, np.array([[query_position]]), 100.0)
        turned_k = rope(k, np.array([[key_position]]), 100.0)
        return float(jnp.vdot(turned_q, turned_k))

    assert score(105, 103) == pytest.approx(score(5, 3), abs=1e-3)
    assert score(2, 0) == pytest.approx(score(5, 3), abs=1e-3)
    assert abs(score(5, 3) - score(3, 5)) > 0.1
    assert abs(score(5, 3) - score(5, 2)) > 0.1


@pytest.mark.parametrize("positions, same", [("rope", True), ("learned", False)])
def test_a_document_that_starts_elsewhere(positions, same):
    model = make(positions=positions)
    tokens, place, segments = TOKENS[:, :5], POSITIONS[:, :5], SEGMENTS[:, :5]

    from_0 = forward(*model, tokens, place, segments)[1]
    from_9 = forward(*model, tokens, place + 9, segments)[1]
    assert (np.abs(from_0 - from_9).max() < 1e-3) == same


# The cache.


def test_cache_slots():
    """The last positions that fit, no slot twice (which write would win?); padding and what comes
    too early go nowhere, which is the slot after the last.
    """
    positions = np.tile(np.arange(10), (3, 1))
    segments = (positions < np.array([[9], [2], [4]])).astype(np.int32)
    slots = cache_slots(positions, segments, 4)
    wanted = [
        [4] * 5 + [1, 2, 3, 0] + [4],
        [0, 1] + [4] * 8,
        [0, 1, 2, 3] + [4] * 6,
    ]
    np.testing.assert_array_equal(slots, wanted)

    one_more_token = cache_slots(np.array([[6]]), np.array([[1]]), 4)
    np.testing.assert_array_equal(one_more_token, [[2]])


@pytest.mark.parametrize(
    "changes", [dict(positions="rope"), dict(positions="learned"), dict(window=3)]
)
def test_one_token_at_a_time_is_the_whole_at_once(changes):
    graphdef, params = make(**changes)
    tokens = np.stack([TOKENS[0], TOKENS[0][::-1]])
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    whole = forward(graphdef, params, tokens, positions, np.ones_like(tokens))

    # [L, B, K, slots, H]: a window needs no more slots than it is wide.
    cache = nnx.merge(graphdef, params).init_cache(2, 14)
    assert jax.tree.leaves(cache)[0].shape == (2, 2, 2, changes.get("window", 14), 8)

    for t in range(12):
        token, position = tokens[:, t : t + 1], positions[:, t : t + 1]
        *outputs, cache = cached_forward(graphdef, params, cache, token, position, decode=True)
        for x, y in zip(outputs, whole):
            np.testing.assert_allclose(x[:, 0], y[:, t], rtol=1e-4, atol=1e-5, err_msg=f"token {t}")


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_prefill_of_unequal_prompts_then_one_token_at_a_time(positions):
    """Prompts padded on the right by tokens that must never be seen, though their keys are in the
    cache for a while.
    """
    graphdef, params = make(positions=positions)
    tokens = np.stack([TOKENS[0], TOKENS[0][::-1], np.roll(TOKENS[0], 4)])
    lengths = np.array([7, 3, 1])
    place = np.tile(np.arange(12, dtype=np.int32), (3, 1))
    whole = jax.device_get(forward(graphdef, params, tokens, place, np.ones_like(tokens))[1])

    prompts = np.where(place < lengths[:, None], tokens, 6)[:, :7]
    cache = nnx.merge(graphdef, params).init_cache(3, 12)
    model = (graphdef, params)
    _, logits, cache = cached_forward(*model, cache, prompts, place[:, :7], decode=False)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], whole[row, :length], rtol=1e-4, atol=1e-5)

    # Each row goes on after its own prompt, and writes over its padding's keys.
    for t in range(5):
        position = (lengths + t)[:, None].astype(np.int32)
        next_tokens = np.take_along_axis(tokens, position, axis=1)
        _, logits, cache = cached_forward(*model, cache, next_tokens, position, decode=True)

        wanted = np.take_along_axis(whole, position[..., None], axis=1)
        np.testing.assert_allclose(
            logits[:, 0], wanted[:, 0], rtol=1e-4, atol=1e-5, err_msg=f"token {t}"
        )


def test_the_model_has_no_hidden_state():
    """Two calls with the same arguments give the same bits, whatever was called between."""
    graphdef, params = make()
    model = nnx.merge(graphdef, params)

    def call(tokens):
        return np.asarray(model(tokens, POSITIONS, SEGMENTS).hidden)

    first = call(TOKENS)
    assert (call(TOKENS[:, ::-1]) != first).any()
    np.testing.assert_array_equal(call(TOKENS), first)
    assert jax.tree.leaves(nnx.split(model, nnx.Param, ...)[2]) == []


# Kernels.


@pytest.mark.parametrize(
    "kv_heads, dtype, tolerance",
    [(4, jnp.float32, 2e-5), (2, jnp.float32, 2e-5), (1, jnp.bfloat16, 3e-2)],
)
def test_blocks_are_the_whole(kv_heads, dtype, tolerance):
    """Values and gradients of `blocked_attention` for lengths that blocks fill or don't, against
    JAX's attention under the same mask.
    """
    rng = np.random.default_rng(0)
    for length, block, max_blocks in ((48, 16, 8), (50, 16, 8), (50, 4, 3), (20, 128, 8)):
        q, k, v = draw_qkv(rng, length, kv_heads, dtype)
        segments = np.sort(rng.integers(0, 4, (2, length)), axis=1).astype(np.int32)
        mask = causal_mask(segments)
        weights = rng.normal(size=q.shape).astype(np.float32)

        plain = functools.partial(
            jax.nn.dot_product_attention, mask=mask[:, None], implementation="xla"
        )
        blocked = functools.partial(
            blocked_attention, mask_BTS=mask, causal=True, blocks=(block, max_blocks)
        )
        # JAX's attention promotes bfloat16 by itself.
        with jax.numpy_dtype_promotion("standard"):
            wanted = weighted_value_and_grads(plain, weights, q, k, v)
        got = weighted_value_and_grads(blocked, weights, q, k, v)

        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
            x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
            error = np.linalg.norm(x - y)
            assert error <= tolerance * max(np.linalg.norm(y), 1), (length, block)


def weighted_value_and_grads(attend, weights, q, k, v):
    """The weighted sum of `attend(q, k, v)`, and its gradients with respect to all three."""

    def weighted_sum(q, k, v):
        return jnp.sum(weights * attend(q, k, v).astype(jnp.float32))

    return jax.jit(jax.value_and_grad(weighted_sum, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize(
    "kv_heads, kind, window",
    [
        (2, "window", 100),
        slow(2, "full", 0),
        slow(2, "causal", 0),
        slow(1, "causal", 0),
        slow(4, "causal", 0),
    ],
)
def test_splash_is_xla(kv_heads, kind, window):
    """The TPU kernel's program, interpreted: values and gradients of packed rows of two tiles,
    under no mesh and on one.
    """
    rng = np.random.default_rng(0)
    q, k, v = draw_qkv(rng, 256, kv_heads)
    segments = np.repeat(np.array([[1, 1, 2, 0], [1, 2, 2, 3]], np.int32), 64, axis=1)
    # What padding attends to has no meaning.
    weights = rng.normal(size=q.shape).astype(np.float32) * (segments > 0)[:, :, None, None]

    visible = masks.FULL if kind == "full" else masks.CAUSAL
    mask = masks.array(visible, segments, None, window)[:, None]
    plain = functools.partial(jax.nn.dot_product_attention, mask=mask)
    wanted = weighted_value_and_grads(plain, weights, q, k, v)

    # Rows are split, then heads too, by fewer or by as many devices as there are kv heads.
    meshes = [
        {},
        dict(fsdp=2),
        dict(fsdp=2, sequence=min(kv_heads, 2)),
        dict(tensor=min(kv_heads, 2), sequence=max(kv_heads // 2, 1)),
    ]
    splash = functools.partial(
        splash_attention,
        segments_BT=segments,
        kind=kind,
        window=window,
        block=128,
        interpret=True,
    )
    for sizes in meshes:
        num_devices = int(np.prod(list(sizes.values()), dtype=int))
        with jax.set_mesh(sharding.make_mesh(sizes, jax.devices()[:num_devices])):
            got = weighted_value_and_grads(splash, weights, q, k, v)
        assert_trees_close(got, wanted, rtol=1e-4, atol=2e-5)


def test_splash_lengths():
    x = np.zeros((1, 192, 1, 16), np.float32)
    with pytest.raises(ValueError, match="config.data.length = 192.*needs a multiple of"):
        splash_attention(x, x, x, np.ones((1, 192), np.int32))
