"""TPUs of Google Cloud, from nothing to a run: ./tpu_setup.sh COMMAND NAME --zone=ZONE ...

It runs on one's own machine and needs nothing but Python, git and gcloud. docs/tpu.md goes through
it.
"""

import argparse
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

from lm.tpu import gcloud as gcloud_lib
from lm.tpu import rehearsal, supervisor
from lm.tpu import session as session_lib
from lm.tpu.gcloud import Error, Gcloud, Order

COMMANDS = {
    "create": "ask for TPUs, and wait until they are there",
    "setup": "install this checkout on all workers, and check their devices",
    "run": "bring a run to its end: create, set up, start, watch, and again after a preemption",
    "status": "what there is, and how the run on it stands",
    "logs": "follow the log of a worker",
    "tunnel": "TensorBoard and xprof of a run directory, at http://localhost:PORT",
    "stop": "have the run save and end",
    "delete": "delete the TPUs",
}
EXAMPLE = """
./tpu_setup.sh run NAME --type=v5litepod-8 --zone=ZONE --spot -- \\
    --config=configs/c4.py:gpt2 --workdir=gs://BUCKET/RUN
"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and those behind " -- ", which are lm.main's."""
    run_arguments = []
    if "--" in argv:
        position = argv.index("--")
        argv, run_arguments = argv[:position], argv[position + 1 :]

    parser = argparse.ArgumentParser(
        prog="./tpu_setup.sh",
        description="Without arguments it installs lm on the TPU VM that it runs on.",
        epilog="commands:\n"
        + "\n".join(f"  {name:8} {what}" for name, what in COMMANDS.items())
        + f"\n\nexample:\n{EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("name", metavar="NAME", help="of the TPUs; of slices: NAME-0, NAME-1, ...")
    parser.add_argument("--zone", default="", help="the default is gcloud's compute/zone")
    parser.add_argument("--project", default="", help="the default is gcloud's")
    parser.add_argument("--type", default="", help="such as v5litepod-8 (or v5e-8), v4-32, v5p-64")
    parser.add_argument("--slices", type=int, default=1, help="how many of that type")
    parser.add_argument("--spot", action="store_true", help="cheaper, and may be taken away")
    parser.add_argument("--reserved", action="store_true", help="from your reservation")
    parser.add_argument("--runtime", default="", help="another image than the type's own")
    parser.add_argument("--env", default="", help="run: names of variables to send: A,B")
    parser.add_argument("--keep", action="store_true", help="run: leave the TPUs at the end")
    parser.add_argument("--new_code", action="store_true", help="run: go on with this code")
    parser.add_argument("--mounted", action="store_true", help="run: --workdir outlives the TPUs")
    parser.add_argument("--other_region", action="store_true", help="run: buckets may be far")
    parser.add_argument("--poll_seconds", type=float, default=30.0, help="between two looks")
    parser.add_argument("--worker", type=int, default=0, help="logs: which one")
    parser.add_argument("--logdir", default="", help="tunnel: the run directory")
    parser.add_argument("--port", type=int, default=6006, help="tunnel: on this machine")
    parser.add_argument("--dry_run", action="store_true", help="print each command of gcloud")
    flags = parser.parse_args(argv)
    if run_arguments and flags.command != "run":
        parser.error(f"{flags.command} takes no flags of a run: {shlex.join(run_arguments)}")
    return flags, run_arguments


# --- checks before anything is asked for ---


def make_order(flags: argparse.Namespace) -> Order:
    """What the flags ask for. Raises Error for a name or a type that can't be."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", flags.name):
        raise Error(f"{flags.name!r}: a name has lower-case letters, digits and -, 40 at most")
    kind = re.sub(r"^v5e-", "v5litepod-", flags.type)
    if flags.command in ("create", "run"):
        if not kind:
            raise Error("--type is missing, such as --type=v5litepod-8", "./tpu_setup.sh --help")
        gcloud_lib.generation(kind)
    if flags.slices < 1:
        raise Error(f"--slices={flags.slices}; wanted 1 or more")
    return Order(flags.name, kind, flags.slices, flags.spot, flags.runtime, flags.reserved)


def check_run(arguments: list[str], *, mounted: bool) -> None:
    """Raises Error for flags of a run that can't outlive a preemption."""
    names = {}
    for argument in arguments:
        flag, _, value = argument.lstrip("-").partition("=")
        names[flag] = value

    for needed in ("config", "workdir"):
        if not names.get(needed):
            raise Error(f"the run has no --{needed}=...; its flags stand behind --:{EXAMPLE}")
    if not names["workdir"].startswith("gs://") and not mounted:
        raise Error(
            f"--workdir={names['workdir']} lies on the TPU VM's own disk, which goes with it: take "
            "gs://BUCKET/RUN; --mounted says that it outlives the TPU VM"
        )

    path = session_lib.ROOT / names["config"].partition(":")[0]
    if not path.exists():
        raise Error(f"no configuration file {path} in this checkout")


def check_buckets(gcloud: Gcloud, arguments: list[str], *, other_region: bool) -> None:
    """Raises Error for a bucket that isn't there, or lies in another region than the TPUs."""
    region = gcloud.zone.rpartition("-")[0]
    for bucket in sorted(set(re.findall(r"gs://[^/\s=,]+", " ".join(arguments)))):
        found = gcloud.bucket(bucket)
        if found is None:
            raise Error(
                f"there is no bucket {bucket}, or this account may not see it",
                f"gcloud storage buckets create {bucket} --location={region}",
            )

        location = str(found.get("location", "")).lower()
        # us, eu and asia are several regions together.
        is_near = location == region or region.startswith({"eu": "europe"}.get(location, location))
        if not is_near and not other_region:
            raise Error(
                f"{bucket} lies in {location}, the TPUs in {region}: reading it would be slow and "
                "cost. Take a bucket there; --other_region takes this one",
                f"gcloud storage buckets create {bucket}-{region} --location={region}",
            )


def check_type(gcloud: Gcloud, order: Order) -> None:
    """Raises Error for a type that the zone doesn't have."""
    types = gcloud.accelerator_types()
    if order.type not in types:
        near = [kind for kind in types if kind.split("-")[0] == order.type.split("-")[0]]
        raise Error(
            f"zone {gcloud.zone} has no {order.type}; of its kind it has: "
            f"{', '.join(near) or 'none'}",
            "gcloud compute tpus locations list",
        )


def check_same(gcloud: Gcloud, order: Order) -> None:
    """Raises Error where TPUs of this name are of another type."""
    found = order.as_requested(gcloud.queued_resource(order.name))
    if (found.type, found.slices) != (order.type, order.slices):
        raise Error(
            f"{order.name} exists and is {found.slices} x {found.type}, not {order.slices} x "
            f"{order.type}: delete it, or take another name",
            supervisor.hint("delete", gcloud, order.name),
        )


# --- commands ---


def choose_code(session: session_lib.Session, *, new: bool) -> session_lib.Code:
    """The code that a run goes on with, or begins with. Says what is shipped."""
    code, unknown = session_lib.pack(session.directory)
    kept = session.code()
    if kept and kept.tree != code.tree and not new:
        supervisor.say(f"the run goes on with its own code, {kept}; --new_code ships this checkout")
        return kept

    supervisor.say(f"shipping {code}")
    if unknown:
        names = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        supervisor.say(f"not shipped, since git doesn't know them (git add): {names}")
    session.begin(code)
    return code


def write_environment(names: str, path: Path) -> str:
    """Writes variables of this machine for the run; returns the file, "" if there are none."""
    if not names:
        return ""
    missing = [name for name in names.split(",") if name not in os.environ]
    if missing:
        raise Error(f"--env={names}: not set on this machine: {', '.join(missing)}")

    values = {name: os.environ[name] for name in names.split(",")}
    path.touch(mode=0o600)
    path.write_text(json.dumps(values))
    return str(path)


def run(flags, arguments: list[str], order: Order, gcloud: Gcloud, session) -> None:
    """Supervises a run to its end."""
    check_run(arguments, mounted=flags.mounted)
    check_same(gcloud, order)
    check_type(gcloud, order)
    check_buckets(gcloud, arguments, other_region=flags.other_region)
    session.lock()
    choose_code(session, new=flags.new_code)

    settings = supervisor.Settings(
        arguments=arguments,
        poll_seconds=0.0 if flags.dry_run else flags.poll_seconds,
        environment_file=write_environment(flags.env, session.environment_file),
        keep=flags.keep,
    )

    # Also where the shell ignores the one, or sends the other.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        supervisor.Supervisor(gcloud, order, session, settings).run()
    except KeyboardInterrupt:
        supervisor.say(
            "what was started goes on without this command, and costs; the same command watches it "
            f"again.\nnext: {supervisor.hint('stop', gcloud, order.name)}, then "
            f"{supervisor.hint('delete', gcloud, order.name)}"
        )
    finally:
        session.environment_file.unlink(missing_ok=True)


def create(order: Order, gcloud: Gcloud, poll_seconds: float) -> None:
    """Asks for TPUs, and waits until they are there."""
    check_type(gcloud, order)
    hint_to_delete = supervisor.hint("delete", gcloud, order.name)
    try:
        gcloud.create(order)
    except gcloud_lib.Passing as error:
        raise Error(
            f"{error}\nIt may have been asked for all the same",
            supervisor.hint("status", gcloud, order.name),
        ) from None

    said = ""
    while True:
        request = gcloud.queued_resource(order.name)
        state = supervisor.state_of(request)
        if state in supervisor.GONE:
            raise Error(f"{order.name}: {state}{supervisor.reason(request)}", hint_to_delete)
        if state == "ACTIVE":
            states = [(gcloud.node(name) or {}).get("state", "missing") for name in order.nodes()]
            state = ", ".join(states)
            if set(states) == {"READY"}:
                break
            if set(states) & set(supervisor.NODE_GONE):
                raise Error(f"{order.name}: {state}", hint_to_delete)
        if state != said:
            supervisor.say(f"{order.name}: {state}")
            said = state
        time.sleep(poll_seconds)

    supervisor.say(f"{order.name} is there, and costs")
    print(f"next: {supervisor.hint('setup', gcloud, order.name)}")


def setup(order: Order, gcloud: Gcloud, session) -> None:
    """Sets up TPUs that are there."""
    session.lock()
    workers = supervisor.workers_of(gcloud, order.nodes())

    def is_running(node: str, worker: int) -> bool:
        result = gcloud.ssh(node, worker, f"{supervisor.ON_WORKER} status")
        return '"state": "running"' in result.stdout

    if any(gcloud_lib.on_all(is_running, workers).values()):
        raise Error(
            "a run is under way on these TPUs, whose code would be taken away",
            supervisor.hint("stop", gcloud, order.name),
        )

    code = choose_code(session, new=True)
    try:
        supervisor.set_up(gcloud, workers, code)
    except supervisor.SetupFailed as error:
        raise Error(
            f"{error}\nNothing runs on the workers, but the TPUs are still there, and cost",
            supervisor.hint("delete", gcloud, order.name),
        ) from None
    supervisor.say("set up")


def status(request: dict | None, order: Order, gcloud: Gcloud) -> None:
    """Prints what there is, and how the run on each worker stands."""
    if request is None:
        print(f"{order.name}: nothing in {gcloud.zone}")
        return

    print(f"{order.name}: {supervisor.state_of(request)}")
    ready = []
    for name in order.nodes():
        node = gcloud.node(name) or {}
        print(f"{name}: {node.get('state', 'missing')}, health {node.get('health', 'unknown')}")
        if node.get("state") == "READY":
            ready.append(name)
    if not ready:
        return

    def ask(node: str, worker: int) -> str:
        result = gcloud.ssh(node, worker, f"{supervisor.ON_WORKER} status")
        return result.stdout.strip() or f"can't say: {result.stderr.strip()[-200:]}"

    said = gcloud_lib.on_all(ask, supervisor.workers_of(gcloud, ready))
    for (node, worker), text in said.items():
        print(f"worker {worker} of {node}: {text}")


def logs(flags, order: Order, gcloud: Gcloud) -> int:
    """Follows the log of a worker on this terminal."""
    command = "tail -n 100 -F lm-run/log"
    return gcloud.connect(gcloud.ssh_arguments(order.nodes()[0], flags.worker, command))


def tunnel(flags, order: Order, gcloud: Gcloud) -> int:
    """Serves TensorBoard, with xprof, on worker 0, and brings it to this machine."""
    if not flags.logdir:
        raise Error("--logdir is missing: the run directory, such as --logdir=gs://BUCKET/RUN")
    # Packages of its own, beside those of a run that is under way; and one at a time, since an
    # interrupt doesn't reach it.
    command = (
        "pkill -f '[t]ensorboard --logdir'; cd lm && "
        "{ [ -d .venv-tensorboard ] || .venv/bin/python -m venv .venv-tensorboard; } && "
        ".venv-tensorboard/bin/pip install -q -c constraints.txt gcsfs tensorboard xprof && "
        f".venv-tensorboard/bin/tensorboard --logdir={shlex.quote(flags.logdir)} --port=6006"
    )

    print(f"TensorBoard will be at http://localhost:{flags.port}; end it with ctrl-C", flush=True)
    arguments = gcloud.ssh_arguments(order.nodes()[0], 0, command)
    return gcloud.connect([*arguments, "--", "-L", f"{flags.port}:localhost:6006"])


def stop(order: Order, gcloud: Gcloud) -> None:
    """Has the run save and end on all workers."""
    workers = supervisor.workers_of(gcloud, order.nodes())
    running = supervisor.stop_run(gcloud, workers)
    if running:
        raise Error(
            f"the run may still go on, on worker {', '.join(running)}",
            supervisor.hint("status", gcloud, order.name),
        )

    print("stopped; what it saved is in its run directory. The TPUs are still there, and cost")
    print(f"next: {supervisor.hint('delete', gcloud, order.name)}")


def delete(order: Order, gcloud: Gcloud, session, poll_seconds: float) -> None:
    """Deletes the TPUs, and waits until they are gone."""
    session.end()  # a supervisor on this machine ends then
    supervisor.delete(gcloud, order.name, poll_seconds)
    # It may have been asking for TPUs just now.
    supervisor.say("waiting for ./tpu_setup.sh run on this machine, if there is one")
    session.lock(wait=True)
    supervisor.delete(gcloud, order.name, poll_seconds)

    for node in order.nodes():
        if gcloud.node(node) is not None:
            supervisor.say(f"{node} is left over: it is deleted")
            gcloud.delete_node(node)
    supervisor.say(f"{order.name}: nothing is left in {gcloud.zone}")


def make_gcloud(flags: argparse.Namespace, order: Order) -> Gcloud:
    """gcloud in the zone and project of the flags, or those that it is set to."""
    zone, project = flags.zone, flags.project
    if not flags.dry_run:
        zone = zone or gcloud_lib.configured("compute/zone")
        project = project or gcloud_lib.configured("project")
    if not zone:
        raise Error("--zone is missing", "gcloud compute tpus locations list")
    if not flags.dry_run:
        return Gcloud(zone, project, pause=min(5.0, flags.poll_seconds))
    return rehearsal.Rehearsal(zone, project, order, exists=flags.command not in ("create", "run"))


def make_session(flags: argparse.Namespace, order: Order, gcloud: Gcloud) -> session_lib.Session:
    """What this machine keeps of the run, in a folder of its own."""
    if flags.dry_run:
        return session_lib.Session(Path(tempfile.mkdtemp()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return session_lib.Session(
        cache / "lm" / "tpu" / f"{gcloud.project}-{gcloud.zone}-{order.name}"
    )


def do(flags, arguments: list[str], order: Order, gcloud: Gcloud, session) -> int:
    """Does what the command line asks for; returns the exit status."""
    if flags.command == "run":
        run(flags, arguments, order, gcloud, session)
        return 0
    poll_seconds = 0.0 if flags.dry_run else flags.poll_seconds
    if flags.command == "create":
        create(order, gcloud, poll_seconds)
        return 0

    # What there is needn't be said again.
    request = gcloud.queued_resource(order.name)
    order = order.as_requested(request)
    if flags.command == "setup":
        setup(order, gcloud, session)
    elif flags.command == "status":
        status(request, order, gcloud)
    elif flags.command == "logs":
        return logs(flags, order, gcloud)
    elif flags.command == "tunnel":
        return tunnel(flags, order, gcloud)
    elif flags.command == "stop":
        stop(order, gcloud)
    else:
        delete(order, gcloud, session, poll_seconds)
    return 0


def main(argv: list[str]) -> int:
    flags, arguments = parse(argv)
    try:
        order = make_order(flags)
        gcloud = make_gcloud(flags, order)
        session = make_session(flags, order, gcloud)
        return do(flags, arguments, order, gcloud, session)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; TPUs that were asked for stay, and cost", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
