"""Recurrent models against torch.nn's RNN, LSTM and GRU, in f32, with weights of either side."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from lm.hf import torch_recurrent
from lm.models.recurrent import Recurrent
from lm.objectives import causal
from tests.test_recurrent import VOCAB, make_config, random_model

MODULES = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
# Units as many in each layer, as torch.nn has them.
SIZES = dict(embed_dim=12, hidden_dim=12)
TOKENS = np.random.default_rng(3).integers(0, VOCAB, (4, 17)).astype(np.int32)


class Reference(torch.nn.Module):
    def __init__(self, cell, units=12):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCAB, 12)
        self.cells = MODULES[cell](12, units, num_layers=2, batch_first=True)

    def forward(self, tokens):
        hidden, _ = self.cells(self.embed(tokens))
        return hidden @ self.embed.weight.T


def our_params(reference, config):
    state_dict = {name: p.detach().numpy() for name, p in reference.cells.state_dict().items()}
    table = reference.embed.weight.detach().numpy()
    layers = torch_recurrent.read_cells(state_dict, config)
    return jax.tree.map(jnp.asarray, {"embed": {"table": table}, "layers": layers})


def make_batch(tokens):
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.ones((4, 16), np.float32),
        positions=np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16)),
        segments=np.ones((4, 16), np.int32),
    )


@pytest.mark.parametrize("cell", list(MODULES))
def test_logits_are_the_same(cell):
    config = make_config(cell=cell, **SIZES)
    graphdef, _ = random_model(cell=cell, **SIZES)
    reference = Reference(cell)
    model = nnx.merge(graphdef, our_params(reference, config))
    batch = make_batch(TOKENS)
    ours = model.logits(model(batch["tokens"], batch["positions"], batch["segments"]).hidden)
    theirs = reference(torch.tensor(batch["tokens"]).long()).detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4


@pytest.mark.parametrize("cell", list(MODULES))
def test_torch_reads_ours(cell):
    config = make_config(cell=cell, **SIZES)
    graphdef, params = random_model(cell=cell, **SIZES)
    reference = Reference(cell)
    state_dict = torch_recurrent.write_cells(params["layers"], config)
    reference.cells.load_state_dict({name: torch.tensor(a) for name, a in state_dict.items()})
    reference.embed.weight.data = torch.tensor(np.asarray(params["embed"]["table"]))
    model = nnx.merge(graphdef, params)
    batch = make_batch(TOKENS)
    ours = model.logits(model(batch["tokens"], batch["positions"], batch["segments"]).hidden)
    theirs = reference(torch.tensor(batch["tokens"]).long()).detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4


@pytest.mark.parametrize("cell", list(MODULES))
def test_fifty_steps_are_the_same(cell):
    config = make_config(cell=cell, **SIZES)
    reference = Reference(cell)
    params = our_params(reference, config)

    def init():
        return Recurrent(config, jax.random.key(0))

    graphdef, _ = nnx.split(nnx.eval_shape(init), nnx.Param)
    loss_fn = causal.make_loss(z_loss=0.0, chunk=0)

    def mean_loss(params, batch):
        total, count, _ = loss_fn(nnx.merge(graphdef, params), batch, None)
        return total / count

    # SGD: torch's two biases have a gradient each, and Adam would move their sum twice.
    rate = 0.3
    optimizer = optax.sgd(rate)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    state = optimizer.init(params)
    rng = np.random.default_rng(4)
    for number in range(50):
        batch = make_batch(rng.integers(0, VOCAB, (4, 17)).astype(np.int32))
        params, state, loss, grads = step(params, state, batch)

        logits = reference(torch.tensor(batch["tokens"]).long())
        targets = torch.tensor(batch["targets"]).long()
        their = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
        reference.zero_grad()
        their.backward()
        with torch.no_grad():
            if number == 0:
                wanted = torch_recurrent.read_cells(
                    {name: p.grad.numpy() for name, p in reference.cells.named_parameters()}, config
                )
                ours = np.asarray(grads["layers"][1]["state_weight"])
                np.testing.assert_allclose(ours, wanted[1]["state_weight"], atol=1e-4, rtol=1e-3)
            for name, parameter in reference.named_parameters():
                gradient = parameter.grad
                # One of the two biases stands still, so that their sum moves as ours does; both do
                # where the reset gate comes between them.
                if "bias_ih" in name:
                    gradient = gradient.clone()
                    gates = {"lstm": 4, "gru": 3, "rnn": 1}[cell]
                    moving = slice(12 * (gates - 1), None) if cell == "gru" else slice(0, 0)
                    kept = torch.zeros_like(gradient)
                    kept[moving] = gradient[moving]
                    gradient = kept
                parameter -= rate * gradient
        assert abs(float(loss) - their.item()) < 1e-4, number


# --- with a source ---

SOURCE_SIZES = dict(embed_dim=6, hidden_dim=10, source_length=9, encoder_layers=2, start_id=3)


def torch_cells(cell, layer):
    """A torch.nn layer with the weights of ours."""
    inputs, _, units = layer["input_weight"].shape
    config = make_config(
        cell=cell, num_layers=1, tie_embeddings=False, embed_dim=inputs, hidden_dim=units
    )
    state_dict = torch_recurrent.write_cells({0: layer}, config)
    cells = MODULES[cell](inputs, units, batch_first=True)
    cells.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()})
    return cells


def their_logits(cell, params, table, sources, tokens):
    """A translation's, by torch.nn's layers and the attention of Luong et al. 2015, a text each."""
    logits = []
    for source, target in zip(sources, tokens):
        memory = table[source][None]
        for number in range(0, len(params["encoder"]["layers"]), 2):
            forward, backward = (
                torch_cells(cell, params["encoder"]["layers"][number + k]) for k in (0, 1)
            )
            back, _ = backward(memory.flip(1))
            memory = torch.cat([forward(memory)[0], back.flip(1)], dim=-1)

        x = table[[SOURCE_SIZES["start_id"], *target[1:]]][None]
        reader = params["reader"]
        for number in sorted(params["layers"]):
            x, _ = torch_cells(cell, params["layers"][number])(x)
            query = x @ torch.tensor(reader["queries"][number])
            context = torch.softmax(query @ memory.mT, dim=-1) @ memory
            x = torch.cat([x, context], dim=-1)
        logits.append(torch.tanh(x @ torch.tensor(reader["out"])) @ table.T)
    return torch.cat(logits)


@pytest.mark.parametrize("cell", list(MODULES))
def test_a_source_is_read_as_torch_would(cell):
    """Logits and the table's gradient; the sources are of several lengths."""
    graphdef, params = random_model(cell=cell, **SOURCE_SIZES)
    batch = make_batch(TOKENS)
    lengths = np.array([9, 4, 1, 7])
    source = np.random.default_rng(5).integers(0, VOCAB, (4, 9)).astype(np.int32)
    places = np.broadcast_to(np.arange(9, dtype=np.int32), (4, 9))
    read = (places < lengths[:, None]).astype(np.int32)

    @jax.jit
    def ours(params):
        model = nnx.merge(graphdef, params)
        arrays = (batch["tokens"], batch["positions"], batch["segments"])
        logits = model.logits(model(*arrays, source=(source, places, read)).hidden)
        return jnp.sum(jnp.sin(logits)), logits

    (_, got), grads = jax.value_and_grad(ours, has_aux=True)(params)

    table = torch.tensor(np.asarray(params["embed"]["table"]), requires_grad=True)
    sources = [row[:length] for row, length in zip(source, lengths)]
    wanted = their_logits(cell, params, table, sources, batch["tokens"])
    wanted.sin().sum().backward()
    np.testing.assert_allclose(got, wanted.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(grads["embed"]["table"], table.grad.numpy(), rtol=1e-3, atol=1e-3)
