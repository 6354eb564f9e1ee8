"""Attention. Letters: B batch, T query length, S key length, D embed, N query heads, K kv heads, H
head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from lm import collectives, sharding
from lm.nn.layers import RMSNorm, add_bias, dense, param
from lm.nn.positions import rope


class Cache(NamedTuple):
    """Keys and values of the positions seen so far: each row's position p lies in slot p mod S, so
    that a window needs no more than its size.
    """

    # [B, K, S, H], as both matmuls of attention read it; [L, B, K, S, H] for a stack of layers
    key: jax.Array
    value: jax.Array


def causal_mask(segments_BT: jax.Array, window: int = 0) -> jax.Array:
    """[B, T, T], True where the query (dim 1) may attend to the key (dim 2): no later one, only in
    its own document, and of the last `window` only (itself included; 0: all; Mistral 7B, Jiang et
    al. 2023, arXiv 2310.06825, section 2).
    """
    length = segments_BT.shape[1]
    distance_TT = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen_TT = (distance_TT >= 0) & (distance_TT < (window or length))
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & seen_TT[None]


def tree_mask(
    segments_BT: jax.Array, positions_BT: jax.Array, until_BT: jax.Array, window: int = 0
) -> jax.Array:
    """[B, T, T], as `causal_mask`, of rows in which a sequence branches (lm.evals.tree): a key is
    seen by the queries from itself up to `until`, the end of what grows out of it. A window counts
    positions, not places in the row.
    """
    place_T = jnp.arange(segments_BT.shape[1])
    grown_BTT = (place_T[None, :, None] >= place_T[None, None, :]) & (
        place_T[None, :, None] < until_BT[:, None, :]
    )
    near_BTT = positions_BT[:, :, None] - positions_BT[:, None, :] < (
        window or segments_BT.shape[1]
    )
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & grown_BTT & near_BTT


def cache_slots(positions_BT: jax.Array, segments_BT: jax.Array, num_slots: int) -> jax.Array:
    """[B, T], where the keys and values of these positions are written: the last ones of a row that
    fit. Padding (segment 0) and what comes too early get `num_slots`, which is no slot: it is
    dropped.
    """
    length_B1 = jnp.max(jnp.where(segments_BT > 0, positions_BT + 1, 0), axis=1, keepdims=True)
    kept_BT = (segments_BT > 0) & (positions_BT >= length_B1 - num_slots)
    return jnp.where(kept_BT, positions_BT % num_slots, num_slots)


def cache_mask(positions_BT: jax.Array, num_slots: int, window: int = 0) -> jax.Array:
    """[B, T, S], True for the slots that a query at this position may attend to: those that hold a
    position up to its own, of the last `window` (0: all).
    """
    distance_BTS = (positions_BT[:, :, None] - jnp.arange(num_slots)[None, None, :]) % num_slots
    return (distance_BTS <= positions_BT[:, :, None]) & (distance_BTS < (window or num_slots))


def _written(cache_BKSH: jax.Array, new_BTKH: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """The cache with new keys or values in their slots. Rows and heads are one dim meanwhile: what
    is indexed comes first then, or XLA's CPU compiler would transpose the whole cache there and
    back; and bf16 numbers are written as integers, or it would convert all of them to f32.
    """
    batch, kv_heads, num_slots, size = cache_BKSH.shape
    rows, slots = jnp.arange(batch * kv_heads)[:, None], jnp.repeat(slots_BT, kv_heads, axis=0)
    new = new_BTKH.swapaxes(1, 2).reshape(batch * kv_heads, -1, size).astype(cache_BKSH.dtype)
    bits = functools.partial(
        jax.lax.bitcast_convert_type,
        new_dtype=jnp.uint16 if cache_BKSH.dtype == jnp.bfloat16 else cache_BKSH.dtype,
    )
    written = (
        bits(cache_BKSH.reshape(-1, num_slots, size)).at[rows, slots].set(bits(new), mode="drop")
    )
    return jax.lax.bitcast_convert_type(written, cache_BKSH.dtype).reshape(cache_BKSH.shape)


def cached_attention(q_B1NH, cache: Cache, mask_B1S) -> jax.Array:
    """One query a row against the cache, [B, 1, N, H]: sums and softmax in f32, query heads n
    attend to kv head n // (N/K).
    """
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
    shares_BKGS = jax.nn.softmax(
        jnp.where(mask_B1S[:, :, None], scores_BKGS, -1e30), axis=-1
    ).astype(q_BKGH.dtype)
    out_BKGH = jnp.einsum(
        "bkgs,bksh->bkgh",
        shares_BKGS,
        cache.value.astype(q_BKGH.dtype),
        preferred_element_type=jnp.float32,
    )
    return out_BKGH.astype(q_B1NH.dtype).reshape(batch, 1, heads, size)


def blocked_attention(
    q_BTNH, k_BTKH, v_BTKH, mask_BTT, *, block: int = 128, most: int = 8
) -> jax.Array:
    """Softmax attention under a mask within the causal one, [B, T, N, H]: sums and softmax in f32,
    query heads n attend to kv head n // (N/K).

    Queries go in at most `most` blocks of `block` positions or more, each against the keys up to
    its own end: what lies right of the diagonal's blocks is never computed.
    """
    batch, length, heads, size = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    block = max(block, -(-length // most))
    q = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    k, v = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    blocks = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = (
            jnp.einsum(
                "bkgth,bksh->bkgts",
                q[:, :, :, start:end],
                k[:, :, :end],
                preferred_element_type=jnp.float32,
            )
            * size**-0.5
        )
        scores = jnp.where(mask_BTT[:, None, None, start:end, :end], scores, -1e30)
        shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        blocks.append(
            jnp.einsum(
                "bkgts,bksh->bkgth", shares, v[:, :, :end], preferred_element_type=jnp.float32
            ).astype(v.dtype)
        )
    return (
        jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)
    )


SPLASH = ("splash", "splash_interpreted")


class Visible(NamedTuple):
    """What each query may attend to, of whole rows. `mask` is None where the kernel finds it out
    from the segments.
    """

    mask_BTS: jax.Array | None
    segments_BT: jax.Array
    slots_BT: jax.Array | None = None  # of the cache, where this call's keys and values go


def _splash_kernel(num_heads: int, length: int, window: int, block: int, interpret: bool):
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        # one kernel for the three gradients: a third less than two, see
        # docs/pods.md
        use_fused_bwd_kernel=True,
    )
    mask = (
        splash_mask.LocalMask((length, length), (window - 1, 0), 0)
        if window
        else splash_mask.CausalMask((length, length))
    )
    mask = splash_mask.MultiHeadMask([mask] * num_heads)
    return splash.make_splash_mha(
        mask,
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def splash_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    segments_BT,
    *,
    window: int = 0,
    block: int = 1024,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments, and the last `window` positions if not 0, by JAX's Pallas
    kernel for TPU, [B, T, N, H].

    The partitioner can't split a kernel: under it the call is mapped by hand over the mesh, rows
    and heads each to their devices.

    Args:
      block: queries and keys of a tile.
      interpret: run the kernel's program without a TPU, slowly.

    Raises:
      ValueError: a length that tiles don't fill.
    """
    length = q_BTNH.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    block = min(block, length)
    if length % block or length % 128:
        raise ValueError(
            f"config.data.length = {length}: config.model.attention = 'splash' needs a multiple "
            f"of {max(block, 128)}"
        )

    def local(q, k, v, segments):
        kernel = _splash_kernel(q.shape[2], length, window, block, interpret)
        heads_first = lambda x: x.swapaxes(1, 2)
        run = lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s))
        scale = np.asarray(q.shape[-1] ** -0.5, q.dtype)
        return heads_first(
            jax.vmap(run)(heads_first(q * scale), heads_first(k), heads_first(v), segments)
        )

    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return local(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    heads, rows = (
        sharding.spec(axes, mesh)
        for axes in (("batch", None, "attention_heads", None), ("batch", None))
    )
    return jax.shard_map(
        local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )(q_BTNH, k_BTKH, v_BTKH, segments_BT)


class Attention(nnx.Module):
    """Multi-head attention with `num_kv_heads` <= `num_heads` shared keys and values (Ainslie et
    al. 2023, arXiv 2305.13245).
    """

    def __init__(self, key: jax.Array, config, *, out_std: float):
        c = config
        q_key, k_key, v_key, o_key = jax.random.split(key, 4)
        self.rope = None
        if c.positions == "rope":
            self.rope = functools.partial(
                rope,
                theta=c.rope_theta,
                fraction=c.rope_fraction,
                interleaved=c.rope_interleaved,
                scaling=tuple(c.rope_scaling),
            )
        self.window, self.implementation, self.compute_dtype = (
            c.window,
            c.attention,
            c.compute_dtype,
        )
        heads = dict(dtype=c.param_dtype, std=c.init_std)
        self.query = param(
            q_key, (c.embed_dim, c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), **heads
        )
        self.key = param(
            k_key,
            (c.embed_dim, c.num_kv_heads, c.head_dim),
            ("embed", "kv_heads", "head_dim"),
            **heads,
        )
        self.value = param(
            v_key,
            (c.embed_dim, c.num_kv_heads, c.head_dim),
            ("embed", "kv_heads", "head_dim"),
            **heads,
        )
        self.out = param(
            o_key,
            (c.num_heads, c.head_dim, c.embed_dim),
            ("heads", "head_dim", "embed"),
            c.param_dtype,
            std=out_std,
        )
        bias = lambda part, shape, axes: (
            param(None, shape, axes, c.param_dtype) if part in c.biases else None
        )
        self.query_bias = bias("qkv", (c.num_heads, c.head_dim), ("heads", "head_dim_bias"))
        self.key_bias = bias("qkv", (c.num_kv_heads, c.head_dim), ("kv_heads", "head_dim_bias"))
        self.value_bias = bias("qkv", (c.num_kv_heads, c.head_dim), ("kv_heads", "head_dim_bias"))
        self.out_bias = bias("out", (c.embed_dim,), ("embed",))
        # Over each head (Henry et al. 2020, arXiv 2010.04245; RMSNorm in Qwen 3).
        self.query_norm, self.key_norm = (
            RMSNorm(c.head_dim, eps=c.norm_eps, use_bias=False, axis="head_dim")
            if c.qk_norm
            else None
            for _ in range(2)
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        visible: Visible,
        cache: Cache | None = None,
    ):
        """Returns the output [B, T, D] and the cache with this call's keys and values in it. A
        single position attends to the cache, several to each other only: they are the first ones.
        """

        def project(weight, bias, norm, name):
            y = dense("btd,dij->btij", x_BTD, weight, self.compute_dtype, name)
            y = add_bias(y, bias) if bias is not None else y
            return norm(y) if norm is not None else y

        q_BTNH = project(self.query, self.query_bias, self.query_norm, "query")
        k_BSKH = project(self.key, self.key_bias, self.key_norm, "key")
        v_BSKH = project(self.value, self.value_bias, None, "value")
        if self.rope is not None:
            q_BTNH, k_BSKH = self.rope(q_BTNH, positions_BT), self.rope(k_BSKH, positions_BT)
        if cache is not None:
            cache = Cache(
                *(_written(old, new, visible.slots_BT) for old, new in zip(cache, (k_BSKH, v_BSKH)))
            )
        if cache is not None and x_BTD.shape[1] == 1:
            y_BTNH = cached_attention(q_BTNH, cache, visible.mask_BTS)
        else:
            y_BTNH = self._attend(q_BTNH, k_BSKH, v_BSKH, visible)
        out_BTD = dense("btij,ijd->btd", y_BTNH, self.out, self.compute_dtype, "out")
        return out_BTD if self.out_bias is None else add_bias(out_BTD, self.out_bias), cache

    def _attend(self, q_BTNH, k_BTKH, v_BTKH, visible: Visible) -> jax.Array:
        """Positions to each other, [B, T, N, H]. Softmax in f32 inside; query heads n attend to kv
        head n // (N/K).
        """
        if (times := collectives.kv_repeats(k_BTKH.shape[2])) > 1:
            k_BTKH, v_BTKH = jnp.repeat(k_BTKH, times, axis=2), jnp.repeat(v_BTKH, times, axis=2)
        q_BTNH, k_BTKH, v_BTKH = (
            collectives.gather_sequence(x, heads_dim=2) for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        if visible.mask_BTS is None:
            y_BTNH = splash_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                visible.segments_BT,
                window=self.window,
                interpret=self.implementation == "splash_interpreted",
            )
        elif self.implementation != "cudnn":
            y_BTNH = blocked_attention(q_BTNH, k_BTKH, v_BTKH, visible.mask_BTS)
        else:
            with jax.numpy_dtype_promotion("standard"):  # it multiplies bf16 by f32 scalars
                y_BTNH = jax.nn.dot_product_attention(
                    q_BTNH,
                    k_BTKH,
                    v_BTKH,
                    mask=visible.mask_BTS[:, None],
                    implementation=self.implementation,
                )
        return collectives.split_sequence(y_BTNH)
