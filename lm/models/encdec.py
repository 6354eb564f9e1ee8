"""Encoder-decoders, of the Transformer's blocks: the Transformer of 2017, T5, BART, Marian. The
encoder reads a source whole; each layer of the decoder attends to its output.

A row holds several sources, and behind each other their targets, as segments of the same numbers.

Letters: B batch, T length of the decoder, S length of the source, D embed, F mlp, N heads, H head
size, V vocab, L layers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lm import config as config_lib
from lm.models import transformer
from lm.models.cached import CachedDecoding, Decoded, read_from_left
from lm.models.transformer import SQUARES, Block, Output, keys_of_sites, stream
from lm.nn import masks, watch
from lm.nn.attention import Attention, Cache
from lm.nn.layers import MLP, NORMS, Embed, VocabHead, add_bias, dropout, param
from lm.nn.masks import Mask, Visible
from lm.nn.positions import RelativeBias, sinusoids
from lm.sharding import check_heads, constrain


@dataclasses.dataclass(frozen=True)
class Config(config_lib.EncDecFields):
    """The model's fields (lm.config.EncDecFields), checked.

    Raises:
      ValueError: values that no model can have, each with those that are valid.
    """

    def __post_init__(self):
        config_lib.check_model(dataclasses.asdict(self), "config.model", config_lib.ENCDEC)
        if not self.vocab_size or not self.compute_dtype:
            raise ValueError(
                f"config.model.vocab_size = {self.vocab_size}, compute_dtype = "
                f"{self.compute_dtype!r}: a model of its own needs both"
            )
        transformer.check_biases(self.bias)
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"config.model.relative_distance = {self.relative_distance} must be above half of "
                f"config.model.relative_buckets = {self.relative_buckets}"
            )
        if self.start_id >= self.vocab_size:
            raise ValueError(
                f"config.model.start_id = {self.start_id} must be below config.model.vocab_size = "
                f"{self.vocab_size}"
            )
        transformer.remat_policy(self.remat)

    # What blocks ask for, and these models have none of.
    window = num_experts = lora_rank = 0
    quantize = ""
    qk_norm = False
    attention = "xla"

    branches = True
    shortest_row = 16

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def biases(self) -> tuple[str, ...]:
        return transformer.parse_biases(self.bias)

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ValueError if the mesh can't hold the model."""
        check_heads(mesh, self.num_heads)
        if mesh.shape["sequence"] > 1:
            raise ValueError(
                "config.mesh.sequence splits rows, and the decoder's and the encoder's differ in "
                "length; wanted 1"
            )


def flops_per_token(
    config: Config,
    length: int,
    *,
    causal: bool = True,
    backward: bool = True,
    head: float = 1.0,
    source_length: int = 0,
) -> float:
    """Model FLOPs of a token of the decoder in training, or of its forward pass, with its share of
    the encoder's, counted as those of `lm.models.transformer.flops_per_token`.

    Args:
      length: tokens of the decoder's row.
      head: share of the tokens whose logits are needed.
      source_length: tokens of the encoder's row; 0: as many as the decoder's.
    """
    c = config
    source_length = source_length or length
    sources = source_length / length
    width = c.num_heads * c.head_dim
    projection = c.embed_dim * width
    mlp = c.embed_dim * c.mlp_dim * (3 if c.gated_mlp else 2)

    encoder = c.encoder_layers * (4 * projection + mlp)
    # Of attention to the source two projections are the decoder's tokens', two the source's.
    decoder = c.num_layers * (6 * projection + mlp) + head * c.vocab_size * c.embed_dim
    weights = decoder + sources * (encoder + c.num_layers * 2 * projection)
    keys = length / 2 if causal else length
    scores = c.num_layers * width * (keys + source_length)
    scores += sources * c.encoder_layers * width * source_length

    forward = 2.0 * weights + 4.0 * scores
    return 3.0 * forward if backward else forward


class LayerCache(NamedTuple):
    """What a layer of the decoder keeps."""

    own: Cache  # keys and values of the tokens so far
    source: Cache | None  # those of the source; None before it is read


class DecoderCache(NamedTuple):
    """What the decoder keeps of a text and its source. Stacked as its layers are."""

    layers: LayerCache | list[LayerCache]
    source_segments_BS: jax.Array | None  # None before the source is read


class Source(NamedTuple):
    """What the decoder's layers see of the source.

    Attributes:
      hidden_BSD: the encoder's output; None where the cache has keys and values of it.
      mask: what each token may attend to.
    """

    hidden_BSD: jax.Array | None
    mask: Mask


class DecoderBlock(nnx.Module):
    """One layer of the decoder: attention, attention to the source, and MLP, each added to the
    residual stream.
    """

    def __init__(self, key: jax.Array, config: Config):
        c = config
        attention_key, source_key, mlp_key = jax.random.split(key, 3)
        out_std = c.init_std / (3 * c.num_layers) ** 0.5

        norm = dict(eps=c.norm_eps, use_bias="norm" in c.biases)
        self.residual = c.residual
        self.dropout = c.dropout
        self.attention_norm = NORMS[c.norm](c.embed_dim, **norm)
        self.attention = Attention(attention_key, c, out_std=out_std)
        self.source_norm = NORMS[c.norm](c.embed_dim, **norm)
        self.source_attention = Attention(source_key, c, out_std=out_std)
        self.mlp_norm = NORMS[c.norm](c.embed_dim, **norm)

        use_bias = "mlp" in c.biases
        self.mlp = MLP(mlp_key, c, mlp_dim=c.mlp_dim, use_bias=use_bias, out_std=out_std)

    def __call__(
        self,
        x_BTD,
        positions_BT,
        mask: Mask,
        valid_BT,
        source: Source,
        cache: LayerCache | None = None,
        *,
        decode: bool = False,
        keys_B=None,
    ):
        """Returns (x_BTD, cache, aux), see `lm.models.transformer.Block`."""
        probs_keys, attention_keys, source_probs_keys, source_keys, mlp_keys = keys_of_sites(
            keys_B, 5
        )
        own = cache.own if cache is not None else None
        seen = cache.source if decode else self.source_attention.read_source(source.hidden_BSD)

        def attend(x_BTD):
            nonlocal own
            attended_BTD, own = self.attention(
                x_BTD, positions_BT, mask, own, decode=decode, keys_B=probs_keys
            )
            return dropout(attended_BTD, self.dropout, attention_keys)

        def attend_to_source(x_BTD):
            attended_BTD = self.source_attention.attend_to(
                x_BTD, seen, source.mask, decode=decode, keys_B=source_probs_keys
            )
            return dropout(attended_BTD, self.dropout, source_keys)

        def mlp(x_BTD):
            return dropout(self.mlp(x_BTD), self.dropout, mlp_keys)

        x_BTD, attended_BTD = self._add(x_BTD, attend, self.attention_norm)
        x_BTD, from_source_BTD = self._add(x_BTD, attend_to_source, self.source_norm)
        x_BTD, out_BTD = self._add(x_BTD, mlp, self.mlp_norm)

        activations = dict(attention=attended_BTD, source=from_source_BTD, mlp=out_BTD)
        squares = watch.squares(valid_BT, activations | dict(residual=x_BTD))
        return x_BTD, None if cache is None else LayerCache(own, seen), {SQUARES: squares}

    def _add(self, x_BTD, sublayer, norm):
        """(the residual stream with a sublayer's output, that output)."""
        if self.residual == "post_norm":
            out_BTD = sublayer(x_BTD)
            return stream(norm(x_BTD + out_BTD)), out_BTD
        out_BTD = sublayer(norm(x_BTD))
        return stream(x_BTD + out_BTD), out_BTD


class EncoderDecoder(CachedDecoding, nnx.Module):
    """An encoder and a decoder with one embedding. Called as a Transformer is, with a source.

    Args:
      stacked: see `lm.models.transformer.Transformer`; of the decoder's layers.
    """

    def __init__(self, config: Config, key: jax.Array, *, stacked: bool = True):
        c = self.config = config
        embed_key, head_key, encoder_key, decoder_key = jax.random.split(key, 4)
        table = dict(std=c.init_std, dtype=c.param_dtype, compute_dtype=c.compute_dtype)
        self.embed = Embed(embed_key, c.vocab_size, c.embed_dim, axis="vocab", **table)
        if c.tie_embeddings:
            self.head = None
        else:
            self.head = Embed(head_key, c.vocab_size, c.embed_dim, axis="vocab", **table)
        if "head" in c.biases:
            self.head_bias = param(None, (c.vocab_size,), ("vocab",), c.param_dtype)
        else:
            self.head_bias = None

        of_encoder = dataclasses.replace(c, num_layers=c.encoder_layers)

        def make_encoder_block(key):
            return Block(key, of_encoder)

        def make_block(key):
            return DecoderBlock(key, c)

        # The encoder's layers are always a stack: they run once for a text.
        keys = jax.random.split(jax.random.fold_in(encoder_key, 0), c.encoder_layers)
        self.encoder_layers = nnx.vmap(make_encoder_block, in_axes=0, out_axes=0)(keys)

        keys = jax.random.split(jax.random.fold_in(decoder_key, 0), c.num_layers)
        if stacked:
            self.layers = nnx.vmap(make_block, in_axes=0, out_axes=0)(keys)
        else:
            self.layers = nnx.List([make_block(key) for key in keys])

        def norm(is_there: bool):
            use_bias = "norm" in c.biases
            return (
                NORMS[c.norm](c.embed_dim, eps=c.norm_eps, use_bias=use_bias) if is_there else None
            )

        self.encoder_norm, self.norm = [norm(c.residual == "pre_norm") for _ in range(2)]
        self.encoder_embed_norm, self.embed_norm = [norm(c.embed_norm) for _ in range(2)]
        self.encoder_position_embed = self._position_embed(encoder_key, c.source_length)
        self.position_embed = self._position_embed(decoder_key, c.context_length)
        self.encoder_relative = self._relative(encoder_key, sees_later=True)
        self.relative = self._relative(decoder_key, sees_later=False)

    def _position_embed(self, key: jax.Array, length: int) -> Embed | None:
        c = self.config
        if c.positions != "learned":
            return None
        options = dict(std=c.init_std, dtype=c.param_dtype, compute_dtype=c.compute_dtype)
        key, rows = jax.random.fold_in(key, 1), c.position_offset + length
        return Embed(key, rows, c.embed_dim, axis="position", **options)

    def _relative(self, key: jax.Array, *, sees_later: bool) -> RelativeBias | None:
        c = self.config
        if c.positions != "relative":
            return None
        return RelativeBias(
            jax.random.fold_in(key, 2),
            c.num_heads,
            num_buckets=c.relative_buckets,
            max_distance=c.relative_distance,
            sees_later=sees_later,
            std=c.init_std,
            dtype=c.param_dtype,
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        source: tuple[jax.Array, jax.Array, jax.Array],
        visible: Visible | None = None,
        keys_B: jax.Array | None = None,
    ) -> Output:
        """Hidden states of the decoder's positions.

        Args:
          tokens_BT: int32 ids. Whatever stands at position 0, the decoder reads config.start_id.
          source: tokens, positions and segments of the source, int32 [B, S] each.
          others: see `lm.models.transformer.Transformer`.
        """
        encoder_keys, decoder_keys = keys_of_sites(keys_B, 2)
        hidden_BSD, seen = self.encode(*source, keys_B=encoder_keys)
        _, _, source_segments_BS = source

        read = Source(hidden_BSD, masks.of_source(segments_BT, source_segments_BS))
        arrays = (tokens_BT, positions_BT, segments_BT)
        output, of_decoder = self._decode(*arrays, read, visible=visible, keys_B=decoder_keys)
        watch.report(self, seen | of_decoder)
        return output

    def encode(
        self, tokens_BS, positions_BS, segments_BS, *, keys_B=None
    ) -> tuple[jax.Array, dict]:
        """(the encoder's output [B, S, D], what is said of its activations)."""
        c = self.config
        embed_keys, layer_keys, out_keys = self._keys(keys_B)
        x_BSD = self._embed(
            tokens_BS,
            positions_BS,
            self.encoder_position_embed,
            self.encoder_embed_norm,
            embed_keys,
        )
        mask = transformer.make_mask(c, positions_BS, segments_BS, masks.FULL)
        mask = mask._replace(bias_BNTS=_bias_of_rows(self.encoder_relative, positions_BS))

        valid_BS = segments_BS > 0
        seen = watch.squares(valid_BS, {"encoder_embed": x_BSD})

        inputs = (positions_BS, mask, valid_BS)
        x_BSD, _, aux = transformer.run_layers(
            c, self.encoder_layers, x_BSD, None, inputs, keys_B=layer_keys
        )
        for name, sums_L in aux[SQUARES].items():
            seen[f"encoder_layers/*/{name}"] = sums_L

        if self.encoder_norm is not None:
            x_BSD = dropout(self.encoder_norm(x_BSD), c.dropout, out_keys)
        return x_BSD, seen

    def _decode(
        self,
        tokens_BT,
        positions_BT,
        segments_BT,
        source: Source,
        *,
        visible: Visible | None = None,
        cache: LayerCache | list[LayerCache] | None = None,
        decode: bool = False,
        keys_B=None,
    ) -> tuple[Output, dict]:
        """(hidden states of the decoder with its layers' cache, what is said of its activations).

        See `__call__` and `lm.models.transformer.Transformer`.
        """
        c = self.config
        visible = visible or masks.CAUSAL
        embed_keys, layer_keys, out_keys = self._keys(keys_B)

        tokens_BT = jnp.where(positions_BT == 0, c.start_id, tokens_BT)
        x_BTD = self._embed(
            tokens_BT, positions_BT, self.position_embed, self.embed_norm, embed_keys
        )

        num_slots = jax.tree.leaves(cache)[0].shape[-2] if cache is not None else 0
        mask = transformer.make_mask(
            c, positions_BT, segments_BT, visible, num_slots=num_slots, decode=decode
        )
        if self.relative is not None and decode:
            slots_1S = jnp.arange(num_slots)[None]
            mask = mask._replace(bias_BNTS=self.relative(positions_BT, slots_1S))
        elif visible.kind == "tree" and self.relative is not None:
            mask = mask._replace(bias_BNTS=self.relative(positions_BT, positions_BT))
        else:
            mask = mask._replace(bias_BNTS=_bias_of_rows(self.relative, positions_BT))

        valid_BT = segments_BT > 0
        seen = watch.squares(valid_BT, {"embed": x_BTD})

        inputs = (positions_BT, mask, valid_BT, source)
        x_BTD, cache, aux = transformer.run_layers(
            c, self.layers, x_BTD, cache, inputs, decode=decode, keys_B=layer_keys
        )
        for name, sums_L in aux[SQUARES].items():
            seen[f"layers/*/{name}"] = sums_L

        if self.norm is not None:
            x_BTD = dropout(self.norm(x_BTD), c.dropout, out_keys)
        return Output(x_BTD, cache, {}), seen

    def _keys(self, keys_B) -> list[jax.Array | None]:
        """Keys for the dropout of a stack: of its input, its layers and its output."""
        c = self.config
        return keys_of_sites(keys_B if c.dropout or c.attention_dropout else None, 3)

    def _embed(self, tokens, positions, position_embed, norm, keys_B) -> jax.Array:
        """What a stack's first layer reads, [B, T, D]."""
        c = self.config
        x = self.embed(tokens)
        if c.embed_scale:
            x = x * np.asarray(c.embed_dim**0.5, x.dtype)

        if position_embed is not None:
            x = x + position_embed(positions + c.position_offset)
        elif c.positions != "relative":
            length = max(c.source_length, c.context_length)
            interleaved = c.positions == "sinusoids"
            table = jnp.asarray(sinusoids(length, c.embed_dim, interleaved=interleaved), x.dtype)
            x = x + table[positions]

        if norm is not None:
            x = norm(x)
        return stream(dropout(x, c.dropout, keys_B))

    @property
    def head_table(self) -> nnx.Param:
        """The head's weight, [V, D]."""
        return (self.head or self.embed).table

    def vocab_head(self, hidden: jax.Array) -> VocabHead:
        """What makes the logits of hidden states [..., D]."""
        c = self.config
        if c.head_scale:
            hidden = hidden * np.asarray(c.embed_dim**-0.5, hidden.dtype)
        return VocabHead(hidden, self.head_table, self.head_bias)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32 logits [..., V] of hidden states [..., D]."""
        logits = (self.head or self.embed).attend(self.vocab_head(hidden).state)
        if self.head_bias is not None:
            logits = add_bias(logits, self.head_bias)
        return constrain(logits, "batch", "length", "act_vocab") if logits.ndim == 3 else logits

    # Decoding

    def init_cache(self, batch_size: int, length: int) -> DecoderCache:
        """An empty cache for `batch_size` texts of up to `length` tokens."""
        c = self.config
        length = min(length, c.context_length)
        empty = transformer.empty_cache(c, self.layers, batch_size, length)
        if isinstance(empty, list):
            return DecoderCache([LayerCache(own, None) for own in empty], None)
        return DecoderCache(LayerCache(empty, None), None)

    def prefill(self, prompts_BT: jax.Array, lengths_B: jax.Array, cache: DecoderCache) -> Decoded:
        """Reads whole sources, and the decoder's first token.

        Args:
          prompts_BT: ids of the sources, padded on the right.
          lengths_B: their lengths, without padding.
          cache: an empty one (`init_cache`).
        """
        positions_BS, segments_BS = read_from_left(prompts_BT, lengths_B)
        hidden_BSD, _ = self.encode(prompts_BT, positions_BS, segments_BS)

        start_B1 = jnp.zeros((len(prompts_BT), 1), jnp.int32)
        ones_B1 = jnp.ones_like(start_B1)
        source = Source(hidden_BSD, masks.of_source(ones_B1, segments_BS))
        output, _ = self._decode(start_B1, start_B1, ones_B1, source, cache=cache.layers)

        read = DecoderCache(output.cache, segments_BS)
        return Decoded(output.hidden[:, 0], read, jnp.ones_like(lengths_B))

    def decode_step(
        self, token_B: jax.Array, position_B: jax.Array, cache: DecoderCache
    ) -> Decoded:
        """Reads one token a row, of these positions."""
        ones_B1 = jnp.ones((len(token_B), 1), jnp.int32)
        source = Source(None, masks.of_source(ones_B1, cache.source_segments_BS))
        arrays = (token_B[:, None], position_B[:, None], ones_B1)
        output, _ = self._decode(*arrays, source, cache=cache.layers, decode=True)
        return Decoded(output.hidden[:, 0], cache._replace(layers=output.cache), position_B + 1)

    def take_rows(self, cache: DecoderCache, rows_B: jax.Array) -> DecoderCache:
        """The cache of these rows, in this order; a row may come several times."""
        layers = super().take_rows(cache.layers, rows_B)
        return DecoderCache(layers, cache.source_segments_BS[rows_B])

    def put_rows(self, cache: DecoderCache, rows_N: jax.Array, others: DecoderCache):
        """See `lm.models.cached.CachedDecoding`."""
        layers = super().put_rows(cache.layers, rows_N, others.layers)
        segments_BS = cache.source_segments_BS.at[rows_N].set(
            others.source_segments_BS, mode="drop"
        )
        return DecoderCache(layers, segments_BS)

    def for_decoding(self, params: dict, platform: str) -> tuple[Any, dict]:
        """See `lm.models.transformer.Transformer.for_decoding`; of the decoder's layers."""
        c = self.config
        if platform != "cpu" or isinstance(self.layers, nnx.List):
            return nnx.split(self, nnx.Param)[0], params
        abstract = nnx.eval_shape(lambda: type(self)(c, jax.random.key(0), stacked=False))
        graphdef = nnx.split(abstract, nnx.Param)[0]
        layers = transformer.unstacked(params["layers"], c.num_layers)
        return graphdef, params | {"layers": layers}


def _bias_of_rows(relative: RelativeBias | None, positions_BT: jax.Array) -> jax.Array | None:
    """[1, N, T, T], the same for all rows: within a segment two places are as far apart as their
    positions.
    """
    if relative is None:
        return None
    places_1T = jnp.arange(positions_BT.shape[1])[None]
    return relative(places_1T, places_1T)


Model = EncoderDecoder  # what lm.build takes of a module
