import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, HParams
from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.ops import objectives
from ppo_jax.policy.spec import PolicySpec, init_params, network_of
from ppo_jax.resolve import complete_config, complete_hparams
from ppo_jax.stages.losses import Losses
from ppo_jax.types import Batch, Shard

B = 32


def test_clipped_surrogate_has_no_gradient_where_it_is_clipped():
    gradient = jax.grad(lambda r, a: objectives.clipped_surrogate(r, a, clip_eps=0.2)[0], argnums=0)
    for ratio, advantage, slope in [
        (1.3, 1.0, 0.0),
        (1.3, -1.0, -1.0),
        (0.7, -1.0, 0.0),
        (0.7, 1.0, 1.0),
        (1.1, 1.0, 1.0),
    ]:
        assert gradient(jnp.array([ratio]), jnp.array([advantage])) == pytest.approx(slope)


def test_approx_kl_estimates_the_kl_without_bias():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), size=2)
    exact = np.sum(p * np.log(p / q))
    # E_p of the estimator, by enumeration.
    estimate = np.sum(p * np.asarray(objectives.approx_kl(jnp.log(q / p))))
    assert estimate == pytest.approx(exact, rel=1e-4)


def test_explained_variance():
    targets = jnp.array([1.0, 2.0, 3.0])
    assert objectives.explained_variance(targets, targets) == 1.0
    assert objectives.explained_variance(jnp.zeros(3), targets) == 0.0
    assert jnp.isnan(objectives.explained_variance(targets, jnp.ones(3)))


@pytest.fixture(scope="module", params=["discrete", "box"])
def case(request):
    """A network, its parameters, and a minibatch of a policy that has since moved."""
    space = Discrete(3) if request.param == "discrete" else Box((2,))
    spec = PolicySpec(observation_space=Box((5,)), action_space=space, hidden_sizes=(16,))
    keys = jax.random.split(jax.random.key(0), 8)
    obs = jax.random.normal(keys[0], (B, 5))
    params = init_params(spec, keys[1], obs)
    # Not the initial parameters: those make every logit nearly equal.
    leaves, treedef = jax.tree.flatten(params)
    noise = jax.random.split(keys[2], len(leaves))
    params = jax.tree.unflatten(
        treedef,
        [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, noise, strict=True)],
    )
    if request.param == "discrete":
        action = jax.random.randint(keys[3], (B,), 0, 3)
    else:
        action = jax.random.normal(keys[3], (B, 2))
    action_params, value = network_of(spec).apply(params, obs)
    batch = Batch(
        obs=obs,
        action=action,
        action_params=action_params,
        log_prob=_log_prob(action_params, action) + 0.3 * jax.random.normal(keys[4], (B,)),
        value=value + 0.3 * jax.random.normal(keys[5], (B,)),
        advantages=jax.random.normal(keys[6], (B,)) + 0.5,
        targets=value + jax.random.normal(keys[7], (B,)),
        mask=None,
        done=jnp.zeros(B, bool),
    )
    return spec, params, batch


def _log_prob(action_params, action):
    if isinstance(action_params, tuple):
        mean, log_std = action_params
        z = (action - mean) / jnp.exp(log_std)
        return jnp.sum(-0.5 * z**2 - log_std - 0.5 * jnp.log(2 * jnp.pi), axis=-1)
    probabilities = jnp.exp(action_params) / jnp.sum(jnp.exp(action_params), -1, keepdims=True)
    return jnp.log(jnp.take_along_axis(probabilities, action[:, None], -1)[:, 0])


def _forward(params, obs, has_log_std):
    """The two networks, written out: tanh layer of 16, then linear."""
    p = params["params"]

    def mlp(torso, out):
        hidden = p[torso]["MLP_0"]["Dense_0"]
        x = jnp.tanh(obs @ hidden["kernel"] + hidden["bias"][None])
        return x @ p[out]["kernel"] + p[out]["bias"][None]

    outputs = mlp("actor_torso", "actor_out")
    value = mlp("critic_torso", "critic_out")[:, 0]
    if has_log_std:
        return (outputs, jnp.tile(p["actor_log_std"]["value"][None], (B, 1))), value
    return outputs, value


def ppo_loss_from_the_paper(params, batch, eps, value_eps, c1, c2, has_log_std):
    """Equations 7 and 9 of arXiv:1707.06347, sample by sample where it matters.

    With c1 on ½ (V − V_targ)², advantages standardised, and the clipped value of Baselines.
    """
    action_params, value = _forward(params, batch.obs, has_log_std)
    ratio = jnp.exp(_log_prob(action_params, batch.action)) / jnp.exp(batch.log_prob)
    mean = jnp.sum(batch.advantages) / B
    deviation = jnp.sqrt(jnp.sum((batch.advantages - mean) ** 2) / B)
    advantages = (batch.advantages - mean) / deviation
    low, high = 1 - eps, 1 + eps
    positive = jnp.where(ratio > high, high, ratio)  # min for Â ≥ 0 only bounds from above
    negative = jnp.where(ratio < low, low, ratio)
    surrogate = jnp.where(advantages >= 0, positive * advantages, negative * advantages)
    error = (value - batch.targets) ** 2
    if value_eps is not None:
        moved = jnp.minimum(jnp.maximum(value, batch.value - value_eps), batch.value + value_eps)
        error = jnp.maximum(error, (moved - batch.targets) ** 2)
    if has_log_std:
        entropy = jnp.sum(action_params[1] + 0.5 * jnp.log(2 * jnp.pi * jnp.e), axis=-1)
    else:
        p = jnp.exp(action_params) / jnp.sum(jnp.exp(action_params), -1, keepdims=True)
        entropy = -jnp.sum(p * jnp.log(p), axis=-1)
    return -(jnp.mean(surrogate) - c1 * 0.5 * jnp.mean(error) + c2 * jnp.mean(entropy))


@pytest.mark.parametrize("value_clip_eps", [None, 0.2])
def test_loss_and_gradient_of_a_minibatch_are_the_papers(case, value_clip_eps):
    spec, params, batch = case
    hparams = complete_hparams(
        HParams(clip_eps=0.15, vf_coef=0.7, ent_coef=0.03, value_clip_eps=value_clip_eps),
        Config(),
    )
    config = complete_config(Config())
    losses = Losses(config, spec, ALGORITHMS["ppo"].objective, Shard(config.num_envs))
    scaled = batch._replace(advantages=losses.normalize_advantages(batch.advantages, None))
    value_and_grad = jax.value_and_grad(losses.joint, has_aux=True)
    (loss, metrics), gradient = value_and_grad(params, scaled, hparams)

    has_log_std = isinstance(spec.action_space, Box)
    oracle_loss, oracle_gradient = jax.value_and_grad(ppo_loss_from_the_paper)(
        params, batch, 0.15, value_clip_eps, 0.7, 0.03, has_log_std
    )
    assert 0.05 < metrics["train/clip_fraction"] < 0.95  # both branches are at work
    np.testing.assert_allclose(loss, oracle_loss, rtol=1e-5)
    for ours, oracle in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(oracle_gradient), strict=True
    ):
        np.testing.assert_allclose(ours, oracle, rtol=1e-3, atol=1e-6)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_dual_clip_bounds_the_objective_from_below():
    ratio, advantages = jnp.array([5.0, 5.0, 1.0]), jnp.array([-1.0, 1.0, -1.0])
    plain = objectives.clipped_surrogate(ratio, advantages, clip_eps=0.2)
    dual = objectives.clipped_surrogate(ratio, advantages, clip_eps=0.2, dual_clip=3.0)
    np.testing.assert_allclose(plain, [-5.0, 1.2, -1.0], rtol=1e-6)
    np.testing.assert_allclose(dual, [-3.0, 1.2, -1.0], rtol=1e-6)


def test_simple_policy_is_best_where_the_ratio_has_moved_by_epsilon():
    ratios = jnp.linspace(0.5, 1.5, 1001)
    for advantage, best in ((2.0, 1.2), (-2.0, 0.8)):
        value = objectives.simple_policy(ratios, jnp.full(1001, advantage), clip_eps=0.2)
        assert ratios[jnp.argmax(value)] == pytest.approx(best, abs=1e-3)
    ones = jnp.ones(2)
    np.testing.assert_array_equal(objectives.simple_policy(ones, 3.0 * ones, clip_eps=0.0), 3.0)


def test_discovered_policy_drifts_only_against_going_too_far():
    def slope(log_ratio, advantage):
        objective = jax.grad(
            lambda x: objectives.discovered_policy(
                x[None], jnp.array([advantage]), alpha=2.0, beta=0.6
            )[0]
        )
        return float(objective(jnp.float32(log_ratio)))

    assert slope(0.0, 1.0) == pytest.approx(1.0)  # the policy gradient at the old policy
    assert slope(0.0, -1.0) == pytest.approx(-1.0)
    assert slope(-0.5, 1.0) == pytest.approx(np.exp(-0.5), rel=1e-5)  # no drift when coming back
    assert 0.0 < slope(1.5, 1.0) < np.exp(1.5)


@pytest.mark.parametrize(("kl", "factor"), [(0.001, 0.5), (0.008, 1.0), (0.012, 1.0), (0.1, 2.0)])
def test_kl_coef_is_halved_and_doubled_as_in_the_paper(kl, factor):
    coefficients, targets = jnp.array([0.5, 3.0]), jnp.array([0.01, 0.01])
    adapt = jax.vmap(lambda beta, d: objectives.adapt_kl_coef(beta, jnp.float32(kl), d_targ=d))
    np.testing.assert_allclose(adapt(coefficients, targets), factor * coefficients)


def test_kl_coef_keeps_within_reach():
    beta = jnp.float32(1.0)
    for _ in range(100):
        beta = objectives.adapt_kl_coef(beta, jnp.float32(0.0), d_targ=0.01)
    assert beta == pytest.approx(1e-6)


def test_masked_means_ignore_what_is_masked():
    x, mask = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
    assert objectives.masked_mean(x, mask) == 2.0
    assert objectives.masked_variance(x, mask) == 1.0
    assert objectives.masked_mean(x, jnp.zeros(3, bool)) == 0.0
