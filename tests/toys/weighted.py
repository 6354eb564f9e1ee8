"""Next tokens, each row weighted by how much less likely it is than to a reference model, compared
with the whole batch: an objective that prepares an array, and asks another model.
"""

import jax.numpy as jnp
import numpy as np

from lm.data.batch import Array
from lm.objectives import causal
from lm.objectives.causal import token_logprobs  # noqa: F401

PREPARED = {"scale": Array(np.float32, dims=())}


def mean_nll(model, batch):
    logprobs_BT, _ = causal.token_logprobs(model, batch)
    nll_B = -jnp.sum(logprobs_BT * batch["weights"], axis=1)
    return nll_B / jnp.maximum(jnp.sum(batch["weights"], axis=1), 1.0)


def make_prepare():
    def prepare(batch, model, *, reference):
        ratio_B = mean_nll(model, batch) / jnp.maximum(mean_nll(reference, batch), 1e-3)
        # By the batch's mean: another one than a microbatch's.
        return {"scale": ratio_B / jnp.mean(ratio_B)}

    return prepare


def make_loss():
    plain = causal.make_loss(z_loss=0.0, chunk=0)

    def loss(model, batch, keys_B, *, reference):
        weights_BT = batch["weights"] * batch["scale"][:, None]
        total, count, terms = plain(model, batch | {"weights": weights_BT}, keys_B)
        wanted, _, _ = plain(reference, batch, None)
        return total, count, terms | {"reference_loss": (wanted, jnp.sum(batch["weights"]))}

    return loss
