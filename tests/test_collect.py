"""A preparation that was stopped, or whose disk, files or libraries change, ends with the set that
an undisturbed one makes, or with an error that says why.
"""

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from lm import files
from lm.prepare import collect, engine, extract, formats, shards
from lm.prepare import config as prepare_config
from lm.prepare.pipeline import prepare
from tests.helpers import ROOT, snapshot

WORDS = "the of and to in is that it was for on are as with his they at be this from".split()
BAD = ['{"text": "cut', "[1]", '{"text": 1}', '{"text": " "}', '{"text": "a\\ud800"}']


def write_sources(folder, seed=0, count=40):
    """Two files of JSONL, one with lines that are none, and a text file."""
    draw = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        lines = []
        for number in range(count):
            text = " ".join(draw.choices(WORDS, k=draw.randint(5, 50)))
            lines.append(json.dumps({"text": text, "label": str(number % 3)}))
        lines += [lines[0], *(BAD if name == "b" else [])]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "c.txt").write_bytes("Grüße aus Köln".encode("latin-1"))


def make_config(folder, stages=("collect", "clean", "exact_duplicates", "write")):
    c = prepare_config.default()
    c.name, c.stages, c.workers = "tiny", stages, 1
    c.sources.lines = prepare_config.source("jsonl", str(folder / "*.jsonl"), label_key="label")
    c.sources.texts = prepare_config.source("text", str(folder / "*.txt"))
    c.clean.identify = False
    c.pii.phone = ""
    c.splits.validation = 0.1
    c.limits.max_bad = 0.2
    c.tokenizer.vocab_size = 320
    return c


ALL = ("collect", "clean", "exact_duplicates", "near_duplicates", "tokenizer", "write")


@pytest.fixture
def sources(tmp_path):
    write_sources(tmp_path / "sources")
    return tmp_path / "sources"


@pytest.fixture
def config(sources):
    return make_config(sources)


def run(config, out):
    """The files of the set."""
    return snapshot(Path(prepare(config, epath.Path(out))))


def read_card(out):
    return json.loads((out / "tiny/1.0.0/card.json").read_text())


def texts(out, stage="collect"):
    """The documents that a stage has left."""
    found = []
    for path in sorted((out / "stages").glob(f"{stage}-*/*.zst")):
        found += [document.text for document in shards.read(str(path))]
    return found


# --- what is read ---


def test_what_is_bad_is_in_the_card(config, sources, tmp_path):
    run(config, tmp_path / "out")

    card = read_card(tmp_path / "out")
    place = f"{sources}/b.jsonl"
    good = (sources / "b.jsonl").read_bytes().index(BAD[0].encode())
    listed = [(entry["kind"], entry["place"]) for entry in card["listed"]]
    assert ("not_json", f"{place}:{good}") in listed
    assert ("not_json", f"{place}:{good + len(BAD[0]) + 1}") in listed
    assert sorted(kind for kind, _ in listed) == ["empty", "not_json", "not_json", "type"]
    assert card["summary"]["bad"] == {"not_json": 2, "type": 1, "empty": 1}
    assert card["summary"]["collected"] == 84
    assert card["sources"]["lines"]["bad"] == card["summary"]["bad"]
    assert sum(card["sources"]["texts"]["encoding"].values()) == 1

    # Too much of it is no set.
    config.limits.max_bad = 0.01
    with pytest.raises(ValueError, match=r"max_bad = 0.01, and it is 0\.03"):
        run(config, tmp_path / "other")
    assert not (tmp_path / "other/tiny").exists()


@pytest.mark.parametrize("chosen", ["local", "beam"])
def test_bad_input_ends_the_preparation(config, sources, tmp_path, chosen):
    if chosen == "beam":
        pytest.importorskip("apache_beam")
    config.engine, config.bad_input = chosen, "stop"
    with pytest.raises(ValueError, match=f"{sources}/b.jsonl:[0-9]+: the line is not JSON.*'list'"):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out/tiny").exists()


def test_no_document_at_all(config, sources, tmp_path):
    for path in sources.iterdir():
        path.write_text("\0")
    with pytest.raises(ValueError, match="sources gave no documents.*'bad.encoding': {'lines': 2"):
        run(config, tmp_path / "out")


def test_paths_that_cannot_be_read(config, sources, tmp_path):
    (sources / "d.jsonl").symlink_to(tmp_path / "nowhere")
    (sources / "e.jsonl").symlink_to("/dev/zero")
    os.mkfifo(sources / "f.jsonl")
    run(config, tmp_path / "out")
    listed = {entry["place"]: entry for entry in read_card(tmp_path / "out")["listed"]}
    assert listed[f"{sources}/d.jsonl"]["kind"] == "unreadable"
    assert "No such file" in listed[f"{sources}/d.jsonl"]["why"]
    assert "not a plain file" in listed[f"{sources}/e.jsonl"]["why"]
    assert "not a plain file" in listed[f"{sources}/f.jsonl"]["why"]

    config.sources.texts.path = str(tmp_path / "nowhere/*.txt")
    with pytest.raises(ValueError, match=r"config.sources.texts: no file at .*nowhere/\*.txt"):
        run(config, tmp_path / "other")
    config.sources.texts.path = ""
    with pytest.raises(ValueError, match="config.sources.texts.path is missing"):
        run(config, tmp_path / "other")
    config.sources.texts.format = "docx"
    with pytest.raises(ValueError, match="config.sources.texts.format = 'docx': no such function"):
        run(config, tmp_path / "other")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(config, sources, tmp_path):
    (sources / "a.jsonl").chmod(0)
    run(config, tmp_path / "out")
    listed = {entry["place"]: entry["why"] for entry in read_card(tmp_path / "out")["listed"]}
    assert "Permission denied" in listed[f"{sources}/a.jsonl"]


def test_a_file_that_vanishes_before_it_is_read(config, sources, tmp_path, monkeypatch):
    do = engine.run_task

    def vanish(task):
        (sources / "a.jsonl").unlink(missing_ok=True)
        return do(task)

    monkeypatch.setattr(engine, "run_task", vanish)
    run(config, tmp_path / "out")
    listed = {entry["place"]: entry["kind"] for entry in read_card(tmp_path / "out")["listed"]}
    assert listed[f"{sources}/a.jsonl"] == "unreadable"


# --- readers of one's own ---


def read_own(path, source, work):
    """A reader that fails as its file says, and repeats ids."""
    with open(path) as file:
        what = file.read()
    if what == "value":
        raise ValueError("nothing of use")
    if what == "index":
        raise IndexError("out of range")
    for text in ("one", "two"):
        yield shards.Document("id", text, source["name"])


def test_readers_of_ones_own(tmp_path):
    path = tmp_path / "file"
    c = make_config(tmp_path)
    del c.sources.lines
    c.sources.texts = prepare_config.source("tests.test_collect.read_own", str(path))

    path.write_text("good")
    run(c, tmp_path / "out")
    assert texts(tmp_path / "out") == ["one", "two"]
    (listed,) = read_card(tmp_path / "out")["listed"]
    assert (listed["kind"], listed["place"]) == ("repeated_id", "id")

    path.write_text("value")
    with pytest.raises(ValueError, match=f"stage collect, task 0.*: {path}: nothing of use"):
        run(c, tmp_path / "out")
    path.write_text("index")
    with pytest.raises(IndexError) as error:
        run(c, tmp_path / "out")
    assert f"while it read {path}" in error.value.__notes__


# --- again ---


def test_a_second_start_changes_nothing_and_says_so(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(config, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "is there already" not in caplog.text

    run(config, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert f"{tmp_path}/out/tiny/1.0.0 is there already" in caplog.text


class Tasks:
    """The tasks that are run, by stage."""

    def __init__(self, monkeypatch):
        self.stages = []
        self._do = engine.run_task
        self.before = lambda task: None
        monkeypatch.setattr(engine, "run_task", self.run)

    def run(self, task):
        self.before(task)
        self.stages.append(task.stage.name)
        return self._do(task)


@pytest.fixture
def tasks(monkeypatch):
    return Tasks(monkeypatch)


@pytest.mark.parametrize("stopped", ["collect", "clean", "exact_find", "encode", "write"])
def test_a_preparation_that_was_killed_goes_on(config, tmp_path, tasks, stopped):
    wanted = run(config, tmp_path / "reference")
    order = tasks.stages.copy()
    tasks.stages.clear()

    def kill(task):
        if task.stage.name == stopped:
            raise KeyboardInterrupt

    tasks.before = kill
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out/tiny").exists()
    assert tasks.stages == order[: order.index(stopped)]
    tasks.before = lambda task: None
    assert run(config, tmp_path / "out") == wanted
    # What was done was not done again.
    assert tasks.stages == order


@pytest.mark.parametrize("stage", ["collect", "clean", "exact_drop", "write"])
@pytest.mark.parametrize("fate", ["report", "shard", "cut"])
def test_what_is_lost_is_made_again(config, tmp_path, tasks, stage, fate):
    wanted = run(config, tmp_path / "out")
    epath.Path(tmp_path / "out/tiny").rmtree()
    (folder,) = (tmp_path / "out/stages").glob(f"{stage}-*")
    path = folder / "00000.json"
    if fate != "report":
        path = epath.Path(json.loads(path.read_text())["outputs"][0]["path"])
    if fate == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()

    tasks.stages.clear()
    assert run(config, tmp_path / "out") == wanted
    assert set(tasks.stages) == {stage}


def test_shards_that_vanish_between_stages(config, tmp_path, tasks):
    wanted = run(config, tmp_path / "reference")

    def vanish(task):
        if task.stage.name == "clean":
            os.unlink(task.inputs["shard"])

    tasks.before = vanish
    with pytest.raises(ValueError, match="stage clean, task 0.*/collect-.*zst.*No such file"):
        run(config, tmp_path / "out")
    tasks.before = lambda task: None
    assert run(config, tmp_path / "out") == wanted


@pytest.mark.parametrize("stage, key", [("clean", "shard"), ("write", "records")])
def test_shards_that_are_damaged_between_stages(config, tmp_path, tasks, stage, key):
    wanted = run(config, tmp_path / "reference")

    def cut(task):
        if task.stage.name == stage:
            inputs = task.inputs[key]
            path = Path(inputs if isinstance(inputs, str) else inputs[0])
            path.write_bytes(path.read_bytes()[:-5])

    tasks.before = cut
    with pytest.raises(ValueError, match=f"stage {stage}, task 0.*/stages/.*zst is damaged"):
        run(config, tmp_path / "out")
    tasks.before = lambda task: None
    assert run(config, tmp_path / "out") == wanted


KILLED = """
import sys
from etils import epath
from pathlib import Path
from lm.prepare.pipeline import prepare
from tests import test_collect

config = test_collect.make_config(Path(sys.argv[1]), test_collect.ALL)
prepare(config, epath.Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_preparation_that_is_really_killed(sources, tmp_path):
    write_sources(sources, count=4000)
    wanted = run(make_config(sources, ALL), tmp_path / "reference")
    command = [sys.executable, "-c", KILLED, str(sources), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    draw = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and not (tmp_path / "out/stages").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out/tiny/1.0.0").exists() or process.returncode == 0
    assert run(make_config(sources, ALL), tmp_path / "out") == wanted


# --- what decides the contents ---


def test_another_version_of_a_library(config, tmp_path, tasks, monkeypatch):
    before = run(config, tmp_path / "out")
    folders = set((tmp_path / "out/stages").iterdir())
    order = tasks.stages.copy()
    tasks.stages.clear()

    versions = engine.versions

    def other_versions(packages):
        return versions(packages) | ({"resiliparse": "99"} if "resiliparse" in packages else {})

    monkeypatch.setattr(engine, "versions", other_versions)
    after = run(config, tmp_path / "out")
    # The documents are the same, but who made them is not.
    assert tasks.stages == order
    assert folders.isdisjoint(set((tmp_path / "out/stages").iterdir()) - folders)
    assert len(set((tmp_path / "out/stages").iterdir())) == 2 * len(folders)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"card.json", "card.html"} and "card.json" in changed
    assert read_card(tmp_path / "out")["key"] != json.loads(before["card.json"])["key"]


def test_what_makes_another_set(config, sources, tmp_path, monkeypatch):
    """And what doesn't."""

    def key():
        return engine.folders(collect.stages(config), epath.Path(tmp_path))[0]

    first = key()
    config.workers = 3
    config.clean.unicode = "none"
    assert key() == first

    keys = [first]
    config.collect.max_document_mb = 1.0
    keys.append(key())
    os.utime(sources / "a.jsonl", (1, 1))
    keys.append(key())
    (sources / "d.jsonl").write_text("{}")
    keys.append(key())
    getsource = collect.inspect.getsource
    for module in (formats, extract):

        def changed(of, module=module):
            return getsource(of) + ("# changed" if of is module else "")

        monkeypatch.setattr(collect.inspect, "getsource", changed)
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_package_that_is_missing(config, tmp_path, monkeypatch):
    monkeypatch.setitem(
        formats.FORMATS, "jsonl", formats.FORMATS["jsonl"]._replace(packages=("no-such-package",))
    )
    with pytest.raises(ValueError, match="needs the package no-such-package: pip install"):
        run(config, tmp_path / "out")


# --- disks ---


class FullDisk:
    """The file of a disk with so many bytes left."""

    left = 0

    def __init__(self, *arguments):
        self._file = open(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, content):
        FullDisk.left -= len(content)
        if FullDisk.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(content)


def test_a_full_disk(config, tmp_path, monkeypatch):
    wanted = run(config, tmp_path / "reference")
    for left in (0, 1000, 5000, 10_000):
        with monkeypatch.context() as patch:
            patch.setattr(files, "open", FullDisk, raising=False)
            FullDisk.left = left
            with pytest.raises(ValueError, match=f"stage .*No space left.*{tmp_path}/out/stages"):
                run(config, tmp_path / "out")
        assert not (tmp_path / "out/tiny").exists()
        assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run(config, tmp_path / "out") == wanted


LIMITED = """
import json, resource, sys
from pathlib import Path
from tests.test_collect import make_config, run

config, out = make_config(Path(sys.argv[1])), Path(sys.argv[2])
for size in (100, 3000, 10_000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        run(config, out)
    except ValueError as error:
        print(json.dumps(str(error)))
    assert not (out / "tiny/1.0.0").exists(), size
"""


def test_files_that_may_not_grow(config, sources, tmp_path):
    """A limit of the operating system: no library's writer gets around it."""
    wanted = run(config, tmp_path / "reference")
    command = [sys.executable, "-c", LIMITED, str(sources), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    ends = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(ends) == 4, ended.stderr
    for end in ends:
        assert f"{tmp_path}/out/stages" in end and "File too large" in end
    assert "stage collect" in ends[0] and "stage write" in ends[-1]
    assert run(config, tmp_path / "out") == wanted


def test_a_disk_that_is_full_at_the_very_end(config, tmp_path, monkeypatch):
    """What is left of the set's folder is no part of the next one."""
    wanted = run(config, tmp_path / "reference")
    write = files.write_whole

    def fail(path, content):
        if path.name == "card.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_whole", fail)
        with pytest.raises(OSError, match="No space left.*card.json"):
            run(config, tmp_path / "out")
    (left,) = (tmp_path / "out/tiny").iterdir()
    (left / "tiny-test.array_record-00000-of-00001").write_bytes(b"old")
    assert run(config, tmp_path / "out") == wanted
    assert [path.name for path in (tmp_path / "out/tiny").iterdir()] == ["1.0.0"]


# --- workers and engines ---


def test_engines_make_the_same_set(sources, tmp_path):
    pytest.importorskip("apache_beam")
    config = make_config(sources, ALL)
    wanted = run(config, tmp_path / "local")
    config.engine = "beam"
    assert run(config, tmp_path / "beam") == wanted


@pytest.mark.parametrize(
    "stages", [("collect", "clean", "write"), pytest.param(ALL, marks=pytest.mark.slow)]
)
def test_numbers_of_workers_make_the_same_set(sources, tmp_path, stages):
    config = make_config(sources, stages)
    config.shard_mb = 1
    write_sources(sources, count=5000)
    wanted = run(config, tmp_path / "one")
    assert len(list((tmp_path / "one/stages").glob("collect-*/*.zst"))) > 1
    config.workers = 2
    assert run(config, tmp_path / "two") == wanted
