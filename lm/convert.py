"""Checkpoints from and to Hugging Face's format.

A checkpoint directory becomes a run's checkpoint:

    python -m lm.convert import --from=DIR --workdir=RUN

The newest checkpoint of a run becomes a directory that transformers loads:

    python -m lm.convert export --workdir=RUN --to=DIR

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
from ml_collections import ConfigDict

from lm import build, checkpoint, claim, command_line, files, startup
from lm import config as config_lib
from lm.data import tokenizer as tokenizers
from lm.data import tokenizer_files
from lm.hf import directory as hf
from lm.hf import families

COMMANDS = ("import", "export")


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
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is in use; take another --workdir")

    hf_checkpoint = hf.Checkpoint(source, ignored)
    config = config_lib.default()
    config.model.update(hf_checkpoint.fields)
    config.model.param_dtype = param_dtype or hf_checkpoint.dtype()
    config.data.length = min(config.data.length, config.model.context_length)

    tokenizer = tokenizers.load(source)
    abstract_params = build.abstract_model(config, devices, tokenizer.vocab_size).params
    params = hf_checkpoint.load(abstract_params, hf.progress_line(f"import {source}"))

    meta = {
        "config": config.to_dict(),
        "hf": hf_checkpoint.record(),
        "tokenizer": checkpoint.tokenizer_to_meta(tokenizer),
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
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; take another --to")
    if family and family not in families.FAMILIES:
        raise ValueError(f"--family={family}; valid: {sorted(families.FAMILIES)}")

    with checkpoint.open_run(workdir) as saved:
        checkpoint.check_meta(saved.meta, str(workdir))
        config = _config_with_model(saved.meta, str(workdir), model_type)
        fields = config.model.to_dict()
        if fields.get("heads"):
            raise ValueError(
                f"config.model.heads = {fields['heads']!r}: no family of Hugging Face's that is "
                "written here has heads beside the vocabulary's, and none is left out silently"
            )

        # The model is checked before its arrays are read.
        original = None if family else saved.meta.get("hf")
        target_family = _family_to_write(fields, original, family)

        tokenizer = checkpoint.tokenizer_from_meta(saved.meta["tokenizer"])
        vocab_size = saved.meta["tokenizer"]["vocab_size"]
        abstract_params = build.abstract_model(config, devices, vocab_size).params
        params = saved.restore_params(abstract_params, averaged=True)
    logging.info("step %d of %s is a %s", saved.step, workdir, target_family.name)

    progress = hf.progress_line(f"export {target}")
    if original:
        hf.save_as(target, original, fields, params, progress=progress)
    else:
        token_ids = dict(
            bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=None
        )
        hf.save(target, target_family, fields, params, token_ids=token_ids, progress=progress)

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
    devices = startup.start(_PLATFORM.value)
    if command == "import":
        import_checkpoint(directory, workdir, devices, _PARAM_DTYPE.value, _IGNORE.value)
        print(
            f"{directory} is the checkpoint at step 0 of {workdir}: "
            f"--config.init_from={workdir} starts from it, where config.model is the same"
        )
    else:
        family = export_checkpoint(workdir, directory, devices, _FAMILY.value, _MODEL_TYPE.value)
        print(f"{directory} is a {family}")


if __name__ == "__main__":
    _FROM = flags.DEFINE_string("from", "", "import: the directory of a Hugging Face checkpoint.")
    _TO = flags.DEFINE_string("to", "", "export: the directory to write.")
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
    _PLATFORM = flags.DEFINE_string(
        "platform", "", "tpu | gpu | cpu; by default the first that is there."
    )
    app.run(main)
