"""How a run ends before its time: by a signal, on which all processes agree, or by a failure."""

import signal
import threading

# jax and orbax take a second to import, and stand where they are used: every command knows the
# exceptions here, and most of --help is waiting for imports.

ALL_COME_SECONDS = 20  # within which processes that fail alike do so


class RunFailed(RuntimeError):
    """A run can't go on; the message says why, and what to do."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, SIGINT); it saved, and goes on at the next start."""


class StopSignal:
    """Notices SIGTERM and SIGINT, on all processes at the same step.

    A second SIGINT interrupts at once.
    """

    def __init__(self):
        self._asked = threading.Event()
        self._old_handlers = {}

    def __enter__(self):
        import jax

        # With several processes jax.distributed has its own handler of SIGTERM, which lets all of
        # them agree on a step. Handlers can be set in the main thread only.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused):
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del frame
        if self._asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked.set()

    def at_step(self, step: int) -> bool:
        """Whether to stop before the step after this one."""
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()

    def check(self) -> None:
        """Raises Stopped within an evaluation.

        With several processes it is left to the next step, for all to agree.
        """
        import jax

        if jax.process_count() == 1 and self._asked.is_set():
            raise Stopped


def all_come_to(place: str) -> bool:
    """Whether all processes call this, and not some of them alone.

    Args:
      place: a name that is used once in a run.
    """
    import jax
    from orbax.checkpoint import multihost

    try:
        barrier = multihost.get_barrier_sync_fn()
        barrier(key=place, timeout_ms=1000 * ALL_COME_SECONDS)
    except jax.errors.JaxRuntimeError:  # DEADLINE_EXCEEDED
        return False
    return True
