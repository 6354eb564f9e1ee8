"""Softmax attention of whole rows, as each backend wants it.

`plain_attention` says what is meant, and tests compare the others with it. Query head n attends to
kv head n // (N / K); scores, softmax and sums are f32.

Letters: B batch, T query length, S key length, N query heads, K kv heads, G = N / K, H head size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding


def plain_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS=None) -> jax.Array:
    """Attention under a mask, [B, T, N, H]: the reference of the others here."""
    batch, length, heads, size = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, k_BSKH.shape[2], -1, size)
    scores_BKGTS = (
        jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
        * size**-0.5
    )
    if bias_BNTS is not None:
        scores_BKGTS = scores_BKGTS + by_kv_head(bias_BNTS, k_BSKH.shape[2])
    probs_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -1e30), axis=-1)
    out_BTKGH = jnp.einsum(
        "bkgts,bskh->btkgh",
        probs_BKGTS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    return out_BTKGH.astype(v_BSKH.dtype).reshape(batch, length, heads, size)


def by_kv_head(bias_BNTS, num_kv_heads: int) -> jax.Array:
    """[B, K, G, T, S], of what is added to scores."""
    batch, heads, *lengths = bias_BNTS.shape
    return bias_BNTS.reshape(batch, num_kv_heads, heads // num_kv_heads, *lengths)


def blocked_attention(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask_BTS,
    *,
    causal: bool,
    bias_BNTS=None,
    drop: Callable | None = None,
    blocks: tuple[int, int] = (128, 8),
) -> jax.Array:
    """Attention under a mask, [B, T, N, H].

    Queries go in blocks, each of a number of positions at least, and in so many blocks at most:
    `blocks` are the two numbers. Under a mask within the
    causal one each block goes against the keys up to its own end: what lies right of the diagonal's
    blocks is never computed. XLA on CPUs and GPUs would compute the whole square.

    Args:
      causal: whether the mask is within the causal one; then S is T.
      bias_BNTS: f32, added to the scores.
      drop: a function (probabilities [B, K, G, T of a block, S], number of the first query) ->
        these with dropout.
    """
    batch, length, heads, size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    least, most_blocks = blocks
    block = max(least, -(-length // most_blocks))

    # Heads come first: both matmuls then contract and produce the last dims.
    q = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    k, v = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    bias = None if bias_BNTS is None else by_kv_head(bias_BNTS, kv_heads)

    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        last_key = end if causal else k.shape[2]
        scores = (
            jnp.einsum(
                "bkgth,bksh->bkgts",
                q[:, :, :, start:end],
                k[:, :, :last_key],
                preferred_element_type=jnp.float32,
            )
            * size**-0.5
        )
        if bias is not None:
            scores = scores + bias[:, :, :, start:end, :last_key]
        scores = jnp.where(mask_BTS[:, None, None, start:end, :last_key], scores, -1e30)
        probs = jax.nn.softmax(scores, axis=-1)
        if drop is not None:
            probs = drop(probs, start)
        probs = probs.astype(v.dtype)
        out = jnp.einsum(
            "bkgts,bksh->bkgth", probs, v[:, :, :last_key], preferred_element_type=jnp.float32
        )
        outputs.append(out.astype(v.dtype))

    out_BKGTH = jnp.concatenate(outputs, axis=3)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def splash_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    segments_BT,
    *,
    kind: str = "causal",
    window: int = 0,
    block: int = 1024,
    interpret: bool = False,
) -> jax.Array:
    """Attention within segments by JAX's Pallas kernel for TPU, [B, T, N, H].

    GSPMD can't split a kernel. Under it the call is a shard_map of its own: rows and heads go to
    their devices.

    Args:
      kind: causal, window or full, see `lm.nn.masks.Visible`.
      window: positions that a query sees back, itself included; 0: all.
      block: queries and keys of a tile.
      interpret: run the kernel's program without a TPU, slowly.

    Raises:
      ValueError: a length that tiles don't fill.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # slow to import

    length = q_BTNH.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    block = min(block, length)
    if length % block or length % 128:
        raise ValueError(
            f"config.data.length = {length}: config.model.attention = 'splash' needs a multiple "
            f"of {max(block, 128)}"
        )

    def heads_first(x):
        return x.swapaxes(1, 2)

    def local(q, k, v, segments):
        kernel = _splash_kernel(q.shape[2], length, kind, window, block, interpret)

        def attend(q, k, v, segments):
            return kernel(q, k, v, SegmentIds(segments, segments))

        # The kernel doesn't scale the scores.
        scale = np.asarray(q.shape[-1] ** -0.5, q.dtype)
        return heads_first(
            jax.vmap(attend)(heads_first(q * scale), heads_first(k), heads_first(v), segments)
        )

    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return local(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    heads = sharding.spec(("batch", None, "attention_heads", None), mesh)
    rows = sharding.spec(("batch", None), mesh)
    return jax.shard_map(
        local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def _splash_kernel(
    num_heads: int, length: int, kind: str, window: int, block: int, interpret: bool
):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        # One kernel for the three gradients takes a third less than two, see docs/pods.md.
        use_fused_bwd_kernel=True,
    )
    mask = masks.CausalMask((length, length))
    if kind == "window":
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)
    elif kind == "full":
        mask = masks.FullMask((length, length))
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
