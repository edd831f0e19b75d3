"""Sources of a sweep's configurations: all at once, or in batches that follow the results."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, get_args

from ppo_jax.errors import ConfigError, require_known
from ppo_jax.population.search_space import (
    Choice,
    Distribution,
    LogUniform,
    Row,
    Sampler,
    Space,
    check_draws,
    check_names,
    extremes,
    rows,
)


class Proposals(Protocol):
    """Configurations, batch by batch."""

    total: int
    """Number of all configurations."""
    description: dict[str, Any]
    """Everything that tells these configurations from others, as JSON."""
    extremes: list[Row]
    """Rows with every end and choice of distributions that are drawn later, to be checked first."""

    def ask(self) -> list[Row]:
        """Returns the next batch; an empty one at the end."""

    def tell(self, scores: Sequence[float]) -> None:
        """Takes the scores of the last batch; higher is better."""


def make_proposals(
    space: Space, *, num_draws: int | None, sampler: Sampler, batch: int | None
) -> Proposals:
    """Returns the source of the configurations of a space.

    Args:
      space: see `search_space.rows`; distributions alone for "tpe".
      num_draws: draws of the space's distributions.
      sampler: "random" and "sobol" draw all at once, "tpe" in batches.
      batch: configurations in a batch of "tpe".

    Raises:
      ConfigError: the space, or a number, does not fit the sampler.
    """
    require_known("sampler", sampler, get_args(Sampler))
    if sampler == "tpe":
        return _TreeParzen(space, num_draws, batch)
    if batch is not None:
        raise ConfigError(
            f"batch is for sampler tpe, which draws again after every batch; got {batch} and "
            f"{sampler}. Leave batch out; chunk sets how many members run at once."
        )
    return _AllAtOnce(rows(space, num_draws=num_draws, sampler=sampler))


class _AllAtOnce:
    def __init__(self, configurations: list[Row]) -> None:
        self.total = len(configurations)
        self.description = {"configurations": configurations}
        self.extremes: list[Row] = []
        self._left = configurations

    def ask(self) -> list[Row]:
        asked, self._left = self._left, []
        return asked

    def tell(self, scores: Sequence[float]) -> None:
        """Ignores the scores, because all configurations were asked for at once."""


class _TreeParzen:
    """Optuna's tree-structured Parzen estimator: Bergstra et al. 2011 (NIPS 24), section 4.

    Its draws depend on its seed and the scores that it was told. A sweep that is started again asks
    for the same configurations, and tells it their scores from the disk.
    """

    def __init__(self, space: Space, num_draws: int | None, batch: int | None) -> None:
        if not isinstance(space, Mapping):
            raise ConfigError("sampler tpe needs a space of distributions; got a list of rows.")
        check_names(space)
        drawn: dict[str, Distribution] = {}
        for name, entry in space.items():
            if not isinstance(entry, Distribution):
                raise ConfigError(
                    f"sampler tpe needs a distribution for every name; {name} is {entry}. "
                    "Write choice(…), or put it into the config."
                )
            drawn[name] = entry
        if not drawn:
            raise ConfigError("sampler tpe needs something to draw; the space is empty.")
        check_draws(num_draws, drawn)
        if batch is None or batch < 1:
            raise ConfigError(
                f"sampler tpe needs a batch of at least 1 configuration; got {batch}. A batch of "
                "a tenth of the draws, or what fits the device, is a start."
            )
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                "sampler tpe needs optuna, which is not installed: pip install 'ppo-jax[optuna]'."
            ) from error
        assert num_draws is not None
        self.total = num_draws
        self.description = {
            "space": {name: repr(entry) for name, entry in space.items()},
            "sampler": "tpe",
            "num_draws": num_draws,
            "batch": batch,
        }
        ends = {name: extremes(entry) for name, entry in drawn.items()}
        self.extremes = [
            {name: values[min(i, len(values) - 1)] for name, values in ends.items()}
            for i in range(max(map(len, ends.values())))
        ]
        self._space = drawn
        self._batch = batch
        self._asked = 0
        self._trials: list[Any] = []
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        distributions = optuna.distributions
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            # A choice is drawn as an index, because optuna's categories cannot be tuples.
            name: distributions.CategoricalDistribution(range(len(entry.values)))
            if isinstance(entry, Choice)
            else distributions.FloatDistribution(
                entry.low, entry.high, log=isinstance(entry, LogUniform)
            )
            for name, entry in drawn.items()
        }
        # Unfinished trials count as bad ones, so that the draws of a batch spread out.
        sampler = optuna.samplers.TPESampler(seed=0, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)

    def ask(self) -> list[Row]:
        count = min(self._batch, self.total - self._asked)
        self._asked += count
        self._trials = [self._study.ask(self._distributions) for _ in range(count)]
        return [
            {
                name: entry.values[trial.params[name]]
                if isinstance(entry, Choice)
                else trial.params[name]
                for name, entry in self._space.items()
            }
            for trial in self._trials
        ]

    def tell(self, scores: Sequence[float]) -> None:
        for trial, score in zip(self._trials, scores, strict=True):
            self._study.tell(trial, score)
