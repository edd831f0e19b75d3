"""The static description of a training: `Config`, which is made of two groups of settings.

This module needs no JAX, so that the command line can explain or refuse a setting at once.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from ppo_jax.errors import (
    ConfigError,
    Settings,
    require_known,
    require_positive_integer,
    require_positive_integers,
)
from ppo_jax.ops.blocks import nearest_divisors
from ppo_jax.registry import Registry

Value = int | float | bool | str
Activation = Literal["tanh", "relu", "elu", "gelu", "silu"]
AdvantageNormalization = Literal["minibatch", "batch", "none"]
ValueTarget = Literal["gae", "td"]
ComputeDtype = Literal["float32", "bfloat16"]
MemoryKind = Literal["gru", "lstm", "mingru", "lru", "gtrxl"]

NETWORKS: Registry[Any] = Registry(
    "network", dict.fromkeys(("mlp", "cnn", "minatar_cnn", "nature_cnn", "impala_cnn"))
)
"""Networks by name: the flax module of a registered one, and None for the package's own."""
LR_SCHEDULES: Registry[Mapping[str, float]] = Registry(
    "learning-rate schedule",
    {"linear": {}, "cosine": {}, "constant": {}, "kl_adaptive": {"desired_kl": 0.01}},
)
"""Learning-rate schedules by name: their hyperparameters, with defaults."""
TRANSFORMER_DEFAULTS = {"memory_window": 64, "memory_layers": 2, "memory_heads": 4}
"""Values of a transformer's settings that are None."""
_LARGEST_COUNT = 2**31 - 1


def _algorithm_setting() -> Any:
    """Declares a field that belongs to some algorithms; None leaves it to the algorithm."""
    return dataclasses.field(default=None, metadata={"is_algorithm_setting": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of a training, except those of its policy. `Config` checks them."""

    env: str = "CartPole-v1"
    """Name of the environment (`ppo-jax envs` lists them)."""
    env_kwargs: tuple[tuple[str, Value], ...] = ()
    """Arguments of the environment's constructor, as name value pairs (a dict in Python)."""
    env_params: tuple[tuple[str, Value], ...] = ()
    """Changes to the environment's default parameters, as name value pairs (a dict in Python)."""
    wrappers: tuple[tuple[str, Value], ...] = ()
    """Wrappers of the environment, innermost first, as name value pairs (a dict in Python); see
    `ppo_jax.envs.wrappers`."""
    algorithm: str = "ppo"
    """Name of the algorithm: a row of `ppo_jax.algorithms.ALGORITHMS`."""
    total_timesteps: int = 1_000_000
    """Environment steps to train for, over all environments; whole updates only, rounded down."""
    num_envs: int = 64
    """N: environments that are stepped together. One with several agents counts once per agent."""
    num_steps: int = 128
    """T: steps of each environment between two updates."""
    reset_pool: int | None = None
    """Number of initial states that are drawn before each rollout, in total over all devices. Set
    it where resets are expensive. The k-th episode that ends on a device is followed by the k-th
    initial state of the device's pool; if more episodes end, the pool is used again. None draws an
    initial state for every new episode."""
    num_devices: int = 1
    """Devices that share the environments; each learns from its share, and gradients are averaged.
    On a CPU a device is a core."""
    num_epochs: int | None = _algorithm_setting()
    """Passes over the data of one rollout. None: the algorithm's default."""
    num_minibatches: int | None = _algorithm_setting()
    """Gradient steps per epoch; each uses num_envs * num_steps / num_minibatches samples."""
    normalize_obs: bool = False
    """Standardise floating-point observations by their running mean and variance."""
    normalize_reward: bool = False
    """Divide rewards by the running standard deviation of the discounted return."""
    optimizer: str = "adam"
    """Name of an optax optimiser, or of one that `register_optimizer` added."""
    optimizer_kwargs: tuple[tuple[str, Value], ...] = ()
    """Arguments of the optimiser besides the learning rate; Adam's eps is 1e-5 unless given."""
    separate_grad_norms: bool = False
    """Clip the gradients of the actor and of the critic separately, by their own norms. Otherwise a
    critic that is far from its targets dominates the joint norm."""
    lr_schedule: str = "linear"
    """Decay of the learning rate to zero over the training, "linear" or "cosine"; or "constant"; or
    "kl_adaptive", which steers the rate so that an update moves the policy by a KL of about
    desired_kl; or the name of a schedule that `register_lr_schedule` added."""
    normalize_advantage: AdvantageNormalization | None = _algorithm_setting()
    """Samples over which advantages are standardised to mean 0 and standard deviation 1."""
    value_target: ValueTarget | None = _algorithm_setting()
    """Target of the critic: "gae", advantage + V(s), or "td", r + γ V(s')."""
    n_step: int | None = _algorithm_setting()
    """Actor-critic only: advantages from returns of this many steps instead of GAE."""
    cg_iterations: int | None = _algorithm_setting()
    """TRPO only: iterations of conjugate gradient."""
    line_search_steps: int | None = _algorithm_setting()
    """TRPO only: step lengths that are tried, each half of the one before."""
    max_skipped_updates: int = 10
    """Updates with a gradient that is NaN or infinite are skipped. A run stops after this many
    consecutive skipped updates, or after half of its updates if that is fewer. 0 skips no update:
    the first one that makes parameters NaN or infinite ends the training."""
    exact_kl: bool = False
    """Report the exact KL(old ‖ new) of each minibatch as well, as train/kl."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """The settings that shape a policy's networks and its distribution of actions.

    `Config` inherits them for a training, and `PolicySpec` for a policy without one.
    """

    network: Any = "mlp"
    """Layers that images pass before the hidden layers: none ("mlp"), convolutions or a residual
    network, by name. Or a flax.linen module of your own in place of all hidden layers, from
    observations [B, ...] to features [B, F], or the name by which `register_network` added one."""
    conv_layers: tuple[tuple[int, int, int], ...] = ()
    """Features, kernel and stride of each convolution of network "cnn"."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and critic; of the actor alone where
    critic_hidden_sizes is set."""
    critic_hidden_sizes: tuple[int, ...] | None = None
    """Widths of the critic's hidden layers. None: those of hidden_sizes."""
    activation: Activation = "tanh"
    """Activation after each hidden layer."""
    layer_norm: bool = False
    """Layer normalisation before each activation of the hidden layers."""
    embedding_size: int | None = None
    """Width of a learned embedding of integer observations. None: one-hot."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of products in hidden layers and convolutions, and of the activations that are stored
    for derivatives. "bfloat16" halves the memory of these activations, and is faster on
    accelerators, especially for wide layers.
    Parameters, memories, the layers of actions and values, losses and the optimiser are
    float32 in either case."""
    shared_torso: bool = False
    """Actor and critic share their hidden layers, and their memory."""
    actor_keys: tuple[str, ...] | None = None
    """Entries of a dict observation that the actor sees. None: all of them."""
    critic_keys: tuple[str, ...] | None = None
    """Entries of a dict observation that the critic sees. None: all of them."""
    memory: MemoryKind | None = None
    """A recurrent cell, or a gated transformer ("gtrxl"), after the hidden layers; minibatches then
    consist of whole environments."""
    memory_size: int | None = None
    """Width of the cell, or of each layer of the transformer. None: 128."""
    memory_window: int | None = None
    """Transformer only: steps before the current one that a layer sees. None: 64."""
    memory_layers: int | None = None
    """Transformer only: number of layers. None: 2."""
    memory_heads: int | None = None
    """Transformer only: attention heads of each layer; their number must divide memory_size. None:
    4."""
    action_distribution: str | None = None
    """Distribution of continuous actions: "gaussian", "tanh_gaussian", "beta", or one that
    `register_action_distribution` added. None: gaussian, clipped by the environment."""
    state_dependent_std: bool = False
    """A Gaussian's standard deviation is an output of the network instead of a parameter."""

    def __post_init__(self) -> None:
        self._set_plain(PolicySettings)
        self._set_sizes("hidden_sizes")
        if self.critic_hidden_sizes is not None:
            self._set_sizes("critic_hidden_sizes")
        for name in ("actor_keys", "critic_keys"):
            if getattr(self, name) is not None:
                self._set(name, _as_tuple(name, getattr(self, name)))
        layers = _as_tuple("conv_layers", self.conv_layers)
        self._set("conv_layers", tuple(_as_tuple("a layer", layer) for layer in layers))
        for name in ("actor_keys", "critic_keys"):
            for key in getattr(self, name) or ():
                _require_type(f"every entry of {name}", key, str)
        _require_types(self, PolicySettings)
        if not isinstance(self.network, str) and not hasattr(self.network, "apply"):
            raise ConfigError(
                "network must be a name or a flax.linen module; got "
                f"{type(self.network).__name__}. Names are {', '.join(NETWORKS)}."
            )
        sizes = ("embedding_size", "memory_size", *TRANSFORMER_DEFAULTS)
        require_positive_integers({name: getattr(self, name) for name in sizes})
        _require_choice("activation", self.activation, Activation)
        _require_choice("compute_dtype", self.compute_dtype, ComputeDtype)
        _require_choice("memory", self.memory, MemoryKind)
        if isinstance(self.network, str):
            require_known("network", self.network, NETWORKS)
        self._check_conv_layers()
        # Options that would be ignored are refused.
        for name, default in (
            ("activation", PolicySettings.activation),
            ("compute_dtype", PolicySettings.compute_dtype),
            ("layer_norm", PolicySettings.layer_norm),
        ):
            if getattr(self, name) != default and not self.has_hidden_layers:
                raise ConfigError(
                    f"{name} needs hidden layers; got {getattr(self, name)} and hidden_sizes=(). "
                    f"Leave {name} out."
                )
        if self.memory_size is not None and self.memory is None:
            raise ConfigError(
                f"memory_size needs a memory; got {self.memory_size} and none. Set memory, to "
                f"{', '.join(get_args(MemoryKind))}, or leave memory_size out."
            )
        for name in TRANSFORMER_DEFAULTS:
            if getattr(self, name) is not None and self.memory != "gtrxl":
                raise ConfigError(
                    f"{name} needs a transformer; got {getattr(self, name)} and "
                    f'memory={self.memory}. Set memory to "gtrxl", or leave {name} out.'
                )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the only way in a frozen dataclass

    def _set_plain(self, group: type) -> None:
        """Stores values of NumPy, which no file of a run takes, as values of Python."""
        for field in dataclasses.fields(group):
            self._set(field.name, _plain(getattr(self, field.name)))

    def _set_sizes(self, name: str) -> None:
        """Checks layer widths, and stores them as a tuple; a single integer means one layer."""
        sizes = getattr(self, name)
        sizes = (sizes,) if isinstance(sizes, int) else _as_tuple(name, sizes)
        for size in sizes:
            require_positive_integer(f"every entry of {name}", size)
        self._set(name, sizes)

    def _check_conv_layers(self) -> None:
        if (self.network == "cnn") != bool(self.conv_layers):
            raise ConfigError(
                'conv_layers must be given with network "cnn" and with no other; got '
                f"{self.conv_layers} and {self.network!r}. Write, for example, "
                'network="cnn", conv_layers=((16, 3, 1), (32, 3, 1)).'
            )
        for layer in self.conv_layers:
            if len(layer) != 3:
                raise ConfigError(
                    "every entry of conv_layers must be features, kernel and stride; got "
                    f"{layer}. Write, for example, (16, 3, 1)."
                )
            for number in layer:
                require_positive_integer("every number in conv_layers", number)

    @property
    def has_hidden_layers(self) -> bool:
        """The actor or the critic has layers before its outputs."""
        return self.network != "mlp" or bool(self.hidden_sizes or self.critic_hidden_sizes)

    def policy_settings(self) -> dict[str, Any]:
        """Returns the settings that shape a policy, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(PolicySettings)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PolicySettings, TrainingSettings, Settings):
    """Everything that changes shapes or control flow: one `Config`, one compilation.

    Frozen, hashable, and checked when made. Numbers that change no shapes are in `HParams`, which
    is traced.

    Raises:
      ConfigError: a field breaks a rule; raised before anything is traced.

    >>> Config(num_envs=4, num_steps=128, num_minibatches=3)
    Traceback (most recent call last):
    ...
    ppo_jax.errors.ConfigError: num_envs * num_steps must be divisible by num_minibatches; \
got 4 * 128 and 3. Try 2 or 4.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_plain(TrainingSettings)
        if not isinstance(self.env, str):
            raise ConfigError(
                f"env must be the name of an environment; got {type(self.env).__name__}. "
                "Register it by ppo_jax.envs.register(name, factory), and use the name."
            )
        _require_types(self, TrainingSettings)
        for name in ("env_kwargs", "env_params", "optimizer_kwargs"):
            pairs = _pairs(name, getattr(self, name))
            self._set(name, tuple(sorted(pairs)))  # equal contents make equal configs
        self._set("wrappers", _pairs("wrappers", self.wrappers))  # their order matters
        # 1e6 is how step counts are often written, in Python and in files.
        total: Any = self.total_timesteps
        if isinstance(total, float) and total.is_integer():
            self._set("total_timesteps", int(total))
        for name in ("total_timesteps", "num_envs", "num_steps", "num_devices"):
            require_positive_integer(name, getattr(self, name))
        if isinstance(self.max_skipped_updates, bool) or self.max_skipped_updates != 0:
            require_positive_integer(
                "max_skipped_updates, unless it is 0,", self.max_skipped_updates
            )
        names = ("num_epochs", "num_minibatches", "n_step", "cg_iterations", "line_search_steps")
        require_positive_integers({name: getattr(self, name) for name in (*names, "reset_pool")})
        require_known("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        _require_choice("normalize_advantage", self.normalize_advantage, AdvantageNormalization)
        _require_choice("value_target", self.value_target, ValueTarget)
        self._check_division()
        if self.total_timesteps < self.batch_size:
            raise ConfigError(
                "total_timesteps must be at least one update, num_envs * num_steps; got "
                f"{self.total_timesteps} and {self.num_envs} * {self.num_steps} = "
                f"{self.batch_size}. Raise total_timesteps or lower num_envs or num_steps."
            )
        # Samples and updates are counted in 32 bits on the device.
        for name, count in {"samples": self.batch_size, "updates": self.num_updates}.items():
            if count > _LARGEST_COUNT:
                raise ConfigError(
                    f"an update must have at most {_LARGEST_COUNT:,} samples, and a training as "
                    f"many updates; got {count:,} {name}. Change num_envs, num_steps or "
                    "total_timesteps."
                )

    def _check_division(self) -> None:
        """Checks that devices and minibatches divide the samples of one update evenly."""
        num_envs, num_devices, num_minibatches = (
            self.num_envs,
            self.num_devices,
            self.num_minibatches,
        )
        if num_envs % num_devices:
            raise ConfigError(
                f"num_envs must be divisible by num_devices; got {num_envs} and {num_devices}. "
                f"Try {_divisors(num_envs, num_devices)}."
            )
        if self.reset_pool is not None and self.reset_pool % num_devices:
            raise ConfigError(
                f"reset_pool must be divisible by num_devices; got {self.reset_pool} and "
                f"{num_devices}. Try {-(-self.reset_pool // num_devices) * num_devices}."
            )
        if num_minibatches is None:
            return
        # Each device makes minibatches of its own samples.
        device_envs = num_envs // num_devices
        device_samples = device_envs * self.num_steps
        if device_samples % num_minibatches:
            devices = f" / {num_devices} devices" if num_devices > 1 else ""
            raise ConfigError(
                "num_envs * num_steps must be divisible by num_minibatches; got "
                f"{num_envs} * {self.num_steps}{devices} and {num_minibatches}. "
                f"Try {_divisors(device_samples, num_minibatches)}."
            )
        if self.memory is not None and device_envs % num_minibatches:
            raise ConfigError(
                "num_envs must be divisible by num_minibatches where a policy has a memory, "
                "because its minibatches consist of whole environments; got "
                f"{device_envs}{' a device' if num_devices > 1 else ''} and {num_minibatches}. "
                f"Try {_divisors(device_envs, num_minibatches)}."
            )

    @property
    def batch_size(self) -> int:
        """Samples in one update, num_envs * num_steps; each step of each agent is one sample."""
        return self.num_envs * self.num_steps

    @property
    def device_reset_pool(self) -> int | None:
        """The part of `reset_pool` that each device draws."""
        return None if self.reset_pool is None else self.reset_pool // self.num_devices

    @property
    def num_updates(self) -> int:
        """Updates that fit into total_timesteps.

        >>> Config(num_envs=4, num_steps=128, total_timesteps=500_000).num_updates
        976
        """
        return self.total_timesteps // self.batch_size


SETTINGS_OF_LAYERS = (
    "hidden_sizes",
    "critic_hidden_sizes",
    "activation",
    "layer_norm",
    "embedding_size",
    "compute_dtype",
)
"""Fields of `Config` that shape the package's own layers, and not a user's module."""

ALGORITHM_SETTINGS = tuple(
    field.name for field in dataclasses.fields(Config) if "is_algorithm_setting" in field.metadata
)
"""Fields of `Config` that belong to some algorithms."""


def _require_choice(name: str, value: Any, literal: Any) -> None:
    if value is not None:
        require_known(name, str(value), get_args(literal))


def _require_types(settings: Any, group: type) -> None:
    """Checks the types of the string and bool settings; other settings have checks of their own."""
    for field in dataclasses.fields(group):
        value = getattr(settings, field.name)
        if field.type in (bool, str):
            _require_type(field.name, value, field.type)
        elif value is not None and _is_word(field.type):
            _require_type(field.name, value, str)


def _is_word(hint: Any) -> bool:
    """Returns whether a type hint is `str` or a `Literal`, or a union that contains one of them."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return any(part is str or get_origin(part) is Literal for part in parts)


def _require_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        what = {bool: "True or False", str: "a string"}[kind]
        raise ConfigError(f"{name} must be {what}; got {value!r}.")


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """Returns an iterable as a tuple; strings, bytes and dicts are refused."""
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise ConfigError(f"{name} must be a list or a tuple; got {value!r}.")
    return tuple(value)


def module_of(network: Any) -> Any:
    """Returns the flax module that `network` is or names; None for the package's own networks."""
    return NETWORKS.get(network) if isinstance(network, str) else network


def require_config(config: Any) -> None:
    """Raises a `ConfigError` unless a training is described by a `Config`."""
    if not isinstance(config, Config):
        raise ConfigError(
            f"a training is described by a Config; got {config!r}. Pass Config(env=…), or the "
            "first of the two records that preset(name) returns."
        )


def _divisors(number: int, near: int) -> str:
    return " or ".join(map(str, nearest_divisors(number, near)))


def _plain(value: Any) -> Any:
    """Returns a value with its lists as tuples, which are hashable, and without types of NumPy."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    return tuple(map(_plain, value)) if type(value) in (list, tuple) else value


def _pairs(name: str, value: Any) -> tuple[tuple[str, Value], ...]:
    """Returns a mapping, or pairs, as a tuple of pairs, which is hashable."""
    try:
        pairs = tuple((key, _plain(x)) for key, x in dict(value).items())
        # A config is a key of caches.
        hash(pairs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must map names to numbers or strings; got {value!r}.") from error
    if not all(isinstance(key, str) for key, _ in pairs):
        raise ConfigError(f"{name} must map names to numbers or strings; got {value!r}.")
    return pairs
