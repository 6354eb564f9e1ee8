"""What a sweep consists of: its file, its runs with their names, and sweep.json, which is written
before anything starts.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

import lm
from lm import claim, command_line, files
from lm import config as config_lib
from lm.reports import sweeps
from lm.sweep.halving import Halving
from lm.sweep.search import Search

MAX_NAME = 120  # characters of a run's name, without the hash
MAX_VALUE = 40  # of a value in it
MAX_DIFF = 1_000_000  # bytes of uncommitted changes that are kept
PATIENCE_SECONDS = 30.0  # for another process that writes the plan
# What may move a run's numbers.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-collections")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep.

    Attributes:
      name: of its directory: what it changes, and the beginning of `hash`.
      changes: key -> value, one for each key that it changes.
      hash: of its full configuration.
    """

    name: str
    changes: Mapping[str, Any]
    hash: str


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked.

    Attributes:
      path: of the sweep file.
      choice: what --config is given: the sweep file, or another configuration.
      base: that configuration.
      halving: how the best runs are made longer; None: all are as long as they say.
      search: what proposes further runs; None: `runs` are all there are.
    """

    path: str
    choice: str
    base: ConfigDict
    runs: Sequence[PlannedRun]
    halving: Halving | None
    search: Search | None

    def config(self, run: PlannedRun, length: str = "") -> ConfigDict:
        """The full configuration of a run; `length` is another config.train.length."""
        return changed(self.base, _lengthened(run, length))

    def command(self, run: PlannedRun, workdir: epath.Path, length: str = "") -> list[str]:
        """The command that trains a run, as arguments; `length` is another config.train.length."""
        flags = [f"--config={self.choice}", f"--workdir={workdir / run.name}"]
        for key, value in _lengthened(run, length).items():
            flags.append(f"--config.{key}={_flag_value(key, value)}")
        return [sys.executable, "-m", "lm.main", *flags]


def _lengthened(run: PlannedRun, length: str) -> dict[str, Any]:
    return dict(run.changes) | ({"train.length": length} if length else {})


def shell(command: Sequence[str]) -> str:
    """A command as one types it."""
    return shlex.join(["python", *command[1:]])


# --- the sweep file ---


def read(path: str) -> Sweep:
    """Reads a sweep file: Python beside the configurations.

    It has get_sweep(), which gives a list of points (lm/sweep/axes.py), and get_config(), or a
    CONFIG such as "configs/pydocs.py:micro". get_halving() and get_search() are optional.

    Raises:
      ValueError: a file that lacks something, a key that no configuration has, a value that it
        can't have, or two equal runs.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"--sweep={path}: no such file; wanted one such as experiments/NAME/sweep.py"
        )

    module = runpy.run_path(path)
    choice = module.get("CONFIG", path)
    if choice == path and "get_config" not in module:
        raise ValueError(f"{path} has neither get_config() nor CONFIG, the path of a configuration")

    base = command_line.read_config(choice)
    halving = module["get_halving"]() if "get_halving" in module else None
    search = module["get_search"]() if "get_search" in module else None
    if halving and search:
        raise ValueError(f"{path} has get_halving() and get_search(); a sweep takes one of them")

    if "get_sweep" not in module and not search:
        raise ValueError(
            f"{path} has no get_sweep(); wanted a function that gives a list of points"
        )

    points = module["get_sweep"]() if "get_sweep" in module else []
    if not points and not search:
        raise ValueError(f"{path}: get_sweep() gives no points")

    if search:
        search.check(base)
    if halving:
        halving.check(base)
        if any("train.length" in config_lib.flatten(point) for point in points):
            raise ValueError(f"{path}: get_halving() decides train.length; no point may")
        points = [{"train.length": halving.lengths[0]} | point for point in points]

    runs = plan_runs(base, points, where=path)
    return Sweep(path, choice, base, runs, halving, search)


def plan_runs(base: ConfigDict, points: Sequence[Mapping], where: str) -> list[PlannedRun]:
    """The runs of these points.

    Raises:
      ValueError: see `read`; `where` is what messages call the sweep.
    """
    all_changes: list[dict] = []
    hashes: dict[str, dict] = {}
    for number, point in enumerate(points):
        if not isinstance(point, Mapping):
            raise ValueError(f"{where}: point {number} is {point!r}; wanted {{key: value}}")
        asked = config_lib.flatten(point)
        config = changed(base, asked)
        try:
            config_lib.check(config)
        except ValueError as error:
            raise ValueError(f"{where}: the run of {asked}: {error}") from None

        flat = config_lib.flatten(config)
        changes = {key: flat[key] for key in asked}
        full_hash = config_lib.content_hash(config)
        if full_hash in hashes:
            raise ValueError(
                f"{where}: two runs have one configuration: {hashes[full_hash]} and {changes}. A "
                "run again with other random numbers is another seed"
            )
        hashes[full_hash] = changes
        all_changes.append(changes)

    telling = _telling_keys(all_changes)
    runs = []
    for full_hash, changes in hashes.items():
        shown = {key: value for key, value in changes.items() if key in telling} or changes
        short = _short_keys({*telling, *shown})
        runs.append(PlannedRun(_name(shown, short, full_hash), changes, full_hash))
    return runs


def changed(base: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A configuration with some of its values changed.

    Raises:
      ValueError: a key that it doesn't have, or a value of another type.
    """
    config = base.copy_and_resolve_references()
    old_values = config_lib.flatten(config)
    for key, value in changes.items():
        if error := command_line.unknown_key([f"--config.{key}"], list(old_values)):
            raise ValueError(f"the sweep changes what is no key: {error}")

        value = value.item() if hasattr(value, "item") else value  # numpy's numbers
        value = tuple(value) if isinstance(value, list) else value
        try:
            config.update_from_flattened_dict({key: value})
        except TypeError as error:
            raise ValueError(
                f"the sweep sets {key} to {value!r}, which is {old_values[key]!r} in the "
                f"configuration: {error}"
            ) from None
    return config.lock()


def _telling_keys(all_changes: Sequence[Mapping]) -> list[str]:
    """The keys that tell runs apart, without those that follow from keys before them."""
    keys = dict.fromkeys(key for changes in all_changes for key in changes)
    telling: list[str] = []
    for key in keys:
        values: dict[str, set[str]] = {}
        for changes in all_changes:
            others = repr([changes.get(other) for other in telling])
            values.setdefault(others, set()).add(repr(changes.get(key)))
        if any(len(different) > 1 for different in values.values()):
            telling.append(key)
    return telling


def _short_keys(keys: set[str]) -> dict[str, str]:
    """Key -> its last parts, as many as tell it from the other keys."""
    short = {}
    for key in keys:
        parts = key.split(".")
        for number in range(1, len(parts) + 1):
            ending = ".".join(parts[-number:])
            alike = [other for other in keys if f".{other}".endswith(f".{ending}")]
            if len(alike) == 1:
                break
        short[key] = ending
    return short


def _name(changes: Mapping[str, Any], short: Mapping[str, str], full_hash: str) -> str:
    """A name that people can read, and every file system and bucket can hold."""
    parts = []
    for key, value in changes.items():
        parts.append(f"{_safe(short[key])}={_safe(_shown(value))[:MAX_VALUE]}")
    readable = "-".join(parts)[:MAX_NAME].strip("-.") or "run"
    return f"{readable}-{full_hash[:8]}"


def _shown(value) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _safe(text: str) -> str:
    """The text with other characters than letters, digits and a few marks replaced."""
    return re.sub(r"[^A-Za-z0-9._+=]+", "_", text)


def _flag_value(key: str, value) -> str:
    """A value as a flag of lm.main takes it."""
    # A backslash begins an escape in texts.
    is_text = key.rpartition(".")[2] in command_line.TEXT_KEYS
    if isinstance(value, str):
        return value.replace("\\", "\\\\") if is_text else value
    if isinstance(value, (list, tuple)):
        items = []
        for item in value:
            doubled = is_text and isinstance(item, str)
            items.append(item.replace("\\", "\\\\") if doubled else item)
        return repr(tuple(items))
    return repr(value)


# --- sweep.json ---


def describe(sweep: Sweep) -> dict[str, Any]:
    """What sweep.json says of a sweep, and of the code that runs it."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    diff = _git("diff", "HEAD")

    axes = dict.fromkeys(key for run in sweep.runs for key in run.changes)
    return {
        "sweep": _place(sweep.path),
        "written": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "commit": _git("rev-parse", "HEAD").strip(),
        "diff": diff[:MAX_DIFF],
        "code": code_hash(),
        "versions": versions | {"python": sys.version.split()[0]},
        "config": sweep.base.to_dict(),
        "axes": list(axes),
        "halving": dataclasses.asdict(sweep.halving) if sweep.halving else None,
        "search": sweep.search.describe() if sweep.search else None,
        "runs": [dataclasses.asdict(run) for run in sweep.runs],
    }


def code_hash() -> str:
    """The hash of the package's own files."""
    code = Path(lm.__file__).parent
    sources = sorted(path for path in code.rglob("*") if path.suffix in (".py", ".toml"))
    return files.short_hash_of_parts(path.read_bytes() for path in sources)


def _place(path: str) -> str:
    """The folder and the name of a sweep file, by which it is known on any machine."""
    return "/".join(Path(path).resolve().parts[-2:])


def _git(*arguments: str) -> str:
    """What git says of the code; "" where there is no repository."""
    folder = Path(lm.__file__).parents[1]
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def settle(sweep: Sweep, workdir: epath.Path, *, accept: bool) -> list[PlannedRun]:
    """Writes sweep.json if there is none, and holds the sweep against it otherwise.

    Args:
      accept: a plan, code or versions that have changed replace what sweep.json says.

    Returns:
      The runs, those that were there before under their old names.

    Raises:
      ValueError: the directory is another sweep's, or what changed isn't accepted; the message
        lists it.
    """
    new = describe(sweep)
    path = workdir / sweeps.PLAN
    if not path.exists() or differences(read_plan(workdir), new):
        with claimed(workdir):
            # Another worker may have written it meanwhile.
            old = read_plan(workdir) if path.exists() else None
            if old:
                _keep_runs(old, new)
            changes = _accepted_changes(old, new, workdir, accept=accept) if old else []
            if old and changes:
                logging.warning("accepted: %s", "; ".join(changes))
                _add_history(old, new)
            if changes or not old:
                files.write_whole(path, json.dumps(new, indent=1) + "\n")
    return stored_runs(workdir)


def _accepted_changes(
    old: Mapping, new: Mapping, workdir: epath.Path, *, accept: bool
) -> list[str]:
    """What the new description changes. Raises ValueError unless that is accepted."""
    if old.get("sweep") != new["sweep"]:
        raise ValueError(
            f"{workdir} is the directory of the sweep {old.get('sweep')!r}, not of "
            f"{new['sweep']!r}; take another --workdir"
        )
    changes = differences(old, new)
    if changes and not accept:
        lines = "\n".join(f"  {line}" for line in changes)
        raise ValueError(
            f"{workdir / sweeps.PLAN} says otherwise than the sweep file and the code now:\n"
            f"{lines}\n"
            "--accept goes on with what there is now (runs that are done stay, others may differ "
            "from them); or take another --workdir"
        )
    return changes


def stored_runs(workdir: epath.Path) -> list[PlannedRun]:
    """The runs of sweep.json.

    Raises:
      ValueError: there is none, or none that this module wrote.
    """
    return [PlannedRun(**run) for run in read_plan(workdir)["runs"]]


def read_plan(workdir: epath.Path) -> dict[str, Any]:
    """Reads sweep.json. Raises ValueError: there is none, or none that this module wrote."""
    path = workdir / sweeps.PLAN
    if not path.exists():
        raise ValueError(f"{workdir} has no {sweeps.PLAN}: no sweep was started there")
    stored = files.read_json(path)
    for key, kind in PLAN_KEYS.items():
        if not isinstance(stored.get(key), kind):
            raise ValueError(f"{path} is no plan of a sweep: {key} = {stored.get(key)!r:.80}")
    for run in stored["runs"]:
        keys = run.keys() if isinstance(run, dict) else ()
        if keys != {"name", "changes", "hash"} or not isinstance(run["changes"], dict):
            raise ValueError(f"{path}: a run is {run!r:.80}; wanted its name, changes and hash")
        files.check_name(run["name"], str(path))
    return stored


# What sweep.json has at least, by its type.
PLAN_KEYS = dict(
    sweep=str,
    written=str,
    commit=str,
    code=str,
    versions=dict,
    config=dict,
    axes=list,
    halving=(dict, type(None)),
    search=(dict, type(None)),
    runs=list,
)


def add_run(
    sweep: Sweep, workdir: epath.Path, finished: Sequence[tuple[Mapping, float]]
) -> PlannedRun | None:
    """Adds the run that the search proposes; None if another worker has added the last one.

    Args:
      finished: (changes, value of the metric) of each run that has one.
    """
    with claimed(workdir):
        stored = read_plan(workdir)
        if len(stored["runs"]) >= sweep.search.number:
            return None

        hashes = {run["hash"] for run in stored["runs"]}

        def is_new(changes: Mapping) -> bool:
            return config_lib.content_hash(changed(sweep.base, changes)) not in hashes

        seed = len(stored["runs"])
        changes = sweep.search.propose(sweep.base, finished, is_new, seed)
        [run] = plan_runs(sweep.base, [changes], where="search")

        stored["runs"].append(dataclasses.asdict(run))
        stored["axes"] = list(dict.fromkeys([*stored["axes"], *run.changes]))
        files.write_whole(workdir / sweeps.PLAN, json.dumps(stored, indent=1) + "\n")
        return run


@contextlib.contextmanager
def claimed(workdir: epath.Path) -> Iterator[None]:
    """Holds the claim on a sweep's directory; waits for a process that has it for a moment."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with contextlib.ExitStack() as closing:
        while True:
            try:
                closing.enter_context(claim.Claim(workdir))
                break
            except claim.Taken:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield


def differences(old: Mapping, new: Mapping) -> list[str]:
    """What a new description of a sweep adds, removes and changes, a line each."""
    lines = []
    old_runs = {json.dumps(run["changes"], sort_keys=True): run for run in old["runs"]}
    new_runs = {json.dumps(run["changes"], sort_keys=True): run for run in new["runs"]}

    # What a search has added belongs to its plan.
    searched = new["search"] is not None and old["search"] == new["search"]
    for key, run in new_runs.items():
        if key not in old_runs:
            lines.append(f"adds {run['name']}")
        elif run["hash"] != old_runs[key]["hash"]:
            name, new_name = old_runs[key]["name"], run["name"]
            becomes = f", which becomes {new_name}" if new_name != name else ""
            lines.append(f"changes {name}{becomes}")
    for key, run in old_runs.items():
        if key not in new_runs and not searched:
            lines.append(f"removes {run['name']} (its directory stays)")

    old_config, new_config = config_lib.flatten(old["config"]), config_lib.flatten(new["config"])
    for key in sorted(old_config.keys() | new_config.keys()):
        before, now = old_config.get(key, "absent"), new_config.get(key, "absent")
        if before != now:
            lines.append(f"changes {key} of all runs: {before!r} there, {now!r} now")

    for key in ("halving", "search"):
        if old[key] != json.loads(json.dumps(new[key])):
            lines.append(f"changes {key}: {old[key]} there, {new[key]} now")

    if old["code"] != new["code"]:
        lines.append(f"other code: commit {old['commit'][:12]} there, {new['commit'][:12]} now")
    for name in sorted(old["versions"].keys() | new["versions"].keys()):
        before, now = old["versions"].get(name), new["versions"].get(name)
        if before != now:
            lines.append(f"another {name}: {before} there, {now} now")
    return lines


def _keep_runs(old: Mapping, new: dict) -> None:
    """Gives runs that were planned before the names that their directories have, and keeps those
    that a search has added.

    A run is known again by its hash; one that has changed only what a run may change on its way, by
    the rest of its configuration, if that is of no other run.
    """
    names = {run["hash"]: run["name"] for run in old["runs"]}
    hashes = {run["hash"] for run in new["runs"]}
    old_left = _by_identity(old["config"], [r for r in old["runs"] if r["hash"] not in hashes])
    new_left = _by_identity(new["config"], [r for r in new["runs"] if r["hash"] not in names])
    for run in new["runs"]:
        run["name"] = names.get(run["hash"], run["name"])
    for key, runs in new_left.items():
        if len(runs) == len(old_left.get(key, ())) == 1:
            runs[0]["name"] = old_left[key][0]["name"]

    if new["search"] and old["config"] == json.loads(json.dumps(new["config"])):
        planned = {run["hash"] for run in new["runs"]}
        new["runs"] += [run for run in old["runs"] if run["hash"] not in planned]


def _by_identity(config: Mapping, runs: Sequence[dict]) -> dict[str, list[dict]]:
    """The runs of a plan with this base configuration, by what they stay."""
    found: dict[str, list[dict]] = {}
    for run in runs:
        key = identity(config_lib.flatten(config) | run["changes"])
        found.setdefault(key, []).append(run)
    return found


def identity(config: Mapping | ConfigDict) -> str:
    """What stays the same of a run's configuration while it is made longer or moved."""
    flat = config_lib.flatten(config)
    kept = {key: flat[key] for key in flat if not config_lib.is_resumable(key)}
    return json.dumps(kept, sort_keys=True)


def _add_history(old: Mapping, new: dict) -> None:
    """Remembers what the earlier runs were made with."""
    kept = {key: old[key] for key in ("written", "commit", "code", "versions")}
    new["earlier"] = [*old.get("earlier", []), kept]
