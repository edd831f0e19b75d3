"""Records that flow from stage to stage, and the state that lives between updates.

Axes: T time, N environments, B minibatch, A action dimension, S population. Time-major.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from ppo_jax.ops.running_stats import RunningStats

Scalars = dict[str, jax.Array]
"""Named scalars of one update, before they become `Metrics`; keys are "train/…"."""

NO_METRICS: dict[str, jax.Array] = {}
"""Metrics of an environment that reports none. Never changed."""


class Shard(NamedTuple):
    """The part of a training that one device computes."""

    num_envs: int
    """Number of environments on this device; `Config.num_envs` counts those of all devices."""
    axis_name: str | None = None
    """Mesh axis of the devices that share the training; None for a single device."""
    chunk_size: int | None = None
    """Samples of a minibatch that are differentiated together; None for all."""


class EpisodeStats(NamedTuple):
    """Sums over the episodes that ended during one rollout."""

    return_sum: jax.Array  # []
    length_sum: jax.Array  # []
    num_episodes: jax.Array  # []
    metric_sums: dict[str, jax.Array] = NO_METRICS  # each []; see `Environment.metrics`


class RolloutState(struct.PyTreeNode):
    """State of the environments between two rollouts."""

    env_state: Any  # [N, ...]
    obs: Any  # [N, ...]
    episode_return: jax.Array  # [N], of the unfinished episodes
    episode_length: jax.Array  # [N]
    discounted_return: jax.Array  # [N], Σ γ^(t−i) r_i of the unfinished episodes
    recurrent_state: Any = None  # [N, ...], of the policy before obs; None without a memory
    episode_metrics: Any = struct.field(default_factory=dict)  # by name, [N], as episode_return

    @property
    def start(self) -> jax.Array:
        """`[N]`: True where `obs` starts an episode; the recurrent state is reset before it."""
        return self.episode_length == 0


class Trajectory(NamedTuple):
    """Everything that one rollout saw and did; every leaf is [T, N, ...]."""

    obs: Any  # [T, N, ...], raw, in the environment's dtypes
    action: jax.Array  # [T, N, ...], as sampled: before a head's `to_env`
    action_params: Any  # [T, N, ...], parameters of the distribution that was sampled from
    reward: jax.Array  # [T, N]
    terminated: jax.Array  # [T, N]
    truncated: jax.Array  # [T, N]
    final_obs: Any  # [T, N, ...], the true successor of obs, before any reset
    metrics: dict[str, jax.Array] = NO_METRICS  # each [T, N], float32; see `Environment.metrics`

    @property
    def done(self) -> jax.Array:
        """`[T, N]`: an episode ended here."""
        return jnp.logical_or(self.terminated, self.truncated)


class Values(NamedTuple):
    """The critic's values of a trajectory, before the update."""

    value: jax.Array  # [T, N], V(s_t)
    next_value: jax.Array  # [T, N], V(s'_t) of the true successor


class Estimates(NamedTuple):
    """Learning targets of the policy and the critic for a trajectory."""

    advantages: jax.Array  # [T, N]
    targets: jax.Array | None  # [T, N]; None without a critic
    mask: jax.Array | None  # [T, N], samples that count; None where all do


class Batch(NamedTuple):
    """The data of one update.

    Comments show the shapes of a minibatch, [B]. The batch of a whole rollout has [T, N] instead.
    With a memory, minibatches consist of whole environments, [T, B].
    """

    obs: Any  # [B, ...], normalised, as the network sees them
    action: jax.Array  # [B, ...]
    action_params: Any  # [B, ...], of the policy that acted
    log_prob: jax.Array  # [B], of the policy that acted
    advantages: jax.Array  # [B]
    value: jax.Array | None  # [B], of the critic before the update; None without a critic
    targets: jax.Array | None  # [B], of the critic; None without a critic
    mask: jax.Array | None  # [B], samples that count; None where all do
    done: jax.Array  # [B], an episode ended here
    start: jax.Array | None = None  # [T, B], obs is an episode's first; None without a memory
    recurrent_state: Any = None  # [B, ...], of the policy before the rollout


class PolicyTerms(NamedTuple):
    """The inputs of an objective, for each sample that the old policy collected."""

    log_prob: jax.Array  # [B], log π_θ(a|s)
    log_ratio: jax.Array  # [B], log π_θ(a|s) − log π_θold(a|s)
    ratio: jax.Array  # [B], π_θ(a|s) / π_θold(a|s)
    advantages: jax.Array  # [B]
    kl: jax.Array | None  # [B], exact KL(π_θold ‖ π_θ); None unless kl_coef or exact_kl is set


# Hyperparameters are typed `Any`: an algorithm may have a `hparams_type` of its own.
Objective = Callable[[PolicyTerms, Any], jax.Array]
"""`(terms, hparams) -> [B]`: the objective of the policy per sample, to be maximised."""


class Statistics(NamedTuple):
    """Statistics that normalise observations and rewards; None where these are not normalised."""

    obs: tuple[RunningStats | None, ...] | None = None
    """One entry for each array of an observation, in the order of `jax.tree.leaves`; None for
    arrays that are not floating-point."""
    reward: RunningStats | None = None
    """Statistics of the discounted return."""


class Learner(struct.PyTreeNode):
    """The parameters, and the state of the rule that updates them."""

    params: Any
    # Opaque to everything but the rule: saving, copying and vmap need no more than a pytree.
    rule_state: Any  # of the algorithm's update rule: the optimiser's state, an adaptive weight, …


class TrainState(struct.PyTreeNode):
    """Everything that the next update needs, so that saving it and resuming is exact."""

    learner: Learner
    rollout: RolloutState
    statistics: Statistics
    env_params: Any
    key: jax.Array
    updates_done: jax.Array  # [], int32


def strongly_typed(tree: Any) -> Any:
    """Returns the same tree with arrays for leaves, none of them weakly typed.

    Python's numbers are weakly typed (gymnax counts time from 0), and an update makes them strong.
    Without this, the next call of a jitted function would compile a second time.
    """
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)
