"""Stage collect: files of any format -> shards of documents."""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping

from etils import epath
from ml_collections import ConfigDict

from lm import files
from lm.prepare import formats
from lm.prepare.engine import Made, Stage
from lm.prepare.shards import Damaged, Document, Work

RECORDS_OF_A_TASK = 20_000  # of a data set


def stages(config: ConfigDict) -> list[Stage]:
    """The stage, for the files that there are now.

    Raises:
      ValueError: a source without files, or of no known format.
    """
    sources = {}
    packages = set()
    units = []
    for name, entry in config.sources.items():
        source = entry.to_dict() | {"name": name}
        sources[name] = source
        format_ = formats.FORMATS.get(source["format"])
        if format_:
            packages.update(format_.packages)
            if source["format"] in ("html", "warc") and config.collect.extractor != "resiliparse":
                packages.add(config.collect.extractor)
        units += _units(source)

    settings = config.collect.to_dict() | dict(
        bad_input=config.bad_input, shard_bytes=config.shard_mb * 2**20, sources=sources
    )
    tasks = _deal(units, settings["shard_bytes"])
    plan = functools.partial(_plan, tasks)
    return [Stage("collect", collect, plan, settings, sorted(packages), reads=units)]


def _plan(tasks: list[dict], made: Made) -> list[dict]:
    del made  # it is the first one
    return tasks


def _units(source: Mapping) -> list[list]:
    """(source's name, path, bytes, time of the last change) of all that a source reads, in order.

    Raises:
      ValueError: there is nothing.
    """
    name, path = source["name"], source["path"]
    if source["format"] in ("tfds", "hugging_face"):
        opened = getattr(formats, f"open_{source['format']}")(source)
        units = []
        for begin in range(0, len(opened), RECORDS_OF_A_TASK):
            end = min(begin + RECORDS_OF_A_TASK, len(opened))
            units.append([name, f"{path}[{begin}:{end}]", 0, 0])
        return units

    reader = _reader(source)
    if source["format"] not in formats.FORMATS and hasattr(reader, "units"):
        return [[name, unit, 0, 0] for unit in reader.units(source)]
    names = ("*",)
    if source["format"] in formats.FORMATS:
        names = formats.FORMATS[source["format"]].names
    if source["format"] == "code":
        names = tuple(f"*{ending}" for ending in source["endings"])
    try:
        found = files.find(path, names)
    except ValueError as error:
        raise ValueError(f"config.sources.{name}: {error}") from None
    units = []
    for file in found:
        stat = epath.Path(file).stat()
        units.append([name, file, stat.length, stat.mtime])
    return units


def _reader(source: Mapping) -> Callable[[str, Mapping, Work], Iterator[Document]]:
    """The function that reads a source's files.

    Raises:
      ValueError: its format is neither a known one nor a function that can be imported.
    """
    format_ = source["format"]
    if format_ in formats.FORMATS:
        return formats.FORMATS[format_].read
    module, _, function = format_.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"config.sources.{source['name']}.format = {format_!r}: no such function ({error}), "
            f"nor a format; valid: {list(formats.FORMATS)}"
        ) from None


def _deal(units: list[list], shard_bytes: int) -> list[dict]:
    """Units dealt to tasks, in order: many small files make one."""
    tasks: list[dict] = []
    room = 0
    for name, path, size, _ in units:
        if not tasks or size > room or len(tasks[-1]["files"]) >= 10_000:
            tasks.append({"files": [], "sources": []})
            room = shard_bytes
        tasks[-1]["files"].append(path)
        tasks[-1]["sources"].append(name)
        room -= size
    return tasks


def collect(work: Work) -> None:
    """Reads files into one or more shards."""
    documents = _documents(work)
    document = next(documents, None)
    while document is not None:
        with work.documents() as writer:
            while document is not None and writer.written < work.settings["shard_bytes"]:
                writer.write(document)
                document = next(documents, None)


def _documents(work: Work) -> Iterator[Document]:
    """The documents of a task's files that have text in them."""
    for path, name in zip(work.inputs["files"], work.inputs["sources"]):
        source = work.settings["sources"][name]
        work.count("files", name)
        try:
            for document in _reader(source)(path, source, work):
                if not document.text.strip():
                    work.bad("empty", name, document.id, "there is no text in it")
                    continue
                # JSON can spell halves of surrogate pairs, which no encoding has.
                text = document.text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
                if text != document.text:
                    work.count("surrogates", name)
                    document = document._replace(text=text)
                work.count("documents", name)
                work.count("bytes", name, len(text.encode("utf-8")))
                if document.licence:
                    work.count(f"licence.{document.licence}", name)
                yield document
        except Damaged as error:
            work.bad("damaged", name, path, str(error))
        except OSError as error:
            work.bad("unreadable", name, path, str(error))
        except MemoryError:
            work.bad("too_large", name, path, "it doesn't fit in memory")
    logging.debug("task %d has been read", work.number)
