"""Checks of output paths: a command replaces an existing file only if the user asks for it."""

from collections.abc import Sequence
from pathlib import Path

from ppo_jax.errors import ConfigError


def require_output(path: Path, kinds: Sequence[str], *, overwrite: bool) -> Path:
    """Returns a path to which an output may be written.

    Args:
      path: path that the user chose.
      kinds: suffixes that the output can have, without a dot.
      overwrite: replace a file that exists.

    Raises:
      ConfigError: the suffix is another, the folder does not exist, or the file exists.
    """
    if kind_of(path) not in kinds:
        suffixes = " or ".join(f".{kind}" for kind in kinds)
        raise ConfigError(f"the output must end in {suffixes}; got {path}. Rename it.")
    if not path.parent.is_dir():
        raise ConfigError(
            f"the output must be in a folder that exists; {path.parent} does not. Make it."
        )
    return require_new(path, overwrite=overwrite)


def require_new(path: Path, *, overwrite: bool) -> Path:
    """Returns a path at which there is no file, or whose file may be replaced.

    Raises:
      ConfigError: the file exists.
    """
    if path.exists() and not overwrite:
        raise ConfigError(
            f"the output must be new; {path} exists. Choose another, or pass overwrite "
            "(--overwrite) to replace it."
        )
    return path


def kind_of(path: Path) -> str:
    """Returns the suffix of a path in lower case, without the dot."""
    return path.suffix.removeprefix(".").lower()
