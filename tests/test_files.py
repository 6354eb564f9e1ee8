"""Files are written whole and through nothing; what a stranger may have put there is refused."""

import bz2
import codecs
import errno
import gzip
import io
import os
import socket
import tarfile

import pyarrow
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

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


# --- found ---


def names(found, folder):
    """Paths relative to a folder."""
    return [os.path.relpath(file, folder) for file in found]


@pytest.fixture
def tree(tmp_path):
    for name in ("a.txt", "b.md", "c/d.txt", "c/e/f.txt", "[g]/h.txt", ".git/i.txt", "c/.j.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    "pattern, wanted",
    [
        ("a.txt", ["a.txt"]),
        ("*.txt", ["a.txt"]),
        ("*", ["a.txt", "b.md"]),
        ("**/*.txt", ["[g]/h.txt", "a.txt", "c/d.txt", "c/e/f.txt"]),
        ("c/**/*.txt", ["c/d.txt", "c/e/f.txt"]),
        ("c/**", ["c/d.txt", "c/e/f.txt"]),
        ("", ["[g]/h.txt", "a.txt", "b.md", "c/d.txt", "c/e/f.txt"]),
        ("[g]", ["[g]/h.txt"]),
        ("[g]/h.txt", ["[g]/h.txt"]),
        ("c/", ["c/d.txt", "c/e/f.txt"]),
    ],
)
def test_files_of_a_pattern(tree, monkeypatch, pattern, wanted):
    assert names(files.find(os.path.join(tree, pattern)), tree) == wanted

    # The same from the home folder.
    monkeypatch.setenv("HOME", str(tree))
    assert names(files.find(os.path.join("~", pattern)), tree) == wanted


def test_names_in_a_folder(tree):
    assert names(files.find(str(tree), ("*.md", "f.*")), tree) == ["b.md", "c/e/f.txt"]
    with pytest.raises(ValueError, match=r"no file named \*\.jsonl in the folder"):
        files.find(str(tree), ("*.jsonl",))
    with pytest.raises(ValueError, match="no file at .*none"):
        files.find(str(tree / "**" / "none"))


@pytest.mark.parametrize(
    "path, folder, wanted",
    [
        ("a/b", "", "a/b"),
        ("a/{split}.csv", "/tasks", "/tasks/a/{split}.csv"),
        ("/a", "/tasks", "/a"),
        ("~/a", "/tasks", "/home/me/a"),
        ("gs://bucket/~/a", "/tasks", "gs://bucket/~/a"),
        ("", "/tasks", ""),
    ],
)
def test_paths_that_users_write(monkeypatch, path, folder, wanted):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.expand(path, folder) == wanted


class Bucket(MemoryFileSystem):
    """Objects in memory, under the names that gcsfs gives them."""

    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def glob(self, path, **options):
        return [name.lstrip("/") for name in super().glob(path, **options)]


def test_files_of_a_bucket(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: bucket)
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/f.md"):
        bucket.pipe(f"gs://bucket/{name}", b"x")

    def found(pattern):
        return [file.removeprefix("gs://bucket/") for file in files.find(f"gs://bucket/{pattern}")]

    assert found("*.txt") == ["a.txt"]
    assert found("b/**/*.txt") == ["b/c.txt", "b/d/e.txt"]
    assert found("**/?.txt") == ["a.txt", "b/c.txt", "b/d/e.txt"]
    assert found("b") == ["b/c.txt", "b/d/e.txt", "b/f.md"]


# --- read ---

TEXT = "Grüße, 你好, 😀\r\nend\n"


def make_tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        gzip.compress(TEXT.encode()),
        gzip.compress(TEXT[:5].encode()) + gzip.compress(TEXT[5:].encode()),
        gzip.compress(codecs.BOM_UTF8 + TEXT.encode()),
        pyarrow.compress(TEXT.encode(), codec="zstd", asbytes=True),
        pyarrow.compress(TEXT[:5].encode(), codec="zstd", asbytes=True)
        + pyarrow.compress(TEXT[5:].encode(), codec="zstd", asbytes=True),
    ],
)
def test_first_bytes_say_how_to_read(tmp_path, content):
    # The name says nothing.
    (tmp_path / "a.txt").write_bytes(content)
    assert files.read_text(str(tmp_path / "a.txt")) == TEXT


@pytest.mark.parametrize(
    "content, message",
    [
        (b"caf\xe9", "is not UTF-8: byte 0xe9 at offset 3. .*file -i.*iconv -f ENCODING"),
        ("ab".encode("utf-16") + b"\x00\xd8", "is not UTF-16-LE: byte .* at offset 6"),
        ("latin letters".encode("utf-16-le"), "is .* UTF-16 without .* iconv -f utf-16le -t utf-8"),
        ("latin letters".encode("utf-16-be"), "is .* UTF-16 without .* iconv -f utf-16be -t utf-8"),
        ("буквы и знаки".encode("utf-16-le"), "is .* UTF-16 without .* iconv -f utf-16le -t utf-8"),
        ("буквы и знаки".encode("utf-16-be"), "is .* UTF-16 without .* iconv -f utf-16be -t utf-8"),
        ("हिंदी में एक".encode("utf-16-le"), "is .* UTF-16 without .* iconv -f utf-16le -t utf-8"),
        (gzip.compress(TEXT.encode() * 99)[:-20], "is damaged and can't be unpacked"),
        (b"\x1f\x8b\x08no", "is damaged and can't be unpacked"),
        (b"\x28\xb5\x2f\xfdno", "is damaged and can't be unpacked"),
        (gzip.compress(b"\0" * (1 << 25)), "unpacks to more than 250 times its size"),
        (bz2.compress(TEXT.encode() * 9), "is bzip2, not text; unpack it with bzip2 -dk"),
        (b"\xfd7zXZ\0\0\x04\xe6", "is xz, not text"),
        (b"PK\x03\x04\x14\0\xff", "is a zip archive, .*not text"),
        (b"%PDF-1.7\n\xff", "is PDF, not text"),
        (gzip.compress(make_tar()), "is a tar archive, not text"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt {message}") as raised:
        files.read_text(str(tmp_path / "a.txt"))
    assert "iconv -f latin1" not in str(raised.value)


@pytest.mark.parametrize(
    "text, wanted",
    [
        (r"\n\n", "\n\n"),
        (r"a\tb\f\r", "a\tb\f\r"),
        (r"\\n", r"\n"),
        (r"\u2581\x1e", "\u2581\x1e"),
        (r"\d\ud800\u12\e\ ", r"\d\ud800\u12\e\ "),
        ("\n😀é", "\n😀é"),
    ],
)
def test_escapes(text, wanted):
    assert files.unescape(text) == wanted


def test_a_folder_that_can_not_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a").write_text("")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="closed can't be read: Permission denied"):
        files.find(str(tmp_path))


def test_what_is_read_while_a_file_is_written_keeps_its_name(tmp_path):
    with pytest.raises(OSError, match="none") as raised:
        with files.open_whole(epath.Path(tmp_path / "new")):
            (tmp_path / "none").read_bytes()
    assert raised.value.filename == str(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_too_much_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FOUND", 3)
    for name in "abc":
        (tmp_path / name).write_text("")
    assert len(files.find(str(tmp_path))) == 3
    (tmp_path / "d").write_text("")
    with pytest.raises(ValueError, match="more than 3 files and folders in it; name one with less"):
        files.find(str(tmp_path))
