"""From questions with examples to whole prompts: as plain text, or as a conversation in the
tokenizer's chat template.

`prompt` is config.evals.NAME.prompt, `name` the NAME, for messages.
"""

from collections.abc import Mapping, Sequence

from lm.data import chat
from lm.data.tokenizer import Tokenizer, prefix_ids
from lm.evals import prompts

FORMATS = ("text", "chat")

# (the text of a question, its answer)
Example = tuple[str, str]


class TextFormat:
    """Examples, each with the separator behind it, and the question.

    Attributes:
      space_is_text: whether what stands between a question and its answer is written in the
        templates, as here, and not by the format.
    """

    space_is_text = True

    def __init__(self, tokenizer: Tokenizer, separator: str):
        self._tokenizer = tokenizer
        self._separator = separator

    def around(self, examples: Sequence[Example]) -> tuple[str, str]:
        """(what stands before the question, what stands after it), to be read."""
        text = ""
        for question, answer in examples:
            text += question + answer + self._separator
        return text, ""

    def wrap(self, examples: Sequence[Example], questions: Sequence[str]) -> list[str]:
        """The whole prompt of each question, all of them after the same examples."""
        before, _ = self.around(examples)
        return [before + question for question in questions]

    def answer(self, text: str) -> str:
        """What the model is to say for an answer, with the space before it."""
        return text

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of whole prompts, with what follows them or without it."""
        return self._tokenizer.encode_batch(texts)

    def split(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """(ids that stay when the prompt is too long, the others), of the ids of a prompt."""
        return prefix_ids(self._tokenizer, ids), list(ids)


class ChatFormat:
    """Examples as turns of a conversation, and the question as the user's last message.

    The white space around an answer is what the template makes it. What the template writes before
    an answer that was not thought about, such as an empty block of thoughts, belongs to the prompt
    if `is_scored`: the answer is scored as it was trained.

    Args:
      system: the conversation's first message; "": none.
      is_scored: whether given answers are scored, and not the model's own ones read.

    Raises:
      ValueError: no chat template, or one that doesn't take such a conversation.
    """

    space_is_text = False

    def __init__(self, tokenizer: Tokenizer, system: str, name: str, *, is_scored: bool):
        self._tokenizer = tokenizer
        self._source = chat.template(tokenizer)
        if not self._source:
            raise ValueError(
                f"config.evals.{name}.prompt.format = 'chat', but the tokenizer has no chat "
                "template"
            )
        self._system = [dict(role="system", content=system)] if system else []
        self._before_answer, self._space = self._find_lead() if is_scored else ("", "")

    def _find_lead(self) -> tuple[str, str]:
        """What the template writes between a prompt and its answer: (text, spaces)."""
        conversation = self._conversation([], "question")
        (asked,) = self._render([conversation])
        answered = conversation + [dict(role="assistant", content="answer")]
        (whole,) = self._render([answered], add_generation_prompt=False)

        lead, found, _ = whole.removeprefix(asked).partition("answer")
        if not whole.startswith(asked) or not found:
            return "", ""
        text = lead.rstrip(" ")
        return text, lead[len(text) :]

    def _conversation(self, examples: Sequence[Example], question: str) -> list[dict[str, str]]:
        messages = list(self._system)
        for asked, answer in examples:
            messages.append(dict(role="user", content=asked))
            messages.append(dict(role="assistant", content=answer.strip()))
        return messages + [dict(role="user", content=question)]

    def _render(
        self, conversations: Sequence[list[dict]], add_generation_prompt: bool = True
    ) -> list[str]:
        return chat.render_all(
            self._source,
            conversations,
            tokens=chat.special_tokens(self._tokenizer),
            add_generation_prompt=add_generation_prompt,
        )

    def around(self, examples: Sequence[Example]) -> tuple[str, str]:
        """See `TextFormat.around`."""
        (text,) = self.wrap(examples, ["question"])
        before, _, after = text.rpartition("question")
        return before, after

    def wrap(self, examples: Sequence[Example], questions: Sequence[str]) -> list[str]:
        """See `TextFormat.wrap`."""
        conversations = [self._conversation(examples, question) for question in questions]
        return [text + self._before_answer for text in self._render(conversations)]

    def answer(self, text: str) -> str:
        """See `TextFormat.answer`."""
        return self._space + text.lstrip()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `TextFormat.encode_batch`."""
        return chat.encode(self._tokenizer, texts)

    def split(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """See `TextFormat.split`. The template writes BOS itself, where the model wants one."""
        num_bos = int(ids[:1] == [self._tokenizer.bos_id])
        return list(ids[:num_bos]), list(ids[num_bos:])


def make(
    tokenizer: Tokenizer, prompt: Mapping, name: str, *, is_scored: bool
) -> TextFormat | ChatFormat:
    """Returns what `prompt` says: format, system and separator.

    Args:
      is_scored: see `ChatFormat`.

    Raises:
      ValueError: an unknown format, a system message without a chat; see `ChatFormat`.
    """
    prompts.check_choice(name, "prompt.format", prompt["format"], FORMATS)
    if prompt["format"] == "chat":
        return ChatFormat(tokenizer, prompt["system"], name, is_scored=is_scored)
    if prompt["system"]:
        raise ValueError(
            f"config.evals.{name}.prompt.system needs config.evals.{name}.prompt.format = 'chat'"
        )
    return TextFormat(tokenizer, prompt["separator"])
