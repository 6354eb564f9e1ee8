"""The decoder-only Transformer, its layers stacked and scanned. One model; its presets are data
(presets.py).

Letters: B batch, T length, D embed, F mlp, N heads, K kv heads, H head size, V vocab, L layers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.collectives import gather_sequence
from lm.nn.attention import (
    SPLASH,
    Attention,
    Cache,
    Visible,
    cache_mask,
    cache_slots,
    causal_mask,
    tree_mask,
)
from lm.nn.layers import ACTIVATIONS, MLP, NORMS, Embed, dense, param
from lm.nn.moe import MoE
from lm.sharding import constrain

POSITIONS = ("learned", "rope")
RESIDUALS = ("pre_norm", "post_norm", "parallel")
BIASES = ("qkv", "out", "mlp", "norm")
ATTENTION = ("xla", "cudnn", *SPLASH)
# What the backward pass may find saved of each layer: results of matmuls, and the attention
# kernel's own residuals (splash).
REMAT_NAMES = ("query", "key", "value", "attention", "out", "up", "gate", "down")
REMAT = {"none": REMAT_NAMES, "full": (), "dots": REMAT_NAMES}


def kept_results(remat: str) -> tuple[list[str], list[str]]:
    """The names that config.model.remat keeps (on the chip, in the host's memory): a key of
    `REMAT`, or names of `REMAT_NAMES` with commas between them, those to be kept in the host's
    memory with ":host" behind them. "none" keeps others besides.

    Raises:
      ValueError: anything else.
    """
    names = [name.partition(":") for name in (REMAT[remat] if remat in REMAT else remat.split(","))]
    if wrong := [
        f"{name}{colon}{place}"
        for name, colon, place in names
        if name not in REMAT_NAMES or (colon and place != "host")
    ]:
        raise ValueError(
            f"config.model.remat = {remat!r}: {wrong}; valid: {list(REMAT)}, or names of "
            f"{list(REMAT_NAMES)} with commas between "  # noqa: E501
            f'them, with ":host" behind those to be kept in the host\'s memory'
        )
    return [name for name, _, place in names if not place], [
        name for name, _, place in names if place
    ]


def remat_policy(remat: str):
    """The policy of jax.checkpoint for config.model.remat. What is not kept is computed again in
    the backward pass; gathered weights always are gathered again.

    Raises:
      ValueError: see `kept_results`.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return policies.save_anything_except_these_names("weights")
    saved, offloaded = kept_results(remat)
    if offloaded:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=saved,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return policies.save_only_these_names(*saved)


@dataclasses.dataclass(frozen=True)
class Config:
    """The model. Every field changes parameters or logits, but for the last five (how it is
    executed).
    """

    vocab_size: int
    # longest sequence; the size of the position table when positions are learned
    context_length: int
    num_layers: int
    embed_dim: int
    mlp_dim: int  # of each expert, where there are experts
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str  # layernorm | rmsnorm
    norm_eps: float
    qk_norm: bool  # RMSNorm of each head's queries and keys
    # pre_norm | post_norm (of the sum; no norm at the end) | parallel (attention and MLP both on
    # the layer's input)
    residual: str
    activation: str  # gelu | gelu_tanh | relu | silu | relu_squared
    gated_mlp: bool
    num_experts: int  # of every layer, in the MLP's place, see lm.nn.moe; 0: none
    experts_per_token: int
    normalize_router: bool  # the weights of a token's experts sum to 1
    shared_mlp_dim: int  # of an expert that takes every token; 0: none
    window: int  # positions that a query sees, itself included; 0: all before it
    positions: str  # learned | rope
    position_offset: int  # rows of the position table before that of position 0 (learned)
    rope_theta: float
    rope_fraction: float  # of a head's dims that turn
    rope_interleaved: bool  # see lm.nn.positions.rope
    rope_scaling: tuple[float, ...]  # see lm.nn.positions.frequencies
    # which layers have one, with commas between them: qkv, out (of attention), mlp, norm
    # (layernorm)
    bias: str
    tie_embeddings: bool
    # of the embedding and the head where it isn't embed_dim, with a projection between them; 0:
    # embed_dim
    table_dim: int
    # of every weight; those that write to the residual stream are divided by sqrt(2 * num_layers)
    init_std: float
    param_dtype: Any  # of all parameters but the norms', which are f32
    compute_dtype: Any
    # xla | cudnn (GPU, bf16) | splash (TPU) | splash_interpreted (anywhere, slowly: for tests)
    attention: str
    remat: str  # see remat_policy
    scan_unroll: int  # layers in one iteration of the loop over layers

    def __post_init__(self):
        for field, valid in (
            ("norm", NORMS),
            ("residual", RESIDUALS),
            ("activation", ACTIVATIONS),
            ("positions", POSITIONS),
            ("attention", ATTENTION),
        ):
            if getattr(self, field) not in valid:
                raise ValueError(
                    f"config.model.{field} = {getattr(self, field)!r}; valid: {sorted(valid)}"
                )
        for field in ("param_dtype", "compute_dtype"):
            if getattr(self, field) not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
                raise ValueError(
                    f"config.model.{field} = {getattr(self, field)!r}; valid: ['bfloat16', "
                    "'float32']"
                )
        remat_policy(self.remat)
        sizes = (
            "vocab_size",
            "context_length",
            "num_layers",
            "embed_dim",
            "mlp_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "scan_unroll",
        )
        if small := [f for f in sizes if getattr(self, f) < 1]:
            raise ValueError(
                f"config.model: {', '.join(f'{f} = {getattr(self, f)}' for f in small)}; sizes "
                "must be at least 1"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.model: num_heads = {self.num_heads} must be a multiple of num_kv_heads = "
                f"{self.num_kv_heads}"
            )
        if unknown := [name for name in self.biases if name not in BIASES]:
            raise ValueError(
                f"config.model.bias = {self.bias!r}: {unknown}; valid: names of {list(BIASES)} "
                'with commas between them, or ""'
            )
        if negative := [
            f
            for f in ("window", "position_offset", "table_dim", "num_experts", "shared_mlp_dim")
            if getattr(self, f) < 0
        ]:
            raise ValueError(
                f"config.model: {', '.join(f'{f} = {getattr(self, f)}' for f in negative)}; must "
                "not be negative"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"config.model.experts_per_token = {self.experts_per_token}: wanted 1 to "
                f"num_experts = {self.num_experts}"
            )
        if self.num_experts and "mlp" in self.biases:
            raise ValueError(
                f'config.model.bias = {self.bias!r}: experts have none; take "mlp" out, or set '
                "num_experts = 0"
            )
        if self.shared_mlp_dim and not self.num_experts:
            raise ValueError(
                f"config.model.shared_mlp_dim = {self.shared_mlp_dim} needs num_experts; without "
                "experts mlp_dim is the MLP's size"
            )
        if self.positions == "rope":
            if not 0 < self.rope_fraction <= 1 or int(self.head_dim * self.rope_fraction) % 2:
                raise ValueError(
                    f"config.model.head_dim = {self.head_dim}, rope_fraction = "
                    f"{self.rope_fraction}: an even number of dims must turn, 2 to all"
                )
            if len(self.rope_scaling) not in (0, 4):
                raise ValueError(
                    f"config.model.rope_scaling = {self.rope_scaling}; wanted () or (factor, "
                    "low_frequency_factor, high_frequency_factor, original context)"
                )

    @property
    def biases(self) -> tuple[str, ...]:
        return tuple(name for name in self.bias.split(",") if name)


EXECUTION_FIELDS = ("param_dtype", "compute_dtype", "attention", "remat", "scan_unroll")


class Output(NamedTuple):
    hidden: jax.Array  # [B, T, D], what the head takes: after the last norm (and projection)
    cache: Cache | None
    # name -> (sum, count), means over the layers; see lm.nn.moe.balance
    aux: dict[str, tuple[jax.Array, jax.Array]]


class Block(nnx.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, key: jax.Array, config: Config):
        c = config
        attention_key, mlp_key = jax.random.split(key)
        # GPT-2's (Radford et al. 2019, section 2.3)
        out_std = c.init_std / (2 * c.num_layers) ** 0.5
        norm = dict(eps=c.norm_eps, use_bias="norm" in c.biases)
        self.residual = c.residual
        self.attention_norm = NORMS[c.norm](c.embed_dim, **norm)
        self.attention = Attention(attention_key, c, out_std=out_std)
        self.mlp_norm = NORMS[c.norm](c.embed_dim, **norm)
        if c.num_experts:
            self.mlp = MoE(mlp_key, c, out_std=out_std)
        else:
            self.mlp = MLP(
                mlp_key,
                c.embed_dim,
                c.mlp_dim,
                activation=c.activation,
                gated=c.gated_mlp,
                use_bias="mlp" in c.biases,
                std=c.init_std,
                out_std=out_std,
                dtype=c.param_dtype,
                compute_dtype=c.compute_dtype,
            )

    def __call__(self, x_BTD, positions_BT, visible, real_BT, cache=None):
        """(x_BTD, cache, aux)."""
        stream = lambda x: constrain(x, "batch", "length", "act_embed")
        mlp = (
            (lambda x: self.mlp(x, real_BT))
            if isinstance(self.mlp, MoE)
            else (lambda x: (self.mlp(x), {}))
        )
        # the first Transformer's (Vaswani et al. 2017, arXiv 1706.03762, section 3.1)
        if self.residual == "post_norm":
            attended_BTD, cache = self.attention(x_BTD, positions_BT, visible, cache)
            x_BTD = stream(self.attention_norm(x_BTD + attended_BTD))
            out_BTD, aux = mlp(x_BTD)
            return stream(self.mlp_norm(x_BTD + out_BTD)), cache, aux
        attended_BTD, cache = self.attention(
            self.attention_norm(x_BTD), positions_BT, visible, cache
        )
        # GPT-NeoX-20B (Black et al. 2022, arXiv 2204.06745, section 2.1)
        if self.residual == "parallel":
            out_BTD, aux = mlp(self.mlp_norm(x_BTD))
            return stream(x_BTD + attended_BTD + out_BTD), cache, aux
        x_BTD = stream(x_BTD + attended_BTD)
        out_BTD, aux = mlp(self.mlp_norm(x_BTD))
        return stream(x_BTD + out_BTD), cache, aux


class Transformer(nnx.Module):
    """`model(tokens, positions, segments)` gives hidden states; `model.logits(hidden)` is the head,
    so that whoever needs few positions pays for few. Modules own parameters and these two calls,
    nothing else: there is no random state in them.
    """

    def __init__(self, config: Config, key: jax.Array, *, stacked: bool = True):
        """Args: stacked: each parameter of the layers is one array for all of them, and a loop runs
        over it. Otherwise each layer has its own: for decoding on CPUs, where taking a layer out
        of a stack copies it. `unstack` turns the one's parameters into the other's.
        """
        c = self.config = config
        embed_key, position_key, layers_key, head_key = jax.random.split(key, 4)
        table = dict(std=c.init_std, dtype=c.param_dtype, compute_dtype=c.compute_dtype)
        table_dim = c.table_dim or c.embed_dim
        self.embed = Embed(embed_key, c.vocab_size, table_dim, axis="vocab", **table)
        learned = c.positions == "learned"
        self.position_embed = (
            Embed(
                position_key,
                c.position_offset + c.context_length,
                c.embed_dim,
                axis="position",
                **table,
            )
            if learned
            else None
        )
        keys = jax.random.split(layers_key, c.num_layers)
        self.layers = (
            nnx.vmap(lambda k: Block(k, c), in_axes=0, out_axes=0)(keys)
            if stacked
            else nnx.List([Block(k, c) for k in keys])
        )
        self.norm = (
            NORMS[c.norm](c.embed_dim, eps=c.norm_eps, use_bias="norm" in c.biases)
            if c.residual != "post_norm"
            else None
        )
        # Tied weights are one parameter that is called twice; the same Param under two attributes
        # would break tree transforms.
        self.head = (
            None
            if c.tie_embeddings
            else Embed(head_key, c.vocab_size, table_dim, axis="vocab", **table)
        )
        # OPT-350M's, after the embedding and before the head.
        between = lambda number, shape, axes: (
            param(jax.random.fold_in(key, number), shape, axes, c.param_dtype, std=c.init_std)
            if table_dim != c.embed_dim
            else None
        )
        self.project_in = between(1, (table_dim, c.embed_dim), ("table", "embed"))
        self.project_out = between(2, (c.embed_dim, table_dim), ("embed", "table"))

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        until_BT: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Args: tokens_BT: int32 ids. positions_BT: int32, each token's place in its document.
        segments_BT: int32; tokens attend within their segment only. With a cache each row is one
        sequence, and 0 is padding behind it. until_BT: int32, of rows in which a sequence
        branches: see `lm.nn.attention.tree_mask`. cache: keys and values of all layers, see
        `init_cache`. A call with several positions is the first one, and fills it.
        """
        c = self.config
        x_BTD = self.embed(tokens_BT)
        if self.project_in is not None:
            x_BTD = dense("btp,pd->btd", x_BTD, self.project_in, c.compute_dtype, "project_in")
        if self.position_embed is not None:
            x_BTD = x_BTD + self.position_embed(positions_BT + c.position_offset)
        x_BTD = constrain(x_BTD, "batch", "length", "act_embed")
        real_BT, segments_BT = segments_BT > 0, gather_sequence(segments_BT)
        slots = jax.tree.leaves(cache)[0].shape[-2] if cache is not None else 0
        if slots and tokens_BT.shape[1] == 1:
            mask_BTS = cache_mask(positions_BT, slots, c.window)
        elif until_BT is not None:
            mask_BTS = tree_mask(
                segments_BT, gather_sequence(positions_BT), gather_sequence(until_BT), c.window
            )
        else:
            mask_BTS = None if c.attention in SPLASH else causal_mask(segments_BT, c.window)
        visible = Visible(
            mask_BTS, segments_BT, cache_slots(positions_BT, segments_BT, slots) if slots else None
        )
        if isinstance(self.layers, nnx.List):
            caches, auxes = [], []
            for layer, layer_cache in zip(self.layers, cache or [None] * c.num_layers):
                x_BTD, layer_cache, aux = layer(x_BTD, positions_BT, visible, real_BT, layer_cache)
                caches.append(layer_cache)
                auxes.append(aux)
            return Output(
                self._finish(x_BTD),
                caches if cache else None,
                _mean_of_layers(jax.tree.map(lambda *xs: jnp.stack(xs), *auxes)),
            )
        graphdef, stack = nnx.split(self.layers)

        def body(x_BTD, layer):
            params, layer_cache = layer
            x_BTD, layer_cache, aux = nnx.merge(graphdef, params)(
                x_BTD, positions_BT, visible, real_BT, layer_cache
            )
            return x_BTD, (layer_cache, aux)

        mesh = jax.sharding.get_abstract_mesh()
        # on one device "none" has no gathered weights to drop
        if cache is None and (c.remat != "none" or mesh.size > 1):
            body = jax.checkpoint(body, policy=remat_policy(c.remat), prevent_cse=False)
        x_BTD, (cache, aux) = jax.lax.scan(body, x_BTD, (stack, cache), unroll=c.scan_unroll)
        return Output(self._finish(x_BTD), cache, _mean_of_layers(aux))

    def _finish(self, x_BTD):
        """From the last layer to the head."""
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        if self.project_out is not None:
            x_BTD = dense(
                "btd,dp->btp", x_BTD, self.project_out, self.config.compute_dtype, "project_out"
            )
        return x_BTD

    @property
    def head_table(self) -> nnx.Param:
        """The head's weight, [V, D]."""
        return (self.head or self.embed).table

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32 logits [..., V] of hidden states [..., D]."""
        logits = (self.head or self.embed).attend(hidden)
        return constrain(logits, "batch", "length", "act_vocab") if logits.ndim == 3 else logits

    def init_cache(self, batch_size: int, length: int) -> "Cache | list[Cache]":
        """An empty cache for `batch_size` sequences of up to `length` tokens, or of the window's
        size if that is less; stacked as the layers are.
        """
        c = self.config
        shape = (batch_size, c.num_kv_heads, min(length, c.window or length), c.head_dim)
        empty = lambda *stack: constrain(
            jnp.zeros((*stack, *shape), c.compute_dtype),
            *["layers"] * len(stack),
            "batch",
            "kv_heads",
            None,
            None,
        )
        if isinstance(self.layers, nnx.List):
            return [Cache(empty(), empty()) for _ in range(c.num_layers)]
        return Cache(empty(c.num_layers), empty(c.num_layers))


def _mean_of_layers(aux):
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), aux)


def unstack(model: Transformer, params: dict) -> tuple[Any, dict]:
    """(graphdef, parameters) of the same model with layers of their own."""
    graphdef = nnx.split(
        nnx.eval_shape(lambda: Transformer(model.config, jax.random.key(0), stacked=False)),
        nnx.Param,
    )[0]
    layer = lambda i: jax.tree.map(lambda p: p[i], params["layers"])
    return graphdef, params | {"layers": {i: layer(i) for i in range(model.config.num_layers)}}
