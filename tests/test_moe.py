"""Products of groups of rows with a matrix each, in every way that a platform does them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import moe

RNG = np.random.default_rng(0)
SIZES = [[100, 0, 120, 36], [90, 0, 60, 0], [256, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 250]]
# XLA's own, which all platforms have, for one of ours.
BY_XLA = dict(transposed=(((1,), (2,)), [0]), plain=(((1,), (1,)), [0]), weights=(((0,), (0,)), []))


def by_xla(x, y, sizes, kind):
    contracted, group = BY_XLA[kind]
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group,
    )
    return jax.lax.ragged_dot_general(x, y, sizes, numbers)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [256, 300])
def test_products(sizes, rows):
    """Empty groups, one that has all rows, rows of no group; by block (CPU), by the TPU's kernel,
    and as XLA has it.
    """
    x, g, w, sizes, used = (
        draw(rows, 48),
        draw(rows, 64),
        draw(4, 48, 64),
        jnp.array(sizes, jnp.int32),
        sum(sizes),
    )
    for ours, kind in (
        (moe.grouped_rows(x, w, sizes, jnp.float32), "plain"),
        (moe.grouped_rows(g, w, sizes, jnp.float32, transposed=True), "transposed"),
    ):
        np.testing.assert_allclose(
            ours[:used],
            by_xla(x if kind == "plain" else g, w, sizes, kind)[:used],
            rtol=1e-4,
            atol=1e-4,
        )
    for ours in (moe.grouped_weights(x, g, sizes), moe.by_kernel(x, g, sizes, interpret=True)):
        np.testing.assert_allclose(ours, by_xla(x, g, sizes, "weights"), rtol=1e-4, atol=1e-4)


def test_few_rows_of_many_groups():
    x, w, sizes = (
        draw(3, 16),
        draw(50, 16, 8),
        jnp.zeros(50, jnp.int32).at[jnp.array([4, 49])].set(jnp.array([2, 1])),
    )
    np.testing.assert_allclose(
        moe.grouped_rows(x, w, sizes, jnp.float32),
        [*(x[:2] @ w[4]), x[2] @ w[49]],
        rtol=1e-4,
        atol=1e-5,
    )


def test_weight_gradient_is_not_rounded():
    """In bf16 the gradient of an f32 view of the weights has more bits than bf16; an expert without
    rows has none.
    """
    x, w, sizes = (
        draw(200, 48).astype(jnp.bfloat16),
        draw(4, 48, 64),
        jnp.array([50, 70, 0, 80], jnp.int32),
    )
    grad = jax.grad(
        lambda w: jnp.sum(
            jnp.sin(
                moe._grouped(("expert", "embed", "mlp"), jnp.dtype("bfloat16"), x, w, sizes).astype(
                    jnp.float32
                )
            )
        )
    )(w)
    assert (
        grad.dtype == jnp.float32
        and (grad != grad.astype(jnp.bfloat16).astype(jnp.float32))[0].mean() > 0.9
    )
    assert (grad[2] == 0).all()
