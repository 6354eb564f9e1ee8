"""The notebooks of experiments/: executed whole in a small setting, and kept without outputs."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError, DeadKernelError

from experiments import notebook as notebook_lib
from tests import notebooks
from tests.helpers import PNG, ROOT
from tests.notebooks import STEPS, cell_named, execute, num_pictures, printed, read

PATHS = sorted(ROOT.glob("experiments/*.ipynb"))


# As files.


def test_both_notebooks_are_there():
    assert [path.name for path in PATHS] == ["checkpoints.ipynb", "colab.ipynb"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_nothing_but_what_was_written_by_hand(path):
    """No outputs, counts or metadata. Editors give cells random ids; here they are names, so that
    they stay.
    """
    text = path.read_text()
    assert text == notebooks.stripped(text), f"python tests/notebooks.py {path.relative_to(ROOT)}"
    ids = [cell["id"] for cell in json.loads(text)["cells"]]
    assert len(set(ids)) == len(ids)
    assert not [name for name in ids if not re.fullmatch(r"[a-z]+(-why)?", name)]


def test_stripping_takes_out_what_an_execution_leaves():
    notebook = nbformat.v4.new_notebook()
    output = nbformat.v4.new_output("stream", text="of this machine")
    cell = nbformat.v4.new_code_cell("1", execution_count=3, outputs=[output], id="one")
    cell.metadata["collapsed"] = True
    notebook.cells.append(cell)
    notebook.metadata["widgets"] = {"state": {}}
    stripped = notebooks.stripped(nbformat.writes(notebook))
    assert "of this machine" not in stripped and "widgets" not in stripped
    assert json.loads(stripped)["cells"] == [
        dict(
            cell_type="code", execution_count=None, id="one", metadata={}, outputs=[], source=["1"]
        )
    ]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_no_address_is_given(path):
    assert 'SOURCE = os.environ.get("LM_SOURCE", "")' in cell_named(read(path), "settings").source
    assert "http" not in path.read_text()


# The first cells.


def clone(source):
    """Executes the cell that gets lm; returns where it is."""
    cells = [cell_named(read(path), "clone").source for path in PATHS]
    assert cells[0] == cells[1]
    names = {"os": os, "SOURCE": source}
    exec(cells[0], names)
    return names["CLONE"]


def test_a_source_is_wanted():
    with pytest.raises(ValueError, match="SOURCE is empty; wanted what you give to `git clone`"):
        clone("")


def test_a_folder_is_used_as_it_is():
    assert clone(str(ROOT)) == ROOT


def test_anything_else_is_cloned_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="(?s)SOURCE = .*can't be cloned: .*/nothing"):
        clone(f"file://{tmp_path}/nothing")

    git = ["git", "-C", str(tmp_path / "origin"), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "setup.cfg").write_text("[metadata]\n")
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    for _ in range(2):
        assert clone(f"file://{tmp_path}/origin") == tmp_path / "lm-clone"
    assert (tmp_path / "lm-clone" / "setup.cfg").exists()


# Which machine.


@pytest.mark.parametrize(
    "variables, platform",
    [
        ({"JAX_PLATFORMS": "tpu,cpu"}, "tpu"),
        ({"JAX_PLATFORMS": "cuda"}, "gpu"),
        ({"JAX_PLATFORMS": "cpu", "COLAB_TPU_1VM": "1"}, "cpu"),
        ({"COLAB_TPU_1VM": "1"}, "tpu"),
        ({"TPU_ACCELERATOR_TYPE": "v5e-1"}, "tpu"),
        ({"COLAB_TPU_1VM": ""}, "cpu"),
    ],
)
def test_the_machine_is_known_without_jax(variables, platform, monkeypatch):
    for name in ("JAX_PLATFORMS", "COLAB_TPU_1VM", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(notebook_lib.glob, "glob", lambda pattern: [])
    assert notebook_lib.accelerator() == platform


def test_gpus_and_tpus_are_known_by_their_files(monkeypatch):
    for name in ("JAX_PLATFORMS", "COLAB_TPU_1VM", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.delenv(name, raising=False)
    for start, platform in (("/dev/nvidia", "gpu"), ("/dev/accel", "tpu"), ("/dev/vfio/", "tpu")):
        files = {f"{start}[0-9]*": [f"{start}0"]}
        monkeypatch.setattr(notebook_lib.glob, "glob", lambda pattern, f=files: f.get(pattern, []))
        assert notebook_lib.accelerator() == platform


def test_a_silent_fall_to_the_cpu_is_an_error(capsys):
    notebook_lib.check_platform("cpu")
    assert re.match(r"JAX finds: cpu \d+ cpu", capsys.readouterr().out)
    with pytest.raises(RuntimeError, match="wanted the platform 'tpu', JAX finds 'cpu .*runtime"):
        notebook_lib.check_platform("tpu")


def test_devices_that_cannot_be_used_are_an_error(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(RuntimeError, match="(?s)JAX finds 'nothing'.*JAX said:.*tpu"):
        notebook_lib.check_platform("tpu")


# Installing.


@pytest.fixture
def pip(monkeypatch):
    """What would be run instead of pip."""
    commands = []
    monkeypatch.setattr(notebook_lib, "run", commands.append)
    return commands


def without_jax(monkeypatch):
    modules = {name: module for name, module in sys.modules.items() if name != "jax"}
    monkeypatch.setattr(notebook_lib.sys, "modules", modules)


def test_what_is_here_is_not_installed_again(pip, capsys):
    notebook_lib.install("cpu", "hf")
    assert not pip and "nothing to install" in capsys.readouterr().out


def test_what_is_missing_is_installed_for_the_platform(pip, monkeypatch):
    without_jax(monkeypatch)
    monkeypatch.setattr(notebook_lib, "missing", lambda lines, extra="": iter(["flax>=1"]))
    notebook_lib.install("tpu", "gcs")
    notebook_lib.install("tpu")
    notebook_lib.install("gpu", "gcs")
    notebook_lib.install("cpu")
    installed = "-m pip install --quiet -c constraints.txt -e".split()
    targets = [".[tpu,gcs]", ".[tpu,gcs]", ".[cuda,gcs]", "."]
    assert pip == [[*installed, target] for target in targets]


def test_nothing_is_installed_beside_an_imported_jax(pip, monkeypatch):
    monkeypatch.setattr(notebook_lib, "missing", lambda lines, extra="": iter(["flax>=1"]))
    with pytest.raises(RuntimeError, match="jax was imported before .*: restart the runtime"):
        notebook_lib.install("cpu")
    assert not pip


def test_a_package_that_changed_under_the_notebook_wants_a_restart(pip, monkeypatch):
    without_jax(monkeypatch)
    monkeypatch.setattr(notebook_lib, "missing", lambda lines, extra="": iter(["numpy>=9"]))
    versions = iter([{"numpy": "1", "scipy": "1"}, {"numpy": "2", "scipy": "1"}])
    monkeypatch.setattr(notebook_lib, "_versions", lambda: next(versions))
    monkeypatch.setattr(notebook_lib, "KEPT", ("numpy", "scipy"))
    with pytest.raises(RuntimeError, match="^numpy was imported in another version: restart"):
        notebook_lib.install("cpu")


def test_an_unknown_platform(pip):
    with pytest.raises(ValueError, match=r"PLATFORM = 'tpv'; valid: \['cpu', 'gpu', 'tpu'\]"):
        notebook_lib.install("tpv")


def test_missing_requirements():
    """Absent ones, other versions, and those of extras of extras; markers are obeyed."""
    lines = ["numpy>=2", "numpy>=99", "no-such-package", "also-none; python_version < '3'"]
    assert list(notebook_lib.missing(lines)) == ["numpy>=99", "no-such-package"]
    # jax[tpu] needs libtpu and requests, whose absence jax alone doesn't show.
    names = [line.split("=")[0] for line in notebook_lib.requirements(["tpu", "gcs"])]
    assert {"jax[tpu]", "gcsfs", "importlib_resources>"} <= set(names)
    lacking = list(notebook_lib.missing(["jax[cuda13]"]))
    assert lacking and all("cuda" in line for line in lacking)


# Where runs are saved.


def test_where_runs_are_saved(tmp_path):
    assert notebook_lib.folder("runs") == str(ROOT / "runs")
    assert notebook_lib.folder(str(tmp_path)) == str(tmp_path)
    assert notebook_lib.folder("gs://bucket/runs/") == "gs://bucket/runs"
    with pytest.raises(ValueError, match="works on Colab only; wanted gs://... or a folder"):
        notebook_lib.folder("drive")


# Commands.


def test_a_command_that_fails_shows_why(capsys):
    with pytest.raises(RuntimeError, match=r"failed \(exit status 1\): no configuration key 'x'"):
        notebook_lib.run(["-c", "print('begins')\nexit('\\nerror: no configuration key \\'x\\'')"])
    out = capsys.readouterr().out
    assert out.startswith("$ python -c ") and "\nbegins\n" in out and "error: no" in out


@pytest.fixture
def drawn(monkeypatch):
    """The pictures that a cell shows one after the other in the same place."""
    pictures = []
    place = SimpleNamespace(update=pictures.append)
    monkeypatch.setattr(notebook_lib, "display", lambda picture, display_id: place)
    return pictures


def test_pictures_are_drawn_while_a_command_runs(capsys, drawn):
    notebook_lib.run(["-c", "import time; print('é' * 9); time.sleep(1.5)"], lambda: PNG, every=0.5)
    assert len(drawn) >= 3 and drawn[0].data == PNG
    assert "é" * 9 in capsys.readouterr().out


@pytest.mark.usefixtures("drawn")
def test_a_picture_that_fails_leaves_no_command_behind(tmp_path):
    pictures = iter([PNG])
    code = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    with pytest.raises(StopIteration):
        notebook_lib.run(["-c", code], lambda: next(pictures), every=1.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_an_interrupt_is_passed_on_once(tmp_path):
    """Jupyter interrupts a kernel with all that it started. A second interrupt would end a run that
    is being saved.
    """
    command = (
        "import os, signal, time\n"
        "told = []\n"
        "signal.signal(signal.SIGINT, lambda *_: told.append(1))\n"
        f"open('{tmp_path}/begun', 'w')\n"
        "while not told: time.sleep(0.01)\n"
        "time.sleep(1)\n"
        "print('told', len(told), 'times, in a group of its own:', os.getpgrp() == os.getpid())\n"
    )
    code = (
        # As in a kernel, whatever the shell that started the tests ignores.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from experiments import notebook; notebook.run(['-c', {command!r}])"
    )
    kernel = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / "begun")
    os.killpg(kernel.pid, signal.SIGINT)
    out, _ = kernel.communicate(timeout=60)
    assert "interrupted: the command is told to end\n" in out
    # Two signals at almost the same time may count as one: Jupyter must not reach it.
    assert "\ntold 1 times, in a group of its own: True\n" in out
    assert "KeyboardInterrupt: the command has ended; run this cell again to go on" in out


@pytest.mark.skipif(sys.platform != "linux", reason="the death of a parent is a signal on Linux")
def test_a_command_ends_with_its_kernel(tmp_path):
    """A run gets SIGTERM, and so is saved, when the process that started it is killed."""
    command = (
        "import os, signal, time\n"
        "def end(*_):\n"
        f"    open('{tmp_path}/told', 'w')\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"open('{tmp_path}/begun', 'w')\n"
        "time.sleep(60)\n"
    )
    code = f"from experiments import notebook; notebook.run(['-c', {command!r}])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL) as one:
        wait_for(tmp_path / "begun")
        one.kill()
    wait_for(tmp_path / "told")


def wait_for(path, seconds=60):
    for _ in range(seconds * 20):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} didn't come")


# Executed.


def test_a_notebook_whose_kernel_dies_is_executed_once_more(tmp_path, monkeypatch):
    code = "import os\nif not os.path.exists('here'):\n    open('here', 'w')\n    os._exit(1)"

    def short_notebook(path):
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])

    monkeypatch.setattr(notebooks, "read", short_notebook)
    monkeypatch.setattr(notebooks, "NO_DEVICES", "print('came so far')")
    notebook = execute("colab.ipynb", tmp_path)
    assert "came so far" in str(notebook.cells[-1].outputs)
    code = "import os\nos._exit(1)"
    with pytest.raises(DeadKernelError):
        execute("colab.ipynb", tmp_path)


@pytest.mark.slow
def test_colab(tmp_path):
    """Interrupted while it trains, then executed whole: it goes on, and trains no step twice."""
    metrics = tmp_path / "runs" / "small" / "metrics.jsonl"

    def interrupt(cell, kernel):
        def wait_and_interrupt():
            wait_for(metrics)
            while '"train/loss"' not in metrics.read_text():
                time.sleep(0.02)
            # As Jupyter does: the kernel, and what it started.
            os.killpg(kernel, signal.SIGINT)

        if cell.id == "train":
            threading.Thread(target=wait_and_interrupt, daemon=True).start()

    with pytest.raises(CellExecutionError, match="KeyboardInterrupt.*run this cell again to go on"):
        execute("colab.ipynb", tmp_path, interrupt)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert 0 < steps[-1] < STEPS

    notebook = execute("colab.ipynb", tmp_path)
    assert "nothing to install" in printed(notebook, "install")
    assert "JAX finds: cpu 1" in printed(notebook, "install")
    assert f"going on from step {steps[-1]}\n" in printed(notebook, "train")
    assert f"step {STEPS}/{STEPS} | loss" in printed(notebook, "train")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [line["step"] for line in lines if "train/loss" in line]
    assert trained == list(range(1, STEPS + 1))

    assert num_pictures(notebook) == {
        "train": 1,
        "distributions": 1,
        "reliability": 2,
        "compare": 1,
    }
    assert "Library:⟫ " in printed(notebook, "ask") and "Package:⟫ " in printed(notebook, "ask")
    table = cell_named(notebook, "compare").outputs[1].data["text/markdown"]
    assert "| 216 examples | wording_library | wording_package |" in table
    # The model's text is behind the last line that is logged.
    text = printed(notebook, "generate").partition(f"I step {STEPS} of ")[2].partition("\n")[2]
    assert len(text) > 20
    assert "  eval-12.md\n" in printed(notebook, "files")
