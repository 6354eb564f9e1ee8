"""Norms, MLP and embedding. Letters: B batch, T length, D embed, F mlp, V vocab."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm import collectives
from lm.sharding import constrain


def param(
    key: jax.Array | None,
    shape: Sequence[int],
    logical_axes: Sequence[str],
    dtype,
    *,
    std: float = 0.0,
    mean: float = 0.0,
) -> nnx.Param:
    """A parameter with its logical axes. Normal(mean, std) drawn in f32, then rounded to `dtype`; a
    constant if std is 0.
    """
    assert len(shape) == len(logical_axes), (shape, logical_axes)
    value = jnp.full(shape, mean, jnp.float32)
    if std:
        value = value + std * jax.random.normal(key, shape, jnp.float32)
    return nnx.Param(value.astype(dtype), logical_axes=tuple(logical_axes))


def gather(weight: nnx.Param, dtype) -> jax.Array:
    """A parameter as a layer computes with it, see `lm.collectives.gather_weight`."""
    return collectives.gather_weight(
        weight[...], weight.get_metadata("logical_axes"), jnp.dtype(dtype)
    )


def dense(spec: str, x: jax.Array, weight: nnx.Param, dtype, name: str) -> jax.Array:
    """einsum(spec, x, weight) with operands in `dtype`, sums in f32, the result in x's dtype.

    Unlike a plain einsum's, its gradient with respect to the weight is not rounded to `dtype`: it
    stays f32 as it leaves the matmul. And every matmul, backward too, is of two `dtype` operands,
    which is what bf16 units are made for.

    Args:
      name: of the result, for remat policies (`lm.models.transformer.REMAT_NAMES`). The gathered
        weight is named "weights".
    """
    return checkpoint_name(
        _dense(spec, weight.get_metadata("logical_axes"), jnp.dtype(dtype), x, weight[...]), name
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense(spec, logical_axes, dtype, x, weight):
    return _matmul(
        spec, x.astype(dtype), collectives.gather_weight(weight, logical_axes, dtype), x.dtype
    )


def _matmul(spec, a, b, dtype):
    # Accelerators would round f32 operands to bf16 or TF32: a router's choice is meant to be f32's.
    return jnp.einsum(
        spec,
        a,
        b,
        preferred_element_type=jnp.float32,
        precision="highest" if a.dtype == jnp.float32 else None,
    ).astype(dtype)


def _dense_forward(spec, logical_axes, dtype, x, weight):
    gathered = checkpoint_name(collectives.gather_weight(weight, logical_axes, dtype), "weights")
    x_cast = x.astype(dtype)
    return _matmul(spec, x_cast, gathered, x.dtype), (x_cast, gathered, jnp.zeros((), weight.dtype))


def _dense_backward(spec, logical_axes, dtype, saved, g):
    x, gathered, like = saved
    inputs, out = spec.split("->")
    a, b = inputs.split(",")
    x_grad = _matmul(f"{out},{b}->{a}", g.astype(dtype), gathered, g.dtype)
    g = g.astype(dtype)
    plain = lambda x, g: _matmul(f"{a},{out}->{b}", x, g, jnp.float32)
    # XLA's CPU compiler transposes the first operand, and computes it again with all that led to
    # it: let it be the smaller one.
    turned = lambda x, g: (
        jax.lax.optimization_barrier(_matmul(f"{out},{a}->{b[::-1]}", g, x, jnp.float32)).T
    )
    if len(b) == 2 and x.size > g.size:
        weight_grad = jax.lax.platform_dependent(x, g, cpu=turned, default=plain)
    else:
        weight_grad = plain(x, g)
    return x_grad, collectives.scatter_grad(weight_grad, logical_axes, like.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


# Norms keep f32 parameters whatever the others are: a scale starts at 1, where neighbouring bf16
# numbers are 0.4 to 0.8% apart, some ten updates. Rounding them stochastically makes them a random
# walk; plainly, they never move.
class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in f32."""

    def __init__(self, dim: int, *, eps: float, use_bias: bool, axis: str = "embed"):
        del use_bias  # it has none
        self.eps = eps
        self.scale = param(None, (dim,), (axis,), jnp.float32, mean=1.0)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return jnp.einsum("...d,d->...d", x, gather(self.scale, jnp.float32)).astype(x_BTD.dtype)


class LayerNorm(nnx.Module):
    """Layer norm (Ba et al. 2016, arXiv 1607.06450), computed in f32."""

    def __init__(self, dim: int, *, eps: float, use_bias: bool):
        self.eps = eps
        self.scale = param(None, (dim,), ("embed",), jnp.float32, mean=1.0)
        self.bias = param(None, (dim,), ("embed",), jnp.float32) if use_bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        x = jnp.einsum("...d,d->...d", x, gather(self.scale, jnp.float32))
        if self.bias is not None:
            x = add_bias(x, self.bias)
        return x.astype(x_BTD.dtype)


def add_bias(x: jax.Array, bias: nnx.Param) -> jax.Array:
    """x plus a bias over its last dims, in x's dtype."""
    return _add_bias(x, gather(bias, x.dtype))


@jax.custom_vjp
def _add_bias(x, value):
    return x + value.reshape((1,) * (x.ndim - value.ndim) + value.shape)


# The gradient is summed in f32, whatever it arrives in.
_add_bias.defvjp(
    lambda x, value: (_add_bias(x, value), jnp.zeros((0, *value.shape), value.dtype)),
    lambda like, g: (
        g,
        jnp.sum(g, axis=tuple(range(g.ndim - like.ndim + 1)), dtype=jnp.float32).astype(like.dtype),
    ),
)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # GPT-NeoX's
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # GPT-2's
    "relu": jax.nn.relu,  # OPT's
    "silu": jax.nn.silu,
    # Primer (So et al. 2021, arXiv 2109.08668)
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nnx.Module):
    """Two dense layers, or three when gated (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(
        self,
        key: jax.Array,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: str,
        gated: bool,
        use_bias: bool,
        std: float,
        out_std: float,
        dtype,
        compute_dtype,
    ):
        up_key, gate_key, down_key = jax.random.split(key, 3)
        self.activation, self.compute_dtype = activation, compute_dtype
        self.up = param(up_key, (embed_dim, mlp_dim), ("embed", "mlp"), dtype, std=std)
        self.gate = (
            param(gate_key, (embed_dim, mlp_dim), ("embed", "mlp"), dtype, std=std)
            if gated
            else None
        )
        self.down = param(down_key, (mlp_dim, embed_dim), ("mlp", "embed"), dtype, std=out_std)
        self.up_bias = param(None, (mlp_dim,), ("mlp_bias",), dtype) if use_bias else None
        self.gate_bias = (
            param(None, (mlp_dim,), ("mlp_bias",), dtype) if use_bias and gated else None
        )
        self.down_bias = param(None, (embed_dim,), ("embed",), dtype) if use_bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        up_BTF = dense("btd,df->btf", x_BTD, self.up, self.compute_dtype, "up")
        if self.up_bias is not None:
            up_BTF = add_bias(up_BTF, self.up_bias)
        if self.gate is not None:
            gate_BTF = dense("btd,df->btf", x_BTD, self.gate, self.compute_dtype, "gate")
            hidden_BTF = (
                act(gate_BTF if self.gate_bias is None else add_bias(gate_BTF, self.gate_bias))
                * up_BTF
            )
        else:
            hidden_BTF = act(up_BTF)
        hidden_BTF = constrain(hidden_BTF, "batch", "length", "act_mlp")
        out_BTD = dense("btf,fd->btd", hidden_BTF, self.down, self.compute_dtype, "down")
        return out_BTD if self.down_bias is None else add_bias(out_BTD, self.down_bias)


class Embed(nnx.Module):
    """A table of vectors: looked up by id, or attended to (the output head)."""

    def __init__(
        self, key: jax.Array, num: int, dim: int, *, axis: str, std: float, dtype, compute_dtype
    ):
        self.compute_dtype = compute_dtype
        self.table = param(key, (num, dim), (axis, "embed"), dtype, std=std)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        return collectives.embedding_lookup(
            self.table[...],
            ids_BT,
            self.table.get_metadata("logical_axes"),
            jnp.dtype(self.compute_dtype),
        )

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits [..., num] in f32 from vectors [..., dim]."""
        spec = "btd,vd->btv" if x.ndim == 3 else "bd,vd->bv"
        return dense(spec, x.astype(jnp.float32), self.table, self.compute_dtype, "logits")
