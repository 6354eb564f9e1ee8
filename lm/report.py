"""Makes a page about runs, side by side, or about a sweep:

    python -m lm.report --workdir=RUN [--workdir=RUN2 ...]

The page is one HTML file that loads nothing: curves, metrics, configuration, data, samples, labels,
and where the time went. A directory with sweep.json is a sweep; its page begins with means over
seeds, the axes, and which differences are significant.
"""

import json
from collections.abc import Mapping, Sequence

from absl import app, flags
from etils import epath

from lm import checkpoint, command_line, files
from lm import config as config_lib
from lm.reports import page, run_sections, sweeps
from lm.reports import runs as runs_lib

CARDS = epath.Path(__file__).parent.parent / "configs" / "cards"
# What a compile card is about, and what in it is not.
COMPILED = ("model.", "optimizer.", "mesh.", "train.", "objective.", "data.batch_size")
NOT_COMPILED = ("train.length", "train.log_every", "train.nonfinite", "model.vocab_size")


def runs_page(workdirs: Sequence[epath.Path]) -> str:
    """The page of runs, side by side, as HTML.

    Raises:
      ValueError: a directory is missing, or no run's, or there twice; none has metrics; a file is
        damaged; a package is missing.
    """
    page.check_installed()
    if len(set(workdirs)) < len(workdirs):
        raise ValueError(f"a directory is given twice: {', '.join(map(str, workdirs))}")
    runs = []
    for workdir, name in zip(workdirs, short_names(workdirs)):
        _check_run(workdir)
        runs.append(runs_lib.read(workdir, name))
    if not any(run.curves for run in runs):
        raise ValueError(
            f"{', '.join(map(str, workdirs))}: no metrics, neither in metrics.jsonl nor in "
            "eval-STEP.json. Train or evaluate first"
        )

    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = [run_sections.overview(runs), *_side_by_side(runs)]
    return page.render(title, sections)


def sweep_page(workdir: epath.Path, metric: str = "") -> str:
    """The page of a sweep as HTML.

    Args:
      workdir: has sweep.json: {"axes": [key, ...], "halving": {...} or null, "runs": [{"name": of
        its directory, "changes": {key: value}}, ...]}.
      metric: by which the runs are held against each other; "": config.checkpoint.best, or the
        first one that stands for an eval.

    Raises:
      ValueError: the plan is no such plan; no run has the metric, or any; a file is damaged; a
        package is missing.
    """
    page.check_installed()
    path = workdir / sweeps.PLAN
    plan = files.read_json(files.check_sized(path))
    axes, sweep_runs = sweeps.read(workdir, plan, str(path))
    runs = [sweep_run.run for sweep_run in sweep_runs]
    failures = sweeps.read_failures(runs)
    # Of a halving the runs of its longest round count.
    step = max(sweeps.finished_step(run.size) for run in runs) if plan.get("halving") else None

    main_metric = sweeps.main_metric(runs, metric)
    unplanned = sweeps.strangers(workdir, [run.name for run in runs])
    sections = sweeps.sections(
        axes, sweep_runs, main_metric, failures=failures, step=step, unplanned=unplanned
    )

    # Runs of the best setting come first: texts and pictures are of the first runs only.
    best = sweeps.best_setting(sweeps.means_of_settings(sweep_runs, main_metric), main_metric)
    begun = sorted(
        (sweep_run for sweep_run in sweep_runs if sweep_run.run.curves),
        key=lambda sweep_run: sweep_run.setting != best,
    )
    sections += _side_by_side([sweep_run.run for sweep_run in begun])
    return page.render(f"Sweep {workdir.name}", sections)


def short_names(paths: Sequence[epath.Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [path.parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path_parts[-depth:]) for path_parts in parts]
        if len(set(names)) == len(names):
            break
    return names


def _check_run(workdir: epath.Path) -> None:
    """Raises ValueError for what is no run directory."""
    if not workdir.exists():
        raise ValueError(f"there is no directory {workdir}; wanted that of a run")
    if (workdir / sweeps.PLAN).exists():
        raise ValueError(f"{workdir} is a sweep, whose page is its own: give it alone")
    of_runs = ("config.json", "metrics.jsonl", "eval-*.json")
    if not any(list(workdir.glob(pattern)) for pattern in of_runs):
        raise ValueError(f"{workdir} is no run directory: it has none of {', '.join(of_runs)}")


def _side_by_side(runs: Sequence[runs_lib.Run]) -> list[page.Section]:
    notes = {run.name: _checkpoint_facts(run) for run in runs}
    cards = _cards_section(runs)
    return [*run_sections.sections(runs, notes), *[cards] * bool(cards.parts)]


def _checkpoint_facts(run: runs_lib.Run) -> dict[str, str]:
    """What the newest checkpoint of a run says of its data and tokenizer."""
    try:
        step, meta = checkpoint.newest_meta(run.path / "checkpoints")
    except (ValueError, OSError) as error:
        return {"checkpoint": str(error)}
    if not meta:
        return {}
    tokenizer = meta.get("tokenizer")
    facts = {"checkpoint of step": str(step), "corpus": str(meta.get("corpus", ""))}
    for key in ("fingerprint", "vocab_size"):
        if isinstance(tokenizer, dict) and key in tokenizer:
            facts[f"tokenizer: {key}"] = str(tokenizer[key])
    return facts


# --- compile cards ---


def _cards_section(runs: Sequence[runs_lib.Run]) -> page.Section:
    """The compile cards of the runs that are of a configuration with one."""
    of_cards: dict[str, list[str]] = {}
    for run in runs:
        if name := card_of(run.config):
            of_cards.setdefault(name, []).append(run.name)
    parts: list[page.Part] = []
    for name, run_names in of_cards.items():
        from lm.plan import cards  # takes seconds

        table = cards.table(files.read_json(CARDS / f"{name}.json"))
        parts.append(page.Preformatted(f"{name}, modelled: {', '.join(run_names)}", table))
    return page.Section("Compile card", parts)


def card_of(config: Mapping) -> str:
    """The name of the card in configs/cards/ whose configuration this is, but for its data and its
    length; "" if there is none.
    """
    flat = config_lib.flatten(dict(config))
    mesh = {}
    for key, size in flat.items():
        if key.startswith("mesh.") and size != 1:
            mesh[key.removeprefix("mesh.")] = size
    batch = [flat.get("data.batch_size"), flat.get("data.length")]

    for path in sorted(CARDS.glob("*.json")):
        card = json.loads(path.read_text())
        # Most are told apart without their configuration.
        if card["mesh"] == mesh and card["batch"] == batch:
            from lm.plan import cards

            file, size = card["config"]
            of_card = cards.load_config(str(CARDS.parent.parent / file), size)
            if _compiled(flat) == _compiled(config_lib.flatten(of_card)):
                return path.stem
    return ""


def _compiled(flat: Mapping) -> dict:
    """What of a flat configuration its compiled step depends on."""
    keys = {}
    for key, value in flat.items():
        if key.startswith(COMPILED) and key not in NOT_COMPILED:
            keys[key] = value
    return keys


# --- the command ---


@command_line.command
def main(argv: list[str]) -> None:
    command_line.no_arguments(argv)
    workdirs = [epath.Path(files.absolute(path)) for path in _WORKDIR.value]
    out = epath.Path(files.expand(_OUT.value)) if _OUT.value else workdirs[0] / "report.html"
    if len(workdirs) == 1 and (workdirs[0] / sweeps.PLAN).exists():
        html = sweep_page(workdirs[0], _METRIC.value)
    elif _METRIC.value:
        raise ValueError(f"--metric={_METRIC.value} is for a sweep; these are runs")
    else:
        html = runs_page(workdirs)
    files.write_whole(out, html)
    print(f"{out}, {len(html.encode()) / 1e6:.1f} MB")


# Flags of this command alone: lm.sweep, which has a --workdir of its own, imports this file.
if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_multi_string(
        "workdir", None, "Run directory, or that of a sweep; repeated for runs side by side."
    )
    _OUT = flags.DEFINE_string("out", "", "The page; by default WORKDIR/report.html.")
    _METRIC = flags.DEFINE_string(
        "metric",
        "",
        "The metric of a sweep by which its runs are held against each other, such as "
        "eval/validation/loss; by default config.checkpoint.best, or the first of an eval.",
    )
    flags.mark_flag_as_required("workdir")
    app.run(main, flags_parser=command_line.parse)
