"""How fast batches come from a prepared corpus and from streamed files, and how that depends on
shards, on the position, and on the size.

    python benchmarks/loader.py --out=FOLDER

Makes texts of this machine's docstrings, a corpus of one shard and one of many, and JSONL of
--gigabytes. Training's own rate is that of the smallest preset (micro) on this machine's devices,
measured between the others.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from etils import epath

from lm import build
from lm import config as config_lib
from lm.data import batch as batch_contract
from lm.data import loader as loaders
from lm.data import pack, pydocs, sources, streaming, tokenizer
from lm.models import presets
from lm.prepare import config as prepare_config
from lm.prepare.pipeline import prepare

_OUT = flags.DEFINE_string("out", None, "Folder for the corpora.", required=True)
_MEGABYTES = flags.DEFINE_integer("megabytes", 60, "Of the corpora's text.")
_GIGABYTES = flags.DEFINE_float("gigabytes", 2.0, "Of the streamed JSONL.")
_PART = flags.DEFINE_string("part", "", "Measures the memory of one part, in this process.")

PACKING = pack.Packing("first_fit", 256, 128)
STREAMS = 8


def write_texts(path: Path, size: float) -> None:
    """Writes docstrings, each with a line of its own in front, until they have `size` bytes."""
    texts = [document.text for document in pydocs.pydocs("train", data_dir="~/.cache/lm")]
    written = number = 0
    with path.open("w") as file:
        while written < size:
            line = json.dumps({"text": f"Number {number}.\n{texts[number % len(texts)]}"}) + "\n"
            file.write(line)
            written += len(line)
            number += 1


def corpus(out: Path, texts: Path, name: str, shard_mb: int) -> epath.Path:
    """The folder of a corpus with stored tokens."""
    c = prepare_config.default()
    c.name, c.shard_mb = name, shard_mb
    c.stages = ("collect", "tokenizer", "write")
    c.sources.texts = prepare_config.source("jsonl", str(texts))
    c.tokenizer.update(dict(vocab_size=2048, sample_mb=5.0))
    c.splits.validation = 0.0
    return prepare(c, epath.Path(out))


def stream(documents, encoder, number: int = 0, state: dict | None = None):
    rows = pack.stream(documents, encoder, PACKING, number=number, num_streams=STREAMS, seed=0)
    if state:
        rows.set_state(state)
    return rows


def tokens_per_second(documents, encoder, seconds: float = 6.0) -> float:
    """Tokens that all streams of one process give in a second."""
    streams = [stream(documents, encoder, number) for number in range(STREAMS)]
    for rows in streams:
        next(rows)
    tokens, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for rows in streams:
            tokens += int((next(rows)["segments"] > 0).sum())
    rate = tokens / (time.perf_counter() - began)
    for rows in streams:
        rows.close()
    return rate


def training_tokens_per_second(steps: int = 20) -> float:
    """Tokens that training of the smallest preset takes in a second, its data apart."""
    c = config_lib.default()
    c.model.update(presets.get("micro") | dict(vocab_size=2048))
    c.tokenizer.kind = "bytes"
    c.data.update(dict(batch_size=16, length=256))
    c.optimizer.warmup_steps = 0
    experiment = build.build(c.lock(), jax.devices(), training=False)
    p = experiment.program
    row = batch_contract.empty_row(256)
    row = row | dict(segments=row["segments"] + 1, weights=row["weights"] + 1)
    rows = {number: row for number in range(16)}
    with jax.set_mesh(p.mesh):
        state = p.init_state(p.make_params(jax.random.key(0)))
        batch = loaders.to_global(rows, 16, p.batch_shardings())
        fixed = p.abstract_fixed  # empty
        for step in range(steps + 2):
            if step == 2:
                began = time.perf_counter()
            state, metrics = p.train_step(state, batch, fixed)
            jax.block_until_ready(metrics)
    return steps * 16 * 256 / (time.perf_counter() - began)


def seconds_at(documents, encoder, share: float) -> float:
    """Seconds from a saved state after a share of an epoch to the next row."""
    rows = stream(documents, encoder)
    wanted = share * len(documents) / STREAMS
    while rows.epochs_begun() * len(documents) / STREAMS < wanted:
        next(rows)
    state = json.loads(json.dumps(rows.get_state()))
    rows.close()
    began = time.perf_counter()
    again = stream(documents, encoder, state=state)
    next(again)
    seconds = time.perf_counter() - began
    again.close()
    return seconds


def memory_of(part: str, arguments: list[str]) -> str:
    """What a process of its own says of its memory."""
    command = [sys.executable, __file__, f"--part={part}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def print_memory(documents, encoder) -> None:
    """Prints the process's peak after parts of an epoch of training rows."""
    streams = [stream(documents, encoder, number) for number in range(STREAMS)]
    peaks = {}
    for share in (0.1, 0.5, 1.0):
        while streams[0].epochs_begun() < share:
            for rows in streams:
                next(rows)
        peaks[share] = peak()
    print_peaks(peaks)


def print_memory_of_reading(documents) -> None:
    """Prints the process's peak after parts of an epoch whose texts are read, and not tokenized:
    the streams of a process read their windows side by side.
    """
    orders = [documents.items.order(number, STREAMS, 0) for number in range(STREAMS)]
    readers = [documents.items.reader() for _ in orders]
    shortest = min(map(len, orders))
    peaks = {}
    for place in range(shortest):
        for order, reader in zip(orders, readers):
            reader[order[place]]
        if place in (shortest // 10, shortest // 2, shortest - 1):
            peaks[(place + 1) / shortest] = peak()
    print_peaks(peaks)


def peak() -> float:
    """The largest memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_peaks(peaks: dict[float, float]) -> None:
    print(", ".join(f"{share:.0%}: {size:,.0f} MB" for share, size in peaks.items()))


def main(argv) -> None:
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    texts, large = out / "texts.jsonl", out / "large.jsonl"
    if not texts.exists():
        write_texts(texts, _MEGABYTES.value * 1e6)
    if not large.exists():
        write_texts(large, _GIGABYTES.value * 1e9)
    folders = {"1 shard": corpus(out, texts, "one", 1024), "many": corpus(out, texts, "many", 1)}
    encoder = pack.Encoder(tokenizer.load(folders["many"] / "tokenizer"), "")
    if _PART.value == "corpus":
        return print_memory(sources.corpus("train", path=str(folders["many"])), encoder)
    if _PART.value == "jsonl":
        arguments = dict(path=str(large), held_out=0.0, cache_dir=str(out / "cache"))
        return print_memory_of_reading(streaming.jsonl("train", **arguments))

    documents = {name: sources.corpus("train", path=str(f)) for name, f in folders.items()}
    began = time.perf_counter()
    arguments = dict(path=str(large), held_out=0.0, cache_dir=str(out / "cache"))
    documents["JSONL"] = streaming.jsonl("train", **arguments)
    first = time.perf_counter() - began
    began = time.perf_counter()
    streaming.jsonl("train", **arguments)
    again = time.perf_counter() - began
    print(f"lines of {_GIGABYTES.value:g} GB: {first:.1f} s, and {again:.2f} s again")

    rates: dict[str, list[float]] = {}
    for _ in range(3):
        for name, items in documents.items():
            rates.setdefault(name, []).append(tokens_per_second(items, encoder))
        rates.setdefault("training, micro", []).append(training_tokens_per_second())
    median = {name: float(np.median(values)) for name, values in rates.items()}
    for name, rate in median.items():
        ratio = rate / median["training, micro"]
        print(f"{name}: {rate:,.0f} tokens/s, {ratio:.1f} times what training takes")

    for name, items in documents.items():
        shares = (0.0, 0.1, 0.9) if name != "JSONL" else (0.0, 0.02)
        seconds = [seconds_at(items, encoder, share) for share in shares]
        shown = ", ".join(f"{share:.0%}: {s:.3f} s" for share, s in zip(shares, seconds))
        print(f"start of a stream, {name}, after {shown}")
    for part in ("corpus", "jsonl"):
        others = [f"--out={out}", f"--megabytes={_MEGABYTES.value}"]
        print(f"peak memory, {part}, after {memory_of(part, others)}")


if __name__ == "__main__":
    app.run(main)
