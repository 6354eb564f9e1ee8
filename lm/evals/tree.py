"""A prompt and its continuations in one row of tokens. The prompt is computed once, however many
continuations there are, and so is whatever the continuations share.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of ids that two sequences have in common at their beginning."""
    length = 0
    for a, b in zip(first, second):
        if a != b:
            break
        length += 1
    return length


class Tree(NamedTuple):
    """Tokens whose common root is a prompt and whose branches are its continuations.

    A token attends to those above it: the prompt, and its own continuation so far. A query asks for
    the log-probability of one token of a continuation, given all that stands before it. A token
    that is last in every continuation that has it is only asked for: it is no token of the row.
    """

    tokens: np.ndarray  # [T] int32: the prompt, then the branches, depth first
    positions: np.ndarray  # [T] int32: in the prompt with the token's own continuation
    until: np.ndarray  # [T] int32: token k is attended to by the tokens k to until[k] - 1
    query_parents: np.ndarray  # [Q] int32: the index in `tokens` of what stands before the target
    query_targets: np.ndarray  # [Q] int32: the id whose log-probability is asked for
    continuation_queries: list[list[int]]  # for each continuation, the queries of its tokens

    @property
    def prompt(self) -> list[int]:
        """The prompt's ids. The first query comes right after them."""
        return self.tokens[: self.query_parents.min() + 1].tolist()


def build_tree(prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> Tree:
    """The tree of a prompt and its continuations, all of them token ids and none empty.
    Continuations that begin alike share a branch.
    """
    assert len(prompt) and all(map(len, continuations))
    branches = _build_branches(tuple(map(tuple, continuations)))
    length = len(prompt)

    # The branches stand behind the prompt, all of which is above them.
    total = length + len(branches.tokens)
    return Tree(
        tokens=_concatenate([prompt, branches.tokens]),
        positions=_concatenate([np.arange(length), branches.positions + length]),
        until=_concatenate([np.full(length, total), branches.until + length]),
        query_parents=branches.query_parents + length,
        query_targets=branches.query_targets,
        continuation_queries=branches.continuation_queries,
    )


@dataclasses.dataclass
class _Node:
    """A token of the continuation that is being added to a tree."""

    token: int
    query: int  # the query that asks for it
    index: int | None = None  # in the row; None while no token comes after it


# The label words are the same tokens after most prompts.
@functools.lru_cache(maxsize=64)
def _build_branches(continuations: tuple[tuple[int, ...], ...]) -> Tree:
    """The tree of continuations without a prompt: places and positions count from the prompt's end,
    and -1 is its last token.
    """
    tokens: list[int] = []
    positions: list[int] = []
    until: list[int] = []
    query_parents: list[int] = []
    query_targets: list[int] = []
    continuation_queries: list[list[int]] = [[] for _ in continuations]
    path: list[_Node] = []  # from below the prompt to the last token that was added

    # In sorted order the tree is walked depth first, so that a subtree is a contiguous part of the
    # row and `until` can describe it. A beginning comes before what it begins.
    for number in sorted(range(len(continuations)), key=continuations.__getitem__):
        ids = continuations[number]
        shared = common_length(ids, [node.token for node in path])
        _end_subtrees(path[shared:], until, len(tokens))
        del path[shared:]

        for token in ids[shared:]:
            # Only now that a token follows it does the one before have to be read.
            parent_index = _put_last_into_row(path, tokens, positions, until)
            path.append(_Node(token, query=len(query_targets)))
            query_parents.append(parent_index)
            query_targets.append(token)

        continuation_queries[number] = [node.query for node in path]

    _end_subtrees(path, until, len(tokens))
    return Tree(
        tokens=np.asarray(tokens, np.int32),
        positions=np.asarray(positions, np.int32),
        until=np.asarray(until, np.int32),
        query_parents=np.asarray(query_parents, np.int32),
        query_targets=np.asarray(query_targets, np.int32),
        continuation_queries=continuation_queries,
    )


def _put_last_into_row(
    path: Sequence[_Node], tokens: list[int], positions: list[int], until: list[int]
) -> int:
    """Puts the last node of a path into the row, if it is not there yet.

    Returns:
      Its index; for an empty path -1, that of the prompt's last token.
    """
    if not path:
        return -1

    node = path[-1]
    if node.index is None:
        node.index = len(tokens)
        tokens.append(node.token)
        positions.append(len(path) - 1)
        until.append(0)
    return node.index


def _end_subtrees(nodes: Sequence[_Node], until: list[int], end: int) -> None:
    """Notes in `until` that nothing more will grow below these nodes."""
    for node in nodes:
        if node.index is not None:
            until[node.index] = end


class MergedTree(NamedTuple):
    """Trees that begin alike, as one."""

    # of several trees: its `continuation_queries` are empty, look in the members'
    tree: Tree
    members: list[tuple[int, slice]]  # (number of a tree, its queries among the merged tree's)
    source: Sequence[int] = ()  # ids that an encoder reads


def alone(tree: Tree, number: int) -> MergedTree:
    """The tree of this number as a row of its own."""
    return MergedTree(tree, [(number, slice(0, len(tree.query_targets)))])


def merge_trees(trees: Sequence[Tree], max_tokens: int, min_shared: int = 32) -> list[MergedTree]:
    """Puts trees whose prompts begin alike into one row (the same examples before each question,
    for instance), so that their common beginning is computed once. Each tree's log-probabilities
    stay what they are.

    Args:
      max_tokens: tokens of a row. A tree that is longer by itself stays alone.
      min_shared: tokens that the prompts of a row must share. Half of each prompt must be shared
        too.
    """
    prompts = [tree.prompt for tree in trees]
    merged: list[MergedTree] = []
    group: list[int] = []  # the trees of the row that is being filled
    shared = 0  # tokens that their prompts have in common

    # In sorted order, prompts that begin alike are neighbours.
    for number in sorted(range(len(trees)), key=prompts.__getitem__):
        common = 0
        if group:
            common = common_length(prompts[group[0]][:shared], prompts[number])
            candidates = [*group, number]
            merged_length = common + sum(len(trees[n].tokens) - common for n in candidates)
            longest_prompt = max(len(prompts[n]) for n in candidates)
            if common < min_shared or 2 * common < longest_prompt or merged_length > max_tokens:
                merged.append(_merge(trees, group, shared))
                group = []

        shared = common if group else len(prompts[number])
        group.append(number)

    if group:
        merged.append(_merge(trees, group, shared))
    return merged


def _merge(trees: Sequence[Tree], group: Sequence[int], shared: int) -> MergedTree:
    """One tree of those in `group`, whose first `shared` tokens are the same."""
    first = trees[group[0]]
    if len(group) == 1:
        return alone(first, group[0])

    tokens = [first.tokens[:shared]]
    positions = [first.positions[:shared]]
    branches_until = []
    query_parents = []
    query_targets = []
    members = []
    length = shared  # of the row so far
    num_queries = 0

    for number in group:
        tree = trees[number]
        offset = length - shared  # by which this tree's own tokens move to the right
        tokens.append(tree.tokens[shared:])
        positions.append(tree.positions[shared:])
        branches_until.append(tree.until[shared:] + offset)

        parents = tree.query_parents
        query_parents.append(np.where(parents < shared, parents, parents + offset))
        query_targets.append(tree.query_targets)
        members.append((number, slice(num_queries, num_queries + len(tree.query_targets))))

        length += len(tree.tokens) - shared
        num_queries += len(tree.query_targets)

    # All of the row descends from the shared beginning.
    until = [np.full(shared, length), *branches_until]
    tree = Tree(
        tokens=_concatenate(tokens),
        positions=_concatenate(positions),
        until=_concatenate(until),
        query_parents=_concatenate(query_parents),
        query_targets=_concatenate(query_targets),
        continuation_queries=[],
    )
    return MergedTree(tree, members)


def _concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int32)
