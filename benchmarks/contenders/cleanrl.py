"""CleanRL, from the checkout that CLEANRL names: each run is a process of one of its scripts.

The time is that of the script's own rate at its end, which leaves out its start. The return is that
of the last 20 episodes of the training, because the scripts evaluate no policy.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from serving import serve

_NAMES = {
    "total_timesteps": "total-timesteps",
    "num_envs": "num-envs",
    "num_steps": "num-steps",
    "num_epochs": "update-epochs",
    "num_minibatches": "num-minibatches",
    "learning_rate": "learning-rate",
    "gamma": "gamma",
    "gae_lambda": "gae-lambda",
    "clip_eps": "clip-coef",
    "ent_coef": "ent-coef",
    "vf_coef": "vf-coef",
    "max_grad_norm": "max-grad-norm",
}
_EPISODES = 20


def build(workload: dict[str, Any]) -> Any:
    """Returns a run of the script that the workload names."""
    script = Path(os.environ["CLEANRL"]) / "cleanrl" / workload["cleanrl_script"]
    settings = {**workload, **workload["hparams"]}
    options = [f"--{option}={settings[name]}" for name, option in _NAMES.items()]
    clips_values = "value_clip_eps" in workload["hparams"]
    flags = ["--no-cuda", "--no-anneal-lr", "--clip-vloss" if clips_values else "--no-clip-vloss"]
    command = [sys.executable, str(script), f"--env-id={workload['task']}", *options, *flags]

    def run(seed: int) -> dict[str, float | None]:
        with tempfile.TemporaryDirectory() as folder:
            seeded = [*command, f"--seed={seed}"]
            output = subprocess.check_output(seeded, cwd=folder, text=True)
        rate = float(re.findall(r"SPS: (\d+)", output)[-1])
        returns = re.findall(r"episodic_return=\[?([-+\d.e]+)", output)[-_EPISODES:]
        return {
            "seconds": workload["total_timesteps"] / rate,
            "return": statistics.mean(map(float, returns)) if returns else None,
        }

    return {}, run


if __name__ == "__main__":
    serve(build)
