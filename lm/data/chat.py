"""Chat templates: a conversation as the text that an instruction-tuned model was trained on.

The templates of Hugging Face checkpoints are Jinja. They run in its sandbox, in a process of their
own.
"""

import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lm import files, limited
from lm.data import tokenizer_files
from lm.data.tokenizer import Tokenizer

# Starting a process takes as long as rendering hundreds; its time and its answer have limits.
CONVERSATIONS_PER_PROCESS = 1024
CHARACTERS_PER_PROCESS = 2**21
TEMPLATES_FOLDER = pathlib.Path(__file__).parent / "chat_templates"
# Templates that lm has, for models without one -> the tokens that they need beside BOS and EOS.
SHIPPED: dict[str, tuple[str, ...]] = {
    "plain": (),
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


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


def with_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Returns the tokenizer with a chat template.

    Args:
      name: config.chat.template: one of `SHIPPED`, the path of a Jinja file, or "": its own.

    Raises:
      ValueError: it has none of its own, there is no such file, or it lacks tokens.
    """
    if not name:
        if template(tokenizer):
            return tokenizer
        raise ValueError(
            "config.chat.template is empty, and the tokenizer has no chat template; wanted one of "
            f"{list(SHIPPED)}, or the path of a Jinja file"
        )
    if name not in SHIPPED:
        file = epath.Path(files.expand(name))
        if not file.exists():
            raise ValueError(
                f"config.chat.template = {name!r} is no file; wanted one, or of {list(SHIPPED)}"
            )
        return tokenizer.with_chat_template(files.read_text(str(file)))

    lacking = [text for text in SHIPPED[name] if text not in tokenizer.special]
    if lacking:
        reserve = "turns" if name == "chatml" else f"turns:{name}"
        raise ValueError(
            f"config.chat.template = {name!r} needs the tokens {lacking}, which the tokenizer "
            f"{tokenizer.fingerprint} lacks: config.tokenizer.reserve = {reserve!r} adds them, and "
            "config.init_resize = True gives them rows in the model's tables"
        )
    source = (TEMPLATES_FOLDER / f"{name}.jinja").read_text()
    return tokenizer.with_chat_template(source)


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns bos_token, eos_token and so on, as the tokenizer's files or its class spell them."""
    if tokenizer.files.keys() - {"chat_template.jinja"}:
        return tokenizer_files.special_tokens(tokenizer.files)

    texts = {special_id: text for text, special_id in tokenizer.special.items()}
    tokens = {}
    for role in ("bos", "eos", "unk", "pad"):
        for special_id in tokenizer.roles.get(role, ()):
            if special_id in texts:
                tokens[f"{role}_token"] = texts[special_id]
    return tokens


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of rendered conversations, whose special tokens are spelt out."""
    if tokenizer.files.keys() - {"chat_template.jinja"}:
        return tokenizer.encode_batch(texts)

    # Tokenizers that are made here take them for text.
    spelt = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True)))
    encoded = []
    for text in texts:
        ids: list[int] = []
        for part in re.split(f"({spelt})", text):
            if part in tokenizer.special:
                ids.append(tokenizer.special[part])
            elif part:
                ids += tokenizer.encode(part)
        encoded.append(ids)
    return encoded


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
    marks: tuple[str, str] = ("", ""),
    tools_each: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
) -> list[str]:
    """Returns what `render` does for each conversation, faster than one by one.

    Args:
      marks: stand around what the template encloses in {% generation %}.
      tools_each: in place of tools, those of each conversation.
    """
    if not importlib.util.find_spec("jinja2"):
        raise ValueError("chat templates need the package jinja2: pip install -e '.[hf]'")
    texts: list[str] = []
    try:
        characters_each = len(json.dumps([tools, documents]))
        for batch, batch_tools in _batches(conversations, tools_each, characters_each):
            texts += limited.call(
                "lm.data.templates:render_all",
                source=source,
                conversations=batch,
                tokens=dict(tokens),
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                marks=marks,
                tools_each=batch_tools,
            )
    except ValueError as error:
        raise ValueError(f"the chat template fails: {error}") from None
    return texts


def _batches(
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    tools_each: Sequence | None,
    characters_each: int,
) -> Iterator[tuple[list[list], list | None]]:
    """Conversations with their tools, by so many as a process renders.

    Args:
      characters_each: of what stands in each of them beside its messages and its own tools.
    """
    start, characters = 0, 0
    for i, messages in enumerate(conversations, 1):
        own_tools = tools_each[i - 1] if tools_each else None
        characters += len(json.dumps([messages, own_tools])) + characters_each
        is_full = i - start == CONVERSATIONS_PER_PROCESS or characters > CHARACTERS_PER_PROCESS
        if is_full or i == len(conversations):
            batch = [list(messages) for messages in conversations[start:i]]
            yield batch, list(tools_each[start:i]) if tools_each else None
            start, characters = i, 0
