"""How an encoder-decoder answers: the encoder reads the prompt, and all continuations are one tree
of the decoder.

`Question.fill` says in which of two forms it is asked:

  ltr: the answer form. The prompt is a source, and a continuation is the beginning of its target.
  infill: as T5 was trained before it was tuned (Raffel et al. 2020, arXiv 1910.10683, section
    3.1.4). A sentinel stands behind the prompt, with the text after it, and a continuation is what
    the decoder says behind the same sentinel.

Nothing ends a continuation unless it has an end of its own, such as a terminator. So its
probability is that of all targets that begin with it, whatever its length.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from lm.evals.asked_rows import run_rows
from lm.evals.masked_answers import text_after
from lm.evals.predict import Answer, Limits, Prompt, Question, compiled
from lm.evals.tree import MergedTree, alone, build_tree


class SourceAnswers:
    """`logprobs`, `infill` and `states` of `lm.evals.predict.CompiledFns`.

    Args:
      tree_logprobs: see `lm.step.make_tree_logprobs`.
      tree_states: see `lm.step.make_tree_states`.
      before: ids that begin every text, of targets too.
      end: ids that end every source.
      sentinels: the tokenizer's first one, or none.
      branches: whether the decoder reads rows in which sequences branch; else each continuation is
        a row of its own.
    """

    def __init__(
        self,
        mesh: Mesh,
        tree_logprobs: Callable,
        tree_states: Callable,
        *,
        before: Sequence[int],
        end: Sequence[int],
        sentinels: Sequence[int],
        branches: bool = True,
    ):
        self._mesh = mesh
        self._tree_logprobs = compiled(tree_logprobs, mesh)
        self._tree_states = compiled(tree_states, mesh)
        self._before, self._end = list(before), list(end)
        self._sentinels = list(sentinels)
        self._branches = branches

    def logprobs(self, params, questions: Sequence[Question], limits: Limits) -> list[list[Answer]]:
        """For each question, in order, the answer to each of its continuations.

        Raises:
          ValueError: another form than the two, text behind an answer, or no sentinel to fill in.
        """
        rows = []
        question_of_row = []
        for number, question in enumerate(questions):
            whole = [question.continuations]
            for words in whole if self._branches else [[ids] for ids in question.continuations]:
                rows.append(self._row(question.prompt, words, question.fill, len(rows)))
                question_of_row.append(number)

        outputs = run_rows(self._mesh, self._tree_logprobs, params, rows, len(rows), limits)
        answers: list[list[Answer]] = [[] for _ in questions]
        for number, row, (logprobs, is_best) in zip(question_of_row, rows, outputs):
            for queries in row.tree.continuation_queries:
                answers[number].append(Answer(logprobs[queries], is_best[queries]))
        return answers

    def states(
        self, params, prompts: Sequence[Prompt], limits: Limits, fill: str = "ltr"
    ) -> np.ndarray:
        """[prompts, D] f32, the state that the head sees where an answer to each prompt begins, or
        what stands at its sentinel.
        """
        # A tree with a single query, whose target doesn't matter.
        rows = [self._row(prompt, [[0]], fill, number) for number, prompt in enumerate(prompts)]
        outputs = run_rows(self._mesh, self._tree_states, params, rows, len(rows), limits)
        return np.concatenate(outputs)

    def _row(
        self, prompt: Prompt, continuations: Sequence[Sequence[int]], fill: str, number: int
    ) -> MergedTree:
        ids, after = list(map(int, prompt.ids)), text_after(prompt)
        # lm_eval's prompts have it already. Documents of a tokenizer without BOS begin with it.
        if self._end and ids[-len(self._end) :] == self._end:
            del ids[-len(self._end) :]
        if not self._before and ids[: len(self._end)] == self._end:
            del ids[: len(self._end)]
        # What stands first doesn't matter: the decoder reads its own token there.
        if fill == "ltr" and not after:
            begun = [0, *self._before]
        elif fill == "ltr":
            raise ValueError(
                "an answer has no text behind it (verbalizer.after); wanted verbalizer.fill = "
                "'infill', which asks an encoder-decoder for what stands before it"
            )
        elif fill == "infill" and self._sentinels:
            ids += self._sentinels
            begun = [0, *self._sentinels]
        elif fill == "infill":
            raise ValueError(
                "fill = 'infill' needs a tokenizer with sentinels, such as T5's, or "
                "config.tokenizer.reserve = 'sentinels:100'"
            )
        else:
            raise ValueError(f"fill = {fill!r}; valid of an encoder-decoder: ['ltr', 'infill']")

        tree = build_tree(begun, continuations)
        return alone(tree, number)._replace(source=[*ids, *after, *self._end])
