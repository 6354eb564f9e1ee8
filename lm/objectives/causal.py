"""Next-token prediction.

Letters: B batch, T length, D embed, V vocab.
"""

import jax
import jax.numpy as jnp

from lm.nn.loss import chunked_cross_entropy, chunked_logprobs


def token_logprobs(model, batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and the log-partition function, both [B, T] in f32."""
    output = model(batch["tokens"], batch["positions"], batch["segments"])
    return logprobs(model, output.hidden, batch["targets"])


def logprobs(model, hidden_BTD, targets_BT, chunk: int = 0) -> tuple[jax.Array, jax.Array]:
    """What `token_logprobs` gives, of hidden states; `chunk` positions at a time, 0: all."""
    if chunk:
        head, dtype = model.vocab_head(hidden_BTD), model.config.compute_dtype
        return chunked_logprobs(head, targets_BT, chunk=chunk, dtype=dtype)
    logits_BTV = model.logits(hidden_BTD)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return target_BT - log_z_BT, log_z_BT


def cross_entropy(
    model, hidden_BTD, batch, z_loss: float, chunk: int, *, sparse: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (nll_sum + z_loss * z_sum, nll_sum, z_sum), sums over the batch's weights: of the
    targets' negative log-probabilities, and of log(Z)^2.

    Args:
      chunk: positions of each row whose logits exist at a time; 0: all.
      sparse: see `lm.nn.loss.chunked_cross_entropy`.
    """
    targets_BT, weights_BT = batch["targets"], batch["weights"]
    if chunk:
        return chunked_cross_entropy(
            model.vocab_head(hidden_BTD),
            targets_BT,
            weights_BT,
            z_loss=z_loss,
            chunk=chunk,
            dtype=model.config.compute_dtype,
            sparse=sparse,
        )
    logprobs_BT, log_z_BT = logprobs(model, hidden_BTD, targets_BT)
    nll_sum = -jnp.sum(logprobs_BT * weights_BT)
    z_sum = jnp.sum(jnp.square(log_z_BT) * weights_BT)
    return nll_sum + z_loss * z_sum, nll_sum, z_sum


def check(model_config, trained: list[str], **arguments) -> None:
    """Raises ValueError for a model that sees the token that it is to predict."""
    if getattr(model_config, "visible", "causal") != "causal":
        raise ValueError(
            "config.objective.type = 'lm.objectives.causal' predicts the next token, and "
            f"config.model.visible = {model_config.visible!r}: the model sees it; wanted "
            "lm.objectives.masked"
        )


def make_loss(*, z_loss: float, chunk: int, balance_loss: float = 0.0):
    """Makes the loss: cross entropy of the next token, in nats, and its regularisers.

    `z_loss` * log(Z)^2 is added (PaLM, Chowdhery et al. 2022, section 5), and for a mixture of
    experts `balance_loss` * router_balance, the mean over the layers (lm.nn.moe.balance).

    Args:
      chunk: positions of each row whose logits exist at a time; 0: all.

    Returns:
      `loss(model, batch, keys_B) -> (loss_sum, count, {name: (sum, count)})`: sums over the batch's
      weights, never means, so that microbatches, padding and hosts share one division.

    Raises:
      ValueError: by the loss: a balance_loss for a model without experts.
    """

    def loss(model, batch, keys_B):
        count = jnp.sum(batch["weights"])
        hidden_BTD, _, aux = model(
            batch["tokens"], batch["positions"], batch["segments"], keys_B=keys_B
        )
        if balance_loss and "router_balance" not in aux:
            raise ValueError(
                f"config.objective.balance_loss = {balance_loss} needs experts, and "
                "config.model.num_experts is 0"
            )

        total, nll_sum, z_sum = cross_entropy(model, hidden_BTD, batch, z_loss, chunk)

        # The balance is a mean over tokens: times `count`, it takes part in the one division.
        if balance_loss:
            value, tokens = aux["router_balance"]
            total = total + balance_loss * value / jnp.maximum(tokens, 1.0) * count

        terms = {"loss": (nll_sum, count), "z_loss": (z_loss * z_sum, count), **aux}
        return total, count, terms

    return loss
