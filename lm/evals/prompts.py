"""Prompts out of records: templates over their columns, and examples before the question."""

import itertools
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence

from lm.data import records as records_lib
from lm.data.sources import evenly_spaced

SAMPLERS = ("balanced", "first_n", "random")
# What may stand behind a column's name: {passage:last}.
FILTERS: dict[str, Callable[[str], str]] = {
    "": lambda text: text,
    "strip": str.strip,
    "lower": str.lower,
    "head": lambda text: text.rstrip().rpartition(" ")[0],  # all but the last word
    "last": lambda text: text.rstrip().rpartition(" ")[2],
}


class Template:
    """A Python format string over the columns of a record: "Review: {sentence}\\nSentiment:",
    {answers[text]} of a column in a column, {passage:last}.

    Raises:
      ValueError: it is none, or names an unknown filter.
    """

    def __init__(self, text: str, what: str):
        self.text, self._what = text, what
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"{what} = {text!r} is no template: {error} (a brace that is meant is written "
                "twice)"
            ) from None
        for _, field, spec, conversion in parts:
            if field is not None and (not field or spec not in FILTERS or conversion):
                raise ValueError(
                    f"{what} = {text!r}: {{{field}:{spec}}} is not a column with one of the "
                    f"filters {[name for name in FILTERS if name]}"
                )
        self._parts = [(literal, field, spec or "") for literal, field, spec, _ in parts]

    @property
    def fields(self) -> list[str]:
        return [field for _, field, _ in self._parts if field is not None]

    def value(self, field: str, record: Mapping):
        """What `record` has at a field. Raises ValueError if it has none."""
        found, names = record, re.findall(r"[^\[\]]+", field)
        for name in names:
            try:
                found = found[int(name) if isinstance(found, list) else name]
            except (KeyError, IndexError, TypeError, ValueError):
                raise ValueError(
                    f"{self._what} = {self.text!r} needs the column {field!r}; the record has "
                    f"{sorted(record)}"
                ) from None
        return found

    def each(self, record: Mapping) -> list[str]:
        """The texts of a record: one, or as many as the lists among its columns are long."""
        values = {field: self.value(field, record) for field in self.fields}
        lengths = {len(value) for value in values.values() if isinstance(value, list)}
        if len(lengths) > 1:
            raise ValueError(
                f"{self._what} = {self.text!r}: its lists differ in length, {sorted(lengths)}"
            )

        def pick(field, i):
            value = values[field][i] if isinstance(values[field], list) else values[field]
            if not isinstance(value, (str, int, float)):
                raise ValueError(
                    f"{self._what} = {self.text!r}: {field!r} of a record is {value!r:.60}; "
                    "wanted text or a number"
                )
            return str(value)

        return [
            self._join(lambda field: pick(field, i))  # noqa: B023
            for i in range(lengths.pop() if lengths else 1)
        ]

    def __call__(self, record: Mapping) -> str:
        texts = self.each(record)
        if len(texts) != 1:
            raise ValueError(
                f"{self._what} = {self.text!r} gives {len(texts)} texts for one record; wanted "
                f"one (name an element: {{answers[0]}})"
            )
        return texts[0]

    def filled(self, text: str | Callable[[str], str]) -> str:
        """With the same text in place of each column, or one that depends on its name."""
        return self._join(text if callable(text) else lambda field: text)

    @property
    def tail(self) -> str:
        """The text behind the last column."""
        literal, field, _ = self._parts[-1] if self._parts else ("", None, "")
        return literal if field is None else ""

    def _join(self, value: Callable[[str], str]) -> str:
        return "".join(
            literal + (FILTERS[spec](value(field)) if field is not None else "")
            for literal, field, spec in self._parts
        )


def load(source: Mapping, split: str, name: str) -> Sequence[dict]:
    """The records of a split of config.evals.NAME.source."""
    try:
        return records_lib.load(
            split, **{key: source[key] for key in ("path", "lines", "tfds", "data_dir")}
        )
    except ValueError as error:
        raise ValueError(f"the eval {name!r}: {error}") from None


def evaluated(source: Mapping, name: str, max_documents: int) -> tuple[list[str], list[dict]]:
    """(names, records) of what is evaluated."""
    records = load(source, source["split"], name)
    chosen = evenly_spaced(len(records), max_documents)
    return [f"{source['split']}[{i}]" for i in chosen], [records[i] for i in chosen]


def check_counts(name: str, **counts: int) -> None:
    """Raises ValueError for a negative one."""
    for key, value in counts.items():
        if value < 0:
            raise ValueError(f"config.evals.{name}: {key} = {value}; wanted 0 or above")


def load_shots(source: Mapping, name: str) -> Sequence[dict]:
    """The records that examples are drawn from. Raises ValueError where they would be those that
    are evaluated.
    """
    split = source["shots_split"]
    if not split or split == source["split"]:
        raise ValueError(
            f"the eval {name!r}: examples can't come from the split {source['split']!r} that is "
            "evaluated; set source.shots_split, or shots = 0"
        )
    for file in filter(None, (source["path"], *source["lines"].values())):
        if "{split}" not in file:
            raise ValueError(
                f"the eval {name!r}: examples can't come from {file}, which is evaluated; put "
                f"'{{split}}' into the path, or set shots = 0"
            )
    return load(source, split, name)


def select_shots(
    pool: Sequence[dict],
    count: int,
    *,
    sampler: str,
    seed: int,
    avoid: Callable[[dict], bool],
    name: str,
    key: str = "prompt.shots",
    label: Callable[[dict], object] = lambda record: None,
    num_labels: int = 1,
) -> list[dict]:
    """`count` examples: the first ones ("first_n"; as they come for seed 0), any ("random"), or as
    many of each label as of the others ("balanced"; one more of some), in random order.

    Args:
      avoid: records that are also among those evaluated.
      key: of the count, for messages.
      label: of a record, one of `num_labels`.

    Raises:
      ValueError: another sampler, too few records.
    """
    if sampler not in SAMPLERS:
        raise ValueError(
            f"config.evals.{name}.prompt.sampler = {sampler!r}; valid: {list(SAMPLERS)}"
        )
    order, rng = list(range(len(pool))), random.Random(seed)
    if sampler != "first_n":
        rng.shuffle(order)
    good = (record for record in map(pool.__getitem__, order) if not avoid(record))
    if sampler == "balanced":
        groups: dict = {}
        for record in good:
            groups.setdefault(label(record), []).append(record)
            if len(groups) == num_labels and min(map(len, groups.values())) * num_labels >= count:
                break
        rounds = itertools.chain(*itertools.zip_longest(*groups.values()))
        good = iter(
            rng.sample(
                found := [record for record in rounds if record is not None][:count], len(found)
            )
        )
    found = list(itertools.islice(good, count))
    if sampler == "first_n" and seed:
        rng.shuffle(found)
    if len(found) < count:
        raise ValueError(
            f"config.evals.{name}.{key} = {count}, but there are {len(found)} examples that "
            "aren't evaluated themselves"
        )
    return found


def shots_text(
    shots: Sequence[dict], template: Template, target: Callable[[dict], str], separator: str
) -> str:
    """The text before the question: each example with its answer."""
    return "".join(template(record) + target(record) + separator for record in shots)


def truncate_prompt(
    start: Sequence[int], prompt: Sequence[int], longest: int, length: int, name: str
) -> tuple[list[int], bool]:
    """(the ids of a prompt that leave room for `longest` ids of which the last one needn't be read,
    whether it was cut). A prompt that is too long loses its beginning, but for `start`, the ids
    that stand before the text.

    Raises:
      ValueError: no room for anything of the prompt.
    """
    room = length - longest + 1 - len(start)
    if room < 1:
        raise ValueError(
            f"the eval {name!r}: a continuation of {longest} tokens leaves no room for a prompt "
            f"in config.data.length = {length}"
        )
    return [*start, *prompt[-room:]], len(prompt) > room
