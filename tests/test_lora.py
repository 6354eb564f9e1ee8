"""Adapters beside dense layers: nothing at first, then what merging them gives; and all that a run
trains, keeps and costs.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from lm import build, convert, trained, weights
from lm import config as config_lib
from lm.models.transformer import Transformer
from lm.nn import lora
from tests.helpers import (
    abstract_model,
    model_config,
    random_model,
    read_checkpoint,
    read_metrics,
    run_training,
    slow,
)

VARIANTS = {
    "gated": dict(gated_mlp=True, lora_scaling="rslora"),
    "with biases": dict(bias="qkv,out,mlp,norm", norm="layernorm"),
    "parallel": dict(residual="parallel", gated_mlp=True, qk_norm=True),
}
ADAPTERS = dict(lora_rank=4, lora_alpha=6.0)
GATED = dict(gated_mlp=True, embed_dim=64)
SHAPE = (2, 16)
TOKENS = np.random.default_rng(0).integers(0, 40, SHAPE).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(16, dtype=np.int32), SHAPE)
SEGMENTS = np.ones(SHAPE, np.int32)


def logits_of(graphdef):
    """Compiled: parameters -> logits of `TOKENS`."""

    @jax.jit
    def compute(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(TOKENS, POSITIONS, SEGMENTS).hidden)

    return compute


@functools.cache
def initialised(config):
    """(graphdef, parameters as a run draws them)."""

    @jax.jit
    def init(key):
        return nnx.to_pure_dict(nnx.split(Transformer(config, key), nnx.Param)[1])

    graphdef, _ = abstract_model(config)
    return graphdef, jax.device_get(init(jax.random.key(0)))


def flat(params):
    """path -> array."""
    return dict(zip(trained.paths_of(params), jax.tree.leaves(params), strict=True))


# --- layers ---


def test_adapters_are_nothing_at_first():
    """Bit-equal logits, and the weights are those that the model without adapters draws."""
    plain_graphdef, plain = initialised(model_config(**GATED))
    graphdef, params = initialised(model_config(**GATED, **ADAPTERS))
    adapters, base = trained.split(params, lora.is_adapter)
    assert flat(base).keys() == flat(plain).keys()
    for path, leaf in flat(base).items():
        np.testing.assert_array_equal(leaf, flat(plain)[path], err_msg=path)
    np.testing.assert_array_equal(logits_of(graphdef)(params), logits_of(plain_graphdef)(plain))

    adapters = flat(adapters)
    names = [path.removesuffix("_lora_a") for path in adapters if path.endswith("_lora_a")]
    assert [name.rpartition("/")[2] for name in names] == [
        "key", "out", "query", "value", "down", "gate", "up",
    ]  # fmt: skip
    for path, leaf in adapters.items():
        assert leaf.dtype == np.float32
        assert leaf.any() == path.endswith("_a"), path


def test_adapters_have_random_numbers_of_their_own():
    """Not those of a weight, nor each other's; as wide as 1 / sqrt(3 inputs)."""
    _, params = initialised(model_config(**GATED, **ADAPTERS))
    drawn = {path: x for path, x in flat(params).items() if x.any() and "scale" not in path}
    firsts = {}
    for path, leaf in drawn.items():
        for layer in range(2):
            values = leaf.reshape(-1) if "layers" not in path else leaf[layer].reshape(-1)
            # In units of its deviation, so that the scale of what is drawn doesn't matter.
            firsts[path, layer if "layers" in path else 0] = values[:60] / values.std()
    for (path, x), (other, y) in itertools.combinations(firsts.items(), 2):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.6, (path, other)

    query = params["layers"]["attention"]["query_lora_a"]
    assert query.std() == pytest.approx((3 * 64) ** -0.5, rel=0.1)
    out = params["layers"]["attention"]["out_lora_a"]
    assert out.std() == pytest.approx((3 * 4 * 8) ** -0.5, rel=0.1)


@pytest.mark.parametrize("variant", ["gated", "with biases", slow("parallel")])
def test_merged_is_unmerged(variant):
    """For each target by itself and for all, and in the form that decodes."""
    config = model_config(**ADAPTERS, **VARIANTS[variant])
    graphdef, params = random_model(config, std=0.15)
    plain_graphdef, _ = random_model(model_config(**VARIANTS[variant]))
    scale = lora.scale(config)
    assert scale == (3.0 if variant == "gated" else 1.5)
    unmerged, merged = logits_of(graphdef), logits_of(plain_graphdef)
    base = merged(trained.split(params, lora.is_adapter)[1])

    targets = [name for name in lora.TARGETS if name != "gate" or config.gated_mlp]
    for names in (*((name,) for name in targets), targets):
        # Others have a B of 0, as at first.
        def keep(path, leaf, names=names):
            path = jax.tree_util.keystr(path)
            is_kept = any(f"'{name}_lora_b'" in path for name in names)
            return leaf if is_kept or "_lora_b" not in path else np.zeros_like(leaf)

        some = jax.tree_util.tree_map_with_path(keep, params)
        got, wanted = unmerged(some), merged(lora.merged(some, scale))
        assert np.abs(got - base).max() > 1e-2, names
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=str(names))

    model = nnx.merge(graphdef, params)
    unstacked_graphdef, unstacked = model.for_decoding(params, "cpu")
    assert unstacked["layers"][0]["attention"]["query_lora_a"].shape == (32, 4)
    got = logits_of(unstacked_graphdef)(unstacked)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    # Merging works there too.
    one = lora.merged(unstacked["layers"][0], scale)["attention"]["out"]
    whole = lora.merged(params, scale)["layers"]["attention"]["out"][0]
    np.testing.assert_allclose(one, whole, rtol=1e-6, atol=1e-6)


def test_merging_sums_in_f32():
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(0, 1, (8, 6)), jnp.bfloat16)
    a, b = rng.normal(0, 0.1, (8, 2)), rng.normal(0, 0.1, (2, 6))
    params = dict(up=weight, up_lora_a=jnp.asarray(a, jnp.float32), up_lora_b=jnp.float32(b))
    merged = lora.merged({"mlp": params}, 0.5)
    wanted = np.asarray(weight, np.float32) + np.float32(0.5 * a @ b)
    assert merged["mlp"].keys() == {"up"} and merged["mlp"]["up"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["mlp"]["up"], jnp.asarray(wanted, jnp.bfloat16))


@pytest.mark.parametrize(
    "scaling, rank, alpha, scale",
    [("plain", 16, 16, 1), ("rslora", 16, 16, 4), ("plain", 8, 16, 2), ("rslora", 4, 3, 1.5)],
)
def test_scales(scaling, rank, alpha, scale):
    """29: rsLoRA divides by the root of the rank."""
    config = model_config(lora_rank=rank, lora_alpha=float(alpha), lora_scaling=scaling)
    assert lora.scale(config) == scale


def test_adapters_can_be_off():
    """In a block, also one that ends in an error; models compute as the base does."""
    config = model_config(num_layers=1, **ADAPTERS)
    graphdef, params = random_model(config, std=0.15)
    merged = lora.merged(params, 0.0)

    @jax.jit
    def compute(params, base):
        model = nnx.merge(graphdef, params)
        before = model(TOKENS, POSITIONS, SEGMENTS).hidden
        with lora.off():
            off = model(TOKENS, POSITIONS, SEGMENTS).hidden
        after = model(TOKENS, POSITIONS, SEGMENTS).hidden
        plain_graphdef, _ = abstract_model(model_config(num_layers=1))
        wanted = nnx.merge(plain_graphdef, base)(TOKENS, POSITIONS, SEGMENTS).hidden
        return before, off, after, wanted

    before, off, after, wanted = compute(params, merged)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(off, wanted)
    assert np.abs(before - off).max() > 0.01

    mlp = nnx.merge(graphdef, params).layers.mlp
    with pytest.raises(KeyError), lora.off():
        assert isinstance(lora.of(mlp, "up"), nnx.Param)
        raise KeyError
    assert isinstance(lora.of(mlp, "up"), lora.Adapted)


@pytest.mark.parametrize(
    "targets, message",
    [
        ("query,keys", r"lora_targets = 'query,keys': \['keys'\]; valid: .*'query'"),
        ("embed", r"\['embed'\]"),
        ("", r"lora_targets = ''"),
    ],
)
def test_unknown_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        model_config(lora_rank=4, lora_targets=targets)


def test_targets_alone_have_adapters():
    config = model_config(lora_rank=4, lora_targets="query,down")
    _, params = random_model(config)
    adapters, _ = trained.split(params, lora.is_adapter)
    shapes = {path: leaf.shape for path, leaf in flat(adapters).items()}
    assert shapes == {
        "layers/attention/query_lora_a": (2, 32, 4),
        "layers/attention/query_lora_b": (2, 4, 4, 8),
        "layers/mlp/down_lora_a": (2, 48, 4),
        "layers/mlp/down_lora_b": (2, 4, 32),
    }


@pytest.mark.parametrize("shared", [slow(0), 16])
def test_experts_have_no_adapters(shared):
    """Their model's attention may."""
    experts = dict(num_experts=4, experts_per_token=2, shared_mlp_dim=shared)
    for targets in ("query,up", "gate", "down,value"):
        with pytest.raises(ValueError, match="experts have no adapters; take"):
            model_config(lora_rank=4, lora_targets=targets, **experts)
    assert model_config(**experts).lora_rank == 0  # without adapters all is allowed

    config = model_config(lora_rank=4, lora_targets="query,key,value,out", **experts)
    graphdef, params = random_model(config, std=0.15)
    plain_graphdef, _ = random_model(model_config(**experts))
    got = logits_of(graphdef)(params)
    wanted = logits_of(plain_graphdef)(lora.merged(params, lora.scale(config)))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert not any("mlp" in path for path in flat(params) if lora.is_adapter(path))


# --- what a step costs ---


def wide_config(**changes):
    """4 layers of 256, whose ranks are small beside them."""
    c = config_lib.default()
    c.tokenizer.kind = "bytes"
    c.model.update(dict(context_length=64, num_layers=4, embed_dim=256, mlp_dim=1024))
    c.model.update(dict(num_heads=4, num_kv_heads=4, head_dim=64, scan_unroll=4, remat="none"))
    c.data.update(dict(length=64, batch_size=8))
    c.train.length = "6 steps"
    c.optimizer.warmup_steps = 0
    c.mesh.fsdp = 1
    c.update_from_flattened_dict(changes)
    return c


WITH_ADAPTERS = {"model.lora_rank": 8, "init_from": "a run"}


def step_flops(config, is_compiled):
    """(FLOPs of a train step, and as the model counts them)."""
    program = build.program(config, jax.devices()[:1], 258, 6)
    batch = program.abstract_batch(config.data.batch_size)
    with jax.set_mesh(program.mesh):
        step = program.train_step.lower(program.abstract_state, batch, program.abstract_fixed)
        step = step.compile() if is_compiled else step
        tokens = config.data.batch_size * config.data.length
        return step.cost_analysis()["flops"], program.flops_per_token(config.data.length) * tokens


@pytest.mark.parametrize("is_compiled", [False, slow(True)], ids=["traced", "compiled"])
def test_a_step_leaves_out_the_gradients_of_what_is_frozen(is_compiled):
    """Two thirds of full tuning's FLOPs and little more, as the model's own count says."""
    flops, counted = step_flops(wide_config(), is_compiled)
    adapted_flops, adapted_counted = step_flops(wide_config(**WITH_ADAPTERS), is_compiled)
    assert 0.6 < adapted_flops / flops <= 0.72
    assert adapted_counted / counted == pytest.approx(adapted_flops / flops, abs=0.04)


def test_bytes_of_the_state():
    """A bf16 weight has two f32 moments, a frozen one none."""

    def nbytes(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def bytes_a_parameter(**changes):
        big = dict(embed_dim=4096, mlp_dim=16384, num_heads=32, num_kv_heads=32, head_dim=128)
        big = {f"model.{name}": value for name, value in big.items()}
        config = wide_config(**big, **changes)
        program = build.program(config, jax.devices()[:1], 258, 6)
        _, base = trained.split(program.abstract_params, lora.is_adapter)
        held = nbytes(program.abstract_state) + nbytes(program.abstract_fixed)
        return held / sum(leaf.size for leaf in jax.tree.leaves(base))

    assert bytes_a_parameter() == pytest.approx(10, rel=0.001)
    assert bytes_a_parameter(**WITH_ADAPTERS) == pytest.approx(2, rel=0.05)


# --- runs ---

_BASE = []


@pytest.fixture
def tuned(small, fast_runs, tmp_path_factory):
    """The configuration of adapters on a base that was trained."""
    small.optimizer.learning_rate = 1e-2
    if not _BASE:
        _BASE.append(tmp_path_factory.mktemp("lora") / "base")
        run_training(small, _BASE[0])
    small.init_from = str(_BASE[0])
    small.model.lora_rank = 4
    return small


_RUN = []


@pytest.fixture
def adapted(tuned, tmp_path_factory):
    """The run of `tuned`."""
    if not _RUN:
        _RUN.append(tmp_path_factory.mktemp("lora") / "run")
        run_training(tuned, _RUN[0])
    return _RUN[0]


def test_a_run_trains_adapters_alone(tuned, adapted, tmp_path):
    """They alone are in its checkpoints, in f32. Its first loss is the base's."""
    state, _ = read_checkpoint(adapted, 6)
    paths = {path for path in state if path.startswith("params/")}
    assert len(paths) == 12 and all(map(lora.is_adapter, paths))
    moments = [path for path, (_, shape, _) in state.items() if len(shape) > 1]
    assert len(moments) == 3 * 12 and all(map(lora.is_adapter, moments))
    assert {state[path][0] for path in moments} == {"float32"}
    for path in paths:
        assert any(state[path][2]), path  # B isn't 0 any more

    # 32: bf16 would lose them.
    lines = read_metrics(adapted)
    assert max(line["train/updates_lost"] for line in lines if "train/updates_lost" in line) < 0.01

    tuned.model.lora_rank = 0
    run_training(tuned, tmp_path / "full")
    assert lines[0]["train/loss"] == read_metrics(tmp_path / "full")[0]["train/loss"]


def test_the_base_stays_as_it_is(tuned, adapted):
    """Bit for bit: whoever loads the run gets both parts."""
    experiment = build.build(tuned, jax.devices()[:1])
    with jax.set_mesh(experiment.program.mesh):
        params, step = weights.load_weights(experiment, epath.Path(adapted), averaged=False)
    assert step == 6
    base, _ = read_checkpoint(epath.Path(tuned.init_from), 6)
    state, _ = read_checkpoint(adapted, 6)
    for path, leaf in flat(jax.device_get(params)).items():
        stored = (state if lora.is_adapter(path) else base)[f"params/{path}"]
        assert (str(leaf.dtype), leaf.shape, leaf.tobytes()) == stored, path


def test_a_base_of_hugging_face_is_the_same(tuned, adapted, tmp_path):
    """The first loss is that on the run's own weights, bit for bit."""
    convert.export_checkpoint(epath.Path(tuned.init_from), tmp_path / "hf", jax.devices()[:1])
    tuned.init_from = str(tmp_path / "hf")
    run_training(tuned, tmp_path / "on the directory")
    lines = [read_metrics(run) for run in (adapted, tmp_path / "on the directory")]
    assert lines[0][0]["train/loss"] == lines[1][0]["train/loss"]
    state, _ = read_checkpoint(tmp_path / "on the directory", 6)
    assert all(map(lora.is_adapter, (path for path in state if path.startswith("params/"))))


def test_more_may_be_trained(tuned):
    """By names: the adapters and the embedding."""
    tuned.train.trained = "*_lora_?,embed/*"
    program = build.program(tuned, jax.devices()[:1], 258, 6)
    others = [p for p in trained.paths_of(program.abstract_state.params) if not lora.is_adapter(p)]
    assert others == ["embed/table"]


def test_adapters_need_a_base():
    config = wide_config(**{"model.lora_rank": 8})
    with pytest.raises(ValueError, match="keeps parameters as config.init_from has them"):
        build.build(config, jax.devices()[:1])


def test_a_run_of_adapters_is_not_exported_without_its_base(adapted, tmp_path):
    with pytest.raises(ValueError, match="trained parameters only"):
        convert.export_checkpoint(epath.Path(adapted), tmp_path / "hf", jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_other_optimizers_move_adapters(tuned, name):
    """Each adapter changes by a step, none becomes anything else than finite."""
    tuned.optimizer.name = name
    program = build.program(tuned, jax.devices()[:1], 258, 6)
    optimizer = program.optimizer
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype),
        program.abstract_state.params,
    )

    @jax.jit
    def update(params):
        return optimizer.update(
            params, optimizer.init(params), params, jnp.int32(0), jax.random.key(0)
        )[0]

    for path, leaf in flat(update(params)).items():
        assert np.isfinite(leaf).all() and (leaf != flat(params)[path]).any(), path
