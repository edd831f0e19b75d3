"""Seconds from a config to the end of the first update, without imports.

`measure` starts two processes, one after the other, which share a compilation cache: it is empty
for the first and full for the second.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(_ROOT))


def measure(workload: str) -> dict[str, float]:
    """Returns the seconds without and with a compilation cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, __file__, workload]
        outputs = [
            subprocess.run(command, env=environment, check=True, stdout=-1).stdout for _ in range(2)
        ]
    cold, warm = (json.loads(output.splitlines()[-1]) for output in outputs)  # brax prints as well
    return {"first_update_cold_seconds": cold, "first_update_warm_seconds": warm}


def main() -> None:
    import jax

    from benchmarks.workloads import WORKLOADS
    from ppo_jax import envs, make_trainer

    config = WORKLOADS[sys.argv[1]].config
    envs.make(config.env, **dict(config.env_kwargs))  # its suite is imported here
    jax.block_until_ready(jax.random.key(0))  # and the backend is started
    start = time.perf_counter()
    trainer = make_trainer(config)
    state = jax.jit(trainer.init)(jax.random.key(0))
    jax.block_until_ready(jax.jit(trainer.step, donate_argnums=0)(state))
    print(json.dumps(time.perf_counter() - start))


if __name__ == "__main__":
    main()
