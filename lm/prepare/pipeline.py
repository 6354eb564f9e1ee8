"""A preparation as a whole: from a configuration to a set with its card."""

import logging
import os

from etils import epath
from ml_collections import ConfigDict

from lm import files, progress
from lm.prepare import card as cards
from lm.prepare import clean, collect, contamination, duplicates, engine, quality, tokens, write
from lm.prepare import config as prepare_config
from lm.prepare.engine import Stage

STAGES = {
    "collect": collect.stages,
    "clean": clean.stages,
    "exact_duplicates": duplicates.exact_stages,
    "near_duplicates": duplicates.near_stages,
    "line_duplicates": duplicates.line_stages,
    "quality": quality.stages,
    "decontaminate": contamination.stages,
    "tokenizer": tokens.stages,
    "write": write.stages,
}


def stages_of(config: ConfigDict) -> list[Stage]:
    """Returns the stages of a configuration.

    Raises:
      ValueError: a configuration that can't be run; sources without files.
    """
    prepare_config.check(config)
    stages = []
    for name in config.stages:
        stages += STAGES[name](config) if name in STAGES else [clean.own_stage(name, config)]
    return stages


def prepare(config: ConfigDict, out: epath.Path, beam: list[str] | None = None) -> epath.Path:
    """Makes the corpus of a configuration, or what is missing of it.

    Returns:
      The folder of the set, as TFDS lays it out: out/NAME/VERSION.

    Raises:
      ValueError: a configuration or an input that can't be used; a card that breaks config.limits.
    """
    with progress.activity("looking at the sources"):
        stages = stages_of(config)
    folder = out / config.name / config.version
    named = engine.folders(stages, out)
    key = named[-1].rpartition("-")[2]
    if is_whole(folder, key):
        logging.info("%s is there already, made of the same files in the same way", folder)
        return folder

    if config.engine == "beam":
        made = engine.run_beam(stages, named, beam or [])
    else:
        made = engine.run_local(stages, named, config.workers or os.cpu_count() or 1)

    return _publish(made, stages, key, config, out)


def is_whole(folder: epath.Path, key: str) -> bool:
    """Whether a folder has the set of a key, with all of its files."""
    if not (folder / "card.json").exists():
        return False
    card = files.read_json(folder / "card.json")
    if card["key"] != key or not (folder / "dataset_info.json").exists():
        return False
    for split, about in card["splits"].items():
        pattern = f"{card['name']}-{split}.array_record-*-of-{about['shards']:05d}"
        if len(list(folder.glob(pattern))) != about["shards"]:
            return False

    return True


def _publish(
    made: engine.Made, stages: list[Stage], key: str, config: ConfigDict, out: epath.Path
) -> epath.Path:
    """Makes the set's folder of what the stages left, in the place of an older one."""
    card = cards.make(made, stages, key, config)
    if broken := cards.broken_limits(card, config.limits):
        cards.write(card, out / "refused")
        raise ValueError(
            f"the corpus is not what its limits want; {out / 'refused'} has its card:\n  "
            + "\n  ".join(broken)
        )

    folder = out / config.name / config.version

    # What a start that ended here has left would be part of the set.
    if folder.parent.exists():
        for left in folder.parent.glob(f"{config.version}.*.tmp"):
            left.rmtree()
    # A bucket can't rename a folder: the card, which comes last, says that all is there.
    is_bucket = "://" in str(folder)
    if is_bucket and folder.exists():
        folder.rmtree()
    partial = folder if is_bucket else folder.parent / f"{config.version}.{os.getpid()}.tmp"
    write.publish(made, config, partial)
    cards.write(card, partial)

    if not is_bucket:
        if folder.exists():
            folder.rmtree()
        partial.rename(folder)
    if not config.keep_stages:
        (out / "stages").rmtree()
    return folder
