"""Evals of checkpoints: run, written down, and the command that trains nothing."""

import json
import logging
import re

import jax
from etils import epath
from ml_collections import ConfigDict

from lm import build, checkpoint, files, startup, telemetry, weights
from lm.evals.predict import Artifact
from lm.reports import tables


def run_evaluator(workdir: epath.Path, name: str, evaluator, params, step: int) -> dict[str, float]:
    """The metrics of one evaluator as eval/NAME/...; its artifacts are written."""
    values = {}
    for key, value in evaluator.run(params):
        if isinstance(value, Artifact):
            write_artifact(workdir, value, step)
        else:
            values[f"eval/{name}/{key}"] = value
    return values


def write_artifact(workdir: epath.Path, artifact: Artifact, step: int) -> None:
    """Writes an evaluator's file. One that is appended to has a part for each step; a step that is
    run again replaces its own.
    """
    if jax.process_index():
        return
    path, content = workdir / artifact.path.replace("{step}", str(step)), artifact.content
    if artifact.append:
        old = path.read_text() if path.exists() else ""
        # text that a model wrote may have any heading in it
        parts = re.split(r"(?m)^(?=<!-- lm step \d+ -->$)", old)
        kept = "".join(part for part in parts if part and int(part.split()[3]) < step)
        content = (
            f"{kept}<!-- lm step {step} -->\n## Step "
            f"{step}\n\n{content.replace('<!-- lm step', '<!-- lm-step')}"
        )
    files.write_whole(path, content)


SHOWN = ("/loss", "/bits_per_byte", "/accuracy")


def evaluate(config: ConfigDict, workdir: epath.Path, devices, steps: str = "") -> dict[str, float]:
    """Runs every evaluator on the newest checkpoint of the run (or on config.init_from), writes
    eval-STEP.json and eval-STEP.md; trains nothing.

    Args:
      steps: of which checkpoints instead, with commas between them; "all": of each that is there.
        Their curves go to eval-curves.png.

    Returns:
      The metrics of the last one.

    Raises:
      ValueError: what can't work; steps that aren't there.
    """
    config = build.apply_hf_config(config)
    e = build.build(config, devices, training=False)
    source = epath.Path(config.init_from).expanduser() if config.init_from else workdir
    there = checkpoint.steps(source / "checkpoints")
    if (
        steps
        and not all(step.isdecimal() and int(step) in there for step in steps.split(","))
        and (steps != "all" or not there)
    ):
        raise ValueError(
            f"--steps={steps}: {source} has checkpoints of the steps {there}; wanted some of "
            "them, with commas, or all"
        )
    lines = []
    with jax.set_mesh(e.mesh):
        evaluators = e.make_evaluators()
        about = {name: getattr(evaluator, "about", {}) for name, evaluator in evaluators.items()}
        for at in (
            [None] if not steps else there if steps == "all" else sorted(map(int, steps.split(",")))
        ):
            params = None  # the ones before make room
            params, step = weights.load_weights(e, source, averaged=True, at=at)
            values = {}
            for name, evaluator in evaluators.items():
                values |= run_evaluator(workdir, name, evaluator, params, step)
            lines.append({"step": step} | values)
            if jax.process_index() == 0:
                known = {
                    "step": step,
                    "from": str(source),
                    "versions": startup.versions(devices),
                    "tokenizer": e.tokenizer.fingerprint,
                    "evals": about,
                }
                files.write_whole(
                    workdir / f"eval-{step}.json",
                    json.dumps(known | {"config": config.to_dict()} | values, indent=2) + "\n",
                )
                files.write_whole(workdir / f"eval-{step}.md", tables.markdown(known, values))
                logging.info(
                    "evaluated step %d: %s",
                    step,
                    ", ".join(
                        f"{k.removeprefix('eval/')} {v:.4g}"
                        for k, v in values.items()
                        if k.endswith(SHOWN)
                    ),
                )
    if len(lines) > 1 and jax.process_index() == 0:
        files.write_whole(workdir / "eval-curves.png", telemetry.plot_curves(lines))
    return values
