"""A run stopped at any step by any means ends bit-equal to the run that never stopped; on another
mesh it has the same batches.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import pytest

from lm import stopping, telemetry, train
from lm.data import loader
from lm.evals import classification, entries, perplexity
from tests.helpers import (
    CONFIG_FILE,
    LAST_STEP,
    ROOT,
    SLOW_SOURCE,
    VERBALIZER,
    assert_same_run,
    read_metrics,
    run_training,
    saved_steps,
    slow,
    terminate_at,
    xla_flags,
)

pytestmark = pytest.mark.usefixtures("fast_runs")


@pytest.fixture
def config(small):
    """Packing, accumulation, 8 devices, stochastically rounded bfloat16, logging out of step with
    saving, evals in step with saving and out of step.
    """
    small.data.update(dict(batch_size=16, streams=4, packing="first_fit"))
    small.mesh.update(dict(data=2, fsdp=4))
    small.model.param_dtype = "bfloat16"
    small.optimizer.rounding = "stochastic"
    small.train.update(dict(length=f"{LAST_STEP} steps", accumulation=2, log_every=3))
    small.checkpoint.update(dict(every=4, best="eval/first/loss"))
    small.evals.first = entries.perplexity(every=4, batch_size=16)
    small.evals.second = entries.classification(VERBALIZER, every=4, batch_size=16)
    small.evals.third = entries.samples(("red", "ab"), every=6, max_new_tokens=3)
    return small.lock()


_REFERENCE = []


@pytest.fixture
def reference(config, tmp_path_factory):
    """The run that never stopped."""
    if not _REFERENCE:
        run = tmp_path_factory.mktemp("reference") / "run"
        run_training(config, run, devices=8)
        _REFERENCE.append(run)
    return _REFERENCE[0]


# Killed.

# Starts the run of argv[1] (JSON) in argv[2], and kills itself by argv[3] at step argv[4].
CHILD = """
import json, os, sys, threading, time
import jax
from etils import epath
from ml_collections import ConfigDict
from lm import checkpoint, telemetry, train
from lm.data import loader

config, run, how, step = json.loads(sys.argv[1]), epath.Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
telemetry.plot_curves = lambda lines: b""
start = max(checkpoint.steps(run / "checkpoints"), default=0)
fetch = loader.Loader.next
save = checkpoint.Checkpointer.save
write_manifest = checkpoint.Checkpointer._write_manifest
count = 0

def die():
    os.kill(os.getpid(), 9)

def die_later(seconds):
    time.sleep(seconds)
    die()

def counted_fetch(self, params):
    global count
    count += 1
    if how == "batch" and start + count == step:
        die()
    return fetch(self, params)

def timed_save(self, number, *rest):
    if how == "arrays" and number >= step:
        threading.Thread(target=die_later, args=(step % 1,)).start()
    save(self, number, *rest)

def dying_write(self):
    if how == "before the manifest" and self._saving >= step:
        die()
    write_manifest(self)
    if how == "before the commit" and self._saving >= step:
        die()

loader.Loader.next = counted_fetch
checkpoint.Checkpointer.save = timed_save
checkpoint.Checkpointer._write_manifest = dying_write
train.train(ConfigDict(config), run, jax.devices())
"""  # noqa: E501


@pytest.mark.slow
def test_killed(config, reference, tmp_path):
    run = tmp_path / "run"
    # During the first checkpoint, so that it starts over; at a step; while arrays are written.
    during_first = random.choice(["before the manifest", "before the commit"])
    schedule = [
        (during_first, 4),
        ("batch", random.randint(5, 8)),
        ("arrays", 8 + random.random() * 0.05),
    ]
    print(schedule)
    for how, step in schedule:
        arguments = [json.dumps(config.to_dict()), str(run), how, str(step)]
        child = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert child.returncode == -signal.SIGKILL, child.stderr[-3000:]
        if how == during_first:
            assert saved_steps(run) == []
            assert (run / "metrics.jsonl").stat().st_size

    # A line that was being written.
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train/lo')
    run_training(config, run, devices=8)
    assert_same_run(run, reference, LAST_STEP)
    assert saved_steps(run) == saved_steps(reference)


# Stopped by a signal.


def run_until_stopped(config, run):
    """Starts the run, which a signal stops; returns the step."""
    message = r"stopped by a signal at step \d+; saved in .*start it again to go on"
    with pytest.raises(stopping.Stopped, match=message) as caught:
        run_training(config, run, devices=8)
    step = int(str(caught.value).split("at step ")[1].split(";")[0])
    assert max(saved_steps(run)) == step
    return step


def test_terminated_at_a_random_step(config, reference, tmp_path, monkeypatch):
    run, step = tmp_path / "run", 0
    while step < LAST_STEP:
        with monkeypatch.context() as patch:
            call = random.randint(1, min(6, LAST_STEP - step))
            print(step, call)
            terminate_at(patch, loader.Loader, "next", call)
            assert run_until_stopped(config, run) == step + call
        step += call

    # A stop at the last step comes before its evals.
    last_lines = [line for line in read_metrics(run) if line["step"] == LAST_STEP]
    assert not any("eval/first/loss" in line for line in last_lines)
    run_training(config, run, devices=8)
    assert_same_run(run, reference, LAST_STEP)


@pytest.mark.slow
def test_terminated_before_the_first_step(config, reference, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        terminate_at(patch, train.Run, "_begin", 1)
        assert run_until_stopped(config, tmp_path / "run") == 0
    run_training(config, tmp_path / "run", devices=8)
    assert_same_run(tmp_path / "run", reference, LAST_STEP)


def record_calls(monkeypatch, owner, name, calls):
    """Appends `name` to `calls` at each call of a function."""
    original = getattr(owner, name)

    def function(*args):
        calls.append(name)
        return original(*args)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize(
    "evaluator", [slow(perplexity.Perplexity), classification.DocumentClassification]
)
def test_terminated_during_an_eval(config, reference, tmp_path, monkeypatch, evaluator):
    # At step 4 two evals and the checkpoint are due. One is stopped, and again after the restart.
    run = tmp_path / "run"
    for _ in range(2):
        with monkeypatch.context() as patch:
            terminate_at(patch, evaluator, "run", 1)
            assert run_until_stopped(config, run) == 4

    calls = []
    record_calls(monkeypatch, loader.Loader, "next", calls)
    record_calls(monkeypatch, evaluator, "run", calls)
    run_training(config, run, devices=8)
    # The eval was not skipped: it is due before the next step.
    assert calls[:2] == ["run", "next"]
    assert_same_run(run, reference, LAST_STEP)


@pytest.mark.parametrize(
    "stopped_evaluators",
    [
        [classification.DocumentClassification],
        slow([perplexity.Perplexity, classification.DocumentClassification]),
    ],
)
def test_best_is_known_though_the_eval_after_it_was_stopped(
    config, tmp_path, monkeypatch, stopped_evaluators
):
    """The loss of step 4 is the best there is, and is in the metrics when a later eval of the same
    step is stopped.
    """
    config.checkpoint.keep = 1
    run = tmp_path / "run"
    losses = iter([1.0, 2.0, 3.0])

    # The first loss is the best, whatever the model says.
    def measure(self, params):
        self._predict_fns.check_stop()
        yield "loss", next(losses, 9.0)

    monkeypatch.setattr(perplexity.Perplexity, "run", measure)
    for evaluator in stopped_evaluators:
        with monkeypatch.context() as patch:
            terminate_at(patch, evaluator, "run", 1)
            assert run_until_stopped(config, run) == 4
    run_training(config, run, devices=8)

    lines = [line for line in read_metrics(run) if "eval/first/loss" in line]
    assert [line["eval/first/loss"] for line in lines] == [1.0, 2.0, 3.0]
    assert saved_steps(run) == [4, LAST_STEP]


def test_other_processes_agree_on_what_is_due(config, tmp_path, monkeypatch):
    """Metrics are written by the first process; all must come to the same evals, which are
    collective.
    """
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        terminate_at(patch, loader.Loader, "next", 4)
        # With several processes an eval is not stopped.
        patch.setattr(stopping.StopSignal, "check", lambda self: None)
        assert run_until_stopped(config, run) == 4

    second_process = types.SimpleNamespace(
        process_index=lambda: 1, block_until_ready=jax.block_until_ready
    )
    evaluated = []

    def record(self, step, names):
        evaluated.append((step, names))
        return {}

    monkeypatch.setattr(telemetry, "jax", second_process)
    monkeypatch.setattr(train.Run, "run_evals", record)
    monkeypatch.setattr(train.Run, "save", lambda *unused: None)
    run_training(config, run, devices=8)
    assert evaluated == [
        (6, ["third"]),
        (8, ["first", "second"]),
        (11, ["first", "second", "third"]),
    ]


def train_whole(small, run):
    """The run that the program's must end like."""
    small.train.length = "60 steps"
    small.checkpoint.every = 20
    small.evals.text = entries.perplexity(every=20, batch_size=8)
    run_training(small, run)


def start_program(config, tmp_path):
    """Starts the program itself on a slow source, in tmp_path / "run"."""
    (tmp_path / "slow_source.py").write_text(SLOW_SOURCE)
    (tmp_path / "config.py").write_text(CONFIG_FILE.format(text=json.dumps(config.to_dict())))
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "lm.main",
            f"--config={tmp_path}/config.py",
            f"--workdir={tmp_path}/run",
            "--config.data.source=slow_source.jsonl",
            "--config.platform=cpu",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": xla_flags(1)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def terminate_program(child, run):
    """Terminates the program as soon as it has trained a step: it says so and ends well."""
    metrics, began = run / "metrics.jsonl", time.monotonic()
    while child.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    child.terminate()
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err[-3000:]
    assert "stopped by a signal at step" in err
    assert "start it again to go on" in err
    assert "Traceback" not in err
    assert 0 < saved_steps(run)[-1] < 60


def test_command_line(small, tmp_path, monkeypatch):
    """The program itself, terminated from outside, says so and ends well; the run goes on to the
    same end.
    """
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_whole(small, whole)
    terminate_program(start_program(small, tmp_path), run)

    # The source is the same, and no longer slow.
    (tmp_path / "slow_source.py").write_text(SLOW_SOURCE.replace("0.02", "0"))
    monkeypatch.syspath_prepend(str(tmp_path))
    small.data.source = "slow_source.jsonl"
    run_training(small, run)
    assert_same_run(run, whole, 60)


# Another mesh.


@pytest.mark.parametrize(
    "mesh, devices", [(dict(data=1, fsdp=1), 1), slow(dict(data=2, fsdp=4), 8)]
)
def test_moves_to_another_mesh(small, tmp_path, mesh, devices):
    """From 8 devices, in the middle of the run: the same batches, and losses but for rounding."""
    small.data.batch_size = 8
    small.model.param_dtype = "float32"
    small.train.update(dict(length="8 steps", log_every=1))
    small.checkpoint.every = 4
    small.mesh.fsdp = 8
    whole = tmp_path / "whole"
    run_training(small, whole, devices=8)
    wanted = read_metrics(whole)

    # As if it had stopped after step 4.
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "8")
    small.mesh.update(mesh)
    run_training(small, run, devices)

    lines = read_metrics(run)
    assert lines[:4] == wanted[:4]
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for line, wanted_line in zip(lines, wanted):
        assert line["train/batch_hash"] == wanted_line["train/batch_hash"]
        assert line["train/loss"] == pytest.approx(wanted_line["train/loss"], rel=1e-5)
