"""Disturbs a run again and again, in ten ways, and compares its end with that of one that nobody
disturbed; see README.md beside this file.

    python experiments/soak/run.py --workdir=runs/soak
"""

import collections
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from experiments.soak import config as config_file

_WORKDIR = flags.DEFINE_string("workdir", None, "Where runs and logs go.", required=True)
_NUM = flags.DEFINE_integer("num", 200, "Disturbances.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the kinds' order, the moments, the bits.")
_KINDS = flags.DEFINE_list("kinds", None, "Kinds of disturbances; all by default.")

PATIENCE_SECONDS = 120
# Steps until a disturbance; more than between two checkpoints.
MOST_STEPS = 9
DISK_MEGABYTES = 48
CLOCK = ("tokens_per_second", "mfu", "seconds", "goodput")  # metrics that two runs never share

# Runs lm.main on a machine whose clock is wrong by so many seconds.
WRONG_CLOCK = """
import time
right_time, right_time_ns = time.time, time.time_ns

def wrong_time():
    return right_time() + {shift}

def wrong_time_ns():
    return right_time_ns() + {shift} * 10**9

time.time, time.time_ns = wrong_time, wrong_time_ns
from lm import main
main.cli()
"""


class Broken(Exception):
    """A disturbance ended in another way than it should."""


class Program:
    """`python -m lm.main` on a run, in a process of its own.

    Args:
      clock_shift: seconds by which its clock is wrong.
    """

    def __init__(self, place: "Place", run: Path, log: Path, clock_shift: int = 0):
        command = (
            ["-c", WRONG_CLOCK.format(shift=clock_shift)] if clock_shift else ["-m", "lm.main"]
        )
        arguments = [
            f"--config={HERE}/config.py",
            f"--workdir={run}",
            f"--config.data.source_args.path={place.corpus}",
            f"--config.data.cache_dir={place.cache}",
            "--config.platform=cpu",
        ]
        self.run, self.log = run, log
        with open(log, "ab") as file:
            self._begin = file.tell()
            self._process = subprocess.Popen(
                [sys.executable, *command, *arguments],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=file,
            )
        self.pid = self._process.pid

    def said(self) -> str:
        with open(self.log, "rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")

    def says(self, words: str) -> bool:
        return words in self.said()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition, before which the program must not end."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if not self.is_running() and not condition():
                raise Broken("it ended too early")
            if time.monotonic() > deadline:
                raise Broken(f"nothing happened for {PATIENCE_SECONDS} s")
            time.sleep(0.002)

    def wait_for_steps(self, steps: int) -> None:
        """Waits until it has trained so many steps."""
        self.wait_until(lambda: self.says("first step after"))
        first = _steps_done(self.run)
        self.wait_until(lambda: _steps_done(self.run) >= first + steps - 1)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Waits for its end. Returns the exit status."""
        try:
            return self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise Broken(f"no end after {PATIENCE_SECONDS} s") from None

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.end()

    def expect_error(self, words: str) -> None:
        """Waits for its end, which must be an error that has these words, and no traceback."""
        code, said = self.end(), self.said()
        error = said.rpartition("\nerror: ")[2]
        if code != 1 or "Traceback" in said or words not in error:
            raise Broken(f"exit status {code}; wanted 1, and an error with {words!r}")


def _last_line(run: Path) -> dict:
    """The last whole line of metrics.jsonl; {"step": 0} if there is none."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")
        return json.loads(lines[-2])
    except (FileNotFoundError, IndexError, json.JSONDecodeError):
        return {"step": 0}


def _steps_done(run: Path) -> int:
    return _last_line(run)["step"]


def _is_in_evals(run: Path) -> bool:
    """Whether the last step's metrics are written, and the evals due after it are not."""
    line = _last_line(run)
    last = "eval/samples/seconds"  # evals are in the order of the config
    return bool(line["step"]) and line["step"] % config_file.EVERY == 0 and last not in line


def _is_in_save(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def _flip_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


# --- the disturbances: each takes a soak, disturbs its run, and says whether it hit ---


def kill_in_compile(soak: "Soak") -> bool:
    program = soak.start()
    program.wait_until(lambda: program.says("running on"))
    time.sleep(soak.rng.uniform(0, soak.compile_seconds))
    program.kill()
    return not program.says("first step after")


def kill_in_save(soak: "Soak") -> bool:
    program = soak.start()
    program.wait_for_steps(soak.draw_steps())
    program.wait_until(lambda: _is_in_save(soak.run))
    time.sleep(soak.rng.uniform(0, 0.05))
    program.kill()
    return _is_in_save(soak.run)


def kill_in_eval(soak: "Soak") -> bool:
    program = soak.start()
    program.wait_for_steps(1)
    program.wait_until(lambda: _is_in_evals(soak.run))
    time.sleep(soak.rng.uniform(0, 0.2))
    program.kill()
    return _is_in_evals(soak.run)


def terminate_twice(soak: "Soak") -> bool:
    program = soak.start()
    program.wait_for_steps(soak.draw_steps())
    program.signal(signal.SIGTERM)
    time.sleep(soak.rng.uniform(0, 0.05))
    program.signal(signal.SIGTERM)
    code = program.end()
    if code != 0:
        raise Broken(f"exit status {code} after SIGTERM; wanted 0")
    return program.says("stopped by a signal at step")


def flip_bit_of_checkpoint(soak: "Soak") -> bool:
    checkpoints = sorted(
        (path for path in (soak.run / "checkpoints").glob("*") if path.name.isdigit()),
        key=lambda path: int(path.name),
    )
    if len(checkpoints) < 2:
        soak.go_on(soak.start())  # there is nothing yet to go back to
        return False

    newest = checkpoints[-1]
    damaged = soak.rng.choice([path for path in sorted(newest.rglob("*")) if path.is_file()])
    _flip_bit(damaged, soak.rng)
    program = soak.start()
    soak.go_on(program)
    soak.note(str(damaged.relative_to(soak.run)))
    return program.says(f"checkpoint {newest.name} is damaged")


def fill_disk(soak: "Soak") -> bool:
    program = soak.start()
    program.wait_for_steps(soak.draw_steps())
    filler = soak.place.disk / "filler"
    left = soak.rng.randrange(soak.checkpoint_bytes)
    try:
        with open(filler, "wb") as file:
            while program.is_running():
                # Again and again: old checkpoints go, and make room.
                more = shutil.disk_usage(soak.place.disk).free - left
                if more > 0:
                    with contextlib.suppress(OSError):  # the program was faster
                        os.posix_fallocate(file.fileno(), os.path.getsize(filler), more)
                time.sleep(0.01)
        program.expect_error(str(soak.run))
    finally:
        filler.unlink()
    return "No space left" in program.said()


def make_read_only(soak: "Soak") -> bool:
    """Before the start, or while it runs."""
    running = soak.rng.random() < 0.5
    program = None
    if running:
        program = soak.start()
        program.wait_for_steps(soak.draw_steps())
    _mount("--bind", soak.run, soak.run)
    _mount("-o", "remount,bind,ro", soak.run)
    try:
        program = program or soak.start()
        program.expect_error(str(soak.run))
    finally:
        subprocess.run(["umount", soak.run], check=True)
    return "Read-only file system" in program.said()


def start_twice(soak: "Soak") -> bool:
    """At once, or the second later; one of them trains."""
    first = soak.start()
    time.sleep(soak.rng.choice([0, soak.rng.uniform(0, 6)]))
    second = soak.start(log="second")
    programs = [first, second]
    refused = f"error: {soak.run}"

    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(program.says(refused) for program in programs):
        if time.monotonic() > deadline:
            raise Broken("none of two programs was refused")
        time.sleep(0.01)
    loser, winner = (first, second) if first.says(refused) else (second, first)
    loser.expect_error(f"process {winner.pid} ")
    soak.go_on(winner)
    return True


def damage_cache(soak: "Soak") -> bool:
    files = [path for path in sorted(soak.place.cache.rglob("*")) if path.is_file()]
    damaged = soak.rng.choice(files)
    how = soak.rng.choice(["flip", "cut", "remove"])
    if how == "flip":
        _flip_bit(damaged, soak.rng)
    elif how == "cut":
        os.truncate(damaged, soak.rng.randrange(damaged.stat().st_size))
    else:
        damaged.unlink()
    soak.note(f"{how} {damaged.relative_to(soak.place.cache)}")
    soak.go_on(soak.start())
    return True


def set_clock(soak: "Soak") -> bool:
    """The clock is minutes or years off, and so are the dates of the run's files."""
    shift = soak.rng.choice([-1, 1]) * int(10 ** soak.rng.uniform(2, 8.5))
    for path in soak.run.rglob("*"):
        seconds = time.time() + soak.rng.uniform(-1, 1) * abs(shift)
        os.utime(path, (seconds, seconds), follow_symlinks=False)
    soak.note(f"{shift} s")
    soak.go_on(soak.start(clock_shift=shift))
    return True


KINDS = {
    function.__name__: function
    for function in (
        kill_in_compile,
        kill_in_save,
        kill_in_eval,
        terminate_twice,
        flip_bit_of_checkpoint,
        fill_disk,
        make_read_only,
        start_twice,
        damage_cache,
        set_clock,
    )
}


# --- runs ---


class Place:
    """The directories of a soak. Runs that are disturbed are on a small file system in memory."""

    def __init__(self, root: Path):
        self.root = root
        self.logs, self.disk = root / "logs", root / "disk"
        self.corpus, self.cache = root / "corpus.jsonl", root / "disk" / "cache"
        shutil.rmtree(self.logs, ignore_errors=True)
        for folder in (self.logs, self.disk):
            folder.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "soak", self.disk)


def _mount(*arguments) -> None:
    subprocess.run(["mount", *arguments], check=True)


def write_corpus(path: Path) -> None:
    """Writes documents of 1 to 60 words, whose label follows from them."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(600):
            label = rng.choice(list(config_file.VERBALIZER))
            words = [rng.choice((label[:2], "ab", "cde", "é")) for _ in range(rng.randint(1, 60))]
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")


def read_run(run: Path) -> dict:
    """All of a finished run that must be equal: {what: bytes or values}."""
    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    checkpoint = run / "checkpoints" / str(max(steps))
    contents = {"checkpoints": sorted(steps)}
    for name, array in ocp.PyTreeCheckpointer().restore(checkpoint / "state").items():
        array = np.asarray(array)
        contents[name] = (str(array.dtype), array.shape, array.tobytes())
    meta = json.loads((checkpoint / "meta" / "metadata").read_text())
    contents["meta"] = {key: value for key, value in meta.items() if key != "config"}

    lines = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines.append({key: line[key] for key in line if not any(word in key for word in CLOCK)})
    contents["metrics.jsonl"] = lines
    for path in [*run.glob("predictions/*"), run / "samples.md"]:
        contents[path.name] = path.read_bytes()
    return contents


class Soak:
    """A run that is disturbed, and what happened to it.

    Args:
      reference: the run that nobody disturbs.
    """

    def __init__(self, place: Place, reference: Path, rng: random.Random):
        self.place, self.rng = place, rng
        self.count, self.misses, self.rounds = collections.Counter(), collections.Counter(), 0
        self._reference, self._number, self._note = reference, 0, ""
        self._new_run()

        began = time.monotonic()
        program = Program(place, reference, place.logs / "reference.log")
        program.wait_until(lambda: program.says("running on"))
        start = time.monotonic()
        program.wait_until(lambda: program.says("first step after"))
        self.compile_seconds = time.monotonic() - start
        if program.end():
            raise Broken("the run that nobody disturbs failed")
        self._wanted = read_run(reference)
        newest = reference / "checkpoints" / str(self._wanted["checkpoints"][-1])
        self.checkpoint_bytes = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
        print(f"the reference took {time.monotonic() - began:.0f} s", flush=True)

    def _new_run(self) -> None:
        self.rounds += 1
        self.run = self.place.disk / f"run{self.rounds}"
        self.run.mkdir()

    def start(self, log: str = "", clock_shift: int = 0) -> Program:
        path = self.place.logs / "-".join(filter(None, [f"{self._number:03d}", self._kind, log]))
        return Program(self.place, self.run, Path(f"{path}.log"), clock_shift)

    def draw_steps(self) -> int:
        return self.rng.randint(1, MOST_STEPS)

    def note(self, text: str) -> None:
        """Adds to the line that is printed about this disturbance."""
        self._note = text

    def go_on(self, program: Program) -> None:
        """Lets a program train some steps, and ends it, by a kill or a signal."""
        program.wait_for_steps(self.draw_steps())
        if self.rng.random() < 0.5:
            program.kill()
            return
        program.signal(signal.SIGTERM)
        if code := program.end():
            raise Broken(f"exit status {code} after SIGTERM; wanted 0")

    def disturb(self, kind: str) -> None:
        """Disturbs the run once, and ends it if it is near its end."""
        self._number, self._kind, self._note = self._number + 1, kind, ""
        began, before = time.monotonic(), _steps_done(self.run)
        hit = KINDS[kind](self)
        (self.count if hit else self.misses)[kind] += 1
        if self.misses[kind] > 10 + self.count[kind]:
            raise Broken(f"{kind} misses too often")
        done = _steps_done(self.run)
        print(
            f"{self._number:3d} {kind:22} {'hit' if hit else 'missed':6} steps {before:3d} to "
            f"{done:3d}, {time.monotonic() - began:4.1f} s {self._note}",
            flush=True,
        )

    def finish(self) -> None:
        """Trains the run to its end, undisturbed, and compares it with the reference."""
        self._number, self._kind = self._number + 1, "finish"
        if code := self.start().end():
            raise Broken(f"exit status {code} of an undisturbed start")
        got = read_run(self.run)
        different = [key for key in self._wanted | got if got.get(key) != self._wanted.get(key)]
        if different:
            raise Broken(f"{self.run} differs from {self._reference} in {different}")
        print(f"run {self.rounds} is bit-equal to the reference", flush=True)
        shutil.rmtree(self.run)
        self._new_run()


def soak(num: int, kinds: list[str], root: Path, seed: int) -> dict:
    """Returns what happened. Raises Broken where a run doesn't end as it should."""
    place = Place(root)
    write_corpus(place.corpus)
    shutil.rmtree(root / "reference", ignore_errors=True)
    this = Soak(place, root / "reference", random.Random(seed))
    last_step = this._wanted["metrics.jsonl"][-1]["step"]

    began = time.monotonic()
    try:
        while sum(this.count.values()) < num:
            # Kinds come equally often: what missed is due again.
            fewest = min(this.count[kind] for kind in kinds)
            due = [kind for kind in kinds if this.count[kind] == fewest]
            this.disturb(this.rng.choice(due))
            if _steps_done(this.run) > last_step - 3 * MOST_STEPS:
                this.finish()
        this.finish()
    except Broken as error:
        shutil.copytree(this.run, root / "broken", dirs_exist_ok=True)
        raise Broken(
            f"{error}. See {place.logs}, the newest log; the run is in {root}/broken"
        ) from None

    return {
        "disturbances": dict(this.count),
        "missed": dict(this.misses),
        "runs": this.rounds - 1,
        "seconds": round(time.monotonic() - began),
    }


def enter_namespace() -> None:
    """Starts this script again where it may mount file systems, seen by nobody else."""
    if os.environ.get("SOAK_NAMESPACE"):
        return
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: wanted Linux with user namespaces, for a disk that fills up: {error}")
    environment = os.environ | {"SOAK_NAMESPACE": "1"}
    os.execvpe("unshare", [*unshare, sys.executable, *sys.argv], environment)


def main(unused_argv) -> None:
    logging.getLogger("absl").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Sharding info not provided")
    kinds = _KINDS.value or list(KINDS)
    if unknown := set(kinds) - KINDS.keys():
        sys.exit(f"error: --kinds has {sorted(unknown)}; valid: {list(KINDS)}")
    enter_namespace()
    root = Path(_WORKDIR.value).expanduser().resolve()
    try:
        result = soak(_NUM.value, kinds, root, _SEED.value)
    except Broken as error:
        sys.exit(f"error: {error}")
    print(json.dumps(result, indent=2))
    (root / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
