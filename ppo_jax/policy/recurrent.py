"""Memories: layers over whole sequences, whose state is cleared where episodes start.

A recurrent state is what a layer carries from step to step, `[N, size]`. An LSTM and a linear
recurrent unit carry a tuple whose last entry is the output.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.ops.gated_recurrence import (
    Affine,
    Cell,
    Gates,
    Parts,
    cleared,
    gates_of,
    gru,
    lstm,
    on_parts,
    output_of,
    products,
    recur,
)
from ppo_jax.ops.recurrence import linear_recurrence
from ppo_jax.policy.initializers import orthogonal
from ppo_jax.policy.transformer import GatedTransformer


class _Weights(NamedTuple):
    """Weights of a layer. A gate without a bias has one of zeros."""

    of_input: Affine
    of_state: Affine | None
    """None for a minGRU, whose gates depend on the input alone."""


class _LruWeights(NamedTuple):
    """Weights of a linear recurrent unit with M complex units, whose parts are placed side by side.

    Orvieto et al. 2023 (arXiv:2303.06349), section 3.
    """

    decay: jax.Array  # [2, M], parts of λ, with |λ| < 1
    of_input: Affine  # B, `[F, 2M]`
    of_state: Affine  # C, `[2M, 2·size]`: the output and its gate
    skip: Affine  # D, `[F, 2·size]`


class _Cell(NamedTuple):
    """A gated cell, and its parameters, which have the names and shapes of flax's cell."""

    step: Cell
    scope: str
    """Name of the flax module."""
    gates: str
    """One letter for each gate, in the order in which `step` takes them."""
    with_input_bias: str
    """Gates whose product with the input has a bias."""
    with_state_bias: str
    """Gates whose product with the state has one."""


_CELLS = {
    "gru": _Cell(gru, "GRUCell_0", "rzn", with_input_bias="rzn", with_state_bias="n"),
    "lstm": _Cell(lstm, "OptimizedLSTMCell_0", "ifgo", with_input_bias="", with_state_bias="ifgo"),
}


class RecurrentLayer(nn.Module):
    """A GRU, an LSTM, a minGRU or a linear recurrent unit, by name."""

    kind: str
    size: int

    def initial_state(self, batch_shape: tuple[int, ...]) -> Any:
        """Returns the recurrent state at the start of an episode, zeros `[*batch_shape, *]`."""
        zeros = jnp.zeros((*batch_shape, self.size), jnp.float32)
        if self.kind == "lru":
            return jnp.zeros((*batch_shape, 2 * self.size), jnp.float32), zeros
        return (zeros, zeros) if self.kind == "lstm" else zeros

    def __call__(self, state: Any, x: jax.Array, start: jax.Array) -> Any:
        """Returns the recurrent state after every step.

        Args:
          state: recurrent state before the first step, `[N, size]`.
          x: inputs, `[T, N, F]`.
          start: `[T, N]`, the input is the first of an episode: the state is cleared before it.

        Returns:
          States, `[T, N, size]` or tuples; the last step continues the sequence, and `output_of`
          gives the outputs `[T, N, size]`.
        """
        return run([self], [state], [x], start)[0]

    @nn.compact
    def weights(self, num_inputs: int) -> Any:
        """Returns the weights for inputs `[..., num_inputs]`.

        A linear recurrent unit has `_LruWeights`; other cells have `_Weights`, one part per gate.
        """
        if self.kind == "lru":
            return _Lru(self.size, name="LRU_0")(num_inputs)
        if self.kind == "mingru":
            gates = [
                _Gate(self.size, num_inputs, orthogonal(), name=f"Dense_{i}")() for i in (0, 1)
            ]
            return _Weights(_affine(gates), None)
        cell = _CELLS[self.kind]
        return _GatedCell(cell, self.size, name=cell.scope)(num_inputs)


class _GatedCell(nn.Module):
    """Weights of a GRU or an LSTM."""

    cell: _Cell
    size: int

    @nn.compact
    def __call__(self, num_inputs: int) -> _Weights:
        def make(prefix: str, num_inputs: int, kernel_init: Any, with_bias: str) -> Affine:
            return _affine(
                _Gate(self.size, num_inputs, kernel_init, gate in with_bias, name=prefix + gate)()
                for gate in self.cell.gates
            )

        of_input = make("i", num_inputs, nn.initializers.lecun_normal(), self.cell.with_input_bias)
        return _Weights(of_input, make("h", self.size, orthogonal(), self.cell.with_state_bias))


class _Lru(nn.Module):
    """Weights of a linear recurrent unit.

    λ = exp(−exp(ν) + i exp(θ)) starts uniform on the ring of radii 0.9 to 0.999, with phases up to
    π / 10: slow units, as for the long sequences of Orvieto et al. 2023, table 8.
    """

    size: int

    @nn.compact
    def __call__(self, num_inputs: int) -> _LruWeights:
        def log_rate(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            squares = jax.random.uniform(
                key, shape, jnp.float32, minval=_RADII[0] ** 2, maxval=_RADII[1] ** 2
            )
            return jnp.log(-0.5 * jnp.log(squares))

        def log_phase(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            # A phase of exactly 0 has no logarithm.
            phases = jax.random.uniform(key, shape, jnp.float32, minval=1e-4, maxval=_LARGEST_PHASE)
            return jnp.log(phases)

        rate = jnp.exp(self.param("nu", log_rate, (self.size,)))
        phase = jnp.exp(self.param("theta", log_phase, (self.size,)))
        radius = jnp.exp(-rate)
        decay = jnp.stack([radius * jnp.cos(phase), radius * jnp.sin(phase)])
        # γ of the paper, here a function of λ: all units have states of the same size.
        scale = jnp.tile(jnp.sqrt(1.0 - radius**2), 2).reshape(1, -1)
        normal = nn.initializers.lecun_normal()
        kernel, _ = _Gate(2 * self.size, num_inputs, normal, has_bias=False, name="B")()
        of_state = _Gate(2 * self.size, 2 * self.size, normal, has_bias=False, name="C")()
        skip = _Gate(2 * self.size, num_inputs, orthogonal(), name="D")()
        no_bias = jnp.zeros(2 * self.size, jnp.float32)
        return _LruWeights(
            decay, Affine([kernel * scale], [no_bias]), _affine([of_state]), _affine([skip])
        )


_RADII = (0.9, 0.999)
_LARGEST_PHASE = 0.1 * math.pi


class _Gate(nn.Module):
    """Kernel and bias of one gate."""

    size: int
    num_inputs: int
    kernel_init: Any
    has_bias: bool = True

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", self.kernel_init, (self.num_inputs, self.size), jnp.float32)
        if not self.has_bias:
            return kernel, jnp.zeros(self.size, jnp.float32)
        zeros = nn.initializers.zeros_init()
        return kernel, self.param("bias", zeros, (self.size,), jnp.float32)


def _affine(gates: Iterable[tuple[jax.Array, jax.Array]]) -> Affine:
    kernels, biases = zip(*gates, strict=True)
    return Affine(list(kernels), list(biases))


Memory = RecurrentLayer | GatedTransformer
"""A layer over sequences, whose state is cleared where episodes start."""


def run(
    layers: Sequence[Memory],
    states: Sequence[Any],
    inputs: Sequence[jax.Array],
    start: jax.Array,
) -> list[Any]:
    """Returns the states after every step of several layers of one kind and size, `[T, N, ...]`.

    On a GPU all layers share one loop, which launches as many kernels as the loop of one layer. On
    other platforms each layer has its own loop. A CPU multiplies a batch of small matrices more
    slowly than the same matrices in turn. The TPU compiler would keep the arrays of a common loop
    in main memory: for an update of CartPole with two GRUs it predicts 124 instead of 19 GiB of
    traffic, and 239 instead of 127 ms (v5e).

    Args:
      layers: bound modules.
      states: of each layer before the first step.
      inputs: of each layer, `[T, N, F]`; F may differ.
      start: `[T, N]`.
    """
    each = zip(layers, states, inputs, strict=True)
    if not isinstance(layers[0], RecurrentLayer):
        return [layer(state, x, start) for layer, state, x in each]
    if layers[0].kind == "lru":
        return [_lru(layer.weights(x.shape[-1]), state, x, start) for layer, state, x in each]
    steps: Callable[..., Any] = partial(_steps, kind=layers[0].kind, size=layers[0].size)
    weights = [layer.weights(x.shape[-1]) for layer, x in zip(layers, inputs, strict=True)]

    def separately(
        weights: list[_Weights], states: list[Any], inputs: list[jax.Array], start: jax.Array
    ) -> list[Any]:
        each = zip(weights, states, inputs, strict=True)
        return [steps(products(x, w.of_input), w.of_state, state, start) for w, state, x in each]

    def together(
        weights: list[_Weights], states: list[Any], inputs: list[jax.Array], start: jax.Array
    ) -> list[Any]:
        weights = [_side_by_side(w) for w in weights]
        from_input = [products(x, w.of_input) for w, x in zip(weights, inputs, strict=True)]
        each = zip(from_input, [w.of_state for w in weights], states, strict=True)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
        found = jax.vmap(steps, in_axes=(0, 0, 0, None))(*stacked, start)
        return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(layers))]

    arguments = (weights, list(states), list(inputs), start)
    if len(start) == 1:
        # A rollout takes one step at a time. A CPU would copy the kernels in every step to place
        # them side by side. The compiler for GPUs merges products of the same input.
        return separately(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=separately, tpu=separately, default=together)


def _side_by_side(weights: _Weights) -> _Weights:
    """Returns the weights with all gates in one part."""

    def joined(affine: Affine) -> Affine:
        return Affine(*([jnp.concatenate(parts, axis=-1)] for parts in affine))

    of_state = None if weights.of_state is None else joined(weights.of_state)
    return _Weights(joined(weights.of_input), of_state)


def _steps(
    from_input: Parts,
    of_state: Affine | None,
    state: Any,
    start: jax.Array,
    *,
    kind: str,
    size: int,
) -> Any:
    """Returns the state after every step, from the products of all steps with the inputs."""
    if of_state is None:
        return _min_gru(gates_of(from_input, size), state, start)
    step = _CELLS[kind].step
    if len(start) == 1:
        # One step needs no loop, and nothing that a derivative of the loop would save.
        before = jax.tree.map(lambda leaf: leaf[None], cleared(state, start[0]))
        return on_parts(step)(from_input, products(output_of(before), of_state), before)
    return recur(step, from_input, start, state, of_state)


def _min_gru(gates: Gates, state: jax.Array, start: jax.Array) -> jax.Array:
    """Computes h_t = (1 − z_t) h_{t−1} + z_t h̃_t, where z and h̃ depend on x_t alone.

    Feng et al. 2024 (arXiv:2410.01201), section 3.1.
    """
    update_gate, candidate = nn.sigmoid(gates[0]), gates[1]
    keep = jnp.where(start[..., None], 0.0, 1.0 - update_gate)
    return linear_recurrence(keep, update_gate * candidate, state)


def _lru(weights: _LruWeights, state: tuple, x: jax.Array, start: jax.Array) -> tuple:
    """Computes h_t = λ h_{t−1} + B x_t, and a gated output of C h_t + D x_t.

    Args:
      weights: of the unit.
      state: h, its real and imaginary parts side by side, `[N, 2M]`, and the last output.
      x: inputs, `[T, N, F]`.
      start: `[T, N]`.

    Returns:
      States and outputs, `[T, N, 2M]` and `[T, N, size]`.
    """
    (inputs,) = products(x, weights.of_input)
    keeps = jnp.where(start[..., None], 0.0, 1.0)
    decay = weights.decay.reshape(2, 1, 1, -1)
    if len(start) == 1:
        # In real numbers: formats of exported policies have no complex ones.
        (real, imaginary), (a, b) = jnp.split(keeps * state[0][None], 2, axis=-1), decay
        hidden = inputs + jnp.concatenate([a * real - b * imaginary, a * imaginary + b * real], -1)
    else:
        decays = keeps * jax.lax.complex(*decay)
        hidden = _parts_of(linear_recurrence(decays, _complex_of(inputs), _complex_of(state[0])))
    (of_state,), (skipped,) = products(hidden, weights.of_state), products(x, weights.skip)
    output, gate = jnp.split(of_state + skipped, 2, axis=-1)
    # A gated linear unit: Dauphin et al. 2017 (arXiv:1612.08083), section 2.
    return hidden, output * nn.sigmoid(gate)


def _complex_of(parts: jax.Array) -> jax.Array:
    """Returns complex numbers whose parts are placed side by side."""
    return jax.lax.complex(*jnp.split(parts, 2, axis=-1))


def _parts_of(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x.real, x.imag], axis=-1)
