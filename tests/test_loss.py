"""The chunked vocabulary loss is the plain one: value, terms and gradient."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from lm.models.transformer import Transformer
from lm.objectives import causal
from tests.helpers import abstract_model, assert_trees_close, model_config

SHAPE = (3, 16)
IDS = np.random.default_rng(0).integers(0, 37, (2, *SHAPE)).astype(np.int32)
BATCH = dict(
    tokens=IDS[0],
    targets=IDS[1],
    weights=(np.random.default_rng(1).random(SHAPE) < 0.7).astype(np.float32),
    positions=np.broadcast_to(np.arange(16, dtype=np.int32), SHAPE),
    segments=np.ones(SHAPE, np.int32),
)


@functools.cache
def initialised(**changes):
    """(graphdef, parameters as a run draws them) of a model of one layer, with 37 ids."""
    config = model_config(vocab_size=37, num_layers=1, **changes)
    graphdef, _ = abstract_model(config)

    @jax.jit
    def init(key):
        return nnx.to_pure_dict(nnx.split(Transformer(config, key), nnx.Param)[1])

    return graphdef, init(jax.random.key(0))


@functools.cache
def gradients(chunk, z_loss, scale=1.0, **changes):
    """(value, count, terms, gradients) of `scale` times the loss."""
    graphdef, params = initialised(**changes)
    loss = causal.make_loss(z_loss=z_loss, chunk=chunk)

    def scaled(params):
        total, count, terms = loss(nnx.merge(graphdef, params), BATCH, None)
        return scale * total, (count, terms)

    # JAX's attention mixes f32 and bf16 in its gradient.
    with jax.numpy_dtype_promotion("standard"):
        value_and_grad = jax.jit(jax.value_and_grad(scaled, has_aux=True))
        (value, (count, terms)), grads = jax.device_get(value_and_grad(params))
    return value, count, terms, grads


@pytest.mark.parametrize("chunk, tied", [(1, True), (4, True), (4, False), (16, False)])
def test_chunks_are_the_whole(chunk, tied):
    value, count, terms, grads = gradients(0, 0.1, 3.0, tie_embeddings=tied)
    # A cotangent other than 1: the chunks' gradient is computed before it is known.
    chunked = gradients(chunk, 0.1, 3.0, tie_embeddings=tied)
    chunked_value, chunked_count, chunked_terms, chunked_grads = chunked

    np.testing.assert_allclose(chunked_value, value, rtol=1e-6)
    assert chunked_count == count
    assert chunked_terms.keys() == terms.keys()
    for name in terms:
        np.testing.assert_allclose(chunked_terms[name], terms[name], rtol=1e-6)
    assert_trees_close(chunked_grads, grads, rtol=2e-5, atol=2e-6)


def test_bf16_is_as_close_as_the_plain_loss():
    """Both round the logits' gradient once; against the f32 gradient, chunks lose no more than the
    whole does (with a tenth to spare).
    """
    exact = gradients(0, 0.0)[3]

    def error(chunk):
        grads = gradients(chunk, 0.0, compute_dtype="bfloat16")[3]
        return optax.global_norm(jax.tree.map(np.subtract, grads, exact))

    assert 0 < error(4) < 1.1 * error(0)


def test_the_value_alone_needs_no_gradient():
    graphdef, params = initialised()

    def value(chunk):
        loss = causal.make_loss(z_loss=0.1, chunk=chunk)

        @jax.jit
        def compiled(params):
            return loss(nnx.merge(graphdef, params), BATCH, None)[0]

        return compiled(params)

    np.testing.assert_allclose(value(8), value(0), rtol=1e-6)


def test_chunks_must_divide_the_row():
    message = "config.objective.chunk = 5 must divide the row's 16 positions"
    with pytest.raises(ValueError, match=message):
        gradients(5, 0.0)
