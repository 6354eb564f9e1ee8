"""What the notebooks of this folder share: which machine this is, installing, and commands whose
output and curves are shown while they run.

A notebook imports this file before anything is installed: it needs Python, pip and what every
Jupyter kernel brings. JAX runs in the commands alone, never in the notebook's own process: a TPU
belongs to the process that asks for it first.
"""

import codecs
import configparser
import glob
import importlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from IPython.display import Image, display
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# What JAX calls a platform -> the extras of setup.cfg that it needs.
EXTRAS = {"tpu": "tpu,gcs", "gpu": "cuda", "cpu": ""}
# Of what is installed, these are kept in memory by a process that has imported them.
KEPT = ("jax", "jaxlib", "numpy", "scipy", "matplotlib")
RESTART = "restart the runtime (on Colab: Runtime > Restart session), and run all cells again"


# --- the machine ---


def accelerator() -> str:
    """What this machine has, without JAX: "tpu", "gpu" or "cpu". JAX_PLATFORMS comes before it."""
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return {"cuda": "gpu"}.get(asked, asked)
    # Colab's TPU machines have both variables, its others an empty one.
    named = os.environ.get("COLAB_TPU_1VM") or os.environ.get("TPU_ACCELERATOR_TYPE")
    if named or glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
        return "tpu"
    return "gpu" if glob.glob("/dev/nvidia[0-9]*") else "cpu"


def check_platform(platform: str) -> None:
    """Prints the devices that JAX finds, in a process of its own.

    Raises:
      RuntimeError: they are of another platform; most often JAX fell back to the CPU.
    """
    code = "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = done.stdout.splitlines()[-1] if done.stdout else "nothing"
    if done.returncode or found.split()[0] != platform:
        said = "\n".join(done.stderr.splitlines()[-10:])
        raise RuntimeError(
            f"wanted the platform {platform!r}, JAX finds {found!r}. Choose a runtime with it (on "
            f'Colab: Runtime > Change runtime type), or set PLATFORM = "" to take what the machine '
            f"has. If it has one, {RESTART}. JAX said:\n{said}"
        )
    print(f"JAX finds: {found}")


# --- installing ---


def install(platform: str, extras: str = "") -> None:
    """Installs lm with what the platform needs, unless it is all there.

    Args:
      platform: one of EXTRAS.
      extras: more extras of setup.cfg, with commas between them.

    Raises:
      ValueError: no such platform.
      RuntimeError: pip failed, or the runtime must be restarted.
    """
    if platform not in EXTRAS:
        raise ValueError(f"PLATFORM = {platform!r}; valid: {sorted(EXTRAS)}")
    names = dict.fromkeys(name for name in f"{EXTRAS[platform]},{extras}".split(",") if name)
    wanted = list(missing(requirements(names)))
    if not wanted:
        print("nothing to install: all that lm requires is here")
        return
    if "jax" in sys.modules:
        raise RuntimeError(f"jax was imported before lm was installed: {RESTART}")

    before = _versions()
    target = f".[{','.join(names)}]" if names else "."
    command = ["-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", target]
    print(f"{len(wanted)} requirements are missing, such as {wanted[0]}: this takes minutes")
    run(command)
    importlib.invalidate_caches()
    after = _versions()
    stale = [name for name in KEPT if name in sys.modules and before[name] != after[name]]
    if stale:
        raise RuntimeError(f"{', '.join(stale)} was imported in another version: {RESTART}")


def requirements(extras: Iterable[str]) -> list[str]:
    """What setup.cfg requires, and what some of its extras require besides."""
    file = configparser.ConfigParser(inline_comment_prefixes=("#",))
    file.read(ROOT / "setup.cfg")
    lines = file["options"]["install_requires"].splitlines()
    for name in extras:
        lines += file["options.extras_require"][name].splitlines()
    return [line for line in lines if line]


def missing(lines: Iterable[str], extra: str = "") -> Iterator[str]:
    """Yields the requirements that are not installed, or in another version.

    Args:
      extra: the extra whose requirements these are, for their markers.
    """
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield line
            continue
        for name in requirement.extras:
            yield from missing(metadata.requires(requirement.name) or (), name)


def _versions() -> dict[str, str | None]:
    return {name: _version(name) for name in KEPT}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- where runs are saved ---


def folder(save_to: str) -> str:
    """The folder that `save_to` names: "drive" is Google Drive, which is mounted; a relative one is
    relative to the clone.

    Raises:
      ValueError: "drive" where there is none.
    """
    on_colab = "google.colab" in sys.modules
    if save_to == "drive":
        if not on_colab:
            raise ValueError('SAVE_TO = "drive" works on Colab only; wanted gs://... or a folder')
        from google.colab import drive

        drive.mount("/content/drive")
        return "/content/drive/MyDrive/lm"
    if save_to.startswith("gs://"):
        if on_colab:
            from google.colab import auth

            auth.authenticate_user()
        return save_to.rstrip("/")
    return str((ROOT / Path(save_to).expanduser()).resolve())


# --- commands ---


# Runs `python ARGUMENTS` so that it gets SIGTERM, on which a run saves, when the kernel is gone:
# prctl's PR_SET_PDEATHSIG, of Linux alone.
_TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def run(
    arguments: Sequence[str], picture: Callable[[], bytes] | None = None, every: float = 10.0
) -> None:
    """Runs `python ARGUMENTS` in the clone, and shows what it prints as it comes.

    An interrupt of the cell is passed on: a run that trains saves and ends. A second one ends it
    at once.

    Args:
      picture: makes a PNG; it is shown, and drawn again in its place while the command runs.
      every: seconds between two drawings.

    Raises:
      RuntimeError: the command failed.
      KeyboardInterrupt: the cell was interrupted; raised when the command has ended.
    """
    print(f"$ python {shlex.join(arguments)}", flush=True)
    shown = display(Image(picture()), display_id=True) if picture else None
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _TIED, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Jupyter interrupts a process with all its children; this one is told once, below.
            start_new_session=True,
        )
        draw = (lambda: shown.update(Image(picture()))) if shown else None
        try:
            was_interrupted = _follow(process, output.fileno(), draw, every)
        finally:
            # After an error in a picture, for instance.
            if process.poll() is None:
                process.terminate()
                process.wait()
        output.seek(0)
        error = output.read().decode(errors="replace").rpartition("\nerror: ")[2].strip()

    if was_interrupted:
        raise KeyboardInterrupt("the command has ended; run this cell again to go on")
    if process.returncode:
        status = f"exit status {process.returncode}"
        raise RuntimeError(f"the command failed ({status}): {error[-2000:]}")


def _follow(
    process: subprocess.Popen, output: int, draw: Callable[[], None] | None, every: float
) -> bool:
    """Prints what a process writes to the file `output` until it ends. Returns whether the cell was
    interrupted meanwhile.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    was_interrupted = False
    printed = 0
    drawn = time.monotonic()
    while True:
        try:
            has_ended = process.poll() is not None
            text = os.pread(output, 2**20, printed)
            printed += len(text)
            print(decoder.decode(text), end="", flush=True)
            is_last = has_ended and not text
            if draw and (is_last or time.monotonic() - drawn > every):
                draw()
                drawn = time.monotonic()
            if is_last:
                return was_interrupted
            time.sleep(0 if has_ended else 0.3)
        except KeyboardInterrupt:
            was_interrupted = True
            process.send_signal(signal.SIGINT)
            print("interrupted: the command is told to end", flush=True)
