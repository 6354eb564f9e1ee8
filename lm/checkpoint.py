"""Checkpoints: Orbax, asynchronous, with a manifest that tells an intact one from a damaged one.

A checkpoint holds the train state as a flat dict of arrays (path -> array), and a JSON object, its
meta: stream states, metrics under way, the configuration, the tokenizer's files and the
fingerprints.

Several processes make the same calls in the same order. The first one alone looks for damage and
renames folders, and the others wait for it.
"""

import base64
import contextlib
import json
import logging
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from lm import files
from lm.data import tokenizer as tokenizers

MANIFEST = "MANIFEST.json"
SMALL_BYTES = 2**26  # nobody runs out of memory for less
# Rewritten by Orbax when it commits a checkpoint, after the manifest is made; nothing of the run is
# in them.
_UNCHECKED = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")


# --- trees as flat dicts ---


def flatten(tree) -> dict[str, Any]:
    """Returns {path: leaf}, the keys of a path joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_path_name(path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any], like):
    """Returns the tree of `like`'s structure with the leaves of `flat`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    leaves = [flat[_path_name(path)] for path, _ in paths]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# --- directories of checkpoints ---


def steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the finished checkpoints in a directory, intact or not, in order."""
    if not directory.exists():
        return []
    # Orbax's temporary folders, and those set aside here, have names that are no numbers.
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def newest_meta(directory: epath.Path) -> tuple[int, dict]:
    """The step and the meta of the newest checkpoint in a directory, not held against its manifest:
    to be shown. (0, {}) without checkpoints, or where Orbax keeps it elsewhere.

    Raises:
      ValueError: it is damaged.
    """
    existing = steps(directory)
    path = directory / str(max(existing, default=0)) / "meta" / "metadata"
    if not existing or not path.exists():
        return 0, {}
    return existing[-1], files.read_json(files.check_sized(path))


def problems(directory: epath.Path) -> list[str]:
    """Returns what is wrong with a finished checkpoint; [] if it is intact.

    Files may be missing, changed or not in the manifest, or there is no manifest.
    """
    try:
        wanted = files.read_json(directory / MANIFEST)
    except (OSError, ValueError):
        return [f"{MANIFEST} is missing or unreadable"]

    actual = _checksums(directory)
    messages = []
    for name in sorted(wanted.keys() | actual.keys()):
        if name not in actual:
            messages.append(f"{name}: missing")
        elif name not in wanted:
            messages.append(f"{name}: not in the manifest")
        elif wanted[name] != actual[name]:
            messages.append(f"{name}: changed")
    return messages


def _checksums(directory: epath.Path) -> dict[str, list[int]]:
    """{file: [bytes, crc32]} of all files under a checkpoint, as the manifest has them."""
    # epath's rglob doesn't work on gs://.
    files.check_tree(directory)
    folders = [directory]
    paths = []
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            else:
                paths.append(path)

    checksums = {}
    for path in paths:
        name = str(path.relative_to(directory))
        if name not in _UNCHECKED:
            checksums[name] = _checksum(path)
    return checksums


def _checksum(path: epath.Path) -> list[int]:
    """[bytes, crc32] of a file."""
    size = 0
    crc = 0
    with path.open("rb") as file:
        # In pieces of 4 MiB: a file may be larger than memory.
        while piece := file.read(1 << 22):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return [size, crc]


def _newest_intact(
    directory: epath.Path, candidates: Sequence[int] | None = None
) -> tuple[int | None, dict[int, list[str]]]:
    """Finds the newest checkpoint that is intact.

    Args:
      candidates: the steps to look at, in order; None: all.

    Returns:
      Its step, or None, and {step: problems} of the damaged ones after it. The latter is empty on
      all processes but the first.
    """
    # -1 is none: arrays can be broadcast, None can't.
    newest = -1
    damaged = {}

    # Looking means reading whole checkpoints: the first process does, the others wait for its word.
    if jax.process_index() == 0:
        for step in reversed(steps(directory) if candidates is None else candidates):
            messages = problems(directory / str(step))
            if not messages:
                newest = step
                break
            damaged[step] = messages

    newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    return newest if newest >= 0 else None, damaged


def _recover_replaced(directory: epath.Path) -> None:
    """Decides between a checkpoint that was set aside and the newer one of its step.

    The newer one stays if it is intact; else the old one goes back to its place.
    """
    if jax.process_index() != 0:
        return
    for old in directory.glob("replaced-*"):
        new = directory / old.name.removeprefix("replaced-")
        if new.exists() and not problems(new):
            old.rmtree()
        else:
            if new.exists():
                new.rmtree()
            old.rename(new)


def _set_damaged_aside(directory: epath.Path) -> None:
    """Renames damaged checkpoints after the newest intact one to damaged-STEP, and removes those
    that were renamed earlier once the run is past them.

    Raises:
      ValueError: there are checkpoints, but none is intact.
    """
    intact, damaged = _newest_intact(directory)
    if intact is None:
        existing = steps(directory)
        if not existing:
            return
        first_problem = damaged.get(existing[-1], ["see process 0"])[0]
        raise ValueError(
            f"{directory} has checkpoints {existing}, but none can be read ({first_problem}). "
            "Not starting over at step 0: restore them from a copy, or take another --workdir."
        )

    for step, messages in damaged.items():
        logging.warning(
            "checkpoint %d is damaged (%s); going back to %d", step, "; ".join(messages[:3]), intact
        )
        aside = directory / f"damaged-{step}"
        if aside.exists():
            aside.rmtree()
        (directory / str(step)).rename(aside)

    # What the run has passed since is of no use to anybody.
    for aside in directory.glob("damaged-*") if jax.process_index() == 0 else ():
        step = aside.name.removeprefix("damaged-")
        if step.isdecimal() and int(step) < intact:
            aside.rmtree()


def _absolute(path: epath.Path) -> epath.Path:
    """The path as Orbax wants it: it writes to absolute ones only."""
    return path if "://" in str(path) else path.resolve()


# --- a run's own checkpoints ---


class Checkpointer:
    """Saves and restores the checkpoints of a run: the newest `keep`, and the one with the lowest
    (or `highest`) `best` metric.

    When it is made, damaged checkpoints after the newest intact one are moved aside (to
    damaged-STEP). With several processes the first looks, and the others wait for it.

    Raises:
      ValueError: there are checkpoints, but none is intact: starting over would overwrite the run.
    """

    def __init__(self, directory: epath.Path, *, keep: int, best: str = "", highest: bool = False):
        self._directory = _absolute(directory)
        self._best = best
        self._sign = -1 if highest else 1
        self._saving = None  # the step of the last save

        # A kill may have left anything: the directory is put in order before Orbax reads it.
        self._directory.mkdir(parents=True, exist_ok=True)
        _recover_replaced(self._directory)
        _set_damaged_aside(self._directory)
        multihost_utils.sync_global_devices("checkpoints looked through")

        logging.getLogger("absl").addFilter(_is_not_about_metrics)
        self._manager = _Manager(
            self._directory, handler_registry=_handlers(), options=self._options(keep)
        )

    def _options(self, keep: int) -> ocp.CheckpointManagerOptions:
        policies = [checkpoint_managers.LatestN(keep)]
        if self._best:
            best_one = checkpoint_managers.BestN(
                get_metric_fn=self._metric,
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(best_one)

        return ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            # Without best_fn Orbax forgets metrics at a restart.
            best_fn=self._metric if self._best else None,
            best_mode="min",
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )

    def _metric(self, metrics: dict[str, float]) -> float:
        # A checkpoint with another metric, from before the config changed, is no rival.
        return self._sign * metrics.get(self._best, self._sign * math.inf)

    def _write_manifest(self) -> None:
        """Runs in Orbax's thread, after the last file and before the rename that commits: manifest
        and checkpoint appear at once.
        """
        if jax.process_index() == 0:
            for path in self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                (path / MANIFEST).write_text(json.dumps(_checksums(path)))

    def latest(self) -> int | None:
        """Returns the newest intact checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state, meta: dict, metrics: dict[str, float]) -> None:
        """Starts saving; arrays may be donated right after.

        Args:
          meta: JSON-able.
          metrics: the newest values; the checkpoint competes as the best one if `best` is among
            them, and finite.

        Raises:
          OSError: an earlier save failed, see `wait`.
        """
        self.wait()
        if step in self._manager.all_steps():
            self._set_aside(step)

        value = metrics.get(self._best, math.nan)
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(flatten(state)), meta=ocp.args.JsonSave(meta)
            ),
            metrics={self._best: float(value)} if math.isfinite(value) else None,
            # When to save is the run's decision, not Orbax's.
            force=True,
        )

    def _set_aside(self, step: int) -> None:
        """Makes room for a checkpoint that is saved again: the old one goes when the new one is
        intact.
        """
        if jax.process_index() == 0:
            (self._directory / str(step)).rename(self._directory / f"replaced-{step}")
        multihost_utils.sync_global_devices(f"set aside {step}")
        # Orbax keeps a list of its own, and would refuse a step that is on it.
        self._manager.reload()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          OSError: it could not be written; the checkpoints before it are untouched.
        """
        try:
            self._manager.wait_until_finished()
            _recover_replaced(self._directory)
        except Exception as error:
            # What was half written may hold the very space that is missing.
            for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
            _recover_replaced(self._directory)
            self._manager.reload()

            latest = self._manager.latest_step()
            outcome = "No checkpoint is" if latest is None else f"Checkpoint {latest} is whole and"
            # TensorStore adds its whole configuration.
            reason = str(error).splitlines()[0].partition(" [tensorstore_spec=")[0]
            advice = "make the directory writable" if "ead-only" in reason else "free space"
            raise OSError(
                f"checkpoint {self._saving} could not be written to {self._directory}: {reason}. "
                f"{outcome} kept; {advice} and start again."
            ) from error

    def restore(self, step: int, abstract) -> Any:
        """Returns the state of a checkpoint.

        Args:
          abstract: ShapeDtypeStructs with the shardings wanted, of any mesh.

        Raises:
          ValueError: other parameters, shapes or dtypes than the checkpoint's.
        """
        return _restore_arrays(self._manager, step, abstract, "state")

    def meta(self, step: int) -> dict:
        """Returns the JSON object of a checkpoint. Raises ValueError if it can't be read."""
        return _restore_meta(self._manager, step)

    def close(self) -> None:
        """Waits for the last save, and ends Orbax's threads."""
        self.wait()
        self._manager.close()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which leaves preemption to the run's loop."""

    def reached_preemption(self, step: int) -> bool:
        """Never: the run's loop asks for itself. Orbax would ask from its own thread, about the
        step it saves, and jax takes the last step asked about for the one the process is at.
        """
        return False


def _handlers():
    return ocp.handlers.create_default_handler_registry(
        state=ocp.PyTreeCheckpointHandler(use_compression=False), meta=ocp.JsonCheckpointHandler()
    )


def _is_not_about_metrics(record: logging.LogRecord) -> bool:
    """Drops Orbax's warning at each checkpoint that was saved without the best metric."""
    return "tracked_metric" not in record.getMessage()


def _restore_meta(manager: ocp.CheckpointManager, step: int) -> dict:
    """The meta of a checkpoint. Raises ValueError if it can't be read."""
    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        meta = f"{type(error).__name__}: {error}"
    if not isinstance(meta, dict):
        raise ValueError(
            f"the metadata of checkpoint {step} in {manager.directory} can't be read: "
            f"{str(meta)[:200]}"
        )
    return meta


def _restore_arrays(manager: ocp.CheckpointManager, step: int, abstract, what: str):
    """The arrays of a checkpoint that `abstract` (a tree, or part of one) names.

    Raises:
      ValueError: they are not in the checkpoint, or have other shapes or dtypes; `what` is what the
        message calls `abstract`.
    """
    wanted = flatten(abstract)
    stored = manager.item_metadata(step).state.tree
    for path, leaf in wanted.items():
        if path not in stored:
            raise ValueError(
                f"checkpoint {step} in {manager.directory} has no {path!r}; it has "
                f"{sorted(stored)[:20]}"
            )
        shape = tuple(stored[path].shape)
        dtype = stored[path].dtype
        if shape != tuple(leaf.shape) or dtype != leaf.dtype:
            raise ValueError(
                f"checkpoint {step} in {manager.directory}: {path} is "
                f"{dtype}{list(shape)} there, and this {what} has "
                f"{leaf.dtype}{list(leaf.shape)}"
            )

    arguments = ocp.args.PyTreeRestore(
        wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=len(wanted) < len(stored),
    )
    restored = manager.restore(step, args=ocp.args.Composite(state=arguments)).state
    assert all(isinstance(leaf, jax.Array) for leaf in restored.values())
    return unflatten(restored, abstract)


# --- reading a checkpoint of any run ---


class SavedCheckpoint:
    """A checkpoint of a run that is only read.

    Attributes:
      step: the step that it was saved at.
      meta: its JSON object.
    """

    def __init__(self, manager: ocp.CheckpointManager, step: int):
        self.step = step
        self.meta = _restore_meta(manager, step)
        self._manager = manager

    def paths(self) -> set[str]:
        """Returns the paths of the model's parameters: "embed/table"."""
        stored = self._manager.item_metadata(self.step).state.tree
        return {path.removeprefix("params/") for path in stored if path.startswith("params/")}

    def restore_params(self, abstract_params, *, averaged: bool):
        """Returns the model's parameters.

        Args:
          abstract_params: ShapeDtypeStructs with the shardings wanted, of any mesh.
          averaged: take the moving average where the run kept one.

        Raises:
          ValueError: other parameters, shapes or dtypes than the checkpoint's.
        """
        stored = self._manager.item_metadata(self.step).state.tree
        missing = sorted({f"params/{p}" for p in flatten(abstract_params)} - stored.keys())
        if "frozen" in self.meta and missing:
            raise ValueError(
                f"{self._manager.directory} has trained parameters only (config.train.trained), "
                f"not {missing[:3]}; the others are in {self.meta['frozen']['init_from']!r}. "
                "--mode=eval with the run's configuration takes them from there, --base names it "
                "to lm.generate, and python -m lm.convert merge makes a whole model"
            )
        self._check_size(abstract_params)
        has_average = any(path.startswith("opt_state/ema/") for path in stored)
        if not (averaged and has_average):
            abstract = {"params": abstract_params}
            return _restore_arrays(self._manager, self.step, abstract, "model")["params"]

        # The average is kept in f32, whatever the dtype of the parameters.
        abstract_average = jax.tree.map(_as_float32, abstract_params)
        abstract = {"opt_state": {"ema": abstract_average}}
        restored = _restore_arrays(self._manager, self.step, abstract, "model")
        average = restored["opt_state"]["ema"]
        return jax.tree.map(lambda mean, p: mean.astype(p.dtype), average, abstract_params)

    def _check_size(self, abstract_params) -> None:
        """Raises ValueError if the files are too small for the parameters.

        The sizes come from metadata, and arrays of such sizes would be made before anything is
        missed: what isn't in the files is 0.
        """
        wanted = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_params))
        directory = epath.Path(self._manager.directory) / str(self.step)
        stored = sum(size for size, _ in files.read_json(directory / MANIFEST).values())
        if wanted > 2 * stored + SMALL_BYTES:
            raise ValueError(
                f"{directory} has {stored / 1e9:.3f} GB, and its model would have "
                f"{wanted / 1e9:.3f} GB"
            )


@contextlib.contextmanager
def open_run(workdir: epath.Path, step: int | None = None) -> Iterator[SavedCheckpoint]:
    """Opens the newest intact checkpoint of a run, or that of `step`. The run is left as it is.

    Raises:
      ValueError: there is none, or it is damaged, or a kill left a newer one set aside.
    """
    directory = _absolute(workdir / "checkpoints")
    files.check_tree(directory)
    if step is None:
        step = _readable_newest(workdir, directory)
    else:
        _check_readable(workdir, directory, step)

    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(directory, handler_registry=_handlers(), options=options) as manager:
        yield SavedCheckpoint(manager, step)


def _check_readable(workdir: epath.Path, directory: epath.Path, step: int) -> None:
    """Raises ValueError if a run has no intact checkpoint of `step`."""
    existing = steps(directory)
    intact, damaged = _newest_intact(directory, [step] if step in existing else [])
    if intact is None:
        reason = "; ".join(damaged.get(step, []))[:200] or f"there are {existing}"
        raise ValueError(f"{workdir} has no checkpoint of step {step} that can be read ({reason})")


def _readable_newest(workdir: epath.Path, directory: epath.Path) -> int:
    """The step of a run's newest checkpoint.

    Raises:
      ValueError: none is intact, or a newer one lies aside.
    """
    intact, _ = _newest_intact(directory)

    # While a checkpoint is saved again its old copy lies aside, and may be the newest one. Then an
    # older one must not pass for it.
    aside = [int(path.name.removeprefix("replaced-")) for path in directory.glob("replaced-*")]
    newest_aside = max(aside, default=-1)
    if newest_aside > (-1 if intact is None else intact):
        raise ValueError(
            f"{workdir} is saving checkpoint {newest_aside} again, or was when it was killed: "
            "wait, or start that run again, which puts it back"
        )

    if intact is None:
        raise ValueError(
            f"{workdir} has no checkpoint that can be read; wanted a run directory with "
            "checkpoints/ in it"
        )
    return intact


def _as_float32(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)


# --- the meta of a run's checkpoint ---

# What lm reads of it. That of an import has no state of a run.
_MODEL_META = {
    "config": dict,
    "tokenizer": dict,
    "tokenizer.fingerprint": str,
    "tokenizer.vocab_size": int,
    "tokenizer.files": dict,
}
_RUN_META = {"streams": dict, "corpus": str, "interval": dict, "evals": dict}
_FROZEN_META = {"frozen.init_from": str, "frozen.fingerprint": str}  # where there is "frozen"


def check_meta(meta: dict, where: str, *, of_run: bool = False) -> None:
    """Checks that a checkpoint's meta has what lm reads of it, before any of it is used.

    Args:
      where: what errors call the checkpoint.
      of_run: a run is to go on from it.

    Raises:
      ValueError: keys are missing, or their values of another type; or it is that of an import,
        which no run can go on from.
    """
    if of_run and "streams" not in meta:
        raise ValueError(
            f"{where} has the checkpoint of an import, not of a run: train in another --workdir "
            f"with --config.init_from={where}"
        )
    wanted = _MODEL_META | (_RUN_META if of_run else {})
    wanted |= _FROZEN_META if "frozen" in meta else {}
    for path, kind in wanted.items():
        value = meta
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ValueError(
                f"the metadata of {where}'s checkpoint has {path} = {str(value)[:80]}; wanted a "
                f"{kind.__name__}"
            )


def tokenizer_to_meta(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Returns a checkpoint's meta["tokenizer"]: what names the tokenizer, and its files."""
    contents = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(epath.Path(folder))
        for path in epath.Path(folder).iterdir():
            contents[path.name] = base64.b64encode(path.read_bytes()).decode()
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "files": contents,
    }


def tokenizer_from_meta(saved: dict[str, Any]) -> tokenizers.Tokenizer:
    """Returns the tokenizer out of a checkpoint's meta["tokenizer"].

    Raises:
      ValueError: a file's name is a path, or see `lm.data.tokenizer.load`.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in saved["files"].items():
            name = files.check_name(name, "the tokenizer of a checkpoint")
            try:
                decoded = base64.b64decode(content)
            except (TypeError, ValueError) as error:
                raise ValueError(f"the file {name} in a checkpoint's tokenizer: {error}") from None
            (epath.Path(folder) / name).write_bytes(decoded)
        return tokenizers.load(folder)
