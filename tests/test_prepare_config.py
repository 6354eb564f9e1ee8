"""The keys of preparations: each has a range, each is read, and what is wrong is named at once."""

import dataclasses
import re

import pytest
from etils import epath

from lm.data import sources
from lm.evals import entries
from lm.prepare import config as prepare_config
from lm.prepare import engine, pipeline
from lm.prepare.config import GROUPS, Preparation, Source
from tests.helpers import ROOT


def valid():
    c = prepare_config.default()
    c.sources.texts = prepare_config.source("text", "x")
    return c


def test_defaults_are_valid():
    prepare_config.check(valid())


def test_the_stages_that_are_valid_are_those_that_there_are():
    assert tuple(pipeline.STAGES) == prepare_config.STAGES


def test_every_key_is_read():
    code = "".join(path.read_text() for path in sorted(ROOT.glob("lm/prepare/*.py")))
    code = code.replace((ROOT / "lm/prepare/config.py").read_text(), "")
    unread = []
    for group in (Preparation, Source, *GROUPS.values()):
        for field in dataclasses.fields(group):
            # Of a family such as max_5grams the number is put in.
            name = re.sub(r"\d+", "{n}", field.name)
            name = re.sub("^max_(line|paragraph)(s|_chars)$", r"max_{kind}\2", name)
            if not re.search(rf"""[.'" ]({re.escape(field.name)}|{re.escape(name)})(=|\b)""", code):
                unread.append(f"{group.__name__}.{field.name}")
    assert not unread


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("bad_input", "skip", "config.bad_input = 'skip'; valid"),
        ("shard_mb", 0, "config.shard_mb = 0"),
        ("splits.validation", 1.0, "config.splits.validation = 1.0"),
        ("near_duplicates.threshold", 0.0, "config.near_duplicates.threshold"),
        ("gopher_quality.stop_words", (1,), "stop_words = .*wanted a tuple of texts"),
        ("stages", ("collect", "cleen", "write"), "no stage 'cleen'; valid"),
        ("stages", ("clean", "write"), "wanted collect first and write last"),
        ("stages", ("collect", "clean", "clean", "write"), "a stage is there twice"),
        ("engine", "spark", "config.engine = 'spark'"),
    ],
)
def test_values_that_are_none(key, value, message):
    c = valid()
    c.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        prepare_config.check(c)


def test_all_that_is_wrong_is_named():
    c = prepare_config.default()
    c.splits.update(dict(validation=0.6, test=0.6))
    with pytest.raises(ValueError, match=r"(?s)sources is empty.*nothing is left for training"):
        prepare_config.check(c)
    c.sources["a b"] = prepare_config.source("text", "x")
    c.sources.b = prepare_config.source("text", "x", tekst_key="x")
    with pytest.raises(ValueError, match=r"(?s)a b: wanted a name.*b.tekst_key is no key"):
        prepare_config.check(c)


def test_tasks_are_entries_of_evals():
    c = valid()
    c.tasks.trec = entries.task("trec")
    c.tasks.gsm8k = entries.instructed("gsm8k")
    prepare_config.check(c)
    c.tasks.trec.labels = "x"
    with pytest.raises(ValueError, match="trec"):
        prepare_config.check(c)


@pytest.mark.parametrize(
    "stage, message",
    [
        ("decontaminate", "nothing to look for"),
        ("quality", "config.quality.model"),
        ("tokenizer", "neither a path nor a vocab_size"),
        ("tests.none.at_all", "can't be imported"),
    ],
)
def test_stages_without_what_they_need(stage, message, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    c = valid()
    c.sources.texts.path = str(tmp_path)
    c.stages = ("collect", stage, "write")
    with pytest.raises(ValueError, match=message):
        pipeline.stages_of(c)


def in_capitals(document, settings):
    """A stage of one's own: drops texts of a word, and shouts the others."""
    if " " not in document.text:
        return None
    return document._replace(text=document.text.upper() + settings["mark"])


def test_a_stage_of_ones_own(tmp_path):
    for name, text in dict(a="one", b="two words").items():
        (tmp_path / f"{name}.txt").write_text(text)
    c = valid()
    c.workers = 1
    c.sources.texts.path = str(tmp_path / "*.txt")
    c.stages = ("collect", "tests.test_prepare_config.in_capitals", "write")
    c.functions.in_capitals = dict(mark="!")
    c.splits.validation = 0.0
    folder = pipeline.prepare(c, epath.Path(tmp_path / "out"))
    assert [d.text for d in sources.corpus("train", path=str(folder))] == ["TWO WORDS!"]


def test_sources_without_files(tmp_path):
    c = valid()
    c.sources.texts.path = str(tmp_path / "none")
    with pytest.raises(ValueError, match="config.sources.texts: no file at"):
        pipeline.stages_of(c)
    c.sources.texts.format = "word"
    with pytest.raises(ValueError, match="nor a format; valid"):
        pipeline.stages_of(c)


def test_limits_refuse_a_corpus(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a text"}\nno json\n')
    c = valid()
    c.workers = 1
    c.sources.texts = prepare_config.source("jsonl", str(tmp_path / "a.jsonl"))
    c.stages = ("collect", "write")
    c.splits.validation = 0.0
    with pytest.raises(ValueError, match=r"max_bad = 0.05, and it is 0.5"):
        pipeline.prepare(c, epath.Path(tmp_path / "out"))
    assert (tmp_path / "out" / "refused" / "card.json").exists()
    assert not (tmp_path / "out" / "corpus" / "1.0.0").exists()

    # Another limit makes it of the same stages.
    c.limits.max_bad = 0.6
    pipeline.prepare(c, epath.Path(tmp_path / "out"))
    c.limits.min_tokens = 5
    c.version = "1.0.1"
    with pytest.raises(ValueError, match="min_tokens = 5: there are 0"):
        pipeline.prepare(c, epath.Path(tmp_path / "out"))


def test_a_threshold_runs_the_stages_behind_it_again(tmp_path):
    """And no others."""
    (tmp_path / "a.txt").write_text("text")
    c = valid()
    c.sources.texts.path = str(tmp_path / "a.txt")
    c.stages = ("collect", "clean", "near_duplicates", "write")

    def folders(**changes):
        changed = c.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        stages = pipeline.stages_of(changed)
        return dict(zip([s.name for s in stages], engine.folders(stages, epath.Path("out"))))

    before = folders()
    for key, value, first in (
        ("near_duplicates.threshold", 0.7, "near_verify"),
        ("near_duplicates.max_compared", 9, "near_pairs"),
        ("near_duplicates.rows", 9, "near_sign"),
        ("gopher_quality.on", True, "clean"),
        ("splits.validation", 0.3, "encode"),
        ("collect.max_document_mb", 1.0, "collect"),
    ):
        after = folders(**{key: value})
        names = list(after)
        changed = [name for name in names if after[name] != before[name]]
        assert changed == names[names.index(first) :], key
    # What is off is not read, and how it is run is no matter of the set.
    assert folders(**{"gopher_quality.min_words": 9, "workers": 3, "engine": "beam"}) == before
