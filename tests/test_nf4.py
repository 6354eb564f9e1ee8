"""Weights in 4 bits: what the codes stand for, models of them, and runs on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from lm import convert, sharding, trained
from lm.models.transformer import Config, Transformer
from lm.nn import lora, nf4
from tests.helpers import assert_trees_close, read_checkpoint, read_metrics, run_training
from tests.test_tuning import answered, conversations, write

# Dettmers et al. 2023, arXiv 2305.14314, appendix E.
TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
FIELDS = dict(
    vocab_size=50,
    context_length=16,
    num_layers=2,
    embed_dim=32,
    mlp_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    gated_mlp=True,
    param_dtype="float32",
    compute_dtype="float32",
    lora_rank=4,
)
TOKENS = np.arange(32).reshape(2, 16) % 50
POSITIONS = np.tile(np.arange(16), (2, 1))


def split(config):
    graphdef, state = nnx.split(Transformer(config, jax.random.key(0)), nnx.Param)
    return graphdef, nnx.to_pure_dict(state), sharding.logical_axes(state)


def hidden(graphdef, params):
    model = nnx.merge(graphdef, params)
    return model(jnp.asarray(TOKENS), POSITIONS, np.ones_like(TOKENS)).hidden


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((6, 128), ("embed", "mlp")),
        ((128, 6), ("mlp", "embed")),
        ((6, 4, 32), ("embed", "heads", "head_dim")),
        ((4, 32, 6), ("heads", "head_dim", "embed")),
    ],
)
def test_codes_are_those_of_the_table(shape, axes):
    weight = jax.random.normal(jax.random.key(1), shape)
    codes, scales = nf4.quantize(weight, axes)

    embed = axes.index("embed")
    blocks = np.moveaxis(np.asarray(weight), embed, 0).reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    wanted = np.abs(blocks[..., None] / largest[..., None] - TABLE).argmin(axis=-1)
    unpacked = np.stack([np.asarray(codes) // 16, np.asarray(codes) % 16], axis=-1)
    np.testing.assert_array_equal(unpacked.reshape(-1, 64), wanted)
    np.testing.assert_allclose(np.asarray(scales).reshape(-1), largest[:, 0], rtol=1e-6)

    restored = np.asarray(nf4.dequantize(codes, scales, shape, axes))
    values = np.moveaxis(restored, embed, 0).reshape(-1, 64)
    np.testing.assert_allclose(values, TABLE[wanted] * largest, rtol=1e-5, atol=1e-7)
    assert (codes.nbytes + scales.nbytes) / weight.size == 0.5625


def test_a_model_is_that_of_what_its_codes_stand_for():
    """Also its adapters' gradient; nothing else has one."""
    graphdef, plain, axes = split(Config(**FIELDS))
    nf4_graphdef, quantized, _ = split(Config(**FIELDS, quantize="nf4"))
    assert_trees_close(nf4.packed(plain, quantized, axes), quantized, rtol=0, atol=0)
    restored = nf4.unpacked(quantized, plain, axes)

    def squares(graphdef, frozen):
        def loss(adapters):
            return jnp.sum(jnp.square(hidden(graphdef, trained.merge(adapters, frozen))))

        return jax.jit(jax.value_and_grad(loss))

    adapters, frozen = trained.split(quantized, lora.is_adapter)
    keys = iter(jax.random.split(jax.random.key(2), 99))
    adapters = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), adapters)
    _, frozen_restored = trained.split(restored, lora.is_adapter)
    got = squares(nf4_graphdef, frozen)(adapters)
    wanted = squares(graphdef, frozen_restored)(adapters)
    # Their matmuls round otherwise, which depends on the CPU.
    assert_trees_close(got, wanted, rtol=1e-3, atol=1e-3)

    # 4 bits are near, and not the same.
    difference = np.abs(hidden(nf4_graphdef, quantized) - hidden(graphdef, plain)).mean()
    assert 1e-4 < difference / np.abs(hidden(graphdef, plain)).mean() < 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lora_rank=0), "config.model.quantize = 'nf4' is for weights that stay as they are"),
        (dict(mlp_dim=96), "has blocks of 64 weights, .* has 96 beside its embed dim"),
    ],
)
def test_what_cannot_be_quantized(changes, message):
    with pytest.raises(ValueError, match=message):
        split(Config(**FIELDS | changes, quantize="nf4"))


# --- runs ---


def array_of(checkpoint, path):
    dtype, shape, stored = checkpoint[path]
    return np.frombuffer(stored, jnp.dtype(dtype)).reshape(shape).astype(np.float32)


def table_values(weight, embed):
    """What NF4 makes of a matrix, by the paper's table, in blocks along the other dim."""
    blocks = np.moveaxis(weight, embed, 0).reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    codes = np.abs((blocks / largest)[..., None] - TABLE).argmin(axis=-1)
    moved = np.moveaxis(weight, embed, 0).shape
    return np.moveaxis((TABLE[codes] * largest).reshape(moved), 0, embed)


@pytest.mark.slow
def test_runs_on_a_base_in_4_bits(small, fast_runs, tmp_path):
    """Their losses are within 3% of those on the whole base. 31: merging adds the adapters to what
    the codes stand for, not to the base's own weights.
    """
    small.model.update(dict(mlp_dim=128, head_dim=32))
    small.optimizer.learning_rate = 1e-2
    small.train.length = "60 steps"
    run_training(small, tmp_path / "base")

    conversations(small, write(tmp_path / "answers.jsonl", answered(64)))
    small.init_from = str(tmp_path / "base")
    small.model.lora_rank = 4
    run_training(small, tmp_path / "plain")
    small.model.quantize = "nf4"
    run_training(small, tmp_path / "nf4")

    losses = {}
    for name in ("plain", "nf4"):
        lines = read_metrics(tmp_path / name)
        losses[name] = np.array([line["train/loss"] for line in lines if "train/loss" in line])
        assert losses[name][-10:].mean() < 0.8 * losses[name][0]
    assert (losses["plain"] != losses["nf4"]).all()
    np.testing.assert_allclose(losses["nf4"], losses["plain"], rtol=0.03)

    run, target = epath.Path(tmp_path / "nf4"), epath.Path(tmp_path / "merged")
    convert.merge(run, small.init_from, target, jax.devices()[:1])
    base, _ = read_checkpoint(tmp_path / "base", 60)
    adapters, _ = read_checkpoint(tmp_path / "nf4", 60)
    merged, _ = read_checkpoint(tmp_path / "merged", 0)

    path = "params/layers/mlp/up"
    weight = array_of(base, path)[0]
    a, b = array_of(adapters, f"{path}_lora_a")[0], array_of(adapters, f"{path}_lora_b")[0]
    delta = small.model.lora_alpha / 4 * a @ b
    # The values and the sum are rounded to bf16.
    wanted = table_values(weight, 0) + delta
    np.testing.assert_allclose(array_of(merged, path)[0], wanted, rtol=2**-7, atol=1e-3)
    assert np.abs(wanted - weight - delta).max() > 0.01
