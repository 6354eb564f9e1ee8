"""A claim on a directory, so that one process works in it at a time.

CLAIM.json names the owner and has a heartbeat. One whose owner is gone is taken over. It is only
ever replaced or removed by compare-and-swap: if it is still what was read before.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import stat
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from lm import files, stopping

NAME = "CLAIM.json"
BEAT_SECONDS = 10.0  # between heartbeats
STALE_SECONDS = 60.0  # a heartbeat that stands still for so long is nobody's
# The variable of the environment by which a process passes a claim on to one that it starts.
PASSED_ON = "LM_CLAIM"
POLL_SECONDS = 1.0  # between looks at another's heartbeat
PATIENCE_SECONDS = 20.0  # for the lock of a file system, or the answer of a bucket
MAX_BYTES, MAX_LENGTH = 65536, 200  # of a claim that is read, and of a value in it


class Taken(ValueError):
    """Another process has the directory; the message says which."""


class Lost(stopping.RunFailed):
    """Another process took the directory over from this one."""


# --- owners ---


@dataclasses.dataclass(frozen=True)
class Owner:
    """What CLAIM.json says."""

    host: str
    system: str  # which boot, and which container, of a host: a pid counts within one
    pid: int
    process_start: str  # tells the process from a later one with the same pid
    since: str  # for people
    token: str  # this claim's alone
    beat: int  # goes up

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


def _this_process() -> Owner:
    pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return Owner(
        socket.gethostname(), _system(), pid, _process_start(pid), since, secrets.token_hex(8), 0
    )


def _encode(owner: Owner) -> bytes:
    return json.dumps(dataclasses.asdict(owner)).encode() + b"\n"


def _parse(content: bytes | None) -> Owner | None:
    """Returns the owner that a claim names; None if it is damaged, or a stranger's."""
    try:
        values = files.parse_json(content or b"", NAME)
    except ValueError:
        return None

    fields = {}
    for field in dataclasses.fields(Owner):
        value = fields[field.name] = values.get(field.name)
        # Not isinstance: a bool is an int.
        if type(value) is not field.type or len(str(value)) > MAX_LENGTH:
            return None
    return Owner(**fields) if 0 < fields["pid"] < 2**31 else None


def _system() -> str:
    """Tells apart machines and containers of one name; "" where there is no /proc."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _process_start(pid: int) -> str:
    """Returns when a process began, in ticks since boot; "" if it can't be known."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    # The name, in parentheses, may hold anything. After it come the state and then, as the 22nd
    # field of all, the start.
    fields = text.rpartition(b")")[2].split()
    return "ended" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _is_alive(owner: Owner) -> bool:
    """Whether an owner on this system still runs."""
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, whose /proc may be hidden
    return _process_start(owner.pid) in ("", owner.process_start)


# --- where claims lie ---


class Found(NamedTuple):
    """What lies in the place of a claim."""

    content: bytes | None  # None: nothing
    version: bytes  # another one for other content


_NOTHING = Found(None, b"nothing")
_NO_FILE = Found(b"", b"a link, a pipe or the like")


class _Folder:
    """The place of a claim in a folder, which is made if need be.

    tensorstore's own driver won't do: it writes through links, and waits for pipes.
    """

    def __init__(self, workdir: epath.Path):
        workdir.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = workdir / NAME, workdir / f"{NAME}.lock"

    def read(self) -> Found:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return _NOTHING
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # of a link, of a socket
                return _NO_FILE
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return _NO_FILE
            content = os.read(descriptor, MAX_BYTES)
        finally:
            os.close(descriptor)
        return Found(content, content)

    def swap(self, found: Found, content: bytes | None) -> bool:
        """Replaces what was found, or removes it (None), unless something else is there now.

        Returns:
          Whether it did.
        """
        with self._locked():
            if self.read() != found:
                return False
            if content is None:
                os.unlink(self._path)
            else:
                files.write_whole(self._path, content)
            return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds a lock file, which the kernel frees if this process dies."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (descriptor := self._try_lock()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds it", str(self._lock))
            time.sleep(0.01)
        try:
            yield
        finally:
            # Removed while it is held, so it is nobody else's.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._lock)
            os.close(descriptor)

    def _try_lock(self) -> int | None:
        """Returns a descriptor of the lock file; None while another process holds it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self._lock, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed it since it was opened.
            named = os.stat(self._lock, follow_symlinks=False)
            if os.path.samestat(os.fstat(descriptor), named):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError as error:
            # Some network file systems have no locks. Of two that claim there in the same moment
            # both may win, until the heartbeat of one finds the other's claim.
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None


class _Bucket:
    """The place of a claim in a bucket, whose objects have generations."""

    def __init__(self, workdir: epath.Path):
        import tensorstore  # slow, and of no use to local runs

        self._url = urllib.parse.quote(str(workdir), safe=":/") + "/"
        self._store = self._wait(tensorstore.KvStore.open(self._url))

    def _wait(self, future):
        try:
            return future.result(timeout=PATIENCE_SECONDS)
        except Exception as error:  # ValueError and others, by the kind of failure
            raise OSError(f"{self._url}{NAME}: {str(error) or type(error).__name__}") from error

    def read(self) -> Found:
        result = self._wait(self._store.read(NAME))
        content = result.value if result.state == "value" else None
        return Found(content, result.stamp.generation)  # there is one for "missing" too

    def swap(self, found: Found, content: bytes | None) -> bool:
        """See `_Folder.swap`. False also where the answer was lost and the request made again."""
        stamp = self._wait(self._store.write(NAME, content, if_equal=found.version))
        return stamp.generation != b""


# --- claims ---


class Claim:
    """A claim on a directory for as long as a `with` statement lasts.

    Args:
      workdir: the directory; gs:// too.
      active: False for a process that needs none: of those of a pod, one claims for all.

    A process that holds a claim passes it on to one that it starts with `environment`. The claim
    then names that one as its owner, goes back to the first when that one has ended, and is
    released by the first.

    Raises:
      Taken: another process has it. If that is on another host, this takes up to STALE_SECONDS.
      OSError: the claim can't be read or written.
    """

    def __init__(self, workdir: epath.Path, active: bool = True):
        self._workdir, self._active = workdir, active
        self._me = _this_process()
        token, _, of_directory = os.environ.get(PASSED_ON, "").partition(" ")
        self._is_passed_on = bool(token) and of_directory == str(workdir)
        if self._is_passed_on:
            self._me = dataclasses.replace(self._me, token=token)
        self._passed_on_by: Owner | None = None
        self._lost = ""
        self._mutex = threading.Lock()  # of heartbeats: the thread's, and those of `check`
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="claim", daemon=True)

    def __enter__(self) -> "Claim":
        if self._active:
            on_bucket = "://" in str(self._workdir)
            self._place = _Bucket(self._workdir) if on_bucket else _Folder(self._workdir)
            self._take()
            self._thread.start()
        return self

    def __exit__(self, *unused) -> None:
        if not self._active:
            return
        self._ended.set()
        self._thread.join()
        if self._is_passed_on and not self._passed_on_by:
            return  # another claim of this process holds it
        try:
            self._update(ends=True)
        except OSError as error:
            logging.warning("%s: the claim on it stays behind: %s", self._workdir, error)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that is to work in the directory for this one."""
        return {PASSED_ON: f"{self._me.token} {self._workdir}"}

    def check(self) -> None:
        """Raises Lost if another process has taken the directory over.

        To be called before writing what would spoil the other's work. It looks, and doesn't trust
        the last heartbeat: this process may have been suspended since.
        """
        if self._active:
            self._beat()
        if self._lost:
            raise Lost(self._lost)

    def _take(self) -> None:
        while True:
            found = self._place.read()
            owner = _parse(found.content)
            if owner and owner.token == self._me.token:
                if owner.pid == self._me.pid:
                    return
                # Passed on to this process, for which it holds from now on, even if the first one
                # dies.
                self._passed_on_by = owner
                self._place.swap(found, _encode(self._me))
                continue
            if found.content is None or self._is_left(found, owner):
                if self._place.swap(found, _encode(self._me)):
                    return

    def _is_left(self, found: Found, owner: Owner | None) -> bool:
        """Whether the owner of a claim is gone. False: look again.

        Raises:
          Taken: it is not.
        """
        if owner and (owner.host, owner.system) == (self._me.host, self._me.system):
            if _is_alive(owner):
                raise self._taken(owner)
            logging.warning("%s: taking over from %s, which is gone", self._workdir, owner)
            return True

        who = owner or f"whoever wrote its {NAME}, which is damaged"
        logging.warning(
            "%s: waiting up to %g s for a sign of life of %s", self._workdir, STALE_SECONDS, who
        )
        # By this host's clock alone: those of others differ.
        began = time.monotonic()
        while time.monotonic() - began < STALE_SECONDS:
            time.sleep(POLL_SECONDS)
            later = self._place.read()
            if later.content is None:
                return False
            if later != found:
                raise self._taken(_parse(later.content))
        logging.warning("%s: taking over from %s, which gave none", self._workdir, who)
        return True

    def _taken(self, owner: Owner | None) -> Taken:
        who = owner or f"a process whose {NAME} can't be understood, and changes"
        return Taken(
            f"{self._workdir} is in use by {who}; wait for it, stop it, or take another --workdir"
        )

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        try:
            self._update()
        except OSError as error:
            # The next one may do better. If not, what is saved will fail too.
            logging.warning("%s: no heartbeat: %s", self._workdir, error)

    def _update(self, ends: bool = False) -> None:
        """Writes the next heartbeat, or removes the claim, or gives it back to the process that
        passed it on; finds out if it is another's.
        """
        with self._mutex:
            while not self._lost:
                found = self._place.read()
                if ends and found.content is None:
                    return
                owner = _parse(found.content)
                # A claim that is gone isn't claimed again: another process may have taken it over
                # and ended since.
                if owner is None or owner.token != self._me.token:
                    self._lost = self._what_happened(owner)
                    logging.error("%s", self._lost)
                    return
                beat = owner.beat + 1
                if ends:
                    owner = self._passed_on_by
                elif owner.pid != self._me.pid and not _is_alive(owner):
                    owner = self._me  # the process that it was passed on to was killed
                content = _encode(dataclasses.replace(owner, beat=beat)) if owner else None
                if self._place.swap(found, content):
                    return

    def _what_happened(self, owner: Owner | None) -> str:
        what = f"was taken over by {owner}, since this process gave no sign of life"
        if owner is None:
            what = f"has another {NAME} than this process's, or none: overwritten, or removed"
        return (
            f"{self._workdir} {what}. Nothing more is saved here: let the other process go on, or "
            "stop it and start this one again"
        )
