"""Tokenizers: text comes back as it went in, and training is a function of the text."""

import json
import random

import pytest
import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from lm.data import chat
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
    "a\u00a0b\u3000c",
    "אב \u202eabc",
    "\U0010ffff",
]


def train(texts, vocab_size, path):
    return tokenizers.train_sentencepiece(texts, vocab_size, epath.Path(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(TEXTS, 320, tmp_path_factory.mktemp("tokenizer") / "a.model")


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request):
    if request.param == "bytes":
        return tokenizers.ByteTokenizer()
    return request.getfixturevalue("trained")


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
    special = {tokenizer.bos_id, tokenizer.eos_id}
    assert len(special) == 2
    assert max(special) < tokenizer.vocab_size

    for text in TRICKY + TEXTS:
        assert not special & set(tokenizer.encode(text)), text

    # Decoding leaves them out.
    ids = tokenizer.encode("fox")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "fox"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(epath.Path(tmp_path))
    loaded = tokenizers.load(tmp_path)

    for field in ("fingerprint", "vocab_size", "bos_id", "eos_id"):
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
    assert loaded.prompt("a") == [97]


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
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match="vocab.txt is .*, which lm doesn't read; this command"):
        tokenizers.load(tmp_path)

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
