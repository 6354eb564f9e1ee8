"""Notebooks: takes their outputs out, and executes them.

python tests/notebooks.py experiments/colab.ipynb   # takes its outputs out
"""

import json
import sys
from pathlib import Path

import nbformat

# All that a notebook and its cells keep of their metadata.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def stripped(text: str) -> str:
    """A notebook's file without outputs, counts and metadata of the machine that it ran on."""
    notebook = json.loads(text)
    notebook["metadata"] = METADATA
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = []
    nbformat.validate(notebook)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(stripped(path.read_text()))
        print(f"{path}: only what was written by hand is left")
