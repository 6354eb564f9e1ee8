"""--dry_run: the commands of gcloud that a course without trouble has, and its answers."""

import json
import shlex
import subprocess
from collections.abc import Sequence

from lm.tpu.gcloud import Gcloud, Order, num_hosts


class Rehearsal(Gcloud):
    """Prints each command, and answers as in a course without trouble."""

    def __init__(self, zone: str, project: str, order: Order, *, exists: bool):
        super().__init__(zone, project)
        self._order = order
        self._exists = exists
        self._code, self._has_started = "", False

    def connect(self, arguments: Sequence[str]) -> int:
        return self._execute(arguments, 0).returncode

    def _execute(self, arguments: Sequence[str], seconds: float) -> subprocess.CompletedProcess:
        print(shlex.join(["gcloud", *arguments]), flush=True)
        text = " ".join(arguments)
        answer, status = "", 0
        if "queued-resources create" in text:
            self._exists = True
        elif "queued-resources delete" in text:
            self._exists = False
        elif " describe " in text and "buckets" not in text and not self._exists:
            answer, status = "NOT_FOUND", 1
        elif "queued-resources describe" in text:
            answer = json.dumps({"state": {"state": "ACTIVE"}})
        elif "tpu-vm describe" in text:
            endpoints = [{}] * num_hosts(self._order.type or "v5litepod-8")
            answer = json.dumps({"state": "READY", "networkEndpoints": endpoints})
        elif "accelerator-types list" in text:
            answer = json.dumps([{"type": self._order.type}])
        elif "buckets describe" in text:
            answer = json.dumps({"location": self.zone.rpartition("-")[0]})
        elif "tpu-vm ssh" in text:
            answer = self._on_worker(arguments[-1])
        return subprocess.CompletedProcess(
            arguments, status, answer if status == 0 else "", answer if status else ""
        )

    def _on_worker(self, command: str) -> str:
        if "tpu_setup.sh" in command:
            self._code = command.split()[-3]  # ... && echo CODE > lm/.code
        elif "worker start" in command:
            self._has_started = True
        elif "worker status" in command:
            state = "ended" if self._has_started else "none"
            return json.dumps({"state": state, "code": self._code, "status": 0, "stopped": False})
        return ""
