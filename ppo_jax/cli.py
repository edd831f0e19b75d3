"""The command `ppo-jax`. Nothing slow is imported before the command line is understood."""

import dataclasses
import functools
import importlib
import itertools
import operator
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

import ppo_jax
from ppo_jax import envs, flags, presets
from ppo_jax.commands.common import say
from ppo_jax.commands.environments import EnvsCommand
from ppo_jax.commands.launching import LaunchCommand
from ppo_jax.commands.pictures import PlotCommand, RenderCommand
from ppo_jax.commands.policies import EvalCommand, ExportCommand
from ppo_jax.commands.profiling import ProfileCommand
from ppo_jax.commands.sweeping import MergeCommand, ReportCommand, SweepCommand
from ppo_jax.commands.training import ResumeCommand, TrainCommand
from ppo_jax.config import Config
from ppo_jax.errors import ConfigError, unknown_name
from ppo_jax.hparams import HParams
from ppo_jax.runs.directory import CONFIG, RunDirectory, is_run

_COMMANDS = (
    "train",
    "resume",
    "eval",
    "plot",
    "render",
    "export",
    "profile",
    "sweep",
    "merge",
    "launch",
    "report",
    "envs",
)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 2 for a setting that breaks a rule."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--version" in argv:
        print(f"ppo-jax {ppo_jax.__version__}")
        return 0
    try:
        modules = _import_modules(argv)
        if argv[:1] == ["launch"]:
            return _launch(argv, modules)
        return _parse(argv).run()
    except ConfigError as error:
        say(f"ppo-jax: error: {error}")
        return 2
    except KeyboardInterrupt:  # a running training handles the first Ctrl-C itself
        say("ppo-jax: stopped")
        return 130
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough. Python would write to the pipe once
        # more when it exits, unless standard output goes elsewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(argv: list[str]) -> Any:
    """Returns the command that `argv` gives, with its options."""
    if argv and argv[0] not in _COMMANDS and not argv[0].startswith("-"):
        raise unknown_name("command", argv[0], _COMMANDS)

    def parse(env: str | None) -> Any:
        return tyro.cli(
            _commands(argv, env),
            prog="ppo-jax",
            description=(
                "Policy-gradient training, compiled end to end with JAX. --import MODULE imports a "
                "Python module first, which can register environments, algorithms and other parts."
            ),
            args=argv or ["--help"],
            registry=_REGISTRY,
        )

    # An environment may follow an option that takes no value, such as --quiet.
    command = parse(_named_env(argv))
    if isinstance(command, TrainCommand) and command.config.env != command.config.start.env:
        command = parse(command.config.env)
    return command


def _named_env(argv: list[str]) -> str | None:
    """Returns the environment that a command line names; None if no word is unambiguously one."""
    words = itertools.pairwise(part for word in argv for part in word.split("=", 1))
    # A word behind an option may be its value, such as a directory of that name.
    return next((x for before, x in words if envs.is_name(x) and before[:1] != "-"), None)


def _launch(argv: list[str], modules: list[str]) -> int:
    """Runs the command `launch`, whose arguments end with those of a sweep.

    Args:
      argv: the command line, without `--import` options.
      modules: names of the imported modules; every job imports them as well.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    command, words = _parse(argv[:end]), argv[end + 1 :]
    if words[:1] == ["sweep"]:  # which the rest of the line is, with or without the word
        words = words[1:]
    # Misspelt options of the sweep are found here, and not by every job.
    sweep = _parse(["sweep", *words]) if words else None
    words += [x for name in modules for x in ("--import", name)]
    return command.run(sweep, words, main)


def _import_modules(argv: list[str]) -> list[str]:
    """Imports the modules that `--import` names, from the current directory or the environment.

    Modules are imported before the command line is parsed, because environments that they register
    have to be known then. The words are removed from `argv`, and the names are returned.
    """
    names: list[str] = []
    argv[:] = [x for word in argv for x in _split_import(word)]
    while "--import" in argv:
        position = argv.index("--import")
        if position + 1 == len(argv):
            raise ConfigError(
                "--import needs the name of a Python module, as in --import my_module."
            )
        names.append(argv[position + 1])
        del argv[position : position + 2]
    if names and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0] and error.name != name:
                raise
            raise ConfigError(
                f"--import must name a Python module; there is no {name} in {os.getcwd()} or in "
                "the environment. Leave out the .py."
            ) from error
    return names


def _split_import(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--import=") else [word]


def _commands(argv: list[str], env: str | None) -> Any:
    """Returns the union of all commands, with the options that `argv` gives `train` and `sweep`.

    The options show the preset of `env`. If `env` is None, the environment is that of the
    `--config` file, or CartPole-v1.
    """
    # Read before parsing: the preset and the file decide the defaults that `--help` shows.
    words = [part for word in argv for part in word.split("=", 1)]
    named = dict(itertools.pairwise(words))
    is_train = argv[:1] == ["train"]
    file = Path(named["--config"]) if is_train and "--config" in named else None
    run_dir = None if file is None else _run_of(file)
    has_several = False
    if run_dir is not None:
        config, hparams = _settings_of_run(run_dir, env, named.get("--algorithm"))
    else:
        given = {} if file is None else _read_settings(file)
        of_file = given.pop("env", "CartPole-v1")
        env = of_file if env is None else env
        algorithm = named.get("--algorithm", given.pop("algorithm", "ppo"))
        # A sweep may name several algorithms, and is told of a misspelt one when its space is read.
        has_several = not is_train and algorithm not in flags.algorithms()
        algorithm = "ppo" if has_several else algorithm
        kind = flags.hparams_type(algorithm)
        values = {name: given.pop(name) for name in flags.hparam_names() if name in given}
        config, preset_hparams = presets.preset(env, algorithm, **given)
        hparams = kind(**preset_hparams.given()).replace(**values)
    train = _with_options(
        TrainCommand,
        config=flags.config_flags(config, hparams),
        hparams=flags.hparams_flags(config, hparams),
    )
    space = flags.space_flags(config, hparams, has_several_algorithms=has_several)
    sweep = _with_options(SweepCommand, space=space)
    types: tuple[Any, ...] = (
        type(train),
        ResumeCommand,
        EvalCommand,
        PlotCommand,
        RenderCommand,
        ExportCommand,
        ProfileCommand,
        type(sweep),
        MergeCommand,
        LaunchCommand,
        ReportCommand,
        EnvsCommand,
    )
    defaults = {"train": {"default": train}, "sweep": {"default": sweep}}
    commands = [
        Annotated[kind, tyro.conf.subcommand(name, **defaults.get(name, {}))]
        for name, kind in zip(_COMMANDS, types, strict=True)
    ]
    return functools.reduce(operator.or_, commands)


def _with_options(command: type, **groups: Any) -> Any:
    """Returns a command with one more field for each group, whose options have no group prefix."""
    fields = [
        (name, Annotated[type(group), tyro.conf.OmitArgPrefixes], group)
        for name, group in groups.items()
    ]
    made = dataclasses.make_dataclass(
        command.__name__,
        fields,
        bases=(command,),
        namespace={"__doc__": command.__doc__},  # the help shows it, and it is not inherited
        frozen=True,
    )
    return made(**groups)


def _run_of(path: Path) -> Path | None:
    """Returns the directory of the run that `--config` names; None if it names a file."""
    if path.is_dir():
        return path
    # A user's file may have the name of a run's.
    return path.parent if path.name == CONFIG and is_run(path.parent) else None


def _settings_of_run(
    run_dir: Path, env: str | None, algorithm: str | None
) -> tuple[Config, HParams]:
    """Returns the settings of a run, which take the place of a preset.

    Args:
      run_dir: directory of the run.
      env: environment that the command line names; None for that of the run.
      algorithm: algorithm that the command line names, which must be that of the run, or None.
    """
    config, hparams = RunDirectory.open(run_dir).read_config()
    if algorithm not in (None, config.algorithm):
        raise ConfigError(
            f"--config with a run trains with its algorithm; {run_dir} has {config.algorithm}, and "
            f"--algorithm is {algorithm}. Write the settings to keep in a file."
        )
    return config if env is None else config.replace(env=env), hparams


def _read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings of a training from a file. The values are those of a sweep's file."""
    from ppo_jax.population import search_space

    settings = search_space.read(path)
    known = [*vars(Config()), *flags.hparam_names()]
    for name, value in settings.items():
        if name not in known:
            raise unknown_name("setting", name, known)
        if name in ("env", "algorithm") and not isinstance(value, str):
            raise ConfigError(f"{name} must be a name; {path} gives {value!r}.")
        if isinstance(value, str):
            entry = search_space.parse(value)
            if not isinstance(entry, list) or len(entry) != 1:
                raise ConfigError(
                    f"a training takes a single value of every setting; {path} gives {name} as "
                    f"{value}. Sweep it, or choose one value."
                )
            settings[name] = entry[0]
        else:
            settings[name] = search_space.read_value(value)
    return settings


_REGISTRY = tyro.constructors.ConstructorRegistry()
"""Rules for parsing integers: 1e6 is an integer, and 64x64 is a tuple of two integers."""


@_REGISTRY.primitive_rule
def _whole_number(kind: tyro.constructors.PrimitiveTypeInfo) -> Any:
    if kind.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: _to_int(words[0]),
        is_instance=lambda x: isinstance(x, int) and not isinstance(x, bool),
        str_from_instance=lambda x: [str(x)],
    )


@_REGISTRY.primitive_rule
def _sizes(kind: tyro.constructors.PrimitiveTypeInfo) -> Any:
    if kind.type_origin is not tuple or get_args(kind.type) != (int, ...):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[INT [INT ...]]",
        instance_from_str=lambda words: tuple(
            _to_int(x) for word in words for x in word.split("x")
        ),
        is_instance=lambda x: isinstance(x, tuple) and all(isinstance(y, int) for y in x),
        str_from_instance=lambda x: [str(y) for y in x],
    )


def _to_int(word: str) -> int:
    """Returns a whole number, which may be written as 1e6."""
    if re.fullmatch(r"\d+(\.\d+)?[eE]\d+", word) and float(word).is_integer():
        return int(float(word))
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
