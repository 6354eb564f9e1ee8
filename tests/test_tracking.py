"""Where metrics go besides metrics.jsonl: TensorBoard, and Weights & Biases, offline. A run that
goes on continues both, with no step twice.
"""

import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
import types

import pytest
from etils import epath

from lm import config as config_lib
from lm import files, telemetry, tensorboard, tracking
from tests.helpers import ROOT, read_jsonl
from tests.test_resume import CHILD

# TensorBoard.


def fields(message):
    """(number, value) of a protocol buffer: integers, and the bytes of everything else."""
    place = 0

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, message[place : place + size]
        place += size


def read_events(folder):
    """{metric: {step: value}} as TensorBoard shows a folder: where a session starts at a step, what
    came before for that step and later ones is dropped.
    """
    shown = {}
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            event = dict(fields(content[place + 12 : place + 12 + size]))
            place += 16 + size
            step = event.get(2, 0)
            if 7 in event:
                for values in shown.values():
                    for late in [s for s in values if s >= step]:
                        del values[late]
            for _, value in fields(event.get(5, b"")):
                named = dict(fields(value))
                of_metric = shown.setdefault(named[1].decode(), {})
                assert step not in of_metric
                (of_metric[step],) = struct.unpack("<f", named[2])
    return shown


def test_a_record_of_tensorboard(tmp_path, monkeypatch):
    """As tensorboardX 2.6.5 writes it; and the checksum's published example."""
    assert tensorboard.crc32c(b"123456789") == 0xE3069283

    monkeypatch.setattr(tensorboard.time, "time", lambda: 1.5)
    events = tensorboard.EventFile(epath.Path(tmp_path), 2)
    events.write(300, {"train/loss": 0.5})
    (path,) = tmp_path.iterdir()
    begins_at_3 = "0f000000000000006d532b0909000000000000f83f10033a020801ec8612fc"
    value = (
        "2100000000000000017becf609000000000000f83f10ac022a130a110a0a747261696e2f6c6f737315"
        "0000003fb56a6431"
    )
    assert path.read_bytes().hex().endswith(begins_at_3 + value)
    assert read_events(tmp_path) == {"train/loss": {300: 0.5}}


def test_events_go_on_after_a_step(tmp_path):
    path = epath.Path(tmp_path)
    writer = telemetry.Writer(path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0 / step, "train/batch_hash": "text"})
    # Within the same second, and on the same machine.
    writer = telemetry.Writer(path, 2)
    writer.write(3, {"train/loss": 30.0})
    writer.write(4, {"train/loss": 1e300})
    assert read_events(tmp_path / "tensorboard") == {
        "train/loss": {1: 1.0, 2: 0.5, 3: 30.0, 4: float("inf")}
    }


def test_what_can_not_be_appended_to_is_written_whole(tmp_path, monkeypatch):
    """As on gs://: by flush, and once a minute."""
    monkeypatch.setattr(telemetry, "SECONDS_BETWEEN_UPLOADS", 1e9)
    writer = telemetry.Writer(epath.Path(tmp_path), 0)
    writer._appends = writer._events._appends = False
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.unlink()

    writer.write(1, {"train/loss": 1.0})
    assert not events.exists() and not read_jsonl(tmp_path / "metrics.jsonl")
    writer.flush()
    assert read_jsonl(tmp_path / "metrics.jsonl") == writer.lines()
    monkeypatch.setattr(telemetry, "SECONDS_BETWEEN_UPLOADS", 0.0)
    writer.write(2, {"train/loss": 2.0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == writer.lines()
    assert events.exists()


# Weights & Biases.


@pytest.fixture
def config(monkeypatch, tmp_path):
    """A configuration that sends metrics, and a machine without network and without a key."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", "/nonexistent")
    (tmp_path / "sent").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "sent"))
    c = config_lib.default()
    c.tracking.wandb = "team/project"
    return c


def read_records(sent):
    """The records of all .wandb files in a folder, in order of time. These are logs as LevelDB has
    them: blocks of 32 KiB, with pieces of records in them.
    """
    from wandb.proto import wandb_internal_pb2

    for path in sorted(sent.glob("wandb/offline-run-*/run-*.wandb")):
        content, place, record = path.read_bytes(), 7, b""
        while place + 7 <= len(content):
            if 2**15 - place % 2**15 < 7:
                place += 2**15 - place % 2**15
                continue
            _, size, kind = struct.unpack_from("<IHB", content, place)
            record += content[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # the whole record, or its last piece
                yield wandb_internal_pb2.Record.FromString(record)
                record = b""


def read_rows(sent):
    """What W&B gets: its rows."""
    rows = []
    for record in read_records(sent):
        if record.HasField("history"):
            items = record.history.item
            rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return rows


def test_a_run_continues_its_rows(config, tmp_path):
    """Steps that a kill made it repeat have one row, and so have an eval that a stop put off, and
    lines from before metrics were sent.
    """
    path = epath.Path(tmp_path / "run")
    writer = telemetry.Writer(path, 0)
    writer.write(1, {"train/loss": 1.0, "train/batch_hash": "text"})
    writer.close()

    tracking.check(config.tracking.wandb)
    writer = telemetry.Writer(path, 1, config)
    for step in (2, 3, 4):
        writer.write(step, {"train/loss": 1.0 / step, "train/tokens_per_second": 9.0})
    writer.write(4, {"eval/v/loss": 4.0})
    writer.close()

    # A kill brought it back to step 2. Its first line has no speed.
    time.sleep(1)  # W&B names folders by the second
    writer = telemetry.Writer(path, 2, config)
    writer.write(2, {"eval/v/loss": 2.0})
    writer.write(3, {"train/loss": 1 / 3})
    writer.write(4, {"train/loss": 1 / 4, "train/tokens_per_second": 9.0})
    writer.write(4, {"eval/v/loss": 4.0})
    writer.write(5, {"train/loss": 1 / 5})
    writer.close()

    # W&B writes in a process of its own.
    rows = read_rows(tmp_path / "sent")
    patience = time.monotonic() + 30
    while rows[-1]["step"] < 5 and time.monotonic() < patience:
        time.sleep(0.2)
        rows = read_rows(tmp_path / "sent")
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, 1 / step) for step in (1, 2, 3, 4, 5)]
    evals = [(row["step"], row["eval/v/loss"]) for row in rows if "eval/v/loss" in row]
    assert evals == [(4, 4.0), (2, 2.0)]
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))

    # One run, with its configuration, drawn over our steps; and no link in its directory.
    records = list(read_records(tmp_path / "sent"))
    runs = [record.run for record in records if record.HasField("run")]
    assert {(run.run_id, run.entity, run.project, run.display_name) for run in runs} == {
        (files.read_json(path / "wandb.json")["id"], "team", "project", "run")
    }
    shown = {item.key: item.value_json for item in runs[0].config.update}
    assert json.loads(shown["train"]) == config.train.to_dict()
    metrics = [record.metric for record in records if record.HasField("metric")]
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in metrics)
    files.check_tree(path)


class FakeRun:
    """A run at W&B's server, which another start left at a step, and which may fail."""

    offline, step = False, 7

    def __init__(self, resumed, last_step, error=None):
        self.resumed, self.summary, self.error = resumed, {"step": last_step}, error
        self.rows = []

    def define_metric(self, *unused, **unused_too):
        pass

    def log(self, row, step, commit):
        assert commit and step == 7 + len(self.rows)
        if self.error:
            raise self.error
        self.rows.append(row)

    finish = define_metric


@pytest.fixture
def server(config, tmp_path, monkeypatch):
    """A function that puts a run at a server in W&B's place."""

    def serve(run):
        init = lambda **unused: run
        module = types.SimpleNamespace(init=init, Settings=lambda **unused: None)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return run

    return serve


LINES = [{"step": step, "train/loss": 1.0} for step in (1, 2, 3, 4)]


def make_tracker(tmp_path, at_step):
    up_to = [line for line in LINES if line["step"] <= at_step]
    return tracking.Tracker("project", epath.Path(tmp_path), {}, up_to, LINES[len(up_to) :])


def test_the_server_says_what_it_has(server, tmp_path):
    """Of the lines before a kill some may not have come there."""
    (tmp_path / "wandb.json").write_text('{"id": "abc", "project": "project"}')
    # The kill was at step 4, the checkpoint of step 2, and W&B had the rows up to step 3 ...
    run = server(FakeRun(True, 3))
    tracker = make_tracker(tmp_path, 2)
    for line in LINES[2:]:
        tracker.write(line)
    assert [row["step"] for row in run.rows] == [4]
    # ... or up to step 1.
    run = server(FakeRun(True, 1))
    tracker = make_tracker(tmp_path, 2)
    for line in LINES[2:]:
        tracker.write(line)
    assert [row["step"] for row in run.rows] == [2, 3, 4]


def test_a_failure_in_the_middle_ends_no_run(server, tmp_path, caplog):
    run = server(FakeRun(False, None, ConnectionError("no route")))
    tracker = make_tracker(tmp_path, 0)
    with caplog.at_level(logging.WARNING):
        for line in LINES:
            tracker.write(line)
        tracker.close()
    assert [record.message for record in caplog.records] == [
        "Weights & Biases gets no more metrics in this start: no route"
    ]
    assert not run.rows


def test_a_refusal_is_said_at_the_start(config, server, tmp_path, monkeypatch):
    run = server(FakeRun(False, None))

    def refuse(**unused):
        raise RuntimeError("no such\nentity")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ValueError, match="can't be used: no such entity. WANDB_MODE=offline"):
        make_tracker(tmp_path, 0)
    assert not run.rows and not (tmp_path / "wandb.json").exists()

    (tmp_path / "wandb.json").write_text('{"id": "../up", "project": "project"}')
    with pytest.raises(ValueError, match="has the id '../up'"):
        make_tracker(tmp_path, 0)


def test_what_is_missing_is_said_before_anything_is_done(config, monkeypatch):
    with pytest.raises(ValueError, match="wanted PROJECT or ENTITY/PROJECT"):
        tracking.check("a/b/c")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.setup", lambda: _Settings("online"))
    monkeypatch.setattr("wandb.login", lambda prompt, verify: False)
    with pytest.raises(ValueError, match="nobody is logged in .* run wandb login"):
        tracking.check("project")

    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package wandb: pip install"):
        tracking.check("project")


def _Settings(mode):
    return types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))


@pytest.mark.slow
def test_a_killed_run_has_each_step_once(config, small, tmp_path):
    """A real run, killed between two checkpoints, and its curves: each step once, and no number
    that begins anew.
    """
    small.tracking.wandb = "project"
    small.checkpoint.every = 4
    small.mesh.fsdp = -1  # CHILD takes all 8 devices
    small.train.length = "9 steps"
    run = tmp_path / "run"
    for how in ("batch", ""):
        arguments = [json.dumps(small.to_dict()), str(run), how, "7"]
        child = subprocess.run(
            [sys.executable, "-c", CHILD, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        wanted = -signal.SIGKILL if how else 0
        assert child.returncode == wanted, child.stderr[-3000:]

    lines = read_jsonl(run / "metrics.jsonl")
    steps = list(range(1, 10))
    assert [line["step"] for line in lines] == steps
    rows = read_rows(tmp_path / "sent")
    assert [row["step"] for row in rows if "train/loss" in row] == steps
    losses = [line["train/loss"] for line in lines]
    assert [row["train/loss"] for row in rows] == losses
    shown = read_events(run / "tensorboard")["train/loss"]
    assert shown == pytest.approx(dict(zip(steps, losses)))

    # Both starts took their time, and what the kill took with it was made twice.
    seconds = [line["train/seconds_total"] for line in lines]
    assert seconds == sorted(seconds)
    assert lines[-1]["train/seconds_repeated"] > 0
    assert all(0 < line["train/goodput"] < 1 for line in lines)
