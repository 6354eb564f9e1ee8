"""Several texts of many prompts, each with the log-probabilities that it was drawn with.

A number of slots is decoded together, some tokens at a time. Slots whose texts have ended get the
next prompts, so that no slot waits for the longest text. Texts of the same prompt share its
prefill.

Letters: B slots, P prompts that are read together, N texts of them, T length of the padded prompts,
C tokens of a chunk.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lm import sharding
from lm.decoding.generator import (
    DecodeState,
    Generator,
    bucket_length,
    generation_step,
    prefill_state,
)
from lm.decoding.sampling import Sampling

CHUNK = 16


class Draw(NamedTuple):
    """A text that was drawn.

    Attributes:
      ids: with the stop token, where it has ended.
      logprobs: of each id, at the temperature that it was drawn at.
      has_ended: with a stop token, not at the limit.
    """

    ids: list[int]
    logprobs: list[float]
    has_ended: bool


class _Request(NamedTuple):
    """The texts of a prompt that are still to be drawn."""

    prompt: Sequence[int]
    first: int  # number of its first text


class BoardLayout(NamedTuple):
    """How many texts are decoded together, and how many prompts are read together."""

    slots: int
    read_together: int


def board_layout(num_prompts: int, samples: int, slots: int) -> BoardLayout:
    """The layout for so many prompts, of `samples` texts each, in `slots` slots at most."""
    at_once = max(slots // samples, 1)  # prompts in the slots
    read_together = max(-(-min(at_once, num_prompts) // 4), 1)
    groups = -(-num_prompts // read_together)
    return BoardLayout(min(at_once, groups * read_together) * samples, read_together)


class _Functions(NamedTuple):
    """What is compiled: (params, ...) -> ..., see the functions of these names."""

    prefill: Callable
    begin: Callable
    insert: Callable
    step: Callable


def draw(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    key: jax.Array,
    slots: int,
) -> list[list[Draw]]:
    """Draws texts of prompts.

    Args:
      samples: texts of each prompt.
      temperature: of the draw, without filters.
      key: a text's draws depend on it and on the text's number, `samples` a prompt, alone.
      slots: texts that are decoded together at most.

    Returns:
      For each prompt its texts.

    Raises:
      ValueError: see `lm.decoding.generator.Generator.check`.
    """
    generator.check(prompts, max_new_tokens)
    # Long prompts first: the cache has room for the longest one, and the end comes sooner.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    requests = [_Request(prompts[i], i * samples) for i in order]
    layout = board_layout(len(prompts), samples, slots)
    board = _Board(
        generator,
        _compiled(
            generator.graph, temperature, generator.stop_ids, generator.vocab_size, generator.mesh
        ),
        key,
        samples=samples,
        max_new_tokens=max_new_tokens,
        longest=max(map(len, prompts)),
        slots=layout.slots,
    )

    drawn: dict[int, Draw] = {}  # by the text's number
    while requests or board.is_busy:
        while requests and board.num_free >= layout.read_together * samples:
            board.fill(requests[: layout.read_together], layout.read_together)
            del requests[: layout.read_together]
        drawn |= dict(board.decode(CHUNK))

    texts = [drawn[number] for number in sorted(drawn)]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


class _Board:
    """The slots, and the texts in them."""

    def __init__(
        self,
        generator: Generator,
        functions: _Functions,
        key: jax.Array,
        *,
        samples: int,
        max_new_tokens: int,
        longest: int,
        slots: int,
    ):
        self._generator, self._functions, self._key = generator, functions, key
        self._samples, self._max_new_tokens = samples, max_new_tokens
        config = generator.config
        self._longest = bucket_length(longest, config, config.context_length)
        self._cache_length = bucket_length(longest + max_new_tokens, config, config.context_length)

        self._state: DecodeState | None = None  # until the first prompts come

        self._text_of = [-1] * slots  # number of the text in each slot; -1: it is free
        self._ids: list[list[int]] = [[] for _ in range(slots)]
        self._logprobs: list[list[float]] = [[] for _ in range(slots)]

    @property
    def num_free(self) -> int:
        return self._text_of.count(-1)

    @property
    def is_busy(self) -> bool:
        return self.num_free < len(self._text_of)

    def fill(self, requests: Sequence[_Request], count: int) -> None:
        """Puts the texts of some prompts into free slots.

        Args:
          count: prompts that are read together; padding makes up for those that lack.
        """
        g, slots = self._generator, len(self._text_of)
        prompts_PT = np.zeros((count, self._longest), np.int32)
        lengths_P = np.ones(count, np.int32)
        for number, request in enumerate(requests):
            prompts_PT[number, : len(request.prompt)] = request.prompt
            lengths_P[number] = len(request.prompt)

        # Which text goes into which slot.
        free = [slot for slot, text in enumerate(self._text_of) if text < 0]
        slots_N = np.full(count * self._samples, slots, np.int32)  # which don't exist
        texts_N = np.zeros(count * self._samples, np.int32)
        for k in range(len(requests) * self._samples):
            slot, text = free[k], requests[k // self._samples].first + k % self._samples
            slots_N[k], texts_N[k] = slot, text
            self._text_of[slot], self._ids[slot], self._logprobs[slot] = text, [], []

        key_data = np.asarray(jax.random.key_data(self._key))
        with jax.set_mesh(g.mesh):
            new = self._functions.prefill(
                g.params,
                g.replicate(prompts_PT),
                g.replicate(lengths_P),
                g.replicate(np.zeros((count, *key_data.shape), key_data.dtype)),
                cache_length=self._cache_length,
            )
            if self._state is None:
                self._state = self._functions.begin(g.params, new, slots=slots)
            self._state = self._functions.insert(
                g.params,
                self._state,
                new,
                g.replicate(slots_N),
                g.replicate(np.arange(count).repeat(self._samples).astype(np.int32)),
                g.replicate(key_data),
                g.replicate(texts_N),
            )

    def decode(self, chunk: int) -> Iterator[tuple[int, Draw]]:
        """Draws up to `chunk` tokens in each slot. Yields the texts that have ended, with their
        numbers, and frees their slots.
        """
        g = self._generator

        chosen = []
        with jax.set_mesh(g.mesh):
            for _ in range(min(chunk, self._max_new_tokens)):
                self._state, *arrays = self._functions.step(g.params, self._state)
                chosen.append(arrays)
        # Read at once: the devices don't wait for the host in between.
        chosen = jax.device_get(chosen)

        for slot, text in enumerate(self._text_of):
            if text < 0:
                continue
            has_ended = False
            for tokens_B, logprobs_B in chosen:
                self._ids[slot].append(int(tokens_B[slot]))
                self._logprobs[slot].append(float(logprobs_B[slot]))
                has_ended = self._ids[slot][-1] in g.stop_ids
                if has_ended or len(self._ids[slot]) == self._max_new_tokens:
                    self._text_of[slot] = -1
                    yield text, Draw(self._ids[slot], self._logprobs[slot], has_ended)
                    break


# --- what is compiled ---


def _begin(graphdef, params, like: DecodeState, *, slots: int) -> DecodeState:
    """A state of slots without texts, whose arrays are as those of another state."""
    rows_B = jnp.zeros(slots, jnp.int32)
    rest = like._replace(cache=None, done_B=None)
    return jax.tree.map(lambda x: x[rows_B], rest)._replace(
        cache=nnx.merge(graphdef, params).take_rows(like.cache, rows_B),
        done_B=jnp.ones(slots, bool),
    )


def _insert(
    graphdef,
    params,
    state: DecodeState,
    new: DecodeState,
    slots_N: jax.Array,
    rows_N: jax.Array,
    key_data: jax.Array,
    texts_N: jax.Array,
) -> DecodeState:
    """The state with texts begun in some slots.

    Args:
      state: is donated where this is compiled.
      new: behind the prompts.
      slots_N: of each text; those that don't exist are left out.
      rows_N: of each text, the row of its prompt.
      key_data: of the key that the texts' own are folded from.
      texts_N: their numbers.
    """
    model = nnx.merge(graphdef, params)
    key = jax.random.wrap_key_data(key_data)
    keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, texts_N)

    def put(old, rows):
        return old.at[slots_N].set(rows, mode="drop")

    keys_B = put(jax.random.key_data(state.keys_B), jax.random.key_data(keys_N))
    return DecodeState(
        logits_BV=put(state.logits_BV, new.logits_BV[rows_N]),
        cache=model.put_rows(state.cache, slots_N, model.take_rows(new.cache, rows_N)),
        position_B=put(state.position_B, new.position_B[rows_N]),
        done_B=put(state.done_B, False),
        seen_BV=None,
        keys_B=jax.random.wrap_key_data(keys_B),
        num_chosen_B=put(state.num_chosen_B, 0),
    )


@functools.lru_cache(maxsize=8)
def _compiled(
    graph, temperature: float, stop_ids: tuple[int, ...], vocab_size: int, mesh: Mesh
) -> _Functions:
    """The functions of a model under jit; cached as those of `lm.decoding.generator`."""
    sampling = Sampling(temperature=temperature)
    step = functools.partial(
        generation_step,
        graph.graphdef,
        sampling=sampling,
        stop_ids=stop_ids,
        vocab_size=vocab_size,
        scored_at=temperature,
    )

    replicated = sharding.replicated(mesh)
    return _Functions(
        prefill=jax.jit(
            functools.partial(prefill_state, graph.graphdef, sampling=sampling, copies=1),
            static_argnames="cache_length",
        ),
        begin=jax.jit(functools.partial(_begin, graph.graphdef), static_argnames="slots"),
        insert=jax.jit(functools.partial(_insert, graph.graphdef), donate_argnums=1),
        step=jax.jit(step, donate_argnums=1, out_shardings=(None, replicated, replicated)),
    )
