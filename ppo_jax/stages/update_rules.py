"""The third stage: rules by which the parameters change after a rollout.

Three rules stand alone: `minibatch_rule`, `gradient_rule` and `trust_region_rule`. Three wrap
another rule: `adaptive_penalty` and `adaptive_learning_rate` add state to it, and
`report_learning_rates` adds metrics.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ppo_jax.config import Config
from ppo_jax.hparams import HParams
from ppo_jax.ops import objectives, packing
from ppo_jax.ops.blocks import largest_divisor
from ppo_jax.ops.collective import mean_over
from ppo_jax.ops.natural_gradient import (
    MatrixVectorProduct,
    conjugate_gradient,
    fisher_vector_product,
    line_search,
)
from ppo_jax.ops.shuffle import shuffled
from ppo_jax.policy.networks import merge_params, split_params, torso_biases, with_biases
from ppo_jax.policy.spec import images_in_cache
from ppo_jax.stages.algorithm import MakeUpdateRule, UpdateInputs, UpdateRule
from ppo_jax.stages.losses import Losses
from ppo_jax.stages.optimizers import Optimizer, Schedule, clip_actor_and_critic
from ppo_jax.types import Batch, Scalars

SKIPPED = "train/skipped_fraction"
"""Metric that is 1 if an update was skipped because a gradient was not finite, and 0 otherwise."""
CRITIC_SKIPPED = "train/critic_skipped_fraction"
"""The same for the update of a critic that is fitted separately."""

LossFn = Callable[[Any, Batch, HParams], tuple[jax.Array, Scalars]]
"""`(params, batch, hparams) -> (loss, metrics)`, scalars."""
GradientFn = Callable[[Any, Batch, HParams], tuple[Any, Scalars]]
"""`(params, batch, hparams) -> (gradient, metrics)`."""

Carry = TypeVar("Carry")


def minibatch_rule(config: Config, losses: Losses, optimizer: Optimizer) -> UpdateRule:
    """Returns the rule that runs epochs of minibatch gradient steps on the joint loss.

    With `target_kl`, the first minibatch whose approximate KL exceeds it and all after it are
    computed but not applied, so that the trip count stays fixed under `vmap`. Metrics are means
    over the minibatches that were applied.
    """

    def init(params: Any, hparams: HParams) -> Any:
        return _initial_state(optimizer, hparams.learning_rate, hparams, params)

    def update(params: Any, state: Any, inputs: UpdateInputs) -> tuple[Any, Any, Scalars]:
        hparams = inputs.hparams
        flat, unravel = ravel_pytree(params)
        tx = optimizer(hparams.learning_rate * inputs.anneal, hparams, unravel)
        # Clipping separate norms needs the gradient as a tree; the optimiser clips the joint norm.
        clip = None
        if config.separate_grad_norms:
            clip = partial(clip_actor_and_critic, max_norm=hparams.max_grad_norm)
        step = _gradient_step(losses, _joint_gradient(losses), tx, unravel, hparams, clip=clip)

        def step_while_near(
            carry: tuple[_FlatLearner, jax.Array, jax.Array], biases: Any, samples: Batch
        ) -> tuple[tuple[_FlatLearner, jax.Array, jax.Array], tuple[Scalars, jax.Array]]:
            old, active, is_first = carry
            new, metrics = step(old, biases, samples)
            if hparams.target_kl is not None:
                # The KL is that of the parameters before this step, so the step that exceeds the
                # bound is the first that is not applied. A KL of NaN exceeds nothing: the guard
                # skips its update. The first KL is 0, up to rounding.
                is_beyond = metrics["train/approx_kl"] > hparams.target_kl
                active &= is_first | ~is_beyond
                new = _where(active, new, old)
            return (new, active, jnp.array(False)), (metrics, active)

        start = _FlatLearner(flat, state)
        (end, *_), (metrics, applied) = _run_epochs(
            step_while_near,
            (start, jnp.array(True), jnp.array(True)),
            inputs,
            biases_of=lambda carry: torso_biases(unravel(carry[0].params)),
            config=config,
            losses=losses,
        )
        params, state, means = _guarded(start, end, unravel, metrics, applied)
        if hparams.target_kl is not None:
            means["train/gradient_steps"] = _unless_skipped(means, jnp.sum(applied), jnp.int32(0))
        return params, state, means

    return UpdateRule(init, update)


def gradient_rule(config: Config, losses: Losses, optimizer: Optimizer) -> UpdateRule:
    """Returns the rule of one policy gradient step on the whole batch, then a critic fit."""
    fit_critic = _make_critic_fit(config, losses, optimizer)
    policy_gradient = _gradient_of(losses, losses.policy)

    def init(params: Any, hparams: HParams) -> Any:
        actor, critic = split_params(params)
        state = {
            "actor": _initial_state(optimizer, hparams.learning_rate, hparams, actor),
            "critic": None,
        }
        if hparams.critic_learning_rate is not None:
            state["critic"] = _initial_state(
                optimizer, hparams.critic_learning_rate, hparams, critic
            )
        return state

    def update(params: Any, state: Any, inputs: UpdateInputs) -> tuple[Any, Any, Scalars]:
        actor, critic = split_params(params)
        # Two optimisers, because actor and critic have learning rates and numbers of steps of their
        # own.
        actor_state, critic_state = state["actor"], state["critic"]
        hparams, batch = inputs.hparams, _with_normalized_advantages(inputs.batch, losses)
        flat, unravel = ravel_pytree(actor)
        tx = optimizer(hparams.learning_rate * inputs.anneal, hparams, unravel)
        step = _gradient_step(losses, policy_gradient, tx, unravel, hparams)
        # One step only: after it, the batch is off-policy.
        start = _FlatLearner(flat, actor_state)
        end, metrics = step(start, {}, batch)
        actor, actor_state, metrics = _guarded(start, end, unravel, metrics)
        if hparams.critic_learning_rate is not None:
            critic, critic_state, critic_metrics = fit_critic(critic, critic_state, inputs)
            metrics |= critic_metrics
        state = {"actor": actor_state, "critic": critic_state}
        return merge_params(actor, critic), state, metrics

    return UpdateRule(init, update, fits_critic_separately=True)


def trust_region_rule(config: Config, losses: Losses, optimizer: Optimizer) -> UpdateRule:
    """Returns the rule that maximises the surrogate within a mean KL of `max_kl`.

    Schulman et al. 2015 (arXiv:1502.05477), section 6 and appendix C. A natural gradient step is
    found by conjugate gradients, scaled to the bound in the quadratic model, and shortened until
    the surrogate improves within the true bound. If no step is accepted, the policy is unchanged.
    Then the critic is fitted.
    """
    assert config.cg_iterations is not None
    assert config.line_search_steps is not None
    iterations, line_search_steps = config.cg_iterations, config.line_search_steps
    axis_name = losses.shard.axis_name
    fit_critic = _make_critic_fit(config, losses, optimizer)

    def init(params: Any, hparams: HParams) -> Any:
        _, critic = split_params(params)
        return _initial_state(optimizer, hparams.critic_learning_rate, hparams, critic)

    def update(params: Any, state: Any, inputs: UpdateInputs) -> tuple[Any, Any, Scalars]:
        hparams, batch = inputs.hparams, _with_normalized_advantages(inputs.batch, losses)
        actor, critic = split_params(params)
        flat, unravel = ravel_pytree(actor)

        def loss(flat: jax.Array) -> tuple[jax.Array, Scalars]:
            return losses.policy(unravel(flat), batch, hparams)

        # Only the actor's parameters are in the constraint, so the vectors below exclude the
        # critic's.
        def kl(flat: jax.Array) -> jax.Array:
            return losses.kl(unravel(flat), batch)

        # Gradients use each device's share of a mean; the line search needs the mean over devices.
        def objective(flat: jax.Array) -> jax.Array:
            return mean_over(-loss(flat)[0], axis_name)

        def mean_kl(flat: jax.Array) -> jax.Array:
            return mean_over(kl(flat), axis_name)

        def product(vector: jax.Array) -> jax.Array:
            # Each device multiplies by the Fisher matrix of its samples; the mean of the products
            # is the product with the mean matrix.
            share = fisher_vector_product(kl, flat, damping=hparams.cg_damping)(vector)
            return mean_over(share, axis_name)

        # Conjugate gradients need full precision, which accelerators do not give by default.
        with jax.default_matmul_precision("highest"):
            (_, metrics), gradient = mean_over(
                jax.value_and_grad(loss, has_aux=True)(flat), axis_name
            )
            if config.max_skipped_updates:
                # The line search accepts no step from such a gradient; this only reports it.
                metrics[SKIPPED] = _is_not_finite(gradient)
            # The gradient is that of a loss, and the objective rises against it.
            step = _natural_step(product, -gradient, max_kl=hparams.max_kl, iterations=iterations)
            found = line_search(
                objective, mean_kl, flat, step, max_kl=hparams.max_kl, num_steps=line_search_steps
            )
        metrics |= {
            "train/kl": found.kl,
            "train/step_fraction": found.fraction,
            "train/surrogate_improvement": found.improvement,
        }
        critic, state, critic_metrics = fit_critic(critic, state, inputs)
        return merge_params(unravel(found.params), critic), state, metrics | critic_metrics

    return UpdateRule(init, update, fits_critic_separately=True)


def _with_normalized_advantages(batch: Batch, losses: Losses) -> Batch:
    advantages = losses.normalize_advantages(batch.advantages, batch.mask)
    return batch._replace(advantages=advantages)


def _natural_step(
    product: MatrixVectorProduct, gradient: jax.Array, *, max_kl: Any, iterations: int
) -> jax.Array:
    """Returns √(2 δ / gᵀF⁻¹g) F⁻¹g, the step along the natural gradient that reaches the bound."""
    direction = conjugate_gradient(product, gradient, iterations=iterations)
    # Equal to gᵀF⁻¹g if conjugate gradients had converged. The product makes the scale right for
    # the direction that was found.
    curvature = jnp.vdot(direction, product(direction))
    # A zero gradient has no direction: no step, rather than 0 / 0.
    scale = jnp.sqrt(2.0 * max_kl / jnp.where(curvature > 0, curvature, 1.0))
    return jnp.where(curvature > 0, scale, 0.0) * direction


def _initial_state(optimizer: Optimizer, learning_rate: Any, hparams: HParams, params: Any) -> Any:
    """Returns the initial state of an optimiser whose updates take one vector."""
    flat, unravel = ravel_pytree(params)
    return optimizer(learning_rate, hparams, unravel).init(flat)


class _FlatLearner(NamedTuple):
    """Parameters and the optimiser's state, as gradient steps change them."""

    params: jax.Array  # [P], all parameters concatenated
    opt_state: Any
    is_finite: jax.Array | bool = True  # [], all gradients so far were; a CPU leaves it True


def _gradient_step(
    losses: Losses,
    gradient: GradientFn,
    tx: optax.GradientTransformation,
    unravel: Callable[[jax.Array], Any],
    hparams: HParams,
    *,
    clip: Callable[[Any], Any] | None = None,
) -> Callable[[_FlatLearner, Any, Batch], tuple[_FlatLearner, Scalars]]:
    """Returns a function that takes one step of the optimiser on a minibatch.

    Parameters stay one vector from step to step. The package's optimisers work elementwise except
    for norms, and the norm of a vector is one kernel, while that of a tree is one for each leaf.

    Unless `max_skipped_updates` is 0, the metric `SKIPPED` tells `_guarded` whether the gradient is
    not finite. On accelerators, that step and all later ones leave the learner unchanged.

    Args:
      losses: the losses of the algorithm, which know the devices that share the minibatch.
      gradient: of the loss that is descended.
      tx: the optimiser.
      unravel: turns the vector of parameters into a tree.
      hparams: complete.
      clip: transforms a gradient as a tree, before the optimiser; None leaves it as it is.
    """

    def step(old: _FlatLearner, biases: Any, minibatch: Batch) -> tuple[_FlatLearner, Scalars]:
        params = with_biases(unravel(old.params), biases)
        grads, metrics = mean_over(gradient(params, minibatch, hparams), losses.shard.axis_name)
        # Averaging before clipping: the norm of a device's share is not that of the gradient.
        flat, _ = ravel_pytree(grads if clip is None else clip(grads))
        updates, opt_state = tx.update(flat, old.opt_state, old.params)
        new = _FlatLearner(jnp.add(old.params, updates), opt_state, old.is_finite)
        if losses.config.max_skipped_updates:
            metrics[SKIPPED] = _is_not_finite(flat)
            new = jax.lax.platform_dependent(
                metrics[SKIPPED],
                new,
                old,
                cpu=lambda is_not_finite, new, old: new,
                default=_while_finite,
            )
        return new, metrics

    return step


def _while_finite(is_not_finite: jax.Array, new: _FlatLearner, old: _FlatLearner) -> _FlatLearner:
    """Returns `new`, or `old` from the first gradient on that is not finite."""
    is_finite = old.is_finite & (is_not_finite == 0.0)
    return _where(is_finite, new, old)._replace(is_finite=is_finite)


def _where(condition: jax.Array | bool, new: Any, old: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), new, old)


def _is_not_finite(gradient: jax.Array) -> jax.Array:
    """Returns 1 if the squared norm of a gradient is NaN or infinite, else 0.

    The square may overflow where the gradient is finite, as it would in the state of Adam. A clip
    of the norm computes the same sum.
    """
    return 1.0 - jnp.isfinite(jnp.sum(jnp.square(gradient)))


def _guarded(
    start: _FlatLearner,
    end: _FlatLearner,
    unravel: Callable[[jax.Array], Any],
    metrics: Scalars,
    applied: jax.Array | None = None,
) -> tuple[Any, Any, Scalars]:
    """Skips an update if the gradient of a step was not finite.

    The parameters return to those before the update. On a CPU the optimiser's state does as well:
    `_while_finite` after every step would take 6 % of the time (16 seeds of CartPole under `vmap`;
    CartPole with a GRU). Accelerators use `_while_finite`, so that the optimiser's state keeps the
    steps before the first such gradient. Restoring the state would need a copy, for Adam twice the
    memory of the parameters; the selection takes at most one kernel a minibatch.

    Args:
      start: the learner before the update.
      end: the learner after its last step.
      unravel: turns the vector of parameters into a tree.
      metrics: of every step, `[...]`.
      applied: bool `[...]`, the steps that count; None for all.

    Returns:
      Parameters, the optimiser's state, and means of the metrics over the steps that count.
    """
    means = jax.tree.map(lambda x: jnp.mean(x, where=applied), metrics)
    if SKIPPED not in metrics:
        return unravel(end.params), end.opt_state, means
    means[SKIPPED] = jnp.max(metrics[SKIPPED], where=applied, initial=0.0)

    def whole(is_finite: jax.Array, end: _FlatLearner, start: _FlatLearner) -> tuple[Any, Any]:
        kept = _where(is_finite, end, start)
        return unravel(kept.params), kept.opt_state

    def params_only(
        is_finite: jax.Array, end: _FlatLearner, start: _FlatLearner
    ) -> tuple[Any, Any]:
        # Trees instead of vectors: the tree of the parameters before the update exists already.
        params = _where(is_finite, unravel(end.params), unravel(start.params))
        return params, end.opt_state

    params, opt_state = jax.lax.platform_dependent(
        means[SKIPPED] == 0.0, end, start, cpu=whole, default=params_only
    )
    return params, opt_state, means


def _gradient_of(losses: Losses, loss_fn: LossFn) -> GradientFn:
    """Returns a function that computes the gradient of a loss.

    On a CPU, convolutional networks process as many images at a time as the cache holds.
    """
    gradient = partial(_gradient, loss_fn, chunk_size=losses.shard.chunk_size)
    if (num_images := images_in_cache(losses.spec)) is None:
        return gradient
    in_chunks = partial(_gradient, loss_fn, chunk_size=num_images)
    return partial(jax.lax.platform_dependent, cpu=in_chunks, default=gradient)


def _joint_gradient(losses: Losses) -> GradientFn:
    """Returns a function that computes the gradient of the joint loss.

    If the network is separable, a GPU computes the critic's part after the actor's, so that both
    use the same memory for activations: 1,024 seeds of CartPole take 194 instead of 261 MiB, for
    two or three more kernels a minibatch.
    """
    joint = _gradient_of(losses, losses.joint if losses.network.has_critic else losses.policy)
    if not losses.network.is_separable:
        return joint

    def weighted_value(params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Scalars]:
        loss, metrics = losses.value(params, batch, hparams)
        return hparams.vf_coef * loss, metrics

    policy_gradient = _gradient_of(losses, losses.policy)
    value_gradient = _gradient_of(losses, weighted_value)

    def in_turn(params: Any, minibatch: Batch, hparams: HParams) -> tuple[Any, Scalars]:
        actor, critic = split_params(params)
        first = policy_gradient(actor, minibatch, hparams)
        # Without the barrier XLA computes both losses in one kernel, after all activations.
        minibatch, (actor_grads, metrics) = jax.lax.optimization_barrier((minibatch, first))
        critic_grads, value_metrics = value_gradient(critic, minibatch, hparams)
        return merge_params(actor_grads, critic_grads), metrics | value_metrics

    return partial(jax.lax.platform_dependent, cpu=joint, tpu=joint, default=in_turn)


def _gradient(
    loss_fn: LossFn, params: Any, minibatch: Batch, hparams: HParams, *, chunk_size: int | None
) -> tuple[Any, Scalars]:
    """Returns the gradient of the mean loss, and metrics, accumulated over chunks of samples.

    A masked minibatch is not split into chunks, because these would need weights: not all samples
    count. Sequences and whole rollouts `[T, N]` are not split either.

    Args:
      loss_fn: the loss.
      params: of the network.
      minibatch: samples.
      hparams: complete.
      chunk_size: maximum number of samples that are differentiated together; None for all. Chunks
        are equal. If they could only be smaller than half of this, the minibatch is not split.
    """
    gradient = jax.grad(loss_fn, has_aux=True)
    size = minibatch.log_prob.size
    is_whole = minibatch.mask is not None or minibatch.log_prob.ndim > 1
    if chunk_size is None or size <= chunk_size or is_whole:
        return gradient(params, minibatch, hparams)
    num_chunks = size // largest_divisor(size, at_most=chunk_size)
    if num_chunks > 2 * size // chunk_size:
        return gradient(params, minibatch, hparams)
    chunks = jax.tree.map(
        lambda x: x.reshape(num_chunks, size // num_chunks, *x.shape[1:]), minibatch
    )

    def accumulate(total: Any, chunk: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, chunk, hparams)), None

    # A scan needs the structure of its carry before the first chunk is computed.
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], chunks), hparams)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zeros, chunks)
    # Chunks are of equal size, so the mean of their means is the mean.
    return jax.tree.map(lambda x: x / num_chunks, total)


def _make_critic_fit(
    config: Config, losses: Losses, optimizer: Optimizer
) -> Callable[..., tuple[Any, Any, Scalars]]:
    """Returns a function that takes epochs of minibatch steps on the value loss alone."""
    value_gradient = _gradient_of(losses, losses.value)

    def fit(params: Any, opt_state: Any, inputs: UpdateInputs) -> tuple[Any, Any, Scalars]:
        hparams = inputs.hparams
        flat, unravel = ravel_pytree(params)
        tx = optimizer(hparams.critic_learning_rate * inputs.anneal, hparams, unravel)
        step = _gradient_step(losses, value_gradient, tx, unravel, hparams)
        start = _FlatLearner(flat, opt_state)
        end, metrics = _run_epochs(
            step,
            start,
            inputs,
            biases_of=lambda learner: torso_biases(unravel(learner.params)),
            config=config,
            losses=losses,
        )
        # All minibatches count: `target_kl` stops the policy, which this does not change.
        params, opt_state, metrics = _guarded(start, end, unravel, metrics)
        if SKIPPED in metrics:  # the policy's own metric has this name
            metrics[CRITIC_SKIPPED] = metrics.pop(SKIPPED)
        return params, opt_state, metrics

    return fit


def _run_epochs(
    gradient_step: Callable[[Carry, Any, Batch], tuple[Carry, Any]],
    carry: Carry,
    inputs: UpdateInputs,
    *,
    biases_of: Callable[[Carry], Any],
    config: Config,
    losses: Losses,
) -> tuple[Carry, Any]:
    """Passes each sample of a batch to `gradient_step` once an epoch, in random minibatches.

    With a memory environments are shuffled instead of samples, so that a minibatch holds whole
    sequences.

    Args:
      gradient_step: `(carry, biases_of(carry), minibatch) -> (carry, outputs)`.
      carry: the initial carry.
      inputs: have the batch of the rollout, `[T, N]`, and the random key of the orders.
      biases_of: returns the biases that accelerators carry from step to step. XLA for GPUs adds a
        bias in the kernel of a product only if it is an argument of the loop; as a part of the
        vector of parameters it takes a pass over all activations.
      config: complete; has the numbers of epochs and minibatches.
      losses: normalise the advantages of a minibatch.

    Returns:
      The carry after the last step, and outputs `[num_epochs, num_minibatches]`.
    """
    assert config.num_epochs is not None, "the config is complete"
    assert config.num_minibatches is not None, "the config is complete"
    num_minibatches, batch = config.num_minibatches, inputs.batch
    num_steps, num_envs = batch.log_prob.shape
    has_memory = batch.recurrent_state is not None
    # The first axis is shuffled: environments, or samples.
    if has_memory:
        count, batch = num_envs, _swap_time_and_envs(batch)
    else:
        count = num_steps * num_envs
        batch = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), batch)

    @jax.named_scope("minibatches")
    def minibatch(
        carry: Carry, biases: Any, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[Carry, Any]:
        indices, advantages = inputs
        samples = jax.tree.map(lambda x: x[indices], batch)._replace(advantages=advantages)
        # Networks take sequences time-major.
        return gradient_step(carry, biases, _swap_time_and_envs(samples) if has_memory else samples)

    derive = jax.named_scope("minibatches")(biases_of)

    @jax.named_scope("shuffle")
    def epoch(carry: Carry, _: None, key: jax.Array) -> tuple[Carry, Any]:
        order = shuffled(key, jnp.arange(count), size=count)
        # Minibatches are consecutive parts of the order, so that each sample is in exactly one.
        order = order.reshape(num_minibatches, -1)
        # All minibatches are normalised together: devices exchange means once an epoch for it
        # instead of at every step.
        mask = None if batch.mask is None else batch.mask[order]
        advantages = jax.vmap(losses.normalize_advantages)(batch.advantages[order], mask)
        return packing.scan(minibatch, carry, (order, advantages), derive=derive)

    return packing.scan(epoch, carry, jax.random.split(inputs.key, config.num_epochs))


def _swap_time_and_envs(batch: Batch) -> Batch:
    """Turns `[T, N, ...]` into `[N, T, ...]` and back; the recurrent state has no time axis."""
    swapped = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch._replace(recurrent_state=None))
    return swapped._replace(recurrent_state=batch.recurrent_state)


class AdaptivePenaltyState(NamedTuple):
    """State of `adaptive_penalty`."""

    inner: Any  # state of the rule that is wrapped
    kl_coef: jax.Array  # [], β


def adaptive_penalty(make_rule: MakeUpdateRule) -> MakeUpdateRule:
    """Wraps a rule so that the weight β of the KL penalty follows the KL of each update.

    Schulman et al. 2017 (arXiv:1707.06347), section 4. β starts from `HParams.kl_coef` and is
    steered by `objectives.adapt_kl_coef`.
    """

    def make(config: Config, losses: Losses, optimizer: Optimizer) -> UpdateRule:
        rule = make_rule(config, losses, optimizer)

        def init(params: Any, hparams: HParams) -> AdaptivePenaltyState:
            # An array of its own, because a caller may donate the state and keep the
            # hyperparameters.
            kl_coef = jnp.asarray(hparams.kl_coef, jnp.float32)
            return AdaptivePenaltyState(rule.init(params, hparams), kl_coef)

        def update(
            params: Any, state: AdaptivePenaltyState, inputs: UpdateInputs
        ) -> tuple[Any, AdaptivePenaltyState, Scalars]:
            # Losses read β from the hyperparameters and need not know that it adapts.
            hparams = inputs.hparams.replace(kl_coef=state.kl_coef)
            params, inner, metrics = rule.update(
                params, state.inner, inputs._replace(hparams=hparams)
            )
            kl = mean_over(losses.kl_of_update(params, inputs.batch), losses.shard.axis_name)
            adapted = objectives.adapt_kl_coef(state.kl_coef, kl, d_targ=hparams.d_targ)
            kl_coef = _unless_skipped(metrics, adapted, state.kl_coef)
            metrics |= {"train/update_kl": kl, "train/kl_coef": state.kl_coef}
            return params, AdaptivePenaltyState(inner, kl_coef), metrics

        return rule._replace(init=init, update=update)

    return make


def _unless_skipped(metrics: Scalars, new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns `new`, or `old` if the update was skipped."""
    return jnp.where(metrics[SKIPPED] == 1.0, old, new) if SKIPPED in metrics else new


class AdaptiveRateState(NamedTuple):
    """State of `adaptive_learning_rate`."""

    inner: Any  # state of the rule that is wrapped
    factor: jax.Array  # [], of every learning rate


def adaptive_learning_rate(rule: UpdateRule, schedule: Schedule, losses: Losses) -> UpdateRule:
    """Wraps a rule so that the learning rate follows the KL of each update.

    Args:
      rule: the rule that is wrapped.
      schedule: adapts the factor of the learning rate.
      losses: of the algorithm, for the KL.
    """
    assert schedule.adapt is not None, "the schedule adapts"
    adapt = schedule.adapt

    def init(params: Any, hparams: HParams) -> AdaptiveRateState:
        return AdaptiveRateState(rule.init(params, hparams), jnp.ones(()))

    def update(
        params: Any, state: AdaptiveRateState, inputs: UpdateInputs
    ) -> tuple[Any, AdaptiveRateState, Scalars]:
        # The schedule and the adaptive factor multiply, so that both can be in effect.
        annealed = inputs._replace(anneal=inputs.anneal * state.factor)
        params, inner, metrics = rule.update(params, state.inner, annealed)
        kl = mean_over(losses.kl_of_update(params, inputs.batch), losses.shard.axis_name)
        metrics["train/update_kl"] = kl
        factor = _unless_skipped(metrics, adapt(state.factor, kl, inputs.hparams), state.factor)
        return params, AdaptiveRateState(inner, factor), metrics

    return rule._replace(init=init, update=update)


def report_learning_rates(rule: UpdateRule) -> UpdateRule:
    """Wraps a rule so that its metrics hold the learning rates that it used."""

    def update(params: Any, state: Any, inputs: UpdateInputs) -> tuple[Any, Any, Scalars]:
        params, state, metrics = rule.update(params, state, inputs)
        for name in ("learning_rate", "critic_learning_rate"):
            rate = getattr(inputs.hparams, name)
            if rate is not None:
                metrics[f"train/{name}"] = rate * inputs.anneal
        return params, state, metrics

    return rule._replace(update=update)
