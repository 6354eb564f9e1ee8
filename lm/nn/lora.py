"""LoRA: low-rank adapters beside the weights of dense layers (Hu et al. 2021, arXiv 2106.09685,
section 4.1).

A layer computes W x + s B A x. A is drawn and B is 0, so that the model begins as it was. A and B
are f32, whatever W is: in bf16 their small updates would be lost.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

# The weights that may have adapters, as the layers call them.
TARGETS = ("query", "key", "value", "out", "up", "gate", "down")
PARAMS = "*_lora_?"  # what the adapters' parameters are called
_A, _B = "_lora_a", "_lora_b"
_KEY = 2**31 - 1

_is_off = contextvars.ContextVar("lora_is_off", default=False)


class Adapted(NamedTuple):
    """A weight and its adapter, as `lm.nn.layers.dense` takes them."""

    weight: nnx.Param
    a: nnx.Param  # [inputs, rank]
    b: nnx.Param  # [rank, outputs]
    scale: float


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Models compute without their adapters in here."""
    token = _is_off.set(True)
    try:
        yield
    finally:
        _is_off.reset(token)


def is_adapter(path: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return path.endswith((_A, _B))


def parse_targets(targets: str) -> tuple[str, ...]:
    """Returns the names of config.model.lora_targets.

    Raises:
      ValueError: others than `TARGETS`.
    """
    names = tuple(filter(None, targets.split(",")))
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise ValueError(
            f"config.model.lora_targets = {targets!r}: {unknown}; valid: names of {list(TARGETS)} "
            "with commas between them"
        )
    return names


def scale_of(rank: int, alpha: float, scaling: str) -> float:
    """The factor of an adapter's output: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023,
    arXiv 2312.03732, equation 2).
    """
    return alpha / (rank if scaling == "plain" else math.sqrt(rank))


def scale(config) -> float:
    """That of a Config of lm.models.transformer."""
    return scale_of(config.lora_rank, config.lora_alpha, config.lora_scaling)


def names(path: str) -> tuple[str, str]:
    """The paths of A and of B of the weight at a path."""
    return path + _A, path + _B


def weight_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """path -> shape of the weights, stacked over layers, whose adapters `params` has."""
    shapes = {}
    for path in params:
        if path.endswith(_A):
            path = path.removesuffix(_A)
            a_name, b_name = names(path)
            shapes[path] = (*params[a_name].shape[:-1], *params[b_name].shape[2:])
    return shapes


def attach(module: nnx.Module, key: jax.Array, config, num_inputs: Mapping[str, int]) -> None:
    """Gives weights of a module their adapters, where the configuration targets them.

    Args:
      config: of lm.models.transformer.
      num_inputs: the weight's attribute -> how many of its first dims are inputs.
    """
    if not config.lora_rank:
        return
    targets = parse_targets(config.lora_targets)
    module.lora_scale = scale(config)
    # A key of its own: fold_in(key, i) is split(key)[i], by which weights are drawn.
    key = jax.random.fold_in(key, _KEY)
    for number, (name, inputs) in enumerate(num_inputs.items()):
        weight = getattr(module, name)
        if name not in targets or weight is None:
            continue

        shape, axes = weight.shape, weight.get_metadata("logical_axes")
        fan_in = math.prod(shape[:inputs])
        a_shape = (*shape[:inputs], config.lora_rank)
        # As wide as PyTorch draws a layer's weights, Uniform(-1, 1) / sqrt(inputs).
        std = 1 / math.sqrt(3 * fan_in)

        draw = jax.random.normal(jax.random.fold_in(key, number), a_shape, jnp.float32)
        a = nnx.Param(std * draw, logical_axes=(*axes[:inputs], "rank"))
        b = jnp.zeros((config.lora_rank, *shape[inputs:]), jnp.float32)
        setattr(module, name + _A, a)
        setattr(module, name + _B, nnx.Param(b, logical_axes=("rank", *axes[inputs:])))


def of(module: nnx.Module, name: str) -> nnx.Param | Adapted:
    """A module's weight, with its adapter if it has one that isn't off."""
    weight = getattr(module, name)
    a = getattr(module, name + _A, None)
    if a is None or _is_off.get():
        return weight
    return Adapted(weight, a, getattr(module, name + _B), module.lora_scale)


def specs(spec: str, num_inputs: int) -> tuple[str, str]:
    """The einsums of A and of B for that of a weight: "btd,dnh->btnh" gives "btd,dr->btr" and
    "btr,rnh->btnh".
    """
    inputs, out = spec.split("->")
    x_dims, weight_dims = inputs.split(",")
    contracted, others = weight_dims[:num_inputs], weight_dims[num_inputs:]
    inner = x_dims.replace(contracted, "r")
    return f"{x_dims},{contracted}r->{inner}", f"{inner},r{others}->{out}"


def without(params: Mapping) -> dict:
    """Parameters without those of adapters."""
    kept = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            kept[name] = without(value)
        elif not is_adapter(name):
            kept[name] = value
    return kept


def merged(params: dict, scale: float) -> dict:
    """Parameters in which W + s A B stands for each weight W and its adapter; summed in f32, in the
    weight's dtype.
    """
    whole = {}
    for name, value in params.items():
        if isinstance(value, dict):
            whole[name] = merged(value, scale)
        elif not is_adapter(name):
            whole[name] = value
            if name + _A in params:
                whole[name] = _merge(value, params[name + _A], params[name + _B], scale)
    return whole


def _merge(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """W + s A B of one layer, or of a stack."""
    rank = a.shape[-1]
    # In a stack both have the layers in front.
    layers = weight.shape[: a.ndim + b.ndim - 2 - weight.ndim]

    a_matrix = a.reshape(*layers, -1, rank)
    b_matrix = b.reshape(*layers, rank, -1)
    delta = jnp.matmul(a_matrix, b_matrix, precision=jax.lax.Precision.HIGHEST)

    total = weight.astype(jnp.float32) + scale * delta.reshape(weight.shape)
    return total.astype(weight.dtype)
