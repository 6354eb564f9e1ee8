"""Adapters from peft's format and to it, and reward models as transformers' classifiers."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from etils import epath
from flax import nnx
from safetensors.numpy import load_file, save_file

from lm import build, checkpoint, convert, weights
from lm import config as config_lib
from lm.data.tokenizer import ByteTokenizer
from tests.parity import references

VOCAB_SIZE = 96
TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, (3, 20))
POSITIONS = np.tile(np.arange(20), (3, 1))


class FewBytes(ByteTokenizer):
    """Bytes of so few ids that the reference models have them all."""

    vocab_size = VOCAB_SIZE

    def __init__(self, reserve=""):
        super().__init__(reserve)
        self.vocab_size = VOCAB_SIZE


@pytest.fixture
def few_bytes(monkeypatch):
    monkeypatch.setattr(convert.tokenizers, "load", lambda path: FewBytes())
    monkeypatch.setattr(checkpoint.tokenizers, "load", lambda path: FewBytes())


def logits_of(model, params):
    model = nnx.merge(model.graphdef, params)
    hidden = model(jnp.asarray(TOKENS), POSITIONS, np.ones_like(TOKENS)).hidden
    return np.asarray(model.logits(hidden))


def abstract_model(run, **changes):
    with checkpoint.open_run(run) as saved:
        config = convert._config_with_model(saved.meta, str(run), "")
    config.model.update(changes)
    return build.abstract_model(config, jax.devices()[:1], VOCAB_SIZE)


def logits_with_adapter(run, base):
    """Those of a run of adapters: by its whole model."""
    with checkpoint.open_run(run) as saved:
        config = convert._config_with_model(saved.meta, str(run), "")
        devices = jax.devices()[:1]
        merged = weights.load_merged(saved, config, devices, VOCAB_SIZE, str(base), run)
    return logits_of(*merged)


CASES = [
    ("llama-2", dict(r=4)),
    ("llama-2", dict(r=64, use_rslora=True)),
    ("gpt2", dict(r=4, use_rslora=True)),
    ("gpt2", dict(r=64)),
    ("llama-2", dict(r=8, rank_pattern={"q_proj": 2}, alpha_pattern={"self_attn.v_proj": 3})),
    ("llama-2", dict(r=4, target_modules=["o_proj", "down_proj"])),
]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("name, lora", CASES)
def test_adapters_come_and_go(name, lora, tmp_path, few_bytes):
    """Peft's is read, and computes the same beside the weights and merged into them; ours is
    written, and peft takes all of it.
    """
    adapted, _, base = references.save_adapter(name, tmp_path, torch.tensor(TOKENS), **lora)
    run = epath.Path(tmp_path / "run")
    convert.import_adapter(tmp_path / "adapter", tmp_path / "base", run, jax.devices()[:1])
    ours = logits_with_adapter(run, tmp_path / "base")
    assert np.abs(adapted - base).max() > 0.5
    np.testing.assert_allclose(ours, adapted.numpy(), atol=1e-4)

    # Merged by the command, the run is whole.
    merged = epath.Path(tmp_path / "merged")
    convert.merge(run, str(tmp_path / "base"), merged, jax.devices()[:1])
    with checkpoint.open_run(merged) as saved:
        model = abstract_model(merged)
        params = saved.restore_params(model.params, averaged=True)
    np.testing.assert_allclose(logits_of(model, params), ours, atol=1e-5)

    convert.export_adapter(run, str(tmp_path / "base"), tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
    )
    with warnings.catch_warnings():
        # Keys that are missing are a warning.
        warnings.simplefilter("error", UserWarning)
        again = peft.PeftModel.from_pretrained(again, tmp_path / "back").eval()
    with torch.no_grad():
        theirs = again(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(theirs, adapted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name, lora, message",
    [
        ("llama-2", dict(use_dora=True), "use_dora = True isn't read"),
        ("llama-2", dict(bias="lora_only"), "bias = 'lora_only'"),
        (
            "llama-2",
            dict(modules_to_save=["lm_head"]),
            "modules_to_save = .*'lm_head'.* isn't read",
        ),
        ("llama-2", dict(target_modules=["lm_head"]), "has base_model.model.lm_head|adapts"),
        ("llama-2", dict(layers_to_transform=[0]), "in 1 of 2 layers; wanted all|layers_to_transf"),
        ("llama-2", dict(alpha_pattern={".*v_proj": 3}), "only ends of names are read"),
    ],
)
def test_adapters_that_do_more_are_refused(name, lora, message, tmp_path, few_bytes):
    references.save_adapter(name, tmp_path, torch.tensor(TOKENS), **dict(r=4) | lora)
    run = epath.Path(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        convert.import_adapter(tmp_path / "adapter", tmp_path / "base", run, jax.devices()[:1])
    assert not run.exists()


def test_the_adapter_of_another_base_is_refused(tmp_path, few_bytes):
    tokens = torch.tensor(TOKENS)
    references.save_adapter("llama-2", tmp_path, tokens, r=4)
    references.make("gpt2").save_pretrained(tmp_path / "gpt2")
    run = epath.Path(tmp_path / "run")
    with pytest.raises(ValueError, match="which is no matrix of the layers of a gpt2"):
        convert.import_adapter(tmp_path / "adapter", tmp_path / "gpt2", run, jax.devices()[:1])

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    wider = {name: np.pad(a, [(0, 0), (0, "lora_A" in name)]) for name, a in tensors.items()}
    save_file(wider, file)
    with pytest.raises(ValueError, match="has A .*; wanted .*: it is another base's"):
        convert.import_adapter(tmp_path / "adapter", tmp_path / "base", run, jax.devices()[:1])
    save_file(tensors, file)

    # The same sizes, and other weights: the fingerprint tells.
    convert.import_adapter(tmp_path / "adapter", tmp_path / "base", run, jax.devices()[:1])
    references.make("llama-2", seed=5).save_pretrained(tmp_path / "twin")
    with pytest.raises(ValueError, match="was trained on frozen parameters with the fingerprint"):
        logits_with_adapter(run, tmp_path / "twin")


# --- reward models ---


@pytest.mark.parametrize("name", ["llama-2", "qwen2", "gpt2", "gpt_neox"])
def test_a_reward_model_scores_the_same_in_transformers(name, tmp_path, few_bytes):
    """The last token of each text, padded or not."""
    references.make(name).save_pretrained(tmp_path / "base")
    run = epath.Path(tmp_path / "run")
    convert.import_checkpoint(tmp_path / "base", epath.Path(tmp_path / "plain"), jax.devices()[:1])
    with checkpoint.open_run(epath.Path(tmp_path / "plain")) as saved:
        config = convert._config_with_model(saved.meta, "plain", "")
        plain = build.abstract_model(config, jax.devices()[:1], VOCAB_SIZE)
        params = saved.restore_params(plain.params, averaged=True)

    config.model.heads = "scalar"
    model = build.abstract_model(config, jax.devices()[:1], VOCAB_SIZE)
    head = jax.random.normal(jax.random.key(0), model.params["heads"]["scalar"]["weight"].shape)
    params["heads"] = {"scalar": {"weight": head}}
    convert._write_run(run, config, FewBytes("pad"), params, {})
    convert.export_checkpoint(run, tmp_path / "out", jax.devices()[:1], family=plain_family(name))

    scorer = nnx.merge(model.graphdef, params)
    hidden = scorer(jnp.asarray(TOKENS), POSITIONS, np.ones_like(TOKENS)).hidden
    scores = np.asarray(scorer.head_outputs("scalar", hidden))[..., 0]

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    theirs.config.pad_token_id = 0
    lengths = np.array([20, 13, 7])
    padded = np.where(np.arange(20) < lengths[:, None], TOKENS, 0)
    mask = torch.tensor(padded > 0).long()
    with torch.no_grad():
        logits = theirs(torch.tensor(padded), attention_mask=mask).logits[:, 0].numpy()
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(logits, scores[np.arange(3), lengths - 1], atol=1e-4)


def plain_family(name):
    return name.replace("-2", "")


def test_no_reward_model_without_its_head(tmp_path, few_bytes):
    """Started as another run, or read: a head that isn't there is no zeros."""
    references.make("llama-2").save_pretrained(tmp_path / "base")
    config = config_lib.default()
    config.init_from = str(tmp_path / "base")
    config.tokenizer.kind = "bytes"
    config.model.heads = "scalar"
    config.model.param_dtype = "float32"
    config.data.update(dict(length=16, batch_size=2, streams=1))
    config = build.apply_hf_config(config)
    config.tokenizer.path = ""
    config.model.vocab_size = 300
    config.optimizer.warmup_steps = 0
    with pytest.raises(ValueError, match="config.init_new = 'heads/\\*'"):
        experiment = build.Experiment(
            build.program(config, jax.devices()[:1], 258, 1), ByteTokenizer(), None, None, 1
        )
        weights.load_weights(experiment, epath.Path(tmp_path / "base"), averaged=False)
