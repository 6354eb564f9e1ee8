"""From a prepared corpus to batches: stored tokens are those that the tokenizer makes, and no other
tokenizer reads them.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from lm import build, files, train
from lm import config as config_lib
from lm.data import pack, sources, tokenizer
from lm.prepare import config as prepare_config
from lm.prepare.pipeline import prepare

STAGES = ("collect", "clean", "exact_duplicates", "tokenizer", "write")
WORDS = "red green blue yellow black white orange violet brown grey pink".split()


def texts(seed, count=120):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 5 + i % 40)) + "." for i in range(count)]


def prepared(out, name="colours", kind="bpe", tokens="stored", seed=0):
    """The folder of a corpus."""
    source = out / f"{name}.jsonl"
    source.parent.mkdir(exist_ok=True, parents=True)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(seed)))
    c = prepare_config.default()
    c.name, c.stages, c.workers = name, STAGES, 1
    c.sources.texts = prepare_config.source("jsonl", str(source))
    c.splits.validation = 0.2
    c.tokenizer.update(dict(kind=kind, vocab_size=300, tokens=tokens))
    return prepare(c, epath.Path(out))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus"))


def rows(documents, tokenizer_, count=30):
    encoder = pack.Encoder(tokenizer_, "")
    packing = pack.Packing("first_fit", 32, 8)
    stream = pack.stream(documents, encoder, packing, number=0, num_streams=2, seed=0)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte_bpe"])
def test_stored_tokens_are_the_tokenizers_own(kind, tmp_path):
    folder = prepared(tmp_path, kind=kind)
    own = tokenizer.load(folder / "tokenizer")
    stored = sources.corpus("train", path=str(folder))
    anew = sources.corpus("train", path=str(folder), stored_tokens=False)
    assert stored[0].stored.tokenizer == own.fingerprint
    assert anew[0] == sources.Document(*stored[0][:3])
    for a, b in zip(rows(stored, own), rows(anew, own)):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    for document in stored:
        assert own.decode(document.stored.ids) == document.text


def test_splits_are_those_of_the_hash(folder):
    train_, validation = (sources.corpus(s, path=str(folder)) for s in ("train", "validation"))
    assert {d.text for d in train_} | {d.text for d in validation} == set(texts(0))
    assert all(sources.is_held_out(d.text, 0.2) for d in validation)
    assert not any(sources.is_held_out(d.text, 0.2) for d in train_)
    assert train_.fingerprint != validation.fingerprint


def test_another_tokenizer_is_refused(folder):
    documents = sources.corpus("train", path=str(folder))
    encoder = pack.Encoder(tokenizer.ByteTokenizer(), "")
    with pytest.raises(ValueError, match="stored_tokens=False"):
        encoder.training(documents[0])


def test_made_on_the_fly(tmp_path):
    folder = prepared(tmp_path, tokens="on_the_fly")
    documents = sources.corpus("train", path=str(folder))
    assert isinstance(documents[0], sources.Document)
    assert (folder / "tokenizer" / "tokenizer.model").exists()
    card = files.read_json(folder / "card.json")
    assert not card["tokenizer"]["stored"] and card["splits"]["train"]["tokens"] > 0


@pytest.fixture
def config(small, folder):
    small.data.update(dict(source="lm.data.sources.corpus"))
    small.data.source_args = dict(path=str(folder), label_key="", stored_tokens=True)
    small.tokenizer.path = str(folder / "tokenizer")
    return small


def test_a_run_keeps_the_summary_of_its_corpus(config, folder, tmp_path, fast_runs):
    config.train.length = "3 steps"
    config.optimizer.warmup_steps = 1
    train.train(config, epath.Path(tmp_path), jax.devices()[:1])
    (summary,) = json.loads((tmp_path / "corpora.json").read_text())["corpora"]
    card = files.read_json(folder / "card.json")
    assert summary == {key: card[key] for key in sources.OF_CARD}


def test_tokens_of_another_tokenizer_end_the_run_before_it_begins(config):
    config.tokenizer.update(dict(path="", kind="bytes"))
    with pytest.raises(ValueError, match="the corpus has tokens of the tokenizer sentencepiece-"):
        build.build(config, jax.devices()[:1])

    # What is reserved is behind all other ids.
    config.tokenizer.path = config.data.source_args.path + "/tokenizer"
    config.tokenizer.reserve = "pad,mask"
    build.build(config, jax.devices()[:1])


def test_what_is_no_corpus(tmp_path, folder):
    with pytest.raises(ValueError, match="no corpus at .*none"):
        sources.corpus("train", path=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no split 'dev'"):
        sources.corpus("dev", path=str(folder))


def test_resuming_where_the_corpus_lies_elsewhere():
    assert config_lib.is_resumable("data.source_args.path")
    assert not config_lib.is_resumable("data.source_args.stored_tokens")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer": "x"}, "tokenizer is 'x'"),
        ({"tokenizer": {"stored": True}}, "doesn't say which tokenizer"),
        (
            {"tokenizer": {"stored": True, "fingerprint": "f", "vocab_size": "9"}},
            "doesn't say which tokenizer",
        ),
        ({"splits": []}, "splits is"),
        ({"splits": {"train": 3}}, "splits is"),
        ({"splits": {"train": {"tokens": "many"}}}, "splits is"),
    ],
)
def test_cards_of_strangers(changes, message, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "colours" / "1.0.0")
    path = tmp_path / "colours" / "1.0.0" / "card.json"
    path.write_text(json.dumps(files.read_json(folder / "card.json") | changes))
    with pytest.raises(ValueError, match=message):
        sources.corpus("train", path=str(path.parent))


def test_tokens_that_the_tokenizer_does_not_have(folder):
    own = tokenizer.load(folder / "tokenizer")
    document = sources.corpus("train", path=str(folder))[0]
    stored = document.stored._replace(ids=np.array([5, 300], np.uint16))
    with pytest.raises(ValueError, match="the token 300, and its tokenizer 300 of them"):
        pack.Encoder(own, "").training(document._replace(stored=stored))


def test_the_sample_of_the_tokenizer(tmp_path):
    """Its share of the training texts, and the same ones however they lie in files."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts(1, count=600)]
    fingerprints = []
    for name, bounds in dict(one=[0, 600], several=[0, 100, 350, 600]).items():
        (tmp_path / name).mkdir()
        for number, (begin, end) in enumerate(zip(bounds, bounds[1:])):
            path = tmp_path / name / f"{number}.jsonl"
            path.write_text("".join(lines[begin:end]))
        c = prepare_config.default()
        c.stages, c.workers = STAGES, 1
        c.sources.texts = prepare_config.source("jsonl", str(tmp_path / name))
        c.splits.validation = 0.2
        c.tokenizer.vocab_size = 300
        c.tokenizer.sample_mb = sum(map(len, texts(1, count=600))) / 2e6
        card = files.read_json(prepare(c, epath.Path(tmp_path / name / "out")) / "card.json")
        fingerprints.append(card["tokenizer"]["fingerprint"])
        (stage,) = [stage for stage in card["stages"] if stage["stage"] == "tokenizer"]
        share = stage["counts"]["tokenizer.documents"]["texts"] / (600 * 0.8)
        assert 0.44 < share < 0.56
    assert fingerprints[0] == fingerprints[1]
