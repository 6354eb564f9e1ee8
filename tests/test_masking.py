"""Masked tokens as a transform of data: which are chosen, what stands in their place, and that both
depend on (seed, epoch, example) alone.
"""

import collections
import json

import numpy as np
import pytest
import tokenizers

from lm.data import masking, pack
from lm.data import tokenizer as lm_tokenizers
from lm.data.masking import Masking
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer

BYTES = ByteTokenizer("mask")
LENGTH = 32


def rng(*seed):
    return np.random.default_rng(seed)


def test_shares():
    """15% of what isn't special; of these 80%, 10% and 10%."""
    mask = BYTES.role("mask")
    ids = [BYTES.bos_id, *BYTES.encode("some text of words " * 4000), BYTES.eos_id]
    windows = Masking(BYTES, 0.15).windows(ids, 1000, rng(0))
    tokens, targets, weights = (
        np.concatenate([window[name] for window in windows])
        for name in ("tokens", "targets", "weights")
    )
    np.testing.assert_array_equal(targets, ids)
    assert weights.mean() == pytest.approx(0.15, abs=1e-3)
    assert weights[0] == weights[-1] == 0

    chosen = weights > 0
    np.testing.assert_array_equal(tokens[~chosen], targets[~chosen])
    assert (tokens[chosen] == mask).mean() == pytest.approx(0.8, abs=0.01)
    # A random token may be the token itself, one time in 256.
    assert (tokens[chosen] == targets[chosen]).mean() == pytest.approx(0.1, abs=0.01)
    drawn = tokens[chosen & (tokens != mask) & (tokens != targets)]
    assert len(set(drawn.tolist())) > 200
    assert drawn.max() < 256


@pytest.mark.parametrize("number, chosen", [(1, 1), (3, 1), (10, 2), (20, 3)])
def test_a_text_has_one_masked_token_at_least(number, chosen):
    ids = [BYTES.bos_id, *range(65, 65 + number), BYTES.eos_id]
    (window,) = Masking(BYTES, 0.15).windows(ids, LENGTH, rng(number))
    assert window["weights"].sum() == chosen


def test_without_text_nothing_is_masked():
    (window,) = Masking(BYTES, 0.15).windows([BYTES.bos_id, BYTES.eos_id], LENGTH, rng(0))
    assert not window["weights"].any()


def word_piece(directory):
    vocab = "[PAD] [UNK] [CLS] [SEP] [MASK] un ##happy ##ly the cats sat on mats . ##s".split()
    (directory / "vocab.txt").write_text("\n".join(vocab))
    (directory / "config.json").write_text('{"model_type": "bert"}')
    return lm_tokenizers.load(directory)


def byte_level(directory):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>", "<mask>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" the cats sat on the mats" * 20], trainer)
    settings = dict(bos_token="<s>", eos_token="</s>", mask_token="<mask>")
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)}
    return HuggingFaceTokenizer({name: text.encode() for name, text in files.items()}, {})


def pieces(directory):
    texts = ["the cats sat on the mats unhappily"] * 50
    tokenizer = lm_tokenizers.train_sentencepiece(iter(texts), 290, directory / "p.model")
    return tokenizer.reserving("mask")


@pytest.mark.parametrize("make", [word_piece, byte_level, pieces, lambda _: BYTES])
def test_whole_words_of_any_tokenizer(make, tmp_path):
    """Words are masked whole or not at all, whatever marks their beginnings."""
    tokenizer = make(tmp_path)
    text = "the cats sat on the mats unhappily on the cats"
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    transform = Masking(tokenizer, 0.3, whole_words=True)

    lengths = collections.Counter()
    for seed in range(40):
        (window,) = transform.windows(ids, 100, rng(seed))
        chosen = window["weights"] > 0
        kept = tokenizer.decode([i for i, is_chosen in zip(ids, chosen) if not is_chosen])
        # Without them the text is one of whole words.
        assert set(kept.split()) <= set(text.split())
        # At most the rate, but for a first word that is longer.
        lengths[int(chosen.sum())] += 1
    assert max(lengths) <= max(round(0.3 * (len(ids) - 2)), len(tokenizer.encode(" unhappily")))
    assert min(lengths) >= 1


def rows(seed=0, epoch_rows=60, num_streams=1, bins=2, length=LENGTH, restored_at=None):
    documents = [Document(f"{chr(65 + i)} text of number {i}", f"d{i}", "") for i in range(20)]
    encoder = pack.Encoder(BYTES, "", Masking(BYTES, 0.2).windows)

    def make(number):
        return pack.stream(
            Documents(documents, "f"),
            encoder,
            pack.Packing("first_fit", length, bins),
            number=number,
            num_streams=num_streams,
            seed=seed,
        )

    streams = [make(number) for number in range(num_streams)]
    found = []
    for i in range(epoch_rows):
        if i == restored_at:
            states = [stream.get_state() for stream in streams]
            streams = [make(number) for number in range(num_streams)]
            for stream, state in zip(streams, states):
                stream.set_state(state)
        found.append(next(streams[i % num_streams]))
    return found


def by_document(found):
    """targets -> the ways in which they were masked, in order."""
    ways = collections.defaultdict(list)
    for row in found:
        for number in range(1, row["segments"].max() + 1):
            places = row["segments"] == number
            ways[tuple(row["targets"][places])].append(tuple(row["tokens"][places]))
    return ways


def test_what_is_masked_depends_on_seed_epoch_and_example():
    ways = by_document(rows())
    # However rows are packed and dealt.
    for other in (rows(bins=7), rows(num_streams=4), rows(length=2 * LENGTH, epoch_rows=30)):
        other_ways = by_document(other)
        for targets, masked in other_ways.items():
            common = min(len(masked), len(ways[targets]))
            assert common and masked[:common] == ways[targets][:common]

    # Each epoch anew, and with another seed.
    assert all(len(set(masked)) > 1 for masked in ways.values() if len(masked) > 2)
    assert by_document(rows(seed=1)) != ways


def test_a_restored_stream_masks_the_same():
    for row, restored in zip(rows(), rows(restored_at=17), strict=True):
        for name in row:
            np.testing.assert_array_equal(row[name], restored[name])


def test_rows_are_counted_as_they_come():
    documents = Documents([Document("x" * n, f"d{n}", "") for n in range(1, 90, 4)], "f")
    encoder = pack.Encoder(BYTES, "", Masking(BYTES, 0.2).windows)
    packing = pack.Packing("first_fit", LENGTH, 3)
    how = dict(num_streams=2, seed=0, epochs=2)
    counts = pack.count_rows(documents, encoder, packing, **how)
    for number, count in enumerate(counts):
        stream = pack.stream(documents, encoder, packing, number=number, **how)
        for _ in range(count):
            assert next(stream)["segments"].any()
        assert not next(stream)["segments"].any()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rate=0.0), "config.objective: rate = 0.0.* wanted a rate above 0"),
        (dict(rate=1.5), "rate = 1.5"),
        (dict(random_share=0.7, kept_share=0.4), "random_share = 0.7, kept_share = 0.4"),
        (dict(kept_share=-0.1), "kept_share = -0.1"),
        (dict(tokenizer=ByteTokenizer()), "has no mask .* config.tokenizer.reserve = 'mask'"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        Masking(**dict(tokenizer=BYTES, rate=0.15) | changes)


def test_beginnings_of_words(tmp_path):
    tokenizer = word_piece(tmp_path)
    begins = masking.begins_word(tokenizer)
    spelt = {tokenizer.spell([i]): bool(begins[i]) for i in range(5, tokenizer.vocab_size)}
    assert spelt["cats"] and spelt["un"]
    assert not spelt["##happy"] and not spelt["##s"]
