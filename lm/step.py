"""The train step and the eval step: pure functions of pytrees, no I/O. They can be traced, compiled
ahead of time, and donated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lm.optim import Optimizer

NONFINITE = ("halt", "skip")


class TrainState(NamedTuple):
    step: jax.Array  # int32, the number of steps taken (those skipped included)
    params: Any
    opt_state: Any
    # bool: a non-finite loss, gradient or update was seen; every later step leaves the state alone
    halted: jax.Array
    skipped: jax.Array  # int32, the number of updates left out for being non-finite


def init_state(params, optimizer: Optimizer) -> TrainState:
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        optimizer.init(params),
        jnp.zeros((), bool),
        jnp.zeros((), jnp.int32),
    )


def make_train_step(
    graphdef,
    loss: Callable,
    optimizer: Optimizer,
    *,
    seed: int,
    accumulation: int,
    nonfinite: str,
    by_hand: Callable | None = None,
) -> Callable:
    """Returns `train_step(state, batch) -> (state, metrics)`.

    Args:
      graphdef: of `nnx.split(model, nnx.Param)`.
      loss: `loss(model, batch, key) -> (loss_sum, count, {name: (sum, count)})`.
      seed: of every random number in the step, folded with its purpose and the step.
      accumulation: number of microbatches that the batch's rows are dealt into; the gradient is
        that of the whole batch.
      by_hand: wraps the gradient of a microbatch with FSDP written out (`lm.collectives.shard_map_gradient`);
        None leaves it to the partitioner.
      nonfinite: "halt" stops at the first non-finite loss, gradient or update, "skip" leaves that
        update out and goes on.

    metrics: {name: (sum, count)} of the loss's terms, and scalars from the optimizer.
    """
    if nonfinite not in NONFINITE:
        raise ValueError(f"config.train.nonfinite = {nonfinite!r}; valid: {list(NONFINITE)}")
    root = jax.random.key(seed)

    def gradient(params, batch, key):
        """Sums over one microbatch: gradient (f32), count, terms."""

        def loss_sum(params):
            value, count, terms = loss(nnx.merge(graphdef, params), batch, key)
            return value, (count, terms)

        grads, (count, terms) = jax.grad(loss_sum, has_aux=True)(params)
        return grads, count, terms

    gradient = by_hand(gradient) if by_hand else gradient

    def accumulated(params, batch, key):
        # With respect to an f32 view of the parameters, so that gradients are accumulated in f32.
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        if accumulation == 1:
            return gradient(params, batch, key)
        # Rows are dealt, not cut into blocks: every device keeps a share of each microbatch.
        micro = jax.tree.map(
            lambda x: x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(
                0, 1
            ),
            batch,
        )
        first = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micro), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

        def body(total, inputs):
            index, rows = inputs
            return jax.tree.map(
                jnp.add, total, gradient(params, rows, jax.random.fold_in(key, index))
            ), None

        return jax.lax.scan(body, zeros, (jnp.arange(accumulation), micro))[0]

    def train_step(state: TrainState, batch):
        loss_key, rounding_key = (
            jax.random.fold_in(jax.random.fold_in(root, purpose), state.step) for purpose in (1, 2)
        )
        grads, count, terms = accumulated(state.params, batch, loss_key)
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), grads)
        params, opt_state, scalars = optimizer.update(
            grads, state.opt_state, state.params, state.step, rounding_key
        )
        grad_norm = optax.global_norm(grads)
        finite = (
            jnp.isfinite(terms["loss"][0])
            & jnp.isfinite(grad_norm)
            & jnp.isfinite(scalars["update_norm"])
        )
        good = finite & ~state.halted
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        if nonfinite == "halt":
            halted, skipped, step = ~good, state.skipped, state.step + good.astype(jnp.int32)
        else:
            halted, skipped, step = (
                state.halted,
                state.skipped + (~finite).astype(jnp.int32),
                state.step + 1,
            )
        metrics = (
            terms
            | scalars
            | {"grad_norm": grad_norm, "tokens": count, "halted": halted, "skipped_steps": skipped}
        )
        return TrainState(step, params, opt_state, halted, skipped), metrics

    return train_step


def make_token_logprobs(graphdef, token_logprobs: Callable) -> Callable:
    """Returns `eval_step(params, batch) -> [B, T]` f32: the log-probability of each target."""
    return lambda params, batch: token_logprobs(nnx.merge(graphdef, params), batch)[0]


def make_tree_logprobs(graphdef) -> Callable:
    """Returns `eval_step(params, batch, after_BP, which_BQ) -> ([B, Q] f32, [B, Q] bool)`: the
    log-probability of each query's target, and whether no other id is likelier. The head sees the
    positions that are asked after, not all, and each once.

    batch: tokens, positions, segments, until [B, T]; targets [B, Q].
    after_BP: places of the row after which is asked; which_BQ: which of them a query is about.
    """

    def tree_logprobs(params, batch, after_BP, which_BQ):
        model = nnx.merge(graphdef, params)
        hidden_BTD = model(
            batch["tokens"], batch["positions"], batch["segments"], until_BT=batch["until"]
        ).hidden
        logits_BPV = model.logits(jnp.take_along_axis(hidden_BTD, after_BP[:, :, None], axis=1))
        rows_B1 = jnp.arange(len(which_BQ))[:, None]
        log_z_BP, most_BP = jax.nn.logsumexp(logits_BPV, axis=-1), jnp.max(logits_BPV, axis=-1)
        logits_BQ = logits_BPV[rows_B1, which_BQ, batch["targets"]]
        return logits_BQ - log_z_BP[rows_B1, which_BQ], logits_BQ == most_BP[rows_B1, which_BQ]

    return tree_logprobs


def make_tree_states(graphdef) -> Callable:
    """Returns `eval_step(params, batch, after_BP, which_BQ) -> [B, Q, D] f32`: the state that the
    head sees at each query's place. The arguments are those of `make_tree_logprobs`.
    """

    def tree_states(params, batch, after_BP, which_BQ):
        hidden_BTD = nnx.merge(graphdef, params)(
            batch["tokens"], batch["positions"], batch["segments"], until_BT=batch["until"]
        ).hidden
        after_BQ = jnp.take_along_axis(after_BP, which_BQ, axis=1)
        return jnp.take_along_axis(hidden_BTD, after_BQ[:, :, None], axis=1).astype(jnp.float32)

    return tree_states


def make_head_rows(graphdef) -> Callable:
    """Returns `rows(params, ids [N]) -> [N, D] f32`: what the head multiplies a state with for
    these tokens.
    """
    return lambda params, ids: nnx.merge(graphdef, params).head_table[ids].astype(jnp.float32)
