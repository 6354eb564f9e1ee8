"""Perplexity and bits per byte of a split, each document exactly once."""

import lzma
import math
from collections.abc import Iterator

import numpy as np

from lm.data.pack import Encoder, evaluation_rows, windows
from lm.data.sources import Documents, take
from lm.evals.predict import PredictFns


class Perplexity:
    """Yields loss (nats a token), perplexity, word_perplexity (words between white space),
    bits_per_byte, xz_bits_per_byte, and tokens, bytes and documents counted.

    Only the text counts: a label line is left out, and EOS is not predicted, so that tokens and
    bytes are of the same text. BOS is given, to a document's first window. Documents longer than
    the row are cut into windows without overlap, unless there is a `stride`. `xz_bits_per_byte` is
    for scale: what `xz -9e` makes of the same bytes, all documents one after the other, its few
    bytes of container included.

    Args:
      max_documents: how many of the split, evenly out of it; 0: all.
      stride: tokens that each window after a document's first one adds, the rest of the row being
        context before them: the smaller, the nearer to the model's own perplexity, and the slower;
        0: a whole row.

    Raises:
      ValueError: a stride below 0 or above the row.
    """

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        documents: Documents,
        encoder: Encoder,
        max_documents: int,
        stride: int = 0,
    ):
        if not 0 <= stride <= predict_fns.length:
            raise ValueError(
                f"stride = {stride} of a perplexity; wanted 0 to config.data.length = "
                f"{predict_fns.length}"
            )
        texts = list(take(documents, max_documents))
        self._predict_fns = predict_fns
        self._rows = evaluation_rows(
            [w for d in texts for w in windows(encoder.text(d), predict_fns.length, stride)],
            predict_fns.length,
        )
        data = b"".join(d.text.encode("utf-8") for d in texts)
        self._counts = {
            "tokens": int(sum(row["weights"].sum() for row in self._rows)),
            "bytes": len(data),
            "documents": len(texts),
        }
        self._words = sum(len(d.text.split()) for d in texts)
        self.about = {
            "fingerprint": documents.fingerprint,
            "examples": len(texts),
            "stride": stride,
        }
        self._xz = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(data)

    def run(self, params) -> Iterator[tuple[str, float]]:
        logprobs = self._predict_fns.token_logprobs(params, self._rows)
        weights = np.stack([row["weights"] for row in self._rows])
        nll = -float(np.sum(logprobs * weights, dtype=np.float64))
        yield "loss", nll / self._counts["tokens"]
        yield "perplexity", math.exp(min(nll / self._counts["tokens"], 700.0))
        yield "word_perplexity", math.exp(min(nll / max(self._words, 1), 700.0))
        yield "bits_per_byte", nll / math.log(2) / self._counts["bytes"]
        yield "xz_bits_per_byte", self._xz
        yield from self._counts.items()
