"""Groups of a sweep's members, configurations times seeds; each is one compiled program."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ppo_jax.algorithms import hparam_names
from ppo_jax.config import Config
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.population.search_space import ENV_PARAMS, Row
from ppo_jax.resolve import complete_hparams


class Member(NamedTuple):
    """One training of a sweep."""

    number: int
    """Position in the sweep's order: configuration by configuration, seed by seed."""
    configuration: int
    seed: int
    row: Row
    """The settings that the space gives it."""
    hparams: HParams
    env_params: dict[str, Any]
    """Changes to the environment's parameters."""


class Group(NamedTuple):
    """Members that differ in traced values only."""

    config: Config
    traced: tuple[tuple[str, ...], ...]
    """Names of the hyperparameters that are set, and of the environment's parameters that vary."""
    members: tuple[Member, ...]
    size: int
    """Number of members of the group in the whole sweep, of which a shard has some."""

    @property
    def program(self) -> tuple[Config, tuple[tuple[str, ...], ...]]:
        """Everything that its compilation depends on; hashable."""
        return self.config, self.traced


def shard_of(plan: Sequence[Group], index: int, count: int) -> list[Group]:
    """Returns the shard of a plan that one of several workers trains.

    Shards are consecutive members in the order of the plan, so that a worker compiles few programs.
    Their sizes differ by at most one. They depend on nothing but the plan.

    Args:
      plan: all groups.
      index: of the shard, from 1 to `count`.
      count: number of shards.

    >>> rows = [{"gamma": 0.9}, {"gamma": 0.99}, {"num_steps": 64}]
    >>> plan = make_plan(Config(), HParams(), rows, seeds=(0, 1))
    >>> [[m.number for g in shard_of(plan, i, 4) for m in g.members] for i in (1, 2, 3, 4)]
    [[0], [1, 2], [3], [4, 5]]
    """
    total = sum(len(group.members) for group in plan)
    first, end = ((index - 1) * total // count, index * total // count)
    shards = []
    for group in plan:
        members = group.members[max(first, 0) : max(end, 0)]
        first, end = first - len(group.members), end - len(group.members)
        if members:
            shards.append(group._replace(members=members))
    return shards


def make_plan(
    config: Config,
    hparams: HParams,
    configurations: Sequence[Row],
    seeds: Sequence[int],
    *,
    numbers: Sequence[int] | None = None,
) -> list[Group]:
    """Returns groups of members, in the order in which they run.

    Hyperparameters and parameters of the environment are traced. All other settings are compiled
    in, and so is whether a hyperparameter is set.

    Args:
      config: settings that rows do not change.
      hparams: hyperparameters that rows do not change.
      configurations: the rows of a space.
      seeds: of every configuration.
      numbers: of the configurations in the sweep; None for 0, 1, ….

    Raises:
      ConfigError: a row breaks a rule.

    >>> rows = [{"gamma": 0.9}, {"gamma": 0.99}, {"num_steps": 64}]
    >>> [len(group.members) for group in make_plan(Config(), HParams(), rows, seeds=(0, 1))]
    [4, 2]
    """
    traced_names = hparam_names()
    groups: dict[tuple[Config, tuple[tuple[str, ...], ...]], list[Member]] = {}
    numbers = range(len(configurations)) if numbers is None else numbers
    for configuration, row in zip(numbers, configurations, strict=True):
        traced = {name: value for name, value in row.items() if name in traced_names}
        env_params = {
            name.removeprefix(ENV_PARAMS): value
            for name, value in row.items()
            if name.startswith(ENV_PARAMS)
        }
        static = {
            name: value
            for name, value in row.items()
            if name not in traced and not name.startswith(ENV_PARAMS)
        }
        row_config = config.replace(**static)
        row_hparams = complete_hparams({**hparams.given(), **traced}, row_config)
        _require_switched_off(traced, row_hparams)
        # Whether a value is set changes the pytree, and so the program.
        program = row_config, (tuple(row_hparams.given()), tuple(sorted(env_params)))
        for number, seed in enumerate(seeds, start=configuration * len(seeds)):
            member = Member(number, configuration, seed, row, row_hparams, env_params)
            groups.setdefault(program, []).append(member)
    return [Group(*program, tuple(found), len(found)) for program, found in groups.items()]


def _require_switched_off(asked: Mapping[str, Any], hparams: HParams) -> None:
    """Raises a `ConfigError` if a row's None keeps a default instead of switching it off."""
    for name, value in asked.items():
        default = getattr(hparams, name)
        if value is None and default is not None and hparams.ranges()[name][1] == math.inf:
            raise ConfigError(
                f"None leaves {name} to the algorithm, whose value is {default}. Write inf to "
                "switch it off, or the value."
            )
