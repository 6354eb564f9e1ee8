"""The share of the devices' peak that a run reaches (MFU). A model's FLOPs are its module's to
count (lm/models/).
"""

# Dense bf16 FLOP/s of one jax device, from the vendors' data sheets. On v2 and v3 a device is one
# of a chip's two cores, on tpu7x too.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def mfu(flops_per_second: float, devices) -> float | None:
    """Model FLOPs utilisation: a share of the devices' peak; None on hardware that is not in
    `PEAK_FLOPS`.
    """
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    return flops_per_second / (peak * len(devices)) if peak else None
