"""The protocol between `benchmarks/peers.py` and a contender in its own process.

A contender's script calls `serve(build)`. It then reads one JSON object a line: first a workload,
which it compiles, then `{"seed": n}` for each run; it answers each with one line. Standard library
only, for it runs in environments that hold nothing of ours.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

Run = Callable[[int], dict[str, float | None]]
"""`seed -> {"seconds": of training alone, "return": reached, or None if no episode ended}`, and
"peak_bytes" if something else than the training came after it."""


def serve(build: Callable[[dict[str, Any]], tuple[dict[str, float], Run]]) -> None:
    """Answers until the input ends; `build(workload) -> (figures of compiling, run)`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no answer
    workload = json.loads(sys.stdin.readline())
    figures, run = build(workload)
    print(json.dumps(figures), file=answers, flush=True)
    for line in sys.stdin:
        result = run(json.loads(line)["seed"])
        result.setdefault("peak_bytes", peak_bytes())
        print(json.dumps(result), file=answers, flush=True)


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
