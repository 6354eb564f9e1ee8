"""The model against its formulas in numpy, its Config field by field, and its ways of execution
against each other.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import config as config_lib
from lm.models import presets
from lm.models.transformer import EXECUTION_FIELDS, Config, Transformer
from lm.nn.layers import ACTIVATIONS, NORMS
from lm.objectives import causal

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
jit = functools.partial(jax.jit, compiler_options=QUICK)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 40, (2, 12)).astype(np.int32)
SEGMENTS = np.array([[1] * 7 + [2] * 5, [1] * 4 + [2] * 6 + [0] * 2], np.int32)
POSITIONS = np.array([[*range(7), *range(5)], [*range(4), *range(6), 0, 0]], np.int32)
BATCH = dict(
    tokens=TOKENS,
    targets=np.roll(TOKENS, -1, axis=1),
    weights=(SEGMENTS > 0).astype(np.float32),
    positions=POSITIONS,
    segments=SEGMENTS,
)


def config(**changes):
    fields = (
        config_lib.default().model.to_dict()
        | dict(
            vocab_size=40,
            context_length=16,
            num_layers=2,
            embed_dim=32,
            mlp_dim=48,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            activation="silu",
            tie_embeddings=False,
            param_dtype="float32",
            compute_dtype="float32",
        )
        | changes
    )
    del fields["type"]
    return Config(**fields)


def split(config, key=0):
    """(graphdef, parameters as they are drawn)."""
    graphdef = nnx.split(nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))), nnx.Param)[
        0
    ]
    init = lambda key: nnx.to_pure_dict(nnx.split(Transformer(config, key), nnx.Param)[1])
    return graphdef, jax.device_get(jit(init)(jax.random.key(key)))


def drawn(config):
    """(graphdef, parameters large enough for every part to matter, biases not 0)."""
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))), nnx.Param
    )
    rng = np.random.default_rng(1)
    draw = lambda path, p: (
        rng.normal(0, 0.3, p.shape) + ("scale" in jax.tree_util.keystr(path))
    ).astype(p.dtype)
    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(params))


def logits(graphdef, params):
    def call(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(TOKENS, POSITIONS, SEGMENTS).hidden)

    return np.asarray(jit(call)(params))


def loss(graphdef, params, batch=BATCH):
    value, count, _ = causal.make_loss(z_loss=0.01, chunk=0)(
        nnx.merge(graphdef, params), batch, None
    )
    return value / count


# The model in numpy and float64, a row at a time, as its papers have it.


def _norm(c, p, x):
    if c.norm == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * p["scale"]
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_eps) * p[
        "scale"
    ] + p.get("bias", 0)


def _activation(name, x):
    return {
        "relu_squared": lambda: np.maximum(x, 0) ** 2,
        "silu": lambda: x / (1 + np.exp(-x)),
        "relu": lambda: np.maximum(x, 0),
        "gelu": lambda: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        "gelu_tanh": lambda: (
            0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
    }[name]()


def _rope(c, x, position):
    turning = int(c.head_dim * c.rope_fraction)
    first, second = (
        (np.arange(0, turning, 2), np.arange(1, turning, 2))
        if c.rope_interleaved
        else np.split(np.arange(turning), 2)
    )
    frequency = c.rope_theta ** (-np.arange(turning // 2) / (turning // 2))
    if c.rope_scaling:
        factor, low, high, context = c.rope_scaling
        for i, f in enumerate(frequency):
            wavelength = 2 * math.pi / f
            smooth = (context / wavelength - low) / (high - low)
            frequency[i] = (
                f
                if wavelength < context / high
                else f / factor
                if wavelength > context / low
                else (1 - smooth) * f / factor + smooth * f
            )
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(
        1j * position[:, None, None] * frequency
    )
    out = np.array(x)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def _attention(c, p, x, position, segment):
    q, k, v = (
        np.einsum("td,dnh->tnh", x, p[name]) + p.get(f"{name}_bias", 0)
        for name in ("query", "key", "value")
    )
    if c.qk_norm:
        q, k = (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * p[f"{name}_norm"]["scale"]
            for x, name in ((q, "query"), (k, "key"))
        )
    if c.positions == "rope":
        q, k = _rope(c, q, position), _rope(c, k, position)
    out = np.zeros_like(q)
    for t in range(len(x)):
        for n in range(c.num_heads):
            seen = [
                s
                for s in range(t + 1)
                if segment[s] == segment[t] and (not c.window or t - s < c.window)
            ]
            kv = n // (c.num_heads // c.num_kv_heads)
            weights = np.exp(k[seen, kv] @ q[t, n] / math.sqrt(c.head_dim))
            out[t, n] = weights @ v[seen, kv] / weights.sum()
    return np.einsum("tnh,nhd->td", out, p["out"]) + p.get("out_bias", 0)


def _mlp(c, p, x):
    up = x @ p["up"] + p.get("up_bias", 0)
    hidden = (
        _activation(c.activation, x @ p["gate"] + p.get("gate_bias", 0)) * up
        if c.gated_mlp
        else _activation(c.activation, up)
    )
    return hidden @ p["down"] + p.get("down_bias", 0)


def _router(c, p, x):
    """(probabilities [T, E], the experts' weights [T, E], 0 for those not chosen)."""
    probabilities = np.exp(x @ p["router"])
    probabilities /= probabilities.sum(-1, keepdims=True)
    weights = np.where(
        probabilities >= np.sort(probabilities)[:, [-c.experts_per_token]], probabilities, 0
    )
    return probabilities, weights / weights.sum(
        -1, keepdims=True
    ) if c.normalize_router else weights


def _moe(c, p, x):
    _, weights = _router(c, p, x)
    out = sum(
        weights[:, [e]]
        * _mlp(c, {name: p[name][e] for name in ("up", "gate", "down") if name in p}, x)
        for e in range(c.num_experts)
    )
    return (
        out + _mlp(c, p["shared"], x) / (1 + np.exp(-x @ p["shared_gate"]))
        if c.shared_mlp_dim
        else out
    )


def reference(c, params, tokens, position, segment):
    """Logits of one row."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    x = p["embed"]["table"][tokens] @ p.get("project_in", np.eye(c.table_dim or c.embed_dim))
    if c.positions == "learned":
        x = x + p["position_embed"]["table"][position + c.position_offset]
    for layer in range(c.num_layers):
        block = jax.tree.map(lambda w: w[layer], p["layers"])  # noqa: B023
        first, second = (
            functools.partial(_norm, c, block[name]) for name in ("attention_norm", "mlp_norm")
        )
        attention = lambda x: _attention(c, block["attention"], x, position, segment)  # noqa: B023
        mlp = lambda x: (_moe if c.num_experts else _mlp)(c, block["mlp"], x)  # noqa: B023
        if c.residual == "post_norm":
            x = first(x + attention(x))
            x = second(x + mlp(x))
        elif c.residual == "parallel":
            x = x + attention(first(x)) + mlp(second(x))
        else:
            x = x + attention(first(x))
            x = x + mlp(second(x))
    x = (x if c.residual == "post_norm" else _norm(c, p["norm"], x)) @ p.get(
        "project_out", np.eye(c.table_dim or c.embed_dim)
    )
    return x @ (p["embed"] if c.tie_embeddings else p["head"])["table"].T


@pytest.mark.parametrize(
    "changes",
    [
        # GPT-2
        dict(
            norm="layernorm",
            activation="gelu_tanh",
            positions="learned",
            bias="qkv,out,mlp,norm",
            tie_embeddings=True,
            num_kv_heads=4,
        ),
        # Llama
        dict(norm="rmsnorm", activation="silu", gated_mlp=True, rope_theta=500.0, num_kv_heads=2),
        dict(
            norm="layernorm",
            activation="relu_squared",
            norm_eps=0.1,
            num_kv_heads=1,
            head_dim=6,
            num_layers=3,
        ),
        # GPT-NeoX
        dict(
            norm="layernorm",
            activation="gelu",
            residual="parallel",
            rope_fraction=0.5,
            bias="qkv,mlp,norm",
            num_kv_heads=4,
        ),
        dict(
            norm="layernorm",
            activation="relu",
            residual="post_norm",
            positions="learned",
            position_offset=2,
            table_dim=24,
            tie_embeddings=True,
            bias="out,norm",
        ),  # OPT-350M
        # Qwen and Llama 3.1
        dict(
            gated_mlp=True,
            qk_norm=True,
            window=4,
            rope_theta=500.0,
            rope_scaling=(8.0, 1.0, 4.0, 24),
            bias="qkv,mlp",
        ),
        dict(gated_mlp=True, rope_fraction=0.5, rope_interleaved=True, head_dim=16),  # GLM
        dict(gated_mlp=True, num_experts=4, experts_per_token=2),  # Mixtral
        # Qwen-MoE
        dict(
            gated_mlp=True,
            num_experts=5,
            experts_per_token=3,
            normalize_router=False,
            shared_mlp_dim=24,
            bias="qkv",
        ),
        dict(num_experts=3, experts_per_token=1, normalize_router=False, residual="parallel"),
    ],
    ids=["gpt2", "llama", "other", "neox", "opt", "qwen", "glm", "mixtral", "qwen-moe", "switch"],
)
def test_model_is_its_formulas(changes):
    c = config(**changes)
    graphdef, params = drawn(c)
    got = logits(graphdef, params)
    assert got.dtype == np.float32
    for row in range(2):
        np.testing.assert_allclose(
            got[row],
            reference(c, params, TOKENS[row], POSITIONS[row], SEGMENTS[row]),
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize(
    "changes",
    [
        dict(gated_mlp=True, bias="qkv,out,mlp,norm"),
        dict(norm="layernorm", positions="learned", bias="qkv,out,mlp,norm", tie_embeddings=True),
        dict(residual="post_norm", table_dim=24, qk_norm=True, window=5),
        dict(residual="parallel", rope_fraction=0.5, rope_interleaved=True),
        dict(gated_mlp=True, num_experts=4, experts_per_token=4),
        dict(num_experts=3, experts_per_token=3, normalize_router=False, shared_mlp_dim=24),
    ],
)
def test_gradient_is_the_slope(changes):
    """Of every parameter, by central differences along a random direction: no backward pass of our
    own may differ from its forward pass.
    """
    graphdef, params = drawn(config(**changes))
    call = jit(jax.value_and_grad(functools.partial(loss, graphdef)))
    rng = np.random.default_rng(2)
    for path, grad in jax.tree_util.tree_leaves_with_path(jax.device_get(call(params)[1])):
        direction = (
            grad / np.linalg.norm(grad) + 0.5 * rng.normal(size=grad.shape) / math.sqrt(grad.size)
        ).astype(np.float32)
        moved = lambda size: jax.tree_util.tree_map_with_path(
            lambda at, p: p + np.float32(size) * direction if at == path else p,  # noqa: B023
            params,
        )
        slope = (float(call(moved(0.01))[0]) - float(call(moved(-0.01))[0])) / 0.02
        assert slope == pytest.approx(np.vdot(grad, direction), rel=0.02, abs=2e-4), (
            jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    "changes", [dict(bias="qkv,out,mlp,norm"), dict(num_experts=4)], ids=["dense", "experts"]
)
def test_remat_changes_memory_only(changes):
    """Loss and gradients are those without; and what the backward pass keeps is really less, or the
    test would prove nothing.
    """
    run, kept = {}, {}
    for name in ("none", "dots", "full", "query,up", "query,up:host"):
        graphdef, params = drawn(config(remat=name, **changes))
        value = functools.partial(loss, graphdef)
        run[name] = jax.device_get(jit(jax.value_and_grad(value))(params))
        residuals = jax.eval_shape(lambda params: jax.vjp(value, params)[1], params)  # noqa: B023
        kept[name] = sum(x.size for x in jax.tree.leaves(residuals))
    for name in ("dots", "full", "query,up", "query,up:host"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
            run[name],
            run["none"],
        )
    assert kept["full"] < 0.9 * kept["dots"] < 0.8 * kept["none"], kept


# Another value for each field of Config, and what else must be set for the field to have a meaning.
# A new field needs a line here.
ALTERNATIVES = {
    "vocab_size": (41, {}),
    "context_length": (17, dict(positions="learned")),
    "num_layers": (3, {}),
    "embed_dim": (40, {}),
    "mlp_dim": (56, {}),
    "num_heads": (2, {}),
    "num_kv_heads": (4, {}),
    "head_dim": (10, {}),
    "norm": ("layernorm", {}),
    "norm_eps": (1e-2, {}),
    "activation": ("gelu_tanh", {}),
    "gated_mlp": (True, {}),
    "num_experts": (4, {}),
    "experts_per_token": (1, dict(num_experts=4, normalize_router=False)),
    "normalize_router": (False, dict(num_experts=4)),
    "shared_mlp_dim": (24, dict(num_experts=4)),
    "positions": ("learned", {}),
    "rope_theta": (100.0, {}),
    "qk_norm": (True, {}),
    "residual": ("post_norm", {}),
    "window": (3, {}),
    "position_offset": (2, dict(positions="learned")),
    "rope_fraction": (0.5, {}),
    "rope_interleaved": (True, {}),
    "rope_scaling": ((8.0, 1.0, 4.0, 4), {}),
    "bias": ("out", {}),
    "table_dim": (24, {}),
    "tie_embeddings": (True, {}),
    "init_std": (0.03, {}),
    "param_dtype": ("bfloat16", {}),
    "compute_dtype": ("bfloat16", {}),
    "attention": ("cudnn", {}),
    "remat": ("full", {}),
    "scan_unroll": (2, {}),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_every_field_moves_something(field):
    """Parameters or logits, unless it says how the model is executed; then it moves neither, but
    for rounding.
    """
    alternative, base = ALTERNATIVES[field]
    before, after = config(**base), config(**base | {field: alternative})
    assert getattr(before, field) != alternative
    if field == "attention":
        return  # cuDNN needs a GPU
    shape = lambda c: jax.tree.map(np.shape, drawn(c)[1])
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's attention promotes bfloat16 by itself
        difference = (
            np.abs(logits(*drawn(before)) - logits(*drawn(after))).max()
            if shape(before) == shape(after)
            else np.inf
        )
    if field in EXECUTION_FIELDS:
        assert difference < 0.5, f"{field} is more than execution"
    elif difference < 0.01:
        changed = jax.tree.map(lambda x, y: (x != y).any(), split(before)[1], split(after)[1])
        assert any(jax.tree.leaves(changed)), f"{field} moves nothing"


def test_execution_fields_are_fields():
    assert (
        set(EXECUTION_FIELDS)
        < {field.name for field in dataclasses.fields(Config)}
        == set(ALTERNATIVES)
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(norm="rms"), r"config.model.norm = 'rms'; valid: \['layernorm', 'rmsnorm'\]"),
        (
            dict(activation="swish"),
            r"config.model.activation = 'swish'; valid: \['gelu', 'gelu_tanh', 'relu', 'relu_squared', 'silu'\]",  # noqa: E501
        ),
        (
            dict(positions="alibi"),
            r"config.model.positions = 'alibi'; valid: \['learned', 'rope'\]",
        ),
        (
            dict(remat="all"),
            r"config.model.remat = 'all': \['all'\]; valid: \['none', 'full', 'dots'\], or names of \['query'",  # noqa: E501
        ),
        (dict(attention="flash"), r"config.model.attention = 'flash'; valid: \[.*'xla'.*\]"),
        (
            dict(param_dtype="float16"),
            r"config.model.param_dtype = 'float16'; valid: \['bfloat16', 'float32'\]",
        ),
        (
            dict(compute_dtype="float64"),
            r"config.model.compute_dtype = 'float64'; valid: \['bfloat16', 'float32'\]",
        ),
        (dict(compute_dtype="f32_please"), "config.model.compute_dtype = 'f32_please'; valid"),
        (
            dict(num_layers=0, mlp_dim=-3),
            "num_layers = 0, mlp_dim = -3|mlp_dim = -3, num_layers = 0",
        ),
        (dict(num_heads=4, num_kv_heads=3), "num_heads = 4 must be a multiple of num_kv_heads = 3"),
        (dict(head_dim=7), "head_dim = 7, rope_fraction = 1.0"),
        (dict(rope_fraction=0.0), "head_dim = 8, rope_fraction = 0.0"),
        (dict(rope_scaling=(8.0, 1.0)), r"rope_scaling = \(8.0, 1.0\); wanted \(\) or"),
        (
            dict(residual="sandwich"),
            r"config.model.residual = 'sandwich'; valid: \['parallel', 'post_norm', 'pre_norm'\]",
        ),
        (
            dict(bias="qkv,head"),
            r"config.model.bias = 'qkv,head': \['head'\]; valid: names of \['qkv', 'out', 'mlp', 'norm'\]",  # noqa: E501
        ),
        (dict(window=-1, table_dim=-2), "window = -1, table_dim = -2"),
        (
            dict(num_experts=4, experts_per_token=5),
            "experts_per_token = 5: wanted 1 to num_experts = 4",
        ),
        (dict(num_experts=4, bias="qkv,mlp"), "bias = 'qkv,mlp': experts have none"),
        (dict(shared_mlp_dim=8), "shared_mlp_dim = 8 needs num_experts"),
    ],
)
def test_config_errors_say_what_is_valid(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_preset_errors_list_the_names():
    with pytest.raises(ValueError, match="'gpt5'.*'gpt2'.*'llama2_7b'"):
        presets.get("gpt5")
    presets.get("gpt2")["num_layers"] = 1  # a copy
    assert presets.get("gpt2")["num_layers"] == 12


def test_tied_embeddings_are_one_parameter():
    """Its gradient is the sum of what look-up and head send, which with two tables of the same
    values go apart.
    """
    graphdef, params = drawn(config(tie_embeddings=True))
    assert "head" not in params and sum(p.shape == (40, 32) for p in jax.tree.leaves(params)) == 1
    apart_graphdef, _ = drawn(config())
    apart = params | {"head": params["embed"]}
    np.testing.assert_allclose(
        logits(graphdef, params), logits(apart_graphdef, apart), rtol=1e-5, atol=1e-5
    )
    tied = jit(jax.grad(functools.partial(loss, graphdef)))(params)["embed"]["table"]
    grads = jit(jax.grad(functools.partial(loss, apart_graphdef)))(apart)
    np.testing.assert_allclose(
        tied, grads["embed"]["table"] + grads["head"]["table"], rtol=1e-4, atol=1e-6
    )
    assert min(np.abs(grads[name]["table"]).max() for name in ("embed", "head")) > 1e-3


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("use_bias", [False, True])
def test_norms(norm, use_bias):
    """Computed in f32 whatever goes in, returned in what went in; large common offsets are no
    trouble.
    """
    layer = NORMS[norm](24, eps=0.01, use_bias=use_bias)
    p = {
        name: RNG.normal(size=24).astype(np.float32)
        for name in ("scale", "bias")
        if getattr(layer, name, None) is not None
    }
    assert ("bias" in p) == (use_bias and norm == "layernorm")
    for name, value in p.items():
        setattr(layer, name, nnx.Param(jnp.asarray(value), logical_axes=("embed",)))
    x = (RNG.normal(size=(2, 3, 24)) * 3 + 50).astype(np.float32)
    c = config(norm=norm, norm_eps=0.01)
    np.testing.assert_allclose(layer(x), _norm(c, p, x.astype(np.float64)), rtol=1e-4, atol=1e-4)
    low = jnp.asarray(x, jnp.bfloat16)
    assert layer(low).dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer(low), layer(low.astype(jnp.float32)).astype(jnp.bfloat16))
    np.testing.assert_array_equal(
        layer(jnp.zeros((1, 1, 24))),
        np.broadcast_to(np.asarray(p.get("bias", np.zeros(24)), np.float32), (1, 1, 24)),
    )


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    np.testing.assert_allclose(
        ACTIVATIONS[name](x), _activation(name, x.astype(np.float64)), rtol=1e-5, atol=1e-6
    )


def test_initial_weights():
    """Standard deviations as published, norms 1 and biases 0, every layer and every parameter with
    numbers of its own.
    """
    c = config(
        embed_dim=128,
        mlp_dim=128,
        num_layers=2,
        bias="qkv,out,mlp,norm",
        norm="layernorm",
        positions="learned",
    )
    params = split(c)[1]
    firsts = []
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "scale" in name or "bias" in name:
            assert (p == ("scale" in name)).all(), name
        else:
            residual = name.endswith("['out']") or name.endswith("['down']")
            assert p.std() == pytest.approx(c.init_std / (2.0 if residual else 1.0), rel=0.05), name
            assert abs(p.mean()) < 0.1 * c.init_std, name
            layers = p if "layers" in name else p[None]
            firsts += [
                round(float(layer.flat[0]) * (2.0 if residual else 1.0), 9) for layer in layers
            ]
    assert len(set(firsts)) == len(firsts) == 3 + 2 * 6


def test_low_precision():
    """Parameters have the dtype asked for (norms f32), logits are f32, the computation in bfloat16
    is close to that in f32.
    """
    graphdef, params = drawn(
        config(param_dtype="bfloat16", compute_dtype="bfloat16", bias="qkv,out,mlp,norm")
    )
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        assert p.dtype == (jnp.float32 if "norm" in jax.tree_util.keystr(path) else jnp.bfloat16), (
            path
        )
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's attention promotes bfloat16 by itself
        low = logits(graphdef, params)
        high = logits(drawn(config(param_dtype="bfloat16", bias="qkv,out,mlp,norm"))[0], params)
        hidden = jax.eval_shape(
            lambda params: nnx.merge(graphdef, params)(TOKENS, POSITIONS, SEGMENTS).hidden, params
        )
    assert low.dtype == np.float32 and hidden.dtype == jnp.bfloat16
    assert 0 < np.abs(low - high).max() < 0.15 * high.std()
    model = nnx.merge(graphdef, params)
    assert {x.dtype for x in jax.tree.leaves(model.init_cache(1, 4))} == {jnp.dtype(jnp.bfloat16)}


def test_gradients_of_matrices_are_not_rounded():
    """Computing in bfloat16, the gradient of an f32 matrix still has more digits than bfloat16
    holds.
    """
    graphdef, params = drawn(config(compute_dtype="bfloat16", gated_mlp=True))
    with jax.numpy_dtype_promotion("standard"):
        grads = jax.device_get(jit(jax.grad(functools.partial(loss, graphdef)))(params))
    for path, g in jax.tree_util.tree_leaves_with_path(grads["layers"]):
        if g.ndim > 2:
            assert np.mean(g == g.astype(jnp.bfloat16).astype(np.float32)) < 0.1, (
                jax.tree_util.keystr(path)
            )


def test_head_on_some_positions():
    graphdef, params = drawn(config())

    def call(params):
        model = nnx.merge(graphdef, params)
        output = model(TOKENS, POSITIONS, SEGMENTS)
        return model.logits(output.hidden)[:, 3], model.logits(output.hidden[:, 3]), output

    whole, one, output = jit(call)(params)
    assert output.cache is None and output.aux == {}
    np.testing.assert_allclose(whole, one, rtol=1e-4, atol=1e-5)


def test_loss_is_the_cross_entropy_of_weighted_targets():
    """Sums and counts over the weights alone, z_loss its own term, against softmax in float64."""
    graphdef, params = drawn(config())
    batch = BATCH | {
        "weights": np.where(RNG.random(TOKENS.shape) < 0.6, BATCH["weights"], 0).astype(np.float32)
    }
    z = logits(graphdef, params).astype(np.float64)
    log_z = np.log(np.exp(z).sum(-1))
    logprobs = np.take_along_axis(z, batch["targets"][..., None], axis=-1)[..., 0] - log_z
    got, got_z = jit(lambda p: causal.token_logprobs(nnx.merge(graphdef, p), batch))(params)
    np.testing.assert_allclose(got, logprobs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got_z, log_z, rtol=1e-4, atol=1e-4)
    total, count, terms = jit(
        lambda p: causal.make_loss(z_loss=0.1, chunk=0)(nnx.merge(graphdef, p), batch, None)
    )(params)
    nll, extra = -(logprobs * batch["weights"]).sum(), 0.1 * (log_z**2 * batch["weights"]).sum()
    np.testing.assert_allclose(
        [total, count, *terms["loss"], *terms["z_loss"]],
        [
            nll + extra,
            batch["weights"].sum(),
            nll,
            batch["weights"].sum(),
            extra,
            batch["weights"].sum(),
        ],
        rtol=1e-4,
    )


def test_router_balance():
    """Against its formula in numpy, layer by layer; padding doesn't count, and the loss takes it by
    its weight.
    """
    c = config(num_experts=5, experts_per_token=2, gated_mlp=True, num_layers=1)
    graphdef, params = drawn(c)
    found = jax.device_get(
        jit(lambda p: nnx.merge(graphdef, p)(TOKENS, POSITIONS, SEGMENTS).aux)(params)
    )
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    block = jax.tree.map(lambda w: w[0], p["layers"])
    probabilities, chosen = [], []
    for row in range(2):
        x = p["embed"]["table"][TOKENS[row]]
        x = x + _attention(
            c,
            block["attention"],
            _norm(c, block["attention_norm"], x),
            POSITIONS[row],
            SEGMENTS[row],
        )
        mass, weights = _router(c, block["mlp"], _norm(c, block["mlp_norm"], x))
        probabilities.append(mass[SEGMENTS[row] > 0])
        chosen.append(weights[SEGMENTS[row] > 0] > 0)
    share = np.concatenate(chosen).mean(0)
    wanted = 5 * (share * np.concatenate(probabilities).mean(0)).sum()
    tokens = (SEGMENTS > 0).sum()
    np.testing.assert_allclose(found["router_balance"], [wanted * tokens, tokens], rtol=1e-5)
    np.testing.assert_allclose(
        found["router_max_load"], [share.max() * 5 / 2 * tokens, tokens], rtol=1e-5
    )
    total = lambda weight: jit(
        lambda p: causal.make_loss(z_loss=0.0, chunk=0, balance_loss=weight)(
            nnx.merge(graphdef, p), BATCH, None
        )[0]
    )(params)
    totals = [total(0.0), total(0.5)]
    assert totals[1] - totals[0] == pytest.approx(0.5 * wanted * BATCH["weights"].sum(), rel=1e-3)


def test_balance_loss_needs_experts():
    graphdef, params = drawn(config())
    with pytest.raises(ValueError, match="balance_loss = 0.1 needs experts"):
        causal.make_loss(z_loss=0.0, chunk=0, balance_loss=0.1)(
            nnx.merge(graphdef, params), BATCH, None
        )
