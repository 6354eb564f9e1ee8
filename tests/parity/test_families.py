"""Every family against transformers, in f32, on models drawn at random."""

import json

import jax
import numpy as np
import pytest
import safetensors
import torch
import transformers
from flax import nnx
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lm import config as config_lib
from lm import sharding
from lm.decoding.generator import Generator
from lm.decoding.sampling import Sampling, row_keys
from lm.hf import directory as hf
from lm.models.transformer import Config
from lm.objectives import causal
from tests import helpers
from tests.parity import references

TOKEN_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
# Ids below 3 are special tokens.
TEXT = np.random.default_rng(0).integers(3, 96, (3, 40)).astype(np.int32)
LENGTHS = np.array([40, 23, 1])  # of the rows of TEXT; what is behind them is padding
VALID = np.arange(40) < LENGTHS[:, None]


def abstract_model(fields, **execution_fields):
    """(graphdef, abstract parameters) of a Transformer on a mesh of one device."""
    fields = config_lib.default().model.to_dict() | fields
    fields |= dict(param_dtype="float32", compute_dtype="float32") | execution_fields
    del fields["type"]
    config = Config(**fields)

    graphdef, abstract_params = helpers.abstract_model(config)
    axes = sharding.logical_axes(abstract_params)
    abstract_params = nnx.to_pure_dict(abstract_params)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    layouts = sharding.shardings(abstract_params, axes, mesh)
    return graphdef, with_layouts(abstract_params, layouts)


def with_layouts(params, layouts):
    """ShapeDtypeStructs of parameters with these shardings."""
    return jax.tree.map(
        lambda p, layout: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=layout), params, layouts
    )


def load(directory):
    """(source, graphdef, parameters) of a checkpoint directory, by lm."""
    source = hf.Checkpoint(directory)
    graphdef, abstract_params = abstract_model(source.fields)
    return source, graphdef, source.load(abstract_params)


def load_in_transformers(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def make_batch():
    segments = VALID.astype(np.int32)
    positions = np.where(VALID, np.arange(40), 0).astype(np.int32)
    return dict(
        tokens=TEXT * segments,
        targets=np.roll(TEXT, -1, axis=1),
        weights=segments.astype(np.float32),
        positions=positions,
        segments=segments,
    )


def our_logits(graphdef, params):
    batch = make_batch()

    @jax.jit
    def call(params):
        model = nnx.merge(graphdef, params)
        output = model(batch["tokens"], batch["positions"], batch["segments"])
        return model.logits(output.hidden)

    return np.asarray(call(params))[VALID]


def their_logits(reference):
    batch = make_batch()
    tokens = torch.tensor(batch["tokens"]).long()
    attention_mask = torch.tensor(batch["segments"]).long()
    with torch.no_grad():
        return reference(tokens, attention_mask=attention_mask).logits.numpy()[VALID]


# --- logits and text ---


@pytest.mark.parametrize("name", references.NAMES)
def test_logits_are_the_same(name, tmp_path):
    reference = references.make(name)
    reference.save_pretrained(tmp_path)
    _, graphdef, params = load(tmp_path)

    ours = our_logits(graphdef, params)
    theirs = their_logits(reference)

    # Logits that are all about 0 would agree whatever the model is.
    assert np.abs(theirs).max() > 1
    difference = np.abs(ours - theirs).max()
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-4


PROMPTS = [TEXT[0].tolist(), TEXT[1, :9].tolist(), TEXT[2, :1].tolist()]
MAX_NEW_TOKENS = 32


@pytest.mark.parametrize("name", references.NAMES)
def test_greedy_text_is_the_same(name, tmp_path):
    """The continuations of a batch of unequal prompts, each as transformers has it alone, up to a
    step where its two best logits are all but the same.
    """
    reference = references.make(name)
    reference.save_pretrained(tmp_path)
    _, graphdef, params = load(tmp_path)
    generator = Generator(
        nnx.merge(graphdef, params).config,
        graphdef,
        params,
        sharding.make_mesh({}, jax.devices()[:1]),
        Sampling(temperature=0.0),
        stop_ids=[-1],
        vocab_size=96,
    )

    continuations = generator.generate(PROMPTS, MAX_NEW_TOKENS, keys_B=row_keys([0, 0, 0]))

    for prompt, ours in zip(PROMPTS, continuations):
        theirs, step_logits = their_greedy_text(reference, prompt)
        assert len(ours) == len(theirs)
        different = [step for step in range(len(ours)) if ours[step] != theirs[step]]
        if different:
            best, second = step_logits[different[0]].topk(2).values
            print(
                f"{name}: ends at step {different[0]} of {MAX_NEW_TOKENS}, where the two best "
                f"logits are {best - second:.1e} apart"
            )
            assert best - second < 1e-4


def their_greedy_text(reference, prompt):
    """(ids of a prompt's continuation, logits [V] of each step)."""
    ids = torch.tensor([prompt])
    output = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MAX_NEW_TOKENS,
        min_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    step_logits = [logits[0] for logits in output.logits]
    return output.sequences[0, len(prompt) :].tolist(), step_logits


# --- gradients ---


BALANCE_LOSS = 0.3


@pytest.mark.parametrize(
    "name", ["gpt_neox", "qwen3", "opt-350m", "mixtral", "qwen2_moe", "qwen3_moe-normalized"]
)
def test_gradients_are_the_same(name, tmp_path):
    """Those of the mean loss over the targets, for every tensor of the files. With experts the loss
    includes the balance of their routers.
    """
    reference = references.make(name)
    reference.save_pretrained(tmp_path)
    source, graphdef, params = load(tmp_path)
    has_experts = bool(source.fields["num_experts"])
    batch = make_batch()
    # Nothing follows the last token of a row.
    batch["weights"] = (np.arange(40) < LENGTHS[:, None] - 1).astype(np.float32)

    def our_loss(params):
        loss_fn = causal.make_loss(
            z_loss=0.0, chunk=0, balance_loss=BALANCE_LOSS if has_experts else 0.0
        )
        total, count, terms = loss_fn(nnx.merge(graphdef, params), batch, None)
        return total / count, terms

    our_grads, terms = jax.jit(jax.grad(our_loss, has_aux=True))(params)
    their_grads, their_balance = gradients_in_transformers(reference, batch, source.fields)

    if has_experts:
        total, count = terms["router_balance"]
        assert total / count == pytest.approx(their_balance, rel=1e-5)

    their_grads = as_in_files(name, their_grads)
    makers = hf.hf_tensors(source.family, our_grads, source.fields["num_kv_heads"])
    assert set(makers) <= set(their_grads)
    # The absolute part is for gradients that are 0 but for rounding, such as those of keys' biases.
    for key, make in makers.items():
        difference = np.linalg.norm(make() - their_grads[key])
        assert difference < 1e-3 * np.linalg.norm(their_grads[key]) + 1e-7, key


def gradients_in_transformers(reference, batch, fields):
    """({name: gradient}, the routers' balance loss, None without experts)."""
    has_experts = bool(fields["num_experts"])
    mask = torch.tensor(batch["segments"]).long()
    output = reference(
        torch.tensor(batch["tokens"]).long(),
        attention_mask=mask,
        **(dict(output_router_logits=True) if has_experts else {}),
    )

    # -100 is transformers' and torch's target that doesn't count.
    targets = np.where(batch["weights"] > 0, batch["targets"], -100)
    loss = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), torch.tensor(targets).long().flatten()
    )

    balance = None
    if has_experts:
        # Ours is the mean over the layers; theirs would take all layers at once.
        layers = []
        for router_logits in output.router_logits:
            layers.append(
                load_balancing_loss_func(
                    (router_logits,), fields["num_experts"], fields["experts_per_token"], mask
                )
            )
        balance = torch.stack(layers).mean()
        loss = loss + BALANCE_LOSS * balance

    loss.backward()
    gradients = {}
    for key, param in reference.named_parameters():
        if param.grad is not None:
            gradients[key] = param.grad.numpy()
    return gradients, None if balance is None else balance.item()


def as_in_files(name, gradients):
    """Gradients by the names, and in the parts, that a family's files have."""
    if name == "gpt_neox":
        renamed = {}
        for key, gradient in gradients.items():
            renamed["embed_out.weight" if key == "lm_head.weight" else key] = gradient
        return renamed

    if name == "mixtral":
        renamed = {}
        for key, gradient in gradients.items():
            renamed[key.replace(".mlp.", ".block_sparse_moe.")] = gradient
        return split_experts(renamed, gate="w1", up="w3", down="w2")

    return split_experts(gradients, gate="gate_proj", up="up_proj", down="down_proj")


def split_experts(gradients, *, gate, up, down):
    """transformers has the experts of a layer in one parameter, and files have them apart."""
    split = {}
    for key, gradient in gradients.items():
        if key.endswith("experts.gate_up_proj"):
            prefix = key.removesuffix("gate_up_proj")
            for number, expert in enumerate(gradient):
                gate_gradient, up_gradient = np.split(expert, 2)
                split[f"{prefix}{number}.{gate}.weight"] = gate_gradient
                split[f"{prefix}{number}.{up}.weight"] = up_gradient
        elif key.endswith("experts.down_proj"):
            prefix = key.removesuffix("down_proj")
            for number, expert in enumerate(gradient):
                split[f"{prefix}{number}.{down}.weight"] = expert
        else:
            split[key] = gradient
    return split


# --- files ---


def read_files(directory):
    """{(file, name): tensor} of a directory, by the safetensors library."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            for key in file.keys():
                tensors[path.name, key] = file.get_tensor(key)
    return tensors


def assert_same_files(actual, expected):
    """Checks names, dtypes, shapes and bytes of tensors, in which files they are, and the index."""
    actual_tensors, expected_tensors = read_files(actual), read_files(expected)
    assert actual_tensors.keys() == expected_tensors.keys()
    for key, tensor in expected_tensors.items():
        assert actual_tensors[key].dtype == tensor.dtype, key
        assert torch.equal(actual_tensors[key], tensor), key
    assert read_weight_map(actual) == read_weight_map(expected)


def read_weight_map(directory):
    return json.loads((directory / hf.INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("name", references.NAMES)
def test_import_and_export(name, tmp_path):
    check_import_and_export(name, torch.float32, tmp_path)


# Of each way to lay tensors out one: transposed, fused, plain with tied tables, and experts.
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama-3.2", "mixtral", "qwen2_moe"])
def test_import_and_export_of_bfloat16(name, tmp_path):
    check_import_and_export(name, torch.bfloat16, tmp_path)


def check_import_and_export(name, dtype, tmp_path):
    """Together they are the identity on files, in several shards too; and export alone is a
    checkpoint that transformers loads.
    """
    references.make(name).to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    source = hf.Checkpoint(tmp_path / "theirs")
    assert source.dtype() == str(dtype).removeprefix("torch.")
    _, abstract_params = abstract_model(source.fields, param_dtype=source.dtype())
    params = source.load(abstract_params)

    # What was imported goes back as it was.
    hf.save_as(tmp_path / "back", source.record(), source.fields, params)
    assert_same_files(tmp_path / "back", tmp_path / "theirs")

    # The same model as if it were one of ours: nothing is known of where it came from.
    hf.save(
        tmp_path / "new",
        source.family,
        source.fields,
        params,
        token_ids=TOKEN_IDS,
        shard_bytes=20_000,
    )
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    _, graphdef, params = load(tmp_path / "new")
    exported = their_logits(load_in_transformers(tmp_path / "new"))
    assert np.abs(our_logits(graphdef, params) - exported).max() < 1e-4
    # Not to the bit: gelu_fast comes back as gelu_new.
    original = their_logits(load_in_transformers(tmp_path / "theirs"))
    np.testing.assert_allclose(original, exported, atol=1e-5)


@pytest.mark.parametrize(
    "name, mesh_sizes",
    [("llama-3.2", dict(data=2, fsdp=2, tensor=2)), ("mixtral", dict(expert=2, fsdp=2, data=2))],
)
def test_parameters_on_a_mesh_are_those_on_one_device(name, mesh_sizes, tmp_path):
    """On eight devices, split and replicated."""
    references.make(name).save_pretrained(tmp_path)
    source, graphdef, params = load(tmp_path)
    assert np.isfinite(our_logits(graphdef, params)).all()

    mesh = sharding.make_mesh(mesh_sizes, jax.devices())
    model = nnx.eval_shape(lambda: nnx.merge(graphdef, params))
    axes = sharding.logical_axes(nnx.split(model, nnx.Param)[1])
    on_mesh = source.load(with_layouts(params, sharding.shardings(params, axes, mesh)))

    jax.tree.map(np.testing.assert_array_equal, on_mesh, params)
    assert 4 in map(num_different_parts, jax.tree.leaves(on_mesh))
    # Devices shared a buffer on the host: none may write into another's.
    double = jax.jit(lambda params: jax.tree.map(lambda p: p * 2, params), donate_argnums=0)
    jax.tree.map(
        lambda doubled, p: np.testing.assert_array_equal(doubled, 2 * p),
        double(on_mesh),
        jax.device_get(params),
    )


def num_different_parts(param):
    indices = param.sharding.devices_indices_map(param.shape)
    return len({str(index) for index in indices.values()})
