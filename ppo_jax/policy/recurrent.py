"""Recurrent layers over whole sequences, whose state is cleared where episodes start.

A recurrent state is what a layer carries from step to step, `[N, size]`; an LSTM carries a pair.
"""

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


class _Weights(NamedTuple):
    """Weights of a layer. A gate without a bias has one of zeros."""

    of_input: Affine
    of_state: Affine | None
    """None for a minGRU, whose gates depend on the input alone."""


class _Cell(NamedTuple):
    """A gated cell, and its parameters, which have the names and shapes of flax's cell."""

    step: Cell
    scope: str
    gates: str
    with_input_bias: str
    """Gates whose product with the input has a bias."""
    with_state_bias: str
    """Gates whose product with the state has one."""


_CELLS = {
    "gru": _Cell(gru, "GRUCell_0", "rzn", with_input_bias="rzn", with_state_bias="n"),
    "lstm": _Cell(lstm, "OptimizedLSTMCell_0", "ifgo", with_input_bias="", with_state_bias="ifgo"),
}


class RecurrentLayer(nn.Module):
    """A GRU, an LSTM or a minGRU, by name."""

    kind: str
    size: int

    def __call__(self, state: Any, x: jax.Array, start: jax.Array) -> Any:
        """Returns the recurrent state after every step.

        Args:
          state: recurrent state before the first step, `[N, size]`.
          x: inputs, `[T, N, F]`.
          start: `[T, N]`, the input is the first of an episode: the state is cleared before it.

        Returns:
          `[T, N, size]`; the last step continues the sequence, and `output_of` gives the outputs.
        """
        return run([self], [state], [x], start)[0]

    @nn.compact
    def weights(self, num_inputs: int) -> _Weights:
        """Returns the weights for inputs of a size, a part for each gate."""
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


def run(
    layers: Sequence[RecurrentLayer],
    states: Sequence[Any],
    inputs: Sequence[jax.Array],
    start: jax.Array,
) -> list[Any]:
    """Returns the states of layers of one kind and size after every step; see `RecurrentLayer`.

    An accelerator runs one loop, which launches as many kernels for several layers as for one. A
    CPU multiplies a batch of small matrices more slowly than one after the other.

    Args:
      layers: bound modules.
      states: of each layer before the first step.
      inputs: of each layer, `[T, N, F]`; F may differ.
      start: `[T, N]`.
    """
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
    return jax.lax.platform_dependent(*arguments, cpu=separately, default=together)


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


def initial_state(kind: str, size: int, batch_shape: tuple[int, ...]) -> Any:
    """Returns the recurrent state at the start of an episode, `[*batch_shape, size]`."""
    zeros = jnp.zeros((*batch_shape, size), jnp.float32)
    return (zeros, zeros) if kind == "lstm" else zeros
