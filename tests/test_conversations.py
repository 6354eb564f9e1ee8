"""Conversations from files: every format, roles by any of their names, what is left out and what is
refused.

Requirement N is that of the list of faults of other systems.
"""

import csv
import gzip
import json

import pytest

from lm.data import conversations
from lm.data.conversations import Example, LeftOut, Unusable

USER = {"role": "user", "content": "Where?"}
ANSWER = {"role": "assistant", "content": "Here."}
WORSE = {"role": "assistant", "content": "Nowhere."}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"messages": [USER, ANSWER]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "</s>"}}}


def read_one(record):
    return conversations.read(record, "file:1", LeftOut())


def turns(messages):
    """(role, content) of each message."""
    return [(message["role"], message["content"]) for message in messages]


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(path, split="train", held_out=0.0, **arguments):
    return conversations.conversations(split, path=str(path), held_out=held_out, **arguments)


# --- formats ---

PLAIN = [("user", "Where?"), ("assistant", "Here.")]
BRIEF = [("system", "Be brief."), *PLAIN]
ALPACA = {"instruction": "Where?", "output": "Here."}
FORMATS = {
    "messages": (GOOD, PLAIN),
    "with a system turn": ({"messages": [SYSTEM, USER, ANSWER]}, BRIEF),
    "with a developer's turn": (
        {"messages": [SYSTEM, {"role": "developer", "content": "D"}, USER, ANSWER]},
        [("system", "Be brief."), ("developer", "D"), *PLAIN],
    ),
    "of several answers": ({"messages": [USER, ANSWER] * 3}, PLAIN * 3),
    "of parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"text": "ere?"}]},
                ANSWER,
            ]
        },
        PLAIN,
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "Where?"},
                {"from": "gpt", "value": "Here."},
            ],
            "system": "Be brief.",
        },
        BRIEF,
    ),
    "ShareGPT with its own system turn": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "user", "value": "Where?"},
                {"from": "chatgpt", "value": "Here."},
            ],
            "system": "",
        },
        BRIEF,
    ),
    "Alpaca": (ALPACA, PLAIN),
    "Alpaca with no input": (ALPACA | {"input": ""}, PLAIN),
    "Alpaca with null": (ALPACA | {"input": None, "system": None}, PLAIN),
    "Alpaca with input": (
        ALPACA | {"input": "Bern", "system": "Be brief."},
        [("system", "Be brief."), ("user", "Where?\n\nBern"), ("assistant", "Here.")],
    ),
    "prompt and completion": ({"prompt": "Where?", "completion": "Here."}, PLAIN),
    "prompt and completion as messages": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        BRIEF,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_conversations(name):
    record, wanted = FORMATS[name]
    example = read_one(record)
    (messages,) = example.conversations
    assert turns(messages) == wanted
    assert (example.kind, example.value, example.tools) == ("conversation", 0.0, None)
    assert (example.name, example.source) == ("file:1", "")
    # An empty system turn is none.
    assert turns(read_one({"messages": [{"role": "system", "content": ""}, USER, ANSWER]})[0][0])


def test_an_alpaca_input_is_kept_apart_too():
    """The alpaca template gives it a line of its own."""
    question = read_one(ALPACA | {"input": "Bern"}).conversations[0][0]
    assert (question["instruction"], question["input"]) == ("Where?", "Bern")


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("human", "user"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("chatgpt", "assistant"),
        ("model", "assistant"),
        ("function_call", "assistant"),
        ("function", "tool"),
        ("observation", "tool"),
    ],
)
def test_names_of_roles(theirs, ours):
    turn = {"from": theirs, "value": "x"}
    before = {
        "user": [],
        "assistant": [{"from": "human", "value": "q"}],
        "tool": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}],
    }[ours]
    after = [] if ours == "assistant" else [{"from": "gpt", "value": "a"}]
    (messages,) = read_one({"conversations": [*before, turn, *after]}).conversations
    assert (messages[len(before)]["role"], messages[len(before)]["content"]) == (ours, "x")


@pytest.mark.parametrize("written", [list, json.dumps])
def test_tools(written):
    """Calls, results and schemas come through as they are; a table has schemas as JSON."""
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "name": "look", "content": "there"}
    record = {"messages": [USER, calling, result, result, ANSWER], "tools": written([TOOL])}
    example = read_one(record)
    assert example.tools == [TOOL]
    messages = example.conversations[0]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [CALL] and messages[2]["name"] == "look"
    for nothing in (None, "", []):
        assert read_one(GOOD | {"tools": nothing}).tools is None
    # The last answer may be a call.
    assert read_one({"messages": [USER, calling]}).conversations[0][-1]["tool_calls"] == [CALL]


CHOSEN = {"prompt": "Where?", "chosen": "Here.", "rejected": "Nowhere."}
PAIRS = {
    "texts": (CHOSEN, PLAIN[:1]),
    "messages": ({"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [WORSE]}, BRIEF[:2]),
    "no prompt": ({"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, PLAIN[:1]),
    "the prompt twice": (
        {"prompt": "Where?", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        PLAIN[:1],
    ),
    "several turns": (
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, WORSE]},
        [*PLAIN, *PLAIN[:1]],
    ),
    "Alpaca": (
        {"instruction": "Where?", "input": "Bern", "chosen": "Here.", "rejected": "Nowhere."},
        [("user", "Where?\n\nBern")],
    ),
    "LLaMA-Factory": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Where?"}],
            "chosen": {"from": "gpt", "value": "Here."},
            "rejected": {"from": "gpt", "value": "Nowhere."},
        },
        BRIEF[:2],
    ),
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: Who?\n\nAssistant: I.\n\nHuman: Where?\n\nAssistant: Here.",
            "rejected": "\n\nHuman: Who?\n\nAssistant: I.\n\nHuman: Where?\n\nAssistant: Nowhere.",
        },
        [("user", "Who?"), ("assistant", "I."), ("user", "Where?")],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_formats_of_pairs(name):
    record, prompt = PAIRS[name]
    example = read_one(record | {"margin": 2, "source": "web"})
    chosen, rejected = example.conversations
    assert turns(chosen) == [*prompt, ("assistant", "Here.")]
    assert turns(rejected) == [*prompt, ("assistant", "Nowhere.")]
    assert (example.kind, example.value, example.source) == ("pair", 2.0, "web")
    assert read_one(record).value == 0.0


@pytest.mark.parametrize("label, value", [(True, 1.0), (False, -1.0), (1, 1.0), (0, -1.0)])
def test_judged_answers(label, value):
    for record in ({"prompt": "Where?", "completion": "Here."}, GOOD):
        example = read_one(record | {"label": label})
        assert (example.kind, example.value) == ("judged", value)
        assert turns(example.conversations[0]) == PLAIN


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv"])
def test_kinds_of_files(ending, tmp_path):
    records = [{"instruction": "Where?", "input": "", "output": 'Here,\n"é"\ttoo'}] * 2
    path = tmp_path / f"data{ending}"
    if ending == ".json":
        path.write_text(json.dumps(records))
    elif ending in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(
                file, list(records[0]), delimiter="," if ending == ".csv" else "\t"
            )
            writer.writeheader()
            writer.writerows(records)
    else:
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)

    examples = load(tmp_path)
    assert (len(examples), examples.kind) == (2, "conversation")
    for number, example in enumerate(examples.items, 1):
        assert turns(example.conversations[0]) == [
            ("user", "Where?"),
            ("assistant", 'Here,\n"é"\ttoo'),
        ]
        assert example.name == f"{path}:{number}"


def test_names_are_those_of_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n")
    assert [example.name for example in load(path).items] == [f"{path}:2", f"{path}:4"]


def test_the_fingerprint_is_that_of_the_contents(tmp_path):
    def fingerprint(*records):
        return load(write_jsonl(tmp_path / "a.jsonl", *records)).fingerprint

    other = {"messages": [USER, WORSE]}
    found = [
        fingerprint(GOOD, other),
        fingerprint(other, GOOD),
        fingerprint(GOOD, GOOD),
        fingerprint(GOOD | {"source": "a"}, other),
    ]
    assert len(set(found)) == 4
    assert fingerprint(GOOD, other) == found[0]


@pytest.mark.parametrize("by", ["hash", "tail"])
def test_each_example_is_in_one_split(by, tmp_path):
    records = []
    for i in range(40):
        prompt = f"Where is {i // 2}?"  # each twice, with other answers
        records.append({"prompt": prompt, "completion": f"Here {i}."})
    path = write_jsonl(tmp_path / "a.jsonl", *records)
    splits = []
    for split in ("train", "validation"):
        examples = load(path, split, 0.3, held_out_by=by).items
        splits.append([example.conversations[0][-1]["content"] for example in examples])
    train, validation = splits
    assert sorted(train + validation) == sorted(record["completion"] for record in records)
    assert validation and len(train) > len(validation)
    if by == "hash":
        # The same prompt is on one side, whatever the answer.
        sides = [{int(text[5:-1]) // 2 for text in texts} for texts in splits]
        assert not sides[0] & sides[1]
    else:
        assert validation == [record["completion"] for record in records[28:]]


# --- what is left out, and counted ---

EMPTY = {"role": "assistant", "content": ""}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://"}}]}
SURROGATE = "\ud800"
LEFT_OUT = {
    "no answer": ({"messages": [USER]}, "there is no answer"),
    "nothing": ({"messages": []}, "there is no answer"),
    "only a system turn": ({"messages": [SYSTEM]}, "there is no answer"),
    "an empty answer": ({"messages": [USER, EMPTY]}, "an answer is empty"),
    "a blank answer": ({"prompt": "Where?", "completion": " \n"}, "an answer is empty"),
    "an answer that is null": ({"instruction": "Where?", "output": None}, "an answer is empty"),
    "an empty answer before others": (
        {"messages": [USER, EMPTY, USER, ANSWER]},
        "an answer is empty",
    ),
    "an empty question": ({"prompt": "", "completion": "Here."}, "a question is empty"),
    "a question that is null": ({"instruction": None, "output": "a"}, "a question is empty"),
    "two questions": ({"messages": [USER, USER, ANSWER]}, "roles are out of order"),
    "two answers": ({"messages": [USER, ANSWER, ANSWER]}, "roles are out of order"),
    "an answer first": ({"messages": [ANSWER, USER, ANSWER]}, "roles are out of order"),
    "a late system turn": ({"messages": [USER, ANSWER, SYSTEM, USER, ANSWER]}, "out of order"),
    "a result first": ({"messages": [{"role": "tool", "content": "x"}, ANSWER]}, "out of order"),
    "two system turns": ({"messages": [SYSTEM, SYSTEM, USER, ANSWER]}, "out of order"),
    "no weight": ({"messages": [USER, ANSWER | {"weight": 0}]}, "answers have the weight 0"),
    "a picture": ({"messages": [PICTURE, ANSWER]}, "a message has a part that is no text"),
    "a lone surrogate": ({"messages": [USER, ANSWER | {"content": SURROGATE}]}, "UTF-8 can't hold"),
    "one in a text": ({"prompt": "a" + SURROGATE, "completion": "b"}, "UTF-8 can't hold"),
    "one in Alpaca's": ({"instruction": SURROGATE, "output": "b"}, "UTF-8 can't hold"),
    "one in another field": ({"messages": [USER | {"name": SURROGATE}, ANSWER]}, "can't hold"),
    "one in the tools": (GOOD | {"tools": [{"name": SURROGATE}]}, "UTF-8 can't hold"),
}
PAIRS_LEFT_OUT = {
    "equal answers": (CHOSEN | {"rejected": "Here."}, "the chosen answer is the rejected one"),
    "other prompts": (
        {"chosen": [USER, ANSWER], "rejected": [USER | {"content": "Who?"}, WORSE]},
        "the prompts of the chosen and the rejected answer differ",
    ),
    "other system turns": (
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [USER, WORSE]},
        "the prompts of the chosen and the rejected answer differ",
    ),
    "other lengths": (
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, WORSE]},
        "the prompts of the chosen and the rejected answer differ",
    ),
    "an empty one": (CHOSEN | {"rejected": ""}, "an answer is empty"),
    "texts without a prompt": ({"chosen": "Here.", "rejected": "Nowhere."}, "out of order"),
}


@pytest.mark.parametrize("name", [*LEFT_OUT, *PAIRS_LEFT_OUT])
def test_what_nothing_can_be_learnt_from_is_left_out_and_counted(name, tmp_path, caplog):
    """Requirement 6."""
    record, reason = (LEFT_OUT | PAIRS_LEFT_OUT)[name]
    good = GOOD if name in LEFT_OUT else CHOSEN
    path = write_jsonl(tmp_path / "a.jsonl", good, record, good, record)
    assert [example.name for example in load(path).items] == [f"{path}:1", f"{path}:3"]
    (line,) = [line for line in caplog.messages if "left out" in line]
    assert line.startswith(f"{path}: 2 left out: ")
    assert reason in line and line.endswith(f"(first: {path}:2)")


def test_what_stands_behind_the_last_answer_is_cut_off(tmp_path, caplog):
    later = {"messages": [USER, ANSWER, USER, {"role": "system", "content": "x"}]}
    examples = load(write_jsonl(tmp_path / "a.jsonl", later, GOOD))
    for example in examples.items:
        assert turns(example.conversations[0]) == PLAIN
    (line,) = [line for line in caplog.messages if "left out" in line]
    assert "1 left out: questions behind the last answer" in line


def test_nothing_is_left(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [USER]})
    with pytest.raises(ValueError, match="has no documents with text"):
        load(path)
    assert "1 left out: there is no answer" in caplog.text


# --- what is refused ---

REFUSED = {
    "no format": ({"text": "a"}, r"has the keys \['text'\]; wanted messages, conversations"),
    "half of one": ({"prompt": "a"}, r"has the keys \['prompt'\]; wanted messages"),
    "a weight": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight is 0.5; wanted 0 or 1"),
    "half of a pair": ({"prompt": "a", "chosen": "b"}, "wanted messages"),
    "messages as a text": ({"messages": "a"}, "messages is 'a'; wanted a list of messages"),
    "messages of texts": ({"messages": ["a"]}, "wanted a list of messages"),
    "no role": ({"messages": [{"content": "a"}]}, "the role None; valid: "),
    "another role": ({"messages": [{"role": "me", "content": "a"}]}, "the role 'me'; valid: "),
    "a role that is a list": ({"messages": [{"role": ["user"]}]}, r"the role \['user'\]; valid: "),
    "a role that is an object": ({"messages": [{"role": {}}]}, "the role {}; valid: "),
    "a content that is a number": (
        {"messages": [{"role": "user", "content": 3}]},
        "a message's content is 3; wanted a text",
    ),
    "an object as content": (
        {"messages": [{"role": "user", "content": {"text": "a"}}]},
        "wanted a text",
    ),
    "a prompt that is a number": ({"prompt": 3, "completion": "a"}, "wanted a list of messages"),
    "a completion that is null": ({"prompt": "a", "completion": None}, "wanted a list"),
    "an instruction that is a list": ({"instruction": [], "output": "a"}, "instruction is .*text"),
    "an input that is a number": (ALPACA | {"input": 0}, "input is 0; wanted a text"),
    "an output that is a number": ({"instruction": "a", "output": 0}, "output is 0; wanted a text"),
    "a label that is a text": (GOOD | {"label": "good"}, "label is 'good'; wanted true"),
    "a label out of range": (GOOD | {"label": -1}, "label is -1; wanted true"),
    "a label that is a list": (GOOD | {"label": []}, r"label is \[\]; wanted true"),
    "a margin that is a text": (CHOSEN | {"margin": "much"}, "margin is 'much'; wanted a number"),
    "a margin that is true": (CHOSEN | {"margin": True}, "margin is True; wanted a number"),
    "a margin that is NaN": (CHOSEN | {"margin": float("nan")}, "margin is nan; wanted a number"),
    "a margin without an end": (CHOSEN | {"margin": float("inf")}, "margin is inf; wanted"),
    "tools that are no JSON": (GOOD | {"tools": "look"}, "tools is 'look'; wanted JSON"),
    "tools that are no list": (GOOD | {"tools": {"a": 1}}, "wanted a list of JSON schemas"),
    "a system turn that is a number": (
        {"conversations": [{"from": "human", "value": "a"}], "system": 3},
        "system is 3; wanted a list of messages",
    ),
    "a chosen one that is null": (CHOSEN | {"chosen": None}, "wanted a list of messages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_in_no_format_is_refused_by_name(name, tmp_path):
    record, message = REFUSED[name]
    path = write_jsonl(tmp_path / "a.jsonl", GOOD, record)
    with pytest.raises(ValueError, match=f"a.jsonl:2:? .*{message}"):
        load(path)


def test_kinds_are_not_mixed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", GOOD, GOOD, CHOSEN, GOOD | {"label": True})
    with pytest.raises(ValueError, match="examples of several kinds") as error:
        load(path)
    for kind, line in dict(conversation=1, pair=3, judged=4).items():
        assert f"'{kind}': '{path}:{line}'" in str(error.value)
    assert "wanted one" in str(error.value)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(GOOD)}\n{{")
    with pytest.raises(ValueError, match="a.jsonl:2"):
        load(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="no example"):
        conversations.as_documents([])


def test_a_reason_names_its_first_example():
    left_out = LeftOut()
    with pytest.raises(Unusable, match="roles are out of order"):
        conversations.read({"messages": [USER, USER, ANSWER]}, "file:1", left_out)
    assert not left_out.counts
    example = Example(([USER, ANSWER],), "conversation", 0.0, None, "a:1", "")
    assert example.text == "Where?"
    several = example._replace(conversations=([SYSTEM, USER, ANSWER, USER, ANSWER],))
    assert several.text == "Be brief.\nWhere?"
