"""All losses of preferences and of rewards at once, summed: one program compiles for what would be
eight.
"""

from lm.objectives import preference, reward
from lm.objectives.preference import ARRAYS, PREPARED, token_logprobs  # noqa: F401
from lm.objectives.preference_losses import WITHOUT_REFERENCE

NAMES = ("dpo", "robust", "hinge", "ipo", "orpo", "simpo", "kto", "reward")
# Such that each argument matters, and no loss is lost in the sum.
ARGUMENTS = {
    "dpo": dict(label_smoothing=0.1),
    "robust": dict(label_smoothing=0.2),
    "ipo": dict(beta=0.5),
    "simpo": dict(beta=2.0, margin=0.5),
    "kto": dict(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
    "reward": dict(centring=0.005),
}


class Once:
    """A model that is called once, however many losses ask it."""

    def __init__(self, model):
        self._model, self._output = model, None

    def __call__(self, *args, **kwargs):
        if self._output is None:
            self._output = self._model(*args, **kwargs)
        return self._output

    def __getattr__(self, name):
        return getattr(self._model, name)


def examples(**arguments):
    return ("pair", "judged")


def make_one_loss(name, chunk=0, **arguments):
    """The loss of a name, with arguments that matter to it."""
    arguments = ARGUMENTS.get(name, {}) | arguments
    if name == "reward":
        return reward.make_loss(**arguments)
    reference = "none" if name in WITHOUT_REFERENCE else "base"
    return preference.make_loss(loss=name, reference=reference, chunk=chunk, **arguments)


def make_prepare(chunk=0):
    return preference.make_prepare(loss="kto", reference="base", chunk=chunk)


def make_loss(chunk=0):
    losses = {name: make_one_loss(name, chunk) for name in NAMES}

    def loss(model, batch, keys_B):
        once, total, terms = Once(model), 0.0, {}
        for name, loss_fn in losses.items():
            value, count, of_loss = loss_fn(once, batch, keys_B)
            total = total + value
            terms |= {f"{name}/{term}": sums for term, sums in of_loss.items()}
        return total, count, terms | {"loss": (total, count)}

    return loss
