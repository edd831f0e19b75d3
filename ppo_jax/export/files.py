"""Exports of runs, written to files."""

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ppo_jax.errors import ConfigError, require_known
from ppo_jax.export.numpy import to_numpy
from ppo_jax.export.onnx import to_onnx
from ppo_jax.export.stablehlo import to_stablehlo
from ppo_jax.export.web import to_page
from ppo_jax.policy.policy import Policy
from ppo_jax.runs import files
from ppo_jax.runs.lock import writable
from ppo_jax.runs.trained import load

Format = Literal["stablehlo", "onnx", "numpy", "web"]

FORMATS: Mapping[str, Callable[[Policy], Mapping[str, bytes]]] = {
    "stablehlo": lambda policy: {"policy.stablehlo": to_stablehlo(policy)},
    "onnx": lambda policy: {"policy.onnx": to_onnx(policy)},
    "numpy": to_numpy,
    "web": lambda policy: {"index.html": to_page(policy)},
}
"""Functions that return the files of a format, by name."""


def export_run(
    run_dir: str | Path,
    format: Format,  # noqa: A002, the option's name
    output: str | Path | None = None,
    *,
    run_seed: int | None = None,
    best: bool = False,
    network: Any = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes the policy of a run to a folder, in a format that needs no ppo_jax.

    Args:
      run_dir: directory that `train` wrote.
      format: a key of `FORMATS`.
      output: folder of the files; by default `RUN/export/FORMAT`.
      run_seed: of a run of several seeds; None is the first.
      best: the best policy while the run trained, instead of the last one.
      network: the module that was `Config.network`, unless that was the name of one of ours.
      overwrite: replace files of the same names.

    Returns:
      The paths of the files.

    Raises:
      ConfigError: there is no run, the format does not take its policy, or a file exists.
    """
    require_known("format", format, FORMATS)
    folder = Path(run_dir) / "export" / format if output is None else Path(output)
    contents = FORMATS[format](load(run_dir, seed=run_seed, best=best, network=network))
    paths = {folder / name: content for name, content in contents.items()}
    # Before any file is written: all of them are new, or none is touched.
    for path in paths:
        if path.exists() and not overwrite:
            raise ConfigError(
                f"the output must be new; {path} exists. Choose another folder, or pass overwrite "
                "(--overwrite) to replace it."
            )
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in paths.items():
            files.write_file(path, operator.methodcaller("write_bytes", content))
    return list(paths)
