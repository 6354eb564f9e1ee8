"""The losses of preference training, and their gradients, against trl's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.objectives import preference_losses
from tests.parity import trl_losses

LENGTHS = np.array([[1, 1], [3, 17], [40, 2], [9, 9], [1, 30], [25, 24]])  # chosen, rejected


def make_pairs(low=-3.0, high=-0.02):
    """Pairs whose average log-probabilities lie between the two, with references near them."""
    rng = np.random.default_rng(1)
    policy = rng.uniform(low, high, LENGTHS.shape) * LENGTHS
    reference = policy + rng.normal(0, 10, LENGTHS.shape)
    columns = np.concatenate([policy, reference, LENGTHS], axis=1).T
    return preference_losses.Pairs(*columns.astype(np.float32))


def our_values(loss, *scores):
    """(losses, a gradient for each of the scores); no example's loss has to do with another's."""
    scores = [jnp.asarray(score) for score in scores]
    arguments = tuple(range(len(scores)))
    gradients = jax.grad(lambda *scores: loss(*scores).sum(), arguments)(*scores)
    return np.asarray(loss(*scores)), *map(np.asarray, gradients)


def our_pair_values(pairs, **options):
    pairs = preference_losses.Pairs(*map(jnp.asarray, pairs))
    loss = lambda chosen, rejected: preference_losses.pair_losses(
        pairs._replace(chosen=chosen, rejected=rejected), **options
    )
    return our_values(loss, pairs.chosen, pairs.rejected)


def assert_same(ours, theirs):
    assert np.isfinite(theirs).all()
    for our_array, their_array in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our_array, their_array, rtol=1e-5, atol=1e-5)


# --- pairs ---

BETAS = [0.03, 0.1, 0.7]
CASES = [
    *itertools.product(["dpo"], BETAS, [0.0, 0.1, 0.3], [0.0]),
    *itertools.product(["robust"], BETAS, [0.0, 0.1, 0.4], [0.0]),
    *itertools.product(["hinge", "ipo", "orpo"], BETAS, [0.0], [0.0]),
    *itertools.product(["simpo"], [0.5, 2.0, 10.0], [0.0], [0.0, 0.3, 1.6]),
]


@pytest.mark.parametrize("name, beta, label_smoothing, margin", CASES)
def test_losses_of_pairs(name, beta, label_smoothing, margin):
    options = dict(name=name, beta=beta, label_smoothing=label_smoothing, margin=margin)
    pairs = make_pairs()

    theirs = trl_losses.pair_values(pairs, **options)

    # Losses that hardly depend on the scores would agree whatever the scores are.
    assert np.abs(theirs[1]).max() > 1e-3 and np.ptp(theirs[0]) > 1e-2
    assert_same(our_pair_values(pairs, **options), theirs)


@pytest.mark.parametrize(
    "name, label_smoothing",
    [("dpo", 0.0), ("dpo", 0.1), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0), ("simpo", 0.0)],
)
@pytest.mark.parametrize("is_right", [True, False])
def test_pairs_far_apart(name, label_smoothing, is_right):
    """The sigmoid of their difference is 0 or 1 in f32, its logarithm neither infinite nor 0."""
    options = dict(name=name, beta=0.5, label_smoothing=label_smoothing)
    pairs = make_pairs()
    worse = "rejected" if is_right else "chosen"
    pairs = pairs._replace(**{worse: getattr(pairs, worse) - 4000})

    assert_same(our_pair_values(pairs, **options), trl_losses.pair_values(pairs, **options))


@pytest.mark.parametrize("high", [-1e-4, -1e-6])
def test_orpo_of_all_but_certain_completions(high):
    options = dict(name="orpo", beta=0.1)
    pairs = make_pairs(low=10 * high, high=high)

    assert_same(our_pair_values(pairs, **options), trl_losses.pair_values(pairs, **options))


CERTAIN = [0.0, -1e-8, -1e-7]


@pytest.mark.parametrize("chosen, rejected", itertools.product([*CERTAIN, -1.0], repeat=2))
def test_orpo_of_certain_completions(chosen, rejected):
    """Ours is finite, and pushes the right way. trl's gradient is not a number from -1e-8 up, where
    exp(x) is 1 in f32: the branch that it does not take has an infinite one, times 0. Its loss of
    a rejected completion at 0 is infinite, or not a number if the chosen one is at 0 too.
    """
    columns = np.array([[chosen], [rejected], [0], [0], [1], [1]], np.float32)

    ours = our_pair_values(preference_losses.Pairs(*columns), name="orpo", beta=1.0)

    loss, chosen_gradient, rejected_gradient = np.ravel(ours)
    assert np.isfinite(ours).all()
    assert chosen_gradient < 0 <= rejected_gradient
    theirs_is_finite = np.isfinite(trl_losses.odds_ratio_values(chosen, rejected)).all()
    assert theirs_is_finite == (max(chosen, rejected) <= -1e-7)


# --- completions alone, and rewards ---


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.4, 1.7)])
@pytest.mark.parametrize("kl_scores", [[3.5, -1.0, 8.0], [-9.0, 1.0, 2.0]])
def test_losses_of_kto(beta, weights, kl_scores):
    """trl's z0 is the mean, or 0 if that is negative."""
    options = dict(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    z0 = np.float32(max(np.mean(kl_scores), 0))
    pairs = make_pairs()
    is_desirable = np.arange(len(LENGTHS)) % 2 == 0

    def their_loss(i, score):
        args = (int(LENGTHS[i, 0]), score, pairs.chosen_reference[i], is_desirable[i], kl_scores)
        loss, their_z0 = trl_losses.kto(*args, **options)
        np.testing.assert_allclose(their_z0, z0, rtol=1e-6)
        return loss

    theirs = trl_losses.values(their_loss, pairs.chosen)
    ours = our_values(
        lambda chosen: preference_losses.kto_losses(
            chosen - pairs.chosen_reference, jnp.asarray(is_desirable), jnp.asarray(z0), **options
        ),
        pairs.chosen,
    )

    assert np.abs(theirs[1]).max() > 1e-3 and np.ptp(theirs[0]) > 1e-2
    assert_same(ours, theirs)


@pytest.mark.parametrize("centring", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("margins", [np.zeros(6), np.linspace(-1, 3, 6)])
@pytest.mark.parametrize("scale", [2.0, 1000.0])
def test_losses_of_rewards(centring, margins, scale):
    """trl has no margin and no centring where ours are 0."""
    margins = margins.astype(np.float32)
    rewards = np.random.default_rng(0).normal(0, scale, (2, 6)).astype(np.float32)

    def their_loss(i, scores):
        return trl_losses.reward(scores, float(margins[i]) or None, centring or None)

    ours = our_values(
        lambda *scores: preference_losses.reward_losses(
            *scores, jnp.asarray(margins), centring=centring
        ),
        *rewards,
    )
    assert_same(ours, trl_losses.values(their_loss, *rewards))
