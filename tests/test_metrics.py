"""Means from sums and counts, FLOPs against XLA's own count, and a metrics file that follows the
checkpoints.
"""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from lm import config as config_lib
from lm import files, flops, telemetry
from lm.models import presets
from lm.models.transformer import Config, Transformer
from lm.nn.attention import Visible
from lm.objectives import causal


def test_means_of_uneven_batches():
    """The mean over all tokens, not over batches; and in float64: half a million small terms don't
    get lost beside a big one.
    """
    total = {}
    telemetry.accumulate(total, {"loss": (np.float32(6.0), np.float32(3.0)), "z": (1.0, 4)})
    telemetry.accumulate(total, {"loss": (jnp.float32(1.0), jnp.float32(1.0))})
    assert telemetry.means(total) == {"loss": 7 / 4, "z": 0.25}
    total = {"loss": (1e9, 1e9)}
    for _ in range(1000):
        telemetry.accumulate(total, {"loss": (np.float32(0.125), np.float32(0.125))})
    assert total["loss"] == (1e9 + 125, 1e9 + 125)


def test_the_mean_of_nothing_is_not_a_number():
    assert math.isnan(telemetry.means({"loss": (0.0, 0.0)})["loss"])


def test_flops_by_hand():
    """GPT-2: 6 per weight of a matmul (all but the look-up and the positions, norms and biases) and
    12 a layer for each key and dim.
    """
    config = types.SimpleNamespace(**(config_lib.default().model.to_dict() | presets.get("gpt2")))
    weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 50257 * 768
    assert flops.model_flops_per_token(config, 1024) == 6 * weights + 12 * 12 * 768 * 1024 / 2
    assert (
        flops.model_flops_per_token(config, 1024, causal=False)
        == 6 * weights + 12 * 12 * 768 * 1024
    )
    config.window, config.table_dim = 256, 512
    weights += 50257 * (512 - 768) + 2 * 512 * 768
    # each query's own key half, as above
    seen = (sum(range(256)) + 128 + 256 * (1024 - 256)) / 1024
    assert flops.model_flops_per_token(config, 1024) == 6 * weights + 12 * 12 * 768 * seen


def test_flops_of_experts_are_those_of_one_token():
    sizes = config_lib.default().model.to_dict() | presets.get("llama3_1b")
    per_token = lambda **changes: flops.model_flops_per_token(
        types.SimpleNamespace(**(sizes | changes)), 1024
    )
    routers = 6 * 16 * 2048 * 8
    assert per_token(num_experts=8, experts_per_token=2, mlp_dim=512) == pytest.approx(
        per_token(mlp_dim=1024) + routers
    )
    assert per_token(
        num_experts=8, experts_per_token=2, mlp_dim=512, shared_mlp_dim=100
    ) == pytest.approx(per_token(mlp_dim=1124) + routers + routers / 8)


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
    """Of the loss's gradient with the layers written out one by one: XLA counts the body of a loop
    once. Wide enough for norms, softmax and the like, which the formula leaves out, to be small.
    """
    fields = (
        config_lib.default().model.to_dict()
        | dict(
            vocab_size=512,
            context_length=64,
            num_layers=3,
            embed_dim=256,
            mlp_dim=512,
            num_heads=4,
            head_dim=64,
            param_dtype="float32",
            compute_dtype="float32",
        )
        | changes
    )
    del fields["type"]
    config, length = Config(**fields), 64
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))), nnx.Param
    )
    params = nnx.to_pure_dict(state)
    ids = np.zeros((2, length), np.int32)

    def loss(params):
        model = nnx.merge(graphdef, params)
        block, stack = nnx.split(model.layers)
        x = model.embed(ids)
        if model.position_embed is not None:
            x = x + model.position_embed(ids)
        for layer in range(config.num_layers):
            visible = Visible(jnp.ones((2, length, length), bool), ids)
            x, *_ = nnx.merge(block, jax.tree.map(lambda p: p[layer], stack))(  # noqa: B023
                x, ids, visible, ids > 0
            )
        logits = model.logits(model.norm(x))
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    counted = jax.jit(jax.grad(loss)).lower(params).cost_analysis()["flops"] / ids.size
    assert flops.model_flops_per_token(config, length, causal=False) == pytest.approx(
        counted, rel=0.02
    )

    batch = dict(
        tokens=ids, targets=ids, weights=np.ones(ids.shape, np.float32), positions=ids, segments=ids
    )
    scanned = jax.jit(
        jax.grad(
            lambda params: causal.make_loss(z_loss=0.0, chunk=0)(
                nnx.merge(graphdef, params), batch, None
            )[0]
        )
    )
    if config.scan_unroll == 1:  # or it would not matter that the layers are written out
        assert scanned.lower(params).cost_analysis()["flops"] / ids.size < 0.7 * counted


def test_mfu():
    device = lambda kind: types.SimpleNamespace(device_kind=kind)
    assert flops.mfu(1e12, jax.devices()) is None  # a CPU
    assert flops.mfu(1e12, [device("an unheard-of chip")]) is None
    assert flops.mfu(2 * 275e12, [device("TPU v4")] * 4) == pytest.approx(0.5)


def written(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_writer_goes_on_after_a_step(tmp_path):
    """What was written after the step that a run goes on from is cut off, what came before stays,
    once.
    """
    path = epath.Path(tmp_path)
    writer = telemetry.Writer(path, 0)
    assert writer.lines() == []
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0 / step, "train/batch_hash": f"hash {step}"})
    writer.write(2, {"eval/validation/loss": 7})
    writer.close()
    everything = written(path)
    assert [line["step"] for line in everything] == [1, 2, 3, 2]

    writer = telemetry.Writer(path, 2)
    assert writer.lines() == written(path) == [everything[0], everything[1], everything[3]]
    writer.write(3, {"train/loss": 0.5})
    writer.write(4, {})
    writer.close()
    assert (
        writer.lines()
        == written(path)
        == [everything[0], everything[1], everything[3], {"step": 3, "train/loss": 0.5}]
    )


def test_writer_drops_a_half_written_line(tmp_path):
    whole = '{"step": 1, "train/loss": 2.0}\n'
    # a line without its end may be a number cut short
    for half in ('{"step": 2, "train/lo', '{"step": 2, "train/loss": 1.0}'):
        (tmp_path / "metrics.jsonl").write_text(whole + half)
        assert files.read_jsonl_log(epath.Path(tmp_path) / "metrics.jsonl") == [
            {"step": 1, "train/loss": 2.0}
        ]
        telemetry.Writer(epath.Path(tmp_path), 5).close()
        assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_writer_keeps_numbers_that_json_has_no_word_for(tmp_path):
    writer = telemetry.Writer(epath.Path(tmp_path), 0)
    writer.write(1, {"train/loss": math.inf, "train/grad_norm": math.nan})
    writer.close()
    (line,) = telemetry.Writer(epath.Path(tmp_path), 1).lines()
    assert line["train/loss"] == math.inf and math.isnan(line["train/grad_norm"])


def test_curves_are_a_picture_of_any_run():
    lines = [
        {"step": 1, "train/loss": 2.0},
        {
            "step": 1,
            "eval/v/bits_per_byte": 3.0,
            "eval/v/accuracy": 0.5,
            "eval/v/majority_accuracy": 0.5,
        },
    ]
    for part in ([], lines):
        assert telemetry.plot_curves(part).startswith(b"\x89PNG")
