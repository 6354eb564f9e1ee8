"""Templates and examples before the question."""

import collections

import pytest

from lm.evals import prompts

RECORD = {"text": "The cat sat. ", "answers": {"text": ["a", "b"], "n": [1, 2]}, "k": 3}


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
    assert prompts.Template(" {answers[text]}: {answers[n]}, {k}", "t").each(RECORD) == [
        " a: 1, 3",
        " b: 2, 3",
    ]
    with pytest.raises(ValueError, match="gives 2 texts for one record"):
        prompts.Template("{answers[text]}", "t")(RECORD)


@pytest.mark.parametrize("value", [None, {"a": 1}])
def test_what_is_no_text(value):
    with pytest.raises(ValueError, match="'text' of a record is .*; wanted text or a number"):
        prompts.Template("{text}", "t")({"text": value})


def test_parts():
    template = prompts.Template("Q: {text} {k}\nA:", "t")
    assert (
        template.tail == "\nA:"
        and template.filled("N/A") == "Q: N/A N/A\nA:"
        and template.fields == ["text", "k"]
    )
    assert prompts.Template("{k}", "t").tail == ""


@pytest.mark.parametrize(
    "template, message",
    [
        ("{text", "is no template"),
        ("{text:upper}", "not a column with one of the filters"),
        ("{}", "not a column"),
        ("{text!r}", "not a column"),
    ],
)
def test_no_template(template, message):
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


POOL = [dict(n=i, label="rare" if i % 10 == 9 else "common") for i in range(60)]


def choose(count, sampler="balanced", seed=0, avoid=lambda record: False):
    return prompts.select_shots(
        POOL,
        count,
        sampler=sampler,
        seed=seed,
        avoid=avoid,
        name="x",
        label=lambda r: r["label"],
        num_labels=2,
    )


def test_samplers():
    assert [r["n"] for r in choose(3, "first_n")] == [0, 1, 2]
    orders = [[r["n"] for r in choose(3, "first_n", seed=seed)] for seed in range(9)]
    assert len(set(map(tuple, orders))) > 2 and all(sorted(order) == [0, 1, 2] for order in orders)
    assert choose(8) == choose(8) != choose(8, seed=1)
    assert collections.Counter(r["label"] for r in choose(8)) == {"rare": 4, "common": 4}
    assert sorted(collections.Counter(r["label"] for r in choose(7)).values()) == [3, 4]
    assert collections.Counter(r["label"] for r in choose(20))["rare"] == 6  # all that there are
    assert len({r["n"] for r in choose(20)}) == 20
    orders = {tuple(r["label"] for r in choose(4, seed=seed)) for seed in range(20)}
    assert len(orders) > 3  # labels don't come in turns
    assert 0 < collections.Counter(r["label"] for r in choose(40, "random"))["rare"] < 7


@pytest.mark.parametrize("sampler", prompts.SAMPLERS)
def test_what_is_evaluated_is_no_example(sampler):
    assert {r["n"] for r in choose(30, sampler, avoid=lambda r: r["n"] < 30)} == set(range(30, 60))
    with pytest.raises(
        ValueError,
        match=(
            "config.evals.x.prompt.shots = 31, but there are 30 examples that aren't evaluated "
            "themselves"
        ),
    ):
        choose(31, sampler, avoid=lambda r: r["n"] < 30)


def test_refused():
    with pytest.raises(
        ValueError,
        match=r"config.evals.x.prompt.sampler = 'best'; valid: \['balanced', 'first_n', 'random'\]",
    ):
        choose(1, "best")
    source = dict(
        path="", lines=dict(en="a.en"), tfds="", data_dir="", split="test", shots_split="test"
    )
    with pytest.raises(ValueError, match="can't come from the split 'test' that is evaluated"):
        prompts.load_shots(source, "x")
    with pytest.raises(ValueError, match="can't come from a.en, which is evaluated"):
        prompts.load_shots(source | {"shots_split": "train"}, "x")
    with pytest.raises(ValueError, match="can't come from a.jsonl, which is evaluated"):
        prompts.load_shots(source | {"shots_split": "train", "path": "a.jsonl"}, "x")


def test_fit():
    assert prompts.truncate_prompt([9], [1, 2, 3], 2, 5, "x") == ([9, 1, 2, 3], False)
    # and 1 of the continuation is read
    assert prompts.truncate_prompt([9], [1, 2, 3, 4], 2, 4, "x") == ([9, 3, 4], True)
    assert prompts.truncate_prompt([], [1, 2, 3, 4], 1, 3, "x") == ([2, 3, 4], True)
    with pytest.raises(ValueError, match="a continuation of 5 tokens leaves no room"):
        prompts.truncate_prompt([9], [1], 5, 5, "x")
