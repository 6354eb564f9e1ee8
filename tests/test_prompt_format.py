"""Prompts as plain text, and as conversations in a tokenizer's chat template."""

import json

import pytest

from lm.data.pack import Encoder
from lm.data.tokenizer import ByteTokenizer
from lm.evals import entries, generation, prompt_format
from tests.fake_models import Model, random_distribution
from tests.test_generation import Reader, write_jsonl
from tests.test_tasks import choose, make

CHAT = """{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
# A space before the answer.
SPACED = """{% for m in messages %}{% if m.role == 'user' %}[Q] {{ m.content }} [/Q]{% else %} {{
m.content }} {% endif %}{% endfor %}"""
# An empty block of thoughts before an answer that has none, as Qwen3's.
THINKING = CHAT.replace(
    "{{ m.content | trim }}",
    "{% if m.role == 'assistant' and loop.last %}<think></think> {% endif %}{{ m.content | trim }}",
)
EXAMPLES = [("one?", " 1"), ("two?", " 2")]


class ChatTokenizer(ByteTokenizer):
    def __init__(self, template):
        super().__init__()
        config = dict(chat_template=template, bos_token="<s>", eos_token="</s>")
        self.files = {"tokenizer_config.json": json.dumps(config).encode()}


def chat(template=CHAT, is_scored=True, **prompt):
    values = dict(format="chat", system="", separator="|") | prompt
    return prompt_format.make(ChatTokenizer(template), values, "e", is_scored=is_scored)


def test_text():
    values = dict(format="text", system="", separator="|")
    text = prompt_format.make(ByteTokenizer(), values, "e", is_scored=True)
    assert text.wrap(EXAMPLES, ["a?", "b?"]) == ["one? 1|two? 2|a?", "one? 1|two? 2|b?"]
    assert text.around(EXAMPLES) == ("one? 1|two? 2|", "")
    assert text.answer(" 3") == " 3"
    assert text.split([5, 6]) == ([256], [5, 6])


def test_chat():
    form = chat(system="Count.")
    before = "<system>Count.\n<user>one?\n<assistant>1\n<user>two?\n<assistant>2\n<user>"
    # The template takes off the space at the end.
    assert form.wrap(EXAMPLES, ["a? ", "b?"]) == [f"{before}{q}\n<assistant>" for q in ("a?", "b?")]
    assert form.around(EXAMPLES) == (before, "\n<assistant>")
    assert form.answer(" 3") == "3"


def test_what_stands_before_an_answer():
    assert chat(SPACED).wrap([], ["a?"]) == ["[Q] a? [/Q]"]
    assert chat(SPACED).answer("3") == " 3"

    # An answer is scored after the thoughts, a generated one has its own.
    assert chat(THINKING).wrap([], ["a?"]) == ["<user>a?\n<assistant><think></think>"]
    assert chat(THINKING).answer("3") == " 3"
    assert chat(THINKING, is_scored=False).wrap([], ["a?"]) == ["<user>a?\n<assistant>"]


def test_bos_is_the_templates():
    """One that it writes stays when a prompt is too long; none is added."""
    assert chat().split([256, 5, 6]) == ([256], [5, 6])
    assert chat().split([5, 6]) == ([], [5, 6])


def test_many_conversations():
    """More than one process renders."""
    questions = [f"q{i}" for i in range(300)]
    texts = chat().wrap([], questions)
    assert texts == [f"<user>{question}\n<assistant>" for question in questions]


@pytest.mark.parametrize(
    "template, prompt, message",
    [
        (CHAT, dict(format="text", system="S"), "prompt.system needs .*prompt.format = 'chat'"),
        (CHAT, dict(format="xml"), r"e.prompt.format = 'xml'; valid: \['text', 'chat'\]"),
        ("", {}, "e.prompt.format = 'chat', but the tokenizer has no chat template"),
        ("{{ raise_exception('no system') }}", dict(system="S"), "chat template fails: no system"),
    ],
)
def test_refused(template, prompt, message):
    with pytest.raises(ValueError, match=message):
        chat(template, **prompt)


# --- the evaluators ---


def test_label_words_in_a_chat(tmp_path):
    task = make(
        tmp_path,
        Model(random_distribution, length=200),
        tokenizer=ChatTokenizer(CHAT),
        prompt=dict(templates=("{text}?",), shots=1, format="chat", system="S"),
        priors=("content_free", "pmi_dc"),
    )
    (variant,) = task.prompt_set.variants
    assert [word.text for word in variant.words] == ["red", "green", "blue"]

    # What predictions/ say is what was asked.
    def prompt_text(question):
        return bytes(question.prompt.ids.tolist()).decode()

    assert task.about["format"] == "chat"
    (asked,) = task.about["prompts"]
    assert asked["before"].startswith("<system>S\n<user>train ")
    texts = list(map(prompt_text, variant.questions))
    (questions,) = task.prompt_set.texts
    assert texts == [asked["before"] + question + asked["after"] for question in questions]

    # Priors are asked in the same way, PMI's without the examples.
    prior = list(map(prompt_text, variant.prior_questions["content_free"]))
    assert prior[1] == asked["before"] + "N/A?" + asked["after"]
    (premise,) = map(prompt_text, variant.prior_questions["pmi_dc"])
    assert premise == "<system>S\n<user>?\n<assistant>"


def test_choices_in_a_chat(tmp_path):
    rows = [dict(q="q1", a="x", b="y", label=0), dict(q="q2", a="x", b="y", label=1)]
    _, lines = choose(
        tmp_path,
        rows,
        tokenizer=ChatTokenizer(SPACED),
        prompt=dict(template="{q}?", format="chat"),
        choices=("{a}", "{b}"),
    )
    assert [line["choices"] for line in lines] == [[" x", " y"]] * 2


def test_answers_in_a_chat(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [dict(q="cat 1", a="cat")])
    (tmp_path / "g.toml").write_text('type = "lm.evals.generation.TextGeneration"')
    arguments = entries.task(
        str(tmp_path / "g.toml"),
        source=dict(path="test.jsonl"),
        prompt=dict(template="{q}?", format="chat", system="S"),
        references="{a}",
        scores=("exact_match",),
        output=dict(max_new_tokens=8),
    ).to_dict()
    arguments["source"]["path"] = str(tmp_path / "test.jsonl")
    for key in ("type", "every", "batch_size"):
        del arguments[key]
    evaluator = generation.TextGeneration(
        Reader(), name="g", encoder=Encoder(ChatTokenizer(CHAT), ""), **arguments
    )
    (shown,) = evaluator.shown_prompts(1)
    assert shown.text == "<system>S\n<user>cat 1?\n<assistant>"
