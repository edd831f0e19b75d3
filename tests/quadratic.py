"""A training whose best learning rate is known."""

import dataclasses

import jax
import jax.numpy as jnp

from ppo_jax import HParams
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import Learner, RolloutState, Statistics, TrainState


def quadratic():
    """x ← x − rate · x + noise, from x = 1: x² is smallest at a rate of 1; above 2 it diverges."""

    def init(key, hparams, env_params):
        del hparams, env_params
        learner = Learner({"x": jnp.ones(())}, ())
        rollout = RolloutState((), jnp.zeros(1), jnp.zeros(1), jnp.zeros(1), jnp.zeros(1))
        return TrainState(learner, rollout, Statistics(), (), key, jnp.int32(0))

    def step(state, hparams):
        x = state.learner.params["x"]
        key, noise_key = jax.random.split(state.key)
        x = x - hparams.learning_rate * x + 0.1 * jax.random.normal(noise_key)
        state = state.replace(
            learner=state.learner.replace(params={"x": x}),
            key=key,
            updates_done=state.updates_done + 1,
        )
        return state, Metrics({"episode/return": -jnp.square(x)}, jnp.ones(()), jnp.ones(()))

    return Trainer(init, step, None, None, None, HParams())


def quadratic_that_breaks(*, sound_return):
    """Above a rate of 1 the learner becomes NaN and scores 9, as a policy of NaNs may by chance."""
    whole = quadratic()

    def step(state, hparams):
        state, metrics = whole.step(state, hparams)
        is_nan = hparams.learning_rate > 1.0
        x = jnp.where(is_nan, jnp.nan, state.learner.params["x"])
        state = state.replace(learner=state.learner.replace(params={"x": x}))
        returns = {"episode/return": jnp.where(is_nan, 9.0, sound_return)}
        return state, dataclasses.replace(metrics, totals=returns)

    return whole._replace(step=step)
