"""What evaluators share: the contract, and the functions they are given.

`Evaluator(predict_fns, **config).run(params)` yields (name, value). A float is a metric; an
`Artifact` is a file of the run directory. An evaluator sees neither the model nor the trainer, only

  predict_fns.token_logprobs(params, rows)   -> f32 [rows, T]                   log-probability of
  each target predict_fns.tree_logprobs(params, trees)   -> (f32 [Q], bool [Q]) a tree      of each
  query's target; whether no token is likelier predict_fns.states(params, prompts)        -> f32
  [prompts, D]                what the head sees after each predict_fns.head_rows(params, ids)
  -> f32 [ids, D]                    what it multiplies that with for these tokens
  predict_fns.make_generator(params, sampling) -> lm.Generator           continuations token
  by token

Rows are numpy rows of the Batch contract (lm/data/batch.py). Each goes through the model exactly
once, whatever the batch size, the mesh and the number of hosts: batches are filled with padding,
whose results are dropped. All hosts get all results.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from lm import sharding
from lm.data import pack
from lm.data.loader import evaluation_batches
from lm.evals.tree import Tree, build_tree, merge_trees


class Artifact(NamedTuple):
    """A file for the run directory."""

    path: str  # "{step}" in it is replaced
    content: bytes | str
    append: bool = False  # to what earlier steps wrote, under a heading of its own


class Evaluator(Protocol):
    """It may have `about`, a dict of what is to be said of its data beside the results:
    fingerprint, examples, citation.
    """

    def run(self, params: Any) -> Iterator[tuple[str, float | Artifact]]: ...


# XLA may leave out roundings to bf16 between operations that it fuses, and what it fuses depends on
# the mesh: log-probabilities differed by up to 0.05 between one device and four that have a row
# each.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


class PredictFns:
    """The compiled functions of one model on one mesh, for batches of `batch_size` rows of `length`
    tokens.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        batch_size: int,
        length: int,
        token_logprobs: Callable,
        tree_logprobs: Callable,
        check_stop: Callable[[], None],
        make_generator: Callable | None = None,
        tree_states: Callable | None = None,
        head_rows: Callable | None = None,
    ):
        whole = sharding.replicated(mesh)
        self.length, self.batch_size, self.make_generator = length, batch_size, make_generator
        self._mesh, self.check_stop = mesh, check_stop
        compiled = functools.partial(
            jax.jit, out_shardings=whole, compiler_options=COMPILER_OPTIONS
        )
        self._token_logprobs = compiled(token_logprobs)
        self._tree_logprobs = compiled(tree_logprobs)
        self._tree_states = compiled(lambda *args: (tree_states(*args),))
        self._head_rows = jax.jit(lambda params, ids: head_rows(params, ids), out_shardings=whole)

    def _batches(self, rows):
        yield from evaluation_batches(
            rows, self.batch_size, sharding.batch_sharding(self._mesh), pack.empty_row(self.length)
        )

    def token_logprobs(self, params, rows: Sequence[dict]) -> np.ndarray:
        out = []
        for batch in self._batches(rows):
            self.check_stop()
            out.append(self._token_logprobs(params, batch))
        return _fetch(out)[: len(rows)] if out else np.zeros((0, self.length), np.float32)

    def tree_logprobs(self, params, trees: Sequence[Tree]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each tree, in their order."""
        return self._of_trees(self._tree_logprobs, params, trees)

    def states(self, params, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        found = self._of_trees(
            self._tree_states, params, [build_tree(prompt, [[0]]) for prompt in prompts]
        )
        return np.stack([states[0] for (states,) in found])

    def head_rows(self, params, ids: Sequence[int]) -> np.ndarray:
        return np.asarray(self._head_rows(params, np.asarray(ids, np.int32)))

    def _of_trees(
        self, function: Callable, params, trees: Sequence[Tree]
    ) -> list[tuple[np.ndarray, ...]]:
        """What a function of packed trees says of each one's queries, in the trees' order. Those
        that begin alike share a row. Rows go through the model by length, in batches of about as
        many tokens as one of `token_logprobs`, all of a few sizes, so that little is padding and
        few programs are compiled.
        """
        joined = merge_trees(trees, self.length)
        groups = collections.defaultdict(list)
        for row in joined:
            groups[_bucket(len(row.tree.tokens))].append(row)
        parts, out, found = sharding.batch_parts(self._mesh), [], [None] * len(trees)

        def collect(part, answers):
            answers = jax.device_get(answers)
            for number, row in enumerate(part):
                for member, queries in row.members:
                    found[member] = tuple(x[number, queries] for x in answers)

        # what needs most memory comes first
        for length, rows in sorted(groups.items(), reverse=True):
            batches = -(-len(rows) // max(self.batch_size * self.length // length, 1))
            size = -(-math.ceil(len(rows) / batches) // parts) * parts  # batches as equal as can be
            num_places, num_queries = (
                _bucket(max(len(count(row.tree)) for row in rows), 1)
                for count in (lambda t: np.unique(t.at), lambda t: t.at)
            )
            for start in range(0, len(rows), size):
                self.check_stop()
                part = rows[start : start + size]
                packed = _pack([row.tree for row in part], size, length, num_places, num_queries)
                out.append((part, function(params, *jax.tree.map(self._rows, packed))))
                if len(out) > 1:  # the device works on the next one meanwhile
                    collect(*out.pop(0))
        for rest in out:
            collect(*rest)
        return found

    def _rows(self, x: np.ndarray) -> jax.Array:
        """On the mesh, split into its rows."""
        layout = jax.sharding.NamedSharding(self._mesh, sharding.spec(("batch", None), self._mesh))
        return jax.make_array_from_callback(x.shape, layout, lambda index: x[index])

    def check_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        """The most tokens that a prompt may have; ValueError if one has more, or none."""
        room = self.length - max_new_tokens
        for ids in prompts:
            if not 0 < len(ids) <= room:
                raise ValueError(
                    f"a prompt has {len(ids)} tokens; wanted 1 to {room}: config.data.length = "
                    f"{self.length} less max_new_tokens = {max_new_tokens}"
                )
        return room


def _bucket(size: int, least: int = 32) -> int:
    """The next of the sizes that are compiled: eight to each doubling, of `least` and more."""
    step = max((1 << (size - 1).bit_length()) // 16, least // 8, 1)
    return max(-(-size // step) * step, least)


def _pack(trees: Sequence[Tree], size: int, length: int, num_places: int, num_queries: int):
    """(batch, after [B, P], which [B, Q]) of `lm.step.make_tree_logprobs`, filled up with zeros."""
    batch = {
        name: np.zeros((size, length), np.int32)
        for name in ("tokens", "positions", "segments", "until")
    }
    batch["targets"], which = (
        np.zeros((size, num_queries), np.int32),
        np.zeros((size, num_queries), np.int32),
    )
    after = np.zeros((size, num_places), np.int32)
    for row, tree in enumerate(trees):
        for name in ("tokens", "positions", "until"):
            batch[name][row, : len(tree.tokens)] = getattr(tree, name)
        batch["segments"][row, : len(tree.tokens)] = 1
        places, which[row, : len(tree.at)] = np.unique(tree.at, return_inverse=True)
        after[row, : len(places)] = places
        batch["targets"][row, : len(tree.at)] = tree.target
    return batch, after, which


def _fetch(arrays) -> np.ndarray:
    return np.concatenate([np.asarray(a) for a in arrays])
