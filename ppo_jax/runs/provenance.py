"""A record of what a run was made with: versions, device, commit and time."""

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("ppo-jax", "jax", "jaxlib", "flax", "optax", "gymnax", "distrax")


def describe(folder: Path | None = None) -> dict[str, Any]:
    """Returns device, versions, commit and time.

    Args:
      folder: inside of the git repository whose commit is recorded; None is the current directory.
    """
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind if device.platform != "cpu" else _cpu(),
        "platform": device.platform,
        "device_count": jax.device_count(),
        "x64": jax.config.values["jax_enable_x64"],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(folder or Path.cwd()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


@functools.cache  # later commits do not change the code that this process runs
def _commit(folder: Path) -> str | None:
    """Returns the commit of a folder, or None outside of a repository or without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
