"""lm_eval on our models and on its own `hf` backend: the same scores, of all kinds of requests, on
local tasks.
"""

import dataclasses
import json
import os
import random

# Read when lm_eval and datasets are imported.
os.environ |= {"HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}

import jax
import lm_eval
import numpy as np
import pytest
from etils import epath
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm import build
from lm import config as config_lib
from lm import evaluate as evaluate_lib
from lm.data import pack
from lm.data import tokenizer as tokenizers
from lm.decoding.generator import Generator
from lm.evals import causal_answers, choice, classification, entries, harness
from lm.evals.predict import PredictFns
from lm.hf import directory as hf
from lm.reports import comparison, tables
from tests.parity import references
from tests.parity.test_convert import write_tokenizer

LENGTH = 64
WORDS = "the cat and hat then other one a of on sat ran big red".split()

# A task of each kind of request: name -> keys of its file.
TASKS = {
    "sentiment": dict(
        output_type="multiple_choice",
        doc_to_text="{{text}}.",
        doc_to_target="label",
        doc_to_choice=["the cat", "hat"],
        num_fewshot=2,
        target_delimiter=" ",
    ),
    "topics": dict(
        output_type="multiple_choice",
        doc_to_text="{{text}}\n",
        doc_to_target="label",
        doc_to_choice=["one", "the other one", "a hat"],
        target_delimiter="",
    ),
    "choice": dict(
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_target="label",
        doc_to_choice="choices",
    ),
    "pairs": dict(
        output_type="multiple_choice",
        doc_to_text="",
        doc_to_target=0,
        doc_to_choice="{{[good, bad]}}",
    ),
    "texts": dict(
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
    ),
    "last_word": dict(
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target="{{last}}",
    ),
    "answers": dict(
        output_type="generate_until",
        doc_to_text="{{text}}:",
        doc_to_target="answer",
        generation_kwargs=dict(until=["h", " t"], max_gen_toks=20, do_sample=False),
    ),
}
# The metrics that lm_eval is asked for.
METRICS = {
    "sentiment": ["acc", "acc_norm", "acc_bytes"],
    "topics": ["acc", "acc_norm", "brier_score"],
    "choice": ["acc", "acc_norm", "acc_mutual_info"],
    "pairs": ["acc"],
    "texts": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    "last_word": ["perplexity", "acc"],
    "answers": ["exact_match"],
}


def draw_sentence(rng, least, most):
    """Random words, at least and at most so many."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def draw_document(rng, task, number):
    """A document of one of TASKS; some are longer than the model's 64 tokens."""
    if task == "sentiment":
        return dict(text=draw_sentence(rng, 2, 9), label=number % 2)
    if task == "topics":
        return dict(text=draw_sentence(rng, 2, 40), label=number % 3)
    if task == "choice":
        choices = [draw_sentence(rng, 1, 4) for _ in range(3)]
        return dict(text=draw_sentence(rng, 2, 8), choices=choices, label=number % 3)
    if task == "pairs":
        return dict(good=draw_sentence(rng, 3, 7), bad=draw_sentence(rng, 3, 7))
    if task == "texts":
        return dict(text=draw_sentence(rng, 3, 60))
    if task == "last_word":
        return dict(text=draw_sentence(rng, 2, 10), last=rng.choice(WORDS))
    return dict(text=draw_sentence(rng, 2, 10), answer="cat")


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_task(folder, name, data_files, metrics, **keys):
    """A task file of lm_eval, NAME.yaml. JSON is YAML."""
    task = dict(
        task=name,
        dataset_path="json",
        dataset_kwargs=dict(data_files={split: str(file) for split, file in data_files.items()}),
        fewshot_config=dict(sampler="first_n"),
        metric_list=[dict(metric=metric) for metric in metrics],
        **keys,
    )
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def write_tasks(folder):
    """Writes TASKS with a dozen documents each (texts: six), and returns their names."""
    rng = random.Random(0)
    for name, keys in TASKS.items():
        file = folder / f"{name}.jsonl"
        num_documents = 6 if name == "texts" else 12
        write_jsonl(file, [draw_document(rng, name, i) for i in range(num_documents)])
        write_task(
            folder,
            f"local_{name}",
            dict(validation=file),
            METRICS[name],
            validation_split="validation",
            fewshot_split="validation",
            **keys,
        )
    return [f"local_{name}" for name in TASKS]


def make_checkpoint(directory, adds_bos):
    """A small random Llama of transformers, with a tokenizer that adds BOS or doesn't."""
    write_tokenizer(directory, "tokenizer.json")
    # What makes a tokenizer of the `tokenizers` library put <s> before each text.
    if adds_bos:
        file = directory / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        template = [
            dict(SpecialToken=dict(id="<s>", type_id=0)),
            dict(Sequence=dict(id="A", type_id=0)),
        ]
        tokenizer["post_processor"] = dict(
            type="TemplateProcessing",
            single=template,
            pair=template,
            special_tokens={"<s>": dict(id="<s>", ids=[1], tokens=["<s>"])},
        )
        file.write_text(json.dumps(tokenizer))

    model = references.make("llama-3.2")
    # transformers would draw ids that aren't the tokenizer's
    model.resize_token_embeddings(tokenizers.load(directory).vocab_size)
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", name="checkpoint")
def _checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), adds_bos=False)


def load_ours(directory, batch_size, sizes):
    """(HarnessModel of a checkpoint, its mesh)."""
    config = config_lib.default()
    config.init_from = str(directory)
    config.model.param_dtype = "float32"
    config = build.apply_hf_config(config.lock()).copy_and_resolve_references().unlock()
    config.mesh.update({"fsdp": 1, **sizes})
    tokenizer = tokenizers.load(directory)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    model = build.abstract_model(config, devices, tokenizer.vocab_size)
    params = hf.Checkpoint(directory).load(model.params)

    def make_generator(params, sampling):
        return Generator(
            model.model_config,
            model.graphdef,
            params,
            model.mesh,
            sampling,
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
        )

    eval_fns = build.make_eval_fns(model.graphdef, build.make_objective(config), model.mesh)
    eval_fns = dataclasses.replace(eval_fns, make_generator=make_generator)
    fns = PredictFns(eval_fns, batch_size=batch_size, length=LENGTH)
    return harness.HarnessModel(fns, params, tokenizer), model.mesh


def load_hf(directory):
    """The same checkpoint in lm_eval's own backend."""
    return HFLM(
        pretrained=str(directory), batch_size=4, max_length=LENGTH, dtype="float32", device="cpu"
    )


def evaluate(model, tasks, folder, **options):
    """(results, samples) of lm_eval: task -> metrics, task -> [each document's in order]."""
    report = lm_eval.simple_evaluate(
        model,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=10,
        log_samples=True,
        **options,
    )
    samples = {}
    for task, task_samples in report["samples"].items():
        samples[task] = sorted(task_samples, key=lambda sample: sample["doc_id"])
    return report["results"], samples


def as_loglikelihood(response):
    """(log-likelihood, whether it is greedy) of a response; rolling ones are a number only."""
    return response if isinstance(response, (list, tuple)) else (response, True)


def assert_same_responses(ours, theirs):
    """The same documents, and the same texts or log-likelihoods of each of their requests. Returns
    the largest difference.
    """
    largest = 0.0
    for our_sample, their_sample in zip(ours, theirs, strict=True):
        assert our_sample["doc_id"] == their_sample["doc_id"]
        assert our_sample["arguments"] == their_sample["arguments"]
        responses = zip(our_sample["filtered_resps"], their_sample["filtered_resps"], strict=True)
        for our_response, their_response in responses:
            # Generated texts are the same to the letter.
            if isinstance(our_response, str):
                assert our_response == their_response
                continue
            our_logprob, our_greedy = as_loglikelihood(our_response)
            their_logprob, their_greedy = as_loglikelihood(their_response)
            assert our_logprob == pytest.approx(their_logprob, abs=1e-3)
            assert our_greedy == their_greedy
            largest = max(largest, abs(our_logprob - their_logprob))
    return largest


@pytest.mark.parametrize(
    "adds_bos, batch_size, sizes",
    [(False, 8, dict(fsdp=1)), (True, 8, dict(fsdp=1)), (False, 4, dict(data=2, fsdp=2))],
    ids=str,
)
def test_all_kinds_of_requests(adds_bos, batch_size, sizes, tmp_path):
    checkpoint = make_checkpoint(tmp_path, adds_bos)
    tasks = write_tasks(tmp_path)
    model, mesh = load_ours(checkpoint, batch_size, sizes)

    with jax.set_mesh(mesh):
        results, samples = evaluate(model, tasks, tmp_path)
    their_results, their_samples = evaluate(load_hf(checkpoint), tasks, tmp_path)

    assert results.keys() == their_results.keys() == set(tasks)
    largest = 0.0
    for task in tasks:
        difference = assert_same_responses(samples[task], their_samples[task])
        largest = max(largest, difference)
        # Standard errors are of random bootstrap samples.
        for name, value in their_results[task].items():
            if isinstance(value, float) and "stderr" not in name:
                assert results[task][name] == pytest.approx(value, rel=1e-3), (task, name)
    # Texts, and not all the same.
    answers = {sample["filtered_resps"][0] for sample in samples["local_answers"]}
    assert len(answers) > 3
    print(f"largest difference of a log-likelihood: {largest:.1e}")


@pytest.fixture(name="harness_config")
def _harness_config(checkpoint, tiny, tmp_path):
    """A configuration that evaluates two local tasks, whose files are written."""
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
    return config


def test_as_an_entry_of_the_configuration(harness_config, tmp_path):
    """--mode=eval runs the tasks that config.evals names, and writes their report."""
    run = epath.Path(tmp_path / "run")

    values = evaluate_lib.evaluate(harness_config, run, jax.devices()[:1])

    assert "eval/local/local_choice/acc_norm" in values
    assert "eval/local/local_texts/word_perplexity" in values
    accuracy = values["eval/local/local_choice/acc"]

    # lm_eval's whole report.
    (report,) = run.glob("local-*.json")
    assert json.loads(report.read_text())["results"]["local_choice"]["acc,none"] == accuracy

    # What each document got.
    (predictions,) = (run / "predictions").glob("local-local_choice-*.jsonl")
    lines = list(map(json.loads, predictions.read_text().splitlines()))
    assert len(lines) == 12
    assert np.mean([line["scores"]["acc"] for line in lines]) == pytest.approx(accuracy)

    # The table at the end of a run has each task with its first metric.
    first_words = [line.split()[:2] for line in tables.headline(values).splitlines()]
    assert ["local/local_choice", "acc"] in first_words
    assert ["local/local_texts", "word_perplexity"] in first_words


def test_prompts_of_tasks(harness_config, tmp_path, capsys):
    """In predictions/, and printed: as lm_eval asks."""
    with harness_config.unlocked():
        harness_config.evals.local.tasks = ("local_topics", "local_texts", "local_answers")
    run = epath.Path(tmp_path / "run")
    values = evaluate_lib.evaluate(harness_config, run, jax.devices()[:1], show_prompts=2)

    (predictions,) = (run / "predictions").glob("local-local_topics-*.jsonl")
    lines = list(map(json.loads, predictions.read_text().splitlines()))
    documents = list(map(json.loads, (tmp_path / "topics.jsonl").read_text().splitlines()))
    assert [line["prompts"] for line in lines] == [[f"{d['text']}\n"] for d in documents]
    assert {tuple(line["continuations"]) for line in lines} == {("one", "the other one", "a hat")}
    # The longest of them have more than 64 tokens.
    num_cut = sum(line["cut"] > 0 for line in lines)
    assert 0 < num_cut < 12
    assert values["eval/local/local_topics/cut"] == num_cut

    shown = capsys.readouterr().out
    assert shown.count("--- local: local_") == 6
    assert f"{documents[1]['text']}\n⟫one | the other one | a hat\n" in shown
    text = json.loads((tmp_path / "texts.jsonl").read_text().splitlines()[0])["text"]
    assert f"⟫{text}\n" in shown
    assert "⟫cat\n" in shown


def test_predictions_are_compared(harness_config, tmp_path):
    run = epath.Path(tmp_path / "run")
    values = evaluate_lib.evaluate(harness_config, run, jax.devices()[:1])

    comparisons = comparison.compare_runs(run, run)

    assert set(comparisons) == {"local-local_choice"}  # six texts are too few
    result = comparisons["local-local_choice"]
    assert result["acc_norm"] == pytest.approx(values["eval/local/local_choice/acc_norm"])
    assert result["acc_difference"] == 0
    assert result["examples"] == 12


def test_tasks_that_lm_eval_does_not_have(harness_config, tmp_path):
    with harness_config.unlocked():
        harness_config.evals.local.tasks = ("local_choice", "nothing")

    with pytest.raises(ValueError, match=r"lm_eval has no tasks \['nothing'\] in .*: there are \["):
        evaluate_lib.evaluate(harness_config, epath.Path(tmp_path / "run"), jax.devices()[:1])


@pytest.mark.parametrize(
    "key, value, wanted",
    [("num_fewshot", -2, "-1 or above"), ("limit", -1, "0 or above"), ("tasks", (), "one task")],
)
def test_values_refused_when_it_is_built(key, value, wanted):
    values = dict(tasks=("local_choice",)) | {key: value}

    with pytest.raises(ValueError, match=rf"^config\.evals\.e\.{key} .*; wanted {wanted}"):
        harness.Harness(None, name="e", encoder=pack.Encoder(None, ""), **values)


def test_no_chat_template():
    encoder = pack.Encoder(tokenizers.ByteTokenizer(), "")
    with pytest.raises(ValueError, match="this checkpoint's tokenizer has no chat template"):
        harness.Harness(None, name="e", encoder=encoder, tasks=("piqa",), apply_chat_template=True)


def test_many_continuations_of_one_context(checkpoint, monkeypatch):
    """BLiMP's thousands all follow nothing: they don't become one row."""
    model, mesh = load_ours(checkpoint, 4, dict(fsdp=1))
    rows = []
    merge_trees = causal_answers.merge_trees

    def record_rows(trees, max_tokens):
        merged = merge_trees(trees, max_tokens)
        rows.extend(merged)
        return merged

    monkeypatch.setattr(causal_answers, "merge_trees", record_rows)
    # 100 continuations of 5 tokens: more than one row of 64 tokens holds.
    requests = []
    for i in range(100):
        continuation = np.random.default_rng(i).integers(0, 50, 5).tolist()
        requests.append((("", ""), [1], continuation))

    with jax.set_mesh(mesh):
        together = model._loglikelihood_tokens(requests)
        num_rows = len(rows)
        (alone,) = model._loglikelihood_tokens([requests[7]])

    # Several rows, none much longer than the model's, and the same log-probabilities.
    assert num_rows > 4
    assert max(len(row.tree.tokens) for row in rows) <= 2 * LENGTH
    assert together[7] == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("num_tokens", [80, 0])
def test_continuations_that_the_model_does_not_take(checkpoint, num_tokens):
    model, mesh = load_ours(checkpoint, 4, dict(fsdp=1))
    request = (("a", "b"), [1], [2] * num_tokens)

    with (
        pytest.raises(ValueError, match=f"has {num_tokens} tokens; wanted 1 to {LENGTH}"),
        jax.set_mesh(mesh),
    ):
        model._loglikelihood_tokens([request])


# --- our own tasks as lm_eval's ---

LABELS = ["one", "the other one", "a hat"]
# Tasks that both can say, as files of lm_eval ...
THEIR_TASKS = {
    "classification": dict(
        output_type="multiple_choice",
        doc_to_text="{{text}}\n",
        doc_to_target="label",
        doc_to_choice=LABELS,
        target_delimiter="",
        num_fewshot=2,
    ),
    "choice": dict(
        output_type="multiple_choice",
        doc_to_text="{{text}}:",
        doc_to_target="right",
        doc_to_choice="{{[a, b]}}",
        num_fewshot=1,
    ),
    "last": dict(
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target=" {{last}}",
    ),
}
# ... and as our evaluators with their arguments.
OUR_TASKS = {
    "classification": (
        classification.PromptClassification,
        dict(
            prompt=dict(templates=("{text}\n",), shots=2, sampler="first_n"),
            verbalizer=dict(
                words=(tuple((label, (label,)) for label in LABELS),), boundary="lm_eval"
            ),
        ),
    ),
    "choice": (
        choice.MultipleChoice,
        dict(
            prompt=dict(template="{text}:", shots=1, sampler="first_n"),
            choices=(" {a}", " {b}"),
            answer="right",
            boundary="lm_eval",
        ),
    ),
    "last": (
        choice.MultipleChoice,
        dict(
            prompt=dict(template="{text}"),
            choices=(" {last}",),
            answer="0",
            boundary="lm_eval",
        ),
    ),
}
# task -> (our metric, lm_eval's)
SAME_METRICS = {
    "classification": [("accuracy", "acc"), ("brier", "brier_score")],
    "choice": [("accuracy", "acc"), ("accuracy_char", "acc_norm"), ("accuracy_byte", "acc_bytes")],
    "last": [("accuracy", "acc"), ("perplexity", "perplexity")],
}


def write_shared_tasks(folder, names):
    """Writes THEIR_TASKS of these names, and their data."""
    write_shared_data(folder)
    data_files = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    for name in names:
        metrics = [theirs for _, theirs in SAME_METRICS[name]]
        write_task(
            folder,
            name,
            data_files,
            metrics,
            test_split="test",
            fewshot_split="train",
            **THEIR_TASKS[name],
        )


def write_shared_data(folder):
    """train.jsonl and test.jsonl, of a dozen documents each for all of THEIR_TASKS."""
    rng = random.Random(0)
    for split in ("train", "test"):
        documents = []
        for i in range(12):
            document = dict(
                text=draw_sentence(rng, 2, 6),
                a=draw_sentence(rng, 1, 3),
                # Never the same as `a`: of choices that tie, lm_eval takes the first, we take both.
                b=f"{draw_sentence(rng, 1, 3)} end",
                label=i % 3,
                right=i % 2,
                last=rng.choice(WORDS),
            )
            documents.append(document)
        write_jsonl(folder / f"{split}.jsonl", documents)


def run_own_task(folder, name, model, **prompt):
    """(values, the lines of predictions/) of one of OUR_TASKS.

    Args:
      prompt: other keys of its prompt.
    """
    cls, changes = OUR_TASKS[name]
    changes = changes | dict(prompt=changes["prompt"] | prompt)
    (folder / "own.toml").write_text(f'type = "{cls.__module__}.{cls.__name__}"')
    arguments = entries.task(
        str(folder / "own.toml"),
        source=dict(path=str(folder / "{split}.jsonl"), split="test", shots_split="train"),
        **changes,
    ).to_dict()
    for key in ("type", "every", "batch_size"):  # read by lm.build
        del arguments[key]

    encoder = pack.Encoder(model._tokenizer, "")
    evaluator = cls(model._predict_fns, name=name, encoder=encoder, **arguments)
    values = dict(evaluator.run(model._params))
    return values, list(map(json.loads, values["predictions"].content.splitlines()))


def continuation_logprobs(name, line):
    """The log-probability of each continuation in a line of predictions/."""
    if name != "classification":
        return line["logprobs"]
    # Of the only variant: label -> word -> log-probabilities of its tokens.
    variant = line["word_logprobs"][0]
    return [sum(variant[label][label]) for label in LABELS]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_our_own_tasks_in_lm_evals_mode(adds_bos, tmp_path):
    """Templates, examples, boundary, norms and scores: the same prompts, log-probabilities and
    metrics as lm_eval's from a task file that says the same.
    """
    checkpoint = make_checkpoint(tmp_path, adds_bos)
    write_shared_tasks(tmp_path, THEIR_TASKS)
    their_results, their_samples = evaluate(load_hf(checkpoint), list(THEIR_TASKS), tmp_path)

    # One task after the other by our evaluators.
    model, mesh = load_ours(checkpoint, 8, dict(fsdp=1))
    for name in OUR_TASKS:
        with jax.set_mesh(mesh):
            values, lines = run_own_task(tmp_path, name, model)

        for line, sample in zip(lines, their_samples[name], strict=True):
            wanted = [as_loglikelihood(response)[0] for response in sample["filtered_resps"]]
            if name == "last":
                wanted = wanted[:1]  # behind it lm_eval has whether it is greedy
            assert continuation_logprobs(name, line) == pytest.approx(wanted, abs=1e-3)
        for ours, theirs in SAME_METRICS[name]:
            wanted = their_results[name][f"{theirs},none"]
            assert values[ours] == pytest.approx(wanted, rel=1e-3), (name, ours)


# Of every message its text alone after a sign; answers follow theirs without a space.
CHAT_TEMPLATE = """{{ bos_token }}{% for m in messages %}{{ {'system': 'on ', 'user': 'of '}.get(
m.role, 'sat:') }}{{ m.content }}
{% endfor %}{% if add_generation_prompt %}sat:{% endif %}"""


def test_chats_are_lm_evals(tmp_path):
    """With a chat template, examples as turns and a system message: the harness entry's scores, and
    our own tasks', are those of lm_eval's own backend.
    """
    checkpoint = make_checkpoint(tmp_path, adds_bos=True)
    (checkpoint / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    names = ["classification", "choice"]
    write_shared_tasks(tmp_path, names)
    options = dict(
        apply_chat_template=True, fewshot_as_multiturn=True, system_instruction="the red cat"
    )
    their_results, their_samples = evaluate(load_hf(checkpoint), names, tmp_path, **options)
    assert their_samples["choice"][0]["arguments"][0][0].startswith("<s>on the red cat\nof ")

    model, mesh = load_ours(checkpoint, 8, dict(fsdp=1))
    with jax.set_mesh(mesh):
        entry = harness.Harness(
            model._predict_fns,
            name="h",
            encoder=pack.Encoder(model._tokenizer, ""),
            tasks=names,
            include_path=str(tmp_path),
            **options,
        )
        entry_values = dict(entry.run(model._params))
        for name in names:
            values, lines = run_own_task(tmp_path, name, model, format="chat", system="the red cat")
            for line, sample in zip(lines, their_samples[name], strict=True):
                wanted = [as_loglikelihood(response)[0] for response in sample["filtered_resps"]]
                assert continuation_logprobs(name, line) == pytest.approx(wanted, abs=1e-3)
            for ours, theirs in SAME_METRICS[name]:
                wanted = their_results[name][f"{theirs},none"]
                assert values[ours] == pytest.approx(wanted, rel=1e-3), (name, ours)
                assert entry_values[f"{name}/{theirs}"] == pytest.approx(wanted, rel=1e-3)
