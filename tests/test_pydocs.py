"""The docstring corpus, on a small tree of fake libraries."""

import ast
import sys
from collections import Counter

import pytest

from lm.data import pydocs

LONG = (
    "Says at some length what it does, so that it is not left out for being too short to tell "
    "its library. "
)


def doc(text, indent=""):
    """A docstring's source line, long enough for the corpus."""
    return f'{indent}"""{text} {LONG}"""\n'


TOPICS = f"""\
\"\"\"Generated. {LONG}\"\"\"
topics = {{"while": "while {LONG}", "assert": "assert {LONG}", "short": "no"}}
"""
FILES = {
    # A module that must not be imported.
    "python/zeta.py": doc("zeta") + 'raise SystemExit("imported")\n',
    "python/alpha.py": (
        doc("alpha")
        + "def f():\n"
        + doc("alpha.f", indent="    ")
        + "\ndef short():\n    'Too short.'\n"
    ),
    "python/package/__init__.py": (
        doc("package")
        + "class C:\n"
        + doc("package.C", indent="    ")
        + "    async def m(self):\n"
        + doc("package.C.m", indent="        ")
    ),
    "python/package/sub.py": doc("alpha"),  # an exact duplicate of alpha's
    "python/bad.py": doc("bad") + "def f(:\n",
    "python/zero.py": doc("zero") + "\0",
    "python/package/test/t.py": doc("a test"),
    "python/site-packages/other.py": doc("another library"),
    "python/config-3.11/c.py": doc("config"),
    "python/surrogate.py": f'"""\\ud800 {LONG}"""\n',
    "python/pydoc_data/topics.py": TOPICS,
    "numpy/__init__.py": doc("numpy"),
    "numpy/linalg.py": doc("linalg"),
    "numpy/latin.py": "# coding: latin1\n" + doc("\xe9"),
    "numpy/tests/test_a.py": doc("numpy's test"),
}


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Two libraries: names, duplicates, short docstrings, files that can't be parsed, and a module
    that must not be imported.
    """
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="latin1")

    folders = {"python": tmp_path / "python", "numpy": tmp_path / "numpy"}
    monkeypatch.setattr(pydocs, "_roots", lambda: folders)
    monkeypatch.setattr(pydocs, "versions", lambda: {"python": "fake"})
    return tmp_path


# --- docstrings of a module ---


def test_docstrings_of_every_class_and_function():
    source = '''
"""m"""
class A:
  "a"
  def f(self):
    "f"
    def g():
      "g"
async def h():
  "h"
def no(): pass
x = "not one"
'''
    assert dict(pydocs._docstrings(ast.parse(source), "m")) == {
        "m": "m",
        "m.A": "a",
        "m.A.f": "f",
        "m.A.f.g": "g",
        "m.h": "h",
    }


def test_docstrings_under_a_condition():
    # numpy and the standard library define much under `if` and `try`.
    source = """
if x:
  def f():
    "f"
else:
  def g():
    "g"
try:
  class A:
    "a"
except ImportError:
  def h():
    "h"
"""
    assert dict(pydocs._docstrings(ast.parse(source), "m")) == {
        "m.f": "f",
        "m.g": "g",
        "m.A": "a",
        "m.h": "h",
    }


# --- the corpus ---


def test_collect_gives_names_labels_and_no_duplicates(roots):
    collected = list(pydocs.collect())
    documents = {document.name: document for _, document in collected}

    python_names = [
        "zeta",
        "alpha",
        "alpha.f",
        "package",
        "package.C",
        "package.C.m",
        "topics.assert",
        "topics.while",
    ]
    numpy_names = ["numpy", "numpy.linalg", "numpy.latin"]
    assert sorted(documents) == sorted(python_names + numpy_names)
    assert len(collected) == len(documents)
    assert len({document.text for _, document in collected}) == len(collected)

    for name, document in documents.items():
        assert document.label == ("numpy" if name in numpy_names else "python")
        assert len(document.text) >= pydocs.MIN_CHARS
        if name != "numpy.latin":
            assert name.split(".")[-1] in document.text
    # A file's own encoding is followed.
    assert documents["numpy.latin"].text.startswith("\xe9 ")

    assert collected == list(pydocs.collect())


def test_collect_says_what_a_split_goes_by(roots):
    # The module, however deep the name; a topic is one by itself.
    modules = {document.name: module for module, document in pydocs.collect()}

    assert modules["package"] == "package"
    assert modules["package.C.m"] == "package"
    assert modules["alpha.f"] == "alpha"
    assert modules["numpy.linalg"] == "numpy.linalg"
    assert modules["topics.while"] == "topics.while"


def test_nothing_is_imported(roots, monkeypatch):
    monkeypatch.syspath_prepend(str(roots / "python"))
    before = set(sys.modules)

    names = {document.name for _, document in pydocs.collect()}

    assert "zeta" in names
    assert not (set(sys.modules) - before) & {"zeta", "alpha", "package"}


# --- splits ---


def test_split_is_by_module_and_stays():
    # Pinned: another hash would move test documents into training.
    assert pydocs.split_of("os") == "train"
    assert pydocs.split_of("jax") == "train"
    assert pydocs.split_of("numpy") == "validation"
    assert pydocs.split_of("scipy.stats") == "validation"
    assert pydocs.split_of("io") == "test"
    assert pydocs.split_of("scipy.optimize._minimize") == "test"


def test_splits_have_their_shares():
    counts = Counter(pydocs.split_of(f"module{i}") for i in range(2000))
    assert 0.82 < counts["train"] / 2000 < 0.88
    assert 0.07 < counts["validation"] / 2000 < 0.13
    assert 0.03 < counts["test"] / 2000 < 0.07

    # Each percent belongs to one split.
    percents = []
    for split_percents in pydocs.SPLITS.values():
        percents.extend(split_percents)
    assert sorted(percents) == list(range(100))


def test_prepared_copy(roots, monkeypatch, tmp_path):
    # Enough modules for all splits.
    for i in range(60):
        source = doc(f"m{i}") + "def f():\n" + doc(f"m{i}.f", indent="    ")
        (roots / "python" / f"m{i}.py").write_text(source)
    expected = {document.name: (module, document) for module, document in pydocs.collect()}
    data_dir = tmp_path / "data"

    splits = {split: pydocs.pydocs(split, data_dir=str(data_dir)) for split in pydocs.SPLITS}

    # Each document is in exactly one split, that of its module.
    assert sum(map(len, splits.values())) == len(expected)
    split_by_module = {}
    for split, documents in splits.items():
        assert len(documents) > 0
        for document in documents.items:
            module, original = expected[document.name]
            assert document == original
            assert pydocs.split_of(module) == split
            assert split_by_module.setdefault(module, split) == split

    assert len(list(data_dir.iterdir())) == 1
    assert list(data_dir.rglob("*.array_record*"))
    assert "tensorflow" not in sys.modules

    # The second time the copy is read.
    def fail():
        raise AssertionError("prepared again")

    monkeypatch.setattr(pydocs, "collect", fail)
    again = pydocs.pydocs("train", data_dir=str(data_dir))
    assert again.fingerprint == splits["train"].fingerprint
    assert list(again.items) == list(splits["train"].items)
    assert "tensorflow" not in sys.modules

    # Other versions are another copy.
    monkeypatch.setattr(pydocs, "versions", lambda: {"python": "newer"})
    with pytest.raises(Exception, match="prepared again"):
        pydocs.pydocs("train", data_dir=str(data_dir))


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'.*validation"):
        pydocs.pydocs("dev", data_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
