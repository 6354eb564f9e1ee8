"""The layout of the code: who may import whom (docs/design.md), and the page (tests/page.py)."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests import page
from tests.helpers import ROOT

# Rank of each file, or of all files of a folder. A file imports only files of lower rank, or those
# of its own rank and folder, without cycles.
RANKS = {
    "lm/config.py": 0,
    "lm/escape.py": 0,
    "lm/files.py": 0,
    "lm/flops.py": 0,
    "lm/limited.py": 0,
    "lm/progress.py": 0,
    "lm/startup.py": 0,
    "lm/stopping.py": 0,
    "lm/tensorboard.py": 0,
    "lm/sharding.py": 0,
    "lm/evals/scores/": 0,
    "lm/plan/hlo.py": 0,
    "lm/claim.py": 1,
    "lm/collectives.py": 1,
    "lm/telemetry.py": 2,
    "lm/tracking.py": 1,
    "lm/data/": 1,
    "lm/evals/entries.py": 1,
    "lm/reports/": 1,
    "lm/command_line.py": 2,
    "lm/data/loader.py": 2,
    "lm/nn/kernels/": 2,
    "lm/nn/": 3,
    "lm/models/": 4,
    "lm/objectives/": 5,
    "lm/trained.py": 1,
    "lm/replicas.py": 2,
    "lm/optim.py": 5,
    "lm/step.py": 5,
    "lm/looking.py": 5,
    "lm/decoding/": 5,
    "lm/hf/": 5,
    "lm/plan/search.py": 5,
    "lm/checkpoint.py": 6,
    "lm/evals/": 6,
    "lm/build.py": 7,
    "lm/instructions.py": 7,
    "lm/rl/": 8,
    "lm/weights.py": 8,
    "lm/plan/": 9,
    "lm/evaluate.py": 9,
    "lm/audit.py": 10,
    "lm/reference.py": 10,
    "lm/train.py": 10,
    "lm/convert.py": 10,
    "lm/generate.py": 10,
    "lm/report.py": 10,
    "lm/suggest.py": 10,
    "lm/main.py": 11,
    "lm/prepare/": 11,
    "lm/sweep/": 12,
    "lm/tpu/": 12,
}
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("lm/**/*.py"))

# Over all of lm/, per 100 code lines.
MIN_COMMENTS, MIN_BLANKS = 4.0, 5.0
MAX_COMPREHENSIONS, MAX_LAMBDAS = 4.0, 0.7
# Of a function, without its docstring and without self.
MAX_LINES, MAX_PARAMETERS = 70, 8
# Functions that read better whole: at most five.
LONG_FUNCTIONS: set[str] = set()
# Their parameters are the keys of an entry of config.evals.
ENTRY_CONSTRUCTORS = ("lm/evals/",)


def rank(file):
    """None for a file that has no place in the table; an empty __init__.py needs none."""
    folders = [str(parent) + "/" for parent in Path(file).parents]
    for name in (file, *folders):
        if name in RANKS:
            return RANKS[name]
    return None


def modules(file):
    """Dotted names of all that a file imports, also within its functions; `from a import b` gives a
    and a.b.
    """
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
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
    without = [file for file in FILES if rank(file) is None and file != "lm/__init__.py"]
    assert not without, "give it a place in RANKS and in docs/design.md"


def test_the_design_has_every_room():
    """docs/design.md's table names each file and folder of RANKS."""
    design = (ROOT / "docs/design.md").read_text()
    assert not [name for name in RANKS if f"`{name}`" not in design]


def test_packages_are_empty():
    """Importing a module of a package imports its __init__.py, which the table doesn't see."""
    for file in FILES:
        if file.endswith("__init__.py"):
            assert not list(modules(file)), file


def test_imports_go_down_the_ranks():
    wrong = []
    for file in FILES:
        for other in imported_files(file):
            same_room = rank(other) == rank(file) and Path(other).parent == Path(file).parent
            if not (rank(other) < rank(file) or same_room):
                wrong.append(f"{file} (rank {rank(file)}) imports {other} (rank {rank(other)})")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_cycle():
    graph = {file: set(imported_files(file)) for file in FILES}
    assert sum(map(len, graph.values())) > 20
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_data_is_free_of_jax_and_of_the_rest():
    allowed = ("lm.data", "lm.files", "lm.limited", "lm.progress")
    for file in FILES:
        if not file.startswith("lm/data/"):
            continue
        names = list(modules(file))
        outside = [m for m in names if m.startswith("lm.") and not m.startswith(allowed)]
        jax = [m for m in names if m.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax")]
        assert not outside, (file, outside)
        assert not jax or file == "lm/data/loader.py", (file, jax)


def test_reports_and_scores_import_no_evaluator():
    for file in FILES:
        if file.startswith(("lm/reports/", "lm/evals/scores/")):
            others = [m for m in imported_files(file) if m.startswith("lm/evals/")]
            assert all(m.startswith("lm/evals/scores/") for m in others), (file, others)


def test_the_package_needs_no_other_room_and_no_other_framework():
    """experiments/ and the like import lm, never the other way; no torch outside what converts, no
    TensorFlow where training runs, no pickle.
    """
    other_rooms = {"experiments", "configs", "benchmarks", "tests"}
    for file in FILES:
        roots = {module.split(".")[0] for module in modules(file)}
        assert not roots & (other_rooms | {"pickle", "cloudpickle", "dill"}), (file, roots)
        if not file.startswith("lm/hf/"):
            assert not roots & {"torch", "transformers", "safetensors"}, (file, roots)
        assert "tensorflow" not in roots, file


def test_one_function_expands_paths():
    """`lm.files.expand`: what a path of the project means is said once."""
    others = [file for file in FILES if "expanduser" in (ROOT / file).read_text()]
    assert others == ["lm/files.py"]


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short(file):
    wrong = []
    for function in page.measure((ROOT / file).read_text()).functions:
        where = f"{file}:{function.line} {function.name}"
        if function.length > MAX_LINES and f"{file}:{function.name}" not in LONG_FUNCTIONS:
            wrong.append(f"{where} has {function.length} lines")
        if function.parameters > MAX_PARAMETERS and not file.startswith(ENTRY_CONSTRUCTORS):
            wrong.append(f"{where} has {function.parameters} parameters")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", FILES)
def test_no_tangles(file):
    """No nested comprehension, none over three lines, no lambda over several."""
    lines = page.measure((ROOT / file).read_text()).tangles
    assert not lines, f"{file}: lines {lines}"


def test_the_page():
    """Comments and blank lines enough, comprehensions and lambdas few, over all of lm."""
    assert len(LONG_FUNCTIONS) <= 5
    lm = page.together([page.measure((ROOT / file).read_text()) for file in FILES])
    assert lm.too_long == 0
    assert lm.per_100(lm.comments) >= MIN_COMMENTS
    assert lm.per_100(lm.blanks) >= MIN_BLANKS
    assert lm.per_100(lm.comprehensions) <= MAX_COMPREHENSIONS
    assert lm.per_100(lm.lambdas) <= MAX_LAMBDAS
