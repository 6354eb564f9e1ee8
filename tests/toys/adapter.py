"""A Transformer whose hidden states go through a low-rank adapter: two matrices to be trained on a
frozen base.
"""

import jax.numpy as jnp
from jax import random

from lm.models import transformer
from lm.models.transformer import Config, flops_per_token  # noqa: F401
from lm.nn.layers import dense, param

RANK = 4


class Model(transformer.Transformer):
    def __init__(self, config, key, *, stacked=True):
        super().__init__(config, key, stacked=stacked)
        d, down_key = config.embed_dim, random.fold_in(key, 9)
        self.down = param(down_key, (d, RANK), ("embed", "outputs"), jnp.float32, std=0.3)
        self.up = param(None, (RANK, d), ("outputs", "embed"), jnp.float32)

    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        dtype = self.config.compute_dtype
        low = dense("btd,dr->btr", output.hidden, self.down, dtype, "down")
        change = dense("btr,rd->btd", low, self.up, dtype, "up")
        return output._replace(hidden=output.hidden + change)
