"""Evals that ask by templates, on models whose distributions are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lm import config as config_lib
from lm.data.pack import Encoder
from lm.data.tokenizer import ByteTokenizer
from lm.evals import choice, classification, entries, linear, prompts
from lm.evals.predict import Artifact
from lm.evals.scores import calibration
from lm.evals.verbalizer import label_scores, word_scores
from lm.reports import tables
from tests.test_classification import Model, random_distribution, uniform_distribution

LABELS = ("red", "green", "blue")
TASKS = sorted(path.stem for path in Path(config_lib.__file__).parent.glob("evals/tasks/*.toml"))


def write(folder, n=24):
    for split in ("train", "test"):
        rows = [dict(text=f"{split} {i}", label=LABELS[i * i % 3]) for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task(path, template, shots_split="train"):
    """The TOML file that says the least, of the records beside it."""
    path.write_text(
        """type = "lm.evals.classification.PromptClassification"
[source]
path = "FOLDER/{split}.jsonl"
shots_split = "SHOTS"
[prompt]
templates = ["TEMPLATE"]
[[verbalizer.words]]
red = [" red"]
green = [" green"]
blue = [" blue"]
""".replace("FOLDER", str(path.parent))
        .replace("SHOTS", shots_split)
        .replace("TEMPLATE", template)
    )
    return str(path)


def arguments(folder, **changes):
    """Those of a task."""
    found = entries.task(write_task(folder / "colours.toml", r"{text}\n?"), **changes).to_dict()
    return {
        key: value for key, value in found.items() if key not in ("type", "every", "batch_size")
    }


def make(folder, fns=None, tokenizer=None, cls=classification.PromptClassification, **changes):
    if not (folder / "test.jsonl").exists():
        write(folder)
    return cls(
        fns or Model(random_distribution),
        name="colours",
        encoder=Encoder(tokenizer or ByteTokenizer(), ""),
        **arguments(folder, **changes),
    )


def run(*args, **kwargs):
    values = dict(make(*args, **kwargs).run(None))
    files = {key: value.content for key, value in values.items() if isinstance(value, Artifact)}
    return {key: value for key, value in values.items() if key not in files}, files


def lines(files):
    return [json.loads(line) for line in files["predictions"].splitlines()]


def test_a_task_says_what_the_documents_eval_does(tmp_path):
    """The same prompts and words, where no token spans two parts."""
    from lm.data.sources import Document, Documents

    write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    documents = Documents([Document(row["text"], "", row["label"]) for row in rows], "")
    evaluator = classification.DocumentClassification(
        Model(random_distribution),
        name="x",
        documents=documents,
        encoder=Encoder(ByteTokenizer(), "\n?"),
        verbalizer=[(label, (f" {label}",)) for label in LABELS],
        max_documents=0,
    )
    old = {key: value for key, value in evaluator.run(None) if not isinstance(value, Artifact)}
    new, _ = run(tmp_path)
    assert old.items() <= new.items() and {"accuracy_domain", "nll_pmi_dc"} <= set(new) - set(old)


def test_the_prompt_that_is_asked(tmp_path):
    fns = Model(random_distribution, length=200)
    task = make(tmp_path, fns, prompt=dict(shots=2, seeds=(3,)))
    task.run(None).__next__()
    text = bytes(fns.trees[0].tokens[1 : fns.trees[0].at.min() + 1].tolist()).decode()
    *shots, question = text.split("\n\n")
    assert question == "test 0\n?" and len(shots) == 2 and fns.trees[0].tokens[0] == 256
    rows = {
        f"{row['text']}\n? {row['label']}"
        for row in map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())
    }
    assert set(shots) <= rows and shots[0].split()[-1] != shots[1].split()[-1]  # balanced
    free = fns.trees[24:]
    # says nothing
    assert bytes(free[0].tokens[1 : free[0].at.min() + 1].tolist()).decode() == "\n\n".join(
        [*shots, "\n?"]
    )
    premise = [
        tree for tree in free if bytes(tree.tokens[1 : tree.at.min() + 1].tolist()) == b"\n?"
    ]
    assert len(premise) == 1 and len(free) == 3 + 20 + 1


def test_words_are_shown_in_their_tokens(tmp_path):
    words = ((("red", (" r",)), ("green", (" ge", " n")), ("blue", (" b",))),)
    about = make(tmp_path, verbalizer=dict(words=words)).about
    assert about["words"] == [
        {
            "red": {" r": [" ", "r"]},
            "green": {" ge": [" ", "g", "e"], " n": [" ", "n"]},
            "blue": {" b": [" ", "b"]},
        }
    ]
    known = dict(step=3, versions=dict(lm="1"), tokenizer="bytes-1", evals=dict(x=about)) | {
        "from": "run"
    }
    said = tables.markdown(
        known,
        {
            "eval/x/accuracy": 0.5,
            "eval/x/accuracy_low": 0.25,
            "eval/x/accuracy_high": 0.75,
            "eval/x/examples": 24,
        },
    )
    assert (
        "| accuracy | 0.5000 | 0.2500 to 0.7500 |" in said
        and "| examples | 24 |  |" in said
        and "green: [' ', 'g', 'e'], [' ', 'n']" in said
    )
    assert "# Step 3 of run" in said and "accuracy_low" not in said


def test_ways_of_asking_are_averaged(tmp_path):
    options = dict(
        prompt=dict(templates=("{text}\n=", "Q {text} ="), shots=1, seeds=(0, 1)), priors=()
    )
    other = tuple((label, (f" {label[0]}",)) for label in LABELS)
    words = (tuple((label, (f" {label}",)) for label in LABELS), other)
    fns = lambda: Model(random_distribution, length=100)
    single = []
    for template in options["prompt"]["templates"]:
        for one in words:
            for seed in (0, 1):
                single.append(
                    lines(
                        run(
                            tmp_path,
                            fns(),
                            prompt=dict(templates=(template,), shots=1, seeds=(seed,)),
                            verbalizer=dict(words=(one,)),
                        )[1]
                    )
                )
    P = np.array(
        [[[line["distribution"][label] for label in LABELS] for line in one] for one in single]
    )
    gold = np.array([LABELS.index(line["label"]) for line in single[0]])
    accuracies = (P.argmax(axis=2) == gold).mean(axis=1)
    metrics, files = run(tmp_path, fns(), verbalizer=dict(words=words), **options)
    found = np.array([[line["distribution"][label] for label in LABELS] for line in lines(files)])
    np.testing.assert_allclose(found, P.mean(axis=0), atol=1e-6)
    assert (
        metrics["ways"] == 8
        and metrics["accuracy_mean"] == pytest.approx(accuracies.mean())
        and metrics["accuracy_min"] == accuracies.min()
    )
    assert metrics["accuracy_max"] == accuracies.max() and metrics[
        "accuracy_spread"
    ] == pytest.approx(accuracies.std(ddof=1))
    assert [way["accuracy"] for way in json.loads(files["ways_table"])] == pytest.approx(
        accuracies.tolist()
    )
    logs = np.log(P).mean(axis=0)
    found = np.array(
        [
            [line["distribution"][label] for label in LABELS]
            for line in lines(
                run(
                    tmp_path,
                    fns(),
                    verbalizer=dict(words=words),
                    ensemble="mean_logprob",
                    **options,
                )[1]
            )
        ]
    )
    np.testing.assert_allclose(found, calibration.softmax(logs), atol=1e-6)


def test_corrections_divide_by_what_is_said_anyway(tmp_path):
    metrics, files = run(tmp_path)
    (free,) = json.loads(files["priors"])
    total = lambda said: np.array([sum(said[label][f" {label}"]) for label in LABELS])
    P = np.array([[line["distribution"][label] for label in LABELS] for line in lines(files)])
    gold = np.array([LABELS.index(line["label"]) for line in lines(files)])
    assert {prior: len(said) for prior, said in free.items()} == {
        "content_free": 3,
        "domain": 20,
        "pmi_dc": 1,
    }
    for prior, said in free.items():
        mean = calibration.softmax(np.array([total(one) for one in said])).mean(axis=0)
        assert metrics[f"nll_{prior}"] == pytest.approx(
            calibration.nll(calibration.divided(P, mean), gold), abs=1e-5
        )
    assert metrics["nll_batch"] == pytest.approx(
        calibration.nll(calibration.divided(P, P.mean(axis=0)), gold), abs=1e-6
    )
    assert {
        key
        for key in run(tmp_path, priors=("batch",))[0]
        if "content" in key or "pmi" in key or "domain" in key
    } == set()


def test_scores_are_computed_again_without_the_model(tmp_path):
    words = (tuple((label, (f" {label}", f" {label[:2]}!")) for label in LABELS),)
    for aggregate, norm in (("mean", "token"), ("max", "byte"), ("logmeanexp", "none")):
        plain = lines(run(tmp_path, verbalizer=dict(words=words))[1])
        other = lines(
            run(tmp_path, verbalizer=dict(words=words, aggregate=aggregate, length_norm=norm))[1]
        )
        labels, logprobs = classification.read_word_logprobs(plain)
        P = calibration.softmax(
            label_scores(word_scores(logprobs, norm), logprobs.label, aggregate)
        )
        assert labels == list(LABELS)
        np.testing.assert_allclose(
            P, [[line["distribution"][label] for label in LABELS] for line in other], atol=1e-5
        )
    weighted = lines(run(tmp_path, verbalizer=dict(words=words, weights=(1.0, 2.0) * 3))[1])
    P = calibration.softmax(
        label_scores(word_scores(logprobs), logprobs.label, "sum", np.array([1, 2] * 3))
    )
    np.testing.assert_allclose(
        P, [[line["distribution"][label] for label in LABELS] for line in weighted], atol=1e-5
    )


def test_a_terminator_is_scored_with_the_word(tmp_path):
    """So that "re" can be told from "red"; lengths stay the words'."""
    words = ((("red", (" re",)), ("green", (" red",)), ("blue", (" b",))),)
    with pytest.raises(ValueError, match="begin with the same tokens"):
        make(tmp_path, verbalizer=dict(words=words))
    task = make(tmp_path, verbalizer=dict(words=words, terminator="\n"))
    found = classification.score_prompts(task.predict_fns, None, task.questions)[0].examples
    assert found.num_tokens[0].tolist() == [4, 5, 3] and found.num_chars.tolist() == [2, 3, 1]
    prefix = [256, *b"test 0\n? re"]
    assert found.tokens[0, 0, 3] == pytest.approx(
        random_distribution(tuple(prefix))[ord("\n")], abs=1e-5
    )


def test_the_temperature_is_that_of_other_records(tmp_path):
    metrics, _ = run(tmp_path, temperature_examples=12)
    _, files = run(tmp_path, source=dict(split="train", shots_split=""))
    assert metrics["temperature"] > 0 and {"nll_temperature", "ece_temperature"} <= set(metrics)
    task = make(tmp_path, temperature_examples=24)  # all of them
    assert sorted(task.questions.held_gold) == sorted(
        task.gold(row)
        for row in map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())
    )
    P = np.array([[line["distribution"][label] for label in LABELS] for line in lines(files)])
    T = calibration.best_temperature(
        np.log(P), np.array([LABELS.index(line["label"]) for line in lines(files)])
    )
    assert dict(task.run(None))["temperature"] == pytest.approx(T, rel=1e-4)


@pytest.mark.parametrize("value, index", [("green", 1), (2, 2), ("2", 2), ("0", 0)])
def test_labels_by_name_or_number(tmp_path, value, index):
    assert make(tmp_path).gold(dict(label=value)) == index


@pytest.mark.parametrize("value", ["yellow", 3, -1, None, "-1", True])
def test_labels_outside_the_label_space(tmp_path, value):
    with pytest.raises(
        ValueError,
        match=r"a record has the label .*; the verbalizer has words for \['red', 'green', 'blue'\]",
    ):
        make(tmp_path).gold(dict(label=value))


def test_names_that_are_numbers_are_names(tmp_path):
    words = (
        ("2", (" two",)),
        ("1", (" one",)),
        ("0", (" none",)),
        ("red", (" r",)),
        ("green", (" g",)),
        ("blue", (" b",)),
    )
    task = make(tmp_path, verbalizer=dict(words=(words,)))
    assert [task.gold(dict(label=value)) for value in (0, "2", 1)] == [2, 0, 1]


def test_long_prompts_lose_their_beginning_but_for_bos(tmp_path):
    fns = Model(random_distribution, length=20)
    metrics, _ = run(tmp_path, fns, prompt=dict(shots=1))
    assert metrics["cut"] == 24
    for tree in fns.trees[:24]:
        ids = tree.tokens[: tree.at.min() + 1].tolist()
        assert (
            ids[0] == 256
            and 256 not in ids[1:]
            and bytes(ids[-2:]) == b"\n?"
            and len(ids) + len(" green") - 1 == 20
        )
    with pytest.raises(
        ValueError,
        match="a continuation of 6 tokens leaves no room for a prompt in config.data.length = 6",
    ):
        make(tmp_path, Model(random_distribution, length=6))


def test_one_label_only_and_no_text(tmp_path):
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps(dict(text="", label="red")) + "\n" for _ in range(3))
    )
    metrics, _ = run(tmp_path, Model(uniform_distribution), verbalizer=dict(length_norm="token"))
    assert (
        metrics["majority_accuracy"] == 1
        and metrics["nll"] == pytest.approx(math.log(3))
        and "auroc" not in metrics
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(max_documents=-1), "max_documents = -1; wanted 0 or above"),
        (dict(prompt=dict(shots=-1)), "shots = -1; wanted 0 or above"),
        (
            dict(temperature_examples=99),
            "config.evals.colours.temperature_examples = 99, but there are 24 examples",
        ),
        (
            dict(label="kind"),
            r"have no column 'kind' \(config.evals.colours.label\); they have \['label', 'text'\]",
        ),
        (dict(prompt=dict(templates=("{body}",))), "needs the column 'body'"),
        (dict(prompt=dict(templates=())), "needs verbalizer.words, prompt.templates"),
        (
            dict(prompt=dict(shots=2), source=dict(shots_split="")),
            "examples can't come from the split 'test'",
        ),
        (dict(priors=("cc",)), "config.evals.colours.priors = 'cc'"),
        (dict(ensemble="vote"), "ensemble = 'vote'; valid"),
        (dict(verbalizer=dict(boundary="loose")), "verbalizer.boundary = 'loose'; valid"),
        (
            dict(verbalizer=dict(words=((("red", (" r",)),),))),
            r"has the labels \['red'\]; wanted two or more",
        ),
        (
            dict(verbalizer=dict(words=((("red", ()), ("green", (" g",)), ("blue", (" b",))),))),
            "the label 'red' has no word, or an empty one",
        ),
        (
            dict(verbalizer=dict(words=((("red", ("",)), ("green", (" g",)), ("blue", (" b",))),))),
            "the label 'red' has no word, or an empty one",
        ),
        (
            dict(
                verbalizer=dict(words=((("red", (" g",)), ("green", (" g",)), ("blue", (" b",))),))
            ),
            "are the same tokens",
        ),
        (
            dict(
                verbalizer=dict(
                    words=(
                        (("red", (" r",)), ("green", (" g",))),
                        (("red", (" r",)), ("blue", (" g",))),
                    )
                )
            ),
            r"another \['red', 'blue'\]",
        ),
        (
            dict(verbalizer=dict(weights=(1.0, 2.0))),
            "word weights .*: wanted a positive one for each of 3 words",
        ),
        (
            dict(prompt=dict(templates=("{text}: ",))),
            "two spaces would meet; end the prompt without one",
        ),
        (
            dict(verbalizer=dict(words=((("red", ("r",)), ("green", ("g",)), ("blue", ("b",))),))),
            "with nothing between them: begin the word with a space",
        ),
        (dict(source=dict(path="nowhere.jsonl")), "the eval 'colours': no file at nowhere.jsonl"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


class Lower(ByteTokenizer):
    """A tokenizer of an uncased model."""

    def encode(self, text):
        return super().encode(text.lower())


def test_words_come_back_as_they_are(tmp_path):
    words = ((("red", (" Red",)), ("green", (" green",)), ("blue", (" blue",))),)
    with pytest.raises(
        ValueError,
        match=(
            "the word ' Red' comes back from the tokenizer as .* red': write it as the tokenizer "
            "does"
        ),
    ):
        make(tmp_path, tokenizer=Lower(), verbalizer=dict(words=words))
    make(tmp_path, tokenizer=Lower(), verbalizer=dict(words=words, boundary="lm_eval"))


def test_not_finite(tmp_path):
    with pytest.raises(ValueError, match="not finite for 24 of 24 examples"):
        run(tmp_path, Model(lambda prefix: np.full(512, np.nan)))


@pytest.mark.parametrize("name", [name for name in TASKS if entries.task(name).source.tfds])
def test_tfds_has_what_shipped_tasks_read(name, tmp_path):
    """The data set, its configuration, and the columns of the templates."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.summarization
    import tensorflow_datasets.text
    import tensorflow_datasets.translate

    task = entries.task(name)
    dataset, _, chosen = task.source.tfds.partition("/")
    configs = [c.name for c in tfds.builder_cls(dataset).BUILDER_CONFIGS]
    assert chosen in configs if configs else not chosen
    try:
        features = set(tfds.builder(task.source.tfds, data_dir=str(tmp_path)).info.features)
    except ModuleNotFoundError:  # SuperGLUE's builder needs TensorFlow
        assert dataset == "super_glue"
        return
    keys = ("choices", "target", "references")
    templates = [
        *task.prompt.get("templates", ()),
        task.prompt.get("template", ""),
        *(text for key in keys for text in _several(task.get(key, ()))),
    ]
    fields = {
        field.partition("[")[0]
        for text in templates
        for field in prompts.Template(text, "t").fields
    }
    columns = fields | {
        task[key] for key in ("label", "answer") if key in task and not task[key].isdecimal()
    }
    assert fields and columns <= features, (columns, features)


def _several(text):
    return (text,) if isinstance(text, str) else text


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompt=dict(shots="4")), "prompt: shots = '4'; wanted int, such as 0"),
        (dict(prompt=dict(templates="QA")), "templates = 'QA'; wanted an array"),
        (dict(max_documents=True), "max_documents = True; wanted int"),
        (dict(source="x"), "source = 'x'; wanted dict"),
        (dict(label=3), "label = 3; wanted str"),
    ],
)
def test_values_of_the_wrong_kind(changes, message):
    with pytest.raises(ValueError, match=message):
        entries.task("sst2", **changes)


def test_a_single_table_of_words(tmp_path):
    (tmp_path / "t.toml").write_text(
        'type = "lm.evals.classification.PromptClassification"\n[verbalizer.words]\nno = [" '
        'no"]\nyes = [" yes", " sure"]\n'
    )
    assert entries.task(str(tmp_path / "t.toml")).verbalizer.words == (
        (("no", (" no",)), ("yes", (" yes", " sure"))),
    )


@pytest.mark.parametrize("name", TASKS)
def test_shipped_tasks(name):
    """Each is complete, and says where its data comes from and whom to cite."""
    task = entries.task(name)
    assert (
        task.type in entries.TASKS
        and len(task.source.citation) > 20
        and (
            task.source.tfds
            or "source."
            in Path(config_lib.__file__)
            .parent.joinpath("evals", "tasks", f"{name}.toml")
            .read_text()
            .split("\n")[0]
        )
    )
    assert (
        task.to_dict().keys() == {"type", "every", "batch_size"} | entries.TASKS[task.type].keys()
    )


def test_shipped_tasks_are_listed():
    assert {
        "sst2",
        "ag_news",
        "trec",
        "imdb",
        "cola",
        "rte",
        "mnli",
        "boolq",
        "banking77",
        "xquad",
        "squad",
        "xsum",
        "dialogsum",
        "wmt14_en_de",
        "multi30k_en_de",
        "gsm8k",
        "piqa",
        "blimp",
        "lambada",
    } <= set(TASKS)
    with pytest.raises(ValueError, match=r"no task 'sst3'; valid: \['ag_news', "):
        entries.task("sst3")
    with pytest.raises(
        ValueError, match=r"task\('sst2'\): prompt has no key 'shot'; valid: \['shots', 'sampler'"
    ):
        entries.task("sst2", prompt=dict(shot=4))


# Choices


def choose(folder, rows, fns=None, **changes):
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "c.toml").write_text('type = "lm.evals.choice.MultipleChoice"')
    options = (
        dict(
            source=dict(path=str(folder / "test.jsonl")),
            prompt=dict(template="{q}?"),
            choices=(" {a}", " {b}"),
        )
        | changes
    )
    found = {
        key: value
        for key, value in entries.task(str(folder / "c.toml"), **options).to_dict().items()
        if key not in ("type", "every", "batch_size")
    }
    values = dict(
        choice.MultipleChoice(
            fns or Model(random_distribution),
            name="c",
            encoder=Encoder(ByteTokenizer(), ""),
            **found,
        ).run(None)
    )
    return values, [json.loads(line) for line in values.pop("predictions").content.splitlines()]


PAIRS = [
    dict(q=f"q{i}", a="x" * (i % 3 + 1), b="é€" * (i % 2 + 1) + str(i), label=i % 2)
    for i in range(20)
]


def log_probability(prompt, continuation):
    ids, total = [256, *prompt.encode()], 0.0
    for token in continuation.encode():
        total += random_distribution(tuple(ids))[token]
        ids.append(token)
    return total


def test_choices_are_the_chain_rule(tmp_path):
    found, predictions = choose(tmp_path, PAIRS, premise="A:")
    sums = np.array(
        [[log_probability(f"{row['q']}?", f" {row[key]}") for key in "ab"] for row in PAIRS]
    )
    premise = np.array([[log_probability("A:", f" {row[key]}") for key in "ab"] for row in PAIRS])
    np.testing.assert_allclose([line["logprobs"] for line in predictions], sums, atol=1e-4)
    gold, size = (
        np.array([row["label"] for row in PAIRS]),
        lambda of: np.array([[of(row[key]) for key in "ab"] for row in PAIRS]),
    )
    accuracy = lambda scores: np.mean(scores.argmax(axis=1) == gold)
    hits = {
        norm: [float(x) for x in (scores.argmax(axis=1) == gold)]
        for norm, scores in (
            ("char", sums / size(len)),
            ("byte", sums / size(lambda t: len(t.encode()))),
            ("token", sums / size(lambda t: len(t.encode()) + 1)),
        )
    }
    assert hits["char"] != hits["byte"] != hits["token"]
    assert {
        norm: [line["scores"][f"accuracy_{norm}"] for line in predictions] for norm in hits
    } == hits
    assert (
        found["accuracy"] == accuracy(sums)
        and found["accuracy_char"] == accuracy(sums / size(len))
        and found["accuracy_pmi"] == accuracy(sums - premise)
    )
    assert found["accuracy_byte"] == accuracy(sums / size(lambda t: len(t.encode())))
    assert (
        found["accuracy_token"] == accuracy(sums / size(lambda t: len(t.encode()) + 1))
        and found["chance"] == 0.5
    )
    right = sums[np.arange(20), gold]
    assert found["nll"] == pytest.approx(-right.mean(), abs=1e-4) and found[
        "perplexity"
    ] == pytest.approx(math.exp(-right.mean()), rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(
        -right.sum()
        / math.log(2)
        / sum(len(row["ab"[row["label"]]].encode()) + 1 for row in PAIRS),
        abs=1e-4,
    )


def test_pairs_lists_names_and_last_words(tmp_path):
    pairs, _ = choose(tmp_path, PAIRS, prompt=dict(template=""), choices=("{a}", "{b}"), answer="0")
    sums = np.array([[log_probability("", row[key]) for key in "ab"] for row in PAIRS])
    assert pairs["accuracy"] == np.mean(sums.argmax(axis=1) == 0)
    rows = [
        dict(
            q=row["q"], o=dict(text=[row["a"], row["b"]], label=["A", "B"]), key="AB"[row["label"]]
        )
        for row in PAIRS
    ]
    lists, _ = choose(tmp_path, rows, choices=(" {o[text]}",), answer="key", answers="{o[label]}")
    assert lists == choose(tmp_path, PAIRS)[0]
    with pytest.raises(ValueError, match=r"a record's answer is 'C'; wanted one of \['A', 'B'\]"):
        choose(
            tmp_path,
            [rows[0] | dict(key="C")],
            choices=(" {o[text]}",),
            answer="key",
            answers="{o[label]}",
        )
    with pytest.raises(ValueError, match=r"a record's answer is 2; wanted one of \[0, 1\]"):
        choose(tmp_path, [PAIRS[0] | dict(label=2)])
    said = lambda prefix: np.where(
        np.arange(512) == (ord(" the end"[len(prefix) - 4]) if 0 <= len(prefix) - 4 < 8 else 0),
        -0.1,
        -9.0,
    )
    rows = [dict(t="abc the end"), dict(t="abc the bed")]
    last, predictions = choose(
        tmp_path,
        rows,
        Model(said),
        prompt=dict(template="{t:head}"),
        choices=(" {t:last}",),
        answer="0",
    )
    assert (
        last["accuracy"] == 0.5
        and [line["greedy"] for line in predictions] == [True, False]
        and "chance" not in last
    )
    assert last["perplexity"] == pytest.approx(math.exp((0.4 + 0.2 + 18) / 2), rel=1e-3)


def test_a_model_without_opinions_scores_by_length(tmp_path):
    pairs, _ = choose(
        tmp_path, [dict(q="q", a="xx", b="yy")] * 10, Model(uniform_distribution), answer="0"
    )
    assert pairs["accuracy"] == pairs["accuracy_byte"] == 0.5  # a tie is half right
    found, _ = choose(
        tmp_path,
        [dict(q="q", a="xx", b="yy", label=i % 2) for i in range(10)],
        Model(uniform_distribution),
    )
    assert found["accuracy"] == found["chance"] == 0.5 and found["nll"] == pytest.approx(
        3 * math.log(512), rel=1e-6
    )


# The linear verbalizer


class Linear(Model):
    """States that tell labels apart, in a direction of each, with noise."""

    def states(self, params, prompts):
        rng = np.random.default_rng(0)
        number = [
            int(bytes(prompt[1:]).decode().split()[1].removesuffix("?")) for prompt in prompts
        ]
        return (
            5 * np.eye(8)[[n * n % 3 + 2 for n in number]] + rng.normal(0, 1.0, (len(prompts), 8))
        ).astype(np.float32)

    def head_rows(self, params, ids):
        assert ids == [ord(" ")] * 3
        return np.zeros((3, 8), np.float32)


@pytest.mark.parametrize("init", linear.INITS)
def test_a_linear_verbalizer_finds_what_states_tell(tmp_path, init):
    values, files = run(
        tmp_path,
        Linear(random_distribution),
        cls=linear.LinearVerbalizer,
        type="lm.evals.linear.LinearVerbalizer",
        train_examples=24,
        init=init,
    )
    assert (
        values["accuracy"] > 0.9
        and values["train_accuracy"] > 0.9
        and values["nll"] < 0.5
        and values["l2"] in linear.PENALTIES
    )
    assert sum(line["prediction"] == line["label"] for line in lines(files)) == round(
        24 * values["accuracy"]
    )


def test_prototypes_are_the_nearest_means():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 4)), rng.integers(0, 2, 30)
    W = linear.prototypes(X, y, 3)
    logits = X @ W[:, :-1].T + W[:, -1]
    means = [X[y == 0].mean(axis=0), X[y == 1].mean(axis=0), X.mean(axis=0)]
    wanted = np.stack([-np.mean((X - mean) ** 2, axis=1) / 2 for mean in means], axis=1)
    np.testing.assert_allclose(logits - logits[:, :1], wanted - wanted[:, :1], atol=1e-9)


def test_fit_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 5)), rng.integers(0, 3, 200)
    W = linear.fit(X, y, np.zeros((3, 6)), 0.01)
    theirs = LogisticRegression(
        C=1 / (0.01 * 200), fit_intercept=False, tol=1e-10, max_iter=1000
    ).fit(np.hstack([X, np.ones((200, 1))]), y)
    np.testing.assert_allclose(W, theirs.coef_, atol=1e-4)
    init = rng.normal(size=(3, 6))
    np.testing.assert_allclose(linear.fit(X, y, init, 1e6), init, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(init="random"), "init = 'random'"),
        (dict(train_examples=5), "train_examples = 5; wanted 10 or more"),
        (
            dict(prompt=dict(templates=("{text}?", "{text}."))),
            "one template, verbalizer and seed, not 2",
        ),
    ],
)
def test_linear_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(
            tmp_path,
            Linear(random_distribution),
            cls=linear.LinearVerbalizer,
            type="lm.evals.linear.LinearVerbalizer",
            **dict(train_examples=24) | changes,
        )
