"""Sequence to sequence: each token of a target is predicted from its source and the target's tokens
before it (Sutskever et al. 2014, arXiv 1409.3215).

Letters: B batch, T length of the targets, S length of the sources, V vocab.
"""

import jax
import jax.numpy as jnp

from lm.data import batch as batch_contract
from lm.objectives import causal


def arrays(*, source_length: int, **arguments) -> dict[str, batch_contract.Array]:
    """The arrays of a batch beside the five."""
    return batch_contract.source_arrays(source_length)


def examples(**arguments) -> tuple[str, ...]:
    """The kinds of documents that it is for."""
    return ("seq2seq",)


def check(model_config, trained: list[str], *, source_length: int, **arguments) -> None:
    """Raises ValueError for a model that reads no sources, or shorter ones."""
    longest = getattr(model_config, "source_length", 0)
    if not 1 <= source_length <= longest:
        raise ValueError(
            f"config.objective.source_length = {source_length}: the model reads sources of "
            f"{longest} tokens at most (config.model.source_length); only those of the type "
            "lm.models.encdec read any"
        )


def _hidden(model, batch, keys_B) -> jax.Array:
    arrays = (batch["tokens"], batch["positions"], batch["segments"])
    return model(*arrays, source=batch_contract.source_of(batch), keys_B=keys_B).hidden


def token_logprobs(model, batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and the log-partition function, both [B, T] in f32."""
    return causal.logprobs(model, _hidden(model, batch, None), batch["targets"])


def make_loss(
    *, source_length: int, z_loss: float = 0.0, chunk: int = 0, label_smoothing: float = 0.0
):
    """Makes the loss: cross entropy of the targets, in nats, with `z_loss` and `chunk` as in
    `lm.objectives.causal`.

    Args:
      label_smoothing: share of a target's probability that is spread over the vocabulary (Szegedy
        et al. 2016, arXiv 1512.00567, section 7). The term `loss` is without it.

    Returns:
      `loss(model, batch, keys_B) -> (loss_sum, count, {name: (sum, count)})`.

    Raises:
      ValueError: smoothing outside of 0 to below 1, or in chunks.
    """
    if not 0 <= label_smoothing < 1 or (label_smoothing and chunk):
        raise ValueError(
            f"config.objective.label_smoothing = {label_smoothing}, chunk = {chunk}; wanted 0 to "
            "below 1, and a chunk of 0 with it: it needs all logits"
        )

    def loss(model, batch, keys_B):
        weights_BT = batch["weights"]
        count = jnp.sum(weights_BT)
        hidden_BTD = _hidden(model, batch, keys_B)
        if not label_smoothing:
            total, nll_sum, z_sum = causal.cross_entropy(model, hidden_BTD, batch, z_loss, chunk)
            return total, count, {"loss": (nll_sum, count), "z_loss": (z_loss * z_sum, count)}

        logits_BTV = model.logits(hidden_BTD)
        log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
        targets_BT1 = batch["targets"][..., None]
        of_target_BT = jnp.take_along_axis(logits_BTV, targets_BT1, axis=-1)[..., 0]

        nll_sum = jnp.sum((log_z_BT - of_target_BT) * weights_BT)
        uniform_sum = jnp.sum((log_z_BT - jnp.mean(logits_BTV, axis=-1)) * weights_BT)
        z_sum = jnp.sum(jnp.square(log_z_BT) * weights_BT)

        total = (1 - label_smoothing) * nll_sum + label_smoothing * uniform_sum + z_loss * z_sum
        return total, count, {"loss": (nll_sum, count), "z_loss": (z_loss * z_sum, count)}

    return loss
