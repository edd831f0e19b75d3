"""Settings of the test session: quick compilations, strict ranks, a cache of compiled programs."""

import ctypes
import functools
import gc
import os
import platform
import sys
from pathlib import Path

# Most of a session is spent on compiling. It takes half the time without optimisations, and again
# half of it without the emitters that make fused loops fast. One piece of code instead of pieces
# for several threads takes a tenth less, and a program that was compiled before takes nothing. AVX
# lacks fused multiply-add, with which the same product rounds differently in different programs.
# The variables are set before JAX is imported, and processes that tests start inherit them.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    f"{'--xla_cpu_max_isa=AVX' if platform.machine() in ('x86_64', 'AMD64') else ''}"
).strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects that live long, and the usual thresholds look through them often, which
# takes an eighth of a session. Each module ends with a full collection.
gc.set_threshold(100_000, 50, 100)

optimized_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 3,
        "xla_cpu_use_fusion_emitters": True,
        "xla_cpu_max_isa": "",
    },
)
"""Compiles with all optimisations, as users do: for long runs, and for tests of bit-identity."""
exact_jit = functools.partial(
    jax.jit,
    compiler_options={"xla_cpu_use_fusion_emitters": "max_isa=AVX" not in os.environ["XLA_FLAGS"]},
)
"""Compiles so that a computation rounds the same in every program, alone and inside a loop. On x86
that needs no fused multiply-add; elsewhere, the emitters of fused loops."""


# Modules whose tests share little; those of another module run in one process, which traces its
# programs and makes its fixtures once.
_DIVIDED = {"test_devices", "test_host", "test_platforms", "test_processes", "test_readme"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        module = item.path.stem
        if module not in _DIVIDED and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(module))


@pytest.fixture
def braxs_broadcasting():
    """Brax adds arrays of different ranks, which our own code may not."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _release_compiled_programs():
    """Drops the compiled programs of a module: all of a session would take 4 GB a worker."""
    yield
    if "ppo_jax.runs.kept" in sys.modules:
        sys.modules["ppo_jax.runs.kept"].forget()
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        # The allocator keeps what was released, in small pieces, unless it is told to return it.
        ctypes.CDLL(None).malloc_trim(0)
