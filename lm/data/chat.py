"""Chat templates: a conversation as the text that an instruction-tuned model was trained on. They
are Jinja, and run in its sandbox.
"""

import datetime
import json
from collections.abc import Mapping, Sequence

from lm.data.tokenizer import Tokenizer


def template(tokenizer: Tokenizer) -> str | None:
    """The chat template in a checkpoint's tokenizer files; None if there is none."""
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode()
    found = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}")).get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((one["template"] for one in found if one["name"] == "default"), None)
    return found


def render(
    source: str,
    messages: Sequence[Mapping[str, str]],
    *,
    tokens: Mapping[str, str | None],
    add_generation_prompt: bool = True,
) -> str:
    """The conversation, up to where the model is to answer with `add_generation_prompt`.

    Args:
      messages: {"role": system | user | assistant, "content": ...} each.
      tokens: bos_token and the like, which templates may spell out.

    Raises:
      ValueError: a template that is no Jinja, or refuses the messages.
    """
    try:
        import jinja2
        from jinja2 import sandbox
    except ImportError:
        raise ValueError("chat templates need the package jinja2: pip install 'lm[hf]'") from None

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(
        x, ensure_ascii=False, indent=indent
    )
    environment.globals |= dict(
        raise_exception=refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form)
    )
    try:
        return environment.from_string(source).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **tokens
        )
    except jinja2.exceptions.TemplateError as error:
        raise ValueError(f"the chat template fails: {error}") from None


def special_tokens(tokenizer: Tokenizer) -> dict[str, str | None]:
    """bos_token, eos_token and so on, as tokenizer_config.json spells them."""
    about = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    text = lambda token: token.get("content") if isinstance(token, dict) else token
    return {
        name: text(token)
        for name, token in about.items()
        if name.endswith("_token") and isinstance(text(token), str)
    }
