"""Decoding: which ids can be drawn, and cached generation against a whole forward pass for each
token.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import sharding
from lm.decoding import generator as generator_lib
from lm.decoding.generator import Generator, generation_step, prefill_state
from lm.decoding.sampling import Sampling, row_keys, sample
from tests.helpers import abstract_model, model_config, slow

VOCAB, MODEL_VOCAB = 20, 24  # the model's table is larger than the tokenizer
GREEDY = Sampling(temperature=0.0)


# --- sampling ---


LOGITS = np.array([[0.0, 2.0, 1.0, -1.0, 5.0, 0.5], [1.0, -2.0, 0.5, 3.0, 0.0, 9.0]], np.float32)
PROBS = np.array([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]])


def draw(logits, num=2000, *, vocab_size=None, seen=None, **options):
    """Ids [num, B] drawn from logits [B, V], each with a key of its own."""

    def draw_once(key):
        return sample(
            jax.random.split(key, len(logits)),
            logits,
            Sampling(**options),
            vocab_size=vocab_size or logits.shape[-1],
            seen_BV=seen,
        )

    keys = jax.random.split(jax.random.key(0), num)
    return np.asarray(jax.jit(jax.vmap(draw_once))(keys))


def drawable_ids(probs, **options):
    """The ids that are drawn from each row."""
    drawn = draw(np.log(probs).astype(np.float32), **options)
    return [set(row) for row in drawn.T.tolist()]


def frequencies(ids, num_ids):
    return np.bincount(ids, minlength=num_ids) / len(ids)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def test_greedy_is_the_best_id_of_the_vocabulary():
    # Row 1's best id is 5, which the smaller vocabularies don't have.
    for vocab_size, best in ((6, [4, 5]), (5, [4, 3]), (3, [1, 0])):
        assert (draw(LOGITS, num=3, temperature=0.0, vocab_size=vocab_size) == best).all()


@pytest.mark.parametrize("top_k, vocab_size", [(1, 6), (3, 6), (2, 4), (5, 4), (50, 6)])
def test_top_k_draws_from_exactly_the_best(top_k, vocab_size):
    drawn = draw(LOGITS, top_k=top_k, temperature=3.0, vocab_size=vocab_size)

    for row in range(2):
        best = np.argsort(-LOGITS[row, :vocab_size])[:top_k]
        assert set(drawn[:, row]) == set(best)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_frequencies_are_the_softmax(temperature):
    drawn = draw(LOGITS, num=20000, temperature=temperature, vocab_size=5)

    # The standard deviation of a frequency is at most sqrt(0.25 / 20000) = 0.0035.
    for row in range(2):
        wanted = softmax(LOGITS[row, :5] / temperature)
        np.testing.assert_allclose(frequencies(drawn[:, row], 5), wanted, atol=0.015)


def test_top_p_keeps_the_fewest_ids_with_that_probability():
    for top_p, wanted in (
        (0.4, [{0}, {3}]),
        (0.6, [{0, 1}, {3}]),
        (0.85, [{0, 1, 2}, {2, 3}]),
        (0.999, [{0, 1, 2, 3}, {0, 1, 2, 3}]),
    ):
        assert drawable_ids(PROBS, top_p=top_p) == wanted

    # Probabilities are those of what top_k leaves, and of the softmax at that temperature.
    assert drawable_ids(PROBS, top_p=0.6, top_k=2) == [{0}, {3}]
    assert drawable_ids(PROBS, top_p=0.6, temperature=2.0) == [{0, 1}, {2, 3}]


def test_min_p_keeps_ids_by_their_fraction_of_the_best_probability():
    for min_p, wanted in ((0.7, [{0}, {3}]), (0.5, [{0, 1}, {3}]), (0.12, [{0, 1, 2}, {2, 3}])):
        assert drawable_ids(PROBS, min_p=min_p) == wanted


def test_repetition_penalty():
    seen = np.zeros(LOGITS.shape, bool)
    seen[0, 4] = seen[1, 1] = seen[1, 5] = True

    drawn = draw(LOGITS, num=20000, seen=seen, repetition_penalty=3.0)

    # Positive logits are divided, negative ones multiplied.
    penalized = LOGITS.copy()
    penalized[0, 4] = 5 / 3
    penalized[1, 1] = -2 * 3
    penalized[1, 5] = 9 / 3
    for row in range(2):
        np.testing.assert_allclose(
            frequencies(drawn[:, row], 6), softmax(penalized[row]), atol=0.015
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


# --- the steps of generation, compiled as one program ---


# Prompts of unequal lengths, padded with 0.
PROMPTS = np.array(
    [[3, 7, 1, 9, 4, 2], [5, 8, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [2, 2, 2, 11, 0, 0]], np.int32
)
LENGTHS = np.array([6, 2, 1, 4], np.int32)
MAX_NEW_TOKENS = 10
CONTEXT = PROMPTS.shape[1] + MAX_NEW_TOKENS


@functools.cache
def make_model(positions, **changes):
    """(graphdef, parameters drawn at random) of a small Transformer."""
    fields = dict(
        vocab_size=MODEL_VOCAB,
        context_length=CONTEXT,
        mlp_dim=32,
        activation="relu_squared",
        positions=positions,
    )
    config = model_config(**fields | changes)
    graphdef, params = abstract_model(config)

    # Larger weights than a model starts with, so that greedy tokens vary.
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), nnx.to_pure_dict(params)
    )
    return graphdef, params


def generate(positions="rope", *, key=0, prompts=PROMPTS, eos_id=-1, sampling=GREEDY):
    """(tokens [B, MAX_NEW_TOKENS], how many of each row come before EOS [B]).

    The layers are stacked here, which they are not in a Generator on CPUs.
    """
    graphdef, params = make_model(positions)
    keys = jax.random.split(jax.random.key(key), len(prompts))

    @jax.jit
    def run(params, prompts, lengths):
        state = prefill_state(
            graphdef,
            params,
            prompts,
            lengths,
            jax.random.key_data(keys),
            sampling=sampling,
            cache_length=CONTEXT,
            copies=1,
        )

        def step(state, _):
            state, tokens, _ = generation_step(
                graphdef, params, state, sampling=sampling, stop_ids=(eos_id,), vocab_size=VOCAB
            )
            return state, tokens

        return jax.lax.scan(step, state, length=MAX_NEW_TOKENS)[1].T

    tokens = np.asarray(run(params, prompts, LENGTHS))
    ended = np.cumsum(tokens == eos_id, axis=1) > 0
    return tokens, np.sum(~ended, axis=1)


def make_best_token(graphdef, params):
    """A function from tokens [B, T] to the best next token at each position [B, T], uncached."""

    @jax.jit
    def best_token(tokens):
        model = nnx.merge(graphdef, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model(tokens, positions, jnp.ones_like(tokens)).hidden
        return jnp.argmax(model.logits(hidden)[..., :VOCAB], axis=-1)

    return best_token


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_greedy_generation_is_the_uncached_one(positions):
    """One whole forward pass and one argmax for each token."""
    best_token = make_best_token(*make_model(positions))

    # Rows have different lengths, so each step's tokens go to different positions.
    rows = np.arange(len(PROMPTS))
    tokens = np.pad(PROMPTS, ((0, 0), (0, MAX_NEW_TOKENS)))
    for step in range(MAX_NEW_TOKENS):
        best = np.asarray(best_token(tokens))
        tokens[rows, LENGTHS + step] = best[rows, LENGTHS + step - 1]
    new_positions = LENGTHS[:, None] + np.arange(MAX_NEW_TOKENS)
    wanted = np.take_along_axis(tokens, new_positions, axis=1)

    generated, count = generate(positions)

    np.testing.assert_array_equal(generated, wanted)
    assert (count == MAX_NEW_TOKENS).all()
    assert len(np.unique(generated)) > 4

    # What the padding is doesn't matter.
    other_padding = np.where(np.arange(6) < LENGTHS[:, None], PROMPTS, 17)
    np.testing.assert_array_equal(generate(positions, prompts=other_padding)[0], generated)


def test_rows_are_only_eos_from_eos_on():
    """The other rows go on."""
    # The greedy tokens don't depend on EOS: take one of them for it.
    free, _ = generate()
    eos_id = int(free[0, 4])

    generated, count = generate(eos_id=eos_id)

    ends = [list(row).index(eos_id) if eos_id in row else MAX_NEW_TOKENS for row in free]
    assert 0 < min(ends) <= 4
    assert max(ends) == MAX_NEW_TOKENS
    np.testing.assert_array_equal(count, ends)
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(generated[row, :end], free[row, :end])
        assert (generated[row, end:] == eos_id).all()


def test_a_row_that_ends_at_once_has_no_tokens():
    free, _ = generate()

    _, count = generate(eos_id=int(free[1, 0]))

    assert count[1] == 0


def test_generation_that_samples():
    """The key decides; tokens and rows have random numbers of their own, and no id is beyond the
    vocabulary.
    """
    # All ids are about as likely, so a repeated key shows.
    sampling = Sampling(temperature=30.0)

    tokens, _ = generate(key=1, sampling=sampling)
    repeated, _ = generate(key=1, sampling=sampling)
    other, _ = generate(key=2, sampling=sampling)

    np.testing.assert_array_equal(tokens, repeated)
    assert (tokens != other).mean() > 0.5
    assert all(len(set(row)) > 3 for row in tokens)
    assert len({tuple(row) for row in tokens}) == 4
    assert max(tokens.max(), other.max()) < VOCAB


def test_top_1_is_greedy():
    tokens, _ = generate(key=3, sampling=Sampling(temperature=5.0, top_k=1))

    np.testing.assert_array_equal(tokens, generate()[0])


# --- the generator ---


UNEQUAL_PROMPTS = [[3, 7, 1, 9, 4, 2, 8, 8, 1], [5, 8], [6]]
EXPERTS = dict(num_experts=4, experts_per_token=2, gated_mlp=True, shared_mlp_dim=16)


def make_generator(mesh_sizes=None, stop_ids=(-1,), sampling=GREEDY, **changes):
    """A Generator with a context of 64 on a mesh of these sizes, by default on one device."""
    graphdef, params = make_model("rope", **{"context_length": 64} | changes)
    model = nnx.merge(graphdef, params)

    mesh_sizes = mesh_sizes or {}
    mesh = sharding.make_mesh(mesh_sizes, jax.devices()[: math.prod(mesh_sizes.values())])
    axes = sharding.logical_axes(nnx.split(model, nnx.Param)[1])
    params = jax.device_put(params, sharding.shardings(params, axes, mesh))

    return Generator(
        model.config, graphdef, params, mesh, sampling, stop_ids=stop_ids, vocab_size=VOCAB
    )


@pytest.mark.parametrize(
    "changes, mesh_sizes",
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
        slow(GREEDY),
        Sampling(temperature=2.0, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
    ],
    ids=["greedy", "sampled"],
)
def test_a_row_is_the_same_alone_and_in_a_batch_on_any_mesh(changes, mesh_sizes, sampling):
    """Prompts are longer and shorter than the window."""
    generator = make_generator(sampling=sampling, **changes)
    seeds = [7, 8, 9]

    together = generator.generate(UNEQUAL_PROMPTS, 20, keys_B=row_keys(seeds))

    assert [len(row) for row in together] == [20, 20, 20]
    assert len({tuple(row) for row in together}) == 3
    for row, prompt, seed in zip(together, UNEQUAL_PROMPTS, seeds):
        assert generator.generate([prompt], 20, keys_B=row_keys([seed])) == [row]

    on_mesh = make_generator(mesh_sizes, sampling=sampling, **changes)
    assert on_mesh.generate(UNEQUAL_PROMPTS, 20, keys_B=row_keys(seeds)) == together


def test_a_seed_decides_its_own_row_only():
    sampling = Sampling(temperature=2.0, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    for changes in ({}, dict(window=4), EXPERTS):
        generator = make_generator(sampling=sampling, **changes)

        rows = generator.generate(UNEQUAL_PROMPTS, 20, keys_B=row_keys([7, 8, 9]))
        other_rows = generator.generate(UNEQUAL_PROMPTS, 20, keys_B=row_keys([7, 8, 1]))

        assert other_rows[:2] == rows[:2]
        assert other_rows[2] != rows[2]


@pytest.mark.parametrize(
    "changes", [{}, dict(window=4), EXPERTS], ids=["whole", "window", "experts"]
)
def test_generation_is_one_forward_pass_a_token(changes):
    best_token = make_best_token(*make_model("rope", context_length=64, **changes))
    generator = make_generator(**changes)

    continuations = generator.generate(UNEQUAL_PROMPTS, 20, keys_B=row_keys([0] * 3))

    for prompt, continuation in zip(UNEQUAL_PROMPTS, continuations):
        ids = list(prompt)
        for _ in range(20):
            # One length for all steps is one compilation.
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(best_token(padded)[0, len(ids) - 1]))
        assert continuation == ids[len(prompt) :]


def test_rows_end_at_any_stop_token_and_the_stream_with_the_last():
    keys = row_keys([0] * 3)
    # Stop tokens that end the rows at different steps, the last one at once.
    free = make_generator().generate(UNEQUAL_PROMPTS, 20, keys_B=keys)
    stop_ids = (free[0][3], free[1][6], free[2][0])
    ends = [int(np.argmax(np.isin(row, stop_ids))) for row in free]

    generator = make_generator(stop_ids=stop_ids)
    continuations = generator.generate(UNEQUAL_PROMPTS, 20, keys_B=keys)
    steps = list(generator.stream(UNEQUAL_PROMPTS, 20, keys_B=keys))

    assert len(steps) == max(ends) + 1
    for row, end in enumerate(ends):
        assert continuations[row] == free[row][:end]
        # The stop token is streamed too.
        padding = [-1] * (max(ends) - end)
        assert [step[row] for step in steps] == free[row][: end + 1] + padding


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.7, top_k=5)])
def test_log_probabilities_of_what_is_drawn(sampling):
    """The model's own, before temperature and filters."""
    graphdef, params = make_model("rope", context_length=64)
    generator = make_generator(sampling=sampling)
    scored = list(generator.stream_scored(UNEQUAL_PROMPTS, 4, row_keys([0, 1, 2])))

    for row, prompt in enumerate(UNEQUAL_PROMPTS):
        ids = prompt + [int(token_B[row]) for token_B, _ in scored]
        model = nnx.merge(graphdef, params)
        arrays = np.array([ids, range(len(ids)), [1] * len(ids)], np.int32)[:, None]
        logits = model.logits(model(*arrays).hidden)[0, :, :VOCAB]
        places = np.arange(len(prompt), len(ids))
        wanted = jax.nn.log_softmax(logits)[places - 1, np.array(ids)[places]]
        got = [float(logprob_B[row]) for _, logprob_B in scored]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_prompts_of_a_bucket_share_one_compilation():
    # A sampling of its own: generators of the same model and sampling share what is compiled.
    generator = make_generator(sampling=Sampling(top_k=5))

    # Up to 16 tokens, with their continuations too.
    for prompt in ([1] * 3, [2] * 9, [3] * 12):
        generator.generate([prompt], 4, keys_B=row_keys([0]))

    assert generator._prefill._cache_size() == 1
    assert generator._step._cache_size() == 1


@pytest.mark.parametrize(
    "changes, mesh_sizes", [({}, None), (dict(window=4), None), ({}, dict(fsdp=2, tensor=2))]
)
def test_a_second_generator_of_a_model_traces_nothing(changes, mesh_sizes, monkeypatch):
    """Evals make a generator at each evaluation."""
    traced = []

    def count(name):
        function = getattr(generator_lib, name)

        def traced_function(*args, **kwargs):
            traced.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(generator_lib, name, traced_function)

    count("prefill")
    count("decode_step")
    sampling = Sampling(temperature=0.5, top_k=3)  # that of no other test

    def continuations():
        generator = make_generator(mesh_sizes, sampling=sampling, **changes)
        return generator.generate(UNEQUAL_PROMPTS, 4, keys_B=row_keys([1, 2, 3]))

    first = continuations()
    assert sorted(traced) == ["decode_step", "prefill"]
    assert continuations() == first
    assert len(traced) == 2


@pytest.mark.parametrize(
    "prompts, max_new_tokens, message",
    [
        ([[1], []], 5, "prompt 1 has 0 tokens; wanted 1 to 59"),
        ([[1] * 60], 5, "prompt 0 has 60 tokens; wanted 1 to 59: the model's context of 64 less"),
        ([[1]], 0, "max_new_tokens = 0; wanted 1 or more"),
        ([[1]], 64, "wanted 1 to 0"),
    ],
)
def test_prompts_that_do_not_fit(prompts, max_new_tokens, message):
    keys = row_keys([0] * len(prompts))
    with pytest.raises(ValueError, match=message):
        next(make_generator().stream(prompts, max_new_tokens, keys_B=keys))


def test_a_prompt_that_just_fits():
    continuations = make_generator().generate([[1] * 59], 5, keys_B=row_keys([0]))

    assert len(continuations[0]) == 5
