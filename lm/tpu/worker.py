"""A run on a TPU VM, as `lm.tpu` starts and watches it by ssh: python -m lm.tpu.worker COMMAND.

A process of its own, the holder, runs `python -m lm.main`, outlives the connection, and notes how
it ended. Both hold a lock for as long as they live: a lock that is free tells that neither does,
even after the machine was started anew.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

REFUSED = 3  # the status of a start that is refused; ssh and gcloud have 1 for much else
LOG_BYTES = 65536  # of the log, in an answer
START_SECONDS = 20  # that a holder may take to begin
LOCK_SECONDS = 2  # within which one who looks at the lock lets go of it


def directory() -> Path:
    """Where a worker keeps the state and the log of its run."""
    return Path.home() / "lm-run"


def is_held() -> bool:
    """Whether a run is under way."""
    with (directory() / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def read_state() -> dict:
    """What the newest holder noted; {} before the first one."""
    try:
        return json.loads((directory() / "state.json").read_text())
    except FileNotFoundError:
        return {}


def _write_state(state: dict) -> None:
    path = directory() / "state.json"
    path.with_suffix(".new").write_text(json.dumps(state))
    path.with_suffix(".new").replace(path)


def start(arguments: list[str]) -> None:
    """Starts a run, unless it is under way. Raises ValueError if another one is."""
    directory().mkdir(exist_ok=True)
    if is_held():
        if read_state().get("arguments") != arguments:
            raise ValueError(
                f"another run is under way: {' '.join(read_state().get('arguments', []))}; "
                "stop it first"
            )
        return

    (directory() / "asked").unlink(missing_ok=True)
    is_again = read_state().get("arguments") == arguments
    with (directory() / "log").open("ab" if is_again else "wb") as log:
        holder = subprocess.Popen(
            [sys.executable, "-m", "lm.tpu.worker", "hold", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    end = time.monotonic() + START_SECONDS
    while read_state().get("holder") != holder.pid:
        if holder.poll() is not None or time.monotonic() > end:
            raise ValueError(f"the run didn't start: see {directory() / 'log'}")
        time.sleep(0.05)


def hold(arguments: list[str]) -> int:
    """Runs lm.main to its end, and notes what became of it."""
    lock = _take_lock()
    child, stopped = None, False

    def stop(number, frame):
        nonlocal stopped
        stopped = True
        if child:
            child.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    state = {"holder": os.getpid(), "arguments": arguments}
    _write_state(state)

    status = 0
    if not stopped:
        command = [sys.executable, "-m", "lm.main", *arguments]
        environment = os.environ | _extra_environment()
        child = subprocess.Popen(command, env=environment, pass_fds=[lock.fileno()])
        state["child"] = child.pid
        _write_state(state)
        if stopped:  # while it began
            child.terminate()
        status = child.wait()

    asked = (directory() / "asked").exists()
    state |= {"status": status, "stopped": stopped, "asked": asked}
    _write_state(state)
    _write_state(state | {"step": _newest_step(arguments)})
    return status


def _take_lock() -> TextIO:
    """Returns the lock, held. Raises BlockingIOError if another holder has it."""
    lock = (directory() / "lock").open("a")
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:  # it may be somebody who looks
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def _extra_environment() -> dict[str, str]:
    """Variables that were sent here, such as keys of services."""
    try:
        return json.loads((Path.home() / "lm-environment.json").read_text())
    except FileNotFoundError:
        return {}


def _newest_step(arguments: list[str]) -> int:
    """The step of the run's newest checkpoint; -1 if there is none."""
    from etils import epath  # slow, and not needed for a status

    workdir = ""
    for argument in arguments:
        if argument.startswith("--workdir="):
            workdir = argument.partition("=")[2]

    try:
        names = [path.name for path in (epath.Path(workdir) / "checkpoints").iterdir()]
    except Exception:  # a bucket's too: that the run has ended is noted already
        return -1
    return max((int(name) for name in names if name.isdigit()), default=-1)


def status(offset: int | None = None) -> dict:
    """What became of the run, and what its log says from `offset` on (None: nothing)."""
    state = read_state()
    if (directory() / "lock").exists() and is_held():
        word = "running"
    elif "status" in state:
        word = "ended"
    else:
        word = "died" if state else "none"
    answer = {"state": word, "code": _code()} | state

    log = directory() / "log"
    if log.exists() and offset is not None:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset, size - LOG_BYTES) if offset <= size else 0)
            answer["log"] = file.read(LOG_BYTES).decode(errors="replace")
            answer["log_end"] = file.tell()
    return answer


def _code() -> str:
    """Which code was set up here, as git hashes it."""
    try:
        return (Path(__file__).parents[2] / ".code").read_text().strip()
    except FileNotFoundError:
        return ""


def stop(seconds: float) -> bool:
    """Asks the run to save and to end; whether it did within so many seconds."""
    if not (directory() / "lock").exists():
        return True
    if is_held():
        (directory() / "asked").touch()
        # Both: a holder that was killed leaves the run itself.
        for process in ("holder", "child"):
            with contextlib.suppress(ProcessLookupError, KeyError):
                os.kill(read_state()[process], signal.SIGTERM)

    end = time.monotonic() + seconds
    while is_held():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def main(argv: list[str]) -> int:
    command, arguments = argv[1], argv[2:]
    if command == "hold":
        return hold(arguments)
    if command == "status":
        print(json.dumps(status(int(arguments[0]) if arguments else None)))
        return 0

    try:
        if command == "stop":
            return 0 if stop(float(arguments[0])) else 1
        start(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
