"""Resolution of a `Config` to a record of all that it names, checked before anything is traced."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ppo_jax import envs
from ppo_jax.algorithms import ALGORITHMS, get_algorithm
from ppo_jax.config import ALGORITHM_SETTINGS, LR_SCHEDULES, NETWORKS, Config, require_config
from ppo_jax.defaults import OPTIMIZERS, used_hparams
from ppo_jax.envs import make_env
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.wrappers import WRAPPERS
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.policy.distributions import BOX_HEADS
from ppo_jax.policy.spec import PolicySpec, initial_obs_stats, make_spec
from ppo_jax.stages.algorithm import Algorithm
from ppo_jax.stages.optimizers import SCHEDULES, Optimizer, Schedule, make_optimizer

# An algorithm without epochs or minibatches passes its data once, as a whole.
_VALUES_OF_UNUSED_SETTINGS = {"num_epochs": 1, "num_minibatches": 1}


class Resolved(NamedTuple):
    """Everything that a config means. Made once by `resolve` and passed on."""

    config: Config
    """Complete: every setting of the algorithm has a value."""
    algorithm: Algorithm
    env: Environment
    """The environment in its wrappers, with the config's parameters."""
    spec: PolicySpec
    """The static part of the policy."""
    schedule: Schedule
    """Anneals the learning rates."""
    optimizer: Optimizer
    hparams: HParams
    """Every hyperparameter that the training uses, at its default."""


def resolve(config: Config) -> Resolved:
    """Looks up and checks everything that a config names.

    Returns:
      A `Resolved` record.

    Raises:
      ConfigError: unknown environment, algorithm or optimiser, an unsupported space, or settings
        that contradict each other.
    """
    require_config(config)
    algorithm = get_algorithm(config.algorithm)
    config = complete_config(config)
    # Everything that can fail without building an environment comes first.
    hparams = complete_hparams(None, config)
    optimizer = make_optimizer(config)
    env = make_env(config)
    if algorithm.whole_episodes:
        _require_whole_episodes(config, env)
    _require_whole_environments(config, env)
    _require_two_samples(config)
    spec = make_spec(config, env, has_critic=algorithm.has_critic)
    if config.normalize_obs:
        initial_obs_stats(env.observation_space)  # or an error
    schedule = SCHEDULES[config.lr_schedule]
    return Resolved(config, algorithm, env, spec, schedule, optimizer, hparams)


def is_ours(config: Config) -> bool:
    """Returns whether every part that a config names belongs to the package."""
    network, distribution = config.network, config.action_distribution
    arguments = (*config.env_kwargs, *config.env_params, *config.wrappers, *config.optimizer_kwargs)
    return (
        envs.is_ours(config.env)
        and all(WRAPPERS.is_ours(name) for name, _ in config.wrappers)
        and ALGORITHMS.is_ours(config.algorithm)
        and isinstance(network, str)
        and NETWORKS.is_ours(network)
        and (distribution is None or BOX_HEADS.is_ours(distribution))
        and OPTIMIZERS.is_ours(config.optimizer)
        and LR_SCHEDULES.is_ours(config.lr_schedule)
        and not any(callable(value) for _, value in arguments)
    )


def complete_config(config: Config) -> Config:
    """Fills unset algorithm settings of a config with the algorithm's defaults.

    Raises:
      ConfigError: a setting is given that the algorithm does not use.

    >>> complete_config(Config(algorithm="ppo")).num_epochs
    4
    """
    used = get_algorithm(config.algorithm).settings
    defaults = {**_VALUES_OF_UNUSED_SETTINGS, **used}
    for name in ALGORITHM_SETTINGS:
        given = getattr(config, name)
        # 1 epoch and 1 minibatch describe such an algorithm, so these values are accepted.
        if name not in used and given not in (None, _VALUES_OF_UNUSED_SETTINGS.get(name)):
            raise ConfigError(
                f"a setting must be one that the algorithm uses; {name} is given and "
                f"{config.algorithm} uses {', '.join(used)}. Leave {name} out."
            )
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return config.replace(**missing)


def complete_hparams(
    hparams: HParams | Mapping[str, Any] | None, config: Config, algorithm: Algorithm | None = None
) -> HParams:
    """Fills unset hyperparameters with the algorithm's defaults.

    Args:
      hparams: values that are set, as a record or by name; None sets nothing.
      config: names the algorithm; algorithm settings may be unset.
      algorithm: the algorithm; None looks up `config.algorithm`. A trainer passes its own, because
        the name may have been registered again since it was made.

    Returns:
      A record of the algorithm's `hparams_type`.

    Raises:
      ConfigError: a value is given that the algorithm does not use.

    >>> complete_hparams(HParams(clip_eps=0.1), Config()).gamma
    0.99
    """
    algorithm = get_algorithm(config.algorithm) if algorithm is None else algorithm
    used = used_hparams(config, algorithm)
    given = hparams.given() if isinstance(hparams, HParams) else dict(hparams or {})
    if given.get("hidden_gain") is not None and "hidden_gain" not in used:
        network = config.network
        raise ConfigError(
            "hidden_gain needs hidden layers of the package's own networks; network is "
            f"{network if isinstance(network, str) else type(network).__name__} and hidden_sizes "
            f"are {config.hidden_sizes}. Leave hidden_gain out."
        )
    _require_scalars(given)
    for name, value in given.items():
        if name not in used and value is not None:
            raise ConfigError(
                f"a hyperparameter must be one that the algorithm uses; {name} is set and "
                f"{config.algorithm} uses {', '.join(used)}. Leave {name} out."
            )
    # None never overrides a default; infinity switches off a bound that is on by default.
    values = {**used, **{name: value for name, value in given.items() if value is not None}}
    return algorithm.hparams_type(**values)


def hparams_of(hparams: HParams | Mapping[str, Any] | None, config: Config) -> HParams:
    """Returns hyperparameters as a record; those that are not given stay unset.

    Raises:
      ConfigError: an unknown name, or a value that is not a scalar.
    """
    if not isinstance(hparams, HParams):
        hparams = get_algorithm(config.algorithm).hparams_type(**(hparams or {}))
    _require_scalars(hparams.given())
    return hparams


def _require_scalars(given: Mapping[str, Any]) -> None:
    """Raises a `ConfigError` for an array, which would be broadcast with samples."""
    for name, value in given.items():
        if np.ndim(value):
            raise ConfigError(
                f"{name} must be a scalar; got the shape {np.shape(value)}. Train several values "
                "by jax.vmap, ppo_jax.sweep or ppo_jax.search."
            )


def _require_whole_environments(config: Config, env: Environment) -> None:
    """Checks that the agents of an environment are on one device; `num_envs` counts each."""
    if config.num_envs // config.num_devices % env.num_agents:
        step = env.num_agents * config.num_devices
        nearest = max(1, round(config.num_envs / step)) * step
        devices = "" if config.num_devices == 1 else f" on {config.num_devices} devices"
        raise ConfigError(
            "num_envs counts every agent, so it must be divisible by the agents of an environment; "
            f"got {config.num_envs}{devices} and {env.num_agents} agents of {env.name}. "
            f"Try {nearest}."
        )


def _require_two_samples(config: Config) -> None:
    """Checks that advantages are standardised over more than one sample: one would become 0."""
    assert config.num_minibatches is not None, "the config is complete"
    samples = {
        "minibatch": config.batch_size // config.num_minibatches,
        "batch": config.batch_size,
    }
    if samples.get(config.normalize_advantage or "none", 2) < 2:
        raise ConfigError(
            f"normalize_advantage needs at least two samples; a {config.normalize_advantage} of "
            f"{config.num_envs} * {config.num_steps} samples and {config.num_minibatches} "
            'minibatches has one. Use fewer minibatches, or normalize_advantage="none".'
        )


def _require_whole_episodes(config: Config, env: Environment) -> None:
    """Checks that a rollout holds the longest episode: one that the rollout cuts is no sample."""
    longest = env.longest_episode(env.params)
    if longest is not None and config.num_steps < longest:
        limit, where = "max_steps_in_episode", "env_params"
        if env.host is not None:
            limit, where = env.host.time_limit, "env_kwargs"
        raise ConfigError(
            f"{config.algorithm} needs whole episodes: num_steps must be at least the longest, "
            f"{limit}; got {config.num_steps} and {longest:g}. "
            f"Set num_steps to {longest:g}, or lower {limit} in {where}."
        )
