"""Stages that find the items of evals in the corpus: documents with n words of one in a row (Brown
et al. 2020, arXiv 2005.14165, appendix C).

An item is every form in which a task asks it, with each of its answers, and its own columns. One of
fewer than n words counts as a whole; one of fewer than `MIN_WORDS` is in any corpus, and is left
out. So are n-grams that many items of a task share: its own wording. What a few of them share is a
text that several questions are asked about.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lm import files
from lm.prepare import ngrams
from lm.prepare.engine import Made, Stage
from lm.prepare.shards import Work, read

MIN_WORDS = 8  # the least that appendix C takes
# An n-gram of more items of a task, and of more than this share of them, is its wording.
SHARED = 10
SHARED_PART = 0.1
TABLE_BITS = 22
GRAM = np.dtype([("words", "<u8"), ("hash", "<u8"), ("item", "<u8")])


def stages(config: ConfigDict) -> list[Stage]:
    """The stages.

    Raises:
      ValueError: no such task, or one without data; nothing to look for.
    """
    c = config.decontaminate
    if not config.tasks and not c.texts:
        raise ValueError(
            "stage decontaminate has nothing to look for: wanted config.tasks, entries of "
            "lm.evals.entries.task by name, or config.decontaminate.texts"
        )

    settings = c.to_dict() | {"bad_input": config.bad_input}
    items = []
    for name, entry in config.tasks.items():
        items += _items_of_task(name, entry.to_dict(), c.max_records)
    for path in c.texts:
        items += _items_of_file(path)
    identity = [files.short_hash(json.dumps(items).encode()), inspect.getsource(ngrams)]
    return [
        Stage("eval_ngrams", index, _Plan(items), settings, reads=identity),
        Stage("decontaminate", decontaminate, _plan, settings),
    ]


class _Plan:
    """The plan of the one task that makes the index."""

    def __init__(self, items: list[dict]):
        self._items = items

    def __call__(self, made: Made) -> list[dict]:
        del made
        return [{"items": self._items}]


def _items_of_task(name: str, entry: Mapping, max_records: int) -> list[dict]:
    """The task, the name and the texts of each record that the task evaluates."""
    from lm import instructions  # and with it jax

    items = []
    for number, texts in instructions.forms(name, entry, max_records):
        items.append(dict(task=name, name=f"{name}[{number}]", texts=texts))
    return items


def _items_of_file(path: str) -> list[dict]:
    items = []
    for number, record in files.read_jsonl(files.expand(path)):
        if not isinstance(record.get("text"), str):
            raise ValueError(f"{path}:{number} has no key 'text' with a text")
        items.append(dict(task=path, name=f"{path}:{number}", texts=[record["text"]]))

    return items


def _plan(made: Made) -> list[dict]:
    (grams,) = made.outputs("eval_ngrams", "grams")
    (names,) = made.outputs("eval_ngrams", "names")
    inputs = []
    for path in made.shards():
        inputs.append({"shard": path, "grams": grams["path"], "names": names["path"]})
    return inputs


def index(work: Work) -> None:
    """Writes the n-grams of all items, sorted, and the items' names."""
    words = ngrams.Words()
    n = work.settings["ngram"]
    grams = []
    names = []
    tasks = []
    too_short = set()
    for number, item in enumerate(work.inputs["items"]):
        names.append(item["name"])
        tasks.append(item["task"])
        of_item = set()
        for text in item["texts"]:
            hashes = words.hashes(text)
            length = min(n, len(hashes))
            if length >= min(MIN_WORDS, n):
                of_item.update((length, hash_) for hash_ in ngrams.rolling(hashes, length).tolist())
        work.count("eval.items", item["task"])
        if not of_item:
            work.count("eval.too_short", item["task"])
            too_short.add(number)
        grams += [(length, hash_, number) for length, hash_ in of_item]

    kept = _without_wording(np.array(grams, GRAM), tasks, work)
    for number in set(range(len(names))) - too_short - set(kept["item"].tolist()):
        work.count("eval.only_wording", tasks[number])
    with work.open("grams", ".bin") as file:
        file.write(np.sort(kept).tobytes())
    with work.open("names", ".json") as file:
        file.write(json.dumps([tasks, names]).encode())


def _without_wording(grams: np.ndarray, tasks: list[str], work: Work) -> np.ndarray:
    """The n-grams that few items of their task have."""
    numbers = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
    task_of_item = np.array([numbers[task] for task in tasks], np.uint64)
    keys = np.empty(len(grams), [("task", "<u8"), ("words", "<u8"), ("hash", "<u8")])
    keys["task"] = task_of_item[grams["item"].astype(int)]
    keys["words"], keys["hash"] = grams["words"], grams["hash"]
    distinct, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    sizes = np.bincount(task_of_item.astype(int))
    most = np.maximum(SHARED, SHARED_PART * sizes)[distinct["task"].astype(int)]
    work.count("eval.wording", amount=int((counts > most).sum()))
    return grams[(counts <= most)[inverse]]


class Index:
    """The n-grams of items, to look texts up in."""

    def __init__(self, grams: str, names: str):
        records = np.frombuffer(epath.Path(grams).read_bytes(), GRAM)
        self.tasks, self.names = json.loads(epath.Path(names).read_text())
        self._words = ngrams.Words()
        self._by_length = {}
        for length in np.unique(records["words"]).tolist():
            of_length = records[records["words"] == length]
            self._by_length[length] = (of_length["hash"], of_length["item"])

        # Whether a known hash begins with these bits: few of a text's do, and only they are sought.
        self._may_be_known = np.zeros(1 << TABLE_BITS, bool)
        self._may_be_known[_first_bits(records["hash"])] = True

    def hits(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yields (item, first word, words) of each place in a text where an item is."""
        lengths = list(self._by_length)
        of_lengths = ngrams.rolling_of_lengths(self._words.hashes(text), lengths)
        for length, grams in zip(lengths, of_lengths):
            known, items = self._by_length[length]
            places = np.flatnonzero(self._may_be_known[_first_bits(grams)])
            begins = np.searchsorted(known, grams[places])
            ends = np.searchsorted(known, grams[places], side="right")
            for i in np.flatnonzero(ends > begins).tolist():
                for item in items[begins[i] : ends[i]].tolist():
                    yield item, int(places[i]), length


def _first_bits(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - TABLE_BITS)).astype(np.int64)


def decontaminate(work: Work) -> None:
    """Drops or lists the documents of a shard that hold items of evals."""
    index_ = Index(work.inputs["grams"], work.inputs["names"])
    with work.documents() as writer:
        for document in read(work.inputs["shard"]):
            found: dict[int, tuple[int, int]] = {}
            for item, place, length in index_.hits(document.text):
                found.setdefault(item, (place, length))
            _tell(work, index_, document, found)
            if found and work.settings["action"] == "drop":
                work.drop("contaminated", document)
            else:
                writer.write(document)


def _tell(work: Work, index_: Index, document, found: Mapping[int, tuple[int, int]]) -> None:
    """Counts hits by task and by item, and lists them."""
    spans = [match.span() for match in re.finditer(r"\w+", document.text)] if found else []
    for item, (place, length) in sorted(found.items()):
        task, name = index_.tasks[item], index_.names[item]
        work.count("contaminated.items", name)
        around = spans[max(place - 3, 0) : place + length + 3]
        shown = " ".join(document.text[around[0][0] : around[-1][1]].split()) if around else ""
        work.list("contaminated", document.id, f"{name}: {shown}")

    for task in {index_.tasks[item] for item in found}:
        work.count("contaminated.documents", task)
