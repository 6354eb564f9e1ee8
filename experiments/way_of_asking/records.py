"""Writes the records that sweep.py asks about: the first paragraphs of pydocs' documents.

python experiments/way_of_asking/records.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lm
from lm.data import pydocs

FOLDER = Path("~/.cache/lm/way_of_asking").expanduser()
# Shorter ones say nothing; of longer ones four and a question don't fit a row.
CHARS = range(40, 241)


def first_paragraphs(split: str) -> list[dict[str, str]]:
    """The first paragraph of each document that has one of a fitting length, and its library."""
    documents = pydocs.pydocs(split, data_dir=str(FOLDER.parent)).items
    records = []
    seen = set()
    for document in documents:
        text = " ".join(document.text.split("\n\n")[0].split())
        if len(text) in CHARS and text not in seen:
            seen.add(text)
            records.append(dict(text=text, library=document.label))
    return records


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        records = first_paragraphs(split)
        lines = [json.dumps(record) + "\n" for record in records]
        (FOLDER / f"{split}.jsonl").write_text("".join(lines))
        print(f"{split}: {len(records)} records")


if __name__ == "__main__":
    main()
