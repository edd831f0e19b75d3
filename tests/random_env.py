"""An environment of noise: any spaces, episodes of random length, rewards that depend on all."""

import jax
import jax.numpy as jnp

from ppo_jax.envs import spaces
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Dict, Discrete, MultiDiscrete, Tuple


def sample(space, key):
    """A random value of a space; at least one action of a mask is allowed."""
    if isinstance(space, Dict):
        names = space.names
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        value = {name: sample(entry, keys[name]) for name, entry in space.spaces}
        if "action_mask" in value:
            value["action_mask"] = value["action_mask"].at[..., 0].set(True)
        return value
    if isinstance(space, Tuple):
        keys = jax.random.split(key, len(space.spaces))
        return tuple(map(sample, space.spaces, keys))
    if isinstance(space, (Discrete, MultiDiscrete)):
        sizes = jnp.asarray(space.num_values)
        return jax.random.randint(key, spaces.shape_of(space), 0, sizes)
    if space.dtype == "bool":
        return jax.random.bernoulli(key, 0.5, space.shape)
    if space.dtype == "uint8":
        return jax.random.randint(key, space.shape, 0, 256).astype(jnp.uint8)
    return 3.0 + 2.0 * jax.random.normal(key, space.shape, space.dtype)


def random_env(observation_space, action_space):
    def reset(key, params):
        del params
        return sample(observation_space, key), jnp.zeros((), jnp.int32)

    def step(key, state, action, params):
        del params
        obs_key, end_key, reward_key = jax.random.split(key, 3)
        terminated, truncated = jax.random.bernoulli(end_key, 0.15, (2,))
        reward = jax.random.normal(reward_key) + jnp.mean(jnp.float32(action))
        obs = sample(observation_space, obs_key)
        return Step(obs, state + 1, reward, terminated, truncated)

    return Environment("noise", reset, step, (), observation_space, action_space)
