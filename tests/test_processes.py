"""Runs of 2 and 4 real processes, as on the hosts of a pod, with collectives over the network: 8
simulated devices in all.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_resume import CONFIG_FILE, LAST, ROOT, SLOW_SOURCE, saved
from test_train import VERBALIZER, _quick, _small, assert_same_run, go, read_lines  # noqa: F401

from lm.evals import entries


@pytest.fixture
def config(small, tmp_path):
    """f32, so that meshes may be compared; evals and checkpoints every 4 steps."""
    small.data.update(dict(batch_size=16, streams=8))
    small.mesh.update(dict(data=2, fsdp=4))
    small.model.param_dtype = "float32"
    small.train.update(dict(length=f"{LAST} steps", accumulation=2, log_every=1))
    small.checkpoint.update(dict(every=4, keep=9, best="eval/text/loss"))
    small.evals.text = entries.perplexity(every=4, batch_size=16)
    small.evals.labels = entries.classification(VERBALIZER, every=4, batch_size=16)
    small.evals.samples = entries.samples(("red", "ab"), every=6, max_new_tokens=3)
    (tmp_path / "answers.toml").write_text('type = "lm.evals.generation.TextGeneration"')
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps(dict(q=q)) + "\n" for q in ("red", "ab ", "é", "blue cd", "green"))
    )
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
        file = run.parent / "config.py"
        file.write_text(CONFIG_FILE.format(text=json.dumps(config.to_dict())))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.logs = [run.parent / f"{run.name}-{count}-{i}.log" for i in range(count)]
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // count}")
        self.children = []
        for i, log in enumerate(self.logs):
            env = os.environ | {
                "XLA_FLAGS": flags,
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
            }
            command = [
                sys.executable,
                "-m",
                "lm.main",
                f"--config={file}",
                f"--workdir={run}",
                "--config.platform=cpu",
                *overrides,
            ]
            with log.open("w") as output:
                self.children.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
                    )
                )

    def wait(self, seconds=240):
        """Exit codes and outputs."""
        end = time.monotonic() + seconds
        try:
            return [child.wait(max(end - time.monotonic(), 0.1)) for child in self.children], [
                log.read_text() for log in self.logs
            ]
        except subprocess.TimeoutExpired:
            raise AssertionError(
                "\n\n".join(log.read_text()[-3000:] for log in self.logs)
            ) from None
        finally:
            for child in self.children:
                child.kill()

    def until(self, condition, seconds=120):
        """Waits for `condition()` while all processes run."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and all(
                child.poll() is None for child in self.children
            ), self.wait(5)
            time.sleep(0.02)


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """An override that makes steps slow enough to be hit."""
    (tmp_path / "slow_source.py").write_text(SLOW_SOURCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "--config.data.source=slow_source.jsonl"


def figures(run):
    """All numbers of metrics.jsonl, in order."""
    return [
        (line["step"], key, value)
        for line in read_lines(run)
        for key, value in line.items()
        if isinstance(value, (int, float))
    ]


def assert_close(run, reference):
    """The same steps and evals, and figures that differ by rounding alone."""
    ours, theirs = figures(run), figures(reference)
    assert [line[:2] for line in ours] == [line[:2] for line in theirs]
    for (*name, value), (*_, wanted) in zip(ours, theirs):
        # Calibration error counts examples by bins, whose edges rounding may cross.
        assert value == pytest.approx(wanted, rel=1e-4, abs=1e-6) or name[1].endswith("/ece"), name
    for step in (4, 8, LAST):
        names = [
            [
                json.loads(line)["name"]
                for line in (r / f"predictions/labels-{step}.jsonl").read_text().splitlines()
            ]
            for r in (run, reference)
        ]
        assert names[0] == names[1] and names[0]
    texts = [
        [
            json.loads(line)["text"]
            for line in (r / "predictions/answers-8.jsonl").read_text().splitlines()
        ]
        for r in (run, reference)
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_other_numbers_of_processes(config, slow, tmp_path):
    """Two processes, one of which is preempted (all stop, and save), then four of them: as one
    process that never stopped.
    """
    go(config, tmp_path / "one", 8)
    hosts = Hosts(2, config, tmp_path / "run", slow)
    hosts.until(lambda: 4 in saved(tmp_path / "run"))
    hosts.children[1].terminate()
    codes, outputs = hosts.wait()
    assert codes == [0, 0], outputs
    assert all(
        "stopped by a signal at step" in output and "start it again to go on" in output
        for output in outputs
    )
    stopped = saved(tmp_path / "run")[-1]
    assert 4 <= stopped < LAST
    codes, outputs = Hosts(4, config, tmp_path / "run", slow).wait()
    assert codes == [0] * 4, outputs
    assert f"going on from step {stopped}" in outputs[0] and all(
        "going on" not in output for output in outputs[1:]
    )
    assert_close(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize("victim", [0, 1])
def test_one_dies(config, slow, tmp_path, victim):
    """The other stops within a minute and says why; both started again end bit-equal to two that
    nothing happened to.
    """
    run = tmp_path / "run"
    if "whole" not in _WHOLE:
        codes, outputs = Hosts(2, config, tmp_path / "whole", slow).wait()
        assert codes == [0, 0], outputs
        _WHOLE["whole"] = tmp_path / "whole"
    hosts = Hosts(2, config, run, slow)
    hosts.until(lambda: 4 in saved(run))
    hosts.children[victim].kill()
    began = time.monotonic()
    codes, outputs = hosts.wait()
    assert time.monotonic() - began < 60
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, None)
    assert (
        "another one has died" in outputs[1 - victim] or "another task died" in outputs[1 - victim]
    ), outputs[1 - victim]
    codes, outputs = Hosts(2, config, run, slow).wait()
    assert codes == [0, 0], outputs
    assert_same_run(run, _WHOLE["whole"], LAST)


_WHOLE = {}


def test_an_error_in_one(config, slow, tmp_path):
    """It is printed, and the others don't wait for that process for ever."""
    text = SLOW_SOURCE.replace(
        "        time.sleep(0.02)",
        """        import jax
        if jax.process_index() == 1 and time.monotonic() > START + 5:
            raise ValueError("a broken document")""",
    ).replace("class Slow", "START = time.monotonic()\n\nclass Slow")
    (tmp_path / "slow_source.py").write_text(text)
    began = time.monotonic()
    codes, outputs = Hosts(
        2, config, tmp_path / "run", slow, "--config.train.length=100000 steps"
    ).wait()
    assert (
        time.monotonic() - began < 100 and 0 not in codes and "a broken document" in outputs[1]
    ), outputs


def test_a_configuration_error_in_all(config, tmp_path):
    codes, outputs = Hosts(2, config, tmp_path / "run", "--config.data.streams=1").wait(60)
    assert codes == [1, 1] and all(
        "multiple of the number of processes" in output for output in outputs
    ), outputs
