"""FSDP's gathers and scatters, and sequence parallelism's all-to-alls.

What a function here does depends on where it is traced. Under GSPMD (auto) it constrains layouts,
and XLA's partitioner writes the collectives. Inside `shard_map` (manual) it is the collectives
themselves. `lm.sharding` says what lies where; nothing here decides a layout.

Letters: B batch, T length, D embed, N heads, H head size, V vocab.
"""

import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lm.sharding import FSDP_AXES, RULES, batch_sharding, constrain, mesh_axes_of, spec

# FSDP. A layer takes its weights through `gather_weight` and `embedding_lookup`. Both have a
# backward rule, so that the gradient of a weight is summed over the batch and split again in one
# place, `scatter_grad`. That happens once for each microbatch. Only the manual embedding sends its
# activations' gradient, in its own dtype, instead of the table's.


class ManualFsdp(NamedTuple):
    """How FSDP's collectives go where a whole gradient runs under shard_map."""

    reduce_dtype: jnp.dtype  # of gradients on the wire
    joint_gather: bool  # over fsdp and fsdp2 at once, not one after the other


# None under GSPMD, also inside the shard_map that a mixture of experts is there (lm.nn.moe).
_MANUAL_FSDP: contextvars.ContextVar[ManualFsdp | None] = contextvars.ContextVar(
    "manual_fsdp", default=None
)


def shard_map_gradient(
    gradient: Callable,
    *,
    mesh: Mesh,
    axes,
    batch_dims,
    fixed_specs,
    reduce_dtype,
    joint_gather: bool,
) -> Callable:
    """Wraps `gradient(params, batch, keys_B, fixed) -> (grads, count, terms)` into a shard_map.

    Each device computes it from its own rows, with FSDP's collectives written out. GSPMD reduces
    gradients over all axes of a torus by an all-reduce on TPUs, which moves twice the bytes. One
    axis after the other stays a reduce-scatter.

    Args:
      gradient: gives sums over the rows that it sees. Its `grads` are already summed over the mesh,
        by `scatter_grad`.
      axes: the parameters' logical axes.
      batch_dims: name of a batch's array -> the dims of a row, see `lm.data.batch.Array`.
      fixed_specs: how what the gradient reads besides is split.
      reduce_dtype: of the gradients on the wire.
      joint_gather: gathers over fsdp and fsdp2 at once. A two-dimensional torus does that at full
        speed, and overlapped. On a three-dimensional one the compiler makes it an all-reduce, which
        two gathers, one after the other, don't become.
    """
    specs = jax.tree.map(
        lambda names: spec(names, mesh), axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    split_axes = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1)

    def local(params, batch, keys_B, fixed):
        grads, *sums = gradient(params, batch, keys_B, fixed)
        if split_axes:
            sums = jax.tree.map(lambda x: jax.lax.psum(x, split_axes), sums)
        return grads, *sums

    def wrapped(params, batch, keys_B, fixed):
        settings = ManualFsdp(jnp.dtype(reduce_dtype), joint_gather)
        token = _MANUAL_FSDP.set(settings)
        try:
            rows = {name: batch_sharding(mesh, batch_dims[name]).spec for name in batch}
            return jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(specs, rows, batch_sharding(mesh, ()).spec, fixed_specs),
                out_specs=(specs, PartitionSpec(), PartitionSpec()),
                check_vma=False,
            )(params, batch, keys_B, fixed)
        finally:
            _MANUAL_FSDP.reset(token)

    return wrapped


def _fsdp_dim(logical_axes: Sequence[str | None], mesh) -> tuple[int, tuple[str, ...]]:
    """(The dim of a weight that FSDP splits, the mesh axes that do it); (0, ()) for none."""
    for dim, entry in enumerate(spec(logical_axes, mesh)):
        axes = tuple(axis for axis in mesh_axes_of(entry) if axis in FSDP_AXES)
        if axes:
            return dim, axes
    return 0, ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(weight: jax.Array, logical_axes: tuple[str, ...], dtype) -> jax.Array:
    """A layer's weight as it computes with it: cast to `dtype`, and gathered over the FSDP axes.

    The cast comes first, so that the wire carries `dtype`. The gradient comes back through
    `scatter_grad`.
    """
    value = weight.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return value

    if not mesh.manual_axes:
        return jax.lax.with_sharding_constraint(value, spec(logical_axes, mesh, without=FSDP_AXES))

    dim, axes = _fsdp_dim(logical_axes, mesh)
    if not axes:
        return value
    settings = _MANUAL_FSDP.get()
    # The innermost axis first, so that the parts come back in order.
    groups = [axes] if settings and settings.joint_gather else reversed(axes)
    for group in groups:
        value = jax.lax.all_gather(value, group, axis=dim, tiled=True)
    return value


def scatter_grad(grad: jax.Array, logical_axes: tuple[str, ...], dtype) -> jax.Array:
    """The transpose of `gather_weight`: a weight's gradient, summed over the batch's shards and
    split as the weight is.

    In a mixture of experts under GSPMD (a shard_map of its own), the transpose of shard_map sums
    over the axes that don't split the weight.

    Args:
      dtype: of the result. On the wire a manual gradient has the `reduce_dtype` of
        `shard_map_gradient`. GSPMD reduces in the dtype of the result: f32, since the step
        differentiates with respect to f32 copies (`lm.step.accumulate_gradient`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return grad.astype(dtype)

    if not mesh.manual_axes:
        return jax.lax.with_sharding_constraint(grad.astype(dtype), spec(logical_axes, mesh))

    settings = _MANUAL_FSDP.get()
    grad = grad.astype(settings.reduce_dtype if settings else jnp.float32)
    dim, axes = _fsdp_dim(logical_axes, mesh)
    # One axis after the other: over all of a torus at once, the compiler makes it an all-reduce.
    for axis in axes:
        grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=dim, tiled=True)
    if settings:
        grad = _psum_unsplit(grad, logical_axes, mesh)
    return grad.astype(dtype)


def _psum_unsplit(grad: jax.Array, logical_axes: tuple[str, ...], mesh) -> jax.Array:
    """Sums a gradient over the mesh axes that don't split its parameter."""
    splitting = set().union(*(RULES[name] for name in logical_axes))
    rest = tuple(a for a in mesh.manual_axes if mesh.shape[a] > 1 and a not in splitting)
    return jax.lax.psum(grad, rest) if rest else grad


def _gather_forward(weight, logical_axes, dtype):
    # The backward pass needs the weight's dtype alone.
    return gather_weight(weight, logical_axes, dtype), jnp.zeros((), weight.dtype)


def _gather_backward(logical_axes, dtype, like, grad):
    del dtype
    return (scatter_grad(grad, logical_axes, like.dtype),)


gather_weight.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embedding_lookup(
    table: jax.Array, ids_BT: jax.Array, logical_axes: tuple[str, str], dtype
) -> jax.Array:
    """Rows of a [V, D] table in `dtype`: [B, T, D]. The gradient is summed in f32.

    In manual code the table is not gathered. Each device looks up its columns for the ids of all
    devices, and an all-to-all gives each device its rows whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return jnp.take(gather_weight(table, logical_axes, dtype), ids_BT, axis=0)

    axes = _column_axes(logical_axes, mesh)
    columns = table.astype(dtype)
    if not axes:
        return jnp.take(columns, ids_BT, axis=0)
    all_ids = jax.lax.all_gather(ids_BT, axes, axis=0, tiled=True)
    columns = jnp.take(columns, all_ids, axis=0)
    return jax.lax.all_to_all(columns, axes, split_axis=0, concat_axis=2, tiled=True)


def _column_axes(logical_axes: tuple[str, str], mesh) -> tuple[str, ...]:
    """The mesh axes that split the columns of a [V, D] table."""
    dim, axes = _fsdp_dim(logical_axes, mesh)
    assert dim == 1 or not axes, logical_axes
    return axes


def _lookup_forward(table, ids_BT, logical_axes, dtype):
    return embedding_lookup(table, ids_BT, logical_axes, dtype), (table, ids_BT)


def _lookup_backward(logical_axes, dtype, saved, grad_BTD):
    del dtype
    table, ids_BT = saved
    mesh = jax.sharding.get_abstract_mesh()
    axes = _column_axes(logical_axes, mesh) if mesh.manual_axes else ()
    if axes:
        grad_BTD = jax.lax.all_to_all(grad_BTD, axes, split_axis=2, concat_axis=0, tiled=True)
        ids_BT = jax.lax.all_gather(ids_BT, axes, axis=0, tiled=True)

    grad = jnp.zeros(table.shape, jnp.float32).at[ids_BT].add(grad_BTD.astype(jnp.float32))
    if mesh.manual_axes:
        return _psum_unsplit(grad, logical_axes, mesh).astype(table.dtype), None
    return scatter_grad(grad, logical_axes, table.dtype), None


embedding_lookup.defvjp(_lookup_forward, _lookup_backward)


def psum_rows(sums):
    """Sums over all rows and positions, from each device's sums over its own.

    Under GSPMD they are sums over all already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return sums
    row_axes = (*RULES["batch"], *RULES["length"])
    axes = tuple(axis for axis in row_axes if mesh.shape[axis] > 1)
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), sums) if axes else sums


def segment_sums(values_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, int]:
    """Returns ([B, S] sums over each segment of whole rows, how many devices have the same ones).

    Where the sequence axis is manual, each device has a part of the rows, and all of the sums.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape["sequence"] if mesh.manual_axes else 1
    rows_B1 = jnp.arange(len(values_BT))[:, None]
    # Segment 0 is padding; there may be one for each position.
    num_segments = values_BT.shape[1] * parts + 1
    sums_BS = jnp.zeros((len(values_BT), num_segments), values_BT.dtype)
    sums_BS = sums_BS.at[rows_B1, segments_BT].add(values_BT)[:, 1:]
    return jax.lax.psum(sums_BS, "sequence") if parts > 1 else sums_BS, parts


def row_sums(values_BT: jax.Array) -> jax.Array:
    """Returns [B], the sums over whole rows; where the sequence axis is manual, on all its devices
    the same.
    """
    sums_B = jnp.sum(values_BT, axis=1)
    return jax.lax.psum(sums_B, "sequence") if has_parts_of_rows() else sums_B


def has_parts_of_rows() -> bool:
    """Whether what is traced sees a part of each row: the sequence axis is manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.manual_axes) and mesh.shape["sequence"] > 1


# Sequence parallelism. The sequence axis splits rows into their positions everywhere but in
# attention, which sees whole rows of some of the heads: an all-to-all before it and one after
# (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509). Every device then has the same causal
# work, and less travels than if all keys and values were gathered.


def gather_sequence(x: jax.Array, heads_dim: int | None = None) -> jax.Array:
    """[B, T of a part, ...] -> [B, T of the whole row, ...].

    Args:
      heads_dim: the dim of the heads, where there is one. The devices of the sequence axis share
        them: an all-to-all then takes the gather's place.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        if mesh.shape["sequence"] == 1:
            return x
        if heads_dim is None:
            return jax.lax.all_gather(x, "sequence", axis=1, tiled=True)
        return jax.lax.all_to_all(x, "sequence", split_axis=heads_dim, concat_axis=1, tiled=True)

    inner_dims = ["attention_heads" if dim == heads_dim else None for dim in range(2, x.ndim)]
    return constrain(x, "batch", None, *inner_dims)


def split_sequence(x_BTNH: jax.Array) -> jax.Array:
    """Undoes `gather_sequence` of an array with heads."""
    if has_parts_of_rows():
        return jax.lax.all_to_all(x_BTNH, "sequence", split_axis=1, concat_axis=2, tiled=True)
    return constrain(x_BTNH, "batch", "length", "act_heads", None)


def places(length: int) -> jax.Array:
    """[length] int32, where in its row each position stands that is seen here."""
    places_T = jnp.arange(length)
    if has_parts_of_rows():
        places_T = places_T + jax.lax.axis_index("sequence") * length
    return places_T


def heads(num_heads: int) -> jax.Array:
    """[num_heads] int32, which of the model's heads are seen inside attention here."""
    return places(num_heads)  # the sequence axis deals them as it does positions


def kv_repeats(num_kv_heads: int) -> int:
    """How often keys and values are repeated so that each device has some of the heads.

    1 unless there are fewer heads than devices that share them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    parts = mesh.shape["sequence"] * (1 if mesh.manual_axes else mesh.shape["tensor"])
    return parts // math.gcd(parts, num_kv_heads)
