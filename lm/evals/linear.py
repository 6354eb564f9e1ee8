"""A linear verbalizer: instead of words, a vector for each label, trained on the model's states
after prompts while the model stays as it is.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from lm.data.pack import Encoder
from lm.evals import classification, prompts
from lm.evals.predict import Artifact, PredictFns
from lm.evals.scores import calibration

INITS = ("label_words", "prototype")
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 5


def fit(states: np.ndarray, gold: np.ndarray, init: np.ndarray, l2: float) -> np.ndarray:
    """[K, D + 1] vectors and biases with the lowest mean NLL of softmax(states @ vectors.T +
    biases) plus l2 / 2 times the squared distance from `init`, which is where few examples leave
    them.
    """
    from scipy.optimize import minimize

    X, Y = np.hstack([states, np.ones((len(states), 1))]), np.eye(len(init))[gold]

    def loss(flat):
        W = flat.reshape(init.shape)
        P, off = calibration.softmax(X @ W.T), W - init
        return calibration.nll(P, gold) + l2 / 2 * np.sum(off**2), (
            (P - Y).T @ X / len(X) + l2 * off
        ).ravel()

    return minimize(
        loss, init.ravel(), jac=True, method="L-BFGS-B", options=dict(maxiter=500)
    ).x.reshape(init.shape)


def choose_penalty(states: np.ndarray, gold: np.ndarray, init: np.ndarray) -> float:
    """The one of `PENALTIES` with the lowest NLL on what is left out, in turns."""
    fold = np.random.default_rng(0).permutation(len(gold)) % FOLDS
    distribution = lambda W, X: calibration.softmax(X @ W[:, :-1].T + W[:, -1])

    def left_out(l2):
        return np.mean(
            [
                calibration.nll(
                    distribution(
                        fit(states[fold != k], gold[fold != k], init, l2), states[fold == k]
                    ),
                    gold[fold == k],
                )
                for k in range(FOLDS)
            ]
        )

    return min(PENALTIES, key=left_out)


class LinearVerbalizer:
    """Trains a vector for each label on `train_examples` records of shots_split (balanced), and
    yields what `classification.PromptClassification` does of label distributions, and train_accuracy and l2. States
    are scaled to a mean square of 1.

    This is multinomial logistic regression on the state that the head would see; started at the
    head's rows of the label words (each word's first token) it is WARP's verbalizer (Hambardzumyan
    et al. 2021, arXiv 2101.00121) and OpenPrompt's SoftVerbalizer, at the labels' mean states a
    prototypical one.

    Args:
      init: label_words | prototype.
      l2: penalty on the distance from there; 0: chosen by 5-fold cross-validation.
      task: those of `classification.PromptClassification`; one template, verbalizer and seed.
    """

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        encoder: Encoder,
        train_examples: int,
        init: str,
        l2: float,
        verbalizer: Mapping,
        **task,
    ):
        if init not in INITS or l2 < 0:
            raise ValueError(
                f"config.evals.{name}: init = {init!r}, l2 = {l2}; wanted one of {list(INITS)}, "
                "and 0 or above"
            )
        prompts.check_counts(name, train_examples=train_examples)
        # words only are where the vectors start
        scored = dict(terminator="", aggregate="sum", length_norm="none", weights=())
        self._task = classification.PromptClassification(
            predict_fns,
            name=name,
            encoder=encoder,
            verbalizer={**verbalizer, **scored},
            priors=(),
            ensemble="mean_prob",
            temperature_examples=train_examples,
            **task,
        )
        self._questions, self.about = self._task.questions, self._task.about
        if len(self._questions.ways) != 1:
            raise ValueError(
                f"config.evals.{name}: a linear verbalizer is trained for one template, "
                f"verbalizer and seed, not {len(self._questions.ways)}"
            )
        if train_examples < 2 * FOLDS or len(set(self._questions.held_gold)) < 2:
            raise ValueError(
                f"config.evals.{name}.train_examples = {train_examples}; wanted {2 * FOLDS} or "
                "more, of two labels or more"
            )
        self._predict_fns, self._init, self._l2 = predict_fns, init, l2

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        q, (way,) = self._questions, self._questions.ways
        states = self._predict_fns.states(
            params, [tree.prompt for tree in (*way.held, *way.trees)]
        ).astype(np.float64)
        if not np.isfinite(states).all():
            raise ValueError(
                f"the eval {q.name!r}: the model's states are not finite; its weights or "
                "activations are broken"
            )
        scale = np.sqrt(np.mean(states[: len(way.held)] ** 2))
        states /= scale
        train, test = states[: len(way.held)], states[len(way.held) :]
        if self._init == "label_words":
            vectors = self._label_words(params, scale)
            init = np.hstack([vectors, np.zeros((len(vectors), 1))])
        else:
            init = prototypes(train, q.held_gold, len(q.labels))
        l2 = self._l2 or choose_penalty(train, q.held_gold, init)
        W = fit(train, q.held_gold, init, l2)
        distribution = lambda X: calibration.softmax(X @ W[:, :-1].T + W[:, -1])
        P = distribution(test)
        yield from classification.label_metrics(P, q.gold)
        yield "train_accuracy", float(np.mean(distribution(train).argmax(axis=1) == q.held_gold))
        yield "l2", l2
        yield "examples", len(q.gold)
        yield "cut", q.cut
        yield from classification.files(q, P, [{}] * len(q.gold))

    def _label_words(self, params, scale: float) -> np.ndarray:
        """[K, D], the mean over a label's words of the head's row of the word's first token after a
        prompt.
        """
        words = self._questions.ways[0].words
        rows = self._predict_fns.head_rows(params, self._questions.ways[0].first_tokens()) * scale
        return np.stack(
            [
                rows[[k == label for k, _ in words]].mean(axis=0)
                for label in range(len(self._questions.labels))
            ]
        )


def prototypes(states: np.ndarray, gold: np.ndarray, num_labels: int) -> np.ndarray:
    """[K, D + 1] for which logits are minus half the mean square of a state's distance from each
    label's mean state (that of all, for a label that has none), but for what all labels share.
    """
    means = np.stack(
        [
            states[gold == k].mean(axis=0) if (gold == k).any() else states.mean(axis=0)
            for k in range(num_labels)
        ]
    )
    return np.hstack([means, -np.sum(means**2, axis=1, keepdims=True) / 2]) / states.shape[1]
