"""Masked language models: the objective, how they answer, and what they are not asked."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from lm import build, step
from lm import config as config_lib
from lm.data import pack
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer
from lm.evals import entries
from lm.evals.masked_answers import MaskedAnswers
from lm.evals.perplexity import PseudoPerplexity
from lm.evals.predict import CompiledFns, PredictFns, Prompt, Question
from lm.nn import masks
from lm.objectives import causal, masked
from lm.sharding import make_mesh
from tests.helpers import (
    VERBALIZER,
    assert_trees_close,
    model_config,
    random_model,
    read_metrics,
    run_training,
)

VOCAB = 12
MASK, END = 10, 11
ENCODER = dict(
    visible="full",
    norm="layernorm",
    residual="post_norm",
    embed_norm=True,
    token_types=2,
    positions="learned",
    bias="qkv,out,mlp,norm,head",
    head_transform=True,
    tie_embeddings=True,
)


@functools.cache
def encoder(**changes):
    return random_model(model_config(**ENCODER | dict(vocab_size=VOCAB) | changes))


@functools.cache
def logits_of():
    graphdef, params = encoder()

    @jax.jit
    def logits(tokens):
        positions = np.arange(len(tokens), dtype=np.int32)
        segments = np.ones(len(tokens), np.int32)
        model = nnx.merge(graphdef, params)
        hidden = model(tokens[None], positions[None], segments[None]).hidden
        return jax.nn.log_softmax(model.logits(hidden)[0])

    return logits


def log_probs(ids):
    """[T, V], of a plain text."""
    return np.asarray(logits_of()(np.asarray(ids, np.int32)))


@functools.cache
def predict_fns(batch_size=4, length=16):
    graphdef, _ = encoder()
    mesh = make_mesh({}, jax.devices()[:1])
    answers = MaskedAnswers(
        mesh,
        step.make_tree_logprobs(graphdef),
        step.make_tree_states(graphdef),
        mask_id=MASK,
        end=[END],
    )
    fns = CompiledFns(
        mesh,
        reserved=2,
        logprobs=answers.logprobs,
        infill=answers.infill,
        states=answers.states,
    )
    return PredictFns(fns, batch_size=batch_size, length=length)


def by_hand(prompt, word, fill, after=()):
    """The log-probabilities of a word's tokens, row by row."""
    logprobs = [0.0] * len(word)
    known = {}
    for _ in word:
        blank = [known.get(place, MASK) for place in range(len(word))]
        row = log_probs([*prompt, *blank, *after, END])[len(prompt) :]
        left = [place for place in range(len(word)) if place not in known]
        place = left[0]
        if fill == "max_first":
            place = max(left, key=lambda place: row[place][word[place]])
        logprobs[place] = row[place][word[place]]
        if fill == "parallel":
            known[place] = MASK
        else:
            known[place] = word[place]
    return logprobs


@pytest.mark.parametrize("fill", ["ltr", "parallel", "max_first"])
@pytest.mark.parametrize("after", [(), (3, 4)])
def test_answers_are_those_of_plain_rows(fill, after):
    words = [[1], [2], [1, 5], [1, 6, 2], [7, 7, 7], [1, 5, 3]]
    prompts = [[0, 1, 2], [0, 5]]
    arrays = {"after": np.array(after, np.int32)} if after else {}
    questions = [Question(Prompt(ids, arrays), words, fill) for ids in prompts]

    for prompt, answers in zip(prompts, predict_fns().logprobs(encoder()[1], questions)):
        for word, answer in zip(words, answers, strict=True):
            wanted = by_hand(prompt, word, fill, after)
            np.testing.assert_allclose(answer.logprobs, wanted, rtol=1e-4, atol=1e-5)


def test_which_ids_are_likeliest():
    row = log_probs([0, 1, MASK, END])[2]
    words = [[i] for i in range(VOCAB)]
    (answers,) = predict_fns().logprobs(encoder()[1], [Question(Prompt([0, 1]), words)])
    assert [bool(answer.is_best[0]) for answer in answers] == (row == row.max()).tolist()


@pytest.mark.parametrize(
    "fill, is_distribution", [("ltr", True), ("parallel", True), ("max_first", False)]
)
def test_probabilities_of_all_words_sum_to_one(fill, is_distribution):
    """Over all words of two tokens, and of one."""
    for length in (1, 2):
        words = [list(word) for word in itertools.product(range(VOCAB), repeat=length)]
        (answers,) = predict_fns().logprobs(encoder()[1], [Question(Prompt([0, 3]), words, fill)])
        total = sum(np.exp(answer.logprobs.sum(dtype=np.float64)) for answer in answers)
        if length == 1 or is_distribution:
            assert total == pytest.approx(1, abs=1e-5)
        else:
            assert abs(total - 1) > 1e-5


def test_max_first_may_choose_another_word():
    """Whose order of filling depends on the word, so that it isn't the chain rule's."""
    words = [list(word) for word in itertools.product(range(VOCAB), repeat=2)]
    best = {}
    for fill in ("ltr", "parallel", "max_first"):
        scores = []
        for prompt in itertools.product(range(VOCAB), repeat=2):
            scores.append(Question(Prompt([*prompt]), words, fill))
        answers = predict_fns(batch_size=32).logprobs(encoder()[1], scores)
        best[fill] = [np.argmax([answer.logprobs.sum() for answer in row]) for row in answers]
    assert best["ltr"] != best["parallel"]
    assert best["ltr"] != best["max_first"]


def test_words_share_rows(monkeypatch):
    """All labels of one token are one row, and words that begin alike share those beginnings."""
    from lm.evals import masked_answers

    rows = []
    run_rows = masked_answers.run_rows

    def record(mesh, function, params, batch, *rest):
        rows.extend(batch)
        return run_rows(mesh, function, params, batch, *rest)

    monkeypatch.setattr(masked_answers, "run_rows", record)
    words = [[i] for i in range(VOCAB)]
    predict_fns().logprobs(encoder()[1], [Question(Prompt([0]), words)])
    assert len(rows) == 1

    rows.clear()
    words = [[1, 2], [1, 3], [2, 4]]  # both masks; behind 1; behind 2
    predict_fns().logprobs(encoder()[1], [Question(Prompt([0]), words)])
    assert len(rows) == 3


def test_states_are_those_of_the_mask():
    _, params = encoder()
    (state,) = predict_fns().states(params, [Prompt([0, 1, 2])])
    # What the table's rows are multiplied with.
    logits = params["embed"]["table"] @ state + params["head_bias"]
    np.testing.assert_allclose(
        jax.nn.log_softmax(logits),
        log_probs([0, 1, 2, MASK, END])[3],
        rtol=1e-4,
        atol=1e-5,
    )


def test_pseudo_perplexity_asks_for_each_token():
    """Given all others of its window; what begins a document is given."""
    text = "abc" * 6

    class Ids(ByteTokenizer):
        """A few ids, as the small model has."""

        around = ((0,), (END,))

        def encode(self, text):
            return [ord(letter) - ord("a") + 1 for letter in text]

    evaluator = PseudoPerplexity(
        predict_fns(),
        name="pseudo",
        documents=Documents([Document(text, "d", "")], "f"),
        encoder=pack.Encoder(Ids(), ""),
        max_documents=0,
    )
    metrics = dict(evaluator.run(encoder()[1]))

    ids = [0, *Ids().encode(text)]
    losses = []
    for start in (0, 14):
        window = ids[start : start + 14]
        for place in range(1 if start == 0 else 0, len(window)):
            row = [*window[:place], MASK, *window[place + 1 :], END]
            losses.append(-log_probs(row)[place][window[place]])
    assert metrics["tokens"] == len(losses) == 18
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics["pseudo_perplexity"] == pytest.approx(np.exp(metrics["loss"]))


# --- the objective ---

SHAPE = (3, 16)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, VOCAB - 2, SHAPE).astype(np.int32)
    weights = (rng.random(SHAPE) < 0.2).astype(np.float32)
    segments = np.array([[1] * 6 + [2] * 7 + [0] * 3] * 3, np.int32)
    positions = np.array([[*range(6), *range(7), 0, 0, 0]] * 3, np.int32)
    weights *= segments > 0
    tokens = np.where(weights > 0, MASK, targets).astype(np.int32)
    return dict(
        tokens=tokens, targets=targets, weights=weights, positions=positions, segments=segments
    )


def loss_and_grads(chunk, z_loss=0.0, batch=None, **changes):
    graphdef, params = encoder(**changes)
    loss = masked.make_loss(chunk=chunk, z_loss=z_loss)
    batch = batch or make_batch()

    def total(params):
        value, count, terms = loss(nnx.merge(graphdef, params), batch, None)
        return 3.0 * value, (count, terms)

    with jax.numpy_dtype_promotion("standard"):
        function = jax.jit(jax.value_and_grad(total, has_aux=True))
        return jax.device_get(function(params))


@pytest.mark.parametrize("changes", [{}, dict(head_transform=False, bias="", tie_embeddings=False)])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_the_head_sees_what_counts(chunk, changes):
    """Chunks without targets are left out, and the loss and its gradient stay what they are."""
    (value, (count, terms)), grads = loss_and_grads(0, 0.1, **changes)
    (chunked, (chunked_count, chunked_terms)), chunked_grads = loss_and_grads(chunk, 0.1, **changes)
    np.testing.assert_allclose(chunked, value, rtol=1e-5)
    assert chunked_count == count
    for name in terms:
        np.testing.assert_allclose(chunked_terms[name], terms[name], rtol=1e-5)
    assert_trees_close(chunked_grads, grads, rtol=2e-4, atol=1e-4)


def test_causal_chunks_know_the_bias_of_the_head():
    """The next token's loss, of a head with a transform and a bias."""
    graphdef, params = encoder(visible="causal")

    def value(chunk):
        loss = causal.make_loss(z_loss=0.1, chunk=chunk)
        return jax.jit(
            jax.value_and_grad(
                lambda params: loss(nnx.merge(graphdef, params), make_batch(), None)[0]
            )
        )(params)

    assert_trees_close(value(4), value(0), rtol=2e-4, atol=1e-4)


def test_a_text_in_a_row_is_the_text_alone():
    batch = make_batch()
    (packed, _), grads = loss_and_grads(0)
    alone = []
    for row, number in itertools.product(range(3), (1, 2)):
        places = batch["segments"][row] == number
        one = {name: array[row][places][None] for name, array in batch.items()}
        one["segments"] = np.ones_like(one["segments"])
        alone.append(loss_and_grads(0, batch=one))
    np.testing.assert_allclose(sum(value for (value, _), _ in alone), packed, rtol=1e-5)
    summed = jax.tree.map(lambda *parts: sum(parts), *(grads for _, grads in alone))
    assert_trees_close(summed, grads, rtol=1e-3, atol=1e-4)


def test_remat_changes_nothing():
    (value, _), grads = loss_and_grads(4)
    (again, _), grads_again = loss_and_grads(4, remat="full")
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert_trees_close(grads_again, grads, rtol=1e-4, atol=1e-5)


def test_log_probabilities_stand_at_their_places():
    graphdef, params = encoder()
    batch = make_batch()
    got, _ = jax.jit(lambda p: masked.token_logprobs(nnx.merge(graphdef, p), batch))(params)
    wanted = log_probs(batch["tokens"][0, :6])[np.arange(6), batch["targets"][0, :6]]
    np.testing.assert_allclose(got[0, :6], wanted, rtol=1e-4, atol=1e-5)


def test_an_encoder_sees_all_of_a_text_unless_told_otherwise():
    graphdef, params = encoder()
    model = nnx.merge(graphdef, params)
    arrays = [make_batch()[name] for name in ("tokens", "positions", "segments")]
    whole = model(*arrays).hidden
    np.testing.assert_array_equal(whole, model(*arrays, visible=masks.FULL).hidden)
    assert np.abs(whole - model(*arrays, visible=masks.CAUSAL).hidden).max() > 0.1


def test_flops_count_all_keys():
    from lm.models import transformer

    config = model_config(**ENCODER)
    per_token = functools.partial(transformer.flops_per_token, config, 16)
    plain = dataclasses.replace(config, visible="causal", head_transform=False)
    transform = 6 * config.embed_dim**2
    assert per_token() == per_token(causal=False)
    head = 6 * (config.vocab_size * config.embed_dim + transform / 6)
    assert per_token() - per_token(head=0.25) == pytest.approx(0.75 * head)
    assert per_token() - transform == transformer.flops_per_token(plain, 16, causal=False)


# --- runs ---


@pytest.fixture
def masked_config(tiny):
    c = tiny.copy_and_resolve_references().unlock()
    c.model.update(ENCODER | dict(param_dtype="float32"))
    c.tokenizer.reserve = "mask"
    c.objective = ConfigDict(dict(type="lm.objectives.masked", rate=0.2, chunk=8))
    c.evals = ConfigDict(
        dict(
            masked=entries.held_out("TextLoss", every=3, batch_size=8),
            library=entries.classification(VERBALIZER, every=3, batch_size=8),
            pseudo=entries.pseudo_perplexity(every=0, batch_size=8, max_documents=2),
        )
    )
    return c


@pytest.mark.usefixtures("fast_runs")
def test_an_encoder_learns_and_classifies(masked_config, tmp_path):
    """The label's word is found behind the question, where a mask stands."""
    metrics = run_training(masked_config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert metrics["train/loss"] < lines[0]["train/loss"]
    assert metrics["eval/masked/loss"] < metrics["train/loss"] + 1
    assert metrics["eval/library/examples"] > 0
    assert metrics["eval/pseudo/pseudo_perplexity"] > 1


CAUSAL = config_lib.default().objective.to_dict()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.visible": "causal"}, "trains encoders, and config.model.visible = 'causal'"),
        ({"objective": CAUSAL}, "model.visible = 'full': the model sees it"),
        ({"tokenizer.reserve": ""}, "has no mask"),
        ({"objective.rate": 2.0}, "rate = 2.0"),
        ({"model.window": 4}, "attention of the kind 'full' has no window"),
    ],
)
def test_bad_input(masked_config, changes, message):
    if "objective" in changes:
        masked_config.objective = ConfigDict(changes["objective"])
    else:
        masked_config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        build.build(masked_config, jax.devices()[:1])


@pytest.mark.parametrize(
    "entry, message",
    [
        (entries.perplexity(every=0), "this model has no token_logprobs, which config.evals.e"),
        (
            entries.samples(("a",), every=0, max_new_tokens=4),
            "this model has no make_generator, which config.evals.e",
        ),
    ],
)
def test_what_an_encoder_is_not_asked(masked_config, entry, message):
    masked_config.evals = ConfigDict(dict(e=entry))
    experiment = build.build(masked_config, jax.devices()[:1])
    with pytest.raises(ValueError, match=message):
        experiment.make_evaluators()


def test_an_encoder_continues_nothing():
    graphdef, params = encoder()
    with pytest.raises(ValueError, match="sees texts whole, and continues none"):
        nnx.merge(graphdef, params).init_cache(2, 8)


def test_a_causal_model_fills_no_blanks(tiny):
    experiment = build.build(tiny, jax.devices()[:1])
    fns = PredictFns(experiment.eval_fns(), batch_size=4, length=16)
    assert not fns.fills_blanks
    with pytest.raises(ValueError, match="fill = 'parallel' is for masked models"):
        fns.logprobs(None, [Question(Prompt([1]), [[2]], "parallel")])
    with pytest.raises(ValueError, match="this model has no infill"):
        fns.infill(None, [Question(Prompt([1], {"after": np.array([2])}), [[2]])])
