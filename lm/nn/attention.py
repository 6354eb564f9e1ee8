"""Attention. Letters: B batch, T query length, S key length, D embed, N query heads, K kv heads, H head size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.layers import add_bias, dense, param
from lm.nn.positions import rope
from lm.sharding import constrain


class Cache(NamedTuple):
    """Keys and values of the positions seen so far; slot s of a row holds the position s of that row's sequence."""
    key: jax.Array  # [B, S, K, H]; [L, B, S, K, H] for a stack of layers
    value: jax.Array


def causal_mask(segments_BT: jax.Array) -> jax.Array:
    """[B, T, T], True where the query (dim 1) may attend to the key (dim 2): no later one, and only in its own document."""
    length = segments_BT.shape[1]
    earlier_TT = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & earlier_TT[None]


def cache_mask(positions_BT: jax.Array, cache_length: int) -> jax.Array:
    """[B, T, S], True for the cache slots up to the query's own position; later ones hold padding, or nothing yet."""
    return jnp.arange(cache_length)[None, None, :] <= positions_BT[:, :, None]


class Attention(nnx.Module):
    """Multi-head attention with `num_kv_heads` <= `num_heads` shared keys and values (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, key: jax.Array, config, *, out_std: float):
        c = config
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.rope_theta = c.rope_theta if c.positions == "rope" else None
        self.implementation, self.compute_dtype = c.attention, c.compute_dtype
        heads = dict(dtype=c.param_dtype, std=c.init_std)
        self.query = param(q_key, (c.embed_dim, c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), **heads)
        self.key = param(k_key, (c.embed_dim, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), **heads)
        self.value = param(v_key, (c.embed_dim, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), **heads)
        self.out = param(o_key, (c.num_heads, c.head_dim, c.embed_dim), ("heads", "head_dim", "embed"), c.param_dtype, std=out_std)
        self.use_bias = c.use_bias
        if c.use_bias:
            self.query_bias = param(None, (c.num_heads, c.head_dim), ("heads", "head_dim_bias"), c.param_dtype)
            self.key_bias = param(None, (c.num_kv_heads, c.head_dim), ("kv_heads", "head_dim_bias"), c.param_dtype)
            self.value_bias = param(None, (c.num_kv_heads, c.head_dim), ("kv_heads", "head_dim_bias"), c.param_dtype)
            self.out_bias = param(None, (c.embed_dim,), ("embed",), c.param_dtype)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, mask_BTS: jax.Array, cache: Cache | None = None):
        """Returns the output [B, T, D] and the cache with this call's keys and values written at `positions_BT`."""
        def project(weight, bias):
            y = dense("btd,dnh->btnh", x_BTD, weight, self.compute_dtype)
            return add_bias(y, bias) if bias is not None else y
        biases = (self.query_bias, self.key_bias, self.value_bias) if self.use_bias else (None, None, None)
        q_BTNH = project(self.query, biases[0])
        k_BSKH = project(self.key, biases[1])
        v_BSKH = project(self.value, biases[2])
        if self.rope_theta is not None:
            q_BTNH = rope(q_BTNH, positions_BT, self.rope_theta)
            k_BSKH = rope(k_BSKH, positions_BT, self.rope_theta)
        if cache is not None:
            rows = jnp.arange(x_BTD.shape[0])[:, None]
            cache = Cache(cache.key.at[rows, positions_BT].set(k_BSKH.astype(cache.key.dtype), mode="drop"),
                          cache.value.at[rows, positions_BT].set(v_BSKH.astype(cache.value.dtype), mode="drop"))
            k_BSKH, v_BSKH = cache.key.astype(q_BTNH.dtype), cache.value.astype(q_BTNH.dtype)
        q_BTNH = constrain(q_BTNH, "batch", "length", "act_heads", None)
        k_BSKH = constrain(k_BSKH, "batch", None, "act_heads", None)
        v_BSKH = constrain(v_BSKH, "batch", None, "act_heads", None)
        # Softmax in f32 inside; query heads n attend to kv head n // (N/K).
        with jax.numpy_dtype_promotion("standard"):  # it multiplies bf16 by f32 scalars
            y_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation=self.implementation)
        y_BTNH = constrain(y_BTNH, "batch", "length", "act_heads", None)
        out_BTD = dense("btnh,nhd->btd", y_BTNH, self.out, self.compute_dtype)
        return add_bias(out_BTD, self.out_bias) if self.use_bias else out_BTD, cache
