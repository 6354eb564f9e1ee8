"""From a configuration to objects. The only file that turns strings into things.

It trains no model and writes nothing to the run directory (a tokenizer may be trained, and kept in
config.data.cache_dir).
"""

import dataclasses
import functools
import importlib
import inspect
import logging
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lm import checkpoint, collectives, files, looking, optim, sharding, startup, step, trained
from lm import config as config_lib
from lm.data import batch as batch_contract
from lm.data import chat, labelled, mixtures, pack, prompts, roles, seq2seq, units
from lm.data import tokenizer as tokenizers
from lm.data.loader import Loader
from lm.data.sources import Documents
from lm.decoding.generator import Generator, Sources
from lm.decoding.sampling import Sampling
from lm.evals import entries
from lm.evals.causal_answers import CausalAnswers
from lm.evals.masked_answers import MaskedAnswers
from lm.evals.predict import CompiledFns, Evaluator, PredictFns, compiled, never_stop
from lm.evals.source_answers import SourceAnswers
from lm.hf import directory as hf
from lm.models.transformer import EXECUTION_FIELDS
from lm.nn import lora
from lm.nn.attention import KERNEL_PLATFORMS

LONGEST_RUN = 2**31 - 1  # steps


def resolve(path: str, what: str) -> Any:
    """The object at a dotted path.

    Raises:
      ValueError: there is none; `what` is the config key that names it.
    """
    module, _, name = path.rpartition(".")
    try:
        if not all(part.isidentifier() for part in path.split(".")):
            raise ValueError("no dotted path")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        try:
            return importlib.import_module(path)
        except (ImportError, ValueError, TypeError):
            raise ValueError(
                f"{what} = {path!r} can't be imported ({error}); wanted a dotted path, such as "
                "lm.data.sources.text"
            ) from None


# What a run reads: documents and their tokenizer.


def documents(config: ConfigDict, split: str, key: str = "config.data.split") -> Documents:
    """A split of the corpus.

    Args:
      key: the configuration's key for the split, for messages.

    Raises:
      ValueError: see `documents_of`.
    """
    data = config.data
    if not data.mixture:
        return documents_of(data.source, data.source_args.to_dict(), split, "config.data", key)

    parts, schedules, sizes = {}, {}, {}
    for name, part in data.mixture.items():
        where = f"config.data.mixture.{name}"
        parts[name] = documents_of(part.source, part.source_args.to_dict(), split, where, key)
        schedules[name] = mixtures.schedule(part.weight, f"{where}.weight")
        sizes[name] = part.size
    return mixtures.mix(parts, schedules, sizes, config.data.mixture_exponent)


def documents_of(
    path: str, arguments: Mapping[str, Any], split: str, where: str, key: str
) -> Documents:
    """A split of a source.

    Args:
      path, arguments: the source's dotted path, and its arguments.
      where, key: the configuration's keys for the source and for the split, for messages.

    Raises:
      ValueError: no such source, or arguments that it doesn't take; see the source.
    """
    source = resolve(path, f"{where}.source")
    if not callable(source):
        raise ValueError(
            f"{where}.source = {path!r} is not a function; lm.data.sources has "
            f"{['corpus', 'jsonl', 'text', 'tfds']}"
        )
    signature = inspect.signature(source)
    try:
        signature.bind(split, **arguments)
        _check_annotations(signature, arguments)
    except TypeError as error:
        raise ValueError(
            f"{where}.source_args = {arguments}: {error}; {path} takes {signature}"
        ) from None
    try:
        return source(split, **arguments)
    except ValueError as error:
        raise ValueError(
            f"{error} ({key} = {split!r}, {where}.source_args = {arguments!r:.400})"
        ) from None


def encoded(config: ConfigDict, examples: Documents, tokenizer: tokenizers.Tokenizer) -> Documents:
    """What a source gave, as it is packed: texts as they are, examples as units.

    Raises:
      ValueError: examples without a chat template; see `lm.data.units.encode`.
    """
    if examples.kind == "text":
        return examples
    if examples.kind == "labelled":
        # What an encoder says of a text stands at [CLS]; another model has read it at its end.
        place = "first" if config.model.get("visible") == "full" else "last"
        return labelled.encode(examples, tokenizer, length=config.data.length, place=place)
    if examples.kind == prompts.KIND:
        room = config.data.length - config.rollout.max_new_tokens
        return prompts.encode(examples, tokenizer, room=room)
    if examples.kind == seq2seq.KIND:
        source_length = config.objective.get("source_length", 0)
        return seq2seq.encode(
            examples, tokenizer, length=config.data.length, source_length=source_length
        )
    packed = units.encode(
        examples,
        chat.with_template(tokenizer, config.chat.template),
        learnt=config.chat.learnt,
        too_long=config.chat.too_long,
        length=config.data.length,
        seed=config.seed,
    )
    stored = config.chat.reference_logprobs
    is_stored = config.objective.get("reference") == "stored"
    if is_stored != bool(stored):
        raise ValueError(
            f"config.chat.reference_logprobs = {stored!r} and config.objective.reference = "
            f"{config.objective.get('reference')!r}; 'stored' needs a file, and no other does"
        )
    return units.with_stored(packed, stored) if stored else packed


def _check_annotations(signature: inspect.Signature, arguments: dict[str, Any]) -> None:
    """Raises TypeError for an argument of another plain type than its annotation."""
    for name, value in arguments.items():
        wanted = getattr(signature.parameters.get(name), "annotation", None)
        types = {str: (str,), int: (int,), float: (int, float), bool: (bool,)}.get(wanted)
        is_stray_bool = isinstance(value, bool) and wanted is not bool
        if types and (is_stray_bool or not isinstance(value, types)):
            raise TypeError(f"{name} = {value!r}; wanted {wanted.__name__}")


def make_tokenizer(config: ConfigDict, read_train: Callable[[], Documents]) -> tokenizers.Tokenizer:
    """The tokenizer of config.tokenizer.

    Args:
      read_train: gives the training split, where the tokenizer is trained on it.

    Raises:
      ValueError: a path without a tokenizer, texts that none can be trained on, or roles that can't
        be reserved.
    """
    plain = tokenizer = _make_plain_tokenizer(config, read_train)
    if reserve := config.tokenizer.reserve:
        tokenizer = tokenizer.reserving(reserve)
    if template := config.chat.template:
        tokenizer = chat.with_template(tokenizer, template)
    if tokenizer is not plain:
        tokenizer.texts_as = plain.fingerprint
    return tokenizer


def _make_plain_tokenizer(
    config: ConfigDict, read_train: Callable[[], Documents]
) -> tokenizers.Tokenizer:
    """That of config.tokenizer, before anything is reserved."""
    c = config.tokenizer
    if c.path:
        try:
            return tokenizers.load(epath.Path(files.expand(c.path)))
        except ValueError as error:
            raise ValueError(f"config.tokenizer.path = {c.path!r}: {error}") from None
    if c.kind == "bytes":
        return tokenizers.ByteTokenizer()
    if read_train().kind not in ("text", seq2seq.KIND):
        raise ValueError(
            f"config.tokenizer.path is empty, and config.data.source = {config.data.source!r} has "
            "no texts to train a tokenizer on; wanted that of the model in config.init_from"
        )
    return pack.train_tokenizer(
        read_train(),
        vocab_size=c.vocab_size,
        max_documents=c.max_documents,
        label_prompt=config.data.label_prompt,
        cache_dir=config.data.cache_dir,
    )


def apply_hf_config(config: ConfigDict, *, training: bool = True) -> ConfigDict:
    """The configuration with what a Hugging Face checkpoint in `init_from` decides.

    That is the model, but for how it is executed, and the tokenizer, unless another is given. With
    `init_resize` its vocabulary may be larger. Other configurations come back as they are.

    Args:
      training: the parameters have the dtype of the configuration; else the checkpoint's own, and
        the objective is the one that the model can have.

    Raises:
      ValueError: a checkpoint that can't be read, see `lm.hf.directory.Checkpoint`; with
        `init_resize`, see `make_tokenizer`.
    """
    directory = epath.Path(files.expand(config.init_from)) if config.init_from else None
    if directory is None or not hf.is_checkpoint(directory):
        return config

    hf_checkpoint = hf.Checkpoint(directory)
    config = config.copy_and_resolve_references().unlock()
    asked_size = config.model.vocab_size
    config.model = hf_checkpoint.model(config.model)
    config.tokenizer.path = config.tokenizer.path or str(directory)
    if config.init_resize:
        tokenizer = make_tokenizer(config, functools.partial(documents, config, config.data.split))
        sizes = (asked_size, config.model.vocab_size, tokenizer.vocab_size)
        config.model.vocab_size = max(sizes)
    if not training:
        config.model.param_dtype = hf_checkpoint.dtype()
        fit_objective(config)
    elif hf_checkpoint.dtype() == "float32" and config.model.param_dtype == "bfloat16":
        logging.warning(
            "%s has float32 weights, and config.model.param_dtype = 'bfloat16' rounds them; "
            "float32 trains them as they are",
            directory,
        )
    logging.info("model and tokenizer from %s: %s", directory, hf_checkpoint.family.name)
    return config.lock()


def fit_objective(config: ConfigDict) -> None:
    """Gives an encoder masked language modelling in the place of the default objective, and an
    encoder-decoder sequence to sequence.
    """
    if config.objective.type != config_lib.Objective.type:
        return
    if config.model.get("visible") == "full":
        config.objective = ConfigDict(dict(type="lm.objectives.masked", rate=0.15))
        logging.info("the model is an encoder: its objective is %s", config.objective.type)
    if source_length := config.model.get("source_length", 0):
        config.objective = ConfigDict(
            dict(type="lm.objectives.seq2seq", source_length=source_length)
        )
        logging.info("the model reads sources: its objective is %s", config.objective.type)


# What is compiled: the model, and the steps of a run.


MODEL_MODULE = ("Config", "Model", "flops_per_token")  # what config.model.type has


def model_module(config: ConfigDict) -> types.ModuleType:
    """The module of config.model.type.

    Raises:
      ValueError: there is none, or it lacks something.
    """
    module = resolve(config.model.type, "config.model.type")
    missing = [name for name in MODEL_MODULE if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"config.model.type = {config.model.type!r} has no {' and '.join(missing)}; wanted the "
            f"dotted path of a module with {', '.join(MODEL_MODULE)}, such as {config_lib.MODEL}"
        )
    return module


def make_model_fn(config: ConfigDict, vocab_size: int, platform: str) -> tuple[Any, Callable]:
    """Returns (the model's own Config, a function from a key to the model).

    Raises:
      ValueError: a model too small for the tokenizer, or see the model's Config.
    """
    fields = config.model.to_dict()
    del fields["type"]
    module = model_module(config)
    fields["vocab_size"] = fields["vocab_size"] or vocab_size
    if not fields["compute_dtype"]:
        fields["compute_dtype"] = "float32" if platform == "cpu" else "bfloat16"

    attention = fields.get("attention")
    wanted = KERNEL_PLATFORMS.get(attention, platform)
    if platform != wanted:
        raise ValueError(
            f"config.model.attention = {attention!r} is for {wanted}, and this runs on "
            f'{platform}; "xla" runs everywhere'
        )
    if fields["vocab_size"] < vocab_size:
        raise ValueError(
            f"config.model.vocab_size = {fields['vocab_size']} is below the tokenizer's "
            f"{vocab_size}; 0 takes the tokenizer's, and where config.init_from decides the size, "
            "config.init_resize = True draws the rows that its tables lack"
        )

    model_config = module.Config(**fields)

    def make_model(key: jax.Array):
        return module.Model(model_config, key)

    return model_config, make_model


def _abstract(make_model: Callable):
    """Returns (graphdef, abstract parameters) of a model."""
    return nnx.split(nnx.eval_shape(lambda: make_model(jax.random.key(0))), nnx.Param)


def sees_all(model_config) -> bool:
    """Whether a model is an encoder, which sees all of a text."""
    return getattr(model_config, "visible", "causal") == "full"


def reads_sources(model_config) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(model_config, "source_length", 0))


class AbstractModel(NamedTuple):
    """A model without a run, and without its weights."""

    model_config: Any
    graphdef: Any
    params: dict  # ShapeDtypeStructs with shardings
    axes: dict  # their logical axes
    mesh: Mesh


def abstract_model(
    config: ConfigDict, devices: Sequence[jax.Device], vocab_size: int
) -> AbstractModel:
    """The model of config.model on config.mesh, for a tokenizer of `vocab_size` ids.

    Raises:
      ValueError: see `make_model_fn` and `lm.sharding.shardings`.
    """
    model_config, make_model = make_model_fn(config, vocab_size, devices[0].platform)
    graphdef, abstract = _abstract(make_model)
    params = nnx.to_pure_dict(abstract)
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    axes = sharding.logical_axes(abstract)
    laid_out = jax.tree.map(_lay_out, params, sharding.shardings(params, axes, mesh))
    return AbstractModel(model_config, graphdef, laid_out, axes, mesh)


def _lay_out(param, layout):
    return jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=layout)


def _layout(leaf):
    return leaf.sharding


def checkpoint_directory(path: str, key: str) -> epath.Path:
    """The directory that the configuration's `key` names by `path`.

    Raises:
      ValueError: there is no checkpoint of a run in it, and none of Hugging Face's.
    """
    directory = epath.Path(files.expand(path))
    if not (hf.is_checkpoint(directory) or checkpoint.steps(directory / "checkpoints")):
        raise ValueError(
            f"{key} = {path!r} has no checkpoint; wanted a run directory, with checkpoints/ in it, "
            "or the directory of a Hugging Face checkpoint"
        )
    return directory


def other_model(
    config: ConfigDict, name: str, devices: Sequence[jax.Device], vocab_size: int
) -> AbstractModel:
    """The model config.models.NAME, without its weights: what its `init_from` says it is, on the
    run's mesh.

    Raises:
      ValueError: there is nothing at `init_from`; see `abstract_model`.
    """
    entry = config.models[name]
    directory = checkpoint_directory(entry.init_from, f"config.models.{name}.init_from")
    if hf.is_checkpoint(directory):
        hf_checkpoint = hf.Checkpoint(directory)
        fields = hf_checkpoint.model(config_lib.default().model).to_dict()
        fields["param_dtype"] = hf_checkpoint.dtype()
    else:
        with checkpoint.open_run(directory) as saved:
            checkpoint.check_meta(saved.meta, str(directory))
            fields = config_lib.stored_model(saved.meta, str(directory), config.model.type)

    # How it is executed is the run's to say.
    for field in EXECUTION_FIELDS:
        if field in config.model and field != "param_dtype":
            fields[field] = config.model[field]
    other = config.copy_and_resolve_references().unlock()
    other.model = ConfigDict(fields)
    other.model.update(entry.model)
    return abstract_model(other, devices, vocab_size)


def generator_of(model, params, sampling: Sampling, tokenizer: tokenizers.Tokenizer) -> Generator:
    """A Generator that continues prompts of a tokenizer's ids.

    Args:
      model: what has model_config, graphdef and mesh: an `AbstractModel` or a `Program`.
    """
    sources = Sources()
    if reads_sources(model.model_config):
        _, end = tokenizer.around
        # No target has padding in it, and Marian's decoder begins with it.
        padding = set(tokenizer.roles.get("pad", ())) - set(tokenizer.stop_ids)
        sources = Sources(end, tuple(padding))
    return Generator(
        model.model_config,
        model.graphdef,
        params,
        model.mesh,
        sampling,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
        sources=sources,
    )


class Objective(NamedTuple):
    """What config.objective says, see docs/design.md.

    Attributes:
      arrays: those of a batch, from the loader.
      prepared: those that `prepare` adds.
      prepare: (batch, model, **others) -> the arrays of `prepared`; None: there are none.
      make_windows: tokenizer -> a function (ids of a document, length, numpy Generator) -> its
        windows; None: those of `lm.data.pack.windows`.
      make_transform: tokenizer -> a function (row, numpy Generator) -> row; None: rows stay as
        they are.
      examples: kinds of documents that it is for.
      head_share: of the tokens, those whose logits are needed.
      check: (the model's Config, paths of the trained parameters) -> None; raises ValueError.
      unit_terms: what the loss sums, see `lm.step.make_unit_terms`; None: not units' terms.
      outputs: (model, batch) -> (what a head says at each place, aux); None: there is no head.
    """

    loss: Callable
    token_logprobs: Callable
    arrays: Mapping[str, batch_contract.Array]
    prepared: Mapping[str, batch_contract.Array]
    prepare: Callable | None
    make_windows: Callable | None
    make_transform: Callable | None
    examples: tuple[str, ...]
    head_share: float
    check: Callable
    unit_terms: Callable | None
    outputs: Callable | None

    def loss_fns(self, others: Mapping[str, AbstractModel]) -> step.LossFns:
        """What a step computes, with the other models by name."""
        graphdefs = {name: other.graphdef for name, other in others.items()}
        return step.LossFns(self.loss, self.prepare, graphdefs)


def make_objective(config: ConfigDict) -> Objective:
    """The objective of config.objective.

    Raises:
      ValueError: no such module, or one that lacks something or declares what there is already.
    """
    arguments = config.objective.to_dict()
    where = f"config.objective.type = {arguments['type']!r}"
    module = resolve(arguments.pop("type"), "config.objective.type")
    if not (hasattr(module, "make_loss") and hasattr(module, "token_logprobs")):
        raise ValueError(
            f"{where} has no make_loss and token_logprobs; wanted the dotted path of a module that "
            "has, such as lm.objectives.causal"
        )

    arrays = dict(batch_contract.ARRAYS)
    prepared = dict(getattr(module, "PREPARED", {}))
    declared = module.arrays(**arguments) if hasattr(module, "arrays") else {}
    for name, array in {**getattr(module, "ARRAYS", {}), **declared}.items():
        if name in arrays or name in prepared:
            raise ValueError(f"{where}: ARRAYS has {name!r}, which is there already")
        arrays[name] = array
    has_prepare = hasattr(module, "make_prepare")
    if has_prepare != bool(prepared):
        raise ValueError(f"{where}: make_prepare and PREPARED need each other")

    examples = ("text", "conversation")
    if hasattr(module, "examples"):
        examples = module.examples(**arguments)
    transforms = {}
    for name in ("make_windows", "make_transform"):
        make = getattr(module, name, None)
        transforms[name] = functools.partial(make, **arguments) if make else None
    unit_terms = None
    if hasattr(module, "make_unit_terms"):
        unit_terms = module.make_unit_terms(**arguments)
    return Objective(
        loss=module.make_loss(**arguments),
        token_logprobs=module.token_logprobs,
        arrays=arrays,
        prepared=prepared,
        prepare=module.make_prepare(**arguments) if has_prepare else None,
        **transforms,
        examples=examples,
        head_share=_head_share(module, config.data.length, arguments),
        check=functools.partial(getattr(module, "check", _check_nothing), **arguments),
        unit_terms=unit_terms,
        outputs=getattr(module, "outputs", None),
    )


def _head_share(module, length: int, arguments: Mapping[str, Any]) -> float:
    """Of the tokens of rows of `length`, those whose logits an objective needs."""
    if not hasattr(module, "head_share"):
        return 1.0
    return module.head_share(length=length, **arguments)


def _check_sources(config: ConfigDict, model_config, objective: Objective) -> None:
    """Raises ValueError for a model that reads sources with an objective that has none."""
    if reads_sources(model_config) and "source" not in objective.arrays:
        raise ValueError(
            f"config.objective.type = {config.objective.type!r} has no sources, which an "
            "encoder-decoder reads; wanted lm.objectives.seq2seq, or lm.objectives.span_corruption"
        )


def _check_nothing(model_config, trained: list[str], **arguments) -> None:
    """What an objective that is for any model checks."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a run compiles. It needs no data, and its devices may be those of a described
    topology.
    """

    config: ConfigDict
    mesh: Mesh
    devices: Sequence[jax.Device]
    model_config: Any
    graphdef: Any
    flops_per_token: Callable  # (length, causal=True, backward=True) -> model FLOPs
    objective: Objective
    optimizer: optim.Optimizer
    others: Mapping[str, AbstractModel]  # of config.models, by name
    # ShapeDtypeStructs with shardings: all parameters of the model; the state, with those that are
    # trained; and what is fixed
    abstract_params: dict
    abstract_state: step.TrainState
    abstract_fixed: step.Fixed
    is_trained: Callable  # path of a parameter -> bool
    make_params: Callable  # jitted: key -> parameters
    init_state: Callable  # jitted: trained parameters -> TrainState, donates them
    # jitted: (state, batch, fixed) -> (state, metrics), donates the state
    train_step: Callable
    look: Callable  # jitted: the same arguments -> see `lm.looking.make_look`; donates nothing
    eval_params: Callable  # jitted: (trained parameters, opt_state) -> those to evaluate
    eval_fns: CompiledFns  # what evaluators ask of the model, but for generation

    def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as ShapeDtypeStructs with shardings."""
        shardings = self.batch_shardings()
        batch = {}
        for name, array in self.objective.arrays.items():
            shape = (batch_size, *array.row_shape(self.config.data.length))
            batch[name] = jax.ShapeDtypeStruct(shape, array.dtype, sharding=shardings[name])
        return batch

    def batch_shardings(self) -> dict[str, jax.sharding.NamedSharding]:
        """The sharding of each array of a batch."""
        shardings = {}
        for name, array in self.objective.arrays.items():
            shardings[name] = sharding.batch_sharding(self.mesh, array.dims)
        return shardings


def program(
    config: ConfigDict,
    devices: Sequence[jax.Device],
    vocab_size: int,
    total_steps: int,
    make_other: Callable[..., AbstractModel] = other_model,
) -> Program:
    """The compiled part of a run, for a tokenizer of `vocab_size` ids.

    Args:
      make_other: makes each model of config.models, as `other_model` does.

    Raises:
      ValueError: a mesh or batch that doesn't fit the devices, unknown names, sizes that the mesh
        can't divide.
    """
    c = config
    mesh = _checked_mesh(c, devices)

    # The model, its optimizer and its loss.
    model_config, make_model = make_model_fn(c, vocab_size, devices[0].platform)
    _check_model(model_config, c.data.length, mesh)
    graphdef, abstract = _abstract(make_model)
    params = _divide(c, abstract, mesh)
    optimizer = optim.make_optimizer(c.optimizer, params.trained_axes, total_steps)
    objective = make_objective(c)
    _check_sources(c, model_config, objective)
    objective.check(model_config, trained.paths_of(params.trained_axes))

    others = {name: make_other(c, name, devices, vocab_size) for name in c.models}
    abstract_fixed = step.Fixed(params.frozen, {name: others[name].params for name in others})

    # The train step, and where its state lies.
    wrap_gradient = _gradient_wrapper(c, mesh, params.trained_axes, objective, abstract_fixed)
    loss_fns = objective.loss_fns(others)
    how = dict(accumulation=c.train.accumulation, wrap_gradient=wrap_gradient)
    train_step = step.make_train_step(
        graphdef, loss_fns, optimizer, seed=c.seed, nonfinite=c.train.nonfinite, **how
    )
    watched_gradient = step.make_mean_gradient(graphdef, looking.watched(loss_fns), **how)
    by_position = _loss_by_position(c, mesh, graphdef, objective)
    look = looking.make_look(watched_gradient, optimizer, params.trained_axes, by_position, c.seed)
    abstract_state = step.abstract_state(params.trained, params.trained_axes, optimizer, mesh)
    shardings, whole = jax.tree.map(_layout, abstract_state), sharding.replicated(mesh)

    jit_step = _step_compiler(shardings, jax.tree.map(_layout, abstract_fixed), devices[0])

    def make_params(key):
        return nnx.to_pure_dict(nnx.split(make_model(key), nnx.Param)[1])

    return Program(
        config=c,
        mesh=mesh,
        devices=devices,
        model_config=model_config,
        graphdef=graphdef,
        objective=objective,
        flops_per_token=_flops_per_token(c, model_config, objective),
        optimizer=optimizer,
        others=others,
        abstract_params=params.whole,
        abstract_state=abstract_state,
        abstract_fixed=abstract_fixed,
        is_trained=params.is_trained,
        # Under jit one seed gives the same bits on every mesh.
        make_params=jax.jit(make_params, out_shardings=jax.tree.map(_layout, params.whole)),
        init_state=jax.jit(
            functools.partial(step.init_state, optimizer=optimizer),
            out_shardings=shardings,
            donate_argnums=0,
        ),
        train_step=jit_step(train_step, out_shardings=(shardings, whole), donate_argnums=0),
        look=jit_step(look, out_shardings=whole),
        eval_params=jax.jit(optimizer.eval_params, out_shardings=shardings.params),
        eval_fns=make_eval_fns(
            graphdef, objective, mesh, others, branches=step.branches(model_config)
        ),
    )


def _step_compiler(state_shardings, fixed_shardings, device: jax.Device) -> Callable:
    """jax.jit for functions of (state, batch, fixed)."""
    return functools.partial(
        jax.jit,
        in_shardings=(state_shardings, None, fixed_shardings),
        compiler_options=startup.compiler_options(device),
    )


def _checked_mesh(config: ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    _check_batches(config, mesh)
    _check_simulated(config, devices)
    return mesh


def _flops_per_token(config: ConfigDict, model_config, objective: Objective) -> Callable:
    """The model's function, with what it needs to know of the objective."""
    counted = {} if objective.head_share == 1 else {"head": objective.head_share}
    if "source" in objective.arrays:
        (counted["source_length"],) = objective.arrays["source"].dims
    return functools.partial(model_module(config).flops_per_token, model_config, **counted)


class _Parameters(NamedTuple):
    """A model's parameters as ShapeDtypeStructs with shardings: all, and the two parts of them."""

    whole: dict
    trained: dict
    frozen: dict
    trained_axes: dict  # logical axes
    is_trained: Callable  # path -> bool


def _divide(config: ConfigDict, abstract, mesh: Mesh) -> _Parameters:
    """Divides the parameters by config.train.trained.

    Raises:
      ValueError: patterns without a meaning, or nothing that frozen parameters come from; see
        `lm.sharding.shardings`.
    """
    axes = sharding.logical_axes(abstract)
    patterns = config.train.trained
    if config.model.get("lora_rank") and patterns == "*":
        patterns = lora.PARAMS
    is_trained = trained.parse(patterns, trained.paths_of(axes))
    params = nnx.to_pure_dict(abstract)
    whole = jax.tree.map(_lay_out, params, sharding.shardings(params, axes, mesh))

    trained_part, frozen_part = trained.split(whole, is_trained)
    if frozen_part and not config.init_from:
        raise ValueError(
            f"config.train.trained = {patterns!r} keeps parameters as config.init_from has them, "
            "which is empty"
        )
    if any(not jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(trained_part)):
        raise ValueError(
            f"config.train.trained = {patterns!r} has weights that config.model.quantize = "
            f"{config.model.quantize!r} stores in 4 bits, and these can't be trained"
        )
    trained_axes, _ = trained.split(axes, is_trained)
    return _Parameters(whole, trained_part, frozen_part, trained_axes, is_trained)


def _loss_by_position(config: ConfigDict, mesh: Mesh, graphdef, objective: Objective) -> Callable:
    """That of a look, in so many microbatches that no more logits exist at a time than in training,
    or in rows, one on each device.
    """
    rows = config.data.batch_size // sharding.batch_parts(mesh)
    length, o = config.data.length, config.objective
    chunks = -(-length // (o.get("chunk", 0) or o.get("places", 0) or length))
    microbatches = min(rows, config.train.accumulation * chunks)
    while rows % microbatches:
        microbatches += 1
    return looking.make_loss_by_position(graphdef, objective.token_logprobs, microbatches)


def make_eval_fns(
    graphdef,
    objective: Objective,
    mesh: Mesh,
    others: Mapping[str, AbstractModel] = types.MappingProxyType({}),
    *,
    branches: bool = True,
) -> CompiledFns:
    """What evaluators may ask of a causal model. What an encoder has instead depends on its
    tokenizer: `Experiment.eval_fns`.

    Args:
      branches: see `lm.step.branches`.
    """
    answers = CausalAnswers(
        mesh,
        step.make_tree_logprobs(graphdef),
        step.make_tree_states(graphdef),
        branches,
    )
    target_logprobs = compiled(step.make_token_logprobs(graphdef, objective.token_logprobs), mesh)
    unit_terms = None
    if objective.unit_terms:
        loss_fns = objective.loss_fns(others)
        unit_terms = compiled(step.make_unit_terms(graphdef, loss_fns, objective.unit_terms), mesh)
    head_outputs = None
    if objective.outputs:
        head_outputs = compiled(step.make_head_outputs(graphdef, objective.outputs), mesh)
    return CompiledFns(
        mesh,
        arrays=objective.arrays,
        head_outputs=head_outputs,
        unit_terms=unit_terms,
        target_logprobs=target_logprobs,
        token_logprobs=target_logprobs,
        logprobs=answers.logprobs,
        states=answers.states,
        head_rows=compiled(step.make_head_rows(graphdef), mesh),
    )


def _check_model(model_config, length: int, mesh: Mesh) -> None:
    """Raises ValueError if the model can't take rows of `length` tokens, or the mesh the model."""
    if model_config.context_length < length:
        raise ValueError(
            f"config.data.length = {length} is above config.model.context_length = "
            f"{model_config.context_length}"
        )
    if hasattr(model_config, "check_mesh"):
        model_config.check_mesh(mesh)


def _check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ValueError if the batch, or a microbatch of it, can't be dealt to the mesh."""
    batch_size, accumulation = config.data.batch_size, config.train.accumulation
    length = config.data.length
    sharding.check_batch(mesh, batch_size, length, "config.data.batch_size")
    if batch_size % accumulation:
        raise ValueError(
            f"config.train.accumulation = {accumulation} must divide "
            f"config.data.batch_size = {batch_size}"
        )
    microbatch = "config.data.batch_size / config.train.accumulation"
    sharding.check_batch(mesh, batch_size // accumulation, length, microbatch)

    chunk = config.objective.get("chunk", 0)
    if chunk and length % chunk:
        raise ValueError(
            f"config.objective.chunk = {chunk} must divide config.data.length = {length}"
        )


def _check_simulated(config: ConfigDict, devices: Sequence[jax.Device]) -> None:
    """Raises ValueError for what devices that a CPU simulates can't do in a fixed order.

    Where a loop draws random numbers and has collectives, XLA takes the collectives of its devices
    as they come: they wait for each other for ever, or mix up their values.
    """
    c = config.model
    draws = c.get("dropout", 0) or c.get("attention_dropout", 0)
    is_simulated = devices[0].platform == "cpu" and len(devices) > 1
    if draws and is_simulated and c.get("scan_unroll", 0) < c.get("num_layers", 0):
        raise ValueError(
            f"dropout on {len(devices)} devices that a CPU simulates needs layers without a loop: "
            f"config.model.scan_unroll = {c.num_layers}"
        )


def _gradient_wrapper(
    config: ConfigDict, mesh: Mesh, axes: dict, objective: Objective, abstract_fixed: step.Fixed
) -> Callable | None:
    """Returns the wrapper that makes the gradient manual (config.train.fsdp = "by_hand"), or None,
    which leaves FSDP's collectives to GSPMD ("partitioner").

    Raises:
      ValueError: values that don't go together.
    """
    c = config.train
    if c.fsdp == "partitioner":
        if c.grad_reduce_dtype != "float32":
            raise ValueError(
                "config.train.grad_reduce_dtype = 'bfloat16' needs config.train.fsdp = "
                "'by_hand': the partitioner reduces in float32"
            )
        return None
    if mesh.shape["tensor"] > 1:
        raise ValueError(
            "config.train.fsdp = 'by_hand' splits rows, positions, weights and experts; set "
            "config.mesh.tensor = 1, or train.fsdp = 'partitioner'"
        )
    arrays = {**objective.arrays, **objective.prepared}
    return functools.partial(
        collectives.shard_map_gradient,
        mesh=mesh,
        axes=axes,
        batch_dims={name: array.dims for name, array in arrays.items()},
        fixed_specs=jax.tree.map(lambda leaf: leaf.sharding.spec, abstract_fixed),
        reduce_dtype=c.grad_reduce_dtype,
        joint_gather=c.fsdp_gather == "joint",
    )


# A whole run.


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a run is made of. Nothing in it has been initialised or written."""

    program: Program
    tokenizer: tokenizers.Tokenizer
    encoder: pack.Encoder
    train_documents: Documents | None  # None: nothing is to be trained
    total_steps: int
    # the parameters of config.models by name, once they are loaded
    others: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> ConfigDict:
        return self.program.config

    @functools.cached_property
    def size(self) -> dict[str, int | float]:
        """How large the run is: its parameters, a step's tokens, and a step's model FLOPs."""
        data = self.config.data
        tokens_per_step = data.batch_size * data.length
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.program.abstract_params)),
            "tokens_per_step": tokens_per_step,
            "flops_per_step": self.program.flops_per_token(data.length) * tokens_per_step,
        }

    def make_loader(self) -> Loader:
        """The training batches."""
        c = self.config.data
        if c.loader:
            return resolve(c.loader, "config.data.loader")(self)
        amount, unit = config_lib.parse_length(self.config.train.length)
        arguments = _stream_arguments(self.config, amount if unit == "epochs" else None)
        packing = _packing(self.config)

        make_transform = self.program.objective.make_transform
        transform = make_transform(self.tokenizer) if make_transform else None

        def make_stream(number: int):
            own = arguments | {"number": number}
            if isinstance(self.train_documents, mixtures.Mixture):
                stream = mixtures.stream(
                    self.train_documents,
                    functools.partial(pack.stream, encoder=self.encoder, packing=packing),
                    c.batch_size // c.streams,
                    **own,
                )
            else:
                stream = pack.stream(self.train_documents, self.encoder, packing, **own)
            if transform is None:
                return stream
            return pack.TransformedStream(stream, transform, seed=self.config.seed, number=number)

        arrays = self.program.objective.arrays
        shardings = self.program.batch_shardings()
        return Loader(make_stream, c.streams, c.batch_size, c.length, shardings, arrays)

    def make_evaluators(self, check_stop: Callable[[], None] = never_stop) -> dict[str, Evaluator]:
        """The evaluators by name. All share the compiled functions of the program.

        Args:
          check_stop: called before each batch; may raise.

        Raises:
          ValueError: an evaluator that can't be built, or asks for what the model can't do.
        """
        mesh, length = self.program.mesh, self.config.data.length
        eval_fns = self.eval_fns()

        evaluators = {}
        for name, entry in self.config.evals.items():
            arguments = entry.to_dict()
            cls = resolve(entry.type, f"config.evals.{name}.type")
            arguments.pop("type")
            arguments.pop("every")
            batch_size = arguments.pop("batch_size")
            if "split" in arguments:
                arguments["documents"] = self._documents_of(name, cls, arguments)
                key = f"config.evals.{name}.batch_size"
                sharding.check_batch(mesh, batch_size, length, key)

            predict_fns = PredictFns(
                eval_fns,
                batch_size=batch_size,
                length=length,
                check_stop=check_stop,
                asked_by=f"config.evals.{name}, a {entry.type},",
            )
            arguments |= dict(name=name, encoder=self.encoder)
            try:
                inspect.signature(cls).bind(predict_fns, **arguments)
            except TypeError as error:
                raise ValueError(f"config.evals.{name}.type = {entry.type!r}: {error}") from None
            evaluators[name] = cls(predict_fns, **arguments)
            # Found now, not by the first evaluation, which may come after hours.
            predict_fns.require(getattr(evaluators[name], "asks", ()))
        return evaluators

    def _documents_of(self, name: str, cls: type, arguments: dict[str, Any]) -> Documents:
        """The split that an evaluator of config.evals reads, of the run's source or of its own.
        Takes the keys that say so out of its arguments.
        """
        key, split = f"config.evals.{name}", arguments.pop("split")

        source, source_args = arguments.pop("source", ""), arguments.pop("source_args", {})
        if source:
            found = documents_of(source, source_args, split, key, f"{key}.split")
        else:
            found = documents(self.config, split, f"{key}.split")
        _check_kind(name, cls, found, f"{key}.source" if source else "config.data.source")
        return encoded(self.config, found, self.tokenizer)

    def eval_fns(self) -> CompiledFns:
        """What evaluators may ask of the model."""
        p = self.program

        def make_generator(params, sampling: Sampling) -> Generator:
            return generator_of(p, params, sampling, self.tokenizer)

        def make_other_generator(name: str, sampling: Sampling) -> Generator:
            # Loaded after evaluators are made.
            return generator_of(p.others[name], self.others[name], sampling, self.tokenizer)

        def unit_terms(params, batch):
            return p.eval_fns.unit_terms(params, batch, self.others)

        fns = p.eval_fns
        if sees_all(p.model_config):
            return self._encoder_fns()
        if reads_sources(p.model_config):
            fns = self._encoder_decoder_fns()
        return dataclasses.replace(
            fns,
            make_generator=make_generator,
            make_other_generators={
                name: functools.partial(make_other_generator, name) for name in p.others
            },
            unit_terms=unit_terms if fns.unit_terms else None,
        )

    def _encoder_fns(self) -> CompiledFns:
        """What evaluators may ask of an encoder: it fills blanks, and continues nothing."""
        p = self.program
        fns = dataclasses.replace(p.eval_fns, token_logprobs=None, logprobs=None, states=None)
        if "mask" not in self.tokenizer.roles:
            logging.info("the tokenizer has no mask: the encoder is asked for no words")
            return fns

        _, end = self.tokenizer.around
        answers = MaskedAnswers(
            p.mesh,
            step.make_tree_logprobs(p.graphdef),
            step.make_tree_states(p.graphdef),
            mask_id=self.tokenizer.role("mask"),
            end=end,
        )
        return dataclasses.replace(
            fns,
            reserved=1 + len(end),  # the mask of the last token, which a causal model doesn't read
            logprobs=answers.logprobs,
            infill=answers.infill,
            states=answers.states,
        )

    def _encoder_decoder_fns(self) -> CompiledFns:
        """What evaluators may ask of an encoder-decoder, but for generation: it reads prompts as
        sources, and a text by itself is none.
        """
        p = self.program
        before, end = seq2seq.ends(self.tokenizer)
        answers = SourceAnswers(
            p.mesh,
            step.make_tree_logprobs(p.graphdef),
            step.make_tree_states(p.graphdef),
            before=before,
            end=end,
            sentinels=self.tokenizer.roles.get("sentinels", ())[:1],
            branches=step.branches(p.model_config),
        )
        return dataclasses.replace(
            p.eval_fns,
            reserved=1 + len(end),  # a sentinel
            source_length=p.model_config.source_length,
            context_length=p.model_config.context_length,
            token_logprobs=None,
            logprobs=answers.logprobs,
            infill=answers.logprobs,
            states=answers.states,
        )


def _check_kind(name: str, evaluator: type, split: Documents, source_key: str) -> None:
    """Raises ValueError for documents that an evaluator isn't for."""
    kinds = getattr(evaluator, "examples", ("text",))
    if split.kind not in kinds:
        raise ValueError(
            f"config.evals.{name}.type = {evaluator.__module__}.{evaluator.__qualname__} takes "
            f"{' or '.join(kinds)}, and {source_key} has examples of the kind {split.kind!r}"
        )


def build(
    config: ConfigDict, devices: Sequence[jax.Device], *, training: bool = True
) -> Experiment:
    """Checks the configuration and builds what it describes, but for the evaluators and the data's
    iterators.

    Args:
      training: without it the training split isn't read, unless the tokenizer comes from it.

    Raises:
      ValueError: what can't work, before anything is computed.
    """
    c = config
    config_lib.check(c)
    if c.init_new and not c.init_from:
        raise ValueError("config.init_new needs config.init_from: all of a fresh model is new")
    for name, entry in c.evals.items():
        entries.check(name, entry.to_dict())
    if c.init_resize and not c.init_from:
        raise ValueError(
            "config.init_resize = True resizes the tables of config.init_from, and there is none"
        )

    # What is compiled is described before the corpus is read and a tokenizer trained on it: most
    # mistakes show here.
    _, unit = config_lib.parse_length(c.train.length)
    count_steps = functools.partial(
        config_lib.total_steps, c.train.length, batch_tokens=c.data.batch_size * c.data.length
    )
    # Epochs are counted below.
    total_steps = LONGEST_RUN if unit == "epochs" else count_steps(steps_of_epochs=None)

    read_train = functools.cache(lambda: documents(c, c.data.split))
    is_trained = not c.tokenizer.path and c.tokenizer.kind == "sentencepiece"
    run_tokenizer = None if is_trained else make_tokenizer(c, read_train)
    if is_trained:
        vocab_size = c.tokenizer.vocab_size + roles.count(c.tokenizer.reserve)
    else:
        vocab_size = run_tokenizer.vocab_size
    run_program = program(c, devices, vocab_size, total_steps)
    _check_memory(run_program)

    if is_trained:
        run_tokenizer = make_tokenizer(c, read_train)
    make_windows = run_program.objective.make_windows
    encoder = pack.Encoder(
        run_tokenizer,
        c.data.label_prompt,
        make_windows(run_tokenizer) if make_windows else None,
        run_program.objective.arrays,
    )
    train_documents = (
        _train_documents(run_program, read_train(), run_tokenizer) if training else None
    )
    if train_documents is not None and train_documents.kind == "text":
        # Finds a corpus with another tokenizer's tokens.
        encoder.text(train_documents[0])
    # Without training nothing depends on their number.
    counts_epochs = unit == "epochs" and training
    if counts_epochs:
        steps_of_epochs = functools.partial(_steps_of_epochs, c, train_documents, encoder)
        total_steps = count_steps(steps_of_epochs=steps_of_epochs)
    if counts_epochs or run_tokenizer.vocab_size != vocab_size:
        run_program = program(c, devices, run_tokenizer.vocab_size, total_steps)
    return Experiment(
        program=run_program,
        tokenizer=run_tokenizer,
        encoder=encoder,
        train_documents=train_documents,
        total_steps=total_steps,
    )


def _train_documents(
    run_program: Program, documents_: Documents, tokenizer: tokenizers.Tokenizer
) -> Documents:
    """The training split as it is packed.

    Raises:
      ValueError: it isn't for this objective or packing, or has fewer documents than there are
        streams.
    """
    c = run_program.config
    kinds = run_program.objective.examples
    has_beginnings = bool(c.rollout.prompt_tokens) and prompts.KIND in kinds
    if documents_.kind == "text" and has_beginnings:
        _check_rollouts(c)
        room = c.data.length - c.rollout.max_new_tokens
        return prompts.beginnings(
            documents_, tokenizer, num_tokens=c.rollout.prompt_tokens, room=room
        )
    if documents_.kind not in kinds:
        is_text = documents_.kind == "text" and prompts.KIND in kinds
        hint = "; config.rollout.prompt_tokens makes prompts of their beginnings" * is_text
        raise ValueError(
            f"config.objective.type = {c.objective.type!r} takes {' or '.join(kinds)}, and "
            f"config.data.source = {c.data.source!r} has examples of the kind "
            f"{documents_.kind!r}{hint}"
        )
    if documents_.kind == prompts.KIND:
        _check_rollouts(c)
    has_sources = "source" in run_program.objective.arrays
    if (documents_.kind != "text" or has_sources) and c.data.packing != "first_fit":
        raise ValueError(
            f"config.data.packing = {c.data.packing!r} cuts conversations, and targets from their "
            "sources; wanted 'first_fit'"
        )
    packed = encoded(c, documents_, tokenizer)
    parts = packed.parts.values() if isinstance(packed, mixtures.Mixture) else (packed,)
    fewest = min(map(len, parts))
    if fewest < c.data.streams:
        # A stream without documents would wait for ever.
        raise ValueError(
            f"config.data.streams = {c.data.streams}, but split {c.data.split!r} has only "
            f"{fewest} documents; set config.data.streams to at most that"
        )
    return packed


def _check_rollouts(config: ConfigDict) -> None:
    """Raises ValueError for prompts with no policy that answers them, or with epochs."""
    if not config.data.loader:
        raise ValueError(
            f"config.data.source = {config.data.source!r} has prompts, which a policy answers: "
            "wanted config.data.loader = 'lm.rl.rollouts.RolloutLoader'"
        )
    _, unit = config_lib.parse_length(config.train.length)
    if unit == "epochs":
        raise ValueError(
            f"config.train.length = {config.train.length!r}: rollouts have no epochs; wanted steps"
        )


def _stream_arguments(config: ConfigDict, epochs: Fraction | None) -> dict:
    """What all streams of a run have in common, by the arguments of `lm.data.pack.Stream`."""
    return dict(num_streams=config.data.streams, seed=config.seed, epochs=epochs)


def _packing(config: ConfigDict) -> pack.Packing:
    return pack.Packing(config.data.packing, config.data.length, config.data.packing_bins)


def _steps_of_epochs(
    config: ConfigDict, train_documents: Documents, encoder: pack.Encoder, epochs: Fraction
) -> int:
    """Steps until the last stream has ended its last epoch."""
    if isinstance(train_documents, mixtures.Mixture):
        raise ValueError(
            f"config.train.length = {config.train.length!r}: a mixture's parts have epochs of "
            "their own; wanted steps or tokens"
        )
    logging.info("counting the rows of %s", config.train.length)
    arguments = _stream_arguments(config, epochs)
    longest = max(pack.count_rows(train_documents, encoder, _packing(config), **arguments))
    return math.ceil(longest / (config.data.batch_size // config.data.streams))


def _check_memory(program: Program) -> None:
    """Raises ValueError if a train state is larger than the machine of the CPU devices it lies on.

    Accelerators say so themselves; here the system would end the process without a word.
    """
    if program.devices[0].platform != "cpu":
        return
    leaves = jax.tree.leaves((program.abstract_state, program.abstract_fixed))
    wanted = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > memory * jax.process_count():
        raise ValueError(
            f"config.model and config.optimizer make a train state of {wanted / 1e9:.1f} GB, and "
            f"this machine has {memory / 1e9:.1f} GB"
        )


def log_summary(experiment: Experiment) -> None:
    """Logs what is about to run, in a few lines."""
    e, c = experiment, experiment.config
    p = e.program
    leaves = jax.tree.leaves(p.abstract_params)
    num_trained = sum(param.size for param in jax.tree.leaves(p.abstract_state.params))
    count = e.size["parameters"]
    logging.info(
        "model: %.2fM parameters (%s), computing in %s; mesh %s",
        count / 1e6,
        ", ".join(sorted({str(param.dtype) for param in leaves})),
        jnp.dtype(p.model_config.compute_dtype),
        {axis: n for axis, n in p.mesh.shape.items() if n > 1} or "one device",
    )
    if num_trained < count:
        logging.info("%.2fM of them are trained", num_trained / 1e6)
    logging.info(
        "data: %s, %d training documents, fingerprint %s; tokenizer %s, %d ids",
        c.data.source,
        len(e.train_documents),
        e.train_documents.fingerprint,
        e.tokenizer.fingerprint,
        e.tokenizer.vocab_size,
    )
    tokens = e.total_steps * e.size["tokens_per_step"]
    logging.info(
        "length: %s = %d steps of %d x %d = %.2fM tokens",
        c.train.length,
        e.total_steps,
        c.data.batch_size,
        c.data.length,
        tokens / 1e6,
    )
