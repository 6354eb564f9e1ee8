"""Files are written whole and through nothing; what a stranger may have put there is refused."""

import errno
import os
import socket

import pytest
from etils import epath

from lm import files


def test_a_link_is_replaced_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/config.json"
    path.symlink_to(victim)
    # What earlier versions took for their temporary file.
    (tmp_path / "run/config.json.tmp").symlink_to(victim)

    files.write_whole(epath.Path(path), "new")

    assert victim.read_text() == "mine"
    assert path.read_text() == "new"
    assert not path.is_symlink()


def test_a_temporary_name_that_is_taken_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "00000000")
    (tmp_path / "a.00000000.tmp").symlink_to(victim)

    with pytest.raises(FileExistsError):
        files.write_whole(epath.Path(tmp_path / "a"), "new")

    assert victim.read_text() == "mine"


def test_a_write_that_fails_leaves_the_old_file_and_is_named(tmp_path):
    path = epath.Path(tmp_path / "a")
    path.write_text("old")

    with pytest.raises(OSError, match=r"No space left on device: .*/a'") as raised:
        with files.open_whole(path) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert raised.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_leftovers_of_killed_writers_go(tmp_path):
    for name in ("a", "a.0123abcd.tmp", "b.tmp"):
        (tmp_path / name).touch()
    files.remove_leftovers(epath.Path(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.tmp"]


def make_link(path):
    path.symlink_to("/etc")


def make_broken_link(path):
    path.symlink_to("/nowhere")


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        # The path of a socket is short.
        os.chdir(path.parent)
        listening.bind(path.name)


@pytest.mark.parametrize(
    "make, kind",
    [
        (make_link, "a link"),
        (make_broken_link, "a link"),
        (os.mkfifo, "a pipe"),
        (make_socket, "a pipe"),
    ],
)
def test_a_run_directory_has_plain_files_and_folders_only(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints/4/state"
    folder.mkdir(parents=True)
    (folder / "data").write_text("x")
    files.check_tree(epath.Path(tmp_path))

    make(folder / "d")

    with pytest.raises(ValueError, match=f"checkpoints/4/state/d is {kind}"):
        files.check_tree(epath.Path(tmp_path))


def test_the_run_directory_itself_may_be_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    files.check_tree(epath.Path(tmp_path / "link"))
    files.check_tree(epath.Path(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/a", "a/b", "a\\b", "a\0", None, 1, ["a"]]
)
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match="the index names the file"):
        files.check_name(name, "the index")
    assert files.check_name("model-1.safetensors", "the index") == "model-1.safetensors"


@pytest.mark.parametrize(
    "content, problem",
    [
        ("{", "not JSON"),
        ("[1]", "is a list; wanted an object"),
        ("1", "is a int"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 100_000, "not JSON"),
        ("\0", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
    ],
)
def test_json_that_is_none(tmp_path, content, problem):
    path = epath.Path(tmp_path / "a.json")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"a.json.*{problem}"):
        files.read_json(path)


@pytest.mark.parametrize("read", [files.read_json, files.read_text])
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(ValueError, match="a is not a plain file"):
        read(epath.Path(tmp_path / "a"))
    with pytest.raises(ValueError, match="is not a plain file"):
        read(epath.Path("/dev/zero"))
