"""The train step and the eval steps: pure functions of pytrees, without I/O.

They can be traced, compiled ahead of time, and donated.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import sharding, trained
from lm.data import batch as batch_contract
from lm.nn import masks
from lm.optim import Optimizer

# What a random number is for: folded into the seed's key.
LOSS, ROUNDING = 1, 2


class TrainState(NamedTuple):
    step: jax.Array  # int32, the number of steps taken (those skipped included)
    params: Any
    opt_state: Any
    # bool: a non-finite loss, gradient or update was seen; every later step leaves the state alone
    halted: jax.Array
    skipped: jax.Array  # int32, the number of updates left out for being non-finite


def init_state(params, optimizer: Optimizer) -> TrainState:
    """The state before the first step."""
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        optimizer.init(params),
        jnp.zeros((), bool),
        jnp.zeros((), jnp.int32),
    )


def abstract_state(abstract_params: dict, axes: dict, optimizer: Optimizer, mesh: Mesh):
    """The train state as ShapeDtypeStructs with shardings.

    Arrays of the optimizer that are shaped like a parameter, or like it less one dim (Adafactor's
    factors), get the parameter's sharding. Counters are replicated.

    Args:
      axes: the parameters' logical axes.

    Raises:
      ValueError: see `lm.sharding.shardings`.
    """
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), abstract_params)
    layouts = jax.tree.leaves(sharding.shardings(params, axes, mesh))
    by_path = {}
    for (path, leaf), layout in zip(jax.tree_util.tree_leaves_with_path(params), layouts):
        by_path[jax.tree_util.keystr(path)] = (leaf.shape, layout)

    def place(path, leaf):
        layout = _layout_of(jax.tree_util.keystr(path), leaf.shape, by_path)
        layout = layout or sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    return jax.tree_util.tree_map_with_path(place, state)


def _layout_of(path: str, shape: tuple[int, ...], by_path: dict) -> NamedSharding | None:
    """The layout of a leaf of the state, found by the parameter whose path its own path ends with;
    None for other leaves.
    """
    for name, (param_shape, layout) in by_path.items():
        if not path.endswith(name):
            continue
        if shape == param_shape:
            return layout

        rank = len(param_shape)
        entries = (*layout.spec, *([None] * (rank - len(layout.spec))))
        for dim in range(rank):
            if shape == param_shape[:dim] + param_shape[dim + 1 :]:
                without_dim = PartitionSpec(*entries[:dim], *entries[dim + 1 :])
                return NamedSharding(layout.mesh, without_dim)
    return None


class Fixed(NamedTuple):
    """What a step reads and doesn't change.

    Attributes:
      frozen: the parameters that aren't trained, see `lm.trained`.
      others: the parameters of other models, by name.
    """

    frozen: Mapping[str, Any]
    others: Mapping[str, Any]


NOTHING_FIXED = Fixed({}, {})


class LossFns(NamedTuple):
    """What a step computes of a batch, besides the gradient.

    Attributes:
      loss: `loss(model, batch, keys_B, **others) -> (loss_sum, count, {name: (sum, count)})`.
      prepare: `prepare(batch, model, **others) -> more arrays [B, ...]`, computed without a
        gradient from the whole batch before it is dealt; None: there are none.
      other_graphdefs: of the other models, by name.
    """

    loss: Callable
    prepare: Callable | None = None
    other_graphdefs: Mapping[str, Any] = types.MappingProxyType({})


def make_train_step(
    graphdef,
    loss_fns: LossFns,
    optimizer: Optimizer,
    *,
    seed: int,
    accumulation: int,
    nonfinite: str,
    wrap_gradient: Callable | None = None,
) -> Callable:
    """Returns `train_step(state, batch, fixed) -> (state, metrics)`; `fixed` is a `Fixed`.

    Args:
      graphdef: from `nnx.split(model, nnx.Param)`.
      seed: of every random number in the step, folded with its purpose and the step; those of the
        loss with the row's place in the batch too.
      accumulation: number of microbatches that the batch's rows are dealt into; the gradient is
        that of the whole batch.
      nonfinite: "halt" stops at the first non-finite loss, gradient or update, "skip" leaves that
        update out and goes on.
      wrap_gradient: makes the gradient of a microbatch manual, with FSDP's collectives written out
        (`lm.collectives.shard_map_gradient`); None leaves it to GSPMD.

    Returns:
      The step. Its metrics are {name: (sum, count)} of the loss's terms, and scalars from the
      optimizer.
    """
    assert nonfinite in ("halt", "skip"), nonfinite
    root = jax.random.key(seed)
    mean_gradient = make_mean_gradient(
        graphdef, loss_fns, accumulation=accumulation, wrap_gradient=wrap_gradient
    )

    def train_step(state: TrainState, batch, fixed: Fixed = NOTHING_FIXED):
        loss_key = step_key(root, LOSS, state.step)
        rounding_key = step_key(root, ROUNDING, state.step)

        grads, count, terms = mean_gradient(state.params, batch, loss_key, fixed)
        params, opt_state, scalars = optimizer.update(
            grads, state.opt_state, state.params, state.step, rounding_key
        )

        # The old state stays where anything is not finite, where an earlier step halted, and where
        # nothing has weight: without a gradient the optimizer would still move.
        grad_norm = optax.global_norm(grads)
        finite = (
            jnp.isfinite(terms["loss"][0])
            & jnp.isfinite(grad_norm)
            & jnp.isfinite(scalars["update_norm"])
        )
        goes_on = finite & ~state.halted
        is_update = goes_on & (count > 0)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_update, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        if nonfinite == "halt":
            halted = ~goes_on
            skipped = state.skipped
            step = state.step + goes_on.astype(jnp.int32)
        else:
            halted = state.halted
            skipped = state.skipped + (~finite).astype(jnp.int32)
            step = state.step + 1

        metrics = terms | scalars
        metrics |= {"grad_norm": grad_norm, "tokens": count}
        metrics |= {"halted": halted, "skipped_steps": skipped}
        return TrainState(step, params, opt_state, halted, skipped), metrics

    return train_step


def step_key(root: jax.Array, purpose: int, step: jax.Array) -> jax.Array:
    """The key of a purpose (`LOSS`, `ROUNDING`) in a step."""
    return jax.random.fold_in(jax.random.fold_in(root, purpose), step)


def make_mean_gradient(
    graphdef, loss_fns: LossFns, *, accumulation: int, wrap_gradient: Callable | None
) -> Callable:
    """Returns `mean_gradient(params, batch, loss_key, fixed) -> (grads, count, terms)`: the f32
    gradient of the mean loss over a whole batch, and the sums behind it.

    The arguments are those of `make_train_step`.
    """
    gradient = make_gradient(graphdef, loss_fns)
    if wrap_gradient:
        gradient = wrap_gradient(gradient)

    def mean_gradient(params, batch, loss_key, fixed: Fixed):
        if loss_fns.prepare is not None:
            other_models = merge_each(loss_fns.other_graphdefs, fixed.others)
            model = nnx.merge(graphdef, trained.merge(params, fixed.frozen))
            prepared = loss_fns.prepare(batch, model, **other_models)
            batch = batch | jax.lax.stop_gradient(prepared)

        # A key for each row: what is drawn for it depends on no other row.
        rows_B = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(loss_key, rows_B)

        # The gradient of the mean loss, from sums.
        grads, count, terms = accumulate_gradient(
            gradient, params, batch, keys_B, fixed, accumulation
        )
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), grads)
        return grads, count, terms

    return mean_gradient


def merge_each(graphdefs: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """The models of these parameters, by name."""
    return {name: nnx.merge(graphdef, params[name]) for name, graphdef in graphdefs.items()}


def make_gradient(graphdef, loss_fns: LossFns) -> Callable:
    """Returns `gradient(params, batch, keys_B, fixed) -> (grads, count, terms)`: sums over a
    microbatch.
    """

    def gradient(params, batch, keys_B, fixed):
        def loss_sum(params):
            model = nnx.merge(graphdef, trained.merge(params, fixed.frozen))
            other_models = merge_each(loss_fns.other_graphdefs, fixed.others)
            value, count, terms = loss_fns.loss(model, batch, keys_B, **other_models)
            return value, (count, terms)

        grads, (count, terms) = jax.grad(loss_sum, has_aux=True)(params)
        return grads, count, terms

    return gradient


def accumulate_gradient(gradient: Callable, params, batch, keys_B, fixed, accumulation: int):
    """The sums of `gradient` over the microbatches of a batch; gradients in f32."""
    # Differentiates with respect to f32 copies: gradients stay f32 through `scatter_grad`, and are
    # accumulated in f32.
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    if accumulation == 1:
        return gradient(params, batch, keys_B, fixed)

    microbatches = deal((batch, keys_B), accumulation)
    first = jax.tree.map(lambda x: x[0], microbatches)
    shapes = jax.eval_shape(gradient, params, *first, fixed)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, microbatch):
        sums = gradient(params, *microbatch, fixed)
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(body, zeros, microbatches)[0]


def deal(batch, number: int):
    """Arrays [B, ...] as `number` microbatches, [number, B / number, ...].

    Rows are dealt, not cut into blocks: every device keeps a share of each microbatch.
    """

    def deal_array(x):
        rows = x.reshape(x.shape[0] // number, number, *x.shape[1:])
        return rows.swapaxes(0, 1)

    return jax.tree.map(deal_array, batch)


def make_token_logprobs(graphdef, token_logprobs: Callable) -> Callable:
    """Returns a function (params, batch) -> [B, T] f32: the log-probability of each target.

    Args:
      token_logprobs: the objective's.
    """

    def eval_step(params, batch):
        return token_logprobs(nnx.merge(graphdef, params), batch)[0]

    return eval_step


def make_head_outputs(graphdef, outputs: Callable) -> Callable:
    """Returns a function (params, batch) -> f32 [B, T, K]: what a head says at each place.

    Args:
      outputs: the objective's.
    """

    def head_outputs(params, batch):
        return outputs(nnx.merge(graphdef, params), batch)[0]

    return head_outputs


def make_unit_terms(graphdef, loss_fns: LossFns, unit_terms: Callable) -> Callable:
    """Returns a function (params, batch, others) -> {name: [B, U] f32}: what the objective says of
    each unit, `weight` among it, which is 0 where there is none.

    Args:
      unit_terms: `unit_terms(model, batch, keys_B, **others) -> (weights, terms, aux)`.
    """

    def eval_step(params, batch, others):
        model = nnx.merge(graphdef, params)
        other_models = merge_each(loss_fns.other_graphdefs, others)
        if loss_fns.prepare is not None:
            batch = batch | loss_fns.prepare(batch, model, **other_models)
        weights, terms, _ = unit_terms(model, batch, None, **other_models)
        return {"weight": weights} | terms

    return eval_step


def make_tree_logprobs(graphdef) -> Callable:
    """Returns a function (params, batch, parents_BP, parent_of_BQ) -> ([B, Q] f32, [B, Q] bool).

    Those are the log-probability of each query's target, and whether no other id is likelier. The
    head sees the positions that are asked after, not all, and each once.

    batch: tokens, positions, segments, until [B, T]; targets [B, Q].
    parents_BP: the tokens (places in the row) after which something is asked.
    parent_of_BQ: for each query, which of them (the column of parents_BP).
    """

    def tree_logprobs(params, batch, parents_BP, parent_of_BQ):
        model = nnx.merge(graphdef, params)
        hidden_BTD = _tree_hidden(model, batch)
        logits_BPV = model.logits(jnp.take_along_axis(hidden_BTD, parents_BP[:, :, None], axis=1))
        rows_B1 = jnp.arange(len(parent_of_BQ))[:, None]

        log_z_BP = jax.nn.logsumexp(logits_BPV, axis=-1)
        max_BP = jnp.max(logits_BPV, axis=-1)
        logits_BQ = logits_BPV[rows_B1, parent_of_BQ, batch["targets"]]
        logprobs_BQ = logits_BQ - log_z_BP[rows_B1, parent_of_BQ]
        return logprobs_BQ, logits_BQ == max_BP[rows_B1, parent_of_BQ]

    return tree_logprobs


def make_tree_states(graphdef) -> Callable:
    """Returns a function (params, batch, parents_BP, parent_of_BQ) -> [B, Q, D] f32: the state that
    the head sees at each query's place. The arguments are those of `make_tree_logprobs`.
    """

    def tree_states(params, batch, parents_BP, parent_of_BQ):
        model = nnx.merge(graphdef, params)
        hidden_BTD = _tree_hidden(model, batch)
        parents_BQ = jnp.take_along_axis(parents_BP, parent_of_BQ, axis=1)
        hidden_BQD = jnp.take_along_axis(hidden_BTD, parents_BQ[:, :, None], axis=1)
        if hasattr(model, "vocab_head"):
            hidden_BQD = model.vocab_head(hidden_BQD).state
        return hidden_BQD.astype(jnp.float32)

    return tree_states


def _tree_hidden(model, batch) -> jax.Array:
    """The hidden states [B, T, D] of rows in which sequences branch, behind their sources where
    they have some; of a model that can't read such rows, of plain ones.
    """
    arrays = (batch["tokens"], batch["positions"], batch["segments"])
    source = {}
    if "source" in batch:
        source = {"source": batch_contract.source_of(batch)}
    if not branches(model.config):
        return model(*arrays, **source).hidden
    return model(*arrays, visible=masks.by_tree(batch["until"]), **source).hidden


def branches(model_config) -> bool:
    """Whether a model reads rows in which sequences branch (lm/evals/tree.py)."""
    return getattr(model_config, "branches", True)


def make_head_rows(graphdef) -> Callable:
    """Returns a function (params, ids [N]) -> [N, D] f32: the rows of the head's weight for these
    tokens.
    """

    def head_rows(params, ids):
        return nnx.merge(graphdef, params).head_table[ids].astype(jnp.float32)

    return head_rows
