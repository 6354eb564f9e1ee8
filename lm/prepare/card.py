"""What is in a prepared corpus, and how it came about: card.json, and a page about it."""

import collections
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

import lm
from lm import config as run_config
from lm import files
from lm.prepare import shards
from lm.prepare.engine import Made, Stage, versions
from lm.reports import page
from lm.reports.page import Cell, Curves, Figure, Preformatted, Section, Table, Text

# What runs, and where, decides nothing of the set.
NOT_OF_THE_SET = ("engine", "workers", "keep_stages")
MAX_LISTED = 1000  # of a kind, in the card


def make(made: Made, stages: Sequence[Stage], key: str, config: ConfigDict) -> dict:
    """Returns the card of a set. Equal sets have equal cards: there are no times in it.

    Args:
      key: of the last stage, which all that decides the set goes into.
    """
    packages = sorted({package for stage in stages for package in stage.packages})
    merged = {stage.name: shards.merge(made.reports(stage.name)) for stage in stages}
    by_stage = []
    for name, report in merged.items():
        counts = {what: by for what, by in report["counts"].items() if sum(by.values())}
        by_stage.append(dict(stage=name, counts=counts, samples=report["samples"]))

    listed = []
    num_listed = collections.Counter()
    for report in merged.values():
        for entry in report["listed"]:
            num_listed[entry["kind"]] += 1
            if num_listed[entry["kind"]] <= MAX_LISTED:
                listed.append(entry)
    settings = {k: v for k, v in config.to_dict().items() if k not in NOT_OF_THE_SET}
    return dict(
        name=config.name,
        version=config.version,
        description=config.description,
        key=key,
        splits=_splits(made, merged["encode"]["counts"]),
        sources=_sources(merged["collect"]["counts"], merged["encode"]["counts"]),
        languages=_by(merged["encode"]["counts"], "language."),
        tokenizer=_tokenizer(made, config, merged["encode"]["counts"]),
        summary=_summary(made, merged),
        stages=by_stage,
        histograms=_histograms(merged),
        listed=listed,
        num_listed=num_listed.total(),
        config=settings,
        versions=dict(lm=lm.__version__, python=sys.version.split()[0]) | versions(packages),
    )


def _by(counts: Mapping[str, Mapping[str, int]], prefix: str) -> dict[str, dict[str, int]]:
    """{what it is counted by: {"documents": n, ...}} of the counts with a prefix."""
    table: dict[str, dict[str, int]] = {}
    for what, by in counts.items():
        if what.startswith(prefix):
            for key, amount in by.items():
                table.setdefault(key, {})[what.removeprefix(prefix)] = amount

    return dict(sorted(table.items()))


def _splits(made: Made, counts: Mapping) -> dict:
    splits: dict[str, dict[str, Any]] = {}
    for output in made.outputs("write", "set"):
        about = output["about"]
        split = splits.setdefault(about["split"], dict(shards=0, hashes=[]))
        split["shards"] += 1
        split["hashes"].append(about["hash"])

    for name, split in splits.items():
        # A corpus of many shards has one line, too.
        hashes = split.pop("hashes")
        split["fingerprint"] = files.short_hash_of_parts([hash_.encode() for hash_ in hashes])
        by_source = _by(counts, f"{name}.")
        for what in ("documents", "bytes", "words", "tokens"):
            if any(what in sizes for sizes in by_source.values()):
                split[what] = sum(sizes.get(what, 0) for sizes in by_source.values())
        split["by_source"] = by_source

    return splits


def _sources(collected: Mapping, written: Mapping) -> dict:
    """What each source had, and what is left of it."""
    sources: dict[str, dict[str, Any]] = {}
    for what in ("files", "documents", "bytes"):
        for name, amount in collected.get(what, {}).items():
            sources.setdefault(name, {})[f"collected_{what}"] = amount

    for kind in ("licence", "encoding", "bad"):
        for what, by in collected.items():
            if what.startswith(f"{kind}."):
                for name, amount in by.items():
                    of_kind = sources.setdefault(name, {}).setdefault(kind, {})
                    of_kind[what.removeprefix(f"{kind}.")] = amount

    for what, by in written.items():
        split, _, size = what.partition(".")
        if size in ("documents", "bytes", "words", "tokens") and split != "language":
            for name, amount in by.items():
                source = sources.setdefault(name, {})
                source[size] = source.get(size, 0) + amount

    return dict(sorted(sources.items()))


def _tokenizer(made: Made, config: ConfigDict, counts: Mapping) -> dict | None:
    if "tokenizer" not in config.stages:
        return None
    from lm.prepare import tokens

    paths = [output["path"] for output in made.outputs("tokenizer", "tokenizer")]
    trained = tokens.load(paths)
    before, after = trained.around
    return dict(
        fingerprint=trained.fingerprint,
        vocab_size=trained.vocab_size,
        stored=config.tokenizer.tokens == "stored",
        # Training puts them around each document; texts should have none.
        bos_ids=list(before),
        eos_ids=list(after),
        special_in_text=sum(counts.get("special_in_text", {}).values()),
    )


def _summary(made: Made, merged: Mapping[str, dict]) -> dict:
    """How many documents were read, and what became of them."""
    collected = sum(merged["collect"]["counts"].get("documents", {}).values())
    for what, by in merged["collect"]["counts"].items():
        if what.startswith("dropped."):
            collected += sum(by.values())

    bad: dict[str, int] = {}
    for report in merged.values():
        for what, by in report["counts"].items():
            kind, _, name = what.partition(".")
            if kind == "bad":
                bad[name] = bad.get(name, 0) + sum(by.values())

    written = sum(merged["encode"]["counts"].get("language.documents", {}).values())
    return dict(collected=collected, written=written, bad=bad, dropped=made.dropped())


def _histograms(merged: Mapping[str, dict]) -> dict:
    histograms = {}
    for report in merged.values():
        for what, bins in report["histograms"].items():
            # From the lower bound of a bin to how many are in it.
            sized = [(int(bin_), count) for bin_, count in bins.items()]
            histograms[what] = [[bin_, count] for bin_, count in sorted(sized)]

    return histograms


def broken_limits(card: Mapping, limits: Mapping) -> list[str]:
    """Returns what of config.limits a card breaks, a line each."""
    summary = card["summary"]
    bad = sum(count for kind, count in summary["bad"].items() if kind != "empty")
    duplicates = sum(summary["dropped"].get(f"{kind}_duplicate", 0) for kind in ("exact", "near"))
    shares = dict(
        max_bad=bad / max(summary["collected"] + bad, 1),
        max_dropped=sum(summary["dropped"].values()) / max(summary["collected"], 1),
        max_duplicates=duplicates / max(summary["collected"], 1),
    )
    broken = []
    for name, share in shares.items():
        if share > limits[name]:
            counts = summary["bad" if name == "max_bad" else "dropped"]
            broken.append(
                f"config.limits.{name} = {limits[name]:g}, and it is {share:.4g}: {counts}"
            )

    tokens = sum(split.get("tokens", 0) for split in card["splits"].values())
    if tokens < limits["min_tokens"]:
        broken.append(f"config.limits.min_tokens = {limits['min_tokens']:,}: there are {tokens:,}")
    if not card["splits"].get("train", {}).get("documents"):
        broken.append("no document is left for training")
    return broken


# --- the page ---


def write(card: Mapping, folder: epath.Path) -> None:
    """Writes card.json and, where the packages of pages are installed, card.html."""
    try:
        page.check_installed()
    except ValueError as error:
        logging.warning("there is no card.html: %s", error)
    else:
        files.write_whole(folder / "card.html", render(card))
    content = json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False)
    # Last: where it is, all is.
    files.write_whole(folder / "card.json", content.encode("utf-8", "backslashreplace"))


def render(card: Mapping) -> str:
    """Returns a card as a page."""
    summary = card["summary"]
    about = (
        f"{summary['written']:,} of {summary['collected']:,} documents are in the set; "
        f"{sum(summary['bad'].values()):,} records had no text, or could not be read."
    )
    sections = [
        Section("What is in it", [_splits_table(card), _sources_table(card)]),
        Section("Languages", [_languages_table(card)]),
        Section("What went, and why", _drops(card)),
        Section("What was found", _found(card)),
        Section("Lengths", _length_curves(card)),
        Section("What is listed", [_listed_table(card)], is_folded=True),
        Section("Samples", _samples(card), is_folded=True),
        Section("How it came about", _origin(card), is_folded=True),
    ]
    return page.render(f"Corpus {card['name']} {card['version']}", sections, about)


_SIZES = ("documents", "bytes", "words", "tokens")


def _splits_table(card: Mapping) -> Table:
    rows = []
    for name, split in card["splits"].items():
        sizes = [split.get(size) for size in _SIZES]
        rows.append([name, *sizes, split["shards"], split["fingerprint"]])

    return Table(["split", *_SIZES, "shards", "fingerprint"], rows, "Splits")


def _sources_table(card: Mapping) -> Table:
    rows = []
    for name, source in card["sources"].items():
        collected = source.get("collected_documents", 0)
        kept = source.get("documents", 0) / collected if collected else None
        licences = ", ".join(f"{k}: {n:,}" for k, n in source.get("licence", {}).items())
        sizes = [source.get(size) for size in _SIZES]
        rows.append([name, collected, *sizes, kept, *_fertility(source), licences])

    columns = ["source", "read", *_SIZES, "kept", "tokens a word", "bytes a token", "licences"]
    return Table(columns, rows, "Sources")


def _fertility(sizes: Mapping[str, int]) -> list[float | None]:
    """Tokens a word, and bytes a token."""
    tokens = sizes.get("tokens")
    if not tokens:
        return [None, None]
    return [tokens / max(sizes["words"], 1), sizes["bytes"] / tokens]


def _languages_table(card: Mapping) -> Table:
    rows = []
    for name, sizes in card["languages"].items():
        values = [sizes.get(size) for size in _SIZES]
        rows.append([name or "(unsure)", *values, *_fertility(sizes)])

    return Table(["language", *_SIZES, "tokens a word", "bytes a token"], rows)


def _length_curves(card: Mapping) -> list:
    """Histograms over octaves: the x-axis is the logarithm to the base of 2."""
    figures = []
    for what, bins in card["histograms"].items():
        if not what.endswith(("tokens", "bytes", "words")) or not bins:
            continue
        counts = dict(bins)
        x, y = [], []
        for bin_ in range(bins[0][0], bins[-1][0] + 1):
            # A step for each bin.
            x += [bin_ / 4, (bin_ + 1) / 4]
            y += [counts.get(bin_, 0)] * 2
        figures.append(Figure(f"{what} of a document, by octave (10 is 1,024)", {what: (x, y)}))

    return [Curves("log2", figures)] if figures else []


def _drops(card: Mapping) -> list:
    read = max(card["summary"]["collected"], 1)
    rows = []
    for stage in card["stages"]:
        for what, by in stage["counts"].items():
            kind, _, rule = what.partition(".")
            if kind == "dropped":
                count = sum(by.values())
                sources = ", ".join(f"{name}: {n:,}" for name, n in sorted(by.items()))
                rows.append([stage["stage"], rule, count, count / read, sources])

    rows.sort(key=_by_count)
    if not rows:
        return [Text("Nothing was dropped.", "good")]
    return [Table(["stage", "rule", "documents", "of all read", "by source"], rows)]


def _by_count(row: Sequence) -> int:
    return -row[2]


_FOUND = ("bad", "missing", "encoding", "repaired", "pii", "lines", "eval", "contaminated", "near")
_FOUND_ALONE = (
    "repeated_names",
    "repeated_ids",
    "special_in_text",
    "surrogates",
    "other_type",
    "http_errors",
    "truncated",
    "no_article",
)


def _found(card: Mapping) -> list:
    rows = []
    for stage in card["stages"]:
        for what, by in stage["counts"].items():
            if what.split(".")[0] in _FOUND or what in _FOUND_ALONE:
                shown = ", ".join(f"{name}: {n:,}" for name, n in sorted(by.items())[:20] if name)
                mark = "bad" if what.startswith("bad.") else ""
                rows.append([stage["stage"], Cell(what, None, mark), sum(by.values()), shown])

    return [Table(["stage", "what", "count", "by"], rows)]


def _listed_table(card: Mapping) -> Table:
    rows = [[entry["kind"], entry["place"], entry["why"]] for entry in card["listed"]]
    title = f"{card['num_listed']:,} records; card.json has {MAX_LISTED:,} of a kind at most"
    return Table(["kind", "file and offset", "why"], rows, title)


def _samples(card: Mapping) -> list:
    parts = []
    for stage in card["stages"]:
        for what, samples in stage["samples"].items():
            text = "\n\n".join(f"{id_}\n{shown}" for _, id_, shown in samples)
            parts.append(Preformatted(f"{stage['stage']}: {what}", text))

    return parts


def _origin(card: Mapping) -> list:
    settings = [[key, json.dumps(v)] for key, v in run_config.flatten(card["config"]).items()]
    versions_ = [[package, version] for package, version in card["versions"].items()]
    parts: list = [Table(["key", "value"], settings, "Configuration")]
    parts.append(Table(["package", "version"], versions_, "Versions"))
    if card["tokenizer"]:
        keys = [[key, json.dumps(value)] for key, value in card["tokenizer"].items()]
        parts.append(Table(["key", "value"], keys, "Tokenizer"))

    return parts
