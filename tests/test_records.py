"""Records of files in each format."""

import csv
import gzip
import json

import pyarrow
import pytest

from lm.data import records

ROWS = [{"text": 'a, "b"\nc', "label": "x"}, {"text": "é ", "label": "y"}]


def load(path, split=""):
    return records.load(split, path=str(path))


# --- formats ---


def test_formats_say_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.csv").write_text('text,label\n"a, ""b""\nc",x\né ,y\n')

    for extension in ("jsonl", "json", "csv"):
        table = load(tmp_path / f"{{split}}.{extension}", split="a")
        assert list(table) == ROWS
        assert records.fingerprint(table) == records.fingerprint(ROWS)


def test_fingerprint_follows_rows_and_their_order():
    whole = records.fingerprint(ROWS)

    assert records.fingerprint(ROWS[::-1]) != whole
    assert records.fingerprint(ROWS[:1]) != whole
    assert records.fingerprint(ROWS[:1]) != records.fingerprint(ROWS[::-1])


def test_quotes_around_fields_of_a_tsv(tmp_path):
    """As csv, and so pandas, writes them; a file with any other quote is as it stands."""
    rows = [["text", "label"], ['a "b" c', "1"], ["a\tb", "2"], ["two\nlines", "3"], ["plain", "4"]]
    with open(tmp_path / "a.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    wanted = [dict(zip(rows[0], row)) for row in rows[1:]]
    assert records.read_table(str(tmp_path / "a.tsv")) == wanted

    for text in ('"Great film"', 'a "good" film', '"a', 'a"', '""'):
        (tmp_path / "b.tsv").write_text(f"text\tlabel\n{text}\t1\n")
        assert records.read_table(str(tmp_path / "b.tsv")) == [dict(text=text, label="1")]


@pytest.mark.parametrize("name, text", [("a.csv", "x,y,x\n1,2,3\n"), ("a.tsv", "x\tx\n1\t2\n")])
def test_doubled_headers(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: the column 'x' is there twice"):
        records.read_table(str(tmp_path / name))


def test_quotes_in_a_tsv_are_text(tmp_path):
    # As in GLUE's files.
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"It is bad\t0\nok "so so"\t1\n')

    first, second = load(path)

    assert first == dict(text='"It is bad', label="0")
    assert second == dict(text='ok "so so"', label="1")


def test_csv_with_byte_order_mark_and_long_field(tmp_path):
    # Above the csv module's own limit of 128 KiB a field.
    text = "x" * 200_000
    path = tmp_path / "a.csv"
    path.write_text(f"\ufefftext,label\n{text},y\n\n")

    assert load(path) == [dict(text=text, label="y")]


def test_packed_tables_in_a_folder(tmp_path):
    half = [json.dumps(row) for row in ROWS]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(half[0].encode()))
    (tmp_path / "b.csv").write_bytes("text,label\né ,y\n".encode("utf-16"))
    (tmp_path / "c.json.zst").write_bytes(
        pyarrow.compress(f"[{half[0]}]".encode(), codec="zstd", asbytes=True)
    )
    (tmp_path / "README.md").write_text("no table")

    assert load(tmp_path) == [ROWS[0], ROWS[1], ROWS[0]]


def test_squad(tmp_path):
    question = dict(id="1", question="Q", answers=[dict(text="A", answer_start=0), dict(text="B")])
    article = dict(title="T", paragraphs=[dict(context="C", qas=[question])])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(dict(data=[article])))

    assert load(path) == [
        dict(id="1", title="T", context="C", question="Q", answers=dict(text=["A", "B"]))
    ]


def test_parallel_texts(tmp_path):
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


# --- errors ---

QUESTION_WITHOUT_ANSWERS = (
    '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1, "question": "q"}]}]}]}'
)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text,label\nb\n", "row 2 has 1 columns, the first one, with their names, 2"),
        ("a.json", "[1]", "wanted a list of objects, or SQuAD's format"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", '{"data": [1]}', "wanted a list of objects, or SQuAD's format"),
        ("a.csv", "", "no records in"),
        ("a.json", QUESTION_WITHOUT_ANSWERS, "a question of SQuAD's format has no 'answers'"),
        ("a.txt", "x", "wanted a file that ends in .jsonl, .json, .csv, .tsv"),
        ("a.csv", "text,label\n", "no records in"),
        ("a.jsonl", "[]\n", "a.jsonl:1 is a list; wanted an object"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=message):
        load(tmp_path / name, split="test")


def test_no_data():
    with pytest.raises(ValueError, match="no data: give source.path"):
        records.load("test", lines={"en": ""})
    with pytest.raises(ValueError, match="are both given; take one"):
        records.load("test", path="x", lines={"en": "y"})
