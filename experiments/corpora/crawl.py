"""Makes a crawl with planted problems and a ledger of them, prepares it, and says what lm.prepare
found; see README.md beside this file.

    python experiments/corpora/crawl.py make runs/crawl --mb=60
    python experiments/corpora/crawl.py prepare runs/crawl runs/corpus --workers=2
    python experiments/corpora/crawl.py check runs/corpus/crawl/1.0.0 runs/crawl/ledger.json

The crawl's files are texts-*.jsonl.gz, files/*.txt, pages.warc.gz and tasks/. The ledger names its
documents as the set does, files by their paths within the crawl.
"""

import argparse
import gzip
import html
import json
import re
import resource
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lm
from etils import epath
from ml_collections import ConfigDict

from experiments.corpora import personal, writing
from experiments.corpora.writing import Writer
from lm.evals import entries
from lm.prepare import config as prepare_config
from lm.prepare.pipeline import prepare

# --- evals ---

QUESTIONS = 12  # about each text that is read
WORDING = (
    "Read what somebody wrote about a film below and say in one word whether this person liked it "
    "or would rather have stayed at home."
)
TASKS = {
    "films": f"""
type = "lm.evals.classification.PromptClassification"
label = "label"

[source]
path = "films-{{split}}.jsonl"
citation = "none"

[prompt]
templates = ["{WORDING}\\n{{review:strip}}\\nOpinion:", "Review: {{review}}\\nIt was a"]

[[verbalizer.words]]
bad = [" bad film"]
good = [" good film"]
""",
    "plans": """
type = "lm.evals.choice.MultipleChoice"
choices = [" {first}", " {second}"]
answer = "label"

[source]
path = "plans-{split}.jsonl"
citation = "none"

[prompt]
template = "Goal: {goal}\\nHow to come there:"
""",
    "reading": """
type = "lm.evals.generation.TextGeneration"
target = " {answer}"
references = "{answer}"
scores = ["exact_match"]

[source]
path = "reading-{split}.jsonl"
citation = "none"

[prompt]
template = "{context}\\n\\nQuestion: {question}\\nAnswer:"
""",
}


def make_record(task: str, writer: Writer) -> dict:
    """A record of a task; of every ten films one has 8 to 12 words and one has fewer."""
    if task == "films":
        length = writer.choice((*[(14, 31)] * 8, (8, 13), (4, 7)))
        return dict(
            review=writer.sentence(writer.number(*length)), label=writer.choice(("bad", "good"))
        )
    if task == "plans":
        goal, first, second = (writer.sentence(writer.number(9, 20)) for _ in range(3))
        return dict(goal=goal, first=first, second=second, label=writer.number(0, 2))
    if task == "reading":
        return dict(
            context=writer.text(60).replace("\n", " "),
            question=writer.sentence(10)[:-1] + "?",
            answer=writer.rare(),
        )
    return dict(text=writer.text(40))


def asked(task: str, record: dict, writer: Writer) -> list[str]:
    """Returns a record in each way that its task asks it, with an answer."""
    if task == "films":
        answer = writer.choice((" bad film", " good film"))
        return [
            f"{WORDING}\n{record['review'].strip()}\nOpinion:{answer}",
            f"Review: {record['review']}\nIt was a{answer}",
        ]
    if task == "plans":
        answer = record[writer.choice(("first", "second"))]
        return [f"Goal: {record['goal']}\nHow to come there: {answer}"]
    return [f"{record['context']}\n\nQuestion: {record['question']}\nAnswer: {record['answer']}"]


def own_text(task: str, record: dict) -> str:
    """Returns a record's longest text."""
    columns = dict(films="review", plans="goal", reading="context")
    return record[columns.get(task, "text")]


def disguises(text: str, writer: Writer) -> dict[str, str]:
    """Returns a text as pages have it."""
    words = text.split()
    # A sentence of 8 to 12 words counts as a whole.
    length = min(13, len(words))
    begin = writer.number(0, len(words) - length + 1)
    wrapped = [" ".join(words[i : i + 6]) for i in range(0, len(words), 6)]
    return {
        "raw": text,
        "upper case": text.upper(),
        "13 words": " ".join(words[begin : begin + length]),
        "wrapped": "\n".join(wrapped),
        "quoted": "\n".join(f"> {line}" for line in wrapped),
        "JSON": json.dumps({"text": text, "label": 1}),
        "HTML": f"<li>{html.escape(text)}</li>",
        "emphasised": "*" + "* *".join(words) + "*",
    }


# --- the crawl ---

ENCODINGS = {
    "latin-1": "fr",
    "cp1252": "de",
    "shift_jis": "ja",
    "euc_jp": "ja",
    "koi8-r": "ru",
    "cp1251": "ru",
    "gb18030": "zh",
    "utf-16": "fr",  # with a byte-order mark
    "utf-16-le": "de",  # without
    "utf-16-be": "ru",
    "utf-8-sig": "fr",
    "utf-8": "ja",
}
BOILERPLATE = (
    "We use cookies to make your visit to these pages as pleasant as it can be, and so do others.",
    "Copyright 2021 The Example Crawl Company | All rights reserved in all countries of the world",
)
# Similarity of pairs -> how many of them for each megabyte.
PAIRS = {0.95: 4, 0.9: 16, 0.85: 4, 0.7: 4, 0.5: 16}
SHARD_BYTES = 8_000_000


class Page(NamedTuple):
    name: str
    text: str


class Crawl:
    """Pages, and what is planted in them, while a crawl is made.

    Args:
      mb: its size, in millions of bytes.
    """

    def __init__(self, mb: float, seed: int):
        self.mb = mb
        self.writer = Writer(seed)
        self.pages: list[Page] = []
        self.ledger: dict[str, list] = {}

    def times(self, per_mb: float, least: int = 1) -> range:
        """So many of something for each megabyte."""
        return range(max(round(per_mb * self.mb), least))

    def add(self, kind: str, text: str) -> str:
        """Adds a page, and returns its name."""
        name = f"https://{kind}.example/{len(self.pages)}"
        self.pages.append(Page(name, text))
        return name

    def note(self, problem: str, **entry) -> None:
        """Adds an entry to the ledger."""
        self.ledger.setdefault(problem, []).append(entry)


def plant_exact(crawl: Crawl) -> None:
    """Plants copies, some of which are equal when they are cleaned."""
    changes: dict[str, Callable[[str], str]] = {
        "same": str,
        "line ends": lambda text: text.replace("\n", "\r\n"),
        "Unicode form": lambda text: unicodedata.normalize("NFD", text),
        "controls": lambda text: "\ufeff" + text.replace(" the ", " \u200bthe\x07 "),
        "mojibake": lambda text: text.encode().decode("latin-1"),
    }
    for number in crawl.times(4, least=10):
        change = list(changes)[number % len(changes)]
        accented = crawl.writer.foreign("fr", 30)
        text = crawl.writer.between(crawl.writer.any_text(), accented)
        names = [crawl.add("exact", text)]
        for _ in range(crawl.writer.number(1, 4)):
            names.append(crawl.add("exact", changes[change](text)))
        crawl.note("exact", names=names, change=change)


def plant_near(crawl: Crawl) -> None:
    """Plants pairs of a known similarity, and groups of many."""
    writer = crawl.writer
    for level, per_mb in PAIRS.items():
        for number in crawl.times(per_mb, least=8):
            edit = list(writing.EDITS)[number % len(writing.EDITS)]
            text = writer.text(writer.number(250, 800))
            other = writing.edited(text, edit, level, writer)
            names = [crawl.add("near", text), crawl.add("near", other)]
            kind = f"pairs at {level}"
            crawl.note(
                "near", names=names, kind=kind, edit=edit, jaccard=writing.jaccard(text, other)
            )
    for _ in crawl.times(2, least=5):
        text = writer.text(writer.number(100, 400))
        other = writing.restyled(text)
        names = [crawl.add("near", text), crawl.add("near", other)]
        crawl.note(
            "near", names=names, kind="restyled", edit="", jaccard=writing.jaccard(text, other)
        )

    for _ in crawl.times(0.1):
        text = writer.text(400)
        copies = [text, *(writing.edited(text, "substituted", 0.975, writer) for _ in range(60))]
        names = [crawl.add("group", copy) for copy in copies]
        crawl.note("groups", names=names, kind="groups of 61 at 0.95")
        text = writer.text(400)
        copies = [text, *(writing.edited(text, "substituted", 0.9, writer) for _ in range(25))]
        names = [crawl.add("group", copy) for copy in copies]
        crawl.note("groups", names=names, kind="groups of 26 at 0.81")


def plant_evals(crawl: Crawl, folder: Path) -> None:
    """Writes tasks, and plants some of their items, each in one of all the forms that it has."""
    writer = crawl.writer
    folder.mkdir()
    for task in (*TASKS, "quotes"):
        records = [make_record(task, writer) for _ in crawl.times(8, least=160)]
        if task == "reading":
            for number, record in enumerate(records):
                record["context"] = records[number - number % QUESTIONS]["context"]
        lines = [json.dumps(record) + "\n" for record in records]
        if task in TASKS:
            (folder / f"{task}.toml").write_text(TASKS[task])
            (folder / f"{task}-test.jsonl").write_text("".join(lines))
        else:
            (folder / f"{task}.jsonl").write_text("".join(lines))
        # Once each text that is read: a line that is there twice is a repeated one.
        for number in range(0, len(records), QUESTIONS if task == "reading" else 4):
            item = f"{task}[{number}]" if task in TASKS else f"tasks/{task}.jsonl:{number + 1}"
            _plant_item(crawl, task, item, records[number])

    # What a task says of each of its items is no item.
    for _ in crawl.times(1, least=10):
        text = writer.between(writer.any_text(), f"{WORDING}\nOpinion: good film")
        crawl.note("wording", name=crawl.add("wording", text))


def _plant_item(crawl: Crawl, task: str, item: str, record: dict) -> None:
    writer = crawl.writer
    text = own_text(task, record)
    forms = disguises(text, writer)
    if task in TASKS:
        forms |= {f"asked, {i}": form for i, form in enumerate(asked(task, record, writer))}
    is_short = len(text.split()) < 8
    form = writer.choice([form for form in forms if not is_short or "asked" not in form])
    name = crawl.add("evals", writer.between(writer.any_text(), forms[form]))
    planted = dict(name=name, item=item, form=form, shown=forms[form])
    crawl.note("too_short" if is_short else "evals", **planted)


def plant_pii(crawl: Crawl) -> None:
    """Plants sentences with personal data, and others with what looks like it."""
    writer = crawl.writer
    for _ in crawl.times(2, least=5):
        sentences = list(personal.masked_sentences(writer))
        for kind, sentence in personal.look_alikes(writer):
            sentences.append((kind, sentence, sentence))
        order = writer.rng.permutation(len(sentences)).tolist()
        for begin in range(0, len(order), 6):
            planted = []
            for kind, shown, wanted in [sentences[i] for i in order[begin : begin + 6]]:
                # Masked sentences are alike: as lines they would be repeated ones.
                before = writer.sentence(8)
                planted.append((kind, f"{before} {shown}", f"{before} {wanted}"))
            text = writer.between(writer.any_text(), *[shown for _, shown, _ in planted])
            name = crawl.add("pii", text)
            for kind, shown, wanted in planted:
                crawl.note("pii", name=name, kind=kind, shown=shown, wanted=wanted)


def as_browsers(content: bytes) -> str:
    """Returns bytes as Windows-1252, in which browsers have all 256."""
    table = bytes(range(256)).decode("cp1252", "replace")
    chars = [chr(byte) if char == "\ufffd" else char for byte, char in enumerate(table)]
    return "".join([chars[byte] for byte in content])


def plant_mojibake(crawl: Crawl) -> None:
    """Plants texts that were decoded wrongly, once or twice."""
    for number in crawl.times(6, least=12):
        language = ("fr", "de", "ru", "ja")[number % 4]
        text = crawl.writer.foreign(language, crawl.writer.number(40, 200))
        shown = text.encode().decode("latin-1")
        way = "latin-1"
        if number % 3 == 1:
            shown, way = as_browsers(text.encode()), "cp1252"
        if number % 3 == 2:
            shown, way = shown.encode().decode("latin-1"), "latin-1 twice"
        name = crawl.add("mojibake", shown)
        crawl.note("mojibake", name=name, kind=f"{language}, {way}", text=text)


def plant_encodings(crawl: Crawl, folder: Path) -> None:
    """Writes text files in encodings of many languages."""
    folder.mkdir()
    for number in crawl.times(10, least=2 * len(ENCODINGS)):
        encoding = list(ENCODINGS)[number % len(ENCODINGS)]
        language = ENCODINGS[encoding]
        text = crawl.writer.foreign(language, crawl.writer.number(30, 400)) + "\n"
        name = f"files/{number:05}.txt"
        (folder / f"{number:05}.txt").write_bytes(text.encode(encoding))
        crawl.note("encodings", name=name, encoding=encoding, text=text)


def plant_pages(crawl: Crawl, path: Path) -> None:
    """Writes a WARC file of pages that share lines, every fourth one in Latin-1."""
    with path.open("wb") as file:
        for number in crawl.times(6, least=20):
            url = f"https://pages.example/{number}"
            paragraphs = crawl.writer.text(crawl.writer.number(120, 500)).split("\n")
            charset = "utf-8"
            if number % 4 == 0:
                charset = "iso-8859-1"
                paragraphs.append(crawl.writer.foreign("fr", 20))
            lines = [paragraphs[0], BOILERPLATE[0], *paragraphs[1:], BOILERPLATE[1]]
            body = "".join(f"<p>{html.escape(line)}</p>\n" for line in lines)
            page = (
                f"<!DOCTYPE html><html><head><title>Page {number}</title></head><body><nav>"
                f"<a href='/'>Home</a></nav><main><h1>Page {number}</h1>\n{body}</main></body>"
                "</html>"
            )
            file.write(gzip.compress(_warc_record(url, page.encode(charset), charset), mtime=0))
            crawl.note("pages", name=url, charset=charset, paragraphs=paragraphs)


def _warc_record(url: str, page: bytes, charset: str) -> bytes:
    """A response, as WARC has it."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset={charset}\r\n"
    response = f"{head}Content-Length: {len(page)}\r\n\r\n".encode() + page
    header = (
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"WARC-Target-URI: {url}\r\nWARC-Record-ID: <{url}>\r\n"
        "Content-Type: application/http; msgtype=response\r\n"
        f"Content-Length: {len(response)}\r\n\r\n"
    )
    return header.encode() + response + b"\r\n\r\n"


def make(folder: Path, mb: float, seed: int = 0) -> dict:
    """Writes a crawl into a new folder, and returns its ledger, which ledger.json has too.

    Raises:
      ValueError: the folder is there already.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; wanted a new folder")
    folder.mkdir(parents=True)
    crawl = Crawl(mb, seed)
    plant_exact(crawl)
    plant_near(crawl)
    plant_evals(crawl, folder / "tasks")
    plant_pii(crawl)
    plant_mojibake(crawl)
    plant_encodings(crawl, folder / "files")
    plant_pages(crawl, folder / "pages.warc.gz")
    size = sum(len(page.text) for page in crawl.pages)
    while size < mb * 1e6:
        text = crawl.writer.any_text()
        size += len(text)
        crawl.note("plain", name=crawl.add("plain", text))

    order = crawl.writer.rng.permutation(len(crawl.pages)).tolist()
    pages = [crawl.pages[i] for i in order]
    _write_pages(pages, folder)
    _in_order(crawl.ledger, pages)
    (folder / "ledger.json").write_text(json.dumps(crawl.ledger, ensure_ascii=False))
    return crawl.ledger


def _write_pages(pages: Sequence[Page], folder: Path) -> None:
    lines: list[str] = []
    size = count = 0
    for page in pages:
        lines.append(json.dumps({"url": page.name, "text": page.text}) + "\n")
        size += len(lines[-1])
        if size > SHARD_BYTES or page is pages[-1]:
            content = "".join(lines).encode()
            path = folder / f"texts-{count:03}.jsonl.gz"
            path.write_bytes(gzip.compress(content, compresslevel=1, mtime=0))
            lines, size, count = [], 0, count + 1


def _in_order(ledger: dict, pages: Sequence[Page]) -> None:
    """Puts the names of duplicates in the order of their pages; says which of groups stay."""
    places = {page.name: place for place, page in enumerate(pages)}
    for kind in ("exact", "near", "groups"):
        for entry in ledger[kind]:
            entry["names"].sort(key=places.__getitem__)
    for entry in ledger["groups"]:
        texts = [pages[places[name]].text for name in entry["names"]]
        entry["stay"] = [entry["names"][number] for number in sorted(writing.survivors(texts))]


# --- preparing it ---


def get_config(path: str) -> ConfigDict:
    """A configuration for the crawl in a folder; it is one for `python -m lm.prepare` too."""
    folder = Path(path)
    c = prepare_config.default()
    c.name = "crawl"
    c.sources.texts = prepare_config.source(
        "jsonl", str(folder / "texts-*.jsonl.gz"), name_key="url"
    )
    c.sources.files = prepare_config.source("text", str(folder / "files"))
    c.sources.pages = prepare_config.source("warc", str(folder / "pages.warc.gz"))
    for task in TASKS:
        c.tasks[task] = entries.task(str(folder / "tasks" / f"{task}.toml"))
    c.decontaminate.texts = (str(folder / "tasks" / "quotes.jsonl"),)
    # Pairs lose the lines that they share: near duplicates are looked for before.
    c.stages = (
        *("collect", "clean", "exact_duplicates", "near_duplicates", "line_duplicates"),
        *("decontaminate", "write"),
    )
    c.shard_mb = 8
    return c


def print_times(out: Path, start: float) -> None:
    """Prints how long each stage took since `start`, by the times of its files, and the most
    memory.
    """
    ends = []
    for folder in (out / "stages").iterdir():
        stats = [file.stat() for file in folder.rglob("*")]
        size = sum(stat.st_size for stat in stats)
        ends.append((max(stat.st_mtime for stat in stats), folder.name.rpartition("-")[0], size))
    print("| stage | seconds | MB written |\n|---|---|---|")
    for end, name, size in sorted(ends):
        if end > start:
            print(f"| {name} | {end - start:.1f} | {size / 1e6:.1f} |")
            start = end
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    print(f"\nmost memory: {own:.0f} MB here, {child:.0f} MB in the largest other process")


# --- checking it ---


class Row(NamedTuple):
    """How many of something there are, and of how many it is right."""

    group: str
    kind: str
    planted: int
    right: int


class Corpus:
    """A set, and its card.

    Args:
      folder: of the set.
      crawl: the folder of the crawl that it was made of.
    """

    def __init__(self, folder: Path, crawl: Path):
        import tensorflow_datasets as tfds

        self.card = json.loads((folder / "card.json").read_text())
        self.texts: dict[str, str] = {}
        builder = tfds.builder_from_directory(folder)
        for split in self.card["splits"]:
            for record in builder.as_data_source(split):
                name = record["name"].decode().removeprefix(f"{crawl}/")
                self.texts[name] = record["text"].decode()

    def count(self, what: str, source: str = "") -> int:
        """A count of the card, of all stages; of a source or of all."""
        total = 0
        for stage in self.card["stages"]:
            by = stage["counts"].get(what, {})
            total += by.get(source, 0) if source else sum(by.values())
        return total

    def items(self) -> Counter:
        """How often the card has each item of an eval."""
        found: Counter = Counter()
        for stage in self.card["stages"]:
            found.update(stage["counts"].get("contaminated.items", {}))
        return found


def _rows(group: str, results: Sequence[tuple[str, bool]]) -> list[Row]:
    """A row for each kind, in order of the kinds."""
    planted = Counter(kind for kind, _ in results)
    right = Counter(kind for kind, is_right in results if is_right)
    return [Row(group, kind, planted[kind], right[kind]) for kind in sorted(planted)]


def check_exact(corpus: Corpus, ledger: dict) -> list[Row]:
    """Later copies go, the first one stays."""
    results = []
    for entry in ledger["exact"]:
        first, *later = entry["names"]
        results.append(("the first one stays", first in corpus.texts))
        for name in later:
            results.append((f"copies go: {entry['change']}", name not in corpus.texts))
    return _rows("exact duplicates", results)


def check_near(corpus: Corpus, ledger: dict) -> list[Row]:
    """The second one of a pair goes if it is as similar as the threshold; all others stay."""
    threshold = corpus.card["config"]["near_duplicates"]["threshold"]
    results = []
    for entry in ledger["near"]:
        first, second = entry["names"]
        goes = entry["jaccard"] >= threshold
        kind = f"{entry['kind']}: the second one {'goes' if goes else 'stays'}"
        results.append((kind, (second not in corpus.texts) == goes))
        results.append(("the first one of a pair stays", first in corpus.texts))
    for entry in ledger["groups"]:
        stay = set(entry["stay"])
        for name in entry["names"]:
            kind = f"{entry['kind']}: {'stays' if name in stay else 'goes'}"
            results.append((kind, (name in corpus.texts) == (name in stay)))
    for entry in ledger["plain"]:
        results.append(("unrelated texts stay", entry["name"] in corpus.texts))
    return _rows("near duplicates", results)


def check_evals(corpus: Corpus, ledger: dict) -> list[Row]:
    """Documents with an item go, and the card has the item."""
    found = corpus.items()
    listed = [entry for entry in corpus.card["listed"] if entry["kind"] == "contaminated"]
    whys = [entry["why"].partition(": ")[0] for entry in listed]
    results = []
    for entry in ledger["evals"]:
        task = re.split(r"[\[.]", entry["item"].removeprefix("tasks/"))[0]
        results.append((f"{task}: {entry['form']}", entry["name"] not in corpus.texts))
        in_card = any(item.endswith(entry["item"]) for item in found)
        results.append(("the item is counted in the card", in_card))
        is_listed = any(why.endswith(entry["item"]) for why in whys)
        results.append(("the item is listed in the card", is_listed))
    for entry in ledger["too_short"]:
        results.append(("under 8 words: stays", entry["name"] in corpus.texts))
    for entry in ledger["wording"]:
        results.append(("a task's wording: stays", entry["name"] in corpus.texts))
    return _rows("evals", results)


def check_pii(corpus: Corpus, ledger: dict) -> list[Row]:
    """Sentences are as they should be: data is masked, look-alikes stay."""
    masked = []
    stay = []
    for entry in ledger["pii"]:
        results = stay if entry["shown"] == entry["wanted"] else masked
        results.append((entry["kind"], entry["wanted"] in corpus.texts[entry["name"]]))
    return _rows("personal data is masked", masked) + _rows("look-alikes stay", stay)


def check_encodings(corpus: Corpus, ledger: dict) -> list[Row]:
    """Texts are right whatever their encoding was, and others than UTF-8 are counted."""
    results = []
    for entry in ledger["encodings"]:
        is_right = corpus.texts.get(entry["name"]) == entry["text"]
        results.append((f"files in {entry['encoding']}", is_right))
    rows = _rows("encodings", results)
    others = [entry for entry in ledger["encodings"] if not entry["encoding"].startswith("utf-8")]
    counted = 0
    for what, by in corpus.card["stages"][0]["counts"].items():
        if what.startswith("encoding."):
            counted += by.get("files", 0)
    rows.append(Row("encodings", "other than UTF-8, counted", len(others), counted))

    mended = []
    for entry in ledger["mojibake"]:
        mended.append((entry["kind"], corpus.texts.get(entry["name"]) == entry["text"]))
    return rows + _rows("mojibake is mended", mended)


def check_pages(corpus: Corpus, ledger: dict) -> list[Row]:
    """Pages have all of their paragraphs, and lines that they share are there once."""
    results = []
    left: Counter = Counter()
    for entry in ledger["pages"]:
        text = corpus.texts.get(entry["name"], "")
        is_whole = all(paragraph in text for paragraph in entry["paragraphs"])
        results.append((f"pages in {entry['charset']} are whole", is_whole))
        left.update(line for line in BOILERPLATE if line in text)
    rows = _rows("pages", results)
    pages = len(ledger["pages"])
    planted = len(BOILERPLATE) * (pages - 1)
    gone = len(BOILERPLATE) * pages - left.total()
    rows.append(Row("pages", "repeated lines go", planted, gone))
    counted = corpus.count("lines.repeated", "pages")
    rows.append(Row("pages", "repeated lines, counted", planted, counted))
    return rows


CHECKS = (check_exact, check_near, check_evals, check_pii, check_encodings, check_pages)


def check(folder: Path, ledger_path: Path) -> list[Row]:
    """Returns what a set has, or no longer has, of what was planted."""
    ledger = json.loads(ledger_path.read_text())
    corpus = Corpus(folder, ledger_path.parent)
    rows = []
    for check_kind in CHECKS:
        rows += check_kind(corpus, ledger)
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    print("| | | planted | right | share |\n|---|---|---|---|---|")
    for row in rows:
        mark = "" if row.right == row.planted else " **"
        share = row.right / row.planted
        print(f"| {row.group} | {row.kind} | {row.planted:,} | {row.right:,} | {share:.4f}{mark} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="writes a crawl into a new folder")
    making.add_argument("folder", type=Path)
    making.add_argument("--mb", type=float, default=50)
    making.add_argument("--seed", type=int, default=0)
    preparing = commands.add_parser("prepare", help="prepares it, and prints times and memory")
    preparing.add_argument("folder", type=Path)
    preparing.add_argument("out", type=Path)
    preparing.add_argument("--workers", type=int, default=2)
    checking = commands.add_parser("check", help="prints what was found, as a table")
    checking.add_argument("card_dir", type=Path)
    checking.add_argument("ledger", type=Path)
    arguments = parser.parse_args()

    if arguments.command == "make":
        ledger = make(arguments.folder, arguments.mb, arguments.seed)
        print({kind: len(planted) for kind, planted in ledger.items()})
    elif arguments.command == "prepare":
        config = get_config(str(arguments.folder))
        config.workers = arguments.workers
        start = time.time()
        print(prepare(config, epath.Path(arguments.out)))
        print(f"{time.time() - start:.1f} seconds\n")
        print_times(arguments.out, start)
    else:
        print_rows(check(arguments.card_dir, arguments.ledger))


if __name__ == "__main__":
    main()
