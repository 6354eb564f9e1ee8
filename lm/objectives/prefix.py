"""Prefix language modelling: a text's beginning is read whole, each token of it by all others, and
what comes behind is predicted token by token (Liu et al. 2018, arXiv 1801.10198; Raffel et al.
2020, arXiv 1910.10683, section 3.2.1). Where the beginning ends is a matter of data:
lm/data/corruption.py.

Letters: B batch, T length, D embed.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lm.data import batch as batch_contract
from lm.data.corruption import prefix_windows
from lm.nn import masks
from lm.objectives import causal

# 1 where all of the prefix is seen; rows without one are causal.
ARRAYS = {"prefix": batch_contract.Array(np.int32)}


def make_windows(tokenizer, **of_loss):
    """Returns `windows(ids, length, random)`, see `lm.data.corruption.prefix_windows`."""
    return prefix_windows


def examples(**arguments) -> tuple[str, ...]:
    """The kinds of documents that it is for."""
    return ("text",)


def check(model_config, trained: list[str], **arguments) -> None:
    """Raises ValueError for a model that has another way to see a text."""
    if getattr(model_config, "visible", "") != "causal":
        raise ValueError(
            "config.objective.type = 'lm.objectives.prefix' says itself who sees whom; wanted "
            "config.model.visible = 'causal' of the type lm.models.transformer"
        )


def _hidden(model, batch, keys_B) -> jax.Array:
    order_BT = jnp.where(batch["prefix"] > 0, 0, 1 + batch["positions"])
    arrays = (batch["tokens"], batch["positions"], batch["segments"])
    return model(*arrays, visible=masks.by_order(order_BT), keys_B=keys_B).hidden


def token_logprobs(model, batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each next token, and the log-partition function, both [B, T] in f32."""
    return causal.logprobs(model, _hidden(model, batch, None), batch["targets"])


def make_loss(*, z_loss: float = 0.0, chunk: int = 0):
    """Makes the loss: cross entropy of what comes behind the prefixes, in nats, with `z_loss` and
    `chunk` as in `lm.objectives.causal`.

    Returns:
      `loss(model, batch, keys_B) -> (loss_sum, count, {name: (sum, count)})`.
    """

    def loss(model, batch, keys_B):
        count = jnp.sum(batch["weights"])
        hidden_BTD = _hidden(model, batch, keys_B)
        total, nll_sum, z_sum = causal.cross_entropy(model, hidden_BTD, batch, z_loss, chunk)
        return total, count, {"loss": (nll_sum, count), "z_loss": (z_loss * z_sum, count)}

    return loss
