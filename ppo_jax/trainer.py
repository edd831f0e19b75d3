"""The trainer: the stages composed into `init`, `step` and `run`, all of them pure."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax import envs, objectives
from ppo_jax.algorithms import complete, complete_config, get_algorithm
from ppo_jax.collect import collect
from ppo_jax.config import Config, ConfigError, HParams
from ppo_jax.envs.environment import Environment
from ppo_jax.losses import make_losses
from ppo_jax.optimizers import SCHEDULES, adapt_lr_factor, make_optimizer
from ppo_jax.policy.policy import Policy, make_spec, network_of
from ppo_jax.rollout import reset
from ppo_jax.types import EpisodeStats, Learner, Metrics, TrainState, strongly_typed


class Trainer(NamedTuple):
    """A training as pure functions; `jit`, `vmap` and devices are the caller's.

    `hparams` may be None, which means the algorithm's defaults, and `env_params` may be None,
    which means the environment's, with the changes in `Config.env_params`.
    """

    init: Callable[..., TrainState]
    """`(key, hparams=None, env_params=None) -> state`."""
    step: Callable[..., tuple[TrainState, Metrics]]
    """`(state, hparams=None) -> (state, metrics)`: one update; metrics are scalars."""
    run: Callable[..., tuple[TrainState, Metrics]]
    """`(key, hparams=None, env_params=None) -> (state, metrics)`: `init`, then a scan of `step`
    over `config.num_updates`; metrics are `[num_updates]`."""
    policy: Callable[[TrainState], Policy]
    """`state -> policy`."""
    env: Environment
    """The environment, with its default parameters."""


def make_trainer(config: Config) -> Trainer:
    """Builds the training that `config` describes; nothing is traced yet.

    Args:
      config: what to train.

    Returns:
      A `Trainer`.

    Raises:
      ConfigError: unknown environment, algorithm or optimiser, or an unsupported space.

    >>> trainer = make_trainer(Config(env="CartPole-v1", num_envs=2, num_steps=8))
    >>> state = trainer.init(jax.random.key(0))
    >>> state, metrics = jax.jit(trainer.step)(state)
    >>> int(state.update)
    1
    """
    algorithm = get_algorithm(config.algorithm)
    config = complete_config(config)
    complete(None, config)
    optimizer = make_optimizer(config)
    env = envs.make(config.env, **dict(config.env_kwargs))
    env = env._replace(params=envs.override_params(env.name, env.params, dict(config.env_params)))
    if algorithm.whole_episodes:
        _require_whole_episodes(config, env)
    spec = make_spec(config, env, has_critic=algorithm.has_critic)
    network = network_of(spec)
    losses = make_losses(config, spec, algorithm.objective, per_episode=algorithm.whole_episodes)
    rule = algorithm.update(config, losses, optimizer)
    if rule.fits_critic_apart and config.shared_torso:
        raise ConfigError(
            f"shared_torso must be off where the critic is fitted apart from the policy; "
            f"{config.algorithm} does so. Leave shared_torso out."
        )
    schedule = SCHEDULES[config.lr_schedule]
    adapts_lr = config.lr_schedule == "kl_adaptive"

    def init(key: jax.Array, hparams: HParams | None = None, env_params: Any = None) -> TrainState:
        hparams = _opaque(complete(hparams, config))
        env_params = _opaque(env.params if env_params is None else env_params)
        network_key, reset_key, key = jax.random.split(key, 3)
        rollout_state = reset(env, env_params, reset_key, num_envs=config.num_envs)
        params = network.init(network_key, rollout_state.obs)
        learner = Learner(
            params=params,
            opt_state=rule.init(params, hparams),
            kl_coef=jnp.asarray(0.0 if hparams.kl_coef is None else hparams.kl_coef, jnp.float32),
            lr_factor=jnp.ones(()),
        )
        return TrainState(
            learner=learner,
            rollout=rollout_state,
            env_params=env_params,
            key=key,
            update=jnp.zeros((), jnp.int32),
        )

    def step(state: TrainState, hparams: HParams | None = None) -> tuple[TrainState, Metrics]:
        hparams = _opaque(complete(hparams, config))
        if algorithm.adapts_kl_coef:
            hparams = hparams.replace(kl_coef=state.learner.kl_coef)
        rollout_key, update_key, next_key = jax.random.split(state.key, 3)
        rollout_state, batch, ended = collect(
            config, env, state.env_params, policy(state), state.rollout, rollout_key, hparams
        )
        anneal = schedule(state.update / config.num_updates) * state.learner.lr_factor
        learner, metrics = rule.update(state.learner, batch, update_key, hparams, anneal)
        if algorithm.adapts_kl_coef or adapts_lr:
            learner, adapted = adapt(learner, losses.kl(learner.params, batch), hparams)
            metrics |= adapted
        if algorithm.report is not None:
            metrics |= algorithm.report(losses.log_ratio(learner.params, batch), batch)
        if batch.value is not None and batch.targets is not None:
            metrics["train/explained_variance"] = objectives.explained_variance(
                batch.value, batch.targets, batch.mask
            )
        for name in ("learning_rate", "critic_learning_rate"):
            if getattr(hparams, name) is not None:
                metrics[f"train/{name}"] = getattr(hparams, name) * anneal
        state = state.replace(
            learner=learner, rollout=rollout_state, key=next_key, update=state.update + 1
        )
        return state, metrics | _episode_metrics(ended)

    def adapt(learner: Learner, kl: jax.Array, hparams: HParams) -> tuple[Learner, Metrics]:
        metrics = {"train/update_kl": kl}
        if algorithm.adapts_kl_coef:
            metrics["train/kl_coef"] = learner.kl_coef
            kl_coef = objectives.adapt_kl_coef(learner.kl_coef, kl, d_targ=hparams.d_targ)
            learner = learner.replace(kl_coef=kl_coef)
        if adapts_lr:
            lr_factor = adapt_lr_factor(learner.lr_factor, kl, desired_kl=hparams.desired_kl)
            learner = learner.replace(lr_factor=lr_factor)
        return learner, metrics

    def run(
        key: jax.Array, hparams: HParams | None = None, env_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        state = init(key, hparams, env_params)
        return jax.lax.scan(lambda state, _: step(state, hparams), state, length=config.num_updates)

    def policy(state: TrainState) -> Policy:
        return Policy(params=state.learner.params, spec=spec)

    return Trainer(init=init, step=step, run=run, policy=policy, env=env)


def make_train(config: Config) -> Callable[..., tuple[TrainState, Metrics]]:
    """`make_trainer(config).run` under the name that the field knows.

    >>> train = make_train(Config(num_envs=2, num_steps=8, total_timesteps=32))
    >>> state, metrics = jax.jit(train)(jax.random.key(0))
    >>> metrics["train/entropy"].shape
    (2,)
    """
    return make_trainer(config).run


def _require_whole_episodes(config: Config, env: Environment) -> None:
    """An episode that the rollout cuts is no sample, so the rollout must hold the longest."""
    longest = getattr(env.params, "max_steps_in_episode", None)
    if longest is not None and config.num_steps < longest:
        raise ConfigError(
            f"{config.algorithm} needs whole episodes: num_steps must be at least the longest, "
            f"max_steps_in_episode; got {config.num_steps} and {longest:g}. "
            f"Set num_steps to {longest:g}, or lower max_steps_in_episode in env_params."
        )


def _opaque(tree: Any) -> Any:
    """The same numbers as arrays that the compiler cannot see through.

    Defaults are constants, which it would fold into the program: `run` would round otherwise
    than single `step`s, and defaults otherwise than the same values passed as arguments.
    """
    return jax.lax.optimization_barrier(strongly_typed(tree))


def _episode_metrics(ended: EpisodeStats) -> Metrics:
    """Means over the episodes that ended in an update; NaN, not 0, where none did."""
    return {
        "episode/return": ended.return_sum / ended.episodes,
        "episode/length": ended.length_sum / ended.episodes,
        "episode/count": ended.episodes,
    }
