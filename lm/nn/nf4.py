"""Weights in 4 bits, for bases that stay as they are (QLoRA, Dettmers et al. 2023, arXiv
2305.14314, section 3): NF4 codes in blocks of 64, each with a scale. qwix quantizes.

They take 0.5625 bytes a weight: half a byte, and the f32 scale's 64th. Layers compute with what the
codes stand for; there is no gradient with respect to them.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lm import collectives
from lm.nn.kernels.matmul import matmul

BLOCK = 64
CODES, SCALES = "codes", "scales"


class Nf4Weight(nnx.Module):
    """A weight in 4 bits, in the place of its parameter.

    As stored it is a matrix [embed, others]: FSDP's axes split the first dim. Two neighbouring
    weights are a byte.

    Args:
      weight: what is quantized.

    Raises:
      ValueError: a weight whose other dims aren't whole blocks.
    """

    def __init__(self, weight: nnx.Param):
        self.axes = weight.get_metadata("logical_axes")
        self.shape = weight.shape
        self.dtype = weight.dtype
        codes, scales = quantize(weight[...], self.axes)
        others = next(axis for axis in self.axes if axis not in ("embed", "head_dim"))
        self.codes = nnx.Param(codes, logical_axes=("embed", others))
        self.scales = nnx.Param(scales, logical_axes=("embed", others))

    def gathered(self, dtype) -> jax.Array:
        """The weight as a layer computes with it, see `lm.collectives.gather_weight`."""
        axes = self.codes.get_metadata("logical_axes")
        codes = collectives.gather_weight(self.codes[...], axes, jnp.uint8)
        scales = collectives.gather_weight(self.scales[...], axes, jnp.float32)
        return dequantize(codes, scales, self.shape, self.axes).astype(dtype)


def _as_matrix(shape: Sequence[int], axes: Sequence[str]) -> tuple[tuple[int, ...], int, int]:
    """(the order of dims with the embed dim first, its size, that of the others)."""
    embed = tuple(axes).index("embed")
    order = (embed, *[dim for dim in range(len(shape)) if dim != embed])
    return order, shape[embed], math.prod(shape) // shape[embed]


def quantize(weight: jax.Array, axes: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Returns (codes uint8 [embed, others / 2], scales f32 [embed, others / 64]) of a weight.

    Args:
      axes: its logical axes.

    Raises:
      ValueError: others that aren't whole blocks; qwix isn't installed.
    """
    order, rows, columns = _as_matrix(weight.shape, axes)
    if columns % BLOCK:
        raise ValueError(
            f"config.model.quantize = 'nf4' has blocks of {BLOCK} weights, and a weight "
            f"{dict(zip(axes, weight.shape))} has {columns} beside its embed dim; wanted a multiple"
        )
    try:
        import qwix
    except ImportError:
        raise ValueError(
            "config.model.quantize = 'nf4' needs the package qwix: pip install -e '.[nf4]'"
        ) from None

    blocks = weight.transpose(order).astype(jnp.float32).reshape(-1, BLOCK)
    quantized = qwix.quantize(blocks, "nf4", tiled_axes={1: BLOCK}, channelwise_axes=[0])
    codes = quantized.qvalue.astype(jnp.uint8).reshape(rows, columns // 2, 2)
    packed = codes[..., 0] * jnp.uint8(16) + codes[..., 1]
    return packed, quantized.scale.reshape(rows, columns // BLOCK)


def dequantize(
    codes: jax.Array, scales: jax.Array, shape: Sequence[int], axes: Sequence[str]
) -> jax.Array:
    """Returns the f32 weight that codes and scales stand for, see `quantize`."""
    from qwix import QArray
    from qwix import dequantize as dequantize_blocks

    order, rows, columns = _as_matrix(shape, axes)
    unpacked = jnp.stack([codes // jnp.uint8(16), codes % jnp.uint8(16)], axis=-1)
    blocks = QArray(
        unpacked.astype(jnp.uint4).reshape(-1, BLOCK), scales.reshape(-1, 1), None, "nf4"
    )

    matrix = dequantize_blocks(blocks).reshape(rows, columns)
    in_order = matrix.reshape([shape[dim] for dim in order])
    return in_order.transpose([order.index(dim) for dim in range(len(shape))])


def dense(spec: str, x: jax.Array, weight: Nf4Weight, dtype) -> jax.Array:
    """einsum(spec, x, weight) with operands in `dtype`, sums in f32, the result in x's dtype."""
    graphdef, params = nnx.split(weight, nnx.Param)
    return _dense(spec, graphdef, jnp.dtype(dtype), x, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense(spec, graphdef, dtype, x, params):
    values = nnx.merge(graphdef, params).gathered(dtype)
    return matmul(spec, x.astype(dtype), values, x.dtype)


def _dense_forward(spec, graphdef, dtype, x, params):
    return _dense(spec, graphdef, dtype, x, params), params


def _dense_backward(spec, graphdef, dtype, params, grad):
    # Nothing but the codes is kept: they are made weights again.
    inputs, out = spec.split("->")
    x_dims, weight_dims = inputs.split(",")
    values = nnx.merge(graphdef, params).gathered(dtype)
    x_grad = matmul(f"{out},{weight_dims}->{x_dims}", grad.astype(dtype), values, grad.dtype)
    return x_grad, None


_dense.defvjp(_dense_forward, _dense_backward)


def attach(module: nnx.Module, config, names: Sequence[str]) -> None:
    """Quantizes weights of a module, where the configuration says so."""
    if config.quantize != "nf4":
        return
    for name in names:
        if getattr(module, name) is not None:
            setattr(module, name, Nf4Weight(getattr(module, name)))


def packed(params: Mapping, abstract: Mapping, axes: Mapping) -> dict:
    """Parameters of which those are quantized that `abstract` has so.

    Args:
      axes: the logical axes of the parameters.
    """
    whole = {}
    for name, value in params.items():
        wanted = abstract[name]
        if isinstance(value, Mapping):
            whole[name] = packed(value, wanted, axes[name])
        elif isinstance(wanted, Mapping):
            layers = jax.vmap(functools.partial(quantize, axes=axes[name][1:]))
            codes, scales = layers(value)
            whole[name] = {CODES: codes, SCALES: scales}
        else:
            whole[name] = value
    return whole


def unpacked(params: Mapping, abstract: Mapping, axes: Mapping) -> dict:
    """The inverse of `packed`, but for what was rounded; `abstract` is of the result."""
    whole = {}
    for name, value in params.items():
        if name not in abstract:
            whole[name] = value  # an adapter
        elif not isinstance(abstract[name], Mapping) and isinstance(value, Mapping):
            shape, dtype = abstract[name].shape, abstract[name].dtype
            restore = functools.partial(dequantize, shape=shape[1:], axes=axes[name][1:])
            whole[name] = jax.vmap(restore)(value[CODES], value[SCALES]).astype(dtype)
        elif isinstance(value, Mapping):
            whole[name] = unpacked(value, abstract[name], axes[name])
        else:
            whole[name] = value
    return whole
