"""Every key of a run's configuration, once, with its default and what it means.

configs/*.py start from here and say what differs.

The configuration is locked before it is used: a key that is not here is an error. Each run writes
what it ran with, complete, to config.json.
"""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

from ml_collections import ConfigDict

# What a run may change when it goes on from its checkpoints. Everything else is the experiment:
# changing it is another run.
RESUMABLE = (
    "platform",
    "mesh",
    "evals",
    "checkpoint",
    "train.length",
    "train.log_every",
    "train.nonfinite",
    "train.fsdp",
    "train.fsdp_gather",
    "objective.chunk",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "data.cache_dir",
    # Where the corpus lies; its fingerprint says whether it is the same text.
    "data.source_args.data_dir",
    "data.source_args.path",
)


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """config.model: the fields of `lm.models.transformer.Config`, which checks them."""

    vocab_size: int = 0  # 0: the tokenizer's
    # longest sequence; the size of the position table when positions are learned
    context_length: int = 256
    num_layers: int = 4
    embed_dim: int = 256
    mlp_dim: int = 1024  # of each expert, where there are experts
    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 128
    norm: str = "rmsnorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm of each head's queries and keys
    # pre_norm | post_norm (of the sum; no norm at the end) | parallel (attention and MLP both on
    # the layer's input)
    residual: str = "pre_norm"
    activation: str = "relu_squared"  # gelu | gelu_tanh | relu | silu | relu_squared
    gated_mlp: bool = False
    num_experts: int = 0  # of every layer, in the MLP's place, see lm.nn.moe; 0: none
    experts_per_token: int = 2
    normalize_router: bool = True  # the probabilities of a token's experts sum to 1
    shared_mlp_dim: int = 0  # of an expert that takes every token; 0: none
    positions: str = "rope"  # learned | rope
    position_offset: int = 0  # learned: rows of the table before that of position 0
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # of a head's dims that turn
    rope_interleaved: bool = False  # the pairs that turn are (2i, 2i + 1), not (i, i + half)
    # or Llama 3.1's (factor, low_frequency_factor, high_frequency_factor, original context)
    rope_scaling: tuple[float, ...] = ()
    window: int = 0  # positions that a query sees, itself included; 0: all before it
    # where there are biases, with commas between them: qkv, out (of attention), mlp, norm
    # (layernorm)
    bias: str = ""
    tie_embeddings: bool = True
    # of the embedding and the head, with a projection between them and the layers; 0: embed_dim
    table_dim: int = 0
    # of every weight; those that write to the residual stream are divided by sqrt(2 * num_layers)
    init_std: float = 0.02

    # What follows is how the model is executed.
    param_dtype: str = "bfloat16"  # bfloat16 | float32; norms are always float32
    compute_dtype: str = ""  # bfloat16 | float32; "": bfloat16 on TPU and GPU, float32 on CPU
    # xla | cudnn (GPU, bfloat16) | splash (TPU) | splash_interpreted (for tests)
    attention: str = "xla"
    # What is saved for the backward pass; the rest is computed again: none (no remat, all is saved)
    # | dots (the matmuls' results) | full (nothing) | names of results, of query, key, value,
    # attention (splash), out, up, gate, down: "query,attention,out"; "up:host" saves one in the
    # host's memory.
    remat: str = "none"
    # layers in one iteration of the loop over them; all: faster on CPU, slower to compile
    scan_unroll: int = 1


def default() -> ConfigDict:
    """All keys with their defaults. configs/*.py start from here."""
    c = ConfigDict()
    c.seed = 0
    c.platform = ""  # tpu | gpu | cpu; "": TPU if there is one, else GPU, else CPU
    # What the run starts from, at step 0: a run directory (its newest checkpoint's weights), or the
    # directory of a Hugging Face checkpoint, which also decides config.model (but for its execution
    # and param_dtype) and, if tokenizer.path is "", the tokenizer.
    c.init_from = ""

    c.data = ConfigDict()
    # dotted path of a function (split, **source_args) -> Documents
    c.data.source = "lm.data.pydocs.pydocs"
    c.data.source_args = ConfigDict(dict(data_dir="~/.cache/lm"), allow_dotted_keys=False)
    c.data.split = "train"
    c.data.cache_dir = "~/.cache/lm"  # trained tokenizers
    # if not "", a training document with a label ends with this line and the label
    c.data.label_prompt = ""
    c.data.length = 256  # tokens a row, T
    c.data.batch_size = 16  # rows of the global batch, B
    # independent streams that the rows are dealt from; a multiple of the number of processes
    c.data.streams = 8
    # first_fit (documents whole) | concat_then_split (rows full, documents cut anywhere)
    c.data.packing = "first_fit"
    c.data.packing_bins = 128  # rows that first_fit fills at a time

    c.tokenizer = ConfigDict()
    # A SentencePiece model, the tokenizer folder of a run, or the directory of a Hugging Face
    # checkpoint; "": see kind.
    c.tokenizer.path = ""
    # where there is no path: sentencepiece (one is trained on the training split) | bytes
    c.tokenizer.kind = "sentencepiece"
    c.tokenizer.vocab_size = 2048  # of a tokenizer that is trained
    c.tokenizer.max_documents = 0  # that it is trained on, evenly out of the split; 0: all

    # dotted path of a module with Config and a class named Transformer
    c.model = ConfigDict(dict(type="lm.models.transformer") | dataclasses.asdict(ModelFields()))

    c.objective = ConfigDict()
    # dotted path of a module with make_loss(**the rest) and token_logprobs
    c.objective.type = "lm.objectives.causal"
    c.objective.z_loss = 0.0
    c.objective.balance_loss = 0.0  # weight of the routers' imbalance (num_experts)
    c.objective.chunk = 0  # positions of a row whose logits exist at a time; 0: all

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw | adafactor | lion | muon
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"  # cosine | wsd | linear | constant
    c.optimizer.warmup_steps = 20
    c.optimizer.decay_steps = 0  # wsd: length of the decay
    c.optimizer.final_learning_rate = 0.1  # share of the peak at the end (cosine, linear, wsd)
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.momentum = 0.95  # muon
    # muon: the learning rate of what Adam updates (embeddings, norms), as a share
    c.optimizer.muon_adam_ratio = 1.0
    c.optimizer.adafactor_decay = 0.8
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 1.0  # of the gradient; 0: no clipping
    # how bfloat16 parameters take an f32 update: stochastic | nearest | master (f32 copy)
    c.optimizer.rounding = "stochastic"
    # of an f32 moving average of the weights, evaluated instead of them; 0: none
    c.optimizer.ema_decay = 0.0

    c.train = ConfigDict()
    c.train.length = "1000 steps"  # "N steps", "N tokens" (positions of the batches) or "X epochs"
    c.train.accumulation = 1  # microbatches a step
    # FSDP's collectives: partitioner (auto, by GSPMD) | by_hand (manual, by shard_map; faster on
    # TPU pods)
    c.train.fsdp = "partitioner"
    # of gradients between devices: float32 | bfloat16 (by_hand only)
    c.train.grad_reduce_dtype = "float32"
    # by_hand, over fsdp and fsdp2: staged, one after the other (v4, v5p, v6e) | joint, in one
    # all-gather (v5e)
    c.train.fsdp_gather = "staged"
    # a non-finite loss or gradient: halt (save the last good state and stop) | skip (and count)
    c.train.nonfinite = "halt"
    c.train.log_every = 10  # steps

    # Axes of the mesh (lm/sharding.py says what each splits); -1 takes the devices that are left.
    c.mesh = ConfigDict(dict(slice=1, data=1, fsdp=-1, fsdp2=1, tensor=1, sequence=1, expert=1))

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 0  # steps; 0: only at the end
    c.checkpoint.keep = 2  # newest ones kept
    # a metric ("eval/validation/loss") whose lowest checkpoint is kept besides; "": none
    c.checkpoint.best = ""

    # name -> dict(type=dotted path of an Evaluator, every=steps (0: only at the end),
    # batch_size=rows, **its arguments)
    c.evals = ConfigDict()
    return c


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


def _as_json(value):
    return [_as_json(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_resumable(old: dict, new: ConfigDict, where: str) -> None:
    """Raises ValueError if `new` is not the same experiment as `old`, the configuration that a run
    directory was started with.
    """
    old, new = flatten(old), flatten(new)
    differing = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not _is_resumable(key):
            there, now = old.get(key, "absent"), new.get(key, "absent")
            differing.append(f"  {key}: {there!r} there, {now!r} now")

    if differing:
        lines = "\n".join(differing)
        raise ValueError(
            f"{where} holds a run of another configuration:\n{lines}\nTake another --workdir, or "
            f"the old values. A run that goes on may change only {', '.join(RESUMABLE)}."
        )


def _is_resumable(key: str) -> bool:
    """Whether a run may change this key, or the group that it is in."""
    return any(key == name or key.startswith(name + ".") for name in RESUMABLE)


def total_steps(length: str, *, batch_tokens: int, epoch_tokens: Callable[[], int]) -> int:
    """Steps of a run whose config.train.length is `length`, rounded up.

    Args:
      length: "N steps", "N tokens" or "X epochs" (of the corpus's targets).
      batch_tokens: of each step.
      epoch_tokens: gives the targets of one epoch; called where the length needs it.

    Raises:
      ValueError: anything else.
    """
    number, _, unit = length.partition(" ")
    try:
        amount = Fraction(number.replace("_", "").replace(",", ""))
        if amount <= 0 or unit not in ("steps", "tokens", "epochs"):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f'config.train.length = {length!r}; wanted "N steps", "N tokens" or "X epochs", such '
            'as "2e6 tokens"'
        ) from None

    if unit == "steps":
        return math.ceil(amount)
    tokens = amount if unit == "tokens" else amount * epoch_tokens()
    return math.ceil(tokens / batch_tokens)
