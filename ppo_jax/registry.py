"""Tables of parts by name, to which users add parts of their own."""

from collections.abc import Mapping
from typing import TypeVar

from ppo_jax.errors import require_new_name

Part = TypeVar("Part")


class Registry(dict[str, Part]):
    """A table of parts by name that records which of them belong to the package.

    >>> animals = Registry("animal", {"cat": "meow"})
    >>> animals.register("dog", "woof")
    >>> animals.register("dog", "wuff", overwrite=True)
    >>> animals["dog"], animals.is_ours("cat"), animals.is_ours("dog")
    ('wuff', True, False)
    """

    def __init__(self, kind: str, ours: Mapping[str, Part]) -> None:
        """Starts with the parts of the package; `kind` names the parts in errors."""
        super().__init__(ours)
        self._kind, self._ours = kind, dict(ours)

    def register(self, name: str, part: Part, *, overwrite: bool = False) -> None:
        """Adds a part.

        Args:
          name: a name that is not taken.
          part: the new entry.
          overwrite: replace a part that was registered under this name.

        Raises:
          ConfigError: the name is taken, or it is that of a part of the package.
        """
        require_new_name(self._kind, name, self, ours=self._ours, overwrite=overwrite)
        self[name] = part

    def is_ours(self, name: str) -> bool:
        """Returns whether a name stands for a part of the package."""
        return name in self._ours and self.get(name) is self._ours[name]
