"""Sources of a sweep's configurations: all at once, or in batches that follow the results."""

import datetime
import math
import re
import time
import uuid
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

_CLAIM_SECONDS = 60.0  # after which a trial without a worker is given up
_MAKER_SECONDS = 30.0  # in which the worker that makes a study describes it


class Proposals(Protocol):
    """Configurations, batch by batch."""

    total: int
    """Number of all configurations."""
    description: dict[str, Any]
    """Everything that tells these configurations from others, as JSON."""
    checked: list[Row]
    """Rows that have all names, to be checked first: all configurations, or every end and choice of
    distributions that are drawn later."""
    is_adaptive: bool
    """True if configurations follow from the scores of earlier ones."""

    def start(self, description: Mapping[str, Any]) -> str | None:
        """Starts a sweep of this description (JSON).

        Returns:
          An identity of the study that several workers share; None if there is none.

        Raises:
          ConfigError: the study is that of another sweep.
        """

    def ask(self, worker: str = "") -> dict[int, Row]:
        """Returns the next batch as rows by configuration number; an empty batch ends the sweep.

        A worker of a shared study that was stopped first gets its unfinished configurations again.
        """

    def tell(self, scores: Sequence[float]) -> None:
        """Takes the scores of the last batch; higher is better."""


def make_proposals(
    space: Space,
    *,
    num_draws: int | None,
    sampler: Sampler,
    batch: int | None,
    storage: str | None = None,
) -> Proposals:
    """Returns the source of the configurations of a space.

    Args:
      space: see `search_space.rows`; distributions alone for "tpe".
      num_draws: draws of the space's distributions.
      sampler: "random" and "sobol" draw all at once, "tpe" in batches.
      batch: configurations in a batch of "tpe".
      storage: where several workers share the study of "tpe": a file, or a URL of a database.

    Raises:
      ConfigError: the space, or a number, does not fit the sampler.
    """
    require_known("sampler", sampler, get_args(Sampler))
    if sampler == "tpe":
        return _TreeParzen(space, num_draws, batch, storage)
    if storage is not None:
        raise ConfigError(
            f"storage is for sampler tpe, whose workers share results; got {_public(storage)} and "
            f"{sampler}. Leave storage out; shard divides configurations that are known beforehand."
        )
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
        self.checked = configurations
        self.is_adaptive = False
        self._left = dict(enumerate(configurations))

    def start(self, description: Mapping[str, Any]) -> str | None:
        """Returns None, because no results are shared."""
        del description
        return None

    def ask(self, worker: str = "") -> dict[int, Row]:
        del worker
        asked, self._left = self._left, {}
        return asked

    def tell(self, scores: Sequence[float]) -> None:
        """Ignores the scores, because all configurations were asked for at once."""


class _TreeParzen:
    """Optuna's tree-structured Parzen estimator: Bergstra et al. 2011 (NIPS 24), section 4.

    Its draws depend on its seed and the scores that it was told. A sweep that is started again asks
    for the same configurations, and tells it their scores from the disk. In a storage, which
    several workers share, a study remembers draws and scores itself.
    """

    is_adaptive = True

    def __init__(
        self, space: Space, num_draws: int | None, batch: int | None, storage: str | None
    ) -> None:
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
        self.checked = [
            {name: values[min(i, len(values) - 1)] for name, values in ends.items()}
            for i in range(max(map(len, ends.values())))
        ]
        self._space = drawn
        self._batch = batch
        self._asked: list[int] = []  # numbers of the trials in the last batch
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._running, self._failed = (
            optuna.trial.TrialState.RUNNING,
            optuna.trial.TrialState.FAIL,
        )
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
        # Workers of a shared study must not draw the same numbers.
        sampler = optuna.samplers.TPESampler(
            seed=0 if storage is None else None, constant_liar=True
        )
        self._storage = storage
        if storage is None:
            self._study = optuna.create_study(direction="maximize", sampler=sampler)
            return
        place = {"storage": _open_storage(storage), "study_name": _study_name(storage)}
        # One worker makes the study, and describes it in `start`.
        try:
            self._study = optuna.create_study(direction="maximize", sampler=sampler, **place)
            self._is_maker = True
        except optuna.exceptions.DuplicatedStudyError:
            self._study = optuna.load_study(sampler=sampler, **place)
            self._is_maker = False

    def start(self, description: Mapping[str, Any]) -> str | None:
        if self._storage is None:
            return None
        wanted = dict(description)
        if self._is_maker:
            self._study.set_user_attr("identity", uuid.uuid4().hex)
            self._study.set_user_attr("sweep", wanted)
        end = time.monotonic() + _MAKER_SECONDS
        while "sweep" not in self._study.user_attrs:
            if time.monotonic() > end:
                raise ConfigError(
                    f"the worker that made the study in {_public(self._storage)} must describe it "
                    f"within {_MAKER_SECONDS:.0f} s, and has not. Use another file, or name a "
                    "study: URL#name."
                )
            time.sleep(0.1)
        found = self._study.user_attrs["sweep"]
        changed = [name for name in wanted if found.get(name) != wanted[name]]
        if changed:
            raise ConfigError(
                f"workers of a storage must have the same sweep; {_public(self._storage)} has "
                f"another ({', '.join(changed)} differ). Use another file, or name a study: "
                "URL#name."
            )
        return self._study.user_attrs["identity"]

    def ask(self, worker: str = "") -> dict[int, Row]:
        trials = self._unfinished(worker)
        if not trials:
            for _ in range(min(self._batch, self.total - self._num_before())):
                trial = self._study.ask(self._distributions)
                # Other workers may have asked in the meantime.
                if self._num_before(trial.number) >= self.total:
                    self._study.tell(trial.number, state=self._failed)
                    break
                if self._storage is not None:
                    trial.set_user_attr("worker", worker)
                trials.append(trial)
        self._asked = [trial.number for trial in trials]
        return {
            trial.number: {
                name: entry.values[trial.params[name]]
                if isinstance(entry, Choice)
                else trial.params[name]
                for name, entry in self._space.items()
            }
            for trial in trials
        }

    def _unfinished(self, worker: str) -> list[Any]:
        """Returns the trials of a shared study that a worker had begun when it was stopped."""
        if self._storage is None:
            return []
        running = self._study.get_trials(deepcopy=False, states=(self._running,))
        # A worker that was killed before it could claim a trial leaves one that others draw again.
        long_ago = datetime.datetime.now() - datetime.timedelta(seconds=_CLAIM_SECONDS)
        for trial in running:
            begun = trial.datetime_start or long_ago
            if "worker" not in trial.user_attrs and begun <= long_ago:
                self._study.tell(trial.number, state=self._failed, skip_if_finished=True)
        return [trial for trial in running if trial.user_attrs.get("worker") == worker]

    def _num_before(self, number: int | None = None) -> int:
        """Returns how many trials have not failed: those before trial `number`, or all."""
        return sum(
            trial.state != self._failed and (number is None or trial.number < number)
            for trial in self._study.get_trials(deepcopy=False)
        )

    def tell(self, scores: Sequence[float]) -> None:
        for number, score in zip(self._asked, scores, strict=True):
            # Optuna takes a NaN for a trial that failed, and another one would be drawn for it.
            score = -math.inf if math.isnan(score) else score
            # Clocks of hosts differ: another worker may have taken this one for dead.
            self._study.tell(number, score, skip_if_finished=True)


def _study_name(storage: str) -> str:
    """Returns the name of the study in URL#name."""
    return storage.partition("#")[2] or "ppo-jax"


def _open_storage(storage: str) -> Any:
    """Returns Optuna's storage in a file, or in the database of a URL."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    place = storage.partition("#")[0]
    try:
        if "://" not in place:
            return optuna.storages.JournalStorage(JournalFileBackend(place))
        return optuna.storages.RDBStorage(place)
    except Exception as error:  # of the file system, or of any driver of a database
        reason = _public(" ".join(str(error).split()))[:300]
        raise ConfigError(
            "storage must be a file, or the URL of a database that answers; got "
            f"{_public(storage)}: {reason}"
        ) from error


def _public(text: str) -> str:
    """Returns a text without the passwords of URLs.

    >>> _public("postgresql://me:secret@host/base")
    'postgresql://me:***@host/base'
    """
    text = re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)
    return re.sub(r"(password=)[^&\s]*", r"\1***", text)
