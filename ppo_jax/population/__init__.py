"""Populations: many trainings in one compiled program, as pure functions."""

from ppo_jax.lazy import submodules_of

__getattr__ = submodules_of(__name__)
