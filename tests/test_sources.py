"""Sources: plain text, JSONL, and TFDS copies, and what each says of bad input."""

import json
import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lm.data import records, sources

# --- text ---


def test_one_file_is_cut_by_characters(tmp_path):
    (tmp_path / "a.txt").write_text("é€😀abcdefg", encoding="utf-8")
    train, validation = (
        sources.text(s, path=str(tmp_path / "a.txt"), held_out=0.3) for s in ("train", "validation")
    )
    assert [d.text for d in train.items] == ["é€😀abcd"] and [d.text for d in validation.items] == [
        "efg"
    ]
    assert train.fingerprint != validation.fingerprint and train[0].label == ""


def test_several_files_are_documents(tmp_path):
    for name in "dabc":
        (tmp_path / f"{name}.txt").write_text(f"text {name}\n")
    (tmp_path / "empty.txt").write_text("")
    train, validation = (
        sources.text(s, path=str(tmp_path / "*.txt"), held_out=0.25)
        for s in ("train", "validation")
    )
    assert [d.text for d in train.items] == ["text a\n", "text b\n", "text c\n"] and [
        d.text for d in validation.items
    ] == ["text d\n"]
    assert len({d.name for d in train.items}) == 3 and "a.txt" in train[0].name


def test_separator_makes_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one<|>two<|><|>three\r\n<|>four")
    documents = [
        d
        for s in ("train", "validation")
        for d in sources.text(s, path=str(tmp_path / "a.txt"), held_out=0.5, separator="<|>").items
    ]
    # line ends stay as they are
    assert [d.text for d in documents] == ["one", "two", "three\r\n", "four"]
    assert len({d.name for d in documents}) == 4


def test_text_errors(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"):
        sources.text("train", path=str(tmp_path / "latin.txt"), held_out=0.1)
    with pytest.raises(ValueError, match="no file at .*none.txt"):
        sources.text("train", path=str(tmp_path / "none.txt"), held_out=0.1)
    with pytest.raises(ValueError, match="no path given"):
        sources.text("train", path="", held_out=0.1)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt has no documents"):
        sources.text("train", path=str(tmp_path / "empty.txt"), held_out=0.1)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match="split 'test'.*'validation'"):
        sources.text("test", path=str(tmp_path / "a.txt"), held_out=0.1)
    with pytest.raises(ValueError, match="no documents"):
        sources.text("validation", path=str(tmp_path / "a.txt"), held_out=0.0)


# --- JSONL ---


def write_jsonl(path, records):
    path.write_text(
        "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records),
        encoding="utf-8",
    )
    return str(path)


def test_jsonl_documents_and_labels(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"body": f"text {i}", "kind": i % 2} for i in range(3)]
        + ["\n"]
        + [{"body": "last", "kind": "x", "more": []}],
    )
    train, validation = (
        sources.jsonl(s, path=path, held_out=0.25, text_key="body", label_key="kind")
        for s in ("train", "validation")
    )
    assert [(d.text, d.label) for d in train.items] == [
        ("text 0", "0"),
        ("text 1", "1"),
        ("text 2", "0"),
    ]
    assert [(d.text, d.label) for d in validation.items] == [("last", "x")]
    assert validation[0].name.endswith("a.jsonl:5")  # its line in the file, the empty one counted
    assert sources.jsonl("train", path=path, held_out=0.25, text_key="body")[0].label == ""


def test_jsonl_file_for_each_split(tmp_path):
    for split in ("train", "dev"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(4)])
    documents = sources.jsonl("dev", path=str(tmp_path / "{split}.jsonl"), held_out=0.5)
    # held_out has no say
    assert [d.text for d in documents.items] == [f"dev {i}" for i in range(4)]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_jsonl_lines_end_at_newlines_only(tmp_path, separator):
    # Valid within a JSON string, and a line end to str.splitlines.
    text = f"one{separator}two"
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [json.dumps({"text": text}, ensure_ascii=False) + "\r\n", {"text": "next"}],
    )
    documents = sources.jsonl("train", path=path, held_out=0.0)
    assert [d.text for d in documents.items] == [text, "next"] and documents[1].name.endswith(":2")


def test_jsonl_errors(tmp_path):
    def read(content, **args):
        (tmp_path / "bad.jsonl").write_bytes(content)
        return sources.jsonl("train", path=str(tmp_path / "bad.jsonl"), held_out=0.0, **args)

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
        read(b'{"text": "a"}\n') and sources.jsonl(
            "test", path=str(tmp_path / "bad.jsonl"), held_out=0.5
        )


def test_jsonl_text_that_is_no_text(tmp_path):
    # Not the training text "None", and not a character that has no encoding.
    for value in ("null", r'"\ud800"'):
        (tmp_path / "bad.jsonl").write_text(f'{{"text": "a"}}\n{{"text": {value}}}\n')
        with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
            sources.jsonl("train", path=str(tmp_path / "bad.jsonl"), held_out=0.0)


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
    assert len({sources.fingerprint(v) for v in variants}) == len(variants)
    assert sources.fingerprint([document]) == sources.fingerprint([sources.Document(*document)])


# --- TFDS ---


def prepare(data_dir, name, features, records, *, version="1.1.0", config=None):
    """Writes {split: records} as a TFDS data set in ArrayRecord, and returns its folder."""
    members = dict(
        name=name,
        pkg_dir_path=None,
        VERSION=tfds.core.Version(version),
        _info=lambda self: tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        ),
        _split_generators=lambda self, dl_manager: {
            split: self._generate_examples(split) for split in records
        },
        _generate_examples=lambda self, split: enumerate(records[split]),
    )
    if config:
        members["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=config, version=version)]
    with tfds.core.registered.skip_registration():
        cls = type("Copy", (tfds.core.GeneratorBasedBuilder,), members)
    builder = cls(
        data_dir=str(data_dir), file_format="array_record", **({"config": config} if config else {})
    )
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=2, try_download_gcs=False)
    )
    return builder.data_path


TEXT = tfds.features.Text()


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """Copies as `tfds build` leaves them: lm1b, two versions of it, and a configuration of c4 with
    its features.
    """
    root = tmp_path_factory.mktemp("tfds")
    for version in ("1.1.0", "1.10.0", "1.2.0"):
        splits = {
            "train": [{"text": f"{version} sentence {i} é"} for i in range(10)],
            "test": [{"text": f"test {i}"} for i in range(3)],
        }
        prepare(root, "lm1b", {"text": TEXT}, splits, version=version)
    keys = ("text", "url", "timestamp", "content-length", "content-type")
    prepare(
        root,
        "c4",
        {key: TEXT for key in keys},
        {"train": [{key: f"{key} {i}" for key in keys} for i in range(10)]},
        version="3.1.0",
        config="en",
    )
    prepare(
        root,
        "labelled",
        {"text": TEXT, "kind": tfds.features.ClassLabel(names=["no", "yes"]), "name": TEXT},
        {"train": [{"text": f"t{i}", "kind": i % 2, "name": f"n{i}"} for i in range(4)]},
    )
    return root


def test_tfds_by_name_version_and_slice(copies):
    read = lambda split, name: [
        d.text for d in sources.tfds(split, name=name, data_dir=str(copies)).items
    ]
    # the newest, as numbers
    assert read("train", "lm1b") == [f"1.10.0 sentence {i} é" for i in range(10)]
    assert read("train", "lm1b:1.2.0")[0] == "1.2.0 sentence 0 é"
    assert read("test", "lm1b:1.1.0") == ["test 0", "test 1", "test 2"]
    whole = read("train", "lm1b")
    assert (
        read("train[:80%]", "lm1b") == whole[:8]
        and read("train[80%:]", "lm1b") == whole[8:]
        and read("train[3:7]", "lm1b") == whole[3:7]
    )
    assert "tensorflow" not in sys.modules


def test_tfds_configuration_and_features(copies):
    for name in ("c4/en", "c4/en:3.1.0"):
        documents = sources.tfds("train", name=name, data_dir=str(copies))
        assert [d.text for d in documents.items] == [f"text {i}" for i in range(10)] and len(
            documents
        ) == 10
        assert len({d.name for d in documents.items}) == 10
    assert (
        sources.tfds("train", name="c4/en", data_dir=str(copies), text_key="url")[3].text == "url 3"
    )
    labelled = sources.tfds("train", name="labelled", data_dir=str(copies), label_key="kind")
    assert [tuple(d) for d in labelled.items] == [
        (f"t{i}", f"n{i}", ("no", "yes")[i % 2]) for i in range(4)
    ]
    with pytest.raises(IndexError):
        labelled[4]
    assert list(labelled) == list(labelled.items)


def test_tfds_records(tmp_path):
    """As JSON has them: text, lists, labels by name, whatever else as it is."""
    kind = tfds.features.ClassLabel(names=["no", "yes"])
    answers = tfds.features.Sequence({"text": TEXT, "answer_start": np.int32})
    rows = [
        {
            "q": "é?",
            "answers": {"text": ["a", "bé"], "answer_start": [3, 1]},
            "kind": kind,
            "n": 5,
            "tags": [1, 0],
        }
        for kind in ("yes", "no", -1)
    ]
    prepare(
        tmp_path,
        "qa",
        {
            "q": TEXT,
            "answers": answers,
            "kind": kind,
            "n": np.int64,
            "tags": tfds.features.Sequence(kind),
        },
        {"test": rows},
    )
    found = records.load("test", tfds="qa", data_dir=str(tmp_path))
    assert list(found) == [rows[0], rows[1], rows[2]] and len(found) == 3  # -1: no label
    assert (
        json.loads(json.dumps(found[0])) == rows[0]
        and list(records.load("test[1:]", tfds="qa", data_dir=str(tmp_path))) == rows[1:]
    )
    with pytest.raises(ValueError, match="no prepared copy of 'other'"):
        records.load("test", tfds="other", data_dir=str(tmp_path))


def test_tfds_fingerprint_follows_what_is_read(copies, tmp_path):
    read = lambda split="train", data_dir=copies, **args: (
        sources.tfds(split, name="labelled", data_dir=str(data_dir), **args).fingerprint
    )
    lm1b = lambda split, name: sources.tfds(split, name=name, data_dir=str(copies)).fingerprint
    assert read() == read()
    prints = [
        read(),
        read(label_key="kind"),
        read(text_key="name"),
        read("train[:2]"),
        read("train[2:]"),
        lm1b("train", "lm1b:1.1.0"),
        lm1b("train", "lm1b"),
        lm1b("test", "lm1b"),
        lm1b("train[:3]", "lm1b"),
    ]
    assert len(set(prints)) == len(prints)
    prepare(tmp_path, "labelled", {"text": TEXT}, {"train": [{"text": "t"}] * 5})
    assert read(data_dir=tmp_path) != read()


def test_tfds_fingerprint_follows_content(tmp_path):
    # The same name, version and number of examples: only the sentences differ.
    for folder in ("a", "b"):
        prepare(
            tmp_path / folder,
            "lm1b",
            {"text": TEXT},
            {"train": [{"text": f"sentence {folder} {i}"} for i in range(4)]},
        )
    a, b = (
        sources.tfds("train", name="lm1b", data_dir=str(tmp_path / folder)) for folder in ("a", "b")
    )
    assert a[0].text != b[0].text and a.fingerprint != b.fingerprint


def test_tfds_not_prepared(copies, tmp_path):
    for name, where in (
        ("lm1b", tmp_path),
        ("c4/de", copies),
        ("lm1b:9.9.9", copies),
        ("none", copies),
    ):
        with pytest.raises(
            ValueError,
            match=rf"no prepared copy of '{name}'.*tfds build {name.split(':')[0]} --file_format=array_record",  # noqa: E501
        ):
            sources.tfds("train", name=name, data_dir=str(where))


def test_tfds_prepared_as_tfrecord(tmp_path):
    folder = prepare(tmp_path, "lm1b", {"text": TEXT}, {"train": [{"text": "a"}] * 4})
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for file in folder.glob("*array_record*"):
        os.rename(file, str(file).replace("array_record", "tfrecord"))
    with pytest.raises(
        ValueError,
        match=(
            "prepared as tfrecord; training reads array_record.*tfds build lm1b "
            "--file_format=array_record"
        ),
    ):
        sources.tfds("train", name="lm1b", data_dir=str(tmp_path))


def test_tfds_errors(copies):
    with pytest.raises(ValueError, match=r"no feature 'body'; it has \['text'\]"):
        sources.tfds("train", name="lm1b", data_dir=str(copies), text_key="body")
    with pytest.raises(ValueError, match="no feature 'label'"):
        sources.tfds("train", name="lm1b", data_dir=str(copies), label_key="label")
    for split in ("validation", "validation[:10%]", "train[:x]"):
        with pytest.raises(ValueError, match=r"no split .*it has \['test', 'train'\]"):
            sources.tfds(split, name="lm1b", data_dir=str(copies))
    with pytest.raises(ValueError, match="is empty"):
        sources.tfds("train[:0]", name="lm1b", data_dir=str(copies))
