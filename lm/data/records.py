"""Records: the rows of a table as dicts. Tables are JSONL, JSON, CSV, TSV, parallel texts or TFDS.

Evals whose prompts are templates over columns read records; `lm.data.sources` makes documents of
them.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from lm import files

T = TypeVar("T")
FORMATS = (".jsonl", ".json", ".csv", ".tsv")
PACKED = ("", ".gz", ".zst")  # what may stand behind them


def load(
    split: str,
    *,
    path: str = "",
    lines: Mapping[str, str] | None = None,
    tfds: str = "",
    data_dir: str = "",
) -> Sequence[dict]:
    """Returns the records of a split.

    Args:
      split: what "{split}" in `path` and `lines` stands for; TFDS's split, slices too.
      path: a file, a folder or a glob pattern (see `lm.files.find`): .jsonl; .json (a list of
        objects, or SQuAD's own format); .csv or .tsv with a header line. Each may be packed, with
        .gz or .zst after that.
      lines: column -> text file whose line i is that column of record i (parallel texts).
      tfds, data_dir: a TFDS data set, see `lm.data.sources.tfds`; taken where there is neither path
        nor lines.

    Raises:
      ValueError: no data, another format, a row that is none (file and line are named), columns of
        different lengths.
    """
    # A task leaves "" where its user has to name a file.
    line_files = {column: file for column, file in (lines or {}).items() if file}
    if path and line_files:
        raise ValueError(
            f"source.path = {path!r} and source.lines = {line_files} are both given; take one"
        )
    if line_files and len(line_files) < len(lines):
        raise ValueError(f"source.lines has no file for {sorted(set(lines) - set(line_files))}")

    if line_files:
        records = _read_parallel_texts(line_files, split)
    elif path:
        records = []
        names = [f"*{ending}{packed}" for ending in FORMATS for packed in PACKED]
        for file in files.find(path.replace("{split}", split), names):
            records.extend(read_table(file))
    elif tfds:
        return open_tfds(split, tfds, data_dir)
    else:
        raise ValueError(
            f"no data: give source.path (a file that ends in {', '.join(FORMATS)}, '{{split}}' in "
            "its name if there are several) or source.tfds"
        )

    if not records:
        raise ValueError(f"no records in {path or line_files}")
    return records


def fingerprint(records: Sequence[dict]) -> str:
    """Returns a hash of records in order."""

    def encoded() -> Iterator[bytes]:
        for record in records:
            text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
            # JSON can spell lone surrogates, which plain UTF-8 refuses.
            yield text.encode("utf-8", "surrogatepass")

    return files.short_hash_of_parts(encoded())


def take(items: Sequence[T], max_items: int) -> Iterator[T]:
    """Yields `max_items` of the items, evenly out of them; 0: all."""
    for i in evenly_spaced(len(items), max_items):
        yield items[i]


def evenly_spaced(size: int, max_items: int) -> list[int]:
    """Returns `max_items` indices evenly out of range(size); 0: all."""
    count = min(size, max_items or size)
    return [i * size // count for i in range(count)]


# --- files ---


def read_table(file: str) -> list[dict]:
    """Returns the records of a file of one of the `FORMATS`.

    Raises:
      ValueError: another format, or contents that don't keep theirs.
    """
    name = file.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".jsonl"):
        return [record for _, record in files.read_jsonl(file)]

    text = files.read_text(file)
    if name.endswith(".json"):
        return _parse_json(text, file)
    if name.endswith(".csv"):
        return _parse_csv(text, file, delimiter=",", quoting=csv.QUOTE_MINIMAL)
    if name.endswith(".tsv"):
        # Quotes in a TSV are text, as in GLUE's, unless all of them are there to enclose fields.
        quoting = csv.QUOTE_MINIMAL if _encloses_fields(text) else csv.QUOTE_NONE
        return _parse_csv(text, file, delimiter="\t", quoting=quoting)
    raise ValueError(f"{file}: wanted a file that ends in {', '.join(FORMATS)}")


# A field of a TSV, with or without quotes around it, and what ends it.
_TSV_FIELD = re.compile(r'("(?:[^"]|"")*"|[^"\t\r\n]*)(?:\t|\r?\n|\Z)')


def _encloses_fields(text: str) -> bool:
    """Whether a TSV's quotes enclose fields, as pandas and csv write them: those that have a tab, a
    line end or a quote in them, with the quotes doubled, and no others.
    """
    if '"' not in text:
        return False
    start = 0
    while start < len(text):
        match = _TSV_FIELD.match(text, start)
        if match is None:
            return False  # a quote within a field
        content = match[1][1:-1]
        if match[1] and match[1][0] == '"' and not set(content) & set('"\t\r\n'):
            return False  # a text that somebody quoted
        start = match.end()
    return True


def _read_parallel_texts(line_files: Mapping[str, str], split: str) -> list[dict]:
    """Records out of {column: text file}, one for each line."""
    columns = {}
    lengths = {}
    for column, file in line_files.items():
        text = files.read_text(files.expand(file.replace("{split}", split)))
        # Only the last line end goes: empty lines are records too.
        columns[column] = text.removesuffix("\n").split("\n")
        lengths[column] = len(columns[column])

    if len(set(lengths.values())) > 1:
        raise ValueError(f"the files of source.lines differ in length: {lengths}")
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _parse_csv(text: str, file: str, *, delimiter: str, quoting: int) -> list[dict]:
    """Records of a table whose first row names the columns."""
    # The module's own limit is 128 KiB a field; a document may be longer.
    csv.field_size_limit(1 << 30)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    rows = [row for row in reader if row]
    if not rows:
        return []

    columns = rows[0]
    for column in columns:
        if columns.count(column) > 1:
            raise ValueError(f"{file}: the column {column!r} is there twice; rename one of them")
    records = []
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(columns):
            raise ValueError(
                f"{file}: row {number} has {len(row)} columns, the first one, with their "
                f"names, {len(columns)}"
            )
        records.append(dict(zip(columns, row)))
    return records


def _parse_json(text: str, file: str) -> list[dict]:
    """Records of a list of objects, or of {"data": a list of objects} as SQuAD's format has it."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None

    if _is_list_of_objects(data):
        return data
    if not (isinstance(data, dict) and _is_list_of_objects(data.get("data"))):
        raise ValueError(f"{file}: wanted a list of objects, or SQuAD's format")

    records = []
    for article in data["data"]:
        if "paragraphs" in article:
            records.extend(_squad_questions(article, file))
        else:
            records.append(article)
    return records


def _is_list_of_objects(data) -> bool:
    return isinstance(data, list) and all(isinstance(record, dict) for record in data)


def _squad_questions(article: dict, file: str) -> list[dict]:
    """Questions of an article, as TFDS has them (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    records = []
    try:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                record = dict(
                    id=question["id"],
                    title=article.get("title", ""),
                    context=paragraph["context"],
                    question=question["question"],
                    answers=dict(text=[answer["text"] for answer in question["answers"]]),
                )
                records.append(record)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: a question of SQuAD's format has no {error}") from None
    return records


# --- TensorFlow Datasets ---


class TfdsRecords(Sequence):
    """Records of a TFDS data source, class labels by name.

    Attributes:
      identity: what tells this split from others, JSON-able; the data set's name comes first.
      class_names: feature of class labels -> their names. Where a record has none of them, its
        value is -1.
    """

    def __init__(self, source, class_names: Mapping[str, Sequence[str]], identity: list):
        self._source = source
        self.class_names = class_names
        self.identity = identity

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        # Iteration ends at an IndexError; ArrayRecord would raise a ValueError.
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.select(index)

    def select(self, index: int, keys: Sequence[str] | None = None) -> dict:
        """Returns those features of a record that are in `keys` (None: all).

        The others, which may be large, are not converted; keys that are no feature are left out.
        """
        record = self.raw(index)
        selected = {}
        for key in record if keys is None else keys:
            if key in record:
                selected[key] = self._value(key, record[key])
        return selected

    def raw(self, index: int) -> dict:
        """Returns a record as TFDS decodes it: bytes for text."""
        return self._source[index]

    def features(self, index: int) -> Mapping[str, Any]:
        """Returns the bytes of each feature of a record, all of which are bytes or text: four times
        as fast as TFDS's own decoding.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        example = tf_example_pb2.Example.FromString(self._source.data_source[index])
        features = example.features.feature
        return {key: feature.bytes_list.value[0] for key, feature in features.items()}

    def _value(self, key: str, value):
        value = to_json_value(value)
        # TFDS writes -1 where a split has no labels.
        if key in self.class_names and value >= 0:
            return self.class_names[key][value]
        return value


def to_json_value(value):
    """Returns a TFDS feature's value as JSON has it: text for bytes, lists for arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: to_json_value(member) for key, member in value.items()}
    if isinstance(value, (np.ndarray, list, tuple)):
        return list(map(to_json_value, value))
    if isinstance(value, np.generic):
        return value.item()
    return value


def open_tfds(split: str, name: str, data_dir: str, keys: Sequence[str] = ()) -> TfdsRecords:
    """Returns the records of a split of a TFDS data set that was prepared as ArrayRecord.

    Args:
      split, name, data_dir: see `lm.data.sources.tfds`.
      keys: features that have to be present.

    Raises:
      ValueError: see `lm.data.sources.tfds`.
    """
    data_dir = epath.Path(files.expand(data_dir or "~/tensorflow_datasets"))
    dataset = name.partition(":")[0]
    advice = (
        "Prepare it once, where TensorFlow is installed: pip install -e '.[tfds]', then tfds "
        f"build {dataset} --file_format=array_record --data_dir={data_dir}"
    )

    folder = data_dir / dataset / _prepared_version(data_dir, name, advice)
    return open_folder(split, folder, dataset, keys, advice)


def open_folder(
    split: str, folder: epath.Path, name: str, keys: Sequence[str] = (), advice: str = ""
) -> TfdsRecords:
    """Returns the records of a split of the TFDS data set in a folder, DATA_DIR/NAME/VERSION.

    Args:
      name: what it is called, in errors and in its identity.
      keys: features that have to be present.
      advice: ends the error where it is of another format than ArrayRecord.

    Raises:
      ValueError: see `lm.data.sources.tfds`.
    """
    import tensorflow_datasets as tfds  # half a second: only where used

    builder = tfds.builder_from_directory(folder)
    info = builder.info
    if info.file_format.value != "array_record":
        raise ValueError(
            f"{folder} was prepared as {info.file_format.value}; training reads array_record. "
            f"{advice}"
        )
    for key in keys:
        if key not in info.features:
            raise ValueError(f"{name!r} has no feature {key!r}; it has {sorted(info.features)}")

    try:
        # `split` may be a slice; TFDS raises whichever of these for one that it can't resolve.
        split_info = info.splits[split]
        source = builder.as_data_source(split=split) if split_info.num_examples else ()
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(
            f"{name!r} has no split {split!r}; it has {sorted(info.splits)} "
            f"({str(error).splitlines()[0]})"
        ) from None
    if not len(source):
        raise ValueError(f"split {split!r} of {name!r} is empty")

    class_names = {}
    for key, feature in info.features.items():
        if isinstance(feature, tfds.features.ClassLabel):
            class_names[key] = feature.names

    # Copies of one version, prepared from different texts, differ in num_bytes. Some kinds of
    # split don't know it.
    num_bytes = getattr(split_info, "num_bytes", None)
    identity = [name, str(info.version), split, len(source), num_bytes]
    return TfdsRecords(source, class_names, identity)


def _prepared_version(data_dir: epath.Path, name: str, advice: str) -> str:
    """The version that `name` ("dataset" or "dataset:version") asks for, or the newest one.

    Raises:
      ValueError: it was not prepared in `data_dir`.
    """
    dataset, _, version = name.partition(":")
    root = data_dir / dataset
    versions = []
    if root.exists():
        # Configurations ("c4/en") are folders here too, but without a dataset_info.json.
        versions = [path.name for path in root.iterdir() if (path / "dataset_info.json").exists()]
        versions.sort(key=_version_numbers)

    if not versions or (version and version not in versions):
        present = f"versions there: {versions}" if versions else f"nothing at {root}"
        raise ValueError(f"no prepared copy of {name!r} in {data_dir} ({present}). {advice}")
    return version or versions[-1]


def _version_numbers(version: str) -> tuple[int, ...]:
    """The parts of "1.10.0" as numbers, to sort by; -1 for a part that is none."""
    return tuple(int(part) if part.isdigit() else -1 for part in version.split("."))
