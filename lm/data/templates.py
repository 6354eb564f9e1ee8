"""Jinja's sandbox for the chat templates of Hugging Face checkpoints.

The sandbox keeps a template from Python's objects, not from loops or large strings: `lm.data.chat`
runs this in a process with limits, which imports nothing else of lm.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

# Names of what a model thinks before it answers. The first is the one that templates read, but for
# gpt-oss's, which read the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_all(
    source: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    tokens: Mapping[str, str | None],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    marks: Sequence[str] = ("", ""),
    tools_each: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
) -> list[str]:
    """Returns the conversations as texts; see `lm.data.chat.render_all`.

    Args:
      marks: stand around what {% generation %} encloses.
      tools_each: in place of tools, those of each conversation.

    Raises:
      ValueError: a template that is no Jinja, or refuses the messages.
    """
    where = ""
    try:
        template = _sandbox(*marks).from_string(source)
        texts: list[str] = []
        for number, messages in enumerate(conversations):
            where = f" (in the conversation that begins with {messages[:1]!r:.120})"
            text = template.render(
                messages=list(map(_with_reasoning, messages)),
                tools=tools_each[number] if tools_each else tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **tokens,
            )
            texts.append(text)
        return texts
    except Exception as error:  # whatever a stranger's template does
        raise ValueError(f"{str(error) or type(error).__name__}{where}") from None


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with its reasoning under both names that templates read."""
    for name in _REASONING:
        if message.get(name) is not None:
            reasoning = message[name]
            return {"thinking": reasoning} | message | {"reasoning_content": reasoning}
    return message


def _sandbox(begin: str, end: str):
    """Jinja's sandbox, with the functions and options that Hugging Face's templates count on."""
    from jinja2 import exceptions, ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}, around what the model is to learn to say."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call, so that what is set inside isn't set outside.
            call = self.call_method("_render")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _render(self, caller):
            return begin + caller() + end

    def raise_exception(message):
        raise exceptions.TemplateError(message)

    def strftime_now(date_format):
        return datetime.datetime.now().strftime(date_format)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML's signs, which a model has never seen escaped.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= dict(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
