"""Checkpoints: Orbax, asynchronous, with a manifest that tells a whole one from a damaged one.

A checkpoint holds the train state as a flat dict of arrays (path -> array), and a JSON object:
stream states, metrics under way, the configuration, the tokenizer's files and the fingerprints.
"""

import base64
import json
import logging
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from lm.data import tokenizer as tokenizers

MANIFEST = "MANIFEST.json"
# Rewritten by Orbax when it commits a checkpoint, after the manifest is made; nothing of the run is
# in them.
_UNCHECKED = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")


def flatten(tree) -> dict[str, Any]:
    """{path: leaf}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def unflatten(flat: dict[str, Any], like):
    """The tree of `like`'s structure with the leaves of `flat`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(
        treedef, [flat[jax.tree_util.keystr(path, simple=True, separator="/")] for path, _ in paths]
    )


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax writes to absolute paths only."""
    return path if "://" in str(path) else path.resolve()


def _scan(directory: epath.Path) -> dict[str, list[int]]:
    """{file: [bytes, crc32]} of all files under a checkpoint."""
    found, files = {}, []
    folders = [directory]  # epath's rglob doesn't work on gs://
    while folders:
        for path in folders.pop().iterdir():
            (folders if path.is_dir() else files).append(path)
    for path in files:
        name = str(path.relative_to(directory))
        if name in _UNCHECKED:
            continue
        crc, size = 0, 0
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                crc, size = zlib.crc32(piece, crc), size + len(piece)
        found[name] = [size, crc]
    return found


def problems(directory: epath.Path) -> list[str]:
    """What is wrong with a finished checkpoint: files missing, changed, or a manifest that isn't
    there. [] if it is whole.
    """
    manifest = directory / MANIFEST
    try:
        wanted = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return [f"{MANIFEST} is missing or unreadable"]
    found = _scan(directory)
    return [
        f"{name}: "
        f"{'missing' if name not in found else 'changed' if name in wanted else 'not in the manifest'}"  # noqa: E501
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]


def steps(directory: epath.Path) -> list[int]:
    """Steps of the finished checkpoints in a directory, whole or not."""
    return (
        sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())
        if directory.exists()
        else []
    )


def newest_whole(
    directory: epath.Path, among: Sequence[int] | None = None
) -> tuple[int | None, dict[int, list[str]]]:
    """(step of the newest checkpoint that is whole, or None; {step: what is wrong} of those after
    it). The first process looks, which means reading a whole checkpoint, and the others wait for
    its word.

    Args:
      among: the steps to look at; None: all.
    """
    damaged, whole = {}, -1
    for step in (
        reversed(steps(directory) if among is None else among) if jax.process_index() == 0 else ()
    ):
        damaged[step] = problems(directory / str(step))
        if not damaged[step]:
            whole = step
            break
    whole = int(multihost_utils.broadcast_one_to_all(np.int32(whole)))
    return whole if whole >= 0 else None, {step: wrong for step, wrong in damaged.items() if wrong}


def _settle_replaced(directory: epath.Path) -> None:
    """Puts back a checkpoint that was set aside for a newer one of its step, or removes it if the
    newer one is whole.
    """
    for old in directory.glob("replaced-*") if jax.process_index() == 0 else ():
        new = directory / old.name.removeprefix("replaced-")
        if new.exists() and not problems(new):
            old.rmtree()
        else:
            if new.exists():
                new.rmtree()
            old.rename(new)


def _handlers():
    return ocp.handlers.create_default_handler_registry(
        state=ocp.PyTreeCheckpointHandler(use_compression=False), meta=ocp.JsonCheckpointHandler()
    )


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: the run's loop asks. Orbax would ask again, from a thread and for the step that it
        saves, and jax's agreement on a step takes the last one that it was asked about for where
        the process stands.
        """
        return False


class Checkpointer:
    """Saves and restores the checkpoints of a run: the newest `keep`, and the one with the lowest
    `best` metric.

    When it is made, damaged checkpoints after the newest whole one are moved aside (to
    damaged-STEP). With several processes the first looks, and the others wait for it.

    Raises:
      ValueError: there are checkpoints, but none is whole: starting over would overwrite the run.
    """

    def __init__(self, directory: epath.Path, *, keep: int, best: str = ""):
        directory = _absolute(directory)
        self._directory, self._best, self._saving = directory, best, None
        directory.mkdir(parents=True, exist_ok=True)
        _settle_replaced(directory)
        whole, damaged = newest_whole(directory)
        if whole is None and (found := steps(directory)):
            raise ValueError(
                f"{directory} has checkpoints {found}, but none can be read "
                f"({damaged.get(found[-1], ['see process 0'])[0]}). Not starting over at step 0: "
                "restore them from a copy, or take another --workdir."
            )
        for step, wrong in damaged.items():
            logging.warning(
                "checkpoint %d is damaged (%s); going back to %d", step, "; ".join(wrong[:3]), whole
            )
            aside = directory / f"damaged-{step}"
            if aside.exists():
                aside.rmtree()
            (directory / str(step)).rename(aside)
        multihost_utils.sync_global_devices("checkpoints looked through")
        policies = [checkpoint_managers.LatestN(keep)]
        # one of another metric, from before the config changed, is no rival
        measured = lambda metrics: metrics.get(best, math.inf)
        if best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=measured,
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        logging.getLogger("absl").addFilter(
            lambda record: "tracked_metric" not in record.getMessage()
        )
        self._manager = _Manager(
            directory,
            handler_registry=_handlers(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                # without it Orbax forgets metrics at a restart
                best_fn=measured if best else None,
                best_mode="min",
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def _write_manifest(self) -> None:
        """Runs in Orbax's thread, after the last file and before the rename that commits: manifest
        and checkpoint appear at once.
        """
        if jax.process_index() == 0:
            for path in self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                (path / MANIFEST).write_text(json.dumps(_scan(path)))

    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, state, meta: dict, metrics: dict[str, float]) -> None:
        """Starts saving; arrays may be donated right after. An error of an earlier save is raised
        here or in `wait`.

        Args:
          meta: JSON-able.
          metrics: the newest values; the checkpoint competes as the best one if `best` is among
            them, and finite.
        """
        self.wait()
        if step in self._manager.all_steps():
            self._set_aside(step)
        value = metrics.get(self._best, math.nan)
        self._saving = step
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(flatten(state)), meta=ocp.args.JsonSave(meta)
        )
        self._manager.save(
            step,
            args=arguments,
            metrics={self._best: float(value)} if math.isfinite(value) else None,
            force=True,
        )

    def _set_aside(self, step: int) -> None:
        """Makes room for a checkpoint that is saved again: the old one goes when the new one is
        whole.
        """
        if jax.process_index() == 0:
            (self._directory / str(step)).rename(self._directory / f"replaced-{step}")
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          OSError: it could not be written; the checkpoints before it are untouched.
        """
        try:
            self._manager.wait_until_finished()
            _settle_replaced(self._directory)
        except Exception as error:
            for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
                # it holds space that may be what is missing
                shutil.rmtree(path, ignore_errors=True)
            _settle_replaced(self._directory)
            self._manager.reload()
            kept = self._manager.latest_step()
            raise OSError(
                f"checkpoint {self._saving} could not be written to {self._directory}: "
                f"{str(error).splitlines()[0]}. "
                f"{'No checkpoint is' if kept is None else f'Checkpoint {kept} is whole and'} "
                "kept; free space and start again."
            ) from error

    def restore(self, step: int, abstract) -> tuple[Any, dict]:
        """(state, meta) of a checkpoint.

        Args:
          abstract: ShapeDtypeStructs with the shardings wanted, of any mesh.

        Raises:
          ValueError: other parameters, shapes or dtypes than the checkpoint's.
        """
        state = _restore_arrays(self._manager, step, abstract, "state")
        return state, self.meta(step)

    def meta(self, step: int) -> dict:
        return self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _restore_arrays(manager: ocp.CheckpointManager, step: int, abstract, what: str):
    """The arrays of a checkpoint that `abstract` (a tree, or part of one) names, after checking
    that they are there and fit.
    """
    wanted = flatten(abstract)
    stored = manager.item_metadata(step).state.tree
    for path, leaf in wanted.items():
        if path not in stored:
            raise ValueError(
                f"checkpoint {step} in {manager.directory} has no {path!r}; it has "
                f"{sorted(stored)[:20]}"
            )
        if tuple(stored[path].shape) != tuple(leaf.shape) or stored[path].dtype != leaf.dtype:
            raise ValueError(
                f"checkpoint {step} in {manager.directory}: {path} is "
                f"{stored[path].dtype}{list(stored[path].shape)} there, and this {what} has "
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


def restore_weights(
    workdir: epath.Path, wanted: Callable[[dict], Any], *, averaged: bool, step: int | None = None
) -> tuple[Any, int]:
    """(parameters, step) of the newest whole checkpoint of a run, or that of `step`. The run is
    left as it is.

    Args:
      wanted: called with the checkpoint's meta before anything else is read; gives the abstract
        parameters, or raises.
      averaged: take the moving average where the run kept one.

    Raises:
      ValueError: there is none, or it is damaged, its parameters don't fit, or a kill left a newer
        one set aside.
    """
    directory = _absolute(workdir / "checkpoints")
    whole, damaged = newest_whole(
        directory, None if step is None else [step] if step in steps(directory) else []
    )
    if step is not None and whole is None:
        why = "; ".join(damaged.get(step, []))[:200] or f"there are {steps(directory)}"
        raise ValueError(f"{workdir} has no checkpoint of step {step} that can be read ({why})")
    aside = max(
        (int(p.name.removeprefix("replaced-")) for p in directory.glob("replaced-*")), default=-1
    )
    if step is None and aside > (-1 if whole is None else whole):
        raise ValueError(
            f"{workdir} is saving checkpoint {aside} again, or was when it was killed: wait, or "
            "start that run again, which puts it back"
        )
    if whole is None:
        raise ValueError(
            f"{workdir} has no checkpoint that can be read; wanted a run directory with "
            "checkpoints/ in it"
        )
    with ocp.CheckpointManager(
        directory,
        handler_registry=_handlers(),
        options=ocp.CheckpointManagerOptions(read_only=True),
    ) as manager:
        abstract_params = wanted(
            manager.restore(whole, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        )
        stored = manager.item_metadata(whole).state.tree
        if not averaged or not any(path.startswith("opt_state/ema/") for path in stored):
            return _restore_arrays(manager, whole, {"params": abstract_params}, "model")[
                "params"
            ], whole
        f32 = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding),
            abstract_params,
        )
        average = _restore_arrays(manager, whole, {"opt_state": {"ema": f32}}, "model")[
            "opt_state"
        ]["ema"]
        return jax.tree.map(lambda e, p: e.astype(p.dtype), average, abstract_params), whole


def pack_tokenizer(tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """The tokenizer's files as base64, for a checkpoint's meta."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(epath.Path(folder))
        return {
            p.name: base64.b64encode(p.read_bytes()).decode() for p in epath.Path(folder).iterdir()
        }


def unpack_tokenizer(files: dict[str, str]) -> tokenizers.Tokenizer:
    """The tokenizer out of a checkpoint's meta."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (epath.Path(folder) / epath.Path(name).name).write_bytes(base64.b64decode(data))
        return tokenizers.load(folder)
