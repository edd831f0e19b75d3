"""Policies: networks, action distributions, and the policy as a value."""

from ppo_jax.lazy import submodules_of

__getattr__ = submodules_of(__name__)
