"""One process works in a directory at a time: in a folder, and in a bucket that an HTTP server in
this process plays.
"""

import dataclasses
import errno
import fcntl
import functools
import http.server
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.parse
from pathlib import Path

import pytest
import tensorstore
from etils import epath

from lm import claim, stopping
from tests.helpers import ROOT

# Each line of its input is a directory, which a process of its own claims and keeps.
HOLDER = """
import os, signal, sys
from etils import epath
from lm import claim
for line in sys.stdin:
    if os.fork() == 0:
        signal.alarm(120)  # outlives no broken test
        claim.BEAT_SECONDS = 0.05
        claim.Claim(epath.Path(line.strip())).__enter__()
        print(os.getpid(), flush=True)
        signal.pause()
"""

# Prints, for each round, how many of 8 processes got the directory. In every other one they take
# over from a dead process.
RACE = """
import dataclasses, multiprocessing, sys, time
from etils import epath
from lm import claim

ROUNDS, RACERS = 20, 8
write_whole = claim.files.write_whole

def write_slowly(*arguments):
    time.sleep(0.01)  # between the comparison and the write
    write_whole(*arguments)

claim.files.write_whole = write_slowly

def race(folder, barrier, won):
    for number in range(ROUNDS):
        barrier.wait(60)
        try:
            with claim.Claim(epath.Path(folder) / str(number)):
                with won.get_lock():
                    won[number] += 1
                barrier.wait(60)  # kept until all have tried
        except claim.Taken:
            barrier.wait(60)

context = multiprocessing.get_context("fork")
barrier, won = context.Barrier(RACERS), context.Array("i", ROUNDS)
dead = dataclasses.replace(claim._this_process(), process_start="1")
for number in range(0, ROUNDS, 2):
    place = epath.Path(sys.argv[1]) / str(number)
    place.mkdir()
    (place / claim.NAME).write_bytes(claim._encode(dead))
racers = [context.Process(target=race, args=(sys.argv[1], barrier, won)) for _ in range(RACERS)]
for racer in racers:
    racer.start()
for racer in racers:
    racer.join()
print(list(won))
"""


class Bucket(http.server.ThreadingHTTPServer):
    """What tensorstore asks of Cloud Storage's JSON API: objects with generations, and
    preconditions on them.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), BucketHandler)
        self.mutex = threading.Lock()
        self.objects = {}  # name -> (generation, content)
        self.generation = 1000
        self.reset()

    def reset(self):
        self.statuses = []  # of all answers
        self.meeting = None  # a barrier, at which reads wait for each other
        self.lose_answers = 0  # of so many writes: done, but answered with an error
        self.refuse = 0  # a status for everything

    def change(self, name, content, wanted):
        """The status of a write, or of a removal (None)."""
        with self.mutex:
            generation, old = self.objects.get(name, (0, None))
            if content is None and old is None:
                return 404
            if wanted is not None and int(wanted) != generation:
                return 412
            if content is None:
                del self.objects[name]
            else:
                self.generation += 1
                self.objects[name] = (self.generation, content)
            if self.lose_answers:
                self.lose_answers -= 1
                return 503
            return 200 if content is not None else 204


class BucketHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *unused):
        pass

    def answer(self, status, content=b"", generation=0):
        self.server.statuses.append((self.command, status))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(content)

    def handle_request(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        name = f"gs://{bucket}/{query.get('name') or urllib.parse.unquote(name[1:])}"
        if self.server.refuse:
            self.answer(self.server.refuse)
        elif self.command == "GET":
            with self.server.mutex:
                generation, content = self.server.objects.get(name, (0, None))
            if meeting := self.server.meeting:
                meeting.wait(10)
            self.answer(200 if generation else 404, content or b"", generation)
        else:
            content = body if self.command == "POST" else None
            status = self.server.change(name, content, query.get("ifGenerationMatch"))
            generation = self.server.objects.get(name, (0, None))[0]
            metadata = {"name": name, "generation": str(generation)}
            self.answer(status, json.dumps(metadata).encode() if status == 200 else b"")

    do_GET = do_POST = do_DELETE = handle_request


class Place:
    """A directory that may be claimed, and who writes to it without asking."""

    def __init__(self, workdir, bucket=None):
        self.workdir, self.bucket = epath.Path(workdir), bucket
        self.path = f"{workdir}/{claim.NAME}"

    def read(self):
        if self.bucket:
            return self.bucket.objects.get(self.path, (0, None))[1]
        return Path(self.path).read_bytes() if os.path.exists(self.path) else None

    def write(self, content):
        if self.bucket:
            self.bucket.change(self.path, content, None)
        elif content is None:
            os.unlink(self.path)
        else:
            self.workdir.mkdir(exist_ok=True)
            with open(f"{self.path}.new", "wb") as file:
                file.write(content)
            os.replace(f"{self.path}.new", self.path)

    def owner(self):
        return json.loads(self.read())


@pytest.fixture(scope="module")
def server():
    server = Bucket()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # else it looks for credentials
        patch.setenv("no_proxy", "127.0.0.1")
        yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def bucket(server):
    yield server
    server.reset()
    server.objects.clear()


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path, bucket):
    if request.param == "folder":
        return Place(tmp_path / "run")
    return Place("gs://bucket/100%41 runs/run", bucket)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(claim, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(claim, "POLL_SECONDS", 0.02)


@pytest.fixture(scope="module")
def hold(server):
    """A function: another process claims a directory and keeps it; returns its pid."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    pids = []
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def hold(workdir):
            process.stdin.write(f"{workdir}\n")
            process.stdin.flush()
            pids.append(int(process.stdout.readline()))
            return pids[-1]

        yield hold
        for pid in pids:
            os.kill(pid, signal.SIGKILL)  # a zombie, at least: its parent never waits
        process.stdin.close()


def encoded(**changes):
    """The claim of this process, with changes."""
    return claim._encode(dataclasses.replace(claim._this_process(), **changes))


# --- owners on this host ---


def test_a_claim_is_a_file_that_goes_at_the_end(place):
    with claim.Claim(place.workdir) as owned:
        owner = place.owner()
        assert owner["pid"] == os.getpid()
        assert owner["host"] == os.uname().nodename
        owned.check()
        assert place.owner() == owner | {"beat": owner["beat"] + 1}
        if not place.bucket:
            assert os.listdir(place.workdir) == [claim.NAME]
    assert place.read() is None
    if not place.bucket:
        assert os.listdir(place.workdir) == []

    with claim.Claim(place.workdir):
        assert place.owner()["token"] != owner["token"]


def test_an_error_inside_ends_the_claim_and_is_not_hidden(place):
    with pytest.raises(KeyError, match="mine"), claim.Claim(place.workdir):
        raise KeyError("mine")
    assert place.read() is None


def test_a_process_that_needs_none_claims_nothing(tmp_path):
    with claim.Claim(epath.Path(tmp_path / "run"), active=False) as owned:
        owned.check()
        assert not (tmp_path / "run").exists()


def test_a_live_process_is_refused_at_once_and_a_killed_one_taken_over_at_once(
    place, hold, monkeypatch, caplog
):
    monkeypatch.setattr(claim, "STALE_SECONDS", 60)
    began = time.monotonic()
    pid = hold(place.workdir)
    with pytest.raises(claim.Taken) as refused, claim.Claim(place.workdir):
        pass
    message = str(refused.value)
    assert message.startswith(f"{place.workdir} is in use by process {pid} on ")
    assert os.uname().nodename in message
    assert "another --workdir" in message
    assert isinstance(refused.value, ValueError)
    assert place.owner()["pid"] == pid

    # A zombie, since its parent doesn't wait for it.
    os.kill(pid, signal.SIGKILL)
    while claim._process_start(pid) != "ended":
        time.sleep(0.01)
    with claim.Claim(place.workdir):
        assert place.owner()["pid"] == os.getpid()
    assert f"taking over from process {pid}" in caplog.text
    assert time.monotonic() - began < 20


def test_a_process_that_is_no_more_is_taken_over_at_once(place, monkeypatch):
    monkeypatch.setattr(claim, "STALE_SECONDS", 60)
    gone = subprocess.Popen(["true"])
    start = claim._process_start(gone.pid)
    gone.wait()
    place.write(encoded(pid=gone.pid, process_start=start))
    with claim.Claim(place.workdir):
        assert place.owner()["pid"] == os.getpid()


def test_a_pid_that_was_used_again_is_not_the_owner(place, monkeypatch):
    monkeypatch.setattr(claim, "STALE_SECONDS", 60)
    place.write(encoded())
    with pytest.raises(claim.Taken, match=f"process {os.getpid()} on"), claim.Claim(place.workdir):
        pass
    place.write(encoded(process_start="1"))
    with claim.Claim(place.workdir):
        assert place.owner()["process_start"] != "1"


def test_a_process_of_another_user_lives(place, monkeypatch):
    """It may not be signalled, and its /proc may be hidden."""

    def kill(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(claim, "_process_start", lambda pid: "")
    place.write(encoded(process_start="1"))
    with pytest.raises(claim.Taken), claim.Claim(place.workdir):
        pass


# --- owners elsewhere ---


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"system": "another container"}])
def test_another_hosts_heartbeat_that_stands_still_is_taken_over_after_a_while(
    place, other, caplog
):
    # Its pid means nothing here: it is that of a live process.
    place.write(encoded(**other))
    began = time.monotonic()
    with caplog.at_level(logging.WARNING), claim.Claim(place.workdir):
        assert place.owner()["system"] == claim._system()
    assert 0.3 <= time.monotonic() - began < 10
    assert "waiting up to 0.3 s for a sign of life of process" in caplog.text


def test_another_hosts_live_heartbeat_is_respected(place, monkeypatch):
    monkeypatch.setattr(claim, "STALE_SECONDS", 10)
    place.write(encoded(host="elsewhere", pid=7))
    beat = threading.Timer(0.2, place.write, [encoded(host="elsewhere", pid=7, beat=1)])
    beat.start()
    began = time.monotonic()
    with pytest.raises(claim.Taken, match="process 7 on elsewhere"), claim.Claim(place.workdir):
        pass
    assert time.monotonic() - began < 5
    assert place.owner()["beat"] == 1
    beat.join()


def test_a_claim_that_ends_while_it_is_watched_is_free(place, monkeypatch):
    monkeypatch.setattr(claim, "STALE_SECONDS", 10)
    place.write(encoded(host="elsewhere"))
    end = threading.Timer(0.2, place.write, [None])
    end.start()
    began = time.monotonic()
    with claim.Claim(place.workdir):
        assert place.owner()["host"] != "elsewhere"
    assert time.monotonic() - began < 5
    end.join()


def test_a_heartbeat_in_the_last_moment_is_seen(place, monkeypatch):
    """Between the decision to take over and the takeover."""
    place.write(encoded(host="elsewhere", pid=7))
    store = claim._Bucket if place.bucket else claim._Folder
    swap, calls = store.swap, []
    later = threading.Timer(0.1, place.write, [encoded(host="elsewhere", pid=7, beat=2)])

    def late(self, found, content):
        calls.append(content)
        monkeypatch.setattr(claim, "STALE_SECONDS", 10)
        place.write(encoded(host="elsewhere", pid=7, beat=1))
        later.start()
        return swap(self, found, content)

    monkeypatch.setattr(store, "swap", late)
    with pytest.raises(claim.Taken, match="process 7 on elsewhere"), claim.Claim(place.workdir):
        pass
    assert len(calls) == 1
    later.join()


# --- heartbeats, and claims that are lost ---


def test_the_heart_beats(place, monkeypatch):
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.02)
    with claim.Claim(place.workdir):
        deadline = time.monotonic() + 10
        while place.owner()["beat"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_claim_that_was_taken_over_stops_the_run_and_removes_nothing(place):
    other = encoded(host="elsewhere", pid=7)
    with claim.Claim(place.workdir) as owned:
        owned.check()
        place.write(other)
        for _ in range(2):
            with pytest.raises(claim.Lost, match="taken over by process 7 on elsewhere"):
                owned.check()
        assert issubclass(claim.Lost, stopping.RunFailed)
    assert place.read() == other


def test_a_claim_that_was_taken_over_and_ended_is_lost_too(place):
    with claim.Claim(place.workdir) as owned:
        place.write(None)
        with pytest.raises(claim.Lost, match="or removed"):
            owned.check()
        assert place.read() is None


def test_the_heartbeat_finds_another_owner(place, monkeypatch, caplog):
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.02)
    other = encoded(host="elsewhere", pid=7)
    with claim.Claim(place.workdir):
        place.write(other)
        deadline = time.monotonic() + 10
        while "taken over by process 7 on elsewhere" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        assert place.read() == other
    assert place.read() == other


def test_a_heartbeat_that_fails_is_no_end(place, monkeypatch, caplog):
    def fail(*unused):
        raise OSError(errno.ENOSPC, "No space left on device")

    with claim.Claim(place.workdir) as owned:
        with monkeypatch.context() as patch:
            patch.setattr(owned._place, "swap", fail)
            owned.check()
        assert "no heartbeat: " in caplog.text
        beat = place.owner()["beat"]
        owned.check()
        assert place.owner()["beat"] == beat + 1


# --- races ---


def test_of_8_processes_one_wins(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", RACE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout) == [1] * 20, result.stderr[-3000:]


def test_of_two_takeovers_of_a_dead_owner_one_wins(tmp_path, monkeypatch):
    """Both have seen the dead one before either swaps."""
    place = Place(tmp_path / "run")
    place.write(encoded(process_start="1"))
    meeting, original = threading.Barrier(2), claim._is_alive

    def together(owner):
        alive = original(owner)
        if not alive:
            meeting.wait(10)
        return alive

    monkeypatch.setattr(claim, "_is_alive", together)
    assert sorted(race_of_two(place)) == ["Taken", "won"]


def test_of_two_writers_to_a_bucket_one_is_told_412(bucket):
    place = Place("gs://bucket/run", bucket)
    # Both have read that there is nothing; what the loser reads afterwards, it reads alone.
    bucket.meeting = threading.Barrier(2, lambda: setattr(bucket, "meeting", None))
    assert sorted(race_of_two(place)) == ["Taken", "won"]
    posts = [status for method, status in bucket.statuses if method == "POST"]
    assert sorted(posts) == [200, 412]


def race_of_two(place):
    """What becomes of two claims at the same time."""
    results = []
    tried = threading.Barrier(2)

    def run():
        try:
            with claim.Claim(place.workdir):
                results.append("won")
                tried.wait(10)
        except claim.Taken:
            results.append("Taken")
            tried.wait(10)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- strangers' files ---

DAMAGED = {
    "empty": b"",
    "no JSON": b"\x00\xff{",
    "half": encoded()[:40],
    "a list": b"[1]",
    "nested": b"[" * 100_000,
    "no keys": b"{}",
    "a pid that is none": encoded(pid=0),
    "a group": encoded(pid=-1),
    "a long pid": encoded(pid=10**100),
    "a bool": encoded().replace(b'"beat": 0', b'"beat": false'),
    "a number": encoded().replace(b'"beat": 0', b'"beat": 1e999'),
    "a long name": encoded(host="a" * 300),
    "no text": encoded(host="a").replace(b'"a"', b"null"),
    "too long": encoded(host="a" * 100_000),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damage_names_no_owner(content):
    assert claim._parse(content) is None


@pytest.mark.parametrize("content", [b"", b"\x00\xff{", encoded(pid=-1)])
def test_damage_is_watched_and_replaced(place, content):
    place.write(content)
    began = time.monotonic()
    with claim.Claim(place.workdir):
        assert place.owner()["pid"] == os.getpid()
    assert time.monotonic() - began >= 0.3
    assert place.read() is None


def test_damage_that_changes_is_respected(place, monkeypatch):
    monkeypatch.setattr(claim, "STALE_SECONDS", 10)
    place.write(b"of a later version, 1")
    beat = threading.Timer(0.2, place.write, [b"of a later version, 2"])
    beat.start()
    with pytest.raises(claim.Taken, match="can't be understood"), claim.Claim(place.workdir):
        pass
    assert place.read() == b"of a later version, 2"
    beat.join()


def make_fifo(path, victim):
    os.mkfifo(path)


def make_link(path, victim):
    path.symlink_to(victim)


def make_hard_link(path, victim):
    os.link(victim, path)


def make_dangling_link(path, victim):
    path.symlink_to(victim.parent / "nowhere")


@pytest.mark.parametrize("make", [make_fifo, make_link, make_hard_link, make_dangling_link])
def test_what_is_no_file_of_ours_is_replaced_not_written_through(tmp_path, make):
    victim, place = tmp_path / "victim", Place(tmp_path / "run")
    victim.write_text("mine")
    place.workdir.mkdir()
    make(tmp_path / "run" / claim.NAME, victim)

    began = time.monotonic()
    with claim.Claim(place.workdir) as owned:
        owned.check()
        assert place.owner()["pid"] == os.getpid()
    assert time.monotonic() - began >= 0.3
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["run", "victim"]
    assert os.listdir(tmp_path / "run") == []


def test_a_folder_in_its_place_is_an_error(tmp_path):
    (tmp_path / claim.NAME).mkdir()
    with pytest.raises(OSError, match=claim.NAME), claim.Claim(epath.Path(tmp_path)):
        pass
    assert os.listdir(tmp_path) == [claim.NAME]


# --- the lock of a folder ---


@pytest.mark.parametrize("make", [make_link, make_dangling_link])
def test_a_lock_that_is_a_link_is_not_followed(tmp_path, make):
    victim, workdir = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    workdir.mkdir()
    make(workdir / f"{claim.NAME}.lock", victim)
    with pytest.raises(OSError, match="symbolic link.*lock"), claim.Claim(epath.Path(workdir)):
        pass
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["run", "victim"]


def test_a_lock_that_was_removed_since_it_was_opened_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.1)
    lock, flock = tmp_path / f"{claim.NAME}.lock", fcntl.flock
    others = []

    def late(descriptor, operation):
        """Its last holder has removed it, and another process has made and locked its own."""
        monkeypatch.setattr(fcntl, "flock", flock)
        lock.unlink()
        others.append(open(lock, "w"))
        flock(others[0], fcntl.LOCK_EX)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OSError, match="another process holds it"):
        with claim.Claim(epath.Path(tmp_path)):
            pass
    assert os.listdir(tmp_path) == [lock.name]
    others[0].close()


def test_a_lock_that_a_killed_process_left_is_free(tmp_path):
    (tmp_path / f"{claim.NAME}.lock").touch()
    with claim.Claim(epath.Path(tmp_path)):
        assert os.listdir(tmp_path) == [claim.NAME]


def test_a_lock_that_is_held_for_long_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.1)
    with open(tmp_path / f"{claim.NAME}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process holds it.*lock"):
            with claim.Claim(epath.Path(tmp_path)):
                pass


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def flock(*unused):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claim.Claim(epath.Path(tmp_path)) as owned:
        owned.check()
        assert os.listdir(tmp_path) == [claim.NAME]
    assert os.listdir(tmp_path) == []


# --- a bucket's answers ---


def test_writes_whose_answers_are_lost_are_known_again(bucket, monkeypatch):
    """tensorstore makes the request again, and is told 412 or 404 for what it has done itself."""
    soon = tensorstore.Context({"gcs_request_retries": {"initial_delay": "10ms"}})
    open_soon = functools.partial(tensorstore.KvStore.open, context=soon)
    monkeypatch.setattr(tensorstore, "KvStore", types.SimpleNamespace(open=open_soon))
    place = Place("gs://bucket/run", bucket)
    bucket.lose_answers = 1
    with claim.Claim(place.workdir) as owned:
        assert ("POST", 503) in bucket.statuses and ("POST", 412) in bucket.statuses
        owned.check()
        bucket.lose_answers = 1
    assert ("DELETE", 503) in bucket.statuses and ("DELETE", 404) in bucket.statuses
    assert not owned._lost
    assert place.read() is None


def test_a_bucket_that_refuses_is_named(bucket):
    bucket.refuse = 403
    with pytest.raises(OSError, match="gs://bucket/run/CLAIM.json: .*403"):
        with claim.Claim(epath.Path("gs://bucket/run")):
            pass


def test_a_bucket_that_gives_no_answer_is_an_error_in_the_end(bucket, monkeypatch):
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 0.3)
    bucket.refuse = 503
    with pytest.raises(OSError, match="gs://bucket/run/CLAIM.json: ."):
        with claim.Claim(epath.Path("gs://bucket/run")):
            pass
