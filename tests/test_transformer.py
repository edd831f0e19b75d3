"""The gated transformer: compared with the papers' formulas in NumPy, and with itself by steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.policy.initializers import draw
from ppo_jax.policy.transformer import GatedTransformer, _shifted

T, N, F, D, M, L, H = 11, 3, 5, 8, 4, 2, 2


@pytest.fixture(scope="module")
def sequence():
    """A layer with parameters that are nowhere zero, a sequence of several episodes, and states."""
    layer = GatedTransformer(size=D, window=M, num_layers=L, num_heads=H)
    keys = jax.random.split(jax.random.key(0), 6)
    x = jax.random.normal(keys[0], (T, N, F))
    start = jax.random.bernoulli(keys[1], 0.2, (T, N)).at[0].set([True, False, False])
    # Without a start the first step sees a full memory and one of two steps.
    past = jax.random.normal(keys[2], (N, L, M, D))
    state = past, jnp.array([3, M, 2]), jnp.zeros((N, D))
    params = draw(keys[3], layer.init(keys[4], state, x, start))
    noise = iter(jax.random.split(keys[5], len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(noise), p.shape), params)
    return layer, params, state, x, start


def test_a_sequence_is_its_steps(sequence):
    layer, params, state, x, start = sequence
    whole = jax.jit(layer.apply)(params, state, x, start)
    step = jax.jit(layer.apply)
    for t in range(T):
        after = step(params, state, x[t][None], start[t][None])
        state = jax.tree.map(lambda leaf: leaf[0], after)
        for one, all_ in zip(state, whole, strict=True):
            np.testing.assert_allclose(one, all_[t], rtol=1e-4, atol=1e-5)


def test_outputs_are_those_of_the_papers(sequence):
    layer, params, state, x, start = sequence
    *_, ours = layer.apply(params, state, x, start)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)["params"]
    x, start, (past, age, _) = np.asarray(x, np.float64), np.asarray(start), map(np.asarray, state)
    for n in range(N):
        theirs = papers_transformer(p, x[:, n], start[:, n], past[n], age[n])
        np.testing.assert_allclose(ours[:, n], theirs, rtol=1e-4, atol=1e-4)


def papers_transformer(p, x, start, past, age):
    """Outputs `[T, D]` of one environment, step by step, head by head and key by key."""
    e = x @ p["embedding"]["kernel"] + p["embedding"]["bias"]
    for i in range(L):
        w = p[f"layer_{i}"]
        inputs = np.concatenate([past[i], e])
        outputs = []
        for t in range(T):
            since = np.flatnonzero(start[: t + 1])
            seen = t - since[-1] if len(since) else min(age + t, M + t)
            distances = range(min(seen, M), -1, -1)
            y = gate(w["attention_gate"], e[t], relu(attention(w, inputs, t, distances)))
            hidden = relu(dense(w["dense_0"], norm(w["dense_norm"], y)))
            outputs.append(gate(w["dense_gate"], y, relu(dense(w["dense_1"], hidden))))
        e = np.array(outputs)
    return e


def attention(w, inputs, t, distances):
    a, width, result = w["attention"], D // H, np.zeros(D)
    query = norm(w["attention_norm"], inputs[M + t]) @ a["query"]
    for h in range(H):
        part = slice(h * width, (h + 1) * width)
        scores, values = [], []
        for distance in distances:
            key_input = norm(w["attention_norm"], inputs[M + t - distance])
            key, position = key_input @ a["key"], sinusoid(distance) @ a["position"]
            by_content = (query[part] + a["content_bias"][h]) @ key[part]
            by_position = (query[part] + a["position_bias"][h]) @ position[part]
            scores.append((by_content + by_position) / np.sqrt(width))
            values.append((key_input @ a["value"])[part])
        weights = np.exp(scores) / np.sum(np.exp(scores))
        result += weights @ np.array(values) @ a["output"][part]
    return result


def sinusoid(distance):
    rates = 1.0 / 10_000 ** (np.arange(0, D, 2) / D)
    return np.concatenate([np.sin(distance * rates), np.cos(distance * rates)])


def gate(w, x, y):
    def product(name, z):
        return z @ w[name]["kernel"]

    reset = sigmoid(product("reset_y", y) + product("reset_x", x))
    update = sigmoid(product("update_y", y) + product("update_x", x) - w["bias"])
    candidate = np.tanh(product("candidate_y", y) + product("candidate_x", reset * x))
    return (1 - update) * x + update * candidate


def norm(w, x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * w["scale"] + w["bias"]


def dense(w, x):
    return x @ w["kernel"] + w["bias"]


def relu(x):
    return np.maximum(x, 0.0)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def test_a_step_sees_its_episode_and_its_window_and_nothing_else():
    layer = GatedTransformer(size=D, window=M, num_layers=1, num_heads=H)
    x = jax.random.normal(jax.random.key(0), (T, 1, F))
    start = jnp.zeros((T, 1), bool).at[jnp.array([0, 2])].set(True)
    state = layer.initial_state((1,))
    params = draw(jax.random.key(1), layer.init(jax.random.key(2), state, x, start))

    def output(x, t):
        *_, outputs = layer.apply(params, state, x, start)
        return outputs[t].sum()

    for t, seen in {1: [0, 1], 4: [2, 3, 4], 6: [2, 3, 4, 5, 6], 9: [5, 6, 7, 8, 9]}.items():
        influence = np.abs(jax.grad(output)(x, t)).max(axis=(1, 2))
        assert list(np.flatnonzero(influence)) == seen


@pytest.mark.parametrize("num_steps", [1, T])
def test_a_step_that_is_not_finite_is_no_part_of_the_next_episode(sequence, num_steps):
    layer, params, state, x, _ = sequence
    outputs = []
    for t in range(0, T, num_steps):
        start = jnp.zeros((num_steps, N), bool)
        if t <= 4 < t + num_steps:
            start = start.at[4 - t].set(True)
        part = x.at[3].set(jnp.nan)[t : t + num_steps]
        after = layer.apply(params, state, part, start)
        state = jax.tree.map(lambda leaf: leaf[-1], after)
        outputs.append(after[-1])
    is_finite = np.isfinite(np.concatenate(outputs)).all(axis=(1, 2))
    assert list(np.flatnonzero(~is_finite)) == [3]


def test_rows_of_scores_move_to_the_inputs_at_their_distance():
    scores = jnp.arange(1.0, 13.0).reshape(1, 1, 3, 4)  # three steps, distances 3 to 0
    np.testing.assert_array_equal(
        _shifted(scores, 3)[0, 0, :, :],
        [[1, 2, 3, 4, 0, 0], [0, 5, 6, 7, 8, 0], [0, 0, 9, 10, 11, 12]],
    )
