"""Articles of a Wikipedia, from a dump: LANGwiki-DATE-pages-articles.xml.bz2 of
https://dumps.wikimedia.org, whole or its parts.

    python -m lm.prepare --config=configs/prepare/wikipedia.py:'dumps/*.xml*.bz2' --out=corpora/wiki

Templates, tables and references go; stubs do too. Nothing is masked: articles have no personal data
but of public persons.
"""

from ml_collections import ConfigDict

from lm.prepare import config as prepare_config


def get_config(path: str = "") -> ConfigDict:
    c = prepare_config.default()
    c.name = "wikipedia"
    c.description = "Articles of Wikipedia as plain text."
    c.sources.articles = prepare_config.source("wikipedia", path, licence="CC-BY-SA-4.0")
    c.stages = (
        "collect",
        "clean",
        "exact_duplicates",
        "near_duplicates",
        "tokenizer",
        "write",
    )
    c.clean.min_chars = 200
    c.pii.update(email="", ip="", phone="")
    c.tokenizer.vocab_size = 32_000
    return c
