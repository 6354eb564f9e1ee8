"""Tokenizers behind one protocol: SentencePiece (trained here, or a given model), those of Hugging
Face checkpoints, and plain bytes.

Policy: a tokenizer never adds special ids by itself. `lm.data.pack` puts one BOS before a document
and one EOS after it.
"""

import io
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import sentencepiece
from etils import epath

from lm import files
from lm.files import short_hash

# What a Hugging Face checkpoint's tokenizer may consist of. All that is present is kept, so that
# an export has it again.
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
MAX_FILE_BYTES = 2**28  # of each of them
# A file of lm's own: BOS and EOS, which some checkpoints have in config.json only.
SPECIAL_IDS = "special_ids.json"
# Another one, by which `load` knows a directory that `ByteTokenizer.save` wrote.
BYTES_MARKER = "tokenizer.bytes"


class Tokenizer(Protocol):
    """What the rest of lm knows of a tokenizer.

    Attributes:
      vocab_size: number of ids, the special ones included.
      stop_ids: EOS, and whatever else ends a generated text.
      fingerprint: names the exact mapping.
      files: name -> content, of a Hugging Face checkpoint; else empty.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    fingerprint: str
    files: Mapping[str, bytes]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special ones."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns what `encode` returns for each text, using all cores."""

    def prompt(self, text: str) -> list[int]:
        """Returns the ids of a text to be continued, with what stands before it; never empty."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, leaving special ones out."""

    def save(self, directory: epath.Path) -> None:
        """Writes files that `load` reads, and transformers too."""


def prefix_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Returns the ids that stand before `ids`, those of a text that a model is asked about.

    That is BOS. Some tokenizers of Hugging Face checkpoints add none to a prompt; with them it is
    BOS only where `ids` is empty, since a model needs at least one id.
    """
    if not len(ids):
        return [tokenizer.bos_id]
    adds_bos = tokenizer.prompt("a") != tokenizer.encode("a")
    return [tokenizer.bos_id] if adds_bos else []


def load(path: str | epath.Path) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece model file, or of a directory.

    Args:
      path: a directory is one that `save` wrote, or a Hugging Face checkpoint.

    Raises:
      ValueError: there is none, or it can't be read.
    """
    path = epath.Path(path)
    if (path / BYTES_MARKER).exists():
        return ByteTokenizer()

    contents = {}
    for name in (*FILES, SPECIAL_IDS):
        if (path / name).exists():
            contents[name] = _read(path / name)

    # A tokenizer.json is preferred to a tokenizer.model, as in transformers.
    if "tokenizer.json" in contents or {"vocab.json", "merges.txt"} <= set(contents):
        config = path / "config.json"
        model_config = files.read_json(config) if config.exists() else {}
        return HuggingFaceTokenizer(contents, model_config, str(path))

    model = path / "tokenizer.model" if "tokenizer.model" in contents else path
    if model.is_dir() or not model.exists():
        raise ValueError(
            f"no tokenizer at {path}: wanted a SentencePiece model file, or a directory with "
            "tokenizer.model, tokenizer.json, or vocab.json and merges.txt in it"
        )
    return SentencePieceTokenizer(_read(model), str(model), contents)


def _read(path: epath.Path) -> bytes:
    """The content of a tokenizer's file. Raises ValueError for one too large to be one."""
    files.check_plain(path)
    if path.stat().length > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().length} bytes; a tokenizer has fewer")
    return path.read_bytes()


def parse_json(contents: Mapping[str, bytes], name: str) -> dict:
    """Returns the object in the JSON file `name`; {} if there is no such file.

    Raises:
      ValueError: see `lm.files.parse_json`.
    """
    return files.parse_json(contents.get(name, b"{}"), name)


def token_text(token):
    """Returns a special token's text: tokenizer_config.json has it as it is, or as an object."""
    return token.get("content") if isinstance(token, dict) else token


# --- bytes ---


class ByteTokenizer:
    """UTF-8 bytes as they are (ids 0 to 255), BOS 256, EOS 257."""

    vocab_size = 258
    bos_id = 256
    eos_id = 257
    stop_ids = (257,)
    fingerprint = "bytes-1"
    files = {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def prompt(self, text: str) -> list[int]:
        return [self.bos_id] + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # Ids need not be valid UTF-8: a sampled text may end within a character.
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, directory: epath.Path) -> None:
        files.write_whole(directory / BYTES_MARKER, self.fingerprint)
        for name, content in self._for_transformers().items():
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            files.write_whole(directory / name, text)

    def _for_transformers(self) -> dict[str, dict]:
        """Files with which transformers gives the same ids: byte-level BPE without merges.

        The exception is a text that spells out <s> or </s>.
        """
        special = {"<s>": self.bos_id, "</s>": self.eos_id}

        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        by_byte = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        tokenizer = dict(
            version="1.0",
            added_tokens=[dict(id=i, content=token, **flags) for token, i in special.items()],
            pre_tokenizer=by_byte,
            decoder=by_byte,
            model=dict(type="BPE", vocab=_gpt2_spelling() | special, merges=[]),
        )
        config = dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token="<s>",
            eos_token="</s>",
            clean_up_tokenization_spaces=False,
        )
        return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _gpt2_spelling() -> dict[str, int]:
    """{character: byte} as GPT-2's vocabulary has it.

    Printable bytes are spelt as themselves. The others (spaces, control characters) take the
    characters from U+0100 on, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spelling = {}
    next_other = 256
    for byte in range(256):
        if byte in printable:
            spelling[chr(byte)] = byte
        else:
            spelling[chr(next_other)] = byte
            next_other += 1
    return spelling


# --- SentencePiece ---

SPACE_SIGN = "\u2581"  # what SentencePiece writes for a space in its pieces
UNKNOWN_SIGN = "\u2585"  # its trainer leaves out lines that have it
RARE = 10_000  # one character in so many is spelt in bytes, the rarest ones
# Its trainer ends the process at a longer word, and leaves out lines of more than
# MAX_LINE_BYTES. No character has more than 4 bytes.
MAX_LINE_CHARS = 2**16 - 1
MAX_LINE_BYTES = 2**20


class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226), with its own BOS and EOS.

    Args:
      model: content of the model file.
      name: what errors call it.
      files: what else a Hugging Face checkpoint has for it; kept for an export.

    Raises:
      ValueError: no such model, or one without BOS or EOS.
    """

    def __init__(
        self, model: bytes, name: str = "the model", files: Mapping[str, bytes] | None = None
    ):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model: {error}") from None

        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{name} has no BOS or EOS piece (ids {self.bos_id}, {self.eos_id}); train it "
                "with bos_id and eos_id >= 0"
            )

        self.stop_ids = (self.eos_id,)
        self.fingerprint = "sentencepiece-" + short_hash(model)
        self.files = files or {}
        self._model = model
        self._sign_ids = self._bytes_of_the_sign()

    def encode(self, text: str) -> list[int]:
        if not self._sign_ids or SPACE_SIGN not in text:
            return self._processor.encode(text)

        # The model would take the sign for a space: it is spelt in bytes, between the rest.
        first, *others = self._processor.encode(text.split(SPACE_SIGN))
        ids = list(first)
        for other in others:
            ids += self._sign_ids + other
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(SPACE_SIGN in text for text in texts):
            return [self.encode(text) for text in texts]
        return self._processor.encode(list(texts))

    def prompt(self, text: str) -> list[int]:
        return [self.bos_id] + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(map(int, ids)))

    def save(self, directory: epath.Path) -> None:
        config = json.dumps(self._for_transformers(), indent=2).encode() + b"\n"
        # A checkpoint's own tokenizer_config.json takes the place of this one.
        contents = {"tokenizer_config.json": config} | dict(self.files)
        contents["tokenizer.model"] = self._model
        for name, content in contents.items():
            files.write_whole(directory / name, content)

    def _for_transformers(self) -> dict:
        """A tokenizer_config.json with which transformers gives the same ids.

        The exception is a text that spells out special tokens.
        """
        return dict(
            tokenizer_class="LlamaTokenizer",
            legacy=False,
            add_bos_token=False,
            add_eos_token=False,
            add_prefix_space=False,
            clean_up_tokenization_spaces=False,
            bos_token=self._piece(self.bos_id),
            eos_token=self._piece(self.eos_id),
            unk_token=self._piece(self._processor.unk_id()),
        )

    def _bytes_of_the_sign(self) -> list[int]:
        """The ids of the bytes of U+2581; [] in a model where they can't stand for it.

        They can't where a text gets a space in front, or loses one.
        """
        pieces = [f"<0x{byte:02X}>" for byte in SPACE_SIGN.encode()]
        ids = [self._processor.piece_to_id(piece) for piece in pieces]
        if not all(map(self._processor.is_byte, ids)):
            return []
        around = self._processor.encode(["a", " a"])
        decoded = self._processor.decode(around[0] + ids + around[1])
        return ids if decoded == f"a{SPACE_SIGN} a" else []

    def _piece(self, piece_id: int) -> str | None:
        """The text of a piece; SentencePiece gives -1 for the id of one that a model lacks."""
        return self._processor.id_to_piece(piece_id) if piece_id >= 0 else None


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, cache: epath.Path
) -> SentencePieceTokenizer:
    """Returns a byte-pair model with byte fallback of `texts`.

    Text comes back unchanged: no normalisation, runs of spaces kept, pieces for the space and the
    newline in any corpus, bytes for what is rare. Pieces never cross a newline.

    Args:
      texts: read only if there is nothing at `cache`.
      vocab_size: number of ids, special ones included.
      cache: where the model is kept, with its hash beside it, and read from the next time. One that
        is damaged is trained again.

    Raises:
      ValueError: the texts are too few for the size, or have too many characters for it.
    """
    hash_file = cache.parent / f"{cache.name}.hash"
    if cache.exists():
        model = _read(cache)
        expected = _read(hash_file) if hash_file.exists() else b""
        if short_hash(model).encode() == expected.strip():
            return SentencePieceTokenizer(model, str(cache))
        logging.warning(
            "the cached tokenizer %s is damaged, or has no hash beside it; training it again", cache
        )

    model = _sentencepiece_model(texts, vocab_size)
    # Several processes may train at once: all write the same.
    files.write_whole(cache, model)
    files.write_whole(hash_file, short_hash(model) + "\n")
    return SentencePieceTokenizer(model, str(cache))


def _sentencepiece_model(texts: Iterable[str], vocab_size: int) -> bytes:
    """The model file that SentencePiece's trainer makes of texts."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            # So that decoding gives the text back unchanged.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            character_coverage=1 - 1 / RARE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,  # the model file records it: one setting, one fingerprint
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"config.tokenizer.vocab_size = {vocab_size}: {_advice(str(error))}"
        ) from None
    return model.getvalue()


def _advice(error: str) -> str:
    """What an error of SentencePiece's trainer says, in terms of the configuration."""
    too_small = re.search(r"smaller than required_chars. \d+ vs (\d+)", error)
    if too_small:
        return (
            f"bytes, special ids and this text's characters take {too_small[1]} ids before the "
            "first word has one; set it to several times as many, or take "
            "config.tokenizer.kind=bytes"
        )
    too_large = re.search(r"size too high .* value <= (\d+)", error)
    if too_large:
        return f"this text gives at most {too_large[1]} ids; set it to so many, or take more text"
    return f"SentencePiece can't train that on this text: {error}"


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """What SentencePiece trains on: the lines of texts that have anything in them.

    Where spaces are so rare that the coverage would drop their piece, so many follow that it is
    kept: else the bytes of `SPACE_SIGN` would stand for them.
    """
    num_chars = num_spaces = 0
    for text in texts:
        for line in text.replace(UNKNOWN_SIGN, "\n").split("\n"):
            for part in _cut(line):
                num_chars += len(part)
                num_spaces += part.count(" ")
                yield part

    if num_chars:
        yield from itertools.repeat(" ", num_chars // RARE + 1 - num_spaces)


def _cut(line: str) -> Iterator[str]:
    """A line in parts of at most `MAX_LINE_CHARS`, cut at the end of a word where there is one.

    The trainer counts words, with the spaces in front of them: such a cut changes nothing.
    """
    start = 0
    while len(line) - start > MAX_LINE_CHARS:
        part = line[start : start + MAX_LINE_CHARS]
        words, space, _ = part.rpartition(" ")
        if space and words.strip(" "):
            part = words.rstrip(" ")
        yield part
        start += len(part)
    if start < len(line):
        yield line[start:]


# --- Hugging Face ---


class HuggingFaceTokenizer:
    """A tokenizer.json, or byte-level BPE's vocab.json and merges.txt (Radford et al. 2019, section
    2.2), run by the `tokenizers` library.

    Without BOS, EOS takes its place: it separates documents, so it may also begin one.

    Args:
      files: name -> contents, of `FILES`.
      config: the checkpoint's config.json.
      name: what errors call it.

    Raises:
      ValueError: files that the library can't read; no EOS.
    """

    def __init__(self, files: Mapping[str, bytes], config: Mapping, name: str = "the tokenizer"):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{name} needs the package tokenizers: pip install -e '.[hf]'"
            ) from None
        try:
            # Several files name the special tokens; the later one here wins.
            settings = {
                **config,
                **parse_json(files, "special_tokens_map.json"),
                **parse_json(files, "tokenizer_config.json"),
                **parse_json(files, SPECIAL_IDS),
            }
            if "tokenizer.json" in files:
                _check_text_rules(parse_json(files, "tokenizer.json"))
                self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
            else:
                self._tokenizer = _byte_level_bpe(tokenizers, files, settings)
        except BaseException as error:
            # The library raises bare Exceptions, and panics, which are no Exceptions.
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{name} can't be read: {reason}") from None
        # Settings of whoever saved it, for batches of theirs; transformers drops them too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        # Not their number: ids may have gaps.
        self.vocab_size = max(vocab.values()) + 1

        generation = parse_json(files, "generation_config.json")
        self.stop_ids = tuple(_special_ids("eos", vocab, settings, generation))
        if not self.stop_ids:
            raise ValueError(
                f"{name} has no EOS: wanted eos_token in tokenizer_config.json, one that is in "
                "the vocabulary, or eos_token_id in config.json"
            )
        self.eos_id = self.stop_ids[0]
        bos_ids = _special_ids("bos", vocab, settings, generation)
        self.bos_id = (bos_ids or self.stop_ids)[0]

        mapping = [files.get(n, b"") for n in ("tokenizer.json", "vocab.json", "merges.txt")]
        self.fingerprint = f"tokenizers-{short_hash(b''.join(mapping))}-{self.bos_id}-{self.eos_id}"

        # What `load` is to find again where there is no config.json of the checkpoint's.
        special_ids = dict(bos_token_id=self.bos_id, eos_token_id=self.stop_ids)
        self.files = {**files, SPECIAL_IDS: json.dumps(special_ids).encode()}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def prompt(self, text: str) -> list[int]:
        # tokenizer.json says whether BOS stands before a text.
        return self._tokenizer.encode(text).ids or [self.bos_id]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def save(self, directory: epath.Path) -> None:
        for name, content in self.files.items():
            files.write_whole(directory / name, content)


MAX_EXPANSION = 64
MAX_RULES = 256


def _check_text_rules(settings: Mapping) -> None:
    """Checks that a tokenizer.json's rules take time and memory in proportion to a text.

    Replacements, one after the other, may each make a text longer. A repetition within a repetition
    of a regular expression may be tried in exponentially many ways.

    Raises:
      ValueError: rules that may take more.
    """
    rules = []
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        rules += _flat_rules(settings.get(part))
    if len(rules) > MAX_RULES:
        raise ValueError(f"it has {len(rules)} rules for a text; at most {MAX_RULES} are taken")

    expansion = 1.0
    for rule in rules:
        pattern = rule.get("pattern")
        pattern = pattern if isinstance(pattern, dict) else {}
        if _REPEATED_REPETITION.search(str(pattern.get("Regex", ""))):
            raise ValueError(f"its pattern {pattern['Regex']!r} repeats a repetition")
        # A regular expression may match as little as nothing.
        matched = len(str(pattern.get("String", ""))) or 1
        expansion *= max(1.0, len(str(rule.get("content", ""))) / matched)
    if expansion > MAX_EXPANSION:
        raise ValueError(f"its rules may make a text {expansion:.3g} times as long")


def _flat_rules(rule) -> list[Mapping]:
    """The rules of a sequence of rules, at any depth."""
    if not isinstance(rule, dict):
        return []
    rules = [rule]
    for key in ("normalizers", "pretokenizers", "decoders"):
        inner = rule.get(key)
        for item in inner if isinstance(inner, list) else []:
            rules += _flat_rules(item)
    return rules


# A group that ends in a repetition, or has one before its end, and is repeated: (a+)*, (a*b?)+.
_REPEATED_REPETITION = re.compile(r"[+*}][^()|]*\)[+*{]")


def _special_ids(
    role: str, vocab: Mapping[str, int], settings: Mapping, generation: Mapping
) -> list[int]:
    """Ids that a checkpoint gives a role, the main one first, none twice.

    Args:
      role: "bos" or "eos".
      vocab: text of a token -> its id.
      settings: config.json and the tokenizer's own files, merged.
      generation: generation_config.json, which may list several ids that end a text.
    """
    ids = [vocab.get(token_text(settings.get(f"{role}_token")))]
    for config in (settings, generation):
        entry = config.get(f"{role}_token_id")
        ids.extend(entry if isinstance(entry, list) else [entry])
    # A dict keeps the order, which a set would not.
    return list(dict.fromkeys(i for i in ids if i is not None))


def _byte_level_bpe(tokenizers, files: Mapping[str, bytes], settings: Mapping):
    """A tokenizer of the library's, as GPT-2's, out of vocab.json and merges.txt."""
    vocab = parse_json(files, "vocab.json")
    merges = []
    for line in files["merges.txt"].decode().split("\n"):
        if line and not line.startswith("#version"):
            merges.append(tuple(line.split(" ")))

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space", False))
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()

    special = []
    for role in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{role}_token")
        if token:
            special.append(token_text(token))
    special.append("<|endoftext|>")

    # Tokens that are not in the vocabulary get the next ids, in the order in which they are added.
    added = parse_json(files, "added_tokens.json")
    tokenizer.add_special_tokens(
        [token for token in special if token in vocab] + sorted(added, key=added.get)
    )
    return tokenizer
