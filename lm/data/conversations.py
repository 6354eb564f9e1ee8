"""Conversations that a base model is tuned on, from the formats that people have them in.

    {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}        Hugging Face's
    {"conversations": [{"from": "human", "value": ...}, ...], "system": ...}     ShareGPT's
    {"instruction": ..., "input": ..., "output": ...}                           Alpaca's
    {"prompt": ..., "completion": ...}                                          text or messages
    {"prompt": ..., "chosen": ..., "rejected": ...}                             text or messages
    {"conversations": [...], "chosen": {"from": ..., "value": ...}, ...}        LLaMA-Factory's
    {"chosen": "\\n\\nHuman: ... \\n\\nAssistant: ...", "rejected": ...}        HH-RLHF's
    {"prompt": ..., "completion": ..., "label": true}                           KTO's

A format is known by its keys. Messages become token ids in lm/data/chat_ids.py.
"""

import collections
import contextlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lm import files, progress
from lm.data import records
from lm.data.sources import Documents, HeldOut, is_utf8_text

# What an example is: one conversation, a better and a worse one, or one with a verdict on its last
# answer.
KINDS = ("conversation", "pair", "judged")
ROLES = ("system", "developer", "user", "assistant", "tool")
# Other names of roles, ShareGPT's and the older ones of function calls.
_ROLES_ELSEWHERE = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class Example(NamedTuple):
    """What a model is tuned on at a time.

    Attributes:
      conversations: their messages; of a pair the chosen one's and the rejected one's.
      kind: of `KINDS`.
      value: judged: 1 for a good answer, -1 for a bad one; of a pair by how much more the chosen
        one is to score.
      tools: JSON schemas of what the model may call.
      name: where it stands, for reports.
      source: what it comes from, where it says so; metrics tell sources apart.
    """

    conversations: tuple[list[dict[str, Any]], ...]
    kind: str
    value: float
    tools: list | None
    name: str
    source: str

    @property
    def text(self) -> str:
        """Returns the prompt: examples with the same one are held out together."""
        texts = []
        for message in self.conversations[0]:
            if message["role"] == "assistant":
                break
            texts.append(message["content"] or "")
        return "\n".join(texts)


class Unusable(Exception):
    """An example that nothing can be learnt from. It is left out, and counted."""


def conversations(
    split: str, *, path: str, held_out: float, held_out_by: str = "hash"
) -> Documents:
    """Returns the examples of files, all of one kind.

    Examples that nothing can be learnt from are left out, and counted in the log: without an
    answer, with an empty one, with roles out of order, pairs of equal answers or of different
    prompts. What stands behind the last answer is cut off.

    Args:
      split, held_out, held_out_by: see `lm.data.sources.text`; "hash" is that of the prompt.
      path: a file, a folder or a glob pattern; .jsonl, .json, .csv or .tsv.

    Raises:
      ValueError: a record in none of the formats (file and number are named), examples of
        different kinds, or none at all; see `lm.data.sources.text`.
    """
    held_out_part = HeldOut(split, path, held_out, held_out_by)
    names = [f"*{ending}{packed}" for ending in records.FORMATS for packed in records.PACKED]
    found = files.find(path.replace("{split}", split), names)

    examples: list[Example] = []
    left_out = LeftOut()
    with progress.activity(f"reading {path}", len(found), "files") as reading:
        for file in reading.each(found):
            in_file: list[Example] = []
            for number, record in _numbered(file):
                name = f"{file}:{number}"
                try:
                    in_file.append(read(record, name, left_out))
                except Unusable as reason:
                    left_out.add(str(reason), name)
            examples += held_out_part.of_documents(in_file, file)

    left_out.log(path)
    return as_documents(examples, held_out_part)


def _numbered(file: str) -> Iterable[tuple[int, dict]]:
    """The records of a file with their numbers: of JSONL those of their lines."""
    if file.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        return files.read_jsonl(file)
    return enumerate(records.read_table(file), 1)


def as_documents(examples: Sequence[Example], held_out_part: HeldOut | None = None) -> Documents:
    """Returns examples of one kind as the documents of a split.

    Raises:
      ValueError: there are none, or of several kinds.
    """
    if not examples:
        raise held_out_part.error_without_documents() if held_out_part else ValueError("no example")
    kinds: dict[str, str] = {}  # -> the name of its first example
    for example in examples:
        kinds.setdefault(example.kind, example.name)
    if len(kinds) > 1:
        raise ValueError(f"examples of several kinds: {kinds}; wanted one, of {list(KINDS)}")
    if held_out_part:
        held_out_part.log()

    encoded = (json.dumps(example, ensure_ascii=False).encode() for example in examples)
    return Documents(examples, files.short_hash_of_parts(encoded), kind=examples[0].kind)


class LeftOut:
    """Counts what is left out, by its reason."""

    def __init__(self):
        self.counts: collections.Counter = collections.Counter()
        self._first: dict[str, str] = {}  # reason -> its first example

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self._first.setdefault(reason, name)

    def log(self, where: str) -> None:
        for reason, count in self.counts.most_common():
            first = self._first[reason]
            logging.warning("%s: %d left out: %s (first: %s)", where, count, reason, first)


# --- a record ---


def read(record: Mapping[str, Any], name: str, left_out: LeftOut) -> Example:
    """Returns the example that a record of any of the formats is.

    Args:
      name: where it stands.
      left_out: counts questions behind the last answer.

    Raises:
      ValueError: it is in none of them.
      Unusable: nothing can be learnt from it.
    """
    example = _example(record, name, left_out)
    if not is_utf8_text(json.dumps(example, ensure_ascii=False)):
        raise Unusable("it has characters that UTF-8 can't hold")
    return example


def _example(record: Mapping[str, Any], name: str, left_out: LeftOut) -> Example:
    """See `read`."""
    tools = _tools(record.get("tools"), name)
    source = record.get("source")
    about = dict(tools=tools, name=name, source=source if isinstance(source, str) else "")

    if "chosen" in record and "rejected" in record:
        chosen, rejected = _pair(record, name, left_out)
        margin = _margin(record.get("margin"), name)
        return Example((chosen, rejected), "pair", margin, **about)

    messages = _answered(_messages_of(record, name), name, left_out)

    label = record.get("label")
    if label is None:
        return Example((messages,), "conversation", 0.0, **about)
    # Of a CSV it is a text.
    label = _LABELS.get(label.lower(), label) if isinstance(label, str) else label
    if not isinstance(label, (bool, int)) or label not in (0, 1):
        raise ValueError(f"{name}: label is {label!r:.60}; wanted true for a good answer, or false")
    return Example((messages,), "judged", 1.0 if label else -1.0, **about)


_LABELS = {"true": True, "1": True, "false": False, "0": False}


def _messages_of(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages of a record that has one conversation."""
    system = _system(record, name)
    if "messages" in record:
        return system + _messages(record["messages"], name, "messages")
    if "conversations" in record:
        return system + _messages(record["conversations"], name, "conversations")
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        return system + _turns(prompt, "user", name) + _turns(completion, "assistant", name)
    if "instruction" in record and "output" in record:
        return _alpaca(record, name)
    raise ValueError(
        f"{name} has the keys {sorted(record)}; wanted messages, conversations, instruction and "
        "output, prompt and completion, or chosen and rejected (lm/data/conversations.py)"
    )


def _system(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    system = record.get("system")
    return _turns(system, "system", name) if system else []


def _turns(value, role: str, name: str) -> list[dict[str, Any]]:
    """The messages of a text, of a message, or of a list of them."""
    if isinstance(value, str):
        return [dict(role=role, content=value)]
    return _messages([value] if isinstance(value, dict) else value, name, role)


def _dialogue(text: str) -> list[dict[str, Any]] | str:
    """The messages of a text that has all turns of a conversation, as Anthropic's HH-RLHF writes
    them; other texts as they are.
    """
    before, *parts = _TURN.split(text)
    if before or not parts:
        return text
    return [{"from": role.lower(), "value": said} for role, said in zip(parts[::2], parts[1::2])]


def _alpaca(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A question with its input apart too: Alpaca's own template puts a line between them."""
    instruction, given = record["instruction"] or "", record.get("input") or ""
    for key in ("instruction", "input", "output"):
        if not isinstance(record.get(key), (str, type(None))):
            raise ValueError(f"{name}: {key} is {record[key]!r:.60}; wanted a text")
    content = f"{instruction}\n\n{given}" if given else instruction

    question = dict(role="user", content=content, instruction=instruction, input=given)
    answer = dict(role="assistant", content=record.get("output"))
    return [*_system(record, name), question, answer]


def _pair(record: Mapping[str, Any], name: str, left_out: LeftOut) -> tuple[list, list]:
    """The chosen and the rejected conversation, which differ in their last answer alone."""
    if "prompt" in record:
        prompt = _turns(record["prompt"], "user", name)
    elif "messages" in record or "conversations" in record:
        prompt = _messages_of(record, name)
    else:
        # Alpaca's way, or the prompt is in the answers' messages.
        prompt = _alpaca(record, name)[:-1] if "instruction" in record else []
    sides = []
    for key in ("chosen", "rejected"):
        answer = record[key]
        if not prompt and isinstance(answer, str):
            answer = _dialogue(answer)
        turns = _turns(answer, "assistant", name)
        # Some sets have the prompt in the answers' messages too.
        has_prompt = bool(prompt) and turns[: len(prompt)] == prompt
        turns = turns if has_prompt else prompt + turns
        sides.append(_answered(turns, name, left_out))

    chosen, rejected = sides
    if chosen == rejected:
        raise Unusable("the chosen answer is the rejected one")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("the prompts of the chosen and the rejected answer differ")
    return chosen, rejected


def _margin(margin, name: str) -> float:
    if margin in (None, ""):
        return 0.0
    with contextlib.suppress(ValueError):
        margin = float(margin) if isinstance(margin, str) else margin
    is_number = isinstance(margin, (int, float)) and not isinstance(margin, bool)
    if not is_number or not math.isfinite(margin):
        raise ValueError(f"{name}: margin is {margin!r:.60}; wanted a number")
    return float(margin)


def _tools(tools, name: str) -> list | None:
    # Tables have them as JSON.
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError(f"{name}: tools is {tools!r:.60}; wanted JSON") from None
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list):
        raise ValueError(f"{name}: tools is {tools!r:.60}; wanted a list of JSON schemas")
    return tools


# --- messages ---


def _messages(value, name: str, key: str) -> list[dict[str, Any]]:
    """Messages with our names of roles, and texts as their contents."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"{name}: {key} is {value!r:.60}; wanted a list of messages")

    messages = []
    for turn in value:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = _ROLES_ELSEWHERE.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"{name}: the role {role!r:.60}; valid: {list(ROLES)}")
        others = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value")}
        # OpenAI's: whether an answer is learnt.
        if others.get("weight", 1) not in (0, 1):
            raise ValueError(f"{name}: weight is {others['weight']!r:.60}; wanted 0 or 1")
        messages.append(dict(role=role, content=_text(content, name)) | others)
    return messages


def _text(content, name: str) -> str | None:
    """The content of a message: a text, or a list of parts that are texts."""
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise Unusable("a message has a part that is no text")
            parts.append(part["text"])
        content = "".join(parts)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"{name}: a message's content is {content!r:.60}; wanted a text")
    return content


# role -> what it may follow; "" is the beginning.
_FOLLOWS = {
    "system": ("",),
    "developer": ("", "system"),
    "user": ("", "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _answered(messages: list[dict[str, Any]], name: str, left_out: LeftOut) -> list[dict[str, Any]]:
    """Messages that end with an answer, without an empty system message.

    Raises:
      Unusable: roles out of order, no answer, or an empty one.
    """
    kept = [m for m in messages if m["content"] or m["role"] not in ("system", "developer")]
    while kept and kept[-1]["role"] != "assistant":
        kept = kept[:-1]
    if not kept:
        raise Unusable("there is no answer")

    if messages[-1]["role"] != "assistant":
        left_out.add("questions behind the last answer", name)

    before = ""
    for message in kept:
        role, content = message["role"], message["content"] or ""
        if before not in _FOLLOWS[role]:
            raise Unusable("roles are out of order")
        if role == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise Unusable("an answer is empty")
        if role == "user" and not content.strip():
            raise Unusable("a question is empty")
        before = role

    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in kept):
        raise Unusable("all answers have the weight 0")
    return kept
