"""Matmuls of rows sorted into groups, each group with a matrix of its own.

XLA has the plain one, `jax.lax.ragged_dot_general`. TPUs have a kernel for it. On CPUs XLA would
multiply all rows with all matrices, so they go block by block there. Tests compare all of them with
a loop over the groups.

Letters: M rows, sorted by group; E groups (experts), A and B the dims of a group's matrix, R rows
of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def grouped_matmul(
    x_MA: jax.Array, weight_EAB: jax.Array, sizes_E: jax.Array, dtype, *, transposed: bool = False
) -> jax.Array:
    """[M, B] in `dtype`: the first sizes[0] rows times the first matrix, and so on.

    Rows left over after all groups may become anything.

    Args:
      transposed: multiplies by the transposes: x [M, B] gives [M, A].
    """
    contracted = 2 if transposed else 1

    def plain(x, weight, sizes):
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (contracted,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        )
        return jax.lax.ragged_dot_general(x, weight, sizes, numbers, preferred_element_type=dtype)

    def by_block(x, weight, sizes):
        blocks = _blocks(sizes, len(x))
        x = blocks.take(x)
        spec = "ra,ba->rb" if transposed else "ra,ab->rb"

        def multiply(i, out):
            product = jnp.einsum(
                spec, x[i], weight[blocks.group[i]], preferred_element_type=jnp.float32
            )
            return out.at[i].set(product.astype(dtype))

        out = jnp.zeros((*x.shape[:2], weight.shape[3 - contracted]), dtype)
        return blocks.put_back(jax.lax.fori_loop(0, blocks.num_used, multiply, out))

    return jax.lax.platform_dependent(x_MA, weight_EAB, sizes_E, cpu=by_block, default=plain)


def grouped_weight_grad(x_MA: jax.Array, grad_MB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[E, A, B] in f32: x^T grad of each group of rows, the gradient of `grouped_matmul`."""

    def plain(x, grad, sizes):
        numbers = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[],
        )
        return jax.lax.ragged_dot_general(
            x, grad, sizes, numbers, preferred_element_type=jnp.float32
        )

    def by_block(x, grad, sizes):
        blocks = _blocks(sizes, len(x))
        x, grad = blocks.take(x), blocks.take(grad)

        def add(i, out):
            product = jnp.einsum("ra,rb->ab", x[i], grad[i], preferred_element_type=jnp.float32)
            return out.at[blocks.group[i]].add(product)

        out = jnp.zeros((len(sizes), x.shape[2], grad.shape[2]), jnp.float32)
        return jax.lax.fori_loop(0, blocks.num_used, add, out)

    return jax.lax.platform_dependent(
        x_MA, grad_MB, sizes_E, cpu=by_block, tpu=weight_grad_kernel, default=plain
    )


def weight_grad_kernel(
    x_MA: jax.Array, grad_MB: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`grouped_weight_grad` by JAX's Pallas kernel for TPU (Gale et al. 2022, arXiv 2211.15841).
    XLA has none for this product.

    Args:
      interpret: run the kernel's program without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # slow to import

    # Tiles are filled with rows of no group.
    padding = ((0, -len(x_MA) % 128), (0, 0))
    x_MA, grad_MB = jnp.pad(x_MA, padding), jnp.pad(grad_MB, padding)
    tile = 512 if len(x_MA) % 512 == 0 else 128
    tiling = (tile, min(x_MA.shape[1], 1024), min(grad_MB.shape[1], 1024))
    with jax.numpy_dtype_promotion("standard"):  # the kernel's own code needs it
        return tgmm(x_MA.T, grad_MB, sizes_E, jnp.float32, tiling, interpret=interpret)


class _Blocks(NamedTuple):
    """Rows of groups, in blocks of one group each. The last block of a group is not full.

    "None" is one more than the largest number in `source_row` and in `place`.
    """

    group: jax.Array  # [blocks], the group of each block
    num_used: jax.Array  # number of blocks that hold rows
    source_row: jax.Array  # [blocks, R], the row that lies there, or none
    place: jax.Array  # [M], each row's place, counted through all blocks, or none

    def take(self, x: jax.Array) -> jax.Array:
        """[blocks, R, ...] of rows [M, ...], filled up with zeros."""
        return x.at[self.source_row].get(mode="fill", fill_value=0)

    def put_back(self, blocks: jax.Array) -> jax.Array:
        """The rows [M, ...] of [blocks, R, ...]."""
        rows = blocks.reshape(-1, blocks.shape[-1])
        return rows.at[self.place].get(mode="fill", fill_value=0)


def _blocks(sizes_E: jax.Array, num_rows: int) -> _Blocks:
    num_groups = len(sizes_E)
    rows = min(64, max(8, 1 << (num_rows // num_groups).bit_length()))
    num_blocks = num_rows // rows + num_groups  # at most

    ends_E, block_ends_E = jnp.cumsum(sizes_E), jnp.cumsum(-(-sizes_E // rows))
    starts_E, block_starts_E = ends_E - sizes_E, block_ends_E - -(-sizes_E // rows)
    group = jnp.minimum(
        jnp.searchsorted(block_ends_E, jnp.arange(num_blocks), side="right"), num_groups - 1
    )

    # The rows of each block.
    within = ((jnp.arange(num_blocks) - block_starts_E[group]) * rows)[:, None]
    within = within + jnp.arange(rows)[None]
    source_row = jnp.where(
        within < sizes_E[group][:, None], starts_E[group][:, None] + within, num_rows
    )

    # And the place of each row: of those after all groups, none.
    of_row = jnp.searchsorted(ends_E, jnp.arange(num_rows), side="right")
    known = jnp.minimum(of_row, num_groups - 1)
    place = jnp.where(
        of_row < num_groups,
        block_starts_E[known] * rows + jnp.arange(num_rows) - starts_E[known],
        num_blocks * rows,
    )
    return _Blocks(group, block_ends_E[-1], source_row, place)
