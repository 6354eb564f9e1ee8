"""Weights & Biases: a run there gets the lines of metrics.jsonl, and goes on as this one does."""

import importlib.util
import json
import logging
import math
import pathlib
import re
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence

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

        run_id = _run_id(workdir, project)
        entity, _, name = project.rpartition("/")
        try:
            self._run = wandb.init(
                entity=entity or None,
                project=name,
                id=run_id,
                name=workdir.name,
                resume="allow",
                config=dict(config),
                allow_val_change=True,  # of what a run may change when it goes on
                # Its own files go to ./wandb or WANDB_DIR: it makes links, which a run directory
                # has none of (files.check_tree). The terminal is left to the progress line.
                settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
            )
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
            # W&B numbers rows, and takes none whose number is below its last one.
            last_step, self._row = self._what_is_there()
        except Exception as error:
            raise _refused(project, error) from None
        identity = json.dumps({"id": run_id, "project": project}) + "\n"
        files.write_whole(workdir / ID_FILE, identity)

        self._sent = {_identity(line) for line in repeated if line["step"] <= last_step}
        for line in lines:
            if line["step"] > last_step:
                self.write(line)

    def _what_is_there(self) -> tuple[float, int]:
        """Returns (the last step that W&B has a row of, the number of the next row).

        A kill takes rows with it that W&B had been given seconds before.
        """
        if self._run.offline:
            folder = pathlib.Path(self._run.settings.wandb_dir)
            rows = []
            for path in sorted(folder.glob(f"offline-run-*-{self._run.id}/*.wandb")):
                rows += _rows(path.read_bytes())
            last_step = max((row.get("step", -math.inf) for row in rows), default=-math.inf)
            return last_step, max((row["_step"] + 1 for row in rows), default=0)
        if self._run.resumed:
            return self._run.summary.get("step", -math.inf), self._run.step
        return -math.inf, self._run.step

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


def _rows(content: bytes) -> Iterator[dict]:
    """The rows in a .wandb file, which W&B writes offline.

    It is a log as LevelDB has them: 7 bytes, then blocks of 32 KiB. In a block are pieces of
    records, each with a checksum, its size and its kind in front. A kill cuts the last one.
    """
    from wandb.proto import wandb_internal_pb2

    place, record = 7, b""
    while place + 7 <= len(content):
        left_in_block = 2**15 - place % 2**15
        if left_in_block < 7:
            place += left_in_block
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        is_end = kind in (1, 4)  # a whole record, or its last piece
        if is_end and place <= len(content):
            items = wandb_internal_pb2.Record.FromString(record).history.item
            if items:
                yield {
                    item.key or item.nested_key[0]: json.loads(item.value_json) for item in items
                }
        if is_end:
            record = b""


def _run_id(workdir: epath.Path, project: str) -> str:
    """The id of the run at W&B: that of the run's earlier starts, or a new one."""
    path = workdir / ID_FILE
    if path.exists():
        known = files.read_json(path)
        run_id = known.get("id")
        if not (isinstance(run_id, str) and re.fullmatch(r"[\w-]{1,64}", run_id)):
            raise ValueError(f"{path} has the id {run_id!r}; wanted letters and digits. Remove it")
        if known.get("project") == project:
            return run_id
    return secrets.token_hex(4)


def _identity(line: Mapping) -> tuple:
    """What tells a line from the others: its step, and what measured it, training or an eval.

    Its metrics don't: the first line after a start has no speed.
    """
    sources = set()
    for name in line:
        parts = name.split("/")
        sources.add("/".join(parts[:2]) if parts[0] == "eval" else parts[0])
    return (line["step"], *sorted(sources))
