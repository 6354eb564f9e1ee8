"""What says where a token stands: rotary embeddings, sinusoids, biases by distance. Learned
positions are an `lm.nn.layers.Embed` over the position.

Letters: B batch, T query length, S key length, N query heads, H head size, D embed, P pairs.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm.collectives import gather_sequence
from lm.nn.kernels.rotary import rotate, rotate_by_matmul
from lm.nn.layers import gather, param

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


def sinusoids(length: int, dim: int, *, interleaved: bool) -> np.ndarray:
    """Sines and cosines of positions, f32 [length, dim] (Vaswani et al. 2017, arXiv 1706.03762,
    section 3.5).

    Args:
      interleaved: a cosine stands behind its sine, as in the paper; otherwise all cosines behind
        all sines, as in Marian.
    """
    frequencies_P = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    angles = np.arange(length)[:, None] * frequencies_P[None]
    parts = np.sin(angles), np.cos(angles)
    if interleaved:
        return np.stack(parts, axis=-1).reshape(length, -1)[:, :dim].astype(np.float32)
    return np.concatenate(parts, axis=-1)[:, :dim].astype(np.float32)


def bucket_of_distance(num_buckets: int, max_distance: int) -> np.ndarray:
    """[max_distance + 1], the bucket of each distance between positions, the last one that of all
    longer ones (Raffel et al. 2020, arXiv 1910.10683, section 2.1; the rule is that of the
    released code).

    Half of the buckets are for distances of their own, the others get wider.
    """
    exact = num_buckets // 2
    distances = np.arange(max_distance + 1, dtype=np.float32)

    # In f32, as where such models were trained: at the edges of buckets it matters.
    ratios = np.log(np.maximum(distances, exact) / np.float32(exact))
    ratios = ratios / np.float32(math.log(max_distance / exact))

    wide = exact + (ratios * np.float32(num_buckets - exact)).astype(np.int32)
    buckets = np.where(distances < exact, distances, np.minimum(wide, num_buckets - 1))
    return buckets.astype(np.int32)


class RelativeBias(nnx.Module):
    """T5's bias of attention's scores, by the distance between query and key.

    Args:
      num_buckets, max_distance: see `bucket_of_distance`.
      sees_later: keys behind a query have buckets of their own, half of all; otherwise they count
        as distance 0.
    """

    def __init__(
        self,
        key: jax.Array,
        num_heads: int,
        *,
        num_buckets: int,
        max_distance: int,
        sees_later: bool,
        std: float,
        dtype,
    ):
        self.table = param(key, (num_buckets, num_heads), ("buckets", "heads"), dtype, std=std)
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.sees_later = sees_later

    def __call__(self, query_positions_BT: jax.Array, key_positions_BS: jax.Array) -> jax.Array:
        """f32 [B, N, T, S]."""
        distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
        one_side = self.num_buckets // 2 if self.sees_later else self.num_buckets
        buckets = jnp.asarray(bucket_of_distance(one_side, self.max_distance))

        def bucket(distance):
            return buckets[jnp.clip(distance, 0, self.max_distance)]

        bucket_BTS = bucket(distance_BTS)

        if self.sees_later:
            later_BTS = one_side + bucket(-distance_BTS)
            bucket_BTS = jnp.where(distance_BTS < 0, later_BTS, bucket_BTS)
        return jnp.moveaxis(gather(self.table, jnp.float32)[bucket_BTS], -1, 1)
