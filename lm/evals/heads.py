"""What a head beside the vocabulary's says of held-out texts (lm/data/labelled.py)."""

from collections.abc import Iterator

import numpy as np

from lm.data.labelled import LabelledTexts
from lm.data.pack import Encoder, numbered_rows
from lm.data.records import take
from lm.evals import label_results
from lm.evals.predict import Artifact, PredictFns, predictions_artifact
from lm.evals.prompts import check_least
from lm.evals.scores import calibration


class HeadOutputs:
    """Yields the metrics of a head's label distributions, those of label words
    (`lm.evals.label_results.label_metrics`); of scores mse, mae, and Pearson's and Spearman's
    correlation with the right ones.

    The predictions of classes are named, and their metrics are, as those of a task's label words.

    Args:
      name: names the artifacts.
      max_documents: number of texts, taken evenly out of the split; 0: all.

    Raises:
      ValueError: max_documents below 0.
    """

    asks = ("head_outputs",)
    examples = ("labelled",)

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        documents: LabelledTexts,
        encoder: Encoder,
        max_documents: int,
    ):
        check_least(f"config.evals.{name}.max_documents", max_documents, 0)
        self._units = list(take(documents, max_documents))
        self._name = name
        self._predict_fns = predict_fns
        self._labels = documents.labels
        self._kind = documents.label_kind
        self._rows = numbered_rows(self._units, predict_fns.length, parts=1)
        self.about = {"fingerprint": documents.fingerprint, "examples": len(self._units)}

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("mse", "pearson") if self._kind == "score" else label_results.LABEL_METRICS

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        outputs = self._predict_fns.head_outputs(params, self._rows)
        numbers, said, right = [], [], []
        for row, outputs_TK in zip(self._rows, outputs):
            places = row["weights"] > 0
            numbers += row["number"][places].tolist()
            said.append(outputs_TK[places])
            right += row["values"][places].tolist()

        # In the texts' order; words of a text stay in theirs.
        order = np.argsort(numbers, kind="stable")
        said_NK = np.concatenate(said)[order].astype(np.float64)
        right_N = np.asarray(right)[order]
        if self._kind == "score":
            yield from _score_metrics(said_NK[:, 0], right_N)
            lines = [dict(score=score, right=value) for score, value in zip(said_NK[:, 0], right_N)]
        else:
            P, gold = calibration.softmax(said_NK), right_N.astype(int)
            yield from label_results.label_metrics(P, gold)
            lines = []
            for p, label in zip(P, gold):
                distribution = dict(zip(self._labels, p.tolist()))
                lines.append(
                    dict(
                        label=self._labels[label],
                        prediction=self._labels[p.argmax()],
                        distribution=distribution,
                    )
                )
        yield "examples", len(self._units)
        named = []
        for number, line in zip(np.asarray(numbers)[order], lines, strict=True):
            named.append({"name": self._units[number].name, **line})
        yield "predictions", predictions_artifact(self._name, named)


def _score_metrics(said: np.ndarray, right: np.ndarray) -> Iterator[tuple[str, float]]:
    from scipy import stats  # a fifth of a second: only where used

    yield "mse", float(np.mean((said - right) ** 2))
    yield "mae", float(np.mean(np.abs(said - right)))
    # Of what doesn't vary there is no correlation.
    if np.ptp(said) > 0 and np.ptp(right) > 0:
        yield "pearson", float(stats.pearsonr(said, right).statistic)
        yield "spearman", float(stats.spearmanr(said, right).statistic)
