"""pydocs by the pipeline: the docstrings of this machine's Python, numpy, scipy and jax, the same
documents in the same splits as lm.data.pydocs.pydocs has them, with tokens.

    python -m lm.prepare --config=configs/prepare/pydocs.py --out=corpora/pydocs
    python -m lm.main --config=configs/corpus.py:corpora/pydocs/pydocs_prepared/1.0.0 --workdir=runs/corpus
"""  # noqa: E501

from ml_collections import ConfigDict

from lm.data import pydocs
from lm.prepare import config as prepare_config


def get_config() -> ConfigDict:
    c = prepare_config.default()
    c.name = "pydocs_prepared"
    c.description = "The docstrings of this machine's Python, numpy, scipy and jax."
    c.sources.docstrings = prepare_config.source("lm.prepare.pydocs.read")
    c.stages = ("collect", "clean", "exact_duplicates", "tokenizer", "write")

    # Nothing but short ones and exact duplicates goes, and nothing is changed.
    c.clean.min_chars = pydocs.MIN_CHARS
    c.clean.unicode = "none"
    c.clean.mojibake = False
    c.clean.controls = False
    c.clean.identify = False
    c.pii.update(email="", ip="", phone="")

    c.tokenizer.vocab_size = 2048
    c.tokenizer.split_digits = False
    return c
