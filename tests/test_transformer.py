"""The model against its formulas in numpy, its Config field by field, and its variants of execution
against each other.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lm.models import presets
from lm.models.transformer import EXECUTION_FIELDS, Config, Transformer
from lm.nn.layers import ACTIVATIONS, NORMS
from lm.objectives import causal
from tests.helpers import assert_trees_close, model_config, random_model, slow

RNG = np.random.default_rng(0)
# Two documents in each row, and padding at the end of the second.
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


def initial_params(config):
    """Parameters as a run draws them."""

    @jax.jit
    def init(key):
        return nnx.to_pure_dict(nnx.split(Transformer(config, key), nnx.Param)[1])

    return jax.device_get(init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params, keys=None):
    model = nnx.merge(graphdef, params)
    return model.logits(model(TOKENS, POSITIONS, SEGMENTS, keys_B=keys).hidden)


def mean_loss(graphdef, params):
    loss = causal.make_loss(z_loss=0.01, chunk=0)
    value, count, _ = loss(nnx.merge(graphdef, params), BATCH, None)
    return value / count


# The model in numpy and float64, a row at a time, as its papers have it. `c` is the Config and `p`
# the parameters of the part.


def reference_norm(c, p, x):
    if c.norm == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * p["scale"]
    centred = x - x.mean(-1, keepdims=True)
    normalised = centred / np.sqrt(x.var(-1, keepdims=True) + c.norm_eps)
    return normalised * p["scale"] + p.get("bias", 0)


def reference_activation(name, x):
    if name == "relu":
        return np.maximum(x, 0)
    if name == "relu_squared":
        return np.maximum(x, 0) ** 2
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise AssertionError(f"no formula for {name}")


def reference_frequencies(c, size):
    """Su et al. 2021, and the stretching of Llama 3.1: long waves slow down, short ones stay, and
    between them both are mixed.
    """
    frequency = c.rope_theta ** (-np.arange(size) / size)
    if not c.rope_scaling:
        return frequency

    factor, low, high, context = c.rope_scaling
    for i, f in enumerate(frequency):
        wavelength = 2 * math.pi / f
        if wavelength > context / low:
            frequency[i] = f / factor
        elif wavelength >= context / high:
            smooth = (context / wavelength - low) / (high - low)
            frequency[i] = (1 - smooth) * f / factor + smooth * f
    return frequency


def reference_rope(c, x, position):
    turning = int(c.head_dim * c.rope_fraction)
    if c.rope_interleaved:
        first, second = np.arange(0, turning, 2), np.arange(1, turning, 2)
    else:
        first, second = np.split(np.arange(turning), 2)

    # A rotation is the product with a complex number of length 1. What is left of a head stays.
    angles = position[:, None, None] * reference_frequencies(c, turning // 2)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)
    out = np.array(x)
    out[..., first] = turned.real
    out[..., second] = turned.imag
    return out


def reference_attention(c, p, x, position, segment):
    def project(name):
        return np.einsum("td,dnh->tnh", x, p[name]) + p.get(f"{name}_bias", 0)

    q, k, v = project("query"), project("key"), project("value")
    if c.qk_norm:
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + c.norm_eps) * p["query_norm"]["scale"]
        k = k / np.sqrt((k**2).mean(-1, keepdims=True) + c.norm_eps) * p["key_norm"]["scale"]
    if c.positions == "rope":
        q, k = reference_rope(c, q, position), reference_rope(c, k, position)

    # Query by query, over the keys that it sees: those of its segment, up to itself.
    place = np.arange(len(x))
    out = np.zeros_like(q)
    for t in range(len(x)):
        visible = (segment == segment[t]) & (place <= t)
        if c.window:
            visible &= t - place < c.window
        for head in range(c.num_heads):
            kv_head = head // (c.num_heads // c.num_kv_heads)
            scores = k[visible, kv_head] @ q[t, head] / math.sqrt(c.head_dim)
            out[t, head] = np.exp(scores) @ v[visible, kv_head] / np.exp(scores).sum()
    return np.einsum("tnh,nhd->td", out, p["out"]) + p.get("out_bias", 0)


def reference_mlp(c, p, x):
    up = x @ p["up"] + p.get("up_bias", 0)
    if c.gated_mlp:
        gate = x @ p["gate"] + p.get("gate_bias", 0)
        hidden = reference_activation(c.activation, gate) * up
    else:
        hidden = reference_activation(c.activation, up)
    return hidden @ p["down"] + p.get("down_bias", 0)


def reference_router(c, p, x):
    """(router_probs [T, E], the experts' factors [T, E], 0 for those not chosen)."""
    router_probs = np.exp(x @ p["router"])
    router_probs /= router_probs.sum(-1, keepdims=True)

    # Everything below the last chosen probability is left out.
    last_chosen = np.sort(router_probs)[:, [-c.experts_per_token]]
    factors = np.where(router_probs >= last_chosen, router_probs, 0)
    if c.normalize_router:
        factors = factors / factors.sum(-1, keepdims=True)
    return router_probs, factors


def reference_moe(c, p, x):
    _, factors = reference_router(c, p, x)
    # Every expert computes every token, and most results are multiplied by 0.
    matrices = [name for name in ("up", "gate", "down") if name in p]
    out = np.zeros_like(x)
    for e in range(c.num_experts):
        expert = {name: p[name][e] for name in matrices}
        out += factors[:, [e]] * reference_mlp(c, expert, x)

    if c.shared_mlp_dim:
        gate = 1 / (1 + np.exp(-x @ p["shared_gate"]))
        out += reference_mlp(c, p["shared"], x) * gate
    return out


def reference_block(c, p, x, position, segment):
    def attention(x):
        return reference_attention(c, p["attention"], x, position, segment)

    def mlp(x):
        return (reference_moe if c.num_experts else reference_mlp)(c, p["mlp"], x)

    def attention_norm(x):
        return reference_norm(c, p["attention_norm"], x)

    def mlp_norm(x):
        return reference_norm(c, p["mlp_norm"], x)

    if c.residual == "post_norm":
        x = attention_norm(x + attention(x))
        return mlp_norm(x + mlp(x))
    if c.residual == "parallel":
        return x + attention(attention_norm(x)) + mlp(mlp_norm(x))
    x = x + attention(attention_norm(x))
    return x + mlp(mlp_norm(x))


def reference_logits(c, params, tokens, position, segment):
    """Logits of one row."""
    p = optax.tree.cast(params, np.float64)
    # A table narrower than the model has projections on both sides (OPT-350M).
    identity = np.eye(c.table_dim or c.embed_dim)
    x = p["embed"]["table"][tokens] @ p.get("project_in", identity)
    if c.positions == "learned":
        x = x + p["position_embed"]["table"][position + c.position_offset]

    for layer in range(c.num_layers):
        block = jax.tree.map(operator.itemgetter(layer), p["layers"])
        x = reference_block(c, block, x, position, segment)

    # After the last layer's own norm there is no other.
    if c.residual != "post_norm":
        x = reference_norm(c, p["norm"], x)
    head = p["embed"] if c.tie_embeddings else p["head"]
    return x @ p.get("project_out", identity) @ head["table"].T


# What the families differ in, each part in at least one of them; "other" has what no family has.
FAMILIES = {
    "gpt2": dict(
        norm="layernorm",
        activation="gelu_tanh",
        positions="learned",
        bias="qkv,out,mlp,norm",
        tie_embeddings=True,
        num_kv_heads=4,
    ),
    "llama": dict(
        norm="rmsnorm", activation="silu", gated_mlp=True, rope_theta=500.0, num_kv_heads=2
    ),
    "other": dict(
        norm="layernorm",
        activation="relu_squared",
        norm_eps=0.1,
        num_kv_heads=1,
        head_dim=6,
        num_layers=3,
    ),
    "neox": dict(
        norm="layernorm",
        activation="gelu",
        residual="parallel",
        rope_fraction=0.5,
        bias="qkv,mlp,norm",
        num_kv_heads=4,
    ),
    "opt": dict(
        norm="layernorm",
        activation="relu",
        residual="post_norm",
        positions="learned",
        position_offset=2,
        table_dim=24,
        tie_embeddings=True,
        bias="out,norm",
    ),
    # With what Llama 3.1 does to the angles.
    "qwen": dict(
        gated_mlp=True,
        qk_norm=True,
        window=4,
        rope_theta=500.0,
        rope_scaling=(8.0, 1.0, 4.0, 24),
        bias="qkv,mlp",
    ),
    "glm": dict(gated_mlp=True, rope_fraction=0.5, rope_interleaved=True, head_dim=16),
    "mixtral": dict(gated_mlp=True, num_experts=4, experts_per_token=2),
    "qwen-moe": dict(
        gated_mlp=True,
        num_experts=5,
        experts_per_token=3,
        normalize_router=False,
        shared_mlp_dim=24,
        bias="qkv",
    ),
    "switch": dict(num_experts=3, experts_per_token=1, normalize_router=False, residual="parallel"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_its_formulas(family):
    c = model_config(**FAMILIES[family])
    graphdef, params = random_model(c)
    got = np.asarray(logits(graphdef, params))

    assert got.dtype == np.float32
    for row in range(2):
        wanted = reference_logits(c, params, TOKENS[row], POSITIONS[row], SEGMENTS[row])
        np.testing.assert_allclose(got[row], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        dict(gated_mlp=True, bias="qkv,out,mlp,norm"),
        slow(
            dict(
                norm="layernorm", positions="learned", bias="qkv,out,mlp,norm", tie_embeddings=True
            )
        ),
        slow(dict(residual="post_norm", table_dim=24, qk_norm=True, window=5)),
        slow(dict(residual="parallel", rope_fraction=0.5, rope_interleaved=True)),
        slow(dict(gated_mlp=True, num_experts=4, experts_per_token=4)),
        # All experts take every token, so that the choice has no edge that a difference may cross.
        dict(num_experts=3, experts_per_token=3, normalize_router=False, shared_mlp_dim=24),
    ],
)
def test_gradient_is_the_slope(changes):
    """Of every parameter, by central differences along a random direction: no backward pass of our
    own may differ from its forward pass.
    """
    graphdef, params = random_model(model_config(**changes))
    loss_and_grads = jax.jit(jax.value_and_grad(functools.partial(mean_loss, graphdef)))
    grads = jax.device_get(loss_and_grads(params)[1])
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(2)

    for i, (path, grad) in enumerate(jax.tree_util.tree_leaves_with_path(grads)):
        # Mostly along the gradient, or f32 could not tell the slope from rounding.
        noise = rng.normal(size=grad.shape) / math.sqrt(grad.size)
        direction = (grad / np.linalg.norm(grad) + 0.5 * noise).astype(np.float32)
        above = leaves[:i] + [leaves[i] + np.float32(0.01) * direction] + leaves[i + 1 :]
        below = leaves[:i] + [leaves[i] - np.float32(0.01) * direction] + leaves[i + 1 :]

        rise = float(loss_and_grads(structure.unflatten(above))[0]) - float(
            loss_and_grads(structure.unflatten(below))[0]
        )
        wanted = np.vdot(grad, direction)
        name = jax.tree_util.keystr(path)
        assert rise / 0.02 == pytest.approx(wanted, rel=0.02, abs=2e-4), name


@pytest.mark.parametrize(
    "changes",
    [dict(bias="qkv,out,mlp,norm"), slow(dict(num_experts=4))],
    ids=["dense", "experts"],
)
def test_remat_changes_memory_only(changes):
    """Loss and gradients are those without; and what the backward pass keeps is really less, or the
    test would prove nothing.
    """
    results, num_saved = {}, {}
    for remat in ("none", "dots", "full", "query,up", "query,up:host"):
        graphdef, params = random_model(model_config(remat=remat, **changes))
        loss = functools.partial(mean_loss, graphdef)
        results[remat] = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
        _, backward = jax.eval_shape(functools.partial(jax.vjp, loss), params)
        num_saved[remat] = sum(x.size for x in jax.tree.leaves(backward))

    for remat in ("dots", "full", "query,up", "query,up:host"):
        assert_trees_close(results[remat], results["none"], rtol=1e-4, atol=1e-6)
    assert num_saved["full"] < 0.9 * num_saved["dots"] < 0.8 * num_saved["none"], num_saved


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
    "visible": ("full", {}),
    "embed_norm": (True, {}),
    "token_types": (2, {}),
    "head_transform": (True, {}),
    "rope_fraction": (0.5, {}),
    "rope_interleaved": (True, {}),
    "rope_scaling": ((8.0, 1.0, 4.0, 4), {}),
    "bias": ("out", {}),
    "table_dim": (24, {}),
    "tie_embeddings": (True, {}),
    "heads": ("classes:3", {}),
    "dropout": (0.5, {}),
    "attention_dropout": (0.5, {}),
    "lora_rank": (4, {}),
    "lora_alpha": (30.0, dict(lora_rank=4)),
    "lora_scaling": ("rslora", dict(lora_rank=4)),
    "lora_targets": ("query,up", dict(lora_rank=4)),
    "quantize": ("nf4", dict(lora_rank=4, mlp_dim=64, num_heads=8, num_kv_heads=8, head_dim=8)),
    "init_std": (0.03, {}),
    "param_dtype": ("bfloat16", {}),
    "compute_dtype": ("bfloat16", {}),
    "attention": ("cudnn", {}),
    "remat": ("full", {}),
    "scan_unroll": (2, {}),
}


def largest_difference(before, after):
    """The largest difference of two Configs' logits, with keys for dropout; infinite if their
    parameters differ in shape or structure.
    """
    graphdef, params = random_model(before)
    other_graphdef, other_params = random_model(after)
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, other_params):
        return np.inf

    # JAX's attention promotes bfloat16 by itself.
    with jax.numpy_dtype_promotion("standard"):
        keys = jax.random.split(jax.random.key(0), len(TOKENS))
        before_logits = logits(graphdef, params, keys)
        return np.abs(before_logits - logits(other_graphdef, other_params, keys)).max()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config)])
def test_every_field_moves_something(field):
    """Parameters or logits, unless it says how the model is executed; then it moves neither, but
    for rounding.
    """
    alternative, base = ALTERNATIVES[field]
    before = model_config(**base)
    after = model_config(**base | {field: alternative})
    assert getattr(before, field) != alternative
    # cuDNN needs a GPU.
    if field == "attention":
        return

    difference = largest_difference(before, after)
    if field in EXECUTION_FIELDS:
        assert difference < 0.5, f"{field} is more than execution"
    elif difference < 0.01:
        # Some fields move nothing but the parameters' initial values.
        changed = jax.tree.map(
            lambda x, y: (x != y).any(), initial_params(before), initial_params(after)
        )
        assert any(jax.tree.leaves(changed)), f"{field} moves nothing"


def test_dropout_is_off_without_keys():
    graphdef, params = random_model(model_config(dropout=0.5, attention_dropout=0.5))
    plain, _ = random_model(model_config())
    np.testing.assert_array_equal(logits(graphdef, params), logits(plain, params))


def test_heads():
    config = model_config(heads="scalar,classes:3")
    graphdef, params = random_model(config)
    model = nnx.merge(graphdef, params)
    hidden = jax.random.normal(jax.random.key(0), (2, 5, config.embed_dim))

    weight = np.asarray(params["heads"]["classes"]["weight"])
    outputs = model.head_outputs("classes", hidden)
    np.testing.assert_allclose(outputs, hidden @ weight, rtol=1e-5, atol=1e-6)
    assert model.head_outputs("scalar", hidden[:, 0]).shape == (2, 1)
    with pytest.raises(ValueError, match="no head 'token_labels'; config.model.heads = 'scalar"):
        model.head_outputs("token_labels", hidden)

    # The other weights are those of a model without heads.
    with_heads = initial_params(config)
    assert with_heads.pop("heads").keys() == {"scalar", "classes"}
    without = initial_params(model_config())
    jax.tree.map(np.testing.assert_array_equal, with_heads, without)


def test_execution_fields_are_fields():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert fields == set(ALTERNATIVES)
    assert set(EXECUTION_FIELDS) < fields


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(norm="rms"), r"config.model.norm = 'rms'; valid: \['layernorm', 'rmsnorm'\]"),
        (
            dict(activation="swish"),
            r"config.model.activation = 'swish'; "
            r"valid: \['gelu', 'gelu_tanh', 'relu', 'relu_squared', 'silu'\]",
        ),
        (
            dict(positions="alibi"),
            r"config.model.positions = 'alibi'; valid: \['learned', 'rope'\]",
        ),
        (
            dict(remat="all"),
            r"config.model.remat = 'all': \['all'\]; "
            r"valid: \['none', 'full', 'dots'\], or names of \['query'",
        ),
        (dict(attention="flash"), r"config.model.attention = 'flash'; valid: \[.*'xla'.*\]"),
        (
            dict(param_dtype="float16"),
            r"config.model.param_dtype = 'float16'; valid: \['bfloat16', 'float32'\]",
        ),
        (
            dict(compute_dtype="float64"),
            r"config.model.compute_dtype = 'float64'; valid: \['', 'bfloat16', 'float32'\]",
        ),
        (dict(compute_dtype="f32_please"), "config.model.compute_dtype = 'f32_please'; valid"),
        (
            dict(num_layers=0, mlp_dim=-3),
            "config.model.num_layers = 0; wanted 1 to 4096\n"
            "config.model.mlp_dim = -3; wanted 1 to 1048576",
        ),
        (
            dict(num_heads=4, num_kv_heads=3),
            "num_heads = 4 must be a multiple of config.model.num_kv_heads = 3",
        ),
        (dict(head_dim=7), "head_dim = 7, rope_fraction = 1.0"),
        (dict(rope_fraction=0.0), "rope_fraction = 0.0; wanted at most 1 and above 0"),
        (dict(rope_scaling=(8.0, 1.0)), r"rope_scaling = \(8.0, 1.0\); wanted \(\) or"),
        (
            dict(residual="sandwich"),
            r"config.model.residual = 'sandwich'; valid: \['parallel', 'post_norm', 'pre_norm'\]",
        ),
        (
            dict(bias="qkv,table"),
            r"config.model.bias = 'qkv,table': \['table'\]; "
            r"valid: names of \['qkv', 'out', 'mlp', 'norm', 'head'\]",
        ),
        (dict(attention_dropout=0.1, attention="splash"), "attention_dropout = 0.1 needs"),
        (dict(window=-1), "window = -1; wanted 0 to"),
        (dict(heads="classes"), r"heads = 'classes': 'classes'; valid.*\"classes:N\""),
        (dict(heads="scalar:2"), "heads = 'scalar:2'"),
        (dict(heads="classes:0"), f"'classes:0'; wanted 1 to {2**20}"),
        (dict(heads="scalar,scalar"), "heads = 'scalar,scalar': 'scalar'"),
        (dict(compute_dtype=""), "compute_dtype = ''"),
        (
            dict(num_experts=4, experts_per_token=5),
            "experts_per_token = 5: wanted 1 to config.model.num_experts = 4",
        ),
        (dict(num_experts=4, bias="qkv,mlp"), "bias = 'qkv,mlp': experts have none"),
        (dict(shared_mlp_dim=8), "shared_mlp_dim = 8 needs num_experts"),
    ],
)
def test_config_errors_say_what_is_valid(changes, message):
    with pytest.raises(ValueError, match=message):
        model_config(**changes)


def test_preset_errors_list_the_names():
    with pytest.raises(ValueError, match="'gpt5'.*'gpt2'.*'llama2_7b'"):
        presets.get("gpt5")


def test_presets_are_copies():
    presets.get("gpt2")["num_layers"] = 1
    assert presets.get("gpt2")["num_layers"] == 12


def test_tied_embeddings_are_one_parameter():
    """Its gradient is the sum of what look-up and head send, which with two tables of the same
    values go apart.
    """
    graphdef, params = random_model(model_config(tie_embeddings=True))
    assert "head" not in params
    assert sum(p.shape == (40, 32) for p in jax.tree.leaves(params)) == 1

    # The same values in two tables.
    untied_graphdef, _ = random_model(model_config())
    untied = params | {"head": params["embed"]}
    np.testing.assert_allclose(
        logits(graphdef, params), logits(untied_graphdef, untied), rtol=1e-5, atol=1e-5
    )

    grads = jax.jit(jax.grad(functools.partial(mean_loss, graphdef)))(params)
    untied_grads = jax.jit(jax.grad(functools.partial(mean_loss, untied_graphdef)))(untied)
    look_up, head = untied_grads["embed"]["table"], untied_grads["head"]["table"]
    np.testing.assert_allclose(grads["embed"]["table"], look_up + head, rtol=1e-4, atol=1e-6)
    assert np.abs(look_up).max() > 1e-3
    assert np.abs(head).max() > 1e-3


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("use_bias", [False, True])
def test_norms(norm, use_bias):
    """Computed in f32 whatever goes in, returned in what went in; large common offsets are no
    trouble.
    """
    layer = NORMS[norm](24, eps=0.01, use_bias=use_bias)
    names = [name for name in ("scale", "bias") if getattr(layer, name, None) is not None]
    assert ("bias" in names) == (use_bias and norm == "layernorm")
    p = {name: RNG.normal(size=24).astype(np.float32) for name in names}
    for name, value in p.items():
        setattr(layer, name, nnx.Param(jnp.asarray(value), logical_axes=("embed",)))

    x = (RNG.normal(size=(2, 3, 24)) * 3 + 50).astype(np.float32)
    wanted = reference_norm(model_config(norm=norm, norm_eps=0.01), p, x.astype(np.float64))
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-4, atol=1e-4)

    low = jnp.asarray(x, jnp.bfloat16)
    assert layer(low).dtype == jnp.bfloat16
    np.testing.assert_array_equal(layer(low), layer(low.astype(jnp.float32)).astype(jnp.bfloat16))

    # Zeros have no scale to divide by, but for eps.
    bias = np.asarray(p.get("bias", np.zeros(24)), np.float32)
    zeros = jnp.zeros((1, 1, 24))
    np.testing.assert_array_equal(layer(zeros), np.broadcast_to(bias, zeros.shape))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    wanted = reference_activation(name, x.astype(np.float64))
    np.testing.assert_allclose(ACTIVATIONS[name](x), wanted, rtol=1e-5, atol=1e-6)


def test_initial_weights():
    """Standard deviations as published, norms 1 and biases 0, every layer and every parameter with
    numbers of its own.
    """
    c = model_config(
        embed_dim=128,
        mlp_dim=128,
        num_layers=2,
        bias="qkv,out,mlp,norm",
        norm="layernorm",
        positions="learned",
    )
    first_numbers = []
    for path, p in jax.tree_util.tree_leaves_with_path(initial_params(c)):
        name = jax.tree_util.keystr(path)
        if "scale" in name or "bias" in name:
            assert (p == ("scale" in name)).all(), name
            continue

        # GPT-2 divides what ends in the residual stream by sqrt(2 L), here 2.
        divisor = 2.0 if name.endswith(("['out']", "['down']")) else 1.0
        assert p.std() == pytest.approx(c.init_std / divisor, rel=0.05), name
        assert abs(p.mean()) < 0.1 * c.init_std, name
        for layer in p if "layers" in name else p[None]:
            first_numbers.append(round(float(layer.flat[0]) * divisor, 9))

    # Two tables and the positions, and six matrices of each layer.
    assert len(set(first_numbers)) == len(first_numbers) == 3 + 2 * 6


def test_low_precision():
    """Parameters have the dtype asked for (norms f32), logits are f32, the computation in bfloat16
    is close to that in f32.
    """
    changes = dict(param_dtype="bfloat16", bias="qkv,out,mlp,norm")
    graphdef, params = random_model(model_config(compute_dtype="bfloat16", **changes))
    f32_graphdef, _ = random_model(model_config(**changes))
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        is_norm = "norm" in jax.tree_util.keystr(path)
        assert p.dtype == (jnp.float32 if is_norm else jnp.bfloat16), path

    def hidden(params):
        return nnx.merge(graphdef, params)(TOKENS, POSITIONS, SEGMENTS).hidden

    # JAX's attention promotes bfloat16 by itself.
    with jax.numpy_dtype_promotion("standard"):
        low = np.asarray(logits(graphdef, params))
        high = np.asarray(logits(f32_graphdef, params))
        assert jax.eval_shape(hidden, params).dtype == jnp.bfloat16
    assert low.dtype == np.float32
    assert 0 < np.abs(low - high).max() < 0.15 * high.std()

    cache = nnx.merge(graphdef, params).init_cache(1, 4)
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}


def test_gradients_of_matrices_are_not_rounded():
    """Computing in bfloat16, the gradient of an f32 matrix still has more digits than bfloat16
    holds.
    """
    graphdef, params = random_model(model_config(compute_dtype="bfloat16", gated_mlp=True))
    # JAX's attention promotes bfloat16 by itself.
    with jax.numpy_dtype_promotion("standard"):
        grads = jax.device_get(jax.jit(jax.grad(functools.partial(mean_loss, graphdef)))(params))

    # Stacked matrices have three dims or more, norms and biases fewer.
    for path, grad in jax.tree_util.tree_leaves_with_path(grads["layers"]):
        if grad.ndim > 2:
            rounded = grad.astype(jnp.bfloat16).astype(np.float32)
            assert np.mean(grad == rounded) < 0.1, jax.tree_util.keystr(path)


def test_head_on_some_positions():
    graphdef, params = random_model(model_config())

    @jax.jit
    def call(params):
        model = nnx.merge(graphdef, params)
        output = model(TOKENS, POSITIONS, SEGMENTS)
        return model.logits(output.hidden)[:, 3], model.logits(output.hidden[:, 3]), output

    # The head takes each position by itself, so it may be asked about one alone.
    of_all, of_one, output = call(params)
    assert output.cache is None
    assert output.aux == {}
    np.testing.assert_allclose(of_all, of_one, rtol=1e-4, atol=1e-5)


def test_loss_is_the_cross_entropy_of_weighted_targets():
    """Sums and counts over the weights alone, z_loss its own term, against softmax in float64."""
    graphdef, params = random_model(model_config())
    weights = np.where(RNG.random(TOKENS.shape) < 0.6, BATCH["weights"], 0).astype(np.float32)
    batch = BATCH | {"weights": weights}

    # log p = z - log Z.
    z = np.asarray(logits(graphdef, params), np.float64)
    log_z = np.log(np.exp(z).sum(-1))
    logprobs = np.take_along_axis(z, batch["targets"][..., None], axis=-1)[..., 0] - log_z

    @jax.jit
    def token_logprobs(params):
        return causal.token_logprobs(nnx.merge(graphdef, params), batch)

    got_logprobs, got_log_z = token_logprobs(params)
    np.testing.assert_allclose(got_logprobs, logprobs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got_log_z, log_z, rtol=1e-4, atol=1e-4)

    @jax.jit
    def loss(params):
        return causal.make_loss(z_loss=0.1, chunk=0)(nnx.merge(graphdef, params), batch, None)

    # The total is both terms, each a sum over the weights.
    total, count, terms = loss(params)
    nll = -(logprobs * weights).sum()
    z_loss = 0.1 * (log_z**2 * weights).sum()
    np.testing.assert_allclose([total, count], [nll + z_loss, weights.sum()], rtol=1e-4)
    np.testing.assert_allclose(terms["loss"], [nll, weights.sum()], rtol=1e-4)
    np.testing.assert_allclose(terms["z_loss"], [z_loss, weights.sum()], rtol=1e-4)


def test_router_balance():
    """Against its formula in numpy, layer by layer; padding doesn't count, and the loss takes it by
    its weight.
    """
    c = model_config(num_experts=5, experts_per_token=2, gated_mlp=True, num_layers=1)
    graphdef, params = random_model(c)

    # The one layer's router, computed by hand for the tokens that are not padding.
    p = optax.tree.cast(params, np.float64)
    block = jax.tree.map(operator.itemgetter(0), p["layers"])
    router_probs, chosen = [], []
    for row in range(2):
        x = p["embed"]["table"][TOKENS[row]]
        normed = reference_norm(c, block["attention_norm"], x)
        x = x + reference_attention(c, block["attention"], normed, POSITIONS[row], SEGMENTS[row])
        normed = reference_norm(c, block["mlp_norm"], x)
        row_probs, factors = reference_router(c, block["mlp"], normed)
        valid = SEGMENTS[row] > 0
        router_probs.append(row_probs[valid])
        chosen.append(factors[valid] > 0)

    # Fedus et al. 2021: E times the sum of (share of tokens) x (mean probability); and the busiest
    # expert's load relative to an even one.
    load = np.concatenate(chosen).mean(0)
    balance = 5 * (load * np.concatenate(router_probs).mean(0)).sum()
    max_load = load.max() * 5 / 2
    num_tokens = (SEGMENTS > 0).sum()

    @jax.jit
    def aux(params):
        return nnx.merge(graphdef, params)(TOKENS, POSITIONS, SEGMENTS).aux

    got = jax.device_get(aux(params))
    np.testing.assert_allclose(got["router_balance"], [balance * num_tokens, num_tokens], rtol=1e-5)
    np.testing.assert_allclose(
        got["router_max_load"], [max_load * num_tokens, num_tokens], rtol=1e-5
    )

    def total(balance_loss):
        loss = causal.make_loss(z_loss=0.0, chunk=0, balance_loss=balance_loss)

        @jax.jit
        def value(params):
            return loss(nnx.merge(graphdef, params), BATCH, None)[0]

        return value(params)

    # A mean over tokens joins a sum over targets: it is multiplied by their number.
    added = total(0.5) - total(0.0)
    assert added == pytest.approx(0.5 * balance * BATCH["weights"].sum(), rel=1e-3)


def test_balance_loss_needs_experts():
    graphdef, params = random_model(model_config())
    loss = causal.make_loss(z_loss=0.0, chunk=0, balance_loss=0.1)
    with pytest.raises(ValueError, match="balance_loss = 0.1 needs experts"):
        loss(nnx.merge(graphdef, params), BATCH, None)
