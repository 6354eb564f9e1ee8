"""Positions: rotary embeddings. (Learned positions are an `lm.nn.layers.Embed` over the
position.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(size: int, theta: float, scaling: tuple[float, ...] = ()) -> np.ndarray:
    """Radians a position of each of the size / 2 pairs, f32.

    Args:
      scaling: () or Llama 3.1's (factor, low_frequency_factor, high_frequency_factor, original
        context): pairs whose wavelength is above context / low turn `factor` times slower, those
        below context / high as they did, and between them a mean of the two, linear in context /
        wavelength (Llama Team 2024, arXiv 2407.21783, section 3.4; the rule itself is that of the
        released code).
    """
    plain = theta ** (-np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    if not scaling:
        return plain
    factor, low, high, context = scaling
    share = np.clip((context * plain / (2 * np.pi) - low) / (high - low), 0, 1)
    return (plain * (share + (1 - share) / factor)).astype(np.float32)


def rope(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    theta: float,
    *,
    fraction: float = 1.0,
    interleaved: bool = False,
    scaling: tuple[float, ...] = (),
) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in f32, returned in x's dtype.

    Args:
      fraction: of the head's dims, from the first one, that turn (GPT-NeoX); the others stay.
      interleaved: the pairs that turn together are (2i, 2i + 1) of those R dims, as in the paper;
        otherwise (i, i + R/2), as in GPT-NeoX and in Hugging Face's Llama weights.
      scaling: see `frequencies`.
    """
    turning = int(x_BTNH.shape[-1] * fraction)
    angles_BT1H = jnp.einsum(
        "bt,h->bth", positions_BT.astype(jnp.float32), frequencies(turning, theta, scaling)
    )[:, :, None, :]
    return _turn(interleaved, x_BTNH, jnp.sin(angles_BT1H), jnp.cos(angles_BT1H))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn(interleaved, x, sin, cos):
    ways = (functools.partial(way, interleaved) for way in (turn_by_matmul, turn_pairs))
    return jax.lax.platform_dependent(x, sin, cos, tpu=next(ways), default=next(ways))


# Turned back by the same angles: the gradient of a rotation, as cheap as itself.
_turn.defvjp(
    lambda interleaved, x, sin, cos: (_turn(interleaved, x, sin, cos), (sin, cos)),
    lambda interleaved, angles, g: (_turn(interleaved, g, -angles[0], angles[1]), None, None),
)


def turn_pairs(interleaved: bool, x_BTNH, sin_BT1R, cos_BT1R):
    half = sin_BT1R.shape[-1]
    turning, rest = x_BTNH[..., : 2 * half].astype(jnp.float32), x_BTNH[..., 2 * half :]
    pairs = turning.reshape(*turning.shape[:-1], *((half, 2) if interleaved else (2, half)))
    axis = -1 if interleaved else -2
    first, second = (
        jax.lax.index_in_dim(pairs, i, axis + pairs.ndim, keepdims=False) for i in (0, 1)
    )
    turned = jnp.stack(
        [first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R], axis
    ).reshape(turning.shape)
    return jnp.concatenate([turned.astype(x_BTNH.dtype), rest], axis=-1)


def turn_by_matmul(interleaved: bool, x_BTNH, sin_BT1R, cos_BT1R):
    """The same on a TPU, where a part of a head doesn't fill the 128 lanes of a vector: the matrix
    units swap the dims of each pair (each sum has one term, so it is exact), and the rest fuses
    with that.
    """
    size, half = x_BTNH.shape[-1], sin_BT1R.shape[-1]
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

    def whole(first, second, rest):
        both = jnp.stack([first, second], -1 if interleaved else -2).reshape(
            *first.shape[:-1], 2 * half
        )
        return jnp.pad(both, ((0, 0),) * 3 + ((0, size - 2 * half),), constant_values=rest)

    return (
        x_BTNH.astype(jnp.float32) * whole(cos_BT1R, cos_BT1R, 1.0)
        + swapped * whole(-sin_BT1R, sin_BT1R, 0.0)
    ).astype(x_BTNH.dtype)
