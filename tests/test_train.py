"""A run as a whole: its directory, what may change when it goes on, what it refuses, non-finite
steps, evals. Also helpers for other files.
"""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import COLOURS, write_corpus
from etils import epath

from lm import build, checkpoint, evaluate, stopping, telemetry, train
from lm import config as config_lib
from lm import step as step_lib
from lm.data import tokenizer as tokenizers
from lm.evals import entries, perplexity
from lm.evals.predict import Artifact

PNG = b"\x89PNG\r\n\x1a\n"
CLOCK = ("tokens_per_second", "mfu", "seconds", "goodput")  # what two runs never share
VERBALIZER = {colour: (" " + colour,) for colour in COLOURS}

# What is compiled once, however many runs: an Experiment holds nothing that changes, and jax.jit
# knows a function that it has seen.
_EXPERIMENTS = {}
_EVAL_STEPS = [
    (module, name, functools.cache(getattr(module, name)))
    for module, name in [
        (step_lib, "make_token_logprobs"),
        (step_lib, "make_tree_logprobs"),
    ]
]


def build_once(config, devices, *, training=True, real=build.build):
    """`build.build`, which compiles nothing twice. The key is all that compiled programs depend
    on.
    """
    free = (
        "evals.",
        "checkpoint.",
        "data.source",
        "data.cache_dir",
        "train.log_every",
        "init_from",
    )
    key = json.dumps(
        [
            {k: v for k, v in config_lib.flatten(config).items() if not k.startswith(free)},
            [d.id for d in devices],
        ]
    )
    if key not in _EXPERIMENTS:
        _EXPERIMENTS[key] = real(config, devices, training=training)
    documents = build.documents(config, config.data.split) if training else None
    experiment = _EXPERIMENTS[key]
    program = dataclasses.replace(experiment.program, config=config)
    return dataclasses.replace(experiment, program=program, train_documents=documents)


@pytest.fixture(autouse=True, name="quick")
def _quick(monkeypatch, tmp_path_factory):
    """Runs in half a second: programs are compiled fast and once, also by subprocesses, and the
    curves are not drawn (`quick()` draws them).
    """
    options = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    for name, value in options.items():
        monkeypatch.setenv(name.upper(), str(value))
        jax.config.update(name, value)
    monkeypatch.setattr(build, "build", build_once)
    for module, name, cached in _EVAL_STEPS:
        monkeypatch.setattr(module, name, cached)
    draw = telemetry.plot_curves
    monkeypatch.setattr(telemetry, "plot_curves", lambda lines: PNG)
    yield lambda: monkeypatch.setattr(telemetry, "plot_curves", draw)
    for name, value in {
        "jax_disable_most_optimizations": False,
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 1.0,
    }.items():
        jax.config.update(name, value)


@pytest.fixture(name="small")
def _small(tiny, tmp_path_factory):
    """`tiny`, unlocked, with one layer, and with one corpus for all tests, since documents are
    named by their file.
    """
    path = tmp_path_factory.getbasetemp() / "corpus.jsonl"
    if not path.exists():
        write_corpus(path)
    tiny.unlock()
    tiny.data.source_args.path = str(path)
    tiny.model.num_layers = 1
    return tiny


def go(config, run, devices=1):
    return train.train(config, epath.Path(run), jax.devices()[:devices])


def read_lines(run):
    """The lines of metrics.jsonl, without what depends on the clock."""
    return [
        {k: v for k, v in json.loads(line).items() if not any(word in k for word in CLOCK)}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def without_clock(values):
    return {k: v for k, v in values.items() if not any(word in k for word in CLOCK)}


def arrays(run, step):
    """{path: (dtype, shape, bytes)} of everything in a checkpoint's state, and its meta."""
    checkpointer = checkpoint.Checkpointer(epath.Path(run) / "checkpoints", keep=99)
    stored = checkpointer._manager.item_metadata(step).state.tree
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
        for path, leaf in stored.items()
    }
    state, meta = checkpointer.restore(step, abstract)
    checkpointer.close()
    return {
        path: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for path, leaf in state.items()
    }, meta


def artifacts(run):
    return {p.name: p.read_bytes() for p in [*run.glob("predictions/*"), *run.glob("samples.md")]}


def assert_same_run(run, reference, step):
    """Bit-equal: all arrays of the state, stream states, figures under way, every line of the
    metrics, predictions.
    """
    (state, meta), (state0, meta0) = arrays(run, step), arrays(reference, step)
    assert [
        path for path in state0 if state.get(path) != state0[path]
    ] == [] and state.keys() == state0.keys()
    for key in (meta.keys() | meta0.keys()) - {"config"}:
        assert meta[key] == meta0[key], key
    ours, theirs = read_lines(run), read_lines(reference)
    assert ours == theirs
    assert artifacts(run) == artifacts(reference)


def snapshot(directory):
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


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
        _FINISHED["metrics"] = go(small, _FINISHED["run"])
    shutil.copytree(_FINISHED["run"], tmp_path / "run")
    return small, tmp_path / "run"


def test_run_directory_is_complete(small, tmp_path, quick):
    quick()
    small.evals.labels = entries.classification(VERBALIZER, every=3, batch_size=8)
    small.evals.samples = entries.samples(("ab",), every=3, max_new_tokens=4)
    small.evals.validation = entries.perplexity(every=3, batch_size=8)
    run = tmp_path / "run"
    returned = go(small.lock(), run)
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "curves.png",
        "samples.md",
        "predictions",
        "tokenizer",
        "checkpoints",
        "confusion-labels.png",
        "reliability-labels.png",
        "tensorboard",
    }
    assert json.loads((run / "config.json").read_text()) == json.loads(json.dumps(small.to_dict()))
    assert (run / "curves.png").read_bytes().startswith(PNG) and (
        run / "confusion-labels.png"
    ).read_bytes().startswith(PNG)
    assert tokenizers.load(run / "tokenizer").fingerprint == "bytes-1"
    assert [
        line for line in (run / "samples.md").read_text().splitlines() if line.startswith("## ")
    ] == ["## Step 3", "## Step 6"]
    assert sorted(p.name for p in (run / "predictions").iterdir()) == [
        "labels-3.jsonl",
        "labels-6.jsonl",
        "labels-priors-3.json",
        "labels-priors-6.json",
    ]
    assert len((run / "predictions" / "labels-6.jsonl").read_text().splitlines()) == 16
    assert checkpoint.steps(epath.Path(run / "checkpoints")) == [6]

    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in every if "train/loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    for line in trained:
        assert line.keys() >= {
            "train/loss",
            "train/grad_norm",
            "train/update_norm",
            "train/updates_lost",
            "train/learning_rate",
            "train/skipped_steps",
            "train/batch_hash",
            "train/tokens_per_second",
        }
    assert len({line["train/batch_hash"] for line in trained}) == 6
    for name, wanted in {
        "labels": {"accuracy", "nll", "ece", "macro_f1"},
        "validation": {"loss", "bits_per_byte", "perplexity"},
    }.items():
        found = [line for line in every if any(key.startswith(f"eval/{name}/") for key in line)]
        assert [line["step"] for line in found] == [3, 6]
        assert all(line.keys() >= {f"eval/{name}/{key}" for key in wanted} for line in found)
    merged = {key: value for line in every for key, value in line.items()}
    assert without_clock(returned) == without_clock(merged)


def test_where_the_time_goes(small, tmp_path):
    small.checkpoint.every = 2
    small.evals.text = entries.perplexity(every=2, batch_size=8)
    go(small.lock(), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/goodput" in line]
    lost = ("first_step", "data", "evals", "checkpoints")
    for before, line in zip(lines, lines[1:]):
        assert 0 < line["train/goodput"] < 1 and all(
            line[f"train/seconds_{what}"] >= before[f"train/seconds_{what}"] for what in lost
        )
    assert all(
        lines[-1][f"train/seconds_{what}"] > 0 for what in ("first_step", "evals", "checkpoints")
    )


def test_profile(small, tmp_path):
    train.train(small.lock(), epath.Path(tmp_path / "run"), jax.devices()[:1], (3, 5))
    assert len(list((tmp_path / "run/profile").rglob("*.xplane.pb"))) == 1


def test_a_run_without_evals_has_its_curves(small, tmp_path):
    go(small.lock(), tmp_path / "run")
    assert (tmp_path / "run/curves.png").read_bytes().startswith(PNG)


def test_logged_means_are_over_the_interval(small, tmp_path):
    go(small, tmp_path / "each")
    small.train.log_every = 4
    go(small, tmp_path / "fourth")
    each, fourth = read_lines(tmp_path / "each"), read_lines(tmp_path / "fourth")
    assert [line["step"] for line in fourth] == [4, 6]
    norms = [line["train/grad_norm"] for line in each]
    assert [line["train/grad_norm"] for line in fourth] == pytest.approx(
        [np.mean(norms[:4]), np.mean(norms[4:])], rel=1e-12
    )
    assert fourth[0]["train/batch_hash"] == each[3]["train/batch_hash"]


def test_finished_run_started_again_changes_nothing(finished, monkeypatch):
    config, run = finished
    before = snapshot(run)
    monkeypatch.setattr(
        perplexity.Perplexity, "run", lambda *unused: pytest.fail("evaluated again")
    )
    assert without_clock(go(config, run)) == without_clock(_FINISHED["metrics"])
    after = snapshot(run)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert all(name.startswith("tensorboard/") for name in changed), changed


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
        go(config, run)
    listed = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert listed == [f"  {key}: {old[key]!r} there, {change[key]!r} now" for key in sorted(change)]
    assert snapshot(run) == before


def test_config_of_the_checkpoint_counts_too(finished):
    config, run = finished
    (run / "config.json").unlink()
    before = snapshot(run)
    config.seed = 7
    with pytest.raises(ValueError, match="another configuration:\n  seed: 0 there, 7 now"):
        go(config, run)
    assert snapshot(run) == before


def test_what_may_change_when_a_run_goes_on(finished):
    config, run = finished
    kept = read_lines(run)
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
    values = go(config, run)
    assert values["step"] == 8 and checkpoint.steps(epath.Path(run / "checkpoints")) == [8]
    lines = read_lines(run)
    assert lines[: len(kept)] == kept
    new = lines[len(kept) :]
    assert [line["step"] for line in new if "train/loss" in line] == [8]
    # new, and due at the step that it starts from
    assert [line["step"] for line in new if "eval/other/loss" in line] == [6, 7, 8]
    assert [line["step"] for line in new if "eval/first/loss" in line] == [7, 8]
    assert json.loads((run / "config.json").read_text())["train"]["length"] == "8 steps"


def test_shorter_than_the_restored_step_is_refused(finished):
    config, run = finished
    before = snapshot(run)
    config.train.length = "5 steps"
    with pytest.raises(
        ValueError, match=r"is at step 6, past config.train.length = '5 steps' \(5 steps\)"
    ):
        go(config, run)
    assert snapshot(run) == before


def test_changed_corpus_is_refused(small, tmp_path):
    write_corpus(tmp_path / "own.jsonl")
    small.data.source_args.path = str(tmp_path / "own.jsonl")
    small.checkpoint.every = 4
    go(small, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    before = snapshot(tmp_path / "run")
    text = (tmp_path / "own.jsonl").read_text()
    (tmp_path / "own.jsonl").write_text(text.replace("ab", "ac", 1))
    with pytest.raises(ValueError, match="trained on a corpus with fingerprint .* have changed"):
        go(small, tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
    (tmp_path / "own.jsonl").write_text(text)
    assert go(small, tmp_path / "run")["step"] == 6


def test_best_names_a_metric_of_an_eval(small, tmp_path):
    small.checkpoint.best = "eval/nothing/loss"
    with pytest.raises(ValueError, match="config.checkpoint.best = 'eval/nothing/loss'"):
        go(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_init_from_takes_the_weights_only(finished, tmp_path):
    config, source = finished
    before = snapshot(source)
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
    go(config, tmp_path / "new")
    (theirs, _), (ours, _) = arrays(source, 6), arrays(tmp_path / "new", 3)
    params = [path for path in ours if path.startswith("params/")]
    assert params and all(ours[path] == theirs[path] for path in params)
    assert np.frombuffer(ours["step"][2], np.int32) == 3
    assert [line["step"] for line in read_lines(tmp_path / "new")] == [1, 2, 3]
    assert snapshot(source) == before
    # It goes on by itself: the source is needed at the start only.
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "new/checkpoints/3")
    assert go(config, tmp_path / "new")["step"] == 3


def test_init_from_checks_the_tokenizer(finished, tmp_path):
    config, source = finished
    config.update_from_flattened_dict(
        {"init_from": str(source), "tokenizer.kind": "sentencepiece", "tokenizer.vocab_size": 280}
    )
    with pytest.raises(ValueError, match=r"(?s)bytes-1.*sentencepiece-[0-9a-f]{16}"):
        go(config, tmp_path / "new")
    with pytest.raises(ValueError, match=r"(?s)bytes-1.*sentencepiece-[0-9a-f]{16}"):
        evaluate.evaluate(config, epath.Path(tmp_path / "eval"), jax.devices()[:1])


def test_init_from_nothing(small, tmp_path):
    small.init_from = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere has no checkpoint"):
        go(small, tmp_path / "run")
    assert not (tmp_path / "nowhere").exists()


def test_evaluate_reproduces_the_evals_of_the_run(finished, tmp_path):
    config, run = finished
    wanted = {
        key: value
        for line in read_lines(run)
        if line["step"] == 6
        for key, value in line.items()
        if key.startswith("eval/")
    }
    before = artifacts(run)
    found = evaluate.evaluate(config, epath.Path(run), jax.devices()[:1])
    assert found == wanted and len(found) > 10
    assert artifacts(run) == before  # the same predictions and samples again
    saved = json.loads((run / "eval-6.json").read_text())
    assert (
        saved["step"] == 6
        and {key: value for key, value in saved.items() if key.startswith("eval/")} == wanted
    )
    assert (
        saved["versions"]["jax"] == jax.__version__
        and saved["tokenizer"] == "bytes-1"
        and saved["config"]["evals"].keys() == saved["evals"].keys()
    )
    assert (
        saved["evals"]["second"]["fingerprint"]
        and saved["evals"]["second"]["examples"] == wanted["eval/second/examples"]
    )
    report = (run / "eval-6.md").read_text()
    accuracy, low, high = (
        f"{wanted[f'eval/second/accuracy{end}']:.4f}" for end in ("", "_low", "_high")
    )
    assert (
        f"| accuracy | {accuracy} | {low} to {high} |" in report
        and "| accuracy_low |" not in report
    )
    config.init_from = str(run)
    assert (
        evaluate.evaluate(config, epath.Path(tmp_path / "elsewhere"), jax.devices()[:1]) == wanted
    )
    assert (tmp_path / "elsewhere" / "predictions" / "second-6.jsonl").read_bytes() == before[
        "second-6.jsonl"
    ]


def test_evaluate_needs_no_training_data(finished, tmp_path):
    config, run = finished
    (tmp_path / "t.toml").write_text(f'''type = "lm.evals.choice.MultipleChoice"
choices = ["{{a}}"]
answer = "0"
source = {{ path = "{tmp_path}/t.jsonl" }}''')
    (tmp_path / "t.jsonl").write_text('{"a": "red"}\n{"a": "blue"}\n')
    with config.unlocked():
        config.data.source_args.path = "nowhere"
        config.evals = dict(t=entries.task(str(tmp_path / "t.toml")))
        config.init_from = str(run)
    assert (
        evaluate.evaluate(config, epath.Path(tmp_path / "new"), jax.devices()[:1])[
            "eval/t/examples"
        ]
        == 2
    )
    with pytest.raises(ValueError, match="no file at nowhere"):
        go(config, tmp_path / "train")


def test_evaluate_other_checkpoints(finished, tmp_path):
    config, run = finished
    there = sorted(
        int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()
    )
    assert len(there) > 1
    losses = {
        line["step"]: line["eval/first/loss"]
        for line in read_lines(run)
        if "eval/first/loss" in line
    }
    found = evaluate.evaluate(config, epath.Path(run), jax.devices()[:1], "all")
    each = {step: json.loads((run / f"eval-{step}.json").read_text()) for step in there}
    assert {step: one["eval/first/loss"] for step, one in each.items()} == {
        step: losses[step] for step in there
    } and len(set(losses.values())) > 1
    assert (
        found["eval/first/loss"] == losses[there[-1]]
        and (run / "eval-curves.png").read_bytes()[:4] == b"\x89PNG"
    )
    config.init_from = str(run)
    assert (
        evaluate.evaluate(config, epath.Path(tmp_path / "new"), jax.devices()[:1], str(there[0]))[
            "eval/first/loss"
        ]
        == losses[there[0]]
    )
    for steps in ("1000", f"{there[0]},x", "newest"):
        with pytest.raises(
            ValueError,
            match=rf"--steps={steps}: .* has checkpoints of the steps \[{there[0]}, .*wanted some of them, with commas, or all",  # noqa: E501
        ):
            evaluate.evaluate(config, epath.Path(tmp_path / "new"), jax.devices()[:1], steps)
    damaged = next(
        path
        for path in (run / "checkpoints" / str(there[0])).rglob("*")
        if path.is_file() and "manifest" in path.name
    )
    damaged.unlink()
    with pytest.raises(ValueError, match=f"no checkpoint of step {there[0]} that can be read"):
        evaluate.evaluate(config, epath.Path(tmp_path / "new"), jax.devices()[:1], str(there[0]))


def test_moving_average_is_what_is_evaluated(small, tmp_path):
    small.evals.validation = entries.perplexity(every=3, batch_size=8)
    go(small, tmp_path / "plain")
    small.optimizer.ema_decay = 0.9
    go(small, tmp_path / "ema")
    pick = lambda run, key: [line[key] for line in read_lines(run) if key in line]
    assert pick(tmp_path / "ema", "train/loss") == pick(tmp_path / "plain", "train/loss")
    plain, ema = (pick(tmp_path / run, "eval/validation/loss") for run in ("plain", "ema"))
    # Training lowers the loss, and the average lags behind it.
    assert all(e > p for e, p in zip(ema, plain)) and ema[0] > ema[1]
    assert (
        evaluate.evaluate(small, epath.Path(tmp_path / "ema"), jax.devices()[:1])[
            "eval/validation/loss"
        ]
        == ema[1]
    )


def test_evals_do_not_depend_on_how_often(finished, tmp_path):
    config, run = finished
    for name in config.evals:
        config.evals[name].every = 0
    config.checkpoint.every = 0
    go(config, tmp_path / "end")
    end = read_lines(tmp_path / "end")
    assert [line for line in read_lines(run) if "train/loss" in line or line["step"] == 6] == end
    assert [line["step"] for line in end if "train/loss" not in line] == [6, 6, 6]
    assert arrays(tmp_path / "end", 6)[0] == arrays(run, 6)[0]


def test_samples_have_each_step_once_after_a_resume(finished):
    config, run = finished
    before = (run / "samples.md").read_bytes()
    assert before.count(b"## Step ") == 3
    # as if killed between the evals at step 6 and its checkpoint
    shutil.rmtree(run / "checkpoints" / "6")
    go(config, run)
    assert (run / "samples.md").read_bytes() == before


def test_samples_may_look_like_our_own_headings(small, tmp_path):
    # Markdown in the corpus: "## Step 1: install" and "## Step 9" are what a model then writes.
    small.evals.samples = entries.samples(
        ("a\n## Step 1: b", "\n## Step 9\n{step}"), every=3, max_new_tokens=4
    )
    go(small, tmp_path / "run")
    text = (tmp_path / "run" / "samples.md").read_text()
    assert [text.count(part) for part in ("## Step 1: b⟫", "## Step 9\n", "{step}⟫")] == [2, 2, 2]
    assert [line for line in text.splitlines() if line in ("## Step 3", "## Step 6")] == [
        "## Step 3",
        "## Step 6",
    ]


def break_writes(monkeypatch, name):
    """Files with `name` in theirs are written in part, and then the disk is full."""
    kind = type(epath.Path("."))
    for method in ("write_bytes", "write_text"):

        def write(path, content, real=getattr(kind, method)):
            if name not in path.name:
                return real(path, content)
            real(path, content[:2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(kind, method, write)


def test_samples_of_earlier_steps_survive_a_failed_write(tmp_path, monkeypatch):
    write = lambda step: evaluate.write_artifact(
        epath.Path(tmp_path), Artifact("samples.md", "## Step {step}\n\ntext\n", append=True), step
    )
    write(1)
    before = (tmp_path / "samples.md").read_text()
    break_writes(monkeypatch, "samples")
    with pytest.raises(OSError, match="No space"):
        write(2)
    assert (tmp_path / "samples.md").read_text() == before


def test_failed_write_of_the_config_does_not_end_the_run_for_ever(finished, monkeypatch):
    config, run = finished
    with monkeypatch.context() as patch:
        break_writes(patch, "config.json")
        with pytest.raises(OSError, match="No space"):
            go(config, run)
    assert go(config, run)["step"] == 6
    assert json.loads((run / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))


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


@pytest.fixture
def poisoned(small, tmp_path, tmp_path_factory, monkeypatch):
    """A config whose run meets a batch that gives NaN; (config, the batches' hashes, which of them
    are bad).
    """
    (tmp_path / "bad_objective.py").write_text(BAD_OBJECTIVE)
    monkeypatch.syspath_prepend(str(tmp_path))
    small.objective.type = "bad_objective"
    small.train.update(dict(length="10 steps", log_every=1))
    documents = [json.loads(line) for line in open(small.data.source_args.path)]
    path = tmp_path_factory.getbasetemp() / "poisoned.jsonl"
    small.data.source_args.path = str(path)
    for number in range(48):  # one that comes neither at once nor late
        path.write_text(
            "".join(
                json.dumps(d | {"text": d["text"] + "\x01"} if i == number else d) + "\n"
                for i, d in enumerate(documents)
            )
        )
        loader = build.build(small, jax.devices()[:1]).make_loader()
        batches = [next(loader) for _ in range(10)]
        loader.close()
        bad = [bool((np.asarray(batch["tokens"]) == 1).any()) for batch, _ in batches]
        if any(bad) and 3 <= bad.index(True) <= 6:
            return small.lock(), [batch_hash for _, batch_hash in batches], bad
    raise AssertionError("no document of the corpus comes in the steps 4 to 7")


@pytest.mark.parametrize("every", [0, 2, 1])
def test_nonfinite_halts_with_the_last_good_state(poisoned, tmp_path, every):
    config, hashes, bad = poisoned
    first = bad.index(True) + 1
    config.checkpoint.every = every
    run = tmp_path / "run"
    for _ in range(2):  # started again, it meets the same batch
        with pytest.raises(
            train.NonFinite,
            match=rf"^step {first} is not finite: loss nan.*hash {hashes[first - 1]}",
        ):
            go(config, run)
        assert max(checkpoint.steps(epath.Path(run / "checkpoints"))) == first - 1
        assert [line["step"] for line in read_lines(run)] == list(range(1, first))

    config.train.nonfinite = "skip"
    values = go(config, run)
    assert values["step"] == 10 and values["train/skipped_steps"] == sum(bad)
    assert [line["train/batch_hash"] for line in read_lines(run)] == hashes
    assert [line["train/skipped_steps"] for line in read_lines(run)] == np.cumsum(bad).tolist()
    go(config, tmp_path / "skipping")  # the run that skipped from the start
    assert_same_run(run, tmp_path / "skipping", 10)


def test_nonfinite_state_is_that_of_the_step_before(poisoned, tmp_path):
    config, _, bad = poisoned
    good = bad.index(True)
    with pytest.raises(train.NonFinite):
        go(config, tmp_path / "run")
    state, meta = arrays(tmp_path / "run", good)
    config.checkpoint.every = good
    with pytest.raises(train.NonFinite):
        go(config, tmp_path / "saving")
    # saved by its cadence, before the bad batch was seen
    state0, meta0 = arrays(tmp_path / "saving", good)
    assert {k: v for k, v in state.items() if k != "halted"} == {
        k: v for k, v in state0.items() if k != "halted"
    }
    assert meta["streams"] == meta0["streams"]


def test_progress_shows_a_step_without_a_loss(poisoned, tmp_path, monkeypatch, capsys):
    config, _, bad = poisoned
    # every line, as on a terminal
    monkeypatch.setattr(telemetry.Progress.__init__, "__defaults__", (0.0,))
    config.train.nonfinite = "skip"
    go(config, tmp_path / "run")
    assert f"step {bad.index(True) + 2}/10" in capsys.readouterr().err


def test_stop_signal_puts_the_old_handlers_back():
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with stopping.StopSignal() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.at_step(1)
        with pytest.raises(stopping.Stopped):
            stop.check()
    assert {number: signal.getsignal(number) for number in old} == old
    with pytest.raises(ZeroDivisionError), stopping.StopSignal():
        raise ZeroDivisionError
    assert {number: signal.getsignal(number) for number in old} == old


def test_second_interrupt_is_not_waited_for():
    with stopping.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.at_step(1)
        os.kill(os.getpid(), signal.SIGTERM)  # does not interrupt
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            stop.check()


def test_handlers_are_back_after_an_error(small, tmp_path):
    old = signal.getsignal(signal.SIGTERM)
    small.data.streams = 3
    with pytest.raises(ValueError, match="config.data.streams = 3"):
        go(small, tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is old
