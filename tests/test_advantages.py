import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from ppo_jax.ops import advantages

T, N = 40, 6
GAMMA, LAMBDA = 0.97, 0.9


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, T, N)).astype(np.float32)
    terminated = rng.random((T, N)) < 0.1
    truncated = rng.random((T, N)) < 0.1
    terminated[5, 0] = truncated[5, 0] = True
    assert (terminated & ~truncated).any()
    assert (truncated & ~terminated).any()
    # Within an episode the successor's value is the next state's.
    done = terminated | truncated
    next_value[:-1] = np.where(done[:-1], next_value[:-1], value[1:])
    return reward, value, next_value, terminated, truncated


def gae_by_definition(reward, value, next_value, terminated, truncated, gamma, lam):
    """The sum Σ_k (γλ)^k δ_{t+k} up to the episode's end, term by term."""
    delta = reward + gamma * (1.0 - terminated) * next_value - value
    result = np.zeros_like(delta)
    for n in range(delta.shape[1]):
        for t in range(delta.shape[0]):
            for k in range(delta.shape[0] - t):
                result[t, n] += (gamma * lam) ** k * delta[t + k, n]
                if terminated[t + k, n] or truncated[t + k, n]:
                    break
    return result


def test_gae_is_the_sum_of_its_definition(data):
    ours = jax.jit(functools.partial(advantages.gae, gamma=GAMMA, gae_lambda=LAMBDA))(*data)
    np.testing.assert_allclose(ours, gae_by_definition(*data, GAMMA, LAMBDA), rtol=1e-4, atol=1e-5)


def test_gae_agrees_with_rlax(data):
    """rlax knows no truncation, but a cut episode is one that ends with reward r + γ V(s')."""
    reward, value, next_value, terminated, truncated = data
    cut = truncated & ~terminated
    reward_with_future = reward + GAMMA * np.where(cut, next_value, 0.0)
    discount = (GAMMA * ~(terminated | truncated)).astype(np.float32)
    values = np.concatenate([value, next_value[-1:]])
    oracle = jax.vmap(
        lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, LAMBDA, v),
        in_axes=1,
        out_axes=1,
    )(reward_with_future, discount, values)
    ours = advantages.gae(*data, gamma=GAMMA, gae_lambda=LAMBDA)
    np.testing.assert_allclose(ours, oracle, rtol=1e-4, atol=1e-5)


def test_gae_with_lambda_0_is_the_td_error(data):
    reward, value, next_value, terminated, _ = data
    ours = advantages.gae(*data, gamma=GAMMA, gae_lambda=0.0)
    expected = reward + GAMMA * np.where(terminated, 0.0, next_value) - value
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_gae_with_lambda_1_is_the_return_minus_the_value(data):
    reward, value, next_value, terminated, truncated = data
    returns = np.zeros((T, N), np.float32)
    future = next_value[-1]
    for t in reversed(range(T)):
        future = np.where(truncated[t], next_value[t], future)
        future = np.where(terminated[t], 0.0, future)
        future = returns[t] = reward[t] + GAMMA * future
    ours = advantages.gae(*data, gamma=GAMMA, gae_lambda=1.0)
    np.testing.assert_allclose(ours, returns - value, rtol=1e-4, atol=1e-5)


def test_gae_under_vmap_over_its_parameters(data):
    gammas = jnp.array([0.9, 0.99])
    many = jax.vmap(lambda g: advantages.gae(*data, gamma=g, gae_lambda=LAMBDA))(gammas)
    for gamma, ours in zip(gammas, many, strict=True):
        one = advantages.gae(*data, gamma=gamma, gae_lambda=LAMBDA)
        np.testing.assert_allclose(ours, one, rtol=1e-5, atol=1e-6)


def test_gae_refuses_shapes_that_would_broadcast(data):
    reward, value, next_value, terminated, truncated = data
    with pytest.raises(AssertionError):
        advantages.gae(
            reward, value[:1], next_value, terminated, truncated, gamma=GAMMA, gae_lambda=LAMBDA
        )


def test_n_step_of_one_is_the_td_error_and_of_all_is_gae_with_lambda_1(data):
    one = advantages.n_step(*data, gamma=GAMMA, steps=1)
    np.testing.assert_allclose(
        one, advantages.gae(*data, gamma=GAMMA, gae_lambda=0.0), rtol=1e-5, atol=1e-6
    )
    whole = advantages.n_step(*data, gamma=GAMMA, steps=T + 5)
    np.testing.assert_allclose(
        whole, advantages.gae(*data, gamma=GAMMA, gae_lambda=1.0), rtol=1e-4, atol=1e-5
    )


def test_n_step_is_the_discounted_rewards_and_the_value_after_them(data):
    reward, value, next_value, terminated, truncated = data
    ours = np.asarray(advantages.n_step(*data, gamma=GAMMA, steps=3))
    for n in range(N):
        for t in range(T):
            total, discount = 0.0, 1.0
            for k in range(t, min(t + 3, T)):
                total += discount * reward[k, n]
                discount *= GAMMA
                if terminated[k, n] or truncated[k, n]:
                    break
            total += discount * (0.0 if terminated[k, n] else next_value[k, n])
            assert ours[t, n] == pytest.approx(total - value[t, n], abs=1e-4)


def test_returns_of_first_episodes(data):
    reward, _, _, terminated, truncated = data
    done = terminated | truncated
    mask = np.asarray(advantages.first_episode(jnp.asarray(done)))
    whole = np.asarray(advantages.trajectory_return(reward, mask, gamma=GAMMA))
    to_go = np.asarray(advantages.reward_to_go(reward, mask, gamma=GAMMA))
    for n in range(N):
        length = int(np.argmax(done[:, n])) + 1 if done[:, n].any() else 0
        assert mask[:, n].sum() == length
        assert mask[:length, n].all()
        discounted = GAMMA ** np.arange(T) * reward[:, n]
        np.testing.assert_allclose(whole[:length, n], discounted[:length].sum(), rtol=1e-4)
        for t in range(length):
            assert to_go[t, n] == pytest.approx(discounted[t:length].sum(), abs=1e-4)
        assert not whole[length:, n].any()
        assert not to_go[length:, n].any()


@pytest.mark.parametrize("estimate", ["gae", "n_step"])
def test_an_infinite_advantage_stays_in_its_own_episode(estimate):
    reward = jnp.array([1.0, 1.0, jnp.inf])[:, None]
    zero, done = jnp.zeros((3, 1)), jnp.array([[False], [True], [False]])
    arguments = (reward, zero, zero, done, jnp.zeros_like(done))
    if estimate == "gae":
        found = advantages.gae(*arguments, gamma=0.5, gae_lambda=1.0)
    else:
        found = advantages.n_step(*arguments, gamma=0.5, steps=3)
    np.testing.assert_array_equal(found[:, 0], [1.5, 1.0, np.inf])


@pytest.mark.parametrize("steps", [1, 2, 5, 64, 100])
def test_sums_by_doubling_are_those_by_steps(steps):
    keys = jax.random.split(jax.random.key(steps), 2)
    x = jax.random.normal(keys[0], (steps, 3))
    done = jax.random.uniform(keys[1], (steps, 3)) < jnp.array([[0.0, 0.1, 0.6]])
    # The first step of another episode: no sum before it may see it.
    x = jnp.where(jnp.roll(done, 1, axis=0).at[0].set(False), jnp.inf, x)
    by_steps, by_doubling = (
        jax.jit(function)(x, done, jnp.float32(0.97))
        for function in (
            advantages.discounted_sums_by_steps,
            advantages.discounted_sums_by_doubling,
        )
    )
    np.testing.assert_allclose(by_doubling, by_steps, rtol=1e-4, atol=1e-5)
