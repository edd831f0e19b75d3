"""Trainers and compiled functions that are kept from one training to the next."""

import collections
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

from ppo_jax.config import Config
from ppo_jax.resolve import is_ours
from ppo_jax.trainer import Trainer, make_trainer

Made = TypeVar("Made")


class _Entry(NamedTuple):
    trainer: Trainer
    made: dict[Hashable, Any]
    """Functions of the trainer, by key."""


_LARGEST_NUMBER = 4  # of trainers; their programs stay in memory
_entries: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()


def trainer_of(config: Config, mesh: Mesh | None = None) -> Trainer:
    """Returns `make_trainer(config, mesh)`, or the trainer of an earlier training.

    A config with a user's part gets a new trainer, because that code may read variables that have
    changed.
    """
    if not is_ours(config):
        return make_trainer(config, mesh)
    # Environments hold arrays, so the precision is part of the key. So is the text of the config,
    # because 1, 1.0 and True compare equal.
    key = (config, mesh, jax.config.values["jax_enable_x64"], repr(config))
    if key not in _entries:
        _entries[key] = _Entry(make_trainer(config, mesh), {})
        while len(_entries) > _LARGEST_NUMBER:
            _entries.popitem(last=False)
    _entries.move_to_end(key)
    return _entries[key].trainer


def made_once(owner: Any, key: Hashable, make: Callable[[], Made]) -> Made:
    """Returns `make()`, or its earlier result if the owner is kept.

    `jax.jit` caches by function object, so that functions which are kept are not compiled again.

    Args:
      owner: a trainer, its environment, or a result of this function.
      key: identifies the result, with all sizes on which it depends.
      make: makes the result. If the owner is not kept, it is called every time.
    """
    for entry in _entries.values():
        known = (entry.trainer, entry.trainer.env, *entry.made.values())
        if any(owner is x for x in known):
            if key not in entry.made:
                entry.made[key] = make()
            return entry.made[key]
    return make()


def forget() -> None:
    """Drops everything that is kept."""
    _entries.clear()
