"""Adapters in PEFT's format: adapter_config.json, and A [rank, in] and B [out, rank] of each matrix
in adapter_model.safetensors.

As in `lm.hf.families`, `hf_name` is Hugging Face's name of a tensor, and `path` that of our
parameter. Our adapters all have one rank and one scale. A matrix that fuses several of our weights
has one adapter in PEFT: read, its A is each one's; written, its rank is the sum of theirs.
"""

import collections
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import files
from lm.hf import directory as hf
from lm.hf import safetensors
from lm.hf.families import Family, Tensor
from lm.nn import lora

CONFIG, TENSORS = hf.ADAPTER, "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# What adapter_config.json may say: what is read here, and what doesn't change the model's output.
_READ = "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern fan_in_fan_out".split()
_IGNORED = (
    "auto_mapping base_model_name_or_path revision task_type inference_mode init_lora_weights "
    "lora_dropout target_modules exclude_modules layers_pattern peft_version loftq_config "
    "eva_config corda_config qalora_group_size ensure_weight_tying runtime_config bias "
    "megatron_config megatron_core"
).split()


class Adapter(NamedTuple):
    """An adapter as ours.

    Attributes:
      fields: lora_rank, lora_alpha, lora_scaling, lora_targets.
      params: path -> array, f32, stacked over the layers.
    """

    fields: dict[str, Any]
    params: dict[str, np.ndarray]


def read(directory: Path, family: Family, shapes: Mapping[str, tuple[int, ...]], num_kv_heads: int):
    """Returns the `Adapter` of a directory.

    Args:
      shapes: path -> shape of the base's parameters.

    Raises:
      ValueError: another kind of adapter than LoRA, or one that does more; matrices that aren't the
        base's, or of other sizes; layers without an adapter, where others have one.
    """
    config = files.read_json(directory / CONFIG)
    _check_config(config, directory / CONFIG)
    pairs = _read_pairs(directory / TENSORS)

    rank = max(a.shape[0] for a, _ in pairs.values())
    scaling = "rslora" if config.get("use_rslora") else "plain"
    alpha = float(config.get("lora_alpha", 8))
    scale = lora.scale_of(rank, alpha, scaling)

    rows = _rows(family, shapes)
    if unknown := sorted(pairs.keys() - rows.keys()):
        raise ValueError(
            f"{directory} adapts {unknown[:3]}, which is no matrix of the layers of a {family.name}"
        )

    starts = hf.first_outputs(family, shapes)
    layers: dict[str, dict[int, tuple]] = collections.defaultdict(dict)
    for module, (a, b) in pairs.items():
        _check_sizes(module, a, b, [(row, shapes[row.path][1:]) for row, _ in rows[module]])

        module_alpha = _pattern_value(config.get("alpha_pattern"), module, alpha)
        b = b * (lora.scale_of(a.shape[0], module_alpha, scaling) / scale)
        for row, layer in rows[module]:
            shape, start = shapes[row.path][1:], starts[row.path]
            layers[row.path][layer] = _to_ours(row, a, b, shape, start, rank, num_kv_heads)

    params = {}
    for path, of_layers in layers.items():
        num_layers = shapes[path][0]
        if len(of_layers) < num_layers:
            raise ValueError(
                f"{directory} adapts {path} in {len(of_layers)} of {num_layers} layers; wanted all"
            )
        for i, name in enumerate(lora.names(path)):
            params[name] = np.stack([of_layers[layer][i] for layer in range(num_layers)])

    adapted = {path.rpartition("/")[2] for path in layers}
    targets = ",".join(name for name in lora.TARGETS if name in adapted)
    fields = dict(lora_rank=rank, lora_alpha=alpha, lora_scaling=scaling, lora_targets=targets)
    return Adapter(fields, params)


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type = {config.get('peft_type')!r}; wanted 'LORA'")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias = {config['bias']!r}: trained biases aren't read")
    for key, value in config.items():
        if value and key not in (*_READ, *_IGNORED):
            raise ValueError(f"{where}: {key} = {value!r:.80} isn't read, and would be left out")


def _read_pairs(file: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """module -> (A [rank, in], B [out, rank]) in f32."""
    if not file.exists():
        raise ValueError(f"{file.parent} has no {TENSORS}; pickled adapters aren't read")
    found: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    for name, entry in safetensors.entries(file).items():
        match = _KEY.fullmatch(name)
        if not match or len(entry.shape) != 2:
            raise ValueError(
                f"{file} has {name} {list(entry.shape)}; wanted only base_model.model.MODULE."
                "lora_A.weight and lora_B.weight, which are matrices"
            )
        found[match[1]][match[2]] = np.asarray(entry.read(), np.float32)

    pairs = {}
    for module, tensors in found.items():
        if tensors.keys() != {"A", "B"} or tensors["A"].shape[0] != tensors["B"].shape[1]:
            shapes = {name: list(array.shape) for name, array in tensors.items()}
            raise ValueError(f"{file}: {module} has {shapes}; wanted A [rank, in], B [out, rank]")
        pairs[module] = (tensors["A"], tensors["B"])
    if not pairs:
        raise ValueError(f"{file} has no tensors")
    return pairs


def _rows(
    family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[tuple[Tensor, int]]]:
    """module -> the weights that it holds, in order, each with its layer."""
    rows: dict[str, list[tuple[Tensor, int]]] = collections.defaultdict(list)
    for row in family.tensors:
        is_target = row.path.startswith("layers/") and row.path.rpartition("/")[2] in lora.TARGETS
        if not is_target or row.path not in shapes or row.hf_name.count("{") > 1:
            continue
        for layer in range(shapes[row.path][0]):
            module = row.hf_name.format(i=layer).removesuffix(".weight")
            rows[module].append((row, layer))
    return rows


def _pattern_value(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """What a pattern says of a module; its keys are the ends of names."""
    for key, value in (pattern or {}).items():
        if not re.fullmatch(r"[\w.]+", key):
            raise ValueError(f"{CONFIG}: alpha_pattern has {key!r}; only ends of names are read")
        if module == key or module.endswith(f".{key}"):
            return float(value)
    return default


def _check_sizes(
    module: str, a: np.ndarray, b: np.ndarray, weights: Sequence[tuple[Tensor, tuple[int, ...]]]
) -> None:
    """Raises ValueError if an adapter has other sizes than the weights that its module holds."""
    row, shape = weights[0]
    num_inputs = math.prod(shape[: row.num_inputs])
    num_outputs = sum(math.prod(shape[row.num_inputs :]) for row, shape in weights)
    if (a.shape[1], b.shape[0]) != (num_inputs, num_outputs):
        raise ValueError(
            f"the adapter of {module} has A {list(a.shape)} and B {list(b.shape)}; wanted "
            f"[{len(a)}, {num_inputs}] and [{num_outputs}, {len(a)}]: it is another base's"
        )


def _to_ours(
    row: Tensor,
    a: np.ndarray,
    b: np.ndarray,
    shape: tuple[int, ...],
    first_output: int,
    rank: int,
    num_kv_heads: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A [inputs, rank] and B [rank, outputs] of one of our weights, of one layer.

    Args:
      shape: of the weight.
      first_output: where it begins along the outputs of its module.
    """
    inputs, outputs = shape[: row.num_inputs], shape[row.num_inputs :]
    b_ours = hf.to_param(_row_of_b(row), b, (len(a), *outputs), num_kv_heads, first_output)

    # Ranks below the largest are filled up with zeros, which add nothing.
    lacking = rank - len(a)
    a_ours = np.pad(a.T, [(0, 0), (0, lacking)]).reshape(*inputs, rank)
    return a_ours, np.pad(b_ours, [(0, lacking)] + [(0, 0)] * len(outputs))


def _row_of_b(row: Tensor) -> Tensor:
    """How B [out, rank] lies beside our B [rank, outputs]: as a weight with `rank` inputs."""
    return row._replace(layout="linear", num_inputs=1)


# --- writing ---


def write(
    directory: Path,
    family: Family,
    fields: Mapping[str, Any],
    params: Mapping[str, np.ndarray],
    base: str,
) -> None:
    """Writes an adapter that peft loads.

    Args:
      fields: of the model's Config.
      params: path -> array, of the adapters' parameters.
      base: what adapter_config.json calls the base.

    Raises:
      ValueError: a directory that is in use.
    """
    rank, alpha, scaling = fields["lora_rank"], fields["lora_alpha"], fields["lora_scaling"]
    scale = lora.scale_of(rank, alpha, scaling)
    shapes = lora.weight_shapes(params)

    tensors, ranks, alphas, modules = {}, {}, {}, {}
    for module, rows in _rows(family, shapes).items():
        a, b = _to_theirs(rows, params, fields["num_kv_heads"])
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b

        # What stands behind the layer's number; c_proj alone would be two matrices of GPT-2.
        name = re.split(r"\.\d+\.", module)[-1]
        modules[name] = True
        if len(a) != rank:
            ranks[name] = len(a)
            alphas[name] = scale * (len(a) if scaling == "plain" else math.sqrt(len(a)))

    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=rank,
        lora_alpha=alpha,
        use_rslora=scaling == "rslora",
        target_modules=list(modules),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=any(row.layout == "conv1d" for row in family.tensors),
        inference_mode=True,
    )

    specs = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write(directory / TENSORS, specs, iter(tensors.values()))
    files.write_whole(directory / CONFIG, json.dumps(config, indent=2) + "\n")


def _to_theirs(
    rows: Sequence[tuple[Tensor, int]], params: Mapping[str, np.ndarray], num_kv_heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, in] and B [out, rank] of a matrix: one block of ranks for each weight in it."""
    a_blocks, b_blocks = [], []
    for row, layer in rows:
        a_name, _ = lora.names(row.path)
        a = params[a_name][layer]
        a_blocks.append(a.reshape(-1, a.shape[-1]).T)

        parts = []
        for other, _ in rows:
            b = params[lora.names(other.path)[1]][layer]
            parts.append((_row_of_b(other), b if other is row else np.zeros_like(b)))
        b_blocks.append(hf.from_params(parts, num_kv_heads))
    return np.concatenate(a_blocks), np.ascontiguousarray(np.concatenate(b_blocks, axis=1))
