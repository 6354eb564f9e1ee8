"""Tokenizers: text comes back as it went in, and training is a function of the text."""

import random

import pytest
import sentencepiece
from etils import epath

from lm.data import tokenizer as tokenizers

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
    "<s> </s> <unk> <0x0A>",
    "a\u00a0b\u3000c",
    "אב \u202eabc",
    "\U0010ffff",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tokenizers.train_sentencepiece(
        TEXTS, 320, epath.Path(tmp_path_factory.mktemp("tokenizer")) / "a.model"
    )


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request):
    return (
        tokenizers.ByteTokenizer()
        if request.param == "bytes"
        else request.getfixturevalue("trained")
    )


def test_round_trip(tokenizer):
    rng = random.Random(0)
    noise = [
        "".join(rng.choice(" \n\t\0ab.é漢😀\u2028") for _ in range(rng.randint(1, 40)))
        for _ in range(200)
    ]
    for text in TRICKY + TEXTS + noise:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(0 <= i < tokenizer.vocab_size for i in ids), (
            text
        )


def test_encode_adds_no_special_ids(tokenizer):
    assert (
        len({tokenizer.bos_id, tokenizer.eos_id}) == 2
        and max(tokenizer.bos_id, tokenizer.eos_id) < tokenizer.vocab_size
    )
    for text in TRICKY + TEXTS:
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text)), text
    ids = tokenizer.encode("fox")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == "fox"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(epath.Path(tmp_path))
    loaded = tokenizers.load(tmp_path)
    for field in ("fingerprint", "vocab_size", "bos_id", "eos_id"):
        assert getattr(loaded, field) == getattr(tokenizer, field)
    assert (
        [loaded.encode(t) for t in TRICKY]
        == [tokenizer.encode(t) for t in TRICKY]
        == tokenizer.encode_batch(TRICKY)
        == loaded.encode_batch(tuple(TRICKY))
    )


def test_pieces_never_cross_a_newline(trained):
    newline = trained.encode("\n")
    assert len(newline) == 1
    assert trained.encode("fox\n    return") == trained.encode("fox") + newline + trained.encode(
        "    return"
    )


def test_training_is_deterministic_and_cached(trained, tmp_path, monkeypatch):
    cache = epath.Path(tmp_path) / "new" / "b.model"
    again = tokenizers.train_sentencepiece(iter(TEXTS), 320, cache)
    assert again.fingerprint == trained.fingerprint and again.vocab_size == 320
    assert [p.name for p in cache.parent.iterdir()] == ["b.model"]  # no leftovers
    # From the cache: no texts are read.
    assert (
        tokenizers.train_sentencepiece(iter(lambda: 1 / 0, 0), 320, cache).fingerprint
        == trained.fingerprint
    )
    other = tokenizers.train_sentencepiece(
        [*TEXTS, "zebra zebra zebra zebra"], 320, epath.Path(tmp_path) / "c.model"
    )
    assert other.fingerprint != trained.fingerprint


def test_pieces_come_from_the_given_text(trained):
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained._model)
    pieces = [
        processor.id_to_piece(i)
        for i in range(trained.vocab_size)
        if not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i))
    ]
    assert len(pieces) == 320 - 256 - 3
    assert all(any(p.replace("▁", " ") in text for text in TEXTS) for p in pieces)
    assert len(trained.encode(TEXTS[1])) < 0.8 * len(TEXTS[1])  # and they are put to use


def test_a_vocabulary_that_the_text_does_not_fill(tmp_path):
    for size, texts in ((5000, TEXTS), (20, TEXTS), (300, []), (300, ["", "\n\n"])):
        with pytest.raises(ValueError, match=f"config.tokenizer.vocab_size = {size}"):
            tokenizers.train_sentencepiece(texts, size, epath.Path(tmp_path) / "a.model")
    assert not list(tmp_path.iterdir())  # nothing half-made is kept


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
