"""Heads against SciPy, integrals and Monte Carlo."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from ppo_jax import Config, ConfigError, HParams, make_trainer
from ppo_jax.envs.spaces import Box, Discrete, MultiDiscrete
from ppo_jax.policy.distributions import MASKED, Categorical, make_head

LOW, HIGH = np.array([-1.0, 0.0, 2.0]), np.array([3.0, 0.5, 2.5])
SPACE = Box((3,), low=tuple(LOW), high=tuple(HIGH))
CONTINUOUS = {
    "gaussian": {},
    "state-dependent": {"state_dependent_std": True},
    "tanh": {"distribution": "tanh_gaussian"},
    "tanh-state-dependent": {"distribution": "tanh_gaussian", "state_dependent_std": True},
    "beta": {"distribution": "beta"},
}
DRAWS = 100_000


def params_of(head, seed, scale=1.0):
    outputs = scale * jax.random.normal(jax.random.key(seed), (head.num_outputs,))
    log_std = None if head.log_std_shape is None else jnp.full(head.log_std_shape, -0.3)
    return head.parametrize(outputs, log_std)


def draw(head, params, seed=0):
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (DRAWS, *x.shape)), params)
    noise = head.noise(jax.random.key(seed), (DRAWS,))
    return jax.jit(head.sample)(many, noise), head.distribution(many)


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_entropy_and_kl_of_a_continuous_head_are_their_monte_carlo_estimates(kind):
    head = make_head(SPACE, **CONTINUOUS[kind])
    params, others = params_of(head, 1), params_of(head, 2)
    actions, distribution = draw(head, params)
    log_prob = np.asarray(distribution.log_prob(actions))
    error = log_prob.std() / np.sqrt(DRAWS)
    exact = head.distribution(params)
    assert abs(-log_prob.mean() - exact.entropy()) < 4 * error
    other = head.distribution(jax.tree.map(lambda x: x[None], others))
    log_ratio = log_prob - np.asarray(other.log_prob(actions))
    kl = exact.kl_divergence(head.distribution(others))
    assert kl > 0.1
    assert abs(log_ratio.mean() - kl) < 4 * log_ratio.std() / np.sqrt(DRAWS)


@pytest.mark.parametrize("kind", ["tanh", "beta"])
def test_bounded_actions_stay_in_bounds_and_fill_them(kind):
    head = make_head(SPACE, **CONTINUOUS[kind])
    actions, _ = draw(head, params_of(head, 3, scale=3.0))
    seen = np.asarray(head.to_env(actions))
    assert (seen >= LOW - 1e-6).all()
    assert (seen <= HIGH + 1e-6).all()
    assert np.isfinite(head.distribution(params_of(head, 3, scale=3.0)).log_prob(actions[0]))
    wide, _ = draw(
        head,
        jax.tree.map(jnp.zeros_like, params_of(head, 3))
        if kind == "tanh"
        else params_of(head, 3, scale=0.0),
    )
    spread = np.ptp(np.asarray(head.to_env(wide)), axis=0)
    np.testing.assert_array_less(0.85 * (HIGH - LOW), spread)


@pytest.mark.parametrize("kind", ["tanh", "beta"])
def test_the_density_of_the_action_that_the_environment_sees_integrates_to_one(kind):
    low, high = -1.0, 3.0
    head = make_head(Box((), low=(low,), high=(high,)), CONTINUOUS[kind]["distribution"])
    outputs = jnp.array([0.4, -0.2])[: head.num_outputs]
    log_std = None if head.log_std_shape is None else jnp.array(-0.5)
    distribution = head.distribution(head.parametrize(outputs, log_std))
    unit = np.linspace(0.0, 1.0, 20_001)[1:-1]
    action = np.arctanh(2 * unit - 1) if kind == "tanh" else unit
    seen = head.to_env(jnp.asarray(action, jnp.float32))
    np.testing.assert_allclose(seen, low + (high - low) * unit, atol=1e-5)
    density = np.exp(np.asarray(jax.vmap(distribution.log_prob)(jnp.asarray(action, jnp.float32))))
    total = scipy.integrate.trapezoid(density, low + (high - low) * unit)
    np.testing.assert_allclose(total, 1.0, rtol=1e-3)


def test_beta_is_scipy_s():
    head = make_head(SPACE, "beta")
    params = params_of(head, 1)
    actions, distribution = draw(head, params)
    oracle = scipy.stats.beta(params.alpha, params.beta, loc=LOW, scale=HIGH - LOW)
    seen = np.asarray(head.to_env(actions[:50]), np.float64)
    expected = oracle.logpdf(seen).sum(-1)
    np.testing.assert_allclose(distribution.log_prob(actions)[:50], expected, rtol=2e-3, atol=2e-3)
    exact = head.distribution(params)
    np.testing.assert_allclose(exact.entropy(), oracle.entropy().sum(), rtol=1e-4)
    mode = np.asarray(head.mode(params))
    near = [oracle.logpdf(LOW + (HIGH - LOW) * (mode + shift)) for shift in (-0.01, 0.0, 0.01)]
    assert (near[1] > near[0]).all()
    assert (near[1] > near[2]).all()


def test_tanh_gaussian_is_distrax_s_where_tanh_can_be_inverted():
    head = make_head(Box((2,), low=(-1.0, -1.0), high=(1.0, 1.0)), "tanh_gaussian")
    params = head.parametrize(jnp.array([0.3, -0.4]), jnp.array([-0.7, 0.1]))
    oracle = distrax.Transformed(
        distrax.Normal(params.mean, jnp.exp(params.log_std)), distrax.Tanh()
    )
    action = jnp.array([0.5, -0.2])
    expected = oracle.log_prob(jnp.tanh(action)).sum()
    np.testing.assert_allclose(head.distribution(params).log_prob(action), expected, rtol=1e-4)


def test_a_beta_takes_random_keys_of_both_kinds():
    head = make_head(Box((2,), low=(-1.0, -1.0), high=(1.0, 1.0)), distribution="beta")
    params = head.parametrize(jnp.zeros((3, 4)), None)
    new, old = (
        head.sample(params, head.noise(make_key(0), (3,)))
        for make_key in (jax.random.key, jax.random.PRNGKey)
    )
    np.testing.assert_array_equal(new, old)


def test_the_mode_of_a_beta_that_has_become_uniform_is_the_middle():
    head = make_head(SPACE, "beta")
    for x in (-16.0, -20.0, -100.0):
        np.testing.assert_allclose(head.mode(head.parametrize(jnp.full(6, x), None)), 0.5)


def test_far_out_a_tanh_gaussian_stays_finite():
    head = make_head(SPACE, "tanh_gaussian")

    def log_prob(x):
        params = head.parametrize(jnp.full(3, x), jnp.zeros(3))
        distribution = head.distribution(params)
        return distribution.log_prob(params.mean) + distribution.entropy()

    for x in (-50.0, 50.0):
        value, gradient = jax.value_and_grad(log_prob)(x)
        assert np.isfinite([value, gradient]).all()


@pytest.mark.parametrize("mean", [0.0, 0.7, -4.0])
@pytest.mark.parametrize("log_std", [-6.0, -2.0, 0.0, 1.0, 2.0, 3.0])
def test_the_entropy_of_a_squashed_gaussian_and_its_slope_are_the_integral_s(mean, log_std):
    head = make_head(Box((), low=(-1.0,), high=(1.0,)), "tanh_gaussian")

    def entropy(log_std):
        return head.distribution(head.parametrize(jnp.array([mean]), log_std)).entropy()

    def exact(log_std):
        normal = scipy.stats.norm(mean, np.exp(log_std))
        log_cosh = lambda x: np.logaddexp(x, -x) - np.log(2)  # noqa: E731
        ends = normal.interval(1 - 1e-15)
        ends = [*ends, np.clip(0.0, *ends)]
        expected = scipy.integrate.quad(
            lambda x: normal.pdf(x) * 2 * log_cosh(x), min(ends), max(ends), points=ends, limit=500
        )
        return normal.entropy() - expected[0]

    value, slope = jax.value_and_grad(entropy)(jnp.array(log_std))
    np.testing.assert_allclose(value, exact(log_std), atol=2e-4)
    central = (exact(log_std + 1e-3) - exact(log_std - 1e-3)) / 2e-3
    np.testing.assert_allclose(slope, central, atol=2e-3)


def test_multi_discrete_is_categoricals_in_a_row():
    sizes = (2, 4, 3)
    head = make_head(MultiDiscrete(sizes))
    outputs, others = jax.random.normal(jax.random.key(0), (2, 7, sum(sizes)))
    params, distribution = (
        head.parametrize(outputs, None),
        head.distribution(head.parametrize(outputs, None)),
    )
    action = head.sample(params, head.noise(jax.random.key(1), (7,)))
    assert action.shape == (7, 3)
    other = head.distribution(head.parametrize(others, None))
    log_prob = entropy = kl = 0.0
    starts = np.cumsum((0, *sizes))
    for i, size in enumerate(sizes):
        part = slice(starts[i], starts[i] + size)
        one, two = (distrax.Categorical(logits=x[:, part]) for x in (outputs, others))
        assert (action[:, i] < size).all()
        log_prob += one.log_prob(action[:, i])
        entropy += one.entropy()
        kl += one.kl_divergence(two)
    np.testing.assert_allclose(distribution.log_prob(action), log_prob, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(distribution.entropy(), entropy, rtol=1e-4)
    np.testing.assert_allclose(distribution.kl_divergence(other), kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(head.mode(params)[:, 1], jnp.argmax(outputs[:, 2:6], axis=-1))


def test_a_mask_gives_exactly_no_probability_and_finite_gradients():
    allowed = jnp.array([True, False, True, False])

    def terms(logits):
        p, q = (
            Categorical(jax.nn.log_softmax(jnp.where(allowed, x, MASKED)))
            for x in (logits, 2.0 * logits)
        )
        return p.entropy() + p.kl_divergence(q) + p.log_prob(jnp.array(2))

    logits = jnp.array([0.3, 5.0, -0.4, 1.0])
    value, gradient = jax.value_and_grad(terms)(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[[1, 3]] == 0).all()
    probabilities = jnp.exp(jax.nn.log_softmax(jnp.where(allowed, logits, MASKED)))
    assert (np.asarray(probabilities)[[1, 3]] == 0).all()
    two = scipy.special.softmax([0.3, -0.4])
    np.testing.assert_allclose(np.asarray(probabilities)[[0, 2]], two, rtol=1e-6)


@pytest.mark.parametrize(
    ("space", "arguments", "message"),
    [
        (Box((2,)), {"distribution": "beta"}, "needs actions with finite bounds; got None"),
        (
            Box((1,), low=(-np.inf,), high=(1.0,)),
            {"distribution": "tanh_gaussian"},
            "finite bounds; got .*inf",
        ),
        (
            Box((2,), low=(-1.0, 0.5), high=(1.0, 0.5)),
            {"distribution": "beta"},
            r"needs low < high for every action; got \(-1.0, 0.5\) and \(1.0, 0.5\)",
        ),
        (Discrete(2), {"state_dependent_std": True}, "left out where actions are integers"),
    ],
)
def test_a_distribution_that_does_not_fit_is_refused(space, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_head(space, **arguments)


def continuous(**changes):
    return Config(env="Pendulum-v1", num_envs=2, num_steps=8, hidden_sizes=(4,), **changes)


@pytest.mark.parametrize("distribution", ["gaussian", "tanh_gaussian"])
def test_the_first_standard_deviation_is_a_hyperparameter(distribution):
    trainer = make_trainer(continuous(action_distribution=distribution))
    values = jnp.array([-2.0, 0.0, 0.5])
    states = jax.vmap(trainer.init, in_axes=(None, 0))(
        jax.random.key(0), HParams(initial_log_std=values)
    )
    usual = trainer.init(jax.random.key(0))
    policies = jax.vmap(trainer.policy)(states)
    obs = jnp.ones((3, 1, 3))
    found = jax.vmap(lambda policy, x: policy.step(x, None)[0])(policies, obs)
    np.testing.assert_allclose(found.log_std[:, 0, 0], values, rtol=1e-6)
    # Everything else is as usual.
    np.testing.assert_array_equal(found.mean[0], trainer.policy(usual).step(obs[0], None)[0].mean)
    one = jax.tree.map(lambda x: x[1], states.learner.params)
    jax.tree.map(np.testing.assert_array_equal, one, usual.learner.params)


@pytest.mark.parametrize(
    "config",
    [
        Config(num_envs=2),
        continuous(action_distribution="beta"),
        continuous(state_dependent_std=True),
    ],
)
def test_a_standard_deviation_that_is_no_parameter_is_refused(config):
    with pytest.raises(ConfigError, match="initial_log_std needs a Gaussian whose standard dev"):
        make_trainer(config).init(jax.random.key(0), HParams(initial_log_std=-1.0))
