"""Shards of a sweep, which several machines trained, become one sweep."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.errors import ConfigError
from ppo_jax.runs.sweep_store import SWEEP, SweepStore


class Merged(NamedTuple):
    """The result of a merge."""

    num_members: int
    num_missing: int
    """Members that no shard has finished."""
    is_shared: bool = False
    """True if workers shared a study; then only a worker can train the missing members."""
    unwritten: tuple[str, ...] = ()
    """Files that could not be written, with the reasons; the same merge writes them again."""


def merge(shards: Sequence[str | Path], run_dir: str | Path) -> Merged:
    """Joins the directories of shards of a sweep into the directory of the sweep.

    The shards are those of `sweep(…, shard=(i, n))`, or workers of `sweep(…, storage=…)`. They stay
    as they are. Members may be missing, because a shard is missing or was interrupted. The same
    call of `sweep` without `shard` trains them in the new directory; those of a worker are trained
    by the worker. A directory into which some shards were merged before takes the others.

    Args:
      shards: directories, in any order.
      run_dir: directory of the sweep, which is new, or holds the same sweep.

    Raises:
      ConfigError: a directory holds something else, shards are of different sweeps, or a shard is
        given twice or in use.
    """
    paths = [Path(path) for path in shards]
    if not paths:
        raise ConfigError("merge needs the directories of shards; got none. Name them.")
    if Path(run_dir).resolve() in [path.resolve() for path in paths]:
        raise ConfigError(
            f"merge needs a directory that is none of the shards; got {run_dir}. Choose a new one."
        )
    descriptions = [SweepStore.describe(path) for path in paths]
    whole = _common(paths, descriptions)
    with ExitStack() as stack:
        # The shards first: one that is in use ends this before anything is written.
        found = [
            stack.enter_context(SweepStore.opened(path, description))
            for path, description in zip(paths, descriptions, strict=True)
        ]
        merged = stack.enter_context(SweepStore.opened(run_dir, whole))
        for shard in found:
            merged.adopt(shard)
        members, _ = merged.collect()
    # A sampler that draws while it trains has no list of configurations.
    count = len(whole["configurations"]) if "configurations" in whole else whole["num_draws"]
    total = count * len(whole["seeds"])
    return Merged(
        len(members),
        total - len(members),
        is_shared="configurations" not in whole,
        unwritten=tuple(merged.unwritten.values()),
    )


def _common(paths: Sequence[Path], descriptions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Checks that directories are shards of one sweep, and returns the sweep's description."""
    wholes = [
        {name: x for name, x in description.items() if name != "shard"}
        for description in descriptions
    ]
    seen: dict[tuple[int | str, ...], Path] = {}
    for path, description, whole in zip(paths, descriptions, wholes, strict=True):
        if not _is_of_a_sweep(description):
            raise ConfigError(
                f"merge needs shards of a sweep; {path / SWEEP} is damaged, or that of a search. "
                "Leave it out."
            )
        if "shard" not in description and "study" not in description:
            raise ConfigError(
                f"merge needs shards of a sweep; {path} is a whole one. Leave it out."
            )
        # Workers that share a study have no numbers.
        number = tuple(description.get("shard", (str(path.resolve()), 0)))
        count = descriptions[0].get("shard", (1, 0))[1]
        if whole != wholes[0] or number[1] != count:
            changed = [name for name in whole if whole[name] != wholes[0].get(name)] or ["shards"]
            raise ConfigError(
                f"shards must be of one sweep; {path} and {paths[0]} differ in "
                f"{', '.join(changed)}. Name those of one sweep."
            )
        if number in seen:
            raise ConfigError(
                f"a shard must be given once; {seen[number]} and {path} are both "
                f"{f'shard {number[0]} of {count}' if count else 'the same worker'}. Leave one out."
            )
        seen[number] = path
    return wholes[0]


def _is_of_a_sweep(description: dict[str, Any]) -> bool:
    """Returns whether a description has what a merge reads."""
    shard = description.get("shard", [1, 1])
    return (
        isinstance(description.get("seeds"), list)
        and (
            isinstance(description.get("configurations"), list)
            or type(description.get("num_draws")) is int
        )
        and isinstance(shard, list)
        and [type(x) for x in shard] == [int, int]
        and 1 <= shard[0] <= shard[1]
    )
