"""The shipped configurations of prepared corpora train from a tiny copy with the corpus's own
feature spec.
"""

import runpy

import jax
import pytest
from etils import epath
from test_sources import TEXT, prepare

from lm import train
from lm.models import presets

WORDS = ("the", "sentence", "goes", "on", "number", "é")


def texts(num, seed):
    return [
        " ".join(WORDS[(i * seed + j) % len(WORDS)] for j in range(5 + i % 40)) for i in range(num)
    ]


def lm1b(data_dir):
    splits = {
        "train": [{"text": t} for t in texts(200, 5)],
        "test": [{"text": t} for t in texts(20, 7)],
    }
    prepare(data_dir, "lm1b", {"text": TEXT}, splits)


def c4(data_dir):
    page = lambda t: {
        "text": t,
        "url": "http://a.b",
        "timestamp": "2019-04-25",
        "content-length": "1",
        "content-type": "text/html",
    }
    splits = {
        "train": [page(t) for t in texts(200, 5)],
        "validation": [page(t) for t in texts(20, 7)],
    }
    prepare(data_dir, "c4", {key: TEXT for key in page("")}, splits, version="3.1.0", config="en")


@pytest.mark.parametrize("name, write", [("lm1b", lm1b), ("c4", c4)])
def test_config_trains_from_a_tiny_copy(name, write, tmp_path):
    config = runpy.run_path(f"configs/{name}.py")["get_config"]()
    with pytest.raises(
        ValueError, match=r"no prepared copy .* tfds build .*--file_format=array_record"
    ):
        config.data.source_args.data_dir = str(tmp_path / "tfds")
        train.train(config, epath.Path(tmp_path / "run"), jax.devices()[:1])
    write(tmp_path / "tfds")
    config.data.update(dict(length=32, batch_size=8, streams=4, cache_dir=str(tmp_path / "cache")))
    config.tokenizer.vocab_size = 300
    config.model.update(presets.get("micro") | dict(vocab_size=0, context_length=128))
    config.optimizer.warmup_steps = 1
    config.train.length = "2 steps"
    config.evals.validation.batch_size = 8
    config.evals.samples.max_new_tokens = 4
    values = train.train(config, epath.Path(tmp_path / "run"), jax.devices()[:1])
    assert values["step"] == 2 and values["eval/validation/documents"] == 20
