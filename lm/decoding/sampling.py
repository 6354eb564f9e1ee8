"""How the next token is chosen from its logits."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What is not among the kept ones is never drawn; the filters
    apply in this order, each on what is left.

    Raises:
      ValueError: a value out of its range.
    """

    # what the logits of tokens seen are divided by if positive, else multiplied (Keskar et al.
    # 2019, section 4.1)
    repetition_penalty: float = 1.0
    temperature: float = 1.0  # of the softmax; 0: the best token
    top_k: int = 0  # keep so many best tokens; 0: all
    # keep the fewest best tokens that together have this share (Holtzman et al. 2020, section 3.1)
    top_p: float = 1.0
    # keep those with this share of the best one's probability (Nguyen et al. 2024, section 3)
    min_p: float = 0.0

    def __post_init__(self):
        for name, good, wanted in (
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("temperature", self.temperature >= 0, "0 or above"),
            ("top_k", self.top_k >= 0, "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not good:
                raise ValueError(f"{name} = {getattr(self, name)}; wanted {wanted}")


def sample(
    keys_B: jax.Array,
    logits_BV: jax.Array,
    sampling: Sampling,
    *,
    vocab_size: int,
    seen_BV: jax.Array | None = None,
) -> jax.Array:
    """One id a row, never at or above vocab_size.

    Args:
      seen_BV: True for the tokens that the repetition penalty is for.
    """
    c = sampling
    if seen_BV is not None:
        logits_BV = jnp.where(
            seen_BV,
            jnp.where(
                logits_BV > 0, logits_BV / c.repetition_penalty, logits_BV * c.repetition_penalty
            ),
            logits_BV,
        )
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)
    if c.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / c.temperature
    if c.top_k or c.top_p < 1:
        best_BV = -jnp.sort(-logits_BV, axis=-1)
        if c.top_k:
            best_BV = best_BV[:, : min(c.top_k, vocab_size)]
            logits_BV = jnp.where(logits_BV < best_BV[:, -1:], -jnp.inf, logits_BV)
        if c.top_p < 1:
            shares_BV = jax.nn.softmax(best_BV, axis=-1)
            before_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV
            least_B1 = jnp.min(
                jnp.where(before_BV < c.top_p, best_BV, jnp.inf), axis=-1, keepdims=True
            )
            logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if c.min_p:
        logits_BV = jnp.where(
            logits_BV < jnp.max(logits_BV, axis=-1, keepdims=True) + np.log(np.float32(c.min_p)),
            -jnp.inf,
            logits_BV,
        )
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def row_keys(seeds: Sequence[int]) -> jax.Array:
    """A random key for each row [B], from its own seed."""
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
