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


def doc(text):
    return f'"""{text} {LONG}"""\n'


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Two libraries: names, duplicates, short docstrings, files that can't be parsed, and a module
    that must not be imported.
    """
    files = {
        "python/zeta.py": doc("zeta") + 'raise SystemExit("imported")\n',
        "python/alpha.py": doc("alpha")
        + "def f():\n    "
        + doc("alpha.f")
        + "\ndef short():\n    'Too short.'\n",
        "python/package/__init__.py": doc("package")
        + "class C:\n    "
        + doc("package.C")
        + "    async def m(self):\n        "
        + doc("package.C.m"),
        "python/package/sub.py": doc("alpha"),  # an exact duplicate of alpha's
        "python/bad.py": doc("bad") + "def f(:\n",
        "python/zero.py": doc("zero") + "\0",
        "python/package/test/t.py": doc("a test"),
        "python/site-packages/other.py": doc("another library"),
        "python/config-3.11/c.py": doc("config"),
        "python/surrogate.py": f'"""\\ud800 {LONG}"""\n',
        "python/pydoc_data/topics.py": f'"""Generated. {LONG}"""\ntopics = {{"while": "while {LONG}", "assert": "assert {LONG}", "short": "no"}}\n',  # noqa: E501
        "numpy/__init__.py": doc("numpy"),
        "numpy/linalg.py": doc("linalg"),
        "numpy/latin.py": '# coding: latin1\n"""\xe9 ' + LONG + '"""\n',
        "numpy/tests/test_a.py": doc("numpy's test"),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="latin1")
    monkeypatch.setattr(
        pydocs, "_roots", lambda: {library: tmp_path / library for library in ("python", "numpy")}
    )
    monkeypatch.setattr(pydocs, "_versions", lambda: {"python": "fake"})
    return tmp_path


def test_docstrings_of_every_class_and_function():
    tree = ast.parse(
        '"""m"""\nclass A:\n  "a"\n  def f(self):\n    "f"\n    def g():\n      "g"\nasync def h():\n  "h"\ndef no(): pass\nx = "not one"'  # noqa: E501
    )
    assert dict(pydocs._docstrings(tree, "m")) == {
        "m": "m",
        "m.A": "a",
        "m.A.f": "f",
        "m.A.f.g": "g",
        "m.h": "h",
    }


def test_docstrings_under_a_condition():
    # numpy and the standard library define much under `if` and `try`.
    tree = ast.parse(
        'if x:\n  def f():\n    "f"\nelse:\n  def g():\n    "g"\ntry:\n  class A:\n    '
        '"a"\nexcept ImportError:\n  def h():\n    "h"'
    )
    assert sorted(pydocs._docstrings(tree, "m")) == [
        ("m.A", "a"),
        ("m.f", "f"),
        ("m.g", "g"),
        ("m.h", "h"),
    ]


def test_collect_gives_names_labels_and_no_duplicates(roots):
    found = list(pydocs.collect())
    names = [d.name for _, d in found]
    assert sorted(names) == sorted(
        [
            "zeta",
            "alpha",
            "alpha.f",
            "package",
            "package.C",
            "package.C.m",
            "topics.assert",
            "topics.while",
            "numpy",
            "numpy.linalg",
            "numpy.latin",
        ]
    )
    assert len({d.text for _, d in found}) == len(found)
    assert {d.name: d.label for _, d in found} == {
        n: "numpy" if n.startswith("numpy") else "python" for n in names
    }
    assert all(
        len(d.text) >= pydocs.MIN_CHARS
        and (d.name.split(".")[-1] in d.text or d.name == "numpy.latin")
        for _, d in found
    )
    # a file's own encoding is followed
    assert dict((d.name, d.text) for _, d in found)["numpy.latin"].startswith("\xe9 ")
    # What a split goes by: the module, however deep the name; a topic is one by itself.
    modules = {d.name: module for module, d in found}
    assert (
        modules["package.C.m"] == modules["package"] == "package" and modules["alpha.f"] == "alpha"
    )
    assert modules["topics.while"] == "topics.while" and modules["numpy.linalg"] == "numpy.linalg"
    assert found == list(pydocs.collect())


def test_nothing_is_imported(roots, monkeypatch):
    monkeypatch.syspath_prepend(str(roots / "python"))
    before = set(sys.modules)
    assert any(d.name == "zeta" for _, d in pydocs.collect())
    assert not (set(sys.modules) - before) & {"zeta", "alpha", "package"}


def test_split_is_by_module_and_stays():
    # Pinned: another hash would move test documents into training.
    modules = {
        "os": "train",
        "jax": "train",
        "numpy": "validation",
        "scipy.stats": "validation",
        "io": "test",
        "scipy.optimize._minimize": "test",
    }
    assert {m: pydocs.split_of(m) for m in modules} == modules
    shares = Counter(pydocs.split_of(f"module{i}") for i in range(2000))
    assert (
        0.82 < shares["train"] / 2000 < 0.88
        and 0.07 < shares["validation"] / 2000 < 0.13
        and 0.03 < shares["test"] / 2000 < 0.07
    )
    assert sorted(i for r in pydocs.SPLITS.values() for i in r) == list(range(100))


def test_prepared_copy(roots, monkeypatch, tmp_path):
    # Enough modules for all splits.
    for i in range(60):
        (roots / "python" / f"m{i}.py").write_text(doc(f"m{i}") + "def f():\n    " + doc(f"m{i}.f"))
    expected = {d.name: (module, d) for module, d in pydocs.collect()}
    data_dir = tmp_path / "data"
    splits = {split: pydocs.pydocs(split, data_dir=str(data_dir)) for split in pydocs.SPLITS}
    for split, documents in splits.items():
        assert len(documents) > 0
        for d in documents.items:
            module, original = expected[d.name]
            assert d == original and pydocs.split_of(module) == split
    assert sum(map(len, splits.values())) == len(expected)  # each in exactly one split
    modules = [{expected[d.name][0] for d in documents.items} for documents in splits.values()]
    assert (
        not modules[0] & modules[1] and not modules[0] & modules[2] and not modules[1] & modules[2]
    )
    assert len(list(data_dir.iterdir())) == 1 and list(data_dir.rglob("*.array_record*"))

    def fail():
        raise AssertionError("prepared again")

    monkeypatch.setattr(pydocs, "collect", fail)
    again = pydocs.pydocs("train", data_dir=str(data_dir))
    assert again.fingerprint == splits["train"].fingerprint and list(again.items) == list(
        splits["train"].items
    )
    assert "tensorflow" not in sys.modules
    # Other versions are another copy.
    monkeypatch.setattr(pydocs, "_versions", lambda: {"python": "newer"})
    with pytest.raises(Exception, match="prepared again"):
        pydocs.pydocs("train", data_dir=str(data_dir))


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'.*validation"):
        pydocs.pydocs("dev", data_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
