"""Results as tables: eval-STEP.md, and the one that ends a run."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lm import escape
from lm.reports import metrics as metrics_lib

Metrics = Mapping[str, float]

INTERVAL_SUFFIXES = ("_low", "_high")
STANDARD_ERROR = "_stderr"


def cell(value: float | int) -> str:
    """A number in few characters."""
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1e5:
        return f"{value:.4g}"
    return f"{value:.4f}"


# --- eval-STEP.md ---


def markdown(about: Mapping, values: Metrics) -> str:
    """The results of a checkpoint: a table for each eval, intervals beside their values.

    Args:
      about: step, from, versions, tokenizer, dtypes, and evals: name -> what the evaluator says of
        its data.
      values: eval/NAME/METRIC -> value.
    """
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# Step {about['step']} of {escape.inline(about['from'])}",
        "",
        f"{versions}; tokenizer {about['tokenizer']}; {escape.inline(about.get('dtypes', ''))}",
    ]

    for name, data in about["evals"].items():
        prefix = f"eval/{name}/"
        metrics = {}
        for key, value in values.items():
            if key.startswith(prefix):
                metrics[key.removeprefix(prefix)] = value

        # Evals such as samples write files only.
        if metrics:
            lines += ["", f"## {escape.inline(name)}", ""]
            lines += _data_lines(data)
            lines += _metric_lines(metrics)
    return "\n".join(lines) + "\n"


def _data_lines(data: Mapping) -> list[str]:
    """What an evaluator says of its data, of its prompts, and into which tokens its words fall."""
    lines = []
    if data:
        facts = []
        for key, value in data.items():
            if isinstance(value, (str, int)) and value:
                facts.append(f"{key} {escape.inline(str(value))}")
        lines += ["; ".join(facts), ""]

    # One entry for each variant of the prompt.
    for prompt in data.get("prompts", ()):
        variant = f"{prompt['variant']}: " if prompt["variant"] else ""
        shots = ", ".join(prompt["shots"]) or "none"
        line = f"{variant}template {prompt['template']!r}; examples before it: {shots}"
        lines += [escape.inline(line), ""]
    if data.get("corrections"):
        lines += [f"corrections: {escape.inline(', '.join(data['corrections']))}", ""]

    # The same: label -> word -> the texts of its tokens.
    for words in data.get("words", ()):
        labels = []
        for label, tokens_of_words in words.items():
            labels.append(f"{label}: {', '.join(map(repr, tokens_of_words.values()))}")
        lines += [f"words and their tokens: {escape.inline('; '.join(labels))}", ""]
    return lines


def _metric_lines(metrics: Metrics) -> list[str]:
    lines = ["| | | 95% interval |", "|---|---|---|"]
    for key, value in metrics.items():
        # The bounds of an interval stand beside its metric.
        if not is_bound(key, metrics):
            name = escape.inline(key)
            lines.append(f"| {name} | {cell(value)} | {_given_interval(key, metrics)} |")
    return lines


def is_bound(key: str, metrics: Metrics) -> bool:
    """Whether a key is METRIC_low or METRIC_high of another one."""
    return key.endswith(INTERVAL_SUFFIXES) and key.rpartition("_")[0] in metrics


def _given_interval(metric: str, metrics: Metrics) -> str:
    """The 95% interval of a metric; "" if it has none."""
    low = metrics.get(f"{metric}_low")
    high = metrics.get(f"{metric}_high")
    if low is None or high is None:
        return ""
    return f"{cell(low)} to {cell(high)}"


# --- the table that ends a run ---

ROWS_OF_AN_EVAL = 2


class Row(NamedTuple):
    eval: str
    metric: str
    value: str
    interval: str
    baseline: str


def headline(values: Metrics) -> str:
    """The main metrics of each eval as a table in plain text; "" if there are none.

    Args:
      values: eval/NAME/METRIC -> value, among others. A NAME may have parts of its own, such as
        the eval and the task of lm_eval.
    """
    evals: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        prefix, _, path = key.partition("/")
        name, _, metric = path.rpartition("/")
        if prefix == "eval" and name and isinstance(value, (int, float)):
            evals.setdefault(name, {})[metric] = value

    rows = []
    for name, metrics in evals.items():
        for number, metric in enumerate(main_metrics(metrics)):
            row = Row(
                eval=name if number == 0 else "",
                metric=metric,
                value=cell(metrics[metric]),
                interval=_interval_or_range(metric, metrics),
                baseline=_baseline(metric, metrics),
            )
            rows.append(row)

    if not rows:
        return ""
    return _align([Row("eval", "metric", "value", "95% interval", "baseline"), *rows])


def main_metrics(metrics: Metrics) -> list[str]:
    """The one or two metrics that stand for an eval; [] if it has side metrics only."""
    for known_by, preferred in metrics_lib.HEADLINES.items():
        if known_by in metrics:
            return [key for key in preferred if key in metrics][:ROWS_OF_AN_EVAL]

    # Generated texts, tasks of lm_eval and evals of one's own have scores of any name, the main
    # ones first.
    scores = []
    for key in metrics:
        is_side = STANDARD_ERROR in key or key in metrics_lib.SIDE_METRICS
        if not is_side and not is_bound(key, metrics):
            scores.append(key)
    return scores[:ROWS_OF_AN_EVAL]


def _interval_or_range(metric: str, metrics: Metrics) -> str:
    """The 95% interval of a metric, or the range of accuracy over variants; "" if there is
    neither.
    """
    if metric == "accuracy_mean" and "accuracy_min" in metrics:
        return f"{cell(metrics['accuracy_min'])} to {cell(metrics['accuracy_max'])} (min to max)"

    # lm_eval has standard errors instead: METRIC_stderr, or METRIC_stderr_FILTER.
    for key, error in metrics.items():
        if STANDARD_ERROR in key and key.replace(STANDARD_ERROR, "") == metric:
            if math.isfinite(error):
                low = metrics[metric] - 1.96 * error
                high = metrics[metric] + 1.96 * error
                return f"{cell(low)} to {cell(high)}"
    return _given_interval(metric, metrics)


def _baseline(metric: str, metrics: Metrics) -> str:
    for of_metric, baseline, description in metrics_lib.BASELINES:
        if of_metric == metric and baseline in metrics:
            return f"{cell(metrics[baseline])} ({description})"
    return ""


def _align(rows: Sequence[Row]) -> str:
    """Rows as lines whose columns stand below each other, values by their decimal point."""
    width = max(len(row.value) for row in rows)
    return align([row._replace(value=row.value.rjust(width)) for row in rows])


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)
