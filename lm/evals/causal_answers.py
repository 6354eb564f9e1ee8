"""How a causal model answers: each prompt and its continuations are a tree (lm/evals/tree.py), and
trees that begin alike share a row. Of a model that can't branch, such as a recurrent one, each
continuation is a tree of its own.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from lm.evals.asked_rows import run_rows
from lm.evals.predict import Answer, Limits, Prompt, Question, compiled
from lm.evals.tree import Tree, alone, build_tree, merge_trees


class CausalAnswers:
    """`logprobs` and `states` of `lm.evals.predict.CompiledFns`.

    Args:
      tree_logprobs: see `lm.step.make_tree_logprobs`.
      tree_states: see `lm.step.make_tree_states`.
      branches: whether the model reads rows in which sequences branch.
    """

    def __init__(
        self, mesh: Mesh, tree_logprobs: Callable, tree_states: Callable, branches: bool = True
    ):
        self._mesh = mesh
        self._branches = branches
        self._tree_logprobs = compiled(tree_logprobs, mesh)
        self._tree_states = compiled(tree_states, mesh)

    def logprobs(self, params, questions: Sequence[Question], limits: Limits) -> list[list[Answer]]:
        """For each question, in order, the answer to each of its continuations.

        Raises:
          ValueError: a prompt of more than tokens, or blanks to be filled in another order.
        """
        trees = []
        members = []  # of each question, (its tree, its continuation there)
        for question in questions:
            if question.fill != "ltr":
                raise ValueError(
                    f"fill = {question.fill!r} is for masked models; a causal one has only 'ltr'"
                )
            groups = self._groups(question.continuations)
            of_question = {}
            for numbers in groups:
                for place, number in enumerate(numbers):
                    of_question[number] = (len(trees), place)
                ids = [question.continuations[number] for number in numbers]
                trees.append(build_tree(_ids(question.prompt), ids))
            members.append([of_question[number] for number in sorted(of_question)])
        outputs = self._run(self._tree_logprobs, params, trees, limits)

        answers = []
        for of_question in members:
            answers.append([])
            for tree, place in of_question:
                queries = trees[tree].continuation_queries[place]
                logprobs, is_best = outputs[tree]
                answers[-1].append(Answer(logprobs[queries], is_best[queries]))
        return answers

    def _groups(self, continuations: Sequence[Sequence[int]]) -> list[list[int]]:
        """The numbers of the continuations that share a tree: all, or those of one token and each
        of the others.
        """
        numbers = range(len(continuations))
        if self._branches:
            return [list(numbers)]
        short = [number for number in numbers if len(continuations[number]) == 1]
        others = [[number] for number in numbers if len(continuations[number]) > 1]
        return [short, *others] if short else others

    def states(self, params, prompts: Sequence[Prompt], limits: Limits) -> np.ndarray:
        """[prompts, D] f32, the state that the head sees after each prompt.

        Raises:
          ValueError: a prompt of more than tokens.
        """
        # A tree with a single query, whose target doesn't matter.
        trees = [build_tree(_ids(prompt), [[0]]) for prompt in prompts]
        return np.concatenate(self._run(self._tree_states, params, trees, limits))

    def _run(self, function: Callable, params, trees: Sequence[Tree], limits: Limits) -> list:
        """What a compiled function says of each tree's queries. Trees that begin alike share a row
        of the batch, where the model can branch.
        """
        if self._branches:
            rows = merge_trees(trees, limits.length)
        else:
            rows = [alone(tree, number) for number, tree in enumerate(trees)]
        return run_rows(self._mesh, function, params, rows, len(trees), limits)


def _ids(prompt: Prompt) -> Sequence[int] | np.ndarray:
    """The ids of a prompt, which are all that a causal model reads."""
    if prompt.arrays:
        raise ValueError(
            f"a prompt has the arrays {sorted(prompt.arrays)}; a causal model reads only ids"
        )
    return prompt.ids
