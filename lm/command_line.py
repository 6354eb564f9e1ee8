"""The flags that every command shares: --config, its overrides, and errors that say what to
change.
"""

import difflib
import os
import runpy
import sys

from absl import flags
from ml_collections import config_flags

from lm import config as config_lib

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, with its size after a colon: configs/pydocs.py:small",
    lock_config=True,
)


def unknown_key(argv: list[str], known: list[str]) -> str | None:
    """An error message if an override in `argv` names no configuration key, with the nearest ones;
    None if all are known.
    """
    for argument in argv:
        key = argument.lstrip("-").split("=")[0].removeprefix("no")  # --noconfig.x is absl's False
        if key.startswith("config.") and (key := key.removeprefix("config.")) not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            return f"no configuration key {key!r}; " + (
                f"did you mean {', '.join(near)}?" if near else "lm/config.py has them all"
            )
    return None


def parse(argv: list[str]) -> list[str]:
    """absl's parser, after checks whose errors say what to change."""
    chosen = [
        argument.split("=", 1)[1] for argument in argv if argument.lstrip("-").startswith("config=")
    ]
    chosen += [
        argv[i + 1] for i, argument in enumerate(argv[:-1]) if argument in ("--config", "-config")
    ]
    try:
        for path, _, size in (choice.partition(":") for choice in chosen):
            if not os.path.exists(path):
                raise ValueError(f"no configuration file {path!r} (run from the repository's root)")
            config = runpy.run_path(path)["get_config"](*([size] if size else []))
            if error := unknown_key(argv[1:], list(config_lib.flatten(config))):
                raise ValueError(error)
        return flags.FLAGS(argv)
    # what config_flags raises for bad overrides
    except (ValueError, TypeError, KeyError, AttributeError, flags.Error) as error:
        sys.exit(f"error: {error}")
