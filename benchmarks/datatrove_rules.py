"""What datatrove's filters say of texts, and how long they take. `benchmarks/corpora.py` runs this
and compares our rules with it.

It needs an environment of datatrove's own, without its extras:

    python -m venv /tmp/datatrove
    /tmp/datatrove/bin/pip install datatrove==0.10.1 spacy==3.8.18 nltk
    /tmp/datatrove/bin/python benchmarks/datatrove_rules.py --texts=texts.jsonl --out=verdicts.json

A text is a line {"text": ...}. spaCy's blank English model, which is a part of spaCy, makes words
and sentences.
"""

import argparse
import json
import time

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils import text as texts_lib

# With the thresholds of the papers, as ours; datatrove's own defaults are others.
FILTERS = dict(
    gopher_quality=GopherQualityFilter(),
    gopher_repetition=GopherRepetitionFilter(),
    fineweb=FineWebQualityFilter(char_duplicates_ratio=0.1),
    c4=C4QualityFilter(min_num_sentences=3, min_words_per_line=5),
)


def verdict(name: str, text: str) -> str:
    """Returns why a filter drops a text; "" if it doesn't."""
    try:
        result = FILTERS[name].filter(Document(text=text, id="0"))
    except ZeroDivisionError:
        return "division by zero"
    return "" if result is True else result[1]


def words(text: str) -> dict:
    """Returns what the filters are told of a text: its words, and how many sentences a line has."""
    sentences = {}
    for line in text.splitlines():
        if line := line.strip():
            sentences[line] = len(texts_lib.split_into_sentences(line))
    return dict(words=texts_lib.split_into_words(text), sentences=sentences)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--words", action="store_true", help="words instead of verdicts")
    args = parser.parse_args()
    with open(args.texts, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    if args.words:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump([words(text) for text in texts], file)
        return

    # What is made at the first call is not a filter's time.
    for name in FILTERS:
        verdict(name, "One sentence of some words. And another one of them.")
    verdicts = {}
    seconds = {}
    for name in FILTERS:
        began = time.perf_counter()
        verdicts[name] = [verdict(name, text) for text in texts]
        seconds[name] = time.perf_counter() - began

    # A text's words are made once for its filters, when they come one after another.
    began = time.perf_counter()
    for text in texts:
        for name in FILTERS:
            verdict(name, text)
    seconds["all"] = time.perf_counter() - began
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(dict(verdicts=verdicts, seconds=seconds), file)


if __name__ == "__main__":
    main()
