"""Where every array lives: the mesh, one table from logical axes to mesh axes, and the weights'
gather.

A parameter names its dims when it is born (``logical_axes``, see `lm.nn.layers.param`); `RULES`
maps those names to axes of the mesh. Nothing else in the project decides a layout. *Axis* means an
axis of the mesh, *dim* a dim of a tensor.
"""

import contextvars
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("slice", "data", "fsdp", "fsdp2", "tensor", "sequence", "expert")

# Logical name of a tensor's dim -> the mesh axes that split it, in this order.
RULES = {
    "batch": ("slice", "data", "fsdp", "fsdp2", "expert"),
    "length": ("sequence",),
    "layers": (),
    "vocab": ("tensor",),
    "position": (),
    "table": (),
    "embed": ("fsdp", "fsdp2", "sequence"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "expert": ("expert",),
    "router": (),
    # Biases have no embed dim that the fsdp axes could split.
    "mlp_bias": ("fsdp", "fsdp2", "tensor"),
    "head_dim_bias": ("fsdp", "fsdp2"),
    # The same dims in activations, where those axes already split the batch.
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
    "whole_rows_heads": ("tensor", "sequence"),  # inside attention, where rows are whole
    "act_vocab": ("tensor",),
}
# those that split rows of the batch or positions split the weights too
FSDP_AXES = ("fsdp", "fsdp2", "sequence")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh over all of `devices`.

    Args:
      sizes: axis name of `MESH_AXES` -> number of devices along it. At most one may be -1: what is
        left over.
      devices: the devices to lay out, real ones or those of a described topology.

    Raises:
      ValueError: an unknown axis, more than one -1, or sizes whose product is not the number of
        devices.
    """
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise ValueError(f"config.mesh has unknown axes {unknown}; the axes are {list(MESH_AXES)}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise ValueError(
            "config.mesh: sizes must be positive, at most one of them -1 (the rest); got "
            f"{dict(sizes)}"
        )
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        wanted = {axis: n for axis, n in zip(MESH_AXES, shape) if n != 1}
        raise ValueError(
            f"config.mesh asks for {wanted or 'one device'}, which is {known} "
            f"device(s){' or a multiple' if -1 in shape else ''}, but there are {len(devices)} "
            f"({devices[0].platform}). Change the sizes, or set one axis to -1 to take what is "
            "left."
        )
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)
    within = [1, *shape[1:]]
    try:  # both follow the torus
        if shape[0] > 1 and getattr(devices[0], "slice_index", None) is not None:
            grid = mesh_utils.create_hybrid_device_mesh(
                within, [shape[0]] + [1] * (len(shape) - 1), devices
            )
        else:
            grid = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        sides = [int(n) for n in np.max([d.coords for d in devices], axis=0) + 1 if n > 1]
        raise ValueError(
            f"config.mesh = { ({axis: n for axis, n in zip(MESH_AXES, shape) if n != 1}) } can't "
            f"be laid on a torus of {' x '.join(map(str, sides))} chips: each axis must be as "
            "long as one of the torus's sides, or as some of them multiplied, such as "
            f"{ ({'fsdp': sides[0], 'fsdp2': math.prod(sides[1:])}) }"
        ) from None
    return Mesh(grid, MESH_AXES)


def spec(
    logical_axes: Sequence[str | None], mesh: Mesh, *, without: Sequence[str] = ()
) -> PartitionSpec:
    """The `PartitionSpec` of a tensor with these dims, leaving out mesh axes of size 1 and those in
    `without`.

    Raises:
      ValueError: an unknown logical axis, or two dims that claim the same mesh axis.
    """
    entries, taken = [], {}
    for dim in logical_axes:
        if dim is not None and dim not in RULES:
            raise ValueError(f"unknown logical axis {dim!r}; lm/sharding.py knows {sorted(RULES)}")
        axes = tuple(a for a in RULES.get(dim, ()) if mesh.shape.get(a, 1) > 1 and a not in without)
        for axis in axes:
            if axis in taken:
                raise ValueError(
                    f"dims {taken[axis]!r} and {dim!r} of {tuple(logical_axes)} both claim the "
                    f"mesh axis {axis!r}"
                )
            taken[axis] = dim
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Asks the partitioner to lay `x` out by `RULES` on the mesh of the context (`jax.set_mesh`);
    no mesh, or by hand: no change. A dim that its mesh axes don't divide (one position in decoding)
    stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, divisible(x.shape, logical_axes, mesh))


def divisible(shape: Sequence[int], logical_axes: Sequence[str | None], mesh) -> PartitionSpec:
    """`spec`, but dims that their mesh axes don't divide stay whole."""
    return PartitionSpec(
        *(
            entry if size % axes_size(mesh, entry) == 0 else None
            for size, entry in zip(shape, spec(logical_axes, mesh))
        )
    )


def axes_size(mesh, entry: str | Sequence[str] | None) -> int:
    """Into how many parts an entry of a `PartitionSpec` splits."""
    return math.prod(mesh.shape[a] for a in ((entry,) if isinstance(entry, str) else entry or ()))


# Sequence parallelism. The sequence axis splits rows into their positions everywhere but in
# attention, which sees whole rows of some of the heads instead: an all-to-all before and one after
# (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509). Every device then has the same causal
# work, and less travels than if all keys and values were gathered.


def whole_rows(x: jax.Array, heads_dim: int | None = None) -> jax.Array:
    """[B, T of a part, ...] -> [B, T of the whole row, ...], of a share of the heads if there is a
    dim of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        if mesh.shape["sequence"] == 1:
            return x
        if heads_dim is None:
            return jax.lax.all_gather(x, "sequence", axis=1, tiled=True)
        return jax.lax.all_to_all(x, "sequence", split_axis=heads_dim, concat_axis=1, tiled=True)
    return constrain(
        x,
        "batch",
        None,
        *("whole_rows_heads" if dim == heads_dim else None for dim in range(2, x.ndim)),
    )


def split_rows(x_BTNH: jax.Array) -> jax.Array:
    """What `whole_rows` did to an array with heads, undone."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and mesh.shape["sequence"] > 1:
        return jax.lax.all_to_all(x_BTNH, "sequence", split_axis=1, concat_axis=2, tiled=True)
    return constrain(x_BTNH, "batch", "length", "act_heads", None)


def repeats(num_kv_heads: int) -> int:
    """How often keys and values are repeated so that each device has some of the heads: 1 unless
    there are fewer than devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = (
        1
        if mesh.empty
        else mesh.shape["sequence"] * (1 if mesh.manual_axes else mesh.shape["tensor"])
    )
    return parts // math.gcd(parts, num_kv_heads)


# FSDP. A layer takes its weights through `gather` and `lookup`, and what they do depends on where
# they are traced: left to the partitioner, they are constraints on layouts; inside `by_hand` they
# are the collectives themselves. Both have a backward rule, so that a weight's gradient is summed
# over the batch and split again in one place, in one dtype.


class ByHand(NamedTuple):
    reduce_dtype: jnp.dtype
    joint: bool


# None where the partitioner has the rest of the step, and only a part of it is mapped by hand
# (lm.nn.moe).
_BY_HAND: contextvars.ContextVar[ByHand | None] = contextvars.ContextVar("by_hand", default=None)


def by_hand(gradient: Callable, *, mesh: Mesh, axes, reduce_dtype, joint: bool) -> Callable:
    """`gradient(params, batch, key) -> (grads, count, terms)`, computed on each device from its
    rows, with FSDP's collectives written out.

    The partitioner's gradient reduction over all axes of a torus is an all-reduce on TPUs, which
    moves twice the bytes; one axis after the other it stays a reduce-scatter.

    Args:
      gradient: gives sums over the rows that it sees; its `grads` are already summed over the mesh,
        by `scatter`.
      axes: the parameters' logical axes.
      reduce_dtype: of the gradients on the wire.
      joint: gather over fsdp and fsdp2 at once, which a two-dimensional torus does at full speed,
        and overlapped; on a three-dimensional one the compiler makes it an all-reduce, unlike one
        gather after the other.
    """
    specs = jax.tree.map(
        lambda names: spec(names, mesh), axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    every = tuple(a for a in mesh.axis_names if mesh.shape[a] > 1)

    def local(params, batch, key):
        grads, *sums = gradient(params, batch, key)
        return grads, *(jax.tree.map(lambda x: jax.lax.psum(x, every), sums) if every else sums)

    def wrapped(params, batch, key):
        token = _BY_HAND.set(ByHand(jnp.dtype(reduce_dtype), joint))
        try:
            rows = jax.tree.map(lambda x: batch_sharding(mesh, x.ndim).spec, batch)
            return jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(specs, rows, PartitionSpec()),
                out_specs=(specs, PartitionSpec(), PartitionSpec()),
                check_vma=False,
            )(params, batch, key)
        finally:
            _BY_HAND.reset(token)

    return wrapped


def _fsdp_dim(logical_axes: Sequence[str | None], mesh) -> tuple[int, tuple[str, ...]]:
    """(the dim of a weight that FSDP splits, the mesh axes that do it); (0, ()) for none."""
    for dim, entry in enumerate(spec(logical_axes, mesh)):
        if axes := tuple(
            a for a in ((entry,) if isinstance(entry, str) else entry or ()) if a in FSDP_AXES
        ):
            return dim, axes
    return 0, ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(weight: jax.Array, logical_axes: tuple[str, ...], dtype) -> jax.Array:
    """A layer's weight as it computes with it: cast to `dtype`, and collected over the FSDP axes.

    Casting first means that the wire carries `dtype`. The gradient comes back through `scatter`.
    """
    value = weight.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return value
    if not mesh.manual_axes:
        return jax.lax.with_sharding_constraint(value, spec(logical_axes, mesh, without=FSDP_AXES))
    dim, axes = _fsdp_dim(logical_axes, mesh)
    here = _BY_HAND.get()
    for group in ([axes] if here and here.joint else reversed(axes)) if axes else ():
        value = jax.lax.all_gather(value, group, axis=dim, tiled=True)
    return value


def scatter(grad: jax.Array, logical_axes: tuple[str, ...], dtype) -> jax.Array:
    """The transpose of `gather`: the gradient of a gathered weight, summed over the batch's shards
    and split as the weight is.

    In a part of a step that is mapped by hand, the sum over axes that don't split the weight is
    left to shard_map's own transpose.

    Args:
      dtype: of the result. On the wire it is `by_hand`'s reduce_dtype; the partitioner reduces in
        `grad`'s own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return grad.astype(dtype)
    if not mesh.manual_axes:
        return jax.lax.with_sharding_constraint(grad.astype(dtype), spec(logical_axes, mesh))
    here = _BY_HAND.get()
    grad = grad.astype(here.reduce_dtype if here else jnp.float32)
    dim, axes = _fsdp_dim(logical_axes, mesh)
    # one after the other: over all of a torus at once, the compiler would make it an all-reduce
    for axis in axes:
        grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=dim, tiled=True)
    return (_sum_rest(grad, logical_axes, mesh) if here else grad).astype(dtype)


def _sum_rest(grad, logical_axes, mesh):
    """Sums over the axes that don't split the parameter."""
    splitting = {axis for name in logical_axes for axis in RULES[name]}
    rest = tuple(a for a in mesh.manual_axes if mesh.shape[a] > 1 and a not in splitting)
    return jax.lax.psum(grad, rest) if rest else grad


def sum_over_rows(sums):
    """What each device has summed over its rows and positions, summed over all of them; under the
    partitioner it is already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(
        a for a in (*RULES["batch"], *RULES["length"]) if mesh.manual_axes and mesh.shape[a] > 1
    )
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), sums) if axes else sums


gather.defvjp(
    lambda weight, logical_axes, dtype: (
        gather(weight, logical_axes, dtype),
        jnp.zeros((), weight.dtype),
    ),
    lambda logical_axes, dtype, like, grad: (scatter(grad, logical_axes, like.dtype),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def lookup(table: jax.Array, ids_BT: jax.Array, logical_axes: tuple[str, str], dtype) -> jax.Array:
    """Rows of a [V, D] table in `dtype`: [B, T, D]. The gradient is summed in f32.

    By hand the table is not gathered: each device looks up its columns for the ids of all, and
    sends them theirs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return jnp.take(gather(table, logical_axes, dtype), ids_BT, axis=0)
    axes = _columns(logical_axes, mesh)
    if not axes:
        return jnp.take(table.astype(dtype), ids_BT, axis=0)
    x = jnp.take(table.astype(dtype), jax.lax.all_gather(ids_BT, axes, axis=0, tiled=True), axis=0)
    return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=2, tiled=True)


def _columns(logical_axes, mesh):
    dim, axes = _fsdp_dim(logical_axes, mesh)
    assert dim == 1 or not axes, logical_axes
    return axes


def _lookup_backward(logical_axes, dtype, saved, grad_BTD):
    table, ids_BT = saved
    mesh = jax.sharding.get_abstract_mesh()
    axes = _columns(logical_axes, mesh) if mesh.manual_axes else ()
    if axes:
        grad_BTD = jax.lax.all_to_all(grad_BTD, axes, split_axis=2, concat_axis=0, tiled=True)
        ids_BT = jax.lax.all_gather(ids_BT, axes, axis=0, tiled=True)
    grad = jnp.zeros(table.shape, jnp.float32).at[ids_BT].add(grad_BTD.astype(jnp.float32))
    if mesh.manual_axes:
        return _sum_rest(grad, logical_axes, mesh).astype(table.dtype), None
    return scatter(grad, logical_axes, table.dtype), None


lookup.defvjp(
    lambda table, ids_BT, logical_axes, dtype: (
        lookup(table, ids_BT, logical_axes, dtype),
        (table, ids_BT),
    ),
    _lookup_backward,
)


def logical_axes(state) -> dict:
    """The logical axes of each parameter, as a dict of the parameters' structure; stacked layers
    gain a leading "layers".

    Args:
      state: the `nnx.State` of `nnx.split(model, nnx.Param)`, abstract or not. A stack has one dim
        more than its names.
    """

    def axes(param):
        names = tuple(param.get_metadata("logical_axes"))
        names = ("layers",) * (len(param.shape) - len(names)) + names
        assert len(names) == len(param.shape), (names, param.shape)
        return names

    return nnx.to_pure_dict(
        jax.tree.map(axes, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    )


def shardings(abstract, axes, mesh: Mesh):
    """`NamedSharding`s for a tree of abstract parameters.

    Args:
      abstract: tree of anything with `.shape`.
      axes: tree of the same structure, a tuple of logical axes at each leaf.

    Raises:
      ValueError: a dim that its mesh axes don't divide, with the parameter's path, or see `spec`.
    """

    def one(path, leaf, names):
        try:
            partition = spec(names, mesh)
        except ValueError as error:
            raise ValueError(f"parameter {jax.tree_util.keystr(path)}: {error}") from None
        for dim, size, entry in zip(names, leaf.shape, partition):
            parts = axes_size(mesh, entry)
            if size % parts:
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path)}: its dim {dim!r} of {size} is not "
                    f"divisible by {parts}, the size of mesh axes {entry}. Change config.mesh, or "
                    "the model's size (config.model.vocab_size may be rounded up)."
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, abstract, axes)


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """The sharding of a batch's arrays: rows over the batch axes, positions over the sequence
    axis.
    """
    return NamedSharding(mesh, spec(("batch", "length", *([None] * (ndim - 2)))[:ndim], mesh))


def check_heads(mesh: Mesh, num_heads: int) -> None:
    """Raises ValueError if attention's heads can't be dealt to the mesh."""
    parts = mesh.shape["tensor"] * mesh.shape["sequence"]
    if num_heads % parts:
        raise ValueError(
            f"config.model.num_heads = {num_heads} can't be divided by {parts}, the size of "
            "config.mesh's tensor and sequence axes: in attention each device has whole rows of "
            f"its share of the heads. Make their product a divisor of {num_heads}"
        )


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch's rows."""
    return math.prod(mesh.shape[a] for a in RULES["batch"])


def check_batch(mesh: Mesh, batch_size: int, length: int, name: str) -> None:
    """Raises ValueError if the mesh can't divide a [batch_size, length] batch evenly."""
    rows = batch_parts(mesh)
    columns = math.prod(mesh.shape[a] for a in RULES["length"])
    if batch_size % rows:
        raise ValueError(
            f"{name} = {batch_size} rows can't be divided by {rows}, the product of the mesh's "
            f"batch axes { ({a: mesh.shape[a] for a in RULES['batch'] if mesh.shape[a] > 1}) }; "
            f"make it a multiple of {rows}"
        )
    if length % columns:
        raise ValueError(
            f"config.data.length = {length} can't be divided by {columns}, the mesh's sequence axis"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
