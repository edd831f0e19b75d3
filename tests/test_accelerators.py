"""Trainings compile for accelerators that are not there; `make test-accelerators` runs this."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ahead_of_time

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize(
    ("workload", "kernels", "mebibytes"),
    [
        ("cartpole-2048", 2_000, 66),
        ("breakout-2048", 4_090, 460),
        ("seeds-1024", 1_800, 208),
        ("cartpole-1024-mingru", 3_050, 265),
        ("cartpole-1024-gru", 18_600, 620),
        ("cartpole-1024-lstm", 22_000, 800),
    ],
)
def test_a_training_stays_lean_on_a_gpu(workload, kernels, mebibytes):
    """An update on an H100 stays within limits of its kernels and of its temporary memory.

    They are 3 and 5 to 8 % above docs/accelerators.md: one kernel more in each step of a rollout is
    more than the first three allow.
    """
    pytest.importorskip("jax_cuda12_plugin", reason="make test-accelerators")
    found = ahead_of_time.measure("ppo_jax", Path(sys.executable), workload, "h100")
    assert 0 < found["kernels"] <= kernels
    assert found["temporary_bytes"] <= mebibytes * 2**20
    assert not found["loops_of_unknown_length"]
