"""brax's own PPO.

Its `train` compiles in every call, so a single call runs in a thread. Each run is its next stretch
of as many steps as the workload has; the first stretch contains the compilation. Returns of a
training that continues cannot be compared.
"""

import functools
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from serving import Run, serve

_MANY = 1_000
_EPISODE_LENGTH = 1_000


def build(workload: dict[str, Any]) -> tuple[dict[str, float], Run]:
    """Starts `train` and waits for its first stretch."""
    import flax.linen as nn
    from brax import envs  # prints when imported
    from brax.training.agents.ppo.networks import make_ppo_networks
    from brax.training.agents.ppo.train import train

    hparams = workload["hparams"]
    stretches: queue.Queue[float] = queue.Queue()
    turns: queue.Queue[None] = queue.Queue()

    def progress(_: int, metrics: dict[str, Any]) -> None:
        stretches.put(metrics["training/walltime"])
        turns.get()

    networks = functools.partial(
        make_ppo_networks,
        policy_hidden_layer_sizes=(64, 64),
        value_hidden_layer_sizes=(64, 64),
        activation=nn.tanh,
    )
    arguments = {
        "environment": envs.get_environment(
            workload["env"].removeprefix("brax:"), **workload["env_kwargs"]
        ),
        "num_timesteps": _MANY * workload["total_timesteps"],
        "num_evals": _MANY + 1,  # a stretch lies between two evaluations
        "run_evals": False,
        "num_envs": workload["num_envs"],
        "episode_length": _EPISODE_LENGTH,
        "unroll_length": workload["num_steps"],
        "batch_size": workload["num_envs"] // workload["num_minibatches"],  # in unrolls
        "num_minibatches": workload["num_minibatches"],
        "num_updates_per_batch": workload["num_epochs"],
        "learning_rate": hparams["learning_rate"],
        "entropy_cost": hparams["ent_coef"],
        "discounting": hparams["gamma"],
        "gae_lambda": hparams["gae_lambda"],
        "clipping_epsilon": hparams["clip_eps"],
        "vf_loss_coefficient": hparams["vf_coef"],
        "max_grad_norm": hparams["max_grad_norm"],
        "network_factory": networks,
        "progress_fn": progress,
    }
    start = time.perf_counter()
    threading.Thread(target=_train, args=(train, arguments), daemon=True).start()
    total = [stretches.get()]
    figures = {"compile_seconds": time.perf_counter() - start}

    def run(_: int) -> dict[str, float | None]:
        turns.put(None)
        total.append(stretches.get())  # its clock counts training alone
        return {"seconds": total[-1] - total[-2], "return": None}

    return figures, run


def _train(train: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        train(**arguments)
    finally:  # an error must not leave the other side waiting
        os._exit(1)


if __name__ == "__main__":
    serve(build)
