"""The head of a results file: device, versions and command."""

import json
import sys
from pathlib import Path
from typing import Any

from ppo_jax.runs import provenance
from ppo_jax.runs.settings import to_plain


def write_results(path: Path, results: list[dict[str, Any]], **figures: float) -> None:
    """Writes results with their command, the machine, and other figures of the machine."""
    root = Path(__file__).resolve().parent.parent
    # A module that `python -m` runs has an absolute path there.
    script = Path(sys.argv[0]).resolve().relative_to(root)
    command = " ".join(["python", str(script), *sys.argv[1:]])
    described = provenance.describe(Path(__file__).parent)
    record = {"command": command, **described, **figures, "results": results}
    path.write_text(json.dumps(to_plain(record), indent=2) + "\n")
