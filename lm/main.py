"""Trains and evaluates: python -m lm.main --config=configs/pydocs.py --workdir=RUN. Flags only; the
run is lm/train.py.
"""

import json
import logging
import os
import sys
import traceback

import jax
from absl import app, flags
from etils import epath

from lm import command_line, evaluate, files, startup, stopping, train
from lm.reports import comparison, tables

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
    "With --mode=eval: the checkpoints of these steps (with commas between them; all), not the "
    "newest.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval"],
    "Train, or evaluate the newest checkpoint (or config.init_from).",
)


def table(values: dict) -> str:
    """The end of a run as a table: its evals, and the training loss."""
    rows = [
        (key.removeprefix("eval/"), value)
        for key, value in sorted(values.items())
        if isinstance(value, (int, float))
        and (
            key.startswith("eval/") or key in ("train/loss", "train/seconds", "train/updates_lost")
        )
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {tables.cell(value):>12}" for name, value in rows)


def steps_of(text: str) -> tuple[int, int] | None:
    """--profile_steps. Raises ValueError if it isn't FIRST:LAST."""
    first, colon, last = text.partition(":")
    if text and not (colon and first.isdigit() and last.isdigit() and 0 < int(first) < int(last)):
        raise ValueError(
            f"--profile_steps={text}; wanted FIRST:LAST, such as 10:13 for the steps 10, 11 and 12"
        )
    return (int(first), int(last)) if text else None


def main(argv: list[str]) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax and TFDS tell every move
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected arguments {argv[1:]}; overrides are written --config.KEY=VALUE"
        )
    config = command_line.CONFIG.value
    workdir = epath.Path(os.path.expanduser(_WORKDIR.value))
    try:
        profile_steps = steps_of(_PROFILE.value)
        for flag in (_COMPARE, _STEPS):
            if flag.value and _MODE.value != "eval":
                raise ValueError(f"--{flag.name}={flag.value} needs --mode=eval")
        other = epath.Path(os.path.expanduser(_COMPARE.value))
        if _COMPARE.value and not comparison.newest_predictions(other):
            raise ValueError(
                f"--compare_to={_COMPARE.value} has no predictions/: evaluate it first, with the "
                "same config.evals"
            )
        devices = startup.start(
            config.platform,
            (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
            if _COORDINATOR.value
            else None,
        )
        values = (
            train.train(config, workdir, devices, profile_steps)
            if _MODE.value == "train"
            else evaluate.evaluate(config, workdir, devices, _STEPS.value)
        )
        compared = (
            comparison.compare_runs(workdir, other)
            if _COMPARE.value and jax.process_index() == 0
            else {}
        )
    except stopping.Stopped as stopped:
        logging.warning("%s", stopped)
        return 0
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, train.NonFinite, train.ProcessLost)):
            traceback.print_exc()
        print(f"\nerror: {error}", file=sys.stderr)
        startup.leave(1)
        return 1
    if jax.process_index() == 0:
        print(f"\n{workdir}\n{table(values)}")
    if compared:
        files.write_whole(
            workdir / "comparison.json",
            json.dumps({"to": _COMPARE.value} | compared, indent=2) + "\n",
        )
        print(f"\nbeside {_COMPARE.value}\n{comparison.table(compared)}")
    return 0


def cli() -> None:
    """What `python -m lm.main` runs."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=command_line.parse)


if __name__ == "__main__":
    cli()
