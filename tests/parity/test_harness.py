"""lm_eval on our models and on its own `hf` backend: the same scores, of all kinds of requests, on
local tasks.
"""

import json
import os
import random

os.environ |= {"HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}

import jax
import lm_eval
import numpy as np
import pytest
from etils import epath
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm import build, step
from lm import config as config_lib
from lm.data import pack
from lm.data import tokenizer as tokenizers
from lm.decoding.generator import Generator
from lm.evals import choice, classification, entries, harness, predict
from lm.evals.predict import PredictFns
from lm.hf import directory as hf
from lm.objectives import causal
from lm.reports import comparison
from tests.parity import references
from tests.parity.test_convert import write_tokenizer

LENGTH = 64
RANDOM = random.Random(0)
WORDS = "the cat and hat then other one a of on sat ran big red".split()


def sentence(least, most):
    return " ".join(RANDOM.choice(WORDS) for _ in range(RANDOM.randint(least, most)))


def write_tasks(folder):
    """A task of each kind, a dozen documents each; some longer than the model's 64 tokens."""
    rows = {
        "sentiment": [dict(text=sentence(2, 9), label=i % 2) for i in range(12)],
        "topics": [dict(text=sentence(2, 40), label=i % 3) for i in range(12)],
        "choice": [
            dict(text=sentence(2, 8), choices=[sentence(1, 4) for _ in range(3)], label=i % 3)
            for i in range(12)
        ],
        "pairs": [dict(good=sentence(3, 7), bad=sentence(3, 7)) for _ in range(12)],
        "texts": [dict(text=sentence(3, 60)) for _ in range(6)],
        "last_word": [dict(text=sentence(2, 10), last=RANDOM.choice(WORDS)) for _ in range(12)],
        "answers": [dict(text=sentence(2, 10), answer="cat") for _ in range(10)],
    }
    tasks = {
        "sentiment": dict(
            output_type="multiple_choice",
            doc_to_text="{{text}}.",
            doc_to_target="label",
            doc_to_choice=["the cat", "hat"],
            num_fewshot=2,
            metric_list=["acc", "acc_norm", "acc_bytes"],
            target_delimiter=" ",
        ),
        "topics": dict(
            output_type="multiple_choice",
            doc_to_text="{{text}}\n",
            doc_to_target="label",
            doc_to_choice=["one", "the other one", "a hat"],
            metric_list=["acc", "acc_norm", "brier_score"],
            target_delimiter="",
        ),
        "choice": dict(
            output_type="multiple_choice",
            doc_to_text="{{text}}",
            doc_to_target="label",
            doc_to_choice="choices",
            metric_list=["acc", "acc_norm", "acc_mutual_info"],
        ),
        "pairs": dict(
            output_type="multiple_choice",
            doc_to_text="",
            doc_to_target=0,
            doc_to_choice="{{[good, bad]}}",
            metric_list=["acc"],
        ),
        "texts": dict(
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="text",
            metric_list=["word_perplexity", "byte_perplexity", "bits_per_byte"],
        ),
        "last_word": dict(
            output_type="loglikelihood",
            doc_to_text="{{text}}",
            doc_to_target="{{last}}",
            metric_list=["perplexity", "acc"],
        ),
        "answers": dict(
            output_type="generate_until",
            doc_to_text="{{text}}:",
            doc_to_target="answer",
            metric_list=["exact_match"],
            generation_kwargs=dict(until=["h", " t"], max_gen_toks=20, do_sample=False),
        ),
    }
    for name, task in tasks.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        metrics = [dict(metric=m) for m in task.pop("metric_list")]
        about = dict(
            task=f"local_{name}",
            dataset_path="json",
            dataset_kwargs=dict(data_files=dict(validation=str(folder / f"{name}.jsonl"))),
            validation_split="validation",
            fewshot_split="validation",
            fewshot_config=dict(sampler="first_n"),
            metric_list=metrics,
            **task,
        )
        (folder / f"local_{name}.yaml").write_text(json.dumps(about))  # JSON is YAML
    return [f"local_{name}" for name in tasks]


def make_checkpoint(directory, adds_bos):
    write_tokenizer(directory, "tokenizer.json")
    if adds_bos:
        about = json.loads((directory / "tokenizer.json").read_text())
        single = [
            dict(SpecialToken=dict(id="<s>", type_id=0)),
            dict(Sequence=dict(id="A", type_id=0)),
        ]
        about["post_processor"] = dict(
            type="TemplateProcessing",
            single=single,
            pair=single,
            special_tokens={"<s>": dict(id="<s>", ids=[1], tokens=["<s>"])},
        )
        (directory / "tokenizer.json").write_text(json.dumps(about))
    model = references.make("llama-3.2")
    # transformers would draw ids that aren't the tokenizer's
    model.resize_token_embeddings(tokenizers.load(directory).vocab_size)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), adds_bos=False)


def ours(directory, batch_size, sizes):
    config = config_lib.default()
    config.init_from = str(directory)
    config.model.param_dtype = "float32"
    config = build.apply_hf_config(config.lock()).copy_and_resolve_references().unlock()
    config.mesh.update({"fsdp": 1, **sizes})
    tokenizer = tokenizers.load(directory)
    made = build.abstract_model(
        config, jax.devices()[: int(np.prod(list(sizes.values())))], tokenizer.vocab_size
    )
    params = hf.Checkpoint(directory).load(made.params)
    fns = PredictFns(
        made.mesh,
        batch_size=batch_size,
        length=LENGTH,
        token_logprobs=step.make_token_logprobs(made.graphdef, causal.token_logprobs),
        tree_logprobs=step.make_tree_logprobs(made.graphdef),
        make_generate=None,
        check_stop=lambda: None,
        make_generator=lambda params, sampling: Generator(
            made.model_config,
            made.graphdef,
            params,
            made.mesh,
            sampling,
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
        ),
    )
    return harness.HarnessModel(fns, params, tokenizer), made.mesh


def evaluate(model, tasks, folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    out = lm_eval.simple_evaluate(
        model, tasks=tasks, task_manager=manager, bootstrap_iters=10, log_samples=True
    )
    return out["results"], out["samples"]


@pytest.mark.parametrize(
    "adds_bos, batch_size, sizes",
    [(False, 8, dict(fsdp=1)), (True, 8, dict(fsdp=1)), (False, 4, dict(data=2, fsdp=2))],
    ids=str,
)
def test_all_kinds_of_requests(adds_bos, batch_size, sizes, tmp_path):
    checkpoint = make_checkpoint(tmp_path, adds_bos)
    tasks = write_tasks(tmp_path)
    model, mesh = ours(checkpoint, batch_size, sizes)
    with jax.set_mesh(mesh):
        found, samples = evaluate(model, tasks, tmp_path)
    wanted, theirs = evaluate(
        HFLM(
            pretrained=str(checkpoint),
            batch_size=4,
            max_length=LENGTH,
            dtype="float32",
            device="cpu",
        ),
        tasks,
        tmp_path,
    )
    assert found.keys() == wanted.keys() == set(tasks)
    worst = 0.0
    for task in tasks:
        for a, b in zip(samples[task], theirs[task], strict=True):
            assert a["doc_id"] == b["doc_id"] and a["arguments"] == b["arguments"]
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                if isinstance(x, str):
                    assert x == y
                else:
                    x, y = (z if isinstance(z, (list, tuple)) else (z, True) for z in (x, y))
                    worst = max(worst, abs(x[0] - y[0]))
                    assert x[0] == pytest.approx(y[0], abs=1e-3) and x[1] == y[1]
        for name, value in wanted[task].items():
            if isinstance(value, float) and "stderr" not in name:
                assert found[task][name] == pytest.approx(value, rel=1e-3), (task, name)
    # texts, and not all the same
    assert len({s["filtered_resps"][0] for s in samples["local_answers"]}) > 3
    print(f"largest difference of a log-likelihood: {worst:.1e}")


def test_as_an_entry_of_the_configuration(checkpoint, tiny, tmp_path):
    """--mode=eval runs the tasks that config.evals names, and writes their report."""
    write_tasks(tmp_path)
    config = tiny.copy_and_resolve_references()
    with config.unlocked():
        config.init_from = str(checkpoint)
        config.model.param_dtype = "float32"
        config.data.length = LENGTH
        config.evals.local = dict(
            type="lm.evals.harness.Harness",
            every=0,
            batch_size=8,
            tasks=("local_choice", "local_texts"),
            include_path=str(tmp_path),
        )
    found = evaluate.evaluate(config, epath.Path(tmp_path / "run"), jax.devices()[:1])
    assert {
        "eval/local/local_choice/acc",
        "eval/local/local_choice/acc_norm",
        "eval/local/local_texts/word_perplexity",
    } <= set(found)
    (report,) = (tmp_path / "run").glob("local-*.json")
    assert (
        json.loads(report.read_text())["results"]["local_choice"]["acc,none"]
        == found["eval/local/local_choice/acc"]
    )
    (predictions,) = (tmp_path / "run" / "predictions").glob("local-local_choice-*.jsonl")
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(lines) == 12 and np.mean([line["scores"]["acc"] for line in lines]) == pytest.approx(
        found["eval/local/local_choice/acc"]
    )
    compared = comparison.compare_runs(epath.Path(tmp_path / "run"), epath.Path(tmp_path / "run"))
    assert set(compared) == {"local-local_choice"}  # six texts are too few
    scores = compared["local-local_choice"]
    assert (
        scores["acc_norm"] == pytest.approx(found["eval/local/local_choice/acc_norm"])
        and scores["acc_difference"] == 0
        and scores["examples"] == 12
    )
    with config.unlocked():
        config.evals.local.tasks = ("local_choice", "nothing")
    with pytest.raises(ValueError, match=r"lm_eval has no tasks \['nothing'\] in .*: there are \["):
        evaluate.evaluate(config, epath.Path(tmp_path / "other"), jax.devices()[:1])


def test_many_continuations_of_one_context(checkpoint, monkeypatch):
    """BLiMP's thousands all follow nothing: they don't become one row."""
    model, mesh = ours(checkpoint, 4, dict(fsdp=1))
    rows, real = [], predict.merge_trees
    monkeypatch.setattr(
        predict, "merge_trees", lambda trees, most: rows.extend(real(trees, most)) or rows
    )
    ids = [np.random.default_rng(i).integers(0, 50, 5).tolist() for i in range(100)]
    with jax.set_mesh(mesh):
        together = model._loglikelihood_tokens([(("", ""), [1], one) for one in ids])
        assert len(rows) > 4 and max(len(row.tree.tokens) for row in rows) <= 2 * LENGTH
        rows.clear()
        assert together[7] == pytest.approx(
            model._loglikelihood_tokens([(("", ""), [1], ids[7])])[0], abs=1e-4
        )


def test_longer_than_the_model_takes(checkpoint):
    model, mesh = ours(checkpoint, 4, dict(fsdp=1))
    with (
        pytest.raises(ValueError, match=f"has 80 tokens; wanted 1 to {LENGTH}"),
        jax.set_mesh(mesh),
    ):
        model._loglikelihood_tokens([(("a", "b"), [1], [2] * 80)])
    with pytest.raises(ValueError, match="has 0 tokens; wanted 1 to"):
        model._loglikelihood_tokens([(("a", "b"), [1], [])])


def task_arguments(folder, kind, **changes):
    (folder / "ours.toml").write_text(f'type = "lm.evals.{kind}.Task"')
    made = entries.task(
        str(folder / "ours.toml"),
        source=dict(path=str(folder / "{split}.jsonl"), split="test", shots_split="train"),
        **changes,
    ).to_dict()
    return {key: value for key, value in made.items() if key not in ("type", "every", "batch_size")}


@pytest.mark.parametrize("adds_bos", [False, True])
def test_our_own_tasks_in_lm_evals_mode(adds_bos, tmp_path):
    """Templates, examples, boundary, norms and scores: the same prompts, log-probabilities and
    figures as lm_eval's from a task file that says the same.
    """
    checkpoint = make_checkpoint(tmp_path, adds_bos)
    for split in ("train", "test"):
        rows = [
            dict(
                text=sentence(2, 6),
                a=sentence(1, 3),
                b=sentence(1, 4),
                label=i % 3,
                right=i % 2,
                last=RANDOM.choice(WORDS),
            )
            for i in range(12)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = ["one", "the other one", "a hat"]
    theirs = dict(
        classification=dict(
            doc_to_text="{{text}}\n",
            doc_to_target="label",
            doc_to_choice=labels,
            target_delimiter="",
            num_fewshot=2,
        ),
        choice=dict(
            doc_to_text="{{text}}:",
            doc_to_target="right",
            doc_to_choice="{{[a, b]}}",
            num_fewshot=1,
        ),
        last=dict(output_type="loglikelihood", doc_to_text="{{text}}", doc_to_target=" {{last}}"),
    )
    metrics = dict(
        classification=["acc", "brier_score"],
        choice=["acc", "acc_norm", "acc_bytes"],
        last=["acc", "perplexity"],
    )
    for name, task in theirs.items():
        files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
        about = dict(
            task=name,
            dataset_path="json",
            dataset_kwargs=dict(data_files=files),
            test_split="test",
            fewshot_split="train",
            fewshot_config=dict(sampler="first_n"),
            metric_list=[dict(metric=m) for m in metrics[name]],
            **{"output_type": "multiple_choice"} | task,
        )
        (tmp_path / f"{name}.yaml").write_text(json.dumps(about))
    wanted, samples = evaluate(
        HFLM(
            pretrained=str(checkpoint),
            batch_size=4,
            max_length=LENGTH,
            dtype="float32",
            device="cpu",
        ),
        list(theirs),
        tmp_path,
    )
    model, mesh = ours(checkpoint, 8, dict(fsdp=1))
    encoder, found, predictions = pack.Encoder(model._tokenizer, ""), {}, {}
    first_n = lambda shots: dict(shots=shots, sampler="first_n")
    words = (tuple((label, (label,)) for label in labels),)
    tasks = dict(
        classification=(
            classification.PromptClassification,
            task_arguments(
                tmp_path,
                "classification",
                verbalizer=dict(words=words, boundary="lm_eval"),
                prompt=first_n(2) | dict(templates=("{text}\n",)),
            ),
        ),
        choice=(
            choice.MultipleChoice,
            task_arguments(
                tmp_path,
                "choice",
                prompt=first_n(1) | dict(template="{text}:"),
                choices=(" {a}", " {b}"),
                answer="right",
                boundary="lm_eval",
            ),
        ),
        last=(
            choice.MultipleChoice,
            task_arguments(
                tmp_path,
                "choice",
                prompt=dict(template="{text}"),
                choices=(" {last}",),
                answer="0",
                boundary="lm_eval",
            ),
        ),
    )
    with jax.set_mesh(mesh):
        for name, (cls, arguments) in tasks.items():
            values = dict(
                cls(model._predict_fns, name=name, encoder=encoder, **arguments).run(model._params)
            )
            predictions[name] = [
                json.loads(line) for line in values["predictions"].content.splitlines()
            ]
            found[name] = values
    sums = {
        "classification": lambda line: [
            sum(*line["word_logprobs"][0][label].values()) for label in labels
        ],
        "choice": lambda line: line["logprobs"],
        "last": lambda line: line["logprobs"],
    }
    for name in theirs:
        for line, sample in zip(
            predictions[name], sorted(samples[name], key=lambda s: s["doc_id"]), strict=True
        ):
            said = [x[0] if isinstance(x, (list, tuple)) else x for x in sample["filtered_resps"]]
            assert sums[name](line) == pytest.approx(said[:1] if name == "last" else said, abs=1e-3)
    pairs = [
        ("classification", "accuracy", "acc"),
        ("classification", "brier", "brier_score"),
        ("choice", "accuracy", "acc"),
        ("choice", "accuracy_char", "acc_norm"),
        ("choice", "accuracy_byte", "acc_bytes"),
        ("last", "accuracy", "acc"),
        ("last", "perplexity", "perplexity"),
    ]
    for name, mine, other in pairs:
        assert found[name][mine] == pytest.approx(wanted[name][f"{other},none"], rel=1e-3), (
            name,
            mine,
        )
