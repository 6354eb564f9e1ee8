"""What a command is doing while nothing else is shown: a corpus is read, a program compiled."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
# What is over sooner is not worth a word.
QUIET_SECONDS = 2.0
SECONDS_BETWEEN_LINES = 15.0  # where there is no terminal
SECONDS_ON_TERMINAL = 0.5


class Activity:
    """Something that may take long, while it lasts: how many of how many are done, how many a
    second, and how long the others may take.
    """

    def __init__(self, what: str, total: float = 0, unit: str = ""):
        self._what, self._total, self._unit = what, total, unit
        self._done = 0.0
        self._began = time.monotonic()
        self._over = threading.Event()
        self._terminal = sys.stderr.isatty()

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items, and counts them."""
        for item in items:
            yield item
            self.add(1)

    def add(self, count: float) -> None:
        """Counts what is done."""
        self._done += count

    def _text(self) -> str:
        seconds = time.monotonic() - self._began
        text = f"{self._what}:"
        if self._total:
            text += f" {self._done:,.0f} of {self._total:,.0f} {self._unit},"
        if self._total and self._done:
            rate = self._done / seconds
            left = max(self._total - self._done, 0) / rate
            text += f" {rate:,.3g} {self._unit}/s, {_duration(left)} left,"
        return f"{text} {seconds:.0f} s"

    def show(self) -> None:
        """Is the thread that shows it: on a line of the terminal that is written over, or on a line
        now and then.
        """
        wait = QUIET_SECONDS
        while not self._over.wait(wait):
            if self._terminal:
                print(f"\r{self._text()}\033[K", end="", file=sys.stderr, flush=True)
                wait = SECONDS_ON_TERMINAL
            else:
                logging.info("%s", self._text())
                wait = SECONDS_BETWEEN_LINES

    def end(self, thread: threading.Thread) -> float:
        """Ends the thread and its lines, and returns the seconds that all took."""
        self._over.set()
        thread.join()
        seconds = time.monotonic() - self._began
        if self._terminal and seconds > QUIET_SECONDS:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return seconds


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def activity(what: str, total: float = 0, unit: str = "") -> Iterator[Activity]:
    """Shows that something is under way, if it takes more than two seconds, and logs how long it
    took. Nothing is shown where the log leaves out such lines.

    Args:
      what: "reading FILE", for instance.
      total, unit: of what `Activity.each` counts: 12, "files"; 0: nothing is counted.
    """
    shown = Activity(what, total, unit)
    if not logging.getLogger().isEnabledFor(logging.INFO):
        yield shown
        return
    thread = threading.Thread(target=shown.show, daemon=True)
    thread.start()
    try:
        yield shown
    finally:
        seconds = shown.end(thread)
    if seconds > QUIET_SECONDS:
        logging.info("%s took %.1f s", what, seconds)
