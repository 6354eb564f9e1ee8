"""Notebooks: takes their outputs out, and executes them for tests.

python tests/notebooks.py experiments/colab.ipynb   # takes its outputs out
"""

import json
import os
import sys
from pathlib import Path

import matplotlib
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

ROOT = Path(__file__).parents[1]

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


# Executing.

STEPS = 12  # of colab.ipynb
# What CI trains, small: for colab.ipynb pydocs' main job, for checkpoints.ipynb any text.
CONFIGS = {
    "colab.ipynb": f"""
from configs import pydocs

def get_config():
    c = pydocs.get_config("micro")
    c.tokenizer.vocab_size = 512
    c.tokenizer.max_documents = 500
    c.data.length = 128
    c.data.batch_size = c.data.streams = 4
    c.optimizer.warmup_steps = 2
    c.train.length = "{STEPS} steps"
    c.train.log_every = 1
    c.checkpoint.every = 6
    c.evals.part.every = 6
    c.evals.part.max_documents = 8
    del c.evals["validation"], c.evals["library"], c.evals["samples"]
    return c
""",
    "checkpoints.ipynb": """
from configs import text
from lm.models import presets

def get_config():
    c = text.get_config("docs/*.md")
    c.model.update(presets.get("micro") | dict(vocab_size=0, scan_unroll=1))
    c.tokenizer.vocab_size = 512
    c.data.length = 128
    c.data.batch_size = c.data.streams = 4
    c.optimizer.warmup_steps = 2
    c.train.length = "60 steps"
    return c
""",
}
# Of a notebook's own process: a TPU would be its, and no command's.
NO_DEVICES = """
import jax

assert not jax._src.xla_bridge.backends_are_initialized()
"""


def small_setting(name, folder):
    """The environment in which a notebook trains little, and has all its files in `folder`."""
    (folder / "home").mkdir(exist_ok=True)
    (folder / "small.py").write_text(CONFIGS[name])
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return {
        "LM_SOURCE": str(ROOT),
        "LM_SAVE_TO": str(folder / "runs"),
        "LM_CONFIG": str(folder / "small.py"),
        "HOME": str(folder / "home"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # the list of fonts takes seconds to make
        "XLA_FLAGS": " ".join(flags),
    }


def read(path):
    return nbformat.read(path, as_version=4)


def cell_named(notebook, name):
    [cell] = [cell for cell in notebook.cells if cell.id == name]
    return cell


def execute(name, folder, on_start=None):
    """Executes a notebook of experiments/ in the small setting, and once more if its kernel died.

    Args:
      on_start: called with a cell and the kernel's process id when the cell starts.
    """
    for attempt in range(2):
        notebook = read(ROOT / "experiments" / name)
        notebook.cells.append(nbformat.v4.new_code_cell(NO_DEVICES))
        client = NotebookClient(
            notebook,
            timeout=300,  # seconds, of a cell
            startup_timeout=120,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )

        def start(cell, cell_index, client=client):
            if on_start:
                on_start(cell, client.km.provisioner.pid)

        client.on_cell_start = start
        try:
            client.execute(env=os.environ | small_setting(name, folder))
            return notebook
        except DeadKernelError:
            if attempt:
                raise


def printed(notebook, name):
    """What a cell printed, without the warnings of its own process."""
    outputs = cell_named(notebook, name).outputs
    streams = [output for output in outputs if output.output_type == "stream"]
    return "".join(output.text for output in streams if output.name == "stdout")


def num_pictures(notebook):
    """Cell -> how many PNGs it shows, those without left out."""
    counts = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            if "image/png" in output.get("data", {}):
                counts[cell.id] = counts.get(cell.id, 0) + 1
    return counts


def check_checkpoints(notebook):
    """Asserts what checkpoints.ipynb shows in the small setting."""
    assert num_pictures(notebook) == {"pictures": 3}
    assert "model.safetensors" in printed(notebook, "checkpoint")
    assert "Review: a warm film with a warm end\nSentiment:⟫ good" in printed(notebook, "evaluate")
    assert "The film was⟫ good |  great" in printed(notebook, "evaluate")
    [table] = cell_named(notebook, "table").outputs
    assert "| accuracy |" in table.data["text/markdown"]
    exported = printed(notebook, "export")
    assert "model.safetensors: the same bytes\n" in exported and "other bytes" not in exported


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(stripped(path.read_text()))
        print(f"{path}: only what was written by hand is left")
