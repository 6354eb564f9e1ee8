"""Chat templates: the text of a conversation is transformers', for the templates that trl ships and
for what templates may do.
"""

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
import trl

from lm.data import chat, templates

TRL_TEMPLATES = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
TOKENS = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")

USER = {"role": "user", "content": "How warm is it in Bern & Ulm?"}
SYSTEM = {"role": "system", "content": " Be <brief>. \n"}
ANSWER = {"role": "assistant", "content": "é 20°\n"}
TOOL = {
    "type": "function",
    "function": {
        "name": "temperature",
        "description": "Says how warm it is.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "Its name."}},
            "required": ["town"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "temperature", "arguments": {"town": "Bern"}}}
TOOL_TURNS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "call12345"}]},
    {"role": "tool", "name": "temperature", "content": "20", "tool_call_id": "call12345"},
]
CONVERSATIONS = {
    "user": dict(messages=[USER]),
    "system": dict(messages=[SYSTEM, USER]),
    "turns": dict(messages=[SYSTEM, USER, ANSWER, USER]),
    "whole": dict(messages=[USER, ANSWER], add_generation_prompt=False),
    "thought": dict(messages=[USER, ANSWER | {"thinking": "Bern, Ulm"}, USER]),
    "tools": dict(messages=[SYSTEM, USER], tools=[TOOL]),
    "called": dict(messages=TOOL_TURNS, tools=[TOOL]),
    "documents": dict(messages=[USER], documents=[{"title": "Bern", "text": "20°"}]),
    "odd order": dict(messages=[ANSWER, ANSWER]),
}
HAND_MADE = {
    "none is defined": "{{ tools is defined }} {{ documents is none }} {{ other is defined }}",
    "loops": """{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}
{{ m.content }}{% endfor %}""",
    "namespace": """{% set n = namespace(x=0) %}
{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}""",
    "tojson": """{{ messages | tojson }}
{{ messages | tojson(ensure_ascii=True, indent=2, sort_keys=True) }}""",
    "separators": "{{ tools | tojson(separators=(',', ':')) }}",
    "generation": """{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}
{{ messages | length }}{% endgeneration %}{{ a }}""",
    "generation trimmed": "a \n {%- generation -%} \n b \n {%- endgeneration %}\nc",
    "strftime_now": "{{ strftime_now('%Y') }}",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ mask_token }}",
    "raises": "{{ raise_exception('no') }}",
    "a type error": "{{ messages + 1 }}",
    "no such filter": "{{ messages | nothing }}",
    "an attribute": "{{ messages.__class__ }}",
    "whitespace": "  {% if true %}\n  x\n  {% endif %}\n y {{- 1 }}\n\n",
}


@pytest.fixture(scope="module")
def tokenizer():
    model = tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), **TOKENS
    )


def render(source, messages, **arguments):
    """Ours, in this process."""
    (text,) = templates.render_all(source, [messages], TOKENS, **arguments)
    return text


def text_or_error(render, *args, **kwargs):
    try:
        return render(*args, **kwargs)
    except Exception:
        return "an error"


@pytest.mark.parametrize(
    "source",
    [
        *[pytest.param(path.read_text(), id=path.stem) for path in TRL_TEMPLATES],
        *[pytest.param(source, id=name) for name, source in HAND_MADE.items()],
    ],
)
def test_texts_are_those_of_transformers(tokenizer, source):
    num_texts = 0
    for name, conversation in CONVERSATIONS.items():
        arguments = dict(add_generation_prompt=True, tools=None, documents=None) | conversation
        messages = arguments.pop("messages")
        wanted = text_or_error(
            tokenizer.apply_chat_template,
            messages,
            chat_template=source,
            tokenize=False,
            **arguments,
        )
        text = text_or_error(render, source, messages, **arguments)
        assert text == wanted, name
        num_texts += text != "an error"
    assert num_texts or source in HAND_MADE.values()


def test_the_process_gives_the_same_text(tokenizer):
    """`chat.render` runs the template elsewhere: nothing is lost on the way."""
    source = HAND_MADE["tojson"]
    wanted = tokenizer.apply_chat_template(
        TOOL_TURNS, chat_template=source, tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert chat.render(source, TOOL_TURNS, tokens=TOKENS, tools=[TOOL]) == wanted


def test_templates_by_name(tokenizer):
    by_name = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    for tools in (None, [TOOL]):
        tokenizer.chat_template = {entry["name"]: entry["template"] for entry in by_name}
        wanted = tokenizer.get_chat_template(tools=tools)
        ours = chat.template(FakeTokenizer(by_name), with_tools=tools is not None)
        assert ours == wanted

    tokenizer.chat_template = {"rag": "r"}
    with pytest.raises(ValueError, match="rag"):
        tokenizer.get_chat_template()
    with pytest.raises(ValueError, match=r"chat templates \['rag'\]; wanted one named default"):
        chat.template(FakeTokenizer([{"name": "rag", "template": "r"}]))
    tokenizer.chat_template = None


class FakeTokenizer:
    """Has tokenizer_config.json with chat templates, and nothing else."""

    def __init__(self, chat_template):
        config = {"chat_template": chat_template}
        self.files = {"tokenizer_config.json": json.dumps(config).encode()}
