"""Submodules that are imported when they are first used."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def submodules_of(package: str) -> Callable[[str], Any]:
    """Returns a `__getattr__` for a package that imports its submodules.

    With it, `import ppo_jax` makes `ppo_jax.envs.wrappers` reachable, and imports only what is
    used.

    Args:
      package: name of the package, `__name__`.
    """

    def find(name: str) -> Any:
        module = f"{package}.{name}"
        if name.startswith("_") or importlib.util.find_spec(module) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(module)

    return find
