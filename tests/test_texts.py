"""Scores of texts, against values worked out by hand and the projects that they are of."""

import numpy as np
import pytest

from lm.evals.scores import text_metrics
from lm.evals.scores.text_metrics import SCORES


def test_normalisation():
    assert text_metrics.squad("  The Eiffel-Tower, a  (an) icon!") == "eiffeltower icon"
    assert text_metrics.squad("the") == "" and text_metrics.squad("theatre") == "theatre"
    assert [text_metrics.number(x) for x in (" $1,234.00", "-5.", "7.50", "8")] == [
        "1234",
        "-5",
        "7.50",
        "8",
    ]


def test_f1_and_exact_match():
    assert text_metrics.f1("a b b c", "b b d") == pytest.approx(
        2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)
    )
    assert (
        text_metrics.f1("", "") == 1 and text_metrics.f1("", "a") == text_metrics.f1("a", "") == 0
    )
    found = SCORES["f1"](["x y", "z"], [["y", "x y"], ["q"]])
    # the best reference
    assert found.value == 0.5 and found.each == [1.0, 0.0] and found.low == 0 and found.high == 1
    assert SCORES["exact_match"](["x", "y", "z"], [["X", "x"], ["y"], ["w"]]).each == [1, 1, 0]


def test_rouge():
    """Of unigrams 2 of 3 and 2 of 4; stemmed."""
    found = SCORES["rouge1"](["cats sitting there"], [["the cat sits here"]])
    assert found.value == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert SCORES["rouge2"](["cats sitting there"], [["the cat sits here"]]).value == pytest.approx(
        2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    )
    assert SCORES["rougeL"](["a b c"], [["c b a", "a b x"]]).value == pytest.approx(2 / 3)


def test_sacrebleu():
    import sacrebleu

    predictions = ["the cat sat on the mat today", "a dog ran in the park", "this is it"] * 4
    references = [
        ["the cat sat on a mat today", "a cat sat there"],
        ["a dog ran in a park"],
        ["this is that"],
    ] * 4
    columns = [
        [several[0] for several in references],
        [several[1] if len(several) > 1 else None for several in references],
    ]
    for name, theirs in (
        ("bleu", sacrebleu.corpus_bleu),
        ("chrf", sacrebleu.corpus_chrf),
        ("ter", sacrebleu.corpus_ter),
    ):
        found = SCORES[name](predictions, references)
        assert (
            found.value == pytest.approx(theirs(predictions, columns).score)
            and found.low <= found.value <= found.high
            and found.each is None
        )
        assert type(found.value) is type(found.low) is float
    plus = SCORES["chrf++"](predictions, references)
    assert plus.value == pytest.approx(
        sacrebleu.corpus_chrf(predictions, columns, word_order=2).score
    )


@pytest.mark.parametrize("name", list(SCORES))
def test_the_reference_itself(name):
    found = SCORES[name](["one two three four five"] * 12, [["one two three four five"]] * 12)
    assert found.value == pytest.approx(
        {"bleu": 100, "chrf": 100, "chrf++": 100, "ter": 0}.get(name, 1.0)
    ) and not np.isnan(found.low)
