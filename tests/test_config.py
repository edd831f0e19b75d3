import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, HParams, make_trainer, sweep, train
from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.config import ALGORITHM_SETTINGS, LR_SCHEDULES
from ppo_jax.defaults import COMMON_HPARAMS
from ppo_jax.resolve import complete_hparams, hparams_of
from ppo_jax.runs.settings import settings_from_plain, to_plain


def test_step_counts_can_be_written_as_powers_of_ten():
    assert Config(total_timesteps=1e6) == Config(total_timesteps=1_000_000)
    with pytest.raises(ConfigError, match="positive integer; got 1000000.5"):
        Config(total_timesteps=1e6 + 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_envs": 4, "num_minibatches": 3}, r"divisible.*got 4 \* 128 and 3\. Try 2 or 4\."),
        ({"num_envs": 0}, "num_envs must be a positive integer; got 0"),
        ({"num_steps": -1}, "num_steps must be a positive integer; got -1"),
        ({"num_epochs": 1.5}, "num_epochs must be a positive integer; got 1.5"),
        ({"num_envs": True}, "num_envs must be a positive integer; got True"),
        ({"total_timesteps": 100}, r"at least one update.*got 100 and 64 \* 128 = 8192"),
        (
            {"hidden_sizes": (64, 0)},
            "every entry of hidden_sizes must be a positive integer; got 0",
        ),
        ({"memory_window": 8, "memory": "gru"}, "needs a transformer; got 8 and memory=gru"),
        ({"memory_heads": 0, "memory": "gtrxl"}, "memory_heads must be a positive integer; got 0"),
        ({"critic_hidden_sizes": 0}, "critic_hidden_sizes must be a positive integer; got 0"),
        ({"critic_hidden_sizes": "8"}, "critic_hidden_sizes must be a list or a tuple; got '8'"),
        ({"activation": "tan"}, "unknown activation 'tan'. Did you mean tanh"),
        ({"lr_schedule": "liner"}, "unknown lr_schedule 'liner'. Did you mean linear"),
        ({"env_kwargs": 3}, "env_kwargs must map names to numbers or strings; got 3"),
    ],
)
def test_a_config_that_breaks_a_rule_says_so(fields, message):
    with pytest.raises(ConfigError, match=message):
        Config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"env": "CartPol-v1"}, "unknown environment 'CartPol-v1'. Did you mean CartPole-v1"),
        ({"env": "Hopper-v5"}, "unknown environment 'Hopper-v5'.*One of Gymnasium is gymnasium:Ho"),
        ({"algorithm": "pop"}, "unknown algorithm 'pop'. Did you mean .*ppo"),
        ({"algorithm": "reinforce", "num_epochs": 2}, "num_epochs is given and reinforce uses"),
        ({"cg_iterations": 2}, "cg_iterations is given and ppo uses num_epochs"),
        (
            {"algorithm": "reinforce_to_go"},
            "whole episodes: num_steps must be.*got 128 and 500. Set num_steps to 500",
        ),
        (
            {"algorithm": "trpo", "shared_torso": True},
            "shared_torso must be off.*trpo does so",
        ),
        (
            {"algorithm": "trpo", "separate_grad_norms": True},
            "separate_grad_norms needs.*learned together.*got trpo and shared_torso=False",
        ),
        (
            {"separate_grad_norms": True, "shared_torso": True},
            "separate_grad_norms needs.*got ppo and shared_torso=True",
        ),
        (
            {"num_envs": 2, "num_steps": 2, "num_minibatches": 4},
            r"at least two samples; a minibatch of 2 \* 2 samples and 4 minibatches has one",
        ),
        (
            {"algorithm": "reinforce", "shared_torso": True, "num_steps": 500},
            "shared_torso joins an actor and a critic; reinforce has no critic",
        ),
        (
            {"algorithm": "reinforce", "reset_pool": 4, "num_steps": 500},
            "reset_pool is for algorithms that continue episodes; every update of reinforce resets",
        ),
        (
            {"algorithm": "trpo", "lr_schedule": "kl_adaptive"},
            "lr_schedule='kl_adaptive' adapts the policy's learning rate; trpo has none",
        ),
        ({"optimizer": "adm"}, "unknown optimizer 'adm'. Did you mean adam"),
        ({"optimizer_kwargs": {"epz": 1.0}}, "unknown argument of optax.adam 'epz'"),
        ({"env_params": {"gravty": 1.0}}, "unknown parameter of CartPole-v1 'gravty'.*gravity"),
        ({"wrappers": {"time_limt": 3}}, "unknown wrapper 'time_limt'. Did you mean time_limit"),
        ({"wrappers": {"time_limit": 0}}, "time_limit must be a positive integer; got 0"),
        ({"wrappers": {"frame_stack": 2.5}}, "frame_stack must be a positive integer; got 2.5"),
        ({"wrappers": {"scale_reward": "x"}}, "scale_reward must be a number; got 'x'"),
        ({"wrappers": {"scale_reward": math.nan}}, "scale_reward must be a number; got nan"),
        ({"wrappers": {"sticky_actions": "0.5"}}, "of sticky_actions must be a number; got '0.5'"),
        (
            {"wrappers": {"flatten_observation": "no"}},
            "flatten_observation must be True or False; got 'no'",
        ),
        ({"wrappers": {"observe_only": "x"}}, "observe_only takes entries from 0 to 3; got x"),
        ({"wrappers": {"observe_only": "0,7"}}, "observe_only takes entries from 0 to 3; got 0,7"),
        ({"network": "minatar_cnn"}, "network minatar_cnn needs images.*Use mlp"),
        (
            {"env": "Breakout-MinAtar", "network": "nature_cnn"},
            r"got \(1, 1\) and 4. Use smaller kernels",
        ),
        ({"env": "FrozenLake-misc", "normalize_obs": True}, "needs floating-point observations"),
        ({"actor_keys": ("position",)}, "need observations that are dicts"),
        (
            {"memory": "gtrxl", "memory_size": 12, "memory_heads": 5},
            "divisible by memory_heads; got 12 and 5. Try 4 or 6 heads",
        ),
        (
            {"critic_hidden_sizes": (8,), "shared_torso": True},
            "critic_hidden_sizes needs a critic with a torso of its own.*Leave critic_hidden_sizes",
        ),
        (
            {"critic_hidden_sizes": (8,), "algorithm": "reinforce", "num_steps": 500},
            "critic_hidden_sizes needs a critic with a torso of its own.*Leave critic_hidden_sizes",
        ),
        (
            {"action_distribution": "beta"},
            "action_distribution must be left out where actions are integers.*got beta",
        ),
        (
            {"env": "Pendulum-v1", "action_distribution": "beta", "state_dependent_std": True},
            "state_dependent_std must be off",
        ),
    ],
)
def test_a_name_that_is_unknown_is_said_before_anything_is_traced(fields, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(Config(**fields))


@pytest.mark.parametrize("name", HParams.names())
@pytest.mark.parametrize(
    "value",
    [
        lambda low: low - 0.1,
        lambda low: np.array([low + 0.1, low - 0.1]),
        lambda _: math.nan,
        lambda _: jnp.array(math.nan),
        lambda _: "0.1",
        lambda _: True,
    ],
)
def test_a_hyperparameter_outside_its_range_is_refused(name, value):
    with pytest.raises(ConfigError, match="must be"):
        HParams(**{name: value(HParams.ranges()[name][0])})


def test_gamma_and_lambda_end_at_one():
    for name in ("gamma", "gae_lambda"):
        with pytest.raises(ConfigError, match=name):
            HParams(**{name: 1.01})


def test_every_hyperparameter_has_a_range_and_a_user():
    fields = set(vars(HParams()))
    assert set(HParams.ranges()) == fields
    used = set().union(*(row.hparams for row in ALGORITHMS.values()))
    used |= {*COMMON_HPARAMS}.union(*LR_SCHEDULES.values())
    assert used == fields
    settings = set().union(*(row.settings for row in ALGORITHMS.values()))
    assert settings == set(ALGORITHM_SETTINGS)


def test_replace_refuses_an_unknown_field():
    with pytest.raises(ConfigError, match="unknown Config field 'num_env'. Did you mean num_envs"):
        Config().replace(num_env=3)
    with pytest.raises(ConfigError, match="unknown HParams field 'gama'. Did you mean gamma"):
        HParams().replace(gama=0.9)


@pytest.mark.parametrize("record", [Config, Config().replace])
def test_a_hyperparameter_among_the_settings_is_named(record):
    message = r"learning_rate is a field of HParams, and not of Config. Pass HParams\(learning_rate"
    with pytest.raises(ConfigError, match=message):
        record(learning_rate=1e-3)
    with pytest.raises(ConfigError, match="unknown Config field 'n_envs'. Did you mean num_envs"):
        record(n_envs=4)


@pytest.mark.parametrize("record", [HParams, HParams().replace])
def test_a_setting_among_the_hyperparameters_is_named(record):
    with pytest.raises(ConfigError, match="num_envs is a field of Config, and not of HParams"):
        record(num_envs=4)


def test_records_are_copied_and_pickled():
    for record in (Config(env="Acrobot-v1", env_params={"b": 1}), HParams(gamma=0.5)):
        assert copy.copy(record) == copy.deepcopy(record) == record
        assert pickle.loads(pickle.dumps(record)) == record


def test_values_of_numpy_are_stored_as_values_of_python():
    config = Config(
        num_envs=np.int64(4),
        total_timesteps=np.float64(2048),
        hidden_sizes=np.array([8, 16]),
        normalize_obs=np.bool_(True),
        env=np.str_("CartPole-v1"),
        env_params={"gravity": np.float32(9), "max_steps_in_episode": np.int64(50)},
    )
    assert config.hidden_sizes == (8, 16)
    json.dumps(dataclasses.asdict(config))  # no type of NumPy


def test_an_array_in_place_of_a_hyperparameter_is_refused():
    message = r"gamma must be a scalar; got the shape \(4,\). Train several values by jax.vmap"
    hparams = HParams(gamma=np.array([0.9, 0.1, 0.5, 0.2]))
    trainer = make_trainer(Config(num_envs=4))
    with pytest.raises(ConfigError, match=message):
        trainer.run(jax.random.key(0), hparams)
    for call in (train, sweep):
        arguments = {"space": {"ent_coef": [0.0]}} if call is sweep else {}
        with pytest.raises(ConfigError, match=message):
            call(Config(num_envs=4), hparams=hparams, progress=False, **arguments)
    # Under `vmap` each member has a scalar.
    jax.eval_shape(jax.vmap(trainer.run, in_axes=(None, 0)), jax.random.key(0), hparams)


def test_hyperparameters_of_a_sweep_may_be_a_mapping():
    assert hparams_of({"gamma": 0.9}, Config()) == HParams(gamma=0.9)
    with pytest.raises(ConfigError, match="unknown HParams field 'gama'. Did you mean gamma"):
        hparams_of({"gama": 0.9}, Config())


def test_norms_are_clipped_separately_only_if_there_is_a_bound(monkeypatch):
    row = ALGORITHMS["ppo"]
    without = row._replace(hparams={**row.hparams, "max_grad_norm": None})
    monkeypatch.setitem(ALGORITHMS, "unbounded", without)
    with pytest.raises(ConfigError, match="separate_grad_norms needs max_grad_norm"):
        make_trainer(Config(algorithm="unbounded", separate_grad_norms=True))


@pytest.mark.parametrize("setting", [{"layer_norm": True}, {"activation": "relu"}])
def test_a_setting_of_hidden_layers_that_are_not_there_is_refused(setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} needs hidden layers"):
        Config(hidden_sizes=(), **setting)


def test_a_hyperparameter_that_the_algorithm_does_not_use_is_refused(monkeypatch):
    row = ALGORITHMS["ppo"]
    without = {name: value for name, value in row.hparams.items() if name != "clip_eps"}
    monkeypatch.setitem(ALGORITHMS, "unclipped", row._replace(hparams=without))
    with pytest.raises(ConfigError, match="clip_eps is set and unclipped uses learning_rate"):
        complete_hparams(HParams(clip_eps=0.1), Config(algorithm="unclipped"))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("critic_gain", {"algorithm": "reinforce"}, "critic_gain is set and reinforce uses"),
        ("hidden_gain", {"hidden_sizes": ()}, r"network is mlp and hidden_sizes are \(\)"),
        (
            "hidden_gain",
            {"network": nn.Dense(8)},
            "hidden layers of the package's own networks; network is Dense",
        ),
    ],
)
def test_a_gain_of_layers_that_are_not_there_is_refused(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        complete_hparams(HParams(**{name: 1.0}), Config(**fields))
    assert getattr(complete_hparams(None, Config(**fields)), name) is None


def test_config_is_hashable_and_equal_by_value():
    one = Config(env_params={"gravity": 9.0, "length": 1.0}, hidden_sizes=[32, 32])
    two = Config(env_params={"length": 1.0, "gravity": 9.0}, hidden_sizes=(32, 32))
    assert one == two
    assert hash(one) == hash(two)


def test_only_hyperparameters_that_are_set_are_leaves():
    hparams = HParams(learning_rate=jnp.array([1.0, 2.0]), gamma=0.9)
    assert len(jax.tree.leaves(hparams)) == 2
    doubled = jax.vmap(lambda h: h.learning_rate * 2, in_axes=(HParams(learning_rate=0),))(
        HParams(learning_rate=jnp.array([1.0, 2.0]))
    )
    np.testing.assert_array_equal(doubled, [2.0, 4.0])
    negated = jax.tree.map(lambda x: -x, HParams(gamma=0.9))  # a gradient may be negative
    assert negated.gamma == -0.9


def test_public_names_exist():
    for name in ppo_jax.__all__:
        assert getattr(ppo_jax, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = ppo_jax.nothing


def test_lists_of_an_environment_s_arguments_are_tuples_and_survive_a_file():
    """Files of settings have lists, and a config must be hashable."""
    config = Config(env_kwargs={"mods": ["a", ["b", 2]]})
    assert config.env_kwargs == (("mods", ("a", ("b", 2))),)
    assert hash(config) == hash(Config(env_kwargs={"mods": ("a", ("b", 2))}))
    record = json.loads(json.dumps(to_plain({"config": vars(config), "hparams": {}})))
    assert settings_from_plain(record, Path("config.json"))[0] == config
