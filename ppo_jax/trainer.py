"""The trainer: the stages composed into `init`, `step` and `run`, all of them pure."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppo_jax import envs, objectives, running_stats
from ppo_jax.algorithms import complete, complete_config, get_algorithm
from ppo_jax.collect import collect
from ppo_jax.collective import mean_over
from ppo_jax.config import Config, ConfigError, HParams
from ppo_jax.envs import wrappers
from ppo_jax.envs.environment import Environment
from ppo_jax.losses import make_losses
from ppo_jax.optimizers import SCHEDULES, adapt_lr_factor, make_optimizer
from ppo_jax.policy.initializers import GAINS
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import init_params, initial_memory_of, initial_obs_stats, make_spec
from ppo_jax.rollout import reset
from ppo_jax.types import (
    EpisodeStats,
    Learner,
    Metrics,
    Statistics,
    TrainState,
    strongly_typed,
)


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
    env = wrappers.apply(env, config.wrappers)
    env = env._replace(params=envs.override_params(env.name, env.params, dict(config.env_params)))
    if algorithm.whole_episodes:
        _require_whole_episodes(config, env)
    spec = make_spec(config, env, has_critic=algorithm.has_critic)
    if config.normalize_obs:
        initial_obs_stats(env.observation_space)  # or an error
    mesh = _make_mesh(config.num_devices)
    axis_name = None if mesh is None else _ENV_AXIS
    # Of one device: the stages see its share of the environments.
    own = config.replace(num_envs=config.num_envs // config.num_devices, num_devices=1)
    losses = make_losses(
        own,
        spec,
        algorithm.objective,
        per_episode=algorithm.whole_episodes,
        axis_name=axis_name,
        chunk_size=_chunk_size(mesh),
    )
    rule = algorithm.update(own, losses, optimizer)
    if rule.fits_critic_apart and config.shared_torso:
        raise ConfigError(
            f"shared_torso must be off where the critic is fitted apart from the policy; "
            f"{config.algorithm} does so. Leave shared_torso out."
        )
    if config.separate_grad_norms and (rule.fits_critic_apart or config.shared_torso):
        raise ConfigError(
            "separate_grad_norms needs an actor and a critic that are learned together and share "
            f"no torso; got {config.algorithm} and shared_torso={config.shared_torso}. "
            "Set separate_grad_norms to False, or leave shared_torso out."
        )
    schedule = SCHEDULES[config.lr_schedule]
    adapts_lr = config.lr_schedule == "kl_adaptive"

    def init(key: jax.Array, hparams: HParams | None = None, env_params: Any = None) -> TrainState:
        hparams = _opaque(complete(hparams, config))
        env_params = _opaque(env.params if env_params is None else env_params)
        network_key, reset_key, key = jax.random.split(key, 3)
        memory = initial_memory_of(spec, (config.num_envs,))
        statistics = Statistics(  # new ones: a caller may donate a state
            obs=initial_obs_stats(env.observation_space) if config.normalize_obs else None,
            reward=running_stats.initial(()) if config.normalize_reward else None,
        )
        rollout_state = reset(env, env_params, reset_key, num_envs=config.num_envs, memory=memory)
        given = {name: getattr(hparams, name) for name in GAINS}
        gains = {name: GAINS[name] if gain is None else gain for name, gain in given.items()}
        params = init_params(spec, network_key, rollout_state.obs, gains)
        learner = Learner(
            params=params,
            opt_state=rule.init(params, hparams),
            kl_coef=jnp.asarray(0.0 if hparams.kl_coef is None else hparams.kl_coef, jnp.float32),
            lr_factor=jnp.ones(()),
        )
        state = TrainState(
            learner=learner,
            rollout=rollout_state,
            statistics=statistics,
            env_params=env_params,
            key=key,
            update=jnp.zeros((), jnp.int32),
        )
        return state if mesh is None else _place(state, mesh)

    def step(state: TrainState, hparams: HParams | None = None) -> tuple[TrainState, Metrics]:
        hparams = _unforeseen(complete(hparams, config), state.update)
        if mesh is None:
            return step_on_one_device(state, hparams)
        spread = jax.shard_map(
            step_on_one_device,
            mesh=mesh,
            in_specs=(_STATE_SPECS, PartitionSpec()),
            out_specs=(_STATE_SPECS, PartitionSpec()),
            check_vma=False,  # each gradient is of a share; `mean_over` makes it the whole's
        )
        return spread(state, hparams)

    def step_on_one_device(state: TrainState, hparams: HParams) -> tuple[TrainState, Metrics]:
        if algorithm.adapts_kl_coef:
            hparams = hparams.replace(kl_coef=state.learner.kl_coef)
        rollout_key, update_key, next_key = jax.random.split(state.key, 3)
        if axis_name is not None:
            device = jax.lax.axis_index(axis_name)
            rollout_key, update_key = (
                jax.random.fold_in(key, device) for key in (rollout_key, update_key)
            )
        rollout_state, batch, ended, statistics = collect(
            own,
            env,
            state.env_params,
            policy(state),
            state.rollout,
            state.statistics,
            rollout_key,
            hparams,
            axis_name,
        )
        anneal = schedule(state.update / config.num_updates) * state.learner.lr_factor
        learner, metrics = rule.update(state.learner, batch, update_key, hparams, anneal)
        if algorithm.adapts_kl_coef or adapts_lr:
            kl = mean_over(losses.kl(learner.params, batch), axis_name)
            learner, adapted = adapt(learner, kl, hparams)
            metrics |= adapted
        if algorithm.report is not None:
            report = algorithm.report(losses.log_ratio(learner.params, batch), batch)
            metrics |= mean_over(report, axis_name)
        if batch.value is not None and batch.targets is not None:
            metrics["train/explained_variance"] = objectives.explained_variance(
                batch.value, batch.targets, batch.mask, axis_name
            )
        for name in ("learning_rate", "critic_learning_rate"):
            if getattr(hparams, name) is not None:
                metrics[f"train/{name}"] = getattr(hparams, name) * anneal
        state = state.replace(
            learner=learner,
            rollout=rollout_state,
            statistics=statistics,
            key=next_key,
            update=state.update + 1,
        )
        if axis_name is not None:
            ended = jax.lax.psum(ended, axis_name)
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
        return Policy(state.learner.params, state.statistics.obs, spec=spec)

    return Trainer(init=init, step=step, run=run, policy=policy, env=env)


def make_train(config: Config) -> Callable[..., tuple[TrainState, Metrics]]:
    """`make_trainer(config).run` under the name that the field knows.

    >>> train = make_train(Config(num_envs=2, num_steps=8, total_timesteps=32))
    >>> state, metrics = jax.jit(train)(jax.random.key(0))
    >>> metrics["train/entropy"].shape
    (2,)
    """
    return make_trainer(config).run


_ENV_AXIS = "env"
_STATE_SPECS = TrainState(
    learner=PartitionSpec(),
    rollout=PartitionSpec(_ENV_AXIS),  # every leaf is [N, ...]
    statistics=PartitionSpec(),
    env_params=PartitionSpec(),
    key=PartitionSpec(),
    update=PartitionSpec(),
)


def _make_mesh(num_devices: int) -> Mesh | None:
    """The devices that share the environments; None for one, so that no backend is started."""
    if num_devices == 1:
        return None
    devices = jax.devices()
    if len(devices) < num_devices:
        raise ConfigError(
            f"num_devices must be at most the devices there are; got {num_devices} and "
            f"{len(devices)}. On a CPU, jax.config.update('jax_num_cpu_devices', {num_devices}) "
            "before anything is computed makes them."
        )
    return Mesh(np.array(devices[:num_devices]), (_ENV_AXIS,))


def _chunk_size(mesh: Mesh | None) -> int | None:
    """What fits a core's cache, where each device is one core; see docs/performance.md."""
    return None if mesh is None or mesh.devices[0].platform != "cpu" else 256


def _place(state: TrainState, mesh: Mesh) -> TrainState:
    """The state as `step` leaves it, so that the first step and the others are one program."""

    def place(spec: PartitionSpec, part: Any) -> Any:
        return jax.lax.with_sharding_constraint(part, NamedSharding(mesh, spec))

    return jax.tree.map(place, _STATE_SPECS, state)


def _require_whole_episodes(config: Config, env: Environment) -> None:
    """An episode that the rollout cuts is no sample, so the rollout must hold the longest."""
    longest = getattr(env.params, "max_steps_in_episode", None)
    if longest is None:
        return
    for name, value in config.wrappers:
        if name == "time_limit":
            longest = min(longest, value)
        elif name == "action_repeat":
            longest = math.ceil(longest / value)
    if config.num_steps < longest:
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


def _unforeseen(hparams: HParams, update: jax.Array) -> HParams:
    """The same values, made to depend on the state: a barrier is gone before the last folding.

    No update's number is negative, but the compiler does not know.
    """
    return jax.tree.map(lambda x: jnp.where(update >= 0, jnp.float32(x), jnp.nan), hparams)


def _episode_metrics(ended: EpisodeStats) -> Metrics:
    """Means over the episodes that ended in an update; NaN, not 0, where none did."""
    return {
        "episode/return": ended.return_sum / ended.episodes,
        "episode/length": ended.length_sum / ended.episodes,
        "episode/count": ended.episodes,
    }
