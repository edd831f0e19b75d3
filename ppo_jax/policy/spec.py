"""The static part of a policy, and the network and action head that it describes.

Everything here is checked before anything is traced.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.config import (
    NETWORKS,
    SETTINGS_OF_LAYERS,
    TRANSFORMER_DEFAULTS,
    Config,
    PolicySettings,
    module_of,
)
from ppo_jax.envs import spaces
from ppo_jax.envs.checks import example
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.spaces import Box, Dict, Discrete, Leaf, MultiDiscrete, Space
from ppo_jax.errors import ConfigError
from ppo_jax.ops import running_stats
from ppo_jax.ops.blocks import nearest_divisors
from ppo_jax.ops.running_stats import RunningStats
from ppo_jax.policy import networks
from ppo_jax.policy.distributions import BOX_HEADS, Head, RegisteredHead, make_head
from ppo_jax.policy.initializers import draw
from ppo_jax.policy.networks import ActorCritic, View
from ppo_jax.policy.recurrent import Memory, RecurrentLayer
from ppo_jax.policy.transformer import GatedTransformer

ObsStats = tuple[RunningStats | None, ...]
"""One entry for each array of an observation, in the order of `jax.tree.leaves`; None for arrays
that are not floating-point."""

_DEFAULT_MEMORY_SIZE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySpec(PolicySettings):
    """The static part of a policy: enough to build its network again. Hashable."""

    observation_space: Space
    action_space: Leaf
    has_critic: bool = True
    # The parts that the names referred to when the spec was made. Registering a name again does not
    # change this policy.
    module: nn.Module | None = dataclasses.field(default=None, repr=False)
    """The user's module in place of the hidden layers; None for the package's own networks."""
    make_box_head: Callable[[Box], Head] | None = dataclasses.field(default=None, repr=False)
    """Makes the head of `action_distribution`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.module is None:
            self._set("module", module_of(self.network))
        if self.make_box_head is None:
            self._set("make_box_head", BOX_HEADS.get(self.action_distribution or ""))
        if self.memory is None:
            return
        defaults = {"memory_size": _DEFAULT_MEMORY_SIZE}
        # Recurrent cells have a size alone.
        if self.memory == "gtrxl":
            defaults |= TRANSFORMER_DEFAULTS
        for name, value in defaults.items():
            if getattr(self, name) is None:
                self._set(name, value)

    @property
    def has_critic_torso(self) -> bool:
        """The critic has hidden layers, and a memory if any, of its own."""
        return self.has_critic and not self.shared_torso


def make_spec(config: Config, env: Environment, *, has_critic: bool = True) -> PolicySpec:
    """Returns the spec of the policies that `config` trains in `env`.

    Raises:
      ConfigError: the policy does not fit the spaces.
    """
    spec = PolicySpec(
        observation_space=env.observation_space,
        action_space=env.action_space,
        has_critic=has_critic,
        **config.policy_settings(),
    )
    if spec.module is not None:
        _require_module(spec.module)
    # Builds the network once, for its checks: errors come before anything is traced.
    network_of(spec)
    return spec


def init_params(
    spec: PolicySpec, key: jax.Array, obs: Any, gains: Mapping[str, Any] | None = None
) -> Any:
    """Draws the parameters of a policy.

    Args:
      spec: of the policy.
      key: random key.
      obs: observations `[N, ...]`, for their shapes alone.
      gains: gains of the orthogonal initialisation by name; names that are missing keep their
        default in `defaults.GAINS`.
    """
    network = network_of(spec)
    # flax draws biases, embeddings and recurrent input weights; `draw` the orthogonal matrices.
    draw_key, init_key = jax.random.split(key)
    if spec.memory is None:
        return draw(draw_key, network.init(init_key, obs), gains)
    (num_envs,) = networks.batch_shape_of(spec.observation_space, obs)
    sequence = jax.tree.map(lambda x: x[None], obs)
    state = initial_recurrent_state(spec, (num_envs,))
    start = jnp.zeros((1, num_envs), bool)
    return draw(draw_key, network.init(init_key, sequence, state, start), gains)


def with_log_std(spec: PolicySpec, params: Any, log_std: Any) -> Any:
    """Returns parameters of a policy whose Gaussian has this log standard deviation.

    Raises:
      ConfigError: the standard deviation of the policy's actions is not a parameter.
    """
    if head_of(spec).log_std_shape is None:
        raise ConfigError(
            "initial_log_std needs a Gaussian whose standard deviation is a parameter; the policy "
            f"has {spec.action_distribution or 'gaussian'} actions in {spec.action_space} and "
            f"state_dependent_std={spec.state_dependent_std}. Leave initial_log_std out."
        )
    return networks.with_log_std(params, log_std)


def initial_recurrent_state(spec: PolicySpec, batch_shape: tuple[int, ...]) -> Any:
    """Returns the recurrent state of actor and critic at the start of an episode.

    A mapping from "actor", and "critic" if it has a memory of its own, to their states; None
    without a memory.
    """
    memory = _make_memory(spec)
    if memory is None:
        return None
    parts = ["actor", "critic"] if spec.has_critic_torso else ["actor"]
    return {part: memory.initial_state(batch_shape) for part in parts}


@functools.lru_cache(maxsize=64)  # a sweep of networks makes many
def head_of(spec: PolicySpec) -> Head:
    """Returns the action head of a spec."""
    return make_head(
        spec.action_space,
        spec.action_distribution,
        state_dependent_std=spec.state_dependent_std,
        make=spec.make_box_head,
    )


@functools.lru_cache(maxsize=64)  # a sweep of networks makes many
def network_of(spec: PolicySpec) -> ActorCritic:
    """Returns the network of a spec.

    Raises:
      ConfigError: the policy does not fit the spaces.
    """
    _check_action_mask(spec)
    for name in ("critic_keys", "critic_hidden_sizes"):
        if getattr(spec, name) is not None and not spec.has_critic_torso:
            raise ConfigError(
                f"{name} needs a critic with a torso of its own; the torso is shared, or the "
                f"algorithm has no critic. Leave {name} out."
            )
    actor_view = networks.make_view(spec.observation_space, spec.actor_keys)
    critic_view = networks.make_view(spec.observation_space, spec.critic_keys)
    critic_sizes = spec.critic_hidden_sizes
    if critic_sizes is None:
        critic_sizes = spec.hidden_sizes
    memory = _make_memory(spec)
    return ActorCritic(
        head=head_of(spec),
        space=spec.observation_space,
        actor_view=actor_view,
        critic_view=critic_view,
        actor_torso=_make_torso(spec, actor_view, spec.hidden_sizes),
        critic_torso=(
            _make_torso(spec, critic_view, critic_sizes) if spec.has_critic_torso else None
        ),
        actor_memory=memory,
        # A flax module that stands in two places would share its parameters.
        critic_memory=memory.copy() if memory is not None and spec.has_critic_torso else None,
        has_critic=spec.has_critic,
    )


def register_action_distribution(
    name: str, make: Callable[[Box], Head], *, overwrite: bool = False
) -> None:
    """Makes a head for continuous actions available as `Config(action_distribution=name)`.

    Args:
      name: a name that is not taken.
      make: returns the head for a space of continuous actions, or raises a `ConfigError`.
      overwrite: replace a head that was registered under this name.

    Raises:
      ConfigError: the name is taken.
    """
    BOX_HEADS.register(name, RegisteredHead(name, make), overwrite=overwrite)


def register_network(name: str, module: nn.Module, *, overwrite: bool = False) -> None:
    """Makes a module of your own available as `Config(network=name)`.

    A run stores the name. A command that loads the run needs `--import MODULE`, where MODULE is the
    Python module that registers the network.

    Args:
      name: a name that is not taken.
      module: takes the place of all hidden layers, from observations [B, ...] to features [B, F].
      overwrite: replace a network that was registered under this name.

    Raises:
      ConfigError: the name is taken, or `module` is not a flax.linen module, or is not hashable.
    """
    _require_module(module)
    NETWORKS.register(name, module, overwrite=overwrite)


_CACHE = 2**24  # bytes of patches, which two cores of an AMD EPYC convolve the fastest


def images_in_cache(spec: PolicySpec) -> int | None:
    """Returns how many images a CPU should convolve together; None if the network convolves none.

    If the patches exceed the cache, a CPU is limited by its memory bandwidth. The gradient of
    `nature_cnn` for 256 images takes 137 ms in one batch and 80 ms in chunks of 32 (two cores,
    jax 0.10.2).
    """
    torso = network_of(spec).actor_torso
    make_image = torso.image if isinstance(torso, networks.Torso) else None
    if make_image is None:
        return None
    images = filter(networks.is_image, spaces.leaves(torso.space))
    largest = max(make_image().bytes_of_patches(spaces.shape_of(leaf)) for leaf in images)
    return max(1, _CACHE // largest)


def _make_memory(spec: PolicySpec) -> Memory | None:
    if spec.memory is None:
        return None
    size = spec.memory_size
    assert size is not None, "a spec completes it"
    if spec.memory != "gtrxl":
        return RecurrentLayer(spec.memory, size)
    window, layers, heads = (getattr(spec, name) for name in TRANSFORMER_DEFAULTS)
    if size % heads:
        near = " or ".join(map(str, nearest_divisors(size, heads)))
        raise ConfigError(
            f"memory_size must be divisible by memory_heads; got {size} and {heads}. Try {near} "
            "heads."
        )
    return GatedTransformer(size, window, layers, heads)


def _make_torso(spec: PolicySpec, view: View, hidden_sizes: tuple[int, ...]) -> nn.Module:
    if spec.module is not None:
        _check_module(spec, spec.module, view.space)
        # A copy each for actor and critic: a flax module that stands in two places shares
        # parameters.
        return spec.module.copy()
    if spec.embedding_size is not None and all(
        isinstance(leaf, Box) for leaf in spaces.leaves(spec.observation_space)
    ):
        raise ConfigError(
            f"embedding_size needs observations with integers; got {spec.observation_space}. "
            "Leave embedding_size out."
        )
    activation = getattr(nn, spec.activation)
    dtype = None if spec.compute_dtype == "float32" else jnp.dtype(spec.compute_dtype)
    make_image = None
    if spec.network == "impala_cnn":
        make_image = functools.partial(networks.ResNet, activation, dtype=dtype)
    elif spec.network != "mlp":
        layers = networks.CONVOLUTIONS.get(spec.network, spec.conv_layers)
        make_image = functools.partial(networks.CNN, layers, activation, dtype)
    if make_image is not None and not any(map(networks.is_image, spaces.leaves(view.space))):
        raise ConfigError(
            f"network {spec.network} needs images, arrays of height, width and channels; "
            f"observations are {view.space}. Use mlp."
        )
    torso = networks.Torso(
        view.space,
        make_image,
        functools.partial(networks.MLP, hidden_sizes, activation, spec.layer_norm, dtype),
        spec.embedding_size,
        dtype,
    )
    if make_image is not None:
        _check_shapes(torso, view.space, spec.network)
    return torso


_CONTRACT = "network must be a flax.linen module that maps observations [B, ...] to features [B, F]"


def _require_module(module: Any) -> None:
    """Raises a `ConfigError` unless a user's network is a module that can be a key of caches."""
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{_CONTRACT}; got {module!r}. Pass such a module, or the name of a network."
        )
    try:
        hash(module)
    except TypeError as error:
        raise ConfigError(
            f"network must be hashable; a field of {type(module).__name__} is not. "
            "Use tuples for lists and numbers for arrays."
        ) from error


def _check_module(spec: PolicySpec, module: nn.Module, space: Space) -> None:
    """Raises a `ConfigError` that tells how a user's module breaks the contract."""
    defaults = {field.name: field.default for field in dataclasses.fields(PolicySettings)}
    for name in SETTINGS_OF_LAYERS:
        if getattr(spec, name) != defaults[name]:
            raise ConfigError(
                f"{name} shapes the package's own networks, and network is a module of yours. "
                f"Leave {name} out."
            )
    features = _check_shapes(module, space, type(module).__name__)
    if not (
        isinstance(features, jax.ShapeDtypeStruct)
        and features.ndim == 2
        and features.shape[0] == _BATCH
        and jnp.issubdtype(features.dtype, jnp.floating)
    ):
        raise ConfigError(
            f"{_CONTRACT}; {type(module).__name__} maps a batch of {_BATCH} of {space} to "
            f"{features}. Return one floating-point array, batch first."
        )


_BATCH = 3  # a size that no space and no layer is likely to have


def _check_shapes(network: nn.Module, space: Space, name: str) -> Any:
    """Returns the shape of the network's output for a batch, or raises a `ConfigError`."""
    obs = example(space, (_BATCH,))

    def shapes_of(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return jax.eval_shape(function, *args)  # nothing is computed or compiled
        except ConfigError:
            raise
        # A user's module can fail in any way; the original error stays attached.
        except Exception as error:
            raise ConfigError(
                f"{_CONTRACT}; {name} fails for a batch of {_BATCH} of {space}: {error}"
            ) from error

    result, variables = shapes_of(network.init_with_output, jax.random.key(0), obs)
    if set(variables) - {"params"}:
        raise ConfigError(
            f"{_CONTRACT}, with parameters and no other collections; {name} has "
            f"{', '.join(sorted(variables))}. "
            "Leave out layers that keep statistics, such as BatchNorm; LayerNorm will do."
        )
    # Training applies the network without random keys, which layers such as Dropout need.
    shapes_of(network.apply, variables, obs)
    return result


def initial_obs_stats(space: Space) -> ObsStats:
    """Returns statistics of an empty stream for every floating-point array of an observation.

    Raises:
      ConfigError: an observation has no floating-point array.
    """
    # Top level only: that is where an action mask can be.
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
            "Give that entry of the observation another name."
        )
    sizes = actions.num_values
    needed = (sum(sizes) if isinstance(sizes, tuple) else sizes,)
    if not (isinstance(mask, Box) and mask.shape == needed and mask.dtype == "bool"):
        raise ConfigError(
            f"an action_mask must be a bool Box of one entry for each action, {needed}; got "
            f"{mask}. Change the environment's observation space."
        )
