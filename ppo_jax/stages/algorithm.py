"""The record that tells one algorithm from another, and the types of its parts."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ppo_jax.config import Config
from ppo_jax.hparams import HParams
from ppo_jax.stages.losses import Losses
from ppo_jax.stages.optimizers import Optimizer
from ppo_jax.types import Batch, Estimates, Objective, Scalars, Trajectory, Values

# Hyperparameters are typed `Any` here: an algorithm may have a `hparams_type` of its own.
Estimator = Callable[[Config, Trajectory, Values | None, Any], Estimates]
"""`(config, trajectory, values, hparams) -> estimates`; values are None without a critic."""

Report = Callable[[jax.Array, Batch], Scalars]
"""`(log_ratio [T, N] after the update, batch) -> metrics`, scalars named "train/…"."""


class UpdateInputs(NamedTuple):
    """The inputs of an update, besides the parameters and the state of its rule."""

    batch: Batch  # [T, N]
    key: jax.Array
    hparams: Any
    """Complete hyperparameters, of the algorithm's `hparams_type`."""
    anneal: jax.Array
    """Factor of every learning rate, by the schedule."""


class UpdateRule(NamedTuple):
    """A rule by which parameters change after a rollout, with state of its own."""

    init: Callable[[Any, Any], Any]
    """`(params, hparams) -> rule_state`."""
    update: Callable[[Any, Any, UpdateInputs], tuple[Any, Any, Scalars]]
    """`(params, rule_state, inputs) -> (params, rule_state, metrics)`."""
    fits_critic_separately: bool = False
    """Actor and critic are updated one after the other, so they cannot share a torso."""


MakeUpdateRule = Callable[[Config, Losses, Optimizer], UpdateRule]
"""`(config, losses, optimizer) -> rule`; the config is complete."""


class Algorithm(NamedTuple):
    """Everything that tells one algorithm from another. `register_algorithm` gives it a name."""

    title: str
    source: str
    """The paper and its section."""
    settings: Mapping[str, Any]
    """The algorithm settings of `Config` that it uses, with their defaults."""
    hparams: Mapping[str, float | None]
    """The hyperparameters that it uses, with their defaults."""
    estimate: Estimator
    """Estimates advantages and the critic's targets from a trajectory."""
    objective: Objective
    """The objective of the policy."""
    update_rule: MakeUpdateRule
    """Makes the rule by which parameters change: one of `stages.update_rules`, or a new one."""
    has_critic: bool = True
    whole_episodes: bool = False
    """Every rollout starts from a reset, and only the first episode of each environment counts."""
    report: Report | None = None
    """Metrics that are computed after each update, besides those of the losses."""
    hparams_type: type[HParams] = HParams
    """A subclass of `HParams` where the algorithm brings hyperparameters of its own."""
