"""Models that score a text, and adapters, on disk: what their references do, and what is in the
files.
"""

import json
import math
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from tests.parity import references

LENGTHS = [20, 13, 1]
TEXT = np.random.default_rng(0).integers(3, 96, (3, 20))
VALID = np.arange(20) < np.array(LENGTHS)[:, None]


# --- scores ---


def their_scores(model, tokens, mask):
    with torch.no_grad():
        output = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long())
    return output.logits[:, 0].numpy()


@pytest.mark.parametrize("name", references.SCORERS)
def test_score_is_of_the_last_token(name, tmp_path):
    """However a batch is padded. There is no bias."""
    reference = references.save_scorer(name, tmp_path)

    alone = [
        their_scores(reference, row[None, :length], np.ones((1, length)))[0]
        for row, length in zip(TEXT, LENGTHS)
    ]
    with torch.no_grad():
        hidden = reference.model(torch.tensor(TEXT)).last_hidden_state.numpy()
    last_hidden = hidden[np.arange(3), np.array(LENGTHS) - 1]
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors["score.weight"]

    assert weight.shape == (1, 32) and "score.bias" not in tensors
    assert "lm_head.weight" not in tensors
    assert np.ptp(alone) > 0.1
    np.testing.assert_allclose((last_hidden @ weight.T)[:, 0], alone, atol=1e-4)
    batch_scores = their_scores(reference, TEXT * VALID, VALID)
    np.testing.assert_allclose(batch_scores, alone, atol=1e-4)


@pytest.mark.parametrize("name", references.SCORERS)
def test_scorer_in_files(name, tmp_path):
    reference = references.save_scorer(name, tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    config = json.loads((tmp_path / "config.json").read_text())

    assert config["architectures"] == [references.SCORERS[name].__name__]
    # The number of labels is in that of their names alone.
    assert config["id2label"] == {"0": "LABEL_0"} and "num_labels" not in config
    np.testing.assert_allclose(
        their_scores(loaded.eval(), TEXT * VALID, VALID),
        their_scores(reference, TEXT * VALID, VALID),
        atol=1e-4,
    )


# --- adapters ---

ADAPTERS = [
    (name, rank, use_rslora)
    for name in references.LORA_TARGETS
    for rank in (4, 64)
    for use_rslora in (False, True)
]


def merged_tensors(directory):
    """The tensors of `directory/base` with those of `directory/adapter` added to them."""
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    adapter = load_file(directory / "adapter" / "adapter_model.safetensors")
    tensors = load_file(directory / "base" / "model.safetensors")
    root = math.sqrt if config["use_rslora"] else float
    scale = config["lora_alpha"] / root(config["r"])

    for key, a in adapter.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key)
        if match:
            delta = scale * adapter[key.replace("lora_A", "lora_B")] @ a
            is_transposed = config["fan_in_fan_out"]
            tensors[f"{match[1]}.weight"] += delta.T if is_transposed else delta
    return tensors


@pytest.mark.parametrize("name, rank, use_rslora", ADAPTERS)
def test_adapter_in_files(name, rank, use_rslora, tmp_path):
    """A matrix [out, in], or [in, out] if fan_in_fan_out says so, grows by B [out, r] A [r, in]
    times alpha / r, or alpha / sqrt(r) by rslora.
    """
    tokens = torch.tensor(TEXT)
    adapted, merged, base = references.save_adapter(
        name, tmp_path, tokens, r=rank, use_rslora=use_rslora
    )
    tensors = {key: torch.tensor(value) for key, value in merged_tensors(tmp_path).items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict(tensors, strict=name == "llama-2")  # GPT-2's are tied
    with torch.no_grad():
        ours = model(tokens).logits

    assert (adapted - base).abs().max() > 0.5
    torch.testing.assert_close(merged, adapted, rtol=0, atol=2e-4)
    torch.testing.assert_close(ours, adapted, rtol=0, atol=2e-4)
