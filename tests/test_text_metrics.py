"""Scores of texts, against values worked out by hand and against the projects that they are of."""

import numpy as np
import pytest

from lm.evals.scores import text_metrics
from lm.evals.scores.text_metrics import SCORES


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("  The Eiffel-Tower, a  (an) icon!", "eiffeltower icon"),
        ("the", ""),
        ("theatre", "theatre"),
    ],
)
def test_squad_normalisation(text, normalized):
    assert text_metrics.normalize_squad(text) == normalized


@pytest.mark.parametrize(
    "text, normalized", [(" $1,234.00", "1234"), ("-5.", "-5"), ("7.50", "7.50"), ("8", "8")]
)
def test_normalisation_of_numbers(text, normalized):
    assert text_metrics.normalize_number(text) == normalized


def harmonic_mean(precision, recall):
    return 2 * precision * recall / (precision + recall)


def test_f1():
    """Two of four predicted words are among the three of the reference."""
    assert text_metrics.f1("a b b c", "b b d") == pytest.approx(harmonic_mean(2 / 4, 2 / 3))
    assert text_metrics.f1("", "") == 1
    assert text_metrics.f1("", "a") == 0
    assert text_metrics.f1("a", "") == 0


def test_the_best_reference_counts():
    # "x y" is "y" in part, and "x y" in whole.
    f1 = SCORES["f1"](["x y", "z"], [["y", "x y"], ["q"]])
    exact_match = SCORES["exact_match"](["x", "y", "z"], [["X", "x"], ["y"], ["w"]])

    assert f1.value == 0.5
    assert f1.each == [1.0, 0.0]
    assert (f1.low, f1.high) == (0, 1)
    assert exact_match.each == [1, 1, 0]


def test_rouge():
    """Stemmed: "cats sitting there" has two of the unigrams of "the cat sits here", and one of its
    bigrams.
    """
    predictions = ["cats sitting there"]
    references = [["the cat sits here"]]

    rouge1 = SCORES["rouge1"](predictions, references).value
    rouge2 = SCORES["rouge2"](predictions, references).value

    assert rouge1 == pytest.approx(harmonic_mean(2 / 3, 2 / 4))
    assert rouge2 == pytest.approx(harmonic_mean(1 / 2, 1 / 3))
    # The longest common subsequence with the better reference is "a b".
    assert SCORES["rougeL"](["a b c"], [["c b a", "a b x"]]).value == pytest.approx(2 / 3)


PREDICTIONS = ["the cat sat on the mat today", "a dog ran in the park", "this is it"] * 4
REFERENCES = [
    ["the cat sat on a mat today", "a cat sat there"],
    ["a dog ran in a park"],
    ["this is that"],
] * 4
# As sacreBLEU takes them: all first references, then all second ones.
COLUMNS = [
    ["the cat sat on a mat today", "a dog ran in a park", "this is that"] * 4,
    ["a cat sat there", None, None] * 4,
]


@pytest.mark.parametrize(
    "name, function, options",
    [
        ("bleu", "corpus_bleu", {}),
        ("chrf", "corpus_chrf", {}),
        ("chrf++", "corpus_chrf", dict(word_order=2)),
        ("ter", "corpus_ter", {}),
    ],
)
def test_sacrebleu(name, function, options):
    import sacrebleu

    score = SCORES[name](PREDICTIONS, REFERENCES)

    wanted = getattr(sacrebleu, function)(PREDICTIONS, COLUMNS, **options)
    assert score.value == pytest.approx(wanted.score)
    assert score.low <= score.value <= score.high
    assert score.each is None
    assert type(score.value) is type(score.low) is float


@pytest.mark.parametrize("name", list(SCORES))
def test_the_reference_itself(name):
    text = "one two three four five"

    score = SCORES[name]([text] * 12, [[text]] * 12)

    # sacreBLEU's scores are percentages; TER is an error rate.
    best = {"bleu": 100, "bleu_lc": 100, "chrf": 100, "chrf++": 100, "ter": 0}
    assert score.value == pytest.approx(best.get(name, 1.0))
    assert not np.isnan(score.low)


SENTENCES = {
    "zh": "今天天气很好，我们去公园散步吧。",
    "char": "วันนี้อากาศดี",
    "intl": "आज मौसम बहुत अच्छा है।",
}


@pytest.mark.parametrize("tokenizer, text", SENTENCES.items())
@pytest.mark.parametrize("name", ["bleu", "rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_texts_of_other_scripts(name, tokenizer, text):
    score = SCORES[name]([text] * 3, [[text]] * 3, tokenizer)
    assert score.value == pytest.approx(100 if name == "bleu" else 1)
    assert text_metrics.too_few_tokens(name, [[text]], tokenizer) == ""

    # By words of a to z, or of white space, there are too few tokens.
    reason = text_metrics.too_few_tokens(name, [[text]], "13a")
    assert bool(reason) == (SCORES[name]([text] * 3, [[text]] * 3).value == 0)


def test_bleu_by_another_tokenizer():
    import sacrebleu

    predictions, references = ["今天天气很好"], ["今天天气不好吗"]
    score = SCORES["bleu"](predictions, [references], "zh")
    wanted = sacrebleu.corpus_bleu(predictions, [references], tokenize="zh")
    assert score.value == pytest.approx(wanted.score)
    assert "tok:zh" in score.signature
    assert "tok:13a" in SCORES["bleu"](["a"], [["a"]]).signature


def test_rouge_lsum_takes_lines_for_sentences():
    from rouge_score import rouge_scorer

    prediction, reference = "b b b\na a a", "a a c\nb b d"
    scorer = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)
    wanted = scorer.score(reference, prediction)["rougeLsum"].fmeasure
    assert SCORES["rougeLsum"]([prediction], [[reference]]).value == pytest.approx(wanted)
    assert wanted > SCORES["rougeL"]([prediction], [[reference]]).value


@pytest.mark.parametrize("name, message", [("xx", "valid: .'13a'"), ("flores200", "needs .*spm")])
def test_tokenizers_that_are_not_here(name, message, monkeypatch, tmp_path):
    monkeypatch.setattr("sacrebleu.utils.SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"key = '{name}'.*{message}"):
        text_metrics.check_tokenizer(name, "key")


def test_f1_of_texts_without_spaces():
    predictions, references = ["北京大学"], [["北京的大学"]]
    assert SCORES["f1"](predictions, references).value == 0
    # Four of four characters, of five.
    assert SCORES["f1"](predictions, references, "zh").value == pytest.approx(8 / 9)
    assert "1 of 1 references have no spaces" in text_metrics.too_few_tokens(
        "f1", references, "13a"
    )
    assert not text_metrics.too_few_tokens("f1", references, "zh")
    assert not text_metrics.too_few_tokens("f1", [["Straße нет 한국 사람"]], "13a")


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("《红楼梦》。", "红楼梦"),
        ("¿La  Casa?", "la casa"),
        ("$5-Schein", "5schein"),
        ("राम।", "राम"),
    ],
)
def test_normalisation_of_other_scripts(text, normalized):
    assert text_metrics.normalize_unicode(text) == normalized
