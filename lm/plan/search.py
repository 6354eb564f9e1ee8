"""The search for the fastest way to run a configuration on a pod: python -m lm.plan --search.

It is a hill climb. From the configuration as given it goes to a faster neighbour, which differs in
one knob, until none is faster. A candidate's step time is known by compiling it. Two things save
compilations: a memory model rules out what can't fit, and reports are cached on disk.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.models import transformer

KNOBS = (
    "mesh.data",
    "mesh.fsdp",
    "mesh.fsdp2",
    "model.remat",
    "train.accumulation",
    "train.fsdp_gather",
    "objective.chunk",
)
# Values of config.model.remat, from the fewest saved results to the most. Each avoids the most
# recomputation for the memory that it takes.
REMATS = (
    "full",
    "attention",
    "attention,out",
    "query,attention,out",
    "query,key,value,attention,out",
    "query,key,attention,out,gate",
    "query,key,value,attention,out,gate",
    "query,key,value,attention,out,up,gate",
)
# Chunks of the loss with fewer positions are not tried.
SMALLEST_CHUNK = 64
# A candidate must take less than this share of the best one's time to be taken for faster.
FASTER = 0.999
# Changes that are compiled to find one that makes a configuration fit, at most.
MAX_TRIALS = 4

# Compiles a configuration and returns lm.plan's report on it. Raises MemoryError or ValueError for
# one that can't run.
Evaluate = Callable[[ConfigDict], dict]


def show_nothing(text: str) -> None:
    """Drops a line of progress."""


@dataclasses.dataclass
class Trial:
    """Settings that were tried."""

    settings: dict  # knob -> value
    report: dict | None  # of lm.plan; None if it doesn't fit or was not compiled
    failure: str = ""  # why there is no report

    @property
    def seconds(self) -> float:
        return self.report["train"]["step_ms"]["calibrated"] / 1e3 if self.report else math.inf


# Settings


def settings_of(config: ConfigDict, chips: int) -> dict:
    """The knobs of a configuration, a mesh axis of -1 resolved."""
    known = math.prod(size for size in config.mesh.values() if size != -1)
    settings = {}
    for knob in KNOBS:
        section, key = knob.split(".")
        value = config[section][key]
        settings[knob] = chips // known if value == -1 else value
    return settings


def apply(config: ConfigDict, settings: dict) -> ConfigDict:
    """A copy of the configuration with these settings, locked."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        for knob, value in settings.items():
            section, key = knob.split(".")
            changed[section][key] = value
    return changed.lock()


def overrides(settings: dict, base: dict) -> list[str]:
    """What the settings change of `base`, as flags of lm.main."""
    return [f"--config.{knob}={value}" for knob, value in settings.items() if value != base[knob]]


def _num_weight_shards(settings: dict) -> int:
    return settings["mesh.fsdp"] * settings["mesh.fsdp2"]


def _local_batch(config: ConfigDict, settings: dict) -> tuple[int, int]:
    """(rows a step, positions of each) on a device."""
    shards = config.mesh.slice * config.mesh.expert
    shards *= settings["mesh.data"] * _num_weight_shards(settings)
    return config.data.batch_size // shards, config.data.length // config.mesh.sequence


# The memory model


class ActivationBytes(NamedTuple):
    """Memory of a chip that a step's settings decide, by the memory model."""

    saved: float  # results that wait for the backward pass
    logits: float  # of one chunk of the loss, and their gradient

    @property
    def gib(self) -> float:
        return (self.saved + self.logits) / 2**30


def activation_bytes(config: ConfigDict, settings: dict, chips: int) -> ActivationBytes:
    """The memory model: what a chip holds of a microbatch's activations and logits.

    Raises:
      ValueError: a model that it isn't made for.
    """
    if config.model.type != config_lib.MODEL:
        raise ValueError(
            f"the search for settings has no memory model of config.model.type = "
            f"{config.model.type!r}; it has one of {config_lib.MODEL!r}"
        )
    model = config.model
    tokens = config.data.batch_size * config.data.length / chips / settings["train.accumulation"]

    # Rows of the experts' matmuls for each token: as many as there is room for.
    expert_rows = model.experts_per_token * config.mesh.expert if model.num_experts else 1
    mlp_width = expert_rows * model.mlp_dim + model.shared_mlp_dim
    widths = {
        "query": model.num_heads * model.head_dim,
        "key": model.num_kv_heads * model.head_dim,
        "value": model.num_kv_heads * model.head_dim,
        "out": model.embed_dim,
        # Beside the output a float32 for each head, which is as wide as two bfloat16.
        "attention": model.num_heads * (model.head_dim + 2),
        "up": mlp_width,
        "gate": mlp_width,
        "down": (expert_rows + bool(model.shared_mlp_dim)) * model.embed_dim,
    }
    on_chip, _ = transformer.saved_names(settings["model.remat"])
    # The residual stream is always saved, at the boundaries of the layers.
    width = model.embed_dim
    for name in on_chip:
        if name != "gate" or model.gated_mlp:
            width += widths[name]

    # Bytes: 2 of a bfloat16 activation, 6 of a logit with its gradient.
    share = (settings["objective.chunk"] or config.data.length) / config.data.length
    return ActivationBytes(
        saved=2.0 * model.num_layers * tokens * width,
        logits=6.0 * tokens * share * model.vocab_size,
    )


def predicted_gib(config: ConfigDict, settings: dict, compiled: Trial, chips: int) -> float:
    """Memory of a candidate, predicted from that of a trial that was compiled.

    The train state lies on as many chips as the weights are split over. What is neither state nor
    activations stays as it is.
    """
    train = compiled.report["train"]
    state = train["arguments_gib"] * _num_weight_shards(compiled.settings)
    state = state / _num_weight_shards(settings)

    compiled_activations = activation_bytes(config, compiled.settings, chips).gib
    activations = activation_bytes(config, settings, chips).gib
    rest = max(train["memory_gib"] - train["arguments_gib"] - compiled_activations, 0.0)
    return state + rest + activations


# Neighbours


def neighbours(config: ConfigDict, settings: dict, chips: int) -> Iterator[dict]:
    """Changes of one knob, those first that are likelier to be faster.

    Yields:
      {knob: value} of what differs from `settings`; a mesh's axes change together.
    """
    more_saved, less_saved = _other_remats(config, settings, chips)
    rows, positions = _local_batch(config, settings)

    for remat in more_saved[:2]:
        yield {"model.remat": remat}
    yield from _gather_changes(config, settings)
    yield from _chunk_changes(settings, positions)
    yield from _weight_mesh_changes(settings)
    yield from _data_mesh_changes(settings)
    for accumulation in (settings["train.accumulation"] // 2, settings["train.accumulation"] * 2):
        if accumulation and rows % accumulation == 0:
            yield {"train.accumulation": accumulation}
    # Who saves less computes more, so that is tried last.
    for remat in less_saved[-1:]:
        yield {"model.remat": remat}


def _other_remats(config: ConfigDict, settings: dict, chips: int) -> tuple[list[str], list[str]]:
    """Values of model.remat that save (more, less) than the settings, each list by its bytes."""

    def saved(remat: str) -> float:
        return activation_bytes(config, settings | {"model.remat": remat}, chips).saved

    # Without a gated MLP some save the same; the last one of them stands for all.
    remat_by_bytes = {saved(remat): remat for remat in REMATS}
    now = saved(settings["model.remat"])
    more = []
    less = []
    for size, remat in sorted(remat_by_bytes.items()):
        if size > now:
            more.append(remat)
        elif size < now:
            less.append(remat)
    return more, less


def _gather_changes(config: ConfigDict, settings: dict) -> Iterator[dict]:
    """The other way to gather weights over two axes, where there are two."""
    two_axes = settings["mesh.fsdp"] > 1 and settings["mesh.fsdp2"] > 1
    if config.train.fsdp == "by_hand" and two_axes:
        is_joint = settings["train.fsdp_gather"] == "joint"
        yield {"train.fsdp_gather": "staged" if is_joint else "joint"}


def _chunk_changes(settings: dict, positions: int) -> Iterator[dict]:
    """Twice and half the chunk of the loss, where the loss is in chunks."""
    chunk = settings["objective.chunk"]
    for size in (chunk * 2, chunk // 2):
        if SMALLEST_CHUNK <= size <= positions and positions % size == 0:
            yield {"objective.chunk": size}


def _weight_mesh_changes(settings: dict) -> Iterator[dict]:
    """Other ways to split the weights over two axes, the nearest first."""
    shards = _num_weight_shards(settings)
    now = settings["mesh.fsdp"]

    # All on one axis is (shards, 1); (1, shards) would be the same program.
    sizes = [size for size in range(2, shards + 1) if shards % size == 0 and size != now]
    sizes.sort(key=lambda size: abs(math.log(size / now)))
    for size in sizes:
        yield {"mesh.fsdp": size, "mesh.fsdp2": shards // size}


def _data_mesh_changes(settings: dict) -> Iterator[dict]:
    """More and fewer replicas of the weights: twice, half, and one on each chip."""
    replicas = settings["mesh.data"]
    chips = replicas * _num_weight_shards(settings)
    for data in (replicas * 2, replicas // 2, chips):
        if not data or chips % data or data == replicas:
            continue
        shards = chips // data
        fsdp = min(settings["mesh.fsdp"], shards)
        if shards % fsdp == 0:
            yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.fsdp2": shards // fsdp}


# The search


def search(
    config: ConfigDict,
    chips: int,
    limit_gib: float,
    evaluate: Evaluate,
    *,
    minutes: float,
    progress: Callable[[str], None] = show_nothing,
) -> list[Trial]:
    """Climbs from the configuration as given to one whose neighbours are not faster.

    Args:
      limit_gib: memory of a chip.
      minutes: no candidate is begun that would end later than this, if it took as long as the
        slowest one so far.

    Returns:
      All trials, the fastest first; the configuration as given is among them.

    Raises:
      MemoryError, ValueError: the configuration as given can't be compiled.
    """
    began = time.monotonic()
    base = settings_of(config, chips)
    best = Trial(base, evaluate(config))
    trials = {json.dumps(base, sort_keys=True): best}
    progress(f"as given: {trial_line(best, best)}")
    longest = time.monotonic() - began

    improved = True
    while improved:
        improved = False
        for change in neighbours(config, best.settings, chips):
            settings = best.settings | change
            key = json.dumps(settings, sort_keys=True)
            if key in trials:
                continue
            if time.monotonic() - began + longest > 60 * minutes:
                progress(
                    f"the {minutes:.0f} minutes (--search_minutes) are over; there may be "
                    "something faster"
                )
                break

            predicted = predicted_gib(config, settings, best, chips)
            if predicted > limit_gib:
                failure = f"not compiled: about {predicted:.1f} of {limit_gib:.1f} GiB"
                trials[key] = Trial(settings, None, failure)
                continue

            start = time.monotonic()
            trial = trials[key] = _compile(config, settings, evaluate)
            longest = max(longest, time.monotonic() - start)
            minute = (time.monotonic() - began) / 60
            progress(
                f"{minute:.1f} min, {len(trials)}: {_as_text(change)}: {trial_line(trial, best)}"
            )

            # The first neighbour that is faster is the next to climb from.
            if trial.seconds < best.seconds * FASTER:
                best = trial
                improved = True
                break
    return sorted(trials.values(), key=lambda trial: trial.seconds)


def _compile(config: ConfigDict, settings: dict, evaluate: Evaluate) -> Trial:
    try:
        return Trial(settings, evaluate(apply(config, settings)))
    except (MemoryError, ValueError) as error:
        first_line, _, _ = str(error).partition("\n")
        return Trial(settings, None, first_line)


def _as_text(change: dict) -> str:
    return ", ".join(f"{knob}={value}" for knob, value in change.items())


def trial_line(trial: Trial, best: Trial) -> str:
    """A trial in a line."""
    if not trial.report:
        return trial.failure
    train = trial.report["train"]
    faster = ", the fastest so far" if trial.seconds < best.seconds else ""
    return (
        f"{trial.seconds * 1e3:,.1f} ms, {train['memory_gib']:.1f} GiB, predicted MFU "
        f"{train['mfu']['calibrated']:.1%}{faster}"
    )


def ranking(trials: list[Trial], base: dict) -> str:
    """The ranking, each trial by what sets it apart from the configuration as given."""
    lines = [f"{'step, ms':>10}  {'MFU':>6}  {'GiB':>5}  changes"]
    for trial in trials:
        changes = [f"{k}={v}" for k, v in trial.settings.items() if v != base[k]]
        text = " ".join(changes) or "(as given)"
        if trial.report:
            train = trial.report["train"]
            lines.append(
                f"{trial.seconds * 1e3:10,.1f}  {train['mfu']['calibrated']:6.1%}  "
                f"{train['memory_gib']:5.1f}  {text}"
            )
        else:
            lines.append(f"{'-':>10}  {'-':>6}  {'-':>5}  {text}: {trial.failure[:140]}")
    return "\n".join(lines)


def cached(evaluate: Evaluate, folder: Path, *circumstances: str) -> Evaluate:
    """Returns `evaluate` with its results, failures too, cached in `folder`.

    Args:
      circumstances: what else a result hangs on; the key has them beside the configuration and the
        project's own code.
    """
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        code.update(path.read_bytes())

    def evaluate_cached(config: ConfigDict) -> dict:
        parts = [config.to_dict(), code.hexdigest(), *circumstances]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        path = folder / f"{key}.json"
        if path.exists():
            result = json.loads(path.read_text())
        else:
            try:
                result = {"report": evaluate(config)}
            except (MemoryError, ValueError) as error:
                result = {"failed": str(error), "fits": isinstance(error, ValueError)}

            # A file in the making has another name: one that is read is always whole.
            folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".part").write_text(json.dumps(result))
            path.with_suffix(".part").rename(path)

        if "report" not in result:
            raise (ValueError if result["fits"] else MemoryError)(result["failed"])
        return result["report"]

    return evaluate_cached


# What to change where the configuration doesn't fit


def nearest_that_fits(
    config: ConfigDict,
    chips: int,
    evaluate: Evaluate,
    *,
    needed_gib: float,
    limit_gib: float,
    progress: Callable[[str], None] = show_nothing,
) -> Trial | None:
    """The change that costs least time and makes a configuration fit.

    Changes that the memory model takes for small enough are compiled, the cheapest first.

    Args:
      needed_gib: what the compiler said that the configuration needs.
      limit_gib: memory of a chip.

    Returns:
      The first trial that fits; None if `MAX_TRIALS` of them don't.
    """
    base = settings_of(config, chips)
    base_activations = activation_bytes(config, base, chips).gib
    num_trials = 0
    for change in _leaner_changes(config, base, chips):
        settings = base | change
        activations = activation_bytes(config, settings, chips).gib
        predicted = needed_gib - base_activations + activations
        if predicted > limit_gib:
            continue

        num_trials += 1
        if num_trials > MAX_TRIALS:
            return None
        progress(f"trying {_as_text(change)}, about {predicted:.1f} GiB")
        trial = _compile(config, settings, evaluate)
        if trial.report:
            return trial
    return None


def _leaner_changes(config: ConfigDict, base: dict, chips: int) -> Iterator[dict]:
    """Changes that take less memory, those first that cost least time."""
    rows, positions = _local_batch(config, base)

    # Smaller chunks of the loss cost least.
    chunk = base["objective.chunk"] or positions
    for size in (chunk // 2, chunk // 4, chunk // 8):
        if size >= SMALLEST_CHUNK and positions % size == 0:
            yield {"objective.chunk": size}

    # What is not saved is computed again.
    _, less_saved = _other_remats(config, base, chips)
    for remat in reversed(less_saved):
        yield {"model.remat": remat}

    # Each microbatch gathers the weights again.
    for accumulation in (2, 4, 8):
        if accumulation > base["train.accumulation"] and rows % accumulation == 0:
            yield {"train.accumulation": accumulation}

    # The leanest settings that there are.
    yield {
        "train.accumulation": rows,
        "model.remat": "full",
        "objective.chunk": math.gcd(positions, 256),
    }
