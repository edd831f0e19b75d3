"""Memory that a compiled program takes, by the compiler's own count, and that a device has."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from ppo_jax.errors import ConfigError

_SHARE = 0.8  # of a device's memory; the runtime needs the rest


def num_bytes(compiled: Any) -> int:
    """Returns the bytes that a program takes on a device; 0 if the compiler reports none."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    sizes = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return sizes - memory.alias_size_in_bytes  # a donated argument and its output are one buffer


def limit(device: jax.Device) -> float | None:
    """Returns the bytes that a program may take; None where they are unknown."""
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return _SHARE * stats["bytes_limit"]
    if device.platform == "cpu" and "SC_PHYS_PAGES" in getattr(
        os, "sysconf_names", {}
    ):  # POSIX only
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return _SHARE * total / jax.local_device_count()
    return None


def is_exhausted(error: Exception) -> bool:
    """Returns whether a runtime error says that a device has no memory left."""
    return "RESOURCE_EXHAUSTED" in str(error)


@contextlib.contextmanager
def exhaustion_explained(num_bytes: int, num_envs: int) -> Iterator[None]:
    """Converts the runtime's out-of-memory error to a `ConfigError` with a remedy.

    The compiler's count is an estimate, and other programs may use the device as well.

    Args:
      num_bytes: of the training, by the compiler's count.
      num_envs: of the training.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        raise ConfigError(
            "a training must fit the free memory of its device, which ran out; it takes "
            f"{num_bytes / 2**20:,.0f} MiB with {num_envs} environments. Half as many, "
            f"{max(1, num_envs // 2)}, take about half of it: lower num_envs or num_steps, or end "
            "other programs on the device."
        ) from error
