"""Trained policies in files that need no ppo_jax: StableHLO, ONNX, NumPy and a web page."""

from ppo_jax.lazy import submodules_of

__getattr__ = submodules_of(__name__)
