"""Tokens from a model: prefill a cache with the prompts, then decode one token at a time.

Letters: B batch (rows), T length of the padded prompts, D embed, V vocab.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lm import sharding
from lm.decoding.sampling import Sampling, sample


def prefill(
    model, prompts_BT: jax.Array, lengths_B: jax.Array, cache_length: int, copies: int = 1
) -> tuple[jax.Array, Any, jax.Array]:
    """Runs the model on whole prompts, see `lm.models.cached.CachedDecoding.prefill`.

    Args:
      cache_length: positions that the cache has room for.
      copies: how often each row is repeated in what is returned; more than 1 needs a model whose
        layers are not stacked.

    Returns:
      (logits [B * copies, V] of the token after each prompt, the cache, the token's positions).
    """
    cache = model.init_cache(prompts_BT.shape[0], cache_length)
    decoded = model.prefill(prompts_BT, lengths_B, cache)
    # The head runs on the last position only: logits of all would be [B, T, V].
    decoded = jax.tree.map(functools.partial(_repeat_rows, copies=copies), decoded)
    return model.logits(decoded.hidden_BD), decoded.cache, decoded.position_B


def decode_step(
    model, token_B: jax.Array, position_B: jax.Array, cache
) -> tuple[jax.Array, Any, jax.Array]:
    """Runs the model on one token a row, see `lm.models.cached.CachedDecoding.decode_step`.

    Returns:
      (logits [B, V] of the token after them, the cache with them in it, that token's positions).
    """
    decoded = model.decode_step(token_B, position_B, cache)
    return model.logits(decoded.hidden_BD), decoded.cache, decoded.position_B


def _repeat_rows(x: jax.Array, copies: int) -> jax.Array:
    return jnp.repeat(x, copies, axis=0) if copies > 1 else x


class DecodeState(NamedTuple):
    """Rows that are being continued, just before their next token is chosen."""

    logits_BV: jax.Array  # of the next token
    cache: Any  # the model's own
    position_B: jax.Array  # of the next token
    done_B: jax.Array  # True once a stop token was chosen
    # True for the tokens of the prompt and those chosen; None without a repetition penalty
    seen_BV: jax.Array | None
    keys_B: jax.Array  # one a row, so that a row's draws don't depend on the other rows
    num_chosen_B: jax.Array  # tokens chosen so far


def prefill_state(
    graphdef,
    params,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    key_data: jax.Array,
    *,
    sampling: Sampling,
    cache_length: int,
    copies: int,
) -> DecodeState:
    """The state after the prompts. See `prefill` for the arguments, but for these two.

    Args:
      key_data: `jax.random.key_data` of a key for each row.
      sampling: decides whether the tokens seen are remembered.
    """
    keys_B = jax.random.wrap_key_data(key_data)
    model = nnx.merge(graphdef, params)
    logits_BV, cache, position_B = prefill(model, prompts_BT, lengths_B, cache_length, copies)

    prompts_BT = _repeat_rows(prompts_BT, copies)
    lengths_B = _repeat_rows(lengths_B, copies)
    keys_B = _repeat_rows(keys_B, copies)

    seen_BV = None
    if sampling.repetition_penalty != 1:
        # A source is no part of the text.
        reads_sources = getattr(model.config, "source_length", 0)
        own_B = jnp.zeros_like(lengths_B) if reads_sources else lengths_B
        seen_BV = _tokens_of_prompts(prompts_BT, own_B, logits_BV.shape)

    return DecodeState(
        logits_BV=logits_BV,
        cache=cache,
        position_B=position_B,
        done_B=jnp.zeros(lengths_B.shape, bool),
        seen_BV=seen_BV,
        keys_B=keys_B,
        num_chosen_B=jnp.zeros(lengths_B.shape, jnp.int32),
    )


def _tokens_of_prompts(
    prompts_BT: jax.Array, lengths_B: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """True for the tokens that a row's prompt contains: bool [B, V] of this shape."""
    valid_BT = jnp.arange(prompts_BT.shape[1])[None] < lengths_B[:, None]
    rows_B1 = jnp.arange(len(lengths_B))[:, None]
    seen_BV = jnp.zeros(shape, bool)

    # Padding becomes an id outside of the vocabulary, which mode="drop" leaves out.
    ids_BT = jnp.where(valid_BT, prompts_BT, shape[1])
    return seen_BV.at[rows_B1, ids_BT].set(True, mode="drop")


def generation_step(
    graphdef,
    params,
    state: DecodeState,
    *,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    never_ids: tuple[int, ...] = (),
    scored_at: float = 1.0,
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Chooses the next token of each row, and runs the model on it.

    Args:
      state: is donated where this is compiled.
      sampling, vocab_size: see `sample`.
      stop_ids: a row is done with any of them, and gets the first of them from then on.
      never_ids: are never chosen.
      scored_at: temperature of the log-probabilities.

    Returns:
      (the state one token further, the tokens [B], their log-probabilities [B] f32). These are the
      model's own, whatever the sampling makes of them.
    """
    # A draw depends on the row's key and on how many came before it, on nothing else.
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.num_chosen_B)
    possible_BV = without(state.logits_BV, never_ids)
    token_B = sample(keys_B, possible_BV, sampling, vocab_size=vocab_size, seen_BV=state.seen_BV)

    token_B = jnp.where(state.done_B, stop_ids[0], token_B)
    logprobs_BV = jax.nn.log_softmax(state.logits_BV[:, :vocab_size] / scored_at)
    logprob_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]

    done_B = state.done_B | jnp.any(token_B[:, None] == jnp.asarray(stop_ids)[None], axis=1)
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True, mode="drop")

    # Rows that are done are computed like the others: shapes can't change under jit.
    model = nnx.merge(graphdef, params)
    logits_BV, cache, position_B = decode_step(model, token_B, state.position_B, state.cache)
    new_state = DecodeState(
        logits_BV=logits_BV,
        cache=cache,
        position_B=position_B,
        done_B=done_B,
        seen_BV=seen_BV,
        keys_B=state.keys_B,
        num_chosen_B=state.num_chosen_B + 1,
    )
    return new_state, token_B, logprob_B


def without(logits_BV: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """The logits with -inf for these ids."""
    return logits_BV.at[:, jnp.asarray(ids)].set(-jnp.inf) if ids else logits_BV


class Graph:
    """A model as a key of caches such as `_compiled`, equal to one with the same object as its
    `source`.

    Graphdefs themselves are no keys. Two of the same model don't compare equal, because attention
    holds a functools.partial, and those with a configuration read from JSON have no hash.

    Args:
      graphdef: what is compiled.
      source: the graphdef that it was made from.
    """

    def __init__(self, graphdef, source):
        self.graphdef = graphdef
        self._source = source

    def __eq__(self, other) -> bool:
        return isinstance(other, Graph) and self._source is other._source

    def __hash__(self) -> int:
        return id(self._source)


@functools.lru_cache(maxsize=16)
def _compiled(
    graph: Graph,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    never_ids: tuple[int, ...],
    vocab_size: int,
    mesh: Mesh,
) -> tuple[Callable, Callable]:
    """(`prefill_state`, `generation_step`) of a model, under jit.

    Cached, because jit compiles a new function anew: evals make a Generator at each evaluation.
    """
    prefill_fn = jax.jit(
        functools.partial(prefill_state, graph.graphdef, sampling=sampling),
        static_argnames=("cache_length", "copies"),
    )
    step_fn = jax.jit(
        functools.partial(
            generation_step,
            graph.graphdef,
            sampling=sampling,
            stop_ids=stop_ids,
            never_ids=never_ids,
            vocab_size=vocab_size,
        ),
        donate_argnums=1,
        # Tokens are replicated: every process reads all of them.
        out_shardings=(None, sharding.replicated(mesh), sharding.replicated(mesh)),
    )
    return prefill_fn, step_fn


class Sources(NamedTuple):
    """How an encoder-decoder's prompts end, and what its texts never have.

    Attributes:
      end: ids that end every source; a prompt that lacks them gets them.
      never_ids: are never chosen.
    """

    end: tuple[int, ...] = ()
    never_ids: tuple[int, ...] = ()


class Generator:
    """Continues prompts, and hands out each token as soon as it is chosen. Of an encoder-decoder
    prompts are sources, and what is generated are their targets.

    Compiles anew for another number of rows, and for lengths that fall between other powers of two
    (see `bucket_length`), but not for other parameters of the same model.

    Args:
      params: on `mesh`.
      stop_ids: a row ends with any of them.
      vocab_size: the tokenizer's.
      sources: of an encoder-decoder.

    Attributes:
      config: the model's.
      graph: the model in the form that decodes fastest, a key for caches of compiled functions.
      params, mesh, stop_ids, never_ids, vocab_size: of that form, and as given.
    """

    def __init__(
        self,
        model_config,
        graphdef,
        params,
        mesh: Mesh,
        sampling: Sampling,
        *,
        stop_ids: Sequence[int],
        vocab_size: int,
        sources: Sources = Sources(),
    ):
        decoding_graphdef, self.params = for_decoding(graphdef, params, mesh)
        self.graph = Graph(decoding_graphdef, graphdef)
        self.mesh = mesh
        self.stop_ids, self.never_ids = tuple(stop_ids), tuple(sources.never_ids)
        self.vocab_size = vocab_size
        self.config = model_config
        self._source_end = list(sources.end)
        # 0: the model reads no sources.
        self._source_length = getattr(model_config, "source_length", 0)

        self._prefill, self._step = _compiled(
            self.graph, sampling, self.stop_ids, self.never_ids, vocab_size, mesh
        )

    def longest_prompt(self, max_new_tokens: int) -> int:
        """Returns the tokens of a prompt that leaves room for so many new ones; of a source, those
        that the encoder reads.
        """
        if self._source_length:
            return self._source_length - len(self._source_end)
        return self.config.context_length - max_new_tokens

    def before_text(self, prompt: Sequence[int]) -> Sequence[int]:
        """What stands before the text that continues a prompt: the prompt, but nothing of a
        source.
        """
        return () if self._source_length else prompt

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raises ValueError for prompts that are empty, or too long to be continued."""
        most = self.config.context_length
        if not 1 <= max_new_tokens <= most:
            raise ValueError(
                f"max_new_tokens = {max_new_tokens}; wanted 1 or more, and at most the model's "
                f"context of {most}"
            )

        longest = self.longest_prompt(max_new_tokens)
        limit = f"the model's context of {most} less max_new_tokens = {max_new_tokens}"
        if self._source_length:
            limit = f"the encoder's context of {self._source_length} with what ends a source"
        for number, ids in enumerate(map(self._without_end, prompts)):
            if not 0 < len(ids) <= longest:
                raise ValueError(
                    f"prompt {number} has {len(ids)} tokens; wanted 1 to {max(longest, 0)}: {limit}"
                )

    def _without_end(self, prompt: Sequence[int]) -> Sequence[int]:
        """A prompt without what ends a source."""
        size = len(self._source_end)
        has_end = size and list(prompt[-size:]) == self._source_end
        return prompt[:-size] if has_end else prompt

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keys_B: jax.Array
    ) -> Iterator[np.ndarray]:
        """Continues prompts, token by token.

        Args:
          prompts: ids of each row.
          keys_B: of each row's draws, see `row_keys`. With the same key a row's continuation is the
            same in any batch.

        Yields:
          Ids [B], up to `max_new_tokens` times. A row ends with its stop token; after it come -1.

        Raises:
          ValueError: see `check`.
        """
        for token_B, _ in self.stream_scored(prompts, max_new_tokens, keys_B):
            yield token_B

    def stream_scored(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keys_B: jax.Array
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `stream`, with the model's log-probability of each token: yields (ids [B], [B] f32).
        After a row's stop token they have no meaning.
        """
        self.check(prompts, max_new_tokens)
        state = self._prefill_prompts(prompts, max_new_tokens, keys_B)

        ended_B = np.zeros(len(prompts), bool)
        for device_arrays in self._decode(state, max_new_tokens):
            # Copies of a row come after all rows, and there are some for a single row only.
            token_B, logprob_B = (np.asarray(x)[: len(prompts)] for x in device_arrays)
            token_B = np.where(ended_B, -1, token_B)
            ended_B |= np.isin(token_B, self.stop_ids)
            yield token_B, logprob_B
            if ended_B.all():
                return

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keys_B: jax.Array
    ) -> list[list[int]]:
        """The continuations of prompts, without their stop tokens; see `stream`."""
        continuations: list[list[int]] = [[] for _ in prompts]
        for token_B in self.stream(prompts, max_new_tokens, keys_B):
            for continuation, token in zip(continuations, token_B.tolist()):
                if token >= 0 and token not in self.stop_ids:
                    continuation.append(token)
        return continuations

    def _prefill_prompts(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keys_B: jax.Array
    ) -> DecodeState:
        """Puts the prompts on the devices and runs the model on them."""
        prompts_BT, lengths_B, cache_length = self.padded(prompts, max_new_tokens)
        with jax.set_mesh(self.mesh):
            return self._prefill(
                self.params,
                prompts_BT,
                lengths_B,
                self.replicate(np.asarray(jax.random.key_data(keys_B))),
                cache_length=cache_length,
                copies=copies_of_a_row(len(prompts), self.config, self.mesh),
            )

    def padded(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[jax.Array, jax.Array, int]:
        """Pads prompts and puts them on the devices.

        Returns:
          (ids [B, T], lengths [B], positions that a cache needs for them and the new tokens).
        """
        prompts = [[*self._without_end(ids), *self._source_end] for ids in prompts]
        longest = max(map(len, prompts))
        c = self.config
        most, new_length = c.context_length, longest + max_new_tokens
        if self._source_length:
            most, new_length = self._source_length, max_new_tokens
        padded_BT = np.zeros((len(prompts), bucket_length(longest, c, most)), np.int32)
        for row, ids in zip(padded_BT, prompts):
            row[: len(ids)] = ids
        lengths_B = np.array([len(ids) for ids in prompts], np.int32)
        cache_length = bucket_length(new_length, c, c.context_length)
        return self.replicate(padded_BT), self.replicate(lengths_B), cache_length

    def _decode(
        self, state: DecodeState, max_new_tokens: int
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yields the tokens of each step and their log-probabilities, both [B], once the next step
        is dispatched: while the host reads them, the device works on.
        """
        waiting = None
        for _ in range(max_new_tokens):
            with jax.set_mesh(self.mesh):
                state, *arrays = self._step(self.params, state)
            if waiting is not None:
                yield waiting
            waiting = tuple(arrays)
        yield waiting

    def replicate(self, array: np.ndarray) -> jax.Array:
        """The array on all devices of the mesh, those of other processes too."""
        layout = sharding.replicated(self.mesh)
        return jax.make_array_from_callback(array.shape, layout, array.__getitem__)


def _is_on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def for_decoding(graphdef, params, mesh: Mesh) -> tuple[Any, Any]:
    """(graphdef, params) in the form that decodes fastest on the mesh's devices, where the model
    has one of its own.
    """
    model = nnx.merge(graphdef, params)
    if not hasattr(model, "for_decoding"):
        return graphdef, params
    return model.for_decoding(params, mesh.devices.flat[0].platform)


def copies_of_a_row(num_rows: int, model_config, mesh: Mesh) -> int:
    """How often each row is computed: twice for a single row in bfloat16 on CPUs, else once.

    XLA on CPUs multiplies a single row by a bfloat16 matrix in float32, and for that converts all
    weights at every token. With two rows it leaves them in bfloat16.
    """
    in_bfloat16 = model_config.compute_dtype in ("bfloat16", jnp.bfloat16)
    return 2 if num_rows == 1 and in_bfloat16 and _is_on_cpu(mesh) else 1


def bucket_length(length: int, model_config, most: int) -> int:
    """The next power of two, up to `most`: one compilation serves all lengths between two of
    them.
    """
    power_of_two = 1 << (length - 1).bit_length()
    return min(max(power_of_two, model_config.shortest_row), most)
