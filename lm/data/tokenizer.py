"""Tokenizers behind one protocol: SentencePiece (trained here, or a given model file), those of
Hugging Face checkpoints, and plain bytes.

Policy: a tokenizer never adds special ids by itself. `around` says what `lm.data.pack` puts before
and after a document.
"""

import copy
import functools
import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import sentencepiece
from etils import epath

from lm import files
from lm.data import roles as roles_lib
from lm.data import tokenizer_files
from lm.data.roles import Roles
from lm.data.tokenizer_files import FILES, SPECIAL_IDS, parse_json
from lm.files import short_hash

MAX_FILE_BYTES = 2**28  # of each of them
# A file by which `load` knows a directory that `ByteTokenizer.save` wrote.
BYTES_MARKER = "tokenizer.bytes"
BYTES_NAME = "bytes-1"


class Tokenizer(Protocol):
    """What the rest of lm knows of a tokenizer.

    Attributes:
      vocab_size: number of ids, the special ones included.
      stop_ids: EOS, and whatever else ends a generated text.
      roles: name -> ids, of those of `lm.data.roles.ROLES` that it has.
      special: text -> id, of the tokens that no text is to have.
      around: ids before a document, and ids after it. They are BOS and EOS; of BERT's and its
        like, [CLS] and [SEP].
      fingerprint: names the exact mapping.
      texts_as: the fingerprint of the tokenizer that it was before roles were reserved, which gives
        texts the same ids; "" where none were.
      files: name -> content, of a Hugging Face checkpoint; else a chat template at most.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    roles: Mapping[str, tuple[int, ...]]
    special: Mapping[str, int]
    around: tuple[tuple[int, ...], tuple[int, ...]]
    fingerprint: str
    texts_as: str
    files: Mapping[str, bytes]

    def role(self, name: str) -> int:
        """Returns the id of a role. Raises ValueError, by name, where there is none."""

    def role_ids(self, name: str) -> tuple[int, ...]:
        """Returns the ids of a role. Raises ValueError, by name, where there are none."""

    def reserving(self, reserve: str) -> "Tokenizer":
        """Returns a tokenizer of the same ids, with new ones behind them for the roles that it
        lacks of `reserve`, see `lm.data.roles.parse`. No text has them.

        Raises:
          ValueError: no such roles, or a tokenizer that stays as it is.
        """

    def with_chat_template(self, template: str) -> "Tokenizer":
        """Returns the tokenizer with another chat template."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special ones."""

    def encode_between(self, before: str, text: str, after: str) -> list[int]:
        """Returns the ids of a text between two special tokens; "" where there is none."""

    def encode_literally(self, text: str) -> list[int]:
        """Returns the ids of a text in which special tokens that are spelt out are text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns what `encode` returns for each text, using all cores."""

    def prompt(self, text: str) -> list[int]:
        """Returns the ids of a text with what its own files put around it; never empty.

        That is BOS before a text to be continued; [CLS] and [SEP] around BERT's, EOS behind T5's.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, leaving special ones out."""

    def spell(self, ids: Sequence[int]) -> str:
        """Returns the text of ids with special ones spelt out, for people to read."""

    def save(self, directory: epath.Path) -> None:
        """Writes files that `load` reads, and transformers too."""


CHAT_TEMPLATE = "chat_template.jinja"


class OwnTokenizer(Roles):
    """What the tokenizers that are made here have in common: special tokens are in no text."""

    files: Mapping[str, bytes] = {}

    def with_chat_template(self, template: str) -> "OwnTokenizer":
        changed = copy.copy(self)
        changed.files = {CHAT_TEMPLATE: template.encode()}
        return changed

    def encode_between(self, before: str, text: str, after: str) -> list[int]:
        return self.encode(text)

    def encode_literally(self, text: str) -> list[int]:
        return self.encode(text)

    def _save_chat_template(self, directory: epath.Path) -> None:
        for name, content in self.files.items():
            files.write_whole(directory / name, content)


def _spell(tokenizer: Tokenizer, ids: Sequence[int], special: Mapping[int, str]) -> str:
    """`Tokenizer.spell` for one whose special ids are spelt so."""
    text = ""
    for name, group in itertools.groupby(map(int, ids), special.get):
        members = list(group)
        text += name * len(members) if name else tokenizer.decode(members)
    return text


def prefix_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Returns the ids that stand before `ids`, those of a text that a model is asked about.

    That is BOS. Some tokenizers of Hugging Face checkpoints add none to a prompt; with them it is
    BOS only where `ids` is empty, since a model needs at least one id.
    """
    if not len(ids):
        return [tokenizer.bos_id]
    prompt = tokenizer.prompt("a")
    adds_bos = prompt != tokenizer.encode("a") and prompt[0] == tokenizer.bos_id
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
        tokenizer = _load_bytes(path / BYTES_MARKER)
        return _with_template_in(path, tokenizer)

    contents = {}
    for name in (*FILES, SPECIAL_IDS):
        if (path / name).exists():
            contents[name] = _read(path / name)
    config = path / "config.json"
    model_config = files.read_json(config) if config.exists() else {}

    # A tokenizer.json is preferred to the other forms, as in transformers.
    forms = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"vocab.txt"}, {"spiece.model"})
    if any(form <= set(contents) for form in forms):
        return HuggingFaceTokenizer(contents, model_config, str(path))
    if "tokenizer.model" in contents:
        if _is_own(contents, model_config):
            model = contents["tokenizer.model"]
            tokenizer = SentencePieceTokenizer(model, str(path / "tokenizer.model"))
            return _with_template_in(path, tokenizer)
        return HuggingFaceTokenizer(contents, model_config, str(path))

    for name, form in tokenizer_files.FOREIGN.items():
        if (path / name).exists():
            raise ValueError(
                f"{path / name} is {form}, which lm doesn't read; "
                + tokenizer_files.mending(str(path))
            )
    if path.is_dir() or not path.exists():
        raise ValueError(
            f"no tokenizer at {path}: wanted a SentencePiece model file, or a directory with "
            "tokenizer.model, tokenizer.json, vocab.json and merges.txt, vocab.txt, or "
            "spiece.model in it"
        )
    return SentencePieceTokenizer(_read(path), str(path))


def _with_template_in(directory: epath.Path, tokenizer: OwnTokenizer) -> OwnTokenizer:
    """The tokenizer with the chat template of its directory, where there is one."""
    if not (directory / CHAT_TEMPLATE).exists():
        return tokenizer
    content = _read(directory / CHAT_TEMPLATE)
    return tokenizer.with_chat_template(content.decode("utf-8", errors="replace"))


def _is_own(contents: Mapping[str, bytes], model_config: Mapping) -> bool:
    """Whether a directory's SentencePiece model is lm's own, or the only file, and no checkpoint's.

    lm's own takes special tokens in a text for text, wherever it came from.
    """
    others = set(contents) - {"tokenizer.model", CHAT_TEMPLATE}
    if others != {"tokenizer_config.json"}:
        return not (others or model_config)
    ours = _for_transformers(_processor(contents["tokenizer.model"], "tokenizer.model"))
    # What earlier versions wrote.
    without_roles = {key: value for key, value in ours.items() if key not in _ROLE_KEYS}
    return parse_json(contents, "tokenizer_config.json") in (ours, without_roles)


def _read(path: epath.Path) -> bytes:
    """The content of a tokenizer's file. Raises ValueError for one too large to be one."""
    files.check_plain(path)
    if path.stat().length > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().length} bytes; a tokenizer has fewer")
    return path.read_bytes()


# --- bytes ---


class ByteTokenizer(OwnTokenizer):
    """UTF-8 bytes as they are (ids 0 to 255), BOS 256, EOS 257, then those of reserved roles.

    Args:
      reserve: see `lm.data.roles.parse`.

    Raises:
      ValueError: see there.
    """

    bos_id = 256
    eos_id = 257
    around = ((256,), (257,))

    def __init__(self, reserve: str = ""):
        self._reserve = reserve
        self._special = {self.bos_id: "<s>", self.eos_id: "</s>"}
        self.roles = {"bos": (self.bos_id,), "eos": (self.eos_id,)}
        for name, texts in roles_lib.parse(reserve).items():
            first = 256 + len(self._special)
            self.roles[name] = tuple(range(first, first + len(texts)))
            self._special.update(zip(self.roles[name], texts))

        self.special = {text: i for i, text in self._special.items()}
        self.vocab_size = 256 + len(self._special)
        self.stop_ids = _stop_ids(self)
        self.fingerprint = f"{BYTES_NAME}+{reserve}" if reserve else BYTES_NAME

    def reserving(self, reserve: str) -> "ByteTokenizer":
        lacking = roles_lib.lacking(reserve, self.roles)
        return ByteTokenizer(",".join(filter(None, [self._reserve, lacking])))

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def prompt(self, text: str) -> list[int]:
        return [self.bos_id] + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # Ids need not be valid UTF-8: a sampled text may end within a character.
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def spell(self, ids: Sequence[int]) -> str:
        return _spell(self, ids, self._special)

    def save(self, directory: epath.Path) -> None:
        files.write_whole(directory / BYTES_MARKER, self.fingerprint)
        self._save_chat_template(directory)
        for name, content in self._for_transformers().items():
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            files.write_whole(directory / name, text)

    def _for_transformers(self) -> dict[str, dict]:
        """Files with which transformers gives the ids of a prompt: byte-level BPE without merges,
        behind BOS.

        The exception is a text that spells out a special token.
        """
        special = self.special
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        by_byte = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        tokenizer = dict(
            version="1.0",
            added_tokens=[dict(id=i, content=token, **flags) for token, i in special.items()],
            pre_tokenizer=by_byte,
            decoder=by_byte,
            post_processor=_bos_first(special["<s>"]),
            model=dict(type="BPE", vocab=_gpt2_spelling() | special, merges=[]),
        )
        config = dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token="<s>",
            eos_token="</s>",
            clean_up_tokenization_spaces=False,
            **_named_roles(self.roles, self._special.__getitem__),
        )
        others = [text for text in special if text not in config.values()]
        if others:
            config["additional_special_tokens"] = others
        return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _bos_first(bos_id: int) -> dict:
    """What a tokenizer.json says of BOS before a text, and before the first of two."""
    bos = dict(SpecialToken=dict(id="<s>", type_id=0))
    first, second = dict(Sequence=dict(id="A", type_id=0)), dict(Sequence=dict(id="B", type_id=0))
    return dict(
        type="TemplateProcessing",
        single=[bos, first],
        pair=[bos, first, second],
        special_tokens={"<s>": dict(id="<s>", ids=[bos_id], tokens=["<s>"])},
    )


def _load_bytes(marker: epath.Path) -> ByteTokenizer:
    """The tokenizer whose fingerprint a file holds. Raises ValueError if it holds none."""
    text = _read(marker).decode("utf-8", errors="replace").strip()
    name, _, reserve = text.partition("+")
    try:
        if name != BYTES_NAME:
            raise ValueError
        return ByteTokenizer(reserve)
    except ValueError:
        raise ValueError(
            f"{marker} says {text[:80]!r}; wanted {BYTES_NAME}, or that, + and roles"
        ) from None


def _stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """EOS and, where turns are reserved, what ends one."""
    return (tokenizer.eos_id, *tokenizer.roles.get("turns", ())[1:2])


# Of the roles that are reserved, those that tokenizer_config.json has a key for.
_ROLE_KEYS = ("pad_token", "mask_token", "cls_token", "sep_token")


def _named_roles(roles: Mapping[str, tuple[int, ...]], spell: Callable[[int], str]) -> dict:
    """What tokenizer_config.json says of roles: key -> text."""
    named = {}
    for key in _ROLE_KEYS:
        for role_id in roles.get(key.removesuffix("_token"), ()):
            named[key] = spell(role_id)
    return named


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


class SentencePieceTokenizer(OwnTokenizer):
    """A SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226), with its own BOS and EOS.

    The tokens of its other roles are control pieces, which no text has.

    Args:
      model: content of the model file.
      name: what errors call it.

    Raises:
      ValueError: no such model, or one without BOS or EOS.
    """

    def __init__(self, model: bytes, name: str = "the model"):
        self._processor = _processor(model, name)
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{name} has no BOS or EOS piece (ids {self.bos_id}, {self.eos_id}); train it "
                "with bos_id and eos_id >= 0"
            )

        self.roles = _roles_of_pieces(self._processor)
        self.special = {}
        for role_id in (self.bos_id, self.eos_id):
            self.special[self._processor.id_to_piece(role_id)] = role_id
        for role_id in itertools.chain.from_iterable(self.roles.values()):
            if role_id not in self.special.values() and self._processor.is_control(role_id):
                self.special[self._processor.id_to_piece(role_id)] = role_id
        self.around = ((self.bos_id,), (self.eos_id,))
        self.stop_ids = _stop_ids(self)
        self.fingerprint = "sentencepiece-" + short_hash(model)
        self._model = model
        self._name = name
        self._sign_ids = self._bytes_of_the_sign()

    def reserving(self, reserve: str) -> "SentencePieceTokenizer":
        lacking = roles_lib.parse(roles_lib.lacking(reserve, self.roles))
        texts = list(itertools.chain.from_iterable(lacking.values()))
        for text in texts:
            if self._processor.id_to_piece(self._processor.piece_to_id(text)) == text:
                raise ValueError(
                    f"config.tokenizer.reserve = {reserve!r}: {self._name} has {text!r} as a piece "
                    "of texts"
                )
        if not texts:
            return self
        # A list in a protocol buffer may go on behind the rest of the message.
        return SentencePieceTokenizer(self._model + _control_pieces(texts), self._name)

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

    def spell(self, ids: Sequence[int]) -> str:
        return _spell(self, ids, {special_id: text for text, special_id in self.special.items()})

    def save(self, directory: epath.Path) -> None:
        config = json.dumps(_for_transformers(self._processor), indent=2) + "\n"
        files.write_whole(directory / "tokenizer_config.json", config)
        files.write_whole(directory / "tokenizer.model", self._model)
        self._save_chat_template(directory)

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


def _processor(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """What runs a model file. Raises ValueError if it is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"{name} is not a SentencePiece model: {error}") from None


def _roles_of_pieces(
    processor: sentencepiece.SentencePieceProcessor,
) -> dict[str, tuple[int, ...]]:
    """The roles of a model: those that it names itself, and its control pieces."""
    control = {}
    for i in filter(processor.is_control, range(processor.vocab_size())):
        control[processor.id_to_piece(i)] = i
    roles = roles_lib.by_spelling(roles_lib.ROLES, control)
    for name in ("bos", "eos", "unk", "pad"):
        # SentencePiece gives -1 for the id of one that a model lacks.
        if (role_id := getattr(processor, f"{name}_id")()) >= 0:
            roles[name] = (role_id,)
    return roles


def _control_pieces(texts: Sequence[str]) -> bytes:
    """Pieces that no text has, as the end of a model file."""
    from sentencepiece import sentencepiece_model_pb2

    message = sentencepiece_model_pb2.ModelProto
    control = message.SentencePiece.CONTROL
    pieces = [message.SentencePiece(piece=text, score=0, type=control) for text in texts]
    return message(pieces=pieces).SerializeToString()


def _for_transformers(processor: sentencepiece.SentencePieceProcessor) -> dict:
    """A tokenizer_config.json with which transformers gives the ids of a prompt, behind BOS.

    The exceptions are a text that spells out special tokens, and one with `SPACE_SIGN`.
    """
    roles = _roles_of_pieces(processor)
    pieces = {}
    for role in ("bos", "eos", "unk"):
        pieces[f"{role}_token"] = processor.id_to_piece(roles[role][0]) if role in roles else None
    return dict(
        tokenizer_class="LlamaTokenizer",
        legacy=False,
        add_bos_token=True,
        add_eos_token=False,
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        **pieces,
        **_named_roles(roles, processor.id_to_piece),
    )


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

    model = sentencepiece_model(texts, vocab_size)
    # Several processes may train at once: all write the same.
    files.write_whole(cache, model)
    files.write_whole(hash_file, short_hash(model) + "\n")
    return SentencePieceTokenizer(model, str(cache))


def sentencepiece_model(
    texts: Iterable[str],
    vocab_size: int,
    *,
    kind: str = "bpe",
    byte_fallback: bool = True,
    split_digits: bool = False,
    user_symbols: Sequence[str] = (),
) -> bytes:
    """Returns the model file that SentencePiece's trainer makes of texts.

    Args:
      vocab_size: number of ids, special ones included.
      kind: bpe or unigram.
      byte_fallback: characters without a piece are bytes, rather than one unknown id.
      split_digits: each digit is a piece of its own.
      user_symbols: texts that are one piece each, wherever they stand.

    Raises:
      ValueError: see `train_sentencepiece`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=byte_fallback,
            split_digits=split_digits,
            # So that decoding gives the text back unchanged.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", *user_symbols],
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


class HuggingFaceTokenizer(Roles):
    """A checkpoint's tokenizer in any of its forms, run by the `tokenizers` library. See
    `lm.data.tokenizer_files`.

    Without BOS, EOS takes its place: it separates documents, so it may also begin one. Without EOS,
    as in BERT's, [CLS] and [SEP] are both.

    Args:
      files: name -> contents, of `FILES`.
      config: the checkpoint's config.json.
      name: what errors call it.

    Raises:
      ValueError: files that the library can't read; no EOS.
    """

    def __init__(self, files: Mapping[str, bytes], config: Mapping, name: str = "the tokenizer"):
        # What lm kept of a config.json that isn't there any more.
        config = {**parse_json(files, SPECIAL_IDS), **config}
        built = _built(files, config, name)
        self._tokenizer = built.tokenizer
        self._name = name
        # Settings of whoever saved it, for batches of theirs; transformers drops them too.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        # Several files name the special tokens; the later one here wins.
        settings = {
            **config,
            **parse_json(files, "special_tokens_map.json"),
            **parse_json(files, "tokenizer_config.json"),
            **parse_json(files, SPECIAL_IDS),
        }
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        # Not their number: ids may have gaps.
        self.vocab_size = max(vocab.values()) + 1

        self.special = {}
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            if token.special:
                self.special[token.content] = i
        self.roles = _roles_of_checkpoint(built, vocab, self.special)

        generation = parse_json(files, "generation_config.json")
        eos_ids = _special_ids("eos", vocab, settings, generation, built.special)
        bos_ids = _special_ids("bos", vocab, settings, generation, built.special)
        if not eos_ids and "sep" in self.roles:
            eos_ids = self.roles["sep"]
            bos_ids = bos_ids or self.roles.get("cls", ())
        # The files of base models don't say that the end of a turn ends a text.
        ends = self._ends_of_turns(files, settings)
        self.stop_ids = tuple(dict.fromkeys([*eos_ids, *ends]))
        if not self.stop_ids:
            raise ValueError(
                f"{name} has no EOS: wanted eos_token in tokenizer_config.json, one that is in "
                "the vocabulary, or eos_token_id in config.json"
            )
        self.eos_id = self.stop_ids[0]
        self.bos_id = (bos_ids or self.stop_ids)[0]
        self.around = self._around()

        mapping = [files.get(n, b"") for n in ("tokenizer.json", "vocab.json", "merges.txt")]
        self.fingerprint = f"tokenizers-{short_hash(b''.join(mapping))}-{self.bos_id}-{self.eos_id}"
        if built.detail:
            self.fingerprint += f"-{built.detail}"

        # What `load` is to find again where there is no config.json of the checkpoint's.
        kept = dict(bos_token_id=self.bos_id, eos_token_id=self.stop_ids)
        for key in ("model_type", "tokenizer_class"):
            if config.get(key):
                kept[key] = config[key]
        self.files = {**files, SPECIAL_IDS: json.dumps(kept).encode()}

    def _ends_of_turns(self, files: Mapping[str, bytes], settings: Mapping) -> tuple[int, ...]:
        """What ends a turn in the chat template."""
        templates = files.get(CHAT_TEMPLATE, b"").decode("utf-8", errors="replace")
        templates += str(settings.get("chat_template", ""))
        # A tokenizer may have the tokens of several ways to write turns.
        ends = [text for text in roles_lib.ENDS_OF_TURNS if text in templates]
        return tuple(self.special[text] for text in ends if text in self.special)

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """[CLS] and [SEP] if these are what the files put around a text, else BOS and EOS."""
        cls_ids, sep_ids = self.roles.get("cls", ()), self.roles.get("sep", ())
        if cls_ids and sep_ids and self.prompt("a") == [*cls_ids, *self.encode("a"), *sep_ids]:
            return cls_ids, sep_ids
        return (self.bos_id,), (self.eos_id,)

    def reserving(self, reserve: str) -> "HuggingFaceTokenizer":
        present = dict(self.roles)
        # It may have the turns of another template.
        if any(text not in self.special for text in roles_lib.parse(reserve).get("turns", ())):
            present.pop("turns", None)
        lacking = roles_lib.parse(roles_lib.lacking(reserve, present))
        texts = list(itertools.chain.from_iterable(lacking.values()))
        if not texts:
            return self
        if taken := [text for text in texts if text in self._tokenizer.get_vocab()]:
            raise ValueError(
                f"config.tokenizer.reserve = {reserve!r}: {self._name} has {taken} as tokens of "
                "texts"
            )
        enlarged = self._copy()
        enlarged.add_special_tokens(texts)
        contents = {**self.files, "tokenizer.json": enlarged.to_str().encode()}
        return HuggingFaceTokenizer(contents, {}, self._name)

    def with_chat_template(self, template: str) -> "HuggingFaceTokenizer":
        contents = {**self.files, CHAT_TEMPLATE: template.encode()}
        return HuggingFaceTokenizer(contents, {}, self._name)

    def _copy(self):
        return type(self._tokenizer).from_str(self._tokenizer.to_str())

    @functools.cached_property
    def _literal(self):
        """The tokenizer for texts in which special tokens are text."""
        literal = self._copy()
        literal.encode_special_tokens = True
        return literal

    def encode_literally(self, text: str) -> list[int]:
        return self._literal.encode(text, add_special_tokens=False).ids

    def encode_between(self, before: str, text: str, after: str) -> list[int]:
        if self._tokenizer.encode_special_tokens:
            return self.encode(text)  # it takes those around it for text, too
        # Some special tokens take white space with them, and some tokenizers put a space before the
        # first of all texts only.
        ids = self.encode(before + text + after)
        return ids[bool(before) : len(ids) - bool(after)]

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

    def spell(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)

    def save(self, directory: epath.Path) -> None:
        for name, content in self.files.items():
            files.write_whole(directory / name, content)


def _built(files: Mapping[str, bytes], config: Mapping, name: str) -> tokenizer_files.Built:
    """What the `tokenizers` library makes of a checkpoint's files; ValueError if it can't."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{name} needs the package tokenizers: pip install -e '.[hf]'") from None
    try:
        return tokenizer_files.build(tokenizers, files, config, name)
    except BaseException as error:
        # The library raises bare Exceptions, and panics, which are no Exceptions.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} can't be read: {reason}") from None


def _roles_of_checkpoint(
    built: tokenizer_files.Built, vocab: Mapping[str, int], special: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The roles that a checkpoint's files name, and special tokens that are spelt like others.

    Args:
      vocab, special: text of a token -> its id, of all and of special ones.
    """
    roles = {}
    for name in roles_lib.ROLES:
        text = built.special.get(f"{name}_token")
        if text in vocab:
            roles[name] = (vocab[text],)

    unnamed = roles_lib.ROLES.keys() - roles.keys() - set(roles_lib.NAMED)
    return roles | roles_lib.by_spelling(unnamed, special)


def _special_ids(
    role: str,
    vocab: Mapping[str, int],
    settings: Mapping,
    generation: Mapping,
    special: Mapping[str, str],
) -> list[int]:
    """Ids that a checkpoint gives a role, the main one first, none twice.

    Args:
      role: "bos" or "eos".
      vocab: text of a token -> its id.
      settings: config.json and the tokenizer's own files, merged.
      generation: generation_config.json, which may list several ids that end a text.
      special: the tokenizer's own, which may be its class's defaults.
    """
    ids = [vocab.get(tokenizer_files.token_text(settings.get(f"{role}_token")))]
    for config in (settings, generation):
        entry = config.get(f"{role}_token_id")
        ids.extend(entry if isinstance(entry, list) else [entry])
    ids.append(vocab.get(special.get(f"{role}_token")))
    # A dict keeps the order, which a set would not.
    return list(dict.fromkeys(i for i in ids if i is not None))
