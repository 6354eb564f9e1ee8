"""TPUs of Google Cloud, with a fake gcloud (tests/fake_gcloud.py): what is asked for, what is done
when it is taken away or fails, and that nothing is left running.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lm.tpu import gcloud as gcloud_lib
from lm.tpu import worker
from tests.helpers import (
    CONFIG_FILE,
    ROOT,
    SLOW_SOURCE,
    assert_same_run,
    read_jsonl,
    run_training,
    xla_flags,
)

# Stands for lm.main: steps, a checkpoint every second one, and its end.
FAKE_MAIN = """
import json, os, signal, sys, time
from pathlib import Path
flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
run = Path(flags["workdir"])
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *unused: sys.exit(0))
step = max([int(p.name) for p in (run / "checkpoints").iterdir()], default=0)
print("going on from step", step, "with", os.environ.get("SECRET"), flush=True)
while step < int(flags.get("steps", 8)):
    time.sleep(float(flags.get("seconds", 0.05)))
    step += 1
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    if step == int(flags.get("fail_at", -1)):
        sys.exit("error: it broke at step %d" % step)
    if step % 2 == 0:
        (run / "checkpoints" / str(step)).mkdir(exist_ok=True)
print("done", flush=True)
"""

# Stands for the Python of a TPU VM: its environments have this machine's packages, and its TPU is
# always there.
VM_PYTHON = f"""#!/bin/bash
if [ "$1" = -m ] && [ "$2" = venv ]; then
  mkdir -p "$3/bin"
  printf '#!/bin/bash\\nexec -a .venv/bin/pip sleep $FAKE_PIP_SECONDS\\n' > "$3/bin/pip"
  cp "$0" "$3/bin/python"
  chmod +x "$3/bin/pip"
elif [ "$2" = lm-check ]; then
  cat >/dev/null
  echo "versions: $FAKE_VERSIONS"
else
  exec {sys.executable} "$@"
fi
"""


def make_checkout(folder, *, fake_main=True, config=None):
    """A checkout of this project's code, in a repository of its own; `config` is its
    configs/toy.py.
    """
    folder.mkdir()
    for name in ("lm", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tpu_setup.sh", "setup.cfg", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, folder)
    if fake_main:
        (folder / "lm" / "main.py").write_text(FAKE_MAIN)
    if config is not None:
        text = CONFIG_FILE.format(text=json.dumps(config.to_dict()))
        (folder / "configs" / "toy.py").write_text(text)
    (folder / ".gitignore").write_text("__pycache__\n")
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", folder, *arguments], check=True)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("tpu") / "lm")


class Cloud:
    """The fake cloud, and the commands that are given to it."""

    def __init__(self, folder, checkout):
        self.folder, self.checkout = folder, checkout
        self.run_directory = folder / "run"
        self.poll_seconds = 0.02
        for name in ("bin", "vm_bin", "python"):
            (folder / name).mkdir()
        (folder / "python" / "python3.13").symlink_to(sys.executable)
        self._write_script(
            "bin/gcloud",
            f'#!/bin/bash\nexec {sys.executable} -SE {ROOT}/tests/fake_gcloud.py "$@"\n',
        )
        self._write_script("vm_bin/python3.13", VM_PYTHON)
        self.environment = os.environ | {
            "FAKE_GCLOUD": str(folder),
            "PATH": f"{folder / 'bin'}:{folder / 'python'}:/usr/bin:/bin",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "FAKE_PIP_SECONDS": "0",
        }
        self.scenario()

    def _write_script(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def scenario(self, *creations, **more):
        """What happens to the requests, one after the other; see tests/fake_gcloud.py."""
        values = {
            "creations": creations or [{}],
            "workdir": str(self.run_directory),
            "types": ["v5litepod-8", "v4-16", "v4-32"],
        }
        (self.folder / "scenario.json").write_text(json.dumps(values | more))

    def command(self, *arguments, checkout=None):
        script = (checkout or self.checkout) / "tpu_setup.sh"
        poll = f"--poll_seconds={self.poll_seconds}"
        return ["bash", str(script), *arguments, "--zone=us-west4-a", poll]

    def do(self, *arguments, timeout=60):
        """Gives a command; returns its status and what it printed."""
        result = subprocess.run(
            self.command(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return result.returncode, result.stdout + result.stderr

    def run_command(self, *flags, kind="v5litepod-8", own=()):
        """The command of a run, with flags of its own and flags of lm.main."""
        command = self.command("run", "pod", f"--type={kind}", "--mounted", *own)
        run_flags = [f"--workdir={self.run_directory}", *flags]
        if not any(flag.startswith("--config=") for flag in flags):
            run_flags.append("--config=configs/pydocs.py")
        return [*command, "--", *run_flags]

    def run(self, *flags, timeout=120, **options):
        """Supervises a run to its end; returns the status and what was printed."""
        command = self.run_command(*flags, **options)
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        return result.returncode, result.stdout + result.stderr

    def calls(self, verb):
        """The calls of gcloud that have these words."""
        log = self.folder / "calls.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [call for call in map(json.loads, lines) if verb in " ".join(call)]

    def state(self):
        return json.loads((self.folder / "state.json").read_text())

    def is_empty(self):
        """Whether no TPUs are left, nor anything that ran on them."""
        vms = self.folder / "vms"
        return not self.state().get("requests") and not (vms.exists() and list(vms.iterdir()))

    def is_training(self):
        return (self.run_directory / "metrics.jsonl").exists()


@pytest.fixture
def cloud(tmp_path, checkout):
    return Cloud(tmp_path, checkout)


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# --- a run ---


def test_a_run_is_brought_to_its_end_and_nothing_is_left(cloud):
    cloud.scenario({"states": ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]})
    status, printed = cloud.run(own=["--spot"])
    assert status == 0, printed
    assert "going on from step 0" in printed and "done" in printed  # the log of worker 0
    assert "WAITING_FOR_RESOURCES" in printed and "the run has come to its end" in printed
    assert cloud.is_empty()

    ((*_, create),) = [cloud.calls("queued-resources create")]
    assert "--accelerator-type=v5litepod-8" in create and "--spot" in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create and "--node-id=pod" in create


def test_a_run_goes_on_after_each_way_to_lose_its_tpus(cloud):
    cloud.scenario(
        # Taken away.
        {"end": {"step": 2, "states": ["SUSPENDING", "SUSPENDING", "SUSPENDED"]}},
        # Never there.
        {"states": ["PROVISIONING", "FAILED"], "message": "no capacity"},
        # In a state that is new; half made at first.
        {
            "states": ["CREATING", "DREAMING", "ACTIVE"],
            "nodes": ["missing", "CREATING", "READY"],
            "end": {"step": 4, "states": ["SUSPENDED"]},
        },
        # The TPU VM is gone, the request says nothing, and the name stays taken.
        {"end": {"step": 5, "states": []}, "node_end": True},
        # Deleted by somebody else.
        {"end": {"step": 6, "states": ["DELETING", "DELETING", "GONE"]}},
        {},
    )
    status, printed = cloud.run("--seconds=0.3", own=["--spot"])
    assert status == 0, printed
    for text in ("FAILED (no capacity)", "DREAMING", "pod is missing", "PREEMPTED", "left over"):
        assert text in printed, (text, printed)
    assert len(cloud.calls("queued-resources create")) == 6
    assert cloud.is_empty() and cloud.state()["left"] == []
    assert max(line["step"] for line in read_jsonl(cloud.run_directory / "metrics.jsonl")) == 8


def test_a_pod_of_two_slices_runs_on_all_workers(cloud):
    cloud.scenario({"end": {"step": 3, "states": ["SUSPENDED"]}}, {})
    status, printed = cloud.run(kind="v4-16", own=["--slices=2"])
    assert status == 0, printed
    create = cloud.calls("queued-resources create")[0]
    assert "--node-count=2" in create and "--node-prefix=pod" in create
    started = {(call[4], call[5]) for call in cloud.calls("lm.tpu.worker start")}
    assert started == {(f"pod-{s}", f"--worker={w}") for s in range(2) for w in range(2)}
    assert cloud.is_empty()


def test_commands_find_all_slices_by_themselves(cloud):
    cloud.do("create", "pod", "--type=v4-16", "--slices=2")
    status, printed = cloud.run(kind="v4-16")
    assert status == 1 and "pod exists and is 2 x v4-16, not 1 x v4-16" in printed
    status, printed = cloud.do("setup", "pod")
    assert status == 0 and "4 worker(s)" in printed, printed
    status, printed = cloud.do("status", "pod")
    assert status == 0 and "pod-1: READY" in printed and "worker 1 of pod-1" in printed
    cloud.do("delete", "pod")
    assert cloud.is_empty()


def test_a_request_that_fails_again_and_again_is_given_up(cloud):
    cloud.scenario({"states": ["FAILED"], "message": "no capacity"})
    status, printed = cloud.run()
    assert status == 1 and "5 requests failed" in printed and "no capacity" in printed
    assert cloud.is_empty()


def test_a_run_that_fails_is_started_again_as_long_as_it_gets_on(cloud):
    status, printed = cloud.run("--fail_at=5")
    assert status == 1
    assert "failed with 1 on worker 0 of pod" in printed and "step 4: started again" in printed
    assert "twice without a new checkpoint" in printed and "it broke at step 5" in printed
    assert cloud.is_empty()


def test_one_worker_that_fails_is_named(cloud):
    cloud.scenario(
        ssh_errors=[{"worker": 2, "match": "tpu_setup.sh", "status": 1, "text": "disk is full"}]
    )
    status, printed = cloud.run(kind="v4-32")
    assert status == 1 and "worker 2 of pod failed with 1" in printed and "disk is full" in printed
    assert cloud.is_empty()


def test_a_failed_set_up_by_hand_ends_everywhere_at_once_and_says_what_it_costs(cloud):
    cloud.environment["FAKE_PIP_SECONDS"] = "100"  # on the other worker
    cloud.do("create", "pod", "--type=v4-16")
    error = {"worker": 1, "match": "tpu_setup.sh &&", "status": 1, "text": "no Python"}
    cloud.scenario(ssh_errors=[error | {"delay": 2}])
    status, printed = cloud.do("setup", "pod", timeout=40)
    assert status == 1 and "worker 1 of pod failed" in printed and "no Python" in printed
    assert "cost" in printed and "next: ./tpu_setup.sh delete pod" in printed
    cloud.do("delete", "pod")


def test_a_worker_with_other_versions_is_named(cloud):
    cloud.scenario(versions={"1": "python 3.12.1, jax 0.9.0"})
    status, printed = cloud.run(kind="v4-16")
    assert status == 1 and "worker 1 of pod: python 3.12.1, jax 0.9.0" in printed
    assert "worker 0 of pod: python 3.12.1, jax 0.10.2" in printed
    assert cloud.is_empty()


def test_connections_and_services_that_fail_for_a_while_are_waited_for(cloud):
    cloud.scenario(
        ssh_errors=[
            {"worker": 0, "match": "worker status", "times": 2, "status": 255, "text": "timed out"},
            {"worker": 0, "match": "scp", "times": 1, "status": 255, "text": "timed out"},
            {
                "worker": 0,
                "match": "worker start",
                "times": 1,
                "status": 1,
                "text": "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) HTTPError 503: try later",
            },
        ],
        errors={
            "tpus queued-resources describe": [
                None,
                None,
                "ERROR: UNAVAILABLE: try later",
                None,
                *["There was a problem refreshing your auth tokens: Max retries exceeded"] * 7,
            ]
        },
    )
    status, printed = cloud.run()
    assert status == 0, printed
    assert "can't be reached" in printed and cloud.is_empty()


def test_a_login_that_ends_leaves_the_run(cloud):
    login = "ERROR: (gcloud) You do not currently have an active account selected."
    cloud.scenario(errors={"tpus queued-resources describe": [None] * 6 + [login] * 9})
    status, printed = cloud.run("--steps=1000")
    assert status == 1 and "still there, and cost" in printed and "gcloud auth login" in printed
    cloud.scenario()
    assert not cloud.is_empty() and "running" in cloud.do("status", "pod")[1]
    cloud.do("delete", "pod")
    assert cloud.is_empty()


def test_a_tpu_vm_of_somebody_is_not_touched(cloud):
    (cloud.folder / "state.json").write_text('{"left": ["pod"]}')
    status, printed = cloud.run()
    assert status == 1 and "next: gcloud compute tpus tpu-vm delete pod" in printed
    assert cloud.state()["left"] == ["pod"] and not cloud.calls("create")


def test_answers_that_are_lost_leave_nothing(cloud):
    cloud.scenario(
        lost={"tpus queued-resources create": [True], "tpus queued-resources delete": [True]}
    )
    status, printed = cloud.run()
    assert status == 0 and "503" in printed, printed
    assert len(cloud.calls("queued-resources create")) == 1
    assert cloud.is_empty()


def test_quota_that_comes_back_late_is_waited_for(cloud):
    quota = "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded. Limit: 8"
    cloud.scenario(
        {"end": {"step": 2, "states": ["SUSPENDED"]}},
        {},
        errors={"tpus queued-resources create": [None, quota, quota]},
    )
    status, printed = cloud.run()
    assert status == 0 and "no quota" in printed, printed
    assert cloud.is_empty()


def start_supervisor(cloud, *flags, **options):
    return subprocess.Popen(
        cloud.run_command(*flags, **options),
        env=cloud.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_supervisor_that_is_killed_is_followed_by_another_with_the_same_code(tmp_path):
    cloud = Cloud(tmp_path, make_checkout(tmp_path / "lm"))
    first = start_supervisor(cloud, "--seconds=0.2", "--steps=20")
    wait_until(cloud.is_training)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()

    (cloud.checkout / "lm" / "main.py").write_text("raise SystemExit('other code')")
    (cloud.checkout / "notes.txt").write_text("mine")
    status, printed = cloud.run("--seconds=0.2", "--steps=20")
    assert status == 0, printed
    assert "goes on with its own code" in printed and "--new_code" in printed
    assert len(cloud.calls("tpu_setup.sh")) == 1
    assert len(cloud.calls("worker start")) == 2  # the second finds it running
    steps = [line["step"] for line in read_jsonl(cloud.run_directory / "metrics.jsonl")]
    assert steps == list(range(1, 21))
    assert cloud.is_empty()

    # A run that has ended is forgotten: the next one has today's code, and all is said of it.
    status, printed = cloud.run("--steps=30")
    assert status == 1 and "other code" in printed
    assert "with changes in lm/main.py" in printed and "not shipped" in printed
    assert "notes.txt" in printed


def test_new_code_takes_the_place_of_a_run_under_way(tmp_path):
    cloud = Cloud(tmp_path, make_checkout(tmp_path / "lm"))
    first = start_supervisor(cloud, "--steps=1000")
    wait_until(cloud.is_training)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    (cloud.checkout / "lm" / "main.py").write_text("print('newer code')")
    status, printed = cloud.run("--steps=1000", own=["--new_code"])
    assert status == 0, printed
    assert "other code is under way: stopped" in printed and "newer code" in printed
    assert cloud.is_empty()


def test_stop_has_the_run_save_and_the_supervisor_end(cloud):
    supervisor = start_supervisor(cloud, "--steps=1000", own=["--keep"])
    wait_until(cloud.is_training)
    status, printed = cloud.do("stop", "pod")
    assert status == 0 and "delete pod" in printed
    assert supervisor.wait(30) == 0
    assert "as it was asked to" in supervisor.stderr.read()

    status, printed = cloud.do("status", "pod")
    assert status == 0 and '"state": "ended"' in printed and "pod: READY" in printed
    status, printed = cloud.do("delete", "pod")
    assert status == 0 and cloud.is_empty(), printed


def test_delete_ends_the_supervisor_too(cloud):
    supervisor = start_supervisor(cloud, "--steps=1000")
    wait_until(cloud.is_training)
    status, printed = cloud.do("delete", "pod")
    assert status == 0, printed
    assert supervisor.wait(30) == 0
    assert cloud.is_empty()
    assert len(cloud.calls("queued-resources create")) == 1


def test_an_interrupted_supervisor_leaves_the_run_and_says_so(cloud):
    supervisor = start_supervisor(cloud, "--steps=1000")
    wait_until(cloud.is_training)
    second, printed = cloud.run("--steps=1000")
    assert second == 1 and "is watching on this machine" in printed
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(30) == 0
    assert "goes on without this command" in supervisor.stderr.read()
    assert not cloud.is_empty()
    status, printed = cloud.run("--steps=999")
    assert status == 1 and "another run is under way" in printed
    assert "stop pod --zone=us-west4-a" in printed
    # Nor does setting up take its code away.
    status, printed = cloud.do("setup", "pod")
    assert status == 1 and "a run is under way" in printed
    assert not cloud.is_empty()
    cloud.do("delete", "pod")


def test_variables_reach_workers_that_are_set_up(cloud):
    cloud.environment["SECRET"] = "hunter2"
    cloud.do("create", "pod", "--type=v5e-8")
    cloud.do("setup", "pod")
    status, printed = cloud.run(own=["--env=SECRET"])
    assert status == 0 and "with hunter2" in printed, printed
    # What another run was sent is nothing to the next one.
    status, printed = cloud.run("--steps=9")
    assert status == 0 and "with None" in printed, printed
    cloud.do("delete", "pod")


def test_variables_are_sent_by_a_file(cloud):
    cloud.environment["SECRET"] = "hunter2"
    status, printed = cloud.run(own=["--env=SECRET"])
    assert status == 0, printed
    assert "with hunter2" in printed
    assert cloud.calls("hunter2") == []
    assert list(cloud.folder.rglob("*environment.json")) == []  # nor left on a disk


def test_tpus_that_were_there_before_are_left(cloud):
    status, printed = cloud.do("create", "pod", "--type=v5e-8")
    assert status == 0 and "setup pod" in printed, printed
    status, printed = cloud.do("setup", "pod")
    assert status == 0, printed
    status, printed = cloud.run()
    assert status == 0 and "still there, and cost" in printed
    assert list(cloud.state()["requests"]) == ["pod"]
    assert len(cloud.calls("tpu_setup.sh")) == 1  # set up by hand
    cloud.do("delete", "pod")
    assert cloud.is_empty()


@pytest.mark.slow
def test_preemptions_end_in_the_weights_of_an_undisturbed_run(
    small, tmp_path, monkeypatch, fast_runs
):
    """Each way to lose TPUs is in the tests above; here it is the run itself that is lost."""
    small.train.length = "16 steps"
    small.checkpoint.every = 2
    run_training(small, tmp_path / "undisturbed")

    # Looks may be far apart: a step waits longer than one.
    (tmp_path / "slow_source.py").write_text(SLOW_SOURCE.replace("0.02", "0.05"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    small.data.source = "slow_source.jsonl"
    cloud = Cloud(tmp_path, make_checkout(tmp_path / "lm", fake_main=False, config=small))
    cloud.poll_seconds = 0.2
    cloud.environment["XLA_FLAGS"] = xla_flags(1)

    gone = ["SUSPENDING", "SUSPENDED"]
    cloud.scenario(
        {"end": {"looks": 1, "states": gone}},  # before anything
        {"end": {"step": 1, "states": gone}},
        {"states": ["PROVISIONING", "SUSPENDED"]},  # never there
        {"end": {"looks": 3, "states": gone}},  # while it starts
        {"end": {"step": 5, "states": []}, "node_end": True},
        {"end": {"step": 9, "states": ["DELETING", "GONE"]}},
        {},
    )
    flags = ["--config=configs/toy.py", "--config.platform=cpu"]
    status, printed = cloud.run(*flags, own=["--spot"], timeout=600)
    assert status == 0, printed
    assert cloud.state()["creations"] == 7
    assert cloud.is_empty()
    assert_same_run(cloud.run_directory, tmp_path / "undisturbed", 16)


# --- bad input ---


@pytest.mark.parametrize(
    "error, said, command",
    [
        (
            "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
            "'TPUV5sPreemptibleLitepod' has been exceeded. Limit: 0 in zone us-west4-a.",
            "no quota",
            "queued-resources list --zone=us-west4-a --project=someone",
        ),
        (
            "ERROR: (gcloud) PERMISSION_DENIED: Cloud TPU API has not been used in project 1 "
            "before or it is disabled. reason: SERVICE_DISABLED",
            "API is off",
            "gcloud services enable tpu.googleapis.com --project=someone",
        ),
        (
            "ERROR: (gcloud) You do not currently have an active account selected.",
            "not logged in",
            "gcloud auth login",
        ),
        (
            "ERROR: (gcloud) PERMISSION_DENIED: Permission denied on 'locations/us-west4-a' (or it "
            "may not exist).",
            "zone us-west4-a doesn't exist",
            "gcloud compute tpus locations list --project=someone",
        ),
        (
            "ERROR: (gcloud) NOT_FOUND: Project 'someone' not found or deleted.",
            "project someone doesn't exist",
            "gcloud projects list",
        ),
        (
            "ERROR: (gcloud) ALREADY_EXISTS: Resource 'pod' already exists",
            "this name is taken",
            "tpu-vm list --zone=us-west4-a",
        ),
        (
            "ERROR: (gcloud) INVALID_ARGUMENT: runtime version v9 not found",
            "no such runtime",
            "tpu-vm versions list --zone=us-west4-a",
        ),
    ],
)
def test_errors_of_gcloud_say_what_to_type_next(cloud, error, said, command):
    cloud.scenario(errors={"tpus queued-resources create": [error]})
    status, printed = cloud.run()
    assert status == 1 and said in printed, printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("next: ") and command in last, printed
    assert cloud.is_empty()


@pytest.mark.parametrize(
    "own, flags, said",
    [
        (["--type=v9-8"], [], "no such TPU; valid: v2-N"),
        (["--type=v4-64"], [], "zone us-west4-a has no v4-64; of its kind it has: v4-16, v4-32"),
        (["--slices=0"], [], "--slices=0"),
        (["--env=LM_NOT_SET"], [], "not set on this machine: LM_NOT_SET"),
        ([], ["--config=configs/none.py"], "no configuration file"),
        ([], ["--config=gs://other/c"], "no configuration file"),
        ([], ["--x=gs://none/data"], "there is no bucket gs://none"),
        ([], ["--x=gs://far/data"], "gs://far lies in europe-west4, the TPUs in us-west4"),
    ],
)
def test_bad_flags_ask_for_nothing(cloud, own, flags, said):
    cloud.scenario(buckets={"gs://far": "EUROPE-WEST4"})
    status, printed = cloud.run(*flags, own=own)
    assert status == 1 and said in printed, printed
    assert cloud.calls("create") == []


def test_buckets_of_several_regions_and_far_ones_that_are_wanted(cloud):
    cloud.scenario(buckets={"gs://far": "EUROPE-WEST4", "gs://us": "US"})
    status, printed = cloud.run("--x=gs://far/a,gs://us/b", own=["--other_region"])
    assert status == 0, printed
    status, printed = cloud.run("--x=gs://us/b", "--steps=9")
    assert status == 0, printed


def test_a_run_directory_on_the_disk_of_a_tpu_vm_is_refused(cloud):
    command = [part for part in cloud.run_command() if part != "--mounted"]
    result = subprocess.run(command, env=cloud.environment, capture_output=True, text=True)
    assert result.returncode == 1 and "goes with it: take gs://BUCKET/RUN" in result.stderr


def test_tpus_of_another_type_are_not_taken(cloud):
    cloud.do("create", "pod", "--type=v4-32")
    status, printed = cloud.run(kind="v5e-8")
    assert status == 1 and "pod exists and is 1 x v4-32" in printed
    cloud.do("delete", "pod")


def test_no_gcloud(cloud):
    (cloud.folder / "bin" / "gcloud").unlink()
    command = [sys.executable, "-m", "lm.tpu", "status", "pod"]
    environment = cloud.environment | {"PATH": str(cloud.folder / "bin")}
    result = subprocess.run(
        command, cwd=cloud.checkout, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1 and "no gcloud on this machine" in result.stderr


@pytest.mark.parametrize("command", ["create", "setup", "run", "status", "logs", "stop", "delete"])
def test_dry_runs_print_commands_and_do_nothing(cloud, command):
    cloud.environment["FAKE_GCLOUD"] = "/nonexistent"  # a call would fail
    arguments = [command, "pod", "--dry_run", "--type=v4-32", "--slices=2"]
    if command == "run":
        arguments.append("--spot")
    line = cloud.command(*arguments)
    if command == "run":
        line += ["--", "--config=configs/c4.py:gpt2", "--workdir=gs://b/run"]
    result = subprocess.run(line, env=cloud.environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = [line for line in result.stdout.splitlines() if line.startswith("gcloud ")]
    assert printed and all("--zone=us-west4-a" in line or "buckets" in line for line in printed)
    if command == "run":
        stages = ("create pod", "tpu_setup.sh", "worker start", "worker status", "delete pod")
        places = [next(i for i, line in enumerate(printed) if stage in line) for stage in stages]
        assert places[:3] == sorted(places[:3]) and places[4] == max(places)
        for text in ("pod-1 --worker=3", "--node-count=2"):
            assert text in result.stdout


# --- the set-up of a machine ---


def test_a_machine_without_a_tpu_is_told_from_one_with(cloud, tmp_path):
    python = VM_PYTHON.replace("lm-check", "never")
    (tmp_path / "vm_bin" / "python3.13").write_text(python)
    environment = cloud.environment | {
        "PATH": f"{tmp_path / 'vm_bin'}:{cloud.environment['PATH']}",
        "JAX_PLATFORMS": "",
    }
    vm = make_checkout(tmp_path / "vm")
    result = subprocess.run(
        ["bash", str(vm / "tpu_setup.sh")], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Is this a TPU VM, with the --runtime of its type" in result.stderr, result.stderr
    assert result.stdout.startswith("versions: python 3.")


# --- a worker ---


@pytest.fixture
def home(tmp_path, monkeypatch, checkout):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(checkout)  # python -m lm.main is the fake one
    return tmp_path


def test_a_worker_holds_one_run(home):
    assert worker.status(0) == {"state": "none", "code": ""}
    arguments = [f"--workdir={home / 'run'}", "--steps=1000"]
    worker.start(arguments)
    worker.start(arguments)  # the same: nothing to do
    assert worker.status(0)["state"] == "running"
    with pytest.raises(ValueError, match="another run is under way"):
        worker.start([*arguments, "--more=1"])

    wait_until(lambda: "going on" in worker.status(0)["log"])
    assert worker.stop(30)
    said = worker.status(0)
    assert said["state"] == "ended" and said["status"] == 0
    assert said["stopped"] and said["asked"]
    assert said["log"].startswith("going on from step 0")
    assert worker.status(said["log_end"])["log"] == ""

    worker.start(arguments)
    wait_until(lambda: "going on" in worker.status(said["log_end"])["log"])
    os.kill(worker.read_state()["holder"], signal.SIGKILL)
    time.sleep(0.1)
    assert worker.status(0)["state"] == "running"  # the run itself is
    assert worker.stop(30)
    assert worker.status(0)["state"] == "died"


@pytest.mark.parametrize(
    "kind, hosts",
    [
        ("v4-8", 1),
        ("v4-32", 4),
        ("v5litepod-8", 1),
        ("v5litepod-16", 4),
        ("v5p-64", 8),
        ("v6e-256", 64),
    ],
)
def test_hosts_of_a_type(kind, hosts):
    assert gcloud_lib.num_hosts(kind) == hosts
