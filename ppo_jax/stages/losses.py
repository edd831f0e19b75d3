"""Losses of a batch: the policy's objective and the critic's error, composed in one place."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.config import Config
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.ops import objectives
from ppo_jax.ops.blockwise import map_blockwise
from ppo_jax.ops.collective import sum_over
from ppo_jax.policy.distributions import Distribution, Head
from ppo_jax.policy.networks import ActorCritic
from ppo_jax.policy.spec import PolicySpec, head_of, network_of
from ppo_jax.types import Batch, Objective, PolicyTerms, Scalars, Shard

Samples = dict[str, jax.Array]
"""Terms of a loss and metrics, per sample `[B]`."""


@dataclasses.dataclass(frozen=True)
class Losses:
    """Losses of one algorithm, as pure functions of parameters and a batch.

    Leaves of a batch are `[B, ...]` or `[T, N, ...]`; with a memory always the latter. Losses,
    metrics and the KL are shares of means over the devices of `shard.axis_name`; see
    `objectives.mean_share`.
    """

    config: Config
    """Complete: every setting of the algorithm has a value."""
    spec: PolicySpec
    objective: Objective
    shard: Shard
    per_episode: bool = False
    """Sum the objective over the steps of an episode and average over episodes, as in
    ∇R̄ = E[Σ_t …], instead of averaging over samples."""

    @property
    def network(self) -> ActorCritic:
        """The network of `spec`."""
        return network_of(self.spec)

    @property
    def head(self) -> Head:
        """The action head of `spec`."""
        return head_of(self.spec)

    def policy(self, params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Scalars]:
        """Returns −objective − ent_coef · entropy, and metrics."""
        samples = self._policy_samples(self._action_params(params, batch), batch, hparams)
        return self._composed(samples, _policy_weights(hparams), batch)

    def value(self, params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Scalars]:
        """Returns the mean loss of the critic, and metrics.

        The loss is half the squared error, or its clipped form if `value_clip_eps` is set.
        """
        values, _ = self.network.apply(
            # The actor's part is not computed.
            params,
            batch.obs,
            batch.recurrent_state,
            batch.start,
            method="critic",
        )
        samples = _value_samples(values, batch, hparams)
        return self._composed(samples, {"train/value_loss": 1.0}, batch)

    def joint(self, params: Any, batch: Batch, hparams: HParams) -> tuple[jax.Array, Scalars]:
        """Returns policy + vf_coef · value, in one pass through a shared torso, and metrics."""
        action_params, values = self.network.apply(
            params, batch.obs, batch.recurrent_state, batch.start
        )
        samples = self._policy_samples(action_params, batch, hparams)
        samples |= _value_samples(values, batch, hparams)
        weights = _policy_weights(hparams) | {"train/value_loss": hparams.vf_coef}
        return self._composed(samples, weights, batch)

    def kl(self, params: Any, batch: Batch) -> jax.Array:
        """Returns the mean exact KL(π_θold ‖ π_θ)."""
        samples = self._kl(self._distribution(params, batch), batch)
        return objectives.mean_share(samples, batch.mask, self.shard.axis_name)

    def kl_of_update(self, params: Any, batch: Batch) -> jax.Array:
        """Returns the mean exact KL(π_θold ‖ π_θ) over the batch of a whole rollout."""
        samples = self._of_rollout(self._kl, params, batch)
        return objectives.mean_share(samples, batch.mask, self.shard.axis_name)

    def log_ratio(self, params: Any, batch: Batch) -> jax.Array:
        """Returns log π_θ(a|s) − log π_θold(a|s) of a whole rollout, `[T, N]`."""
        return self._of_rollout(_log_ratio, params, batch)

    def normalize_advantages(self, advantages: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Returns the advantages of one minibatch, standardised if the config says so."""
        if self.config.normalize_advantage != "minibatch":
            return advantages
        return objectives.standardize(advantages, mask, self.shard.axis_name)

    def _of_rollout(
        self, compare: Callable[[Distribution, Batch], jax.Array], params: Any, batch: Batch
    ) -> jax.Array:
        """Returns `compare(π_θ, batch)` of a whole rollout, `[T, N]`, in the memory of a minibatch.

        A policy with a memory is evaluated in one sequence, which takes the memory of all samples.
        """

        def compare_block(block: Batch) -> jax.Array:
            return compare(self._distribution(params, block), block)

        if batch.recurrent_state is not None:
            return compare_block(batch)
        assert self.config.num_minibatches is not None, "the config is complete"
        # All samples together would take several times the memory of the gradients before.
        num_samples = batch.log_prob.size // self.config.num_minibatches
        return map_blockwise(compare_block, batch, num_samples=num_samples)

    def _action_params(self, params: Any, batch: Batch) -> Any:
        action_params, _ = self.network.apply(
            params, batch.obs, batch.recurrent_state, batch.start, method="actor"
        )
        return action_params

    def _distribution(self, params: Any, batch: Batch) -> Distribution:
        return self.head.distribution(self._action_params(params, batch))

    def _kl(self, distribution: Distribution, batch: Batch) -> jax.Array:
        return self.head.distribution(batch.action_params).kl_divergence(distribution)

    def _policy_samples(self, action_params: Any, batch: Batch, hparams: HParams) -> Samples:
        distribution = self.head.distribution(action_params)
        log_ratio = _log_ratio(distribution, batch)
        # The exact KL costs a second distribution; most objectives do without.
        needs_kl = self.config.exact_kl or hparams.kl_coef is not None
        terms = PolicyTerms(
            log_prob=log_ratio + batch.log_prob,
            log_ratio=log_ratio,
            ratio=jnp.exp(log_ratio),
            advantages=batch.advantages,
            kl=self._kl(distribution, batch) if needs_kl else None,
        )
        # Objectives are maximised, optimisers minimise.
        objective = self.objective(terms, hparams)
        if jnp.shape(objective) != log_ratio.shape:
            raise ConfigError(
                "an objective must return one number per sample, of the shape of its terms; that "
                f"of {self.config.algorithm} returns {jnp.shape(objective)} for {log_ratio.shape}."
            )
        loss = -objective
        if self.per_episode:
            loss *= self._mean_episode_length(batch, loss.dtype)
        samples = {
            "train/policy_loss": loss,
            "train/entropy": distribution.entropy(),
            "train/approx_kl": objectives.approx_kl(log_ratio),
        }
        if terms.kl is not None:
            samples["train/kl"] = terms.kl
        if hparams.clip_eps is not None:
            # Reported for every algorithm that has a clip range, whether or not its objective
            # clips.
            outside = jnp.abs(terms.ratio - 1.0) > hparams.clip_eps
            samples["train/clip_fraction"] = outside.astype(jnp.float32)
        return samples

    def _mean_episode_length(self, batch: Batch, dtype: Any) -> jax.Array:
        """Returns the mean length of the episodes that count, a scalar.

        Times this factor, a mean over steps is a sum over the steps of an episode.
        """
        assert batch.mask is not None, "whole episodes come with a mask"
        # Each episode that counts has one end. This holds for minibatches of samples, too.
        counts = jnp.stack([jnp.sum(batch.mask), jnp.sum(batch.mask & batch.done)])
        steps, episodes = sum_over(counts.astype(dtype), self.shard.axis_name)
        return steps / jnp.maximum(episodes, 1.0)

    def _composed(
        self, samples: Samples, weights: Mapping[str, Any], batch: Batch
    ) -> tuple[jax.Array, Scalars]:
        """Returns the mean of the weighted sum, and the means of all terms.

        One reduction computes the loss and one the metrics, because each is a kernel.
        """
        axis_name = self.shard.axis_name
        weighted = sum(weight * samples[name] for name, weight in weights.items())
        loss = objectives.mean_share(weighted, batch.mask, axis_name)
        # Metrics need no derivatives; without this JAX would build theirs as well.
        reported = jax.lax.stop_gradient(samples)
        return loss, objectives.mean_shares(reported, batch.mask, axis_name)


def _policy_weights(hparams: HParams) -> dict[str, Any]:
    return {"train/policy_loss": 1.0, "train/entropy": -hparams.ent_coef}


def _value_samples(value: jax.Array, batch: Batch, hparams: HParams) -> Samples:
    assert batch.value is not None, "a critic's loss needs a critic"
    assert batch.targets is not None, "a critic's loss needs targets"
    if hparams.value_clip_eps is None:
        losses = objectives.value_loss(value, batch.targets)
    else:
        losses = objectives.clipped_value_loss(
            value, batch.value, batch.targets, value_clip_eps=hparams.value_clip_eps
        )
    return {"train/value_loss": losses}


def _log_ratio(distribution: Distribution, batch: Batch) -> jax.Array:
    return distribution.log_prob(batch.action) - batch.log_prob
