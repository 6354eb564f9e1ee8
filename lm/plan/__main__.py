"""Compiles a configuration for a TPU pod, without one, and prints what it takes.

    python -m lm.plan --config=configs/pods.py:llama2_7b-v5p-4x4x4 --topology=v5p:4x4x4

docs/pods.md says which figures are the compiler's, and which are modelled.
"""

import functools
import json
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from lm import command_line, files
from lm.plan import cards, search
from lm.plan.compile import (
    PROGRAMS,
    DoesNotFit,
    describe,
    libtpu_version,
    memory_limit_gib,
    plan,
)

_CONFIG = command_line.config_flag()
_TOPOLOGY = flags.DEFINE_string("topology", "", "Chips of the pod, such as v5p:4x4x8 or v5e:16x16.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology.")
_PROGRAMS = flags.DEFINE_list("programs", ["train"], f"Of {', '.join(PROGRAMS)}.")
_JSON = flags.DEFINE_boolean("json", False, "Print the report as JSON.")
_SEARCH = flags.DEFINE_boolean(
    "search", False, "Look for faster settings: mesh, remat, microbatches, chunks of the loss."
)
_MINUTES = flags.DEFINE_float("search_minutes", 27.0, "How long to look.")
_OVERRIDES = flags.DEFINE_string(
    "overrides",
    "overrides.txt",
    "Where --search writes the fastest settings, as flags of lm.main.",
)
_CARD = flags.DEFINE_string("card", "", "Write the report to configs/cards/CARD.json.")
_CHECK = flags.DEFINE_boolean(
    "check", False, "Compile the cards named (all by default) again, and fail where figures moved."
)

CACHE = "~/.cache/lm/plan"  # of the search's reports


def log_progress(text: str) -> None:
    """Prints to stderr: stdout is the report's."""
    print(text, file=sys.stderr, flush=True)


def search_settings(
    config: ConfigDict, topology: str, slices: int, *, minutes: float, overrides: Path
) -> str:
    """Looks for faster settings (lm/plan/search.py), and writes the fastest as flags of lm.main.

    Returns:
      The ranking, and what to do with it.
    """
    evaluate = search.cached(
        functools.partial(plan, topology=topology, slices=slices),
        Path(files.expand(CACHE)),
        topology,
        str(slices),
        jax.__version__,
        libtpu_version(),
    )

    devices = describe(topology, slices)
    trials = search.search(
        config,
        len(devices),
        memory_limit_gib(devices),
        evaluate,
        minutes=minutes,
        progress=log_progress,
    )

    # The configuration as given may be the fastest: then there is nothing to change.
    base = search.settings_of(config, len(devices))
    changes = search.overrides(trials[0].settings, base)
    files.write_whole(overrides, "\n".join(changes) + "\n" if changes else "")
    return (
        f"{search.ranking(trials, base)}\n\n"
        f"fastest: {' '.join(changes) or 'the configuration as given'}\n"
        f"written to {overrides}: python -m lm.main --config=... $(cat {overrides})"
    )


def suggest_change(config: ConfigDict, topology: str, slices: int, error: DoesNotFit) -> str:
    """A sentence with a change that makes a train step fit, found by compiling; "" if none was."""
    devices = describe(topology, slices)
    trial = search.nearest_that_fits(
        config,
        len(devices),
        functools.partial(plan, topology=topology, slices=slices),
        needed_gib=error.needed_gib,
        limit_gib=memory_limit_gib(devices),
        progress=log_progress,
    )
    if not trial:
        return ""

    changes = search.overrides(trial.settings, search.settings_of(config, len(devices)))
    memory_gib = trial.report["train"]["memory_gib"]
    return f" The nearest change that fits: {' '.join(changes)} ({memory_gib:.1f} GiB)."


def plan_or_suggest(config: ConfigDict, topology: str, slices: int, programs: list[str]) -> dict:
    """The report of a configuration.

    Raises:
      MemoryError: it doesn't fit; the message ends with a change that does, if there is one.
    """
    try:
        return plan(config, topology, slices, programs=programs, progress=log_progress)
    except DoesNotFit as error:
        suggestion = ""
        if error.needed_gib:
            suggestion = suggest_change(config, topology, slices, error)
        raise MemoryError(f"{error}{suggestion}") from None


@command_line.command
def main(argv: list[str]) -> int:
    # libtpu is there to compile only; what runs here runs on the CPU.
    jax.config.update("jax_platforms", "cpu")
    if _CHECK.value:
        failures = cards.check(argv[1:], log_progress)
        print("\n".join(failures) or "all cards hold")
        return 1 if failures else 0

    config = _CONFIG.value
    if config is None:
        raise ValueError(
            "--config is missing, such as --config=configs/pods.py:llama2_7b-v5p-4x4x4"
        )

    if _SEARCH.value:
        if _JSON.value or _CARD.value or _PROGRAMS.value != ["train"]:
            raise ValueError(
                "--search ranks settings of the train step in a table; --json, --card and "
                "--programs go without it"
            )
        ranking = search_settings(
            config,
            _TOPOLOGY.value,
            _SLICES.value,
            minutes=_MINUTES.value,
            overrides=Path(files.expand(_OVERRIDES.value)),
        )
        print(ranking)
        return 0

    report = plan_or_suggest(config, _TOPOLOGY.value, _SLICES.value, _PROGRAMS.value)
    print(json.dumps(report, indent=1) if _JSON.value else cards.table(report))
    if _CARD.value:
        # As it was given: "path:size".
        config_file = config_flags.get_config_filename(flags.FLAGS["config"])
        path, _, size = config_file.partition(":")
        cards.save(_CARD.value, path, size, report)
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
