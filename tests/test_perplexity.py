"""Perplexity: each target of each text once, whatever the batches and the mesh."""

import lzma
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import build, sharding, step
from lm import config as config_lib
from lm.data import pack
from lm.data.sources import Document, Documents, take
from lm.data.tokenizer import ByteTokenizer
from lm.evals import perplexity
from lm.evals.predict import PredictFns
from lm.objectives import causal

LENGTH = 32
MESHES = {
    "one": (1, {}),
    "data": (8, {"data": 8}),
    "sequence": (8, {"data": 4, "sequence": 2}),
    "fsdp": (8, {"data": 2, "fsdp": 2, "tensor": 2}),
}
RNG = np.random.default_rng(0)
TEXTS = ["".join(RNG.choice(list("abcdé \n€"), size)) for size in RNG.integers(1, 90, 45)]
DOCUMENTS = Documents(
    [Document(text, f"d{i}", ("red", "green")[i % 2]) for i, text in enumerate(TEXTS)],
    "fingerprint",
)
PLAIN, LABELLED = (pack.Encoder(ByteTokenizer(), prompt) for prompt in ("", "\nLabel:"))


@cache
def model():
    """(graphdef, parameters in numpy, logical axes) of a small Transformer with weights large
    enough to have opinions.
    """
    c = config_lib.default()
    c.data.length = LENGTH
    c.model.update(
        dict(
            vocab_size=260,
            context_length=LENGTH,
            num_layers=1,
            embed_dim=16,
            mlp_dim=32,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            param_dtype="float32",
            compute_dtype="float32",
        )
    )
    _, make_model = build.model(c, 258, "cpu")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(jax.random.key(0))), nnx.Param)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: rng.normal(0, 0.6, p.shape).astype(p.dtype), nnx.to_pure_dict(abstract)
    )
    return graphdef, params, sharding.logical_axes(abstract)


def make_fns(token_logprobs, mesh="one", batch_size=8, check_stop=lambda: None):
    count, sizes = MESHES[mesh]
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    return PredictFns(
        mesh,
        batch_size=batch_size,
        length=LENGTH,
        token_logprobs=token_logprobs,
        tree_logprobs=len,
        make_generate=None,
        check_stop=check_stop,
    )


def evaluate(fns, params=None, encoder=PLAIN, documents=DOCUMENTS, max_documents=0, stride=0):
    return dict(
        perplexity.Perplexity(
            fns, documents=documents, encoder=encoder, max_documents=max_documents, stride=stride
        ).run(params)
    )


@cache
def model_fns(mesh, batch_size):
    # compiled once
    return make_fns(step.make_token_logprobs(model()[0], causal.token_logprobs), mesh, batch_size)


def of_model(*, mesh="one", batch_size=8, change=lambda p: p, **kwargs):
    _, params, axes = model()
    fns = model_fns(mesh, batch_size)
    with jax.set_mesh(fns._mesh):
        params = jax.device_put(
            jax.tree.map(change, params), sharding.shardings(params, axes, fns._mesh)
        )
        return evaluate(fns, params, **kwargs)


@cache
def in_eights():
    return of_model(batch_size=8)


@cache
def direct():
    """(nll, targets) of each document by itself, in rows of one window, from the model's logits."""
    graphdef, params, _ = model()
    rows, owners = [], []
    for number, document in enumerate(DOCUMENTS):
        ids = [256, *document.text.encode()]
        for start in range(0, len(ids) - 1, LENGTH):
            window = ids[start : start + LENGTH + 1]
            rows.append(window + [0] * (LENGTH + 1 - len(window)))
            owners.append((number, len(window) - 1))
    rows = jnp.asarray(rows)

    @jax.jit
    def logprobs(params):
        transformer = nnx.merge(graphdef, params)
        shape = (len(rows), LENGTH)
        hidden = transformer(
            rows[:, :-1], jnp.broadcast_to(jnp.arange(LENGTH), shape), jnp.ones(shape, jnp.int32)
        ).hidden
        return jax.nn.log_softmax(transformer.logits(hidden))

    logp = np.asarray(logprobs(params), np.float64)
    nll, counts = np.zeros(len(TEXTS)), np.zeros(len(TEXTS), int)
    for row, p, (number, size) in zip(np.asarray(rows), logp, owners):
        nll[number] -= p[np.arange(size), row[1 : size + 1]].sum()
        counts[number] += size
    return nll, counts


def test_loss_is_that_of_each_document_by_itself():
    nll, counts = direct()
    values = in_eights()
    assert values["tokens"] == counts.sum() and values["documents"] == len(TEXTS)
    assert values["loss"] == pytest.approx(nll.sum() / counts.sum(), rel=1e-5)
    assert abs(values["loss"] - math.log(260)) > 0.1  # the model has opinions
    some = of_model(max_documents=7)
    chosen = [DOCUMENTS.items.index(d) for d in take(DOCUMENTS, 7)]
    assert (
        some["loss"] == pytest.approx(nll[chosen].sum() / counts[chosen].sum(), rel=1e-5)
        and some["documents"] == 7
    )


@pytest.mark.parametrize("most", [0, 1, 2, 7, 44, 45, 1000])
def test_documents_are_taken_evenly(most):
    numbers = [DOCUMENTS.items.index(d) for d in take(DOCUMENTS, most)]
    assert len(numbers) == min(most or 45, 45) and numbers[0] == 0
    # from all of the split, none twice
    assert set(np.diff([*numbers, 45])) <= {45 // len(numbers), -(-45 // len(numbers))}


@pytest.mark.parametrize(
    "mesh, batch_size", [("one", 24), ("data", 8), ("sequence", 24), ("fsdp", 16)]
)
def test_loss_does_not_depend_on_batches_and_mesh(mesh, batch_size):
    values, expected = of_model(mesh=mesh, batch_size=batch_size), in_eights()
    assert {k: values[k] for k in ("tokens", "bytes", "documents")} == {
        k: expected[k] for k in ("tokens", "bytes", "documents")
    }
    assert values["loss"] == pytest.approx(expected["loss"], abs=1e-6 * expected["loss"])


@pytest.mark.parametrize(
    "mesh, batch_size",
    [
        ("one", 1),
        ("one", 7),
        ("one", 8),
        ("one", 16),
        ("one", 24),
        ("data", 8),
        ("sequence", 16),
        ("data", 64),
    ],
)
def test_every_target_counts_exactly_once(mesh, batch_size):
    # The "log-probability" of a target is a number of its own: none may be missing, doubled, or
    # padding.
    values = evaluate(
        make_fns(
            lambda params, batch: -(batch["targets"] + 1).astype(jnp.float32), mesh, batch_size
        ),
        encoder=LABELLED,
    )
    data = "".join(TEXTS).encode()
    # bytes as tokens: neither label lines, BOS nor EOS are counted
    assert values["tokens"] == values["bytes"] == len(data)
    assert values["loss"] == pytest.approx(sum(b + 1 for b in data) / len(data), rel=1e-12)


def test_labels_and_prompts_have_no_say():
    calls = []
    fns = make_fns(
        lambda params, batch: -batch["targets"].astype(jnp.float32),
        check_stop=lambda: calls.append(1),
    )
    a = evaluate(fns, encoder=LABELLED)
    unlabelled = Documents([d._replace(label="") for d in DOCUMENTS], "other")
    assert a == evaluate(fns, documents=unlabelled)
    assert len(calls) > 1  # a signal is noticed within an evaluation


def test_a_uniform_model():
    values = of_model(change=np.zeros_like)
    assert values["loss"] == pytest.approx(math.log(260), rel=1e-6) and values[
        "perplexity"
    ] == pytest.approx(260, rel=1e-5)
    # a token is a byte here
    assert values["bits_per_byte"] == pytest.approx(math.log2(260), rel=1e-6)


class Pairs(ByteTokenizer):
    """Two bytes a token, so that bits per byte are not bits per token."""

    def encode(self, text):
        return list(text.encode()[::2])


def test_figures_from_the_sums():
    values = evaluate(
        make_fns(lambda params, batch: jnp.full(batch["targets"].shape, -3.0)),
        encoder=pack.Encoder(Pairs(), ""),
    )
    data = "".join(TEXTS).encode()
    tokens = sum(-(-len(t.encode()) // 2) for t in TEXTS)
    assert (
        values["tokens"] == tokens
        and values["bytes"] == len(data)
        and values["documents"] == len(TEXTS)
    )
    assert values["loss"] == pytest.approx(3) and values["perplexity"] == pytest.approx(math.e**3)
    assert values["bits_per_byte"] == pytest.approx(3 * tokens / math.log(2) / len(data))
    packed = lzma.compress(
        data,
        format=lzma.FORMAT_XZ,
        check=lzma.CHECK_CRC64,
        filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}],
    )
    assert values["xz_bits_per_byte"] == pytest.approx(8 * len(packed) / len(data), rel=1e-12)
    assert 0 < values["xz_bits_per_byte"] < 8


def test_a_hopeless_model_has_a_finite_perplexity():
    values = evaluate(make_fns(lambda params, batch: jnp.full(batch["targets"].shape, -1e6)))
    assert values["loss"] == pytest.approx(1e6) and math.isfinite(values["perplexity"])


@pytest.mark.parametrize("stride", [1, 5, LENGTH])
def test_a_stride_gives_each_target_the_context_that_there_is(stride):
    """Every target once, after as many tokens as a row holds beside the new ones."""
    graphdef, params, _ = model()
    text = max(TEXTS, key=lambda t: len(t.encode()))
    ids = [256, *text.encode()]
    assert len(ids) > 2 * LENGTH

    @jax.jit
    def logprobs(row):
        transformer = nnx.merge(graphdef, params)
        hidden = transformer(
            row[None], jnp.arange(len(row))[None], jnp.ones((1, len(row)), jnp.int32)
        ).hidden
        return jax.nn.log_softmax(transformer.logits(hidden)[0])

    nll, starts = 0.0, [0, *range(LENGTH, len(ids) - 1, stride)]
    for new, end in zip(starts, [*starts[1:], len(ids) - 1]):
        begin = new if stride == LENGTH else max(0, end - LENGTH)
        nll -= sum(
            float(logprobs(jnp.asarray(ids[begin:end]))[k - begin, ids[k + 1]])
            for k in range(new, end)
        )
    values = of_model(documents=Documents([Document(text, "d", "")], ""), stride=stride)
    assert values["tokens"] == len(ids) - 1 and values["loss"] == pytest.approx(
        nll / (len(ids) - 1), rel=1e-5
    )
    assert values["word_perplexity"] == pytest.approx(math.exp(nll / len(text.split())), rel=1e-4)


def test_a_stride_beyond_the_row():
    with pytest.raises(
        ValueError, match="stride = 33 of a perplexity; wanted 0 to config.data.length = 32"
    ):
        of_model(stride=33)
