"""The shipped configurations of prepared corpora train from a tiny copy with the corpus's own
feature spec.
"""

import runpy

import jax
import pytest
from etils import epath

from lm import train
from lm.models import presets
from tests.helpers import slow
from tests.tfds_copies import TEXT, prepare

WORDS = ("the", "sentence", "goes", "on", "number", "é")


def make_texts(num, seed):
    texts = []
    for i in range(num):
        words = [WORDS[(i * seed + j) % len(WORDS)] for j in range(5 + i % 40)]
        texts.append(" ".join(words))
    return texts


def write_lm1b(data_dir):
    splits = {
        "train": [{"text": text} for text in make_texts(200, 5)],
        "test": [{"text": text} for text in make_texts(20, 7)],
    }
    prepare(data_dir, "lm1b", {"text": TEXT}, splits)


def c4_page(text):
    return {
        "text": text,
        "url": "http://a.b",
        "timestamp": "2019-04-25",
        "content-length": "1",
        "content-type": "text/html",
    }


def write_c4(data_dir):
    features = dict.fromkeys(c4_page(""), TEXT)
    splits = {
        "train": list(map(c4_page, make_texts(200, 5))),
        "validation": list(map(c4_page, make_texts(20, 7))),
    }
    prepare(data_dir, "c4", features, splits, version="3.1.0", config="en")


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize("name, write", [slow("lm1b", write_lm1b), ("c4", write_c4)])
def test_config_trains_from_a_tiny_copy(name, write, tmp_path):
    config = runpy.run_path(f"configs/{name}.py")["get_config"]()
    config.data.source_args.data_dir = str(tmp_path / "tfds")
    run = epath.Path(tmp_path / "run")

    # Without a copy the error says how to make one.
    message = r"no prepared copy .* tfds build .*--file_format=array_record"
    with pytest.raises(ValueError, match=message):
        train.train(config, run, jax.devices()[:1])

    write(tmp_path / "tfds")
    # The smallest run that reads all splits.
    config.data.update(dict(length=32, batch_size=8, streams=4, cache_dir=str(tmp_path / "cache")))
    config.tokenizer.vocab_size = 300
    config.model.update(presets.get("micro") | dict(vocab_size=0, context_length=128))
    config.optimizer.warmup_steps = 1
    config.train.length = "2 steps"
    config.evals.validation.batch_size = 8
    config.evals.samples.max_new_tokens = 4
    values = train.train(config, run, jax.devices()[:1])

    assert values["step"] == 2
    assert values["eval/validation/documents"] == 20
