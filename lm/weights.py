"""Weights for an experiment, from a run's checkpoint or from a Hugging Face directory."""

from etils import epath
from ml_collections import ConfigDict

from lm import build, checkpoint, files
from lm.hf import directory as hf


def load_weights(
    experiment: build.Experiment, source: epath.Path, *, averaged: bool, step: int | None = None
):
    """Returns (parameters, step).

    Args:
      source: a run directory, or a Hugging Face checkpoint, whose step is 0.
      averaged: take the moving average where the run kept one.
      step: of a run's checkpoint; None: the newest.

    Raises:
      ValueError: there is none, or it is another model's, or another tokenizer's.
    """
    abstract_params = experiment.program.abstract_state.params
    if hf.is_checkpoint(source):
        return hf.Checkpoint(source).load(abstract_params, hf.progress_line(str(source))), 0

    with checkpoint.open_run(source, step) as saved:
        checkpoint.check_meta(saved.meta, str(source))
        check_tokenizer(experiment, saved.meta, source)
        return saved.restore_params(abstract_params, averaged=averaged), saved.step


def source_of(config: ConfigDict, workdir: epath.Path) -> epath.Path:
    """Where the weights to be looked at lie: config.init_from, or else the run directory.

    Raises:
      ValueError: there are none at config.init_from.
    """
    if not config.init_from:
        return workdir
    source = epath.Path(files.expand(config.init_from))
    if not (hf.is_checkpoint(source) or checkpoint.steps(source / "checkpoints")):
        raise ValueError(
            f"config.init_from = {config.init_from!r} has no checkpoint; wanted a run directory, "
            "with checkpoints/ in it, or the directory of a Hugging Face checkpoint"
        )
    return source


def check_tokenizer(experiment: build.Experiment, meta: dict, where: epath.Path) -> None:
    """Raises ValueError if a checkpoint's tokenizer is not the experiment's."""
    saved, wanted = meta["tokenizer"], experiment.tokenizer
    if saved["fingerprint"] != wanted.fingerprint:
        raise ValueError(
            f"{where} was trained with the tokenizer {saved['fingerprint']} "
            f"({saved['vocab_size']} ids), config.tokenizer gives {wanted.fingerprint} "
            f"({wanted.vocab_size} ids); its own is at {where}/tokenizer (config.tokenizer.path)"
        )
