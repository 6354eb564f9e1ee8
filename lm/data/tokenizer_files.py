"""The tokenizer that the files of a Hugging Face checkpoint describe, with the ids that
transformers' AutoTokenizer gives.

A checkpoint has its tokenizer in one of five forms: a tokenizer.json, a SentencePiece
tokenizer.model, byte-pair encoding's vocab.json and merges.txt, WordPiece's vocab.txt, or T5's
Unigram spiece.model. All of them become a tokenizer of the `tokenizers` library. Around them stand
files that name special tokens, and the name of a class of transformers. A class has rules of its
own, which take the place of those in tokenizer.json.

A new form or class is a row of `_CLASSES`, and a branch of `_from_vocabulary`. Others are refused
by name (`FOREIGN`).
"""

import base64
import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm import files as files_lib
from lm.files import short_hash

# What a checkpoint's tokenizer may consist of. All that is present is kept, so that an export has
# it again.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
# A file of lm's own: what a tokenizer needs of config.json, which isn't kept beside it.
SPECIAL_IDS = "special_ids.json"
# What isn't read: file -> its form.
FOREIGN = {
    "sentencepiece.bpe.model": "a SentencePiece model in fairseq's order of ids",
    "spm.model": "a SentencePiece model of DeBERTa's",
    "tekken.json": "Mistral's own format",
    "tiktoken.model": "tiktoken's format",
}


def parse_json(files: Mapping[str, bytes], name: str) -> dict:
    """Returns the object in the JSON file `name`; {} if there is no such file.

    Raises:
      ValueError: see `lm.files.parse_json`.
    """
    return files_lib.parse_json(files.get(name, b"{}"), name)


def token_text(token):
    """Returns a special token's text: tokenizer_config.json has it as it is, or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def mending(directory: str) -> str:
    """Returns what a refusal ends with: the command that writes a tokenizer.json for lm."""
    code = (
        "from transformers import AutoTokenizer as A; "
        f"A.from_pretrained({directory!r}).save_pretrained({directory!r})"
    )
    return f"this command writes a tokenizer.json that lm reads: python -c {shlex.quote(code)}"


# --- classes ---

BACKEND = "TokenizersBackend"  # transformers' name for: the rules of the file itself
GENERIC = (BACKEND, "PreTrainedTokenizer", "PythonBackend", "BloomTokenizer")


@dataclasses.dataclass(frozen=True)
class _Class:
    """How transformers builds a class of tokenizers.

    Attributes:
      form: the file that holds the vocabulary where there is no tokenizer.json or tokenizer.model.
      special: special tokens that no file need name.
      rules: settings -> normalizer, pre_tokenizer and decoder, as a tokenizer.json has them.
      model: settings of the model: byte-pair encoding's, WordPiece's or Unigram's.
      around: roles of what stands before and behind every text, whatever a file says; "": nothing.
    """

    form: str
    special: Mapping[str, str]
    rules: Callable[[Mapping[str, Any]], dict]
    model: Mapping[str, Any]
    around: tuple[str, ...] = ()


def _byte_level(settings: Mapping[str, Any], **fields) -> dict:
    add_space = bool(settings.get("add_prefix_space"))
    return dict(type="ByteLevel", add_prefix_space=add_space, trim_offsets=True) | fields


_DECODER = dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True)


def _gpt2(settings: Mapping[str, Any]) -> dict:
    pre_tokenizer = _byte_level(settings, use_regex=True)
    return dict(normalizer=None, pre_tokenizer=pre_tokenizer, decoder=_DECODER)


def _gpt_neox(settings: Mapping[str, Any]) -> dict:
    return _gpt2(settings) | dict(normalizer=dict(type="NFC"))


_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen2(settings: Mapping[str, Any]) -> dict:
    split = dict(type="Split", pattern=dict(Regex=_QWEN2_PATTERN), behavior="Isolated")
    parts = [split | dict(invert=False), _byte_level(settings, use_regex=False)]
    return dict(
        normalizer=dict(type="NFC"),
        pre_tokenizer=dict(type="Sequence", pretokenizers=parts),
        decoder=_DECODER,
    )


def _openai_gpt(settings: Mapping[str, Any]) -> dict:
    del settings  # it has none
    normalizer = dict(clean_text=True, handle_chinese_chars=True, strip_accents=None)
    return dict(
        normalizer=dict(type="BertNormalizer", lowercase=True) | normalizer,
        pre_tokenizer=dict(type="BertPreTokenizer"),
        decoder=dict(type="BPEDecoder", suffix="</w>"),
    )


_SPACE = "\u2581"  # SentencePiece's sign for the space


def _sentencepiece_decoder(*more: dict) -> dict:
    space = dict(type="Replace", pattern=dict(String=_SPACE), content=" ")
    decoders = [space, dict(type="ByteFallback"), dict(type="Fuse"), *more]
    return dict(type="Sequence", decoders=decoders)


def _llama(settings: Mapping[str, Any]) -> dict:
    adds_space = settings.get("add_prefix_space")
    if adds_space is None or adds_space:
        # A legacy one puts a space behind each special token too.
        scheme = "always" if settings.get("legacy") else "first"
        decoder = _sentencepiece_decoder(dict(type="Strip", content=" ", start=1, stop=0))
    else:
        scheme, decoder = "never", _sentencepiece_decoder()
    metaspace = dict(type="Metaspace", replacement=_SPACE, prepend_scheme=scheme, split=False)
    return dict(normalizer=None, pre_tokenizer=metaspace, decoder=decoder)


def _bert(settings: Mapping[str, Any]) -> dict:
    normalizer = dict(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    return dict(
        normalizer=dict(type="BertNormalizer") | normalizer,
        pre_tokenizer=dict(type="BertPreTokenizer"),
        decoder=dict(type="WordPiece", prefix="##", cleanup=True),
    )


def _t5(settings: Mapping[str, Any]) -> dict:
    del settings  # it has none
    metaspace = dict(type="Metaspace", replacement=_SPACE, prepend_scheme="always", split=True)
    parts = [dict(type="WhitespaceSplit"), metaspace]
    return dict(
        normalizer=None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=parts),
        decoder=metaspace,
    )


_END = "<|endoftext|>"
_BPE = dict(continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
_CLASSES = {
    "GPT2Tokenizer": _Class(
        "vocab.json", dict(bos_token=_END, eos_token=_END, unk_token=_END), _gpt2, _BPE
    ),
    "GPTNeoXTokenizer": _Class(
        "vocab.json",
        dict(bos_token=_END, eos_token=_END, unk_token=_END, pad_token="<|padding|>"),
        _gpt_neox,
        _BPE,
    ),
    "Qwen2Tokenizer": _Class(
        "vocab.json", dict(eos_token=_END, unk_token=_END, pad_token=_END), _qwen2, _BPE
    ),
    "OpenAIGPTTokenizer": _Class(
        "vocab.json",
        dict(unk_token="<unk>"),
        _openai_gpt,
        _BPE | dict(end_of_word_suffix="</w>", unk_token="<unk>"),
    ),
    "BertTokenizer": _Class(
        "vocab.txt",
        dict(
            unk_token="[UNK]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            cls_token="[CLS]",
            mask_token="[MASK]",
        ),
        _bert,
        dict(unk_token="[UNK]"),
        around=("cls_token", "sep_token"),
    ),
    "RobertaTokenizer": _Class(
        "vocab.json",
        dict(
            bos_token="<s>",
            eos_token="</s>",
            sep_token="</s>",
            cls_token="<s>",
            unk_token="<unk>",
            pad_token="<pad>",
            mask_token="<mask>",
        ),
        _gpt2,
        _BPE,
        around=("cls_token", "sep_token"),
    ),
    "T5Tokenizer": _Class(
        "spiece.model",
        dict(eos_token="</s>", unk_token="<unk>", pad_token="<pad>"),
        _t5,
        dict(unk_id=2, byte_fallback=False),
        around=("", "eos_token"),
    ),
    "LlamaTokenizer": _Class(
        "tokenizer.model",
        dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
        _llama,
        dict(fuse_unk=True, byte_fallback=True),
    ),
}

# BART's is RoBERTa's under another name.
_CLASSES["BartTokenizer"] = _CLASSES["RobertaTokenizer"]

# model_type -> the class that transformers knows it by; where it knows none, or BACKEND, the files
# decide.
_BY_MODEL_TYPE = {
    "gpt2": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
    "starcoder2": "GPT2Tokenizer",
    "jais2": "GPT2Tokenizer",
    "openai-gpt": "OpenAIGPTTokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "bart": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "mistral": BACKEND,
    "mixtral": BACKEND,
    "stablelm": BACKEND,
    "glm": BACKEND,
    "phi3": BACKEND,
    "internlm3": BACKEND,
    "iquestcoder": BACKEND,
    "ernie4_5": BACKEND,
    "gpt_bigcode": BACKEND,
}
# Of these, transformers takes its own class whatever a checkpoint says.
MISNAMED = ("qwen2",)


def tokenizer_class(files: Mapping[str, bytes], config: Mapping) -> str:
    """Returns the name of the class that AutoTokenizer takes, without "Fast".

    Args:
      files: name -> contents, of `FILES`.
      config: the checkpoint's config.json.
    """
    settings = parse_json(files, "tokenizer_config.json")
    # transformers 5 wrote it, with the class's rules in the file.
    if "tokenizer.json" in files and "backend" in settings:
        return BACKEND

    model_type = config.get("model_type")
    registered = _BY_MODEL_TYPE.get(model_type)
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if not declared:
        return registered or BACKEND
    declared = str(declared).removesuffix("Fast")

    if "auto_map" not in settings:
        if registered == BACKEND or model_type in MISNAMED:
            return registered
        # Llama 3's and its like, whose checkpoints are named after the first Llama's class.
        is_byte_level = b'"ByteLevel"' in files.get("tokenizer.json", b"")
        if declared == "LlamaTokenizer" and is_byte_level:
            return BACKEND
    return BACKEND if declared in GENERIC else declared


# --- special and added tokens ---

_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclasses.dataclass
class _Settings:
    """What the files around a vocabulary say.

    Attributes:
      values: tokenizer_config.json, with special_tokens_map.json over it.
      added: tokens that lie outside the vocabulary, or are found in a text before it is split; in
        the order of their ids.
      named: role, such as bos_token -> token.
      extra: special tokens without a role.
    """

    values: dict[str, Any]
    added: list[dict]
    named: dict[str, Any]
    extra: list


def _read_settings(
    files: Mapping[str, bytes], defaults: Mapping[str, str], of_model: Sequence[dict] = ()
) -> _Settings:
    """The settings in a checkpoint's files.

    Args:
      defaults: role -> text, for roles that no file names.
      of_model: tokens that a SentencePiece model names.
    """
    values = parse_json(files, "tokenizer_config.json")
    if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens")

    by_id = values.get("added_tokens_decoder")
    # Newer checkpoints have all in tokenizer_config.json, and the other files go unread.
    if by_id is None:
        special_map = parse_json(files, "special_tokens_map.json")
        for key, value in special_map.items():
            is_token = isinstance(value, dict) and "content" in value
            values[key] = value | dict(special=True) if is_token else value
        by_id = _older_added_tokens(files, values)
    added = [by_id[key] for key in sorted(by_id, key=int)]

    named = {role: values.get(role, defaults.get(role)) for role in _ROLES}
    for key, value in values.items():
        # Settings such as add_bos_token end in _token too.
        if key.endswith("_token") and key not in named and isinstance(token_text(value), str):
            named[key] = value
    if of_model:
        values["additional_special_tokens"] = of_model
    extra = values.get("extra_special_tokens", values.get("additional_special_tokens")) or []
    if isinstance(extra, dict):
        named |= extra
        extra = []

    by_text = {token_text(token): token for token in by_id.values()}
    tokens = {role: by_text.get(token_text(token), token) for role, token in named.items() if token}
    return _Settings(values, added, tokens, list(extra))


def _older_added_tokens(files: Mapping[str, bytes], values: Mapping[str, Any]) -> dict[int, dict]:
    """id -> token, of added_tokens.json and of tokenizer.json."""
    special = [values.get(role) for role in _ROLES] + list(values.get("extra_special_tokens") or [])
    texts = list(map(token_text, special))

    by_id = {}
    for text, index in parse_json(files, "added_tokens.json").items():
        is_special = text in texts
        by_id[index] = dict(content=text, normalized=not is_special, special=is_special)
    for token in parse_json(files, "tokenizer.json").get("added_tokens") or []:
        by_id[token["id"]] = {key: value for key, value in token.items() if key != "id"}
    return by_id


def _add_tokens(library, tokenizer, settings: _Settings, class_name: str) -> None:
    """Adds the tokens that settings name, in transformers' order, which decides their ids."""
    tokens = [_token(library, token) for token in settings.added]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in tokens}
    # The same text with other flags is added again: the later one counts.
    for token in [*settings.named.values(), *settings.extra]:
        if token_text(token) not in known and _token(library, token) not in tokens:
            tokens.append(_token(library, token))

    named = {token_text(token) for token in settings.named.values()}
    added = []
    for token in tokens:
        if isinstance(token, str):
            token = library.AddedToken(token, special=True)
        token.special = token.special or token.content in named
        added.append(token)
    tokenizer.add_tokens(added)

    if class_name == "Qwen2Tokenizer":
        # It forgets whatever else the files say of its special tokens.
        for token in [*settings.named.values(), *settings.extra]:
            tokenizer.add_tokens([library.AddedToken(token_text(token), special=True)])


def _token(library, token: str | dict):
    """A token of the library's; one that is a text stays one."""
    if isinstance(token, str):
        return token
    return library.AddedToken(**{key: value for key, value in token.items() if key != "__type"})


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns bos_token, eos_token and so on, as a chat template may spell them out."""
    config = parse_json(files, SPECIAL_IDS)
    name = tokenizer_class(files, config)
    defaults = {}
    if name in _CLASSES:
        defaults = _CLASSES[name].special
    elif "tokenizer.model" in files and "tokenizer.json" not in files:
        defaults = _read_sentencepiece(files["tokenizer.model"]).special
    named = _read_settings(files, defaults).named
    return {role: token_text(token) for role, token in named.items()}


# --- vocabularies ---


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """A SentencePiece model's pieces.

    Attributes:
      scored: (piece, score), in the order of ids.
      added: control pieces and those that its trainer was told of, as special or added tokens.
      special: its own BOS, EOS and unknown piece.
      proto: the rest.
    """

    scored: list[tuple[str, float]]
    added: list[dict]
    special: dict[str, str]
    proto: Any


MAX_PIECE = 256  # characters of a piece: each split of each piece is looked at


def _read_sentencepiece(content: bytes, name: str = "tokenizer.model") -> _Pieces:
    """The pieces of a model file. Raises ValueError if it is none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    proto = model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        raise ValueError(f"{name} is not a SentencePiece model") from None
    if not proto.pieces or max(len(piece.piece) for piece in proto.pieces) > MAX_PIECE:
        raise ValueError(f"{name} has no pieces, or one of over {MAX_PIECE} characters")

    types = model_pb2.ModelProto.SentencePiece
    added = []
    for piece in proto.pieces:
        if piece.type in (types.CONTROL, types.USER_DEFINED):
            is_special = piece.type == types.CONTROL
            added.append(dict(content=piece.piece, normalized=False, special=is_special))

    spec = proto.trainer_spec
    special = {}
    for role in ("bos", "eos", "unk"):
        if getattr(spec, f"{role}_id") >= 0:
            special[f"{role}_token"] = getattr(spec, f"{role}_piece")
    return _Pieces([(p.piece, p.score) for p in proto.pieces], added, special, proto)


MAX_SENTINELS = 10_000


def _sentinels(settings: Mapping[str, Any]) -> list[str]:
    """T5's sentinels, which stand behind the pieces of its model, the last one first."""
    count = settings.get("extra_ids", 100)
    if type(count) is not int or not 0 <= count <= MAX_SENTINELS:
        raise ValueError(
            f"tokenizer_config.json: extra_ids = {count!r}; wanted 0 to {MAX_SENTINELS}"
        )
    return [f"<extra_id_{i}>" for i in range(count - 1, -1, -1)]


def _merges(pieces: Mapping[str, int]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others; a piece of lower id is made first."""
    merges = []
    for piece in pieces:
        for i in range(1, len(piece)):
            if piece[:i] in pieces and piece[i:] in pieces:
                merges.append((piece[:i], piece[i:]))
    return merges


def _read_merges(content: bytes) -> list[tuple[str, ...]]:
    """The pairs in a merges.txt."""
    merges = []
    for line in content.decode().split("\n"):
        line = line.removesuffix("\r")
        if line and not line.startswith("#version"):
            merges.append(tuple(line.split(" ")))
    return merges


def _with_rules(library, model, rules: Mapping[str, Any]):
    """A tokenizer of the library with rules that are written as in a tokenizer.json."""
    empty = dict(type="BPE", vocab={}, merges=[])
    parts = library.Tokenizer.from_str(json.dumps(dict(version="1.0", model=empty) | rules))
    tokenizer = library.Tokenizer(model)
    for name in rules:
        part = getattr(parts, name)
        if part is not None:
            setattr(tokenizer, name, part)
    return tokenizer


def _of_pieces(library, pieces: _Pieces, vocab: dict, merges: list, added: Mapping[int, str]):
    """What BACKEND makes of a SentencePiece model.

    Args:
      vocab: piece -> id.
      added: id -> text of tokens that take the place of a piece with another text.
    """
    spec = pieces.proto.trainer_spec
    falls_back = spec.byte_fallback
    if spec.model_type == spec.UNIGRAM:
        model = library.models.Unigram(pieces.scored, spec.unk_id, falls_back)
    else:
        texts = {i: piece for piece, i in vocab.items()}
        for i, text in added.items():
            if i in texts and text not in vocab:
                vocab[text] = vocab.pop(texts[i])
        options = dict(unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=falls_back)
        model = library.models.BPE(vocab=vocab, merges=merges, **options)

    decoder = _sentencepiece_decoder()
    if not falls_back:
        decoder = decoder["decoders"][0]
    tokenizer = _with_rules(library, model, dict(decoder=decoder))

    charsmap = pieces.proto.normalizer_spec.precompiled_charsmap
    normalizers = [library.normalizers.Precompiled(charsmap)] if charsmap else []
    normalizers.append(library.normalizers.Replace(" ", _SPACE))
    tokenizer.normalizer = library.normalizers.Sequence(normalizers)
    return tokenizer


# --- the tokenizer ---


@dataclasses.dataclass(frozen=True)
class Built:
    """A checkpoint's tokenizer.

    Attributes:
      tokenizer: of the `tokenizers` library.
      special: bos_token, eos_token and so on -> text.
      detail: names what decides the ids beside tokenizer.json, vocab.json and merges.txt; "" if
        nothing does.
    """

    tokenizer: Any
    special: dict[str, str]
    detail: str


def build(library, files: Mapping[str, bytes], config: Mapping, name: str) -> Built:
    """Returns the tokenizer that files describe.

    Args:
      library: the module `tokenizers`.
      files: name -> contents, of `FILES`; of those with a vocabulary at least one.
      config: the checkpoint's config.json.
      name: its directory.

    Raises:
      ValueError: a class or a form that isn't read here, with the command that mends it.
    """
    class_name = tokenizer_class(files, config)
    if class_name != BACKEND and class_name not in _CLASSES:
        raise ValueError(f"its class {class_name} has rules that lm doesn't know; {mending(name)}")
    if "tokenizer.json" in files:
        return _from_json(library, files, class_name)
    if class_name == BACKEND and "spiece.model" in files:
        raise ValueError(f"spiece.model is of a class that no file names; {mending(name)}")
    return _from_vocabulary(library, files, class_name)


def _from_json(library, files: Mapping[str, bytes], class_name: str) -> Built:
    content = parse_json(files, "tokenizer.json")
    _check_text_rules(content)
    tokenizer = library.Tokenizer.from_buffer(files["tokenizer.json"])
    before = _described(tokenizer)

    known = _CLASSES.get(class_name)
    settings = _read_settings(files, known.special if known else {})
    is_unigram = known and known.form == "spiece.model"
    if is_unigram:
        # transformers makes it anew, whatever its rules are.
        charsmap = next(filter(None, map(_charsmap, _flat_rules(content.get("normalizer")))), b"")
        scored = [tuple(piece) for piece in content["model"]["vocab"]]
        tokenizer = _unigram(library, known, scored, charsmap)
        before = class_name
    elif known and not _has_rules_of(library, content, known, settings):
        post_processor = tokenizer.post_processor
        tokenizer = _rebuilt(library, content["model"], known, settings)
        if post_processor is not None:
            tokenizer.post_processor = post_processor
        before = class_name
    if class_name == "GPTNeoXTokenizer":
        # It never takes BOS from the file.
        tokenizer.post_processor = library.processors.TemplateProcessing(single="$A")
    _add_tokens(library, tokenizer, settings, class_name)
    if known and known.around:
        _set_around(library, tokenizer, known, settings)
    tokenizer.encode_special_tokens = bool(settings.values.get("split_special_tokens"))

    after = _described(tokenizer)
    special = {role: token_text(token) for role, token in settings.named.items()}
    return Built(tokenizer, special, "" if after == before else short_hash(after.encode()))


def _charsmap(rule: Mapping) -> bytes:
    """SentencePiece's table of normalization that a rule has; b"" if it is another rule."""
    if rule.get("type") != "Precompiled":
        return b""
    return base64.b64decode(rule.get("precompiled_charsmap") or "")


def _unigram(library, known: _Class, scored: Sequence[tuple[str, float]], charsmap: bytes):
    """A Unigram tokenizer with the rules of its class, of pieces with their scores."""
    model = library.models.Unigram(list(scored), **known.model)
    tokenizer = _with_rules(library, model, known.rules({}))
    if charsmap:
        tokenizer.normalizer = library.normalizers.Precompiled(charsmap)
    return tokenizer


def _described(tokenizer) -> str:
    """What decides a tokenizer's ids beside its vocabulary: its rules and added tokens."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    parts = [tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.encode_special_tokens]
    return repr([added, *parts])


def _has_rules_of(library, content: Mapping, known: _Class, settings: _Settings) -> bool:
    """Whether a tokenizer.json has the rules and added tokens that its class would give it."""
    model = content.get("model") or {}
    options = dict(fuse_unk=False, byte_fallback=False, ignore_merges=False) | known.model
    options.pop("unk_token", None)
    for key, wanted in options.items():
        if (model.get(key) or wanted.__class__()) != wanted:
            return False

    written = []
    for rules in (content, known.rules(settings.values)):
        parts = {key: rules.get(key) for key in ("normalizer", "pre_tokenizer")}
        tokenizer = _with_rules(library, library.models.BPE(), parts)
        text = json.loads(tokenizer.to_str())
        # It decides no ids.
        written.append(re.sub(r'"trim_offsets": \w+', "", json.dumps([text[p] for p in parts])))
    if written[0] != written[1]:
        return False

    in_file = content.get("added_tokens") or []
    return all(_flags(token) in map(_flags, settings.added) for token in in_file)


def _flags(token: Mapping) -> tuple:
    """What makes two added tokens one."""
    keys = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return tuple(token.get(key) for key in keys)


def _rebuilt(library, model: Mapping, known: _Class, settings: _Settings):
    """A tokenizer of a tokenizer.json's vocabulary with the rules of its class."""
    vocab = model.get("vocab") or {}
    if isinstance(vocab, list):
        vocab = {token_and_score[0]: i for i, token_and_score in enumerate(vocab)}
    merges = []
    for merge in model.get("merges") or []:
        merges.append(tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge))
    model = _model_of(library, known, settings, vocab, merges)
    return _with_rules(library, model, known.rules(settings.values))


def _model_of(library, known: _Class, settings: _Settings, vocab: dict, merges: list):
    """A class's model of a vocabulary: WordPiece's, or byte-pair encoding's."""
    options = dict(known.model)
    if "unk_token" in options:
        unknown = settings.named.get("unk_token", options["unk_token"])
        options["unk_token"] = token_text(unknown)
    if known.form == "vocab.txt":
        return library.models.WordPiece(vocab, **options)
    return library.models.BPE(vocab=vocab, merges=merges, **options)


def _from_vocabulary(library, files: Mapping[str, bytes], class_name: str) -> Built:
    known = _CLASSES.get(class_name)
    # Whatever its class, a model counts more than a vocabulary, as in transformers.
    if "tokenizer.model" in files:
        pieces = _read_sentencepiece(files["tokenizer.model"])
        settings = _read_settings(files, known.special if known else pieces.special, pieces.added)
        vocab = {piece: i for i, (piece, _) in enumerate(pieces.scored)}
        merges = _merges(vocab)
    elif known and known.form == "spiece.model" and "spiece.model" in files:
        settings = _read_settings(files, known.special)
        return _from_spiece(library, files, class_name, settings)
    elif known and known.form == "vocab.txt" and "vocab.txt" in files:
        settings = _read_settings(files, known.special)
        lines = files["vocab.txt"].decode().split("\n")
        vocab = {line.removesuffix("\r"): i for i, line in enumerate(lines) if line}
        merges = []
    elif known and known.form == "vocab.json" and "merges.txt" in files:
        settings = _read_settings(files, known.special)
        vocab = parse_json(files, "vocab.json")
        merges = _read_merges(files["merges.txt"])
    else:
        raise ValueError(
            f"its class {class_name} has its vocabulary in {known.form if known else 'no file'}, "
            "and there is no tokenizer.json; set tokenizer_class in tokenizer_config.json to the "
            f"class that it was made with, one of {[*_CLASSES]}"
        )

    if known:
        model = _model_of(library, known, settings, vocab, merges)
        tokenizer = _with_rules(library, model, known.rules(settings.values))
    else:
        by_id = settings.values.get("added_tokens_decoder") or {}
        texts = {int(i): token_text(token) for i, token in by_id.items()}
        tokenizer = _of_pieces(library, pieces, vocab, merges, texts)
    _add_tokens(library, tokenizer, settings, class_name)
    if known and known.around:
        _set_around(library, tokenizer, known, settings)
    else:
        _set_template(library, tokenizer, settings)
    tokenizer.encode_special_tokens = bool(settings.values.get("split_special_tokens"))

    special = {role: token_text(token) for role, token in settings.named.items()}
    # As it was before there were other forms.
    changes_rules = settings.values.get("add_prefix_space") or tokenizer.encode_special_tokens
    is_plain = class_name == "GPT2Tokenizer" and not changes_rules
    if is_plain and "tokenizer.model" not in files and tokenizer.get_vocab_size() == len(vocab):
        return Built(tokenizer, special, "")
    described = class_name.encode() + _described(tokenizer).encode()
    described += files.get("tokenizer.model", b"")
    return Built(tokenizer, special, short_hash(described))


def _from_spiece(
    library, files: Mapping[str, bytes], class_name: str, settings: _Settings
) -> Built:
    """T5's tokenizer, of its model alone."""
    known = _CLASSES[class_name]
    pieces = _read_sentencepiece(files["spiece.model"], "spiece.model")
    sentinels = _sentinels(settings.values)
    scored = [*pieces.scored, *((sentinel, 0.0) for sentinel in sentinels)]
    charsmap = pieces.proto.normalizer_spec.precompiled_charsmap
    tokenizer = _unigram(library, known, scored, charsmap)

    settings.extra += [*pieces.added, *sentinels]
    _add_tokens(library, tokenizer, settings, class_name)
    _set_around(library, tokenizer, known, settings)
    special = {role: token_text(token) for role, token in settings.named.items()}
    described = class_name.encode() + _described(tokenizer).encode() + files["spiece.model"]
    return Built(tokenizer, special, short_hash(described))


def _set_template(library, tokenizer, settings: _Settings) -> None:
    """Has BOS stand before a text and EOS after it, where tokenizer_config.json says so."""
    before, after, special = [], [], []
    for role, place in (("bos", before), ("eos", after)):
        text = token_text(settings.named.get(f"{role}_token"))
        if settings.values.get(f"add_{role}_token") and text:
            place.append(f"{text}:0")
            special.append((text, tokenizer.token_to_id(text)))
    if special:
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=[*before, "$A:0", *after], special_tokens=special
        )


def _set_around(library, tokenizer, known: _Class, settings: _Settings) -> None:
    """Has the tokens of a class's roles stand around a text."""
    before, after = [[token_text(settings.named[role])] if role else [] for role in known.around]
    ids = {text: tokenizer.token_to_id(text) for text in (*before, *after)}
    parts = [*(f"{text}:0" for text in before), "$A:0", *(f"{text}:0" for text in after)]
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=parts, special_tokens=list(ids.items())
    )


# --- what is refused ---

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
