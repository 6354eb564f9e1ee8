"""Likelihood evals. With several choices: which continuation the model finds most likely (multiple
choice, minimal pairs). With a single one: whether the model would say it (last words).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.data import records as records_lib
from lm.data.pack import Encoder
from lm.evals import prompt_format, prompts
from lm.evals.answer_column import AnswerColumn
from lm.evals.predict import (
    Answer,
    Artifact,
    PredictFns,
    Prompt,
    Question,
    ShownPrompt,
    predictions_artifact,
)
from lm.evals.scores import calibration, statistics
from lm.evals.verbalizer import BOUNDARIES, tokenize_words_after


@dataclasses.dataclass(frozen=True)
class QuestionFormat:
    """How a record is read as a question with choices.

    Attributes:
      eval_name: the key in config.evals, for messages.
      prompt: what stands before the choices.
      choices: templates of the choices; one whose column is a list gives several choices.
      answer: the column of the right choice, or its number where it is always the same.
    """

    eval_name: str
    prompt: prompts.Template
    choices: Sequence[prompts.Template]
    answer: AnswerColumn | int

    def options(self, record: Mapping) -> list[str]:
        """The texts of all choices."""
        options = []
        for template in self.choices:
            options.extend(template.each(record))
        return options

    def gold(self, record: Mapping) -> int:
        """The index of the right choice.

        Raises:
          ValueError: no such column, or a value that is none of the choices.
        """
        if isinstance(self.answer, AnswerColumn):
            return self.answer.index(record)
        num_options = len(self.options(record))
        if self.answer >= num_options:
            raise ValueError(
                f"config.evals.{self.eval_name}.answer = '{self.answer}'; a record's choices are "
                f"{list(range(num_options))}"
            )
        return self.answer

    def example(self, record: Mapping) -> tuple[str, str]:
        """The question of a record, and the right choice."""
        return self.prompt(record), self.options(record)[self.gold(record)]

    def identity(self, record: Mapping) -> tuple:
        """All that is shown of a record, see `prompts.Template.identity`."""
        return tuple(template.identity(record) for template in (self.prompt, *self.choices))


class _Scores(NamedTuple):
    """What the model gives each of n examples."""

    logprobs: list[np.ndarray]  # for each example [options], of the whole choice, in nats
    nll: np.ndarray  # [n], minus that of the right choice
    greedy: np.ndarray  # [n] bool: greedy decoding would say the right choice
    # how the log-probabilities are normalised ("none", "token", ...) -> [n], what the prediction
    # gets: 1 right, 0 wrong, a share of 1 where choices tie
    credit: dict[str, np.ndarray]


class MultipleChoice:
    """Scores each choice by its log-probability after the prompt.

    Where records have several choices, yields accuracy of the most likely one with its Wilson 95%
    interval; accuracy_token, _char and _byte, by log-probability per token, character or byte of
    the choice; with a premise accuracy_pmi, by how much more likely a choice is after the prompt
    than after the premise (Holtzman et al. 2021, arXiv 2104.08315); and chance. A right choice that
    ties with others counts as a share of 1.

    Where records have one choice, yields accuracy: the share that greedy decoding would say.

    In both cases yields, for the right choices: nll, perplexity (per choice, not per token),
    bits_per_byte and greedy_accuracy; and examples, and cut: the number of prompts that lost their
    beginning, but for BOS. As a file, predictions/: each example's choices with their
    log-probabilities.

    Args:
      name: names the artifacts.
      source, max_documents: see `lm.evals.classification.PromptClassification`.
      prompt: template, shots, sampler ("balanced": over the answers' numbers), seed, separator;
        format, system: see `lm.evals.prompt_format`.
      choices, answer: see `QuestionFormat`. A choice includes the space before it.
      answers: templates of the choices' names, of which the column `answer` holds one, such as
        ("{choices[label]}",), or ("1", "2"); (): it holds numbers from 0.
      premise: text that the choices are also scored after; "": none.
      boundary: see `verbalizer.tokenize_words_after`.

    Raises:
      ValueError: no such data, column or choice; see `verbalizer.tokenize_words_after`.
    """

    asks = ("logprobs",)

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        encoder: Encoder,
        source: Mapping,
        prompt: Mapping,
        choices: Sequence[str],
        answer: str,
        answers: Sequence[str],
        premise: str,
        boundary: str,
        max_documents: int,
    ):
        prompts.check_choice(name, "boundary", boundary, BOUNDARIES)
        prompts.check_least(f"config.evals.{name}.prompt.shots", prompt["shots"], 0)
        prompts.check_least(f"config.evals.{name}.max_documents", max_documents, 0)
        question_format = make_question_format(name, prompt["template"], choices, answer, answers)

        self._name = name
        self._predict_fns = predict_fns
        self._tokenizer = encoder.tokenizer
        self._boundary = boundary
        self._format = prompt_format.make(self._tokenizer, prompt, name, is_scored=True)

        split = source["split"]
        available = prompts.load(source, split, name)
        self._example_names, records = prompts.evaluated(available, split, max_documents)
        _check_premise(name, premise, records[0])

        # The examples before the question are the same for all records.
        pool = prompts.load_shots(source, name) if prompt["shots"] else []
        if isinstance(question_format.answer, AnswerColumn):
            question_format.answer.settle(records, available, pool)
        shots = _draw_shots(name, question_format, pool, prompt, records)
        examples = [question_format.example(shot.record) for shot in shots]
        asked = prompts.describe(
            question_format.prompt, shots, source["shots_split"], self._format.around(examples)
        )

        self._options: list[list[str]] = []
        self._gold: list[int] = []  # indices of the right options
        for record in records:
            self._options.append(list(map(self._format.answer, question_format.options(record))))
            self._gold.append(question_format.gold(record))
        # Both sorts of records have metrics of their own, see above.
        if len({len(options) > 1 for options in self._options}) > 1:
            raise ValueError(f"the eval {name!r}: some records have one choice, others several")
        self._has_choice = len(self._options[0]) > 1

        self._questions: list[Question] = []
        self._premise_questions: list[Question] = []
        self._texts = list(map(question_format.prompt, records))
        self._num_cut: list[int] = []  # tokens that each prompt lost
        for text, options in zip(self._format.wrap(examples, self._texts), self._options):
            question, num_cut = self._tokenize(text, options)
            self._questions.append(question)
            self._num_cut.append(num_cut)

        for premise_text in self._format.wrap([], [premise]) if premise else []:
            self._premise_questions += [self._tokenize(premise_text, o)[0] for o in self._options]

        self.about = {
            "fingerprint": records_lib.fingerprint(records),
            "examples": len(records),
            "citation": source["citation"],
            "format": prompt["format"],
            "prompts": [asked],
        }

    def _tokenize(self, text: str, options: Sequence[str]) -> tuple[Question, int]:
        """(a prompt and its choices as ids, how many tokens the prompt lost)."""
        prompt_ids, option_ids = tokenize_words_after(
            self._format.encode_batch, text, options, self._boundary
        )
        start, prompt_ids = self._format.split(prompt_ids)
        prompt_ids, num_cut = prompts.truncate_prompt(
            start,
            prompt_ids,
            max(map(len, option_ids)),
            self._predict_fns.prompt_length,
            self._name,
        )
        return Question(Prompt(np.asarray(prompt_ids, np.int32)), option_ids), num_cut

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        scores = self._score(params)
        yield from self._accuracies(scores)
        yield from self._likelihoods(scores.nll)
        yield "greedy_accuracy", float(scores.greedy.mean())
        yield "examples", len(self._questions)
        yield "cut", int(np.count_nonzero(self._num_cut))

        lines = [self._prediction(i, scores) for i in range(len(self._questions))]
        yield "predictions", predictions_artifact(self._name, lines)

    def shown_prompts(self, count: int) -> Iterator[ShownPrompt]:
        for i, question in enumerate(self._questions[:count]):
            ids = question.prompt.ids.tolist()
            title = f"{self._example_names[i]}, {len(ids)} tokens, {self._num_cut[i]} cut off"
            yield ShownPrompt(title, self._tokenizer.spell(ids), self._options[i][self._gold[i]])

    def _score(self, params) -> _Scores:
        """Runs the model.

        Raises:
          ValueError: log-probabilities that aren't finite.
        """
        # One call, so that what prompts and premises share can be computed once.
        questions = self._questions + self._premise_questions
        answers = self._predict_fns.logprobs(params, questions)
        logprobs = list(map(_option_logprobs, answers))
        if not all(np.isfinite(options).all() for options in logprobs):
            raise ValueError(
                f"the eval {self._name!r}: the model's log-probabilities are not finite; its "
                "weights or activations are broken"
            )
        after_prompt = logprobs[: len(self._questions)]
        after_premise = logprobs[len(self._questions) :]

        # The right choices: their likelihood, and whether greedy decoding would say them.
        nll = []
        greedy = []
        for i, y in enumerate(self._gold):
            nll.append(-after_prompt[i][y])
            greedy.append(answers[i][y].is_best.all())

        # The predictions: what each way to compare choices of different lengths gets right.
        credit = {}
        for norm, option_scores in self._normalised(after_prompt).items():
            credit[norm] = _credit(option_scores, self._gold)
        if after_premise:
            pmi = [conditional - prior for conditional, prior in zip(after_prompt, after_premise)]
            credit["pmi"] = _credit(pmi, self._gold)
        return _Scores(after_prompt, np.array(nll), np.array(greedy), credit)

    def _normalised(self, logprobs: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """The log-probabilities of choices, and those divided by the choices' lengths."""
        scores: dict[str, list[np.ndarray]] = {"none": [], "token": [], "char": [], "byte": []}
        for question, options, values in zip(self._questions, self._options, logprobs):
            # The space before a choice doesn't count, unless the choice is nothing else.
            texts = [option.lstrip() or option for option in options]
            num_bytes = [len(text.encode()) for text in texts]
            scores["none"].append(values)
            scores["token"].append(values / list(map(len, question.continuations)))
            scores["char"].append(values / list(map(len, texts)))
            scores["byte"].append(values / num_bytes)
        return scores

    @property
    def metrics(self) -> tuple[str, ...]:
        names = ("accuracy", "nll", "perplexity", "bits_per_byte", "greedy_accuracy")
        if not self._has_choice:
            return names
        names += ("accuracy_token", "accuracy_char", "accuracy_byte")
        return (*names, "accuracy_pmi") if self._premise_questions else names

    def _accuracies(self, scores: _Scores) -> Iterator[tuple[str, float]]:
        n = len(self._questions)
        credit = scores.credit["none"] if self._has_choice else scores.greedy
        low, high = statistics.proportion_interval(round(credit.sum()), n)
        yield "accuracy", float(credit.mean())
        yield "accuracy_low", low
        yield "accuracy_high", high

        # With a single choice these would all be 1.
        if self._has_choice:
            for norm, credit in scores.credit.items():
                if norm != "none":
                    yield f"accuracy_{norm}", float(credit.mean())
            yield "chance", float(np.mean([1 / len(options) for options in self._options]))

    def _likelihoods(self, nll: np.ndarray) -> Iterator[tuple[str, float]]:
        """Figures of the right choices' negative log-likelihoods [n], in nats."""
        num_bytes = 0
        for options, y in zip(self._options, self._gold):
            num_bytes += len(options[y].encode())

        yield "nll", float(nll.mean())
        yield "perplexity", statistics.exp(nll.mean())
        yield "bits_per_byte", float(nll.sum() / np.log(2) / num_bytes)

    def _prediction(self, i: int, scores: _Scores) -> dict:
        """The line of predictions/ for example i."""
        logprobs = scores.logprobs[i]
        line: dict = {"name": self._example_names[i], "label": str(self._gold[i])}
        example_scores = {}

        if self._has_choice:
            probs = calibration.softmax(logprobs[None])[0]
            line["prediction"] = str(logprobs.argmax())
            line["distribution"] = {str(k): float(p) for k, p in enumerate(probs)}
            for norm, credit in scores.credit.items():
                if norm != "none":
                    example_scores[f"accuracy_{norm}"] = float(credit[i])
        else:
            # What greedy decoding would say instead is not known.
            line["prediction"] = line["label"] if scores.greedy[i] else ""
        example_scores["nll_of_right"] = float(scores.nll[i])

        line["scores"] = example_scores
        line["choices"] = self._options[i]
        line["logprobs"] = logprobs.tolist()
        line["greedy"] = bool(scores.greedy[i])
        line["prompt"] = self._texts[i]
        line["cut"] = self._num_cut[i]
        return line


def make_question_format(
    name: str, prompt: str, choices: Sequence[str], answer: str, answers: Sequence[str]
) -> QuestionFormat:
    """Returns how config.evals.NAME reads its records.

    Raises:
      ValueError: a text that is no template, no choices, or no column in prompt and choices.
    """
    key = f"config.evals.{name}"
    if not choices:
        raise ValueError(f"{key}.choices is empty; wanted the templates of the continuations")
    choice_templates = [prompts.Template(text, f"{key}.choices") for text in choices]
    prompt_template = prompts.Template(prompt, f"{key}.prompt.template")
    # Either may do without columns: "yes" and "no" after a question, whole texts after nothing.
    if not any(template.fields for template in choice_templates):
        prompt_template.check_has_column()
    if answer.isdecimal():
        return QuestionFormat(name, prompt_template, choice_templates, int(answer))

    name_templates = [prompts.Template(text, f"{key}.answers") for text in answers]

    def size(record: Mapping) -> int:
        return sum(len(template.each(record)) for template in choice_templates)

    def names(record: Mapping) -> list[str]:
        names = []
        for template in name_templates:
            names.extend(template.each(record))
        if names and len(names) != size(record):
            raise ValueError(
                f"{key}.answers = {answers} gives the names {names} to {size(record)} choices"
            )
        return names

    column = AnswerColumn(name, "answer", answer, names, size)
    return QuestionFormat(name, prompt_template, choice_templates, column)


def _draw_shots(
    name: str,
    question_format: QuestionFormat,
    pool: Sequence[dict],
    prompt: Mapping,
    records: Sequence[dict],
) -> list[prompts.Shot]:
    """The examples before each question. None is one of `records`, which are evaluated."""
    # Where the right choice always has the same number, there is nothing to balance.
    has_column = isinstance(question_format.answer, AnswerColumn)
    return prompts.draw_shots(
        pool,
        prompt,
        prompt["seed"],
        identity=question_format.identity,
        avoid=set(map(question_format.identity, records)),
        name=name,
        label=question_format.gold if has_column else None,
        num_labels=len(question_format.options(records[0])) if has_column else 1,
    )


def _check_premise(name: str, premise: str, record: Mapping) -> None:
    """Raises ValueError for a premise with a column in braces: it is no template."""
    for column in re.findall(r"{([^{}]+)}", premise):
        if column.strip() in record:
            raise ValueError(
                f"config.evals.{name}.premise = {premise!r} is the same text for all records; it "
                f"can't have the column {column!r}"
            )


def _option_logprobs(answers: Sequence[Answer]) -> np.ndarray:
    """[options] f64, the log-probability of each choice: the sum over its tokens."""
    return np.array([np.sum(answer.logprobs, dtype=np.float64) for answer in answers])


def _credit(scores: Sequence[np.ndarray], gold: Sequence[int]) -> np.ndarray:
    """[n]: `statistics.credit` of examples that differ in their number of choices."""
    credit = [statistics.prediction_shares(options)[y] for options, y in zip(scores, gold)]
    return np.array(credit)
