"""Looks for the fastest way to run a configuration on a pod: python -m lm.plan --search. What a
candidate takes is told by compiling it.

From the configuration as given it goes to the fastest neighbour, until none is faster: one knob at
a time is turned, what a memory model says can't fit is not compiled, and what was compiled once is
remembered.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

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
# Results kept for the backward pass, from the leanest to the most; each adds what saves most FLOPs
# for its bytes (docs/pods.md).
LADDER = (
    "full",
    "attention",
    "attention,out",
    "query,attention,out",
    "query,key,value,attention,out",
    "query,key,attention,out,gate",
    "query,key,value,attention,out,gate",
    "query,key,value,attention,out,up,gate",
)


@dataclasses.dataclass
class Tried:
    settings: dict  # knob -> value
    report: dict | None  # of lm.plan; None if it doesn't fit or was not compiled
    why: str = ""

    @property
    def seconds(self) -> float:
        return self.report["train"]["step_ms"]["calibrated"] / 1e3 if self.report else math.inf


def settings_of(config: ConfigDict, chips: int) -> dict:
    """The knobs of a configuration, a mesh axis of -1 resolved."""
    values = {knob: config[knob.split(".")[0]][knob.split(".")[1]] for knob in KNOBS}
    known = math.prod(n for n in config.mesh.values() if n != -1)
    return {knob: chips // known if value == -1 else value for knob, value in values.items()}


def apply(config: ConfigDict, settings: dict) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        for knob, value in settings.items():
            section, key = knob.split(".")
            changed[section][key] = value
    return changed.lock()


def local_rows(config: ConfigDict, settings: dict) -> tuple[int, int]:
    """(rows a step, positions of each) of a device."""
    parts = (
        config.mesh.slice
        * config.mesh.expert
        * math.prod(settings[f"mesh.{axis}"] for axis in ("data", "fsdp", "fsdp2"))
    )
    return config.data.batch_size // parts, config.data.length // config.mesh.sequence


def kept_bytes(config: ConfigDict, settings: dict, chips: int) -> tuple[float, float]:
    """(what the backward pass finds saved, the logits of a chunk and their gradient), in bytes a
    chip: the memory model.
    """
    m = config.model
    tokens = config.data.batch_size * config.data.length / chips / settings["train.accumulation"]
    # of the experts, as many as there is room for
    rows = m.experts_per_token * config.mesh.expert if m.num_experts else 1
    widths = dict(
        query=m.num_heads * m.head_dim,
        key=m.num_kv_heads * m.head_dim,
        value=m.num_kv_heads * m.head_dim,
        out=m.embed_dim,
        attention=m.num_heads * (m.head_dim + 2),
        up=rows * m.mlp_dim + m.shared_mlp_dim,
        gate=rows * m.mlp_dim + m.shared_mlp_dim,
        down=(rows + bool(m.shared_mlp_dim)) * m.embed_dim,
    )
    here, _ = transformer.kept_results(settings["model.remat"])
    width = m.embed_dim + sum(widths[name] for name in here if name != "gate" or m.gated_mlp)
    share = (settings["objective.chunk"] or config.data.length) / config.data.length
    return 2.0 * m.num_layers * tokens * width, 6.0 * tokens * share * m.vocab_size


def predicted_gib(config: ConfigDict, settings: dict, known: Tried, chips: int) -> float:
    """Memory of a candidate, from that of one that was compiled: its state lies on as many chips as
    the weights are split over.
    """
    split = lambda s: s["mesh.fsdp"] * s["mesh.fsdp2"]
    train = known.report["train"]
    state = train["arguments_gib"] * split(known.settings) / split(settings)
    there, here = (sum(kept_bytes(config, s, chips)) / 2**30 for s in (known.settings, settings))
    return state + max(train["memory_gib"] - train["arguments_gib"] - there, 0.0) + here


def neighbours(config: ConfigDict, settings: dict, chips: int) -> Iterator[dict]:
    """Settings that differ in one knob, those first that are likelier to be faster."""
    kept = lambda remat: kept_bytes(config, settings | {"model.remat": remat}, chips)[0]
    ladder = sorted({kept(remat): remat for remat in LADDER}.items())
    now = kept(settings["model.remat"])
    more, less = (
        [remat for size, remat in ladder if size > now],
        [remat for size, remat in ladder if size < now],
    )
    yield from ({"model.remat": remat} for remat in more[:2])
    weights = settings["mesh.fsdp"] * settings["mesh.fsdp2"]
    if config.train.fsdp == "by_hand" and settings["mesh.fsdp"] > 1 and settings["mesh.fsdp2"] > 1:
        yield {
            "train.fsdp_gather": "staged" if settings["train.fsdp_gather"] == "joint" else "joint"
        }
    rows, columns = local_rows(config, settings)
    if chunk := settings["objective.chunk"]:
        yield from (
            {"objective.chunk": n}
            for n in (chunk * 2, chunk // 2)
            if 64 <= n <= columns and columns % n == 0
        )
    # All on one axis is (weights, 1); (1, weights) would be the same program.
    pairs = [
        (n, weights // n)
        for n in range(2, weights + 1)
        if weights % n == 0 and (n, weights // n) != (settings["mesh.fsdp"], settings["mesh.fsdp2"])
    ]
    near = lambda pair: abs(math.log(pair[0] / settings["mesh.fsdp"]))
    yield from ({"mesh.fsdp": a, "mesh.fsdp2": b} for a, b in sorted(pairs, key=near))
    replicas = settings["mesh.data"]
    for data in (replicas * 2, replicas // 2, replicas * weights):
        if data and (replicas * weights) % data == 0 and data != replicas:
            rest = replicas * weights // data
            fsdp = min(settings["mesh.fsdp"], rest)
            if rest % fsdp == 0:
                yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.fsdp2": rest // fsdp}
    yield from (
        {"train.accumulation": n}
        for n in (settings["train.accumulation"] // 2, settings["train.accumulation"] * 2)
        if n and rows % n == 0
    )
    yield from ({"model.remat": remat} for remat in less[-1:])


def search(
    config: ConfigDict,
    chips: int,
    limit_gib: float,
    evaluate: Callable[[ConfigDict], dict],
    *,
    minutes: float,
    say=lambda text: None,
) -> list[Tried]:
    """All that was tried, the fastest first; the configuration as given is among them.

    Args:
      evaluate: configuration -> report of lm.plan; raises MemoryError or ValueError for what can't
        be.
      minutes: no candidate is begun that would end later than this, by the time that the longest
        one took.

    Raises:
      MemoryError, ValueError: the configuration as given can't be compiled.
    """
    began = time.monotonic()
    base = settings_of(config, chips)
    best = Tried(base, evaluate(config))
    tried = {json.dumps(base, sort_keys=True): best}
    say(f"as given: {in_short(best, best)}")
    longest = time.monotonic() - began
    improved = True
    while improved:
        improved = False
        for change in neighbours(config, best.settings, chips):
            settings = best.settings | change
            key = json.dumps(settings, sort_keys=True)
            if key in tried:
                continue
            if time.monotonic() - began + longest > 60 * minutes:
                say(
                    f"the {minutes:.0f} minutes (--search_minutes) are over; there may be "
                    "something faster"
                )
                break
            predicted = predicted_gib(config, settings, best, chips)
            if predicted > limit_gib:
                tried[key] = Tried(
                    settings, None, f"not compiled: about {predicted:.1f} of {limit_gib:.1f} GiB"
                )
                continue
            start = time.monotonic()
            try:
                tried[key] = Tried(settings, evaluate(apply(config, settings)))
            except (MemoryError, ValueError) as error:
                tried[key] = Tried(settings, None, str(error).splitlines()[0])
            longest = max(longest, time.monotonic() - start)
            minute = (time.monotonic() - began) / 60
            say(
                f"{minute:.1f} min, {len(tried)}: "
                f"{', '.join(f'{k}={v}' for k, v in change.items())}: {in_short(tried[key], best)}"
            )
            if tried[key].seconds < best.seconds * 0.999:
                best, improved = tried[key], True
                break
    return sorted(tried.values(), key=lambda t: t.seconds)


def in_short(one: Tried, best: Tried) -> str:
    if not one.report:
        return one.why
    return (
        f"{one.seconds * 1e3:,.1f} ms, {one.report['train']['memory_gib']:.1f} GiB, predicted MFU "
        f"{one.report['train']['mfu']['calibrated']:.1%}"
        f"{', the fastest so far' if one.seconds < best.seconds else ''}"
    )


def table(tried: list[Tried], base: dict) -> str:
    """The ranking, each by what sets it apart from the configuration as given."""
    lines = [f"{'step, ms':>10}  {'MFU':>6}  {'GiB':>5}  changes"]
    for one in tried:
        changes = (
            " ".join(f"{k}={v}" for k, v in one.settings.items() if v != base[k]) or "(as given)"
        )
        if one.report:
            train = one.report["train"]
            lines.append(
                f"{one.seconds * 1e3:10,.1f}  {train['mfu']['calibrated']:6.1%}  "
                f"{train['memory_gib']:5.1f}  {changes}"
            )
        else:
            lines.append(f"{'-':>10}  {'-':>6}  {'-':>5}  {changes}: {one.why[:140]}")
    return "\n".join(lines)


def overrides(settings: dict, base: dict) -> list[str]:
    """As flags of lm.main."""
    return [f"--config.{knob}={value}" for knob, value in settings.items() if value != base[knob]]


def remembered(
    evaluate: Callable[[ConfigDict], dict], folder: Path, *circumstances: str
) -> Callable[[ConfigDict], dict]:
    """`evaluate`, its results kept in `folder` under the configuration, the circumstances and the
    project's own code.
    """
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())

    def evaluated(config: ConfigDict) -> dict:
        key = hashlib.sha256(
            json.dumps(
                [config.to_dict(), code.hexdigest(), *circumstances], sort_keys=True
            ).encode()
        ).hexdigest()[:32]
        path = folder / f"{key}.json"
        if path.exists():
            found = json.loads(path.read_text())
        else:
            try:
                found = {"report": evaluate(config)}
            except (MemoryError, ValueError) as error:
                found = {"failed": str(error), "fits": isinstance(error, ValueError)}
            folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".part").write_text(json.dumps(found))
            path.with_suffix(".part").rename(path)
        if "report" not in found:
            raise (ValueError if found["fits"] else MemoryError)(found["failed"])
        return found["report"]

    return evaluated


def nearest_that_fits(
    config: ConfigDict,
    chips: int,
    evaluate: Callable[[ConfigDict], dict],
    *,
    needed_gib: float,
    limit_gib: float,
    most: int = 4,
    say=lambda text: None,
) -> Tried | None:
    """The change of one knob that costs least and makes a configuration fit, by the memory model
    and then by compiling; None if `most` tries don't.

    Args:
      needed_gib: what the compiler said it needs.
    """
    base = settings_of(config, chips)
    there = sum(kept_bytes(config, base, chips)) / 2**30
    rows, columns = local_rows(config, base)
    chunk = base["objective.chunk"] or columns
    leaner = sorted(
        (
            r
            for r in LADDER
            if kept_bytes(config, base | {"model.remat": r}, chips)
            < kept_bytes(config, base, chips)
        ),
        key=lambda r: -kept_bytes(config, base | {"model.remat": r}, chips)[0],
    )
    changes = [
        {"objective.chunk": n}
        for n in (chunk // 2, chunk // 4, chunk // 8)
        if n >= 64 and columns % n == 0
    ]
    changes += [{"model.remat": remat} for remat in leaner]
    changes += [
        {"train.accumulation": n}
        for n in (2, 4, 8)
        if n > base["train.accumulation"] and rows % n == 0
    ]
    changes += [
        {
            "train.accumulation": rows,
            "model.remat": "full",
            "objective.chunk": math.gcd(columns, 256),
        }
    ]
    tries = 0
    for change in changes:
        settings = base | change
        predicted = needed_gib - there + sum(kept_bytes(config, settings, chips)) / 2**30
        if predicted > limit_gib:
            continue
        tries += 1
        if tries > most:
            return None
        say(f"trying {', '.join(f'{k}={v}' for k, v in change.items())}, about {predicted:.1f} GiB")
        try:
            return Tried(settings, evaluate(apply(config, settings)))
        except (MemoryError, ValueError):
            continue
    return None
