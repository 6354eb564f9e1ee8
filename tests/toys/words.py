"""A model without attention: each token's vector, by its place, through a dense layer with an
adapter. It compiles in a moment, for tests of what objectives make of log-probabilities and scores.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lm.models.transformer import Output
from lm.nn import lora
from lm.nn.layers import Embed, Head, VocabHead, dense, param


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    compute_dtype: str
    context_length: int = 64
    embed_dim: int = 16
    shortest_row: int = 16
    heads: str = ""
    dropout: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 4.0
    lora_scaling: str = "plain"
    lora_targets: str = "up"


class Model(nnx.Module):
    def __init__(self, config: Config, key: jax.Array):
        self.config, dim = config, config.embed_dim
        embed_key, up_key, head_key = jax.random.split(key, 3)
        options = dict(std=0.5, dtype="float32", compute_dtype=config.compute_dtype)
        self.embed = Embed(embed_key, config.vocab_size, dim, axis="vocab", **options)
        self.up = param(up_key, (dim, dim), ("embed", "mlp"), "float32", std=0.5)
        lora.attach(self, key, config, dict(up=1))
        self.heads = nnx.Dict(scalar=Head(head_key, dim, 1, **options)) if config.heads else None

    def __call__(self, tokens_BT, positions_BT, segments_BT, *, keys_B=None):
        # By its place, so that the last token's score is not that of every end.
        place_BT = 1 + positions_BT.astype(jnp.float32) / 10
        x_BTD = jnp.einsum("btd,bt->btd", self.embed(tokens_BT), place_BT)
        up = lora.of(self, "up")
        hidden_BTD = jnp.tanh(dense("btd,df->btf", x_BTD, up, self.config.compute_dtype, "up"))
        return Output(hidden_BTD, None, {})

    @property
    def head_table(self):
        return self.embed.table

    def vocab_head(self, hidden):
        return VocabHead(hidden, self.head_table, None)

    def logits(self, hidden):
        return self.embed.attend(hidden)

    def head_outputs(self, name, hidden):
        return self.heads[name](hidden)


def flops_per_token(config, length, *, causal=True, backward=True):
    passes = 6.0 if backward else 2.0
    return passes * config.embed_dim * (config.embed_dim + config.vocab_size)
