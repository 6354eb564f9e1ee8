"""Every key of a run's configuration, once, with its default, its range and what it means.

configs/*.py start from here and say what differs.

The configuration is locked and checked before it is used: a key that is not here is an error, and
so is a value outside of its range. Each run writes what it ran with, complete, to config.json.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction

from etils import epath
from ml_collections import ConfigDict

from lm import files

# The variable of the environment by which a sweep tells a run the hash of its configuration.
PLANNED = "LM_PLANNED_CONFIG"

# What a run may change when it goes on from its checkpoints. Everything else is the experiment:
# changing it is another run.
RESUMABLE = (
    "platform",
    "mesh",
    "evals",
    "checkpoint",
    "train.length",
    "train.log_every",
    "train.look_every",
    "train.check_replicas_every",
    "train.nonfinite",
    "train.fsdp",
    "train.fsdp_gather",
    "objective.chunk",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "data.cache_dir",
    "tracking",
    # Where corpus and tokenizer lie, and a key that old runs don't have; fingerprints say whether
    # they are the same.
    "data.source_args.data_dir",
    "data.source_args.held_out_by",
    "data.source_args.path",
    "chat.reference_logprobs",
    "rollout.slots",
    "rollout.reshard",
    "rollout.patience",
    "tokenizer.path",
    "tokenizer.reserve",
    # Another key that old runs don't have. It matters at step 0 only.
    "init_resize",
)


# What a key may be. Each stands beside its default, and `check` holds a configuration against it.


@dataclasses.dataclass(frozen=True)
class Range:
    """A finite number within bounds, or one of the values besides."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    besides: tuple = ()

    def __contains__(self, value) -> bool:
        if value in self.besides:
            return True
        within = self.least <= value <= self.most and self.above < value < self.below
        # Of integers that no float can hold math.isfinite is an error.
        return within and abs(value) <= sys.float_info.max

    def __str__(self):
        bounds = dict(least="at least", most="at most", above="above", below="below")
        finite = {}
        for name, words in bounds.items():
            if math.isfinite(getattr(self, name)):
                finite[name] = f"{words} {getattr(self, name)}"

        text = " and ".join(finite.values()) or "any finite number"
        if finite.keys() == {"least", "most"}:
            text = f"{self.least} to {self.most}"
        return ", or ".join([text, *map(str, self.besides)])


def one_of(default: str, *others: str):
    """A field of a group of keys: one of these names."""
    return dataclasses.field(default=default, metadata={"valid": (default, *others)})


def integer(default: int, *, least: int = 0, most: int = 2**31 - 1, besides: tuple = ()):
    """A field of a group of keys: an integer. What has no limit of its own fits in 31 bits."""
    valid = Range(least=least, most=most, besides=besides)
    return dataclasses.field(default=default, metadata={"valid": valid})


def number(default: float, **bounds: float):
    """A field of a group of keys: a finite number within the bounds of a `Range`."""
    return dataclasses.field(default=default, metadata={"valid": Range(**bounds)})


# The keys, group by group. Sizes have limits far above any model's, so that a slip of the pen is an
# error, and not a machine out of memory.


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """config.model: the fields of `lm.models.transformer.Config`."""

    vocab_size: int = integer(0, most=2**24)  # 0: the tokenizer's
    # longest sequence; the size of the position table when positions are learned
    context_length: int = integer(256, least=1, most=2**24)
    num_layers: int = integer(4, least=1, most=2**12)
    embed_dim: int = integer(256, least=1, most=2**18)
    # of each expert, where there are experts
    mlp_dim: int = integer(1024, least=1, most=2**20)
    num_heads: int = integer(2, least=1, most=2**12)
    num_kv_heads: int = integer(2, least=1, most=2**12)
    head_dim: int = integer(128, least=1, most=2**14)
    norm: str = one_of("rmsnorm", "layernorm")
    norm_eps: float = number(1e-5, above=0, below=1)
    qk_norm: bool = False  # RMSNorm of each head's queries and keys
    # post_norm (of the sum; no norm at the end) | parallel (attention and MLP both on the layer's
    # input)
    residual: str = one_of("pre_norm", "post_norm", "parallel")
    activation: str = one_of("relu_squared", "gelu", "gelu_tanh", "relu", "silu")
    gated_mlp: bool = False
    # of every layer, in the MLP's place, see lm.nn.moe; 0: none
    num_experts: int = integer(0, most=2**14)
    experts_per_token: int = integer(2, least=1, most=2**14)
    normalize_router: bool = True  # the probabilities of a token's experts sum to 1
    # of an expert that takes every token; 0: none
    shared_mlp_dim: int = integer(0, most=2**20)
    # what a token sees of its text: causal (what is up to it) | full (all of it: an encoder, which
    # continues no text)
    visible: str = one_of("causal", "full")
    positions: str = one_of("rope", "learned")
    # learned: rows of the table before that of position 0
    position_offset: int = integer(0, most=2**24)
    rope_theta: float = number(10000.0, above=1)
    rope_fraction: float = number(1.0, above=0, most=1)  # of a head's dims that turn
    rope_interleaved: bool = False  # the pairs that turn are (2i, 2i + 1), not (i, i + half)
    # For texts longer than the model was trained on, a name and its numbers, as
    # lm.nn.positions.SCALINGS has them: ("yarn", 4.0, 32768); four numbers alone are llama3's.
    rope_scaling: tuple[str | float, ...] = ()
    # positions that a query sees, itself included; 0: all before it
    window: int = integer(0)
    embed_norm: bool = False  # a norm of the embedding's output (BERT)
    # rows of a table of which the first is added to each token (BERT's kinds of text); 0: none
    token_types: int = integer(0, most=2**10)
    # The vocabulary's head sees norm(activation(a dense layer)) of a state (BERT).
    head_transform: bool = False
    # where there are biases, with commas between them: qkv, out (of attention), mlp, norm
    # (layernorm), head (of the vocabulary's logits)
    bias: str = ""
    tie_embeddings: bool = True
    # of the embedding and the head, with a projection between them and the layers; 0: embed_dim
    table_dim: int = integer(0, most=2**18)
    # shares of values set to 0 in training: of the embedding's output and of what attention and MLP
    # add to the residual stream | of attention's probabilities (attention = "xla" only)
    dropout: float = number(0.0, least=0, below=1)
    attention_dropout: float = number(0.0, least=0, below=1)
    # Heads beside the vocabulary's, with commas between them, as lm.models.transformer.HEADS has
    # them: "scalar", "classes:3", "token_labels:9".
    heads: str = ""
    # LoRA (lm/nn/lora.py): the rank of the adapters, which alone are trained then; 0: none
    lora_rank: int = integer(0, most=2**12)
    lora_alpha: float = number(16.0, above=0, most=2**20)
    lora_scaling: str = one_of("plain", "rslora")  # alpha / r | alpha / sqrt(r)
    # the weights that have adapters, with commas between them
    lora_targets: str = "query,key,value,out,up,gate,down"
    # how the layers' matrices are stored, which stay as init_from has them: as they are | nf4, in 4
    # bits (lm/nn/nf4.py)
    quantize: str = one_of("", "nf4")
    # of every weight; those that write to the residual stream are divided by sqrt(2 * num_layers)
    init_std: float = number(0.02, least=0, most=100)

    # What follows is how the model is executed.
    param_dtype: str = one_of("bfloat16", "float32")  # norms are always float32
    # "": bfloat16 on TPU and GPU, float32 on CPU
    compute_dtype: str = one_of("", "bfloat16", "float32")
    # cudnn (GPU, bfloat16) | splash (TPU) | splash_interpreted (for tests)
    attention: str = one_of("xla", "cudnn", "splash", "splash_interpreted")
    # What is saved for the backward pass; the rest is computed again: none (no remat, all is saved)
    # | dots (the matmuls' results) | full (nothing) | names of results, of query, key, value,
    # attention (splash), out, up, gate, down: "query,attention,out"; "up:host" saves one in the
    # host's memory.
    remat: str = "none"
    # layers in one iteration of the loop over them; all: faster on CPU, slower to compile
    scan_unroll: int = integer(1, least=1, most=2**12)


@dataclasses.dataclass(frozen=True)
class RecurrentFields:
    """config.model of the type lm.models.recurrent: the fields of its Config."""

    vocab_size: int = integer(0, most=2**24)  # 0: the tokenizer's
    context_length: int = integer(2**20, least=1, most=2**24)  # longest sequence
    cell: str = one_of("lstm", "gru", "rnn")
    num_layers: int = integer(2, least=1, most=2**8)
    embed_dim: int = integer(256, least=1, most=2**18)
    hidden_dim: int = integer(256, least=1, most=2**18)  # units of a layer
    embed_scale: bool = False  # the embedding, by embed_dim^0.5
    # The head is the embedding, and the last layer has its size (AWD-LSTM).
    tie_embeddings: bool = True
    head_bias: bool = False  # of the vocabulary's logits
    # Longest source, which an encoder of so many layers in both directions reads, for translation;
    # 0: there is none.
    source_length: int = integer(0, most=2**24)
    encoder_layers: int = integer(1, least=1, most=2**8)
    start_id: int = integer(0, most=2**24)  # with a source: what is read at position 0
    # share of what layers and head read that is set to 0 in training
    dropout: float = number(0.0, least=0, below=1)
    init_std: float = number(0.05, least=0, most=100)  # of the tables
    param_dtype: str = one_of("bfloat16", "float32")
    # "": bfloat16 on TPU and GPU, float32 on CPU
    compute_dtype: str = one_of("", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class EncDecFields:
    """config.model of the type lm.models.encdec: the fields of its Config. What ModelFields has too
    means the same, of both stacks where it isn't a size of one.
    """

    vocab_size: int = integer(0, most=2**24)  # 0: the tokenizer's
    context_length: int = integer(256, least=1, most=2**24)  # longest text of the decoder
    source_length: int = integer(256, least=1, most=2**24)  # longest text of the encoder
    num_layers: int = integer(4, least=1, most=2**12)  # of the decoder
    encoder_layers: int = integer(4, least=1, most=2**12)
    embed_dim: int = integer(256, least=1, most=2**18)
    mlp_dim: int = integer(1024, least=1, most=2**20)
    num_heads: int = integer(2, least=1, most=2**12)
    head_dim: int = integer(128, least=1, most=2**14)
    norm: str = one_of("rmsnorm", "layernorm")
    norm_eps: float = number(1e-6, above=0, below=1)
    residual: str = one_of("pre_norm", "post_norm")
    activation: str = one_of("relu", "relu_squared", "gelu", "gelu_tanh", "silu")
    gated_mlp: bool = False
    # relative: T5's bias of scores by distance, a table for each stack | learned: a table for each
    # stack | sinusoids, a cosine behind each sine | sinusoids_halves, all cosines behind all sines
    positions: str = one_of("relative", "learned", "sinusoids", "sinusoids_halves")
    position_offset: int = integer(0, most=2**24)  # learned: rows before that of position 0
    relative_buckets: int = integer(32, least=4, most=2**12)
    relative_distance: int = integer(128, least=2, most=2**16)  # from here on all are one bucket
    scale_scores: bool = True  # attention's, by head_dim^-0.5 (T5: not)
    embed_scale: bool = False  # the embedding, by embed_dim^0.5
    head_scale: bool = False  # what the vocabulary's head sees, by embed_dim^-0.5 (T5 v1.0)
    embed_norm: bool = False  # a norm of the embedding's output (BART)
    bias: str = ""  # see ModelFields
    tie_embeddings: bool = True
    start_id: int = integer(
        0, most=2**24
    )  # what the decoder reads at position 0, whatever is there
    dropout: float = number(0.0, least=0, below=1)
    attention_dropout: float = number(0.0, least=0, below=1)
    init_std: float = number(0.02, least=0, most=100)
    param_dtype: str = one_of("bfloat16", "float32")
    # "": bfloat16 on TPU and GPU, float32 on CPU
    compute_dtype: str = one_of("", "bfloat16", "float32")
    remat: str = "none"
    scan_unroll: int = integer(1, least=1, most=2**12)


@dataclasses.dataclass(frozen=True)
class Data:
    # dotted path of a function (split, **source_args) -> Documents
    source: str = "lm.data.pydocs.pydocs"
    source_args: dict = dataclasses.field(default_factory=lambda: dict(data_dir="~/.cache/lm"))
    split: str = "train"
    # name -> part(...): sources whose rows are mixed; `source` is "" then (lm/data/mixtures.py)
    mixture: dict = dataclasses.field(default_factory=dict)
    # a part's share is proportional to weight * tokens^exponent; 0: to the weight, 1: weights are
    # epochs, between: small parts are raised
    mixture_exponent: float = number(0.0, least=0, most=1)
    cache_dir: str = "~/.cache/lm"  # trained tokenizers
    # dotted path of a function (lm.build.Experiment) -> what has the methods of
    # lm.data.loader.Loader; "": rows of the documents
    loader: str = ""
    # if not "", a training document with a label ends with this line and the label
    label_prompt: str = ""
    length: int = integer(256, least=1, most=2**24)  # tokens a row, T
    batch_size: int = integer(16, least=1, most=2**24)  # rows of the global batch, B
    # independent streams that the rows are dealt from; a multiple of the number of processes
    streams: int = integer(8, least=1, most=2**20)
    # first_fit (documents whole) | concat_then_split (rows full, documents cut anywhere)
    packing: str = one_of("first_fit", "concat_then_split")
    packing_bins: int = integer(128, least=1, most=2**20)  # rows that first_fit fills at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """config.data.mixture.NAME"""

    source: str = ""  # see Data
    source_args: dict = dataclasses.field(default_factory=dict)
    # (weight,), or one that follows the steps: (weight at 0, step, weight there, step, ...)
    weight: tuple[str | float, ...] = (1.0,)
    # tokens, where config.data.mixture_exponent isn't 0; 0: what the corpus's card says
    size: int = integer(0, most=10**15)


@dataclasses.dataclass(frozen=True)
class Chat:
    """config.chat: how conversations become tokens (lm/data/chat_ids.py), where the source has
    them.
    """

    # plain | alpaca | chatml | llama2 | llama3 | the path of a Jinja file; "": the tokenizer's own
    template: str = ""
    # the assistant's answers, each with the end of its turn | the last one alone
    learnt: str = one_of("answers", "last_answer")
    # longer than a row: left out | its beginning is cut off, but for BOS | its end is
    too_long: str = one_of("drop", "cut_prompt", "cut_answer")
    # a file that --mode=reference wrote, for objective.reference = "stored"
    reference_logprobs: str = ""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """config.rollout: the texts that a policy writes and learns from (lm/rl/rollouts.py)."""

    samples: int = integer(8, least=1, most=2**16)  # texts of each prompt; gae: 1 is enough
    steps: int = integer(1, least=1, most=2**16)  # batches that are drawn at a time
    epochs: int = integer(1, least=1, most=2**16)  # how often each of them is learnt from
    max_new_tokens: int = integer(64, least=1, most=2**24)
    # of a text, whose beginning is a prompt, where config.data.source has texts; 0: it has prompts
    prompt_tokens: int = integer(0, most=2**24)
    slots: int = integer(64, least=1, most=2**20)  # texts that are decoded together
    # What FSDP splits is gathered once a rollout, not for each token: a device then has the whole
    # model, or its share of the tensor axis.
    reshard: bool = True
    # of texts, by those of the same prompt: grpo | dr_grpo | rloo; of tokens, by a critic: gae
    advantage: str = one_of("grpo", "dr_grpo", "rloo", "gae")
    gamma: float = number(1.0, above=0, most=1)  # gae: how much a later reward counts
    gae_lambda: float = number(0.95, least=0, most=1)
    kl: float = number(0.0, least=0)  # of a token, taken off the reward
    # what reaches max_new_tokens is learnt from as it is | not at all
    overlong: str = one_of("learn", "leave_out")
    # rollouts in a row in which no prompt's texts differ in reward, after which the run stops
    patience: int = integer(20, least=1, most=2**31)


@dataclasses.dataclass(frozen=True)
class Reward:
    """The keys that all entries of config.rewards have; the others are arguments."""

    # dotted path of a function (records, texts, **arguments) -> scores, see lm/rl/rewards.py
    type: str = ""
    weight: float = number(1.0)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    # A SentencePiece model, the tokenizer folder of a run, or the directory of a Hugging Face
    # checkpoint; "": see kind.
    path: str = ""
    # where there is no path; sentencepiece: one is trained on the training split
    kind: str = one_of("sentencepiece", "bytes")
    # of a tokenizer that is trained, without what it reserves
    vocab_size: int = integer(2048, least=2, most=2**24)
    # that it is trained on, evenly out of the split; 0: all
    max_documents: int = integer(0)
    # Roles that have ids behind all others, which no text has; with commas between them: pad, mask,
    # cls, sep, start_of_piece, end_of_piece, turns, sentinels:N (N from 1 to 999). See
    # lm/data/roles.py.
    reserve: str = ""


@dataclasses.dataclass(frozen=True)
class Objective:
    # dotted path of a module with make_loss(**the rest) and token_logprobs
    type: str = "lm.objectives.causal"
    z_loss: float = number(0.0, least=0)
    balance_loss: float = number(0.0, least=0)  # weight of the routers' imbalance (num_experts)
    # positions of a row whose logits exist at a time; 0: all
    chunk: int = integer(0, most=2**24)


@dataclasses.dataclass(frozen=True)
class OptimizerFields:
    """config.optimizer."""

    name: str = one_of("adamw", "adafactor", "lion", "muon")
    learning_rate: float = number(1e-3, least=0, most=1000)
    schedule: str = one_of("cosine", "wsd", "linear", "constant")
    warmup_steps: int = integer(20)
    decay_steps: int = integer(0)  # wsd: length of the decay
    # share of the peak at the end (cosine, linear, wsd)
    final_learning_rate: float = number(0.1, least=0, most=1)
    b1: float = number(0.9, least=0, below=1)
    b2: float = number(0.95, least=0, below=1)
    eps: float = number(1e-8, above=0, most=1)
    momentum: float = number(0.95, least=0, below=1)  # muon
    # muon: the learning rate of what Adam updates (embeddings, norms), as a share
    muon_adam_ratio: float = number(1.0, least=0, most=1000)
    adafactor_decay: float = number(0.8, above=0, most=1)
    weight_decay: float = number(0.1, least=0, most=1000)
    clip_norm: float = number(1.0, least=0)  # of the gradient; 0: no clipping
    # how bfloat16 parameters take an f32 update: stochastic | nearest | master (f32 copy)
    rounding: str = one_of("stochastic", "nearest", "master")
    # of an f32 moving average of the weights, evaluated, sampled from and exported instead of them;
    # less in the first steps, so that the random start is forgotten; 0: none
    ema_decay: float = number(0.0, least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Train:
    # "N steps", "N tokens" (positions of the batches) or "X epochs" (each has every document once)
    length: str = "1000 steps"
    accumulation: int = integer(1, least=1, most=2**20)  # microbatches a step
    # Patterns of the parameters that are trained, with commas between them; those behind a "!" are
    # not: "*,!embed/*". The others stay as init_from has them, and are in no checkpoint. With
    # model.lora_rank "*" is the adapters alone; others are named: "*_lora_?,embed/*".
    trained: str = "*"
    # FSDP's collectives: partitioner (auto, by GSPMD) | by_hand (manual, by shard_map; faster on
    # TPU pods)
    fsdp: str = one_of("partitioner", "by_hand")
    # of gradients between devices: float32 | bfloat16 (by_hand only)
    grad_reduce_dtype: str = one_of("float32", "bfloat16")
    # by_hand, over fsdp and fsdp2: staged, one after the other (v4, v5p, v6e) | joint, in one
    # all-gather (v5e)
    fsdp_gather: str = one_of("staged", "joint")
    # a non-finite loss or gradient: halt (save the last good state and stop) | skip (and count)
    nonfinite: str = one_of("halt", "skip")
    log_every: int = integer(10, least=1)  # steps
    # steps between looks inside (norms by layer, loss by position), each of which takes about a
    # step's time; 0: none
    look_every: int = integer(0)
    # steps between comparisons of what several devices hold, bit for bit; checkpoints are compared
    # too, before they are saved; 0: none
    check_replicas_every: int = integer(0)


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """config.mesh: sizes (lm/sharding.py says what each splits); -1 takes the devices left."""

    slice: int = integer(1, least=1, most=2**20, besides=(-1,))
    data: int = integer(1, least=1, most=2**20, besides=(-1,))
    fsdp: int = integer(-1, least=1, most=2**20, besides=(-1,))
    fsdp2: int = integer(1, least=1, most=2**20, besides=(-1,))
    tensor: int = integer(1, least=1, most=2**20, besides=(-1,))
    sequence: int = integer(1, least=1, most=2**20, besides=(-1,))
    expert: int = integer(1, least=1, most=2**20, besides=(-1,))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = integer(0)  # steps; 0: only at the end
    keep: int = integer(2, least=1)  # newest ones kept
    # a metric ("eval/validation/loss") whose best checkpoint is kept besides; "": none
    best: str = ""


@dataclasses.dataclass(frozen=True)
class Tracking:
    # project of Weights & Biases that metrics are sent to, PROJECT or ENTITY/PROJECT (extra
    # tracking); "": none
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class Eval:
    """The keys that all entries of config.evals have."""

    type: str = ""  # dotted path of an Evaluator
    every: int = integer(0)  # steps; 0: only at the end
    batch_size: int = integer(16, least=1, most=2**20)  # rows


@dataclasses.dataclass(frozen=True)
class OtherModel:
    """The keys of config.models.NAME: a model that the objective asks and that isn't trained."""

    # a run directory, or the directory of a Hugging Face checkpoint; it decides the model
    init_from: str = ""
    # other values for fields of that model, such as attention or remat
    model: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """The keys of no group."""

    # The largest seed that jax takes as it is.
    seed: int = integer(0, most=2**32 - 1)
    # "": TPU if there is one, else GPU, else CPU
    platform: str = one_of("", "tpu", "gpu", "cpu")
    # What the run starts from, at step 0: a run directory (its newest checkpoint's weights), or the
    # directory of a Hugging Face checkpoint, which also decides config.model (but for its execution
    # and param_dtype) and, if tokenizer.path is "", the tokenizer.
    init_from: str = ""
    # Patterns, with commas between them, of parameters that are drawn at random where init_from
    # has none: "heads/*". Others that it lacks are an error.
    init_new: str = ""
    # Whether the tokenizer may have ids that init_from's lacks, behind all of its own: tables of
    # the vocabulary keep their rows, and those of the new ids are drawn.
    init_resize: bool = False


MODEL = "lm.models.transformer"
# Fields of config.model that checkpoints of older versions lack. They had none of it.
NEWER_FIELDS = (
    "lora_rank",
    "lora_alpha",
    "lora_scaling",
    "lora_targets",
    "quantize",
    "visible",
    "embed_norm",
    "token_types",
    "head_transform",
    "source_length",
    "encoder_layers",
    "start_id",
    "embed_scale",
)
GROUPS = dict(
    data=Data,
    chat=Chat,
    rollout=Rollout,
    tokenizer=Tokenizer,
    model=ModelFields,
    objective=Objective,
    optimizer=OptimizerFields,
    train=Train,
    mesh=MeshAxes,
    checkpoint=Checkpoint,
    tracking=Tracking,
)


def default() -> ConfigDict:
    """All keys with their defaults. configs/*.py start from here."""
    c = ConfigDict(dataclasses.asdict(Run()))
    for name, group in GROUPS.items():
        c[name] = ConfigDict(dataclasses.asdict(group()))
    c.data.source_args = ConfigDict(c.data.source_args, allow_dotted_keys=False)
    c.data.mixture = ConfigDict()
    # dotted path of a module with Config, Model and flops_per_token (docs/design.md)
    c.model = ConfigDict(dict(type=MODEL) | dataclasses.asdict(ModelFields()))
    # name -> an entry (lm/evals/entries.py)
    c.evals = ConfigDict()
    # name -> the keys of OtherModel
    c.models = ConfigDict()
    # name -> the keys of Reward, and arguments
    c.rewards = ConfigDict()
    return c


def part(source: str, weight: float | tuple[float, ...] = 1.0, size: int = 0, **source_args):
    """An entry of config.data.mixture."""
    weight = weight if isinstance(weight, tuple) else (weight,)
    return ConfigDict(dict(source=source, source_args=source_args, weight=weight, size=size))


# A configuration against its keys.

MAX_BATCH_TOKENS = 2**28
# of config.train.length, by its unit
MAX_AMOUNTS = dict(steps=2**31 - 1, tokens=10**18, epochs=10**6)


def check(config: ConfigDict) -> None:
    """Checks the keys of a configuration, each for itself, before anything is read or computed.

    What depends on data or devices is checked where these are known.

    Raises:
      ValueError: a key that is missing or unknown, or whose value has another type or lies outside
        its range; all of them are named, with what is wanted.
    """
    named = ("evals", "models", "rewards")
    top = {k: value for k, value in config.items() if k not in GROUPS and k not in named}
    problems = group_problems("config", Run, top)
    for name, group in GROUPS.items():
        problems += _problems_of_group(f"config.{name}", group, config.get(name))
    problems += _problems_of_entries("evals", config.get("evals"), Eval)
    problems += _problems_of_entries("rewards", config.get("rewards"), Reward)
    problems += _problems_of_models(config.get("models"))
    problems += _problems_of_mixture(config.get("data"))
    if problems:
        raise ValueError("\n".join(problems))

    parse_length(config.train.length)
    tokens = config.data.batch_size * config.data.length
    if tokens > MAX_BATCH_TOKENS:
        raise ValueError(
            f"config.data.batch_size = {config.data.batch_size} rows of config.data.length = "
            f"{config.data.length} are {tokens} tokens; a batch has at most {MAX_BATCH_TOKENS}"
        )
    if config.data.batch_size % config.data.streams:
        raise ValueError(
            f"config.data.streams = {config.data.streams} must divide config.data.batch_size = "
            f"{config.data.batch_size}"
        )


# The fields of the shipped models, by config.model.type. Others check their own.
ENCDEC = "lm.models.encdec"
MODELS = {MODEL: ModelFields, "lm.models.recurrent": RecurrentFields, ENCDEC: EncDecFields}


def model(type: str = MODEL, **fields) -> ConfigDict:
    """A config.model of a type of `MODELS`, with its other fields' defaults."""
    return ConfigDict(dict(type=type) | dataclasses.asdict(MODELS[type]()) | fields)


def check_model(fields: Mapping, where: str, type: str = MODEL) -> None:
    """Checks the fields of a model's Config; `where` is what errors call them.

    Raises:
      ValueError: see `check`.
    """
    if problems := group_problems(where, MODELS[type], fields):
        raise ValueError("\n".join(problems))


def start_from(config: ConfigDict, base: str) -> None:
    """Lets a configuration start from a base: its weights, and where it is a run's directory its
    model and its tokenizer. Those of a Hugging Face checkpoint are taken when it is read.

    Args:
      base: "" leaves the configuration as it is.

    Raises:
      ValueError: see `stored_model`.
    """
    config.init_from = base
    directory = epath.Path(files.expand(base))
    if not base or not (directory / "config.json").exists():
        return
    saved = files.read_json(directory / "config.json")
    if isinstance(saved.get("model"), dict):
        config.model.update(stored_model({"config": saved}, str(directory)))
        config.tokenizer.path = str(directory / "tokenizer")


def stored_model(meta: Mapping, where: str, model_type: str = "") -> dict:
    """Returns the config.model that a checkpoint was saved with, checked.

    A file names no code: its model is one of lm.models, or the one that the user's own command
    names.

    Args:
      meta: the checkpoint's JSON object.
      where: what errors call the checkpoint.
      model_type: dotted path of a module outside of lm.models that may be imported; "": none.

    Raises:
      ValueError: no such model, keys that are missing or unknown, or values outside their range.
    """
    config = meta.get("config")
    fields = config.get("model") if isinstance(config, dict) else None
    if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
        raise ValueError(f"{where} has no config.model with a type in its metadata")

    stored_type = fields["type"]
    if not stored_type.startswith("lm.models.") and stored_type != model_type:
        raise ValueError(
            f"{where} has a model of the module {stored_type!r}, which would be imported. Where "
            f"you trust it, --model_type={stored_type} allows it"
        )
    if stored_type in MODELS:
        defaults = dataclasses.asdict(MODELS[stored_type]())
        newer = {name: value for name, value in defaults.items() if name in NEWER_FIELDS}
        fields = newer | fields
        values = {name: value for name, value in fields.items() if name != "type"}
        check_model(values, f"{where}: config.model", stored_type)
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def _problems_of_group(name: str, group: type, values) -> list[str]:
    if not isinstance(values, (ConfigDict, dict)):
        return [f"{name} = {values!r}; wanted the keys of lm/config.py's {group.__name__}"]

    values = dict(values.items())
    if group is ModelFields:
        model_type = values.pop("type", None)
        if not isinstance(model_type, str):
            return [f"{name}.type = {model_type!r}; wanted the dotted path of a module"]
        # A model of one's own has fields of its own, and checks them.
        if model_type not in MODELS:
            return []
        group = MODELS[model_type]
    # An objective of its own takes what it likes.
    if group is Objective and values.get("type") != Objective.type:
        if not isinstance(values.get("type"), str):
            return [f"{name}.type = {values.get('type')!r}; wanted the dotted path of a module"]
        return []
    return group_problems(name, group, values)


def _problems_of_entries(group: str, entries, common_keys: type) -> list[str]:
    """Problems of what all entries have; what they name checks the rest when it is built."""
    if not isinstance(entries, (ConfigDict, dict)):
        return [f"config.{group} = {entries!r}; wanted entries by name, each with a type"]

    problems = []
    for name, entry in entries.items():
        if not isinstance(entry, (ConfigDict, dict)):
            problems.append(f"config.{group}.{name} = {entry!r}; wanted an entry, a ConfigDict")
            continue
        common = {field.name for field in dataclasses.fields(common_keys)}
        values = {key: value for key, value in entry.items() if key in common}
        problems += group_problems(f"config.{group}.{name}", common_keys, values)
    return problems


def _problems_of_mixture(data) -> list[str]:
    mixture = data.get("mixture") if isinstance(data, (ConfigDict, dict)) else None
    if not isinstance(mixture, (ConfigDict, dict)):
        return []  # said above
    problems = []
    for name, entry in mixture.items():
        where = f"config.data.mixture.{name}"
        if not name.isidentifier() or not isinstance(entry, (ConfigDict, dict)):
            problems.append(f"{where} = {entry!r}; wanted a name and the keys of Part")
            continue
        problems += group_problems(where, Part, dict(entry.items()))
    if bool(mixture) == bool(data.get("source")):
        problems.append(
            f"config.data.source = {data.get('source')!r} and config.data.mixture has "
            f"{list(mixture)}; wanted a source or a mixture"
        )
    return problems


def _problems_of_models(models) -> list[str]:
    if not isinstance(models, (ConfigDict, dict)):
        return [f"config.models = {models!r}; wanted models by name, each with init_from"]

    problems = []
    for name, entry in models.items():
        where = f"config.models.{name}"
        if not name.isidentifier() or not isinstance(entry, (ConfigDict, dict)):
            problems.append(f"{where} = {entry!r}; wanted a name and the keys of OtherModel")
            continue
        problems += group_problems(where, OtherModel, dict(entry.items()))
        if not entry.get("init_from"):
            problems.append(f"{where}.init_from is empty; wanted where its weights are")
    return problems


def group_problems(prefix: str, group: type, values: Mapping) -> list[str]:
    """Returns what is wrong with the values of a group's keys, a line each."""
    fields = {field.name: field for field in dataclasses.fields(group)}
    problems = []
    for name in sorted(values.keys() - fields.keys()):
        problems.append(f"{prefix}.{name} is no key; valid: {list(fields)}")
    for name, field in fields.items():
        if name not in values:
            problems.append(f"{prefix}.{name} is missing; start from lm.config.default()")
        elif problem := wanted(field, values[name]):
            problems.append(f"{prefix}.{name} = {values[name]!r}; {problem}")
    return problems


# The type of a key -> (the types of its values, how errors call them).
_TYPES = {
    bool: ((bool,), "True or False"),
    str: ((str,), "a text"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    dict: ((dict, ConfigDict), "keys with values"),
    tuple[str, ...]: ((tuple, list), "a tuple of texts"),
    tuple[str | float, ...]: ((tuple, list), "a tuple of numbers, which a name may come before"),
}


def wanted(field: dataclasses.Field, value) -> str:
    """What a key wants, if `value` is not that; "" if it is."""
    types, words = _TYPES[field.type]
    # In Python a bool is an int.
    if not isinstance(value, types) or (isinstance(value, bool) and field.type is not bool):
        return f"wanted {words}"
    if field.type == tuple[str, ...]:
        return "" if all(isinstance(item, str) for item in value) else f"wanted {words}"
    if isinstance(value, (tuple, list)):
        numbers = value[1:] if value and isinstance(value[0], str) else value
        if not all(_is_finite_number(item) for item in numbers):
            return f"wanted {words}"

    valid = field.metadata.get("valid")
    if valid is None or value in valid:
        return ""
    return f"wanted {valid}" if isinstance(valid, Range) else f"valid: {sorted(valid)}"


def _is_finite_number(value) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def sized(sizes: dict, size: str):
    """The entry of `sizes`, a configuration's table of its sizes. Raises ValueError, listing them,
    for another size.
    """
    if size not in sizes:
        raise ValueError(f"this configuration has no size {size!r}; valid: {list(sizes)}")
    return sizes[size]


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict:
    """{"a.b": value} of a nested configuration; sequences as lists, as JSON has them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _as_json(value)
    return flat


def content_hash(config: ConfigDict) -> str:
    """The hash of a full configuration."""
    return files.short_hash(json.dumps(config.to_dict(), sort_keys=True).encode())


def _as_json(value):
    return [_as_json(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_resumable(old: dict, new: ConfigDict, where: str) -> None:
    """Raises ValueError if `new` is not the same experiment as `old`, the configuration that a run
    directory was started with.
    """
    old, new, defaults = flatten(old), flatten(new), flatten(default())
    differing = []
    for key in sorted(old.keys() | new.keys()):
        # What an older version didn't know had its default.
        old_value = old.get(key, defaults.get(key))
        if old_value != new.get(key) and not is_resumable(key):
            there, now = old.get(key, "absent"), new.get(key, "absent")
            differing.append(f"  {key}: {there!r} there, {now!r} now")

    if differing:
        lines = "\n".join(differing)
        raise ValueError(
            f"{where} holds a run of another configuration:\n{lines}\nTake another --workdir, or "
            f"the old values. A run that goes on may change only {', '.join(RESUMABLE)}."
        )


def is_resumable(key: str) -> bool:
    """Whether a run may change this key, or the group that it is in."""
    # Parts of a mixture lie elsewhere as a source does.
    key = re.sub(r"^data\.mixture\.\w+\.", "data.", key)
    return any(key == name or key.startswith(name + ".") for name in RESUMABLE)


def parse_length(length: str) -> tuple[Fraction, str]:
    """Returns (amount, "steps", "tokens" or "epochs") of config.train.length.

    Raises:
      ValueError: anything else, or more than a run of 2^31 steps may have.
    """
    number, _, unit = length.partition(" ")
    try:
        amount = Decimal(number.replace("_", "").replace(",", ""))
        # Compared as it stands: the integer of 1e999999999 fills the memory.
        if not 0 < amount <= MAX_AMOUNTS[unit]:
            raise ValueError
    except (ValueError, KeyError, ArithmeticError):
        raise ValueError(
            f'config.train.length = {length!r}; wanted "N steps", "N tokens" or "X epochs", such '
            f'as "2e6 tokens", of at most {", ".join(f"{n:g} {u}" for u, n in MAX_AMOUNTS.items())}'
        ) from None
    return Fraction(amount), unit


def total_steps(
    length: str, *, batch_tokens: int, steps_of_epochs: Callable[[Fraction], int] | None
) -> int:
    """Steps of a run whose config.train.length is `length`, rounded up.

    Args:
      length: "N steps", "N tokens" (positions of the batches) or "X epochs".
      batch_tokens: of each step.
      steps_of_epochs: epochs -> their steps; called where the length needs it.

    Raises:
      ValueError: see `parse_length`.
    """
    amount, unit = parse_length(length)
    if unit == "steps":
        return math.ceil(amount)
    if unit == "epochs":
        return steps_of_epochs(amount)
    return math.ceil(amount / batch_tokens)
