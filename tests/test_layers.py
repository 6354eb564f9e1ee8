"""The matmul with its own backward rule, and biases, against einsum and sums in f32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.nn.layers import Head, add_bias, dense, dropout, param
from tests.helpers import assert_trees_close

SIZES = dict(b=2, t=3, d=8, f=16, n=2, h=4, v=11)


def draw_operands(spec):
    """An input, and a parameter with its logical axes, of the shapes that an einsum asks for."""
    x_letters, w_letters = spec.split("->")[0].split(",")
    x_key, w_key = jax.random.split(jax.random.key(0), 2)

    x = jax.random.normal(x_key, [SIZES[letter] for letter in x_letters])
    w_shape = [SIZES[letter] for letter in w_letters]
    weight = param(w_key, w_shape, ["embed"] * len(w_shape), jnp.float32, std=1.0)
    return x, weight


@pytest.mark.parametrize(
    "spec",
    ["btd,df->btf", "btd,dnh->btnh", "btnh,nhd->btd", "btf,fd->btd", "btd,vd->btv", "bd,vd->bv"],
)
def test_dense_is_einsum(spec):
    """Value and both gradients, in f32."""
    x, weight = draw_operands(spec)
    logical_axes = weight.get_metadata("logical_axes")

    # The sine makes the cotangent that reaches the matmul differ at every position.
    def dense_sum(x, w):
        product = dense(spec, x, nnx.Param(w, logical_axes=logical_axes), jnp.float32, "y")
        return jnp.sum(jnp.sin(product))

    def einsum_sum(x, w):
        return jnp.sum(jnp.sin(jnp.einsum(spec, x, w)))

    got = jax.value_and_grad(dense_sum, argnums=(0, 1))(x, weight[...])
    wanted = jax.value_and_grad(einsum_sum, argnums=(0, 1))(x, weight[...])
    assert_trees_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_weight_gradient_is_not_rounded():
    """In bf16 the gradient of an f32 view of the weight has more bits than bf16; x's gradient has
    x's dtype.
    """
    x, weight = draw_operands("btd,df->btf")

    def loss(x, w):
        w = nnx.Param(w, logical_axes=("embed", "mlp"))
        y = dense("btd,df->btf", x, w, jnp.bfloat16, "y")
        return jnp.sum(y.astype(jnp.float32) ** 2)

    x_grad, w_grad = jax.grad(loss, argnums=(0, 1))(x.astype(jnp.bfloat16), weight[...])

    assert x_grad.dtype == jnp.bfloat16
    assert w_grad.dtype == jnp.float32
    rounded = w_grad.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.any(np.asarray(w_grad) != np.asarray(rounded))


def test_bias_gradient_is_summed_in_f32():
    """4,096 terms of 1 + 1/128 in bf16. XLA may sum bf16 in f32 by itself; here it is asked to."""
    x = jnp.zeros((4, 1024, 2, 3), jnp.bfloat16)
    bias = jnp.zeros((2, 3), jnp.float32)

    def total(bias):
        y = add_bias(x, nnx.Param(bias, logical_axes=("heads", "head_dim_bias")))
        return jnp.sum(y * jnp.bfloat16(1 + 1 / 128), dtype=jnp.float32)

    grad = jax.grad(total)(bias)
    np.testing.assert_allclose(grad, 4096 * (1 + 1 / 128), rtol=2**-8)

    # The value could be right by luck of the backend: the program must ask for the f32 sum.
    text = str(jax.make_jaxpr(jax.grad(total))(bias))
    assert "f32[2,3] = reduce_sum" in text
    assert "bf16[2,3] = reduce_sum" not in text


def test_the_mean_over_dropout_is_none():
    """Of a linear model over many keys; a share of the values is 0, each row's by its own key."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    head = Head(jax.random.key(1), 16, 4, std=1.0, dtype=jnp.float32, compute_dtype=jnp.float32)

    @jax.jit
    @jax.vmap
    def outputs(key):
        dropped = dropout(x, 0.25, jax.random.split(key, 2))
        return head(dropped), dropped == 0

    values, are_zero = outputs(jax.random.split(jax.random.key(2), 4000))
    spread = values.std(axis=0) / 4000**0.5
    assert (np.abs(values.mean(axis=0) - head(x)) < 5 * spread).all()
    assert are_zero.mean() == pytest.approx(0.25, abs=0.01)
    assert (are_zero[:, 0] != are_zero[:, 1]).any() and (are_zero[0] != are_zero[1]).any()
    assert dropout(x, 0.25, None) is dropout(x, 0.0, jax.random.split(jax.random.key(0))) is x
