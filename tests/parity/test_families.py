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

from lm import checkpoint, sharding
from lm import config as config_lib
from lm.decoding.generator import Generator
from lm.decoding.sampling import Sampling, row_keys
from lm.models.transformer import Config, Transformer
from lm.objectives import causal
from tests.parity import references

TEXT = np.random.default_rng(0).integers(3, 96, (3, 40)).astype(np.int32)
TOKEN_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
LENGTHS = (40, 23, 1)  # padded on the right


def model_of(fields, **execution):
    """(graphdef, abstract parameters) on a mesh of one device."""
    default = config_lib.default().model.to_dict()
    del default["type"]
    config = Config(
        **default | fields | dict(param_dtype="float32", compute_dtype="float32") | execution
    )
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))), nnx.Param
    )
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    axes, abstract = sharding.logical_axes(abstract), nnx.to_pure_dict(abstract)
    layouts = sharding.shardings(abstract, axes, mesh)
    return graphdef, jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), abstract, layouts
    )


def loaded(directory, **execution):
    source = checkpoint.Source(directory)
    graphdef, abstract = model_of(source.fields, **execution)
    return source, graphdef, source.load(abstract)


def batch():
    segments = (np.arange(40) < np.array(LENGTHS)[:, None]).astype(np.int32)
    positions = np.where(segments > 0, np.arange(40), 0).astype(np.int32)
    return dict(
        tokens=TEXT * segments,
        targets=np.roll(TEXT, -1, 1),
        weights=segments.astype(np.float32),
        positions=positions,
        segments=segments,
    )


def logits(graphdef, params):
    b = batch()

    @jax.jit
    def call(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(b["tokens"], b["positions"], b["segments"]).hidden)

    return np.asarray(call(params))


def their_logits(reference):
    b = batch()
    with torch.no_grad():
        return reference(
            torch.tensor(b["tokens"]).long(), attention_mask=torch.tensor(b["segments"]).long()
        ).logits.numpy()


@pytest.mark.parametrize("name", references.CONFIGS)
def test_logits_are_theirs(name, tmp_path):
    reference = references.make(name)
    reference.save_pretrained(tmp_path)
    _, graphdef, params = loaded(tmp_path)
    ours, theirs, real = logits(graphdef, params), their_logits(reference), batch()["segments"] > 0
    assert np.abs(theirs[real]).max() > 1
    difference = np.abs(ours - theirs)[real].max()
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-4


PROMPTS = [TEXT[0, :21].tolist(), TEXT[1, :9].tolist(), TEXT[2, :1].tolist()]


@pytest.mark.parametrize("name", references.CONFIGS)
def test_greedy_text_is_theirs(name, tmp_path):
    """64 tokens of a batch of unequal prompts, each as transformers has it alone; up to a step
    where its two best logits are all but the same.
    """
    reference = references.make(name)
    reference.save_pretrained(tmp_path)
    _, graphdef, params = loaded(tmp_path)
    config = nnx.merge(graphdef, params).config
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    made = Generator(
        config,
        graphdef,
        params,
        mesh,
        Sampling(temperature=0.0),
        stop_ids=[-1],
        vocab_size=96,
    )
    for prompt, ours in zip(PROMPTS, made.generate(PROMPTS, 64, keys_B=row_keys([0, 0, 0]))):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        theirs = out.sequences[0, len(prompt) :].tolist()
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                best = out.logits[step][0].topk(2).values
                print(
                    f"{name}: ends at step {step} of 64, where the two best logits are "
                    f"{best[0] - best[1]:.1e} apart"
                )
                assert best[0] - best[1] < 1e-4
                break


def expert_by_expert(gradients, names):
    """transformers holds the experts of a layer in one parameter, and files have them apart."""
    found = {}
    for key, g in gradients.items():
        if key.endswith("experts.gate_up_proj"):
            for e, expert in enumerate(g):
                start = f"{key.removesuffix('gate_up_proj')}{e}."
                found[f"{start}{names['gate']}.weight"], found[f"{start}{names['up']}.weight"] = (
                    np.split(expert, 2)
                )
        elif key.endswith("experts.down_proj"):
            found |= {
                f"{key.removesuffix('down_proj')}{e}.{names['down']}.weight": expert
                for e, expert in enumerate(g)
            }
        else:
            found[key] = g
    return found


BALANCE = 0.3


@pytest.mark.parametrize(
    "name", ["gpt_neox", "qwen3", "opt-350m", "mixtral", "qwen2_moe", "qwen3_moe-normalized"]
)
def test_gradients_are_theirs(name, tmp_path):
    """Of the mean loss over the targets, for every tensor of theirs; with experts, of their
    routers' balance too, which is taken layer by layer here, not over all layers at once.
    """
    reference = references.make(name)
    reference.save_pretrained(tmp_path)
    source, graphdef, params = loaded(tmp_path)
    b = batch()
    b["weights"][:, -1] = 0  # nothing follows the last token
    weights = np.array(b["weights"])
    for row, length in enumerate(LENGTHS):
        weights[row, length - 1 :] = 0
    b["weights"] = weights

    def loss(params):
        balance_loss = BALANCE if source.fields["num_experts"] else 0.0
        total, count, terms = causal.make_loss(z_loss=0.0, chunk=0, balance_loss=balance_loss)(
            nnx.merge(graphdef, params), b, None
        )
        return total / count, terms

    ours, terms = jax.jit(jax.grad(loss, has_aux=True))(params)
    labels = torch.tensor(np.where(weights > 0, b["targets"], -100)).long()
    mask, more = (
        torch.tensor(b["segments"]).long(),
        dict(output_router_logits=True) if source.fields["num_experts"] else {},
    )
    out = reference(torch.tensor(b["tokens"]).long(), attention_mask=mask, **more)
    total = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    if more:
        experts = source.fields["num_experts"], source.fields["experts_per_token"]
        balance = torch.stack(
            [load_balancing_loss_func((layer,), *experts, mask) for layer in out.router_logits]
        ).mean()
        assert terms["router_balance"][0] / terms["router_balance"][1] == pytest.approx(
            balance.item(), rel=1e-5
        )
        total = total + BALANCE * balance
    total.backward()
    # as it is in the file
    theirs = {
        {"lm_head.weight": "embed_out.weight"}.get(key, key)
        if name == "gpt_neox"
        else key: p.grad.numpy()
        for key, p in reference.named_parameters()
        if p.grad is not None
    }
    if name == "mixtral":
        theirs = expert_by_expert(
            {key.replace(".mlp.", ".block_sparse_moe."): g for key, g in theirs.items()},
            dict(gate="w1", up="w3", down="w2"),
        )
    else:
        theirs = expert_by_expert(theirs, {part: f"{part}_proj" for part in ("gate", "up", "down")})
    made = checkpoint.their_tensors(source.family, ours, source.fields["num_heads"])
    assert set(made) <= set(theirs)
    for key, make in made.items():
        assert np.linalg.norm(make() - theirs[key]) < 1e-3 * np.linalg.norm(theirs[key]) + 1e-7, key


def same_files(one, other):
    """The tensors of two directories: names, dtypes, shapes, bytes and files."""

    def tensors(directory):
        found = {}
        for path in directory.glob("*.safetensors"):
            with safetensors.safe_open(path, "pt") as file:
                found |= {(path.name, key): file.get_tensor(key) for key in file.keys()}
        return found

    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("name", references.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_there_and_back(name, dtype, tmp_path):
    """Import and export is the identity on files, in several shards too; and export alone is a
    checkpoint that transformers loads.
    """
    reference = references.make(name).to(dtype)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    source = checkpoint.Source(tmp_path / "theirs")
    assert source.dtype() == str(dtype).removeprefix("torch.")
    _, abstract = model_of(source.fields, param_dtype=source.dtype())
    params = source.load(abstract)
    checkpoint.save_as(tmp_path / "back", source.record(), source.fields, params)
    same_files(tmp_path / "theirs", tmp_path / "back")
    index = checkpoint.INDEX
    assert (
        json.loads((tmp_path / "back" / index).read_text())["weight_map"]
        == json.loads((tmp_path / "theirs" / index).read_text())["weight_map"]
    )

    checkpoint.save(
        tmp_path / "new",
        source.family,
        source.fields,
        params,
        token_ids=TOKEN_IDS,
        shard_bytes=20_000,
    )
    read = lambda path: transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = read(tmp_path / "new")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    _, graphdef, params = loaded(tmp_path / "new")
    real = batch()["segments"] > 0
    assert np.abs(logits(graphdef, params) - their_logits(found))[real].max() < 1e-4
    # gelu_fast comes back as gelu_new
    np.testing.assert_allclose(
        their_logits(read(tmp_path / "theirs"))[real], their_logits(found)[real], atol=1e-5
    )


@pytest.mark.parametrize(
    "name, sizes",
    [("llama-3.2", dict(data=2, fsdp=2, tensor=2)), ("mixtral", dict(expert=2, fsdp=2, data=2))],
)
def test_a_mesh_gets_its_parts(name, sizes, tmp_path):
    """Loaded on eight devices, split and replicated, as on one."""
    references.make(name).save_pretrained(tmp_path)
    source, graphdef, params = loaded(tmp_path)
    wanted = logits(graphdef, params)
    mesh = sharding.make_mesh(sizes, jax.devices())
    abstract = nnx.split(nnx.eval_shape(lambda: nnx.merge(graphdef, params)), nnx.Param)[1]
    layouts = sharding.shardings(params, sharding.logical_axes(abstract), mesh)
    split = source.load(
        jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, layouts
        )
    )
    jax.tree.map(np.testing.assert_array_equal, split, params)
    assert any(
        len(set(map(str, p.sharding.devices_indices_map(p.shape).values()))) == 4
        for p in jax.tree.leaves(split)
    )
    # devices that shared a buffer on the way
    doubled = jax.jit(lambda params: jax.tree.map(lambda p: p * 2, params), donate_argnums=0)(split)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, 2 * b), doubled, jax.device_get(params)
    )
    assert np.isfinite(wanted).all()
