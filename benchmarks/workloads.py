"""The trainings that the benchmarks measure; docs/benchmarks.md describes W1 to W7."""

import typing
from typing import Any, NamedTuple

from ppo_jax import Config
from ppo_jax.config import MemoryKind


class Workload(NamedTuple):
    """A training that is measured, of one seed or of several under `vmap`."""

    title: str
    config: Config
    num_seeds: int | None = None

    @property
    def timesteps(self) -> int:
        """Environment steps of one call, over all seeds."""
        return self.config.num_updates * self.config.batch_size * (self.num_seeds or 1)


def _config(
    env: str,
    num_envs: int,
    num_steps: int,
    *,
    updates: int,
    minibatches: int = 4,
    network: str = "mlp",
    env_kwargs: tuple[tuple[str, str], ...] = (),
    **changes: Any,
) -> Config:
    return Config(
        env=env,
        env_kwargs=env_kwargs,
        num_envs=num_envs,
        num_steps=num_steps,
        total_timesteps=updates * num_envs * num_steps,
        num_epochs=4,
        num_minibatches=minibatches,
        network=network,
        hidden_sizes=(64, 64),
        **changes,
    )


CPU_SET = {
    "W1": Workload("CartPole-v1, 4 x 128", _config("CartPole-v1", 4, 128, updates=976)),
    "W2": Workload("CartPole-v1, 2048 x 32", _config("CartPole-v1", 2048, 32, updates=10)),
    "W3": Workload(
        "Breakout-MinAtar, 64 x 128, MLP",
        _config("Breakout-MinAtar", 64, 128, updates=20, minibatches=8),
    ),
    "W4": Workload("16 seeds of W1 under vmap", _config("CartPole-v1", 4, 128, updates=100), 16),
    "W5": Workload("Pendulum-v1, 2048 x 32", _config("Pendulum-v1", 2048, 32, updates=10)),
    "W6": Workload(
        "brax:hopper (spring), 1024 x 16",
        _config("brax:hopper", 1024, 16, updates=10, env_kwargs=(("backend", "spring"),)),
    ),
    "W7": Workload(
        "CartPole-v1, 64 x 128, GRU",
        _config("CartPole-v1", 64, 128, updates=20, memory="gru"),
    ),
}
GPU_SET = {
    **{
        f"cartpole-{n}": Workload(
            f"CartPole-v1, {n} x 128", _config("CartPole-v1", n, 128, updates=20)
        )
        for n in (2048, 16384, 131072)
    },
    **{
        f"breakout-{n}-{network}": Workload(
            f"Breakout-MinAtar, {n} x 128, {network}",
            _config("Breakout-MinAtar", n, 128, updates=10, network=network),
        )
        for n in (2048, 16384)
        for network in ("mlp", "minatar_cnn")
    },
    **{
        f"seeds-{n}": Workload(f"{n} seeds of W1", _config("CartPole-v1", 4, 128, updates=100), n)
        for n in (64, 256, 1024)
    },
}
AHEAD_SET = {
    "cartpole-2048": GPU_SET["cartpole-2048"],
    "breakout-2048": Workload(
        "Breakout-MinAtar, 2048 x 128, MLP",
        _config("Breakout-MinAtar", 2048, 128, updates=10, minibatches=8),
    ),
    "seeds-1024": GPU_SET["seeds-1024"],
    **{
        f"cartpole-1024-{memory}": Workload(
            f"CartPole-v1, 1024 x 128, {memory}",
            _config("CartPole-v1", 1024, 128, updates=20, memory=memory),
        )
        for memory in typing.get_args(MemoryKind)
    },
    "cartpole-1024-gru-shared": Workload(
        "CartPole-v1, 1024 x 128, one GRU for actor and critic",
        _config("CartPole-v1", 1024, 128, updates=20, memory="gru", shared_torso=True),
    ),
    "cartpole-8192-devices-4": Workload(
        "CartPole-v1, 8192 x 128 on four devices",
        _config("CartPole-v1", 8192, 128, updates=20, num_devices=4),
    ),
}
"""Trainings that are compiled for accelerators that are not there."""
SETS = {"cpu": CPU_SET, "gpu": GPU_SET}
WORKLOADS = {**CPU_SET, **GPU_SET, **AHEAD_SET}
