"""Runs evaluators on checkpoints and writes what they yield. Also --mode=eval, which trains
nothing.
"""

import json
import logging
import re

import jax
from etils import epath
from ml_collections import ConfigDict

from lm import build, checkpoint, escape, files, startup, telemetry, weights
from lm.evals.predict import Artifact
from lm.reports import comparison, tables

# Metrics that are worth a word on the terminal while a run goes on.
SHOWN = ("/loss", "/bits_per_byte", "/accuracy")


def evaluate(
    config: ConfigDict, workdir: epath.Path, devices, steps: str = "", show_prompts: int = 0
) -> dict[str, float]:
    """Runs every evaluator on the newest checkpoint of the run (or on config.init_from).

    Writes eval-STEP.json and eval-STEP.md; trains nothing.

    Args:
      steps: of which checkpoints instead, with commas between them; "all": of each that is there.
        Their curves go to eval-curves.png.
      show_prompts: how many prompts of each eval to print before.

    Returns:
      The metrics of the last one.

    Raises:
      ValueError: what can't work; steps that aren't there.
    """
    config = build.apply_hf_config(config, training=False)
    files.check_tree(workdir)
    source = weights.source_of(config, workdir)
    experiment = build.build(config, devices, training=False)
    chosen = _parse_steps(steps, source)
    first_process = jax.process_index() == 0

    lines = []
    with jax.set_mesh(experiment.program.mesh):
        experiment.others.update(weights.load_others(experiment))
        evaluators = experiment.make_evaluators()
        if first_process:
            for name, evaluator in evaluators.items():
                print_prompts(name, evaluator, show_prompts)
        for checkpoint_step in chosen:
            params = None  # frees the memory of the previous checkpoint's
            params, step = weights.load_weights(
                experiment, source, averaged=True, step=checkpoint_step
            )
            values = {}
            for name, evaluator in evaluators.items():
                values |= run_evaluator(workdir, name, evaluator, params, step, config)
            lines.append({"step": step} | values)

            if first_process:
                about = {
                    "step": step,
                    "from": str(source),
                    "versions": startup.versions(devices),
                    "tokenizer": experiment.tokenizer.fingerprint,
                    "dtypes": dtypes(params, experiment.program.model_config.compute_dtype),
                    "evals": {name: getattr(e, "about", {}) for name, e in evaluators.items()},
                }
                _write_results(workdir, about, config, values)
                logging.info("evaluated step %d: %s", step, ", ".join(summary(values)))

    if len(lines) > 1 and first_process:
        files.write_whole(workdir / "eval-curves.png", telemetry.plot_curves(lines))
    return values


def print_prompts(name: str, evaluator, count: int) -> None:
    """Prints the first prompts of an evaluator that has some, what should follow behind ⟫."""
    if count and hasattr(evaluator, "shown_prompts"):
        for prompt in evaluator.shown_prompts(count):
            text = f"--- {name}: {prompt.title}\n{prompt.text}⟫{prompt.right}"
            print(escape.printable(text))


def dtypes(params, compute_dtype) -> str:
    """In which precision a model is evaluated, in words."""
    stored = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
    return f"parameters in {', '.join(stored)}, computed in {jax.numpy.dtype(compute_dtype)}"


def _parse_steps(steps: str, source: epath.Path) -> list[int | None]:
    """The steps that --steps names; None is the newest one."""
    if not steps:
        return [None]
    available = checkpoint.steps(source / "checkpoints")
    if steps == "all" and available:
        return available

    names = steps.split(",")
    if not all(name.isdecimal() and int(name) in available for name in names):
        raise ValueError(
            f"--steps={steps}: {source} has checkpoints of the steps {available}; wanted some of "
            "them, with commas, or all"
        )
    return sorted(map(int, names))


def _write_results(workdir: epath.Path, about: dict, config: ConfigDict, values: dict) -> None:
    """Writes eval-STEP.json, and the same to be read as eval-STEP.md."""
    step = about["step"]
    results = about | {"config": config.to_dict()} | values
    files.write_whole(workdir / f"eval-{step}.json", json.dumps(results, indent=2) + "\n")
    files.write_whole(workdir / f"eval-{step}.md", tables.markdown(about, values))


def summary(values: dict[str, float]) -> list[str]:
    """The metrics of `SHOWN` in words: "NAME/METRIC value"."""
    shown = {name: value for name, value in values.items() if name.endswith(SHOWN)}
    return [f"{name.removeprefix('eval/')} {value:.4g}" for name, value in shown.items()]


def run_evaluator(
    workdir: epath.Path, name: str, evaluator, params, step: int, config: ConfigDict
) -> dict[str, float]:
    """Runs an evaluator, writes its artifacts, and returns its metrics as eval/NAME/..."""
    values = {}
    for key, value in evaluator.run(params):
        if not isinstance(value, Artifact):
            values[f"eval/{name}/{key}"] = value
            continue

        write_artifact(workdir, value, step)
        about_path = comparison.about_path(value.path)
        if about_path:
            about = getattr(evaluator, "about", {}) | {"settings": settings(config, name)}
            content = json.dumps(about, indent=1, default=str) + "\n"
            write_artifact(workdir, Artifact(about_path, content), step)
    return values


def settings(config: ConfigDict, name: str) -> dict:
    """What of config.evals.NAME decides which predictions there are, as far as it says nothing of
    where the data are.
    """
    entry = config.evals[name].to_dict()
    for key in ("every", "batch_size", "source_args"):
        entry.pop(key, None)
    if isinstance(entry.get("source"), dict):
        source = entry.pop("source")
        entry["source"] = {key: source.get(key, "") for key in ("split", "shots_split")}
    return entry | {"length": config.data.length}


def write_artifact(workdir: epath.Path, artifact: Artifact, step: int) -> None:
    """Writes an evaluator's file.

    One that is appended to has a part for each step. A step that is run again replaces its own, and
    those after it.
    """
    if jax.process_index():
        return
    path = workdir / artifact.path.replace("{step}", str(step))
    content = artifact.content
    if artifact.append:
        # A comment begins each part: text that a model wrote may have any heading in it.
        old = files.read_text(str(path)) if path.exists() else ""
        parts = re.split(r"(?m)^(?=<!-- lm step \d+ -->$)", old)
        earlier = "".join(part for part in parts if part and int(part.split()[3]) < step)
        text = content.replace("<!-- lm step", "<!-- lm-step")
        content = f"{earlier}<!-- lm step {step} -->\n## Step {step}\n\n{text}"
    files.write_whole(path, content)
