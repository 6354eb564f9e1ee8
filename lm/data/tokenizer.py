"""Tokenizers behind one protocol: SentencePiece (trained here, or a given model), those of Hugging
Face checkpoints, and plain bytes.

Policy: a tokenizer never adds special ids by itself. `lm.data.pack` puts one BOS before a document
and one EOS after it.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import sentencepiece
from etils import epath


class Tokenizer(Protocol):
    """`fingerprint` names the exact mapping; `vocab_size` counts the special ids too."""

    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]  # EOS and whatever else ends a generated text
    fingerprint: str
    files: Mapping[str, bytes]  # of a Hugging Face checkpoint

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...  # the same, by all cores
    # to be continued: with what stands before a text; never empty
    def prompt(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def save(self, directory: epath.Path) -> None: ...


def prefix_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids that stand before those of a text that a model is asked about: BOS; for tokenizers of
    Hugging Face checkpoints that add none, only if there are no others.
    """
    return (
        [tokenizer.bos_id] if not len(ids) or tokenizer.prompt("a") != tokenizer.encode("a") else []
    )


class ByteTokenizer:
    """UTF-8 bytes as they are (ids 0 to 255), BOS 256, EOS 257."""

    vocab_size, bos_id, eos_id, stop_ids, fingerprint, files = 258, 256, 257, (257,), "bytes-1", {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def prompt(self, text: str) -> list[int]:
        return [self.bos_id] + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, directory: epath.Path) -> None:
        (directory / "tokenizer.bytes").write_text(self.fingerprint)
        for name, content in self._for_transformers().items():
            (directory / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def _for_transformers(self) -> dict[str, dict]:
        """With these files transformers gives the same ids, but for <s> and </s> that are spelt out
        in a text: byte-level BPE without merges, each byte spelt as GPT-2 does.
        """
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in plain]
        spelling = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
        special = {"<s>": self.bos_id, "</s>": self.eos_id}
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        by_byte = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        return {
            "tokenizer.json": dict(
                version="1.0",
                added_tokens=[dict(id=i, content=token, **flags) for token, i in special.items()],
                pre_tokenizer=by_byte,
                decoder=by_byte,
                model=dict(
                    type="BPE", vocab={spelling[b]: b for b in range(256)} | special, merges=[]
                ),
            ),
            "tokenizer_config.json": dict(
                tokenizer_class="PreTrainedTokenizerFast",
                bos_token="<s>",
                eos_token="</s>",
                clean_up_tokenization_spaces=False,
            ),
        }


class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226), with its own BOS and EOS.

    Args:
      files: what else a Hugging Face checkpoint has for it; kept for the way back.
    """

    def __init__(
        self, model: bytes, name: str = "the model", files: Mapping[str, bytes] | None = None
    ):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model: {error}") from None
        self._model, self.files = model, files or {}
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.stop_ids = (self.eos_id,)
        self.fingerprint = "sentencepiece-" + hashlib.sha256(model).hexdigest()[:16]
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{name} has no BOS or EOS piece (ids {self.bos_id}, {self.eos_id}); train it "
                "with bos_id and eos_id >= 0"
            )

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts))

    def prompt(self, text: str) -> list[int]:
        return [self.bos_id] + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def save(self, directory: epath.Path) -> None:
        own = {
            "tokenizer_config.json": json.dumps(self._for_transformers(), indent=2).encode() + b"\n"
        }
        for name, content in {**own, **self.files, "tokenizer.model": self._model}.items():
            (directory / name).write_bytes(content)

    def _for_transformers(self) -> dict:
        """With this beside the model, transformers gives the same ids, but for special tokens that
        are spelt out in a text.
        """
        piece = lambda i: self._processor.id_to_piece(i) if i >= 0 else None
        return dict(
            tokenizer_class="LlamaTokenizer",
            legacy=False,
            add_bos_token=False,
            add_eos_token=False,
            add_prefix_space=False,
            clean_up_tokenization_spaces=False,
            bos_token=piece(self.bos_id),
            eos_token=piece(self.eos_id),
            unk_token=piece(self._processor.unk_id()),
        )


# What a Hugging Face checkpoint's tokenizer may consist of; all that is there is kept for the way
# back.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
# ours: BOS and EOS, which some checkpoints have in config.json only
SPECIAL_IDS = "special_ids.json"


class HuggingFaceTokenizer:
    """A tokenizer.json, or byte-level BPE's vocab.json and merges.txt (Radford et al. 2019, section
    2.2), by the `tokenizers` library.

    A tokenizer without BOS takes EOS for it: what separates documents is what comes before the
    first one.

    Args:
      files: name -> contents, of `FILES`.
      config: the checkpoint's config.json.

    Raises:
      ValueError: files that the library can't read; no EOS.
    """

    def __init__(self, files: Mapping[str, bytes], config: Mapping, name: str = "the tokenizer"):
        self.files = dict(files)
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{name} needs the package tokenizers: pip install 'lm[hf]'") from None
        try:
            about = {
                **config,
                **_json(files, "special_tokens_map.json"),
                **_json(files, "tokenizer_config.json"),
                **_json(files, SPECIAL_IDS),
            }
            if "tokenizer.json" in files:
                self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
            else:
                self._tokenizer = _byte_level(tokenizers, files, about)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{name} can't be read: {str(error).splitlines()[0]}") from None
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1

        def special(kind: str) -> list[int]:
            token = about.get(f"{kind}_token")
            named = ids.get(token.get("content") if isinstance(token, dict) else token)
            listed = [
                about.get(f"{kind}_token_id"),
                _json(files, "generation_config.json").get(f"{kind}_token_id"),
            ]
            flat = [named] + [
                i for group in listed for i in (group if isinstance(group, list) else [group])
            ]
            return list(dict.fromkeys(i for i in flat if i is not None))

        self.stop_ids = tuple(special("eos"))
        if not self.stop_ids:
            raise ValueError(
                f"{name} has no EOS: wanted eos_token in tokenizer_config.json, one that is in "
                "the vocabulary, or eos_token_id in config.json"
            )
        self.eos_id = self.stop_ids[0]
        self.bos_id = (special("bos") or self.stop_ids)[0]
        digest = hashlib.sha256(
            b"".join(files[n] for n in ("tokenizer.json", "vocab.json", "merges.txt") if n in files)
        )
        self.fingerprint = f"tokenizers-{digest.hexdigest()[:16]}-{self.bos_id}-{self.eos_id}"
        self.files[SPECIAL_IDS] = json.dumps(
            dict(bos_token_id=self.bos_id, eos_token_id=self.stop_ids)
        ).encode()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            found.ids
            for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def prompt(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids or [self.bos_id]  # BOS where tokenizer.json says so

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, directory: epath.Path) -> None:
        for name, content in self.files.items():
            (directory / name).write_bytes(content)


def _json(files: Mapping[str, bytes], name: str) -> dict:
    return json.loads(files.get(name, b"{}"))


def _byte_level(tokenizers, files: Mapping[str, bytes], about: Mapping):
    """GPT-2's kind of tokenizer out of vocab.json and merges.txt."""
    vocab = json.loads(files["vocab.json"])
    lines = files["merges.txt"].decode().split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=bool(about.get("add_prefix_space", False))
    )
    found.decoder = tokenizers.decoders.ByteLevel()
    added = sorted(_json(files, "added_tokens.json").items(), key=lambda item: item[1])
    special = [
        t.get("content") if isinstance(t, dict) else t
        for t in (about.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad"))
        if t
    ]
    found.add_special_tokens(
        [t for t in [*special, "<|endoftext|>"] if t in vocab] + [name for name, _ in added]
    )
    return found


def load(path: str | epath.Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model file, or of a directory: one that `save` wrote, or a
    Hugging Face checkpoint.

    Raises:
      ValueError: there is none, or it can't be read.
    """
    path = epath.Path(path)
    if (path / "tokenizer.bytes").exists():
        return ByteTokenizer()
    files = {
        name: (path / name).read_bytes() for name in (*FILES, SPECIAL_IDS) if (path / name).exists()
    }
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= set(files):
        config = path / "config.json"
        return HuggingFaceTokenizer(
            files, json.loads(config.read_text()) if config.exists() else {}, str(path)
        )
    model = path / "tokenizer.model" if "tokenizer.model" in files else path
    if model.is_dir() or not model.exists():
        raise ValueError(
            f"no tokenizer at {path}: wanted a SentencePiece model file, or a directory with "
            "tokenizer.model, tokenizer.json, or vocab.json and merges.txt in it"
        )
    return SentencePieceTokenizer(model.read_bytes(), str(model), files)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, cache: epath.Path
) -> SentencePieceTokenizer:
    """A byte-pair model with byte fallback of `texts`, kept at `cache` and read from there the next
    time.

    Text comes back unchanged: no normalisation, runs of spaces kept, a piece for the newline, bytes
    for what is rare. (The one exception is U+2581, SentencePiece's own sign for the space.) Pieces
    never cross a newline.

    Raises:
      ValueError: the texts are too few for the size.
    """
    if not cache.exists():
        lines = (line for text in texts for line in text.split("\n") if line)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n"],
                character_coverage=0.9999,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                max_sentence_length=1 << 20,
                num_threads=1,  # the model file records it: one setting, one fingerprint
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"config.tokenizer.vocab_size = {vocab_size}: SentencePiece can't train that on "
                f"this text: {error}"
            ) from None
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.parent / f"{cache.name}.{os.getpid()}"
        partial.write_bytes(model.getvalue())
        partial.replace(cache)
    return load(cache)
