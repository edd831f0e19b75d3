"""Equal seeds give equal bits; double precision; what a training takes before it runs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError
from ppo_jax.cli import main
from ppo_jax.runs import device_memory, kept
from ppo_jax.runs import run as runs
from tests.test_checkpoint import SMALL, assert_same_bits

pytestmark = pytest.mark.xdist_group("resume")

CONFIG = Config(**{**SMALL, "total_timesteps": 9 * 16})
ROOT = Path(__file__).parent.parent
FLAGS = ["--num-envs", "2", "--num-steps", "8", "--hidden-sizes", "4", "--total-timesteps", "1e3"]


def test_equal_seeds_give_equal_bits():
    one = ppo_jax.train(CONFIG, progress=False, eval_episodes=2)
    kept.forget()  # the second training is built from scratch
    other = ppo_jax.train(CONFIG, progress=False, eval_episodes=2)
    assert_same_bits(one.state, other.state)
    assert_same_bits(one.evaluation.returns, other.evaluation.returns)


def test_trainings_run_and_resume_in_double_precision(tmp_path):
    code = (
        "import sys, jax, ppo_jax\n"
        "from tests.test_determinism import CONFIG\n"
        "from tests.test_checkpoint import assert_same_bits\n"
        "config = CONFIG.replace(normalize_obs=True, lr_schedule='constant')\n"
        "arguments = {'progress': False, 'eval_episodes': 2}\n"
        "whole = ppo_jax.train(config, **arguments)\n"
        "ppo_jax.train(config.replace(total_timesteps=80), run_dir=sys.argv[1], **arguments)\n"
        "run = ppo_jax.resume(sys.argv[1], total_timesteps=144, progress=False)\n"
        "assert_same_bits(run.state, whole.state)\n"
        "assert run.state.rollout.obs.dtype.itemsize in (4, 8)\n"
        "for memory in ('gru', 'lstm', 'mingru', 'lru', 'gtrxl'):\n"
        "    trainer = ppo_jax.make_trainer(config.replace(memory=memory, num_minibatches=2))\n"
        "    state = jax.eval_shape(trainer.init, jax.random.key(0))\n"
        "    after, _ = jax.eval_shape(trainer.step, state)\n"
        "    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)\n"
    )
    environment = {**os.environ, "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def test_a_dry_run_tells_what_would_run_and_runs_nothing(tmp_path, capsys):
    path = tmp_path / "run"
    arguments = ["train", *FLAGS, "--dry-run", "--run-dir", str(path), "--seeds", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "steps    992 in 62 updates, for each of 2 seeds" in out
    assert "memory   0." in out
    assert "MiB of" in out
    assert "nothing was run, and no file was written" in out
    assert not path.exists()


def test_deterministic_operations_are_asked_for_before_a_backend_starts():
    command = [sys.executable, "-m", "ppo_jax", "train", *FLAGS, "--dry-run", "--deterministic"]
    code = (
        "import os, sys\nfrom ppo_jax.cli import main\n"
        f"status = main({command[3:]})\n"
        "assert '--xla_gpu_deterministic_ops=true' in os.environ['XLA_FLAGS'].split()\n"
        "sys.exit(status)\n"
    )
    # XLA ends the process if it does not know the flag.
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_device_that_runs_out_of_memory_is_one_sentence(monkeypatch):
    compile_training = runs.compile_training

    def without_memory(*arguments, **options):
        def advance(*_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        return compile_training(*arguments, **options)._replace(advance=advance)

    monkeypatch.setattr(runs, "compile_training", without_memory)
    with pytest.raises(
        ConfigError, match="which ran out; it takes .* with 2 environments. Half as many, 1,"
    ):
        ppo_jax.train(CONFIG, progress=False)
    other = pytest.raises(jax.errors.JaxRuntimeError, match="another")
    with other, device_memory.exhaustion_explained(1, 1):
        raise jax.errors.JaxRuntimeError("another")


def test_the_number_of_seeds_that_would_fit_is_told(monkeypatch):
    monkeypatch.setattr(device_memory, "limit", lambda device: 2**17)
    with pytest.raises(ConfigError, match=r"About \d+ environments, or \d+ seeds fit"):
        ppo_jax.train(CONFIG, num_seeds=64, progress=False)


def test_arrays_are_of_single_precision_unless_asked():
    state = jax.eval_shape(ppo_jax.make_trainer(CONFIG).init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(state.learner)} <= {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
