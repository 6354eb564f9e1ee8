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
from lm.evals import classification
from lm.evals.predict import Artifact
from lm.evals.scores import calibration
from lm.evals.verbalizer import word_scores
from lm.reports import pictures

PROMPT = "\n?"
LABELS = ("red", "green", "blue")


class WordTokenizer:
    """A token a character of a label word's alphabet; whole words in `words` are one token."""

    vocab_size, bos_id, eos_id, fingerprint = 512, 256, 257, "words"

    def __init__(self, words=()):
        self.words = {word: 300 + i for i, word in enumerate(words)}

    def encode(self, text):
        return [self.words[text]] if text in self.words else list(text.encode())


class Model:
    """PredictFns of a language model given as `distribution(prefix) -> log-probabilities of what
    follows`, prefix a tuple of ids.
    """

    def __init__(self, distribution, length=64):
        self.length, self._distribution, self.trees = length, distribution, []

    def tree_logprobs(self, params, trees):
        self.trees += trees
        out = []
        for tree in trees:
            above = lambda t: [k for k in range(t + 1) if tree.until[k] > t]  # noqa: B023
            prefixes = [tuple(tree.tokens[above(t)].tolist()) for t in range(len(tree.tokens))]
            for t, prefix in enumerate(prefixes):
                assert tree.positions[t] == len(prefix) - 1 < self.length
            said = np.array(
                [
                    self._distribution(prefixes[t])[target]
                    for t, target in zip(tree.at, tree.target)
                ],
                np.float32,
            )
            out.append((said, said > -1))
        return out


def random_distribution(prefix):
    # of integers: the same in each process
    rng = np.random.default_rng(abs(hash(prefix)) % 2**32)
    logits = rng.normal(0, 2, 512)
    return logits - np.log(np.exp(logits).sum())


def uniform_distribution(prefix):
    return np.full(512, -math.log(512))


def make_documents(num=9, labels=LABELS):
    return Documents(
        [Document(f"text {i}", f"d{i}", labels[i % len(labels)]) for i in range(num)], "fingerprint"
    )


def make(
    fns, verbalizer=None, documents=None, tokenizer=None, max_documents=0, prompt=PROMPT, **options
):
    verbalizer = verbalizer or [(label, (f" {label}",)) for label in LABELS]
    documents = make_documents() if documents is None else documents
    return classification.DocumentClassification(
        fns,
        name="colours",
        documents=documents,
        encoder=Encoder(tokenizer or ByteTokenizer(), prompt),
        verbalizer=verbalizer,
        max_documents=max_documents,
        **options,
    )


def asked(evaluator):
    """The log-probabilities of its only way of asking."""
    return classification.score_prompts(evaluator._predict_fns, None, evaluator.questions)[
        0
    ].examples


def run(*args, **kwargs):
    """(metrics, predictions, artifacts)"""
    values = dict(make(*args, **kwargs).run(None))
    artifacts = {k: v for k, v in values.items() if isinstance(v, Artifact)}
    predictions = [json.loads(line) for line in artifacts["predictions"].content.splitlines()]
    return {k: v for k, v in values.items() if k not in artifacts}, predictions, artifacts


def test_word_logprobs_are_the_chain_rule():
    fns = Model(random_distribution)
    evaluator = make(fns)
    found = word_scores(asked(evaluator))
    for i, document in enumerate(make_documents()):
        for j, label in enumerate(LABELS):
            ids = [256, *(document.text + PROMPT).encode()]
            expected = 0.0
            for token in f" {label}".encode():
                expected += random_distribution(tuple(ids))[token]
                ids.append(token)
            assert found[i, j] == pytest.approx(expected, abs=1e-4)
    assert found.dtype == np.float64


def test_a_prompt_is_computed_once():
    """However many words there are; single tokens add nothing to it, and what words share is there
    once.
    """
    fns = Model(random_distribution)
    prompt = 1 + len("text 0" + PROMPT)
    asked(make(fns, tokenizer=WordTokenizer([" red", " green", " blue"])))
    assert len(fns.trees) == 9 + 3 and all(
        len(tree.tokens) == prompt and len(tree.at) == 3 for tree in fns.trees[:9]
    )
    fns.trees.clear()
    asked(make(fns, [("red", (" abc",)), ("green", (" abd",)), ("blue", (" x",))]))
    assert all(
        len(tree.tokens) == prompt + len(" ab") and len(tree.at) == len(" abcdx")
        for tree in fns.trees[:9]
    )


def test_an_oracle_is_right_and_sure():
    documents = make_documents()

    def distribution(prefix):
        asked = bytes(t for t in prefix[1:]).decode()
        logp = np.full(512, -30.0)
        for d in documents:
            said = asked.removeprefix(d.text + PROMPT)
            if said != asked and f" {d.label}".startswith(said):
                logp[ord(f" {d.label}."[len(said)])] = 0.0
        return logp

    metrics, predictions, _ = run(Model(distribution))
    assert (
        metrics["accuracy"] == metrics["macro_f1"] == 1.0
        and metrics["nll"] < 1e-6
        and metrics["brier"] < 1e-6
        and metrics["ece"] < 1e-6
    )
    assert metrics["label_mass"] == pytest.approx(1.0, abs=1e-6) and metrics["accuracy_high"] <= 1.0
    assert all(p["prediction"] == p["label"] for p in predictions)

    wrong = {"red": "green", "green": "blue", "blue": "red"}
    shifted = Documents([d._replace(label=wrong[d.label]) for d in documents], "")
    assert run(Model(distribution), documents=shifted)[0]["accuracy"] == 0.0


@pytest.mark.parametrize("labels", [("aaa", "bbb"), ("aaa", "bbb", "ccc", "ddd", "eee")])
def test_a_uniform_model_scores_chance(labels):
    metrics, predictions, _ = run(
        Model(uniform_distribution),
        [(label, (f" {label}",)) for label in labels],
        make_documents(10, labels),
    )
    k = len(labels)
    assert metrics["nll"] == pytest.approx(math.log(k), rel=1e-6) and metrics[
        "brier"
    ] == pytest.approx(1 - 1 / k, rel=1e-6)
    assert metrics["label_mass"] == pytest.approx(k / 512**4, rel=1e-4)
    assert all(
        p["distribution"][label] == pytest.approx(1 / k, rel=1e-6)
        for p in predictions
        for label in labels
    )


def test_permuting_the_verbalizer_permutes_the_result():
    verbalizer = [(label, (f" {label}",)) for label in LABELS]
    metrics, predictions, _ = run(Model(random_distribution), verbalizer)
    for order in ([2, 0, 1], [1, 0, 2]):
        other, permuted, _ = run(Model(random_distribution), [verbalizer[i] for i in order])
        assert other == pytest.approx(metrics, rel=1e-9)
        assert permuted == [
            p
            | {
                "distribution": pytest.approx(p["distribution"], rel=1e-9),
                "label_mass": pytest.approx(p["label_mass"], rel=1e-9),
            }
            for p in predictions
        ]


def test_metrics_are_those_of_the_predictions():
    metrics, predictions, _ = run(Model(random_distribution), documents=make_documents(25))
    P = np.array([[p["distribution"][label] for label in LABELS] for p in predictions])
    y = np.array([LABELS.index(p["label"]) for p in predictions])
    right = P.argmax(1) == y
    assert [p["prediction"] for p in predictions] == [LABELS[i] for i in P.argmax(1)]
    assert metrics["accuracy"] == right.mean() and metrics["examples"] == 25
    assert metrics["nll"] == pytest.approx(-np.log(P[np.arange(25), y]).mean(), rel=1e-9)
    assert metrics["label_mass"] == pytest.approx(
        np.mean([p["label_mass"] for p in predictions]), rel=1e-9
    )
    assert (
        metrics["majority_accuracy"] == 9 / 25
        and metrics["accuracy_low"] < metrics["accuracy"] < metrics["accuracy_high"]
    )


def test_several_words_add_up():
    verbalizer = [
        ("red", (" red", " crimson")),
        ("green", (" green",)),
        ("blue", (" blue", " navy", " azure")),
    ]
    fns = Model(random_distribution)
    scores = word_scores(asked(make(fns, verbalizer)))
    _, predictions, _ = run(fns, verbalizer)
    for row, p in zip(scores, predictions):
        mass = np.exp(
            [
                np.logaddexp(row[0], row[1]),
                row[2],
                np.logaddexp(np.logaddexp(row[3], row[4]), row[5]),
            ]
        )
        np.testing.assert_allclose(
            [p["distribution"][label] for label in LABELS], mass / mass.sum(), rtol=1e-9
        )
        assert p["label_mass"] == pytest.approx(mass.sum(), rel=1e-9)
        assert [
            sum(tokens) for words in p["word_logprobs"][0].values() for tokens in words.values()
        ] == pytest.approx(row.tolist())


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WordTokenizer([" red", " green", " blue"])])
def test_long_documents_keep_their_end_and_the_question(tokenizer):
    documents = Documents(
        [
            Document("x" * n + f"END{i % 10}", f"d{i}", LABELS[i % 3])
            for i, n in enumerate(range(0, 60))
        ],
        "",
    )
    fns = Model(random_distribution, length=32)
    evaluator = make(fns, documents=documents, tokenizer=tokenizer)
    found = word_scores(asked(evaluator))
    longest = max(len(tokenizer.encode(f" {label}")) for label in LABELS)
    for i, document in enumerate(documents):
        # All words of an example follow the same prompt, the longest whose longest word still fits.
        prompt = [256, *(document.text + PROMPT).encode()][-(32 - longest + 1) :]
        assert bytes(prompt[-6:]).decode().endswith(PROMPT) and len(prompt) + longest - 1 <= 32
        for j, label in enumerate(LABELS):
            ids, expected = list(prompt), 0.0
            for token in tokenizer.encode(f" {label}"):
                expected += random_distribution(tuple(ids))[token]
                ids.append(token)
            assert found[i, j] == pytest.approx(expected, abs=1e-4)
    assert max(tree.positions.max() for tree in fns.trees) >= 30  # the room is used


def test_a_question_that_does_not_fit():
    # Neither the question nor a word may be cut: a score of half a word is no score.
    for verbalizer, prompt in (
        ([("red", (" " + "r" * 40,)), ("green", (" g",)), ("blue", (" b",))], PROMPT),
        (None, "?" * 40),
    ):
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


def test_compile_verbalizer_wants_the_data_s_labels():
    tokenizer = ByteTokenizer()
    assert classification.compile_verbalizer(
        [("a", (" x", " y")), ("b", (" z",))], tokenizer, {"a", "b"}
    ) == [(0, " x", [32, 120]), (0, " y", [32, 121]), (1, " z", [32, 122])]
    for labels in ({"a", "b", "c"}, {"a", "c"}):
        with pytest.raises(ValueError, match="the data's labels are"):
            classification.compile_verbalizer([("a", (" x",)), ("b", (" z",))], tokenizer, labels)


def test_unlabelled_data():
    unlabelled = Documents([Document("a", "a", "red"), Document("b", "b", "")], "")
    with pytest.raises(ValueError, match="'colours' needs labelled documents"):
        make(Model(uniform_distribution), documents=unlabelled)
    with pytest.raises(ValueError, match="config.data.label_prompt"):
        make(Model(uniform_distribution), prompt="")


def test_some_of_the_documents():
    metrics, predictions, _ = run(Model(random_distribution), max_documents=4)
    # evenly out of nine
    assert metrics["examples"] == 4 and [p["name"] for p in predictions] == ["d0", "d2", "d4", "d6"]


def test_artifacts():
    odd = Documents(
        [
            Document("a", 'name "quoted"\n\u2028', "red"),
            Document("b", "é", "green"),
            Document("c", "c", "blue"),
        ],
        "",
    )
    _, _, artifacts = run(Model(random_distribution), documents=odd)
    predictions, confusion = artifacts["predictions"], artifacts["confusion"]
    assert (
        predictions.path == "predictions/colours-{step}.jsonl"
        and predictions.content.endswith("\n")
        and not predictions.append
    )
    lines = [json.loads(line) for line in predictions.content.rstrip("\n").split("\n")]
    assert [line["name"] for line in lines] == [d.name for d in odd] and [
        line["label"] for line in lines
    ] == list(LABELS)
    for line in lines:
        assert set(line["distribution"]) == set(LABELS) and sum(
            line["distribution"].values()
        ) == pytest.approx(1, abs=1e-12)
        said = line["word_logprobs"][0]
        assert {label: set(words) for label, words in said.items()} == {
            label: {f" {label}"} for label in LABELS
        }
        assert all(
            len(tokens) == len(word) and max(tokens) < 0
            for words in said.values()
            for word, tokens in words.items()
        )
    for picture in (confusion, artifacts["reliability"]):
        assert (
            picture.path.endswith(".png")
            and picture.content.startswith(b"\x89PNG\r\n\x1a\n")
            and picture.content.rstrip().endswith(b"IEND\xaeB`\x82")
        )


def test_certainty_is_finite():
    # Probabilities of zero and one, and words so improbable that exp() of their score is 0.
    def distribution(prefix):
        logp = np.full(512, -2000.0)
        logp[ord("r")] = 0.0
        return logp

    metrics, predictions, _ = run(
        Model(distribution), [("red", ("r",)), ("green", ("gg",)), ("blue", ("bb",))]
    )
    assert all(math.isfinite(v) for v in metrics.values()) and metrics["accuracy"] == pytest.approx(
        1 / 3
    )
    assert all(p["distribution"] == {"red": 1.0, "green": 0.0, "blue": 0.0} for p in predictions)


def test_corrected_distributions():
    """By what follows documents that say nothing, and by the mean: a bias towards a label, whatever
    the document, goes.
    """
    documents = make_documents(30)

    def distribution(prefix):
        text = bytes(t for t in prefix[1:]).decode()
        logits = np.zeros(512)
        for number, label in enumerate(LABELS):
            logits[ord(label[0])] = 3.0 * (number == 2) + 1.0 * any(
                text == f"{d.text}{PROMPT}" and d.label == label for d in documents
            )
        return logits - np.log(np.exp(logits).sum())

    metrics, _, _ = run(Model(distribution), [(label, (label[0],)) for label in LABELS], documents)
    assert metrics["accuracy"] == metrics["content_free_accuracy"] == 1 / 3  # always the third
    assert metrics["accuracy_content_free"] == metrics["accuracy_batch"] == 1.0
    assert (
        metrics["nll_content_free"] == pytest.approx(math.log(1 + 2 / math.e))
        and metrics["nll_content_free"] < metrics["nll"]
    )
    assert metrics["ece_content_free"] == pytest.approx(1 - 1 / (1 + 2 / math.e))


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
def test_other_scores(options):
    """They change label distributions; predictions/ keeps what all of them are made of."""
    words = [("red", (" red", " x")), ("green", (" g",)), ("blue", (" blue",))]
    (_, plain, _), (_, other, _) = (
        run(Model(random_distribution), words),
        run(Model(random_distribution), words, **options),
    )
    assert [p["word_logprobs"] for p in plain] == [p["word_logprobs"] for p in other]
    assert [p["distribution"] for p in plain] != [p["distribution"] for p in other]


def test_what_is_counted_and_refused():
    long = Documents(
        [Document("x" * 60, "d", "red"), Document("x", "e", "green"), Document("x", "f", "blue")],
        "",
    )
    assert run(Model(uniform_distribution), documents=long)[0]["cut"] == 1
    with pytest.raises(
        ValueError,
        match=r"config.evals.colours.aggregate = 'median'; valid: \['sum', 'mean', 'max', 'logmeanexp'\]",  # noqa: E501
    ):
        make(Model(uniform_distribution), aggregate="median")
    with pytest.raises(ValueError, match="length_norm = 'words'; valid"):
        make(Model(uniform_distribution), length_norm="words")
    with pytest.raises(ValueError, match="needs labelled documents"):
        make(Model(uniform_distribution), documents=Documents([], ""))
    with pytest.raises(ValueError, match="not finite for 9 of 9 examples"):
        run(Model(lambda prefix: np.full(512, np.nan)))
    with pytest.raises(
        ValueError, match=r"length_norm = 'char': the words \[' '\] have no characters"
    ):
        make(
            Model(uniform_distribution),
            [("red", (" ",)), ("green", ("g",)), ("blue", ("b",))],
            length_norm="char",
        )
    same = Documents([Document("a", "a", "red"), Document("b", "b", "red")], "")
    metrics, _, _ = run(Model(uniform_distribution), documents=same)  # one label only
    assert "auroc" not in metrics and all(math.isfinite(v) for v in metrics.values())


def test_pictures_have_many_labels():
    P = np.random.default_rng(0).dirichlet(np.ones(20), 50)
    assert pictures.plot_reliability(
        P, np.arange(50) % 20, [f"label {i}" for i in range(20)], "many"
    ).startswith(b"\x89PNG")
    assert calibration.ece(P, np.arange(50) % 20) > 0
