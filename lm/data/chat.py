"""Chat templates: a conversation as the text that an instruction-tuned model was trained on.

The templates of Hugging Face checkpoints are Jinja. They run in its sandbox, in a process of their
own.
"""

import importlib.util
from collections.abc import Mapping, Sequence

from lm import limited
from lm.data import tokenizer_files
from lm.data.tokenizer import Tokenizer


def template(tokenizer: Tokenizer) -> str | None:
    """Returns the chat template in a checkpoint's tokenizer files; None if there is none."""
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode("utf-8", errors="replace")

    # Older checkpoints: one template, or a list of {"name": ..., "template": ...}.
    config = tokenizer_files.parse_json(tokenizer.files, "tokenizer_config.json")
    templates = config.get("chat_template")
    if isinstance(templates, str):
        return templates
    for entry in templates if isinstance(templates, list) else []:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return str(entry.get("template", ""))
    return None


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns bos_token, eos_token and so on, as the tokenizer's files or its class spell them."""
    return tokenizer_files.special_tokens(tokenizer.files)


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
      ValueError: a template that is no Jinja, refuses the messages, or takes more time or memory
        than `lm.limited` gives; jinja2 isn't installed.
    """
    if not importlib.util.find_spec("jinja2"):
        raise ValueError("chat templates need the package jinja2: pip install -e '.[hf]'")
    try:
        return limited.call(
            "lm.data.templates:render",
            source=source,
            messages=list(messages),
            tokens=dict(tokens),
            add_generation_prompt=add_generation_prompt,
        )
    except ValueError as error:
        raise ValueError(f"the chat template fails: {error}") from None
