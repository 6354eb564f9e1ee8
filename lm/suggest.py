"""Candidates for the label words of a verbalizer:

    python -m lm.suggest --config=configs/mine.py --workdir=RUN --eval=NAME

NAME is an entry of config.evals made by `lm.config.task`, with label words to begin with. Prints,
for each label, the words that a checkpoint itself holds likely after prompts of that label and not
after others, and those whose rows of the head lie nearest to its present words.
"""

import logging
import os
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from etils import epath

from lm import build, command_line, startup, weights
from lm.evals import classification


def candidates(tokenizer, vocab_size: int) -> list[int]:
    """Ids of single tokens that are whole words: a space, then letters."""
    anchor = tokenizer.encode("a")
    texts = ((i, tokenizer.decode([*anchor, i]).removeprefix("a")) for i in range(vocab_size))
    return [i for i, text in texts if len(text) > 2 and text[0] == " " and text[1:].isalpha()]


def likelihood_ratio(
    logprobs: np.ndarray, gold: np.ndarray, num_labels: int, most: int = 1000
) -> np.ndarray:
    """[K, V] PETAL's score of a word for a label: its log odds after prompts of the label, less
    those after others, the label's prompts weighing as much as all others together; -inf for words
    that aren't among the likeliest after the label's prompts (Schick, Schmid and Schuetze 2020,
    arXiv 2010.13641, section 4).

    Args:
      logprobs: [n, V] after each prompt.
      most: how many are.
    """
    likely = np.stack([logprobs[gold == k].sum(axis=0) for k in range(num_labels)])
    least = -np.sort(-likely, axis=1)[:, min(most, likely.shape[1]) - 1 :][:, :1]
    odds = logprobs - np.log1p(-np.minimum(np.exp(logprobs), 1 - 1e-7))
    score = lambda of: odds[of].sum(axis=0) * ((~of).sum() / of.sum()) - odds[~of].sum(axis=0)
    return np.where(
        likely >= least, np.stack([score(gold == k) for k in range(num_labels)]), -np.inf
    )


def nearest(rows: np.ndarray, words: Sequence[Sequence[int]]) -> np.ndarray:
    """[K, V] cosine of each token's row with the mean row of a label's words, given the numbers of
    their first tokens' rows.
    """
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
    rows = unit(rows)
    return np.stack([rows @ unit(rows[list(of)].mean(axis=0)) for of in words])


def suggest(
    config, workdir: epath.Path, devices, name: str, examples: int, count: int
) -> dict[str, dict[str, list[str]]]:
    """Label -> {"likelihood ratio": words, "nearest": words}, the best first.

    Raises:
      ValueError: no such eval; see `lm.evals.classification.PromptClassification`.
    """
    config = build.apply_hf_config(config)
    if (
        name not in config.evals
        or config.evals[name].type != "lm.evals.classification.PromptClassification"
    ):
        raise ValueError(
            f"--eval={name}: wanted one of "
            f"{[key for key, e in config.evals.items() if e.type == 'lm.evals.classification.PromptClassification']}, "  # noqa: E501
            "the evals of this configuration that ask by templates"
        )
    with config.unlocked():
        config.evals = {name: config.evals[name]}
        config.evals[name].update(dict(temperature_examples=examples, priors=(), max_documents=1))
    experiment = build.build(config, devices, training=False)
    source = epath.Path(config.init_from).expanduser() if config.init_from else workdir
    with jax.set_mesh(experiment.mesh):
        task = experiment.make_evaluators()[name]
        assert isinstance(task, classification.PromptClassification)
        params, step = weights.load_weights(experiment, source, averaged=True)
        logging.info("%s, step %d: %d prompts", source, step, examples)
        q, way, tokenizer = task.questions, task.questions.ways[0], experiment.tokenizer
        if missing := [label for k, label in enumerate(q.labels) if k not in q.held_gold]:
            raise ValueError(
                f"--examples={examples}: none of them has the label {missing[0]!r}; take more"
            )
        states = task.predict_fns.states(params, [tree.prompt for tree in way.held])
        rows = task.predict_fns.head_rows(params, np.arange(tokenizer.vocab_size))
    logits = (states @ rows.T).astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = candidates(tokenizer, tokenizer.vocab_size)
    if not ids:
        raise ValueError(
            "the tokenizer has no token that is a whole word: there is nothing to suggest"
        )
    first = [
        [token for (k, _), token in zip(way.words, way.first_tokens()) if k == label]
        for label in range(len(q.labels))
    ]
    found = {
        "likelihood ratio": likelihood_ratio(logprobs[:, ids], q.held_gold, len(q.labels)),
        "nearest": nearest(rows, first)[:, ids],
    }
    best = lambda scores: [
        tokenizer.decode([*tokenizer.encode("a"), ids[i]])[1:] for i in np.argsort(-scores)[:count]
    ]
    return {
        label: {kind: best(scores[k]) for kind, scores in found.items()}
        for k, label in enumerate(q.labels)
    }


def main(argv: list[str]) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("absl").setLevel(logging.WARNING)
    if len(argv) > 1:
        raise app.UsageError(
            f"unexpected arguments {argv[1:]}; overrides are written --config.KEY=VALUE"
        )
    config = command_line.CONFIG.value
    try:
        devices = startup.start(config.platform)
        found = suggest(
            config,
            epath.Path(os.path.expanduser(_WORKDIR.value)),
            devices,
            _EVAL.value,
            _EXAMPLES.value,
            _WORDS.value,
        )
    except (ValueError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    for label, kinds in found.items():
        print(label)
        for kind, words in kinds.items():
            print(f"  {kind}: {', '.join(map(repr, words))}")
    return 0


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string(
        "workdir", None, "Run directory whose newest checkpoint is asked (or config.init_from)."
    )
    _EVAL = flags.DEFINE_string(
        "eval",
        None,
        "The entry of config.evals whose prompts are asked, and whose words are the beginning.",
    )
    _EXAMPLES = flags.DEFINE_integer(
        "examples",
        64,
        "Records of the eval's shots_split that are asked about, as many of each label.",
    )
    _WORDS = flags.DEFINE_integer("words", 10, "How many words to print for each label.")
    flags.mark_flags_as_required(["config", "workdir", "eval"])
    app.run(main, flags_parser=command_line.parse)
