import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ppo_jax.ops.importance import (
    effective_sample_size,
    importance_sampling,
    trajectory_log_weights,
)

SAMPLES = 200_000


def estimate(shift, **how):
    """E_p[x²] for p = N(0, 1), from samples of q = N(shift, 1.2)."""
    x = shift + 1.2 * jax.random.normal(jax.random.key(0), (SAMPLES,))
    log_p, log_q = scipy.stats.norm(0, 1).logpdf, scipy.stats.norm(shift, 1.2).logpdf
    return importance_sampling(
        jnp.asarray(log_p(x), jnp.float32), jnp.asarray(log_q(x), jnp.float32), x**2, **how
    )


@pytest.mark.parametrize("self_normalized", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0])
def test_expectations_under_p_come_from_samples_of_q(shift, self_normalized):
    result = estimate(shift, self_normalized=self_normalized)
    assert abs(result.mean - 1.0) < 4 * result.standard_error
    assert result.standard_error < 0.02


def test_the_standard_error_is_that_of_repeated_estimates():
    keys = jax.random.split(jax.random.key(1), 2000)

    def one(key):
        x = 0.7 + jax.random.normal(key, (500,))
        return importance_sampling(-0.5 * x**2, -0.5 * (x - 0.7) ** 2, x)

    many = jax.jit(jax.vmap(one))(keys)
    assert jnp.std(many.mean) == pytest.approx(float(jnp.mean(many.standard_error)), rel=0.1)


def test_the_weights_variance_grows_as_p_and_q_part():
    results = [estimate(shift) for shift in (0.0, 0.5, 1.0, 1.5)]
    variances = [float(r.weight_variance) for r in results]
    sizes = [float(r.effective_sample_size) for r in results]
    assert variances == sorted(variances)
    assert sizes == sorted(sizes, reverse=True)


def test_effective_sample_size_does_not_overflow():
    assert effective_sample_size(jnp.full(10, 500.0)) == pytest.approx(10.0, rel=1e-3)
    one_heavy = jnp.array([100.0, 0.0, 0.0])
    assert effective_sample_size(one_heavy) == pytest.approx(1.0)


def test_trajectory_weights_are_products_over_each_piece():
    rng = np.random.default_rng(0)
    log_ratio = rng.normal(size=(20, 5)).astype(np.float32)
    done = rng.random((20, 5)) < 0.2
    totals, is_last = trajectory_log_weights(log_ratio, done)
    for n in range(5):
        running = 0.0
        for t in range(20):
            running += log_ratio[t, n]
            assert bool(is_last[t, n]) == bool(done[t, n] or t == 19)
            if is_last[t, n]:
                assert float(totals[t, n]) == pytest.approx(running, abs=1e-5)
                running = 0.0
