"""Compiles a configuration's programs for a TPU pod, without one, and reports what they take.

libtpu's compiler runs on any x86-64 Linux machine (pip install -e '.[plan]'). Memory, FLOPs,
collectives and kernels are its facts; times are models of them (lm/plan/hlo.py), given as a range.
"""

import collections
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from ml_collections import ConfigDict

from lm import build, sharding, step
from lm import config as config_lib
from lm.decoding import batched
from lm.decoding.generator import decode_step, prefill
from lm.plan import hlo, search
from lm.rl import rollouts

PROGRAMS = ("train", "eval", "scores", "reshard", "prefill", "decode")
ROLLOUT_LOADER = "lm.rl.rollouts.RolloutLoader"
# Tokens of the prompts that the prefill program is compiled for, at most.
PROMPT_LENGTH = 1024
# Dims of a pod's torus, by the generation of TPU.
TORUS_DIMS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
# No lock file, no metadata server, no noise.
LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


class DoesNotFit(MemoryError):
    """A program that is too big for a chip. The message says what is big and what helps.

    `needed_gib` is what a train step needs by the compiler's count, 0 if it doesn't say.
    """

    def __init__(self, message: str, needed_gib: float = 0.0):
        super().__init__(message)
        self.needed_gib = needed_gib


# The pod and the compiler


def describe(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a described topology, such as "v5p:4x4x8", in `slices` such slices.

    Raises:
      ValueError: no libtpu, no such topology.
    """
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    generation, _, shape = topology.partition(":")
    sides = shape.split("x")
    if not all(side.isdigit() for side in sides) or len(sides) != TORUS_DIMS.get(generation):
        raise ValueError(
            f"--topology={topology}; wanted v4:XxYxZ, v5p:XxYxZ, v5e:XxY or v6e:XxY, such as "
            "v5p:4x4x8 (chips in each dim of the torus)"
        )

    options = {}
    if generation == "v4":
        # Megacore makes one device of a chip's two cores.
        options.update(chips_per_host_bounds=(2, 2, 1), chip_config_name="megacore")
    if math.prod(int(side) for side in sides) == 1:
        # A single chip is a host of its own; by default hosts hold 2x2.
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices

    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except Exception as error:
        first_line = str(error).splitlines()[0]
        if "libtpu" in str(error):
            raise ValueError(
                "compiling for TPUs needs libtpu: pip install -e '.[plan]' (x86-64 Linux). "
                f"{first_line}"
            ) from None
        raise ValueError(
            f"--topology={topology} --slices={slices} can't be described: {first_line}. Sides are "
            "even on pods (hosts hold 2x2 chips), such as v5e:4x4, v5p:4x4x8"
        ) from None


def memory_limit_gib(devices: Sequence[jax.Device]) -> float:
    """What a program may use of a chip's memory."""
    return hlo.CHIPS[devices[0].device_kind].memory / 2**30


def libtpu_version() -> str:
    return metadata.version("libtpu")


class Compiled(NamedTuple):
    """A compiled program with what is read off the compiler's dump."""

    executable: jax.stages.Compiled
    hlo_text: str  # optimized and scheduled
    largest_buffers: list[str]
    seconds: float  # that the compiler took


def compile_program(jitted, *arguments) -> Compiled:
    """Compiles a jitted function for abstract arguments.

    Raises:
      MemoryError: it doesn't fit; the compiler's words.
      ValueError: the compiler refuses an option, or fails.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            # The text is read from a dump: `as_text` fails on programs with parts on the
            # SparseCore.
            executable = jitted.lower(*arguments).compile(
                compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            )
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if "RESOURCE_EXHAUSTED" in message or "Ran out of memory" in message:
                raise MemoryError(message) from None
            if "option" in message or "FAILED_PRECONDITION" in message:
                raise ValueError(
                    f"libtpu {libtpu_version()} refuses an option of lm/startup.py's "
                    f"COMPILER_OPTIONS: {message.splitlines()[0]}. constraints.txt has the "
                    "version that they were chosen for"
                ) from None
            raise ValueError(
                f"libtpu {libtpu_version()}'s compiler fails on this program: "
                f"{message.splitlines()[0]}. Another mesh, remat or number of microbatches may do"
            ) from error
        seconds = time.monotonic() - began

        # Other modules may be dumped beside the program; it is the largest.
        text = _largest_file(folder, "*after_codegen.txt").read_text()
        usage = _largest_file(folder, "*memory-usage-report.txt").read_text()

    # Rows are "cumulative size(share); size; offset; values; shapes", the largest first.
    row = r"^\s*[\d.]+[KMG]iB\(\s*\d+%\);\s*([\d.]+[KMG]iB);.*;\s*(.*)$"
    buffers = re.findall(row, usage, re.M)[:8]
    largest_buffers = [f"{size} {shapes[:90]}" for size, shapes in buffers]
    return Compiled(executable, text, largest_buffers, seconds)


def _largest_file(folder: str, pattern: str) -> Path:
    return max(Path(folder).glob(pattern), key=lambda path: path.stat().st_size)


# The programs


class ModelFlops(NamedTuple):
    """Model FLOPs of a program, on all chips together."""

    causal: float  # attention's masked half not counted
    full: float


class _Job(NamedTuple):
    """A program to compile."""

    jitted: Callable
    arguments: tuple  # abstract, with shardings
    model_flops: ModelFlops


def _model_flops(
    program: build.Program, rows: int, length: int, *, backward: bool = False, **counted
) -> ModelFlops:
    """Model FLOPs of `rows` rows of `length` tokens; `counted` is for the model's function."""

    def total(causal: bool) -> float:
        per_token = program.flops_per_token(length, causal=causal, backward=backward, **counted)
        return rows * length * per_token

    return ModelFlops(causal=total(True), full=total(False))


def _train_job(config: ConfigDict, program: build.Program) -> _Job:
    batch = program.abstract_batch(config.data.batch_size)
    return _Job(
        program.train_step,
        (program.abstract_state, batch, program.abstract_fixed),
        _model_flops(program, config.data.batch_size, config.data.length, backward=True),
    )


def _eval_job(config: ConfigDict, program: build.Program) -> _Job:
    token_logprobs = step.make_token_logprobs(program.graphdef, program.objective.token_logprobs)
    batch = program.abstract_batch(config.data.batch_size)
    rows, length = config.data.batch_size, config.data.length
    return _Job(
        jax.jit(token_logprobs),
        (program.abstract_params, batch),
        _model_flops(program, rows, length, **_all_logits(config)),
    )


def _abstract_ids(program: build.Program, *shape: int) -> jax.ShapeDtypeStruct:
    """Integers for each row of a batch, split over the chips as batches are."""
    layout = sharding.batch_sharding(program.mesh, ("length",)[: len(shape) - 1])
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout)


def _check_decodes(program: build.Program, name: str) -> None:
    """Raises ValueError for a model whose decoding isn't planned."""
    if build.reads_sources(program.model_config):
        raise ValueError(
            f"the program {name!r} of a model that reads sources isn't planned; wanted train, eval"
        )


def _is_policy(config: ConfigDict) -> bool:
    return config.data.loader == ROLLOUT_LOADER


def _all_logits(config: ConfigDict) -> dict[str, float]:
    """What is counted where a policy's head sees each token, and not those of its texts alone."""
    return {"head": 1.0} if _is_policy(config) else {}


def _slots(config: ConfigDict, program: build.Program) -> int:
    """Rows of a rollout that are decoded together, as `lm.decoding.batched.draw` has them.

    Raises:
      ValueError: the mesh can't divide them.
    """
    c = config.rollout
    prompts = config.data.batch_size * c.steps // c.samples
    slots = batched.board_layout(prompts, c.samples, c.slots).slots
    if slots % sharding.batch_parts(program.mesh):
        raise ValueError(
            f"config.rollout.slots = {c.slots}: {slots} texts are decoded together, and the mesh "
            f"has {sharding.batch_parts(program.mesh)} parts; wanted a multiple of these"
        )
    return slots


def _check_policy(config: ConfigDict, name: str) -> None:
    """Raises ValueError for a model that isn't trained on texts of its own."""
    if not _is_policy(config):
        raise ValueError(
            f"the program {name!r} is one of rollouts: wanted config.data.loader = "
            f"{ROLLOUT_LOADER!r}"
        )


def _scores_job(config: ConfigDict, program: build.Program) -> _Job:
    """What a rollout asks of a batch of its texts, such as the reference's log-probabilities."""
    _check_policy(config, "scores")
    scores = rollouts.make_scores(program)
    if scores is None:
        raise ValueError("the program 'scores': this objective asks nothing of texts beforehand")

    others = {name: other.params for name, other in program.others.items()}
    batch = program.abstract_batch(config.data.batch_size)
    return _Job(
        jax.jit(scores),
        (program.abstract_params, batch, others),
        _model_flops(program, config.data.batch_size, config.data.length),
    )


def _reshard_job(config: ConfigDict, program: build.Program) -> _Job:
    """The parameters from their layout in training to that of rollouts."""
    _check_policy(config, "reshard")
    reshard = rollouts.make_reshard(program)

    if reshard is None:
        raise ValueError(
            "the program 'reshard': the parameters' layout in rollouts is that of training "
            "(config.rollout.reshard, and a mesh that splits them)"
        )
    return _Job(reshard, (program.abstract_params,), ModelFlops(0.0, 0.0))


def _decoded_params(config: ConfigDict, program: build.Program):
    """The abstract parameters as texts are decoded with them."""
    layout = rollouts.layout_of(program) if _is_policy(config) else None
    if layout is None:
        return program.abstract_params

    def lay_out(leaf, sharding_):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_)

    return jax.tree.map(lay_out, program.abstract_params, layout)


def _prefill_job(config: ConfigDict, program: build.Program) -> _Job:
    """Prefill of a prompt a chip."""
    _check_decodes(program, "prefill")
    rows = len(program.devices)
    length = min(PROMPT_LENGTH, config.data.length)
    if _is_policy(config):
        length = config.data.length - config.rollout.max_new_tokens

    def run(params, prompts_BT, lengths_B):
        model = nnx.merge(program.graphdef, params)
        return prefill(model, prompts_BT, lengths_B, config.data.length)[:2]

    prompts_BT = _abstract_ids(program, rows, length)
    lengths_B = _abstract_ids(program, rows)
    return _Job(
        jax.jit(run),
        (_decoded_params(config, program), prompts_BT, lengths_B),
        _model_flops(program, rows, length, **_all_logits(config)),
    )


def _decode_job(config: ConfigDict, program: build.Program) -> _Job:
    """A decode step of a row a chip, or of a rollout's slots, with a cache of config.data.length
    positions.
    """
    _check_decodes(program, "decode")
    rows = _slots(config, program) if _is_policy(config) else len(program.devices)
    params = _decoded_params(config, program)

    def init_cache(params):
        return nnx.merge(program.graphdef, params).init_cache(rows, config.data.length)

    def run(params, token_B, position_B, cache):
        return decode_step(nnx.merge(program.graphdef, params), token_B, position_B, cache)[:2]

    spec = sharding.spec(("layers", "batch", None, "act_heads", None), program.mesh)
    layout = jax.sharding.NamedSharding(program.mesh, spec)

    def lay_out(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=layout)

    cache = jax.tree.map(lay_out, jax.eval_shape(init_cache, params))
    ids_B = _abstract_ids(program, rows)
    return _Job(
        jax.jit(run, donate_argnums=3),
        (params, ids_B, ids_B, cache),
        _model_flops(program, rows, 1, **_all_logits(config)),
    )


_JOBS = {
    "train": _train_job,
    "eval": _eval_job,
    "scores": _scores_job,
    "reshard": _reshard_job,
    "prefill": _prefill_job,
    "decode": _decode_job,
}


# The report


def _total_steps(config: ConfigDict) -> int | None:
    """Steps of the run; None where they hang on the corpus (epochs)."""

    def no_corpus(epochs):
        raise LookupError

    batch_tokens = config.data.batch_size * config.data.length
    try:
        return config_lib.total_steps(
            config.train.length, batch_tokens=batch_tokens, steps_of_epochs=no_corpus
        )
    except LookupError:
        return None


def _collective_rows(collectives: list[hlo.Collective]) -> dict[str, dict]:
    """What the collectives of one opcode, axes and manner take together."""
    rows = collections.defaultdict(lambda: dict(count=0, wire_gb=0.0, ms=0.0, exposed_ms=0.0))
    for collective in collectives:
        # Nothing is sent in a group of one device.
        if not collective.axes:
            continue
        axes = "+".join(collective.axes)
        manner = "asynchronous" if collective.asynchronous else "synchronous"
        row = rows[f"{collective.opcode} over {axes}, {manner}"]
        row["count"] += collective.count
        row["wire_gb"] += collective.count * (collective.interconnect_bytes / 1e9)
        row["ms"] += collective.count * (collective.seconds * 1e3)
        row["exposed_ms"] += collective.count * (collective.exposed * 1e3)

    rounded = {}
    for name, row in sorted(rows.items()):
        rounded[name] = {key: round(value, 6) for key, value in row.items()}
    return rounded


def _job_report(program: build.Program, job: _Job) -> dict:
    """What one of PROGRAMS takes on each chip, in JSON's types."""
    with jax.set_mesh(program.mesh):
        compiled = compile_program(job.jitted, *job.arguments)

    devices = list(program.mesh.devices.flat)
    chip = hlo.CHIPS[program.devices[0].device_kind]

    module = hlo.HloModule(
        compiled.hlo_text,
        chip,
        [(getattr(device, "slice_index", 0), *device.coords) for device in devices],
        dict(program.mesh.shape),
    )

    costs = {model: module.cost(model) for model in hlo.MODELS}
    # The breakdown and the exposed times are the calibrated model's.
    calibrated = costs["calibrated"]
    sent_bytes = sum(c.count * c.interconnect_bytes for c in calibrated.collectives)

    memory = compiled.executable.memory_analysis()
    causal_flops = job.model_flops.causal / len(devices)
    full_flops = job.model_flops.full / len(devices)
    return {
        "memory_gib": memory.peak_memory_in_bytes / 2**30,
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30,
        "host_gib": memory.host_temp_size_in_bytes / 2**30,
        "limit_gib": chip.memory / 2**30,
        "largest_buffers": compiled.largest_buffers,
        "model_tflops": causal_flops / 1e12,
        "model_tflops_full_attention": full_flops / 1e12,
        "executed_tflops": (calibrated.flops + calibrated.kernel_flops) / 1e12,
        "hbm_gb": calibrated.hbm_bytes / 1e9,
        "wire_gb": sent_bytes / 1e9,
        "kernels": dict(sorted(calibrated.kernels.items())),
        "collectives": _collective_rows(calibrated.collectives),
        "step_ms": {model: cost.seconds * 1e3 for model, cost in costs.items()},
        "mfu": {
            model: causal_flops / chip.peak_flops / cost.seconds for model, cost in costs.items()
        },
        "breakdown_ms": {name: value * 1e3 for name, value in calibrated.time.most_common()},
        "not_timed": sorted(module.notes),
        "compile_seconds": compiled.seconds,
    }


def _gib_per_device(tree) -> float:
    """Memory that abstract arrays with shardings take on each device."""
    nbytes = 0
    for leaf in jax.tree.leaves(tree):
        nbytes += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return nbytes / 2**30


def plan(
    config: ConfigDict,
    topology: str,
    slices: int = 1,
    *,
    programs: Sequence[str] = ("train",),
    progress: Callable[[str], None] = search.show_nothing,
) -> dict:
    """Compiles a configuration for a pod.

    Args:
      programs: of `PROGRAMS`.

    Returns:
      The report, in JSON's types: the run, and what each program takes on a chip.

    Raises:
      ValueError: a configuration that can't run there.
      DoesNotFit: one that doesn't fit, with what is big and what to change.
    """
    if unknown := sorted(set(programs) - set(PROGRAMS)):
        raise ValueError(f"no programs {unknown}; valid: {list(PROGRAMS)}")
    config_lib.check(config)
    devices = describe(topology, slices)
    if not config.model.vocab_size:
        raise ValueError(
            "config.model.vocab_size = 0 (the tokenizer's): there is no tokenizer here; set "
            "config.model.vocab_size"
        )

    # The learning rate's schedule needs a length; where that hangs on the corpus, any will do.
    total_steps = _total_steps(config)
    program = build.program(
        config, devices, config.model.vocab_size, total_steps or 10**6, make_other=_other_model
    )
    params = program.abstract_params
    report = {
        "topology": topology,
        "slices": slices,
        "chips": len(devices),
        "mesh": {axis: size for axis, size in program.mesh.shape.items() if size > 1},
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "batch": [config.data.batch_size, config.data.length],
        "parameters_gib": _gib_per_device(params),
        "optimizer_gib": _gib_per_device(program.abstract_state.opt_state),
        "versions": {"jax": jax.__version__, "libtpu": libtpu_version()},
    }

    for name in programs:
        progress(f"compiling the {name} program for {len(devices)} x {devices[0].device_kind}")
        try:
            report[name] = _job_report(program, _JOBS[name](config, program))
        except MemoryError as error:
            raise _does_not_fit(config, name, str(error)) from None

    if "train" in report:
        report |= _run_report(report["train"], config, len(devices), total_steps)
    if {"train", "prefill", "decode"} <= set(report) and _is_policy(config):
        report |= _rollout_report(report, config, program)
    return report


def _other_model(
    config: ConfigDict, name: str, devices: Sequence[jax.Device], vocab_size: int
) -> build.AbstractModel:
    """A model of config.models, taken to be as the one that is trained, which a reference is: no
    checkpoint is read.
    """
    other = config.copy_and_resolve_references().unlock()
    other.model.update(config.models[name].model)
    return build.abstract_model(other, devices, vocab_size)


def _rollout_report(report: dict, config: ConfigDict, program: build.Program) -> dict:
    """What a rollout takes whose texts are all as long as can be, and the steps that learn from it:
    milliseconds by model.
    """
    c = config.rollout
    texts = config.data.batch_size * c.steps
    times = dict(
        prefill=math.ceil(texts / c.samples / report["chips"]),
        decode=math.ceil(texts / _slots(config, program)) * c.max_new_tokens,
        scores=c.steps,
        reshard=1,
    )
    compiled = {name: count for name, count in times.items() if name in report}

    rollout_ms, update_ms, ratios = {}, {}, {}
    for model, step_ms in report["train"]["step_ms"].items():
        rollout_ms[model] = 0.0
        for name, count in compiled.items():
            rollout_ms[model] += count * report[name]["step_ms"][model]
        update_ms[model] = c.steps * c.epochs * step_ms
        ratios[model] = rollout_ms[model] / update_ms[model]

    return dict(rollout_ms=rollout_ms, update_ms=update_ms, rollout_to_update=ratios)


def _run_report(train: dict, config: ConfigDict, chips: int, total_steps: int | None) -> dict:
    """What the whole run takes, by the report of its train step."""
    batch_tokens = config.data.batch_size * config.data.length
    step_ms = train["step_ms"]
    report = {
        "tokens_per_second_per_chip": {
            model: batch_tokens / chips / ms * 1e3 for model, ms in step_ms.items()
        }
    }

    if total_steps:
        tokens = batch_tokens * total_steps
        report["tokens"] = tokens
        report["days"] = {
            model: tokens / batch_tokens * ms / 1e3 / 86400 for model, ms in step_ms.items()
        }
        report["chip_hours"] = {model: days * 24 * chips for model, days in report["days"].items()}

    report["in_words"] = summary(train)
    return report


def _does_not_fit(config: ConfigDict, program_name: str, compiler_message: str) -> DoesNotFit:
    """The error of a program that the compiler finds too big."""
    used = re.search(r"Used ([\d.]+)([MG]) of ([\d.]+[MG]) hbm", compiler_message) or re.search(
        r"\(([\d.]+)([MG])\) exceeds available HBM \(([\d.]+[MG])\)", compiler_message
    )
    if used:
        amount, unit, limit = used.groups()
        needed = f"{amount}{unit} of {limit}"
    else:
        needed = compiler_message.splitlines()[0]

    buffers = re.findall(r"Size: ([\d.]+[MG])\s[\s\S]*?Shape: (\S+)", compiler_message)[:3]
    largest = ", ".join(f"{size} {shape}" for size, shape in buffers) or "unknown"

    remedies = []
    if program_name == "train":
        if config.model.remat != "full":
            remedies.append(
                "keep less for the backward pass (config.model.remat with fewer names, or 'full')"
            )
        if not config.objective.chunk:
            chunk = max(config.data.length // 4, 1)
            remedies.append(f"chunk the loss (config.objective.chunk={chunk})")
        accumulation = config.train.accumulation * 2
        remedies.append(f"smaller microbatches (config.train.accumulation={accumulation})")
    remedies.append("more chips, or a smaller batch")

    needed_gib = 0.0
    if used and program_name == "train":
        needed_gib = float(amount) / (1 if unit == "G" else 1024)
    return DoesNotFit(
        f"the {program_name} program does not fit: {needed}. Largest: {largest}. What helps: "
        f"{'; '.join(remedies)}.",
        needed_gib,
    )


def summary(train: dict) -> str:
    """What bounds a train step, by its report, and what to change."""
    breakdown_ms = train["breakdown_ms"]
    total_ms = sum(breakdown_ms.values())
    waiting = {name: ms for name, ms in breakdown_ms.items() if name.startswith("waiting")}
    waiting_ms = sum(waiting.values())

    def share(ms: float) -> str:
        return f"{ms / total_ms:.0%}"

    experts_ms = breakdown_ms.get("experts' matmuls")
    experts = "" if experts_ms is None else f"experts' {share(experts_ms)}, "
    shares = (
        f"Matmuls take {share(breakdown_ms.get('matmuls', 0))} of the step, {experts}attention "
        f"kernels {share(breakdown_ms.get('kernels', 0))}, other compute "
        f"{share(breakdown_ms.get('other compute', 0))}, waiting for transfers "
        f"{share(waiting_ms)}."
    )

    # Waiting is looked at first, then what is computed twice.
    recomputed = train["executed_tflops"] / train["model_tflops"] - 1
    free_gib = train["limit_gib"] - train["memory_gib"]
    if waiting_ms > 0.15 * total_ms:
        slowest = max(waiting, key=waiting.get).removeprefix("waiting for ")
        advice = (
            f"It is bound by communication (mostly {slowest}): more rows a chip hide it, or a mesh "
            "with smaller groups."
        )
    elif recomputed > 0.12 and free_gib > 0.1 * train["limit_gib"]:
        advice = (
            f"It computes {recomputed:.0%} more than the model needs, and {free_gib:.0f} GiB are "
            "free: keep more results (config.model.remat)."
        )
    elif recomputed > 0.12:
        advice = (
            f"It computes {recomputed:.0%} more than the model needs, for memory's sake: more "
            "chips or smaller microbatches would let it keep more."
        )
    else:
        advice = "It is bound by the matrix units, as it should be."
    return f"{shares} {advice}"
