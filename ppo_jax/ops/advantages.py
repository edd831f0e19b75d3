"""Advantage estimators on plain arrays, time-major `[T, N]`.

`terminated` stops bootstrapping and `truncated` does not: a time limit is no terminal state.
"""

import chex
import jax
import jax.numpy as jnp

Scalar = float | jax.Array


def td_error(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    *,
    gamma: Scalar,
) -> jax.Array:
    """Computes the TD error δ_t = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t).

    Args:
      reward: r_t, `[T, N]`.
      value: V(s_t), `[T, N]`.
      next_value: V(s'_t) of the true successor (before any reset), `[T, N]`.
      terminated: bool, the successor is terminal, `[T, N]`.
      gamma: discount γ.

    Returns:
      δ, `[T, N]`.
    """
    chex.assert_equal_shape([reward, value, next_value, terminated])
    return reward + gamma * jnp.where(terminated, 0.0, next_value) - value


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
) -> jax.Array:
    """Computes generalised advantages Â_t = Σ_k (γλ)^k δ_{t+k} within one episode.

    Schulman et al. 2016 (arXiv:1506.02438), equation 16, as the recursion
    Â_t = δ_t + γλ (1 − done_t) Â_{t+1} with done = terminated | truncated. δ bootstraps from
    the value of the true successor wherever the episode was not *terminated*, also where a
    time limit or the rollout's end cut it.

    Args:
      reward: r_t, `[T, N]`.
      value: V(s_t), `[T, N]`.
      next_value: V(s'_t) of the true successor (before any reset), `[T, N]`.
      terminated: bool, the successor is terminal, `[T, N]`.
      truncated: bool, a time limit cut the episode here, `[T, N]`.
      gamma: discount γ.
      gae_lambda: λ; 0 gives the TD error, 1 the discounted return minus the value.

    Returns:
      Advantages, `[T, N]`.

    >>> one = jnp.ones((2, 1))
    >>> no = jnp.zeros((2, 1), bool)
    >>> gae(one, 0 * one, 0 * one, no, no, gamma=0.5, gae_lambda=1.0)[:, 0].tolist()
    [1.5, 1.0]
    """
    chex.assert_rank(reward, 2)
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    delta = td_error(reward, value, next_value, terminated, gamma=gamma)
    done = jnp.logical_or(terminated, truncated)
    # An accelerator launches a kernel for each of log₂ T passes over all steps. A CPU takes the
    # steps one by one: 0.4 ms for 128 x 2048.
    return jax.lax.platform_dependent(
        delta,
        done,
        jnp.asarray(gamma * gae_lambda, delta.dtype),
        cpu=discounted_sums_by_steps,
        default=discounted_sums_by_doubling,
    )


def discounted_sums_by_steps(x: jax.Array, done: jax.Array, decay: jax.Array) -> jax.Array:
    """Computes y_t = x_t + decay (1 − done_t) y_{t+1}, `[T, N]`, from the last step backwards."""

    def backward(later: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
        x_t, done_t = inputs
        # A select instead of a factor of 0: if the sum of the next episode is infinite, the product
        # 0 · ∞ would be NaN.
        total = x_t + jnp.where(done_t, 0.0, decay * later)
        return total, total

    # Unrolling 16 steps was slower on a CPU (2.45 instead of 0.41 ms for 128 x 2048).
    return jax.lax.scan(backward, jnp.zeros_like(x[0]), (x, done), reverse=True, unroll=4)[1]


def discounted_sums_by_doubling(x: jax.Array, done: jax.Array, decay: jax.Array) -> jax.Array:
    """Computes the same sums as `discounted_sums_by_steps` in log₂ T passes over all steps.

    After k passes y_t is the sum over 2^k steps, or up to the end of the episode: each pass adds
    the sum that starts 2^k steps later. Hillis & Steele 1986 (doi:10.1145/7902.7903).
    """
    goes_on = ~done  # the episode goes on beyond the steps that are summed
    distance = 1
    while distance < len(x):
        x += jnp.where(goes_on, decay * _later(x, distance), 0.0)
        goes_on &= _later(goes_on, distance)
        decay, distance = decay * decay, 2 * distance
    return x


def _later(x: jax.Array, distance: int) -> jax.Array:
    """Returns x_{t+distance}, and zeros beyond the last step."""
    return jnp.concatenate([x[distance:], jnp.zeros_like(x[:distance])])


def n_step(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    *,
    gamma: Scalar,
    steps: int,
) -> jax.Array:
    """Computes n-step advantages Σ_{k<n} γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t).

    Mnih et al. 2016 (arXiv:1602.01783), section 4; computed as Σ_{k<n} γ^k δ_{t+k}. Where an
    episode or the rollout ends earlier, the sum ends with the value of the true successor.

    Args:
      reward: r_t, `[T, N]`.
      value: V(s_t), `[T, N]`.
      next_value: V(s'_t) of the true successor, `[T, N]`.
      terminated: bool, `[T, N]`.
      truncated: bool, `[T, N]`.
      gamma: discount γ.
      steps: n, static; 1 is the TD error.

    Returns:
      Advantages, `[T, N]`.
    """
    chex.assert_rank(reward, 2)
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    delta = td_error(reward, value, next_value, terminated, gamma=gamma)
    done = jnp.logical_or(terminated, truncated)

    # Each pass extends the sum by one step; n is static and small.
    def one_more(_: int, advantages: jax.Array) -> jax.Array:
        later = jnp.concatenate([advantages[1:], jnp.zeros_like(advantages[:1])])
        return delta + jnp.where(done, 0.0, gamma * later)

    return jax.lax.fori_loop(0, min(steps, reward.shape[0]) - 1, one_more, delta)


def sums_over_episodes(
    x: jax.Array, done: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Adds up a quantity over the steps of each episode.

    Args:
      x: the quantity, `[T, N]`.
      done: `[T, N]`, the episode ended at this step.
      before: sums of the episodes that are unfinished before the rollout, `[N]`.

    Returns:
      The sum over all episodes that ended in the rollout, a scalar, and the sums of the episodes
      that are unfinished after it, `[N]`.

    >>> x = jnp.array([[1.0], [2.0], [4.0]])
    >>> total, after = sums_over_episodes(x, x == 2, jnp.array([8.0]))
    >>> float(total), after.tolist()
    (11.0, [4.0])
    """
    chex.assert_rank([x, done, before], [2, 2, 1])
    # The episode of a step ends in the rollout if this or a later step of the column is its last.
    ends = jax.lax.cumsum(done.astype(jnp.int32), reverse=True) > 0
    total = jnp.sum(jnp.where(ends, x, 0.0)) + jnp.sum(jnp.where(ends[0], before, 0.0))
    return total, jnp.sum(jnp.where(ends, 0.0, x), 0) + jnp.where(ends[0], 0.0, before)


def first_episode(done: jax.Array) -> jax.Array:
    """Returns a bool mask of the steps in the first episode of each environment, `[T, N]`.

    If the end of the rollout cuts that episode, it is not a sample of a whole trajectory, and the
    environment's column is False throughout.

    >>> first_episode(jnp.array([[0, 0], [1, 0], [0, 0]], bool)).tolist()
    [[True, False], [True, False], [False, False]]
    """
    chex.assert_rank(done, 2)
    # The step itself is not counted, because the last step of an episode belongs to the episode.
    ended_before = jnp.cumsum(done, axis=0) - done > 0
    return jnp.logical_and(~ended_before, jnp.any(done, axis=0)[None])


def trajectory_return(reward: jax.Array, mask: jax.Array, *, gamma: Scalar) -> jax.Array:
    """Computes R(τ) = Σ_t γ^t r_t over the steps of `mask`, repeated at each of them, `[T, N]`.

    Williams 1992, "Simple statistical gradient-following algorithms", section 5.
    """
    chex.assert_equal_shape([reward, mask])
    discounted = _discounts(reward.shape[0], gamma) * reward * mask
    return mask * jnp.sum(discounted, axis=0, keepdims=True)


def reward_to_go(reward: jax.Array, mask: jax.Array, *, gamma: Scalar) -> jax.Array:
    """Computes the reward to go Σ_{k≥t} γ^k r_k over the steps of `mask`, `[T, N]`.

    Rewards before the action are dropped from R(τ), because their product with ∇log π has mean
    zero. Rewards are discounted from the start of the episode instead of from t, so that the
    estimate remains one of the gradient of E[Σ γ^t r_t].
    """
    chex.assert_equal_shape([reward, mask])
    discounted = _discounts(reward.shape[0], gamma) * reward * mask
    return mask * jnp.flip(jnp.cumsum(jnp.flip(discounted, axis=0), axis=0), axis=0)


def _discounts(steps: int, gamma: Scalar) -> jax.Array:
    """Returns γ^t, `[T, 1]`."""
    return jnp.power(jnp.asarray(gamma, jnp.float32), jnp.arange(steps))[:, None]


def discounted_returns(
    reward: jax.Array, done: jax.Array, initial: jax.Array, *, gamma: Scalar
) -> tuple[jax.Array, jax.Array]:
    """Computes backward-looking discounted returns R_t = γ R_{t−1} + r_t of each episode.

    Their standard deviation normalises rewards. The last reward of an episode belongs to its own
    return, and the next episode starts from 0.

    Args:
      reward: r_t, `[T, N]`.
      done: bool, the episode ended with r_t, `[T, N]`.
      initial: R before the first step, `[N]`; 0 where an episode starts.
      gamma: discount γ.

    Returns:
      R, `[T, N]`, and the initial value of the next rollout, `[N]`.

    >>> reward, done = jnp.ones((3, 1)), jnp.array([[False], [True], [False]])
    >>> returns, last = discounted_returns(reward, done, jnp.zeros(1), gamma=0.5)
    >>> returns[:, 0].tolist(), last.tolist()
    ([1.0, 1.5, 1.0], [1.0])
    """
    chex.assert_rank([reward, done], 2)
    chex.assert_equal_shape([reward, done])

    def step(
        carried: jax.Array, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        reward_t, done_t = inputs
        returns = gamma * carried + reward_t
        return jnp.where(done_t, 0.0, returns), returns

    last, returns = jax.lax.scan(step, initial, (reward, done))
    return returns, last
