"""What every command shares: --config and its overrides, logging, and errors that say what to
change.
"""

import difflib
import functools
import inspect
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from lm import config as config_lib
from lm import escape, files, stopping
from lm.evals import entries

# Errors whose message is meant for the user; others are shown with their traceback.
EXPLAINED = (ValueError, OSError, MemoryError, stopping.RunFailed)


@functools.cache
def config_flag() -> flags.FlagHolder:
    """Defines --config and --evals, for the commands that have them."""
    flags.DEFINE_string(
        "evals",
        "",
        "Changes of config.evals, with commas between them: -samples takes out that eval, -all all "
        "of them, +sst2 adds a task of lm/evals/tasks/, +PATH.toml one of yours.",
    )
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, with its size or path after a colon: configs/pydocs.py:small",
        lock_config=True,
    )
    # An override is looked for in the configuration as soon as that is read: evals change before.
    parser = flags.FLAGS["config"].parser
    read_file = parser.parse

    def read_file_and_change_evals(path: str) -> ConfigDict:
        config = read_file(path)
        with config.unlocked():
            _change_evals(config, sys.argv)
        return config

    parser.parse = read_file_and_change_evals
    return holder


def _change_evals(config: ConfigDict, argv: list[str]) -> None:
    for changes in _flag_values("evals", argv):
        try:
            entries.change(config.evals, changes)
        except ValueError as error:
            raise ValueError(f"--evals={changes}: {error}") from None


def model_type_flag() -> flags.FlagHolder:
    """Defines --model_type, for the commands that read a run without its --config."""
    return flags.DEFINE_string(
        "model_type",
        "",
        "Module of a model of your own that the run's checkpoint names (its config.model.type).",
    )


def ignore_flag() -> flags.FlagHolder:
    """Defines --ignore, for the commands that read the directory of a Hugging Face checkpoint."""
    return flags.DEFINE_multi_string(
        "ignore", [], "A key of the checkpoint's config.json to read it without; may be repeated."
    )


def base_flag() -> flags.FlagHolder:
    """Defines --base, for the commands that need the whole of a model."""
    return flags.DEFINE_string(
        "base",
        "",
        "Of a run that trains adapters, or a part of a model: where the rest is, a run directory "
        "or that of a Hugging Face checkpoint.",
    )


def command(main: Callable[[list[str]], int | None]) -> Callable[[list[str]], int]:
    """Turns `main(argv)` into a command: it logs to stderr, and errors become messages and exit
    statuses.

    An error ends it with "error: ..." and 1, a run that was asked to stop with 0.
    """

    @functools.wraps(main)
    def run(argv: list[str]) -> int:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_PrintableFormatter("%(levelname).1s %(message)s"))
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
        # Orbax's and TFDS's: every move, and a traceback for each part of a save that failed, which
        # `lm.checkpoint` says in a sentence.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = _report_unraisable
        try:
            return main(argv) or 0
        except stopping.Stopped as stopped:
            logging.warning("%s", stopped)
            return 0
        except app.UsageError:
            raise
        except Exception as error:
            # One without words, such as Python's own MemoryError, explains nothing.
            if not isinstance(error, EXPLAINED) or not str(error):
                print(escape.printable(traceback.format_exc()), file=sys.stderr)
            message = escape.printable(str(error)) or type(error).__name__
            print(f"\nerror: {message}", file=sys.stderr)
            # What waits at the end is jax's, which a command may have done without.
            if "jax" in sys.modules:
                from lm import startup

                startup.leave(1)
            return 1

    return run


def _report_unraisable(unraisable) -> None:
    """Is sys.unraisablehook. Leaves out what TensorStore's threads say of a save that failed: once
    for each array, that Orbax doesn't wait for them any more.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class _PrintableFormatter(logging.Formatter):
    """Messages hold names and texts out of files."""

    def format(self, record: logging.LogRecord) -> str:
        return escape.printable(super().format(record))


def no_arguments(argv: list[str]) -> None:
    """Raises app.UsageError for arguments that are no flags."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected arguments {argv[1:]}; overrides are written --config.KEY=VALUE"
        )


def parse(argv: list[str]) -> list[str]:
    """Parses flags as absl does, after checks whose errors say what to change."""
    argv = [_expanded(argument) for argument in argv]
    try:
        for choice in _flag_values("config", argv):
            config = read_config(choice)
            _change_evals(config, argv)
            if error := unknown_key(argv[1:], list(config_lib.flatten(config))):
                if "source_args." in error:
                    error += (
                        f" These are for {config.data.source}. Files of your own go by "
                        "--config=configs/text.py:PATH or --config=configs/jsonl.py:PATH"
                    )
                raise ValueError(error)
        arguments = flags.FLAGS(argv)
        _unescape_overrides()
        return arguments
    # What config_flags raises for bad overrides.
    except (ValueError, TypeError, KeyError, AttributeError, flags.Error) as error:
        sys.exit(f"error: {error}")


def read_config(choice: str) -> ConfigDict:
    """The configuration that --config names: FILE, or FILE:SIZE.

    Raises:
      ValueError: no such file, or one without sizes.
    """
    path, _, size = choice.partition(":")
    if not os.path.exists(path):
        raise ValueError(f"no configuration file {path!r} (run from the repository's root)")
    get_config = runpy.run_path(path)["get_config"]
    if size and not inspect.signature(get_config).parameters:
        raise ValueError(f"--config={choice}: {path} has no sizes; leave out :{size}")
    return get_config(*([size] if size else []))


def _expanded(argument: str) -> str:
    """The argument --config=FILE with `~` in its path expanded: after "=" shells leave it."""
    flag, equals, path = argument.partition("=")
    return flag + equals + files.expand(path) if flag.lstrip("-") == "config" else argument


def _flag_values(name: str, argv: list[str]) -> list[str]:
    """What a flag is given, in both of its spellings: --config=FILE and --config FILE."""
    values = []
    for argument in argv:
        if argument.lstrip("-").startswith(f"{name}="):
            values.append(argument.split("=", 1)[1])
    for argument, following in zip(argv, argv[1:]):
        if argument in (f"--{name}", f"-{name}"):
            values.append(following)
    return values


# The last names of keys that are texts, in which a newline typed as \n is meant as one.
TEXT_KEYS = (
    "separator",
    "label_prompt",
    "template",
    "templates",
    "target",
    "terminator",
    "after",
    "stop",
)


def _unescape_overrides() -> None:
    """Puts characters in the place of escapes such as \n, which a shell leaves as they are, in
    overrides of texts.
    """
    if "config" not in flags.FLAGS or not flags.FLAGS["config"].value:
        return
    config = flags.FLAGS["config"].value
    for key, value in flags.FLAGS["config"].override_values.items():
        unescaped = _unescaped(value)
        if key.rpartition(".")[2] in TEXT_KEYS and unescaped != value:
            logging.warning("config.%s: %r is taken for %r", key, value, unescaped)
            config.update_from_flattened_dict({key: unescaped})


def _unescaped(value):
    """A text, or a tuple of texts, without escapes; another value as it is."""
    if isinstance(value, tuple):
        return tuple(map(_unescaped, value))
    return files.unescape(value) if isinstance(value, str) else value


def nearest_keys(key: str, known: list[str]) -> list[str]:
    """The three keys at most that are likest to one that doesn't exist.

    First those that it abbreviates (optimizer.lr is optimizer.learning_rate), then those that are
    spelt alike.
    """
    group, _, name = key.rpartition(".")
    abbreviated = []
    for candidate in known:
        other_group, _, other = candidate.rpartition(".")
        initials = "".join(word[:1] for word in other.split("_"))
        if other_group == group and name in (initials, other.replace("_", "")):
            abbreviated.append(candidate)
    alike = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    return list(dict.fromkeys(abbreviated + alike))[:3]


def unknown_key(argv: list[str], known: list[str]) -> str | None:
    """An error message if an override in `argv` names no configuration key, with the nearest ones;
    None if all are known.
    """
    for argument in argv:
        key = argument.lstrip("-").split("=")[0].removeprefix("no")  # --noconfig.x is absl's False
        if not key.startswith("config."):
            continue
        key = key.removeprefix("config.")
        if key not in known:
            nearest = nearest_keys(key, known)
            hint = "lm/config.py has them all (those of lm.prepare: lm/prepare/config.py)"
            if nearest:
                hint = f"did you mean {', '.join(nearest)}?"
            return f"no configuration key {key!r}; {hint}"
    return None
