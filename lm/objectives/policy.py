"""A policy that learns from texts that it has written: PPO, GRPO and their kin.

Each row has a prompt and one text behind it, whose tokens have weight. What was found when the text
was written (lm.rl.rollouts) stands beside it: advantages, log-probabilities, values.

Letters: B batch, T length, D embed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lm import collectives
from lm.data import batch as batch_contract
from lm.nn import lora
from lm.objectives import causal, policy_losses, preference
from lm.objectives.policy_losses import KL_ESTIMATORS

token_logprobs = causal.token_logprobs

RATIOS = ("token", "sequence")
AGGREGATES = ("sequence_means", "token_mean", "sums")
OLD = ("present", "stored")
REFERENCES = ("none", "model", "base")
MISMATCH = 0.1  # nats, from which on a token counts as mismatched
_PER_TOKEN = batch_contract.Array(np.float32)


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of the functions below.

    Attributes:
      ratio: of "token"s, or of the whole text, "sequence" (GSPO).
      aggregate: "sequence_means": the mean over texts of the mean over their tokens (GRPO);
        "token_mean": over all tokens (DAPO); "sums": the mean over texts of their tokens' sum,
        divided by `divisor` (Dr. GRPO's is the longest text's length).
      clip_low, clip_high: how far a ratio may go below 1, and above.
      old: the policy that wrote the texts is the "present" one, of which one step is taken, or its
        log-probabilities are "stored" with them, for several steps.
      importance_cap: bound of the weights that make up for a sampler whose log-probabilities are
        others than the trainer's; 0: no weights.
      kl: weight of the divergence from the reference, by `kl_estimator`.
      reference: "none"; "model", config.models.reference; "base", the model without its adapters.
      value_weight, value_clip: of the critic's loss; 0: there is no critic.
      temperature: that the texts were drawn at: the policy is the model at this temperature.
      chunk: positions of each row whose logits exist at a time; 0: all.
      places: of each row, from its end, where its text stands: the prompt's logits aren't computed.
        0: anywhere.

    Raises:
      ValueError: an unknown name, or numbers out of their range.
    """

    ratio: str = "token"
    aggregate: str = "token_mean"
    divisor: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    old: str = "present"
    importance_cap: float = 2.0
    kl: float = 0.0
    kl_estimator: str = "k3"
    reference: str = "none"
    value_weight: float = 0.0
    value_clip: float = 0.2
    temperature: float = 1.0
    chunk: int = 0
    places: int = 0

    def __post_init__(self):
        choices = dict(
            ratio=RATIOS,
            aggregate=AGGREGATES,
            old=OLD,
            kl_estimator=KL_ESTIMATORS,
            reference=REFERENCES,
        )
        for name, valid in choices.items():
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"config.objective.{name} = {value!r}; valid: {list(valid)}")

        for name in ("divisor", "clip_low", "clip_high", "value_clip", "temperature"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"config.objective.{name} = {value}; wanted a number above 0")
        for name in ("importance_cap", "kl", "value_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"config.objective.{name} = {value}; wanted 0, or a number above")
        if self.temperature != 1 and self.chunk:
            raise ValueError(
                f"config.objective.temperature = {self.temperature} needs all logits at once: "
                "wanted config.objective.chunk = 0"
            )
        if self.places and self.chunk and self.places % self.chunk:
            raise ValueError(
                f"config.objective.chunk = {self.chunk} must divide config.objective.places = "
                f"{self.places}"
            )
        if self.kl and self.reference == "none":
            raise ValueError(f"config.objective.kl = {self.kl} needs config.objective.reference")


def arrays(**arguments) -> dict[str, batch_contract.Array]:
    """What rows have besides, of each target: its advantage; its log-probability where it was
    drawn; and as far as the loss asks for them, that under the policy that wrote the rollout and
    under the reference, the critic's value of what stands before it, and the return from there.
    """
    o = Options(**arguments)
    names = ["advantages", "sampled_logprobs"]
    names += ["old_logprobs"] * (o.old == "stored")
    names += ["reference_logprobs"] * (o.reference != "none")
    names += ["old_values", "returns"] * bool(o.value_weight)
    return dict.fromkeys(names, _PER_TOKEN)


def examples(**arguments) -> tuple[str, ...]:
    """The kinds of examples that it is for."""
    return ("prompt",)


def head_share(*, length: int, **arguments) -> float:
    """Of the tokens of rows of `length`, those whose logits are needed."""
    return (Options(**arguments).places or length) / length


def check(model_config, trained: list[str], **arguments) -> None:
    """Checks the model.

    Raises:
      ValueError: an encoder; dropout; a critic without a head of its own; a reference without
        adapters, where there are none.
    """
    o = Options(**arguments)
    causal.check(model_config, trained)
    preference.check_no_dropout(model_config)
    if o.value_weight and not any(path.startswith("heads/scalar/") for path in trained):
        raise ValueError(
            f"config.objective.value_weight = {o.value_weight} trains a critic: wanted "
            "config.model.heads = 'scalar', and heads/* among config.train.trained"
        )
    if o.reference == "base":
        # What a critic says is in no log-probability.
        preference.check_base([path for path in trained if not path.startswith("heads/")])


def logprobs_at(model, hidden_BTD, targets_BT, temperature: float, chunk: int) -> jax.Array:
    """The targets' log-probabilities at a temperature, [B, T]; see `causal.logprobs`."""
    if temperature == 1:
        return causal.logprobs(model, hidden_BTD, targets_BT, chunk)[0]
    logits_BTV = jax.nn.log_softmax(model.logits(hidden_BTD) / temperature)
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


def make_scores(**arguments) -> Callable | None:
    """Makes what a rollout asks of its rows before anything is learnt from them.

    Returns:
      `scores(model, batch, **models) -> {name: f32 [B, T]}`, of the arrays that `arrays` declares;
      None: there is nothing to be asked.
    """
    o = Options(**arguments)

    def logprobs(model, batch):
        hidden_BTD = model(batch["tokens"], batch["positions"], batch["segments"]).hidden
        hidden_BTD, of_texts = _of_texts(hidden_BTD, batch, o.places)
        targets_BT = of_texts["targets"]
        return logprobs_at(model, hidden_BTD, targets_BT, o.temperature, o.chunk), hidden_BTD

    def scores(model, batch, **models):
        found = {}
        if o.old == "stored" or o.value_weight:
            old_BT, hidden_BTD = logprobs(model, batch)
        if o.old == "stored":
            found["old_logprobs"] = old_BT
        if o.value_weight:
            found["old_values"] = model.head_outputs("scalar", hidden_BTD)[..., 0]

        if o.reference == "model":
            found["reference_logprobs"], _ = logprobs(models["reference"], batch)
        if o.reference == "base":
            with lora.off():
                found["reference_logprobs"], _ = logprobs(model, batch)

        # As long as rows are.
        length = batch["tokens"].shape[1]
        for name, values in found.items():
            before = length - values.shape[1]
            found[name] = jnp.pad(values, ((0, 0), (before, 0)))
        return found

    needed = o.old == "stored" or o.value_weight or o.reference != "none"
    return scores if needed else None


def make_loss(**arguments) -> Callable:
    """Makes the loss; the arguments are `Options`, `lm.objectives.policy_losses` has its parts.

    Returns:
      `loss(model, batch, keys_B, **models) -> (loss_sum, count, {name: (sum, count)})`. Texts
      without weight don't count.
    """
    o = Options(**arguments)
    bounds = dict(clip_low=o.clip_low, clip_high=o.clip_high)

    def loss(model, batch, keys_B, **models):
        output = model(batch["tokens"], batch["positions"], batch["segments"], keys_B=keys_B)
        hidden_BTD, batch = _of_texts(output.hidden, batch, o.places)
        weights_BT = batch["weights"]
        logprobs_BT = logprobs_at(model, hidden_BTD, batch["targets"], o.temperature, o.chunk)

        # What is no text has log-probabilities too, whose exponentials may be infinite.
        def of_texts(values_BT):
            return jnp.where(weights_BT > 0, values_BT, 0)

        logprobs_BT = of_texts(logprobs_BT)
        present_BT = jax.lax.stop_gradient(logprobs_BT)
        old_BT = of_texts(batch["old_logprobs"]) if o.old == "stored" else present_BT
        sampled_BT = of_texts(batch["sampled_logprobs"])

        # How far the policy may go.
        log_ratios_BT = logprobs_BT - old_BT
        if o.ratio == "sequence":
            log_ratios_BT = _means_of_texts(log_ratios_BT, weights_BT)
        losses_BT = policy_losses.surrogate_losses(log_ratios_BT, batch["advantages"], **bounds)
        clipped_BT = policy_losses.is_clipped(log_ratios_BT, batch["advantages"], **bounds)
        terms = {"clipped": _mean(clipped_BT, weights_BT)}
        terms |= _watched(weights_BT, present_BT, old_BT, sampled_BT, o.importance_cap)
        if o.importance_cap:
            losses_BT *= policy_losses.truncated_weights(old_BT, sampled_BT, o.importance_cap)

        if o.reference != "none":
            reference_BT = of_texts(batch["reference_logprobs"])
            if o.kl:
                losses_BT += o.kl * policy_losses.kl_estimates(
                    logprobs_BT, reference_BT, o.kl_estimator
                )
            estimates_BT = policy_losses.kl_estimates(present_BT, reference_BT, "k3")
            terms["kl"] = _mean(estimates_BT, weights_BT)
        if o.value_weight:
            value_losses_BT = policy_losses.value_losses(
                model.head_outputs("scalar", hidden_BTD)[..., 0],
                batch["old_values"],
                batch["returns"],
                clip=o.value_clip,
            )
            losses_BT += o.value_weight * value_losses_BT
            terms["value_loss"] = _mean(value_losses_BT, weights_BT)

        loss_sum, count = _aggregate(losses_BT, weights_BT, o.aggregate, o.divisor)
        return loss_sum, count, {"loss": (loss_sum, count)} | terms | output.aux

    return loss


def _of_texts(hidden_BTD, batch, places: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Hidden states and arrays at the last places of rows, where texts stand."""
    # A device with a part of each row has some of them, or none.
    if not places or collectives.has_parts_of_rows():
        return hidden_BTD, batch
    first = hidden_BTD.shape[1] - places
    return hidden_BTD[:, first:], {name: array[:, first:] for name, array in batch.items()}


def _lengths(weights_BT) -> jax.Array:
    return jnp.maximum(collectives.row_sums(weights_BT), 1.0)[:, None]


def _means_of_texts(values_BT, weights_BT) -> jax.Array:
    """The mean over the text of its row, at each token."""
    sums_B1 = collectives.row_sums(values_BT * weights_BT)[:, None]
    return jnp.broadcast_to(sums_B1 / _lengths(weights_BT), values_BT.shape)


def _aggregate(
    losses_BT, weights_BT, aggregate: str, divisor: float
) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of tokens' losses."""
    losses_BT = jnp.where(weights_BT > 0, losses_BT, 0)
    if aggregate == "token_mean":
        return jnp.sum(losses_BT * weights_BT), jnp.sum(weights_BT)
    # The shares of a text's tokens are 1 together: their sum is the number of texts.
    shares_BT = weights_BT / _lengths(weights_BT)
    if aggregate == "sequence_means":
        return jnp.sum(losses_BT * shares_BT), jnp.sum(shares_BT)
    return jnp.sum(losses_BT * weights_BT), jnp.sum(shares_BT) * divisor


def _mean(values_BT, weights_BT) -> tuple[jax.Array, jax.Array]:
    """(sum, count) of what is watched of the tokens."""
    values_BT = jax.lax.stop_gradient(values_BT).astype(jnp.float32)
    values_BT = jnp.where(weights_BT > 0, values_BT, 0)
    return jnp.sum(values_BT * weights_BT), jnp.sum(weights_BT)


def _watched(weights_BT, present_BT, old_BT, sampled_BT, importance_cap: float) -> dict:
    """How far the trainer's log-probabilities are from the sampler's, and the policy from the one
    that wrote the texts.
    """
    mean = functools.partial(_mean, weights_BT=weights_BT)
    mismatch_BT = jnp.abs(old_BT - sampled_BT)
    terms = {
        "mismatch": mean(mismatch_BT),
        "mismatched": mean(mismatch_BT > MISMATCH),
        "policy_moved": mean(policy_losses.kl_estimates(old_BT, present_BT, "k3")),
    }
    if importance_cap:
        terms["importance_capped"] = mean(jnp.exp(old_BT - sampled_BT) > importance_cap)
    return terms
