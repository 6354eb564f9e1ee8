"""Parameters, the dense layer, norms, MLP and embedding.

Letters: B batch, T length, D embed, F mlp, V vocab.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm import collectives
from lm.nn import lora, nf4
from lm.nn.kernels.matmul import matmul, weight_grad
from lm.nn.lora import Adapted
from lm.nn.nf4 import Nf4Weight
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
    """A parameter with its logical axes: Normal(mean, std), drawn in f32 and rounded to `dtype`; a
    constant if std is 0.
    """
    assert len(shape) == len(logical_axes), (shape, logical_axes)
    value = jnp.full(shape, mean, jnp.float32)
    if std:
        value = value + std * jax.random.normal(key, shape, jnp.float32)
    return nnx.Param(value.astype(dtype), logical_axes=tuple(logical_axes))


def gather(weight: nnx.Param, dtype) -> jax.Array:
    """A parameter as a layer computes with it, see `lm.collectives.gather_weight`."""
    logical_axes = weight.get_metadata("logical_axes")
    return collectives.gather_weight(weight[...], logical_axes, jnp.dtype(dtype))


def dense(spec: str, x: jax.Array, weight: nnx.Param | Adapted, dtype, name: str) -> jax.Array:
    """einsum(spec, x, weight) with operands in `dtype`, sums in f32, the result in x's dtype; that
    of an adapter is added (lm.nn.lora).

    Unlike a plain einsum's, its gradient with respect to the weight is not rounded to `dtype`: it
    stays f32 as it leaves the matmul. And every matmul, backward too, is of two `dtype` operands,
    which is what bf16 units are made for.

    Args:
      name: what remat policies call the result (`lm.models.transformer.REMAT_NAMES`). The gathered
        weight is named "weights".
    """
    if isinstance(weight, Adapted):
        weight, a, b, scale = weight
        a_spec, b_spec = lora.specs(spec, a.ndim - 1)
        delta = _plain_dense(b_spec, _plain_dense(a_spec, x, a, dtype), b, dtype)
        y = _plain_dense(spec, x, weight, dtype) + np.asarray(scale, delta.dtype) * delta
    else:
        y = _plain_dense(spec, x, weight, dtype)
    return checkpoint_name(y, name)


def _plain_dense(spec: str, x: jax.Array, weight: nnx.Param | Nf4Weight, dtype) -> jax.Array:
    if isinstance(weight, Nf4Weight):
        return nf4.dense(spec, x, weight, dtype)
    logical_axes = weight.get_metadata("logical_axes")
    return _dense(spec, logical_axes, jnp.dtype(dtype), x, weight[...])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _dense(spec, logical_axes, dtype, x, weight):
    x_cast = x.astype(dtype)
    return matmul(spec, x_cast, collectives.gather_weight(weight, logical_axes, dtype), x.dtype)


def _dense_forward(spec, logical_axes, dtype, x, weight):
    gathered = collectives.gather_weight(weight, logical_axes, dtype)
    # Remat policies drop this; the backward pass gathers it again.
    gathered = checkpoint_name(gathered, "weights")
    x_cast = x.astype(dtype)
    saved = (x_cast, gathered, jnp.zeros((), weight.dtype))
    return matmul(spec, x_cast, gathered, x.dtype), saved


def _dense_backward(spec, logical_axes, dtype, saved, grad):
    x, gathered, like = saved
    inputs, out = spec.split("->")
    x_dims, weight_dims = inputs.split(",")
    x_grad = matmul(f"{out},{weight_dims}->{x_dims}", grad.astype(dtype), gathered, grad.dtype)
    grad_of_weight = weight_grad(spec, x, grad.astype(dtype))
    return x_grad, collectives.scatter_grad(grad_of_weight, logical_axes, like.dtype)


_dense.defvjp(_dense_forward, _dense_backward)


# Norms keep f32 parameters whatever the others are. A scale starts at 1, where neighbouring bf16
# numbers are 0.4 to 0.8% apart, some ten updates. Rounding them stochastically makes them a random
# walk; plainly, they never move.
class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467), computed in f32."""

    def __init__(self, dim: int, *, eps: float, use_bias: bool, axis: str = "embed"):
        del use_bias  # it has none
        self.eps = eps
        self.scale = param(None, (dim,), (axis,), jnp.float32, mean=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes the last dim."""
        dtype = x.dtype
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return jnp.einsum("...d,d->...d", x, gather(self.scale, jnp.float32)).astype(dtype)


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


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def add_bias(x: jax.Array, bias: nnx.Param) -> jax.Array:
    """x plus a bias over its last dims, in x's dtype. The bias's gradient is summed in f32."""
    return _add_bias(x, gather(bias, x.dtype))


@jax.custom_vjp
def _add_bias(x, value):
    return x + value.reshape((1,) * (x.ndim - value.ndim) + value.shape)


def _add_bias_forward(x, value):
    # The backward pass needs the bias's rank and dtype alone.
    return _add_bias(x, value), jnp.zeros((0, *value.shape), value.dtype)


def _add_bias_backward(like, grad):
    summed_dims = tuple(range(grad.ndim - like.ndim + 1))
    return grad, jnp.sum(grad, axis=summed_dims, dtype=jnp.float32).astype(like.dtype)


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def gelu_exact(x: jax.Array) -> jax.Array:
    """GPT-NeoX's GELU, by the error function (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GPT-2's GELU, by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


def relu_squared(x: jax.Array) -> jax.Array:
    """Primer's activation (So et al. 2021, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu_exact,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,  # OPT's
    "silu": jax.nn.silu,
    "relu_squared": relu_squared,
}


class MLP(nnx.Module):
    """Two dense layers, or three when gated: act(gate) * up (Shazeer 2020, arXiv 2002.05202).

    Args:
      config: of lm.models.transformer.
      mlp_dim: the size F; a shared expert's differs from config.mlp_dim.
      use_bias: whether its dense layers have biases.
      out_std: standard deviation of the last layer's initial weights.
    """

    def __init__(self, key: jax.Array, config, *, mlp_dim: int, use_bias: bool, out_std: float):
        c = config
        up_key, gate_key, down_key = jax.random.split(key, 3)
        self.activation = c.activation
        self.compute_dtype = c.compute_dtype

        shape, axes = (c.embed_dim, mlp_dim), ("embed", "mlp")
        self.up = param(up_key, shape, axes, c.param_dtype, std=c.init_std)
        gated = c.gated_mlp
        self.gate = param(gate_key, shape, axes, c.param_dtype, std=c.init_std) if gated else None
        self.down = param(down_key, shape[::-1], axes[::-1], c.param_dtype, std=out_std)

        def bias(dim, axis):
            return param(None, (dim,), (axis,), c.param_dtype) if use_bias else None

        self.up_bias = bias(mlp_dim, "mlp_bias")
        self.gate_bias = bias(mlp_dim, "mlp_bias") if gated else None
        self.down_bias = bias(c.embed_dim, "embed")
        lora.attach(self, key, c, dict(up=1, gate=1, down=1))
        nf4.attach(self, c, ("up", "gate", "down"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        up_BTF = dense("btd,df->btf", x_BTD, lora.of(self, "up"), self.compute_dtype, "up")
        if self.up_bias is not None:
            up_BTF = add_bias(up_BTF, self.up_bias)

        if self.gate is None:
            hidden_BTF = act(up_BTF)
        else:
            gate = lora.of(self, "gate")
            gate_BTF = dense("btd,df->btf", x_BTD, gate, self.compute_dtype, "gate")
            if self.gate_bias is not None:
                gate_BTF = add_bias(gate_BTF, self.gate_bias)
            hidden_BTF = act(gate_BTF) * up_BTF

        hidden_BTF = constrain(hidden_BTF, "batch", "length", "act_mlp")
        down = lora.of(self, "down")
        out_BTD = dense("btf,fd->btd", hidden_BTF, down, self.compute_dtype, "down")
        return out_BTD if self.down_bias is None else add_bias(out_BTD, self.down_bias)


def dropout(x_BTD: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Sets a share of the values to 0 and scales the others so that the mean stays (Srivastava et
    al. 2014, JMLR 15).

    What is dropped is a function of the row's key and the place in the row: the same on every mesh,
    and however rows are dealt.

    Args:
      keys_B: a key for each row; None: nothing is dropped.
    """
    if keys_B is None or not rate:
        return x_BTD
    keys_BT = fold_in_each(keys_B, collectives.places(x_BTD.shape[1]))

    def draw(key):
        return jax.random.bernoulli(key, 1 - rate, x_BTD.shape[2:])

    kept_BTD = jax.vmap(jax.vmap(draw))(keys_BT)
    return jnp.where(kept_BTD, x_BTD / np.asarray(1 - rate, x_BTD.dtype), 0)


def fold_in_each(keys: jax.Array, numbers_N: jax.Array) -> jax.Array:
    """[..., N], each key with each number folded in."""
    folded = jax.vmap(jax.random.fold_in, (None, 0))
    for _ in range(keys.ndim):
        folded = jax.vmap(folded, (0, None))
    return folded(keys, numbers_N)


class Head(nnx.Module):
    """A linear map of hidden states to a few numbers: a score, classes, labels of tokens."""

    def __init__(self, key: jax.Array, dim: int, size: int, *, std: float, dtype, compute_dtype):
        self.compute_dtype = compute_dtype
        self.weight = param(key, (dim, size), ("embed", "outputs"), dtype, std=std)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., size] in f32 of hidden states [B, T, D] or [B, D]."""
        spec = "btd,dk->btk" if hidden.ndim == 3 else "bd,dk->bk"
        return dense(spec, hidden.astype(jnp.float32), self.weight, self.compute_dtype, "head")


class Embed(nnx.Module):
    """A table of vectors: looked up by id, or attended to (the output head).

    Args:
      axis: logical axis of the rows: "vocab" or "position".
    """

    def __init__(
        self, key: jax.Array, num: int, dim: int, *, axis: str, std: float, dtype, compute_dtype
    ):
        self.compute_dtype = compute_dtype
        self.table = param(key, (num, dim), (axis, "embed"), dtype, std=std)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """The rows of these ids, [B, T, D]."""
        logical_axes = self.table.get_metadata("logical_axes")
        dtype = jnp.dtype(self.compute_dtype)
        return collectives.embedding_lookup(self.table[...], ids_BT, logical_axes, dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Logits [..., num] in f32 from vectors [B, T, D] or [B, D]."""
        spec = "btd,vd->btv" if x.ndim == 3 else "bd,vd->bv"
        return dense(spec, x.astype(jnp.float32), self.table, self.compute_dtype, "logits")


class VocabHead(NamedTuple):
    """The vocabulary's logits are state @ table.T + bias."""

    state: jax.Array  # [..., D]
    table: nnx.Param  # [V, D]
    bias: nnx.Param | None  # [V]


class HeadTransform(nnx.Module):
    """norm(activation(a dense layer)), before the vocabulary's head (Devlin et al. 2019, arXiv
    1810.04805: of the released code).
    """

    def __init__(
        self, key: jax.Array, dim: int, activation: str, norm, *, std, dtype, compute_dtype
    ):
        self.activation = activation
        self.compute_dtype = compute_dtype
        self.weight = param(key, (dim, dim), ("embed", "table"), dtype, std=std)
        self.bias = param(None, (dim,), ("embed",), dtype)
        self.norm = norm

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Of states [B, T, D] or [B, D], the same shape."""
        spec = "btd,de->bte" if hidden.ndim == 3 else "bd,de->be"
        x = add_bias(dense(spec, hidden, self.weight, self.compute_dtype, "transform"), self.bias)
        return self.norm(ACTIVATIONS[self.activation](x))
