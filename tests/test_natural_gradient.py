import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ppo_jax import Config, HParams, make_trainer
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.ops.natural_gradient import conjugate_gradient, fisher_vector_product, line_search
from ppo_jax.policy.distributions import make_head
from ppo_jax.policy.spec import PolicySpec, init_params, network_of


@pytest.mark.parametrize("space", [Discrete(3), Box((2,))])
def test_the_direction_is_that_of_the_dense_fisher_matrix(space):
    """F = E[Jᵀ M J], with the outputs' Fisher matrix M from score functions, not from a KL."""
    spec = PolicySpec(
        observation_space=Box((3,)), action_space=space, hidden_sizes=(4,), has_critic=False
    )
    network, head = network_of(spec), make_head(space)
    obs = jax.random.normal(jax.random.key(0), (64, 3))
    params = init_params(spec, jax.random.key(1), obs)
    flat, unravel = ravel_pytree(params)
    flat = flat + 0.3 * jax.random.normal(jax.random.key(2), flat.shape)
    old = network.apply(unravel(flat), obs, method="actor")[0]

    def mean_kl(flat):
        new = head.distribution(network.apply(unravel(flat), obs, method="actor")[0])
        return jnp.mean(head.distribution(old).kl_divergence(new))

    def outputs(flat):
        return network.apply(unravel(flat), obs, method="actor")[0]

    if isinstance(space, Discrete):
        jacobian = np.asarray(jax.jacobian(outputs)(flat))  # [B, A, P]
        p = np.asarray(jax.nn.softmax(old))
        inner = np.einsum("ba,ac->bac", p, np.eye(3)) - np.einsum("ba,bc->bac", p, p)
        fisher = np.einsum("bap,bac,bcq->pq", jacobian, inner, jacobian) / 64
    else:
        of_mean, of_log_std = jax.jacobian(outputs)(flat)
        of_mean = np.asarray(of_mean) / np.exp(np.asarray(old.log_std))[..., None]
        of_log_std = np.asarray(of_log_std)  # Fisher information of log σ is 2
        fisher = np.einsum("bap,baq->pq", of_mean, of_mean)
        fisher = (fisher + 2 * np.einsum("bap,baq->pq", of_log_std, of_log_std)) / 64
    damping = 0.1
    gradient = jax.random.normal(jax.random.key(3), flat.shape)
    dense = np.linalg.solve(fisher + damping * np.eye(len(flat)), gradient)
    with jax.default_matmul_precision("highest"):
        product = fisher_vector_product(mean_kl, flat, damping=damping)
        ours = conjugate_gradient(product, gradient, iterations=30)
    assert np.linalg.norm(ours - dense) < 1e-3 * np.linalg.norm(dense)


def test_conjugate_gradient_rests_once_it_has_converged():
    matrix = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    b = jnp.array([1.0, 2.0, 3.0])
    x = conjugate_gradient(lambda v: matrix @ v, b, iterations=50)
    np.testing.assert_allclose(x, jnp.ones(3), rtol=1e-5)
    zero = conjugate_gradient(lambda v: matrix @ v, jnp.zeros(3), iterations=5)
    np.testing.assert_array_equal(zero, jnp.zeros(3))


def test_the_line_search_takes_the_longest_step_within_the_bound():
    def search(objective, max_kl, num_steps=10):
        params, step = jnp.zeros(1), jnp.array([8.0])
        return line_search(
            objective, lambda x: x[0] ** 2, params, step, max_kl=max_kl, num_steps=num_steps
        )

    found = search(lambda x: x[0], max_kl=5.0)  # 8 and 4 break the bound, 2 does not
    assert found.params[0] == 2.0
    assert found.fraction == 0.25
    assert found.kl == 4.0
    found = search(lambda x: -((x[0] - 1.0) ** 2), max_kl=5.0)  # 2 is no better than 0
    assert found.params[0] == 1.0
    for nothing in (search(lambda x: -x[0], 100.0), search(lambda x: x[0], 1.0, num_steps=2)):
        assert nothing.params[0] == 0.0
        assert nothing.fraction == 0.0
        assert nothing.kl == 0.0


def test_trpo_stays_within_its_bound_and_never_lowers_the_surrogate():
    trainer = make_trainer(
        Config(algorithm="trpo", num_envs=8, num_steps=64, total_timesteps=8 * 64 * 15)
    )
    bounds = jnp.array([0.001, 0.01, 0.05])
    run = jax.jit(jax.vmap(trainer.run, in_axes=(None, 0)))
    _, metrics = run(jax.random.key(0), HParams(max_kl=bounds))
    assert (metrics["train/kl"] <= bounds[:, None]).all()
    assert (metrics["train/surrogate_improvement"] >= 0).all()
    accepted = metrics["train/step_fraction"] > 0
    assert accepted.mean() > 0.9
    assert (metrics["train/kl"][accepted] > 0).all()


def test_trpo_leaves_the_policy_alone_when_its_bound_is_zero():
    trainer = make_trainer(
        Config(algorithm="trpo", num_envs=4, num_steps=32, line_search_steps=1, hidden_sizes=(8,))
    )
    state = jax.jit(trainer.init)(jax.random.key(0))
    after, metrics = jax.jit(trainer.step)(state, HParams(max_kl=0.0))
    # A step of 0 may be accepted or not, by the last bit of an improvement of 0.
    assert abs(metrics["train/kl"]) < 1e-7
    assert abs(metrics["train/surrogate_improvement"]) < 1e-6
    before, changed = state.learner.params["params"], after.learner.params["params"]
    for name in before:
        same = all(
            jnp.array_equal(x, y)
            for x, y in zip(
                jax.tree.leaves(before[name]), jax.tree.leaves(changed[name]), strict=True
            )
        )
        assert same == (not name.startswith("critic_"))
