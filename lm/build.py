"""From a configuration to objects. The only file that turns strings into things; it does no
training and writes nothing.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import logging
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lm import collectives, optim, sharding, startup, step
from lm.data import batch as batch_contract
from lm.data import pack
from lm.data import tokenizer as tokenizers
from lm.data.loader import Loader
from lm.data.sources import Documents, take
from lm.decoding.generator import Generator
from lm.evals.predict import Evaluator, PredictFns
from lm.hf import directory as hf


def resolve(path: str, what: str) -> Any:
    """The object at a dotted path.

    Raises:
      ValueError: there is none; `what` is the config key that names it.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        try:
            return importlib.import_module(path)
        except (ImportError, ValueError):
            raise ValueError(
                f"{what} = {path!r} can't be imported ({error}); wanted a dotted path, such as "
                "lm.data.sources.text"
            ) from None


def total_steps(length: str, *, batch_tokens: int, epoch_tokens: Callable[[], int]) -> int:
    """Steps of a run whose length is "N steps", "N tokens" or "X epochs" (of the corpus's targets);
    rounded up.

    Raises:
      ValueError: anything else.
    """
    number, _, unit = length.partition(" ")
    try:
        amount = Fraction(number.replace("_", "").replace(",", ""))
        if amount <= 0:
            raise ValueError
        scale = {
            "steps": lambda: 1,
            "tokens": lambda: Fraction(1, batch_tokens),
            "epochs": lambda: Fraction(epoch_tokens(), batch_tokens),
        }[unit]()
    except (ValueError, KeyError, ZeroDivisionError):
        raise ValueError(
            f'config.train.length = {length!r}; wanted "N steps", "N tokens" or "X epochs", such '
            'as "2e6 tokens"'
        ) from None
    return math.ceil(amount * scale)


def documents(config: ConfigDict, split: str) -> Documents:
    """A split of the corpus.

    Raises:
      ValueError: no such source, or arguments that it doesn't take; see the source.
    """
    source = resolve(config.data.source, "config.data.source")
    arguments = config.data.source_args.to_dict()
    if not callable(source):
        raise ValueError(
            f"config.data.source = {config.data.source!r} is not a function; lm.data.sources has "
            f"{['jsonl', 'text', 'tfds']}"
        )
    try:
        inspect.signature(source).bind(split, **arguments)
    except TypeError as error:
        raise ValueError(
            f"config.data.source_args = {arguments}: {error}; {config.data.source} takes "
            f"{inspect.signature(source)}"
        ) from None
    return source(split, **arguments)


def apply_hf_config(config: ConfigDict) -> ConfigDict:
    """The configuration with what a Hugging Face checkpoint in `init_from` decides: the model, but
    for how it is executed and the dtype of its parameters, and the tokenizer, unless another is
    given. Other configurations come back as they are.

    Raises:
      ValueError: a checkpoint that can't be read, see `lm.hf.checkpoint.Source`.
    """
    directory = epath.Path(config.init_from).expanduser() if config.init_from else None
    if directory is None or not hf.is_checkpoint(directory):
        return config
    source = hf.Source(directory)
    config = config.copy_and_resolve_references().unlock()
    config.model.update(source.fields)
    config.tokenizer.path = config.tokenizer.path or str(directory)
    if source.dtype() == "float32" and config.model.param_dtype == "bfloat16":
        logging.warning(
            "%s has float32 weights, and config.model.param_dtype = 'bfloat16' rounds them",
            directory,
        )
    logging.info("model and tokenizer from %s: %s", directory, source.family.name)
    return config.lock()


def tokenizer(config: ConfigDict, train: Callable[[], Documents]) -> tokenizers.Tokenizer:
    """The tokenizer; one that is trained sees the training split only, label lines as pieces of
    their own.
    """
    c = config.tokenizer
    if c.kind not in ("bytes", "sentencepiece"):
        raise ValueError(f"config.tokenizer.kind = {c.kind!r}; valid: ['bytes', 'sentencepiece']")
    if c.path:
        return tokenizers.load(epath.Path(c.path).expanduser())
    if c.kind == "bytes":
        return tokenizers.ByteTokenizer()
    corpus = train()
    prompt = config.data.label_prompt
    key = hashlib.sha256(
        json.dumps([corpus.fingerprint, c.vocab_size, c.max_documents, prompt]).encode()
    ).hexdigest()[:16]
    name = f"{c.vocab_size}-{key}.model"

    def texts():
        for document in take(corpus, c.max_documents):
            yield document.text
            if prompt and document.label:
                yield from (prompt, pack.label_word(document.label))

    return tokenizers.train_sentencepiece(
        texts(), c.vocab_size, epath.Path(config.data.cache_dir).expanduser() / "tokenizers" / name
    )


def model(config: ConfigDict, vocab_size: int, platform: str) -> tuple[Any, Callable]:
    """(the model's own Config, key -> model).

    Raises:
      ValueError: a model too small for the tokenizer, or see the model's Config.
    """
    fields = config.model.to_dict()
    module = resolve(fields.pop("type"), "config.model.type")
    fields["vocab_size"] = fields["vocab_size"] or vocab_size
    fields["compute_dtype"] = fields["compute_dtype"] or (
        "float32" if platform == "cpu" else "bfloat16"
    )
    for attention, wanted in (("splash", "tpu"), ("cudnn", "gpu")):
        if fields.get("attention") == attention and platform != wanted:
            raise ValueError(
                f"config.model.attention = {attention!r} is for {wanted}, and this runs on "
                f'{platform}; "xla" runs everywhere'
            )
    if fields["vocab_size"] < vocab_size:
        raise ValueError(
            f"config.model.vocab_size = {fields['vocab_size']} is below the tokenizer's "
            f"{vocab_size}; 0 takes the tokenizer's"
        )
    model_config = module.Config(**fields)
    return model_config, lambda key: module.Transformer(model_config, key)


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
    optimizer: optim.Optimizer
    abstract_state: step.TrainState  # ShapeDtypeStructs with shardings
    make_params: Callable  # jitted: key -> parameters
    init_state: Callable  # jitted: parameters -> TrainState, donates them
    train_step: Callable  # jitted: (state, batch) -> (state, metrics), donates the state
    eval_params: Callable  # jitted: (params, opt_state) -> parameters to evaluate

    def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        layout = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(
                (batch_size, self.config.data.length), dtype, sharding=layout
            )
            for name, dtype in batch_contract.DTYPES.items()
        }


@dataclasses.dataclass(frozen=True)
class Experiment(Program):
    """All that a run is made of. Nothing in it has been initialised or written."""

    tokenizer: tokenizers.Tokenizer
    encoder: pack.Encoder
    train_documents: Documents | None  # None: nothing is to be trained
    total_steps: int

    def make_loader(self) -> Loader:
        c = self.config.data
        make_stream = lambda number: pack.stream(
            self.train_documents,
            self.encoder,
            length=c.length,
            packing=c.packing,
            bins=c.packing_bins,
            number=number,
            num_streams=c.streams,
            seed=self.config.seed,
        )
        return Loader(
            make_stream, c.streams, c.batch_size, c.length, sharding.batch_sharding(self.mesh)
        )

    def make_evaluators(
        self, check_stop: Callable[[], None] = lambda: None
    ) -> dict[str, Evaluator]:
        """The evaluators by name. `check_stop` is called before each batch, and may raise."""
        objective = resolve(self.config.objective.type, "config.objective.type")
        cache: dict[str, Documents] = {}
        made = {}
        for name, c in self.config.evals.items():
            arguments = c.to_dict()
            cls = resolve(arguments.pop("type"), f"config.evals.{name}.type")
            arguments.pop("every")
            batch_size = arguments.pop("batch_size")
            predict_fns = PredictFns(
                self.mesh,
                batch_size=batch_size,
                length=self.config.data.length,
                check_stop=check_stop,
                token_logprobs=step.make_token_logprobs(self.graphdef, objective.token_logprobs),
                tree_logprobs=step.make_tree_logprobs(self.graphdef),
                tree_states=step.make_tree_states(self.graphdef),
                head_rows=step.make_head_rows(self.graphdef),
                make_generator=lambda params, sampling: Generator(
                    self.model_config,
                    self.graphdef,
                    params,
                    self.mesh,
                    sampling,
                    stop_ids=self.tokenizer.stop_ids,
                    vocab_size=self.tokenizer.vocab_size,
                ),
            )
            if "split" in arguments:
                split = arguments.pop("split")
                if split not in cache:
                    cache[split] = documents(self.config, split)
                arguments["documents"] = cache[split]
                sharding.check_batch(
                    self.mesh,
                    batch_size,
                    self.config.data.length,
                    f"config.evals.{name}.batch_size",
                )
            if "name" in inspect.signature(cls).parameters:
                arguments["name"] = name
            made[name] = cls(predict_fns, encoder=self.encoder, **arguments)
        return made


def build(
    config: ConfigDict, devices: Sequence[jax.Device], *, training: bool = True
) -> Experiment:
    """Checks the whole configuration and builds what it describes, but for the evaluators and the
    data's iterators.

    Args:
      training: without it the training split isn't read, unless the tokenizer comes from it.

    Raises:
      ValueError: what can't work, before anything is computed.
    """
    c = config
    if small := [
        key for key in ("batch_size", "length", "streams", "packing_bins") if c.data[key] < 1
    ]:
        raise ValueError(
            f"{', '.join(f'config.data.{key} = {c.data[key]}' for key in small)}; must be at "
            "least 1"
        )
    if c.checkpoint.keep < 1:
        raise ValueError(
            f"config.checkpoint.keep = {c.checkpoint.keep}; must be at least 1, or the run would "
            "end without its weights"
        )
    sharding.make_mesh(c.mesh.to_dict(), devices)  # before the corpus is read
    if c.data.packing not in pack.PACKINGS:
        raise ValueError(f"config.data.packing = {c.data.packing!r}; valid: {list(pack.PACKINGS)}")
    train = functools.cache(lambda: documents(c, c.data.split))
    if training and len(train()) < c.data.streams:
        # A stream without documents would wait for ever.
        raise ValueError(
            f"config.data.streams = {c.data.streams}, but split {c.data.split!r} has only "
            f"{len(train())} documents; set config.data.streams to at most that"
        )
    words = tokenizer(c, train)
    encoder = pack.Encoder(words, c.data.label_prompt)
    steps = total_steps(
        c.train.length,
        batch_tokens=c.data.batch_size * c.data.length,
        epoch_tokens=lambda: pack.count_tokens(train(), encoder),
    )
    return Experiment(
        **vars(program(c, devices, words.vocab_size, steps)),
        tokenizer=words,
        encoder=encoder,
        train_documents=train() if training else None,
        total_steps=steps,
    )


def program(
    config: ConfigDict, devices: Sequence[jax.Device], vocab_size: int, total_steps: int
) -> Program:
    """The compiled part of a run, for a tokenizer of `vocab_size` ids.

    Raises:
      ValueError: a mesh or batch that doesn't fit the devices, unknown names, sizes that the mesh
        can't divide.
    """
    c = config
    mesh = sharding.make_mesh(c.mesh.to_dict(), devices)
    sharding.check_batch(mesh, c.data.batch_size, c.data.length, "config.data.batch_size")
    if c.train.accumulation < 1 or c.data.batch_size % c.train.accumulation:
        raise ValueError(
            f"config.train.accumulation = {c.train.accumulation} must divide "
            f"config.data.batch_size = {c.data.batch_size}"
        )
    sharding.check_batch(
        mesh,
        c.data.batch_size // c.train.accumulation,
        c.data.length,
        "config.data.batch_size / config.train.accumulation",
    )
    model_config, make_model = model(c, vocab_size, devices[0].platform)
    if model_config.context_length < c.data.length:
        raise ValueError(
            f"config.data.length = {c.data.length} is above config.model.context_length = "
            f"{model_config.context_length}"
        )
    graphdef, abstract = _abstract(make_model)
    axes = sharding.logical_axes(abstract)
    optimizer = optim.make_optimizer(c.optimizer, axes, total_steps)
    objective_args = c.objective.to_dict()
    objective = resolve(objective_args.pop("type"), "config.objective.type")
    train_step = step.make_train_step(
        graphdef,
        objective.make_loss(**objective_args),
        optimizer,
        seed=c.seed,
        accumulation=c.train.accumulation,
        nonfinite=c.train.nonfinite,
        by_hand=_by_hand(c, mesh, axes),
    )
    abstract_state = _abstract_state(nnx.to_pure_dict(abstract), axes, optimizer, mesh)
    sharding.check_heads(mesh, model_config.num_heads)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    return Program(
        config=c,
        mesh=mesh,
        devices=devices,
        model_config=model_config,
        graphdef=graphdef,
        optimizer=optimizer,
        abstract_state=abstract_state,
        # Under jit one seed gives the same bits on every mesh.
        make_params=jax.jit(
            lambda key: nnx.to_pure_dict(nnx.split(make_model(key), nnx.Param)[1]),
            out_shardings=shardings.params,
        ),
        init_state=jax.jit(
            lambda params: step.init_state(params, optimizer),
            out_shardings=shardings,
            donate_argnums=0,
        ),
        train_step=jax.jit(
            train_step,
            in_shardings=(shardings, None),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=startup.compiler_options(devices[0]),
        ),
        eval_params=jax.jit(optimizer.eval_params, out_shardings=shardings.params),
    )


def _abstract(make_model: Callable):
    """(graphdef, abstract parameters) of a model."""
    return nnx.split(nnx.eval_shape(lambda: make_model(jax.random.key(0))), nnx.Param)


class Weights(NamedTuple):
    """A model without a run."""

    model_config: Any
    graphdef: Any
    params: dict  # ShapeDtypeStructs with shardings
    mesh: Mesh


def weights(config: ConfigDict, devices: Sequence[jax.Device], vocab_size: int) -> Weights:
    """The model of config.model on config.mesh, for a tokenizer of `vocab_size` ids.

    Raises:
      ValueError: see `model` and `lm.sharding.shardings`.
    """
    model_config, make_model = model(config, vocab_size, devices[0].platform)
    graphdef, abstract = _abstract(make_model)
    mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
    layouts = sharding.shardings(nnx.to_pure_dict(abstract), sharding.logical_axes(abstract), mesh)
    params = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
        nnx.to_pure_dict(abstract),
        layouts,
    )
    return Weights(model_config, graphdef, params, mesh)


def _by_hand(config: ConfigDict, mesh: Mesh, axes: dict) -> Callable | None:
    """How the gradient is distributed: None, by the partitioner, or `collectives.shard_map_gradient` for
    config.train.fsdp = "by_hand".
    """
    choices, dtypes, gathers = (
        ("partitioner", "by_hand"),
        ("float32", "bfloat16"),
        ("joint", "staged"),
    )
    if config.train.fsdp_gather not in gathers:
        raise ValueError(
            f"config.train.fsdp_gather = {config.train.fsdp_gather!r}; valid: {list(gathers)}"
        )
    if config.train.fsdp not in choices:
        raise ValueError(f"config.train.fsdp = {config.train.fsdp!r}; valid: {list(choices)}")
    if config.train.grad_reduce_dtype not in dtypes:
        raise ValueError(
            f"config.train.grad_reduce_dtype = {config.train.grad_reduce_dtype!r}; valid: "
            f"{list(dtypes)}"
        )
    if config.train.fsdp == "partitioner":
        if config.train.grad_reduce_dtype != "float32":
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
    return functools.partial(
        collectives.shard_map_gradient,
        mesh=mesh,
        axes=axes,
        reduce_dtype=config.train.grad_reduce_dtype,
        joint_gather=config.train.fsdp_gather == "joint",
    )


def _abstract_state(
    abstract_params: dict, axes: dict, optimizer: optim.Optimizer, mesh: Mesh
) -> step.TrainState:
    """The train state as ShapeDtypeStructs with shardings. What the optimizer keeps in a
    parameter's shape, or in that less one dim (Adafactor's factors), lies as the parameter does;
    counters are replicated.
    """
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), abstract_params)
    by_path = {
        jax.tree_util.keystr(path): (leaf.shape, s)
        for (path, leaf), s in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(sharding.shardings(params, axes, mesh)),
        )
    }

    def place(path, leaf):
        keys = jax.tree_util.keystr(path)
        for name, (shape, layout) in by_path.items():
            if not keys.endswith(name):
                continue
            if leaf.shape == shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)
            partition = (*layout.spec, *([None] * (len(shape) - len(layout.spec))))
            for i in range(len(shape)):
                if leaf.shape == shape[:i] + shape[i + 1 :]:
                    less = jax.sharding.PartitionSpec(*partition[:i], *partition[i + 1 :])
                    return jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, less)
                    )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

    return jax.tree_util.tree_map_with_path(
        place, jax.eval_shape(lambda p: step.init_state(p, optimizer), params)
    )


def log_summary(experiment: Experiment) -> None:
    """What is about to run, in a few lines."""
    e, c = experiment, experiment.config
    count = sum(p.size for p in jax.tree.leaves(e.abstract_state.params))
    logging.info(
        "model: %.2fM parameters (%s), computing in %s; mesh %s",
        count / 1e6,
        c.model.param_dtype,
        jnp.dtype(e.model_config.compute_dtype),
        {axis: n for axis, n in e.mesh.shape.items() if n > 1} or "one device",
    )
    logging.info(
        "data: %s, %d training documents, fingerprint %s; tokenizer %s, %d ids",
        c.data.source,
        len(e.train_documents),
        e.train_documents.fingerprint,
        e.tokenizer.fingerprint,
        e.tokenizer.vocab_size,
    )
    tokens = e.total_steps * c.data.batch_size * c.data.length
    logging.info(
        "length: %s = %d steps of %d x %d = %.2fM tokens",
        c.train.length,
        e.total_steps,
        c.data.batch_size,
        c.data.length,
        tokens / 1e6,
    )
