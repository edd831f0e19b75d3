"""The losses of a batch: an objective of the policy and a critic's error, composed once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax import objectives
from ppo_jax.collective import mean_over
from ppo_jax.config import Config, HParams
from ppo_jax.policy.spec import PolicySpec, head_of, network_of
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

Samples = dict[str, jax.Array]
"""Terms of a loss and metrics, per sample `[B]`."""

LossFn = Callable[[Any, Batch, HParams], tuple[jax.Array, Metrics]]
"""`(params, batch, hparams) -> (loss, metrics)`, scalars."""


class Losses(NamedTuple):
    """Functions of parameters and a batch, whose leaves are `[B, ...]` or `[T, N, ...]`; with a
    memory always the latter.

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
    scaled: Callable[[jax.Array, jax.Array | None], jax.Array]
    """`(advantages, mask) -> advantages` of one minibatch, standardised if the config says so."""
    chunk_size: int | None
    """Samples of a minibatch that are differentiated at once; None for all."""


def make_losses(
    config: Config,
    spec: PolicySpec,
    objective: Objective,
    *,
    per_episode: bool,
    axis_name: str | None = None,
    chunk_size: int | None = None,
) -> Losses:
    """Builds the losses of an algorithm.

    Args:
      config: complete, with no setting left to the algorithm.
      spec: of the policy.
      objective: of the policy, per sample.
      per_episode: the objective is summed over an episode's steps and averaged over episodes,
        as in ∇R̄ = E[Σ_t …]; otherwise averaged over samples.
      axis_name: mesh axis of the devices that share the batch; None for one device.
      chunk_size: samples of a minibatch that are differentiated at once; None for all.
    """
    network, head = network_of(spec), head_of(spec)

    def mean(x: jax.Array, batch: Batch) -> jax.Array:
        return objectives.mean_share(x, batch.mask, axis_name)

    def composed(
        terms: Samples, weights: dict[str, Any], batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        """The mean of the weighted sum, and the means of all terms, each in one reduction."""
        loss = mean(sum(weight * terms[name] for name, weight in weights.items()), batch)
        seen = jax.lax.stop_gradient(terms)
        return loss, objectives.mean_shares(seen, batch.mask, axis_name)

    def scaled(advantages: jax.Array, mask: jax.Array | None) -> jax.Array:
        if config.normalize_advantage != "minibatch":
            return advantages
        return objectives.standardize(advantages, mask, axis_name)

    def actor(params: Any, batch: Batch) -> Any:
        return network.apply(params, batch.obs, batch.memory, batch.start, method="actor")[0]

    def log_ratio_of(distribution: Any, batch: Batch) -> jax.Array:
        return distribution.log_prob(batch.action) - batch.log_prob

    def kl_of(distribution: Any, batch: Batch) -> jax.Array:
        return head.distribution(batch.action_params).kl_divergence(distribution)

    def policy_terms(action_params: Any, batch: Batch, hparams: HParams) -> Samples:
        distribution = head.distribution(action_params)
        log_ratio = log_ratio_of(distribution, batch)
        needs_kl = config.exact_kl or hparams.kl_coef is not None
        terms = PolicyTerms(
            log_prob=log_ratio + batch.log_prob,
            log_ratio=log_ratio,
            ratio=jnp.exp(log_ratio),
            advantages=batch.advantages,
            kl=kl_of(distribution, batch) if needs_kl else None,
        )
        loss = -objective(terms, hparams)
        if per_episode:
            assert batch.mask is not None, "whole episodes come with a mask"
            steps = mean_over(jnp.sum(batch.mask).astype(loss.dtype), axis_name)
            loss *= steps / config.num_envs
        samples = {
            "train/policy_loss": loss,
            "train/entropy": distribution.entropy(),
            "train/approx_kl": objectives.approx_kl(log_ratio),
        }
        if terms.kl is not None:
            samples["train/kl"] = terms.kl
        if hparams.clip_eps is not None:
            outside = jnp.abs(terms.ratio - 1.0) > hparams.clip_eps
            samples["train/clip_fraction"] = outside.astype(jnp.float32)
        return samples

    def value_terms(value: jax.Array, batch: Batch, hparams: HParams) -> Samples:
        assert batch.value is not None, "a critic's loss needs a critic"
        assert batch.targets is not None, "a critic's loss needs targets"
        if hparams.value_clip_eps is None:
            losses = objectives.value_loss(value, batch.targets)
        else:
            losses = objectives.clipped_value_loss(
                value, batch.value, batch.targets, value_clip_eps=hparams.value_clip_eps
            )
        return {"train/value_loss": losses}

    def policy_weights(hparams: HParams) -> dict[str, Any]:
        return {"train/policy_loss": 1.0, "train/entropy": -hparams.ent_coef}

    def policy(params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
        terms = policy_terms(actor(params, batch), batch, hparams)
        return composed(terms, policy_weights(hparams), batch)

    def value(params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
        values, _ = network.apply(params, batch.obs, batch.memory, batch.start, method="critic")
        return composed(value_terms(values, batch, hparams), {"train/value_loss": 1.0}, batch)

    def joint(params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Metrics]:
        action_params, values = network.apply(params, batch.obs, batch.memory, batch.start)
        terms = policy_terms(action_params, batch, hparams) | value_terms(values, batch, hparams)
        weights = policy_weights(hparams) | {"train/value_loss": hparams.vf_coef}
        return composed(terms, weights, batch)

    def kl(params: Any, batch: Batch) -> jax.Array:
        distribution = head.distribution(actor(params, batch))
        return mean(kl_of(distribution, batch), batch)

    def log_ratio(params: Any, batch: Batch) -> jax.Array:
        return log_ratio_of(head.distribution(actor(params, batch)), batch)

    return Losses(policy, value, joint, kl, log_ratio, axis_name, scaled, chunk_size)
