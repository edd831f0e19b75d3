"""A greedy policy as a function of arrays, from raw observations to the environment's actions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.checks import example
from ppo_jax.envs.spaces import Box
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import head_of

Act = Callable[..., dict[str, Any]]
"""`(obs [B, ...]) -> {"action": [B, ...], …}`; with a memory `(obs, state)`, and "state" is in the
result. The other entries are parameters of the action distribution: "logits", or "mean" and
"log_std", or "alpha" and "beta"."""


def make_act(policy: Policy) -> Act:
    """Returns the greedy policy as a function whose constants are the policy's parameters.

    Observations are normalised inside. Actions are those of the environment, within the bounds of
    its space.
    """
    # Files of every format compute in single precision, as runtimes support it everywhere.
    policy = policy.replace(spec=dataclasses.replace(policy.spec, compute_dtype="float32"))
    head, space = head_of(policy.spec), policy.spec.action_space
    # Arrays of a device would be moved to whatever device compiles the function.
    policy = jax.device_get(policy)

    def act(obs: Any, state: Any = None) -> dict[str, Any]:
        # The actor's state alone: the critic does not act.
        params, states = policy.step(obs, None if state is None else {"actor": state})
        action = head.to_env(head.mode(params))
        if isinstance(space, Box) and space.low is not None and space.high is not None:
            shape = (1, *space.shape)  # of a batch
            low, high = (np.array(x, np.float32).reshape(shape) for x in (space.low, space.high))
            action = jnp.clip(action, low, high)
        # With the parameters of the distribution a program can sample actions itself.
        result = {"action": action, **_named(params)}
        return result if state is None else {**result, "state": states["actor"]}

    return act


def _named(params: Any) -> dict[str, jax.Array]:
    """Returns the parameters of a distribution by name."""
    if hasattr(params, "_asdict"):
        return params._asdict()
    # A registered head may have a pytree of its own.
    leaves = jax.tree.leaves(params)
    if len(leaves) == 1:
        return {"logits": leaves[0]}
    return {f"params_{i}": leaf for i, leaf in enumerate(leaves)}


def obs_shapes(policy: Policy, batch: Any) -> Any:
    """Returns the shapes and dtypes of a batch of observations, in the structure of the space."""
    return example(policy.spec.observation_space, (batch,))


def state_shapes(policy: Policy, batch: Any) -> Any:
    """Returns the shapes of the actor's recurrent states of a batch; None without a memory."""
    if policy.spec.memory is None:
        return None
    state = jax.eval_shape(policy.initial_recurrent_state)["actor"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape), x.dtype), state)
