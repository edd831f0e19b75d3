"""The trainer: the stages composed into `init`, `step` and `run`, all of them pure."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax import envs, objectives
from ppo_jax.algorithms import complete, get_algorithm
from ppo_jax.config import Config, HParams
from ppo_jax.envs.environment import Environment
from ppo_jax.optimizers import SCHEDULES, make_optimizer
from ppo_jax.policy.policy import Policy, head_of, make_spec, network_of
from ppo_jax.rollout import reset, rollout
from ppo_jax.types import (
    Batch,
    EpisodeStats,
    Learner,
    Metrics,
    TrainState,
    Trajectory,
    strongly_typed,
)
from ppo_jax.update import make_loss, make_update


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
    optimizer = make_optimizer(config)
    env = envs.make(config.env, **dict(config.env_kwargs))
    env = env._replace(params=envs.override_params(env.name, env.params, dict(config.env_params)))
    spec = make_spec(config, env)
    network, head = network_of(spec), head_of(spec)
    update = make_update(config, make_loss(config, spec, algorithm.objective), optimizer)
    schedule = SCHEDULES[config.lr_schedule]

    def init(key: jax.Array, hparams: HParams | None = None, env_params: Any = None) -> TrainState:
        hparams = _opaque(complete(hparams, config.algorithm))
        env_params = _opaque(env.params if env_params is None else env_params)
        network_key, reset_key, key = jax.random.split(key, 3)
        rollout_state = reset(env, env_params, reset_key, num_envs=config.num_envs)
        params = network.init(network_key, rollout_state.obs)
        tx = optimizer(hparams.learning_rate, hparams.max_grad_norm)
        return TrainState(
            learner=Learner(params=params, opt_state=tx.init(params)),
            rollout=rollout_state,
            env_params=env_params,
            key=key,
            update=jnp.zeros((), jnp.int32),
        )

    def step(state: TrainState, hparams: HParams | None = None) -> tuple[TrainState, Metrics]:
        hparams = _opaque(complete(hparams, config.algorithm))
        rollout_key, update_key, next_key = jax.random.split(state.key, 3)
        rollout_state, trajectory, ended = rollout(
            env,
            state.env_params,
            policy(state),
            state.rollout,
            rollout_key,
            num_steps=config.num_steps,
        )
        batch = learnable(policy(state), trajectory, hparams)
        learning_rate = hparams.learning_rate * schedule(state.update / config.num_updates)
        learner, metrics = update(state.learner, batch, update_key, hparams, learning_rate)
        metrics["train/explained_variance"] = objectives.explained_variance(
            batch.value, batch.targets
        )
        metrics["train/learning_rate"] = learning_rate
        state = state.replace(
            learner=learner, rollout=rollout_state, key=next_key, update=state.update + 1
        )
        return state, metrics | _episode_metrics(ended)

    def learnable(policy: Policy, trajectory: Trajectory, hparams: HParams) -> Batch:
        value = policy.value(trajectory.obs)
        next_value = policy.value(trajectory.final_obs)
        advantages, targets = algorithm.estimate(trajectory, value, next_value, hparams)
        if config.normalize_advantage == "batch":
            advantages = objectives.standardize(advantages)
        distribution = head.distribution(trajectory.action_params)
        return Batch(
            obs=trajectory.obs,
            action=trajectory.action,
            action_params=trajectory.action_params,
            log_prob=distribution.log_prob(trajectory.action),
            value=value,
            advantages=advantages,
            targets=targets,
        )

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
