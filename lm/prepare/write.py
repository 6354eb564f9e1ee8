"""Stages that write the set: documents -> records of a TFDS data set, in ArrayRecord.

TFDS's own writer leaves the order of a record's features to chance. This one serialises them in
order, so that equal sets are equal to the byte.
"""

import contextlib
import functools
import inspect
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import zstandard
from etils import epath
from ml_collections import ConfigDict

from lm import files
from lm.data import sources
from lm.prepare import tokens
from lm.prepare.engine import Made, Stage
from lm.prepare.shards import Document, Work, read

FIELDS = ("text", "name", "label", "source", "language", "licence")


def stages(config: ConfigDict) -> list[Stage]:
    """The stages."""
    settings = dict(
        bad_input=config.bad_input,
        splits=config.splits.to_dict(),
        store=config.tokenizer.tokens == "stored",
        shard_bytes=config.shard_mb * 2**20,
        dataset=config.name,
    )
    group = functools.partial(_plan_write, settings["shard_bytes"])
    packages = ("tensorflow-datasets", "array_record", "sentencepiece")
    return [
        Stage("encode", encode, _plan_encode, settings, packages, inspect.getsource(tokens)),
        Stage("write", write, group, settings, packages),
    ]


def _plan_encode(made: Made) -> list[dict]:
    tokenizer_files: list[str] = []
    with contextlib.suppress(KeyError):
        tokenizer_files = [output["path"] for output in made.outputs("tokenizer", "tokenizer")]
    return [{"shard": path, "tokenizer": tokenizer_files} for path in made.shards()]


# --- records ---


def encode(work: Work) -> None:
    """Serialises the documents of a shard, each split into a file of its own."""
    tokenizer = tokens.load(work.inputs["tokenizer"]) if work.inputs["tokenizer"] else None
    with contextlib.ExitStack() as stack:
        writers: dict[str, _RecordWriter] = {}
        for document in read(work.inputs["shard"]):
            # One by one: the processes use the cores, and a tokenizer's threads would wait for
            # each other.
            ids = tokenizer.encode(document.text) if tokenizer else None
            split = tokens.split_of(document, work.settings["splits"])
            if split not in writers:
                about = {"split": split}
                file = stack.enter_context(work.open("records", ".bin.zst", about))
                writers[split] = stack.enter_context(_RecordWriter(file, about))
            _tell(work, split, document, ids, tokenizer)
            stored = ids if work.settings["store"] else None
            vocab_size = tokenizer.vocab_size if tokenizer else 0
            writers[split].write(serialized(document, stored, vocab_size))


def _tell(work: Work, split: str, document: Document, ids: list[int] | None, tokenizer) -> None:
    """Counts what the card says of the set."""
    sizes = {"documents": 1, "bytes": len(document.text.encode()), "words": 0}
    sizes["words"] = len(document.text.split())
    if ids is not None:
        sizes["tokens"] = len(ids)
        work.measure(f"{split}.tokens", len(ids))
        own = {*tokenizer.around[0], *tokenizer.around[1]}
        work.count("special_in_text", document.source, sum(id_ in own for id_ in set(ids)))

    work.measure(f"{split}.bytes", sizes["bytes"])
    for what, size in sizes.items():
        work.count(f"{split}.{what}", document.source, size)
        work.count(f"language.{what}", document.language, size)


def serialized(document: Document, ids: Sequence[int] | None, vocab_size: int) -> bytes:
    """Returns a document as a record of the set, its features in order."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    features = example.features.feature
    for field in FIELDS:
        features[field].bytes_list.value.append(getattr(document, field).encode())
    if ids is not None:
        content = np.asarray(ids, sources.token_dtype(vocab_size)).tobytes()
        features["tokens"].bytes_list.value.append(content)

    return example.SerializeToString(deterministic=True)


class _RecordWriter:
    """Writes records to a packed file, and says in `about` how many there are."""

    def __init__(self, file, about: dict):
        compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self._stream = compressor.stream_writer(file, closefd=False)
        self._about = about
        about.update(records=0, bytes=0)

    def __enter__(self):
        return self

    def write(self, record: bytes) -> None:
        self._stream.write(struct.pack("<I", len(record)) + record)
        self._about["records"] += 1
        self._about["bytes"] += len(record)

    def __exit__(self, *error) -> None:
        self._stream.close()


def _records(path: str) -> Iterator[bytes]:
    with epath.Path(path).open("rb") as file:
        stream = files.open_zstd(file, path)
        try:
            while head := stream.read(4):
                (length,) = struct.unpack("<I", head)
                yield stream.read(length)
        except (OSError, struct.error) as error:
            raise ValueError(
                f"{path} is damaged: {error}. Delete it; the next start makes it anew"
            ) from None


# --- shards of the set ---


def _plan_write(shard_bytes: int, made: Made) -> list[dict]:
    """A task for each shard of each split: neighbours until it is large enough."""
    by_split: dict[str, list[list[dict]]] = {}
    for output in made.outputs("encode", "records"):
        groups = by_split.setdefault(output["about"]["split"], [])
        full = groups and sum(o["about"]["bytes"] for o in groups[-1]) >= shard_bytes
        if not groups or full:
            groups.append([])
        groups[-1].append(output)

    tasks = []
    for split in sorted(by_split):
        for number, group in enumerate(by_split[split]):
            paths = [output["path"] for output in group]
            count = len(by_split[split])
            tasks.append({"records": paths, "split": split, "shard": number, "of": count})

    return tasks


def write(work: Work) -> None:
    """Writes a shard of the set, as TFDS names it."""
    from array_record.python import array_record_module

    split, shard, count = (work.inputs[key] for key in ("split", "shard", "of"))
    name = f"{work.settings['dataset']}-{split}.array_record-{shard:05d}-of-{count:05d}"
    about = dict(split=split, records=0, bytes=0)
    work.folder.mkdir(parents=True, exist_ok=True)
    folder = None if "://" in str(work.folder) else work.folder
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        local = os.path.join(scratch, name)
        # One record a group: any of them is read without its neighbours.
        writer = array_record_module.ArrayRecordWriter(local, "group_size:1")
        try:
            for path in work.inputs["records"]:
                for record in _records(path):
                    writer.write(record)
                    about["records"] += 1
                    about["bytes"] += len(record)
            writer.close()
        except RuntimeError as error:  # a full disk, for instance
            raise OSError(f"{work.folder / name} can't be written: {error}") from None
        with files.open_whole(work.folder / name) as whole, open(local, "rb") as written:
            shutil.copyfileobj(written, whole, 1 << 20)
        about["hash"] = files.hash_of_file(local)

    work.adopt("set", work.folder / name, about)


def publish(made: Made, config: ConfigDict, folder: epath.Path) -> None:
    """Puts the shards, their metadata and the tokenizer into a folder, which TFDS can open."""
    outputs = made.outputs("write", "set")
    for output in outputs:
        _link(epath.Path(output["path"]), folder / epath.Path(output["path"]).name)
    with contextlib.suppress(KeyError):
        for output in made.outputs("tokenizer", "tokenizer"):
            _link(epath.Path(output["path"]), folder / "tokenizer" / output["about"])

    _write_metadata(outputs, config, folder)


def _link(source: epath.Path, target: epath.Path) -> None:
    """Gives a file another name, or copies it where there are no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        source.copy(target, overwrite=True)


def _write_metadata(outputs: list[dict], config: ConfigDict, folder: epath.Path) -> None:
    import tensorflow_datasets as tfds

    features = {field: tfds.features.Text() for field in FIELDS}
    if "tokenizer" in config.stages and config.tokenizer.tokens == "stored":
        features["tokens"] = tfds.features.Tensor(shape=(), dtype=np.object_)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=config.name,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    by_split: dict[str, list[dict]] = {}
    for output in outputs:
        by_split.setdefault(output["about"]["split"], []).append(output["about"])
    infos = []
    for split, shards in by_split.items():
        lengths = [shard["records"] for shard in shards]
        size = sum(shard["bytes"] for shard in shards)
        infos.append(tfds.core.SplitInfo(split, lengths, size, template))

    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict(features),
        split_infos=infos,
        version=config.version,
        filename_template=template,
        description=config.description or config.name,
        check_data=False,
    )
