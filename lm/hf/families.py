"""The model families of Hugging Face checkpoints: one table each, read both ways.

A family's table says which key of config.json is which field of our model's Config, and which
tensor of the files is which of our parameters. `hf_name` is always Hugging Face's name, for a key
or for a tensor; `field` and `path` are our names. Hugging Face's names appear in this folder only.

To add a family, write its `Family` below: `read_config` and `write_config`, import and export all
follow from it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm import config as config_lib
from lm.nn.positions import SCALINGS, Dynamic, LongRope, Yarn, parse_scaling

REQUIRED = object()


class Key(NamedTuple):
    """A key of config.json, and the field of our Config that it sets. Of several keys of one name
    the first is written.

    A key that is missing and one that is null are two things: transformers' class has a default for
    the first, and what it makes of the second, if anything, is another matter. Both are in Hugging
    Face's words, as values are; a function is given the fields read so far.
    """

    field: str
    hf_name: str  # "" for a field that config.json never says
    default: Any = REQUIRED  # where the key is missing
    null: Any = REQUIRED  # where it is null
    # Hugging Face's value -> ours, or a function of the fields, where they differ
    values: Mapping[Any, Any] | None = None
    more: int = 0  # what Hugging Face's number has more than ours


class Rope(NamedTuple):
    """How a family's config.json says its rotary embedding."""

    theta: float = 10000.0  # where config.json doesn't say
    # Of a head's dims that turn, where config.json doesn't say; None: all, whatever it says.
    fraction: float | None = None
    # What the two are called beside the rotary parameters; among them all families say the same.
    theta_name: str = "rope_theta"
    fraction_name: str = "partial_rotary_factor"
    # original_max_position_embeddings, where config.json doesn't say; None: it stands among the
    # rotary parameters.
    length: int | None = None
    type_names: Mapping[str, str] = {}  # other name of a rope_type -> its name


class Tensor(NamedTuple):
    """A tensor of the files, or a part of one, and the parameter that it holds.

    A path under "layers/" is a stack of all layers' parameters, and under "layers/mlp/" of all
    experts' too where there are some: each layer (and expert) has a tensor of its own. So is one
    under "encoder_layers/".
    """

    path: str
    hf_name: str  # with {i} for the layer and {e} for the expert
    # vector | row ([1, n], of a vector) | table (as ours) | linear ([out, in]) | conv1d ([in, out])
    layout: str
    num_inputs: int = 1  # how many leading dims of our parameter are `in`
    part: tuple[int, int] = (0, 1)  # (which, of how many) parts along `out`
    # Each kv head's rows stand together: its queries, its key, its value.
    by_kv_head: bool = False
    gated: bool | None = None  # of models with a gated MLP alone, or of those without


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of Hugging Face's that one of our models can be."""

    name: str  # model_type
    architecture: str  # the class in transformers
    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    constants: Mapping[str, Any]  # fields that are the same in all models of the family

    model: str = config_lib.MODEL  # config.model.type

    # Biases, by the names of Config.bias: those that all models have, and those that a key turns on
    # (hf_name, its default, the parts that get a bias).
    biases: tuple[str, ...] = ()
    bias_flags: tuple[tuple[str, bool, tuple[str, ...]], ...] = ()

    # Keys that are no fields: those that must have one of these values, the first by default,
    # because our model can't do others; and those that don't change logits.
    supported_values: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    ignored_keys: tuple[str, ...] = ()
    # Other name -> hf_name. Where config.json has both, the other name's value counts.
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Key -> the key whose value it has in all models that ours can be.
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Whether the head is the embedding, and whether logits have a bias, is for the tensors to say.
    tensors_decide: bool = False

    rope: Rope | None = None  # None: the family has learned positions
    # Where config.json doesn't say; 0: no window. None: the family has no sliding_window.
    window: int | None = None
    has_window_switch: bool = False  # the window is off unless use_sliding_window turns it on

    # Names of tensors: how those of the body begin, which some checkpoints leave out; a regular
    # expression of those that are no parameters of ours; endings of older files -> of newer ones.
    body_prefix: str = ""
    buffer_pattern: str = r"$."  # matches nothing
    older_endings: Mapping[str, str] = dataclasses.field(default_factory=dict)


# --- parts of the tables ---


# Keys of any family that say nothing about the logits of a text.
_IGNORED_KEYS = frozenset(
    """
    _name_or_path _commit_hash _attn_implementation architectures model_type transformers_version
    torch_dtype dtype auto_map use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id
    initializer_range init_std attention_dropout hidden_dropout dropout resid_pdrop embd_pdrop
    attn_pdrop layerdrop classifier_dropout activation_dropout attention_probs_dropout_prob
    hidden_dropout_prob residual_dropout embedding_dropout
    output_attentions output_hidden_states output_router_logits return_dict return_dict_in_generate
    torchscript use_bfloat16 tf_legacy_loss
    pruned_heads chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    finetuning_task id2label label2id num_labels tokenizer_class prefix problem_type
    task_specific_params
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    pretraining_tp max_window_layers unsloth_version unsloth_fixed gradient_checkpointing
    predict_special_tokens n_special
    _num_labels is_llama_config transformers.js_config neftune_noise_alpha
    _attn_implementation_autoset _attn_implementation_internal attn_implementation
    experts_implementation _experts_implementation use_flash_attn use_flash_attention
    name_or_path model_max_length padding_side max_sequence_length custom_pipelines
""".split()
)
# Keys of any family that must have one of these values: transformers' code reads them, though no
# class has them. Missing, they are the first.
_SUPPORTED_VALUES: Mapping[str, tuple] = dict(is_causal=(True,))
# Keys that say how queries and keys turn, in any family that turns them: transformers 5's, and 4's.
# GPT-NeoX doesn't heed all of them, and neither does transformers.
_ROPE_KEYS = frozenset(
    """
    rope_parameters rope_scaling rope_theta partial_rotary_factor original_max_position_embeddings
""".split()
)
# Parameters of rope_type "llama3", in the order of Config.rope_scaling.
_LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_CONFIG_FIELDS = {field.name: field for field in dataclasses.fields(config_lib.ModelFields)}


def _config_fields(family: Family) -> dict[str, dataclasses.Field]:
    """The fields of a family's Config, by name."""
    fields = dataclasses.fields(config_lib.MODELS[family.model])
    return {field.name: field for field in fields}


# Fields of a model with learned positions, which doesn't use them.
_NO_ROPE = dict(rope_theta=10000.0, rope_fraction=1.0, rope_scaling=(), rope_interleaved=False)
# Fields of a model that continues texts.
_DECODER = dict(visible="causal", embed_norm=False, token_types=0, head_transform=False)
# Fields of a model without experts, which uses the first one only.
_DENSE = dict(num_experts=0, experts_per_token=2, normalize_router=True, shared_mlp_dim=0)

# fmt: off
ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu_squared", "swish": "silu",
}
# fmt: on


def _all_heads(fields):
    return fields["num_heads"]


def _even_head_dim(fields):
    return fields["embed_dim"] // fields["num_heads"]


def _four_embed_dims(fields):
    return 4 * fields["embed_dim"]


def _embed_dim(fields):
    return fields["embed_dim"]


def _sizes(layers: str, width: str, heads: str, length: str) -> tuple[Key, ...]:
    """The keys of the sizes that every model has, by their names in config.json."""
    return (
        Key("vocab_size", "vocab_size"),
        Key("num_layers", layers),
        Key("embed_dim", width),
        Key("num_heads", heads),
        Key("context_length", length),
    )


def _kv_heads(default) -> Key:
    """The key of the number of kv heads, of which there are as many as heads where it is null."""
    return Key("num_kv_heads", "num_key_value_heads", default, null=_all_heads)


def _replaced(keys: Sequence[Key], *new: Key) -> tuple[Key, ...]:
    """The keys, without those of the new ones' fields, and the new ones."""
    new_fields = {key.field for key in new}
    others = [key for key in keys if key.field not in new_fields]
    return (*others, *new)


def _in_layers(hf_prefix: str, *tensors: Tensor, stack: str = "layers") -> tuple[Tensor, ...]:
    """The tensors of every layer, from those of one."""
    stacks = []
    for tensor in tensors:
        path = f"{stack}/{tensor.path}"
        hf_name = f"{hf_prefix}.{{i}}.{tensor.hf_name}"
        stacks.append(tensor._replace(path=path, hf_name=hf_name))
    return tuple(stacks)


def _linear(path: str, hf_name: str, num_inputs: int = 1) -> tuple[Tensor, ...]:
    """The weight of torch.nn.Linear and its bias."""
    return (
        Tensor(path, f"{hf_name}.weight", "linear", num_inputs),
        Tensor(f"{path}_bias", f"{hf_name}.bias", "vector"),
    )


def _conv1d(path: str, hf_name: str, num_inputs: int = 1) -> tuple[Tensor, ...]:
    """The weight and bias of transformers' Conv1D: a linear layer, its weight transposed."""
    return (
        Tensor(path, f"{hf_name}.weight", "conv1d", num_inputs),
        Tensor(f"{path}_bias", f"{hf_name}.bias", "vector"),
    )


def _norm(path: str, hf_name: str) -> tuple[Tensor, ...]:
    return (
        Tensor(f"{path}/scale", f"{hf_name}.weight", "vector"),
        Tensor(f"{path}/bias", f"{hf_name}.bias", "vector"),
    )


def _fused(
    paths: Sequence[str], hf_name: str, layout: str, by_kv_head: bool = False
) -> tuple[Tensor, ...]:
    """Parameters that are parts of one tensor, in this order."""
    rows = []
    for i, path in enumerate(paths):
        rows.append(Tensor(path, hf_name, layout, part=(i, len(paths)), by_kv_head=by_kv_head))
    return tuple(rows)


_COMMON_SIZES = _sizes(
    "num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"
)
_QKV = ("attention/query", "attention/key", "attention/value")
_QKV_BIAS = ("attention/query_bias", "attention/key_bias", "attention/value_bias")


# --- Llama, and what differs from it in a few rows ---


# fmt: off
_LLAMA_KEYS = (
    *_COMMON_SIZES,
    Key("mlp_dim", "intermediate_size"),
    _kv_heads(_all_heads),
    Key("head_dim", "head_dim", _even_head_dim, null=_even_head_dim),
    Key("norm_eps", "rms_norm_eps", 1e-6),
    Key("activation", "hidden_act", "silu", values=ACTIVATIONS),
    Key("tie_embeddings", "tie_word_embeddings", False),
)
_SEPARATE_QKV = (
    *_linear("attention/query", "self_attn.q_proj"),
    *_linear("attention/key", "self_attn.k_proj"),
    *_linear("attention/value", "self_attn.v_proj"),
)
_LLAMA_MLP = (
    *_linear("mlp/gate", "mlp.gate_proj"),
    *_linear("mlp/up", "mlp.up_proj"),
    *_linear("mlp/down", "mlp.down_proj"),
)
_FUSED_MLP = (
    *_fused(("mlp/gate", "mlp/up"), "mlp.gate_up_proj.weight", "linear"),
    *_linear("mlp/down", "mlp.down_proj"),
)


def _llama_tensors(
    mlp: Sequence[Tensor] = _LLAMA_MLP, qkv: Sequence[Tensor] = _SEPARATE_QKV
) -> tuple[Tensor, ...]:
    """Llama's tensors, with others in place of a layer's MLP, or queries, keys and values."""
    return (
        Tensor("embed/table", "model.embed_tokens.weight", "table"),
        Tensor("head/table", "lm_head.weight", "table"),
        *_norm("norm", "model.norm"),
        *_in_layers(
            "model.layers",
            *qkv,
            *_linear("attention/out", "self_attn.o_proj", 2),
            *_norm("attention_norm", "input_layernorm"),
            *_norm("mlp_norm", "post_attention_layernorm"),
            Tensor("attention/query_norm/scale", "self_attn.q_norm.weight", "vector"),
            Tensor("attention/key_norm/scale", "self_attn.k_norm.weight", "vector"),
            *mlp,
        ),
    )


_LLAMA_TENSORS = _llama_tensors()
_LLAMA_EXPERTS_CONSTANTS = dict(
    norm="rmsnorm", gated_mlp=True, positions="rope", residual="pre_norm", qk_norm=False,
    rope_interleaved=False, table_dim=0, position_offset=0,
)
_LLAMA_CONSTANTS = _LLAMA_EXPERTS_CONSTANTS | _DENSE
# The frequencies of RoPE are in older checkpoints, as buffers.
_LLAMA_NAMES = dict(body_prefix="model.", buffer_pattern=r"\.rotary_emb\.inv_freq$")
# fmt: on


def _expert_tensors(
    block: str, up: str = "up_proj", gate: str = "gate_proj", down: str = "down_proj"
) -> tuple[Tensor, ...]:
    """Llama's tensors with a router and experts in the MLP's place.

    Args:
      block: name of the module that replaces the MLP; the others are those of an expert's weights.
    """
    return _llama_tensors(
        (
            Tensor("mlp/router", f"{block}.gate.weight", "linear"),
            Tensor("mlp/up", f"{block}.experts.{{e}}.{up}.weight", "linear"),
            Tensor("mlp/gate", f"{block}.experts.{{e}}.{gate}.weight", "linear"),
            Tensor("mlp/down", f"{block}.experts.{{e}}.{down}.weight", "linear"),
        )
    )


# fmt: off
_ATTENTION_BIAS = ("attention_bias", False, ("qkv", "out"))
_MLP_BIAS = ("mlp_bias", False, ("mlp",))

_LLAMA = Family(
    "llama", "LlamaForCausalLM",
    _LLAMA_KEYS, _LLAMA_TENSORS, _LLAMA_CONSTANTS,
    bias_flags=(_ATTENTION_BIAS, _MLP_BIAS), rope=Rope(), **_LLAMA_NAMES,
)
_MISTRAL = Family(
    "mistral", "MistralForCausalLM",
    _replaced(_LLAMA_KEYS, _kv_heads(8)), _LLAMA_TENSORS, _LLAMA_CONSTANTS,
    rope=Rope(), window=4096, **_LLAMA_NAMES,
)
_QWEN2 = Family(
    "qwen2", "Qwen2ForCausalLM",
    _replaced(_LLAMA_KEYS, _kv_heads(32)), _LLAMA_TENSORS, _LLAMA_CONSTANTS,
    biases=("qkv",), rope=Rope(), window=4096, has_window_switch=True, **_LLAMA_NAMES,
)
_QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM",
    _replaced(_LLAMA_KEYS, _kv_heads(32), Key("head_dim", "head_dim", 128)),
    _LLAMA_TENSORS,
    _LLAMA_CONSTANTS | dict(qk_norm=True),
    bias_flags=(_ATTENTION_BIAS,), rope=Rope(), window=4096, has_window_switch=True,
    **_LLAMA_NAMES,
)
_ARCEE = Family(  # Llama with an MLP of two layers
    "arcee", "ArceeForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        Key("activation", "hidden_act", "relu2", values=ACTIVATIONS),
        Key("norm_eps", "rms_norm_eps", 1e-5),
    ),
    _LLAMA_TENSORS,
    _LLAMA_CONSTANTS | dict(gated_mlp=False),
    bias_flags=(_ATTENTION_BIAS, _MLP_BIAS), rope=Rope(), **_LLAMA_NAMES,
)
_STABLELM = Family(
    "stablelm", "StableLmForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        Key("num_kv_heads", "num_key_value_heads", 32),
        Key("norm_eps", "layer_norm_eps", 1e-5),
        Key("head_dim", "", _even_head_dim),
    ),
    _LLAMA_TENSORS,
    _LLAMA_CONSTANTS | dict(norm="layernorm"),
    biases=("norm",), bias_flags=(("use_qkv_bias", False, ("qkv",)),),
    supported_values=dict(qk_layernorm=(False,), use_parallel_residual=(False,)),
    rope=Rope(fraction=0.25), **_LLAMA_NAMES,
)
_GLM = Family(  # gate and up are one tensor
    "glm", "GlmForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        Key("num_kv_heads", "num_key_value_heads", 2),
        Key("head_dim", "head_dim", 128),
        Key("norm_eps", "rms_norm_eps", 1.5625e-7),
    ),
    _llama_tensors(_FUSED_MLP),
    _LLAMA_CONSTANTS | dict(rope_interleaved=True),
    bias_flags=(("attention_bias", True, ("qkv",)),), rope=Rope(fraction=0.5), **_LLAMA_NAMES,
)
_PHI3 = Family(  # queries, keys and values are one tensor too
    "phi3", "Phi3ForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        Key("head_dim", "head_dim", _even_head_dim),
        Key("norm_eps", "rms_norm_eps", 1e-5),
    ),
    _llama_tensors(_FUSED_MLP, _fused(_QKV, "self_attn.qkv_proj.weight", "linear")),
    _LLAMA_CONSTANTS,
    ignored_keys=("full_attn_mod", "interpolate_factor"),  # Phi-4-mini's files have them
    rope=Rope(fraction=1.0, length=4096, type_names=dict(su="longrope", yarn="longrope")),
    window=0, **_LLAMA_NAMES,
)
_STARCODER2 = Family(
    "starcoder2", "Starcoder2ForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        Key("num_kv_heads", "num_key_value_heads", 2),
        Key("norm_eps", "norm_epsilon", 1e-5),
        Key("activation", "hidden_act", "gelu_pytorch_tanh", values=ACTIVATIONS),
        Key("tie_embeddings", "tie_word_embeddings", True),
    ),
    _llama_tensors((*_linear("mlp/up", "mlp.c_fc"), *_linear("mlp/down", "mlp.c_proj"))),
    _LLAMA_CONSTANTS | dict(norm="layernorm", gated_mlp=False),
    biases=("norm",), bias_flags=(("use_bias", True, ("qkv", "out", "mlp")),),
    ignored_keys=(  # of the code that trained it
        "activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon", "mlp_type",
        "norm_type", "scale_attention_softmax_in_fp32", "scale_attn_weights",
    ),
    rope=Rope(), window=0, **_LLAMA_NAMES,
)
_ERNIE4_5 = Family(
    "ernie4_5", "Ernie4_5ForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        _kv_heads(2),
        Key("head_dim", "head_dim", 128, null=_even_head_dim),
        Key("norm_eps", "rms_norm_eps", 1e-5),
        Key("tie_embeddings", "tie_word_embeddings", True),
    ),
    _LLAMA_TENSORS,
    _LLAMA_CONSTANTS | dict(rope_interleaved=True),
    bias_flags=(("use_bias", False, ("qkv", "out", "mlp")),), rope=Rope(theta=500000.0),
    **_LLAMA_NAMES,
)
_HELIUM = Family(
    "helium", "HeliumForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        Key("num_kv_heads", "num_key_value_heads", 20),
        Key("head_dim", "head_dim", 128),
        Key("norm_eps", "rms_norm_eps", 1e-8),
    ),
    _LLAMA_TENSORS,
    _LLAMA_CONSTANTS | dict(rope_interleaved=True),
    bias_flags=(("attention_bias", False, ("qkv",)), _MLP_BIAS), rope=Rope(theta=100000.0),
    **_LLAMA_NAMES,
)
_SEED_OSS = Family(
    "seed_oss", "SeedOssForCausalLM",
    _replaced(
        _LLAMA_KEYS, _kv_heads(8), Key("head_dim", "head_dim", 128, null=_even_head_dim)
    ),
    _LLAMA_TENSORS,
    _LLAMA_CONSTANTS,
    bias_flags=(
        ("attention_bias", True, ("qkv",)), ("attention_out_bias", False, ("out",)), _MLP_BIAS,
    ),
    rope=Rope(), **_LLAMA_NAMES,
)
_JAIS2 = Family(
    "jais2", "Jais2ForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        Key("norm_eps", "layer_norm_eps", 1e-5),
        Key("activation", "hidden_act", "relu2", values=ACTIVATIONS),
    ),
    _LLAMA_TENSORS,
    _LLAMA_CONSTANTS | dict(norm="layernorm", gated_mlp=False),
    biases=("norm",),
    bias_flags=(("attention_bias", True, ("qkv", "out")), ("mlp_bias", True, ("mlp",))),
    rope=Rope(), **_LLAMA_NAMES,
)
# transformers makes a Llama of both.
_INTERNLM3 = Family(
    "internlm3", "LlamaForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        _kv_heads(2),
        Key("head_dim", "head_dim", 128, null=_even_head_dim),
        Key("norm_eps", "rms_norm_eps", 1e-5),
    ),
    _LLAMA_TENSORS, _LLAMA_CONSTANTS,
    bias_flags=(_ATTENTION_BIAS, _MLP_BIAS),
    aliases=dict(qkv_bias="attention_bias", bias="mlp_bias"), rope=Rope(), **_LLAMA_NAMES,
)
_IQUESTCODER = Family(
    "iquestcoder", "LlamaForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        _kv_heads(8),
        Key("head_dim", "head_dim", 128, null=_even_head_dim),
        Key("norm_eps", "rms_norm_eps", 1e-5),
    ),
    _LLAMA_TENSORS, _LLAMA_CONSTANTS,
    bias_flags=(_ATTENTION_BIAS, _MLP_BIAS), rope=Rope(), **_LLAMA_NAMES,
)


# --- Llama with experts ---


_MIXTRAL = Family(
    "mixtral", "MixtralForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        _kv_heads(8),
        Key("num_experts", "num_local_experts", 8),
        Key("experts_per_token", "num_experts_per_tok", 2),
        Key("norm_eps", "rms_norm_eps", 1e-5),
    ),
    _expert_tensors("block_sparse_moe", up="w3", gate="w1", down="w2"),
    _LLAMA_EXPERTS_CONSTANTS | dict(normalize_router=True, shared_mlp_dim=0),
    supported_values=dict(router_jitter_noise=(0.0,)), ignored_keys=("router_aux_loss_coef",),
    aliases={"num_experts": "num_local_experts"},
    rope=Rope(theta=1e6), window=0, **_LLAMA_NAMES,
)
# Qwen's models may have layers without experts, and windows: those are refused.
_QWEN_SUPPORTED = dict(
    decoder_sparse_step=(1,), mlp_only_layers=([], None), use_sliding_window=(False,)
)
_QWEN_IGNORED = ("router_aux_loss_coef", "intermediate_size")
_QWEN2_MOE = Family(
    "qwen2_moe", "Qwen2MoeForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        Key("num_kv_heads", "num_key_value_heads", 16),
        Key("num_experts", "num_experts", 60),
        Key("experts_per_token", "num_experts_per_tok", 4),
        Key("normalize_router", "norm_topk_prob", False),
        Key("mlp_dim", "moe_intermediate_size", 1408),
        Key("shared_mlp_dim", "shared_expert_intermediate_size", 5632),
    ),
    (
        *_expert_tensors("mlp"),
        *_in_layers(
            "model.layers",
            *_linear("mlp/shared/up", "mlp.shared_expert.up_proj"),
            *_linear("mlp/shared/gate", "mlp.shared_expert.gate_proj"),
            *_linear("mlp/shared/down", "mlp.shared_expert.down_proj"),
            Tensor("mlp/shared_gate", "mlp.shared_expert_gate.weight", "linear"),
        ),
    ),
    _LLAMA_EXPERTS_CONSTANTS,
    bias_flags=(("qkv_bias", True, ("qkv",)),),
    supported_values=_QWEN_SUPPORTED, ignored_keys=_QWEN_IGNORED,
    rope=Rope(), window=4096, has_window_switch=True, **_LLAMA_NAMES,
)
_QWEN3_MOE = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM",
    _replaced(
        _LLAMA_KEYS,
        Key("num_kv_heads", "num_key_value_heads", 4),
        Key("num_experts", "num_experts", 128),
        Key("experts_per_token", "num_experts_per_tok", 8),
        Key("normalize_router", "norm_topk_prob", False),
        Key("mlp_dim", "moe_intermediate_size", 768),
    ),
    _expert_tensors("mlp"),
    _LLAMA_EXPERTS_CONSTANTS | dict(qk_norm=True, shared_mlp_dim=0),
    bias_flags=(_ATTENTION_BIAS,),
    supported_values=_QWEN_SUPPORTED, ignored_keys=_QWEN_IGNORED,
    aliases={"num_local_experts": "num_experts"},
    rope=Rope(), window=4096, has_window_switch=True, **_LLAMA_NAMES,
)


# --- OpenAI's GPTs, OPT and GPT-NeoX ---


_GPT_KEYS = (
    *_sizes("n_layer", "n_embd", "n_head", "n_positions"),
    Key("num_kv_heads", "", _all_heads),
    Key("head_dim", "", _even_head_dim),
    Key("norm_eps", "layer_norm_epsilon", 1e-5),
    Key("tie_embeddings", "tie_word_embeddings", True),
)
_GPT_TENSORS = (
    Tensor("head/table", "lm_head.weight", "table"),
    *_norm("norm", "transformer.ln_f"),
    *_in_layers(
        "transformer.h",
        *_fused(_QKV, "attn.c_attn.weight", "conv1d"),
        *_fused(_QKV_BIAS, "attn.c_attn.bias", "vector"),
        *_conv1d("attention/out", "attn.c_proj", 2),
        *_conv1d("mlp/up", "mlp.c_fc"),
        *_conv1d("mlp/down", "mlp.c_proj"),
        *_norm("attention_norm", "ln_1"),
        *_norm("mlp_norm", "ln_2"),
    ),
)
_GPT_CONSTANTS = dict(
    norm="layernorm", gated_mlp=False, positions="learned", qk_norm=False, table_dim=0,
    position_offset=0,
) | _DENSE
_GPT_BIASES = ("qkv", "out", "mlp", "norm")
_GPT_IGNORED = ("n_ctx", "reorder_and_upcast_attn")
_GPT_ALIASES = dict(
    hidden_size="n_embd", max_position_embeddings="n_positions", num_attention_heads="n_head",
    num_hidden_layers="n_layer",
)
_GPT_BUFFERS = r"\.attn\.(bias|masked_bias)$"
_GPT2 = Family(
    "gpt2", "GPT2LMHeadModel",
    (
        *_GPT_KEYS,
        Key("mlp_dim", "n_inner", _four_embed_dims, null=_four_embed_dims),
        Key("activation", "activation_function", "gelu_new", values=ACTIVATIONS),
    ),
    (
        Tensor("embed/table", "transformer.wte.weight", "table"),
        Tensor("position_embed/table", "transformer.wpe.weight", "table"),
        *_GPT_TENSORS,
    ),
    _GPT_CONSTANTS | dict(residual="pre_norm"),
    supported_values=dict(
        scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    ),
    biases=_GPT_BIASES, ignored_keys=_GPT_IGNORED, aliases=_GPT_ALIASES,
    body_prefix="transformer.", buffer_pattern=_GPT_BUFFERS,
)
_GPT_BIGCODE = Family(
    "gpt_bigcode", "GPTBigCodeForCausalLM",
    _replaced(
        _GPT_KEYS,
        Key("mlp_dim", "n_inner", _four_embed_dims, null=_four_embed_dims),
        Key("num_kv_heads", "multi_query", True, values={True: 1, False: _all_heads}),
        Key("activation", "activation_function", "gelu_pytorch_tanh", values=ACTIVATIONS),
    ),
    (
        Tensor("embed/table", "transformer.wte.weight", "table"),
        Tensor("position_embed/table", "transformer.wpe.weight", "table"),
        Tensor("head/table", "lm_head.weight", "table"),
        *_norm("norm", "transformer.ln_f"),
        *_in_layers(
            "transformer.h",
            *_fused(_QKV, "attn.c_attn.weight", "linear", by_kv_head=True),
            *_fused(_QKV_BIAS, "attn.c_attn.bias", "vector", by_kv_head=True),
            *_linear("attention/out", "attn.c_proj", 2),
            *_linear("mlp/up", "mlp.c_fc"),
            *_linear("mlp/down", "mlp.c_proj"),
            *_norm("attention_norm", "ln_1"),
            *_norm("mlp_norm", "ln_2"),
        ),
    ),
    _GPT_CONSTANTS | dict(residual="pre_norm"),
    supported_values=dict(scale_attn_weights=(True,), add_cross_attention=(False,)),
    biases=_GPT_BIASES, aliases=_GPT_ALIASES,
    ignored_keys=(
        *_GPT_IGNORED, "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
        "inference_runner", "max_batch_size", "pad_key_length", "pre_allocate_kv_cache",
        "validate_runner_input", "num_key_value_heads",
    ),
    body_prefix="transformer.", buffer_pattern=_GPT_BUFFERS,
)
_OPENAI_GPT = Family(
    "openai-gpt", "OpenAIGPTLMHeadModel",
    (
        *_GPT_KEYS,
        Key("mlp_dim", "", _four_embed_dims),
        # This model's "gelu" is the approximation that others call gelu_new.
        Key("activation", "afn", "gelu",
            values={"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}),
    ),
    (
        Tensor("embed/table", "transformer.tokens_embed.weight", "table"),
        Tensor("position_embed/table", "transformer.positions_embed.weight", "table"),
        *_GPT_TENSORS,
    ),
    _GPT_CONSTANTS | dict(residual="post_norm"),
    biases=_GPT_BIASES, ignored_keys=_GPT_IGNORED, aliases=_GPT_ALIASES,
    body_prefix="transformer.", buffer_pattern=_GPT_BUFFERS,
)
_OPT = Family(
    "opt", "OPTForCausalLM",
    (
        *_COMMON_SIZES,
        Key("mlp_dim", "ffn_dim"),
        Key("num_kv_heads", "", _all_heads),
        Key("head_dim", "", _even_head_dim),
        Key("norm_eps", "", 1e-5),
        Key("activation", "activation_function", "relu", values=ACTIVATIONS),
        Key("tie_embeddings", "tie_word_embeddings", True),
        Key("residual", "do_layer_norm_before", True,
            values={True: "pre_norm", False: "post_norm"}),
        Key("table_dim", "word_embed_proj_dim", _embed_dim, null=_embed_dim),
    ),
    (
        Tensor("embed/table", "model.decoder.embed_tokens.weight", "table"),
        Tensor("head/table", "lm_head.weight", "table"),
        Tensor("position_embed/table", "model.decoder.embed_positions.weight", "table"),
        Tensor("project_in", "model.decoder.project_in.weight", "linear"),
        Tensor("project_out", "model.decoder.project_out.weight", "linear"),
        *_norm("norm", "model.decoder.final_layer_norm"),
        *_in_layers(
            "model.decoder.layers",
            *_SEPARATE_QKV,
            *_linear("attention/out", "self_attn.out_proj", 2),
            *_linear("mlp/up", "fc1"),
            *_linear("mlp/down", "fc2"),
            *_norm("attention_norm", "self_attn_layer_norm"),
            *_norm("mlp_norm", "final_layer_norm"),
        ),
    ),
    dict(
        norm="layernorm", gated_mlp=False, positions="learned", qk_norm=False, position_offset=2,
    ) | _DENSE,
    biases=("norm",), bias_flags=(("enable_bias", True, ("qkv", "out", "mlp")),),
    supported_values=dict(
        _remove_final_layer_norm=(False,), layer_norm_elementwise_affine=(True,)
    ),
    body_prefix="model.",
)
_GPT_NEOX = Family(
    "gpt_neox", "GPTNeoXForCausalLM",
    (
        *_COMMON_SIZES,
        Key("mlp_dim", "intermediate_size"),
        Key("num_kv_heads", "", _all_heads),
        Key("head_dim", "", _even_head_dim),
        Key("norm_eps", "layer_norm_eps", 1e-5),
        Key("activation", "hidden_act", "gelu", values=ACTIVATIONS),
        Key("tie_embeddings", "tie_word_embeddings", False),
        Key("residual", "use_parallel_residual", True,
            values={True: "parallel", False: "pre_norm"}),
    ),
    (
        Tensor("embed/table", "gpt_neox.embed_in.weight", "table"),
        Tensor("head/table", "embed_out.weight", "table"),
        *_norm("norm", "gpt_neox.final_layer_norm"),
        *_in_layers(
            "gpt_neox.layers",
            *_fused(_QKV, "attention.query_key_value.weight", "linear", by_kv_head=True),
            *_fused(_QKV_BIAS, "attention.query_key_value.bias", "vector", by_kv_head=True),
            *_linear("attention/out", "attention.dense", 2),
            *_linear("mlp/up", "mlp.dense_h_to_4h"),
            *_linear("mlp/down", "mlp.dense_4h_to_h"),
            *_norm("attention_norm", "input_layernorm"),
            *_norm("mlp_norm", "post_attention_layernorm"),
        ),
    ),
    dict(
        norm="layernorm", gated_mlp=False, positions="rope", qk_norm=False, rope_interleaved=False,
        table_dim=0, position_offset=0,
    ) | _DENSE,
    biases=("mlp", "norm"), bias_flags=(("attention_bias", True, ("qkv", "out")),),
    rope=Rope(fraction=0.25, theta_name="rotary_emb_base", fraction_name="rotary_pct"),
    body_prefix="gpt_neox.",
    buffer_pattern=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
)

# --- encoders ---


_BERT_KEYS = (
    *_COMMON_SIZES,
    Key("mlp_dim", "intermediate_size"),
    Key("num_kv_heads", "", _all_heads),
    Key("head_dim", "", _even_head_dim),
    Key("norm_eps", "layer_norm_eps", 1e-12),
    Key("activation", "hidden_act", "gelu", values=ACTIVATIONS),
    Key("token_types", "type_vocab_size", 2),
)
_BERT_CONSTANTS = dict(
    visible="full", norm="layernorm", gated_mlp=False, positions="learned", qk_norm=False,
    residual="post_norm", embed_norm=True, head_transform=True, table_dim=0, position_offset=0,
    tie_embeddings=True,
) | _DENSE


def _bert_tensors(body: str, transform: str, norm: str, bias: str, head: str) -> tuple[Tensor, ...]:
    """BERT's tensors, by the name of its body and those of its head's parts."""
    return (
        Tensor("embed/table", f"{body}.embeddings.word_embeddings.weight", "table"),
        Tensor("position_embed/table", f"{body}.embeddings.position_embeddings.weight", "table"),
        Tensor("type_embed/table", f"{body}.embeddings.token_type_embeddings.weight", "table"),
        *_norm("embed_norm", f"{body}.embeddings.LayerNorm"),
        *_in_layers(
            f"{body}.encoder.layer",
            *_linear("attention/query", "attention.self.query"),
            *_linear("attention/key", "attention.self.key"),
            *_linear("attention/value", "attention.self.value"),
            *_linear("attention/out", "attention.output.dense", 2),
            *_norm("attention_norm", "attention.output.LayerNorm"),
            *_linear("mlp/up", "intermediate.dense"),
            *_linear("mlp/down", "output.dense"),
            *_norm("mlp_norm", "output.LayerNorm"),
        ),
        Tensor("head_transform/weight", f"{transform}.weight", "linear"),
        Tensor("head_transform/bias", f"{transform}.bias", "vector"),
        *_norm("head_transform/norm", norm),
        Tensor("head_bias", bias, "vector"),
        Tensor("head/table", head, "table"),
    )


_BERT_SUPPORTED = dict(
    position_embedding_type=("absolute",), is_decoder=(False,), add_cross_attention=(False,),
    tie_word_embeddings=(True,),
)
_BERT_BIASES = ("qkv", "out", "mlp", "norm", "head")
# What predicts the next sentence is read over, and so is the bias where it is there twice.
_BERT_BUFFERS = r"(\.position_ids|^cls\.seq_relationship\..*|\.pooler\.dense\..*|\.decoder\.bias)$"
_BERT = Family(
    "bert", "BertForMaskedLM",
    _BERT_KEYS,
    _bert_tensors(
        "bert", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias", "cls.predictions.decoder.weight",
    ),
    _BERT_CONSTANTS,
    biases=_BERT_BIASES, supported_values=_BERT_SUPPORTED,
    ignored_keys=(  # of a multilingual one, for a pooler that none has
        "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
        "pooler_size_per_head", "pooler_type",
    ),
    body_prefix="bert.", buffer_pattern=_BERT_BUFFERS,
    older_endings={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
)
_ROBERTA = Family(  # positions begin behind that of padding; the head has this activation always
    "roberta", "RobertaForMaskedLM",
    _replaced(
        _BERT_KEYS,
        Key("context_length", "max_position_embeddings", more=2),
        Key("activation", "hidden_act", "gelu", values={"gelu": "gelu"}),
    ),
    _bert_tensors(
        "roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight"
    ),
    _BERT_CONSTANTS | dict(position_offset=2),
    biases=_BERT_BIASES,
    supported_values=_BERT_SUPPORTED | dict(pad_token_id=(1,)),
    body_prefix="roberta.", buffer_pattern=_BERT_BUFFERS,
)


# --- encoder-decoders ---


def _tied(fields):
    return fields["tie_embeddings"]


def _as_many_as_encoder_layers(fields):
    return fields["encoder_layers"]


def _t5_layer(stack: str, hf_prefix: str, *sublayers: str) -> tuple[Tensor, ...]:
    """The tensors of T5's layers, by the names of its sublayers."""
    tensors = []
    for number, name in enumerate(sublayers):
        block = f"layer.{number}"
        norm = dict(SelfAttention="attention_norm", EncDecAttention="source_norm").get(name)
        tensors += _norm(norm or "mlp_norm", f"{block}.layer_norm")
        if norm:
            path = "attention" if name == "SelfAttention" else "source_attention"
            for part, letter in zip(("query", "key", "value"), "qkv"):
                tensors += _linear(f"{path}/{part}", f"{block}.{name}.{letter}")
            tensors += _linear(f"{path}/out", f"{block}.{name}.o", 2)

    mlp = f"layer.{len(sublayers) - 1}.DenseReluDense"
    tensors += [
        Tensor("mlp/up", f"{mlp}.wi.weight", "linear", gated=False),
        Tensor("mlp/gate", f"{mlp}.wi_0.weight", "linear", gated=True),
        Tensor("mlp/up", f"{mlp}.wi_1.weight", "linear", gated=True),
        Tensor("mlp/down", f"{mlp}.wo.weight", "linear"),
    ]
    return _in_layers(hf_prefix, *tensors, stack=stack)


_T5_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
_T5 = Family(  # v1.0, v1.1 and FLAN
    "t5", "T5ForConditionalGeneration",
    (
        Key("vocab_size", "vocab_size", 32128),
        Key("encoder_layers", "num_layers", 6),
        Key("num_layers", "num_decoder_layers", _as_many_as_encoder_layers,
            null=_as_many_as_encoder_layers),
        Key("embed_dim", "d_model", 512),
        Key("head_dim", "d_kv", 64),
        Key("mlp_dim", "d_ff", 2048),
        Key("num_heads", "num_heads", 8),
        Key("norm_eps", "layer_norm_epsilon", 1e-6),
        Key("relative_buckets", "relative_attention_num_buckets", 32),
        Key("relative_distance", "relative_attention_max_distance", 128),
        Key("activation", "feed_forward_proj", "relu",
            values={"relu": "relu", "gated-gelu": "gelu_tanh", "gated-silu": "silu"}),
        Key("gated_mlp", "feed_forward_proj", "relu",
            values={"relu": False, "gated-gelu": True, "gated-silu": True}),
        Key("tie_embeddings", "tie_word_embeddings", True),
        # transformers 5 writes it; before, logits were scaled where the head is the embedding.
        Key("head_scale", "scale_decoder_outputs", _tied),
        Key("start_id", "decoder_start_token_id", 0, null=0),
        # It has no longest text; this is what it was trained on.
        Key("context_length", "n_positions", 512),
        Key("source_length", "n_positions", 512),
    ),
    (
        Tensor("embed/table", "shared.weight", "table"),
        Tensor("head/table", "lm_head.weight", "table"),
        *_norm("encoder_norm", "encoder.final_layer_norm"),
        *_norm("norm", "decoder.final_layer_norm"),
        Tensor("encoder_relative/table", f"encoder.block.0.{_T5_BIAS}", "table"),
        Tensor("relative/table", f"decoder.block.0.{_T5_BIAS}", "table"),
        *_t5_layer("encoder_layers", "encoder.block", "SelfAttention", "DenseReluDense"),
        *_t5_layer(
            "layers", "decoder.block", "SelfAttention", "EncDecAttention", "DenseReluDense"
        ),
    ),
    dict(
        norm="rmsnorm", residual="pre_norm", positions="relative", position_offset=0,
        scale_scores=False, embed_scale=False, embed_norm=False,
    ),
    model=config_lib.ENCDEC, tensors_decide=True, supported_values=dict(is_decoder=(False,)),
    ignored_keys=(
        "dense_act_fn", "is_gated_act", "dropout_rate", "initializer_factor", "output_past",
        "eos_token_ids",
    ),
    buffer_pattern=r"^(encoder|decoder)\.embed_tokens\.weight$",
)


def _bart_tensors(embed_norm: bool) -> tuple[Tensor, ...]:
    """BART's tensors; Marian has no norm of the embedding's output, and no positions."""
    tensors = [
        Tensor("embed/table", "model.shared.weight", "table"),
        Tensor("head/table", "lm_head.weight", "table"),
        Tensor("head_bias", "final_logits_bias", "row"),
    ]
    for prefix, side in (("encoder_", "encoder"), ("", "decoder")):
        if embed_norm:
            path = f"{prefix}position_embed/table"
            tensors.append(Tensor(path, f"model.{side}.embed_positions.weight", "table"))
            tensors += _norm(f"{prefix}embed_norm", f"model.{side}.layernorm_embedding")
        layer = [
            *_SEPARATE_QKV,
            *_linear("attention/out", "self_attn.out_proj", 2),
            *_norm("attention_norm", "self_attn_layer_norm"),
            *_linear("mlp/up", "fc1"),
            *_linear("mlp/down", "fc2"),
            *_norm("mlp_norm", "final_layer_norm"),
        ]
        if side == "decoder":
            for part, name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
                num_inputs = 2 if part == "out" else 1
                path = f"source_attention/{part}"
                layer += _linear(path, f"encoder_attn.{name}_proj", num_inputs)
            layer += _norm("source_norm", "encoder_attn_layer_norm")
        tensors += _in_layers(f"model.{side}.layers", *layer, stack=f"{prefix}layers")
    return tuple(tensors)


_BART_KEYS = (
    Key("vocab_size", "vocab_size", 50265),
    Key("encoder_layers", "encoder_layers", 12),
    Key("num_layers", "decoder_layers", 12),
    Key("embed_dim", "d_model", 1024),
    Key("num_heads", "encoder_attention_heads", 16),
    Key("head_dim", "", _even_head_dim),
    Key("mlp_dim", "encoder_ffn_dim", 4096),
    Key("context_length", "max_position_embeddings", 1024),
    Key("source_length", "max_position_embeddings", 1024),
    Key("activation", "activation_function", "gelu", values=ACTIVATIONS),
    Key("embed_scale", "scale_embedding", False),
    Key("tie_embeddings", "tie_word_embeddings", True),
    Key("start_id", "decoder_start_token_id", 2),
)
_BART_CONSTANTS = dict(
    norm="layernorm", norm_eps=1e-5, residual="post_norm", gated_mlp=False, positions="learned",
    position_offset=2, embed_norm=True, scale_scores=True, head_scale=False,
    relative_buckets=32, relative_distance=128,
)
_BART = Family(
    "bart", "BartForConditionalGeneration",
    _BART_KEYS, _bart_tensors(embed_norm=True), _BART_CONSTANTS,
    model=config_lib.ENCDEC, tensors_decide=True, biases=_BERT_BIASES,
    copies=dict(
        decoder_attention_heads="encoder_attention_heads", decoder_ffn_dim="encoder_ffn_dim"
    ),
    supported_values=dict(
        normalize_before=(False,), add_final_layer_norm=(False,), normalize_embedding=(True,),
        static_position_embeddings=(False,), is_decoder=(False,), add_bias_logits=(False,),
    ),
    ignored_keys=(
        "classif_dropout", "encoder_layerdrop", "decoder_layerdrop", "extra_pos_embeddings",
        "num_hidden_layers", "force_bos_token_to_be_generated", "output_past",
    ),
    body_prefix="model.", buffer_pattern=r"\.(en|de)coder\.embed_tokens\.weight$",
)
_MARIAN = Family(
    "marian", "MarianMTModel",
    _replaced(
        _BART_KEYS,
        Key("vocab_size", "vocab_size", 58101),
        Key("start_id", "decoder_start_token_id", 58100),
    ),
    _bart_tensors(embed_norm=False),
    _BART_CONSTANTS | dict(positions="sinusoids_halves", position_offset=0, embed_norm=False),
    model=config_lib.ENCDEC, tensors_decide=True, biases=_BERT_BIASES,
    copies=_BART.copies | dict(decoder_vocab_size="vocab_size"),
    supported_values=dict(
        normalize_before=(False,), add_final_layer_norm=(False,), normalize_embedding=(False,),
        static_position_embeddings=(True,), is_decoder=(False,), add_bias_logits=(False,),
        share_encoder_decoder_embeddings=(True,),
    ),
    ignored_keys=_BART.ignored_keys,
    body_prefix="model.", buffer_pattern=r"\.(en|de)coder\.embed_(tokens|positions)\.weight$",
)

# In this order: a model that several families have is written as the first of them.
_IN_ORDER = (
    _GPT2, _OPENAI_GPT, _OPT, _GPT_NEOX, _LLAMA, _MISTRAL, _MIXTRAL, _QWEN2, _QWEN3, _QWEN2_MOE,
    _QWEN3_MOE, _ARCEE, _STABLELM, _GLM, _PHI3, _STARCODER2, _ERNIE4_5, _HELIUM, _SEED_OSS, _JAIS2,
    _INTERNLM3, _IQUESTCODER, _GPT_BIGCODE, _BERT, _ROBERTA, _T5, _BART, _MARIAN,
)
# fmt: on
FAMILIES = {family.name: family for family in _IN_ORDER}


# --- the family of a model ---


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family that a config.json is of.

    Raises:
      ValueError: its model_type is none of the families.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"config.json: model_type = {name!r} is none of the families that can be read: "
            f"{sorted(FAMILIES)}"
        )
    return FAMILIES[name]


def family_of_fields(fields: Mapping[str, Any]) -> Family:
    """The first family that has a model of these fields.

    Raises:
      ValueError: none has; says for each what it doesn't have.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            write_config(family, fields)
            return family
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(
        "no family of Hugging Face's that can be written has this model:\n  " + "\n  ".join(reasons)
    )


# --- config.json to our fields ---


def scorer(family: Family) -> Family:
    """The same models with a score, our head `scalar`, in the place of the vocabulary's head:
    transformers' sequence classification with one label.
    """
    tensors = [row for row in family.tensors if row.path != "head/table"]
    tensors.append(Tensor("heads/scalar/weight", "score.weight", "linear"))
    architecture = re.sub(
        "ForCausalLM|LMHeadModel", "ForSequenceClassification", family.architecture
    )
    return dataclasses.replace(family, tensors=tuple(tensors), architecture=architecture)


def read_config(config: Mapping[str, Any], ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a family's Config, but for those of execution, of a config.json.

    What its keys mean together, and which of several counts, is as in transformers.

    Args:
      ignored: keys to read it without.

    Raises:
      ValueError: a key is missing, or may change the logits in a way that our model doesn't have;
        or there is none of the ignored ones.
    """
    family = family_of_config(config)
    if strange := sorted(set(ignored) - config.keys()):
        raise ValueError(f"config.json has no {', '.join(strange)} to ignore")
    config = {name: value for name, value in config.items() if name not in ignored}
    _check_what_it_is(config)

    for alias, hf_name in family.aliases.items():
        if alias in config:
            config[hf_name] = config.pop(alias)

    is_transformer = family.model == config_lib.MODEL
    fields = (_DECODER if is_transformer else {}) | dict(family.constants)
    for key in family.keys:
        fields[key.field] = _read_key(family, key, config, fields)
    for name, original in family.copies.items():
        if config.get(name) is not None and config[name] != config.get(original, config[name]):
            raise _unsupported(family, name, config[name], f"the value of {original}")
    _check_sizes(family, fields)

    # Config has 0 where the embedding needs no projection.
    if fields.get("table_dim") == fields["embed_dim"]:
        fields["table_dim"] = 0

    fields["bias"] = _read_biases(family, config)
    if is_transformer:
        fields |= _NO_ROPE if family.rope is None else _read_rope(family, config, fields)
        fields["window"] = _read_window(family, config, fields["num_layers"])

    # Whatever is left over may change the logits in a way that the fields don't say.
    for name, values in (_SUPPORTED_VALUES | family.supported_values).items():
        if config.get(name, values[0]) not in values:
            raise _unsupported(family, name, config[name], list(values))
    _check_all_known(family, config)
    return fields


def _check_what_it_is(config: Mapping[str, Any]) -> None:
    """Raises ValueError for weights that are not plain numbers."""
    if quantization := config.get("quantization_config"):
        method = "unknown"
        if isinstance(quantization, dict):
            method = quantization.get("quant_method", method)
        raise ValueError(
            f"config.json: quantization_config: these weights are quantized (quant_method = "
            f"{method!r}), and only plain ones can be read. Take the checkpoint that they were "
            "made of; or transformers' AutoModelForCausalLM.from_pretrained(...).dequantize()"
            ".save_pretrained(...) writes plain ones"
        )


def _unsupported(family: Family, hf_name: str, value, supported) -> ValueError:
    # What the file calls it is one of these.
    aliases = [alias for alias, name in family.aliases.items() if name == hf_name]
    names = " or ".join([hf_name, *aliases])
    return ValueError(
        f"config.json: {names} = {value!r} is not supported for {family.name}; this reads "
        f"{supported}"
    )


def _read_key(family: Family, key: Key, config: Mapping[str, Any], fields: Mapping[str, Any]):
    """The value of a key's field.

    Args:
      fields: those read so far, which a default may be computed from.
    """
    value = config.get(key.hf_name)
    if value is None:
        value = key.null if key.hf_name in config else key.default
    if value is REQUIRED:
        problem = "null" if key.hf_name in config else "missing"
        raise ValueError(
            f"config.json: {key.hf_name} is {problem}; a {family.name} can't do without"
        )
    value = _our_value(value, fields)
    if key.more and type(value) is int:
        value -= key.more

    if key.values is not None:
        # Not every value can be looked up, and to Python 1 is True.
        type_wanted = type(next(iter(key.values)))
        if type(value) is not type_wanted or value not in key.values:
            raise _unsupported(family, key.hf_name, value, list(key.values))
        value = _our_value(key.values[value], fields)

    if wanted := config_lib.wanted(_config_fields(family)[key.field], value):
        raise ValueError(f"config.json: {key.hf_name} = {value!r}; {wanted}")
    if key.field == "num_experts" and value < 1:
        raise _unsupported(family, key.hf_name, value, "1 and more")
    return value


def _our_value(value, fields: Mapping[str, Any]):
    """A value of a table, which may be a function of the fields read so far."""
    return value(fields) if callable(value) else value


def _check_sizes(family: Family, fields: Mapping[str, Any]) -> None:
    """Raises ValueError for sizes that don't fit each other; most often one is missing, and its
    default is another model's.
    """
    names = {key.field: key.hf_name for key in family.keys}

    def said(field: str) -> str:
        return f"{names.get(field) or field} = {fields[field]}"

    if fields["num_heads"] % fields.get("num_kv_heads", 1):
        raise ValueError(
            f"config.json: {said('num_heads')} must be a multiple of {said('num_kv_heads')}"
        )
    if fields.get("num_experts") and fields["experts_per_token"] > fields["num_experts"]:
        raise ValueError(
            f"config.json: {said('experts_per_token')} must be at most {said('num_experts')}"
        )
    # A size that is none is checked here: a head of 0 dims.
    if fields["head_dim"] < 1 or (
        not names["head_dim"] and fields["embed_dim"] % fields["num_heads"]
    ):
        raise ValueError(
            f"config.json: {said('embed_dim')} must be a multiple of {said('num_heads')}"
        )


def _read_biases(family: Family, config: Mapping[str, Any]) -> str:
    """Config.bias: the parts that have one, with commas between them."""
    biased = set(family.biases)
    for name, default, parts in family.bias_flags:
        flag = config.get(name, default)
        if not isinstance(flag, bool):
            raise _unsupported(family, name, flag, [True, False])
        if flag:
            biased |= set(parts)
    return ",".join(part for part in ("qkv", "out", "mlp", "norm", "head") if part in biased)


def _read_rope(
    family: Family, config: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """rope_theta, rope_fraction and rope_scaling, and the context_length with it.

    transformers 5 writes them into rope_parameters; 4 wrote the first two on their own and the
    others into rope_scaling. Where both are there, rope_scaling counts, and nothing of
    rope_parameters does. What either of them says comes before what stands on its own.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    written = config.get(name) or {}
    if not isinstance(written, dict):
        raise _unsupported(family, name, written, "an object")
    parameters = dict(written)
    rope = family.rope

    theta = config.get(rope.theta_name, rope.theta)
    theta = parameters.pop("rope_theta", theta)
    fraction = config.get(rope.fraction_name, rope.fraction)
    fraction = parameters.pop("partial_rotary_factor", fraction)
    rope_type = parameters.pop("rope_type", parameters.get("type", "default"))
    parameters.pop("type", None)
    scaling = _read_scaling(family, name, rope_type, parameters, config)

    # Without scaling these families turn all dims; with it transformers has no such model.
    if rope.fraction is None and not (scaling and fraction):
        fraction = 1.0
    if rope.fraction is None and fraction != 1:
        supported = f"1.0 beside a scaling in {name}"
        raise _unsupported(family, rope.fraction_name, fraction, supported)

    turning = dict(rope_theta=theta, rope_fraction=fraction)
    names = dict(rope_theta=rope.theta_name, rope_fraction=rope.fraction_name)
    for field, value in turning.items():
        if wanted := config_lib.wanted(_CONFIG_FIELDS[field], value):
            raise ValueError(f"config.json: {names[field]} = {value!r} ({name}); {wanted}")
    num_turning = int(fields["head_dim"] * fraction)
    if num_turning % 2 or not num_turning:
        raise ValueError(
            f"config.json: {rope.fraction_name} = {fraction} of head_dim = {fields['head_dim']} "
            "(hidden_size / num_attention_heads where it isn't said) are not an even number of dims"
        )
    try:
        parsed = parse_scaling(scaling, num_turning)
    except ValueError:
        supported = f"factors for {num_turning // 2} pairs of dims"
        raise _unsupported(family, name, dict(written), supported) from None
    length = fields["context_length"]
    if isinstance(parsed, Yarn | Dynamic):
        # These say what they reach, where max_position_embeddings is often the length before.
        reach = min(parsed.factor * parsed.context, 2**24)
        length = max(length, int(reach))
    return dict(
        rope_theta=float(theta),
        rope_fraction=float(fraction),
        rope_scaling=scaling,
        context_length=length,
    )


def _read_scaling(
    family: Family,
    name: str,
    rope_type: str,
    parameters: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[str | float, ...]:
    """Config.rope_scaling.

    Args:
      name: of the key that the parameters stand at.
      parameters: without those that every type has.
    """
    if isinstance(rope_type, str):
        rope_type = family.rope.type_names.get(rope_type, rope_type)
    if not isinstance(rope_type, str) or rope_type not in _SCALINGS:
        supported = f"rope_type of {list(_SCALINGS)}"
        raise _unsupported(family, name, dict(parameters, rope_type=rope_type), supported)

    required, optional = _SCALINGS[rope_type]
    values = dict(parameters)
    if "original_max_position_embeddings" in optional:
        # The length before scaling: on its own it comes first.
        length = values.get("original_max_position_embeddings", config["max_position_embeddings"])
        length = config.get("original_max_position_embeddings", family.rope.length or length)
        values["original_max_position_embeddings"] = length

    # All that are needed, and no others.
    is_known = set(required) <= set(values) <= {*required, *optional}
    if not is_known or not all(_is_scaling_value(*item) for item in values.items()):
        supported = f"a {rope_type} with {list(required)}"
        if optional:
            supported += f" and perhaps {list(optional)}"
        raise _unsupported(family, name, dict(values, rope_type=rope_type), supported)
    return _SCALING_READERS[rope_type](values, config["max_position_embeddings"])


# rope_type -> (the parameters that it must have, those that it may have). Not all use the length
# before scaling, which files have with any.
_SCALINGS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ("original_max_position_embeddings",)),
    "linear": (("factor",), ("original_max_position_embeddings",)),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("original_max_position_embeddings", "factor", "attention_factor"),
    ),
}
# Those that may be null, as if they were missing.
_MAY_BE_NULL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _is_scaling_value(name: str, value) -> bool:
    """Whether a parameter of a scaling may have this value."""
    if value is None:
        return name in _MAY_BE_NULL
    if name == "truncate":
        return isinstance(value, bool)
    if name in ("short_factor", "long_factor"):
        return isinstance(value, list) and all(map(_is_positive_number, value))
    return _is_positive_number(value)


def _read_default(values: Mapping[str, Any], length: int) -> tuple:
    return ()


def _read_linear(values: Mapping[str, Any], length: int) -> tuple:
    # A factor of 1 changes nothing.
    return ("linear", float(values["factor"])) if values["factor"] != 1 else ()


def _read_dynamic(values: Mapping[str, Any], length: int) -> tuple:
    return "dynamic", float(values["factor"]), float(length)


def _read_llama3(values: Mapping[str, Any], length: int) -> tuple:
    return tuple(float(values[name]) for name in _LLAMA3_SCALING)


def _read_yarn(values: Mapping[str, Any], length: int) -> tuple:
    factor = values["factor"]
    attention_factor = values.get("attention_factor")
    if attention_factor is None:
        scales = values.get("mscale"), values.get("mscale_all_dim")
        attention_factor = _yarn_attention_factor(factor, 1.0)
        if all(scales):
            attention_factor = _yarn_attention_factor(factor, scales[0])
            attention_factor /= _yarn_attention_factor(factor, scales[1])
    return (
        "yarn",
        float(factor),
        float(values["original_max_position_embeddings"]),
        float(attention_factor),
        float(values.get("beta_fast") or 32),
        float(values.get("beta_slow") or 1),
        float(values.get("truncate", True)),
    )


def _yarn_attention_factor(factor: float, scale: float) -> float:
    """YaRN's 1 / sqrt(t), of queries and keys each (arXiv 2309.00071, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_longrope(values: Mapping[str, Any], length: int) -> tuple:
    original = values["original_max_position_embeddings"]
    factor = values.get("factor", length / original)
    attention_factor = values.get("attention_factor")
    if attention_factor is None:
        # LongRoPE's (arXiv 2402.13753), so that the attention's entropy stays.
        stretch = math.log(factor) / math.log(original) if factor > 1 and original > 1 else 0.0
        attention_factor = math.sqrt(1 + stretch)
    factors = map(float, (*values["short_factor"], *values["long_factor"]))
    return "longrope", float(original), float(attention_factor), *factors


_SCALING_READERS = dict(
    default=_read_default,
    linear=_read_linear,
    dynamic=_read_dynamic,
    llama3=_read_llama3,
    yarn=_read_yarn,
    longrope=_read_longrope,
)


def _is_positive_number(value) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Far from what a float can't hold, which JSON may say.
    return is_number and 0 < value < 1e30


def _read_window(family: Family, config: Mapping[str, Any], num_layers: int) -> int:
    """The window of all layers; 0 for none.

    A sliding_window of null is none; where the key is missing the family's own default holds.
    """
    switch = config.get("use_sliding_window", False)
    if family.has_window_switch and not isinstance(switch, bool):
        raise _unsupported(family, "use_sliding_window", switch, [True, False])

    # Behind a switch that is off anything may stand.
    has_window = family.window is not None and (switch or not family.has_window_switch)
    window = config.get("sliding_window", family.window or None) if has_window else None
    if window is None:
        window = 0
    elif window == 0 or config_lib.wanted(_CONFIG_FIELDS["window"], window):
        raise _unsupported(family, "sliding_window", window, "null, or 1 and more")

    layer_types = config.get("layer_types")
    # Layers from max_window_layers on have the window, if use_sliding_window turns it on.
    # layer_types, which newer checkpoints have, says the same layer by layer.
    if layer_types is None and family.has_window_switch and window:
        # 28 is transformers' default for Qwen's models.
        first_windowed = config.get("max_window_layers", 28)
        if type(first_windowed) is not int:
            raise _unsupported(family, "max_window_layers", first_windowed, "a number of layers")
        if first_windowed >= num_layers:
            return 0
        if first_windowed > 0:
            raise ValueError(
                f"config.json: max_window_layers = {first_windowed} with use_sliding_window is "
                f"not supported for {family.name}; this reads windows in layers that are all alike"
            )

    if layer_types:
        kinds = ["full_attention"] * num_layers
        if family.has_window_switch and layer_types == kinds:
            return 0
        kinds = ["sliding_attention" if window else "full_attention"] * num_layers
        if layer_types != kinds:
            raise _unsupported(
                family, "layer_types", layer_types, f"{kinds}, as its other keys say"
            )
    return window


def _check_all_known(family: Family, config: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that nothing here reads, and that says something: it might change
    the logits.
    """
    known = {key.hf_name for key in family.keys} | set(family.copies)
    known |= {name for name, _, _ in family.bias_flags}
    known |= set(family.supported_values) | set(_SUPPORTED_VALUES)
    known |= set(family.ignored_keys) | _IGNORED_KEYS | {"layer_types", "quantization_config"}
    if family.rope is not None:
        known |= _ROPE_KEYS | {family.rope.theta_name, family.rope.fraction_name}
    if family.window is not None:
        known.add("sliding_window")
    if family.has_window_switch:
        known.add("use_sliding_window")

    # False, null and what is empty turn something off that most models don't have.
    unknown = []
    for name in sorted(set(config) - known):
        if config[name] is False or config[name] in (None, "", [], {}):
            continue
        unknown.append(f"{name} = {config[name]!r}")
    if unknown:
        raise ValueError(
            f"config.json: {', '.join(unknown)}: not known for {family.name}. Where that changes "
            "nothing in the model's outputs, --ignore=NAME of lm.convert and lm.generate reads the "
            "checkpoint without it"
        )


# --- our fields to config.json ---


def write_config(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model of these fields, such that `read_config` gives them back.

    Raises:
      ValueError: the family has no such model.
    """
    of_family = {key.field for key in family.keys} | set(family.constants)
    if not of_family <= fields.keys():
        raise ValueError(f"no {family.name} is a model of this type")
    has_experts = any(key.field == "num_experts" for key in family.keys)
    if has_experts and not fields["num_experts"]:
        raise ValueError(f"no {family.name} has num_experts = 0")

    config: dict[str, Any] = {"model_type": family.name, "architectures": [family.architecture]}
    config |= _write_keys(family, fields)
    for name, original in family.copies.items():
        config[name] = config[original]
    # A key that turns on biases of several parts is set if all of them have one.
    for name, _, parts in family.bias_flags:
        config[name] = set(parts) <= set(fields["bias"].split(","))
    if family.rope is not None:
        config |= _write_rope(family, fields)
    if family.window is not None:
        config |= _write_window(family, fields)

    # What the family can't say shows when its words are read again.
    _check_reads_back(family, config, fields)
    return config


def _write_keys(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The family's keys. A value that Hugging Face has no word for is left out, which
    `_check_reads_back` finds.
    """
    config = {}
    for key in family.keys:
        value = fields[key.field]
        if key.field == "table_dim":
            value = value or fields["embed_dim"]

        if not key.hf_name or key.hf_name in config:
            continue
        if key.values is None:
            config[key.hf_name] = value + key.more if key.more else value
            continue

        # Of several words for a value the first is written.
        for hf_value, our_value in key.values.items():
            if _our_value(our_value, fields) == value:
                config[key.hf_name] = hf_value
                break
    return config


def _write_rope(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's keys as transformers 4 wrote them, which both versions read."""
    config: dict[str, Any] = {family.rope.theta_name: fields["rope_theta"]}
    if family.rope.fraction is not None:
        config[family.rope.fraction_name] = fields["rope_fraction"]

    num_turning = int(fields["head_dim"] * fields["rope_fraction"])
    parsed = parse_scaling(fields["rope_scaling"], num_turning)
    if parsed is None:
        return config

    scaling: dict[str, Any] = {}
    for field, value in parsed._asdict().items():
        scaling[_SCALING_NAMES.get(field, field)] = value
    for name, kind in SCALINGS.items():
        if isinstance(parsed, kind):
            scaling["rope_type"] = name

    # A number of positions; the fields are all floats.
    if "original_max_position_embeddings" in scaling:
        length = scaling["original_max_position_embeddings"] = int(parsed.context)
        if family.rope.length is not None:
            config["original_max_position_embeddings"] = length
    if isinstance(parsed, Dynamic):
        config["max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    if isinstance(parsed, Yarn):
        scaling["truncate"] = bool(parsed.truncate)
    if isinstance(parsed, LongRope):
        factors = scaling.pop("factors")
        half = len(factors) // 2
        scaling |= dict(short_factor=list(factors[:half]), long_factor=list(factors[half:]))
    return config | {"rope_scaling": scaling}


# Field of a scaling -> its name in config.json, where that is another.
_SCALING_NAMES = dict(
    low_frequency_factor="low_freq_factor",
    high_frequency_factor="high_freq_factor",
    context="original_max_position_embeddings",
)


def _write_window(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    window = fields["window"]
    config = {"sliding_window": window or None}
    if family.has_window_switch:
        # The window is for all layers, from layer 0 on, or for none.
        config["use_sliding_window"] = bool(window)
        config["max_window_layers"] = 0 if window else fields["num_layers"]
    return config


def _check_reads_back(family: Family, config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raises ValueError unless `read_config` makes these fields of a config.json."""
    read = read_config(config)

    if family.model == config_lib.MODEL:
        # Fields that the model doesn't use may be anything.
        if family.rope is None:
            read |= {name: fields[name] for name in _NO_ROPE}
        if not fields["num_experts"] and not read["num_experts"]:
            read |= {name: fields[name] for name in _DENSE}

        # What a scaling reaches changes no logits.
        if fields["rope_scaling"]:
            read["context_length"] = fields["context_length"]
    elif family.tensors_decide and "head" not in fields["bias"].split(","):
        read["bias"] = ",".join(name for name in read["bias"].split(",") if name != "head")

    wrong = [name for name in read if _comparable(read[name]) != _comparable(fields[name])]
    if wrong:
        listed = ", ".join(f"{name} = {fields.get(name)!r}" for name in wrong)
        raise ValueError(f"no {family.name} has {listed}")


def _comparable(value):
    """The value, or a tuple for a sequence: JSON has lists for tuples. A rope_scaling of llama3 may
    leave its name out.
    """
    if not isinstance(value, (tuple, list)):
        return value
    return tuple(value[1:]) if value and value[0] == "llama3" else tuple(value)


# --- tensors ---


class ParamSlice(NamedTuple):
    """The part of one of our parameters that comes from one tensor of the files."""

    row: Tensor
    index: tuple[int, ...]  # in the parameter's stack: (), (layer,) or (layer, expert)
    hf_name: str  # with the numbers of layer and expert


def param_slices(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[ParamSlice]:
    """The slices that parameters are made of: those that are in no stack, then layer by layer.

    Args:
      shapes: path -> shape of the parameters.
    """
    slices = []
    for row in rows_of(family, shapes):
        # {i} and {e} are the leading dims of the stack.
        stack_shape = shapes[row.path][: row.hf_name.count("{")]
        for index in itertools.product(*map(range, stack_shape)):
            hf_name = row.hf_name.format(**dict(zip("ie", index)))
            slices.append(ParamSlice(row, index, hf_name))

    missing = set(shapes) - {param_slice.row.path for param_slice in slices}
    assert not missing, f"the table of {family.name} has no {sorted(missing)}"
    return sorted(slices, key=_layer_order)


def rows_of(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """The rows of a family's table that are of a model with these parameters. It has rows for all
    models of the family: with biases and without, tied and not.
    """
    is_gated = any(path.endswith("mlp/gate") for path in shapes)
    rows = []
    for row in family.tensors:
        if row.path in shapes and row.gated in (None, is_gated):
            rows.append(row)
    return rows


def _layer_order(param_slice: ParamSlice) -> tuple[bool, list]:
    """Sorts what is in no stack first, and layer 2 before layer 10: numbers in names are compared
    as such.
    """
    natural_name: list[int | str] = []
    for part in re.split(r"(\d+)", param_slice.hf_name):
        natural_name.append(int(part) if part.isdigit() else part)
    return param_slice.index != (), natural_name
