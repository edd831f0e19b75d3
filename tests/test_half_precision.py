"""Hidden layers in half precision: derivatives, types and refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, make_trainer
from ppo_jax.policy.networks import _DERIVATIVES, CNN, MLP, Dense
from tests.test_learning import PUREJAXRL, evaluate_seeds
from tests.test_spaces import Doubled, config_of

B, H = 512, 16
ACTIVATIONS = ("tanh", "relu", "elu", "gelu", "silu")


def network(dtype, activation="tanh", layer_norm=False):
    return MLP((H, H), getattr(nn, activation), layer_norm, dtype)


def params_and_inputs():
    x = jax.random.normal(jax.random.key(0), (B, 6))
    drawn = network(None).init(jax.random.key(1), x)
    keys = iter(jax.random.split(jax.random.key(2), 8))
    return jax.tree.map(lambda p: 0.4 * jax.random.normal(next(keys), p.shape), drawn), x


def loss_of(module, x):
    return lambda params: jnp.mean(jnp.sum(module.apply(params, x).astype(jnp.float32), -1) ** 2)


def relative_error(found, expected):
    found, expected = (
        jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(t)]) for t in (found, expected)
    )
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_single_precision_but_for_rounding(activation):
    params, x = params_and_inputs()
    expected = jax.jit(jax.grad(loss_of(network(None, activation), x)))(params)
    loss = loss_of(network(jnp.bfloat16, activation), x)
    found = jax.jit(jax.grad(loss))(params)
    assert jax.tree.map(lambda g: g.dtype, found) == jax.tree.map(lambda g: g.dtype, expected)
    assert 0.0 < relative_error(found, expected) < 2e-2
    # TRPO differentiates forwards as well.
    _, slope = jax.jit(lambda p: jax.jvp(loss, (p,), (expected,)))(params)
    products = jax.tree.map(jnp.vdot, expected, expected)
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(products)), rtol=2e-2)


@pytest.mark.parametrize("activation", _DERIVATIVES)
def test_derivatives_follow_from_values(activation):
    x = jnp.linspace(-3.0, 3.0, 42)
    expected = jax.vmap(jax.grad(activation))(x)
    np.testing.assert_allclose(_DERIVATIVES[activation](activation(x)), expected, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.tanh, nn.silu])
def test_gradients_of_biases_are_summed_in_single_precision(activation):
    # A sum in half precision would stop growing at 256.
    samples = 4096
    layer = Dense(1, jnp.bfloat16, activation)
    params = {"params": {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}}
    x = jnp.ones((samples, 2))
    gradient = jax.grad(lambda p: jnp.sum(layer.apply(p, x).astype(jnp.float32)))(params)
    assert gradient["params"]["bias"] == samples * jax.grad(activation)(0.0)


def test_convolutions_are_computed_in_half_precision():
    x = jax.random.normal(jax.random.key(0), (3, 6, 6, 2))
    single = CNN(((4, 3, 1),), nn.relu)
    params = single.init(jax.random.key(1), x)
    half = CNN(((4, 3, 1),), nn.relu, jnp.bfloat16)
    assert half.apply(params, x).dtype == jnp.bfloat16
    np.testing.assert_allclose(half.apply(params, x), single.apply(params, x), atol=5e-2)


def test_parameters_statistics_and_optimiser_are_single_precision():
    trainer = make_trainer(config_of("half", normalize_obs=True))
    state = jax.eval_shape(trainer.init, jax.random.key(0))
    assert not [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    batch = jax.ShapeDtypeStruct((5, 3), jnp.float32)
    policy = jax.eval_shape(trainer.policy, state)
    for output in jax.tree.leaves(
        jax.eval_shape(lambda p, x: (p.action_params(x), p.value(x)), policy, batch)
    ):
        assert output.dtype == jnp.float32


def test_a_setting_that_would_be_ignored_is_refused():
    with pytest.raises(
        ConfigError, match=r"compute_dtype needs hidden layers.*Leave compute_dtype"
    ):
        Config(compute_dtype="bfloat16", hidden_sizes=())
    with pytest.raises(ConfigError, match="compute_dtype shapes the package's own networks"):
        make_trainer(Config(compute_dtype="bfloat16", network=Doubled()))
    with pytest.raises(ConfigError, match="float16"):
        Config(compute_dtype="float16")


@pytest.mark.slow
def test_cartpole_is_learned_in_half_precision():
    config = PUREJAXRL.replace(compute_dtype="bfloat16")
    returns = evaluate_seeds(config, None, num_seeds=8)
    assert returns.min() >= 475, returns
