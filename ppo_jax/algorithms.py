"""The algorithms, each a row of one table."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from ppo_jax import advantages, objectives
from ppo_jax.config import ConfigError, HParams, unknown_name
from ppo_jax.types import Trajectory
from ppo_jax.update import Objective, PolicyTerms

Estimator = Callable[[Trajectory, jax.Array, jax.Array, HParams], tuple[jax.Array, jax.Array]]
"""`(trajectory, value, next_value, hparams) -> (advantages, value targets)`, all `[T, N]`."""


class Algorithm(NamedTuple):
    """What makes one algorithm differ from another."""

    title: str
    source: str
    """The paper and its section."""
    hparams: Mapping[str, float | None]
    """The hyperparameters that it uses, with their defaults."""
    estimate: Estimator
    objective: Objective


def _gae(
    trajectory: Trajectory, value: jax.Array, next_value: jax.Array, hparams: HParams
) -> tuple[jax.Array, jax.Array]:
    estimates = advantages.gae(
        trajectory.reward,
        value,
        next_value,
        trajectory.terminated,
        trajectory.truncated,
        gamma=hparams.gamma,
        gae_lambda=hparams.gae_lambda,
    )
    return estimates, estimates + value


def _clipped_surrogate(terms: PolicyTerms, hparams: HParams) -> jax.Array:
    return objectives.clipped_surrogate(terms.ratio, terms.advantages, clip_eps=hparams.clip_eps)


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(
        title="Proximal policy optimisation, clipped surrogate",
        source="Schulman et al. 2017, arXiv:1707.06347, section 3",
        hparams={
            "learning_rate": 2.5e-4,
            "gamma": 0.99,
            "gae_lambda": 0.95,
            "clip_eps": 0.2,
            "value_clip_eps": None,
            "ent_coef": 0.01,
            "vf_coef": 0.5,
            "max_grad_norm": 0.5,
            "target_kl": None,
        },
        estimate=_gae,
        objective=_clipped_surrogate,
    ),
}


def get_algorithm(name: str) -> Algorithm:
    """The row of that name; an unknown name is a `ConfigError` that lists the known ones."""
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def complete(hparams: HParams | None, algorithm_name: str) -> HParams:
    """`hparams` with the algorithm's defaults where it leaves a value open.

    Raises:
      ConfigError: a value is set that the algorithm does not use.

    >>> complete(HParams(clip_eps=0.1), "ppo").gamma
    0.99
    """
    used = get_algorithm(algorithm_name).hparams
    hparams = HParams() if hparams is None else hparams
    for field in dataclasses.fields(HParams):
        if field.name not in used and getattr(hparams, field.name) is not None:
            raise ConfigError(
                f"a hyperparameter must be one that the algorithm uses; {field.name} is set and "
                f"{algorithm_name} uses {', '.join(used)}. Leave {field.name} out."
            )
    missing = {name: value for name, value in used.items() if getattr(hparams, name) is None}
    return hparams.replace(**missing)
