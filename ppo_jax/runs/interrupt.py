"""Ctrl-C and SIGTERM without loss: a training stops at the next safe place."""

import contextlib
import os
import signal
import sys
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


@contextlib.contextmanager
def exit_at_second_signal() -> Iterator[None]:
    """Makes a second Ctrl-C or SIGTERM end the process at once; for programs, not for libraries.

    Python runs signal handlers in the main thread, which waits while a piece is computed or a
    program is compiled. The number of a signal is written to a pipe at once, and a thread reads it.
    """
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        for count in (1, 2):
            number = b"\0"
            while number and number[0] not in _SIGNALS:
                number = os.read(reader, 1)
            if not number:
                return
            if count == 1:
                print("stopping soon; send the signal again to exit at once", file=sys.stderr)
            else:
                # Files are complete or under a temporary name, so nothing is to be cleaned up.
                os._exit(128 + number[0])

    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        watcher.join()
        os.close(reader)
