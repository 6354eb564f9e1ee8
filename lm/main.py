"""Trains and evaluates: python -m lm.main --config=configs/pydocs.py --workdir=RUN. Flags only; the run is lm/train.py."""

import logging
import os
import sys
import traceback

import jax
from absl import app, flags
from etils import epath

from lm import command_line, startup, train

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; gs:// too. A run goes on from the checkpoints in it.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate the newest checkpoint (or config.init_from).")


def table(values: dict) -> str:
    """The end of a run as a table: its evals, and the training loss."""
    rows = [(key.removeprefix("eval/"), value) for key, value in sorted(values.items())
            if isinstance(value, (int, float)) and (key.startswith("eval/") or key in ("train/loss", "train/seconds", "train/updates_lost"))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value:>12,}" if isinstance(value, int) else f"  {name:<{width}}  {value:>12.4f}" for name, value in rows)


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax and TFDS tell every move
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides are written --config.KEY=VALUE")
    config = command_line.CONFIG.value
    workdir = epath.Path(os.path.expanduser(_WORKDIR.value))
    try:
        devices = startup.start(config.platform)
        run = train.train if _MODE.value == "train" else train.evaluate
        values = run(config, workdir, devices)
    except train.Stopped as stopped:
        logging.warning("%s", stopped)
        return 0
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, train.NonFinite, train.Lost)):
            traceback.print_exc()
        print(f"\nerror: {error}", file=sys.stderr)
        startup.leave(1)
        return 1
    if jax.process_index() == 0:
        print(f"\n{workdir}\n{table(values)}")
    return 0


def cli() -> None:
    """What `python -m lm.main` runs."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=command_line.parse)


if __name__ == "__main__":
    cli()
