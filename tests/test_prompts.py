"""Templates, and the draw of examples before the question."""

import collections

import pytest

from lm.evals import prompts

RECORD = {"text": "The cat sat. ", "answers": {"text": ["a", "b"], "n": [1, 2]}, "k": 3}
# One record in ten has the rare label.
POOL = [dict(n=i, label="rare" if i % 10 == 9 else "common") for i in range(60)]


@pytest.mark.parametrize(
    "template, text",
    [
        ("{text}", "The cat sat. "),
        ("{{{text:strip}}} {k}", "{The cat sat.} 3"),
        ("{text:head}|{text:last}", "The cat|sat."),
        ("{text:lower}", "the cat sat. "),
        ("{answers[text][1]}", "b"),
        ("", ""),
        ("plain", "plain"),
    ],
)
def test_templates(template, text):
    assert prompts.Template(template, "t")(RECORD) == text


def test_lists_give_a_text_for_each_element():
    texts = prompts.Template(" {answers[text]}: {answers[n]}, {k}", "t").each(RECORD)
    assert texts == [" a: 1, 3", " b: 2, 3"]

    with pytest.raises(ValueError, match="gives 2 texts for one record"):
        prompts.Template("{answers[text]}", "t")(RECORD)


@pytest.mark.parametrize(
    "written",
    [
        "{{text}}",
        "{{ text }}",
        "{{text:strip}}",
        "{{text|trim}}",
        "{{ text | trim }}",
        "{{text.strip()}}",
        "{{answers[text]}}",
        "{{answers.text}}",
    ],
)
def test_doubled_braces_around_a_column(written):
    """lm_eval and promptsource write columns so; here they would be the same text for all."""
    column = "answers" if "answers" in written else "text"
    with pytest.raises(ValueError) as error:
        prompts.Template(f"{{k}}: {written}", "t")(RECORD)
    assert f"{written} is text and not the column {column!r}; write {{{column}}}" in str(error)


@pytest.mark.parametrize(
    "template, text",
    [
        ('{{"text": "{text:strip}", "k": {k}}}', '{"text": "The cat sat.", "k": 3}'),
        ("{{name}} {k}", "{name} 3"),
        ("{{text: 1}} {k}", "{text: 1} 3"),
        ("{{{{text}}}} {k}", "{{text}} 3"),
    ],
)
def test_braces_that_are_meant(template, text):
    assert prompts.Template(template, "t")(RECORD) == text


def test_a_template_without_columns():
    with pytest.raises(ValueError, match=r"t = 'Review' has no column: .* such as \{text\}"):
        prompts.Template("Review", "t").check_has_column()
    with pytest.raises(ValueError, match=r"\{\{ x \}\} is text; write \{x\} for a column"):
        prompts.Template("Review: {{ x }}", "t").check_has_column()


@pytest.mark.parametrize("value", [None, {"a": 1}])
def test_values_without_a_spelling(value):
    with pytest.raises(ValueError, match="'text' of a record is .*; wanted text or a number"):
        prompts.Template("{text}", "t")({"text": value})


def test_parts_of_a_template():
    template = prompts.Template("Q: {text} {k}\nA:", "t")
    assert template.fields == ["text", "k"]
    assert template.tail == "\nA:"
    assert template.fill(["N/A", "none"]) == "Q: N/A none\nA:"

    assert prompts.Template("{k}", "t").tail == ""


def test_a_column_that_is_used_twice_is_filled_twice():
    template = prompts.Template("{text:lower} {k} {text}", "t")
    assert template.fields == ["text", "k", "text"]
    assert template.fill(["A", "B", "C"]) == "a B C"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{text", "is no template"),
        ("{text:upper}", "not a column with one of the filters"),
        ("{}", "not a column"),
        ("{text!r}", "not a column"),
    ],
)
def test_texts_that_are_no_template(template, message):
    with pytest.raises(ValueError, match=message):
        prompts.Template(template, "config.evals.x.prompt.templates")


@pytest.mark.parametrize(
    "template", ["{body}", "{answers[words]}", "{answers[text][2]}", "{text[k]}"]
)
def test_a_missing_column(template):
    with pytest.raises(
        ValueError, match=r"t = .* needs the column .*; the record has \['answers', 'k', 'text'\]"
    ):
        prompts.Template(template, "t")(RECORD)


def label_of(record):
    return record["label"]


def identity_of(record):
    return record["n"]


def select(count, sampler="balanced", seed=0, avoid=(), pool=POOL):
    return prompts.draw_shots(
        pool,
        dict(shots=count, sampler=sampler),
        seed,
        identity=identity_of,
        avoid=set(avoid),
        name="x",
        label=label_of,
        num_labels=2,
    )


def numbers(shots):
    for shot in shots:
        assert POOL[shot.index % len(POOL)] == shot.record
    return [shot.record["n"] for shot in shots]


def label_counts(shots):
    return collections.Counter(label_of(shot.record) for shot in shots)


def test_first_n():
    assert numbers(select(3, "first_n")) == [0, 1, 2]

    # Any other seed than 0 shuffles them.
    orders = {tuple(numbers(select(3, "first_n", seed))) for seed in range(9)}
    assert len(orders) > 2
    for order in orders:
        assert sorted(order) == [0, 1, 2]


def test_random():
    # Six of the 60 are rare: 40 have some of them, but not as many as of the others.
    assert 0 < label_counts(select(40, "random"))["rare"] < 7


def test_balanced():
    assert select(8) == select(8) != select(8, seed=1)
    assert label_counts(select(8)) == {"rare": 4, "common": 4}
    assert sorted(label_counts(select(7)).values()) == [3, 4]

    # A label with too few records gives all of them; none is drawn twice.
    assert label_counts(select(20))["rare"] == 6
    assert len(set(numbers(select(20)))) == 20

    # The labels don't come in turns.
    orders = set()
    for seed in range(20):
        orders.add(tuple(label_of(shot.record) for shot in select(4, seed=seed)))
    assert len(orders) > 3


@pytest.mark.parametrize("sampler", prompts.SAMPLERS)
def test_what_is_evaluated_is_no_example(sampler):
    shots = select(30, sampler, avoid=range(30))
    assert set(numbers(shots)) == set(range(30, 60))

    message = (
        "config.evals.x.prompt.shots = 31, but there are 30 examples that aren't evaluated "
        "themselves"
    )
    with pytest.raises(ValueError, match=message):
        select(31, sampler, avoid=range(30))


@pytest.mark.parametrize("sampler", prompts.SAMPLERS)
def test_no_example_is_drawn_twice(sampler):
    assert sorted(numbers(select(60, sampler, pool=POOL * 2))) == list(range(60))
    with pytest.raises(ValueError, match="there are 60 examples .*, each text counted once"):
        select(61, sampler, pool=POOL * 2)


def test_records_that_differ_in_case_and_white_space_are_one_example():
    template = prompts.Template("{text}: {answers[text]}", "t")
    record = dict(text="Great  film", answers=dict(text=["Yes", "no"]), k=1)
    same = dict(text=" great\tFILM\n", answers=dict(text=["yes ", "NO"]), k=2)
    assert template.identity(record) == template.identity(same)
    assert template.identity(record) != template.identity(record | dict(text="Great films"))
    # Not by the text that they give together.
    pair = prompts.Template("{a} {b}", "t")
    assert pair.identity(dict(a="x", b="y z")) != pair.identity(dict(a="x y", b="z"))


def test_a_pool_of_one_label(caplog):
    common = [record for record in POOL if record["label"] == "common"]
    message = "x.prompt.shots = 4: source.shots_split has examples of 1 of 2 labels only; take ano"
    with pytest.raises(ValueError, match=message):
        select(4, pool=common)

    # No sampler but "balanced" promises another one. Of a single example none can.
    for sampler in ("random", "first_n"):
        caplog.clear()
        select(4, sampler, pool=common)
        assert "x.prompt.shots = 4: all of the examples have the same label" in caplog.text
    caplog.clear()
    select(1, pool=common)
    select(20, "random")
    assert not caplog.text


def test_unknown_sampler():
    with pytest.raises(
        ValueError,
        match=r"config.evals.x.prompt.sampler = 'best'; valid: \['balanced', 'first_n', 'random'\]",
    ):
        select(1, "best")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "can't come from the split 'test' that is evaluated"),
        ({"shots_split": "train"}, "can't come from a.en, which is evaluated"),
        ({"shots_split": "train", "path": "a.jsonl"}, "can't come from a.jsonl, which is evalu"),
    ],
)
def test_shots_from_the_evaluated_data(changes, message):
    source = dict(
        path="", lines=dict(en="a.en"), tfds="", data_dir="", split="test", shots_split="test"
    )
    with pytest.raises(ValueError, match=message):
        prompts.load_shots(source | changes, "x")


def test_truncate_prompt():
    """Of a continuation the last token needs no room: it is predicted, but never read."""
    assert prompts.truncate_prompt([9], [1, 2, 3], 2, 5, "x") == ([9, 1, 2, 3], 0)
    assert prompts.truncate_prompt([9], [1, 2, 3, 4], 2, 4, "x") == ([9, 3, 4], 2)
    assert prompts.truncate_prompt([], [1, 2, 3, 4], 1, 3, "x") == ([2, 3, 4], 1)

    with pytest.raises(ValueError, match="a continuation of 5 tokens leaves no room"):
        prompts.truncate_prompt([9], [1], 5, 5, "x")
