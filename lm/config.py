"""Every key of a run's configuration, once, with what it means. configs/*.py start from here and
say what differs.

The configuration is locked before it is used: a key that is not here is an error. Each run writes
what it ran with, complete, to config.json.
"""

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
    # Where the corpus lies; that it is the same text is held by its fingerprint.
    "data.source_args.data_dir",
    "data.source_args.path",
)


def default() -> ConfigDict:
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

    c.model = _model()

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
    # who writes FSDP's collectives: partitioner | by_hand (faster on TPU pods)
    c.train.fsdp = "partitioner"
    # of gradients on the wire: float32 | bfloat16 (by_hand only)
    c.train.grad_reduce_dtype = "float32"
    # by_hand over fsdp and fsdp2: one after the other (v4, v5p, v6e) | joint, in one all-gather
    # (v5e)
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


def _model() -> ConfigDict:
    c = ConfigDict()
    # dotted path of a module with Config and a class named Transformer
    c.type = "lm.models.transformer"
    c.vocab_size = 0  # 0: the tokenizer's
    c.context_length = 256
    c.num_layers = 4
    c.embed_dim = 256
    c.mlp_dim = 1024
    c.num_heads = 2
    c.num_kv_heads = 2
    c.head_dim = 128
    c.norm = "rmsnorm"  # layernorm | rmsnorm
    c.norm_eps = 1e-5
    c.qk_norm = False  # RMSNorm of each head's queries and keys
    c.residual = "pre_norm"  # pre_norm | post_norm | parallel
    c.activation = "relu_squared"  # gelu | gelu_tanh | relu | silu | relu_squared
    c.gated_mlp = False
    c.num_experts = 0  # a mixture of experts of mlp_dim in the MLP's place; 0: none
    c.experts_per_token = 2
    c.normalize_router = True  # the weights of a token's experts sum to 1
    c.shared_mlp_dim = 0  # of an expert that takes every token; 0: none
    c.positions = "rope"  # learned | rope
    c.position_offset = 0  # learned: rows of the table before that of position 0
    c.rope_theta = 10000.0
    c.rope_fraction = 1.0  # of a head's dims that turn
    c.rope_interleaved = False  # the pairs that turn are (2i, 2i + 1), not (i, i + half)
    # or Llama 3.1's (factor, low_frequency_factor, high_frequency_factor, original context)
    c.rope_scaling = ()
    c.window = 0  # positions that a query sees, itself included; 0: all before it
    # where there are biases, with commas between them: qkv, out (of attention), mlp, norm
    # (layernorm)
    c.bias = ""
    c.tie_embeddings = True
    c.table_dim = 0  # of the embedding and the head, if it isn't embed_dim: they are projected
    c.init_std = 0.02
    c.param_dtype = "bfloat16"  # bfloat16 | float32; norms are always float32
    c.compute_dtype = ""  # bfloat16 | float32; "": bfloat16 on TPU and GPU, float32 on CPU
    # xla | cudnn (GPU, bfloat16) | splash (TPU) | splash_interpreted (for tests)
    c.attention = "xla"
    # What the backward pass computes again: none | dots (all but the matmuls) | full (all) | all
    # but the results named, of query, key, value, attention (splash), out, up, gate, down:
    # "query,attention,out"; "up:host" keeps one in the host's memory.
    c.remat = "none"
    # layers in one iteration of the loop over them; all: faster on CPU, slower to compile
    c.scan_unroll = 1
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
    differing = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == free or key.startswith(free + ".") for free in RESUMABLE)
    ]
    if differing:
        lines = "\n".join(
            f"  {key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} now"
            for key in differing
        )
        raise ValueError(
            f"{where} holds a run of another configuration:\n{lines}\nTake another --workdir, or "
            f"the old values. A run that goes on may change only {', '.join(RESUMABLE)}."
        )
