"""Parts of a user's own: registered, checked, traced and refused like those of the package."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ppo_jax
from ppo_jax import (
    Config,
    ConfigError,
    HParams,
    envs,
    make_env,
    make_trainer,
    register_action_distribution,
)
from ppo_jax.algorithms import ALGORITHMS, register_algorithm
from ppo_jax.cli import main
from ppo_jax.config import LR_SCHEDULES, NETWORKS
from ppo_jax.defaults import OPTIMIZERS
from ppo_jax.envs import wrappers
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.ops import advantages
from ppo_jax.policy.distributions import BOX_HEADS
from ppo_jax.population.halving import make_halving
from ppo_jax.population.plan import make_plan
from ppo_jax.population.search_space import Uniform
from ppo_jax.resolve import complete_hparams, is_ours
from ppo_jax.stages import optimizers
from ppo_jax.types import Estimates
from tests.conftest import exact_jit

SMALL = {"num_envs": 2, "num_steps": 8, "hidden_sizes": (8,), "total_timesteps": 4 * 16}


@dataclasses.dataclass(frozen=True)
class OffsetHParams(HParams):
    offset: Any = ppo_jax.hyperparameter(low=-1.0, high=1.0)


def offset_objective(terms, hparams):
    return terms.log_prob * (terms.advantages + hparams.offset)


@pytest.fixture
def offset(monkeypatch):
    """PPO's row with an objective that has a hyperparameter, registered for one test."""
    monkeypatch.setattr("ppo_jax.algorithms.ALGORITHMS", copy.copy(ALGORITHMS))
    row = ALGORITHMS["ppo"]._replace(
        objective=offset_objective,
        hparams={**ALGORITHMS["ppo"].hparams, "offset": 0.5},
        hparams_type=OffsetHParams,
    )
    register_algorithm("offset", row)
    return Config(algorithm="offset", **SMALL)


def test_a_hyperparameter_of_an_algorithm_is_traced_and_has_its_default(offset):
    trainer = make_trainer(offset)
    assert trainer.hparams.offset == 0.5
    run = jax.jit(jax.vmap(trainer.run, in_axes=(None, 0)))
    states, _ = run(jax.random.key(0), OffsetHParams(offset=jnp.array([-1.0, 0.5, 1.0])))
    default, _ = jax.jit(trainer.run)(jax.random.key(0), HParams(clip_eps=0.2))
    for swept, alone in zip(
        jax.tree.leaves(states.learner.params), jax.tree.leaves(default.learner.params), strict=True
    ):
        np.testing.assert_allclose(swept[1], alone, rtol=1e-4, atol=1e-6)
    kernels = states.learner.params["params"]["actor_out"]["kernel"]
    assert not np.allclose(kernels[0], kernels[2])


def test_a_trainer_keeps_the_algorithm_with_which_it_was_made(offset):
    trainer = make_trainer(offset)
    before, _ = jax.jit(trainer.step)(trainer.init(jax.random.key(0)))
    row = ppo_jax.algorithms.ALGORITHMS["offset"]
    changed = row._replace(hparams={**row.hparams, "learning_rate": 1.0})
    register_algorithm("offset", changed, overwrite=True)
    jax.clear_caches()
    after, _ = jax.jit(trainer.step)(trainer.init(jax.random.key(0)))
    for x, y in zip(
        jax.tree.leaves(before.learner.params), jax.tree.leaves(after.learner.params), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_an_algorithm_needs_no_critic_for_minibatches(monkeypatch):
    """Such as one whose advantages are returns, standardised within the batch."""

    def estimate(config, trajectory, values, hparams):
        del config, values
        zeros = jnp.zeros_like(trajectory.reward)
        ends = (trajectory.terminated, trajectory.truncated)
        rates = {"gamma": hparams.gamma, "gae_lambda": 1.0}
        returns = advantages.gae(trajectory.reward, zeros, zeros, *ends, **rates)
        return Estimates(returns, None, None)

    monkeypatch.setattr("ppo_jax.algorithms.ALGORITHMS", copy.copy(ALGORITHMS))
    ppo = ALGORITHMS["ppo"]
    of_critic = ("vf_coef", "value_clip_eps")
    hparams = {name: value for name, value in ppo.hparams.items() if name not in of_critic}
    register_algorithm("alone", ppo._replace(has_critic=False, estimate=estimate, hparams=hparams))
    _, metrics = jax.jit(make_trainer(Config(algorithm="alone", **SMALL)).run)(jax.random.key(0))
    assert np.isfinite(metrics["train/policy_loss"]).all()
    assert (metrics["train/skipped_fraction"] == 0).all()
    assert "train/value_loss" not in metrics


def test_observations_of_python_s_numbers_compile_nothing_twice():
    """They are weakly typed after a reset, and not after a step."""
    env = envs.make("CartPole-v1")

    def reset(key, params):
        _, state = env.reset(key, params)
        return jnp.full((4,), 0.0), state

    envs.register("weak", lambda: env._replace(reset=reset), overwrite=True)
    trainer = make_trainer(Config(env="weak", **SMALL))
    step = jax.jit(trainer.step)
    state, _ = step(trainer.init(jax.random.key(0)))
    step(state)
    assert step._cache_size() == 1


def test_a_hyperparameter_of_an_algorithm_is_refused_like_the_others(offset):
    with pytest.raises(ConfigError, match=r"offset must be in \[-1, 1\]; got 2.0"):
        OffsetHParams(offset=2.0)
    with pytest.raises(ConfigError, match="offset is set and ppo uses learning_rate"):
        complete_hparams(OffsetHParams(offset=0.1), Config())
    with pytest.raises(ConfigError, match="unknown name in the space 'ofset'. Did you mean offset"):
        ppo_jax.sweep(offset, {"ofset": [0.1]})
    with pytest.raises(ConfigError, match=r"offset must be in \[-1, 1\]; got 3.0"):
        make_halving(
            make_trainer(offset), {"offset": Uniform(0.0, 3.0)}, num_rounds=2, updates_per_round=1
        )


def test_a_hyperparameter_of_an_algorithm_is_swept_and_searched(offset):
    plan = make_plan(offset, HParams(gamma=0.9), [{"offset": 0.1}, {"offset": 0.2}], seeds=(0,))
    (group,) = plan  # traced: one program
    assert [member.hparams.offset for member in group.members] == [0.1, 0.2]
    assert {member.hparams.gamma for member in group.members} == {0.9}
    search = make_halving(
        make_trainer(offset), {"offset": Uniform(0.0, 1.0)}, num_rounds=2, updates_per_round=1
    )
    result, _ = jax.eval_shape(
        search.run, jax.random.split(jax.random.key(0), 3), HParams(gamma=0.9)
    )
    assert result.hparams.offset.shape == (3,)


def test_a_run_of_a_registered_algorithm_is_read_again(offset, tmp_path):
    ppo_jax.train(offset, run_dir=tmp_path / "run", eval_episodes=2, progress=False)
    directory = ppo_jax.runs.directory.RunDirectory.open(tmp_path / "run")
    config, hparams = directory.read_config()
    assert config == offset
    assert hparams == complete_hparams(None, offset)
    assert hparams.offset == 0.5


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (
            lambda: register_algorithm("ppo", ALGORITHMS["ppo"]),
            "the name of an algorithm must be new; 'ppo' is taken",
        ),
        (
            lambda: register_algorithm("x", ALGORITHMS["ppo"]._replace(settings={"num_epoch": 1})),
            "unknown algorithm setting 'num_epoch'. Did you mean num_epochs",
        ),
        (
            lambda: register_algorithm("x", ALGORITHMS["ppo"]._replace(hparams={"margin": 1.0})),
            "must be a field of hparams_type; HParams has no margin. Give hparams_type a subclass",
        ),
        (
            lambda: register_algorithm("x", ALGORITHMS["ppo"]._replace(hparams={"gamma": 2.0})),
            r"gamma must be in \[0, 1\]; got 2.0",
        ),
        (
            lambda: register_algorithm("x", ALGORITHMS["ppo"]._replace(hparams_type=dict)),
            "hparams_type must be HParams or a subclass",
        ),
        (
            lambda: envs.register("CartPole-v1", lambda: None),
            "the name of an environment must be new; 'CartPole-v1' is taken",
        ),
        (
            lambda: wrappers.register("time_limit", lambda env, _: env),
            "the name of a wrapper must be new; 'time_limit' is taken",
        ),
        (
            lambda: register_action_distribution("beta", BOX_HEADS["beta"]),
            "the name of an action distribution must be new; 'beta' is taken",
        ),
        (
            lambda: ppo_jax.register_network("mlp", nn.Dense(4), overwrite=True),
            "the name of a network must be new; 'mlp' is taken",
        ),
        (
            lambda: ppo_jax.register_network("x", nn.Dense),
            "network must be a flax.linen module .* got <class",
        ),
        (
            lambda: ppo_jax.register_network("x", Unhashable([4])),
            "network must be hashable; a field of Unhashable is not. Use tuples for lists",
        ),
        (
            lambda: ppo_jax.register_optimizer("adam", optax.sgd, overwrite=True),
            "the name of an optimizer must be new; 'adam' is taken",
        ),
        (
            lambda: ppo_jax.register_optimizer("x", optax.adam(1e-3)),
            "must be made by a function of learning_rate; got GradientTransformation",
        ),
        (
            lambda: ppo_jax.register_optimizer("x", lambda lr: optax.adam(lr)),
            "must be made by a function of learning_rate",
        ),
        (
            lambda: ppo_jax.register_lr_schedule("cosine", jnp.ones_like),
            "the name of a learning-rate schedule must be new; 'cosine' is taken",
        ),
        (
            lambda: ppo_jax.register_lr_schedule("x", lambda progress: jnp.ones(3)),
            r"x returns an array of shape \(3,\)",
        ),
        (
            lambda: ppo_jax.register_lr_schedule("x", lambda progress: 1.0 if progress else 0.0),
            "by functions of JAX; x fails: Attempted boolean conversion",
        ),
    ],
)
def test_what_cannot_be_registered_is_refused(register, message):
    with pytest.raises(ConfigError, match=message):
        register()
    for table in (ALGORITHMS, NETWORKS, OPTIMIZERS, LR_SCHEDULES):
        assert "x" not in table


@dataclasses.dataclass(frozen=True)
class PlainHParams(HParams):
    offset: float = 0.3


class UndecoratedHParams(HParams):
    offset: Any = ppo_jax.hyperparameter()


def ppo_with(**changes):
    return lambda: register_algorithm("x", ALGORITHMS["ppo"]._replace(**changes))


def row_with(**changes):
    """Trains one update of PPO with a changed row."""

    def train(monkeypatch):
        monkeypatch.setitem(ALGORITHMS, "x", ALGORITHMS["ppo"]._replace(**changes))
        trainer = make_trainer(Config(algorithm="x", **SMALL))
        jax.eval_shape(lambda key: trainer.step(trainer.init(key)), jax.random.key(0))

    return train


OFFSET = {**ALGORITHMS["ppo"].hparams, "offset": 0.5}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            ppo_with(hparams_type=OffsetHParams),
            "every hyperparameter that hparams_type adds needs a default in hparams; offset has",
        ),
        (
            ppo_with(hparams=OFFSET, hparams_type=UndecoratedHParams),
            "UndecoratedHParams has no offset.*with the decorator @dataclasses.dataclass",
        ),
        (ppo_with(hparams=OFFSET), "HParams has no offset. Give hparams_type a subclass"),
        (
            ppo_with(hparams=OFFSET, hparams_type=PlainHParams),
            "must be made by ppo_jax.hyperparameter.*offset of PlainHParams is not",
        ),
        (lambda: envs.register("x", make_env(Config())), "a factory must be a function"),
    ],
)
def test_a_mistake_in_a_registration_is_explained(mistake, message):
    with pytest.raises(ConfigError, match=message):
        mistake()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            row_with(objective=lambda terms, hparams: terms.advantages.mean()),
            r"one number per sample.*that of x returns \(\) for \(4,\)",
        ),
        (
            row_with(objective=lambda terms, hparams: terms.advantages[:, None]),
            r"that of x returns \(4, 1\) for \(4,\)",
        ),
        (row_with(report=lambda log_ratio, batch: None), "report must return a dict of scalars"),
        (
            row_with(report=lambda log_ratio, batch: {"train/entropy": log_ratio.mean()}),
            "returns 'train/entropy' of the shape .*, which exists already",
        ),
        (
            row_with(report=lambda log_ratio, batch: {"largest": log_ratio.max()}),
            "names that start with \"train/\"; that of x returns 'largest'",
        ),
        (
            row_with(report=lambda log_ratio, batch: {"train/log_ratio": log_ratio}),
            r"returns 'train/log_ratio' of the shape \(8, 2\)",
        ),
        (
            row_with(estimate=lambda config, trajectory, values, hparams: None),
            "estimate must return Estimates.*that of x returns NoneType",
        ),
    ],
)
def test_a_part_that_returns_something_else_is_named(mistake, message, monkeypatch):
    with pytest.raises(ConfigError, match=message):
        mistake(monkeypatch)


def own_env(**changes):
    def reset(key, params):
        return jnp.zeros(3), jnp.int32(0)

    def step(key, state, action, params):
        return Step(jnp.zeros(3), state + 1, jnp.float32(1), jnp.array(False), state > 5)

    env = Environment("own", reset, step, (), Box((3,)), Discrete(2))
    return env._replace(**changes)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (own_env(observation_space=Box((4,))), r"reset of own returns float32\[3\].*float32\[4\]"),
        (own_env(observation_space=Box((3,), "int32")), "reset of own returns float32.*int32"),
        (own_env(reset=lambda key, params: jnp.zeros(3)), r"reset must return \(obs, state\)"),
        (
            own_env(step=lambda key, state, action, params: (jnp.zeros(3), state, 1.0, False)),
            "step must return a Step.*own returns tuple",
        ),
        (
            own_env(
                step=lambda key, state, action, params: Step(
                    jnp.zeros(3), state, jnp.zeros(1), jnp.array(False), jnp.array(False)
                )
            ),
            r"reward must be a scalar; own has the shape \(1,\)",
        ),
        (
            own_env(
                step=lambda key, state, action, params: Step(
                    jnp.zeros(3), state + 0.5, jnp.float32(0), jnp.array(False), jnp.array(False)
                )
            ),
            r"step must return a state of the shapes.*float32\[\] and int32\[\]",
        ),
    ],
)
def test_an_environment_that_is_not_what_it_describes_is_refused(env, message):
    envs.register("own", lambda: env, overwrite=True)
    with pytest.raises(ConfigError, match=message):
        make_trainer(Config(env="own", **SMALL))


def test_a_sound_environment_of_one_s_own_trains_and_its_parameters_must_be_a_dataclass():
    envs.register("own", own_env, overwrite=True)
    jax.eval_shape(make_trainer(Config(env="own", **SMALL)).run, jax.random.key(0))
    with pytest.raises(ConfigError, match="need parameters that are a dataclass; those of own"):
        make_env(Config(env="own", env_params={"slip": 0.1}))


def test_a_wrapper_that_returns_nothing_is_named():
    wrappers.register("nothing", lambda env, argument: None, overwrite=True)
    with pytest.raises(ConfigError, match="nothing returns NoneType"):
        make_env(Config(wrappers={"nothing": 1}))


def head_with(**changes):
    def make(space):
        return BOX_HEADS["gaussian"](space)._replace(**changes)

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parametrize": lambda outputs, log_std: outputs.reshape(-1, 7)},
            "must handle 3 outputs of width num_outputs = 1.*mine fails: cannot reshape",
        ),
        (
            {"distribution": lambda params: distrax.Normal(params.mean, jnp.exp(params.log_std))},
            r"log_prob of a head must have the shape \(3,\) for 3 actions.*gives \(3, 1\)",
        ),
    ],
)
def test_a_head_of_wrong_shapes_is_refused(changes, message):
    register_action_distribution("mine", head_with(**changes), overwrite=True)
    with pytest.raises(ConfigError, match=message):
        make_trainer(Config(env="Pendulum-v1", action_distribution="mine"))


def test_parts_are_registered_from_the_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "from ppo_jax import envs\n"
        "from tests.test_extensions import own_env\n"
        "envs.register('mine-from-a-module', own_env, overwrite=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    small = ["--num-envs", "2", "--num-steps", "8", "--total-timesteps", "32", "--quiet"]
    run = ["--run-dir", "run", "--eval-episodes", "2", "--hidden-sizes", "4"]
    arguments = ["train", "mine-from-a-module", *small, *run]
    assert main(["--import", "my_parts", *arguments]) == 0
    assert main(["eval", "run", "--episodes", "2", "--import", "my_parts"]) == 0
    assert main(["--import", "my_part", "envs"]) == 2
    assert "--import must name a Python module; there is no my_part" in capsys.readouterr().err
    assert main([*arguments, "--import"]) == 2
    # What is not registered is named when a run is read; a file never imports a module.
    monkeypatch.delitem(envs._registered, "mine-from-a-module")
    assert main(["eval", "run"]) == 2
    assert "run names 'mine-from-a-module'. Import the module" in capsys.readouterr().err


class Wide(nn.Module):
    widths: tuple[int, ...] = (6,)

    @nn.compact
    def __call__(self, obs):
        for width in self.widths:
            obs = nn.relu(nn.Dense(width)(obs))
        return obs


class Unhashable(Wide):
    widths: list[int]


@pytest.fixture
def registries():
    """Takes back what a test registers."""
    tables = (NETWORKS, OPTIMIZERS, LR_SCHEDULES, optimizers.SCHEDULES, BOX_HEADS)
    tables += (optimizers._REGISTERED,)
    saved = [dict(table) for table in tables]
    yield
    for table, contents in zip(tables, saved, strict=True):
        table.clear()
        table.update(contents)


def trained(**settings):
    """Returns the end of a short training, and its metrics."""
    run = exact_jit(make_trainer(Config(**{**SMALL, **settings})).run)
    return run(jax.random.key(0))


def assert_same_params(ours, theirs, **tolerance):
    for x, y in zip(
        jax.tree.leaves(ours.learner.params), jax.tree.leaves(theirs.learner.params), strict=True
    ):
        np.testing.assert_allclose(x, y, **{"rtol": 0.0, "atol": 0.0, **tolerance})


@pytest.mark.usefixtures("registries")
def test_a_registered_schedule_is_the_factor_of_the_learning_rate():
    warmup = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=50, decay_steps=100)
    ppo_jax.register_lr_schedule("warmup", lambda progress: warmup(100 * progress))
    _, metrics = trained(lr_schedule="warmup")
    np.testing.assert_allclose(
        metrics["train/learning_rate"], 2.5e-4 * warmup(np.array([0, 25, 50, 75])), rtol=1e-6
    )
    ppo_jax.register_lr_schedule("down", lambda progress: 1.0 - progress)
    assert_same_params(trained(lr_schedule="down")[0], trained(lr_schedule="linear")[0])


# One for each of the rules that use an optimiser.
@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_baseline", "trpo"])
def test_a_registered_optimizer_sees_layers(algorithm):
    def like_ours(learning_rate, eps=1e-5):
        return optax.adam(learning_rate, eps=eps)

    def matrices_only(learning_rate):
        def zero_biases(updates, state, params):
            assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
            return jax.tree.map(lambda x: x if x.ndim > 1 else jnp.zeros_like(x), updates), state

        zero = optax.GradientTransformation(lambda params: optax.EmptyState(), zero_biases)
        return optax.chain(zero, optax.sgd(learning_rate))

    ppo_jax.register_optimizer("like_ours", like_ours)
    ppo_jax.register_optimizer("matrices_only", matrices_only)
    settings = {"algorithm": algorithm, "num_steps": 500, "total_timesteps": 2000}
    ours, _ = trained(optimizer="adam", **settings)
    # The norm of the gradient is rounded differently in another program.
    assert_same_params(trained(optimizer="like_ours", **settings)[0], ours, rtol=1e-4, atol=1e-6)

    end, _ = trained(optimizer="matrices_only", **settings)
    part = "critic" if algorithm == "trpo" else "actor"  # TRPO's policy has no optimiser
    layer = end.learner.params["params"][f"{part}_torso"]["MLP_0"]["Dense_0"]
    assert (layer["bias"] == 0).all()
    gram = layer["kernel"] @ layer["kernel"].T
    assert not np.allclose(gram, 2 * np.eye(4), atol=1e-6)  # as it was at first


@pytest.mark.usefixtures("registries")
def test_a_mistake_in_a_registered_optimizer_is_said_before_anything_is_traced():
    ppo_jax.register_optimizer("mine", lambda learning_rate, decay=0.9: decay)
    config = Config(optimizer="mine", **SMALL)
    with pytest.raises(ConfigError, match="returns a transformation of optax; mine returns float"):
        make_trainer(config)
    with pytest.raises(ConfigError, match="unknown argument of mine 'decoy'. Did you mean decay"):
        make_trainer(config.replace(optimizer_kwargs={"decoy": 0.9}))
    ppo_jax.register_optimizer(
        "mine", lambda learning_rate, b1: optax.adam(learning_rate, b1), overwrite=True
    )
    with pytest.raises(ConfigError, match="mine fails: .*missing 1 required .* 'b1'"):
        make_trainer(config)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (optax.lbfgs, "mine fails: .*missing .* required keyword-only arguments"),
        (
            lambda learning_rate: optax.adam(float(learning_rate)),
            "whose learning rate is traced; mine fails: Abstract tracer value",
        ),
        (optax.inject_hyperparams(optax.adam), "mine keeps a rate in its state"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(make, message):
    ppo_jax.register_optimizer("mine", make)
    with pytest.raises(ConfigError, match=message):
        make_trainer(Config(optimizer="mine", **SMALL))


@pytest.mark.usefixtures("registries")
def test_an_optimizer_may_pass_its_arguments_on():
    given = {}

    def make(learning_rate, **kwargs):
        given.update(kwargs)
        return optax.adam(learning_rate, **kwargs)

    ppo_jax.register_optimizer("mine", make)
    make_trainer(Config(optimizer="mine", optimizer_kwargs={"b1": 0.8}, **SMALL))
    assert given == {"b1": 0.8}


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    "part",
    [
        {"env": "own-part"},
        {"algorithm": "own-part"},
        {"network": "own-part"},
        {"network": nn.Dense(3)},
        {"action_distribution": "own-part"},
        {"optimizer": "own-part"},
        {"lr_schedule": "own-part"},
        {"wrappers": {"own-part": 1}},
        {"optimizer": "adamw", "optimizer_kwargs": {"mask": jnp.ones_like}},
    ],
    ids=lambda part: "-".join(part),
)
def test_a_part_of_the_user_s_is_known(part, monkeypatch):
    monkeypatch.setattr("ppo_jax.resolve.ALGORITHMS", copy.copy(ALGORITHMS))
    monkeypatch.setitem(ppo_jax.resolve.ALGORITHMS, "own-part", ALGORITHMS["ppo"])
    envs.register("own-part", own_env, overwrite=True)
    wrappers.register("own-part", lambda env, argument: env, overwrite=True)
    ppo_jax.register_network("own-part", Wide())
    ppo_jax.register_optimizer("own-part", optax.sgd)
    ppo_jax.register_lr_schedule("own-part", jnp.ones_like)
    register_action_distribution("own-part", BOX_HEADS["gaussian"])
    config = Config(env="Pendulum-v1", wrappers={"time_limit": 5}, action_distribution="beta")
    assert is_ours(config)
    assert not is_ours(config.replace(**part))


def test_a_part_of_the_package_that_was_replaced_is_the_user_s(monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "ppo", ALGORITHMS["ppo"]._replace(title="mine"))
    assert not is_ours(Config())
    monkeypatch.undo()
    assert is_ours(Config())


@pytest.mark.usefixtures("registries")
def test_a_copy_of_a_policy_has_an_equal_spec():
    register_action_distribution("a-copy", BOX_HEADS["gaussian"])
    for name in ("tanh_gaussian", "a-copy"):
        trainer = make_trainer(Config(env="Pendulum-v1", action_distribution=name, **SMALL))
        spec = trainer.policy(trainer.init(jax.random.key(0))).spec
        assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))


@pytest.mark.usefixtures("registries")
def test_a_network_of_the_user_s_replaces_the_layers_of_a_preset():
    ppo_jax.register_network("in-a-preset", Wide())
    for env in ("Breakout-MinAtar", "brax:ant"):
        for network in ("in-a-preset", Wide()):
            config, _ = ppo_jax.preset(env, network=network)
            assert (config.hidden_sizes, config.activation) == ((64, 64), "tanh")
    with pytest.raises(ConfigError, match="hidden_sizes shapes the package's own networks"):
        make_trainer(ppo_jax.preset("CartPole-v1", network=Wide(), hidden_sizes=(32,))[0])


def test_a_module_that_registers_parts_starts_no_backend(tmp_path):
    """A command imports it before it decides on devices and flags."""
    (tmp_path / "my_policy.py").write_text(PARTS)
    code = "import my_policy, jax; assert not jax._src.xla_bridge.backends_are_initialized()"
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("change", ["network", "action_distribution"])
def test_what_is_registered_again_leaves_a_trainer_as_it_was(change):
    settings = {**SMALL, "env": "Pendulum-v1", change: "again"}
    if change == "network":
        del settings["hidden_sizes"]
        first, second = Wide((6,)), Wide((7,))
        register = ppo_jax.register_network
    else:
        first, second = BOX_HEADS["gaussian"], BOX_HEADS["beta"]
        register = register_action_distribution
    register("again", first)
    trainer = make_trainer(Config(**settings))
    old = trainer.init(jax.random.key(0))
    register("again", second, overwrite=True)
    changed = make_trainer(Config(**settings))
    new = changed.init(jax.random.key(0))
    again = trainer.init(jax.random.key(0))
    assert_same_params(again, old)
    assert trainer.policy(again).spec == trainer.policy(old).spec != changed.policy(new).spec
    shapes = [jax.tree.map(jnp.shape, state.learner.params) for state in (old, new)]
    assert shapes[0] != shapes[1]


PARTS = """
import optax
from ppo_jax import register_action_distribution, register_lr_schedule, register_network
from ppo_jax import register_optimizer
from ppo_jax.policy.distributions import BOX_HEADS
from tests.test_extensions import Wide

register_network("my_network", Wide((5,)), overwrite=True)
register_optimizer("my_optimizer", optax.contrib.muon, overwrite=True)
register_lr_schedule("my_schedule", lambda progress: 1 / (1 + progress), overwrite=True)
register_action_distribution("my_distribution", BOX_HEADS["tanh_gaussian"], overwrite=True)
"""


def test_registered_parts_of_a_run_are_found_by_every_command(
    registries, tmp_path, capsys, monkeypatch
):
    (tmp_path / "my_policy.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_policy", raising=False)
    mine = ["network", "optimizer", "lr-schedule", "action-distribution"]
    parts = [f"--{name}=my_{name.split('-')[-1]}" for name in mine]
    small = ["--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2", "--quiet"]
    imported = ["--import", "my_policy"]
    command = [*imported, "train", "Pendulum-v1", *small, "--total-timesteps", "32", *parts]
    assert main([*command, "--run-dir", "run", "--eval-episodes", "2"]) == 0
    assert main([*imported, "resume", "run", "--total-timesteps", "64"]) == 0
    assert main([*imported, "eval", "run", "--episodes", "2"]) == 0
    assert main([*imported, "export", "run", "--format", "stablehlo", "-o", "exported"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*imported, "train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"my_{name.split('-')[-1]}" in shown for name in mine)
    policy = ppo_jax.load("run")
    assert policy.params["params"]["actor_torso"]["Dense_0"]["kernel"].shape == (3, 5)
    # A file never imports a module, so that each part must be known.
    tables = {"network": NETWORKS, "optimizer": OPTIMIZERS, "lr_schedule": LR_SCHEDULES}
    for kind, table in {**tables, "action_distribution": BOX_HEADS}.items():
        with monkeypatch.context() as patch:
            patch.delitem(table, f"my_{kind.split('_')[-1]}")
            assert main(["eval", "run"]) == 2
        assert f"the {kind} of a run must be registered" in capsys.readouterr().err
    for kind in ("network", "distribution"):
        with monkeypatch.context() as patch:
            patch.delitem(NETWORKS if kind == "network" else BOX_HEADS, f"my_{kind}")
            with pytest.raises(ConfigError, match=f"must be registered .*names 'my_{kind}'"):
                ppo_jax.load("run")
    with monkeypatch.context() as patch:
        patch.delitem(NETWORKS, "my_network")
        assert ppo_jax.load("run", network=Wide((5,))).spec.module == Wide((5,))
    (tmp_path / "run" / "config.json").write_text(
        (tmp_path / "run" / "config.json").read_text().replace("my_schedule", "cosin")
    )
    assert main(["eval", "run"]) == 2
    assert "Did you mean cosine?" in capsys.readouterr().err


def test_an_unknown_action_distribution_is_said_before_anything_is_traced():
    with pytest.raises(ConfigError, match="unknown action_distribution 'betta'. Did you mean beta"):
        make_trainer(Config(env="Pendulum-v1", action_distribution="betta"))


@pytest.mark.parametrize(
    ("applied", "longest"),
    [
        ({}, 20),
        ({"action_repeat": 3}, 7),
        ({"time_limit": 5}, 5),
        ({"time_limit": 50}, 20),
        ({"action_repeat": 3, "time_limit": 5}, 5),
        ({"time_limit": 5, "action_repeat": 3}, 2),
    ],
)
def test_an_environment_knows_its_longest_episode(applied, longest):
    env = make_env(Config(env_params={"max_steps_in_episode": 20}, wrappers=applied))
    assert env.longest_episode(env.params) == longest
    doubled = env.params.replace(max_steps_in_episode=40)
    assert env.longest_episode(doubled) >= longest  # a function of its parameters


def test_an_environment_without_a_limit_has_no_longest_episode():
    env = make_env(Config())._replace(longest_episode=lambda params: None)
    assert wrappers.action_repeat(env, 2).longest_episode(env.params) is None
    assert wrappers.time_limit(env, 9).longest_episode(env.params) == 9


def test_hyperparameters_are_a_pytree_whatever_is_imported_first():
    code = (
        "from ppo_jax.hparams import HParams\n"
        "from ppo_jax.presets import preset\n"
        "_, early = preset('CartPole-v1')\n"
        "import sys\n"
        "assert 'jax' not in sys.modules\n"
        "import ppo_jax\n"
        "_, hparams = ppo_jax.preset('CartPole-v1')\n"
        "import jax\n"
        "assert len(jax.tree.leaves(hparams)) == 2\n"
        "assert len(jax.tree.leaves(early)) == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
