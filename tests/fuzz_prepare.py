"""Mutates files of each format that `lm.prepare` reads, and sees how reading and cleaning end:

    python -m tests.fuzz_prepare 12000 --seed=1

A mutated file gives documents, and bad records that are counted and listed by their place. Where
bad input ends the preparation, a ValueError names the file. Anything else is printed, and is a
fault.
"""

import argparse
import bz2
import collections
import dataclasses
import gzip
import io
import json
import logging
import random
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

from lm.prepare import clean, collect, shards
from lm.prepare import config as prepare_config
from tests.fuzz_config import Unclear, time_limit

WORDS = ("the", "naïve", "of", "Größe", "and", "日本語", "mail@example.org", "in", "+49 30 123456")


# --- reading ---


def read_file(path, format, folder, unit=None, **keys):
    """(documents, report) of what a task of the stage collect makes of a file.

    Args:
      folder: for the shards.
      unit: of the source, if it isn't its path.
      keys: of config.collect, bad_input, or keys of the source.
    """
    fields = [field.name for field in dataclasses.fields(prepare_config.Collect)]
    settings = dataclasses.asdict(prepare_config.Collect())
    settings |= {key: keys.pop(key) for key in [*keys] if key in fields}
    settings |= dict(bad_input=keys.pop("bad_input", "list"), shard_bytes=1 << 27)
    source = prepare_config.source(format, str(path), **keys).to_dict() | {"name": "s"}

    inputs = {"files": [unit or str(path)], "sources": ["s"]}
    work = shards.Work(str(folder), 0, inputs, settings | {"sources": {"s": source}})
    collect.collect(work)
    report = work.report()
    documents = []
    for output in report["outputs"]:
        documents += shards.read(output["path"])
    return documents, report


def bad(report):
    """{kind: how many} of what could not be read; the first ones are listed, too."""
    counts = {}
    for what, by in report["counts"].items():
        if what.startswith("bad."):
            counts[what.removeprefix("bad.")] = sum(by.values())
    kinds = [entry["kind"] for entry in report["listed"]]
    for kind, count in counts.items():
        assert kinds.count(kind) == min(count, shards.MAX_LISTED), (kind, counts)
    return counts


# --- files ---


def texts(draw, count=5):
    """Texts of some words."""
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 40))) for _ in range(count)]


def page(text, head=""):
    """An HTML page with a text in it."""
    paragraphs = f"<p>{text}</p>" * 3
    menu = "<nav><a href=/>home</a></nav>"
    return f"<html><head>{head}</head><body>{menu}<main>{paragraphs}</main></body></html>".encode()


def warc_record(kind, body, content_type="application/http; msgtype=response", length=None):
    """A record of a WARC file."""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\n"
        "WARC-Record-ID: <urn:uuid:12345678-1234-1234-1234-123456789012>\r\n"
        "WARC-Date: 2020-01-01T00:00:00Z\r\nWARC-Target-URI: http://a.b/c\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def http(body, content_type="text/html; charset=utf-8", headers=""):
    """A response."""
    return f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n{headers}\r\n".encode() + body


def chunked(body, size=50):
    """A body in chunks."""
    chunks = []
    for begin in range(0, len(body), size):
        chunk = body[begin : begin + size]
        chunks.append(b"%x\r\n" % len(chunk) + chunk + b"\r\n")
    return b"".join([*chunks, b"0\r\n\r\n"])


def _gzip(content):
    return gzip.compress(content, mtime=0)


def warc(draw):
    """A WARC file with a record of each kind."""
    one, two, three, four, five = texts(draw)
    packed = http(_gzip(page(one)), headers="Content-Encoding: gzip\r\n")
    in_chunks = http(chunked(page(two)), headers="Transfer-Encoding: chunked\r\n")
    latin = http(page(three).decode().encode("utf-16"), "text/html; charset=utf-16")
    return [
        warc_record("warcinfo", b"software: x\r\n", "application/warc-fields"),
        warc_record("response", packed),
        warc_record("response", in_chunks),
        warc_record("response", latin),
        warc_record("response", http(b"\x89PNG", "image/png")),
        warc_record("resource", page(four), "text/html"),
        warc_record("conversion", five.encode(), "text/plain"),
    ]


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="de">
  <siteinfo><namespaces><namespace key="0" /><namespace key="6">Datei</namespace>
    <namespace key="14">Kategorie</namespace></namespaces></siteinfo>
PAGES</mediawiki>
"""
WIKITEXT = """'''{0}''' ist [[Ort|ein Ort]] bei [[Köln]].{{{{Infobox|name=weg}}}}<ref>weg</ref>
== Kopf ==
[[Datei:weg.jpg|mini|weg]] {1} [https://a.b Netz]
{{| class="wikitable"
| weg
|}}
[[Kategorie:weg]]
"""


def wiki_page(title, text, ns="0", extra=""):
    """A page of a dump."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f"<page><title>{title}</title><ns>{ns}</ns>{extra}"
        f"<revision><text>{text}</text></revision></page>\n"
    )


def wikipedia(draw):
    """A dump."""
    pages = [wiki_page(f"Ort {i}", WIKITEXT.format(i, text)) for i, text in enumerate(texts(draw))]
    pages.append(wiki_page("Weg", "#WEITERLEITUNG [[Ort 1]]", extra='<redirect title="Ort 1" />'))
    pages.append(wiki_page("Diskussion:Weg", "weg", ns="1"))
    return DUMP.replace("PAGES", "".join(pages)).encode()


def jsonl(draw):
    """Objects with a label, a line each."""
    lines = []
    for number, text in enumerate(texts(draw)):
        lines.append(json.dumps({"text": text, "label": number, "more": [{"a": 1.5}]}) + "\n")
    return "".join(lines).encode()


def csv(draw):
    """A table, with quotes and lines within fields."""
    rows = [f'"{text}\n""quoted"", and more",{i}\r\n' for i, text in enumerate(texts(draw))]
    return "".join(["text,label\r\n", *rows]).encode()


def parquet(draw):
    """A table with two row groups."""
    found = texts(draw, 6)
    table = pyarrow.table({"text": found, "label": list(range(6)), "other": [b"x"] * 6})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=3)
    return file.getvalue()


# name -> (format, keys of the source, function that makes the bytes of a file)
FILES = {
    "text": ("text", {}, lambda draw: texts(draw, 1)[0].encode()),
    "texts": ("text", {"separator": "\n\n"}, lambda draw: "\n\n".join(texts(draw)).encode()),
    "utf16": ("text", {"separator": "\n"}, lambda draw: "\n".join(texts(draw)).encode("utf-16")),
    "code": ("code", {}, lambda draw: "\n".join(texts(draw)).encode()),
    "jsonl": ("jsonl", {"label_key": "label"}, jsonl),
    "jsonl.gz": ("jsonl", {"label_key": "label"}, lambda draw: _gzip(jsonl(draw))),
    "jsonl.bz2": ("jsonl", {"label_key": "label"}, lambda draw: bz2.compress(jsonl(draw))),
    "jsonl.zst": ("jsonl", {"label_key": "label"}, lambda draw: zstandard.compress(jsonl(draw))),
    "csv": ("csv", {"label_key": "label"}, csv),
    "parquet": ("parquet", {"label_key": "label"}, parquet),
    "html": ("html", {}, lambda draw: page(texts(draw, 1)[0], "<meta charset=utf-8>")),
    "warc": ("warc", {}, lambda draw: b"".join(warc(draw))),
    "warc.gz": ("warc", {}, lambda draw: b"".join(map(_gzip, warc(draw)))),
    "wikipedia": ("wikipedia", {}, wikipedia),
    "wikipedia.bz2": ("wikipedia", {}, lambda draw: bz2.compress(wikipedia(draw))),
}
# They tell a file that is cut off from one that is whole.
HAVE_ENDS = ("jsonl.gz", "jsonl.bz2", "jsonl.zst", "parquet", "wikipedia", "wikipedia.bz2")


# --- mutations ---

NESTED = (
    b"[",
    b"{",
    b'{"a":',
    b"<div>",
    b"<b>",
    b"{{",
    b"[[",
    b"{|\n|",
    b"''",
    b"<ref>",
    b"&lt;b>",
)
INSERTED = (
    b"\0",
    b"\0" * 40,
    b"\xed\xa0\x80",
    b'"\\ud800"',
    b"\\udc00\\ud800",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xe9\xe8",
    b'"',
    b"\n",
    b"\r",
    b"]]>",
    b"<!--",
    b"<![CDATA[",
    b"&#0;",
    b"&#xd800;",
    b"&nope;",
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
    b"<script>",
    b"1e999",
    b"-" + b"9" * 5000,
    b"NaN",
    b"\r\n\r\n",
    b"WARC/1.0\r\n",
    b"0\r\n\r\n",
    b"Content-Encoding: deflate\r\n",
    b"charset=unicode_escape",
    b"charset=\0",
)


def _flip(content, draw):
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 5, 50))):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _cut(content, draw):
    return content[: draw.randrange(len(content))]


def _swap(content, draw):
    place = draw.randrange(len(content))
    return content[place:] + content[:place]


def _insert(content, draw, what=None):
    if what is None:
        what = draw.choice((draw.choice(INSERTED), draw.randbytes(draw.randint(1, 100))))
    place = draw.randrange(len(content) + 1)
    return content[:place] + what + content[place:]


def _nest(content, draw):
    return _insert(content, draw, draw.choice(NESTED) * draw.choice((10, 300, 5000, 20_000)))


def _remove(content, draw):
    begin, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:begin] + content[end:]


def _repeat(content, draw):
    begin, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[begin:]


def _renumber(content, draw):
    """Another number in the place of a digit."""
    places = [place for place, byte in enumerate(content) if 48 <= byte < 58]
    if not places:
        return content
    place = draw.choice(places)
    number = draw.choice((b"0", b"-1", b"99999999999999999999", b"9" * 5000, b"1e400", b"\xd9\xa1"))
    return content[:place] + number + content[place + 1 :]


MUTATIONS = (_flip, _flip, _cut, _swap, _insert, _insert, _nest, _remove, _repeat, _renumber)


def mutated(content, draw):
    """(the content with one or two mutations, their names)"""
    names = []
    for mutate in draw.sample(MUTATIONS, draw.choice((1, 1, 1, 2))):
        content = mutate(content, draw) if content else content
        names.append(mutate.__name__)
    return content, names


# --- outcomes ---


def clean_settings():
    """Those of the stage clean, with all rules."""
    config = prepare_config.default()
    for name in ("c4", "gopher_quality", "gopher_repetition", "fineweb", "code"):
        config[name].on = True
    return dict(clean.stages(config)[0].settings)


def end_of(name, content, folder, settings, bad_input):
    """ "read", "bad records" or "refused".

    Raises:
      Unclear: something else.
    """
    format, keys, _ = FILES[name]
    path = folder / f"mutated.{name}"
    path.write_bytes(content)
    keys = keys | dict(bad_input=bad_input, extract_seconds=5.0, max_document_mb=1.0)
    try:
        with time_limit():
            documents, report = read_file(path, format, folder / "shards", **keys)
            work = shards.Work(str(folder), 0, {}, settings)
            for document in documents:
                clean.clean_document(document, work)
            json.dumps([report, work.report()])
    except Unclear:
        raise
    except ValueError as error:
        if bad_input == "stop" and str(path) in str(error):
            return "refused"
        raise Unclear(f"ValueError: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what Rust panics with is no Exception
        raise Unclear(f"{type(error).__name__}: {error}") from error

    ids = [document.id for document in documents]
    if len(set(ids)) < len(ids):
        raise Unclear(f"ids repeat: {ids}")
    return "bad records" if bad(report) else "read"


def fuzz(num, seed, folder):
    """Returns (Counter of ends, messages of those that are unclear)."""
    draw = random.Random(seed)
    settings = clean_settings()
    whole = {name: make(draw) for name, (_, _, make) in FILES.items()}
    ends = collections.Counter()
    unclear = []
    for number in range(num):
        name = draw.choice([*FILES])
        content, mutations = mutated(whole[name], draw)
        bad_input = draw.choice(("list", "list", "stop"))
        try:
            end = end_of(name, content, folder, settings, bad_input)
            is_cut = mutations == ["_cut"] and len(content) < len(whole[name].rstrip())
            # Of few bytes nobody knows what they were.
            if end == "read" and is_cut and name in HAVE_ENDS and len(content) > 8:
                raise Unclear("it is cut off, and nobody says so")
            ends[end] += 1
        except Unclear as error:
            ends["unclear"] += 1
            unclear.append(f"{number}: {name} {mutations}: {error!s:.300}")
            (folder / f"unclear-{number}.{name}").write_bytes(content)
    return ends, unclear


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("num", type=int, nargs="?", default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where files are left that end unclearly")
    arguments = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        ends, unclear = fuzz(arguments.num, arguments.seed, folder)
    print("\n".join([*unclear, f"fuzz: {dict(ends)}"]))
    sys.exit(bool(unclear))


if __name__ == "__main__":
    main()
