"""Metrics of updates as sums and counts, which can be added up before they are averaged."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.types import EpisodeStats, Scalars


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Metrics(Mapping[str, jax.Array]):
    """A mapping from names to averages, stored as sums and counts.

    To average several updates, sum the leaves: `jax.tree.map(lambda x: x.sum(axis=0), metrics)`.
    Reading a name divides its total by the count. Names that start with "episode/" are averaged
    over the episodes that ended, and are NaN where none did; "episode/count" is their number. All
    other names are averaged over updates.

    >>> window = Metrics({"train/entropy": np.array(3.0), "episode/return": np.array(8.0)}, 2, 4)
    >>> {name: float(value) for name, value in window.items()}
    {'train/entropy': 1.5, 'episode/return': 2.0, 'episode/count': 4.0}
    """

    totals: dict[str, jax.Array]
    num_updates: jax.Array
    num_episodes: jax.Array

    def __getitem__(self, name: str) -> jax.Array:
        if name == "episode/count":
            return self.num_episodes
        count = self.num_episodes if name.startswith("episode/") else self.num_updates
        with np.errstate(divide="ignore", invalid="ignore"):  # no episode: NaN without a warning
            return self.totals[name] / count

    def __iter__(self) -> Iterator[str]:
        return iter((*self.totals, "episode/count"))

    def __len__(self) -> int:
        return len(self.totals) + 1


def make_metrics(scalars: Scalars, ended: EpisodeStats) -> Metrics:
    """Returns the metrics of one update and of the episodes that ended in it."""
    episodes = {"episode/return": ended.return_sum, "episode/length": ended.length_sum}
    own = {f"episode/{name}": total for name, total in ended.metric_sums.items()}
    return Metrics({**scalars, **episodes, **own}, jnp.ones(()), ended.num_episodes)
