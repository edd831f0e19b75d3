"""Exports of runs, written to files."""

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ppo_jax.errors import require_known
from ppo_jax.export.formats import Format
from ppo_jax.export.numpy import to_numpy
from ppo_jax.export.onnx import to_onnx
from ppo_jax.export.stablehlo import to_stablehlo
from ppo_jax.export.web import to_page
from ppo_jax.policy.policy import Policy
from ppo_jax.runs import files
from ppo_jax.runs.directory import EXPORT
from ppo_jax.runs.lock import writable
from ppo_jax.runs.outputs import require_new
from ppo_jax.runs.trained import load

FORMATS: Mapping[Format, Callable[[Policy], Mapping[str, bytes]]] = {
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
      run_seed: seed whose policy is exported, for a run of several seeds; None takes the first.
      best: the best policy while the run trained, instead of the last one.
      network: the module that was `Config.network`, unless that was a name.
      overwrite: replace files of the same names.

    Returns:
      The paths of the files.

    Raises:
      ConfigError: there is no run, the format does not take its policy, or a file exists.
    """
    require_known("format", format, FORMATS)
    folder = Path(run_dir) / EXPORT / format if output is None else Path(output)
    contents = FORMATS[format](load(run_dir, seed=run_seed, best=best, network=network))
    paths = {folder / name: content for name, content in contents.items()}
    # Before any file is written: all of them are new, or none is touched.
    for path in paths:
        require_new(path, overwrite=overwrite)
    with writable(folder, "the folder of the output"):
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in paths.items():
            files.write_file(path, operator.methodcaller("write_bytes", content))
    return list(paths)
