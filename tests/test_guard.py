"""NaN and infinity in a training: skipped, counted, named, and kept away from everything else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

import ppo_jax
from ppo_jax import Config, HParams, envs, make_trainer
from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.diagnosis import make_diagnosis
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.ops import running_stats
from ppo_jax.resolve import complete_hparams
from ppo_jax.stages.gradient_steps import SKIPPED, FlatLearner, guarded, while_finite
from tests.test_checkpoint import assert_same_bits
from tests.test_platforms import as_accelerators_do

pytestmark = pytest.mark.xdist_group("guard")

LENGTH = 8


@struct.dataclass
class Params:
    bad_rewards: float = 0.0
    """Share of rewards that are NaN."""
    bad_obs: float = 0.0
    """Share of observations that are infinite."""
    scale: float = 1.0
    """Factor of rewards."""
    max_steps_in_episode: float = LENGTH


def make_shaky():
    """An environment in which a share of rewards and observations is not finite."""

    def reset(key, params):
        obs = jax.random.normal(key, (3,))
        return obs, (obs, jnp.int32(0))

    def step(key, state, action, params):
        obs, time = state
        keys = jax.random.split(key, 3)
        reward = params.scale * (obs[0] * (2.0 * action - 1.0))
        reward = jnp.where(jax.random.uniform(keys[0]) < params.bad_rewards, jnp.nan, reward)
        obs = jax.random.normal(keys[1], (3,))
        seen = jnp.where(jax.random.uniform(keys[2]) < params.bad_obs, jnp.inf, obs)
        ended = time + 1 >= params.max_steps_in_episode
        return Step(seen, (obs, time + 1), reward, jnp.array(False), ended)

    return Environment("shaky", reset, step, Params(), Box((3,)), Discrete(2))


@pytest.fixture(scope="module", autouse=True)
def _register():
    if "shaky" not in envs.names():
        envs.register("shaky", make_shaky)


def config(**changes):
    fields = {"env": "shaky", "num_envs": 4, "num_steps": LENGTH, "hidden_sizes": (4,)}
    return Config(**{**fields, "total_timesteps": 20 * 4 * LENGTH, **changes})


def same(one, other):
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_update_of_nothing_but_nans_changes_neither_parameters_nor_optimiser(algorithm):
    trainer = make_trainer(config(algorithm=algorithm))
    state = trainer.init(jax.random.key(0), env_params=Params(bad_rewards=1.0))
    new, metrics = jax.jit(trainer.step)(state)
    assert metrics["train/skipped_fraction"] == 1.0
    assert_same_bits(new.learner, state.learner)
    if "train/critic_skipped_fraction" in metrics:
        assert metrics["train/critic_skipped_fraction"] == 1.0
    # The next rollout is finite, and everything goes on.
    new, metrics = jax.jit(trainer.step)(new.replace(env_params=Params()))
    assert metrics["train/skipped_fraction"] == 0.0
    assert np.isfinite(metrics["train/policy_loss"])
    assert not same(new.learner.params, state.learner.params)


@pytest.mark.parametrize("target_kl", [None, 100.0])
def test_a_nan_in_one_minibatch_skips_the_update(target_kl):
    # A few of 64 rewards; minibatches of one sample.
    whole = config(num_envs=8, num_minibatches=64, num_epochs=1, normalize_advantage="none")
    trainer = make_trainer(whole)
    hparams = HParams(target_kl=target_kl)
    state = trainer.init(jax.random.key(0), hparams, Params(bad_rewards=0.05))
    new, metrics = jax.jit(trainer.step)(state, hparams)
    assert metrics["train/skipped_fraction"] == 1.0
    assert same(new.learner, state.learner)
    if target_kl is not None:
        assert metrics["train/gradient_steps"] == 0


def test_a_nan_in_a_step_that_is_not_applied_skips_nothing():
    """`target_kl` ends the update at its second step; what later steps compute is not used."""
    start = FlatLearner(jnp.zeros(2), jnp.zeros(2))
    end = FlatLearner(jnp.ones(2), jnp.ones(2))
    metrics = {SKIPPED: jnp.array([0.0, 1.0]), "train/entropy": jnp.array([1.0, jnp.nan])}
    applied = jnp.array([True, False])
    *learner, means = guarded(start, end, lambda flat: flat, metrics, applied)
    assert_same_bits(learner, [end.params, end.opt_state])
    assert means == {SKIPPED: 0.0, "train/entropy": 1.0}
    *learner, means = guarded(start, end, lambda flat: flat, metrics)
    assert_same_bits(learner, [start.params, start.opt_state])
    assert means[SKIPPED] == 1.0


@pytest.mark.parametrize("algorithm", ["ppo", "actor_critic", "trpo"])
def test_an_accelerator_takes_no_step_from_a_gradient_that_is_not_finite(algorithm, monkeypatch):
    """It skips the update without a copy of the optimiser's state from before it."""
    monkeypatch.setattr(jax.lax, "platform_dependent", as_accelerators_do)
    trainer = make_trainer(config(algorithm=algorithm))
    state = trainer.init(jax.random.key(0), env_params=Params(bad_rewards=1.0))
    new, metrics = jax.jit(trainer.step)(state)
    assert metrics["train/skipped_fraction"] == 1.0
    assert_same_bits(new.learner, state.learner)


def test_an_accelerator_keeps_the_optimiser_s_finite_steps_of_a_skipped_update(monkeypatch):
    # A few of 64 rewards; minibatches of one sample.
    whole = config(num_envs=8, num_minibatches=64, num_epochs=1, normalize_advantage="none")
    monkeypatch.setattr(jax.lax, "platform_dependent", as_accelerators_do)
    trainer = make_trainer(whole)
    state = trainer.init(jax.random.key(0), env_params=Params(bad_rewards=0.05))
    new, metrics = jax.jit(trainer.step)(state)
    assert metrics["train/skipped_fraction"] == 1.0
    assert_same_bits(new.learner.params, state.learner.params)
    steps = optax.tree.get(new.learner.rule_state, "count")
    assert 0 < steps < 64
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.learner.rule_state))


def test_an_accelerator_takes_no_step_after_a_gradient_that_is_not_finite():
    learner = FlatLearner(jnp.zeros(2), jnp.zeros(2))
    steps = []
    for i, is_not_finite in enumerate([0.0, 1.0, 0.0]):
        new = FlatLearner(jnp.full(2, i + 1.0), jnp.full(2, i + 1.0), learner.is_finite)
        learner = while_finite(jnp.array(is_not_finite), new, learner)
        steps.append(float(learner.opt_state[0]))
    assert steps == [1.0, 1.0, 1.0]
    assert not learner.is_finite


def test_an_overflow_in_the_optimiser_is_skipped():
    """Squares of finite gradients are infinite: Adam would divide by infinity from then on."""
    trainer = make_trainer(config(normalize_advantage="none"))
    hparams = HParams(max_grad_norm=jnp.inf)
    state = trainer.init(jax.random.key(0), hparams, Params(scale=1e25))
    new, metrics = jax.jit(trainer.step)(state, hparams)
    assert metrics["train/skipped_fraction"] == 1.0
    assert same(new.learner, state.learner)


def test_without_the_guard_nans_are_learnt():
    trainer = make_trainer(config(max_skipped_updates=0))
    state = trainer.init(jax.random.key(0), env_params=Params(bad_rewards=1.0))
    new, metrics = jax.jit(trainer.step)(state)
    assert "train/skipped_fraction" not in metrics
    assert np.isnan(np.concatenate([x.ravel() for x in jax.tree.leaves(new.learner.params)])).any()


def test_statistics_leave_out_a_batch_with_a_nan():
    stats = running_stats.merge(running_stats.initial((2,)), jnp.ones((3, 2)))
    for bad in (jnp.nan, jnp.inf, 3e38):
        batch = jnp.ones((3, 2)).at[1, 0].set(bad)
        if bad == 3e38:  # whose sum is finite, and whose square is not
            batch = batch.at[:, 1].set(bad)
        assert_same_bits(running_stats.merge(stats, batch), stats)
    trainer = make_trainer(config(normalize_obs=True, normalize_reward=True))
    state = trainer.init(jax.random.key(0), env_params=Params(bad_obs=0.5, bad_rewards=0.5))
    new, _ = jax.jit(trainer.step)(state)
    assert_same_bits(new.statistics, state.statistics)


def test_a_nan_of_one_member_changes_no_bit_of_the_others():
    trainer = make_trainer(config())
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def states(bad):
        params = jax.vmap(lambda share: Params(bad_rewards=share))(bad)
        return jax.vmap(trainer.run, in_axes=(0, None, 0))(keys, None, params)

    sound, _ = states(jnp.array([0.0, 0.0, 0.0]))
    mixed, metrics = states(jnp.array([0.0, 1.0, 0.0]))
    assert (metrics["train/skipped_fraction"][1] == 1.0).all()
    for i in (0, 2):
        one, other = (jax.tree.map(lambda x, i=i: x[i], s) for s in (sound, mixed))
        assert_same_bits(one.learner, other.learner)
        assert_same_bits(one.rollout, other.rollout)


@pytest.mark.parametrize(
    ("params", "changes", "name"),
    [
        (Params(bad_rewards=0.1), {}, r"reward of environment \d at step \d of the rollout"),
        (Params(bad_obs=0.1), {}, r"next observation of environment \d at step \d of the rollout"),
        (Params(scale=1e25), {"normalize_advantage": "none"}, "train/value_loss"),
        (Params(), {}, "None"),
    ],
)
def test_the_first_quantity_that_is_not_finite_is_named(params, changes, name):
    whole = config(**changes)
    trainer = make_trainer(whole)
    hparams = complete_hparams(None, whole)
    state = trainer.init(jax.random.key(0), hparams, params)
    diagnose = make_diagnosis(whole)
    assert re.fullmatch(name, str(diagnose(state, hparams)))
    broken = jax.tree.map(lambda x: x * jnp.nan, state.learner)
    assert diagnose(state.replace(learner=broken), hparams).startswith("parameters/")


def test_a_training_stops_after_consecutive_skipped_updates(tmp_path):
    whole = config(env_params={"bad_rewards": 1.0}, max_skipped_updates=3)
    with pytest.warns(
        RuntimeWarning, match="seed 0 failed with update 3, after 96 steps.*reward of"
    ):
        run = ppo_jax.train(whole, run_dir=tmp_path / "run", log_every=1, progress=False)
    assert run.failures[0].update == 3
    assert run.evaluation is None
    # The last state, which is finite, is a checkpoint.
    (checkpoint,) = sorted((tmp_path / "run" / "checkpoints").iterdir())
    state = ppo_jax.load_state(checkpoint).state
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.learner.params))


def test_debug_nans_names_the_operation(tmp_path):
    whole = config(env_params={"bad_rewards": 0.05})
    with pytest.warns(RuntimeWarning, match="failed with update 1, after 32 steps"):
        run = ppo_jax.train(whole, debug_nans=True, progress=False)
    cause = run.failures[0].cause
    assert re.match(
        r"reward of environment \d at step \d of the rollout; the operation add at ", cause
    )
    assert re.search(r"ppo_jax/\w+/\w+\.py:\d+ \(\w+\) made the first NaN", cause)
    sound = ppo_jax.train(config(), debug_nans=True, progress=False, eval_episodes=2)
    assert sound.failures == ()
    assert sound.evaluation is not None
    plain = ppo_jax.train(config(), progress=False, eval_episodes=2)
    assert_same_bits(sound.state, plain.state)
