import itertools
import os
import subprocess
import sys

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, envs, make_trainer
from ppo_jax.config import LR_SCHEDULES
from ppo_jax.envs import wrappers
from ppo_jax.envs.deferred import deferred
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.envs.suites import GYMNAX_NAMES
from ppo_jax.envs.suites import gymnax as gymnax_adapter
from ppo_jax.flags import _DISTRIBUTIONS
from ppo_jax.policy.distributions import BOX_HEADS
from ppo_jax.stages.optimizers import SCHEDULES
from tests.probes import PROBES, probe_name

UNTRAINABLE = {
    "FrozenLake-misc": "integer observations",
    "MNISTBandit-bsuite": "downloads its data when made",
}


def test_lists_of_names_are_those_of_the_tables():
    import gymnax

    assert set(GYMNAX_NAMES) == set(gymnax.registered_envs)
    # Other tests of the process may have registered more.
    assert tuple(BOX_HEADS)[: len(_DISTRIBUTIONS)] == _DISTRIBUTIONS
    assert SCHEDULES.keys() == LR_SCHEDULES.keys()
    assert tuple(wrappers.WRAPPERS)[: len(envs.WRAPPER_NAMES)] == envs.WRAPPER_NAMES


def test_no_plotting_library_is_imported_until_something_is_drawn():
    code = """
import sys
from ppo_jax import envs
env = envs.make("Catch-bsuite")
plotting = {"matplotlib", "seaborn", "pandas"}
assert not plotting & set(sys.modules), plotting & set(sys.modules)
import gymnax, jax
game, params = gymnax.make("Catch-bsuite")
_, state = game.reset(jax.random.key(0), params)
figure, axes = game.render(state, params)
import matplotlib.pyplot as plt
assert isinstance(figure, plt.Figure) and axes.images
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MPLBACKEND": "agg"},
    )
    assert result.returncode == 0, result.stderr


def test_a_stand_in_is_the_module_itself_once_it_is_used():
    for use_inside, use_other in itertools.product((False, True), repeat=2):
        for name in [name for name in sys.modules if name.startswith("wsgiref")]:
            del sys.modules[name]
        with deferred("wsgiref", "wsgiref.util"):
            import wsgiref.util as by_name
            from wsgiref import util as from_parent

            if use_other:  # a submodule that has no stand-in
                import wsgiref.headers
                from wsgiref import types

                assert types.StartResponse
                assert wsgiref.headers.Headers
            if use_inside:
                assert by_name.request_uri.__name__ == "request_uri"
        assert not any(isinstance(module, type(by_name)) for module in sys.modules.values())
        if not use_inside and not use_other:
            assert "wsgiref.util" not in sys.modules
        assert from_parent.request_uri is by_name.request_uri
        assert sys.modules["wsgiref.util"].request_uri is by_name.request_uri
        with pytest.raises(AttributeError, match="nothing"):
            _ = by_name.nothing


def test_a_name_can_be_registered_once():
    name = probe_name("constant-value")
    assert name in envs.names()
    with pytest.raises(ConfigError, match="is taken"):
        envs.register(name, PROBES["constant-value"])
    with pytest.raises(ConfigError, match="is taken"):
        envs.register("CartPole-v1", PROBES["constant-value"])


def test_an_object_with_gymnaxs_interface_can_be_registered():
    import gymnax

    class Mine(gymnax.environments.classic_control.cartpole.CartPole):
        pass

    if "Mine-v0" not in envs.names():
        envs.register("Mine-v0", Mine)
    env = envs.make("Mine-v0")
    assert env.observation_space == Box((4,))
    assert env.action_space == Discrete(2)


@pytest.mark.parametrize(
    "name", ["Catch-bsuite", "UmbrellaChain-bsuite", "FourRooms-misc", "BernoulliBandit-misc"]
)
def test_dtypes_are_those_of_the_spaces(name):
    """These four return other dtypes than their spaces say."""
    env = envs.make(name)
    key = jax.random.key(0)
    obs, state = env.reset(key, env.params)
    step = env.step(key, state, jnp.int32(0), env.params)
    assert obs.dtype == step.obs.dtype == env.observation_space.dtype
    assert step.reward.dtype == jnp.float32


def test_actions_are_clipped_to_bounds_that_depend_on_parameters():
    """Pendulum's torque is bounded by its parameters, and reward pays 0.001 torque²."""
    env = envs.make("Pendulum-v1")
    key = jax.random.key(0)
    _, state = env.reset(key, env.params)

    def reward(action, max_torque):
        params = env.params.replace(max_torque=max_torque)
        return env.step(key, state, jnp.array([action]), params).reward

    reward = jax.jit(reward)
    assert reward(100.0, 2.0) == reward(2.0, 2.0)
    assert reward(100.0, 3.0) == reward(3.0, 3.0)
    assert reward(100.0, 3.0) < reward(100.0, 2.0)


def test_a_time_limit_truncates():
    env = envs.make("Pendulum-v1")
    params = env.params.replace(max_steps_in_episode=3)
    _, state = env.reset(jax.random.key(0), params)
    for i in range(3):
        step = jax.jit(env.step)(jax.random.key(i), state, jnp.zeros(1), params)
        state = step.state
    assert step.truncated
    assert not step.terminated


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Breakout-MinAtar"])
def test_a_step_is_gymnax_s_without_its_reset(name):
    """Also through a wrapper with a step of its own, which has to be asked for it."""
    env, key = envs.make(name), jax.random.key(0)
    suite, _ = gymnax.make(name)

    class Wrapped(type(suite)):
        def step(self, key, state, action, params=None):
            obs, state, reward, *rest = super().step(key, state, action, params)
            return obs, state, reward + 1.0, *rest

    wrapped = gymnax_adapter.adapt(name, Wrapped())
    params = env.params.replace(max_steps_in_episode=2)
    _, state = env.reset(key, params)
    discrete = isinstance(env.action_space, Discrete)
    action = jnp.int32(0) if discrete else jnp.zeros(env.action_space.shape)
    for done in (False, True):
        *_, truncated, info = suite.step(key, state, action, params)
        step, bonus = (
            jax.jit(e.step)(jax.random.split(key)[0] if e is env else key, state, action, params)
            for e in (env, wrapped)
        )
        assert truncated == step.truncated == bonus.truncated == done
        np.testing.assert_allclose(step.obs, info["final_observation"], rtol=1e-6)
        np.testing.assert_allclose(bonus.obs, info["final_observation"], rtol=1e-6)
        assert bonus.reward == step.reward + 1.0
        state = step.state


@pytest.mark.parametrize("name", [n for n in GYMNAX_NAMES if n.endswith("-MinAtar")])
def test_grids_are_stored_as_bool_because_they_hold_zeros_and_ones(name):
    suite, params = gymnax.make(name)
    keys = jax.random.split(jax.random.key(0), 100)
    obs, state = suite.reset(keys[0], params)
    step = jax.jit(suite.step)
    for key in keys:
        action = jax.random.randint(key, (), 0, suite.num_actions)
        obs, state, *_ = step(key, state, action, params)
        assert jnp.isin(obs, jnp.array([0.0, 1.0])).all()
    assert envs.make(name).observation_space.dtype == "bool"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(GYMNAX_NAMES) - set(UNTRAINABLE)))
def test_every_environment_can_be_trained(name):
    config = Config(env=name, num_envs=2, num_steps=4, hidden_sizes=(8,), total_timesteps=16)
    with jax.numpy_rank_promotion("allow"):  # Swimmer broadcasts
        _, metrics = jax.jit(make_trainer(config).run)(jax.random.key(0))
    assert jnp.isfinite(metrics["train/policy_loss"]).all()
