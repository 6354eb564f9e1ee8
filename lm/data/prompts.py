"""Prompts that a model is to answer, without answers that it is to learn: what a rollout starts
from.

    {"prompt": "Return the ", ...}                                   a text that is continued
    {"prompt": [{"role": "user", "content": ...}, ...], ...}         messages that are answered

What else a record has (the right answer, a label) is for rewards. Beginnings of texts are prompts
too.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm import files, progress
from lm.data.chat_ids import ChatEncoder
from lm.data.conversations import ROLES, LeftOut
from lm.data.sources import Documents, HeldOut, is_utf8_text
from lm.data.tokenizer import Tokenizer

KIND = "prompt"


class Asked(NamedTuple):
    """A prompt.

    Attributes:
      prompt: a text, or messages.
      record: all that its line has.
      name: where it stands, for reports.
    """

    prompt: str | list[dict[str, Any]]
    record: Mapping[str, Any]
    name: str

    @property
    def text(self) -> str:
        """What is held out together: the text, or the messages' texts."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(str(message.get("content") or "") for message in self.prompt)


class EncodedPrompt(NamedTuple):
    """A prompt as the model reads it."""

    ids: tuple[int, ...]
    record: Mapping[str, Any]
    name: str


def jsonl(split: str, *, path: str, held_out: float, held_out_by: str = "hash") -> Documents:
    """Returns the prompts of JSONL files, an object with a prompt a line.

    Args:
      split, path, held_out, held_out_by: see `lm.data.sources.jsonl`.

    Raises:
      ValueError: an object without a prompt (file and line are named); see
        `lm.data.sources.jsonl`.
    """

    def read(record: dict, place: str) -> Asked:
        return Asked(_prompt(record, place), record, place)

    held_out_part = HeldOut(split, path, held_out, held_out_by)
    asked = held_out_part.of_jsonl(read)
    if not asked:
        raise held_out_part.error_without_documents()
    held_out_part.log()
    return as_documents(asked)


def as_documents(asked: Sequence[Asked]) -> Documents:
    """Returns prompts as the documents of a split."""
    # Not the names: files may move.
    contents = (json.dumps([a.prompt, a.record], ensure_ascii=False).encode() for a in asked)
    return Documents(asked, files.short_hash_of_parts(contents), kind=KIND)


def _prompt(record: Mapping[str, Any], place: str) -> str | list[dict[str, Any]]:
    """The prompt of a record.

    Raises:
      ValueError: there is none.
    """
    prompt = record.get("prompt")
    is_text = isinstance(prompt, str) and prompt
    is_messages = isinstance(prompt, list) and prompt and all(map(_is_message, prompt))
    if not is_utf8_text(json.dumps(record, ensure_ascii=False)):
        raise ValueError(f"{place} has characters that UTF-8 can't hold")
    if not (is_text or is_messages):
        raise ValueError(
            f"{place}: prompt is {prompt!r:.80}; wanted a text that isn't empty, or a list of "
            f'{{"role": one of {list(ROLES)}, "content": text}} (the object has {sorted(record)})'
        )
    return prompt


def _is_message(message) -> bool:
    is_known = isinstance(message, Mapping) and message.get("role") in ROLES
    return is_known and isinstance(message.get("content"), str)


def encode(asked: Documents, tokenizer: Tokenizer, *, room: int) -> Documents:
    """Returns the prompts as `EncodedPrompt`s. Those of more than `room` tokens are left out, and
    the log counts them. Equal prompts stay apart: each is a group of its own.

    Args:
      tokenizer: one with a chat template, where prompts are messages.

    Raises:
      ValueError: none is left, or a template that refuses one.
    """
    encoded: list[EncodedPrompt] = []
    left_out = LeftOut()

    messages = [item.prompt for item in asked if not isinstance(item.prompt, str)]
    of_messages = iter(ChatEncoder(tokenizer, "answers").prompts(messages) if messages else ())
    with progress.activity("encoding prompts", len(asked), "prompts") as encoding:
        for item in encoding.each(asked):
            is_text = isinstance(item.prompt, str)
            ids = tuple(tokenizer.prompt(item.prompt) if is_text else next(of_messages))
            if len(ids) > room:
                left_out.add(
                    "longer than config.data.length less config.rollout.max_new_tokens", item.name
                )
            else:
                encoded.append(EncodedPrompt(ids, item.record, item.name))
    return _as_encoded(asked, encoded, left_out)


def beginnings(
    documents: Documents, tokenizer: Tokenizer, *, num_tokens: int, room: int
) -> Documents:
    """Returns the first `num_tokens` tokens of texts, behind BOS, as `EncodedPrompt`s whose records
    have the texts' labels. Texts that end before are left out, and the log counts them.

    Raises:
      ValueError: none is left; prompts of more than `room` tokens.
    """
    before, _ = tokenizer.around
    if len(before) + num_tokens > room:
        raise ValueError(
            f"config.rollout.prompt_tokens = {num_tokens}, with {len(before)} before them: wanted "
            f"at most config.data.length less config.rollout.max_new_tokens = {room}"
        )

    encoded: list[EncodedPrompt] = []
    left_out = LeftOut()
    with progress.activity("encoding prompts", len(documents), "prompts") as encoding:
        for document in encoding.each(documents):
            ids = tokenizer.encode(document.text)
            if len(ids) <= num_tokens:
                left_out.add("ends within config.rollout.prompt_tokens", document.name)
                continue

            record = dict(label=document.label)
            prompt = (*before, *ids[:num_tokens])
            encoded.append(EncodedPrompt(prompt, record, document.name))
    return _as_encoded(documents, encoded, left_out)


def _as_encoded(
    documents: Documents, encoded: Sequence[EncodedPrompt], left_out: LeftOut
) -> Documents:
    left_out.log("prompts")
    if not encoded:
        raise ValueError(f"no prompt is left: {dict(left_out.counts)}")
    return dataclasses.replace(documents, items=encoded, kind=KIND)
