"""A bidirectional encoder, trained on masked tokens and on a class of each row: an objective that
declares an array, transforms rows and sees a whole row.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batch import Array
from lm.nn import masks

ARRAYS = {"class": Array(np.int32, dims=(), padding=-1)}


def make_transform(tokenizer, *, rate):
    def transform(row, random):
        is_masked = (random.random(len(row["tokens"])) < rate) & (row["segments"] > 0)
        tokens = np.where(is_masked, tokenizer.eos_id, row["tokens"]).astype(np.int32)
        weights = is_masked.astype(np.float32)
        row_class = np.int32(row["tokens"][1] % 3 if row["segments"][0] else -1)
        changes = dict(tokens=tokens, targets=row["tokens"], weights=weights)
        return row | changes | {"class": row_class}

    return transform


def token_logprobs(model, batch):
    """Of each token at its own place."""
    return _logprobs(model, _hidden(model, batch, None), batch["targets"])


def _logprobs(model, hidden_BTD, targets_BT):
    logits_BTV = model.logits(hidden_BTD)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return target_BT - log_z_BT, log_z_BT


def _hidden(model, batch, keys_B):
    arrays = (batch["tokens"], batch["positions"], batch["segments"])
    return model(*arrays, visible=masks.FULL, keys_B=keys_B).hidden


def make_loss(*, rate):
    del rate

    def loss(model, batch, keys_B):
        hidden_BTD = _hidden(model, batch, keys_B)
        logprobs_BT, _ = _logprobs(model, hidden_BTD, batch["targets"])
        nll_sum, count = -jnp.sum(logprobs_BT * batch["weights"]), jnp.sum(batch["weights"])

        classes_BK = jax.nn.log_softmax(model.head_outputs("classes", hidden_BTD[:, 0]))
        has_class_B = (batch["class"] >= 0).astype(jnp.float32)
        of_class_B = jnp.take_along_axis(classes_BK, batch["class"][:, None], axis=-1)[:, 0]
        class_sum = -jnp.sum(of_class_B * has_class_B)
        terms = {"loss": (nll_sum, count), "class_loss": (class_sum, jnp.sum(has_class_B))}
        return nll_sum + class_sum, count, terms

    return loss
