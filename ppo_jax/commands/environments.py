"""The command `envs`."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import tyro

from ppo_jax import envs, presets
from ppo_jax.envs.suites import GYMNAX_NAMES, HOST_SUITES, SUITES
from ppo_jax.errors import ConfigError, require_known


@dataclasses.dataclass(frozen=True)
class EnvsCommand:
    """List the environments that can be trained: all suites, or the tasks that match."""

    word: tyro.conf.Positional[str | None] = None
    """List environments of every suite whose name contains this word; case does not matter."""
    suite: str | None = None
    """List the tasks of this suite."""
    spaces: bool = False
    """Show observations and actions as well, which builds each environment that is listed."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        of_suites = _tasks()
        if self.suite in HOST_SUITES:
            of_suites[self.suite] = _host_tasks(self.suite)
        if self.suite is not None:
            require_known("suite", self.suite, of_suites)
            of_suites = {self.suite: of_suites[self.suite]}
        elif self.word is None:
            if self.spaces:
                raise ConfigError("--spaces needs a word or --suite; got neither. Name one.")
            _print_suites(of_suites)
            return 0
        word = (self.word or "").lower()
        names = [name for tasks in of_suites.values() for name in tasks if word in name.lower()]
        if not names:
            where = "" if self.suite is None else f" of {self.suite}"
            raise ConfigError(
                f"no environment{where} has {self.word!r} in its name. `ppo-jax envs` lists the "
                "suites."
            )
        _print_tasks(names, with_spaces=self.spaces)
        return 0


_ABOUT = {
    "gymnax": "classic control, MinAtar, bsuite; their names have no prefix",
    "registered": "registered by --import",
}


def _tasks() -> dict[str, tuple[str, ...]]:
    """Returns the names of environments by suite."""
    result = {"gymnax": (*GYMNAX_NAMES, *envs.VARIANTS)}
    result |= {name: tuple(f"{name}:{x}" for x in suite.tasks) for name, suite in SUITES.items()}
    known = {name for tasks in result.values() for name in tasks}
    if registered := tuple(name for name in envs.names() if name not in known):
        result["registered"] = registered
    return result


def _host_tasks(suite: str) -> tuple[str, ...]:
    """Returns the names of a suite on the host, which only its package knows."""
    if not _is_installed(suite):
        raise ConfigError(f"{suite} is not installed: pip install 'ppo-jax[{suite}]'.")
    adapter = importlib.import_module(f"ppo_jax.envs.suites.{suite}")
    return tuple(f"{suite}:{task}" for task in adapter.tasks())


def _print_suites(of_suites: dict[str, tuple[str, ...]]) -> None:
    from rich import print as show
    from rich.table import Table

    table = Table("suite", "tasks", "installed", "", box=None)
    for suite, tasks in of_suites.items():
        about = SUITES[suite].about if suite in SUITES else _ABOUT[suite]
        table.add_row(suite, str(len(tasks)), "yes" if _is_installed(suite) else "no", about)
    for name, host_suite in HOST_SUITES.items():
        table.add_row(name, "any", "yes" if _is_installed(name) else "no", host_suite.about)
    show(table)
    show(
        "\n`ppo-jax envs --suite SUITE` lists the tasks of a suite, `ppo-jax envs WORD` those with "
        "a word in their name.\npip install 'ppo-jax\\[SUITE]' installs a suite."
    )


def _print_tasks(names: Sequence[str], *, with_spaces: bool) -> None:
    from rich import print as show
    from rich.markup import escape
    from rich.table import Column, Table

    spaces = ["observations", "actions"] if with_spaces else []
    table = Table(Column("environment", no_wrap=True), "preset", *spaces, box=None)
    missing = {}
    for name in names:
        suite = name.partition(":")[0]
        if not _is_installed(suite):
            missing[suite] = f"{suite} is not installed: pip install 'ppo-jax[{suite}]'"
        described = _spaces(name) if with_spaces and suite not in missing else ("-", "-")
        table.add_row(name, _preset_summary(name), *map(escape, described[: len(spaces)]))
    show(table)
    for sentence in missing.values():
        show(escape(sentence))


def _is_installed(suite: str) -> bool:
    packaged = SUITES | HOST_SUITES
    return suite not in packaged or packaged[suite].is_installed


def _spaces(name: str) -> tuple[str, str]:
    """Returns the spaces of an environment in words, or why it cannot be built."""
    try:
        env = envs.make(name)
    # Suites raise errors of any type, such as for a robot that must be downloaded.
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0], "-"
    return _in_words(env.observation_space), _in_words(env.action_space)


def _in_words(space: Any) -> str:
    """Returns a space as a short text.

    >>> from ppo_jax.envs.spaces import Box, Dict, Discrete
    >>> _in_words(Dict.of({"goal": Discrete(3), "arm": Box((2, 4))}))
    'arm: float32 2x4, goal: 3 values'
    """
    if hasattr(space, "names"):
        return ", ".join(f"{name}: {_in_words(entry)}" for name, entry in space.spaces)
    if hasattr(space, "spaces"):
        return ", ".join(map(_in_words, space.spaces))
    if hasattr(space, "shape"):
        return f"{space.dtype} {'x'.join(map(str, space.shape)) or 'scalar'}"
    values = space.num_values
    return f"{' x '.join(map(str, values)) if isinstance(values, tuple) else values} values"


def _preset_summary(name: str) -> str:
    if not presets.algorithms(name):
        return "-"
    config, _ = presets.preset(name)
    others = len(presets.algorithms(name)) - 1
    return (
        f"{config.total_timesteps:,} steps, {config.num_envs} environments"
        f"{f'; {others} more algorithms' if others else ''}"
    )
