"""Extension of the API reference: examples of docstrings become blocks of code.

Markdown reads the `>>>` of an example as nested quotations.
"""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", flags=re.MULTILINE)


class FencedExamples(griffe.Extension):
    """Fences the examples in docstrings, which end at an empty line."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of an object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
