"""Sources: plain text, JSONL, and TFDS copies, and what each says of bad input."""

import gzip
import json
import logging
import os
import re
import sys
import tracemalloc

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds

from lm.data import records, sources
from tests.tfds_copies import TEXT, prepare


def texts(documents):
    return [document.text for document in documents.items]


def labelled_texts(documents):
    return [(document.text, document.label) for document in documents.items]


def num_names(documents):
    return len({document.name for document in documents.items})


# --- text ---


def read_text(split, path, held_out=0.1, **args):
    return sources.text(split, path=str(path), held_out=held_out, **args)


def test_one_file_is_cut_by_characters(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "a.txt"
    path.write_text("é€😀abcdefg", encoding="utf-8")

    train = read_text("train", path, held_out=0.3)
    validation = read_text("validation", path, held_out=0.3)

    assert texts(train) == ["é€😀abcd"]
    assert texts(validation) == ["efg"]
    assert "split 'train' has 70%" in caplog.text and "by tail" in caplog.text
    assert train.fingerprint != validation.fingerprint
    assert train[0].label == ""


def test_several_files_are_documents(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"text {number}\n")
    (tmp_path / "empty.txt").write_text("")

    train = read_text("train", tmp_path / "*.txt", held_out=0.25)
    validation = read_text("validation", tmp_path, held_out=0.25)

    assert sorted(texts(train) + texts(validation)) == sorted(f"text {i}\n" for i in range(20))
    assert 0 < len(validation) < 10
    assert num_names(train) == len(train)
    assert train[0].name.endswith(".txt:0")


def test_separator_makes_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one<|>two<|><|>three\r\n<|>four")
    args = dict(held_out=0.5, held_out_by="tail", separator="<|>")

    train = read_text("train", path, **args)
    validation = read_text("validation", path, **args)

    # Line ends stay as they are.
    assert texts(train) == ["one", "two"]
    assert texts(validation) == ["three\r\n", "four"]
    assert num_names(train) == 2
    assert num_names(validation) == 2
    assert not {d.name for d in train.items} & {d.name for d in validation.items}


def test_escapes_of_a_separator(tmp_path, caplog):
    """A shell gives a backslash and an n."""
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\nthree")
    caplog.set_level(logging.INFO)

    documents = read_text("train", path, held_out=0.0, separator=r"\n\n")

    assert texts(documents) == ["one", "two", "three"]
    assert r"'\\n\\n' is taken for the characters '\n\n'" in caplog.text
    # What stands in the text as it was given means itself.
    path.write_text(r"one\ntwo" + "\nthree")
    assert texts(read_text("train", path, held_out=0.0, separator=r"\n")) == ["one", "two\nthree"]


@pytest.mark.parametrize(
    "separator, hint", [("<|>", "leave it empty"), (r"\n\n", r"'\\r\\n\\r\\n' does")]
)
def test_a_separator_that_divides_nothing(tmp_path, separator, hint):
    for name in "ab":
        (tmp_path / name).write_bytes(b"one\r\n\r\ntwo")

    with pytest.raises(ValueError, match=f"separator = .* occurs in no file.*{hint}"):
        read_text("train", tmp_path, separator=separator)


def test_text_errors(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"):
        read_text("train", tmp_path / "latin.txt")

    with pytest.raises(ValueError, match="no file at .*none.txt"):
        read_text("train", tmp_path / "none.txt")
    with pytest.raises(ValueError, match="no path given"):
        read_text("train", "")

    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt has no documents"):
        read_text("train", tmp_path / "empty.txt")

    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match="split 'test'.*'validation'"):
        read_text("test", tmp_path / "a.txt")
    with pytest.raises(ValueError, match="no documents.*held_out = 0 leaves it none$"):
        read_text("validation", tmp_path / "a.txt", held_out=0.0)


@pytest.mark.parametrize("args", [{}, {"document_chars": 4096}, {"separator": "\n"}])
def test_a_file_costs_few_times_its_size(tmp_path, args):
    path = tmp_path / "a.txt"
    # One character outside of the first 65,536 makes a string of four bytes each.
    path.write_text(("some words of a line that is as long as lines are, or two\n" * 50_000) + "😀")
    size = path.stat().st_size

    tracemalloc.start()
    documents = read_text("train", path, **args)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(documents)
    assert kept < 6 * size
    assert peak < 10 * size


# --- what is held out ---

LANGUAGES = {
    "en": "word {} of many",
    "zh": "\u7b2c{}\u53e5\u8bdd",
    "ar": "\u0643\u0644\u0645\u0629 {}",
}


@pytest.fixture
def corpus(tmp_path):
    """{source: (function, arguments)}: the same documents, ordered by language, as text, as JSONL
    and packed.
    """
    rows = [[template.format(i) for i in range(200)] for template in LANGUAGES.values()]
    everything = []
    for language, texts_ in zip(LANGUAGES, rows):
        (tmp_path / f"{language}.txt").write_text("\n\n".join(texts_), encoding="utf-8")
        everything += [json.dumps({"text": text, "label": language}) for text in texts_]
    lines = "\n".join(everything).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.zst").write_bytes(pyarrow.compress(lines, codec="zstd", asbytes=True))

    ways = {"text": (sources.text, dict(path=str(tmp_path / "*.txt"), separator="\n\n"))}
    for way, name in (("jsonl", "a.jsonl"), ("gzip", "b.jsonl.gz"), ("zstd", "c.zst")):
        ways[way] = (sources.jsonl, dict(path=str(tmp_path / name)))
    return ways


def test_each_way_holds_out_the_same_documents(corpus):
    validation, train = [], []
    for source, args in corpus.values():
        validation.append(sorted(texts(source("validation", held_out=0.1, **args))))
        train.append(sorted(texts(source("train", held_out=0.1, **args))))

    assert validation == [validation[0]] * 4
    assert train == [train[0]] * 4
    everything = [t.format(i) for t in LANGUAGES.values() for i in range(200)]
    assert sorted(train[0] + validation[0]) == sorted(everything)
    assert 40 < len(validation[0]) < 80
    # No language is on one side only.
    for start in ("word", "\u7b2c", "\u0643"):
        assert 10 < sum(text.startswith(start) for text in validation[0]) < 30


def test_a_document_stays_on_its_side(tmp_path):
    """Whatever is added, and whatever it is cut into."""
    texts_ = [f"document {i} " + "abcdefgh " * 20 for i in range(50)]
    path = tmp_path / "a.txt"
    args = dict(held_out=0.3, separator="|")

    path.write_text("|".join(texts_))
    before = set(texts(read_text("validation", path, **args)))
    path.write_text("|".join(["another", *texts_[::-1], *texts_]))
    after = texts(read_text("validation", path, **args))
    cut = read_text("train", path, **args, document_chars=50)

    assert set(after) - {"another"} == before
    # Duplicates are together.
    assert len([text for text in after if text != "another"]) == 2 * len(before)
    whole = {}
    for piece in cut.items:
        name = piece.name.split("+")[0]
        whole[name] = whole.get(name, "") + piece.text
    assert not set(whole.values()) & before
    assert len(whole) + len(after) == 101


def test_the_tail_of_each_file(tmp_path):
    (tmp_path / "a").write_text("0123456789")
    (tmp_path / "b").write_text("abcdefghij")
    validation = read_text("validation", tmp_path, held_out=0.2, held_out_by="tail")
    assert texts(validation) == ["89", "ij"]

    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(4)])
    args = dict(path=str(tmp_path / "*.jsonl"), held_out=0.25, held_out_by="tail")
    assert texts(sources.jsonl("train", **args)) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert texts(sources.jsonl("validation", **args)) == ["a3", "b3"]


def test_a_text_has_files_for_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"of {split}")
    assert texts(read_text("test", tmp_path / "{split}.txt")) == ["of test"]


@pytest.mark.parametrize("held_out", [1.0, 1.5, -0.1, float("nan")])
@pytest.mark.parametrize("source", [sources.text, sources.jsonl])
def test_shares_that_are_none(tmp_path, source, held_out):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(ValueError, match=r"source_args\.held_out = .*wanted a share, 0 to below 1"):
        source("train", path=path, held_out=held_out)
    with pytest.raises(ValueError, match=r"held_out_by = 'head'; valid: \['hash', 'tail'\]"):
        source("train", path=path, held_out=0.1, held_out_by="head")


def test_shares_are_logged(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("|".join(f"number {i}" for i in range(1000)))
    (tmp_path / "b.txt").write_text("x" * 300)
    caplog.set_level(logging.INFO)

    read_text("validation", tmp_path, separator="|")
    assert re.search(
        r"split 'validation' has \d+\.\d+% of the characters of \S+, by hash: \S+a\.txt "
        r"\d+(\.\d+)?%, \S+b\.txt 100%$",
        caplog.text.strip(),
    )

    # Two documents: each is on one side, whole.
    assert "too few" not in caplog.text
    caplog.clear()
    (tmp_path / "a.txt").write_text("x" * 200)
    read_text("train", tmp_path, held_out=0.1)
    assert "too few, or too unequal, for a hash to hold out 0.1 of them" in caplog.text
    with pytest.raises(ValueError, match="no documents.*holds out the end of each file"):
        read_text("validation", tmp_path, held_out=1e-9)


# --- JSONL ---


def write_jsonl(path, lines):
    """Writes objects as lines, and strings as they are."""
    content = ""
    for line in lines:
        content += line if isinstance(line, str) else json.dumps(line) + "\n"
    path.write_text(content, encoding="utf-8")
    return str(path)


def test_jsonl_documents_and_labels(tmp_path):
    lines = [
        {"body": "text 0", "kind": 10**400},
        {"body": "text 1", "kind": 1.5},
        {"body": "text 2", "kind": None},
        "\n",
        {"body": "last", "kind": "x", "more": []},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    keys = dict(text_key="body", label_key="kind", held_out_by="tail")

    train = sources.jsonl("train", path=path, held_out=0.25, **keys)
    validation = sources.jsonl("validation", path=path, held_out=0.25, **keys)
    unlabelled = sources.jsonl("train", path=path, held_out=0.25, text_key="body")

    # Without a label is what has null.
    assert labelled_texts(train) == [("text 0", str(10**400)), ("text 1", "1.5"), ("text 2", "")]
    assert labelled_texts(validation) == [("last", "x")]
    assert validation[0].name.endswith("a.jsonl:5")  # its line in the file, the empty one counted
    assert unlabelled[0].label == ""


@pytest.mark.parametrize("label", ["true", "[1]", '{"a": 1}', "NaN", r'"\ud800"'])
def test_labels_that_are_none(tmp_path, label):
    path = write_jsonl(tmp_path / "a.jsonl", [f'{{"text": "a", "label": {label}}}\n'])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the label 'label' is .*; wanted a string"):
        sources.jsonl("train", path=path, held_out=0.0, label_key="label")


def test_jsonl_file_for_each_split(tmp_path):
    for split in ("train", "dev"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(4)])

    documents = sources.jsonl("dev", path=str(tmp_path / "{split}.jsonl"), held_out=0.5)

    # All of the file: nothing of it is held out.
    assert texts(documents) == ["dev 0", "dev 1", "dev 2", "dev 3"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_jsonl_lines_end_at_newlines_only(tmp_path, separator):
    # Valid within a JSON string, and a line end to str.splitlines.
    text = f"one{separator}two"
    line = json.dumps({"text": text}, ensure_ascii=False) + "\r\n"
    path = write_jsonl(tmp_path / "a.jsonl", [line, {"text": "next"}])

    documents = sources.jsonl("train", path=path, held_out=0.0)

    assert texts(documents) == [text, "next"]
    assert documents[1].name.endswith(":2")


def test_jsonl_errors(tmp_path):
    def read(content, split="train", held_out=0.0, **args):
        path = tmp_path / "bad.jsonl"
        path.write_bytes(content)
        return sources.jsonl(split, path=str(path), held_out=held_out, **args)

    with pytest.raises(ValueError, match=r"bad\.jsonl:2 is not JSON"):
        read(b'{"text": "a"}\n{"text": "b"\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:3 has no key 'text'; it has \['body'\]"):
        read(b'{"text": "a"}\n\n{"body": "b"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1 has no key 'kind'"):
        read(b'{"text": "a"}\n', label_key="kind")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1 is a list; wanted an object"):
        read(b'["text"]\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl is not UTF-8: byte 0xff at offset 10"):
        read(b'{"text": "\xff"}\n')

    for empty in (b"", b"\n\n", b'{"text": ""}\n'):
        with pytest.raises(ValueError, match="no documents with text"):
            read(empty)
    with pytest.raises(ValueError, match="no file at"):
        sources.jsonl("train", path=str(tmp_path / "{split}-none.jsonl"), held_out=0.0)
    with pytest.raises(ValueError, match="split 'test'"):
        read(b'{"text": "a"}\n', split="test", held_out=0.5)


def test_jsonl_text_that_is_no_text(tmp_path):
    # Not the training text "None", and not a character that has no encoding.
    for value in ("null", r'"\ud800"'):
        path = tmp_path / "bad.jsonl"
        path.write_text(f'{{"text": "a"}}\n{{"text": {value}}}\n')
        with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
            sources.jsonl("train", path=str(path), held_out=0.0)


def test_fingerprint_follows_content():
    document = sources.Document("text", "name", "label")
    variants = [
        [document],
        [document._replace(text="texts")],
        [document._replace(name="x")],
        [document._replace(label="x")],
        [document, document],
        [sources.Document("textn", "ame", "label")],
        [document, document._replace(text="b")],
        [document._replace(text="b"), document],
    ]

    assert len(set(map(sources.fingerprint, variants))) == len(variants)
    assert sources.fingerprint([document]) == sources.fingerprint([sources.Document(*document)])


# --- TFDS ---


def read_tfds(split, name, data_dir, **args):
    return sources.tfds(split, name=name, data_dir=str(data_dir), **args)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Copies as `tfds build` leaves them: lm1b, three versions of it, a configuration of c4 with
    its features, and one with labels and names.
    """
    root = tmp_path_factory.mktemp("tfds")

    for version in ("1.1.0", "1.10.0", "1.2.0"):
        train = [{"text": f"{version} sentence {i} é"} for i in range(10)]
        test = [{"text": "test 0"}, {"text": "test 1"}, {"text": "test 2"}]
        prepare(root, "lm1b", {"text": TEXT}, dict(train=train, test=test), version=version)

    keys = ("text", "url", "timestamp", "content-length", "content-type")
    pages = []
    for i in range(10):
        pages.append({key: f"{key} {i}" for key in keys})
    features = dict.fromkeys(keys, TEXT)
    prepare(root, "c4", features, dict(train=pages), version="3.1.0", config="en")

    kind = tfds.features.ClassLabel(names=["no", "yes"])
    labelled = [{"text": f"t{i}", "kind": i % 2, "name": f"n{i}"} for i in range(4)]
    prepare(root, "labelled", dict(text=TEXT, kind=kind, name=TEXT), dict(train=labelled))
    return root


def test_tfds_by_name_version_and_slice(copies):
    whole = texts(read_tfds("train", "lm1b", copies))

    # The newest version, by numbers: 1.10.0 is above 1.2.0.
    assert whole == [f"1.10.0 sentence {i} é" for i in range(10)]
    assert read_tfds("train", "lm1b:1.2.0", copies)[0].text == "1.2.0 sentence 0 é"
    assert texts(read_tfds("test", "lm1b:1.1.0", copies)) == ["test 0", "test 1", "test 2"]

    assert texts(read_tfds("train[:80%]", "lm1b", copies)) == whole[:8]
    assert texts(read_tfds("train[80%:]", "lm1b", copies)) == whole[8:]
    assert texts(read_tfds("train[3:7]", "lm1b", copies)) == whole[3:7]
    assert "tensorflow" not in sys.modules


def test_tfds_labels_and_texts_that_are_none(tmp_path):
    """-1 is TFDS's sign for no label; a list is no text."""
    features = dict(
        text=TEXT,
        kind=tfds.features.ClassLabel(names=["no", "yes"]),
        words=tfds.features.Sequence(TEXT),
        flag=np.bool_,
    )
    row = dict(text="a", kind=-1, words=["b"], flag=True)
    prepare(tmp_path, "odd", features, dict(train=[row, row | {"kind": "yes"}]))

    documents = read_tfds("train", "odd", tmp_path, label_key="kind")
    assert labelled_texts(documents) == [("a", ""), ("a", "yes")]
    with pytest.raises(ValueError, match=r"odd\[0\]: 'words' is \['b'\]; wanted a string"):
        read_tfds("train", "odd", tmp_path, text_key="words")
    with pytest.raises(ValueError, match=r"odd\[0\]: the label 'flag' is True"):
        read_tfds("train", "odd", tmp_path, label_key="flag")


def test_tfds_configuration_and_features(copies):
    for name in ("c4/en", "c4/en:3.1.0"):
        documents = read_tfds("train", name, copies)
        assert texts(documents) == [f"text {i}" for i in range(10)]
        assert len(documents) == 10
        assert num_names(documents) == 10
    assert read_tfds("train", "c4/en", copies, text_key="url")[3].text == "url 3"

    labelled = read_tfds("train", "labelled", copies, label_key="kind")
    assert list(labelled.items) == [
        ("t0", "n0", "no"),
        ("t1", "n1", "yes"),
        ("t2", "n2", "no"),
        ("t3", "n3", "yes"),
    ]
    with pytest.raises(IndexError):
        labelled[4]
    assert list(labelled) == list(labelled.items)


def test_tfds_records(tmp_path):
    """As JSON has them: text, lists, labels by name, whatever else as it is."""
    class_label = tfds.features.ClassLabel(names=["no", "yes"])
    features = {
        "q": TEXT,
        "answers": tfds.features.Sequence({"text": TEXT, "answer_start": np.int32}),
        "kind": class_label,
        "n": np.int64,
        "tags": tfds.features.Sequence(class_label),
    }
    row = {
        "q": "é?",
        "answers": {"text": ["a", "bé"], "answer_start": [3, 1]},
        "kind": "yes",
        "n": 5,
        "tags": [1, 0],
    }
    rows = [row, row | {"kind": "no"}, row | {"kind": -1}]  # -1: no label
    prepare(tmp_path, "qa", features, dict(test=rows))

    table = records.load("test", tfds="qa", data_dir=str(tmp_path))
    sliced = records.load("test[1:]", tfds="qa", data_dir=str(tmp_path))

    assert list(table) == rows
    assert len(table) == 3
    assert json.loads(json.dumps(table[0])) == rows[0]
    assert list(sliced) == rows[1:]
    with pytest.raises(ValueError, match="no prepared copy of 'other'"):
        records.load("test", tfds="other", data_dir=str(tmp_path))


def test_tfds_fingerprint_follows_what_is_read(copies, tmp_path):
    variants = [
        read_tfds("train", "labelled", copies),
        read_tfds("train", "labelled", copies, label_key="kind"),
        read_tfds("train", "labelled", copies, text_key="name"),
        read_tfds("train[:2]", "labelled", copies),
        read_tfds("train[2:]", "labelled", copies),
        read_tfds("train", "lm1b:1.1.0", copies),
        read_tfds("train", "lm1b", copies),
        read_tfds("test", "lm1b", copies),
        read_tfds("train[:3]", "lm1b", copies),
    ]
    assert len({documents.fingerprint for documents in variants}) == len(variants)

    again = read_tfds("train", "labelled", copies)
    assert again.fingerprint == variants[0].fingerprint

    prepare(tmp_path, "labelled", {"text": TEXT}, dict(train=[{"text": "t"}] * 5))
    other = read_tfds("train", "labelled", tmp_path)
    assert other.fingerprint != variants[0].fingerprint


def test_tfds_fingerprint_follows_content(tmp_path):
    # The same name, version and number of examples: only the sentences differ.
    copies = []
    for folder in ("a", "b"):
        train = [{"text": f"sentence {folder} {i}"} for i in range(4)]
        prepare(tmp_path / folder, "lm1b", {"text": TEXT}, dict(train=train))
        copies.append(read_tfds("train", "lm1b", tmp_path / folder))

    assert copies[0][0].text != copies[1][0].text
    assert copies[0].fingerprint != copies[1].fingerprint


def test_tfds_not_prepared(copies, tmp_path):
    for name, data_dir in (
        ("lm1b", tmp_path),
        ("c4/de", copies),
        ("lm1b:9.9.9", copies),
        ("none", copies),
    ):
        dataset = name.split(":")[0]
        message = (
            f"no prepared copy of '{name}'.*"
            f"tfds build {dataset} --file_format=array_record --data_dir={re.escape(str(data_dir))}"
        )
        with pytest.raises(ValueError, match=message):
            read_tfds("train", name, data_dir)


def test_tfds_prepared_as_tfrecord(tmp_path):
    folder = prepare(tmp_path, "lm1b", {"text": TEXT}, dict(train=[{"text": "a"}] * 4))

    # The copy, renamed to what it would be as TFRecord.
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for file in folder.glob("*array_record*"):
        os.rename(file, str(file).replace("array_record", "tfrecord"))

    message = (
        "prepared as tfrecord; training reads array_record.*"
        "tfds build lm1b --file_format=array_record"
    )
    with pytest.raises(ValueError, match=message):
        read_tfds("train", "lm1b", tmp_path)


def test_tfds_errors(copies):
    with pytest.raises(ValueError, match=r"no feature 'body'; it has \['text'\]"):
        read_tfds("train", "lm1b", copies, text_key="body")
    with pytest.raises(ValueError, match="no feature 'label'"):
        read_tfds("train", "lm1b", copies, label_key="label")

    for split in ("validation", "validation[:10%]", "train[:x]"):
        with pytest.raises(ValueError, match=r"no split .*it has \['test', 'train'\]"):
            read_tfds(split, "lm1b", copies)
    with pytest.raises(ValueError, match="is empty"):
        read_tfds("train[:0]", "lm1b", copies)
