"""Every key of a preparation's configuration, once, with its default, its range and what it means.

configs/prepare/*.py start from here and say what differs. Thresholds are the published ones.
"""

import dataclasses

from ml_collections import ConfigDict

from lm import config as run_config
from lm.config import integer, number, one_of
from lm.evals import entries

STAGES = (
    "collect",
    "clean",
    "exact_duplicates",
    "near_duplicates",
    "line_duplicates",
    "quality",
    "decontaminate",
    "tokenizer",
    "write",
)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The keys outside of all groups."""

    name: str = "corpus"  # of the data set, as TFDS knows it
    version: str = "1.0.0"
    description: str = ""
    # Of `STAGES`, or dotted paths of functions (document, settings) -> document, or None to drop
    # it, whose settings are config.functions[their last name].
    stages: tuple[str, ...] = (
        "collect",
        "clean",
        "exact_duplicates",
        "near_duplicates",
        "decontaminate",
        "tokenizer",
        "write",
    )
    engine: str = one_of("local", "beam")
    workers: int = integer(0, most=2**12)  # processes; 0: one for each core
    # what can't be read is counted, listed and left out | ends the preparation
    bad_input: str = one_of("list", "stop")
    shard_mb: int = integer(128, least=1, most=2**14)  # of text, a shard
    # The stages' files stay, so that another threshold begins where it matters.
    keep_stages: bool = True


@dataclasses.dataclass(frozen=True)
class Source:
    """config.sources.NAME: where documents come from."""

    # text | jsonl | parquet | csv | html | warc | wikipedia | code | tfds | hugging_face, or the
    # dotted path of a function (path, source, work) -> documents, see lm/prepare/collect.py
    format: str = "text"
    # a file, a folder or a glob pattern, gs:// too; the name of a TFDS data set (c4/en:3.1.0) or
    # the name or the folder of a Hugging Face one
    path: str = ""
    split: str = "train"  # tfds, hugging_face: which one is read
    data_dir: str = ""  # tfds: where it was prepared
    config: str = ""  # hugging_face: of a data set that has several
    separator: str = ""  # text: what divides documents within a file; "": each file is one
    text_key: str = "text"  # jsonl, parquet, csv, tfds, hugging_face
    label_key: str = ""  # "": none
    name_key: str = ""  # a URL, a title; "": file and place are its name
    language_key: str = ""
    # of all documents, SPDX; code: found by the files LICENSE and COPYING above each file
    licence: str = ""
    # code: only files under these; (): any that is found
    licences: tuple[str, ...] = ()
    endings: tuple[str, ...] = (".py", ".c", ".h", ".cc", ".cpp", ".js", ".ts", ".java", ".go")


@dataclasses.dataclass(frozen=True)
class Collect:
    # another encoding than UTF-8 is detected, and counted | is bad input
    encodings: str = one_of("detect", "utf-8")
    # main text of pages: fast | slower (.5 MB/s), and somewhat cleaner
    extractor: str = one_of("resiliparse", "trafilatura")
    extract_seconds: float = number(10.0, above=0, most=3600)  # for a page; then it is bad input
    max_document_mb: float = number(16.0, above=0, most=2048)  # what is larger is bad input


@dataclasses.dataclass(frozen=True)
class Clean:
    unicode: str = one_of("NFC", "NFKC", "none")
    mojibake: bool = True  # text that was decoded wrongly somewhere is repaired by ftfy
    # control characters but line ends and tabs go, and so do byte-order marks
    controls: bool = True
    min_chars: int = integer(0)  # shorter documents go
    # documents that are in none of these languages go; (): all stay
    languages: tuple[str, ...] = ()
    identify: bool = True  # which language a document is in
    language_chars: int = integer(500, least=20)  # by which its language is identified
    least_probability: float = number(0.5, least=0, most=1)  # of the language


@dataclasses.dataclass(frozen=True)
class C4:
    """Raffel et al. 2020 (arXiv 1910.10683, section 2.2)."""

    on: bool = False
    terminal_punctuation: bool = True  # a line without goes
    min_words_of_line: int = integer(5)  # a line with fewer goes
    max_word_chars: int = integer(1000)  # a line with a longer word goes
    javascript: bool = True  # a line with that word goes
    policy: bool = True  # a line about cookies or terms of use goes
    citations: bool = True  # [1], [edit] and [citation needed] go
    curly_bracket: bool = True  # a document with { goes
    lorem_ipsum: bool = True  # a document with these words goes
    min_sentences: int = integer(3)
    bad_words: tuple[str, ...] = ()  # a document with one of these goes


@dataclasses.dataclass(frozen=True)
class GopherQuality:
    """Rae et al. 2021 (arXiv 2112.11446, section A.1.1)."""

    on: bool = False
    min_words: int = integer(50)
    max_words: int = integer(100_000)
    min_mean_word: float = number(3.0, least=0)
    max_mean_word: float = number(10.0, least=0)
    max_symbols: float = number(0.1, least=0)  # of # and of ellipses, by the words
    max_bullet_lines: float = number(0.9, least=0)
    max_ellipsis_lines: float = number(0.3, least=0)
    min_alphabetic_words: float = number(0.8, least=0, most=1)
    min_stop_words: int = integer(2)
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclasses.dataclass(frozen=True)
class GopherRepetition:
    """Rae et al. 2021 (arXiv 2112.11446, table A1): shares of what is repeated."""

    on: bool = False
    max_lines: float = number(0.3, least=0)
    max_paragraphs: float = number(0.3, least=0)
    max_line_chars: float = number(0.2, least=0)
    max_paragraph_chars: float = number(0.2, least=0)
    # n -> characters in the most frequent n-gram
    max_top_2gram: float = number(0.2, least=0)
    max_top_3gram: float = number(0.18, least=0)
    max_top_4gram: float = number(0.16, least=0)
    # n -> characters in n-grams that occur more than once
    max_5grams: float = number(0.15, least=0)
    max_6grams: float = number(0.14, least=0)
    max_7grams: float = number(0.13, least=0)
    max_8grams: float = number(0.12, least=0)
    max_9grams: float = number(0.11, least=0)
    max_10grams: float = number(0.1, least=0)


@dataclasses.dataclass(frozen=True)
class FineWeb:
    """Penedo et al. 2024 (arXiv 2406.17557, section 3.6)."""

    on: bool = False
    min_punctuated_lines: float = number(0.12, least=0, most=1)
    short_line: int = integer(30)  # characters
    max_short_lines: float = number(0.67, least=0, most=1)
    max_repeated_line_chars: float = number(0.1, least=0, most=1)
    max_newlines: float = number(0.3, least=0)  # by the words


@dataclasses.dataclass(frozen=True)
class Code:
    """Kocetkov et al. 2022 (The Stack, arXiv 2211.15533) and Li et al. 2023 (StarCoder)."""

    on: bool = False
    max_line: int = integer(1000)
    max_mean_line: float = number(100.0, least=0)
    min_alphanumeric: float = number(0.25, least=0, most=1)


@dataclasses.dataclass(frozen=True)
class Pii:
    """Personal data, each with what stands in its place; "": it stays."""

    email: str = "email@example.com"
    ip: str = "192.0.2.1"  # of RFC 5737; private and reserved addresses stay
    phone: str = "+1-555-0100"
    regions: tuple[str, ...] = ("US", "GB", "DE")  # of phone numbers without a country code


@dataclasses.dataclass(frozen=True)
class LineDuplicates:
    """A line that stood in the corpus before goes. What is left of near-duplicates then resembles
    nothing: near_duplicates comes before.
    """

    min_chars: int = integer(40, least=1)  # shorter ones stay


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """MinHash (Broder 1997) with bands; candidates are verified."""

    shingle: int = integer(5, least=1)  # words
    bands: int = integer(14, least=1)
    rows: int = integer(8, least=1)  # of a band
    threshold: float = number(0.8, above=0, most=1)  # Jaccard similarity of the shingles
    seed: int = integer(0)
    # of documents with the same band, each is compared with so many before it
    max_compared: int = integer(20, least=1)


@dataclasses.dataclass(frozen=True)
class Quality:
    """A model of this project that says how good a text is."""

    # a run directory: of a model with a verbalizer or of a base for the classifier; "": none
    model: str = ""
    # The probability that the words of `good` follow, rather than those of `bad`, after the prompt.
    prompt: str = "\n\nQuality:"
    good: tuple[str, ...] = (" good",)
    bad: tuple[str, ...] = (" bad",)
    # a JSON file that `python -m lm.prepare.quality` wrote: a linear classifier over states; "":
    # the verbalizer
    classifier: str = ""
    max_tokens: int = integer(128, least=8)  # of the text's beginning
    threshold: float = number(0.5, least=0, most=1)


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """What is looked for is what config.tasks evaluates, and these:"""

    # paths of JSONL files, {"text": ...} a line
    texts: tuple[str, ...] = ()
    ngram: int = integer(13, least=2)  # words, as in GPT-3 (arXiv 2005.14165, appendix C)
    max_records: int = integer(0)  # of a task; 0: all
    # a document with a hit goes | is only listed
    action: str = one_of("drop", "list")


@dataclasses.dataclass(frozen=True)
class Splits:
    """Shares that the hash of a document's text holds out, see lm.data.sources.is_held_out."""

    validation: float = number(0.01, least=0, below=1)
    test: float = number(0.0, least=0, below=1)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    # of a file .model (SentencePiece), of a folder with tokenizer.json, or of a run; "": trained
    path: str = ""
    # trained: SentencePiece's bpe | unigram | Hugging Face's byte-level BPE
    kind: str = one_of("bpe", "unigram", "byte_bpe")
    vocab_size: int = integer(0, most=2**24)  # 0: there is none, and no tokens are stored
    sample_mb: float = number(100.0, above=0)  # of the training split's text
    byte_fallback: bool = True
    split_digits: bool = True
    user_symbols: tuple[str, ...] = ()
    # in the set, beside each text, uint16 or uint32 | made when training reads the text
    tokens: str = one_of("stored", "on_the_fly")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the card must keep; else the preparation ends with an error. Shares of all documents."""

    max_bad: float = number(0.05, least=0, most=1)  # that can't be read, but for empty ones
    max_dropped: float = number(1.0, least=0, most=1)
    max_duplicates: float = number(1.0, least=0, most=1)
    min_tokens: int = integer(0, most=10**15)


GROUPS = dict(
    collect=Collect,
    clean=Clean,
    c4=C4,
    gopher_quality=GopherQuality,
    gopher_repetition=GopherRepetition,
    fineweb=FineWeb,
    code=Code,
    pii=Pii,
    line_duplicates=LineDuplicates,
    near_duplicates=NearDuplicates,
    quality=Quality,
    decontaminate=Decontaminate,
    splits=Splits,
    tokenizer=Tokenizer,
    limits=Limits,
)


def default() -> ConfigDict:
    """All keys with their defaults. configs/prepare/*.py start from here."""
    c = ConfigDict(dataclasses.asdict(Preparation()))
    for name, group in GROUPS.items():
        c[name] = ConfigDict(dataclasses.asdict(group()))
    c.sources = ConfigDict()  # name -> source(...)
    c.tasks = ConfigDict()  # name -> lm.evals.entries.task(...), whose items are kept out
    c.functions = ConfigDict()  # name -> settings of a stage of one's own
    return c


def source(format: str, path: str = "", **keys) -> ConfigDict:
    """An entry of config.sources."""
    return ConfigDict(dataclasses.asdict(Source()) | dict(format=format, path=path) | keys)


def check(config: ConfigDict) -> None:
    """Checks the keys of a configuration.

    Raises:
      ValueError: a key that is missing or unknown or has a value that it can't have; all of them
        are named.
    """
    named = ("sources", "tasks", "functions")
    top = {k: value for k, value in config.items() if k not in GROUPS and k not in named}
    problems = run_config.group_problems("config", Preparation, top)
    for name, group in GROUPS.items():
        problems += run_config.group_problems(f"config.{name}", group, dict(config[name].items()))
    for name, entry in config.sources.items():
        problems += run_config.group_problems(f"config.sources.{name}", Source, dict(entry.items()))
        if not name.isidentifier():
            problems.append(f"config.sources.{name}: wanted a name of letters, digits and _")

    for name, entry in config.tasks.items():
        keys = entry.to_dict()
        keys.pop("instructions", None)  # of entries.instructed
        entries.check(name, keys)

    if not config.sources:
        problems.append("config.sources is empty; wanted lm.prepare.config.source(...) by name")

    for stage in config.stages:
        if stage not in STAGES and "." not in stage:
            problems.append(f"config.stages: no stage {stage!r}; valid: {list(STAGES)}")

    if not config.stages or config.stages[0] != "collect" or config.stages[-1] != "write":
        problems.append("config.stages: wanted collect first and write last")
    if len(set(config.stages)) < len(config.stages):
        problems.append(f"config.stages: a stage is there twice in {tuple(config.stages)}")
    if config.splits.validation + config.splits.test >= 1:
        problems.append("config.splits: nothing is left for training")
    if problems:
        raise ValueError("\n".join(problems))
