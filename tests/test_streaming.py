"""Files larger than memory: every document once an epoch, at positions that restore."""

import collections
import gzip
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lm.data import pack, sources, streaming
from lm.data.tokenizer import ByteTokenizer

TEXTS = [f"document {i} " + "word " * (i % 7) for i in range(400)]
FORMATS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "folder")
PACKING = pack.Packing("first_fit", 64, 8)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few documents, and windows of a few blocks."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 700)
    monkeypatch.setattr(streaming, "WINDOW_BYTES", 3000)


def write(folder, format_, texts=TEXTS):
    """Writes texts as files of a format, and returns their path."""
    if format_ == "parquet":
        path = folder / "texts.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=30)
        return path
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if format_ == "folder":
        # Packed files of several blocks, more of them than there are streams.
        for number in range(5):
            part = content.splitlines(keepends=True)[number::5]
            (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(b"".join(part)))
        return folder
    path = folder / f"texts.{format_}"
    packs = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}
    path.write_bytes(packs.get(format_, bytes)(content))
    return path


def load(path, split="train", held_out=0.0, **arguments):
    arguments |= dict(path=str(path), held_out=held_out)
    if str(path).endswith("parquet"):
        return streaming.parquet(split, **arguments)
    cache = path if path.is_dir() else path.parent
    return streaming.jsonl(split, cache_dir=str(cache / "cache"), **arguments)


def texts_of(documents, number, num_streams, seed=0):
    reader = documents.items.reader()
    return [reader[i].text for i in documents.items.order(number, num_streams, seed)]


@pytest.mark.parametrize("num_streams", [1, 3, 40])
@pytest.mark.parametrize("format_", FORMATS)
def test_an_epoch_has_each_document_once(format_, num_streams, tmp_path):
    documents = load(write(tmp_path, format_))
    seen = collections.Counter()
    for number in range(num_streams):
        seen.update(texts_of(documents, number, num_streams))
    assert seen == collections.Counter(TEXTS)
    if num_streams == 40:  # more than there are groups: the streams have equal shares
        orders = [documents.items.order(number, num_streams, 0) for number in range(num_streams)]
        assert {len(order) for order in orders} == {len(TEXTS) // num_streams}

    # Another epoch has another order; the same one has the same.
    first = texts_of(documents, 0, num_streams)
    assert first == texts_of(documents, 0, num_streams)
    assert first != texts_of(documents, 0, num_streams, seed=1)
    assert first != sorted(first, key=TEXTS.index)


@pytest.mark.parametrize("format_", FORMATS)
def test_streams_go_on_where_they_were(format_, tmp_path):
    def stream():
        encoder = pack.Encoder(ByteTokenizer(), "")
        return pack.stream(documents, encoder, PACKING, number=1, num_streams=3, seed=0)

    documents = load(write(tmp_path, format_))
    rows = stream()
    for _ in range(40):
        next(rows)
    state = json.loads(json.dumps(rows.get_state()))
    wanted = [next(rows)["tokens"] for _ in range(150)]  # into the next epoch

    again = stream()
    again.set_state(state)
    assert again.epochs_begun() < 1
    np.testing.assert_array_equal([next(again)["tokens"] for _ in range(150)], wanted)
    assert again.epochs_begun() > 1


@pytest.mark.parametrize("format_", FORMATS[:4])
def test_the_end_of_each_file_is_held_out(format_, tmp_path):
    path = write(tmp_path, format_)
    train = load(path, held_out=0.1)
    validation = load(path, "validation", held_out=0.1)
    assert [d.text for d in train] + [d.text for d in validation] == TEXTS
    assert len(validation) == 40
    assert validation[0].name == f"{path}:360"
    assert train.fingerprint != validation.fingerprint


def test_epochs_are_counted_in_the_streams_own_order(tmp_path):
    documents = load(write(tmp_path, "jsonl"))
    encoder = pack.Encoder(ByteTokenizer(), "")
    counts = pack.count_rows(documents, encoder, PACKING, num_streams=3, seed=0, epochs=2)
    for number, count in enumerate(counts):
        rows = pack.stream(
            documents, encoder, PACKING, number=number, num_streams=3, seed=0, epochs=2
        )
        segments = [next(rows)["segments"].any() for _ in range(count + 1)]
        assert segments == [True] * count + [False]


def test_lines_are_read_once(tmp_path, monkeypatch):
    path = write(tmp_path, "jsonl")
    load(path)
    monkeypatch.setattr(streaming, "_scan", None)
    assert len(load(path)) == len(TEXTS)
    monkeypatch.undo()

    # A changed file is read again.
    path.write_bytes(path.read_bytes() + b'\n{"text": "one more"}\n')
    os.utime(path, (1, 1))
    assert load(path)[len(TEXTS)].text == "one more"


def test_what_is_read_at_random_is_what_was_read_whole(tmp_path):
    path = write(tmp_path, "jsonl")
    whole = sources.jsonl("train", path=str(path), held_out=0.0)
    assert [d.text for d in load(path)] == [d.text for d in whole]


@pytest.mark.parametrize(
    "line, message",
    [
        (b"not json", "texts.jsonl:401 is not JSON"),
        (b'{"body": "x"}', r"texts.jsonl:401 has no text as 'text'; it has \['body'\]"),
        (b'{"text": 3}', "texts.jsonl:401 has no text"),
        (b'{"text": "\\ud800"}', "texts.jsonl:401 has no text"),
    ],
)
def test_a_bad_line_is_named_before_training(line, message, tmp_path):
    path = write(tmp_path, "jsonl")
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize("format_", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_cut_files_are_named(format_, tmp_path):
    path = write(tmp_path, format_)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"texts\.{format_}.*(cut off|not JSON)"):
        load(path)


def test_too_long_lines_and_other_splits(tmp_path, monkeypatch):
    path = write(tmp_path, "jsonl")
    with pytest.raises(ValueError, match="split 'test'"):
        load(path, "test")
    with pytest.raises(ValueError, match="has no column 'body'"):
        load(write(tmp_path, "parquet"), text_key="body")
    monkeypatch.setattr(streaming, "MAX_LINE_BYTES", 2000)
    path.write_bytes(b'{"text": "' + b"x" * 5000 + b'"}')
    with pytest.raises(ValueError, match="a line of more than 2,000 bytes"):
        load(path)


def test_hugging_face_data_sets(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, "parquet")
    documents = streaming.hugging_face("train", name=str(folder))
    assert [d.text for d in documents] == TEXTS
    with pytest.raises(ValueError, match="no column 'body'"):
        streaming.hugging_face("train", name=str(folder), text_key="body")
    with pytest.raises(ValueError, match="can't be loaded"):
        streaming.hugging_face("train", name=str(tmp_path / "none"))
