"""Positions: rotary embeddings. (Learned positions are an `lm.nn.layers.Embed` over the position.)"""

import jax
import jax.numpy as jnp
import numpy as np


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in f32, returned in x's dtype.

    The pairs that turn together are (i, i + H/2), as in GPT-NeoX and in Hugging Face's Llama weights, not (2i, 2i + 1).
    """
    half = x_BTNH.shape[-1] // 2
    frequencies_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BT1H = jnp.einsum("bt,h->bth", positions_BT.astype(jnp.float32), frequencies_H)[:, :, None, :]
    return _turn(x_BTNH, jnp.sin(angles_BT1H), jnp.cos(angles_BT1H))


@jax.custom_vjp
def _turn(x, sin, cos):
    return jax.lax.platform_dependent(x, sin, cos, tpu=turn_by_matmul, default=turn_halves)


# Turned back by the same angles: the gradient of a rotation, as cheap as itself.
_turn.defvjp(lambda x, sin, cos: (_turn(x, sin, cos), (sin, cos)), lambda angles, g: (_turn(g, -angles[0], angles[1]), None, None))


def turn_halves(x_BTNH, sin_BT1H, cos_BT1H):
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos_BT1H - second * sin_BT1H, second * cos_BT1H + first * sin_BT1H], axis=-1).astype(x_BTNH.dtype)


def turn_by_matmul(x_BTNH, sin_BT1H, cos_BT1H):
    """The same on a TPU, where half a head doesn't fill the 128 lanes of a vector: the matrix units swap the halves (each sum has one
    term, so it is exact), and the rest fuses with that."""
    size = x_BTNH.shape[-1]
    swap_HH = jnp.asarray(np.roll(np.eye(size), size // 2, axis=0), x_BTNH.dtype)
    swapped = jnp.einsum("btnh,hg->btng", x_BTNH, swap_HH, precision="highest", preferred_element_type=jnp.float32)
    both = lambda a, b: jnp.concatenate([a, b], axis=-1)
    return (x_BTNH.astype(jnp.float32) * both(cos_BT1H, cos_BT1H) + swapped * both(-sin_BT1H, sin_BT1H)).astype(x_BTNH.dtype)
