"""Runs that earlier versions of the package wrote are read, continued and evaluated."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import ppo_jax
from ppo_jax.runs import checkpoint
from ppo_jax.runs.trained import evaluate_run

GOLDEN = sorted((Path(__file__).parent / "golden").iterdir())

pytestmark = pytest.mark.xdist_group("resume")


def test_the_current_format_has_a_golden_run():
    assert f"format-{checkpoint.FORMAT}" in [path.name for path in GOLDEN]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_a_golden_run_is_read_and_continued(golden, tmp_path):
    path = Path(shutil.copytree(golden, tmp_path / "run"))
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 100_000
    for seed in (0, 1):
        policy = ppo_jax.load(path, seed=seed)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(policy.params))
    assert evaluate_run(path, num_episodes=2)["episodes"] == 2
    (saved,) = (path / "checkpoints").iterdir()
    state = ppo_jax.load_state(saved).state
    np.testing.assert_array_equal(state.updates_done, [5, 5])
    with pytest.warns(RuntimeWarning, match="was made with .* may round differently"):
        run = ppo_jax.resume(path, total_timesteps=8 * 16, progress=False)
    assert (run.timesteps_before, run.timesteps) == (5 * 16, 8 * 16)
    assert sorted(set(run.metrics["update"])) == [3, 6, 8]
