"""Next tokens, weighted by how much worse a row's loss is than the batch's: an objective that
prepares an array from the whole batch, by the model itself.
"""

import jax.numpy as jnp
import numpy as np

from lm.data.batch import Array
from lm.objectives import causal
from lm.objectives.causal import token_logprobs  # noqa: F401

PREPARED = {"scale": Array(np.float32, dims=())}


def make_prepare():
    def prepare(batch, model):
        logprobs_BT, _ = causal.token_logprobs(model, batch)
        nll_B = -jnp.sum(logprobs_BT * batch["weights"], axis=1)
        means_B = nll_B / jnp.maximum(jnp.sum(batch["weights"], axis=1), 1.0)
        # By the batch's mean: another one than a microbatch's.
        return {"scale": means_B / jnp.mean(means_B)}

    return prepare


def make_loss():
    plain = causal.make_loss(z_loss=0.0, chunk=0)

    def loss(model, batch, keys_B):
        weights_BT = batch["weights"] * batch["scale"][:, None]
        return plain(model, batch | {"weights": weights_BT}, keys_B)

    return loss
