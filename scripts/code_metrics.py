"""Measures how the package reads: lengths of functions, parameters, comments and docstrings.

python scripts/code_metrics.py [FOLDER]

`tests/test_code_metrics.py` holds the package to these numbers.
"""

import ast
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# A docstring opens with a verb or with a noun phrase that names the thing.
BANNED_OPENINGS = ("As", "How", "Of", "That", "Those", "What", "Where", "Whether", "Who", "Whose")

Function = ast.FunctionDef | ast.AsyncFunctionDef
_PUBLIC_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)


class FunctionMetrics(NamedTuple):
    """One function or method."""

    place: str
    """`path:line name`."""
    body_lines: int
    """Lines of code and comments after the signature and the docstring."""
    num_positional: int
    """Parameters that can be passed by position, without `self` and `cls`."""
    num_parameters: int
    is_public: bool
    """Neither the function nor anything it is defined in starts with an underscore."""
    docstring: str | None


class Docstring(NamedTuple):
    """A docstring, of a definition or of a field."""

    place: str
    text: str


class CodeMetrics(NamedTuple):
    """A folder of Python files."""

    functions: list[FunctionMetrics]
    docstrings: list[Docstring]
    num_lines: int
    """Lines that are not blank."""
    num_comment_lines: int
    """Lines that consist of a comment."""
    num_trailing_comments: int
    """Comments behind code, such as the shapes of a record's fields."""

    @property
    def comment_share(self) -> float:
        """Share of the lines that consist of a comment."""
        return self.num_comment_lines / self.num_lines

    @property
    def due_args(self) -> list[FunctionMetrics]:
        """Public functions of more than three parameters, which owe their readers `Args`."""
        return [f for f in self.functions if f.is_public and f.num_parameters > 3]

    @property
    def missing_args(self) -> list[str]:
        """Places of those of `due_args` that have no `Args`."""
        return [f.place for f in self.due_args if "Args:" not in (f.docstring or "")]

    @property
    def banned_openings(self) -> list[Docstring]:
        """Docstrings that open with a word of `BANNED_OPENINGS`."""
        return [d for d in self.docstrings if re.split(r"\W", d.text)[0] in BANNED_OPENINGS]


def measure(folder: Path) -> CodeMetrics:
    """Measures all Python files below `folder`."""
    functions: list[FunctionMetrics] = []
    docstrings: list[Docstring] = []
    num_lines = num_comment_lines = num_trailing_comments = 0
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text()
        tree = ast.parse(source)
        name = str(path.relative_to(folder))
        functions += _functions(tree, name, source.splitlines(), is_public=True)
        docstrings += _docstrings(tree, name)
        num_lines += sum(bool(line.strip()) for line in source.splitlines())
        with path.open("rb") as file:
            comments = [t for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
        alone = sum(token.line.lstrip().startswith("#") for token in comments)
        num_comment_lines += alone
        num_trailing_comments += len(comments) - alone
    return CodeMetrics(functions, docstrings, num_lines, num_comment_lines, num_trailing_comments)


def _functions(
    node: ast.AST, path: str, lines: list[str], *, is_public: bool
) -> Iterator[FunctionMetrics]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield _function(child, path, lines, is_public=is_public)
            yield from _functions(child, path, lines, is_public=False)
        elif isinstance(child, ast.ClassDef):
            visible = is_public and not child.name.startswith("_")
            yield from _functions(child, path, lines, is_public=visible)
        else:
            yield from _functions(child, path, lines, is_public=is_public)


def _function(node: Function, path: str, lines: list[str], *, is_public: bool) -> FunctionMetrics:
    docstring = ast.get_docstring(node)
    statements = node.body[1:] if docstring else node.body
    body_lines = 0
    if statements:
        first = node.body[0].end_lineno if docstring else node.body[0].lineno - 1
        body = lines[first : node.end_lineno]
        body_lines = sum(bool(line.strip()) for line in body)
    positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    if positional[:1] in (["self"], ["cls"], ["_"]):
        positional = positional[1:]
    return FunctionMetrics(
        place=f"{path}:{node.lineno} {node.name}",
        body_lines=body_lines,
        num_positional=len(positional),
        num_parameters=len(positional) + len(node.args.kwonlyargs),
        is_public=is_public and not node.name.startswith("_"),
        docstring=docstring,
    )


def _docstrings(tree: ast.AST, path: str) -> Iterator[Docstring]:
    """Yields the strings that stand first in a definition, or right behind a field."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for i, statement in enumerate(body):
            is_string = isinstance(statement, ast.Expr) and isinstance(
                getattr(statement.value, "value", None), str
            )
            opens = i == 0 and isinstance(node, _PUBLIC_DEFINITIONS)
            follows = i > 0 and isinstance(body[i - 1], (ast.Assign, ast.AnnAssign))
            if is_string and (opens or follows):
                yield Docstring(f"{path}:{statement.lineno}", statement.value.value.strip())


def main() -> None:
    """Prints the numbers of a folder, and what is out of bounds."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "ppo_jax"
    metrics = measure(folder)
    lengths = sorted(f.body_lines for f in metrics.functions)
    due, missing = metrics.due_args, metrics.missing_args
    most = max(metrics.functions, key=lambda f: f.body_lines)
    print(f"functions: {len(lengths)}")
    print(f"function body, median: {statistics.median(lengths):.0f} lines")
    print(f"function body, 90th percentile: {lengths[int(0.9 * len(lengths))]} lines")
    print(f"function body, maximum: {most.body_lines} lines ({most.place})")
    many = [f.place for f in metrics.functions if f.num_positional > 5]
    print(f"functions of more than five positional parameters: {len(many)} {many}")
    print(f"lines that consist of a comment: {metrics.comment_share:.1%}")
    print(f"comments behind code: {metrics.num_trailing_comments / metrics.num_lines:.1%}")
    print(
        f"public functions of more than three parameters with Args: "
        f"{len(due) - len(missing)} of {len(due)}; without: {missing}"
    )
    banned = metrics.banned_openings
    print(f"docstrings: {len(metrics.docstrings)}, with a banned opening: {len(banned)}")
    for docstring in banned[:20]:
        print(f"  {docstring.place}: {docstring.text.splitlines()[0]}")


if __name__ == "__main__":
    main()
