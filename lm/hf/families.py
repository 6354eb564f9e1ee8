"""The model families of Hugging Face checkpoints: one table each, read both ways.

A table says what each attribute of config.json is in `lm.models.transformer.Config`, and where each
tensor lies in our parameters. Their spellings appear in this folder only.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

REQUIRED = object()


class Key(NamedTuple):
    """An attribute that is one of our fields."""

    ours: str
    theirs: str
    # what its absence (or null) means; a function is given our fields read so far
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None  # theirs -> ours, where they differ


class Tensor(NamedTuple):
    """A tensor of theirs that holds one of our parameters, or a part of it that does."""

    ours: str  # path; a stack of layers has one tensor for each, one of experts too
    theirs: str  # name, with {i} for the layer, {e} for the expert
    layout: str  # vector | table (as ours) | linear ([out, in]) | conv1d ([in, out])
    inputs: int = 1  # our leading dims that are `in`
    part: tuple[int, int] = (0, 1)  # which of how many equal parts of `out`
    per_head: bool = False  # the parts alternate from head to head


@dataclasses.dataclass(frozen=True)
class Family:
    name: str  # model_type
    architecture: str
    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    constants: Mapping[str, Any]  # our fields that are the same in all its models
    bias: tuple[str, ...] = ()  # parts that always have one
    # (attribute, its default, the parts whose bias it turns on)
    flags: tuple[tuple[str, bool, tuple[str, ...]], ...] = ()
    # attribute -> values that we know
    only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # attributes that don't change logits
    theta: float = 10000.0  # rope_theta where config.json doesn't say
    # the fraction of a head that turns where config.json doesn't say; None: learned positions
    rope: float | None = None
    # sliding_window where config.json doesn't say; None: it has no such attribute
    window: int | None = None
    switched: bool = False  # the window is off unless use_sliding_window turns it on
    # other names of attributes
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""  # of all names of the body, which some checkpoints leave out
    buffers: str = r"$."  # names that are no parameters


# Attributes of any family that say nothing about the logits of a text.
_IGNORED = frozenset(
    """
    _name_or_path _commit_hash _attn_implementation architectures model_type transformers_version torch_dtype dtype auto_map use_cache
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    initializer_range init_std attention_dropout hidden_dropout dropout resid_pdrop embd_pdrop attn_pdrop layerdrop classifier_dropout
    activation_dropout attention_probs_dropout_prob hidden_dropout_prob
    output_attentions output_hidden_states output_router_logits return_dict return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss
    pruned_heads chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    finetuning_task id2label label2id num_labels tokenizer_class prefix problem_type task_specific_params
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj pretraining_tp
    max_window_layers unsloth_version unsloth_fixed gradient_checkpointing predict_special_tokens n_special
""".split()  # noqa: E501
)
_ROPE = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "partial_rotary_factor",
    "rotary_pct",
)
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "swish": "silu",
}


def _head_dim(fields):
    return fields["embed_dim"] // fields["num_heads"]


def _sizes(layers, width, heads, length, **more):
    return (
        Key("vocab_size", "vocab_size"),
        Key("num_layers", layers),
        Key("embed_dim", width),
        Key("num_heads", heads),
        Key("context_length", length),
        *(Key(ours, theirs) for ours, theirs in more.items()),
    )


_LLAMA_KEYS = (
    *_sizes(
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
        mlp_dim="intermediate_size",
    ),
    Key("num_kv_heads", "num_key_value_heads", lambda fields: fields["num_heads"]),
    Key("head_dim", "head_dim", _head_dim),
    Key("norm_eps", "rms_norm_eps", 1e-6),
    Key("activation", "hidden_act", "silu", ACTIVATIONS),
    Key("tie_embeddings", "tie_word_embeddings", False),
)
# Without experts these fields don't matter.
_DENSE = dict(num_experts=0, experts_per_token=2, normalize_router=True, shared_mlp_dim=0)
_LLAMA = (
    dict(
        norm="rmsnorm",
        gated_mlp=True,
        positions="rope",
        residual="pre_norm",
        qk_norm=False,
        rope_interleaved=False,
        table_dim=0,
        position_offset=0,
    )
    | _DENSE
)


def _renamed(keys, *new: Key):
    """The keys with some replaced, by our field."""
    names = {key.ours for key in new}
    return (*(key for key in keys if key.ours not in names), *new)


def _in_layers(start: str, *rows: tuple) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(f"layers/{ours}", f"{start}.{{i}}.{theirs}", *rest) for ours, theirs, *rest in rows
    )


def _linear(ours: str, theirs: str, inputs: int = 1, bias: str = "") -> tuple[tuple, ...]:
    """A dense layer's weight and its bias."""
    return (ours, f"{theirs}.weight", "linear", inputs), (
        bias or f"{ours}_bias",
        f"{theirs}.bias",
        "vector",
    )


def _norm(ours: str, theirs: str) -> tuple[tuple, ...]:
    return (f"{ours}/scale", f"{theirs}.weight", "vector"), (
        f"{ours}/bias",
        f"{theirs}.bias",
        "vector",
    )


_QKVO = (
    *_linear("attention/query", "self_attn.q_proj"),
    *_linear("attention/key", "self_attn.k_proj"),
    *_linear("attention/value", "self_attn.v_proj"),
)
_LLAMA_TENSORS = (
    Tensor("embed/table", "model.embed_tokens.weight", "table"),
    Tensor("head/table", "lm_head.weight", "table"),
    *(Tensor(*row) for row in _norm("norm", "model.norm")),
    *_in_layers(
        "model.layers",
        *_QKVO,
        *_linear("attention/out", "self_attn.o_proj", 2),
        *_norm("attention_norm", "input_layernorm"),
        *_norm("mlp_norm", "post_attention_layernorm"),
        ("attention/query_norm/scale", "self_attn.q_norm.weight", "vector"),
        ("attention/key_norm/scale", "self_attn.k_norm.weight", "vector"),
        *_linear("mlp/gate", "mlp.gate_proj"),
        *_linear("mlp/up", "mlp.up_proj"),
        *_linear("mlp/down", "mlp.down_proj"),
    ),
)


def _experts(
    block: str, up: str = "up_proj", gate: str = "gate_proj", down: str = "down_proj"
) -> tuple[Tensor, ...]:
    """Llama's tensors with a router and experts in the MLP's place."""
    names = dict(up=up, gate=gate, down=down)
    return (
        *(t for t in _LLAMA_TENSORS if not t.ours.startswith("layers/mlp/")),
        *_in_layers(
            "model.layers",
            ("mlp/router", f"{block}.gate.weight", "linear"),
            *(
                (f"mlp/{ours}", f"{block}.experts.{{e}}.{theirs}.weight", "linear")
                for ours, theirs in names.items()
            ),
        ),
    )


_MOE = {name: value for name, value in _LLAMA.items() if name not in _DENSE}
# Layers that have no experts, and windows, are refused.
_QWEN_ONLY = dict(decoder_sparse_step=(1,), mlp_only_layers=([],), use_sliding_window=(False,))
_QWEN_IGNORED = ("router_aux_loss_coef", "intermediate_size")
_FREQUENCIES = r"\.rotary_emb\.inv_freq$"


def _gpt(keys, tensors, **more) -> dict:
    """What GPT-1 and GPT-2 share."""
    names = [f"transformer.{name}" for name in tensors]
    fused = lambda name, i: (f"attention/{name}", "attn.c_attn.weight", "conv1d", 1, (i, 3))
    fused_bias = lambda name, i: (f"attention/{name}_bias", "attn.c_attn.bias", "vector", 1, (i, 3))
    conv = lambda ours, theirs, inputs=1: (
        (ours, f"{theirs}.weight", "conv1d", inputs),
        (f"{ours}_bias", f"{theirs}.bias", "vector"),
    )
    body = _in_layers(
        "transformer.h",
        *(
            f(name, i)
            for i, name in enumerate(("query", "key", "value"))
            for f in (fused, fused_bias)
        ),
        *conv("attention/out", "attn.c_proj", 2),
        *conv("mlp/up", "mlp.c_fc"),
        *conv("mlp/down", "mlp.c_proj"),
        *_norm("attention_norm", "ln_1"),
        *_norm("mlp_norm", "ln_2"),
    )
    return dict(
        keys=(
            *_sizes("n_layer", "n_embd", "n_head", "n_positions"),
            Key("mlp_dim", "n_inner", lambda fields: 4 * fields["embed_dim"]),
            Key("num_kv_heads", "", lambda fields: fields["num_heads"]),
            Key("head_dim", "", _head_dim),
            Key("norm_eps", "layer_norm_epsilon", 1e-5),
            Key("tie_embeddings", "tie_word_embeddings", True),
            *keys,
        ),
        tensors=(
            Tensor("embed/table", names[0], "table"),
            Tensor("position_embed/table", names[1], "table"),
            Tensor("head/table", "lm_head.weight", "table"),
            *(Tensor(*row) for row in _norm("norm", "transformer.ln_f")),
            *body,
        ),
        bias=("qkv", "out", "mlp", "norm"),
        prefix="transformer.",
        buffers=r"\.attn\.(bias|masked_bias)$",
        ignored=("n_ctx", "reorder_and_upcast_attn"),
        **more,
    )


_GPT = (
    dict(
        norm="layernorm",
        gated_mlp=False,
        positions="learned",
        qk_norm=False,
        table_dim=0,
        position_offset=0,
    )
    | _DENSE
)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            **_gpt(
                (Key("activation", "activation_function", "gelu_new", ACTIVATIONS),),
                ("wte.weight", "wpe.weight"),
                constants=_GPT | dict(residual="pre_norm"),
                only=dict(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,)),
            ),
        ),
        Family(
            "openai-gpt",
            "OpenAIGPTLMHeadModel",
            **_gpt(
                (
                    Key(
                        "activation",
                        "afn",
                        "gelu",
                        {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"},
                    ),
                ),
                ("tokens_embed.weight", "positions_embed.weight"),
                constants=_GPT | dict(residual="post_norm"),
            ),
        ),
        Family(
            "opt",
            "OPTForCausalLM",
            keys=(
                *_sizes(
                    "num_hidden_layers",
                    "hidden_size",
                    "num_attention_heads",
                    "max_position_embeddings",
                    mlp_dim="ffn_dim",
                ),
                Key("num_kv_heads", "", lambda fields: fields["num_heads"]),
                Key("head_dim", "", _head_dim),
                Key("norm_eps", "", 1e-5),
                Key("activation", "activation_function", "relu", ACTIVATIONS),
                Key("tie_embeddings", "tie_word_embeddings", True),
                Key(
                    "residual",
                    "do_layer_norm_before",
                    "pre_norm",
                    {True: "pre_norm", False: "post_norm"},
                ),
                Key("table_dim", "word_embed_proj_dim", lambda fields: fields["embed_dim"]),
            ),
            constants=dict(
                norm="layernorm",
                gated_mlp=False,
                positions="learned",
                qk_norm=False,
                position_offset=2,
            )
            | _DENSE,
            bias=("norm",),
            flags=(("enable_bias", True, ("qkv", "out", "mlp")),),
            only=dict(_remove_final_layer_norm=(False,), layer_norm_elementwise_affine=(True,)),
            prefix="model.",
            tensors=(
                Tensor("embed/table", "model.decoder.embed_tokens.weight", "table"),
                Tensor("head/table", "lm_head.weight", "table"),
                Tensor("position_embed/table", "model.decoder.embed_positions.weight", "table"),
                Tensor("project_in", "model.decoder.project_in.weight", "linear"),
                Tensor("project_out", "model.decoder.project_out.weight", "linear"),
                *(Tensor(*row) for row in _norm("norm", "model.decoder.final_layer_norm")),
                *_in_layers(
                    "model.decoder.layers",
                    *_QKVO,
                    *_linear("attention/out", "self_attn.out_proj", 2),
                    *_linear("mlp/up", "fc1"),
                    *_linear("mlp/down", "fc2"),
                    *_norm("attention_norm", "self_attn_layer_norm"),
                    *_norm("mlp_norm", "final_layer_norm"),
                ),
            ),
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            keys=(
                *_sizes(
                    "num_hidden_layers",
                    "hidden_size",
                    "num_attention_heads",
                    "max_position_embeddings",
                    mlp_dim="intermediate_size",
                ),
                Key("num_kv_heads", "", lambda fields: fields["num_heads"]),
                Key("head_dim", "", _head_dim),
                Key("norm_eps", "layer_norm_eps", 1e-5),
                Key("activation", "hidden_act", "gelu", ACTIVATIONS),
                Key("tie_embeddings", "tie_word_embeddings", False),
                Key(
                    "residual",
                    "use_parallel_residual",
                    "parallel",
                    {True: "parallel", False: "pre_norm"},
                ),
            ),
            constants=dict(
                norm="layernorm",
                gated_mlp=False,
                positions="rope",
                qk_norm=False,
                rope_interleaved=False,
                table_dim=0,
                position_offset=0,
            )
            | _DENSE,
            bias=("mlp", "norm"),
            flags=(("attention_bias", True, ("qkv", "out")),),
            rope=0.25,
            prefix="gpt_neox.",
            buffers=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
            tensors=(
                Tensor("embed/table", "gpt_neox.embed_in.weight", "table"),
                Tensor("head/table", "embed_out.weight", "table"),
                *(Tensor(*row) for row in _norm("norm", "gpt_neox.final_layer_norm")),
                *_in_layers(
                    "gpt_neox.layers",
                    *(
                        (
                            f"attention/{name}",
                            "attention.query_key_value.weight",
                            "linear",
                            1,
                            (i, 3),
                            True,
                        )
                        for i, name in enumerate(("query", "key", "value"))
                    ),
                    *(
                        (
                            f"attention/{name}_bias",
                            "attention.query_key_value.bias",
                            "vector",
                            1,
                            (i, 3),
                            True,
                        )
                        for i, name in enumerate(("query", "key", "value"))
                    ),
                    *_linear("attention/out", "attention.dense", 2),
                    *_linear("mlp/up", "mlp.dense_h_to_4h"),
                    *_linear("mlp/down", "mlp.dense_4h_to_h"),
                    *_norm("attention_norm", "input_layernorm"),
                    *_norm("mlp_norm", "post_attention_layernorm"),
                ),
            ),
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            _LLAMA_KEYS,
            _LLAMA_TENSORS,
            _LLAMA,
            rope=1.0,
            buffers=_FREQUENCIES,
            flags=(("attention_bias", False, ("qkv", "out")), ("mlp_bias", False, ("mlp",))),
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _LLAMA_KEYS,
            _LLAMA_TENSORS,
            _LLAMA,
            rope=1.0,
            window=4096,
            buffers=_FREQUENCIES,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            _renamed(
                _LLAMA_KEYS,
                Key("num_experts", "num_local_experts", 8),
                Key("experts_per_token", "num_experts_per_tok", 2),
                Key("norm_eps", "rms_norm_eps", 1e-5),
            ),
            _experts("block_sparse_moe", up="w3", gate="w1", down="w2"),
            _MOE | dict(normalize_router=True, shared_mlp_dim=0),
            rope=1.0,
            theta=1e6,
            window=0,
            only=dict(router_jitter_noise=(0.0,)),
            ignored=("router_aux_loss_coef",),
            buffers=_FREQUENCIES,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _LLAMA_KEYS,
            _LLAMA_TENSORS,
            _LLAMA,
            rope=1.0,
            window=4096,
            switched=True,
            bias=("qkv",),
            buffers=_FREQUENCIES,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _renamed(_LLAMA_KEYS, Key("head_dim", "head_dim", 128)),
            _LLAMA_TENSORS,
            _LLAMA | dict(qk_norm=True),
            rope=1.0,
            window=4096,
            switched=True,
            flags=(("attention_bias", False, ("qkv", "out")),),
            buffers=_FREQUENCIES,
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            _renamed(
                _LLAMA_KEYS,
                Key("num_experts", "num_experts", 60),
                Key("experts_per_token", "num_experts_per_tok", 4),
                Key("normalize_router", "norm_topk_prob", False),
                Key("mlp_dim", "moe_intermediate_size", 1408),
                Key("shared_mlp_dim", "shared_expert_intermediate_size", 5632),
            ),
            (
                *_experts("mlp"),
                *_in_layers(
                    "model.layers",
                    *(
                        row
                        for ours in ("up", "gate", "down")
                        for row in _linear(f"mlp/shared/{ours}", f"mlp.shared_expert.{ours}_proj")
                    ),
                    ("mlp/shared_gate", "mlp.shared_expert_gate.weight", "linear"),
                ),
            ),
            _MOE,
            rope=1.0,
            window=4096,
            switched=True,
            flags=(("qkv_bias", True, ("qkv",)),),
            only=_QWEN_ONLY,
            ignored=_QWEN_IGNORED,
            buffers=_FREQUENCIES,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _renamed(
                _LLAMA_KEYS,
                Key("num_experts", "num_experts", 128),
                Key("experts_per_token", "num_experts_per_tok", 8),
                Key("normalize_router", "norm_topk_prob", False),
                Key("mlp_dim", "moe_intermediate_size", 768),
            ),
            _experts("mlp"),
            _MOE | dict(qk_norm=True, shared_mlp_dim=0),
            rope=1.0,
            window=4096,
            switched=True,
            flags=(("attention_bias", False, ("qkv", "out")),),
            only=_QWEN_ONLY,
            ignored=_QWEN_IGNORED,
            aliases={"num_local_experts": "num_experts"},
            buffers=_FREQUENCIES,
        ),
        # Llama with an MLP of two layers.
        Family(
            "arcee",
            "ArceeForCausalLM",
            _renamed(
                _LLAMA_KEYS,
                Key("activation", "hidden_act", "relu2", ACTIVATIONS),
                Key("norm_eps", "rms_norm_eps", 1e-5),
            ),
            _LLAMA_TENSORS,
            _LLAMA | dict(gated_mlp=False),
            rope=1.0,
            flags=(("attention_bias", False, ("qkv", "out")), ("mlp_bias", False, ("mlp",))),
        ),
        Family(
            "stablelm",
            "StableLmForCausalLM",
            _renamed(
                _LLAMA_KEYS, Key("norm_eps", "layer_norm_eps", 1e-5), Key("head_dim", "", _head_dim)
            ),
            _LLAMA_TENSORS,
            _LLAMA | dict(norm="layernorm"),
            rope=0.25,
            bias=("norm",),
            flags=(("use_qkv_bias", False, ("qkv",)),),
            only=dict(qk_layernorm=(False,), use_parallel_residual=(False,)),
            buffers=_FREQUENCIES,
        ),
        Family(
            "glm",
            "GlmForCausalLM",
            _renamed(
                _LLAMA_KEYS,
                Key("head_dim", "head_dim", 128),
                Key("norm_eps", "rms_norm_eps", 1.5625e-7),
            ),
            (
                *(t for t in _LLAMA_TENSORS if t.ours not in ("layers/mlp/gate", "layers/mlp/up")),
                *_in_layers(
                    "model.layers",
                    *(
                        (f"mlp/{name}", "mlp.gate_up_proj.weight", "linear", 1, (i, 2))
                        for i, name in enumerate(("gate", "up"))
                    ),
                ),
            ),
            _LLAMA | dict(rope_interleaved=True),
            rope=0.5,
            flags=(("attention_bias", True, ("qkv",)),),
            buffers=_FREQUENCIES,
        ),
    )
}


def _unsupported(family: Family, name: str, value, known) -> ValueError:
    return ValueError(
        f"config.json: {name} = {value!r} is not supported for {family.name}; this reads {known}"
    )


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises ValueError, listing the families, for a model_type that isn't one of them."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"config.json: model_type = {name!r} is none of the families that can be read: "
            f"{sorted(FAMILIES)}"
        )
    return FAMILIES[name]


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our model fields (but those of execution) of a config.json.

    Raises:
      ValueError: a missing attribute, or one whose value would change the logits in a way that the
        model doesn't have.
    """
    family = family_of(config)
    config = {family.aliases.get(name, name): value for name, value in config.items()}
    given = {name: value for name, value in config.items() if value is not None}
    fields = dict(family.constants)
    for key in family.keys:
        if key.theirs in given:
            value = given[key.theirs]
            if key.values is not None:
                if value not in key.values:
                    raise _unsupported(family, key.theirs, value, list(key.values))
                value = key.values[value]
        elif key.default is REQUIRED:
            raise ValueError(
                f"config.json: {key.theirs} is missing; a {family.name} can't do without"
            )
        else:
            value = key.default(fields) if callable(key.default) else key.default
        fields[key.ours] = value
        if key.ours == "num_experts" and value < 1:
            raise _unsupported(family, key.theirs, value, "1 and more")
    if fields.get("table_dim") == fields["embed_dim"]:
        fields["table_dim"] = 0
    biases = [*family.bias]
    for name, default, parts in family.flags:
        biases += parts if given.get(name, default) else ()
    fields["bias"] = ",".join(part for part in ("qkv", "out", "mlp", "norm") if part in biases)
    fields |= _read_rope(family, given) if family.rope is not None else dict(_NO_ROPE)
    fields["window"] = _read_window(family, config) if family.window is not None else 0
    for name, values in family.only.items():
        if given.get(name, values[0]) not in values:
            raise _unsupported(family, name, given[name], list(values))
    known = (
        {key.theirs for key in family.keys}
        | {name for name, *_ in family.flags}
        | set(family.only)
        | set(family.ignored)
        | _IGNORED
    )
    known |= set(_ROPE) if family.rope is not None else set()
    known |= {"sliding_window"} if family.window is not None else set()
    known |= {"use_sliding_window", "layer_types"} if family.switched else set()
    if unknown := sorted(set(given) - known):
        raise ValueError(
            f"config.json: {', '.join(f'{name} = {given[name]!r}' for name in unknown)}: not "
            f"known for {family.name}. Where that changes nothing in the model's outputs, take it "
            "out of config.json"
        )
    return fields


_NO_ROPE = dict(rope_theta=10000.0, rope_fraction=1.0, rope_scaling=(), rope_interleaved=False)


def _read_rope(family: Family, given) -> dict[str, Any]:
    """rope_theta, rope_fraction and rope_scaling, as transformers 5 writes them (rope_parameters)
    or as 4 did.
    """
    parameters = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    theta = parameters.pop(
        "rope_theta", given.get("rope_theta", given.get("rotary_emb_base", family.theta))
    )
    fraction = parameters.pop(
        "partial_rotary_factor",
        given.get("partial_rotary_factor", given.get("rotary_pct", family.rope)),
    )
    wanted = {
        "default": (),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in wanted or set(parameters) - {"type"} != set(wanted[kind]):
        kinds = [f"{name} with {list(parts)}" for name, parts in wanted.items()]
        raise _unsupported(
            family,
            "rope_parameters",
            given.get("rope_parameters") or given.get("rope_scaling"),
            kinds,
        )
    return dict(
        rope_theta=float(theta),
        rope_fraction=float(fraction),
        rope_scaling=tuple(float(parameters[name]) for name in wanted[kind]),
    )


def _read_window(family: Family, config: Mapping[str, Any]) -> int:
    """The window of all layers: 0 for none. A window that is null is none, one that isn't there is
    the family's own.
    """
    window = config.get("sliding_window", family.window) or 0
    if not family.switched:
        return window
    first = config.get("max_window_layers") or 0 if "max_window_layers" in config else 28
    by_switch = [
        "sliding_attention" if config.get("use_sliding_window") and i >= first else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]
    kinds = config.get("layer_types") or by_switch
    if set(kinds) == {"full_attention"}:
        return 0
    if set(kinds) != {"sliding_attention"} or not config.get("use_sliding_window"):
        raise _unsupported(
            family,
            "layer_types",
            kinds,
            "layers that are all full_attention, or all sliding_attention with use_sliding_window",
        )
    return window


def write_config(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json's attributes for a model of these fields, such that `read_config` gives them
    back.

    Raises:
      ValueError: the family has no such model.
    """
    if not fields["num_experts"] and any(key.ours == "num_experts" for key in family.keys):
        raise ValueError(f"no {family.name} has num_experts = 0")
    config: dict[str, Any] = {"model_type": family.name, "architectures": [family.architecture]}
    for key in family.keys:
        value = fields[key.ours]
        if key.ours == "table_dim":
            value = value or fields["embed_dim"]
        if key.theirs:
            back = {
                ours: theirs for theirs, ours in reversed((key.values or {value: value}).items())
            }
            config |= {key.theirs: back[value]} if value in back else {}
    for name, _, parts in family.flags:
        config[name] = set(parts) <= set(fields["bias"].split(","))
    if family.rope is not None:
        config["rotary_emb_base" if family.name == "gpt_neox" else "rope_theta"] = fields[
            "rope_theta"
        ]
        if family.rope != 1.0 or fields["rope_fraction"] != 1.0:
            config["rotary_pct" if family.name == "gpt_neox" else "partial_rotary_factor"] = fields[
                "rope_fraction"
            ]
        if fields["rope_scaling"]:
            names = (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            )
            config["rope_scaling"] = dict(zip(names, fields["rope_scaling"])) | {
                "rope_type": "llama3"
            }
            config["rope_scaling"]["original_max_position_embeddings"] = int(
                config["rope_scaling"]["original_max_position_embeddings"]
            )
    if family.window is not None:
        config["sliding_window"] = fields["window"] or None
        if family.switched:
            config |= dict(
                use_sliding_window=bool(fields["window"]),
                max_window_layers=0 if fields["window"] else fields["num_layers"],
            )
    try:
        found = read_config(config)
    except ValueError:
        found = {}
    if family.rope is None:  # these fields don't matter there
        found |= {name: fields[name] for name in _NO_ROPE}
    if found and not fields["num_experts"] and not found["num_experts"]:
        found |= {name: fields[name] for name in _DENSE}
    if wrong := [name for name in found if _plain(found[name]) != _plain(fields[name])] or (
        [] if found else ["its values"]
    ):
        raise ValueError(
            f"no {family.name} has {', '.join(f'{name} = {fields.get(name)!r}' for name in wrong)}"
        )
    return config


def _plain(value):
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else value


def fitting(fields: Mapping[str, Any]) -> Family:
    """The first family that has a model of these fields. Raises ValueError, saying what stands
    against each, if none has.
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


class Place(NamedTuple):
    """Where in our parameters a tensor of theirs has its row."""

    row: Tensor
    index: tuple[int, ...]  # in the stack: (), (layer,) or (layer, expert)
    theirs: str


def places(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """All of them, layer by layer.

    Args:
      shapes: our parameters' paths -> shapes; those under "layers/" are stacks.
    """
    found = []
    for row in family.tensors:
        if row.ours in shapes:
            stack = shapes[row.ours][: row.theirs.count("{")]
            found += [
                Place(row, index, row.theirs.format(**dict(zip("ie", index))))
                for index in itertools.product(*map(range, stack))
            ]
    missing = set(shapes) - {place.row.ours for place in found}
    assert not missing, f"the table of {family.name} has no {sorted(missing)}"
    natural: Callable = lambda name: [
        int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)
    ]
    return sorted(found, key=lambda place: (place.index != (), natural(place.theirs)))
