"""Checkpoints from and to Hugging Face's format:

    python -m lm.convert import --from=DIR --workdir=RUN      a checkpoint directory becomes a run's checkpoint
    python -m lm.convert export --workdir=RUN --to=DIR        the newest checkpoint of a run becomes one that transformers loads

Nothing is downloaded, and no code of a checkpoint's is run. `config.init_from=DIR` starts from such
a directory without this.
"""  # noqa: E501

import json
import logging
import os
import sys
from pathlib import Path

import jax
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from lm import build, checkpoint, files, startup
from lm import config as config_lib
from lm.data import tokenizer as tokenizers
from lm.hf import directory as hf
from lm.hf import families

COMMANDS = ("import", "export")


def import_checkpoint(source: Path, workdir: epath.Path, devices, param_dtype: str = "") -> None:
    """Writes a run directory whose checkpoint, at step 0, is that of `source`.

    Args:
      param_dtype: "": the source's own.

    Raises:
      ValueError: what can't be read, see `lm.hf.checkpoint.Source`; a workdir in use.
    """
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is in use; take another --workdir")
    found = hf.Source(source)
    config = config_lib.default()
    config.model.update(found.fields)
    config.model.param_dtype = param_dtype or found.dtype()
    config.data.length = min(config.data.length, config.model.context_length)
    tokenizer = tokenizers.load(source)
    params = found.load(
        build.weights(config, devices, tokenizer.vocab_size).params,
        hf.progress_line(f"import {source}"),
    )
    meta = {
        "config": config.to_dict(),
        "hf": found.record(),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "files": checkpoint.pack_tokenizer(tokenizer),
        },
    }
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", keep=1)
    checkpointer.save(0, {"params": params}, json.loads(json.dumps(meta)), {})
    checkpointer.close()
    if jax.process_index() == 0:
        (workdir / "tokenizer").mkdir(parents=True, exist_ok=True)
        tokenizer.save(workdir / "tokenizer")
        files.write_whole(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def export_checkpoint(workdir: epath.Path, target: Path, devices, family: str = "") -> str:
    """Writes the newest checkpoint of a run (its moving average, where it has one) as a directory
    that transformers loads. One that was imported and not changed becomes what it was. Returns the
    family's name.

    Raises:
      ValueError: no such checkpoint, no such family, or none that has this model; a target in use.
    """
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; take another --to")
    if family and family not in families.FAMILIES:
        raise ValueError(f"--family={family}; valid: {sorted(families.FAMILIES)}")
    saved: dict = {}

    def wanted(meta):
        """The parameters that the checkpoint has, after making sure that they can be written."""
        config = config_lib.default()
        config.model = ConfigDict(meta["config"]["model"])
        config.model.vocab_size = config.model.vocab_size or meta["tokenizer"]["vocab_size"]
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in config.model.to_dict().items()
        }
        original = None if family else meta.get("hf")
        if original:
            table = families.family_of(original["config"])
        else:
            table = families.FAMILIES[family] if family else families.fitting(fields)
            families.write_config(table, fields)
        saved.update(
            fields=fields,
            original=original,
            table=table,
            tokenizer=checkpoint.unpack_tokenizer(meta["tokenizer"]["files"]),
        )
        return build.weights(config, devices, meta["tokenizer"]["vocab_size"]).params

    params, step = checkpoint.restore_weights(workdir, wanted, averaged=True)
    fields, original, table, tokenizer = (
        saved[name] for name in ("fields", "original", "table", "tokenizer")
    )
    logging.info("step %d of %s is a %s", step, workdir, table.name)
    progress = hf.progress_line(f"export {target}")
    if original:
        hf.save_as(target, original, fields, params, progress=progress)
    else:
        ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=None)
        hf.save(target, table, fields, params, token_ids=ids, progress=progress)
    tokenizer.save(epath.Path(target))
    (target / tokenizers.SPECIAL_IDS).unlink(missing_ok=True)
    return table.name


def main(argv: list[str]) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        if len(argv) != 2 or argv[1] not in COMMANDS:
            raise ValueError(
                f"wanted one of {list(COMMANDS)}, such as python -m lm.convert import --from=DIR "
                f"--workdir=RUN; got {argv[1:]}"
            )
        other = _FROM if argv[1] == "import" else _TO
        if not other.value or not _WORKDIR.value:
            raise ValueError(f"{argv[1]} needs --{other.name}=DIR and --workdir=RUN")
        directory, workdir = (
            Path(os.path.expanduser(other.value)),
            epath.Path(os.path.expanduser(_WORKDIR.value)),
        )
        devices = startup.start(_PLATFORM.value)
        if argv[1] == "import":
            import_checkpoint(directory, workdir, devices, _PARAM_DTYPE.value)
            print(
                f"{directory} is the checkpoint at step 0 of {workdir}: "
                f"--config.init_from={workdir} starts from it, where config.model is the same"
            )
        else:
            print(
                f"{directory} is a {export_checkpoint(workdir, directory, devices, _FAMILY.value)}"
            )
    except (ValueError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


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
    _FAMILY = flags.DEFINE_string(
        "family",
        "",
        "export: the model_type to write; by default the one it came from, or the first that has "
        "such models.",
    )
    _PLATFORM = flags.DEFINE_string(
        "platform", "", "tpu | gpu | cpu; by default the first that is there."
    )
    app.run(main)
