"""Reads pydocs's docstrings, all of them, into a preparation: its stages do what
`lm.data.pydocs.collect` does.
"""

from collections.abc import Iterator, Mapping

from lm.data import pydocs, sources
from lm.prepare.shards import Document, Work


def read(unit: str, source: Mapping, work: Work) -> Iterator[Document]:
    """Yields the docstrings of a library; a module's are of one split."""
    library, _, _ = unit.partition("==")
    for number, (module, found) in enumerate(pydocs.docstrings(library)):
        place = f"{source['name']}:{library}:{number}"
        if not sources.is_utf8_text(found.text):
            work.bad("encoding", source["name"], place, f"{found.name} has half a surrogate pair")
            continue
        yield Document(
            place,
            found.text,
            source["name"],
            name=found.name,
            label=found.label,
            split=pydocs.split_of(module),
        )


def units(source: Mapping) -> list[str]:
    """Returns what is read, in order: another version has other docstrings."""
    del source
    return [f"{library}=={version}" for library, version in pydocs.versions().items()]


read.units = units
