"""The sections of a page about runs, side by side: curves, metrics, configuration, data, samples,
labels, and where the time went.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.evals.scores import statistics
from lm.reports import page, pictures, tables
from lm.reports import runs as runs_lib
from lm.reports.page import Cell, Section, Text
from lm.reports.runs import Run

# Drawn first; the other metrics are there on demand.
MAIN_CURVES = (
    "train/loss",
    "train/reward",
    "train/kl_of_text",
    "train/text_tokens",
    "train/grad_norm",
    "train/learning_rate",
    "train/tokens_per_second",
)
MAX_FIRST, MAX_FIGURES = 50, 150
MAX_COLUMNS = 24  # main metrics beside each run
# What of each run is shown as text or picture, for so many runs.
MAX_RUNS_IN_DETAIL = 8
MAX_PICTURES, MAX_LABELS = 16, 150
EXAMPLES, PROMPT_CHARS = 3, 800
TIMES = (
    "train/goodput",
    "train/mfu",
    "train/tokens_per_second",
    "train/seconds_first_step",
    "train/seconds_data",
    "train/seconds_evals",
    "train/seconds_checkpoints",
    "train/seconds_repeated",
)
# What a damaged file of predictions raises where it is used.
DAMAGED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)


def sections(runs: Sequence[Run], notes: Mapping[str, Mapping[str, str]]) -> list[Section]:
    """All sections about these runs.

    Args:
      notes: run -> what else is known of its data and versions, by name.
    """
    loaded, damaged = _load_predictions(runs[:MAX_RUNS_IN_DETAIL])
    all_sections = [
        curves(runs),
        metrics(runs),
        configuration(runs),
        data_and_versions(runs, loaded, notes),
        samples(runs, loaded),
        labels(loaded),
        goodput(runs),
    ]
    if damaged:
        all_sections.insert(0, Section("Damaged", [Text(text, "bad") for text in damaged]))
    if len(runs) > MAX_RUNS_IN_DETAIL:
        said = Text(
            f"Predictions, samples and labels are of the first {MAX_RUNS_IN_DETAIL} of {len(runs)} "
            "runs. A page of fewer runs has those of others."
        )
        all_sections[-3].parts.insert(0, said)
        all_sections[-2].parts.insert(0, said)
    return [section for section in all_sections if section.parts]


Loaded = dict[str, dict[str, runs_lib.Predictions]]  # eval -> run -> predictions


def _load_predictions(runs: Sequence[Run]) -> tuple[Loaded, list[str]]:
    """The newest predictions, and what could not be read."""
    loaded: Loaded = {}
    damaged = []
    for run in runs:
        try:
            for name, predictions in runs_lib.predictions(run).items():
                loaded.setdefault(name, {})[run.name] = predictions
        except (*DAMAGED, OSError) as error:
            damaged.append(f"{run.name}: its predictions can't be read: {error}")
    return loaded, damaged


# --- overview ---


def overview(runs: Sequence[Run]) -> Section:
    """A row for each run: how far it came, and its main metrics."""
    metric_names = runs_lib.headlines(runs)[:MAX_COLUMNS]
    rows = []
    for run in runs:
        state = runs_lib.state(run)
        mark = "" if runs_lib.is_whole(run) else "bad"
        values = run.last_values
        cells = [metric_cell(name, values) for name in metric_names]
        rows.append([run.name, Cell(state, mark=mark), run.step, *cells])
    columns = ["run", "state", "step", *map(short_name, metric_names)]
    parts = [page.Table(columns, rows), *_differing_steps(runs), *_differing_evals(runs)]
    return Section("Runs", parts)


def short_name(metric: str) -> str:
    return metric.removeprefix("eval/")


def metric_cell(name: str, values: Mapping[str, float]) -> Cell | None:
    """A metric with its 95% interval; None if there is none."""
    if name not in values:
        return None
    text = page.number(values[name])
    if bounds := runs_lib.interval(name, values):
        text += f" ({page.number(bounds[0])} to {page.number(bounds[1])})"
    return Cell(text, values[name])


def _differing_steps(runs: Sequence[Run]) -> list[Text]:
    """Says so where the runs end at different steps."""
    steps: dict[int, list[str]] = {}
    for run in runs:
        if run.curves:
            steps.setdefault(run.step, []).append(run.name)
    if len(steps) < 2:
        return []
    parts = [f"{step:,}: {few(names)}" for step, names in sorted(steps.items())]
    return [Text(f"The runs end at different steps. {'; '.join(parts)}.", "bad")]


def _differing_evals(runs: Sequence[Run]) -> list[Text]:
    """Says so where the runs have different evals."""
    all_evals: set[str] = set()
    for run in runs:
        all_evals.update(run.evals)
    parts = []
    for run in runs:
        missing = sorted(all_evals - run.evals.keys())
        if missing and run.curves:
            parts.append(f"{run.name} lacks {few(missing)}")
    if not parts:
        return []
    return [Text(f"The runs have different evals. {few(parts, '; ')}.", "bad")]


def few(names: Sequence[str], separator: str = ", ") -> str:
    """Names in a line, the first ten of many."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return separator.join(names[:10]) + more


# --- curves ---


def curves(runs: Sequence[Run]) -> Section:
    """A figure for each metric that some run measured at two steps or more."""
    figures = {}
    for metric in sorted({name for run in runs for name in run.last_values}):
        lines = {}
        for run in runs:
            if metric in run.curves:
                lines[run.name] = run.curves[metric]
        if any(len(set(steps)) > 1 for steps, _ in lines.values()):
            figures[metric] = page.Figure(metric, lines)

    main = [*MAIN_CURVES[:1], *runs_lib.headlines(runs), *MAIN_CURVES[1:]]
    drawn = [name for name in dict.fromkeys(main) if name in figures][:MAX_FIRST]
    first = [figures.pop(name) for name in drawn]
    others = list(figures.values())
    parts: list[page.Part] = []
    if first or others:
        parts.append(page.Curves("step", first, others[:MAX_FIGURES]))
    if len(others) > MAX_FIGURES:
        names = [figure.title for figure in others[MAX_FIGURES:]]
        parts.append(Text(f"Not drawn: {few(names)}, of {len(first) + len(others)} metrics."))
    return Section("Curves", parts)


# --- metrics ---


def metrics(runs: Sequence[Run]) -> Section:
    """The last value of each metric, the main ones first, with a column for each run."""
    values_of_runs = [run.last_values for run in runs]
    names = dict.fromkeys(runs_lib.headlines(runs))
    names |= dict.fromkeys(sorted({name for values in values_of_runs for name in values}))

    rows: list[list] = []
    for name in names:
        # The bounds of an interval stand beside its metric.
        if not any(tables.is_bound(name, values) for values in values_of_runs):
            rows.append([name, *(metric_cell(name, values) for values in values_of_runs)])
    parts: list[page.Part] = []
    if rows:
        title = "The last value of each metric; its 95% interval where there is one."
        columns = ["metric", *(run.name for run in runs)]
        parts.append(page.Table(columns, rows, title))
    return Section("Final metrics", parts)


# --- what was run ---


def side_by_side(
    title: str, facts: Mapping[str, Mapping[str, str]], *, only_differing: bool = False
) -> list[page.Part]:
    """A table with a row for each fact and a column for each run; facts that differ are marked.

    Args:
      facts: run -> name -> text.
      only_differing: leave the other facts out.
    """
    names: dict[str, None] = {}
    for facts_of_run in facts.values():
        names |= dict.fromkeys(facts_of_run)

    rows: list[list] = []
    for name in names:
        texts = [facts_of_run.get(name) for facts_of_run in facts.values()]
        differs = len(set(texts)) > 1
        if differs or not only_differing:
            mark = "differs" if differs and not only_differing else ""
            rows.append([Cell(name, mark=mark), *texts])
    return [page.Table(["key", *facts], rows, title)] if rows else []


def configuration(runs: Sequence[Run]) -> Section:
    """What differs between the configurations, and the first one whole."""
    configs = {run.name: runs_lib.flat_config(run) for run in runs}
    parts: list[page.Part] = []
    if len(runs) > 1:
        parts = side_by_side("What differs", configs, only_differing=True)
        parts = parts or [Text("The configurations are the same.")]
    if without := [name for name, config in configs.items() if not config]:
        parts.append(Text(f"Without config.json: {few(without)}.", "bad"))

    # The others differ from the first one in what stands above.
    for name, config in configs.items():
        if config:
            text = "\n".join(f"{key} = {value}" for key, value in sorted(config.items()))
            parts.append(page.Preformatted(f"Of {name}", text))
            break
    return Section("Configuration", parts)


def data_and_versions(
    runs: Sequence[Run], loaded: Loaded, notes: Mapping[str, Mapping[str, str]]
) -> Section:
    """Which data were trained and evaluated on, and with which versions."""
    facts: dict[str, dict[str, str]] = {}
    for run in runs:
        config = runs_lib.flat_config(run)
        facts[run.name] = dict(notes.get(run.name, {}))
        for key in ("data.source", "data.split", "data.length", "data.batch_size", "train.length"):
            if key in config:
                facts[run.name][key] = config[key]
        facts[run.name] |= _facts_of_corpora(run.corpora)
        facts[run.name] |= _facts_of_size(run.size)
        for evaluation in run.evaluations[-1:]:
            facts[run.name] |= _facts_of_evaluation(evaluation)

    for name, of_runs in loaded.items():
        for run_name, predictions in of_runs.items():
            for key in ("fingerprint", "examples", "citation"):
                if key in predictions.about:
                    facts[run_name][f"eval {name}: {key}"] = str(predictions.about[key])
    return Section("Data and versions", side_by_side("", facts))


def _facts_of_corpora(corpora: Any) -> dict[str, str]:
    """What corpora.json says of the prepared corpora that were trained on, whatever it holds."""
    facts = {}
    for corpus in corpora if isinstance(corpora, list) else ():
        if not isinstance(corpus, dict):
            continue
        name = f"corpus {str(corpus.get('name'))[:80]}"
        facts[name] = f"{str(corpus.get('version'))[:80]}, {str(corpus.get('key'))[:80]}"
        splits = corpus.get("splits")
        for split, sizes in splits.items() if isinstance(splits, dict) else ():
            for what in ("documents", "bytes", "tokens"):
                if isinstance(sizes, dict) and runs_lib.is_number(sizes.get(what)):
                    facts[f"{name}: {split[:80]} {what}"] = f"{sizes[what]:,}"
    return facts


def _facts_of_size(size: Mapping) -> dict[str, str]:
    """What run.json says."""
    facts = {}
    for key in ("parameters", "total_steps", "tokens_per_step", "flops_per_step"):
        if runs_lib.is_number(size.get(key)):
            facts[key.replace("_", " ")] = f"{size[key]:,}"
    versions = size.get("versions")
    for key, version in versions.items() if isinstance(versions, dict) else ():
        facts[f"trained with {key}"] = str(version)
    return facts


def _facts_of_evaluation(evaluation: Mapping) -> dict[str, str]:
    """What eval-STEP.json says of itself."""
    facts = {"evaluated at step": str(evaluation["step"])}
    for key in ("from", "tokenizer", "dtypes"):
        if key in evaluation:
            facts[f"evaluated: {key}"] = str(evaluation[key])
    versions = evaluation.get("versions")
    for key, version in versions.items() if isinstance(versions, dict) else ():
        facts[f"evaluated with {key}"] = str(version)
    return facts


def goodput(runs: Sequence[Run]) -> Section:
    """Where the time of each run went, by its last line of metrics."""
    values_of_runs = {run.name: run.last_values for run in runs}
    names = []
    for name in TIMES:
        if any(name in values for values in values_of_runs.values()):
            names.append(name)
    rows: list[list] = []
    for run_name, values in values_of_runs.items():
        rows.append([run_name, *(values.get(name) for name in names)])
    if not names:
        return Section("Goodput", [])
    title = (
        "Over all starts of a run: the share of time that was not lost, and the seconds lost to "
        "starting, up to the first step with its compilation, to waiting for data, to evals, to "
        "checkpoints, and to steps that were repeated after a kill."
    )
    columns = ["run", *(name.removeprefix("train/") for name in names)]
    return Section("Goodput", [page.Table(columns, rows, title)])


# --- texts ---


def samples(runs: Sequence[Run], loaded: Loaded) -> Section:
    """What models wrote last, and the first examples of each eval with their prompts."""
    parts: list[page.Part] = []
    for run in runs[:MAX_RUNS_IN_DETAIL]:
        if text := runs_lib.samples(run):
            parts.append(page.Preformatted(f"{run.name}: samples.md", text.strip()))

    for name, of_runs in loaded.items():
        rows = []
        for run_name, predictions in of_runs.items():
            for line in predictions.lines[:EXAMPLES]:
                rows.append([run_name, *_example_cells(line, predictions.about)])
        columns = ["run", "example", "prompt", "right", "the model's"]
        parts.append(page.Table(columns, rows, f"{name}: the first examples"))
    return Section("Samples and prompts", parts, is_folded=True)


def _example_cells(line: Mapping, about: Mapping) -> list[str]:
    """Name, prompt, right answer and the model's answer of a line of predictions."""
    prompts = line.get("prompts") or [line.get("prompt", "")]
    prompt = str(prompts[0]) if isinstance(prompts, list) and prompts else str(prompts)
    asked = about.get("prompts")
    if isinstance(asked, list) and asked and isinstance(asked[0], dict):
        prompt = str(asked[0].get("before", "")) + prompt
    if len(prompt) > PROMPT_CHARS:
        half = PROMPT_CHARS // 2
        prompt = f"{prompt[:half]}\n[{len(prompt) - PROMPT_CHARS:,} characters]\n{prompt[-half:]}"

    right = line.get("label", line.get("references", ""))
    answer = line.get("text", line.get("prediction", ""))
    scores = line.get("scores")
    if answer == "" and isinstance(scores, dict):
        answer = ", ".join(f"{key} {value}" for key, value in scores.items())
    return [str(line.get("name", "")), prompt, _as_text(right), _as_text(answer)]


def _as_text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- labels ---


def label_distributions(
    lines: Sequence[Mapping],
) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """(P [n, K], right labels [n], the K labels) of predictions over one label space; None for
    others.

    Raises:
      ValueError, KeyError, TypeError: the lines don't fit together.
    """
    first = lines[0] if lines else {}
    if "distribution" not in first or "scores" in first:
        return None
    names = list(first["distribution"])
    if any(len(line["distribution"]) != len(names) for line in lines):
        raise ValueError("distributions over different labels")
    P = np.zeros((len(lines), len(names)))
    y = np.zeros(len(lines), int)
    for i, line in enumerate(lines):
        P[i] = [line["distribution"][name] for name in names]
        y[i] = names.index(line["label"])
    if not np.isfinite(P).all():
        raise ValueError("probabilities that aren't finite")
    return P, y, names


def labels(loaded: Loaded) -> Section:
    """For each eval over one label space: how often labels are right and are predicted, confusion
    and reliability.
    """
    parts: list[page.Part] = []
    num_pictures = 0
    for name, of_runs in loaded.items():
        distributions = {}
        for run_name, predictions in of_runs.items():
            try:
                found = label_distributions(predictions.lines)
            except DAMAGED as error:
                parts.append(Text(f"{run_name}: predictions of {name} are damaged: {error}", "bad"))
                continue
            if found:
                distributions[run_name] = found
        if distributions:
            parts.append(label_table(name, distributions))

        for run_name, (P, y, names) in distributions.items():
            title = f"{name}, {run_name}"
            if num_pictures >= MAX_PICTURES or len(names) > MAX_LABELS:
                parts.append(Text(f"{title}: no pictures; there are too many of them, or labels."))
                continue
            num_pictures += 2
            try:
                parts += _label_pictures(title, P, y, names)
            except DAMAGED as error:
                parts.append(Text(f"{title}: no pictures: {error}", "bad"))
    return Section("Labels", parts)


def label_table(name: str, distributions: Mapping[str, tuple]) -> page.Table:
    """The shares of each label among the right ones, the predicted ones, and in the mean
    distribution, of the `label_distributions` of each run.
    """
    rows = []
    for run_name, (P, y, names) in distributions.items():
        right = np.bincount(y, minlength=len(names)) / len(y)
        predicted = statistics.prediction_shares(P).mean(axis=0)
        for k, label in enumerate(names):
            shares = [float(right[k]), float(predicted[k]), float(P[:, k].mean())]
            rows.append([run_name, label, *shares])
    columns = ["run", "label", "right", "predicted", "mean distribution"]
    return page.Table(columns, rows, f"{name}: shares of the labels")


def _label_pictures(
    title: str, P: np.ndarray, y: np.ndarray, names: list[str]
) -> list[page.Picture]:
    """The confusion matrix, and the reliability diagram with the shares of the labels."""
    logging.info("drawing %s", title)
    matrix = statistics.confusion(statistics.prediction_shares(P), y)
    accuracy = float(np.mean(statistics.credit(P, y)))
    confusion = pictures.plot_confusion(matrix, names, f"accuracy {accuracy:.1%}")
    reliability = pictures.plot_reliability(P, y, names, "confidence")
    return [
        page.Picture(f"{title}: confusion", confusion),
        page.Picture(f"{title}: reliability, labels", reliability),
    ]
