"""Small random models of transformers, one or more for each family, over its switches."""

import torch
import transformers as t

SIZES = dict(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=96,
    max_position_embeddings=128,
)
GROUPED = SIZES | dict(num_key_value_heads=2)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
GPT = dict(n_layer=2, n_embd=32, n_head=4, vocab_size=96, n_positions=128)
OPT = dict(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_dim=48,
    vocab_size=96,
    max_position_embeddings=128,
    word_embed_proj_dim=32,
)

CONFIGS = {
    "gpt2": lambda: t.GPT2Config(**GPT),
    "gpt2-inner": lambda: t.GPT2Config(
        **GPT, n_inner=40, activation_function="relu", tie_word_embeddings=False
    ),
    "openai-gpt": lambda: t.OpenAIGPTConfig(**GPT),
    "opt": lambda: t.OPTConfig(**OPT),
    "opt-350m": lambda: t.OPTConfig(
        **OPT | dict(word_embed_proj_dim=16), do_layer_norm_before=False
    ),
    "opt-unbiased": lambda: t.OPTConfig(**OPT, enable_bias=False, activation_function="gelu"),
    "gpt_neox": lambda: t.GPTNeoXConfig(**SIZES),
    "gpt_neox-serial": lambda: t.GPTNeoXConfig(
        **SIZES,
        use_parallel_residual=False,
        attention_bias=False,
        hidden_act="gelu_fast",
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5),
    ),
    "stablelm": lambda: t.StableLmConfig(**GROUPED),
    "stablelm-2": lambda: t.StableLmConfig(**GROUPED, use_qkv_bias=True),
    "llama-multi": lambda: t.LlamaConfig(**SIZES),
    "llama-2": lambda: t.LlamaConfig(**GROUPED, rms_norm_eps=1e-3),
    "llama-single": lambda: t.LlamaConfig(
        **SIZES, num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "llama-3.2": lambda: t.LlamaConfig(**GROUPED, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "mistral": lambda: t.MistralConfig(**GROUPED, sliding_window=7),
    "mistral-whole": lambda: t.MistralConfig(**GROUPED, sliding_window=None, head_dim=16),
    "qwen2": lambda: t.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen2-window": lambda: t.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=7, max_window_layers=0
    ),
    "qwen3": lambda: t.Qwen3Config(**GROUPED, head_dim=16),
    "qwen3-biased": lambda: t.Qwen3Config(**GROUPED, head_dim=16, attention_bias=True),
    "arcee": lambda: t.ArceeConfig(**GROUPED),
    "glm": lambda: t.GlmConfig(**GROUPED, head_dim=16, pad_token_id=0),
    "glm-unbiased": lambda: t.GlmConfig(
        **GROUPED, head_dim=8, pad_token_id=0, attention_bias=False
    ),
}

MOE = GROUPED | dict(num_experts_per_tok=2)
CONFIGS |= {
    "mixtral": lambda: t.MixtralConfig(**MOE, num_local_experts=4),
    "mixtral-window": lambda: t.MixtralConfig(
        **MOE, num_local_experts=8, sliding_window=7, tie_word_embeddings=True
    ),
    "qwen2_moe": lambda: t.Qwen2MoeConfig(
        **MOE, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40
    ),
    "qwen2_moe-normalized": lambda: t.Qwen2MoeConfig(
        **GROUPED,
        num_experts=5,
        num_experts_per_tok=5,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        norm_topk_prob=True,
        qkv_bias=False,
    ),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(
        **MOE, num_experts=6, moe_intermediate_size=24, head_dim=16
    ),
    "qwen3_moe-normalized": lambda: t.Qwen3MoeConfig(
        **GROUPED,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        head_dim=16,
        norm_topk_prob=True,
    ),
}


def make(name: str, seed: int = 0):
    """The model in f32, its weights large enough for every part to matter, biases and norms drawn
    too.
    """
    model = (
        t.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
        .eval()
        .float()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            norm = p.ndim == 1 and key.endswith("weight")
            p.copy_(
                torch.randn(p.shape, generator=generator) * (0.15 if p.ndim == 1 else 0.25) + norm
            )
    model.tie_weights()
    return model
