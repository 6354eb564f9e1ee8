"""Works on the runs of a sweep: takes one by its claim, trains it in a process of its own, takes
the next, until all are done.

Workers need no server. Any number of them, here or on other machines that see the same directory
or bucket, work on one plan.
"""

import collections
import contextlib
import glob
import json
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from etils import epath

from lm import claim, files
from lm import config as config_lib
from lm.reports import sweeps
from lm.sweep import plan, search, state

POLL_SECONDS = 2.0  # between looks at runs that others work on
LAST_LINES = 40  # that are kept of a failed run
# A process that ended so was stopped from outside: what it saved goes on.
PREEMPTED = (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
MAX_STOPS = 20  # of a run, in one worker

OPEN = (state.WAITING, state.RUNNING)  # what is left to do


class Share(NamedTuple):
    """What a worker's runs get of this machine.

    Attributes:
      environment: variables that show them some of the accelerators only.
      cores: of the CPU; (): all.
    """

    environment: Mapping[str, str]
    cores: Sequence[int] = ()


class Workers:
    """Some workers of a sweep, a thread each, in this process.

    Args:
      shares: of each worker.
      say: called with a line for each thing that happens.
    """

    def __init__(
        self,
        sweep: plan.Sweep,
        workdir: epath.Path,
        shares: Sequence[Share],
        say: Callable[[str], None],
    ):
        self._sweep, self._workdir, self._say = sweep, workdir, say
        self._stop = threading.Event()
        self._children: dict[int, subprocess.Popen] = {}  # by their worker
        self._stops: collections.Counter = collections.Counter()
        self._mutex = threading.RLock()  # a signal may come while one is handled
        self._errors: list[BaseException] = []
        self._may_propose = sweep.search is not None
        self._threads = []
        for number, share in enumerate(shares):
            arguments = (number, len(shares), share)
            # Daemons: one that waits for a sign of life elsewhere holds up no end.
            thread = threading.Thread(target=self._work, args=arguments, daemon=True)
            self._threads.append(thread)

    def run(self) -> bool:
        """Works until nothing is left, or `stop`; returns whether nothing is left.

        Raises:
          OSError: the directory or bucket doesn't answer.
        """
        for thread in self._threads:
            thread.start()

        while any(thread.is_alive() for thread in self._threads) and not self._stop.is_set():
            time.sleep(0.05)

        # What runs saves and ends; then so do we.
        while self._children:
            time.sleep(0.05)
        if self._errors:
            raise self._errors[0]
        return not self._stop.is_set()

    def stop(self) -> None:
        """Asks the runs under way to save and to end."""
        with self._mutex:
            self._stop.set()
            for child in self._children.values():
                child.terminate()

    def _work(self, number: int, of: int, share: Share) -> None:
        try:
            while not self._stop.is_set():
                runs = plan.stored_runs(self._workdir)
                states = state.read(self._sweep, runs, self._workdir)
                if self._wants_more(runs, states):
                    self._propose(runs, states)
                    continue

                left = [run for run in runs if states[run.name].status in OPEN]
                if not left:
                    return

                # Each worker begins elsewhere, so that they seldom want the same run.
                start = number * len(left) // of
                left = left[start:] + left[:start]
                if not self._take_one(left, states, number, share):
                    self._stop.wait(POLL_SECONDS)
        except Exception as error:
            self._errors.append(error)
            self.stop()

    def _wants_more(self, runs, states) -> bool:
        """Whether the search is to propose a run: each that there is has been taken."""
        if not self._may_propose or len(runs) >= self._sweep.search.number:
            return False
        return not any(known.status == state.WAITING for known in states.values())

    def _propose(self, runs, states) -> None:
        finished = []
        for run in runs:
            if states[run.name].status != state.DONE:
                continue
            value = state.last_value(self._workdir / run.name, self._sweep.search.metric)
            if value is not None:
                finished.append((run.changes, value))
        try:
            added = plan.add_run(self._sweep, self._workdir, finished)
        except search.Exhausted as error:
            # The runs under way come to their ends first.
            self._may_propose = False
            self._errors.append(error)
            return
        if added:
            self._say(f"proposed: {added.name}")

    def _take_one(self, runs, states, worker: int, share: Share) -> bool:
        """Trains the first of the runs that can be had; False if others have all of them."""
        for run in runs:
            is_free = states[run.name].status == state.WAITING
            # A look at what was free a moment ago costs less than a claim that is refused.
            if is_free and not (self._workdir / run.name / claim.NAME).exists():
                if self._try(run, worker, share):
                    return True

        # Whoever has one that is claimed may be gone.
        claimed = [run for run in runs if states[run.name].status == state.RUNNING]
        return bool(claimed) and self._try(random.choice(claimed), worker, share)

    def _try(self, run: plan.PlannedRun, worker: int, share: Share) -> bool:
        """Trains a run; False if another worker has it."""
        try:
            with claim.Claim(self._workdir / run.name) as held:
                self._train(run, held, worker, share)
        except claim.Taken:
            return False
        except claim.Lost as lost:
            self._say(f"lost: {lost}")
        finally:
            # The claim is released: nothing of it is left to wait for.
            with self._mutex:
                self._children.pop(worker, None)
        return True

    def _train(self, run: plan.PlannedRun, held: claim.Claim, worker: int, share: Share) -> None:
        """Trains a claimed run, unless another worker has done so meanwhile."""
        directory = self._workdir / run.name
        # Where there are rounds, all runs say which one it is.
        runs = plan.stored_runs(self._workdir) if self._sweep.halving else [run]
        now = state.read(self._sweep, runs, self._workdir)[run.name]
        if now.status not in OPEN:
            return
        self._say(f"begins: {run.name}" + (f" at step {now.step}" if now.step else ""))

        self._check_plan(run)
        began = time.monotonic()
        command = self._sweep.command(run, self._workdir, now.length)
        planned = config_lib.content_hash(self._sweep.config(run, now.length))
        environment = held.environment | {config_lib.PLANNED: planned}
        with _log(directory) as log:
            with self._mutex:
                if self._stop.is_set():
                    return
                child = self._start(command, log, share, environment)
                self._children[worker] = child
            code = child.wait()
            held.check()

        self._note_end(run, code, now.length, time.monotonic() - began)

    def _check_plan(self, run: plan.PlannedRun) -> None:
        """Raises ValueError if a run would have other code, or another configuration, than
        sweep.json says.
        """
        stored = plan.read_plan(self._workdir)
        hashes = {planned["name"]: planned["hash"] for planned in stored["runs"]}
        if plan.code_hash() != stored["code"]:
            changed = "the files of lm have changed"
        elif config_lib.content_hash(self._sweep.config(run)) != hashes.get(run.name):
            changed = f"the plan of {run.name} has changed"
        else:
            return
        raise ValueError(
            f"{changed} since this command started: it would train another run than is planned. "
            "Start it again; it lists what changed"
        )

    def _start(
        self, command: Sequence[str], log: BinaryIO, share: Share, environment: Mapping[str, str]
    ) -> subprocess.Popen:
        """Starts the process of a run."""
        child = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | share.environment | environment,
            # Ctrl-C is this process's to pass on, once.
            start_new_session=True,
        )

        with contextlib.suppress(ProcessLookupError):  # it may have ended
            if share.cores:
                os.sched_setaffinity(child.pid, share.cores)
        return child

    def _note_end(self, run: plan.PlannedRun, code: int, length: str, seconds: float) -> None:
        """Says how a run ended; writes it down if it failed."""
        directory = self._workdir / run.name
        length = length or run.changes.get("train.length", self._sweep.base.train.length)
        if state.has_reached(directory, length):
            self._say(f"done: {run.name} in {seconds:.0f} s")
            return

        self._stops[run.name] += 1
        if code in PREEMPTED and self._stops[run.name] < MAX_STOPS:
            self._say(f"stopped: {run.name}; it goes on")
            return

        lines = state.last_lines(directory, LAST_LINES)
        failure = {"code": code, "lines": lines, "length": length}
        files.write_whole(directory / sweeps.FAILED, json.dumps(failure, indent=1) + "\n")

        why = state.read_why(directory)
        self._say(f"failed: {run.name} with code {code}: {why}")


@contextlib.contextmanager
def _log(directory: epath.Path):
    """The file that takes what a run prints; in a bucket it is there when the run has ended."""
    path = directory / state.LOG
    if "://" not in str(path):
        directory.mkdir(parents=True, exist_ok=True)
        with open(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW), "ab"
        ) as file:
            yield file
        return

    with tempfile.TemporaryFile() as file:
        yield file
        file.seek(0)
        if printed := file.read():  # else there was no run
            files.write_whole(path, printed)


def deal_devices(number: int) -> list[Share]:
    """The shares of `number` workers in this machine: its TPU chips, its GPUs, or its cores.

    Raises:
      ValueError: more workers than there are of them, or chips that can't be dealt evenly.
    """
    if number == 1:
        return [Share({})]

    gpus = _gpus()
    chips = sorted(glob.glob("/dev/accel[0-9]*")) or sorted(glob.glob("/dev/vfio/[0-9]*"))
    if chips:
        size = _share_size(number, len(chips), "TPU chips")
        if size not in _BOUNDS:
            raise ValueError(
                f"--workers={number} of {len(chips)} TPU chips would have {size} each; wanted "
                f"{sorted(_BOUNDS)}"
            )

        bounds = {"TPU_CHIPS_PER_PROCESS_BOUNDS": _BOUNDS[size], "TPU_PROCESS_BOUNDS": "1,1,1"}
        parts = _parts(range(len(chips)), number)
        return [Share({"TPU_VISIBLE_CHIPS": _commas(part)} | bounds) for part in parts]

    if gpus:
        _share_size(number, len(gpus), "GPUs")
        return [Share({"CUDA_VISIBLE_DEVICES": _commas(part)}) for part in _parts(gpus, number)]

    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if number > len(cores):
        # They take turns.
        return [Share({})] * number
    return [Share({}, part) for part in _parts(cores, number)]


# Chips of one process -> how they lie, as libtpu wants to be told.
_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}


def _gpus() -> list[str]:
    """The GPUs that a process started here may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    # CUDA counts those that it finds, whatever their files are called.
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def _share_size(number: int, total: int, what: str) -> int:
    if number > total:
        raise ValueError(f"--workers={number} are more than the {total} {what} here")
    return total // number


def _parts(items: Sequence, number: int) -> list[Sequence]:
    """So many parts of one size; what is left over is in none."""
    size = len(items) // number
    return [items[i * size : (i + 1) * size] for i in range(number)]


def _commas(items: Sequence) -> str:
    return ",".join(map(str, items))
