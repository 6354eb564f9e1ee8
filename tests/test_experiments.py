"""The studies: their sweeps are what they say, and what they compute is right on made-up runs."""

import importlib.util
import json
import re

import numpy as np
import pytest
from etils import epath

from lm.sweep import plan
from tests.helpers import ROOT

SWEEPS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/*/sweep.py"))


def module(path):
    spec = importlib.util.spec_from_file_location("experiment", ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("path", SWEEPS)
def test_sweeps_of_studies_can_be_planned(path):
    assert len(plan.read(path).runs) >= 3


def test_budgets_are_spent():
    """Each run of the scaling study takes the FLOPs of its budget, to half a step."""
    study = module("experiments/scaling_law/sweep.py")
    sweep = plan.read("experiments/scaling_law/sweep.py")
    budgets = study.BUDGETS | study.HELD_OUT
    found = {budget: 0 for budget in budgets}
    for run in sweep.runs:
        config = sweep.config(run)
        step = study.flops_of_a_step(config)
        flops = step * int(config.train.length.split()[0])
        [budget] = [budget for budget in budgets if abs(budget - flops) <= step / 2]
        found[budget] += 1
    assert found == {budget: 3 * len(sizes) for budget, sizes in budgets.items()}


@pytest.fixture
def made_up():
    """Runs that follow a law of known constants, with a little noise."""
    fit = module("experiments/scaling_law/fit.py")
    law = np.array([np.log(30.0), np.log(60.0), np.log(1.5), 0.4, 0.35])
    rng = np.random.default_rng(0)
    rows = []
    for budget in (3e11, 1e12, 3e12, 1e13, 1e14):
        for n in np.sqrt(budget / 6) / 20 * np.array([0.3, 0.6, 1, 2, 4]):
            d = budget / (6 * n)
            for _ in range(3):
                loss = np.exp(fit.log_loss(law, np.array([n]), np.array([d])))[0]
                rows.append((n, d, budget, loss * np.exp(rng.normal(0, 1e-3)), budget))
    return fit, law, dict(zip(("N", "D", "C", "L", "budget"), np.array(rows).T))


def test_a_known_law_is_found_again(made_up):
    fit, law, runs = made_up
    seen = fit.select(runs, runs["budget"] < 1e14)
    found = fit.fit_law(seen, starts=fit.STARTS[::7])
    # What a fit from few budgets knows is the loss, and the exponents to a tenth or so.
    np.testing.assert_allclose(found[3:], law[3:], atol=0.08)
    held_out = fit.select(runs, runs["budget"] == 1e14)
    predicted = np.exp(fit.log_loss(found, held_out["N"], held_out["D"]))
    np.testing.assert_allclose(predicted, held_out["L"], rtol=0.02)


def test_the_best_sizes_of_budgets_grow_as_the_law_says(made_up):
    fit, law, runs = made_up
    exponent, _ = fit.size_law(runs)
    assert exponent == pytest.approx(law[4] / (law[3] + law[4]), abs=0.03)
    for budget, (n, loss) in fit.best_sizes(runs).items():
        of_budget = fit.select(runs, runs["budget"] == budget)
        assert of_budget["N"].min() < n < of_budget["N"].max()
        assert loss == pytest.approx(of_budget["L"].min(), rel=0.02)


def write_asked_run(folder, seed, label_prompt, accuracies):
    """A finished run with the accuracy of each way at steps 1 and 2; corrections change nothing."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"finished": True, "total_steps": 2}))
    corrections = ("", "_content_free", "_domain", "_pmi_dc", "_batch")
    lines = []
    for step in (1, 2):
        line = {"step": step, "train/loss": 1.0}
        for way, accuracy in accuracies.items():
            for correction in corrections:
                line[f"eval/{way}/accuracy{correction}"] = accuracy * step / 2
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return {"name": folder.name, "changes": {"seed": seed, "data.label_prompt": label_prompt}}


def printed(capsys):
    """The cells of each row of the tables that were printed."""
    lines = capsys.readouterr().out.splitlines()
    return [re.split(" {2,}", line) for line in lines if line]


def test_the_parts_of_a_way_of_asking_are_told_apart(tmp_path, capsys):
    table = module("experiments/way_of_asking/table.py")
    study = module("experiments/way_of_asking/sweep.py")
    accuracies = {}
    for way in study.ways():
        accuracies[way] = 0.9 if "lower" in way else 0.3
    runs = []
    for seed in (0, 1):
        for name, label_prompt in (("trained", study.TRAINED), ("plain", "")):
            folder = tmp_path / f"{name}-{seed}"
            runs.append(write_asked_run(folder, seed, label_prompt, accuracies))
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))

    answers = table.read_answers(tmp_path)
    assert len(answers) == 2 * 2 * 2 * len(study.ways()) * 5
    table.print_steps(answers)
    half, whole = [row for row in printed(capsys) if row[0] == "trained on one way"]
    assert half[1:] == ["1", "15.0% ± 0.0%", "22.5% ± 0.0%", "45.0% ± 0.0%", "45.0% ± 0.0%"]
    assert whole[-1] == "90.0% ± 0.0%"

    # The label words explain everything; the shares are of the last step.
    at_end = [answer for answer in answers if answer.step == 2]
    table.print_shares(at_end)
    header, *rows = printed(capsys)
    assert len(rows) == 2 * 5
    for row in rows:
        shares = dict(zip(header[2:], row[2:]))
        assert shares.pop("words") == "100%" and set(shares.values()) == {"0%"}
    table.print_levels(at_end)
    assert ["words", "lower", *["90.0% ± 0.0%"] * 4] in printed(capsys)
    table.plot(answers, tmp_path / "ways.png")
    assert (tmp_path / "ways.png").exists()


def write_answers(folder, answers):
    """The predictions of a run: eval -> whether each of its answers is right."""
    (folder / "predictions").mkdir(parents=True)
    for name, rights in answers.items():
        lines = []
        for number, is_right in enumerate(rights):
            line = dict(name=str(number), text="a", references=["a"])
            line["scores"] = dict(exact_match=float(is_right), f1=float(is_right))
            lines.append(json.dumps(line) + "\n")
        (folder / "predictions" / f"{name}-2.jsonl").write_text("".join(lines))
    return folder


def test_what_tuning_changed_is_told_by_task(tmp_path):
    table = module("experiments/instructions/table.py")
    before = write_answers(tmp_path / "before", dict(seen=[False] * 40, kept=[True, False] * 20))
    runs = []
    for seed, num_right in enumerate((28, 30, 32)):
        rights = [number < num_right for number in range(40)]
        folder = write_answers(tmp_path / f"{seed}", dict(seen=rights, kept=[True, False] * 20))
        tasks = dict(
            seen=dict(instructions=dict(cluster="b")), kept=dict(instructions=dict(cluster="z"))
        )
        source_args = dict(held_out_clusters="z,y", tasks=tasks)
        (folder / "config.json").write_text(json.dumps(dict(data=dict(source_args=source_args))))
        (folder / "run.json").write_text(json.dumps(dict(finished=True, total_steps=2)))
        runs.append(dict(name=folder.name, changes=dict(seed=seed)))
    (tmp_path / "sweep.json").write_text(json.dumps(dict(runs=runs)))

    kept, seen = table.rows_of(epath.Path(tmp_path), epath.Path(before))
    assert kept[:5] == ("kept", "z, held out", "exact_match", "0.500", "0.500")
    assert kept[5:] == ("+0.000 (+0.000 to +0.000)", "1, 1, 1")
    # Student's t: 4.303 times 0.05 / sqrt(3).
    assert seen[3:6] == ("0.000", "0.750", "+0.750 (+0.626 to +0.874)")
    assert all(float(p) < 0.01 for p in seen[6].split(", "))


def test_the_walk_has_its_table_and_its_picture(tmp_path, monkeypatch, capsys):
    walk = module("experiments/tuning/walk.py")
    both = dict(questions=[False] * 20, with_examples=[True, False] * 10)
    for name in ("before", "sft"):
        write_answers(tmp_path / name, both)
    curve = {"step": 2, "train/loss": 1.0, "eval/held_out/loss": 1.0}
    (tmp_path / "sft" / "metrics.jsonl").write_text(json.dumps(curve) + "\n")
    for name in ("reward", "dpo"):
        line = {"step": 2}
        for which in walk.WHICH:
            line |= {f"eval/held_out/accuracy{which}": 0.75, f"eval/held_out/examples{which}": 40}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    records = [dict(answer=answer) for answer in "aab"]
    monkeypatch.setattr(walk.pydocs_tasks, "load", lambda split, family: records)

    walk.report(tmp_path, tmp_path / "walk.png")
    rows = printed(capsys)
    assert rows[1] == ["always 'a'", *["1.000 (1.000 to 1.000)"] * 2]
    assert [row[1][:5] for row in rows[2:]] == ["0.000", "0.500", "0.000", "0.500"]
    assert (tmp_path / "walk.png").exists()
    share, low, high = walk.of_pairs(line, "_longer")
    assert 0.59 < low < share == 0.75 < high < 0.87
