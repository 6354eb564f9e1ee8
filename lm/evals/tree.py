"""A prompt and its continuations in one row: the prompt is computed once, however many there are, and what they share too."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Tree(NamedTuple):
    """Each token sees those above it in the tree: the prompt, and the continuation that it is in so far. What comes last in all continuations that
    have it needn't be read, only be predicted."""
    tokens: np.ndarray  # [T] int32, the prompt, then the continuations, one behind the other
    positions: np.ndarray  # [T] int32, in the prompt with its continuation
    until: np.ndarray  # [T] int32: token k is seen by those from k up to here
    at: np.ndarray  # [Q] int32: after which token a query is
    target: np.ndarray  # [Q] int32: the id whose log-probability is asked
    paths: list[list[int]]  # of each continuation, the queries of its tokens


def grow(prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> Tree:
    """The tree of a prompt and its continuations, which are token ids and not empty. Common beginnings are one path."""
    assert len(prompt) and all(len(ids) for ids in continuations)
    tokens, positions, until = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    at: list[int] = []
    target: list[int] = []
    paths: list[list[int]] = [[] for _ in continuations]
    stem: list[tuple[int, int, int | None]] = []  # of the continuation before: (token, query, its place in the row, if it is there)

    def close(depth: int) -> None:
        for _, _, place in stem[depth:]:
            if place is not None:
                until[place] = len(tokens)
        del stem[depth:]
    for number in sorted(range(len(continuations)), key=lambda i: tuple(continuations[i])):  # depth first, a beginning before what it begins
        ids = continuations[number]
        close(sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1][0], zip(ids, stem))))
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
    until[:len(prompt)] = [len(tokens)] * len(prompt)
    return Tree(*(np.asarray(x, np.int32) for x in (tokens, positions, until, at, target)), paths)
