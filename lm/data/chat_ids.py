"""Conversations as token ids, with the tokens that are learnt.

A conversation is rendered by its template. What the assistant says is learnt, with the token that
ends its turn: what the template encloses in {% generation %}, or else what it writes more for an
answer than for the prompt before it. A template that writes earlier turns in another way once later
ones follow gets a row for each answer.

Special tokens are those that the template writes. One that is spelt out in a message is text. A
prompt has the same ids whatever follows it, and as when the model is asked.
"""

import bisect
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data import chat
from lm.data.tokenizer import Tokenizer

LEARNT = ("answers", "last_answer")
# Characters for private use: one that no text has is put into special tokens that messages spell
# out, two others around what is learnt.
_PRIVATE = range(0xE000, 0xF8FF)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Messages = Sequence[Mapping[str, Any]]


class Encoded(NamedTuple):
    """A row's worth of a conversation."""

    ids: np.ndarray  # int32 [T]
    is_learnt: np.ndarray  # bool [T]


class Span(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    is_learnt: bool


class Piece(NamedTuple):
    """A special token that a span has, or a text between two of them."""

    text: str
    number: int  # of its span
    is_special: bool


class ChatEncoder:
    """Encodes conversations.

    Args:
      tokenizer: one with a chat template.
      learnt: config.chat.learnt, of `LEARNT`.
    """

    def __init__(self, tokenizer: Tokenizer, learnt: str):
        self._tokenizer = tokenizer
        self._learnt = learnt
        self._tokens = chat.special_tokens(tokenizer)
        texts = sorted(tokenizer.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def encode(
        self, conversations: Sequence[Messages], tools: Sequence[list | None] | None = None
    ) -> list[list[Encoded]]:
        """Returns each conversation's rows: one, or one for each answer.

        Args:
          tools: of each of them JSON schemas of what the model may call; of all or of none.

        Raises:
          ValueError: a template that refuses them, or writes a prompt otherwise once its answer
            follows.
        """
        source = chat.template(self._tokenizer, with_tools=bool(tools))
        guard, begin, end = _unused(source + json.dumps([conversations, tools], ensure_ascii=False))
        conversations = [self._guarded(messages, guard) for messages in conversations]
        tools = self._guarded(tools, guard) or [None] * len(conversations)
        options = dict(tokens=self._tokens, add_generation_prompt=False)

        if _GENERATION.search(source):
            rows = self._by_marks(source, conversations, tools, (begin, end), options)
        else:
            rows = self._by_prefixes(source, conversations, tools, options)

        encoded = []
        for rows_of_conversation in rows:
            encoded.append([self._encoded(spans, guard) for spans in rows_of_conversation])
        return encoded

    def prompt(self, messages: Messages) -> list[int]:
        """Returns the ids of a conversation that the model is to answer.

        Raises:
          ValueError: a template that refuses it.
        """
        (ids,) = self.prompts([messages])
        return ids

    def prompts(self, conversations: Sequence[Messages]) -> list[list[int]]:
        """Returns what `prompt` does for each conversation, faster than one by one."""
        source = chat.template(self._tokenizer)
        guard, *_ = _unused(source + json.dumps(conversations, ensure_ascii=False))
        guarded = [self._guarded(messages, guard) for messages in conversations]
        texts = chat.render_all(source, guarded, tokens=self._tokens)
        return [self._encoded([Span(text, False)], guard).ids.tolist() for text in texts]

    def _guarded(self, value, guard: str):
        """A message with a guard in each special token that it spells out."""
        if isinstance(value, str):
            return self._special.sub(lambda found: guard.join(found[0]), value)
        if isinstance(value, Mapping):
            return {name: self._guarded(item, guard) for name, item in value.items()}
        if isinstance(value, Sequence):
            return [self._guarded(item, guard) for item in value]
        return value

    def _answers(self, messages: Messages) -> list[int]:
        """The numbers of the answers that are learnt."""
        answers = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("weight", 1):
                answers.append(i)
        return answers[-1:] if self._learnt == "last_answer" else answers

    def _turns(
        self,
        source: str,
        conversations: Sequence[Messages],
        tools: Sequence[list | None],
        marks: tuple[str, str],
        options: Mapping[str, Any],
    ) -> Iterator[list[tuple[str, str]]]:
        """Yields, for each conversation, of each answer the prompt, and that with the answer."""
        prompts, answered, tools_each = [], [], []
        for messages, own_tools in zip(conversations, tools):
            for i in self._answers(messages):
                prompts.append(messages[:i])
                answered.append(messages[: i + 1])
                tools_each.append(own_tools)
        options = dict(options, tools_each=tools_each if any(tools_each) else None)
        wholes = iter(chat.render_all(source, answered, marks=marks, **options))
        options["add_generation_prompt"] = True
        starts = iter(chat.render_all(source, prompts, **options))
        for messages in conversations:
            yield [(next(starts), next(wholes)) for _ in self._answers(messages)]

    def _by_marks(
        self,
        source: str,
        conversations: Sequence[Messages],
        tools: Sequence[list | None],
        marks: tuple[str, str],
        options: Mapping[str, Any],
    ) -> list[list[list[Span]]]:
        """The spans of each conversation's rows, by the marks around what is learnt."""
        rows = []
        all_turns = self._turns(source, conversations, tools, marks, options)
        for messages, turns in zip(conversations, all_turns, strict=True):
            _, last = turns[-1]
            # The marks around an answer that isn't learnt look as the others do.
            is_one_row = all(message.get("weight", 1) for message in messages)
            is_one_row = is_one_row and all(last.startswith(whole) for _, whole in turns)
            if is_one_row and self._learnt == "answers":
                rows.append([_behind_prompts(_marked(last, *marks), [start for start, _ in turns])])
                continue
            spans = [_behind_prompts(_marked(whole, *marks), [start]) for start, whole in turns]
            rows.append(list(map(_only_last, spans)))
        return rows

    def _by_prefixes(
        self,
        source: str,
        conversations: Sequence[Messages],
        tools: Sequence[list | None],
        options: Mapping[str, Any],
    ) -> list[list[list[Span]]]:
        """The spans of each conversation's rows, by what an answer adds to its prompt."""
        rows = []
        for turns in self._turns(source, conversations, tools, ("", ""), options):
            for start, whole in turns:
                if not whole.startswith(start):
                    raise ValueError(
                        "the chat template writes the prompt otherwise once its answer follows: "
                        f"{start[-60:]!r}, then {whole[: len(start)][-60:]!r}. {{% generation %}} "
                        "and {% endgeneration %} in it say what is learnt"
                    )
            rows.append(_rows_of_turns(turns))
        return rows

    def _encoded(self, spans: Sequence[Span], guard: str) -> Encoded:
        """The ids of spans, which are one text."""
        ids: list[int] = []
        numbers: list[int] = []  # of each id's span
        groups = [list(group) for _, group in itertools.groupby(self._pieces(spans), _is_special)]
        for i, group in enumerate(groups):
            if group[0].is_special:
                ids += [self._tokenizer.special[piece.text] for piece in group]
                numbers += [piece.number for piece in group]
                continue

            # What a text is tokenized to may depend on the special tokens around it.
            before = groups[i - 1][-1].text if i else ""
            after = groups[i + 1][0].text if i + 1 < len(groups) else ""
            for text_ids, number in self._encode_section(before, group, after, guard):
                ids += text_ids
                numbers += [number] * len(text_ids)

        return Encoded(np.asarray(ids, np.int32), self._learnt_ids(ids, numbers, spans))

    def _pieces(self, spans: Sequence[Span]) -> Iterator[Piece]:
        """Yields special tokens, and the texts between them."""
        for number, span in enumerate(spans):
            start = 0
            for found in self._special.finditer(span.text):
                if found.start() > start:
                    yield Piece(span.text[start : found.start()], number, False)
                yield Piece(found[0], number, True)
                start = found.end()
            if start < len(span.text):
                yield Piece(span.text[start:], number, False)

    def _encode_section(
        self, before: str, pieces: Sequence[Piece], after: str, guard: str
    ) -> Iterator[tuple[list[int], int]]:
        """Yields (ids, number of the span) of the texts between two special tokens: each as it is
        tokenized behind those before it, whose ids it doesn't change.
        """
        left, left_ids = "", []
        for i, (text, number, _) in enumerate(pieces):
            behind = after if i == len(pieces) - 1 else ""
            added = _behind(left_ids, self._encode(before, left + text, behind, guard))
            if added is None:
                added = self._encode_behind_others(text, behind, guard)
            yield added, number
            left, left_ids = left + text, left_ids + added

    def _encode(self, before: str, text: str, after: str, guard: str) -> list[int]:
        if guard in text and before:
            return self._encode_behind_others(text, after, guard)
        if guard in text:
            return self._tokenizer.encode_literally(text.replace(guard, ""))
        return self._tokenizer.encode_between(before, text, after)

    def _encode_behind_others(self, text: str, after: str, guard: str) -> list[int]:
        """The ids of a text that isn't the first one, whatever stands before it."""
        # Most tokenizers begin anew behind a line's end, or a word.
        for start in ("\n", "a"):
            if guard in text:
                start_ids = self._tokenizer.encode_literally(start)
                ids = self._tokenizer.encode_literally(start + text.replace(guard, ""))
            else:
                start_ids = self._tokenizer.encode_between("", start, "")
                ids = self._tokenizer.encode_between("", start + text, after)
            added = _behind(start_ids, ids)
            if added is not None:
                return added
        return self._encode("", text, after, guard)

    def _learnt_ids(
        self, ids: Sequence[int], numbers: Sequence[int], spans: Sequence[Span]
    ) -> np.ndarray:
        """Which ids are learnt: those of the learnt spans, each with what ends its turn.

        Behind that a span may have what the template writes between turns, which the model needn't
        write.
        """
        is_learnt = np.zeros(len(ids), bool)
        learnt = [number for number in sorted(set(numbers)) if spans[number].is_learnt]

        for number in learnt[-1:] if self._learnt == "last_answer" else learnt:
            start = bisect.bisect_left(numbers, number)
            end = bisect.bisect_right(numbers, number)

            stops = [i for i in range(start, end) if ids[i] in self._tokenizer.stop_ids]
            if stops:
                end = stops[-1] + 1
            elif not stops and end < len(ids) and ids[end] in self._tokenizer.stop_ids:
                end += 1
            is_learnt[start:end] = True

        return is_learnt


def _is_learnt(span: Span) -> bool:
    return span.is_learnt


def _is_special(piece: Piece) -> bool:
    return piece.is_special


def _behind(start: list[int], ids: list[int]) -> list[int] | None:
    """What ids have more than their start; None if that isn't their start."""
    return ids[len(start) :] if ids[: len(start)] == start else None


def _unused(text: str) -> list[str]:
    """Three characters for private use that are not in a text."""
    used = set(text)
    unused = [chr(code) for code in _PRIVATE if chr(code) not in used]
    if len(unused) < 3:
        raise ValueError("a conversation has all characters for private use (U+E000 to U+F8FE)")
    return unused[:3]


def _marked(text: str, begin: str, end: str) -> list[Span]:
    """The spans of a text with marks around what is learnt."""
    spans = []
    for i, part in enumerate(text.split(begin)):
        if i:
            learnt, _, part = part.partition(end)
            spans.append(Span(learnt, True))
        spans.append(Span(part, False))
    return spans


def _behind_prompts(spans: Sequence[Span], prompts: Sequence[str]) -> list[Span]:
    """Spans of which nothing is learnt that a prompt has: some templates enclose the end of the
    line before an answer, which the model is given.
    """
    whole = "".join(span.text for span in spans)
    ends = [len(prompt) for prompt in prompts if whole.startswith(prompt)]
    cut, position = [], 0
    for text, is_learnt in spans:
        # How much of a learnt span its prompt has.
        within = [end - position for end in ends if position < end < position + len(text)]
        given = max(within, default=0) if is_learnt else len(text)
        cut += [Span(text[:given], False), Span(text[given:], is_learnt)]
        position += len(text)

    # What isn't learnt is one text, and tokenized as one.
    joined = []
    for is_learnt, group in itertools.groupby(filter(lambda span: span.text, cut), _is_learnt):
        group = list(group)
        joined += group if is_learnt else [Span("".join(span.text for span in group), False)]
    return joined


def _only_last(spans: Sequence[Span]) -> list[Span]:
    """Spans of which the last one that is learnt still is. What stands before it is one text, as
    when the model is asked.
    """
    learnt = [i for i, span in enumerate(spans) if span.is_learnt]
    last = learnt[-1] if learnt else len(spans)
    before = "".join(span.text for span in spans[:last])
    return [Span(before, False), *spans[last:]]


def _rows_of_turns(turns: Sequence[tuple[str, str]]) -> list[list[Span]]:
    """The spans of a conversation's rows.

    Args:
      turns: of each answer the prompt, and that with the answer.
    """
    _, whole = turns[-1]
    if not all(whole.startswith(part) for _, part in turns):
        return [[Span(start, False), Span(part[len(start) :], True)] for start, part in turns]

    spans, position = [], 0
    for start, part in turns:
        spans.append(Span(whole[position : len(start)], False))
        spans.append(Span(whole[len(start) : len(part)], True))
        position = len(part)
    return [spans]
