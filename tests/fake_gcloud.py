"""A gcloud for tests: TPUs are folders of this machine, workers processes in them.

What goes wrong, and when, stands in scenario.json of the folder FAKE_GCLOUD:

  creations   one dict for each request, in their order; the last stands for all later ones:
    states    of the request, one a look; the last one stays
    nodes     states of its TPU VMs, one a look; the last one stays; "missing": none
    workers   that the TPU VMs show, where not all of them
    end       what takes the TPUs away: "step" or "looks" (how many while ACTIVE), then "states"
    node_end  true: the TPU VM says PREEMPTED, and the request stays ACTIVE
    message   of a request that fails
  errors      {verb: [text or null, one a call]}, printed instead of an answer
  ssh_errors  [{"worker", "match" (part of the command), "times", "status", "text", "delay"}]
  lost        {verb: [true for a call that is done and whose answer is lost, one a call]}
  versions    {worker: what its set-up says}
  types, buckets, workdir
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_GCLOUD"])
PARENT = "projects/someone/locations/us-west4-a"


@contextlib.contextmanager
def cloud():
    """The state of the cloud, held and written back."""
    with (FOLDER / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = FOLDER / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        try:
            yield state
        finally:
            path.write_text(json.dumps(state))


def scenario():
    return json.loads((FOLDER / "scenario.json").read_text())


def fail(text, status=1):
    print(text, file=sys.stderr)
    sys.exit(status)


def advance(states):
    """The state of this look; a list's last one stays."""
    return states.pop(0) if len(states) > 1 else states[0]


def processes(vm):
    """Those of a TPU VM that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and f"FAKE_VM={FOLDER}/{vm}\0".encode() in (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
    return found


def wipe(vms):
    """What a TPU VM that is taken away leaves: nothing."""
    for vm in vms:
        for pid in processes(vm):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while processes(vm):
            time.sleep(0.01)
        shutil.rmtree(FOLDER / "vms" / vm, ignore_errors=True)


def newest_step():
    path = Path(scenario().get("workdir", "")) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def take_away_if_due(state):
    for request in state.get("requests", {}).values():
        end = request["end"]
        if not end or request["states"][0] != "ACTIVE":
            continue
        looks_due = request["looks"] >= end.get("looks", 10**9)
        if looks_due or newest_step() >= end.get("step", 10**9):
            wipe(request["vms"])
            request["end"] = None
            if request["node_end"]:
                request["nodes"] = ["PREEMPTED"]
            else:
                request["nodes"], request["states"] = ["missing"], end["states"]


def size(kind):
    name, _, number = kind.partition("-")
    largest, per_host = (8, 4) if name in ("v5litepod", "v6e") else (8, 8)
    return 1 if int(number) <= largest else int(number) // per_host


def create(state, name, flags):
    requests = state.setdefault("requests", {})
    if name in requests or name in state.get("left", []):
        fail(f"ERROR: ALREADY_EXISTS: Resource '{PARENT}/queuedResources/{name}' already exists")
    plans = scenario()["creations"]
    count = state["creations"] = state.get("creations", 0) + 1
    plan = plans[min(count, len(plans)) - 1]
    slices = int(flags.get("node-count", 1))
    nodes = (
        [flags["node-id"]]
        if slices == 1
        else [f"{flags['node-prefix']}-{i}" for i in range(slices)]
    )
    kind = flags["accelerator-type"]
    requests[name] = {
        "type": kind,
        "spot": "spot" in flags,
        "names": nodes,
        "count": plan.get("workers", size(kind)),
        "vms": [f"{node}.{worker}" for node in nodes for worker in range(size(kind))],
        "states": list(plan.get("states", ["ACTIVE"])),
        "nodes": list(plan.get("nodes", ["READY"])),
        "end": plan.get("end"),
        "node_end": plan.get("node_end", False),
        "message": plan.get("message", ""),
        "looks": 0,
    }


def describe(state, name):
    request = state.get("requests", {}).get(name)
    if request is None:
        fail(f"ERROR: NOT_FOUND: Resource '{PARENT}/queuedResources/{name}' was not found")
    word = advance(request["states"])
    request["looks"] += word == "ACTIVE"
    answer = {"state": word, "stateInitiator": "SERVICE"}
    if word == "FAILED":
        answer["failedData"] = {"error": {"code": 8, "message": request["message"]}}
    if word == "GONE":
        del state["requests"][name]
        fail(f"ERROR: NOT_FOUND: Resource '{PARENT}/queuedResources/{name}' was not found")
    spec = {"parent": PARENT, "node": {"acceleratorType": request["type"]}}
    if len(request["names"]) == 1:
        spec["nodeId"] = name
    else:
        spec["multisliceParams"] = {"nodeCount": len(request["names"]), "nodeIdPrefix": name}
    return {
        "name": f"{PARENT}/queuedResources/{name}",
        "createTime": "2026-01-01T00:00:00Z",
        "state": answer,
        "tpu": {"nodeSpec": [spec]},
        **({"spot": {}} if request["spot"] else {}),
    }


def describe_node(state, name):
    if name in state.get("left", []):
        return {"name": f"{PARENT}/nodes/{name}", "state": "PREEMPTED"}
    for request in state.get("requests", {}).values():
        if name in request["names"]:
            word = advance(request["nodes"])
            if word != "missing":
                addresses = [
                    {"ipAddress": f"10.0.0.{i}", "port": 8470} for i in range(request["count"])
                ]
                return {
                    "name": f"{PARENT}/nodes/{name}",
                    "state": word,
                    "health": "HEALTHY",
                    "networkEndpoints": addresses,
                }
    fail(f"ERROR: NOT_FOUND: Resource '{PARENT}/nodes/{name}' was not found")


def delete(state, name):
    request = state.get("requests", {}).get(name)
    if request is None:
        fail(f"ERROR: NOT_FOUND: Resource '{PARENT}/queuedResources/{name}' was not found")
    wipe(request["vms"])
    request["states"] = ["DELETING", "DELETING", "GONE"]
    if request["node_end"]:
        state.setdefault("left", []).extend(request["names"])


def check_vm(node, worker):
    """The folder of a worker that can be reached."""
    with cloud() as state:
        for request in state.get("requests", {}).values():
            vm = f"{node}.{worker}"
            if (
                vm in request["vms"]
                and request["states"][0] == "ACTIVE"
                and request["nodes"] == ["READY"]
            ):
                home = FOLDER / "vms" / vm
                home.mkdir(parents=True, exist_ok=True)
                return vm, home
    fail("ssh: connect to host 10.0.0.1 port 22: Connection timed out", 255)


def break_ssh(worker, text):
    """Fails as the scenario says."""
    for index, error in enumerate(scenario().get("ssh_errors", [])):
        if int(worker) != error["worker"] or error["match"] not in text:
            continue
        with cloud() as state:
            done = state.setdefault("ssh_errors", {})
            done[str(index)] = done.get(str(index), 0) + 1
            times = done[str(index)]
        if times <= error.get("times", 10**9):
            time.sleep(error.get("delay", 0))
            fail(error["text"], error["status"])


def ssh(node, worker, command):
    break_ssh(worker, command)
    vm, home = check_vm(node, worker)
    versions = scenario().get("versions", {}).get(worker, "python 3.12.1, jax 0.10.2")
    # A machine of its own has no other variables of this one.
    known = ("FAKE_", "JAX_", "XLA_", "PYTHON")
    environment = {k: value for k, value in os.environ.items() if k.startswith(known)} | {
        "HOME": str(home),
        "FAKE_VM": f"{FOLDER}/{vm}",  # by which its processes are found
        "FAKE_VERSIONS": versions,
        "PATH": f"{FOLDER / 'vm_bin'}:{os.environ['PATH']}",
    }
    # Its own session: the connection goes, what it started stays.
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode)


def main(argv):
    with (FOLDER / "calls.log").open("a") as log:
        log.write(json.dumps(argv) + "\n")
    flags, words = {}, []
    for argument in argv:
        if match := re.match(r"--([a-z-]+)(?:=(.*))?$", argument, re.DOTALL):
            flags[match[1]] = match[2]
        else:
            words.append(argument)
    verb = " ".join(words[1:4] if words[0] == "compute" else words[:3])

    with cloud() as state:
        take_away_if_due(state)
        errors = scenario().get("errors", {}).get(verb, [])
        count = state.setdefault("calls", {})[verb] = state.get("calls", {}).get(verb, 0) + 1
        if count <= len(errors) and errors[count - 1]:
            fail(errors[count - 1])
        answer = None
        if verb == "tpus queued-resources create":
            create(state, words[4], flags)
        elif verb == "tpus queued-resources describe":
            answer = describe(state, words[4])
        elif verb == "tpus queued-resources delete":
            delete(state, words[4])
        elif verb == "tpus tpu-vm describe":
            answer = describe_node(state, words[4])
        elif verb == "tpus tpu-vm delete":
            state["left"].remove(words[4])
        elif verb == "tpus accelerator-types list":
            types = scenario().get("types", ["v5litepod-8", "v4-32"])
            answer = [{"name": f"{PARENT}/acceleratorTypes/{kind}", "type": kind} for kind in types]
        elif verb == "storage buckets describe":
            buckets = scenario().get("buckets", {})
            if words[3] not in buckets:
                fail(f"ERROR: {words[3]} not found: 404.")
            answer = {"name": words[3][5:], "location": buckets[words[3]]}
        elif verb == "config get-value compute/zone":
            print("us-west4-a")
        elif verb == "config get-value project":
            print("someone")
        elif verb not in ("tpus tpu-vm ssh", "tpus tpu-vm scp"):
            fail(f"ERROR: (gcloud) Invalid choice: {argv}", 2)
        lost = scenario().get("lost", {}).get(verb, [])
        if count <= len(lost) and lost[count - 1]:
            fail("ERROR: HTTPError 503: The service is currently UNAVAILABLE.")
    if answer is not None:
        print(json.dumps(answer))
    if verb == "tpus tpu-vm ssh":
        ssh(words[4], flags["worker"], flags["command"])
    if verb == "tpus tpu-vm scp":
        node, _, to = words[5].partition(":")
        break_ssh(flags["worker"], f"scp {to}")
        shutil.copy(words[4], check_vm(node, flags["worker"])[1] / to)


if __name__ == "__main__":
    main(sys.argv[1:])
