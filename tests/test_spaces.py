"""Every observation and action space, torso and memory, through the stages that train."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, envs, evaluate, make_trainer
from ppo_jax.algorithms import ALGORITHMS, get_algorithm
from ppo_jax.envs.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from ppo_jax.policy.networks import MLP
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import (
    PolicySpec,
    init_params,
    initial_obs_stats,
    initial_recurrent_state,
    make_spec,
)
from ppo_jax.resolve import complete_config, complete_hparams
from ppo_jax.runs.policy_files import load_policy, save_policy
from ppo_jax.stages.collect import collect
from ppo_jax.stages.losses import Losses
from ppo_jax.stages.rollout import reset
from ppo_jax.types import Batch, Shard, Statistics
from tests.random_env import random_env

VECTOR = Box((3,))
IMAGE = Box((6, 6, 2), "bool")
BYTES = Box((6, 6, 2), "uint8")
BOUNDED = Box((2,), low=(-1.0, 0.0), high=(3.0, 0.5))
MANY = Dict.of({"far": Box((2, 2)), "near": Tuple((Discrete(3), VECTOR)), "seen": IMAGE})


def masked(size):
    return Dict.of({"obs": VECTOR, "action_mask": Box((size,), "bool")})


class Doubled(nn.Module):
    """A network of a user's own."""

    @nn.compact
    def __call__(self, obs):
        return MLP((8,), nn.tanh)(nn.Dense(4)(2.0 * obs))  # a layer of ours inside


CASES = {
    "vector": (VECTOR, Discrete(3), {}),
    "integer": (Discrete(5), Discrete(3), {}),
    "embedded": (MultiDiscrete((5, 2)), Discrete(3), {"embedding_size": 4}),
    "image-flat": (IMAGE, Discrete(3), {}),
    "image": (IMAGE, Discrete(3), {"network": "minatar_cnn"}),
    "bytes": (BYTES, Discrete(3), {"network": "cnn", "conv_layers": ((4, 3, 2), (4, 2, 1))}),
    "resnet": (BYTES, Discrete(3), {"network": "impala_cnn"}),
    "many": (MANY, Discrete(3), {"network": "minatar_cnn", "layer_norm": True}),
    "asymmetric": (MANY, Discrete(3), {"actor_keys": ("far",), "critic_keys": ("near", "seen")}),
    "critic-widths": (VECTOR, Discrete(3), {"critic_hidden_sizes": (12, 6)}),
    "half": (VECTOR, BOUNDED, {"compute_dtype": "bfloat16"}),
    "half-many": (
        MANY,
        Discrete(3),
        {"network": "impala_cnn", "compute_dtype": "bfloat16", "layer_norm": True},
    ),
    "half-gru": (VECTOR, Discrete(3), {"compute_dtype": "bfloat16", "memory": "gru"}),
    "own-module": (VECTOR, Discrete(3), {"network": Doubled()}),
    "own-module-shared": (VECTOR, Discrete(3), {"network": Doubled(), "shared_torso": True}),
    "masked": (masked(4), Discrete(4), {}),
    "multi-discrete": (VECTOR, MultiDiscrete((2, 4, 3)), {}),
    "multi-discrete-masked": (masked(5), MultiDiscrete((2, 3)), {}),
    "gaussian": (VECTOR, BOUNDED, {}),
    "gaussian-state-dependent": (VECTOR, BOUNDED, {"state_dependent_std": True}),
    "tanh": (VECTOR, BOUNDED, {"action_distribution": "tanh_gaussian"}),
    "beta": (VECTOR, BOUNDED, {"action_distribution": "beta"}),
    "normalized": (MANY, BOUNDED, {"normalize_obs": True, "normalize_reward": True}),
    "gru": (VECTOR, Discrete(3), {"memory": "gru"}),
    "gru-shared": (VECTOR, Discrete(3), {"memory": "gru", "shared_torso": True}),
    "gru-critic-widths": (VECTOR, Discrete(3), {"memory": "gru", "critic_hidden_sizes": 5}),
    "lstm": (masked(4), Discrete(4), {"memory": "lstm"}),
    "lstm-normalized": (VECTOR, BOUNDED, {"memory": "lstm", "normalize_obs": True}),
    "mingru": (MANY, MultiDiscrete((2, 4)), {"memory": "mingru"}),
    "lru": (MANY, MultiDiscrete((2, 4)), {"memory": "lru"}),
    "gtrxl": (masked(4), Discrete(4), {"memory": "gtrxl", "memory_window": 3}),
    "gru-own-module": (VECTOR, Discrete(3), {"memory": "gru", "network": Doubled()}),
}


def registered(observation_space, action_space):
    """Its name for `Config.env`."""
    name = f"noise:{hash((observation_space, action_space))}"
    if name not in envs.names():
        envs.register(name, lambda: random_env(observation_space, action_space))
    return name


def config_of(case, **changes):
    observation_space, action_space, fields = CASES[case]
    fields = {"num_envs": 4, "num_steps": 8} | fields
    if "memory" in fields:
        fields["memory_size"] = 8
    if not isinstance(fields.get("network"), nn.Module):
        fields["hidden_sizes"] = (8,)
    return Config(
        env=registered(observation_space, action_space),
        total_timesteps=4 * 32,
        **(fields | {"num_minibatches": 2} | changes),
    )


class Collected(NamedTuple):
    """A policy, and the batch of its second rollout."""

    spec: PolicySpec
    policy: Policy
    batch: Batch


@functools.cache
def collected(case):
    config = complete_config(config_of(case, normalize_reward=False))
    env = envs.make(config.env)
    spec = make_spec(config, env)
    reset_key, init_key, *keys = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def start():
        state = reset(
            env,
            (),
            reset_key,
            num_envs=config.num_envs,
            recurrent_state=initial_recurrent_state(spec, (config.num_envs,)),
        )
        params = init_params(spec, init_key, state.obs)
        # Larger weights than at the start, so that nothing is uniform by chance.
        shifted = jax.tree.map(
            lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
        )
        obs_stats = initial_obs_stats(env.observation_space) if config.normalize_obs else None
        return shifted, state, Statistics(obs_stats)

    @jax.jit
    def once(params, state, statistics, key):
        policy = Policy(params, statistics.obs, spec=spec)
        return collect(
            policy,
            state,
            statistics,
            config=config,
            algorithm=get_algorithm(config.algorithm),
            env=env,
            env_params=(),
            hparams=complete_hparams(None, config),
            key=key,
            shard=Shard(config.num_envs),
        )

    params, state, statistics = start()
    first = once(params, state, statistics, keys[0])
    second = once(params, first.rollout, first.statistics, keys[1])
    return Collected(spec, Policy(params, first.statistics.obs, spec=spec), second.batch)


def some(names, chosen):
    """All of them, but only the chosen ones where time is short."""
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


ALIKE = (
    "resnet",
    "own-module",
    "gaussian-state-dependent",
    "gru-own-module",
    "bytes",
    "integer",
    "image-flat",
)
"""Cases whose code other cases run as well."""


@pytest.mark.parametrize("case", some(CASES, set(CASES) - set(ALIKE)))
def test_the_ratio_is_one_before_the_first_update(case):
    spec, policy, batch = collected(case)
    config = complete_config(config_of(case))
    objective = get_algorithm(config.algorithm).objective
    losses = Losses(config, spec, objective, Shard(config.num_envs))
    log_ratio, kl = jax.jit(
        lambda params, batch: (losses.log_ratio(params, batch), losses.kl(params, batch))
    )(policy.params, batch)
    np.testing.assert_allclose(log_ratio, np.zeros_like(log_ratio), atol=1e-5)
    np.testing.assert_allclose(kl, 0.0, atol=1e-5)
    assert np.std(batch.log_prob) > 1e-3  # the test would see another distribution


QUICK = ("many", "own-module-shared", "beta", "lstm-normalized")


@pytest.mark.parametrize("case", some(CASES, QUICK))
def test_every_policy_trains_and_acts(case, tmp_path):
    config = config_of(case)
    trainer = make_trainer(config)
    state, metrics = jax.jit(trainer.run)(jax.random.key(0))
    for name, values in metrics.items():
        if not name.startswith("episode/"):
            assert np.isfinite(values).all(), name
    policy = trainer.policy(state)
    save_policy(policy, tmp_path / "policy")
    network = None if isinstance(config.network, str) else config.network
    loaded = load_policy(tmp_path / "policy", network)
    assert loaded.spec == policy.spec
    acting = jax.jit(
        lambda policy: evaluate(policy, trainer.env, (), jax.random.key(1), 8, greedy=False)
    )
    np.testing.assert_array_equal(acting(loaded).returns, acting(policy).returns)


ROWS = [name for name, row in ALGORITHMS.items() if not row.whole_episodes]
PAIRS = [
    pytest.param(case, row, marks=[] if row == quick else pytest.mark.slow)
    for case, quick in {
        "multi-discrete-masked": "trpo",
        "tanh": "ppo_adaptive",
        "beta": "trpo",
        "gru": "trpo",
    }.items()
    for row in ROWS
]


@pytest.mark.parametrize(("case", "algorithm"), PAIRS)
def test_every_algorithm_takes_every_kind_of_policy(case, algorithm):
    used = {"num_minibatches": 2} if "num_minibatches" in ALGORITHMS[algorithm].settings else {}
    trainer = make_trainer(config_of(case, algorithm=algorithm, **{"num_minibatches": None} | used))

    def first_update(key):
        state = trainer.init(key)
        after, metrics = trainer.step(state)
        return state.learner.params, after.learner.params, metrics

    before, after, metrics = jax.jit(first_update)(jax.random.key(0))
    for name, value in metrics.items():
        assert name.startswith("episode/") or np.isfinite(value), name
    for part in ("actor_out", "critic_out"):
        old, new = (np.asarray(x["params"][part]["kernel"]) for x in (before, after))
        assert np.isfinite(new).all()
        assert not np.array_equal(old, new)


def test_actor_and_critic_see_what_they_are_shown():
    spec, policy, batch = collected("asymmetric")

    def gradient(part):
        def total(far, near):
            obs = {**batch.obs, "far": far, "near": (batch.obs["near"][0], near)}
            return jnp.sum(policy.action_params(obs) if part == "actor" else policy.value(obs))

        grads = jax.grad(total, argnums=(0, 1))(batch.obs["far"], batch.obs["near"][1])
        return [float(jnp.abs(x).max()) for x in grads]

    assert spec.actor_keys == ("far",)
    far, near = gradient("actor")
    assert far > 0
    assert near == 0
    far, near = gradient("critic")
    assert far == 0
    assert near > 0


@pytest.mark.parametrize("case", ["masked", "multi-discrete-masked", "lstm"])
def test_a_masked_action_is_never_taken(case):
    spec, _, batch = collected(case)
    mask, action = np.asarray(batch.obs["action_mask"]), np.asarray(batch.action)
    sizes = spec.action_space.num_values
    if isinstance(sizes, int):
        mask, action = mask[..., None, :], action[..., None]
    else:
        starts = np.cumsum(sizes)[:-1]
        parts = np.split(mask, starts, axis=-1)
        widest = max(sizes)
        pads = [[(0, 0)] * (mask.ndim - 1) + [(0, widest - part.shape[-1])] for part in parts]
        mask = np.stack([np.pad(p, w) for p, w in zip(parts, pads, strict=True)], axis=-2)
    allowed = np.take_along_axis(mask, action[..., None], axis=-1)
    # Where nothing of a part is allowed, anything is.
    assert (allowed[..., 0] | ~mask.any(-1)).all()
    assert not mask.all()


def test_observations_keep_their_dtype_in_the_trajectory():
    for case, dtype in (("image", jnp.bool_), ("embedded", jnp.int32)):
        assert collected(case).batch.obs.dtype == dtype


def test_a_normalized_observation_has_the_statistics_of_the_rollout_before():
    _, policy, batch = collected("normalized")
    far = policy.obs_stats[0]
    assert far.num_samples == 32
    assert abs(np.mean(batch.obs["far"])) < 0.5  # raw observations have mean 3, deviation 2
    assert 0.7 < np.std(batch.obs["far"]) < 1.4
    assert policy.obs_stats[1] is None  # an integer
    assert batch.obs["seen"].dtype == jnp.bool_


class TwoOutputs(nn.Module):
    def __call__(self, obs):
        return obs, obs


class BatchNorm(nn.Module):
    @nn.compact
    def __call__(self, obs):
        return nn.BatchNorm(use_running_average=False)(obs)


class Flat(nn.Module):
    def __call__(self, obs):
        return obs.reshape(-1)


class Failing(nn.Module):
    @nn.compact
    def __call__(self, obs):
        return nn.Dense(3)(obs["position"])


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("resnet", "unknown network 'resnet'. Known: cnn, impala_cnn"),
        (TwoOutputs(), r"features \[B, F\]; TwoOutputs maps .* Return one floating-point array"),
        (Flat(), r"Flat maps a batch of 3 of .*shape=\(9,\).* Return one"),
        (
            BatchNorm(),
            "no other collections; BatchNorm has batch_stats, params.*LayerNorm",
        ),
        (Failing(), "Failing fails for a batch of 3"),
        (nn.tanh, "must be a name or a flax.linen module; got"),
    ],
)
def test_a_module_that_breaks_the_contract_is_told_so(network, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(Config(env=registered(VECTOR, Discrete(3)), network=network))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"network": Doubled(), "hidden_sizes": (8,)},
            "hidden_sizes shapes the package's own networks",
        ),
        ({"embedding_size": 4}, "embedding_size needs observations with integers"),
        ({"memory_size": 4}, "memory_size needs a memory; got 4 and none. Set memory, to gru"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(Config(env=registered(VECTOR, Discrete(3)), **fields))


class Listed(nn.Module):
    sizes: tuple = ()

    def __call__(self, obs):
        return obs


def test_a_module_with_a_list_is_told_to_use_tuples():
    with pytest.raises(ConfigError, match="must be hashable; a field of Listed is not. Use tuples"):
        make_trainer(Config(env=registered(VECTOR, Discrete(3)), network=Listed([1, np.zeros(2)])))


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ((masked(3), Discrete(4)), r"one entry for each action, \(4,\)"),
        ((masked(4), MultiDiscrete((2, 3))), r"one entry for each action, \(5,\)"),
        ((masked(2), BOUNDED), "an action_mask needs actions that are integers"),
        ((VECTOR, Tuple((Discrete(2),))), "actions must be Discrete, MultiDiscrete or a Box"),
    ],
)
def test_spaces_that_do_not_fit_are_told_so(spaces, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(Config(env=registered(*spaces)))


def test_a_policy_with_a_module_asks_for_it_when_loaded(tmp_path):
    save_policy(collected("own-module").policy, tmp_path / "policy")
    with pytest.raises(ConfigError, match=r"it names a module: Doubled. Pass that module"):
        load_policy(tmp_path / "policy")
