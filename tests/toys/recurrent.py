"""A language model of one recurrent layer (Elman 1990): its cache is a state."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lm.models.cached import CachedDecoding
from lm.models.transformer import Output
from lm.nn.layers import Embed, dense, param


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    compute_dtype: str
    context_length: int = 32
    embed_dim: int = 32
    shortest_row: int = 16


class Model(CachedDecoding, nnx.Module):
    def __init__(self, config: Config, key: jax.Array):
        self.config, dim = config, config.embed_dim
        embed_key, matrix_key = jax.random.split(key)
        table = dict(axis="vocab", std=0.3, dtype="float32", compute_dtype=config.compute_dtype)
        self.embed = Embed(embed_key, config.vocab_size, dim, **table)
        self.matrix = param(matrix_key, (dim, dim), ("embed", "mlp"), "float32", std=0.3)

    def __call__(self, tokens_BT, positions_BT, segments_BT, *, cache=None, decode=False, **_):
        state_BD = cache if decode else self.init_cache(len(tokens_BT), 0)

        def step(state_BD, inputs):
            x_BD, position_B, segment_B = inputs
            state_BD = jnp.where(position_B[:, None] == 0, 0.0, state_BD)
            mixed_BD = dense("bd,df->bf", state_BD, self.matrix, self.config.compute_dtype, "mixed")
            new_BD = jnp.where(segment_B[:, None] > 0, jnp.tanh(mixed_BD + x_BD), state_BD)
            return new_BD, new_BD

        inputs = (self.embed(tokens_BT).swapaxes(0, 1), positions_BT.T, segments_BT.T)
        state_BD, hidden_TBD = jax.lax.scan(step, state_BD, inputs)
        return Output(hidden_TBD.swapaxes(0, 1), state_BD, {})

    @property
    def head_table(self):
        return self.embed.table

    def logits(self, hidden):
        return self.embed.attend(hidden)

    def init_cache(self, batch_size, length):
        return jnp.zeros((batch_size, self.config.embed_dim), self.config.compute_dtype)


def flops_per_token(config, length, *, causal=True, backward=True):
    passes = 6.0 if backward else 2.0
    return passes * config.embed_dim * (config.embed_dim + config.vocab_size)
