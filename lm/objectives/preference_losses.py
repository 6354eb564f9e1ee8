"""Losses of preferences, as functions of log-probabilities and scores.

Letters: N pairs, or judged answers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of pairs. Those of `WITHOUT_REFERENCE` compare with no other model.
LOSSES = ("dpo", "robust", "hinge", "ipo", "orpo", "simpo")
WITHOUT_REFERENCE = ("orpo", "simpo")


class Pairs(NamedTuple):
    """Pairs of a better and a worse answer; f32 [N] each.

    Attributes:
      chosen, rejected: log-probabilities of the answers, summed over their tokens.
      chosen_reference, rejected_reference: the same under the reference; 0 without one.
      chosen_tokens, rejected_tokens: the answers' numbers of tokens.
    """

    chosen: jax.Array
    rejected: jax.Array
    chosen_reference: jax.Array
    rejected_reference: jax.Array
    chosen_tokens: jax.Array
    rejected_tokens: jax.Array


def pair_losses(
    pairs: Pairs, *, name: str, beta: float, label_smoothing: float = 0.0, margin: float = 0.0
) -> jax.Array:
    """The loss of each pair, [N].

    With D = (log-ratio of chosen) - (log-ratio of rejected), to the reference:

    dpo: -log sigmoid(beta D) (Rafailov et al. 2023, arXiv 2305.18290, equation 7); with
      label_smoothing e the mean over labels that are wrong with probability e (cDPO, Mitchell
      2023, "A note on DPO with noisy preferences").
    robust: an unbiased estimate under such labels (Chowdhury et al. 2024, arXiv 2403.00409,
      equation 14).
    hinge: max(0, 1 - beta D) (SLiC, Zhao et al. 2023, arXiv 2305.10425).
    ipo: (D' - 1 / (2 beta))^2, D' of log-ratios by token (Azar et al. 2023, arXiv 2310.12036,
      equation 17, whose sums are not divided by the lengths).
    orpo: the cross entropy of the chosen answer by token, and beta times -log sigmoid of the
      log of the ratio of odds (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).
    simpo: -log sigmoid(beta (difference of the log-probabilities by token) - margin) (Meng et al.
      2024, arXiv 2405.14734, equation 6), with label_smoothing as dpo.
    """
    by_token_chosen = pairs.chosen / pairs.chosen_tokens
    by_token_rejected = pairs.rejected / pairs.rejected_tokens
    chosen_ratio = pairs.chosen - pairs.chosen_reference
    rejected_ratio = pairs.rejected - pairs.rejected_reference

    if name == "ipo":
        by_token = chosen_ratio / pairs.chosen_tokens - rejected_ratio / pairs.rejected_tokens
        return jnp.square(by_token - 1 / (2 * beta))
    if name == "orpo":
        log_odds = _log_odds(by_token_chosen) - _log_odds(by_token_rejected)
        return -by_token_chosen - beta * jax.nn.log_sigmoid(log_odds)

    if name == "simpo":
        logits = beta * (by_token_chosen - by_token_rejected) - margin
    else:
        logits = beta * (chosen_ratio - rejected_ratio)
    if name == "hinge":
        return jax.nn.relu(1 - logits)
    right, wrong = -jax.nn.log_sigmoid(logits), -jax.nn.log_sigmoid(-logits)
    if name == "robust":
        e = label_smoothing
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    assert name in ("dpo", "simpo"), name
    return (1 - label_smoothing) * right + label_smoothing * wrong


def _log_odds(logprob: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of log p. A p that is 1 but for rounding counts as 1 - 2^-24."""
    logprob = jnp.minimum(logprob, -(2.0**-24))
    return logprob - jnp.log(-jnp.expm1(logprob))


def kto_losses(
    ratios: jax.Array,
    is_desirable: jax.Array,
    z0: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """The loss of each judged answer, [N]: weight * (1 - sigmoid(+-beta (ratio - z0))) (KTO,
    Ethayarajh et al. 2024, arXiv 2402.01306, equation 8).

    Args:
      ratios: log-ratio of each answer to the reference, summed over its tokens.
      z0: how far the model is from the reference, a scalar without a gradient.
    """
    sign = jnp.where(is_desirable, 1.0, -1.0)
    weight = jnp.where(is_desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-sign * beta * (ratios - z0))


def reward_losses(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array, *, centring: float
) -> jax.Array:
    """The loss of each pair's scores, [N]: -log sigmoid(chosen - rejected - margin), the
    Bradley-Terry model's (Ouyang et al. 2022, arXiv 2203.02155, equation 1; the margin is Touvron
    et al.'s, 2023, arXiv 2307.09288, equation 2), and centring * (chosen + rejected)^2, which
    holds the scores near 0 (Eisenstein et al. 2023, arXiv 2312.09244, section 2).
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin) + centring * jnp.square(
        chosen + rejected
    )
