"""A training whose environments are stepped on the host, with the interface of compiled ones."""

import contextlib
from typing import Any

import jax
import numpy as np

from ppo_jax.config import Config
from ppo_jax.envs.checks import example
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.host import HostEnvs, HostSource
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import initial_recurrent_state
from ppo_jax.population.member import Guard, guarded_step, initial_guard
from ppo_jax.runs import device_memory
from ppo_jax.runs.training import Piece, Training, output_shapes, require_memory
from ppo_jax.stages import host_rollout
from ppo_jax.stages.collect import Rollout
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer, make_host_trainer
from ppo_jax.types import EpisodeStats, RolloutState, TrainState, Trajectory


def _check_config(config: Config, keys: jax.Array) -> None:
    """Raises a `ConfigError` for settings that need an environment in JAX."""
    given = {
        "num_seeds": keys.ndim > 0,
        "num_devices": config.num_devices > 1,
        "wrappers": bool(config.wrappers),
        "reset_pool": config.reset_pool is not None,
    }
    for name, is_given in given.items():
        if is_given:
            instead = ", or use wrappers of its own suite" if name == "wrappers" else ""
            flag = " (--seeds)" if name == "num_seeds" else ""
            raise ConfigError(
                f"{name}{flag} needs an environment in JAX; {config.env} is stepped on the host. "
                f"Leave {name} out{instead}."
            )


def compile_host_training(
    trainer: Trainer,
    config: Config,
    keys: jax.Array,
    hparams: HParams,
    policy: Policy | None = None,
) -> Training:
    """Compiles the parts of a training that acts in environments on the host.

    Everything except the environment steps is compiled: the policy, and the update on a rollout.
    The state of the environments is not part of the training's state, so a resumed training starts
    new episodes.

    Args:
      trainer: of the config.
      config: describes the training.
      keys: one random key.
      hparams: complete.
      policy: the training starts from it; None draws new parameters.

    Raises:
      ConfigError: a setting needs an environment in JAX, or the training does not fit the memory
        of its device.
    """
    _check_config(config, keys)
    hparams = jax.tree.map(np.float32, hparams)
    host = make_host_trainer(config)
    resolved = host.resolved
    recurrent_state = initial_recurrent_state(resolved.spec, (config.num_envs,))
    environments = _Environments(trainer.env, config.num_envs, keys, recurrent_state)

    # The rollout is an argument of the program, so that the guard sees an ordinary step.
    def update(
        state: TrainState, guard: Guard, index: Any, hparams: HParams, rollout: Rollout
    ) -> tuple[TrainState, Guard, Metrics]:
        learner = trainer._replace(step=lambda state, hparams: host.learn(state, hparams, rollout))
        step = guarded_step(learner, config.max_skipped_updates, config.num_updates)
        return step(state, guard, index, hparams)

    before = _shapes_before(trainer.env, config.num_envs, recurrent_state)
    init = jax.jit(host.init).lower(keys, hparams, before, policy).compile()
    state_shapes = output_shapes(init)
    rollout_shapes = _shapes_of_rollout(trainer, config, state_shapes, before)
    guard_shapes = jax.eval_shape(initial_guard)
    lowered = jax.jit(update).lower(
        state_shapes, guard_shapes, np.int32(0), hparams, rollout_shapes
    )
    program = lowered.compile()
    num_bytes = max(map(device_memory.num_bytes, (init, program)))
    require_memory(num_bytes, config, 1, num_agents=1)
    rollout_key = jax.jit(host.rollout_key)
    _compile_acting(trainer, state_shapes, before, environments.num_groups)

    def one_update(state: TrainState, guard: Guard, index: int) -> tuple:
        # A resumed training has no environments yet. Algorithms that need whole episodes start new
        # ones in every rollout, because an episode must not begin in an earlier rollout.
        if not environments.groups or resolved.algorithm.whole_episodes:
            state = state.replace(rollout=environments.reset(index))
        rollout = host_rollout.rollout(
            environments.groups,
            trainer.policy(state),
            state.rollout,
            rollout_key(state),
            num_steps=config.num_steps,
        )
        return program(state, guard, np.int32(index), hparams, rollout)

    def advance(state: TrainState, guard: Guard, first: int, count: int) -> Piece:
        guard = jax.tree.map(lambda x: np.reshape(x, ()), guard)
        rows = []
        for index in range(first, first + count):
            state, guard, metrics = one_update(state, guard, index)
            rows.append(metrics)
        stacked = jax.tree.map(lambda *x: np.stack(x).reshape(count, 1), *jax.device_get(rows))
        return Piece(state, jax.tree.map(lambda x: np.reshape(x, (1,)), guard), stacked)

    *_, metric_shapes = lowered.out_info
    return Training(
        start=lambda: init(keys, hparams, environments.reset(0), policy),
        advance=advance,
        state_shapes=state_shapes,
        metric_shapes=jax.tree.map(lambda x: jax.ShapeDtypeStruct((1,), x.dtype), metric_shapes),
        num_bytes=num_bytes,
        close=environments.close,
    )


class _Environments:
    """The environments of a training, which are made when they are first used."""

    def __init__(
        self, env: Environment, num_envs: int, key: jax.Array, recurrent_state: Any
    ) -> None:
        self._env, self._num_envs = env, num_envs
        self._key, self._recurrent_state = key, recurrent_state
        self.groups: tuple[HostEnvs, ...] = ()
        # Two groups pay off if one steps while the policy acts for the other. CartPole with 8
        # environments, which steps in the foreground, is 1.7 times as fast with one, and Atari
        # games, whose threads leave a CPU no core for the policy, 1.07 times.
        source: HostSource = env.host
        leaves_cores = not source.uses_all_cores or jax.default_backend() != "cpu"
        is_divided = source.steps_in_background and leaves_cores and num_envs % 2 == 0
        self.num_groups = 2 if is_divided else 1

    def reset(self, updates_done: int) -> RolloutState:
        """Resets all environments, with seeds from the training's key and its updates so far."""
        if not self.groups:
            source: HostSource = self._env.host
            for _ in range(self.num_groups):
                self.groups += (source.make_envs(self._num_envs // self.num_groups),)
        seed = host_rollout.seed_of(jax.random.fold_in(self._key, updates_done))
        return host_rollout.reset(self.groups, seed, self._recurrent_state)

    def close(self) -> None:
        """Ends all environments."""
        with contextlib.ExitStack() as stack:
            for envs in self.groups:
                stack.callback(envs.close)


def _shapes_before(env: Environment, num_envs: int, recurrent_state: Any) -> RolloutState:
    """Returns the shapes of what `host_rollout.reset` returns."""
    numbers = jax.ShapeDtypeStruct((num_envs,), np.float32)
    return RolloutState(
        env_state=(),
        obs=example(env.observation_space, (num_envs,)),
        episode_return=numbers,
        episode_length=jax.ShapeDtypeStruct((num_envs,), np.int32),
        discounted_return=numbers,
        recurrent_state=jax.eval_shape(lambda: recurrent_state),
    )


def _compile_acting(
    trainer: Trainer, state: TrainState, before: RolloutState, num_groups: int
) -> None:
    """Compiles `host_rollout.act` for a group of environments by calling it with zeros.

    Args:
      trainer: trainer whose policy acts.
      state: shapes of the training's state.
      before: shapes of the state of all environments.
      num_groups: number of groups into which the environments are divided.
    """

    def zeros(x: Any) -> np.ndarray:
        return np.zeros((x.shape[0] // num_groups, *x.shape[1:]), x.dtype)

    policy = jax.eval_shape(trainer.policy, state)
    policy = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), policy)
    host_rollout.act(
        host_rollout.placed(policy),
        jax.tree.map(zeros, before.obs),
        host_rollout.placed(jax.tree.map(zeros, before.recurrent_state)),
        start=np.ones(before.episode_return.shape[0] // num_groups, bool),
        key=host_rollout.placed(jax.random.key(0)),
        index=np.uint32(0),
    )


def _shapes_of_rollout(
    trainer: Trainer, config: Config, state: TrainState, before: RolloutState
) -> Rollout:
    """Returns the shapes of what `host_rollout.rollout` returns."""
    flags: Any = jax.ShapeDtypeStruct((config.num_envs,), bool)
    acted = jax.eval_shape(
        host_rollout.act,
        jax.eval_shape(trainer.policy, state),
        before.obs,
        before.recurrent_state,
        start=flags,
        key=jax.eval_shape(lambda: jax.random.key(0)),
        index=np.uint32(0),
    )
    step = Trajectory(
        obs=before.obs,
        action=acted.action,
        action_params=acted.action_params,
        reward=before.episode_return,
        terminated=flags,
        truncated=flags,
        final_obs=before.obs,
    )
    trajectory = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.num_steps, *x.shape), x.dtype), step
    )
    number, count = (jax.ShapeDtypeStruct((), dtype) for dtype in (np.float32, np.int32))
    ended: Any = EpisodeStats
    return Rollout(before, trajectory, before, ended(number, count, count))
