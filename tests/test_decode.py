"""Decoding: which ids can be drawn, and cached generation against the whole forward pass at each
token.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import config as config_lib
from lm import sharding
from lm.decoding.generator import Generator, make_generate
from lm.decoding.sampling import Sampling, row_keys, sample
from lm.models.transformer import Config, Transformer

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
VOCAB, MODEL_VOCAB = 20, 24  # the model's table is larger than the tokenizer
PROMPTS = np.array(
    [[3, 7, 1, 9, 4, 2], [5, 8, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [2, 2, 2, 11, 0, 0]], np.int32
)
LENGTHS = np.array([6, 2, 1, 4], np.int32)
NEW = 10


def draws(logits, num=2000, **options):
    keys = jax.random.split(jax.random.key(0), num)
    vocab_size, seen = options.pop("vocab_size", logits.shape[-1]), options.pop("seen", None)
    choose = lambda key: sample(
        jax.random.split(key, len(logits)),
        logits,
        Sampling(**options),
        vocab_size=vocab_size,
        seen_BV=seen,
    )
    return np.asarray(jax.jit(jax.vmap(choose), compiler_options=QUICK)(keys))


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
        np.testing.assert_allclose(
            np.bincount(drawn[:, row], minlength=5) / 20000, wanted / wanted.sum(), atol=0.015
        )


def kept(logits, **options):
    """The ids that can be drawn from each row."""
    drawn = draws(logits, **options)
    return [set(drawn[:, row].tolist()) for row in range(len(logits))]


def test_top_p_keeps_the_fewest_that_have_the_share():
    shares = np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]])
    for top_p, wanted in (
        (0.4, [{0}, {3}]),
        (0.6, [{0, 1}, {3}]),
        (0.85, [{0, 1, 2}, {2, 3}]),
        (0.999, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
    ):
        assert kept(np.log(shares).astype(np.float32), top_p=top_p) == wanted
    # Of what top_k leaves, and of the softmax at that temperature.
    assert kept(np.log(shares).astype(np.float32), top_p=0.6, top_k=2) == [{0}, {3}]
    assert kept(np.log(shares).astype(np.float32), top_p=0.6, temperature=2.0) == [{0, 1}, {2, 3}]


def test_min_p_keeps_those_with_the_share_of_the_best():
    shares = np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]])
    for min_p, wanted in ((0.7, [{0}, {3}]), (0.5, [{0, 1}, {3}]), (0.12, [{0, 1, 2}, {2, 3}])):
        assert kept(np.log(shares).astype(np.float32), min_p=min_p) == wanted


def test_repetition_penalty():
    seen = np.zeros(LOGITS.shape, bool)
    seen[0, 4], seen[1, 1], seen[1, 5] = True, True, True
    wanted = LOGITS.copy()
    wanted[0, 4], wanted[1, 1], wanted[1, 5] = 5 / 3, -2 * 3, 9 / 3
    drawn = draws(LOGITS, num=20000, seen=seen, repetition_penalty=3.0)
    for row in range(2):
        shares = np.exp(wanted[row]) / np.exp(wanted[row]).sum()
        np.testing.assert_allclose(
            np.bincount(drawn[:, row], minlength=6) / 20000, shares, atol=0.015
        )


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("temperature", -1, "0 or above"),
        ("top_k", -1, "0 or above"),
        ("top_p", 0, "above 0, up to 1"),
        ("top_p", 1.1, "above 0"),
        ("min_p", 2, "0 to 1"),
        ("repetition_penalty", 0, "above 0"),
    ],
)
def test_sampling_errors(name, value, wanted):
    with pytest.raises(ValueError, match=f"{name} = {value}; wanted {wanted}"):
        Sampling(**{name: value})


@functools.cache
def model(positions, **changes):
    fields = (
        config_lib.default().model.to_dict()
        | dict(
            vocab_size=MODEL_VOCAB,
            context_length=16,
            num_layers=2,
            embed_dim=32,
            mlp_dim=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            positions=positions,
            tie_embeddings=False,
            param_dtype="float32",
            compute_dtype="float32",
        )
        | changes
    )
    del fields["type"]
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Transformer(Config(**fields), jax.random.key(0))), nnx.Param
    )
    rng = np.random.default_rng(3)
    return graphdef, jax.tree.map(
        lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), nnx.to_pure_dict(params)
    )


def generate(positions="rope", key=0, prompts=PROMPTS, **options):
    graphdef, params = model(positions)
    options = (
        dict(max_new_tokens=NEW, temperature=0.0, top_k=0, eos_id=-1, vocab_size=VOCAB) | options
    )
    return jax.device_get(
        jax.jit(make_generate(graphdef, **options), compiler_options=QUICK)(
            params, prompts, LENGTHS, jax.random.key(key)
        )
    )


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_greedy_generation_is_the_uncached_one(positions):
    """Prompts of unequal lengths, whose padding is never seen: one whole forward pass and one
    argmax for each token.
    """
    graphdef, params = model(positions)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def best(tokens):
        made = nnx.merge(graphdef, params)
        place = jnp.broadcast_to(jnp.arange(16), tokens.shape)
        return jnp.argmax(
            made.logits(made(tokens, place, jnp.ones_like(tokens)).hidden)[..., :VOCAB], axis=-1
        )

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
    """The key decides, tokens and rows have numbers of their own, and no id is beyond the
    vocabulary.
    """
    options = dict(temperature=30.0)
    one, again, other = (
        generate(key=1, **options)[0],
        generate(key=1, **options)[0],
        generate(key=2, **options)[0],
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.5
    assert all(len(set(row)) > 3 for row in one) and len({tuple(row) for row in one}) == 4
    assert max(one.max(), other.max()) < VOCAB
    np.testing.assert_array_equal(generate(key=3, temperature=5.0, top_k=1)[0], generate()[0])


def generator(sizes=None, stop_ids=(-1,), sampling=None, **changes):
    graphdef, params = model("rope", **{"context_length": 64} | changes)
    mesh = sharding.make_mesh(sizes or {}, jax.devices()[: math.prod((sizes or {}).values())])
    made = nnx.merge(graphdef, params)
    axes = sharding.logical_axes(nnx.split(made, nnx.Param)[1])
    params = jax.device_put(params, sharding.shardings(params, axes, mesh))
    return Generator(
        made.config,
        graphdef,
        params,
        mesh,
        sampling or Sampling(temperature=0.0),
        stop_ids=stop_ids,
        vocab_size=VOCAB,
    )


SOME = [[3, 7, 1, 9, 4, 2, 8, 8, 1], [5, 8], [6]]


EXPERTS = dict(num_experts=4, experts_per_token=2, gated_mlp=True, shared_mlp_dim=16)


@pytest.mark.parametrize(
    "changes, sizes",
    [
        ({}, dict(data=2, fsdp=2, tensor=2)),
        (dict(window=4), dict(data=2, fsdp=2, tensor=2)),
        (EXPERTS, dict(expert=4, sequence=2)),
    ],
    ids=["whole", "window", "experts"],
)
@pytest.mark.parametrize(
    "sampling",
    [
        None,
        Sampling(temperature=2.0, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
    ],
)
def test_a_batch_is_each_alone(changes, sizes, sampling):
    """Prompts of unequal lengths, longer and shorter than the window: the same continuations, drawn
    or the best, on any mesh.
    """
    ours = generator(sampling=sampling, **changes)
    together = ours.generate(SOME, 20, keys_B=row_keys([7, 8, 9]))
    assert together == [
        ours.generate([prompt], 20, keys_B=row_keys([seed]))[0]
        for prompt, seed in zip(SOME, (7, 8, 9))
    ]
    assert all(len(row) == 20 for row in together) and len(set(map(tuple, together))) == 3
    assert (
        generator(sizes, sampling=sampling, **changes).generate(
            SOME, 20, keys_B=row_keys([7, 8, 9])
        )
        == together
    )
    if sampling:
        assert ours.generate(SOME, 20, keys_B=row_keys([7, 8, 1]))[:2] == together[:2]
        assert ours.generate(SOME, 20, keys_B=row_keys([7, 8, 1]))[2] != together[2]


@pytest.mark.parametrize(
    "changes", [{}, dict(window=4), EXPERTS], ids=["whole", "window", "experts"]
)
def test_generation_is_one_forward_pass_a_token(changes):
    graphdef, params = model("rope", context_length=64, **changes)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def best(tokens, length):
        made = nnx.merge(graphdef, params)
        logits = made.logits(made(tokens, jnp.arange(32)[None], jnp.ones_like(tokens)).hidden)[
            0, :, :VOCAB
        ]
        return jnp.argmax(logits, axis=-1)[length - 1]

    for prompt, found in zip(
        SOME, generator(**changes).generate(SOME, 20, keys_B=row_keys([0] * 3))
    ):
        ids = list(prompt)
        for _ in range(20):
            ids.append(int(best(np.array([ids + [0] * (32 - len(ids))], np.int32), len(ids))))
        assert ids[len(prompt) :] == found


def test_rows_end_at_any_stop_token_and_the_stream_with_the_last():
    free = generator().generate(SOME, 20, keys_B=row_keys([0] * 3))
    stops = (free[0][3], free[1][6], free[2][0])
    ends = [next(i for i, token in enumerate(row) if token in stops) for row in free]
    ours = generator(stop_ids=stops)
    assert ours.generate(SOME, 20, keys_B=row_keys([0] * 3)) == [
        row[:end] for row, end in zip(free, ends)
    ]
    steps = list(ours.stream(SOME, 20, keys_B=row_keys([0] * 3)))
    assert len(steps) == max(ends) + 1
    for row, end in enumerate(ends):
        assert [step[row] for step in steps] == free[row][: end + 1] + [-1] * (max(ends) - end)


def test_one_compilation_for_a_bucket():
    ours = generator()
    for prompts in ([[1] * 3], [[2] * 9], [[3] * 12]):
        ours.generate(prompts, 4, keys_B=row_keys([0]))
    assert ours._start._cache_size() == ours._advance._cache_size() == 1


@pytest.mark.parametrize(
    "prompts, new, message",
    [
        ([[1], []], 5, "prompt 1 has 0 tokens; wanted 1 to 59"),
        ([[1] * 60], 5, "prompt 0 has 60 tokens; wanted 1 to 59: the model's context of 64 less"),
        ([[1]], 0, "max_new_tokens = 0; wanted 1 or more"),
        ([[1]], 64, "wanted 1 to 0"),
    ],
)
def test_prompts_that_do_not_fit(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        next(generator().stream(prompts, new, keys_B=row_keys([0] * len(prompts))))
    full = generator().generate([[1] * 59], 5, keys_B=row_keys([0]))
    assert len(full[0]) == 5
