"""A run on TPUs that may be taken away: asked for, set up, started, watched, and all that again.

Nothing is remembered between two looks that can't be seen again, so a supervisor that was stopped
goes on where another one is started.
"""

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from lm import escape
from lm.tpu import gcloud as gcloud_lib
from lm.tpu import session as session_lib
from lm.tpu.gcloud import Error, Gcloud, Order
from lm.tpu.worker import REFUSED

# States of a request. One that isn't here is waited for, and said.
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
LEAVING = ("SUSPENDING", "DELETING")
GONE = ("SUSPENDED", "FAILED")
# States of a TPU VM that it doesn't come back from.
NODE_GONE = ("PREEMPTED", "TERMINATED", "STOPPING", "STOPPED", "DELETING", "SUSPENDED", "HIDDEN")

ON_WORKER = "cd lm 2>/dev/null && .venv/bin/python -m lm.tpu.worker"  # and a command of it
SETUP_SECONDS = 1800
STOP_SECONDS = 600
DELETE_SECONDS, DELETE_AGAIN_SECONDS = 3600, 120
PATIENCE_SECONDS = 900  # for a TPU VM that isn't ready, or a worker that can't be reached
MAX_FAILED_REQUESTS = 5  # one after the other
SAY_AGAIN_SECONDS = 600


class GivenUp(Error):
    """What neither waiting nor other TPUs mend: those that there are need not stay."""


class SetupFailed(GivenUp):
    """A worker couldn't be set up; the message names it."""


class Unreachable(SetupFailed):
    """The workers that couldn't be set up couldn't be reached."""


def say(text: str) -> None:
    """Prints a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {escape.printable(text)}", file=sys.stderr, flush=True)


def last_lines(text: str, count: int = 20) -> str:
    """The end of a log, indented."""
    lines = escape.printable(text).strip().splitlines()[-count:]
    return "\n".join(f"  {line}" for line in lines)


def hint(command: str, gcloud: Gcloud, name: str) -> str:
    """The command line of another command for the same TPUs."""
    return f"./tpu_setup.sh {command} {name} {gcloud.where}"


def state_of(request: dict | None) -> str:
    """The state of a request; "none" where there is none."""
    return "none" if request is None else request.get("state", {}).get("state", "?")


def reason(request: dict) -> str:
    """Why a request failed, in the service's words."""
    data = request.get("state", {}).get("failedData", {})
    message = data.get("error", {}).get("message", "")
    return f" ({message})" if message else ""


def delete(gcloud: Gcloud, name: str, poll_seconds: float) -> None:
    """Deletes a request with its TPUs, and waits until it is gone.

    Raises:
      Error: it doesn't go.
    """
    gcloud.delete(name)
    began = asked_at = time.monotonic()
    said = ""
    while (state := state_of(gcloud.queued_resource(name))) != "none":
        now = time.monotonic()
        if state != said:
            say(f"{name}: waiting for its end: {state}")
            said = state
        if now - began > DELETE_SECONDS:
            raise Error(
                f"{name} is {state} for an hour, and may cost. A run goes on under another name "
                "with the same --workdir",
                hint("delete", gcloud, name),
            )
        if state not in LEAVING and now - asked_at > DELETE_AGAIN_SECONDS:
            gcloud.delete(name)  # the deletion failed, or was lost
            asked_at = now
        time.sleep(poll_seconds)


# --- setting up ---


def workers_of(gcloud: Gcloud, nodes: Sequence[str]) -> list[tuple[str, int]]:
    """All workers, (slice, number). Raises Error for a slice that isn't there."""
    workers = []
    for name in nodes:
        node = gcloud.node(name)
        if node is None:
            raise Error(f"there is no TPU VM {name} in {gcloud.zone}", "./tpu_setup.sh create ...")
        count = len(node.get("networkEndpoints", []))
        workers += [(name, worker) for worker in range(count)]
    return workers


def set_up(gcloud: Gcloud, workers: Sequence[tuple[str, int]], code: session_lib.Code) -> None:
    """Copies the code to all workers, installs it, and checks their devices together.

    Raises:
      SetupFailed: a worker failed, or has other versions than the rest. Nothing of the set-up runs
        any more.
    """
    # One at a time: gcloud runs a command again after a connection that broke. What isn't in the
    # archive goes, but for the installed packages.
    install = (
        "exec 9>lm-setup.lock && flock 9 && mkdir -p lm && "
        "find lm -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + && "
        f"tar xzf lm.tar.gz && bash lm/tpu_setup.sh && echo {code.tree} > lm/.code"
    )

    first_failures = []

    def copy_and_install(node: str, worker: int) -> subprocess.CompletedProcess:
        result = gcloud.scp(code.path, node, worker, "lm.tar.gz")
        if result.returncode == 0:
            result = gcloud.ssh(node, worker, install, SETUP_SECONDS)
        if result.returncode and not first_failures:
            first_failures.append(((node, worker), result))
            _stop_set_up(gcloud, workers)  # the others would wait for this one
        return result

    say(f"setting up {len(workers)} worker(s): {code}")
    results = gcloud_lib.on_all(copy_and_install, workers)

    if first_failures:
        is_reached = gcloud_lib.was_reached(first_failures[0][1])
        message = _describe_failures(dict(first_failures))
        raise (SetupFailed if is_reached else Unreachable)(message)
    _check_versions({worker: result.stdout for worker, result in results.items()})


def _stop_set_up(gcloud: Gcloud, workers: Sequence[tuple[str, int]]) -> None:
    """Ends a set-up on all workers."""

    def stop(node: str, worker: int) -> None:
        # The brackets keep the pattern from finding this command.
        gcloud.ssh(node, worker, "pkill -f 'lm/[t]pu_setup.sh|[l]m-check|[.]venv/bin/pip'; true")

    gcloud_lib.on_all(stop, workers)


def stop_run(gcloud: Gcloud, workers: Sequence[tuple[str, int]]) -> list[str]:
    """Has a run save and end. Returns the workers where it may still go on."""

    def stop(node: str, worker: int) -> subprocess.CompletedProcess:
        return gcloud.ssh(node, worker, f"{ON_WORKER} stop {STOP_SECONDS}", STOP_SECONDS + 60)

    results = gcloud_lib.on_all(stop, workers)
    return [f"{worker} of {node}" for (node, worker), r in results.items() if r.returncode]


def _describe_failures(failed: dict) -> str:
    """Which workers failed, and the last lines of what each of the first three said."""
    parts = []
    for (node, worker), result in list(failed.items())[:3]:
        said = last_lines(result.stdout + result.stderr)
        parts.append(f"worker {worker} of {node} failed with {result.returncode}:\n{said}")
    if len(failed) > 3:
        names = [f"{worker} of {node}" for node, worker in list(failed)[3:]]
        parts.append(f"failed too: worker {', '.join(names)}")
    return "\n".join(parts)


def _check_versions(outputs: dict[tuple[str, int], str]) -> None:
    """Raises SetupFailed if the workers' lines of versions differ."""
    workers_by_versions: dict[str, list[str]] = {}
    for (node, worker), output in outputs.items():
        lines = [line for line in output.splitlines() if line.startswith("versions: ")]
        versions = lines[-1].removeprefix("versions: ") if lines else ""
        workers_by_versions.setdefault(versions, []).append(f"{worker} of {node}")

    if len(workers_by_versions) > 1:
        lines = []
        for versions, workers in workers_by_versions.items():
            lines.append(f"  worker {', '.join(workers)}: {versions or 'said nothing'}")
        raise SetupFailed(
            "workers have different versions, which can't compute together:\n"
            + "\n".join(lines)
            + "\nTheir images differ, or an installation failed halfway: delete and create them"
        )


# --- the run ---


@dataclasses.dataclass
class Settings:
    """How a run is supervised.

    Attributes:
      arguments: flags of lm.main.
      environment_file: variables for the run, as JSON ("": none). Command lines can be seen.
      keep: leave the TPUs where the run has ended, or failed.
    """

    arguments: list[str]
    poll_seconds: float = 30.0
    environment_file: str = ""
    keep: bool = False


class Supervisor:
    """Brings a run to its end.

    Args:
      session: the run on this machine; its code is what the TPUs get.
    """

    def __init__(
        self,
        gcloud: Gcloud,
        order: Order,
        session: session_lib.Session,
        settings: Settings,
    ):
        self._gcloud, self._order = gcloud, order
        self._session, self._settings = session, settings
        self._code = session.code()
        self._said, self._said_at = "", 0.0
        self._last_request: dict | None = None
        self._failed_requests = 0  # since one was active
        self._has_started = False  # on all workers of these TPUs
        self._trouble_since: float | None = None  # TPU VMs not ready, workers out of reach
        self._failed_step: int | None = None  # the newest checkpoint where the run failed last
        self._was_asked = False  # to stop
        self._log_end = 0

    def run(self) -> None:
        """Looks until the run has ended, and deletes the TPUs.

        Raises:
          Error: what waiting doesn't mend. TPUs that were made here are deleted then too.
        """
        try:
            while not self._look_patiently():
                time.sleep(self._settings.poll_seconds)
        except GivenUp as error:
            try:
                self._leave()
            except Error as second:
                raise Error(f"{error}\n{second}") from None
            raise
        except Error:
            self._say_what_stays()
            raise
        self._leave()

    def _look_patiently(self) -> bool:
        """Looks. A service that doesn't answer is asked again, for as long as it takes."""
        try:
            return self._look()
        except gcloud_lib.Passing as error:
            self._say(f"{error}: trying again")
            return False

    def _leave(self) -> None:
        """Deletes the TPUs, if they were made here and aren't to be kept."""
        if self._session.is_over():
            return
        if self._settings.keep or not self._session.made:
            if not self._was_asked:  # what was stopped goes on with its code
                self._session.forget_code()
            self._say_what_stays()
            return

        while True:
            try:
                self._delete("nothing is left to do on the TPUs")
                break
            except gcloud_lib.Passing as error:
                self._say(f"{error}: trying again")
                time.sleep(self._settings.poll_seconds)
        self._session.end()

    def _say_what_stays(self) -> None:
        if state_of(self._last_request) != "none":
            command = hint("delete", self._gcloud, self._order.name)
            say(f"{self._order.name}: the TPUs are still there, and cost. next: {command}")

    def _look(self) -> bool:
        """Looks at what there is and does the next thing; whether the run has ended."""
        name = self._order.name
        request = self._last_request = self._gcloud.queued_resource(name)
        state = state_of(request)
        if self._session.is_over():
            say(f"{name}: ended by another command of this machine")
            return True

        if request is None:
            self._create()
        elif state == "ACTIVE":
            return self._look_at_nodes()
        elif state in GONE:
            self._replace(f"{state}{reason(request)}", failed=state == "FAILED")
        elif state in WAITING or state in LEAVING:
            self._say(state)
        else:
            self._say(f"in the state {state}, which is unknown here: waiting")
        return False

    def _say(self, text: str) -> None:
        """Prints what changed, and now and then what didn't."""
        now = time.monotonic()
        if text != self._said or now - self._said_at > SAY_AGAIN_SECONDS:
            say(f"{self._order.name}: {text}")
            self._said, self._said_at = text, now

    # TPUs.

    def _create(self) -> None:
        for node in self._order.nodes():
            if self._gcloud.node(node) is None:
                continue
            if not self._session.made:
                raise Error(
                    f"there is a TPU VM {node} that no queued resource stands for: take another "
                    "name, or delete it",
                    f"gcloud compute tpus tpu-vm delete {node} {self._gcloud.where}",
                )
            # One that was taken away may keep its name.
            self._say(f"{node} is left over from before: it is deleted")
            self._gcloud.delete_node(node)

        kind = f"{self._order.slices} x {self._order.type}{', spot' if self._order.spot else ''}"
        self._say(f"asking for {kind} in {self._gcloud.zone}")

        had_some = self._session.made
        self._session.note_made(True)  # before: an answer that is lost may have been a yes
        try:
            self._gcloud.create(self._order)
        except gcloud_lib.Passing:
            raise
        except Error as error:
            self._session.note_made(had_some)
            # Quota of what was deleted may take a while to come back.
            self._failed_requests += 1
            if not had_some or self._failed_requests >= MAX_FAILED_REQUESTS:
                raise
            self._say(f"{error}: trying again")
        self._has_started, self._trouble_since, self._log_end = False, None, 0

    def _replace(self, why: str, *, failed: bool) -> None:
        """Deletes TPUs that are gone or no good: the next look asks for new ones."""
        self._failed_requests = self._failed_requests + 1 if failed else 0
        if self._failed_requests >= MAX_FAILED_REQUESTS:
            raise GivenUp(
                f"{self._failed_requests} requests failed one after the other, the last: {why}. "
                "Another zone or type may have what this one lacks",
                "gcloud compute tpus locations list",
            )
        self._has_started, self._trouble_since = False, None
        self._delete(why)

    def _delete(self, why: str) -> None:
        self._say(f"{why}: deleted")
        delete(self._gcloud, self._order.name, self._settings.poll_seconds)

    def _look_at_nodes(self) -> bool:
        """Looks at the TPU VMs of a request that is active."""
        wanted = gcloud_lib.num_hosts(self._order.type)
        workers = []
        for name in self._order.nodes():
            node = self._gcloud.node(name) or {}
            state = node.get("state", "missing")
            if state in NODE_GONE:
                self._replace(f"{name} is {state}", failed=False)
                return False

            count = len(node.get("networkEndpoints", []))
            if state != "READY" or count != wanted:
                self._wait_for(f"{name} is {state} with {count} of {wanted} workers")
                return False
            workers += [(name, worker) for worker in range(count)]
        return self._look_at_run(workers)

    def _wait_for(self, trouble: str) -> None:
        """Waits for what may mend itself, and replaces the TPUs where it doesn't."""
        now = time.monotonic()
        self._trouble_since = self._trouble_since or now
        if now - self._trouble_since > PATIENCE_SECONDS:
            self._replace(f"{trouble} for {PATIENCE_SECONDS / 60:.0f} minutes", failed=True)
        else:
            self._say(f"{trouble}: waiting")

    # The run on them.

    def _status(self, node: str, worker: int, log_from: int = 0) -> dict | None:
        """What a worker says of its run; None where it can't be reached."""
        command = f"""{ON_WORKER} status {log_from} || echo '{{"state": "none"}}'"""
        result = self._gcloud.ssh(node, worker, command)

        try:
            said = json.loads(result.stdout.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            return None

        if said.get("code") != self._code.tree:
            return {"state": "other code" if said["state"] == "running" else "not set up"}
        # An older run's end is not this one's.
        of_run = said.get("arguments", self._settings.arguments) == self._settings.arguments
        if said["state"] in ("ended", "died") and not of_run:
            return {"state": "none"}
        return said

    def _look_at_run(self, workers: Sequence[tuple[str, int]]) -> bool:
        """Looks at the run on TPUs that are there: sets them up, starts it, or shows its log."""
        first = self._status(*workers[0], self._log_end)
        if first:
            self._show_log(first)
        # One worker tells: when one of several fails, lm ends on all of them.
        if first and first["state"] == "running" and self._has_started:
            self._trouble_since = None
            self._say("running")
            return False

        statuses = gcloud_lib.on_all(self._status, workers)
        lost = [f"{worker} of {node}" for (node, worker), said in statuses.items() if said is None]
        states = {said["state"] for said in statuses.values() if said}

        if lost:
            self._wait_for(f"worker {', '.join(lost)} can't be reached")
        elif "running" not in states and any(said.get("asked") for said in statuses.values()):
            say(f"{self._order.name}: stopped, as it was asked to; the same command goes on")
            self._was_asked = True
            return True
        elif "other code" in states:
            self._say("a run with other code is under way: stopped")
            stop_run(self._gcloud, workers)
        elif "not set up" in states:
            self._set_up(workers)
        elif states <= {"ended"}:
            return self._judge(workers, statuses)
        elif "ended" in states and "running" in states:
            self._wait_for("the run has ended on some of the workers")
        else:
            self._start(workers)
        return False

    def _show_log(self, status: dict) -> None:
        """Prints what the log of worker 0 says that was not seen yet."""
        if status.get("log"):
            print(escape.printable(status["log"]), end="", file=sys.stderr, flush=True)
        self._log_end = status.get("log_end", 0)

    def _set_up(self, workers: Sequence[tuple[str, int]]) -> None:
        """Sets the workers up. One that was taken away meanwhile is the next look's matter."""
        try:
            set_up(self._gcloud, workers, self._code)
        except Unreachable as error:
            self._wait_for(f"set-up: {error}")
        except SetupFailed:
            time.sleep(self._settings.poll_seconds)
            if self._is_there(workers):
                raise
        else:
            self._trouble_since = None
            self._start(workers)

    def _is_there(self, workers: Sequence[tuple[str, int]]) -> bool:
        """Whether the TPUs are, and all workers can be reached."""
        if state_of(self._gcloud.queued_resource(self._order.name)) != "ACTIVE":
            return False

        def can_be_reached(node: str, worker: int) -> bool:
            return self._gcloud.ssh(node, worker, "true").returncode == 0

        return all(gcloud_lib.on_all(can_be_reached, workers).values())

    def _start(self, workers: Sequence[tuple[str, int]]) -> None:
        """Starts the run on all workers where it isn't under way."""
        file = self._settings.environment_file
        private = "chmod 600 lm-environment.json" if file else "rm -f lm-environment.json"
        arguments = shlex.join(self._settings.arguments)
        command = f"{private}; {ON_WORKER} start {arguments}"

        def start(node: str, worker: int) -> subprocess.CompletedProcess:
            if file:
                copied = self._gcloud.scp(file, node, worker, "lm-environment.json")
                if copied.returncode:
                    return copied
            return self._gcloud.ssh(node, worker, command)

        results = gcloud_lib.on_all(start, workers)

        failed = {worker: result for worker, result in results.items() if result.returncode}
        refused = {w: result for w, result in failed.items() if result.returncode == REFUSED}
        if refused:
            raise Error(_describe_failures(refused), hint("stop", self._gcloud, self._order.name))
        if failed:
            self._wait_for(f"the run can't be started: {_describe_failures(failed)}")
        self._has_started = not failed
        if self._has_started:
            self._failed_requests, self._trouble_since = 0, None
            self._say("started")

    def _judge(self, workers: Sequence[tuple[str, int]], statuses: dict) -> bool:
        """Looks at a run that has ended on all workers; whether it is done."""
        self._has_started = False
        failed = {worker: said for worker, said in statuses.items() if said["status"] != 0}
        if not failed:
            if not any(said["stopped"] for said in statuses.values()):
                say(f"{self._order.name}: the run has come to its end")
                return True
            self._start(workers)  # after maintenance
            return False

        (node, worker), said = next(iter(failed.items()))
        step = max(said.get("step", -1) for said in statuses.values())
        what = f"the run failed with {said['status']} on worker {worker} of {node}"
        if self._failed_step is not None and step <= self._failed_step:
            log = last_lines(said.get("log", ""))
            raise GivenUp(f"{what}, twice without a new checkpoint between:\n{log}")

        self._failed_step = step
        say(f"{what}; its newest checkpoint is of step {step}: started again")
        self._start(workers)
        return False
