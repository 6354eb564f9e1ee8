"""Sweeps: what their runs are called and have, what sweep.json holds them to, and workers that
share a plan.
"""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from absl import flags
from etils import epath
from etils.epath import backend
from ml_collections import config_flags

from lm import claim, command_line, files, main, optim, report, telemetry
from lm import config as config_lib
from lm.reports import run_sections, sweeps
from lm.sweep import axes, plan, predict, search, state, worker
from lm.sweep.halving import Halving
from lm.sweep.search import Search
from tests import test_files
from tests.helpers import NO_CURVES, ROOT, assert_same_run, run_training, xla_flags
from tests.test_claim import bucket, server  # noqa: F401, fixtures

SWEEP_FILE = """
import json
from ml_collections import ConfigDict
from lm import config as config_lib
from lm.sweep import axes
from lm.sweep.halving import Halving
from lm.sweep.search import Search

def get_config():
    config = {config}
    return config

def get_sweep():
    return {points}
"""


def write_sweep(path, points, config=None, more=""):
    """A sweep file whose points are the given Python, and the sweep that it is."""
    text = "config_lib.default()"
    if config is not None:
        text = f"ConfigDict(json.loads({config.to_json()!r}))"
    path.parent.mkdir(exist_ok=True)
    path.write_text(SWEEP_FILE.format(config=text, points=points) + more)
    return plan.read(str(path))


@pytest.fixture
def sweep(tmp_path):
    points = 'axes.product(axes.grid({"optimizer.learning_rate": [1e-3, 3e-3]}), axes.seeds(2))'
    return write_sweep(tmp_path / "toy" / "sweep.py", points)


# --- points ---


def test_points():
    assert axes.grid({"a": [1, 2], "b": "xy".split() + ["z"]}) == [
        dict(a=1, b="xy"),
        dict(a=1, b="z"),
        dict(a=2, b="xy"),
        dict(a=2, b="z"),
    ]
    assert axes.zipped({"a": [1, 2], "b": [3, 4]}) == [dict(a=1, b=3), dict(a=2, b=4)]
    assert axes.product([dict(a=1)], axes.seeds(2)) == [dict(a=1, seed=0), dict(a=1, seed=1)]


def test_random_points_are_a_function_of_the_seed_and_prefixes_of_each_other():
    space = {"a": axes.LogUniform(1e-4, 1e-2), "b": axes.Uniform(0, 1), "c": ["x", "y"]}
    many = axes.random(200, space, seed=3)
    assert axes.random(20, space, seed=3) == many[:20]
    assert axes.random(20, space, seed=4) != many[:20]

    values = [point["a"] for point in many]
    assert all(1e-4 <= value <= 1e-2 and value == float(f"{value:.3g}") for value in values)
    assert 0.4 < sum(value < 1e-3 for value in values) / 200 < 0.6  # half below the middle decade
    assert {point["c"] for point in many} == {"x", "y"}
    # Rounding doesn't leave the range.
    near_1 = axes.random(200, {"b2": axes.Uniform(0.9, 0.9999)})
    assert max(point["b2"] for point in near_1) == 0.9999


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: axes.grid({"a": []}), "the axis a has no values"),
        (lambda: axes.grid({"a": "xyz"}), "wanted a list"),
        (lambda: axes.zipped({"a": [1], "b": [1, 2]}), "different numbers of values"),
        (lambda: axes.product([dict(a=1)], [dict(a=2)]), "change a"),
        (lambda: axes.random(1, {"a": axes.LogUniform(0, 1)}), "no range"),
        (lambda: axes.random(1, {"a": []}), "the axis a has no values"),
    ],
)
def test_bad_axes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- runs and their names ---


def test_a_run_is_named_after_what_it_changes_and_the_hash_of_its_configuration(sweep):
    names = [run.name for run in sweep.runs]
    assert names[1].startswith("learning_rate=0.001-seed=1-")
    for run in sweep.runs:
        assert run.name.endswith(config_lib.content_hash(sweep.config(run))[:8])
    assert sweep.config(sweep.runs[3]).optimizer.learning_rate == 3e-3
    assert sweep.config(sweep.runs[3]).seed == 1
    assert len({config_lib.content_hash(sweep.config(run)) for run in sweep.runs}) == 4


def test_names_are_safe_and_tell_keys_apart(tmp_path):
    points = """[{"data.length": 64, "train.length": "5 steps"},
                 {"data.length": 64, "train.length": "6 steps"},
                 {"init_from": "../a b/*?<é>\\n" + 99 * "x", "model": {"num_layers": 2}}]"""
    first, _, second = write_sweep(tmp_path / "toy" / "sweep.py", points).runs
    assert first.name.startswith("data.length=64-train.length=5_steps-")
    assert second.name.startswith("init_from=.._a_b_")
    assert set(second.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_=")
    assert len(second.name) <= plan.MAX_NAME + 9
    assert second.changes["model.num_layers"] == 2


def test_names_leave_out_what_follows_from_other_keys(tmp_path):
    points = """axes.product(axes.zipped({"model.num_layers": [1, 2], "model.scan_unroll": [1, 2],
                                       "train.length": ["5 steps"] * 2}), axes.seeds(2))"""
    runs = write_sweep(tmp_path / "toy" / "sweep.py", points).runs
    assert runs[3].name.startswith("num_layers=2-seed=1-")
    assert runs[3].changes["model.scan_unroll"] == 2 and runs[3].name.count("=") == 2


def test_values_come_in_the_types_of_the_configuration(tmp_path):
    points = """[{"model.rope_scaling": ["yarn", 4.0, 32768], "optimizer.learning_rate": 1}]"""
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", points)
    config = sweep.config(sweep.runs[0])
    assert config.model.rope_scaling == ("yarn", 4.0, 32768)
    assert isinstance(config.optimizer.learning_rate, float)


@pytest.mark.parametrize(
    "points, message",
    [
        ('[{"optimizer.lr": 1e-3}]', "optimizer.learning_rate"),
        ('[{"train.length": 5}]', "train.length"),
        ('[{"optimizer.b1": 2.0}]', "b1"),
        ('axes.seeds(1) + [{"seed": 0}]', "two runs have one configuration"),
        ("[5]", "point 0 is 5"),
        ("[]", "no points"),
        ('axes.grid({"seed": []})', "no values"),
    ],
)
def test_bad_sweeps(tmp_path, points, message):
    with pytest.raises(ValueError, match=message):
        write_sweep(tmp_path / "toy" / "sweep.py", points)


def test_bad_sweep_files(tmp_path):
    path = tmp_path / "sweep.py"
    with pytest.raises(ValueError, match="no such file"):
        plan.read(str(path))
    path.write_text("def get_sweep(): return []")
    with pytest.raises(ValueError, match="neither get_config"):
        plan.read(str(path))
    path.write_text("CONFIG = 'configs/nothing.py'\ndef get_sweep(): return []")
    with pytest.raises(ValueError, match="no configuration file"):
        plan.read(str(path))
    path.write_text("CONFIG = 'configs/pydocs.py:micro'\ndef get_sweep(): return [{'seed': 5}]")
    assert plan.read(str(path)).base.model.num_layers == 2


def test_the_command_of_a_run_has_its_configuration(tmp_path, monkeypatch):
    points = r"""[{"seed": 3, "data.label_prompt": "\n\\n'$x\"", "model.gated_mlp": True,
                   "model.rope_scaling": ("linear", 2.0), "train.length": "1e3 tokens",
                   "evals.x.stop": ("\\n", "a\nb"),
                   "optimizer.learning_rate": 1e-5}]"""
    path = tmp_path / "toy" / "sweep.py"
    write_sweep(path, "axes.seeds(1)")
    text = path.read_text().replace("return config", "config.evals = {evals}\n    return config")
    evals = {"x": dict(type="mine.Eval", every=0, batch_size=1, stop=("a",))}
    path.write_text(text.format(evals=evals).replace("axes.seeds(1)", points))
    sweep = plan.read(str(path))
    [run] = sweep.runs
    command = sweep.command(run, epath.Path("RUNS"))
    assert command[1:3] == ["-m", "lm.main"] and f"--workdir=RUNS/{run.name}" in command

    monkeypatch.setattr(sys, "argv", ["lm", *command[3:]])
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(command_line.flags, "FLAGS", values)
    values(sys.argv)
    command_line._unescape_overrides()
    assert values.config.to_dict() == sweep.config(run).to_dict()
    # As one types it, it is the same.
    assert plan.shell(command).startswith("python -m lm.main --config=")


# --- sweep.json ---


def settle(sweep, workdir, accept=False):
    return plan.settle(sweep, epath.Path(workdir), accept=accept)


def test_the_plan_is_written_before_anything_starts_and_found_again(sweep, tmp_path):
    assert settle(sweep, tmp_path / "runs") == sweep.runs
    stored = json.loads((tmp_path / "runs" / sweeps.PLAN).read_text())
    assert stored["axes"] == ["optimizer.learning_rate", "seed"]
    assert stored["config"] == json.loads(sweep.base.to_json())
    assert stored["versions"]["jax"] and stored["code"] and "commit" in stored
    before = (tmp_path / "runs" / sweeps.PLAN).read_bytes()
    assert settle(sweep, tmp_path / "runs") == sweep.runs
    assert (tmp_path / "runs" / sweeps.PLAN).read_bytes() == before
    assert not (tmp_path / "runs" / claim.NAME).exists()


def test_a_changed_sweep_says_what_it_changes_and_is_accepted(sweep, tmp_path):
    settle(sweep, tmp_path / "runs")
    points = (
        'axes.grid({"optimizer.learning_rate": [3e-3, 1e-2], "seed": [0], "train.log_every": [10]})'
    )
    path = tmp_path / "toy" / "sweep.py"
    changed = write_sweep(path, points)
    with pytest.raises(ValueError) as error:
        settle(changed, tmp_path / "runs")
    message = str(error.value)
    assert f"adds {changed.runs[1].name}" in message and "--accept" in message
    assert f"removes {sweep.runs[0].name}" in message

    # A run with the same configuration as before keeps its directory, whatever it would be called.
    runs = settle(changed, tmp_path / "runs", accept=True)
    assert runs[0].name == sweep.runs[2].name != changed.runs[0].name
    stored = json.loads((tmp_path / "runs" / sweeps.PLAN).read_text())
    assert len(stored["earlier"]) == 1
    assert settle(changed, tmp_path / "runs") == runs


def test_another_base_other_code_and_other_packages_are_changes(sweep, tmp_path, monkeypatch):
    settle(sweep, tmp_path / "runs")
    config = config_lib.default()
    config.optimizer.weight_decay = 0.5
    points = 'axes.product(axes.grid({"optimizer.learning_rate": [1e-3, 3e-3]}), axes.seeds(2))'
    other = write_sweep(tmp_path / "toy" / "sweep.py", points, config)
    with pytest.raises(
        ValueError, match="changes optimizer.weight_decay of all runs: 0.1 there, 0.5"
    ):
        settle(other, tmp_path / "runs")

    monkeypatch.setattr(plan, "PACKAGES", ("jax", "pytest"))
    monkeypatch.setattr(files, "short_hash_of_parts", lambda parts: "0")
    with pytest.raises(ValueError, match="(?s)other code.*another ") as error:
        settle(sweep, tmp_path / "runs")
    assert "another pytest: None there" in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.length", "2000 steps"),
        ("evals", dict(x=dict(type="mine.Eval", every=0, batch_size=1))),
        ("checkpoint.every", 7),
    ],
)
def test_runs_that_change_what_a_run_may_change_keep_their_directories(sweep, tmp_path, key, value):
    workdir = epath.Path(tmp_path / "runs")
    names = [run.name for run in settle(sweep, workdir)]
    for run in sweep.runs:
        config = sweep.config(run)
        done(workdir / run.name, config)
        (workdir / run.name / "config.json").write_text(config.to_json())
    longer = config_lib.default()
    longer.update_from_flattened_dict({key: value})
    points = 'axes.product(axes.grid({"optimizer.learning_rate": [1e-3, 3e-3]}), axes.seeds(2))'
    changed = write_sweep(tmp_path / "toy" / "sweep.py", points, longer)
    with pytest.raises(ValueError, match=f"changes {names[0]}\n"):
        settle(changed, workdir)

    runs = settle(changed, workdir, accept=True)
    assert [run.name for run in runs] == names
    assert state.check_directories(changed, runs, workdir) == []
    # Longer ones go on; others are over.
    wanted = state.WAITING if key == "train.length" else state.DONE
    statuses = {known.status for known in state.read(changed, runs, workdir).values()}
    assert statuses == {wanted}


def test_two_sweeps_in_one_directory_are_refused(sweep, tmp_path):
    settle(sweep, tmp_path / "runs")
    other = write_sweep(tmp_path / "other" / "sweep.py", "axes.seeds(1)")
    for accept in (False, True):
        with pytest.raises(ValueError, match="directory of the sweep 'toy/sweep.py'"):
            settle(other, tmp_path / "runs", accept)


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored.pop("versions"),
        lambda stored: stored.update(runs={}),
        lambda stored: stored["runs"].append("x"),
        lambda stored: stored["runs"][0].pop("hash"),
        lambda stored: stored["runs"][0].update(name="../elsewhere"),
        lambda stored: stored["runs"][0].update(changes=5),
    ],
    ids=["no versions", "runs", "a run", "no hash", "a path", "changes"],
)
def test_a_plan_that_somebody_else_wrote_is_an_error(sweep, tmp_path, change):
    settle(sweep, tmp_path / "runs")
    path = tmp_path / "runs" / sweeps.PLAN
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="sweep.json"):
        settle(sweep, tmp_path / "runs", accept=True)
    with pytest.raises(ValueError, match="sweep.json"):
        plan.stored_runs(epath.Path(tmp_path / "runs"))


def finish(directory, config, **metrics):
    """What a run that is done leaves."""
    directory.mkdir(parents=True, exist_ok=True)
    summary = {"length": config.train.length, "total_steps": 5, "finished": True}
    (directory / "run.json").write_text(json.dumps(summary))
    (directory / "config.json").write_text(config.to_json())
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 5} | metrics) + "\n")


def test_directories_that_were_renamed_or_are_strangers(sweep, tmp_path):
    runs, workdir = sweep.runs, epath.Path(tmp_path)
    for run in runs:
        finish(tmp_path / run.name, sweep.config(run))
    finish(tmp_path / "mine", config_lib.default())
    (tmp_path / "notes").mkdir()
    assert state.check_directories(sweep, runs, workdir) == ["mine"]

    (tmp_path / runs[0].name).rename(tmp_path / "best")
    with pytest.raises(
        ValueError, match=f"(?s)best has the configuration of the run {runs[0].name}"
    ):
        state.check_directories(sweep, runs, workdir)
    (tmp_path / "best").rename(tmp_path / runs[0].name)
    (tmp_path / runs[1].name / "config.json").write_text(sweep.config(runs[0]).to_json())
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        state.check_directories(sweep, runs, workdir)


def test_a_run_that_began_from_hugging_face_is_known_again(sweep, tmp_path, monkeypatch):
    """Its config.json has the model of the checkpoint, which the plan doesn't know."""

    def apply(config):
        applied = config.copy_and_resolve_references().unlock()
        applied.model.num_layers = 7
        return applied

    for run in sweep.runs:
        finish(tmp_path / run.name, apply(sweep.config(run)))
    with pytest.raises(ValueError, match="model.num_layers: 7 there"):
        state.check_directories(sweep, sweep.runs, epath.Path(tmp_path))
    monkeypatch.setattr(state.build, "apply_hf_config", apply)
    assert state.check_directories(sweep, sweep.runs, epath.Path(tmp_path)) == []


# --- workers ---


class FakeRun:
    """A process that trains nothing: it takes a moment, and ends as it is told to."""

    def __init__(self, seconds, log, end):
        self._seconds, self._log, self._end = seconds, log, end
        self._stopped = threading.Event()

    def wait(self):
        if self._stopped.wait(self._seconds):
            return 0
        code, printed = self._end()
        self._log.write(printed.encode())
        self._log.flush()
        return code

    def terminate(self):
        self._stopped.set()


class FakeWorkers(worker.Workers):
    """Workers whose runs are fake.

    Args:
      ends: called with (directory, configuration) when a run has come to its end; returns its code
        and what it prints.
    """

    def __init__(self, sweep, workdir, number, ends, seconds=0.02):
        self.started, self.said = [], []
        self._ends, self._seconds = ends, seconds
        super().__init__(sweep, workdir, [worker.Share({})] * number, self.said.append)

    def _start(self, command, log, share, environment):
        directory = next(arg.partition("=")[2] for arg in command if arg.startswith("--workdir="))
        lengths = [arg for arg in command if arg.startswith("--config.train.length=")]
        directory = epath.Path(directory)
        self.started.append((directory.name, *(arg.partition("=")[2] for arg in lengths)))
        assert environment[claim.PASSED_ON].endswith(f" {directory}")
        [run] = [run for run in self._sweep.runs if run.name == directory.name]
        config = self._sweep.config(run, *(length.partition("=")[2] for length in lengths))
        assert environment[config_lib.PLANNED] == config_lib.content_hash(config)
        return FakeRun(self._seconds, log, lambda: self._ends(directory, config))


def done(directory, config, **metrics):
    """Ends a run as lm.main does, in a folder or a bucket."""
    summary = {"length": config.train.length, "total_steps": 5, "finished": True}
    files.write_whole(directory / "run.json", json.dumps(summary))
    files.write_whole(directory / "metrics.jsonl", json.dumps({"step": 5} | metrics) + "\n")
    return 0, ""


class MirroredBucket(test_files.Bucket):
    """The objects that the server of claims has, as a file system."""

    store, pseudo_dirs = {}, [""]


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path, bucket, monkeypatch):  # noqa: F811
    """Where a sweep's runs lie."""
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.02)
    if request.param == "folder":
        return epath.Path(tmp_path / "runs")
    file_system = MirroredBucket()
    file_system.store.clear()
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: file_system)
    change = bucket.change

    def change_and_mirror(name, content, wanted):
        status = change(name, content, wanted)
        if status == 200:
            file_system.pipe(name, content)
        elif status == 204:
            file_system.rm(name)
        return status

    monkeypatch.setattr(bucket, "change", change_and_mirror)
    return epath.Path("gs://bucket/runs")


def test_four_workers_drain_forty_runs_each_once(place, tmp_path):
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(40)")
    plan.settle(sweep, place, accept=False)
    # Two processes of two workers each, as far as the directory can tell.
    both = [FakeWorkers(sweep, place, 2, done) for _ in range(2)]
    threads = [threading.Thread(target=workers.run) for workers in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = [name for workers in both for (name,) in workers.started]
    assert sorted(started) == sorted(run.name for run in sweep.runs)
    states = state.read(sweep, sweep.runs, place)
    assert {known.status for known in states.values()} == {state.DONE}
    assert not any((place / run.name / claim.NAME).exists() for run in sweep.runs)


def test_a_run_of_a_dead_worker_is_taken_when_its_heartbeat_has_ended(place, tmp_path, monkeypatch):
    """Of one on another host, which no system call can tell of; and whose clock may be any: this
    host's jumps by years, to and fro.
    """
    jumps = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1e9 + next(jumps) % 2 * 1e9)
    monkeypatch.setattr(claim, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(claim, "STALE_SECONDS", 1.2)
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(1)")
    plan.settle(sweep, place, accept=False)
    [run] = sweep.runs
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(claim, "_system", lambda: "another boot")
        other = claim.Claim(place / run.name)
    other.__enter__()

    workers = FakeWorkers(sweep, place, 1, done)
    thread = threading.Thread(target=workers.run)
    thread.start()
    time.sleep(1.5)
    assert not workers.started  # it lives
    other._ended.set()
    other._thread.join()
    died = time.monotonic()
    thread.join(20)
    assert workers.started == [(run.name,)]
    assert time.monotonic() - died > 1.1


def test_a_failed_run_is_told_and_stops_no_other(place, tmp_path):
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(4)")
    plan.settle(sweep, place, accept=False)
    bad = sweep.runs[1].name

    def end(directory, config):
        if directory.name == bad:
            return 1, "step 3\n\nerror: step 4 is not finite\n"
        return done(directory, config)

    workers = FakeWorkers(sweep, place, 2, end)
    assert workers.run()
    assert sorted(name for (name,) in workers.started) == sorted(run.name for run in sweep.runs)
    states = state.read(sweep, sweep.runs, place)
    assert states[bad].status == state.FAILED_STATUS and states[bad].why == "step 4 is not finite"
    assert [known.status for known in states.values()].count(state.DONE) == 3
    failure = files.read_json(place / bad / sweeps.FAILED)
    assert failure["code"] == 1 and failure["lines"][0] == "step 3"

    # It isn't tried again, unless that is asked for.
    again = FakeWorkers(sweep, place, 2, done)
    assert again.run() and not again.started
    (place / bad / sweeps.FAILED).unlink()
    assert again.__class__(sweep, place, 1, done).run()
    assert state.read(sweep, sweep.runs, place)[bad].status == state.DONE


def test_only_a_run_that_was_stopped_from_outside_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(3)")
    workdir = epath.Path(tmp_path / "runs")
    plan.settle(sweep, workdir, accept=False)
    preempted, killed, _ = [run.name for run in sweep.runs]
    ends = {preempted: [-signal.SIGTERM, 0], killed: [-signal.SIGKILL]}

    def end(directory, config):
        codes = ends.get(directory.name)
        return (codes.pop(0), "") if codes else done(directory, config)

    workers = FakeWorkers(sweep, workdir, 1, end)
    assert workers.run()
    names = [name for (name,) in workers.started]
    assert names.count(preempted) == 3 and names.count(killed) == 1
    known = state.read(sweep, sweep.runs, workdir)[killed]
    assert known.status == state.FAILED_STATUS and "memory" in known.why


def test_a_stop_ends_the_runs_under_way_and_leaves_the_others(tmp_path):
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(6)")
    workdir = epath.Path(tmp_path / "runs")
    plan.settle(sweep, workdir, accept=False)
    workers = FakeWorkers(sweep, workdir, 2, done, seconds=60)
    thread = threading.Thread(target=workers.run)
    thread.start()
    while len(workers.started) < 2:
        time.sleep(0.01)
    workers.stop()
    thread.join(10)
    assert not thread.is_alive() and len(workers.started) == 2
    states = state.read(sweep, sweep.runs, workdir)
    assert {known.status for known in states.values()} == {state.WAITING}


def test_a_plan_that_changes_elsewhere_ends_the_workers_that_do_not_know_it(place, tmp_path):
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(3)")
    plan.settle(sweep, place, accept=False)
    config = config_lib.default()
    config.optimizer.weight_decay = 0.5
    (tmp_path / "elsewhere").mkdir()
    changed = write_sweep(tmp_path / "elsewhere" / "toy" / "sweep.py", "axes.seeds(3)", config)

    def end(directory, config):
        plan.settle(changed, place, accept=True)
        return done(directory, config)

    workers = FakeWorkers(sweep, place, 1, end)
    with pytest.raises(ValueError, match="the plan of .* has changed"):
        workers.run()
    assert len(workers.started) == 1
    states = state.read(changed, plan.stored_runs(place), place)
    assert {known.status for known in states.values()} == {state.WAITING}


def test_code_that_changes_while_a_sweep_is_under_way_ends_it(tmp_path, monkeypatch):
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(3)")
    workdir = epath.Path(tmp_path / "runs")
    plan.settle(sweep, workdir, accept=False)

    def end(directory, config):
        monkeypatch.setattr(plan, "code_hash", lambda: "another")
        return done(directory, config)

    workers = FakeWorkers(sweep, workdir, 1, end)
    with pytest.raises(ValueError, match="files of lm have changed"):
        workers.run()
    assert len(workers.started) == 1
    statuses = [known.status for known in state.read(sweep, sweep.runs, workdir).values()]
    assert sorted(statuses) == [state.DONE, state.WAITING, state.WAITING]


def test_a_run_that_has_another_configuration_than_planned_does_not_begin(monkeypatch):
    config = config_lib.default()
    main.check_planned(config)  # of no sweep
    monkeypatch.setenv(config_lib.PLANNED, config_lib.content_hash(config))
    main.check_planned(config)
    config.optimizer.learning_rate *= 2
    with pytest.raises(ValueError, match="not the configuration that the sweep planned"):
        main.check_planned(config)


def test_a_bucket_that_refuses_is_an_error(bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.5)
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(2)")
    workdir = epath.Path(tmp_path / "runs")
    plan.settle(sweep, workdir, accept=False)
    monkeypatch.setattr(claim, "_Folder", lambda path: claim._Bucket(f"gs://bucket/{path.name}"))
    bucket.refuse = 403
    with pytest.raises(OSError, match="CLAIM.json: .*403"):
        FakeWorkers(sweep, workdir, 2, done).run()


PASSES_ON = """
import os, subprocess, sys
from etils import epath
from lm import claim
claim.BEAT_SECONDS = 0.05
directory = epath.Path(sys.argv[1])
with claim.Claim(directory) as held:
    print(os.getpid(), flush=True)
    child = [sys.executable, "-c", sys.argv[2], str(directory)]
    subprocess.run(child, env=os.environ | held.environment)
"""
TAKES = """
import os, sys, time
from etils import epath
from lm import claim
with claim.Claim(epath.Path(sys.argv[1])) as held:
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    held.check()
    print("still mine", flush=True)
"""


def test_a_claim_that_is_passed_on_holds_for_as_long_as_the_process_that_took_it(tmp_path):
    """A worker that is killed leaves its run's process behind: nobody takes the run from it."""
    command = [sys.executable, "-c", PASSES_ON, str(tmp_path / "run"), TAKES]
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, stdout=pipe, stdin=pipe, text=True, env=environment)
    pids = [int(first.stdout.readline()), int(first.stdout.readline())]
    directory = epath.Path(tmp_path / "run")
    os.kill(pids[0], signal.SIGKILL)
    first.wait()
    with pytest.raises(claim.Taken, match=f"process {pids[1]} "):
        claim.Claim(directory).__enter__()

    first.stdin.write("\n")
    first.stdin.close()
    assert first.stdout.readline() == "still mine\n"
    while Path(f"/proc/{pids[1]}").exists():
        time.sleep(0.01)
    # It released nothing: that is for whoever passed the claim on, and another takes over.
    assert (directory / claim.NAME).exists()
    with claim.Claim(directory):
        pass


FAILS = """
import os, signal, sys
from etils import epath
from lm import claim
with claim.Claim(epath.Path(sys.argv[1])):
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit("failed")
"""


@pytest.mark.parametrize("how", ["failed", "killed"])
def test_a_claim_goes_back_when_the_process_that_took_it_has_ended(tmp_path, how):
    """Nobody takes the run while its worker writes down how it ended."""
    directory = epath.Path(tmp_path / "run")
    with claim.Claim(directory) as held:
        environment = os.environ | held.environment | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", FAILS, str(directory), how]
        assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode
        if how == "killed":
            held.check()  # as a worker does first
        with pytest.raises(claim.Taken, match=f"process {os.getpid()} "):
            claim.Claim(directory).__enter__()
        held.check()
    assert not (directory / claim.NAME).exists()


# --- devices ---


def test_devices_are_dealt(monkeypatch):
    found = {}
    monkeypatch.setattr(worker.glob, "glob", lambda pattern: found.get(pattern, []))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4}, raising=False)
    assert worker.deal_devices(1) == [worker.Share({})]
    assert [share.cores for share in worker.deal_devices(2)] == [[0, 1], [2, 3]]
    assert len(worker.deal_devices(6)) == 6

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    shares = worker.deal_devices(3)
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4", "5", "7"]
    with pytest.raises(ValueError, match="--workers=4 are more than the 3 GPUs"):
        worker.deal_devices(4)

    found["/dev/accel[0-9]*"] = [f"/dev/accel{i}" for i in range(8)]
    shares = worker.deal_devices(2)
    assert [share.environment["TPU_VISIBLE_CHIPS"] for share in shares] == ["0,1,2,3", "4,5,6,7"]
    with pytest.raises(ValueError, match="would have 8|would have 3|wanted"):
        found["/dev/accel[0-9]*"] = [f"/dev/accel{i}" for i in range(6)]
        worker.deal_devices(2)


# --- successive halving ---

HALVING = """
def get_halving():
    return Halving("eval/validation/loss", ("10 steps", "30 steps", "90 steps"), keep={keep})
"""


def halving_config():
    config = config_lib.default()
    config.evals = dict(validation=dict(type="x", every=0, batch_size=16))
    return config


def halving_sweep(path, points, keep="1/3"):
    return write_sweep(path, points, halving_config(), HALVING.format(keep=keep))


def end_round(losses, log):
    """Ends a run at its length with the loss of its learning rate and seed."""

    def end(directory, config):
        steps = int(config.train.length.split()[0])
        loss = losses[config.optimizer.learning_rate, config.seed]
        if loss is None:
            return 1, ""
        log.append((config.optimizer.learning_rate, config.seed, steps))
        lines = files.read_jsonl_log(directory / "metrics.jsonl")
        lines.append({"step": steps, "eval/validation/loss": loss + 1 / steps})
        files.write_whole(
            directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines)
        )
        summary = {"length": config.train.length, "total_steps": steps, "finished": True}
        files.write_whole(directory / "run.json", json.dumps(summary))
        return 0, ""

    return end


def test_halving_makes_the_best_settings_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    rates = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    points = f'axes.grid({{"optimizer.learning_rate": {rates}, "seed": [0, 1]}})'
    sweep = halving_sweep(tmp_path / "toy" / "sweep.py", points)
    workdir = epath.Path(tmp_path / "runs")
    plan.settle(sweep, workdir, accept=False)
    # By the mean over seeds 0.3 is best, then 0.5; 0.2 has a seed that fails, 0.6 a good one only.
    losses = {(rate, seed): 5.0 + rate for rate in rates for seed in (0, 1)}
    losses |= {(0.3, 0): 1.0, (0.3, 1): 1.2, (0.5, 0): 1.1, (0.5, 1): 1.3, (0.6, 0): 0.1}
    losses |= {(0.2, 0): 0.2, (0.2, 1): None}
    log = []
    workers = FakeWorkers(sweep, workdir, 3, end_round(losses, log))
    assert workers.run()

    by_steps = {steps: sorted(run[:2] for run in log if run[2] == steps) for steps in (10, 30, 90)}
    assert len(by_steps[10]) == 11
    assert by_steps[30] == [(0.3, 0), (0.3, 1), (0.5, 0), (0.5, 1)]
    assert by_steps[90] == [(0.3, 0), (0.3, 1)]
    assert len(log) == len(set(log))  # nothing twice
    # A round begins when the one before is over.
    assert [steps for _, _, steps in log] == sorted(steps for _, _, steps in log)

    states = state.read(sweep, sweep.runs, workdir)
    by_status = {}
    for known in states.values():
        by_status[known.status] = by_status.get(known.status, 0) + 1
    assert by_status == {state.DONE: 2, state.OUT: 9, state.FAILED_STATUS: 1}
    again = FakeWorkers(sweep, workdir, 1, done)
    assert again.run() and not again.started


@pytest.mark.parametrize(
    "more, message",
    [
        ('("10 steps", "5 steps")', "growing"),
        ('("10 steps",)', "two or more"),
        ('("10 steps", "2e3 tokens")', "all in steps"),
        ('("1 epochs", "2 epochs")', "in steps or"),
    ],
)
def test_bad_lengths_of_a_halving(tmp_path, more, message):
    text = f'\ndef get_halving(): return Halving("eval/validation/loss", {more})\n'
    with pytest.raises(ValueError, match=message):
        write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(2)", halving_config(), text)


def test_a_halving_decides_the_length(tmp_path):
    text = '\ndef get_halving(): return Halving("eval/validation/loss", ("1 steps", "2 steps"))\n'
    points = 'axes.grid({"train.length": ["5 steps", "6 steps"]})'
    with pytest.raises(ValueError, match="decides train.length"):
        write_sweep(tmp_path / "toy" / "sweep.py", points, halving_config(), text)


def test_a_share_is_no_more_than_it_says():
    rule = Halving("eval/validation/loss", ("1 steps", "2 steps"), keep=0.28)
    names = {str(i): str(i) for i in range(25)}
    assert len(rule.survivors(names, {name: float(name) for name in names})) == 7


@pytest.mark.parametrize("metric", ["eval/other/loss", "train/loss", "eval/validation/bytes"])
def test_bad_metrics_of_a_halving(tmp_path, metric):
    text = f'\ndef get_halving(): return Halving("{metric}", ("1 steps", "2 steps"))\n'
    with pytest.raises(ValueError, match=f"halving: metric = '{metric}'"):
        write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(2)", halving_config(), text)


# --- search ---

SEARCH = """
def get_search():
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    yes_or_no = CategoricalDistribution([False, True])
    space = {{"optimizer.learning_rate": {rates}, "model.qk_norm": yes_or_no}}
    return Search("eval/validation/loss", space, number={number})
"""


def test_a_search_proposes_runs_until_there_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)
    text = SEARCH.format(rates="FloatDistribution(1e-4, 1e-1, log=True)", number=25)
    points = '[{"optimizer.learning_rate": 1e-3, "model.qk_norm": False}]'

    def end(directory, config):
        loss = abs(math.log10(config.optimizer.learning_rate) + 2) + config.model.qk_norm
        return done(directory, config, **{"eval/validation/loss": loss})

    found = []
    for attempt in "ab":
        path = tmp_path / attempt / "toy" / "sweep.py"
        path.parent.parent.mkdir()
        sweep = write_sweep(path, points, halving_config(), text)
        workdir = epath.Path(tmp_path / attempt / "runs")
        plan.settle(sweep, workdir, accept=False)
        workers = SearchingWorkers(sweep, workdir, 1, end, seconds=0)
        assert workers.run()
        runs = plan.stored_runs(workdir)
        assert len(runs) == len(workers.started) == 25
        # What the search added is no change of the plan, and nothing is left to do.
        assert plan.settle(sweep, workdir, accept=False) == runs
        with monkeypatch.context() as changed:
            changed.setattr(files, "short_hash_of_parts", lambda parts: "other code")
            assert plan.settle(sweep, workdir, accept=True) == runs
        plan.settle(sweep, workdir, accept=True)
        found.append([dict(run.changes) for run in runs])
    assert found[0] == found[1]

    # It looks where the runs were good: TPE begins with ten at random.
    good = [abs(math.log10(changes["optimizer.learning_rate"]) + 2) for changes in found[0]]
    assert sum(good[15:]) / 10 < sum(good[1:11]) / 10


class SearchingWorkers(FakeWorkers):
    """Fake workers of runs that the sweep file doesn't have."""

    def _start(self, command, log, share, environment):
        directory = next(arg.partition("=")[2] for arg in command if arg.startswith("--workdir="))
        directory = epath.Path(directory)
        self.started.append(directory.name)
        [run] = [run for run in plan.stored_runs(self._workdir) if run.name == directory.name]
        config = self._sweep.config(run)
        return FakeRun(self._seconds, log, lambda: self._ends(directory, config))


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Makes (sweep, directory) of a search that is settled there, for its rates and number."""
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.01)

    def settled(rates, number):
        text = SEARCH.format(rates=rates, number=number)
        sweep = write_sweep(tmp_path / "toy" / "sweep.py", "[]", halving_config(), text)
        workdir = epath.Path(tmp_path / "runs")
        plan.settle(sweep, workdir, accept=False)
        return sweep, workdir

    return settled


@pytest.mark.parametrize("number, seconds", [(1, 0), (3, 0.5)])
def test_a_search_of_a_small_space_ends_with_an_error(searched, number, seconds):
    """And with no run stopped: of three workers for two runs the idle one ends none."""
    sweep, workdir = searched("CategoricalDistribution([1e-3])", 5)
    workers = SearchingWorkers(sweep, workdir, number, done, seconds=seconds)
    with pytest.raises(ValueError, match="has fewer than 5"):
        workers.run()
    runs = plan.stored_runs(workdir)
    states = state.read(sweep, runs, workdir)
    assert [known.status for known in states.values()] == [state.DONE] * 2
    assert len(workers.started) == 2


def propose(space, finished, is_new=lambda changes: True):
    found = Search("eval/validation/loss", space, number=9)
    return found.propose(halving_config(), finished, is_new, seed=0)


def test_a_search_learns_nothing_from_what_is_no_number_or_not_in_its_space():
    from optuna.distributions import FloatDistribution

    space = {"optimizer.learning_rate": FloatDistribution(1e-4, 1e-1)}
    told = [({"optimizer.learning_rate": 1e-2}, math.nan), ({"optimizer.learning_rate": 0.5}, 1.0)]
    assert propose(space, told) == propose(space, [])


def test_a_search_proposes_no_configuration_twice(tmp_path):
    """Whichever keys a run names: what it leaves to the configuration counts too."""
    text = """
def get_search():
    from optuna.distributions import IntDistribution
    space = {"model.num_layers": IntDistribution(2, 4, step=2)}
    return Search("eval/validation/loss", space, number=4)
"""
    points = 'axes.product(axes.grid({"model.num_layers": [2, 4]}), axes.seeds(1))'
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", points, halving_config(), text)
    plan.settle(sweep, epath.Path(tmp_path / "runs"), accept=False)
    with pytest.raises(search.Exhausted):
        plan.add_run(sweep, epath.Path(tmp_path / "runs"), [])


def test_a_search_is_told_of_runs_that_are_over(searched, monkeypatch):
    sweep, workdir = searched("FloatDistribution(1e-4, 1e-1, log=True)", 3)
    told = []
    propose_really = Search.propose

    def propose(self, base, finished, is_new, seed):
        told.append(len(finished))
        return propose_really(self, base, finished, is_new, seed)

    def end(directory, config):
        line = {"step": 5, "eval/validation/loss": 1.0}
        files.write_whole(directory / "metrics.jsonl", json.dumps(line) + "\n")
        return 1, "error: after its eval"

    monkeypatch.setattr(Search, "propose", propose)
    assert SearchingWorkers(sweep, workdir, 1, end, seconds=0).run()
    assert told == [0, 0, 0]


# --- predictions ---


def test_predictions_are_what_a_run_counts(small, tmp_path, fast_runs, monkeypatch):
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", "axes.seeds(1)", small)
    [run] = sweep.runs
    timing = predict.Timing(once=10.0, step=0.5, evals={}, checkpoint=0.0)
    monkeypatch.setattr(predict, "calibrate", lambda sweep, run: timing)
    monkeypatch.setattr(predict.startup, "start", lambda platform: jax.devices()[:1])
    monkeypatch.setattr(predict, "_in_a_process", lambda function, *args: function(*args))
    predicted = predict.predict(sweep, say=lambda line: None)[run.name]

    run_training(sweep.config(run), tmp_path / "run")
    lines = files.read_jsonl_log(epath.Path(tmp_path / "run" / "metrics.jsonl"))
    last = [line for line in lines if "train/flops" in line][-1]
    assert predicted.flops == pytest.approx(last["train/flops"])
    assert predicted.tokens == last["step"] * small.data.batch_size * small.data.length
    assert predicted.seconds == pytest.approx(10.0 + 0.5 * (last["step"] - 1))


def test_runs_of_one_cost_share_a_calibration():
    config, size = config_lib.default(), {"parameters": 10, "flops_per_step": 1e9}
    cost = predict._cost(config, size)
    config.optimizer.learning_rate *= 2
    config.seed = 5
    assert predict._cost(config, size) == cost
    # A checkpoint of another size, and what is switched on, cost another time.
    assert predict._cost(config, size | {"parameters": 20}) != cost
    config.optimizer.ema_decay = 0.999
    assert predict._cost(config, size) != cost


def test_evals_and_checkpoints_cost_what_they_cost_each_time():
    """And sizes that weren't timed lie between those that were."""
    config = halving_config()
    config.evals.validation.every = 10
    config.checkpoint.every = 25
    timings = [
        (1e9, predict.Timing(5.0, 0.1, {"validation": 3.0}, 2.0)),
        (3e9, predict.Timing(9.0, 0.3, {"validation": 4.0}, 6.0)),
    ]
    size = {"flops_per_step": 1e9, "total_steps": 100}
    # Of ten evals the first is in `once`, of four checkpoints the last.
    wanted = 5.0 + 99 * 0.1 + 9 * 3.0 + 3 * 2.0
    assert predict.predicted_seconds(config, size, timings) == pytest.approx(wanted)
    config.train.look_every = 30
    looking = [(1e9, timings[0][1]._replace(look=4.0))]
    size = {"flops_per_step": 1e9, "total_steps": 100}
    assert predict.predicted_seconds(config, size, looking) == pytest.approx(wanted + 3 * 4.0)

    size = {"flops_per_step": 1.5e9, "total_steps": 5}
    assert predict.predicted_seconds(config, size, timings) == pytest.approx(6.0 + 4 * 0.15)


def test_a_calibration_has_a_schedule_that_fits_its_length(tmp_path, monkeypatch):
    points = """[{"optimizer.schedule": "wsd", "optimizer.warmup_steps": 50,
                  "optimizer.decay_steps": 500}]"""
    sweep = write_sweep(tmp_path / "toy" / "sweep.py", points)
    asked = []

    def fail(command, **kwargs):
        asked.extend(command)
        return subprocess.CompletedProcess(command, 1, b"error: no")

    monkeypatch.setattr(predict.subprocess, "run", fail)
    with pytest.raises(ValueError, match="calibration of .* failed: error: no"):
        predict.calibrate(sweep, sweep.runs[0])
    # The last of two flags counts.
    flags_given = dict(arg.split("=", 1) for arg in asked if arg.startswith("--config.optimizer"))
    steps = {}
    for key in ("warmup_steps", "decay_steps"):
        steps[key] = int(flags_given[f"--config.optimizer.{key}"])
    optim.make_schedule("wsd", peak=1.0, total_steps=2 * predict.STEPS, final=0.0, **steps)


# --- the whole command ---


def start(command):
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_ends_as_an_undisturbed_one(small, tmp_path, monkeypatch):
    small.train.length = "20 steps"
    small.checkpoint.every = 5
    rates, seeds = [1e-3, 1e-3, 2e-3, 3e-3, 3e-3], [0, 1, 0, 0, 1]
    points = f'axes.zipped({{"optimizer.learning_rate": {rates}, "seed": {seeds}}})'
    path, workdir = tmp_path / "toy" / "sweep.py", tmp_path / "runs"
    # Reading the file takes the curves away from this process too, for as long as the test takes.
    monkeypatch.setattr(telemetry, "plot_curves", telemetry.plot_curves)
    sweep = write_sweep(path, points, small, more=NO_CURVES)
    command = [sys.executable, "-m", "lm.sweep", f"--sweep={path}", f"--workdir={workdir}"]
    command.append("--workers=2")

    def finished():
        states = state.read(sweep, sweep.runs, epath.Path(workdir))
        return [name for name, known in states.items() if known.status == state.DONE]

    def wait_for(number):
        deadline = time.monotonic() + 240
        while len(finished()) < number and time.monotonic() < deadline:
            time.sleep(0.2)

    first = start(command)
    wait_for(1)
    first.kill()  # its runs go on by themselves to their ends
    first.wait()
    second = start(command)
    wait_for(3)
    second.terminate()
    assert second.wait(60) == 0
    assert 3 <= len(finished()) < 5
    assert start(command).wait(300) == 0
    assert len(finished()) == 5
    assert start([*command, "--report"]).wait(60) == 0
    page = (workdir / "report.html").read_text()
    assert all(run.name in page for run in sweep.runs)

    undisturbed = tmp_path / "undisturbed" / "runs"
    assert start([*command, f"--workdir={undisturbed}"]).wait(300) == 0
    for run in sweep.runs:
        # Each took its first step once: what came after a stop went on from there.
        log = (workdir / run.name / state.LOG).read_text()
        trained = [start for start in log.split("running on ") if "first step after" in start]
        from_0 = [not re.search("going on from step [1-9]", start) for start in trained]
        assert from_0 == [True, *[False] * (len(trained) - 1)]
        assert_same_run(workdir / run.name, undisturbed / run.name, 20)
    assert timeless_page(workdir) == timeless_page(undisturbed)


def timeless_page(workdir):
    """The report of a sweep whose runs measured no times."""
    for path in workdir.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for name in list(line):
                if name in run_sections.TIMES or "seconds" in name:
                    del line[name]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report.sweep_page(epath.Path(workdir))
