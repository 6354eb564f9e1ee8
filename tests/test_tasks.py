"""Evals that ask by templates, on models whose distributions are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lm import evaluate
from lm.data.pack import Encoder
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer
from lm.evals import choice, classification, entries, label_results, linear, prompts
from lm.evals.predict import Artifact
from lm.evals.scores import calibration
from lm.evals.scores.label_scores import LabelScorer
from lm.reports import tables
from tests.fake_models import (
    BOS,
    VOCAB_SIZE,
    Model,
    chain_rule,
    distributions,
    gold_labels,
    prompt_ids,
    prompt_text,
    random_distribution,
    uniform_distribution,
)
from tests.helpers import LABELS, VERBALIZER, write_task

TASK_FILES = sorted(Path(entries.__file__).parent.glob("tasks/*.toml"))
TASKS = [path.stem for path in TASK_FILES]


def write_jsonl(path, rows):
    path.write_text("".join([json.dumps(row) + "\n" for row in rows]))


def read_jsonl(text):
    return [json.loads(line) for line in text.splitlines()]


def write_records(folder, num=24):
    """The splits train and test."""
    for split in ("train", "test"):
        rows = []
        for i in range(num):
            rows.append(dict(text=f"{split} {i}", label=LABELS[i * i % 3]))
        write_jsonl(folder / f"{split}.jsonl", rows)


def arguments(path, **changes):
    """The arguments of the evaluator of a task file."""
    entry = entries.task(str(path), **changes).to_dict()
    for key in ("type", "every", "batch_size"):
        del entry[key]
    return entry


def make(folder, fns=None, tokenizer=None, cls=classification.PromptClassification, **changes):
    if not (folder / "test.jsonl").exists():
        write_records(folder)
    path = write_task(folder / "colours.toml", r"{text}\n?")
    return cls(
        fns or Model(random_distribution),
        name="colours",
        encoder=Encoder(tokenizer or ByteTokenizer(), ""),
        **arguments(path, **changes),
    )


def run(*args, **kwargs):
    """(metrics, contents of the artifacts)"""
    metrics = {}
    contents = {}
    for key, value in make(*args, **kwargs).run(None):
        if isinstance(value, Artifact):
            contents[key] = value.content
        else:
            metrics[key] = value
    return metrics, contents


def run_predictions(*args, **kwargs):
    """The lines of predictions/."""
    _, contents = run(*args, **kwargs)
    return read_jsonl(contents["predictions"])


def words_of(*texts):
    """verbalizer.words of a single verbalizer, with a word for each label."""
    return (tuple(zip(LABELS, [(text,) for text in texts])),)


# Prompts


def test_a_task_asks_what_the_documents_eval_asks(tmp_path):
    """The prompts and words are the same, because no token spans two parts."""
    write_records(tmp_path)
    documents = []
    for row in read_jsonl((tmp_path / "test.jsonl").read_text()):
        documents.append(Document(row["text"], "", row["label"]))
    evaluator = classification.DocumentClassification(
        Model(random_distribution),
        name="x",
        documents=Documents(documents, ""),
        encoder=Encoder(ByteTokenizer(), "\n?"),
        verbalizer=list(VERBALIZER.items()),
        max_documents=0,
    )
    document_metrics = {}
    for key, value in evaluator.run(None):
        if not isinstance(value, Artifact):
            document_metrics[key] = value

    metrics, _ = run(tmp_path)
    assert document_metrics.items() <= metrics.items()
    assert {"accuracy_domain", "nll_pmi_dc"} <= metrics.keys() - document_metrics.keys()


def test_the_prompt_that_is_asked(tmp_path):
    fns = Model(random_distribution, length=200)
    task = make(tmp_path, fns, prompt=dict(shots=2, seeds=(3,)))
    next(task.run(None))

    # Two examples of different labels, then the question.
    *shots, question = prompt_text(fns.questions[0]).split("\n\n")
    assert question == "test 0\n?"
    valid_shots = set()
    for row in read_jsonl((tmp_path / "train.jsonl").read_text()):
        valid_shots.add(f"{row['text']}\n? {row['label']}")
    assert len(shots) == 2
    assert set(shots) <= valid_shots
    assert shots[0].split()[-1] != shots[1].split()[-1]

    # The prompts of the priors follow those of the records.
    prior_prompts = list(map(prompt_text, fns.questions[24:]))
    content_free = "\n\n".join([*shots, "\n?"])
    assert prior_prompts[0] == content_free
    assert prior_prompts.count("\n?") == 1  # pmi_dc
    assert len(prior_prompts) == 3 + 20 + 1


def whole_prompts(about, line):
    """The prompts of an example, put together from what predictions/ holds."""
    texts = []
    for prompt in about["prompts"]:
        template = int(prompt["variant"].split()[1].removesuffix(","))
        texts.append(prompt["before"] + line["prompts"][template])
    return texts


def test_predictions_say_what_was_asked(tmp_path):
    fns = Model(random_distribution, length=200)
    prompt = dict(shots=2, seeds=(0, 1), templates=("{text}\n?", "Q: {text}"))
    task = make(tmp_path, fns, prompt=prompt, priors=("batch",))
    lines = read_jsonl(dict(task.run(None))["predictions"].content)

    # Variants follow each other, each with all examples.
    asked = list(map(prompt_text, fns.questions))
    for i, line in enumerate(lines):
        assert whole_prompts(task.about, line) == asked[i::24]
        assert line["cut"] == [0] * 4

    # The examples before the question, by their names.
    train = read_jsonl((tmp_path / "train.jsonl").read_text())
    for variant in task.about["prompts"]:
        for name, text in zip(variant["shots"], variant["before"].split("\n\n")):
            number = int(name.removeprefix("train[").removesuffix("]"))
            assert train[number]["text"] in text
    assert task.about["corrections"] == ["batch"]

    # The same for people to read.
    shown = list(task.shown_prompts(2))
    assert [prompt.text for prompt in shown] == [
        "<s>" + asked[24 * v + i] for v in range(4) for i in (0, 1)
    ]
    assert shown[1].title.startswith("test[1], ")
    assert shown[1].title.endswith("0 cut off; template 0, words 0, seed 0")
    assert shown[1].right == f" {lines[1]['label']}"


def test_prompts_are_printed(tmp_path, capsys):
    write_jsonl(tmp_path / "test.jsonl", [dict(text="a\x1b[31m", label="red")])
    evaluate.print_prompts("colours", make(tmp_path), 3)
    # A terminal would obey an escape character.
    assert capsys.readouterr().out == (
        "--- colours: test[0], 9 tokens, 0 cut off; template 0, words 0, seed 0\n"
        "<s>a\\x1b[31m\n?⟫ red\n"
    )
    evaluate.print_prompts("colours", make(tmp_path), 0)
    assert not capsys.readouterr().out


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

    # The report to read has them, and the intervals beside their metrics.
    header = {
        "step": 3,
        "from": "run",
        "versions": dict(lm="1"),
        "tokenizer": "bytes-1",
        "evals": dict(x=about),
    }
    metrics = {
        "eval/x/accuracy": 0.5,
        "eval/x/accuracy_low": 0.25,
        "eval/x/accuracy_high": 0.75,
        "eval/x/examples": 24,
    }
    report = tables.markdown(header, metrics)
    assert "# Step 3 of run" in report
    assert "| accuracy | 0.5000 | 0.2500 to 0.7500 |" in report
    assert "accuracy_low" not in report
    assert "| examples | 24 |  |" in report
    assert "green: [' ', 'g', 'e'], [' ', 'n']" in report


def test_long_prompts_lose_their_beginning_but_for_bos(tmp_path):
    fns = Model(random_distribution, length=20)
    metrics, contents = run(tmp_path, fns, prompt=dict(shots=1))

    assert metrics["cut"] == 24
    # All of the prompt and BOS, less what is left.
    line = read_jsonl(contents["predictions"])[0]
    whole = 1 + len("train 0\n? red\n\n") + len(line["prompts"][0])
    num_left = len(prompt_ids(fns.questions[0]))
    assert abs(line["cut"][0] - (whole - num_left)) <= 3  # "green", "train 23"
    for question in fns.questions[:24]:
        assert prompt_text(question).endswith("\n?")
        assert len(prompt_ids(question)) + len(" green") - 1 == 20

    with pytest.raises(
        ValueError,
        match="a continuation of 6 tokens leaves no room for a prompt in config.data.length = 6",
    ):
        make(tmp_path, Model(random_distribution, length=6))


# Variants, priors, scores and temperature


def test_variants_are_averaged(tmp_path):
    templates = ("{text}\n=", "Q {text} =")
    verbalizers = words_of(" red", " green", " blue") + words_of(" r", " g", " b")
    seeds = (0, 1)

    # Each variant alone.
    variant_P = []
    for template in templates:
        for verbalizer in verbalizers:
            for seed in seeds:
                predictions = run_predictions(
                    tmp_path,
                    Model(random_distribution, length=100),
                    prompt=dict(templates=(template,), shots=1, seeds=(seed,)),
                    verbalizer=dict(words=(verbalizer,)),
                )
                variant_P.append(distributions(predictions))
    gold = gold_labels(predictions)
    accuracies = [np.mean(P.argmax(axis=1) == gold) for P in variant_P]

    # All of them together.
    options = dict(
        prompt=dict(templates=templates, shots=1, seeds=seeds),
        verbalizer=dict(words=verbalizers),
        priors=(),
    )
    metrics, contents = run(tmp_path, Model(random_distribution, length=100), **options)
    P = distributions(read_jsonl(contents["predictions"]))
    np.testing.assert_allclose(P, np.mean(variant_P, axis=0), atol=1e-6)
    assert metrics["ways"] == 8
    assert metrics["accuracy_mean"] == pytest.approx(np.mean(accuracies))
    assert metrics["accuracy_min"] == min(accuracies)
    assert metrics["accuracy_max"] == max(accuracies)
    assert metrics["accuracy_spread"] == pytest.approx(np.std(accuracies, ddof=1))
    table = json.loads(contents["ways_table"])
    assert [row["accuracy"] for row in table] == pytest.approx(accuracies)

    predictions = run_predictions(
        tmp_path, Model(random_distribution, length=100), ensemble="mean_logprob", **options
    )
    mean_logprobs = np.log(variant_P).mean(axis=0)
    expected = calibration.softmax(mean_logprobs)
    np.testing.assert_allclose(distributions(predictions), expected, atol=1e-6)


def test_prior_corrections_divide_by_the_mean_of_their_prompts(tmp_path):
    metrics, contents = run(tmp_path)
    predictions = read_jsonl(contents["predictions"])
    P = distributions(predictions)
    gold = gold_labels(predictions)

    # There is one variant: for each prior and prompt, the log-probabilities by label and word.
    (prior_logprobs,) = json.loads(contents["priors"])
    assert len(prior_logprobs["content_free"]) == 3
    assert len(prior_logprobs["domain"]) == 20
    assert len(prior_logprobs["pmi_dc"]) == 1

    for name, logprobs in prior_logprobs.items():
        sums = []
        for by_label in logprobs:
            sums.append([sum(by_label[label][f" {label}"]) for label in LABELS])
        prior = calibration.softmax(np.array(sums)).mean(axis=0)
        expected = calibration.nll(calibration.divide_by_prior(P, prior), gold)
        assert metrics[f"nll_{name}"] == pytest.approx(expected, abs=1e-5)

    # The batch prior is not rounded in a file before.
    expected = calibration.nll(calibration.divide_by_prior(P, P.mean(axis=0)), gold)
    assert metrics["nll_batch"] == pytest.approx(expected, abs=1e-6)


def test_only_the_chosen_priors(tmp_path):
    metrics, _ = run(tmp_path, priors=("batch",))
    assert "accuracy_batch" in metrics
    # Neither corrections by the others nor their own metrics.
    for key in metrics:
        assert "content" not in key
        assert "domain" not in key
        assert "pmi" not in key


@pytest.mark.parametrize(
    "aggregate, length_norm, weights",
    [
        ("mean", "token", ()),
        ("max", "byte", ()),
        ("logmeanexp", "none", ()),
        ("sum", "none", (1.0, 2.0) * 3),
    ],
)
def test_scores_are_computed_again_without_the_model(tmp_path, aggregate, length_norm, weights):
    words = (tuple((label, (f" {label}", f" {label[:2]}!")) for label in LABELS),)
    default = run_predictions(tmp_path, verbalizer=dict(words=words))
    options = dict(words=words, aggregate=aggregate, length_norm=length_norm, weights=weights)
    predictions = run_predictions(tmp_path, verbalizer=options)

    labels, logprobs = label_results.read_word_logprobs(default)
    assert labels == list(LABELS)
    scorer = LabelScorer(length_norm, aggregate, np.array(weights) if weights else None)
    P = scorer.distributions(logprobs)
    np.testing.assert_allclose(P, distributions(predictions), atol=1e-5)


def test_a_terminator_is_scored_with_the_word(tmp_path):
    """So that " re" can be told from " red"; lengths stay the words'."""
    words = words_of(" re", " red", " b")
    with pytest.raises(ValueError, match="begin with the same tokens"):
        make(tmp_path, verbalizer=dict(words=words))

    task = make(tmp_path, verbalizer=dict(words=words, terminator="\n"))
    (variant,) = label_results.score_prompts(task.predict_fns, None, task.prompt_set)
    logprobs = variant.examples
    assert logprobs.num_tokens[0].tolist() == [4, 5, 3]
    assert logprobs.num_chars.tolist() == [2, 3, 1]
    # The terminator is the last of the four tokens of " re".
    prefix = [BOS, *b"test 0\n? re"]
    assert logprobs.tokens[0, 0, 3] == pytest.approx(chain_rule(prefix, b"\n"), abs=1e-5)


def test_the_temperature_is_that_of_other_records(tmp_path):
    metrics, _ = run(tmp_path, temperature_examples=12)
    assert metrics["temperature"] > 0
    assert {"nll_temperature", "ece_temperature"} <= metrics.keys()

    # All records of the split: in another order, which the temperature doesn't depend on.
    task = make(tmp_path, temperature_examples=24)
    train_gold = []
    for row in read_jsonl((tmp_path / "train.jsonl").read_text()):
        train_gold.append(task.gold(row))
    assert sorted(task.prompt_set.calibration_gold) == sorted(train_gold)

    # They give the temperature that evaluating them would give.
    predictions = run_predictions(tmp_path, source=dict(split="train", shots_split=""))
    expected = calibration.best_temperature(
        np.log(distributions(predictions)), gold_labels(predictions)
    )
    assert dict(task.run(None))["temperature"] == pytest.approx(expected, rel=1e-4)


# Labels, words and what is refused


def label_words(*labels):
    """verbalizer.words of a single verbalizer for these labels."""
    return (tuple((label, (f" {label}",)) for label in labels),)


def golds(folder, labels, values, train=(), **changes):
    """The right labels of records whose column `label` has these values."""
    for split, split_values in (("test", values), ("train", train)):
        rows = [dict(text=f"{split} {i}", label=value) for i, value in enumerate(split_values)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    task = make(folder, verbalizer=dict(words=label_words(*labels)), **changes)
    return task.prompt_set.gold.tolist()


@pytest.mark.parametrize(
    "labels, values, indices",
    [
        (LABELS, ["blue", "green"], [2, 1]),
        (LABELS, [2, 0, 2], [2, 0, 2]),
        (LABELS, ["0", "1"], [0, 1]),
        # Numbers as names: what all values are decides.
        ("1234", [0, 1, 2, 3] * 2, [0, 1, 2, 3] * 2),
        ("1234", [1, 2, 3, 4, 4], [0, 1, 2, 3, 3]),
        ("1234", ["1", "2", "3"], [0, 1, 2]),
        ("0123", [3, 1], [3, 1]),
        (["2", "1", "0", "red"], ["0", "2", "red", 1], [2, 0, 3, 1]),
    ],
)
def test_labels_by_name_or_number(tmp_path, labels, values, indices):
    """Names in all records, or numbers in all of them."""
    assert golds(tmp_path, labels, values) == indices


def test_records_that_are_not_evaluated_say_what_labels_are(tmp_path):
    """One or two records don't: they may all be names and all numbers."""
    assert golds(tmp_path, "1234", [1, 1, 3, 0], max_documents=2) == [1, 3]
    assert golds(tmp_path, "1234", [1, 1, 3, 4], max_documents=2) == [0, 2]

    # The pool of examples does too, and shows where numbers begin.
    shots = dict(prompt=dict(shots=1))
    assert golds(tmp_path, "1234", [1, 3], [0, 1, 2, 3], **shots) == [1, 3]
    assert golds(tmp_path, LABELS, [1, 2], [0, 1, 2], **shots) == [1, 2]
    with pytest.raises(ValueError, match="a record's label is 1; wanted one of .'red'"):
        golds(tmp_path, LABELS, ["red", "green", "blue"], [1, 0, 2], **shots)


@pytest.mark.parametrize("value", ["yellow", 3, -1, None, "-1", True, ["red"]])
def test_labels_outside_the_label_space(tmp_path, value):
    for values in ([value], ["red", value], [0, value]):
        with pytest.raises(
            ValueError, match=r"a record's label is .*; wanted one of \['red', 'green', 'blue'\]"
        ):
            golds(tmp_path, LABELS, values)


def test_a_null_is_no_name(tmp_path):
    with pytest.raises(ValueError, match="a record's label is None"):
        golds(tmp_path, ["None", "Some"], ["Some", None])


@pytest.mark.parametrize(
    "labels, values, message",
    [
        (LABELS, ["red", 1, "blue"], "holds the name 'red' in a record and the number 1 in anothe"),
        ("1234", [0, 1, 4], "the name '1' in a record and the number 0 in another"),
        # They may count from 1.
        (LABELS, [1, 2, 2], r"the numbers \[1, 2\] and never 0\. .* up to 2; .* as the column has"),
    ],
)
def test_labels_that_are_neither_names_nor_numbers_from_0(tmp_path, labels, values, message):
    with pytest.raises(ValueError, match=message):
        golds(tmp_path, labels, values)


def test_one_label_only_and_no_text(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [dict(text="", label="red")] * 3)
    metrics, _ = run(tmp_path, Model(uniform_distribution), verbalizer=dict(length_norm="token"))
    assert metrics["majority_accuracy"] == 1
    assert metrics["nll"] == pytest.approx(math.log(3))
    # It needs examples of two labels.
    assert "auroc" not in metrics


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
            dict(verbalizer=dict(words=words_of("", " g", " b"))),
            "the label 'red' has no word, or an empty one",
        ),
        (dict(verbalizer=dict(words=words_of(" g", " g", " b"))), "are the same tokens"),
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
            r"colours.verbalizer.weights = .*: wanted a positive one for each of 3 words",
        ),
        (
            dict(prompt=dict(templates=("{text}: ",))),
            "two spaces would meet; end the prompt without one",
        ),
        (
            dict(verbalizer=dict(words=words_of("r", "g", "b"))),
            "with nothing between them: begin the word with a space",
        ),
        (
            dict(prompt=dict(templates=("{text}:", "Review: {{text}}\nSentiment:"))),
            r"templates = .* has no column: .*; \{\{text\}\} is text; write \{text\} for a",
        ),
        (
            dict(prompt=dict(templates=("{label} {{text}}\nSentiment:",))),
            r"\{\{text\}\} is text and not the column 'text'; write \{text\}",
        ),
        (dict(source=dict(path="nowhere.jsonl")), "the eval 'colours': no file at nowhere.jsonl"),
    ],
)
def test_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


class UncasedTokenizer(ByteTokenizer):
    def encode(self, text):
        return super().encode(text.lower())


def test_words_come_back_as_they_are(tmp_path):
    words = words_of(" Red", " green", " blue")
    message = (
        "the word ' Red' comes back from the tokenizer as .* red': write it as the tokenizer does"
    )
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer=UncasedTokenizer(), verbalizer=dict(words=words))

    # lm-evaluation-harness doesn't check it.
    verbalizer = dict(words=words, boundary="lm_eval")
    make(tmp_path, tokenizer=UncasedTokenizer(), verbalizer=verbalizer)


class MergingTokenizer(ByteTokenizer):
    """Bytes, but for words that it has whole."""

    pieces = {" unhappy": 300, " unkind": 301, " un": 302}

    def encode(self, text):
        ids = []
        while text:
            piece = next(filter(text.startswith, self.pieces), text[0])
            ids += [self.pieces[piece]] if piece in self.pieces else piece.encode()
            text = text.removeprefix(piece)
        return ids

    def decode(self, ids):
        spelling = {token: piece for piece, token in self.pieces.items()}
        return "".join(spelling.get(token) or chr(token) for token in ids)


def test_a_word_that_goes_on_with_the_prompts_word(tmp_path):
    """The boundary table of docs/evals.md, its third row: each error says the way to the next."""
    options = dict(
        tokenizer=MergingTokenizer(),
        prompt=dict(templates=("{text} is un",)),
        priors=(),
    )
    words = words_of("happy", "kind", "seen")
    with pytest.raises(ValueError, match="or take boundary = 'common_prefix'"):
        make(tmp_path, verbalizer=dict(words=words), **options)

    task = make(tmp_path, verbalizer=dict(words=words, boundary="common_prefix"), **options)
    question = task.prompt_set.variants[0].questions[0]
    assert prompt_text(question) == "test 0 is"
    assert task.about["words"][0]["red"] == {"happy": [" unhappy"]}
    assert task.about["words"][0]["blue"] == {"seen": [" un", *"seen"]}

    # Behind a mark a space is still missing, and two are too many.
    spaced_words = words_of(" a", " b", " c")
    for template, texts in (("{text}:", words), ("{text} ", spaced_words)):
        options["prompt"] = dict(templates=(template,))
        with pytest.raises(ValueError, match="begin the word with a space$|two spaces would meet"):
            make(tmp_path, verbalizer=dict(words=texts, boundary="common_prefix"), **options)


@pytest.mark.parametrize("sampler", prompts.SAMPLERS)
def test_copies_of_evaluated_records_are_no_examples(tmp_path, sampler):
    """Copies that differ in case or white space are the same example, drawn once."""
    test = [dict(text=f"Great film {label}", label=label) for label in LABELS]
    train = [dict(text=f"{row['text'].lower()} ", label=row["label"]) for row in test]
    for label in LABELS:
        train += [dict(text=f" Bad  {label}", label=label), dict(text=f"bad {label}", label=label)]
    write_jsonl(tmp_path / "test.jsonl", test)
    write_jsonl(tmp_path / "train.jsonl", train)

    fns = Model(random_distribution, length=200)
    prompt = dict(shots=3, sampler=sampler, templates=("'{text}'?",))
    next(make(tmp_path, fns, prompt=prompt).run(None))
    *shots, _ = prompt_text(fns.questions[0]).split("\n\n")
    drawn = [" ".join(shot.lower().replace("'", "").split()) for shot in shots]
    assert sorted(drawn) == sorted(f"bad {label}? {label}" for label in LABELS)
    with pytest.raises(ValueError, match="shots = 4, but there are 3 examples"):
        make(tmp_path, prompt=prompt | dict(shots=4))


def test_a_pool_that_lacks_a_label(tmp_path, caplog):
    write_records(tmp_path)
    rows = read_jsonl((tmp_path / "train.jsonl").read_text())
    write_jsonl(tmp_path / "train.jsonl", [row for row in rows if row["label"] == "red"])

    with pytest.raises(ValueError, match="shots = 4: source.shots_split has examples of 1 of 3 la"):
        make(tmp_path, Model(random_distribution, length=200), prompt=dict(shots=4))
    make(tmp_path, temperature_examples=4)
    assert "temperature_examples = 4: all of the examples have the same label" in caplog.text


def test_not_finite(tmp_path):
    with pytest.raises(ValueError, match="not finite for 24 of 24 examples"):
        run(tmp_path, Model(lambda prefix: np.full(VOCAB_SIZE, np.nan)))


# Task files


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompt=dict(shots="4")), "prompt: shots = '4'; wanted int, such as 0"),
        (dict(prompt=dict(templates="QA")), "templates = 'QA'; wanted an array"),
        (dict(max_documents=True), "max_documents = True; wanted int"),
        (dict(source="x"), "source = 'x'; wanted dict"),
        (dict(label=3), "label = 3; wanted str"),
        (
            dict(prompt=dict(shot=4)),
            r"task\('sst2'\): prompt has no key 'shot'; valid: \['shots', 'sampler'",
        ),
    ],
)
def test_invalid_changes_to_a_task(changes, message):
    with pytest.raises(ValueError, match=message):
        entries.task("sst2", **changes)


def test_unknown_task():
    with pytest.raises(ValueError, match=r"no task 'sst3'; valid: \['ag_news', "):
        entries.task("sst3")


def test_a_single_table_of_words(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(
        """type = "lm.evals.classification.PromptClassification"
[verbalizer.words]
no = [" no"]
yes = [" yes", " sure"]
"""
    )
    # As a list of one verbalizer, whose tables are pairs.
    words = entries.task(str(path)).verbalizer.words
    assert words == ((("no", (" no",)), ("yes", (" yes", " sure"))),)


@pytest.mark.parametrize("path", TASK_FILES, ids=TASKS)
def test_shipped_tasks(path):
    """Each is complete, and says where its data comes from and whom to cite."""
    task = entries.task(path.stem)
    assert task.type in entries.TASKS
    keys = {"type", "every", "batch_size"} | entries.TASKS[task.type].keys()
    assert task.to_dict().keys() == keys

    # Without a TFDS data set, or pydocs, the first line says which path to give.
    first_line = path.read_text().split("\n")[0]
    assert task.source.tfds or task.source.pydocs or "source." in first_line
    assert len(task.source.citation) > 20


def test_shipped_tasks_are_listed():
    expected = """
        sst2 ag_news trec imdb cola rte mnli boolq banking77 xquad squad xsum dialogsum wmt14_en_de
        multi30k_en_de multi30k_de_en gsm8k piqa blimp lambada
    """
    assert set(expected.split()) <= set(TASKS)


def templates_of(task):
    """All templates over the columns of a task's records."""
    templates = [*task.prompt.get("templates", ()), task.prompt.get("template", "")]
    for key in ("choices", "target", "references"):
        value = task.get(key, ())
        templates += [value] if isinstance(value, str) else value
    return templates


def columns_of(task):
    """The columns that a task reads."""
    columns = set()
    for text in templates_of(task):
        for field in prompts.Template(text, "t").fields:
            columns.add(field.partition("[")[0])
    assert columns

    # A number is the answer itself, not a column.
    for key in ("label", "answer"):
        if key in task and not task[key].isdecimal():
            columns.add(task[key])
    return columns


@pytest.mark.parametrize("name", [name for name in TASKS if entries.task(name).source.tfds])
def test_tfds_has_what_shipped_tasks_read(name, tmp_path):
    """The data set, its configuration, and the columns of the templates."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.summarization
    import tensorflow_datasets.text
    import tensorflow_datasets.translate

    task = entries.task(name)
    dataset, _, config = task.source.tfds.partition("/")
    configs = [c.name for c in tfds.builder_cls(dataset).BUILDER_CONFIGS]
    assert config in configs if configs else not config

    try:
        features = set(tfds.builder(task.source.tfds, data_dir=str(tmp_path)).info.features)
    except ModuleNotFoundError:  # SuperGLUE's builder needs TensorFlow
        assert dataset == "super_glue"
        return
    columns = columns_of(task)
    assert columns <= features, (columns, features)


# Multiple choice

# Choices of different lengths, in characters and in bytes.
PAIRS = []
for i in range(20):
    longer = "é€" * (i % 2 + 1) + str(i)
    PAIRS.append(dict(q=f"q{i}", a="x" * (i % 3 + 1), b=longer, label=i % 2))


def choose(folder, rows, fns=None, tokenizer=None, **changes):
    """(metrics, predictions)"""
    write_jsonl(folder / "test.jsonl", rows)
    path = folder / "c.toml"
    path.write_text('type = "lm.evals.choice.MultipleChoice"')
    options = dict(
        source=dict(path=str(folder / "test.jsonl")),
        prompt=dict(template="{q}?"),
        choices=(" {a}", " {b}"),
    )
    evaluator = choice.MultipleChoice(
        fns or Model(random_distribution),
        name="c",
        encoder=Encoder(tokenizer or ByteTokenizer(), ""),
        **arguments(path, **options | changes),
    )
    metrics = dict(evaluator.run(None))
    predictions = metrics.pop("predictions")
    return metrics, read_jsonl(predictions.content)


def pair_logprobs(prompt, choice_format):
    """[n, 2], the log-probabilities of both choices of PAIRS."""
    logprobs = []
    for row in PAIRS:
        ids = [BOS, *prompt.format(**row).encode()]
        texts = [choice_format.format(row[key]) for key in "ab"]
        logprobs.append([chain_rule(ids, text.encode()) for text in texts])
    return np.array(logprobs)


def pair_sizes(size):
    """[n, 2], a size of both choices of PAIRS."""
    sizes = []
    for row in PAIRS:
        sizes.append([size(row["a"]), size(row["b"])])
    return np.array(sizes)


def num_bytes(text):
    return len(text.encode())


def test_choices_are_the_chain_rule(tmp_path):
    metrics, predictions = choose(tmp_path, PAIRS, premise="A:")
    gold = np.array([row["label"] for row in PAIRS])
    sums = pair_logprobs("{q}?", " {}")
    premise_sums = pair_logprobs("A:", " {}")
    logprobs = [line["logprobs"] for line in predictions]
    np.testing.assert_allclose(logprobs, sums, atol=1e-4)

    # The scores by which choices are compared. Tokens are bytes, with the space.
    scores = {
        "accuracy": sums,
        "accuracy_char": sums / pair_sizes(len),
        "accuracy_byte": sums / pair_sizes(num_bytes),
        "accuracy_token": sums / (pair_sizes(num_bytes) + 1),
        "accuracy_pmi": sums - premise_sums,
    }
    hits = {}
    for name, values in scores.items():
        hits[name] = (values.argmax(axis=1) == gold).astype(float)
        assert metrics[name] == np.mean(hits[name])
    assert metrics["chance"] == 0.5

    # They are different scores, and predictions/ has them by example.
    for name in ("accuracy_char", "accuracy_byte", "accuracy_token"):
        example_hits = [line["scores"][name] for line in predictions]
        assert example_hits == hits[name].tolist()
    assert hits["accuracy_char"].tolist() != hits["accuracy_byte"].tolist()
    assert hits["accuracy_byte"].tolist() != hits["accuracy_token"].tolist()

    # Metrics of the right choices.
    right = sums[np.arange(20), gold]
    assert metrics["nll"] == pytest.approx(-right.mean(), abs=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(-right.mean()), rel=1e-3)
    right_bytes = pair_sizes(num_bytes)[np.arange(20), gold] + 1
    expected = -right.sum() / math.log(2) / right_bytes.sum()
    assert metrics["bits_per_byte"] == pytest.approx(expected, abs=1e-4)


def test_predictions_have_the_prompts_of_choices(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [dict(q="s", a="m", b="n", label=0)])
    fns = Model(random_distribution, length=20)
    source = dict(path=str(tmp_path / "{split}.jsonl"), shots_split="train")
    _, predictions = choose(
        tmp_path, PAIRS, fns, source=source, prompt=dict(template="{q}?", shots=1)
    )
    for line, row, question in zip(predictions, PAIRS, fns.questions):
        assert line["prompt"] == f"{row['q']}?"
        assert line["cut"] == len(f"s? m\n\n{line['prompt']}") - len(prompt_ids(question)) + 1


def test_minimal_pairs(tmp_path):
    """Whole texts after an empty prompt, the first of which is always right."""
    metrics, _ = choose(
        tmp_path, PAIRS, prompt=dict(template=""), choices=("{a}", "{b}"), answer="0"
    )
    sums = pair_logprobs("", "{}")
    assert metrics["accuracy"] == np.mean(sums.argmax(axis=1) == 0)


def test_choices_from_lists(tmp_path):
    """Choices in one column, and answers by their names in another one."""
    rows = []
    for row in PAIRS:
        options = dict(text=[row["a"], row["b"]], label=["A", "B"])
        rows.append(dict(q=row["q"], o=options, key="AB"[row["label"]]))
    changes = dict(choices=(" {o[text]}",), answer="key", answers=("{o[label]}",))

    metrics, _ = choose(tmp_path, rows, **changes)
    expected, _ = choose(tmp_path, PAIRS)
    assert metrics == expected

    with pytest.raises(ValueError, match=r"a record's answer is 'C'; wanted one of \['A', 'B'\]"):
        choose(tmp_path, [rows[0] | dict(key="C")], **changes)
    with pytest.raises(ValueError, match=r"a record's answer is 2; wanted one of \[0, 1\]"):
        choose(tmp_path, [PAIRS[0] | dict(label=2)])
    with pytest.raises(ValueError, match=r"answer = '2'; a record's choices are \[0, 1\]"):
        choose(tmp_path, PAIRS, answer="2")


@pytest.mark.parametrize(
    "keys, right", [([0, 1, 2], [0, 1, 2]), ([1, 2, 3], [0, 1, 2]), (["2", "1"], [1, 0])]
)
def test_choices_whose_names_are_numbers(tmp_path, keys, right):
    """What all records hold decides whether an answer is a name or a number."""
    options = dict(text=["x", "y", "z"], label=["1", "2", "3"])
    rows = [dict(q=f"q{key}", o=options, key=key) for key in keys]
    _, predictions = choose(
        tmp_path, rows, choices=(" {o[text]}",), answer="key", answers=("{o[label]}",)
    )
    assert [line["label"] for line in predictions] == list(map(str, right))


def test_answers_that_may_count_from_1(tmp_path):
    rows = [dict(q="q", a="x", b="y", label=1)] * 3
    with pytest.raises(
        ValueError,
        match=r"holds the numbers \[1\] and never 0\. .*config.evals.c.answers = \('1', '2'\)",
    ):
        choose(tmp_path, rows)

    with pytest.raises(ValueError, match=r"is '2'; wanted one of \[0, 1\], or .*\('1', '2'\)\)"):
        choose(tmp_path, [row | dict(label=label) for row, label in zip(rows, "122")])

    _, predictions = choose(tmp_path, rows, answers=("1", "2"))
    assert [line["label"] for line in predictions] == ["0"] * 3
    with pytest.raises(ValueError, match=r"answers = \('1',\) gives the names \['1'\] to 2 choic"):
        choose(tmp_path, rows, answers=("1",))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompt=dict(template="{{q}}?")), "not the column 'q'"),
        (dict(choices=(" {a}", " {{b}}")), "not the column 'b'"),
        (dict(choices=(" yes", " no"), prompt=dict(template="Q:")), "template = 'Q:' has no col"),
        (dict(premise="{q}?"), "premise = .* can't have the column 'q'"),
    ],
)
def test_choices_that_dont_say_their_columns(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        choose(tmp_path, PAIRS, **changes)


def test_last_words(tmp_path):
    def says_the_end(prefix):
        # After BOS and "abc" comes " the end", byte by byte.
        logprobs = np.full(VOCAB_SIZE, -9.0)
        i = len(prefix) - 4
        token = ord(" the end"[i]) if 0 <= i < 8 else 0
        logprobs[token] = -0.1
        return logprobs

    metrics, predictions = choose(
        tmp_path,
        [dict(t="abc the end"), dict(t="abc the bed")],
        Model(says_the_end),
        prompt=dict(template="{t:head}"),
        choices=(" {t:last}",),
        answer="0",
    )
    assert metrics["accuracy"] == 0.5
    assert [line["greedy"] for line in predictions] == [True, False]
    assert "chance" not in metrics
    # The model says all four bytes of " end", of " bed" only the first and the last.
    assert metrics["perplexity"] == pytest.approx(math.exp((0.4 + 0.2 + 18) / 2), rel=1e-3)


def test_ties_are_half_right(tmp_path):
    """A uniform model can't choose between two choices of the same length."""
    rows = [dict(q="q", a="xx", b="yy")] * 10
    metrics, _ = choose(tmp_path, rows, Model(uniform_distribution), answer="0")
    assert metrics["accuracy"] == metrics["accuracy_byte"] == 0.5

    rows = []
    for i in range(10):
        rows.append(dict(q="q", a="xx", b="yy", label=i % 2))
    metrics, _ = choose(tmp_path, rows, Model(uniform_distribution))
    assert metrics["accuracy"] == metrics["chance"] == 0.5
    assert metrics["nll"] == pytest.approx(3 * math.log(VOCAB_SIZE), rel=1e-6)


# The linear verbalizer


class LinearModel(Model):
    """States that tell labels apart, each in a direction of its own, with noise."""

    def states(self, params, prompts, fill="ltr"):
        # "test 4\n?" is record 4, whose label write_records chose by its square.
        directions = []
        for prompt in prompts:
            text = bytes(prompt.ids[1:].tolist()).decode()
            number = int(text.split()[1].removesuffix("?"))
            directions.append(number * number % 3 + 2)
        noise = np.random.default_rng(0).normal(0, 1.0, (len(prompts), 8))
        return (5 * np.eye(8)[directions] + noise).astype(np.float32)

    def head_rows(self, params, ids):
        # All words begin with the same token, the space.
        assert ids == [ord(" ")] * 3
        return np.zeros((3, 8), np.float32)


def linear_options(**changes):
    options = dict(
        cls=linear.LinearVerbalizer, type="lm.evals.linear.LinearVerbalizer", train_examples=24
    )
    return options | changes


@pytest.mark.parametrize("init", linear.INITS)
def test_a_linear_verbalizer_finds_what_states_tell(tmp_path, init):
    metrics, contents = run(tmp_path, LinearModel(random_distribution), **linear_options(init=init))
    assert metrics["accuracy"] > 0.9
    assert metrics["train_accuracy"] > 0.9
    assert metrics["nll"] < 0.5
    assert metrics["l2"] in linear.PENALTIES

    predictions = read_jsonl(contents["predictions"])
    num_right = sum(line["prediction"] == line["label"] for line in predictions)
    assert num_right == round(24 * metrics["accuracy"])


def test_prototypes_are_the_nearest_means():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 4))
    y = rng.integers(0, 2, 30)
    vectors = linear.prototypes(X, y, 3)
    logits = X @ vectors[:, :-1].T + vectors[:, -1]

    # The third label has no examples. All logits share a term, which softmax doesn't see.
    means = [X[y == 0].mean(axis=0), X[y == 1].mean(axis=0), X.mean(axis=0)]
    expected = np.stack([-np.mean((X - mean) ** 2, axis=1) / 2 for mean in means], axis=1)
    np.testing.assert_allclose(logits - logits[:, :1], expected - expected[:, :1], atol=1e-9)


def test_fit_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 5))
    y = rng.integers(0, 3, 200)
    vectors = linear.fit(X, y, np.zeros((3, 6)), 0.01)

    # scikit-learn's penalty is on the sum over examples, ours on the mean.
    reference = LogisticRegression(
        C=1 / (0.01 * 200), fit_intercept=False, tol=1e-10, max_iter=1000
    )
    reference.fit(np.hstack([X, np.ones((200, 1))]), y)
    np.testing.assert_allclose(vectors, reference.coef_, atol=1e-4)

    # A large penalty leaves the vectors where they start.
    init = rng.normal(size=(3, 6))
    np.testing.assert_allclose(linear.fit(X, y, init, 1e6), init, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(init="random"), "init = 'random'"),
        (dict(train_examples=5), "train_examples = 5; wanted 10 or more"),
        (
            dict(train_examples=99),
            "^config.evals.colours.train_examples = 99, but there are 24 examples",
        ),
        (
            dict(prompt=dict(templates=("{text}?", "{text}."))),
            "one template, verbalizer and seed, not 2",
        ),
    ],
)
def test_linear_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, LinearModel(random_distribution), **linear_options(**changes))
