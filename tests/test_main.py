"""The command line: misspelt keys, bad values, and what a run prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from lm import command_line, evaluate, stopping, train
from lm import config as config_lib
from lm import main as main_lib

ROOT = Path(main_lib.__file__).parents[1]
KEYS = list(config_lib.flatten(config_lib.default()))
CONFIG = """
from lm import config
from lm.evals import entries

def get_config(size="small"):
    c = config.default()
    c.model.num_layers = {"small": 1, "large": 9}[size]
    c.evals.validation = entries.perplexity(every=10)
    return c
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    path = tmp_path / "experiment.py"
    path.write_text(CONFIG)
    # Overrides become flags of their own, looked for in sys.argv.
    before = set(flags.FLAGS)
    monkeypatch.setattr(sys, "argv", [])
    yield str(path)
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def parse(config_file, *arguments, size=""):
    sys.argv[:] = [
        "main",
        f"--config={config_file}{size}",
        f"--workdir={Path(config_file).parent / 'run'}",
        *arguments,
    ]
    return command_line.parse(list(sys.argv))


def command(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    return subprocess.run(
        [sys.executable, "-m", "lm.main", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "argument, nearest",
    [
        ("--config.model.num_layer=4", "model.num_layers"),
        ("--config.modle.num_layers=4", "model.num_layers"),
        ("--config.data.batchsize=4", "data.batch_size"),
        ("-config.optimizer.learning_rat=1", "learning_rate"),
        ("--config.train.lenght", "train.length"),
        ("--config.model=x", "model."),
        ("--config.sede=1", "seed"),
    ],
)
def test_misspelt_keys_name_the_nearest(argument, nearest):
    message = command_line.unknown_key(["--workdir=x", "--config.seed=1", argument], KEYS)
    assert (
        message.startswith(
            f"no configuration key {argument.split('.', 1)[1].split('=')[0]!r}; did you mean "
        )
        and nearest in message
    )


def test_keys_that_are_there():
    assert (
        command_line.unknown_key(
            [f"--config.{key}=1" for key in KEYS]
            + ["--config=a.py", "--workdir=config.x", "--mode=train"],
            KEYS,
        )
        is None
    )
    assert "lm/config.py has them all" in command_line.unknown_key(["--config.zzzzqqqq=1"], KEYS)


def test_overrides_reach_the_configuration(config_file):
    parse(
        config_file,
        "--config.evals.validation.every=7",
        "--config.model.num_heads",
        "4",
        size=":large",
    )
    config = command_line.CONFIG.value
    assert (config.model.num_layers, config.evals.validation.every, config.model.num_heads) == (
        9,
        7,
        4,
    )
    assert config.is_locked


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.evals.validation.evry=7"], "did you mean .*evals.validation.every"),
        (["--config.evals.test.every=7"], "did you mean .*evals.validation.every"),
        (["--noconfig.model.gated_mpl"], "gated_mlp"),
        (["--config.model.num_layers=four"], "num_layers.*four"),
        (["--mode=test"], "mode.*train"),
        (["--wrokdir=x"], "workdir"),
    ],
)
def test_arguments_that_cannot_work(config_file, arguments, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        parse(config_file, *arguments)


def test_a_misspelt_key_after_a_config_apart(config_file):
    # `--config FILE` is as good as `--config=FILE`.
    sys.argv[:] = [
        "main",
        "--config",
        config_file,
        "--workdir",
        "run",
        "--config.modle.num_layers=4",
    ]
    with pytest.raises(SystemExit, match="did you mean .*model.num_layers"):
        command_line.parse(list(sys.argv))


def test_configuration_files_that_cannot_work(config_file):
    with pytest.raises(SystemExit, match="no configuration file '/none.py'"):
        command_line.parse(["main", "--config=/none.py", "--workdir=x"])
    Path(config_file).write_text(
        CONFIG + "def get_config(size='x'):\n    raise ValueError(f'no size {size}')"
    )
    with pytest.raises(SystemExit, match="error: no size huge"):
        parse(config_file, size=":huge")


@pytest.mark.parametrize(
    "outcome, code, out, err",
    [
        (
            {
                "step": 3,
                "train/loss": 1.5,
                "eval/validation/loss": 2.25,
                "eval/validation/tokens": 12345,
                "train/batch_hash": "ff",
            },
            0,
            ["validation/loss", "2.2500", "12,345", "train/loss"],
            [],
        ),
        (ValueError("config.x = 3; valid: 4"), 1, [], ["error: config.x = 3; valid: 4"]),
        (OSError("disk full"), 1, [], ["error: disk full"]),
        (train.NonFinite("step 3 is not finite"), 1, [], ["error: step 3 is not finite"]),
        (stopping.Stopped("stopped at step 3"), 0, [], []),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_exit_codes(config_file, monkeypatch, capsys, mode, outcome, code, out, err):
    def run(config, workdir, devices, profile_steps_or_steps=None):
        assert workdir.name == "run" and devices == "devices" and config.seed == 5
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def other(*args):
        raise AssertionError("the other mode ran")

    monkeypatch.setattr(main_lib.startup, "start", lambda platform, processes: "devices")
    # pytest has its own handlers
    monkeypatch.setattr(main_lib.logging, "basicConfig", lambda **kwargs: None)
    monkeypatch.setattr(train, "train", run if mode == "train" else other)
    monkeypatch.setattr(evaluate, "evaluate", run if mode == "eval" else other)
    parse(config_file, f"--mode={mode}", "--config.seed=5")
    assert main_lib.main(["main"]) == code
    printed = capsys.readouterr()
    assert all(text in printed.out for text in out) and all(text in printed.err for text in err)
    assert "Traceback" not in printed.err and "batch_hash" not in printed.out


def test_two_runs_are_compared(config_file, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(main_lib.startup, "start", lambda platform, processes: "devices")
    monkeypatch.setattr(main_lib.logging, "basicConfig", lambda **kwargs: None)
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: {"eval/x/accuracy": 0.5})
    for run, prediction in (("run", "a"), ("other", "b")):
        path = tmp_path / run / "predictions" / "x-3.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(
            "".join(
                json.dumps(
                    dict(
                        name=str(i),
                        label="a",
                        prediction=prediction,
                        distribution=dict(a=0.5, b=0.5),
                    )
                )
                + "\n"
                for i in range(10)
            )
        )
    parse(config_file, "--mode=eval", f"--workdir={tmp_path}/run", f"--compare_to={tmp_path}/other")
    assert main_lib.main(["main"]) == 0
    printed = capsys.readouterr().out
    assert (
        "x, 10 examples, step 3 and step 3:" in printed
        and "accuracy 1.0000 0.0000 difference +1.0000" in " ".join(printed.split())
    )
    assert json.loads((tmp_path / "run/comparison.json").read_text())["x"]["mcnemar_p"] == 2 / 2**10
    parse(
        config_file, "--mode=eval", f"--workdir={tmp_path}/run", f"--compare_to={tmp_path}/nowhere"
    )
    assert (
        main_lib.main(["main"]) == 1
        and "nowhere has no predictions/: evaluate it first" in capsys.readouterr().err
    )
    for flag, other in (
        (f"--compare_to={tmp_path}/other", "--steps="),
        ("--steps=all", "--compare_to="),
    ):
        parse(config_file, "--mode=train", f"--workdir={tmp_path}/run", flag, other)
        assert (
            main_lib.main(["main"]) == 1 and f"{flag} needs --mode=eval" in capsys.readouterr().err
        )


def test_the_table_is_aligned_and_sorted():
    lines = main_lib.table(
        {"eval/b/long_name": 1.0, "eval/a": 1234567, "train/seconds": 0.123456, "train/mfu": 0.5}
    ).split("\n")
    assert len({len(line) for line in lines}) == 1 and [line.split()[0] for line in lines] == [
        "a",
        "b/long_name",
        "train/seconds",
    ]
    assert lines[0].endswith("1,234,567") and lines[2].endswith("0.1235")


def test_command_with_a_misspelt_key(config_file, tmp_path):
    result = command(
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
        "--config.modle.num_layers=4",
        cwd=tmp_path,
    )
    assert (
        result.returncode not in (0, None)
        and "did you mean model.num_layers" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert not (tmp_path / "run").exists()


def test_command_with_a_bad_value(config_file, tmp_path):
    result = command(
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
        "--config.mesh.data=3",
        "--config.platform=cpu",
        cwd=tmp_path,
    )
    assert (
        result.returncode == 1
        and "error: config.mesh asks for" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert "running on 1 x cpu" in result.stderr and not (tmp_path / "run").exists()


def test_steps_to_profile():
    assert main_lib.steps_of("10:13") == (10, 13) and main_lib.steps_of("") is None
    for text in ("10", "13:10", "a:b", "0:2", "10:"):
        with pytest.raises(ValueError, match="wanted FIRST:LAST"):
            main_lib.steps_of(text)
