"""Ctrl-C and SIGTERM without loss: a training stops at the next safe place."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # SIGTERM comes from job schedulers
_programs = 0  # that handle signals themselves, within `exit_at_second_signal`


class Interrupt:
    """Records that a signal asked the training to stop."""

    signal: int | None = None
    """Number of the signal."""

    @property
    def requested(self) -> bool:
        """True once a signal asked for it."""
        return self.signal is not None

    def deliver(self, result: Result, how_to_go_on: str) -> Result:
        """Returns a result, or raises the signal again, so that a script stops, too.

        Called once everything is saved. By default Ctrl-C becomes a `KeyboardInterrupt`, and
        SIGTERM ends the process. Within `exit_at_second_signal` the result is returned, from which
        a program reads the signal.

        Args:
          result: what is finished; the `KeyboardInterrupt` has it as its attribute `result`.
          how_to_go_on: a sentence that is added to the `KeyboardInterrupt`; empty if nothing was
            saved.
        """
        if self.signal is None or _programs:
            return result
        try:
            signal.raise_signal(self.signal)
        except KeyboardInterrupt as error:
            error.result = result  # type: ignore[attr-defined]
            error.add_note(how_to_go_on or "The attribute `result` of this error is what is done.")
            raise
        return result  # the caller's handler raised nothing


def how_to_go_on(run_dir: Path | None) -> str:
    """Returns the sentence for `Interrupt.deliver` after a sweep or a search; empty without one."""
    return "" if run_dir is None else f"The same call with run_dir={str(run_dir)!r} continues."


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

    The program learns of the first one from the result of a training, which is not interrupted.
    Python runs signal handlers in the main thread, which waits while a piece is computed or a
    program is compiled. The number of a signal is written to a pipe at once, and a thread reads it.
    """
    global _programs
    _programs += 1
    try:
        with _watched():
            yield
    finally:
        _programs -= 1


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Ends the process at a second signal, from a thread."""
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
