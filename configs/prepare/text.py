"""A corpus of your own files: a folder, a file or a glob pattern (gs:// too).

    python -m lm.prepare --config=configs/prepare/text.py:PATH --out=corpora/mine

Each file is a document; --config.sources.texts.separator="\n\n" divides them, and
--config.sources.texts.format=jsonl (parquet, csv, html, warc, ...) reads others. Exact and near
duplicates go, and personal data is masked; the published quality rules are off, and switched on by
--config.gopher_quality.on and its like. docs/corpora.md has the rest.
"""  # noqa: E501

from ml_collections import ConfigDict

from lm.prepare import config as prepare_config


def get_config(path: str = "") -> ConfigDict:
    c = prepare_config.default()
    c.name = "texts"
    c.sources.texts = prepare_config.source("text", path)
    c.stages = (
        "collect",
        "clean",
        "exact_duplicates",
        "near_duplicates",
        "tokenizer",
        "write",
    )
    c.tokenizer.vocab_size = 2048
    return c
