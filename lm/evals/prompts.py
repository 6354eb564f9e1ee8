"""Prompts from records: templates over their columns, and examples before the question.

All evals that ask about records share this. `source` is config.evals.NAME.source, a `pool` the
records that examples are drawn from, `name` the NAME, for messages.
"""

import itertools
import logging
import random
import re
import string
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from lm.data import records as records_lib

SAMPLERS = ("balanced", "first_n", "random")


def all_but_last_word(text: str) -> str:
    return text.rstrip().rpartition(" ")[0]


def last_word(text: str) -> str:
    return text.rstrip().rpartition(" ")[2]


# What may follow the name of a column after a colon: {passage:last}.
FILTERS: dict[str, Callable[[str], str]] = {
    "": str,
    "strip": str.strip,
    "lower": str.lower,
    "head": all_but_last_word,
    "last": last_word,
}

# "{{text}}" as lm_eval and promptsource write a column, with what may follow its name there:
# {{answers[text]}}, {{answers.text}}, {{text:strip}}, {{ text|trim }}. Python reads doubled braces
# as braces that are meant: {{"a": 1}} and {{{text}}} are.
DOUBLED = re.compile(r"(?<!\{)\{\{\s*([^{}\[\].|:\s]+)((?:\[|\.|:\w|\s*\|)[^{}]*)?\s*\}\}(?!\})")


class Template:
    """A Python format string over the columns of a record.

    "Review: {sentence}\\nSentiment:" names a column, {answers[text]} a column within a column,
    {passage:last} a filter.

    Args:
      text: the format string.
      key: the configuration's key for it, for messages.

    Raises:
      ValueError: it is not a format string, or names an unknown filter.
    """

    def __init__(self, text: str, key: str):
        self.text = text
        self._key = key

        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"{key} = {text!r} is no template: {error} (a brace that is meant is written twice)"
            ) from None

        # What may be meant as a column, as it is written and its name: only records show which is.
        self._doubled = [(match[0], match[1]) for match in DOUBLED.finditer(text)]
        # (text before a column, the column, its filter); the last part may have no column.
        self._parts: list[tuple[str, str | None, str]] = []
        for literal, field, spec, conversion in parts:
            if field is not None and (not field or spec not in FILTERS or conversion):
                raise ValueError(
                    f"{key} = {text!r}: {{{field}:{spec}}} is not a column with one of the "
                    f"filters {[name for name in FILTERS if name]}"
                )
            self._parts.append((literal, field, spec or ""))

    @property
    def fields(self) -> list[str]:
        """The columns in order; a column that is used twice is listed twice."""
        return [field for _, field, _ in self._parts if field is not None]

    @property
    def tail(self) -> str:
        """The text after the last column."""
        literal, field, _ = self._parts[-1] if self._parts else ("", None, "")
        return literal if field is None else ""

    def check_has_column(self) -> None:
        """Raises ValueError for a template without columns: all its texts would be the same."""
        if self.fields:
            return
        advice = "write a column's name in braces, such as {text}"
        if self._doubled:
            advice = f"{self._doubled[0][0]} is text; write {{{self._doubled[0][1]}}} for a column"
        raise ValueError(
            f"{self._key} = {self.text!r} has no column: it would be the same text for all "
            f"records; {advice}"
        )

    def check_braces(self, record: Mapping) -> None:
        """Raises ValueError for doubled braces around a column of a record: they would be text."""
        for written, column in self._doubled:
            if column in record:
                raise ValueError(
                    f"{self._key} = {self.text!r}: {written} is text and not the column "
                    f"{column!r}; write {{{column}}}"
                )

    def value(self, field: str, record: Mapping):
        """What a record holds in a column. Raises ValueError if it has no such column."""
        value = record
        # "answers[text][0]" is the path answers, text, 0.
        for name in re.findall(r"[^\[\]]+", field):
            try:
                value = value[int(name) if isinstance(value, list) else name]
            except (KeyError, IndexError, TypeError, ValueError):
                raise ValueError(
                    f"{self._key} = {self.text!r} needs the column {field!r}; the record has "
                    f"{sorted(record)}"
                ) from None
        return value

    def fill(self, texts: Sequence[str]) -> str:
        """The template with `texts` in place of its `fields`, after their filters."""
        filled = ""
        remaining = iter(texts)
        for literal, field, spec in self._parts:
            filled += literal
            if field is not None:
                filled += FILTERS[spec](next(remaining))
        return filled

    def each(self, record: Mapping) -> list[str]:
        """The texts of a record: as many as the lists among its columns are long, or one."""
        return [self.fill(columns) for columns in self._columns_of_each(record)]

    def identity(self, record: Mapping) -> tuple[tuple[str, ...], ...]:
        """What the template shows of a record, but for case and white space: records that agree in
        it are the same example.
        """
        filters = [FILTERS[spec] for _, field, spec in self._parts if field is not None]
        shown = []
        for columns in self._columns_of_each(record):
            texts = [apply(column) for apply, column in zip(filters, columns)]
            shown.append(tuple(map(_essence, texts)))
        return tuple(shown)

    def _columns_of_each(self, record: Mapping) -> list[list[str]]:
        """For each text of a record the texts of its columns, before their filters."""
        self.check_braces(record)
        values = [self.value(field, record) for field in self.fields]

        # Parallel lists: text i takes element i of each.
        lengths = {len(value) for value in values if isinstance(value, list)}
        if len(lengths) > 1:
            raise ValueError(
                f"{self._key} = {self.text!r}: its lists differ in length, {sorted(lengths)}"
            )

        texts = []
        for i in range(lengths.pop() if lengths else 1):
            columns = []
            for field, value in zip(self.fields, values):
                # A column that is no list is the same in all texts.
                element = value[i] if isinstance(value, list) else value
                columns.append(self._spell(field, element))
            texts.append(columns)
        return texts

    def _spell(self, field: str, value) -> str:
        """The text of a column's value. Raises ValueError if it has no obvious one."""
        if not isinstance(value, (str, int, float)):
            raise ValueError(
                f"{self._key} = {self.text!r}: {field!r} of a record is {value!r:.60}; wanted text "
                "or a number"
            )
        return str(value)

    def __call__(self, record: Mapping) -> str:
        """The text of a record. Raises ValueError if a list gives it several, or none."""
        texts = self.each(record)
        if len(texts) != 1:
            raise ValueError(
                f"{self._key} = {self.text!r} gives {len(texts)} texts for one record; wanted "
                f"one (name an element: {{answers[0]}})"
            )
        return texts[0]


def _essence(text: str) -> str:
    """A text without what two copies of it may differ in: case, and white space."""
    return " ".join(text.split()).casefold()


class Shot(NamedTuple):
    """A record that was drawn from a pool."""

    index: int  # in the pool
    record: dict


def load(source: Mapping, split: str, name: str) -> Sequence[dict]:
    """The records of a split."""
    has_files = source["path"] or any(source["lines"].values())
    try:
        if source.get("pydocs") and not has_files:
            # It imports TFDS, for half a second: only where used.
            from lm.data import pydocs_tasks

            return pydocs_tasks.load(split, source["pydocs"], source["data_dir"])
        return records_lib.load(
            split,
            path=source["path"],
            lines=source["lines"],
            tfds=source["tfds"],
            data_dir=source["data_dir"],
        )
    except ValueError as error:
        raise ValueError(f"the eval {name!r}: {error}") from None


def evaluated(
    available: Sequence[dict], split: str, max_documents: int
) -> tuple[list[str], list[dict]]:
    """(names, records) of the records of a split that are evaluated: `max_documents` of them,
    evenly out of it; 0: all.
    """
    names = []
    records = []
    for i in records_lib.evenly_spaced(len(available), max_documents):
        names.append(f"{split}[{i}]")
        records.append(available[i])
    return names, records


def check_least(key: str, value: float, least: float) -> None:
    """Raises ValueError for a number below `least`, or nan.

    Args:
      key: the configuration's whole key for it, for messages.
    """
    if not value >= least:
        raise ValueError(f"{key} = {value}; wanted {least} or above")


def check_choice(name: str, key: str, value: str, valid: Sequence[str]) -> None:
    """Raises ValueError if config.evals.NAME.KEY has another value than the valid ones."""
    if value not in valid:
        raise ValueError(f"config.evals.{name}.{key} = {value!r}; valid: {list(valid)}")


def load_shots(source: Mapping, name: str) -> Sequence[dict]:
    """The records that examples are drawn from.

    Raises:
      ValueError: they are the records that are evaluated.
    """
    split = source["shots_split"]
    if not split or split == source["split"]:
        raise ValueError(
            f"the eval {name!r}: examples can't come from the split {source['split']!r} that is "
            "evaluated; set source.shots_split, or shots = 0"
        )

    # A path without the split in it is the same file for both splits.
    for file in (source["path"], *source["lines"].values()):
        if file and "{split}" not in file:
            raise ValueError(
                f"the eval {name!r}: examples can't come from {file}, which is evaluated; put "
                f"'{{split}}' into the path, or set shots = 0"
            )
    return load(source, split, name)


def draw_shots(
    pool: Sequence[dict],
    prompt: Mapping,
    seed: int,
    *,
    identity: Callable[[dict], Hashable],
    avoid: Set[Hashable],
    name: str,
    label: Callable[[dict], object] | None = None,
    num_labels: int = 1,
) -> list[Shot]:
    """Draws the examples before the question, see `draw_records`.

    Args:
      prompt: shots, how many; sampler.

    Raises:
      ValueError: an unknown sampler, fewer records than wanted that may be drawn, or no record of
        some label where they are to be balanced.
    """
    count = prompt["shots"]
    if not count:
        return []
    sampler = prompt["sampler"]
    check_choice(name, "prompt.sampler", sampler, SAMPLERS)
    shots = draw_records(
        pool,
        count,
        sampler=sampler,
        seed=seed,
        identity=identity,
        avoid=avoid,
        label=label,
        num_labels=num_labels,
    )

    key = f"config.evals.{name}.prompt.shots"
    check_enough(shots, count, key)
    if label:
        is_balanced = sampler == "balanced"
        check_labels([label(shot.record) for shot in shots], num_labels, key, is_balanced)
    return shots


def check_enough(shots: Sequence[Shot], count: int, key: str) -> None:
    """Raises ValueError if fewer records were drawn than the configuration's key wants."""
    if len(shots) < count:
        raise ValueError(
            f"{key} = {count}, but there are {len(shots)} examples that aren't evaluated "
            "themselves, each text counted once"
        )


def check_labels(labels: Sequence, num_labels: int, key: str, is_balanced: bool) -> None:
    """Says where drawn records lack a label that they could have.

    Args:
      labels: the label of each drawn record.
      num_labels: how many labels there are.
      key: the configuration's key for their number, for messages.
      is_balanced: whether a missing label is an error, and not only a single one a warning.

    Raises:
      ValueError: they are balanced, and there are none of some label.
    """
    distinct = len(set(labels))
    if is_balanced and distinct < min(num_labels, len(labels)):
        raise ValueError(
            f"{key} = {len(labels)}: source.shots_split has examples of {distinct} of {num_labels} "
            "labels only; take another split, or prompt.sampler = 'random'"
        )
    if distinct == 1 < min(num_labels, len(labels)):
        logging.warning("%s = %d: all of the examples have the same label", key, len(labels))


def draw_records(
    pool: Sequence[dict],
    count: int,
    *,
    sampler: str,
    seed: int,
    identity: Callable[[dict], Hashable],
    avoid: Set[Hashable],
    label: Callable[[dict], object] | None = None,
    num_labels: int = 1,
) -> list[Shot]:
    """Draws up to `count` records, none of which agrees with another one in `identity`.

    first_n: the first ones, in their order for seed 0, shuffled for any other seed.
    random: any, in random order.
    balanced: as many of each label, in random order. Where `count` is not a multiple, or a label
      has too few, other labels have more.

    Args:
      sampler: one of SAMPLERS.
      identity: what records that are the same example agree in (`Template.identity`).
      avoid: the identities that may not be drawn, because they are evaluated.
      label: the label of a record, one of `num_labels`; None: all records have the same.
    """
    # Indices are shuffled, not records, which may be on disk.
    rng = random.Random(seed)
    order = list(range(len(pool)))
    if sampler != "first_n":
        rng.shuffle(order)
    candidates = _allowed_records(pool, order, identity, avoid)

    if sampler == "balanced":
        drawn = _take_balanced(candidates, count, label, num_labels)
        # Otherwise the labels would come in turns.
        return rng.sample(drawn, len(drawn))

    drawn = list(itertools.islice(candidates, count))
    if sampler == "first_n" and seed:
        rng.shuffle(drawn)
    return drawn


def _allowed_records(
    pool: Sequence[dict],
    order: Sequence[int],
    identity: Callable[[dict], Hashable],
    avoid: Set[Hashable],
) -> Iterator[Shot]:
    """The records in this order, but for those to avoid, and those that agree with an earlier one.
    They are read only as far as they are needed: a pool may be a data set on disk.
    """
    seen = set(avoid)
    for i in order:
        record = pool[i]
        key = identity(record)
        if key not in seen:
            seen.add(key)
            yield Shot(i, record)


def _take_balanced(
    shots: Iterator[Shot],
    count: int,
    label: Callable[[dict], object] | None,
    num_labels: int,
) -> list[Shot]:
    """Up to `count` records, a record of each label in turn as long as there are any."""
    groups: dict[object, list[Shot]] = {}
    for shot in shots:
        group = label(shot.record) if label else None
        groups.setdefault(group, []).append(shot)

        # Every label has its share: the rest of the records need not be read.
        smallest = min(map(len, groups.values()))
        if len(groups) == num_labels and smallest * num_labels >= count:
            break

    # Labels in turn, so that the first `count` have as many of each as can be.
    taken = []
    for turn in itertools.zip_longest(*groups.values()):
        taken += [shot for shot in turn if shot is not None]
    return taken[:count]


def describe(
    template: Template,
    shots: Sequence[Shot],
    split: str,
    around: tuple[str, str],
    variant: str = "",
) -> dict:
    """What stands in predictions/ for the prompts of all examples: what they have in common.

    Args:
      shots: the examples before the question, drawn from `split`.
      around: the texts before and after the question.
      variant: the name of this way to ask.
    """
    before, after = around
    return {
        "variant": variant,
        "template": template.text,
        "shots": [f"{split}[{shot.index}]" for shot in shots],
        "before": before,
        "after": after,
    }


def truncate_prompt(
    start: Sequence[int], prompt: Sequence[int], longest: int, length: int, name: str
) -> tuple[list[int], int]:
    """Cuts the beginning off a prompt that leaves too little room for its continuations.

    Args:
      start: ids that stand before the prompt and stay (BOS).
      prompt: ids of the prompt.
      longest: how many ids the longest continuation has.
      length: how many ids a row holds.
      name: the eval's, for messages.

    Returns:
      (ids with `start`, how many ids of the prompt were cut off)

    Raises:
      ValueError: no room for any id of the prompt.
    """
    # The last id of a continuation needs no place in the row.
    room = length - longest + 1 - len(start)
    if room < 1:
        raise ValueError(
            f"the eval {name!r}: a continuation of {longest} tokens leaves no room for a prompt "
            f"in config.data.length = {length}"
        )
    return [*start, *prompt[-room:]], max(len(prompt) - room, 0)
