"""From documents to rows: the document policy, windows, packing, streams and their states."""

import json
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from lm.data import batch as batch_contract
from lm.data import pack
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer

LENGTH = 16
BINS = 3
TOKENIZER = ByteTokenizer()
BOS = TOKENIZER.bos_id
EOS = TOKENIZER.eos_id
PACKINGS = ("first_fit", "concat_then_split")


def make_documents(num, seed=0, longest=40):
    """Texts of one character each, so that every token tells its document."""
    rng = random.Random(seed)
    documents = []
    for i in range(num):
        text = chr(33 + i) * rng.randint(1, longest)
        documents.append(Document(text, f"d{i}", ""))
    return Documents(documents, "fingerprint")


def make_stream(
    documents, packing="first_fit", number=0, num_streams=1, seed=0, label_prompt="", bins=BINS
):
    return pack.stream(
        documents,
        pack.Encoder(TOKENIZER, label_prompt),
        pack.Packing(packing, LENGTH, bins),
        number=number,
        num_streams=num_streams,
        seed=seed,
    )


def take(stream, num):
    return [next(stream) for _ in range(num)]


def concatenate(rows, name):
    """One of the arrays of rows or windows, end to end."""
    return np.concatenate([row[name] for row in rows])


def count_targets(documents):
    """Targets of an epoch: each character, and EOS."""
    return sum(len(document.text) + 1 for document in documents.items)


def pair(window):
    """(tokens, targets) as tuples, which can be counted."""
    return tuple(window["tokens"].tolist()), tuple(window["targets"].tolist())


def segments(row):
    """(tokens, targets) of each segment of a row."""
    pairs = []
    for number in range(1, row["segments"].max() + 1):
        inside = row["segments"] == number
        pairs.append(pair(dict(tokens=row["tokens"][inside], targets=row["targets"][inside])))
    return pairs


def first_targets(rows):
    """The first target of each document, in order."""
    starts = concatenate(rows, "tokens") == BOS
    return concatenate(rows, "targets")[starts].tolist()


def assert_same(rows, expected):
    assert len(rows) == len(expected)
    for row, expected_row in zip(rows, expected):
        assert row.keys() == expected_row.keys()
        for name in row:
            assert np.array_equal(row[name], expected_row[name]), name


def as_json(state):
    """A state as a checkpoint gives it back."""
    return json.loads(json.dumps(state))


# --- the policy ---


class Spelling(ByteTokenizer):
    """Starts every text it is given with a mark of its own: tokenizing apart and together
    differ.
    """

    MARK = 1

    def encode(self, text):
        return [self.MARK] + super().encode(text)


def test_document_policy():
    encoder = pack.Encoder(Spelling(), "\nLabel:")
    document = Document("words", "n", "red")

    # Each part is tokenized apart, and so begins with a mark.
    text = [Spelling.MARK, *b"words"]
    prompt = [Spelling.MARK, *b"\nLabel:"]
    word = [Spelling.MARK, *b" red"]
    assert encoder.training(document) == [BOS, *text, *prompt, *word, EOS]
    assert encoder.prompt(document) == [BOS, *text, *prompt]
    assert encoder.text(document) == [BOS, *text]

    # No label, or a config that doesn't ask for it.
    assert encoder.training(document._replace(label="")) == [BOS, *text, EOS]
    assert pack.Encoder(Spelling(), "").training(document) == [BOS, *text, EOS]


def test_around_a_document_is_what_the_tokenizer_says():
    class Encoders(ByteTokenizer):
        around = ((1, 2), (3,))

    encoder = pack.Encoder(Encoders(), "?")
    document = Document("ab", "n", "red")
    assert encoder.training(document) == [1, 2, *b"ab? red", 3]
    assert encoder.text(document) == [1, 2, *b"ab"]


def test_label_word_is_what_the_verbalizer_asks_for():
    assert pack.label_word("numpy") == " numpy"


# --- windows ---


@pytest.mark.parametrize("size", [2, 3, 15, 16, 17, 18, 32, 33, 34, 100])
def test_windows_hold_every_target_once(size):
    ids = list(range(1000, 1000 + size))

    windows = pack.windows(ids, LENGTH)

    assert concatenate(windows, "tokens").tolist() == ids[:-1]
    assert concatenate(windows, "targets").tolist() == ids[1:]
    for window in windows:
        assert 0 < len(window["tokens"]) <= LENGTH
        assert len(window["tokens"]) == len(window["targets"]) == len(window["weights"])
        assert (window["weights"] == 1).all()
    assert len(windows) == -(-(size - 1) // LENGTH)


# --- streams ---


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_keep_the_contract(packing):
    for row in take(make_stream(make_documents(20), packing), 60):
        batch_contract.check(row)
        assert set(row) == set(batch_contract.ARRAYS)
        assert row["tokens"].shape == (LENGTH,)
        for array in row.values():
            # A view would keep all of the packer's rows in memory.
            assert array.flags.owndata

        # Padding comes last, and is zero.
        used = row["segments"] > 0
        assert used[: used.sum()].all()
        assert (row["weights"] == used).all()
        assert not row["tokens"][~used].any()
        assert not row["positions"][~used].any()

        # Segments are in order; each is a window, with positions from 0.
        assert (np.diff(row["segments"][used]) >= 0).all()
        for number in range(1, row["segments"].max() + 1):
            inside = row["segments"] == number
            tokens = row["tokens"][inside].tolist()
            targets = row["targets"][inside].tolist()
            assert row["positions"][inside].tolist() == list(range(len(tokens)))
            # Within a segment each target is the next input: nothing of another document comes
            # between.
            assert targets[:-1] == tokens[1:]
            assert len(set(tokens) - {BOS}) <= 1


def epochs_of(stream, num):
    """The rows of the first `num` epochs of a fresh stream, epoch by epoch."""
    epochs = [[] for _ in range(num)]
    while True:
        row = next(stream)
        epoch = stream.get_state()["epoch"]
        if epoch == num:
            return epochs
        epochs[epoch].append(row)


def test_concat_then_split_is_the_documents_in_order():
    documents = make_documents(10)
    whole_documents = set()
    for document in documents.items:
        ids = document.text.encode()
        whole_documents.add(((BOS, *ids), (*ids, EOS)))

    orders = set()
    for rows in epochs_of(make_stream(documents, "concat_then_split"), 3):
        # The rows are full, but for the last one's end.
        num_targets = count_targets(documents)
        assert concatenate(rows, "weights").tolist()[:num_targets] == [1] * num_targets
        assert len(rows) == -(-num_targets // LENGTH)

        # Each BOS begins a document, which ends where the next one begins.
        tokens = concatenate(rows, "tokens").tolist()
        targets = concatenate(rows, "targets").tolist()
        starts = [i for i, token in enumerate(tokens) if token == BOS]
        order = []
        for start, end in zip(starts, [*starts[1:], num_targets]):
            order.append((tuple(tokens[start:end]), tuple(targets[start:end])))
        assert len(order) == 10
        assert set(order) == whole_documents
        orders.add(tuple(order))

    assert len(orders) == 3  # shuffled anew


@pytest.mark.parametrize("bins", [1, 3, 8])
def test_first_fit_keeps_windows_whole_and_has_each_once_an_epoch(bins):
    documents = make_documents(10)
    # A long document of one character has several windows that are the same.
    windows = Counter()
    for document in documents.items:
        ids = [BOS, *document.text.encode(), EOS]
        windows.update(map(pair, pack.windows(ids, LENGTH)))

    for rows in epochs_of(make_stream(documents, bins=bins), 4):
        counts = Counter()
        for row in rows:
            counts.update(segments(row))
        assert counts == windows


def test_streams_share_the_documents_out():
    documents = make_documents(13)

    characters = []
    for number in range(4):
        rows = take(make_stream(documents, number=number, num_streams=4), 40)
        tokens = set(concatenate(rows, "tokens").tolist())
        characters.extend(map(chr, tokens - {BOS, 0}))

    # No character twice: no document is in two streams.
    assert sorted(characters) == sorted(document.text[0] for document in documents.items)


def test_shuffles_differ():
    documents = make_documents(40, longest=5)

    def order(seed=0, epoch=0):
        stream = make_stream(documents, "concat_then_split", seed=seed)
        return first_targets(take(stream, 40))[40 * epoch : 40 * (epoch + 1)]

    orders = [order(), order(seed=1), order(seed=2), order(epoch=1)]
    for other in orders:
        assert sorted(other) == sorted(orders[0])
    assert len(set(map(tuple, orders))) == 4
    assert order() == order()


def test_shuffles_of_streams_differ():
    # Both of two streams get each character once, so that their orders can be compared.
    documents = []
    for document in make_documents(40, longest=5).items:
        documents += [document._replace(text=document.text[0] * 3)] * 2
    documents = Documents(documents, "")

    # Neither the same permutation, nor that of the neighbour's next epoch.
    orders = set()
    for number in range(2):
        stream = make_stream(documents, "concat_then_split", number, num_streams=2)
        characters = first_targets(take(stream, 40))
        for epoch in range(3):
            orders.add(tuple(characters[40 * epoch : 40 * (epoch + 1)]))
    assert len(orders) == 6


def test_labels_are_trained_on_where_asked():
    documents = Documents([Document("text", "n", "red")], "")

    for row in take(make_stream(documents, label_prompt="\n=", bins=1), 3):
        for _, targets in segments(row):
            assert TOKENIZER.decode(targets) == "text\n= red"
            assert targets[-1] == EOS


@pytest.mark.parametrize("packing", PACKINGS)
def test_state_restores_exactly(packing):
    rng = random.Random(0)
    documents = make_documents(12)
    rows_per_epoch = count_targets(documents) // LENGTH
    stream = make_stream(documents, packing)

    for _ in range(8):
        take(stream, rng.randint(0, rows_per_epoch))  # in all, some four epochs
        state = as_json(stream.get_state())
        expected = take(stream, 20)

        fresh = make_stream(documents, packing)
        fresh.set_state(state)
        assert_same(take(fresh, 20), expected)

        # A used stream goes back too.
        take(fresh, rng.randint(1, 20))
        fresh.set_state(state)
        assert_same(take(fresh, 20), expected)
        assert as_json(fresh.get_state()) == as_json(stream.get_state())
        fresh.close()

    stream.close()


def test_reading_the_state_changes_nothing():
    documents = make_documents(12)
    rows = take(make_stream(documents), 30)

    watched = make_stream(documents)
    for row in rows:
        watched.get_state()
        assert_same([next(watched)], [row])

    # Rows that were handed out earlier are not written to again.
    assert_same(rows, take(make_stream(documents), 30))


# --- evaluation ---


@pytest.mark.parametrize("num", [1, 30, 200])
def test_evaluation_rows_hold_each_window_once(num):
    rng = random.Random(num)
    windows = []
    for _ in range(num):
        size = rng.randint(1, 40)
        ids = [BOS, *rng.choices(range(256), k=size), EOS]
        windows += pack.windows(ids, LENGTH)

    rows = pack.evaluation_rows(windows, LENGTH)

    packed = Counter()
    for row in rows:
        batch_contract.check(row)
        packed.update(segments(row))
    assert packed == Counter(map(pair, windows))
    assert concatenate(rows, "weights").sum() == len(concatenate(windows, "tokens"))
    assert len(rows) <= len(windows)
    assert_same(rows, pack.evaluation_rows(windows, LENGTH))


def test_windows_without_weight_keep_it():
    window = pack.windows([BOS, 1, 2, 3], LENGTH)[0]
    window["weights"][:2] = 0

    row = pack.evaluation_rows([window], LENGTH)[0]

    assert row["weights"].tolist() == [0, 0, 1] + [0] * 13
    assert row["segments"].tolist() == [1, 1, 1] + [0] * 13


def test_empty_row_is_padding():
    row = batch_contract.empty_row(LENGTH)

    batch_contract.check(row)
    for array in row.values():
        assert not array.any()


# --- epochs ---


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("epochs", ["1", "2", "2.5", "0.3"])
def test_streams_end_with_their_epochs(packing, epochs):
    """Every document as often as there are epochs, then padding; streams are told how long."""
    documents, epochs = make_documents(23), Fraction(epochs)
    arguments = dict(num_streams=3, seed=0, epochs=epochs)
    encoder, packing = pack.Encoder(TOKENIZER, ""), pack.Packing(packing, LENGTH, BINS)
    num_rows = pack.count_rows(documents, encoder, packing, **arguments)

    starts = Counter()
    for number in range(3):
        stream = pack.stream(documents, encoder, packing, number=number, **arguments)
        rows = take(stream, num_rows[number])
        assert all(row["segments"].any() for row in rows)
        assert stream.has_ended()
        for row in take(stream, 3):
            batch_contract.check(row)
            assert not row["segments"].any()

        tokens = concatenate(rows, "tokens")
        own = documents.items[number::3]
        begun = math.floor(epochs) * len(own) + math.ceil(epochs % 1 * len(own))
        assert (tokens == BOS).sum() == begun
        assert stream.epochs_begun() == pytest.approx(begun / len(own))
        starts.update(tokens[1:][tokens[:-1] == BOS].tolist())

    # A document's first character is its own.
    assert len(starts) <= 23
    whole, more = divmod(epochs, 1)
    if not more:
        assert set(starts.values()) == {whole}


@pytest.mark.parametrize("packing", PACKINGS)
def test_state_restores_at_every_row(packing):
    """At epochs' ends, and where a row ends with a document; a stream that has ended stays so."""
    documents = make_documents(12)

    def make():
        arguments = dict(number=0, num_streams=1, seed=0, epochs=Fraction("2.5"))
        encoder = pack.Encoder(TOKENIZER, "")
        return pack.stream(documents, encoder, pack.Packing(packing, LENGTH, BINS), **arguments)

    stream, rows, states, progress = make(), [], [], []
    while len(rows) < 4 or rows[-4]["segments"].any():
        states.append(as_json(stream.get_state()))
        progress.append(stream.epochs_begun())
        rows.append(next(stream))
    assert progress == sorted(progress)

    for i, state in enumerate(states):
        fresh = make()
        fresh.set_state(state)
        assert fresh.epochs_begun() == progress[i]
        assert_same(take(fresh, len(rows[i : i + 4])), rows[i : i + 4])
        fresh.close()


# --- the Batch contract ---


def test_contract_check_finds_what_is_wrong():
    good = next(make_stream(make_documents(3)))
    batch_contract.check(good)
    weighted_padding = dict(
        weights=np.ones_like(good["weights"]), segments=np.zeros_like(good["segments"])
    )

    for changes in (
        {"tokens": good["tokens"].astype(np.int64)},
        {"weights": good["weights"][:-1]},
        weighted_padding,
    ):
        with pytest.raises(AssertionError):
            batch_contract.check(good | changes)


def test_digest_follows_contents():
    row = next(make_stream(make_documents(3)))
    copy = {name: array.copy() for name, array in row.items()}
    changed = row | {"targets": row["targets"] + 1}

    assert batch_contract.digest(copy) == batch_contract.digest(row)
    assert batch_contract.digest(changed) != batch_contract.digest(row)
