"""The figures and the picture of docs/tuning.md, from the runs of its commands.

python experiments/tuning/walk.py --runs=runs --picture=docs/tuning.png
"""

import collections
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import app, flags
from etils import epath
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lm
from lm import files
from lm.data import pydocs_tasks
from lm.evals.scores import statistics, text_metrics
from lm.reports import runs as runs_lib
from lm.reports.comparison import newest_predictions
from lm.reports.tables import align

SCORES = ("exact_match", "f1")
# ending of the accuracy of such pairs -> what the picture calls them
WHICH = {"": "any", "_longer": "longer", "_equal": "the same", "_shorter": "shorter"}


class Answered(NamedTuple):
    """The scores of an answer to each of the questions."""

    name: str
    by_score: dict[str, np.ndarray]  # [questions] each

    def interval(self, score: str) -> tuple[float, float, float]:
        """(the mean, its 95% interval), by the bootstrap."""
        values = self.by_score[score]
        low, high = statistics.bootstrap_interval(lambda i: float(values[i].mean()), len(values))
        return float(values.mean()), low, high


def read_answers(run: Path, eval_name: str, name: str) -> tuple[Answered, list[list[str]]]:
    """The scores of a run's answers, and the references."""
    _, path = newest_predictions(epath.Path(run))[eval_name]
    lines = [line for _, line in files.read_jsonl(str(path))]
    by_score = {}
    for score in SCORES:
        by_score[score] = np.array([line["scores"][score] for line in lines])
    return Answered(name, by_score), [line["references"] for line in lines]


def most_frequent(references: Sequence[Sequence[str]]) -> Answered:
    """The answer that is most frequent in the training split, to all questions."""
    records = pydocs_tasks.load("train", "questions")
    counts = collections.Counter(record["answer"] for record in records)
    ((answer, _),) = counts.most_common(1)

    by_score = {}
    for score in SCORES:
        scored = text_metrics.SCORES[score]([answer] * len(references), references)
        by_score[score] = np.array(scored.each)
    return Answered(f"always {answer!r}", by_score)


def of_pairs(values: Mapping[str, float], which: str) -> tuple[float, float, float]:
    """(the share of held-out pairs whose better answer wins, its 95% interval)."""
    share = values[f"eval/held_out/accuracy{which}"]
    count = values[f"eval/held_out/examples{which}"]
    return share, *statistics.proportion_interval(round(share * count), int(count))


def plot(answered: Sequence[Answered], folder: Path, picture: Path) -> None:
    """Draws the loss of SFT, the answers' scores, and what is learnt of pairs."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    losses, scores, pairs = figure.subplots(1, 3)

    sft = runs_lib.read(epath.Path(folder / "sft"), "sft")
    losses.plot(*sft.curves["train/loss"], alpha=0.6, label="training")
    losses.plot(*sft.curves["eval/held_out/loss"], marker=".", label="held out")
    losses.set(title="SFT", xlabel="step", ylabel="nats per token of an answer")
    losses.legend()

    width = 0.38
    for number, score in enumerate(SCORES):
        intervals = np.array([a.interval(score) for a in answered])
        places = np.arange(len(answered)) + (number - 0.5) * width
        errors = [intervals[:, 0] - intervals[:, 1], intervals[:, 2] - intervals[:, 0]]
        scores.barh(places, intervals[:, 0], width, xerr=errors, capsize=2, label=score)
    scores.set_yticks(range(len(answered)), [a.name for a in answered])
    scores.invert_yaxis()
    scores.set(title="answers to held-out questions", xlim=(0, 1))
    scores.legend()

    for number, (name, title) in enumerate((("reward", "reward model"), ("dpo", "DPO"))):
        values = runs_lib.read(epath.Path(folder / name), name).last_values
        shares = [of_pairs(values, which) for which in WHICH]
        heights = np.array([share for share, _, _ in shares])
        errors = [
            heights - [low for _, low, _ in shares],
            [high for _, _, high in shares] - heights,
        ]
        places = np.arange(len(WHICH)) + (number - 0.5) * width
        pairs.bar(places, heights, width, yerr=errors, capsize=2, label=title)
    pairs.set_xticks(range(len(WHICH)), list(WHICH.values()))
    pairs.axhline(0.5, color="gray", linewidth=0.8)
    pairs.set(title="the better answer wins", xlabel="its length beside the worse one's")
    pairs.set_ylim(0, 1)
    pairs.legend(loc="lower right")

    for axis in (losses, scores, pairs):
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


def report(folder: Path, picture: Path) -> None:
    """Prints the table of the runs in a folder, and draws them."""
    before, references = read_answers(folder / "before", "questions", "base")
    answered = [most_frequent(references), before]
    for run, eval_name, name in (
        ("before", "with_examples", "base, 4 examples"),
        ("sft", "questions", "tuned"),
        ("sft", "with_examples", "tuned, 4 examples"),
    ):
        answered.append(read_answers(folder / run, eval_name, name)[0])

    rows = [("answers", *SCORES)]
    for a in answered:
        cells = [a.name]
        for score in SCORES:
            mean, low, high = a.interval(score)
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        rows.append(tuple(cells))
    print(align(rows))
    plot(answered, folder, picture)


def main(argv: list[str]) -> None:
    del argv
    report(Path(_RUNS.value), Path(_PICTURE.value))


if __name__ == "__main__":
    _RUNS = flags.DEFINE_string("runs", "runs", "Where the runs before, sft, reward and dpo are.")
    _PICTURE = flags.DEFINE_string("picture", "tuning.png", "The picture to write.")
    app.run(main)
