"""The documents' examples run as printed."""

import re
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
    for expected in re.findall(r"print\(.*  # (\(.*\)):", code):
        assert expected in out


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").iterdir()))]


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
