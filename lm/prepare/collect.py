"""Stage collect: files of any format -> shards of documents."""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping

from etils import epath
from ml_collections import ConfigDict

from lm import files
from lm.prepare import extract, formats
from lm.prepare.engine import Made, Stage
from lm.prepare.shards import Damaged, Document, Work

RECORDS_OF_A_TASK = 20_000  # of a data set
WHOLE_TASK = 2**62  # bytes: a unit that makes a task of its own


def stages(config: ConfigDict) -> list[Stage]:
    """The stage, for the files that there are now.

    Raises:
      ValueError: a source without files, or of no known format.
    """
    sources = {}
    packages = set()
    units = []
    code = [inspect.getsource(module) for module in (formats, extract)]
    for name, entry in config.sources.items():
        source = entry.to_dict() | {"name": name}
        sources[name] = source
        format_ = formats.FORMATS.get(source["format"])
        if format_:
            packages.update(format_.packages)
            if source["format"] in ("html", "warc") and config.collect.extractor != "resiliparse":
                packages.add(config.collect.extractor)
        else:
            code.append(inspect.getsource(inspect.getmodule(_reader(source))))
        units += _units(source)

    settings = config.collect.to_dict() | dict(
        bad_input=config.bad_input, shard_bytes=config.shard_mb * 2**20, sources=sources
    )
    tasks = _deal(units, settings["shard_bytes"])
    plan = functools.partial(_plan, tasks)
    reads = [units, files.short_hash("".join(code).encode())]
    return [Stage("collect", collect, plan, settings, sorted(packages), reads=reads)]


def _plan(tasks: list[dict], made: Made) -> list[dict]:
    del made  # it is the first one
    return tasks


def _units(source: Mapping) -> list[list]:
    """(source's name, path, bytes, what tells it from others) of all that a source reads, in order.

    Raises:
      ValueError: there is nothing.
    """
    name, path, format_ = source["name"], source["path"], source["format"]
    reader = _reader(source)
    if format_ not in formats.FORMATS and hasattr(reader, "units"):
        return [[name, unit, WHOLE_TASK, 0] for unit in reader.units(source)]

    if not path:
        raise ValueError(f"config.sources.{name}.path is missing: wanted what {format_!r} reads")
    if format_ in ("tfds", "hugging_face"):
        opened = getattr(formats, f"open_{format_}")(source)
        identity = formats.identity(opened)
        units = []
        for begin in range(0, len(opened), RECORDS_OF_A_TASK):
            end = min(begin + RECORDS_OF_A_TASK, len(opened))
            units.append([name, f"{path}[{begin}:{end}]", WHOLE_TASK, identity])
        return units

    names = ("*",)
    if format_ in formats.FORMATS:
        names = formats.FORMATS[format_].names
    if format_ == "code":
        names = tuple(f"*{ending}" for ending in source["endings"])

    try:
        found = files.find(path, names)
    except ValueError as error:
        raise ValueError(f"config.sources.{name}: {error}") from None

    units = []
    for file in found:
        try:
            stat = epath.Path(file).stat()
            units.append([name, file, stat.length, stat.mtime])
        except OSError:
            # Such as a link that leads nowhere: its task says so.
            units.append([name, file, 0, 0])

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
            for document in _read(path, source, work):
                if not document.text.strip():
                    work.bad("empty", name, document.id, "there is no text in it")
                    continue

                document = _encodable(document, work)
                work.count("documents", name)
                work.count("bytes", name, len(document.text.encode()))
                if document.licence:
                    work.count(f"licence.{document.licence}", name)
                yield document
        except Damaged as error:
            work.bad("damaged", name, path, str(error))
        except OSError as error:
            work.bad("unreadable", name, path, str(error))
        except MemoryError:
            work.bad("too_large", name, path, "it doesn't fit in memory")


def _read(path: str, source: Mapping, work: Work) -> Iterator[Document]:
    """The documents of a file; errors name it."""
    reader = _reader(source)
    seen = set()
    try:
        for document in reader(path, source, work):
            # Those of `formats` are unique.
            if source["format"] not in formats.FORMATS:
                if document.id in seen:
                    work.count("repeated_ids", source["name"])
                    work.list("repeated_id", document.id, "another document has it, too")
                seen.add(document.id)
            yield document
    except (Damaged, OSError, MemoryError):
        raise
    except ValueError as error:
        # A reader's own: what config.bad_input = "stop" ends with has a place.
        if path in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:
        error.add_note(f"while it read {path}")
        raise


def _encodable(document: Document, work: Work) -> Document:
    """The document with no halves of surrogate pairs, which no encoding has. JSON can spell them,
    and names of files may be such.
    """
    text = _without_surrogates(document.text)
    if text != document.text:
        work.count("surrogates", document.source)
    return Document(*map(_without_surrogates, document))._replace(text=text)


def _without_surrogates(text: str) -> str:
    return (
        text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    )
