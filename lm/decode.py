"""Text from a model: prefill a cache with the prompts, then one token at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.attention import Cache


def sample(key: jax.Array, logits_BV: jax.Array, *, temperature: float, top_k: int, vocab_size: int) -> jax.Array:
    """One id a row: the best one if temperature is 0, else drawn from the `top_k` best (0: all), never at or above vocab_size."""
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    if top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, vocab_size))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV / temperature, axis=-1)


def prefill(model, prompts_BT: jax.Array, lengths_B: jax.Array, cache_length: int) -> tuple[jax.Array, Cache]:
    """(logits [B, V] of what follows each prompt, a cache of `cache_length` positions that holds the prompts).

    Prompts are padded on the right. A row's padding is written into the cache too, but lies after the row's own position until
    a generated token overwrites it, so nothing ever attends to it (`lm.nn.attention.cache_mask`).
    """
    positions_BT = jnp.broadcast_to(jnp.arange(prompts_BT.shape[1]), prompts_BT.shape)
    output = model(prompts_BT, positions_BT, jnp.ones_like(prompts_BT), cache=model.init_cache(prompts_BT.shape[0], cache_length))
    last_BD = jnp.take_along_axis(output.hidden, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last_BD), output.cache


def decode_step(model, token_B: jax.Array, position_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """(logits [B, V] of what follows these tokens at these positions, the cache with them)."""
    output = model(token_B[:, None], position_B[:, None], jnp.ones((token_B.shape[0], 1), jnp.int32), cache=cache)
    return model.logits(output.hidden[:, 0]), output.cache


def make_generate(graphdef, *, max_new_tokens: int, temperature: float, top_k: int, eos_id: int, vocab_size: int) -> Callable:
    """Returns `generate(params, prompts_BT, lengths_B, key) -> (tokens [B, max_new_tokens], number of them before EOS [B])`.
    Prompts are padded on the right."""
    def generate(params, prompts_BT, lengths_B, key):
        model = nnx.merge(graphdef, params)
        choose = lambda key, logits: sample(key, logits, temperature=temperature, top_k=top_k, vocab_size=vocab_size)

        def body(carry, index):
            logits_BV, cache, done_B = carry
            token_B = jnp.where(done_B, eos_id, choose(jax.random.fold_in(key, index), logits_BV))
            done_B = done_B | (token_B == eos_id)
            return (*decode_step(model, token_B, lengths_B + index, cache), done_B), token_B
        logits_BV, cache = prefill(model, prompts_BT, lengths_B, prompts_BT.shape[1] + max_new_tokens)
        tokens_TB = jax.lax.scan(body, (logits_BV, cache, jnp.zeros(len(prompts_BT), bool)), jnp.arange(max_new_tokens))[1]
        ended_TB = jnp.cumsum(tokens_TB == eos_id, axis=0) > 0
        return tokens_TB.T, jnp.sum(~ended_TB, axis=0)
    return generate
