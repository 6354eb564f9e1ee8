"""Calls of gcloud: what is asked of Cloud TPU, and errors that say what to type next.

Needs nothing but Python, so that it runs where lm is not installed.
"""

import concurrent.futures
import dataclasses
import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence

CALL_SECONDS = 180  # that a call may take
SSH_FAILED, TIMED_OUT = 255, 124  # statuses
TRIES = 5  # of a call whose error passes
SSH_FLAGS = ("--ssh-flag=-o ConnectTimeout=30", "--ssh-flag=-o ServerAliveInterval=30")


class Error(Exception):
    """What went wrong, and the command to type next ("": none)."""

    def __init__(self, message: str, command: str = ""):
        super().__init__(message + (f"\nnext: {command}" if command else ""))


class Passing(Error):
    """A failure that may pass: a service or a network that doesn't answer."""


# --- types of TPUs ---


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs. The number after its name counts chips, or cores of two a chip.

    Attributes:
      runtime: the VM's image.
      largest_host: the largest number that is one host.
      per_host: how much of the number a host has where there are several.
    """

    runtime: str
    largest_host: int
    per_host: int


GENERATIONS = {
    "v2": Generation("tpu-ubuntu2204-base", 8, 8),
    "v3": Generation("tpu-ubuntu2204-base", 8, 8),
    "v4": Generation("tpu-ubuntu2204-base", 8, 8),
    "v5litepod": Generation("v2-alpha-tpuv5-lite", 8, 4),
    "v5p": Generation("v2-alpha-tpuv5", 8, 8),
    "v6e": Generation("v2-alpha-tpuv6e", 8, 4),
}


def generation(accelerator_type: str) -> Generation:
    """Raises Error for a type that doesn't exist."""
    name, _, size = accelerator_type.partition("-")
    if name not in GENERATIONS or not size.isdigit() or int(size) == 0:
        valid = ", ".join(f"{name}-N" for name in GENERATIONS)
        raise Error(f"--type={accelerator_type}: no such TPU; valid: {valid}, such as v5litepod-8")
    return GENERATIONS[name]


def num_hosts(accelerator_type: str) -> int:
    """Returns how many workers a slice has."""
    size, kind = int(accelerator_type.partition("-")[2]), generation(accelerator_type)
    return 1 if size <= kind.largest_host else size // kind.per_host


@dataclasses.dataclass(frozen=True)
class Order:
    """What is asked of Cloud TPU: slices of one type under one name."""

    name: str
    type: str
    slices: int = 1
    spot: bool = False
    runtime: str = ""  # "": the generation's
    reservation: bool = False

    def nodes(self) -> list[str]:
        """Names of the slices."""
        if self.slices == 1:
            return [self.name]
        return [f"{self.name}-{index}" for index in range(self.slices)]

    def as_requested(self, request: dict | None) -> "Order":
        """The order that a request is of: commands needn't repeat it."""
        specs = (request or {}).get("tpu", {}).get("nodeSpec", [])
        if not specs:
            return self
        several = specs[0].get("multisliceParams") or specs[0].get("multiNodeParams") or {}
        slices = max(int(several.get("nodeCount", 1)), len(specs))
        kind = specs[0].get("node", {}).get("acceleratorType", self.type).rpartition("/")[2]
        return dataclasses.replace(self, type=kind, slices=slices)


# --- errors ---

_PASSING = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL\b|ABORTED|HTTPError 5\d\d|Connection (reset|aborted)"
    r"|timed out|requests per minute|RATE_LIMIT|Max retries exceeded|Failed to resolve"
    r"|[Nn]ame resolution|NewConnectionError|ConnectionError|Network is unreachable"
)
_NOT_FOUND = re.compile(r"NOT_FOUND|not found|HTTPError 404|does not exist")


def explain(error: str, gcloud: "Gcloud") -> Error:
    """Turns what gcloud printed into an error with the next command."""
    if _PASSING.search(error):
        return Passing(f"gcloud said: {error}")
    zone, project, where = gcloud.zone, gcloud.project, gcloud.where
    of_project = f" --project={project}" if project else ""
    if re.search(r"ALREADY_EXISTS|already exists", error):
        return Error(
            "this name is taken: take another one, or delete what has it (./tpu_setup.sh delete "
            f"NAME, or gcloud compute tpus tpu-vm delete NAME {where}). gcloud said: {error}",
            f"gcloud compute tpus tpu-vm list {where}",
        )
    known = {
        r"active account|gcloud auth login|[Rr]eauth|invalid_grant": (
            "gcloud is not logged in",
            "gcloud auth login",
        ),
        r"SERVICE_DISABLED|has not been used in project|API .*not enabled": (
            "the Cloud TPU API is off in this project",
            f"gcloud services enable tpu.googleapis.com{of_project}",
        ),
        r"[Qq]uota|RESOURCE_EXHAUSTED": (
            "there is no quota for this. Requests that were suspended or failed hold quota until "
            "they are deleted; more is asked for in the console, at IAM and admin, Quotas",
            f"gcloud compute tpus queued-resources list {where}",
        ),
        r"[Aa]ccelerator ?[Tt]ype": (
            f"zone {zone} doesn't give this project this type",
            f"gcloud compute tpus accelerator-types list {where}",
        ),
        r"[Rr]untime ?[Vv]ersion|software version": (
            "there is no such runtime here",
            f"gcloud compute tpus tpu-vm versions list {where}",
        ),
        r"locations/|[Ii]nvalid zone|[Uu]nknown zone": (
            f"zone {zone} doesn't exist, has no TPUs, or is closed to this project",
            f"gcloud compute tpus locations list{of_project}",
        ),
        r"[Pp]roject": (
            f"project {project or '(the one that gcloud is set to)'} doesn't exist, or isn't "
            "open to this account",
            "gcloud projects list",
        ),
        r"PERMISSION_DENIED|[Pp]ermission": (
            "this account may not do that",
            f"gcloud auth list && gcloud projects get-iam-policy {project or 'PROJECT'}",
        ),
    }
    for pattern, (message, command) in known.items():
        if re.search(pattern, error):
            return Error(f"{message}. gcloud said: {error}", command)
    return Error(f"gcloud said: {error}")


# --- calls ---


class Gcloud:
    """gcloud in a zone of a project.

    Args:
      project: "" for the one that gcloud is set to.
      pause: seconds before a call whose error passes is tried again, doubled each time.
    """

    def __init__(self, zone: str, project: str = "", pause: float = 5.0):
        self.zone, self.project = zone, project
        self._pause = pause
        self._where = [f"--zone={zone}", *([f"--project={project}"] if project else [])]
        self.where = shlex.join(self._where)  # for command lines that are shown

    def _execute(self, arguments: Sequence[str], seconds: float) -> subprocess.CompletedProcess:
        """Runs gcloud. What it can't do is a status, as for other commands."""
        command = ["gcloud", *arguments]
        try:
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
            )
        except FileNotFoundError:
            raise Error(
                "there is no gcloud on this machine: install Google Cloud's command line tools",
                "gcloud init",
            ) from None
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(
                command, TIMED_OUT, "", f"timed out after {seconds} s"
            )

    def _call(self, *arguments: str, may_lack: bool = False, tries: int = TRIES) -> str | None:
        """Returns what gcloud prints.

        Args:
          may_lack: give None where what is asked for doesn't exist.

        Raises:
          Error: gcloud failed. A failure that passes is waited for.
        """
        for attempt in range(tries):
            result = self._execute([*arguments, *self._where, "--quiet"], CALL_SECONDS)
            error = result.stderr.strip()
            if result.returncode == 0:
                return result.stdout
            if not _PASSING.search(error) or attempt == tries - 1:
                break
            time.sleep(self._pause * 2**attempt)

        # A zone or a project that isn't there is an error of another kind.
        is_elsewhere = re.search(r"[Pp]roject .*not|locations/[^/]*'", error)
        if may_lack and _NOT_FOUND.search(error) and not is_elsewhere:
            return None
        raise explain(error, self)

    def _read(self, *arguments: str) -> dict | list | None:
        text = self._call(*arguments, "--format=json", may_lack=True)
        if text is None:
            return None

        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise Error(f"gcloud {shlex.join(arguments)} printed no JSON: {text[:200]}") from None

    # What there is.

    def queued_resource(self, name: str) -> dict | None:
        """A request for TPUs, as the API describes it; None if there is none."""
        return self._read("compute", "tpus", "queued-resources", "describe", name)

    def node(self, name: str) -> dict | None:
        """A TPU VM: one slice."""
        return self._read("compute", "tpus", "tpu-vm", "describe", name)

    def accelerator_types(self) -> list[str]:
        """The types that the zone has."""
        types = self._read("compute", "tpus", "accelerator-types", "list") or []
        return [entry.get("type") or entry.get("name", "").rsplit("/", 1)[-1] for entry in types]

    def bucket(self, url: str) -> dict | None:
        """A bucket, gs://NAME."""
        arguments = ["storage", "buckets", "describe", url, "--format=json"]
        if self.project:
            arguments.append(f"--project={self.project}")

        result = self._execute(arguments, CALL_SECONDS)
        if result.returncode == 0:
            return json.loads(result.stdout)
        if _NOT_FOUND.search(result.stderr):
            return None
        raise explain(result.stderr.strip(), self)

    # Changes.

    def create(self, order: Order) -> None:
        """Asks for TPUs: they come when there are some.

        Raises:
          Passing: the answer may have been lost. Look before asking again.
        """
        arguments = [order.name, f"--accelerator-type={order.type}"]
        arguments.append(f"--runtime-version={order.runtime or generation(order.type).runtime}")

        if order.slices == 1:
            arguments.append(f"--node-id={order.name}")
        else:
            arguments += [f"--node-count={order.slices}", f"--node-prefix={order.name}"]
        if order.spot:
            arguments.append("--spot")
        if order.reservation:
            arguments.append("--reserved")
        self._call("compute", "tpus", "queued-resources", "create", *arguments, tries=1)

    def delete(self, name: str) -> None:
        """Deletes a request with its TPUs. Returns before they are gone."""
        self._call(
            "compute",
            "tpus",
            "queued-resources",
            "delete",
            name,
            "--force",
            "--async",
            may_lack=True,
        )

    def delete_node(self, name: str) -> None:
        """Deletes a TPU VM that no request stands for."""
        self._call("compute", "tpus", "tpu-vm", "delete", name, may_lack=True)

    # On the workers.

    def ssh_arguments(self, node: str, worker: int, command: str = "") -> list[str]:
        """What follows gcloud to run a command on a worker, or to get a shell."""
        arguments = ["compute", "tpus", "tpu-vm", "ssh", node, f"--worker={worker}", *self._where]
        arguments += ["--quiet", *SSH_FLAGS]
        return arguments + ([f"--command={command}"] if command else [])

    def ssh(
        self, node: str, worker: int, command: str, seconds: float = CALL_SECONDS
    ) -> subprocess.CompletedProcess:
        """Runs a command on a worker; its status is 255 where that can't be reached."""
        return self._execute(self.ssh_arguments(node, worker, command), seconds)

    def scp(self, file: str, node: str, worker: int, to: str) -> subprocess.CompletedProcess:
        """Copies a file to a worker."""
        arguments = ["compute", "tpus", "tpu-vm", "scp", file, f"{node}:{to}"]
        arguments += [f"--worker={worker}", *self._where, "--quiet"]
        return self._execute(arguments, CALL_SECONDS)

    def connect(self, arguments: Sequence[str]) -> int:
        """Runs gcloud on this terminal, until the user ends it."""
        try:
            return subprocess.call(["gcloud", *arguments])
        except KeyboardInterrupt:
            return 0


def was_reached(result: subprocess.CompletedProcess) -> bool:
    """Whether a worker ran a command, or failed at it, and not what brings it there."""
    of_gcloud = (
        "ERROR: (gcloud." in result.stderr and "exited with return code" not in result.stderr
    )
    return result.returncode not in (SSH_FAILED, TIMED_OUT) and not of_gcloud


def configured(name: str) -> str:
    """What gcloud is set to, such as its project; "" for nothing."""
    result = Gcloud("")._execute(["config", "get-value", name, "--quiet"], CALL_SECONDS)
    return result.stdout.strip().replace("(unset)", "")


def on_all(do: Callable, workers: Sequence[tuple[str, int]]) -> dict:
    """Calls do(node, worker) for all workers at once: {(node, worker): what it returns}."""
    # All at once, however many: in a set-up they wait for each other.
    with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
        results = list(pool.map(do, *zip(*workers)))
    return dict(zip(workers, results))
