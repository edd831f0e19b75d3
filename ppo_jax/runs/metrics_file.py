"""`metrics.jsonl`: rows that are appended between pieces, and cut back when a run continues."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ppo_jax.runs import files
from ppo_jax.runs.settings import to_plain


class MetricsFile:
    """A file of one JSON object a line. A row that cannot be written is kept for the next time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: list[str] = []
        self._is_behind = False

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows.

        Raises:
          OSError: the rows could not be written. They are written with the next ones.
        """
        self._unwritten += [json.dumps(to_plain(row)) + "\n" for row in rows]
        if not self._unwritten:
            return
        # Opened for each piece, so that a killed process loses no rows that were written. Without
        # a buffer: after a failed write, closing the file would write the rest of the buffer.
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            content = memoryview("".join(self._unwritten).encode())
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                self._is_behind = True
                # A full disk may have taken half a row.
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)
                raise
        self._unwritten, self._is_behind = [], False

    def sync(self) -> None:
        """Waits until the rows are on the disk.

        Raises:
          OSError: there are rows that could not be written.
        """
        if self._is_behind:
            raise OSError(errno.EIO, f"rows of {self._path.name} are not written yet")
        # A checkpoint may come before the first row.
        if self._path.exists():
            files.sync(self._path)

    def read(self) -> list[dict[str, Any]]:
        """Returns all rows, including those that could not be written."""
        content = self._read() if self._path.exists() else ""
        rows = [row for _, row in _rows(content + "".join(self._unwritten))]
        return [{name: _number(value) for name, value in row.items()} for row in rows]

    def cut_back(self, updates: int) -> None:
        """Removes the rows after a number of updates, and lines that are not valid rows."""
        if not self._path.exists():
            return
        content = self._read()
        kept = "".join(line for line, row in _rows(content) if row["update"] <= updates)
        # Untouched unless something is removed.
        if len(kept) < len(content):
            files.write_text(self._path, kept)

    def _read(self) -> str:
        # A damaged byte costs its row alone.
        return self._path.read_text(encoding="utf-8", errors="replace")


def _rows(content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each line with its row; a killed process may have written a part of the last one."""
    for line in content.splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if line.endswith("\n") and isinstance(row, dict) and "update" in row:
                yield line, row


def _number(value: Any) -> Any:
    """Returns the number that `to_plain` wrote."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, str) else value
