"""The records that flow from stage to stage, and the state that lives between updates.

Axes: T time, N environments, B minibatch, A action dimension, S population. Time-major.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.config import HParams
from ppo_jax.running_stats import RunningStats

Metrics = dict[str, jax.Array]
"""Scalars that a person wants to see; keys are "train/…" and "episode/…"."""


class EpisodeStats(NamedTuple):
    """Episodes that ended during one rollout."""

    return_sum: jax.Array  # []
    length_sum: jax.Array  # []
    episodes: jax.Array  # []


class RolloutState(struct.PyTreeNode):
    """Where the environments stand between two rollouts."""

    env_state: Any  # [N, ...]
    obs: Any  # [N, ...]
    episode_return: jax.Array  # [N], of the episodes under way
    episode_length: jax.Array  # [N]
    discounted_return: jax.Array  # [N], Σ γ^(t−i) r_i of the episodes under way
    memory: Any = None  # [N, ...], what the policy carries into obs; None without a memory

    @property
    def start(self) -> jax.Array:
        """`[N]`: obs is the first of its episode, and what the policy carries is forgotten."""
        return self.episode_length == 0


class Trajectory(NamedTuple):
    """What one rollout saw and did; every leaf is [T, N, ...]."""

    obs: Any  # [T, N, ...], raw, in the environment's dtypes
    action: jax.Array  # [T, N, ...], as sampled: before a head's `to_env`
    action_params: Any  # [T, N, ...], parameters of the distribution that was sampled from
    reward: jax.Array  # [T, N]
    terminated: jax.Array  # [T, N]
    truncated: jax.Array  # [T, N]
    final_obs: Any  # [T, N, ...], the true successor of obs, before any reset

    @property
    def done(self) -> jax.Array:
        """`[T, N]`: an episode ended here."""
        return jnp.logical_or(self.terminated, self.truncated)


class Batch(NamedTuple):
    """What an update learns from: per sample [T, N], or [B] within a minibatch.

    With a memory, minibatches are of whole environments, [T, B].
    """

    obs: Any  # [B, ...], as the network sees them
    action: jax.Array  # [B, ...]
    action_params: Any  # [B, ...], of the policy that acted
    log_prob: jax.Array  # [B], of the policy that acted
    advantages: jax.Array  # [B]
    value: jax.Array | None  # [B], of the critic before the update; None without a critic
    targets: jax.Array | None  # [B], what the critic should learn; None without a critic
    mask: jax.Array | None  # [B], samples that count; None where all do
    done: jax.Array  # [B], an episode ended here
    start: jax.Array | None = None  # [T, B], obs is an episode's first; None without a memory
    memory: Any = None  # [B, ...], what the policy carried into the rollout


class Statistics(NamedTuple):
    """What observations and rewards are normalised by; None where they are not."""

    obs: tuple[RunningStats | None, ...] | None = None
    """Of each array of an observation, in the order of its leaves; None for those not floating."""
    reward: RunningStats | None = None
    """Of the discounted return."""


class Learner(struct.PyTreeNode):
    """What an update changes."""

    params: Any
    opt_state: Any
    kl_coef: jax.Array  # [], β where it is adapted
    lr_factor: jax.Array  # [], of the learning rate where it is adapted


class TrainState(struct.PyTreeNode):
    """Everything the next update needs, so that saving it and resuming is exact."""

    learner: Learner
    rollout: RolloutState
    statistics: Statistics
    env_params: Any
    key: jax.Array
    update: jax.Array  # [], updates done


def strongly_typed(tree: Any) -> Any:
    """The same tree with arrays for leaves, none of them weakly typed.

    Python's numbers (gymnax counts time from 0) are weakly typed; an update makes them strong,
    and the next call of a jitted function would compile a second time.
    """
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def _flatten(hparams: HParams) -> tuple[list[tuple[jax.tree_util.GetAttrKey, Any]], None]:
    names = (field.name for field in dataclasses.fields(HParams))
    return [(jax.tree_util.GetAttrKey(name), getattr(hparams, name)) for name in names], None


def _unflatten(_: None, values: Any) -> HParams:
    # Past __post_init__: a tree's leaves may be axes, gradients or tracers, not settings.
    hparams = object.__new__(HParams)
    for field, value in zip(dataclasses.fields(HParams), values, strict=True):
        object.__setattr__(hparams, field.name, value)
    return hparams


jax.tree_util.register_pytree_with_keys(HParams, _flatten, _unflatten)
