"""Writes the golden run of the current format of checkpoints.

python scripts/golden.py

Later versions of the package must read it; `tests/test_golden.py` does. Run it once for a new
format, never again for an old one.
"""

import sys
from pathlib import Path

import ppo_jax
from ppo_jax.runs import checkpoint, provenance

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def main() -> None:
    """Trains a small run with everything that a checkpoint may hold, and keeps its directory."""
    # The same for everyone, so that the files hold nothing of a machine.
    described = {
        "time": "2026-01-01T00:00:00+00:00",
        "device": "cpu",
        "platform": "cpu",
        "device_count": 1,
        "python": "3.11.0",
        "versions": {"ppo-jax": ppo_jax.__version__},
        "commit": None,
    }
    provenance.describe = lambda folder=None: described
    path = GOLDEN / f"format-{checkpoint.FORMAT}"
    if path.exists():
        sys.exit(f"{path} exists, and a golden run is never written again.")
    config = ppo_jax.Config(
        env="Pendulum-v1",
        num_envs=2,
        num_steps=8,
        hidden_sizes=(4,),
        memory="gru",
        memory_size=4,
        num_minibatches=2,
        normalize_obs=True,
        normalize_reward=True,
        total_timesteps=5 * 16,
    )
    ppo_jax.train(config, num_seeds=2, run_dir=path, log_every=3, eval_episodes=2, progress=False)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{path}: {size:,} bytes")


if __name__ == "__main__":
    main()
