"""Start-up that every command shares: which devices, several processes or one, the compilation
cache. Also the compiler's options, by device.
"""

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform as platform_module
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax

import lm
from lm import files

PLATFORMS = ("", "tpu", "gpu", "cpu")
HEARTBEAT_SECONDS = 30  # how long a process may be silent before the others are stopped


# Options of the compiler for the train step, each with its reason.

# On few chips it turns gather + matmul into slow loops.
_NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
# Gathers and scatters run on the SparseCores, beside the matmuls.
_SPARSECORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    # the other way to overlap them, which excludes this one
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_use_tc_device_shape_on_sc": True,  # else they are not offloaded from a megacore chip
}
_V5P_SPARSECORE = _SPARSECORE | {"xla_sc_disable_megacore_partitioning": True}  # v5p is megacore
# Larger tiles, so that matmuls wait less for memory; twice as much gains 1% and compiles in twice
# the time.
_MORE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": 32768}
# Gathers and scatters run beside the matmuls; NVIDIA sets it in its JAX images.
_GPU = {"xla_gpu_enable_latency_hiding_scheduler": True}

# By device kind ("gpu": any). "TPU v5" is v5p, "lite" are the e models.
COMPILER_OPTIONS = {
    "TPU v4": _NO_WINDOWED_EINSUM,
    "TPU v5 lite": _NO_WINDOWED_EINSUM | _MORE_VMEM,
    "TPU v5": _NO_WINDOWED_EINSUM | _MORE_VMEM | _V5P_SPARSECORE,
    "TPU v6 lite": _NO_WINDOWED_EINSUM | _MORE_VMEM | _SPARSECORE,
    "gpu": _GPU,
}


def versions(devices: Sequence[jax.Device]) -> dict[str, str]:
    """What a result was computed with."""
    packages = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")
    }
    python = platform_module.python_version()
    kind = f"{len(devices)} x {devices[0].device_kind}"
    return {"lm": lm.__version__} | packages | {"python": python, "devices": kind}


def compiler_options(device: jax.Device) -> dict | None:
    """jax.jit's compiler_options of the train step."""
    return COMPILER_OPTIONS.get("gpu" if device.platform == "gpu" else device.device_kind)


def start(platform: str = "", processes: tuple[str, int, int] | None = None) -> list[jax.Device]:
    """Takes TPU, else GPU, else CPU (or the one asked for), joins the other processes of a pod, and
    logs what it took and why.

    Args:
      processes: (address of process 0, number of processes, which one this is), where the
        environment doesn't say.

    Returns:
      All devices, those of other processes included.

    Raises:
      ValueError: an unknown platform, or one that is not there.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"config.platform = {platform!r}; valid: {list(PLATFORMS)}")
    order_simulated_collectives()
    if platform:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))
    _join_processes(processes)

    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise ValueError(
            f"config.platform = {platform!r}, but it can't be used: {str(error).splitlines()[0]}. "
            f"{_missing()}"
        ) from None
    kind = devices[0].platform
    if platform:
        why = "config.platform asks for it"
    elif kind == "cpu":
        why = _missing()
    else:
        why = "the first of TPU, GPU, CPU that is here"
    logging.info(
        "running on %d x %s (%s), %d process(es): %s",
        len(devices),
        devices[0].device_kind,
        kind,
        jax.process_count(),
        why,
    )
    if jax.process_index():
        logging.getLogger().setLevel(logging.WARNING)

    jax.config.update("jax_compilation_cache_dir", compilation_cache(kind))
    return devices


def compilation_cache(kind: str) -> str | None:
    """Where compiled programs are kept: JAX_COMPILATION_CACHE_DIR, or ~/.cache/lm/xla.

    A CPU's program is bound to its instruction set: on a machine without one of its instructions
    XLA complains in the log, and runs it until it crashes. So each kind of CPU has a folder of its
    own, and a copy from another machine is not looked at.

    Args:
      kind: "tpu", "gpu" or "cpu".

    Returns:
      The folder; None for a CPU that doesn't say what it is.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or files.expand("~/.cache/lm/xla")
    if kind != "cpu":
        return folder
    described = _describe_cpu(CPU_INFO.read_text() if CPU_INFO.exists() else "")
    if not described:
        return None
    identity = [importlib.metadata.version("jaxlib"), platform_module.machine(), *described]
    return f"{folder}/cpu-{files.short_hash(json.dumps(identity).encode())}"


CPU_INFO = Path("/proc/cpuinfo")
# What says for which machine LLVM compiles: on x86, then on Arm.
_CPU_KEYS = (
    "vendor_id",
    "cpu family",
    "model",
    "flags",
    "CPU implementer",
    "CPU variant",
    "CPU part",
    "Features",
)


def _describe_cpu(info: str) -> list[str]:
    """The lines of /proc/cpuinfo that say what kind of CPU it is, those of unequal cores too; none
    where there is no instruction set among them.
    """
    found = set()
    for line in info.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in _CPU_KEYS:
            found.add(f"{key.strip()}: {' '.join(sorted(value.split()))}")
    has_instructions = any(line.startswith(("flags: ", "Features: ")) for line in found)
    return sorted(found) if has_instructions else []


def order_simulated_collectives() -> None:
    """Makes the devices that XLA_FLAGS simulates on a CPU run their collectives in one order.

    XLA lets a collective run beside a loop that has collectives too, and a program beside the one
    before it. On busy cores each device then comes to them in its own order, and all wait for ever.
    Call it before jax makes its devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        return
    if "xla_cpu_scheduler_type" not in flags:
        scheduler = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
        os.environ["XLA_FLAGS"] = f"{flags} {scheduler}"
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def leave(code: int) -> None:
    """Ends this process at once after an error, if an orderly end would wait for what may not come.

    One of several processes would wait for the others, which may wait for it in the middle of a
    step; so they notice that it is gone. After a save that failed, threads of Orbax wait for
    minutes for the rest of it.
    """
    # Checked first, since jax.process_count() alone would start the devices.
    one_of_several = jax.distributed.is_initialized() and jax.process_count() > 1
    if one_of_several:
        # Where all processes meet the same error, this gives each the time to print it before one's
        # exit stops the others.
        time.sleep(1)
    if one_of_several or _threads_of_orbax():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _threads_of_orbax() -> list[threading.Thread]:
    """Those that the end of this process would wait for."""
    waited_for = [thread for thread in threading.enumerate() if not thread.daemon]
    return [thread for thread in waited_for if type(thread).__module__.startswith("orbax.")]


def _missing() -> str:
    """Why neither TPU nor GPU is used."""
    if importlib.util.find_spec("libtpu"):
        tpu = "libtpu finds none"
    else:
        tpu = "no TPU support installed (pip install -e '.[tpu]')"
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if any(importlib.util.find_spec(plugin) for plugin in plugins):
        gpu = "CUDA finds none"
    else:
        gpu = "no GPU support installed (pip install -e '.[cuda]')"
    return f"TPU: {tpu}; GPU: {gpu}"


def _join_processes(processes: tuple[str, int, int] | None) -> None:
    """Starts jax.distributed where there are several processes.

    On Cloud TPU, GKE and Slurm the environment says so. Elsewhere `processes` does, or three
    variables: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.
    """
    if processes and not 0 <= processes[2] < processes[1]:
        raise ValueError(
            f"--coordinator={processes[0]} needs --num_processes and a --process_id from 0 to "
            f"below it; got {processes[1]} and {processes[2]}"
        )

    env = os.environ
    several = (
        bool(processes)
        or len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or "JAX_COORDINATOR_ADDRESS" in env
        or int(env.get("SLURM_NTASKS", "1")) > 1
    )
    on_tpu_vm = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    on_tpu = on_tpu_vm and importlib.util.find_spec("libtpu")
    if jax.distributed.is_initialized() or not (several or on_tpu):
        return

    explicit = {}
    if processes:
        names = ("coordinator_address", "num_processes", "process_id")
        explicit = dict(zip(names, processes))
    elif "JAX_NUM_PROCESSES" in env:
        explicit["num_processes"] = int(env["JAX_NUM_PROCESSES"])
        explicit["process_id"] = int(env["JAX_PROCESS_ID"])

    # On CPU, programs dispatched one after the other may overlap, and their messages to another
    # process get mixed up.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**explicit, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError:
        if several:
            raise
        logging.info("a TPU machine of its own, not a worker of a pod")  # Colab, for instance
