"""The documents' examples run as printed."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = [
    pytest.param(code, id=f"{name}-{i}")
    for name in ("README.md", "docs/policies.md", "docs/sweeps.md")
    for i, code in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    )
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code, capsys):
    with jax.numpy_rank_promotion("allow"):  # as a user has it
        exec(compile(code, "example", "exec"), {})
    out = capsys.readouterr().out
    for expected in re.findall(r"print\(.*  # (\(.*\)|[\d.]+)(?::|$)", code, flags=re.MULTILINE):
        assert expected in out


def test_extending_is_followed_literally(tmp_path):
    """Each example is pasted into a file of an empty directory and run there."""
    page = (ROOT / "docs/extending.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 7
    for i, code in enumerate(examples):
        (tmp_path / f"example_{i}.py").write_text(code)
    # One process runs all of them, which saves six imports; each has a namespace of its own.
    code = "import runpy\n" + "".join(
        f"runpy.run_path('example_{i}.py')\n" for i in range(len(examples))
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "rollback must be in [0, 1]; got 2.0." in result.stdout


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
