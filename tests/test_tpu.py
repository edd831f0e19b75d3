"""Trainings compile for a TPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_training_compiles_for_a_tpu():
    pytest.importorskip("libtpu", reason="pip install libtpu")
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-m", "tests.tpu_checks"],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert result.stdout.endswith("all checks passed\n"), result.stderr
