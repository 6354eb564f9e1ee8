"""Recurrent models: their cells step by step, rows as texts alone, decoding, answers, and runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import build, sharding
from lm import config as config_lib
from lm.decoding.generator import Generator
from lm.decoding.sampling import Sampling, row_keys
from lm.evals import entries
from lm.evals.predict import PredictFns, Prompt, Question
from lm.hf import torch_recurrent
from lm.models import recurrent
from lm.models.recurrent import Config, Recurrent
from lm.objectives import causal
from tests.helpers import VERBALIZER, assert_trees_close, run_training, slow

VOCAB = 19
SHAPE = (3, 12)
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12, [0] * 2 + [1] * 10], np.int32)
POSITIONS = np.array([[*range(5), *range(4), 0, 0, 0], [*range(12)], [0, 0, *range(10)]], np.int32)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, SHAPE).astype(np.int32)


def make_config(**changes):
    fields = config_lib.model(
        "lm.models.recurrent",
        vocab_size=VOCAB,
        embed_dim=8,
        hidden_dim=12,
        param_dtype="float32",
        compute_dtype="float32",
    ).to_dict()
    del fields["type"]
    return Config(**fields | changes)


@functools.cache
def random_model(**changes):
    """(graphdef, parameters large enough for every part to matter)."""
    config = make_config(**changes)

    def init():
        return Recurrent(config, jax.random.key(0))

    graphdef, abstract = nnx.split(nnx.eval_shape(init), nnx.Param)
    rng = np.random.default_rng(1)

    def draw(leaf):
        return rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype)

    return graphdef, jax.tree.map(draw, nnx.to_pure_dict(abstract))


def hidden(graphdef, params, tokens=TOKENS, positions=POSITIONS, segments=SEGMENTS, keys=None):
    model = nnx.merge(graphdef, params)
    return model(tokens, positions, segments, keys_B=keys).hidden


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(cell, params, tokens):
    """Hidden states of one text, by the papers' equations, a unit and a step at a time."""
    x_TD = np.asarray(params["embed"]["table"])[tokens]
    for number in sorted(params["layers"]):
        layer = params["layers"][number]
        units = layer["state_weight"].shape[0]
        h, c = np.zeros(units), np.zeros(units)
        outputs = []
        for x in x_TD:
            x_gates = np.einsum("d,dgh->gh", x, layer["input_weight"]) + layer["bias"]
            h_gates = np.einsum("h,hgk->gk", h, layer["state_weight"])
            if cell == "lstm":
                i, f, g, o = x_gates + h_gates
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            elif cell == "gru":
                r, z = sigmoid(x_gates[:2] + h_gates[:2])
                n = np.tanh(x_gates[2] + r * (h_gates[2] + layer["candidate_bias"]))
                h = (1 - z) * n + z * h
            else:
                h = np.tanh(x_gates + h_gates)[0]
            outputs.append(h)
        x_TD = np.stack(outputs)
    return x_TD


CELLS = list(recurrent.CELLS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_each_text_is_read_by_itself(cell, tied):
    """By the equations, whatever stands before and behind it in a row, on both sides of padding."""
    graphdef, params = random_model(cell=cell, tie_embeddings=tied)
    got = np.asarray(jax.jit(functools.partial(hidden, graphdef))(params))
    for row in range(3):
        for number in range(1, SEGMENTS[row].max() + 1):
            places = SEGMENTS[row] == number
            wanted = by_hand(cell, params, TOKENS[row][places])
            np.testing.assert_allclose(got[row][places], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_the_gradient_is_the_loops(cell):
    """The backward rule of the scan against JAX's own derivative of a plain loop."""
    graphdef, params = random_model(cell=cell)
    weights = np.random.default_rng(2).normal(size=(*SHAPE, 8)).astype(np.float32)
    weights *= (SEGMENTS > 0)[..., None]

    def plain(params):
        x_BTD = params["embed"]["table"][TOKENS]
        for number in sorted(params["layers"]):
            layer = params["layers"][number]
            zeros = jnp.zeros((3, layer["state_weight"].shape[0]))
            state = recurrent.State(zeros, zeros if cell == "lstm" else None)
            outputs = []
            for t in range(SHAPE[1]):
                inputs = jnp.einsum("bd,dgh->bgh", x_BTD[:, t], layer["input_weight"])
                start, valid = POSITIONS[:, t] == 0, SEGMENTS[:, t] > 0
                begun = jax.tree.map(lambda s: jnp.where(start[:, None], 0.0, s), state)  # noqa: B023
                h_gates = jnp.einsum("bh,hgk->bgk", begun.hidden, layer["state_weight"])
                if cell == "gru":
                    h_gates = h_gates.at[:, -1].add(layer["candidate_bias"][None])
                inputs = inputs + layer["bias"][None]
                new = recurrent.CELLS[cell].update(inputs, h_gates, begun)
                state = jax.tree.map(lambda n, s: jnp.where(valid[:, None], n, s), new, state)  # noqa: B023
                outputs.append(state.hidden)
            x_BTD = jnp.stack(outputs, axis=1)
        return jnp.sum(x_BTD * weights)

    def ours(params):
        return jnp.sum(hidden(graphdef, params) * weights)

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert_trees_close(grads, wanted_grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_decoding_is_reading(cell):
    """The greedy text of a batch of unequal prompts, each as reading it anew gives it."""
    graphdef, params = random_model(cell=cell)
    model = nnx.merge(graphdef, params)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    generator = Generator(
        model.config,
        graphdef,
        params,
        mesh,
        Sampling(temperature=0.0),
        stop_ids=[-1],
        vocab_size=VOCAB,
    )
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    texts = generator.generate(prompts, 6, keys_B=row_keys([0, 0, 0]))
    for prompt, text in zip(prompts, texts):
        ids = list(prompt)
        for token in text:
            states = by_hand(cell, params, np.array(ids))
            assert token == int(np.argmax(states[-1] @ params["embed"]["table"].T))
            ids.append(token)


def test_answers_are_those_of_plain_rows():
    """A row can't branch: words of one token share one, others have their own."""
    graphdef, params = random_model(cell="gru")
    objective = build.make_objective(config_lib.default())
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    eval_fns = build.make_eval_fns(graphdef, objective, mesh, branches=False)
    fns = PredictFns(eval_fns, batch_size=4, length=16)
    words = [[1], [2, 3], [4], [2, 5], [2, 3, 4]]
    prompts = [[1, 2], [3, 4, 5]]
    answers = fns.logprobs(params, [Question(Prompt(ids), words) for ids in prompts])
    table = params["embed"]["table"]
    for prompt, of_prompt in zip(prompts, answers):
        for word, answer in zip(words, of_prompt, strict=True):
            logits = by_hand("gru", params, np.array([*prompt, *word])) @ table.T
            logprobs = np.asarray(jax.nn.log_softmax(logits))
            places = range(len(prompt) - 1, len(prompt) + len(word) - 1)
            wanted = [logprobs[place, token] for place, token in zip(places, word)]
            np.testing.assert_allclose(answer.logprobs, wanted, rtol=1e-4, atol=1e-5)


def test_dropout_is_a_function_of_the_row():
    graphdef, params = random_model(dropout=0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    dropped = hidden(graphdef, params, keys=keys)
    plain, _ = random_model()
    np.testing.assert_array_equal(hidden(graphdef, params), hidden(plain, params))
    assert np.abs(dropped - hidden(graphdef, params)).max() > 0.1
    last = hidden(graphdef, params, TOKENS[2:], POSITIONS[2:], SEGMENTS[2:], keys[2:])
    np.testing.assert_allclose(last[0], dropped[2], rtol=1e-5, atol=1e-6)


FIELDS = {
    "cell": "gru",
    "vocab_size": 23,
    "num_layers": 3,
    "embed_dim": 10,
    "hidden_dim": 14,
    "embed_scale": True,
    "tie_embeddings": False,
    "head_bias": True,
    "dropout": 0.5,
    "init_std": 0.2,
    "param_dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "context_length": 64,
    # Of a model that reads sources: tests/test_encdec.py.
    "source_length": 32,
    "encoder_layers": 2,
    "start_id": 3,
}


def test_every_field_is_used():
    assert set(FIELDS) == {f for f in config_lib.model("lm.models.recurrent") if f != "type"}
    shapes = {}
    for field, value in ({"": None} | FIELDS).items():
        config = make_config(**{field: value} if field else {})
        model = nnx.split(Recurrent(config, jax.random.key(0)), nnx.Param)[1]
        leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(model))
        shapes[field] = [(str(path), leaf.shape, leaf.dtype) for path, leaf in leaves]
    by_shape = ("cell", "vocab_size", "num_layers", "embed_dim", "hidden_dim", "tie_embeddings")
    for field in (*by_shape, "head_bias", "param_dtype", "source_length"):
        assert shapes[field] != shapes[""], field


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(cell="qrnn"), r"config.model.cell = 'qrnn'; valid: \['gru', 'lstm', 'rnn'\]"),
        (dict(hidden_dim=0), "config.model.hidden_dim = 0; wanted 1 to"),
        (dict(vocab_size=0), "a model of its own needs both"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_the_embedding_is_scaled():
    graphdef, params = random_model(embed_scale=True)
    scaled = params | dict(embed=dict(table=params["embed"]["table"] * np.float32(8**0.5)))
    plain, _ = random_model()
    np.testing.assert_allclose(hidden(graphdef, params), hidden(plain, scaled), atol=1e-6)


def test_flops_are_those_of_the_matmuls():
    config = make_config(num_layers=2)
    weights = 4 * (12 * (8 + 12) + 8 * (12 + 8)) + VOCAB * 8
    assert recurrent.flops_per_token(config, 100) == 6 * weights
    assert recurrent.flops_per_token(config, 10, backward=False) == 2 * weights

    # With a source of twice the length, of 2 x 12 values a token.
    config = make_config(num_layers=2, source_length=20)
    decoder = 4 * (12 * (8 + 12) + 8 * (12 + 24 + 8)) + VOCAB * 8
    look_ups = (12 + 8) * 24 + 2 * 2 * 20 * 24 + (8 + 24) * 8
    encoder = 2 * 4 * 12 * (8 + 12)
    got = recurrent.flops_per_token(config, 10, backward=False, source_length=20)
    assert got == 2 * (decoder + look_ups + 2 * encoder)


# --- weights of torch.nn ---


@pytest.mark.parametrize("cell", CELLS)
def test_state_dicts_go_there_and_back(cell):
    _, params = random_model(cell=cell)
    config = make_config(cell=cell)
    state_dict = torch_recurrent.write_cells(params["layers"], config)
    again = torch_recurrent.read_cells(state_dict, config)
    assert_trees_close(again, params["layers"], rtol=0, atol=0)


def test_the_gates_order_is_taken_for_granted():
    """Gates in another order are other weights, of another function: no array tells them apart."""
    graphdef, params = random_model()
    state_dict = torch_recurrent.write_cells(params["layers"], make_config())
    turned = {}
    for name, array in state_dict.items():
        turned[name] = np.roll(array.reshape(4, -1, *array.shape[1:]), 1, axis=0).reshape(
            array.shape
        )
    layers = torch_recurrent.read_cells(turned, make_config())
    np.testing.assert_array_equal(
        layers[0]["bias"], np.roll(params["layers"][0]["bias"], 1, axis=0)
    )
    other = hidden(graphdef, params | dict(layers=layers))
    assert np.abs(np.asarray(other - hidden(graphdef, params))).max() > 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("bias_hh_l1"), r"lacks \['bias_hh_l1'\]"),
        (
            lambda d: d.update(weight_ih_l0_reverse=d["weight_ih_l0"]),
            r"has \['weight_ih_l0_reverse'\], which is not known",
        ),
        (
            lambda d: d.update(weight_ih_l0=d["weight_ih_l0"][:36]),
            r"weight_ih_l0 is \(36, 8\); wanted \(48, 8\), those of torch.nn's lstm",
        ),
    ],
)
def test_other_state_dicts(change, message):
    _, params = random_model()
    state_dict = torch_recurrent.write_cells(params["layers"], make_config())
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        torch_recurrent.read_cells(state_dict, make_config())


# --- runs ---


def configure(tiny, **changes):
    c = tiny.copy_and_resolve_references().unlock()
    fields = dict(embed_dim=16, hidden_dim=24, context_length=64, param_dtype="float32")
    c.model = config_lib.model("lm.models.recurrent", **fields | changes)
    c.evals.text = entries.perplexity(every=3, batch_size=8)
    c.evals.label = entries.classification(VERBALIZER, every=0, batch_size=8)
    return c


@pytest.mark.usefixtures("fast_runs")
def test_a_recurrent_model_is_trained(tiny, tmp_path):
    metrics = run_training(configure(tiny), tmp_path / "run")
    assert metrics["train/loss"] < 5.6
    assert metrics["eval/label/examples"] > 0


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize("fsdp", ["partitioner", slow("by_hand")])
def test_any_mesh_is_one_device(tiny, tmp_path, fsdp):
    wanted = run_training(configure(tiny, cell="gru", dropout=0.0), tmp_path / "one")
    config = configure(tiny, cell="gru", dropout=0.0)
    config.mesh.update(dict(data=2, fsdp=2, fsdp2=2 if fsdp == "by_hand" else 1))
    config.mesh.tensor = 1 if fsdp == "by_hand" else 2
    config.train.update(dict(fsdp=fsdp, accumulation=1))
    got = run_training(config, tmp_path / "mesh", devices=8)
    for key in ("train/loss", "train/grad_norm", "eval/text/loss", "eval/label/nll"):
        assert got[key] == pytest.approx(wanted[key], rel=1e-4), key


def test_rows_are_not_split(tiny):
    config = configure(tiny)
    config.mesh.update(dict(fsdp=1, sequence=2))
    with pytest.raises(ValueError, match="config.mesh.sequence splits rows"):
        build.build(config, jax.devices()[:2])


def test_chunks_are_the_whole():
    graphdef, params = random_model(head_bias=True)
    batch = dict(
        tokens=TOKENS,
        targets=np.roll(TOKENS, -1, 1),
        weights=(SEGMENTS > 0).astype(np.float32),
        positions=POSITIONS,
        segments=SEGMENTS,
    )
    values = []
    for chunk in (0, 4):
        loss = causal.make_loss(z_loss=0.0, chunk=chunk)
        values.append(jax.jit(lambda p: loss(nnx.merge(graphdef, p), batch, None)[0])(params))  # noqa: B023
    np.testing.assert_allclose(*values, rtol=1e-5)
