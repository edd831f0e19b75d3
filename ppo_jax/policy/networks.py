"""The networks: observations in, parameters of an action distribution and values out."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.policy.distributions import Head
from ppo_jax.policy.initializers import orthogonal

_HIDDEN_GAIN = np.sqrt(2.0)
# A small gain makes the first policy nearly uniform, or centred: Andrychowicz et al. 2021
# (arXiv:2006.05990), section 3.2.
_ACTOR_GAIN = 0.01
_CRITIC_GAIN = 1.0


class MLP(nn.Module):
    """Dense layers, each followed by an activation; orthogonal initialisation."""

    hidden_sizes: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., F]` to `[..., hidden_sizes[-1]]`."""
        for size in self.hidden_sizes:
            x = self.activation(_dense(size, _HIDDEN_GAIN)(x))
        return x


class ActorCritic(nn.Module):
    """An actor and a critic over observations of any batch shape.

    Each has hidden layers of its own unless `shared_torso`. The two are methods because a
    rollout needs only the actor: values come from one batched call afterwards.
    """

    head: Head
    obs_ndim: int
    hidden_sizes: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    shared_torso: bool
    has_critic: bool = True

    def setup(self) -> None:
        """Makes the layers; flax calls this."""
        self.actor_torso = MLP(self.hidden_sizes, self.activation)
        self.actor_out = _dense(self.head.num_outputs, _ACTOR_GAIN)
        if self.has_critic:
            if not self.shared_torso:
                self.critic_torso = MLP(self.hidden_sizes, self.activation)
            self.critic_out = _dense(1, _CRITIC_GAIN)
        if self.head.log_std_shape is not None:
            self.actor_log_std = _LogStd(self.head.log_std_shape)

    def __call__(self, obs: jax.Array) -> tuple[Any, jax.Array | None]:
        """Distribution parameters `[..., *]` and values `[...]`, None without a critic."""
        x = self._flat(obs)
        features = self.actor_torso(x)
        action_params = self._parametrize(features)
        if not self.has_critic:
            return action_params, None
        return action_params, self._value(features if self.shared_torso else x)

    def actor(self, obs: jax.Array) -> Any:
        """Distribution parameters `[..., *]`."""
        return self._parametrize(self.actor_torso(self._flat(obs)))

    def critic(self, obs: jax.Array) -> jax.Array:
        """Values `[...]`."""
        x = self._flat(obs)
        return self._value(self.actor_torso(x) if self.shared_torso else x)

    def _flat(self, obs: jax.Array) -> jax.Array:
        batch_shape = obs.shape[: obs.ndim - self.obs_ndim]
        return obs.reshape(*batch_shape, -1).astype(jnp.float32)

    def _parametrize(self, features: jax.Array) -> Any:
        log_std = None if self.head.log_std_shape is None else self.actor_log_std()
        return self.head.parametrize(self.actor_out(features), log_std)

    def _value(self, x: jax.Array) -> jax.Array:
        features = x if self.shared_torso else self.critic_torso(x)
        return self.critic_out(features).squeeze(-1)


class _LogStd(nn.Module):
    """A module of its own, so that the critic can be applied without the actor's parameters."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("value", nn.initializers.zeros_init(), self.shape)


def split_params(params: Any) -> tuple[Any, Any]:
    """Parameters of the actor and of the critic, where they share none."""
    modules = params["params"]
    critic = {name: value for name, value in modules.items() if name.startswith("critic_")}
    actor = {name: value for name, value in modules.items() if name not in critic}
    return {"params": actor}, {"params": critic}


def merge_params(actor: Any, critic: Any) -> Any:
    """The inverse of `split_params`."""
    return {"params": {**actor["params"], **critic["params"]}}


def _dense(size: int, gain: float) -> nn.Dense:
    return nn.Dense(size, kernel_init=orthogonal(gain))
