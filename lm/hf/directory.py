"""Directories of Hugging Face checkpoints: config.json, safetensors in one file or many.

Nothing is downloaded, and no code of a checkpoint is run. As in `lm.hf.families`, `hf_name` is
Hugging Face's name of a tensor, and `path` is that of our parameter.
"""

import collections
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lm import config as config_lib
from lm import files
from lm.hf import families, safetensors
from lm.hf.families import Family, ParamSlice, Tensor

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

# Fields of config.model that a run keeps where a checkpoint is of another type of model.
_KEPT_FIELDS = "param_dtype compute_dtype dropout attention_dropout remat scan_unroll".split()

# Called with the bytes done so far, and with all there are.
ProgressFn = Callable[[int, int], None]
# What a file says about a tensor: (dtype, shape).
TensorSpec = tuple[np.dtype, tuple[int, ...]]


def is_checkpoint(directory) -> bool:
    """Whether there is a config.json that names a model_type; that of a run names none. Or an
    adapter, which `Checkpoint` refuses.
    """
    if (directory / ADAPTER).exists():
        return True
    try:
        return "model_type" in files.read_json(directory / "config.json")
    except (OSError, ValueError):
        return False


# --- progress ---


def progress_line(label: str) -> ProgressFn:
    """Shows the share of the bytes done as a line on stderr that is written over."""
    last_percent = -1

    def show(done: int, total: int) -> None:
        nonlocal last_percent
        percent = 100 * done // max(total, 1)
        if percent == last_percent or jax.process_index() != 0:
            return
        last_percent = percent
        end = "\n" if done == total else ""
        text = f"\r{label}: {percent}% of {total / 1e9:.2f} GB"
        print(text, end=end, file=sys.stderr, flush=True)

    return show


def _no_progress(done: int, total: int) -> None:
    pass


class _ByteCounter:
    """Adds up bytes, and calls a ProgressFn with each new sum."""

    def __init__(self, progress: ProgressFn, total: int):
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._progress(self._done, self._total)


# --- reading ---


class Checkpoint:
    """A checkpoint directory whose config.json and headers have been read and checked.

    Attributes:
      config: config.json.
      family: the model's family.
      ignored: keys of config.json that it was read without.
      fields: those of our Config that config.json says.
      entries: hf_name -> entry of all tensors.

    Raises:
      ValueError: something is missing, unknown or there twice, or the weights are pickled.
    """

    def __init__(self, directory, ignored: Sequence[str] = ()):
        self.directory = Path(directory)
        _check_no_adapter(self.directory)
        self.config = _read_config_json(self.directory)
        self.ignored = tuple(ignored)
        try:
            self.family = families.family_of_config(self.config)
            self.fields = families.read_config(self.config, self.ignored)
        except ValueError as error:
            raise ValueError(f"{directory}/{error}") from None

        self.entries = {}
        for name, entry in _read_entries(self.directory).items():
            self.entries[_newer_name(name, self.family)] = entry
        self._check_sizes()
        self._lacks_prefix = self._add_missing_prefix()
        if self.family.tensors_decide:
            self._decide_by_tensors()

    def _check_sizes(self) -> None:
        """Raises ValueError for sizes that these files can't have, before anything of such a size
        is made.
        """
        total = sum(math.prod(entry.shape) for entry in self.entries.values())
        for field, limit in dict(
            num_layers=len(self.entries), embed_dim=total, mlp_dim=total, vocab_size=total
        ).items():
            if self.fields[field] > limit:
                raise ValueError(
                    f"{self.directory}/config.json says {field} = {self.fields[field]}, and the "
                    f"files hold {len(self.entries)} tensors of {total} numbers"
                )

    def _add_missing_prefix(self) -> bool:
        """Gives tensors their full names if this is a checkpoint of a model's body alone, whose
        names lack the prefix. Returns whether it is one.
        """
        prefix = self.family.body_prefix
        if not prefix or any(name.startswith(prefix) for name in self.entries):
            return False

        # Names outside of the body never had the prefix.
        outside = {row.hf_name for row in self.family.tensors}
        outside = {name for name in outside if not name.startswith(prefix)}
        entries = {}
        for name, entry in self.entries.items():
            entries[name if name in outside else prefix + name] = entry
        self.entries = entries
        return True

    def _decide_by_tensors(self) -> None:
        """Sets the fields that tensors say, and not config.json."""
        table, head = _hf_names(self.family, "embed/table")[0], "lm_head.weight"
        differs = False
        if head in self.entries and table in self.entries:
            tensors = self.entries[table].read(), self.entries[head].read()
            differs = not np.array_equal(*tensors)
        self.fields["tie_embeddings"] = not differs

        biases = _hf_names(self.family, "head_bias")
        if not any(name in self.entries for name in biases):
            parts = self.fields["bias"].split(",")
            self.fields["bias"] = ",".join(name for name in parts if name != "head")

    def model(self, config: ConfigDict) -> ConfigDict:
        """The config.model of this checkpoint. How it is executed and trained is as `config`, the
        config.model of a run, has it.
        """
        if self.family.model == config.type:
            changed = config.copy_and_resolve_references()
        else:
            changed = config_lib.model(self.family.model)
            changed.update({name: config[name] for name in _KEPT_FIELDS if name in config})
        changed.update(self.fields)
        return changed

    def dtype(self) -> str:
        """The dtype that holds all weights exactly: bfloat16 if all of them are, else float32."""
        dtypes = set()
        for name, entry in self.entries.items():
            if not self._is_buffer(name):
                dtypes.add(str(entry.dtype))
        return "bfloat16" if dtypes == {"bfloat16"} else "float32"

    def record(self) -> dict[str, Any]:
        """What `save_as` needs, in JSON: config.json, its ignored keys, and the dtype and file of
        each tensor, by the name that it has in the file.
        """
        prefix = self.family.body_prefix if self._lacks_prefix else ""
        tensors = {}
        for name, entry in self.entries.items():
            dtype_name = safetensors.NAMES[entry.dtype]
            tensors[name.removeprefix(prefix)] = [dtype_name, entry.path.name]
        return {"config": self.config, "ignored": list(self.ignored), "tensors": tensors}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the tensors are those of a model with these parameters.

        Args:
          shapes: path -> shape.

        Raises:
          ValueError: tensors are missing, of another shape, or not known.
        """
        expected = _hf_shapes(self.family, shapes)
        # A model whose head is the embedding has no parameter for it.
        is_tied = "head/table" not in shapes
        where = f"{self.directory}: a {self.family.name} of config.json's sizes"

        missing = [name for name in expected if name not in self.entries]
        if missing:
            raise ValueError(
                f"{where} needs {len(missing)} tensor(s) that are not there: {_listed(missing)}; "
                f"there are {_listed(list(self.entries))}{self._other_head()}"
            )

        # A tied head may be stored all the same.
        known = set(expected)
        if is_tied:
            known |= set(_hf_names(self.family, "head/table"))
        extra = [name for name in self.entries if name not in known and not self._is_buffer(name)]
        if extra:
            raise ValueError(
                f"{where} has no tensor(s) {_listed(extra)}: what they are for would be lost"
                f"{self._other_head()}"
            )

        wrong = []
        for name, shape in expected.items():
            stored = self.entries[name].shape
            if stored != shape:
                wrong.append(f"{name} {list(stored)}, wanted {list(shape)}")
        if wrong:
            raise ValueError(f"{where}: {_listed(wrong)}")

        if is_tied:
            self._check_tied_head()

    def _other_head(self) -> str:
        """What to say of a checkpoint whose head is not a language model's, such as a classifier's;
        "" of others.
        """
        others = self.config.get("architectures") or []
        ours = "ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration|MTModel"
        if not others or re.search(ours, str(others)):
            return ""
        return (
            f". config.json says architectures = {others}, and this reads "
            f"{self.family.architecture}, whose head gives tokens; of a classifier, or "
            "another such model, the checkpoint that it was trained from can be read"
        )

    def _check_tied_head(self) -> None:
        """Raises ValueError if a head is stored that is not the embedding."""
        table = _hf_names(self.family, "embed/table")[0]
        heads = [name for name in _hf_names(self.family, "head/table") if name in self.entries]
        if heads and not np.array_equal(self.entries[table].read(), self.entries[heads[0]].read()):
            raise ValueError(
                f"{self.directory}: tie_word_embeddings is set, but {heads[0]} is not {table}"
            )

    def _is_buffer(self, hf_name: str) -> bool:
        return re.search(self.family.buffer_pattern, hf_name) is not None

    def load(self, abstract_params, progress: ProgressFn = _no_progress):
        """Loads the parameters onto their devices.

        Besides the parameters there is one tensor in memory, and where devices have memory of their
        own, this process's part of one stack of layers.

        Args:
          abstract_params: tree of ShapeDtypeStructs with shardings.
          progress: counts the bytes of parameters.

        Raises:
          ValueError: see `check`.
        """
        flat = _flatten(abstract_params)
        shapes = _shapes(flat)
        self.check(shapes)

        # One parameter after the other: only its part is in host memory, not that of the model.
        slices = collections.defaultdict(list)
        for param_slice in families.param_slices(self.family, shapes):
            slices[param_slice.row.path].append(param_slice)
        self._first_outputs = first_outputs(self.family, shapes)

        total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in flat.values())
        counter = _ByteCounter(progress, total)
        params = [self._load_param(leaf, slices[path], counter) for path, leaf in flat.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_params), params)

    def _load_param(
        self,
        leaf: jax.ShapeDtypeStruct,
        slices: Sequence[ParamSlice],
        counter: _ByteCounter,
    ) -> jax.Array:
        """Builds one parameter from its slices, on the devices of its sharding."""
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)

        # Devices with the same part share one buffer. Before Python 3.12 slices can't be hashed, so
        # their texts are the keys.
        parts = {}
        for index in indices.values():
            if str(index) not in parts:
                parts[str(index)] = _make_local_part(leaf, index)

        for param_slice in slices:
            stack_index = param_slice.index
            shape = leaf.shape[len(stack_index) :]

            # A tensor that no device of this process has a part of is not read.
            holders = [part for part in parts.values() if part.contains(stack_index)]
            if holders:
                array = self._read_slice(param_slice, shape)
                for part in holders:
                    part.fill(stack_index, array)
            counter.add(math.prod(shape) * leaf.dtype.itemsize)

        buffers = []
        for device, index in indices.items():
            buffers.append(jax.device_put(parts[str(index)].buffer, device))
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, buffers)

    def _read_slice(self, param_slice: ParamSlice, shape: tuple[int, ...]) -> np.ndarray:
        tensor = self.entries[param_slice.hf_name].read()
        row = param_slice.row
        kv_heads, first_output = num_kv_heads(self.fields), self._first_outputs[row.path]
        return to_param(row, tensor, shape, kv_heads, first_output)


def _newer_name(hf_name: str, family: Family) -> str:
    """The name that newer files of a family have for a tensor."""
    for older, newer in family.older_endings.items():
        if hf_name.endswith(older):
            return hf_name.removesuffix(older) + newer
    return hf_name


class _LocalPart(NamedTuple):
    """A part of a parameter that devices of this process hold, and the memory to build it in."""

    index: tuple[slice, ...]  # in the whole parameter
    positions: list[range]  # the same, dim by dim
    buffer: np.ndarray

    def contains(self, stack_index: tuple[int, ...]) -> bool:
        """Whether it has something of this layer (and expert)."""
        return all(i in positions for i, positions in zip(stack_index, self.positions))

    def fill(self, stack_index: tuple[int, ...], array: np.ndarray) -> None:
        """Copies what it has of this layer (and expert) out of the whole layer's array."""
        local_index = []
        for i, positions in zip(stack_index, self.positions):
            local_index.append(positions.index(i))

        inner_index = self.index[len(stack_index) :]
        safetensors.copy_into(self.buffer[tuple(local_index)], array[inner_index])


def _make_local_part(leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> _LocalPart:
    positions = [range(size)[part] for size, part in zip(leaf.shape, index)]
    shape = tuple(map(len, positions))
    return _LocalPart(index, positions, _empty_aligned(shape, leaf.dtype))


def _empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An empty array that a CPU device takes over as it is, instead of copying it."""
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize

    # XLA wants buffers to begin at a multiple of 64 bytes.
    raw = np.empty(num_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _check_no_adapter(directory: Path) -> None:
    """Raises ValueError for a directory of an adapter (LoRA and others, by peft)."""
    if not (directory / ADAPTER).exists():
        return
    base = files.read_json(directory / ADAPTER).get("base_model_name_or_path")
    raise ValueError(
        f"{directory} has an adapter ({ADAPTER}), which is added to the weights of {base!r}: "
        f"python -m lm.convert import --from={directory} --base=DIR --workdir=RUN makes a run of "
        "it, and lm.convert merge a whole model of that"
    )


def _read_config_json(directory: Path) -> dict[str, Any]:
    try:
        return files.read_json(directory / "config.json")
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no config.json; wanted the directory of a Hugging Face checkpoint"
        ) from None


def _read_entries(directory: Path) -> dict[str, safetensors.Entry]:
    """The entries of all tensors of a directory's files, by hf_name."""
    # Checkpoints in several files have an index, those in one file don't. Where both are there,
    # transformers takes the one file.
    has_index = (directory / INDEX).exists() and not (directory / SINGLE_FILE).exists()
    weight_map = _read_weight_map(directory) if has_index else {}
    names = sorted(set(weight_map.values())) if has_index else [_only_file(directory)]

    entries: dict[str, safetensors.Entry] = {}
    for file in names:
        for name, entry in safetensors.entries(directory / file).items():
            if name in entries:
                raise ValueError(
                    f"{directory}: tensor {name} is in {entries[name].path.name} and in {file}"
                )
            entries[name] = entry

    # Files that were copied apart, or of different versions, don't fit their index.
    misplaced = []
    for name, file in weight_map.items():
        if name not in entries or entries[name].path.name != file:
            misplaced.append(name)
    if misplaced:
        raise ValueError(
            f"{directory}: {INDEX} names tensors that their files don't have: {_listed(misplaced)}"
        )
    return entries


def _read_weight_map(directory: Path) -> dict[str, str]:
    """The index of a checkpoint in several files, hf_name -> file.

    Raises:
      ValueError: it can't be read, or names files elsewhere, or files that are missing.
    """
    index = directory / INDEX
    try:
        weight_map = files.read_json(index)["weight_map"]
        names = sorted({files.check_name(name, str(index)) for name in weight_map.values()})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} can't be read ({type(error).__name__}: {error}); wanted JSON with a "
            "weight_map of tensors to files"
        ) from None

    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ValueError(
            f"{directory} lacks {_listed(missing)}, which {INDEX} names; copy the whole directory"
        )
    return weight_map


def _only_file(directory: Path) -> str:
    """The safetensors file of a directory without an index.

    Raises:
      ValueError: there is none, or more than one.
    """
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if SINGLE_FILE in names:
        return SINGLE_FILE
    if len(names) > 1:
        raise ValueError(
            f"{directory} has {_listed(names)}, but no {INDEX} that says what belongs together"
        )
    if names:
        return names[0]

    pickled = []
    for pattern in ("*.bin", "*.pt", "*.pth"):
        pickled += sorted(directory.glob(pattern))
    gguf = sorted(path.name for path in directory.glob("*.gguf"))
    problem = f"{directory} has no safetensors"
    if pickled:
        problem += (
            f", but pickled weights ({_listed([path.name for path in pickled])}), which can run "
            "any code when they are read, so they are not. Where you trust them, transformers' "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors"
        )
    elif gguf:
        problem += (
            f", but {_listed(gguf)} of llama.cpp, whose weights are quantized; take the checkpoint "
            "that they were made of"
        )
    raise ValueError(problem)


def _listed(names: Sequence[str]) -> str:
    """The first six names, and how many more there are."""
    rest = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + rest


# --- tensors of the files and our parameters ---


def num_kv_heads(fields: Mapping[str, Any]) -> int:
    """That of a model with these fields."""
    return fields.get("num_kv_heads", fields["num_heads"])


def _output_axis(row: Tensor, num_dims: int) -> int:
    """The dim of a tensor in the files that fused parts lie along."""
    return num_dims - 1 if row.layout == "conv1d" else 0


def _num_outputs(row: Tensor, shape: Sequence[int]) -> int:
    """How much of a tensor's `out` a parameter (of one layer) has."""
    num_inputs = 0 if row.layout in ("vector", "row") else row.num_inputs
    return math.prod(shape[num_inputs:])


def first_outputs(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """path -> where it begins along `out` of its tensor, which it may share with others."""
    starts = {}
    ends: dict[str, int] = collections.defaultdict(int)
    # Parts are in order in a table.
    for row in families.rows_of(family, shapes):
        shape = shapes[row.path][row.hf_name.count("{") :]
        starts[row.path] = ends[row.hf_name]
        ends[row.hf_name] += _num_outputs(row, shape)
    return starts


def to_param(
    row: Tensor, tensor: np.ndarray, shape: tuple[int, ...], num_kv_heads: int, first_output: int
) -> np.ndarray:
    """Our parameter (of one layer) from a tensor of the files; a view where it can be.

    Args:
      row: of the family's table.
      shape: of the parameter.
      first_output: where it begins along `out`, were all parts one behind the other.
    """
    _, num_parts = row.part
    if num_parts > 1:
        # [..., groups * size, ...] -> [..., groups, size, ...], of which each group has a part.
        axis = _output_axis(row, tensor.ndim)
        groups = num_kv_heads if row.by_kv_head else 1
        before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
        apart = tensor.reshape(*before, groups, -1, *after)
        last_output = first_output + _num_outputs(row, shape)
        outputs = slice(first_output // groups, last_output // groups)
        tensor = apart[:, :, outputs] if axis == 1 else apart[:, outputs]
        tensor = tensor.reshape(*before, -1, *after)

    return (tensor.T if row.layout == "linear" else tensor).reshape(shape)


def from_params(parts: Iterable[tuple[Tensor, np.ndarray]], num_kv_heads: int) -> np.ndarray:
    """A tensor of the files from our parameters (of one layer): the inverse of `to_param`.

    Args:
      parts: the parameter, or all those that the tensor fuses, with their rows of the table.
    """
    in_order = sorted(parts, key=_part_number)
    arrays = [_in_hf_layout(row, array) for row, array in in_order]
    if len(arrays) == 1:
        return arrays[0]

    row = in_order[0][0]
    axis = _output_axis(row, arrays[0].ndim)
    # [..., groups * size, ...] each -> [..., groups, sum of sizes, ...] -> [..., out, ...].
    groups = num_kv_heads if row.by_kv_head else 1
    before, after = arrays[0].shape[:axis], arrays[0].shape[axis + 1 :]
    grouped = [array.reshape(*before, groups, -1, *after) for array in arrays]
    return np.concatenate(grouped, axis + 1).reshape(*before, -1, *after)


def _part_number(part: tuple[Tensor, np.ndarray]) -> int:
    row, _ = part
    return row.part[0]


def _in_hf_layout(row: Tensor, array: np.ndarray) -> np.ndarray:
    """A parameter (of one layer) as a table, a vector or a matrix, as the files have it."""
    if row.layout == "table":
        return array
    if row.layout == "vector":
        return array.reshape(-1)
    if row.layout == "row":
        return array.reshape(1, -1)

    # Ours have a dim each for heads and their size, [D, N, H] or [N, H, D]; theirs are matrices.
    num_inputs = math.prod(array.shape[: row.num_inputs])
    matrix = array.reshape(num_inputs, -1)
    return matrix.T if row.layout == "linear" else matrix


def _hf_shapes(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """hf_name -> shape of every tensor of a model whose parameters have these shapes."""
    hf_shapes = {}
    for name, slices in _slices_by_tensor(family, shapes).items():
        row, stack_index, _ = slices[0]
        shape = shapes[row.path][len(stack_index) :]
        num_inputs = math.prod(shape[: row.num_inputs])
        num_outputs = 0
        for part, _, _ in slices:
            num_outputs += _num_outputs(part, shapes[part.path][len(stack_index) :])

        if row.layout == "table":
            hf_shapes[name] = tuple(shape)
        elif row.layout == "vector":
            hf_shapes[name] = (num_outputs,)
        elif row.layout == "row":
            hf_shapes[name] = (1, num_outputs)
        elif row.layout == "conv1d":
            hf_shapes[name] = (num_inputs, num_outputs)
        else:
            hf_shapes[name] = (num_outputs, num_inputs)
    return hf_shapes


def _slices_by_tensor(
    family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[ParamSlice]]:
    """hf_name -> the slices of parameters that the tensor holds, layer by layer."""
    groups = collections.defaultdict(list)
    for param_slice in families.param_slices(family, shapes):
        groups[param_slice.hf_name].append(param_slice)
    return groups


def _hf_names(family: Family, path: str) -> list[str]:
    return [row.hf_name for row in family.tensors if row.path == path]


def _flatten(tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _shapes(flat: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flat.items()}


# --- writing ---


def hf_tensors(family: Family, params, num_kv_heads: int) -> dict[str, Callable[[], np.ndarray]]:
    """The tensors of the files from our parameters.

    Returns:
      hf_name -> a function that makes the tensor, layer by layer: one is in memory at a time.
    """
    flat = _flatten(params)
    makers = {}
    for name, slices in _slices_by_tensor(family, _shapes(flat)).items():
        makers[name] = functools.partial(_make_hf_tensor, flat, slices, num_kv_heads)
    return makers


def _make_hf_tensor(
    flat_params: Mapping[str, Any], slices: Sequence[ParamSlice], num_kv_heads: int
) -> np.ndarray:
    parts = []
    for row, stack_index, _ in slices:
        parts.append((row, np.asarray(flat_params[row.path][stack_index])))
    return from_params(parts, num_kv_heads)


def save(
    directory: Path,
    family: Family,
    fields: Mapping[str, Any],
    params,
    *,
    token_ids: Mapping[str, int | None],
    shard_bytes: int = 5 * 10**9,
    progress: ProgressFn = _no_progress,
) -> None:
    """Writes a checkpoint that transformers loads: config.json and safetensors, each tensor in its
    parameter's dtype.

    Args:
      fields: of the model's Config.
      token_ids: bos_token_id, eos_token_id and pad_token_id.
      shard_bytes: the most of a file, unless a single tensor is larger.
      progress: counts the bytes of tensors.

    Raises:
      ValueError: the family has no such model.
    """
    flat = _flatten(params)
    shapes = _shapes(flat)
    hf_shapes = _hf_shapes(family, shapes)
    specs = {}
    for name, slices in _slices_by_tensor(family, shapes).items():
        dtype = np.dtype(flat[slices[0].row.path].dtype)
        specs[name] = (dtype, hf_shapes[name])

    # Norms are in f32 beside weights in bf16; the config has one dtype for all.
    has_bfloat16 = any(str(dtype) == "bfloat16" for dtype, _ in specs.values())
    config = families.write_config(family, fields)
    config |= token_ids
    if any(row.path == "heads/scalar/weight" for row in family.tensors):
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config |= {"torch_dtype": "bfloat16" if has_bfloat16 else "float32"}

    shards = _split_into_files(specs, shard_bytes)
    makers = hf_tensors(family, params, num_kv_heads(fields))
    _write(directory, config, shards, specs, makers, progress)


def _split_into_files(specs: Mapping[str, TensorSpec], shard_bytes: int) -> dict[str, list[str]]:
    """file -> hf_names of its tensors: in order, each file as full as it may be."""
    shards: list[list[str]] = [[]]
    shard_size = 0
    for name, spec in specs.items():
        size = _num_bytes(spec)
        if shards[-1] and shard_size + size > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(name)
        shard_size += size

    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    names_by_file = {}
    for number, names in enumerate(shards, 1):
        names_by_file[f"model-{number:05d}-of-{len(shards):05d}.safetensors"] = names
    return names_by_file


def _num_bytes(spec: TensorSpec) -> int:
    dtype, shape = spec
    return dtype.itemsize * math.prod(shape)


def save_as(
    directory: Path,
    original: Mapping[str, Any],
    fields: Mapping[str, Any],
    params,
    *,
    progress: ProgressFn = _no_progress,
) -> None:
    """Writes a checkpoint back as it came: the same config.json, names, dtypes and files.

    Args:
      original: `Checkpoint.record()` of the one that the parameters came from.
      fields: of the model's Config.
      progress: counts the bytes of tensors.

    Raises:
      ValueError: the parameters are of another model than that checkpoint's.
    """
    config, recorded = _check_record(original)
    family = families.family_of_config(config)
    original_fields = families.read_config(config, original.get("ignored", ()))
    if family.tensors_decide:
        original_fields |= {name: fields[name] for name in ("tie_embeddings", "bias")}
    changed = [name for name, value in original_fields.items() if value != fields[name]]
    if changed:
        changes = [f"{name} = {fields[name]!r}, was {original_fields[name]!r}" for name in changed]
        raise ValueError(f"the model was changed since it was imported: {', '.join(changes)}")

    shapes = _hf_shapes(family, _shapes(_flatten(params)))
    makers = hf_tensors(family, params, num_kv_heads(fields))

    # Some checkpoints store a tied head all the same.
    table = _hf_names(family, "embed/table")[0]
    for head in _hf_names(family, "head/table"):
        if head in recorded and head not in makers:
            makers[head] = makers[table]
            shapes[head] = shapes[table]

    recorded_makers = {}
    specs = {}
    for full_name, make in makers.items():
        # A checkpoint of a body alone has names without the prefix.
        lacks_prefix = full_name not in recorded
        name = full_name.removeprefix(family.body_prefix) if lacks_prefix else full_name
        dtype_name, _ = recorded[name]
        recorded_makers[name] = make
        specs[name] = (np.dtype(safetensors.DTYPES[dtype_name]), shapes[full_name])

    shards = collections.defaultdict(list)
    for name, (_, file) in recorded.items():
        # Buffers are no parameters, and are left out.
        if name in recorded_makers:
            shards[file].append(name)
    _write(directory, config, shards, specs, recorded_makers, progress)


def _check_record(original: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns config.json and {hf_name: (dtype, file)} of a `Checkpoint.record()`.

    It comes out of a checkpoint's metadata, which somebody else may have made.

    Raises:
      ValueError: it is none, or names a file elsewhere, or another than a safetensors file.
    """
    config, tensors = original.get("config"), original.get("tensors")
    if not isinstance(config, dict) or not isinstance(tensors, dict):
        raise ValueError("the checkpoint's record of its import lacks its config.json or tensors")
    ignored = original.get("ignored", [])
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise ValueError(f"the checkpoint's record of its import says of ignored keys: {ignored!r}")
    for name, entry in tensors.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in safetensors.DTYPES:
            raise ValueError(f"the checkpoint's record of its import says of {name}: {entry!r}")
        file = files.check_name(entry[1], "the checkpoint's record of its import")
        if not file.endswith(".safetensors"):
            raise ValueError(
                f"the checkpoint's record of its import has {name} in {file}; wanted a name that "
                "ends in .safetensors"
            )
    return config, tensors


def _write(
    directory: Path,
    config: Mapping[str, Any],
    shards: Mapping[str, Sequence[str]],
    specs: Mapping[str, TensorSpec],
    makers: Mapping[str, Callable[[], np.ndarray]],
    progress: ProgressFn,
) -> None:
    """Writes the files of a checkpoint. config.json, which `is_checkpoint` looks for, comes last.

    Args:
      shards: file -> hf_names of its tensors.
    """
    directory.mkdir(parents=True, exist_ok=True)
    total = sum(map(_num_bytes, specs.values()))
    counter = _ByteCounter(progress, total)
    for file, names in shards.items():
        file_specs = {name: specs[name] for name in names}
        arrays = _make_arrays(file_specs, makers, counter)
        safetensors.write(directory / file, file_specs, arrays)

    if len(shards) > 1:
        weight_map = {}
        for file, names in shards.items():
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_whole(directory / INDEX, json.dumps(index, indent=2) + "\n")
    files.write_whole(directory / "config.json", json.dumps(config, indent=2) + "\n")


def _make_arrays(
    specs: Mapping[str, TensorSpec],
    makers: Mapping[str, Callable[[], np.ndarray]],
    counter: _ByteCounter,
) -> Iterator[np.ndarray]:
    """Yields the tensors, each made when it is asked for."""
    for name, spec in specs.items():
        dtype, _ = spec
        yield makers[name]().astype(dtype)
        counter.add(_num_bytes(spec))
