"""Files that commands make of runs. None replaces a file unless it is asked to."""

from collections.abc import Sequence
from pathlib import Path

from ppo_jax.errors import ConfigError


def require_output(path: Path, kinds: Sequence[str], *, overwrite: bool) -> Path:
    """Returns a path to which an output may be written.

    Args:
      path: as it was asked for.
      kinds: the suffixes that the output can have, without a dot; an empty one is a folder.
      overwrite: replace what is there.

    Raises:
      ConfigError: another suffix, no such folder, or something is there already.
    """
    if path.suffix.removeprefix(".").lower() not in kinds:
        suffixes = " or ".join(f".{kind}" for kind in kinds if kind)
        raise ConfigError(f"the output must end in {suffixes}; got {path}. Rename it.")
    if not path.parent.is_dir():
        raise ConfigError(
            f"the output must be in a folder that exists; {path.parent} does not. Make it."
        )
    if path.exists() and not overwrite:
        raise ConfigError(
            f"the output must be new; {path} exists. Choose another, or pass overwrite "
            "(--overwrite) to replace it."
        )
    return path
