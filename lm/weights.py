"""Weights for an experiment, from a run's checkpoint or from a Hugging Face directory;
config.init_resize draws rows for new tokens.
"""

import fnmatch
import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from lm import build, checkpoint, files, trained
from lm import config as config_lib
from lm.data import tokenizer as tokenizers
from lm.data.tokenizer import Tokenizer
from lm.hf import directory as hf
from lm.nn import lora, nf4


def load_weights(
    experiment: build.Experiment, source: epath.Path, *, averaged: bool, step: int | None = None
):
    """Returns (parameters, step).

    Args:
      source: a run directory, or a Hugging Face checkpoint, whose step is 0.
      averaged: take the moving average where the run kept one.
      step: of a run's checkpoint; None: the newest.

    Raises:
      ValueError: there is none, or it is another model's, or another tokenizer's (with
        config.init_resize, one whose ids the experiment's doesn't have); or it lacks parameters
        that config.init_new doesn't name.
    """
    program = experiment.program
    if not getattr(program.model_config, "quantize", ""):
        return _load_plain(experiment, source, program.abstract_params, averaged, step)

    # What is stored is not quantized yet.
    plain = build.abstract_model(
        _not_quantized(experiment.config), program.devices, program.model_config.vocab_size
    )
    params, step = _load_plain(experiment, source, plain.params, averaged, step)

    pack = functools.partial(nf4.packed, abstract=program.abstract_params, axes=plain.axes)
    layouts = jax.tree.map(_layout, program.abstract_params)
    return jax.jit(pack, out_shardings=layouts)(params), step


def _layout(leaf):
    return leaf.sharding


def _not_quantized(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references().unlock()
    config.model.quantize = ""
    return config


def without_adapters(config: ConfigDict) -> ConfigDict:
    """Returns a configuration whose model has its weights whole."""
    config = config.copy_and_resolve_references().unlock()
    if "lora_rank" in config.model:
        config.model.update(lora_rank=0, quantize="")
    return config


def _load_plain(
    experiment: build.Experiment,
    source: epath.Path,
    abstract_params: dict,
    averaged: bool,
    step: int | None,
):
    """What `load_weights` returns, before anything is quantized."""
    resizes = experiment.config.init_resize
    if hf.is_checkpoint(source):
        hf_checkpoint = hf.Checkpoint(source)
        read = functools.partial(hf_checkpoint.load, progress=hf.progress_line(str(source)))
        load = functools.partial(_load_with_new, experiment, read, None, source)
        if not resizes:
            return load(abstract_params), 0
        num_rows = hf_checkpoint.fields["vocab_size"]
        own_tokenizer = tokenizers.load(source)
        resized = _load_resized(experiment, load, abstract_params, num_rows, own_tokenizer, source)
        return resized, 0

    with checkpoint.open_run(source, step) as saved:
        checkpoint.check_meta(saved.meta, str(source))
        read = functools.partial(saved.restore_params, averaged=averaged)
        load = functools.partial(_load_with_new, experiment, read, saved.paths(), source)
        if "frozen" in saved.meta:
            return _load_with_frozen(experiment, saved, averaged, source), saved.step
        if not resizes:
            check_tokenizer(experiment, saved.meta, source, RESIZE_ADVICE)
            return load(abstract_params), saved.step
        saved_tokenizer = checkpoint.tokenizer_from_meta(saved.meta["tokenizer"])
        fields = config_lib.stored_model(saved.meta, str(source), experiment.config.model.type)
        num_rows = fields["vocab_size"] or saved_tokenizer.vocab_size
        resized = _load_resized(
            experiment, load, abstract_params, num_rows, saved_tokenizer, source
        )
        return resized, saved.step


def describe_frozen(config: ConfigDict, frozen: dict) -> dict[str, str]:
    """What a checkpoint says of the parameters that it doesn't have."""
    return {"init_from": config.init_from, "fingerprint": trained.fingerprint(frozen)}


def load_frozen(experiment: build.Experiment, meta: dict, where: str) -> dict:
    """Returns the parameters that aren't trained, from config.init_from.

    Args:
      meta: what `describe_frozen` said of them.
      where: what errors call the checkpoint.

    Raises:
      ValueError: they are others than those that the checkpoint was trained with.
    """
    config = experiment.config
    source = epath.Path(files.expand(config.init_from))
    params, _ = load_weights(experiment, source, averaged=False)
    _, frozen = trained.split(params, experiment.program.is_trained)
    check_frozen(frozen, meta, where, f"config.init_from = {config.init_from}")
    return frozen


def _load_with_frozen(
    experiment: build.Experiment,
    saved: checkpoint.SavedCheckpoint,
    averaged: bool,
    source: epath.Path,
) -> dict:
    """The parameters of a run that trains a part of them: the rest is in config.init_from.

    Raises:
      ValueError: the configuration doesn't say where the rest is, or says it otherwise.
    """
    config = experiment.config
    if not config.init_from or epath.Path(files.expand(config.init_from)) == source:
        raise ValueError(
            f"{source} has trained parameters only (config.train.trained); the others are in "
            f"{saved.meta['frozen']['init_from']!r}, which config.init_from should name. To start "
            "another run from both: python -m lm.convert merge"
        )
    check_tokenizer(experiment, saved.meta, source)
    abstract_trained = experiment.program.abstract_state.params
    params = saved.restore_params(abstract_trained, averaged=averaged)
    return trained.merge(params, load_frozen(experiment, saved.meta["frozen"], str(source)))


def load_merged(
    saved: checkpoint.SavedCheckpoint,
    config: ConfigDict,
    devices,
    vocab_size: int,
    base: str,
    where: epath.Path,
) -> tuple[build.AbstractModel, dict]:
    """Returns (model, parameters) of a run that trains a part of them, or adapters: those of a
    model without adapters, which are merged into its weights.

    Weights that were quantized are what their codes stand for: the adapters were trained on them.

    Args:
      config: its `model` is the run's.
      base: where the other parameters are: a run directory, or that of a Hugging Face checkpoint.
      where: the run.

    Raises:
      ValueError: no base, or other parameters than those that the run was trained with.
    """
    frozen_meta = saved.meta["frozen"]
    if not base:
        raise ValueError(
            f"{where} has trained parameters only; the others are in {frozen_meta['init_from']!r}, "
            "which --base should name"
        )
    model = build.abstract_model(config, devices, vocab_size)
    plain = model
    if getattr(model.model_config, "quantize", ""):
        plain = build.abstract_model(_not_quantized(config), devices, vocab_size)

    stored = saved.paths()
    abstract_trained, abstract_frozen = trained.split(plain.params, stored.__contains__)
    params = saved.restore_params(abstract_trained, averaged=True)
    frozen = _load_base(base, abstract_frozen, config, devices)
    if plain is not model:
        as_trained = nf4.packed(frozen, model.params, plain.axes)
        check_frozen(as_trained, frozen_meta, where, base)
        frozen = nf4.unpacked(as_trained, plain.params, plain.axes)
    else:
        check_frozen(frozen, frozen_meta, where, base)

    whole = trained.merge(params, frozen)
    if not getattr(model.model_config, "lora_rank", 0):
        return model, whole

    merge = functools.partial(lora.merged, scale=lora.scale(model.model_config))
    target = build.abstract_model(without_adapters(config), devices, vocab_size)
    return target, jax.jit(merge, out_shardings=jax.tree.map(_layout, target.params))(whole)


def _load_base(base: str, abstract_frozen: dict, config: ConfigDict, devices) -> dict:
    """The frozen parameters, out of the checkpoint of a whole model.

    Args:
      config: of the run that was trained on it.
    """
    directory = build.checkpoint_directory(base, "--base")
    if not hf.is_checkpoint(directory):
        with checkpoint.open_run(directory) as saved:
            return saved.restore_params(abstract_frozen, averaged=False)

    # Its tensors are read all or none. The run may have more tokens, and heads that no family has.
    hf_checkpoint = hf.Checkpoint(directory)
    whole = without_adapters(config)
    whole.model.vocab_size = hf_checkpoint.fields["vocab_size"]
    model = build.abstract_model(whole, devices, whole.model.vocab_size)
    abstract_stored, _ = trained.split(model.params, lambda path: not path.startswith("heads/"))
    params = hf_checkpoint.load(abstract_stored, hf.progress_line(base))
    frozen_paths = set(trained.paths_of(abstract_frozen))
    return trained.split(params, frozen_paths.__contains__)[0]


def check_frozen(frozen: dict, meta: dict, where: epath.Path, source: str) -> None:
    """Raises ValueError if these aren't the frozen parameters that a checkpoint was trained with.

    Args:
      meta: what `describe_frozen` said of them.
    """
    found = trained.fingerprint(frozen)
    if found != meta.get("fingerprint"):
        raise ValueError(
            f"{where} was trained on frozen parameters with the fingerprint "
            f"{meta.get('fingerprint')}, from {meta.get('init_from')!r}; {source!r} gives {found}"
        )


def load_others(experiment: build.Experiment) -> dict[str, Any]:
    """Returns the parameters of config.models by name. They are in no checkpoint of the run.

    Raises:
      ValueError: another tokenizer's model.
    """
    return {name: _load_other(experiment, name) for name in experiment.config.models}


def _load_other(experiment: build.Experiment, name: str):
    source = epath.Path(files.expand(experiment.config.models[name].init_from))
    abstract_params = experiment.program.abstract_fixed.others[name]
    logging.info("the model %r from %s", name, source)
    if hf.is_checkpoint(source):
        return hf.Checkpoint(source).load(abstract_params, hf.progress_line(str(source)))
    with checkpoint.open_run(source) as saved:
        if "frozen" in saved.meta:
            raise ValueError(
                f"config.models.{name}.init_from = {str(source)!r} has trained parameters only; "
                f"the others are in {saved.meta['frozen']['init_from']!r}. python -m lm.convert "
                "merge makes a run with the whole model"
            )
        check_tokenizer(experiment, saved.meta, source)
        return saved.restore_params(abstract_params, averaged=True)


def _load_with_new(
    experiment: build.Experiment,
    read: Callable,
    stored: Collection[str] | None,
    source: epath.Path,
    abstract_params: dict,
) -> dict:
    """The parameters, those of config.init_new and adapters that `source` doesn't have as in a
    fresh model.

    Args:
      read: abstract parameters -> parameters.
      stored: the paths of the parameters at `source`; None: all that no fresh ones are wanted for.

    Raises:
      ValueError: other parameters that aren't there.
    """
    patterns = [*experiment.config.init_new.split(","), lora.PARAMS]

    def is_wanted(path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern.strip()) for pattern in patterns)

    def is_stored(path: str) -> bool:
        return not is_wanted(path) if stored is None else path in stored

    paths = trained.paths_of(abstract_params)
    missing = [path for path in paths if not is_stored(path) and not is_wanted(path)]
    # No family of Hugging Face's has them.
    if stored is None:
        missing = [path for path in paths if path.startswith("heads/") and is_stored(path)]
    if missing:
        raise ValueError(
            f"{source} has no {missing[:5]}; config.init_new = 'heads/*' (patterns with commas "
            "between them) draws such parameters at random"
        )

    abstract_stored, abstract_new = trained.split(abstract_params, is_stored)
    params = read(abstract_stored)
    if not abstract_new:
        return params
    logging.info("drawn at random: %s", ", ".join(trained.paths_of(abstract_new)))

    new_paths = set(trained.paths_of(abstract_new))

    def draw(key):
        return trained.split(experiment.program.make_params(key), new_paths.__contains__)[0]

    layouts = jax.tree.map(lambda leaf: leaf.sharding, abstract_new)
    fresh = jax.jit(draw, out_shardings=layouts)(jax.random.key(experiment.config.seed))
    return trained.merge(params, fresh)


def source_of(config: ConfigDict, workdir: epath.Path) -> epath.Path:
    """Where the weights to be looked at lie: the run directory if it has checkpoints, or else
    config.init_from.

    Raises:
      ValueError: there are none at config.init_from.
    """
    if not config.init_from:
        return workdir
    if checkpoint.steps(workdir / "checkpoints"):
        logging.info("the checkpoints of %s; config.init_from is where it began", workdir)
        return workdir
    return build.checkpoint_directory(config.init_from, "config.init_from")


def check_tokenizer(
    experiment: build.Experiment, meta: dict, where: epath.Path, advice: str = ""
) -> None:
    """Raises ValueError, which ends in `advice`, if a checkpoint's tokenizer is not the
    experiment's.
    """
    saved, wanted = meta["tokenizer"], experiment.tokenizer
    if saved["fingerprint"] != wanted.fingerprint:
        raise ValueError(
            f"{where} was trained with the tokenizer {saved['fingerprint']} "
            f"({saved['vocab_size']} ids), config.tokenizer gives {wanted.fingerprint} "
            f"({wanted.vocab_size} ids); its own is at {where}/tokenizer (config.tokenizer.path)"
            f"{advice}"
        )


# --- rows for new tokens ---

RESIZE_ADVICE = "; config.init_resize = True draws rows for ids that come behind all of its own"
# Of a new row, as a share of the old rows' standard deviation.
NEW_ROW_NOISE = 1e-5**0.5


def _load_resized(
    experiment: build.Experiment,
    load: Callable,
    abstract_params: dict,
    num_rows: int,
    source_tokenizer: Tokenizer,
    where: epath.Path,
):
    """The parameters, with rows for the ids that the source's tokenizer lacks.

    Args:
      load: abstract parameters -> parameters.
      num_rows: of the source's tables of the vocabulary, in which `where` may have more than it has
        ids.
    """
    program = experiment.program
    _check_extends(experiment.tokenizer, source_tokenizer, where)
    num_kept = min(source_tokenizer.vocab_size, num_rows)
    num_new = experiment.tokenizer.vocab_size - num_kept
    if not num_new and num_rows == program.model_config.vocab_size:
        return load(abstract_params)

    def as_stored(leaf, is_table):
        if not is_table:
            return leaf
        # The mesh need not divide this number of rows.
        whole_rows = PartitionSpec(None, *leaf.sharding.spec[1:])
        layout = NamedSharding(leaf.sharding.mesh, whole_rows)
        return jax.ShapeDtypeStruct((num_rows, *leaf.shape[1:]), leaf.dtype, sharding=layout)

    are_tables = _vocabulary_tables(experiment, abstract_params)
    if num_new:
        _check_new_rows_are_trained(experiment, are_tables, num_new)
    params = load(jax.tree.map(as_stored, abstract_params, are_tables))
    logging.info("%s: %d rows are kept, %d ids have new ones", where, num_kept, num_new)

    leaves, structure = jax.tree.flatten(params)
    wanted = zip(jax.tree.leaves(abstract_params), jax.tree.leaves(are_tables))
    for i, (leaf, is_table) in enumerate(wanted):
        if is_table:
            key = jax.random.fold_in(jax.random.key(experiment.config.seed), i)
            resize = functools.partial(resize_rows, num_kept=num_kept, num_rows=leaf.shape[0])
            leaves[i] = jax.jit(resize, out_shardings=leaf.sharding)(leaves[i], key=key)
    return jax.tree.unflatten(structure, leaves)


def resize_rows(table: jax.Array, *, num_kept: int, num_rows: int, key: jax.Array) -> jax.Array:
    """Returns a table of `num_rows` rows: the first `num_kept` as they are, the others drawn.

    New rows are the mean of the kept ones, with little noise. Of a head, the new ids' logits then
    are the mean of the others, so the probabilities of the old ids shrink to no less than V / (V +
    n), for n new ids beside V (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
    Language Models"). Rows drawn as for a fresh model give no such bound. The noise lets the new
    rows differ.

    Args:
      table: [rows, ...].
    """
    kept = table[:num_kept]
    old = kept.astype(jnp.float32)
    mean, std = old.mean(axis=0, keepdims=True), old.std(axis=0, keepdims=True)
    noise = jax.random.normal(key, (num_rows - num_kept, *table.shape[1:]), jnp.float32)
    new = mean + NEW_ROW_NOISE * std * noise
    return jnp.concatenate([kept, new.astype(table.dtype)])


def _vocabulary_tables(experiment: build.Experiment, abstract_params: dict):
    """Which parameters have a row for each id, as a tree: those that one id more makes larger."""
    program = experiment.program
    num_ids = program.model_config.vocab_size + 1
    config = _not_quantized(experiment.config)
    config.model.vocab_size = num_ids
    _, make_model = build.make_model_fn(config, num_ids, program.devices[0].platform)
    larger = nnx.eval_shape(lambda: make_model(jax.random.key(0)))
    larger_params = nnx.to_pure_dict(nnx.split(larger, nnx.Param)[1])

    def is_larger(leaf, larger_leaf):
        return leaf.shape != larger_leaf.shape

    return jax.tree.map(is_larger, abstract_params, larger_params)


def _check_new_rows_are_trained(experiment: build.Experiment, are_tables, num_new: int) -> None:
    """Raises ValueError if a table that gets new rows stays as it is."""
    frozen = []
    for keys, is_table in jax.tree_util.tree_leaves_with_path(are_tables):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if is_table and not experiment.program.is_trained(path):
            frozen.append(path)
    if not frozen:
        return

    config = experiment.config
    patterns = config.train.trained
    if patterns == "*":
        patterns = lora.PARAMS
    raise ValueError(
        f"config.init_resize = True draws rows for {num_new} new ids, and {frozen} would stay as "
        f"they are drawn: config.train.trained = '{patterns},{','.join(frozen)}' trains them too; "
        "or take a chat template without tokens of its own (config.tokenizer.reserve = '')"
    )


def _check_extends(new: Tokenizer, old: Tokenizer, where: epath.Path) -> None:
    """Raises ValueError if ids of the tokenizer `old` mean something else in `new`."""
    if new.fingerprint == old.fingerprint:
        return
    common = range(min(new.vocab_size, old.vocab_size))
    num_equal = sum(new.spell([i]) == old.spell([i]) for i in common)
    if num_equal < old.vocab_size:
        raise ValueError(
            f"config.init_resize = True: {where} has the tokenizer {old.fingerprint} "
            f"({old.vocab_size} ids), and config.tokenizer gives {new.fingerprint} "
            f"({new.vocab_size} ids), in which {old.vocab_size - num_equal} of those ids are "
            "other tokens, or none; wanted its own with more behind (config.tokenizer.path, "
            "config.tokenizer.reserve)"
        )
