"""The algorithms, from the policy gradient to PPO and beyond: each is a row of one table."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.config import ALGORITHM_SETTINGS, Config
from ppo_jax.defaults import ALGORITHM_DEFAULTS
from ppo_jax.errors import ConfigError, require_known
from ppo_jax.hparams import HParams
from ppo_jax.ops import advantages, objectives
from ppo_jax.ops.importance import effective_sample_size, trajectory_log_weights
from ppo_jax.registry import Registry
from ppo_jax.stages.algorithm import Algorithm
from ppo_jax.stages.update_rules import (
    adaptive_penalty,
    gradient_rule,
    minibatch_rule,
    trust_region_rule,
)
from ppo_jax.types import Batch, Estimates, PolicyTerms, Scalars, Trajectory, Values


def _whole_return(
    config: Config, trajectory: Trajectory, values: Values | None, hparams: HParams
) -> Estimates:
    mask = advantages.first_episode(trajectory.done)
    returns = advantages.trajectory_return(trajectory.reward, mask, gamma=hparams.gamma)
    return Estimates(returns, None, mask)


def _reward_to_go(
    config: Config, trajectory: Trajectory, values: Values | None, hparams: HParams
) -> Estimates:
    mask = advantages.first_episode(trajectory.done)
    returns = advantages.reward_to_go(trajectory.reward, mask, gamma=hparams.gamma)
    return Estimates(returns, None, mask)


def _return_minus_baseline(
    config: Config, trajectory: Trajectory, values: Values | None, hparams: HParams
) -> Estimates:
    """Estimates γ^t (G_t − b(s_t)); G_t is bootstrapped where a time limit cut the episode."""
    assert values is not None
    mask = advantages.first_episode(trajectory.done)
    # λ = 1 is the return minus the value, with the bootstrap at time limits that a plain return
    # lacks.
    centred = _gae(trajectory, values, gamma=hparams.gamma, gae_lambda=1.0)
    steps = jnp.arange(trajectory.reward.shape[0])[:, None]
    # With the factor γ^t this estimates the gradient of E[Σ γ^t r_t], the return from the start.
    discounted = jnp.power(hparams.gamma, steps) * centred
    return Estimates(discounted, centred + values.value, mask)


def _advantage(
    config: Config, trajectory: Trajectory, values: Values | None, hparams: HParams
) -> Estimates:
    """Computes GAE or n-step advantages, and targets from these advantages or the TD error."""
    assert values is not None
    if config.n_step is not None:
        estimates = advantages.n_step(
            trajectory.reward,
            values.value,
            values.next_value,
            trajectory.terminated,
            trajectory.truncated,
            gamma=hparams.gamma,
            steps=config.n_step,
        )
    else:
        estimates = _gae(trajectory, values, gamma=hparams.gamma, gae_lambda=hparams.gae_lambda)
    # With "gae", targets are λ-returns, or n-step returns if n_step is set; with "td", r + γ V(s').
    error = estimates
    if config.value_target == "td":
        error = advantages.td_error(
            trajectory.reward,
            values.value,
            values.next_value,
            trajectory.terminated,
            gamma=hparams.gamma,
        )
    return Estimates(estimates, error + values.value, None)


def _gae(trajectory: Trajectory, values: Values, *, gamma: Any, gae_lambda: Any) -> jax.Array:
    return advantages.gae(
        trajectory.reward,
        values.value,
        values.next_value,
        trajectory.terminated,
        trajectory.truncated,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )


def _policy_gradient(terms: PolicyTerms, hparams: HParams) -> jax.Array:
    return objectives.policy_gradient(terms.log_prob, terms.advantages)


def _surrogate(terms: PolicyTerms, hparams: HParams) -> jax.Array:
    return objectives.surrogate(terms.ratio, terms.advantages)


def _kl_penalized(terms: PolicyTerms, hparams: HParams) -> jax.Array:
    assert terms.kl is not None
    return objectives.kl_penalized(terms.ratio, terms.advantages, terms.kl, kl_coef=hparams.kl_coef)


def _clipped_surrogate(terms: PolicyTerms, hparams: HParams) -> jax.Array:
    return objectives.clipped_surrogate(
        terms.ratio, terms.advantages, clip_eps=hparams.clip_eps, dual_clip=hparams.dual_clip
    )


def _simple_policy(terms: PolicyTerms, hparams: HParams) -> jax.Array:
    return objectives.simple_policy(terms.ratio, terms.advantages, clip_eps=hparams.clip_eps)


def _discovered_policy(terms: PolicyTerms, hparams: HParams) -> jax.Array:
    return objectives.discovered_policy(
        terms.log_ratio, terms.advantages, alpha=hparams.dpo_alpha, beta=hparams.dpo_beta
    )


def _importance_weights(log_ratio: jax.Array, batch: Batch) -> Scalars:
    """Returns the relative effective sample size and the variance of importance weights.

    Both are reported for single steps and for pieces of trajectories, whose weights are products of
    the weights of their steps.
    """
    log_weights, is_last = trajectory_log_weights(log_ratio, batch.done)
    weights = jnp.exp(log_weights)
    return {
        "train/effective_sample_size": effective_sample_size(log_ratio) / log_ratio.size,
        "train/weight_variance": jnp.var(jnp.exp(log_ratio)),
        "train/trajectory_effective_sample_size": effective_sample_size(log_weights, is_last)
        / jnp.sum(is_last),
        "train/trajectory_weight_variance": objectives.masked_variance(weights, is_last),
    }


_PPO = "Schulman et al. 2017, arXiv:1707.06347"
_WILLIAMS = "Williams 1992, Machine Learning 8"

_OURS: dict[str, Algorithm] = {
    "reinforce": Algorithm(
        title="Policy gradient with the whole trajectory's return",
        source=f"{_WILLIAMS}, section 5",
        **ALGORITHM_DEFAULTS["reinforce"]._asdict(),
        estimate=_whole_return,
        objective=_policy_gradient,
        update_rule=gradient_rule,
        whole_episodes=True,
    ),
    "reinforce_to_go": Algorithm(
        title="Policy gradient with the reward to go",
        source="Sutton et al. 2000, NIPS 12, theorem 1",
        **ALGORITHM_DEFAULTS["reinforce_to_go"]._asdict(),
        estimate=_reward_to_go,
        objective=_policy_gradient,
        update_rule=gradient_rule,
        whole_episodes=True,
    ),
    "reinforce_baseline": Algorithm(
        title="Policy gradient with the return minus a learned baseline",
        source=f"{_WILLIAMS}, section 4",
        **ALGORITHM_DEFAULTS["reinforce_baseline"]._asdict(),
        estimate=_return_minus_baseline,
        objective=_policy_gradient,
        update_rule=gradient_rule,
        whole_episodes=True,
    ),
    "actor_critic": Algorithm(
        title="Advantage actor-critic (A2C): TD error, n-step or GAE; one pass over the data",
        source="Mnih et al. 2016, arXiv:1602.01783, section 4, synchronous",
        **ALGORITHM_DEFAULTS["actor_critic"]._asdict(),
        estimate=_advantage,
        objective=_policy_gradient,
        update_rule=minibatch_rule,
    ),
    "off_policy_pg": Algorithm(
        title="Importance-sampled policy gradient: several epochs, unclipped",
        source="Schulman et al. 2015, arXiv:1502.05477, equation 14 without its constraint",
        **ALGORITHM_DEFAULTS["off_policy_pg"]._asdict(),
        estimate=_advantage,
        objective=_surrogate,
        update_rule=minibatch_rule,
        report=_importance_weights,
    ),
    "trpo": Algorithm(
        title="Trust region policy optimisation",
        source="Schulman et al. 2015, arXiv:1502.05477, section 6 and appendix C",
        **ALGORITHM_DEFAULTS["trpo"]._asdict(),
        estimate=_advantage,
        objective=_surrogate,
        update_rule=trust_region_rule,
    ),
    "ppo_penalty": Algorithm(
        title="Proximal policy optimisation with a fixed KL penalty",
        source=f"{_PPO}, section 4",
        **ALGORITHM_DEFAULTS["ppo_penalty"]._asdict(),
        estimate=_advantage,
        objective=_kl_penalized,
        update_rule=minibatch_rule,
    ),
    "ppo_adaptive": Algorithm(
        title="Proximal policy optimisation with an adaptive KL penalty",
        source=f"{_PPO}, section 4",
        **ALGORITHM_DEFAULTS["ppo_adaptive"]._asdict(),
        estimate=_advantage,
        objective=_kl_penalized,
        update_rule=adaptive_penalty(minibatch_rule),
    ),
    "ppo": Algorithm(
        title="Proximal policy optimisation with the clipped surrogate",
        source=f"{_PPO}, section 3",
        **ALGORITHM_DEFAULTS["ppo"]._asdict(),
        estimate=_advantage,
        objective=_clipped_surrogate,
        update_rule=minibatch_rule,
    ),
    "spo": Algorithm(
        title="Simple policy optimisation: a squared penalty on the ratio",
        source="Xie et al. 2025, arXiv:2401.16025",
        **ALGORITHM_DEFAULTS["spo"]._asdict(),
        estimate=_advantage,
        objective=_simple_policy,
        update_rule=minibatch_rule,
    ),
    "dpo": Algorithm(
        title="Discovered policy optimisation: a learned drift, in closed form",
        source="Lu et al. 2022, arXiv:2210.05639, section 5",
        **ALGORITHM_DEFAULTS["dpo"]._asdict(),
        estimate=_advantage,
        objective=_discovered_policy,
        update_rule=minibatch_rule,
    ),
}
ALGORITHMS = Registry("algorithm", _OURS)
"""Algorithms by name, in the order in which docs/algorithms.md explains them."""


def get_algorithm(name: str) -> Algorithm:
    """Returns the algorithm of that name; an unknown name is a `ConfigError`."""
    require_known("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def register_algorithm(name: str, algorithm: Algorithm, *, overwrite: bool = False) -> None:
    """Makes an algorithm available as `Config(algorithm=name)`.

    Args:
      name: a name that is not taken.
      algorithm: often a changed copy of a row: `ALGORITHMS["ppo"]._replace(objective=mine)`.
      overwrite: replace an algorithm that was registered under this name.

    Raises:
      ConfigError: the name is taken, or the row names settings or hyperparameters that do not
        exist.
    """
    for setting in algorithm.settings:
        require_known("algorithm setting", setting, ALGORITHM_SETTINGS)
    _check_hparams(algorithm)
    ALGORITHMS.register(name, algorithm, overwrite=overwrite)


def _check_hparams(algorithm: Algorithm) -> None:
    """Checks the hyperparameters that an algorithm lists against its `hparams_type`."""
    kind = algorithm.hparams_type
    if not issubclass(kind, HParams):
        raise ConfigError(f"hparams_type must be HParams or a subclass; got {kind!r}.")
    for field in dataclasses.fields(kind):
        if "range" not in field.metadata:
            raise ConfigError(
                f"every field of hparams_type must be made by ppo_jax.hyperparameter(low, high); "
                f"{field.name} of {kind.__name__} is not. Its default belongs in hparams."
            )
    unknown = [hparam for hparam in algorithm.hparams if hparam not in kind.names()]
    if unknown:
        raise ConfigError(
            f"every name in hparams must be a field of hparams_type; {kind.__name__} has no "
            f"{', '.join(unknown)}. Give hparams_type a subclass of HParams that has it, with the "
            "decorator @dataclasses.dataclass(frozen=True)."
        )
    missing = set(kind.names()) - set(HParams.names()) - set(algorithm.hparams)
    if missing:
        raise ConfigError(
            f"every hyperparameter that hparams_type adds needs a default in hparams; "
            f"{', '.join(sorted(missing))} has none."
        )
    kind(**algorithm.hparams)  # defaults are within their ranges, or an error


def hparam_names() -> frozenset[str]:
    """Returns the names of the hyperparameters of all algorithms."""
    return frozenset(name for row in ALGORITHMS.values() for name in row.hparams_type.names())
