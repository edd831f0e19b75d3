"""Parts that several commands share. Nothing slow is imported before it is used."""

import contextlib
import datetime
import os
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.config import Config
from ppo_jax.errors import ConfigError
from ppo_jax.ops.blocks import largest_divisor


def names(text: str) -> tuple[str, ...]:
    """Returns the names in a list that is separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def enable_compilation_cache() -> None:
    """Keeps compiled programs between commands, in the user's cache directory.

    `JAX_COMPILATION_CACHE_DIR` names another directory, and `JAX_ENABLE_COMPILATION_CACHE=false`
    turns the cache off.
    """
    import jax
    import platformdirs

    # A cache that the user has chosen stays in effect.
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = platformdirs.user_cache_path("ppo_jax", appauthor=False) / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_fraction(option: str, text: str | None) -> tuple[int, int] | None:
    """Returns the numbers in an option such as --shard 3/16."""
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--{option} must be i/n, such as 3/16; got {text}.")
    return int(index), int(count)


class MeshOption(NamedTuple):
    """Devices on the two axes of a mesh; None where the option does not say."""

    env: int | None
    member: int | None


def parse_mesh(text: str | None) -> MeshOption:
    """Returns the sizes of the axes in the option --mesh, such as env=4,member=2."""
    sizes: dict[str, int] = {}
    for part in names(text or ""):
        name, _, size = part.partition("=")
        if name not in MeshOption._fields or name in sizes or not re.fullmatch("[1-9][0-9]*", size):
            raise ConfigError(
                f"--mesh must give the axes env and member, such as env=4,member=2; got {text}."
            )
        sizes[name] = int(size)
    return MeshOption(sizes.get("env"), sizes.get("member"))


def with_mesh(config: Config, mesh: MeshOption) -> Config:
    """Returns the config with the devices that the option --mesh gives the axis env."""
    if mesh.env is None:
        return config
    if config.num_devices not in (1, mesh.env):
        raise ConfigError(
            "--num-devices and the axis env of --mesh are the same setting; got "
            f"{config.num_devices} and {mesh.env}. Leave one out."
        )
    return config.replace(num_devices=mesh.env)


def prepare_devices(config: Config, seeds: int | None, member_devices: int | None = None) -> None:
    """Prepares JAX for a training: its cache of programs, and the cores of a CPU as devices."""
    enable_compilation_cache()
    if member_devices is None:
        # Seeds need no communication, so that each core trains some of them.
        member_devices = largest_divisor(
            seeds or 1, at_most=max(1, num_cores() // config.num_devices)
        )
    if seeds is not None or config.num_devices > 1:
        make_cpu_devices(config.num_devices * member_devices)


def use_deterministic_operations() -> None:
    """Makes XLA use only deterministic operations on a GPU. Call it before a backend starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".lstrip()


def make_cpu_devices(number: int) -> None:
    """Makes devices out of the cores of a CPU; other platforms have a fixed number of devices."""
    import jax

    # JAX refuses once it has started, as in a program that calls `main` itself.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", number)


def new_run_dir(env: str, what: str) -> Path:
    """Returns a directory named after the environment, the command and the time.

    A random suffix separates commands that start in the same second.
    """
    time = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    # Not every file system takes the colon of `brax:hopper`.
    return Path("runs") / f"{env.replace(':', '-')}_{what}_{time}-{secrets.token_hex(3)}"


def print_evaluation(result: dict[str, Any], *, is_detailed: bool = False, where: str = "") -> None:
    """Prints a summary that `summarize` made, one or two lines for each seed."""
    per_seed = result["seeds"]
    acting = "greedy" if result["greedy"] else "sampled"
    for row in per_seed:
        print(
            f"evaluation of seed {row['seed']}{where}: return {row['eval/return']:.1f} "
            f"± {row['eval/return_std']:.1f} (minimum {row['eval/return_min']:.1f}), "
            f"length {row['eval/length']:.1f}, over {result['episodes']} {acting} episodes"
        )
        if is_detailed:
            print(f"  {_details(row)}")
    if len(per_seed) > 1:
        print(f"mean return over {len(per_seed)} seeds: {result['eval/return']:.1f}")


def _details(row: Mapping[str, Any]) -> str:
    """Returns the interval of the mean and the quantiles of an evaluation, as text."""
    low, high = row["eval/return_interval"]
    interval = "" if low is None else f"95 % interval of the mean {low:.1f} to {high:.1f}; "
    quantiles = row["eval/return_quantiles"].items()
    shares = ", ".join(f"{float(share):.0%} {value:.1f}" for share, value in quantiles)
    return f"{interval}quantiles {shares}; maximum {row['eval/return_max']:.1f}"


def print_table(console: Any, frame: Any, title: str) -> None:
    """Prints a table of pandas, unless it is empty."""
    import pandas as pd
    from rich.table import Table

    table = Table(*frame.columns, title=title, box=None)
    for row in frame.itertuples(index=False):
        cells = ("" if pd.isna(x) else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row)
        table.add_row(*cells)
    if len(frame):
        console.print(table)


def show_warning(message: Any, category: type[Warning], *_: Any) -> None:
    """Shows a warning of this package as a sentence, without the line of code that warns."""
    say(f"ppo-jax: warning: {message}" if category is RuntimeWarning else f"{message}")


def say(message: str) -> None:
    """Prints a line on standard error."""
    print(message, file=sys.stderr)
