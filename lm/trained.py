"""Which parameters are trained, and which stay as they are.

The train state holds the trained part. The frozen part is named by where it comes from, and by the
fingerprint of its values; it is neither differentiated nor checkpointed.
"""

import fnmatch
import json
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lm.files import short_hash


def parse(patterns: str, paths: list[str]) -> Callable[[str], bool]:
    """Returns whether a parameter of a path is trained, by config.train.trained.

    Args:
      patterns: with commas between them, each of the form "layers/*"; one behind a "!" takes out
        what it matches. The last one that matches counts.
      paths: all of them.

    Raises:
      ValueError: a pattern that matches none of them, or nothing is left to train.
    """
    rules = [item.strip() for item in patterns.split(",")]
    for rule in rules:
        if not fnmatch.filter(paths, rule.removeprefix("!")):
            raise ValueError(
                f"config.train.trained = {patterns!r}: {rule!r} matches no parameter; there are "
                f"{paths}"
            )

    def is_trained(path: str) -> bool:
        trained = False
        for rule in rules:
            if fnmatch.fnmatchcase(path, rule.removeprefix("!")):
                trained = not rule.startswith("!")
        return trained

    if not any(map(is_trained, paths)):
        raise ValueError(f"config.train.trained = {patterns!r} leaves nothing to train")
    return is_trained


def paths_of(tree: Mapping, prefix: str = "") -> list[str]:
    """The paths of all leaves of nested dicts; a tuple (the axes of a parameter) is a leaf."""
    paths = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            paths += paths_of(value, f"{prefix}{name}/")
        else:
            paths.append(f"{prefix}{name}")
    return paths


def split(tree: Mapping, is_trained: Callable[[str], bool], prefix: str = "") -> tuple[dict, dict]:
    """(the trained part, the frozen part) of nested dicts, without dicts that are empty."""
    trained: dict = {}
    frozen: dict = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            trained_part, frozen_part = split(value, is_trained, f"{path}/")
            if trained_part:
                trained[name] = trained_part
            if frozen_part:
                frozen[name] = frozen_part
        elif is_trained(path):
            trained[name] = value
        else:
            frozen[name] = value
    return trained, frozen


def merge(trained: Mapping, frozen: Mapping) -> dict:
    """The whole of two parts that `split` made."""
    whole = dict(trained)
    for name, value in frozen.items():
        whole[name] = merge(whole[name], value) if name in whole else value
    return whole


def fingerprint(params) -> str:
    """Returns a hash of the parameters' bits, the same however they are laid out."""
    sums = jax.device_get(jax.jit(_sums)(params))
    facts = []
    for (path, leaf), pair in zip(
        jax.tree_util.tree_leaves_with_path(params), zip(*sums), strict=True
    ):
        facts.append([jax.tree_util.keystr(path), str(leaf.dtype), leaf.shape, *map(int, pair)])
    return short_hash(json.dumps(facts).encode())


def _sums(params) -> tuple[list[jax.Array], list[jax.Array]]:
    """For each parameter two sums of its bits modulo 2^32, the second one by place."""
    plain, by_place = [], []
    for leaf in jax.tree.leaves(params):
        plain_sum, place_sum = bit_sums(leaf)
        plain.append(plain_sum)
        by_place.append(place_sum)
    return plain, by_place


def bit_sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums of an array's bits modulo 2^32, the second one by place.

    Two arrays that differ in one element, however little, differ in both: a place counts an odd
    number of times. (Many differences may cancel, such as an even number of changed signs.)
    """
    bits, places = bits_and_places(x)
    plain = jnp.sum(bits, dtype=jnp.uint32)
    return plain, jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)


def bits_and_places(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bits of each element and its place, as uint32 arrays of x's shape."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    width = jnp.dtype(x.dtype).itemsize * 8
    bits = jax.lax.bitcast_convert_type(x, np.dtype(f"uint{width}")).astype(jnp.uint32)
    places = jnp.zeros(x.shape, jnp.uint32)
    for dim in range(x.ndim):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        places = places * jnp.uint32(1_000_003) + iota
    return bits, places
