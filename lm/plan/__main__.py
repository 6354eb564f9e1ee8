"""Compiles a configuration for a TPU pod, without one: python -m lm.plan
--config=configs/pods.py:llama2_7b-v5p-4x4x4 --topology=v5p:4x4x4

libtpu's compiler runs on any x86-64 Linux machine (pip install 'lm[plan]'). Memory, FLOPs,
collectives and kernels are its facts; times are models of them (lm/hlo.py), given as a range.
"""

import functools
import json
import logging
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict

from lm import command_line, files
from lm.plan import cards, hlo, search
from lm.plan.compile import PROGRAMS, DoesNotFit, describe, libtpu_version, plan


def run_search(
    config: ConfigDict, topology: str, slices: int, *, minutes: float, out: Path, say
) -> str:
    """Looks for faster settings (lm/search.py), writes those of the fastest to `out` as flags, and
    returns the ranking.
    """
    evaluate = search.remembered(
        functools.partial(plan, topology=topology, slices=slices),
        Path("~/.cache/lm/plan").expanduser(),
        topology,
        str(slices),
        jax.__version__,
        libtpu_version(),
    )
    devices = describe(topology, slices)
    tried = search.search(
        config,
        len(devices),
        hlo.CHIPS[devices[0].device_kind].memory / 2**30,
        evaluate,
        minutes=minutes,
        say=say,
    )
    base = search.settings_of(config, len(devices))
    changes = search.overrides(tried[0].settings, base)
    files.write_whole(out, "\n".join(changes) + "\n" if changes else "")
    return (
        f"{search.table(tried, base)}\n\nfastest: "
        f"{' '.join(changes) or 'the configuration as given'}\nwritten to {out}: python -m "
        f"lm.main --config=... $(cat {out})"
    )


def _nearest(config: ConfigDict, topology: str, slices: int, error: DoesNotFit, say) -> str:
    """A change that makes a train step fit, found by compiling; "" if none was."""
    devices = describe(topology, slices)
    limit = hlo.CHIPS[devices[0].device_kind].memory / 2**30
    found = search.nearest_that_fits(
        config,
        len(devices),
        functools.partial(plan, topology=topology, slices=slices),
        needed_gib=error.needed_gib,
        limit_gib=limit,
        say=say,
    )
    if not found:
        return ""
    changes = search.overrides(found.settings, search.settings_of(config, len(devices)))
    return (
        f" The nearest change that fits: {' '.join(changes)} "
        f"({found.report['train']['memory_gib']:.1f} GiB)."
    )


def load_config(path: str, size: str) -> ConfigDict:
    import runpy

    return runpy.run_path(path)["get_config"](*([size] if size else [])).lock()


def main(argv: list[str]) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr, force=True
    )
    jax.config.update("jax_platforms", "cpu")
    say = lambda text: print(text, file=sys.stderr, flush=True)
    try:
        if _CHECK.value:
            failures = cards.check(argv[1:], load_config, say)
            print("\n".join(failures) or "all cards hold")
            return 1 if failures else 0
        config = command_line.CONFIG.value
        if config is None:
            raise ValueError(
                "--config is missing, such as --config=configs/pods.py:llama2_7b-v5p-4x4x4"
            )
        topology = _TOPOLOGY.value
        if _SEARCH.value:
            if _JSON.value or _CARD.value or _PROGRAMS.value != ["train"]:
                raise ValueError(
                    "--search ranks settings of the train step in a table; --json, --card and "
                    "--programs go without it"
                )
            print(
                run_search(
                    config,
                    topology,
                    _SLICES.value,
                    minutes=_MINUTES.value,
                    out=Path(_OVERRIDES.value),
                    say=say,
                )
            )
            return 0
        try:
            report = plan(
                config, topology, _SLICES.value, programs=tuple(_PROGRAMS.value), progress=say
            )
        except DoesNotFit as error:
            raise MemoryError(
                f"{error}{_nearest(config, topology, _SLICES.value, error, say) if error.needed_gib else ''}"  # noqa: E501
            ) from None
    except (ValueError, MemoryError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if _JSON.value else cards.table(report))
    if _CARD.value:
        path, _, size = next(
            a.split("=", 1)[1] for a in sys.argv if a.lstrip("-").startswith("config=")
        ).partition(":")
        files.write_whole(
            cards.CARDS / f"{_CARD.value}.json",
            json.dumps({"config": [path, size]} | report, indent=1) + "\n",
        )
    return 0


if __name__ == "__main__":
    _TOPOLOGY = flags.DEFINE_string(
        "topology", "", "Chips of the pod, such as v5p:4x4x8 or v5e:16x16."
    )
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
        "check",
        False,
        "Compile the cards named (all by default) again, and fail where figures moved.",
    )
    app.run(main, flags_parser=command_line.parse)
