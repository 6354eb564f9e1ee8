"""Next-token prediction of texts whose middle comes last (lm/data/corruption.py). The loss is that
of `lm.objectives.causal`.
"""

from lm.data.corruption import FillInTheMiddle
from lm.objectives import causal
from lm.objectives.causal import check, token_logprobs  # noqa: F401, of this objective too


def examples(**arguments) -> tuple[str, ...]:
    """The kinds of documents that it is for."""
    return ("text",)


def make_windows(tokenizer, *, rate: float = 0.5, end_first: float = 0.5, **of_loss):
    """Returns `windows(ids, length, random)`, see `lm.data.corruption.FillInTheMiddle`.

    Raises:
      ValueError: see there.
    """
    return FillInTheMiddle(tokenizer, rate, end_first).windows


def make_loss(*, rate: float = 0.5, end_first: float = 0.5, z_loss: float = 0.0, chunk: int = 0):
    """Makes the loss of `lm.objectives.causal`."""
    return causal.make_loss(z_loss=z_loss, chunk=chunk)
