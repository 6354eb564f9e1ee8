"""Compiles a configuration for a TPU pod, without one: python -m lm.plan
--config=configs/pods.py:llama2_7b-v5p-4x4x4 --topology=v5p:4x4x4

libtpu's compiler runs on any x86-64 Linux machine (pip install 'lm[plan]'). Memory, FLOPs,
collectives and kernels are its facts; times are models of them (lm/hlo.py), given as a range.
"""

import collections
import functools
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax.experimental import topologies
from ml_collections import ConfigDict

from lm import build, command_line, decode, hlo, metrics, search, sharding, step

PROGRAMS = ("train", "eval", "prefill", "decode")
CARDS = Path(__file__).parent.parent / "configs" / "cards"
# What a card holds still, and how far it may move (a share) before --check fails.
TOLERANCES = {"memory_gib": 0.02, "executed_tflops": 0.005, "model_tflops": 1e-6, "wire_gb": 0.02}


class DoesNotFit(MemoryError):
    """A program that is too big: what is, and `needed_gib` by the compiler's count, 0 if it doesn't
    say.
    """

    needed_gib = 0.0


def describe(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a described topology, such as "v5p:4x4x8", in `slices` such slices.

    Raises:
      ValueError: no libtpu, no such topology.
    """
    for name, value in dict(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-16",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_STDERR_LOG_LEVEL="3",
        TPU_MIN_LOG_LEVEL="3",
    ).items():
        os.environ.setdefault(name, value)  # no lock file, no metadata server, no noise
    kind, _, shape = topology.partition(":")
    sides = shape.split("x")
    if (
        kind not in ("v4", "v5e", "v5p", "v6e")
        or not all(side.isdigit() for side in sides)
        or len(sides) != (2 if kind in ("v5e", "v6e") else 3)
    ):
        raise ValueError(
            f"--topology={topology}; wanted v4:XxYxZ, v5p:XxYxZ, v5e:XxY or v6e:XxY, such as "
            "v5p:4x4x8 (chips in each dim of the torus)"
        )
    options = (
        dict(chips_per_host_bounds=(2, 2, 1), chip_config_name="megacore") if kind == "v4" else {}
    )
    if math.prod(int(side) for side in sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(
            topology, "tpu", **options, **(dict(num_slices=slices) if slices > 1 else {})
        ).devices
    except Exception as error:
        if "libtpu" in str(error):
            raise ValueError(
                "compiling for TPUs needs libtpu: pip install 'lm[plan]' (x86-64 Linux). "
                f"{str(error).splitlines()[0]}"
            ) from None
        raise ValueError(
            f"--topology={topology} --slices={slices} can't be described: "
            f"{str(error).splitlines()[0]}. Sides are even on pods (hosts hold 2x2 chips), such "
            "as v5e:4x4, v5p:4x4x8"
        ) from None


def total_tokens(config: ConfigDict) -> float | None:
    """The run's token budget; None where it hangs on the corpus (epochs)."""
    batch = config.data.batch_size * config.data.length
    try:
        return batch * build.total_steps(
            config.train.length, batch_tokens=batch, epoch_tokens=lambda: None
        )
    except TypeError:
        return None


def compile_text(jitted, *arguments) -> tuple[jax.stages.Compiled, str, list[str], float]:
    """(compiled, its optimized HLO, its largest buffers, seconds it took).

    Raises:
      MemoryError: it doesn't fit; the compiler's words.
      ValueError: the compiler refuses an option, or fails.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            # `as_text` fails on programs with parts on the SparseCore.
            compiled = jitted.lower(*arguments).compile(
                compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
                raise MemoryError(str(error)) from None
            if "option" in str(error) or "FAILED_PRECONDITION" in str(error):
                raise ValueError(
                    f"libtpu {_libtpu_version()} refuses an option of lm/startup.py's "
                    f"COMPILER_OPTIONS: {str(error).splitlines()[0]}. constraints.txt has the "
                    "version that they were chosen for"
                ) from None
            raise ValueError(
                f"libtpu {_libtpu_version()}'s compiler fails on this program: "
                f"{str(error).splitlines()[0]}. Another mesh, remat or number of microbatches may "
                "do"
            ) from error
        seconds = time.monotonic() - began
        largest = lambda pattern: max(
            Path(folder).glob(pattern), key=lambda path: path.stat().st_size
        )
        text = largest("*after_codegen.txt").read_text()
        usage = largest("*memory-usage-report.txt").read_text()
    rows = re.findall(r"^\s*[\d.]+[KMG]iB\(\s*\d+%\);\s*([\d.]+[KMG]iB);.*;\s*(.*)$", usage, re.M)
    return compiled, text, [f"{size} {shapes[:90]}" for size, shapes in rows[:8]], seconds


def measure(
    program: build.Program, jitted, arguments: tuple, model_flops: dict[str, float]
) -> dict:
    """What a program takes on each chip, as a JSON-able report. `model_flops`: of the whole
    program, all chips.
    """
    with jax.set_mesh(program.mesh):
        compiled, text, largest, seconds = compile_text(jitted, *arguments)
    devices, chip = list(program.mesh.devices.flat), hlo.CHIPS[program.devices[0].device_kind]
    module = hlo.Program(
        text,
        chip,
        [(getattr(d, "slice_index", 0), *d.coords) for d in devices],
        dict(program.mesh.shape),
    )
    costs = {model: module.cost(model) for model in hlo.MODELS}
    middle = costs["calibrated"]
    memory = compiled.memory_analysis()
    collectives = collections.defaultdict(
        lambda: dict(count=0, wire_gb=0.0, ms=0.0, exposed_ms=0.0)
    )
    for c in middle.collectives:
        if c.axes:
            row = collectives[
                f"{c.kind} over {'+'.join(c.axes)}, "
                f"{'asynchronous' if c.asynchronous else 'synchronous'}"
            ]
            for key, value in (
                ("count", 1),
                ("wire_gb", c.wire / 1e9),
                ("ms", c.seconds * 1e3),
                ("exposed_ms", c.exposed * 1e3),
            ):
                row[key] += c.count * value
    per_chip = {name: flops / len(devices) for name, flops in model_flops.items()}
    return {
        "memory_gib": memory.peak_memory_in_bytes / 2**30,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
        "host_gib": memory.host_temp_size_in_bytes / 2**30,
        "limit_gib": chip.memory / 2**30,
        "largest_buffers": largest,
        "model_tflops": per_chip["causal"] / 1e12,
        "model_tflops_full_attention": per_chip["full"] / 1e12,
        "executed_tflops": (middle.flops + middle.kernel_flops) / 1e12,
        "hbm_gb": middle.hbm / 1e9,
        "wire_gb": sum(c.count * c.wire for c in middle.collectives) / 1e9,
        "kernels": dict(sorted(middle.kernels.items())),
        "collectives": {
            name: {k: round(v, 6) for k, v in row.items()}
            for name, row in sorted(collectives.items())
        },
        "step_ms": {model: cost.seconds * 1e3 for model, cost in costs.items()},
        "mfu": {
            model: per_chip["causal"] / chip.peak / cost.seconds for model, cost in costs.items()
        },
        "breakdown_ms": {name: value * 1e3 for name, value in middle.time.most_common()},
        "not_timed": sorted(module.notes),
        "compile_seconds": seconds,
    }


def plan(
    config: ConfigDict,
    topology: str,
    slices: int = 1,
    *,
    programs: tuple[str, ...] = ("train",),
    progress=lambda text: None,
) -> dict:
    """The report of a configuration on a pod: for each of `programs` (of `PROGRAMS`) what `measure`
    says, and what the run takes.

    Raises:
      ValueError: a configuration that can't run there.
      MemoryError: one that doesn't fit, with what is big and what to change.
    """
    devices = describe(topology, slices)
    c = config
    if not c.model.vocab_size:
        raise ValueError(
            "config.model.vocab_size = 0 (the tokenizer's): there is no tokenizer here; set "
            "config.model.vocab_size"
        )
    tokens = total_tokens(c)
    steps = math.ceil(tokens / (c.data.batch_size * c.data.length)) if tokens else 10**6
    program = build.program(c, devices, c.model.vocab_size, steps)
    flops = lambda batch, length, share: {
        name: share
        * batch
        * length
        * metrics.model_flops_per_token(program.model_config, length, causal=name == "causal")
        for name in ("causal", "full")
    }
    params = program.abstract_state.params
    objective = build.resolve(c.objective.type, "config.objective.type")
    prompts = (len(devices), min(1024, c.data.length))  # a row a chip

    def made(name):
        if name == "train":
            return (
                program.train_step,
                (program.abstract_state, program.abstract_batch(c.data.batch_size)),
                flops(c.data.batch_size, c.data.length, 1),
            )
        if name == "eval":
            return (
                jax.jit(step.make_token_logprobs(program.graphdef, objective.token_logprobs)),
                (params, program.abstract_batch(c.data.batch_size)),
                flops(c.data.batch_size, c.data.length, 1 / 3),
            )
        ids = lambda *shape: jax.ShapeDtypeStruct(
            shape, jnp.int32, sharding=sharding.batch_sharding(program.mesh, len(shape))
        )
        if name == "prefill":
            run = lambda params, *arguments: decode.prefill(
                nnx.merge(program.graphdef, params), *arguments, c.data.length
            )
            return jax.jit(run), (params, ids(*prompts), ids(prompts[0])), flops(*prompts, 1 / 3)
        run = lambda params, token, position, cache: decode.decode_step(
            nnx.merge(program.graphdef, params), token, position, cache
        )
        cache = jax.eval_shape(
            lambda params: nnx.merge(program.graphdef, params).init_cache(
                prompts[0], c.data.length
            ),
            params,
        )
        place = jax.sharding.NamedSharding(
            program.mesh, sharding.spec(("layers", "batch", None, "act_heads", None), program.mesh)
        )
        cache = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), cache
        )
        return (
            jax.jit(run, donate_argnums=3),
            (params, ids(prompts[0]), ids(prompts[0]), cache),
            flops(prompts[0], 1, 1 / 3),
        )

    per_device = lambda tree: (
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
        / 2**30
    )
    report = {
        "topology": topology,
        "slices": slices,
        "chips": len(devices),
        "mesh": {axis: n for axis, n in program.mesh.shape.items() if n > 1},
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "batch": [c.data.batch_size, c.data.length],
        "parameters_gib": per_device(params),
        "optimizer_gib": per_device(program.abstract_state.opt_state),
        "versions": {"jax": jax.__version__, "libtpu": _libtpu_version()},
    }
    for name in programs:
        progress(f"compiling the {name} program for {len(devices)} x {devices[0].device_kind}")
        jitted, arguments, model_flops = made(name)
        try:
            report[name] = measure(program, jitted, arguments, model_flops)
        except MemoryError as error:
            raise _too_big(c, name, str(error)) from None
    train = report.get("train")
    if train:
        batch = c.data.batch_size * c.data.length
        report["tokens_per_second_per_chip"] = {
            m: batch / len(devices) / ms * 1e3 for m, ms in train["step_ms"].items()
        }
        if tokens:
            report["tokens"] = tokens
            report["days"] = {
                m: tokens / batch * ms / 1e3 / 86400 for m, ms in train["step_ms"].items()
            }
            report["chip_hours"] = {
                m: days * 24 * len(devices) for m, days in report["days"].items()
            }
        report["in_words"] = in_words(c, train)
    return report


def _libtpu_version() -> str:
    from importlib import metadata

    return metadata.version("libtpu")


def _too_big(config: ConfigDict, name: str, error: str) -> DoesNotFit:
    used = re.search(r"Used ([\d.]+)([MG]) of ([\d.]+[MG]) hbm", error) or re.search(
        r"\(([\d.]+)([MG])\) exceeds available HBM \(([\d.]+[MG])\)", error
    )
    large = re.findall(r"Size: ([\d.]+[MG])\s[\s\S]*?Shape: (\S+)", error)[:3]
    ways = []
    if name == "train":
        ways += (
            []
            if config.model.remat == "full"
            else [
                "keep less for the backward pass (config.model.remat with fewer names, or 'full')"
            ]
        )
        ways += (
            []
            if config.objective.chunk
            else [f"chunk the loss (config.objective.chunk={max(config.data.length // 4, 1)})"]
        )
        ways += [
            f"smaller microbatches (config.train.accumulation={config.train.accumulation * 2})"
        ]
    ways += ["more chips, or a smaller batch"]
    found = DoesNotFit(
        f"the {name} program does not fit: "
        f"{f'{used.group(1)}{used.group(2)} of {used.group(3)}' if used else error.splitlines()[0]}. "  # noqa: E501
        f"Largest: {', '.join(f'{size} {shape}' for size, shape in large) or 'unknown'}. What "
        f"helps: {'; '.join(ways)}."
    )
    found.needed_gib = (
        float(used.group(1)) / (1 if used.group(2) == "G" else 1024)
        if used and name == "train"
        else 0.0
    )
    return found


def in_words(config: ConfigDict, train: dict) -> str:
    """What bounds the step, and what to change."""
    times = train["breakdown_ms"]
    total = sum(times.values())
    waiting = sum(v for k, v in times.items() if k.startswith("waiting"))
    share = lambda value: f"{value / total:.0%}"
    experts = f"experts' {share(times[name])}, " if (name := "experts' matmuls") in times else ""
    said = [
        f"Matmuls take {share(times.get('matmuls', 0))} of the step, {experts}attention kernels "
        f"{share(times.get('kernels', 0))}, other compute {share(times.get('other compute', 0))}, "
        f"waiting for transfers {share(waiting)}."
    ]
    extra = train["executed_tflops"] / train["model_tflops"] - 1
    room = train["limit_gib"] - train["memory_gib"]
    if waiting > 0.15 * total:
        worst = max((k for k in times if k.startswith("waiting")), key=times.get)
        said.append(
            f"It is bound by communication (mostly {worst.removeprefix('waiting for ')}): more "
            "rows a chip hide it, or a mesh with smaller groups."
        )
    elif extra > 0.12 and room > 0.1 * train["limit_gib"]:
        said.append(
            f"It computes {extra:.0%} more than the model needs, and {room:.0f} GiB are free: "
            "keep more results (config.model.remat)."
        )
    elif extra > 0.12:
        said.append(
            f"It computes {extra:.0%} more than the model needs, for memory's sake: more chips or "
            "smaller microbatches would let it keep more."
        )
    else:
        said.append("It is bound by the matrix units, as it should be.")
    return " ".join(said)


def table(report: dict) -> str:
    """The report for people."""
    lines = [
        f"{report['parameters'] / 1e9:.2f}B parameters on {report['chips']} chips "
        f"({report['topology']}"
        f"{' x ' + str(report['slices']) + ' slices' if report['slices'] > 1 else ''}), mesh "
        f"{report['mesh'] or 'one device'}, batch {report['batch'][0]} x {report['batch'][1]}; "
        f"jax {report['versions']['jax']}, libtpu {report['versions']['libtpu']}",
        f"parameters {report['parameters_gib']:.2f} GiB, optimizer {report['optimizer_gib']:.2f} "
        "GiB a chip",
    ]
    spread = lambda values, form: " | ".join(
        f"{form.format(values[m])} ({m})" for m in ("roofline", "calibrated", "compiler")
    )
    for name in PROGRAMS:
        if name not in report:
            continue
        r = report[name]
        lines += [
            f"\n{name}: memory {r['memory_gib']:.2f} of {r['limit_gib']:.1f} GiB: fits (arguments "
            f"{r['arguments_gib']:.2f}, temporaries {r['temporaries_gib']:.2f}; in the host's "
            f"memory {r['host_gib']:.2f}); compiled in {r['compile_seconds']:.0f} s",
            "  largest: " + "; ".join(r["largest_buffers"][:4]),
            f"  TFLOP a chip: model {r['model_tflops']:.1f} (full attention "
            f"{r['model_tflops_full_attention']:.1f}), executed {r['executed_tflops']:.1f}; HBM "
            f"{r['hbm_gb']:.1f} GB; on the wire {r['wire_gb']:.2f} GB",
            "  time, modelled: " + spread(r["step_ms"], "{:,.1f} ms"),
            "  MFU, modelled: " + spread(r["mfu"], "{:.1%}"),
            "  of it: "
            + ", ".join(f"{k} {v:,.1f} ms" for k, v in r["breakdown_ms"].items() if v >= 0.05),
            "  kernels: " + (", ".join(f"{k} x{n}" for k, n in r["kernels"].items()) or "none"),
        ]
        lines += [
            f"  {k}: {v['count']} x, {v['wire_gb']:.2f} GB, {v['ms']:.1f} ms, exposed "
            f"{v['exposed_ms']:.1f} ms"
            for k, v in r["collectives"].items()
        ]
        lines += [
            "  not modelled: contention for memory, stalls of the "
            f"input{''.join(', ' + note for note in r['not_timed'])}"
        ]
    if "tokens_per_second_per_chip" in report:
        lines.append(
            "\ntokens/s a chip: " + spread(report["tokens_per_second_per_chip"], "{:,.0f}")
        )
    if "days" in report:
        lines.append(
            f"{report['tokens']:.3g} tokens: "
            + spread(report["days"], "{:,.1f} days")
            + "; chip-hours: "
            + spread(report["chip_hours"], "{:,.0f}")
        )
    return "\n".join([*lines, report.get("in_words", "")])


def differences(card: dict, report: dict) -> list[str]:
    """What of a card's figures moved beyond `TOLERANCES`, or in kind."""
    found = []
    old, new = card["train"], report["train"]
    for key, tolerance in TOLERANCES.items():
        if abs(new[key] - old[key]) > tolerance * abs(old[key]):
            found.append(f"{key}: {old[key]:.4g} on the card, {new[key]:.4g} now")
    if old["kernels"] != new["kernels"]:
        found.append(f"kernels: {old['kernels']} on the card, {new['kernels']} now")
    kinds = lambda r: {
        name.split(",")[0] for name, row in r["collectives"].items() if row["wire_gb"] > 0.05
    }
    if kinds(old) != kinds(new):
        found.append(
            f"collectives: gone {sorted(kinds(old) - kinds(new))}, new "
            f"{sorted(kinds(new) - kinds(old))}"
        )
    return found


def check(names: list[str], load, progress=print) -> list[str]:
    """Compiles the cards' configurations again. Returns the failures.

    Args:
      names: of cards, without .json; [] for all.
      load: (config file, size) -> config.

    Raises:
      ValueError: no such card.
    """
    cards = {path.stem: path for path in sorted(CARDS.glob("*.json"))}
    if unknown := sorted(set(names) - set(cards)):
        raise ValueError(f"no cards {unknown} in {CARDS}; there are {sorted(cards)}")
    failures = []
    for number, name in enumerate(names or cards):
        card = json.loads(cards[name].read_text())
        report = plan(load(*card["config"]), card["topology"], card["slices"])
        moved = differences(card, report)
        failures += [f"{name}: {line}" for line in moved]
        progress(
            f"{number + 1}/{len(names or cards)} {name}: {'; '.join(moved) or 'as on the card'} "
            f"({report['train']['compile_seconds']:.0f} s)"
        )
    return failures


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
        _libtpu_version(),
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
    metrics.write_whole(out, "\n".join(changes) + "\n" if changes else "")
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
            failures = check(argv[1:], load_config, say)
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
    print(json.dumps(report, indent=1) if _JSON.value else table(report))
    if _CARD.value:
        path, _, size = next(
            a.split("=", 1)[1] for a in sys.argv if a.lstrip("-").startswith("config=")
        ).partition(":")
        metrics.write_whole(
            CARDS / f"{_CARD.value}.json",
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
