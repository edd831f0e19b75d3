"""Meshes of devices: for the environments of one training, and for the members of a population."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppo_jax.errors import ConfigError
from ppo_jax.types import Shard, TrainState

ENV_AXIS = "env"
MEMBER_AXIS = "member"

STATE_SPECS = TrainState(
    learner=PartitionSpec(),
    rollout=PartitionSpec(ENV_AXIS),  # every leaf is [N, ...]
    statistics=PartitionSpec(),
    env_params=PartitionSpec(),
    key=PartitionSpec(),
    updates_done=PartitionSpec(),
)
"""Placement of a training's state: environments are divided, everything else is replicated."""


def make_env_mesh(num_devices: int, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """Returns the mesh of the devices that share environments.

    Args:
      num_devices: number of devices.
      devices: devices to take them from; None for those of this process.

    Returns:
      The mesh, or None for one device, so that no backend is started.

    Raises:
      ConfigError: there are fewer devices.
    """
    if num_devices == 1:
        return None
    if devices is None:
        # This starts the backend, after which the number of devices of a CPU is fixed.
        devices = jax.devices()
    if len(devices) < num_devices:
        raise ConfigError(
            f"num_devices must be at most the devices there are; got {num_devices} and "
            f"{len(devices)}. Lower num_devices. On a CPU, call "
            f"jax.config.update('jax_num_cpu_devices', {num_devices}) before anything is computed."
        )
    return Mesh(np.array(devices[:num_devices]), (ENV_AXIS,))


def make_shard(mesh: Mesh | None, num_envs: int) -> Shard:
    """Returns the share of `num_envs` environments that each device of the mesh has."""
    if mesh is None:
        return Shard(num_envs)
    # A device of a CPU is one core: 256 samples fit its cache; see docs/performance.md.
    is_cpu = mesh.devices[0].platform == "cpu"
    return Shard(num_envs // mesh.size, ENV_AXIS, chunk_size=256 if is_cpu else None)


def place(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Places a new state as a step returns it, so that all steps are one program."""
    if mesh is None:
        return state

    def place_part(spec: PartitionSpec, part: Any) -> Any:
        return jax.lax.with_sharding_constraint(part, NamedSharding(mesh, spec))

    return jax.tree.map(place_part, STATE_SPECS, state)


def devices_for(num_members: int) -> list[jax.Device]:
    """Returns as many devices of this process as divide the members; others would train copies."""
    return jax.devices()[: math.gcd(num_members, jax.device_count())]


def member_sharding(devices: Sequence[jax.Device]) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is that of members, `[S, ...]`.

    Members are trained independently: their devices exchange nothing.
    """
    mesh = Mesh(np.array(devices), (MEMBER_AXIS,))
    return NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))


def over_members(devices: Sequence[jax.Device]) -> Callable[..., Callable[..., Any]]:
    """Returns a `jax.vmap` that divides members among devices.

    Each device runs its own loops. Under `vmap` alone, an evaluation would exchange among all
    devices, at every step, whether the last episode has ended.

    Returns:
      `(function, in_axes) -> function`; an axis is 0 for an argument of each member, and None for
      one that all share.
    """
    sharding = member_sharding(devices)

    def member_map(
        function: Callable[..., Any], in_axes: Sequence[int | None]
    ) -> Callable[..., Any]:
        return jax.shard_map(
            jax.vmap(function, in_axes=tuple(in_axes)),
            mesh=sharding.mesh,
            in_specs=tuple(PartitionSpec() if axis is None else sharding.spec for axis in in_axes),
            out_specs=sharding.spec,
            check_vma=False,
        )

    return member_map
