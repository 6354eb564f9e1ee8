"""A head beside the vocabulary's, trained on labelled texts (lm/data/labelled.py): classes, a
score, or a label for each word.

Letters: B batch, T length, K outputs of the head.
"""

import jax
import jax.numpy as jnp

from lm.data import batch as batch_contract
from lm.models.transformer import parse_heads

ARRAYS = {"values": batch_contract.UNIT_ARRAYS["values"]}


def examples(**arguments) -> tuple[str, ...]:
    """The kinds of documents that it is for."""
    return ("labelled",)


def head_share(**arguments) -> float:
    """No logits of the vocabulary are needed; a head's outputs are few."""
    return 0.0


def check(model_config, trained: list[str]) -> None:
    """Raises ValueError for a model without a head of its own, or whose head isn't trained."""
    heads = parse_heads(getattr(model_config, "heads", ""))
    if len(heads) != 1 or not any(path.startswith("heads/") for path in trained):
        raise ValueError(
            f"config.model.heads = {getattr(model_config, 'heads', '')!r}: lm.objectives.labels "
            "trains one head; wanted 'classes:N', 'token_labels:N' or 'scalar', and heads/* among "
            "config.train.trained"
        )


def outputs(model, batch, keys_B=None):
    """(f32 [B, T, K] that the head says at each place, aux of the model)."""
    (head,) = parse_heads(model.config.heads)
    output = model(batch["tokens"], batch["positions"], batch["segments"], keys_B=keys_B)
    return model.head_outputs(head, output.hidden), output.aux


def _losses(outputs_BTK, values_BT) -> jax.Array:
    """[B, T]: cross entropy of a class, or the squared error of a score."""
    if outputs_BTK.shape[-1] == 1:
        return jnp.square(outputs_BTK[..., 0] - values_BT)
    labels_BT1 = values_BT.astype(jnp.int32)[..., None]
    logprobs_BTK = jax.nn.log_softmax(outputs_BTK)
    return -jnp.take_along_axis(logprobs_BTK, labels_BT1, axis=-1)[..., 0]


def token_logprobs(model, batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each place's label, and zeros, both [B, T] in f32; of a score minus the
    squared error.
    """
    outputs_BTK, _ = outputs(model, batch)
    losses_BT = _losses(outputs_BTK, batch["values"])
    return -losses_BT, jnp.zeros_like(losses_BT)


def make_loss():
    """Makes the loss, a mean over labels: cross entropy of classes in nats, or the squared error of
    a score (the head "scalar").

    Returns:
      `loss(model, batch, keys_B) -> (loss_sum, count, {name: (sum, count)})`, with the accuracy of
      classes among the terms.
    """

    def loss(model, batch, keys_B):
        weights_BT, values_BT = batch["weights"], batch["values"]
        count = jnp.sum(weights_BT)
        outputs_BTK, aux = outputs(model, batch, keys_B)
        total = jnp.sum(_losses(outputs_BTK, values_BT) * weights_BT)

        terms = {"loss": (total, count), **aux}
        if outputs_BTK.shape[-1] > 1:
            is_right_BT = jnp.argmax(outputs_BTK, axis=-1) == values_BT.astype(jnp.int32)
            terms["accuracy"] = (jnp.sum(jnp.where(is_right_BT, weights_BT, 0)), count)
        return total, count, terms

    return loss
