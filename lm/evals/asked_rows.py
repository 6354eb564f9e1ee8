"""Rows in which something is asked: they go through the model in batches of a few shapes.

Letters in shapes: B rows, T tokens of a row, S of its source, P places where something is asked, Q
queries.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lm import sharding
from lm.data import batch as batch_contract
from lm.evals.predict import Limits
from lm.evals.tree import MergedTree


def run_rows(
    mesh: Mesh,
    function: Callable,
    params,
    rows: Sequence[MergedTree],
    num_results: int,
    limits: Limits,
) -> list:
    """What a compiled function of rows returns for the queries of each of their members.

    Args:
      function: see `lm.step.make_tree_logprobs`.
      num_results: number of the members of all rows.
    """
    layout = jax.sharding.NamedSharding(mesh, sharding.spec(("batch", None), mesh))

    def put_rows(x: np.ndarray) -> jax.Array:
        """A host array [B, ...] on the mesh, its rows distributed."""
        return jax.make_array_from_callback(x.shape, layout, x.__getitem__)

    results: list = [None] * num_results
    running = None  # the rows and the output of the batch before
    for batch_rows, shape in _batches(rows, limits, mesh):
        limits.check_stop()
        arrays = _pack(batch_rows, shape)
        output = function(params, *jax.tree.map(put_rows, arrays))

        # Read one batch late: the device works on this one meanwhile.
        if running is not None:
            _split_by_tree(*running, results)
        running = batch_rows, output

    if running is not None:
        _split_by_tree(*running, results)
    return results


def _batches(
    rows: Sequence[MergedTree], limits: Limits, mesh: Mesh
) -> Iterator[tuple[Sequence[MergedTree], "_BatchShape"]]:
    """Yields rows that go through the model together, and the shape of their batch.

    A batch holds rows of about the same length, and about as many tokens as one of whole rows.
    There are only a few shapes, so that little is padding and few programs are compiled.
    """
    rows_by_length = collections.defaultdict(list)
    for row in rows:
        source = _padded_size(len(row.source)) if len(row.source) else 0
        rows_by_length[_padded_size(len(row.tree.tokens)), source].append(row)

    num_parts = sharding.batch_parts(mesh)
    # What needs most memory comes first.
    for (length, source), group in sorted(rows_by_length.items(), reverse=True):
        # Batches of the same length are as equal as they can be, each a multiple of the parts
        # that the mesh splits a batch into.
        most_rows = max(limits.batch_size * limits.length // max(length, source), 1)
        num_batches = _divide_up(len(group), most_rows)
        num_rows = _divide_up(_divide_up(len(group), num_batches), num_parts) * num_parts

        most_parents = max(len(np.unique(row.tree.query_parents)) for row in group)
        most_queries = max(len(row.tree.query_targets) for row in group)
        shape = _BatchShape(
            rows=num_rows,
            length=length,
            source=source,
            parents=_padded_size(most_parents, 1),
            queries=_padded_size(most_queries, 1),
        )
        for start in range(0, len(group), num_rows):
            yield group[start : start + num_rows], shape


class _BatchShape(NamedTuple):
    rows: int
    length: int  # tokens of a row
    source: int  # tokens of its source; 0: there is none
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
    rows: Sequence[MergedTree], shape: _BatchShape
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Rows as the arguments of `lm.step.make_tree_logprobs` behind `params`.

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

    if shape.source:
        by_place = (shape.rows, shape.source)
        for name in batch_contract.SOURCE_NAMES:
            batch[name] = np.zeros(by_place, np.int32)

    for row, (tree, _, source) in enumerate(rows):
        if shape.source:
            batch["source"][row, : len(source)] = source
            batch["source_positions"][row, : len(source)] = np.arange(len(source))
            batch["source_segments"][row, : len(source)] = 1
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
