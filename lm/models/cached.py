"""Decoding with a cache: the two steps that lm/decoding/ asks of a model.

Letters: B batch (rows), T length of the padded prompts, D embed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Decoded(NamedTuple):
    """Where a row stands after a step.

    Attributes:
      hidden_BD: what the head takes for the next token.
      cache: whatever the model keeps of what it has read (keys and values, a state, an encoder's
        output). Its rows are the first dim of each array.
      position_B: of the next token.
    """

    hidden_BD: jax.Array
    cache: Any
    position_B: jax.Array


def read_from_left(prompts_BT: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(positions, segments) of prompts that are padded on the right, [B, T] each."""
    positions_BT = jnp.broadcast_to(jnp.arange(prompts_BT.shape[1]), prompts_BT.shape)
    return positions_BT, (positions_BT < lengths_B[:, None]).astype(jnp.int32)


class CachedDecoding:
    """`prefill` and `decode_step` of a model whose call takes `cache` and `decode`, and whose
    positions count up.
    """

    def prefill(self, prompts_BT: jax.Array, lengths_B: jax.Array, cache) -> Decoded:
        """Reads whole prompts.

        Args:
          prompts_BT: ids, padded on the right. Nothing attends to the padding, and none of it gets
            into the cache.
          lengths_B: the prompts' lengths, without padding.
          cache: an empty one (`init_cache`).
        """
        output = self(prompts_BT, *read_from_left(prompts_BT, lengths_B), cache=cache)
        last_BD = jnp.take_along_axis(output.hidden, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return Decoded(last_BD, output.cache, lengths_B)

    def rows_axis(self, cache) -> int:
        """The dim of the rows: a stack of layers is one array for all of them."""
        return 0 if isinstance(cache, list) else 1

    def take_rows(self, cache, rows_B: jax.Array):
        """The cache of these rows, in this order; a row may come several times."""
        take = functools.partial(jnp.take, indices=rows_B, axis=self.rows_axis(cache))
        return jax.tree.map(take, cache)

    def put_rows(self, cache, rows_N: jax.Array, others):
        """The cache with these of its rows replaced by those of another one, in order. Rows that
        it doesn't have are left out.
        """
        before = (slice(None),) * self.rows_axis(cache)

        def put(x, other):
            return x.at[*before, rows_N].set(other, mode="drop")

        return jax.tree.map(put, cache, others)

    def decode_step(self, token_B: jax.Array, position_B: jax.Array, cache) -> Decoded:
        """Reads one token a row, of these positions."""
        segments_B1 = jnp.ones((token_B.shape[0], 1), jnp.int32)
        output = self(token_B[:, None], position_B[:, None], segments_B1, cache=cache, decode=True)
        return Decoded(output.hidden[:, 0], output.cache, position_B + 1)
