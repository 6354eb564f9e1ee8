"""Compares two models on the same examples: the predictions/ of two run directories, paired."""

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from lm import files
from lm.evals.scores import calibration, statistics
from lm.evals.scores.statistics import SampleScore

MIN_EXAMPLES = 10  # fewer can't be resampled


def newest_predictions(workdir: epath.Path) -> dict[str, tuple[int, epath.Path]]:
    """Eval -> (its newest step, the file of that step), in a run directory."""
    newest: dict[str, tuple[int, epath.Path]] = {}
    folder = workdir / "predictions"
    if not folder.exists():
        return newest

    for path in folder.iterdir():
        # NAME-STEP.jsonl; the folder holds files of other kinds too.
        name, _, step = path.name.removesuffix(".jsonl").rpartition("-")
        if not path.name.endswith(".jsonl") or not step.isdecimal():
            continue
        if name not in newest or int(step) >= newest[name][0]:
            newest[name] = int(step), path
    return dict(sorted(newest.items()))


def about_path(predictions: str) -> str:
    """The file that says of which records and prompts predictions are, beside the file of them,
    predictions/NAME-STEP.jsonl; "" for other files.
    """
    name, dash, step = predictions.removesuffix(".jsonl").rpartition("-")
    if not predictions.endswith(".jsonl") or not dash:
        return ""
    return f"{name}-about-{step}.json"


def compare(
    first: Sequence[Mapping], second: Sequence[Mapping], name: str = "the eval"
) -> dict[str, float]:
    """Compares the predictions of two models on the same examples.

    The scores are accuracy, where lines have predictions; macro_f1 and nll, where they have
    distributions over one label space; and what lines have as `scores`.

    Args:
      first, second: the lines of predictions/.
      name: the eval's, for messages.

    Returns:
      examples. For each SCORE: SCORE of the first model, SCORE_other of the second, and by the
      paired bootstrap SCORE_difference (first less second), its 95% interval SCORE_low to
      SCORE_high, and SCORE_p. With accuracy also McNemar's exact mcnemar_p, and
      smallest_difference: the smallest true difference of accuracies that a test on so many
      examples would show four times in five (left out where both models are right on the same
      ones).

    Raises:
      ValueError: not the same examples in the same order, too few of them, other labels, or
        scores that aren't finite.
    """
    _check_pairs(first, second, name)
    n = len(first)
    result: dict[str, float] = {"examples": n}

    # Tests of accuracy alone, which need no resampling.
    if "prediction" in first[0]:
        first_right = _credit(first)
        second_right = _credit(second)
        result["mcnemar_p"] = statistics.mcnemar_p(first_right, second_right)
        error = statistics.standard_error(first_right - second_right)
        if error > 0:
            result["smallest_difference"] = statistics.smallest_difference(error)

    # All scores by the paired bootstrap: both models on the same resampled examples.
    second_scores = _sample_scores(second)
    for score_name, first_score in _sample_scores(first).items():
        second_score = second_scores[score_name]
        difference = statistics.paired_bootstrap(first_score, second_score, n)
        if not math.isfinite(difference.value):
            raise ValueError(f"{name}: {score_name} of some examples is not finite")
        result |= {
            score_name: first_score(np.arange(n)),
            f"{score_name}_other": second_score(np.arange(n)),
            f"{score_name}_difference": difference.value,
            f"{score_name}_low": difference.low,
            f"{score_name}_high": difference.high,
            f"{score_name}_p": difference.p,
        }
    return result


def _check_pairs(first: Sequence[Mapping], second: Sequence[Mapping], name: str) -> None:
    """Raises ValueError for predictions that can't be paired, see `compare`."""
    if len(first) < MIN_EXAMPLES:
        raise ValueError(f"{name}: {len(first)} examples; wanted {MIN_EXAMPLES} or more")
    keys = ["name", "label", "references", "choices"]
    # The hash of a document of lm_eval; older predictions lack it.
    if "record" in first[0] and "record" in second[0]:
        keys.append("record")
    if _identities(first, keys) != _identities(second, keys):
        raise ValueError(
            f"{name}: the two runs were evaluated on other examples ({len(first)} and "
            f"{len(second)}); pairs need the same, in order"
        )
    if _has_label_space(first):
        labels = sorted(first[0]["distribution"])
        other_labels = sorted(second[0]["distribution"])
        if labels != other_labels:
            raise ValueError(
                f"{name}: the labels are {labels} in one run and {other_labels} in the other"
            )


def _identities(lines: Sequence[Mapping], keys: Sequence[str]) -> list[list]:
    """What lines say of their examples, and not of the model."""
    identities = []
    for line in lines:
        identities.append([line.get(key) for key in keys])
    return identities


def _has_label_space(lines: Sequence[Mapping]) -> bool:
    """Whether distributions are over the same labels for all examples. Those of multiple choice,
    which have scores beside them, are over each example's own choices.
    """
    return "distribution" in lines[0] and "scores" not in lines[0]


def _predicted(line: Mapping) -> dict[str, float]:
    """What a line predicts: label -> its share, 1 without ties."""
    prediction = line["prediction"]
    distribution = line.get("distribution", {})
    if prediction not in distribution:
        return {prediction: 1.0}
    tied = []
    for label, p in distribution.items():
        if math.isclose(p, distribution[prediction], rel_tol=statistics.TIE):
            tied.append(label)
    return dict.fromkeys(tied, 1 / len(tied))


def _credit(lines: Sequence[Mapping]) -> np.ndarray:
    """[n] f64, 1 where the prediction is the label; a share of it where labels tie."""
    return np.array([_predicted(line).get(line["label"], 0.0) for line in lines])


def _sample_scores(lines: Sequence[Mapping]) -> dict[str, SampleScore]:
    """A model's scores as functions of a sample of the examples."""
    scores = {}
    if "prediction" in lines[0]:
        scores["accuracy"] = _sample_mean(_credit(lines))
    if _has_label_space(lines):
        scores |= _label_scores(lines)
    for name in lines[0].get("scores", {}):
        values = np.array([line["scores"][name] for line in lines])
        scores[name] = _sample_mean(values)
    return scores


def _sample_mean(values: np.ndarray) -> SampleScore:
    def score(index: np.ndarray) -> float:
        return float(values[index].mean())

    return score


def _label_scores(lines: Sequence[Mapping]) -> dict[str, SampleScore]:
    """Scores of distributions over one label space."""
    # In an order that both models share.
    labels = sorted(lines[0]["distribution"])
    y = np.array([labels.index(line["label"]) for line in lines])
    P = np.zeros((len(lines), len(labels)))
    predicted = np.zeros_like(P)
    for i, line in enumerate(lines):
        shares = _predicted(line)
        P[i] = [line["distribution"][label] for label in labels]
        predicted[i] = [shares.get(label, 0.0) for label in labels]

    def macro_f1(index: np.ndarray) -> float:
        matrix = statistics.confusion(predicted[index], y[index])
        return statistics.prediction_scores(matrix)["macro_f1"]

    def nll(index: np.ndarray) -> float:
        return calibration.nll(P[index], y[index])

    return {"macro_f1": macro_f1, "nll": nll}


def compare_runs(workdir: epath.Path, other: epath.Path) -> dict[str, dict]:
    """Compares the newest predictions of each eval that has some in both run directories.

    Returns:
      Eval -> `compare` of them, with the steps that they are of (step, step_other), p_holm:
      McNemar's p, or the first score's where there is none, corrected for the number of evals, and
      differences, see `_differences`, where there are some.

    Raises:
      ValueError: no eval has predictions in both, or they are of other records; see `compare`.
    """
    newest = newest_predictions(workdir)
    newest_other = newest_predictions(other)
    names = [name for name in newest if name in newest_other]
    if not names:
        raise ValueError(
            f"no eval has predictions/ in both: {workdir} has {list(newest)}, {other} "
            f"{list(newest_other)}. Evaluate both (--mode=eval) with the same config.evals"
        )

    comparisons: dict[str, dict] = {}
    for name in names:
        # A single eval that is too small is an error, see `compare`.
        result = compare_eval(name, newest[name], newest_other[name], is_alone=len(names) == 1)
        if result:
            comparisons[name] = result

    # With many evals some differ by chance: their p-values are corrected for that.
    p_values = [main_p(result) for result in comparisons.values()]
    for result, p in zip(comparisons.values(), statistics.holm(p_values)):
        result["p_holm"] = p
    return comparisons


def compare_eval(
    name: str, newest: tuple[int, epath.Path], other: tuple[int, epath.Path], *, is_alone: bool
) -> dict:
    """Compares the predictions of an eval in two runs, each given by its step and its file.

    Args:
      is_alone: too few examples are an error, not a warning.

    Returns:
      See `compare_runs`, without p_holm; {} where there is nothing to pair.

    Raises:
      ValueError: the predictions are of other records; see `compare`.
    """
    (step, path), (step_other, path_other) = newest, other
    differences = _differences(name, path, path_other)
    first = _read_lines(path)
    second = _read_lines(path_other)
    if len(first) < MIN_EXAMPLES and not is_alone:
        logging.warning(
            "%s has %d examples, too few to compare (%d)", name, len(first), MIN_EXAMPLES
        )
        return {}

    result = compare(first, second, name)
    if not any(key.endswith("_difference") for key in result):
        # BLEU, for instance, is of a corpus.
        logging.warning("%s has no score of single examples: there is nothing to pair", name)
        return {}
    result = {"step": step, "step_other": step_other} | result
    return result | ({"differences": differences} if differences else {})


def _differences(name: str, path: epath.Path, path_other: epath.Path) -> dict[str, list]:
    """What was asked otherwise in the two runs: the path of a setting, such as prompt.shots, or
    "examples before the question" -> its values.

    Raises:
      ValueError: the predictions are of other records.
    """
    about, about_other = read_about(path), read_about(path_other)
    if not about or not about_other:
        logging.warning(
            "%s: predictions without %s don't say which records and prompts they are of; they are "
            "taken to be the same",
            name,
            about_path(path.name),
        )
        return {}

    fingerprint, other = about.get("fingerprint"), about_other.get("fingerprint")
    if fingerprint != other:
        raise ValueError(
            f"{name}: the two runs were evaluated on other records ({about.get('examples')} with "
            f"the fingerprint {fingerprint}, {about_other.get('examples')} with {other}); pairs "
            "need the same. Evaluate both on the same data"
        )

    settings = _leaves(about.get("settings", {}))
    settings_other = _leaves(about_other.get("settings", {}))
    settings["examples before the question"] = _shots(about)
    settings_other["examples before the question"] = _shots(about_other)
    differences = {}
    for key in sorted(settings.keys() | settings_other.keys()):
        values = [settings.get(key), settings_other.get(key)]
        if values[0] != values[1]:
            differences[key] = values
    return differences


def read_about(path: epath.Path) -> dict:
    """What stands beside a file of predictions; {} for runs of before there was such a file."""
    about = path.parent / about_path(path.name)
    return files.read_json(files.check_sized(about)) if about.exists() else {}


def _leaves(settings: Mapping, prefix: str = "") -> dict:
    """The values of nested settings by their paths, with dots."""
    leaves = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _shots(about: Mapping) -> list:
    """The text of the examples before the question, of each variant."""
    return [prompt.get("before") for prompt in about.get("prompts", ())]


def _read_lines(path: epath.Path) -> list[dict]:
    return [record for _, record in files.read_jsonl(str(files.check_sized(path)))]


def main_p(result: Mapping[str, float]) -> float:
    """The p-value that stands for an eval: McNemar's, or the first score's."""
    if "mcnemar_p" in result:
        return result["mcnemar_p"]
    for key in result:
        score = key.removesuffix("_difference")
        if key != score and f"{score}_p" in result:
            return result[f"{score}_p"]
    return 1.0


def table(comparisons: Mapping[str, Mapping]) -> str:
    """Comparisons as text, to be printed."""
    lines = []
    for name, result in comparisons.items():
        lines.append(
            f"{name}, {result['examples']} examples, step {result['step']} and step "
            f"{result['step_other']}:"
        )
        for key, (value, value_other) in result.get("differences", {}).items():
            lines.append(f"  asked otherwise: {key} = {value!r:.60} and {value_other!r:.60}")

        # A line for each score, then one for the tests.
        for key in result:
            if key.endswith("_difference") and key != "smallest_difference":
                lines.append(_score_line(key.removesuffix("_difference"), result))

        tests = f"p = {result['p_holm']:.3g} for {len(comparisons)} eval(s) (Holm)"
        if "mcnemar_p" in result:
            tests = f"McNemar's p = {result['mcnemar_p']:.3g}, {tests}"
        if "smallest_difference" in result:
            tests += (
                "; the smallest difference of accuracies that this set shows: "
                f"{result['smallest_difference']:.4f}"
            )
        lines.append(f"  {tests}")
    return "\n".join(lines)


def _score_line(score: str, result: Mapping[str, float]) -> str:
    """A score of both models and their difference."""
    interval = f"{result[score + '_low']:+.4f} to {result[score + '_high']:+.4f}"
    return (
        f"  {score:<13} {result[score]:8.4f}  {result[score + '_other']:8.4f}  difference "
        f"{result[score + '_difference']:+.4f} (95%: {interval}), p = {result[score + '_p']:.3g}"
    )
