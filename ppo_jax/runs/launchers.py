"""Launchers, which train the shards of a sweep elsewhere: on SLURM, Ray, or this machine.

A launcher starts `ppo-jax sweep … --shard i/n` as many times as there are shards. Shards exchange
nothing, each continues from its own directory, and `merge` joins the directories.
"""

import contextlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from ppo_jax.errors import ConfigError, require_positive_integer
from ppo_jax.runs import files
from ppo_jax.runs.lock import LOCK

_ERROR = "ppo-jax: error: "
_RAISED = "RuntimeError: "  # stands before the error of `run_job` in the launchers' own errors
LauncherName = Literal["local", "slurm", "ray"]
_RETRIES = 3  # of a shard whose worker Ray has lost, unless max_retries is given
# A submitit job that runs out of time continues in a new job. The defaults of submitit are 2 or 5
# minutes and 3 timeouts, which is too short for a training.
_DEFAULT_MINUTES = {"local": 60 * 24 * 365, "slurm": 60}
_MOST_TIMEOUTS = 1000


class Job(NamedTuple):
    """The training of one shard."""

    words: list[str]
    """Arguments of `ppo-jax`."""
    run_dir: Path


class Ended(NamedTuple):
    """A job that has ended."""

    number: int
    """Number of the shard, from 1."""
    error: str | None
    """The reason why it failed; None if the shard is complete."""


Run = Callable[[list[str]], int]
"""`words -> status`: runs the command `ppo-jax`."""
Launcher = Callable[[Sequence[Job], Run, Path, Mapping[str, Any]], Iterator[Ended]]
"""`(jobs, run, folder, options) -> jobs as they end`; the folder is for files of the launcher."""


def shard_jobs(words: Sequence[str], num_shards: int, folder: Path) -> list[Job]:
    """Returns the jobs of a sweep's shards.

    Args:
      words: arguments of `ppo-jax sweep`.
      num_shards: number of shards.
      folder: of their directories.

    >>> [job.words for job in shard_jobs(["CartPole-v1"], 1, Path("/runs"))]
    [['sweep', 'CartPole-v1', '--shard', '1/1', '--run-dir', '/runs/1', '--quiet']]
    """
    require_positive_integer("the number of shards", num_shards)
    jobs = []
    for i in range(1, num_shards + 1):
        # Workers may have other working directories.
        path = folder.absolute() / str(i)
        own = ["--shard", f"{i}/{num_shards}", "--run-dir", str(path), "--quiet"]
        jobs.append(Job(["sweep", *words, *own], path))
    return jobs


def launch(
    name: LauncherName, jobs: Sequence[Job], run: Run, folder: Path, options: Mapping[str, Any]
) -> Iterator[Ended]:
    """Runs jobs, and yields each of them when it has ended.

    Args:
      name: "local" and "slurm" use submitit, "ray" uses Ray.
      jobs: the jobs.
      run: runs the command `ppo-jax` in a job.
      folder: for logs and other files of the launcher.
      options: of `submitit.AutoExecutor.update_parameters`, or of `ray.remote`.

    Raises:
      ConfigError: a package is missing, or the launcher refuses the options.
    """
    launchers: dict[LauncherName, Launcher] = {
        "local": partial(_on_submitit, "local"),
        "slurm": partial(_on_submitit, "slurm"),
        "ray": _on_ray,
    }
    return launchers[name](jobs, run, folder, options)


def run_job(run: Run, words: list[str]) -> None:
    """Runs a command in a job; raises an error with its message if it fails."""
    with contextlib.redirect_stderr(_Tee(sys.stderr)) as errors:
        status = run(words)
    if status > 128:
        # A signal has stopped it, as when SLURM preempts a job: it has no result, and goes on.
        sys.exit(status)
    if status:
        raise RuntimeError(errors.last_error or f"ppo-jax ended with status {status}")


class _Tee(io.TextIOBase):
    """A stream that passes text on, and remembers the last error message in it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._line = self.last_error = ""

    def write(self, text: str) -> int:
        """Writes a text."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.startswith(_ERROR):
                self.last_error = line.removeprefix(_ERROR)
        return self._stream.write(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()


class SubmittedJob:
    """A job of submitit, which continues from its directory if SLURM preempts it."""

    def __call__(self, run: Run, words: list[str]) -> None:
        """Runs the job."""
        run_job(run, words)

    def checkpoint(self, run: Run, words: list[str]) -> Any:
        """Returns the job that is submitted in place of one that was preempted or timed out."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, run, words)


def _on_submitit(
    cluster: str, jobs: Sequence[Job], run: Run, folder: Path, options: Mapping[str, Any]
) -> Iterator[Ended]:
    """Runs jobs as a job array of SLURM, or as processes of this machine.

    Args:
      cluster: of submitit.
      jobs: the jobs.
      run: see `launch`.
      folder: for submitit's files.
      options: of `submitit.AutoExecutor.update_parameters`.
    """
    try:
        import submitit
    except ImportError as error:
        raise _missing("submitit", error) from error
    limit = {f"{cluster}_max_num_timeout": _MOST_TIMEOUTS}
    defaults = {"name": "ppo-jax", "timeout_min": _DEFAULT_MINUTES[cluster]}
    errors = (RuntimeError, TypeError, NameError, ValueError, AssertionError)
    with _refused(cluster, options, *errors):
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **limit)
        executor.update_parameters(**{**defaults, **options})
        # One call of the scheduler for all.
        submitted = executor.map_array(
            SubmittedJob(), [run] * len(jobs), [job.words for job in jobs]
        )
    numbers = {job.job_id: number for number, job in enumerate(submitted, start=1)}
    for job in submitit.helpers.as_completed(submitted, poll_frequency=1.0):
        failure = job.exception()
        reason = None if failure is None else f"{_last_line(failure)} ({job.paths.stderr})"
        yield Ended(numbers[job.job_id], reason)


def _last_line(error: BaseException) -> str:
    """Returns the last line of a launcher's error, which is the error of the job itself."""
    lines = [line for line in str(error).splitlines() if line.strip(" -")]
    raised = [line.partition(_RAISED)[2] for line in lines if _RAISED in line]
    return (raised or lines or [type(error).__name__])[-1]


def _on_ray(
    jobs: Sequence[Job], run: Run, folder: Path, options: Mapping[str, Any]
) -> Iterator[Ended]:
    """Runs jobs as tasks of Ray, which trains a shard again if its worker is lost."""
    try:
        import ray
    except ImportError as error:
        raise _missing("ray", error) from error
    del folder  # Ray has its logs in a place of its own
    options = {"max_retries": _RETRIES, **options}
    address = options.pop("address", None)
    with _refused("ray", options, ConnectionError, TypeError, ValueError):
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        # A new process for each task: one that has started JAX would keep its first GPU.
        train = ray.remote(max_calls=1, **options)(_train_on_ray)
        waiting = {
            train.remote(run, job.words, str(job.run_dir)): number
            for number, job in enumerate(jobs, start=1)
        }
    while waiting:
        (task,), _ = ray.wait(list(waiting), num_returns=1)
        number = waiting.pop(task)
        try:
            content = ray.get(task)
        except ray.exceptions.RayError as error:
            yield Ended(number, _last_line(error))
            continue
        try:
            _receive(content, jobs[number - 1].run_dir)
        except ConfigError as error:
            yield Ended(number, str(error))
            continue
        yield Ended(number, None)


def _train_on_ray(run: Run, words: list[str], run_dir: str) -> dict[str, bytes]:
    """Trains a shard, and returns the files of its directory."""
    run_job(run, words)
    root = Path(run_dir)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != LOCK
    }


def _receive(content: Mapping[str, bytes], run_dir: Path) -> None:
    """Writes the files of a shard, unless the worker and this process share a file system.

    Raises:
      ConfigError: the directory holds another sweep.
    """
    from ppo_jax.runs.sweep_store import SWEEP  # it needs JAX, and the command line does not

    def is_there(name: str) -> bool:
        return (run_dir / name).is_file() and (run_dir / name).read_bytes() == content[name]

    if all(map(is_there, content)):
        return
    if (run_dir / SWEEP).is_file() and not is_there(SWEEP):
        raise ConfigError(
            f"the directory of a shard must be new or hold the same sweep; {run_dir} holds "
            "another. Choose another output."
        )
    unfinished = files.unfinished(run_dir)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a launcher that was killed
    for name, data in content.items():
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (unfinished / name).write_bytes(data)
    files.replace_directory(unfinished, run_dir)


@contextlib.contextmanager
def _refused(name: str, options: Mapping[str, Any], *errors: type[Exception]) -> Iterator[None]:
    """Turns the error of a launcher about its options into a `ConfigError`."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{name} refuses the jobs; got the options {dict(options)}: {reason}"
        ) from error


def _missing(package: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"this launcher needs a package that is not installed ({error}). Install it by "
        f"pip install 'ppo-jax[{package}]'."
    )
