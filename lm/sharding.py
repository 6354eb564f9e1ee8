"""Where every array lives: the mesh, and one table from logical axes to mesh axes.

A parameter names its dims when it is made (``logical_axes``, see `lm.nn.layers.param`). `RULES`
maps those names to axes of the mesh. Nothing else in the project decides a layout. *Axis* means an
axis of the mesh, *dim* a dim of a tensor. The collectives that follow from a layout stand in
lm/collectives.py.
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
    "vocab": ("tensor",),
    "position": (),
    "buckets": (),  # of distances between positions
    "table": (),
    "embed": ("fsdp", "fsdp2", "sequence"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "expert": ("expert",),
    "router": (),
    "rank": (),  # of an adapter
    "gates": (),  # of a recurrent cell
    "outputs": (),  # of a head other than the vocabulary's
    # These biases have no embed dim that the fsdp axes could split.
    "mlp_bias": ("fsdp", "fsdp2", "tensor"),
    "head_dim_bias": ("fsdp", "fsdp2"),
    # The same dims in activations, where those axes already split the batch.
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
    "attention_heads": ("tensor", "sequence"),  # inside attention, where rows are whole
    "act_vocab": ("tensor",),
}
# The axes of FSDP: they split rows or positions, and also the `embed` dim of weights, which layers
# gather over them.
FSDP_AXES = ("fsdp", "fsdp2", "sequence")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """Lays out all of `devices` as a mesh.

    Args:
      sizes: axis name of `MESH_AXES` -> number of devices along it. At most one may be -1: what is
        left over.
      devices: real ones, or those of a described topology.

    Raises:
      ValueError: an unknown axis, more than one -1, sizes whose product is not the number of
        devices, or a mesh that the devices' torus can't hold.
    """
    shape = _mesh_shape(sizes, devices)
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), MESH_AXES)

    # Neighbours in the mesh are to be neighbours on the torus, within each slice.
    try:
        if shape[0] > 1 and getattr(devices[0], "slice_index", None) is not None:
            within_slice = [1, *shape[1:]]
            across_slices = [shape[0]] + [1] * (len(shape) - 1)
            grid = mesh_utils.create_hybrid_device_mesh(within_slice, across_slices, devices)
        else:
            grid = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        corner = np.max([d.coords for d in devices], axis=0)
        sides = [int(n) + 1 for n in corner if n > 0]
        example = {"fsdp": sides[0], "fsdp2": math.prod(sides[1:])}
        raise ValueError(
            f"{_longer_than_one(shape)} can't be laid on a torus of "
            f"{' x '.join(map(str, sides))} chips: each axis must be as long as one of the "
            f"torus's sides, or as some of them multiplied, such as {example}"
        ) from None
    return Mesh(grid, MESH_AXES)


def _mesh_shape(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> list[int]:
    """The length of each of `MESH_AXES`, the -1 filled in. Raises as `make_mesh` does."""
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
        multiple = " or a multiple" if -1 in shape else ""
        raise ValueError(
            f"{_longer_than_one(shape) or 'config.mesh'}: this asks for {known} device(s)"
            f"{multiple}, but there are {len(devices)} ({devices[0].platform}). Change the sizes, "
            "or set one axis to -1 to take what is left."
        )
    return shape


def _longer_than_one(shape: Sequence[int]) -> str:
    """The axes that are not 1, as assignments."""
    sizes = zip(MESH_AXES, shape)
    return ", ".join(f"config.mesh.{axis} = {size}" for axis, size in sizes if size != 1)


def spec(
    logical_axes: Sequence[str | None], mesh: Mesh, *, without: Sequence[str] = ()
) -> PartitionSpec:
    """The `PartitionSpec` of a tensor with these dims.

    Mesh axes of size 1 and those in `without` are left out.

    Raises:
      ValueError: an unknown logical axis, or two dims that claim the same mesh axis.
    """
    entries = []
    claimed_by = {}
    for dim in logical_axes:
        if dim is not None and dim not in RULES:
            raise ValueError(f"unknown logical axis {dim!r}; lm/sharding.py knows {sorted(RULES)}")
        axes = tuple(a for a in RULES.get(dim, ()) if mesh.shape.get(a, 1) > 1 and a not in without)
        for axis in axes:
            if axis in claimed_by:
                raise ValueError(
                    f"dims {claimed_by[axis]!r} and {dim!r} of {tuple(logical_axes)} both claim "
                    f"the mesh axis {axis!r}"
                )
            claimed_by[axis] = dim

        if len(axes) > 1:
            entries.append(axes)
        else:
            entries.append(axes[0] if axes else None)
    return PartitionSpec(*entries)


def mesh_axes_of(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def num_parts(mesh, entry: str | Sequence[str] | None) -> int:
    """Into how many parts an entry of a `PartitionSpec` splits its dim."""
    return math.prod(mesh.shape[axis] for axis in mesh_axes_of(entry))


def divisible_spec(shape: Sequence[int], logical_axes: Sequence[str | None], mesh) -> PartitionSpec:
    """As `spec`, but dims that their mesh axes don't divide stay whole."""
    entries = []
    for size, entry in zip(shape, spec(logical_axes, mesh)):
        entries.append(entry if size % num_parts(mesh, entry) == 0 else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Asks GSPMD to lay `x` out by `RULES` on the mesh of the context (`jax.set_mesh`).

    Nothing changes without a mesh, or inside shard_map. A dim that its mesh axes don't divide (one
    position in decoding) stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, divisible_spec(x.shape, logical_axes, mesh))


def logical_axes(state) -> dict:
    """The logical axes of each parameter, as a dict of the parameters' structure.

    Stacked layers gain a leading "layers".

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

    def place(path, leaf, names):
        try:
            partition = spec(names, mesh)
        except ValueError as error:
            raise ValueError(f"parameter {jax.tree_util.keystr(path)}: {error}") from None
        for dim, size, entry in zip(names, leaf.shape, partition):
            parts = num_parts(mesh, entry)
            if size % parts:
                raise ValueError(
                    f"parameter {jax.tree_util.keystr(path)}: its dim {dim!r} of {size} is not "
                    f"divisible by {parts}, the size of mesh axes {entry}. Change config.mesh, or "
                    "the model's size (config.model.vocab_size may be rounded up)."
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(place, abstract, axes)


def batch_sharding(mesh: Mesh, dims: Sequence[str | int] = ("length",)) -> NamedSharding:
    """The sharding of an array of a batch: rows over the batch axes, positions over the sequence
    axis.

    Args:
      dims: of a row, see `lm.data.batch.Array`.
    """
    inner = [dim if dim == "length" else None for dim in dims]
    return NamedSharding(mesh, spec(("batch", *inner), mesh))


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
        sizes = {axis: mesh.shape[axis] for axis in RULES["batch"] if mesh.shape[axis] > 1}
        raise ValueError(
            f"{name} = {batch_size} rows can't be divided by {rows}, the product of the mesh's "
            f"batch axes {sizes}; make it a multiple of {rows}"
        )
    if length % columns:
        raise ValueError(
            f"config.data.length = {length} can't be divided by {columns}, the mesh's sequence axis"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
