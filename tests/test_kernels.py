"""What backends get instead of the plain text gives what the plain text gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn.kernels import attention, cache, matmul

RANDOM = np.random.default_rng(0)


def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(RANDOM.normal(size=shape), dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length, block, max_blocks", [(32, 8, 8), (30, 8, 8), (40, 4, 3)])
def test_blocked_attention(length, block, max_blocks, causal):
    """Blocks that fill the row or don't, and the least number of them, with shared heads."""
    q = draw(2, length, 4, 8)
    k, v = draw(2, length, 2, 8), draw(2, length, 2, 8)
    mask = (RANDOM.random((2, length, length)) < 0.7) | np.eye(length, dtype=bool)
    if causal:
        mask = np.tril(mask)

    # One for both rows, as by distances, or one for each.
    for bias in (None, draw(1, 4, length, length), draw(2, 4, length, length)):
        blocked = attention.blocked_attention(
            q, k, v, mask, causal=causal, bias_BNTS=bias, blocks=(block, max_blocks)
        )
        plain = attention.plain_attention(q, k, v, mask, bias)
        np.testing.assert_allclose(blocked, plain, rtol=1e-5, atol=1e-6)


def test_blocked_attention_to_another_text():
    q, k, v = draw(2, 30, 4, 8), draw(2, 11, 2, 8), draw(2, 11, 2, 8)
    mask = (RANDOM.random((2, 30, 11)) < 0.7) | (np.arange(11) == 0)
    blocked = attention.blocked_attention(q, k, v, mask, causal=False, blocks=(8, 8))
    plain = attention.plain_attention(q, k, v, mask)
    np.testing.assert_allclose(blocked, plain, rtol=1e-5, atol=1e-6)


def test_plain_attention_is_jax_s():
    q, k, v = draw(2, 6, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8)
    mask = RANDOM.random((2, 6, 9)) < 0.8
    mask[:, :, 0] = True

    for bias in (None, draw(2, 4, 6, 9)):
        plain = attention.plain_attention(q, k, v, mask, bias)
        wanted = jax.nn.dot_product_attention(q, k, v, bias, mask[:, None])
        np.testing.assert_allclose(plain, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cache_write(dtype):
    """Slots in any order; slot 7 is none, and what goes there is dropped. NaNs keep their bits."""
    old = draw(2, 3, 7, 4, dtype=dtype).at[0, 0, 0, 0].set(jnp.nan)
    new = draw(2, 4, 3, 4)
    slots = np.array([[5, 7, 0, 2], [7, 7, 6, 1]])

    written = cache.write(old, new, slots)
    plain = cache.plain_write(old, new, slots)
    assert written.dtype == plain.dtype == dtype
    np.testing.assert_array_equal(np.asarray(written), np.asarray(plain))
    untouched = np.asarray(written)[1, :, [0, 2, 3, 4, 5]]
    np.testing.assert_array_equal(untouched, np.asarray(old)[1, :, [0, 2, 3, 4, 5]])


@pytest.mark.parametrize("spec, shape", [("btd,df->btf", (8, 6)), ("btd,dij->btij", (8, 3, 2))])
@pytest.mark.parametrize("rows", [2, 16])
def test_weight_grad(spec, shape, rows):
    """Both of a weight's gradients on CPU: the smaller operand is x, or the output's gradient."""
    x, weight = draw(rows, 5, 8), draw(*shape)
    grad = draw(*jnp.einsum(spec, x, weight).shape)

    _, vjp = jax.vjp(lambda w: jnp.einsum(spec, x, w), weight)
    found = jax.jit(matmul.weight_grad, static_argnums=0)(spec, x, grad)
    np.testing.assert_allclose(found, vjp(grad)[0], rtol=1e-5, atol=1e-5)
