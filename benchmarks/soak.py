"""Soak test: in a long run, memory and open files must not grow, nor training slow down.

python benchmarks/soak.py --minutes 30

Trains CartPole with a checkpoint every second and a row of metrics for every update, and samples
the process meanwhile. The first tenth of the time is left out: caches fill, and pieces grow. A
fixed computation is timed with each sample, because the speed of a shared machine drifts.
"""

import argparse
import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import ppo_jax
from benchmarks import machine

_RESULTS = Path(__file__).parent / "results" / "soak-cpu.json"
_SAMPLE_EVERY = 5.0  # seconds
# Growth per hour, as a share, that cannot be distinguished from the noise of a half-hour run.
_ALLOWED = {"host_mib": 0.05, "device_mib": 0.02, "open_files": 0.05}
_LARGEST_SLOWDOWN = 0.1


def sample() -> dict[str, float]:
    """Returns memory and open files of this process, and the time of a fixed computation."""
    started = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000)  # releases the GIL
    reference = time.perf_counter() - started
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "time": time.monotonic(),
        "host_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "device_mib": sum(x.nbytes for x in jax.live_arrays()) / 2**20,
        "open_files": len(list(Path("/proc/self/fd").iterdir())),
        "reference_seconds": reference,
    }


def watch(samples: list[dict[str, float]], seconds: float, folder: Path) -> None:
    """Samples until the time is over, and then stops the training by a signal."""
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.1)
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        samples.append(sample())
        time.sleep(_SAMPLE_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


def growth(times: np.ndarray, values: np.ndarray) -> float:
    """Returns the growth an hour, as a share of the mean, by a line through all samples."""
    slope = np.polyfit(times - times[0], values, 1)[0]
    return float(slope * 3600 / values.mean())


def early_and_late(values: np.ndarray) -> dict[str, float]:
    """Returns the medians of the first and of the last quarter, and their ratio."""
    quarter = max(1, len(values) // 4)
    early, late = float(np.median(values[:quarter])), float(np.median(values[-quarter:]))
    return {"early": early, "late": late, "ratio": late / early}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    config, hparams = ppo_jax.preset("CartPole-v1", total_timesteps=2_000_000_000)
    samples: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        watcher = threading.Thread(target=watch, args=(samples, arguments.minutes * 60, path))
        watcher.start()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a file that could not be written
            run = ppo_jax.train(
                config, hparams, run_dir=path, checkpoint_every=1.0, log_every=1, progress=False
            )
        watcher.join()
        checkpoints = len(list((path / "checkpoints").iterdir()))
    samples = samples[len(samples) // 10 :]
    times = np.array([row["time"] for row in samples])
    result: dict[str, Any] = {
        "minutes": arguments.minutes,
        "updates": run.timesteps // config.batch_size,
        "rows": len(run.metrics),
        "checkpoints_kept": checkpoints,
    }
    failed = []
    for name, allowed in _ALLOWED.items():
        values = np.array([row[name] for row in samples])
        share = growth(times, values)
        result[name] = {"mean": values.mean(), "maximum": values.max(), "growth_an_hour": share}
        if share > allowed:
            failed.append(name)
    rates = run.metrics["time/steps_per_second"].to_numpy()
    speed = early_and_late(rates[len(rates) // 10 :])
    reference = early_and_late(np.array([row["reference_seconds"] for row in samples]))
    # Steps in the time of the fixed computation.
    drift = speed["ratio"] * reference["ratio"]
    result |= {"steps_per_second": speed, "reference_seconds": reference, "relative_speed": drift}
    if drift < 1 - _LARGEST_SLOWDOWN:
        failed.append("relative_speed")
    machine.write_results(_RESULTS, [result])
    for name, value in result.items():
        print(f"{name}: {value}")
    if failed:
        sys.exit(f"not flat: {', '.join(failed)}")


if __name__ == "__main__":
    main()
