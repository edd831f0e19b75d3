"""The trainer: the stages composed into `init`, `step` and `run`, all of them pure."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ppo_jax.config import Config
from ppo_jax.defaults import GAINS
from ppo_jax.devices import ENV_AXIS, STATE_SPECS, make_mesh, make_shard, place
from ppo_jax.envs.environment import Environment
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.ops import objectives, running_stats
from ppo_jax.ops.collective import mean_over
from ppo_jax.policy.policy import Policy, require_policy
from ppo_jax.policy.spec import (
    init_params,
    initial_obs_stats,
    initial_recurrent_state,
    with_log_std,
)
from ppo_jax.resolve import Resolved, complete_hparams, resolve
from ppo_jax.stages.algorithm import UpdateInputs, UpdateRule
from ppo_jax.stages.collect import Collected, Rollout, collect, to_batch
from ppo_jax.stages.losses import Losses
from ppo_jax.stages.metrics import Metrics, make_metrics
from ppo_jax.stages.rollout import reset
from ppo_jax.stages.update_rules import adaptive_learning_rate, report_learning_rates
from ppo_jax.types import (
    Learner,
    RolloutState,
    Scalars,
    Shard,
    Statistics,
    TrainState,
    strongly_typed,
)


class Trainer(NamedTuple):
    """Pure functions that initialise and train an agent; callers apply `jit` and `vmap`.

    `hparams` may be None for the algorithm's defaults. The state does not store hyperparameters, so
    pass the same ones to `init` and to every `step`. `env_params` may be None for the environment's
    parameters, which include `Config.env_params`.
    """

    init: Callable[..., TrainState]
    """`(key, hparams=None, env_params=None, policy=None) -> state`. The training starts from the
    parameters and the statistics of observations of `policy`; None draws new parameters."""
    step: Callable[..., tuple[TrainState, Metrics]]
    """`(state, hparams=None) -> (state, metrics)`: one update; metrics are scalars. Updates after
    `config.num_updates` use the schedule's last learning rate, which is 0 for "linear" and
    "cosine"."""
    run: Callable[..., tuple[TrainState, Metrics]]
    """`(key, hparams=None, env_params=None) -> (state, metrics)`: `init`, then a scan of `step`
    over `config.num_updates`; metrics are `[num_updates]`."""
    policy: Callable[[TrainState], Policy]
    """`state -> policy`."""
    env: Environment
    """The environment in its wrappers; `env.params` includes `Config.env_params`."""
    hparams: HParams
    """Every hyperparameter that the training uses, at its default."""


class Stages(NamedTuple):
    """A resolved config with the functions that one update is composed of."""

    resolved: Resolved
    mesh: Mesh | None
    """The devices, on whose axis `env` the environments are divided; None for one device."""
    shard: Shard
    """The share of each device."""
    losses: Losses
    rule: UpdateRule


class UpdateKeys(NamedTuple):
    """The random keys of one update."""

    rollout: jax.Array
    update: jax.Array
    following: jax.Array
    """The key that the state stores after the update."""


def update_keys(state: TrainState) -> UpdateKeys:
    """Returns the keys of the update that follows a state."""
    return UpdateKeys(*jax.random.split(state.key, 3))


def collect_rollout(
    stages: Stages, state: TrainState, hparams: HParams, key: jax.Array
) -> Collected:
    """Returns the rollout of an update as a batch.

    Args:
      stages: the stages of the training.
      state: the state before the update, with the environments of `stages.shard`.
      hparams: complete hyperparameters.
      key: the key of the rollout.
    """
    resolved = stages.resolved
    return collect(
        _policy(stages, state),
        state.rollout,
        state.statistics,
        config=resolved.config,
        algorithm=resolved.algorithm,
        env=resolved.env,
        env_params=state.env_params,
        hparams=hparams,
        key=key,
        shard=stages.shard,
    )


def make_trainer(config: Config, mesh: Mesh | None = None) -> Trainer:
    """Builds the training that `config` describes; nothing is traced yet.

    Args:
      config: the training.
      mesh: as `make_mesh` returns it, with `config.num_devices` on its axis `env`; None for the
        first devices. `jax.vmap(..., spmd_axis_name="member")` divides members on its other axis.

    Raises:
      ConfigError: unknown environment, algorithm or optimiser, or an unsupported space.

    >>> trainer = make_trainer(Config(env="CartPole-v1", num_envs=2, num_steps=8))
    >>> state = trainer.init(jax.random.key(0))
    >>> state, metrics = jax.jit(trainer.step)(state)
    >>> int(state.updates_done)
    1
    """
    stages = make_stages(config, mesh)

    def init(
        key: jax.Array,
        hparams: HParams | None = None,
        env_params: Any = None,
        policy: Policy | None = None,
    ) -> TrainState:
        return _init(stages, key, hparams, env_params, policy)

    def step(state: TrainState, hparams: HParams | None = None) -> tuple[TrainState, Metrics]:
        return _step(stages, state, hparams)

    def run(
        key: jax.Array, hparams: HParams | None = None, env_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        state = init(key, hparams, env_params)
        return jax.lax.scan(lambda state, _: step(state, hparams), state, length=config.num_updates)

    def policy(state: TrainState) -> Policy:
        return _policy(stages, state)

    return Trainer(init, step, run, policy, stages.resolved.env, stages.resolved.hparams)


def make_train(config: Config) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns `make_trainer(config).run`, under the name that the field knows.

    >>> train = make_train(Config(num_envs=2, num_steps=8, total_timesteps=32))
    >>> state, metrics = jax.jit(train)(jax.random.key(0))
    >>> metrics["train/entropy"].shape
    (2,)
    """
    return make_trainer(config).run


def make_stages(config: Config, mesh: Mesh | None = None) -> Stages:
    """Returns the functions that an update consists of; arguments are those of `make_trainer`."""
    resolved = resolve(config)
    config, algorithm = resolved.config, resolved.algorithm
    mesh = _mesh_of(config, mesh)
    shard = make_shard(mesh, config.num_envs)
    losses = Losses(
        config,
        resolved.spec,
        algorithm.objective,
        shard,
        per_episode=algorithm.whole_episodes,
    )
    rule = algorithm.update_rule(config, losses, resolved.optimizer)
    _check_combination(resolved, rule)
    # `report_learning_rates` is innermost, so that the rates include an adaptive factor.
    rule = report_learning_rates(rule)
    if resolved.schedule.adapt is not None:
        rule = adaptive_learning_rate(rule, resolved.schedule, losses)
    return Stages(resolved, mesh, shard, losses, rule)


def _mesh_of(config: Config, mesh: Mesh | None) -> Mesh | None:
    """Returns the mesh that divides environments; None for one device, which needs no backend."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ConfigError(
            f"mesh must be a Mesh, as make_mesh returns it; got {type(mesh).__name__}. "
            "Hyperparameters are an argument of the trainer's functions: run(key, hparams)."
        )
    if mesh is not None and mesh.shape[ENV_AXIS] != config.num_devices:
        raise ConfigError(
            "num_devices must be the size of the mesh axis env; got "
            f"{config.num_devices} and {mesh.shape[ENV_AXIS]}. Make both the same."
        )
    if config.num_devices == 1:
        return None
    return make_mesh(env=config.num_devices) if mesh is None else mesh


def _check_combination(resolved: Resolved, rule: UpdateRule) -> None:
    """Checks settings against how the algorithm collects data and updates actor and critic."""
    config, algorithm = resolved.config, resolved.algorithm
    if config.shared_torso and not algorithm.has_critic:
        raise ConfigError(
            f"shared_torso joins an actor and a critic; {config.algorithm} has no critic. Leave "
            "shared_torso out."
        )
    if rule.fits_critic_separately and config.shared_torso:
        raise ConfigError(
            "shared_torso must be off where the critic is fitted separately from the policy; "
            f"{config.algorithm} does so. Leave shared_torso out."
        )
    if algorithm.whole_episodes and config.reset_pool is not None:
        raise ConfigError(
            "reset_pool is for algorithms that continue episodes; every update of "
            f"{config.algorithm} resets all environments. Leave reset_pool out."
        )
    if resolved.schedule.adapt is not None and "learning_rate" not in algorithm.hparams:
        raise ConfigError(
            f"lr_schedule={config.lr_schedule!r} adapts the policy's learning rate; "
            f"{config.algorithm} has none. Choose another schedule."
        )
    if config.separate_grad_norms and (rule.fits_critic_separately or config.shared_torso):
        raise ConfigError(
            "separate_grad_norms needs an actor and a critic that are learned together and share "
            f"no torso; got {config.algorithm} and shared_torso={config.shared_torso}. "
            "Set separate_grad_norms to False, or leave shared_torso out."
        )
    if config.separate_grad_norms and resolved.hparams.max_grad_norm is None:
        raise ConfigError(
            "separate_grad_norms needs max_grad_norm, which bounds each of the norms; "
            f"{config.algorithm} has none. Set separate_grad_norms to False."
        )


class HostTrainer(NamedTuple):
    """The compiled parts of a training whose environments are stepped on the host. Pure."""

    init: Callable[..., TrainState]
    """`(key, hparams, rollout, policy=None) -> state`, with environments that have been reset."""
    rollout_key: Callable[[TrainState], jax.Array]
    """`state -> key` of its next rollout."""
    learn: Callable[[TrainState, HParams | None, Rollout], tuple[TrainState, Metrics]]
    """`(state, hparams, rollout) -> (state, metrics)`: one update. The policy of `state` must have
    collected the rollout."""
    resolved: Resolved


def make_host_trainer(config: Config) -> HostTrainer:
    """Builds the compiled parts of a training on the host; see `runs.host_training`."""
    stages = make_stages(config)
    resolved = stages.resolved

    def init(
        key: jax.Array, hparams: HParams | None, rollout: RolloutState, policy: Policy | None = None
    ) -> TrainState:
        network_key, _, key = jax.random.split(key, 3)
        keys = network_key, key
        return _init_learner(stages, rollout, resolved.env.params, keys, hparams, policy=policy)

    def rollout_key(state: TrainState) -> jax.Array:
        return update_keys(state).rollout

    def learn(
        state: TrainState, hparams: HParams | None, rollout: Rollout
    ) -> tuple[TrainState, Metrics]:
        complete = complete_hparams(hparams, resolved.config, resolved.algorithm)
        complete = _without_folding_in_loops(complete, state.updates_done)
        collected = to_batch(
            _policy(stages, state),
            rollout,
            state.statistics,
            config=resolved.config,
            algorithm=resolved.algorithm,
            hparams=complete,
            shard=stages.shard,
        )
        return _learn(stages, state, collected, update_keys(state), complete)

    return HostTrainer(init, rollout_key, learn, resolved)


def _policy(stages: Stages, state: TrainState) -> Policy:
    return Policy(state.learner.params, state.statistics.obs, spec=stages.resolved.spec)


def _init(
    stages: Stages,
    key: jax.Array,
    hparams: HParams | None,
    env_params: Any,
    policy: Policy | None,
) -> TrainState:
    """Returns the state before the first update; arguments are those of `Trainer.init`."""
    config, env, spec = stages.resolved.config, stages.resolved.env, stages.resolved.spec
    env_params = _without_folding(env.params if env_params is None else env_params)
    # The last key is the training's: every update splits it again.
    network_key, reset_key, key = jax.random.split(key, 3)
    rollout = reset(
        env,
        env_params,
        reset_key,
        num_envs=config.num_envs,
        recurrent_state=initial_recurrent_state(spec, (config.num_envs,)),
    )
    return _init_learner(stages, rollout, env_params, (network_key, key), hparams, policy=policy)


def _init_learner(
    stages: Stages,
    rollout: RolloutState,
    env_params: Any,
    keys: tuple[jax.Array, jax.Array],
    hparams: HParams | None,
    *,
    policy: Policy | None,
) -> TrainState:
    """Returns the state before the first update, given the state of the environments.

    Args:
      stages: the stages of the training.
      rollout: the environments at the start of their first episodes.
      env_params: parameters of the environments.
      keys: the key that draws the network, and the key that the state stores.
      hparams: hyperparameters; None for the algorithm's defaults.
      policy: has the first parameters and statistics of observations; None draws new ones.
    """
    config, env, spec = stages.resolved.config, stages.resolved.env, stages.resolved.spec
    hparams = _without_folding(complete_hparams(hparams, config, stages.resolved.algorithm))
    network_key, key = keys
    # New arrays for every state, because a caller may donate one.
    statistics = Statistics(
        obs=initial_obs_stats(env.observation_space) if config.normalize_obs else None,
        reward=running_stats.initial(()) if config.normalize_reward else None,
    )
    given = hparams.given()
    # A gain that the training does not use is not set, and keeps its default in layers of a user's
    # module.
    gains = {name: given[name] for name in GAINS if name in given}
    if policy is None:
        params = init_params(spec, network_key, rollout.obs, gains)
    else:
        shapes = jax.eval_shape(lambda: init_params(spec, network_key, rollout.obs, gains))
        require_policy(policy, Policy(shapes, statistics.obs, spec=spec))
        # Copies, because a caller may donate the state.
        params = jax.tree.map(lambda x, y: jnp.array(x, y.dtype), policy.params, shapes)
        statistics = statistics._replace(obs=jax.tree.map(jnp.array, policy.obs_stats))
    if "initial_log_std" in given:
        params = with_log_std(spec, params, given["initial_log_std"])
    state = TrainState(
        learner=Learner(params, stages.rule.init(params, hparams)),
        rollout=rollout,
        statistics=statistics,
        env_params=env_params,
        key=key,
        updates_done=jnp.zeros((), jnp.int32),
    )
    return place(state, stages.mesh)


def _step(stages: Stages, state: TrainState, hparams: HParams | None) -> tuple[TrainState, Metrics]:
    """Returns the state after one update, and its metrics."""
    # Completed in every call, because a caller may pass other values to each step.
    complete = complete_hparams(hparams, stages.resolved.config, stages.resolved.algorithm)
    complete = _without_folding_in_loops(complete, state.updates_done)
    if stages.mesh is None:
        return _step_on_one_device(stages, state, complete)
    sharded_step = jax.shard_map(
        lambda state, hparams: _step_on_one_device(stages, state, hparams),
        mesh=stages.mesh,
        in_specs=(STATE_SPECS, PartitionSpec()),
        out_specs=(STATE_SPECS, PartitionSpec()),
        # Gradients differ between devices until `mean_over` averages them, which the check of
        # replication cannot follow.
        check_vma=False,
    )
    return sharded_step(state, complete)


def _step_on_one_device(
    stages: Stages, state: TrainState, hparams: HParams
) -> tuple[TrainState, Metrics]:
    """Computes one device's part of an update."""
    keys = update_keys(state)
    if stages.shard.axis_name is not None:
        # Each device draws its own numbers; the following key must be the same on all of them.
        device = jax.lax.axis_index(stages.shard.axis_name)
        rollout, update = (jax.random.fold_in(x, device) for x in (keys.rollout, keys.update))
        keys = keys._replace(rollout=rollout, update=update)
    collected = collect_rollout(stages, state, hparams, keys.rollout)
    return _learn(stages, state, collected, keys, hparams)


def _learn(
    stages: Stages,
    state: TrainState,
    collected: Collected,
    keys: UpdateKeys,
    hparams: HParams,
) -> tuple[TrainState, Metrics]:
    """Updates the learner with the batch of a rollout.

    Args:
      stages: the stages of the training.
      state: the state before the update.
      collected: the batch and the other results of the rollout.
      keys: the keys of this update.
      hparams: complete hyperparameters.

    Returns:
      The state after the update, and the update's metrics.
    """
    config, algorithm = stages.resolved.config, stages.resolved.algorithm
    axis_name = stages.shard.axis_name
    batch, ended = collected.batch, collected.ended
    # Steps beyond `num_updates` keep the last factor: unclipped, a linear schedule turns negative.
    progress = jnp.minimum(state.updates_done / config.num_updates, 1.0)
    anneal = stages.resolved.schedule.factor(progress)
    inputs = UpdateInputs(batch, keys.update, hparams, anneal)
    params, rule_state, scalars = stages.rule.update(
        state.learner.params, state.learner.rule_state, inputs
    )
    # Reports come after the update, whose effect they describe.
    if algorithm.report is not None:
        report = algorithm.report(stages.losses.log_ratio(params, batch), batch)
        _check_report(config.algorithm, report, scalars)
        scalars |= mean_over(report, axis_name)
    # The explained variance is that of the values before the update.
    if batch.value is not None and batch.targets is not None:
        scalars["train/explained_variance"] = objectives.explained_variance(
            batch.value, batch.targets, batch.mask, axis_name
        )
    # Sums, not means: `Metrics` divides by the number of episodes of all devices.
    if axis_name is not None:
        ended = jax.lax.psum(ended, axis_name)
    state = state.replace(
        learner=Learner(params, rule_state),
        rollout=collected.rollout,
        statistics=collected.statistics,
        key=keys.following,
        updates_done=state.updates_done + 1,
    )
    return state, make_metrics(scalars, ended)


def _check_report(algorithm: str, report: Any, scalars: Scalars) -> None:
    """Checks that a report has scalars of new names; raised while tracing."""
    if not isinstance(report, dict):
        raise ConfigError(
            f"report must return a dict of scalars; that of {algorithm} returns "
            f"{type(report).__name__}."
        )
    for name, value in report.items():
        if not name.startswith("train/") or name in scalars or jnp.shape(value) != ():
            raise ConfigError(
                'report must return scalars with new names that start with "train/"; that of '
                f"{algorithm} returns {name!r} of the shape {jnp.shape(value)}"
                f"{', which exists already' if name in scalars else ''}."
            )


def _without_folding(tree: Any) -> Any:
    """Hides the values of a tree from the compiler, behind an optimisation barrier.

    Defaults are constants, which the compiler would fold into the program. Folded constants round
    differently: `run` would differ from single steps, and defaults from the same values passed as
    arguments.
    """
    return jax.lax.optimization_barrier(strongly_typed(tree))


def _without_folding_in_loops(hparams: HParams, updates_done: jax.Array) -> HParams:
    """Makes hyperparameters depend on the state, so that XLA cannot fold them as constants.

    Inside a loop an optimisation barrier is not enough, because XLA removes barriers before its
    last folding pass. The count of updates is never negative, but the compiler does not know that.
    """
    return jax.tree.map(lambda x: jnp.where(updates_done >= 0, jnp.float32(x), jnp.nan), hparams)
