"""Weights for an experiment, from a run's checkpoint or from a Hugging Face directory."""

import logging
from collections.abc import Collection, Sequence

import jax
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
      ValueError: there is none, or it is another model's, or another tokenizer's; or it has no
        head that the model has, unless config.init_new_heads wants that.
    """
    abstract_params = experiment.program.abstract_state.params
    if hf.is_checkpoint(source):
        abstract_params, new_heads = _without_new_heads(experiment, abstract_params, (), source)
        params = hf.Checkpoint(source).load(abstract_params, hf.progress_line(str(source)))
        return _with_heads(experiment, params, new_heads), 0

    with checkpoint.open_run(source, step) as saved:
        checkpoint.check_meta(saved.meta, str(source))
        check_tokenizer(experiment, saved.meta, source)
        abstract_params, new_heads = _without_new_heads(
            experiment, abstract_params, saved.heads(), source
        )
        params = saved.restore_params(abstract_params, averaged=averaged)
        return _with_heads(experiment, params, new_heads), saved.step


def _without_new_heads(
    experiment: build.Experiment, params: dict, stored: Collection[str], source: epath.Path
) -> tuple[dict, list[str]]:
    """(the parameters without the heads that are to be drawn, the names of these).

    Args:
      stored: the heads that are at `source`.

    Raises:
      ValueError: heads that aren't there, and that the configuration doesn't want to be drawn.
    """
    heads = params.get("heads", {})
    new = [name for name in heads if name not in stored]
    if not new:
        return params, []
    if not experiment.config.init_new_heads:
        raise ValueError(
            f"{source} has no heads {new} (config.model.heads = "
            f"{experiment.config.model.heads!r}); config.init_new_heads = True draws them at random"
        )
    kept = {name: head for name, head in heads.items() if name in stored}
    others = {name: value for name, value in params.items() if name != "heads"}
    return (others | {"heads": kept} if kept else others), new


def _with_heads(experiment: build.Experiment, params: dict, names: Sequence[str]) -> dict:
    """The parameters with heads of these names as they are in a fresh model."""
    if not names:
        return params
    logging.info("heads drawn at random: %s", ", ".join(names))
    make_params = experiment.program.make_params
    fresh = jax.jit(lambda key: make_params(key)["heads"])(jax.random.key(experiment.config.seed))
    heads = params.get("heads", {}) | {name: fresh[name] for name in names}
    return params | {"heads": heads}


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
