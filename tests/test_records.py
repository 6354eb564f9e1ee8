"""Records of files in each format."""

import json

import pytest

from lm.data import records

ROWS = [{"text": 'a, "b"\nc', "label": "x"}, {"text": "é ", "label": "y"}]


def test_formats_say_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.csv").write_text('text,label\n"a, ""b""\nc",x\né ,y\n')
    found = [
        list(records.load("a", path=str(tmp_path / f"{{split}}.{kind}")))
        for kind in ("jsonl", "json", "csv")
    ]
    assert all(one == ROWS for one in found)
    assert len({records.fingerprint(one) for one in found}) == 1
    assert (
        records.fingerprint(ROWS)
        != records.fingerprint(ROWS[::-1])
        != records.fingerprint(ROWS[:1])
    )


def test_tables_as_they_are_found(tmp_path):
    # quotes are text, as in GLUE's
    (tmp_path / "a.tsv").write_text('text\tlabel\n"It is bad\t0\nok "so so"\t1\n')
    assert records.load("", path=str(tmp_path / "a.tsv")) == [
        dict(text='"It is bad', label="0"),
        dict(text='ok "so so"', label="1"),
    ]
    (tmp_path / "a.csv").write_text("\ufefftext,label\n" + "x" * 200_000 + ",y\n\n")
    assert records.load("", path=str(tmp_path / "a.csv")) == [dict(text="x" * 200_000, label="y")]


def test_squad_and_parallel_texts(tmp_path):
    article = dict(
        title="T",
        paragraphs=[
            dict(
                context="C",
                qas=[
                    dict(
                        id="1",
                        question="Q",
                        answers=[dict(text="A", answer_start=0), dict(text="B")],
                    )
                ],
            )
        ],
    )
    (tmp_path / "a.json").write_text(json.dumps(dict(data=[article])))
    assert records.load("", path=str(tmp_path / "a.json")) == [
        dict(id="1", title="T", context="C", question="Q", answers=dict(text=["A", "B"]))
    ]
    (tmp_path / "val.en").write_text("one\n\nthree\n")
    (tmp_path / "val.de").write_text("eins\nzwei\ndrei")
    lines = {"en": str(tmp_path / "{split}.en"), "de": str(tmp_path / "{split}.de")}
    assert records.load("val", lines=lines) == [
        dict(en="one", de="eins"),
        dict(en="", de="zwei"),
        dict(en="three", de="drei"),
    ]
    (tmp_path / "val.de").write_text("eins\n")
    with pytest.raises(ValueError, match="differ in length: {'en': 3, 'de': 1}"):
        records.load("val", lines=lines)
    with pytest.raises(ValueError, match=r"no file for \['de'\]"):
        records.load("val", lines=lines | {"de": ""})


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text,label\nb\n", "row 2 has 1 columns, the first one, with their names, 2"),
        ("a.json", "[1]", "wanted a list of objects, or SQuAD's format"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", '{"data": [1]}', "wanted a list of objects, or SQuAD's format"),
        ("a.csv", "", "no records in"),
        (
            "a.json",
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1, "question": "q"}]}]}]}',
            "a question of SQuAD's format has no 'answers'",
        ),
        ("a.txt", "x", "wanted a file that ends in .jsonl, .json, .csv, .tsv"),
        ("a.csv", "text,label\n", "no records in"),
        ("a.jsonl", "[]\n", "a.jsonl:1 is a list; wanted an object"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        records.load("test", path=str(tmp_path / name))


def test_no_data():
    with pytest.raises(ValueError, match="no data: give source.path"):
        records.load("test", lines={"en": ""})
    with pytest.raises(ValueError, match="are both given; take one"):
        records.load("test", path="x", lines={"en": "y"})
