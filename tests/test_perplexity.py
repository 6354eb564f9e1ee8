"""Perplexity: each target of each text once, whatever the batches and the mesh."""

import functools
import lzma
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import sharding, step
from lm.data import pack
from lm.data.records import take
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer
from lm.evals import perplexity
from lm.evals.predict import CompiledFns, PredictFns, compiled, never_stop
from lm.objectives import causal
from tests.helpers import abstract_model, model_config, random_model

LENGTH = 32
VOCAB = 260
# name -> (devices, sizes of the axes)
MESHES = {
    "one": (1, {}),
    "data": (8, {"data": 8}),
    "sequence": (8, {"data": 4, "sequence": 2}),
    "fsdp": (8, {"data": 2, "fsdp": 2, "tensor": 2}),
}
PLAIN = pack.Encoder(ByteTokenizer(), "")
LABELLED = pack.Encoder(ByteTokenizer(), "\nLabel:")


def make_documents():
    """45 texts of 1 to 89 characters of one to three bytes each, with labels."""
    rng = np.random.default_rng(0)
    documents = []
    for i, size in enumerate(rng.integers(1, 90, 45)):
        text = "".join(rng.choice(list("abcdé \n€"), size))
        documents.append(Document(text, f"d{i}", ("red", "green")[i % 2]))
    return Documents(documents, "fingerprint")


DOCUMENTS = make_documents()
TEXTS = [document.text for document in DOCUMENTS]
DATA = "".join(TEXTS).encode()


@functools.cache
def model():
    """(graphdef, parameters in numpy, logical axes) of a small Transformer with weights large
    enough to have opinions.
    """
    config = model_config(
        vocab_size=VOCAB,
        context_length=LENGTH,
        num_layers=1,
        embed_dim=16,
        mlp_dim=32,
        num_heads=2,
        num_kv_heads=2,
    )
    _, abstract = abstract_model(config)
    return *random_model(config, std=0.6), sharding.logical_axes(abstract)


def get_mesh(name):
    num_devices, sizes = MESHES[name]
    return sharding.make_mesh(sizes, jax.devices()[:num_devices])


def make_fns(token_logprobs, mesh="one", batch_size=8, check_stop=never_stop):
    """PredictFns of a function (params, batch) -> log-probabilities of the batch's targets."""
    fns = CompiledFns(get_mesh(mesh), token_logprobs=compiled(token_logprobs, get_mesh(mesh)))
    return PredictFns(fns, batch_size=batch_size, length=LENGTH, check_stop=check_stop)


def evaluate(fns, params=None, encoder=PLAIN, documents=DOCUMENTS, max_documents=0, stride=0):
    evaluator = perplexity.Perplexity(
        fns,
        name="text",
        documents=documents,
        encoder=encoder,
        max_documents=max_documents,
        stride=stride,
    )
    return dict(evaluator.run(params))


@functools.cache
def model_fns(mesh, batch_size):
    """PredictFns of the small Transformer, compiled once."""
    graphdef, _, _ = model()
    token_logprobs = step.make_token_logprobs(graphdef, causal.token_logprobs)
    return make_fns(token_logprobs, mesh, batch_size)


def evaluate_model(*, mesh="one", batch_size=8, change=lambda p: p, **kwargs):
    """The metrics of the small Transformer, each of its parameters changed by `change`."""
    _, params, axes = model()
    fns = model_fns(mesh, batch_size)
    with jax.set_mesh(get_mesh(mesh)):
        layouts = sharding.shardings(params, axes, get_mesh(mesh))
        params = jax.device_put(jax.tree.map(change, params), layouts)
        return evaluate(fns, params, **kwargs)


@functools.cache
def values_in_batches_of_8():
    return evaluate_model(batch_size=8)


@functools.cache
def nll_of_documents():
    """(nll, targets) of each document by itself, in rows of one window, from the model's logits."""
    graphdef, params, _ = model()
    rows = []
    sizes = []  # targets of each row
    owners = []  # the document of each row
    for number, document in enumerate(DOCUMENTS):
        ids = [256, *document.text.encode()]
        # Windows without overlap, one more token than a row: the last one is a target only.
        for start in range(0, len(ids) - 1, LENGTH):
            window = ids[start : start + LENGTH + 1]
            rows.append(window + [0] * (LENGTH + 1 - len(window)))
            sizes.append(len(window) - 1)
            owners.append(number)
    rows = jnp.asarray(rows)

    @jax.jit
    def logprobs(params):
        transformer = nnx.merge(graphdef, params)
        shape = (len(rows), LENGTH)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), shape)
        hidden = transformer(rows[:, :-1], positions, jnp.ones(shape, jnp.int32)).hidden
        return jax.nn.log_softmax(transformer.logits(hidden))

    nll = np.zeros(len(TEXTS))
    counts = np.zeros(len(TEXTS), int)
    row_logprobs = np.asarray(logprobs(params), np.float64)
    for row, logp, size, number in zip(np.asarray(rows), row_logprobs, sizes, owners):
        nll[number] -= logp[np.arange(size), row[1 : size + 1]].sum()
        counts[number] += size
    return nll, counts


def numbers_of_taken(max_documents):
    return [DOCUMENTS.items.index(document) for document in take(DOCUMENTS, max_documents)]


def test_loss_is_that_of_each_document_by_itself():
    nll, counts = nll_of_documents()

    values = values_in_batches_of_8()
    some = evaluate_model(max_documents=7)

    assert values["tokens"] == counts.sum()
    assert values["documents"] == len(TEXTS)
    assert values["loss"] == pytest.approx(nll.sum() / counts.sum(), rel=1e-5)
    assert abs(values["loss"] - math.log(VOCAB)) > 0.1  # the model has opinions

    chosen = numbers_of_taken(7)
    assert some["documents"] == 7
    assert some["loss"] == pytest.approx(nll[chosen].sum() / counts[chosen].sum(), rel=1e-5)


@pytest.mark.parametrize("max_documents", [0, 1, 2, 7, 44, 45, 1000])
def test_documents_are_taken_evenly(max_documents):
    numbers = numbers_of_taken(max_documents)

    assert len(numbers) == min(max_documents or 45, 45)
    assert numbers[0] == 0
    # From all of the split, none twice: the gaps differ by at most one.
    assert set(np.diff([*numbers, 45])) <= {45 // len(numbers), -(-45 // len(numbers))}


@pytest.mark.parametrize(
    "mesh, batch_size", [("one", 24), ("data", 8), ("sequence", 24), ("fsdp", 16)]
)
def test_loss_does_not_depend_on_batches_and_mesh(mesh, batch_size):
    values = evaluate_model(mesh=mesh, batch_size=batch_size)

    expected = values_in_batches_of_8()
    for count in ("tokens", "bytes", "documents"):
        assert values[count] == expected[count]
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
    """The "log-probability" of a target is a number of its own: none may be missing, doubled, or
    padding.
    """

    def number_of_target(params, batch):
        return -(batch["targets"] + 1).astype(jnp.float32)

    values = evaluate(make_fns(number_of_target, mesh, batch_size), encoder=LABELLED)

    # Bytes are tokens: neither label lines, BOS nor EOS are counted.
    assert values["tokens"] == values["bytes"] == len(DATA)
    wanted = sum(byte + 1 for byte in DATA) / len(DATA)
    assert values["loss"] == pytest.approx(wanted, rel=1e-12)


def test_labels_and_their_prompt_do_not_count():
    calls = []

    def number_of_target(params, batch):
        return -batch["targets"].astype(jnp.float32)

    fns = make_fns(number_of_target, check_stop=functools.partial(calls.append, 1))
    without_labels = []
    for document in DOCUMENTS:
        without_labels.append(document._replace(label=""))

    values = evaluate(fns, encoder=LABELLED)

    assert values == evaluate(fns, documents=Documents(without_labels, "other"))
    # Between batches, so that a signal is noticed within an evaluation.
    assert len(calls) > 1


def test_a_uniform_model():
    values = evaluate_model(change=np.zeros_like)

    assert values["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert values["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
    # A token is a byte here.
    assert values["bits_per_byte"] == pytest.approx(math.log2(VOCAB), rel=1e-6)


class PairTokenizer(ByteTokenizer):
    """Two bytes a token, so that bits per byte are not bits per token."""

    def encode(self, text):
        return list(text.encode()[::2])


def make_constant_fns(logprob):
    """PredictFns that give every target the same log-probability."""
    return make_fns(lambda params, batch: jnp.full(batch["targets"].shape, logprob))


def test_metrics_follow_from_the_sums():
    values = evaluate(make_constant_fns(-3.0), encoder=pack.Encoder(PairTokenizer(), ""))

    # An odd last byte is a token too.
    num_tokens = sum(-(-len(text.encode()) // 2) for text in TEXTS)
    assert values["tokens"] == num_tokens
    assert values["bytes"] == len(DATA)
    assert values["documents"] == len(TEXTS)
    assert values["loss"] == pytest.approx(3)
    assert values["perplexity"] == pytest.approx(math.e**3)
    assert values["bits_per_byte"] == pytest.approx(3 * num_tokens / math.log(2) / len(DATA))


def test_xz_is_the_commands():
    """What `xz -9e` writes: its container, its checksum and its filter."""
    compressed = lzma.compress(
        DATA,
        format=lzma.FORMAT_XZ,
        check=lzma.CHECK_CRC64,
        filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}],
    )

    bits_per_byte = evaluate(make_constant_fns(-3.0))["xz_bits_per_byte"]

    assert bits_per_byte == pytest.approx(8 * len(compressed) / len(DATA), rel=1e-12)
    assert 0 < bits_per_byte < 8


def test_a_hopeless_model_has_a_finite_perplexity():
    values = evaluate(make_constant_fns(-1e6))

    # exp(1e6) would overflow.
    assert values["loss"] == pytest.approx(1e6)
    assert math.isfinite(values["perplexity"])


@pytest.mark.parametrize("stride", [1, 5, LENGTH])
def test_a_stride_gives_each_target_the_context_that_there_is(stride):
    """Every target once, after as many tokens as a row holds beside the new ones."""
    graphdef, params, _ = model()
    # The longest text, of several windows.
    text = max(TEXTS, key=lambda t: len(t.encode()))
    ids = [256, *text.encode()]
    assert len(ids) > 2 * LENGTH

    @jax.jit
    def logprobs(row):
        transformer = nnx.merge(graphdef, params)
        positions = jnp.arange(len(row))[None]
        hidden = transformer(row[None], positions, jnp.ones((1, len(row)), jnp.int32)).hidden
        return jax.nn.log_softmax(transformer.logits(hidden)[0])

    # The tokens ids[first + 1] to ids[end] are the new targets of a window.
    nll = 0.0
    firsts = [0, *range(LENGTH, len(ids) - 1, stride)]
    for first, end in zip(firsts, [*firsts[1:], len(ids) - 1]):
        begin = first if stride == LENGTH else max(0, end - LENGTH)
        window = logprobs(jnp.asarray(ids[begin:end]))
        for k in range(first, end):
            nll -= float(window[k - begin, ids[k + 1]])

    values = evaluate_model(documents=Documents([Document(text, "d", "")], ""), stride=stride)

    assert values["tokens"] == len(ids) - 1
    assert values["loss"] == pytest.approx(nll / (len(ids) - 1), rel=1e-5)
    assert values["word_perplexity"] == pytest.approx(math.exp(nll / len(text.split())), rel=1e-4)


def test_a_stride_beyond_the_row():
    with pytest.raises(
        ValueError, match="config.evals.text.stride = 33; wanted 0 to config.data.length = 32"
    ):
        evaluate_model(stride=33)
