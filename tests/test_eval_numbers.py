"""Values that an eval can't work with are refused when it is built: its first evaluation may come
after hours of training. The message has the key and what is wanted.
"""

import re

import pytest

from lm.data.pack import Encoder
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer
from lm.evals import choice, classification, entries, generation, linear, perplexity
from tests.fake_models import Model, uniform_distribution

CLASSES = {
    "documents": classification.DocumentClassification,
    "perplexity": perplexity.Perplexity,
    "samples": generation.Samples,
    "prompts": classification.PromptClassification,
    "choice": choice.MultipleChoice,
    "answers": generation.TextGeneration,
    "linear": linear.LinearVerbalizer,
}
# What each takes, without an eval's name and encoder. The records of those that have a source are
# nowhere: what is wrong with the configuration is found before they are read.
PAIRS = (("red", (" red",)), ("blue", (" blue",)))
WORDS = dict(verbalizer=dict(words=(PAIRS,)), prompt=dict(templates=("{text}\n?",)))
ENTRIES = {
    "documents": entries.classification(dict(PAIRS), every=0),
    "perplexity": entries.perplexity(every=0),
    "samples": entries.samples(("ab", "c"), every=0, max_new_tokens=8),
    "prompts": WORDS,
    "choice": dict(choices=(" {a}",), prompt=dict(template="{q}")),
    "answers": dict(references="{a}", scores=("f1",), prompt=dict(template="{q}")),
    "linear": WORDS,
}
BAD_VALUES = [
    ("documents", "max_documents", -1, "0 or above"),
    ("perplexity", "max_documents", -1, "0 or above"),
    ("perplexity", "stride", -1, "0 to config.data.length = 64"),
    ("perplexity", "stride", 65, "0 to config.data.length = 64"),
    ("samples", "max_new_tokens", 0, "1 or above"),
    ("samples", "temperature", -0.1, "0 or above"),
    ("samples", "temperature", float("nan"), "0 or above"),
    ("samples", "top_k", -1, "0 or above"),
    ("samples", "prompts", (), "one text or more"),
    ("samples", "prompts", ("ab", "x" * 60), "1 to 56"),
    ("prompts", "max_documents", -1, "0 or above"),
    ("prompts", "prompt.shots", -1, "0 or above"),
    ("prompts", "temperature_examples", -1, "0 or above"),
    ("choice", "max_documents", -1, "0 or above"),
    ("choice", "prompt.shots", -1, "0 or above"),
    ("answers", "max_documents", -1, "0 or above"),
    ("answers", "prompt.shots", -1, "0 or above"),
    ("answers", "output.max_new_tokens", 0, "1 or above"),
    ("linear", "max_documents", -1, "0 or above"),
    ("linear", "prompt.shots", -1, "0 or above"),
    ("linear", "train_examples", -1, "0 or above"),
    ("linear", "l2", -0.5, "0 or above"),
]


def arguments(eval_name, folder):
    """The arguments of an evaluator, as lm.build reads them."""
    entry = ENTRIES[eval_name]
    if isinstance(entry, dict):
        path = folder / "t.toml"
        cls = CLASSES[eval_name]
        path.write_text(f'type = "{cls.__module__}.{cls.__name__}"')
        entry = entries.task(str(path), source=dict(path="nowhere.jsonl"), **entry)

    values = entry.to_dict()
    for key in ("type", "every", "batch_size"):
        del values[key]
    if values.pop("split", ""):
        # What says where the documents are is not the evaluator's.
        for key in ("source", "source_args"):
            values.pop(key, None)
        values["documents"] = Documents([Document("a text", "d0", "red")], "fingerprint")
    return values


def make(eval_name, values):
    return CLASSES[eval_name](
        Model(uniform_distribution),
        name="e",
        encoder=Encoder(ByteTokenizer(), "\n?"),
        **values,
    )


@pytest.mark.parametrize("eval_name, key, value, wanted", BAD_VALUES)
def test_bad_values_are_refused_by_their_key(eval_name, key, value, wanted, tmp_path):
    values = arguments(eval_name, tmp_path)
    *path, last = key.split(".")
    section = values
    for part in path:
        section = section[part]
    assert last in section
    section[last] = value

    message = rf"^config\.evals\.e\.{re.escape(key)}\b.*; wanted {re.escape(wanted)}"
    with pytest.raises(ValueError, match=message):
        make(eval_name, values)


@pytest.mark.parametrize("eval_name", ["documents", "perplexity", "samples"])
def test_the_same_entries_are_built_without_bad_values(eval_name, tmp_path):
    assert make(eval_name, arguments(eval_name, tmp_path))


@pytest.mark.parametrize("eval_name", ["prompts", "choice", "answers", "linear"])
def test_only_the_records_are_missing_without_bad_values(eval_name, tmp_path):
    with pytest.raises(ValueError, match="^the eval 'e': no file at nowhere.jsonl"):
        make(eval_name, arguments(eval_name, tmp_path))
