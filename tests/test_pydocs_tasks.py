"""Tasks about pydocs: what answers, splits and wrong answers have to be."""

import random
import re

import pytest

from lm.data import pydocs, pydocs_tasks
from lm.data.sources import Document
from tests.docstrings import docstrings

# Families whose answers are spans of the excerpt.
SPANS = ("first_parameter", "name", "parameter_type", "questions", "raises")


@pytest.fixture(autouse=True)
def few_docstrings(monkeypatch):
    monkeypatch.setattr(pydocs_tasks, "_docstrings", docstrings)


NUMPY = """Return a window of
some shape.

More about it.

Parameters
----------
M, N : int, optional
    Number of points.
x : {array_like, None}
    The points. Default is None.

    Another paragraph.

Returns
-------
ndarray
    The window.
"""
GOOGLE = """Computes it.

Args:
  x: the points,
    all of them.
  **kwargs: others.

Returns:
  The result.

Text that belongs to nothing.

Raises:
  ValueError: if x is empty.
"""


def test_a_docstring_taken_apart():
    doc = pydocs_tasks.parse(Document(NUMPY, "numpy.f", "numpy"))
    assert doc.summary == "Return a window of some shape."
    assert doc.body.startswith("More about it.")
    assert doc.entries["Parameters"] == [
        ("M, N", "int, optional", "Number of points."),
        ("x", "{array_like, None}", "The points. Default is None."),
    ]
    assert doc.entries["Returns"] == [("", "ndarray", "The window.")]

    doc = pydocs_tasks.parse(Document(GOOGLE, "jax.f", "jax"))
    expected = [("x", "", "the points, all of them."), ("**kwargs", "", "others.")]
    assert doc.entries["Parameters"] == expected
    assert doc.sections["Returns"] == "The result."
    assert doc.entries["Raises"] == [("ValueError", "", "if x is empty.")]


@pytest.mark.parametrize("family", pydocs_tasks.FAMILIES)
def test_every_family_has_records(family):
    """The same each time, whatever else draws random numbers."""
    for split in ("train", "validation"):
        records = pydocs_tasks.load(split, family)
        assert len(records) > 10
        random.seed(len(split))
        assert pydocs_tasks.load(split, family) == records
        assert len({frozenset(record) for record in records}) == 1
        for record in records:
            assert len(record.get("excerpt", "")) <= pydocs_tasks.EXCERPT_CHARS + 20


@pytest.mark.parametrize("family", SPANS)
def test_answers_stand_in_the_excerpts(family):
    for record in pydocs_tasks.load("train", family):
        assert record["answer"] and record["answer"] in record["excerpt"]


def test_yes_and_no_are_right():
    texts = {doc.name: doc.text for doc in docstrings("train")}
    records = pydocs_tasks.load("train", "has_parameter")
    for record in records:
        is_there = re.search(rf"^{record['parameter']}\b", record["excerpt"], re.MULTILINE)
        assert bool(is_there) == (record["label"] == "yes")
        if record["label"] == "no":
            assert not re.search(rf"\b{record['parameter']}\b", texts[record["name"]])
    share = sum(record["label"] == "yes" for record in records) / len(records)
    assert 0.35 < share < 0.65

    for record in pydocs_tasks.load("train", "optional"):
        (type_line,) = re.findall(rf"^{record['parameter']} : (.*)$", record["excerpt"], re.M)
        is_optional = "optional" in type_line or "default" in type_line
        assert is_optional == (record["label"] == "yes")


@pytest.mark.parametrize("family", ["which_summary", "which_parameter"])
def test_one_of_the_choices_is_right(family):
    docs = {doc.name: doc for doc in docstrings("validation")}
    labels = set()
    for record in pydocs_tasks.load("validation", family):
        choices, doc = record["choices"], docs[record["name"]]
        assert len(set(choices)) == len(choices) >= 3
        right = choices[record["label"]]
        labels.add(record["label"])
        if family == "which_summary":
            assert right == doc.summary
        else:
            (entry,) = [entry for entry in doc.entries["Parameters"] if entry.name == right]
            assert entry.description.startswith(record["description"].removesuffix(" ..."))
    assert labels == {0, 1, 2, 3}


def test_the_length_of_a_wrong_answer_tells_nothing():
    records = pydocs_tasks.load("train", "questions")
    differences = []
    for record in records:
        right, wrong = record["answer"], record["wrong"]
        assert wrong.casefold() not in right.casefold()
        assert right.casefold() not in wrong.casefold()
        differences.append(len(wrong) - len(right))
    assert set(differences) <= {-1, 0, 1}
    assert abs(sum(differences)) / len(records) < 0.2

    # Nor does it tell whether it stands in the excerpt.
    in_excerpt = sum(record["wrong"] in record["excerpt"] for record in records)
    assert 0.2 < in_excerpt / len(records) < 0.9


def test_commands_are_better_whatever_their_length():
    own = {doc.name: doc.summary for doc in docstrings("train")}
    records = pydocs_tasks.load("train", "commands")
    assert len(records) > 0.9 * len(pydocs_tasks.load("train", "summary"))
    differences, own_wins = [], 0
    for record in records:
        better, worse = record["answer"], record["wrong"]
        assert better.split()[0] in pydocs_tasks.VERBS
        assert worse.split()[0] not in pydocs_tasks.VERBS
        assert own[record["name"]] in (better, worse)
        differences.append(len(better) - len(worse))
        own_wins += own[record["name"]] == better
    assert set(differences) <= {-1, 0, 1}
    assert abs(sum(differences)) / len(records) < 0.1
    # Nor is the docstring's own summary the better one most times.
    assert 0.3 < own_wins / len(records) < 0.7


def test_nothing_of_a_split_is_in_another():
    train, validation = docstrings("train"), docstrings("validation")
    assert not {doc.name for doc in train} & {doc.name for doc in validation}
    names = {doc.name for doc in validation}
    own = " ".join(" ".join([doc.name, *doc.text.split()]) for doc in validation)
    for family in pydocs_tasks.FAMILIES:
        texts = set()
        for record in pydocs_tasks.load("validation", family):
            assert record["name"] in names
            texts |= {*record.get("choices", ()), record.get("parameter", "")}
            texts.add(record.get("wrong", ""))
        assert not [text for text in texts if text not in own]


def test_the_splits_are_those_of_pydocs(monkeypatch):
    monkeypatch.undo()
    asked = []

    def read(split, data_dir):
        asked.append((split, data_dir))
        return [Document(NUMPY, "numpy.f", "numpy")]

    monkeypatch.setattr(pydocs, "pydocs", read)
    assert pydocs_tasks.load("test", "library", "/not/there")[0]["label"] == "numpy"
    assert asked == [("test", "/not/there")]
    pydocs_tasks._docstrings.cache_clear()


def test_what_there_is_not(monkeypatch):
    with pytest.raises(ValueError, match=r"pydocs = 'size'; valid: \['library', 'section', "):
        pydocs_tasks.load("train", "size")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no split 'dev'; valid: "):
        pydocs_tasks.load("dev", "library")
