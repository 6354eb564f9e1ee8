"""Verbalizer classification, on models whose distributions are known: the properties that no
trained model is needed for.
"""

import json
import math

import numpy as np
import pytest

from lm.data.pack import Encoder
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer
from lm.evals import classification, label_results
from lm.evals.predict import Artifact
from lm.evals.scores import calibration
from lm.evals.scores.label_scores import word_scores
from lm.reports import pictures
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
from tests.helpers import LABELS, VERBALIZER

PROMPT = "\n?"
PAIRS = list(VERBALIZER.items())  # as the evaluator takes them


class WordTokenizer:
    """A token for each byte of a text, but a single token for the texts in `words`."""

    vocab_size, bos_id, eos_id, fingerprint = VOCAB_SIZE, BOS, 257, "words"
    around = ((BOS,), (257,))

    def __init__(self, words=()):
        self.words = {word: 300 + i for i, word in enumerate(words)}

    def encode(self, text):
        return [self.words[text]] if text in self.words else list(text.encode())


def make_documents(num=9, labels=LABELS):
    documents = []
    for i in range(num):
        documents.append(Document(f"text {i}", f"d{i}", labels[i % len(labels)]))
    return Documents(documents, "fingerprint")


def make(fns, verbalizer=PAIRS, documents=None, tokenizer=None, prompt=PROMPT, **options):
    return classification.DocumentClassification(
        fns,
        name="colours",
        documents=make_documents() if documents is None else documents,
        encoder=Encoder(tokenizer or ByteTokenizer(), prompt),
        verbalizer=verbalizer,
        **dict(max_documents=0) | options,
    )


def example_logprobs(evaluator):
    """The log-probabilities of the words after each example, of its only variant."""
    (variant,) = label_results.score_prompts(evaluator.predict_fns, None, evaluator.prompt_set)
    return variant.examples


def run(*args, **kwargs):
    """(metrics, predictions, artifacts)"""
    metrics = {}
    artifacts = {}
    for key, value in make(*args, **kwargs).run(None):
        if isinstance(value, Artifact):
            artifacts[key] = value
        else:
            metrics[key] = value
    predictions = list(map(json.loads, artifacts["predictions"].content.splitlines()))
    return metrics, predictions, artifacts


def test_word_logprobs_are_the_chain_rule():
    scores = word_scores(example_logprobs(make(Model(random_distribution))))

    for i, document in enumerate(make_documents()):
        ids = [BOS, *(document.text + PROMPT).encode()]
        for j, label in enumerate(LABELS):
            expected = chain_rule(ids, f" {label}".encode())
            assert scores[i, j] == pytest.approx(expected, abs=1e-4)
    assert scores.dtype == np.float64


def test_a_prompt_is_asked_about_once():
    """However many words there are (tests/test_tree.py: what they share is computed once)."""
    fns = Model(random_distribution)
    example_logprobs(make(fns, [("red", (" abc",)), ("green", (" abd", " y")), ("blue", (" x",))]))

    assert len(fns.questions) == 9 + len(classification.CONTENT_FREE)
    for i, question in enumerate(fns.questions[:9]):
        assert prompt_text(question) == f"text {i}" + PROMPT
        words = [bytes(ids).decode() for ids in question.continuations]
        assert words == [" abc", " abd", " y", " x"]


def test_an_oracle_is_right_and_sure():
    documents = make_documents()

    def oracle(prefix):
        # The next byte of the right word, if the text is one of the documents and its word so far.
        logprobs = np.full(VOCAB_SIZE, -30.0)
        text = bytes(prefix[1:]).decode()
        for document in documents:
            word = f" {document.label}"
            word_so_far = text.removeprefix(document.text + PROMPT)
            if word_so_far != text and word.startswith(word_so_far):
                logprobs[ord(f"{word}."[len(word_so_far)])] = 0.0
        return logprobs

    metrics, predictions, _ = run(Model(oracle))
    assert metrics["accuracy"] == metrics["macro_f1"] == 1.0
    assert metrics["accuracy_high"] <= 1.0
    assert metrics["nll"] < 1e-6
    assert metrics["brier"] < 1e-6
    assert metrics["ece"] < 1e-6
    assert metrics["label_mass"] == pytest.approx(1.0, abs=1e-6)
    for line in predictions:
        assert line["prediction"] == line["label"]

    # The same model is always wrong about data with other labels.
    wrong = {"red": "green", "green": "blue", "blue": "red"}
    shifted = [document._replace(label=wrong[document.label]) for document in documents]
    metrics, _, _ = run(Model(oracle), documents=Documents(shifted, ""))
    assert metrics["accuracy"] == 0.0


@pytest.mark.parametrize("k", [2, 5])
def test_a_uniform_model_scores_chance(k):
    labels = ("aaa", "bbb", "ccc", "ddd", "eee")[:k]
    verbalizer = [(label, (f" {label}",)) for label in labels]
    metrics, predictions, _ = run(
        Model(uniform_distribution), verbalizer, make_documents(10, labels)
    )

    assert metrics["nll"] == pytest.approx(math.log(k), rel=1e-6)
    assert metrics["brier"] == pytest.approx(1 - 1 / k, rel=1e-6)
    # Each word has four tokens.
    assert metrics["label_mass"] == pytest.approx(k / VOCAB_SIZE**4, rel=1e-4)
    np.testing.assert_allclose(distributions(predictions, labels), 1 / k, rtol=1e-6)


@pytest.mark.parametrize("words", [("aaa", "bbb"), ("aaa", "bbb", "ccc")])
def test_ties_are_shared(words):
    """A model that knows nothing is right by chance, whatever the order of the labels."""
    documents = make_documents(10, [words[0]] * 9 + [words[1]])
    verbalizer = [(word, (f" {word}",)) for word in words]

    metrics, _, _ = run(Model(uniform_distribution), verbalizer, documents)
    swapped, _, _ = run(Model(uniform_distribution), verbalizer[::-1], documents)
    assert metrics == pytest.approx(swapped, rel=1e-9)

    chance = 1 / len(words)
    for name in ("accuracy", "accuracy_content_free", "accuracy_batch", "selective_accuracy"):
        assert metrics[name] == pytest.approx(chance), name
    for name in ("micro_f1", "balanced_accuracy", "content_free_accuracy"):
        assert metrics[name] == pytest.approx(chance), name
    # It is as sure as it is right.
    assert metrics["ece"] == pytest.approx(0, abs=1e-9)
    assert metrics["confidence_auroc"] == 0.5
    assert metrics["mcc"] == metrics["kappa"] == pytest.approx(0, abs=1e-9)


def test_permuting_the_verbalizer_permutes_the_result():
    metrics, predictions, _ = run(Model(random_distribution))

    for order in ([2, 0, 1], [1, 0, 2]):
        permuted_verbalizer = [PAIRS[i] for i in order]
        permuted_metrics, permuted, _ = run(Model(random_distribution), permuted_verbalizer)
        assert permuted_metrics == pytest.approx(metrics, rel=1e-9)
        assert len(permuted) == len(predictions)
        for line, original in zip(permuted, predictions):
            # These are sums, in another order.
            expected = dict(original)
            for key in ("distribution", "label_mass"):
                expected[key] = pytest.approx(original[key], rel=1e-9)
            assert line == expected


def test_metrics_are_those_of_the_predictions():
    metrics, predictions, _ = run(Model(random_distribution), documents=make_documents(25))

    P = distributions(predictions)
    gold = gold_labels(predictions)
    predicted = P.argmax(axis=1)
    for line, k in zip(predictions, predicted, strict=True):
        assert line["prediction"] == LABELS[k]
    assert metrics["examples"] == 25
    assert metrics["accuracy"] == (predicted == gold).mean()
    assert metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]
    assert metrics["majority_accuracy"] == 9 / 25
    assert metrics["nll"] == pytest.approx(-np.log(P[np.arange(25), gold]).mean(), rel=1e-9)

    # The mean over examples, of which the file has each.
    masses = [line["label_mass"] for line in predictions]
    assert metrics["label_mass"] == pytest.approx(np.mean(masses), rel=1e-9)


def test_several_words_add_up():
    verbalizer = [
        ("red", (" red", " crimson")),
        ("green", (" green",)),
        ("blue", (" blue", " navy", " azure")),
    ]
    fns = Model(random_distribution)
    scores = word_scores(example_logprobs(make(fns, verbalizer)))
    _, predictions, _ = run(fns, verbalizer)

    P = distributions(predictions)
    for i, line in enumerate(predictions):
        words = np.exp(scores[i])
        labels = np.array([words[:2].sum(), words[2], words[3:].sum()])
        np.testing.assert_allclose(P[i], labels / labels.sum(), rtol=1e-9)
        assert line["label_mass"] == pytest.approx(labels.sum(), rel=1e-9)

        # The file has the log-probabilities that the scores are sums of.
        sums = []
        for by_word in line["word_logprobs"][0].values():
            sums += map(sum, by_word.values())
        assert sums == pytest.approx(scores[i].tolist())


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WordTokenizer([" red", " green", " blue"])])
def test_long_documents_keep_their_end_and_the_question(tokenizer):
    documents = []
    for i in range(60):
        documents.append(Document("x" * i + f"END{i % 10}", f"d{i}", LABELS[i % 3]))
    fns = Model(random_distribution, length=32)
    evaluator = make(fns, documents=Documents(documents, ""), tokenizer=tokenizer)
    scores = word_scores(example_logprobs(evaluator))

    words = list(map(tokenizer.encode, (" red", " green", " blue")))
    longest = max(map(len, words))
    for i, document in enumerate(documents):
        # All words of an example follow the same prompt, the longest whose longest word still fits.
        prompt = [BOS, *(document.text + PROMPT).encode()][-(32 - longest + 1) :]
        assert bytes(prompt[-6:]).decode().endswith(PROMPT)
        assert len(prompt) + longest - 1 <= 32
        for j, word in enumerate(words):
            assert scores[i, j] == pytest.approx(chain_rule(prompt, word), abs=1e-4)

    # The room is used.
    assert max(len(prompt_ids(question)) for question in fns.questions) + longest - 1 == 32


def test_a_question_that_does_not_fit():
    """Neither the question nor a word may be cut: a score of half a word is no score."""
    long_word = [("red", (" " + "r" * 40,)), ("green", (" g",)), ("blue", (" b",))]
    for verbalizer, prompt in ((long_word, PROMPT), (PAIRS, "?" * 40)):
        with pytest.raises(ValueError, match="32|length|context"):
            make(Model(uniform_distribution, length=32), verbalizer, prompt=prompt)


@pytest.mark.parametrize(
    "verbalizer, message",
    [
        (
            [("red", (" x",)), ("green", (" x",)), ("blue", (" b",))],
            "' x' of 'red' and ' x' of 'green' are the same tokens",
        ),
        (
            [("red", (" gre",)), ("green", (" green",)), ("blue", (" b",))],
            "' gre' of 'red' and ' green' of 'green' begin with the same tokens",
        ),
        (
            [("red", (" a", " ab")), ("green", (" g",)), ("blue", (" b",))],
            "begin with the same tokens",
        ),
        (
            [("red", (" x", " x")), ("green", (" g",)), ("blue", (" b",))],
            "' x' of 'red' and ' x' of 'red' are the same tokens",
        ),
        ([("red", ("",)), ("green", (" g",)), ("blue", (" b",))], "word '' of 'red' has no tokens"),
        ([("red", ()), ("green", (" g",)), ("blue", (" b",))], "no word for the label 'red'"),
        ([("red", (" r",)), ("green", (" g",))], "blue"),
        ([("red", (" r",)), ("green", (" g",)), ("blue", (" b",)), ("red", (" s",))], "red"),
    ],
)
def test_verbalizers_that_cannot_work(verbalizer, message):
    with pytest.raises(ValueError, match=message):
        make(Model(uniform_distribution), verbalizer)


def test_compile_verbalizer_wants_the_labels_of_the_data():
    tokenizer = ByteTokenizer()
    verbalizer = [("a", (" x", " y")), ("b", (" z",))]

    words, word_ids = classification.tokenize_verbalizer(verbalizer, tokenizer, {"a", "b"})
    assert words == [(0, " x"), (0, " y"), (1, " z")]
    assert word_ids == [[32, 120], [32, 121], [32, 122]]

    for data_labels in ({"a", "b", "c"}, {"a", "c"}):
        with pytest.raises(ValueError, match="the data's labels are"):
            classification.tokenize_verbalizer(verbalizer, tokenizer, data_labels)


def test_unlabelled_data():
    unlabelled = Documents([Document("a", "a", "red"), Document("b", "b", "")], "")
    with pytest.raises(ValueError, match="'colours' needs labelled documents"):
        make(Model(uniform_distribution), documents=unlabelled)
    with pytest.raises(ValueError, match="'colours' needs labelled documents"):
        make(Model(uniform_distribution), documents=Documents([], ""))
    with pytest.raises(ValueError, match="config.data.label_prompt"):
        make(Model(uniform_distribution), prompt="")


def test_max_documents_are_evenly_spaced():
    metrics, predictions, _ = run(Model(random_distribution), max_documents=4)
    assert metrics["examples"] == 4
    # Out of nine.
    assert [line["name"] for line in predictions] == ["d0", "d2", "d4", "d6"]


def test_artifacts():
    # A line separator in a name must not break a line of predictions/.
    names = ['name "quoted"\n\u2028', "é", "c"]
    documents = []
    for name, text, label in zip(names, "abc", LABELS):
        documents.append(Document(text, name, label))
    _, _, artifacts = run(Model(random_distribution), documents=Documents(documents, ""))

    predictions = artifacts["predictions"]
    assert predictions.path == "predictions/colours-{step}.jsonl"
    assert predictions.content.endswith("\n")
    assert not predictions.append

    # Not splitlines(), which splits at other separators too.
    lines = list(map(json.loads, predictions.content.rstrip("\n").split("\n")))
    assert [line["name"] for line in lines] == names
    assert [line["label"] for line in lines] == list(LABELS)
    for line in lines:
        assert line["distribution"].keys() == set(LABELS)
        assert sum(line["distribution"].values()) == pytest.approx(1, abs=1e-12)

        by_label = line["word_logprobs"][0]
        assert by_label.keys() == set(LABELS)
        for label, by_word in by_label.items():
            assert by_word.keys() == {f" {label}"}
            (tokens,) = by_word.values()
            assert len(tokens) == len(f" {label}")
            assert max(tokens) < 0

    for key in ("confusion", "reliability"):
        assert artifacts[key].path == f"{key}-colours.png"
        assert artifacts[key].content.startswith(b"\x89PNG\r\n\x1a\n")
        assert artifacts[key].content.rstrip().endswith(b"IEND\xaeB`\x82")


def test_certainty_is_finite():
    """Probabilities of zero and one, and words so improbable that exp() of their score is 0."""

    def certain_distribution(prefix):
        logprobs = np.full(VOCAB_SIZE, -2000.0)
        logprobs[ord("r")] = 0.0
        return logprobs

    verbalizer = [("red", ("r",)), ("green", ("gg",)), ("blue", ("bb",))]
    metrics, predictions, _ = run(Model(certain_distribution), verbalizer)
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    for line in predictions:
        assert line["distribution"] == {"red": 1.0, "green": 0.0, "blue": 0.0}


def test_prior_correction_removes_a_bias():
    """A preference for a label, whatever the document, goes by either prior."""
    documents = make_documents(30)
    gold = {document.text + PROMPT: document.label for document in documents}

    def biased_distribution(prefix):
        # One logit more for the right label, three for the last one.
        logits = np.zeros(VOCAB_SIZE)
        logits[ord(LABELS[2][0])] += 3.0
        text = bytes(prefix[1:]).decode()
        if text in gold:
            logits[ord(gold[text][0])] += 1.0
        return logits - np.log(np.exp(logits).sum())

    # Words of a single byte: the model above answers with the first letter.
    verbalizer = [("red", ("r",)), ("green", ("g",)), ("blue", ("b",))]
    metrics, _, _ = run(Model(biased_distribution), verbalizer, documents)

    # Without a correction it is always the last label.
    assert metrics["accuracy"] == metrics["content_free_accuracy"] == 1 / 3
    assert metrics["accuracy_content_free"] == metrics["accuracy_batch"] == 1.0
    right_probability = 1 / (1 + 2 / math.e)
    assert metrics["nll_content_free"] == pytest.approx(-math.log(right_probability))
    assert metrics["nll_content_free"] < metrics["nll"]
    assert metrics["ece_content_free"] == pytest.approx(1 - right_probability)


@pytest.mark.parametrize(
    "options",
    [
        dict(aggregate="max"),
        dict(aggregate="mean"),
        dict(aggregate="logmeanexp"),
        dict(length_norm="token"),
        dict(length_norm="byte"),
    ],
)
def test_scoring_options(options):
    """They change label distributions; predictions/ keeps what all of them are made of."""
    verbalizer = [("red", (" red", " x")), ("green", (" g",)), ("blue", (" blue",))]
    _, default, _ = run(Model(random_distribution), verbalizer)
    _, changed, _ = run(Model(random_distribution), verbalizer, **options)

    for default_line, changed_line in zip(default, changed):
        assert default_line["word_logprobs"] == changed_line["word_logprobs"]
    assert not np.array_equal(distributions(default), distributions(changed))


def test_truncated_documents_are_counted():
    documents = [
        Document("x" * 60, "d", "red"),
        Document("x", "e", "green"),
        Document("x", "f", "blue"),
    ]
    # Only the first one is longer than the 64 tokens of a row.
    metrics, _, _ = run(Model(uniform_distribution), documents=Documents(documents, ""))
    assert metrics["cut"] == 1


def test_invalid_options():
    with pytest.raises(
        ValueError,
        match=(
            r"config.evals.colours.aggregate = 'median'; "
            r"valid: \['sum', 'mean', 'max', 'logmeanexp'\]"
        ),
    ):
        make(Model(uniform_distribution), aggregate="median")
    with pytest.raises(ValueError, match="length_norm = 'words'; valid"):
        make(Model(uniform_distribution), length_norm="words")

    blank_word = [("red", (" ",)), ("green", ("g",)), ("blue", ("b",))]
    with pytest.raises(
        ValueError, match=r"length_norm = 'char': the words \[' '\] have no characters"
    ):
        make(Model(uniform_distribution), blank_word, length_norm="char")


def test_not_finite():
    with pytest.raises(ValueError, match="not finite for 9 of 9 examples"):
        run(Model(lambda prefix: np.full(VOCAB_SIZE, np.nan)))


def test_data_with_a_single_label():
    documents = Documents([Document("a", "a", "red"), Document("b", "b", "red")], "")
    metrics, _, _ = run(Model(uniform_distribution), documents=documents)
    # Left out, rather than not finite.
    assert "auroc" not in metrics
    assert all(map(math.isfinite, metrics.values()))


def test_pictures_have_many_labels():
    P = np.random.default_rng(0).dirichlet(np.ones(20), 50)
    gold = np.arange(50) % 20
    labels = [f"label {k}" for k in range(20)]
    assert pictures.plot_reliability(P, gold, labels, "many").startswith(b"\x89PNG")
    assert calibration.ece(P, gold) > 0
