"""Says how much each part of a way of asking matters, from the runs of sweep.py.

    python experiments/way_of_asking/table.py --workdir=runs/way_of_asking

It prints tables, and writes ways.png to the sweep's directory.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags
from etils import epath

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lm
from lm.reports.sweeps import axis_shares, finished_runs, mean_interval
from lm.reports.tables import align

MODELS = ("trained on one way", "trained on none")
TRAINED = ("library", "lower", "none")  # the way of the training
FACTORS = ("template", "words", "examples")
CORRECTIONS = ("none", "content_free", "domain", "pmi_dc", "batch")


class Answer(NamedTuple):
    """The accuracy of a checkpoint that is asked in one way."""

    model: str
    seed: int
    step: int
    template: str
    words: str
    examples: str
    correction: str
    accuracy: float


def read_answers(workdir: Path) -> list[Answer]:
    """All answers of the finished runs of a sweep."""
    answers = []
    for run in finished_runs(epath.Path(workdir)):
        model = MODELS[0] if run.changes["data.label_prompt"] else MODELS[1]
        for name, correction in itertools.product(run.run.evals, CORRECTIONS):
            suffix = "" if correction == "none" else f"_{correction}"
            way = (*name.split("_"), correction)
            for step, accuracy in zip(*run.run.curves[f"eval/{name}/accuracy{suffix}"]):
                answers.append(Answer(model, run.changes["seed"], step, *way, accuracy))
    return answers


# --- tables ---


def over_seeds(answers: Sequence[Answer], statistic: Callable[[list[float]], float]) -> str:
    """A statistic of each seed's accuracies: its mean over the seeds, with the 95% interval."""
    by_seed: dict[int, list[float]] = {}
    for answer in answers:
        by_seed.setdefault(answer.seed, []).append(answer.accuracy)
    mean = mean_interval([statistic(values) for values in by_seed.values()])
    if mean.low is None:
        return f"{mean.mean:.1%}"
    return f"{mean.mean:.1%} ± {mean.high - mean.mean:.1%}"


def print_steps(answers: Sequence[Answer]) -> None:
    """The ways over the checkpoints, without corrections."""
    rows = [("model", "step", "worst way", "mean", "best way", "the way of the training")]
    for model in MODELS:
        of_model = [a for a in answers if a.model == model and a.correction == "none"]
        for step in sorted({a.step for a in of_model}):
            at = [a for a in of_model if a.step == step]
            trained = [a for a in at if (a.template, a.words, a.examples) == TRAINED]
            columns = [over_seeds(at, which) for which in (min, np.mean, max)]
            rows.append((model, str(step), *columns, over_seeds(trained, np.mean)))
    print(f"{align(rows)}\n")


def print_levels(answers: Sequence[Answer]) -> None:
    """The mean accuracy of each template, words and examples, over all the others, without and with
    a correction.
    """
    columns = list(itertools.product(MODELS, ("none", "batch")))
    rows = [("", "", *[f"{model}, {correction}" for model, correction in columns])]
    for factor in FACTORS:
        for level in dict.fromkeys(getattr(a, factor) for a in answers):
            of_level = [a for a in answers if getattr(a, factor) == level]
            row = [factor, level]
            for column in columns:
                chosen = [a for a in of_level if (a.model, a.correction) == column]
                row.append(over_seeds(chosen, np.mean))
            rows.append(tuple(row))
    print(f"{align(rows)}\n")


def print_corrections(answers: Sequence[Answer]) -> None:
    """The ways under each correction."""
    rows = [("model", "correction", "worst way", "mean", "best way", "deviation over ways")]
    for model in MODELS:
        for correction in CORRECTIONS:
            chosen = [a for a in answers if (a.model, a.correction) == (model, correction)]
            columns = [over_seeds(chosen, which) for which in (min, np.mean, max, np.std)]
            rows.append((model, correction, *columns))
    print(f"{align(rows)}\n")


def print_shares(answers: Sequence[Answer]) -> None:
    """How much of the variance of the accuracy each factor explains (eta squared), under each
    correction.
    """
    factors = (*FACTORS, "seed")
    rows = [("model", "correction", *factors, "interactions")]
    for model, correction in itertools.product(MODELS, CORRECTIONS):
        chosen = [a for a in answers if (a.model, a.correction) == (model, correction)]
        levels = {factor: [getattr(a, factor) for a in chosen] for factor in factors}
        shares = axis_shares(levels, [a.accuracy for a in chosen])
        if not shares:
            rows.append((model, correction, "the accuracy doesn't vary", *[""] * 4))
            continue
        main = [shares[factor].share or 0.0 for factor in factors]
        interactions = max(1 - sum(main), 0.0)
        rows.append((model, correction, *[f"{share:.0%}" for share in [*main, interactions]]))
    print(align(rows))


def plot(answers: Sequence[Answer], path: Path) -> None:
    """Draws the accuracy of each way over the checkpoints, a mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(a.words for a in answers))}
    for model, axis in zip(MODELS, panels):
        ways: dict[tuple, dict[int, list[float]]] = {}
        for a in answers:
            if a.model == model and a.correction == "none":
                by_step = ways.setdefault((a.template, a.words, a.examples), {})
                by_step.setdefault(a.step, []).append(a.accuracy)
        for (template, words, examples), by_step in ways.items():
            means = [np.mean(values) for values in by_step.values()]
            is_trained = (template, words, examples) == TRAINED
            width = 3 if is_trained else 0.8
            axis.plot(list(by_step), means, color=colors[words], linewidth=width, marker=".")
        axis.set(title=model, xlabel="step")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    for words, color in colors.items():
        panels[1].plot([], [], color=color, label=f"words: {words}")
    panels[1].plot([], [], color="black", linewidth=3, label="the way of the training")
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main(unused_argv) -> None:
    workdir = Path(_WORKDIR.value).expanduser()
    answers = read_answers(workdir)
    last = max(a.step for a in answers)
    at_end = [a for a in answers if a.step == last]

    print_steps(answers)
    print_levels(at_end)
    print_corrections(at_end)
    print_shares(at_end)
    plot(answers, workdir / "ways.png")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep.", required=True)
    app.run(main)
