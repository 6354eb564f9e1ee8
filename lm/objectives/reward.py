"""A reward model: scores of answers, learnt from pairs of a better and a worse one (Bradley-Terry).

The score of a conversation is that of its last token, by the model's head `scalar`.

Letters: B batch, T length, U pairs of a row.
"""

import jax
import jax.numpy as jnp

from lm import collectives
from lm.data import batch as batch_contract
from lm.objectives import causal, preference_losses
from lm.objectives import units as units_lib
from lm.objectives.preference import check_no_dropout

token_logprobs = causal.token_logprobs
ARRAYS = {"values": batch_contract.UNIT_ARRAYS["values"]}


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


def make_loss(**arguments):
    """Makes the loss, a mean over pairs; the arguments are those of `make_unit_terms`."""
    return units_lib.summed(make_unit_terms(**arguments))


def make_unit_terms(*, centring: float = 0.01):
    """Makes the terms of each pair of a batch.

    Args:
      centring: weight of the squared sum of a pair's scores, see
        `lm.objectives.preference_losses.reward_losses`.

    Returns:
      `unit_terms(model, batch, keys_B) -> (weights [B, U], {name: [B, U]}, aux)`: the loss, whether
      the better answer has the higher score (`accuracy`), by how much (`margin`), and the mean of
      both scores.
    """

    def unit_terms(model, batch, keys_B):
        segments_BT = batch["segments"]
        output = model(batch["tokens"], batch["positions"], segments_BT, keys_B=keys_B)
        scores_BT = model.head_outputs("scalar", output.hidden)[..., 0]
        last_BT = is_last(segments_BT)

        chosen_BU, rejected_BU, parts = units_lib.sums(scores_BT * last_BT, segments_BT)
        exists_BU, _, _ = units_lib.sums(last_BT, segments_BT)
        margins_BU, _, _ = units_lib.sums(batch["values"] * last_BT, segments_BT)
        losses_BU = preference_losses.reward_losses(
            chosen_BU, rejected_BU, margins_BU, centring=centring
        )

        terms = {
            "loss": losses_BU,
            "accuracy": (chosen_BU > rejected_BU).astype(jnp.float32),
            "margin": chosen_BU - rejected_BU,
            "score": (chosen_BU + rejected_BU) / 2,
        }
        return exists_BU / parts, terms, output.aux

    return unit_terms


def is_last(segments_BT: jax.Array) -> jax.Array:
    """1 at the last token of each segment, f32 [B, T]."""
    whole_BT = collectives.gather_sequence(segments_BT)
    following_BT = jnp.pad(whole_BT[:, 1:], ((0, 0), (0, 1)))

    places_T = collectives.places(segments_BT.shape[1])
    following_BT = following_BT[:, places_T]
    return ((segments_BT > 0) & (segments_BT != following_BT)).astype(jnp.float32)
