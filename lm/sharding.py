"""Where every array lives: the mesh, one table from logical axes to mesh axes, and the weights' gather.

A parameter names its dims when it is born (``logical_axes``, see `lm.nn.layers.param`); `RULES` maps those names to axes of the
mesh. Nothing else in the project decides a layout. *Axis* means an axis of the mesh, *dim* a dim of a tensor.
"""

import math
from collections.abc import Mapping, Sequence

import jax
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
    "vocab": ("fsdp2", "tensor"),
    "position": (),
    "embed": ("fsdp",),
    "mlp": ("fsdp2", "tensor"),
    "heads": ("fsdp2", "tensor"),
    "kv_heads": ("fsdp2", "tensor"),
    "head_dim": (),
    # Biases have no embed dim that the fsdp axis could split.
    "mlp_bias": ("fsdp", "fsdp2", "tensor"),
    "head_dim_bias": ("fsdp",),
    # The same dims in activations, where the fsdp axes already split the batch.
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
    "act_vocab": ("tensor",),
}
FSDP_AXES = ("fsdp", "fsdp2")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh over all of `devices`.

    Args:
      sizes: axis name of `MESH_AXES` -> number of devices along it. At most one may be -1: what is left over.
      devices: the devices to lay out, real ones or those of a described topology.

    Raises:
      ValueError: an unknown axis, more than one -1, or sizes whose product is not the number of devices.
    """
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise ValueError(f"config.mesh has unknown axes {unknown}; the axes are {list(MESH_AXES)}")
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise ValueError(f"config.mesh: sizes must be positive, at most one of them -1 (the rest); got {dict(sizes)}")
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        wanted = {axis: n for axis, n in zip(MESH_AXES, shape) if n != 1}
        raise ValueError(
            f"config.mesh asks for {wanted or 'one device'}, which is {known} device(s){' or a multiple' if -1 in shape else ''}, but "
            f"there are {len(devices)} ({devices[0].platform}). Change the sizes, or set one axis to -1 to take what is left.")
    if shape[0] > 1 and getattr(devices[0], "slice_index", None) is not None:
        within = [1] + shape[1:]
        grid = mesh_utils.create_hybrid_device_mesh(within, [shape[0]] + [1] * (len(shape) - 1), devices)
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(shape, devices)  # follows the torus
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, MESH_AXES)


def spec(logical_axes: Sequence[str | None], mesh: Mesh, *, without: Sequence[str] = ()) -> PartitionSpec:
    """The `PartitionSpec` of a tensor with these dims, leaving out mesh axes of size 1 and those in `without`.

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
                raise ValueError(f"dims {taken[axis]!r} and {dim!r} of {tuple(logical_axes)} both claim the mesh axis {axis!r}")
            taken[axis] = dim
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Asks the partitioner to lay `x` out by `RULES` on the mesh of the context (`jax.set_mesh`); no mesh, no change."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(logical_axes, mesh))


def gather(weight: jax.Array, logical_axes: Sequence[str], dtype) -> jax.Array:
    """A layer's weight as it computes with it: cast to `dtype`, and collected over the FSDP axes.

    Casting first means that the wire carries `dtype`. This is the one place where FSDP happens: the partitioner turns the
    constraint into an all-gather, and its transpose into the reduction of the gradient.
    """
    value = weight.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return value
    return jax.lax.with_sharding_constraint(value, spec(logical_axes, mesh, without=FSDP_AXES))


def logical_axes(state) -> dict:
    """The logical axes of each parameter, as a dict of the parameters' structure; stacked layers gain a leading "layers".

    Args:
      state: the `nnx.State` of `nnx.split(model, nnx.Param)`, abstract or not. A stack has one dim more than its names.
    """
    def axes(param):
        names = tuple(param.get_metadata("logical_axes"))
        names = ("layers",) * (len(param.shape) - len(names)) + names
        assert len(names) == len(param.shape), (names, param.shape)
        return names
    return nnx.to_pure_dict(jax.tree.map(axes, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


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
            parts = math.prod(mesh.shape[a] for a in ((entry,) if isinstance(entry, str) else entry or ()))
            if size % parts:
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path)}: its dim {dim!r} of {size} is not divisible by {parts}, the size of mesh "
                    f"axes {entry}. Change config.mesh, or the model's size (config.model.vocab_size may be rounded up).")
        return NamedSharding(mesh, partition)
    return jax.tree_util.tree_map_with_path(one, abstract, axes)


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """The sharding of a batch's arrays: rows over the batch axes, positions over the sequence axis."""
    return NamedSharding(mesh, spec(("batch", "length", *([None] * (ndim - 2)))[:ndim], mesh))


def check_batch(mesh: Mesh, batch_size: int, length: int, name: str) -> None:
    """Raises ValueError if the mesh can't divide a [batch_size, length] batch evenly."""
    rows = math.prod(mesh.shape[a] for a in RULES["batch"])
    columns = math.prod(mesh.shape[a] for a in RULES["length"])
    if batch_size % rows:
        raise ValueError(f"{name} = {batch_size} rows can't be divided by {rows}, the product of the mesh's batch axes "
                         f"{({a: mesh.shape[a] for a in RULES['batch'] if mesh.shape[a] > 1})}; make it a multiple of {rows}")
    if length % columns:
        raise ValueError(f"config.data.length = {length} can't be divided by {columns}, the mesh's sequence axis")


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
