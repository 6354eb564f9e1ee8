"""What objectives on units have in common. A unit is two neighbouring segments of a row, see
`lm.data.units`.

Letters: B batch, T length, U units of a row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm import collectives


def sums(values_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array, int]:
    """Returns ([B, U] sums over the units' first parts, over their second parts, how many devices
    have the same ones); 0 where there is no unit.
    """
    sums_BS, parts = collectives.segment_sums(values_BT, segments_BT)
    end = 2 * (sums_BS.shape[1] // 2)
    return sums_BS[:, 0:end:2], sums_BS[:, 1:end:2], parts


def summed(unit_terms: Callable) -> Callable:
    """The loss of an objective whose terms are those of units."""

    def loss(model, batch, keys_B, **models):
        weights_BU, terms, aux = unit_terms(model, batch, keys_B, **models)
        count = jnp.sum(weights_BU)
        sums_of_terms = {}
        for name, values_BU in terms.items():
            total = jnp.sum(jnp.where(weights_BU > 0, values_BU, 0) * weights_BU)
            sums_of_terms[name] = (total, count)
        return sums_of_terms["loss"][0], count, sums_of_terms | aux

    return loss
