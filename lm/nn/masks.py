"""Who may attend to whom, and where a cache keeps what was attended to.

A caller says it as `Visible`, a model makes a `Mask` of it, and attention reads that.

Letters: B batch, T query length, S key length (or slots of a cache).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# What a kernel knows before it sees an array. Those of `NO_LATER_KEYS` leave out what comes later
# in the row.
NO_LATER_KEYS = ("causal", "window", "tree")
KINDS = (*NO_LATER_KEYS, "full", "order")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["order_BT", "until_BT"],
    meta_fields=["kind", "strict"],
)
@dataclasses.dataclass(frozen=True)
class Visible:
    """Which keys of its own segment a query sees.

    causal: those up to itself in the row; of a model with a window the last of them.
    full: all.
    order: those whose order is at most its own, or smaller, if `strict`. A prefix of order 0 with
      1, 2, ... behind it is a prefix model; spans in another order than they stand in the row are
      GLM's blanks; a permutation is XLNet's, whose query stream is strict.
    tree: those from whose place to `until` it stands, where a sequence branches (lm.evals.tree).

    `CAUSAL`, `FULL`, `by_order` and `by_tree` make them.

    Attributes:
      kind: one of these names, known when a program is traced.
      order_BT, until_BT: int32, the arrays of the last two kinds; None for the others.
    """

    kind: str
    order_BT: jax.Array | None = None
    until_BT: jax.Array | None = None
    strict: bool = False


CAUSAL = Visible("causal")
FULL = Visible("full")


def by_order(order_BT: jax.Array, *, strict: bool = False) -> Visible:
    return Visible("order", order_BT=order_BT, strict=strict)


def by_tree(until_BT: jax.Array) -> Visible:
    return Visible("tree", until_BT=until_BT)


class Mask(NamedTuple):
    """What each query may attend to; rows are whole here, also on a mesh that splits them.

    Attributes:
      kind: one of `KINDS`; "cache" for the slots of a cache, "source" for another text.
      array_BTS: bool, True where query T may attend to key S. None where a kernel finds it out from
        the kind and the segments.
      segments_BT: int32, the number of each token's document in its row; 0 is padding.
      slots_BT: where a cache takes this call's keys and values, see `cache_slots`. None without a
        cache.
      bias_BNTS: f32, added to the scores; its rows may be one for all. None: nothing is.
    """

    kind: str
    array_BTS: jax.Array | None
    segments_BT: jax.Array
    slots_BT: jax.Array | None = None
    bias_BNTS: jax.Array | None = None


def static_kind(visible: Visible, window: int) -> str:
    """Returns the one of `KINDS` that a model with this window (0: none) has.

    Raises:
      ValueError: a window where a query may see what comes later.
    """
    if window and visible.kind not in NO_LATER_KEYS:
        raise ValueError(
            f"config.model.window = {window}: attention of the kind {visible.kind!r} has no window"
        )
    return "window" if window and visible.kind == "causal" else visible.kind


def array(
    visible: Visible, segments_BT: jax.Array, positions_BT: jax.Array, window: int = 0
) -> jax.Array:
    """[B, T, T], True where the query (dim 1) may attend to the key (dim 2).

    Args:
      window: how many positions a query sees back, itself included; 0: all (Mistral 7B, Jiang et
        al. 2023, arXiv 2310.06825, section 2). In a tree it counts positions, not places.

    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    if visible.kind == "full":
        return same_BTT
    if visible.kind == "order":
        query_BT1, key_B1T = visible.order_BT[:, :, None], visible.order_BT[:, None, :]
        return same_BTT & (key_B1T < query_BT1 if visible.strict else key_B1T <= query_BT1)

    length = segments_BT.shape[1]
    place_T = jnp.arange(length)
    if visible.kind == "tree":
        in_subtree_BTT = (place_T[None, :, None] >= place_T[None, None, :]) & (
            place_T[None, :, None] < visible.until_BT[:, None, :]
        )
        distance_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
        return same_BTT & in_subtree_BTT & (distance_BTT < (window or length))

    distance_TT = place_T[:, None] - place_T[None, :]
    seen_TT = (distance_TT >= 0) & (distance_TT < (window or length))
    return same_BTT & seen_TT[None]


def of_source(segments_BT: jax.Array, source_segments_BS: jax.Array) -> Mask:
    """What each query may attend to of another text: the source that has its segment's number."""
    array_BTS = segments_BT[:, :, None] == source_segments_BS[:, None, :]
    return Mask("source", array_BTS, segments_BT)


def cache_slots(positions_BT: jax.Array, segments_BT: jax.Array, num_slots: int) -> jax.Array:
    """[B, T], the slots that keys and values of these positions are written to.

    Position p lies in slot p mod S, so of a longer row the last S positions are kept. Padding
    (segment 0) and what comes before those get `num_slots`, which is no slot: it is dropped.
    """
    length_B1 = jnp.max(jnp.where(segments_BT > 0, positions_BT + 1, 0), axis=1, keepdims=True)
    kept_BT = (segments_BT > 0) & (positions_BT >= length_B1 - num_slots)
    return jnp.where(kept_BT, positions_BT % num_slots, num_slots)


def cache_mask(positions_BT: jax.Array, num_slots: int, window: int = 0) -> jax.Array:
    """[B, T, S], True for the slots that a query at this position may attend to.

    Those are the slots that hold a position up to its own, of the last `window` (0: all).
    """
    distance_BTS = (positions_BT[:, :, None] - jnp.arange(num_slots)[None, None, :]) % num_slots
    return (distance_BTS <= positions_BT[:, :, None]) & (distance_BTS < (window or num_slots))
