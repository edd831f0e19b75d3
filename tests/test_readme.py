"""The documents' examples run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def examples(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


# Programs of the README run longer than those of other pages, so their loops are vectorised.
_README_FLAGS = (
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def outputs(codes, folder, *flags, environment=None):
    """Runs each program as a file in an empty directory, as a user would; returns what they print.

    One process runs all of them, which saves imports; each has a namespace of its own.
    """
    for i, code in enumerate(codes):
        (folder / f"example_{i}.py").write_text(code)
    runs = [f"runpy.run_path('example_{i}.py')\nprint('END')\n" for i in range(len(codes))]
    result = subprocess.run(
        [sys.executable, *flags, "-c", "import runpy\n" + "".join(runs)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, **(environment or {})},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split("END\n")[:-1]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/coming-from.md",
        "docs/how-it-works.md",
        "docs/index.md",
        "docs/logging.md",
        "docs/policies.md",
        "docs/results.md",
        "docs/sweeps.md",
        "docs/machines.md",
    ],
)
def test_examples_of_a_page(page, tmp_path):
    codes = examples(page)
    assert codes
    environment = {"XLA_FLAGS": _README_FLAGS} if page == "README.md" else None
    printed = outputs(codes, tmp_path, environment=environment)
    for code, out in zip(codes, printed, strict=True):
        for expected in re.findall(
            r"print\(.*  # (\(.*\)|[\d.]+)(?::|$)", code, flags=re.MULTILINE
        ):
            assert expected in out


@pytest.mark.slow
def test_extending_is_followed_literally(tmp_path):
    codes = examples("docs/extending.md")
    assert len(codes) == 12
    assert "rollback must be in [0, 1]; got 2.0." in outputs(codes, tmp_path, "-W", "error")[0]


def test_examples_of_environments(tmp_path):
    """All but the last, which needs pgx and is run by the tests of the suites."""
    outputs(examples("docs/environments.md")[:-1], tmp_path)


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)]*)\)", text):
        path, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text().lower(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^a-z0-9 -]", "", h).replace(" ", "-") for h in headings}
            assert anchor in slugs, target
