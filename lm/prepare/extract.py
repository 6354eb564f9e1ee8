"""Main text of pages and of wikitext, made by a process of its own with limits: a page may keep a
parser busy for ever, or take it down.

    python -m lm.prepare.extract < requests > answers
"""

import contextlib
import os
import re
import resource
import select
import struct
import subprocess
import sys
import threading
from pathlib import Path

MEMORY_BYTES = 2**32
START_SECONDS = 300.0  # of a machine that has much else to do
EXTRACTORS = ("resiliparse", "trafilatura", "wikitext")


class Failed(ValueError):
    """A page has no text that could be got: it took too long, or its parser failed."""


class Extractor:
    """Text of pages, by a process that is started when it is needed, and again when it is lost.

    Args:
      name: of `EXTRACTORS`.
      seconds: that a page may take.
    """

    def __init__(self, name: str, seconds: float):
        assert name in EXTRACTORS, name
        self._name, self._seconds = name, seconds
        self._process: subprocess.Popen | None = None

        # Beam's workers have several threads.
        self._lock = threading.Lock()

    def extract(self, page: str) -> str:
        """Returns a page's text.

        Raises:
          Failed: it took too long, or the process died of it.
          ValueError: the process doesn't start.
        """
        with self._lock:
            return self._extract(page)

    def _extract(self, page: str) -> str:
        if self._process is None:
            self._process = _start(self._name)
        try:
            # Reading waits for the whole request: a page is never half-written for long.
            _send(self._process.stdin, page)
            ready, _, _ = select.select([self._process.stdout], [], [], self._seconds)
            if not ready:
                raise Failed(f"it took the extractor more than {self._seconds:g} seconds")
            answer = _receive(self._process.stdout)
        except (BrokenPipeError, EOFError):
            self.close()
            raise Failed("the extractor died of it") from None
        except Failed:
            self.close()
            raise

        if answer.startswith("!"):
            raise Failed(f"the extractor failed: {answer[1:]}")
        return answer[1:]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start(name: str) -> subprocess.Popen:
    """The process. Wherever this one found the package, the other finds it too."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "lm.prepare.extract", name],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    # What it imports isn't part of the first page's time.
    ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
    try:
        if ready and _receive(process.stdout) == "ready":
            return process
    except EOFError:
        pass

    process.kill()
    process.communicate()
    raise ValueError(
        f"the extractor {name} doesn't start; python -m lm.prepare.extract {name} < /dev/null says "
        "why"
    )


def _send(stream, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def _receive(stream) -> str:
    """Raises EOFError if the other side has ended."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (length,) = struct.unpack("<Q", head)
    content = stream.read(length)
    if len(content) < length:
        raise EOFError
    return content.decode("utf-8", "surrogatepass")


# --- in the process ---


def _load(name: str):
    """The function (page) -> text."""
    if name == "resiliparse":
        from resiliparse.extract.html2text import extract_plain_text

        def extract(page: str) -> str:
            return extract_plain_text(page, main_content=True, alt_texts=False)

    elif name == "trafilatura":
        import trafilatura

        def extract(page: str) -> str:
            return trafilatura.extract(page, include_comments=False) or ""

    else:
        extract = wikitext

    return extract


# What links of these namespaces lead to is no text of the article. `formats.read_wikipedia` takes
# care of their names in other languages.
_SWITCH = re.compile(r"__[A-Z]+__")  # such as __NOTOC__
_NO_TEXT = ("file:", "image:", "category:", "media:")


def wikitext(page: str) -> str:
    """Returns the text of an article in MediaWiki's markup: no templates, tables, references."""
    import mwparserfromhell

    code = mwparserfromhell.parse(page)
    for link in code.filter_wikilinks():
        title = str(link.title).strip().lower()
        if title.startswith(_NO_TEXT):
            with contextlib.suppress(ValueError):
                code.remove(link)

    for tag in code.filter_tags(matches=_is_no_text):
        with contextlib.suppress(ValueError):
            code.remove(tag)

    text = _SWITCH.sub("", code.strip_code(normalize=True, collapse=True))
    lines = [line.strip() for line in text.split("\n")]
    return "\n".join(lines).strip()


def _is_no_text(tag) -> bool:
    return str(tag.tag).lower() in ("table", "ref", "references")


def main(name: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    extract = _load(name)
    _send(sys.stdout.buffer, "ready")
    while True:
        try:
            page = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = "=" + extract(page)
        except Exception as error:  # of any parser, for any page
            answer = f"!{type(error).__name__}: {error}"[:300]
        _send(sys.stdout.buffer, answer)


if __name__ == "__main__":
    main(sys.argv[1])
