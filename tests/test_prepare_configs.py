"""The shipped preparations run whole, on small samples of their formats that are made here."""

import gzip
import json
import pydoc
import shutil
import textwrap

import jax
import pytest
from etils import epath

import lm
from lm import command_line, files, train
from lm.data import pydocs, sources
from lm.evals import entries
from lm.models import presets
from lm.prepare import pipeline
from tests.fuzz_prepare import http, warc_record
from tests.helpers import slow

MODULES = ("argparse", "json", "random", "textwrap", "statistics", "difflib", "csv", "calendar")


def run(config, out, path="", **changes):
    """The folder of a preparation, and its card."""
    c = command_line.read_config(f"configs/prepare/{config}.py{':' if path else ''}{path}")
    c.update_from_flattened_dict(dict(workers=1) | changes)
    folder = pipeline.prepare(c.lock(), epath.Path(out))
    return folder, files.read_json(folder / "card.json")


def texts(folder, split="train"):
    return [document.text for document in sources.corpus(split, path=str(folder))]


def response(page, name):
    record = warc_record("response", http(page))
    return record.replace(b"http://a.b/c", f"http://docs/{name}".encode())


def test_common_crawl(tmp_path):
    """Pages about Python's modules, as pydoc makes them, and what a crawl has besides."""
    records = []
    for name in MODULES:
        page = pydoc.html.document(pydoc.locate(name), name)
        records.append(response(page.encode(), name))
    records.append(records[0])
    records.append(response(b"<p>Nur ein kurzer Satz.</p>", "kurz"))
    (tmp_path / "crawl.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))

    # Such pages are reference: of the rules those about sentences are not for them.
    changes = {
        "tokenizer.vocab_size": 400,
        "c4.curly_bracket": False,
        "gopher_quality.min_alphabetic_words": 0.5,
        "gopher_repetition.on": False,
        "fineweb.on": False,
        "splits.validation": 0.0,
        "clean.least_probability": 0.1,
    }
    folder, card = run("common_crawl", tmp_path / "out", str(tmp_path), **changes)
    assert card["summary"]["collected"] == len(records)
    assert card["summary"]["dropped"]["exact_duplicate"] == 1
    names = {d.name for d in sources.corpus("train", path=str(folder))}
    assert names <= {f"http://docs/{name}" for name in MODULES}
    assert len(names) >= len(MODULES) // 2
    assert any("ArgumentParser" in text for text in texts(folder))
    assert "http://docs/kurz" not in names


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11">
{pages}</mediawiki>"""
ARTICLE = """<page><title>{title}</title><ns>{ns}</ns><id>{number}</id>{redirect}
<revision><id>1</id><text>{text}</text></revision></page>
"""


def article(number, title, text, ns=0, redirect=""):
    return ARTICLE.format(number=number, title=title, text=text, ns=ns, redirect=redirect)


def test_wikipedia(tmp_path):
    words = "It is about the module and what its functions are for, in [[Python|the language]]. "
    pages = []
    for number, name in enumerate(MODULES):
        text = f"{{{{Infobox|name={name}}}}}\n'''{name}''' is a module. {words * (4 + number)}"
        text += "\n== History ==\nIt is old.&lt;ref&gt;A&lt;/ref&gt;"
        pages.append(article(number, name, text))
    pages.append(article(90, "Stub", "Short."))
    pages.append(article(91, "Other", "A redirect " * 50, redirect='<redirect title="Json" />'))
    pages.append(article(92, "Talk:Json", "Not an article. " * 50, ns=1))
    (tmp_path / "wiki.xml").write_text(DUMP.format(pages="".join(pages)))

    changes = {"tokenizer.vocab_size": 320, "splits.validation": 0.0}
    changes["near_duplicates.threshold"] = 1.0
    folder, card = run("wikipedia", tmp_path / "out", str(tmp_path / "wiki.xml"), **changes)
    found = texts(folder)
    assert len(found) == len(MODULES)
    assert card["summary"]["dropped"] == {"min_chars": 1}
    assert found[0].startswith("argparse is a module. It is about")
    assert "the language" in found[0] and "It is old." in found[0]
    assert not any(mark in text for text in found for mark in ("[[", "{{", "ref", "Infobox"))
    assert card["sources"]["articles"]["licence"] == {"CC-BY-SA-4.0": len(MODULES) + 1}


def test_code(tmp_path):
    """A tree of this package's own files, and beside it one under another licence."""
    tree = tmp_path / "trees"
    for name, licence in (
        ("free", "Permission is hereby granted, free of charge, to any person"),
        ("copyleft", "GNU GENERAL PUBLIC LICENSE Version 3"),
    ):
        (tree / name / "src").mkdir(parents=True)
        (tree / name / "LICENSE").write_text(licence)
        shutil.copy(lm.__path__[0] + "/flops.py", tree / name / "src")
    shutil.copy(lm.__path__[0] + "/escape.py", tree / "free")
    shutil.copy(lm.__path__[0] + "/escape.py", tree / "free" / "src" / "again.py")
    (tree / "free" / "table.py").write_text("TABLE = [" + "0, " * 900 + "]\n")

    changes = {"tokenizer.vocab_size": 400, "splits.validation": 0.0}
    folder, card = run("code", tmp_path / "out", str(tree), **changes)
    assert card["summary"]["dropped"] == {"licence": 1, "code.long_line": 1, "exact_duplicate": 1}
    names = [d.name for d in sources.corpus("train", path=str(folder))]
    assert names == [f"{tree}/free/escape.py", f"{tree}/free/src/flops.py"]
    assert card["sources"]["files"]["licence"] == {"MIT": 4}
    assert set(card["languages"]) == {".py"}


def test_text(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(40):
        text = textwrap.fill(f"Text {number}: " + "some words follow here. " * (number + 5))
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    changes = {"tokenizer.vocab_size": 300, "near_duplicates.threshold": 1.0}
    folder, _ = run("text", tmp_path / "out", str(tmp_path / "texts"), **changes)
    assert len(texts(folder)) == 40


def small_run(folder):
    """A configuration that trains a few steps on a corpus."""
    config = command_line.read_config(f"configs/corpus.py:{folder}")
    config.model.update(presets.get("micro") | dict(vocab_size=0, compute_dtype="float32"))
    config.data.update(dict(length=64, batch_size=8, streams=4))
    config.train.length = "3 steps"
    config.optimizer.warmup_steps = 1
    config.checkpoint.update(dict(every=0, best=""))
    config.evals.validation = entries.perplexity(every=0, batch_size=8, max_documents=5)
    config.evals.samples.max_new_tokens = 4
    return config.lock()


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize("name", [slow("pydocs")])
def test_pydocs_and_a_run_on_it(name, tmp_path):
    """The corpus by the pipeline is the one that lm.data.pydocs prepares."""
    folder, _ = run(name, tmp_path / "out")
    for split in pydocs.SPLITS:
        found = sources.corpus(split, path=str(folder), label_key="label")
        wanted = pydocs.pydocs(split, data_dir=str(tmp_path))
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted):
            assert (a.text, a.name, a.label) == (b.text, b.name, b.label)

    values = train.train(small_run(folder), epath.Path(tmp_path / "run"), jax.devices()[:1])
    assert values["step"] == 3 and values["eval/validation/documents"] == 5
    (summary,) = json.loads((tmp_path / "run" / "corpora.json").read_text())["corpora"]
    assert summary["name"] == "pydocs_prepared"
