"""Span corruption, prefixes and the middle that is filled in, as transforms of data."""

import jax
import numpy as np
import pytest
from flax import nnx

from lm import build
from lm import config as config_lib
from lm.data import corruption, pack
from lm.data.corruption import FillInTheMiddle, SpanCorruption, prefix_windows
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer
from lm.evals import entries
from lm.objectives import prefix
from tests.helpers import model_config, random_model, read_metrics, run_training, small_encdec

BYTES = ByteTokenizer("sentinels:40")
SENTINELS = BYTES.role_ids("sentinels")
BOS, EOS = 256, 257


def make_random(seed=0):
    return np.random.default_rng(seed)


def spans(**changes):
    fields = dict(rate=0.15, mean_span=3.0, source_length=512) | changes
    return SpanCorruption(BYTES, **fields)


def test_t5s_lengths():
    """568 tokens become 512 of a source and 114 of a target."""
    assert spans().raw_length(114) == 568
    ids = make_random().integers(0, 256, 567).tolist()
    (window,) = spans().windows([BOS, *ids, EOS], 114, make_random())
    assert len(window["source"]) == 512
    assert len(window["targets"]) == 114
    assert spans().sizes(568) == (85, 28)


def restored(source, target):
    """The text that a source and its target were made of."""
    of_sentinel = {}
    for token in target:
        if token in SENTINELS:
            of_sentinel[token] = []
            current = token
        else:
            of_sentinel[current].append(token)
    text = []
    for token in source:
        text += of_sentinel[token] if token in SENTINELS else [token]
    return text


@pytest.mark.parametrize("rate, mean_span", [(0.15, 3.0), (0.5, 3.0), (0.5, 32.0), (0.9, 1.0)])
@pytest.mark.parametrize("size", [2, 3, 7, 60])
def test_nothing_is_lost(rate, mean_span, size):
    ids = make_random(1).integers(0, 256, size).tolist()
    corrupted = spans(rate=rate, mean_span=mean_span)
    for seed in range(5):
        source, target = corrupted.corrupt(ids, make_random(seed))
        assert restored(source, target) == ids
        # Sentinels come in order, each once in both, and never first in the source.
        used = [token for token in source if token in SENTINELS]
        assert used == list(SENTINELS[: len(used)])
        assert used == [token for token in target if token in SENTINELS]
        assert source[0] not in SENTINELS and target[0] == SENTINELS[0]
        num_noise, num_spans = corrupted.sizes(size)
        assert (len(target) - len(used), len(used)) == (num_noise, num_spans)


def test_long_documents_are_cut_into_windows():
    """Each ends as a text, and the first one alone begins a document."""
    ids = make_random().integers(0, 256, 300).tolist()
    windows = spans(source_length=64).windows([BOS, *ids, EOS], 32, make_random())
    text = []
    for window in windows:
        source, target = window["source"].tolist(), window["targets"].tolist()
        assert source[-1] == target[-1] == EOS
        assert len(source) <= 64 and len(target) <= 32
        text += restored(source[:-1], target[:-1])
    assert text == [BOS, *ids]
    assert [window["begins"].sum() for window in windows] == [1] + [0] * (len(windows) - 1)
    # No more spans than there are sentinels.
    few = SpanCorruption(ByteTokenizer("sentinels:2"), 0.15, 3.0, 512)
    assert few.sizes(few.raw_length(512))[1] == 2


def test_all_partitions_are_equally_likely():
    counts = {}
    random = make_random()
    for _ in range(3000):
        sizes = tuple(corruption._partition(5, 3, random))
        counts[sizes] = counts.get(sizes, 0) + 1
    assert len(counts) == 6 and all(sum(sizes) == 5 for sizes in counts)
    assert min(counts.values()) > 400


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: spans(rate=0.0), "rate = 0.0, mean_span = 3.0; wanted a rate above 0"),
        (lambda: spans(mean_span=0.5), "spans of 1 token or more"),
        (lambda: SpanCorruption(ByteTokenizer(), 0.1, 3.0, 9), "has no sentinels"),
        (lambda: FillInTheMiddle(BYTES, 1.5), "rate = 1.5, end_first = 0.5; wanted shares"),
        (lambda: FillInTheMiddle(ByteTokenizer("sentinels:2"), 0.5), "needs three sentinels"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prefix_is_given_and_the_rest_is_learnt():
    ids = list(range(1, 22))
    lengths = set()
    for seed in range(60):
        windows = prefix_windows(ids, 10, make_random(seed))
        assert [len(w["tokens"]) for w in windows] == [10, 10]
        for window in windows:
            given = int(window["prefix"].sum())
            assert window["prefix"].tolist() == [1] * given + [0] * (10 - given)
            assert window["weights"].tolist() == [0] * (given - 1) + [1] * (11 - given)
            lengths.add(given)
    assert lengths == set(range(1, 11))


def test_a_prefix_is_seen_whole_and_nothing_else_ahead():
    """Gradients of what is predicted at a place by what is read: those of an array alone."""
    config = model_config(tie_embeddings=True)
    graphdef, params = random_model(config)
    ids = make_random().integers(0, 40, 10).astype(np.int32)
    batch = dict(
        tokens=ids[None],
        targets=np.roll(ids, -1)[None],
        positions=np.arange(10, dtype=np.int32)[None],
        segments=np.ones((1, 10), np.int32),
        prefix=(np.arange(10) < 4).astype(np.int32)[None],
    )

    def logprobs(tokens, prefix_array=batch["prefix"]):
        arrays = batch | dict(tokens=tokens[None], prefix=prefix_array)
        return np.asarray(prefix.token_logprobs(nnx.merge(graphdef, params), arrays)[0])[0]

    plain = logprobs(ids)
    for changed in range(10):
        other = ids.copy()
        other[changed] = (other[changed] + 1) % 40
        sees = np.abs(logprobs(other) - plain) > 1e-6
        wanted = np.arange(10) >= (0 if changed < 4 else changed)
        np.testing.assert_array_equal(sees, wanted)

    # Without a prefix it is the causal model.
    from lm.objectives import causal

    wanted = causal.token_logprobs(nnx.merge(graphdef, params), batch)[0][0]
    got = logprobs(ids, np.zeros((1, 10), np.int32))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_middle_comes_last():
    """In both forms, from which the text can be made again; special tokens stay outside."""
    text = list(b"a text of some length")
    one, two, three = SENTINELS[:3]
    forms = set()
    for seed in range(40):
        (window,) = FillInTheMiddle(BYTES, 1.0).windows([BOS, *text, EOS], 64, make_random(seed))
        ids = [*window["tokens"].tolist(), int(window["targets"][-1])]
        assert ids[0] == BOS and ids[-1] == EOS and window["weights"].all()
        inner = ids[1:-1]
        a, b, c = (inner.index(sentinel) for sentinel in (one, two, three))
        assert a == 0 and b < c
        if b > 1:
            forms.add("middle last")
            beginning, end, middle = inner[1:b], inner[b + 1 : c], inner[c + 1 :]
            assert beginning + middle + end == text
        else:
            end, rest = inner[b + 1 : c], inner[c + 1 :]
            assert rest + end == text or not (a or b - 1)
            forms.add("end first")
    assert forms == {"middle last", "end first"}
    (plain,) = FillInTheMiddle(BYTES, 0.0).windows([BOS, *text, EOS], 64, make_random())
    assert plain["tokens"].tolist() == [BOS, *text]


def test_each_target_of_a_long_text_counts_once():
    text = make_random().integers(0, 256, 100).tolist()
    windows = FillInTheMiddle(BYTES, 0.0).windows([BOS, *text, EOS], 16, make_random())
    targets = np.concatenate([window["targets"] for window in windows])
    assert targets.tolist() == [*text, EOS]
    changed = FillInTheMiddle(BYTES, 1.0).windows([BOS, *text, EOS], 16, make_random())
    assert max(len(window["tokens"]) for window in changed) <= 16
    assert len(changed) == len(windows)


MAKERS = {
    "spans": lambda: spans(source_length=64).windows,
    "prefix": lambda: prefix_windows,
    "middle": lambda: FillInTheMiddle(BYTES, 0.7).windows,
}
ARRAYS = {
    "spans": build.batch_contract.source_arrays(64),
    "prefix": prefix.ARRAYS,
    "middle": {},
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_windows_are_a_function_of_seed_epoch_and_example(name):
    """Whatever the packing, the number of streams, or where a stream was stopped; rows are counted
    beforehand by sizes alone.
    """
    rng = make_random(3)
    items = []
    for i in range(12):
        letters = rng.choice(list("abcdef"), int(rng.integers(3, 120)))
        items.append(Document("".join(letters), f"{i}", ""))
    documents = Documents(items, "x")
    arrays = build.batch_contract.ARRAYS | ARRAYS[name]
    encoder = pack.Encoder(BYTES, "", MAKERS[name](), arrays)

    def rows(num_streams, bins, epochs=1):
        found = []
        packing = pack.Packing("first_fit", 48, bins)
        arguments = dict(num_streams=num_streams, seed=5, epochs=epochs)
        counts = pack.count_rows(documents, encoder, packing, **arguments)
        for number in range(num_streams):
            stream = pack.stream(documents, encoder, packing, number=number, **arguments)
            of_stream = [next(stream) for _ in range(counts[number])]
            assert not next(stream)["segments"].any()
            stream.close()
            found += of_stream
        return found

    def segments(found):
        texts = []
        for row in found:
            for number in range(1, row["segments"].max() + 1):
                places = row["segments"] == number
                parts = [row["tokens"][places], row["targets"][places], row["weights"][places]]
                if "source" in row:
                    parts.append(row["source"][row["source_segments"] == number])
                texts.append(tuple(np.concatenate(parts).tolist()))
        return sorted(texts)

    one = rows(1, 4)
    assert segments(one) == segments(rows(3, 2))
    build.batch_contract.check(one[0], arrays)

    packing = pack.Packing("first_fit", 48, 4)
    arguments = dict(number=0, num_streams=1, seed=5)
    stream = pack.stream(documents, encoder, packing, **arguments)
    for _ in range(3):
        next(stream)
    state = stream.get_state()
    wanted = [next(stream) for _ in range(8)]
    again = pack.stream(documents, encoder, packing, **arguments)
    again.set_state(state)
    for row in wanted:
        for key, array in next(again).items():
            np.testing.assert_array_equal(array, row[key])
    assert stream.epochs_begun() == again.epochs_begun()
    stream.close()
    again.close()


def configure(tiny, name):
    config = tiny.copy_and_resolve_references().unlock()
    config.data.label_prompt = ""
    config.tokenizer.reserve = "sentinels:40"
    config.model.param_dtype = "float32"
    if name == "spans":
        config.objective = config_lib.ConfigDict(
            dict(type="lm.objectives.span_corruption", source_length=48, rate=0.2, mean_span=2.0)
        )
        config.model = small_encdec(source_length=48)
    elif name == "prefix":
        config.objective = config_lib.ConfigDict(dict(type="lm.objectives.prefix"))
    else:
        config.objective = config_lib.ConfigDict(
            dict(type="lm.objectives.fill_in_the_middle", rate=0.5, end_first=0.5)
        )
    config.evals.text = entries.held_out("TextLoss", every=3, batch_size=8)
    return config


@pytest.mark.parametrize("name", list(MAKERS))
def test_runs_learn(tiny, tmp_path, fast_runs, name):
    config = configure(tiny, name)
    config.train.length = "12 steps"
    config.optimizer.learning_rate = 1e-2
    metrics = run_training(config, tmp_path / "run")
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert metrics["eval/text/loss"] < 5.6


def test_an_encoder_decoder_has_no_perplexity(tiny):
    config = configure(tiny, "spans")
    config.evals.perplexity = entries.perplexity(every=0)
    experiment = build.build(config, jax.devices()[:1])
    with pytest.raises(ValueError, match="this model has no token_logprobs, which config.evals.pe"):
        experiment.make_evaluators()


def test_a_prefix_model_is_causal_for_others(tiny, tmp_path, fast_runs):
    """Perplexity's rows have no prefix: they are read from left to right."""
    config = configure(tiny, "prefix")
    config.evals.perplexity = entries.perplexity(every=0, batch_size=8)
    metrics = run_training(config, tmp_path / "run")
    assert metrics["eval/perplexity/bits_per_byte"] > 1
    encoder = configure(tiny, "prefix")
    encoder.model.visible = "full"
    with pytest.raises(ValueError, match="says itself who sees whom"):
        build.build(encoder, jax.devices()[:1])
