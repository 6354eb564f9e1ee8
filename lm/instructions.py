"""Conversations made of tasks, in many wordings: a model that is tuned on them is to follow
instructions of tasks that it has never seen.

FLAN (Wei et al. 2021, arXiv 2109.01652) asks each example in one of several wordings, some of which
turn the task around, lists the options, and holds out whole clusters of tasks. OPT-IML (Iyer et al.
2022, arXiv 2212.12017) adds examples before the question, and holds out tasks of seen clusters too.

A task is an entry of `lm.evals.entries.instructed`. Answers are what its eval scores: the first
word of the label, the right choice, the target.
"""

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lm.data import conversations, labelled
from lm.data import prompts as data_prompts
from lm.data.conversations import Example
from lm.data.labelled import Labelled, LabelledTexts
from lm.data.records import evenly_spaced
from lm.data.sources import Documents
from lm.evals import choice, entries, prompts
from lm.evals.answer_column import AnswerColumn

SPLITS = ("train", "validation")
SHOTS_AS = ("turns", "text")

Record = Mapping[str, Any]
Messages = list[dict[str, str]]
# A record -> (its answer, all possible ones; [] where they are free texts).
Answerer = Callable[[Record], tuple[str, list[str]]]


@dataclasses.dataclass(frozen=True)
class Wording:
    """How questions are asked: source_args.wording.

    Attributes:
      options: share of the questions about labels or choices that list them.
      most_options: listed; of more labels the others are drawn.
      shots: examples before a question, from none to so many.
      shots_as: earlier turns of the conversation, or text before the question.
      most_chars: of a question with its examples, which are fewer where it would be longer; 0: any.
      space: whether answers keep the space before them. The chat template "plain" needs it, and
        evals of the format "text"; other templates have answers without, as the format "chat" does.
    """

    options: float = 0.5
    most_options: int = 10
    shots: int = 0
    shots_as: str = "turns"
    most_chars: int = 0
    space: bool = True


def mixture(
    split: str,
    *,
    tasks: Mapping[str, Mapping],
    held_out_clusters: str = "",
    held_out_tasks: str = "",
    rate_cap: int = 3000,
    rounds: int = 1,
    wording: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Documents:
    """Returns conversations about the tasks' examples.

    A task's share is proportional to its number of examples, up to a cap (Raffel et al. 2020, arXiv
    1910.10683, section 3.5.2): a round has min(examples, rate_cap) conversations about it. Rounds
    take further examples, all of them before one comes again in another wording.

    Args:
      split: "train", what each task's instructions.split says; "validation", what its eval reads.
      tasks: name -> entry of `lm.evals.entries.instructed`.
      held_out_clusters, held_out_tasks: names, with commas between them, of what isn't tuned on.
      rate_cap, rounds: see above.
      wording: keys of `Wording`.
      seed: decides examples, wordings and options.

    Raises:
      ValueError: unknown names, nothing that is left to tune on, a task without such a split or
        whose training split is evaluated, a template with an unknown column.
    """
    chosen = _not_held_out(tasks, _names(held_out_clusters), _names(held_out_tasks))

    how, examples = _wording(wording), []
    for task, number, (messages, _) in _mixed(split, chosen, how, rate_cap, rounds, seed):
        name = f"{task}[{number}]"
        examples.append(Example((messages,), "conversation", 0.0, None, name, source=task))
    return conversations.as_documents(examples)


def preferences(
    split: str,
    *,
    tasks: Mapping[str, Mapping],
    rate_cap: int = 3000,
    rounds: int = 1,
    wording: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Documents:
    """Returns pairs of a right and a wrong answer, by instructions.rejected. See `mixture`.

    Raises:
      ValueError: a task without wrong answers; see `mixture`.
    """
    for name, entry in tasks.items():
        if not _instructions(name, entry)["rejected"]:
            raise ValueError(f"the task {name!r} has no instructions.rejected, a wrong answer")

    how, examples = _wording(wording), []
    for task, number, sides in _mixed(split, tasks, how, rate_cap, rounds, seed):
        examples.append(Example(sides, "pair", 0.0, None, f"{task}[{number}]", source=task))
    return conversations.as_documents(examples)


def questions(
    split: str,
    *,
    tasks: Mapping[str, Mapping],
    rate_cap: int = 3000,
    rounds: int = 1,
    wording: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Documents:
    """Returns the prompts of a mixture, which a policy is to answer; a record has the right
    `answer` and the `task`. See `mixture`.
    """
    how, asked = _wording(wording), []
    for task, number, (messages, _) in _mixed(split, tasks, how, rate_cap, rounds, seed):
        *prompt, answer = messages
        record = dict(answer=answer["content"].strip(), task=task)
        asked.append(data_prompts.Asked(prompt, record, f"{task}[{number}]"))
    return data_prompts.as_documents(asked)


def labelled_texts(
    split: str, *, task: Mapping, template: int = 0, rate_cap: int = 0, seed: int = 0
) -> LabelledTexts:
    """Returns the texts of a classification task with their classes, for lm.objectives.labels: the
    same prompts that label words are asked after.

    Args:
      split: "train", what the task's instructions.split says; "validation", what its eval reads.
      task: an entry of `lm.evals.entries.instructed`.
      template: which of its templates makes the texts.
      rate_cap: of the training split so many, drawn by `seed`; 0: all.

    Raises:
      ValueError: a task that has no classes, no such template; see `mixture`.
    """
    if split not in SPLITS:
        raise ValueError(f"a task has no split {split!r} here; valid: {list(SPLITS)}")
    if "verbalizer" not in task:
        raise ValueError(f"a task of the type {task['type']} has no classes")
    templates = task["prompt"]["templates"]
    if not 0 <= template < len(templates):
        raise ValueError(
            f"config.data.source_args.template = {template}; wanted 0 to {len(templates) - 1}"
        )

    records = _records("task", task, split)
    labels = [label for label, _ in task["verbalizer"]["words"][0]]
    column = _label_column("task", task, labels, records)
    write = prompts.Template(templates[template], "config.data.source_args.task.prompt.templates")

    numbers = range(len(records))
    if split == "train" and 0 < rate_cap < len(records):
        numbers = random.Random(seed).sample(numbers, rate_cap)
    name = (
        task["source"]["split"] if split == "validation" else _instructions("task", task)["split"]
    )
    items = []
    for number in numbers:
        record = records[number]
        value = float(column.index(record))
        items.append(Labelled((write(record),), (value,), f"{name}[{number}]"))
    return labelled.as_documents(items, "class", labels)


def forms(name: str, entry: Mapping, max_records: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yields (number, texts) of the records that a task evaluates: each in all forms that it is
    asked in, with each of its answers, and its own texts, without any wording.

    Args:
      entry: of `lm.evals.entries.task` or `instructed`.
      max_records: evenly out of them; 0: all.

    Raises:
      ValueError: see `mixture`.
    """
    entry = {"instructions": entries.INSTRUCTIONS, **entry}
    task = _Task(name, entry, "validation", Wording())
    for number in evenly_spaced(len(task.records), max_records):
        yield number, task.forms(task.records[number])


def _mixed(
    split: str, tasks: Mapping, how: Wording, rate_cap: int, rounds: int, seed: int
) -> Iterator[tuple[str, int, tuple[Messages, Messages]]]:
    """Yields (task, number of an example, see `_Task.conversation`)."""
    if split not in SPLITS:
        raise ValueError(f"a mixture of tasks has no split {split!r}; valid: {list(SPLITS)}")
    prompts.check_least("config.data.source_args.rate_cap", rate_cap, 1)
    prompts.check_least("config.data.source_args.rounds", rounds, 1)

    counts = {}
    for name, entry in tasks.items():
        task = _Task(name, entry, split, how)
        # Its own, so that a task's conversations don't depend on the other tasks.
        rng = random.Random(f"{seed} {split} {name}")

        size = len(task.records)
        counts[name] = min(size, rate_cap) * rounds
        numbers: list[int] = []
        while len(numbers) < counts[name]:
            numbers += rng.sample(range(size), size)
        for number in numbers[: counts[name]]:
            yield name, number, task.conversation(number, rng)
    logging.info("mixture, split %r: %s", split, counts)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _wording(keys: Mapping[str, Any] | None) -> Wording:
    """The wording with these keys, checked."""
    where = "config.data.source_args.wording"
    valid = [field.name for field in dataclasses.fields(Wording)]
    for key in keys or {}:
        if key not in valid:
            raise ValueError(f"{where}.{key} is no key; valid: {valid}")

    how = Wording(**(keys or {}))
    if not 0 <= how.options <= 1:
        raise ValueError(f"{where}.options = {how.options}; wanted a share, 0 to 1")
    if how.shots_as not in SHOTS_AS:
        raise ValueError(f"{where}.shots_as = {how.shots_as!r}; valid: {list(SHOTS_AS)}")
    for key, least in dict(most_options=2, shots=0, most_chars=0).items():
        prompts.check_least(f"{where}.{key}", getattr(how, key), least)
    return how


def _instructions(name: str, entry: Mapping) -> Mapping:
    if "instructions" not in entry:
        raise ValueError(
            f"config.data.source_args.tasks.{name} has no instructions; wanted an entry of "
            "lm.evals.entries.instructed"
        )
    return entry["instructions"]


def _not_held_out(tasks: Mapping, clusters: Sequence[str], names: Sequence[str]) -> dict:
    """The tasks that are tuned on.

    Raises:
      ValueError: an unknown cluster or task, or none is left.
    """
    by_cluster: dict[str, list[str]] = {}
    for name, entry in tasks.items():
        by_cluster.setdefault(_instructions(name, entry)["cluster"], []).append(name)

    for key, given, valid in (("clusters", clusters, by_cluster), ("tasks", names, tasks)):
        for name in given:
            if name not in valid:
                raise ValueError(
                    f"config.data.source_args.held_out_{key}: unknown {name!r}; valid: "
                    f"{sorted(valid)}"
                )

    held_out = set(names)
    for cluster in clusters:
        held_out.update(by_cluster[cluster])
    if held_out >= set(tasks):
        raise ValueError(
            f"config.data.source_args holds out all tasks, {sorted(tasks)}; wanted some to tune "
            f"on, of the clusters {by_cluster}"
        )
    return {name: entry for name, entry in tasks.items() if name not in held_out}


# A task.


class _Way(NamedTuple):
    """A wording: a question, and its answer where that isn't the task's own."""

    question: prompts.Template
    answer: prompts.Template | None = None


class _Task:
    """A task's examples as conversations."""

    def __init__(self, name: str, entry: Mapping, split: str, how: Wording):
        self._how = how
        self.records = _records(name, entry, split)
        self._answer = _ANSWERERS[entry["type"]](name, entry, self.records)

        # All ways to ask: those of the eval, and those of the instructions.
        instructions = _instructions(name, entry)
        where = f"config.data.source_args.tasks.{name}"
        prompt = entry["prompt"]
        own = prompt["templates"] if "templates" in prompt else (prompt["template"],)
        self._ways = []
        for key, texts in (("prompt", own), ("instructions.phrasings", instructions["phrasings"])):
            for text in texts:
                self._ways.append(_Way(prompts.Template(text, f"{where}.{key}")))
        key = f"{where}.instructions.reversed"
        for pair in instructions["reversed"]:
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"{key}: {pair!r}; wanted pairs of a question and an answer")
            self._ways.append(_Way(*(prompts.Template(text, key) for text in pair)))
        self._rejected = prompts.Template(
            instructions["rejected"], f"{where}.instructions.rejected"
        )

        # Which wording an example gets is drawn: what is wrong with one is found now.
        for way in self._ways:
            way.question.check_has_column()
            self._asked(self.records[0], way, [])

    def _asked(self, record: Record, way: _Way, options: Sequence[str]) -> tuple[str, str]:
        """(question, answer) of a record."""
        answer, _ = self._answer(record)
        if way.answer is None:
            return with_options(way.question(record), options), answer
        turned = {**record, "answer": answer.strip()}
        return way.question(turned), way.answer(turned)

    def forms(self, record: Record) -> list[str]:
        """Returns the texts of a record in all ways, and those of its own columns."""
        right, options = self._answer(record)
        texts = [value for value in record.values() if isinstance(value, str)]
        for way in self._ways:
            question, answer = self._asked(record, way, [])
            answers = dict.fromkeys((answer, *options)) if way.answer is None else (answer,)
            texts += [question + answer for answer in answers]
        return list(dict.fromkeys([*texts, *options, right]))

    def conversation(self, number: int, rng: random.Random) -> tuple[Messages, Messages]:
        """Returns the conversation about an example, and that with the wrong answer."""
        record = self.records[number]
        # Wrong answers are those to the task, not to it turned around.
        ways = [way for way in self._ways if way.answer is None or not self._rejected.text]
        way = rng.choice(ways)
        lists_options = rng.random() < self._how.options

        # The question is the last one. All are asked in the same way.
        asked = []
        for shown in (*self._shots(number, rng), record):
            options = self._options(shown, rng) if lists_options else []
            asked.append(self._asked(shown, way, options))
        while len(asked) > 1 and 0 < self._how.most_chars < sum(map(_size, asked)):
            asked = asked[1:]

        *shots, (question, answer) = asked
        rejected = self._rejected(record)
        if self._how.shots_as == "text":
            question = "".join([f"{q}{a}\n\n" for q, a in shots]) + question
            shots = []

        messages: Messages = []
        for q, a in (*shots, (question, answer)):
            messages += [self._message("user", q), self._message("assistant", a)]
        return messages, [*messages[:-1], self._message("assistant", rejected)]

    def _message(self, role: str, text: str) -> dict[str, str]:
        is_stripped = role == "assistant" and not self._how.space
        return dict(role=role, content=text.strip() if is_stripped else text)

    def _shots(self, number: int, rng: random.Random) -> list[Record]:
        """Other examples to come before one."""
        count = min(rng.randint(0, self._how.shots), len(self.records) - 1)
        drawn = rng.sample(range(len(self.records)), count + 1)
        return [self.records[i] for i in drawn if i != number][:count]

    def _options(self, record: Record, rng: random.Random) -> list[str]:
        """What is listed for a record, in random order, the right one among it."""
        answer, options = self._answer(record)
        others = [option for option in options if option != answer]
        # The right one counts.
        most = self._how.most_options - 1
        drawn = [answer, *rng.sample(others, min(most, len(others)))]
        return rng.sample(drawn, len(drawn)) if options else []


def _size(asked: tuple[str, str]) -> int:
    return sum(map(len, asked))


def with_options(question: str, options: Sequence[str]) -> str:
    """Returns a question with the options listed, before its last line if that asks for the answer
    ("Sentiment:"), else behind it.
    """
    if not options:
        return question

    listed = "\n".join(["OPTIONS:", *(f"- {option.strip()}" for option in options)])
    before, _, cue = question.rpartition("\n")
    if before and cue.endswith(":"):
        return f"{before.rstrip()}\n{listed}\n{cue}"
    return f"{question}\n{listed}\nAnswer:"


def _records(name: str, entry: Mapping, split: str) -> Sequence[dict]:
    """The records of a task's split.

    Raises:
      ValueError: there are none, or those to train on are evaluated.
    """
    source, trained = entry["source"], _instructions(name, entry)["split"]
    if split == "validation":
        return prompts.load(source, source["split"], name)

    # A path without the split in it is the same file for both.
    files = [file for file in (source["path"], *source["lines"].values()) if file]
    if not trained or trained == source["split"] or not all("{split}" in file for file in files):
        raise ValueError(
            f"the task {name!r} has no split to train on: instructions.split = {trained!r}, and "
            f"source.split = {source['split']!r} is evaluated; wanted another one, for which "
            f"'{{split}}' stands in the paths {files}"
        )
    return prompts.load(source, trained, name)


# How the sorts of tasks are answered.


def _label_answerer(name: str, entry: Mapping, records: Sequence[Record]) -> Answerer:
    verbalizer = entry["verbalizer"]["words"][0]
    labels = [label for label, _ in verbalizer]
    words = [texts[0] for _, texts in verbalizer]
    column = _label_column(name, entry, labels, records)

    def answer(record: Record) -> tuple[str, list[str]]:
        return words[column.index(record)], words

    return answer


def _label_column(
    name: str, entry: Mapping, labels: Sequence[str], records: Sequence[Record]
) -> AnswerColumn:
    """The column of the right label."""

    def names(record: Record) -> Sequence[str]:
        return labels

    def size(record: Record) -> int:
        return len(labels)

    column = AnswerColumn(name, "label", entry["label"], names, size)
    column.settle(records, records)
    return column


def _choice_answerer(name: str, entry: Mapping, records: Sequence[Record]) -> Answerer:
    question_format = choice.make_question_format(
        name, entry["prompt"]["template"], entry["choices"], entry["answer"], entry["answers"]
    )
    if isinstance(question_format.answer, AnswerColumn):
        question_format.answer.settle(records, records)

    def answer(record: Record) -> tuple[str, list[str]]:
        options = question_format.options(record)
        return options[question_format.gold(record)], options

    return answer


def _text_answerer(name: str, entry: Mapping, records: Sequence[Record]) -> Answerer:
    where = f"config.data.source_args.tasks.{name}"
    references = prompts.Template(entry["references"], f"{where}.references")
    target = prompts.Template(entry["target"] or entry["references"], f"{where}.target")
    # Of records without references, where the eval has a text for that.
    no_answer = target.fill([entry["output"]["no_answer"]] * len(target.fields))

    def answer(record: Record) -> tuple[str, list[str]]:
        return target(record) if references.each(record) else no_answer, []

    return answer


_ANSWERERS = {
    "lm.evals.classification.PromptClassification": _label_answerer,
    "lm.evals.linear.LinearVerbalizer": _label_answerer,
    "lm.evals.choice.MultipleChoice": _choice_answerer,
    "lm.evals.generation.TextGeneration": _text_answerer,
}
