"""Crash-safe writes: a file is complete or absent, even if the process is killed while writing."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_REPLACED = ".replaced"


def unfinished(path: Path) -> Path:
    """Returns the temporary name of a file or directory."""
    return path.with_name(f".{path.name}.unfinished")


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under a temporary name, syncs it to the disk, and renames it.

    Args:
      path: the final name.
      write: is called with the temporary path, and writes the file there.
    """
    temporary = unfinished(path)
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_file` does."""
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes a directory of files under a temporary name, syncs it, and renames it.

    A directory of that name is replaced.
    """
    temporary = unfinished(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, content in files.items():
        (temporary / name).write_bytes(content)
        sync(temporary / name)
    sync(temporary)
    replace_directory(temporary, path)


def replace_directory(temporary: Path, path: Path) -> None:
    """Renames a complete directory to its final name; one that is there already is replaced.

    A directory that is not empty cannot be replaced in one step, so the old one is renamed first.
    If the process is killed between the two renames, `mend` restores the old directory.
    """
    replaced = path.with_name(f".{path.name}{_REPLACED}")
    if path.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(path, replaced)
    os.replace(temporary, path)
    sync(path.parent)
    remove_directory(replaced)


def remove_directory(path: Path) -> None:
    """Removes a directory, which is complete or gone if the process is killed meanwhile."""
    if path.is_dir():
        removed = path.with_name(f".{path.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def mend(folder: Path) -> None:
    """Restores or removes what killed processes left in a folder under temporary names."""
    for path in folder.glob(f".*{_REPLACED}"):
        original = path.with_name(path.name[1 : -len(_REPLACED)])
        if not original.exists():
            os.replace(path, original)
    for pattern in (".*.unfinished", ".*.removed", f".*{_REPLACED}"):
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    # Only POSIX opens directories; elsewhere a rename is as durable as the system makes it.
    if os.name != "posix" and path.is_dir():
        return
    # Windows cannot sync a file that was opened only for reading.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
