"""What a training is: `Config` (static, hashable) and `HParams` (float scalars, always traced).

Neither needs JAX, so that a command line can explain or refuse a setting at once.
"""

import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np

Value = int | float | bool | str
Activation = Literal["tanh", "relu", "elu", "gelu", "silu"]
LearningRateSchedule = Literal["linear", "cosine", "constant", "kl_adaptive"]
AdvantageNormalization = Literal["minibatch", "batch", "none"]
ValueTarget = Literal["gae", "td"]
Network = Literal["mlp", "cnn", "minatar_cnn", "nature_cnn", "impala_cnn"]
MemoryKind = Literal["gru", "lstm", "mingru"]
ActionDistribution = Literal["gaussian", "tanh_gaussian", "beta"]


class ConfigError(ValueError):
    """A setting breaks a rule. The message holds the rule, the values and the remedy."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not in a table: lists the nearest and all known ones.

    >>> print(unknown_name("animal", "cot", ["cat", "dog"]))
    unknown animal 'cot'. Did you mean cat? Known: cat, dog.
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    return ConfigError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}.")


@dataclasses.dataclass(frozen=True)
class Config:
    """What changes shapes or control flow in a training: one `Config`, one compilation.

    Frozen, hashable, and checked when made. Numbers that do not change shapes are in
    `HParams`, which is traced.

    Raises:
      ConfigError: a field breaks a rule; raised before anything is traced.

    >>> Config(num_envs=4, num_steps=128, num_minibatches=3)
    Traceback (most recent call last):
    ...
    ppo_jax.config.ConfigError: num_envs * num_steps must be divisible by num_minibatches; \
got 4 * 128 and 3. Try 2 or 4.
    """

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
    """N: environments that are stepped together."""
    num_steps: int = 128
    """T: steps of each environment between two updates."""
    num_devices: int = 1
    """Devices that share the environments; each learns from its own, and gradients are averaged.
    On a CPU a device is a core."""
    num_epochs: int | None = None
    """Passes over the data of one rollout. None, here and below: the algorithm's."""
    num_minibatches: int | None = None
    """Gradient steps per epoch; each uses num_envs * num_steps / num_minibatches samples."""
    network: Any = "mlp"
    """What images pass before the hidden layers: nothing ("mlp"), convolutions or a residual
    network, by name. Or a flax.linen module of your own in place of all hidden layers, from
    observations [B, ...] to features [B, F]."""
    conv_layers: tuple[tuple[int, int, int], ...] = ()
    """Features, kernel and stride of each convolution of network "cnn"."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and critic."""
    activation: Activation = "tanh"
    """Activation after each hidden layer."""
    layer_norm: bool = False
    """Layer normalisation before each activation of the hidden layers."""
    embedding_size: int | None = None
    """Width of a learned embedding of integer observations. None: one-hot."""
    shared_torso: bool = False
    """Actor and critic share their hidden layers, and their memory."""
    actor_keys: tuple[str, ...] | None = None
    """Entries of a dict observation that the actor sees. None, here and below: all."""
    critic_keys: tuple[str, ...] | None = None
    """Entries of a dict observation that the critic sees."""
    memory: MemoryKind | None = None
    """A recurrent cell after the hidden layers; minibatches are then of whole environments."""
    memory_size: int | None = None
    """Width of the recurrent cell. None: 128."""
    action_distribution: ActionDistribution | None = None
    """Distribution of continuous actions. None: gaussian, clipped by the environment."""
    state_dependent_std: bool = False
    """A Gaussian's standard deviation is an output of the network, not a parameter of its own."""
    normalize_obs: bool = False
    """Standardise floating-point observations by their running mean and variance."""
    normalize_reward: bool = False
    """Divide rewards by the running deviation of the discounted return."""
    optimizer: str = "adam"
    """Name of an optax optimiser."""
    optimizer_kwargs: tuple[tuple[str, Value], ...] = ()
    """Arguments of the optimiser besides the learning rate; Adam's eps is 1e-5 unless given."""
    separate_grad_norms: bool = False
    """max_grad_norm clips the gradients of actor and critic apart, and not their joint norm, which
    a critic far from its targets fills alone."""
    lr_schedule: LearningRateSchedule = "linear"
    """How the learning rate falls to zero over the training; or "constant"; or "kl_adaptive",
    which steers it so that an update moves the policy by a KL of about desired_kl."""
    normalize_advantage: AdvantageNormalization | None = None
    """Where advantages are standardised to mean 0 and deviation 1."""
    value_target: ValueTarget | None = None
    """What the critic learns: "gae", advantage + V(s), or "td", r + γ V(s')."""
    n_step: int | None = None
    """Actor-critic only: advantages from returns of this many steps instead of GAE."""
    cg_iterations: int | None = None
    """TRPO only: iterations of conjugate gradient."""
    line_search_steps: int | None = None
    """TRPO only: halvings of the step before it is given up."""
    exact_kl: bool = False
    """Report the exact KL(old ‖ new) of each minibatch as well, as train/kl."""

    def __post_init__(self) -> None:
        for name in ("env_kwargs", "env_params", "optimizer_kwargs"):
            pairs = _pairs(name, getattr(self, name))
            object.__setattr__(self, name, tuple(sorted(pairs)))  # equal when equal
        object.__setattr__(self, "wrappers", _pairs("wrappers", self.wrappers))
        if isinstance(self.hidden_sizes, int):
            object.__setattr__(self, "hidden_sizes", (self.hidden_sizes,))
        for name in ("hidden_sizes", "actor_keys", "critic_keys"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "conv_layers", tuple(map(tuple, self.conv_layers)))
        for name in ("total_timesteps", "num_envs", "num_steps", "num_devices"):
            _require_positive_integer(name, getattr(self, name))
        for name in ("embedding_size", "memory_size"):
            if getattr(self, name) is not None:
                _require_positive_integer(name, getattr(self, name))
        if self.memory_size is not None and self.memory is None:
            raise ConfigError(
                f"memory_size needs a memory; got {self.memory_size} and none. Set memory, to "
                f"{', '.join(get_args(MemoryKind))}, or leave memory_size out."
            )
        for name in ALGORITHM_SETTINGS:
            if name not in _CHOICES and getattr(self, name) is not None:
                _require_positive_integer(name, getattr(self, name))
        for size in self.hidden_sizes:
            _require_positive_integer("every entry of hidden_sizes", size)
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None and getattr(self, name) not in choices:
                raise unknown_name(name, str(getattr(self, name)), choices)
        if isinstance(self.network, str) and self.network not in get_args(Network):
            raise unknown_name("network", self.network, get_args(Network))
        self._check_conv_layers()
        if self.num_envs % self.num_devices:
            raise ConfigError(
                f"num_envs must be divisible by num_devices; got {self.num_envs} and "
                f"{self.num_devices}. Try {_nearest_divisors(self.num_envs, self.num_devices)}."
            )
        shared = self.batch_size // self.num_devices
        if self.num_minibatches is not None and shared % self.num_minibatches:
            devices = f" / {self.num_devices} devices" if self.num_devices > 1 else ""
            raise ConfigError(
                "num_envs * num_steps must be divisible by num_minibatches; got "
                f"{self.num_envs} * {self.num_steps}{devices} and {self.num_minibatches}. "
                f"Try {_nearest_divisors(shared, self.num_minibatches)}."
            )
        if self.total_timesteps < self.batch_size:
            raise ConfigError(
                "total_timesteps must be at least one update, num_envs * num_steps; got "
                f"{self.total_timesteps} and {self.num_envs} * {self.num_steps} = "
                f"{self.batch_size}. Raise total_timesteps or lower num_envs or num_steps."
            )

        if self.memory is not None:
            self._check_whole_environments()

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
                _require_positive_integer("every number in conv_layers", number)

    def _check_whole_environments(self) -> None:
        own = self.num_envs // self.num_devices
        if self.num_minibatches is not None and own % self.num_minibatches:
            raise ConfigError(
                "num_envs must be divisible by num_minibatches where a policy has a memory, "
                "whose minibatches are of whole environments; got "
                f"{own}{' a device' if self.num_devices > 1 else ''} and {self.num_minibatches}. "
                f"Try {_nearest_divisors(own, self.num_minibatches)}."
            )

    @property
    def batch_size(self) -> int:
        """Environment steps in one update, num_envs * num_steps."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates that fit into total_timesteps.

        >>> Config(num_envs=4, num_steps=128, total_timesteps=500_000).num_updates
        976
        """
        return self.total_timesteps // self.batch_size

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed; an unknown field is a `ConfigError`."""
        return _replace(self, changes)


@dataclasses.dataclass(frozen=True)
class HParams:
    """Hyperparameters that are traced: any of them can be an array under `vmap`.

    `None`, the default, leaves a value to the algorithm's row in `ALGORITHMS`; for `target_kl`,
    `value_clip_eps` and `max_grad_norm` the row may say None as well, and then that part of the
    update does not exist. Only the values that are set are leaves of the pytree, so
    `jax.vmap(run, in_axes=(None, 0))(key, HParams(learning_rate=rates))` is a sweep.
    Setting a value that the algorithm does not use is an error.

    Raises:
      ConfigError: a concrete value is NaN or outside its range.

    >>> HParams(learning_rate=-1e-3)
    Traceback (most recent call last):
    ...
    ppo_jax.config.ConfigError: learning_rate must be in [0, 3.40282e+38]; got -0.001.
    """

    learning_rate: Any = None
    """Step size of the optimiser before annealing."""
    gamma: Any = None
    """Discount γ per environment step, in [0, 1]."""
    gae_lambda: Any = None
    """λ of GAE, in [0, 1]: 0 is the TD error, 1 the discounted return minus the value."""
    clip_eps: Any = None
    """ε of the clipped surrogate: the ratio is clipped to [1 − ε, 1 + ε]."""
    value_clip_eps: Any = None
    """Clip range of a new value around the rollout's; in units of the value. None: no clipping."""
    ent_coef: Any = None
    """Weight of the entropy bonus."""
    vf_coef: Any = None
    """Weight of the value loss, which is half the mean squared error."""
    critic_learning_rate: Any = None
    """Step size of the critic where it is fitted apart from the policy."""
    max_grad_norm: Any = None
    """Largest global norm of a gradient: of actor and critic together where they are learned
    together, unless `Config.separate_grad_norms`."""
    max_grad_value: Any = None
    """Largest absolute entry of a gradient, after its norm was clipped. None: no clipping. Of
    TRPO, this and the norm are the critic's alone."""
    target_kl: Any = None
    """Stop an update's remaining minibatches once the approximate KL passes this. None: never."""
    dual_clip: Any = None
    """PPO: lower bound of the objective, in advantages, where they are negative. None: none."""
    kl_coef: Any = None
    """β, weight of the KL penalty; where it is adapted, its first value."""
    d_targ: Any = None
    """KL per update to which an adaptive β is steered."""
    max_kl: Any = None
    """δ, TRPO's bound on the mean KL of an update."""
    cg_damping: Any = None
    """TRPO: multiple of the identity added to the Fisher matrix."""
    dpo_alpha: Any = None
    """α of discovered policy optimisation's drift where the advantage is positive."""
    dpo_beta: Any = None
    """β of discovered policy optimisation's drift where the advantage is negative."""
    desired_kl: Any = None
    """KL per update to which lr_schedule="kl_adaptive" steers the learning rate."""
    reward_scale: Any = None
    """Factor of every reward before anything is learned from it; reported returns are without."""
    reward_clip: Any = None
    """Largest absolute reward that is learned from, after all scaling. None: no clipping."""
    hidden_gain: Any = None
    """Of the weights of hidden layers and convolutions at the start: a multiple of orthogonal ones.
    What is inside a memory starts at 1, whatever this is."""
    actor_gain: Any = None
    """The same before the actions; a small one makes the first policy nearly uniform."""
    critic_gain: Any = None
    """The same before the value."""

    def __post_init__(self) -> None:
        for name, (low, high) in HPARAM_RANGES.items():
            value = _concrete(getattr(self, name))
            if value is None:
                continue
            if not np.all((value >= low) & (value <= high)):  # NaN fails both
                raise ConfigError(
                    f"{name} must be in [{low:g}, {high:g}]; got {getattr(self, name)}."
                )

    def replace(self, **changes: Any) -> "HParams":
        """A copy with some values changed; an unknown name is a `ConfigError`."""
        return _replace(self, changes)


_LARGEST = float(np.finfo(np.float32).max)

HPARAM_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0.0, _LARGEST),
    "gamma": (0.0, 1.0),
    "gae_lambda": (0.0, 1.0),
    "clip_eps": (0.0, math.inf),
    "value_clip_eps": (0.0, math.inf),
    "ent_coef": (0.0, _LARGEST),
    "vf_coef": (0.0, _LARGEST),
    "critic_learning_rate": (0.0, _LARGEST),
    "max_grad_norm": (0.0, math.inf),
    "max_grad_value": (0.0, math.inf),
    "target_kl": (0.0, math.inf),
    "dual_clip": (1.0, math.inf),
    "kl_coef": (0.0, _LARGEST),
    "d_targ": (0.0, _LARGEST),
    "max_kl": (0.0, _LARGEST),
    "cg_damping": (0.0, _LARGEST),
    "dpo_alpha": (1e-6, _LARGEST),
    "dpo_beta": (1e-6, _LARGEST),
    "desired_kl": (0.0, _LARGEST),
    "reward_scale": (0.0, _LARGEST),
    "reward_clip": (0.0, math.inf),
    "hidden_gain": (0.0, _LARGEST),
    "actor_gain": (0.0, _LARGEST),
    "critic_gain": (0.0, _LARGEST),
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "lr_schedule": get_args(LearningRateSchedule),
    "normalize_advantage": get_args(AdvantageNormalization),
    "value_target": get_args(ValueTarget),
    "memory": get_args(MemoryKind),
    "action_distribution": get_args(ActionDistribution),
}

ALGORITHM_SETTINGS = (
    "num_epochs",
    "num_minibatches",
    "normalize_advantage",
    "value_target",
    "n_step",
    "cg_iterations",
    "line_search_steps",
)
"""Fields of `Config` that belong to some algorithms: None leaves them to its row."""


MODULE = "a module: "
"""What a file holds of a network that is not one of ours: this, and its name."""


def named_network(name: str, network: Any) -> Any:
    """The network that a file names: one of ours, or `network`, the user's own.

    Raises:
      ConfigError: a user's own is needed and not given.
    """
    if not name.startswith(MODULE):
        return name
    if network is None:
        raise ConfigError(
            f"a file does not hold a network that is {name}; it must be passed as network=…"
        )
    return network


def _replace(instance: Any, changes: Mapping[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(instance)]
    for name in changes:
        if name not in known:
            raise unknown_name(f"{type(instance).__name__} field", name, known)
    return dataclasses.replace(instance, **changes)


def _pairs(name: str, value: Any) -> tuple[tuple[str, Value], ...]:
    """A mapping, or pairs, as a tuple of pairs, which is hashable."""
    try:
        return tuple(dict(value).items())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must map names to values; got {value!r}.") from error


def _require_positive_integer(name: str, value: Any) -> None:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < 1:
        raise ConfigError(f"{name} must be a positive integer; got {value!r}.")


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no larger than `at_most`.

    >>> largest_divisor(12, at_most=5)
    4
    """
    return max(d for d in range(1, at_most + 1) if number % d == 0)


def _nearest_divisors(number: int, near: int) -> str:
    below = largest_divisor(number, at_most=near)
    above = next((d for d in range(near, number + 1) if number % d == 0), below)
    return f"{below} or {above}" if below != above else f"{below}"


def _concrete(value: Any) -> np.ndarray | None:
    """The numbers in `value`; None where there are none yet (unset, or a tracer)."""
    if value is None:
        return None
    if isinstance(value, (bool, str)):
        raise ConfigError(f"a hyperparameter must be a number; got {value!r}.")
    if isinstance(value, (int, float, np.ndarray, np.generic)):
        return np.asarray(value)
    jax = sys.modules.get("jax")  # an array of JAX's can only exist once it is imported
    if jax is not None and isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        return np.asarray(value)
    return None
