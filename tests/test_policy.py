import dataclasses
from typing import get_args, get_type_hints

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ppo_jax.config import Config
from ppo_jax.envs.checks import example
from ppo_jax.envs.spaces import Box, Dict, Discrete, Tuple
from ppo_jax.errors import ConfigError
from ppo_jax.policy.distributions import GaussianParams, make_head
from ppo_jax.policy.initializers import draw, orthogonal_matrices
from ppo_jax.policy.networks import Conv
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import PolicySpec, init_params, network_of
from ppo_jax.runs.policy_files import load_policy, save_policy

_SHAPES = [(64, 64), (4, 64), (64, 2), (64, 1), (300, 64), (1, 1)]


def _drawn(shapes, *, seed, count):
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.jit(jax.vmap(lambda key: orthogonal_matrices(key, shapes)))(keys)


def test_orthogonal_matrices_are_orthogonal():
    for shape, x in zip(_SHAPES, map(np.asarray, _drawn(_SHAPES, seed=0, count=50)), strict=True):
        assert x.shape == (50, *shape)
        if shape[0] < shape[1]:
            x = x.transpose(0, 2, 1)
        gram = x.transpose(0, 2, 1) @ x
        np.testing.assert_allclose(gram, np.tile(np.eye(min(shape)), (50, 1, 1)), atol=1e-5)


def test_orthogonal_matrices_have_no_preferred_direction_and_nothing_to_do_with_each_other():
    first, second = map(np.asarray, _drawn([(3, 3), (3, 3)], seed=1, count=20_000))
    for x in (first, second):
        np.testing.assert_allclose(x.mean(0), np.zeros((3, 3)), atol=0.02)
        np.testing.assert_allclose((x**2).mean(0), np.full((3, 3), 1 / 3), atol=0.01)
        # The first entry of a uniform unit vector in three dimensions is uniform on [-1, 1].
        assert scipy.stats.kstest(x[:, 0, 0], scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    products = np.einsum("kij,klm->ijlm", first, second) / 20_000
    np.testing.assert_allclose(products, np.zeros((3, 3, 3, 3)), atol=0.02)


@pytest.mark.parametrize("memory", [None, "gru", "lstm", "mingru", "lru", "gtrxl"])
def test_every_kernel_is_drawn_and_units_vary_as_their_inputs_do(memory):
    spec = PolicySpec(
        observation_space=Box((4,)),
        action_space=Discrete(2),
        memory=memory,
        memory_size=None if memory is None else 64,
    )
    params = jax.jit(lambda key: init_params(spec, key, jnp.zeros((3, 4))))(jax.random.key(0))
    kernels = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.ndim == 2 and "bias" not in path[-1].key
    }
    # None is still a box. Those of attention have names of their own.
    assert all(name.endswith("['kernel']") or "['attention']" in name for name in kernels)
    assert all(np.abs(kernel).min() > 0.0 for kernel in kernels.values())
    # Mean squares of a unit's weights times its inputs: what inputs of deviation 1 make of it.
    variances = {name: (k**2).mean() * k.shape[0] for name, k in kernels.items()}
    gains = {"actor_out": 1e-4, "critic_out": 1.0, "torso": 2.0}
    for part, variance in gains.items():
        found = [value for name, value in variances.items() if part in name]
        assert found
        np.testing.assert_allclose(found, variance * np.ones(len(found)), rtol=1e-4)


def test_categorical_head():
    head = make_head(Discrete(3))
    probabilities = np.array([0.2, 0.5, 0.3])
    logits = jnp.log(probabilities) + 1.0
    noise = head.noise(jax.random.key(0), (100_000,))
    actions = head.sample(jnp.tile(logits[None], (100_000, 1)), noise)
    frequencies = np.bincount(actions, minlength=3) / 100_000
    np.testing.assert_allclose(frequencies, probabilities, atol=0.01)
    assert head.mode(logits) == 1
    distribution = head.distribution(jnp.tile(logits[None], (3, 1)))
    log_prob = distribution.log_prob(jnp.arange(3))
    np.testing.assert_allclose(log_prob, np.log(probabilities), rtol=1e-5)
    entropy = scipy.stats.entropy(probabilities)
    np.testing.assert_allclose(distribution.entropy(), entropy, rtol=1e-5)


def test_a_categorical_distribution_and_its_gradients_are_distrax_s():
    keys = jax.random.split(jax.random.key(0), 3)
    logits, others = (3.0 * jax.random.normal(key, (50, 5)) for key in keys[:2])
    action = jax.random.randint(keys[2], (50,), 0, 5)
    head = make_head(Discrete(5))

    def answers(make, logits):
        p, q = make(logits), make(others)
        terms = p.log_prob(action), p.entropy(), p.kl_divergence(q), q.kl_divergence(p)
        return jnp.stack(terms)

    def oracle(logits):
        return distrax.Categorical(logits=logits)

    for function in (answers, jax.jacrev(answers, argnums=1)):
        ours, theirs = function(head.distribution, logits), function(oracle, logits)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_gaussian_head(shape):
    head = make_head(Box(shape))
    size = int(np.prod(shape))
    outputs = jnp.linspace(-1.0, 1.0, 5 * size).reshape(5, size)
    params = head.parametrize(outputs, jnp.full(shape, 0.3))
    assert head.num_outputs == size
    assert params.mean.shape == (5, *shape)
    action = head.sample(params, head.noise(jax.random.key(0), (5,)))
    scale = np.exp(0.3)
    oracle = scipy.stats.norm(params.mean, scale)
    axes = tuple(range(1, 1 + len(shape)))
    distribution = head.distribution(params)
    np.testing.assert_allclose(
        distribution.log_prob(action), oracle.logpdf(action).sum(axes), rtol=1e-4
    )
    np.testing.assert_allclose(distribution.entropy(), oracle.entropy().sum(axes), rtol=1e-5)
    np.testing.assert_array_equal(head.mode(params), params.mean)
    many = GaussianParams(jnp.zeros((50_000, *shape)), jnp.full((50_000, *shape), 0.3))
    samples = np.asarray(head.sample(many, head.noise(jax.random.key(1), (50_000,))))
    np.testing.assert_allclose(samples.std(0), np.full(shape, scale), rtol=0.03)


def make_policy(space, shared_torso=False):
    spec = PolicySpec(
        observation_space=Box((2, 3), "uint8"),
        action_space=space,
        hidden_sizes=(8, 8),
        activation="relu",
        shared_torso=shared_torso,
    )
    params = init_params(spec, jax.random.key(0), jnp.zeros((1, 2, 3), jnp.uint8))
    return Policy(params=params, spec=spec)


@pytest.mark.parametrize("space", [Discrete(4), Box((2,))])
@pytest.mark.parametrize("shared_torso", [False, True])
def test_a_policy_survives_saving(tmp_path, space, shared_torso):
    policy = make_policy(space, shared_torso)
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    assert loaded.spec == policy.spec
    assert isinstance(hash(loaded.spec), int)
    obs = jnp.arange(6, dtype=jnp.uint8).reshape(2, 3)
    np.testing.assert_array_equal(loaded(obs), policy(obs))
    key = jax.random.key(3)
    np.testing.assert_array_equal(loaded(obs, key), policy(obs, key))
    np.testing.assert_array_equal(loaded.value(obs), policy.value(obs))


@pytest.mark.parametrize("shared_torso", [False, True])
def test_actor_and_critic_alone_agree_with_both_together(shared_torso):
    policy = make_policy(Discrete(4), shared_torso)
    obs = jnp.arange(24, dtype=jnp.uint8).reshape(4, 2, 3)
    logits, value = network_of(policy.spec).apply(policy.params, obs)
    np.testing.assert_allclose(policy.action_params(obs), logits, rtol=1e-5)
    np.testing.assert_allclose(policy.value(obs), value, rtol=1e-5)
    torsos = {name for name in policy.params["params"] if name.endswith("torso")}
    assert torsos == ({"actor_torso"} if shared_torso else {"actor_torso", "critic_torso"})


def test_the_critic_can_have_widths_of_its_own():
    spec = PolicySpec(
        observation_space=Box((3,)),
        action_space=Discrete(2),
        hidden_sizes=[7, 6],
        critic_hidden_sizes=[5],
    )
    params = init_params(spec, jax.random.key(0), jnp.zeros((1, 3)))["params"]
    shapes = {
        torso: [layer["kernel"].shape for _, layer in sorted(params[torso]["MLP_0"].items())]
        for torso in ("actor_torso", "critic_torso")
    }
    assert shapes == {"actor_torso": [(3, 7), (7, 6)], "critic_torso": [(3, 5)]}
    assert params["actor_out"]["kernel"].shape == (6, 2)
    assert params["critic_out"]["kernel"].shape == (5, 1)
    # No hidden layers are a choice as well, which None is not.
    linear = dataclasses.replace(spec, critic_hidden_sizes=())
    params = init_params(linear, jax.random.key(0), jnp.zeros((1, 3)))["params"]
    assert params["critic_out"]["kernel"].shape == (3, 1)


def test_the_first_policy_is_nearly_uniform():
    policy = make_policy(Discrete(4))
    logits = policy.action_params(jnp.full((2, 3), 9, jnp.uint8))
    assert jnp.max(jnp.abs(logits)) < 0.5


def test_activations_of_the_config_exist_in_flax():
    import flax.linen as nn

    for name in get_args(get_type_hints(Config)["activation"]):
        assert callable(getattr(nn, name))


@pytest.mark.parametrize("num_images", [3, 4])
@pytest.mark.parametrize(
    ("kernel", "stride", "pads", "channels"),
    [(3, 1, False, 3), (4, 2, False, 3), (3, 1, True, 3), (8, 2, False, 4)],
)
def test_a_convolution_and_its_gradients_are_those_of_the_compiler(
    kernel, stride, pads, channels, num_images
):
    layer = Conv(5, kernel, stride, pads)
    x = jax.random.normal(jax.random.key(0), (num_images, 10, 9, channels))
    params = draw(jax.random.key(2), layer.init(jax.random.key(1), x))

    def theirs(params, x):
        matrix = params["params"]["Dense_0"]["kernel"]
        outputs = jax.lax.conv_general_dilated(
            x,
            matrix.reshape(kernel, kernel, channels, 5),
            (stride, stride),
            "SAME" if pads else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return outputs + params["params"]["Dense_0"]["bias"].reshape(1, 1, 1, -1)

    expected, their_gradient = jax.vjp(theirs, params, x)
    found, gradient = jax.vjp(layer.apply, params, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    cotangent = jax.random.normal(jax.random.key(3), expected.shape)
    for ours, theirs_ in zip(
        jax.tree.leaves(gradient(cotangent)),
        jax.tree.leaves(their_gradient(cotangent)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs_, rtol=1e-4, atol=1e-4)


def test_bytes_become_numbers_in_the_patches():
    layer = Conv(5, 3)
    x = jax.random.bits(jax.random.key(0), (2, 10, 9, 3), jnp.uint8)
    params = layer.init(jax.random.key(1), x)
    found = layer.apply(params, x)
    np.testing.assert_array_equal(found, layer.apply(params, x.astype(jnp.float32) / 255))


def as_lists(tree):
    return jax.tree.map(lambda x: np.asarray(x).tolist(), tree)


@pytest.mark.parametrize("memory", [None, "gru"])
@pytest.mark.parametrize(
    "space",
    [
        Box((3,)),
        Discrete(4),
        Dict.of({"arm": Box((2, 2)), "goal": Discrete(3)}),
        Tuple((Box((2,)), Dict.of({"x": Box(())}))),
    ],
    ids=["box", "discrete", "dict", "tuple"],
)
def test_a_policy_takes_arrays_and_lists_single_and_in_batches(space, memory):
    spec = PolicySpec(observation_space=space, action_space=Discrete(5), memory=memory)
    rng = np.random.default_rng(0)
    batch = jax.tree.map(
        lambda x: (
            np.array(rng.integers(0, 3, x.shape), x.dtype)
            if jnp.issubdtype(x.dtype, jnp.integer)
            else np.array(rng.normal(size=x.shape), x.dtype)
        ),
        example(space, (6,)),
    )
    params = init_params(spec, jax.random.key(0), jax.tree.map(jnp.asarray, batch))
    policy = Policy(jax.tree.map(lambda x: x + 0.3, params), spec=spec)
    state = policy.initial_recurrent_state((6,))
    expected, _ = policy.act(jax.tree.map(jnp.asarray, batch), state)
    assert expected.shape == (6,)
    np.testing.assert_array_equal(policy.act(batch, state)[0], expected)
    np.testing.assert_array_equal(policy.act(as_lists(batch), state)[0], expected)
    # No observation at all, as from an empty selection of a data set.
    empty = jax.tree.map(lambda x: x[:0], batch)
    assert policy.act(empty, policy.initial_recurrent_state((0,)))[0].shape == (0,)
    # Two batch axes, and none.
    folded = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), batch)
    action, _ = policy.act(as_lists(folded), policy.initial_recurrent_state((2, 3)))
    np.testing.assert_array_equal(action, expected.reshape(2, 3))
    for i in range(6):
        single = as_lists(jax.tree.map(lambda x, i=i: x[i], batch))
        action, _ = policy.act(single, policy.initial_recurrent_state())
        assert action.shape == ()
        assert action == expected[i]
    if isinstance(space, Discrete):  # any shape is a batch of numbers
        return
    with pytest.raises(ConfigError, match="obs must have the shapes of the observation space"):
        policy.act([[0.0] * 7], policy.initial_recurrent_state())


def test_a_policy_that_cannot_act_on_an_observation_says_why():
    spec = PolicySpec(observation_space=Box((3,)), action_space=Discrete(5), memory="gru")
    obs = jnp.ones((2, 3))
    policy = Policy(init_params(spec, jax.random.key(0), obs), spec=spec)
    with pytest.raises(ConfigError, match=r"axes of obs, \(2,\); .*recurrent_state\(\(2,\)\)"):
        policy.act(obs, policy.initial_recurrent_state())
    of_seeds = jax.tree.map(lambda x: jnp.stack([x, x]), policy)
    with pytest.raises(ConfigError, match=r"one seed; .*jax.tree.map\(lambda x: x\[0\], policy\)"):
        of_seeds.act(obs, policy.initial_recurrent_state((2,)))


@pytest.mark.parametrize("network", ["mlp", "minatar_cnn"])
def test_bytes_are_the_same_image_in_every_integer_dtype(network):
    space = Box((6, 6, 3), "uint8")
    spec = PolicySpec(observation_space=space, action_space=Discrete(5), network=network)
    obs = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8)
    policy = Policy(init_params(spec, jax.random.key(0), jnp.asarray(obs)), spec=spec)
    key = jax.random.key(1)
    expected = jax.vmap(policy, in_axes=(None, 0))(obs, jax.random.split(key, 64))
    assert len(np.unique(expected)) > 1
    for same in (obs.tolist(), obs.astype(np.int32), jnp.asarray(obs, jnp.int16)):
        found = jax.vmap(lambda k, same=same: policy(same, k))(jax.random.split(key, 64))
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(
        ConfigError, match="integers from 0 to 255.*got float32. Pass them as uint8"
    ):
        policy(obs / 255.0)
