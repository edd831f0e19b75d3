"""From a config and spaces to the network that acts, checked before anything is traced."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax import running_stats
from ppo_jax.config import Config, ConfigError
from ppo_jax.envs import spaces
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.spaces import Box, Dict, Discrete, Leaf, MultiDiscrete, Space
from ppo_jax.policy import networks
from ppo_jax.policy.distributions import Head, make_head
from ppo_jax.policy.initializers import GAINS, draw
from ppo_jax.policy.memory import Memory, initial_memory
from ppo_jax.policy.networks import ActorCritic, View
from ppo_jax.running_stats import RunningStats

ObsStats = tuple[RunningStats | None, ...]
"""Of each array of an observation, in the order of its leaves; None for what is not floating."""


class PolicySpec(NamedTuple):
    """The static part of a policy: enough to build its network again. Hashable.

    Fields are those of `Config`, but for the spaces.
    """

    observation_space: Space
    action_space: Leaf
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    shared_torso: bool = False
    has_critic: bool = True
    network: Any = "mlp"
    conv_layers: tuple[tuple[int, int, int], ...] = ()
    layer_norm: bool = False
    embedding_size: int | None = None
    actor_keys: tuple[str, ...] | None = None
    critic_keys: tuple[str, ...] | None = None
    memory: str | None = None
    memory_size: int | None = None
    action_distribution: str | None = None
    state_dependent_std: bool = False


def make_spec(config: Config, env: Environment, *, has_critic: bool = True) -> PolicySpec:
    """The spec of the policies that `config` trains in `env`.

    Raises:
      ConfigError: the policy does not fit the spaces.
    """
    own = ("observation_space", "action_space", "has_critic")
    fields = {name: getattr(config, name) for name in PolicySpec._fields if name not in own}
    spec = PolicySpec(env.observation_space, env.action_space, has_critic=has_critic, **fields)
    try:
        hash(spec)
    except TypeError as error:
        raise ConfigError(
            f"network must be hashable; {type(config.network).__name__} is not ({error}). "
            "Use tuples for lists in its fields."
        ) from error
    network_of(spec)
    return spec


def init_params(
    spec: PolicySpec, key: jax.Array, obs: Any, gains: Mapping[str, Any] = GAINS
) -> Any:
    """Parameters for observations `[N, ...]`."""
    network = network_of(spec)
    draw_key, init_key = jax.random.split(key)
    if spec.memory is None:
        return draw(draw_key, network.init(init_key, obs), gains)
    (num_envs,) = networks.batch_shape_of(spec.observation_space, obs)
    sequence = jax.tree.map(lambda x: x[None], obs)
    memory = initial_memory_of(spec, (num_envs,))
    start = jnp.zeros((1, num_envs), bool)
    return draw(draw_key, network.init(init_key, sequence, memory, start), gains)


def initial_memory_of(spec: PolicySpec, batch_shape: tuple[int, ...]) -> Any:
    """What actor and critic carry when nothing happened yet; None without a memory."""
    if spec.memory is None:
        return None
    parts = ["actor"] if spec.shared_torso or not spec.has_critic else ["actor", "critic"]
    return {part: initial_memory(spec.memory, _memory_size(spec), batch_shape) for part in parts}


def _memory_size(spec: PolicySpec) -> int:
    return 128 if spec.memory_size is None else spec.memory_size


@functools.cache
def head_of(spec: PolicySpec) -> Head:
    """The action head of a spec."""
    return make_head(
        spec.action_space,
        spec.action_distribution,
        state_dependent_std=spec.state_dependent_std,
    )


@functools.cache
def network_of(spec: PolicySpec) -> ActorCritic:
    """The network of a spec.

    Raises:
      ConfigError: the policy does not fit the spaces.
    """
    _check_action_mask(spec)
    has_own_critic = spec.has_critic and not spec.shared_torso
    if spec.critic_keys is not None and not has_own_critic:
        raise ConfigError(
            "critic_keys needs a critic with a torso of its own; the torso is shared, or the "
            "algorithm has no critic. Leave critic_keys out."
        )
    actor_view = networks.make_view(spec.observation_space, spec.actor_keys)
    critic_view = networks.make_view(spec.observation_space, spec.critic_keys)
    memory = None if spec.memory is None else Memory(spec.memory, _memory_size(spec))
    return ActorCritic(
        head=head_of(spec),
        space=spec.observation_space,
        actor_view=actor_view,
        critic_view=critic_view,
        actor_torso=_make_torso(spec, actor_view),
        critic_torso=_make_torso(spec, critic_view) if has_own_critic else None,
        actor_memory=memory,
        critic_memory=memory.copy() if memory is not None and has_own_critic else None,
        has_critic=spec.has_critic,
    )


def _make_torso(spec: PolicySpec, view: View) -> nn.Module:
    if not isinstance(spec.network, str):
        _check_module(spec, view.space)
        return spec.network.copy()
    if spec.embedding_size is not None and all(
        isinstance(leaf, Box) for leaf in spaces.leaves(spec.observation_space)
    ):
        raise ConfigError(
            f"embedding_size needs observations with integers; got {spec.observation_space}. "
            "Leave embedding_size out."
        )
    activation = getattr(nn, spec.activation)
    make_image = None
    if spec.network == "impala_cnn":
        make_image = functools.partial(networks.ResNet, activation)
    elif spec.network != "mlp":
        layers = networks.CONVOLUTIONS.get(spec.network, spec.conv_layers)
        make_image = functools.partial(networks.CNN, layers, activation)
    if make_image is not None and not any(map(networks.is_image, spaces.leaves(view.space))):
        raise ConfigError(
            f"network {spec.network} needs images, arrays of height, width and channels; "
            f"observations are {view.space}. Use mlp."
        )
    torso = networks.Torso(
        view.space,
        make_image,
        functools.partial(networks.MLP, spec.hidden_sizes, activation, spec.layer_norm),
        spec.embedding_size,
    )
    if isinstance(spec.network, str) and make_image is not None:
        _check_shapes(torso, view.space, spec.network)
    return torso


_CONTRACT = "network must be a flax.linen module that maps observations [B, ...] to features [B, F]"


_OF_OUR_TORSOS = ("hidden_sizes", "activation", "layer_norm", "embedding_size")


def _check_module(spec: PolicySpec, space: Space) -> None:
    """Tells how a user's module breaks the contract, before anything is trained."""
    network = spec.network
    for name in _OF_OUR_TORSOS:
        if getattr(spec, name) != PolicySpec._field_defaults[name]:
            raise ConfigError(
                f"{name} belongs to networks of ours, and network is a module of your own. "
                f"Leave {name} out."
            )
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{_CONTRACT}; got {network!r}. Make one, or name one of ours.")
    features = _check_shapes(network, space, type(network).__name__)
    if not (
        isinstance(features, jax.ShapeDtypeStruct)
        and features.ndim == 2
        and features.shape[0] == _BATCH
        and jnp.issubdtype(features.dtype, jnp.floating)
    ):
        raise ConfigError(
            f"{_CONTRACT}; {type(network).__name__} maps a batch of {_BATCH} of {space} to "
            f"{features}. Return one floating-point array, batch first."
        )


_BATCH = 3  # unlike the shapes of anything else


def _check_shapes(network: nn.Module, space: Space, name: str) -> Any:
    """What the network makes of a batch; a `ConfigError` if it cannot take it."""
    obs = example(space, (_BATCH,))
    try:
        result, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), obs)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{_CONTRACT}; {name} fails for a batch of {_BATCH} of {space}: {error}"
        ) from error
    if set(variables) - {"params"}:
        raise ConfigError(
            f"{_CONTRACT} with parameters alone; {name} has {', '.join(sorted(variables))}. "
            "Leave out layers that keep statistics, such as BatchNorm; LayerNorm will do."
        )
    return result


def example(space: Space, batch_shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of a batch of values of a space."""
    if isinstance(space, Dict):
        return {name: example(entry, batch_shape) for name, entry in space.spaces}
    if isinstance(space, spaces.Tuple):
        return tuple(example(entry, batch_shape) for entry in space.spaces)
    return jax.ShapeDtypeStruct((*batch_shape, *spaces.shape_of(space)), spaces.dtype_of(space))


def initial_obs_stats(space: Space) -> ObsStats:
    """Statistics of no observation yet, for every floating-point array.

    Raises:
      ConfigError: there is none.
    """
    entries = dict(space.spaces) if isinstance(space, Dict) else {"": space}
    stats = tuple(
        running_stats.initial(leaf.shape)
        if isinstance(leaf, Box)
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and name != networks.ACTION_MASK
        else None
        for name, entry in entries.items()
        for leaf in spaces.leaves(entry)
    )
    if all(x is None for x in stats):
        raise ConfigError(
            f"normalize_obs needs floating-point observations; got {space}. "
            "Leave normalize_obs out."
        )
    return stats


def _check_action_mask(spec: PolicySpec) -> None:
    space = spec.observation_space
    if not (isinstance(space, Dict) and networks.has_action_mask(space)):
        return
    mask = dict(space.spaces)[networks.ACTION_MASK]
    actions = spec.action_space
    if not isinstance(actions, (Discrete, MultiDiscrete)):
        raise ConfigError(
            f"an action_mask needs actions that are integers; got {actions}. "
            "Name that entry of the observation otherwise."
        )
    sizes = actions.num_values
    needed = (sum(sizes) if isinstance(sizes, tuple) else sizes,)
    if not (isinstance(mask, Box) and mask.shape == needed and mask.dtype == "bool"):
        raise ConfigError(
            f"an action_mask must be a bool Box of one entry for each action, {needed}; got "
            f"{mask}. Change the environment's observation space."
        )
