"""Every notebook runs from start to end, with a small budget."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


# The quickest in every run of the tests, and all in the slow set: they are minutes of compiling.
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if i == 2 else pytest.mark.slow)
        for i, path in enumerate(NOTEBOOKS)
    ],
)
def test_a_notebook_runs_from_start_to_end(path, monkeypatch):
    monkeypatch.setenv("BUDGET", "0.01")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert figures
