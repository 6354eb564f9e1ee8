"""Speed of preparing a corpus of real texts: MB/s on one core by stage, and beside other libraries.

    pip install -c constraints.txt -e '.[prepare]' datasketch
    python benchmarks/corpora.py --datatrove_python=/tmp/datatrove/bin/python

  stages      each stage by itself, on a shard; of cleaning each part by itself
  tokenizing  that of the stage encode beside SentencePiece's own batch encoding, on 1 and 2 cores
  near        near duplicates beside datasketch's MinHash and MinHashLSH, of the same shingles
  rules       published rules beside datatrove's filters, speeds and verdicts. Each text about which
              they differ is judged again with datatrove's words and sentences in the place of
              ours. benchmarks/datatrove_rules.py says what environment this needs

The texts are the docstrings and pages (/usr/share/doc) of this machine, and those of --path: files
of text, or JSONL with a key "text". What is compared takes turns: speeds are medians over the turns
and ratios are taken within a turn.
"""

import argparse
import collections
import concurrent.futures
import functools
import glob
import hashlib
import html
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import sentencepiece
from ml_collections import ConfigDict

from lm import files
from lm.data import pydocs, tokenizer
from lm.prepare import (
    clean,
    collect,
    contamination,
    duplicates,
    engine,
    rules,
    shards,
    spacy_words,
    tokens,
    write,
)
from lm.prepare import config as prepare_config

DOC = "/usr/share/doc"
MAX_CHARS = 100_000  # of a text; changelogs are longer
VOCAB_SIZE = 8192
BATCH = 256  # texts that the library's own encoding is given at once
RULES = ("gopher_quality", "gopher_repetition", "fineweb", "c4")


# --- texts ---


def read_texts(paths: list[str], megabytes: float) -> list[str]:
    """Returns texts of this machine and of files, mixed, so many megabytes of them."""
    texts = [document.text for _, document in pydocs.collect()]
    for path in itertools.chain([f"{DOC}/**/*"], paths):
        for name in sorted(glob.glob(path, recursive=True)):
            if Path(name).is_file() and not name.endswith((".html", ".htm")):
                texts += read_file(name)
    texts = sorted({text[:MAX_CHARS] for text in texts if text.strip()}, key=digest)
    return first(texts, megabytes)


def first(texts: list[str], megabytes: float) -> list[str]:
    """Returns the first texts, so many megabytes of them."""
    sizes = itertools.accumulate(len(text.encode()) for text in texts)
    return [text for text, size in zip(texts, sizes) if size <= megabytes * 1e6]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def read_file(name: str) -> list[str]:
    """The texts of a file; none if it is no text."""
    try:
        text = files.read_text(name)
    except (OSError, ValueError):
        return []
    if name.endswith(".jsonl"):
        return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    return [] if "\0" in text else [text]


def read_pages(texts: list[str]) -> list[str]:
    """Pages of this machine, and pages made of texts."""
    pages = []
    for name in sorted(glob.glob(f"{DOC}/**/*.html", recursive=True)):
        pages += read_file(name)
    for text in texts[:500]:
        paragraphs = [f"<p>{html.escape(part)}</p>" for part in text.split("\n\n")]
        menu = "".join(f"<li><a href='/{i}'>Entry {i}</a></li>" for i in range(20))
        body = f"<nav><ul>{menu}</ul></nav><main>{''.join(paragraphs)}</main><footer>by me</footer>"
        pages.append(f"<html><head><title>t</title></head><body>{body}</body></html>")
    return pages


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


# --- turns ---


def timed(function: Callable[[], object]) -> float:
    """Seconds that a function takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def in_turns(functions: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each function in each turn, but for a first one; who begins takes turns too."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-1, turns):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            taken = timed(functions[name])
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: list[float], others: list[float]) -> str:
    """How many times as fast as another something is: the median, the least and the most."""
    ratios = sorted(other / own for own, other in zip(seconds, others))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def speed(size: float, seconds: list[float]) -> str:
    return f"{size / statistics.median(seconds):8.2f} MB/s"


# --- stages ---


def run_stages(stages: list[engine.Stage], folder: Path, made: engine.Made) -> dict[str, float]:
    """Runs stages in this process; what they made is added to `made`.

    Returns:
      The seconds of each.
    """
    seconds = {}
    for stage in stages:
        reports = []
        began = time.perf_counter()
        for number, inputs in enumerate(stage.plan(made)):
            task = engine.Task(stage, str(folder / stage.name), number, inputs)
            reports.append(engine.run_task(task))
        seconds[stage.name] = time.perf_counter() - began
        made.add(stage.name, reports)
    return seconds


def make_config(path: str, format: str = "jsonl") -> ConfigDict:
    c = prepare_config.default()
    c.sources.texts = prepare_config.source(format, path)
    c.shard_mb = 2**10
    c.splits.validation = 0.0
    c.tokenizer.vocab_size = VOCAB_SIZE
    c.tokenizer.sample_mb = 4.0
    return c


def parts_of_clean(config: ConfigDict) -> dict[str, ConfigDict]:
    """Configurations of cleaning: with nothing on, with each part by itself, and with all parts."""
    off = dict(unicode="none", mojibake=False, controls=False, identify=False)
    parts = {}
    for name in ("nothing", "unicode", "language", *RULES, "code", "pii", "all of them"):
        c = config.copy_and_resolve_references()
        if name != "all of them":
            c.clean.update(off)
            c.pii.update(dict(email="", ip="", phone=""))
        if name == "unicode":
            c.clean.update(dict(unicode="NFC", mojibake=True, controls=True))
        if name == "language":
            c.clean.identify = True
        if name == "pii":
            c.pii = ConfigDict(config.pii)
        for rule in (*RULES, "code"):
            # Prose breaks those of code.
            c[rule].on = name == rule or (name == "all of them" and rule in RULES)
        parts[name] = c
    return parts


def measure_stages(texts: list[str], pages: list[str], turns: int) -> None:
    """Prints MB/s of each stage."""
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as name:
            for stage, taken in one_turn(texts, pages, Path(name)).items():
                seconds[stage].append(taken)
    sizes = collections.defaultdict(lambda: megabytes(texts), html=megabytes(pages))
    print(f"\nstages: {len(texts):,} texts of {megabytes(texts):.1f} MB, on one core")
    nothing = statistics.median(seconds["clean: nothing"])
    near = [taken for stage, taken in seconds.items() if stage.startswith("near_")]
    seconds["near duplicates, all stages"] = list(map(sum, zip(*near)))
    for stage, taken in seconds.items():
        line = f"  {stage:32} {speed(sizes[stage], taken)}"
        own = statistics.median(taken) - nothing
        if stage.startswith("clean: ") and own > 0:
            line += f"   the part by itself {sizes[stage] / own:8.1f} MB/s"
        print(line)


def one_turn(texts: list[str], pages: list[str], folder: Path) -> dict[str, float]:
    """Seconds of each stage."""
    config = make_config(write_jsonl(folder / "texts.jsonl", texts))
    asked = [text[len(text) // 2 :][:300] for text in texts[::50]]
    config.decontaminate.texts = (write_jsonl(folder / "asked.jsonl", asked),)
    config.decontaminate.action = "list"
    for number, page in enumerate(pages):
        path = folder / "pages" / f"{number:05d}.html"
        path.parent.mkdir(exist_ok=True)
        path.write_text(page)

    html_config = make_config(str(folder / "pages"), "html")
    taken = run_stages(collect.stages(html_config), folder / "html", engine.Made())
    seconds = {"html": taken["collect"]}
    made = engine.Made()
    seconds |= run_stages(collect.stages(config), folder, made)
    documents = made.documents
    for part, part_config in parts_of_clean(config).items():
        forget_words()
        taken = run_stages(clean.stages(part_config), folder / part, made)
        seconds[f"clean: {part}"] = taken["clean"]
        # Each of them reads what was collected.
        made.documents = documents
    for stages in (duplicates.exact_stages, duplicates.line_stages, duplicates.near_stages):
        seconds |= run_stages(stages(config), folder, made)
        made.documents = documents
    for stages in (contamination.stages, tokens.stages, write.stages):
        seconds |= run_stages(stages(config), folder, made)
    return seconds


# --- tokenizing ---


def trained(texts: list[str]) -> bytes:
    """The model of a tokenizer of these texts."""
    return tokenizer.sentencepiece_model(texts, VOCAB_SIZE, split_digits=True)


@functools.cache
def _encoder(path: str) -> tuple[tokenizer.Tokenizer, list[list[shards.Document]]]:
    """A tokenizer, and texts in batches of the stage."""
    model = tokenizer.SentencePieceTokenizer(
        Path(path, "model").read_bytes(), "the trained tokenizer"
    )
    documents = []
    for line in Path(path, "texts.jsonl").read_text().splitlines():
        documents.append(shards.Document("", json.loads(line)["text"], "texts"))
    batches = [documents[i : i + BATCH] for i in range(0, len(documents), BATCH)]
    return model, batches


def encode_part(path: str, part: int, parts: int) -> tuple[float, float]:
    """Tokenizes every so many-th batch as a process of encode does; returns its begin and end."""
    model, batches = _encoder(path)
    began = time.monotonic()
    for batch in batches[part::parts]:
        for document in batch:
            model.encode(document.text)
    return began, time.monotonic()


def _by_processes(pool, path: str, count: int) -> float:
    """Seconds from the first beginning to the last end."""
    times = list(pool.map(encode_part, [path] * count, range(count), [count] * count))
    return max(end for _, end in times) - min(begin for begin, _ in times)


def measure_tokenizing(texts: list[str], turns: int) -> None:
    """Prints MB/s of tokenizing."""
    size = megabytes(texts)
    print(f"\ntokenizing: {size:.1f} MB, SentencePiece's BPE of {VOCAB_SIZE:,} pieces")
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as path:
        Path(path, "model").write_bytes(trained(texts[: len(texts) // 4]))
        write_jsonl(Path(path, "texts.jsonl"), texts)
        processor = sentencepiece.SentencePieceProcessor(
            model_proto=Path(path, "model").read_bytes()
        )
        for count in (1, 2):
            if len(cores) < count:
                continue
            os.sched_setaffinity(0, cores[:count])
            own = functools.partial(processor.encode, texts, num_threads=count)
            seconds: dict[str, list[float]] = dict(ours=[], theirs=[])
            with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
                for turn in range(-1, turns):
                    taken = dict(ours=_by_processes(pool, path, count), theirs=timed(own))
                    # In the first one the processes start.
                    for contender in seconds if turn >= 0 else ():
                        seconds[contender].append(taken[contender])
            print(f"  {count} cores: ours {speed(size, seconds['ours'])}")
            print(f"  the library's own {speed(size, seconds['theirs'])}")
            print(f"  {ratio(seconds['ours'], seconds['theirs'])} times as fast as it")
    os.sched_setaffinity(0, cores)


# --- near duplicates ---


def measure_near(texts: list[str], turns: int) -> None:
    """Prints how long near duplicates take, and how many there are."""
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(write_jsonl(folder / "texts.jsonl", texts))
        collected = engine.Made()
        run_stages(collect.stages(config), folder, collected)
        numbers = itertools.count()

        def ours() -> None:
            made = engine.Made().add("collect", collected.reports("collect"))
            stages = duplicates.near_stages(config)[:-1]  # but for the copying
            run_stages(stages, folder / str(next(numbers)), made)
            ranges = itertools.chain(*made.buckets("near_resolve", "drops"))
            found["ours"] = len(shards.read_records(ranges, duplicates.DROP))

        def theirs() -> None:
            found["theirs"] = datasketch_duplicates(texts, config.near_duplicates)

        seconds = in_turns(dict(ours=ours, theirs=theirs), turns)
    size = megabytes(texts)
    print(f"\nnear duplicates: {len(texts):,} texts of {size:.1f} MB, words to decisions")
    print(f"  ours       {speed(size, seconds['ours'])}, {found['ours']:,} go, all verified")
    print(f"  datasketch {speed(size, seconds['theirs'])}, {found['theirs']:,} have a candidate")
    print(f"  {ratio(seconds['ours'], seconds['theirs'])} times as fast")


def datasketch_duplicates(texts: list[str], settings: ConfigDict) -> int:
    """Texts that share a band with one before, by datasketch in its fastest way."""
    from datasketch import MinHash, MinHashLSH

    n, bands, rows = settings.shingle, settings.bands, settings.rows
    lsh = MinHashLSH(num_perm=bands * rows, params=(bands, rows))
    count = 0
    for number, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        places = range(max(len(words) - n + 1, 1))
        shingles = {" ".join(words[place : place + n]).encode() for place in places}
        sketch = MinHash(num_perm=bands * rows)
        sketch.update_batch(shingles)
        count += bool(lsh.query(sketch))
        lsh.insert(number, sketch)
    return count


# --- rules ---


def judged(name: str, text: rules.Text) -> str:
    """What of a group's rules a text breaks."""
    settings = SETTINGS[name]
    return rules.c4(text.text, settings)[1] if name == "c4" else rules.RULES[name](text, settings)


SETTINGS = {name: prepare_config.default()[name].to_dict() for name in RULES}


def judge_all(names: tuple[str, ...], texts: list[str]) -> list[list[str]]:
    forget_words()
    verdicts = []
    for text in map(rules.Text, texts):
        verdicts.append([judged(name, text) for name in names])
    return verdicts


def forget_words() -> None:
    """Makes rules know no words of the texts before."""
    rules.Text._vocabulary = rules._Vocabulary()


def measure_rules(texts: list[str], python: str, turns: int) -> None:
    """Prints speeds and verdicts."""
    size = megabytes(texts)
    seconds: dict[str, dict[str, list[float]]] = collections.defaultdict(
        lambda: dict(ours=[], theirs=[])
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_jsonl(folder / "texts.jsonl", texts)
        for _ in range(turns):
            theirs = by_datatrove(python, path, folder / "out.json")
            for rule, taken in theirs["seconds"].items():
                names = RULES if rule == "all" else (rule,)
                seconds[rule]["ours"].append(timed(functools.partial(judge_all, names, texts)))
                seconds[rule]["theirs"].append(taken)
    print(f"\nrules: {len(texts):,} texts of {size:.1f} MB, on one core")
    for rule, taken in seconds.items():
        line = f"  {rule:18} ours {speed(size, taken['ours'])}"
        line += f", datatrove {speed(size, taken['theirs'])}"
        print(f"{line}: {ratio(taken['ours'], taken['theirs'])} times as fast")
    compare(texts, theirs["verdicts"], python)


def by_datatrove(python: str, path: str, out: Path, *flags: str):
    script = Path(__file__).with_name("datatrove_rules.py")
    command = [python, str(script), f"--texts={path}", f"--out={out}", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment)
    return json.loads(out.read_text())


def compare(texts: list[str], theirs: dict[str, list[str]], python: str) -> None:
    """Prints on how many texts the verdicts agree, and why they differ on the others."""
    ours = dict(zip(RULES, map(list, zip(*judge_all(RULES, texts)))))
    differing: list[tuple[str, int]] = []
    for rule in RULES:
        pairs = list(zip(ours[rule], theirs[rule]))
        differ = [place for place, (own, other) in enumerate(pairs) if bool(own) != bool(other)]
        differing += [(rule, place) for place in differ]
        dropped = sum(map(bool, ours[rule]))
        agreeing = len(texts) - len(differ)
        print(f"  {rule:18} {agreeing:,} of {len(texts):,} verdicts are the same ({dropped:,} go)")
    if not differing:
        return

    with tempfile.TemporaryDirectory() as name:
        path = write_jsonl(Path(name, "texts.jsonl"), [texts[place] for _, place in differing])
        words = by_datatrove(python, path, Path(name, "words.json"), "--words")
    for (rule, place), told in zip(differing, words):
        text = texts[place]
        cause = "not explained"
        if bool(judged_with(rule, text, told)) == bool(theirs[rule][place]):
            cause = f"explained by {'sentences' if rule == 'c4' else 'words'}"
        words = map(spacy_words.split, text.split())
        own = collections.Counter(itertools.chain.from_iterable(words))
        other = collections.Counter(told["words"])
        print(f"    {rule}: {ours[rule][place]!r}, theirs {theirs[rule][place]!r}, {cause}")
        print(f"      {text[:80]!r}, {own.total():,} and {other.total():,} words")
        print(f"      ours alone {dict((own - other).most_common(4))}")
        print(f"      theirs alone {dict((other - own).most_common(4))}")


def judged_with(rule: str, text: str, told: dict) -> str:
    """Our verdict with datatrove's words and sentences in the place of ours."""
    with_theirs = rules.Text(text)
    records = map(with_theirs._vocabulary.record, told["words"])
    with_theirs.tokens = rules.np.frombuffer(b"".join(records), rules.TOKEN)
    with mock.patch.object(rules, "sentences", lambda line: told["sentences"].get(line, 1)):
        return judged(rule, with_theirs)


PARTS = ("stages", "tokenizing", "near", "rules")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", action="append", default=[], help="file or pattern; repeated")
    parser.add_argument("--megabytes", type=float, default=16.0, help="of texts")
    parser.add_argument("--rules_megabytes", type=float, default=4.0, help="of texts, for rules")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--part", action="append", choices=PARTS, default=[], help="repeated")
    parser.add_argument("--datatrove_python", default="", help="Python of its environment")
    args = parser.parse_args()
    wanted = args.part or PARTS

    texts = read_texts(args.path, args.megabytes)
    print(
        f"{os.cpu_count()} cores, {len(texts):,} texts, sentencepiece {sentencepiece.__version__}"
    )
    if "stages" in wanted:
        measure_stages(texts, read_pages(texts), args.turns)
    if "tokenizing" in wanted:
        measure_tokenizing(texts, args.turns)
    if "near" in wanted:
        measure_near(texts, args.turns)
    if "rules" in wanted and args.datatrove_python:
        few = first(texts, args.rules_megabytes)
        measure_rules(few, args.datatrove_python, args.turns)


if __name__ == "__main__":
    main()
