"""Sizes of published models, and small ones for CPU: data only. `get(name)` gives the fields of
`transformer.Config`, or with a key `type` those of another model's.
"""

_GPT2 = dict(
    context_length=1024,
    norm="layernorm",
    norm_eps=1e-5,
    activation="gelu_tanh",
    gated_mlp=False,
    positions="learned",
    bias="qkv,out,mlp,norm",
    tie_embeddings=True,
    init_std=0.02,
    vocab_size=50257,
)
_GPT3 = _GPT2 | dict(context_length=2048)
_LLAMA2 = dict(
    context_length=4096,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    positions="rope",
    rope_theta=10000.0,
    bias="",
    tie_embeddings=False,
    init_std=0.02,
    vocab_size=32000,
)
_LLAMA3_1B = _LLAMA2 | dict(
    context_length=8192, rope_theta=500000.0, tie_embeddings=True, vocab_size=128256
)
_LLAMA3_8B = _LLAMA3_1B | dict(tie_embeddings=False)
_SMALL = dict(
    context_length=256,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="relu_squared",
    gated_mlp=False,
    positions="rope",
    rope_theta=10000.0,
    bias="",
    tie_embeddings=True,
    init_std=0.02,
    vocab_size=2048,
)
_MIXTRAL = _LLAMA2 | dict(
    context_length=32768, rope_theta=1e6, num_experts=8, experts_per_token=2, normalize_router=True
)
_BERT = dict(
    visible="full",
    context_length=512,
    norm="layernorm",
    norm_eps=1e-12,
    residual="post_norm",
    embed_norm=True,
    token_types=2,
    activation="gelu",
    gated_mlp=False,
    positions="learned",
    bias="qkv,out,mlp,norm,head",
    head_transform=True,
    tie_embeddings=True,
    dropout=0.1,
    attention_dropout=0.1,
    init_std=0.02,
    vocab_size=30522,
)
_ROBERTA = _BERT | dict(norm_eps=1e-5, token_types=1, position_offset=2, vocab_size=50265)
_T5_1_0 = dict(
    type="lm.models.encdec",
    context_length=512,
    source_length=512,
    head_dim=64,
    norm="rmsnorm",
    norm_eps=1e-6,
    activation="relu",
    positions="relative",
    relative_buckets=32,
    relative_distance=128,
    scale_scores=False,
    head_scale=True,
    tie_embeddings=True,
    dropout=0.1,
    attention_dropout=0.1,
    vocab_size=32128,
)
_T5_1_1 = _T5_1_0 | dict(
    activation="gelu_tanh", gated_mlp=True, head_scale=False, tie_embeddings=False
)
_TRANSFORMER_2017 = dict(
    type="lm.models.encdec",
    context_length=1024,
    source_length=1024,
    norm="layernorm",
    norm_eps=1e-6,
    residual="post_norm",
    activation="relu",
    positions="sinusoids",
    embed_scale=True,
    bias="qkv,out,mlp,norm",
    tie_embeddings=True,
    vocab_size=37000,
)
_QWEN3_MOE = _LLAMA2 | dict(
    context_length=32768,
    norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
    vocab_size=151936,
    num_experts=128,
    experts_per_token=8,
    normalize_router=True,
)


def _sized(
    family,
    num_layers,
    embed_dim,
    num_heads,
    *,
    head_dim=None,
    num_kv_heads=None,
    mlp_dim=None,
    **changes,
):
    return (
        family
        | dict(
            num_layers=num_layers,
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads or num_heads,
            head_dim=head_dim or embed_dim // num_heads,
            mlp_dim=mlp_dim or 4 * embed_dim,
        )
        | changes
    )


def _encdec(family, num_layers, embed_dim, num_heads, mlp_dim, **changes):
    sizes = dict(num_layers=num_layers, encoder_layers=num_layers, embed_dim=embed_dim)
    sizes |= dict(num_heads=num_heads, mlp_dim=mlp_dim)
    return dict(head_dim=embed_dim // num_heads) | family | sizes | changes


# A table that is the head too is small for the cells that read it.
_LSTM = dict(type="lm.models.recurrent", cell="lstm", embed_scale=True)


# fmt: off
PRESETS = {
    # For CPU: squared ReLU, rotary positions, RMSNorm, no biases.
    "micro": _sized(_SMALL, 2, 64, 2),
    "mini": _sized(_SMALL, 3, 192, 2),
    "small": _sized(_SMALL, 4, 320, 4),
    # nanoGPT's CPU recipe for tiny Shakespeare (config/train_shakespeare_char.py and the README's
    # flags): GPT-2 without biases.
    "nanogpt_cpu": _sized(_GPT2, 4, 128, 4, context_length=64, bias=""),
    # Encoders: BERT (Devlin et al. 2019, section 3) and RoBERTa (Liu et al. 2019, arXiv 1907.11692,
    # table 9); and one as small as "mini".
    "bert_mini": _sized(
        _BERT, 3, 192, 2, context_length=256, vocab_size=2048, dropout=0.0, attention_dropout=0.0
    ),
    "bert_base": _sized(_BERT, 12, 768, 12),
    "bert_large": _sized(_BERT, 24, 1024, 16),
    "roberta_base": _sized(_ROBERTA, 12, 768, 12),
    # Recurrent: as many weights as "mini"; AWD-LSTM's sizes (Merity et al. 2018, arXiv 1708.02182,
    # section 5), without its weight dropping, on the words of WikiText-2.
    "lstm_mini": _LSTM | dict(vocab_size=2048, num_layers=2, embed_dim=256, hidden_dim=384),
    "awd_lstm": _LSTM | dict(
        vocab_size=33278, num_layers=3, embed_dim=400, hidden_dim=1150, dropout=0.4, head_bias=True
    ),
    # Encoder-decoders: T5 as it was published (Raffel et al. 2020, section 3.7; 3B and 11B have
    # heads of 128, and far more of them than fill the residual stream), v1.1 with gated MLPs and a
    # head of its own (of the released code; FLAN-T5 has its sizes), and the Transformer (Vaswani et
    # al. 2017, table 3).
    "t5_small": _encdec(_T5_1_0, 6, 512, 8, 2048),
    "t5_base": _encdec(_T5_1_0, 12, 768, 12, 3072),
    "t5_large": _encdec(_T5_1_0, 24, 1024, 16, 4096),
    "t5_3b": _encdec(_T5_1_0, 24, 1024, 32, 16384, head_dim=128),
    "t5_11b": _encdec(_T5_1_0, 24, 1024, 128, 65536, head_dim=128),
    "t5_v1_1_small": _encdec(_T5_1_1, 8, 512, 6, 1024),
    "t5_v1_1_base": _encdec(_T5_1_1, 12, 768, 12, 2048),
    "t5_v1_1_large": _encdec(_T5_1_1, 24, 1024, 16, 2816),
    "t5_v1_1_xl": _encdec(_T5_1_1, 24, 2048, 32, 5120),
    "t5_v1_1_xxl": _encdec(_T5_1_1, 24, 4096, 64, 10240),
    "t5_mini": _encdec(
        _T5_1_1, 3, 192, 3, 384, vocab_size=2048, context_length=256, source_length=256,
        dropout=0.0, attention_dropout=0.0,
    ),
    "transformer_base": _encdec(_TRANSFORMER_2017, 6, 512, 8, 2048, dropout=0.1),
    "transformer_big": _encdec(_TRANSFORMER_2017, 6, 1024, 16, 4096, dropout=0.3),
    # GPT-2 (Radford et al. 2019, table 2).
    "gpt2": _sized(_GPT2, 12, 768, 12),
    "gpt2_medium": _sized(_GPT2, 24, 1024, 16),
    "gpt2_large": _sized(_GPT2, 36, 1280, 20),
    "gpt2_xl": _sized(_GPT2, 48, 1600, 25),
    # GPT-3 (Brown et al. 2020, table 2.1). All layers are dense here; the paper's alternate dense
    # and locally banded sparse attention. The table's 13B has embed_dim 5140, which 40 heads of 128
    # don't fill: the projections are 5140 x 5120.
    "gpt3_small": _sized(_GPT3, 12, 768, 12),
    "gpt3_medium": _sized(_GPT3, 24, 1024, 16),
    "gpt3_large": _sized(_GPT3, 24, 1536, 16, head_dim=96),
    "gpt3_xl": _sized(_GPT3, 24, 2048, 24, head_dim=128),
    "gpt3_2.7b": _sized(_GPT3, 32, 2560, 32, head_dim=80),
    "gpt3_6.7b": _sized(_GPT3, 32, 4096, 32, head_dim=128),
    "gpt3_13b": _sized(_GPT3, 40, 5140, 40, head_dim=128),
    "gpt3_175b": _sized(_GPT3, 96, 12288, 96, head_dim=128),
    # Llama 2 (Touvron et al. 2023, arXiv 2307.09288, and the released params.json).
    "llama2_7b": _sized(_LLAMA2, 32, 4096, 32, mlp_dim=11008),
    "llama2_13b": _sized(_LLAMA2, 40, 5120, 40, mlp_dim=13824),
    "llama2_70b": _sized(_LLAMA2, 80, 8192, 64, num_kv_heads=8, mlp_dim=28672),
    # Llama 3.2 1B's sizes; its scaled rotary frequencies, which matter beyond 8,192 tokens, are
    # left out.
    "llama3_1b": _sized(_LLAMA3_1B, 16, 2048, 32, num_kv_heads=8, mlp_dim=8192),
    # Llama 3.1 8B's, with the same left out.
    "llama3_8b": _sized(_LLAMA3_8B, 32, 4096, 32, num_kv_heads=8, mlp_dim=14336),
    # Mixtures of experts, no token dropped; mlp_dim is an expert's. Jiang et al. 2024, arXiv
    # 2401.04088, table 1; Qwen3-30B-A3B-Base's config.json.
    "mixtral_8x7b": _sized(_MIXTRAL, 32, 4096, 32, num_kv_heads=8, mlp_dim=14336),
    "qwen3_30b_a3b": _sized(_QWEN3_MOE, 48, 2048, 32, head_dim=128, num_kv_heads=4, mlp_dim=768),
}
# fmt: on


def get(name: str) -> dict:
    """The model fields of a preset. Raises ValueError, listing the names, for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; valid: {sorted(PRESETS)}")
    return dict(PRESETS[name])
