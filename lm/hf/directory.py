"""Directories of Hugging Face checkpoints: config.json, safetensors in one or many files, the
tokenizer's files. Nothing is downloaded, no code of theirs is run.
"""

import collections
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.hf import families, safetensors
from lm.hf.families import Family, Tensor

INDEX = "model.safetensors.index.json"


def is_checkpoint(directory) -> bool:
    """Whether there is a config.json that names a model_type; a run's own names none."""
    try:
        return "model_type" in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def progress_line(what: str) -> Callable[[int, int], None]:
    """A line on stderr that grows: the share of the bytes done."""
    shown = [-1]

    def show(done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if percent != shown[0] and jax.process_index() == 0:
            shown[0] = percent
            end = "\n" if done == total else ""
            print(
                f"\r{what}: {percent}% of {total / 1e9:.2f} GB",
                end=end,
                file=sys.stderr,
                flush=True,
            )

    return show


class Source:
    """A checkpoint directory, its headers read and checked.

    Raises:
      ValueError: what is missing, unknown, twice there or of another shape than config.json says;
        pickled weights.
    """

    def __init__(self, directory):
        self.directory = directory = Path(directory)
        try:
            self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        except FileNotFoundError:
            raise ValueError(
                f"{directory} has no config.json; wanted the directory of a Hugging Face checkpoint"
            ) from None
        except ValueError as error:
            raise ValueError(f"{directory}/config.json is not JSON: {error}") from None
        try:
            self.family = families.family_of(self.config)
            self.fields = families.read_config(self.config)
        except ValueError as error:
            raise ValueError(f"{directory}/{error}") from None
        self.entries = _entries(directory)
        self._drop_prefix()

    def _drop_prefix(self) -> None:
        """Some checkpoints are of the body alone, whose names lack its prefix."""
        prefix = self.family.prefix
        self.bare = bool(prefix) and not any(name.startswith(prefix) for name in self.entries)
        if self.bare:
            heads = {row.theirs for row in self.family.tensors if not row.theirs.startswith(prefix)}
            self.entries = {
                name if name in heads else prefix + name: entry
                for name, entry in self.entries.items()
            }

    def dtype(self) -> str:
        """The dtype that holds all of its weights exactly: bfloat16 if all are, else float32."""
        dtypes = {
            str(entry.dtype)
            for name, entry in self.entries.items()
            if not re.search(self.family.buffers, name)
        }
        return "bfloat16" if dtypes == {"bfloat16"} else "float32"

    def record(self) -> dict[str, Any]:
        """What `save_as` needs: config.json, and each tensor's dtype and file by the name that it
        has there.
        """
        prefix = self.family.prefix if self.bare else ""
        return {
            "config": self.config,
            "tensors": {
                name.removeprefix(prefix): [safetensors.NAMES[entry.dtype], entry.path.name]
                for name, entry in self.entries.items()
            },
        }

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError unless the tensors are those of a model with these parameters (path ->
        shape).
        """
        wanted = _their_shapes(self.family, shapes)
        tied = "head/table" not in shapes
        extra = [
            name
            for name in self.entries
            if name not in wanted and not re.search(self.family.buffers, name)
        ]
        if tied:
            extra = [name for name in extra if name not in _named(self.family, "head/table")]
        where = f"{self.directory}: a {self.family.name} of config.json's sizes"
        if missing := [name for name in wanted if name not in self.entries]:
            raise ValueError(
                f"{where} needs {len(missing)} tensor(s) that are not there: {_some(missing)}; "
                f"there are {_some(list(self.entries))}"
            )
        if extra:
            raise ValueError(
                f"{where} has no tensor(s) {_some(extra)}: what they are for would be lost"
            )
        if wrong := [
            f"{name} {list(self.entries[name].shape)}, wanted {list(shape)}"
            for name, shape in wanted.items()
            if self.entries[name].shape != shape
        ]:
            raise ValueError(f"{where}: {_some(wrong)}")
        if tied:
            table, heads = (
                _named(self.family, "embed/table")[0],
                [n for n in _named(self.family, "head/table") if n in self.entries],
            )
            if heads and not np.array_equal(
                self.entries[table].read(), self.entries[heads[0]].read()
            ):
                raise ValueError(
                    f"{self.directory}: tie_word_embeddings is set, but {heads[0]} is not {table}"
                )

    def load(self, abstract, progress: Callable[[int, int], None] = lambda done, total: None):
        """The parameters, on their devices. Beside them there is one tensor in memory, and where
        devices have memory of their own, this process's part of one stack of layers.

        Args:
          abstract: tree of ShapeDtypeStructs with shardings.
          progress: called with the bytes read and those there are.
        """
        flat = _flat(abstract)
        shapes = {path: leaf.shape for path, leaf in flat.items()}
        self.check(shapes)
        heads = self.fields["num_heads"]
        by_path = collections.defaultdict(list)
        for place in families.places(self.family, shapes):
            by_path[place.row.ours].append(place)
        total, done, arrays = (
            sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in flat.values()),
            0,
            {},
        )
        for path, leaf in flat.items():
            devices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
            # devices with the same part share one buffer
            parts = {str(index): index for index in devices.values()}
            buffers = {
                key: _aligned(_part_shape(leaf.shape, index), leaf.dtype)
                for key, index in parts.items()
            }
            within = {
                key: [range(size)[part] for size, part in zip(leaf.shape, index)]
                for key, index in parts.items()
            }
            for row, at, name in by_path[path]:
                shape = leaf.shape[len(at) :]
                having = [
                    key for key in parts if all(i in taken for i, taken in zip(at, within[key]))
                ]
                array = to_ours(row, self.entries[name].read(), shape, heads) if having else None
                for key in having:
                    inside = tuple(taken.index(i) for i, taken in zip(at, within[key]))
                    safetensors.copy(buffers[key][inside], array[parts[key][len(at) :]])
                done += math.prod(shape) * leaf.dtype.itemsize
                progress(done, total)
            on_devices = [
                jax.device_put(buffers[str(index)], device) for device, index in devices.items()
            ]
            arrays[path] = jax.make_array_from_single_device_arrays(
                leaf.shape, leaf.sharding, on_devices
            )
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path in flat])


def _aligned(shape, dtype) -> np.ndarray:
    """An empty array that a CPU device takes over as it is, instead of copying it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _part_shape(shape, index) -> tuple[int, ...]:
    return tuple(len(range(size)[part]) for size, part in zip(shape, index))


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _named(family: Family, path: str) -> list[str]:
    return [row.theirs for row in family.tensors if row.ours == path]


def _entries(directory: Path) -> dict[str, safetensors.Entry]:
    """All tensors of a directory's files."""
    index = directory / INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} can't be read ({type(error).__name__}: {error}); wanted JSON with a "
                "weight_map of tensors to files"
            ) from None
        if bad := [name for name in files if not isinstance(name, str) or Path(name).name != name]:
            raise ValueError(f"{index} names {bad}; wanted files in the same directory")
        if gone := [name for name in files if not (directory / name).exists()]:
            raise ValueError(
                f"{directory} lacks {_some(gone)}, which {INDEX} names; copy the whole directory"
            )
    else:
        weight_map, files = None, sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            pickled = sorted(path.name for path in directory.glob("*.bin")) + sorted(
                path.name for path in directory.glob("*.pt")
            )
            raise ValueError(
                f"{directory} has no safetensors"
                + (
                    f", but pickled weights ({_some(pickled)}), which can run any code when they "
                    "are read, so they are not. Where you trust them, transformers' "
                    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes "
                    "safetensors"
                    if pickled
                    else ""
                )
            )
        if len(files) > 1:
            raise ValueError(
                f"{directory} has {_some(files)}, but no {INDEX} that says what belongs together"
            )
    found: dict[str, safetensors.Entry] = {}
    for name in files:
        for tensor, entry in safetensors.entries(directory / name).items():
            if tensor in found:
                raise ValueError(
                    f"{directory}: tensor {tensor} is in {found[tensor].path.name} and in {name}"
                )
            found[tensor] = entry
    if weight_map is not None:
        if moved := [
            name
            for name, file in weight_map.items()
            if name not in found or found[name].path.name != file
        ]:
            raise ValueError(
                f"{directory}: {INDEX} names tensors that their files don't have: {_some(moved)}"
            )
    return found


def _split(row: Tensor, array_shape, heads: int) -> tuple[tuple[int, ...], int]:
    """The shape in which a fused tensor's parts have a dim of their own, and which dim that is."""
    axis = len(array_shape) - 1 if row.layout == "conv1d" else 0
    groups, parts = heads if row.per_head else 1, row.part[1]
    return (
        *array_shape[:axis],
        groups,
        parts,
        array_shape[axis] // (groups * parts),
        *array_shape[axis + 1 :],
    ), axis + 1


def to_ours(row: Tensor, array: np.ndarray, shape: tuple[int, ...], heads: int) -> np.ndarray:
    """Our parameter (of one layer) out of their tensor; a view where it can be."""
    if row.part[1] > 1:
        split, axis = _split(row, array.shape, heads)
        array = np.take(array.reshape(split), row.part[0], axis)
        array = array.reshape(*array.shape[: axis - 1], -1, *array.shape[axis + 1 :])
    return (array.T if row.layout == "linear" else array).reshape(shape)


def to_theirs(group: list[tuple[Tensor, np.ndarray]], heads: int) -> np.ndarray:
    """Their tensor out of our parameters, one or those that it fuses."""
    arrays = []
    for row, array in sorted(group, key=lambda item: item[0].part):
        if row.layout == "table":
            flat = array
        elif row.layout == "vector":
            flat = array.reshape(-1)
        else:
            flat = array.reshape(math.prod(array.shape[: row.inputs]), -1)
            flat = flat.T if row.layout == "linear" else flat
        arrays.append(flat)
    row = group[0][0]
    if row.part[1] == 1:
        return arrays[0]
    shape = list(arrays[0].shape)
    axis = len(shape) - 1 if row.layout == "conv1d" else 0
    groups = heads if row.per_head else 1
    apart = [a.reshape(*shape[:axis], groups, -1, *shape[axis + 1 :]) for a in arrays]
    return np.stack(apart, axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])


def _grouped(family: Family, shapes) -> dict[str, list[families.Place]]:
    """Their tensors in order, each with the places that it is made of."""
    groups = collections.defaultdict(list)
    for place in families.places(family, shapes):
        groups[place.theirs].append(place)
    return groups


def _their_shapes(family: Family, shapes) -> dict[str, tuple[int, ...]]:
    """name -> shape of every tensor of a model with these parameters."""
    found = {}
    for name, group in _grouped(family, shapes).items():
        row, at, _ = group[0]
        whole = shapes[row.ours][len(at) :]
        sizes = math.prod(whole[: row.inputs]), math.prod(whole[row.inputs :]) * row.part[1]
        found[name] = {
            "table": tuple(whole),
            "vector": (math.prod(whole) * row.part[1],),
            "conv1d": sizes,
            "linear": sizes[::-1],
        }[row.layout]
    return found


def their_tensors(family: Family, params, heads: int) -> dict[str, Callable[[], np.ndarray]]:
    """name -> a function that makes that tensor of theirs out of our parameters, in the order of
    the layers.
    """
    flat = _flat(params)
    part = lambda place: (place.row, np.asarray(flat[place.row.ours][place.index]))
    return {
        name: functools.partial(
            lambda group: to_theirs([part(place) for place in group], heads), group
        )
        for name, group in _grouped(
            family, {path: leaf.shape for path, leaf in flat.items()}
        ).items()
    }


def save(
    directory: Path,
    family: Family,
    fields: Mapping[str, Any],
    params,
    *,
    token_ids: Mapping[str, int | None],
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a checkpoint that transformers loads: config.json and safetensors, each tensor in its
    parameter's dtype.

    Args:
      token_ids: bos_token_id, eos_token_id and pad_token_id.
      shard_bytes: of a file, at most (a tensor is never cut).

    Raises:
      ValueError: the family has no such model.
    """
    flat = _flat(params)
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    dtypes = {
        name: np.dtype(flat[group[0].row.ours].dtype)
        for name, group in _grouped(family, shapes).items()
    }
    about = {name: (dtypes[name], shape) for name, shape in _their_shapes(family, shapes).items()}
    config = (
        families.write_config(family, fields)
        | token_ids
        | {"torch_dtype": "bfloat16" if "bfloat16" in map(str, dtypes.values()) else "float32"}
    )
    shards: list[list[str]] = [[]]
    for name, size in (
        (name, dtype.itemsize * math.prod(shape)) for name, (dtype, shape) in about.items()
    ):
        if (
            shards[-1]
            and size + sum(about[n][0].itemsize * math.prod(about[n][1]) for n in shards[-1])
            > shard_bytes
        ):
            shards.append([])
        shards[-1].append(name)
    files = {
        "model.safetensors"
        if len(shards) == 1
        else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards)
    }
    _write(
        directory,
        config,
        files,
        about,
        their_tensors(family, params, fields["num_heads"]),
        progress,
    )


def save_as(
    directory: Path,
    original: Mapping[str, Any],
    fields: Mapping[str, Any],
    params,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a checkpoint back as it came: config.json, names, dtypes and files.

    Args:
      original: `Source.record()` of the checkpoint that the parameters came from.

    Raises:
      ValueError: the parameters are of another model than that checkpoint's.
    """
    config, recorded = original["config"], original["tensors"]
    family = families.family_of(config)
    theirs = families.read_config(config)
    if wrong := [name for name in theirs if theirs[name] != fields[name]]:
        raise ValueError(
            "the model was changed since it was imported: "
            f"{', '.join(f'{name} = {fields[name]!r}, was {theirs[name]!r}' for name in wrong)}"
        )
    flat = _flat(params)
    shapes = _their_shapes(family, {path: leaf.shape for path, leaf in flat.items()})
    make = their_tensors(family, params, fields["num_heads"])
    table = _named(family, "embed/table")[0]
    for head in _named(family, "head/table"):  # tied, and there all the same
        if head in recorded and head not in make:
            make[head], shapes[head] = make[table], shapes[table]
    bare = lambda name: name if name in recorded else name.removeprefix(family.prefix)
    make, shapes = ({bare(name): value for name, value in d.items()} for d in (make, shapes))
    about = {
        name: (np.dtype(safetensors.DTYPES[recorded[name][0]]), shape)
        for name, shape in shapes.items()
    }
    files = collections.defaultdict(list)
    for name in recorded:
        if name in make:  # buffers are left out
            files[recorded[name][1]].append(name)
    _write(directory, config, files, about, make, progress)


def _flat(tree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _write(directory: Path, config, files: Mapping[str, list[str]], about, make, progress) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    total, done = sum(dtype.itemsize * math.prod(shape) for dtype, shape in about.values()), 0

    def arrays(names):
        nonlocal done
        for name in names:
            dtype, shape = about[name]
            yield make[name]().astype(dtype)
            done += dtype.itemsize * math.prod(shape)
            progress(done, total)

    for file, names in files.items():
        safetensors.write(directory / file, {name: about[name] for name in names}, arrays(names))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
