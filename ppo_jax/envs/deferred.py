"""Imports that are deferred until an attribute of the module is used."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def deferred(*names: str) -> Iterator[None]:
    """Gives code that is imported inside the block stand-ins for modules that are not loaded yet.

    A stand-in imports its module when an attribute is read whose name does not start with two
    underscores. After the block `sys.modules` holds no stand-in, so that other code gets the
    modules themselves.

    Args:
      names: names of modules, parents before children.

    >>> _ = sys.modules.pop("tabnanny", None)
    >>> with deferred("tabnanny"):
    ...     import tabnanny
    >>> "tabnanny" in sys.modules
    False
    >>> tabnanny.verbose
    0
    """
    stand_ins: dict[str, _StandIn] = {}
    for name in names:
        if name not in sys.modules:
            stand_ins[name] = _StandIn(name, stand_ins)
            parent, _, child = name.rpartition(".")
            if parent in stand_ins:
                setattr(stand_ins[parent], child, stand_ins[name])
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        _withdraw(stand_ins)


class _StandIn(ModuleType):
    def __init__(self, name: str, all_of_them: "dict[str, _StandIn]") -> None:
        super().__init__(name)
        self._all_of_them = all_of_them
        if "." not in name:  # tells where submodules without a stand-in are found
            self.__spec__ = importlib.util.find_spec(name)
            if self.__spec__ and self.__spec__.submodule_search_locations is not None:
                self.__path__ = self.__spec__.submodule_search_locations

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # read by tools that inspect all loaded modules
            raise AttributeError(name)
        _withdraw(self._all_of_them)  # the module itself needs its real parents
        return getattr(importlib.import_module(self.__name__), name)


def _withdraw(stand_ins: dict[str, _StandIn]) -> None:
    for name, stand_in in stand_ins.items():
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
