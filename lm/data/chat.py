"""Chat templates: a conversation as the text that an instruction-tuned model was trained on.

The templates of Hugging Face checkpoints are Jinja, and run in its sandbox.
"""

import datetime
import json
from collections.abc import Mapping, Sequence

from lm.data import tokenizer as tokenizers
from lm.data.tokenizer import Tokenizer


def template(tokenizer: Tokenizer) -> str | None:
    """Returns the chat template in a checkpoint's tokenizer files; None if there is none."""
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode()

    # Older checkpoints: one template, or a list of {"name": ..., "template": ...}.
    config = tokenizers.parse_json(tokenizer.files, "tokenizer_config.json")
    templates = config.get("chat_template")
    if not isinstance(templates, list):
        return templates
    for entry in templates:
        if entry["name"] == "default":
            return entry["template"]
    return None


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns bos_token, eos_token and so on, as tokenizer_config.json spells them."""
    config = tokenizers.parse_json(tokenizer.files, "tokenizer_config.json")
    texts = {}
    for name, token in config.items():
        text = tokenizers.token_text(token)
        # Settings such as add_bos_token end in _token too, but are no strings.
        if name.endswith("_token") and isinstance(text, str):
            texts[name] = text
    return texts


def render(
    source: str,
    messages: Sequence[Mapping[str, str]],
    *,
    tokens: Mapping[str, str | None],
    add_generation_prompt: bool = True,
) -> str:
    """Returns the conversation as text, up to where the model is to answer.

    Args:
      source: the template's text.
      messages: {"role": system | user | assistant, "content": ...} each.
      tokens: bos_token and the like, which templates may spell out.
      add_generation_prompt: whether the text ends with what introduces the model's answer.

    Raises:
      ValueError: a template that is no Jinja, or refuses the messages; jinja2 isn't installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ValueError("chat templates need the package jinja2: pip install 'lm[hf]'") from None

    environment = _sandbox()
    try:
        return environment.from_string(source).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **tokens
        )
    except jinja2.exceptions.TemplateError as error:
        raise ValueError(f"the chat template fails: {error}") from None


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
