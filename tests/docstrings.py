"""Some docstrings of the installed libraries, for tests of tasks about pydocs: as `lm.data.pydocs`
reads them, but of few files.
"""

import ast
import functools

from lm.data import pydocs, pydocs_tasks
from lm.data.sources import Document

FILES = {
    "train": {
        "python": ("argparse", "zipfile", "calendar", "tarfile"),
        "numpy": ("numpy/linalg/_linalg", "numpy/lib/_function_base_impl"),
        "scipy": ("scipy/signal/windows/_windows", "scipy/linalg/_basic"),
        "jax": ("jax/_src/nn/functions", "jax/_src/numpy/linalg"),
    },
    "validation": {
        "python": ("bdb", "textwrap", "mailbox"),
        "numpy": ("numpy/fft/_pocketfft", "numpy/lib/_arraysetops_impl"),
        "scipy": ("scipy/optimize/_zeros_py", "scipy/linalg/_decomp"),
        "jax": ("jax/_src/numpy/fft", "jax/_src/lax/linalg"),
    },
}


@functools.cache
def docstrings(split, data_dir=""):
    """Stands in for `lm.data.pydocs_tasks._docstrings`."""
    roots = pydocs._roots()
    docs = []
    for library, names in FILES[split].items():
        # Python's have no package of its name above them.
        folder = roots[library] if library == "python" else roots[library].parent
        for name in names:
            tree = ast.parse((folder / f"{name}.py").read_bytes())
            for qualified, text in pydocs._docstrings(tree, name.replace("/", ".")):
                if len(text) >= pydocs.MIN_CHARS:
                    docs.append(pydocs_tasks.parse(Document(text, qualified, library)))
    return docs
