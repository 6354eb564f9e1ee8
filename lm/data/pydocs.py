"""pydocs: the corpus that every machine has. The docstrings of Python and of the installed numpy,
scipy and jax, and pydoc's topics.

Each document is one docstring with its qualified name, and its library as the label. Sources are
parsed with `ast`, never imported. Exact duplicates go; train, validation and test are split by
module, so that near-identical neighbours stay together.
"""

import ast
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from lm.data import sources
from lm.data.sources import Document, Documents

LIBRARIES = ("python", "numpy", "scipy", "jax")
MIN_CHARS = 80  # shorter docstrings ("Return self.") say nothing about their library
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
# percent of the modules, by hash
SPLITS = {"train": range(0, 85), "validation": range(85, 95), "test": range(95, 100)}


def _roots() -> dict[str, Path]:
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for library in LIBRARIES[1:]:
        roots[library] = Path(importlib.util.find_spec(library).origin).parent
    return roots


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {"python": ".".join(map(str, sys.version_info[:3]))} | {
        name: metadata.version(name) for name in LIBRARIES[1:]
    }


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and of all classes and functions in it, those under
    if, try or with too.
    """
    named = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if isinstance(node, named) and (text := ast.get_docstring(node)):
        yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from _docstrings(
                child, f"{name}.{child.name}" if isinstance(child, named) else name
            )


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(path.read_bytes())
    # a library's templates and deliberately bad files
    except (SyntaxError, ValueError, UnicodeDecodeError):
        return None


def collect() -> Iterator[tuple[str, Document]]:
    """(module, document) for every docstring on this machine, in a fixed order, exact duplicates
    left out.
    """
    seen = set()
    for library, root in _roots().items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if (
                SKIPPED.intersection(parts)
                or any(p.startswith("config-") for p in parts)
                or (tree := _parse(path)) is None
            ):
                continue
            module = ".".join(
                ([] if library == "python" else [library]) + [p for p in parts if p != "__init__"]
            )
            found = list(_docstrings(tree, module))
            if library == "python" and module == "pydoc_data.topics":
                topics = next(
                    ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)
                )
                found = [(f"topics.{topic}", text) for topic, text in sorted(topics.items())]
            for name, text in found:
                if len(text) >= MIN_CHARS and text not in seen and _is_unicode(text):
                    seen.add(text)
                    # Topics are as good as modules: each is a chapter of its own.
                    yield (
                        (name if name.startswith("topics.") else module),
                        Document(text, name, library),
                    )


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode("utf-8"))
    except UnicodeEncodeError:  # a docstring with lone surrogates
        return False


def split_of(module: str) -> str:
    """The split that a module's documents belong to."""
    percent = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little") % 100
    return next(split for split, percents in SPLITS.items() if percent in percents)


class Pydocs(tfds.core.GeneratorBasedBuilder):
    """The corpus as a TFDS builder, written as ArrayRecord without TensorFlow."""

    VERSION = tfds.core.Version("1.0.1")

    def _info(self):
        features = {key: tfds.features.Text() for key in Document._fields}
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        by_split = {split: [] for split in SPLITS}
        for module, document in collect():
            by_split[split_of(module)].append(document)
        return {split: self._generate_examples(documents) for split, documents in by_split.items()}

    def _generate_examples(self, documents):
        for index, document in enumerate(documents):
            yield index, document._asdict()


def pydocs(split: str, *, data_dir: str) -> Documents:
    """A split of the corpus of this machine's installed versions, prepared on first use (some 15
    s).

    Args:
      split: train, validation or test.
      data_dir: where prepared copies are kept, one for each set of versions.

    Raises:
      ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"pydocs has no split {split!r}; valid: {list(SPLITS)}")
    versions = _versions()
    key = hashlib.sha256(
        json.dumps(
            [
                versions,
                str(Pydocs.VERSION),
                MIN_CHARS,
                sorted(SKIPPED),
                sorted(map(str, SPLITS.items())),
            ]
        ).encode()
    ).hexdigest()[:12]
    folder = Path(data_dir).expanduser() / f"pydocs-{key}"
    if not folder.exists():
        logging.info(
            "pydocs: reading the docstrings of %s",
            ", ".join(f"{k} {v}" for k, v in versions.items()),
        )
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself there
            tfds.disable_progress_bar()
            Pydocs(data_dir=partial, file_format="array_record").download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=1)
            )
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial, ignore_errors=True)
    documents = sources.tfds(split, name="pydocs", data_dir=str(folder), label_key="label")
    documents = list(documents)
    return Documents(documents, sources.fingerprint(documents))
