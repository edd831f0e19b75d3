"""Gated recurrences against flax's cells, and their derivatives against automatic ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops.gated_recurrence import Affine, gru, lstm, output_of, recur
from ppo_jax.policy.initializers import draw
from ppo_jax.policy.recurrent import RecurrentLayer, run
from tests.test_platforms import as_accelerators_do

T, N, F, H = 7, 3, 5, 4
CELLS = {"gru": (gru, 3, nn.GRUCell), "lstm": (lstm, 4, nn.OptimizedLSTMCell)}


@pytest.fixture(params=["cpu", "accelerator"])
def platform(request, monkeypatch):
    if request.param == "accelerator":
        monkeypatch.setattr(jax.lax, "platform_dependent", as_accelerators_do)
    return request.param


def state_of(key, kind):
    states = jax.random.normal(key, (3, N, H))
    if kind == "lru":
        return jnp.concatenate([states[0], states[1]], axis=-1), states[2]
    return tuple(states[:2]) if kind == "lstm" else states[0]


def arguments_of(kind, num_parts):
    """Returns the arguments of `recur`, with starts of episodes in random places."""
    num_gates = CELLS[kind][1]
    keys = jax.random.split(jax.random.key(0), 5)

    def parts(key, *shape):
        gates = jnp.split(jax.random.normal(key, (*shape, num_gates * H)), num_gates, axis=-1)
        return gates if num_parts == "each" else [jnp.concatenate(gates, axis=-1)]

    start = jax.random.uniform(keys[1], (T, N)) < 0.3
    state = state_of(keys[2], kind)
    return parts(keys[0], T, N), start, state, Affine(parts(keys[3], H), parts(keys[4]))


def params_of(layer, key, x, state):
    """Returns drawn parameters. Biases are not zero, so that each of them matters."""
    params = draw(key, layer.init(key, state, x, jnp.zeros(x.shape[:2], bool)))
    return jax.tree.map(lambda leaf: leaf + 0.1, params)


@pytest.mark.parametrize("num_steps", [1, T])
@pytest.mark.parametrize("kind", CELLS)
def test_a_layer_is_flax_s_cell_step_by_step(kind, num_steps, platform):
    keys = jax.random.split(jax.random.key(1), 4)
    start = jax.random.uniform(keys[0], (num_steps, N)) < 0.3
    x = jax.random.normal(keys[1], (num_steps, N, F))
    state = state_of(keys[2], kind)
    layer = RecurrentLayer(kind, H)
    params = params_of(layer, keys[3], x, state)
    states = layer.apply(params, state, x, start)
    cell = CELLS[kind][2](H)
    # Saved policies have flax's names.
    of_cell = params["params"][f"{type(cell).__name__}_0"]
    expected = cell.init(keys[3], state, x[0])["params"]
    assert jax.tree.map(jnp.shape, of_cell) == jax.tree.map(jnp.shape, expected)
    for t in range(num_steps):
        state = jax.tree.map(lambda leaf, t=t: jnp.where(start[t][:, None], 0.0, leaf), state)
        state, _ = cell.apply({"params": of_cell}, state, x[t])
        for ours, theirs in zip(jax.tree.leaves(states), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(ours[t], theirs, rtol=1e-5, atol=1e-6)


def loss_of(function, cell, start):
    weight = jax.random.normal(jax.random.key(3), (T, N, 1))

    def loss(from_input, state, weights):
        states = function(cell, from_input, start, state, weights)
        # Both parts of an LSTM's state count.
        return sum(jnp.sum(weight * jnp.square(x)) for x in jax.tree.leaves(states))

    return loss


PARTS = pytest.mark.parametrize("num_parts", ["one", "each"])


@PARTS
@pytest.mark.parametrize("kind", CELLS)
def test_derivatives_are_those_of_the_loop(kind, num_parts):
    from_input, start, *others = arguments_of(kind, num_parts)
    every = (0, 1, 2)

    def gradients(function):
        loss = loss_of(function, CELLS[kind][0], start)
        return jax.grad(loss, every)(from_input, *others)

    ours, automatic = gradients(recur), gradients(recur.fun)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-4), ours, automatic
    )


@PARTS
@pytest.mark.parametrize("kind", CELLS)
def test_second_derivatives_are_those_of_the_loop(kind, num_parts):
    """TRPO multiplies by the Fisher matrix, the derivative of a gradient."""
    from_input, start, state, weights = arguments_of(kind, num_parts)

    def product(function):
        loss = loss_of(function, CELLS[kind][0], start)
        gradient = jax.grad(lambda weights: loss(from_input, state, weights))
        return jax.jvp(gradient, (weights,), (jax.tree.map(jnp.ones_like, weights),))[1]

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3),
        product(recur),
        product(recur.fun),
    )


@pytest.mark.parametrize("kind", [*CELLS, "mingru", "lru"])
def test_an_accelerator_runs_layers_together_as_a_cpu_does_one_by_one(kind, monkeypatch):
    keys = jax.random.split(jax.random.key(1), 6)
    start = jax.random.uniform(keys[0], (T, N)) < 0.3
    # Observations of actor and critic may differ in size.
    inputs = [jax.random.normal(keys[1], (T, N, F)), jax.random.normal(keys[2], (T, N, F + 2))]
    states = [state_of(key, kind) for key in keys[2:4]]
    layer = RecurrentLayer(kind, H)
    each = zip(keys[4:], inputs, states, strict=True)
    params = [params_of(layer, *arguments) for arguments in each]
    weights = jax.random.normal(keys[0], (2, T, N, H))

    def results():
        def loss(params, states, inputs):
            found = run([layer.bind(p) for p in params], states, inputs, start)
            outputs = jnp.stack([output_of(state) for state in found])
            return jnp.sum(weights * jnp.square(outputs)), found

        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(gradient)(params, states, inputs)

    of_cpu = results()
    monkeypatch.setattr(jax.lax, "platform_dependent", as_accelerators_do)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), results(), of_cpu
    )


@PARTS
@pytest.mark.parametrize("kind", CELLS)
def test_several_seeds_run_under_vmap(kind, num_parts):
    arguments = arguments_of(kind, num_parts)
    start = arguments[1]
    loss = loss_of(recur, CELLS[kind][0], start)

    def loss_of_scale(scale):
        from_input, _, *others = jax.tree.map(lambda x: scale * x, arguments)
        return loss(from_input, *others)

    scales = jnp.array([1.0, 2.0])
    each = [jax.value_and_grad(loss_of_scale)(scale) for scale in scales]
    losses, gradients = map(jnp.stack, zip(*each, strict=True))
    # Traced before it is differentiated, and differentiated before it is traced.
    inner = jax.vmap(jax.value_and_grad(loss_of_scale))
    outer = jax.grad(lambda scales: jnp.sum(jax.jit(jax.vmap(loss_of_scale))(scales)))
    for found in (inner(scales)[1], outer(scales)):
        np.testing.assert_allclose(found, gradients, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(loss_of_scale)(scales), losses, rtol=1e-5)
