"""Encoder-decoders: packing on both sides, decoding, answers, and runs."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import audit, build, sharding
from lm import config as config_lib
from lm.data import batch as batch_contract
from lm.data import pack, seq2seq
from lm.data.tokenizer import ByteTokenizer
from lm.decoding import beams as beams_lib
from lm.decoding.beams import Beams, search
from lm.decoding.generator import Generator, Sources
from lm.decoding.sampling import Sampling, row_keys
from lm.evals import entries
from lm.evals.masked_answers import AFTER
from lm.evals.predict import CompiledFns, Limits, PredictFns, Prompt, Question, never_stop
from lm.evals.source_answers import SourceAnswers
from lm.models import encdec, recurrent
from lm.models.encdec import Config, EncoderDecoder
from lm.nn.positions import sinusoids
from lm.objectives import seq2seq as objective
from lm.step import branches, make_tree_logprobs, make_tree_states
from tests.helpers import (
    assert_trees_close,
    read_metrics,
    run_commands,
    run_training,
    small_encdec,
)

VOCAB = 19
LENGTH, SOURCE_LENGTH = 12, 14


def make_config(**changes):
    fields = config_lib.model(
        config_lib.ENCDEC,
        vocab_size=VOCAB,
        context_length=LENGTH,
        source_length=SOURCE_LENGTH,
        num_layers=2,
        encoder_layers=3,
        embed_dim=8,
        mlp_dim=12,
        num_heads=2,
        head_dim=6,
        relative_buckets=8,
        relative_distance=10,
        scale_scores=False,
        start_id=3,
        param_dtype="float32",
        compute_dtype="float32",
    ).to_dict()
    del fields["type"]
    return Config(**fields | changes)


BART = dict(
    positions="learned",
    position_offset=2,
    residual="post_norm",
    embed_norm=True,
    norm="layernorm",
    bias="qkv,out,mlp,norm,head",
    scale_scores=True,
)
FORMS = {"t5": {}, "bart": BART, "2017": BART | dict(positions="sinusoids", embed_norm=False)}
# And a recurrent net that attends to its source.
ALL_FORMS = [*FORMS, "lstm"]


def config_of(form):
    if form != "lstm":
        return make_config(**FORMS[form])
    fields = config_lib.model(
        "lm.models.recurrent",
        vocab_size=VOCAB,
        context_length=LENGTH,
        source_length=SOURCE_LENGTH,
        num_layers=3,
        encoder_layers=2,
        embed_dim=8,
        hidden_dim=6,
        start_id=3,
        param_dtype="float32",
        compute_dtype="float32",
    ).to_dict()
    del fields["type"]
    return recurrent.Config(**fields)


def drawn(config):
    """(graphdef, parameters large enough for every part to matter)."""

    def init():
        is_recurrent = isinstance(config, recurrent.Config)
        cls = recurrent.Recurrent if is_recurrent else EncoderDecoder
        return cls(config, jax.random.key(0))

    graphdef, abstract = nnx.split(nnx.eval_shape(init), nnx.Param)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        mean = "scale" in jax.tree_util.keystr(path)
        return (rng.normal(0, 0.5, leaf.shape) + mean).astype(leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(abstract))


@functools.cache
def random_params(form):
    return drawn(config_of(form))


def make_pairs(sizes, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for source, target in sizes:
        ids = rng.integers(4, VOCAB, source).tolist(), rng.integers(4, VOCAB, target).tolist()
        pairs.append(seq2seq.window(*ids))
    return pairs


def rows_of(pairs):
    rows = pack.evaluation_rows(pairs, LENGTH, pack.SourceLayout(SOURCE_LENGTH))
    names = [name for name in rows[0] if name != "begins"]
    return {name: np.stack([row[name] for row in rows]) for name in names}


@functools.cache
def compiled(form):
    """(log-probabilities of the targets, logits) of batches, under jit."""
    graphdef, _ = random_params(form)

    def token_logprobs(params, batch):
        return objective.token_logprobs(nnx.merge(graphdef, params), batch)[0]

    def logits(params, batch):
        model = nnx.merge(graphdef, params)
        arrays = (batch["tokens"], batch["positions"], batch["segments"])
        return model.logits(model(*arrays, source=batch_contract.source_of(batch)).hidden)

    return jax.jit(token_logprobs), jax.jit(logits)


def logprobs(form, batch):
    _, params = random_params(form)
    return np.asarray(compiled(form)[0](params, batch))


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits)))


SIZES = [(5, 4), (6, 3), (3, 5), (9, 2), (2, 7)]


@pytest.mark.parametrize("form", ALL_FORMS)
def test_packed_pairs_are_as_pairs_alone(form):
    """On both sides: each target with its own source, wherever both lie in a row."""
    pairs = make_pairs(SIZES)
    packed = rows_of(pairs)
    assert len(packed["tokens"]) < len(pairs)
    of_packed = logprobs(form, packed)

    found = []
    for pair in pairs:
        wanted = logprobs(form, rows_of([pair]))[0][: len(pair["targets"])]
        for row, number in itertools.product(range(len(packed["tokens"])), range(1, 4)):
            places = packed["segments"][row] == number
            if np.array_equal(packed["targets"][row][places], pair["targets"]):
                np.testing.assert_allclose(of_packed[row][places], wanted, rtol=1e-4, atol=1e-5)
                source = packed["source"][row][packed["source_segments"][row] == number]
                np.testing.assert_array_equal(source, pair["source"])
                found.append(pair)
    assert len(found) == len(pairs)


@pytest.mark.parametrize("form", ["t5", "lstm"])
def test_a_target_sees_its_source_and_what_is_before_it(form):
    batch = rows_of(make_pairs([(5, 4), (6, 3)]))
    wanted = logprobs(form, batch)
    first, second = batch["segments"][0] == 1, batch["segments"][0] == 2

    changed = batch | dict(source=batch["source"].copy())
    changed["source"][0, 0] += 1  # of the first pair
    got = logprobs(form, changed)
    assert np.abs(got - wanted)[0][first].min() > 1e-4
    np.testing.assert_array_equal(got[0][second], wanted[0][second])

    # What the decoder reads at a text's first place is its own token, whatever is there.
    changed = batch | dict(tokens=batch["tokens"].copy())
    changed["tokens"][0, [0, 4]] = 9, 7
    np.testing.assert_array_equal(logprobs(form, changed), wanted)
    changed["tokens"][0, 2] += 1
    got = logprobs(form, changed)
    np.testing.assert_array_equal(got[0][:2], wanted[0][:2])
    assert np.abs(got - wanted)[0][2:4].min() > 1e-5


@pytest.mark.parametrize("form", ["t5", "bart"])
def test_remat_is_none(form):
    """And a loop over layers is the same as one without."""
    graphdef, params = random_params(form)
    batch = rows_of(make_pairs(SIZES))
    loss = objective.make_loss(source_length=SOURCE_LENGTH)

    def gradient(**changes):
        config = make_config(**FORMS[form] | changes)
        abstract = nnx.eval_shape(lambda: EncoderDecoder(config, jax.random.key(0)))
        graphdef = nnx.split(abstract, nnx.Param)[0]

        def total(params):
            return loss(nnx.merge(graphdef, params), batch, None)[0]

        return jax.jit(jax.value_and_grad(total))(params)

    wanted = gradient()
    for changes in (dict(remat="full"), dict(remat="dots"), dict(scan_unroll=2)):
        assert_trees_close(gradient(**changes), wanted, rtol=1e-4, atol=1e-5)


def loss_of(model, batch, **arguments):
    loss = objective.make_loss(source_length=SOURCE_LENGTH, **arguments)
    return nnx.jit(lambda model, batch: loss(model, batch, None))(model, batch)


def test_chunks_are_the_whole_loss():
    graphdef, params = random_params("bart")
    batch = rows_of(make_pairs(SIZES))
    totals = []
    for chunk in (0, 4):
        model = nnx.merge(graphdef, params)
        total, count, _ = loss_of(model, batch, chunk=chunk, z_loss=0.1)
        totals.append(float(total))
        assert count == sum(target for _, target in SIZES)
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_smoothed_labels():
    """A share of the target's probability lies on all tokens alike; the loss told is without."""
    graphdef, params = random_params("t5")
    batch = rows_of(make_pairs(SIZES))
    model = nnx.merge(graphdef, params)
    total, _, terms = loss_of(model, batch, label_smoothing=0.2)
    logprobs_BTV = np.asarray(jax.nn.log_softmax(compiled("t5")[1](params, batch)))
    smooth = np.eye(VOCAB)[batch["targets"]] * 0.8 + 0.2 / VOCAB
    wanted = -np.sum(np.sum(smooth * logprobs_BTV, -1) * batch["weights"])
    assert float(total) == pytest.approx(wanted, rel=1e-5)
    plain, _, _ = loss_of(model, batch)
    assert float(terms["loss"][0]) == pytest.approx(float(plain), rel=1e-5)
    with pytest.raises(ValueError, match="a chunk of 0 with it"):
        objective.make_loss(source_length=4, label_smoothing=0.1, chunk=2)


def test_dropout_is_a_function_of_the_row():
    graphdef, params = random_params("bart")
    config = make_config(**BART | dict(dropout=0.3, attention_dropout=0.3))
    abstract = nnx.eval_shape(lambda: EncoderDecoder(config, jax.random.key(0)))
    dropping = nnx.merge(nnx.split(abstract, nnx.Param)[0], params)
    batch = rows_of(make_pairs(SIZES))
    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))

    @nnx.jit
    def run(model, arrays, source, keys_B):
        return model(*arrays, source=source, keys_B=keys_B).hidden

    def hidden(model, rows, keys_B):
        arrays = [batch[name][rows] for name in ("tokens", "positions", "segments")]
        source = [x[rows] for x in batch_contract.source_of(batch)]
        return np.asarray(run(model, arrays, source, keys_B))

    plain = hidden(nnx.merge(graphdef, params), slice(None), keys)
    np.testing.assert_array_equal(hidden(dropping, slice(None), None), plain)
    dropped = hidden(dropping, slice(None), keys)
    assert np.abs(dropped - plain).max() > 0.1
    np.testing.assert_allclose(hidden(dropping, slice(1, 2), keys[1:2])[0], dropped[1], atol=1e-5)


# --- decoding ---


def make_generator(graphdef, params, **changes):
    model = nnx.merge(graphdef, params)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    arguments = dict(stop_ids=[-1], vocab_size=VOCAB) | changes
    return Generator(model.config, graphdef, params, mesh, Sampling(temperature=0.0), **arguments)


SOURCES = [[4, 5, 6], [7], [8, 9, 10, 11, 12]]


def logits_by_hand(form, source, target):
    """Of what follows the target's tokens so far."""
    ids = [0, *target]
    names = ("tokens", "positions", "segments", "source", "source_positions", "source_segments")
    batch = {}
    for name in names:
        of_source = name.startswith("source")
        batch[name] = np.zeros((1, SOURCE_LENGTH if of_source else LENGTH), np.int32)
        members = source if of_source else ids
        values = dict(positions=range(len(members)), segments=1).get(name.removeprefix("source_"))
        batch[name][0, : len(members)] = members if values is None else values
    _, params = random_params(form)
    return np.array(compiled(form)[1](params, batch)[0, len(target)])


@pytest.mark.parametrize("form", ALL_FORMS)
def test_decoding_is_reading(form):
    """The greedy text of a batch of unequal sources, each as reading it anew gives it. What ends a
    source is added where it isn't there.
    """
    graphdef, params = random_params(form)
    generator = make_generator(graphdef, params, sources=Sources((2,), (17,)))
    sources = [*SOURCES[:2], [*SOURCES[2], 2]]
    texts = generator.generate(sources, 6, keys_B=row_keys([0, 0, 0]))
    for source, text in zip(SOURCES, texts):
        assert len(text) == 6
        for step, token in enumerate(text):
            logits = logits_by_hand(form, [*source, 2], text[:step])
            logits[17] = -np.inf
            assert token == int(np.argmax(logits))


def test_stacked_layers_decode_too():
    """As on accelerators: also a search, which takes rows out of a stack."""
    graphdef, params = random_params("bart")
    plain = make_generator(graphdef, params)
    stacked = make_generator(graphdef, params)
    stacked.graph = type(stacked.graph)(graphdef, object())
    stacked.params = params
    found = [search(generator, SOURCES, 6, Beams(3)) for generator in (plain, stacked)]
    for wanted, got in zip(*map(itertools.chain.from_iterable, found), strict=True):
        assert got.ids == wanted.ids
        assert got.score == pytest.approx(wanted.score, abs=1e-4)


@pytest.mark.parametrize("form", ["2017", "lstm"])
def test_beams_find_what_is_likeliest(form):
    """As many beams as there are tokens find the best of all texts of two."""
    graphdef, params = random_params(form)
    generator = make_generator(graphdef, params)
    for source, found in zip(SOURCES, search(generator, SOURCES, 2, Beams(VOCAB, 0.0))):
        scores = {}
        first = log_softmax(logits_by_hand(form, source, []))
        for a in range(VOCAB):
            second = log_softmax(logits_by_hand(form, source, [a]))
            for b in range(VOCAB):
                scores[a, b] = float(first[a] + second[b])
        best = sorted(scores, key=lambda ids: -scores[ids])[:VOCAB]
        assert [tuple(each.ids) for each in found[:5]] == best[:5]
        assert found[0].score == pytest.approx(scores[best[0]], abs=1e-4)


def test_a_penalty_of_repetition_is_of_the_text_alone():
    """Not of its source, nor of what ends that."""
    graphdef, params = random_params("t5")
    arguments = dict(stop_ids=[-1], vocab_size=VOCAB, sources=Sources((2,)))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    config = make_config()
    penalized, plain = [
        Generator(config, graphdef, params, mesh, Sampling(penalty, 0.0), **arguments)
        for penalty in (50.0, 1.0)
    ]
    # All ids but one are in the source: a penalty on them would choose that one.
    source = [*range(5, VOCAB), 3, 4][:13]
    keys = row_keys([0])
    first = [generator.generate([source], 1, keys)[0] for generator in (penalized, plain)]
    assert first[0] == first[1]
    text = penalized.generate([source], 6, keys)[0]
    assert len(set(text)) == 6


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2), dict(fsdp=4)])
def test_beams_are_the_same_on_any_mesh(sizes):
    """What the host reads of a step is on all devices, whichever rows they hold."""
    graphdef, params = random_params("2017")
    one = search(make_generator(graphdef, params), SOURCES * 2, 5, Beams(4))
    mesh = sharding.make_mesh(sizes, jax.devices()[:4])
    config = config_of("2017")
    arguments = dict(stop_ids=[-1], vocab_size=VOCAB)
    generator = Generator(config, graphdef, params, mesh, Sampling(), **arguments)
    for wanted, got in zip(one, search(generator, SOURCES * 2, 5, Beams(4)), strict=True):
        assert [each.ids for each in got] == [each.ids for each in wanted]

    candidates = beams_lib._compiled(generator.graph, (), VOCAB, mesh)[2]
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    logprobs = jax.device_put(np.zeros((8, VOCAB), np.float32), rows)
    with jax.set_mesh(mesh):
        found = candidates(logprobs, np.zeros((2, 4), np.float32), number=4)
    assert all(array.sharding.is_fully_replicated for array in found)


@pytest.mark.parametrize(
    "sources, new, message",
    [
        ([[4] * 14], 4, "prompt 0 has 14 tokens; wanted 1 to 13: the encoder's context of 14"),
        ([[4]], 13, "max_new_tokens = 13; wanted 1 or more, and at most the model's context of 12"),
        ([[4], [2]], 3, "prompt 1 has 0 tokens"),
    ],
)
def test_sources_that_are_too_long(sources, new, message):
    graphdef, params = random_params("t5")
    generator = make_generator(graphdef, params, sources=Sources((2,)))
    with pytest.raises(ValueError, match=message):
        generator.check(sources, new)


# --- what it is asked ---


@functools.cache
def predict_fns(form):
    graphdef, params = random_params(form)
    answers = SourceAnswers(
        sharding.make_mesh({}, jax.devices()[:1]),
        make_tree_logprobs(graphdef),
        make_tree_states(graphdef),
        before=[1],
        end=[2],
        sentinels=[18],
        branches=branches(config_of(form)),
    )
    fns = CompiledFns(
        sharding.make_mesh({}, jax.devices()[:1]),
        reserved=2,
        source_length=SOURCE_LENGTH,
        logprobs=answers.logprobs,
        infill=answers.logprobs,
        states=answers.states,
    )
    return PredictFns(fns, batch_size=4, length=LENGTH), params


WORDS = [[4], [5, 6], [7, 8, 9], [5, 10]]


@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("fill", ["ltr", "infill"])
def test_answers_are_by_the_chain_rule(form, fill):
    """Of an answer to the source, or of what stands at a sentinel; words share one tree, where the
    model can branch.
    """
    fns, params = predict_fns(form)
    after = {} if fill == "ltr" else {AFTER: np.array([11, 12])}
    questions = [Question(Prompt(ids, after), WORDS, fill) for ids in SOURCES]
    for ids, answers in zip(SOURCES, fns.infill(params, questions)):
        source = [*ids, 2] if fill == "ltr" else [*ids, 18, 11, 12, 2]
        begun = [1] if fill == "ltr" else [18]
        for word, answer in zip(WORDS, answers, strict=True):
            for place, token in enumerate(word):
                logits = logits_by_hand(form, source, [*begun, *word[:place]])
                wanted = log_softmax(logits)[token]
                assert answer.logprobs[place] == pytest.approx(float(wanted), abs=1e-4)
                assert answer.is_best[place] == (token == int(np.argmax(logits)))


def test_probabilities_of_all_words_sum_to_1():
    """Of all words of two tokens, in both forms."""
    fns, params = predict_fns("t5")
    words = [list(word) for word in itertools.product(range(VOCAB), repeat=2)]
    for fill in ("ltr", "infill"):
        (answers,) = fns.logprobs(params, [Question(Prompt([5, 6]), words, fill)])
        total = sum(np.exp(answer.logprobs.sum()) for answer in answers)
        assert total == pytest.approx(1, abs=1e-4)


def test_states_are_where_an_answer_begins():
    """Or what stands at a sentinel. A prompt that ends as a source does gets no second end."""
    fns, params = predict_fns("bart")
    graphdef, _ = random_params("bart")
    model = nnx.merge(graphdef, params)
    for fill in ("ltr", "infill"):
        prompts = [Prompt(ids) for ids in [*SOURCES, [*SOURCES[0], 2]]]
        states = fns.states(params, prompts, fill)
        np.testing.assert_allclose(states[3], states[0], atol=1e-5)
        for ids, state in zip(SOURCES, states):
            logits = state @ np.asarray(model.head_table[...]).T + np.asarray(params["head_bias"])
            source, begun = ([*ids, 2], [1]) if fill == "ltr" else ([*ids, 18, 2], [18])
            wanted = logits_by_hand("bart", source, begun)
            np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_sources_of_a_tokenizer_without_bos():
    """What stands for BOS before documents is no part of a source."""
    graphdef, params = random_params("t5")
    answers = SourceAnswers(
        sharding.make_mesh({}, jax.devices()[:1]),
        make_tree_logprobs(graphdef),
        make_tree_states(graphdef),
        before=[],
        end=[2],
        sentinels=[],
    )
    limits = Limits(4, LENGTH, never_stop)
    prompts = [Prompt(ids) for ids in ([5, 6], [2, 5, 6], [5, 6, 2])]
    found = answers.logprobs(params, [Question(prompt, WORDS) for prompt in prompts], limits)
    wanted = log_softmax(logits_by_hand("t5", [5, 6, 2], []))[4]
    for of_prompt in found:
        assert of_prompt[0].logprobs[0] == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize(
    "prompt, fill, message",
    [
        (Prompt([4], {AFTER: np.array([5])}), "ltr", "an answer has no text behind it"),
        (Prompt([4]), "max_first", r"valid of an encoder-decoder: \['ltr', 'infill'\]"),
        (Prompt([4], {"image": np.zeros(2)}), "ltr", r"a prompt has the arrays \['image'\]"),
    ],
)
def test_questions_that_it_has_no_answer_to(prompt, fill, message):
    fns, params = predict_fns("t5")
    with pytest.raises(ValueError, match=message):
        fns.logprobs(params, [Question(prompt, WORDS, fill)])


# --- fields ---


FIELDS = {
    "vocab_size": 23,
    "context_length": 9,
    "source_length": 10,
    "num_layers": 3,
    "encoder_layers": 1,
    "embed_dim": 10,
    "mlp_dim": 14,
    "num_heads": 3,
    "head_dim": 8,
    "norm": "layernorm",
    "norm_eps": 0.1,
    "residual": "post_norm",
    "activation": "silu",
    "gated_mlp": True,
    "positions": "sinusoids",
    "position_offset": 3,
    "relative_buckets": 6,
    "relative_distance": 5,
    "scale_scores": True,
    "embed_scale": True,
    "head_scale": True,
    "embed_norm": True,
    "bias": "mlp",
    "tie_embeddings": False,
    "start_id": 5,
    "dropout": 0.3,
    "attention_dropout": 0.3,
    "init_std": 0.3,
    "param_dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "remat": "full",
    "scan_unroll": 2,
}
# How the model is executed, and sizes that only learned positions have.
EXECUTION = ("remat", "scan_unroll", "context_length", "source_length", "position_offset")
EXECUTION += ("init_std",)


def test_every_field_moves_something():
    assert set(FIELDS) == {f for f in config_lib.model(config_lib.ENCDEC) if f != "type"}
    batch = rows_of(make_pairs(SIZES))

    keys = jax.random.split(jax.random.key(0), len(batch["tokens"]))

    def outputs(**changes):
        graphdef, params = drawn(make_config(**dict(num_layers=1, encoder_layers=2) | changes))

        @jax.jit
        def run(params):
            model = nnx.merge(graphdef, params)
            arrays = (batch["tokens"], batch["positions"], batch["segments"])
            hidden = model(*arrays, source=batch_contract.source_of(batch), keys_B=keys).hidden
            return model.logits(hidden)

        return np.asarray(run(params)).astype(np.float32)

    plain = outputs()
    for field, value in FIELDS.items():
        if field in EXECUTION:
            continue
        changed = outputs(**{field: value})
        is_same = changed.shape == plain.shape and np.abs(changed - plain).max() < 1e-5
        assert not is_same, field
    for std in (0.1, 0.3):
        model = EncoderDecoder(make_config(init_std=std), jax.random.key(0))
        assert np.std(model.embed.table[...]) == pytest.approx(std, rel=0.2)
    halves = outputs(positions="sinusoids_halves")
    assert np.abs(halves - outputs(positions="sinusoids")).max() > 1e-3

    def table_rows(**changes):
        config = make_config(positions="learned", **changes)
        model = nnx.eval_shape(lambda: EncoderDecoder(config, jax.random.key(0)))
        return model.position_embed.table.shape[0], model.encoder_position_embed.table.shape[0]

    assert table_rows() == (LENGTH, SOURCE_LENGTH)
    assert table_rows(context_length=9, source_length=10, position_offset=3) == (12, 13)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(positions="rope"), "config.model.positions = 'rope'; valid: "),
        (dict(relative_distance=4), "relative_distance = 4 must be above half of .*_buckets = 8"),
        (dict(start_id=19), "config.model.start_id = 19 must be below config.model.vocab_size"),
        (dict(bias="layers"), r"config.model.bias = 'layers': \['layers'\]; valid"),
        (dict(vocab_size=0), "a model of its own needs both"),
        (dict(remat="some"), "config.model.remat = 'some'"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_flops_are_those_of_the_matmuls():
    config = make_config()
    width, length, source = 2 * 6, 10, 20
    encoder = 3 * (4 * 8 * width + 2 * 8 * 12)
    decoder = 2 * (4 * 8 * width + 2 * 8 * 12) + 2 * 2 * 8 * width + VOCAB * 8
    # Keys and values of the source are computed once for each of its tokens.
    per_target = decoder + source / length * (encoder + 2 * 2 * 8 * width)
    scores = 2 * width * (length / 2 + source) + source / length * 3 * width * source
    forward = 2 * per_target + 4 * scores
    got = encdec.flops_per_token(config, length, backward=False, source_length=source)
    assert got == pytest.approx(forward)
    assert encdec.flops_per_token(config, length, source_length=source) == pytest.approx(
        3 * forward
    )


# --- sources and targets ---


def write_lines(folder, sources, targets):
    (folder / "train.de").write_text("\n".join(sources) + "\n")
    (folder / "train.en").write_text("\n".join(targets) + "\n")
    return dict(source=f"{folder}/{{split}}.de", target=f"{folder}/{{split}}.en")


def test_lines_belong_together(tmp_path):
    paths = write_lines(tmp_path, ["Eins", "", " Zwei "], ["One", "", "Two"])
    documents = seq2seq.lines("train", **paths, lowercase=True)
    assert [(d.source, d.target) for d in documents] == [("eins", "one"), ("zwei", "two")]
    assert documents[1].name.endswith("de:3")
    assert documents.kind == "seq2seq"
    upper = seq2seq.lines("train", **paths)
    assert upper[0].source == "Eins" and upper.fingerprint != documents.fingerprint


@pytest.mark.parametrize(
    "sources, targets, message",
    [
        (["a", "b"], ["x"], "has 2 lines and .* 1 in split 'train'"),
        (["a", "b"], ["x", ""], "train.de:2 has no target|{split}.de:2 has no target"),
        (["", "b"], ["x", "y"], "de:1 has no source"),
        ([""], [""], "have no texts in split 'train'"),
    ],
)
def test_lines_without_their_other_half(tmp_path, sources, targets, message):
    with pytest.raises(ValueError, match=message):
        seq2seq.lines("train", **write_lines(tmp_path, sources, targets))


def test_jsonl_of_sources_and_targets(tmp_path):
    records = [dict(article=f"text {i}", summary=f"{i}") for i in range(40)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = dict(path=str(path), held_out=0.25, source_key="article", target_key="summary")
    train, held_out = [seq2seq.jsonl(s, **arguments) for s in ("train", "validation")]
    assert len(train) + len(held_out) == 40 and len(held_out) > 2
    assert train[0].source.startswith("text")
    path.write_text('{"article": "a", "summary": ""}\n')
    with pytest.raises(ValueError, match="data.jsonl:1: summary is ''; wanted a text"):
        seq2seq.jsonl("train", **arguments)


def test_what_is_longer_than_a_row_is_left_out(tmp_path, caplog):
    paths = write_lines(tmp_path, ["abc", "abcdef", "ab"], ["x", "y", "uvwxyz"])
    documents = seq2seq.lines("train", **paths)
    units = seq2seq.encode(documents, ByteTokenizer(), length=5, source_length=6)
    assert [unit.name[-1] for unit in units] == ["1"]
    arrays = units[0].arrays
    assert arrays["source"].tolist() == [256, *b"abc", 257]
    assert arrays["targets"].tolist() == [256, *b"x", 257]
    assert arrays["tokens"].tolist()[1:] == [256, *b"x"]
    assert "1 left out: the source is longer than config.objective.source_length" in caplog.text
    assert "1 left out: the target is longer than config.data.length" in caplog.text
    with pytest.raises(ValueError, match="no text is left"):
        seq2seq.encode(documents, ByteTokenizer(), length=2, source_length=6)


# --- runs ---


def configure(tiny, folder, **changes):
    """Copies of short texts, as lines of two files."""
    config = tiny.copy_and_resolve_references().unlock()
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abc"), rng.integers(1, 8))) for _ in range(64)]
    for split in ("train", "val"):
        for side in ("de", "en"):
            (folder / f"{split}.{side}").write_text("\n".join(texts) + "\n")
    config.data.source = "lm.data.seq2seq.lines"
    config.data.source_args = dict(
        source=f"{folder}/{{split}}.de", target=f"{folder}/{{split}}.en", lowercase=False
    )
    config.data.label_prompt = ""
    config.objective = config_lib.ConfigDict(dict(type="lm.objectives.seq2seq", source_length=24))
    config.model = small_encdec(source_length=32, scan_unroll=2)
    config.evals.held_out = entries.held_out("TextLoss", every=3, batch_size=8, split="val")
    config.update_from_flattened_dict(changes)
    return config


def test_a_run_learns_is_audited_asked_and_generates(tiny, tmp_path, fast_runs):
    """By the same evals as other models; and what it can't be asked is refused."""
    records = [dict(text="ab", label="red"), dict(text="cab", label="blue")]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = configure(tiny, tmp_path)
    words = (("red", ("ab",)), ("blue", ("ba", "cab")))
    config.evals.words = entries.task(
        "sst2",
        source=dict(path=str(path), split="test"),
        label="label",
        prompt=dict(templates=("{text}",)),
        verbalizer=dict(words=(words,)),
        priors=(),
    )
    config.evals.texts = entries.task(
        "multi30k_de_en",
        source=dict(lines={side: f"{tmp_path}/val.{side}" for side in ("de", "en")}),
        prompt=dict(template="{de}"),
        output=dict(max_new_tokens=12, num_beams=2),
        scores=("chrf",),
        max_documents=6,
    )
    config.optimizer.learning_rate = 1e-2
    config.train.length = "40 steps"
    metrics = run_training(config, tmp_path / "run")
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert losses[-1] < losses[0] - 1
    assert metrics["eval/held_out/loss"] < 4
    assert 0 <= metrics["eval/words/accuracy"] <= 1
    assert metrics["eval/texts/examples"] == 6

    text = audit.audit(config, tmp_path / "audit", jax.devices()[:1], 1)
    assert "source: '<s>" in text

    # What it can't answer is found before it is trained.
    for name, key, value, message in (
        ("words", "verbalizer.fill", "parallel", "'parallel'; valid: .*'infill'"),
        ("texts", "output.max_new_tokens", 33, "wants texts of 33 tokens"),
    ):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({f"evals.{name}.{key}": value})
        with pytest.raises(ValueError, match=message):
            build.build(other, jax.devices()[:1]).make_evaluators()

    config.evals.perplexity = entries.perplexity(every=0, split="val")
    with pytest.raises(ValueError, match="Perplexity takes text, and .* of the kind 'seq2seq'"):
        run_training(config, tmp_path / "other")


def test_a_recurrent_net_learns_too(tiny, tmp_path, fast_runs):
    config = configure(tiny, tmp_path)
    config.model = config_lib.model("lm.models.recurrent", cell="gru", source_length=32)
    config.model.update(context_length=32, embed_dim=32, hidden_dim=48, param_dtype="float32")
    config.optimizer.learning_rate = 1e-2
    config.train.length = "30 steps"
    metrics = run_training(config, tmp_path / "run")
    assert metrics["eval/held_out/loss"] < 2.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective.source_length": 64}, "source_length = 64: the model reads sources of 32"),
        ({"data.packing": "concat_then_split"}, "targets from their sources; wanted 'first_fit'"),
        ({"mesh.sequence": 2, "mesh.fsdp": 1}, "config.mesh.sequence splits rows"),
        (
            {"objective.type": "lm.objectives.causal"},
            "'lm.objectives.causal' has no sources, which an encoder-decoder reads; wanted lm.obj",
        ),
        (
            {"objective.type": "lm.objectives.masked"},
            "'lm.objectives.masked' has no sources, which an encoder-decoder reads",
        ),
    ],
)
def test_configurations_that_make_no_sense(tiny, tmp_path, changes, message):
    config = configure(tiny, tmp_path, **changes)
    if changes.get("objective.type") == "lm.objectives.causal":
        config.objective = config_lib.default().objective
    elif changes.get("objective.type"):
        config.objective = config_lib.ConfigDict(dict(type="lm.objectives.masked", rate=0.2))
        config.tokenizer.reserve = "mask"
    with pytest.raises(ValueError, match=message):
        build.build(config, jax.devices()[: 2 if "mesh.sequence" in changes else 1])


def test_a_decoder_reads_no_sources(tiny, tmp_path):
    config = configure(tiny, tmp_path)
    config.model = tiny.model
    with pytest.raises(ValueError, match="reads sources of 0 tokens at most"):
        build.build(config, jax.devices()[:1])


def test_texts_by_the_command(tiny, tmp_path, fast_runs):
    """lm.generate, by sampling and by beams, and what it refuses."""
    config = configure(tiny, tmp_path)
    run_training(config, tmp_path / "run")
    common = [f"--workdir={tmp_path}/run", "--max_new_tokens=6", "--prompt=abc"]
    commands = [
        common,
        [*common, "--num_beams=3", "--num_samples=2"],
        [*common, "--num_beams=3", "--temperature=1"],
        [*common, "--num_beams=2", "--num_samples=3"],
        [*common, "--length_penalty=2"],
        [*common[:2], f"--prompt={'a' * 40}"],
    ]
    plain, beams, *refused = run_commands("lm.generate", commands, tmp_path / "commands")
    assert plain[0] == 0, plain[2]
    assert beams[0] == 0, beams[2]
    lines = [json.loads(line) for line in beams[1].splitlines()]
    assert [line["sample"] for line in lines] == [0, 1]
    messages = (
        "--temperature: with --num_beams nothing is drawn",
        "--num_samples=3 is above --num_beams=2",
        "--length_penalty goes with --num_beams above 1",
        "prompt 0 has 41 tokens; wanted 1 to 31: the encoder's context of 32",
    )
    for (status, _, err), message in zip(refused, messages, strict=True):
        assert status and message in err, err


def test_the_first_bias_is_that_of_distance_0():
    """A key far behind has the last bucket, and one before the query none of the others'."""
    from lm.nn.positions import RelativeBias

    bias = RelativeBias(
        jax.random.key(0),
        2,
        num_buckets=8,
        max_distance=10,
        sees_later=True,
        std=1.0,
        dtype="float32",
    )
    places = jnp.arange(12)[None]
    got = np.asarray(bias(places, places))[0]
    table = np.asarray(bias.table[...])
    np.testing.assert_array_equal(got[:, 5, 5], table[0])
    np.testing.assert_array_equal(got[:, 5, 4], table[1])
    np.testing.assert_array_equal(got[:, 5, 6], table[5])
    np.testing.assert_array_equal(got[:, 11, 0], table[3])
    np.testing.assert_array_equal(got[:, 0, 11], table[7])


def test_sinusoids_are_the_papers_and_marians():
    """A cosine behind its sine, or all cosines behind all sines; by the formula of each."""
    paper = sinusoids(40, 6, interleaved=True)
    halves = sinusoids(40, 6, interleaved=False)
    for place, i in itertools.product((0, 1, 7, 39), range(3)):
        angle = place / 10000 ** (2 * i / 6)
        wanted = [np.sin(angle), np.cos(angle)]
        np.testing.assert_allclose(paper[place, 2 * i : 2 * i + 2], wanted, atol=1e-6)
        np.testing.assert_allclose(halves[place, [i, 3 + i]], wanted, atol=1e-6)


def test_padding_is_never_generated():
    """Of an encoder-decoder whose tokenizer has padding; what ends a text ends each source."""
    graphdef, params = random_params("t5")
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    model = build.AbstractModel(make_config(), graphdef, {}, {}, mesh)
    padded_by_eos = ByteTokenizer()
    padded_by_eos.roles["pad"] = (257,)
    tokenizers = {(258,): ByteTokenizer("pad"), (): ByteTokenizer("mask")}
    for never_ids, tokenizer in [*tokenizers.items(), ((), padded_by_eos)]:
        generator = build.generator_of(model, params, Sampling(), tokenizer)
        assert generator.never_ids == never_ids
        assert generator.longest_prompt(3) == SOURCE_LENGTH - 1
