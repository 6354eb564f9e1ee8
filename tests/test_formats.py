"""Every format is read as it is meant. What can't be read is counted, and listed by its place."""

import bz2
import functools
import gzip
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from lm.prepare import collect, extract, formats, pipeline
from lm.prepare import config as prepare_config
from lm.prepare.shards import Document
from tests import fuzz_prepare
from tests.fuzz_prepare import bad, chunked, http, page, warc_record, wiki_page
from tests.helpers import slow
from tests.tfds_copies import TEXT, prepare, tfds

PACK = {"plain": bytes, "gz": gzip.compress, "bz2": bz2.compress, "zst": zstandard.compress}


@pytest.fixture
def read(tmp_path):
    """(content of a file, or its path; its format; keys) -> (documents, report)"""

    def read_(content, format, name="file", **keys):
        path = content
        if isinstance(content, bytes):
            path = tmp_path / name
            path.write_bytes(content)
        return fuzz_prepare.read_file(path, format, tmp_path / "shards", **keys)

    return read_


def texts(documents):
    return [document.text for document in documents]


def places(report):
    """Kind and place of what is listed, without the file's folder."""
    return [(entry["kind"], os.path.basename(entry["place"])) for entry in report["listed"]]


def encodings(report):
    """{encoding: how often} of what was not UTF-8."""
    found = {}
    for what, by in report["counts"].items():
        if what.startswith("encoding."):
            found[what.removeprefix("encoding.")] = sum(by.values())
    return found


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# --- text ---


def test_a_text_file_is_a_document(read, tmp_path):
    (document,), report = read("Grüße\r\n\r\n日本".encode(), "text", "a.txt", licence="MIT")

    path = f"{tmp_path}/a.txt"
    assert document == Document(f"s:{path}:0", "Grüße\r\n\r\n日本", "s", path, licence="MIT")
    assert report["counts"]["bytes"] == {"s": 17}
    assert report["counts"]["licence.MIT"] == {"s": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_file_is_divided(read, encoding):
    before = "one\n--\n\n--\n\n--\n"
    content = f"{before}two é\n--\n".encode(encoding)
    documents, report = read(content, "text", separator="\n--\n")

    assert texts(documents) == ["one", "two é"]
    assert documents[1].id.endswith(f"file:{len(before.encode(encoding))}")
    assert not bad(report)
    assert sum(encodings(report).values()) == (0 if encoding.startswith("utf-8") else 4)


class SmallPieces:
    """A stream of which few bytes are read at once."""

    def __init__(self, stream, draw):
        self._stream, self._draw = stream, draw
        self.peek, self.read = stream.peek, stream.read

    def read1(self, size):
        return self._stream.read1(self._draw.randint(1, 3))


def test_parts_are_those_of_split(tmp_path):
    """Whatever lies on the border of what is read at once."""
    draw = random.Random(0)
    path = tmp_path / "file"
    for _ in range(300):
        content = "".join(draw.choices("ab-", k=draw.randrange(30))).encode()
        path.write_bytes(content)
        most = draw.randrange(1, 12)
        wanted = []
        offset = 0
        for part in content.split(b"--"):
            wanted.append((offset, part if len(part) <= most else None))
            offset += len(part) + 2
        if wanted[-1][1] == b"":
            wanted.pop()

        with formats.open_unpacked(str(path)) as stream:
            got = list(formats.parts(SmallPieces(stream, draw), "--", most))
        assert got == wanted, (content, most)


# --- tables ---

RECORDS = [
    {"text": "one", "label": "a", "url": "http://a", "lang": "de"},
    {"text": "zwei\n\u2028é", "label": 2, "url": "http://b", "lang": None},
    {"text": "three", "label": True, "url": 1.5, "lang": "en"},
]
KEYS = dict(label_key="label", name_key="url", language_key="lang")
WANTED = [
    ("one", "a", "http://a", "de"),
    ("zwei\n\u2028é", "2", "http://b", ""),
    ("three", "True", "1.5", "en"),
]


def fields(documents):
    return [(d.text, d.label, d.name, d.language) for d in documents]


@pytest.mark.parametrize("packed", [*PACK])
def test_jsonl(read, tmp_path, packed):
    pack = PACK[packed]
    content = pack(lines(RECORDS[0]) + b"\n \n") + pack(lines(*RECORDS[1:]))
    documents, report = read(content, "jsonl", **KEYS)

    assert fields(documents) == WANTED
    assert documents[1].id == f"s:{tmp_path}/file:{len(lines(RECORDS[0])) + 3}"
    assert not bad(report)
    assert report["counts"]["missing.language"] == {"s": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_csv(read, encoding):
    content = 'text,label,url,lang\r\none,a,http://a,de\r\n\r\n"zwei\n\u2028é",2,http://b,\r\n'
    content += '"th""r,ee",True,1.5,en'
    content = ("\ufeff" if encoding == "utf-16-be" else "") + content
    documents, report = read(content.encode(encoding), "csv", **KEYS)

    assert fields(documents) == [*WANTED[:2], ('th"r,ee', "True", "1.5", "en")]
    assert documents[1].id.endswith("file:row 4")
    assert not bad(report)


def test_parquet(read, tmp_path):
    records = [{key: value and str(value) for key, value in record.items()} for record in RECORDS]
    table = pyarrow.Table.from_pylist(records).append_column("more", [[1, 2, 3]])
    encoded = table.set_column(0, "text", table["text"].dictionary_encode())
    large = table.set_column(0, "text", table["text"].cast(pyarrow.large_string()))
    as_bytes = table.set_column(0, "text", table["text"].cast(pyarrow.binary()))

    path = tmp_path / "a.parquet"
    for each in (table, encoded, large, as_bytes, table.select(table.column_names[::-1])):
        pyarrow.parquet.write_table(each, path, row_group_size=2)
        documents, report = read(path, "parquet", **KEYS)
        assert fields(documents) == WANTED
        assert documents[2].id == f"s:{path}:2"
        assert not bad(report)


def test_a_tfds_data_set(read, tmp_path):
    features = {
        "text": TEXT,
        "label": tfds.features.ClassLabel(names=["good", "bad"]),
        "number": tfds.features.Scalar(np.int64),
    }
    records = [{"text": f"tëxt {i}", "label": i % 2, "number": i} for i in range(5)]
    records.append({"text": "schön, né".encode("latin-1"), "label": -1, "number": 5})
    prepare(tmp_path, "tiny", features, {"train": records})

    # A task reads a range of them.
    keys = dict(data_dir=str(tmp_path), label_key="label", name_key="number")
    documents, report = read("tiny", "tfds", unit="tiny[1:6]", **keys)

    assert texts(documents)[:4] == [f"tëxt {i}" for i in range(1, 5)]
    assert [document.label for document in documents] == ["bad", "good", "bad", "good", ""]
    assert [document.name for document in documents] == ["1", "2", "3", "4", "5"]
    assert documents[0].id == "s:tiny:1"
    assert texts(documents)[4].startswith("sch")
    assert sum(encodings(report).values()) == 1


def test_a_hugging_face_data_set(read, tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(*[dict(record, label="x") for record in RECORDS[:2]]))

    keys = KEYS | dict(unit=f"{folder}[0:2]")
    documents, report = read(folder, "hugging_face", **keys)
    assert fields(documents) == [
        ("one", "x", "http://a", "de"),
        (WANTED[1][0], "x", *WANTED[1][2:]),
    ]
    assert not bad(report)


# --- pages ---

TEXTS = [f"This is text number {i} of them, which is naïve. It goes on and on." for i in range(5)]


def in_page(text):
    return "\n\n".join([text] * 3)


@pytest.mark.parametrize("extractor", ["resiliparse", slow("trafilatura")])
def test_html(read, extractor):
    (document,), report = read(page(TEXTS[0]), "html", extractor=extractor)
    wanted = in_page(TEXTS[0]).split()
    # trafilatura takes the small menu of the small page for text.
    assert document.text.removeprefix("- home").removeprefix("home").split() == wanted
    assert not bad(report) and not encodings(report)

    latin = page(TEXTS[0], "<meta charset=iso-8859-1>").decode().encode("latin-1")
    (again,), report = read(latin, "html", extractor=extractor)
    assert again.text == document.text
    assert encodings(report) == {"cp1252": 1}


@pytest.mark.parametrize("packed", [*PACK])
def test_warc(read, packed):
    deflated = zlib.compress(page(TEXTS[1]))
    records = [
        warc_record("warcinfo", b"software: x\r\n", "application/warc-fields"),
        warc_record(
            "response",
            http(
                chunked(gzip.compress(page(TEXTS[0]))),
                headers=TRANSFER + "Content-Encoding: gzip\r\n",
            ),
        ),
        warc_record("response", http(deflated, headers="Content-Encoding: deflate\r\n")),
        warc_record("request", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        warc_record("response", http(page(TEXTS[2]).decode().encode("latin-1"), LATIN)),
        warc_record("response", http(TEXTS[3].encode(), "text/plain")),
        warc_record("response", b"a.b 1.2.3.4", "text/dns"),
        warc_record("response", http(b"\x89PNG", "image/png")),
        warc_record("resource", page(TEXTS[3]), "text/html"),
        warc_record("conversion", TEXTS[4].encode(), "text/plain"),
    ]
    documents, report = read(b"".join(map(PACK[packed], records)), "warc")

    found = [" ".join(document.text.split()) for document in documents]
    pages = [" ".join(in_page(text).split()) for text in TEXTS[:4]]
    assert found == [*pages[:3], TEXTS[3], pages[3], TEXTS[4]]
    assert not bad(report)
    assert encodings(report) == {"cp1252": 1}
    assert report["counts"]["other_type"] == {"s": 2}
    # Offsets are those of the unpacked file.
    assert documents[0].id.endswith(f"file:{len(records[0])}")
    assert {document.name for document in documents} == {"http://a.b/c"}


TRANSFER = "Transfer-Encoding: chunked\r\n"
LATIN = "text/html; charset=ISO-8859-1"


def test_archives_that_say_packed_and_are_not(read):
    """Some crawlers store what they unpacked, with the headers that it had."""
    headers = TRANSFER + "Content-Encoding: gzip\r\n"
    (document,), report = read(
        warc_record("response", http(page(TEXTS[0]), headers=headers)), "warc"
    )
    assert document.text.split() == in_page(TEXTS[0]).split()
    assert not bad(report)


def test_wikipedia(read):
    wikitext = fuzz_prepare.WIKITEXT
    pages = [
        wiki_page("Eins", wikitext.format("Eins", TEXTS[0])),
        wiki_page("Zwei", "#WEITERLEITUNG [[Eins]]", extra='<redirect title="Eins" />'),
        wiki_page("Diskussion:Eins", "weg", ns="1"),
        wiki_page("Drei & mehr", "weg").replace(
            "</page>", "<revision><text>neu</text></revision></page>"
        ),
    ]
    dump = fuzz_prepare.DUMP.replace("PAGES", "".join(pages).replace("Drei &", "Drei &amp;"))
    wanted = f"Eins ist ein Ort bei Köln.\nKopf\n\n {TEXTS[0]} Netz"

    for content in (dump, dump.replace(XMLNS, ""), dump.replace("<ns>0</ns>", "")):
        documents, report = read(bz2.compress(content.encode()), "wikipedia")
        assert [document.name for document in documents] == ["Eins", "Drei & mehr"]
        assert documents[0].text.split() == wanted.split()
        # Of several revisions the newest one.
        assert documents[1].text == "neu"
        assert not bad(report)
        assert report["counts"]["no_article"] == {"s": 2}


XMLNS = ' xmlns="http://www.mediawiki.org/xml/export-0.11/"'


# --- source trees ---

GPL_3 = (
    "GNU GENERAL PUBLIC LICENSE Version 3 ... 13. Use with the GNU Affero General Public License."
)
BSD = "Redistributions in binary form must reproduce the above copyright notice."
LICENCES = {
    GPL_3: "GPL",
    "GNU LESSER GENERAL\n PUBLIC LICENSE ... the GNU General Public License": "LGPL",
    "GNU AFFERO GENERAL PUBLIC LICENSE, as the GNU General Public License": "AGPL-3.0",
    "Apache License\n   Version 2.0, January 2004": "Apache-2.0",
    BSD: "BSD-2-Clause",
    f"{BSD} Neither the name of the holder": "BSD-3-Clause",
    "Permission is hereby granted, free of charge, to any person": "MIT",
    "All rights reserved": "",
}


def test_licences_are_found_by_what_they_say():
    assert {text: formats.licence_of(text) for text in LICENCES} == LICENCES


def test_source_trees(read, tmp_path):
    tree = tmp_path / "tree"
    (tree / "vendor/gpl/src").mkdir(parents=True)
    (tree / "LICENSE.txt").write_text("Permission is hereby granted, free of charge, to you")
    (tree / "vendor/gpl/COPYING").write_text(GPL_3)
    for name in ("a.py", "vendor/b.c", "vendor/gpl/src/c.c"):
        (tree / name).write_text(f"# {name}")

    (document,), _ = read(tree / "vendor/b.c", "code")
    assert (document.text, document.licence, document.language) == ("# vendor/b.c", "MIT", ".c")
    (document,), report = read(tree / "vendor/gpl/src/c.c", "code")
    assert document.licence == "GPL"
    assert report["counts"]["licence.GPL"] == {"s": 1}

    documents, report = read(tree / "vendor/gpl/src/c.c", "code", licences=("MIT", "ISC"))
    assert not documents
    assert report["counts"]["dropped.licence"] == {"s": 1}


# --- buckets ---


class BucketFile(AbstractBufferedFile):
    """A file as gcsfs has it: its readline takes no limit, and it can't be looked into ahead."""

    def _fetch_range(self, start, end):
        return self.fs.store[self.path].getvalue()[start:end]


class Bucket(MemoryFileSystem):
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            return BucketFile(self, path, mode)
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: bucket)
    bucket.store.clear()
    return bucket


def test_files_of_a_bucket_are_found(bucket):
    for name in ("b.jsonl.gz", "a.jsonl", "c.md", "deep/d.jsonl"):
        bucket.pipe(f"gs://bucket/{name}", b"12345")
    for pattern, names in (
        ("gs://bucket", ["a.jsonl", "b.jsonl.gz", "deep/d.jsonl"]),
        ("gs://bucket/**/*.jsonl", ["a.jsonl", "deep/d.jsonl"]),
    ):
        c = prepare_config.default()
        c.sources.s = prepare_config.source("jsonl", pattern)
        (stage,) = collect.stages(c)
        (task,) = stage.plan(None)
        assert task["files"] == [f"gs://bucket/{name}" for name in names]
        assert stage.reads[0][0][:3] == ["s", "gs://bucket/a.jsonl", 5]


def test_a_set_in_a_bucket_is_the_one_in_a_folder(bucket, tmp_path):
    """Made there, made again over an older one, and found whole."""
    (tmp_path / "a.jsonl").write_bytes(lines(*[{"text": f"text {i} " * 9} for i in range(90)]))
    c = prepare_config.default()
    c.workers = 1
    c.sources.s = prepare_config.source("jsonl", str(tmp_path / "a.jsonl"))
    c.stages = ("collect", "exact_duplicates", "tokenizer", "write")
    c.tokenizer.vocab_size = 280
    folder = pipeline.prepare(c, epath.Path(tmp_path / "out"))
    for _ in range(2):
        bucket.pipe("gs://bucket/out/corpus/1.0.0/left.txt", b"of an older one")
        pipeline.prepare(c, epath.Path("gs://bucket/out"))
        bucket.rm("gs://bucket/out/corpus/1.0.0/card.json")
    pipeline.prepare(c, epath.Path("gs://bucket/out"))

    found = {}
    for path in bucket.find("gs://bucket/out/corpus/1.0.0"):
        name = path.partition("/1.0.0/")[2]
        found[name] = bucket.cat(f"gs://{path.lstrip('/')}")
    names = [str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()]
    assert sorted(found) == sorted(names)
    assert all(content == (folder / name).read_bytes() for name, content in found.items())


@pytest.mark.parametrize("name", [*fuzz_prepare.FILES])
def test_a_bucket_gives_what_a_folder_gives(read, bucket, name):
    format, keys, make = fuzz_prepare.FILES[name]
    content = make(random.Random(0))
    bucket.pipe("gs://bucket/file", content)

    there, _ = read("gs://bucket/file", format, **keys)
    here, report = read(content, format, **keys)
    assert texts(there) == texts(here) and here
    assert there[-1].id.startswith("s:gs://bucket/file:")
    assert not bad(report)


# --- encodings ---

RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему. " * 3
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 3


@pytest.mark.parametrize(
    "text, encoding",
    [(RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (JAPANESE, "shift_jis"), (JAPANESE, "euc_jp")],
)
def test_encodings_are_detected_and_counted(read, text, encoding):
    (document,), report = read(text.encode(encoding), "text")
    assert document.text == text
    assert sum(encodings(report).values()) == 1
    (sample,) = report["samples"][f"encoding.{[*encodings(report)][0]}"]
    assert sample[2] == text[:200]

    documents, report = read(text.encode(encoding), "text", encodings="utf-8")
    assert not documents
    assert bad(report) == {"encoding": 1}


def test_a_file_of_lines_has_one_encoding(read):
    """Of a short line alone, nobody could say."""
    content = json.dumps({"text": RUSSIAN}, ensure_ascii=False) + '\n{"text": "где"}\n'
    documents, report = read(content.encode("cp1251"), "jsonl")
    assert texts(documents) == [RUSSIAN, "где"]
    assert encodings(report) == {"cp1251": 2}

    documents, report = read(f'text,n\n"{RUSSIAN}",1\nгде,2\n'.encode("cp1251"), "csv")
    assert texts(documents) == [RUSSIAN, "где"]
    assert encodings(report) == {"cp1251": 1}
    documents, report = read(f"{RUSSIAN}\n\nгде".encode("cp1251"), "text", separator="\n\n")
    assert texts(documents) == [RUSSIAN, "где"]


def test_a_line_in_another_encoding_than_its_file(read):
    rows = [f"текст {i},{i}\n".encode() for i in range(20_000)]
    wrong = len(rows) - 3
    rows[wrong] = f'"{RUSSIAN}",x\n'.encode("cp1251")
    documents, report = read(b"text,n\n" + b"".join(rows), "csv")
    assert len(documents) == len(rows)
    assert texts(documents)[wrong - 1 : wrong + 2] == [
        f"текст {wrong - 1}",
        RUSSIAN,
        f"текст {wrong + 1}",
    ]
    assert encodings(report) == {"cp1251": 1}


@pytest.mark.parametrize("charset", ["unicode_escape", "punycode", "zlib", "idna", "undefined"])
def test_charsets_that_no_page_has(read, charset):
    """Python's codecs are more than encodings."""
    body = http(b"x" * 100 + b"\\u0041\xff", f"text/plain; charset={charset}")
    documents, report = read(warc_record("response", body), "warc")
    assert "\\u0041" in documents[0].text
    assert sum(encodings(report).values()) == 1 and charset not in encodings(report)


# --- bad input ---

TRUNCATED = [
    ("jsonl", fuzz_prepare.jsonl, "gz"),
    ("jsonl", fuzz_prepare.jsonl, "bz2"),
    ("jsonl", fuzz_prepare.jsonl, "zst"),
    ("csv", fuzz_prepare.csv, "gz"),
    ("text", fuzz_prepare.jsonl, "zst"),
    ("html", lambda draw: page(TEXTS[0]), "gz"),
    ("warc", lambda draw: b"".join(fuzz_prepare.warc(draw)), "gz"),
    ("warc", lambda draw: b"".join(fuzz_prepare.warc(draw)), "plain"),
    ("wikipedia", fuzz_prepare.wikipedia, "bz2"),
    ("wikipedia", fuzz_prepare.wikipedia, "plain"),
    ("parquet", fuzz_prepare.parquet, "plain"),
]


@pytest.mark.parametrize("format, make, packed", TRUNCATED)
def test_a_file_that_is_cut_off(read, tmp_path, format, make, packed):
    content = PACK[packed](make(random.Random(0)))
    for size in (len(content) - 3, len(content) // 2, 20):
        documents, report = read(content[:size], format)
        assert set(bad(report)) & {"damaged", "cut_off"}, size
        assert report["listed"][-1]["place"].startswith(f"{tmp_path}/file")
        with pytest.raises(ValueError, match=f"{tmp_path}/file.*config.bad_input = 'list' goes on"):
            read(content[:size], format, bad_input="stop")


@pytest.mark.parametrize("packed", ["gz", "bz2", "zst"])
def test_what_is_before_the_damage_is_read(read, packed):
    draw = random.Random(0)
    records = lines(*[{"text": draw.randbytes(300).hex()} for i in range(5000)])
    whole = PACK[packed](records)

    documents, report = read(whole[: len(whole) * 2 // 3], "jsonl")
    assert 2000 < len(documents) < 4000
    assert "behind 1," in report["listed"][0]["why"] or "behind 2," in report["listed"][0]["why"]
    # A second part that is no longer one: all of the first part was read, but for its end.
    documents, report = read(whole + b"?" + whole, "jsonl")
    assert 4990 < len(documents) <= 5000
    assert bad(report)["damaged"] == 1


def test_jsonl_lines_that_are_none(read):
    good = lines({"text": "good"})
    wrong = [b'{"text": "cut', b"[1]", b"nope", b'{"text": "\xff\xfe\x00"}', b"[" * 100_000]
    wrong += [
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": 1}',
        b'{"text": ["a"]}',
        b'{"body": "a"}',
    ]
    wrong += [
        b'{"text": "a", "label": {}}',
        b'{"text": null}',
        b'{"text": " \\n"}',
        b'{"text": true}',
    ]
    kinds = ["not_json"] * 3 + ["encoding"] + ["not_json"] * 2 + ["type"] * 2 + ["no_text", "type"]
    kinds += ["empty", "empty", "type"]

    content = b"".join(good + line + b"\n" for line in wrong) + good
    documents, report = read(content, "jsonl", label_key="label")
    assert texts(documents) == ["good"] * (len(wrong) + 1)
    wanted = []
    offset = 0
    for kind, line in zip(kinds, wrong):
        wanted.append((kind, f"file:{offset + len(good)}"))
        offset += len(good) + len(line) + 1
    assert sorted(places(report)) == sorted(wanted)
    for line in wrong:
        with pytest.raises(ValueError, match="file:0: .*config.bad_input"):
            read(line, "jsonl", label_key="label", bad_input="stop")


def test_csv_rows_that_are_none(read):
    good, large = b"good,1\n", b"x" * 200_000
    rows = [b"short\n", b"long,1,2\n", b'"a"b,1\n', b'"' + large + b'\n",1\n', large + b",2\n"]
    content = b"text,n\n" + b"".join(good + row for row in rows) + good
    documents, report = read(content, "csv", max_document_mb=0.1)
    assert texts(documents) == ["good"] * 6
    assert places(report) == [("not_csv", f"file:row {number}") for number in (3, 5, 7, 9, 11)]

    # Nobody knows where a quote ends that isn't closed.
    documents, report = read(content + b'"open,1\n' + good, "csv", max_document_mb=0.1)
    assert texts(documents) == ["good"] * 6
    assert places(report)[-1] == ("not_csv", "file:row 13")
    for content in (b'"a\n', "text\nб".encode("utf-16")[:-1]):
        documents, report = read(content, "csv")
        assert not documents and bad(report) == {"not_csv": 1}
    for content in (b"text,text\na,b\n", b"body,n\na,1\n"):
        documents, report = read(content, "csv")
        assert not documents and bad(report) == {"no_text": 1}
    assert not read(b"", "csv")[1]["listed"]


def test_parquet_columns_of_another_type(read, tmp_path):
    path = tmp_path / "a.parquet"
    values = [["a"], [1], [2.5], [{"b": 1}], [True], [b"\x01\x00\xff"], [None]]
    for value, kind in zip(values, ["", *["type"] * 4, "encoding", "empty"]):
        pyarrow.parquet.write_table(pyarrow.table({"text": value}), path)
        documents, report = read(path, "parquet")
        assert texts(documents) == ([] if kind else value)
        assert bad(report) == ({kind: 1} if kind else {})

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    assert bad(read(path, "parquet")[1]) == {"no_text": 1}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "é" * 60_000]}), path)
    documents, report = read(path, "parquet", max_document_mb=0.1)
    assert texts(documents) == ["a"]
    assert places(report) == [("too_large", "a.parquet:1")]
    # Text that says that it is UTF-8, and is not.
    wrong = pyarrow.array([b"good", "schön, né".encode("latin-1")]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), path)
    documents, report = read(path, "parquet")
    assert texts(documents)[0] == "good" and len(documents) == 2
    assert sum(encodings(report).values()) == 1


def test_halves_of_surrogate_pairs(read, tmp_path):
    content = lines({"text": "a\ud800b", "label": "\udc00", "url": "c\ud800"})
    name = os.fsdecode(b"caf\xe9")
    (document,), report = read(content, "jsonl", name, label_key="label", name_key="url")
    assert document.text == "a\ufffd\ufffd\ufffdb"
    assert report["counts"]["surrogates"] == {"s": 1}
    assert document.id.startswith(f"s:{tmp_path}/caf")


# Records of a WARC file that are none -> the kinds that are listed, each with its place.
WRONG_RECORDS = {
    "cut": (warc_record("response", http(page(TEXTS[0])))[:-300], ["cut_off", "cut_off"]),
    "in header": (warc_record("response", http(b""))[:100], ["cut_off", "cut_off"]),
    "no length": (warc_record("conversion", b"a", "text/plain", length=""), ["cut_off", "damaged"]),
    "long": (warc_record("conversion", b"a" * 40, "text/plain", length=90), ["cut_off"]),
    "chunk": (
        warc_record("response", http(chunked(page(TEXTS[0]))[:-90], headers=TRANSFER)),
        ["coding"],
    ),
    "gzip": (
        warc_record(
            "response",
            http(gzip.compress(page(TEXTS[0]))[:-20], headers="Content-Encoding: gzip\r\n"),
        ),
        ["coding"],
    ),
    "coding": (
        warc_record("response", http(b"x", headers="Content-Encoding: br\r\n")),
        ["coding"],
    ),
    "nested": (
        warc_record(
            "response",
            http(gzip.compress(gzip.compress(b"x")), headers="Content-Encoding: gzip, gzip\r\n"),
        ),
        ["coding"],
    ),
    "encoding": (warc_record("conversion", b"a\0b", "text/plain"), ["encoding"]),
    "empty": (warc_record("conversion", b" \n", "text/plain"), ["empty"]),
    "large": (warc_record("conversion", b"a" * 200_000, "text/plain"), ["too_large"]),
    "garbage": (b"garbage\r\n\r\n", ["damaged"]),
    "header": (b"WARC/1.0\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", ["damaged"]),
}


@pytest.mark.parametrize("name", [*WRONG_RECORDS])
def test_warc_records_that_are_none(read, name):
    record, kinds = WRONG_RECORDS[name]
    good = warc_record("conversion", b"good", "text/plain")
    (document,), report = read(good + record, "warc", max_document_mb=0.1)
    assert document.text == "good"
    found = places(report)
    assert [kind for kind, _ in found] == kinds
    if "damaged" not in kinds:
        assert found[0][1].endswith(f"file:{len(good)}")


def test_an_archive_goes_on_behind_a_bad_record(read):
    records = []
    for record, kinds in WRONG_RECORDS.values():
        if kinds[0] in ("coding", "encoding", "empty", "too_large"):
            records += [record, warc_record("conversion", b"good", "text/plain")]
    documents, report = read(b"".join(map(gzip.compress, records)), "warc", max_document_mb=0.1)
    assert texts(documents) == ["good"] * (len(records) // 2)
    assert sum(bad(report).values()) == len(records) // 2


def test_pages_about_errors_are_counted(read):
    missing = http(page("Not here.")).replace(b"200 OK", b"404 Not Found")
    records = [warc_record("response", missing), warc_record("response", http(page("Here.")))]
    documents, report = read(b"".join(records), "warc")
    assert len(documents) == 1 and "Here." in documents[0].text
    assert report["counts"]["http_errors"] == {"s": 1}


BOMB = """<!DOCTYPE a [<!ENTITY a0 "0123456789">ENTITIES]>
<mediawiki><page><title>a</title><ns>0</ns><revision><text>&a9;</text></revision></page></mediawiki>
"""


def entity_bomb():
    entities = [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)]
    return BOMB.replace("ENTITIES", "".join(entities)).encode()


# What is wrong with a dump -> what says so.
DUMPS = {
    "entities": (entity_bomb(), "document type"),
    "nested": (b"<mediawiki>" + b"<a>" * 100_000, "nested too deeply"),
    "comment": (b"<mediawiki><!-- " + b"a" * 5_000_000, "more than 4 MB"),
    "no dump": (b"<html><body>page</body></html>", "no page in it"),
    "no XML": (b"BZ nope", "no XML"),
    "empty": (b"", "no XML"),
    "entity": (b"<mediawiki><page>&nbsp;</page></mediawiki>", "undefined entity"),
    "encoding": (b"<?xml version='1.0' encoding='utf-7'?><a/>", "no XML"),
    "no encoding": (b"<?xml version='1.0' encoding='nope'?><a/>", "no XML"),
    "bytes": (b"<mediawiki><page><title>\xff</title></page></mediawiki>", "no XML"),
}


@pytest.mark.parametrize("name", [*DUMPS])
def test_dumps_that_are_none(read, name):
    content, why = DUMPS[name]
    documents, report = read(content, "wikipedia")
    assert not documents
    assert len(report["listed"]) == 1 and why in report["listed"][0]["why"]


def test_an_article_that_is_too_large(read):
    pages = wiki_page("A", "a" * 200_000) + wiki_page("B", "b")
    (document,), report = read(
        fuzz_prepare.DUMP.replace("PAGES", pages).encode(), "wikipedia", max_document_mb=0.1
    )
    assert document.text == "b"
    assert places(report) == [("too_large", "file:page 1")]


NO_FILES = {
    "xz": b"\xfd7zXZ\0abc",
    "zip": b"PK\x03\x04abc",
    "pdf": b"%PDF-1.4",
    "png": b"\x89PNG\0\0",
}


@pytest.mark.parametrize("format", ["text", "jsonl", "csv", "html", "warc", "wikipedia", "parquet"])
def test_files_of_another_kind(read, tmp_path, format):
    for content in NO_FILES.values():
        documents, report = read(content, format)
        assert not documents and sum(bad(report).values()) == 1, content
    os.mkfifo(tmp_path / "pipe")
    assert bad(read(tmp_path / "pipe", format)[1]) == {"damaged": 1}
    for path in (tmp_path, tmp_path / "none"):
        _, report = read(path, format)
        assert sum(bad(report).values()) == 1
        assert str(path) in report["listed"][0]["place"]


# --- what fills the memory ---

READERS = [
    ("text", {}),
    ("text", {"separator": "\n\n"}),
    ("jsonl", {}),
    ("csv", {}),
    ("html", {}),
]


def peak(call):
    """(result, most bytes that were held)"""
    tracemalloc.start()
    try:
        result = call()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format, keys", READERS)
def test_a_line_of_200_mb_is_never_held(read, tmp_path, format, keys):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.write(b"text\n" if format == "csv" else b"")
        file.truncate(60_000_000 if format == "csv" else 200_000_000)
    (documents, report), held = peak(lambda: read(path, format, max_document_mb=1.0, **keys))
    assert not documents
    assert bad(report) in ({"too_large": 1}, {"not_csv": 1})
    assert held < 20_000_000


def test_records_and_articles_of_200_mb_are_never_held(read, tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.write(warc_record("conversion", b"", "text/plain", length=200_000_000).rstrip())
        file.write(b"\r\n\r\n")
        file.truncate(file.tell() + 200_000_000)
    (documents, report), held = peak(lambda: read(path, "warc", max_document_mb=1.0))
    assert not documents and bad(report)["too_large"] == 1
    assert held < 20_000_000

    with open(path, "wb") as file:
        before, after = fuzz_prepare.DUMP.replace("PAGES", wiki_page("A", "HERE")).split("HERE")
        file.write(before.encode())
        for _ in range(40):
            file.write(b"text " * 200_000)
        file.write(after.encode())
    (documents, report), held = peak(lambda: read(path, "wikipedia", max_document_mb=1.0))
    assert not documents and bad(report) == {"too_large": 1}
    assert held < 20_000_000


@functools.cache
def bomb(packed, head=b""):
    return PACK[packed](head + (b" " * 9998 + b"\n\n") * 2500)


@pytest.mark.parametrize("packed", ["gz", "bz2", "zst"])
@pytest.mark.parametrize("format, keys", [*READERS, ("warc", {}), ("wikipedia", {})])
def test_a_small_file_that_unpacks_to_much(read, packed, format, keys):
    content = bomb(packed, b"text\n" if format == "csv" else b"")
    (documents, report), held = peak(lambda: read(content, format, max_document_mb=1.0, **keys))
    assert not documents
    is_one = format in ("text", "html") and not keys
    assert bad(report)["too_large" if is_one else "damaged"] == 1
    whys = "".join(entry["why"] for entry in report["listed"])
    assert is_one or format in ("warc", "wikipedia") or "unpacks to more than" in whys
    assert held < 20_000_000


def test_a_response_that_unpacks_to_much(read):
    good = warc_record("conversion", b"good", "text/plain")
    for coding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        body = http(pack(bytes(50_000_000)), headers=f"Content-Encoding: {coding}\r\n")
        content = warc_record("response", body) + good
        (documents, report), held = peak(lambda c=content: read(c, "warc", max_document_mb=1.0))
        assert texts(documents) == ["good"]
        assert bad(report) == {"too_large": 1}
        assert held < 20_000_000


LIMITED = """
import resource, sys
from pathlib import Path
from tests import fuzz_prepare

small, large = map(Path, sys.argv[1:])
fuzz_prepare.read_file(small, "jsonl", small.parent / "warm")
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 120_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
documents, report = fuzz_prepare.read_file(large, "jsonl", small.parent / "shards")
print(len(documents), fuzz_prepare.bad(report))
"""


@pytest.mark.slow
def test_a_line_of_200_mb_with_little_memory(tmp_path):
    """Whatever holds the memory."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(lines({"text": "a"}))
    large.write_bytes(b'{"text": "' + b"x" * 200_000_000 + b'"}\n' + lines({"text": "a"}))
    command = [sys.executable, "-c", LIMITED, str(small), str(large)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout == "1 {'too_large': 1}\n", ended.stderr


DEEP = {
    "html": [b"<div>" * 200_000, b"<b>" * 50_000, b"<table><tr><td>" * 20_000, b"<!--" * 100_000],
    "jsonl": [b'{"text": ' * 100_000, b"[" * 1_000_000],
    "wikipedia": [
        b"{{" * 50_000,
        b"[[" * 50_000,
        b"{|\n|" * 10_000,
        b"''" * 50_000,
        b"&lt;b>" * 9999,
    ],
}


@pytest.mark.parametrize("format", [*DEEP])
def test_deeply_nested_input(read, format):
    for content in DEEP[format]:
        if format == "wikipedia":
            content = fuzz_prepare.DUMP.encode().replace(
                b"PAGES", wiki_page("A", "TEXT").encode().replace(b"TEXT", content)
            )
        began = time.monotonic()
        documents, report = read(content + b"\n", format, extract_seconds=1.0)
        assert len(documents) + sum(bad(report).values()) == 1
        assert time.monotonic() - began < 10


# --- the process that extracts ---

STUB = """
import os, sys, time
from lm.prepare import extract
if sys.argv[1] == "broken":
    sys.exit(1)
extract._send(sys.stdout.buffer, "ready")
while True:
    page = extract._receive(sys.stdin.buffer)
    if "hang" in page:
        time.sleep(600)
    if "die" in page:
        os.abort()
    answer = "!RuntimeError: no" if "fail" in page else f"={page.upper()}"
    extract._send(sys.stdout.buffer, answer)
"""


@pytest.fixture
def stub(monkeypatch):
    """In the place of an extractor one that hangs, dies and fails as pages say. Its starts."""
    popen, starts = subprocess.Popen, []

    def start(command, **options):
        starts.append(command[-1])
        return popen([sys.executable, "-c", STUB, command[-1]], **options)

    monkeypatch.setattr(extract.subprocess, "Popen", start)
    return starts


def test_pages_that_keep_the_extractor_busy_or_take_it_down(read, stub, tmp_path):
    formats._extractor.cache_clear()
    found = {}
    for page_ in ("good", "hang", "die", "fail", "good"):
        documents, report = read(page_.encode(), "html", extract_seconds=0.5)
        found[page_] = texts(documents), [entry["why"] for entry in report["listed"]]
        assert not report["listed"] or report["listed"][0]["place"] == f"{tmp_path}/file:0"
    formats._extractor.cache_clear()

    assert found == {
        "good": (["GOOD"], []),
        "hang": ([], ["it took the extractor more than 0.5 seconds"]),
        "die": ([], ["the extractor died of it"]),
        "fail": ([], ["the extractor failed: RuntimeError: no"]),
    }
    assert len(stub) == 3


def test_an_extractor_that_does_not_start(monkeypatch, stub):
    monkeypatch.setattr(extract, "EXTRACTORS", ("broken",))
    with pytest.raises(ValueError, match="extractor broken doesn't start; python -m lm.prepare"):
        extract.Extractor("broken", 1.0).extract("page")


# --- all ---


def test_mutated_files(tmp_path):
    """300 mutations; `python -m tests.fuzz_prepare` tries thousands."""
    ends, unclear = fuzz_prepare.fuzz(300, seed=0, folder=tmp_path)
    assert not unclear
    assert min(ends["read"], ends["bad records"], ends["refused"]) > 20
