"""The stages of one update, in the order in which data passes through them.

`rollout` acts, `collect` turns the rollout into a batch, `losses` and `update_rules` learn from the
batch, and `metrics` reports. Each stage is a pure function of its arguments.
"""

from ppo_jax.lazy import submodules_of

__getattr__ = submodules_of(__name__)
