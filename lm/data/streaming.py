"""Sources of files that are larger than memory, and need no preparation: JSONL (plain, gzip, zstd),
Parquet, and Hugging Face data sets.

Files are blocks of documents. Where a block lies is known beforehand: for Parquet from the files'
ends, for JSONL from one reading of all lines, whose result is kept. An epoch has the blocks in
random order, and documents in random order within windows of neighbouring blocks: a stream holds
one window in memory. Which document comes at which position is a function of the seed, so a run
goes on from any position as fast as it starts. Packed files have no random access: files are in
random order, and their blocks in their own; a run that goes on unpacks a file from its beginning.
"""

import bisect
import collections
import gzip
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm import files, progress
from lm.data import sources
from lm.data.sources import Document, Documents

BLOCK_BYTES = 1 << 20  # of JSONL
WINDOW_BYTES = 1 << 24  # that are shuffled together
MAX_LINE_BYTES = 1 << 28


class Block(NamedTuple):
    """Neighbouring documents of a file."""

    file: int  # its number
    begin: int  # offset of its first line in the unpacked file; or number of a row group
    end: int  # offset behind its last line
    first: int  # number of its first document in the file
    count: int
    skipped: int = 0  # lines or rows before the first document


class BlockOrder(Sequence):
    """The numbers of a stream's documents in the order of an epoch.

    Args:
      numbers: those of each block that the stream reads, in the order in which it does.
      window: blocks that are shuffled together.
    """

    def __init__(self, numbers: Sequence[range], window: int, seed: int):
        self._windows = [numbers[i : i + window] for i in range(0, len(numbers), window)]
        self._ends = np.cumsum([sum(map(len, blocks)) for blocks in self._windows], dtype=np.int64)
        self._seed = seed
        self._shuffled = (-1, np.empty(0, np.int64))  # a window's number, and what is in it

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise IndexError(position)
        window = int(np.searchsorted(self._ends, position, side="right"))
        if self._shuffled[0] != window:
            numbers = np.concatenate([np.asarray(block) for block in self._windows[window]])
            random = np.random.default_rng([self._seed, window])
            self._shuffled = (window, random.permutation(numbers))

        _, numbers = self._shuffled
        return int(numbers[position - (int(self._ends[window]) - len(numbers))])


class Blocks(Sequence):
    """Documents in blocks of files, read when they are asked for.

    Args:
      groups: numbers of blocks; those of a group are read in their order.
      reader: class of what reads blocks, see `_Reader`.
      window: blocks that are shuffled together.
      keys: of text and label in a record.
    """

    def __init__(
        self,
        paths: Sequence[str],
        blocks: Sequence[Block],
        groups: Sequence[Sequence[int]],
        reader: type["_Reader"],
        window: int,
        keys: tuple[str, str],
    ):
        self.paths, self.blocks, self.window, self.keys = paths, blocks, window, keys
        self.begins = np.cumsum([0, *(block.count for block in blocks)]).tolist()
        self._groups, self._reader_class = groups, reader
        self._own = self.reader()

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, number: int) -> Document:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._own[number]

    def reader(self) -> "_Reader":
        """A reader of one's own: threads must not share one."""
        return self._reader_class(self)

    def order(self, number: int, num_streams: int, seed: int) -> BlockOrder:
        """The numbers of the documents of a stream, in the order of an epoch.

        Streams take turns with groups; with documents, where there are fewer groups.
        """
        by_groups = len(self._groups) >= num_streams
        groups = self._groups[number::num_streams] if by_groups else self._groups
        numbers = []
        for group in np.random.default_rng(seed).permutation(len(groups)):
            for block in groups[group]:
                documents = range(self.begins[block], self.begins[block + 1])
                if not by_groups:
                    documents = documents[(number - documents.start) % num_streams :: num_streams]
                if documents:
                    numbers.append(documents)

        return BlockOrder(numbers, self.window, seed)


class _Reader:
    """Reads documents by number, and keeps the blocks that it read last."""

    def __init__(self, blocks: Blocks):
        self._blocks = blocks
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __getitem__(self, number: int) -> Document:
        place = bisect.bisect_right(self._blocks.begins, number) - 1
        if place not in self._kept:
            self._load(place)
        self._kept.move_to_end(place)
        block = self._blocks.blocks[place]
        row = number - self._blocks.begins[place]
        name = f"{self._blocks.paths[block.file]}:{block.first + row}"
        record = self._record(self._kept[place], block.skipped + row, name)
        return sources.document_of(record, name, name, *self._blocks.keys)

    def _keep(self, place: int, content: Any) -> None:
        self._kept[place] = content
        # A window, and what is left of the one before.
        if len(self._kept) > 2 * self._blocks.window:
            self._kept.popitem(last=False)

    def _load(self, place: int) -> None:
        raise NotImplementedError

    def _record(self, content: Any, row: int, name: str) -> Mapping:
        raise NotImplementedError


def _documents(
    split: str,
    paths: Sequence[str],
    blocks: Blocks,
    identity: list,
) -> Documents:
    """Documents of blocks.

    Raises:
      ValueError: there are none.
    """
    if not len(blocks):
        raise ValueError(f"split {split!r} of {list(paths)[:3]} has no documents")
    sizes = [epath.Path(path).stat().length for path in paths]
    identity = [sizes, len(blocks), *identity]
    return Documents(blocks, sources.sampled_fingerprint(blocks, identity))


def _of_split(blocks: list[Block], split: str, path: str, held_out: float) -> list[Block]:
    """The part of one file's blocks that a split has: its beginning or its end.

    Raises:
      ValueError: a share out of range, or an unknown split.
    """
    sources.check_held_out(split, path, held_out)
    if "{split}" in path:
        return blocks
    total = sum(block.count for block in blocks)
    boundary = int(total * (1 - held_out))
    begin, end = (0, boundary) if split == "train" else (boundary, total)
    kept = []
    for block in blocks:
        first = max(block.first, begin)
        count = min(block.first + block.count, end) - first
        if count > 0:
            skipped = block.skipped + first - block.first
            kept.append(block._replace(first=first, count=count, skipped=skipped))

    return kept


# --- JSONL ---


def jsonl(
    split: str,
    *,
    path: str,
    held_out: float,
    text_key: str = "text",
    label_key: str = "",
    cache_dir: str = "~/.cache/lm",
) -> Documents:
    """Returns the documents of JSONL files that may be larger than memory. See
    `lm.data.sources.jsonl`, which reads smaller ones whole.

    Args:
      split: "train", or "validation", which is the end of each file: `held_out` of its documents. A
        path with "{split}" in it has files for each split instead. (A hash would have to read all
        texts; `lm.prepare` does.)
      cache_dir: where it is kept what the first reading of each file found, by the file's size and
        time.

    Raises:
      ValueError: no file; a line that is no such object, by file and line; see
        `lm.data.sources.jsonl`.
    """
    names = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst")
    paths = files.find(path.replace("{split}", split), names)
    blocks: list[Block] = []
    groups: list[list[int]] = []
    with progress.activity(f"reading the lines of {path}", len(paths), "files") as reading:
        for number, file in enumerate(reading.each(paths)):
            in_file = _jsonl_blocks(number, file, text_key, cache_dir)
            in_file = _of_split(in_file, split, path, held_out)
            places = list(range(len(blocks), len(blocks) + len(in_file)))
            groups += [places] if _is_packed(file) else [[place] for place in places]
            blocks += in_file

    groups = [group for group in groups if group]
    window = WINDOW_BYTES // BLOCK_BYTES
    items = Blocks(paths, blocks, groups, _JsonlReader, window, (text_key, label_key))
    return _documents(split, paths, items, [text_key, label_key, held_out])


def _is_packed(path: str) -> bool:
    with epath.Path(path).open("rb") as file:
        return file.read(4).startswith((files.GZIP, files.ZSTD))


def _open(path: str):
    """A stream of a file's unpacked bytes that can be moved forward."""
    file = epath.Path(path).open("rb")
    head = file.read(4)
    file.seek(0)
    if head.startswith(files.GZIP):
        return gzip.GzipFile(fileobj=file)
    if head.startswith(files.ZSTD):
        return _Forward(files.open_zstd(file, path))
    return file


class _Forward:
    """A stream that knows where it is, and can be moved forward."""

    def __init__(self, stream):
        self._stream, self._place = stream, 0

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._place += len(content)
        return content

    def seek(self, place: int) -> None:
        while self._place < place and self.read(min(place - self._place, BLOCK_BYTES)):
            pass


def _jsonl_blocks(number: int, path: str, text_key: str, cache_dir: str) -> list[Block]:
    """The blocks of a file: kept from the last time, or found by reading its lines.

    Raises:
      ValueError: a line that has no text.
    """
    stat = epath.Path(path).stat()
    identity = json.dumps([files.absolute(path), stat.length, stat.mtime, text_key, BLOCK_BYTES])
    name = f"{files.short_hash(identity.encode())}.npy"
    cache = epath.Path(files.expand(cache_dir)) / "lines" / name
    if cache.exists():
        with cache.open("rb") as file:
            table = np.load(file, allow_pickle=False)
    else:
        table = np.array(list(_scan(path, text_key)), np.int64).reshape(-1, 4)
        with files.open_whole(cache) as file:
            np.save(file, table)

    return [Block(number, *row) for row in table.tolist()]


def _scan(path: str, text_key: str) -> Iterator[tuple[int, int, int, int]]:
    """Yields (begin, end, first document, documents) of each block of lines.

    Raises:
      ValueError: see `jsonl`.
    """
    begin = end = first = count = 0
    stream = _open(path)
    for number, line in enumerate(_lines(stream, path), 1):
        end += len(line)
        if line.strip():
            record = files.parse_json(line, f"{path}:{number}")
            if not sources.is_utf8_text(record.get(text_key)):
                raise ValueError(
                    f"{path}:{number} has no text as {text_key!r}; it has {sorted(record)}. "
                    "python -m lm.prepare reads files with such lines"
                )
            count += 1
        if end - begin >= BLOCK_BYTES:
            yield begin, end, first, count
            begin, first, count = end, first + count, 0

    if count:
        yield begin, end, first, count


def _lines(stream, path: str) -> Iterator[bytes]:
    """The lines of a stream, with their ends.

    Raises:
      ValueError: a line that is too long, or a packed file that is damaged.
    """
    rest = b""
    try:
        while piece := stream.read(BLOCK_BYTES):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                yield line + b"\n"
            if len(rest) > MAX_LINE_BYTES:
                raise ValueError(f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes")
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is cut off, or damaged: {error}") from None

    if rest:
        yield rest


class _JsonlReader(_Reader):
    """Reads blocks of lines."""

    def __init__(self, blocks: Blocks):
        super().__init__(blocks)
        self._file, self._stream, self._packed, self._next = -1, None, False, 0

    def _load(self, place: int) -> None:
        block = self._blocks.blocks[place]
        # A packed stream only goes forward.
        if block.file != self._file or (self._packed and block.begin < self._stream.tell()):
            path = self._blocks.paths[block.file]
            self._packed, self._stream = _is_packed(path), _open(path)
            self._file = block.file
            self._next = place

        # What comes before it in a packed file is of the same window.
        for earlier in range(self._next, place) if self._packed else ():
            self._keep(earlier, self._read(self._blocks.blocks[earlier]))
        self._keep(place, self._read(block))
        self._next = place + 1

    def _read(self, block: Block) -> list[bytes]:
        self._stream.seek(block.begin)
        content = self._stream.read(block.end - block.begin)
        return [line for line in content.split(b"\n") if line.strip()]

    def _record(self, content: list[bytes], row: int, name: str) -> Mapping:
        return files.parse_json(content[row], name)


# --- Parquet ---


def parquet(
    split: str, *, path: str, held_out: float, text_key: str = "text", label_key: str = ""
) -> Documents:
    """Returns the documents of Parquet files that may be larger than memory.

    Args:
      split, held_out: see `jsonl`.
      path: a file, a folder (all .parquet files in it, at any depth) or a glob pattern (gs:// too).
      text_key, label_key: columns; no label if "".

    Raises:
      ValueError: no file, files that are damaged or have no such columns.
    """
    paths = files.find(path.replace("{split}", split), ("*.parquet",))
    blocks: list[Block] = []
    sizes = []
    for number, file in enumerate(paths):
        metadata = _parquet_metadata(file, [key for key in (text_key, label_key) if key])
        in_file = []
        first = 0
        for group in range(metadata.num_row_groups):
            count = metadata.row_group(group).num_rows
            in_file.append(Block(number, group, group + 1, first, count))
            sizes.append(metadata.row_group(group).total_byte_size)
            first += count
        blocks += _of_split(in_file, split, path, held_out)

    # One row group a stream at least is in memory.
    window = max(1, WINDOW_BYTES // max(1, int(np.mean(sizes or [1]))))
    groups = [[place] for place in range(len(blocks))]
    if sizes and max(sizes) > 16 * WINDOW_BYTES:
        logging.warning(
            "%s has row groups of up to %.0f MB, of which each stream holds some in memory: write "
            "smaller ones (row_group_size of pandas and pyarrow)",
            path,
            max(sizes) / 1e6,
        )

    items = Blocks(paths, blocks, groups, _ParquetReader, window, (text_key, label_key))
    return _documents(split, paths, items, [text_key, label_key, held_out])


def _parquet_metadata(path: str, keys: Sequence[str]):
    import pyarrow
    import pyarrow.parquet

    try:
        with epath.Path(path).open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            metadata = table.metadata
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is cut off, or no Parquet: {error}") from None

    for key in keys:
        if key not in names:
            raise ValueError(f"{path} has no column {key!r}; it has {names}")

    return metadata


class _ParquetReader(_Reader):
    """Reads row groups."""

    def _load(self, place: int) -> None:
        import pyarrow
        import pyarrow.parquet

        block = self._blocks.blocks[place]
        path = self._blocks.paths[block.file]
        keys = [key for key in self._blocks.keys if key]
        try:
            with epath.Path(path).open("rb") as file:
                table = pyarrow.parquet.ParquetFile(file)
                self._keep(place, table.read_row_group(block.begin, columns=keys))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}, row group {block.begin}, is damaged: {error}") from None

    def _record(self, content: Any, row: int, name: str) -> Mapping:
        record = {key: content.column(key)[row].as_py() for key in content.column_names}
        # A row without a text is one without windows.
        text_key, _ = self._blocks.keys
        return record if record[text_key] is not None else record | {text_key: ""}


# --- Hugging Face ---


def hugging_face(
    split: str, *, name: str, config: str = "", text_key: str = "text", label_key: str = ""
) -> Documents:
    """Returns the documents of a Hugging Face data set, which lies as Arrow files that are mapped
    into memory.

    Args:
      split: one of the data set's, slices too: "train[:90%]".
      name: of a data set of the hub, or a folder with files of one.
      config: which of its configurations, where there are several.
      text_key, label_key: columns; no label if "".

    Raises:
      ValueError: the package `datasets` is missing; no such data set, split or column.
    """
    table = load_hugging_face(name, config, split)
    for key in filter(None, (text_key, label_key)):
        if key not in table.column_names:
            raise ValueError(f"{name!r} has no column {key!r}; it has {table.column_names}")

    items = _HuggingFaceDocuments(table, name, text_key, label_key)
    identity = [name, config, split, len(table), text_key, label_key]
    return Documents(items, sources.sampled_fingerprint(items, identity))


def load_hugging_face(name: str, config: str, split: str):
    """Returns the table of a Hugging Face data set. No code of its repository runs.

    Raises:
      ValueError: see `hugging_face`.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"the Hugging Face data set {name!r} needs the package datasets: pip install -c "
            "constraints.txt -e '.[prepare]'"
        ) from None

    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # of the hub, of a file format, of a split: all kinds
        raise ValueError(f"the Hugging Face data set {name!r} can't be loaded: {error}") from None


class _HuggingFaceDocuments(Sequence):
    """Documents out of a table, read one by one."""

    def __init__(self, table, name: str, text_key: str, label_key: str):
        self._keys = [key for key in (text_key, label_key) if key]
        self._table = table.select_columns(self._keys)
        self._name, self._text_key, self._label_key = name, text_key, label_key

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = f"{self._name}[{index}]"
        record = self._table[index]
        if record[self._text_key] is None:
            record[self._text_key] = ""
        return sources.document_of(record, place, place, self._text_key, self._label_key)
