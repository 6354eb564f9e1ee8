"""Attention: who sees whom, positions, shared heads, and the cache against the whole sequence at
once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import config as config_lib
from lm import sharding
from lm.models.transformer import Config, Transformer
from lm.nn.attention import (
    blocked_attention,
    cache_mask,
    cache_slots,
    causal_mask,
    splash_attention,
)
from lm.nn.positions import frequencies, rope, turn_by_matmul, turn_pairs

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
jit = functools.partial(jax.jit, compiler_options=QUICK)

# Two documents, and padding at the end of the row.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], np.int32)
# each once, so that a row of the table is a position
TOKENS = np.array([[7, 3, 9, 1, 12, 0, 5, 8, 2, 11, 4, 10]], np.int32)


@functools.cache
def make(**changes):
    """(graphdef, params) of a small model whose weights are large enough for attention to choose,
    and whose biases are not 0.
    """
    fields = (
        config_lib.default().model.to_dict()
        | dict(
            vocab_size=13,
            context_length=16,
            num_layers=2,
            embed_dim=32,
            mlp_dim=48,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            gated_mlp=True,
            bias="qkv,out,mlp,norm",
            tie_embeddings=False,
            param_dtype="float32",
            compute_dtype="float32",
        )
        | changes
    )
    del fields["type"]
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Transformer(Config(**fields), jax.random.key(0))), nnx.Param
    )
    rng = np.random.default_rng(0)
    draw = lambda path, p: (
        rng.normal(0, 0.3, p.shape) + ("scale" in jax.tree_util.keystr(path))
    ).astype(np.float32)
    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(params))


def forward(graphdef, params, tokens, positions, segments):
    """(hidden, logits)."""
    model = nnx.merge(graphdef, params)
    hidden = model(tokens, positions, segments).hidden
    return hidden, model.logits(hidden)


def run(model, tokens, positions, segments):
    return jax.device_get(
        jit(functools.partial(forward, model[0]))(model[1], tokens, positions, segments)
    )


def test_masks():
    segments = np.array([[1, 1, 2, 0, 0], [1, 2, 2, 2, 2]], np.int32)
    allowed = [
        [[s <= t and row[s] == row[t] for s in range(5)] for t in range(5)] for row in segments
    ]
    np.testing.assert_array_equal(causal_mask(segments), allowed)
    positions = np.array([[0, 2], [3, 1]], np.int32)
    np.testing.assert_array_equal(
        cache_mask(positions, 4), [[[s <= p for s in range(4)] for p in row] for row in positions]
    )


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("output", [0, 1])
def test_gradients_reach_exactly_the_earlier_tokens_of_the_same_document(positions, output):
    """Zero, not small, with respect to later tokens, other documents and padding; nonzero with
    respect to all others.
    """
    graphdef, params = make(positions=positions)
    weights = jax.random.normal(jax.random.key(1), (32 if output == 0 else 13,))

    def outputs(table):
        return (
            forward(graphdef, params | {"embed": {"table": table}}, TOKENS, POSITIONS, SEGMENTS)[
                output
            ][0]
            @ weights
        )

    jacobian = jit(jax.jacrev(outputs))(params["embed"]["table"])[:, TOKENS[0]]
    reached = np.abs(np.asarray(jacobian)).max(axis=-1)
    allowed = np.tril(SEGMENTS[0][:, None] == SEGMENTS[0][None, :])
    assert (reached[allowed] > 1e-4).all()
    assert (reached[~allowed] == 0).all()


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_packed_documents_are_as_alone(positions):
    model = make(positions=positions)
    packed = run(model, TOKENS, POSITIONS, SEGMENTS)
    for part in (slice(0, 5), slice(5, 9)):
        tokens = TOKENS[:, part]
        alone = run(
            model, tokens, np.arange(tokens.shape[1], dtype=np.int32)[None], np.ones_like(tokens)
        )
        for got, wanted in zip(alone, packed):
            np.testing.assert_allclose(got, wanted[:, part], rtol=1e-4, atol=1e-5)
    # as one document it is another text
    joined = run(model, TOKENS, POSITIONS, np.minimum(SEGMENTS, 1))
    assert np.abs(joined[1][:, 5:9] - packed[1][:, 5:9]).max() > 0.1


def test_padding_and_the_other_rows_change_nothing():
    model = make()
    tokens, positions, segments = (np.repeat(x, 2, axis=0) for x in (TOKENS, POSITIONS, SEGMENTS))
    before = run(model, tokens, positions, segments)
    tokens[0, 9:], positions[0, 9:], tokens[1] = [0, 1, 2], [5, 6, 7], 1
    after = run(model, tokens, positions, segments)
    for x, y in zip(before, after):
        np.testing.assert_array_equal(x[0, :9], y[0, :9])
        assert (x[0, 9:] != y[0, 9:]).any() and np.isfinite(y).all()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shared_heads_are_repeated_heads(kv_heads):
    """Query heads n of 4 attend to kv head n // (4 / K)."""
    graphdef, params = make(num_kv_heads=kv_heads)
    whole_graphdef, whole = make(num_kv_heads=4)
    attention = params["layers"]["attention"]
    repeated = {
        name: np.repeat(attention[name], 4 // kv_heads, axis=-2)
        for name in ("key", "value", "key_bias", "value_bias")
    }
    whole = params | {"layers": params["layers"] | {"attention": attention | repeated}}
    shared = run((graphdef, params), TOKENS, POSITIONS, SEGMENTS)
    for got, wanted in zip(shared, run((whole_graphdef, whole), TOKENS, POSITIONS, SEGMENTS)):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    if kv_heads == 2:  # and not kv head n % K
        tiled = {name: np.concatenate([attention[name]] * 2, axis=-2) for name in repeated}
        whole["layers"]["attention"] = attention | tiled
        assert (
            np.abs(run((whole_graphdef, whole), TOKENS, POSITIONS, SEGMENTS)[1] - shared[1]).max()
            > 0.1
        )


def test_rope_turns_pairs_by_the_angles_of_its_paper():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 900, 3, 1]], np.int32)
    angles = positions[:, :, None, None] * 500.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    np.testing.assert_allclose(
        rope(x, positions, 500.0), np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-4
    )
    np.testing.assert_array_equal(rope(x, positions, 500.0)[0, 0], x[0, 0])
    low = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        rope(low, positions, 500.0),
        rope(low.astype(np.float32), positions, 500.0).astype(jnp.bfloat16),
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turning", [8, 6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_on_a_tpu_and_its_gradient(interleaved, turning, dtype):
    """The way of the matrix units gives the same bits, and a rotation back is the gradient."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(2, 7, 3, 8)), dtype) for _ in range(2))
    positions = np.tile(np.arange(7, dtype=np.int32) * 31, (2, 1))
    angles = positions[:, :, None, None] * frequencies(turning, 500.0)
    ways = [
        functools.partial(way, interleaved, sin_BT1R=jnp.sin(angles), cos_BT1R=jnp.cos(angles))
        for way in (turn_by_matmul, turn_pairs)
    ]
    np.testing.assert_array_equal(*(jit(way)(x) for way in ways))
    ours = functools.partial(
        rope, positions_BT=positions, theta=500.0, fraction=turning / 8, interleaved=interleaved
    )
    np.testing.assert_array_equal(ours(x), ways[1](x))
    grads = (jax.vjp(f, x)[1](g)[0].astype(np.float32) for f in (ours, ways[1]))
    np.testing.assert_allclose(*grads, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-3)


def test_cache_slots():
    """The last positions that fit, no slot twice (which write would win?); padding and what comes
    too early go nowhere.
    """
    positions = np.tile(np.arange(10), (3, 1))
    segments = (positions < np.array([[9], [2], [4]])).astype(np.int32)
    slots = cache_slots(positions, segments, 4)
    np.testing.assert_array_equal(
        slots, [[4] * 5 + [1, 2, 3, 0] + [4], [0, 1] + [4] * 8, [0, 1, 2, 3] + [4] * 6]
    )
    # one more token
    np.testing.assert_array_equal(cache_slots(np.array([[6]]), np.array([[1]]), 4), [[2]])


def test_rope_scores_depend_on_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)
    score = lambda t, s: float(
        jnp.vdot(rope(q, np.array([[t]]), 100.0), rope(k, np.array([[s]]), 100.0))
    )
    assert (
        score(5, 3)
        == pytest.approx(score(105, 103), abs=1e-3)
        == pytest.approx(score(2, 0), abs=1e-3)
    )
    assert abs(score(5, 3) - score(3, 5)) > 0.1 and abs(score(5, 3) - score(5, 2)) > 0.1


@pytest.mark.parametrize("positions, same", [("rope", True), ("learned", False)])
def test_a_document_that_starts_elsewhere(positions, same):
    model = make(positions=positions)
    arguments = TOKENS[:, :5], POSITIONS[:, :5], SEGMENTS[:, :5]
    here, there = (
        run(model, *arguments)[1],
        run(model, arguments[0], arguments[1] + 9, arguments[2])[1],
    )
    assert (np.abs(here - there).max() < 1e-3) == same


@pytest.mark.parametrize(
    "changes", [dict(positions="rope"), dict(positions="learned"), dict(window=3)]
)
def test_one_token_at_a_time_is_the_whole_at_once(changes):
    graphdef, params = make(**changes)
    tokens = np.stack([TOKENS[0], TOKENS[0][::-1]])
    place = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    whole = run((graphdef, params), tokens, place, np.ones_like(tokens))

    @jit
    def decode(params, cache, tokens, place):
        model = nnx.merge(graphdef, params)
        output = model(tokens, place, jnp.ones_like(tokens), cache=cache)
        return output.hidden, model.logits(output.hidden), output.cache

    cache = nnx.merge(graphdef, params).init_cache(2, 14)
    assert jax.tree.leaves(cache)[0].shape == (2, 2, 2, changes.get("window", 14), 8)
    for t in range(12):
        *got, cache = decode(params, cache, tokens[:, t : t + 1], place[:, t : t + 1])
        for x, y in zip(got, whole):
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
    whole = run((graphdef, params), tokens, place, np.ones_like(tokens))[1]

    @jit
    def step(params, cache, tokens, place):
        model = nnx.merge(graphdef, params)
        output = model(tokens, place, jnp.ones_like(tokens), cache=cache)
        return model.logits(output.hidden), output.cache

    prompts = np.where(place < lengths[:, None], tokens, 6)[:, :7]
    logits, cache = step(
        params, nnx.merge(graphdef, params).init_cache(3, 12), prompts, place[:, :7]
    )
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], whole[row, :length], rtol=1e-4, atol=1e-5)
    for t in range(5):
        at = (lengths + t)[:, None].astype(np.int32)
        logits, cache = step(params, cache, np.take_along_axis(tokens, at, axis=1), at)
        np.testing.assert_allclose(
            logits[:, 0],
            np.take_along_axis(whole, at[..., None], axis=1)[:, 0],
            rtol=1e-4,
            atol=1e-5,
            err_msg=f"token {t}",
        )


def test_the_model_has_no_hidden_state():
    """Two calls with the same arguments give the same bits, whatever was called between."""
    graphdef, params = make()
    model = nnx.merge(graphdef, params)
    call = lambda tokens: np.asarray(model(tokens, POSITIONS, SEGMENTS).hidden)
    first = call(TOKENS)
    assert (call(TOKENS[:, ::-1]) != first).any()
    np.testing.assert_array_equal(call(TOKENS), first)
    assert jax.tree.leaves(nnx.split(model, nnx.Param, ...)[2]) == []


@pytest.mark.parametrize(
    "kv_heads, dtype, tolerance",
    [(4, jnp.float32, 2e-5), (2, jnp.float32, 2e-5), (1, jnp.bfloat16, 3e-2)],
)
def test_blocks_are_the_whole(kv_heads, dtype, tolerance):
    """Values and gradients of `blocked_attention` for lengths that blocks fill or don't, against
    JAX's attention under the same mask.
    """
    rng = np.random.default_rng(0)
    for length, block, most in ((48, 16, 8), (50, 16, 8), (50, 4, 3), (20, 128, 8)):
        q, k, v = (
            rng.normal(size=(2, length, heads, 16)).astype(np.float32).astype(dtype)
            for heads in (4, kv_heads, kv_heads)
        )
        segments = np.sort(rng.integers(0, 4, (2, length)), axis=1).astype(np.int32)
        weights = rng.normal(size=q.shape).astype(np.float32)
        mask = causal_mask(segments)
        value = lambda attend: jax.jit(
            jax.value_and_grad(
                lambda *qkv: jnp.sum(weights * attend(*qkv).astype(jnp.float32)),  # noqa: B023
                argnums=(0, 1, 2),
            )
        )(q, k, v)  # noqa: B023
        with jax.numpy_dtype_promotion("standard"):
            wanted = value(
                lambda *qkv: jax.nn.dot_product_attention(
                    *qkv,
                    mask=mask[:, None],  # noqa: B023
                    implementation="xla",
                )
            )
        found = value(functools.partial(blocked_attention, mask_BTT=mask, block=block, most=most))
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
            assert np.linalg.norm(ours - theirs) <= tolerance * max(np.linalg.norm(theirs), 1), (
                length,
                block,
            )


@pytest.mark.parametrize("kv_heads, window", [(4, 0), (2, 0), (1, 0), (2, 100)])
def test_splash_is_xla(kv_heads, window):
    """The TPU kernel's program, interpreted: values and gradients of packed rows of two tiles,
    under no mesh and on one.
    """
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(2, 256, heads, 16)).astype(np.float32) for heads in (4, kv_heads, kv_heads)
    )
    segments = np.repeat(np.array([[1, 1, 2, 0], [1, 2, 2, 3]], np.int32), 64, axis=1)
    weights = rng.normal(size=q.shape).astype(np.float32) * (segments > 0)[:, :, None, None]

    def xla(q, k, v):
        return jnp.sum(
            weights
            * jax.nn.dot_product_attention(q, k, v, mask=causal_mask(segments, window)[:, None])
        )

    def ours(q, k, v):
        return jnp.sum(
            weights * splash_attention(q, k, v, segments, window=window, block=128, interpret=True)
        )

    wanted = jax.value_and_grad(xla, argnums=(0, 1, 2))(q, k, v)
    meshes = [
        {},
        dict(fsdp=2),
        dict(fsdp=2, sequence=min(kv_heads, 2)),
        dict(tensor=min(kv_heads, 2), sequence=max(kv_heads // 2, 1)),
    ]
    for sizes in meshes:
        mesh = sharding.make_mesh(
            sizes, jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))]
        )
        with jax.set_mesh(mesh):
            found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(q, k, v)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), found, wanted
        )


def test_splash_lengths():
    x = np.zeros((1, 192, 1, 16), np.float32)
    with pytest.raises(ValueError, match="config.data.length = 192.*needs a multiple of"):
        splash_attention(x, x, x, np.ones((1, 192), np.int32))
