"""Recurrent language models: stacked LSTM, GRU or plain RNN layers, scanned over time.

A state begins anew with each segment of a row, so that packed texts are as texts alone. The cells
are torch.nn's (lm/hf/torch_recurrent.py reads and writes its weights).

With config.model.source_length the model reads a source too, by an encoder in both directions.
What each layer says of a target looks up what it needs in the encoder's output. The next layer
reads both, and behind the last one they become what the head reads (Luong et al. 2015, arXiv
1508.04025, section 3.1: "general" scores, equation 5).

Letters: B batch, T length, S length of the source, D embed, H units of a layer, E of the encoder's
output, G gates, X = G * H, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lm import collectives
from lm import config as config_lib
from lm.models.cached import CachedDecoding, Decoded, read_from_left
from lm.models.transformer import Output
from lm.nn import watch
from lm.nn.layers import Embed, VocabHead, add_bias, dense, dropout, fold_in_each, gather, param
from lm.nn.masks import Visible
from lm.sharding import constrain


class State(NamedTuple):
    """What a layer keeps of the tokens before, f32 [B, H] each."""

    hidden: jax.Array
    memory: jax.Array | None  # an LSTM's


def _lstm(inputs_BGH, recurrent_BGH, state: State) -> State:
    """Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000."""
    in_gate, forget, candidate, out_gate = jnp.moveaxis(inputs_BGH + recurrent_BGH, -2, 0)
    memory = jax.nn.sigmoid(forget) * state.memory
    memory = memory + jax.nn.sigmoid(in_gate) * jnp.tanh(candidate)
    return State(jax.nn.sigmoid(out_gate) * jnp.tanh(memory), memory)


def _gru(inputs_BGH, recurrent_BGH, state: State) -> State:
    """Cho et al. 2014, arXiv 1406.1078, as cuDNN has it: the reset gate is applied to the matmul's
    result, which has a bias of its own.
    """
    reset, update, candidate = jnp.moveaxis(inputs_BGH, -2, 0)
    reset_h, update_h, candidate_h = jnp.moveaxis(recurrent_BGH, -2, 0)
    reset = jax.nn.sigmoid(reset + reset_h)
    update = jax.nn.sigmoid(update + update_h)
    candidate = jnp.tanh(candidate + reset * candidate_h)
    return State((1 - update) * candidate + update * state.hidden, None)


def _rnn(inputs_BGH, recurrent_BGH, state: State) -> State:
    """Elman 1990."""
    return State(jnp.tanh(inputs_BGH + recurrent_BGH)[..., 0, :], None)


class Cell(NamedTuple):
    num_gates: int
    update: Callable  # (inputs [B, G, H], recurrent [B, G, H], State) -> State


# The gates' order is torch.nn's: i, f, g, o of an LSTM, r, z, n of a GRU.
CELLS = {"lstm": Cell(4, _lstm), "gru": Cell(3, _gru), "rnn": Cell(1, _rnn)}


@dataclasses.dataclass(frozen=True)
class Config(config_lib.RecurrentFields):
    """The model's fields (lm.config.RecurrentFields), checked.

    Raises:
      ValueError: values that no model can have.
    """

    def __post_init__(self):
        config_lib.check_model(dataclasses.asdict(self), "config.model", "lm.models.recurrent")
        if not self.vocab_size or not self.compute_dtype:
            raise ValueError(
                f"config.model.vocab_size = {self.vocab_size}, compute_dtype = "
                f"{self.compute_dtype!r}: a model of its own needs both"
            )

    branches = False  # a state can't be shared by continuations of the same row
    shortest_row = 16

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ValueError for a mesh that splits rows: each state needs the one before."""
        if mesh.shape["sequence"] > 1:
            raise ValueError(
                "config.mesh.sequence splits rows, which a recurrent model reads from left to "
                "right; wanted 1"
            )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(inputs, units) of each layer. Where the head is the embedding, the last has its size."""
        last = self.embed_dim if self.tie_embeddings else self.hidden_dim
        units = [self.hidden_dim] * (self.num_layers - 1) + [last]
        # Each with what the layer before it finds in the source.
        context = self.source_dim if self.source_length else 0
        inputs = [self.embed_dim, *(size + context for size in units)]
        return list(zip(inputs, units))

    @property
    def source_dim(self) -> int:
        """Units of the encoder's output: those of both directions."""
        return 2 * self.hidden_dim


def flops_per_token(
    config: Config,
    length: int,
    *,
    causal: bool = True,
    backward: bool = True,
    head: float = 1.0,
    source_length: int = 0,
) -> float:
    """Model FLOPs of a token in training, or of its forward pass: 6, or 2, a weight of a matmul.
    They don't depend on the length, but for the source's share.

    Args:
      head: share of the tokens whose logits are needed.
      source_length: tokens of the encoder's row.
    """
    c = config
    gates = CELLS[c.cell].num_gates
    weights = sum(gates * units * (inputs + units) for inputs, units in c.sizes)
    _, last = c.sizes[-1]
    weights += head * c.vocab_size * last
    if c.source_length:
        inputs = [c.embed_dim, *[c.source_dim] * (c.encoder_layers - 1)]
        encoder = sum(2 * gates * c.hidden_dim * (size + c.hidden_dim) for size in inputs)
        weights += encoder * source_length / length
        for _, units in c.sizes:
            weights += units * c.source_dim + 2 * source_length * c.source_dim
        weights += (last + c.source_dim) * last
    return (6.0 if backward else 2.0) * weights


class Layer(nnx.Module):
    """One layer of cells."""

    def __init__(self, key: jax.Array, config: Config, inputs: int, units: int):
        c = config
        in_key, state_key, bias_key, candidate_key = jax.random.split(key, 4)
        self.cell = CELLS[c.cell]
        self.compute_dtype = c.compute_dtype
        gates = self.cell.num_gates
        axes, dtype = ("embed", "gates", "mlp"), c.param_dtype
        # Gates of inputs of variance 1 have it too. torch.nn draws a third of it, or less, and a
        # second layer sees next to nothing of the first.
        self.input_weight = param(in_key, (inputs, gates, units), axes, dtype, std=inputs**-0.5)
        self.state_weight = param(state_key, (units, gates, units), axes, dtype, std=units**-0.5)
        # The variance of torch.nn's draw, which is uniform up to 1 / sqrt(H).
        options = dict(dtype=dtype, std=(3 * units) ** -0.5)
        self.bias = param(bias_key, (gates, units), ("gates", "mlp"), **options)
        # A GRU's reset gate comes between its candidate's two biases.
        is_gru = c.cell == "gru"
        self.candidate_bias = (
            param(candidate_key, (units,), ("mlp",), **options) if is_gru else None
        )

    def __call__(self, x_BTD, starts_BT, valid_BT, state: State) -> tuple[jax.Array, State]:
        """(hidden states [B, T, H] in x's dtype, the state behind each row's last valid token).

        Args:
          starts_BT: bool, where a text begins.
          valid_BT: bool; padding leaves the state as it is.
        """
        inputs_BTGH = dense("btd,dgh->btgh", x_BTD, self.input_weight, self.compute_dtype, "gates")
        inputs_BTGH = add_bias(inputs_BTGH, self.bias).astype(jnp.float32)
        candidate_bias = None
        if self.candidate_bias is not None:
            candidate_bias = gather(self.candidate_bias, jnp.float32)

        how = _How(
            self.cell.update,
            self.state_weight.get_metadata("logical_axes"),
            jnp.dtype(self.compute_dtype),
        )
        by_time = (inputs_BTGH, starts_BT, valid_BT)
        by_time = tuple(x.swapaxes(0, 1) for x in by_time)
        hidden_TBH, state = _scan_time(how, self.state_weight[...], candidate_bias, *by_time, state)
        return hidden_TBH.swapaxes(0, 1).astype(x_BTD.dtype), state


class _How(NamedTuple):
    """What is known when a program is traced."""

    update: Callable
    axes: tuple[str, ...]  # logical ones of the state's weight
    dtype: jnp.dtype  # of the matmul's operands


def _advance(how: _How, inputs_BGH, recurrent_BGH, start_B, valid_B, state: State, bias_H):
    """One step of time, but for its matmul."""
    if bias_H is not None:
        recurrent_BGH = recurrent_BGH.at[:, -1].add(bias_H[None])
    new = how.update(inputs_BGH, recurrent_BGH, _begun(state, start_B))
    return jax.tree.map(functools.partial(jnp.where, valid_B[:, None]), new, state)


def _begun(state: State, start_B) -> State:
    """The state, or 0 where a text begins."""
    return jax.tree.map(lambda x: jnp.where(start_B[:, None], 0.0, x), state)


# Gates and units are one dim in matmuls, X: on CPUs XLA is a fifth slower with two.
def _flat_matmul(how: _How, spec: str, a, b):
    """einsum(spec, a, b) of matrices, operands in `how.dtype`, sums in f32."""
    a, b = a.astype(how.dtype), b.astype(how.dtype)
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_time(how: _How, weight, bias_H, inputs_TBGH, starts_TB, valid_TB, state: State):
    """(hidden states [T, B, H] f32, the last state).

    The backward pass goes through time for the states' gradients alone. The weight's is one matmul
    over all steps, where differentiating the loop would add up one for each.
    """
    (hidden_TBH, last), _ = _scan_time_forward(
        how, weight, bias_H, inputs_TBGH, starts_TB, valid_TB, state
    )
    return hidden_TBH, last


def _scan_time_forward(how: _How, weight, bias_H, inputs_TBGH, starts_TB, valid_TB, state: State):
    gathered = collectives.gather_weight(weight, how.axes, how.dtype)
    weight_HX = gathered.reshape(gathered.shape[0], -1)

    def step(state, inputs):
        inputs_BGH, start_B, valid_B = inputs
        hidden_BH = _begun(state, start_B).hidden
        recurrent_BX = _flat_matmul(how, "bh,hx->bx", hidden_BH, weight_HX)
        recurrent_BGH = recurrent_BX.reshape(inputs_BGH.shape)
        new = _advance(how, inputs_BGH, recurrent_BGH, start_B, valid_B, state, bias_H)
        return new, (state, recurrent_BGH, new.hidden)

    by_time = (inputs_TBGH, starts_TB, valid_TB)
    last, (states, recurrent_TBGH, hidden_TBH) = jax.lax.scan(step, state, by_time)
    like = jnp.zeros((), weight.dtype)
    return (hidden_TBH, last), (gathered, like, bias_H, by_time, states, recurrent_TBGH)


def _scan_time_backward(how: _How, saved, grads):
    gathered, like, bias_H, by_time, states, recurrent_TBGH = saved
    inputs_TBGH, starts_TB, valid_TB = by_time
    hidden_grads_TBH, last_grad = grads
    zero_bias = None if bias_H is None else jnp.zeros_like(bias_H)
    # Turned once, not at each step.
    weight_XH = jax.lax.optimization_barrier(gathered.reshape(gathered.shape[0], -1).T)

    def step(carry, inputs):
        state_grad, bias_grad = carry
        inputs_BGH, start_B, valid_B, state, recurrent_BGH, hidden_grad_BH = inputs
        state_grad = state_grad._replace(hidden=state_grad.hidden + hidden_grad_BH)

        def advance(inputs_BGH, recurrent_BGH, state, bias_H):
            return _advance(how, inputs_BGH, recurrent_BGH, start_B, valid_B, state, bias_H)

        _, pull_back = jax.vjp(advance, inputs_BGH, recurrent_BGH, state, bias_H)
        inputs_grad, recurrent_grad, before, of_bias = pull_back(state_grad)

        # Through the matmul, to the hidden state before; none where a text begins.
        recurrent_grad_BX = recurrent_grad.reshape(len(recurrent_grad), -1)
        hidden_grad_BH = _flat_matmul(how, "bx,xh->bh", recurrent_grad_BX, weight_XH)
        hidden_grad_BH = jnp.where(start_B[:, None], 0.0, hidden_grad_BH)
        before = before._replace(hidden=before.hidden + hidden_grad_BH)
        bias_grad = None if bias_H is None else bias_grad + of_bias
        return (before, bias_grad), (inputs_grad, recurrent_grad)

    inputs = (*by_time, states, recurrent_TBGH, hidden_grads_TBH)
    (state_grad, bias_grad), (inputs_grads, recurrent_grads) = jax.lax.scan(
        step, (last_grad, zero_bias), inputs, reverse=True
    )

    # All steps of all rows at once.
    begun_TBH = jnp.where(starts_TB[..., None], 0.0, states.hidden)
    begun = begun_TBH.reshape(-1, begun_TBH.shape[-1])
    recurrent_grads = recurrent_grads.reshape(len(begun), -1)
    weight_grad = _flat_matmul(how, "nh,nx->hx", begun, recurrent_grads).reshape(gathered.shape)
    weight_grad = collectives.scatter_grad(weight_grad, how.axes, like.dtype)
    return weight_grad, bias_grad, inputs_grads, None, None, state_grad


_scan_time.defvjp(_scan_time_forward, _scan_time_backward)


class Memory(NamedTuple):
    """What an encoder said of a source."""

    value_BSE: jax.Array
    segments_BS: jax.Array


class SourceState(NamedTuple):
    """The cache of a model that reads sources."""

    states: list[State]
    memory: Memory


class Encoder(nnx.Module):
    """Layers that read a source in both directions."""

    def __init__(self, key: jax.Array, config: Config):
        c = self.config = config
        layers = []
        for number in range(c.encoder_layers):
            inputs = c.source_dim if number else c.embed_dim
            for direction in range(2):
                layer_key = jax.random.fold_in(key, 2 * number + direction)
                layers.append(Layer(layer_key, c, inputs, c.hidden_dim))
        self.layers = nnx.List(layers)

    def __call__(self, x_BSD: jax.Array, segments_BS: jax.Array, keys_BN) -> Memory:
        """Of embedded sources.

        Args:
          keys_BN: keys for the dropout of what each layer reads; None: there is none.
        """
        c = self.config
        valid_BS = segments_BS > 0
        edge_B1 = jnp.zeros_like(segments_BS[:, :1])
        starts_BS = segments_BS != jnp.concatenate([edge_B1, segments_BS[:, :-1]], axis=1)
        ends_BS = segments_BS != jnp.concatenate([segments_BS[:, 1:], edge_B1], axis=1)
        forth, back = self.layers[::2], self.layers[1::2]

        for number, (forward, backward) in enumerate(zip(forth, back)):
            x_BSD = _drop(x_BSD, c.dropout, keys_BN, number)
            state = _no_state(c, len(x_BSD), c.hidden_dim)
            forward_BSH, _ = forward(x_BSD, starts_BS, valid_BS, state)
            # From right to left a text begins at its end.
            turned = (x[:, ::-1] for x in (x_BSD, ends_BS, valid_BS))
            backward_BSH, _ = backward(*turned, state)
            x_BSD = jnp.concatenate([forward_BSH, backward_BSH[:, ::-1]], axis=-1)

        return Memory(x_BSD, segments_BS)


class Reader(nnx.Module):
    """What a decoder's layers find in a memory, and what the head reads of it."""

    def __init__(self, key: jax.Array, config: Config):
        c = config
        self.compute_dtype = c.compute_dtype
        queries_key, out_key = jax.random.split(key)
        queries = []
        for number, (_, units) in enumerate(c.sizes):
            query_key, shape = jax.random.fold_in(queries_key, number), (units, c.source_dim)
            queries.append(
                param(query_key, shape, ("embed", "mlp"), c.param_dtype, std=units**-0.5)
            )
        self.queries = nnx.List(queries)

        _, last = c.sizes[-1]
        shape = (last + c.source_dim, last)
        self.out = param(out_key, shape, ("mlp", "embed"), c.param_dtype, std=shape[0] ** -0.5)

    def look_up(self, number: int, x_BTH: jax.Array, segments_BT, memory: Memory) -> jax.Array:
        """States of layer `number`, and behind them the mean of what the memory says of the source
        of their segment, weighted by attention, [B, T, H + E]. Scores, softmax and sums are f32.
        """
        f32 = dict(preferred_element_type=jnp.float32)
        query_BTE = dense("bth,he->bte", x_BTH, self.queries[number], self.compute_dtype, "query")
        scores_BTS = jnp.einsum("bte,bse->bts", query_BTE, memory.value_BSE, **f32)
        seen_BTS = segments_BT[:, :, None] == memory.segments_BS[:, None, :]
        probs_BTS = jax.nn.softmax(jnp.where(seen_BTS, scores_BTS, -1e30), axis=-1)

        probs_BTS = probs_BTS.astype(memory.value_BSE.dtype)
        context_BTE = jnp.einsum("bts,bse->bte", probs_BTS, memory.value_BSE, **f32)
        return jnp.concatenate([x_BTH, context_BTE.astype(x_BTH.dtype)], axis=-1)

    def combine(self, x_BTX: jax.Array) -> jax.Array:
        """What the head reads, [B, T, D], of the last layer's states and what they found."""
        return jnp.tanh(dense("btx,xd->btd", x_BTX, self.out, self.compute_dtype, "out"))


def _no_state(config: Config, batch_size: int, units: int) -> State:
    """That of texts that have not begun."""
    zeros = constrain(jnp.zeros((batch_size, units), jnp.float32), "batch", "act_mlp")
    return State(zeros, zeros if config.cell == "lstm" else None)


class Recurrent(CachedDecoding, nnx.Module):
    """A recurrent language model, called as a Transformer is. Its cache is a list of states.

    Dropout is that of torch.nn: of what each layer reads, and of what the head does.
    """

    def __init__(self, config: Config, key: jax.Array):
        c = self.config = config
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        table = dict(
            axis="vocab", std=c.init_std, dtype=c.param_dtype, compute_dtype=c.compute_dtype
        )
        self.embed = Embed(embed_key, c.vocab_size, c.embed_dim, **table)
        layers = []
        for number, (inputs, units) in enumerate(c.sizes):
            layers.append(Layer(jax.random.fold_in(layers_key, number), c, inputs, units))
        self.layers = nnx.List(layers)
        self.encoder = Encoder(jax.random.fold_in(key, 3), c) if c.source_length else None
        self.reader = Reader(jax.random.fold_in(key, 4), c) if c.source_length else None

        _, last = c.sizes[-1]
        self.head = None if c.tie_embeddings else Embed(head_key, c.vocab_size, last, **table)
        self.head_bias = (
            param(None, (c.vocab_size,), ("vocab",), c.param_dtype) if c.head_bias else None
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        *,
        visible: Visible | None = None,
        source: tuple[jax.Array, jax.Array, jax.Array] | None = None,
        cache: list[State] | SourceState | None = None,
        decode: bool = False,
        keys_B: jax.Array | None = None,
    ) -> Output:
        """Hidden states of each position.

        Args:
          visible: None, or causal.
          source: tokens, positions and segments of the source, where the model reads one.
          cache: the states behind what was read before, see `init_cache`, with what the encoder
            said of a source.
          decode: this is a later call: the text goes on.
          others: see `lm.models.transformer.Transformer`.
        """
        assert visible is None or visible.kind == "causal", visible
        c = self.config
        keys_BN = None
        if keys_B is not None and c.dropout:
            keys_BN = fold_in_each(keys_B, jnp.arange(c.num_layers + 1 + c.encoder_layers))

        memory = None
        states = cache if decode else self.init_cache(len(tokens_BT), 0)
        if self.encoder is not None:
            if decode:
                states, memory = cache
            else:
                source_tokens_BS, _, source_segments_BS = source
                of_encoder = None if keys_BN is None else keys_BN[:, c.num_layers + 1 :]
                embedded_BSD = self._embed(source_tokens_BS)
                memory = self.encoder(embedded_BSD, source_segments_BS, of_encoder)
            tokens_BT = jnp.where(positions_BT == 0, c.start_id, tokens_BT)

        x_BTD = self._embed(tokens_BT)
        valid_BT = segments_BT > 0
        starts_BT = positions_BT == 0
        seen = {"embed": x_BTD}
        new_states = []
        for number, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            x_BTD = _drop(x_BTD, c.dropout, keys_BN, number)
            x_BTD, state = layer(x_BTD, starts_BT, valid_BT, state)
            new_states.append(state)
            seen[f"layers/{number}/hidden"] = x_BTD
            if memory is not None:
                x_BTD = self.reader.look_up(number, x_BTD, segments_BT, memory)

        if memory is not None:
            x_BTD = self.reader.combine(x_BTD)

        watch.report(self, watch.squares(valid_BT, seen))
        x_BTD = _drop(x_BTD, c.dropout, keys_BN, c.num_layers)
        new_cache = new_states if memory is None else SourceState(new_states, memory)
        return Output(x_BTD, new_cache, {})

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.embed(tokens_BT)
        if self.config.embed_scale:
            x_BTD = x_BTD * np.asarray(self.config.embed_dim**0.5, x_BTD.dtype)
        return x_BTD

    @property
    def head_table(self) -> nnx.Param:
        """The head's weight, [V, D]."""
        return (self.head or self.embed).table

    def vocab_head(self, hidden: jax.Array) -> VocabHead:
        """What makes the logits of hidden states [..., D]."""
        return VocabHead(hidden, self.head_table, self.head_bias)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32 logits [..., V] of hidden states [..., D]."""
        logits = (self.head or self.embed).attend(hidden)
        return logits if self.head_bias is None else add_bias(logits, self.head_bias)

    def init_cache(self, batch_size: int, length: int) -> list[State]:
        """The states of `batch_size` texts that have not begun; of any length."""
        del length
        return [_no_state(self.config, batch_size, units) for _, units in self.config.sizes]

    def prefill(self, prompts_BT: jax.Array, lengths_B: jax.Array, cache) -> Decoded:
        """Reads whole prompts; of a model that reads sources, sources and the first token of their
        targets. See `lm.models.cached.CachedDecoding`.
        """
        if self.encoder is None:
            return super().prefill(prompts_BT, lengths_B, cache)
        source = (prompts_BT, *read_from_left(prompts_BT, lengths_B))
        start_B1 = jnp.zeros((len(prompts_BT), 1), jnp.int32)
        output = self(start_B1, start_B1, jnp.ones_like(start_B1), source=source)
        return Decoded(output.hidden[:, 0], output.cache, jnp.ones_like(lengths_B))

    def rows_axis(self, cache) -> int:
        """See `lm.models.cached.CachedDecoding`."""
        del cache
        return 0


def _drop(x_BTD, rate: float, keys_BN, number: int) -> jax.Array:
    return dropout(x_BTD, rate, None if keys_BN is None else keys_BN[:, number])


Model = Recurrent  # what lm.build takes of a module
