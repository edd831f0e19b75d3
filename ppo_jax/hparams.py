"""Hyperparameters: float scalars that are always traced, each with its range.

This module needs no JAX, so that the command line can explain or refuse a value at once.
"""

import dataclasses
import math
import sys
from typing import Any

import numpy as np

from ppo_jax.errors import ConfigError, Settings

LARGEST = float(np.finfo(np.float32).max)


def hyperparameter(low: float = 0.0, high: float = LARGEST) -> Any:
    """Declares a field of `HParams`, or of a subclass, with the range of its values.

    Args:
      low: the lowest value that is allowed.
      high: the highest value that is allowed; infinity where that has a meaning.

    >>> @dataclasses.dataclass(frozen=True)
    ... class MyHParams(HParams):
    ...     margin: Any = hyperparameter(high=1.0)
    >>> MyHParams(margin=2.0)
    Traceback (most recent call last):
    ...
    ppo_jax.errors.ConfigError: margin must be in [0, 1]; got 2.0.
    """
    return dataclasses.field(default=None, metadata={"range": (low, high)})


@dataclasses.dataclass(frozen=True)
class HParams(Settings):
    """Hyperparameters that are traced: any of them can be an array under `jax.vmap`.

    `None`, the default, leaves a value to the algorithm. For `target_kl`, `value_clip_eps`,
    `max_grad_norm` and others the algorithm's default may be None as well; then that part of the
    update does not exist. Infinity switches it off where the algorithm has another default. Only
    values that are set are leaves of the pytree, so
    `jax.vmap(run, in_axes=(None, 0))(key, HParams(learning_rate=rates))` is a sweep. It is an error
    to set a value that the algorithm does not use.

    An algorithm can bring hyperparameters of its own: its `hparams_type` is a subclass, a frozen
    dataclass whose fields are made by `hyperparameter`.

    Raises:
      ConfigError: a concrete value is NaN or outside its range.

    >>> HParams(learning_rate=-1e-3)
    Traceback (most recent call last):
    ...
    ppo_jax.errors.ConfigError: learning_rate must be in [0, 3.40282e+38]; got -0.001.
    """

    learning_rate: Any = hyperparameter()
    """Step size of the optimiser before annealing."""
    gamma: Any = hyperparameter(high=1.0)
    """Discount γ per environment step, in [0, 1]."""
    gae_lambda: Any = hyperparameter(high=1.0)
    """λ of GAE, in [0, 1]: 0 is the TD error, 1 the discounted return minus the value."""
    clip_eps: Any = hyperparameter(high=math.inf)
    """ε of the clipped surrogate: the ratio is clipped to [1 − ε, 1 + ε]. For SPO, the
    objective has its maximum at a ratio of 1 ± ε."""
    value_clip_eps: Any = hyperparameter(high=math.inf)
    """Clip range of a new value around the rollout's; in units of the value. inf: no clipping."""
    ent_coef: Any = hyperparameter()
    """Weight of the entropy bonus."""
    vf_coef: Any = hyperparameter()
    """Weight of the value loss, which is half the mean squared error."""
    critic_learning_rate: Any = hyperparameter()
    """Step size of the critic where it is fitted separately from the policy."""
    max_grad_norm: Any = hyperparameter(high=math.inf)
    """Largest global norm of a gradient: of actor and critic together where they are learned
    together, unless `Config.separate_grad_norms` is set. inf: no clipping."""
    max_grad_value: Any = hyperparameter(high=math.inf)
    """Largest absolute entry of a gradient, after its norm was clipped. inf: no clipping. In
    TRPO, this and the norm apply to the critic alone."""
    target_kl: Any = hyperparameter(high=math.inf)
    """Stop an update's remaining minibatches once the approximate KL exceeds this. inf: never."""
    dual_clip: Any = hyperparameter(low=1.0, high=math.inf)
    """PPO: c of the dual clip. Where the advantage is negative, the objective is at least c times
    the advantage. inf: no bound."""
    kl_coef: Any = hyperparameter()
    """β, weight of the KL penalty; its first value where it is adapted."""
    d_targ: Any = hyperparameter()
    """KL per update to which an adaptive β is steered."""
    max_kl: Any = hyperparameter()
    """δ, TRPO's bound on the mean KL of an update."""
    cg_damping: Any = hyperparameter()
    """TRPO: multiple of the identity that is added to the Fisher matrix."""
    dpo_alpha: Any = hyperparameter(low=1e-6)
    """α of discovered policy optimisation's drift where the advantage is positive."""
    dpo_beta: Any = hyperparameter(low=1e-6)
    """β of discovered policy optimisation's drift where the advantage is negative."""
    desired_kl: Any = hyperparameter()
    """KL per update to which lr_schedule="kl_adaptive" steers the learning rate."""
    reward_scale: Any = hyperparameter()
    """Factor of every reward before anything is learned from it. Reported returns are unscaled."""
    reward_clip: Any = hyperparameter(high=math.inf)
    """Largest absolute reward that is learned from, after all scaling. inf: no clipping."""
    hidden_gain: Any = hyperparameter()
    """Gain of the orthogonal initialisation of hidden layers and convolutions. The weights inside a
    memory have a gain of 1, whatever this is."""
    actor_gain: Any = hyperparameter()
    """Gain of the actor's last layer; a small one makes the first policy nearly uniform."""
    critic_gain: Any = hyperparameter()
    """Gain of the critic's last layer."""
    initial_log_std: Any = hyperparameter(low=-20.0, high=5.0)
    """Logarithm of a Gaussian's standard deviation before the first update, where it is a
    parameter. None: 0."""

    def __post_init__(self) -> None:
        _register_pytree(type(self))
        for name, (low, high) in self.ranges().items():
            value = _concrete(name, getattr(self, name))
            if value is None:
                continue
            if not np.all((value >= low) & (value <= high)):  # NaN fails both
                raise ConfigError(
                    f"{name} must be in [{low:g}, {high:g}]; got {getattr(self, name)}."
                )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Returns the names of all hyperparameters of this class."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def ranges(cls) -> dict[str, tuple[float, float]]:
        """Returns the lowest and the highest value of each hyperparameter.

        >>> HParams.ranges()["gamma"]
        (0.0, 1.0)
        """
        return {field.name: field.metadata["range"] for field in dataclasses.fields(cls)}

    def given(self) -> dict[str, Any]:
        """Returns the values that are set, by name.

        >>> HParams(gamma=0.9).given()
        {'gamma': 0.9}
        """
        return {name: value for name, value in vars(self).items() if value is not None}


_pytrees: set[type] = set()


def _register_pytree(cls: type[HParams]) -> None:
    """Makes the class a pytree, unless it is one or JAX is not loaded.

    Every new instance calls this function: the module must not import JAX, and JAX must know the
    class before it flattens an instance. `import ppo_jax; ppo_jax.HParams` loads JAX first.
    """
    # An import here would cost every command line three quarters of a second.
    jax = sys.modules.get("jax")
    if jax is None or cls in _pytrees:
        return
    names = cls.names()
    keys = [jax.tree_util.GetAttrKey(name) for name in names]

    def flatten(hparams: HParams) -> tuple[list[tuple[Any, Any]], None]:
        return [(key, getattr(hparams, key.name)) for key in keys], None

    def unflatten(_: None, values: Any) -> HParams:
        # Without `__post_init__`: leaves may be axes, gradients or tracers instead of settings.
        hparams = object.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(hparams, name, value)
        return hparams

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    _pytrees.add(cls)


def _concrete(name: str, value: Any) -> np.ndarray | None:
    """Returns the numbers in `value`, or None where there are none: unset, or a tracer."""
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return np.asarray(value)
    # Kinds of integers, floats and bfloat16 (V). Tracers and ShapeDtypeStructs have no values yet.
    if getattr(getattr(value, "dtype", None), "kind", None) not in ("i", "u", "f", "V"):
        raise ConfigError(
            f"a hyperparameter must be a number, or an array of numbers; got {name}={value!r}."
        )
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    jax = sys.modules.get("jax")  # an array of JAX can only exist once it is imported
    if jax is not None and isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        return np.asarray(value)
    return None
