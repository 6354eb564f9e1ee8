"""How a run is asked to stop: signals, agreed on by all processes."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT); it saved, and goes on at the next start."""


class StopSignal:
    """Notices SIGTERM and SIGINT (a second SIGINT interrupts at once), on all processes at the same
    step.
    """

    def __init__(self):
        self._asked = threading.Event()
        self._old = {}

    def __enter__(self):
        # With several processes jax.distributed has its own handler of SIGTERM, which lets all of
        # them agree on a step.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *unused):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del frame
        if self._asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked.set()

    def at_step(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def check(self) -> None:
        """Raises Stopped within an evaluation; with several processes it is left to the next step,
        for all to agree.
        """
        if jax.process_count() == 1 and self._asked.is_set():
            raise Stopped
