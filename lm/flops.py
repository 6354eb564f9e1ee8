"""Model FLOPs, and the share of the devices' peak that a run reaches (MFU)."""

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


def model_flops_per_token(config, length: int, *, causal: bool = True) -> float:
    """Model FLOPs of one token in training (forward and backward), by the matmuls that the model
    needs, recomputation not counted.

    6 per weight of a matmul that the token meets (of the experts, those of one token; 2 forward, 4
    backward; Kaplan et al. 2020, arXiv 2001.08361, section 2.1; the head is one, the embedding
    look-up is none), and 12 N H per layer for each key that a query sees (scores and values;
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B): `length` keys, or half with `causal`,
    since the masked half need not be computed.

    Args:
      config: of lm.models.transformer.
      length: tokens a row. Packed documents count as one sequence of that length.
    """
    c = config
    attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    experts = c.experts_per_token if c.num_experts else 1
    mlp = c.embed_dim * (experts * c.mlp_dim + c.shared_mlp_dim) * (3 if c.gated_mlp else 2)
    router = c.embed_dim * (c.num_experts + (1 if c.shared_mlp_dim else 0))
    table_dim = c.table_dim or c.embed_dim
    projections = 2 * table_dim * c.embed_dim if table_dim != c.embed_dim else 0
    weights = c.num_layers * (attention + mlp + router) + c.vocab_size * table_dim + projections
    window = min(c.window or length, length)
    keys = window - window**2 / (2 * length) if causal else length
    return 6.0 * weights + 12.0 * c.num_layers * c.num_heads * c.head_dim * keys


def mfu(flops_per_second: float, devices) -> float | None:
    """Model FLOPs utilisation: a share of the devices' peak; None on hardware that is not in
    `PEAK_FLOPS`.
    """
    peak = PEAK_FLOPS.get(devices[0].device_kind)
    return flops_per_second / (peak * len(devices)) if peak else None
