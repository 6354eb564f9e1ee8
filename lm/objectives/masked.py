"""Masked language modelling: some tokens of a text are found again, at their own places, by all of
the rest of it (Devlin et al. 2019, arXiv 1810.04805, section 3.1). Which ones is a matter of data:
lm/data/masking.py.

Letters: B batch, T length, D embed.
"""

import jax
import jax.numpy as jnp

from lm.data.masking import Masking
from lm.nn import masks
from lm.objectives import causal


def make_windows(tokenizer, *, chunk: int = 0, z_loss: float = 0.0, **masking):
    """Returns `windows(ids, length, random)`, see `lm.data.masking.Masking`.

    Raises:
      ValueError: see `Masking`.
    """
    return Masking(tokenizer, **masking).windows


def examples(**arguments) -> tuple[str, ...]:
    """Texts alone: of an answer's tokens the prompt would have to be told from the rest."""
    return ("text",)


def check(model_config, trained: list[str], **arguments) -> None:
    """Raises ValueError for a model that sees only what is before a token."""
    visible = getattr(model_config, "visible", "full")
    if visible != "full":
        raise ValueError(
            f"config.objective.type = 'lm.objectives.masked' trains encoders, and "
            f"config.model.visible = {visible!r}; wanted 'full', or lm.objectives.causal"
        )


def head_share(*, rate: float, **arguments) -> float:
    """The share of the tokens whose logits are needed."""
    return rate


def token_logprobs(model, batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target at its own place, and the log-partition function, both [B, T]
    in f32.
    """
    return causal.logprobs(model, _hidden(model, batch, None), batch["targets"])


def _hidden(model, batch, keys_B) -> jax.Array:
    arrays = (batch["tokens"], batch["positions"], batch["segments"])
    return model(*arrays, visible=masks.FULL, keys_B=keys_B).hidden


def make_loss(*, chunk: int = 0, z_loss: float = 0.0, **masking):
    """Makes the loss: cross entropy of the masked tokens, in nats, with `z_loss` as in
    `lm.objectives.causal`.

    Args:
      chunk: positions of each row whose logits exist at a time; 0: all. With it the head sees
        little more than the masked ones.

    Returns:
      `loss(model, batch, keys_B) -> (loss_sum, count, {name: (sum, count)})`.
    """

    def loss(model, batch, keys_B):
        count = jnp.sum(batch["weights"])
        hidden_BTD = _hidden(model, batch, keys_B)
        total, nll_sum, z_sum = causal.cross_entropy(
            model, hidden_BTD, batch, z_loss, chunk, sparse=True
        )
        return total, count, {"loss": (nll_sum, count), "z_loss": (z_loss * z_sum, count)}

    return loss
