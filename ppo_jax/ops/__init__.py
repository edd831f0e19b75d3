"""Mathematics on plain arrays and numbers: nothing here knows a config or an environment."""

from ppo_jax.lazy import submodules_of

__getattr__ = submodules_of(__name__)
