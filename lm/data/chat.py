"""Chat templates: a conversation as the text that an instruction-tuned model was trained on.

The templates of Hugging Face checkpoints are Jinja. They run in its sandbox, in a process of their
own.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from lm import limited
from lm.data import tokenizer_files
from lm.data.tokenizer import Tokenizer

# Starting a process takes as long as rendering some of them; its time and its answer have limits.
CONVERSATIONS_PER_PROCESS = 128


def template(tokenizer: Tokenizer, *, with_tools: bool = False) -> str | None:
    """Returns the chat template in a checkpoint's tokenizer files; None if there is none.

    Args:
      with_tools: takes the one named tool_use, where there are several.

    Raises:
      ValueError: there are several, none of which is named default.
    """
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode("utf-8", errors="replace")

    # Older checkpoints: one template, or a list of {"name": ..., "template": ...}.
    config = tokenizer_files.parse_json(tokenizer.files, "tokenizer_config.json")
    templates = config.get("chat_template")
    if templates is None or isinstance(templates, str):
        return templates

    by_name = {}
    for entry in templates if isinstance(templates, list) else []:
        if isinstance(entry, dict):
            by_name[entry.get("name")] = entry.get("template")
    name = "tool_use" if with_tools and "tool_use" in by_name else "default"
    if not isinstance(by_name.get(name), str):
        raise ValueError(
            f"tokenizer_config.json has the chat templates {sorted(map(str, by_name))}; wanted one "
            "named default: rename one, or write it to chat_template.jinja beside it"
        )
    return by_name[name]


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns bos_token, eos_token and so on, as the tokenizer's files or its class spell them."""
    return tokenizer_files.special_tokens(tokenizer.files)


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tokens: Mapping[str, str | None],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Returns the conversation as text, as transformers' apply_chat_template does.

    Args:
      source: the template's text.
      messages: {"role": system | user | assistant, "content": ...} each, JSON-able; what else is in
        them is for the template.
      tokens: bos_token and the like, which templates may spell out.
      tools: JSON schemas of functions that the model may call.
      documents: {"title": ..., "text": ...} each, for templates that answer from them.
      add_generation_prompt: whether the text ends with what introduces the model's answer.

    Raises:
      ValueError: a template that is no Jinja, refuses the messages, or takes more time or memory
        than `lm.limited` gives; jinja2 isn't installed.
    """
    (text,) = render_all(
        source,
        [messages],
        tokens=tokens,
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
    )
    return text


def render_all(
    source: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    tokens: Mapping[str, str | None],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> list[str]:
    """Returns what `render` does for each conversation, faster than one by one."""
    if not importlib.util.find_spec("jinja2"):
        raise ValueError("chat templates need the package jinja2: pip install -e '.[hf]'")
    texts: list[str] = []
    try:
        for start in range(0, len(conversations), CONVERSATIONS_PER_PROCESS):
            texts += limited.call(
                "lm.data.templates:render_all",
                source=source,
                conversations=list(map(list, conversations[start:][:CONVERSATIONS_PER_PROCESS])),
                tokens=dict(tokens),
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
    except ValueError as error:
        raise ValueError(f"the chat template fails: {error}") from None
    return texts
