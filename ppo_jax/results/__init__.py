"""Plots, pages and pictures of runs, and evaluations in Gymnasium."""

from ppo_jax.lazy import submodules_of

__getattr__ = submodules_of(__name__)
