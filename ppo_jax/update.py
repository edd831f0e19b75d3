"""The second stage: learn from a batch by epochs of minibatch gradient steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ppo_jax import objectives
from ppo_jax.config import Config, HParams
from ppo_jax.optimizers import Optimizer
from ppo_jax.policy.policy import PolicySpec, head_of, network_of
from ppo_jax.shuffle import shuffled
from ppo_jax.types import Batch, Learner, Metrics


class PolicyTerms(NamedTuple):
    """What an objective may look at, per sample of the policy that acted; all `[B]`."""

    ratio: jax.Array  # π_θ(a|s) / π_θold(a|s)
    advantages: jax.Array


Objective = Callable[[PolicyTerms, HParams], jax.Array]
"""Per-sample objective of the policy `[B]`, to be maximised."""

LossFn = Callable[[Any, Batch, HParams], tuple[jax.Array, Metrics]]

UpdateFn = Callable[[Learner, Batch, jax.Array, HParams, jax.Array], tuple[Learner, Metrics]]
"""`(learner, batch [T, N], key, hparams, learning_rate) -> (learner, metrics)`."""


def make_loss(config: Config, spec: PolicySpec, objective: Objective) -> LossFn:
    """The loss of one minibatch: −objective + vf_coef · value loss − ent_coef · entropy."""
    network, head = network_of(spec), head_of(spec)

    def loss_fn(params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
        advantages = batch.advantages
        if config.normalize_advantage == "minibatch":
            advantages = objectives.standardize(advantages)
        action_params, value = network.apply(params, batch.obs)
        distribution = head.distribution(action_params)
        log_ratio = distribution.log_prob(batch.action) - batch.log_prob
        ratio = jnp.exp(log_ratio)
        policy_loss = -jnp.mean(objective(PolicyTerms(ratio, advantages), hparams))
        value_loss = jnp.mean(_value_loss(value, batch, hparams))
        entropy = jnp.mean(distribution.entropy())
        loss = policy_loss + hparams.vf_coef * value_loss - hparams.ent_coef * entropy
        metrics = {
            "train/policy_loss": policy_loss,
            "train/value_loss": value_loss,
            "train/entropy": entropy,
            "train/approx_kl": jnp.mean(objectives.approx_kl(log_ratio)),
        }
        if hparams.clip_eps is not None:
            metrics["train/clip_fraction"] = jnp.mean(jnp.abs(ratio - 1.0) > hparams.clip_eps)
        return loss, metrics

    return loss_fn


def make_update(config: Config, loss_fn: LossFn, optimizer: Optimizer) -> UpdateFn:
    """Epochs of minibatch gradient steps, each epoch in a new random order.

    With `target_kl`, the first minibatch whose approximate KL exceeds it and all after it are
    computed but not applied, so that the trip count stays fixed under `vmap`; metrics are the
    means over the minibatches that were applied.
    """
    num_minibatches, batch_size = config.num_minibatches, config.batch_size
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def update(
        learner: Learner,
        batch: Batch,
        key: jax.Array,
        hparams: HParams,
        learning_rate: jax.Array,
    ) -> tuple[Learner, Metrics]:
        tx = optimizer(learning_rate, hparams.max_grad_norm)
        batch = jax.tree.map(lambda x: x.reshape(batch_size, *x.shape[2:]), batch)

        def minibatch(
            carry: tuple[Learner, jax.Array], indices: jax.Array
        ) -> tuple[tuple[Learner, jax.Array], tuple[Metrics, jax.Array]]:
            learner, active = carry
            samples = jax.tree.map(lambda x: x[indices], batch)
            (_, metrics), grads = grad_fn(learner.params, samples, hparams)
            updates, opt_state = tx.update(grads, learner.opt_state, learner.params)
            params = optax.apply_updates(learner.params, updates)
            stepped = Learner(params=params, opt_state=opt_state)
            if hparams.target_kl is not None:
                active &= metrics["train/approx_kl"] <= hparams.target_kl
                stepped = jax.tree.map(partial(jnp.where, active), stepped, learner)
            return (stepped, active), (metrics, active)

        def epoch(
            carry: tuple[Learner, jax.Array], key: jax.Array
        ) -> tuple[tuple[Learner, jax.Array], tuple[Metrics, jax.Array]]:
            order = shuffled(key, jnp.arange(batch_size), size=batch_size)
            return jax.lax.scan(minibatch, carry, order.reshape(num_minibatches, -1))

        start = (learner, jnp.array(True))
        epoch_keys = jax.random.split(key, config.num_epochs)
        (learner, _), (metrics, applied) = jax.lax.scan(epoch, start, epoch_keys)
        metrics = jax.tree.map(lambda x: jnp.mean(x, where=applied), metrics)
        if hparams.target_kl is not None:
            metrics["train/gradient_steps"] = jnp.sum(applied)
        return learner, metrics

    return update


def _value_loss(value: jax.Array, batch: Batch, hparams: HParams) -> jax.Array:
    if hparams.value_clip_eps is None:
        return objectives.value_loss(value, batch.targets)
    return objectives.clipped_value_loss(
        value, batch.value, batch.targets, value_clip_eps=hparams.value_clip_eps
    )
