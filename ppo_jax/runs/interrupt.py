"""Ctrl-C without loss: a training stops at the next safe place."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupt:
    """Records that Ctrl-C was pressed."""

    requested = False


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Makes the first Ctrl-C set `requested` only; a second one interrupts at once.

    Python delivers signals to the main thread alone, so nothing changes in other threads.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(*_: object) -> None:
        # The way out of a piece that takes longer than expected.
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
