"""Recurrent cells over whole sequences, with resets where episodes begin.

A memory is what a cell carries from step to step, `[N, size]` (a pair of them for LSTM).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.policy.initializers import orthogonal

_CELLS = {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}


class Memory(nn.Module):
    """A GRU, an LSTM or a minGRU, by name."""

    kind: str
    size: int

    @nn.compact
    def __call__(self, memory: Any, x: jax.Array, start: jax.Array) -> Any:
        """What is carried after every step.

        Args:
          memory: what was carried before the first step, `[N, size]`.
          x: inputs `[T, N, F]`.
          start: `[T, N]`, the input is an episode's first: what came before is forgotten.

        Returns:
          `[T, N, size]`; the last one continues the sequence, `read` gives the outputs.
        """
        if self.kind == "mingru":
            return self._min_gru(memory, x, start)
        cell = _CELLS[self.kind](self.size, recurrent_kernel_init=orthogonal())

        def step(
            cell: nn.RNNCellBase, memory: Any, inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[Any, Any]:
            x, start = inputs
            memory = jax.tree.map(lambda m: jnp.where(start[:, None], 0.0, m), memory)
            memory, _ = cell(memory, x)
            return memory, memory

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return scan(cell, memory, (x, start))[1]

    def _min_gru(self, memory: jax.Array, x: jax.Array, start: jax.Array) -> jax.Array:
        """h_t = (1 − z_t) h_{t−1} + z_t h̃_t, where z and h̃ are functions of x_t alone.

        Feng et al. 2024 (arXiv:2410.01201), section 3.1. Linear in h, so that all steps are
        found at once by an associative scan over pairs (a, b) of h ↦ a h + b.
        """
        update = nn.sigmoid(nn.Dense(self.size, kernel_init=orthogonal())(x))
        candidate = nn.Dense(self.size, kernel_init=orthogonal())(x)
        keep = jnp.where(start[..., None], 0.0, 1.0 - update)
        add = (update * candidate).at[0].add(keep[0] * memory)

        def compose(
            first: tuple[jax.Array, jax.Array], then: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            return first[0] * then[0], then[0] * first[1] + then[1]

        return jax.lax.associative_scan(compose, (keep, add))[1]


def initial_memory(kind: str, size: int, batch_shape: tuple[int, ...]) -> Any:
    """What is carried before anything was seen."""
    zeros = jnp.zeros((*batch_shape, size), jnp.float32)
    return (zeros, zeros) if kind == "lstm" else zeros


def read(memory: Any) -> jax.Array:
    """What the layers above see of a memory: of an LSTM's pair the output, not the cell."""
    return memory[-1] if isinstance(memory, tuple) else memory
