"""Records: the rows of a table as dicts, for evals whose prompts are templates over columns."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence

from lm import files
from lm.data import sources

FORMATS = (".jsonl", ".json", ".csv", ".tsv")


def load(
    split: str,
    *,
    path: str = "",
    lines: Mapping[str, str] | None = None,
    tfds: str = "",
    data_dir: str = "",
) -> Sequence[dict]:
    """The records of a split.

    Args:
      split: what "{split}" in `path` and `lines` stands for; TFDS's split, slices too.
      path: a file or a glob pattern (gs:// too): .jsonl; .json (a list of objects, or SQuAD's own
        format); .csv or .tsv with a head line.
      lines: column -> text file whose line i is that column of record i (parallel texts).
      tfds, data_dir: a TFDS data set, see `lm.data.sources.tfds`; taken where there is neither path
        nor lines.

    Raises:
      ValueError: no data, another format, a row that is none (file and line are named), columns of
        different lengths.
    """
    line_files = {column: file for column, file in (lines or {}).items() if file}
    if path and line_files:
        raise ValueError(
            f"source.path = {path!r} and source.lines = {line_files} are both given; take one"
        )
    if line_files and len(line_files) < len(lines):
        raise ValueError(f"source.lines has no file for {sorted(set(lines) - set(line_files))}")
    if line_files:
        columns = {
            column: _strip_end(files.read_text(file.replace("{split}", split))).split("\n")
            for column, file in line_files.items()
        }
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError(
                "the files of source.lines differ in length: "
                f"{ ({name: len(column) for name, column in columns.items()}) }"
            )
        found = [dict(zip(columns, row)) for row in zip(*columns.values())]
    elif path:
        found = [
            record for file in files.find(path.replace("{split}", split)) for record in _read(file)
        ]
    elif tfds:
        return sources.open_tfds(split, tfds, data_dir)[0]
    else:
        raise ValueError(
            f"no data: give source.path (a file that ends in {', '.join(FORMATS)}, '{{split}}' in "
            "its name if there are several) or source.tfds"
        )
    if not found:
        raise ValueError(f"no records in {path or line_files}")
    return found


def _strip_end(text: str) -> str:
    return text.removesuffix("\n")


def _read(file: str) -> list[dict]:
    if file.endswith(".jsonl"):
        return [record for _, record in files.read_jsonl(file)]
    text = files.read_text(file)
    if file.endswith((".csv", ".tsv")):
        csv.field_size_limit(1 << 30)
        # quotes in a TSV are text, as in GLUE's
        kind = (
            dict(delimiter=",")
            if file.endswith(".csv")
            else dict(delimiter="\t", quoting=csv.QUOTE_NONE)
        )
        rows = [
            row
            for row in csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), **kind)
            if row
        ] or [[]]
        for number, row in enumerate(rows[1:], 2):
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"{file}: row {number} has {len(row)} columns, the first one, with their "
                    f"names, {len(rows[0])}"
                )
        return [dict(zip(rows[0], row)) for row in rows[1:]]
    if not file.endswith(".json"):
        raise ValueError(f"{file}: wanted a file that ends in {', '.join(FORMATS)}")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if (
        isinstance(data, dict)
        and isinstance(data.get("data"), list)
        and all(isinstance(article, dict) for article in data["data"])
    ):
        data = [
            record
            for article in data["data"]
            for record in (_squad(article, file) if "paragraphs" in article else [article])
        ]
    if not isinstance(data, list) or not all(isinstance(record, dict) for record in data):
        raise ValueError(f"{file}: wanted a list of objects, or SQuAD's format")
    return data


def _squad(article: dict, file: str) -> list[dict]:
    """The questions of an article as TFDS has them (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    try:
        return [
            dict(
                id=question["id"],
                title=article.get("title", ""),
                context=paragraph["context"],
                question=question["question"],
                answers=dict(text=[answer["text"] for answer in question["answers"]]),
            )
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: a question of SQuAD's format has no {error}") from None


def fingerprint(records: Sequence[dict]) -> str:
    """Hash of records in order."""
    h = hashlib.sha256()
    for record in records:
        data = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str).encode(
            "utf-8", "surrogatepass"
        )
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:16]
