"""The losses of a batch: an objective of the policy and a critic's error, composed once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax import objectives
from ppo_jax.config import Config, HParams
from ppo_jax.policy.policy import PolicySpec, head_of, network_of
from ppo_jax.types import Batch, Metrics


class PolicyTerms(NamedTuple):
    """What an objective may look at, per sample of the policy that acted."""

    log_prob: jax.Array  # [B], log π_θ(a|s)
    log_ratio: jax.Array  # [B], log π_θ(a|s) − log π_θold(a|s)
    ratio: jax.Array  # [B]
    advantages: jax.Array  # [B]
    kl: jax.Array | None  # [B], exact KL(π_θold ‖ π_θ); None where nothing asks for it


Objective = Callable[[PolicyTerms, HParams], jax.Array]
"""Per-sample objective of the policy `[B]`, to be maximised."""

LossFn = Callable[[Any, Batch, HParams], tuple[jax.Array, Metrics]]
"""`(params, batch, hparams) -> (loss, metrics)`, scalars."""


class Losses(NamedTuple):
    """Functions of parameters and a batch, whose leaves are `[B, ...]` or `[T, N, ...]`.

    Losses, metrics and the KL are shares of means over the devices of `axis_name`; see
    `objectives.mean_share`.
    """

    policy: LossFn
    """−objective − ent_coef · entropy."""
    value: LossFn
    """Half the squared error of the critic."""
    joint: LossFn
    """policy + vf_coef · value, in one pass through a shared torso."""
    kl: Callable[[Any, Batch], jax.Array]
    """Mean exact KL(π_θold ‖ π_θ)."""
    log_ratio: Callable[[Any, Batch], jax.Array]
    """log π_θ(a|s) − log π_θold(a|s), per sample."""
    axis_name: str | None
    """Mesh axis of the devices that share the batch; None for one device."""


def make_losses(
    config: Config,
    spec: PolicySpec,
    objective: Objective,
    *,
    per_episode: bool,
    axis_name: str | None = None,
) -> Losses:
    """Builds the losses of an algorithm.

    Args:
      config: complete, with no setting left to the algorithm.
      spec: of the policy.
      objective: of the policy, per sample.
      per_episode: the objective is summed over an episode's steps and averaged over episodes,
        as in ∇R̄ = E[Σ_t …]; otherwise averaged over samples.
      axis_name: mesh axis of the devices that share the batch; None for one device.
    """
    network, head = network_of(spec), head_of(spec)

    def mean(x: jax.Array, batch: Batch) -> jax.Array:
        return objectives.mean_share(x, batch.mask, axis_name)

    def actor(params: Any, batch: Batch) -> Any:
        return network.apply(params, batch.obs, method="actor")

    def log_ratio_of(distribution: Any, batch: Batch) -> jax.Array:
        return distribution.log_prob(batch.action) - batch.log_prob

    def kl_of(distribution: Any, batch: Batch) -> jax.Array:
        return head.distribution(batch.action_params).kl_divergence(distribution)

    def policy_loss(
        action_params: Any, batch: Batch, hparams: HParams
    ) -> tuple[jax.Array, Metrics]:
        advantages = batch.advantages
        if config.normalize_advantage == "minibatch":
            advantages = objectives.standardize(advantages, batch.mask, axis_name)
        distribution = head.distribution(action_params)
        log_ratio = log_ratio_of(distribution, batch)
        needs_kl = config.exact_kl or hparams.kl_coef is not None
        terms = PolicyTerms(
            log_prob=log_ratio + batch.log_prob,
            log_ratio=log_ratio,
            ratio=jnp.exp(log_ratio),
            advantages=advantages,
            kl=kl_of(distribution, batch) if needs_kl else None,
        )
        per_sample = objective(terms, hparams)
        if per_episode:
            assert batch.mask is not None, "whole episodes come with a mask"
            loss = -jnp.sum(jnp.where(batch.mask, per_sample, 0.0)) / config.num_envs
        else:
            loss = -mean(per_sample, batch)
        entropy = mean(distribution.entropy(), batch)
        metrics = {
            "train/policy_loss": loss,
            "train/entropy": entropy,
            "train/approx_kl": mean(objectives.approx_kl(log_ratio), batch),
        }
        if terms.kl is not None:
            metrics["train/kl"] = mean(terms.kl, batch)
        if hparams.clip_eps is not None:
            outside = jnp.abs(terms.ratio - 1.0) > hparams.clip_eps
            metrics["train/clip_fraction"] = mean(outside.astype(jnp.float32), batch)
        return loss - hparams.ent_coef * entropy, metrics

    def value_loss(value: jax.Array, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
        assert batch.value is not None, "a critic's loss needs a critic"
        assert batch.targets is not None, "a critic's loss needs targets"
        if hparams.value_clip_eps is None:
            losses = objectives.value_loss(value, batch.targets)
        else:
            losses = objectives.clipped_value_loss(
                value, batch.value, batch.targets, value_clip_eps=hparams.value_clip_eps
            )
        loss = mean(losses, batch)
        return loss, {"train/value_loss": loss}

    def policy(params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
        return policy_loss(actor(params, batch), batch, hparams)

    def value(params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
        return value_loss(network.apply(params, batch.obs, method="critic"), batch, hparams)

    def joint(params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
        action_params, values = network.apply(params, batch.obs)
        of_policy, policy_metrics = policy_loss(action_params, batch, hparams)
        of_value, value_metrics = value_loss(values, batch, hparams)
        return of_policy + hparams.vf_coef * of_value, policy_metrics | value_metrics

    def kl(params: Any, batch: Batch) -> jax.Array:
        distribution = head.distribution(actor(params, batch))
        return mean(kl_of(distribution, batch), batch)

    def log_ratio(params: Any, batch: Batch) -> jax.Array:
        return log_ratio_of(head.distribution(actor(params, batch)), batch)

    return Losses(policy, value, joint, kl, log_ratio, axis_name)
