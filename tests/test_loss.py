"""The chunked vocabulary loss is the plain one: value, terms and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_transformer import config as make_config

from lm.models.transformer import Transformer
from lm.objectives import causal


def gradients(config, chunk, z_loss, scale=1.0):
    graphdef, params = nnx.split(Transformer(config, jax.random.key(0)), nnx.Param)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (2, 3, 16)).astype(np.int32)
    batch = dict(
        tokens=ids[0],
        targets=ids[1],
        weights=(rng.random((3, 16)) < 0.7).astype(np.float32),
        positions=np.broadcast_to(np.arange(16, dtype=np.int32), (3, 16)),
        segments=np.ones((3, 16), np.int32),
    )
    params = jax.tree.map(lambda p: p.astype(jnp.float32), nnx.to_pure_dict(params))

    def loss(params):
        total, count, terms = causal.make_loss(z_loss=z_loss, chunk=chunk)(
            nnx.merge(graphdef, params), batch, None
        )
        return scale * total, (count, terms)

    # jax's attention mixes f32 and bf16 in its gradient
    with jax.numpy_dtype_promotion("standard"):
        (value, (count, terms)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, count, terms, grads


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunks_are_the_whole(chunk, tied):
    config = make_config(tie_embeddings=tied, vocab_size=37)
    value, count, terms, grads = gradients(config, 0, 0.1, scale=3.0)
    other_value, other_count, other_terms, other_grads = gradients(config, chunk, 0.1, scale=3.0)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    assert other_count == count
    for name in terms:
        np.testing.assert_allclose(other_terms[name], terms[name], rtol=1e-6)
    for ours, wanted in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads)):
        np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=2e-6)


def test_bf16_is_as_close_as_the_plain_loss():
    """Both round the logits' slopes once; against the f32 gradient, chunks lose no more than the
    whole does (with a tenth to spare).
    """
    exact = gradients(make_config(vocab_size=37), 0, 0.0)[3]
    error = lambda grads: np.sqrt(
        sum(
            np.sum((np.asarray(a) - np.asarray(b)) ** 2)
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact))
        )
    )
    plain, chunked = (
        error(gradients(make_config(vocab_size=37, compute_dtype="bfloat16"), chunk, 0.0)[3])
        for chunk in (0, 4)
    )
    assert 0 < chunked < 1.1 * plain


def test_the_value_alone_needs_no_gradient():
    config = make_config(vocab_size=37)
    graphdef, params = nnx.split(Transformer(config, jax.random.key(0)), nnx.Param)
    ids = np.arange(32, dtype=np.int32).reshape(2, 16)
    batch = dict(
        tokens=ids,
        targets=ids,
        weights=np.ones((2, 16), np.float32),
        positions=ids % 16,
        segments=ids * 0 + 1,
    )
    values = [
        causal.make_loss(z_loss=0.1, chunk=chunk)(nnx.merge(graphdef, params), batch, None)[0]
        for chunk in (0, 8)
    ]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)


def test_chunks_must_divide_the_row():
    with pytest.raises(
        ValueError, match="config.objective.chunk = 5 must divide the row's 16 positions"
    ):
        gradients(make_config(vocab_size=37), 5, 0.0)
