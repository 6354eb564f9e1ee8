"""Start-up that every command shares: which devices, several processes or one, the compilation
cache.
"""

import importlib.metadata
import importlib.util
import logging
import os
import platform as platform_module
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

import lm

PLATFORMS = ("", "tpu", "gpu", "cpu")
HEARTBEAT_SECONDS = 30  # how long a process may be silent before the others are stopped


# Options of the compiler for the train step, by device kind ("gpu": any), each with its reason.
# "TPU v5" is v5p, "lite" are the e models.
# on few chips it turns gather + matmul into slow loops
_NO_WINDOWED_EINSUM = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
_SPARSECORE = {  # gathers and scatters run on the SparseCores, beside the matmuls
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    # the other way to overlap them, which excludes this one
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_use_tc_device_shape_on_sc": True,  # else they are not offloaded from a megacore chip
}
# Larger tiles, so that matmuls wait less for memory; twice as much gains 1% and compiles in twice
# the time.
_MORE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": 32768}
COMPILER_OPTIONS = {
    "TPU v4": _NO_WINDOWED_EINSUM,
    "TPU v5 lite": _NO_WINDOWED_EINSUM | _MORE_VMEM,
    # it is one
    "TPU v5": _NO_WINDOWED_EINSUM
    | _MORE_VMEM
    | _SPARSECORE
    | {"xla_sc_disable_megacore_partitioning": True},
    "TPU v6 lite": _NO_WINDOWED_EINSUM | _MORE_VMEM | _SPARSECORE,
    # gathers and scatters run beside the matmuls; NVIDIA sets it in its JAX images
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


def versions(devices: Sequence[jax.Device]) -> dict[str, str]:
    """What a result was computed with."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return (
        {"lm": lm.__version__}
        | found
        | {
            "python": platform_module.python_version(),
            "devices": f"{len(devices)} x {devices[0].device_kind}",
        }
    )


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
    found = devices[0].platform
    if platform:
        why = "config.platform asks for it"
    elif found == "cpu":
        why = _missing()
    else:
        why = "the first of TPU, GPU, CPU that is here"
    logging.info(
        "running on %d x %s (%s), %d process(es): %s",
        len(devices),
        devices[0].device_kind,
        found,
        jax.process_count(),
        why,
    )
    if jax.process_index():
        logging.getLogger().setLevel(logging.WARNING)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path("~/.cache/lm/xla").expanduser())
    if found != "cpu":  # CPU executables are bound to the machine's exact instruction set
        jax.config.update("jax_compilation_cache_dir", cache)
    return devices


def leave(code: int) -> None:
    """Ends this process at once if it is one of several. An orderly end would wait for the others,
    which may wait for this one in the middle of a step; so they notice that it is gone.
    """
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        # an error that all of them meet is told by each before the first one's end stops them
        time.sleep(1)
        os._exit(code)


def _missing() -> str:
    tpu = (
        "libtpu finds none"
        if importlib.util.find_spec("libtpu")
        else "no TPU support installed (pip install 'lm[tpu]')"
    )
    cuda = importlib.util.find_spec("jax_cuda13_plugin") or importlib.util.find_spec(
        "jax_cuda12_plugin"
    )
    gpu = "CUDA finds none" if cuda else "no GPU support installed (pip install 'lm[cuda]')"
    return f"TPU: {tpu}; GPU: {gpu}"


def _join_processes(processes: tuple[str, int, int] | None) -> None:
    """jax.distributed, where there are several processes: on Cloud TPU, GKE and Slurm the
    environment says so.
    """
    env = os.environ
    if processes and not 0 <= processes[2] < processes[1]:
        raise ValueError(
            f"--coordinator={processes[0]} needs --num_processes and a --process_id from 0 to "
            f"below it; got {processes[1]} and {processes[2]}"
        )
    several = (
        bool(processes)
        or len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or "JAX_COORDINATOR_ADDRESS" in env
        or int(env.get("SLURM_NTASKS", "1")) > 1
    )
    on_tpu_vm = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    if jax.distributed.is_initialized() or not (
        several or (on_tpu_vm and importlib.util.find_spec("libtpu"))
    ):
        return
    # TPU pods and Slurm say who is who; elsewhere these three variables do:
    # JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.
    if processes:
        explicit = dict(
            coordinator_address=processes[0], num_processes=processes[1], process_id=processes[2]
        )
    else:
        explicit = (
            dict(num_processes=int(env["JAX_NUM_PROCESSES"]), process_id=int(env["JAX_PROCESS_ID"]))
            if "JAX_NUM_PROCESSES" in env
            else {}
        )
    # On CPU, programs dispatched one after the other may overlap, and their messages to another
    # process get mixed up.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**explicit, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError:
        if several:
            raise
        logging.info("a TPU machine of its own, not a worker of a pod")  # Colab, for instance
