"""Settings of the test session: strict ranks, and a cache of compiled programs."""

import functools
from pathlib import Path

import jax

# For a process of its own whose time is spent compiling; rounding may differ.
FAST_COMPILE = "--xla_backend_optimization_level=0"

jax.config.update("jax_numpy_rank_promotion", "raise")
cache = Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""For what runs a few steps only: it compiles in half the time."""
