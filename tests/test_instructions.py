"""Mixtures of instructions: wordings, rates, what is held out, and answers as evals score them."""

import json
import runpy
from collections import Counter

import pytest
from ml_collections import ConfigDict

from lm import instructions
from lm.data import chat, chat_ids, pack, pydocs_tasks
from lm.data.pack import Encoder
from lm.data.sources import Document, Documents
from lm.evals import choice, classification, entries, generation, prompts
from tests.docstrings import docstrings
from tests.fake_models import Model, random_distribution

# Records as the data sets have them, of the tasks whose data isn't here.
ELSEWHERE = {
    "sst2": [dict(sentence="a fine film ", label=1), dict(sentence="dull", label=0)],
    "trec": [{"text": "Who ?", "label-coarse": 3}, {"text": "Why ?", "label-coarse": 0}],
    "cola": [
        dict(sentence="They goes.", label="unacceptable"),
        dict(sentence="I go.", label="acceptable"),
    ],
    "banking77": [dict(text="Where is it?", category="card_arrival")],
    "gsm8k": [dict(question="1 + 1?", answer="It is 2.\n#### 2")],
    "multi30k_en_de": [dict(en="A dog.", de="Ein Hund.")],
    "multi30k_de_en": [dict(en="A dog.", de="Ein Hund.")],
}
PYDOCS = [name for name in entries.shipped_tasks() if name.startswith("pydocs_")]
LENGTH = 2048


@pytest.fixture(autouse=True)
def few_docstrings(monkeypatch):
    monkeypatch.setattr(pydocs_tasks, "_docstrings", docstrings)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    documents = [Document(doc.text, doc.name, "") for doc in docstrings("train")]
    return pack.train_tokenizer(
        Documents(documents, "few"),
        vocab_size=512,
        max_documents=0,
        label_prompt="",
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )


def write_task(folder, name, num, cluster="colour", **source):
    """A task about `num` numbers, whose records are in files."""
    for split in ("train", "test"):
        rows = [json.dumps(dict(text=f"{name} {split} {i}", label=i % 2)) for i in range(num)]
        (folder / f"{name}-{split}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / f"{name}.toml").write_text(
        f"""type = "lm.evals.classification.PromptClassification"
[source]
path = "{name}-{{split}}.jsonl"
shots_split = "train"
[prompt]
templates = ["{{text}}?"]
[[verbalizer.words]]
red = [" red", " crimson"]
green = [" green"]
[instructions]
cluster = "{cluster}"
phrasings = ["Say the colour of {{text}}:", "{{text}}\\nColour:"]
"""
    )
    return entries.instructed(str(folder / f"{name}.toml"), source=source).to_dict()


def ask(*names, split="train", **arguments):
    """The examples of a mixture of shipped tasks."""
    tasks = {name: entries.instructed(name).to_dict() for name in names}
    return instructions.mixture(split, tasks=tasks, **arguments).items


def only_the_evals_wording(name):
    entry = entries.instructed(name).to_dict()
    entry["instructions"] |= dict(phrasings=(), reversed=())
    return {name: entry}


# Wordings


@pytest.mark.parametrize("name", [*PYDOCS, *ELSEWHERE])
def test_every_wording_is_for_every_record(name):
    entry = entries.instructed(name)
    records = ELSEWHERE.get(name) or pydocs_tasks.load("train", entry.source.pydocs)
    own = entry.prompt.get("templates", (entry.prompt.get("template"),))
    questions = [*own, *entry.instructions.phrasings]
    assert len(set(questions)) == len(questions) >= 4
    for text in questions:
        template = prompts.Template(text, "t")
        for record in records:
            asked = template(record)
            # The answer begins with a space.
            assert asked.strip() == asked.rstrip() and not asked.endswith(" ")
    for question, answer in entry.instructions.reversed:
        for record in records:
            turned = record | dict(answer="ANSWER")
            assert "ANSWER" in prompts.Template(question, "t")(turned)
            assert prompts.Template(answer, "t")(turned).strip()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tasks_with_files(name, tmp_path):
    """As get_config of configs/sft.py gives their paths."""
    records = ELSEWHERE[name]
    path = f"{tmp_path}/{{split}}.jsonl"
    for split in ("train", "validation", "test"):
        lines = [json.dumps(record) + "\n" for record in records]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    if name.startswith("multi30k"):
        path = f"{tmp_path}/{{split}}.{{column}}"
        for split, column in (("train", "en"), ("train", "de")):
            (tmp_path / f"{split}.{column}").write_text(records[0][column] + "\n")

    get_config = runpy.run_path("configs/sft.py")["get_config"]
    c = get_config(f"flan,,{name}={path}")
    assert c.evals[name].source == c.data.source_args.tasks[name].source
    arguments = c.data.source_args.to_dict()
    arguments["tasks"] = {name: arguments["tasks"][name]}
    arguments.update(held_out_clusters="", rounds=20)
    examples = instructions.mixture("train", **arguments).items
    assert len(examples) == 20 * len(records)
    assert len({example.text for example in examples}) > 4 * len(records)


def test_answers_are_first_words_choices_and_targets():
    words = {"python", "numpy", "scipy", "jax"}
    for example in ask("pydocs_library", wording=dict(options=1.0)):
        question, answer = (message["content"] for message in example.conversations[0])
        listed = [line[2:] for line in question.split("\n") if line.startswith("- ")]
        assert set(listed[-4:]) == words and answer.strip() in words and answer.startswith(" ")

    records = pydocs_tasks.load("train", "questions")
    for example in ask("pydocs_questions"):
        number = int(example.name.removeprefix("pydocs_questions[").removesuffix("]"))
        assert example.conversations[0][-1]["content"] == " " + records[number]["answer"]
        assert records[number]["excerpt"] in example.text

    for example in ask("pydocs_which_parameter", wording=dict(options=1.0)):
        question, answer = (message["content"] for message in example.conversations[0])
        assert f"\n-{answer}\n" in question


def test_options(tmp_path):
    assert not any("OPTIONS" in e.text for e in ask("pydocs_optional", wording=dict(options=0.0)))
    examples = ask("pydocs_optional", wording=dict(options=0.25))
    share = sum("OPTIONS" in example.text for example in examples) / len(examples)
    assert 0.15 < share < 0.35
    # Texts have none.
    assert not any("OPTIONS" in e.text for e in ask("pydocs_raises", wording=dict(options=1.0)))

    (tmp_path / "train.jsonl").write_text(json.dumps(ELSEWHERE["banking77"][0]) + "\n")
    path = dict(path=str(tmp_path / "{split}.jsonl"))
    task = entries.instructed("banking77", source=path).to_dict()
    task["instructions"]["reversed"] = ()
    how = dict(options=1.0, most_options=5)
    examples = instructions.mixture("train", tasks=dict(b=task), rounds=20, wording=how).items
    places = set()
    for example in examples:
        listed = [line for line in example.text.split("\n") if line.startswith("- ")]
        assert len(set(listed)) == 5
        places.add(listed.index("- card arrival"))
    assert len(places) > 2


def test_options_come_before_what_asks_for_the_answer():
    assert instructions.with_options("Q?", [" a", " b"]) == "Q?\nOPTIONS:\n- a\n- b\nAnswer:"
    asked = instructions.with_options("Text.\n\nMood:", [" a", " b"])
    assert asked == "Text.\nOPTIONS:\n- a\n- b\nMood:"


def test_examples_before_the_question():
    how = dict(options=0.0, shots=3)
    counts = Counter()
    for example in ask("pydocs_section", wording=how):
        turns = example.conversations[0]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        counts[len(turns) // 2 - 1] += 1
    assert counts.keys() == {0, 1, 2, 3}
    assert min(counts.values()) > 0.15 * counts.total()

    for example in ask("pydocs_optional", wording=how | dict(shots_as="text", most_chars=900)):
        question, answer = example.conversations[0]
        assert len(question["content"]) + len(answer["content"]) <= 900 + 2 * 3


# Rates


def test_rates_are_numbers_of_examples_up_to_a_cap(tmp_path):
    tasks = {name: write_task(tmp_path, name, num) for name, num in (("a", 6), ("b", 50))}
    documents = instructions.mixture("train", tasks=tasks, rate_cap=20, rounds=3)
    assert Counter(example.source for example in documents.items) == dict(a=18, b=60)
    # All examples come before one comes again.
    of_b = Counter(example.name for example in documents.items if example.source == "b")
    assert len(of_b) == 50 and set(of_b.values()) == {1, 2}
    assert all("train" in example.text for example in documents.items)

    # What evals read.
    documents = instructions.mixture("validation", tasks=tasks, rate_cap=20)
    assert Counter(example.source for example in documents.items) == dict(a=6, b=20)
    assert all("test" in example.text for example in documents.items)


def test_a_seed_is_a_mixture(tmp_path):
    tasks = dict(a=write_task(tmp_path, "a", 30))
    first = instructions.mixture("train", tasks=tasks, rate_cap=10)
    assert instructions.mixture("train", tasks=tasks, rate_cap=10) == first
    others = [instructions.mixture("train", tasks=tasks, rate_cap=10, seed=s) for s in (1, 2)]
    assert len({documents.fingerprint for documents in (first, *others)}) == 3


# What is held out


def test_what_is_held_out_is_not_even_read(tmp_path):
    tasks = dict(a=write_task(tmp_path, "a", 4), b=write_task(tmp_path, "b", 4))
    for name in ("c", "d"):
        tasks[name] = write_task(tmp_path, name, 4, cluster=f"of {name}")
        tasks[name]["source"]["path"] = "/not/there/{split}.jsonl"
    documents = instructions.mixture(
        "train", tasks=tasks, held_out_clusters="of c, of d", held_out_tasks="b"
    )
    assert {example.source for example in documents.items} == {"a"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(held_out_clusters="size"), r"unknown 'size'; valid: \['colour', 'shape'\]"),
        (dict(held_out_tasks="c"), r"held_out_tasks: unknown 'c'; valid: \['a', 'b'\]"),
        (dict(held_out_clusters="colour,shape"), r"holds out all tasks, \['a', 'b'\]; wanted some"),
        (dict(held_out_clusters="colour", held_out_tasks="b"), "holds out all tasks"),
        (dict(wording=dict(shot=3)), r"wording.shot is no key; valid: \['options', "),
        (dict(wording=dict(options=2.0)), "options = 2.0; wanted a share, 0 to 1"),
        (dict(wording=dict(shots_as="rows")), r"'rows'; valid: \['turns', 'text'\]"),
        (dict(rate_cap=0), "rate_cap = 0; wanted 1 or above"),
        (dict(split="dev"), r"no split 'dev'; valid: \['train', 'validation'\]"),
    ],
)
def test_refused(tmp_path, arguments, message):
    tasks = dict(a=write_task(tmp_path, "a", 4), b=write_task(tmp_path, "b", 4, cluster="shape"))
    with pytest.raises(ValueError, match=message):
        instructions.mixture(**(dict(split="train", tasks=tasks) | arguments))


def test_tasks_refused(tmp_path):
    for changes in (dict(split="train"), dict(path=str(tmp_path / "a-test.jsonl"))):
        task = write_task(tmp_path, "a", 4, **changes)
        with pytest.raises(ValueError, match="'a' has no split to train on: .*; wanted another"):
            instructions.mixture("train", tasks=dict(a=task))

    task = write_task(tmp_path, "a", 4)
    task["instructions"]["phrasings"] = ("{text}?", "{sentence}?")
    with pytest.raises(ValueError, match=r"'sentence'; the record has \['label', 'text'\]"):
        instructions.mixture("train", tasks=dict(a=task))
    task["instructions"] |= dict(phrasings=(), reversed=("{answer}?", "{text}"))
    with pytest.raises(ValueError, match="reversed: '{answer}.'; wanted pairs of a question and"):
        instructions.mixture("train", tasks=dict(a=task))
    with pytest.raises(ValueError, match="'a' has no instructions.rejected"):
        instructions.preferences("train", tasks=dict(a=task))
    del task["instructions"]
    with pytest.raises(ValueError, match="tasks.a has no instructions; wanted an entry of"):
        instructions.mixture("train", tasks=dict(a=task))

    with pytest.raises(ValueError, match=r"'rte' has no instructions.cluster; wanted one of \['"):
        entries.instructed("rte")
    path = tmp_path / "a.toml"
    path.write_text(path.read_text().replace("phrasings", "phrasing"))
    with pytest.raises(ValueError, match="instructions has no key 'phrasing'; valid: "):
        entries.task(str(path))

    family = entries.instructed("pydocs_name", source=dict(pydocs="size")).to_dict()
    with pytest.raises(ValueError, match=r"source.pydocs = 'size'; valid: \['library', "):
        instructions.mixture("train", tasks=dict(a=family))


# As evals ask


def evaluate(cls, name, tokenizer, format):
    """An evaluator of a task, and the prompts and continuations that it asks about."""
    entry = entries.task(name, prompt=dict(format=format), max_documents=6).to_dict()
    for key in ("type", "every", "batch_size"):
        del entry[key]
    fns = Model(random_distribution, length=LENGTH)
    return cls(fns, name=name, encoder=Encoder(tokenizer, ""), **entry)


def encoded_mixture(name, tokenizer, space):
    """The ids of the conversations about the examples that an eval asks about, by their numbers."""
    tasks = only_the_evals_wording(name)
    how = dict(options=0.0, space=space)
    examples = instructions.mixture("validation", tasks=tasks, wording=how).items
    rows = chat_ids.ChatEncoder(tokenizer, "answers").encode(
        [example.conversations[0] for example in examples]
    )
    ids = {}
    for example, (row,) in zip(examples, rows):
        ids[example.name.removeprefix(name)] = row.ids.tolist()
    return ids


@pytest.mark.parametrize(
    "template, format, space", [("plain", "text", True), ("alpaca", "chat", False)]
)
def test_answers_have_the_ids_that_evals_score(tokenizer, template, format, space):
    tokenizer = chat.with_template(tokenizer, template)
    eos = tokenizer.eos_id

    name = "pydocs_library"
    task = evaluate(classification.PromptClassification, name, tokenizer, format)
    ids = encoded_mixture(name, tokenizer, space)
    (variant,) = task.prompt_set.variants
    for number, gold, question in zip(
        task.prompt_set.example_names, task.prompt_set.gold, variant.questions
    ):
        number = number.removeprefix("validation")
        assert ids[number] == [*question.prompt.ids, *question.continuations[gold], eos]

    name = "pydocs_which_parameter"
    task = evaluate(choice.MultipleChoice, name, tokenizer, format)
    ids = encoded_mixture(name, tokenizer, space)
    for number, gold, question in zip(task._example_names, task._gold, task._questions):
        number = number.removeprefix("validation")
        assert ids[number] == [*question.prompt.ids, *question.continuations[gold], eos]

    name = "pydocs_questions"
    task = evaluate(generation.TextGeneration, name, tokenizer, format)
    ids = encoded_mixture(name, tokenizer, space)
    for number, prompt in zip(task._example_names, task._prompt_ids):
        assert ids[number.removeprefix("validation")][: len(prompt)] == prompt


# Pairs


def test_preferences():
    tasks = dict(q=entries.instructed("pydocs_questions").to_dict())
    documents = instructions.preferences("train", tasks=tasks, rate_cap=100)
    assert documents.kind == "pair" and len(documents) == 100
    for example in documents.items:
        chosen, rejected = example.conversations
        assert chosen[:-1] == rejected[:-1]
        right, wrong = chosen[-1]["content"], rejected[-1]["content"]
        assert right != wrong and abs(len(right) - len(wrong)) <= 1
        assert right[0] == wrong[0] == " "


def test_questions():
    """A mixture's conversations without their last answers, which rewards know."""
    tasks = dict(q=entries.instructed("pydocs_questions").to_dict())
    arguments = dict(tasks=tasks, rate_cap=50, seed=3)
    asked = instructions.questions("train", **arguments)
    mixed = instructions.mixture("train", **arguments)
    assert asked.kind == "prompt" and len(asked) == len(mixed) == 50
    for item, example in zip(asked.items, mixed.items, strict=True):
        (messages,) = example.conversations
        assert item.prompt == messages[:-1] and item.name == example.name
        assert item.record == dict(answer=messages[-1]["content"].strip(), task="q")


# configs/sft.py


def test_the_base_model_is_that_of_a_run(tmp_path, tiny):
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_dict()))
    c = runpy.run_path("configs/sft.py")["get_config"](f"opt_iml,{tmp_path}")
    assert c.model.embed_dim == 32 and c.data.length == 32
    assert c.tokenizer.path == str(tmp_path / "tokenizer") and c.init_from == str(tmp_path)
    tasks = c.data.source_args.tasks
    assert isinstance(tasks, ConfigDict) and set(tasks) | {"validation"} == set(c.evals)
    clusters = {task.instructions.cluster for task in tasks.values()}
    assert c.data.source_args.held_out_clusters in clusters
    assert c.data.source_args.held_out_tasks in tasks
