"""A reward model: scores of answers, learnt from pairs of a better and a worse one (Bradley-Terry).

The score of a conversation is that of its last token, by the model's head `scalar`.

Letters: B batch, T length, U pairs of a row.
"""

import jax
import jax.numpy as jnp

from lm import collectives
from lm.data import batch as batch_contract
from lm.objectives import causal, preference_losses
from lm.objectives.preference import check_no_dropout

token_logprobs = causal.token_logprobs
ARRAYS = {"values": batch_contract.VALUES}


def examples(**arguments) -> tuple[str, ...]:
    """The kinds of examples that it is for."""
    return ("pair",)


def check(model_config, trained: list[str], **arguments) -> None:
    """Checks the model.

    Raises:
      ValueError: one without a scalar head, or whose head isn't trained; dropout.
    """
    check_no_dropout(model_config)
    if not any(path.startswith("heads/scalar/") for path in trained):
        raise ValueError(
            f"a reward model trains its head: wanted config.model.heads = 'scalar' (it is "
            f"{model_config.heads!r}), and heads/* among config.train.trained"
        )


def make_loss(*, centring: float = 0.01, chunk: int = 0):
    """Makes the loss, see `lm.objectives.preference_losses.reward_losses`: a mean over pairs.

    Args:
      centring: weight of the squared sum of a pair's scores.
      chunk: of no use here: there are no logits.

    Returns:
      `loss(model, batch, keys_B) -> (loss_sum, count, {name: (sum, count)})`. Its terms are the
      loss, the share of pairs whose better answer has the higher score (`accuracy`), by how much
      (`margin`), and the mean of both scores.
    """

    def loss(model, batch, keys_B):
        scores_BT = scores(model, batch, keys_B=keys_B)
        last_BT = is_last(batch["segments"])
        sums_BS, parts = collectives.segment_sums(scores_BT * last_BT, batch["segments"])
        exists_BS, _ = collectives.segment_sums(last_BT, batch["segments"])
        margins_BS, _ = collectives.segment_sums(batch["values"] * last_BT, batch["segments"])

        pairs = 2 * (sums_BS.shape[1] // 2)
        chosen_BU, rejected_BU = sums_BS[:, 0:pairs:2], sums_BS[:, 1:pairs:2]
        weights_BU = exists_BS[:, 0:pairs:2] / parts
        losses_BU = preference_losses.reward_losses(
            chosen_BU, rejected_BU, margins_BS[:, 0:pairs:2], centring=centring
        )
        count = jnp.sum(weights_BU)
        terms = {
            "loss": losses_BU,
            "accuracy": (chosen_BU > rejected_BU).astype(jnp.float32),
            "margin": chosen_BU - rejected_BU,
            "score": (chosen_BU + rejected_BU) / 2,
        }
        terms = {name: (jnp.sum(x_BU * weights_BU), count) for name, x_BU in terms.items()}
        return terms["loss"][0], count, terms

    return loss


def scores(model, batch, keys_B=None) -> jax.Array:
    """The score after each token, f32 [B, T]."""
    output = model(batch["tokens"], batch["positions"], batch["segments"], keys_B=keys_B)
    return model.head_outputs("scalar", output.hidden)[..., 0]


def is_last(segments_BT: jax.Array) -> jax.Array:
    """1 at the last token of each segment, f32 [B, T]."""
    whole_BT = collectives.gather_sequence(segments_BT)
    following_BT = jnp.pad(whole_BT[:, 1:], ((0, 0), (0, 1)))
    places_T = collectives.places(segments_BT.shape[1])
    following_BT = following_BT[:, places_T]
    return ((segments_BT > 0) & (segments_BT != following_BT)).astype(jnp.float32)
