"""Positions: rotary embeddings. (Learned positions are an `lm.nn.layers.Embed` over the position.)"""

import jax
import jax.numpy as jnp


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in f32, returned in x's dtype.

    The pairs that turn together are (i, i + H/2), as in GPT-NeoX and in Hugging Face's Llama weights, not (2i, 2i + 1).
    """
    half = x_BTNH.shape[-1] // 2
    frequencies_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BT1H = jnp.einsum("bt,h->bth", positions_BT.astype(jnp.float32), frequencies_H)[:, :, None, :]
    sin, cos = jnp.sin(angles_BT1H), jnp.cos(angles_BT1H)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
