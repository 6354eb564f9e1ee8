"""A corpus in eleven languages: each way to read it holds out the same documents, an epoch has
every other one once, and each text comes back from its tokens.
"""

import collections
import gzip
import json
import random

import jax
import numpy as np
import pytest

from lm import build
from lm.data import sources
from tests.helpers import slow
from tests.tfds_copies import TEXT, prepare

HELD_OUT = 0.2
# What stands between words, and the first numbers.
LANGUAGES = {
    "ar": (" ", "واحد اثنان ثلاثة أربعة خمسة ستة سبعة ثمانية"),
    "de": (" ", "eins zwei drei vier fünf sechs sieben acht"),
    "el": (" ", "ένα δύο τρία τέσσερα πέντε έξι επτά οκτώ"),
    "en": (" ", "one two three four five six seven eight"),
    "es": (" ", "uno dos tres cuatro cinco seis siete ocho"),
    "fr": (" ", "un deux trois quatre cinq six sept huit"),
    "hi": (" ", "एक दो तीन चार पाँच छह सात आठ"),
    "ja": ("", "いち に さん よん ご ろく なな はち"),
    "ko": (" ", "하나 둘 셋 넷 다섯 여섯 일곱 여덟"),
    "ru": (" ", "один два три четыре пять шесть семь восемь"),
    "zh": ("", "一 二 三 四 五 六 七 八"),
}


def make_texts():
    draw = random.Random(0)
    texts = []
    for _ in range(40):
        for space, words in LANGUAGES.values():
            texts.append(space.join(draw.choices(words.split(), k=draw.randint(3, 12))))
    assert len(set(texts)) > 400  # duplicates, too
    return texts


def as_text(folder, texts):
    """A file for each language, as people have them."""
    for number, language in enumerate(LANGUAGES):
        (folder / f"{language}.txt").write_text("\n".join(texts[number :: len(LANGUAGES)]) + "\n")
    return sources.text, dict(path=str(folder), separator="\n")


def as_jsonl(folder, texts, open_file=open, ending=""):
    path = f"{folder}/all.jsonl{ending}"
    with open_file(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return sources.jsonl, dict(path=path)


def as_gzip(folder, texts):
    return as_jsonl(folder, texts, gzip.open, ".gz")


def as_tfds(folder, texts):
    """A copy that was divided when it was prepared."""
    splits = {"train": [], "validation": []}
    for text in texts:
        is_held_out = sources.is_held_out(text, HELD_OUT)
        splits["validation" if is_held_out else "train"].append({"text": text})
    prepare(folder, "many", {"text": TEXT}, splits)
    return sources.tfds, dict(name="many", data_dir=str(folder))


@pytest.mark.parametrize("write", [as_text, slow(as_jsonl), slow(as_gzip), as_tfds])
@pytest.mark.parametrize("packing", ["first_fit", slow("concat_then_split")])
def test_every_document_is_seen_once_and_comes_back(tiny, tmp_path, write, packing):
    texts = make_texts()
    folder = tmp_path / "corpus"
    folder.mkdir()
    source, arguments = write(folder, texts)
    if source is not sources.tfds:
        arguments |= dict(held_out=HELD_OUT, held_out_by="hash")
    config = tiny.copy_and_resolve_references().unlock()
    config.data.source = f"lm.data.sources.{source.__name__}"
    config.data.source_args = arguments
    config.data.update(dict(label_prompt="", packing=packing, length=128))
    config.model.context_length = 128
    config.tokenizer.update(dict(kind="sentencepiece", vocab_size=600))
    config.train.length = "1 epochs"

    experiment = build.build(config, jax.devices()[:1])
    held_out = [text for text in texts if sources.is_held_out(text, HELD_OUT)]
    validation = build.documents(config, "validation")
    assert sorted(document.text for document in validation) == sorted(held_out)

    tokenizer, loader = experiment.tokenizer, experiment.make_loader()
    seen, num_targets = collections.Counter(), 0
    for _ in range(experiment.total_steps):
        batch, _ = loader.next(None)
        batch = jax.tree.map(np.asarray, batch)
        num_targets += int(batch["weights"].sum())
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segments"][row].max() + 1):
                targets = batch["targets"][row][batch["segments"][row] == segment].tolist()
                # Where rows cut documents, their parts are counted by `num_targets` only.
                if targets[-1] == tokenizer.eos_id:
                    seen[tokenizer.decode(targets[:-1])] += 1
    loader.close()

    wanted = collections.Counter(texts) - collections.Counter(held_out)
    assert num_targets == sum(len(tokenizer.encode(text)) + 1 for text in wanted.elements())
    assert seen.total() == wanted.total()
    if packing == "first_fit":
        assert seen == wanted
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
