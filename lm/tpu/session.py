"""What this machine keeps of a run until its end: the code, packed once, and whether TPUs were made
for it.
"""

import dataclasses
import fcntl
import json
import subprocess
import time
from pathlib import Path

from lm.tpu.gcloud import Error

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Code:
    """A packed working tree.

    Attributes:
      path: the .tar.gz, whose files are below lm/.
      tree: git's hash of its content.
      commit, changed: what it was made of: a commit, and files that differ from it.
      packed: when.
    """

    path: str
    tree: str
    commit: str
    changed: list[str]
    packed: str

    def __str__(self) -> str:
        changes = f" with changes in {', '.join(self.changed)}" if self.changed else ""
        return f"commit {self.commit[:10]}{changes}, packed {self.packed}"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise Error(
            f"the code is packed by git, and {ROOT} is no checkout of it: {result.stderr.strip()}",
            f"git clone SOURCE lm  # instead of a copy of its files, in {ROOT.parent}",
        )
    return result.stdout.strip()


def pack(directory: Path) -> tuple[Code, list[str]]:
    """Packs the working tree, its uncommitted changes included.

    Returns:
      The code, and the files that git doesn't know, which aren't in it.
    """
    commit = _git("rev-parse", "HEAD")
    # A commit of the changes that no branch has; nothing if there are none.
    tree = _git("rev-parse", (_git("stash", "create") or "HEAD") + "^{tree}")
    changed = _git("diff", "--name-only", "HEAD").splitlines()
    unknown = _git("ls-files", "--others", "--exclude-standard").splitlines()

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{tree[:12]}.tar.gz"
    _git("archive", "--format=tar.gz", "--prefix=lm/", "-o", str(path), tree)
    code = Code(str(path), tree, commit, changed, time.strftime("%Y-%m-%d %H:%M"))
    return code, unknown


class Session:
    """A run's directory on this machine.

    Args:
      directory: a place of this run's alone.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment_file = directory / "environment.json"
        self._file = directory / "session.json"

    def lock(self, *, wait: bool = False) -> None:
        """Holds the run for as long as this process lives.

        Args:
          wait: for the process that holds it.

        Raises:
          Error: another process holds it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Error(
                "another ./tpu_setup.sh run of this name is watching on this machine"
            ) from None

    def _read(self) -> dict:
        try:
            return json.loads(self._file.read_text())
        except (OSError, ValueError):
            return {}

    def begin(self, code: Code) -> None:
        """Notes which code the run has."""
        values = {"code": dataclasses.asdict(code), "made": self.made}
        self._file.write_text(json.dumps(values))

    def code(self) -> Code | None:
        """The code of a run that has begun; None if none has, or its file is gone."""
        try:
            code = Code(**self._read()["code"])
        except (KeyError, TypeError):
            return None
        return code if Path(code.path).exists() else None

    @property
    def made(self) -> bool:
        """Whether TPUs were asked for here, and not by somebody's own command."""
        return self._read().get("made") is True

    def note_made(self, made: bool) -> None:
        """Notes whether TPUs were asked for, unless the run is over."""
        if not self.is_over():
            self._file.write_text(json.dumps(self._read() | {"made": made}))

    def forget_code(self) -> None:
        """Has the next run take the code that there is then."""
        self._file.write_text(json.dumps({"made": self.made}))

    def is_over(self) -> bool:
        """Whether another command has ended it."""
        return not self._file.exists()

    def end(self) -> None:
        """Forgets the run."""
        self._file.unlink(missing_ok=True)
        for path in self.directory.glob("*.tar.gz"):
            path.unlink()
