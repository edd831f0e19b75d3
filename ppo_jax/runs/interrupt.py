"""Ctrl-C and SIGTERM without loss: a training stops at the next safe place."""

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # SIGTERM comes from job schedulers


class Interrupt:
    """Records that a signal asked the training to stop."""

    signal: int | None = None
    """Number of the signal."""

    @property
    def requested(self) -> bool:
        """True once a signal asked for it."""
        return self.signal is not None


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Makes the first Ctrl-C or SIGTERM a request; a second one interrupts at once.

    Python delivers signals to the main thread alone, so nothing changes in other threads.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, _: object) -> None:
        # The way out of a piece that takes longer than expected.
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.signal = number

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
