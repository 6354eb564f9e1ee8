"""Heads beside the vocabulary's: labelled texts as rows, the objective, what heads say, runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from lm import build, instructions
from lm.data import labelled
from lm.data.labelled import Labelled
from lm.data.tokenizer import ByteTokenizer
from lm.evals import entries
from lm.objectives import labels
from tests.helpers import (
    assert_trees_close,
    model_config,
    random_model,
    read_jsonl,
    run_training,
    slow,
)

BYTES = ByteTokenizer()
CLASSES = [
    {"text": f"a {name} thing {i}", "label": name} for i in range(30) for name in ("x", "yy")
]
SCORES = [{"text": "a" * (1 + i % 5), "score": 1.0 + i % 5} for i in range(60)]
WORDS = [
    {"words": ["a", "bb", "a"][: 1 + i % 3], "labels": ["A", "B", "A"][: 1 + i % 3]}
    for i in range(60)
]


def write(folder, records):
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(folder, records, labels=("x", "yy"), split="train"):
    return labelled.jsonl(
        split, path=write(folder, records), held_out=0.25, labels=labels, held_out_by="tail"
    )


def test_classes_stand_at_one_place(tmp_path):
    texts = read(tmp_path, CLASSES)
    assert (texts.label_kind, texts.labels, len(texts)) == ("class", ("x", "yy"), 45)
    for place in ("first", "last"):
        units = labelled.encode(texts, BYTES, length=32, place=place)
        for unit, record in zip(units, CLASSES):
            tokens, weights = unit.arrays["tokens"], unit.arrays["weights"]
            assert tokens.tolist() == [BYTES.bos_id, *record["text"].encode(), BYTES.eos_id]
            (at,) = np.flatnonzero(weights)
            assert at == (0 if place == "first" else len(tokens) - 1)
            assert unit.arrays["values"][at] == (record["label"] == "yy")


@pytest.mark.parametrize("place, places", [("first", [1, 2, 5]), ("last", [1, 4, 6])])
def test_words_have_their_labels(tmp_path, place, places):
    texts = read(tmp_path, WORDS[2:3] * 4, labels=("A", "B"))
    unit = labelled.encode(texts, BYTES, length=32, place=place)[0]
    assert BYTES.decode(unit.arrays["tokens"]) == "a bb a"
    assert np.flatnonzero(unit.arrays["weights"]).tolist() == places
    assert unit.arrays["values"][places].tolist() == [0, 1, 0]
    # What is cut off has none.
    unit = labelled.encode(texts, BYTES, length=6, place=place)[0]
    assert unit.arrays["weights"].sum() == (2 if place == "first" else 1) + (place == "last")


def test_long_texts_lose_their_end(tmp_path, caplog):
    texts = read(tmp_path, [{"text": "abc" * 20, "label": "x"}] * 4)
    unit = labelled.encode(texts, BYTES, length=16, place="last")[0]
    assert len(unit.arrays["tokens"]) == 16 and unit.arrays["tokens"][-1] == BYTES.eos_id
    assert "3 of 3 texts are longer than a row" in caplog.text


@pytest.mark.parametrize(
    "records, message",
    [
        ([{"text": "a"}], r"labelled.jsonl:1 has the keys \['text'\]; wanted one of"),
        ([{"text": "a", "label": "z"}], r"label has 'z'; wanted one of .*\['x', 'yy'\]"),
        ([{"text": "a", "label": 1}], "label has 1; wanted one of"),
        ([{"text": "a", "score": float("nan")}], "score = nan; wanted a number"),
        ([{"text": "a", "score": "3"}], "score = '3'; wanted a number"),
        ([{"words": ["a"], "labels": ["x", "x"]}], "wanted a text and its value, or as many"),
        ([{"words": [], "labels": []}], "wanted a text and its value, or as many"),
        ([{"text": "a", "label": "x"}, {"text": "a", "score": 1}], "of several kinds"),
        ([], "has no documents with text"),
    ],
)
def test_bad_records(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, records)


# --- the objective ---


def make_batch(values):
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0]] * 2, np.int32)
    weights = np.zeros((2, 8), np.float32)
    weights[:, [0, 3]] = 1
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0]] * 2, np.int32)
    tokens = np.random.default_rng(0).integers(0, 40, (2, 8)).astype(np.int32)
    batch = dict(tokens=tokens, targets=tokens, weights=weights, positions=positions)
    return batch | dict(segments=segments, values=np.asarray(values, np.float32))


@pytest.mark.parametrize("heads", ["classes:3", "scalar"])
@pytest.mark.parametrize("visible", ["full", "causal"])
def test_losses_are_those_of_the_texts_alone(heads, visible):
    graphdef, params = random_model(model_config(heads=heads, visible=visible))
    values = np.zeros((2, 8))
    values[:, 0], values[:, 3] = 2, 1
    batch = make_batch(values)
    loss = labels.make_loss()

    def total(params, batch):
        value, count, terms = loss(nnx.merge(graphdef, params), batch, None)
        return value, (count, terms)

    value_and_grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    (packed, (count, terms)), grads = value_and_grad(params, batch)
    assert count == 4
    assert ("accuracy" in terms) == (heads != "scalar")

    alone, sum_of_grads = 0.0, jax.tree.map(jnp.zeros_like, params)
    for row in range(2):
        for number in (1, 2):
            places = batch["segments"][row] == number
            one = {name: array[row][places][None] for name, array in batch.items()}
            one["segments"] = np.ones_like(one["segments"])
            (value, _), grad = value_and_grad(params, one)
            head = params["heads"][heads.partition(":")[0]]["weight"]
            model = nnx.merge(graphdef, params)
            state = model(one["tokens"], one["positions"], one["segments"]).hidden[0, 0]
            outputs = np.asarray(state @ head)
            label = int(one["values"][0, 0])
            wanted = (outputs[0] - label) ** 2
            if heads != "scalar":
                wanted = -jax.nn.log_softmax(outputs)[label]
            np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-4)
            alone += value
            sum_of_grads = jax.tree.map(jnp.add, sum_of_grads, grad)
    np.testing.assert_allclose(packed, alone, rtol=1e-5)
    assert_trees_close(grads, sum_of_grads, rtol=1e-3, atol=1e-4)


# --- runs ---


def configure(tiny, folder, records, heads, names=("x", "yy")):
    c = tiny.copy_and_resolve_references().unlock()
    c.data.source = "lm.data.labelled.jsonl"
    c.data.source_args = ConfigDict(
        dict(path=write(folder, records), held_out=0.25, labels=names, held_out_by="tail")
    )
    c.data.label_prompt = ""
    c.model.heads = heads
    c.model.param_dtype = "float32"
    c.objective = ConfigDict(dict(type="lm.objectives.labels"))
    c.optimizer.update(name="adamw", learning_rate=1e-2)
    c.train.length = "40 steps"
    c.evals = ConfigDict(dict(head=entries.head_outputs(every=0, batch_size=8)))
    return c


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize("visible", ["full", slow("causal")])
def test_classes_are_learnt(tiny, tmp_path, visible):
    config = configure(tiny, tmp_path, CLASSES, "classes:2")
    config.model.visible = visible
    metrics = run_training(config, tmp_path / "run")
    assert metrics["eval/head/accuracy"] > 0.9
    assert metrics["eval/head/examples"] == 15
    lines = read_jsonl(tmp_path / "run" / "predictions" / "head-40.jsonl")
    # In the texts' order, each with what the head says.
    assert [line["label"] for line in lines] == [record["label"] for record in CLASSES[45:]]
    assert all(abs(sum(line["distribution"].values()) - 1) < 1e-5 for line in lines)
    right = np.mean([line["label"] == line["prediction"] for line in lines])
    assert metrics["eval/head/accuracy"] == pytest.approx(right)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_runs")
def test_scores_are_learnt(tiny, tmp_path):
    config = configure(tiny, tmp_path, SCORES, "scalar", ())
    metrics = run_training(config, tmp_path / "run")
    assert metrics["eval/head/mse"] < np.var([record["score"] for record in SCORES])
    assert metrics["eval/head/pearson"] > 0.5


@pytest.mark.usefixtures("fast_runs")
def test_labels_of_words_are_learnt(tiny, tmp_path):
    config = configure(tiny, tmp_path, WORDS, "token_labels:2", ("A", "B"))
    config.model.visible = "full"
    metrics = run_training(config, tmp_path / "run")
    assert metrics["eval/head/accuracy"] > 0.9
    words = [label for record in WORDS[45:] for label in record["labels"]]
    lines = read_jsonl(tmp_path / "run" / "predictions" / "head-40.jsonl")
    assert [line["label"] for line in lines] == words


def test_a_head_is_needed(tiny, tmp_path):
    config = configure(tiny, tmp_path, CLASSES, "")
    with pytest.raises(ValueError, match="config.model.heads = '': .* trains one head"):
        build.build(config, jax.devices()[:1])


def test_texts_need_their_objective(tiny, tmp_path):
    config = configure(tiny, tmp_path, CLASSES, "classes:2")
    config.objective = ConfigDict(tiny.objective.to_dict())
    with pytest.raises(ValueError, match="takes text or conversation, and .* 'labelled'"):
        build.build(config, jax.devices()[:1])


def test_a_task_gives_its_prompts_and_classes(tmp_path):
    """Those that label words are asked after, by the same names."""
    task = entries.instructed("pydocs_section")
    texts = instructions.labelled_texts("validation", task=task.to_dict())
    assert texts.labels == tuple(label for label, _ in task.verbalizer.words[0])
    assert len(texts) and texts[0].name == f"{task.source.split}[0]"
    trained = instructions.labelled_texts("train", task=task.to_dict(), rate_cap=5)
    assert len(trained) == 5
    with pytest.raises(ValueError, match="template = 99; wanted 0 to"):
        instructions.labelled_texts("train", task=task.to_dict(), template=99)
    with pytest.raises(ValueError, match="has no classes"):
        instructions.labelled_texts("train", task=entries.instructed("gsm8k").to_dict())


def test_units_know_their_names():
    item = Labelled(("a",), (0.0,), "train[3]")
    texts = labelled.as_documents([item], "class", ("x",))
    (unit,) = labelled.encode(texts, BYTES, length=8, place="last").items
    assert unit.name == "train[3]"
    assert texts.fingerprint != labelled.as_documents([item], "class", ("y",)).fingerprint
