"""pydocs: the corpus that every machine has. The docstrings of Python and of the installed numpy,
scipy and jax, and pydoc's topics.

Each document is one docstring with its qualified name, and its library as the label. Sources are
parsed with `ast`, never imported. Exact duplicates go; train, validation and test are split by
module, so that near-identical neighbours stay together.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from lm import files, progress
from lm.data import sources
from lm.data.sources import Document, Documents

LIBRARIES = ("python", "numpy", "scipy", "jax")
MIN_CHARS = 80  # shorter docstrings ("Return self.") say nothing about their library
# Folders left out: other packages, tests, and programs that come with Python.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "__pycache__",
}
# Percent of the modules, by hash.
SPLITS = {"train": range(0, 85), "validation": range(85, 95), "test": range(95, 100)}


def _roots() -> dict[str, Path]:
    """The folder of each library's source files."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for library in LIBRARIES[1:]:
        # Finds the package without importing it.
        roots[library] = Path(importlib.util.find_spec(library).origin).parent
    return roots


def versions() -> dict[str, str]:
    """Returns the installed version of each library."""
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    for library in LIBRARIES[1:]:
        installed[library] = importlib.metadata.version(library)
    return installed


def collect() -> Iterator[tuple[str, Document]]:
    """Yields (module, document) for every docstring on this machine, in a fixed order.

    The module is what a split goes by. Exact duplicates are left out, and what is too short.
    """
    seen = set()
    for library in _roots():
        for group, document in docstrings(library):
            text = document.text
            if len(text) >= MIN_CHARS and text not in seen and sources.is_utf8_text(text):
                seen.add(text)
                yield group, document


def docstrings(library: str) -> Iterator[tuple[str, Document]]:
    """Yields (module, document) for every docstring of a library, in a fixed order."""
    for module, tree in _parsed_modules(library):
        # pydoc's topics are in a dict, not in docstrings.
        are_topics = library == "python" and module == "pydoc_data.topics"
        for name, text in _topics(tree) if are_topics else _docstrings(tree, module):
            # A topic is as good as a module: it is a chapter of its own.
            yield name if are_topics else module, Document(text, name, library)


def _parsed_modules(library: str) -> Iterator[tuple[str, ast.Module]]:
    """(module's dotted name, syntax tree) of every source file of a library that can be parsed."""
    root = _roots()[library]
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        # config-3.11-x86_64-linux-gnu and its like are Python's own build files.
        is_build_file = any(part.startswith("config-") for part in parts)
        if SKIPPED.intersection(parts) or is_build_file:
            continue

        tree = _parse(path)
        if tree is None:
            continue

        # The standard library's modules have no package of its name above them.
        package = [] if library == "python" else [library]
        module = ".".join(package + [part for part in parts if part != "__init__"])
        yield module, tree


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file; None for templates and files that are bad on purpose."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, UnicodeDecodeError):
        return None


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and of all classes and functions in it.

    Those under `if`, `try` or `with` count too.
    """
    named = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if isinstance(node, named):
        text = ast.get_docstring(node)
        if text:
            yield name, text

    for child in ast.iter_child_nodes(node):
        # Definitions are statements, and lie within statements or the handlers of a `try`.
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            child_name = f"{name}.{child.name}" if isinstance(child, named) else name
            yield from _docstrings(child, child_name)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, text) of pydoc's topics: the module's one assignment is a dict {topic: text}."""
    assignment = next(node for node in tree.body if isinstance(node, ast.Assign))
    for topic, text in sorted(ast.literal_eval(assignment.value).items()):
        yield f"topics.{topic}", text


def split_of(module: str) -> str:
    """Returns the split that a module's documents belong to."""
    percent = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little") % 100
    return next(split for split, percents in SPLITS.items() if percent in percents)


class Pydocs(tfds.core.GeneratorBasedBuilder):
    """The corpus as a TFDS builder, written as ArrayRecord without TensorFlow."""

    VERSION = tfds.core.Version("1.0.1")

    def _info(self):
        features = {key: tfds.features.Text() for key in ("text", "name", "label")}
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        by_split = {split: [] for split in SPLITS}
        for module, document in collect():
            by_split[split_of(module)].append(document)

        return {split: self._generate_examples(documents) for split, documents in by_split.items()}

    def _generate_examples(self, documents):
        for index, document in enumerate(documents):
            yield index, dict(text=document.text, name=document.name, label=document.label)


def pydocs(split: str, *, data_dir: str) -> Documents:
    """Returns a split of the corpus of this machine's installed versions.

    It is prepared on first use (some 15 s).

    Args:
      split: train, validation or test.
      data_dir: where prepared copies are kept, one for each set of versions.

    Raises:
      ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"pydocs has no split {split!r}; valid: {list(SPLITS)}")

    # A copy's name follows all that decides its contents.
    installed = versions()
    splits = sorted(map(str, SPLITS.items()))
    identity = [installed, str(Pydocs.VERSION), MIN_CHARS, sorted(SKIPPED), splits]
    key = files.short_hash(json.dumps(identity).encode())[:12]
    folder = Path(files.expand(data_dir)) / f"pydocs-{key}"

    if not folder.exists():
        described = ", ".join(f"{library} {version}" for library, version in installed.items())
        with progress.activity(f"pydocs: reading the docstrings of {described}"):
            _prepare(folder)

    documents = list(sources.tfds(split, name="pydocs", data_dir=str(folder), label_key="label"))
    return Documents(documents, sources.fingerprint(documents))


def _prepare(folder: Path) -> None:
    """Writes the corpus to a folder, which appears when it is complete."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself there
        tfds.disable_progress_bar()
        builder = Pydocs(data_dir=partial, file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)
        )

    try:
        partial.rename(folder)
    except OSError:
        # Another process was faster; its copy is the same.
        shutil.rmtree(partial, ignore_errors=True)
