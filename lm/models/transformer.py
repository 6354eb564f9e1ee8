"""The decoder-only Transformer: pre-norm, layers stacked and scanned. One model; its presets are data (presets.py).

Letters: B batch, T length, D embed, F mlp, N heads, K kv heads, H head size, V vocab, L layers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.nn.attention import SPLASH, Attention, Cache, Visible, cache_mask, causal_mask
from lm.nn.layers import ACTIVATIONS, MLP, NORMS, Embed
from lm.sharding import constrain, whole_rows

POSITIONS = ("learned", "rope")
ATTENTION = ("xla", "cudnn", *SPLASH)
# What the backward pass may find saved of each layer: results of matmuls, and the attention kernel's own residuals (splash).
REMAT_NAMES = ("query", "key", "value", "attention", "out", "up", "gate", "down")
REMAT = {"none": REMAT_NAMES, "full": (), "dots": REMAT_NAMES}


def kept_results(remat: str) -> tuple[list[str], list[str]]:
    """The names that config.model.remat keeps (on the chip, in the host's memory): a key of `REMAT`, or names of `REMAT_NAMES` with commas
    between them, those to be kept in the host's memory with ":host" behind them. "none" keeps others besides.

    Raises:
      ValueError: anything else.
    """
    names = [name.partition(":") for name in (REMAT[remat] if remat in REMAT else remat.split(","))]
    if wrong := [f"{name}{colon}{place}" for name, colon, place in names if name not in REMAT_NAMES or (colon and place != "host")]:
        raise ValueError(f"config.model.remat = {remat!r}: {wrong}; valid: {list(REMAT)}, or names of {list(REMAT_NAMES)} with commas between "
                         f"them, with \":host\" behind those to be kept in the host's memory")
    return [name for name, _, place in names if not place], [name for name, _, place in names if place]


def remat_policy(remat: str):
    """The policy of jax.checkpoint for config.model.remat. What is not kept is computed again in the backward pass; gathered weights always
    are gathered again.

    Raises:
      ValueError: see `kept_results`.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return policies.save_anything_except_these_names("weights")
    saved, offloaded = kept_results(remat)
    if offloaded:
        return policies.save_and_offload_only_these_names(names_which_can_be_saved=saved, names_which_can_be_offloaded=offloaded,
                                                          offload_src="device", offload_dst="pinned_host")
    return policies.save_only_these_names(*saved)


@dataclasses.dataclass(frozen=True)
class Config:
    """The model. Every field changes parameters or logits, but for the last five (how it is executed)."""
    vocab_size: int
    context_length: int  # longest sequence; the size of the position table when positions are learned
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str  # layernorm | rmsnorm
    norm_eps: float
    activation: str  # gelu_tanh | silu | relu_squared
    gated_mlp: bool
    positions: str  # learned | rope
    rope_theta: float
    use_bias: bool  # on every dense layer and LayerNorm
    tie_embeddings: bool
    init_std: float  # of every weight; those that write to the residual stream are divided by sqrt(2 * num_layers)
    param_dtype: Any  # of all parameters but the norms', which are f32
    compute_dtype: Any
    attention: str  # xla | cudnn (GPU, bf16) | splash (TPU) | splash_interpreted (anywhere, slowly: for tests)
    remat: str  # see remat_policy
    scan_unroll: int  # layers in one iteration of the loop over layers

    def __post_init__(self):
        for field, valid in (("norm", NORMS), ("activation", ACTIVATIONS), ("positions", POSITIONS), ("attention", ATTENTION)):
            if getattr(self, field) not in valid:
                raise ValueError(f"config.model.{field} = {getattr(self, field)!r}; valid: {sorted(valid)}")
        for field in ("param_dtype", "compute_dtype"):
            if getattr(self, field) not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
                raise ValueError(f"config.model.{field} = {getattr(self, field)!r}; valid: ['bfloat16', 'float32']")
        remat_policy(self.remat)
        sizes = ("vocab_size", "context_length", "num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "scan_unroll")
        if small := [f for f in sizes if getattr(self, f) < 1]:
            raise ValueError(f"config.model: {', '.join(f'{f} = {getattr(self, f)}' for f in small)}; sizes must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"config.model: num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"config.model.head_dim = {self.head_dim} must be even with rotary positions")


EXECUTION_FIELDS = ("param_dtype", "compute_dtype", "attention", "remat", "scan_unroll")


class Output(NamedTuple):
    hidden: jax.Array  # [B, T, D], after the last norm
    cache: Cache | None
    aux: dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


class Block(nnx.Module):
    """One layer: attention and MLP, each on a normed copy of the residual stream and added back to it."""

    def __init__(self, key: jax.Array, config: Config):
        c = config
        attention_key, mlp_key = jax.random.split(key)
        out_std = c.init_std / (2 * c.num_layers) ** 0.5  # GPT-2's (Radford et al. 2019, section 2.3)
        norm = dict(eps=c.norm_eps, use_bias=c.use_bias)
        self.attention_norm = NORMS[c.norm](c.embed_dim, **norm)
        self.attention = Attention(attention_key, c, out_std=out_std)
        self.mlp_norm = NORMS[c.norm](c.embed_dim, **norm)
        self.mlp = MLP(mlp_key, c.embed_dim, c.mlp_dim, activation=c.activation, gated=c.gated_mlp, use_bias=c.use_bias,
                       std=c.init_std, out_std=out_std, dtype=c.param_dtype, compute_dtype=c.compute_dtype)

    def __call__(self, x_BTD, positions_BT, visible, cache=None):
        attended_BTD, cache = self.attention(self.attention_norm(x_BTD), positions_BT, visible, cache)
        x_BTD = constrain(x_BTD + attended_BTD, "batch", "length", "act_embed")
        x_BTD = constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD)), "batch", "length", "act_embed")
        return x_BTD, cache


class Transformer(nnx.Module):
    """`model(tokens, positions, segments)` gives hidden states; `model.logits(hidden)` is the head, so that whoever needs few
    positions pays for few. Modules own parameters and these two calls, nothing else: there is no random state in them."""

    def __init__(self, config: Config, key: jax.Array):
        c = self.config = config
        embed_key, position_key, layers_key, head_key = jax.random.split(key, 4)
        table = dict(std=c.init_std, dtype=c.param_dtype, compute_dtype=c.compute_dtype)
        self.embed = Embed(embed_key, c.vocab_size, c.embed_dim, axis="vocab", **table)
        learned = c.positions == "learned"
        self.position_embed = Embed(position_key, c.context_length, c.embed_dim, axis="position", **table) if learned else None
        self.layers = nnx.vmap(lambda k: Block(k, c), in_axes=0, out_axes=0)(jax.random.split(layers_key, c.num_layers))
        self.norm = NORMS[c.norm](c.embed_dim, eps=c.norm_eps, use_bias=c.use_bias)
        # Tied weights are one parameter that is called twice; the same Param under two attributes would break tree transforms.
        self.head = None if c.tie_embeddings else Embed(head_key, c.vocab_size, c.embed_dim, axis="vocab", **table)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, *, cache: Cache | None = None) -> Output:
        """Args:
          tokens_BT: int32 ids.
          positions_BT: int32, each token's place in its document.
          segments_BT: int32; tokens attend within their segment only. Ignored with a cache: there each row is one sequence.
          cache: [L, B, S, K, H] keys and values, see `init_cache`.
        """
        c = self.config
        x_BTD = self.embed(tokens_BT)
        if self.position_embed is not None:
            x_BTD = x_BTD + self.position_embed(positions_BT)
        x_BTD = constrain(x_BTD, "batch", "length", "act_embed")
        segments_BT = whole_rows(segments_BT)
        if cache is not None:
            mask_BTS = cache_mask(positions_BT, cache.key.shape[2])
        else:
            mask_BTS = None if c.attention in SPLASH else causal_mask(segments_BT)
        visible = Visible(mask_BTS, segments_BT)
        graphdef, stack = nnx.split(self.layers)

        def body(x_BTD, layer):
            params, layer_cache = layer
            return nnx.merge(graphdef, params)(x_BTD, positions_BT, visible, layer_cache)
        mesh = jax.sharding.get_abstract_mesh()
        if cache is None and (c.remat != "none" or mesh.size > 1):  # on one device "none" has no gathered weights to drop
            body = jax.checkpoint(body, policy=remat_policy(c.remat), prevent_cse=False)
        x_BTD, cache = jax.lax.scan(body, x_BTD, (stack, cache), unroll=c.scan_unroll)
        return Output(self.norm(x_BTD), cache, {})

    @property
    def head_table(self) -> nnx.Param:
        """The head's weight, [V, D]."""
        return (self.head or self.embed).table

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32 logits [..., V] of hidden states [..., D]."""
        logits = (self.head or self.embed).attend(hidden)
        return constrain(logits, "batch", "length", "act_vocab") if logits.ndim == 3 else logits

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for `batch_size` sequences of up to `length` tokens."""
        c = self.config
        shape = (c.num_layers, batch_size, length, c.num_kv_heads, c.head_dim)
        return Cache(jnp.zeros(shape, c.compute_dtype), jnp.zeros(shape, c.compute_dtype))
