"""Recurrent cells over whole sequences, whose state is reset where episodes start.

A recurrent state is what a cell carries from step to step, `[N, size]`; an LSTM carries a pair.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.ops.recurrence import linear_recurrence
from ppo_jax.policy.initializers import orthogonal

_CELLS = {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}


class RecurrentLayer(nn.Module):
    """A GRU, an LSTM or a minGRU, by name."""

    kind: str
    size: int

    @nn.compact
    def __call__(self, state: Any, x: jax.Array, start: jax.Array) -> Any:
        """Returns the recurrent state after every step.

        Args:
          state: recurrent state before the first step, `[N, size]`.
          x: inputs, `[T, N, F]`.
          start: `[T, N]`, the input is the first of an episode: the state is reset before it.

        Returns:
          `[T, N, size]`; the last step continues the sequence, and `read` gives the outputs.
        """
        if self.kind == "mingru":
            return self._min_gru(state, x, start)
        cell = _CELLS[self.kind](self.size, recurrent_kernel_init=orthogonal())

        def step(
            cell: nn.RNNCellBase, state: Any, inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[Any, Any]:
            x, start = inputs
            state = jax.tree.map(lambda leaf: jnp.where(start[:, None], 0.0, leaf), state)
            state, _ = cell(state, x)
            return state, state

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return scan(cell, state, (x, start))[1]

    def _min_gru(self, state: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
        """Computes h_t = (1 − z_t) h_{t−1} + z_t h̃_t, where z and h̃ depend on x_t alone.

        Feng et al. 2024 (arXiv:2410.01201), section 3.1.
        """
        update_gate = nn.sigmoid(nn.Dense(self.size, kernel_init=orthogonal())(x))
        candidate = nn.Dense(self.size, kernel_init=orthogonal())(x)
        keep = jnp.where(start[..., None], 0.0, 1.0 - update_gate)
        return linear_recurrence(keep, update_gate * candidate, state)


def initial_state(kind: str, size: int, batch_shape: tuple[int, ...]) -> Any:
    """Returns the recurrent state at the start of an episode, `[*batch_shape, size]`."""
    zeros = jnp.zeros((*batch_shape, size), jnp.float32)
    return (zeros, zeros) if kind == "lstm" else zeros


def read(state: Any) -> jax.Array:
    """Returns the part of a recurrent state that the layers above see: an LSTM's output."""
    return state[-1] if isinstance(state, tuple) else state
