"""How the next token is chosen from its logits. Letters: B batch, V vocab."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options of `sample`. The filters apply in this order, each to the tokens that the ones
    before it leave; a token that is filtered out is never drawn.

    Raises:
      ValueError: a value is out of its range.
    """

    # Logits of the tokens seen so far are divided by it where positive, else multiplied (Keskar et
    # al. 2019, section 4.1).
    repetition_penalty: float = 1.0
    temperature: float = 1.0  # of the softmax; 0: always the best token
    top_k: int = 0  # keep so many best tokens; 0: all
    # Keep the fewest best tokens with at least this probability together (Holtzman et al. 2020,
    # section 3.1).
    top_p: float = 1.0
    # Keep the tokens with at least this fraction of the best one's probability (Nguyen et al. 2024,
    # section 3).
    min_p: float = 0.0

    def __post_init__(self):
        for name, in_range, wanted in (
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("temperature", self.temperature >= 0, "0 or above"),
            ("top_k", self.top_k >= 0, "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not in_range:
                raise ValueError(f"{name} = {getattr(self, name)}; wanted {wanted}")


def sample(
    keys_B: jax.Array,
    logits_BV: jax.Array,
    sampling: Sampling,
    *,
    vocab_size: int,
    seen_BV: jax.Array | None = None,
) -> jax.Array:
    """Chooses the next token of each row.

    Args:
      keys_B: random keys, one a row.
      logits_BV: the logits of the next token.
      vocab_size: the tokenizer's; ids at or above it are never chosen.
      seen_BV: True for the tokens that the repetition penalty applies to; None: no penalty.

    Returns:
      Ids [B].
    """
    if seen_BV is not None:
        logits_BV = _penalize_repetition(logits_BV, seen_BV, sampling.repetition_penalty)

    # The model's table may be larger than the tokenizer.
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)

    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)

    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        logits_BV = _keep_top_k_and_top_p(logits_BV, sampling, vocab_size)
    if sampling.min_p:
        logits_BV = _keep_min_p(logits_BV, sampling.min_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def _penalize_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    # Dividing a negative logit would make its token more likely.
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def _keep_top_k_and_top_p(logits_BV: jax.Array, sampling: Sampling, vocab_size: int) -> jax.Array:
    """Logits [B, V] with -inf for the tokens that top_k or top_p leave out."""
    # Both filters look at the same sorted logits: top_p sees only what top_k keeps.
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    if sampling.top_k:
        sorted_BV = sorted_BV[:, : min(sampling.top_k, vocab_size)]
        logits_BV = jnp.where(logits_BV < sorted_BV[:, -1:], -jnp.inf, logits_BV)

    if sampling.top_p < 1:
        # A token stays if the better ones together don't reach top_p; the best one always does.
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        better_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        kept_BV = jnp.where(better_BV < sampling.top_p, sorted_BV, jnp.inf)
        least_B1 = jnp.min(kept_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def _keep_min_p(logits_BV: jax.Array, min_p: float) -> jax.Array:
    """Logits [B, V] with -inf for tokens below `min_p` times the best one's probability."""
    # A ratio of probabilities is a difference of logits: no softmax is needed.
    best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.where(logits_BV < best_B1 + np.log(np.float32(min_p)), -jnp.inf, logits_BV)


def row_keys(seeds: Sequence[int]) -> jax.Array:
    """Random keys [B], each from a seed of its own."""
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
