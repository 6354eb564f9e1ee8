"""Two runs' predictions, paired."""

import json

import numpy as np
import pytest
from etils import epath

from lm.evals.scores import statistics
from lm.reports import comparison

LABELS = ("a", "b", "c")


def lines(seed, skill, n=200):
    """Predictions of a model that knows a share of the answers, always the same ones for the same
    skill.
    """
    rng = np.random.default_rng(0)
    y, hard, P = (
        rng.integers(0, 3, n),
        rng.random(n),
        np.random.default_rng(seed).dirichlet(np.ones(3), n),
    )
    P[hard < skill] = 0.1 + 0.7 * np.eye(3)[y[hard < skill]]
    return [
        dict(
            name=f"d{i}",
            label=LABELS[k],
            prediction=LABELS[p.argmax()],
            distribution=dict(zip(LABELS, p.tolist())),
        )
        for i, (k, p) in enumerate(zip(y, P))
    ]


def write(folder, evals):
    for name, found in evals.items():
        path = folder / "predictions" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, found)) + "\n")
    return epath.Path(folder)


def test_compare():
    good, bad = lines(1, 0.8), lines(2, 0.5)
    found, back = comparison.compare(good, bad), comparison.compare(bad, good)
    right = [
        np.array([line["prediction"] == line["label"] for line in model]) for model in (good, bad)
    ]
    assert (
        found["accuracy"] == right[0].mean()
        and found["accuracy_other"] == right[1].mean()
        and found["examples"] == 200
    )
    assert (
        found["mcnemar_p"] == statistics.mcnemar(*right).p < 0.01
        and found["accuracy_p"] < 0.05
        and found["accuracy_low"] > 0
    )
    assert (
        found["nll_difference"] < 0 and found["nll_high"] < 0 and found["macro_f1_difference"] > 0
    )
    for name in ("accuracy", "macro_f1", "nll"):
        assert back[f"{name}_difference"] == pytest.approx(-found[f"{name}_difference"]) and back[
            f"{name}_low"
        ] == pytest.approx(-found[f"{name}_high"])
    same = comparison.compare(good, good)
    assert (
        same["accuracy_difference"] == same["nll_difference"] == 0
        and same["mcnemar_p"] == same["nll_p"] == 1
        and "smallest_difference" not in same
    )
    with pytest.raises(ValueError, match="x: 9 examples; wanted 10 or more"):
        comparison.compare(good[:9], good[:9], "x")


def test_what_cant_be_paired_is_no_comparison(tmp_path, caplog):
    """Neither for Holm's correction: a corpus's BLEU, a handful of examples."""
    empty = [dict(name=f"d{i}", references=["a"], scores={}) for i in range(20)]
    one = write(
        tmp_path / "one", {"x-1": lines(1, 0.8), "bleu-1": empty, "few-1": lines(1, 0.8)[:5]}
    )
    other = write(
        tmp_path / "other", {"x-1": lines(2, 0.5), "bleu-1": empty, "few-1": lines(2, 0.8)[:5]}
    )
    found = comparison.compare_runs(one, other)
    assert list(found) == ["x"] and found["x"]["p_holm"] == found["x"]["mcnemar_p"]
    assert (
        "bleu has no score of single examples" in caplog.text
        and "few has 5 examples, too few to compare" in caplog.text
    )


def test_scores_of_answers():
    first, second = (
        [dict(name=str(i), references=["a"], scores=dict(f1=float(i % k == 0))) for i in range(40)]
        for k in (2, 4)
    )
    found = comparison.compare(first, second)
    assert (
        (found["f1"], found["f1_other"], found["f1_difference"]) == (0.5, 0.25, 0.25)
        and found["f1_low"] > 0
        and "accuracy" not in found
    )
    with pytest.raises(ValueError, match="evaluated on other examples"):
        comparison.compare(first, [line | dict(references=["b"]) for line in second])


def test_runs(tmp_path):
    """The newest step of the evals that both have; several are corrected for."""
    one = write(
        tmp_path / "one",
        {
            "x-y-5": lines(9, 0.1),
            "x-y-20": lines(1, 0.8),
            "z-20": lines(3, 0.6),
            "only-20": lines(4, 0.5),
        },
    )
    other = write(tmp_path / "other", {"x-y-100": lines(2, 0.5), "z-3": lines(5, 0.55)})
    found = comparison.compare_runs(one, other)
    assert (
        list(found) == ["x-y", "z"]
        and found["x-y"]["accuracy"] == comparison.compare(lines(1, 0.8), lines(2, 0.5))["accuracy"]
    )
    assert [found[name]["p_holm"] for name in found] == statistics.holm(
        [found[name]["mcnemar_p"] for name in found]
    )
    assert (found["x-y"]["step"], found["x-y"]["step_other"]) == (20, 100)
    assert "x-y, 200 examples, step 20 and step 100" in comparison.table(
        found
    ) and "for 2 eval(s) (Holm)" in comparison.table(found)
    with pytest.raises(
        ValueError,
        match=r"no eval has predictions/ in both: .*one has \['only', 'x-y', 'z'\], .*nowhere \[\]. Evaluate both",  # noqa: E501
    ):
        comparison.compare_runs(one, epath.Path(tmp_path / "nowhere"))


def test_other_examples():
    good = lines(1, 0.8)
    with pytest.raises(
        ValueError, match=r"x: the two runs were evaluated on other examples \(200 and 199\)"
    ):
        comparison.compare(good, good[1:], "x")
    renamed = [
        line | dict(distribution={name + "!": p for name, p in line["distribution"].items()})
        for line in good
    ]
    with pytest.raises(
        ValueError,
        match=r"the labels are \['a', 'b', 'c'\] in one run and \['a!', 'b!', 'c!'\] in the other",
    ):
        comparison.compare(good, renamed)
