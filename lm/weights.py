"""Weights for an experiment, from a run's checkpoint or from a Hugging Face directory."""

from etils import epath

from lm import build, checkpoint
from lm.hf import directory as hf


def check_tokenizer(experiment: build.Experiment, meta: dict, where: epath.Path) -> None:
    """Raises ValueError if a checkpoint's tokenizer is not the experiment's."""
    theirs, ours = meta["tokenizer"], experiment.tokenizer
    if theirs["fingerprint"] != ours.fingerprint:
        raise ValueError(
            f"{where} was trained with the tokenizer {theirs['fingerprint']} "
            f"({theirs['vocab_size']} ids), config.tokenizer gives {ours.fingerprint} "
            f"({ours.vocab_size} ids); its own is at {where}/tokenizer (config.tokenizer.path)"
        )


def load_weights(
    experiment: build.Experiment, source: epath.Path, *, averaged: bool, at: int | None = None
):
    """(parameters, step) of a run directory's newest checkpoint, or of that of step `at`, or of a
    Hugging Face checkpoint.

    Raises:
      ValueError: there is none, or it is another model's, or another tokenizer's.
    """
    if hf.is_checkpoint(source):
        return hf.Source(source).load(
            experiment.abstract_state.params, hf.progress_line(str(source))
        ), 0

    def wanted(meta):
        check_tokenizer(experiment, meta, source)
        return experiment.abstract_state.params

    return checkpoint.restore_weights(source, wanted, averaged=averaged, step=at)
