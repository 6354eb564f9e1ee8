"""Tasks about pydocs, so that tuning can be tried without a download: records whose questions and
answers follow from docstrings by plain rules.

A family is one sort of question. Its splits are those of pydocs, by module; wrong choices come from
the same split. lm/evals/tasks/pydocs_FAMILY.toml asks it.
"""

import functools
import random
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from lm.data import pydocs
from lm.data.sources import Document

DATA_DIR = "~/.cache/lm"  # that of config.data.source_args
EXCERPT_CHARS = 360  # a question about so much has some 200 tokens, of 2048 pieces
SUMMARY_CHARS = 120
BLOCK_CHARS = 150  # of a parameter's description
ANSWER_CHARS = 60
QUESTIONS_PER_DOCSTRING = 3

# numpydoc's headings, and Google's.
_HEADING = re.compile(
    r"^(?:([A-Z][A-Za-z ]+)\n-{3,}"
    r"|(Args|Arguments|Returns|Yields|Raises|Examples?|Notes?|References|See also):)[ ]*$",
    re.MULTILINE,
)
_ONE_TITLE = {
    "Args": "Parameters",
    "Arguments": "Parameters",
    "Example": "Examples",
    "Note": "Notes",
    "See also": "See Also",
}
# Titles that a line is classified by.
SECTIONS = ("Parameters", "Returns", "Raises", "Examples", "Notes", "References", "See Also")
# What a section describes: "x : array_like", and "x: The points."
_NUMPY_ENTRY = re.compile(r"^(?:(\*{0,2}\w[\w, *]*?)\s?:\s+)?(\S.*)$")
_GOOGLE_ENTRY = re.compile(r"^(\*{0,2}\w+):\s+(\S.*)$", re.DOTALL)
_EXCEPTION = re.compile(r"\b[A-Z]\w*(?:Error|Exception|Warning)\b")
_DEFAULT = re.compile(
    r"\b[Dd]efaults?(?: value)?(?: is| to|:|=)\s*[`'\"]{0,2}(-?\w(?:[\w.+-]*\w)?)(?=[`'\",.;)\s]|$)"
)
_TYPE_END = re.compile(r",? *\(?(?:optional|default|keyword|shape|of shape).*$", re.DOTALL)


class Entry(NamedTuple):
    """What a section says of one parameter, returned value or exception."""

    name: str  # "" for a returned value without one
    type: str  # "" in Google's style
    description: str

    def __str__(self):
        description = shortened(self.description, BLOCK_CHARS)
        if not self.type:
            return f"{self.name}: {description}"
        head = f"{self.name} : {self.type}" if self.name else self.type
        return f"{head}\n    {description}".rstrip()


class Docstring(NamedTuple):
    """A docstring taken apart.

    Attributes:
      name: qualified, with dots.
      summary: the first paragraph, as a line.
      body: what comes after it.
      sections: title -> text.
      entries: title -> what it describes, of Parameters, Returns and Raises.
    """

    name: str
    library: str
    text: str
    summary: str
    body: str
    sections: dict[str, str]
    entries: dict[str, list[Entry]]

    @property
    def head(self) -> str:
        return f"{self.name}\n{shortened(self.summary, SUMMARY_CHARS)}\n"

    def excerpt(self, title: str, number: int) -> str:
        """Returns a section's entry, with as many around it as there is room for; "": too long."""
        entries = self.entries[title]

        excerpt = ""
        for radius in range(len(entries)):
            shown = entries[max(number - radius, 0) : number + radius + 1]
            longer = "\n".join([self.head, title, *map(str, shown)])
            if len(longer) > EXCERPT_CHARS:
                break
            excerpt = longer
        return excerpt


def parse(document: Document) -> Docstring:
    """Returns a docstring taken apart."""
    first, _, body = document.text.partition("\n\n")
    headings = list(_HEADING.finditer(document.text))

    sections, entries = {}, {}
    for i, heading in enumerate(headings):
        end = headings[i + 1].start() if i + 1 < len(headings) else len(document.text)
        content = document.text[heading.end() : end].strip("\n")

        is_google = heading[1] is None
        if is_google:
            # It ends where a line is no longer indented.
            content = textwrap.dedent(re.split(r"^(?=\S)", content, flags=re.MULTILINE)[0]).strip()

        title = heading[1] or heading[2]
        title = _ONE_TITLE.get(title, title)
        sections[title] = content
        if title in ("Parameters", "Returns", "Raises"):
            entries[title] = list(_entries(content, is_google))

    summary = " ".join(first.split())
    return Docstring(
        document.name, document.label, document.text, summary, body.strip(), sections, entries
    )


def _entries(section: str, is_google: bool) -> Iterator[Entry]:
    # An entry begins where a line isn't indented.
    for block in re.split(r"^(?=\S)", section, flags=re.MULTILINE):
        if is_google:
            if found := _GOOGLE_ENTRY.match(block):
                yield Entry(found[1], "", " ".join(found[2].split()))
            continue

        head, _, description = block.partition("\n")
        found = _NUMPY_ENTRY.match(head.strip())
        paragraph = textwrap.dedent(description).strip().partition("\n\n")[0]
        if found:
            yield Entry(found[1] or "", found[2], " ".join(paragraph.split()))


def shortened(text: str, chars: int) -> str:
    """Returns the beginning of a text, up to the end of a word."""
    if len(text) <= chars:
        return text
    return re.sub(r"\s+\S*$", "", text[: chars - 3]) + " ..."


# Families: functions (docstring, all of its split, a generator for it alone) -> its records.

Docstrings = Sequence[Docstring]
Family = Callable[[Docstring, Docstrings, random.Random], Iterator[dict]]


def _library(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """Which library a docstring belongs to."""
    yield dict(excerpt=shortened(doc.text, EXCERPT_CHARS), label=doc.library)


def _section(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """Which section a line stands in."""
    titles = [title for title in SECTIONS if title in doc.sections]
    if not titles:
        return

    title = rng.choice(titles)
    lines = [line.strip() for line in doc.sections[title].split("\n")]
    lines = [line for line in lines if 20 <= len(line) <= 100]
    if lines:
        yield dict(line=rng.choice(lines), label=title)


def _optional(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """Whether a parameter is optional, as often yes as no where a docstring has both."""
    by_label: dict[str, list[int]] = {}
    for i, entry in enumerate(doc.entries.get("Parameters", ())):
        if entry.type and entry.name.isidentifier() and doc.excerpt("Parameters", i):
            is_optional = "optional" in entry.type or "default" in entry.type
            by_label.setdefault("yes" if is_optional else "no", []).append(i)

    if by_label:
        label = rng.choice(sorted(by_label))
        number = rng.choice(by_label[label])
        parameter = doc.entries["Parameters"][number].name
        yield dict(excerpt=doc.excerpt("Parameters", number), parameter=parameter, label=label)


def _has_parameter(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """Whether a function has a parameter, which is its own or another one's."""
    own = [entry.name for entry in doc.entries.get("Parameters", ())]
    excerpt = doc.excerpt("Parameters", 0) if own else ""
    if not excerpt:
        return

    label = rng.choice(("yes", "no"))
    names = [name for name in own if re.search(rf"^{re.escape(name)}\b", excerpt, re.MULTILINE)]
    if label == "no":
        # Some that the whole docstring doesn't have: a part of it isn't shown.
        others: list[Entry] = []
        for other in rng.choices(docs, k=8):
            others += other.entries.get("Parameters", ())
        names = [other.name for other in others if not _has_word(doc.text, other.name)]

    names = [name for name in names if name.isidentifier()]
    if names:
        yield dict(excerpt=excerpt, parameter=rng.choice(names), label=label)


def _parameter_type(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """The type of a parameter."""
    if asked := list(_asked(doc, ("type",))):
        yield rng.choice(asked)


def _first_parameter(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """The name of the first parameter."""
    names = [entry.name for entry in doc.entries.get("Parameters", ())]
    if names and names[0].isidentifier() and doc.excerpt("Parameters", 0):
        yield dict(excerpt=doc.excerpt("Parameters", 0), answer=names[0])


def _raises(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """The one exception that a docstring names, from the paragraph that says so."""
    names = set(_EXCEPTION.findall(doc.text))
    if len(names) != 1 or doc.name.endswith(tuple(names)):
        return

    answer = names.pop()
    for paragraph in doc.text.split("\n\n")[1:]:
        excerpt = f"{doc.head}\n{paragraph}"
        is_said = answer in paragraph and re.search("rais", paragraph, re.IGNORECASE)
        if is_said and len(excerpt) <= EXCERPT_CHARS:
            yield dict(excerpt=excerpt, answer=answer)
            return


def _name(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """The name of an object, from its summary and its examples."""
    answer = doc.name.rpartition(".")[2]
    summary = shortened(doc.summary, SUMMARY_CHARS)
    examples = shortened(doc.sections.get("Examples", ""), EXCERPT_CHARS - SUMMARY_CHARS)
    if not answer.startswith("_") and _has_word(examples, answer):
        yield dict(excerpt=f"{summary}\n\nExamples\n{examples}", answer=answer)


def _summary(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """The summary of a docstring's body."""
    if 20 <= len(doc.summary) <= 100 <= len(doc.body):
        yield dict(excerpt=shortened(doc.body, EXCERPT_CHARS), answer=doc.summary)


# With which summaries begin as commands, "Return the sum.", as PEP 257 wants them.
VERBS = (
    "Add Allow Append Apply Assign Build Calculate Call Change Check Clear Close Collect Compare "
    "Compute Concatenate Configure Construct Convert Copy Count Create Decode Define Delete "
    "Determine Divide Draw Encode Ensure Estimate Evaluate Execute Extract Fetch Fill Find Format "
    "Generate Get Handle Initialize Insert Interpolate Invoke Join Load Log Make Map Merge Move "
    "Multiply Open Parse Perform Prepare Print Provide Put Raise Read Reduce Register Remove "
    "Replace Reset Return Round Run Sample Save Search Select Send Set Show Solve Sort Split Start "
    "Stop Test Transform Update Use Validate Wait Wrap Write"
).split()


def _commands(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """A summary that is a command, and one that isn't as wrong one, as long within a character. One
    of them is the docstring's own.
    """
    for record in _summary(doc, docs, rng):
        own, is_command = doc.summary, _is_command(doc.summary)
        others = [other.summary for other in rng.sample(docs, min(512, len(docs)))]

        for other in others:
            if _is_command(other) != is_command and abs(len(other) - len(own)) <= 1:
                answer, wrong = (own, other) if is_command else (other, own)
                yield record | dict(answer=answer, wrong=wrong, own=own)
                break


def _is_command(summary: str) -> bool:
    return summary.split(" ", 1)[0] in VERBS


def _which_summary(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """Which of four summaries of a library belongs to a docstring's body."""
    for record in _summary(doc, docs, rng):
        others = rng.sample(docs, min(64, len(docs)))
        others = [o.summary for o in others if o.library == doc.library and len(o.summary) <= 100]
        choices = list(dict.fromkeys([doc.summary, *others]))[:4]
        if len(choices) == 4:
            yield _choice(rng, choices) | dict(excerpt=shortened(record["excerpt"], 200))


def _which_parameter(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """Which of a function's parameters a description is about."""
    entries = []
    for entry in doc.entries.get("Parameters", ()):
        if entry.name.isidentifier() and len(entry.description) >= 20:
            entries.append(entry)

    if len(entries) >= 3:
        first, *others = rng.sample(entries, min(4, len(entries)))
        choices = list(dict.fromkeys([first.name, *(entry.name for entry in others)]))
        description = shortened(first.description, BLOCK_CHARS)
        yield _choice(rng, choices) | dict(head=doc.head.strip(), description=description)


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _choice(rng: random.Random, choices: Sequence[str]) -> dict:
    """Choices in random order, the first of which is right."""
    order = rng.sample(range(len(choices)), len(choices))
    return dict(choices=[choices[i] for i in order], label=order.index(0))


# Questions about a function, whose answers are spans of its docstring.

# kind -> (title of its section, questions that ask it)
_QUESTIONS = {
    "type": ("Parameters", ("What is the type of {}?", "Which type does {} have?")),
    "meaning": ("Parameters", ("What is {}?", "What does the parameter {} stand for?")),
    "default": ("Parameters", ("What is the default of {}?", "Which value has {} by default?")),
    "returned type": ("Returns", ("What is the type of the result?", "Which type is returned?")),
    "returned": ("Returns", ("What is returned?", "What does the function return?")),
    "exception": ("Raises", ("Which exception may be raised?", "What does it raise?")),
}


def _questions(doc: Docstring, docs: Docstrings, rng: random.Random) -> Iterator[dict]:
    """Questions of all kinds about a function."""
    asked = list(_asked(doc, _QUESTIONS))
    yield from rng.sample(asked, min(QUESTIONS_PER_DOCSTRING, len(asked)))


def _asked(doc: Docstring, kinds: Collection[str]) -> Iterator[dict]:
    """Yields all questions of these kinds whose answers are short, and stand in an excerpt."""
    for kind in kinds:
        title, wordings = _QUESTIONS[kind]
        entries = doc.entries.get(title, ())
        for number, entry in enumerate(entries):
            # Of several results or exceptions nobody knows which is meant.
            if title == "Parameters" and not entry.name.isidentifier():
                continue
            if title != "Parameters" and len(entries) > 1:
                continue

            answer = _answer(kind, entry)
            if not 1 <= len(answer) <= ANSWER_CHARS:
                continue

            excerpt = doc.excerpt(title, number)
            if answer in excerpt:
                question = wordings[number % len(wordings)].format(entry.name)
                yield dict(excerpt=excerpt, question=question, answer=answer, kind=kind)


def _answer(kind: str, entry: Entry) -> str:
    """The span of an entry that answers a question; "": there is none."""
    if kind in ("type", "returned type"):
        return _TYPE_END.sub("", entry.type).strip(" ,.")
    if kind == "exception":
        return entry.name or entry.type
    if kind == "default":
        found = _DEFAULT.search(f"{entry.type} {entry.description}")
        return found[1] if found else ""

    # A sentence says what something is.
    sentence = re.split(r"[.;:](?=\s|$)", entry.description)[0]
    return sentence if " " in sentence else ""


def _with_wrong_answers(records: Sequence[dict]) -> Iterator[dict]:
    """Yields records with a wrong answer that is as long as the right one, within a character: one
    of the same docstring, that of another one to a question of this kind, or another span of the
    excerpt.
    """
    by_length: dict[tuple, list[str]] = {}
    by_name: dict[str, list[str]] = {}
    for record in records:
        answer = record["answer"]
        by_length.setdefault((record["kind"], len(answer)), []).append(answer)
        by_name.setdefault(record["name"], []).append(answer)

    for number, record in enumerate(records):
        answer = record["answer"]
        rng = random.Random(f"{number} {record['name']}")

        pool: list[str] = []
        for length in range(len(answer) - 1, len(answer) + 2):
            pool += by_length.get((record["kind"], length), ())
        # As frequent as they are: a rare answer is no likelier to be wrong.
        others = rng.choices(pool, k=8)

        sets = []
        for spans in (by_name[record["name"]], others, _spans(record["excerpt"], len(answer))):
            wrong = [span for span in spans if _is_wrong(span, answer)]
            if wrong:
                sets.append(wrong)

        if sets:
            yield record | dict(wrong=rng.choice(rng.choice(sets)))


def _spans(text: str, length: int) -> list[str]:
    """The words of a line that are together `length` characters long, within one."""
    spans = []
    for line in text.split("\n"):
        words = list(re.finditer(r"[^\s.,;:]+", line))
        for i, first in enumerate(words):
            for last in words[i:]:
                if abs(last.end() - first.start() - length) <= 1:
                    spans.append(line[first.start() : last.end()])
    return spans


def _is_wrong(span: str, answer: str) -> bool:
    one, other = span.casefold(), answer.casefold()
    return abs(len(span) - len(answer)) <= 1 and one not in other and other not in one


# What tasks read.

FAMILIES: dict[str, Family] = {
    "library": _library,
    "section": _section,
    "optional": _optional,
    "has_parameter": _has_parameter,
    "parameter_type": _parameter_type,
    "first_parameter": _first_parameter,
    "raises": _raises,
    "name": _name,
    "summary": _summary,
    "commands": _commands,
    "which_summary": _which_summary,
    "which_parameter": _which_parameter,
    "questions": _questions,
}


def load(split: str, family: str, data_dir: str = "") -> list[dict]:
    """Returns the records of a family.

    Args:
      split: train, validation or test.
      family: of `FAMILIES`.
      data_dir: where pydocs is prepared; "": `DATA_DIR`.

    Raises:
      ValueError: an unknown family or split.
    """
    if family not in FAMILIES:
        raise ValueError(f"source.pydocs = {family!r}; valid: {list(FAMILIES)}")
    return records(_docstrings(split, data_dir or DATA_DIR), family)


@functools.lru_cache(maxsize=len(pydocs.SPLITS))
def _docstrings(split: str, data_dir: str) -> list[Docstring]:
    return list(map(parse, pydocs.pydocs(split, data_dir=data_dir)))


def records(docs: Docstrings, family: str) -> list[dict]:
    """Returns the records of a family from docstrings, each with the name of its own."""
    found = []
    for doc in docs:
        # Its own, so that other docstrings don't change what is asked about this one.
        rng = random.Random(f"{family} {doc.name}")
        for record in FAMILIES[family](doc, docs, rng):
            found.append(record | dict(name=doc.name))

    return list(_with_wrong_answers(found)) if family == "questions" else found
