"""A tripwire: whether devices that hold the same values hold the same bits.

Nothing else would notice a chip that computes or remembers wrongly: its replica drifts away, and
spoils the gradients of all.
"""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lm import sharding, stopping, trained

NAMED = 5  # arrays that an error names, at most


class ReplicasDiffer(stopping.RunFailed):
    """Devices that hold the same values have different bits; nothing of it is saved."""


class _Array(NamedTuple):
    """An array with replicas."""

    name: str
    split: list[int]  # dims of the mesh that split it
    spec: PartitionSpec


def _two_hashes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two hashes of an array's bits. One changed element changes both; of other changes, such as a
    sign that is wrong everywhere, one in 2^32 is missed by either.

    Each element is mixed with its place by MurmurHash3's finalizer (Appleby 2011), then summed.
    """
    bits, places = trained.bits_and_places(x)
    mixed = bits + places * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    mixed ^= mixed >> 16
    by_place = jnp.sum(mixed * (2 * places + 1), dtype=jnp.uint32)
    return jnp.sum(mixed, dtype=jnp.uint32), by_place


class Replicas:
    """Compares the replicas of a tree of arrays.

    Args:
      abstract: the tree as ShapeDtypeStructs with `NamedSharding`s on `mesh`.
    """

    def __init__(self, mesh: Mesh, abstract):
        self._mesh = mesh
        self._arrays: list[_Array | None] = []  # None: no device has a second copy
        compared_bytes = total_bytes = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
            spec = leaf.sharding.spec
            axes = set()
            for entry in spec:
                axes.update(sharding.mesh_axes_of(entry))
            split = [i for i, name in enumerate(mesh.axis_names) if name in axes]

            has_replicas = int(np.prod([mesh.devices.shape[i] for i in split])) < mesh.size
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            self._arrays.append(_Array(name, split, spec) if has_replicas else None)
            size = leaf.size * leaf.dtype.itemsize
            total_bytes += size
            compared_bytes += size * has_replicas

        self._compared = [array for array in self._arrays if array]
        self._hash = jax.jit(self._hashes)
        share = compared_bytes / max(total_bytes, 1)
        log = logging.info if share > 0.5 else logging.warning
        log(
            "config.train.check_replicas_every compares %d of %d arrays, %.1f%% of the bytes: the "
            "mesh holds no others twice",
            len(self._compared),
            len(self._arrays),
            100 * share,
        )

    def _hashes(self, leaves: list[jax.Array]) -> jax.Array:
        """[devices, arrays, 2] uint32, in the mesh's order: two hashes of what each device holds.

        Each is computed from the device's own copy.
        """

        def local(leaves):
            hashes = jnp.stack([jnp.stack(_two_hashes(leaf)) for leaf in leaves])
            return jax.lax.all_gather(hashes, self._mesh.axis_names)

        specs = [array.spec for array in self._compared]
        return jax.shard_map(
            local, mesh=self._mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False
        )(leaves)

    def check(self, tree, step: int) -> None:
        """Compares the arrays of a tree. Every process calls it at the same step.

        Raises:
          ReplicasDiffer: with the arrays and devices.
        """
        if not self._compared:
            return
        leaves = jax.tree.leaves(tree)
        leaves = [leaf for leaf, array in zip(leaves, self._arrays, strict=True) if array]
        hashes = np.asarray(jax.device_get(self._hash(leaves)))

        found = []
        for number, array in enumerate(self._compared):
            if devices := self._odd_ones(array, hashes[:, number]):
                found.append(f"{array.name} on {', '.join(devices)}")
        if not found:
            return
        rest = f", and {len(found) - NAMED} other arrays" if len(found) > NAMED else ""
        raise ReplicasDiffer(
            f"after step {step} devices that should hold the same values don't: "
            f"{'; '.join(found[:NAMED])}{rest}. A device has computed or remembered something "
            "wrong. The step isn't saved; starting again goes on from the newest checkpoint. If "
            "the same device is named again, leave it out."
        )

    def _odd_ones(self, array: _Array, hashes: np.ndarray) -> list[str]:
        """The devices whose part of an array isn't what most devices with that part have; where
        there is no majority, all of them.

        Args:
          hashes: [devices, 2].
        """
        mesh = self._mesh
        replicated = [i for i in range(mesh.devices.ndim) if i not in array.split]
        order = array.split + replicated
        num_copies = int(np.prod([mesh.devices.shape[i] for i in replicated]))
        devices = mesh.devices.transpose(order).reshape(-1, num_copies)
        keys = hashes[:, 0].astype(np.uint64) << np.uint64(32) | hashes[:, 1]
        keys = keys.reshape(mesh.devices.shape).transpose(order).reshape(-1, num_copies)

        odd = []
        for part, part_keys in zip(devices, keys):
            values, counts = np.unique(part_keys, return_counts=True)
            if len(values) == 1:
                continue
            most = values[counts.argmax()] if 2 * counts.max() > num_copies else None
            for device, key in zip(part, part_keys):
                if most is None or key != most:
                    odd.append(f"device {device.id} (process {device.process_index})")
        return odd
