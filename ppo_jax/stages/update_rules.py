"""The third stage: rules by which the parameters change after a rollout.

Three rules stand alone: `minibatch_rule`, `gradient_rule` and `trust_region_rule`. Three wrap
another rule: `adaptive_penalty` and `adaptive_learning_rate` add state to it, and
`report_learning_rates` adds metrics.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ppo_jax.config import Config
from ppo_jax.hparams import HParams
from ppo_jax.ops import objectives
from ppo_jax.ops.collective import mean_over
from ppo_jax.ops.natural_gradient import (
    MatrixVectorProduct,
    conjugate_gradient,
    fisher_vector_product,
    line_search,
)
from ppo_jax.policy.networks import merge_params, split_params, torso_biases
from ppo_jax.stages.algorithm import MakeUpdateRule, UpdateInputs, UpdateRule
from ppo_jax.stages.epochs import run_epochs
from ppo_jax.stages.gradient_steps import (
    CRITIC_SKIPPED,
    SKIPPED,
    FlatLearner,
    guarded,
    initial_state,
    is_not_finite,
    make_gradient_step,
    select,
    unless_skipped,
)
from ppo_jax.stages.gradients import gradient_of, joint_gradient
from ppo_jax.stages.losses import Losses
from ppo_jax.stages.optimizers import Optimizer, Schedule, clip_actor_and_critic
from ppo_jax.types import Batch, Scalars


def minibatch_rule(config: Config, losses: Losses, optimizer: Optimizer) -> UpdateRule:
    """Returns the rule that runs epochs of minibatch gradient steps on the joint loss.

    With `target_kl`, the first minibatch whose approximate KL exceeds it and all after it are
    computed but not applied, so that the trip count stays fixed under `vmap`. Metrics are means
    over the minibatches that were applied.
    """

    def init(params: Any, hparams: HParams) -> Any:
        return initial_state(optimizer, hparams.learning_rate, hparams, params)

    def update(params: Any, state: Any, inputs: UpdateInputs) -> tuple[Any, Any, Scalars]:
        hparams = inputs.hparams
        flat, unravel = ravel_pytree(params)
        tx = optimizer(hparams.learning_rate * inputs.anneal, hparams, unravel)
        # Clipping separate norms needs the gradient as a tree; the optimiser clips the joint norm.
        clip = None
        if config.separate_grad_norms:
            clip = partial(clip_actor_and_critic, max_norm=hparams.max_grad_norm)
        step = make_gradient_step(losses, joint_gradient(losses), tx, unravel, hparams, clip=clip)

        def step_while_near(
            carry: tuple[FlatLearner, jax.Array, jax.Array], biases: Any, samples: Batch
        ) -> tuple[tuple[FlatLearner, jax.Array, jax.Array], tuple[Scalars, jax.Array]]:
            old, active, is_first = carry
            new, metrics = step(old, biases, samples)
            if hparams.target_kl is not None:
                # The KL is that of the parameters before this step, so the step that exceeds the
                # bound is the first that is not applied. A KL of NaN exceeds nothing: the guard
                # skips its update. The first KL is 0, up to rounding.
                is_beyond = metrics["train/approx_kl"] > hparams.target_kl
                active &= is_first | ~is_beyond
                new = select(active, new, old)
            return (new, active, jnp.array(False)), (metrics, active)

        start = FlatLearner(flat, state)
        (end, *_), (metrics, applied) = run_epochs(
            step_while_near,
            (start, jnp.array(True), jnp.array(True)),
            inputs,
            biases_of=lambda carry: torso_biases(unravel(carry[0].params)),
            config=config,
            losses=losses,
        )
        params, state, means = guarded(start, end, unravel, metrics, applied)
        if hparams.target_kl is not None:
            means["train/gradient_steps"] = unless_skipped(means, jnp.sum(applied), jnp.int32(0))
        return params, state, means

    return UpdateRule(init, update)


def gradient_rule(config: Config, losses: Losses, optimizer: Optimizer) -> UpdateRule:
    """Returns the rule of one policy gradient step on the whole batch, then a critic fit."""
    fit_critic = _make_critic_fit(config, losses, optimizer)
    policy_gradient = gradient_of(losses, losses.policy)

    def init(params: Any, hparams: HParams) -> Any:
        actor, critic = split_params(params)
        state = {
            "actor": initial_state(optimizer, hparams.learning_rate, hparams, actor),
            "critic": None,
        }
        if hparams.critic_learning_rate is not None:
            state["critic"] = initial_state(
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
        step = make_gradient_step(losses, policy_gradient, tx, unravel, hparams)
        # One step only: after it, the batch is off-policy.
        start = FlatLearner(flat, actor_state)
        end, metrics = step(start, {}, batch)
        actor, actor_state, metrics = guarded(start, end, unravel, metrics)
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
        return initial_state(optimizer, hparams.critic_learning_rate, hparams, critic)

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
                metrics[SKIPPED] = is_not_finite(gradient)
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


def _make_critic_fit(
    config: Config, losses: Losses, optimizer: Optimizer
) -> Callable[..., tuple[Any, Any, Scalars]]:
    """Returns a function that takes epochs of minibatch steps on the value loss alone."""
    value_gradient = gradient_of(losses, losses.value)

    def fit(params: Any, opt_state: Any, inputs: UpdateInputs) -> tuple[Any, Any, Scalars]:
        hparams = inputs.hparams
        flat, unravel = ravel_pytree(params)
        tx = optimizer(hparams.critic_learning_rate * inputs.anneal, hparams, unravel)
        step = make_gradient_step(losses, value_gradient, tx, unravel, hparams)
        start = FlatLearner(flat, opt_state)
        end, metrics = run_epochs(
            step,
            start,
            inputs,
            biases_of=lambda learner: torso_biases(unravel(learner.params)),
            config=config,
            losses=losses,
        )
        # All minibatches count: `target_kl` stops the policy, which this does not change.
        params, opt_state, metrics = guarded(start, end, unravel, metrics)
        if SKIPPED in metrics:  # the policy's own metric has this name
            metrics[CRITIC_SKIPPED] = metrics.pop(SKIPPED)
        return params, opt_state, metrics

    return fit


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
            kl_coef = unless_skipped(metrics, adapted, state.kl_coef)
            metrics |= {"train/update_kl": kl, "train/kl_coef": state.kl_coef}
            return params, AdaptivePenaltyState(inner, kl_coef), metrics

        return rule._replace(init=init, update=update)

    return make


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
        factor = unless_skipped(metrics, adapt(state.factor, kl, inputs.hparams), state.factor)
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
