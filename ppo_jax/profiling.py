"""Measurement of an update, stage by stage."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.config import Config
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.resolve import complete_hparams
from ppo_jax.stages.collect import evaluate_trajectory
from ppo_jax.stages.rollout import rollout
from ppo_jax.trainer import Trainer, collect_rollout, make_stages, make_trainer, update_keys
from ppo_jax.types import TrainState

STAGES = ("environment", "policy", "values", "advantages", "minibatches")
_TRACED_UPDATES = 3


class Profile(NamedTuple):
    """Times of one update on one device."""

    seconds: float
    """Seconds of the whole update."""
    stages: Mapping[str, float]
    """Seconds of each of `STAGES`, which add up to the whole."""
    timesteps: int
    """Environment steps of the update."""
    compile_seconds: float
    """Seconds of compiling the program of an update."""


class UniformPolicy(Policy):
    """A policy that ignores observations; its `params` are those of the action distribution."""

    def step(self, obs: Any, recurrent_state: Any, start: Any = None) -> tuple[Any, Any]:  # noqa: ARG002
        """Returns the same parameters for every observation."""
        return self.params, recurrent_state


def profile(
    config: Config,
    hparams: HParams | None = None,
    *,
    repeats: int = 10,
    trace_dir: str | Path | None = None,
) -> Profile:
    """Measures the stages of an update.

    Five programs run in turn: the environments with random actions, the rollout, the rollout with
    the critic's values, the whole batch, and the whole update. Each contains the previous one, so
    the time of a stage is the difference between two programs. Times are minima over the repeats,
    because other work on the machine only adds to them.

    Args:
      config: the training. Of a training on several devices, the share of one is measured.
      hparams: scalars; None for the algorithm's defaults.
      repeats: how often each program runs.
      trace_dir: folder for a trace of `jax.profiler` of three updates; None for none.

    Returns:
      The `Profile` of one update.

    Raises:
      ConfigError: a setting breaks a rule.
    """
    config = config.replace(
        num_envs=config.num_envs // config.num_devices,
        reset_pool=config.device_reset_pool,
        num_devices=1,
    )
    hparams = complete_hparams(hparams, config)
    trainer = make_trainer(config)
    state = jax.jit(trainer.init)(jax.random.key(0), hparams)
    started = time.perf_counter()
    update = jax.jit(trainer.step).lower(state, hparams).compile()
    compile_seconds = time.perf_counter() - started
    # In a state that training has reached, episodes end at different times.
    state, _ = update(state, hparams)
    programs: dict[str, Callable[..., Any]] = {
        **{name: jax.jit(f) for name, f in _partial_updates(config, trainer).items()},
        "minibatches": update,
    }
    # In turn, because the speed of a machine drifts from minute to minute.
    seconds = dict.fromkeys(programs, float("inf"))
    for repeat in range(repeats + 1):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(state, hparams))
            if repeat:  # the first call compiles
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    # Separately, because a trace slows down the programs.
    if trace_dir is not None:
        with jax.profiler.trace(str(trace_dir)):
            for _ in range(_TRACED_UPDATES):
                state, _ = jax.block_until_ready(update(state, hparams))
    cumulative = list(seconds.values())
    differences = [max(0.0, x - y) for x, y in zip(cumulative, [0.0, *cumulative], strict=False)]
    return Profile(
        seconds["minibatches"],
        dict(zip(STAGES, differences, strict=True)),
        config.batch_size,
        compile_seconds,
    )


def _partial_updates(config: Config, trainer: Trainer) -> dict[str, Callable[..., Any]]:
    """Returns programs of the first one, two, three and four stages, by the last one's name."""
    stages = make_stages(config)
    resolved = stages.resolved

    def acted(policy: Policy, state: TrainState) -> Any:
        return rollout(
            resolved.env,
            state.env_params,
            policy,
            state.rollout,
            update_keys(state).rollout,
            num_steps=resolved.config.num_steps,
            reset_pool=resolved.config.device_reset_pool,
        )

    # Each returns what it computes: XLA would drop a stage whose result is not used.
    def environment(state: TrainState, hparams: HParams) -> Any:
        del hparams
        policy = trainer.policy(state)
        params = jax.eval_shape(policy.step, state.rollout.obs, state.rollout.recurrent_state)[0]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        return acted(UniformPolicy(zeros, spec=policy.spec), state)

    def with_policy(state: TrainState, hparams: HParams) -> Any:
        del hparams
        return acted(trainer.policy(state), state)

    def with_values(state: TrainState, hparams: HParams) -> Any:
        del hparams
        policy = trainer.policy(state)
        after, trajectory, ended = acted(policy, state)
        evaluated = evaluate_trajectory(
            policy,
            trajectory,
            before=state.rollout,
            after=after,
            config=resolved.config,
            shard=stages.shard,
        )
        return evaluated, trajectory, ended

    def with_advantages(state: TrainState, hparams: HParams) -> Any:
        return collect_rollout(stages, state, hparams, update_keys(state).rollout)

    functions = (environment, with_policy, with_values, with_advantages)
    return dict(zip(STAGES, functions, strict=False))
