"""The protocol between `benchmarks/peers.py` and a contender in its own process.

A contender's script calls `serve(build)`. It then reads one JSON object a line: first a workload,
which it compiles, then `{"seed": n}` for each run; it answers each with one line. Standard library
only, because it runs in environments without ppo_jax.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

Run = Callable[[int], dict[str, float | None]]
"""`seed -> {"seconds": of training alone, "return": or None if no episode ended}`, and "peak_bytes"
if other work followed the training."""


def serve(build: Callable[[dict[str, Any]], tuple[dict[str, float], Run]]) -> None:
    """Answers until the input ends; `build(workload) -> (figures of compiling, run)`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that output of packages is not taken for an answer
    workload = json.loads(sys.stdin.readline())
    figures, run = build(workload)
    print(json.dumps(figures), file=answers, flush=True)
    for line in sys.stdin:
        result = run(json.loads(line)["seed"])
        result.setdefault("peak_bytes", peak_bytes())
        print(json.dumps(result), file=answers, flush=True)


def peak_bytes() -> int:
    """Returns the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
