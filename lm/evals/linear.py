"""A linear verbalizer: a vector for each label in place of label words.

The vectors are trained on the model's states after prompts, the model stays as it is.

Letters in shapes: n examples, D size of a state, K labels.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from lm.data.pack import Encoder
from lm.evals import label_results, prompts
from lm.evals.classification import PromptClassification
from lm.evals.predict import Artifact, PredictFns, predictions_artifact
from lm.evals.scores import calibration, statistics

INITS = ("label_words", "prototype")
# Candidates for l2, from almost free vectors to vectors that stay close to their start.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5


class LinearVerbalizer:
    """Trains a vector for each label, and yields what they make of the evaluated records: the
    metrics of `label_results.label_metrics`, train_accuracy, l2, and files and pictures as
    `PromptClassification` has them.

    This is multinomial logistic regression on the state that the head would see. It starts at the
    head's rows of the label words (each word's first token), as WARP's verbalizer (Hambardzumyan et
    al. 2021, arXiv 2101.00121) and OpenPrompt's SoftVerbalizer do, or at the labels' mean states,
    as prototypical networks do. States are scaled to a mean square of 1.

    Args:
      name, source, prompt, label, max_documents: see `PromptClassification`; one template and seed.
      verbalizer: words, one verbalizer, and boundary.
      train_examples: how many records of shots_split to train on, as many of each label.
      init: label_words | prototype.
      l2: penalty on the distance from the start; 0: chosen by cross-validation.

    Raises:
      ValueError: an unknown choice, too few examples, several variants; see `PromptClassification`.
    """

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        encoder: Encoder,
        source: Mapping,
        prompt: Mapping,
        verbalizer: Mapping,
        label: str,
        max_documents: int,
        train_examples: int,
        init: str,
        l2: float,
    ):
        prompts.check_choice(name, "init", init, INITS)
        prompts.check_least(f"config.evals.{name}.l2", l2, 0)

        # The prompts are those of PromptClassification; the records that would fit its temperature
        # train the vectors.
        # How it would score words doesn't matter: they only say where the vectors start.
        scoring = dict(terminator="", aggregate="sum", length_norm="none", weights=())
        # An encoder-decoder has text behind a word only where it fills it in.
        is_blank = predict_fns.reads_sources and verbalizer["after"]
        scoring["fill"] = "infill" if is_blank else "ltr"
        task = PromptClassification(
            predict_fns,
            name=name,
            encoder=encoder,
            source=source,
            prompt=prompt,
            verbalizer={**verbalizer, **scoring},
            label=label,
            priors=(),
            ensemble="mean_prob",
            temperature_examples=train_examples,
            max_documents=max_documents,
            examples_key=f"config.evals.{name}.train_examples",
        )
        # No temperature is fitted.
        self.about = task.about | {"corrections": []}
        self.shown_prompts = task.shown_prompts
        self._prompt_set = task.prompt_set

        num_variants = len(self._prompt_set.variants)
        if num_variants != 1:
            raise ValueError(
                f"config.evals.{name}: a linear verbalizer is trained for one template, "
                f"verbalizer and seed, not {num_variants}"
            )
        # Two examples in each fold of the cross-validation.
        num_train_labels = len(set(self._prompt_set.calibration_gold))
        if train_examples < 2 * FOLDS or num_train_labels < 2:
            raise ValueError(
                f"config.evals.{name}.train_examples = {train_examples}; wanted {2 * FOLDS} or "
                "more, of two labels or more"
            )
        self._predict_fns = predict_fns
        self._init = init
        self._l2 = l2

    @property
    def asks(self) -> tuple[str, ...]:
        return ("states", "head_rows") if self._init == "label_words" else ("states",)

    metrics = (*label_results.LABEL_METRICS, "train_accuracy")

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        prompt_set = self._prompt_set
        gold = prompt_set.gold
        train_gold = prompt_set.calibration_gold
        train_states, states, scale = self._states(params)

        if self._init == "label_words":
            vectors_KD = self._label_word_rows(params, scale)
            biases_K1 = np.zeros((len(vectors_KD), 1))
            init = np.hstack([vectors_KD, biases_K1])
        else:
            init = prototypes(train_states, train_gold, len(prompt_set.labels))

        l2 = self._l2 or choose_penalty(train_states, train_gold, init)
        vectors = fit(train_states, train_gold, init, l2)
        train_P = distributions(vectors, train_states)
        P = distributions(vectors, states)

        yield from label_results.label_metrics(P, gold)
        yield "train_accuracy", float(np.mean(statistics.credit(train_P, train_gold)))
        yield "l2", l2
        yield "examples", len(gold)
        yield "cut", prompt_set.num_truncated
        lines = label_results.prediction_lines(prompt_set, P)
        yield "predictions", predictions_artifact(prompt_set.name, lines)
        yield from label_results.picture_artifacts(prompt_set, P)

    def _states(self, params) -> tuple[np.ndarray, np.ndarray, float]:
        """(states to train on [n, D], states to evaluate [n, D], what both were divided by)."""
        variant = self._prompt_set.variants[0]
        questions = [*variant.calibration_questions, *variant.questions]
        prompts_ = [question.prompt for question in questions]
        states = self._predict_fns.states(params, prompts_, questions[0].fill)
        states = states.astype(np.float64)
        if not np.isfinite(states).all():
            raise ValueError(
                f"the eval {self._prompt_set.name!r}: the model's states are not finite; its "
                "weights or activations are broken"
            )

        # The scale comes from the training states alone, and makes penalties comparable between
        # models.
        num_train = len(variant.calibration_questions)
        scale = np.sqrt(np.mean(states[:num_train] ** 2))
        states /= scale
        return states[:num_train], states[num_train:], scale

    def _label_word_rows(self, params, scale: float) -> np.ndarray:
        """[K, D]: for each label, the mean of the head's rows of its words' first tokens, scaled so
        that the logits of scaled states stay what they were.
        """
        variant = self._prompt_set.variants[0]
        rows_WD = self._predict_fns.head_rows(params, variant.first_tokens()) * scale
        labels_W = np.array([word.label for word in variant.words])
        num_labels = len(self._prompt_set.labels)
        return np.stack([rows_WD[labels_W == k].mean(axis=0) for k in range(num_labels)])


def distributions(vectors: np.ndarray, states: np.ndarray) -> np.ndarray:
    """Label distributions [n, K] of states [n, D], by vectors and biases [K, D + 1]."""
    return calibration.softmax(states @ vectors[:, :-1].T + vectors[:, -1])


def fit(states: np.ndarray, gold: np.ndarray, init: np.ndarray, l2: float) -> np.ndarray:
    """Fits the vectors and biases, [K, D + 1].

    They minimise the mean NLL of `distributions` plus l2 / 2 times their squared distance from
    `init`. Few examples leave them near `init`.

    Args:
      states: [n, D]
      gold: [n], index of the right label.
      init: [K, D + 1], where to start.
    """
    from scipy.optimize import minimize

    # A last feature that is always 1 makes the biases part of the vectors.
    features = np.hstack([states, np.ones((len(states), 1))])
    one_hot = np.eye(len(init))[gold]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        vectors = flat.reshape(init.shape)
        P = calibration.softmax(features @ vectors.T)
        distance = vectors - init
        loss = calibration.nll(P, gold) + l2 / 2 * np.sum(distance**2)
        gradient = (P - one_hot).T @ features / len(features) + l2 * distance
        return loss, gradient.ravel()

    result = minimize(
        loss_and_gradient, init.ravel(), jac=True, method="L-BFGS-B", options=dict(maxiter=500)
    )
    return result.x.reshape(init.shape)


def choose_penalty(states: np.ndarray, gold: np.ndarray, init: np.ndarray) -> float:
    """The one of PENALTIES with the lowest mean NLL in cross-validation."""
    fold = np.random.default_rng(0).permutation(len(gold)) % FOLDS
    mean_nll = {}
    for l2 in PENALTIES:
        nlls = []
        for k in range(FOLDS):
            train = fold != k
            held_out = fold == k
            vectors = fit(states[train], gold[train], init, l2)
            P = distributions(vectors, states[held_out])
            nlls.append(calibration.nll(P, gold[held_out]))
        mean_nll[l2] = np.mean(nlls)
    return min(PENALTIES, key=mean_nll.get)


def prototypes(states: np.ndarray, gold: np.ndarray, num_labels: int) -> np.ndarray:
    """Vectors and biases [K, D + 1] that classify by the nearest mean state.

    The logit of a label is minus half the mean square of the state's distance from the label's mean
    state, (2 x·m - m·m - x·x) / 2D, without x·x, which all labels share. A label without examples
    has the mean of all states.
    """
    means = []
    for k in range(num_labels):
        members = gold == k
        means.append(states[members].mean(axis=0) if members.any() else states.mean(axis=0))
    means_KD = np.stack(means)
    biases_K1 = -np.sum(means_KD**2, axis=1, keepdims=True) / 2
    return np.hstack([means_KD, biases_K1]) / states.shape[1]
