"""Looking inside: what it shows is right on every mesh, and a run with it is the run without."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lm import build, looking, step, stopping, trained
from lm.data import loader
from lm.models.transformer import make_mask
from lm.nn import masks, watch
from tests.helpers import (
    assert_same_run,
    model_config,
    random_model,
    read_checkpoint,
    read_metrics,
    run_training,
    slow,
    terminate_at,
)
from tests.test_sharding import devices_for, uneven_batch
from tests.toys import weighted

MODELS = {
    "dense": {"model.bias": "qkv,out,mlp"},
    "frozen": {"train.trained": "*,!embed/*,!layers/attention/*", "init_from": "unused"},
    "experts": {
        "model.num_experts": 4,
        "model.num_kv_heads": 4,
        "model.shared_mlp_dim": 16,
        "objective.balance_loss": 0.1,
        # The same values are dropped as in the step.
        "model.dropout": 0.2,
    },
}
LOOKED = ("grad_norm/", "weight_norm/", "update_norm/", "activation_rms/", "loss_by_position/")


# What a look gives.


def make_program(tiny, sizes, overrides):
    """The tiny experiment's program in f32, without clipping: Adam's first moment after one step is
    (1 - b1) times the gradient.
    """
    c = tiny.copy_and_resolve_references().unlock()
    c.model.update(dict(param_dtype="float32", vocab_size=264))
    c.optimizer.update(dict(clip_norm=0.0, warmup_steps=0))
    c.data.batch_size = 16
    c.mesh.update(sizes)
    c.update_from_flattened_dict(overrides)
    return build.program(c, devices_for(sizes), 264, 100)


def draw(leaf):
    """Values large enough for every part of a model to matter."""
    return np.random.default_rng(leaf.size).normal(0.1, 0.3, leaf.shape).astype(leaf.dtype)


def begin(program):
    """(the state at step 0, a batch, what is fixed) on the program's mesh."""
    params = jax.tree.map(lambda p: jax.device_put(draw(p), p.sharding), program.abstract_params)
    trained_params, frozen = trained.split(params, program.is_trained)
    batch = jax.device_put(uneven_batch(0), program.batch_shardings())
    return program.init_state(trained_params), batch, step.Fixed(frozen, {})


def look(program):
    with jax.set_mesh(program.mesh):
        return looking.terms(jax.device_get(program.look(*begin(program))))


_ON_ONE_DEVICE = {}


def look_on_one_device(tiny, name):
    """(the program, what its look gives), once for all tests."""
    if name not in _ON_ONE_DEVICE:
        program = make_program(tiny, {}, MODELS[name])
        _ON_ONE_DEVICE[name] = (program, look(program))
    return _ON_ONE_DEVICE[name]


def norms_by_hand(params):
    """{group: norm} of the tiny model's parameters, in float64."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parts = [key.key for key in path]
        if parts[0] != "layers":
            arrays.setdefault(parts[0], []).append(leaf)
            continue
        part = {"attention_norm": "norms", "mlp_norm": "norms"}.get(parts[1], parts[1])
        for layer in (0, 1):
            arrays.setdefault(f"layers/0{layer}/{part}", []).append(leaf[layer])

    norms = {}
    for group, leaves in arrays.items():
        norms[group] = np.linalg.norm(np.concatenate([np.ravel(x) for x in leaves]).astype(float))
    return norms


@pytest.mark.parametrize("name", ["dense", slow("frozen"), slow("experts")])
def test_norms_are_those_of_the_step(tiny, name):
    """Of gradient, weights and update, from the states before and after the step itself."""
    program, looked = look_on_one_device(tiny, name)
    state, batch, fixed = begin(program)
    before = jax.device_get(state.params)
    with jax.set_mesh(program.mesh):
        state, _ = program.train_step(state, batch, fixed)

    moment = optax.tree_utils.tree_get(state.opt_state["transform"], "mu")
    wanted = {
        "grad_norm": optax.tree.scale(1 / (1 - program.config.optimizer.b1), moment),
        "weight_norm": before,
        "update_norm": jax.tree.map(np.subtract, jax.device_get(state.params), before),
    }
    for kind, tree in wanted.items():
        norms = norms_by_hand(jax.device_get(tree))
        assert len(norms) == {"dense": 8, "frozen": 5, "experts": 8}[name]
        assert {name for name in looked if name.startswith(kind)} == {f"{kind}/{g}" for g in norms}
        for group, norm in norms.items():
            assert looked[f"{kind}/{group}"] == (pytest.approx(norm, rel=1e-3), 1), group
            assert norm > 0


def test_activations_are_those_of_the_layers(tiny):
    """Each layer called by itself, padding left out."""
    program, looked = look_on_one_device(tiny, "dense")
    state, batch, _ = begin(program)
    graphdef, params = nnx.merge(program.graphdef, state.params).for_decoding(state.params, "cpu")
    model = nnx.merge(graphdef, params)
    tokens, positions, segments = (batch[k] for k in ("tokens", "positions", "segments"))
    is_token = np.asarray(segments) > 0
    assert 0 < is_token.mean() < 1

    def check(name, x_BTD):
        rms = np.sqrt(np.mean(np.asarray(x_BTD, np.float64)[is_token] ** 2))
        assert looked.pop(f"activation_rms/{name}") == (pytest.approx(rms, rel=1e-4), 1), name

    looked = dict(looked)
    x_BTD = model.embed(tokens)
    check("embed", x_BTD)
    mask = make_mask(model.config, positions, segments, masks.CAUSAL)
    for i, block in enumerate(model.layers):
        attended_BTD, _ = block.attention(block.attention_norm(x_BTD), positions, mask, None)
        check(f"layers/0{i}/attention", attended_BTD)
        out_BTD = block.mlp(block.mlp_norm(x_BTD + attended_BTD))
        check(f"layers/0{i}/mlp", out_BTD)
        x_BTD = x_BTD + attended_BTD + out_BTD
        check(f"layers/0{i}/residual", x_BTD)
    assert not [name for name in looked if name.startswith("activation_rms")]


def test_losses_by_position_are_those_of_the_targets(tiny):
    """Each target's loss, in the bucket of its position; together they are the loss."""
    program, looked = look_on_one_device(tiny, "dense")
    state, batch, fixed = begin(program)
    logprobs = jax.jit(step.make_token_logprobs(program.graphdef, program.objective.token_logprobs))
    losses_BT = -np.asarray(logprobs(state.params, batch), np.float64)

    wanted = {}
    for loss, weight, position in zip(
        losses_BT.flat, batch["weights"].flatten(), batch["positions"].flatten()
    ):
        low = 0
        while 2 ** (low + 1) <= position:
            low += 1
        first = 2**low if low else 0
        total, count = wanted.get(f"loss_by_position/{first}-{2 ** (low + 1) - 1}", (0, 0))
        if weight:
            wanted[f"loss_by_position/{first}-{2 ** (low + 1) - 1}"] = (total + loss, count + 1)
    got = {name: sums for name, sums in looked.items() if name.startswith("loss_by_position")}
    assert list(got) == [f"loss_by_position/{b}" for b in ("0-1", "2-3", "4-7", "8-15", "16-31")]
    assert got.keys() == wanted.keys()
    for name, (total, count) in got.items():
        assert (total, count) == (pytest.approx(wanted[name][0], rel=1e-4), wanted[name][1])

    with jax.set_mesh(program.mesh):
        loss_sum, count = program.train_step(state, batch, fixed)[1]["loss"]
    assert sum(total for total, _ in got.values()) == pytest.approx(float(loss_sum), rel=1e-4)
    assert sum(count for _, count in got.values()) == count


BY_HAND = {"train.fsdp": "by_hand", "train.accumulation": 2, "objective.chunk": 8}


@pytest.mark.parametrize(
    "name, sizes, execution",
    [
        ("dense", dict(data=2, fsdp=2, sequence=2), BY_HAND | {"model.remat": "full"}),
        slow("dense", dict(data=2, fsdp=2, tensor=2), {"train.accumulation": 2}),
        slow("frozen", dict(data=2, fsdp=4), BY_HAND),
        slow(
            "experts",
            dict(expert=2, fsdp=2, fsdp2=2),
            # Which draws random numbers, see lm.build._check_simulated.
            {"train.fsdp": "by_hand", "model.scan_unroll": 2},
        ),
    ],
    ids=str,
)
def test_a_look_is_the_same_on_every_mesh(tiny, name, sizes, execution):
    """With microbatches, chunks and remat too."""
    _, wanted = look_on_one_device(tiny, name)
    looked = look(make_program(tiny, sizes, MODELS[name] | execution))
    assert looked.keys() == wanted.keys()
    for metric, (total, count) in looked.items():
        assert total == pytest.approx(wanted[metric][0], rel=2e-4), metric
        assert count == wanted[metric][1], metric


# Who watches whom.


@pytest.mark.parametrize("residual", ["post_norm", slow("pre_norm"), slow("parallel")])
def test_only_the_watched_model_says_something(residual):
    """A reference model in the same loss is none; twice called is twice summed; without a watcher
    nothing more is computed.
    """
    config = model_config(residual=residual)
    graphdef, params = random_model(config)
    model, other = nnx.merge(graphdef, params), nnx.merge(graphdef, params)
    tokens = jnp.ones((2, 4), jnp.int32)

    def call(model):
        return model(tokens, tokens, tokens)

    with watch.watch(model) as said:
        assert call(other).aux == {}
        assert not said
        output = call(model)
        once = dict(said)
        call(model)
    assert output.aux == {}
    parts = [f"layers/*/{part}" for part in ("attention", "mlp", "residual")]
    assert list(said) == ["embed", *parts]
    for name, (total, count) in said.items():
        assert np.shape(total) == np.shape(count) == (() if name == "embed" else (2,))
        np.testing.assert_array_equal(count, 2 * 2 * 4 * config.embed_dim)
        np.testing.assert_array_equal(total, 2 * once[name][0])
    if residual == "post_norm":
        mean = jnp.mean(jnp.square(output.hidden))
        assert once["layers/*/residual"][0][-1] == pytest.approx(float(mean) * output.hidden.size)
    assert watch.squares(tokens > 0, {"hidden": output.hidden}) == {}


@pytest.mark.slow
def test_a_loss_with_a_prepared_batch_and_a_reference():
    """Only the trained model's activations are there, those of all microbatches."""
    config = model_config(context_length=32)
    graphdef, params = random_model(config)
    loss_fns = step.LossFns(weighted.make_loss(), weighted.make_prepare(), {"reference": graphdef})
    mean_gradient = step.make_mean_gradient(
        graphdef, looking.watched(loss_fns), accumulation=2, wrap_gradient=None
    )
    batch = uneven_batch(0, rows=4)
    fixed = step.Fixed({}, {"reference": params})
    _, _, said = jax.jit(mean_gradient)(params, batch, jax.random.key(0), fixed)
    number = (batch["segments"] > 0).sum() * config.embed_dim
    np.testing.assert_array_equal(said["layers/*/residual"][1], [number, number])


def test_the_names_of_many_layers():
    """Numbers as wide as the last one, so that names sort."""
    groups = {"layers/*/mlp": np.arange(101.0), "embed": np.float32(7)}
    nothing = (np.zeros(looking.BUCKETS), np.zeros(looking.BUCKETS))
    named = looking.terms({"grad_norm": groups, "loss_by_position": nothing})
    assert len(named) == 102
    assert named["grad_norm/layers/004/mlp"] == (4.0, 1.0)
    assert named["grad_norm/layers/100/mlp"] == (100.0, 1.0)
    assert named["grad_norm/embed"] == (7.0, 1.0)


# The run.


@pytest.fixture
def run_config(small):
    """On 4 devices, logged and saved out of step with looks."""
    small.mesh.update(dict(data=4))
    small.train.update(dict(length="8 steps", log_every=3))
    return small


def without_looks(values):
    return {k: v for k, v in values.items() if not k.removeprefix("train/").startswith(LOOKED)}


def assert_trained_alike(run, other):
    """All arrays at the end, and the metrics but for the looks."""
    arrays, _ = read_checkpoint(run, 8)
    wanted_arrays, _ = read_checkpoint(other, 8)
    assert arrays == wanted_arrays
    lines, wanted = read_metrics(run), read_metrics(other)
    assert [without_looks(line) for line in lines] == [without_looks(line) for line in wanted]


def test_a_run_with_looks_is_the_run_without(fast_runs, run_config, tmp_path):
    """To the bit."""
    run_training(run_config, tmp_path / "off", devices=4)
    assert not any(name.count("/") > 1 for line in read_metrics(tmp_path / "off") for name in line)
    run_config.train.update(dict(look_every=2, check_replicas_every=2))
    last = run_training(run_config, tmp_path / "on", devices=4)
    assert last["train/seconds_looking"] > 0
    assert_trained_alike(tmp_path / "on", tmp_path / "off")

    # Means of the looks since the line before: one at step 2, those at 4 and 6, one at 8.
    lines = read_metrics(tmp_path / "on")
    for name in ("grad_norm/layers/00/mlp", "update_norm/embed", "activation_rms/embed"):
        values = [line[f"train/{name}"] for line in lines]
        assert [line["step"] for line in lines] == [3, 6, 8]
        assert len({*values}) == 3 and min(values) > 0
    assert all("train/loss_by_position/0-1" in line for line in lines)


@pytest.mark.slow
def test_a_stopped_run_looks_on(fast_runs, run_config, tmp_path, monkeypatch):
    """Bit-equal, looks too. Where none is due from there on, it trains as it would have."""
    run_config.train.update(dict(look_every=2, check_replicas_every=2, accumulation=2))
    run_training(run_config, tmp_path / "on", devices=4)
    for change in ({}, dict(look_every=100, check_replicas_every=0)):
        run = tmp_path / f"stopped{len(change)}"
        with monkeypatch.context() as patch:
            terminate_at(patch, loader.Loader, "next", 5)
            with pytest.raises(stopping.Stopped):
                run_training(run_config, run, devices=4)
        changed = run_config.copy_and_resolve_references()
        changed.train.update(change)
        last = run_training(changed, run, devices=4)
        # The first step was looked into in any case.
        assert last["train/seconds_looking"] > 0
        assert_trained_alike(run, tmp_path / "on")
        if not change:
            assert_same_run(run, tmp_path / "on", 8)
        else:
            assert not any(name.startswith("train/grad_norm/") for name in read_metrics(run)[-1])


@pytest.mark.slow
def test_the_train_step_does_not_know_of_looks(small):
    """Its program is the same text."""
    texts = set()
    for every in (0, 1):
        small.train.update(dict(look_every=every, check_replicas_every=every))
        p = build.program(small, jax.devices()[:1], 264, 100)
        with jax.set_mesh(p.mesh):
            batch = p.abstract_batch(small.data.batch_size)
            lowered = p.train_step.lower(p.abstract_state, batch, p.abstract_fixed)
        texts.add(lowered.as_text())
    assert len(texts) == 1
