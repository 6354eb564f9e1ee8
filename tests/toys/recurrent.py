"""A language model of one recurrent layer (Elman 1990): its cache is a state."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.models.cached import CachedDecoding
from lm.nn.layers import Embed, dense, param


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    compute_dtype: str
    context_length: int = 32
    embed_dim: int = 32
    param_dtype: str = "float32"
    shortest_row: int = 16


class Output(NamedTuple):
    hidden: jax.Array
    cache: Any
    aux: dict


class Model(CachedDecoding, nnx.Module):
    def __init__(self, config: Config, key: jax.Array):
        c = self.config = config
        embed_key, matrix_key = jax.random.split(key)
        options = dict(std=0.3, dtype=c.param_dtype)
        self.embed = Embed(
            embed_key,
            c.vocab_size,
            c.embed_dim,
            axis="vocab",
            compute_dtype=c.compute_dtype,
            **options,
        )
        shape = (c.embed_dim, c.embed_dim)
        self.matrix = param(matrix_key, shape, ("embed", "mlp"), **options)

    def __call__(
        self, tokens_BT, positions_BT, segments_BT, *, cache=None, decode=False, keys_B=None
    ):
        x_BTD = self.embed(tokens_BT)
        state_BD = cache if decode else self.init_cache(len(tokens_BT), 0)

        def step(state_BD, inputs):
            x_BD, position_B, segment_B = inputs
            state_BD = jnp.where(position_B[:, None] == 0, 0.0, state_BD)
            mixed_BD = dense("bd,df->bf", state_BD, self.matrix, self.config.compute_dtype, "mixed")
            new_BD = jnp.where(segment_B[:, None] > 0, jnp.tanh(mixed_BD + x_BD), state_BD)
            return new_BD, new_BD

        inputs = (x_BTD.swapaxes(0, 1), positions_BT.T, segments_BT.T)
        state_BD, hidden_TBD = jax.lax.scan(step, state_BD, inputs)
        return Output(hidden_TBD.swapaxes(0, 1), state_BD, {})

    @property
    def head_table(self):
        return self.embed.table

    def logits(self, hidden):
        return self.embed.attend(hidden)

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, self.config.embed_dim), self.config.compute_dtype)


def flops_per_token(config, length, *, causal=True):
    return 6.0 * config.embed_dim * (config.embed_dim + config.vocab_size)
