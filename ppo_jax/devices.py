"""Meshes of devices: for the environments of one training, and for the members of a population."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppo_jax.errors import ConfigError, require_positive_integers
from ppo_jax.ops.blocks import largest_divisor
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


def make_mesh(
    *, env: int = 1, member: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh with the axes `member` and `env`.

    Devices that share the environments of one training are neighbours in `devices`, because they
    communicate for every minibatch.

    Args:
      env: devices that share the environments of one training.
      member: groups of such devices, which share the members of a population.
      devices: devices to take them from; None for all devices. Devices of a topology serve to
        compile ahead of time.

    Raises:
      ConfigError: a number is not positive, or there are fewer devices.
    """
    require_positive_integers({"the mesh axis env": env, "the mesh axis member": member})
    if devices is None:
        # This starts the backend, after which the number of devices of a CPU is fixed.
        devices = jax.devices()
    needed = env * member
    if len(devices) < needed:
        asked = f"num_devices={env}" if member == 1 else f"env={env} times member={member}"
        raise ConfigError(
            f"a mesh must have at most as many devices as there are; got {asked} and "
            f"{len(devices)}. Use fewer. On a CPU, call "
            f"jax.config.update('jax_num_cpu_devices', {needed}) before anything is computed."
        )
    return Mesh(np.array(devices[:needed]).reshape(member, env), (MEMBER_AXIS, ENV_AXIS))


def population_mesh(num_members: int, *, env: int = 1, member: int | None = None) -> Mesh:
    """Returns the mesh of a population.

    Args:
      num_members: members that are trained together.
      env: devices that share the environments of each member.
      member: groups of such devices. None takes as many as the devices can form with equally
        many members each.

    Raises:
      ConfigError: there are fewer devices, or `member` does not divide the members.
    """
    if member is None:
        member = largest_divisor(num_members, at_most=max(1, jax.device_count() // env))
    mesh = make_mesh(env=env, member=member)
    if num_members % member:
        nearest = largest_divisor(num_members, at_most=member)
        raise ConfigError(
            "the mesh axis member must divide the seeds or members that are trained together; got "
            f"member={member} and {num_members}. Use {nearest}."
        )
    return mesh


def make_shard(mesh: Mesh | None, num_envs: int) -> Shard:
    """Returns the share of `num_envs` environments that each device of the mesh has."""
    if mesh is None:
        return Shard(num_envs)
    # A CPU device is one core, whose cache fits the activations of 256 samples; see docs/design.md.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return Shard(num_envs // mesh.shape[ENV_AXIS], ENV_AXIS, chunk_size=256 if is_cpu else None)


def place(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Gives a new state the sharding of states that steps return, so that `step` compiles once."""
    if mesh is None:
        return state

    def place_part(spec: PartitionSpec, part: Any) -> Any:
        return jax.lax.with_sharding_constraint(part, NamedSharding(mesh, spec))

    return jax.tree.map(place_part, STATE_SPECS, state)


def member_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is that of members, `[S, ...]`."""
    return NamedSharding(mesh, PartitionSpec(MEMBER_AXIS))


def state_shardings(mesh: Mesh) -> TrainState:
    """Returns the placement of the states of a population, with the leading axis of members."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, PartitionSpec(MEMBER_AXIS, *spec)), STATE_SPECS
    )


MemberMap = Callable[..., Callable[..., Any]]
"""`(function, in_axes) -> function`; an axis is 0 for an argument of each member, and None for one
that all share."""


def over_members(mesh: Mesh) -> MemberMap:
    """Returns a variant of `jax.vmap` that divides members among devices without communication.

    Each device runs its own loops. With `vmap` alone, all devices would communicate at every step
    of an evaluation, to find whether the last episode has ended.
    """
    split = PartitionSpec(MEMBER_AXIS)

    def member_map(
        function: Callable[..., Any], in_axes: Sequence[int | None]
    ) -> Callable[..., Any]:
        return jax.shard_map(
            jax.vmap(function, in_axes=tuple(in_axes)),
            mesh=mesh,
            in_specs=tuple(PartitionSpec() if axis is None else split for axis in in_axes),
            out_specs=split,
            check_vma=False,
        )

    return member_map


def trainings_over_members(mesh: Mesh) -> MemberMap:
    """Returns a function like that of `over_members`, for functions that call a trainer's step.

    If devices share environments, the step is a `jax.shard_map` itself. The result is then
    `jax.vmap` with `spmd_axis_name`, which divides the members among groups of devices.
    """
    if mesh.shape[ENV_AXIS] == 1:
        return over_members(mesh)
    return functools.partial(jax.vmap, spmd_axis_name=MEMBER_AXIS)
