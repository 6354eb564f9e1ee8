"""Compiles a configuration for a TPU pod, without one: python -m lm.plan
--config=configs/pods.py:llama2_7b-v5p-4x4x4 --topology=v5p:4x4x4

libtpu's compiler runs on any x86-64 Linux machine (pip install 'lm[plan]'). Memory, FLOPs,
collectives and kernels are its facts; times are models of them (lm/hlo.py), given as a range.
"""

import collections
import math
import os
import re
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from ml_collections import ConfigDict

from lm import build, flops, sharding, step
from lm.decoding.generator import decode_step, prefill
from lm.plan import hlo

PROGRAMS = ("train", "eval", "prefill", "decode")


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
                    f"libtpu {libtpu_version()} refuses an option of lm/startup.py's "
                    f"COMPILER_OPTIONS: {str(error).splitlines()[0]}. constraints.txt has the "
                    "version that they were chosen for"
                ) from None
            raise ValueError(
                f"libtpu {libtpu_version()}'s compiler fails on this program: "
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
    module = hlo.HloModule(
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
    per_chip = {name: total / len(devices) for name, total in model_flops.items()}
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
    model_flops = lambda batch, length, share: {
        name: share
        * batch
        * length
        * flops.model_flops_per_token(program.model_config, length, causal=name == "causal")
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
                model_flops(c.data.batch_size, c.data.length, 1),
            )
        if name == "eval":
            return (
                jax.jit(step.make_token_logprobs(program.graphdef, objective.token_logprobs)),
                (params, program.abstract_batch(c.data.batch_size)),
                model_flops(c.data.batch_size, c.data.length, 1 / 3),
            )
        ids = lambda *shape: jax.ShapeDtypeStruct(
            shape, jnp.int32, sharding=sharding.batch_sharding(program.mesh, len(shape))
        )
        if name == "prefill":
            run = lambda params, *arguments: prefill(
                nnx.merge(program.graphdef, params), *arguments, c.data.length
            )
            return (
                jax.jit(run),
                (params, ids(*prompts), ids(prompts[0])),
                model_flops(*prompts, 1 / 3),
            )
        run = lambda params, token, position, cache: decode_step(
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
            model_flops(prompts[0], 1, 1 / 3),
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
        "versions": {"jax": jax.__version__, "libtpu": libtpu_version()},
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


def libtpu_version() -> str:
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
