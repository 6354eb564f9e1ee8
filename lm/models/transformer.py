"""The Transformer of one stack, its layers scanned: a decoder, or an encoder that sees all of a
text (config.model.visible). One model; its presets are data (presets.py).

Letters: B batch, T length, D embed, F mlp, N heads, K kv heads, H head size, V vocab, L layers.
"""

import dataclasses
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lm import config as config_lib
from lm.collectives import gather_sequence
from lm.models.cached import CachedDecoding
from lm.nn import lora, masks, watch
from lm.nn.attention import SPLASH, SPLASH_KINDS, Attention, Cache
from lm.nn.layers import (
    MLP,
    NORMS,
    Embed,
    Head,
    HeadTransform,
    VocabHead,
    add_bias,
    dense,
    dropout,
    fold_in_each,
    param,
)
from lm.nn.masks import Mask, Visible
from lm.nn.moe import MoE
from lm.nn.positions import parse_scaling
from lm.sharding import check_heads, constrain

BIASES = ("qkv", "out", "mlp", "norm", "head")
# Heads beside the vocabulary's -> their outputs; None: config.model.heads says how many.
HEADS = {"scalar": 1, "classes": None, "token_labels": None}
# What the backward pass may find saved of each layer: results of matmuls, and the attention
# kernel's own residuals (splash).
REMAT_NAMES = ("query", "key", "value", "attention", "out", "up", "gate", "down")
# "none" saves all else too, see `remat_policy`.
REMAT = {"none": REMAT_NAMES, "full": (), "dots": REMAT_NAMES}
VISIBLE = {"causal": masks.CAUSAL, "full": masks.FULL}
SQUARES = "activations"  # in a layer's aux: what lm.nn.watch.squares gives


def saved_names(remat: str) -> tuple[list[str], list[str]]:
    """The names that config.model.remat saves: (on the chip, in the host's memory).

    Args:
      remat: a key of `REMAT`, or names of `REMAT_NAMES` with commas between them. Those to be saved
        in the host's memory have ":host" behind them. "none" saves others besides.

    Raises:
      ValueError: anything else.
    """
    names = REMAT[remat] if remat in REMAT else remat.split(",")
    on_chip, on_host, wrong = [], [], []
    for name in names:
        result, colon, place = name.partition(":")
        if result not in REMAT_NAMES or (colon and place != "host"):
            wrong.append(name)
        elif place:
            on_host.append(result)
        else:
            on_chip.append(result)

    if wrong:
        raise ValueError(
            f"config.model.remat = {remat!r}: {wrong}; valid: {list(REMAT)}, or names of "
            f'{list(REMAT_NAMES)} with commas between them, with ":host" behind those to be kept '
            "in the host's memory"
        )
    return on_chip, on_host


def remat_policy(remat: str):
    """The policy of jax.checkpoint for config.model.remat.

    What is not saved is computed again in the backward pass. Gathered weights always are gathered
    again.

    Raises:
      ValueError: see `saved_names`.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return policies.save_anything_except_these_names("weights")
    on_chip, on_host = saved_names(remat)
    if on_host:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=on_chip,
            names_which_can_be_offloaded=on_host,
            offload_src="device",
            offload_dst="pinned_host",
        )
    return policies.save_only_these_names(*on_chip)


@dataclasses.dataclass(frozen=True)
class Config(config_lib.ModelFields):
    """The model's fields (lm.config.ModelFields), checked.

    Every field changes parameters or logits, but for `EXECUTION_FIELDS`: how it is executed.

    Raises:
      ValueError: values that no model can have, each with those that are valid.
    """

    def __post_init__(self):
        config_lib.check_model(dataclasses.asdict(self), "config.model", config_lib.MODEL)
        if not self.vocab_size or not self.compute_dtype:
            raise ValueError(
                f"config.model.vocab_size = {self.vocab_size}, compute_dtype = "
                f"{self.compute_dtype!r}: a model of its own needs both"
            )
        check_biases(self.bias)
        masks.static_kind(VISIBLE[self.visible], self.window)
        self._check_heads()
        self._check_experts()
        self._check_rope()
        parse_heads(self.heads)
        self._check_lora()
        if self.attention_dropout and self.attention != "xla":
            raise ValueError(
                f"config.model.attention_dropout = {self.attention_dropout} needs "
                f"config.model.attention = 'xla'; {self.attention!r} never has the probabilities"
            )
        remat_policy(self.remat)

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.model.num_heads = {self.num_heads} must be a multiple of "
                f"config.model.num_kv_heads = {self.num_kv_heads}"
            )

    def _check_experts(self) -> None:
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"config.model.experts_per_token = {self.experts_per_token}: wanted 1 to "
                f"config.model.num_experts = {self.num_experts}"
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

    def _check_rope(self) -> None:
        if self.positions != "rope":
            return
        if int(self.head_dim * self.rope_fraction) % 2:
            raise ValueError(
                f"config.model.head_dim = {self.head_dim}, rope_fraction = "
                f"{self.rope_fraction}: an even number of dims must turn, 2 to all"
            )
        parse_scaling(self.rope_scaling, int(self.head_dim * self.rope_fraction))

    def _check_lora(self) -> None:
        if self.quantize and not self.lora_rank:
            raise ValueError(
                f"config.model.quantize = {self.quantize!r} is for weights that stay as they are; "
                "wanted config.model.lora_rank above 0, whose adapters are trained"
            )
        targets = lora.parse_targets(self.lora_targets)
        in_experts = [name for name in targets if name in ("up", "gate", "down")]
        if self.lora_rank and self.num_experts and in_experts:
            raise ValueError(
                f"config.model.lora_targets = {self.lora_targets!r}: experts have no adapters; "
                f"take {in_experts} out"
            )

    scale_scores = True  # attention's, by the heads' size

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ValueError if the mesh can't hold the model."""
        check_heads(mesh, self.num_heads)

    @property
    def branches(self) -> bool:
        """Whether it reads rows in which sequences branch: an encoder would see all branches."""
        return self.visible == "causal"

    @property
    def shortest_row(self) -> int:
        """Tokens of the shortest row that is worth a compilation of its own."""
        # Splash attention's tiles are 128 positions wide. Elsewhere 16 saves compilations for
        # prompts of a few tokens.
        return 128 if self.attention in SPLASH else 16

    @property
    def biases(self) -> tuple[str, ...]:
        return parse_biases(self.bias)


def parse_biases(bias: str) -> tuple[str, ...]:
    """The names of config.model.bias."""
    return tuple(name for name in bias.split(",") if name)


def check_biases(bias: str) -> None:
    """Raises ValueError for a config.model.bias with other names than `BIASES`."""
    unknown = [name for name in parse_biases(bias) if name not in BIASES]
    if unknown:
        raise ValueError(
            f"config.model.bias = {bias!r}: {unknown}; valid: names of {list(BIASES)} with commas "
            'between them, or ""'
        )


def flops_per_token(
    config: Config, length: int, *, causal: bool = True, backward: bool = True, head: float = 1.0
) -> float:
    """Model FLOPs of one token in training (forward and, unless told otherwise, backward), by the
    matmuls that the model needs, recomputation not counted.

    6 per weight of a matmul that the token meets (of the experts, those of one token; 2 forward, 4
    backward; Kaplan et al. 2020, arXiv 2001.08361, section 2.1; the head is one, the embedding
    look-up is none), and 12 N H per layer for each key that a query sees (scores and values;
    Chowdhery et al. 2022, arXiv 2204.02311, appendix B): `length` keys, or half with `causal`,
    since the masked half need not be computed.

    Args:
      length: tokens a row. Packed documents count as one sequence of that length.
      causal: counts the keys up to each query only; those of an encoder are counted all.
      head: share of the tokens whose logits are needed.
    """
    c = config
    attention = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    experts = c.experts_per_token if c.num_experts else 1
    mlp = c.embed_dim * (experts * c.mlp_dim + c.shared_mlp_dim) * (3 if c.gated_mlp else 2)
    router = c.embed_dim * (c.num_experts + (1 if c.shared_mlp_dim else 0))
    table_dim = c.table_dim or c.embed_dim
    projections = 2 * table_dim * c.embed_dim if table_dim != c.embed_dim else 0
    head *= c.vocab_size * table_dim + (table_dim**2 if c.head_transform else 0)
    weights = c.num_layers * (attention + mlp + router) + head + projections
    window = min(c.window or length, length)
    sees_all = c.visible == "full" or not causal
    keys = length if sees_all else window - window**2 / (2 * length)
    adapters = _adapter_size(c) if c.lora_rank else 0
    scores = c.num_layers * c.num_heads * c.head_dim * keys

    forward = 2.0 * (weights + adapters) + 4.0 * scores
    if not backward:
        return forward
    # A weight passes a gradient on, and gets one, unless only its adapter is trained.
    of_weights = 2.0 * weights + 4.0 * adapters if c.lora_rank else 4.0 * weights
    return forward + of_weights + 8.0 * scores


def _adapter_size(config: Config) -> int:
    """Parameters of all adapters."""
    c = config
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    # What a weight has beside the embed dim.
    others = dict(query=heads, key=kv_heads, value=kv_heads, out=heads)
    others |= dict(up=c.mlp_dim, gate=c.mlp_dim if c.gated_mlp else -c.embed_dim, down=c.mlp_dim)
    sizes = [c.embed_dim + others[name] for name in lora.parse_targets(c.lora_targets)]
    return c.num_layers * c.lora_rank * sum(sizes)


EXECUTION_FIELDS = ("param_dtype", "compute_dtype", "attention", "remat", "scan_unroll")


def parse_heads(heads: str) -> dict[str, int]:
    """Returns {name: outputs} of config.model.heads.

    Raises:
      ValueError: an unknown head, a number of outputs that is missing or none, or a head twice.
    """
    sizes: dict[str, int] = {}
    for item in filter(None, heads.split(",")):
        name, _, size = item.partition(":")
        fixed = HEADS.get(name)
        if name not in HEADS or name in sizes or (size if fixed else not size.isdecimal()):
            raise ValueError(
                f"config.model.heads = {heads!r}: {item!r}; valid, with commas between them: "
                '"scalar", "classes:N", "token_labels:N"'
            )
        sizes[name] = fixed or int(size)
        if not 1 <= sizes[name] <= 2**20:
            raise ValueError(f"config.model.heads = {heads!r}: {item!r}; wanted 1 to {2**20}")
    return sizes


class Output(NamedTuple):
    hidden: jax.Array  # [B, T, D], what heads take: after the last norm (and projection)
    cache: Cache | list[Cache] | None  # a list where layers are not stacked
    # name -> (sum, count), averaged over the layers; see lm.nn.moe.balance
    aux: dict[str, tuple[jax.Array, jax.Array]]


class Block(nnx.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, key: jax.Array, config: Config):
        c = config
        attention_key, mlp_key = jax.random.split(key)
        # As GPT-2 scales them (Radford et al. 2019, section 2.3).
        out_std = c.init_std / (2 * c.num_layers) ** 0.5

        norm = dict(eps=c.norm_eps, use_bias="norm" in c.biases)
        self.residual = c.residual
        self.dropout = c.dropout
        self.attention_norm = NORMS[c.norm](c.embed_dim, **norm)
        self.attention = Attention(attention_key, c, out_std=out_std)
        self.mlp_norm = NORMS[c.norm](c.embed_dim, **norm)
        if c.num_experts:
            self.mlp = MoE(mlp_key, c, out_std=out_std)
        else:
            use_bias = "mlp" in c.biases
            self.mlp = MLP(mlp_key, c, mlp_dim=c.mlp_dim, use_bias=use_bias, out_std=out_std)

    def __call__(
        self, x_BTD, positions_BT, mask: Mask, valid_BT, cache=None, *, decode=False, keys_B=None
    ):
        """Returns (x_BTD, cache, aux). The arguments are those of `Attention` and `MoE`; aux has
        `SQUARES` besides that of `MoE`.
        """
        probs_keys, attention_keys, mlp_keys = keys_of_sites(keys_B, 3)

        def attend(x_BTD):
            attended_BTD, new_cache = self.attention(
                x_BTD, positions_BT, mask, cache, decode=decode, keys_B=probs_keys
            )
            return dropout(attended_BTD, self.dropout, attention_keys), new_cache

        def mlp(x_BTD):
            out_BTD, aux = self._mlp(x_BTD, valid_BT)
            return dropout(out_BTD, self.dropout, mlp_keys), aux

        # As in the first Transformer (Vaswani et al. 2017, arXiv 1706.03762, section 3.1): each
        # sum is normalized.
        if self.residual == "post_norm":
            attended_BTD, cache = attend(x_BTD)
            x_BTD = stream(self.attention_norm(x_BTD + attended_BTD))
            out_BTD, aux = mlp(x_BTD)
            x_BTD = stream(self.mlp_norm(x_BTD + out_BTD))
        # As in GPT-NeoX-20B (Black et al. 2022, arXiv 2204.06745, section 2.1): attention and MLP
        # read the same input.
        elif self.residual == "parallel":
            attended_BTD, cache = attend(self.attention_norm(x_BTD))
            out_BTD, aux = mlp(self.mlp_norm(x_BTD))
            x_BTD = stream(x_BTD + attended_BTD + out_BTD)
        else:
            attended_BTD, cache = attend(self.attention_norm(x_BTD))
            x_BTD = stream(x_BTD + attended_BTD)
            out_BTD, aux = mlp(self.mlp_norm(x_BTD))
            x_BTD = stream(x_BTD + out_BTD)

        activations = dict(attention=attended_BTD, mlp=out_BTD, residual=x_BTD)
        return x_BTD, cache, aux | {SQUARES: watch.squares(valid_BT, activations)}

    def _mlp(self, x_BTD, valid_BT):
        if isinstance(self.mlp, MoE):
            return self.mlp(x_BTD, valid_BT)
        return self.mlp(x_BTD), {}


def keys_of_sites(keys_B: jax.Array | None, number: int) -> list[jax.Array | None]:
    """A key for each row, for each of so many sites of dropout."""
    if keys_B is None:
        return [None] * number
    keys_BN = fold_in_each(keys_B, jnp.arange(number))
    return [keys_BN[:, i] for i in range(number)]


def stream(x_BTD: jax.Array) -> jax.Array:
    """The residual stream, constrained to its layout."""
    return constrain(x_BTD, "batch", "length", "act_embed")


def make_mask(
    config, positions_BT, segments_BT, visible: Visible, *, num_slots: int = 0, decode: bool = False
) -> Mask:
    """What each query may attend to, of whole rows.

    Args:
      num_slots: of the cache; 0: there is none.
      decode: the queries attend to the cache.
    """
    c = config
    segments_BT = gather_sequence(segments_BT)
    slots_BT = None
    if num_slots:
        slots_BT = masks.cache_slots(positions_BT, segments_BT, num_slots)
    if decode:
        mask_BTS = masks.cache_mask(positions_BT, num_slots, c.window)
        return Mask("cache", mask_BTS, segments_BT, slots_BT)

    kind = masks.static_kind(visible, c.window)
    mask_BTT = None
    if c.attention not in SPLASH or kind not in SPLASH_KINDS:
        whole = jax.tree.map(gather_sequence, visible)
        positions_BT = gather_sequence(positions_BT)
        mask_BTT = masks.array(whole, segments_BT, positions_BT, c.window)
    return Mask(kind, mask_BTT, segments_BT, slots_BT)


def run_layers(config, layers, x_BTD, cache, inputs, *, decode: bool = False, keys_B=None):
    """Runs layers, stacked or not. Returns (x_BTD, cache, aux); aux is stacked, and the cache as
    the layers are.

    Args:
      cache: of all layers, or None.
      inputs: what every layer gets beside the residual stream and its cache.
      keys_B: see `Transformer.__call__`.
    """
    run = _loop_layers if isinstance(layers, nnx.List) else _scan_layers
    return run(config, layers, x_BTD, cache, inputs, decode, keys_B)


def _scan_layers(config, layers, x_BTD, cache, inputs, decode: bool, keys_B):
    graphdef, stack = nnx.split(layers)

    def body(x_BTD, layer):
        params, layer_cache, keys_B = layer
        block = nnx.merge(graphdef, params)
        x_BTD, layer_cache, aux = block(x_BTD, *inputs, layer_cache, decode=decode, keys_B=keys_B)
        return x_BTD, (layer_cache, aux)

    # On one device "none" has no gathered weights to drop, and needs no jax.checkpoint, which would
    # cost CPUs a rounding of each saved result in an operation of its own.
    mesh = jax.sharding.get_abstract_mesh()
    if cache is None and (config.remat != "none" or mesh.size > 1):
        body = jax.checkpoint(body, policy=remat_policy(config.remat), prevent_cse=False)
    num_layers = jax.tree.leaves(stack)[0].shape[0]
    keys_LB = _keys_of_layers(keys_B, num_layers)
    x_BTD, (cache, aux) = jax.lax.scan(
        body, x_BTD, (stack, cache, keys_LB), unroll=min(config.scan_unroll, num_layers)
    )
    return x_BTD, cache, aux


def _loop_layers(config, layers, x_BTD, cache, inputs, decode: bool, keys_B):
    caches, auxes = [], []
    nothing = [None] * len(layers)
    keys_LB = _keys_of_layers(keys_B, len(layers))
    for layer, layer_cache, layer_keys in zip(
        layers, cache or nothing, nothing if keys_LB is None else keys_LB
    ):
        x_BTD, layer_cache, aux = layer(
            x_BTD, *inputs, layer_cache, decode=decode, keys_B=layer_keys
        )
        caches.append(layer_cache)
        auxes.append(aux)
    aux = jax.tree.map(lambda *layers: jnp.stack(layers), *auxes)
    return x_BTD, caches if cache else None, aux


class Transformer(CachedDecoding, nnx.Module):
    """A decoder-only Transformer.

    `model(tokens, positions, segments)` gives hidden states; `model.logits(hidden)` is the head, so
    that whoever needs few positions pays for few. `model.head_table` is the head's weight,
    `model.init_cache` an empty cache. There is no random state in a module: without keys a call is
    deterministic.

    Args:
      stacked: each parameter of the layers is one array for all of them, and a loop runs over it.
        Otherwise layers are unstacked, each with its own: for decoding on CPUs, where taking a
        layer out of a stack copies it. `for_decoding` turns the one's parameters into the other's.
    """

    def __init__(self, config: Config, key: jax.Array, *, stacked: bool = True):
        c = self.config = config
        embed_key, position_key, layers_key, head_key = jax.random.split(key, 4)
        table = dict(std=c.init_std, dtype=c.param_dtype, compute_dtype=c.compute_dtype)
        table_dim = c.table_dim or c.embed_dim

        self.embed = Embed(embed_key, c.vocab_size, table_dim, axis="vocab", **table)
        if c.positions == "learned":
            rows = c.position_offset + c.context_length
            self.position_embed = Embed(position_key, rows, c.embed_dim, axis="position", **table)
        else:
            self.position_embed = None

        def make_block(key):
            return Block(key, c)

        keys = jax.random.split(layers_key, c.num_layers)
        if stacked:
            self.layers = nnx.vmap(make_block, in_axes=0, out_axes=0)(keys)
        else:
            self.layers = nnx.List([make_block(key) for key in keys])

        def norm(dim: int):
            return NORMS[c.norm](dim, eps=c.norm_eps, use_bias="norm" in c.biases)

        self.norm = norm(c.embed_dim) if c.residual != "post_norm" else None
        self.embed_norm = norm(c.embed_dim) if c.embed_norm else None
        if c.token_types:
            type_key = jax.random.fold_in(key, 4)
            self.type_embed = Embed(type_key, c.token_types, c.embed_dim, axis="position", **table)
        else:
            self.type_embed = None
        # Tied weights are one parameter that is called twice; the same Param under two attributes
        # would break tree transforms.
        if c.tie_embeddings:
            self.head = None
        else:
            self.head = Embed(head_key, c.vocab_size, table_dim, axis="vocab", **table)

        options = dict(std=c.init_std, dtype=c.param_dtype, compute_dtype=c.compute_dtype)
        heads = {}
        for number, (name, size) in enumerate(parse_heads(c.heads).items()):
            # A key of its own: the other weights are those of the model without heads.
            head_key = jax.random.fold_in(jax.random.fold_in(key, 3), number)
            heads[name] = Head(head_key, table_dim, size, **options)
        self.heads = nnx.Dict(heads) if heads else None
        if c.head_transform:
            transform_key = jax.random.fold_in(key, 5)
            self.head_transform = HeadTransform(
                transform_key, table_dim, c.activation, norm(table_dim), **options
            )
        else:
            self.head_transform = None
        if "head" in c.biases:
            self.head_bias = param(None, (c.vocab_size,), ("vocab",), c.param_dtype)
        else:
            self.head_bias = None

        # OPT-350M projects after the embedding and before the head.
        if table_dim != c.embed_dim:
            in_key, out_key = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
            shape, axes = (table_dim, c.embed_dim), ("table", "embed")
            options = dict(dtype=c.param_dtype, std=c.init_std)
            self.project_in = param(in_key, shape, axes, **options)
            self.project_out = param(out_key, shape[::-1], axes[::-1], **options)
        else:
            self.project_in = self.project_out = None

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        visible: Visible | None = None,
        cache: Cache | list[Cache] | None = None,
        decode: bool = False,
        keys_B: jax.Array | None = None,
    ) -> Output:
        """Hidden states of each position.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32, each token's place in its document.
          segments_BT: int32; tokens attend within their segment only. With a cache each row is one
            sequence, and 0 is padding behind it.
          visible: what each token attends to within its segment; None: what config.visible says.
          cache: keys and values of all layers, see `init_cache`. The first call with one (prefill)
            fills it.
          decode: this is a later call: T is 1, and the token attends to the cache.
          keys_B: a key for each row, for dropout; None: there is none.
        """
        c = self.config
        x_BTD = self.embed(tokens_BT)
        if self.project_in is not None:
            x_BTD = dense("btp,pd->btd", x_BTD, self.project_in, c.compute_dtype, "project_in")
        if self.position_embed is not None:
            x_BTD = x_BTD + self.position_embed(positions_BT + c.position_offset)
        if self.type_embed is not None:
            x_BTD = x_BTD + self.type_embed(jnp.zeros_like(tokens_BT))
        if self.embed_norm is not None:
            x_BTD = self.embed_norm(x_BTD)
        is_random = c.dropout or c.attention_dropout
        embed_keys, layer_keys = keys_of_sites(keys_B if is_random else None, 2)
        x_BTD = stream(dropout(x_BTD, c.dropout, embed_keys))

        valid_BT = segments_BT > 0
        visible = visible or VISIBLE[c.visible]
        num_slots = jax.tree.leaves(cache)[0].shape[-2] if cache is not None else 0
        mask = make_mask(c, positions_BT, segments_BT, visible, num_slots=num_slots, decode=decode)
        seen = watch.squares(valid_BT, {"embed": x_BTD})
        inputs = (positions_BT, mask, valid_BT)
        x_BTD, cache, aux = run_layers(
            c, self.layers, x_BTD, cache, inputs, decode=decode, keys_B=layer_keys
        )
        for name, sums_L in aux.pop(SQUARES).items():
            seen[f"layers/*/{name}"] = sums_L
        watch.report(self, seen)

        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        if self.project_out is not None:
            x_BTD = dense("btd,dp->btp", x_BTD, self.project_out, c.compute_dtype, "project_out")
        mean_of_layers = jax.tree.map(lambda x: jnp.mean(x, axis=0), aux)
        return Output(x_BTD, cache, mean_of_layers)

    def for_decoding(self, params: dict, platform: str) -> tuple[Any, dict]:
        """(graphdef, parameters) of this model in the form that decodes fastest on a platform.

        A scan over stacked layers takes each layer's weights out of the stack. On CPUs that is a
        copy, of all weights at every token: layers are unstacked there.
        """
        c = self.config
        if platform != "cpu" or isinstance(self.layers, nnx.List):
            return nnx.split(self, nnx.Param)[0], params
        abstract = nnx.eval_shape(lambda: type(self)(c, jax.random.key(0), stacked=False))
        graphdef = nnx.split(abstract, nnx.Param)[0]
        return graphdef, params | {"layers": unstacked(params["layers"], c.num_layers)}

    @property
    def head_table(self) -> nnx.Param:
        """The head's weight, [V, D]."""
        return (self.head or self.embed).table

    def vocab_head(self, hidden: jax.Array) -> VocabHead:
        """What makes the logits of hidden states [..., D]."""
        if self.head_transform is not None:
            hidden = self.head_transform(hidden)
        return VocabHead(hidden, self.head_table, self.head_bias)

    def head_outputs(self, name: str, hidden: jax.Array) -> jax.Array:
        """f32 [..., K] of hidden states [..., D], by one of config.model.heads.

        Raises:
          ValueError: the model has no such head.
        """
        if self.heads is None or name not in self.heads:
            raise ValueError(
                f"the model has no head {name!r}; config.model.heads = {self.config.heads!r}"
            )
        return self.heads[name](hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32 logits [..., V] of hidden states [..., D]."""
        logits = (self.head or self.embed).attend(self.vocab_head(hidden).state)
        if self.head_bias is not None:
            logits = add_bias(logits, self.head_bias)
        return constrain(logits, "batch", "length", "act_vocab") if logits.ndim == 3 else logits

    def init_cache(self, batch_size: int, length: int) -> Cache | list[Cache]:
        """An empty cache for `batch_size` sequences of up to `length` tokens, or of the window's
        size if that is less; stacked as the layers are.

        Raises:
          ValueError: an encoder, which continues no text.
        """
        c = self.config
        if c.visible == "full":
            raise ValueError(
                "config.model.visible = 'full': the model sees texts whole, and continues none; "
                "wanted a causal model"
            )
        return empty_cache(c, self.layers, batch_size, min(length, c.window or length))


def _keys_of_layers(keys_B: jax.Array | None, num_layers: int) -> jax.Array | None:
    """[L, B]: keys of each layer's sites."""
    return None if keys_B is None else fold_in_each(keys_B, jnp.arange(num_layers)).T


Model = Transformer  # what lm.build takes of a module


def empty_cache(config, layers, batch_size: int, num_slots: int) -> Cache | list[Cache]:
    """Keys and values of nothing, stacked as layers are."""
    c = config
    shape = (batch_size, c.num_kv_heads, num_slots, c.head_dim)
    axes = ("batch", "kv_heads", None, None)
    if isinstance(layers, nnx.List):
        return [_zeros(shape, axes, c.compute_dtype) for _ in layers]
    return _zeros((c.num_layers, *shape), ("layers", *axes), c.compute_dtype)


def _zeros(shape, axes, dtype) -> Cache:
    key = constrain(jnp.zeros(shape, dtype), *axes)
    return Cache(key, constrain(jnp.zeros(shape, dtype), *axes))


def unstacked(stack: dict, num_layers: int) -> dict[int, dict]:
    """The parameters of each layer of a stack, by its number."""
    layers = {}
    for i in range(num_layers):
        layers[i] = jax.tree.map(operator.itemgetter(i), stack)
    return layers
