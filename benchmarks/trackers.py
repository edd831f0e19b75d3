"""CPU time of the trackers that a training logs to.

python benchmarks/trackers.py

Each tracker gets 1,000 rows of 16 metrics, as many as a training logs in all, in a process of its
own. CPU seconds of that process are counted, because trackers run in threads: on an accelerator the
training does not wait for them, and on a CPU they take these seconds from the cores that train.
A difference between trainings with and without a tracker is smaller than the noise of a machine.
The service that Weights & Biases starts is a process of its own, which is not counted.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from ppo_jax.runs.sink import RunInfo
from ppo_jax.runs.sinks import make_sinks
from ppo_jax.runs.trackers import TRACKERS

_RESULTS = Path(__file__).parent / "results" / "trackers-cpu.json"
_CALLS, _ROWS = 20, 50  # a call about once a second, in a training
_SETTLED = 6.0  # seconds after which a tracker has started


def measure(name: str, folder: Path) -> dict[str, float | str]:
    """Returns the CPU seconds of a tracker's start, of all rows, and of its end."""
    info = RunInfo(folder, (0,), {"config": {f"setting_{i}": i for i in range(40)}}, name)
    metrics = {f"train/metric_{i}": 0.5 for i in range(16)}
    sinks = make_sinks((name,), run_dir=folder)
    marks = [time.process_time()]
    with sinks.running(info):
        time.sleep(_SETTLED)
        marks.append(time.process_time())
        for call in range(_CALLS):
            numbers = range(call * _ROWS, (call + 1) * _ROWS)
            sinks.on_rows([{"update": i, "timesteps": i, "seed": 0, **metrics} for i in numbers])
            time.sleep(0.3)
        time.sleep(2.0)
        marks.append(time.process_time())
    marks.append(time.process_time())
    start, rows, finish = (after - before for before, after in itertools.pairwise(marks))
    return {"tracker": name, "start": start, "rows": rows, "finish": finish}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracker", choices=TRACKERS, help="measure one, in this process")
    name = parser.parse_args().tracker
    if name is not None:
        print(json.dumps(measure(name, Path.cwd())))
        return
    results = []
    for name in TRACKERS:
        with tempfile.TemporaryDirectory() as folder:
            # Nothing leaves the machine.
            local = {
                "WANDB_MODE": "offline",
                "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
                "TRACKIO_DIR": f"{folder}/trackio",
            }
            command = [sys.executable, __file__, "--tracker", name]
            output = subprocess.check_output(
                command, cwd=folder, env={**os.environ, **local}, text=True
            )
        results.append(json.loads(output.splitlines()[-1]))
        print(results[-1])
    machine.write_results(_RESULTS, results, rows=_CALLS * _ROWS)


if __name__ == "__main__":
    main()
