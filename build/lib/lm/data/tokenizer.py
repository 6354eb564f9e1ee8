"""Tokenizers behind one protocol: SentencePiece (trained here, or a given model) and plain bytes.

Policy: a tokenizer never adds special ids by itself. `lm.data.pack` puts one BOS before a document and one EOS after it.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import sentencepiece
from etils import epath


class Tokenizer(Protocol):
    """`fingerprint` names the exact mapping; `vocab_size` counts the special ids too."""
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def save(self, directory: epath.Path) -> None: ...


class ByteTokenizer:
    """UTF-8 bytes as they are (ids 0 to 255), BOS 256, EOS 257."""
    vocab_size, bos_id, eos_id, fingerprint = 258, 256, 257, "bytes-1"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, directory: epath.Path) -> None:
        (directory / "tokenizer.bytes").write_text(self.fingerprint)


class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226), with its own BOS and EOS."""

    def __init__(self, model: bytes, name: str = "the model"):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model: {error}") from None
        self._model = model
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.fingerprint = "sentencepiece-" + hashlib.sha256(model).hexdigest()[:16]
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{name} has no BOS or EOS piece (ids {self.bos_id}, {self.eos_id}); train it with bos_id and eos_id >= 0")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def save(self, directory: epath.Path) -> None:
        (directory / "tokenizer.model").write_bytes(self._model)


def load(path: str | epath.Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model file, or of a directory that `save` wrote.

    Raises:
      ValueError: there is none.
    """
    path = epath.Path(path)
    if (path / "tokenizer.bytes").exists():
        return ByteTokenizer()
    model = path / "tokenizer.model" if (path / "tokenizer.model").exists() else path
    if model.is_dir() or not model.exists():
        raise ValueError(f"no tokenizer at {path}: wanted a SentencePiece model file, or a directory with tokenizer.model in it")
    return SentencePieceTokenizer(model.read_bytes(), str(model))


def train_sentencepiece(texts: Iterable[str], vocab_size: int, cache: epath.Path) -> SentencePieceTokenizer:
    """A byte-pair model with byte fallback of `texts`, kept at `cache` and read from there the next time.

    Text comes back unchanged: no normalisation, runs of spaces kept, a piece for the newline, bytes for what is rare. (The one
    exception is U+2581, SentencePiece's own sign for the space.) Pieces never cross a newline.

    Raises:
      ValueError: the texts are too few for the size.
    """
    if not cache.exists():
        lines = (line for text in texts for line in text.split("\n") if line)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
                allow_whitespace_only_pieces=True, user_defined_symbols=["\n"], character_coverage=0.9999,
                unk_id=0, bos_id=1, eos_id=2, pad_id=-1, max_sentence_length=1 << 20,
                num_threads=1,  # the model file records it: one setting, one fingerprint
                minloglevel=2)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"config.tokenizer.vocab_size = {vocab_size}: SentencePiece can't train that on this text: {error}") from None
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.parent / f"{cache.name}.{os.getpid()}"
        partial.write_bytes(model.getvalue())
        partial.replace(cache)
    return load(cache)
