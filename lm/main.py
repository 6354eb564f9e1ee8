"""Trains and evaluates: python -m lm.main --config=configs/pydocs.py --workdir=RUN. Flags only; the run is lm/train.py."""

import difflib
import logging
import os
import runpy
import sys
import traceback

import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from lm import config as config_lib
from lm import startup, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, with its size after a colon: configs/pydocs.py:small", lock_config=True)
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
    config = _CONFIG.value
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


def unknown_key(argv: list[str], known: list[str]) -> str | None:
    """An error message if an override in `argv` names no configuration key, with the nearest ones; None if all are known."""
    for argument in argv:
        key = argument.lstrip("-").split("=")[0].removeprefix("no")  # --noconfig.x is absl's False
        if key.startswith("config.") and (key := key.removeprefix("config.")) not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            return f"no configuration key {key!r}; " + (f"did you mean {', '.join(near)}?" if near else "lm/config.py has them all")
    return None


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, after checks whose errors say what to change."""
    chosen = [argument.split("=", 1)[1] for argument in argv if argument.lstrip("-").startswith("config=")]
    chosen += [argv[i + 1] for i, argument in enumerate(argv[:-1]) if argument in ("--config", "-config")]
    try:
        for path, _, size in (choice.partition(":") for choice in chosen):
            if not os.path.exists(path):
                raise ValueError(f"no configuration file {path!r} (run from the repository's root)")
            config = runpy.run_path(path)["get_config"](*([size] if size else []))
            if error := unknown_key(argv[1:], list(config_lib.flatten(config))):
                raise ValueError(error)
        return flags.FLAGS(argv)
    except (ValueError, TypeError, KeyError, AttributeError, flags.Error) as error:  # what config_flags raises for bad overrides
        sys.exit(f"error: {error}")


def cli() -> None:
    """What `python -m lm.main` runs."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    cli()
