"""The second stage: three rules by which a learner changes after a rollout."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ppo_jax.collective import mean_over
from ppo_jax.config import Config, HParams
from ppo_jax.losses import Losses, LossFn
from ppo_jax.natural_gradient import (
    MatrixVectorProduct,
    conjugate_gradient,
    fisher_vector_product,
    line_search,
)
from ppo_jax.optimizers import Optimizer, clip_actor_and_critic
from ppo_jax.policy.networks import merge_params, split_params
from ppo_jax.shuffle import shuffled
from ppo_jax.types import Batch, Learner, Metrics


class UpdateRule(NamedTuple):
    """How a learner changes."""

    init: Callable[[Any, HParams], Any]
    """`(params, hparams) -> opt_state`."""
    update: Callable[[Learner, Batch, jax.Array, HParams, jax.Array], tuple[Learner, Metrics]]
    """`(learner, batch [T, N], key, hparams, anneal) -> (learner, metrics)`; `anneal` is the
    schedule's factor of every learning rate."""
    fits_critic_apart: bool


MakeUpdateRule = Callable[[Config, Losses, Optimizer], UpdateRule]

Carry = TypeVar("Carry")


def minibatch_rule(config: Config, losses: Losses, optimizer: Optimizer) -> UpdateRule:
    """Epochs of minibatch gradient steps on actor and critic together.

    With `target_kl`, the first minibatch whose approximate KL exceeds it and all after it are
    computed but not applied, so that the trip count stays fixed under `vmap`; metrics are the
    means over the minibatches that were applied.
    """

    def init(params: Any, hparams: HParams) -> Any:
        return optimizer(hparams.learning_rate, hparams).init(ravel_pytree(params)[0])

    def update(
        learner: Learner, batch: Batch, key: jax.Array, hparams: HParams, anneal: jax.Array
    ) -> tuple[Learner, Metrics]:
        flat, unravel = ravel_pytree(learner.params)
        tx = optimizer(hparams.learning_rate * anneal, hparams)
        clip = None
        if config.separate_grad_norms:
            clip = partial(clip_actor_and_critic, max_norm=hparams.max_grad_norm)
        step = _gradient_step(losses, losses.joint, tx, unravel, hparams, clip=clip)

        def step_while_near(
            carry: tuple[_Flat, jax.Array], samples: Batch
        ) -> tuple[tuple[_Flat, jax.Array], tuple[Metrics, jax.Array]]:
            old, active = carry
            new, metrics = step(old, samples)
            if hparams.target_kl is not None:
                active &= metrics["train/approx_kl"] <= hparams.target_kl
                new = jax.tree.map(partial(jnp.where, active), new, old)
            return (new, active), (metrics, active)

        start = _Flat(flat, learner.opt_state), jnp.array(True)
        (end, _), (metrics, applied) = _epochs(config, losses, step_while_near, start, batch, key)
        metrics = jax.tree.map(lambda x: jnp.mean(x, where=applied), metrics)
        if hparams.target_kl is not None:
            metrics["train/gradient_steps"] = jnp.sum(applied)
        return learner.replace(params=unravel(end.params), opt_state=end.opt_state), metrics

    return UpdateRule(init, update, fits_critic_apart=False)


def gradient_rule(config: Config, losses: Losses, optimizer: Optimizer) -> UpdateRule:
    """One gradient step of the policy on the whole batch, then epochs of the critic alone."""

    def init(params: Any, hparams: HParams) -> Any:
        actor, critic = split_params(params)
        tx = optimizer(hparams.learning_rate, hparams)
        has_critic = hparams.critic_learning_rate is not None
        return {
            "actor": tx.init(ravel_pytree(actor)[0]),
            "critic": tx.init(ravel_pytree(critic)[0]) if has_critic else None,
        }

    def update(
        learner: Learner, batch: Batch, key: jax.Array, hparams: HParams, anneal: jax.Array
    ) -> tuple[Learner, Metrics]:
        actor, critic = split_params(learner.params)
        actor_state, critic_state = learner.opt_state["actor"], learner.opt_state["critic"]
        tx = optimizer(hparams.learning_rate * anneal, hparams)
        batch = batch._replace(advantages=losses.scaled(batch.advantages, batch.mask))
        flat, unravel = ravel_pytree(actor)
        step = _gradient_step(losses, losses.policy, tx, unravel, hparams)
        (flat, actor_state), metrics = step(_Flat(flat, actor_state), batch)
        if hparams.critic_learning_rate is not None:
            critic, critic_state, critic_metrics = _fit_critic(
                config, losses, optimizer, (critic, critic_state), batch, key, hparams, anneal
            )
            metrics |= critic_metrics
        opt_state = {"actor": actor_state, "critic": critic_state}
        params = merge_params(unravel(flat), critic)
        return learner.replace(params=params, opt_state=opt_state), metrics

    return UpdateRule(init, update, fits_critic_apart=True)


def trust_region_rule(config: Config, losses: Losses, optimizer: Optimizer) -> UpdateRule:
    """Maximises the surrogate subject to a mean KL of at most `max_kl`; then fits the critic.

    Schulman et al. 2015 (arXiv:1502.05477), section 6 and appendix C: a natural gradient step
    by conjugate gradients, as long as the bound allows in the quadratic model, shortened until
    the surrogate improves within the true bound. Matrix products are in full precision, which
    conjugate gradients need, whatever the global setting.
    """
    assert config.cg_iterations is not None
    assert config.line_search_steps is not None
    iterations, line_search_steps = config.cg_iterations, config.line_search_steps

    def init(params: Any, hparams: HParams) -> Any:
        _, critic = split_params(params)
        tx = optimizer(hparams.critic_learning_rate, hparams)
        return tx.init(ravel_pytree(critic)[0])

    def update(
        learner: Learner, batch: Batch, key: jax.Array, hparams: HParams, anneal: jax.Array
    ) -> tuple[Learner, Metrics]:
        batch = batch._replace(advantages=losses.scaled(batch.advantages, batch.mask))
        actor, critic = split_params(learner.params)
        flat, unravel = ravel_pytree(actor)

        def loss(flat: jax.Array) -> tuple[jax.Array, Metrics]:
            return losses.policy(unravel(flat), batch, hparams)

        def kl(flat: jax.Array) -> jax.Array:
            return losses.kl(unravel(flat), batch)

        # Shares of means are differentiated; what the search compares are means.
        def objective(flat: jax.Array) -> jax.Array:
            return mean_over(-loss(flat)[0], losses.axis_name)

        def mean_kl(flat: jax.Array) -> jax.Array:
            return mean_over(kl(flat), losses.axis_name)

        def product(vector: jax.Array) -> jax.Array:
            share = fisher_vector_product(kl, flat, damping=hparams.cg_damping)(vector)
            return mean_over(share, losses.axis_name)

        with jax.default_matmul_precision("highest"):
            (_, metrics), gradient = mean_over(
                jax.value_and_grad(loss, has_aux=True)(flat), losses.axis_name
            )
            step = _natural_step(product, -gradient, max_kl=hparams.max_kl, iterations=iterations)
            found = line_search(
                objective, mean_kl, flat, step, max_kl=hparams.max_kl, num_steps=line_search_steps
            )
        metrics |= {
            "train/kl": found.kl,
            "train/step_fraction": found.fraction,
            "train/surrogate_improvement": found.improvement,
        }
        critic, opt_state, critic_metrics = _fit_critic(
            config, losses, optimizer, (critic, learner.opt_state), batch, key, hparams, anneal
        )
        params = merge_params(unravel(found.params), critic)
        return learner.replace(params=params, opt_state=opt_state), metrics | critic_metrics

    return UpdateRule(init, update, fits_critic_apart=True)


def _natural_step(
    product: MatrixVectorProduct, gradient: jax.Array, *, max_kl: Any, iterations: int
) -> jax.Array:
    """√(2 δ / gᵀF⁻¹g) F⁻¹g: the step along the natural gradient to the edge of the bound."""
    direction = conjugate_gradient(product, gradient, iterations=iterations)
    curvature = jnp.vdot(direction, product(direction))
    # A zero gradient has no direction: no step, rather than 0 / 0.
    scale = jnp.sqrt(2.0 * max_kl / jnp.where(curvature > 0, curvature, 1.0))
    return jnp.where(curvature > 0, scale, 0.0) * direction


class _Flat(NamedTuple):
    """What gradient steps change."""

    params: jax.Array  # [P], all parameters in a row
    opt_state: Any


def _gradient_step(
    losses: Losses,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    unravel: Callable[[jax.Array], Any],
    hparams: HParams,
    *,
    clip: Callable[[Any], Any] | None = None,
) -> Callable[[_Flat, Batch], tuple[_Flat, Metrics]]:
    """A step of the optimiser on a minibatch.

    Parameters stay one vector from step to step: an optimiser works elementwise but for a norm,
    which is one kernel where a tree takes one for each leaf, and a tree would be flattened and
    unflattened at every step. `clip` is for what depends on a gradient's leaves.
    """

    def step(old: _Flat, minibatch: Batch) -> tuple[_Flat, Metrics]:
        grads, metrics = mean_over(
            _gradient(loss_fn, unravel(old.params), minibatch, hparams, losses.chunk_size),
            losses.axis_name,
        )
        flat, _ = ravel_pytree(grads if clip is None else clip(grads))
        updates, opt_state = tx.update(flat, old.opt_state, old.params)
        return _Flat(jnp.add(old.params, updates), opt_state), metrics

    return step


def _gradient(
    loss_fn: LossFn, params: Any, minibatch: Batch, hparams: HParams, chunk_size: int | None
) -> tuple[Any, Metrics]:
    """The gradient of the mean loss and the metrics, accumulated over chunks that fit a cache.

    A masked minibatch is one chunk: its samples do not all count, so chunks would need weights.
    So is one of sequences.
    """
    gradient = jax.grad(loss_fn, has_aux=True)
    size = minibatch.log_prob.size
    is_whole = minibatch.mask is not None or minibatch.memory is not None
    if chunk_size is None or size <= chunk_size or size % chunk_size or is_whole:
        return gradient(params, minibatch, hparams)
    num_chunks = size // chunk_size
    chunks = jax.tree.map(lambda x: x.reshape(num_chunks, chunk_size, *x.shape[1:]), minibatch)

    def accumulate(total: Any, chunk: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, chunk, hparams)), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], chunks), hparams)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zeros, chunks)
    return jax.tree.map(lambda x: x / num_chunks, total)


def _fit_critic(
    config: Config,
    losses: Losses,
    optimizer: Optimizer,
    critic: tuple[Any, Any],
    batch: Batch,
    key: jax.Array,
    hparams: HParams,
    anneal: jax.Array,
) -> tuple[Any, Any, Metrics]:
    """Epochs of minibatch steps on the value loss alone."""
    params, opt_state = critic
    flat, unravel = ravel_pytree(params)
    tx = optimizer(hparams.critic_learning_rate * anneal, hparams)
    step = _gradient_step(losses, losses.value, tx, unravel, hparams)
    end, metrics = _epochs(config, losses, step, _Flat(flat, opt_state), batch, key)
    return unravel(end.params), end.opt_state, jax.tree.map(jnp.mean, metrics)


def _epochs(
    config: Config,
    losses: Losses,
    gradient_step: Callable[[Carry, Batch], tuple[Carry, Any]],
    carry: Carry,
    batch: Batch,
    key: jax.Array,
) -> tuple[Carry, Any]:
    """Passes every sample of `batch` `[T, N]` once an epoch, in a new random order each.

    With a memory, what is shuffled is environments: a minibatch holds whole sequences.
    """
    num_minibatches = config.num_minibatches or 1
    in_sequences = batch.memory is not None
    if in_sequences:
        count, batch = config.num_envs, _swap_time_and_envs(batch)
    else:
        count = config.batch_size
        batch = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), batch)

    def minibatch(carry: Carry, inputs: tuple[jax.Array, jax.Array]) -> tuple[Carry, Any]:
        indices, advantages = inputs
        samples = jax.tree.map(lambda x: x[indices], batch)._replace(advantages=advantages)
        return gradient_step(carry, _swap_time_and_envs(samples) if in_sequences else samples)

    def epoch(carry: Carry, key: jax.Array) -> tuple[Carry, Any]:
        order = shuffled(key, jnp.arange(count), size=count)
        order = order.reshape(num_minibatches, -1)
        # Of all minibatches at once: devices meet once an epoch for it, not at every step.
        mask = None if batch.mask is None else batch.mask[order]
        advantages = jax.vmap(losses.scaled)(batch.advantages[order], mask)
        return jax.lax.scan(minibatch, carry, (order, advantages))

    return jax.lax.scan(epoch, carry, jax.random.split(key, config.num_epochs or 1))


def _swap_time_and_envs(batch: Batch) -> Batch:
    """`[T, N, ...]` to `[N, T, ...]` and back; what is carried into a rollout has no time."""
    swapped = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch._replace(memory=None))
    return swapped._replace(memory=batch.memory)
