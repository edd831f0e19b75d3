"""Defaults of algorithms, optimisers and initialisation, by name.

This module needs no JAX, so that `--help` can show them at once. The functions that belong to the
names are in `algorithms`, `stages.optimizers` and `policy.initializers`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ppo_jax.config import LR_SCHEDULES, Config, module_of
from ppo_jax.registry import Registry


class AlgorithmDefaults(NamedTuple):
    """The part of an `Algorithm` that is known without JAX."""

    settings: Mapping[str, Any]
    """The algorithm settings of `Config` that it uses, with their defaults."""
    hparams: Mapping[str, float | None]
    """The hyperparameters that it uses, with their defaults."""
    has_critic: bool = True


# Shared defaults. Those of PPO are the ones of ppo.py in CleanRL, where many results start from.
_EPOCHS = {"num_epochs": 4, "num_minibatches": 4}
_UPDATES = {**_EPOCHS, "normalize_advantage": "minibatch", "value_target": "gae"}
_ACTOR_CRITIC: dict[str, float | None] = {
    "learning_rate": 2.5e-4,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "value_clip_eps": None,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
}
_PROXIMAL: dict[str, float | None] = {**_ACTOR_CRITIC, "target_kl": None}
_REINFORCE = AlgorithmDefaults(
    settings={"normalize_advantage": "none"},
    hparams={"learning_rate": 1e-3, "gamma": 1.0, "ent_coef": 0.0, "max_grad_norm": None},
    has_critic=False,
)

ALGORITHM_DEFAULTS: dict[str, AlgorithmDefaults] = {
    "reinforce": _REINFORCE,
    "reinforce_to_go": _REINFORCE,
    "reinforce_baseline": AlgorithmDefaults(
        settings={**_EPOCHS, "normalize_advantage": "none"},
        hparams={**_REINFORCE.hparams, "critic_learning_rate": 1e-3, "value_clip_eps": None},
    ),
    "actor_critic": AlgorithmDefaults(
        settings={"normalize_advantage": "none", "value_target": "gae", "n_step": None},
        hparams={**_ACTOR_CRITIC, "learning_rate": 7e-4, "gae_lambda": 0.0},
    ),
    "off_policy_pg": AlgorithmDefaults(settings=_UPDATES, hparams=_PROXIMAL),
    "trpo": AlgorithmDefaults(
        settings={
            **_UPDATES,
            "normalize_advantage": "batch",
            "cg_iterations": 10,
            "line_search_steps": 10,
        },
        hparams={
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "max_kl": 0.01,
            "cg_damping": 0.1,
            "critic_learning_rate": 1e-3,
            "value_clip_eps": None,
            "ent_coef": 0.0,
            "max_grad_norm": None,
        },
    ),
    "ppo_penalty": AlgorithmDefaults(settings=_UPDATES, hparams={**_PROXIMAL, "kl_coef": 1.0}),
    "ppo_adaptive": AlgorithmDefaults(
        settings=_UPDATES, hparams={**_PROXIMAL, "kl_coef": 1.0, "d_targ": 0.01}
    ),
    "ppo": AlgorithmDefaults(
        settings=_UPDATES, hparams={**_PROXIMAL, "clip_eps": 0.2, "dual_clip": None}
    ),
    "spo": AlgorithmDefaults(settings=_UPDATES, hparams={**_PROXIMAL, "clip_eps": 0.2}),
    "dpo": AlgorithmDefaults(
        settings=_UPDATES, hparams={**_PROXIMAL, "dpo_alpha": 2.0, "dpo_beta": 0.6}
    ),
}
"""Defaults of the algorithms by name; `ppo_jax.algorithms.ALGORITHMS` has the whole rows."""

GAINS: Mapping[str, float] = {
    "hidden_gain": math.sqrt(2.0),
    # A small gain makes the first policy nearly uniform, or centred: Andrychowicz et al. 2021
    # (arXiv:2006.05990), section 3.2.
    "actor_gain": 0.01,
    "critic_gain": 1.0,
}
"""Gains of the orthogonal initialisation by hyperparameter, with their defaults."""

_INITIAL: Mapping[str, float | None] = {**GAINS, "initial_log_std": None}

COMMON_HPARAMS: Mapping[str, float | None] = {
    "max_grad_value": None,
    "reward_scale": None,
    "reward_clip": None,
    **_INITIAL,
}
"""Hyperparameters that every algorithm uses, with their defaults."""

INITIAL_HPARAMS = tuple(_INITIAL)
"""Hyperparameters that shape the parameters before the first update, and act no more after it."""

_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adabelief": {},
    "adagrad": {},
    # Adam's eps of 1e-5, not optax's 1e-8, is PPO's since OpenAI Baselines: Huang et al. 2022,
    # "The 37 implementation details of PPO", detail 3.
    "adam": {"eps": 1e-5},
    "adamax": {},
    "adamw": {"eps": 1e-5},
    "lion": {},
    "nadam": {"eps": 1e-5},
    "radam": {"eps": 1e-5},
    # A2C's values in OpenAI Baselines. TensorFlow and Stable-Baselines3 start the accumulator at 1.
    # From optax's 0, the first step along a gradient entry of 0.1 would be 95 times as large.
    "rmsprop": {"decay": 0.99, "eps": 1e-5, "initial_scale": 1.0},
    "sgd": {},
}
OPTIMIZERS = Registry("optimizer", _OPTIMIZERS)
"""Optimisers by name, with the arguments whose defaults differ here from those of optax."""


def used_hparams(config: Config, algorithm: Any) -> dict[str, float | None]:
    """Returns the hyperparameters that a training uses, with their defaults.

    Args:
      config: algorithm settings may be unset.
      algorithm: an `AlgorithmDefaults` or an `Algorithm`.

    >>> used_hparams(Config(), ALGORITHM_DEFAULTS["ppo"])["clip_eps"]
    0.2
    """
    used = {
        **algorithm.hparams,
        **COMMON_HPARAMS,
        **LR_SCHEDULES[config.lr_schedule],
    }
    if not algorithm.has_critic:
        del used["critic_gain"]
    # A user's module, and a network without hidden layers, have no gain that we could set.
    if module_of(config.network) is not None or not config.has_hidden_layers:
        del used["hidden_gain"]
    if config.n_step is not None:
        used.pop("gae_lambda", None)
    return used
