"""Beam search: of each prompt the most probable continuations that a search finds (Graves 2012,
arXiv 1211.3711, section 2.5), with a length penalty, as transformers has it.

Letters: B prompts, K beams of each, V vocab.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lm import sharding
from lm.decoding import generator


@dataclasses.dataclass(frozen=True)
class Beams:
    """How to search.

    Attributes:
      number: beams of a prompt, K.
      length_penalty: a continuation's score is its log-probability divided by its number of tokens
        to this power, EOS counted. Above 0 longer ones are preferred; 0: the log-probability.

    Raises:
      ValueError: no beams.
    """

    number: int
    length_penalty: float = 1.0

    def __post_init__(self):
        if self.number < 1:
            raise ValueError(f"num_beams = {self.number}; wanted 1 or more")


class Continuation(NamedTuple):
    """A continuation that ended, or is as long as it may be.

    Attributes:
      ids: without what ended it.
      score: see `Beams.length_penalty`.
    """

    ids: list[int]
    score: float


class BeamState(NamedTuple):
    """Beams that are being continued, just before their next tokens are chosen; B * K rows."""

    logprobs_BV: jax.Array  # of the next token, -inf for those that are never chosen
    cache: Any  # the model's own
    position_B: jax.Array  # of the next token


def begin(
    graphdef,
    params,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    num_beams: int,
    cache_length: int,
    never_ids: tuple[int, ...],
    vocab_size: int,
) -> BeamState:
    """The state behind the prompts, each as often as it has beams."""
    model = nnx.merge(graphdef, params)
    logits_BV, cache, position_B = generator.prefill(model, prompts_BT, lengths_B, cache_length)

    rows_B = jnp.repeat(jnp.arange(len(lengths_B)), num_beams)
    logprobs_BV = _logprobs(logits_BV, never_ids, vocab_size)[rows_B]
    return BeamState(logprobs_BV, model.take_rows(cache, rows_B), position_B[rows_B])


def advance(
    graphdef,
    params,
    state: BeamState,
    rows_B: jax.Array,
    token_B: jax.Array,
    *,
    never_ids: tuple[int, ...],
    vocab_size: int,
) -> BeamState:
    """The state one token further.

    Args:
      state: is donated where this is compiled.
      rows_B: the beam that each goes on with.
      token_B: the token that each goes on with.
    """
    model = nnx.merge(graphdef, params)
    cache = model.take_rows(state.cache, rows_B)
    logits_BV, cache, position_B = generator.decode_step(
        model, token_B, state.position_B[rows_B], cache
    )
    return BeamState(_logprobs(logits_BV, never_ids, vocab_size), cache, position_B)


def _logprobs(logits_BV: jax.Array, never_ids: tuple[int, ...], vocab_size: int) -> jax.Array:
    logprobs_BV = jax.nn.log_softmax(logits_BV[:, :vocab_size])
    return generator.without(logprobs_BV, never_ids)


def candidates(logprobs_BV: jax.Array, scores_BK: jax.Array, *, number: int):
    """The best continuations of each prompt by one token: (log-probabilities, numbers of beam * V +
    token), both [B, number], the best first.
    """
    num_prompts, num_beams = scores_BK.shape
    logprobs_BKV = logprobs_BV.reshape(num_prompts, num_beams, -1) + scores_BK[:, :, None]
    return jax.lax.top_k(logprobs_BKV.reshape(num_prompts, -1), number)


class Hypotheses:
    """What a search knows of one prompt: the beams that go on, and the best ones that ended.

    Args:
      stop_ids: a beam ends with any of them.
      max_new_tokens: and when it has so many tokens.
    """

    def __init__(self, beams: Beams, stop_ids: tuple[int, ...], max_new_tokens: int):
        self._beams = beams
        self._stop_ids = stop_ids
        self._max_new_tokens = max_new_tokens
        self._ids: list[list[int]] = [[] for _ in range(beams.number)]
        self._ended: list[Continuation] = []
        self._may_improve = True
        # All beams are the same at first: one of them goes on.
        self.scores = np.full(beams.number, -1e9, np.float32)
        self.scores[0] = 0.0
        self.is_done = False

    def take(self, logprobs: np.ndarray, numbers: np.ndarray, vocab_size: int) -> list[tuple]:
        """Takes the best candidates, and returns (beam, token) of each beam that goes on.

        Args:
          logprobs, numbers: [candidates], see `candidates`.
        """
        length = len(self._ids[0]) + 1

        going_on = []
        for rank, (logprob, number) in enumerate(zip(logprobs.tolist(), numbers.tolist())):
            beam, token = divmod(number, vocab_size)
            ends = token in self._stop_ids or length == self._max_new_tokens
            if not ends:
                going_on.append((beam, token, logprob))
            # What ends counts if it is among the best, not among those kept in their stead.
            elif rank < self._beams.number and self._may_improve:
                ids = self._ids[beam] + [token] * (token not in self._stop_ids)
                score = logprob / length**self._beams.length_penalty
                self._ended.append(Continuation(ids, score))

        self._ended.sort(key=lambda continuation: -continuation.score)
        del self._ended[self._beams.number :]

        # Where all have ended there is nothing to go on with.
        going_on = going_on[: self._beams.number] or [(0, self._stop_ids[0], -1e9)]
        going_on += [going_on[-1][:2] + (-1e9,)] * (self._beams.number - len(going_on))
        self._ids = [[*self._ids[beam], token] for beam, token, _ in going_on]
        self.scores = np.array([logprob for *_, logprob in going_on], np.float32)

        best = self.scores[0] / length**self._beams.length_penalty
        is_full = len(self._ended) == self._beams.number
        self._may_improve &= not is_full or best > self._ended[-1].score
        self.is_done = not self._may_improve or length == self._max_new_tokens
        return [(beam, token) for beam, token, _ in going_on]

    def best(self) -> list[Continuation]:
        """Those that ended, the best first."""
        return list(self._ended)


@functools.lru_cache(maxsize=4)
def _compiled(graph: generator.Graph, never_ids: tuple[int, ...], vocab_size: int, mesh: Mesh):
    """(`begin`, `advance`, `candidates`) of a model, under jit. Cached as `lm.decoding.generator`
    does.
    """
    of_ids = dict(never_ids=never_ids, vocab_size=vocab_size)
    begin_fn = jax.jit(
        functools.partial(begin, graph.graphdef, **of_ids),
        static_argnames=("num_beams", "cache_length"),
    )
    advance_fn = jax.jit(functools.partial(advance, graph.graphdef, **of_ids), donate_argnums=1)
    # Every process reads all of them.
    candidates_fn = jax.jit(
        candidates, static_argnames="number", out_shardings=sharding.replicated(mesh)
    )
    return begin_fn, advance_fn, candidates_fn


def search(
    model: generator.Generator, prompts: Sequence[Sequence[int]], max_new_tokens: int, beams: Beams
) -> list[list[Continuation]]:
    """The best continuations of each prompt that a search finds, `beams.number` at most.

    Args:
      model: whose sampling doesn't matter.

    Raises:
      ValueError: more beams than tokens of the vocabulary; see `lm.decoding.generator.Generator`.
    """
    model.check(prompts, max_new_tokens)
    if beams.number > model.vocab_size:
        raise ValueError(
            f"num_beams = {beams.number} is above the vocabulary's {model.vocab_size} tokens"
        )

    begin_fn, advance_fn, candidates_fn = _compiled(
        model.graph, model.never_ids, model.vocab_size, model.mesh
    )
    # So many that some go on, whichever stop tokens the others end with.
    number = max(2, 1 + len(model.stop_ids)) * beams.number

    prompts_BT, lengths_B, cache_length = model.padded(prompts, max_new_tokens)
    found = [Hypotheses(beams, model.stop_ids, max_new_tokens) for _ in prompts]

    with jax.set_mesh(model.mesh):
        state = begin_fn(
            model.params,
            prompts_BT,
            lengths_B,
            num_beams=beams.number,
            cache_length=cache_length,
        )
        while True:
            scores_BK = model.replicate(np.stack([each.scores for each in found]))
            best = jax.device_get(candidates_fn(state.logprobs_BV, scores_BK, number=number))

            rows, tokens = [], []
            for prompt, (each, logprobs, numbers) in enumerate(zip(found, *best)):
                for beam, token in each.take(logprobs, numbers, model.vocab_size):
                    rows.append(prompt * beams.number + beam)
                    tokens.append(token)

            if all(each.is_done for each in found):
                return [each.best() for each in found]

            of_beams = [model.replicate(np.array(values, np.int32)) for values in (rows, tokens)]
            state = advance_fn(model.params, state, *of_beams)
