"""Perplexity and bits per byte of a split, each document exactly once; pseudo-perplexity of masked
models.
"""

import lzma
import math
from collections.abc import Iterator

import numpy as np

from lm.data.pack import Encoder, evaluation_rows, windows
from lm.data.records import take
from lm.data.sources import Documents
from lm.evals.predict import PredictFns, Prompt, Question
from lm.evals.prompts import check_least
from lm.evals.scores import statistics


class Perplexity:
    """Yields loss (nats per token), perplexity, word_perplexity (per word between white space),
    bits_per_byte, xz_bits_per_byte, and the tokens, bytes and documents counted.

    Only the text counts: a label line is left out and EOS is not predicted, so that tokens and
    bytes are of the same text. A document's first window begins with BOS. Documents longer than a
    row are cut into windows without overlap, unless there is a `stride`.

    `xz_bits_per_byte` is there for scale: the size of what `xz -9e` makes of the same bytes, all
    documents one after the other, with the few bytes of its container.

    Args:
      name: for messages.
      max_documents: number of documents, taken evenly out of the split; 0: all.
      stride: tokens that each window after a document's first one adds; the rest of the row is
        context before them. The smaller it is, the nearer to the model's own perplexity, and the
        slower. 0: a whole row.

    Raises:
      ValueError: a stride below 0 or above the row; max_documents below 0; documents that are no
        texts.
    """

    asks = ("token_logprobs",)
    metrics = ("bits_per_byte", "perplexity", "loss", "word_perplexity")

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        documents: Documents,
        encoder: Encoder,
        max_documents: int,
        stride: int = 0,
    ):
        check_least(f"config.evals.{name}.max_documents", max_documents, 0)
        length = predict_fns.length
        if not 0 <= stride <= length:
            raise ValueError(
                f"config.evals.{name}.stride = {stride}; wanted 0 to config.data.length = {length}"
            )
        chosen = list(take(documents, max_documents))

        # Rows don't depend on batches: they are packed once.
        document_windows = []
        for document in chosen:
            document_windows += windows(encoder.text(document), length, stride)
        self._predict_fns = predict_fns
        self._rows = evaluation_rows(document_windows, length)
        # 0 for padding, and for context that another window counts
        self._weights = np.stack([row["weights"] for row in self._rows])

        data = b"".join(document.text.encode("utf-8") for document in chosen)
        self._num_tokens = int(self._weights.sum(dtype=np.float64))
        self._num_bytes = len(data)
        self._num_words = sum(len(document.text.split()) for document in chosen)
        self._num_documents = len(chosen)

        # What the command writes: the options of `xz -9e`, and its container.
        compressed = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
        self._xz_bits_per_byte = len(compressed) * 8 / len(data)
        self.about = {
            "fingerprint": documents.fingerprint,
            "examples": len(chosen),
            "stride": stride,
        }

    def run(self, params) -> Iterator[tuple[str, float]]:
        logprobs = self._predict_fns.token_logprobs(params, self._rows)
        nll = -float(np.sum(logprobs * self._weights, dtype=np.float64))  # nats, of all texts

        yield "loss", nll / self._num_tokens
        yield "perplexity", statistics.exp(nll / self._num_tokens)
        yield "word_perplexity", statistics.exp(nll / max(self._num_words, 1))
        yield "bits_per_byte", nll / math.log(2) / self._num_bytes
        yield "xz_bits_per_byte", self._xz_bits_per_byte
        yield "tokens", self._num_tokens
        yield "bytes", self._num_bytes
        yield "documents", self._num_documents


class PseudoPerplexity:
    """Yields loss (nats per token), pseudo_perplexity, and the tokens and documents counted: each
    token is asked for given all others of its window, with a mask in its place (Salazar et al.
    2020, arXiv 1910.14659, section 2).

    Its losses don't sum to that of a text, since they are no factors of one distribution: they
    compare masked models with each other, of one tokenizer, and with nothing else. Words of several
    tokens are overrated, whose tokens tell each other.

    Args:
      name: for messages.
      max_documents: number of documents, taken evenly out of the split; 0: all. Each of their
        tokens is a row.

    Raises:
      ValueError: max_documents below 0.
    """

    asks = ("infill",)
    metrics = ("pseudo_perplexity", "loss")

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        documents: Documents,
        encoder: Encoder,
        max_documents: int,
    ):
        check_least(f"config.evals.{name}.max_documents", max_documents, 0)
        chosen = list(take(documents, max_documents))
        before, _ = encoder.tokenizer.around
        length = predict_fns.prompt_length

        self._predict_fns = predict_fns
        self._questions = []
        for document in chosen:
            ids = np.asarray(encoder.text(document), np.int32)
            for start in range(0, len(ids), length):
                # What begins a document is given.
                first = len(before) if start == 0 else 0
                self._questions += _each_token(ids[start : start + length], first)
        self.about = {"fingerprint": documents.fingerprint, "examples": len(chosen)}

    def run(self, params) -> Iterator[tuple[str, float]]:
        nll = 0.0
        for ((logprobs, _),) in self._predict_fns.infill(params, self._questions):
            nll -= float(logprobs.sum())
        num_tokens = len(self._questions)
        yield "loss", nll / num_tokens
        yield "pseudo_perplexity", statistics.exp(nll / num_tokens)
        yield "tokens", num_tokens
        yield "documents", self.about["examples"]


def _each_token(ids: np.ndarray, first: int) -> Iterator[Question]:
    """Asks for each token of a window from the place `first` on."""
    for place in range(first, len(ids)):
        prompt = Prompt(ids[:place], {"after": ids[place + 1 :]})
        yield Question(prompt, [[int(ids[place])]])
