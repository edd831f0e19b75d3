"""Accelerators train as a CPU does: what is computed differently for them, computed on a CPU."""

import jax
import numpy as np
import pytest

from ppo_jax import make_trainer
from ppo_jax.algorithms import get_algorithm
from ppo_jax.policy.spec import network_of
from ppo_jax.resolve import complete_config, complete_hparams
from ppo_jax.stages.gradients import joint_gradient
from ppo_jax.stages.losses import Losses
from ppo_jax.types import Shard
from tests.test_checkpoint import assert_same_bits
from tests.test_spaces import collected, config_of


def as_accelerators_do(*arguments, default, **platforms):
    del platforms
    # Traced before it is differentiated, as `platform_dependent` does.
    return jax.jit(default)(*arguments)


def as_tpus_do(*arguments, default, **platforms):
    return jax.jit(platforms.get("tpu", default))(*arguments)


def result_of(config):
    """Returns the state after two updates, and the metrics of both."""
    trainer = make_trainer(config)
    step = jax.jit(trainer.step)
    state, first = step(jax.jit(trainer.init)(jax.random.key(0)))
    state, second = step(state)
    return state, (first, second)


MANY = {"num_envs": 32, "num_steps": 4}  # packed with the environments as the last axis


@pytest.mark.parametrize(
    ("case", "changes", "platform_dependent"),
    [
        ("vector", {}, as_accelerators_do),
        pytest.param("vector", {"hidden_sizes": ()}, as_accelerators_do, marks=pytest.mark.slow),
        ("vector", MANY, as_accelerators_do),
        ("image", MANY, as_accelerators_do),
        ("image", MANY, as_tpus_do),
        ("half", {}, as_accelerators_do),
        ("normalized", {"num_epochs": 3}, as_accelerators_do),
        ("image", {"algorithm": "ppo_adaptive"}, as_accelerators_do),
        pytest.param("gaussian", {"algorithm": "trpo"}, as_accelerators_do, marks=pytest.mark.slow),
        ("gru", {}, as_accelerators_do),
        ("gru", {}, as_tpus_do),
        pytest.param("lstm", {}, as_accelerators_do, marks=pytest.mark.slow),
        ("mingru", {}, as_accelerators_do),
        ("lru", {}, as_accelerators_do),
        ("gtrxl", {}, as_accelerators_do),
    ],
)
def test_an_accelerator_s_program_trains_as_a_cpu_s(case, changes, platform_dependent, monkeypatch):
    config = config_of(case, **changes)
    state, metrics = result_of(config)
    monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)
    other_state, other_metrics = result_of(config)
    # Integers and flags are exact, such as actions and the ends of episodes.
    for x, y in zip(*map(jax.tree.leaves, (state, other_state)), strict=True):
        if jax.dtypes.issubdtype(x.dtype, np.floating):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
        else:
            assert_same_bits(x, y)
    for x, y in zip(*map(jax.tree.leaves, (metrics, other_metrics)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("case", ["critic-widths", "masked", "gaussian", "beta"])
def test_the_critic_after_the_actor_has_the_gradient_of_the_joint_loss(case, monkeypatch):
    spec, policy, batch = collected(case)
    assert network_of(spec).is_separable
    config = complete_config(config_of(case))
    losses = Losses(config, spec, get_algorithm(config.algorithm).objective, Shard(config.num_envs))
    hparams = complete_hparams(None, config).replace(vf_coef=0.3)
    together = jax.jit(joint_gradient(losses))(policy.params, batch, hparams)
    monkeypatch.setattr(jax.lax, "platform_dependent", as_accelerators_do)
    in_turn = jax.jit(joint_gradient(losses))(policy.params, batch, hparams)
    assert jax.tree.structure(in_turn) == jax.tree.structure(together)
    for x, y in zip(*map(jax.tree.leaves, (in_turn, together)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_what_actor_and_critic_have_in_common_is_computed_together():
    """They share layers, their memories have a loop each, or the critic sees images."""
    joint = ("own-module-shared", "gru", "gtrxl", "image", "asymmetric")
    assert not any(network_of(collected(case).spec).is_separable for case in joint)
