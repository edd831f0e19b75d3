"""Directories that one process at a time writes to."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from ppo_jax.errors import ConfigError
from ppo_jax.runs import files

LOCK = ".lock"


@contextlib.contextmanager
def owned(path: Path, folders: tuple[str, ...] = ()) -> Iterator[None]:
    """Locks a directory for this process, until the context is left or the process dies.

    Files that killed processes left under temporary names are restored or removed.

    Args:
      path: the directory, which exists.
      folders: names of folders in it that have such files, too.

    Raises:
      ConfigError: another process owns it, or it cannot be written to.
    """
    # The system releases the lock of a process that dies, however that happens.
    lock = filelock.FileLock(path / LOCK, blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ConfigError(
            f"a run_dir must be written by one process at a time; another one uses {path}. "
            "Wait until it ends, or choose another directory."
        ) from error
    except OSError as error:
        raise _not_writable(path, error) from error
    try:
        # Only the owner may touch them: another process could be writing one.
        for folder in (path, *(path / name for name in folders)):
            files.mend(folder)
        yield
    finally:
        # Removed while it is locked: another process that has opened it finds it unlinked after
        # it got the lock, and tries again. Windows removes no open file.
        with contextlib.suppress(OSError):
            (path / LOCK).unlink()
        lock.release()


@contextlib.contextmanager
def writable(path: Path, what: str = "run_dir") -> Iterator[None]:
    """Converts an `OSError` about writing to a directory to a `ConfigError`."""
    try:
        yield
    except OSError as error:
        raise _not_writable(path, error, what) from error


def _not_writable(path: Path, error: OSError, what: str = "run_dir") -> ConfigError:
    return ConfigError(
        f"{what} must be a directory that can be written; {path} cannot: "
        f"{error.strerror or error}. "
        "Choose another."
    )
