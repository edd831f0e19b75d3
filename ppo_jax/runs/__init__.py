"""The host's part of trainings and sweeps: disk, screen, clock and Ctrl-C."""

from ppo_jax.lazy import submodules_of

__getattr__ = submodules_of(__name__)
