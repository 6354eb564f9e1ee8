"""Looking inside a step: norms layer by layer, and the loss by the position in a document.

A look is a program of its own, beside the train step. It takes the state and the batch that the
next step takes, computes that step's gradient and update again, and keeps sums alone. So the train
step is the same program with and without looks, and a run the same to the bit.

Letters: B batch, T length, L layers, K buckets.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm import step, trained
from lm.nn import watch
from lm.optim import Optimizer

# Buckets of positions, by powers of two: 0-1, 2-3, 4-7, ...; as many as an int32 has.
BUCKETS = 31


def watched(loss_fns: step.LossFns) -> step.LossFns:
    """The same loss, with the activations (lm.nn.watch) in the place of its terms."""

    def loss(model, batch, keys_B, **others):
        with watch.watch(model) as said:
            value, count, _ = loss_fns.loss(model, batch, keys_B, **others)
        return value, count, said

    return loss_fns._replace(loss=loss)


def make_look(
    mean_gradient: Callable, optimizer: Optimizer, axes: Mapping, loss_by_position: Callable, seed
) -> Callable:
    """Returns `look(state, batch, fixed) -> values`, of the step that comes after `state`.

    Args:
      mean_gradient: that of `lm.step.make_mean_gradient`, of a `watched` loss.
      axes: logical axes of the trained parameters; the norms are theirs.
      loss_by_position: see `make_loss_by_position`.
      seed: the run's.

    Returns:
      The function. Its values are {kind: {group: f32 [] or, of a stack, [L]}}, and
      {"loss_by_position": (sums [K], counts [K])}; `terms` gives them names.
    """
    root = jax.random.key(seed)

    def look(state: step.TrainState, batch, fixed: step.Fixed):
        loss_key = step.step_key(root, step.LOSS, state.step)
        grads, _, said = mean_gradient(state.params, batch, loss_key, fixed)
        weights = optimizer.f32_weights(state.params, state.opt_state)
        updates, _, _ = optimizer.updates(grads, state.opt_state["transform"], weights, state.step)

        rms = {}
        for name, (total, count) in said.items():
            rms[name] = jnp.sqrt(total / jnp.maximum(count, 1.0))
        return {
            "grad_norm": norms(grads, axes),
            "weight_norm": norms(state.params, axes),
            "update_norm": norms(updates, axes),
            "activation_rms": rms,
            "loss_by_position": loss_by_position(state.params, batch, fixed),
        }

    return look


def norms(tree: Mapping, axes: Mapping) -> dict[str, jax.Array]:
    """{group: the Euclidean norm of its parameters together}, f32 [], or [L] for a stack of layers.

    Args:
      tree: the parameters, or arrays of their shapes.
      axes: their logical axes.
    """
    squares: dict[str, jax.Array] = {}
    names_of = _by_path(axes)
    for path, leaf in _by_path(tree).items():
        stacked = names_of[path][0] == "layers"
        square = jnp.square(leaf.astype(jnp.float32))
        total = jnp.sum(square, axis=tuple(range(1 if stacked else 0, leaf.ndim)))
        group = _group(path, stacked)
        squares[group] = squares[group] + total if group in squares else total
    return {group: jnp.sqrt(total) for group, total in squares.items()}


def _by_path(tree: Mapping, prefix: str = "") -> dict:
    """{path: leaf} of nested dicts; a tuple is a leaf."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _by_path(value, f"{prefix}{name}/")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def _group(path: str, stacked: bool) -> str:
    """The group of a parameter: `layers/*/mlp` for `layers/mlp/up`, `embed` for `embed/table`, and
    one for the norms of a layer.
    """
    first, *rest = path.split("/")
    if not stacked:
        return first
    if not rest:
        return f"{first}/*"
    return f"{first}/*/{'norms' if rest[0].endswith('norm') else rest[0]}"


def make_loss_by_position(graphdef, token_logprobs: Callable, microbatches: int) -> Callable:
    """Returns `loss_by_position(params, batch, fixed) -> (sums [K], counts [K])`: the sums of the
    targets' negative log-probabilities and of their weights, in nats.

    The bucket is that of the position that the model reads where it predicts the target. There is
    no dropout.

    Args:
      token_logprobs: the objective's.
      microbatches: how many the rows are dealt into, so that the logits fit.
    """

    def sums(model, batch):
        nll_BT = -token_logprobs(model, batch)[0] * batch["weights"]
        # The number of bits but one: the logarithm, rounded down.
        bucket_BT = 31 - jax.lax.clz(jnp.maximum(batch["positions"], 1))
        totals, counts = [], []
        for bucket in range(BUCKETS):
            is_in_BT = bucket_BT == bucket
            totals.append(jnp.sum(jnp.where(is_in_BT, nll_BT, 0.0)))
            counts.append(jnp.sum(jnp.where(is_in_BT, batch["weights"], 0.0)))
        return jnp.stack(totals), jnp.stack(counts)

    def loss_by_position(params, batch, fixed):
        whole = trained.merge(params, fixed.frozen)

        def body(total, microbatch):
            model = nnx.merge(graphdef, whole)
            return jax.tree.map(jnp.add, total, sums(model, microbatch)), None

        zeros = (jnp.zeros(BUCKETS), jnp.zeros(BUCKETS))
        return jax.lax.scan(body, zeros, step.deal(batch, microbatches))[0]

    return loss_by_position


def terms(values: Mapping) -> dict[str, tuple[float, float]]:
    """{metric: (sum, count)} of what a look gave, in the host's memory.

    A layer's metrics are named by its number, `grad_norm/layers/03/mlp`. Buckets without targets
    are left out.
    """
    named = {}
    for kind, groups in values.items():
        if kind != "loss_by_position":
            for group, value in groups.items():
                for name, number in _by_layer(group, value):
                    named[f"{kind}/{name}"] = (float(number), 1.0)

    totals_K, counts_K = values["loss_by_position"]
    for bucket in np.flatnonzero(counts_K):
        first = 2**bucket if bucket else 0
        name = f"loss_by_position/{first}-{2 ** (bucket + 1) - 1}"
        named[name] = (float(totals_K[bucket]), float(counts_K[bucket]))
    return named


def _by_layer(group: str, value: np.ndarray) -> list[tuple[str, float]]:
    """(name, number) of each layer of a stack, or of a group that is none."""
    if not np.ndim(value):
        return [(group, value)]
    digits = max(2, len(str(len(value) - 1)))
    return [(group.replace("*", f"{i:0{digits}}"), number) for i, number in enumerate(value)]
