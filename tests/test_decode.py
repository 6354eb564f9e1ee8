"""Decoding: which ids can be drawn, and cached generation against the whole forward pass at each token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import config as config_lib
from lm import decode
from lm.models.transformer import Config, Transformer

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True, "xla_cpu_use_fusion_emitters": False}
VOCAB, MODEL_VOCAB = 20, 24  # the model's table is larger than the tokenizer
PROMPTS = np.array([[3, 7, 1, 9, 4, 2], [5, 8, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [2, 2, 2, 11, 0, 0]], np.int32)
LENGTHS = np.array([6, 2, 1, 4], np.int32)
NEW = 10


def draws(logits, num=2000, **options):
    keys = jax.random.split(jax.random.key(0), num)
    options = dict(temperature=1.0, top_k=0, vocab_size=logits.shape[-1]) | options
    return np.asarray(jax.jit(jax.vmap(lambda key: decode.sample(key, logits, **options)), compiler_options=QUICK)(keys))


LOGITS = np.array([[0.0, 2.0, 1.0, -1.0, 5.0, 0.5], [1.0, -2.0, 0.5, 3.0, 0.0, 9.0]], np.float32)


def test_greedy_is_the_best_id_of_the_vocabulary():
    for vocab_size, best in ((6, [4, 5]), (5, [4, 3]), (3, [1, 0])):
        assert (draws(LOGITS, num=3, temperature=0.0, vocab_size=vocab_size) == best).all()


@pytest.mark.parametrize("top_k, vocab_size", [(1, 6), (3, 6), (2, 4), (5, 4), (50, 6)])
def test_top_k_draws_from_exactly_the_best(top_k, vocab_size):
    drawn = draws(LOGITS, top_k=top_k, temperature=3.0, vocab_size=vocab_size)
    for row in range(2):
        assert set(drawn[:, row]) == set(np.argsort(-LOGITS[row, :vocab_size])[:top_k])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_frequencies_are_the_softmax(temperature):
    drawn = draws(LOGITS, num=20000, temperature=temperature, vocab_size=5)
    for row in range(2):
        wanted = np.exp(LOGITS[row, :5] / temperature)
        np.testing.assert_allclose(np.bincount(drawn[:, row], minlength=5) / 20000, wanted / wanted.sum(), atol=0.015)


@functools.cache
def model(positions):
    fields = config_lib.default().model.to_dict() | dict(
        vocab_size=MODEL_VOCAB, context_length=16, num_layers=2, embed_dim=32, mlp_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, positions=positions,
        tie_embeddings=False, param_dtype="float32", compute_dtype="float32")
    del fields["type"]
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(Config(**fields), jax.random.key(0))), nnx.Param)
    rng = np.random.default_rng(3)
    return graphdef, jax.tree.map(lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), nnx.to_pure_dict(params))


def generate(positions="rope", key=0, prompts=PROMPTS, **options):
    graphdef, params = model(positions)
    options = dict(max_new_tokens=NEW, temperature=0.0, top_k=0, eos_id=-1, vocab_size=VOCAB) | options
    return jax.device_get(jax.jit(decode.make_generate(graphdef, **options), compiler_options=QUICK)(params, prompts, LENGTHS, jax.random.key(key)))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_greedy_generation_is_the_uncached_one(positions):
    """Prompts of unequal lengths, whose padding is never seen: one whole forward pass and one argmax for each token."""
    graphdef, params = model(positions)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def best(tokens):
        made = nnx.merge(graphdef, params)
        place = jnp.broadcast_to(jnp.arange(16), tokens.shape)
        return jnp.argmax(made.logits(made(tokens, place, jnp.ones_like(tokens)).hidden)[..., :VOCAB], axis=-1)
    tokens = np.pad(PROMPTS, ((0, 0), (0, NEW)))
    rows = np.arange(len(PROMPTS))
    wanted = []
    for step in range(NEW):
        wanted.append(np.asarray(best(tokens))[rows, LENGTHS + step - 1])
        tokens[rows, LENGTHS + step] = wanted[-1]
    got, count = generate(positions)
    np.testing.assert_array_equal(got, np.stack(wanted, axis=1))
    assert (count == NEW).all() and len(np.unique(got)) > 4
    padding = np.where(np.arange(6) < LENGTHS[:, None], PROMPTS, 17)
    np.testing.assert_array_equal(generate(positions, prompts=padding)[0], got)


def test_tokens_before_the_end_are_counted():
    """From EOS on a row is only EOS, which isn't counted; the other rows go on."""
    free, _ = generate()
    eos = int(free[0, 4])
    got, count = generate(eos_id=eos)
    ends = [list(row).index(eos) if eos in row else NEW for row in free]
    assert 0 < min(ends) <= 4 and max(ends) == NEW
    np.testing.assert_array_equal(count, ends)
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(got[row, :end], free[row, :end])
        assert (got[row, end:] == eos).all()
    first = int(free[1, 0])
    assert generate(eos_id=first)[1][1] == 0  # a row that ends at once


def test_generation_that_samples():
    """The key decides, tokens and rows have numbers of their own, and no id is beyond the vocabulary."""
    options = dict(temperature=30.0)
    one, again, other = generate(key=1, **options)[0], generate(key=1, **options)[0], generate(key=2, **options)[0]
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.5
    assert all(len(set(row)) > 3 for row in one) and len({tuple(row) for row in one}) == 4
    assert max(one.max(), other.max()) < VOCAB
    np.testing.assert_array_equal(generate(key=3, temperature=5.0, top_k=1)[0], generate()[0])
