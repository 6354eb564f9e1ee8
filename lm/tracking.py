"""Weights & Biases: a run there gets the lines of metrics.jsonl, and goes on as this one does."""

import importlib.util
import json
import logging
import math
import re
import secrets
from collections.abc import Mapping, Sequence

from etils import epath

from lm import files

KEY = "config.tracking.wandb"
ID_FILE = "wandb.json"  # in the run directory: which run of W&B it is
FINISH_SECONDS = 60.0  # at the end, for what has not been sent yet
_HELP = (
    f'WANDB_MODE=offline keeps everything for "wandb sync", and {KEY}="" sends nothing: metrics '
    "are in metrics.jsonl and tensorboard/ anyway"
)


def check(project: str) -> None:
    """Checks that W&B can be used, before anything else is done.

    Args:
      project: config.tracking.wandb.

    Raises:
      ValueError: the name of no project, the package is not installed, or nobody is logged in.
    """
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", project):
        raise ValueError(f"{KEY} = {project!r}; wanted PROJECT or ENTITY/PROJECT")
    if not importlib.util.find_spec("wandb"):
        raise ValueError(
            f"{KEY} = {project!r} needs the package wandb: pip install -c constraints.txt -e "
            "'.[tracking]'"
        )
    import wandb

    try:
        is_online = wandb.setup().settings.mode == "online"
        ready = not is_online or wandb.login(prompt=False, verify=False)
    except Exception as error:
        raise _refused(project, error) from None
    if not ready:
        raise ValueError(
            f"{KEY} = {project!r}, and nobody is logged in to Weights & Biases: run wandb login, "
            f"or set WANDB_API_KEY. {_HELP}"
        )


def _refused(project: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"{KEY} = {project!r} can't be used: {reason}. {_HELP}")


class Tracker:
    """Sends metrics to a run of W&B.

    Each line of metrics.jsonl is a row there, once. After a kill a run repeats the steps since its
    checkpoint, with the same results: rows of these that W&B has already are not sent again.

    No failure in the middle of a run ends it: a warning says that nothing is sent any more.

    Args:
      project: config.tracking.wandb.
      workdir: the run directory.
      config: the configuration, which W&B shows.
      lines: those of metrics.jsonl up to the step that the run goes on from.
      repeated: those after it, from before a kill.

    Raises:
      ValueError: W&B can't be reached, or refuses.
    """

    def __init__(
        self,
        project: str,
        workdir: epath.Path,
        config: Mapping,
        lines: Sequence[dict],
        repeated: Sequence[dict],
    ):
        import wandb

        run_id, is_known = _run_id(workdir, project)
        entity, _, name = project.rpartition("/")
        is_local = "://" not in str(workdir)
        try:
            self._run = wandb.init(
                entity=entity or None,
                project=name,
                id=run_id,
                name=workdir.name,
                resume="allow",
                config=dict(config),
                allow_val_change=True,  # of what a run may change when it goes on
                dir=str(workdir) if is_local else None,
                # A run directory has no links in it (files.check_tree), and the terminal is left to
                # the progress line.
                settings=wandb.Settings(
                    symlink=False, console="off", finish_timeout=FINISH_SECONDS
                ),
            )
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
            last_step = self._last_step_sent(is_known)
        except Exception as error:
            raise _refused(project, error) from None
        identity = json.dumps({"id": run_id, "project": project}) + "\n"
        files.write_whole(workdir / ID_FILE, identity)

        # W&B numbers rows, and takes none whose number is below its last one. Files that were
        # written offline begin at 0 each time.
        num_before = len(lines) + len(repeated) if is_known else 0
        self._row = max(self._run.step, num_before)
        self._sent = {_identity(line) for line in repeated if line["step"] <= last_step}
        for line in lines:
            if line["step"] > last_step:
                self.write(line)

    def _last_step_sent(self, is_known: bool) -> float:
        """The last step that W&B has a row of; inf where only this machine could know."""
        if self._run.resumed:
            return self._run.summary.get("step", math.inf)
        return math.inf if is_known and self._run.offline else -math.inf

    def write(self, line: Mapping) -> None:
        """Sends a line of metrics.jsonl: its numbers."""
        if self._run is None or _identity(line) in self._sent:
            return
        row = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        try:
            self._run.log(row, step=self._row, commit=True)
        except Exception as error:
            self._run = None
            logging.warning("Weights & Biases gets no more metrics in this start: %s", error)
        self._row += 1

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            logging.warning("Weights & Biases may lack the last metrics: %s", error)


def _run_id(workdir: epath.Path, project: str) -> tuple[str, bool]:
    """Returns (the id of the run at W&B, whether it was there at an earlier start)."""
    path = workdir / ID_FILE
    if path.exists():
        known = files.read_json(path)
        run_id = known.get("id")
        if not (isinstance(run_id, str) and re.fullmatch(r"[\w-]{1,64}", run_id)):
            raise ValueError(f"{path} has the id {run_id!r}; wanted letters and digits. Remove it")
        if known.get("project") == project:
            return run_id, True
    return secrets.token_hex(4), False


def _identity(line: Mapping) -> tuple:
    """What tells a line from the others: its step, and what measured it, training or an eval.

    Its metrics don't: the first line after a start has no speed.
    """
    sources = set()
    for name in line:
        parts = name.split("/")
        sources.add("/".join(parts[:2]) if parts[0] == "eval" else parts[0])
    return (line["step"], *sorted(sources))
