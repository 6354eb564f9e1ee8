"""Products of groups of rows with a matrix each, in every variant that a platform uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import moe
from lm.nn.kernels import grouped_matmul as kernels

RNG = np.random.default_rng(0)
# How many of 256 or 300 rows each of 4 groups has: an empty group, rows of no group, one group with
# all rows, no rows at all, and groups smaller than a block.
SIZES = [[100, 0, 120, 36], [90, 0, 60, 0], [256, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 250]]

# The contracted dims and the groups' dim of XLA's own ragged product, which every platform has, for
# each of lm's products.
RAGGED_DIMS = dict(
    plain=(((1,), (1,)), [0]),
    transposed=(((1,), (2,)), [0]),
    weights=(((0,), (0,)), []),
)


def ragged_reference(x, y, sizes, product):
    """A product of `RAGGED_DIMS` by XLA's own ragged dot."""
    contracted, group = RAGGED_DIMS[product]
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group,
    )
    return jax.lax.ragged_dot_general(x, y, sizes, numbers)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [256, 300])
def test_products(sizes, rows):
    """By blocks (CPU), by the TPU's kernel, and as XLA has it."""
    x = draw(rows, 48)
    g = draw(rows, 64)
    w = draw(4, 48, 64)
    used = sum(sizes)
    sizes = jnp.array(sizes, jnp.int32)

    # Rows of no group come last and have no meaning.
    plain = kernels.grouped_matmul(x, w, sizes, jnp.float32)
    assert_close(plain[:used], ragged_reference(x, w, sizes, "plain")[:used])
    transposed = kernels.grouped_matmul(g, w, sizes, jnp.float32, transposed=True)
    assert_close(transposed[:used], ragged_reference(g, w, sizes, "transposed")[:used])

    wanted = ragged_reference(x, g, sizes, "weights")
    assert_close(kernels.grouped_weight_grad(x, g, sizes), wanted)
    assert_close(kernels.weight_grad_kernel(x, g, sizes, interpret=True), wanted)


def test_few_rows_of_many_groups():
    """As when decoding: fewer rows than experts."""
    x = draw(3, 16)
    w = draw(50, 16, 8)
    sizes = jnp.zeros(50, jnp.int32).at[jnp.array([4, 49])].set(jnp.array([2, 1]))

    got = kernels.grouped_matmul(x, w, sizes, jnp.float32)
    wanted = [*(x[:2] @ w[4]), x[2] @ w[49]]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_weight_gradient_is_not_rounded():
    """In bf16 the gradient of an f32 view of the weights has more bits than bf16; an expert without
    rows has none.
    """
    x = draw(200, 48).astype(jnp.bfloat16)
    w = draw(4, 48, 64)
    sizes = jnp.array([50, 70, 0, 80], jnp.int32)

    def loss(w):
        axes = ("expert", "embed", "mlp")
        y = moe._grouped(axes, jnp.dtype("bfloat16"), x, w, sizes)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    grad = jax.grad(loss)(w)

    assert grad.dtype == jnp.float32
    # Rounding to bf16 would change most of it.
    rounded = grad.astype(jnp.bfloat16).astype(jnp.float32)
    assert (grad != rounded)[0].mean() > 0.9
    assert (grad[2] == 0).all()
