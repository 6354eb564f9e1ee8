"""A run as a whole: its directory, what may change when it goes on, what it refuses, non-finite
steps, evals.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath

from lm import build, claim, evaluate, files, progress, stopping, telemetry, train
from lm import config as config_lib
from lm.data import loader
from lm.data import tokenizer as tokenizers
from lm.evals import entries, perplexity
from lm.evals.predict import Artifact
from tests.helpers import (
    PNG,
    VERBALIZER,
    assert_same_run,
    read_artifacts,
    read_checkpoint,
    read_jsonl,
    read_metrics,
    run_training,
    saved_steps,
    slow,
    snapshot,
    terminate_at,
    without_clock,
    write_corpus,
)

pytestmark = pytest.mark.usefixtures("fast_runs")


def evaluate_run(config, run, steps=""):
    return evaluate.evaluate(config, epath.Path(run), jax.devices()[:1], steps)


def values_of(lines, key):
    """The values of a metric, from the lines that have it."""
    return [line[key] for line in lines if key in line]


def steps_of(lines, key):
    """The steps of the lines that have a metric."""
    return [line["step"] for line in lines if key in line]


_FINISHED = {}


@pytest.fixture
def finished(small, tmp_path, tmp_path_factory):
    """(config, run directory) of a run with all kinds of evals that has ended: a copy, to do with
    as one likes.
    """
    small.update(dict(checkpoint=dict(every=2, keep=9)))
    small.evals.first = entries.perplexity(every=2, batch_size=8)
    small.evals.second = entries.classification(VERBALIZER, every=3, batch_size=8)
    small.evals.samples = entries.samples(("ab", "red cde"), every=2, max_new_tokens=4)
    small.lock()

    if not _FINISHED:
        _FINISHED["run"] = tmp_path_factory.mktemp("finished") / "run"
        _FINISHED["metrics"] = run_training(small, _FINISHED["run"])
    shutil.copytree(_FINISHED["run"], tmp_path / "run")
    return small, tmp_path / "run"


# The files and metrics of a run.


@pytest.mark.usefixtures("drawn_pictures")
def test_run_directory_is_complete(small, tmp_path):
    small.evals.labels = entries.classification(VERBALIZER, every=3, batch_size=8)
    small.evals.samples = entries.samples(("ab",), every=3, max_new_tokens=4)
    small.evals.validation = entries.perplexity(every=3, batch_size=8)

    run = tmp_path / "run"
    returned = run_training(small.lock(), run)

    pictures = {"curves.png", "confusion-labels.png", "reliability-labels.png"}
    assert {p.name for p in run.iterdir()} == pictures | {
        "config.json",
        "run.json",
        "metrics.jsonl",
        "samples.md",
        "predictions",
        "tokenizer",
        "checkpoints",
        "tensorboard",
    }
    assert json.loads((run / "config.json").read_text()) == json.loads(json.dumps(small.to_dict()))
    summary = json.loads((run / "run.json").read_text())
    assert summary["finished"] and summary["total_steps"] == 6
    assert returned["train/flops"] == 6 * summary["flops_per_step"]
    for name in pictures:
        assert (run / name).read_bytes().startswith(PNG)
    assert tokenizers.load(run / "tokenizer").fingerprint == "bytes-1"
    samples = (run / "samples.md").read_text().splitlines()
    headings = [line for line in samples if line.startswith("## ")]
    assert headings == ["## Step 3", "## Step 6"]
    assert sorted(p.name for p in (run / "predictions").iterdir()) == [
        "labels-3.jsonl",
        "labels-6.jsonl",
        "labels-about-3.json",
        "labels-about-6.json",
        "labels-priors-3.json",
        "labels-priors-6.json",
    ]
    assert len(read_jsonl(run / "predictions" / "labels-6.jsonl")) == 16
    about = json.loads((run / "predictions" / "labels-about-6.json").read_text())
    assert about["examples"] == 16
    assert about["prompts"][0]["template"] == "{text}\n="
    assert about["settings"]["aggregate"] == "sum"
    assert about["settings"]["length"] == 32
    assert saved_steps(run) == [6]

    # What is returned is the last value of every metric.
    last_values = {}
    for line in read_jsonl(run / "metrics.jsonl"):
        last_values |= line
    assert without_clock(returned) == without_clock(last_values)


def test_metrics_of_a_run(finished):
    _, run = finished
    lines = read_jsonl(run / "metrics.jsonl")
    train_metrics = {
        "train/loss",
        "train/grad_norm",
        "train/update_norm",
        "train/updates_lost",
        "train/learning_rate",
        "train/skipped_steps",
        "train/batch_hash",
    }
    eval_metrics = {
        "eval/first/": {"loss", "bits_per_byte", "perplexity"},
        "eval/second/": {"accuracy", "nll", "ece", "macro_f1"},
    }

    train_lines = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train_lines] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() >= train_metrics for line in train_lines)
    # The first line has compilation in it, and no speed: curves would begin at 0.
    has_speed = ["train/tokens_per_second" in line for line in train_lines]
    assert has_speed == [False, True, True, True, True, True]
    assert len({line["train/batch_hash"] for line in train_lines}) == 6

    for prefix, names in eval_metrics.items():
        eval_lines = [line for line in lines if f"{prefix}seconds" in line]
        every = 2 if prefix == "eval/first/" else 3
        assert [line["step"] for line in eval_lines] == list(range(every, 7, every))
        for line in eval_lines:
            assert line.keys() >= {prefix + name for name in names}


def test_where_the_time_goes(finished):
    _, run = finished
    lines = read_jsonl(run / "metrics.jsonl")
    # Evals have lines of their own, without it.
    lines = [line for line in lines if "train/goodput" in line]

    # Seconds are summed up since the start.
    for before, line in zip(lines, lines[1:]):
        assert 0 < line["train/goodput"] < 1
        for activity in ("first_step", "data", "evals", "checkpoints"):
            name = f"train/seconds_{activity}"
            assert line[name] >= before[name]
    for activity in ("first_step", "evals", "checkpoints"):
        assert lines[-1][f"train/seconds_{activity}"] > 0


def test_what_takes_long_is_said(small, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    run_training(small, tmp_path / "run")
    for activity in (f"reading {small.data.source_args.path}", "compiling the train step"):
        assert any(message.startswith(f"{activity} took") for message in caplog.messages), activity
    assert any(message.startswith("first step after") for message in caplog.messages)


def test_a_run_without_evals_has_its_curves_and_profile(small, tmp_path):
    run = tmp_path / "run"
    train.train(small.lock(), epath.Path(run), jax.devices()[:1], (3, 5))
    assert (run / "curves.png").read_bytes().startswith(PNG)
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1


def test_logged_means_are_over_the_interval(small, tmp_path):
    run_training(small, tmp_path / "each")
    small.train.log_every = 4
    run_training(small, tmp_path / "fourth")
    each, fourth = read_metrics(tmp_path / "each"), read_metrics(tmp_path / "fourth")

    # Every fourth step, and the last.
    assert [line["step"] for line in fourth] == [4, 6]
    norms = values_of(each, "train/grad_norm")
    means = [np.mean(norms[:4]), np.mean(norms[4:])]
    assert values_of(fourth, "train/grad_norm") == pytest.approx(means, rel=1e-12)
    assert fourth[0]["train/batch_hash"] == each[3]["train/batch_hash"]


def test_evals_do_not_depend_on_how_often(finished, tmp_path):
    config, run = finished
    for name in config.evals:
        config.evals[name].every = 0
    config.checkpoint.every = 0
    run_training(config, tmp_path / "end")

    lines = read_metrics(tmp_path / "end")
    wanted = [line for line in read_metrics(run) if "train/loss" in line or line["step"] == 6]
    assert lines == wanted
    assert [line["step"] for line in lines if "train/loss" not in line] == [6, 6, 6]
    assert read_checkpoint(tmp_path / "end", 6)[0] == read_checkpoint(run, 6)[0]


# A run that goes on.


def test_finished_run_started_again_changes_nothing(finished, monkeypatch):
    config, run = finished
    before = snapshot(run)

    def fail(*unused):
        pytest.fail("evaluated again")

    monkeypatch.setattr(perplexity.Perplexity, "run", fail)
    returned = run_training(config, run)
    assert without_clock(returned) == without_clock(_FINISHED["metrics"])

    after = snapshot(run)
    for name in before.keys() | after.keys():
        assert before.get(name) == after.get(name) or name.startswith("tensorboard/"), name


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer.learning_rate": 0.5},
        {"seed": 7, "train.accumulation": 2},
        {"data.packing": "concat_then_split"},
        {"model.embed_dim": 16},
    ],
)
def test_run_directory_of_another_config_is_refused(finished, change):
    config, run = finished
    before, old = snapshot(run), config_lib.flatten(config)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match="another configuration") as caught:
        run_training(config, run)

    listed = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert listed == [f"  {key}: {old[key]!r} there, {change[key]!r} now" for key in sorted(change)]
    assert snapshot(run) == before


def test_config_of_the_checkpoint_counts_too(finished):
    config, run = finished
    (run / "config.json").unlink()
    before = snapshot(run)
    config.seed = 7
    with pytest.raises(ValueError, match="another configuration:\n  seed: 0 there, 7 now"):
        run_training(config, run)
    assert snapshot(run) == before


def test_what_may_change_when_a_run_goes_on(finished):
    config, run = finished
    old_lines = read_metrics(run)
    with config.unlocked():
        del config.evals["second"]
        config.evals.other = entries.perplexity(every=1, batch_size=4, max_documents=3)
    config.update_from_flattened_dict(
        {
            "train.length": "8 steps",
            "train.log_every": 2,
            "train.nonfinite": "skip",
            "checkpoint.every": 1,
            "checkpoint.keep": 1,
            "evals.first.every": 1,
            "model.remat": "full",
            "mesh.data": -1,
        }
    )
    values = run_training(config, run)
    assert values["step"] == 8
    assert saved_steps(run) == [8]

    lines = read_metrics(run)
    assert lines[: len(old_lines)] == old_lines
    new_lines = lines[len(old_lines) :]
    assert steps_of(new_lines, "train/loss") == [8]
    # It is new, and due at the step that the run starts from.
    assert steps_of(new_lines, "eval/other/loss") == [6, 7, 8]
    assert steps_of(new_lines, "eval/first/loss") == [7, 8]
    assert json.loads((run / "config.json").read_text())["train"]["length"] == "8 steps"


def test_a_run_may_take_its_tokenizer_from_its_own_folder(finished):
    """As the error of another tokenizer advises: the fingerprint says that it is the same."""
    config, run = finished
    config.tokenizer.path = str(run / "tokenizer")
    config.train.length = "7 steps"
    assert run_training(config, run)["step"] == 7


def test_shorter_than_the_restored_step_is_refused(finished):
    config, run = finished
    before = snapshot(run)
    config.train.length = "5 steps"
    message = r"is at step 6, past config.train.length = '5 steps' \(5 steps\)"
    with pytest.raises(ValueError, match=message):
        run_training(config, run)
    assert snapshot(run) == before


def test_changed_corpus_is_refused(small, tmp_path):
    corpus, run = tmp_path / "own.jsonl", tmp_path / "run"
    write_corpus(corpus)
    small.data.source_args.path = str(corpus)
    small.checkpoint.every = 4
    run_training(small, run)
    shutil.rmtree(run / "checkpoints/6")

    # One word of one document.
    before, text = snapshot(run), corpus.read_text()
    corpus.write_text(text.replace("ab", "ac", 1))
    with pytest.raises(ValueError, match="trained on a corpus with fingerprint .* have changed"):
        run_training(small, run)
    assert snapshot(run) == before

    corpus.write_text(text)
    assert run_training(small, run)["step"] == 6


def test_best_names_a_metric_of_an_eval(small, tmp_path):
    small.checkpoint.best = "eval/nothing/loss"
    with pytest.raises(ValueError, match="config.checkpoint.best = 'eval/nothing/loss'"):
        run_training(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Weights of another run.


def test_init_from_takes_the_weights_only(finished, tmp_path):
    config, source = finished
    before, run = snapshot(source), tmp_path / "new"
    # With a learning rate of 0 the weights are still those of the source at the end, and the rest
    # of the state is new.
    config.update_from_flattened_dict(
        {
            "init_from": str(source),
            "optimizer.learning_rate": 0.0,
            "train.length": "3 steps",
            "seed": 5,
        }
    )
    with config.unlocked():
        config.evals = {}
    run_training(config, run)

    source_state, _ = read_checkpoint(source, 6)
    state, _ = read_checkpoint(run, 3)
    params = [path for path in state if path.startswith("params/")]
    assert params
    assert all(state[path] == source_state[path] for path in params)
    _, _, step = state["step"]
    assert np.frombuffer(step, np.int32) == 3
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]
    assert snapshot(source) == before

    # It goes on by itself: the source is needed at the start only.
    shutil.rmtree(source)
    shutil.rmtree(run / "checkpoints/3")
    assert run_training(config, run)["step"] == 3


def test_init_from_a_model_without_the_head(finished, tmp_path):
    """The head is drawn if the configuration says so; the other weights are the source's."""
    config, source = finished
    config.update_from_flattened_dict(
        {"init_from": str(source), "optimizer.learning_rate": 0.0, "train.length": "3 steps"}
    )
    config.model.heads = "classes:3"
    with config.unlocked():
        config.evals = {}
    message = r"has no \['heads/classes/weight'\]; config.init_new = 'heads/\*'"
    with pytest.raises(ValueError, match=message):
        run_training(config, tmp_path / "new")

    config.init_new = "heads/*"
    run_training(config, tmp_path / "new")
    source_state, _ = read_checkpoint(source, 6)
    state, _ = read_checkpoint(tmp_path / "new", 3)
    _, shape, values = state["params/heads/classes/weight"]
    assert shape[1] == 3 and values.count(0) < len(values) / 2
    for path in source_state:
        if path.startswith("params/"):
            assert state[path] == source_state[path], path

    # A source that has it gives it.
    config.update_from_flattened_dict({"init_from": str(tmp_path / "new"), "init_new": ""})
    run_training(config, tmp_path / "next")
    next_state, _ = read_checkpoint(tmp_path / "next", 3)
    path = "params/heads/classes/weight"
    assert next_state[path] == state[path]


def test_init_from_checks_the_tokenizer(finished, tmp_path):
    config, source = finished
    config.update_from_flattened_dict(
        {"init_from": str(source), "tokenizer.kind": "sentencepiece", "tokenizer.vocab_size": 280}
    )
    message = r"(?s)bytes-1.*sentencepiece-[0-9a-f]{16}"
    with pytest.raises(ValueError, match=message):
        run_training(config, tmp_path / "new")
    with pytest.raises(ValueError, match=message):
        evaluate_run(config, tmp_path / "eval")


def test_init_from_nothing(small, tmp_path, monkeypatch):
    """It is said before data are read, and nothing is written."""
    small.init_from = str(tmp_path / "nowhere")
    monkeypatch.setattr(build, "documents", None)
    for command in (run_training, evaluate_run):
        with pytest.raises(ValueError, match="config.init_from = .*nowhere' has no checkpoint"):
            command(small, tmp_path / "run")
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "run").exists()


# Evaluation without training.


def test_evaluate_reproduces_the_evals_of_the_run(finished, tmp_path):
    config, run = finished
    wanted = {}
    for line in read_metrics(run):
        if line["step"] == 6:
            wanted |= {key: value for key, value in line.items() if key.startswith("eval/")}
    before = read_artifacts(run)

    assert evaluate_run(config, run) == wanted
    assert len(wanted) > 10
    # The same predictions and samples again.
    assert read_artifacts(run) == before

    saved = json.loads((run / "eval-6.json").read_text())
    assert saved["step"] == 6
    assert {key: value for key, value in saved.items() if key.startswith("eval/")} == wanted
    assert saved["versions"]["jax"] == jax.__version__
    assert saved["tokenizer"] == "bytes-1"
    assert saved["config"]["evals"].keys() == saved["evals"].keys()
    assert saved["evals"]["second"]["fingerprint"]
    assert saved["evals"]["second"]["examples"] == wanted["eval/second/examples"]

    # A metric and its interval are one row of the report.
    report = (run / "eval-6.md").read_text()
    accuracy = wanted["eval/second/accuracy"]
    low, high = wanted["eval/second/accuracy_low"], wanted["eval/second/accuracy_high"]
    assert f"| accuracy | {accuracy:.4f} | {low:.4f} to {high:.4f} |" in report
    assert "| accuracy_low |" not in report

    # From elsewhere too.
    config.init_from = str(run)
    assert evaluate_run(config, tmp_path / "elsewhere") == wanted
    predictions = tmp_path / "elsewhere" / "predictions" / "second-6.jsonl"
    assert predictions.read_bytes() == before["second-6.jsonl"]


def test_evaluate_needs_no_training_data(finished, tmp_path):
    config, run = finished
    # A task with data of its own.
    task = f'''type = "lm.evals.choice.MultipleChoice"
choices = ["{{a}}"]
answer = "0"
source = {{ path = "{tmp_path}/t.jsonl" }}'''
    (tmp_path / "t.toml").write_text(task)
    (tmp_path / "t.jsonl").write_text('{"a": "red"}\n{"a": "blue"}\n')
    with config.unlocked():
        config.data.source_args.path = "nowhere"
        config.evals = dict(t=entries.task(str(tmp_path / "t.toml")))
        config.init_from = str(run)

    assert evaluate_run(config, tmp_path / "new")["eval/t/examples"] == 2
    with pytest.raises(ValueError, match="no file at nowhere"):
        run_training(config, tmp_path / "train")


def test_evaluate_all_checkpoints(finished):
    config, run = finished
    steps = saved_steps(run)
    assert len(steps) > 1
    losses = {}
    for line in read_metrics(run):
        if "eval/first/loss" in line:
            losses[line["step"]] = line["eval/first/loss"]
    assert len(set(losses.values())) > 1

    # Each has a file of its own, and the newest one's metrics are returned.
    newest = evaluate_run(config, run, "all")
    for step in steps:
        saved = json.loads((run / f"eval-{step}.json").read_text())
        assert saved["eval/first/loss"] == losses[step]
    assert newest["eval/first/loss"] == losses[steps[-1]]
    assert (run / "eval-curves.png").read_bytes().startswith(PNG)


def test_evaluate_one_checkpoint(finished, tmp_path):
    config, run = finished
    steps = saved_steps(run)
    first = str(steps[0])
    config.init_from = str(run)
    with config.unlocked():
        config.evals = dict(first=config.evals.first)
    loss = evaluate_run(config, tmp_path / "new", first)["eval/first/loss"]
    assert loss == next(
        line["eval/first/loss"] for line in read_metrics(run) if "eval/first/loss" in line
    )

    for wanted in ("1000", f"{first},x", "newest"):
        message = (
            rf"--steps={wanted}: .* has checkpoints of the steps \[{first}, .*"
            "wanted some of them, with commas, or all"
        )
        with pytest.raises(ValueError, match=message):
            evaluate_run(config, tmp_path / "new", wanted)

    # A checkpoint of which a part is missing.
    files = [p for p in (run / "checkpoints" / first).rglob("*") if p.is_file()]
    next(path for path in files if "manifest" in path.name).unlink()
    with pytest.raises(ValueError, match=f"no checkpoint of step {first} that can be read"):
        evaluate_run(config, tmp_path / "new", first)


def test_moving_average_is_what_is_evaluated(small, tmp_path):
    small.evals.validation = entries.perplexity(every=3, batch_size=8)
    run_training(small, tmp_path / "plain")
    small.optimizer.ema_decay = 0.9
    run_training(small, tmp_path / "ema")

    # Training is the same, but for last bits: it is another program.
    plain_lines, ema_lines = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "ema")
    np.testing.assert_allclose(
        values_of(ema_lines, "train/loss"), values_of(plain_lines, "train/loss"), rtol=1e-5
    )

    # Training lowers the loss, and the average lags behind it.
    plain = values_of(plain_lines, "eval/validation/loss")
    ema = values_of(ema_lines, "eval/validation/loss")
    assert ema[0] > plain[0]
    assert ema[1] > plain[1]
    assert ema[0] > ema[1]
    assert evaluate_run(small, tmp_path / "ema")["eval/validation/loss"] == ema[1]


# Samples, and disks that are full.


def test_samples_have_each_step_once_after_a_resume(finished):
    config, run = finished
    before = (run / "samples.md").read_bytes()
    assert before.count(b"## Step ") == 3
    # As if killed between the evals at step 6 and its checkpoint.
    shutil.rmtree(run / "checkpoints" / "6")
    run_training(config, run)
    assert (run / "samples.md").read_bytes() == before


def test_samples_may_look_like_our_own_headings(small, tmp_path):
    """With Markdown in the corpus, "## Step 1: install" and "## Step 9" are what a model writes."""
    prompts = ("a\n## Step 1: b", "\n## Step 9\n{step}")
    small.evals.samples = entries.samples(prompts, every=3, max_new_tokens=4)
    run_training(small, tmp_path / "run")

    text = (tmp_path / "run" / "samples.md").read_text()
    for part in ("## Step 1: b⟫", "## Step 9\n", "{step}⟫"):
        assert text.count(part) == 2
    headings = [line for line in text.splitlines() if line in ("## Step 3", "## Step 6")]
    assert headings == ["## Step 3", "## Step 6"]


def fail_to_write(monkeypatch, name):
    """Files with `name` in theirs are written in part, and then the disk is full."""
    real_open = files.open_whole

    @contextlib.contextmanager
    def open_whole(path):
        with real_open(path) as file:
            yield file
            if name in path.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open_whole", open_whole)


def test_samples_of_earlier_steps_survive_a_failed_write(tmp_path, monkeypatch):
    samples = Artifact("samples.md", "## Step {step}\n\ntext\n", append=True)
    evaluate.write_artifact(epath.Path(tmp_path), samples, 1)
    before = (tmp_path / "samples.md").read_text()

    fail_to_write(monkeypatch, "samples")
    with pytest.raises(OSError, match="No space"):
        evaluate.write_artifact(epath.Path(tmp_path), samples, 2)
    assert (tmp_path / "samples.md").read_text() == before


def test_damaged_samples_are_named(tmp_path):
    samples = Artifact("samples.md", "text\n", append=True)
    (tmp_path / "samples.md").write_bytes(b"\xb7")
    with pytest.raises(ValueError, match=r"samples\.md is not UTF-8"):
        evaluate.write_artifact(epath.Path(tmp_path), samples, 2)


def test_failed_write_of_the_config_does_not_end_the_run_for_ever(finished, monkeypatch):
    config, run = finished
    with monkeypatch.context() as patch:
        fail_to_write(patch, "config.json")
        with pytest.raises(OSError, match="No space"):
            run_training(config, run)

    assert run_training(config, run)["step"] == 6
    assert json.loads((run / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))


# Steps that are not finite.

BAD_OBJECTIVE = '''
import jax.numpy as jnp
from lm.objectives.causal import make_loss as make_causal_loss, token_logprobs


def make_loss(**arguments):
    """The causal loss, not a number for a batch with the token 1 in it."""
    causal = make_causal_loss(**arguments)

    def loss(model, batch, key):
        value, count, terms = causal(model, batch, key)
        value = jnp.where((batch["tokens"] == 1).any(), jnp.nan, value)
        return value, count, terms | {"loss": (value, count)}
    return loss
'''

_POISONED = {}


def poison(config, path):
    """Writes the corpus to `path` with the token 1 in one document, which a run of 10 steps meets
    first in step 4 to 7; returns (the batches' hashes, which of them have it).
    """
    lines = open(config.data.source_args.path).read().splitlines()
    documents = [json.loads(line) for line in lines]
    config.data.source_args.path = str(path)
    for number, document in enumerate(documents):
        poisoned = json.dumps(document | {"text": document["text"] + "\x01"})
        path.write_text("\n".join([*lines[:number], poisoned, *lines[number + 1 :]]) + "\n")

        training = build.build(config, jax.devices()[:1]).make_loader()
        batches = [training.next(None) for _ in range(10)]
        training.close()
        is_bad = [bool((np.asarray(batch["tokens"]) == 1).any()) for batch, _ in batches]
        if any(is_bad) and 3 <= is_bad.index(True) <= 6:
            return [batch_hash for _, batch_hash in batches], is_bad
    raise AssertionError("no document of the corpus comes in the steps 4 to 7")


@pytest.fixture
def poisoned(small, tmp_path, tmp_path_factory, monkeypatch):
    """(config whose run meets a batch that gives NaN, the batches' hashes, which of them are
    bad).
    """
    (tmp_path / "bad_objective.py").write_text(BAD_OBJECTIVE)
    monkeypatch.syspath_prepend(str(tmp_path))
    small.objective.type = "bad_objective"
    small.train.update(dict(length="10 steps", log_every=1))

    path = tmp_path_factory.getbasetemp() / "poisoned.jsonl"
    if not _POISONED:
        _POISONED["hashes"], _POISONED["is_bad"] = poison(small, path)
    small.data.source_args.path = str(path)
    return small.lock(), _POISONED["hashes"], _POISONED["is_bad"]


@pytest.mark.parametrize("checkpoint_every", [0, slow(2), slow(1)])
def test_nonfinite_halts_with_the_last_good_state(
    poisoned, tmp_path, monkeypatch, checkpoint_every
):
    config, hashes, is_bad = poisoned
    first = is_bad.index(True) + 1
    config.checkpoint.every = checkpoint_every
    run = tmp_path / "run"

    # Started again, it meets the same batch.
    message = rf"^step {first} is not finite: loss nan.*hash {hashes[first - 1]}"
    for _ in range(2):
        with pytest.raises(train.NonFinite, match=message):
            run_training(config, run)
        assert max(saved_steps(run)) == first - 1
        assert [line["step"] for line in read_metrics(run)] == list(range(1, first))

    # It can still go on by skipping.
    config.train.nonfinite = "skip"
    values = run_training(config, run)
    assert values["step"] == 10
    assert values["train/skipped_steps"] == sum(is_bad)
    lines = read_metrics(run)
    assert values_of(lines, "train/batch_hash") == hashes
    assert values_of(lines, "train/skipped_steps") == np.cumsum(is_bad).tolist()

    # Like a run that was stopped before that batch, and then skipped it.
    config.train.nonfinite = "halt"
    with monkeypatch.context() as patch:
        terminate_at(patch, loader.Loader, "next", first - 1)
        with pytest.raises(stopping.Stopped):
            run_training(config, tmp_path / "stopped")
    config.train.nonfinite = "skip"
    run_training(config, tmp_path / "stopped")
    assert_same_run(run, tmp_path / "stopped", 10)


def test_nonfinite_state_is_that_of_the_step_before(poisoned, tmp_path):
    config, _, is_bad = poisoned
    last_good = is_bad.index(True)
    with pytest.raises(train.NonFinite):
        run_training(config, tmp_path / "run")

    # Saved as it was due, before the bad batch was seen.
    config.checkpoint.every = last_good
    with pytest.raises(train.NonFinite):
        run_training(config, tmp_path / "saving")

    state, meta = read_checkpoint(tmp_path / "run", last_good)
    wanted_state, wanted_meta = read_checkpoint(tmp_path / "saving", last_good)
    del state["halted"], wanted_state["halted"]
    assert state == wanted_state
    assert meta["streams"] == wanted_meta["streams"]


def test_progress_shows_a_step_without_a_loss(poisoned, tmp_path, monkeypatch, capsys):
    config, _, is_bad = poisoned
    # Every step has its line, as on a terminal.
    monkeypatch.setattr(telemetry.progress, "SECONDS_BETWEEN_LINES", 0.0)
    config.train.nonfinite = "skip"
    run_training(config, tmp_path / "run")
    assert f"step {is_bad.index(True) + 2}/10" in capsys.readouterr().err


# Signals.


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_stop_signal_puts_the_old_handlers_back():
    before = handlers()
    with stopping.StopSignal() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.at_step(1)
        with pytest.raises(stopping.Stopped):
            stop.check()
    assert handlers() == before

    with pytest.raises(ZeroDivisionError), stopping.StopSignal():
        raise ZeroDivisionError
    assert handlers() == before


def test_second_interrupt_is_not_waited_for():
    with stopping.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.at_step(1)
        # A SIGTERM after it does not interrupt.
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            stop.check()


def test_handlers_are_back_after_an_error(small, tmp_path):
    before = handlers()
    small.data.streams = 3
    with pytest.raises(ValueError, match="config.data.streams = 3"):
        run_training(small, tmp_path / "run")
    assert handlers() == before


# Evals that fail, and the best checkpoint.


class Failing:
    """An evaluator that fails when it runs."""

    metrics = ("accuracy",)

    def __init__(self, predict_fns, *, name, encoder):
        pass

    def run(self, params):
        raise RuntimeError("no such luck")


def test_an_eval_that_fails_costs_no_step(small, tmp_path):
    small.train.length = "6 steps"
    small.evals.text = entries.perplexity(every=0, batch_size=8)
    entry = dict(type="tests.test_train.Failing", every=4, batch_size=8)
    small.evals.failing = config_lib.ConfigDict(entry)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such luck"):
            run_training(small, tmp_path / "run")
        assert saved_steps(tmp_path / "run") == [4]

    del small.evals.failing
    run_training(small, tmp_path / "run")
    run_training(small, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)


class Counting:
    """An evaluator whose accuracy and loss are highest at the second of its evaluations."""

    metrics = ("accuracy", "loss")

    def __init__(self, predict_fns, *, name, encoder):
        self._values = iter([0.2, 0.9, 0.5])

    def run(self, params):
        value = next(self._values)
        yield "accuracy", value
        yield "loss", value


@pytest.mark.parametrize("metric, best", [("accuracy", 4), ("loss", 2)])
def test_best_is_the_highest_of_what_is_better_higher(small, tmp_path, metric, best):
    small.train.length = "6 steps"
    entry = dict(type="tests.test_train.Counting", every=2, batch_size=8)
    small.evals.count = config_lib.ConfigDict(entry)
    small.checkpoint.update(dict(every=2, keep=1, best=f"eval/count/{metric}"))
    run_training(small, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [best, 6]


@pytest.mark.parametrize(
    "best, message",
    [
        ("eval/count/acuracy", r"'acuracy' is no metric of config.evals.count.*\['accuracy'"),
        ("eval/count/seconds", "'seconds' is no metric of config.evals.count"),
        ("eval/other/loss", "is not a metric of config.evals; such as .*eval/count/accuracy"),
        ("loss", "is not a metric of config.evals"),
    ],
)
def test_a_misspelt_best_is_refused(small, tmp_path, best, message):
    small.evals.count = config_lib.ConfigDict(
        dict(type="tests.test_train.Counting", every=2, batch_size=8)
    )
    small.checkpoint.best = best
    with pytest.raises(ValueError, match=f"config.checkpoint.best = '{best}'.*{message}"):
        run_training(small, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_workdir_has_one_writer(small, tmp_path):
    run = tmp_path / "run"
    with claim.Claim(epath.Path(run)):
        with pytest.raises(claim.Taken, match=f"process {os.getpid()} on .*another --workdir"):
            run_training(small, run)
        assert [path.name for path in run.iterdir()] == ["CLAIM.json"]

    run_training(small, run)
    assert not (run / "CLAIM.json").exists()


def test_a_run_that_lost_its_claim_writes_nothing_more(small, tmp_path, monkeypatch):
    run = tmp_path / "run"
    small.checkpoint.every = 2
    real_save = train.Run.save

    def lose_and_save(self, step, streams):
        (run / "CLAIM.json").unlink()
        real_save(self, step, streams)

    monkeypatch.setattr(train.Run, "save", lose_and_save)
    with pytest.raises(claim.Lost):
        run_training(small, run)
    assert not saved_steps(run)
