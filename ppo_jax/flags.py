"""Settings as options of the command line, with their choices and the defaults they resolve to.

The classes are made for each command line, because its environment, its algorithm and the parts
that it imports decide what an option does when it is left out.
"""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import tyro

from ppo_jax import envs, presets
from ppo_jax.config import ALGORITHM_SETTINGS, LR_SCHEDULES, NETWORKS, Config
from ppo_jax.defaults import ALGORITHM_DEFAULTS, OPTIMIZERS, used_hparams
from ppo_jax.errors import require_known
from ppo_jax.hparams import HParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigFlags(Config):
    """Settings that change shapes or control flow: a new set of values compiles a new program."""

    env: tyro.conf.Positional[str] = "CartPole-v1"
    """Name of the environment (`ppo-jax envs` lists them)."""
    network: str = "mlp"
    """Layers that images pass before the hidden layers: none ("mlp"), convolutions or a residual
    network; or a network that an imported module registered."""

    start: ClassVar[Config] = Config()
    """The settings of the preset and of a `--config` file."""

    def __post_init__(self) -> None:
        """Skips the checks of `Config`, because the parser would hide their messages.

        The property `config` checks the settings.
        """

    @property
    def config(self) -> Config:
        """The settings as a checked `Config`; arguments are added to those of the preset."""
        return Config(**presets.with_arguments(vars(self.start), vars(self)))


def algorithms() -> Mapping[str, Any]:
    """Returns the algorithms by name, those that a module registered included.

    The values have `settings`, `hparams` and `has_critic`.
    """
    return _loaded("algorithms", "ALGORITHMS", ALGORITHM_DEFAULTS)


def hparams_type(algorithm: str) -> type[HParams]:
    """Returns the type of an algorithm's hyperparameters; an unknown name is a `ConfigError`."""
    require_known("algorithm", algorithm, algorithms())
    return getattr(algorithms()[algorithm], "hparams_type", HParams)


def hparam_names() -> tuple[str, ...]:
    """Returns the names of the hyperparameters of all algorithms."""
    return tuple(dict.fromkeys(name for a in algorithms() for name in hparams_type(a).names()))


def config_flags(config: Config, hparams: HParams) -> Any:
    """Returns the options for the fields of `Config`, with the values of `config` as defaults."""
    hints = _resolved_defaults(config, hparams)
    wrappers = _loaded("envs.wrappers", "WRAPPERS", envs.WRAPPER_NAMES)
    metavars = {
        **{name: _braced(words) for name, words in _choices().items()},
        "wrappers": f"[{_braced(wrappers)} VALUE ...]",
        "env_kwargs": "[NAME VALUE ...]",
        "env_params": "[NAME VALUE ...]",
        "optimizer_kwargs": "[NAME VALUE ...]",
    }
    types = get_type_hints(ConfigFlags, include_extras=True)
    fields = []
    for name in (*ALGORITHM_SETTINGS, *metavars):
        shown = tyro.conf.arg(metavar=metavars.get(name), help_behavior_hint=hints.get(name))
        fields.append((name, Annotated[types[name], shown], getattr(config, name)))
    made = _subclass(ConfigFlags, fields)
    made.start = config
    return made(**vars(config))


def hparams_flags(config: Config, hparams: HParams) -> Any:
    """Returns the options of a training's hyperparameters, with `hparams` as their defaults."""
    hints = _resolved_defaults(config, hparams)
    # The command line takes scalars for the fields that may be arrays or tracers in Python.
    # An algorithm may bring names of its own, so the fields are those of its type.
    fields = [
        (name, Annotated[float | None, tyro.conf.arg(help_behavior_hint=hints[name])], value)
        for name, value in vars(hparams).items()
    ]
    flags = _subclass(type(hparams), fields)
    flags.__doc__ = "Hyperparameters, which are traced: a new value compiles nothing."
    # Checked by the command, outside the parser, which would hide the message.
    flags.__post_init__ = lambda self: None
    # An instance, because tyro takes its values as the defaults.
    return flags(**vars(hparams))


def space_flags(config: Config, hparams: HParams, *, has_several_algorithms: bool) -> Any:
    """Returns the options of `sweep`, each of which takes several values of one setting.

    Args:
      config: values of the settings that the sweep does not vary.
      hparams: values of the hyperparameters that the sweep does not vary.
      has_several_algorithms: True if the sweep varies the algorithm, so that settings of algorithms
        have no single default.
    """
    hints = _resolved_defaults(config, hparams)
    # Each algorithm has its own default, and may not use the setting at all.
    if has_several_algorithms:
        hints = {
            name: hint
            for name, hint in hints.items()
            if name in vars(config) and name not in ALGORITHM_SETTINGS
        }
    types = get_type_hints(ConfigFlags)
    names = [
        name
        for name, kind in types.items()
        if name in vars(config)
        and name != "env"
        and (name.endswith("hidden_sizes") or not str(kind).startswith("tuple"))
    ]
    fields = []
    for name in (*names, *hparam_names()):
        words = _choices().get(name) or _literals(types.get(name))
        shown = tyro.conf.arg(
            metavar="VALUES",
            help=f"One or more of {', '.join(words)}." if words else None,
            help_behavior_hint=hints.get(name, "(default: the algorithm's)"),
        )
        fields.append((name, Annotated[str | None, shown], None))
    flags = dataclasses.make_dataclass("SpaceFlags", fields, frozen=True, kw_only=True)
    flags.__doc__ = """The settings of `train`, which explains them. Values with commas,
    uniform(LOW,HIGH), loguniform(LOW,HIGH) and choice(VALUES) are varied. hidden_sizes and
    critic_hidden_sizes are written 64x64,128x128. Parameters of the environment, env_params.NAME,
    can be varied in a --config file."""
    return flags()


def _resolved_defaults(config: Config, hparams: HParams) -> dict[str, str]:
    """Returns what each setting is when its option is left out, in the words of the help."""
    row = algorithms()[config.algorithm]
    used = {**row.settings, **used_hparams(config, row)}
    given = {**vars(config), **hparams.given()}
    schedule_hparams = set().union(*LR_SCHEDULES.values())
    hints = {}
    for name in (*vars(config), *hparams.names()):
        belongs_to_some = name in ALGORITHM_SETTINGS or name not in vars(config)
        if given.get(name) is not None or name in used or not belongs_to_some:
            value = used.get(name) if given.get(name) is None else given[name]
            hints[name] = f"(default: {_shown(value)})"
        elif name in schedule_hparams:
            hints[name] = f"(not used with lr_schedule {config.lr_schedule})"
        else:
            hints[name] = f"(not used by {config.algorithm})"
    return hints


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices() -> dict[str, Iterable[str]]:
    """Returns the words of the settings that a module can register more of."""
    return {
        "algorithm": algorithms(),
        "network": NETWORKS,
        "action_distribution": _loaded("policy.distributions", "BOX_HEADS", _DISTRIBUTIONS),
        "optimizer": OPTIMIZERS,
        "lr_schedule": LR_SCHEDULES,
    }


_DISTRIBUTIONS = ("gaussian", "tanh_gaussian", "beta")


def _loaded(module: str, table: str, names: Any) -> Any:
    """Returns a table of a module, or the names that it has at first if it is not imported.

    Only a module that is imported already can have registered more, and it has loaded the table.
    """
    loaded = sys.modules.get(f"ppo_jax.{module}")
    return names if loaded is None else getattr(loaded, table)


def _braced(names: Iterable[str]) -> str:
    return "{" + ",".join(names) + "}"


def _literals(kind: Any) -> tuple[str, ...]:
    """Returns the words of a Literal, or of one in a union with None."""
    parts = (kind, *get_args(kind))
    return tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))


def _subclass(kind: type, fields: Iterable[tuple[str, Any, Any]]) -> Any:
    return dataclasses.make_dataclass(
        kind.__name__, list(fields), bases=(kind,), frozen=True, kw_only=True
    )
