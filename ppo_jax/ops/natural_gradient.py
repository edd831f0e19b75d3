"""The natural gradient by conjugate gradients, and a line search inside a trust region.

All functions work on flat vectors `[P]` of P parameters. Every loop has a fixed trip count, so that
all functions can be vmapped.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Scalar = float | jax.Array
MatrixVectorProduct = Callable[[jax.Array], jax.Array]


def fisher_vector_product(
    mean_kl: Callable[[jax.Array], jax.Array], params: jax.Array, *, damping: Scalar
) -> MatrixVectorProduct:
    """Returns the product v ↦ (F + damping · I) v, where F is the Hessian of `mean_kl`.

    At the parameters of the old policy the Hessian of KL(old ‖ new) is the Fisher matrix; Schulman
    et al. 2015 (arXiv:1502.05477), appendix C.1.
    """

    def product(vector: jax.Array) -> jax.Array:
        # Forward over reverse: a Hessian-vector product without the Hessian.
        _, curvature = jax.jvp(jax.grad(mean_kl), (params,), (vector,))
        return curvature + damping * vector

    return product


def conjugate_gradient(
    product: MatrixVectorProduct, b: jax.Array, *, iterations: int, tolerance: float = 1e-10
) -> jax.Array:
    """Solves A x ≈ b for a symmetric positive definite A; Hestenes & Stiefel 1952.

    Args:
      product: v ↦ A v.
      b: right-hand side, `[P]`.
      iterations: rounds to run.
      tolerance: rounds after the squared residual has fallen below this multiple of |b|² change
        nothing.

    Returns:
      x, `[P]`.
    """
    dot = jnp.vdot
    first = dot(b, b)

    def improve(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, residual, direction, squared = carry
        product_p = product(direction)
        # A fixed number of rounds, so that the loop can be vmapped; rounds after convergence change
        # nothing.
        active = squared > tolerance * first
        step = jnp.where(active, squared / jnp.where(active, dot(direction, product_p), 1.0), 0.0)
        x = x + step * direction
        residual = residual - step * product_p
        next_squared = dot(residual, residual)
        ratio = jnp.where(active, next_squared / jnp.where(active, squared, 1.0), 0.0)
        direction = jnp.where(active, residual + ratio * direction, direction)
        return x, residual, direction, jnp.where(active, next_squared, squared)

    x, *_ = jax.lax.fori_loop(0, iterations, improve, (jnp.zeros_like(b), b, b, first))
    return x


class LineSearch(NamedTuple):
    """The result of a line search."""

    params: jax.Array
    fraction: jax.Array  # [], of the full step; 0 where none was accepted
    improvement: jax.Array  # [], of the objective
    kl: jax.Array  # []


def line_search(
    objective: Callable[[jax.Array], jax.Array],
    mean_kl: Callable[[jax.Array], jax.Array],
    params: jax.Array,
    step: jax.Array,
    *,
    max_kl: Scalar,
    num_steps: int,
) -> LineSearch:
    """Finds the longest of `step`, `step`/2, `step`/4, … that improves and stays within the bound.

    Schulman et al. 2015 (arXiv:1502.05477), appendix C. If none of `num_steps` lengths is accepted,
    the parameters are returned unchanged.

    Args:
      objective: function of the parameters, to be maximised.
      mean_kl: function of the parameters, to be at most `max_kl`.
      params: `[P]`.
      step: `[P]`, the longest step.
      max_kl: the bound.
      num_steps: lengths that are tried.
    """
    start = objective(params)

    def shorten(found: LineSearch, exponent: jax.Array) -> tuple[LineSearch, None]:
        fraction = 0.5**exponent
        candidate = params + fraction * step
        improvement, kl = objective(candidate) - start, mean_kl(candidate)
        # Fractions fall, so that the first that is accepted is the longest; later ones are ignored.
        accepted = (found.fraction == 0.0) & (improvement > 0.0) & (kl <= max_kl)
        new = LineSearch(candidate, fraction, improvement, kl)
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, found), None

    zero = jnp.zeros((), params.dtype)
    exponents = jnp.arange(num_steps, dtype=params.dtype)
    found, _ = jax.lax.scan(shorten, LineSearch(params, zero, zero, zero), exponents)
    return found
