"""The table that ends a run, from the metrics that the evaluators have."""

import io
import json

import matplotlib.image
import numpy as np
import pytest

from lm import escape
from lm.data.pack import Encoder
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer
from lm.evals import choice, classification, entries, generation, perplexity
from lm.evals.predict import Answer, Artifact
from lm.reports import comparison, metrics, pictures, tables

ENCODER = Encoder(ByteTokenizer(), "\n?")
RECORDS = [dict(text=f"text {i}", label=("red", "green")[i % 2], number=i % 2) for i in range(12)]


class FakeFns:
    """PredictFns of a model whose log-probabilities and texts are arbitrary."""

    length = prompt_length = 64
    batch_size = 4
    fills_blanks = reads_sources = False
    fills = ("ltr",)

    def check_stop(self):
        pass

    def room_of_prompt(self, max_new_tokens):
        return self.length - max_new_tokens

    def token_logprobs(self, params, rows):
        return np.full((len(rows), self.length), -1.5, np.float32)

    def logprobs(self, params, questions):
        return list(map(self._answers, questions))

    def _answers(self, question):
        answers = []
        for ids in question.continuations:
            # They differ from example to example: nothing ties.
            logprobs = -1 - np.sin(np.array(ids) + np.sum(question.prompt.ids)) ** 2
            answers.append(Answer(logprobs.astype(np.float32), logprobs > -1.5))
        return answers

    def make_generator(self, params, sampling):
        return self

    def stream(self, prompts, max_new_tokens, keys_B):
        # The right answer to one of RECORDS.
        for token in b"text 1":
            yield np.full(len(prompts), token)


def evaluate(cls, **arguments):
    """The metrics of an evaluator as eval/NAME/METRIC."""
    evaluator = cls(FakeFns(), name="x", encoder=ENCODER, **arguments)
    values = {}
    yielded = []
    for key, value in evaluator.run(None):
        if not isinstance(value, Artifact):
            values[f"eval/x/{key}"] = value
            yielded.append(key)

    # What it says beforehand is what it yields by which models are compared.
    comparable = {key for key in yielded if metrics.is_higher_better(key) is not None}
    assert comparable == set(evaluator.metrics)
    return values


@pytest.fixture(name="evaluate_task")
def _evaluate_task(tmp_path):
    """Returns a function that evaluates RECORDS, given an evaluator and the keys of its task."""
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))

    def evaluate_task(cls, **keys):
        (tmp_path / "task.toml").write_text(f'type = "{cls.__module__}.{cls.__name__}"')
        source = dict(path=str(tmp_path / "test.jsonl"))
        arguments = entries.task(str(tmp_path / "task.toml"), source=source, **keys).to_dict()
        for key in ("type", "every", "batch_size"):  # read by lm.build
            del arguments[key]
        return evaluate(cls, **arguments)

    return evaluate_task


def rows(values):
    """The table's rows below its header, their columns split."""
    # Columns begin below their titles; values are aligned to the right, behind their metric.
    header, *lines = tables.headline(values).splitlines()
    starts = [header.index(title) for title in ("metric", "95% interval", "baseline")]
    split = []
    for line in lines:
        metric, value = line[starts[0] : starts[1]].split()
        interval = line[starts[1] : starts[2]].strip()
        split.append([line[: starts[0]].strip(), metric, value, interval, line[starts[2] :]])
    return split


def interval(values, metric):
    return f"{values[metric + '_low']:.4f} to {values[metric + '_high']:.4f}"


def test_the_table():
    values = {
        "step": 500,
        "train/loss": 4.2,
        "eval/validation/bits_per_byte": 1.783,
        "eval/validation/xz_bits_per_byte": 1.719,
        "eval/library/accuracy": 0.856,
        "eval/library/accuracy_low": 0.833,
        "eval/library/accuracy_high": 0.875,
        "eval/library/majority_accuracy": 0.356,
    }

    lines = tables.headline(values).splitlines()

    assert lines == [
        "eval         metric           value   95% interval       baseline",
        "validation   bits_per_byte   1.7830                      1.7190 (xz -9e)",
        "library      accuracy        0.8560   0.8330 to 0.8750   0.3560 (majority label)",
    ]


def test_perplexity():
    documents = Documents([Document("some text", "d", "")], "fingerprint")

    values = evaluate(perplexity.Perplexity, documents=documents, max_documents=0)

    # Each target has log-probability -1.5: the perplexity is exp(1.5).
    xz = f"{values['eval/x/xz_bits_per_byte']:.4f} (xz -9e)"
    assert rows(values) == [
        ["x", "bits_per_byte", f"{values['eval/x/bits_per_byte']:.4f}", "", xz],
        ["", "perplexity", "4.4817", "", ""],
    ]


WORDS = (("red", (" red",)), ("green", (" green",)))


def test_label_words(evaluate_task):
    values = evaluate_task(
        classification.PromptClassification,
        prompt=dict(templates=("{text}:",)),
        verbalizer=dict(words=(WORDS,)),
    )

    # Half of the labels are the majority's.
    accuracy, nll = rows(values)
    assert accuracy[:2] == ["x", "accuracy"]
    assert accuracy[3:] == [interval(values, "eval/x/accuracy"), "0.5000 (majority label)"]
    assert nll == ["", "nll", f"{values['eval/x/nll']:.4f}", "", ""]


def test_variants_of_a_prompt(evaluate_task):
    values = evaluate_task(
        classification.PromptClassification,
        prompt=dict(templates=("{text}:", "{text}?")),
        verbalizer=dict(words=(WORDS,)),
    )

    # Where there are several variants, how much they matter is the second metric.
    _, mean = rows(values)
    assert mean[1] == "accuracy_mean"
    low, high = values["eval/x/accuracy_min"], values["eval/x/accuracy_max"]
    assert mean[3] == f"{low:.4f} to {high:.4f} (min to max)"


def test_choices(evaluate_task):
    values = evaluate_task(
        choice.MultipleChoice,
        prompt=dict(template="{text}:"),
        choices=(" no", " yes, it is"),
        answer="number",
    )

    # By the sum of log-probabilities, and per character.
    accuracy, per_char = rows(values)
    assert accuracy[:2] == ["x", "accuracy"]
    assert accuracy[3:] == [interval(values, "eval/x/accuracy"), "0.5000 (chance)"]
    assert per_char[:2] == ["", "accuracy_char"]
    assert per_char[3:] == ["", "0.5000 (chance)"]


def test_a_single_choice(evaluate_task):
    values = evaluate_task(
        choice.MultipleChoice,
        prompt=dict(template="{text}:"),
        choices=(" {label}",),
        answer="0",
    )

    # There is nothing to choose from, and so no chance level.
    accuracy, per_choice = rows(values)
    assert accuracy[:2] == ["x", "accuracy"]
    assert accuracy[3:] == [interval(values, "eval/x/accuracy"), ""]
    assert per_choice[1:] == ["perplexity", f"{values['eval/x/perplexity']:.4f}", "", ""]


def test_generated_texts(evaluate_task):
    """The first scores of those that were asked for, and not the share of empty answers."""
    values = evaluate_task(
        generation.TextGeneration,
        prompt=dict(template="{text}:"),
        references="{text}",
        scores=("f1", "exact_match", "rougeL"),
        output=dict(max_new_tokens=6),
    )

    f1, exact_match = rows(values)
    assert f1[:2] == ["x", "f1"]
    assert f1[3] == interval(values, "eval/x/f1")
    assert exact_match[1] == "exact_match"


def test_lm_evals_tasks():
    """A part of the table for each task, whose standard errors become intervals."""
    values = {
        "eval/harness/piqa/acc": 0.6,
        "eval/harness/piqa/acc_stderr": 0.01,
        "eval/harness/piqa/acc_norm": 0.7,
        "eval/harness/piqa/acc_norm_stderr": float("nan"),
        "eval/harness/gsm8k/exact_match_strict-match": 0.25,
        "eval/harness/gsm8k/exact_match_stderr_strict-match": 0.1,
        "eval/harness/wikitext/word_perplexity": 123456.7,
    }

    assert rows(values) == [
        ["harness/piqa", "acc", "0.6000", "0.5804 to 0.6196", ""],
        ["", "acc_norm", "0.7000", "", ""],
        ["harness/gsm8k", "exact_match_strict-match", "0.2500", "0.0540 to 0.4460", ""],
        ["harness/wikitext", "word_perplexity", "1.235e+05", "", ""],
    ]


def test_an_eval_of_ones_own():
    values = {"eval/mine/loss": 2.25, "eval/mine/tokens": 12345, "eval/mine/seconds": 0.5}

    assert rows(values) == [["mine", "loss", "2.2500", "", ""]]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train/loss": 1.5, "train/seconds": 3.0},
        {"eval/samples/seconds": 0.5},
        {"eval/x/note": "text"},
    ],
)
def test_a_run_without_metrics_has_no_table(values):
    assert tables.headline(values) == ""


@pytest.mark.parametrize(
    "value, text",
    [(1234567, "1,234,567"), (0.123456, "0.1235"), (99999.0, "99999.0000"), (-1e6, "-1e+06")],
)
def test_cells(value, text):
    assert tables.cell(value) == text


# eval-STEP.md.


def test_a_report_says_what_was_asked():
    prompt = dict(
        variant="template 0",
        template="Review: {text}\n?",
        shots=["train[3]", "train[8]"],
        before="",
    )
    about = {
        "step": 3,
        "from": "run",
        "versions": {"lm": "1"},
        "tokenizer": "t",
        "dtypes": "parameters in bfloat16, computed in float32",
        "evals": {
            "x": dict(examples=5, prompts=[prompt], corrections=["content_free", "batch"]),
        },
    }
    text = tables.markdown(about, {"eval/x/accuracy": 0.5})
    assert "lm 1; tokenizer t; parameters in bfloat16, computed in float32" in text
    # In Markdown a backslash is written twice.
    assert (
        r"template 0: template 'Review: {text}\\n?'; examples before it: train[3], train[8]" in text
    )
    assert "corrections: content_free, batch" in text


# Pictures.


@pytest.mark.usefixtures("drawn_pictures")
def predicted(labels, seed=0):
    """Lines of predictions: random distributions over labels."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(12):
        distribution = dict(zip(labels, rng.dirichlet(np.ones(len(labels)))))
        lines.append(
            dict(
                name=str(i),
                label=labels[i % len(labels)],
                prediction=max(distribution, key=distribution.get),
                distribution=distribution,
                prompts=["$a_$ and more, " * (i + 1)],
            )
        )
    return lines


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "labels",
    [
        ["red", "green"],
        ["contradiction of the premise", "neutral"],
        ["a label that is a whole sentence, as some data sets have them"] * 3,
        [r"$5 and $\frac", "two\nlines", "_{$"],
    ],
)
def test_nothing_is_cut_off_pictures(labels):
    """White stands all around what is drawn. Labels are text, and no formulas."""
    size = len(labels)
    pngs = [
        pictures.plot_confusion(np.eye(size), labels, "an eval: accuracy 100.0%"),
        pictures.plot_reliability(np.full((9, size), 1 / size), np.arange(9) % size, labels, "x"),
    ]
    first, second = predicted(labels), predicted(labels, seed=1)
    pngs.append(pictures.plot_distributions(first, r"a title: $\frac$"))
    result = comparison.compare(first, second)
    pngs.append(pictures.plot_pairs(first, second, result, (r"$\frac$", r"the other: $\frac$")))
    for png in pngs:
        pixels = matplotlib.image.imread(io.BytesIO(png))[:, :, :3]
        for edge in (pixels[:, :2], pixels[:, -2:], pixels[:2], pixels[-2:]):
            assert edge.min() == 1


# Which way is better.


@pytest.mark.parametrize(
    "metric, wanted",
    [
        ("accuracy", True),
        ("accuracy_pmi_dc", True),
        ("accuracy_mean", True),
        ("nll_content_free", False),
        ("bits_per_byte", False),
        ("ece_temperature", False),
        ("mmlu/acc_norm,none", True),
        ("wikitext/byte_perplexity,none", False),
        ("accuracy_low", None),
        ("accuracy_spread", None),
        ("temperature", None),
        ("majority_accuracy", None),
        ("xz_bits_per_byte", None),
        ("examples", None),
        ("acuracy", None),
    ],
)
def test_which_way_is_better(metric, wanted):
    assert metrics.is_higher_better(metric) is wanted


def test_best_of_an_eval_of_lm_eval_is_known_by_its_name():
    evals = {"harness": None}
    assert metrics.check_best("eval/harness/mmlu/acc,none", evals)
    assert not metrics.check_best("eval/harness/wikitext/bits_per_byte,none", evals)
    with pytest.raises(ValueError, match="'mmlu/speed' is no metric of config.evals.harness"):
        metrics.check_best("eval/harness/mmlu/speed", evals)


# What others wrote, in Markdown.

HOSTILE = "a|b\n<img src=x onerror=y>\x1b[31m\n\n# not a heading"


def test_labels_citations_and_paths_break_no_table():
    about = {
        "step": 3,
        "from": HOSTILE,
        "versions": {"lm": "1"},
        "tokenizer": "t",
        "evals": {
            "x": {"citation": HOSTILE, "words": [{HOSTILE: {"w": [HOSTILE]}}]},
        },
    }
    text = tables.markdown(about, {f"eval/x/accuracy_{HOSTILE}": 0.5})
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("#")][1:] == ["## x"]
    assert "<img" not in text
    assert "\x1b" not in text
    (row,) = [line for line in lines if line.startswith("| accuracy")]
    assert row.replace("\\|", "").count("|") == 4


@pytest.mark.parametrize("text", ["plain", "```", "a\n````\nb", "`" * 9])
def test_nothing_in_a_text_ends_its_code_block(text):
    fence, *inner, last, end = escape.fenced(text).split("\n")
    assert "\n".join(inner) == text
    assert fence == last
    assert end == ""
    assert fence not in text


def test_pictures_of_examples_grow_with_their_number():
    heights = []
    for count in (1, 6):
        png = pictures.plot_distributions(predicted(["red", "green"])[:count], "a title")
        heights.append(matplotlib.image.imread(io.BytesIO(png)).shape[0])
    assert heights[1] - heights[0] == pytest.approx(5 * 75, abs=60)


def test_the_picture_of_a_pair_shows_their_differences():
    first, second = predicted(["red", "green"]), predicted(["red", "green"], seed=1)
    result = comparison.compare(first, second)
    drawn = pictures.plot_pairs(first, second, result, ("one", "other"))
    assert drawn != pictures.plot_pairs(first, first, result, ("one", "other"))
    other = result | {"nll_difference": result["nll_difference"] + 0.1}
    assert drawn != pictures.plot_pairs(first, second, other, ("one", "other"))
