"""Reports without a browser: what run directories say, thinned curves, means over seeds, shares of
axes, tests with Holm's correction, marks, and pages that load and run nothing of others.
"""

import base64
import gzip
import hashlib
import itertools
import json
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
from etils import epath
from scipy import stats

from lm import files, report, startup
from lm.evals import entries
from lm.evals.scores import statistics
from lm.reports import comparison, page, run_sections, runs, sweeps
from tests import report_runs
from tests.helpers import ROOT, VERBALIZER, run_training
from tests.report_runs import EVAL, LABELS, jsonl, write_run, write_sweep

ACCURACY = f"eval/{EVAL}/accuracy"


@pytest.fixture(autouse=True)
def quick(fast_runs, monkeypatch):
    """No pictures are drawn, and little is resampled."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 20)


def read(path, name="run"):
    return runs.read(epath.Path(path), name)


# Curves.


@pytest.mark.parametrize("num, most", [(3, 5), (900, 900), (901, 900), (2000, 24), (10_007, 218)])
def test_thinned_curves_keep_ends_and_spikes(num, most):
    rng = np.random.default_rng(num)
    x = np.arange(num) * 10.0
    y = rng.normal(size=num)
    y[num // 3], y[num // 2] = 99, -99

    thinned_x, thinned_y = page.thin(x, y, most)

    assert len(thinned_x) == len(thinned_y) <= max(most, 5)
    assert len(thinned_x) == num or num > most
    points = set(zip(x, y))
    assert points >= set(zip(thinned_x, thinned_y))  # nothing is made up
    assert (np.diff(thinned_x) > 0).all()
    assert {x[0], x[-1], x[num // 3], x[num // 2]} <= set(thinned_x)


def test_each_stretch_keeps_its_lowest_and_highest_value():
    y = np.random.default_rng(0).normal(size=3000)
    x, thinned = page.thin(np.arange(3000), y, 302)
    for start in range(0, 3000, 30):
        inside = thinned[(x >= start) & (x < start + 30)]
        assert inside.min() == y[start : start + 30].min()
        assert inside.max() == y[start : start + 30].max()


def test_a_gap_of_a_thinned_curve_stays():
    y = np.ones(1000)
    y[500] = np.nan
    y[700:800] = np.inf
    x, thinned = page.thin(np.arange(1000), y, 50)
    assert np.isnan(thinned[x == 500]).tolist() == [True]
    inside = thinned[(x >= 700) & (x < 800)]
    assert len(inside) and np.isinf(inside).all()


def test_numbers_that_json_lacks_are_gaps():
    figure = page.Figure("t", {"a": ([1, 2, 3, 4], [1.5, math.nan, math.inf, 10**300])})
    data = json.loads(page._drawn(page.Curves("step", [figure]), 900).data)
    assert data["figures"][0]["curves"] == [[0, [1, 2, 3, 4], [1.5, None, None, 1e300]]]


# Means over seeds.


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [0.5, 0.5], [-3.0, 7.0, 1.0, 0.0, 2.5]])
def test_mean_and_interval_over_seeds(values):
    n, mean, low, high = sweeps.mean_interval(values)
    assert n == len(values)
    assert mean == pytest.approx(sum(values) / n)
    # The ends are the means that Student's test just rejects at 5%.
    if len(set(values)) > 1:
        for end in (low, high):
            assert stats.ttest_1samp(values, end).pvalue == pytest.approx(0.05)
    else:
        assert low == high == mean


def test_one_seed_has_no_interval():
    assert sweeps.mean_interval([4.0]) == (1, 4.0, None, None)


# Axes.


def test_shares_of_axes_in_a_full_grid():
    """Against a linear model of dummy variables, by least squares."""
    rng = np.random.default_rng(3)
    grid = list(itertools.product("ab", range(3), range(4)))
    levels = dict(zip(("x", "y", "seed"), zip(*grid)))
    values = rng.normal(size=len(grid)) + [2 * (a == "a") + b for a, b, _ in grid]
    assert sweeps.is_full_grid(levels)

    shares = sweeps.axis_shares(levels, values)

    for axis, axis_levels in levels.items():
        columns = []
        for level in set(axis_levels):
            columns.append([float(other == level) for other in axis_levels])
        dummies = np.array(columns).T
        fitted = dummies @ np.linalg.lstsq(dummies, values, rcond=None)[0]
        assert shares[axis].share == pytest.approx(fitted.var() / values.var())
        assert shares[axis].levels == len(set(axis_levels))
    # Without interactions and noise the axes explain all.
    additive = [3 * (a == "a") + b**2 for a, b, _ in grid]
    exact = sweeps.axis_shares(levels, additive)
    assert exact["x"].share + exact["y"].share == pytest.approx(1)
    assert exact["seed"].share == pytest.approx(0)


def test_share_of_an_axis_without_effect():
    """Over all orders of the values its mean is what is said."""
    axis = ["a", "a", "b", "b", "c"]
    shares = []
    for values in itertools.permutations([1.0, 2.0, 4.0, 8.0, 9.0]):
        (share,) = sweeps.axis_shares({"axis": axis}, values).values()
        shares.append(share.share)
    assert np.mean(shares) == pytest.approx(share.by_chance) == pytest.approx(2 / 4)


def test_axes_that_divide_the_runs_alike_are_one():
    levels = {"width": [1, 1, 2, 3], "seed": [0, 1, 0, 1], "heads": ["a", "a", "b", "c"]}
    assert sweeps.axes_that_are_one(levels) == [["width", "heads"], ["seed"]]


def test_an_axis_with_another_value_in_each_run_is_not_told():
    levels = {"random": [1, 2, 3, 4], "one": [0, 0, 0, 0], "pair": [0, 0, 1, 1]}
    shares = sweeps.axis_shares(levels, [1.0, 2.0, 5.0, 6.0])
    assert shares["random"].share is None
    assert shares["one"].share is None
    assert shares["pair"].share == pytest.approx(16 / 17)
    assert sweeps.axis_shares(levels, [1.0] * 4) == {}
    assert sweeps.axis_shares({"x": "aabbcc"}, [0.7] * 6) == {}  # whose mean is another number
    huge = sweeps.axis_shares(levels, [1.0, 1.0, 1e304, 1e304])
    assert huge["pair"].share == pytest.approx(1)
    assert sweeps.axis_shares(levels, []) == {}


@pytest.mark.parametrize(
    "levels, wanted",
    [
        ({"a": [0, 0, 1, 1], "b": [0, 1, 0, 1]}, True),
        ({"a": [0, 0, 1], "b": [0, 1, 0]}, False),  # one is missing
        ({"a": [0, 1], "b": [0, 1]}, False),  # zipped
        ({"a": [0, 0, 1, 1, 1], "b": [0, 1, 0, 1, 1]}, False),  # one is there twice
        ({"a": [0, 0, 1, 1]}, True),
    ],
)
def test_full_grids(levels, wanted):
    assert sweeps.is_full_grid(levels) is wanted


# Sweeps.

AXES = {"optimizer.learning_rate": [0.1, 0.2, 0.3], "seed": [0, 1, 2]}
ACCURACIES = {0.1: 0.3, 0.2: 0.9, 0.3: 0.6}


def accuracy_of(changes):
    return ACCURACIES[changes["optimizer.learning_rate"]] + 0.02 * changes["seed"]


@pytest.fixture
def sweep(tmp_path):
    """(directory, plan) of a grid of nine runs."""
    return tmp_path, write_sweep(tmp_path, AXES, accuracy_of)


def read_sweep(path, metric=ACCURACY, step=None):
    plan = json.loads((path / "sweep.json").read_text())
    axes, sweep_runs = sweeps.read(epath.Path(path), plan, "the plan")
    failures = sweeps.read_failures([sweep_run.run for sweep_run in sweep_runs])
    sweeps.set_aside(sweep_runs, metric, failures, step)
    return axes, {sweep_run.run.name: sweep_run for sweep_run in sweep_runs}


def test_means_of_a_sweep(sweep):
    path, _ = sweep
    axes, sweep_runs = read_sweep(path)
    assert axes == list(AXES)
    means = sweeps.means_of_settings(list(sweep_runs.values()), ACCURACY)
    assert [mean.n for mean in means.values()] == [3, 3, 3]
    wanted = [accuracy + 0.02 for accuracy in ACCURACIES.values()]
    np.testing.assert_allclose([mean.mean for mean in means.values()], wanted)
    assert sweeps.best_setting(means, ACCURACY) == "optimizer.learning_rate=0.2"
    # Of a loss the least is the best, and of a time none.
    assert sweeps.best_setting(means, "train/loss") == "optimizer.learning_rate=0.1"
    assert sweeps.best_setting(means, "train/seconds_data") is None


def test_tests_of_a_sweep_with_holm_over_all(sweep):
    path, _ = sweep
    _, sweep_runs = read_sweep(path)
    tests, not_compared = sweeps.paired_tests(
        list(sweep_runs.values()), "optimizer.learning_rate=0.2"
    )
    assert not not_compared
    assert len(tests) == 6

    # Each is McNemar's test on the same seed.
    for test in tests:
        rate = float(test.setting.rpartition("=")[2])
        lines = []
        for other in (rate, 0.2):
            file = path / f"learning_rate-{other}_seed-{test.seed}/predictions/{EVAL}-40.jsonl"
            lines.append([json.loads(line) for line in file.read_text().splitlines()])
        alone = comparison.compare(*lines)
        assert test.p == alone["mcnemar_p"]
        assert test.difference == alone["accuracy_difference"]
        assert (test.value, test.best) == (alone["accuracy"], alone["accuracy_other"])

    # Holm by its definition: a p-value times how many are not smaller, and never less than before.
    corrected = {}
    largest = 0.0
    for rank, p in enumerate(sorted(test.p for test in tests)):
        largest = max(largest, p * (len(tests) - rank))
        corrected[p] = min(largest, 1.0)
    assert [test.p_holm for test in tests] == [corrected[test.p] for test in tests]


def test_what_can_not_be_compared_is_said(sweep):
    path, plan = sweep
    names = [entry["name"] for entry in plan["runs"]]
    shutil.rmtree(path / names[4])  # of the best setting
    shutil.rmtree(path / names[0] / "predictions")
    (path / names[2] / "predictions" / f"{EVAL}-40.jsonl").write_text(
        jsonl([line | {"distribution": None} for line in report_runs.predictions()])
    )
    fail(path / names[8], "exit 1")
    _, sweep_runs = read_sweep(path)

    tests, not_compared = sweeps.paired_tests(
        list(sweep_runs.values()), "optimizer.learning_rate=0.2"
    )

    # A run that failed is in no test, whatever predictions it left.
    assert [(test.setting, test.seed) for test in tests] == [("optimizer.learning_rate=0.3", 0)]
    no_run = "the best setting has no run with its seed"
    assert not_compared[:2] == [("no eval has predictions", names[0]), (no_run, names[1])]
    reason, name = not_compared[2]
    assert reason.startswith(f"{EVAL}: its predictions are damaged: TypeError") and name == names[2]
    assert not_compared[3] == (no_run, names[7])
    # On the page runs of one reason stand together.
    html = report.sweep_page(epath.Path(path))
    assert f"Not compared: {no_run}. {names[1]}, {names[7]}" in html


def test_what_is_set_aside_is_in_no_mean(sweep):
    path, plan = sweep
    names = [entry["name"] for entry in plan["runs"]]
    shutil.rmtree(path / names[0])
    (path / names[1] / "metrics.jsonl").write_text("")
    half = report_runs.lines(40)[:20]
    (path / names[2] / "metrics.jsonl").write_text(jsonl(half))
    shutil.rmtree(path / names[3])
    write_run(path / names[3], steps=20, changes=plan["runs"][3]["changes"])
    about = path / names[4] / "predictions" / f"{EVAL}-about-40.json"
    about.write_text(json.dumps({"fingerprint": "another"}))
    lines = report_runs.lines(40)
    lines[-2][ACCURACY] = math.nan
    (path / names[6] / "metrics.jsonl").write_text(jsonl(lines))
    (path / names[8] / "config.json").write_text("{}")
    without = [line for line in report_runs.lines(40) if "eval/validation/seconds" not in line]
    (path / names[8] / "metrics.jsonl").write_text(jsonl(without))

    fail(path / names[7], "exit 1: out of memory")
    _, sweep_runs = read_sweep(path)

    reasons = [sweep_runs[name].aside for name in names]
    assert reasons[:5] == [
        ["not begun"],
        ["no metrics"],
        ["unfinished: step 20 of 40"],
        ["other steps: 20, others 40"],
        [f"{EVAL} is of other records: another, others f"],
    ]
    assert reasons[5:] == [[], [f"{ACCURACY} is nan"], ["failed: exit 1: out of memory"], []]
    assert sweep_runs[names[8]].marks == ["other evals: lacks validation"]
    means = sweeps.means_of_settings(list(sweep_runs.values()), ACCURACY)
    assert means == {
        "optimizer.learning_rate=0.2": sweeps.mean_interval([0.9 + 0.02 * 2]),
        "optimizer.learning_rate=0.3": sweeps.mean_interval([0.5]),
    }
    # All of it is said on the page.
    html = report.sweep_page(epath.Path(path))
    for reason in ("not begun", "no metrics", "step 20 of 40", "other steps: 20", "out of memory"):
        assert reason in html
    assert "7 of them are in no mean" in html


def test_lengths_that_were_planned_are_no_other_steps(tmp_path):
    axes = {"train.length": ["20 steps", "40 steps"], "seed": [0, 1]}
    plan = write_sweep(tmp_path, axes, lambda changes: 0.5)
    for entry in plan["runs"][:2]:
        shutil.rmtree(tmp_path / entry["name"])
        write_run(tmp_path / entry["name"], steps=20, changes=entry["changes"])
    _, sweep_runs = read_sweep(tmp_path)
    assert not any(sweep_run.aside for sweep_run in sweep_runs.values())


def test_directories_that_changed_places_are_set_aside(sweep):
    path, plan = sweep
    first, second = (entry["name"] for entry in plan["runs"][:2])
    (path / first).rename(path / "x")
    (path / second).rename(path / first)
    (path / "x").rename(path / second)
    _, sweep_runs = read_sweep(path)
    assert sweep_runs[first].aside == ["its config.json has seed=1, the plan 0"]
    assert sweep_runs[second].aside == ["its config.json has seed=0, the plan 1"]
    assert sum(bool(sweep_run.aside) for sweep_run in sweep_runs.values()) == 2


def test_of_a_halving_the_longest_runs_count(tmp_path):
    plan = write_sweep(tmp_path, {"seed": [0, 1, 2]}, lambda changes: 0.5)
    shutil.rmtree(tmp_path / "seed-1")
    write_run(tmp_path / "seed-1", steps=80, changes={"seed": 1})
    for name, steps in (("seed-0", 40), ("seed-1", 80), ("seed-2", 40)):
        size = {"finished": True, "total_steps": steps}
        (tmp_path / name / "run.json").write_text(json.dumps(size))
    _, sweep_runs = read_sweep(tmp_path)
    assert [name for name, sweep_run in sweep_runs.items() if sweep_run.aside] == ["seed-1"]
    (tmp_path / "sweep.json").write_text(json.dumps(plan | {"halving": {"keep": 0.3}}))
    html = report.sweep_page(epath.Path(tmp_path))
    assert html.count("other steps: 40, others 80") == 4  # a text, and what it sorts by


def test_a_failure_counts_until_the_run_has_come_to_its_end(tmp_path):
    write_sweep(tmp_path, {"seed": [0, 1]}, lambda changes: 0.5)
    for name in ("seed-0", "seed-1"):
        fail(tmp_path / name, "out of memory", length="40 steps")
    size = {"finished": True, "total_steps": 40, "length": "40 steps"}
    (tmp_path / "seed-1" / "run.json").write_text(json.dumps(size))
    _, sweep_runs = read_sweep(tmp_path)
    assert sweep_runs["seed-0"].aside == ["failed: out of memory"]
    assert not sweep_runs["seed-1"].aside


def test_runs_that_are_set_aside_do_not_say_what_is_usual(tmp_path):
    """Three short runs of other records don't outvote the two that count."""
    write_sweep(tmp_path, {"seed": [0, 1, 2, 3, 4]}, lambda changes: 0.5)
    for seed in range(5):
        folder = tmp_path / f"seed-{seed}"
        steps = 80 if seed < 2 else 40
        shutil.rmtree(folder)
        write_run(folder, steps=steps, changes={"seed": seed})
        about = folder / "predictions" / f"{EVAL}-about-{steps}.json"
        about.write_text(json.dumps({"fingerprint": "new" if seed < 2 else "old"}))
    _, sweep_runs = read_sweep(tmp_path, step=80)
    aside = [bool(sweep_runs[f"seed-{seed}"].aside) for seed in range(5)]
    assert aside == [False, False, True, True, True]


def test_a_metric_of_another_step_is_none_of_the_run(sweep):
    path, plan = sweep
    name, other = plan["runs"][0]["name"], plan["runs"][1]["name"]
    lines = report_runs.lines(40)
    of_main = [line for line in lines if ACCURACY in line]
    others = [line for line in lines if ACCURACY not in line]
    (path / name / "metrics.jsonl").write_text(jsonl([*others, {"step": 40, "eval/topic/x": 1.0}]))
    (path / name / "eval-20.json").write_text(json.dumps(of_main[0] | {"step": 20}))
    predictions = path / other / "predictions"
    (predictions / f"{EVAL}-40.jsonl").rename(predictions / f"{EVAL}-20.jsonl")

    _, sweep_runs = read_sweep(path)
    assert sweep_runs[name].aside == [f"{ACCURACY} is of step 20, the run of step 40"]
    best = "optimizer.learning_rate=0.2"
    _, not_compared = sweeps.paired_tests(list(sweep_runs.values()), best)
    assert (f"{EVAL}: predictions of steps 20 and 40", other) in not_compared


def test_a_bound_of_another_step_is_no_interval(tmp_path):
    write_run(tmp_path)
    later = {"step": 60, ACCURACY: 0.9}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(jsonl([later]))
    run = read(tmp_path)
    assert runs.interval(ACCURACY, run.last_values) is None
    assert f"{ACCURACY}_low" not in run.last_values


def test_a_setting_is_one_in_whatever_order_its_changes_stand():
    assert sweeps.setting_of({"b": 1, "seed": 0, "a": 2}) == sweeps.setting_of({"a": 2, "b": 1})


def fail(folder, why, length=""):
    """What a run leaves that failed."""
    failure = {"code": 1, "lines": ["before", f"error: {why}"], "length": length}
    (folder / "failed.json").write_text(json.dumps(failure))


def test_run_directories_that_the_plan_lacks_are_named(sweep):
    path, plan = sweep
    (path / plan["runs"][0]["name"]).rename(path / "by-hand")
    html = report.sweep_page(epath.Path(path))
    assert "doesn&#39;t name: by-hand." in html
    assert "not begun" in html


def test_which_metric_is_the_main_one(sweep):
    path, _ = sweep
    _, sweep_runs = read_sweep(path)
    all_runs = [sweep_run.run for sweep_run in sweep_runs.values()]
    all_runs[0].config["checkpoint"]["best"] = "eval/validation/bits_per_byte"
    assert sweeps.main_metric(all_runs) == "eval/validation/bits_per_byte"
    assert sweeps.main_metric(all_runs, "train/loss") == "train/loss"
    for run in all_runs:
        run.config["checkpoint"]["best"] = ""
    assert sweeps.main_metric(all_runs) == ACCURACY  # the first headline
    for run in all_runs:
        del run.curves[ACCURACY], run.curves[f"eval/{EVAL}/majority_accuracy"]
        run.__dict__.pop("last_values", None)
    assert sweeps.main_metric(all_runs) == f"eval/{EVAL}/accuracy_low"
    with pytest.raises(
        ValueError, match="no run has the metric 'accuracy'; there are .*train/loss"
    ):
        sweeps.main_metric(all_runs, "accuracy")


@pytest.mark.parametrize(
    "plan, message",
    [
        ({}, "names no runs"),
        ({"runs": []}, "names no runs"),
        ({"runs": ["a"]}, "a run is a; wanted its name and its changes"),
        ({"runs": [{"name": "a"}]}, "wanted its name and its changes"),
        ({"runs": [{"name": "../a", "changes": {}}]}, "names the file '../a'"),
        ({"runs": [{"name": "a", "changes": {}}] * 2}, "names two runs 'a'"),
        ({"runs": [{"name": "a", "changes": {}}]}, "none of 1 runs has metrics"),
    ],
)
def test_plans_that_are_none(plan, message, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=re.escape(message)):
        report.sweep_page(epath.Path(tmp_path))


# Run directories.


def test_how_far_runs_came(tmp_path):
    write_run(tmp_path / "whole")
    assert runs.state(read(tmp_path / "whole")) == runs.FINISHED
    assert runs.state(read(tmp_path / "none")) == "not begun"

    lines = report_runs.lines(40)
    (tmp_path / "whole" / "metrics.jsonl").write_text(jsonl(lines[:-1]))
    assert runs.state(read(tmp_path / "whole")) == "unfinished: at step 40 without validation"
    (tmp_path / "whole" / "metrics.jsonl").write_text(jsonl(lines[:13]) + '{"step": 14, "trai')
    (tmp_path / "whole" / "CLAIM.json").write_text("{}")
    assert runs.state(read(tmp_path / "whole")).startswith("unfinished: step 13 of 40 (it has CLA")

    # Epochs: all evals have run at the last step.
    epochs = report_runs.config(train__length="2 epochs")
    (tmp_path / "whole" / "config.json").write_text(json.dumps(epochs))
    assert runs.state(read(tmp_path / "whole")).startswith("unfinished: at step 13 without topic")
    (tmp_path / "whole" / "metrics.jsonl").write_text(jsonl(lines))
    assert runs.state(read(tmp_path / "whole")) == runs.FINISHED
    # How many steps they are, run.json knows.
    (tmp_path / "whole" / "run.json").write_text('{"total_steps": 70}')
    assert runs.state(read(tmp_path / "whole")).startswith("unfinished: step 40 of 70")


def test_tokens_are_steps():
    config = report_runs.config(train__length="4096 tokens", data__batch_size=4, data__length=100)
    assert runs.planned_steps(config) == 11
    assert runs.planned_steps(report_runs.config(train__length="2 epochs")) is None
    assert runs.planned_steps({"train": {"length": 7}}) is None


def test_evaluations_count_and_stand_alone(tmp_path):
    write_run(tmp_path / "run")
    evaluation = {"step": 40, ACCURACY: 0.7, "versions": {"jax": "1"}, "config": {"seed": 3}}
    (tmp_path / "run" / "eval-40.json").write_text(json.dumps(evaluation))
    assert read(tmp_path / "run").last_values[ACCURACY] == 0.7

    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "eval-40.json").write_text(json.dumps(evaluation))
    run = read(tmp_path / "evals")
    assert runs.state(run) == runs.EVALUATED
    assert run.config == {"seed": 3}
    assert "evaluated with jax" in report.runs_page([epath.Path(tmp_path / "evals")])


def test_numbers_of_any_size(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": NaN, "b": 1e400, "c": -Infinity, "d": 1' + "0" * 400 + ', "e": true, '
        '"__proto__": 3, "f": "x"}\n'
    )
    values = read(tmp_path).last_values
    assert math.isnan(values.pop("a"))
    assert values == {"b": math.inf, "c": -math.inf, "d": math.inf, "__proto__": 3}
    assert "__proto__" in report.runs_page([epath.Path(tmp_path)])


@pytest.mark.parametrize(
    "line", ['{"a": 1}', '{"step": "1"}', '{"step": -1}', '{"step": true}', '{"step": 1.5}']
)
def test_lines_without_a_step(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="metrics of step .*; wanted an integer"):
        read(tmp_path)


def test_links_and_large_files_are_not_read(tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    monkeypatch.setattr(files, "MAX_SHOWN", 1000)
    with pytest.raises(ValueError, match="has .* bytes; at most 1,000 are read"):
        read(tmp_path / "run")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "metrics.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="metrics.jsonl is a link"):
        read(tmp_path / "linked")
    (tmp_path / "linked" / "metrics.jsonl").unlink()
    (tmp_path / "linked" / "predictions").mkdir()
    (tmp_path / "linked" / "predictions" / "x-1.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="x-1.jsonl is a link"):
        read(tmp_path / "linked")
    shutil.rmtree(tmp_path / "linked" / "predictions")
    (tmp_path / "linked" / "predictions").symlink_to("/etc")
    with pytest.raises(ValueError, match="predictions is a link"):
        read(tmp_path / "linked")
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [{"name": "l", "changes": {}}]}))
    (tmp_path / "l").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match="l is a link"):
        report.sweep_page(epath.Path(tmp_path))


def test_packed_files_are_not_read(tmp_path):
    write_run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(gzip.compress(metrics.read_bytes()))
    with pytest.raises(ValueError, match="metrics.jsonl is packed"):
        read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        dict(distribution=dict.fromkeys(LABELS, math.nan)),
        dict(distribution=dict.fromkeys(LABELS, 10**400)),
        dict(distribution={}),
    ],
)
def test_damaged_predictions_end_no_page(change, sweep):
    path, plan = sweep
    for entry in plan["runs"]:
        lines = [line | change for line in report_runs.predictions()]
        (path / entry["name"] / "predictions" / f"{EVAL}-40.jsonl").write_text(jsonl(lines))
    report.sweep_page(epath.Path(path))
    html = report.runs_page([epath.Path(path / entry["name"]) for entry in plan["runs"][:2]])
    assert "damaged" in html or "no pictures" in html


def test_a_configuration_that_is_nested_too_deep(tmp_path):
    write_run(tmp_path)
    depth = sys.getrecursionlimit()
    (tmp_path / "config.json").write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ValueError, match="nested too deep"):
        read(tmp_path)


def test_types_in_a_plan_and_a_configuration_that_are_others(sweep):
    path, plan = sweep
    config = path / plan["runs"][0]["name"] / "config.json"
    values = json.loads(config.read_text())
    values["checkpoint"]["best"] = ["x"]
    config.write_text(json.dumps(values))
    (path / "sweep.json").write_text(json.dumps(plan | {"axes": [["seed"], 3]}))
    axes, sweep_runs = read_sweep(path)
    assert axes == list(AXES)
    assert sweeps.main_metric([sweep_run.run for sweep_run in sweep_runs.values()]) == ACCURACY


# Pages.


@pytest.mark.slow
def test_a_real_run(small, tmp_path):
    """What a run leaves is on its page."""
    small.train.length = "2 steps"
    small.optimizer.warmup_steps = 0
    small.evals.colours = entries.classification(VERBALIZER, every=1, batch_size=8)
    small.checkpoint.best = "eval/colours/nll"
    run_training(small, tmp_path / "run")
    meta = (tmp_path / "run/checkpoints/2/meta/metadata").read_text()

    html = report.runs_page([epath.Path(tmp_path / "run")])

    assert ">finished<" in html
    assert json.loads(meta)["corpus"] in html
    assert json.loads(meta)["tokenizer"]["fingerprint"] in html
    for text in ("colours/accuracy", "train/goodput", "seconds_first_step", "colours: the first"):
        assert text in html
    assert html.count('src="data:image/png') == 2  # confusion, reliability


def test_runs_side_by_side(tmp_path):
    write_run(tmp_path / "a/run")
    write_run(tmp_path / "b/run", steps=20, changes={"seed": 7}, num=0)
    lines = [line for line in report_runs.lines(20) if "eval/validation/seconds" not in line]
    (tmp_path / "b/run/metrics.jsonl").write_text(jsonl(lines))
    html = report.runs_page([epath.Path(tmp_path / name) for name in ("a/run", "b/run")])
    assert "The runs end at different steps. 20: b/run; 40: a/run." in html
    assert "The runs have different evals. b/run lacks validation." in html
    assert "0.5000 (0.4000 to 0.6000)" in html
    assert "SHOT" in html  # what stands before a question
    assert "once⟫ upon" in html


HOSTILE = "<script>hacked = 1</script>\"'><img src=x onerror=hacked=1></script>\x1b[31m\ud800"


def hostile_page():
    curves = {HOSTILE: ([1, 2], [1, 2]), "__proto__": ([1, 2], [2, 1])}
    figures = [page.Figure(name, curves) for name in (HOSTILE, "__proto__", "constructor")]
    table = page.Table([HOSTILE], [[HOSTILE], [page.Cell(HOSTILE, HOSTILE)]], HOSTILE)
    parts = [page.Text(HOSTILE), page.Preformatted(HOSTILE, HOSTILE), table]
    parts += [page.Picture(HOSTILE, b"png"), page.Curves(HOSTILE, figures)]
    return page.render(HOSTILE, [page.Section(HOSTILE, parts)], HOSTILE)


def test_text_is_no_markup():
    html = hostile_page()
    html.encode()
    assert "\x1b" not in html
    assert html.count("<img") == 1
    body = re.sub(r"<script[^>]*>.*?</script>", "", html, flags=re.DOTALL)
    assert "<script" not in body
    assert body.count("&lt;script&gt;hacked = 1&lt;/script&gt;") == 16


def test_two_scripts_run_and_nothing_is_loaded():
    """Those whose hashes the policy names; it has no word for others, nor for any address."""
    html = hostile_page()
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    hashes = []
    for script in scripts:
        digest = hashlib.sha256(script.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    assert policy.startswith(f"default-src 'none'; script-src {' '.join(hashes)}; style-src")
    assert len(hashes) == 2
    rest = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert set(re.findall(r'(?:src|href)="([^"]{,6})', rest)) == {"data:i", "#secti"}


def test_curves_share_the_points_of_a_page(monkeypatch):
    monkeypatch.setattr(page, "MAX_POINTS", 4000)
    long = (np.arange(2000), np.sin(np.arange(2000)))
    figures = [page.Figure(str(i), {"a": long, "b": long}) for i in range(10)]
    html = page.render("t", [page.Section("s", [page.Curves("step", figures[:5], figures[5:])])])
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', html)
    curves = sum((figure["curves"] for figure in json.loads(data)["figures"]), [])
    assert len(curves) == 20
    assert sum(len(x) for _, x, _ in curves) <= 4000
    assert "more than 200 points are thinned (the longest has 2,000)" in html
    # Without curves a page is small.
    assert len(page.render("t", [page.Section("s", [page.Text("x")])])) < 30_000


def test_rows_that_a_table_has_no_room_for(monkeypatch):
    monkeypatch.setattr(page, "MAX_CELLS", 40)
    table = page.Table(["a", "b"], [[f"row {i}.", i] for i in range(30)], "Rows.")
    html = page.render("t", [page.Section("s", [table])])
    assert "Rows. The first 20 of 30 rows." in html
    assert "row 19." in html
    assert "row 20." not in html


# The command.


def run_command(monkeypatch, *workdirs, out="", metric=""):
    values = dict(_WORKDIR=list(map(str, workdirs)), _OUT=str(out), _METRIC=metric)
    for flag, value in values.items():
        monkeypatch.setattr(report, flag, types.SimpleNamespace(value=value), raising=False)
    monkeypatch.setattr(startup, "leave", lambda status: None)
    monkeypatch.setattr(report.command_line.logging, "basicConfig", lambda **kwargs: None)
    return report.main(["lm.report"])


def test_the_command(sweep, monkeypatch, capsys):
    path, plan = sweep
    run = path / plan["runs"][0]["name"]
    assert run_command(monkeypatch, run) == 0
    assert "<title>learning_rate-0.1_seed-0<" in (run / "report.html").read_text()
    assert run_command(monkeypatch, run, path / plan["runs"][1]["name"], out=path / "two.html") == 0
    assert "<title>2 runs<" in (path / "two.html").read_text()
    assert run_command(monkeypatch, path, metric="train/loss") == 0
    assert "the main metric is train/loss" in (path / "report.html").read_text()
    assert "report.html, " in capsys.readouterr().out


@pytest.mark.parametrize(
    "names, message",
    [
        (["none"], "there is no directory"),
        (["empty"], "is no run directory: it has none of config.json"),
        (["run", "run"], "a directory is given twice"),
        (["run", "."], "is a sweep, whose page is its own: give it alone"),
        (["begun"], "no metrics, neither in metrics.jsonl nor in eval-STEP.json"),
    ],
)
def test_errors_of_the_command(names, message, tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    (tmp_path / "sweep.json").write_text('{"runs": []}')
    assert run_command(monkeypatch, *(tmp_path / name for name in names)) == 1
    assert message in capsys.readouterr().err


def test_a_metric_is_for_a_sweep(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run")
    assert run_command(monkeypatch, tmp_path / "run", metric="train/loss") == 1
    assert "--metric=train/loss is for a sweep" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bokeh.resources", None)
    with pytest.raises(ValueError, match=r"pip install -c constraints.txt -e '\.\[report\]'"):
        report.runs_page([epath.Path(tmp_path)])


@pytest.mark.slow
def test_cards_of_pods():
    from lm.plan import cards

    name = "llama3_1b-v5e-4x4"
    pods = str(ROOT / "configs" / "pods.py")
    config = cards.load_config(pods, name).to_dict()
    assert report.card_of(config) == name
    config["train"]["length"] = "7 steps"
    assert report.card_of(config) == name
    config["model"]["remat"] = "none"
    assert report.card_of(config) == ""
    run = runs.Run("mine", epath.Path("x"), config=cards.load_config(pods, name))
    run.config = run.config.to_dict()
    (card,) = report._cards_section([run]).parts
    assert "parameters on 16 chips" in card.text


def test_long_texts_are_cut():
    """A file of a stranger makes no page without end; what sorts a text is shorter still."""
    table = page.Table(["a"], [["x" * 5000]])
    html = page.render("A page", [page.Section("S", [table, page.Preformatted("", "y" * 50_000)])])
    assert f"{'x' * 2000} [3,000 more characters]" in html
    assert f"{'y' * 20_000} [30,000 more characters]" in html
    assert html.count("x" * 101) == 19  # of the 2,000, without those that it sorts by


@pytest.mark.parametrize("corpora", [[], {}, [3], [{"name": 3, "splits": {"train": []}}], "x"])
def test_a_page_has_the_corpora_of_a_run(corpora, tmp_path):
    write_run(tmp_path / "run")
    good = {"name": "wiki", "version": "1.0.0", "splits": {"train": {"tokens": 12345}}}
    (tmp_path / "run" / "corpora.json").write_text(json.dumps({"corpora": [good]}))
    facts = runs.read(epath.Path(tmp_path / "run"), "run")
    html = page.render("x", [run_sections.data_and_versions([facts], {}, {})])
    assert "corpus wiki" in html and "12,345" in html

    # Whatever a stranger wrote there, there is a page.
    (tmp_path / "run" / "corpora.json").write_text(json.dumps({"corpora": corpora}))
    facts = runs.read(epath.Path(tmp_path / "run"), "run")
    page.render("x", [run_sections.data_and_versions([facts], {}, {})])
