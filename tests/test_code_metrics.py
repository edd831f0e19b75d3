"""The package reads as `scripts/code_metrics.py` measures it."""

import importlib.util
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("code_metrics", ROOT / "scripts/code_metrics.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(script):
    return script.measure(ROOT / "ppo_jax")


def test_functions_are_short(package):
    lengths = sorted(f.body_lines for f in package.functions)
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.9 * len(lengths))] <= 25
    assert not [f for f in package.functions if f.body_lines > 75]


def test_arguments_after_the_data_are_keyword_only(package):
    assert not [f.place for f in package.functions if f.num_positional > 5]


def test_comments_are_frequent_enough(package):
    assert package.comment_share >= 0.03


def test_arguments_are_explained_where_there_are_many(package):
    assert len(package.due_args) > 20
    assert not package.missing_args


def test_docstrings_open_with_a_verb_or_a_noun(package):
    assert not package.banned_openings


def test_the_measures_see_what_they_are_for(script, tmp_path):
    """A file that breaks every rule is found by every measure."""
    body = "\n".join(f"    x{i} = {i}" for i in range(80))
    (tmp_path / "bad.py").write_text(
        f'"""Of a module."""\n\ndef long(a, b, c, d, e, f):\n    """What it does."""\n{body}\n'
        'class C:\n    x: int\n    """Whether it is."""\n'
    )
    found = script.measure(tmp_path)
    (function,) = found.functions
    assert (function.body_lines, function.num_positional) == (80, 6)
    assert found.missing_args == ["bad.py:3 long"]
    assert len(found.banned_openings) == 3
    assert found.comment_share == 0
