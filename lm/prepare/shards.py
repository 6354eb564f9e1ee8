"""Shards: what a task of a preparation reads and writes, and what it has to say.

Documents lie between stages as JSON lines packed by zstd, so that anybody can look at them:
`zstdcat OUT/stages/clean-*/00000-documents-0000.jsonl.zst | head`. What is shuffled by a key lies
in bucket files: numpy records of a fixed size.
"""

import contextlib
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import zstandard
from etils import epath

from lm import files

ENDING = ".jsonl.zst"
MAX_SAMPLES = 5  # of each thing that a task shows samples of
MAX_LISTED = 1000  # bad records of a kind that a task names; all are counted
SAMPLE_CHARS = 300


class Document(NamedTuple):
    """A document between stages."""

    id: str  # source:file:place, unique
    text: str
    source: str  # its name in config.sources
    name: str = ""  # what it calls itself: a URL, a title, a path
    label: str = ""
    language: str = ""
    licence: str = ""
    split: str = ""  # where its source says so; "": by the hash of its text


class Damaged(ValueError):
    """A file, or the rest of it, can't be read."""


def read(path: str) -> Iterator[Document]:
    """Yields the documents of a shard.

    Raises:
      OSError, ValueError: it has vanished, or is damaged; the message names it.
    """
    with epath.Path(path).open("rb") as file:
        stream = io.BufferedReader(files.open_zstd(file, path), 1 << 20)
        try:
            for line in io.TextIOWrapper(stream, "utf-8", newline="\n"):
                yield Document(*json.loads(line))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged: {error}. Delete it; the next start makes it anew"
            ) from None


class Writer:
    """Writes documents to a shard, which has its name when all of it is written."""

    def __init__(self, file: BinaryIO):
        self._stream = zstandard.ZstdCompressor(level=1, write_checksum=True).stream_writer(
            file, closefd=False
        )
        self._lines: list[str] = []
        self._chars = 0
        self.written = 0  # characters

    def write(self, document: Document) -> None:
        line = json.dumps(document, ensure_ascii=False)
        self._lines.append(line)
        self._chars += len(line)
        self.written += len(line)

        # Many small documents go to the compressor together.
        if self._chars > 1 << 18:
            self._flush()

    def _flush(self) -> None:
        lines = "".join(f"{line}\n" for line in self._lines)
        self._stream.write(lines.encode("utf-8"))
        self._lines, self._chars = [], 0

    def close(self) -> None:
        self._flush()
        self._stream.close()


class Work:
    """A task while it runs: its files, and its report.

    Attributes:
      number: of the task in its stage.
      folder: of the stage.
      inputs: what the stage's plan gave it.
      settings: of its stage.
    """

    def __init__(self, folder: str, number: int, inputs: Mapping, settings: Mapping):
        self.number, self.inputs, self.settings = number, inputs, settings
        self.folder = epath.Path(folder)
        self._outputs: list[dict] = []
        self._counts: dict[str, dict[str, int]] = {}
        self._histograms: dict[str, dict[str, int]] = {}
        self._samples: dict[str, list] = {}
        self._listed: dict[str, list[dict]] = {}

    # --- outputs ---

    @contextlib.contextmanager
    def open(self, kind: str, ending: str, about: Any = None) -> Iterator[BinaryIO]:
        """Opens an output of a kind, several of which keep their order."""
        count = sum(output["kind"] == kind for output in self._outputs)
        path = self.folder / f"{self.number:05d}-{kind}-{count:04d}{ending}"
        output = self._output(kind, path, about)
        with files.open_whole(path) as file:
            yield file
        output["size"] = path.stat().length

    def _output(self, kind: str, path: epath.Path, about: Any) -> dict:
        output = {"kind": kind, "path": str(path), "about": about, "size": 0}
        self._outputs.append(output)
        return output

    def adopt(self, kind: str, path: epath.Path, about: Any = None) -> None:
        """Makes a file that something else wrote into the stage's folder an output."""
        self._output(kind, path, about)["size"] = path.stat().length

    @contextlib.contextmanager
    def documents(self, kind: str = "documents") -> Iterator[Writer]:
        """Opens a shard of documents for writing."""
        with self.open(kind, ENDING) as file:
            writer = Writer(file)
            yield writer
            writer.close()

    def write_buckets(
        self, kind: str, records: np.ndarray, buckets: np.ndarray, count: int
    ) -> None:
        """Writes records into one file, those of a bucket together, for `Made.buckets`.

        Args:
          buckets: the bucket of each record, int [n], below `count`.
        """
        order = np.argsort(buckets, kind="stable")
        ends = np.searchsorted(buckets[order], np.arange(count + 1))
        records = records[order]
        self.write_ranges(kind, (records[a:b].tobytes() for a, b in zip(ends, ends[1:])))

    def write_ranges(self, kind: str, contents: Iterable[bytes]) -> None:
        """Writes the content of each bucket into one file."""
        bounds = [0]
        with self.open(kind, ".bin", about=bounds) as file:
            for content in contents:
                file.write(content)
                bounds.append(bounds[-1] + len(content))

    # --- the report ---

    def count(self, what: str, of: str = "", amount: int = 1) -> None:
        """Adds to a count; `of` is what it is counted by, such as a source."""
        counts = self._counts.setdefault(what, {})
        counts[of] = counts.get(of, 0) + amount

    def measure(self, what: str, value: int) -> None:
        """Adds a value, 0 or more, to a histogram whose bins are quarters of an octave."""
        bin_ = str(math.floor(4 * math.log2(value))) if value else "-1"
        histogram = self._histograms.setdefault(what, {})
        histogram[bin_] = histogram.get(bin_, 0) + 1

    def sample(self, what: str, document: Document, shown: str = "") -> None:
        """Keeps a document as a sample, or doesn't: chance decides, by the hash of its id."""
        chance = files.short_hash(document.id.encode("utf-8", "surrogatepass"))
        text = (shown or document.text)[:SAMPLE_CHARS]
        self.keep_sample(what, [chance, document.id, text])

    def keep_sample(self, what: str, sample: list) -> None:
        samples = self._samples.setdefault(what, [])
        samples.append(sample)
        if len(samples) > 4 * MAX_SAMPLES:
            self._samples[what] = sorted(samples)[:MAX_SAMPLES]

    def drop(self, rule: str, document: Document, shown: str = "") -> None:
        """Notes that a document goes, and by which rule."""
        self.count(f"dropped.{rule}", document.source)
        self.count("chars_dropped", document.source, len(document.text))
        self.sample(f"dropped.{rule}", document, shown)

    def bad(self, kind: str, source: str, place: str, why: str) -> None:
        """Notes a record that can't be read.

        Raises:
          ValueError: config.bad_input = "stop".
        """
        if self.settings["bad_input"] == "stop":
            raise ValueError(f"{place}: {why} ({kind}). config.bad_input = 'list' goes on")
        self.count(f"bad.{kind}", source)
        self.list(kind, place, why)

    def list(self, kind: str, place: str, why: str) -> None:
        """Adds to what is listed by its place, the first ones of each kind in a task."""
        listed = self._listed.setdefault(kind, [])
        if len(listed) < MAX_LISTED:
            listed.append({"kind": kind, "place": place, "why": why[:SAMPLE_CHARS]})

    def report(self) -> dict:
        """What is left of the task when it is done, JSON-able."""
        samples = {what: sorted(kept)[:MAX_SAMPLES] for what, kept in self._samples.items()}
        return dict(
            outputs=self._outputs,
            counts=self._counts,
            histograms=self._histograms,
            samples=samples,
            listed=list(itertools.chain(*self._listed.values())),
        )


def merge(reports: Sequence[dict]) -> dict:
    """The counts, histograms, samples and bad records of several reports, whatever their order."""
    merged: dict[str, Any] = {"counts": {}, "histograms": {}, "samples": {}, "listed": []}
    for report in reports:
        for group in ("counts", "histograms"):
            for what, amounts in report[group].items():
                into = merged[group].setdefault(what, {})
                for key, amount in amounts.items():
                    into[key] = into.get(key, 0) + amount
        for what, samples in report["samples"].items():
            merged["samples"].setdefault(what, []).extend(samples)
        merged["listed"] += report["listed"]

    for what, samples in merged["samples"].items():
        merged["samples"][what] = sorted(samples)[:MAX_SAMPLES]
    merged["listed"].sort(key=_place)
    return merged


def _place(listed: dict) -> tuple[str, str]:
    return listed["kind"], listed["place"]


def read_ranges(ranges: Iterable[tuple[str, int, int]]) -> Iterator[bytes]:
    """Yields the contents of ranges (path, begin, end) of bucket files.

    Raises:
      ValueError: a file that ends before.
    """
    for path, begin, end in ranges:
        with epath.Path(path).open("rb") as file:
            file.seek(begin)
            content = file.read(end - begin)
        if len(content) < end - begin:
            raise ValueError(f"{path} is damaged. Delete it; the next start makes it anew")
        yield content


def read_records(ranges: Iterable[tuple[str, int, int]], dtype: np.dtype) -> np.ndarray:
    """Returns the records of ranges of bucket files, one after another; see `read_ranges`."""
    parts = [np.frombuffer(content, dtype) for content in read_ranges(ranges)]
    return np.concatenate([np.empty(0, dtype), *parts])
