"""Writing keys and values into a cache.

Letters: B batch, T new positions, K kv heads, S slots, H head size.
"""

import functools

import jax
import jax.numpy as jnp


def plain_write(cache_BKSH: jax.Array, new_BTKH: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """The cache with new keys or values in their slots: the reference of `write`."""
    rows_B1 = jnp.arange(len(slots_BT))[:, None]
    new_BTKH = new_BTKH.astype(cache_BKSH.dtype)
    return cache_BKSH.at[rows_B1, :, slots_BT].set(new_BTKH, mode="drop")


def write(cache_BKSH: jax.Array, new_BTKH: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """As `plain_write`, without two detours of XLA's CPU compiler.

    It transposes the whole cache there and back where the indexed dims don't come first, so rows
    and heads are one dim meanwhile. And it converts all of a bf16 cache to f32 to scatter into it,
    so bf16 numbers are written as integers.
    """
    batch, kv_heads, num_slots, size = cache_BKSH.shape
    rows = jnp.arange(batch * kv_heads)[:, None]
    slots = jnp.repeat(slots_BT, kv_heads, axis=0)
    new = new_BTKH.swapaxes(1, 2).reshape(batch * kv_heads, -1, size).astype(cache_BKSH.dtype)

    as_bits = functools.partial(
        jax.lax.bitcast_convert_type,
        new_dtype=jnp.uint16 if cache_BKSH.dtype == jnp.bfloat16 else cache_BKSH.dtype,
    )
    old_bits = as_bits(cache_BKSH.reshape(-1, num_slots, size))
    bits = old_bits.at[rows, slots].set(as_bits(new), mode="drop")
    return jax.lax.bitcast_convert_type(bits, cache_BKSH.dtype).reshape(cache_BKSH.shape)
