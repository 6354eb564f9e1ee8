"""The vocabulary's cross entropy, and log-probabilities, in chunks, so that never all logits exist
at once.

Letters: B batch, T length, D embed, V vocab, C positions of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lm import collectives, sharding


def chunked_cross_entropy(
    hidden_BTD, table: nnx.Param, targets_BT, weights_BT, *, z_loss: float, chunk: int, dtype
):
    """Returns (nll_sum + z_loss * z_sum, nll_sum, z_sum) of the head `table` [V, D] on hidden
    states, as `lm.objectives.causal` defines them.

    Logits exist for `chunk` positions of each row at a time, in f32. The gradient is computed with
    the value, chunk by chunk. Nothing is computed twice, and all that is kept is the gradient
    itself (Hsu et al. 2024, arXiv 2410.10989, section 3.2). Only the first result has a gradient.

    Raises:
      ValueError: a chunk that doesn't divide T.
    """
    _check_chunk(hidden_BTD.shape[1], chunk)
    logical_axes = table.get_metadata("logical_axes")
    return _loss(
        logical_axes,
        jnp.dtype(dtype),
        z_loss,
        chunk,
        hidden_BTD,
        table[...],
        targets_BT,
        weights_BT,
    )


def _check_chunk(length: int, chunk: int) -> None:
    if length % chunk:
        raise ValueError(
            f"config.objective.chunk = {chunk} must divide the row's {length} positions"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _loss(logical_axes, dtype, z_loss, chunk, hidden_BTD, table, targets_BT, weights_BT):
    gathered_VD = collectives.gather_weight(table, logical_axes, dtype)

    def body(sums, inputs):
        nll, z, _ = _chunk_sums(gathered_VD, *inputs)
        return (sums[0] + nll, sums[1] + z), None

    start = (jnp.float32(0), jnp.float32(0))
    chunks = _chunks(chunk, hidden_BTD.astype(dtype), targets_BT, weights_BT)
    (nll_sum, z_sum), _ = jax.lax.scan(body, start, chunks)
    return nll_sum + z_loss * z_sum, nll_sum, z_sum


def _chunks(chunk, *arrays):
    """[B, T, ...] -> [T / chunk, B, chunk, ...]."""
    return tuple(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1) for x in arrays)


def _chunk_sums(gathered_VD, hidden_BCD, targets_BC, weights_BC):
    """The sums over a chunk, and what its gradient needs."""
    logits_BCV = _chunk_logits(gathered_VD, hidden_BCD)
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    is_target_BCV = _is_target(logits_BCV, targets_BC)
    target_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1)

    nll_sum = jnp.sum((log_z_BC - target_BC) * weights_BC)
    z_sum = jnp.sum(jnp.square(log_z_BC) * weights_BC)
    return nll_sum, z_sum, (logits_BCV, log_z_BC, is_target_BCV)


def _chunk_logits(gathered_VD, hidden_BCD):
    logits_BCV = jnp.einsum(
        "bcd,vd->bcv", hidden_BCD, gathered_VD, preferred_element_type=jnp.float32
    )
    return sharding.constrain(logits_BCV, "batch", "length", "act_vocab")


def _is_target(logits_BCV, targets_BC):
    # A comparison, not a gather: it fuses, and every shard of the vocabulary has its part.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
    return ids == targets_BC[..., None]


def _loss_forward(logical_axes, dtype, z_loss, chunk, hidden_BTD, table, targets_BT, weights_BT):
    gathered_VD = collectives.gather_weight(table, logical_axes, dtype)

    def body(carry, inputs):
        nll_sum, z_sum, table_grad_VD = carry
        hidden_BCD, targets_BC, weights_BC = inputs
        nll, z, (logits_BCV, log_z_BC, is_target_BCV) = _chunk_sums(gathered_VD, *inputs)

        probs_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
        dlogits_BCV = probs_BCV * (1 + 2 * z_loss * log_z_BC)[..., None]
        dlogits_BCV = dlogits_BCV - is_target_BCV.astype(jnp.float32)
        dlogits_BCV = (dlogits_BCV * weights_BC[..., None]).astype(dtype)

        hidden_grad_BCD = jnp.einsum(
            "bcv,vd->bcd", dlogits_BCV, gathered_VD, preferred_element_type=jnp.float32
        ).astype(hidden_BTD.dtype)
        table_grad_VD = table_grad_VD + jnp.einsum(
            "bcv,bcd->vd", dlogits_BCV, hidden_BCD, preferred_element_type=jnp.float32
        )
        return (nll_sum + nll, z_sum + z, table_grad_VD), hidden_grad_BCD

    start = (jnp.float32(0), jnp.float32(0), jnp.zeros(gathered_VD.shape, jnp.float32))
    chunks = _chunks(chunk, hidden_BTD.astype(dtype), targets_BT, weights_BT)
    (nll_sum, z_sum, table_grad_VD), hidden_grad = jax.lax.scan(body, start, chunks)

    hidden_grad_BTD = hidden_grad.swapaxes(0, 1).reshape(hidden_BTD.shape)
    table_grad = collectives.scatter_grad(table_grad_VD, logical_axes, table.dtype)
    return (nll_sum + z_loss * z_sum, nll_sum, z_sum), (hidden_grad_BTD, table_grad)


def _loss_backward(logical_axes, dtype, z_loss, chunk, saved, grads):
    hidden_grad_BTD, table_grad = saved
    grad = grads[0]
    return (
        hidden_grad_BTD * grad.astype(hidden_grad_BTD.dtype),
        table_grad * grad.astype(table_grad.dtype),
        None,
        None,
    )


_loss.defvjp(_loss_forward, _loss_backward)


def chunked_logprobs(
    hidden_BTD, table: nnx.Param, targets_BT, *, chunk: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns (log-probability of each target, log-partition), both f32 [B, T], of the head
    `table` [V, D] on hidden states.

    What is done with the log-probabilities isn't known yet, so the gradient can't be computed with
    the value, as that of the cross entropy is. The log-partition is kept, and logits are computed
    again, chunk by chunk. Only the first result has a gradient.

    Raises:
      ValueError: a chunk that doesn't divide T.
    """
    _check_chunk(hidden_BTD.shape[1], chunk)
    logical_axes = table.get_metadata("logical_axes")
    return _logprobs(logical_axes, jnp.dtype(dtype), chunk, hidden_BTD, table[...], targets_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _logprobs(logical_axes, dtype, chunk, hidden_BTD, table, targets_BT):
    gathered_VD = collectives.gather_weight(table, logical_axes, dtype)

    def body(carry, inputs):
        hidden_BCD, targets_BC = inputs
        logits_BCV = _chunk_logits(gathered_VD, hidden_BCD)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        targets = jnp.where(_is_target(logits_BCV, targets_BC), logits_BCV, 0.0)
        return carry, (jnp.sum(targets, axis=-1) - log_z_BC, log_z_BC)

    chunks = _chunks(chunk, hidden_BTD.astype(dtype), targets_BT)
    _, (logprobs, log_z) = jax.lax.scan(body, (), chunks)
    return _unchunked(logprobs), _unchunked(log_z)


def _unchunked(x):
    """[T / chunk, B, chunk, ...] -> [B, T, ...]."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _logprobs_forward(logical_axes, dtype, chunk, hidden_BTD, table, targets_BT):
    outputs = _logprobs(logical_axes, dtype, chunk, hidden_BTD, table, targets_BT)
    return outputs, (hidden_BTD, table, targets_BT, outputs[1])


def _logprobs_backward(logical_axes, dtype, chunk, saved, grads):
    hidden_BTD, table, targets_BT, log_z_BT = saved
    gathered_VD = collectives.gather_weight(table, logical_axes, dtype)

    def body(table_grad_VD, inputs):
        hidden_BCD, targets_BC, log_z_BC, grad_BC = inputs
        logits_BCV = _chunk_logits(gathered_VD, hidden_BCD)
        dlogits_BCV = _is_target(logits_BCV, targets_BC).astype(jnp.float32)
        dlogits_BCV = dlogits_BCV - jnp.exp(logits_BCV - log_z_BC[..., None])
        dlogits_BCV = (dlogits_BCV * grad_BC[..., None]).astype(dtype)

        hidden_grad_BCD = jnp.einsum(
            "bcv,vd->bcd", dlogits_BCV, gathered_VD, preferred_element_type=jnp.float32
        ).astype(hidden_BTD.dtype)
        table_grad_VD = table_grad_VD + jnp.einsum(
            "bcv,bcd->vd", dlogits_BCV, hidden_BCD, preferred_element_type=jnp.float32
        )
        return table_grad_VD, hidden_grad_BCD

    start = jnp.zeros(gathered_VD.shape, jnp.float32)
    chunks = _chunks(chunk, hidden_BTD.astype(dtype), targets_BT, log_z_BT, grads[0])
    table_grad_VD, hidden_grad = jax.lax.scan(body, start, chunks)

    table_grad = collectives.scatter_grad(table_grad_VD, logical_axes, table.dtype)
    return _unchunked(hidden_grad), table_grad, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)
