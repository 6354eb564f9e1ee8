"""Suggests label words for a verbalizer:

    python -m lm.suggest --config=configs/mine.py --workdir=RUN --eval=NAME

NAME is an entry of config.evals made by `lm.evals.entries.task`, with label words to begin with.
Prints two lists of words for each label. The first has the words that a checkpoint holds likely
after prompts of that label and not after others. The second has the words whose rows of the head
are nearest to those of the label's present words.

Letters in shapes: P prompts, V vocabulary, D size of a state, K labels.
"""

import logging
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from etils import epath

from lm import build, command_line, escape, files, startup, weights
from lm.evals import classification

PROMPT_EVAL = "lm.evals.classification.PromptClassification"


def suggest(
    config, workdir: epath.Path, devices, name: str, num_prompts: int, num_words: int
) -> dict[str, dict[str, list[str]]]:
    """Suggests label words for the entry config.evals.NAME.

    Args:
      workdir: the run whose newest checkpoint is asked, unless there is config.init_from.
      num_prompts: how many records of the eval's shots_split to ask about (--examples).
      num_words: how many words to suggest for each label.

    Returns:
      label -> {"likelihood ratio": words, "nearest": words}, the best first

    Raises:
      ValueError: no such eval; a label without prompts; a tokenizer without whole words; a model
        without states and head; see `lm.evals.classification.PromptClassification`.
    """
    config = build.apply_hf_config(config, training=False)
    config = single_eval(config, name, num_prompts)
    source = weights.source_of(config, workdir)
    experiment = build.build(config, devices, training=False)

    # All that needs the model: states after the prompts, and rows of the head.
    with jax.set_mesh(experiment.program.mesh):
        task = experiment.make_evaluators()[name]
        assert isinstance(task, classification.PromptClassification)
        task.predict_fns.require(("states", "head_rows"), "lm.suggest")
        params, step = weights.load_weights(experiment, source, averaged=True)
        logging.info("%s, step %d: %d prompts", source, step, num_prompts)

        labels = task.prompt_set.labels
        gold = task.prompt_set.calibration_gold
        variant = task.prompt_set.variants[0]
        for k, label in enumerate(labels):
            if k not in gold:
                raise ValueError(
                    f"--examples={num_prompts}: none of them has the label {label!r}; take more"
                )
        questions = variant.calibration_questions
        prompts = [question.prompt for question in questions]
        states_PD = task.predict_fns.states(params, prompts, questions[0].fill)
        rows_VD = task.predict_fns.head_rows(params, np.arange(experiment.tokenizer.vocab_size))

    # What the head would do with these states.
    logits_PV = (states_PD @ rows_VD.T).astype(np.float64)
    logprobs_PV = logits_PV - np.logaddexp.reduce(logits_PV, axis=1, keepdims=True)

    words = candidates(experiment.tokenizer, experiment.tokenizer.vocab_size)
    if not words:
        raise ValueError(
            "the tokenizer has no token that is a whole word: there is nothing to suggest"
        )
    ids = list(words)

    present_ids: list[list[int]] = [[] for _ in labels]
    # The head's row of a word is that of its first token, which is what follows a prompt.
    for word, token in zip(variant.words, variant.first_tokens()):
        present_ids[word.label].append(token)

    scores = {
        "likelihood ratio": likelihood_ratio(logprobs_PV[:, ids], gold, len(labels)),
        "nearest": nearest(rows_VD, present_ids)[:, ids],
    }
    suggestions = {}
    for k, label in enumerate(labels):
        suggestions[label] = {}
        for method, scores_KV in scores.items():
            best = np.argsort(-scores_KV[k])[:num_words]
            suggestions[label][method] = [words[ids[i]] for i in best]
    return suggestions


def single_eval(config, name: str, num_prompts: int):
    """The configuration with a single eval, made cheap but for the records that are asked about.

    Raises:
      ValueError: config.evals has no such entry, or it doesn't ask by templates.
    """
    valid = [key for key, entry in config.evals.items() if entry.type == PROMPT_EVAL]
    if name not in valid:
        raise ValueError(
            f"--eval={name}: wanted one of {valid}, the evals of this configuration that ask by "
            "templates"
        )

    with config.unlocked():
        config.evals = {name: config.evals[name]}
        # Records that a temperature would be fitted on are drawn from shots_split, as many of each
        # label, and none that is evaluated: these are the prompts wanted here.
        config.evals[name].temperature_examples = num_prompts
        config.evals[name].examples_key = "--examples"
        config.evals[name].priors = ()
        config.evals[name].max_documents = 1
    return config


def candidates(tokenizer, vocab_size: int) -> dict[int, str]:
    """Id -> text of the single tokens that are whole words: a space, then two letters or more."""
    # Decoded after another token: some tokenizers drop the space at the beginning of a text.
    anchor = tokenizer.encode("a")
    words = {}
    for i in range(vocab_size):
        text = tokenizer.decode([*anchor, i]).removeprefix("a")
        if len(text) > 2 and text[0] == " " and text[1:].isalpha():
            words[i] = text
    return words


def likelihood_ratio(
    logprobs: np.ndarray, gold: np.ndarray, num_labels: int, num_likely: int = 1000
) -> np.ndarray:
    """PETAL's score of each word for each label (Schick, Schmid and Schuetze 2020, arXiv
    2010.13641, section 4): its log odds after prompts of the label, less its log odds after others,
    where the label's prompts weigh as much as all others together.

    Args:
      logprobs: [prompts, V], log-probabilities after each prompt.
      gold: [prompts], index of the right label.
      num_likely: how many words are considered for a label, those that are likeliest after its
        prompts.

    Returns:
      [K, V]; -inf for words that are not considered
    """
    likely_KV = np.stack([logprobs[gold == k].sum(axis=0) for k in range(num_labels)])
    last = min(num_likely, likely_KV.shape[1]) - 1
    threshold_K1 = -np.sort(-likely_KV, axis=1)[:, last : last + 1]

    # log(p / (1 - p)), with p kept below 1.
    odds = logprobs - np.log1p(-np.minimum(np.exp(logprobs), 1 - 1e-7))
    scores = []
    for k in range(num_labels):
        positive = gold == k
        weight = (~positive).sum() / positive.sum()
        scores.append(odds[positive].sum(axis=0) * weight - odds[~positive].sum(axis=0))
    return np.where(likely_KV >= threshold_K1, np.stack(scores), -np.inf)


def nearest(rows: np.ndarray, word_rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Cosine of each token's row of the head with the mean row of each label's words.

    Args:
      rows: [V, D], of unequal lengths; they are compared as unit vectors.
      word_rows: for each label, the rows of its words' first tokens.

    Returns:
      [K, V]
    """
    units_VD = _unit(rows)
    cosines = []
    for indices in word_rows:
        mean_D = units_VD[list(indices)].mean(axis=0)
        cosines.append(units_VD @ _unit(mean_D))
    return np.stack(cosines)


def _unit(x: np.ndarray) -> np.ndarray:
    """Vectors [..., D], scaled to length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


@command_line.command
def main(argv: list[str]) -> None:
    command_line.no_arguments(argv)
    config = _CONFIG.value
    workdir = epath.Path(files.expand(_WORKDIR.value))
    devices = startup.start(config.platform)
    suggestions = suggest(config, workdir, devices, _EVAL.value, _EXAMPLES.value, _WORDS.value)

    for label, words_by_method in suggestions.items():
        print(escape.printable(label))
        for method, words in words_by_method.items():
            print(f"  {method}: {', '.join(map(repr, words))}")


if __name__ == "__main__":
    _CONFIG = command_line.config_flag()
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
