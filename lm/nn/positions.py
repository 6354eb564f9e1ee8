"""Rotary position embeddings. Learned positions are an `lm.nn.layers.Embed` over the position."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lm.nn.kernels.rotary import rotate, rotate_by_matmul


def frequencies(size: int, theta: float, scaling: tuple[float, ...] = ()) -> np.ndarray:
    """Radians a position of each of the size / 2 pairs, f32.

    Args:
      scaling: () or Llama 3.1's (factor, low_frequency_factor, high_frequency_factor, original
        context). Pairs whose wavelength is above context / low turn `factor` times slower, those
        below context / high as they did. Between them stands a mean of the two, linear in context /
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
      interleaved: the pairs that turn together are (2i, 2i + 1) of the R dims that turn, as in the
        paper;
        otherwise (i, i + R / 2), as in GPT-NeoX and in Hugging Face's Llama weights.
      scaling: see `frequencies`.
    """
    turning = int(x_BTNH.shape[-1] * fraction)
    angles_BT1P = jnp.einsum(
        "bt,h->bth", positions_BT.astype(jnp.float32), frequencies(turning, theta, scaling)
    )[:, :, None, :]
    return _turn(interleaved, x_BTNH, jnp.sin(angles_BT1P), jnp.cos(angles_BT1P))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn(interleaved, x, sin, cos):
    return jax.lax.platform_dependent(
        x,
        sin,
        cos,
        tpu=functools.partial(rotate_by_matmul, interleaved),
        default=functools.partial(rotate, interleaved),
    )


def _turn_forward(interleaved, x, sin, cos):
    return _turn(interleaved, x, sin, cos), (sin, cos)


def _turn_backward(interleaved, angles, grad):
    # The gradient of a rotation is the rotation back, as cheap as itself.
    sin, cos = angles
    return _turn(interleaved, grad, -sin, cos), None, None


_turn.defvjp(_turn_forward, _turn_backward)
