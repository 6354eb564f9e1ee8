"""A mixture of experts in the MLP's place. Letters: B batch, T length, D embed, F mlp, E experts, K
experts of a token, M rows: one for each token and expert of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

from lm import collectives, sharding
from lm.nn.layers import ACTIVATIONS, MLP, dense, param


class MoE(nnx.Module):
    """Experts, each an MLP, of which a router gives every token `experts_per_token` (Shazeer et al.
    2017, arXiv 1701.06538; Jiang et al. 2024, arXiv 2401.04088, section 2.1). No token is dropped,
    however many go to one expert. A shared expert, where there is one, takes every token, and a
    gate of its own scales it (Qwen1.5-MoE's).
    """

    def __init__(self, key: jax.Array, config, *, out_std: float):
        c = self.config = config
        router_key, up_key, gate_key, down_key, shared_key, shared_gate_key = jax.random.split(
            key, 6
        )
        weight = lambda key, shape, axes, std=c.init_std: param(
            key, shape, axes, c.param_dtype, std=std
        )
        self.router = weight(router_key, (c.embed_dim, c.num_experts), ("embed", "router"))
        self.up = weight(
            up_key, (c.num_experts, c.embed_dim, c.mlp_dim), ("expert", "embed", "mlp")
        )
        self.gate = (
            weight(gate_key, (c.num_experts, c.embed_dim, c.mlp_dim), ("expert", "embed", "mlp"))
            if c.gated_mlp
            else None
        )
        self.down = weight(
            down_key, (c.num_experts, c.mlp_dim, c.embed_dim), ("expert", "mlp", "embed"), out_std
        )
        self.shared = (
            MLP(
                shared_key,
                c.embed_dim,
                c.shared_mlp_dim,
                activation=c.activation,
                gated=c.gated_mlp,
                use_bias=False,
                std=c.init_std,
                out_std=out_std,
                dtype=c.param_dtype,
                compute_dtype=c.compute_dtype,
            )
            if c.shared_mlp_dim
            else None
        )
        self.shared_gate = (
            weight(shared_gate_key, (c.embed_dim, 1), ("embed", "router"))
            if c.shared_mlp_dim
            else None
        )

    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """The layer's output, and its aux, see `balance`.

        Args:
          real_BT: bool, False for padding.
        """
        c = self.config
        # The choice of experts is f32's in any dtype (Fedus et al. 2021, arXiv 2101.03961, section
        # 2.4).
        logits_BTE = dense(
            "btd,de->bte", x_BTD.astype(jnp.float32), self.router, jnp.float32, "router"
        )
        probabilities_BTE = jax.nn.softmax(logits_BTE)
        weights_BTK, chosen_BTK = jax.lax.top_k(probabilities_BTE, c.experts_per_token)
        if c.normalize_router:
            weights_BTK = weights_BTK / jnp.sum(weights_BTK, axis=-1, keepdims=True)
        out_BTD = self._experts(x_BTD, weights_BTK, chosen_BTK)
        if self.shared is not None:
            scale_BT1 = jax.nn.sigmoid(
                dense(
                    "btd,dg->btg", x_BTD, self.shared_gate, c.compute_dtype, "shared_gate"
                ).astype(jnp.float32)
            )
            shared_BTD = jnp.einsum(
                "btg,btd->btd", scale_BT1, self.shared(x_BTD).astype(jnp.float32)
            )
            out_BTD = (out_BTD.astype(jnp.float32) + shared_BTD).astype(x_BTD.dtype)
        return out_BTD, balance(probabilities_BTE, chosen_BTK, real_BT)

    def _experts(self, x_BTD, weights_BTK, chosen_BTK):
        """On each device its own experts for its own tokens, whoever writes FSDP's collectives: the
        partitioner could sort tokens by expert only where all of them are together.
        """
        weights = {
            name: p for name in ("up", "gate", "down") if (p := getattr(self, name)) is not None
        }
        axes = {name: p.get_metadata("logical_axes") for name, p in weights.items()}
        local = functools.partial(
            _local_experts,
            axes,
            ACTIVATIONS[self.config.activation],
            self.config.num_experts,
            jnp.dtype(self.config.compute_dtype),
        )
        arguments = x_BTD, weights_BTK, chosen_BTK, {name: p[...] for name, p in weights.items()}
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1 or mesh.manual_axes:
            return local(*arguments, split="expert" in mesh.manual_axes)
        rows = sharding.divisible_spec(x_BTD.shape, ("batch", "length", None), mesh)
        split = sharding.num_parts(mesh, rows[0]) > 1
        layouts = {name: sharding.spec(names, mesh) for name, names in axes.items()}
        return jax.shard_map(
            functools.partial(local, split=split),
            in_specs=(rows, rows, rows, layouts),
            out_specs=rows,
            check_vma=False,
        )(*arguments)


def balance(probabilities_BTE, chosen_BTK, real_BT) -> dict[str, tuple[jax.Array, jax.Array]]:
    """How evenly a layer's experts are used, as (value * tokens, tokens); padding doesn't count.

    `router_balance` is E times the sum over experts of (share of the tokens that chose it) x (its
    mean probability), at best K (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6, where K is
    1). The means are over all rows of the microbatch, on all devices. `router_max_load` is the
    busiest expert's number of tokens over the average expert's.
    """
    num_experts, experts_per_token = probabilities_BTE.shape[-1], chosen_BTK.shape[-1]
    real_BT = real_BT.astype(jnp.float32)
    here = jnp.sum(real_BT)
    chose_E = jnp.einsum("btke,bt->e", jax.nn.one_hot(chosen_BTK, num_experts), real_BT)
    tokens, chose_E, mass_E = collectives.psum_rows(
        (here, chose_E, jnp.einsum("bte,bt->e", probabilities_BTE, real_BT))
    )
    tokens = jnp.maximum(tokens, 1.0)
    value = num_experts * jnp.sum(chose_E / tokens * (mass_E / tokens))
    max_load = jnp.max(chose_E) * num_experts / (tokens * experts_per_token)
    return {"router_balance": (value * here, here), "router_max_load": (max_load * here, here)}


def _local_experts(
    axes, act, num_experts, dtype, x_BTD, weights_BTK, chosen_BTK, weights, *, split: bool
):
    """The experts' sum for a device's tokens.

    With an expert axis, the devices along it each have some of the experts and, if `split`, some of
    the tokens: those are collected, each device does what its experts have to do, and the sums are
    dealt back. Any of them may get all of the tokens, so there is room for that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = {axis: mesh.shape[axis] if mesh.manual_axes else 1 for axis in ("expert", "tensor")}
    flat = lambda x: x.reshape(-1, x.shape[-1])
    x_ND, weights_NK, chosen_NK = flat(x_BTD), flat(weights_BTK), flat(chosen_BTK)
    if parts["expert"] > 1 and split:
        x_ND, weights_NK, chosen_NK = (
            jax.lax.all_gather(x, "expert", axis=0, tiled=True)
            for x in (x_ND, weights_NK, chosen_NK)
        )
    num_local, experts_per_token = num_experts // parts["expert"], chosen_NK.shape[1]
    first = jax.lax.axis_index("expert") * num_local if parts["expert"] > 1 else 0
    expert_M = chosen_NK.reshape(-1) - first
    # those of other devices come last
    expert_M = jnp.where((expert_M >= 0) & (expert_M < num_local), expert_M, num_local)
    order_M = jnp.argsort(expert_M)
    back_M = jnp.argsort(order_M)
    sizes_E = jnp.sum(jax.nn.one_hot(expert_M, num_local, dtype=jnp.int32), axis=0)
    mine_M1 = (jnp.arange(len(order_M)) < jnp.sum(sizes_E))[:, None]
    only_mine = lambda x: (
        jnp.where(mine_M1, x, jnp.zeros((), x.dtype)) if parts["expert"] > 1 else x
    )
    layer = lambda x, name: checkpoint_name(
        _grouped(axes[name], dtype, x, weights[name], sizes_E), name
    )

    x_MD = only_mine(_permute(jnp.repeat(x_ND, experts_per_token, axis=0), order_M, back_M))
    up_MF = layer(x_MD, "up")
    hidden_MF = act(layer(x_MD, "gate")) * up_MF if "gate" in weights else act(up_MF)
    out_MD = only_mine(layer(hidden_MF, "down"))
    out_NKD = _permute(out_MD, back_M, order_M).reshape(*chosen_NK.shape, -1)
    out_ND = jnp.einsum("nkd,nk->nd", out_NKD.astype(jnp.float32), weights_NK).astype(x_BTD.dtype)
    if parts["tensor"] > 1:
        out_ND = jax.lax.psum(out_ND, "tensor")
    if parts["expert"] > 1:
        out_ND = (
            jax.lax.psum_scatter(out_ND, "expert", scatter_dimension=0, tiled=True)
            if split
            else jax.lax.psum(out_ND, "expert")
        )
    return out_ND.reshape(x_BTD.shape)


@jax.custom_vjp
def _permute(x, order, back):
    """x[order]. Its gradient is taken by the inverse permutation, not scattered."""
    del back
    return x[order]


_permute.defvjp(lambda x, order, back: (x[order], back), lambda back, g: (g[back], None, None))


# The grouped twin of `lm.nn.layers.dense`: each row's weight is that of its expert. Sums are f32
# there too, and so is the weight's gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(logical_axes, dtype, x_MA, weight_EAB, sizes_E):
    return _grouped_forward(logical_axes, dtype, x_MA, weight_EAB, sizes_E)[0]


def _grouped_forward(logical_axes, dtype, x_MA, weight_EAB, sizes_E):
    gathered_EAB = checkpoint_name(
        collectives.gather_weight(weight_EAB, logical_axes, dtype), "weights"
    )
    x_cast = x_MA.astype(dtype)
    return grouped_rows(x_cast, gathered_EAB, sizes_E, x_MA.dtype), (
        x_cast,
        gathered_EAB,
        sizes_E,
        jnp.zeros((), weight_EAB.dtype),
    )


def _grouped_backward(logical_axes, dtype, saved, g_MB):
    x_MA, gathered_EAB, sizes_E, like = saved
    g = g_MB.astype(dtype)
    x_grad = grouped_rows(g, gathered_EAB, sizes_E, g_MB.dtype, transposed=True)
    return (
        x_grad,
        collectives.scatter_grad(grouped_weights(x_MA, g, sizes_E), logical_axes, like.dtype),
        None,
    )


_grouped.defvjp(_grouped_forward, _grouped_backward)


def grouped_rows(
    x_MA: jax.Array, weight_EAB: jax.Array, sizes_E: jax.Array, dtype, *, transposed: bool = False
) -> jax.Array:
    """[M, B] in `dtype`: the first sizes[0] rows times the first matrix (its transpose, if
    `transposed`), and so on; rows left over may be anything. Without a kernel for it, which TPUs
    have, XLA multiplies all rows with all matrices: on CPUs they go block by block.
    """
    contracted = 2 if transposed else 1
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (contracted,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    by_xla = lambda x, w, sizes: jax.lax.ragged_dot_general(
        x, w, sizes, numbers, preferred_element_type=dtype
    )

    def by_block(x, w, sizes):
        blocks = _blocks(sizes, len(x))
        x = blocks.take(x)
        product = lambda i: jnp.einsum(
            "ra,ba->rb" if transposed else "ra,ab->rb",
            x[i],
            w[blocks.group[i]],
            preferred_element_type=jnp.float32,
        )
        out = jnp.zeros((*x.shape[:2], w.shape[3 - contracted]), dtype)
        return blocks.back(
            jax.lax.fori_loop(
                0, blocks.used, lambda i, out: out.at[i].set(product(i).astype(dtype)), out
            )
        )

    return jax.lax.platform_dependent(x_MA, weight_EAB, sizes_E, cpu=by_block, default=by_xla)


def grouped_weights(x_MA: jax.Array, g_MB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[E, A, B] in f32: x^T g of each group of rows."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    by_xla = lambda x, g, sizes: jax.lax.ragged_dot_general(
        x, g, sizes, numbers, preferred_element_type=jnp.float32
    )

    def by_block(x, g, sizes):
        blocks = _blocks(sizes, len(x))
        x, g = blocks.take(x), blocks.take(g)
        add = lambda i, out: out.at[blocks.group[i]].add(
            jnp.einsum("ra,rb->ab", x[i], g[i], preferred_element_type=jnp.float32)
        )
        return jax.lax.fori_loop(
            0, blocks.used, add, jnp.zeros((len(sizes), x.shape[2], g.shape[2]), jnp.float32)
        )

    return jax.lax.platform_dependent(
        x_MA, g_MB, sizes_E, cpu=by_block, tpu=by_kernel, default=by_xla
    )


def by_kernel(
    x_MA: jax.Array, g_MB: jax.Array, sizes_E: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """`grouped_weights` by JAX's Pallas kernel for TPU (Gale et al. 2022, arXiv 2211.15841). XLA
    has none for this product.

    Args:
      interpret: run the kernel's program without a TPU, slowly.
    """
    more = -len(x_MA) % 128  # tiles are filled with rows of no group
    x_MA, g_MB = (jnp.pad(x, ((0, more), (0, 0))) for x in (x_MA, g_MB))
    tile = 512 if len(x_MA) % 512 == 0 else 128
    with jax.numpy_dtype_promotion("standard"):  # the kernel's own code needs it
        return tgmm(
            x_MA.T,
            g_MB,
            sizes_E,
            jnp.float32,
            (tile, min(x_MA.shape[1], 1024), min(g_MB.shape[1], 1024)),
            interpret=interpret,
        )


class Blocks(NamedTuple):
    """Rows of groups in blocks of one group each, the last of a group not full."""

    group: jax.Array  # of each block
    used: jax.Array  # how many of the blocks are
    source: jax.Array  # [blocks, rows of one]: which row; as many as there are for none
    place: jax.Array  # of each row, counted through all blocks; as many as there are for none

    def take(self, x):
        return x.at[self.source].get(mode="fill", fill_value=0)

    def back(self, blocks):
        return blocks.reshape(-1, blocks.shape[-1]).at[self.place].get(mode="fill", fill_value=0)


def _blocks(sizes_E: jax.Array, num_rows: int) -> Blocks:
    num_groups = len(sizes_E)
    rows = min(64, max(8, 1 << (num_rows // num_groups).bit_length()))
    number = num_rows // rows + num_groups  # at most
    ends_E, block_ends_E = jnp.cumsum(sizes_E), jnp.cumsum(-(-sizes_E // rows))
    starts_E, block_starts_E = ends_E - sizes_E, block_ends_E - -(-sizes_E // rows)
    group = jnp.minimum(
        jnp.searchsorted(block_ends_E, jnp.arange(number), side="right"), num_groups - 1
    )
    within = ((jnp.arange(number) - block_starts_E[group]) * rows)[:, None] + jnp.arange(rows)[None]
    source = jnp.where(
        within < sizes_E[group][:, None], starts_E[group][:, None] + within, num_rows
    )
    of_row = jnp.searchsorted(ends_E, jnp.arange(num_rows), side="right")
    known = jnp.minimum(of_row, num_groups - 1)
    place = jnp.where(
        of_row < num_groups,
        block_starts_E[known] * rows + jnp.arange(num_rows) - starts_E[known],
        number * rows,
    )
    return Blocks(group, block_ends_E[-1], source, place)
