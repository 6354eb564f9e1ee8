"""How a masked language model answers: each token of a continuation stands behind a mask, with the
text around it.

A continuation of n tokens has n masks, so that its probability is conditional on its length.
`Question.fill` says how the masks are filled:

  ltr: from left to right: each token is asked for after those before it, with masks for those
    behind it. By the chain rule a distribution over all continuations of n tokens.
  parallel: all at once; the tokens are taken as independent. A distribution too.
  max_first: the token that is likeliest of those left comes next, as in PET (Schick and Schütze
    2021, arXiv 2009.07118, section 3.1). No distribution: the order depends on the continuation.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from lm.evals.asked_rows import run_rows
from lm.evals.predict import Answer, Limits, Prompt, Question, compiled
from lm.evals.tree import MergedTree, Tree, alone

FILLS = ("ltr", "parallel", "max_first")
AFTER = "after"  # array of a prompt: ids behind what is asked for

# place of a blank's token -> its id
Filled = Mapping[int, int]


class MaskedAnswers:
    """`logprobs`, `infill` and `states` of `lm.evals.predict.CompiledFns`.

    Args:
      tree_logprobs: see `lm.step.make_tree_logprobs`.
      tree_states: see `lm.step.make_tree_states`.
      mask_id: stands where a token is asked for.
      end: ids that end every text, [SEP].
    """

    def __init__(
        self,
        mesh: Mesh,
        tree_logprobs: Callable,
        tree_states: Callable,
        *,
        mask_id: int,
        end: Sequence[int],
    ):
        self._mesh = mesh
        self._row_logprobs = compiled(tree_logprobs, mesh)
        self._row_states = compiled(tree_states, mesh)
        self._mask_id = mask_id
        self._end = list(end)

    def logprobs(self, params, questions: Sequence[Question], limits: Limits) -> list[list[Answer]]:
        """For each question, in order, the answer to each of its continuations.

        Raises:
          ValueError: an unknown way to fill; arrays of a prompt other than `AFTER`.
        """
        blanks = []
        of_questions = []
        for question in questions:
            after = [*text_after(question.prompt), *self._end]
            numbers = []
            for ids in question.continuations:
                numbers.append(len(blanks))
                blanks.append(_Blank(question.prompt.ids, tuple(ids), after, question.fill))
            of_questions.append(numbers)

        # Each round asks for what the rounds before have made possible.
        while asked := [blank for blank in blanks if not blank.is_done()]:
            self._ask(params, asked, limits)

        answers = []
        for numbers in of_questions:
            answers.append([blanks[number].answer() for number in numbers])
        return answers

    infill = logprobs

    def states(self, params, prompts: Sequence[Prompt], limits: Limits) -> np.ndarray:
        """[prompts, D] f32, the state of a mask behind each prompt."""
        rows = []
        for number, prompt in enumerate(prompts):
            ids = [*prompt.ids, self._mask_id, *text_after(prompt), *self._end]
            rows.append(_row(number, ids, [(len(prompt.ids), 0)]))
        outputs = run_rows(self._mesh, self._row_states, params, rows, len(rows), limits)
        return np.concatenate(outputs)

    def _ask(self, params, blanks: Sequence["_Blank"], limits: Limits) -> None:
        """Gives blanks what they ask for. What several ask of the same row of tokens is asked at
        once: words that begin alike, and all of one token.
        """
        queries: dict[tuple[int, ...], dict[tuple[int, int], None]] = collections.defaultdict(dict)
        asked = []
        for blank in blanks:
            for filled, places in blank.wanted():
                tokens = blank.row(filled, self._mask_id)
                for place in places:
                    query = (blank.start + place, blank.ids[place])
                    queries[tokens][query] = None
                    asked.append((blank, filled, place, tokens, query))

        rows = []
        for number, (tokens, of_row) in enumerate(queries.items()):
            rows.append(_row(number, tokens, list(of_row)))
        outputs = run_rows(self._mesh, self._row_logprobs, params, rows, len(rows), limits)

        found = {}
        for (tokens, of_row), (logprobs, is_best) in zip(queries.items(), outputs):
            for query, logprob, best in zip(of_row, logprobs, is_best):
                found[tokens, query] = float(logprob), bool(best)
        for blank, filled, place, tokens, query in asked:
            blank.take(filled, place, *found[tokens, query])


class _Blank:
    """A continuation that is to stand in a prompt's blank."""

    def __init__(self, prompt: Sequence[int], ids: tuple[int, ...], after: list[int], fill: str):
        if fill not in FILLS:
            raise ValueError(f"fill = {fill!r}; valid of a masked model: {list(FILLS)}")
        self.ids = ids
        self.start = len(prompt)
        self._prompt, self._after, self._fill = tuple(map(int, prompt)), tuple(after), fill
        # place -> (log-probability, is_best)
        self._known: dict[int, tuple[float, bool]] = {}
        self._candidates: dict[int, tuple[float, bool]] = {}

    def is_done(self) -> bool:
        return len(self._known) == len(self.ids)

    def answer(self) -> Answer:
        places = range(len(self.ids))
        logprobs = np.array([self._known[place][0] for place in places], np.float32)
        return Answer(logprobs, np.array([self._known[place][1] for place in places], bool))

    def wanted(self) -> Iterable[tuple[Filled, Sequence[int]]]:
        """(what stands in the blank, the places asked for), for each row that is needed next."""
        places = range(len(self.ids))
        if self._fill == "ltr":
            # The beginnings are known, so all rows go at once.
            return [(dict(enumerate(self.ids[:place])), [place]) for place in places]
        if self._fill == "parallel":
            return [({}, places)]
        left = [place for place in places if place not in self._known]
        return [({place: self.ids[place] for place in self._known}, left)]

    def row(self, filled: Filled, mask_id: int) -> tuple[int, ...]:
        blank = tuple(filled.get(place, mask_id) for place in range(len(self.ids)))
        return (*self._prompt, *blank, *self._after)

    def take(self, filled: Filled, place: int, logprob: float, is_best: bool) -> None:
        """Takes what the model says of the token at a place."""
        if self._fill != "max_first":
            self._known[place] = logprob, is_best
            return

        self._candidates[place] = logprob, is_best
        if len(self._candidates) + len(filled) == len(self.ids):
            likeliest = max(self._candidates, key=self._candidates.get)
            self._known[likeliest] = self._candidates[likeliest]
            self._candidates = {}


def text_after(prompt: Prompt) -> list[int]:
    """The ids behind what is asked for. Raises ValueError for other arrays of a prompt."""
    unknown = sorted(set(prompt.arrays) - {AFTER})
    if unknown:
        raise ValueError(f"a prompt has the arrays {unknown}; this model reads {[AFTER]}")
    return list(map(int, prompt.arrays.get(AFTER, ())))


def _row(number: int, tokens: Sequence[int], queries: Sequence[tuple[int, int]]) -> MergedTree:
    """A row that is no tree: (place, id whose log-probability is asked for) of each query."""
    length = len(tokens)
    places, targets = zip(*queries)
    row = Tree(
        tokens=np.asarray(tokens, np.int32),
        positions=np.arange(length, dtype=np.int32),
        until=np.full(length, length, np.int32),
        query_parents=np.asarray(places, np.int32),
        query_targets=np.asarray(targets, np.int32),
        continuation_queries=[],
    )
    return alone(row, number)
