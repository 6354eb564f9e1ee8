"""The layout of the code: who may import whom (docs/design.md), and ceilings on the size of
functions.
"""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Rank of each file, or of all files of a folder. A file imports only files of lower rank, or those
# of its own rank and folder, without cycles.
RANKS = {
    "lm/config.py": 0,
    "lm/files.py": 0,
    "lm/flops.py": 0,
    "lm/startup.py": 0,
    "lm/stopping.py": 0,
    "lm/sharding.py": 0,
    "lm/evals/scores/": 0,
    "lm/plan/hlo.py": 0,
    "lm/collectives.py": 1,
    "lm/command_line.py": 1,
    "lm/telemetry.py": 1,
    "lm/data/": 1,
    "lm/reports/": 1,
    "lm/data/loader.py": 2,
    "lm/nn/": 2,
    "lm/models/": 3,
    "lm/objectives/": 4,
    "lm/optim.py": 4,
    "lm/step.py": 4,
    "lm/decoding/": 4,
    "lm/hf/": 4,
    "lm/plan/search.py": 4,
    "lm/checkpoint.py": 5,
    "lm/evals/": 5,
    "lm/build.py": 6,
    "lm/weights.py": 7,
    "lm/plan/": 7,
    "lm/evaluate.py": 8,
    "lm/train.py": 9,
    "lm/convert.py": 9,
    "lm/generate.py": 9,
    "lm/suggest.py": 9,
    "lm/main.py": 10,
}
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("lm/**/*.py"))


def rank(file):
    """None for a file that has no place in the table; an empty __init__.py needs none."""
    folders = [str(parent) + "/" for parent in Path(file).parents]
    return next((RANKS[name] for name in (file, *folders) if name in RANKS), None)


def parse(file):
    return ast.parse((ROOT / file).read_text())


def modules(file):
    """Dotted names of all that a file imports, also within its functions; `from a import b` gives a
    and a.b.
    """
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_files(file):
    """The files of lm that it imports."""
    for module in modules(file):
        path = module.replace(".", "/") + ".py"
        if path in FILES:
            yield path


def test_every_file_has_a_rank():
    assert len(FILES) > 20
    assert not [file for file in FILES if rank(file) is None and file != "lm/__init__.py"], (
        "give it a place in RANKS and in docs/design.md"
    )


def test_packages_are_empty():
    """Importing a module of a package imports its __init__.py, which the table doesn't see."""
    for file in FILES:
        if file.endswith("__init__.py"):
            assert not list(modules(file)), file


def test_imports_go_down_the_ranks():
    wrong = [
        f"{file} (rank {rank(file)}) imports {other} (rank {rank(other)})"
        for file in FILES
        for other in imported_files(file)
        if not (
            rank(other) < rank(file)
            or (rank(other) == rank(file) and Path(other).parent == Path(file).parent)
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle():
    graph = {file: set(imported_files(file)) for file in FILES}
    assert sum(map(len, graph.values())) > 20
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_data_is_free_of_jax_and_of_the_rest():
    for file in FILES:
        if file.startswith("lm/data/"):
            outside = [
                m
                for m in modules(file)
                if m.startswith("lm.") and not m.startswith(("lm.data", "lm.files"))
            ]
            jax = [
                m
                for m in modules(file)
                if m.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax")
            ]
            assert not outside, (file, outside)
            assert not jax or file == "lm/data/loader.py", (file, jax)


def test_the_package_needs_no_other_room_and_no_other_framework():
    """experiments/ and the like import lm, never the other way; no torch outside what converts, no
    TensorFlow where training runs, no pickle.
    """
    for file in FILES:
        roots = {module.split(".")[0] for module in modules(file)}
        assert not roots & {
            "experiments",
            "configs",
            "benchmarks",
            "tests",
            "pickle",
            "cloudpickle",
            "dill",
        }, (file, roots)
        assert file.startswith("lm/hf/") or not roots & {"torch", "transformers", "safetensors"}, (
            file,
            roots,
        )
        assert file == "lm/prepare.py" or "tensorflow" not in roots, file


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short(file):
    """At most 100 lines, and 12 parameters, `self` counted."""
    for node in ast.walk(parse(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            a = node.args
            parameters = len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
            assert lines <= 100, f"{file}: {node.name} has {lines} lines"
            assert parameters <= 12, f"{file}: {node.name} has {parameters} parameters"
