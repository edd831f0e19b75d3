"""The commands of `ppo-jax`, each a dataclass of its options."""

from ppo_jax.lazy import submodules_of

__getattr__ = submodules_of(__name__)
