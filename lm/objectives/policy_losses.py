"""Losses of a policy that learns from texts of its own, as functions of log-probabilities,
advantages and values.

Letters: B batch, T length; all arrays are f32 [B, T], what each token of a text has.
"""

import jax
import jax.numpy as jnp

KL_ESTIMATORS = ("k1", "k2", "k3")


def surrogate_losses(
    log_ratios: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float
) -> jax.Array:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r the exponential of the log-ratio of the
    policy to that which drew the token (PPO, Schulman et al. 2017, arXiv 1707.06347, equation 7;
    with two bounds Yu et al. 2025, arXiv 2503.14476, section 3.1).

    Args:
      log_ratios: of each token; or the same for all tokens of a text, their mean (GSPO, Zheng et
        al. 2025, arXiv 2507.18071, equation 7).
    """
    ratios = jnp.exp(log_ratios)
    clipped = jnp.clip(ratios, 1 - clip_low, 1 + clip_high)
    return -jnp.minimum(ratios * advantages, clipped * advantages)


def is_clipped(
    log_ratios: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float
) -> jax.Array:
    """Where the loss has no gradient, for the policy has gone far enough; bool."""
    ratios = jnp.exp(log_ratios)
    too_low = (ratios < 1 - clip_low) & (advantages < 0)
    return too_low | ((ratios > 1 + clip_high) & (advantages > 0))


def kl_estimates(logprobs: jax.Array, reference: jax.Array, estimator: str) -> jax.Array:
    """Estimates of the divergence KL(policy, reference), by the drawn tokens' log-probabilities
    (Schulman 2020, "Approximating KL divergence").

    With d = log policy - log reference, k1 is d, k2 is d^2 / 2, and k3 is exp(-d) - 1 + d. k1 and
    k3 are unbiased. As a loss k1 has a gradient of 0 on average, and k2 that of the divergence.
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return jnp.square(difference) / 2
    assert estimator == "k3", estimator
    return jnp.expm1(-difference) + difference


def value_losses(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: float
) -> jax.Array:
    """max((V - R)^2, (V' - R)^2) / 2, V' the value moved from the old one by `clip` at most
    (Schulman et al.'s code of PPO; Huang et al. 2022, "The 37 implementation details of PPO",
    detail 9).
    """
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    return jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns)) / 2


def truncated_weights(logprobs: jax.Array, sampled: jax.Array, cap: float) -> jax.Array:
    """min(exp(log p - log q), cap), without a gradient: q is how likely the token was where it was
    drawn, p how likely it is where it is learnt from (truncated importance sampling, Ionides 2008;
    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    return jnp.minimum(jnp.exp(jax.lax.stop_gradient(logprobs) - sampled), cap)
