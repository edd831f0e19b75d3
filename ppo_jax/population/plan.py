"""From configurations and seeds to groups, each of which is one compiled program."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from ppo_jax.algorithms import complete
from ppo_jax.config import Config, HParams
from ppo_jax.population.space import ENV_PARAMS, Row

_HPARAMS = frozenset(field.name for field in dataclasses.fields(HParams))


class Member(NamedTuple):
    """One training of a sweep."""

    number: int
    """In the sweep's order: configuration by configuration, seed by seed."""
    configuration: int
    seed: int
    row: Row
    """What the space gives it."""
    hparams: HParams
    env_params: dict[str, Any]
    """Changes to the environment's parameters."""


class Group(NamedTuple):
    """Members that differ in traced values only."""

    config: Config
    traced: tuple[tuple[str, ...], ...]
    """Names of the hyperparameters that are set, and of the environment's parameters that vary."""
    members: tuple[Member, ...]

    @property
    def program(self) -> tuple[Config, tuple[tuple[str, ...], ...]]:
        """What its compilation depends on; hashable."""
        return self.config, self.traced


def make_plan(
    config: Config,
    hparams: HParams,
    configurations: Sequence[Row],
    seeds: Sequence[int],
    *,
    first: int = 0,
) -> list[Group]:
    """Groups of members, in the order in which they run.

    Traced are hyperparameters and parameters of the environment; everything else, and whether a
    hyperparameter is set at all, is compiled in.

    Args:
      config: what rows do not say.
      hparams: what rows do not say.
      configurations: the rows of a space.
      seeds: of every configuration.
      first: number of the first configuration.

    Raises:
      ConfigError: a row breaks a rule.

    >>> rows = [{"gamma": 0.9}, {"gamma": 0.99}, {"num_steps": 64}]
    >>> [len(group.members) for group in make_plan(Config(), HParams(), rows, seeds=(0, 1))]
    [4, 2]
    """
    groups: dict[tuple[Config, tuple[tuple[str, ...], ...]], list[Member]] = {}
    for configuration, row in enumerate(configurations, start=first):
        own_config = config.replace(**{k: v for k, v in row.items() if _is_static(k)})
        traced = {k: v for k, v in row.items() if k in _HPARAMS}
        own_hparams = complete(hparams.replace(**traced), own_config)
        env_params = {
            k.removeprefix(ENV_PARAMS): v for k, v in row.items() if k.startswith(ENV_PARAMS)
        }
        is_set = tuple(name for name, value in vars(own_hparams).items() if value is not None)
        program = own_config, (is_set, tuple(sorted(env_params)))
        for number, seed in enumerate(seeds, start=configuration * len(seeds)):
            member = Member(number, configuration, seed, row, own_hparams, env_params)
            groups.setdefault(program, []).append(member)
    return [
        Group(own_config, names, tuple(members)) for (own_config, names), members in groups.items()
    ]


def _is_static(name: str) -> bool:
    return name not in _HPARAMS and not name.startswith(ENV_PARAMS)
