"""The contract of evaluators, and the functions of the model that they are given.

`Evaluator(predict_fns, name=NAME, encoder=ENCODER, **config).run(params)` yields (name, value); an
entry with a `split` gets `documents` too. A float is a metric, an `Artifact` is a file of the run
directory. An evaluator sees neither the model nor the trainer, only `PredictFns`:

  token_logprobs(params, rows)      f32 [rows, T]: the log-probability of each target
  tree_logprobs(params, trees)      for each tree f32 [Q], bool [Q]: the log-probability of each
                                    query's target, and whether no token is likelier
  states(params, prompts)           f32 [prompts, D]: the state that the head sees after each prompt
  head_rows(params, ids)            f32 [ids, D]: what the head multiplies a state with for each id
  make_generator(params, sampling)  a Generator (lm/decoding/generator.py), which continues prompts

Rows are numpy rows of the Batch contract (lm/data/batch.py). Each goes through the model exactly
once, whatever the batch size, the mesh and the number of hosts. Batches are filled up with padding,
whose results are dropped. All hosts get all results.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from lm import sharding
from lm.data import batch as batch_contract
from lm.data.loader import evaluation_batches
from lm.evals.tree import MergedTree, Tree, build_tree, merge_trees


class Artifact(NamedTuple):
    """A file for the run directory."""

    path: str  # "{step}" in it is replaced
    content: bytes | str
    append: bool = False  # to what earlier steps wrote, under a heading of its own


def predictions_artifact(
    name: str, lines: Iterable[Mapping], *, ensure_ascii: bool = True
) -> Artifact:
    """The file of an eval's predictions, a JSON object a line. `lm.reports.comparison` finds it by
    its name, and pairs its lines.

    Args:
      name: the eval's.
      lines: for each example its `name`, and what `lm.reports.comparison.compare` reads.
      ensure_ascii: whether other characters are written as escapes.
    """
    content = "".join(json.dumps(line, ensure_ascii=ensure_ascii) + "\n" for line in lines)
    return Artifact(f"predictions/{name}-{{step}}.jsonl", content)


class ShownPrompt(NamedTuple):
    """A prompt for people to read."""

    title: str
    text: str  # as the model sees it
    right: str  # what should follow


class Evaluator(Protocol):
    """What runs an entry of config.evals.

    It may have an attribute `about`: a dict that describes its data beside the results
    (fingerprint, examples, citation; `words`, see `Variant.word_tokens`; `prompts`, see
    `lm.evals.prompts.describe`; `corrections`, names). A method `shown_prompts(count)`, which
    yields the first prompts as `ShownPrompt`s. And an attribute
    `metrics`: the names of what it yields by which models are compared (`lm.reports.metrics`); of
    one without, no metric can be config.checkpoint.best.
    """

    def run(self, params: Any) -> Iterator[tuple[str, float | Artifact]]: ...


@dataclasses.dataclass(frozen=True)
class ModelFns:
    """What `lm.build` makes of a model for `PredictFns`: pure functions, not compiled yet."""

    token_logprobs: Callable  # see lm.step.make_token_logprobs
    tree_logprobs: Callable  # see lm.step.make_tree_logprobs
    tree_states: Callable  # see lm.step.make_tree_states
    head_rows: Callable  # see lm.step.make_head_rows
    make_generator: Callable  # (params, Sampling) -> Generator


# XLA may leave out roundings to bf16 between operations that it fuses, and what it fuses depends on
# the mesh: log-probabilities differed by up to 0.05 between one device and four that have a row
# each.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


def never_stop() -> None:
    """A `check_stop` for evaluations that run to their end."""


class PredictFns:
    """The compiled functions of one model on one mesh.

    Args:
      batch_size: rows of a batch of `token_logprobs`; trees go in batches of about as many tokens.
      length: tokens of a row.
      check_stop: called before each batch; may raise, to end an evaluation early.
    """

    def __init__(
        self,
        mesh: Mesh,
        model_fns: ModelFns,
        *,
        batch_size: int,
        length: int,
        check_stop: Callable[[], None] = never_stop,
    ):
        self.batch_size = batch_size
        self.length = length
        self.check_stop = check_stop
        self.make_generator = model_fns.make_generator
        self._mesh = mesh

        # Results are replicated: every host gets all of them.
        replicated = sharding.replicated(mesh)
        compiled = functools.partial(
            jax.jit, out_shardings=replicated, compiler_options=COMPILER_OPTIONS
        )
        self._token_logprobs = compiled(model_fns.token_logprobs)
        self._tree_logprobs = compiled(model_fns.tree_logprobs)
        self._tree_states = compiled(model_fns.tree_states)
        self._head_rows = jax.jit(model_fns.head_rows, out_shardings=replicated)

    def token_logprobs(self, params, rows: Sequence[dict]) -> np.ndarray:
        """[rows, T] f32, the log-probability of each target."""
        if not rows:
            return np.zeros((0, self.length), np.float32)

        shardings = dict.fromkeys(batch_contract.ARRAYS, sharding.batch_sharding(self._mesh))
        padding = batch_contract.empty_row(self.length)
        outputs = []
        for batch in evaluation_batches(rows, self.batch_size, shardings, padding):
            self.check_stop()
            outputs.append(self._token_logprobs(params, batch))

        # Fetched only now: the devices don't wait for the host between batches.
        logprobs = np.concatenate([np.asarray(output) for output in outputs])
        return logprobs[: len(rows)]

    def tree_logprobs(self, params, trees: Sequence[Tree]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each tree, in order: [Q] f32, the log-probability of each query's target, and [Q]
        bool, whether no other token is likelier.
        """
        return self._run_on_trees(self._tree_logprobs, params, trees)

    def states(self, params, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """[prompts, D] f32, the state that the head sees after each prompt."""
        # A tree with a single query, whose target doesn't matter.
        trees = [build_tree(prompt, [[0]]) for prompt in prompts]
        states = self._run_on_trees(self._tree_states, params, trees)
        return np.concatenate(states)

    def head_rows(self, params, ids: Sequence[int]) -> np.ndarray:
        """[ids, D] f32, what the head multiplies a state with for each id."""
        return np.asarray(self._head_rows(params, np.asarray(ids, np.int32)))

    def _run_on_trees(self, function: Callable, params, trees: Sequence[Tree]) -> list:
        """What a compiled function of trees returns for the queries of each tree, in the trees'
        order. Trees that begin alike share a row of the batch.
        """
        results: list = [None] * len(trees)
        running = None  # the rows and the output of the batch before
        for rows, shape in self._tree_batches(merge_trees(trees, self.length)):
            self.check_stop()
            arrays = _pack([row.tree for row in rows], shape)
            output = function(params, *jax.tree.map(self._put_rows, arrays))

            # Read one batch late: the device works on this one meanwhile.
            if running is not None:
                _split_by_tree(*running, results)
            running = rows, output

        if running is not None:
            _split_by_tree(*running, results)
        return results

    def _tree_batches(
        self, rows: Sequence[MergedTree]
    ) -> Iterator[tuple[Sequence[MergedTree], "_TreeBatchShape"]]:
        """Yields rows that go through the model together, and the shape of their batch.

        A batch holds rows of about the same length, and about as many tokens as one of
        `token_logprobs`. There are only a few shapes, so that little is padding and few programs
        are compiled.
        """
        rows_by_length = collections.defaultdict(list)
        for row in rows:
            rows_by_length[_padded_size(len(row.tree.tokens))].append(row)

        num_parts = sharding.batch_parts(self._mesh)
        # What needs most memory comes first.
        for length, group in sorted(rows_by_length.items(), reverse=True):
            # Batches of the same length are as equal as they can be, each a multiple of the parts
            # that the mesh splits a batch into.
            most_rows = max(self.batch_size * self.length // length, 1)
            num_batches = _divide_up(len(group), most_rows)
            num_rows = _divide_up(_divide_up(len(group), num_batches), num_parts) * num_parts

            most_parents = max(len(np.unique(row.tree.query_parents)) for row in group)
            most_queries = max(len(row.tree.query_targets) for row in group)
            shape = _TreeBatchShape(
                rows=num_rows,
                length=length,
                parents=_padded_size(most_parents, 1),
                queries=_padded_size(most_queries, 1),
            )
            for start in range(0, len(group), num_rows):
                yield group[start : start + num_rows], shape

    def _put_rows(self, x: np.ndarray) -> jax.Array:
        """A host array [B, ...] on the mesh, its rows distributed."""
        layout = jax.sharding.NamedSharding(self._mesh, sharding.spec(("batch", None), self._mesh))
        return jax.make_array_from_callback(x.shape, layout, x.__getitem__)


class _TreeBatchShape(NamedTuple):
    rows: int
    length: int  # tokens of a row
    parents: int  # tokens of a row after which something is asked for
    queries: int  # of a row


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _padded_size(size: int, least: int = 32) -> int:
    """The next of the sizes that are compiled: eight to each doubling, none below `least`."""
    power_of_two = 1 << (size - 1).bit_length()  # the one at or above `size`
    step = max(power_of_two // 16, least // 8, 1)
    return max(_divide_up(size, step) * step, least)


def _pack(
    trees: Sequence[Tree], shape: _TreeBatchShape
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Trees as the arguments of `lm.step.make_tree_logprobs` behind `params`, one tree a row.

    Returns:
      The batch; parents_BP, the indices of the tokens in each row after which something is asked
      for; parent_of_BQ, the column of parents_BP that each query is about. All are filled up with
      zeros.
    """
    by_token = (shape.rows, shape.length)
    by_query = (shape.rows, shape.queries)
    batch = {
        "tokens": np.zeros(by_token, np.int32),
        "positions": np.zeros(by_token, np.int32),
        "segments": np.zeros(by_token, np.int32),
        "until": np.zeros(by_token, np.int32),
        "targets": np.zeros(by_query, np.int32),
    }
    parents_BP = np.zeros((shape.rows, shape.parents), np.int32)
    parent_of_BQ = np.zeros(by_query, np.int32)

    for row, tree in enumerate(trees):
        num_tokens = len(tree.tokens)
        batch["tokens"][row, :num_tokens] = tree.tokens
        batch["positions"][row, :num_tokens] = tree.positions
        batch["segments"][row, :num_tokens] = 1  # 0 is padding
        batch["until"][row, :num_tokens] = tree.until

        # Queries with the same parent share its logits, which are computed once.
        parents, parent_of = np.unique(tree.query_parents, return_inverse=True)
        parents_BP[row, : len(parents)] = parents
        parent_of_BQ[row, : len(parent_of)] = parent_of
        batch["targets"][row, : len(parent_of)] = tree.query_targets
    return batch, parents_BP, parent_of_BQ


def _split_by_tree(rows: Sequence[MergedTree], output, results: list) -> None:
    """Puts the part of a batch's output that is each tree's into `results`.

    Args:
      output: arrays [B, Q, ...].
      results: one entry for each tree, by its number.
    """
    arrays = jax.device_get(output)
    for row_number, row in enumerate(rows):
        for tree_number, queries in row.members:
            results[tree_number] = _select(arrays, row_number, queries)


def _select(arrays, row: int, queries: slice):
    """The queries of one row of each array [B, Q, ...]."""
    return jax.tree.map(lambda x: x[row, queries], arrays)
