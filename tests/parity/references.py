"""Small random models of transformers, one or more for each family, over its switches."""

import peft
import pytest
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
MOE = GROUPED | dict(num_experts_per_tok=2)
PAD = dict(pad_token_id=0)

LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN_ROPE = dict(
    rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32
)
LONG_ROPE = dict(
    rope_type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 4.0]
)
HALF_ROPE = dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5)

# name -> (class of the configuration, its arguments). Windows are shorter than the texts.
CONFIGS = {
    "gpt2": (t.GPT2Config, GPT),
    "gpt2-inner": (
        t.GPT2Config,
        GPT | dict(n_inner=40, activation_function="relu", tie_word_embeddings=False),
    ),
    "openai-gpt": (t.OpenAIGPTConfig, GPT),
    "opt": (t.OPTConfig, OPT),
    "opt-350m": (t.OPTConfig, OPT | dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "opt-unbiased": (t.OPTConfig, OPT | dict(enable_bias=False, activation_function="gelu")),
    "gpt_neox": (t.GPTNeoXConfig, SIZES),
    "gpt_neox-serial": (
        t.GPTNeoXConfig,
        SIZES
        | dict(
            use_parallel_residual=False,
            attention_bias=False,
            hidden_act="gelu_fast",
            rope_parameters=HALF_ROPE,
        ),
    ),
    "stablelm": (t.StableLmConfig, GROUPED),
    "stablelm-2": (t.StableLmConfig, GROUPED | dict(use_qkv_bias=True)),
    "llama-multi": (t.LlamaConfig, SIZES),
    "llama-2": (t.LlamaConfig, GROUPED | dict(rms_norm_eps=1e-3)),
    "llama-single": (
        t.LlamaConfig,
        SIZES | dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=12),
    ),
    "llama-3.2": (
        t.LlamaConfig,
        GROUPED | dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    ),
    "llama-yarn": (t.LlamaConfig, GROUPED | dict(rope_parameters=YARN_ROPE)),
    "phi3": (
        t.Phi3Config,
        GROUPED | dict(rope_parameters=LONG_ROPE, original_max_position_embeddings=100, **PAD),
    ),
    "phi3-window": (t.Phi3Config, GROUPED | dict(sliding_window=7, **PAD)),
    "starcoder2": (t.Starcoder2Config, GROUPED),
    "starcoder2-unbiased": (t.Starcoder2Config, GROUPED | dict(use_bias=False, sliding_window=7)),
    "ernie4_5": (t.Ernie4_5Config, GROUPED | dict(head_dim=16)),
    "ernie4_5-biased": (t.Ernie4_5Config, GROUPED | dict(use_bias=True, head_dim=8)),
    "helium": (t.HeliumConfig, GROUPED | dict(head_dim=8)),
    "seed_oss": (t.SeedOssConfig, GROUPED | dict(head_dim=16, attention_out_bias=True)),
    "jais2": (t.Jais2Config, GROUPED),
    "internlm3": (t.InternLM3Config, GROUPED | dict(head_dim=16)),
    "iquestcoder": (t.IQuestCoderConfig, GROUPED | dict(head_dim=16)),
    "gpt_bigcode": (t.GPTBigCodeConfig, GPT),
    "gpt_bigcode-multi": (t.GPTBigCodeConfig, GPT | dict(multi_query=False)),
    "mistral": (t.MistralConfig, GROUPED | dict(sliding_window=7)),
    "mistral-whole": (t.MistralConfig, GROUPED | dict(sliding_window=None, head_dim=16)),
    "qwen2": (t.Qwen2Config, GROUPED | dict(tie_word_embeddings=True)),
    "qwen2-window": (
        t.Qwen2Config,
        GROUPED | dict(use_sliding_window=True, sliding_window=7, max_window_layers=0),
    ),
    "qwen3": (t.Qwen3Config, GROUPED | dict(head_dim=16)),
    "qwen3-biased": (t.Qwen3Config, GROUPED | dict(head_dim=16, attention_bias=True)),
    "arcee": (t.ArceeConfig, GROUPED),
    "glm": (t.GlmConfig, GROUPED | dict(head_dim=16, pad_token_id=0)),
    "glm-unbiased": (
        t.GlmConfig,
        GROUPED | dict(head_dim=8, pad_token_id=0, attention_bias=False),
    ),
    "mixtral": (t.MixtralConfig, MOE | dict(num_local_experts=4)),
    "mixtral-window": (
        t.MixtralConfig,
        MOE | dict(num_local_experts=8, sliding_window=7, tie_word_embeddings=True),
    ),
    "qwen2_moe": (
        t.Qwen2MoeConfig,
        MOE | dict(num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    ),
    "qwen2_moe-normalized": (
        t.Qwen2MoeConfig,
        GROUPED
        | dict(
            num_experts=5,
            num_experts_per_tok=5,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            norm_topk_prob=True,
            qkv_bias=False,
        ),
    ),
    "qwen3_moe": (
        t.Qwen3MoeConfig,
        MOE | dict(num_experts=6, moe_intermediate_size=24, head_dim=16),
    ),
    "qwen3_moe-normalized": (
        t.Qwen3MoeConfig,
        GROUPED
        | dict(
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            head_dim=16,
            norm_topk_prob=True,
        ),
    ),
}


# Those whose parts others have too.
SLOW = """
    phi3-window starcoder2 starcoder2-unbiased ernie4_5 ernie4_5-biased helium seed_oss jais2
    internlm3 iquestcoder gpt_bigcode gpt_bigcode-multi llama-yarn
""".split()
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CONFIGS]


def randomize(model, seed: int = 0):
    """Draws parameters large enough for every part to matter, biases and norms too, in f32."""
    model = model.eval().float()

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, param in model.named_parameters():
            std = 0.15 if param.ndim == 1 else 0.25
            # The scales of norms lie around 1, everything else around 0.
            mean = param.ndim == 1 and key.endswith("weight")
            param.copy_(torch.randn(param.shape, generator=generator) * std + mean)

    model.tie_weights()
    return model


def make(name: str, seed: int = 0):
    config_class, arguments = CONFIGS[name]
    model = t.AutoModelForCausalLM.from_config(
        config_class(**arguments), attn_implementation="eager"
    )
    return randomize(model, seed)


# --- models that score a text ---

SCORERS = {
    "llama-2": t.LlamaForSequenceClassification,
    "qwen2": t.Qwen2ForSequenceClassification,
}


def save_scorer(name: str, directory, seed: int = 0):
    """Returns a model with one score for a text, that of its last token which is not padding (0),
    and writes it to the directory.
    """
    config_class, arguments = CONFIGS[name]
    config = config_class(**arguments, num_labels=1, pad_token_id=0)
    config._attn_implementation = "eager"
    model = randomize(SCORERS[name](config), seed)
    model.save_pretrained(directory)
    return model


# --- adapters ---

LORA_TARGETS = {
    "llama-2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
    "gpt2": "c_attn c_proj c_fc".split(),
}


def save_adapter(name: str, directory, tokens, seed: int = 0, **lora):
    """Writes `directory/base` and `directory/adapter`, a LoRA of peft of all matrices of the blocks
    with the given fields. Returns the logits of the tokens by the adapted model, by the one that
    it is merged into, and by the base.
    """
    make(name, seed).save_pretrained(directory / "base")
    base = t.AutoModelForCausalLM.from_pretrained(
        directory / "base", dtype=torch.float32, attn_implementation="eager"
    )
    fields = dict(
        lora_alpha=8,
        target_modules=LORA_TARGETS[name],
        fan_in_fan_out=name == "gpt2",  # its matrices are [in, out]
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(base, peft.LoraConfig(**fields | lora)).eval()

    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, param in adapted.named_parameters():
            if "lora_" in key:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
        adapted.save_pretrained(directory / "adapter")

        with adapted.disable_adapter():
            base_logits = adapted(tokens).logits
        adapted_logits = adapted(tokens).logits
        merged_logits = adapted.merge_and_unload()(tokens).logits
    return adapted_logits, merged_logits, base_logits
