"""FLOPs by formula: against a count by hand, and against XLA's own."""

import functools
import operator
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import config as config_lib
from lm import flops
from lm.models import presets
from lm.models.transformer import flops_per_token
from lm.nn.masks import Mask
from lm.objectives import causal
from tests.helpers import abstract_model, model_config

LENGTH = 64
IDS = np.zeros((2, LENGTH), np.int32)


def preset_config(name):
    sizes = config_lib.default().model.to_dict() | presets.get(name)
    return types.SimpleNamespace(**sizes)


def test_flops_by_hand():
    """GPT-2: 6 per weight of a matmul (all but the look-up and the positions, norms and biases) and
    12 a layer for each key and dim.
    """
    config = preset_config("gpt2")
    num_weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 50257 * 768
    every_key = 12 * 12 * 768 * 1024
    per_token = flops_per_token(config, 1024)
    assert per_token == 6 * num_weights + every_key / 2
    per_token = flops_per_token(config, 1024, causal=False)
    assert per_token == 6 * num_weights + every_key

    per_token = flops_per_token(config, 1024, backward=False)
    assert per_token == 2 * num_weights + every_key / 6

    # A window, and a table whose rows are narrower than the model.
    config.window, config.table_dim = 256, 512
    num_weights += 50257 * (512 - 768) + 2 * 512 * 768
    # Keys of a mean query, its own half, as above: those of the first 256, and 256 of each other.
    num_keys = (sum(range(256)) + 128 + 256 * (1024 - 256)) / 1024
    per_token = flops_per_token(config, 1024)
    assert per_token == 6 * num_weights + 12 * 12 * 768 * num_keys


def test_flops_with_adapters():
    """Of a frozen weight there is no gradient; what the adapters have is counted whole."""
    config = preset_config("gpt2")
    plain = flops_per_token(config, 1024)
    forward = flops_per_token(config, 1024, backward=False)

    config.lora_rank, config.lora_targets = 8, "query"
    num_weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 50257 * 768
    num_adapters = 12 * 8 * 2 * 768
    assert flops_per_token(config, 1024) == plain - 2 * num_weights + 6 * num_adapters
    assert flops_per_token(config, 1024, backward=False) == forward + 2 * num_adapters


def test_flops_of_experts_are_those_of_one_token():
    def per_token(**changes):
        config = preset_config("llama3_1b")
        vars(config).update(changes)
        return flops_per_token(config, 1024)

    # 16 layers, each with a router of 2048 x 8.
    routers = 6 * 16 * 2048 * 8
    experts = dict(num_experts=8, experts_per_token=2, mlp_dim=512)
    assert per_token(**experts) == pytest.approx(per_token(mlp_dim=1024) + routers)

    # A shared expert is always active, and has a gate of 2048 x 1.
    shared = per_token(**experts, shared_mlp_dim=100)
    assert shared == pytest.approx(per_token(mlp_dim=1124) + routers + routers / 8)


def unrolled_loss(config, graphdef, params):
    """A loss of all positions, the layers written out one by one."""
    model = nnx.merge(graphdef, params)
    block, stack = nnx.split(model.layers)
    x = model.embed(IDS)
    if model.position_embed is not None:
        x = x + model.position_embed(IDS)

    # Every position attends to every other, as the formula without `causal` counts.
    mask = Mask("full", jnp.ones((2, LENGTH, LENGTH), bool), IDS)
    for i in range(config.num_layers):
        layer = nnx.merge(block, jax.tree.map(operator.itemgetter(i), stack))
        x, *_ = layer(x, IDS, mask, IDS > 0)

    logits = model.logits(model.norm(x))
    return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])


def scanned_loss(graphdef, params):
    """The loss of a run, whose layers are the body of a loop."""
    weights = np.ones(IDS.shape, np.float32)
    batch = dict(tokens=IDS, targets=IDS, weights=weights, positions=IDS, segments=IDS)
    loss = causal.make_loss(z_loss=0.0, chunk=0)
    return loss(nnx.merge(graphdef, params), batch, None)[0]


def count_flops(loss, params):
    """XLA's count for a loss's gradient, per token."""
    lowered = jax.jit(jax.grad(loss)).lower(params)
    return lowered.cost_analysis()["flops"] / IDS.size


@pytest.mark.parametrize(
    "changes",
    [
        dict(
            activation="relu_squared",
            num_kv_heads=4,
            tie_embeddings=True,
            bias="qkv,out,mlp,norm",
            positions="learned",
        ),
        dict(activation="silu", gated_mlp=True, num_kv_heads=1, tie_embeddings=False),
    ],
    ids=["mha", "mqa"],
)
def test_flops_are_those_that_xla_counts(changes):
    """XLA counts the body of a loop once, so the layers are written out. Wide enough for norms,
    softmax and the like, which the formula leaves out, to be small.
    """
    sizes = dict(vocab_size=512, context_length=LENGTH, num_layers=3)
    widths = dict(embed_dim=256, mlp_dim=512, num_heads=4, head_dim=64)
    config = model_config(**sizes, **widths, **changes)
    graphdef, abstract = abstract_model(config)
    params = nnx.to_pure_dict(abstract)

    counted = count_flops(functools.partial(unrolled_loss, config, graphdef), params)
    per_token = flops_per_token(config, LENGTH, causal=False)
    assert per_token == pytest.approx(counted, rel=0.02)

    # Or it would not matter that the layers are written out.
    if config.scan_unroll == 1:
        scanned = count_flops(functools.partial(scanned_loss, graphdef), params)
        assert scanned < 0.7 * counted


def test_mfu():
    def device(kind):
        return types.SimpleNamespace(device_kind=kind)

    # A CPU's peak is not known, nor is that of a chip without a line in the table.
    assert flops.mfu(1e12, jax.devices()) is None
    assert flops.mfu(1e12, [device("an unheard-of chip")]) is None
    assert flops.mfu(2 * 275e12, [device("TPU v4")] * 4) == pytest.approx(0.5)
