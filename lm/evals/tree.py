"""A prompt and its continuations in one row: the prompt is computed once, however many there are,
and what they share too.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


class Tree(NamedTuple):
    """Each token sees those above it in the tree: the prompt, and the continuation that it is in so
    far. What comes last in all continuations that have it needn't be read, only be predicted.
    """

    tokens: np.ndarray  # [T] int32, the prompt, then the continuations, one behind the other
    positions: np.ndarray  # [T] int32, in the prompt with its continuation
    until: np.ndarray  # [T] int32: token k is seen by those from k up to here
    at: np.ndarray  # [Q] int32: after which token a query is
    target: np.ndarray  # [Q] int32: the id whose log-probability is asked
    paths: list[list[int]]  # of each continuation, the queries of its tokens

    @property
    def prompt(self) -> list[int]:
        """Its ids: the first query comes right after it."""
        return self.tokens[: self.at.min() + 1].tolist()


def build_tree(prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> Tree:
    """The tree of a prompt and its continuations, which are token ids and not empty. Common
    beginnings are one path.
    """
    assert len(prompt) and all(len(ids) for ids in continuations)
    tokens, positions, until = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    at: list[int] = []
    target: list[int] = []
    paths: list[list[int]] = [[] for _ in continuations]
    # of the continuation before: (token, query, its place in the row, if it is there)
    stem: list[tuple[int, int, int | None]] = []

    def close(depth: int) -> None:
        for _, _, place in stem[depth:]:
            if place is not None:
                until[place] = len(tokens)
        del stem[depth:]

    # depth first, a beginning before what it begins
    for number in sorted(range(len(continuations)), key=lambda i: tuple(continuations[i])):
        ids = continuations[number]
        close(common_length(ids, [token for token, _, _ in stem]))
        for depth in range(len(stem), len(ids)):
            above = len(prompt) - 1
            if depth:
                token, query, place = stem[-1]
                if place is None:
                    place = len(tokens)
                    tokens.append(token)
                    positions.append(len(prompt) + depth - 1)
                    until.append(0)
                    stem[-1] = token, query, place
                above = place
            stem.append((ids[depth], len(at), None))
            at.append(above)
            target.append(ids[depth])
        paths[number] = [query for _, query, _ in stem]
    close(0)
    until[: len(prompt)] = [len(tokens)] * len(prompt)
    return Tree(*(np.asarray(x, np.int32) for x in (tokens, positions, until, at, target)), paths)


class MergedTree(NamedTuple):
    """Trees that begin alike, as one."""

    tree: Tree
    members: list[tuple[int, slice]]  # (a tree's number, its queries)


def merge_trees(trees: Sequence[Tree], most: int, least: int = 32) -> list[MergedTree]:
    """Puts trees whose prompts begin with the same tokens (the same examples before a question,
    say) into one row, where that beginning is computed once. The trees' log-probabilities stay what
    they are.

    Args:
      most: tokens of a row; a longer tree stays alone.
      least: tokens that have to be shared, and half of each prompt.
    """
    prompts = [tree.prompt for tree in trees]
    found, row, shared = [], [], 0

    def finish():
        if row:
            found.append(_merge(trees, row, shared))
            row.clear()

    for number in sorted(range(len(trees)), key=prompts.__getitem__):
        common = common_length(prompts[row[0]][:shared], prompts[number]) if row else 0
        longer = common + sum(len(trees[n].tokens) - common for n in (*row, number))
        if (
            not row
            or common < least
            or any(2 * common < len(prompts[n]) for n in (*row, number))
            or longer > most
        ):
            finish()
            common = len(prompts[number])
        row.append(number)
        shared = common
    finish()
    return found


def _merge(trees: Sequence[Tree], row: Sequence[int], shared: int) -> MergedTree:
    if len(row) == 1:
        return MergedTree(trees[row[0]], [(row[0], slice(0, len(trees[row[0]].at)))])
    parts = {name: [getattr(trees[row[0]], name)[:shared]] for name in ("tokens", "positions")}
    until, at, target, members, end, queries = [np.zeros(shared, np.int32)], [], [], [], shared, 0
    for number in row:
        tree = trees[number]
        move = end - shared  # of what isn't shared
        for name, part in parts.items():
            part.append(getattr(tree, name)[shared:])
        until.append(tree.until[shared:] + move)
        at.append(np.where(tree.at < shared, tree.at, tree.at + move))
        target.append(tree.target)
        members.append((number, slice(queries, queries + len(tree.at))))
        end, queries = end + len(tree.tokens) - shared, queries + len(tree.at)
    until[0] += end
    return MergedTree(
        Tree(
            *(np.concatenate(x).astype(np.int32) for x in (*parts.values(), until, at, target)),
            paths=[],
        ),
        members,
    )
