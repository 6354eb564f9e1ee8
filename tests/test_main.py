"""The command line: misspelt keys, bad values, and what a run prints."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from etils import epath

from lm import command_line, evaluate, startup, stopping, train
from lm import config as config_lib
from lm import main as main_lib
from tests.helpers import CONFIG_FILE, ROOT, slow, write_task, xla_flags

KEYS = list(config_lib.flatten(config_lib.default()))
# A config file with an argument and an eval.
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
    # Overrides become flags of their own, which are looked for in sys.argv.
    flags_before = set(flags.FLAGS)
    monkeypatch.setattr(sys, "argv", [])

    yield str(path)

    # Flags would keep their values from one parse to the next.
    flags.FLAGS.unparse_flags()
    for name in ("mode", "compare_to", "steps", "evals", "show_prompts", "audit_rows"):
        flags.FLAGS[name].unparse()
    for name in set(flags.FLAGS) - flags_before:
        delattr(flags.FLAGS, name)


@pytest.fixture
def no_startup(monkeypatch):
    """JAX and the log are set up already, by pytest."""
    monkeypatch.setattr(startup, "start", lambda platform, processes: "devices")
    monkeypatch.setattr(command_line.logging, "basicConfig", lambda **kwargs: None)


def parse(config_file, *arguments, size=""):
    """Parses a command line of --config, --workdir and `arguments`."""
    workdir = Path(config_file).parent / "run"
    config_flag = f"--config={config_file}{size}"
    sys.argv[:] = ["main", config_flag, f"--workdir={workdir}", *arguments]
    return command_line.parse(list(sys.argv))


def run_command(*arguments, cwd):
    """`python -m lm.main`, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lm.main", *arguments],
        cwd=cwd,
        # A single device, as on a laptop.
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


# Arguments.


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
        ("--config.optimizer.lr=1", "did you mean optimizer.learning_rate"),
        ("--config.optimizer.wd=1", "did you mean optimizer.weight_decay"),
        ("--config.data.batchsize=1", "did you mean data.batch_size"),
    ],
)
def test_misspelt_keys_name_the_nearest(argument, nearest):
    message = command_line.unknown_key(["--workdir=x", "--config.seed=1", argument], KEYS)
    key = argument.split(".", 1)[1].split("=")[0]
    assert message.startswith(f"no configuration key {key!r}; did you mean ")
    assert nearest in message


def test_a_size_of_a_file_without_sizes(tmp_path):
    (tmp_path / "config.py").write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(SystemExit, match=r"config.py has no sizes; leave out :big"):
        command_line.parse(["main", f"--config={tmp_path}/config.py:big"])


@pytest.fixture
def logging_restored(monkeypatch):
    """A command takes over the root logger, with the standard error of this test."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)


@pytest.mark.usefixtures("logging_restored")
def test_an_error_without_words_has_its_name_and_traceback(capsys):
    @command_line.command
    def main(argv):
        raise MemoryError

    assert main([]) == 1
    printed = capsys.readouterr().err
    assert printed.endswith("\nerror: MemoryError\n")
    assert "Traceback" in printed


@pytest.mark.usefixtures("logging_restored")
def test_errors_obey_no_terminal(capsys):
    @command_line.command
    def main(argv):
        logging.warning("a\x1b[31m")
        raise ValueError("no file b\x1b]0;title\x07")

    assert main([]) == 1
    assert capsys.readouterr().err == "W a\\x1b[31m\n\nerror: no file b\\x1b]0;title\\x07\n"


def test_a_key_near_to_none():
    message = command_line.unknown_key(["--config.zzzzqqqq=1"], KEYS)
    assert "lm/config.py has them all" in message


def test_known_keys():
    overrides = [f"--config.{key}=1" for key in KEYS]
    other_flags = ["--config=a.py", "--workdir=config.x", "--mode=train"]
    assert command_line.unknown_key(overrides + other_flags, KEYS) is None


def test_overrides_reach_the_configuration(config_file):
    overrides = ("--config.evals.validation.every=7", "--config.model.num_heads", "4")
    parse(config_file, *overrides, size=":large")
    config = main_lib._CONFIG.value
    assert config.model.num_layers == 9
    assert config.model.num_heads == 4
    assert config.evals.validation.every == 7
    assert config.is_locked


@pytest.mark.parametrize(
    "changes, names",
    [
        ("+sst2", ["validation", "sst2"]),
        ("-validation,+sst2,+piqa", ["sst2", "piqa"]),
        ("-all", []),
        ("-validation", []),
        ("+TOML", ["validation", "my-own_task"]),
    ],
)
def test_evals_are_added_and_taken_out(config_file, tmp_path, changes, names):
    path = write_task(tmp_path / "my-own.task.toml", "{text}")
    parse(config_file, f"--evals={changes.replace('TOML', path)}")
    assert set(main_lib._CONFIG.value.evals) == set(names)


def test_keys_of_an_eval_that_is_added(config_file):
    parse(config_file, "--evals", "+sst2", "--config.evals.sst2.prompt.shots=3")
    config = main_lib._CONFIG.value
    assert config.evals.sst2.prompt.shots == 3
    assert config.is_locked


def test_escapes_in_texts(config_file):
    """A shell leaves a backslash and an n; in a path or a pattern they mean themselves."""
    overrides = (r"--config.data.label_prompt=\n\nLabel:", r"--config.data.cache_dir=a\nb")
    stop = (r"--config.evals.xsum.output.stop=\n", r"--config.evals.xsum.output.stop=\end")
    parse(config_file, "--evals=+xsum", *overrides, *stop)
    assert main_lib._CONFIG.value.evals.xsum.output.stop == ("\n", r"\end")
    assert main_lib._CONFIG.value.data.label_prompt == "\n\nLabel:"
    assert main_lib._CONFIG.value.data.cache_dir == r"a\nb"


def test_a_configuration_in_the_home_folder(config_file, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(config_file).parent))
    sys.argv[:] = ["main", "--config=~/experiment.py:large", "--workdir=x"]
    command_line.parse(list(sys.argv))
    assert main_lib._CONFIG.value.model.num_layers == 9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--evals=sst2"], "--evals=sst2: 'sst2' is no change .*-validation"),
        (["--evals=-samples"], "'-samples' is no change .*wanted .TASK, -all, or .*-validation"),
        (["--evals=+sst3"], "no task 'sst3'; valid:"),
        (["--evals=+sst2,+sst2"], "has 'sst2' already"),
        (["--config.data.source_args.path=x"], "pydocs.* go by --config=configs/text.py:PATH"),
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
    """`--config FILE` is as good as `--config=FILE`."""
    flags_apart = ["--config", config_file, "--workdir", "run"]
    sys.argv[:] = ["main", *flags_apart, "--config.modle.num_layers=4"]
    with pytest.raises(SystemExit, match="did you mean .*model.num_layers"):
        command_line.parse(list(sys.argv))


def test_configuration_files_that_cannot_work(config_file):
    with pytest.raises(SystemExit, match="no configuration file '/none.py'"):
        command_line.parse(["main", "--config=/none.py", "--workdir=x"])

    raising = "def get_config(size='x'):\n    raise ValueError(f'no size {size}')"
    Path(config_file).write_text(CONFIG + raising)
    with pytest.raises(SystemExit, match="error: no size huge"):
        parse(config_file, size=":huge")


# The program.


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
            ["validation", "2.2500", "train/loss 1.5000", "metrics"],
            [],
        ),
        (ValueError("config.x = 3; valid: 4"), 1, [], ["error: config.x = 3; valid: 4"]),
        (OSError("disk full"), 1, [], ["error: disk full"]),
        (train.NonFinite("step 3 is not finite"), 1, [], ["error: step 3 is not finite"]),
        (stopping.Stopped("stopped at step 3"), 0, [], []),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.usefixtures("no_startup")
def test_exit_codes(config_file, monkeypatch, capsys, mode, outcome, code, out, err):
    def run(config, workdir, devices, *options):
        assert workdir.name == "run"
        assert devices == "devices"
        assert config.seed == 5
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    # Neither mode does anything but what the test wants of it.
    def fail(*args):
        raise AssertionError("the other mode ran")

    monkeypatch.setattr(train, "train", run if mode == "train" else fail)
    monkeypatch.setattr(evaluate, "evaluate", run if mode == "eval" else fail)
    parse(config_file, f"--mode={mode}", "--config.seed=5")
    assert main_lib.main(["main"]) == code

    printed = capsys.readouterr()
    assert all(text in printed.out for text in out)
    assert all(text in printed.err for text in err)
    assert "Traceback" not in printed.err
    assert "batch_hash" not in printed.out


def write_predictions(run, prediction):
    """Ten examples of the eval `x`, whose label is "a", at step 3."""
    path = run / "predictions" / "x-3.jsonl"
    path.parent.mkdir(parents=True)
    distribution = dict(a=0.25, b=0.25) | {prediction: 0.75}
    example = dict(label="a", prediction=prediction, distribution=distribution)
    lines = [json.dumps(dict(name=str(i)) | example) for i in range(10)]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.usefixtures("no_startup")
def test_two_runs_are_compared(config_file, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: {"eval/x/accuracy": 0.5})
    write_predictions(tmp_path / "run", "a")
    write_predictions(tmp_path / "other", "b")

    # Ten differences, all in favour of one run: the exact test's p is 2 / 2^10.
    parse(config_file, "--mode=eval", f"--compare_to={tmp_path}/other")
    assert main_lib.main(["main"]) == 0
    printed = capsys.readouterr().out
    assert "x, 10 examples, step 3 and step 3:" in printed
    assert "accuracy 1.0000 0.0000 difference +1.0000" in " ".join(printed.split())
    saved = json.loads((tmp_path / "run/comparison.json").read_text())
    assert saved["x"]["mcnemar_p"] == 2 / 2**10

    parse(config_file, "--mode=eval", f"--compare_to={tmp_path}/nowhere")
    assert main_lib.main(["main"]) == 1
    assert "nowhere has no predictions/: evaluate it first" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--compare_to=/other", "--steps=all", "--show_prompts=2"])
@pytest.mark.usefixtures("no_startup")
def test_flags_of_the_other_mode(config_file, capsys, flag):
    parse(config_file, "--mode=train", flag)
    assert main_lib.main(["main"]) == 1
    assert f"{flag} needs --mode=eval" in capsys.readouterr().err


def test_command_with_a_misspelt_key(config_file, tmp_path):
    run = tmp_path / "run"
    flags_of_run = (f"--config={config_file}", f"--workdir={run}")
    result = run_command(*flags_of_run, "--config.modle.num_layers=4", cwd=tmp_path)

    # An error is a line, not a traceback, and leaves nothing behind.
    assert result.returncode not in (0, None)
    assert "did you mean model.num_layers" in result.stderr
    assert "Traceback" not in result.stderr
    assert not run.exists()


def test_command_with_a_bad_value(config_file, tmp_path):
    run = tmp_path / "run"
    flags_of_run = (f"--config={config_file}", f"--workdir={run}")
    overrides = ("--config.mesh.data=3", "--config.platform=cpu")
    result = run_command(*flags_of_run, *overrides, cwd=tmp_path)

    assert result.returncode == 1
    assert "this asks for" in result.stderr
    assert "Traceback" not in result.stderr
    assert "running on 1 x cpu" in result.stderr
    assert not run.exists()


# A limit on the size of a file fails as a full disk does.
FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
"""
READ_ONLY_DISK = """
import os
make_folder = os.mkdir

def fail(path, *args, **kwargs):
    if "orbax-checkpoint-tmp" in str(path):
        raise OSError(30, "Read-only file system", str(path))
    make_folder(path, *args, **kwargs)

os.mkdir = fail
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "disk, advice",
    [(FULL_DISK, "free space"), (READ_ONLY_DISK, "make the directory writable")],
    ids=["full", "read-only"],
)
def test_command_that_cannot_save(tiny, tmp_path, disk, advice):
    """A checkpoint that can't be written is one sentence, though each of its arrays fails, and the
    end, though Orbax's threads wait for it.
    """
    tiny.unlock()
    tiny.model.embed_dim = 256
    tiny.checkpoint.every = 1
    path = tmp_path / "config.py"
    path.write_text(CONFIG_FILE.format(text=json.dumps(tiny.to_dict())))
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{disk}\nfrom lm import main\nmain.cli()",
            f"--config={path}",
            f"--workdir={tmp_path}/run",
        ],
        cwd=ROOT,
        # A cache of programs would fail too.
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_FLAGS": xla_flags(1)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert "could not be written to" in message
    assert f"No checkpoint is kept; {advice} and start again" in message
    assert "Traceback" not in result.stderr and "never retrieved" not in result.stderr


@pytest.mark.parametrize("kind, by_key", [("text", False), slow("jsonl", True)])
@pytest.mark.usefixtures("config_file", "fast_runs")
def test_files_of_ones_own_by_flags_alone(tmp_path, kind, by_key, one_device):
    """A folder named behind the configuration's colon, or by its key, is trained on."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [dict(text=f"document {i} in words", label=str(i % 2)) for i in range(100)]
    lines = [row["text"] if kind == "text" else json.dumps(row) for row in rows]
    (folder / f"a.{kind}").write_text("\n".join(lines))
    flags_of_kind = dict(
        text=[r"--config.data.source_args.separator=\n"],
        jsonl=["--config.data.source_args.label_key=label"],
    )
    path = [f"--config.data.source_args.path={folder}"] if by_key else []
    overrides = [
        "--evals=-samples",
        *path,
        *flags_of_kind[kind],
        "--config.tokenizer.kind=bytes",
        "--config.model.num_layers=1",
        "--config.model.embed_dim=32",
        "--config.data.length=32",
        "--config.train.length=2 steps",
        "--config.model.mlp_dim=32",
        "--config.optimizer.name=adamw",
        "--config.optimizer.warmup_steps=1",
        "--config.mesh.fsdp=1",
    ]
    parse(f"{ROOT}/configs/{kind}.py", *overrides, size="" if by_key else f":{folder}")
    run = epath.Path(tmp_path / "run")
    values = train.train(main_lib._CONFIG.value, run, one_device)

    assert values["step"] == 2
    assert 2 <= values["eval/validation/documents"] <= 25


def test_steps_to_profile():
    assert main_lib.parse_profile_steps("10:13") == (10, 13)
    assert main_lib.parse_profile_steps("") is None
    for text in ("10", "13:10", "a:b", "0:2", "10:"):
        with pytest.raises(ValueError, match="wanted FIRST:LAST"):
            main_lib.parse_profile_steps(text)
