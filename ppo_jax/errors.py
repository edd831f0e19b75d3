"""The error that explains a wrong setting, and the checks that several modules share.

Needs no JAX, so that the command line can refuse a setting at once.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, Self, cast

import numpy as np


class ConfigError(ValueError):
    """Tells which rule a setting breaks, the values that broke it, and the remedy."""


def unknown_name(
    kind: str, name: str, known: Iterable[str], *, listed_by: str | None = None
) -> ConfigError:
    """Returns the error for a name that is not in a table; it lists the nearest and all names.

    Args:
      kind: noun for the named thing, such as "environment".
      name: the unknown name.
      known: all names.
      listed_by: a command that lists the names, if they are too many for a message.

    >>> print(unknown_name("animal", "cot", ["cat", "dog"]))
    unknown animal 'cot'. Did you mean cat? Known: cat, dog.
    """
    known = sorted(known)
    names = f"Known: {', '.join(known)}." if listed_by is None else f"`{listed_by}` lists all."
    return ConfigError(f"unknown {kind} {name!r}.{suggestion(name, known)} {names}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns a question that names the known names nearest to `name`; empty if none is near.

    >>> suggestion("cot", ["cat", "dog"])
    ' Did you mean cat?'
    """
    # A cutoff below which suggestions look random.
    nearest = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(nearest)}?" if nearest else ""


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises a `ConfigError` unless `name` is one of the known names."""
    known = tuple(known)
    if name not in known:
        raise unknown_name(kind, name, known)


def require_new_name(
    kind: str, name: str, taken: Iterable[str], *, ours: Iterable[str], overwrite: bool
) -> None:
    """Raises a `ConfigError` if `name` is registered already.

    Args:
      kind: noun for the named thing, such as "environment".
      name: the new name.
      taken: all registered names.
      ours: the names of the package's own parts, which cannot be replaced.
      overwrite: allow a name that a user registered.

    >>> require_new_name("animal", "cat", ["cat", "dog"], ours=["cat"], overwrite=True)
    Traceback (most recent call last):
    ...
    ppo_jax.errors.ConfigError: the name of an animal must be new; 'cat' is taken by the package. \
Choose another.
    """
    rule = f"the name of {'an' if kind[0] in 'aeiou' else 'a'} {kind} must be new"
    if name in tuple(ours):
        raise ConfigError(f"{rule}; {name!r} is taken by the package. Choose another.")
    if name in tuple(taken) and not overwrite:
        raise ConfigError(
            f"{rule}; {name!r} is taken. Choose another, or replace it by overwrite=True."
        )


def require_positive_integer(name: str, value: Any) -> None:
    """Raises a `ConfigError` unless `value` is a whole number of at least 1.

    >>> require_positive_integer("num_envs", 0)
    Traceback (most recent call last):
    ...
    ppo_jax.errors.ConfigError: num_envs must be a positive integer; got 0.
    """
    # A bool is an int in Python, but True environments are a mistake.
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < 1:
        raise ConfigError(f"{name} must be a positive integer; got {value!r}.")


def require_seed(value: Any) -> None:
    """Raises a `ConfigError` unless `value` is a whole number that a random key takes.

    >>> require_seed(-1)
    Traceback (most recent call last):
    ...
    ppo_jax.errors.ConfigError: a seed must be a whole number from 0 to 4294967295; got -1.
    """
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or not 0 <= value < 2**32:
        raise ConfigError(f"a seed must be a whole number from 0 to {2**32 - 1}; got {value!r}.")


def require_positive_integers(values: dict[str, Any]) -> None:
    """Applies `require_positive_integer` to each entry that is not None."""
    for name, value in values.items():
        if value is not None:
            require_positive_integer(name, value)


class Settings:
    """Base of records of settings, whose unknown names are errors with a suggestion."""

    def __new__(cls, *_: Any, **values: Any) -> Self:
        """Checks the names before the initialiser of the dataclass does, with a plain TypeError."""
        cls._require_fields(values)
        return super().__new__(cls)

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed; an unknown name is a `ConfigError`."""
        self._require_fields(changes)
        return cast(Self, dataclasses.replace(cast(Any, self), **changes))

    @classmethod
    def _require_fields(cls, names: Iterable[str]) -> None:
        known = _names_of(cls)
        for name in names:
            if name in known:
                continue
            # Users of Stable-Baselines3 and CleanRL know all settings as arguments of one function.
            for other in Settings.__subclasses__():
                if name in _names_of(other):
                    raise ConfigError(
                        f"{name} is a field of {other.__name__}, and not of {cls.__name__}. Pass "
                        f"{other.__name__}({name}=…)."
                    )
            raise unknown_name(f"{cls.__name__} field", name, known)


def _names_of(record: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cast(Any, record))]
