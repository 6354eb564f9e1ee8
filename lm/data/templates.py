"""Jinja's sandbox for the chat templates of Hugging Face checkpoints.

The sandbox keeps a template from Python's objects, not from loops or large strings: `lm.data.chat`
runs this in a process with limits, which imports nothing else of lm.
"""

import datetime
import json
from collections.abc import Mapping, Sequence


def render(
    source: str,
    messages: Sequence[Mapping[str, str]],
    tokens: Mapping[str, str | None],
    add_generation_prompt: bool,
) -> str:
    """Returns the conversation as text; see `lm.data.chat.render`.

    Raises:
      ValueError: a template that is no Jinja, or refuses the messages.
    """
    from jinja2.exceptions import TemplateError

    try:
        template = _sandbox().from_string(source)
        return template.render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **tokens
        )
    except (TemplateError, ArithmeticError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _sandbox():
    """Jinja's sandbox, with the functions and options that Hugging Face's templates count on."""
    from jinja2 import exceptions, sandbox

    def raise_exception(message):
        raise exceptions.TemplateError(message)

    def strftime_now(date_format):
        return datetime.datetime.now().strftime(date_format)

    def tojson(value, indent=None):
        # Jinja's own filter escapes HTML's signs, which a model has never seen escaped.
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= dict(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
