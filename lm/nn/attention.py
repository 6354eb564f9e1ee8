"""Multi-head attention, in training and with a cache.

Letters: B batch, T query length, S key length, D embed, N query heads, K kv heads, G = N / K,
H head size.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm import collectives
from lm.nn import lora, nf4
from lm.nn.kernels import cache as cache_kernel
from lm.nn.kernels.attention import blocked_attention, by_kv_head, splash_attention
from lm.nn.layers import RMSNorm, add_bias, dense, fold_in_each, param
from lm.nn.masks import NO_LATER_KEYS, Mask
from lm.nn.positions import rope

SPLASH = ("splash", "splash_interpreted")
SPLASH_KINDS = ("causal", "window", "full")  # its other masks would be arrays anyway
KERNEL_PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}  # kernels that don't run everywhere


class Cache(NamedTuple):
    """Keys and values of the positions seen so far.

    Position p of a row lies in slot p mod S, so that a window needs no more slots than its size.
    """

    # [B, K, S, H], as both matmuls of attention read it; [L, B, K, S, H] for a stack of layers.
    key: jax.Array
    value: jax.Array


def cached_attention(q_B1NH: jax.Array, cache: Cache, mask: Mask) -> jax.Array:
    """Attention of one query a row to the cache, [B, 1, N, H]; scores, softmax and sums in f32."""
    batch, _, heads, size = q_B1NH.shape
    q_BKGH = q_B1NH.reshape(batch, cache.key.shape[1], -1, size)
    scores_BKGS = (
        jnp.einsum(
            "bkgh,bksh->bkgs",
            q_BKGH,
            cache.key.astype(q_BKGH.dtype),
            preferred_element_type=jnp.float32,
        )
        * size**-0.5
    )
    if mask.bias_BNTS is not None:
        scores_BKGS = scores_BKGS + by_kv_head(mask.bias_BNTS, cache.key.shape[1])[:, :, :, 0]
    scores_BKGS = jnp.where(mask.array_BTS[:, :, None], scores_BKGS, -1e30)
    probs_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(q_BKGH.dtype)
    out_BKGH = jnp.einsum(
        "bkgs,bksh->bkgh",
        probs_BKGS,
        cache.value.astype(q_BKGH.dtype),
        preferred_element_type=jnp.float32,
    )
    return out_BKGH.astype(q_B1NH.dtype).reshape(batch, 1, heads, size)


class Attention(nnx.Module):
    """Multi-head attention with `num_kv_heads` <= `num_heads` shared keys and values (Ainslie et
    al. 2023, arXiv 2305.13245). Query head n attends to kv head n // (N / K).

    `config.scale_scores = False` leaves out the factor of H^-0.5 (T5).
    """

    def __init__(self, key: jax.Array, config, *, out_std: float):
        c = config
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.window = c.window
        self.implementation = c.attention
        self.dropout = c.attention_dropout
        self.scale_scores = c.scale_scores
        self.compute_dtype = c.compute_dtype
        self.rope = None
        if c.positions == "rope":
            self.rope = functools.partial(
                rope,
                theta=c.rope_theta,
                fraction=c.rope_fraction,
                interleaved=c.rope_interleaved,
                scaling=tuple(c.rope_scaling),
            )

        q_shape, kv_shape = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        options = dict(dtype=c.param_dtype, std=c.init_std)
        self.query = param(q_key, (c.embed_dim, *q_shape), q_axes, **options)
        self.key = param(k_key, (c.embed_dim, *kv_shape), kv_axes, **options)
        self.value = param(v_key, (c.embed_dim, *kv_shape), kv_axes, **options)
        out_axes = ("heads", "head_dim", "embed")
        self.out = param(o_key, (*q_shape, c.embed_dim), out_axes, c.param_dtype, std=out_std)

        def bias(part, shape, axes):
            return param(None, shape, axes, c.param_dtype) if part in c.biases else None

        self.query_bias = bias("qkv", q_shape, ("heads", "head_dim_bias"))
        self.key_bias = bias("qkv", kv_shape, ("kv_heads", "head_dim_bias"))
        self.value_bias = bias("qkv", kv_shape, ("kv_heads", "head_dim_bias"))
        self.out_bias = bias("out", (c.embed_dim,), ("embed",))

        # Over each head (Henry et al. 2020, arXiv 2010.04245; RMSNorm in Qwen 3).
        def norm():
            if not c.qk_norm:
                return None
            return RMSNorm(c.head_dim, eps=c.norm_eps, use_bias=False, axis="head_dim")

        self.query_norm = norm()
        self.key_norm = norm()
        lora.attach(self, key, c, dict(query=1, key=1, value=1, out=2))
        nf4.attach(self, c, ("query", "key", "value", "out"))

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        mask: Mask,
        cache: Cache | None = None,
        *,
        decode: bool = False,
        keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the output [B, T, D], and the cache with this call's keys and values in it.

        Args:
          decode: T is 1, and the query attends to the cache. Otherwise the positions attend to each
            other only: with a cache they are its first ones.
          keys_B: a key for each row, for dropout; None: there is none.
        """
        q_BTNH = self._query(x_BTD)
        k_BTKH, v_BTKH = self._key_and_value(x_BTD)
        if self.rope is not None:
            q_BTNH = self.rope(q_BTNH, positions_BT)
            k_BTKH = self.rope(k_BTKH, positions_BT)

        if cache is not None:
            key = cache_kernel.write(cache.key, k_BTKH, mask.slots_BT)
            cache = Cache(key, cache_kernel.write(cache.value, v_BTKH, mask.slots_BT))
        if decode:
            y_BTNH = cached_attention(q_BTNH, cache, mask)
        else:
            y_BTNH = self._attend(q_BTNH, k_BTKH, v_BTKH, mask, keys_B)
        return self._project_out(y_BTNH), cache

    def read_source(self, source_BSD: jax.Array) -> Cache:
        """Keys and values of another text, for `attend_to`."""
        k_BSKH, v_BSKH = self._key_and_value(source_BSD)
        return Cache(k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2))

    def attend_to(
        self,
        x_BTD: jax.Array,
        source: Cache,
        mask: Mask,
        *,
        decode: bool = False,
        keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """Attention to another text, [B, T, D] (Vaswani et al. 2017, section 3.2.3).

        Args:
          source: see `read_source`.
          decode: T is 1.
          keys_B: a key for each row, for dropout; None: there is none.
        """
        q_BTNH = self._query(x_BTD)
        if decode:
            return self._project_out(cached_attention(q_BTNH, source, mask))
        k_BSKH, v_BSKH = source.key.swapaxes(1, 2), source.value.swapaxes(1, 2)
        return self._project_out(self._attend(q_BTNH, k_BSKH, v_BSKH, mask, keys_B))

    def _query(self, x_BTD: jax.Array) -> jax.Array:
        q_BTNH = self._project(x_BTD, "query", self.query_bias, self.query_norm)
        # Kernels divide by it.
        if not self.scale_scores:
            q_BTNH = q_BTNH * np.asarray(q_BTNH.shape[-1] ** 0.5, q_BTNH.dtype)
        return q_BTNH

    def _key_and_value(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        k_BSKH = self._project(x_BSD, "key", self.key_bias, self.key_norm)
        return k_BSKH, self._project(x_BSD, "value", self.value_bias, None)

    def _project_out(self, y_BTNH: jax.Array) -> jax.Array:
        out = lora.of(self, "out")
        out_BTD = dense("btij,ijd->btd", y_BTNH, out, self.compute_dtype, "out")
        return out_BTD if self.out_bias is None else add_bias(out_BTD, self.out_bias)

    def _project(self, x_BTD, name: str, bias, norm) -> jax.Array:
        """Queries, keys or values of each head."""
        y = dense("btd,dij->btij", x_BTD, lora.of(self, name), self.compute_dtype, name)
        if bias is not None:
            y = add_bias(y, bias)
        return y if norm is None else norm(y)

    def _dropout(self, keys_B, shape: tuple[int, ...], num_keys: int) -> Callable | None:
        """A function (probabilities [B, K, G, T of a block, S], first query) -> these with a share
        of them dropped; None without dropout.
        """
        if keys_B is None or not self.dropout:
            return None
        _, length, num_heads, _ = shape
        keys_BNT = fold_in_each(
            fold_in_each(keys_B, collectives.heads(num_heads)), jnp.arange(length)
        )

        def drop(probs_BKGTS, start):
            *_, queries, seen = probs_BKGTS.shape
            keys = keys_BNT[:, :, start : start + queries].reshape(-1)

            # Drawn for the whole row, so that blocks don't matter.
            def draw(key):
                return jax.random.bernoulli(key, 1 - self.dropout, (num_keys,))[:seen]

            kept = jax.vmap(draw)(keys).reshape(probs_BKGTS.shape)
            return jnp.where(kept, probs_BKGTS / (1 - self.dropout), 0)

        return drop

    def _attend(self, q_BTNH, k_BTKH, v_BTKH, mask: Mask, keys_B) -> jax.Array:
        """Attention of positions to each other, or to those of a source, [B, T, N, H]."""
        repeats = collectives.kv_repeats(k_BTKH.shape[2])
        if repeats > 1:
            k_BTKH = jnp.repeat(k_BTKH, repeats, axis=2)
            v_BTKH = jnp.repeat(v_BTKH, repeats, axis=2)
        q_BTNH = collectives.gather_sequence(q_BTNH, heads_dim=2)
        k_BTKH = collectives.gather_sequence(k_BTKH, heads_dim=2)
        v_BTKH = collectives.gather_sequence(v_BTKH, heads_dim=2)

        if mask.array_BTS is None:
            y_BTNH = splash_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                mask.segments_BT,
                kind=mask.kind,
                window=self.window,
                interpret=self.implementation == "splash_interpreted",
            )
        elif self.implementation == "cudnn":
            # It multiplies bf16 by f32 scalars.
            with jax.numpy_dtype_promotion("standard"):
                y_BTNH = jax.nn.dot_product_attention(
                    q_BTNH,
                    k_BTKH,
                    v_BTKH,
                    mask=mask.array_BTS[:, None],
                    implementation=self.implementation,
                )
        else:
            y_BTNH = blocked_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                mask.array_BTS,
                causal=mask.kind in NO_LATER_KEYS,
                bias_BNTS=mask.bias_BNTS,
                drop=self._dropout(keys_B, q_BTNH.shape, k_BTKH.shape[1]),
            )
        # The softmax of a query that sees no key would be a mean over all of them.
        if mask.kind == "order":
            sees_any_BT = jnp.any(mask.array_BTS, axis=-1)
            y_BTNH = jnp.where(sees_any_BT[:, :, None, None], y_BTNH, 0)
        return collectives.split_sequence(y_BTNH)
