"""Settings of the test session: quick compilations, strict ranks, a cache of compiled programs."""

import functools
import os
from pathlib import Path

# Most of the session is spent compiling, and without optimisations that takes half the time. It is
# said before JAX begins, and processes that tests start are told as well.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".lstrip()
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
cache = Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

optimized_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
"""As users compile: for what runs long, and for identities of bits, which rounding would break."""
