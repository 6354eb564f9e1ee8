"""English text of Common Crawl's WARC files, by FineWeb's recipe (Penedo et al. 2024, arXiv 2406.17557,
section 3): main text, language, the rules of Gopher, of C4 but for the ends of lines, and FineWeb's
own, near-duplicates, personal data.

    python -m lm.prepare --config=configs/prepare/common_crawl.py:'warc/*.warc.gz' --out=corpora/crawl

PATH may be gs://. Items of evals are kept out where config.tasks has some and config.stages has
decontaminate. docs/corpora.md has what a whole snapshot costs.
"""  # noqa: E501

from ml_collections import ConfigDict

from lm.prepare import config as prepare_config


def get_config(path: str = "") -> ConfigDict:
    c = prepare_config.default()
    c.name = "common_crawl"
    c.description = "Main text of web pages, filtered and deduplicated as FineWeb is."
    c.sources.pages = prepare_config.source("warc", path)
    c.stages = (
        "collect",
        "clean",
        "exact_duplicates",
        "near_duplicates",
        "tokenizer",
        "write",
    )

    c.clean.languages = ("en",)
    c.clean.least_probability = 0.65
    c.gopher_repetition.on = True
    c.gopher_quality.on = True
    c.c4.on = True
    c.c4.terminal_punctuation = False
    c.fineweb.on = True

    c.near_duplicates.threshold = 0.75
    c.tokenizer.vocab_size = 32_000
    c.splits.validation = 0.001
    return c
