"""Two models on the same examples: what evals left in predictions/ of two run directories,
paired.
"""

import json
import logging

import numpy as np
from etils import epath

from lm.evals.scores import calibration, statistics

LEAST = 10  # examples, fewer can't be resampled


def newest_predictions(workdir: epath.Path) -> dict[str, tuple[int, epath.Path]]:
    """Eval -> (its newest step, the file of that), in a run directory."""
    found: dict[str, tuple[int, epath.Path]] = {}
    folder = workdir / "predictions"
    for path in folder.iterdir() if folder.exists() else ():
        name, _, step = path.name.removesuffix(".jsonl").rpartition("-")
        if (
            path.name.endswith(".jsonl")
            and step.isdigit()
            and int(step) >= found.get(name, (-1,))[0]
        ):
            found[name] = int(step), path
    return dict(sorted(found.items()))


def compare(first: list[dict], second: list[dict], what: str = "the eval") -> dict[str, float]:
    """Of two models' predictions (the lines of predictions/): each score of both, their difference
    (first less second) with its 95% interval by the paired bootstrap. Scores are accuracy where
    lines have predictions, with McNemar's exact p and the smallest difference that examples like
    these show four times in five (left out where both are right on the same ones); macro-F1 and NLL
    where they have label distributions; and what they have as `scores`.

    Raises:
      ValueError: not the same examples in the same order, too few of them, or other labels.
    """
    if len(first) < LEAST:
        raise ValueError(f"{what}: {len(first)} examples; wanted {LEAST} or more")
    identity = lambda line: (
        line["name"],
        line.get("label"),
        line.get("references"),
        line.get("choices"),
    )
    if list(map(identity, first)) != list(map(identity, second)):
        raise ValueError(
            f"{what}: the two runs were evaluated on other examples ({len(first)} and "
            f"{len(second)}); pairs need the same, in order"
        )
    both, n = (first, second), len(first)
    found: dict[str, float] = {"examples": n}
    scores = {}
    if "prediction" in first[0]:
        right = [
            np.array([line["prediction"] == line["label"] for line in lines], float)
            for lines in both
        ]
        found["mcnemar_p"] = statistics.mcnemar(*right).p
        if (error := statistics.standard_error(right[0] - right[1])) > 0:
            found["smallest_difference"] = statistics.smallest_difference(error)
        scores["accuracy"] = [lambda i, r=r: float(r[i].mean()) for r in right]
    if "distribution" in first[0] and "scores" not in first[0]:  # of one label space
        labels = sorted(first[0]["distribution"])
        if labels != sorted(second[0]["distribution"]):
            raise ValueError(
                f"{what}: the labels are {labels} in one run and "
                f"{sorted(second[0]['distribution'])} in the other"
            )
        y = np.array([labels.index(line["label"]) for line in first])
        P = [
            np.array([[line["distribution"][label] for label in labels] for line in lines])
            for lines in both
        ]
        predicted = [
            np.array([labels.index(line["prediction"]) for line in lines]) for lines in both
        ]
        scores["macro_f1"] = [
            lambda i, p=p: statistics.prediction_scores(
                statistics.confusion(p[i], y[i], len(labels))
            )["macro_f1"]
            for p in predicted
        ]
        scores["nll"] = [lambda i, q=q: calibration.nll(q[i], y[i]) for q in P]
    for name in first[0].get("scores", {}):
        each = [np.array([line["scores"][name] for line in lines]) for lines in both]
        scores[name] = [lambda i, x=x: float(x[i].mean()) for x in each]
    for name, (one, other) in scores.items():
        difference = statistics.paired_bootstrap(one, other, n)
        found |= {
            name: one(np.arange(n)),
            f"{name}_other": other(np.arange(n)),
            f"{name}_difference": difference.value,
            f"{name}_low": difference.low,
            f"{name}_high": difference.high,
            f"{name}_p": difference.p,
        }
    return found


def compare_runs(workdir: epath.Path, other: epath.Path) -> dict[str, dict[str, float]]:
    """Eval that has scores of single examples -> `compare` of its newest predictions in both run
    directories, their steps, and p_holm: McNemar's p, or the first score's where there is none,
    corrected for the number of evals.

    Raises:
      ValueError: no eval has predictions in both; see `compare`.
    """
    here, there = newest_predictions(workdir), newest_predictions(other)
    if not (names := [name for name in here if name in there]):
        raise ValueError(
            f"no eval has predictions/ in both: {workdir} has {list(here)}, {other} "
            f"{list(there)}. Evaluate both (--mode=eval) with the same config.evals"
        )
    read = lambda path: [json.loads(line) for line in path.read_text().split("\n") if line]
    found = {}
    for name in names:
        first, second = (read(runs[name][1]) for runs in (here, there))
        if len(first) < LEAST and len(names) > 1:
            logging.warning("%s has %d examples, too few to compare (%d)", name, len(first), LEAST)
            continue
        made = compare(first, second, name)
        if any(key.endswith("_difference") for key in made):
            found[name] = {"step": here[name][0], "step_other": there[name][0]} | made
        else:
            # BLEU is of a corpus
            logging.warning("%s has no score of single examples: there is nothing to pair", name)
    first_p = lambda c: c.get(
        "mcnemar_p", next((value for key, value in c.items() if key.endswith("_p")), 1.0)
    )
    for c, p in zip(found.values(), statistics.holm([first_p(c) for c in found.values()])):
        c["p_holm"] = p
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """A comparison in words."""
    lines = []
    for name, c in found.items():
        lines.append(
            f"{name}, {c['examples']} examples, step {c['step']} and step {c['step_other']}:"
        )
        for score in (
            key.removesuffix("_difference")
            for key in c
            if key.endswith("_difference") and key != "smallest_difference"
        ):
            lines.append(
                f"  {score:<13} {c[score]:8.4f}  {c[score + '_other']:8.4f}  difference "
                f"{c[score + '_difference']:+.4f} (95%: {c[score + '_low']:+.4f} to "
                f"{c[score + '_high']:+.4f}), p = {c[score + '_p']:.3g}"
            )
        smallest = (
            "; the smallest difference of accuracies that this set shows: "
            f"{c['smallest_difference']:.4f}"
            if "smallest_difference" in c
            else ""
        )
        mcnemar = f"McNemar's p = {c['mcnemar_p']:.3g}, " if "mcnemar_p" in c else ""
        lines.append(f"  {mcnemar}p = {c['p_holm']:.3g} for {len(found)} eval(s) (Holm){smallest}")
    return "\n".join(lines)
