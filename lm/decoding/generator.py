"""Tokens from a model: prefill a cache with the prompts, then one token at a time."""

import collections
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lm import sharding
from lm.decoding.sampling import Sampling, sample
from lm.models import transformer
from lm.nn.attention import SPLASH, Cache


def prefill(
    model, prompts_BT: jax.Array, lengths_B: jax.Array, cache_length: int, copies: int = 1
) -> tuple[jax.Array, Cache]:
    """(logits [B, V] of what follows each prompt, a cache for `cache_length` positions that holds
    the prompts).

    Prompts are padded on the right; nothing attends to the padding, and none of it is in the cache.

    Args:
      copies: of each row, in what comes out (layers that aren't stacked only).
    """
    positions_BT = jnp.broadcast_to(jnp.arange(prompts_BT.shape[1]), prompts_BT.shape)
    segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
    output = model(
        prompts_BT,
        positions_BT,
        segments_BT,
        cache=model.init_cache(prompts_BT.shape[0], cache_length),
    )
    last_BD = jnp.take_along_axis(output.hidden, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    copied = lambda x: jnp.repeat(x, copies, axis=0) if copies > 1 else x
    return model.logits(copied(last_BD)), jax.tree.map(copied, output.cache)


def decode_step(
    model, token_B: jax.Array, position_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """(logits [B, V] of what follows these tokens at these positions, the cache with them)."""
    output = model(
        token_B[:, None],
        position_B[:, None],
        jnp.ones((token_B.shape[0], 1), jnp.int32),
        cache=cache,
    )
    return model.logits(output.hidden[:, 0]), output.cache


class State(NamedTuple):
    """Of rows that are being continued."""

    logits_BV: jax.Array  # of what comes next
    cache: Cache
    position_B: jax.Array  # of what comes next
    done_B: jax.Array  # a stop token was chosen
    seen_BV: jax.Array | None
    keys_B: jax.Array  # one a row, so that a row's draws don't depend on the others
    index: jax.Array  # tokens chosen


def start(
    graphdef,
    params,
    prompts_BT,
    lengths_B,
    keys_B,
    *,
    sampling: Sampling,
    cache_length: int,
    copies: int = 1,
) -> State:
    """Prefills. Prompts are padded on the right. `copies`: see `prefill`."""
    logits_BV, cache = prefill(
        nnx.merge(graphdef, params), prompts_BT, lengths_B, cache_length, copies
    )
    prompts_BT, lengths_B, keys_B = (
        jnp.repeat(x, copies, axis=0) if copies > 1 else x for x in (prompts_BT, lengths_B, keys_B)
    )
    seen_BV = None
    if sampling.repetition_penalty != 1:
        real_BT = jnp.arange(prompts_BT.shape[1])[None] < lengths_B[:, None]
        rows = jnp.arange(len(lengths_B))[:, None]
        seen_BV = (
            jnp.zeros(logits_BV.shape, bool)
            .at[rows, jnp.where(real_BT, prompts_BT, logits_BV.shape[1])]
            .set(True, mode="drop")
        )
    return State(
        logits_BV,
        cache,
        lengths_B,
        jnp.zeros(lengths_B.shape, bool),
        seen_BV,
        keys_B,
        jnp.zeros((), jnp.int32),
    )


def advance(
    graphdef,
    params,
    state: State,
    *,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    vocab_size: int,
) -> tuple[State, jax.Array]:
    """(the state one token further, the tokens [B]: after a row's stop token, the first of
    `stop_ids` again).
    """
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.index)
    token_B = sample(
        keys_B, state.logits_BV, sampling, vocab_size=vocab_size, seen_BV=state.seen_BV
    )
    token_B = jnp.where(state.done_B, stop_ids[0], token_B)
    done_B = state.done_B | jnp.any(token_B[:, None] == jnp.asarray(stop_ids)[None], axis=1)
    seen_BV = (
        None
        if state.seen_BV is None
        else state.seen_BV.at[jnp.arange(len(token_B)), token_B].set(True, mode="drop")
    )
    logits_BV, cache = decode_step(
        nnx.merge(graphdef, params), token_B, state.position_B, state.cache
    )
    return State(
        logits_BV, cache, state.position_B + 1, done_B, seen_BV, state.keys_B, state.index + 1
    ), token_B


class Generator:
    """Continues prompts, handing out each token as it is there. Compiles once for prompts whose
    longest, and whose longest with its continuation, lie between the same powers of two, and the
    same number of rows.

    Args:
      params: on `mesh`.
      stop_ids: a row ends with any of them.
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
    ):
        if mesh.devices.flat[0].platform == "cpu":
            graphdef, params = transformer.unstack(nnx.merge(graphdef, params), params)
        self._config, self._params, self._mesh, self._stop_ids = (
            model_config,
            params,
            mesh,
            tuple(stop_ids),
        )

        def begin(params, prompts_BT, lengths_B, key_data_B2, **sizes):
            return start(
                graphdef,
                params,
                prompts_BT,
                lengths_B,
                jax.random.wrap_key_data(key_data_B2),
                sampling=sampling,
                **sizes,
            )

        self._start = jax.jit(begin, static_argnames=("cache_length", "copies"))
        # Every process sees all tokens.
        self._advance = jax.jit(
            functools.partial(
                advance, graphdef, sampling=sampling, stop_ids=self._stop_ids, vocab_size=vocab_size
            ),
            donate_argnums=1,
            out_shardings=(None, sharding.replicated(mesh)),
        )

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Raises ValueError for prompts that are empty or too long."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}; wanted 1 or more")
        room = self._config.context_length - max_new_tokens
        for number, ids in enumerate(prompts):
            if not 0 < len(ids) <= room:
                raise ValueError(
                    f"prompt {number} has {len(ids)} tokens; wanted 1 to {max(room, 0)}: the "
                    f"model's context of {self._config.context_length} less max_new_tokens = "
                    f"{max_new_tokens}"
                )

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keys_B: jax.Array
    ) -> Iterator[np.ndarray]:
        """Yields [B] ids, up to `max_new_tokens` times; -1 for rows that have ended (their stop
        token is the last one that is yielded).

        Args:
          keys_B: of each row's draws, see `row_keys`. A row's continuation is the same in any batch.

        Raises:
          ValueError: see `check`.
        """
        self.check(prompts, max_new_tokens)
        count = len(prompts)
        # For a single row XLA on CPUs converts all weights to f32, at every step.
        copies = (
            2
            if count == 1
            and self._mesh.devices.flat[0].platform == "cpu"
            and self._config.compute_dtype in ("bfloat16", jnp.bfloat16)
            else 1
        )
        longest = max(map(len, prompts))
        least = 128 if self._config.attention in SPLASH else 16
        bucket = lambda n: min(
            max(1 << (n - 1).bit_length(), least), max(self._config.context_length, n)
        )
        padded = np.zeros((len(prompts), bucket(longest)), np.int32)
        for row, ids in zip(padded, prompts):
            row[: len(ids)] = ids
        lengths = np.array([len(ids) for ids in prompts], np.int32)
        put = lambda x: jax.make_array_from_callback(
            x.shape, sharding.replicated(self._mesh), lambda index: x[index]
        )
        with jax.set_mesh(self._mesh):
            state = self._start(
                self._params,
                put(padded),
                put(lengths),
                put(np.asarray(jax.random.key_data(keys_B))),
                cache_length=bucket(longest + max_new_tokens),
                copies=copies,
            )
        ended, ahead = np.zeros(count, bool), collections.deque()
        for step in range(max_new_tokens):
            with jax.set_mesh(self._mesh):
                state, token_B = self._advance(self._params, state)
            ahead.append(token_B)
            # the device works on the next one meanwhile
            while ahead and (len(ahead) > 1 or step == max_new_tokens - 1):
                token = np.where(ended, -1, np.asarray(ahead.popleft())[:count])
                ended |= np.isin(token, self._stop_ids)
                yield token
                if ended.all():
                    return

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, keys_B: jax.Array
    ) -> list[list[int]]:
        """The continuations, their stop tokens left out."""
        rows: list[list[int]] = [[] for _ in prompts]
        for token in self.stream(prompts, max_new_tokens, keys_B):
            for row, one in zip(rows, token.tolist()):
                if one >= 0 and one not in self._stop_ids:
                    row.append(one)
        return rows
