"""Functions that are kept from one training to the next, so that nothing is compiled twice."""

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import jax
from jax.sharding import Mesh

from ppo_jax.config import Config
from ppo_jax.resolve import is_ours
from ppo_jax.trainer import Trainer, make_trainer

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Value = TypeVar("Value")

_SIZE = 4
_caches: list[Callable[[], None]] = []


def keep(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Returns a function that remembers its last four results, by its hashable arguments."""
    kept = functools.lru_cache(maxsize=_SIZE)(function)
    _caches.append(kept.cache_clear)
    return functools.update_wrapper(lambda *args, **kwargs: kept(*args, **kwargs), function)


def forget() -> None:
    """Drops all results that `keep` remembers."""
    for clear in _caches:
        clear()


class Same(Generic[Value]):
    """A key that equals another one if both hold the same object.

    Records with arrays and functions have no hash of their own.

    >>> env = [1]
    >>> Same(env) == Same(env), Same(env) == Same([1])
    (True, False)
    """

    def __init__(self, value: Value) -> None:
        """Holds the object, so that its identity is not used again."""
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def trainer_of(config: Config, mesh: Mesh | None = None) -> Trainer:
    """Returns `make_trainer(config, mesh)`, or the trainer of an earlier training.

    A user's part makes a new one, because its code may read variables that have changed.
    """
    if not is_ours(config):
        return make_trainer(config, mesh)
    # Arrays of an environment depend on the precision, and 1 equals 1.0 and True.
    return _make_once(config, mesh, (jax.config.read("jax_enable_x64"), repr(config)))


@keep
def _make_once(config: Config, mesh: Mesh | None, key: tuple[bool, str]) -> Trainer:
    del key
    return make_trainer(config, mesh)
