"""Checkpoints from and to Hugging Face's format.

A checkpoint directory becomes a run's checkpoint:

    python -m lm.convert import --from=DIR --workdir=RUN

The newest checkpoint of a run becomes a directory that transformers loads:

    python -m lm.convert export --workdir=RUN --to=DIR

Adapters (LoRA) come from peft's format, go to it, and are merged into the weights of their base:

    python -m lm.convert import --from=ADAPTER --base=DIR --workdir=RUN
    python -m lm.convert export --workdir=RUN --base=DIR --adapter --to=ADAPTER
    python -m lm.convert merge --workdir=RUN --base=BASE --to=RUN2

Nothing is downloaded, and no code of a checkpoint's is run. `config.init_from=DIR` starts from such
a directory without an import.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from lm import build, checkpoint, claim, command_line, files, startup, trained, weights
from lm import config as config_lib
from lm.data import tokenizer as tokenizers
from lm.data import tokenizer_files
from lm.hf import directory as hf
from lm.hf import families, peft
from lm.nn import lora

COMMANDS = ("import", "export", "merge")


# --- import ---


def import_checkpoint(
    source: Path,
    workdir: epath.Path,
    devices,
    param_dtype: str = "",
    ignored: Sequence[str] = (),
) -> None:
    """Writes a run directory whose checkpoint, at step 0, is that of `source`.

    Args:
      param_dtype: of the parameters; "": the source's own.
      ignored: keys of config.json to read it without.

    Raises:
      ValueError: the source can't be read, see `lm.hf.directory.Checkpoint`, or the workdir is in
        use, or claimed by another process.
    """
    _check_unused(workdir)
    hf_checkpoint = hf.Checkpoint(source, ignored)
    config = _config_of(hf_checkpoint, param_dtype)

    tokenizer = tokenizers.load(source)
    abstract_params = build.abstract_model(config, devices, tokenizer.vocab_size).params
    params = hf_checkpoint.load(abstract_params, hf.progress_line(f"import {source}"))
    _write_run(workdir, config, tokenizer, params, {"hf": hf_checkpoint.record()})


def import_adapter(
    source: Path, base: Path, workdir: epath.Path, devices, ignored: Sequence[str] = ()
) -> None:
    """Writes a run directory whose checkpoint, at step 0, has the adapters of `source`, in peft's
    format. What they are trained on stays in `base`.

    Args:
      base: the directory of a Hugging Face checkpoint.
      ignored: keys of its config.json to read it without.

    Raises:
      ValueError: see `lm.hf.peft.read` and `import_checkpoint`.
    """
    _check_unused(workdir)
    hf_checkpoint = hf.Checkpoint(base, ignored)
    config = _config_of(hf_checkpoint)
    config.init_from = str(base)

    # The tokenizer of the adapter, which may have a chat template of its own, where there is one.
    has_own = (source / "tokenizer.json").exists() or (source / "tokenizer.model").exists()
    tokenizer = tokenizers.load(source if has_own else base)

    abstract_base = build.abstract_model(config, devices, tokenizer.vocab_size).params
    shapes = {path: leaf.shape for path, leaf in checkpoint.flatten(abstract_base).items()}
    kv_heads = config.model.num_kv_heads
    adapter = peft.read(source, hf_checkpoint.family, shapes, kv_heads)

    frozen = hf_checkpoint.load(abstract_base, hf.progress_line(f"import {base}"))
    meta = {"frozen": weights.describe_frozen(config, frozen)}
    config.model.update(adapter.fields)
    _write_run(
        workdir, config, tokenizer, traverse_util.unflatten_dict(adapter.params, sep="/"), meta
    )


def _config_of(hf_checkpoint: hf.Checkpoint, param_dtype: str = "") -> ConfigDict:
    """The default configuration with a checkpoint's model."""
    config = config_lib.default()
    config.model = hf_checkpoint.model(config.model)
    config.model.param_dtype = param_dtype or hf_checkpoint.dtype()
    config.data.length = min(config.data.length, config.model.context_length)
    build.fit_objective(config)
    return config


def _check_unused(workdir: epath.Path) -> None:
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is in use; take another --workdir")


def _write_run(
    workdir: epath.Path,
    config: ConfigDict,
    tokenizer: tokenizers.Tokenizer,
    params,
    more_meta: Mapping[str, Any],
) -> None:
    """Writes a run directory with a checkpoint at step 0."""
    meta = {
        "config": config.to_dict(),
        "tokenizer": checkpoint.tokenizer_to_meta(tokenizer),
        **more_meta,
    }
    # As JSON has it: lists for tuples.
    meta = json.loads(json.dumps(meta))
    first_process = jax.process_index() == 0
    with claim.Claim(workdir, active=first_process):
        checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", keep=1)
        checkpointer.save(0, {"params": params}, meta, {})
        checkpointer.close()

        # config.json comes last: a workdir with one is in use.
        if first_process:
            (workdir / "tokenizer").mkdir(parents=True, exist_ok=True)
            tokenizer.save(workdir / "tokenizer")
            config_text = json.dumps(config.to_dict(), indent=2) + "\n"
            files.write_whole(workdir / "config.json", config_text)


# --- merge ---


def merge(
    workdir: epath.Path, base: str, target: epath.Path, devices, model_type: str = ""
) -> None:
    """Writes a run directory whose checkpoint, at step 0, is the whole model of a run that trains
    adapters, or a part of a model.

    Args:
      base: where the rest of the model is.
      model_type: see `lm.config.stored_model`.

    Raises:
      ValueError: a run with all of its parameters, a target in use; see `lm.weights.load_merged`.
    """
    _check_unused(target)
    with checkpoint.open_run(workdir) as saved:
        checkpoint.check_meta(saved.meta, str(workdir))
        if "frozen" not in saved.meta:
            raise ValueError(f"{workdir} has all of its model's parameters; there is no merging")
        config = _config_with_model(saved.meta, str(workdir), model_type)
        tokenizer = checkpoint.tokenizer_from_meta(saved.meta["tokenizer"])
        size = tokenizer.vocab_size
        _, params = weights.load_merged(saved, config, devices, size, base, workdir)
    _write_run(target, weights.without_adapters(config), tokenizer, params, {})


# --- export ---


def export_checkpoint(
    workdir: epath.Path, target: Path, devices, family: str = "", model_type: str = ""
) -> str:
    """Writes the newest checkpoint of a run (its moving average, where it has one) as a directory
    that transformers loads. A checkpoint that was imported and not changed becomes what it was.

    Args:
      family: name of the family to write; "": the one that it came from, or the first that has such
        models.
      model_type: see `lm.config.stored_model`.

    Returns:
      The family's name.

    Raises:
      ValueError: no such checkpoint or family, no family that has this model, or a target in use.
    """
    _check_empty(target)
    if family and family not in families.FAMILIES:
        raise ValueError(f"--family={family}; valid: {sorted(families.FAMILIES)}")

    with checkpoint.open_run(workdir) as saved:
        checkpoint.check_meta(saved.meta, str(workdir))
        config = _config_with_model(saved.meta, str(workdir), model_type)
        fields = config.model.to_dict()
        if fields.get("heads") not in ("", "scalar", None):
            raise ValueError(
                f"config.model.heads = {fields['heads']!r}: no family of Hugging Face's that is "
                "written here has heads beside the vocabulary's and a score, and none is left out "
                "silently"
            )

        # The model is checked before its arrays are read.
        original = None if family or fields.get("heads") else saved.meta.get("hf")
        target_family = _family_to_write(fields, original, family)

        tokenizer = checkpoint.tokenizer_from_meta(saved.meta["tokenizer"])
        vocab_size = saved.meta["tokenizer"]["vocab_size"]
        abstract_params = build.abstract_model(config, devices, vocab_size).params
        params = saved.restore_params(abstract_params, averaged=True)
        if fields.get("heads"):
            params.pop("head", None)  # nobody asks for the next token
    logging.info("step %d of %s is a %s", saved.step, workdir, target_family.name)

    progress = hf.progress_line(f"export {target}")
    if original:
        hf.save_as(target, original, fields, params, progress=progress)
    else:
        hf.save(
            target,
            families.scorer(target_family) if fields.get("heads") else target_family,
            fields,
            params,
            token_ids=_token_ids(tokenizer, fields),
            progress=progress,
        )

    tokenizer.save(epath.Path(target))
    # A file of ours, which transformers has no use for.
    (target / tokenizers.SPECIAL_IDS).unlink(missing_ok=True)
    if target_family.name in tokenizer_files.MISNAMED and not tokenizer.files:
        logging.warning(
            "AutoTokenizer reads the tokenizer of any %s by that family's rules, not its own: "
            "load it by the class in tokenizer_config.json, or export with another --family",
            target_family.name,
        )
    return target_family.name


def _check_empty(target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; take another --to")


def _token_ids(
    tokenizer: tokenizers.Tokenizer, fields: Mapping[str, Any]
) -> dict[str, int | list[int] | None]:
    """What config.json says of special tokens. A text ends at any of the stop ids.

    Args:
      fields: of the model's Config.
    """
    stop_ids = list(tokenizer.stop_ids)
    pad_ids = (None,)
    if fields.get("heads"):
        # The score is that of the last token that is not padding.
        pad_ids = tokenizer.roles.get("pad") or tokenizer.roles.get("unk") or pad_ids
    elif "start_id" in fields:
        # transformers fills up sources and targets with it.
        pad_ids = tokenizer.roles.get("pad") or (fields["start_id"],)
    elif fields.get("visible") == "full":
        # RoBERTa's positions count what is not padding.
        pad_ids = tokenizer.roles.get("pad") or pad_ids
    return dict(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=stop_ids if len(stop_ids) > 1 else tokenizer.eos_id,
        pad_token_id=pad_ids[0],
    )


def export_adapter(
    workdir: epath.Path, base: str, target: Path, family: str = "", model_type: str = ""
) -> None:
    """Writes the adapters of a run's newest checkpoint in peft's format.

    Args:
      base: the directory of the Hugging Face checkpoint that they were trained on, or "": then
        `family` says how its tensors are called, or the first family that has such models.
      family, model_type: see `export_checkpoint`.

    Raises:
      ValueError: a run without adapters, or that trains more than them; a target in use.
    """
    _check_empty(target)
    with checkpoint.open_run(workdir) as saved:
        checkpoint.check_meta(saved.meta, str(workdir))
        config = _config_with_model(saved.meta, str(workdir), model_type)
        fields = config.model.to_dict()
        others = sorted(path for path in saved.paths() if not lora.is_adapter(path))
        if others or "frozen" not in saved.meta:
            raise ValueError(
                f"{workdir} trains {others[:3]}, which an adapter of peft's would lack; wanted a "
                "run of adapters alone. python -m lm.convert merge makes one whole"
            )

        if base:
            target_family = hf.Checkpoint(Path(files.expand(base))).family
        else:
            target_family = _family_to_write(fields, None, family)

        tokenizer = checkpoint.tokenizer_from_meta(saved.meta["tokenizer"])
        model = build.abstract_model(config, jax.devices()[:1], tokenizer.vocab_size)
        abstract, _ = trained.split(model.params, lora.is_adapter)
        params = checkpoint.flatten(jax.device_get(saved.restore_params(abstract, averaged=True)))
    peft.write(target, target_family, fields, params, base or saved.meta["frozen"]["init_from"])

    tokenizer.save(epath.Path(target))
    (target / tokenizers.SPECIAL_IDS).unlink(missing_ok=True)


def _config_with_model(meta: Mapping[str, Any], where: str, model_type: str) -> ConfigDict:
    """The default configuration with a checkpoint's model, see `lm.config.stored_model`."""
    config = config_lib.default()
    config.model = ConfigDict(config_lib.stored_model(meta, where, model_type))
    # 0 is the tokenizer's.
    config.model.vocab_size = config.model.vocab_size or meta["tokenizer"]["vocab_size"]
    return config


def _family_to_write(
    fields: Mapping[str, Any], original: Mapping[str, Any] | None, name: str
) -> families.Family:
    """The family that this model is written as.

    Args:
      original: `hf.Checkpoint.record()` of a checkpoint that was imported, or None.
      name: of the family that is asked for, or "".

    Raises:
      ValueError: the family has no such model, or none has.
    """
    if original:
        return families.family_of_config(original["config"])
    if not name:
        return families.family_of_fields(fields)

    family = families.FAMILIES[name]
    families.write_config(family, fields)
    return family


# --- the command ---


@command_line.command
def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise ValueError(
            f"wanted one of {list(COMMANDS)}, such as python -m lm.convert import --from=DIR "
            f"--workdir=RUN; got {argv[1:]}"
        )
    command = argv[1]
    directory_flag = _FROM if command == "import" else _TO
    if not directory_flag.value or not _WORKDIR.value:
        raise ValueError(f"{command} needs --{directory_flag.name}=DIR and --workdir=RUN")

    directory = Path(files.expand(directory_flag.value))
    workdir = epath.Path(files.expand(_WORKDIR.value))
    base = files.expand(_BASE.value) if _BASE.value else ""
    devices = startup.start(_PLATFORM.value)
    if command == "merge":
        merge(workdir, base, epath.Path(directory), devices, _MODEL_TYPE.value)
        print(f"{directory} is the whole model of {workdir}, at step 0")
    elif command == "export" and _ADAPTER.value:
        export_adapter(workdir, base, directory, _FAMILY.value, _MODEL_TYPE.value)
        print(f"{directory} is an adapter of peft's")
    elif command == "export":
        family = export_checkpoint(workdir, directory, devices, _FAMILY.value, _MODEL_TYPE.value)
        print(f"{directory} is a {family}")
    else:
        _import(directory, base, workdir, devices)
        print(
            f"{directory} is the checkpoint at step 0 of {workdir}: "
            f"--config.init_from={workdir} starts from it, where config.model is the same"
        )


def _import(directory: Path, base: str, workdir: epath.Path, devices) -> None:
    if not (directory / hf.ADAPTER).exists():
        import_checkpoint(directory, workdir, devices, _PARAM_DTYPE.value, _IGNORE.value)
    elif base:
        import_adapter(directory, Path(base), workdir, devices, _IGNORE.value)
    else:
        raise ValueError(
            f"{directory} has an adapter; --base=DIR says which checkpoint it is added to"
        )


if __name__ == "__main__":
    _FROM = flags.DEFINE_string("from", "", "import: the directory of a Hugging Face checkpoint.")
    _TO = flags.DEFINE_string("to", "", "export, merge: the directory to write.")
    _WORKDIR = flags.DEFINE_string("workdir", "", "The run directory.")
    _PARAM_DTYPE = flags.DEFINE_enum(
        "param_dtype",
        "",
        ["", "float32", "bfloat16"],
        "import: of the parameters; the source's own by default.",
    )
    _IGNORE = command_line.ignore_flag()
    _FAMILY = flags.DEFINE_string(
        "family",
        "",
        "export: the model_type to write; by default the one it came from, or the first that has "
        "such models.",
    )
    _MODEL_TYPE = command_line.model_type_flag()
    _BASE = command_line.base_flag()
    _ADAPTER = flags.DEFINE_boolean(
        "adapter", False, "export: the adapters alone, in peft's format."
    )
    _PLATFORM = flags.DEFINE_string(
        "platform", "", "tpu | gpu | cpu; by default the first that is there."
    )
    app.run(main)
