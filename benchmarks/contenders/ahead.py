"""Compiles a contender's training for an accelerator that is not there.

python ahead.py SCRIPT reads a workload from standard input, one line of JSON with the keys
`platform`, `topology`, `options` and `text` besides those of `peers.describe`. It writes the
scheduled program to the file `text`, and its memory and the seconds of the compilation as JSON to
standard output.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax_timing
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def main(script: str) -> None:
    """Compiles what the script would compile and run here."""
    request = json.loads(sys.stdin.readline())
    topology = topologies.get_topology_desc(
        platform=request["platform"], topology_name=request["topology"], **request["options"]
    )
    devices = topology.devices[: request["num_devices"]]
    replicated = NamedSharding(Mesh(devices, ("any",)), PartitionSpec())

    def compile_for_device(
        train: Callable[[jax.Array], Any], returns_of: Any, num_seeds: int | None
    ) -> Any:
        del returns_of
        keys = jax.eval_shape(lambda: jax.random.PRNGKey(0))
        if num_seeds is not None:
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.PRNGKey(0), num_seeds))
            train = jax.vmap(train)
        lowered = jax.jit(train, in_shardings=replicated, out_shardings=replicated).lower(keys)
        started = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - started
        Path(request["text"]).write_text(compiled.as_text())
        memory = compiled.memory_analysis()
        print(
            json.dumps(
                {
                    "compile_seconds": seconds,
                    "temporary_bytes": memory.temp_size_in_bytes,
                    "output_bytes": memory.output_size_in_bytes,
                }
            )
        )

    jax_timing.compile_and_time = compile_for_device
    importlib.import_module(script).build({**request, "devices": devices})


if __name__ == "__main__":
    main(sys.argv[1])
