"""Rotary position embeddings. Learned positions are an `lm.nn.layers.Embed` over the position."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.collectives import gather_sequence
from lm.nn.kernels.rotary import rotate, rotate_by_matmul

# Scalings, which make the pairs turn slower, for texts longer than those that a model was trained
# on. `context` is the length of the latter. In a configuration each is a tuple: its name in
# `SCALINGS`, and its numbers in this order.


class Linear(NamedTuple):
    """All pairs turn `factor` times slower (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


class Llama3(NamedTuple):
    """Pairs whose wavelength is above context / low turn `factor` times slower, those below
    context / high as they did. Between them stands a mean of the two, linear in context /
    wavelength (Llama Team 2024, arXiv 2407.21783, section 3.4; the rule itself is that of the
    released code).
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    context: float


class Yarn(NamedTuple):
    """Pairs that turn fewer than beta_slow times in the context turn `factor` times slower, those
    that turn more than beta_fast times as they did. Between them stands a mean of the two, linear
    in the number of the pair (Peng et al. 2023, arXiv 2309.00071).
    """

    factor: float
    context: float
    attention_factor: float = 1.0  # of queries and keys, each
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: float = 1.0  # 1: the ends of the mean are rounded outwards to whole pairs; 0: not


class Dynamic(NamedTuple):
    """A text longer than the context has a larger theta: its slowest pair turns slower by
    factor * length / context - (factor - 1) (of the Reddit users bloc97 and emozilla).
    """

    factor: float
    context: float


class LongRope(NamedTuple):
    """Each pair has a number that it turns slower by, one for texts within the context and one for
    longer ones (Ding et al. 2024, arXiv 2402.13753).
    """

    context: float
    attention_factor: float
    factors: tuple[float, ...]  # those within the context, then those for longer texts


Scaling = Linear | Llama3 | Yarn | Dynamic | LongRope
SCALINGS = dict(linear=Linear, llama3=Llama3, yarn=Yarn, dynamic=Dynamic, longrope=LongRope)


def parse_scaling(values: Sequence[str | float], size: int) -> Scaling | None:
    """The scaling that config.model.rope_scaling is; None for ().

    Args:
      values: a name of `SCALINGS` and the scaling's numbers. Four numbers alone are Llama 3's.
      size: dims of a head that turn.

    Raises:
      ValueError: no such scaling.
    """
    if not values:
        return None
    named = values if isinstance(values[0], str) else ("llama3", *values)
    name, numbers = named[0], named[1:]
    if name == "longrope":
        numbers = (*numbers[:2], tuple(numbers[2:]))

    wanted = []
    for other, kind in SCALINGS.items():
        fields = ", ".join(kind._fields)
        wanted.append(f"({other!r}, {fields})")
    problem = f"config.model.rope_scaling = {tuple(values)}; wanted () or {', '.join(wanted)}"
    try:
        scaling = SCALINGS[name](*numbers)
    except (KeyError, TypeError):
        raise ValueError(problem) from None

    if name == "longrope" and len(scaling.factors) != size:
        raise ValueError(f"{problem}; factors are {size}, as many as the dims of a head that turn")
    positive = list(values[1:] if isinstance(values[0], str) else values)
    if name == "yarn" and len(positive) == len(Yarn._fields) and positive[-1] == 0:
        positive.pop()
    if not all(number > 0 for number in positive):
        raise ValueError(f"{problem}, of numbers above 0")
    return scaling


def frequencies(size: int, theta: float, scaling: Scaling | None = None) -> np.ndarray:
    """Radians a position of each of the size / 2 pairs, f32, whatever the length of the text.

    Args:
      scaling: not one that depends on the length.
    """
    plain = theta ** (-np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    match scaling:
        case None:
            return plain
        case Linear(factor):
            return plain / np.float32(factor)
        case Llama3(factor, low, high, context):
            share = np.clip((context * plain / (2 * np.pi) - low) / (high - low), 0, 1)
        case Yarn(factor, context):
            share = _yarn_share(size, theta, scaling)
    return (plain * (share + (1 - share) / factor)).astype(np.float32)


def _yarn_share(size: int, theta: float, scaling: Yarn) -> np.ndarray:
    """For each pair, how much of it turns as it did."""

    def pair_of(num_turns: float) -> float:
        """The pair, in fractions, that turns so many times in the context."""
        wavelength = scaling.context / (2 * math.pi * num_turns)
        return size * math.log(wavelength) / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    # Between a pair and itself there is a step.
    span = last - first or 0.001
    return 1 - np.clip((np.arange(size // 2) - first) / span, 0, 1)


def _row_frequencies(
    size: int, theta: float, scaling: Dynamic | LongRope, positions_BT: jax.Array
) -> jax.Array:
    """`frequencies` [B, P] by the length of each row's longest text, or of what there is of it."""
    last_B1 = jnp.max(gather_sequence(positions_BT), axis=1, keepdims=True)
    length_B1 = last_B1.astype(jnp.float32) + 1.0
    plain_1P = frequencies(size, theta)[None]

    if isinstance(scaling, LongRope):
        factors = np.asarray(scaling.factors, np.float32).reshape(2, 1, size // 2)
        within_1P, beyond_1P = plain_1P / factors
        return jnp.where(length_B1 > scaling.context, beyond_1P, within_1P)

    # theta is stretched such that the last of several pairs turns slower by `stretch`.
    stretch_B1 = scaling.factor * jnp.maximum(length_B1 / scaling.context, 1.0)
    stretch_B1 = stretch_B1 - (scaling.factor - 1.0)
    exponents_1P = np.arange(0, size, 2, dtype=np.float32)[None] / np.float32(max(size - 2, 1))
    return plain_1P * stretch_B1**-exponents_1P


def rope(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    theta: float,
    *,
    fraction: float = 1.0,
    interleaved: bool = False,
    scaling: Sequence[str | float] = (),
) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in f32, returned in x's dtype.

    Args:
      fraction: of the head's dims, from the first one, that turn (GPT-NeoX); the others stay.
      interleaved: the pairs that turn together are (2i, 2i + 1) of the R dims that turn, as in the
        paper;
        otherwise (i, i + R / 2), as in GPT-NeoX and in Hugging Face's Llama weights.
      scaling: see `parse_scaling`.
    """
    turning = int(x_BTNH.shape[-1] * fraction)
    parsed = parse_scaling(scaling, turning)
    positions = positions_BT.astype(jnp.float32)
    if isinstance(parsed, Dynamic | LongRope):
        frequencies_BP = _row_frequencies(turning, theta, parsed, positions_BT)
        angles_BTP = jnp.einsum("bt,bp->btp", positions, frequencies_BP)
    else:
        angles_BTP = jnp.einsum("bt,p->btp", positions, frequencies(turning, theta, parsed))

    angles_BT1P = angles_BTP[:, :, None, :]
    sin, cos = jnp.sin(angles_BT1P), jnp.cos(angles_BT1P)
    if isinstance(parsed, Yarn | LongRope):
        sin, cos = sin * parsed.attention_factor, cos * parsed.attention_factor
    return _turn(interleaved, x_BTNH, sin, cos)


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
