"""Trains and evaluates: python -m lm.main --config=configs/pydocs.py --workdir=RUN.

Here are the flags, and what is printed at the end; the run is lm/train.py.
"""

import json
import os

from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from lm import command_line, escape, files
from lm import config as config_lib
from lm.reports import comparison, tables

_CONFIG = command_line.config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; gs:// too. A run goes on from the checkpoints in it."
)
_PROFILE = flags.DEFINE_string(
    "profile_steps",
    "",
    "FIRST:LAST writes an xprof trace of these steps, LAST not among them, to WORKDIR/profile.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0, where the environment (Cloud TPU, GKE, Slurm) doesn't say.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", 0, "With --coordinator: the number of processes."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", -1, "With --coordinator: which of them this is, from 0."
)
_COMPARE = flags.DEFINE_string(
    "compare_to",
    "",
    "With --mode=eval: another run directory, evaluated on the same examples, to be compared with.",
)
_STEPS = flags.DEFINE_string(
    "steps",
    "",
    "With --mode=eval: steps of the checkpoints to evaluate, such as 100,200, or all; by default "
    "the newest.",
)
_SHOW_PROMPTS = flags.DEFINE_integer(
    "show_prompts",
    0,
    "With --mode=eval: print the first so many prompts of each eval, with what should follow.",
    lower_bound=0,
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "audit", "reference"],
    "Train; evaluate the newest checkpoint (or config.init_from); show what would be trained on, "
    "token by token, in WORKDIR/audit.html; or write what config.init_from says of pairs to "
    "WORKDIR/reference.npz.",
)
_AUDIT_ROWS = flags.DEFINE_integer(
    "audit_rows", 2, "With --mode=audit: rows that are shown.", lower_bound=1
)


def report(values: dict, workdir: epath.Path, mode: str) -> str:
    """What a run prints at its end: the evals, the training loss, and where the rest is."""
    shown = [key for key in ("train/loss", "train/seconds") if key in values]
    training = [f"{key} {tables.cell(values[key])}" for key in shown]
    metrics_file = "metrics.jsonl" if mode == "train" else "eval-*.md"
    rest = f"all metrics are in {workdir / metrics_file}"
    if (workdir / "predictions").exists():
        rest += f", each example's results in {workdir / 'predictions'}"
    parts = [tables.headline(values), ", ".join(training), rest]
    return "\n\n".join(part for part in parts if part)


def parse_profile_steps(text: str) -> tuple[int, int] | None:
    """The steps of --profile_steps. Raises ValueError if it isn't FIRST:LAST."""
    first, colon, last = text.partition(":")
    if text and not (colon and first.isdigit() and last.isdigit() and 0 < int(first) < int(last)):
        raise ValueError(
            f"--profile_steps={text}; wanted FIRST:LAST, such as 10:13 for the steps 10, 11 and 12"
        )
    return (int(first), int(last)) if text else None


def check_planned(config: ConfigDict) -> None:
    """Raises ValueError for another configuration than the sweep that started this run planned."""
    planned = os.environ.get(config_lib.PLANNED)
    if planned and planned != config_lib.content_hash(config):
        raise ValueError(
            "this is not the configuration that the sweep planned: its file, or a file that it "
            "reads, has changed since the sweep was started. Start the sweep again: it lists what "
            "changed"
        )


@command_line.command
def main(argv: list[str]) -> None:
    command_line.no_arguments(argv)
    profile_steps = parse_profile_steps(_PROFILE.value)
    for flag in (_COMPARE, _STEPS, _SHOW_PROMPTS):
        if flag.value and _MODE.value != "eval":
            raise ValueError(f"--{flag.name}={flag.value} needs --mode=eval")
    workdir = epath.Path(files.expand(_WORKDIR.value))
    compare_to = epath.Path(files.expand(_COMPARE.value)) if _COMPARE.value else None
    if compare_to and not comparison.newest_predictions(compare_to):
        raise ValueError(
            f"--compare_to={_COMPARE.value} has no predictions/: evaluate it first, with the "
            "same config.evals"
        )

    config = _CONFIG.value
    check_planned(config)

    # Seconds of imports, which neither --help nor a mistake in the flags waits for.
    import jax

    from lm import audit, evaluate, reference, startup, train

    processes = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    devices = startup.start(config.platform, processes if _COORDINATOR.value else None)
    if _MODE.value == "audit":
        print(audit.audit(config, workdir, devices, _AUDIT_ROWS.value))
        return
    if _MODE.value == "reference":
        print(reference.write(config, workdir, devices))
        return
    if _MODE.value == "train":
        values = train.train(config, workdir, devices, profile_steps)
    else:
        values = evaluate.evaluate(config, workdir, devices, _STEPS.value, _SHOW_PROMPTS.value)

    if jax.process_index() == 0:
        print(f"\n{escape.printable(report(values, workdir, _MODE.value))}")
        if compare_to:
            compare(workdir, compare_to)


def compare(workdir: epath.Path, other: epath.Path) -> None:
    """Writes and prints the comparison of two runs, example by example."""
    compared = comparison.compare_runs(workdir, other)
    content = json.dumps({"to": _COMPARE.value} | compared, indent=2) + "\n"
    files.write_whole(workdir / "comparison.json", content)
    print(f"\nbeside {_COMPARE.value}\n{escape.printable(comparison.table(compared))}")


def cli() -> None:
    """What `python -m lm.main` runs."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=command_line.parse)


if __name__ == "__main__":
    cli()
