"""Stages that find duplicates in all shards at once: exact ones, repeated lines, and near ones.

A document's number is its shard and its place in it, so that an order of all documents is there
without a count of them: that of the sources, their files and what is in these. Of duplicates the
first one stays, whatever the number of workers.

Near duplicates: MinHash signatures (Broder 1997, "On the resemblance and containment of documents")
in bands give candidates. Their similarity is computed from their shingles, and a document goes if
it is similar enough to one that stays; that it is similar to one that goes is no reason.
"""

import functools
import hashlib
import inspect
import math
from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lm.prepare import ngrams
from lm.prepare.engine import Made, Stage
from lm.prepare.shards import Work, read, read_ranges, read_records

SHARD_BITS = 40  # the lower bits of a number are the place in the shard
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])
LINE = np.dtype([("hash", "<u8"), ("number", "<u8"), ("line", "<u8")])
BAND = np.dtype([("hash", "<u8"), ("number", "<u8")])
# number `of` goes because of number `by`; line is 0 but for repeated lines
DROP = np.dtype([("of", "<u8"), ("by", "<u8"), ("line", "<u8")])
PAIR = np.dtype([("first", "<u8"), ("second", "<u8")])
EDGE = np.dtype([("second", "<u8"), ("first", "<u8"), ("similarity", "<f8")])


def numbers(shard: int, count: int) -> np.ndarray:
    """Returns the numbers of a shard's documents, u64 [count]."""
    return np.arange(count, dtype=np.uint64) + np.uint64(shard << SHARD_BITS)


def _shard_of(numbers_: np.ndarray) -> np.ndarray:
    return (numbers_ >> np.uint64(SHARD_BITS)).astype(np.int64)


# --- plans ---


def _plan_shuffle(of_shards: float, made: Made) -> list[dict]:
    """A task for each shard, whose records go into so many buckets that each fits in memory."""
    count = max(1, math.ceil(len(made.shards()) * of_shards))
    return [{"shard": path, "buckets": count} for path in made.shards()]


def _plan_buckets(stage: str, kind: str, made: Made) -> list[dict]:
    """A task for each bucket of a shuffle."""
    shards = len(made.shards())
    return [{"ranges": ranges, "shards": shards} for ranges in made.buckets(stage, kind)]


def _plan_drops(stage: str, made: Made) -> list[dict]:
    """A task for each shard, with what goes of it."""
    drops = made.buckets(stage, "drops") or [[]] * len(made.shards())
    return [{"shard": path, "ranges": ranges} for path, ranges in zip(made.shards(), drops)]


# --- exact ---


def exact_stages(config: ConfigDict) -> list[Stage]:
    settings = {"bad_input": config.bad_input}
    shuffle = functools.partial(_plan_shuffle, 1 / 64)
    find = functools.partial(_plan_buckets, "exact_hash", "texts")
    repeated_names = functools.partial(_plan_buckets, "exact_hash", "names")
    drop = functools.partial(_plan_drops, "exact_find")
    return [
        Stage("exact_hash", hash_texts, shuffle, settings),
        Stage("exact_find", find_exact, find, settings),
        Stage("repeated_names", find_repeated_names, repeated_names, settings),
        Stage("exact_drop", drop_documents, drop, settings | {"rule": "exact_duplicate"}),
    ]


def hash_texts(work: Work) -> None:
    """Writes 128 bits of the SHA-256 of each text, and of each name."""
    texts = []
    names = []
    for document in read(work.inputs["shard"]):
        texts.append(hashlib.sha256(document.text.encode()).digest()[:16])
        names.append(hashlib.sha256(f"{document.source}\0{document.name}".encode()).digest()[:16])

    for kind, digests in (("texts", texts), ("names", names)):
        records = np.empty(len(digests), RECORD)
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        records["high"], records["low"] = halves[:, 0], halves[:, 1]
        records["number"] = numbers(work.number, len(digests))
        count = work.inputs["buckets"]
        work.write_buckets(kind, records, (records["high"] % np.uint64(count)).astype(int), count)


def _later_ones(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of records with the same hash: (all but the first one, the first one of each of these)."""
    records = np.sort(records, order=("high", "low", "number"))
    is_new = np.ones(len(records), bool)
    is_new[1:] = (records["high"][1:] != records["high"][:-1]) | (
        records["low"][1:] != records["low"][:-1]
    )
    first = records[is_new][np.cumsum(is_new) - 1]
    return records[~is_new], first[~is_new]


def find_exact(work: Work) -> None:
    """Finds the documents of a bucket whose text stood before."""
    later, first = _later_ones(read_records(work.inputs["ranges"], RECORD))
    _write_drops(work, later["number"], first["number"])


def find_repeated_names(work: Work) -> None:
    """Counts names, such as URLs, that several documents of a source have."""
    later, _ = _later_ones(read_records(work.inputs["ranges"], RECORD))
    work.count("repeated_names", amount=len(later))


def _write_drops(work: Work, of: np.ndarray, by: np.ndarray, line=0) -> None:
    drops = np.empty(len(of), DROP)
    drops["of"], drops["by"], drops["line"] = of, by, line
    drops = np.sort(drops, order=("of", "line"))
    work.write_buckets("drops", drops, _shard_of(drops["of"]), work.inputs["shards"])


def drop_documents(work: Work) -> None:
    """Copies a shard without the documents that go."""
    drops = read_records(work.inputs["ranges"], DROP)
    places = set((drops["of"] & np.uint64((1 << SHARD_BITS) - 1)).tolist())
    with work.documents() as writer:
        for place, document in enumerate(read(work.inputs["shard"])):
            if place in places:
                work.drop(work.settings["rule"], document)
            else:
                writer.write(document)


# --- lines ---


def line_stages(config: ConfigDict) -> list[Stage]:
    settings = config.line_duplicates.to_dict() | {"bad_input": config.bad_input}
    shuffle = functools.partial(_plan_shuffle, 1)
    find = functools.partial(_plan_buckets, "line_hash", "lines")
    return [
        Stage("line_hash", hash_lines, shuffle, settings),
        Stage("line_find", find_lines, find, settings),
        Stage("line_drop", drop_lines, functools.partial(_plan_drops, "line_find"), settings),
    ]


def hash_lines(work: Work) -> None:
    """Writes the hashes of long lines, whatever their case and the space around them."""
    hashes = []
    places = []
    for place, document in enumerate(read(work.inputs["shard"])):
        for number, line in enumerate(document.text.split("\n")):
            line = line.strip()
            if len(line) >= work.settings["min_chars"]:
                hashes.append(hashlib.sha256(line.lower().encode()).digest()[:8])
                places.append((place, number))

    lines = np.empty(len(hashes), LINE)
    lines["hash"] = np.frombuffer(b"".join(hashes), "<u8")
    if places:
        lines["number"], lines["line"] = np.asarray(places, np.uint64).T
        lines["number"] += np.uint64(work.number << SHARD_BITS)

    count = work.inputs["buckets"]
    work.write_buckets("lines", lines, (lines["hash"] % np.uint64(count)).astype(int), count)


def find_lines(work: Work) -> None:
    """Finds the lines of a bucket that stood before."""
    lines = np.sort(read_records(work.inputs["ranges"], LINE), order=("hash", "number", "line"))
    is_repeated = np.zeros(len(lines), bool)
    is_repeated[1:] = lines["hash"][1:] == lines["hash"][:-1]
    later = lines[is_repeated]
    _write_drops(work, later["number"], later["number"], later["line"])


def drop_lines(work: Work) -> None:
    """Copies a shard without the lines that go, and without documents that have no others."""
    drops = read_records(work.inputs["ranges"], DROP)
    places = (drops["of"] & np.uint64((1 << SHARD_BITS) - 1)).tolist()
    gone: dict[int, set[int]] = {}
    for place, line in zip(places, drops["line"].tolist()):
        gone.setdefault(place, set()).add(line)

    with work.documents() as writer:
        for place, document in enumerate(read(work.inputs["shard"])):
            if place in gone:
                lines = document.text.split("\n")
                kept = [line for number, line in enumerate(lines) if number not in gone[place]]
                work.count("lines.repeated", document.source, len(lines) - len(kept))
                work.sample("lines.repeated", document, lines[min(gone[place])])
                document = document._replace(text="\n".join(kept).strip())
            if document.text:
                writer.write(document)
            else:
                work.drop("line_duplicates", document)


# --- near ---


def near_stages(config: ConfigDict) -> list[Stage]:
    settings = {"bad_input": config.bad_input}
    # Each stage has what it reads: another threshold needs no other signatures.
    keys = config.near_duplicates.to_dict()
    signs = {key: keys[key] for key in ("shingle", "bands", "rows", "seed")}
    pairs = {"max_compared": keys["max_compared"]}
    verified = {"threshold": keys["threshold"]}
    deal = functools.partial(_plan_shuffle, 1 / 16)
    find = functools.partial(_plan_buckets, "near_sign", "bands")
    send = functools.partial(_plan_sets, "near_pairs", "pairs")
    compare = functools.partial(_plan_sets, "near_attach", "sets")
    drop = functools.partial(_plan_drops, "near_resolve")
    code = inspect.getsource(ngrams)
    return [
        Stage("near_sign", sign, deal, settings | signs, ("rensa",), code),
        Stage("near_pairs", find_pairs, find, settings | pairs),
        Stage("near_attach", attach, send, settings),
        Stage("near_verify", verify, compare, settings | verified),
        Stage("near_resolve", resolve, _plan_resolve, settings),
        Stage("near_drop", drop_documents, drop, settings | {"rule": "near_duplicate"}),
    ]


def _plan_sets(stage: str, kind: str, made: Made) -> list[dict]:
    """A task for each shard, with its shingles and what a stage says of it."""
    shingles = [output["path"] for output in made.outputs("near_sign", "shingles")]
    buckets = made.buckets(stage, kind) or [[]] * len(shingles)
    tasks = []
    for path, ranges in zip(shingles, buckets):
        tasks.append({"shingles": path, "ranges": ranges, "shards": len(shingles)})
    return tasks


def _plan_resolve(made: Made) -> list[dict]:
    edges = [output["path"] for output in made.outputs("near_verify", "edges")]
    return [{"edges": edges, "shards": len(made.shards())}]


def sign(work: Work) -> None:
    """Writes the shingles of each document, and the hashes of its signature's bands."""
    from rensa import RMinHash

    settings = work.settings
    words = ngrams.Words()
    sets = []
    for document in read(work.inputs["shard"]):
        sets.append(ngrams.shingles(words.hashes(document.text), settings["shingle"]))
    bounds = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
    flat = np.concatenate([np.empty(0, np.uint32), *sets])
    with work.open("shingles", ".bin") as file:
        file.write(np.uint64(len(sets)).tobytes() + bounds.tobytes() + flat.tobytes())

    bands, rows = settings["bands"], settings["rows"]
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        flat.astype(np.uint64), bounds, bands * rows, settings["seed"]
    )
    signatures = np.asarray(matrix.to_rows(), np.uint64).reshape(-1, bands, rows)
    mixed = np.arange(bands, dtype=np.uint64)[None] * np.uint64(0x9E3779B97F4A7C15)
    for row in range(rows):
        mixed = (mixed ^ signatures[:, :, row]) * np.uint64(0xD6E8FEB86659FD93)
        mixed ^= mixed >> np.uint64(32)

    # Documents without words are alike in nothing.
    has_words = np.asarray([len(set_) > 0 for set_ in sets], bool)
    records = np.empty((len(sets), bands), BAND)
    records["hash"] = mixed
    records["number"] = numbers(work.number, len(sets))[:, None]
    records = records[has_words].reshape(-1)
    count = work.inputs["buckets"]
    work.write_buckets("bands", records, (records["hash"] % np.uint64(count)).astype(int), count)


def find_pairs(work: Work) -> None:
    """Makes pairs of documents that share a band: each with the first one, and with some before."""
    records = read_records(work.inputs["ranges"], BAND)
    records = np.unique(records)
    hashes, numbers_ = records["hash"], records["number"]
    _, begins, sizes = np.unique(hashes, return_index=True, return_counts=True)
    group = np.repeat(begins, sizes)  # the place of the first one with the same band

    places = np.arange(len(hashes))
    firsts = [numbers_[group]]
    seconds = [numbers_]

    # Documents in a band are in the order of their numbers.
    for distance in range(1, work.settings["max_compared"]):
        has_one = places - distance > group
        if not has_one.any():
            break
        firsts.append(numbers_[places[has_one] - distance])
        seconds.append(numbers_[has_one])

    pairs = np.empty(sum(map(len, firsts)), PAIR)
    pairs["first"], pairs["second"] = np.concatenate(firsts), np.concatenate(seconds)
    pairs = np.unique(pairs[pairs["first"] != pairs["second"]])
    work.write_buckets("pairs", pairs, _shard_of(pairs["first"]), work.inputs["shards"])


class _Sets:
    """The shingles of a shard's documents."""

    def __init__(self, path: str):
        content = epath.Path(path).read_bytes()
        (count,) = np.frombuffer(content, "<u8", 1).tolist()
        self._bounds = np.frombuffer(content, "<u8", count + 1, 8).astype(np.int64)
        self._flat = np.frombuffer(content, "<u4", offset=8 * (count + 2))

    def of(self, number: int) -> np.ndarray:
        place = number & ((1 << SHARD_BITS) - 1)
        return self._flat[self._bounds[place] : self._bounds[place + 1]]


def attach(work: Work) -> None:
    """Sends the shingles of the first of each pair to the shard of the second."""
    pairs = np.unique(read_records(work.inputs["ranges"], PAIR))
    sets = _Sets(work.inputs["shingles"])
    order = np.lexsort((pairs["second"], pairs["first"], _shard_of(pairs["second"])))
    pairs = pairs[order]
    shard = _shard_of(pairs["second"])
    ends = np.searchsorted(shard, np.arange(work.inputs["shards"] + 1))

    def contents() -> Iterator[bytes]:
        for begin, end in zip(ends, ends[1:]):
            yield b"".join(_entries(pairs[begin:end], sets))

    work.write_ranges("sets", contents())


def _entries(pairs: np.ndarray, sets: _Sets) -> Iterator[bytes]:
    """For each first one: its number, how many seconds, the size of its set, these and this."""
    _, begins = np.unique(pairs["first"], return_index=True)
    for begin, end in zip(begins, [*begins[1:], len(pairs)]):
        first = int(pairs["first"][begin])
        set_ = sets.of(first)
        yield np.array([first, end - begin, len(set_)], "<u8").tobytes()
        yield pairs["second"][begin:end].tobytes() + set_.tobytes()


def verify(work: Work) -> None:
    """Computes the similarity of pairs, and keeps those that are similar enough."""
    sets = _Sets(work.inputs["shingles"])
    edges = []
    for content in read_ranges(work.inputs["ranges"]):
        place = 0
        while place < len(content):
            first, count, size = np.frombuffer(content, "<u8", 3, place).tolist()
            seconds = np.frombuffer(content, "<u8", count, place + 24).tolist()
            set_ = np.frombuffer(content, "<u4", size, place + 24 + 8 * count)
            place += 24 + 8 * count + 4 * size
            work.count("near.compared", amount=count)
            for second in seconds:
                similarity = ngrams.jaccard(set_, sets.of(second))
                if similarity >= work.settings["threshold"]:
                    edges.append((second, first, similarity))

    with work.open("edges", ".bin") as file:
        file.write(np.sort(np.array(edges, EDGE)).tobytes())


def resolve(work: Work) -> None:
    """Decides in the documents' order which of them go."""
    gone: set[int] = set()
    contents = []
    for path in work.inputs["edges"]:
        content = epath.Path(path).read_bytes()
        drops = []
        for second, first, similarity in np.frombuffer(content, EDGE).tolist():
            if first not in gone and second not in gone:
                gone.add(second)
                drops.append((second, first, 0))
                work.measure("near_percent", round(100 * similarity))
        contents.append(np.array(drops, DROP).tobytes())

    contents += [b""] * (work.inputs["shards"] - len(contents))
    work.write_ranges("drops", contents)
