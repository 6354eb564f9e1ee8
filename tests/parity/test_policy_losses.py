"""The losses of policies, and their gradients, against trl's."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.objectives import policy
from tests.parity import trl_losses

B, T = 6, 9
LENGTHS = [9, 3, 1, 5, 7, 2]
# trl's loss_type -> ours
AGGREGATES = dict(grpo="sequence_means", dapo="token_mean", dr_grpo="sums")


def make_texts():
    """Log-probabilities far enough apart for every bound to be met."""
    rng = np.random.default_rng(0)
    logprobs = -rng.exponential(1.5, (B, T)) - 0.05
    return dict(
        logprobs=logprobs,
        old=np.minimum(logprobs + rng.normal(0, 0.3, (B, T)), -0.01),
        sampled=np.minimum(logprobs + rng.normal(0, 0.8, (B, T)), -0.01),
        reference=np.minimum(logprobs + rng.normal(0, 0.7, (B, T)), -0.01),
        weights=(np.arange(T) < np.array(LENGTHS)[:, None]).astype(np.float32),
        advantages=rng.normal(0, 1, B),
    )


class StandIn:
    """A model of two tokens, whose hidden states are the second one's log-probabilities."""

    config = types.SimpleNamespace(bias="")

    def __init__(self, logprobs_BT):
        self._logprobs_BT = logprobs_BT

    def __call__(self, *arrays, keys_B=None):
        return types.SimpleNamespace(hidden=self._logprobs_BT, aux={})

    def logits(self, logprobs_BT):
        return jnp.stack([jnp.log(-jnp.expm1(logprobs_BT)), logprobs_BT], axis=-1)


def our_loss(texts, **options):
    """(the loss, its gradient for the log-probabilities, what it says besides)."""
    batch = {name: jnp.asarray(array, jnp.float32) for name, array in texts.items()}
    batch["targets"] = jnp.ones((B, T), jnp.int32)
    batch |= dict(old_logprobs=batch["old"], sampled_logprobs=batch["sampled"])
    batch |= dict(reference_logprobs=batch["reference"])
    batch["advantages"] = jnp.broadcast_to(batch["advantages"][:, None], (B, T))
    batch |= dict.fromkeys(("tokens", "positions", "segments"), batch["targets"])
    loss = policy.make_loss(old="stored", reference="model", **options)

    def mean(logprobs_BT):
        total, count, terms = loss(StandIn(logprobs_BT), batch, None)
        return total / count, terms

    (value, terms), grad = jax.value_and_grad(mean, has_aux=True)(batch["logprobs"])
    return value, grad, terms


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", AGGREGATES)
@pytest.mark.parametrize("kl, importance_cap", [(0.0, 0.0), (0.3, 2.0)])
def test_losses_are_trls(loss_type, ratio, kl, importance_cap):
    texts = make_texts()
    wanted, wanted_grad, metrics = trl_losses.policy(
        texts,
        loss_type=loss_type,
        importance_sampling_level=ratio,
        beta=kl,
        epsilon_low=0.1,
        epsilon_high=0.25,
        max_completion_length=T,
        importance_cap=importance_cap,
    )
    got, grad, terms = our_loss(
        texts,
        aggregate=AGGREGATES[loss_type],
        divisor=float(T),
        ratio=ratio,
        kl=kl,
        clip_low=0.1,
        clip_high=0.25,
        importance_cap=importance_cap,
    )
    assert float(got) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-4, atol=1e-5)

    # Some are clipped, and some are not.
    clipped = float(terms["clipped"][0] / terms["clipped"][1])
    assert 0 < clipped < 1
    if ratio == "token":
        assert clipped == pytest.approx(metrics["clip_ratio/region_mean"][0], abs=1e-6)
    if kl:
        kl_found = float(terms["kl"][0] / terms["kl"][1])
        assert kl_found == pytest.approx(metrics["kl"][0], rel=1e-5)
