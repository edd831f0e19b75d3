"""Results files of benchmarks, which record the device, the versions and the command."""

import json
import sys
from pathlib import Path
from typing import Any

from ppo_jax.runs import provenance
from ppo_jax.runs.settings import to_plain


def write_results(path: Path, results: list[dict[str, Any]], **figures: float) -> None:
    """Writes results with their command, the machine, and other figures of the machine."""
    # As it was typed: `sys.argv` has an absolute path for a module that `python -m` runs.
    command = " ".join(["python", *sys.orig_argv[1:]])
    described = provenance.describe(Path(__file__).parent)
    record = {"command": command, **described, **figures, "results": results}
    path.write_text(json.dumps(to_plain(record), indent=2) + "\n")
