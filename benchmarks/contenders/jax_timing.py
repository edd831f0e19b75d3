"""Compiling and timing for contenders that are one jitted function of a key."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from serving import Run, peak_bytes


def compile_and_time(
    train: Callable[[jax.Array], Any],
    returns_of: Callable[[Any], Any],
    num_seeds: int | None,
) -> tuple[dict[str, float], Run]:
    """Compiles a training and returns its figures and a function that runs it, for `serve`.

    Args:
      train: `key -> result`; vmapped over keys if `num_seeds` is given.
      returns_of: `result -> returns`, of any shape; their mean counts, NaN left out.
      num_seeds: seeds that train under `vmap`, divided among all devices; None for a single one.
    """

    def key_of(seed: int) -> jax.Array:
        key = jax.random.PRNGKey(seed)
        return key if num_seeds is None else jax.random.split(key, num_seeds)

    if num_seeds is None:
        function = jax.jit(train)
    else:
        mesh = Mesh(np.array(jax.devices()), ("seed",))
        by_seed = NamedSharding(mesh, PartitionSpec("seed"))
        function = jax.jit(jax.vmap(train), in_shardings=by_seed, out_shardings=by_seed)
    start = time.perf_counter()
    compiled = function.lower(key_of(0)).compile()
    figures = {"compile_seconds": time.perf_counter() - start}
    memory = compiled.memory_analysis()
    size = memory.temp_size_in_bytes + memory.output_size_in_bytes
    figures["program_bytes"] = size * jax.device_count()  # the analysis covers one device

    def run(seed: int) -> dict[str, float | None]:
        key = jax.block_until_ready(key_of(seed))
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(key))
        seconds = time.perf_counter() - start
        peak = peak_bytes()  # of the training: not all contenders evaluate a policy after it
        returns = np.asarray(returns_of(result))
        ended = returns[np.isfinite(returns)]
        return {
            "seconds": seconds,
            "return": float(ended.mean()) if ended.size else None,
            "peak_bytes": peak,
        }

    return figures, run
