"""Preferences: answers that are better than others (DPO and its kin), or good or bad (KTO).

A row has pairs as neighbouring segments, see `lm.data.units`: the better answer and the worse one;
for KTO an answer, and another's answer to the same prompt. The reference is a model of its own
(config.models.reference), the model without its adapters, what was computed beforehand
(lm.reference), or none.

Letters: B batch, T length, U units of a row.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data import batch as batch_contract
from lm.nn import lora
from lm.objectives import causal, preference_losses
from lm.objectives import units as units_lib
from lm.objectives.preference_losses import LOSSES, WITHOUT_REFERENCE, Pairs

token_logprobs = causal.token_logprobs
ARRAYS = batch_contract.UNIT_ARRAYS
PREPARED = {
    # log-probability of each target under the reference; 0 without one
    "reference_logprobs": batch_contract.Array(np.float32),
    # KTO's: how far the model is from the reference, the same for all rows
    "z0": batch_contract.Array(np.float32, dims=()),
}


def examples(*, loss: str = "dpo", **others) -> tuple[str, ...]:
    """The kinds of examples that a loss is of."""
    return ("judged",) if loss == "kto" else ("pair",)


def check(model_config, trained: list[str], *, reference: str = "model", **others) -> None:
    """Checks the model.

    Args:
      trained: the paths of the parameters that are trained.

    Raises:
      ValueError: dropout, which would be in the comparison with the reference; a reference without
        adapters, where there are none, or where more than them is trained.
    """
    check_no_dropout(model_config)
    if reference == "base":
        check_base(trained)


def check_base(trained: list[str]) -> None:
    """Raises ValueError where the model without its adapters isn't what it was before training."""
    others = [path for path in trained if not lora.is_adapter(path)]
    if others or not trained:
        raise ValueError(
            "config.objective.reference = 'base' is the model without its adapters, and what is "
            f"trained besides changes it: {others[:5]}; wanted config.model.lora_rank above 0 and "
            "config.train.trained = '*'"
        )


def check_no_dropout(model_config) -> None:
    """Raises ValueError for a model with dropout."""
    for field in ("dropout", "attention_dropout"):
        if value := getattr(model_config, field, 0):
            raise ValueError(
                f"config.model.{field} = {value} would make answers likelier or less likely by "
                "chance; wanted 0 with preferences"
            )


# What only some of the losses have a use for -> these, and the value that says nothing.
_ARGUMENTS = {
    "label_smoothing": (("dpo", "robust", "simpo"), 0.0),
    "margin": (("simpo",), 0.0),
    "desirable_weight": (("kto",), 1.0),
    "undesirable_weight": (("kto",), 1.0),
}


def _check_arguments(loss: str, reference: str, beta: float, **others: float) -> None:
    if loss not in (*LOSSES, "kto"):
        raise ValueError(f"config.objective.loss = {loss!r}; valid: {[*LOSSES, 'kto']}")
    valid = ("none",) if loss in WITHOUT_REFERENCE else ("model", "base", "stored")
    if reference not in valid:
        raise ValueError(
            f"config.objective.reference = {reference!r}; valid with config.objective.loss = "
            f"{loss!r}: {list(valid)}"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"config.objective.beta = {beta}; wanted a number above 0")
    for name, value in others.items():
        losses, nothing = _ARGUMENTS[name]
        if value != nothing and loss not in losses:
            raise ValueError(
                f"config.objective.{name} = {value} changes nothing with config.objective.loss = "
                f"{loss!r}; it is for {list(losses)}"
            )
    if not 0 <= others["label_smoothing"] < 0.5:
        raise ValueError(
            f"config.objective.label_smoothing = {others['label_smoothing']}; wanted a share, 0 to "
            "below 0.5"
        )


def make_prepare(*, loss: str = "dpo", reference: str = "model", chunk: int = 0, **others):
    """Makes `prepare`: what the reference says of a batch, and KTO's z0 of the whole of it.

    The arguments are those of `make_loss`.
    """

    def logprobs(model, batch):
        hidden_BTD = model(batch["tokens"], batch["positions"], batch["segments"]).hidden
        return causal.logprobs(model, hidden_BTD, batch["targets"], chunk)[0]

    def reference_logprobs(batch, model, models):
        if reference == "none":
            return jnp.zeros(batch["tokens"].shape, jnp.float32)
        if reference == "base":
            with lora.off():
                return logprobs(model, batch)
        if reference == "stored":
            return batch["stored_logprobs"]
        if "reference" not in models:
            raise ValueError(
                "config.objective.reference = 'model' needs config.models.reference, with the "
                "init_from that it is to be"
            )
        return logprobs(models["reference"], batch)

    def prepare(batch, model, **models):
        reference_BT = reference_logprobs(batch, model, models)

        z0 = jnp.zeros((), jnp.float32)
        if loss == "kto":
            ratios = units_of(batch | {"reference_logprobs": reference_BT}, logprobs(model, batch))
            distance_BU = jnp.where(ratios.exists, ratios.second - ratios.second_reference, 0)
            count = jnp.maximum(jnp.sum(ratios.exists, dtype=jnp.float32), 1.0)
            z0 = jnp.maximum(jnp.sum(distance_BU) / count, 0)
        return {"reference_logprobs": reference_BT, "z0": jnp.full(len(reference_BT), z0)}

    return prepare


def make_loss(**arguments):
    """Makes the loss: a mean over pairs, or over judged answers.

    The arguments are those of `make_unit_terms`, whose terms it sums.

    Returns:
      `loss(model, batch, keys_B, **models) -> (loss_sum, count, {name: (sum, count)})`.
    """
    return units_lib.summed(make_unit_terms(**arguments))


def make_unit_terms(
    *,
    loss: str = "dpo",
    reference: str = "model",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float = 0.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    chunk: int = 0,
):
    """Makes the terms of each unit of a batch.

    Args:
      loss: of `lm.objectives.preference_losses.LOSSES`, or kto.
      reference: "model", that of config.models.reference; "base", the model without its adapters;
        "stored", the file of config.chat.reference_logprobs; "none".
      beta, label_smoothing, margin, desirable_weight, undesirable_weight: see there.
      chunk: positions of each row whose logits exist at a time; 0: all.

    Returns:
      `unit_terms(model, batch, keys_B) -> (weights [B, U], {name: [B, U]}, aux)`. Of pairs the
      terms are, besides the loss, whether the better answer gained more on the reference than the
      worse one (`accuracy`), by how many nats, times beta (`margin`), and the answers'
      log-probabilities. Without a reference answers gain on nothing. Of judged answers they are z0,
      and the nats that good and bad answers gained.

    Raises:
      ValueError: an unknown loss, or a reference or another argument that it has no use for.
    """
    _check_arguments(
        loss,
        reference,
        beta,
        label_smoothing=label_smoothing,
        margin=margin,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )

    def of_pairs(units: Units) -> dict[str, jax.Array]:
        pairs = Pairs(
            units.first,
            units.second,
            units.first_reference,
            units.second_reference,
            units.first_tokens,
            units.second_tokens,
        )

        losses_BU = preference_losses.pair_losses(
            pairs, name=loss, beta=beta, label_smoothing=label_smoothing, margin=margin
        )
        gain_BU = units.first - units.first_reference - (units.second - units.second_reference)
        return {
            "loss": losses_BU,
            "accuracy": (gain_BU > 0).astype(jnp.float32),
            "margin": beta * gain_BU,
            "chosen_logprob": units.first,
            "rejected_logprob": units.second,
        }

    def of_judged(units: Units, z0: jax.Array) -> dict[str, jax.Array]:
        gain_BU, is_good_BU = units.first - units.first_reference, units.values > 0
        losses_BU = preference_losses.kto_losses(
            gain_BU,
            is_good_BU,
            z0,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
        )
        return {
            "loss": losses_BU,
            "z0": jnp.broadcast_to(z0, gain_BU.shape),
            "good_gain": jnp.where(is_good_BU, gain_BU, 0),
            "bad_gain": jnp.where(is_good_BU, 0, gain_BU),
        }

    def unit_terms(model, batch, keys_B, **models):
        output = model(batch["tokens"], batch["positions"], batch["segments"], keys_B=keys_B)
        logprobs_BT, _ = causal.logprobs(model, output.hidden, batch["targets"], chunk)

        units = units_of(batch, logprobs_BT)
        terms = of_judged(units, batch["z0"][0]) if loss == "kto" else of_pairs(units)
        return units.weights, terms, output.aux

    return unit_terms


class Units(NamedTuple):
    """What rows' units have, [B, U] each. Where there is no unit, there are numbers of which no
    loss is infinite.

    Attributes:
      exists: bool.
      weights: 1 where there is a unit, shared by the devices that have the same rows.
      first, second: log-probabilities of the parts' answers, summed over their tokens.
      first_reference, second_reference: the same under the reference.
      first_tokens, second_tokens: the answers' numbers of tokens.
      values: see `lm.data.conversations.Example`.
    """

    exists: jax.Array
    weights: jax.Array
    first: jax.Array
    second: jax.Array
    first_reference: jax.Array
    second_reference: jax.Array
    first_tokens: jax.Array
    second_tokens: jax.Array
    values: jax.Array


def units_of(batch, logprobs_BT: jax.Array) -> Units:
    """The units of a batch with `reference_logprobs`."""
    weights_BT = batch["weights"]
    segments_BT = batch["segments"]
    first_tokens, second_tokens, parts = units_lib.sums(weights_BT, segments_BT)

    first, second, _ = units_lib.sums(logprobs_BT * weights_BT, segments_BT)
    references_BT = batch["reference_logprobs"] * weights_BT
    first_reference, second_reference, _ = units_lib.sums(references_BT, segments_BT)
    values, _, _ = units_lib.sums(batch["values"] * weights_BT, segments_BT)

    exists = first_tokens > 0
    return Units(
        exists,
        exists.astype(jnp.float32) / parts,
        jnp.where(exists, first, -1.0),
        jnp.where(exists, second, -1.0),
        first_reference,
        second_reference,
        jnp.maximum(first_tokens, 1.0),
        jnp.maximum(second_tokens, 1.0),
        values / jnp.maximum(first_tokens, 1.0),
    )
