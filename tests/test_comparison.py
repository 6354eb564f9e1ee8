"""Two runs' predictions, paired."""

import json

import numpy as np
import pytest
from etils import epath

from lm.evals.scores import statistics
from lm.reports import comparison

LABELS = ("a", "b", "c")


def make_lines(seed, skill, n=200):
    """Predictions of a model that knows a share `skill` of the answers: always the same ones for
    the same skill, and those of a lower skill too. The rest is drawn by `seed`.
    """
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    is_known = rng.random(n) < skill
    P = np.random.default_rng(seed).dirichlet(np.ones(3), n)
    P[is_known] = 0.1 + 0.7 * np.eye(3)[y[is_known]]

    # As the evaluators of label words write them.
    lines = []
    for i in range(n):
        line = dict(
            name=f"d{i}",
            label=LABELS[y[i]],
            prediction=LABELS[P[i].argmax()],
            distribution=dict(zip(LABELS, P[i].tolist())),
        )
        lines.append(line)
    return lines


GOOD = make_lines(1, skill=0.8)
BAD = make_lines(2, skill=0.5)


def make_score_lines(period, n=40):
    """Answers of which every `period`-th is right."""
    lines = []
    for i in range(n):
        lines.append(dict(name=str(i), references=["a"], scores=dict(f1=float(i % period == 0))))
    return lines


def write_run(folder, evals):
    """A run directory with predictions/ of NAME-STEP -> lines."""
    for name, lines in evals.items():
        path = folder / "predictions" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return epath.Path(folder)


def is_right(lines):
    return np.array([line["prediction"] == line["label"] for line in lines])


def test_compare():
    result = comparison.compare(GOOD, BAD)

    assert result["examples"] == 200
    assert result["accuracy"] == is_right(GOOD).mean()
    assert result["accuracy_other"] == is_right(BAD).mean()

    # The first model is better: higher accuracy and F1, lower NLL, beyond chance.
    assert result["accuracy_low"] > 0 and result["accuracy_p"] < 0.05
    assert result["mcnemar_p"] == statistics.mcnemar_p(is_right(GOOD), is_right(BAD)) < 0.01
    assert result["macro_f1_difference"] > 0
    assert result["nll_difference"] < 0 and result["nll_high"] < 0


def test_the_other_way_round_is_the_negative():
    result = comparison.compare(GOOD, BAD)
    swapped = comparison.compare(BAD, GOOD)

    for name in ("accuracy", "macro_f1", "nll"):
        assert swapped[f"{name}_difference"] == pytest.approx(-result[f"{name}_difference"])
        assert swapped[f"{name}_low"] == pytest.approx(-result[f"{name}_high"])


def test_a_model_does_not_differ_from_itself():
    result = comparison.compare(GOOD, GOOD)

    assert result["accuracy_difference"] == result["nll_difference"] == 0
    assert result["mcnemar_p"] == result["nll_p"] == 1
    assert "smallest_difference" not in result


def test_ties_are_shared():
    """A model that can't choose is half right, whichever label it names."""
    lines = []
    for i in range(20):
        label = "ab"[i % 2]
        line = dict(name=str(i), label=label, prediction="a", distribution=dict(a=0.5, b=0.5))
        lines.append(line)
    other = [line | dict(prediction="b") for line in lines]

    result = comparison.compare(lines, other)
    assert result["accuracy"] == result["accuracy_other"] == 0.5
    assert result["macro_f1_difference"] == 0
    assert result["mcnemar_p"] == 1

    # One that is right is better on each example.
    right = [line | dict(prediction=line["label"], distribution=dict(a=1, b=0)) for line in lines]
    assert comparison.compare(right, lines)["mcnemar_p"] == pytest.approx(2 / 2**20)


def test_too_few_examples():
    with pytest.raises(ValueError, match="x: 9 examples; wanted 10 or more"):
        comparison.compare(GOOD[:9], GOOD[:9], "x")


def test_what_cant_be_paired_is_no_comparison(tmp_path, caplog):
    """Neither for Holm's correction: a corpus's BLEU, a handful of examples."""
    without_scores = [dict(name=f"d{i}", references=["a"], scores={}) for i in range(20)]
    run = write_run(tmp_path / "run", {"x-1": GOOD, "bleu-1": without_scores, "few-1": GOOD[:5]})
    other = write_run(
        tmp_path / "other",
        {"x-1": BAD, "bleu-1": without_scores, "few-1": make_lines(2, skill=0.8)[:5]},
    )

    comparisons = comparison.compare_runs(run, other)

    # One eval is left, and needs no correction.
    assert list(comparisons) == ["x"]
    assert comparisons["x"]["p_holm"] == comparisons["x"]["mcnemar_p"]
    assert "bleu has no score of single examples" in caplog.text
    assert "few has 5 examples, too few to compare" in caplog.text


def test_scores_of_answers():
    first = make_score_lines(2)
    second = make_score_lines(4)

    result = comparison.compare(first, second)

    assert (result["f1"], result["f1_other"], result["f1_difference"]) == (0.5, 0.25, 0.25)
    assert result["f1_low"] > 0
    assert "accuracy" not in result

    # The same names are not enough.
    other_references = [line | dict(references=["b"]) for line in second]
    with pytest.raises(ValueError, match="evaluated on other examples"):
        comparison.compare(first, other_references)

    # Nor are they for the documents of lm_eval, where both runs have their hashes.
    hashed = [line | dict(record="f") for line in first]
    other_hashes = [line | dict(record="g") for line in second]
    assert comparison.compare(hashed, second) == result
    with pytest.raises(ValueError, match="evaluated on other examples"):
        comparison.compare(hashed, other_hashes)


def test_runs(tmp_path):
    """The newest step of the evals that both have; p-values are corrected for several evals."""
    run = write_run(
        tmp_path / "run",
        {
            "x-y-5": make_lines(9, skill=0.1),
            "x-y-20": GOOD,
            "z-20": make_lines(3, skill=0.6),
            "only-20": make_lines(4, skill=0.5),
        },
    )
    other = write_run(tmp_path / "other", {"x-y-100": BAD, "z-3": make_lines(5, skill=0.55)})

    comparisons = comparison.compare_runs(run, other)

    # Neither an eval that one run lacks, nor older steps.
    assert list(comparisons) == ["x-y", "z"]
    x_y, z = comparisons.values()
    assert x_y["accuracy"] == comparison.compare(GOOD, BAD)["accuracy"]
    assert (x_y["step"], x_y["step_other"]) == (20, 100)
    corrected = statistics.holm([x_y["mcnemar_p"], z["mcnemar_p"]])
    assert [x_y["p_holm"], z["p_holm"]] == corrected

    text = comparison.table(comparisons)
    assert "x-y, 200 examples, step 20 and step 100" in text
    assert "for 2 eval(s) (Holm)" in text


def write_about(run, name, fingerprint="f", before="", **settings):
    """What an eval says of its predictions, beside them."""
    about = dict(
        fingerprint=fingerprint, examples=200, prompts=[dict(before=before)], settings=settings
    )
    (run / "predictions" / f"{name}.json").write_text(json.dumps(about))


def test_other_records_are_refused(tmp_path):
    """Names and labels may be the same for other texts."""
    run = write_run(tmp_path / "run", {"x-y-20": GOOD})
    other = write_run(tmp_path / "other", {"x-y-3": BAD})
    write_about(run, "x-y-about-20")
    write_about(other, "x-y-about-3", fingerprint="g")

    message = "x-y: the two runs were evaluated on other records .* fingerprint f, 200 with g"
    with pytest.raises(ValueError, match=message):
        comparison.compare_runs(run, other)

    # Predictions of before there was such a file.
    (other / "predictions" / "x-y-about-3.json").unlink()
    assert comparison.compare_runs(run, other)["x-y"]["examples"] == 200


def test_other_prompts_are_said(tmp_path, caplog):
    run = write_run(tmp_path / "run", {"x-20": GOOD})
    other = write_run(tmp_path / "other", {"x-3": BAD})
    comparison.compare_runs(run, other)
    assert "x: predictions without x-about-20.json don't say which records" in caplog.text

    write_about(run, "x-about-20", prompt=dict(shots=0, seed=1), label="y")
    write_about(other, "x-about-3", before="a: b", prompt=dict(shots=4, seed=1), label="y")
    comparisons = comparison.compare_runs(run, other)
    assert comparisons["x"]["differences"] == {
        "prompt.shots": [0, 4],
        "examples before the question": [[""], ["a: b"]],
    }
    assert "asked otherwise: prompt.shots = 0 and 4" in comparison.table(comparisons)

    write_about(other, "x-about-3", prompt=dict(shots=0, seed=1), label="y")
    assert "differences" not in comparison.compare_runs(run, other)["x"]


def test_a_run_without_predictions(tmp_path):
    run = write_run(tmp_path / "run", {"x-20": GOOD, "only-20": GOOD})

    message = (
        r"no eval has predictions/ in both: .*run has \['only', 'x'\], "
        r".*nowhere \[\]. Evaluate both"
    )
    with pytest.raises(ValueError, match=message):
        comparison.compare_runs(run, epath.Path(tmp_path / "nowhere"))


def test_other_examples():
    with pytest.raises(
        ValueError, match=r"x: the two runs were evaluated on other examples \(200 and 199\)"
    ):
        comparison.compare(GOOD, GOOD[1:], "x")


def test_other_labels():
    renamed = []
    for line in GOOD:
        probs = line["distribution"].values()
        renamed.append(line | dict(distribution=dict(zip(("a!", "b!", "c!"), probs))))

    message = r"the labels are \['a', 'b', 'c'\] in one run and \['a!', 'b!', 'c!'\] in the other"
    with pytest.raises(ValueError, match=message):
        comparison.compare(GOOD, renamed)
