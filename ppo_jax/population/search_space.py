"""Search spaces: grids, random draws, and lists of rows."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ppo_jax.algorithms import hparam_names
from ppo_jax.config import Config
from ppo_jax.errors import ConfigError, require_known, require_positive_integer, unknown_name
from ppo_jax.hparams import LARGEST

Row = dict[str, Any]
"""One configuration: values by name. Names are fields of `HParams` or `Config`, or
"env_params.NAME"."""

Sampler = Literal["random", "sobol", "tpe"]

ENV_PARAMS = "env_params."


def _require_numbers(*ends: Any) -> None:
    """Checks the ends of a range."""
    for end in ends:
        is_number = isinstance(end, (int, float, np.number)) and not isinstance(end, bool)
        # Larger numbers are infinite in single precision.
        if not is_number or not abs(end) <= LARGEST:
            raise ConfigError(f"the ends of a range must be finite numbers; got {end!r}.")


@dataclasses.dataclass(frozen=True)
class Uniform:
    """The uniform distribution on [low, high)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_numbers(self.low, self.high)
        if not self.low < self.high:
            raise ConfigError(f"a uniform range needs low < high; got {self.low} and {self.high}.")

    def at(self, u: Any) -> Any:
        """Returns the value at quantile u, a number or an array."""
        return self.low + (self.high - self.low) * u


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """The distribution on [low, high) whose logarithm is uniform; both ends are positive."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_numbers(self.low, self.high)
        if not 0 < self.low < self.high:
            raise ConfigError(
                f"a log-uniform range needs 0 < low < high; got {self.low} and {self.high}."
            )

    def at(self, u: Any) -> Any:
        """Returns the value at quantile u."""
        return self.low * (self.high / self.low) ** u


@dataclasses.dataclass(frozen=True)
class Choice:
    """The uniform distribution over some values."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError("a choice must be of one or more values; got none.")

    def at(self, u: float) -> Any:
        """Returns the value at quantile u."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]


Distribution = Uniform | LogUniform | Choice
Space = Mapping[str, Sequence[Any] | Distribution] | Sequence[Row]


def rows(
    space: Space, *, num_draws: int | None = None, sampler: Sampler = "random", seed: int = 0
) -> list[Row]:
    """Returns the configurations of a space, in a fixed order.

    Args:
      space: a list of rows; or a mapping from names to lists and distributions. Every combination
        of the lists is taken, and the distributions are drawn for each of these combinations.
      num_draws: draws of the distributions; needed if and only if there are any.
      sampler: "random", or "sobol" for draws that fill the space evenly.
      seed: random seed of the draws.

    Raises:
      ConfigError: an unknown name, an empty list, or draws without distributions.

    >>> rows({"learning_rate": [1e-3, 3e-3], "num_steps": [32, 64]})[1]
    {'learning_rate': 0.001, 'num_steps': 64}
    >>> len(rows({"gamma": Uniform(0.9, 0.99), "ent_coef": [0.0, 0.01]}, num_draws=8))
    16
    """
    if not isinstance(space, Mapping):
        found = [dict(row) for row in space]
        for row in found:
            check_names(row)
        if num_draws is not None:
            raise ConfigError(
                f"num_draws needs distributions; the space is a list of {len(found)} rows. "
                "Leave num_draws out."
            )
        return found or [{}]
    check_names(space)
    for name, entry in space.items():
        if isinstance(entry, str) or not isinstance(entry, (Distribution, Iterable)):
            raise ConfigError(
                f"a space maps names to lists and distributions; got {name}={entry!r}. Write "
                f"[{entry!r}], or set it in the config or the hyperparameters."
            )
    drawn = {name: entry for name, entry in space.items() if isinstance(entry, Distribution)}
    check_draws(num_draws, drawn)
    listed = {
        name: list(entry) for name, entry in space.items() if not isinstance(entry, Distribution)
    }
    for name, values in listed.items():
        if not values:
            raise ConfigError(f"every list of a space must hold a value; {name} holds none.")
        if len(set(map(repr, values))) < len(values):  # arrays have no truth value
            raise ConfigError(
                f"values of a list must differ; {name} has {values}. Leave one out; two layers of "
                "64 units are (64, 64), or 64x64 in a shell."
                if name.endswith("hidden_sizes")
                else f"values of a list must differ; {name} has {values}. Leave one out."
            )
    # One empty draw, so that the product below is the grid alone.
    draws: list[Row] = [{}]
    if drawn:
        assert num_draws is not None
        quantiles = _quantiles(num_draws, len(drawn), sampler, seed)
        draws = [
            {name: entry.at(u) for (name, entry), u in zip(drawn.items(), point, strict=True)}
            for point in quantiles
        ]
    grid = [
        dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())
    ]
    # Names keep the order of the space, which becomes the order of a table's columns.
    return [{name: {**one, **draw}[name] for name in space} for draw in draws for one in grid]


def extremes(distribution: Distribution) -> tuple[Any, ...]:
    """Returns both ends of a range, or all values of a choice."""
    if isinstance(distribution, Choice):
        return distribution.values
    return distribution.low, distribution.high


def check_draws(num_draws: int | None, drawn: Mapping[str, Distribution]) -> None:
    """Raises a `ConfigError` unless there is a number of draws where there are distributions."""
    if (num_draws is None) != (not drawn):
        raise ConfigError(
            "num_draws (--draws) must be given if and only if something is drawn; got "
            f"{num_draws} and "
            f"{', '.join(drawn) or 'no distribution'}."
        )
    if num_draws is not None:
        require_positive_integer("num_draws", num_draws)


def read(path: Path) -> dict[str, Any]:
    """Reads a space from a YAML file.

    The file maps settings to a value, a list or the text of a distribution.

    Raises:
      ConfigError: there is no such file, or it holds something else.
    """
    import yaml

    if not path.is_file():
        raise ConfigError(f"the settings must be in a YAML file; there is none at {path}.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    # Its constructors of dates and numbers raise errors of their own.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f" at line {where.line + 1}"
        raise ConfigError(f"the settings must be in YAML; {path} is malformed{line}.") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{path} must map settings to values; it holds {found!r}.")
    return found


def parse(entry: Any) -> list[Any] | Distribution:
    """Parses an entry of a space as a command line or a file writes it.

    >>> parse("1e-4,3e-4")
    [0.0001, 0.0003]
    >>> parse("loguniform(1e-4,1e-2)")
    LogUniform(low=0.0001, high=0.01)
    >>> parse("relu,tanh")
    ['relu', 'tanh']
    >>> parse("64x64,256")
    [(64, 64), 256]
    """
    if not isinstance(entry, str):
        return [read_value(x) for x in entry] if isinstance(entry, list) else [read_value(entry)]
    text = entry
    name, bracket, inside = text.partition("(")
    if bracket and inside.endswith(")"):
        require_known("distribution", name, ("uniform", "loguniform", "choice"))
        values = [_scalar(word) for word in inside[:-1].split(",")]
        if name == "choice":
            return Choice(tuple(values))
        if len(values) != 2:
            raise ConfigError(f"{name} takes a low and a high value; got {text}.")
        return Uniform(*values) if name == "uniform" else LogUniform(*values)
    return [_scalar(word) for word in text.split(",")]


def read_value(value: Any) -> Any:
    """Parses a value in a file: YAML reads 1e-3 as a string, and has no tuples."""
    if isinstance(value, list):
        return tuple(map(read_value, value))
    if isinstance(value, dict):
        return {name: read_value(x) for name, x in value.items()}
    return _scalar(value) if isinstance(value, str) else value


def _scalar(word: str) -> Any:
    # The words of Python and of YAML, in upper or lower case.
    known = {"none": None, "true": True, "false": False}
    if word.lower() in known:
        return known[word.lower()]
    if re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})+", word):
        return tuple(map(int, word.split("x")))
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _quantiles(num_draws: int, dimensions: int, sampler: Sampler, seed: int) -> np.ndarray:
    if sampler == "random":
        return np.random.default_rng(seed).random((num_draws, dimensions))
    if sampler == "sobol":
        from scipy.stats import qmc

        # Sobol sequences are balanced for whole powers of 2, of which the first draws are returned.
        engine = qmc.Sobol(dimensions, rng=np.random.default_rng(seed))
        return engine.random_base2(math.ceil(math.log2(num_draws)))[:num_draws]
    raise unknown_name("sampler", sampler, ("random", "sobol"))


def check_names(names: Mapping[str, Any]) -> None:
    """Raises a `ConfigError` for a name that no setting has."""
    known = [*sorted(hparam_names()), *(field.name for field in dataclasses.fields(Config))]
    for name in names:
        if not name.startswith(ENV_PARAMS):
            require_known("name in the space", name, [*known, "env_params.NAME"])
