"""Makes README.md's tables of the runs that it names.

python experiments/policies/table.py --workdir=runs/policies
"""

import argparse
import collections
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from configs import rl
from lm import files
from lm.data import pydocs

LAST = 64  # steps of PPO in the chain
LABELS = ("numpy", "jax")  # the runs of the verbalizer's reward

# --- the chain ---


def lines(run: Path, key: str) -> list[dict]:
    """The lines of metrics.jsonl that have a key."""
    return [line for _, line in files.read_jsonl(str(run / "metrics.jsonl")) if key in line]


def rollouts(run: Path) -> list[list[dict]]:
    """The texts of each rollout, in order."""
    paths = sorted((run / "rollouts").glob("*.jsonl"), key=lambda path: int(path.stem))
    return [[line for _, line in files.read_jsonl(str(path))] for path in paths]


def distinct_bigrams(texts: Sequence[dict]) -> float:
    """Different pairs of words over all pairs."""
    pairs = []
    for text in texts:
        words = text["text"].split()
        pairs += list(zip(words, words[1:]))
    return len(set(pairs)) / len(pairs)


def commands(run: Path, step: int) -> float:
    """The share of commands among the likeliest answers to held-out questions."""
    path = run / "predictions" / f"docstring_commands-{step}.jsonl"
    found = [re.search(rl.COMMAND, line["text"]) for _, line in files.read_jsonl(str(path))]
    return sum(map(bool, found)) / len(found)


def bits_per_byte(run: Path) -> float:
    return lines(run, "eval/text/bits_per_byte")[-1]["eval/text/bits_per_byte"]


def chain(folder: Path) -> Iterator[str]:
    (path,) = (folder / "before").glob("eval-*.json")
    before = json.loads(path.read_text())
    step = before["step"]
    first = rollouts(folder / "ppo-0")[0]
    scores = [text["rewards"]["score"] for text in first]
    yield "| | commands, drawn | held out, greedy | score | KL | distinct-2 | tokens | bits/byte |"
    yield "|---|---|---|---|---|---|---|---|"
    yield row(
        "tuned",
        rate(text["rewards"]["right"] for text in first),
        f"{commands(folder / 'before', step):.3f}",
        f"{statistics.mean(scores):.2f} (deviation {statistics.stdev(scores):.2f})",
        "0",
        f"{distinct_bigrams(first):.3f}",
        f"{statistics.mean(len(text['ids']) for text in first):.1f}",
        f"{before['eval/text/bits_per_byte']:.3f}",
    )
    for run in sorted(folder.glob("ppo-*")):
        last = rollouts(run)[-1]
        yield row(
            run.name,
            rate(text["rewards"]["right"] for text in last),
            f"{commands(run, LAST):.3f}",
            f"{statistics.mean(text['rewards']['score'] for text in last):.2f}",
            f"{lines(run, 'train/kl_of_text')[-1]['train/kl_of_text']:.2f}",
            f"{distinct_bigrams(last):.3f}",
            f"{statistics.mean(len(text['ids']) for text in last):.1f}",
            f"{bits_per_byte(run):.3f}",
        )


def rate(values: Iterable[float]) -> str:
    return f"{statistics.mean(values):.3f}"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# --- the verbalizer ---


class Bayes:
    """A naive Bayes classifier of words and pairs of words: it knows nothing of any model."""

    def __init__(self, documents: Sequence[pydocs.Document]):
        self._counts: dict[str, collections.Counter] = {}
        for document in documents:
            label = self._counts.setdefault(document.label, collections.Counter())
            label.update(self._features(document.text))
        self._vocabulary = len(set().union(*self._counts.values()))
        self._totals = {label: counts.total() for label, counts in self._counts.items()}

    def _features(self, text: str) -> list:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return [*words, *zip(words, words[1:])]

    def __call__(self, text: str) -> str:
        """The likeliest label, all of them as likely beforehand."""
        features = self._features(text)
        best = {}
        for label, counts in self._counts.items():
            scale = math.log(self._totals[label] + self._vocabulary)
            best[label] = sum(math.log(counts[feature] + 1) - scale for feature in features)
        return max(best, key=best.get)


def verbalizer(folder: Path) -> Iterator[str]:
    classify = Bayes(list(pydocs.pydocs("train", data_dir="~/.cache/lm")))
    held_out = list(pydocs.pydocs("validation", data_dir="~/.cache/lm"))
    accuracy = rate(float(classify(d.text) == d.label) for d in held_out)
    yield f"The classifier is right about {accuracy} of {len(held_out)} held-out documents."
    yield ""
    yield "| rewarded | rollouts | " + " | ".join(pydocs.LIBRARIES) + " | judge's P | KL |"
    yield "|---" * 8 + "|"
    for label in LABELS:
        run = folder / f"v-{label}"
        drawn, shown = rollouts(run), lines(run, "train/kl_of_text")
        for name, part, metrics in (
            ("the first 5", drawn[:5], shown[:5]),
            ("the last 5", drawn[-5:], shown[-5:]),
        ):
            texts = [text for rollout in part for text in rollout]
            said = collections.Counter(classify(text["text"]) for text in texts)
            shares = [f"{said[library] / len(texts):.3f}" for library in pydocs.LIBRARIES]
            judged = rate(text["rewards"]["right"] for text in texts)
            kl = statistics.mean(line["train/kl_of_text"] for line in metrics)
            yield row(label, name, *shares, judged, f"{kl:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    folder = parser.parse_args().workdir
    print("\n".join(chain(folder)), "\n")
    print("\n".join(verbalizer(folder)))


if __name__ == "__main__":
    main()
