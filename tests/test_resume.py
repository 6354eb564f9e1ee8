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
from pathlib import Path

import jax
import pytest
from etils import epath
from test_train import VERBALIZER, _quick, _small, assert_same_run, go, read_lines  # noqa: F401

from lm import checkpoint, stopping, telemetry, train
from lm.data import loader
from lm.evals import classification, entries, perplexity

ROOT = Path(__file__).parent.parent
LAST = 11


@pytest.fixture
def config(small):
    """Packing, accumulation, 8 devices, stochastically rounded bfloat16, logging out of step with
    saving, evals in step with saving and out of step.
    """
    small.data.update(dict(batch_size=16, streams=4, packing="first_fit"))
    small.mesh.update(dict(data=2, fsdp=4))
    small.model.param_dtype = "bfloat16"
    small.optimizer.rounding = "stochastic"
    small.train.update(dict(length=f"{LAST} steps", accumulation=2, log_every=3))
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
        go(config, run, 8)
        _REFERENCE.append(run)
    return _REFERENCE[0]


def saved(run):
    return checkpoint.steps(epath.Path(run) / "checkpoints")


# Starts the run of argv[1] (JSON) in argv[2], and dies at step argv[4] in the way argv[3].
CHILD = """
import json, os, sys, threading, time
import jax
from etils import epath
from ml_collections import ConfigDict
from lm import checkpoint, telemetry, train
from lm.data import loader

config, run, how, step = json.loads(sys.argv[1]), epath.Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
die = lambda: os.kill(os.getpid(), 9)
telemetry.plot_curves = lambda lines: b""
start = max(checkpoint.steps(run / "checkpoints"), default=0)
fetch, save, write = loader.Loader.__next__, checkpoint.Checkpointer.save, checkpoint.Checkpointer._write_manifest
count = 0

def counted_fetch(self):
    global count
    count += 1
    if how == "batch" and start + count == step:
        die()
    return fetch(self)

def timed_save(self, number, *rest):
    if how == "arrays" and number >= step:
        threading.Thread(target=lambda: (time.sleep(step % 1), die())).start()
    save(self, number, *rest)

def dying_write(self):
    if how == "before the manifest" and self._saving >= step:
        die()
    write(self)
    if how == "before the commit" and self._saving >= step:
        die()

loader.Loader.__next__, checkpoint.Checkpointer.save, checkpoint.Checkpointer._write_manifest = counted_fetch, timed_save, dying_write
train.train(ConfigDict(config), run, jax.devices())
"""  # noqa: E501


def test_killed(config, reference, tmp_path):
    run = tmp_path / "run"
    # of the first checkpoint: it starts over
    first = random.choice(["before the manifest", "before the commit"])
    schedule = [(first, 4), ("batch", random.randint(5, 8)), ("arrays", 8 + random.random() * 0.05)]
    print(schedule)
    for how, step in schedule:
        child = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(config.to_dict()), str(run), how, str(step)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert child.returncode == -signal.SIGKILL, child.stderr[-3000:]
        if how == first:
            assert saved(run) == [] and (run / "metrics.jsonl").stat().st_size
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train/lo')  # a line that was being written
    go(config, run, 8)
    assert_same_run(run, reference, LAST)
    assert saved(run) == saved(reference)


def stop(config, run):
    """Starts the run, which a signal stops; returns the step."""
    with pytest.raises(
        stopping.Stopped,
        match=r"stopped by a signal at step \d+; saved in .*start it again to go on",
    ) as caught:
        go(config, run, 8)
    step = int(str(caught.value).split("at step ")[1].split(";")[0])
    assert max(saved(run)) == step
    return step


def terminate_at(monkeypatch, owner, name, call):
    """A signal at the given call of a function, counted from 1."""
    real, count = getattr(owner, name), iter(range(1, 1000))

    def function(*args):
        if next(count) == call:
            os.kill(os.getpid(), random.choice([signal.SIGTERM, signal.SIGINT]))
        return real(*args)

    monkeypatch.setattr(owner, name, function)


def test_terminated_at_a_random_step(config, reference, tmp_path, monkeypatch):
    run, step = tmp_path / "run", 0
    while step < LAST:
        with monkeypatch.context() as patch:
            call = random.randint(1, min(4, LAST - step))
            print(step, call)
            terminate_at(patch, loader.Loader, "__next__", call)
            assert stop(config, run) == step + call
        step += call
    assert not any("eval/first/loss" in line for line in read_lines(run) if line["step"] == LAST)
    go(config, run, 8)  # the evals of the last step were still due
    assert_same_run(run, reference, LAST)


def test_terminated_before_the_first_step(config, reference, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        terminate_at(patch, train.Run, "_begin", 1)
        assert stop(config, tmp_path / "run") == 0
    go(config, tmp_path / "run", 8)
    assert_same_run(tmp_path / "run", reference, LAST)


@pytest.mark.parametrize(
    "evaluator", [perplexity.Perplexity, classification.DocumentClassification]
)
def test_terminated_during_an_eval(config, reference, tmp_path, monkeypatch, evaluator):
    # At step 4 two evals and the checkpoint are due. One is stopped, and again after the restart.
    run = tmp_path / "run"
    for _ in range(2):
        with monkeypatch.context() as patch:
            terminate_at(patch, evaluator, "run", 1)
            assert stop(config, run) == 4
    order = []
    for owner, name in ((loader.Loader, "__next__"), (evaluator, "run")):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, name=name, real=real: (order.append(name), real(*args))[1]
        )
    go(config, run, 8)
    assert order[:2] == ["run", "__next__"]  # not skipped: it is due before the next step
    assert_same_run(run, reference, LAST)


@pytest.mark.parametrize(
    "stops",
    [
        [classification.DocumentClassification],
        [perplexity.Perplexity, classification.DocumentClassification],
    ],
)
def test_best_is_known_though_the_eval_after_it_was_stopped(config, tmp_path, monkeypatch, stops):
    # The figure of step 4 is the best there is, and is in the metrics when a later eval of the same
    # step is stopped.
    config.checkpoint.keep = 1
    losses, run = iter([1.0, 2.0, 3.0]), tmp_path / "run"

    def measure(self, params):
        self._predict_fns.check_stop()
        yield "loss", next(losses, 9.0)

    monkeypatch.setattr(perplexity.Perplexity, "run", measure)
    for evaluator in stops:
        with monkeypatch.context() as patch:
            terminate_at(patch, evaluator, "run", 1)
            assert stop(config, run) == 4
    go(config, run, 8)
    assert [line["eval/first/loss"] for line in read_lines(run) if "eval/first/loss" in line] == [
        1.0,
        2.0,
        3.0,
    ]
    assert saved(run) == [4, LAST]


def test_other_processes_agree_on_what_is_due(config, reference, tmp_path, monkeypatch):
    # Metrics are written by the first process; all must come to the same evals, which are
    # collective.
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        terminate_at(patch, loader.Loader, "__next__", 4)
        # with several processes an eval is not stopped
        patch.setattr(stopping.StopSignal, "check", lambda self: None)
        assert stop(config, run) == 4
    second_process = types.SimpleNamespace(
        process_index=lambda: 1, block_until_ready=jax.block_until_ready
    )
    monkeypatch.setattr(telemetry, "jax", second_process)
    seen = []
    monkeypatch.setattr(
        train.Run, "evaluate", lambda self, step, names: seen.append((step, names)) or {}
    )
    monkeypatch.setattr(train.Run, "save", lambda *unused: None)
    go(config, run, 8)
    assert seen == [(6, ["third"]), (8, ["first", "second"]), (11, ["first", "second", "third"])]


CONFIG_FILE = """
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({text!r}))
"""
SLOW_SOURCE = """
import time
from lm.data import sources

class Slow(list):
    def __getitem__(self, index):
        time.sleep(0.02)
        return list.__getitem__(self, index)

def jsonl(split, **arguments):
    documents = sources.jsonl(split, **arguments)
    return sources.Documents(Slow(documents.items), documents.fingerprint)
"""


def test_command_line(config, reference, tmp_path):
    """The program itself, terminated from outside, says so, ends well, and goes on to the same
    end.
    """
    (tmp_path / "slow_source.py").write_text(SLOW_SOURCE)
    (tmp_path / "config.py").write_text(CONFIG_FILE.format(text=json.dumps(config.to_dict())))
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "lm.main",
        f"--config={tmp_path}/config.py",
        f"--workdir={run}",
        "--config.data.source=slow_source.jsonl",
        "--config.platform=cpu",
    ]
    options = dict(
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child, began = subprocess.Popen(command, **options), time.monotonic()
    while child.poll() is None and not (
        (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size
    ):
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    child.terminate()
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err[-3000:]
    assert (
        "stopped by a signal at step" in err
        and "start it again to go on" in err
        and "Traceback" not in err
    )
    assert 0 < saved(run)[-1] < LAST
    again = subprocess.run(command, **options)
    assert again.returncode == 0 and "first/loss" in again.stdout, again.stderr[-3000:]
    assert_same_run(run, reference, LAST)


def test_moves_to_other_meshes(small, tmp_path):
    small.data.batch_size = 8
    small.model.param_dtype = "float32"
    small.train.update(dict(length="8 steps", log_every=1))
    small.checkpoint.every = 4
    small.mesh.fsdp = 8
    go(small, tmp_path / "whole", 8)
    wanted = read_lines(tmp_path / "whole")
    for name, mesh, devices in (("2x4", dict(data=2, fsdp=4), 8), ("one", dict(data=1, fsdp=1), 1)):
        run = tmp_path / name
        shutil.copytree(tmp_path / "whole", run)
        shutil.rmtree(run / "checkpoints" / "8")
        small.mesh.update(mesh)
        go(small, run, devices)
        lines = read_lines(run)
        assert [line["train/batch_hash"] for line in lines] == [
            line["train/batch_hash"] for line in wanted
        ]
        assert [line["train/loss"] for line in lines] == pytest.approx(
            [line["train/loss"] for line in wanted], rel=1e-5
        )
        assert lines[:4] == wanted[:4]
