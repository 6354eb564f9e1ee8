"""The vocabulary's cross entropy, and log-probabilities, in chunks, so that never all logits exist
at once.

Letters: B batch, T length, D embed, V vocab, C positions of a chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import collectives, sharding
from lm.nn.layers import VocabHead


def chunked_cross_entropy(
    head: VocabHead,
    targets_BT,
    weights_BT,
    *,
    z_loss: float,
    chunk: int,
    dtype,
    sparse: bool = False,
):
    """Returns (nll_sum + z_loss * z_sum, nll_sum, z_sum) of a head's logits, as
    `lm.objectives.causal` defines them.

    Logits exist for `chunk` positions of each row at a time, in f32. The gradient is computed with
    the value, chunk by chunk. Nothing is computed twice, and all that is kept is the gradient
    itself (Hsu et al. 2024, arXiv 2410.10989, section 3.2). Only the first result has a gradient.

    Args:
      sparse: most weights are 0. In each row the positions with weight come first, and chunks
        without any are not computed.

    Raises:
      ValueError: a chunk that doesn't divide T.
    """
    how = _how(head, chunk, dtype, z_loss, sparse)
    state_BTD = head.state
    if sparse:
        order_BT = jnp.argsort(weights_BT == 0, axis=1, stable=True)
        state_BTD = jnp.take_along_axis(state_BTD, order_BT[..., None], axis=1)
        targets_BT = jnp.take_along_axis(targets_BT, order_BT, axis=1)
        weights_BT = jnp.take_along_axis(weights_BT, order_BT, axis=1)
    return _loss(how, state_BTD, _parameters(head), targets_BT, weights_BT)


class _How(NamedTuple):
    """What is known when a program is traced."""

    axes: tuple[tuple[str, tuple[str, ...]], ...]  # (parameter of the head, its logical axes)
    dtype: Any  # of the matmul's operands
    chunk: int
    z_loss: float
    sparse: bool


def _how(head: VocabHead, chunk: int, dtype, z_loss: float = 0.0, sparse: bool = False) -> _How:
    length = head.state.shape[1]
    if length % chunk:
        raise ValueError(
            f"config.objective.chunk = {chunk} must divide the row's {length} positions"
        )
    axes = []
    for name in _parameters(head):
        axes.append((name, getattr(head, name).get_metadata("logical_axes")))
    return _How(tuple(axes), jnp.dtype(dtype), chunk, z_loss, sparse)


def _parameters(head: VocabHead) -> dict[str, jax.Array]:
    """The table, and the bias of a head that has one."""
    parameters = {"table": head.table[...]}
    if head.bias is not None:
        parameters["bias"] = head.bias[...]
    return parameters


def _gather(how: _How, parameters):
    """The parameters whole: the table in the matmul's dtype, a bias as logits are, in f32."""
    gathered = {}
    for name, logical_axes in how.axes:
        dtype = how.dtype if name == "table" else jnp.dtype(jnp.float32)
        gathered[name] = collectives.gather_weight(parameters[name], logical_axes, dtype)
    return gathered


def _zero_grads(gathered):
    return {name: jnp.zeros(value.shape, jnp.float32) for name, value in gathered.items()}


def _add_grads(how: _How, grads, dlogits_BCV, state_BCD):
    """The sums of the parameters' gradients, with a chunk's added."""
    grads = dict(grads)
    grads["table"] += jnp.einsum(
        "bcv,bcd->vd", dlogits_BCV.astype(how.dtype), state_BCD, preferred_element_type=jnp.float32
    )
    if "bias" in grads:
        grads["bias"] += jnp.sum(dlogits_BCV, axis=(0, 1))
    return grads


def _scatter_grads(how: _How, grads, parameters):
    scattered = {}
    for name, logical_axes in how.axes:
        dtype = parameters[name].dtype
        scattered[name] = collectives.scatter_grad(grads[name], logical_axes, dtype)
    return scattered


def _state_grad(how: _How, dlogits_BCV, gathered, dtype):
    return jnp.einsum(
        "bcv,vd->bcd",
        dlogits_BCV.astype(how.dtype),
        gathered["table"],
        preferred_element_type=jnp.float32,
    ).astype(dtype)


def _chunks(how: _How, state_BTD, *arrays):
    """[B, T, ...] -> [T / chunk, B, chunk, ...]; states in the matmul's dtype."""
    arrays = (state_BTD.astype(how.dtype), *arrays)
    return tuple(x.reshape(x.shape[0], -1, how.chunk, *x.shape[2:]).swapaxes(0, 1) for x in arrays)


def _unchunked(x):
    """[T / chunk, B, chunk, ...] -> [B, T, ...]."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunk_logits(gathered, state_BCD):
    logits_BCV = jnp.einsum(
        "bcd,vd->bcv", state_BCD, gathered["table"], preferred_element_type=jnp.float32
    )
    if "bias" in gathered:
        logits_BCV = logits_BCV + gathered["bias"][None, None]
    return sharding.constrain(logits_BCV, "batch", "length", "act_vocab")


def _is_target(logits_BCV, targets_BC):
    # A comparison, not a gather: it fuses, and every shard of the vocabulary has its part.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
    return ids == targets_BC[..., None]


def _where_weighted(how: _How, function, weights_BC, carry, inputs):
    """function(carry, inputs); of a sparse chunk without weights, (carry, zeros)."""
    if not how.sparse:
        return function(carry, inputs)

    def skip(carry, inputs):
        _, shape = jax.eval_shape(function, carry, inputs)
        return carry, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)

    return jax.lax.cond(jnp.any(weights_BC != 0), function, skip, carry, inputs)


# --- the cross entropy ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(how: _How, state_BTD, parameters, targets_BT, weights_BT):
    gathered = _gather(how, parameters)

    def add(sums, inputs):
        nll, z, _ = _chunk_sums(gathered, *inputs)
        return (sums[0] + nll, sums[1] + z), None

    def body(sums, inputs):
        return _where_weighted(how, add, inputs[2], sums, inputs)

    start = (jnp.float32(0), jnp.float32(0))
    chunks = _chunks(how, state_BTD, targets_BT, weights_BT)
    (nll_sum, z_sum), _ = jax.lax.scan(body, start, chunks)
    return nll_sum + how.z_loss * z_sum, nll_sum, z_sum


def _chunk_sums(gathered, state_BCD, targets_BC, weights_BC):
    """The sums over a chunk, and what its gradient needs."""
    logits_BCV = _chunk_logits(gathered, state_BCD)
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    is_target_BCV = _is_target(logits_BCV, targets_BC)
    target_BC = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1)

    nll_sum = jnp.sum((log_z_BC - target_BC) * weights_BC)
    z_sum = jnp.sum(jnp.square(log_z_BC) * weights_BC)
    return nll_sum, z_sum, (logits_BCV, log_z_BC, is_target_BCV)


def _loss_forward(how: _How, state_BTD, parameters, targets_BT, weights_BT):
    gathered = _gather(how, parameters)

    def add(carry, inputs):
        nll_sum, z_sum, grads = carry
        state_BCD, _, weights_BC = inputs
        nll, z, (logits_BCV, log_z_BC, is_target_BCV) = _chunk_sums(gathered, *inputs)

        probs_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
        dlogits_BCV = probs_BCV * (1 + 2 * how.z_loss * log_z_BC)[..., None]
        dlogits_BCV = dlogits_BCV - is_target_BCV.astype(jnp.float32)
        dlogits_BCV = dlogits_BCV * weights_BC[..., None]

        state_grad_BCD = _state_grad(how, dlogits_BCV, gathered, state_BTD.dtype)
        grads = _add_grads(how, grads, dlogits_BCV, state_BCD)
        return (nll_sum + nll, z_sum + z, grads), state_grad_BCD

    def body(carry, inputs):
        return _where_weighted(how, add, inputs[2], carry, inputs)

    start = (jnp.float32(0), jnp.float32(0), _zero_grads(gathered))
    chunks = _chunks(how, state_BTD, targets_BT, weights_BT)
    (nll_sum, z_sum, grads), state_grad = jax.lax.scan(body, start, chunks)

    saved = _unchunked(state_grad), _scatter_grads(how, grads, parameters)
    return (nll_sum + how.z_loss * z_sum, nll_sum, z_sum), saved


def _loss_backward(how: _How, saved, grads):
    state_grad_BTD, parameter_grads = saved
    grad = grads[0]

    def scale(x):
        return x * grad.astype(x.dtype)

    return scale(state_grad_BTD), jax.tree.map(scale, parameter_grads), None, None


_loss.defvjp(_loss_forward, _loss_backward)


# --- log-probabilities ---


def chunked_logprobs(
    head: VocabHead, targets_BT, *, chunk: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """Returns (log-probability of each target, log-partition), both f32 [B, T], by a head.

    What is done with the log-probabilities isn't known yet, so the gradient can't be computed with
    the value, as that of the cross entropy is. The log-partition is kept, and logits are computed
    again, chunk by chunk. Only the first result has a gradient.

    Raises:
      ValueError: a chunk that doesn't divide T.
    """
    return _logprobs(_how(head, chunk, dtype), head.state, _parameters(head), targets_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(how: _How, state_BTD, parameters, targets_BT):
    gathered = _gather(how, parameters)

    def body(carry, inputs):
        state_BCD, targets_BC = inputs
        logits_BCV = _chunk_logits(gathered, state_BCD)
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        targets = jnp.where(_is_target(logits_BCV, targets_BC), logits_BCV, 0.0)
        return carry, (jnp.sum(targets, axis=-1) - log_z_BC, log_z_BC)

    _, (logprobs, log_z) = jax.lax.scan(body, (), _chunks(how, state_BTD, targets_BT))
    return _unchunked(logprobs), _unchunked(log_z)


def _logprobs_forward(how: _How, state_BTD, parameters, targets_BT):
    outputs = _logprobs(how, state_BTD, parameters, targets_BT)
    return outputs, (state_BTD, parameters, targets_BT, outputs[1])


def _logprobs_backward(how: _How, saved, grads):
    state_BTD, parameters, targets_BT, log_z_BT = saved
    gathered = _gather(how, parameters)

    def body(sums, inputs):
        state_BCD, targets_BC, log_z_BC, grad_BC = inputs
        logits_BCV = _chunk_logits(gathered, state_BCD)
        dlogits_BCV = _is_target(logits_BCV, targets_BC).astype(jnp.float32)
        dlogits_BCV = dlogits_BCV - jnp.exp(logits_BCV - log_z_BC[..., None])
        dlogits_BCV = dlogits_BCV * grad_BC[..., None]

        state_grad_BCD = _state_grad(how, dlogits_BCV, gathered, state_BTD.dtype)
        return _add_grads(how, sums, dlogits_BCV, state_BCD), state_grad_BCD

    chunks = _chunks(how, state_BTD, targets_BT, log_z_BT, grads[0])
    sums, state_grad = jax.lax.scan(body, _zero_grads(gathered), chunks)
    return _unchunked(state_grad), _scatter_grads(how, sums, parameters), None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)
