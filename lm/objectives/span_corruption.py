"""Span corruption: an encoder-decoder says what was taken out of a text (lm/data/corruption.py).
The loss is that of `lm.objectives.seq2seq`.
"""

from lm.data.corruption import SpanCorruption
from lm.objectives import seq2seq
from lm.objectives.seq2seq import token_logprobs  # noqa: F401, of this objective too


def arrays(*, source_length: int, **arguments) -> dict:
    """The arrays of a batch beside the five."""
    return seq2seq.arrays(source_length=source_length)


def examples(**arguments) -> tuple[str, ...]:
    """The kinds of documents that it is for."""
    return ("text",)


def check(model_config, trained: list[str], **arguments) -> None:
    """Raises ValueError, see `lm.objectives.seq2seq.check`."""
    seq2seq.check(model_config, trained, **arguments)


def make_windows(
    tokenizer,
    *,
    source_length: int,
    rate: float = 0.15,
    mean_span: float = 3.0,
    **of_loss,
):
    """Returns `windows(ids, length, random)`, see `lm.data.corruption.SpanCorruption`.

    Raises:
      ValueError: see there.
    """
    return SpanCorruption(tokenizer, rate, mean_span, source_length).windows


def make_loss(*, rate: float = 0.15, mean_span: float = 3.0, **of_loss):
    """Makes the loss of `lm.objectives.seq2seq`."""
    return seq2seq.make_loss(**of_loss)
