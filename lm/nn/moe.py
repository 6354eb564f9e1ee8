"""A mixture of experts in the MLP's place.

Letters: B batch, T length, D embed, F mlp, E experts, K experts of a token, N tokens of a device, M
rows: one for each token and expert of it.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm import collectives, sharding
from lm.nn.kernels.grouped_matmul import grouped_matmul, grouped_weight_grad
from lm.nn.layers import ACTIVATIONS, MLP, dense, param


class MoE(nnx.Module):
    """Experts, each an MLP, of which a router gives every token `experts_per_token` (Shazeer et al.
    2017, arXiv 1701.06538; Jiang et al. 2024, arXiv 2401.04088, section 2.1).

    No token is dropped, however many go to one expert. A shared expert, where there is one, takes
    every token, and a gate of its own scales it (Qwen1.5-MoE's).
    """

    def __init__(self, key: jax.Array, config, *, out_std: float):
        c = self.config = config
        router_key, up_key, gate_key, down_key, shared_key, shared_gate_key = jax.random.split(
            key, 6
        )

        def weight(key, shape, axes, std=c.init_std):
            return param(key, shape, axes, c.param_dtype, std=std)

        self.router = weight(router_key, (c.embed_dim, c.num_experts), ("embed", "router"))
        up_shape, up_axes = (c.num_experts, c.embed_dim, c.mlp_dim), ("expert", "embed", "mlp")
        self.up = weight(up_key, up_shape, up_axes)
        self.gate = weight(gate_key, up_shape, up_axes) if c.gated_mlp else None
        down_shape, down_axes = (c.num_experts, c.mlp_dim, c.embed_dim), ("expert", "mlp", "embed")
        self.down = weight(down_key, down_shape, down_axes, out_std)

        if c.shared_mlp_dim:
            self.shared = MLP(
                shared_key, c, mlp_dim=c.shared_mlp_dim, use_bias=False, out_std=out_std
            )
            self.shared_gate = weight(shared_gate_key, (c.embed_dim, 1), ("embed", "router"))
        else:
            self.shared = self.shared_gate = None

    def __call__(
        self, x_BTD: jax.Array, valid_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """Returns the layer's output, and its aux, see `balance`.

        Args:
          valid_BT: bool, False for padding.
        """
        c = self.config
        # The choice of experts is f32's in any dtype (Fedus et al. 2021, arXiv 2101.03961, section
        # 2.4).
        x_f32 = x_BTD.astype(jnp.float32)
        logits_BTE = dense("btd,de->bte", x_f32, self.router, jnp.float32, "router")
        router_probs_BTE = jax.nn.softmax(logits_BTE)
        expert_probs_BTK, chosen_BTK = jax.lax.top_k(router_probs_BTE, c.experts_per_token)
        if c.normalize_router:
            total_BT1 = jnp.sum(expert_probs_BTK, axis=-1, keepdims=True)
            expert_probs_BTK = expert_probs_BTK / total_BT1

        out_BTD = self._experts(x_BTD, expert_probs_BTK, chosen_BTK)
        if self.shared is not None:
            out_BTD = self._add_shared(x_BTD, out_BTD)
        return out_BTD, balance(router_probs_BTE, chosen_BTK, valid_BT)

    def _add_shared(self, x_BTD, out_BTD) -> jax.Array:
        """The experts' sum plus the shared expert's, scaled by its gate; summed in f32."""
        gate_BT1 = dense(
            "btd,dg->btg", x_BTD, self.shared_gate, self.config.compute_dtype, "shared_gate"
        )
        scale_BT1 = jax.nn.sigmoid(gate_BT1.astype(jnp.float32))
        shared_BTD = jnp.einsum("btg,btd->btd", scale_BT1, self.shared(x_BTD).astype(jnp.float32))
        return (out_BTD.astype(jnp.float32) + shared_BTD).astype(x_BTD.dtype)

    def _experts(self, x_BTD, expert_probs_BTK, chosen_BTK) -> jax.Array:
        """The experts' sum: each device computes its own experts for its own tokens.

        That is manual (a shard_map) under GSPMD too, which could sort tokens by expert only where
        all of them are together.
        """
        params = {"up": self.up, "gate": self.gate, "down": self.down}
        params = {name: p for name, p in params.items() if p is not None}
        axes = {name: p.get_metadata("logical_axes") for name, p in params.items()}
        local = functools.partial(_local_experts, self.config, axes)
        values = {name: p[...] for name, p in params.items()}
        arguments = x_BTD, expert_probs_BTK, chosen_BTK, values

        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return local(*arguments, tokens_split="expert" in mesh.manual_axes)
        rows = sharding.divisible_spec(x_BTD.shape, ("batch", "length", None), mesh)
        layouts = {name: sharding.spec(names, mesh) for name, names in axes.items()}
        return jax.shard_map(
            functools.partial(local, tokens_split=sharding.num_parts(mesh, rows[0]) > 1),
            in_specs=(rows, rows, rows, layouts),
            out_specs=rows,
            check_vma=False,
        )(*arguments)


def balance(router_probs_BTE, chosen_BTK, valid_BT) -> dict[str, tuple[jax.Array, jax.Array]]:
    """How evenly a layer's experts are used, as (value * tokens, tokens); padding doesn't count.

    `router_balance` is E times the sum over experts of (share of the tokens that chose it) x (its
    mean probability), at best K (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, where K is
    1). The means are over all rows of the microbatch, on all devices. `router_max_load` is the
    busiest expert's number of tokens over the average expert's.
    """
    num_experts, experts_per_token = router_probs_BTE.shape[-1], chosen_BTK.shape[-1]
    valid_BT = valid_BT.astype(jnp.float32)
    local_tokens = jnp.sum(valid_BT)
    chose_E = jnp.einsum("btke,bt->e", jax.nn.one_hot(chosen_BTK, num_experts), valid_BT)
    mass_E = jnp.einsum("bte,bt->e", router_probs_BTE, valid_BT)
    tokens, chose_E, mass_E = collectives.psum_rows((local_tokens, chose_E, mass_E))

    tokens = jnp.maximum(tokens, 1.0)
    value = num_experts * jnp.sum(chose_E / tokens * (mass_E / tokens))
    max_load = jnp.max(chose_E) * num_experts / (tokens * experts_per_token)
    return {
        "router_balance": (value * local_tokens, local_tokens),
        "router_max_load": (max_load * local_tokens, local_tokens),
    }


def _local_experts(
    config, axes: dict, x_BTD, expert_probs_BTK, chosen_BTK, params: dict, *, tokens_split: bool
) -> jax.Array:
    """The experts' sum for a device's tokens.

    With an expert axis, the devices along it each have some of the experts and, if `tokens_split`,
    some of the tokens: those are gathered, each device does what its experts have to do, and the
    sums are scattered back. Any of them may get all of the tokens, so there is room for that.

    Args:
      axes: logical axes of `params`: up, down, and gate where there is one.
    """
    act = ACTIVATIONS[config.activation]
    dtype = jnp.dtype(config.compute_dtype)
    mesh = jax.sharding.get_abstract_mesh()
    expert_parts = mesh.shape["expert"] if mesh.manual_axes else 1
    tensor_parts = mesh.shape["tensor"] if mesh.manual_axes else 1
    x_ND, probs_NK, chosen_NK = map(_flat, (x_BTD, expert_probs_BTK, chosen_BTK))
    if expert_parts > 1 and tokens_split:
        x_ND, probs_NK, chosen_NK = (
            jax.lax.all_gather(x, "expert", axis=0, tiled=True) for x in (x_ND, probs_NK, chosen_NK)
        )

    # Rows are sorted by expert. Those of other devices' experts come last.
    num_local, experts_per_token = config.num_experts // expert_parts, chosen_NK.shape[1]
    first = jax.lax.axis_index("expert") * num_local if expert_parts > 1 else 0
    expert_M = chosen_NK.reshape(-1) - first
    expert_M = jnp.where((expert_M >= 0) & (expert_M < num_local), expert_M, num_local)
    order_M = jnp.argsort(expert_M)
    inverse_M = jnp.argsort(order_M)
    sizes_E = jnp.sum(jax.nn.one_hot(expert_M, num_local, dtype=jnp.int32), axis=0)
    local_M1 = (jnp.arange(len(order_M)) < jnp.sum(sizes_E))[:, None]

    def only_local(x):
        return jnp.where(local_M1, x, jnp.zeros((), x.dtype)) if expert_parts > 1 else x

    def layer(x, name):
        return checkpoint_name(_grouped(axes[name], dtype, x, params[name], sizes_E), name)

    x_MD = _permute(jnp.repeat(x_ND, experts_per_token, axis=0), order_M, inverse_M)
    x_MD = only_local(x_MD)
    up_MF = layer(x_MD, "up")
    hidden_MF = act(layer(x_MD, "gate")) * up_MF if "gate" in params else act(up_MF)
    out_MD = only_local(layer(hidden_MF, "down"))

    # Back to the tokens' order, and each token's experts summed.
    out_NKD = _permute(out_MD, inverse_M, order_M).reshape(*chosen_NK.shape, -1)
    out_ND = jnp.einsum("nkd,nk->nd", out_NKD.astype(jnp.float32), probs_NK).astype(x_BTD.dtype)
    if tensor_parts > 1:
        out_ND = jax.lax.psum(out_ND, "tensor")
    if expert_parts > 1 and tokens_split:
        out_ND = jax.lax.psum_scatter(out_ND, "expert", scatter_dimension=0, tiled=True)
    elif expert_parts > 1:
        out_ND = jax.lax.psum(out_ND, "expert")
    return out_ND.reshape(x_BTD.shape)


def _flat(x: jax.Array) -> jax.Array:
    """[B, T, X] -> [N, X]."""
    return x.reshape(-1, x.shape[-1])


@jax.custom_vjp
def _permute(x, order, inverse):
    """x[order]. Its gradient is taken by the inverse permutation, not scattered."""
    del inverse
    return x[order]


def _permute_forward(x, order, inverse):
    return x[order], inverse


def _permute_backward(inverse, grad):
    return grad[inverse], None, None


_permute.defvjp(_permute_forward, _permute_backward)


# The grouped twin of `lm.nn.layers.dense`: each row's weight is that of its expert. Sums are f32
# there too, and so is the weight's gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(logical_axes, dtype, x_MA, weight_EAB, sizes_E):
    return _grouped_forward(logical_axes, dtype, x_MA, weight_EAB, sizes_E)[0]


def _grouped_forward(logical_axes, dtype, x_MA, weight_EAB, sizes_E):
    gathered_EAB = collectives.gather_weight(weight_EAB, logical_axes, dtype)
    gathered_EAB = checkpoint_name(gathered_EAB, "weights")
    x_cast = x_MA.astype(dtype)
    out_MB = grouped_matmul(x_cast, gathered_EAB, sizes_E, x_MA.dtype)
    return out_MB, (x_cast, gathered_EAB, sizes_E, jnp.zeros((), weight_EAB.dtype))


def _grouped_backward(logical_axes, dtype, saved, grad_MB):
    x_MA, gathered_EAB, sizes_E, like = saved
    grad = grad_MB.astype(dtype)
    x_grad = grouped_matmul(grad, gathered_EAB, sizes_E, grad_MB.dtype, transposed=True)
    weight_grad = grouped_weight_grad(x_MA, grad, sizes_E)
    return x_grad, collectives.scatter_grad(weight_grad, logical_axes, like.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)
