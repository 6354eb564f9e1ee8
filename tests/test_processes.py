"""Runs of 2 and 4 real processes, as on the hosts of a pod, with collectives over the network: 8
simulated devices in all.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from lm import convert
from lm.evals import entries
from lm.hf import safetensors
from tests import test_policy
from tests.helpers import (
    CONFIG_FILE,
    LAST_STEP,
    NO_CURVES,
    ROOT,
    SLOW_SOURCE,
    VERBALIZER,
    assert_same_run,
    read_jsonl,
    read_metrics,
    run_training,
    saved_steps,
    xla_flags,
)

pytestmark = pytest.mark.usefixtures("fast_runs")


@pytest.fixture
def config(small, tmp_path):
    """f32, so that meshes may be compared; evals and checkpoints every 4 steps."""
    small.data.update(dict(batch_size=16, streams=8))
    small.mesh.update(dict(data=2, fsdp=4))
    small.model.param_dtype = "float32"
    small.train.update(dict(length=f"{LAST_STEP} steps", accumulation=2, log_every=1))
    small.checkpoint.update(dict(every=4, keep=9, best="eval/text/loss"))

    # One of each kind of evaluator, since each collects results of all processes.
    small.evals.text = entries.perplexity(every=4, batch_size=16)
    small.evals.labels = entries.classification(VERBALIZER, every=4, batch_size=16)
    small.evals.samples = entries.samples(("red", "ab"), every=6, max_new_tokens=3)
    (tmp_path / "answers.toml").write_text('type = "lm.evals.generation.TextGeneration"')
    examples = [json.dumps(dict(q=q)) for q in ("red", "ab ", "é", "blue cd", "green")]
    (tmp_path / "test.jsonl").write_text("\n".join(examples) + "\n")
    small.evals.answers = entries.task(
        str(tmp_path / "answers.toml"),
        every=4,
        batch_size=2,
        source=dict(path=str(tmp_path / "test.jsonl")),
        prompt=dict(template="{q}"),
        references="{q}",
        scores=("f1",),
        output=dict(max_new_tokens=4),
    )
    return small.lock()


class Hosts:
    """`count` processes of one run."""

    def __init__(self, count, config, run, *overrides):
        self.run = run
        config_file = run.parent / "config.py"
        config_file.write_text(CONFIG_FILE.format(text=json.dumps(config.to_dict())))
        # The coordinator listens on a port that is free now.
        with socket.socket() as free_port:
            free_port.bind(("localhost", 0))
            address = f"localhost:{free_port.getsockname()[1]}"
        command = [
            sys.executable,
            "-m",
            "lm.main",
            f"--config={config_file}",
            f"--workdir={run}",
            "--config.platform=cpu",
            *overrides,
        ]

        # 8 devices in all, whatever the number of processes; their outputs would mix on a pipe.
        self.logs = [run.parent / f"{run.name}-{count}-{i}.log" for i in range(count)]
        self.children = []
        for i, log in enumerate(self.logs):
            env = os.environ | {
                "XLA_FLAGS": xla_flags(8 // count),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
            }
            with log.open("w") as output:
                child = subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
                )
            self.children.append(child)

    def outputs(self):
        return [log.read_text() for log in self.logs]

    def wait(self, seconds=240):
        """Returns exit codes and outputs."""
        end = time.monotonic() + seconds
        codes = []
        try:
            for child in self.children:
                codes.append(child.wait(max(end - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired:
            ends = [output[-3000:] for output in self.outputs()]
            raise AssertionError("\n\n".join(ends)) from None
        finally:
            # Whatever went wrong, none may live on.
            for child in self.children:
                child.kill()
        return codes, self.outputs()

    def wait_for(self, step, seconds=120):
        """Waits for the checkpoint of a step while all processes run."""
        end = time.monotonic() + seconds
        while step not in saved_steps(self.run):
            all_run = all(child.poll() is None for child in self.children)
            assert all_run and time.monotonic() < end, self.wait(5)
            time.sleep(0.02)


@pytest.fixture
def slow_data(tmp_path, monkeypatch):
    """An override that makes steps slow enough to be hit."""
    (tmp_path / "slow_source.py").write_text(SLOW_SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "--config.data.source=slow_source.jsonl"


def numbers(run):
    """(step, name, value) of all numbers of metrics.jsonl, in order."""
    rows = []
    for line in read_metrics(run):
        for name, value in line.items():
            if isinstance(value, (int, float)):
                rows.append((line["step"], name, value))
    return rows


def assert_close(run, reference):
    """The same steps and evals, and metrics that differ by rounding alone."""
    rows, wanted_rows = numbers(run), numbers(reference)
    assert [row[:2] for row in rows] == [row[:2] for row in wanted_rows]
    for (step, name, value), (_, _, wanted) in zip(rows, wanted_rows):
        # Calibration error counts examples by bins, whose edges rounding may cross.
        if not name.endswith("/ece"):
            assert value == pytest.approx(wanted, rel=1e-4, abs=1e-6), (step, name)

    # Predictions and texts in the same order, though each process made a part of them.
    files = {path.name for path in (run / "predictions").glob("*.jsonl")}
    wanted_paths = sorted((reference / "predictions").glob("*.jsonl"))
    assert wanted_paths
    assert files == {path.name for path in wanted_paths}
    for wanted_path in wanted_paths:
        lines = read_jsonl(run / "predictions" / wanted_path.name)
        wanted_lines = read_jsonl(wanted_path)
        keys = {"name", "text"} & wanted_lines[0].keys()
        assert keys
        for key in keys:
            assert [line[key] for line in lines] == [line[key] for line in wanted_lines]


def test_two_processes_are_one(config, tmp_path, monkeypatch):
    run_training(config, tmp_path / "one", devices=8)
    source = f"{NO_CURVES}\nfrom lm.data.sources import jsonl\n"
    (tmp_path / "source.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    codes, outputs = Hosts(2, config, tmp_path / "two", "--config.data.source=source.jsonl").wait()
    assert codes == [0, 0], outputs
    assert_close(tmp_path / "two", tmp_path / "one")

    # There was something to be put in order.
    answers = read_jsonl(tmp_path / "two" / "predictions" / "answers-8.jsonl")
    assert len({line["text"] for line in answers}) > 1


def tensors(directory):
    """name -> array of all files of a Hugging Face directory."""
    arrays = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, entry in safetensors.entries(file).items():
            arrays[name] = np.asarray(entry.read(), np.float32)
    return arrays


@pytest.mark.slow
def test_adapters_of_two_processes(config, tmp_path):
    """38: what two trained and saved is merged and exported, and is that of one."""
    config = config.copy_and_resolve_references().unlock()
    config.evals = ConfigDict()
    config.checkpoint.best = ""
    run_training(config, tmp_path / "base", devices=8)
    config.init_from = str(tmp_path / "base")
    config.model.lora_rank = 4
    config.optimizer.learning_rate = 1e-2

    run_training(config, tmp_path / "one", devices=8)
    codes, outputs = Hosts(2, config, tmp_path / "two").wait()
    assert codes == [0, 0], outputs

    for name in ("one", "two"):
        run, merged = epath.Path(tmp_path / name), epath.Path(tmp_path / f"{name}-merged")
        convert.export_adapter(run, "", tmp_path / f"{name}-adapter")
        convert.merge(run, config.init_from, merged, jax.devices()[:1])
        convert.export_checkpoint(merged, tmp_path / f"{name}-hf", jax.devices()[:1])
    for kind in ("adapter", "hf"):
        one, two = tensors(tmp_path / f"one-{kind}"), tensors(tmp_path / f"two-{kind}")
        assert one.keys() == two.keys() and one
        for name, array in one.items():
            np.testing.assert_allclose(two[name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    for name, array in tensors(tmp_path / "two-adapter").items():
        assert np.abs(array).max() > 0, name


# A data source whose import makes a bit of a parameter flip on the sixth device, after step 5.
FLIPPING_SOURCE = f"""{NO_CURVES}
import jax
from lm import train
from lm.data.sources import jsonl
from tests.test_replicas import flip, flip_bit

check = train.Run.check_replicas_if_due

def flip_and_check(run):
    if run.step == 5:
        embed = run.state.params["embed"]
        embed["table"] = flip(embed["table"], jax.devices()[5].id, flip_bit())
    check(run)

train.Run.check_replicas_if_due = flip_and_check
"""


@pytest.mark.slow
def test_a_bit_flips_in_one(config, tmp_path, monkeypatch):
    """All processes end, all name the device and its process, and nothing of it is saved."""
    (tmp_path / "flipping_source.py").write_text(FLIPPING_SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config.mesh.update(dict(data=8, fsdp=1))
    config.train.check_replicas_every = 2
    run = tmp_path / "run"
    codes, outputs = Hosts(2, config, run, "--config.data.source=flipping_source.jsonl").wait()
    assert codes == [1, 1], outputs
    for output in outputs:
        assert re.search(
            r"error: after step 6 .*embed/table on device \d+ \(process 1\)\. ", output
        ), output
    assert saved_steps(run) == [4]


@pytest.mark.slow
def test_other_numbers_of_processes(config, slow_data, tmp_path):
    """Two processes, one of which is preempted (all stop, and save), then four of them: as one
    process that never stopped.
    """
    # Evals take most of the time, and samples are not compared.
    with config.unlocked():
        del config.evals["samples"]
    run = tmp_path / "run"
    run_training(config, tmp_path / "one", devices=8)

    hosts = Hosts(2, config, run, slow_data)
    hosts.wait_for(4)
    # As a cloud does it: one process is told, and all agree on a step to stop at.
    hosts.children[1].terminate()
    codes, outputs = hosts.wait()
    assert codes == [0, 0], outputs
    for output in outputs:
        assert "stopped by a signal at step" in output, outputs
        assert "start it again to go on" in output, outputs
    stopped = saved_steps(run)[-1]
    assert 4 <= stopped < LAST_STEP

    codes, outputs = Hosts(4, config, run, slow_data).wait()
    assert codes == [0] * 4, outputs
    # The first process alone writes the log.
    assert f"going on from step {stopped}" in outputs[0]
    assert all("going on" not in output for output in outputs[1:])
    assert_close(run, tmp_path / "one")


@pytest.mark.slow
def test_the_coordinator_dies(config, slow_data, tmp_path):
    """The other stops within a minute and says why; both started again end bit-equal to two that
    nothing happened to.
    """
    # Metrics of an eval, and predictions of another. All four would only take time.
    with config.unlocked():
        del config.evals["samples"], config.evals["answers"]
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    codes, outputs = Hosts(2, config, undisturbed, slow_data).wait()
    assert codes == [0, 0], outputs

    hosts = Hosts(2, config, run, slow_data)
    hosts.wait_for(4)
    hosts.children[0].kill()
    began = time.monotonic()
    codes, outputs = hosts.wait()
    assert time.monotonic() - began < 60
    assert codes[0] == -signal.SIGKILL
    assert codes[1] not in (0, None)
    assert_says_that_another_died(outputs[1])

    codes, outputs = Hosts(2, config, run, slow_data).wait()
    assert codes == [0, 0], outputs
    assert_same_run(run, undisturbed, LAST_STEP)


BROKEN_EVAL = """
import jax
from lm.evals import perplexity

run = perplexity.Perplexity.run

def fail(self, params):
    if jax.process_index() in FAILING:
        raise ValueError("a broken eval")
    yield from run(self, params)

perplexity.Perplexity.run = fail
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [(0, 1), (1,)])
def test_a_failing_eval_costs_no_step(config, slow_data, tmp_path, failing):
    """If all processes fail they save together. One that fails alone can't; all end."""
    breaking = BROKEN_EVAL.replace("FAILING", str(failing))
    (tmp_path / "slow_source.py").write_text(SLOW_SOURCE + breaking)
    with config.unlocked():
        config.evals = dict(text=entries.perplexity(every=6, batch_size=16))

    run = tmp_path / "run"
    codes, outputs = Hosts(2, config, run, slow_data).wait(120)
    assert 0 not in codes, outputs
    assert all("a broken eval" in outputs[process] for process in failing), outputs
    if failing == (0, 1):
        assert codes == [1, 1], outputs
        assert "step 6 is saved" in outputs[0]
        assert saved_steps(run) == [4, 6]
    else:
        assert_says_that_another_died(outputs[0])
        assert saved_steps(run) == [4]


def assert_says_that_another_died(output):
    messages = ("another one has died", "another task died")
    assert any(message in output for message in messages), output


@pytest.mark.slow
def test_an_error_in_one(config, slow_data, tmp_path):
    """It is printed, and the others don't wait for that process for ever."""
    # After 5 seconds, when steps are under way.
    breaking = """        import jax
        if jax.process_index() == 1 and time.monotonic() > START + 5:
            raise ValueError("a broken document")"""
    source = SLOW_SOURCE.replace("        time.sleep(0.02)", breaking)
    source = source.replace("class Slow", "START = time.monotonic()\n\nclass Slow")
    (tmp_path / "slow_source.py").write_text(source)

    # Evals would only delay the steps.
    with config.unlocked():
        config.evals = {}
    config.checkpoint.best = ""
    config.train.length = "100000 steps"

    began = time.monotonic()
    hosts = Hosts(2, config, tmp_path / "run", slow_data)
    codes, outputs = hosts.wait()
    assert time.monotonic() - began < 100
    assert 0 not in codes, outputs
    assert "a broken document" in outputs[1], outputs
    assert_says_that_another_died(outputs[0])


@pytest.mark.slow
def test_a_configuration_error_in_all(config, tmp_path):
    hosts = Hosts(2, config, tmp_path / "run", "--config.data.streams=1")
    codes, outputs = hosts.wait(60)
    assert codes == [1, 1], outputs
    for output in outputs:
        assert "multiple of the number of processes" in output, outputs


@pytest.mark.slow
def test_processes_draw_the_same_texts(tiny, tmp_path):
    """And are told what they earn by the first one."""
    config = test_policy.configure(tiny, tmp_path, **{"objective.aggregate": "sequence_means"})
    config.mesh.update(dict(data=2, fsdp=4))
    run_training(config, tmp_path / "one", devices=8)
    hosts = Hosts(2, config, tmp_path / "two")
    codes, outputs = hosts.wait()
    assert codes == [0, 0], outputs

    wanted = test_policy.read_rollouts(tmp_path / "one")
    got = test_policy.read_rollouts(tmp_path / "two")
    assert got.keys() == wanted.keys()
    for name, text in got.items():
        for line, other in zip(text.splitlines(), wanted[name].splitlines(), strict=True):
            line, other = json.loads(line), json.loads(other)
            assert (line["ids"], line["rewards"]) == (other["ids"], other["rewards"])
    for line, other in zip(read_metrics(hosts.run), read_metrics(tmp_path / "one"), strict=True):
        assert line["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)
        assert line["train/reward"] == other["train/reward"]
