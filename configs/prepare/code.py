"""Source files under permissive licences, from trees such as checked-out repositories.

    python -m lm.prepare --config=configs/prepare/code.py:repositories --out=corpora/code

A file's licence is that of the nearest LICENSE or COPYING above it. Files that are generated or
minified go, by The Stack's rules (Kocetkov et al. 2022, arXiv 2211.15533), and near-duplicates.
"""

from ml_collections import ConfigDict

from lm.prepare import config as prepare_config

PERMISSIVE = (
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "PSF-2.0",
    "Unlicense",
)


def get_config(path: str = "") -> ConfigDict:
    c = prepare_config.default()
    c.name = "code"
    c.description = "Source files under permissive licences."
    c.sources.files = prepare_config.source("code", path, licences=PERMISSIVE)
    c.stages = (
        "collect",
        "clean",
        "exact_duplicates",
        "near_duplicates",
        "tokenizer",
        "write",
    )
    c.code.on = True
    c.clean.identify = False
    c.clean.unicode = "none"
    c.pii.update(ip="", phone="")  # versions and numbers look like them
    c.near_duplicates.threshold = 0.7
    c.tokenizer.kind = "byte_bpe"
    c.tokenizer.vocab_size = 32_000
    return c
