"""Every family against transformers, in f32, on models drawn at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tests.parity import references

from lm import config as config_lib
from lm import sharding
from lm.hf import checkpoint
from lm.models.transformer import Config, Transformer
from lm.objectives import causal

TEXT = np.random.default_rng(0).integers(3, 96, (3, 40)).astype(np.int32)
LENGTHS = (40, 23, 1)  # padded on the right


def model_of(fields, **execution):
    """(graphdef, abstract parameters) on a mesh of one device."""
    default = config_lib.default().model.to_dict()
    del default["type"]
    config = Config(**default | fields | dict(param_dtype="float32", compute_dtype="float32") | execution)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))), nnx.Param)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    axes, abstract = sharding.logical_axes(abstract), nnx.to_pure_dict(abstract)
    layouts = sharding.shardings(abstract, axes, mesh)
    return graphdef, jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), abstract, layouts)


def loaded(directory, **execution):
    source = checkpoint.Source(directory)
    graphdef, abstract = model_of(source.fields, **execution)
    return source, graphdef, source.load(abstract)


def batch():
    segments = (np.arange(40) < np.array(LENGTHS)[:, None]).astype(np.int32)
    positions = np.where(segments > 0, np.arange(40), 0).astype(np.int32)
    return dict(tokens=TEXT * segments, targets=np.roll(TEXT, -1, 1), weights=segments.astype(np.float32), positions=positions, segments=segments)


def logits(graphdef, params):
    b = batch()

    @jax.jit
    def call(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(b["tokens"], b["positions"], b["segments"]).hidden)
    return np.asarray(call(params))


def their_logits(reference):
    b = batch()
    with torch.no_grad():
        return reference(torch.tensor(b["tokens"]).long(), attention_mask=torch.tensor(b["segments"]).long()).logits.numpy()


@pytest.mark.parametrize("name", references.CONFIGS)
def test_logits_are_theirs(name, tmp_path):
    reference = references.make(name)
    reference.save_pretrained(tmp_path)
    _, graphdef, params = loaded(tmp_path)
    ours, theirs, real = logits(graphdef, params), their_logits(reference), batch()["segments"] > 0
    assert np.abs(theirs[real]).max() > 1
    difference = np.abs(ours - theirs)[real].max()
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-4


del jnp, causal
