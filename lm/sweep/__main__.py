"""Plans and runs a sweep: python -m lm.sweep --sweep=experiments/NAME/sweep.py --workdir=RUNS.

docs/sweeps.md says how a sweep file looks, and what happens when something ends before its time.
"""

import logging
import signal
import sys
import time

from absl import app, flags
from etils import epath

from lm import command_line, escape, files, report
from lm.reports import sweeps, tables
from lm.sweep import plan, predict, state, worker

_SWEEP = flags.DEFINE_string(
    "sweep", None, "Sweep file, such as experiments/NAME/sweep.py.", required=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the sweep, with a directory for each run; gs:// too."
)
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Runs at a time on this machine, whose devices are dealt.", lower_bound=1
)
_PLAN = flags.DEFINE_boolean(
    "plan", False, "Print what each run takes, after a short calibration, and start nothing."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "With --plan: chips of a pod to compile for, such as v5e:4x4."
)
_SLICES = flags.DEFINE_integer("slices", 1, "With --topology: slices of it.")
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the command of each run, start nothing.")
_REPORT = flags.DEFINE_boolean("report", False, "Write report.html of what there is so far.")
_ACCEPT = flags.DEFINE_boolean(
    "accept", False, "Go on although the sweep file, the code or its packages have changed."
)
_RETRY = flags.DEFINE_boolean("retry", False, "Take runs again that failed.")


def say(line: str) -> None:
    """Prints what happens to stderr: stdout has tables and commands."""
    text = escape.printable(f"{time.strftime('%H:%M:%S')} {line}")
    print(text, file=sys.stderr, flush=True)


@command_line.command
def main(argv: list[str]) -> int:
    command_line.no_arguments(argv)
    sweep = plan.read(files.expand(_SWEEP.value))

    if _DRY_RUN.value:
        workdir = epath.Path(files.expand(_WORKDIR.value or "RUNS"))
        for run in sweep.runs:
            print(plan.shell(sweep.command(run, workdir)))
        return 0

    if _PLAN.value:
        print_plan(sweep)
        return 0

    if not _WORKDIR.value:
        raise ValueError("--workdir is missing: the directory that is to hold the runs")

    workdir = epath.Path(files.absolute(_WORKDIR.value))
    shares = worker.deal_devices(_WORKERS.value)
    if _REPORT.value:
        runs = plan.stored_runs(workdir)
    else:
        runs = plan.settle(sweep, workdir, accept=_ACCEPT.value)
    for name in state.check_directories(sweep, runs, workdir):
        logging.warning("%s is a run that the sweep doesn't have", workdir / name)

    if _RETRY.value:
        for run in runs:
            (workdir / run.name / sweeps.FAILED).unlink(missing_ok=True)

    is_over = _REPORT.value or work(sweep, workdir, shares)
    runs = plan.stored_runs(workdir)
    states = state.read(sweep, runs, workdir)
    print(escape.printable(table(runs, states)))

    if _REPORT.value:
        path = workdir / "report.html"
        files.write_whole(path, report.sweep_page(workdir))
        print(f"\nwritten to {path}")

    if not is_over:
        print("\nstopped; what runs had done is saved. The same command goes on", file=sys.stderr)
    return int(any(known.status == state.FAILED_STATUS for known in states.values()))


def print_plan(sweep: plan.Sweep) -> None:
    """Prints what each run takes."""
    if _TOPOLOGY.value:
        predictions = predict.predict_pod(sweep, _TOPOLOGY.value, _SLICES.value, say)
    else:
        predictions = predict.predict(sweep, say)
    print(predict.table(sweep.runs, predictions, _WORKERS.value))
    if sweep.halving:
        print("Of the halving this is the first round.")
    if sweep.search:
        print("Runs that the search will propose are not among them.")


def work(sweep: plan.Sweep, workdir: epath.Path, shares: list[worker.Share]) -> bool:
    """Works on the runs until all are done, or until a signal; returns whether all are."""
    workers = worker.Workers(sweep, workdir, shares, say)
    stopping: list[int] = []

    def stop(number, frame):
        del frame
        if stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.append(number)
        say("stopping: runs save and end")
        workers.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return workers.run()


def table(runs, states) -> str:
    """How far each run is, a line each."""
    rows = [("run", "status", "step", "")]
    for run in runs:
        known = states[run.name]
        rows.append((run.name, known.status, str(known.step or ""), known.why[:80]))
    return tables.align(rows)


def cli() -> None:
    """What `python -m lm.sweep` runs."""
    app.run(main, flags_parser=command_line.parse)


if __name__ == "__main__":
    cli()
