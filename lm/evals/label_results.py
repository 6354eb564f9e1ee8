"""Results of asking for labels: the model's log-probabilities, metrics, files and pictures.

The evaluators in classification.py make the prompts. A *variant* is one way to ask: a template, a
verbalizer, and examples in an order. With several variants the label distributions are averaged.

Letters in shapes: n examples, K labels. P is a distribution over labels, [n, K].
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.evals.predict import (
    Answer,
    Artifact,
    PredictFns,
    Question,
    ShownPrompt,
    predictions_artifact,
)
from lm.evals.scores import calibration, statistics
from lm.evals.scores.label_scores import (
    LabelScorer,
    LabelWord,
    WordLogprobs,
    label_mass,
    pad_word_logprobs,
    word_scores,
)
from lm.reports import pictures

ENSEMBLES = ("mean_prob", "mean_logprob")


class Variant(NamedTuple):
    """What one variant asks. The label words are the continuations of each question."""

    name: str
    words: list[LabelWord]
    questions: list[Question]  # one for each example
    prior_questions: dict[str, list[Question]]  # prior -> those whose mean distribution it is
    # about other records with known labels: they fit the temperature, train `LinearVerbalizer`, or
    # are what lm.suggest asks about
    calibration_questions: list[Question]
    num_cut: list[int]  # for each example, how many tokens its prompt lost at its beginning
    asked: dict  # see `lm.evals.prompts.describe`

    def word_tokens(
        self, labels: Sequence[str], decode: Callable[[list[int]], str]
    ) -> dict[str, dict[str, list[str]]]:
        """Label -> word -> the texts of its tokens after the first prompt."""
        tokens: dict[str, dict[str, list[str]]] = {label: {} for label in labels}
        for word, ids in zip(self.words, self.questions[0].continuations):
            tokens[labels[word.label]][word.text] = [decode([i]) for i in ids]
        return tokens

    def first_tokens(self) -> list[int]:
        """The id of each word's first token after the first prompt."""
        return [ids[0] for ids in self.questions[0].continuations]


class PromptSet(NamedTuple):
    """All that an eval asks the model, with the right answers."""

    name: str  # the eval's, for files and messages
    labels: list[str]
    example_names: list[str]
    texts: list[list[str]]  # for each template, the text of each example without what is before
    gold: np.ndarray  # [n], index of the right label
    variants: list[Variant]
    calibration_gold: np.ndarray  # index of the right label of each calibration example

    @property
    def num_truncated(self) -> int:
        """How many examples lost the beginning of their prompt in any variant."""
        num_cut = np.array([variant.num_cut for variant in self.variants])
        return int(num_cut.any(axis=0).sum())

    def shown_prompts(self, count: int, spell: Callable[[list[int]], str]) -> Iterator[ShownPrompt]:
        """Yields the first `count` prompts of each variant, as the model sees them."""
        for variant in self.variants:
            for i in range(min(count, len(self.gold))):
                ids = variant.questions[i].prompt.ids.tolist()
                right = [word.text for word in variant.words if word.label == self.gold[i]]
                title = f"{self.example_names[i]}, {len(ids)} tokens, {variant.num_cut[i]} cut off"
                if variant.name:
                    title += f"; {variant.name}"
                yield ShownPrompt(title, spell(ids), " | ".join(right))


class VariantLogprobs(NamedTuple):
    """The log-probabilities of the label words after the prompts of a variant."""

    examples: WordLogprobs
    priors: dict[str, WordLogprobs]
    calibration: WordLogprobs | None  # None without calibration examples


def score_prompts(predict_fns: PredictFns, params, prompt_set: PromptSet) -> list[VariantLogprobs]:
    """The model's log-probabilities for each variant."""
    # All variants in one call: what their prompts share is computed once.
    questions: list[Question] = []
    for variant in prompt_set.variants:
        questions += variant.questions
        for prior_questions in variant.prior_questions.values():
            questions += prior_questions
        questions += variant.calibration_questions
    has_text_behind = any(question.prompt.arrays for question in questions)
    ask = predict_fns.infill if has_text_behind else predict_fns.logprobs
    answers = iter(ask(params, questions))

    # Taken off again in the order of `questions`.
    variant_logprobs = []
    for variant in prompt_set.variants:
        words = variant.words
        examples = _next_logprobs(answers, len(variant.questions), words)
        priors = {}
        for prior, prior_questions in variant.prior_questions.items():
            priors[prior] = _next_logprobs(answers, len(prior_questions), words)
        calibration_logprobs = None
        if variant.calibration_questions:
            num_questions = len(variant.calibration_questions)
            calibration_logprobs = _next_logprobs(answers, num_questions, words)
        variant_logprobs.append(VariantLogprobs(examples, priors, calibration_logprobs))
    return variant_logprobs


def _next_logprobs(
    answers: Iterator[Sequence[Answer]], num_questions: int, words: Sequence[LabelWord]
) -> WordLogprobs:
    """Takes the log-probabilities of so many questions off the model's answers."""
    word_logprobs = []
    for word_answers in itertools.islice(answers, num_questions):
        word_logprobs.append([answer.logprobs for answer in word_answers])
    return pad_word_logprobs(word_logprobs, words)


def results(
    prompt_set: PromptSet,
    variant_logprobs: Sequence[VariantLogprobs],
    scorer: LabelScorer,
    *,
    ensemble: str = "mean_prob",
    batch_prior: bool = True,
    by_length: bool = False,
) -> Iterator[tuple[str, float | Artifact]]:
    """Yields all metrics and artifacts, see `lm.evals.classification.PromptClassification`.

    Args:
      ensemble: one of ENSEMBLES.
      batch_prior: whether to correct by the mean distribution too.
      by_length: whether probabilities are conditional on the number of a word's tokens.

    Raises:
      ValueError: log-probabilities that aren't finite.
    """
    _check_finite(prompt_set.name, variant_logprobs)
    gold = prompt_set.gold

    # The label distributions: one for each variant, and their mean, which all metrics are about.
    variant_P = []
    masses = []
    for logprobs in variant_logprobs:
        variant_P.append(scorer.distributions(logprobs.examples))
        masses.append(label_mass(logprobs.examples))
    P = ensemble_mean(variant_P, ensemble)
    mass = np.mean(masses, axis=0)
    yield from label_metrics(P, gold)
    yield "label_mass", float(np.mean(mass))
    if by_length:
        yield from mass_by_length(variant_logprobs)

    # Prior correction: what the prompt says beyond the label's own probability.
    priors = mean_priors(variant_logprobs, scorer)
    if "content_free" in priors:
        # The accuracy of always giving the label that the model prefers without a text.
        preferred = statistics.prediction_shares(np.mean(priors["content_free"], axis=0))
        yield "content_free_accuracy", float(np.mean(preferred[gold]))
    if batch_prior:
        priors["batch"] = [calibration.batch_prior(distribution) for distribution in variant_P]
    yield from prior_metrics(variant_P, priors, gold, ensemble)

    # Temperature scaling.
    if len(prompt_set.calibration_gold):
        distributions = []
        for logprobs in variant_logprobs:
            distributions.append(scorer.distributions(logprobs.calibration))
        calibration_P = ensemble_mean(distributions, ensemble)
        yield from temperature_metrics(P, gold, calibration_P, prompt_set.calibration_gold)

    # How much the variant matters.
    if len(variant_P) > 1:
        yield from variant_metrics(prompt_set, variant_P, masses)

    yield "examples", len(gold)
    yield "cut", prompt_set.num_truncated
    yield "priors", priors_artifact(prompt_set, variant_logprobs)
    details = word_details(prompt_set, variant_logprobs, mass)
    lines = prediction_lines(prompt_set, P, details)
    yield "predictions", predictions_artifact(prompt_set.name, lines)
    yield from picture_artifacts(prompt_set, P)


# What `label_metrics` yields by which models are compared.
LABEL_METRICS = (
    "accuracy",
    "nll",
    "macro_f1",
    "micro_f1",
    "weighted_f1",
    "balanced_accuracy",
    "mcc",
    "kappa",
    "brier",
    "ece",
    "ece_equal_mass",
    "classwise_ece",
    "auroc",
    "auroc_ovo",
    "confidence_auroc",
    "selective_accuracy",
)


def metric_names(prompt_set: PromptSet, *, batch_prior: bool = True) -> list[str]:
    """What `results` yields by which models are compared."""
    names = [*LABEL_METRICS, "label_mass"]
    corrections = list(prompt_set.variants[0].prior_questions) + ["batch"] * batch_prior
    for correction in corrections:
        names += [f"{metric}_{correction}" for metric in ("accuracy", "nll", "ece")]
    if len(prompt_set.calibration_gold):
        names += ["nll_temperature", "ece_temperature"]
    if len(prompt_set.variants) > 1:
        names += [f"accuracy_{over}" for over in ("mean", "min", "max")]
    return names


def mass_by_length(variant_logprobs: Sequence[VariantLogprobs]) -> Iterator[tuple[str, float]]:
    """Yields label_mass_N of the words of N tokens, where words have several lengths."""
    examples = [logprobs.examples for logprobs in variant_logprobs]
    lengths = sorted(set().union(*(np.unique(words.num_tokens).tolist() for words in examples)))
    for length in lengths if len(lengths) > 1 else ():
        masses = [label_mass(words, length) for words in examples]
        yield f"label_mass_{length}", float(np.mean(masses))


def _check_finite(name: str, variant_logprobs: Sequence[VariantLogprobs]) -> None:
    """Raises ValueError if an example has a log-probability that isn't finite."""
    for logprobs in variant_logprobs:
        finite = np.isfinite(word_scores(logprobs.examples)).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"the eval {name!r}: the model's log-probabilities of label words are not finite "
                f"for {int((~finite).sum())} of {len(finite)} examples; its weights or "
                "activations are broken"
            )


# Metrics


def ensemble_mean(distributions: Sequence[np.ndarray], ensemble: str) -> np.ndarray:
    """The mean of several distributions [n, K] ("mean_prob"), or the distribution of their mean
    log-probabilities ("mean_logprob").
    """
    if ensemble == "mean_prob":
        return np.mean(distributions, axis=0)
    return calibration.softmax(np.mean(_log(distributions), axis=0))


def _log(P) -> np.ndarray:
    """Logarithms that are finite where a probability has underflowed to 0."""
    return np.log(np.maximum(P, calibration.TINY))


def label_metrics(P: np.ndarray, gold: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yields the metrics of label distributions [n, K], given the right labels [n]. Labels that tie
    for the highest probability share the prediction.
    """
    n = len(P)
    shares = statistics.prediction_shares(P)
    num_right = float(statistics.credit(P, gold).sum())
    low, high = statistics.proportion_interval(round(num_right), n)
    yield "accuracy", num_right / n
    yield "accuracy_low", low
    yield "accuracy_high", high
    yield "majority_accuracy", int(np.bincount(gold).max()) / n

    matrix = statistics.confusion(shares, gold)
    yield from statistics.prediction_scores(matrix).items()

    def macro_f1(sample: np.ndarray) -> float:
        matrix = statistics.confusion(shares[sample], gold[sample])
        return statistics.prediction_scores(matrix)["macro_f1"]

    # F1 is not a mean over examples, so that its interval comes from resampling.
    low, high = statistics.bootstrap_interval(macro_f1, n)
    yield "macro_f1_low", low
    yield "macro_f1_high", high

    # How far the probabilities can be trusted.
    yield "nll", calibration.nll(P, gold)
    yield "brier", calibration.brier(P, gold)
    yield "ece", calibration.ece(P, gold)
    yield "ece_equal_mass", calibration.ece(P, gold, equal="mass")
    yield "classwise_ece", calibration.classwise_ece(P, gold)

    # These compare examples of two labels, or right predictions with wrong ones: where the data has
    # only one of them, they are not defined and left out.
    areas = {
        "auroc": calibration.auroc(P, gold),
        "auroc_ovo": calibration.auroc_ovo(P, gold),
        "confidence_auroc": calibration.confidence_auroc(P, gold),
    }
    for name, value in areas.items():
        if value is not None:
            yield name, value
    _, accuracies = calibration.selective_accuracy(P, gold)
    yield "selective_accuracy", float(np.mean(accuracies))


def mean_priors(
    variant_logprobs: Sequence[VariantLogprobs], scorer: LabelScorer
) -> dict[str, list[np.ndarray]]:
    """Prior -> for each variant the mean distribution [K] after the prompts of that prior."""
    priors = {}
    for prior in variant_logprobs[0].priors:
        means = []
        for logprobs in variant_logprobs:
            means.append(scorer.distributions(logprobs.priors[prior]).mean(axis=0))
        priors[prior] = means
    return priors


def prior_metrics(
    variant_P: Sequence[np.ndarray],
    priors: Mapping[str, Sequence[np.ndarray]],
    gold: np.ndarray,
    ensemble: str,
) -> Iterator[tuple[str, float]]:
    """Yields metrics after each prior correction. Each variant has priors [K] of its own."""
    for name, variant_priors in priors.items():
        corrected = []
        for P, prior in zip(variant_P, variant_priors):
            corrected.append(calibration.divide_by_prior(P, prior))
        corrected_P = ensemble_mean(corrected, ensemble)

        yield f"accuracy_{name}", float(np.mean(statistics.credit(corrected_P, gold)))
        yield f"nll_{name}", calibration.nll(corrected_P, gold)
        yield f"ece_{name}", calibration.ece(corrected_P, gold)


def temperature_metrics(
    P: np.ndarray, gold: np.ndarray, calibration_P: np.ndarray, calibration_gold: np.ndarray
) -> Iterator[tuple[str, float]]:
    """Yields metrics after temperature scaling, fitted on other examples than those evaluated. No
    prediction changes.
    """
    temperature = calibration.best_temperature(_log(calibration_P), calibration_gold)
    scaled_P = calibration.softmax(_log(P) / temperature)
    yield "temperature", temperature
    yield "nll_temperature", calibration.nll(scaled_P, gold)
    yield "ece_temperature", calibration.ece(scaled_P, gold)


def variant_metrics(
    prompt_set: PromptSet, variant_P: Sequence[np.ndarray], masses: Sequence[np.ndarray]
) -> Iterator[tuple[str, float | Artifact]]:
    """Yields statistics of the accuracy over variants, and a table of the variants.

    Args:
      masses: for each variant, the label mass of each example.
    """
    gold = prompt_set.gold
    table = []
    for variant, P, mass in zip(prompt_set.variants, variant_P, masses):
        row = {
            # The key's name is older than "variant", and files have it.
            "way": variant.name,
            "accuracy": float(np.mean(statistics.credit(P, gold))),
            "nll": calibration.nll(P, gold),
            "label_mass": float(np.mean(mass)),
        }
        table.append(row)

    accuracies = [row["accuracy"] for row in table]
    yield "ways", len(table)
    yield "accuracy_mean", float(np.mean(accuracies))
    yield "accuracy_min", min(accuracies)
    yield "accuracy_max", max(accuracies)
    yield "accuracy_spread", float(np.std(accuracies, ddof=1))

    path = f"predictions/{prompt_set.name}-ways-{{step}}.json"
    yield "ways_table", Artifact(path, json.dumps(table, indent=1) + "\n")


# Files and pictures


def priors_artifact(prompt_set: PromptSet, variant_logprobs: Sequence[VariantLogprobs]) -> Artifact:
    """For each variant and prior, the log-probabilities of the words after each of its prompts."""
    rows = []
    for variant, logprobs in zip(prompt_set.variants, variant_logprobs):
        row: dict[str, list[dict]] = {}
        for prior, prior_logprobs in logprobs.priors.items():
            row[prior] = []
            for i in range(len(prior_logprobs.tokens)):
                by_label = logprobs_by_label(prompt_set.labels, variant.words, prior_logprobs, i)
                row[prior].append(by_label)
        rows.append(row)
    return Artifact(f"predictions/{prompt_set.name}-priors-{{step}}.json", json.dumps(rows) + "\n")


def word_details(
    prompt_set: PromptSet, variant_logprobs: Sequence[VariantLogprobs], mass: np.ndarray
) -> list[dict]:
    """For each example, its label mass and the log-probabilities that all its scores come from."""
    details = []
    for i, example_mass in enumerate(mass):
        by_variant = []
        for variant, logprobs in zip(prompt_set.variants, variant_logprobs):
            by_label = logprobs_by_label(prompt_set.labels, variant.words, logprobs.examples, i)
            by_variant.append(by_label)
        details.append({"label_mass": float(example_mass), "word_logprobs": by_variant})
    return details


def logprobs_by_label(
    labels: Sequence[str], words: Sequence[LabelWord], logprobs: WordLogprobs, i: int
) -> dict[str, dict[str, list[float]]]:
    """Label -> word -> the log-probability of each of its tokens after prompt i."""
    by_label: dict[str, dict[str, list[float]]] = {label: {} for label in labels}
    for j, word in enumerate(words):
        # Without the padding behind shorter words.
        tokens = logprobs.tokens[i, j, : logprobs.num_tokens[i, j]]
        by_label[labels[word.label]][word.text] = np.round(tokens, 6).tolist()
    return by_label


def prediction_lines(
    prompt_set: PromptSet, P: np.ndarray, details: Sequence[dict] | None = None
) -> list[dict]:
    """A line for each example: its label, prediction, label distribution and prompts.

    Args:
      details: more keys for the line of each example.
    """
    labels = prompt_set.labels
    lines = []
    for i, name in enumerate(prompt_set.example_names):
        line = {
            "name": name,
            "label": labels[prompt_set.gold[i]],
            "prediction": labels[P[i].argmax()],
            "distribution": dict(zip(labels, P[i].tolist())),
        }
        if details:
            line |= details[i]
        # Of each template, and of each variant.
        line["prompts"] = [texts[i] for texts in prompt_set.texts]
        line["cut"] = [variant.num_cut[i] for variant in prompt_set.variants]
        lines.append(line)
    return lines


def picture_artifacts(prompt_set: PromptSet, P: np.ndarray) -> Iterator[tuple[str, Artifact]]:
    """Yields the confusion matrix, and the reliability diagram with the distribution of labels."""
    name = prompt_set.name
    gold = prompt_set.gold
    labels = prompt_set.labels

    matrix = statistics.confusion(statistics.prediction_shares(P), gold)
    title = f"{name}: accuracy {np.mean(statistics.credit(P, gold)):.1%}"
    picture = pictures.plot_confusion(matrix, labels, title)
    yield "confusion", Artifact(f"confusion-{name}.png", picture)

    picture = pictures.plot_reliability(P, gold, labels, name)
    yield "reliability", Artifact(f"reliability-{name}.png", picture)


def read_word_logprobs(
    lines: Sequence[Mapping], variant: int = 0
) -> tuple[list[str], WordLogprobs]:
    """Reads log-probabilities back from the lines of predictions/, for scores by another aggregate,
    norm or word weights without the model.

    Args:
      variant: which of the variants, by its number.

    Returns:
      (labels, log-probabilities of the words)
    """
    by_label = lines[0]["word_logprobs"][variant]
    labels = list(by_label)
    words = []
    for k, label in enumerate(labels):
        for text in by_label[label]:
            words.append(LabelWord(k, text))

    logprobs = []
    for line in lines:
        by_label = line["word_logprobs"][variant]
        logprobs.append([np.asarray(by_label[labels[word.label]][word.text]) for word in words])
    return labels, pad_word_logprobs(logprobs, words)
