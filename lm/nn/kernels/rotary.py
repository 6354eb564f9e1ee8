"""Turning pairs of a head's dims by an angle each, as each backend wants it.

Both ways take the same arguments and give the same numbers: x [B, T, N, H], and the sine and cosine
of the angles [B, T, 1, P], for the P = R / 2 pairs of the first R dims of a head. The other dims
stay.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotate(interleaved: bool, x_BTNH, sin_BT1P, cos_BT1P) -> jax.Array:
    """Rotates in f32, and returns x's dtype.

    Args:
      interleaved: the pairs are dims (2i, 2i + 1); otherwise (i, i + R / 2).
    """
    half = sin_BT1P.shape[-1]
    turning, rest = x_BTNH[..., : 2 * half].astype(jnp.float32), x_BTNH[..., 2 * half :]
    pairs = turning.reshape(*turning.shape[:-1], *((half, 2) if interleaved else (2, half)))
    axis = -1 if interleaved else -2
    first = jax.lax.index_in_dim(pairs, 0, axis + pairs.ndim, keepdims=False)
    second = jax.lax.index_in_dim(pairs, 1, axis + pairs.ndim, keepdims=False)

    turned = jnp.stack(
        [first * cos_BT1P - second * sin_BT1P, second * cos_BT1P + first * sin_BT1P], axis
    ).reshape(turning.shape)
    return jnp.concatenate([turned.astype(x_BTNH.dtype), rest], axis=-1)


def rotate_by_matmul(interleaved: bool, x_BTNH, sin_BT1P, cos_BT1P) -> jax.Array:
    """`rotate` for TPUs, where half a head doesn't fill the 128 lanes of a vector.

    The matrix units swap the dims of each pair. Each of their sums has one term, so it is exact.
    What is left fuses with it.
    """
    size, half = x_BTNH.shape[-1], sin_BT1P.shape[-1]
    pairs = np.arange(2 * half).reshape((half, 2) if interleaved else (2, half))
    first, second = (pairs[:, 0], pairs[:, 1]) if interleaved else pairs
    swap_HH = np.zeros((size, size))
    swap_HH[first, second] = swap_HH[second, first] = 1
    swapped = jnp.einsum(
        "btnh,hg->btng",
        x_BTNH,
        jnp.asarray(swap_HH, x_BTNH.dtype),
        precision="highest",
        preferred_element_type=jnp.float32,
    )

    def whole_head(first, second, rest):
        """A factor for each dim of a head: those of the pairs, then `rest`."""
        both = jnp.stack([first, second], -1 if interleaved else -2)
        both = both.reshape(*first.shape[:-1], 2 * half)
        padding = ((0, 0),) * 3 + ((0, size - 2 * half),)
        return jnp.pad(both, padding, constant_values=rest)

    turned = x_BTNH.astype(jnp.float32) * whole_head(cos_BT1P, cos_BT1P, 1.0)
    turned = turned + swapped * whole_head(-sin_BT1P, sin_BT1P, 0.0)
    return turned.astype(x_BTNH.dtype)
