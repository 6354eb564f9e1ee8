"""Who may attend to whom, and where a cache keeps what was attended to.

Letters: B batch, T query length, S key length (or slots of a cache).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
    """What each query may attend to; rows are whole here, also on a mesh that splits them.

    Attributes:
      array_BTS: bool, True where query T may attend to key S. None where a kernel finds it out from
        the segments.
      segments_BT: int32, the number of each token's document in its row; 0 is padding.
      slots_BT: where a cache takes this call's keys and values, see `cache_slots`. None without a
        cache.
    """

    array_BTS: jax.Array | None
    segments_BT: jax.Array
    slots_BT: jax.Array | None = None


def causal_mask(segments_BT: jax.Array, window: int = 0) -> jax.Array:
    """[B, T, T], True where the query (dim 1) may attend to the key (dim 2).

    A query sees no later key, its own document only, and the last `window` positions only, itself
    included (0: all; Mistral 7B, Jiang et al. 2023, arXiv 2310.06825, section 2).
    """
    length = segments_BT.shape[1]
    distance_TT = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen_TT = (distance_TT >= 0) & (distance_TT < (window or length))
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & seen_TT[None]


def tree_mask(
    segments_BT: jax.Array, positions_BT: jax.Array, until_BT: jax.Array, window: int = 0
) -> jax.Array:
    """[B, T, T], as `causal_mask`, of rows in which a sequence branches (lm.evals.tree).

    A key is seen by the queries from itself up to `until`, the end of its subtree. A window counts
    positions, not places in the row.
    """
    place_T = jnp.arange(segments_BT.shape[1])
    in_subtree_BTT = (place_T[None, :, None] >= place_T[None, None, :]) & (
        place_T[None, :, None] < until_BT[:, None, :]
    )
    distance_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
    near_BTT = distance_BTT < (window or segments_BT.shape[1])
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & in_subtree_BTT & near_BTT


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
