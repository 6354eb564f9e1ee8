"""Two models on the same examples: what evals left in predictions/ of two run directories, paired."""

import json

import numpy as np
from etils import epath

from lm.evals import calibration, statistics

LEAST = 10  # examples, fewer can't be resampled


def newest_predictions(workdir: epath.Path) -> dict[str, tuple[int, epath.Path]]:
    """Eval -> (its newest step, the file of that), in a run directory."""
    found: dict[str, tuple[int, epath.Path]] = {}
    folder = workdir / "predictions"
    for path in folder.iterdir() if folder.exists() else ():
        name, _, step = path.name.removesuffix(".jsonl").rpartition("-")
        if path.name.endswith(".jsonl") and step.isdigit() and int(step) >= found.get(name, (-1,))[0]:
            found[name] = int(step), path
    return dict(sorted(found.items()))


def compare(first: list[dict], second: list[dict], what: str = "the eval") -> dict[str, float]:
    """Accuracy, macro-F1 and NLL of two models' predictions (the lines of predictions/), their differences (first less second) with 95% intervals of
    the paired bootstrap, McNemar's exact p for the accuracies, and the smallest difference of accuracies that examples like these show four times in five
    (left out where both are right on the same ones).

    Raises:
      ValueError: not the same examples in the same order, too few of them, or other labels.
    """
    if len(first) < LEAST:
        raise ValueError(f"{what}: {len(first)} examples; wanted {LEAST} or more")
    if [(line["name"], line["label"]) for line in first] != [(line["name"], line["label"]) for line in second]:
        raise ValueError(f"{what}: the two runs were evaluated on other examples ({len(first)} and {len(second)}); pairs need the same, in order")
    labels = sorted(first[0]["distribution"])
    if labels != sorted(second[0]["distribution"]):
        raise ValueError(f"{what}: the labels are {labels} in one run and {sorted(second[0]['distribution'])} in the other")
    y, n = np.array([labels.index(line["label"]) for line in first]), len(first)
    P = [np.array([[line["distribution"][label] for label in labels] for line in lines]) for lines in (first, second)]
    predicted = [np.array([labels.index(line["prediction"]) for line in lines]) for lines in (first, second)]
    right = [(p == y).astype(float) for p in predicted]
    found = {"examples": n, "mcnemar_p": statistics.mcnemar(*right).p}
    if (error := statistics.standard_error(right[0] - right[1])) > 0:
        found["smallest_difference"] = statistics.smallest_difference(error)
    scores = {
        "accuracy": [lambda i, r=r: float(r[i].mean()) for r in right],
        "macro_f1": [lambda i, p=p: statistics.prediction_scores(statistics.confusion(p[i], y[i], len(labels)))["macro_f1"] for p in predicted],
        "nll": [lambda i, q=q: calibration.nll(q[i], y[i]) for q in P],
    }
    for name, (one, other) in scores.items():
        difference = statistics.paired_bootstrap(one, other, n)
        found |= {name: one(np.arange(n)), f"{name}_other": other(np.arange(n)), f"{name}_difference": difference.value, f"{name}_low": difference.low,
                  f"{name}_high": difference.high, f"{name}_p": difference.p}
    return found


def compare_runs(workdir: epath.Path, other: epath.Path) -> dict[str, dict[str, float]]:
    """Eval -> `compare` of its newest predictions in both run directories, their steps, and mcnemar_p_holm, McNemar's p corrected for the number of
    evals.

    Raises:
      ValueError: no eval has predictions in both; see `compare`.
    """
    here, there = newest_predictions(workdir), newest_predictions(other)
    if not (names := [name for name in here if name in there]):
        raise ValueError(f"no eval has predictions/ in both: {workdir} has {list(here)}, {other} {list(there)}. Evaluate both "
                         f"(--mode=eval) with the same config.evals")
    read = lambda path: [json.loads(line) for line in path.read_text().split("\n") if line]
    found = {name: {"step": here[name][0], "step_other": there[name][0]} | compare(read(here[name][1]), read(there[name][1]), name) for name in names}
    for name, p in zip(names, statistics.holm([found[name]["mcnemar_p"] for name in names])):
        found[name]["mcnemar_p_holm"] = p
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """A comparison in words."""
    lines = []
    for name, c in found.items():
        lines.append(f"{name}, {c['examples']} examples, step {c['step']} and step {c['step_other']}:")
        for score in ("accuracy", "macro_f1", "nll"):
            lines.append(f"  {score:<9} {c[score]:8.4f}  {c[score + '_other']:8.4f}  difference {c[score + '_difference']:+.4f} "
                         f"(95%: {c[score + '_low']:+.4f} to {c[score + '_high']:+.4f}), p = {c[score + '_p']:.3g}")
        smallest = f"; the smallest difference of accuracies that this set shows: {c['smallest_difference']:.4f}" if "smallest_difference" in c else ""
        lines.append(f"  McNemar's p = {c['mcnemar_p']:.3g}, {c['mcnemar_p_holm']:.3g} for {len(found)} eval(s) (Holm){smallest}")
    return "\n".join(lines)
