"""The import graph: imports run downwards only, and importing has no effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_jax.envs.suites import SUITES

PACKAGE = Path(__file__).parent.parent / "ppo_jax"

# From the bottom up; a module may import from its own layer's package and from layers below.
LAYERS = [
    ["lazy"],
    ["ops", "errors"],
    ["registry"],
    ["config", "hparams"],
    ["defaults", "presets", "published", "types"],
    ["envs"],
    ["policy"],
    ["stages"],
    ["algorithms"],
    ["resolve"],
    ["devices", "evaluation", "testing"],
    ["trainer"],
    ["diagnosis", "profiling"],
    ["population"],
    ["runs"],
    ["results", "export"],
    ["flags"],
    ["commands"],
    ["cli", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path, *, deferred=True):
    """Names that a module imports; without `deferred`, those that it imports when it is loaded."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if deferred else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def layer(dotted):
    parts = dotted.split(".")
    return LEVEL.get(parts[1]) if parts[0] == "ppo_jax" and len(parts) > 1 else None


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    own = LEVEL[path.relative_to(PACKAGE).with_suffix("").parts[0]]
    upwards = [name for name in imports(path) if (layer(name) or 0) > own]
    assert not upwards


def test_modules_import_each_other_in_no_circle():
    """Inside a package, too, there is an order in which modules can be read."""
    names = {
        ".".join(("ppo_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in modules()
    }
    graph = {
        name: {other for other in imports(path, deferred=False) if other in names}
        for name, path in names.items()
    }
    # Leaves are removed until nothing is left but circles and what leads to them.
    while leaves := {name for name, used in graph.items() if not used & graph.keys()}:
        graph = {name: used for name, used in graph.items() if name not in leaves}
    assert not graph


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("gymnax", "envs/suites/gymnax.py"),
        *((suite.module, f"envs/suites/{name}.py") for name, suite in SUITES.items()),
        ("distrax", "policy/distributions.py"),
    ],
)
def test_slow_packages_are_imported_in_one_module(package, home):
    users = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert users == {home}


SLOW = ["jax", "gymnax", "brax", "distrax", "flax"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["envs"],
        ["train", "--help"],
        ["train", "CartPol-v1"],
        ["train", "CartPole-v1", "--gamma", "2"],
        ["train", "CartPole-v1", "--num-envz", "2"],
        ["train", "CartPole-v1", "--run-dir", "."],
        ["eval", "/nowhere"],
        ["plot", "/nowhere", "-o", "x.txt"],
        ["render", "/nowhere", "-o", "x.gif"],
        ["export", "/nowhere", "--format", "onnx"],
        ["profile", "CartPol-v1"],
    ],
)
def test_help_and_errors_need_no_slow_package(arguments):
    code = (
        "import sys\nfrom ppo_jax.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit: pass\n"
        f"loaded = [name for name in {SLOW} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_every_submodule_is_reachable_and_imported_when_used():
    names = [
        ".".join(("ppo_jax", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in modules()
        if path.stem not in ("__main__", "__init__")
    ]
    code = (
        "import sys, ppo_jax\n"
        "ppo_jax.envs.register('mine', lambda: None)\n"
        "assert 'jax' not in sys.modules\n"
        + "".join(f"{name}\n" for name in names)
        + "assert 'jax' in sys.modules\n"
        "for package in (ppo_jax, ppo_jax.policy):\n"
        "    assert not hasattr(package, 'nothing')\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_importing_everything_starts_no_backend():
    names = [
        ".".join(("ppo_jax", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in modules()
        if path.name != "__main__.py"
    ]
    code = (
        "import importlib, os\nbefore = dict(os.environ)\n"
        f"for name in {names}: importlib.import_module(name.removesuffix('.__init__'))\n"
        "import jax._src.xla_bridge as bridge\n"
        "assert not bridge.backends_are_initialized()\n"
        "assert dict(os.environ) == before\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_tests_of_a_group_run_in_one_process(request):
    """pytest 9.2 with pytest-xdist 3.8 distributes them as if they had no group."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("pytest-xdist with --dist loadgroup has groups")
    assert request.node.nodeid.endswith("@test_layers")
