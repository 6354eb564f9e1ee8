"""Tokenizers: text comes back as it went in, and training is a function of the text."""

import itertools
import json
import random

import pytest
import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from lm.data import chat, roles
from lm.data import tokenizer as tokenizers
from lm.data.tokenizer import ByteTokenizer

TEXTS = [
    "def f(x):\n    return  x + 1\n\n\nclass A:\n\tpass\n",
    "The quick  brown fox; the lazy dog. café naïve",
] * 20
TRICKY = [
    "",
    " ",
    "  a   b  ",
    "\n",
    "\n\n\n",
    " \n ",
    "\t\tx\t",
    "a\r\nb\r",
    "\x00",
    "a\x00b",
    "".join(map(chr, range(128))),
    "\x7f\x85\xa0",
    "é€漢😀👩‍👩‍👧",
    "e\u0301 é ﬁ Ⅳ ①",
    "\u2028\u2029\ufeff\u200b",
    "\ufffd ⁇ ▅",
    "▁ a▁▁ ▁b",
    "<s> </s> <unk> <0x0A>",
    "a <mask><extra_id_0> <|im_start|>b<|im_end|> <pad>",
    "a\u00a0b\u3000c",
    "אב \u202eabc",
    "\U0010ffff",
]


def train(texts, vocab_size, path):
    return tokenizers.train_sentencepiece(texts, vocab_size, epath.Path(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(TEXTS, 320, tmp_path_factory.mktemp("tokenizer") / "a.model")


RESERVE = "pad,mask,sentinels:3,turns"


@pytest.fixture(params=["bytes", "sentencepiece", "bytes reserving", "sentencepiece reserving"])
def tokenizer(request):
    kind, _, reserving = request.param.partition(" ")
    plain = ByteTokenizer() if kind == "bytes" else request.getfixturevalue("trained")
    return plain.reserving(RESERVE) if reserving else plain


# --- encoding and decoding ---


def test_round_trip(tokenizer):
    rng = random.Random(0)
    noise = []
    for _ in range(200):
        characters = rng.choices(" \n\t\0ab.é漢😀\u2028", k=rng.randint(1, 40))
        noise.append("".join(characters))

    for text in TRICKY + TEXTS + noise:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, text
        assert all(0 <= i < tokenizer.vocab_size for i in ids), text


def test_encode_adds_no_special_ids(tokenizer):
    special = set(itertools.chain.from_iterable(tokenizer.roles.values()))
    assert {tokenizer.bos_id, tokenizer.eos_id} < special | {-1}
    assert len(special) == sum(map(len, tokenizer.roles.values()))
    assert max(special) < tokenizer.vocab_size

    for text in TRICKY + TEXTS:
        assert not special & set(tokenizer.encode(text)), text

    # Decoding leaves them out.
    ids = tokenizer.encode("fox")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "fox"
    assert tokenizer.decode([*ids, *sorted(special - {0})]) == "fox"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(epath.Path(tmp_path))
    loaded = tokenizers.load(tmp_path)

    for field in ("fingerprint", "vocab_size", "bos_id", "eos_id", "stop_ids", "roles", "around"):
        assert getattr(loaded, field) == getattr(tokenizer, field)

    ids = [tokenizer.encode(text) for text in TRICKY]
    assert [loaded.encode(text) for text in TRICKY] == ids
    assert tokenizer.encode_batch(TRICKY) == ids
    assert loaded.encode_batch(tuple(TRICKY)) == ids


def test_pieces_never_cross_a_newline(trained):
    newline = trained.encode("\n")
    fox = trained.encode("fox")
    indented = trained.encode("    return")

    assert len(newline) == 1
    assert trained.encode("fox\n    return") == fox + newline + indented


# --- roles ---


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_reserved_ids_come_behind_all_others(kind, trained):
    plain = ByteTokenizer() if kind == "bytes" else trained
    size = plain.vocab_size
    reserving = plain.reserving(RESERVE)

    assert reserving.vocab_size == size + roles.count(RESERVE) == size + 7
    assert reserving.encode_batch(TRICKY) == plain.encode_batch(TRICKY)
    assert [reserving.spell([i]) for i in range(size)] == [plain.spell([i]) for i in range(size)]
    assert reserving.fingerprint != plain.fingerprint
    assert (reserving.role("pad"), reserving.role("mask")) == (size, size + 1)
    assert reserving.role_ids("sentinels") == (size + 2, size + 3, size + 4)
    assert reserving.role_ids("turns") == (size + 5, size + 6)
    assert reserving.spell([97, size + 1, size + 5]).endswith("<mask><|im_start|>")
    # What ends a turn ends a text.
    assert plain.stop_ids == (plain.eos_id,)
    assert reserving.stop_ids == (plain.eos_id, size + 6)

    # Only what it lacks is added, however it got the rest.
    assert plain.reserving("").fingerprint == plain.fingerprint
    assert reserving.reserving("turns,sentinels:2").fingerprint == reserving.fingerprint
    pad, rest = RESERVE.split(",", 1)
    assert plain.reserving(pad).reserving(rest).fingerprint == reserving.fingerprint
    with pytest.raises(ValueError, match="has 3 sentinels already"):
        reserving.reserving("sentinels:4")


def test_a_role_that_is_not_there(trained):
    with pytest.raises(ValueError, match="bytes-1 has no mask .*only .'bos', 'eos'.*reserve = 'ma"):
        ByteTokenizer().role("mask")
    with pytest.raises(ValueError, match="has no sentinels .*reserve = 'sentinels:100'"):
        trained.role_ids("sentinels")
    with pytest.raises(ValueError, match="no role 'masks'; valid: .*'mask'"):
        trained.role("masks")


@pytest.mark.parametrize(
    "reserve",
    ["masks", "mask,mask", "mask,", " mask", "bos", "sentinels", "sentinels:0", "sentinels:1000"]
    + ["sentinels:1,sentinels:2", "mask:2", "sentinels:\u0661", "\0"],
)
def test_what_can_not_be_reserved(reserve):
    with pytest.raises(ValueError, match="config.tokenizer.reserve = "):
        roles.parse(reserve)


def test_a_piece_of_texts_is_not_reserved(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        vocab_size=45,
        control_symbols=["[SEP]"],
        user_defined_symbols=["<mask>"],
        minloglevel=2,
    )
    loaded = tokenizers.load(tmp_path / "m.model")
    assert loaded.role("sep") == 3
    assert loaded.reserving("sep").fingerprint == loaded.fingerprint
    with pytest.raises(ValueError, match="m.model has '<mask>' as a piece of texts"):
        loaded.reserving("sep,mask")


def test_a_byte_tokenizer_of_another_version(tmp_path):
    for content in ("bytes-2", "bytes-1+mask,mask", "", "\x80"):
        (tmp_path / "tokenizer.bytes").write_text(content)
        with pytest.raises(ValueError, match="tokenizer.bytes says .*; wanted bytes-1"):
            tokenizers.load(tmp_path)


def test_a_model_with_a_pad_piece_that_an_earlier_version_saved(tmp_path):
    """Its tokenizer_config.json named BOS, EOS and the unknown piece only."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        vocab_size=45,
        pad_id=3,
        minloglevel=2,
    )
    loaded = tokenizers.load(tmp_path / "m.model")
    assert loaded.role("pad") == 3
    loaded.save(epath.Path(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config.pop("pad_token") == "<pad>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizers.load(tmp_path).fingerprint == loaded.fingerprint


# --- training ---

CHINESE = ["".join(random.Random(i).choices("的一是不了人我在有他", k=50)) for i in range(400)]


@pytest.mark.parametrize(
    "texts",
    [
        CHINESE,
        [*CHINESE, "的 一"],  # 1 space in 20,000 characters
        ["".join(CHINESE) * 4],  # a word that the trainer can't hold
        ["".join(CHINESE * 20)],  # a line that it leaves out
        [" ".join(CHINESE * 20)],
        [text + "\u2585" for text in CHINESE],  # lines that it leaves out for their sign
    ],
    ids=["no space", "rare spaces", "a long word", "a long line", "of words", "reserved sign"],
)
def test_any_text_comes_back_whatever_it_was_trained_on(texts, tmp_path):
    trained = train(texts, 300, tmp_path / "a.model")

    all_characters = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    for text in [*TRICKY, "你好 world", "\t \t", all_characters]:
        assert trained.decode(trained.encode(text)) == text, text[:40]
    # Nothing was left out.
    assert len(trained.encode("的一是不了人我在有他")) <= 10


def test_no_text_needs_a_space_to_train(tmp_path):
    trained = train(["\t\t", "\t"], 261, tmp_path / "a.model")
    assert trained.decode(trained.encode("\t a")) == "\t a"


def test_a_line_is_cut_between_words():
    line = "ab  cde f" * 20_000
    parts = list(tokenizers._sentences([line]))
    assert "".join(parts) == line
    assert len(parts) == 3
    # No part ends in a space, or begins within a word.
    assert all(part[0] == " " for part in parts[1:])
    assert not any(part[-1] == " " for part in parts)


def test_advice_names_what_there_is(tmp_path):
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    with pytest.raises(ValueError, match="vocab_size = 2048: .* take 3261 ids") as error:
        train([characters], 2048, tmp_path / "a.model")
    assert "character_coverage" not in str(error.value)
    with pytest.raises(ValueError, match="vocab_size = 2048: this text gives at most 266 ids"):
        train(["ab ab"], 2048, tmp_path / "a.model")
    train(["ab ab"], 266, tmp_path / "a.model")


def test_training_is_deterministic_and_cached(trained, tmp_path):
    cache = tmp_path / "new" / "b.model"

    again = train(iter(TEXTS), 320, cache)
    assert again.fingerprint == trained.fingerprint
    assert again.vocab_size == 320
    # No leftovers.
    assert {path.name for path in cache.parent.iterdir()} == {"b.model", "b.model.hash"}

    def unread():
        raise AssertionError("texts are read in spite of the cache")
        yield

    cached = train(unread(), 320, cache)
    assert cached.fingerprint == trained.fingerprint

    # A bit that flipped in it may load without complaint; one in its hash makes no text.
    for path in (cache, cache.parent / "b.model.hash"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x80
        path.write_bytes(content)
        mended = train(iter(TEXTS), 320, cache)
        assert mended.fingerprint == trained.fingerprint
        assert train(unread(), 320, cache).fingerprint == trained.fingerprint

    other = train([*TEXTS, "zebra zebra zebra zebra"], 320, tmp_path / "c.model")
    assert other.fingerprint != trained.fingerprint


def test_pieces_come_from_the_given_text(trained):
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained._model)
    pieces = []
    for i in range(trained.vocab_size):
        if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i)):
            pieces.append(processor.id_to_piece(i).replace("▁", " "))

    # All but the bytes, and <unk>, <s> and </s>.
    assert len(pieces) == 320 - 256 - 3
    for piece in pieces:
        assert any(piece in text for text in TEXTS), piece
    # They are put to use.
    assert len(trained.encode(TEXTS[1])) < 0.8 * len(TEXTS[1])


def test_a_vocabulary_that_the_text_does_not_fill(tmp_path):
    for vocab_size, texts in ((5000, TEXTS), (20, TEXTS), (300, []), (300, ["", "\n\n"])):
        with pytest.raises(ValueError, match=f"config.tokenizer.vocab_size = {vocab_size}"):
            train(texts, vocab_size, tmp_path / "a.model")
    assert not list(tmp_path.iterdir())  # nothing incomplete is kept


# --- of Hugging Face checkpoints ---


@pytest.mark.parametrize(
    "length", [dict(Fixed=8), "BatchLongest"], ids=["to a length", "to the longest"]
)
def test_saved_truncation_and_padding_are_dropped(length, tmp_path):
    byte_tokenizer = tokenizers.ByteTokenizer()
    byte_tokenizer.save(epath.Path(tmp_path))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.bytes").unlink()
    saved["truncation"] = dict(direction="Right", max_length=8, strategy="LongestFirst", stride=0)
    saved["padding"] = dict(
        strategy=length,
        direction="Right",
        pad_to_multiple_of=None,
        pad_id=0,
        pad_type_id=0,
        pad_token="x",
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))

    loaded = tokenizers.load(tmp_path)
    for text in TRICKY[:-10] + TEXTS[:2]:
        assert loaded.encode(text) == byte_tokenizer.encode(text)
    assert loaded.encode_batch(TEXTS) == byte_tokenizer.encode_batch(TEXTS)
    assert loaded.prompt("a") == byte_tokenizer.prompt("a")


def write_json(directory, **contents):
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_a_sentencepiece_checkpoint(tmp_path):
    """As Llama 2 Chat's, without tokenizer.json; tests/parity compares more with transformers."""
    model = train(TEXTS, 320, tmp_path / "tokenizer.model")
    write_json(
        tmp_path,
        config=dict(model_type="llama", eos_token_id=2),
        tokenizer_config=dict(tokenizer_class="LlamaTokenizer", add_bos_token=True),
        special_tokens_map=dict(pad_token="[PAD]"),
        added_tokens={"<|end|>": 321},
        generation_config=dict(eos_token_id=[2, 321]),
    )
    loaded = tokenizers.load(tmp_path)

    # Special and added tokens are found in a text.
    assert loaded.encode("</s>") == [2]
    assert loaded.encode("fox<|end|>") == [*model.encode(" fox"), 320]
    assert loaded.prompt("fox") == [1, *model.encode(" fox")]
    # What a chat needs.
    assert chat.special_tokens(loaded)["bos_token"] == "<s>"
    assert loaded.stop_ids == (2, 321)
    # A run's own takes them for text.
    (tmp_path / "run").mkdir()
    model.save(epath.Path(tmp_path / "run"))
    assert tokenizers.load(tmp_path / "run").fingerprint == model.fingerprint


def test_bos_of_vocab_and_merges(tmp_path):
    """OPT's."""
    write_json(
        tmp_path,
        vocab={"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4},
        config=dict(model_type="opt"),
        tokenizer_config=dict(
            add_bos_token=True, bos_token="</s>", eos_token="</s>", unk_token="</s>"
        ),
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    loaded = tokenizers.load(tmp_path)
    assert loaded.encode("ab</s>a") == [4, 1, 2]
    assert loaded.prompt("ab") == [1, 4]
    assert tokenizers.prefix_ids(loaded, [4]) == [1]


# --- what is refused ---


def test_forms_that_are_not_read(tmp_path):
    (tmp_path / "tekken.json").write_text("a")
    with pytest.raises(ValueError, match="tekken.json is .*, which lm doesn't read; this command"):
        tokenizers.load(tmp_path)
    (tmp_path / "tekken.json").unlink()
    # T5's, and others' which have rules of their own.
    (tmp_path / "spiece.model").write_text("a")
    write_json(tmp_path, tokenizer_config=dict(tokenizer_class="AlbertTokenizer"))
    with pytest.raises(ValueError, match="AlbertTokenizer has rules that lm doesn't know; this"):
        tokenizers.load(tmp_path)
    write_json(tmp_path, tokenizer_config={})
    with pytest.raises(
        ValueError, match="spiece.model is of a class that no file names; this comma"
    ):
        tokenizers.load(tmp_path)
    (tmp_path / "spiece.model").unlink()

    ByteTokenizer().save(epath.Path(tmp_path))
    (tmp_path / "tokenizer.bytes").unlink()
    write_json(tmp_path, tokenizer_config=dict(tokenizer_class="CodeLlamaTokenizer"))
    with pytest.raises(ValueError, match="class CodeLlamaTokenizer .*AutoTokenizer"):
        tokenizers.load(tmp_path)

    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text("")
    write_json(tmp_path, vocab={"a": 0}, tokenizer_config=dict(tokenizer_class="LlamaTokenizer"))
    with pytest.raises(ValueError, match="LlamaTokenizer has its vocabulary in tokenizer.model"):
        tokenizers.load(tmp_path)


def test_pieces_that_take_without_end(tmp_path):
    train(TEXTS, 320, tmp_path / "tokenizer.model")
    model = sentencepiece_model_pb2.ModelProto.FromString(
        (tmp_path / "tokenizer.model").read_bytes()
    )
    model.pieces[300].piece = "a" * 1000
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    write_json(tmp_path, config=dict(model_type="llama"))
    with pytest.raises(ValueError, match="one of over 256 characters"):
        tokenizers.load(tmp_path)


def test_what_is_not_a_tokenizer(tmp_path):
    (tmp_path / "text.model").write_bytes(b"this is no protocol buffer")
    with pytest.raises(ValueError, match="text.model is not a SentencePiece model"):
        tokenizers.load(tmp_path / "text.model")

    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.model"):
        tokenizers.load(tmp_path / "empty.model")

    for missing in ("none.model", ""):
        with pytest.raises(ValueError, match="no tokenizer at"):
            tokenizers.load(tmp_path / missing)


def test_a_model_without_bos_or_eos(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        bos_id=-1,
        minloglevel=2,
    )

    with pytest.raises(ValueError, match="no BOS or EOS"):
        tokenizers.load(tmp_path / "m.model")
