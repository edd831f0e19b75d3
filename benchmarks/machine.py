"""The head of a results file: device, versions and command."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("ppo-jax", "jax", "jaxlib", "flax", "optax", "gymnax", "distrax")


def describe() -> dict[str, Any]:
    """Returns device, versions, commit and time."""
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind if device.platform != "cpu" else _cpu(),
        "platform": device.platform,
        "device_count": jax.device_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def write_results(path: Path, results: list[dict[str, Any]], **figures: float) -> None:
    """Writes results with their command, the machine, and other figures of the machine."""
    command = " ".join(["python", *sys.argv])
    record = {"command": command, **describe(), **figures, "results": results}
    path.write_text(json.dumps(record, indent=2) + "\n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
