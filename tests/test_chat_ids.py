"""Conversations as ids, and what of them is learnt. Tokenizers of checkpoints are in tests/parity.

Requirement N is that of the list of faults of other systems.
"""

import json
import re

import numpy as np
import pytest

from lm import limited
from lm.data import chat, chat_ids, templates
from lm.data.tokenizer import ByteTokenizer

FORBIDDEN = "{{ messages.__class__.__mro__ }}"
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# What ends a turn in each of the shipped templates, with what they put before it.
ENDS = {
    "plain": "</s>",
    "alpaca": "</s>",
    "chatml": "<|im_end|>",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
}


class Merging(ByteTokenizer):
    """Bytes, but a line's end or space together with what follows it is one id: tokens would span
    the end of a prompt and an answer's beginning.
    """

    FIRST = 1000

    def encode(self, text):
        ids = []
        for found in re.finditer(rb"[\n ][\x00-\xff]|[\x00-\xff]", text.encode()):
            pair = found[0]
            ids.append(pair[0] if len(pair) == 1 else self.FIRST + 256 * pair[0] + pair[1])
        return ids

    def decode(self, ids):
        content = b""
        for i in map(int, ids):
            if i >= self.FIRST:
                content += bytes(divmod(i - self.FIRST, 256))
            elif i < 256:
                content += bytes([i])
        return content.decode("utf-8", errors="replace")


@pytest.fixture(autouse=True)
def in_this_process(request, monkeypatch):
    """Templates are rendered here, which is faster; what goes in and out is JSON as ever."""
    if "limits" in request.fixturenames:
        return

    def call(function, **arguments):
        assert function == "lm.data.templates:render_all"
        arguments = json.loads(json.dumps(arguments))
        return json.loads(json.dumps(templates.render_all(**arguments)))

    monkeypatch.setattr(limited, "call", call)


@pytest.fixture
def limits():
    """Templates run in a process of their own after all."""


def user(content, **others):
    return dict(role="user", content=content) | others


def answer(content, **others):
    return dict(role="assistant", content=content) | others


def system(content):
    return dict(role="system", content=content)


def tokenizer_of(template, kind=ByteTokenizer):
    """A tokenizer with one of the shipped templates, or with the text of another one."""
    tokenizer = kind("turns:llama3" if template == "llama3" else "turns")
    if template in chat.SHIPPED:
        return chat.with_template(tokenizer, template)
    return tokenizer.with_chat_template(template)


def unmarked(name):
    """A shipped template without {% generation %}."""
    source = (chat.TEMPLATES_FOLDER / f"{name}.jinja").read_text()
    without = re.sub(r"\{%-? (end)?generation -?%\}", "", source)
    assert len(without) < len(source)
    return without


def encode(tokenizer, *conversations, learnt="answers", tools=None):
    """Each conversation's rows; `tools` are those of each."""
    tools_each = [tools] * len(conversations) if tools else None
    return chat_ids.ChatEncoder(tokenizer, learnt).encode(conversations, tools_each)


def encode_one(tokenizer, messages, **arguments):
    """The one row of a conversation."""
    ((row,),) = encode(tokenizer, messages, **arguments)
    assert row.ids.dtype == np.int32 and row.is_learnt.dtype == bool
    assert row.ids.shape == row.is_learnt.shape
    return row


def render(tokenizer, messages, **arguments):
    (text,) = render_all(tokenizer, [messages], **arguments)
    return text


def render_all(tokenizer, conversations, asks=False, tools=None):
    return chat.render_all(
        chat.template(tokenizer, with_tools=bool(tools)),
        conversations,
        tokens=chat.special_tokens(tokenizer),
        tools=tools,
        add_generation_prompt=asks,
    )


def runs(row):
    """The ids of each run of learnt tokens."""
    found, before = [], False
    for token, is_learnt in zip(row.ids.tolist(), row.is_learnt.tolist()):
        if is_learnt and not before:
            found.append([])
        if is_learnt:
            found[-1].append(token)
        before = is_learnt
    return found


CONVERSATIONS = [
    [user("Where?"), answer("Here.")],
    [system("Be brief."), user("Where?"), answer("Here.")],
    [user("Where?"), answer("Here."), user("Who é?"), answer("Me & you.")],
    [system("x"), user("a"), answer("b"), user("c"), answer("d"), user("e"), answer("f\n\ng")],
]


# --- what is learnt ---


@pytest.mark.parametrize("learnt", chat_ids.LEARNT)
@pytest.mark.parametrize("name", chat.SHIPPED)
def test_learnt_are_the_answers_with_their_ends(name, learnt):
    """Requirement 3: exactly these, of the shipped templates; the text is the template's."""
    tokenizer = tokenizer_of(name)
    texts = render_all(tokenizer, CONVERSATIONS)
    encoded = encode(tokenizer, *CONVERSATIONS, learnt=learnt)
    for messages, text, (row,) in zip(CONVERSATIONS, texts, encoded):
        assert tokenizer.spell(row.ids) == text
        wanted = [m["content"] + ENDS[name] for m in messages if m["role"] == "assistant"]
        if name == "llama2":
            wanted = [" " + text for text in wanted]
        if learnt == "last_answer":
            wanted = wanted[-1:]
        assert [tokenizer.spell(ids) for ids in runs(row)] == wanted
        # What ends a turn is one token, which stops a generated answer.
        for ids in runs(row):
            assert ids[-1] in tokenizer.stop_ids


@pytest.mark.parametrize("learnt", chat_ids.LEARNT)
@pytest.mark.parametrize("kind", [ByteTokenizer, Merging])
@pytest.mark.parametrize("name", chat.SHIPPED)
def test_templates_without_generation_give_the_same(name, kind, learnt):
    """Requirement 1."""
    marked, plain = tokenizer_of(name, kind), tokenizer_of(unmarked(name), kind)
    if name == "llama3":
        plain = kind("turns:llama3").with_chat_template(unmarked(name))
    both = [encode(tokenizer, *CONVERSATIONS, learnt=learnt) for tokenizer in (marked, plain)]
    for (with_marks,), (without,) in zip(*both):
        assert with_marks.ids.tolist() == without.ids.tolist()
        assert with_marks.is_learnt.tolist() == without.is_learnt.tolist()


@pytest.mark.parametrize("learnt", chat_ids.LEARNT)
@pytest.mark.parametrize("template", ["chatml", unmarked("chatml")], ids=["marked", "unmarked"])
def test_answers_of_weight_0_are_read_and_not_learnt(template, learnt):
    """OpenAI's key; the row is the same as without it."""
    tokenizer = tokenizer_of(template)
    messages = [dict(message) for message in CONVERSATIONS[3]]
    messages[2]["weight"], messages[4]["weight"] = 0, 1
    rows = encode(tokenizer, messages, learnt=learnt)[0]
    answers = [[tokenizer.spell(ids) for ids in runs(row)] for row in rows]
    wanted = ["d<|im_end|>", "f\n\ng<|im_end|>"]
    assert sum(answers, []) == (wanted if learnt == "answers" else wanted[-1:])
    assert tokenizer.spell(rows[-1].ids) == render(tokenizer, CONVERSATIONS[3])


@pytest.mark.parametrize(
    "body",
    [
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>",
        "{%- generation -%}{{ m.content }}{%+ endgeneration +%}<|im_end|>",
        "{%generation%}{{ m.content }}<|im_end|>{%endgeneration%}",
        "{{ m.content }}<|im_end|>",
    ],
)
def test_the_end_of_a_turn_is_learnt_wherever_the_marks_end(body):
    """Requirements 1 and 3: also where a template encloses the content alone, and never what stands
    between turns.
    """
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}" + body + "{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{{ '\n--\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = tokenizer_of(source)
    row = encode_one(tokenizer, CONVERSATIONS[2])
    learnt = [tokenizer.spell(ids) for ids in runs(row)]
    assert learnt == ["Here.<|im_end|>", "Me & you.<|im_end|>"]
    assert tokenizer.spell(row.ids) == render(tokenizer, CONVERSATIONS[2])


@pytest.mark.parametrize("marks", [True, False])
def test_marks_around_what_the_model_is_given(marks):
    """Requirements 1, 3 and 7: trl's templates enclose the line's end before an answer and the one
    behind its turn. A prompt is what is asked with, and an answer ends with its turn.
    """
    body = "{{ '\\n' + m.content + '<|im_end|>\\n' }}"
    if marks:
        body = "{% generation %}" + body + "{% endgeneration %}"
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}" + body + ""
        "{% else %}{{ '\\n' + m.content }}<|im_end|>{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    )
    tokenizer = tokenizer_of(source, Merging)
    messages = [user("q"), answer("\nx"), user("r"), answer(" y")]
    (asked,) = render_all(tokenizer, [messages[:1]], asks=True)
    (asked_ids,) = chat.encode(tokenizer, [asked])
    for learnt, wanted in (
        ("answers", ["\nx<|im_end|>", " y<|im_end|>"]),
        ("last_answer", [" y<|im_end|>"]),
    ):
        row = encode_one(tokenizer, messages, learnt=learnt)
        assert [tokenizer.spell(ids) for ids in runs(row)] == wanted
        assert row.ids[: len(asked_ids)].tolist() == asked_ids or learnt == "last_answer"
        assert tokenizer.spell(row.ids) == render(tokenizer, messages)


def test_all_that_ends_a_turn_is_learnt():
    """Requirement 3: some templates write EOS behind the end of a turn."""
    body = "{{ m.content + '<|im_end|>' + eos_token + '--' }}"
    for source in (body, "{% generation %}" + body + "{% endgeneration %}"):
        source = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}" + source
        )
        row = encode_one(tokenizer_of(source + "{% endif %}{% endfor %}"), CONVERSATIONS[2])
        tokenizer = tokenizer_of("chatml")
        learnt = [tokenizer.spell(ids) for ids in runs(row)]
        assert learnt == ["Here.<|im_end|></s>", "Me & you.<|im_end|></s>"]


def test_marks_around_everything():
    """Requirement 1: the prompt isn't learnt."""
    source = "{% generation %}{% for m in messages %}{{ m.content }}{{ eos_token if m.role[0] == "
    source += "'a' }}{% endfor %}{% endgeneration %}"
    tokenizer = tokenizer_of(source)
    row = encode_one(tokenizer, CONVERSATIONS[0])
    assert [tokenizer.spell(ids) for ids in runs(row)] == ["Here.</s>"]


def test_an_answer_without_an_end_is_learnt_as_it_is():
    source = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    source += "{% if add_generation_prompt %}a:{% endif %}"
    row = encode_one(tokenizer_of(source), CONVERSATIONS[2])
    assert [bytes(ids) for ids in runs(row)] == [b"Here.;", b"Me & you.;"]


@pytest.mark.parametrize(
    "source, learnt",
    [
        ("{% generation %}{{ messages | map(attribute='role') | list }}{% endgeneration %}", 1.0),
        ("{% if add_generation_prompt %}{% else %}{{ messages[1].content }}{% endif %}", 1.0),
        ("a{% if false %}{% generation %}x{% endgeneration %}{% endif %}", 0.0),
        ("a{% generation %}{% endgeneration %}", 0.0),
    ],
)
def test_masks_of_everything_and_of_nothing_are_seen(source, learnt):
    """Requirement 1: tests/test_units.py says what becomes of them."""
    row = encode_one(tokenizer_of(source), CONVERSATIONS[0])
    assert row.is_learnt.mean() == learnt


@pytest.mark.parametrize("name", chat.SHIPPED)
def test_one_bos(name):
    """Requirement 4. Llama 2's own has one before each question."""
    tokenizer = tokenizer_of(name)
    for messages, rows in zip(CONVERSATIONS, encode(tokenizer, *CONVERSATIONS)):
        (row,) = rows
        questions = sum(message["role"] == "user" for message in messages)
        count = (row.ids == tokenizer.bos_id).sum()
        assert count == (questions if name == "llama2" else 1)
        assert row.ids[0] == tokenizer.bos_id and not row.is_learnt[0]


def test_what_stops_an_answer():
    """Requirement 5; that of checkpoints is in tests/parity/test_conversations.py."""
    plain = ByteTokenizer()
    assert plain.stop_ids == (plain.eos_id,)
    for name, end in (("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")):
        tokenizer = tokenizer_of(name)
        assert tokenizer.stop_ids == (tokenizer.eos_id, tokenizer.special[end])


# --- prompts ---

BEGINNINGS = ["x", "\nx", "\n\nx", " x", "  x", "\n x", "é", "<x", "0", "\t"]


@pytest.mark.parametrize("kind", [ByteTokenizer, Merging])
@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("learnt", chat_ids.LEARNT)
@pytest.mark.parametrize("name", chat.SHIPPED)
def test_a_prompt_has_the_same_ids_whatever_follows(name, learnt, marks, kind):
    """Requirement 7: and as when the model is asked, also where the answer's first characters would
    be merged with the prompt's last ones. (Where several answers of a row are learnt, the prompts
    of later ones have the earlier ones' ids.)
    """
    tokenizer = tokenizer_of(name, kind)
    if not marks:
        tokenizer = tokenizer.with_chat_template(unmarked(name))
    prompt = [system("S"), user("Where?\n")]
    if learnt == "last_answer":
        prompt += [answer("Here."), user("a")]
    (asked,) = chat.encode(tokenizer, [render(tokenizer, prompt, asks=True)])

    conversations = [[*prompt, answer(start + "y")] for start in BEGINNINGS]
    texts = render_all(tokenizer, conversations)
    for text, (row,) in zip(texts, encode(tokenizer, *conversations, learnt=learnt)):
        ids, is_learnt = row.ids.tolist(), row.is_learnt.tolist()
        assert ids[: len(asked)] == asked
        assert not is_learnt[len(asked) - 1] and is_learnt[len(asked)]
        assert tokenizer.spell(ids) == text


def test_the_ids_of_a_rendered_prompt_when_the_model_is_asked():
    """Requirement 7: a tokenizer that is made here takes special tokens for text elsewhere."""
    tokenizer = tokenizer_of("chatml")
    start, end = tokenizer.role_ids("turns")
    text = "<s><|im_start|>a<|im_end|>b<|im_start|>"
    assert chat.encode(tokenizer, [text]) == [[256, start, 97, end, 98, start]]
    assert chat.encode(tokenizer, [""]) == [[]]
    assert tokenizer.encode("<s>") == list(b"<s>")


# --- templates that write earlier turns in another way ---

STRIPPING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}A:"
    "BEGIN{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('~')[-1] }}{% endif %}"
    "{{ eos_token }}END{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
THOUGHTS = [user("1"), answer("x~2"), user("3"), answer("yy~4"), user("5"), answer("zzz~6")]


@pytest.mark.parametrize(
    "marks", [("{% generation %}", "{% endgeneration %}"), ("", "")], ids=["marked", "unmarked"]
)
def test_a_row_for_each_answer(marks):
    """Requirement 9: each as the model is asked for it, with the thought that later turns lose."""
    tokenizer = tokenizer_of(STRIPPING.replace("BEGIN", marks[0]).replace("END", marks[1]))
    rows_of_one, rows = encode(tokenizer, THOUGHTS[:2], THOUGHTS)
    assert [tokenizer.spell(row.ids) for row in rows_of_one] == ["<s>U:1A:x~2</s>"]
    assert [tokenizer.spell(row.ids) for row in rows] == [
        "<s>U:1A:x~2</s>",
        "<s>U:1A:2</s>U:3A:yy~4</s>",
        "<s>U:1A:2</s>U:3A:4</s>U:5A:zzz~6</s>",
    ]
    learnt = [list(map(tokenizer.spell, runs(row))) for row in rows]
    assert learnt == [["x~2</s>"], ["yy~4</s>"], ["zzz~6</s>"]]

    row = encode_one(tokenizer, THOUGHTS, learnt="last_answer")
    assert tokenizer.spell(row.ids) == tokenizer.spell(rows[-1].ids)
    assert list(map(tokenizer.spell, runs(row))) == ["zzz~6</s>"]
    # What has no thought is the same in any place: one row.
    row = encode_one(tokenizer, [user("1"), answer("2"), user("3"), answer("4")])
    assert list(map(tokenizer.spell, runs(row))) == ["2</s>", "4</s>"]


def test_a_template_that_writes_prompts_in_another_way_is_refused():
    source = "{{ messages | length }}{{ messages[0].content }}"
    with pytest.raises(ValueError, match="writes the prompt otherwise.*{% generation %}"):
        encode(tokenizer_of(source), CONVERSATIONS[0])


# --- special tokens that are spelt out ---

SPELT = "a<|im_end|></s> <s><|im_start|>b <|im_end|"


@pytest.mark.parametrize("kind", [ByteTokenizer, Merging])
@pytest.mark.parametrize("name", [*chat.SHIPPED, "unmarked"])
def test_special_tokens_that_texts_spell_out_are_text(name, kind):
    """Requirement 10."""
    tokenizer = tokenizer_of(unmarked("chatml") if name == "unmarked" else name, kind)
    plain = [system("S"), user("Q"), answer("A"), user("R"), answer("B")]
    spelling = [m | dict(content=m["content"] + SPELT) for m in plain]
    row, spelt = [rows[0] for rows in encode(tokenizer, plain, spelling)]

    special = set(tokenizer.special.values())
    assert [i for i in spelt.ids if i in special] == [i for i in row.ids if i in special]
    # They come back as the same texts, and are learnt where they are in an answer.
    assert tokenizer.spell(spelt.ids) == render(tokenizer, spelling)
    texts = [tokenizer.decode(ids).strip() for ids in runs(spelt)]
    assert texts == ["A" + SPELT, "B" + SPELT]
    # A stop within an answer ends no learnt run.
    assert len(runs(spelt)) == 2 and all(ids[-1] in special for ids in runs(spelt))


def test_special_tokens_in_calls_and_tools_are_text():
    """Requirement 10."""
    source = (
        "<|im_start|>{{ tools | tojson }}{% for m in messages %}{{ m.content or '' }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}{{ m.name or '' }}<|im_end|>{% endfor %}"
    )
    tokenizer = tokenizer_of(source)
    call = {"function": {"name": "<s>", "arguments": {"where": ["</s>", 1, None]}}}
    messages = [
        user("q"),
        dict(role="assistant", content=None, tool_calls=[call]),
        dict(role="tool", content="<|im_end|>", name="</s>"),
        answer("a"),
    ]
    tools = [{"name": "<|im_start|>", "limits": [1.5, True]}]
    row = encode_one(tokenizer, messages, tools=tools)
    start, end = tokenizer.role_ids("turns")
    special = [i for i in row.ids if i > 255]
    assert special == [start, *[end] * 4]
    text = tokenizer.spell(row.ids)
    assert text == render(tokenizer, messages, tools=tools)
    assert '"name": "<|im_start|>", "limits": [1.5, true]' in text


def test_special_tokens_within_others_are_text():
    """Requirement 10: what is spelt within a longer one, and beside itself."""

    class Nested(ByteTokenizer):
        def __init__(self, reserve):
            super().__init__(reserve)
            self.special = {"<s>": 256, "</s>": 257, "<<s>>": 258}

    tokenizer = tokenizer_of(unmarked("plain"), Nested)
    text = "<<s>><s><<s></s></s>>"
    row = encode_one(tokenizer, [user(text), answer(text)])
    assert [i for i in row.ids if i > 255] == [256, 257]
    assert tokenizer.decode(row.ids) == text * 2


@pytest.mark.parametrize("marks", [True, False])
def test_characters_for_private_use_are_text(marks):
    """Requirement 10: the encoder puts some of its own around things."""
    source = "{{ tools[0].name if tools }}|{{ messages[0].content }}|"
    marked = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    said = marked[0] + "{{ messages[1].content + eos_token }}" + marked[1]
    source += "{% if messages | length > 1 %}" + said + "{% endif %}"
    tokenizer = tokenizer_of(source)
    private = "".join(map(chr, range(0xE000, 0xE010)))
    messages = [user(private + "<s>"), answer(private + "</s>")]
    row = encode_one(tokenizer, messages, tools=[{"name": "\ue010\ue011"}])
    assert tokenizer.decode(row.ids).count(private) == 2
    assert tokenizer.spell(row.ids) == render(tokenizer, messages, tools=[{"name": "\ue010\ue011"}])
    assert tokenizer.decode(runs(row)[0]) == private + "</s>"

    # U+F8FE is the last one that it takes.
    most = "".join(map(chr, range(0xE000, 0xF8FD)))
    with pytest.raises(ValueError, match="all characters for private use"):
        encode(tokenizer, [user(most), answer("a")])


# --- templates ---


def test_tools_take_their_own_template():
    class Files(ByteTokenizer):
        def __init__(self):
            super().__init__()
            by_name = [
                {"name": "default", "template": "{% generation %}d{% endgeneration %}"},
                {"name": "tool_use", "template": "t{% generation %}{{ tools }}{% endgeneration %}"},
            ]
            config = dict(chat_template=by_name)
            self.files = {"tokenizer_config.json": json.dumps(config).encode()}

    tokenizer = Files()
    assert tokenizer.decode(encode_one(tokenizer, CONVERSATIONS[0]).ids) == "d"
    row = encode_one(tokenizer, CONVERSATIONS[0], tools=[1])
    assert tokenizer.decode(row.ids) == "t[1]"


TEXTS = {
    "plain": "<s>SabA</s>cdB</s>",
    "alpaca": "<s>S\n\n### Instruction:\nab\n\n### Response:A</s>\n\n"
    "### Instruction:\ncd\n\n### Response:B</s>",
    "chatml": "<s><|im_start|>system\nS<|im_end|>\n"
    "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\ncd<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nab [/INST] A </s><s>[INST] cd [/INST] B </s>",
    "llama3": "<s>SYSTEMS<|eot_id|>USERab<|eot_id|>ASSISTANTA<|eot_id|>"
    "USERcd<|eot_id|>ASSISTANTB<|eot_id|>",
}
for role in ("system", "user", "assistant"):
    header = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    TEXTS["llama3"] = TEXTS["llama3"].replace(role.upper(), header)


@pytest.mark.parametrize("name", chat.SHIPPED)
def test_texts_of_shipped_templates(name):
    messages = [system("S"), user("ab"), answer("A"), user("cd"), answer("B")]
    assert render(tokenizer_of(name), messages) == TEXTS[name]


def test_alpaca_gives_the_input_a_line_of_its_own():
    tokenizer = tokenizer_of("alpaca")
    question = user("Where?\n\nBern", instruction="Where?", input="Bern")
    text = tokenizer.decode(encode_one(tokenizer, [question, answer("a")]).ids)
    assert "paired with an input" in text
    assert text.endswith("### Instruction:\nWhere?\n\n### Input:\nBern\n\n### Response:a")
    plain = tokenizer.decode(encode_one(tokenizer, [user("Where?", input=""), answer("a")]).ids)
    assert "Input" not in plain and "paired" not in plain
    own = tokenizer.decode(encode_one(tokenizer, [system("Be brief."), question, answer("a")]).ids)
    assert own.startswith("Be brief.\n\n### Instruction:\nWhere?")


@pytest.mark.parametrize("name", chat.SHIPPED)
def test_shipped_templates_refuse_tools(name):
    tokenizer = tokenizer_of(name)
    calling = answer("", tool_calls=[{"function": {}}])
    for messages, tools in (([user("a"), calling], None), (CONVERSATIONS[0], [{}])):
        with pytest.raises(ValueError, match=f"the template {name} has no place for tools"):
            encode(tokenizer, messages, tools=tools)
    # Tables have a column of nulls.
    nulls = [m | dict(tool_calls=None, name=None) for m in CONVERSATIONS[0]]
    (row,), (wanted,) = encode(tokenizer, nulls, CONVERSATIONS[0])
    assert row.ids.tolist() == wanted.ids.tolist()


def test_templates_by_name(tmp_path):
    plain = ByteTokenizer()
    with pytest.raises(ValueError, match="config.chat.template is empty.*wanted one of.*chatml"):
        chat.with_template(plain, "")
    with pytest.raises(ValueError, match="'chatlm' is no file; wanted one, or of.*chatml"):
        chat.with_template(plain, "chatlm")
    with pytest.raises(ValueError, match=r"\['<\|im_start\|>', .*reserve = 'turns' adds them"):
        chat.with_template(plain, "chatml")
    with pytest.raises(ValueError, match="'<|eot_id|>'.*reserve = 'turns:llama3' adds them"):
        chat.with_template(plain, "llama3")

    (tmp_path / "my.jinja").write_text("é{{ bos_token }}")
    mine = chat.with_template(plain, str(tmp_path / "my.jinja"))
    assert chat.template(mine) == "é{{ bos_token }}" and chat.template(plain) is None
    assert chat.with_template(mine, "") is mine
    # A template changes neither ids nor the fingerprint.
    assert (mine.fingerprint, mine.vocab_size) == (plain.fingerprint, plain.vocab_size)


def test_many_conversations_are_rendered_by_parts(monkeypatch):
    """The answer of a process has a limit: conversations and tools are counted."""
    sizes, render_here = [], limited.call

    def call(function, **arguments):
        sizes.append(len(arguments["conversations"]))
        return render_here(function, **arguments)

    monkeypatch.setattr(limited, "call", call)
    tokenizer = tokenizer_of("{{ messages[0].content }}{% generation %}a{% endgeneration %}")
    conversations = [[user(f"{i:02}"), answer("a")] for i in range(20)]
    wanted = [f"{i:02}a" for i in range(20)]

    def parts(tools=None, **limits):
        sizes.clear()
        for name, value in limits.items():
            monkeypatch.setattr(chat, name, value)
        rows = encode(tokenizer, *conversations, tools=tools)
        assert [tokenizer.decode(row.ids) for (row,) in rows] == wanted
        return list(sizes)

    # With their answers, and their prompts.
    assert parts() == [20] * 2
    assert parts(CONVERSATIONS_PER_PROCESS=8) == [8, 8, 4] * 2
    assert parts(CHARACTERS_PER_PROCESS=5000) == [8, 8, 4] * 2
    assert max(parts([{"name": "t" * 1000}])) <= 5


FAILING = {
    "forbidden": (FORBIDDEN, "access to attribute '__class__'"),
    "no Jinja": ("{{ messages", "end of print statement"),
    "refuses": ("{{ raise_exception('only two turns') }}", "only two turns"),
    "a type error": ("{{ messages[0].content + 1 }}", "can only concatenate"),
    "not there": ("{{ messages[7].content }}", "has no element 7"),
}


@pytest.mark.parametrize("name", FAILING)
def test_templates_that_fail(name):
    source, message = FAILING[name]
    for marks in ("", "{% generation %}{% endgeneration %}"):
        with pytest.raises(ValueError, match=f"the chat template fails: .*{message}"):
            encode(tokenizer_of(source + marks), CONVERSATIONS[0])


def test_templates_are_kept_in(limits, monkeypatch):
    """In a process of their own, see lm/limited.py."""
    for source, message in (FAILING["forbidden"], ("{{ 'a' * 10 ** 10 }}", "MemoryError")):
        with pytest.raises(ValueError, match=f"the chat template fails: .*{message}"):
            encode(tokenizer_of(source), CONVERSATIONS[0])
    monkeypatch.setattr(limited, "SECONDS", 1)
    with pytest.raises(ValueError, match="the chat template fails: it took more than 1 seconds"):
        encode(tokenizer_of(FOREVER), CONVERSATIONS[0])


def test_the_process_gives_the_same(limits):
    """Characters that encodings differ in come back as they were."""
    tokenizer = tokenizer_of("chatml")
    text = "é\u2028\x00\x85\U0001f600 \ue000<|im_end|>\r\n"
    row = encode_one(tokenizer, [user(text), answer(text)])
    assert tokenizer.decode(runs(row)[0]) == text
