"""The matmul with its own backward rule, and the norms' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm.nn.layers import add_bias, dense, param


def _operands(spec):
    sizes = dict(b=2, t=3, d=8, f=16, n=2, h=4, v=11)
    a, b = spec.split("->")[0].split(",")
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], [sizes[c] for c in a])
    weight = param(keys[1], [sizes[c] for c in b], ["embed"] * len(b), jnp.float32, std=1.0)
    return x, weight


@pytest.mark.parametrize(
    "spec",
    ["btd,df->btf", "btd,dnh->btnh", "btnh,nhd->btd", "btf,fd->btd", "btd,vd->btv", "bd,vd->bv"],
)
def test_dense_is_einsum(spec):
    """Value and both gradients, in f32."""
    x, weight = _operands(spec)
    ours = lambda x, w: jnp.sum(
        jnp.sin(
            dense(
                spec,
                x,
                nnx.Param(w, logical_axes=weight.get_metadata("logical_axes")),
                jnp.float32,
                "y",
            )
        )
    )
    plain = lambda x, w: jnp.sum(jnp.sin(jnp.einsum(spec, x, w)))
    got, wanted = (jax.value_and_grad(f, argnums=(0, 1))(x, weight[...]) for f in (ours, plain))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, wanted)


def test_weight_gradient_is_not_rounded():
    """In bf16 the gradient of an f32 view of the weight has more bits than bf16; x's gradient has
    x's dtype.
    """
    x, weight = _operands("btd,df->btf")
    x = x.astype(jnp.bfloat16)
    f = lambda x, w: jnp.sum(
        dense(
            "btd,df->btf", x, nnx.Param(w, logical_axes=("embed", "mlp")), jnp.bfloat16, "y"
        ).astype(jnp.float32)
        ** 2
    )
    x_grad, w_grad = jax.grad(f, argnums=(0, 1))(x, weight[...])
    assert x_grad.dtype == jnp.bfloat16 and w_grad.dtype == jnp.float32
    assert np.any(np.asarray(w_grad) != np.asarray(w_grad.astype(jnp.bfloat16).astype(jnp.float32)))


def test_bias_gradient_is_summed_in_f32():
    """4,096 slopes of 1 + 1/128 in bf16. XLA may sum bf16 in f32 by itself; here it is asked to."""
    x = jnp.zeros((4, 1024, 2, 3), jnp.bfloat16)
    bias = jnp.zeros((2, 3), jnp.float32)
    f = lambda b: jnp.sum(
        add_bias(x, nnx.Param(b, logical_axes=("heads", "head_dim_bias")))
        * jnp.bfloat16(1 + 1 / 128),
        dtype=jnp.float32,
    )
    grad = jax.grad(f)(bias)
    np.testing.assert_allclose(grad, 4096 * (1 + 1 / 128), rtol=2**-8)
    text = str(jax.make_jaxpr(jax.grad(f))(bias))
    assert "f32[2,3] = reduce_sum" in text and "bf16[2,3] = reduce_sum" not in text
